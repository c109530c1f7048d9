"""Runs as their commands drive them: prepared offline, then over real services to which no institution comes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from rich.text import Text

from common import config_files
from common.config import Config, DataConfig, EvaluationConfig, FederationConfig, FileConfig, ModelConfig, named
from common.enrolment import Card
from common.errors import ConfigError, DataError, ModelError, RunStopped
from common.records import write_jsonl
from common.secagg.identity import Identity
from server import checkpoints, detached, driver, enrolment, runs, stopping, upkeep
from server.coordinator import Bench
from server.driver import Audience
from server.enrolment import Settings
from server.home import ServerHome
from server.operator import Operator
from server.rounds import RoundRecord, begin
from server.runs import COMPLETE, FAILED, KILLED, RUNNING, STOPPED
from tests.client.conftest import make_config, make_records
from tests.deployments import free_port

NAMES = ("alder", "birch", "cedar")
SECRET = b"correct horse battery staple"

DISOBEDIENT = """\
import os, signal, sys, time
from pathlib import Path
from server import runs
asked = []
def on_signal(*_):
    asked.append(1)
    if len(asked) == int(sys.argv[2]):
        os._exit(1)
signal.signal(signal.SIGTERM, on_signal)
with runs.driving(runs.Run(Path(sys.argv[1]))):
    print("driving", flush=True)
    while True:
        time.sleep(0.1)
"""


def eventually(holds: Callable[[], object], timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def set_up(root: Path) -> ServerHome:
    """A coordinator whose key has a passphrase, and three members."""
    home = ServerHome(root)
    now = datetime.now(UTC)
    enrolment.init(home, Settings("oncology", ("127.0.0.1",), free_port(), free_port()), SECRET, now)
    cards = [Card.of(Identity.generate(name), ec.generate_private_key(ec.SECP384R1()).public_key()) for name in NAMES]
    enrolment.enroll(home, cards, SECRET, now)
    return home


def make(base_model: str, directory: Path, gather_s: float = 600.0, **changes: Any) -> Config:
    """A deployment of the small base model, with records of the coordinator's own."""
    directory.mkdir(parents=True, exist_ok=True)
    write_jsonl(directory / "own.jsonl", make_records(12, "coordinator"))
    config = make_config(
        base_model,
        data=DataConfig(generator="", institutions=named(*NAMES), coordinator=FileConfig(str(directory / "own.jsonl"))),
        federation=FederationConfig(rounds=1, weight_unit=1, timeout_s=20.0, gather_s=gather_s),
    )
    return replace(config, **changes)


# --- Prepared --------------------------------------------------------------------------------------------------------


def test_a_run_that_is_prepared_has_all_it_needs_and_is_not_begun(tmp_path: Path, base_model: str) -> None:
    home = set_up(tmp_path / "home")
    config = make(base_model, tmp_path)
    run = driver.prepare(home, config)
    assert run.name.startswith("tiny-")
    assert config_files.load(str(run.config)) == config
    assert run.validation.is_file()
    assert run.test.is_file()
    assert (runs.read_status(run).state, runs.read_status(run).why) == (STOPPED, "not begun yet")
    assert runs.all_runs(home.runs) == [run]


def test_what_cannot_be_meant_or_read_leaves_nothing_behind(tmp_path: Path, base_model: str) -> None:
    home = set_up(tmp_path / "home")
    config = make(base_model, tmp_path)
    stranger = replace(config, data=replace(config.data, institutions=named(*NAMES, "elm")))
    nowhere = replace(config, data=replace(config.data, coordinator=FileConfig(str(tmp_path / "none.jsonl"))))
    for wrong, error, says in (
        (stranger, ConfigError, "found elm, not on the roster"),
        (nowhere, DataError, "found none"),
        (replace(config, model=ModelConfig(str(tmp_path))), ModelError, "no config.json"),
    ):
        with pytest.raises(error, match=says):
            driver.prepare(home, wrong)
    assert not home.runs.exists()


def test_without_services_there_is_no_run_and_a_word_of_what_to_do(tmp_path: Path, base_model: str) -> None:
    home = set_up(tmp_path / "home")
    run = driver.prepare(home, make(base_model, tmp_path))
    signer = enrolment.identity(home, SECRET)
    with pytest.raises(ConfigError, match="found none; start them: silotune-server up"):
        driver.conduct(home, run, signer, threading.Event())
    assert runs.driver(run) is None
    assert runs.read_status(run).state == STOPPED
    with pytest.raises(RunStopped, match=r"could not be driven in the background: .* silotune-server up"):
        detached.start(home, run, SECRET)
    with pytest.raises(RunStopped, match=r"the background: .*expected the passphrase of this key"):
        detached.start(home, run, b"another passphrase than that")


def test_the_first_signal_asks_and_the_second_ends() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with driver.interruptible() as found:
        os.kill(os.getpid(), signal.SIGTERM)
        eventually(found.asked.is_set)
        assert found.stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("signals", "ends"), [(1, True), (2, True), (99, False)])
def test_a_driver_that_does_not_end_is_asked_again(tmp_path: Path, signals: int, ends: bool) -> None:
    run = runs.create(tmp_path / "runs", Config(name="tiny"))
    command = [sys.executable, "-c", DISOBEDIENT, str(run.root), str(signals)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "driving\n"
        if ends:
            found = stopping.stop(ServerHome(tmp_path), run, 2.0)
            assert (found.state, found.why) == (FAILED, KILLED)  # it left no word of its own
            assert stopping.stop(ServerHome(tmp_path), run, 2.0) == found
        else:
            with pytest.raises(RunStopped, match=f"process {process.pid}, to end within 1 s"):
                stopping.stop(ServerHome(tmp_path), run, 0.5)
    finally:
        process.kill()
        process.communicate()


# --- Over real services ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Up:
    """A coordinator's home whose services run."""

    home: ServerHome
    signer: Identity


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    home = set_up(tmp_path_factory.mktemp("coordinator") / "home")
    stop, ready = threading.Event(), threading.Event()

    def tell(event: upkeep.Event) -> None:
        if event.kind == upkeep.READY:
            ready.set()

    thread = threading.Thread(target=upkeep.serve, args=(home, stop, tell, "127.0.0.1"))
    thread.start()
    try:
        assert ready.wait(120)
        yield Up(home, enrolment.identity(home, SECRET))
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()


def test_a_run_in_the_background_outlives_its_command_and_is_stopped_and_resumed(
    up: Up, tmp_path: Path, base_model: str
) -> None:
    run = driver.prepare(up.home, make(base_model, tmp_path, gather_s=600.0))
    pid = detached.start(up.home, run, SECRET)
    try:
        assert runs.driver(run) == pid
        process = Path("/proc") / str(pid)
        assert SECRET not in (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        stat = (process / "stat").read_text().rpartition(")")[2].split()
        assert int(stat[1]) != os.getpid()  # its parent
        assert int(stat[3]) != os.getsid(0)  # its session
        eventually(lambda: runs.read_status(run).phase == "gathering")
        standing = runs.read_status(run)
        assert (standing.state, standing.pid) == (RUNNING, pid)
        assert dict(standing.waiting) == dict.fromkeys(NAMES, "absent")
        with pytest.raises(ConfigError, match=f"driven by process {pid}"):
            driver.conduct(up.home, run, up.signer, threading.Event())
        told = stopping.stop(up.home, run, 60.0)
    finally:
        if runs.driver(run) == pid:
            os.kill(pid, signal.SIGKILL)
    assert (told.state, told.why) == (STOPPED, "interrupted")
    said = list(runs.lines(run, follow=False))
    assert f"process {pid} drives {run.name} from round 0 of 1" in said[0]
    assert any("waiting for alder (absent), birch (absent), cedar (absent)" in line for line in said)
    assert SECRET.decode() not in "\n".join(said)


def test_a_run_that_is_ended_at_the_superlink_says_so(up: Up, tmp_path: Path, base_model: str) -> None:
    run = driver.prepare(up.home, make(base_model, tmp_path))

    def end() -> None:
        eventually(lambda: runs.read_status(run).phase == "gathering")
        with Operator(driver.superlink(up.home)) as operator:
            assert operator.stop_run(runs.read_status(run).number)

    ending = threading.Thread(target=end)
    ending.start()
    try:
        with pytest.raises(RunStopped, match="the run was stopped"):
            driver.conduct(up.home, run, up.signer, threading.Event())
    finally:
        ending.join(60)
    assert runs.read_status(run).state == STOPPED
    assert "silotune-server resume" in runs.read_status(run).why


def test_a_run_without_institutions_fails_and_says_why(up: Up, tmp_path: Path, base_model: str) -> None:
    run = driver.prepare(up.home, make(base_model, tmp_path, gather_s=0.5))
    ready: list[str] = []
    with pytest.raises(RunStopped, match="0 institutions can take part"):
        driver.conduct(up.home, run, up.signer, threading.Event(), Audience(on_ready=lambda: ready.append("ready")))
    assert ready == ["ready"]
    found = runs.read_status(run)
    assert found.state == FAILED
    assert "0 institutions can take part" in found.why
    assert found.ended
    assert not run.summary.exists()
    assert runs.driver(run) is None


def test_a_complete_run_is_scored_once_and_hands_out_what_is_left(up: Up, tmp_path: Path, base_model: str) -> None:
    config = make(base_model, tmp_path, gather_s=0.5, evaluation=EvaluationConfig(exact=["coding"]))
    run = driver.prepare(up.home, config)
    start = Bench.of(config).start
    scored = {"perplexity": 30.0, "accuracy": None}
    record = RoundRecord(1, 3, 0, {"birch": "timed_out"}, 1.5, None, scored, True, {"train": 2.0}, 10, 20)
    done = replace(
        begin(start, Bench.of(config).scores(start, Bench.of(config).read(run.validation))),
        best_round=1, best_perplexity=30.0, history=(record,),
    )  # fmt: skip
    checkpoints.save(run.checkpoints, done, config_files.digest(config))
    lines: list[Text] = []
    found = driver.conduct(up.home, run, up.signer, threading.Event(), Audience(tell=lines.append))
    assert json.loads(run.summary.read_text()) == found
    assert (found["run"], found["delivered"], found["own"]) == (run.name, [], {})
    assert found["absences"] == {"birch": {"timed_out": 1}}
    assert found["everyone"]["base"] == found["everyone"]["federated"]  # the adapter changes nothing
    assert found["everyone"]["base"]["perplexity"] > 1
    assert found["privacy"]["terms"]["cohort"] == 3
    assert f"silotune-server resume {run.name}" in lines[-1].plain
    assert run.name in run.report.read_text()
    assert runs.read_status(run).state == COMPLETE
    run.test.unlink()  # it is not read again
    assert driver.conduct(up.home, run, up.signer, threading.Event()) == found
    for file in run.checkpoints.iterdir():
        file.unlink()
    with pytest.raises(ConfigError, match="expected its checkpoints, found them pruned"):
        driver.conduct(up.home, run, up.signer, threading.Event())
    assert runs.read_status(run).state == COMPLETE
