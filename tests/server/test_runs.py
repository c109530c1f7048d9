"""The directories of runs: names that are none, who drives one, and how it stands whoever was killed."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from common.config import Config
from common.errors import ConfigError, StorageError
from common.files import append_line
from server import runs
from server.runs import COMPLETE, FAILED, KILLED, RUNNING, STOPPED, Run, Status

HOSTILE = ["../x", "..", ".", "", "/etc", "a/b", "-x", ".hidden", "a\n", "a\x1b[31m", "x" * 201, "ä"]

DRIVER = """\
import sys, time
from pathlib import Path
from server import runs
with runs.driving(runs.Run(Path(sys.argv[1]))):
    print("driving", flush=True)
    time.sleep(600)
"""


def made(root: Path, name: str = "oncology") -> Run:
    run = runs.create(root / "runs", Config(name=name))
    run.config.write_text("name: oncology\n")
    return run


@contextmanager
def driven(run: Run) -> Iterator[subprocess.Popen[str]]:
    """Another process drives the run; it is killed at the end, if it still lives."""
    process = subprocess.Popen([sys.executable, "-c", DRIVER, str(run.root)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "driving\n"
        yield process
    finally:
        process.kill()
        process.communicate()


# --- Which runs there are --------------------------------------------------------------------------------------------


def test_a_new_run_is_called_after_its_configuration_and_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        one, other = (runs.create(tmp_path / "runs", Config(name="a.b-c_D")) for _ in range(2))
    finally:
        os.umask(before)
    assert one.name != other.name
    for run in (one, other):
        name, _, digits = run.name.rpartition("-")
        assert name == "a.b-c_D"
        assert len(bytes.fromhex(digits)) == 4
        assert stat.S_IMODE(run.root.stat().st_mode) == stat.S_IMODE(run.root.parent.stat().st_mode) == 0o700
        assert runs.is_name(run.name)
        assert runs.started(run).endswith("+00:00")


def test_a_name_that_institutions_would_refuse_makes_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most 100 characters, found 101"):
        runs.create(tmp_path / "runs", Config(name="x" * 101))
    assert not (tmp_path / "runs").exists()


def test_a_directory_that_others_can_enter_makes_no_run(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs").chmod(0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        runs.create(tmp_path / "runs", Config(name="a"))


def test_runs_are_listed_by_age_and_what_is_half_made_is_none(tmp_path: Path) -> None:
    assert runs.all_runs(tmp_path / "runs") == []
    young, old = made(tmp_path), made(tmp_path)
    old.started.write_text('{"started": "2001-01-01T00:00:00+00:00"}')
    runs.create(tmp_path / "runs", Config(name="half"))
    (tmp_path / "runs" / ".hidden").mkdir()
    (tmp_path / "runs" / ".hidden" / "config.yaml").write_text("")
    assert runs.all_runs(tmp_path / "runs") == [old, young]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_path_is_no_name(tmp_path: Path, name: str) -> None:
    run = made(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="expected the name of a run") as told:
        runs.find(tmp_path / "runs", name)
    assert run.name in str(told.value)
    assert "\x1b" not in str(told.value)
    assert "\n" not in str(told.value)


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is none yet"):
        runs.find(tmp_path / "runs", "oncology-00000000")
    found = [made(tmp_path) for _ in range(22)]
    with pytest.raises(ConfigError, match="and 2 older ones, see: silotune-server list") as told:
        runs.find(tmp_path / "runs", "oncology-00000000")
    assert sum(run.name in str(told.value) for run in found) == 20
    assert runs.find(tmp_path / "runs", found[3].name) == found[3]


# --- Who drives it ---------------------------------------------------------------------------------------------------


def test_one_process_drives_a_run_at_a_time_and_none_once_it_is_killed(tmp_path: Path) -> None:
    run = made(tmp_path)
    assert runs.driver(run) is None
    with driven(run) as process:
        assert runs.driver(run) == process.pid
        with (
            pytest.raises(ConfigError, match=f"found it driven by process {process.pid}; follow it: silotune-server l"),
            runs.driving(run),
        ):
            raise AssertionError("two drive it")
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert runs.driver(run) is None
    with runs.driving(run):
        assert run.lock.read_text() == str(os.getpid())
    assert runs.driver(run) is None


def test_whoever_only_looks_is_in_nobodys_way(tmp_path: Path) -> None:
    run, over = made(tmp_path), threading.Event()

    def look() -> None:
        while not over.is_set():
            runs.driver(run)

    lookers = [threading.Thread(target=look) for _ in range(2)]
    with runs.driving(run):
        pass
    for looker in lookers:
        looker.start()
    try:
        for _ in range(50):
            with runs.driving(run):
                assert runs.driver(run) == os.getpid()
    finally:
        over.set()
        for looker in lookers:
            looker.join()


# --- How it stands ---------------------------------------------------------------------------------------------------

STANDS = Status(
    COMPLETE,
    phase="done",
    round=3,
    rounds=3,
    answered=("a",),
    waiting={"b": "paused"},
    refused={"c": "left"},
    perplexity=4.5,
    best_round=2,
    delivered=("a", "b"),
    pid=17,
    number=2**63,
    started="2030-01-01T00:00:00+00:00",
    updated="2030-01-02T00:00:00+00:00",
    ended="2030-01-02T00:00:00+00:00",
)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    run = made(tmp_path)
    for status in (STANDS, replace(STANDS, perplexity=None), replace(STANDS, state=STOPPED, why="interrupted")):
        runs.write_status(run, status)
        assert runs.read_status(run) == status


def test_a_run_whose_driver_was_killed_has_failed(tmp_path: Path) -> None:
    run = made(tmp_path)
    with driven(run) as process:
        runs.write_status(run, replace(STANDS, state=RUNNING, pid=process.pid, ended=""))
        assert runs.read_status(run).state == RUNNING
        process.kill()
        process.wait()
        found = runs.read_status(run)
    assert (found.state, found.why, found.round) == (FAILED, KILLED, 3)
    assert (found.answered, found.waiting, found.ended) == ((), {}, STANDS.updated)


def test_a_run_that_is_driven_again_runs_whatever_it_said_before(tmp_path: Path) -> None:
    run = made(tmp_path)
    runs.write_status(run, replace(STANDS, state=STOPPED, why="interrupted"))
    with driven(run) as process:
        found = runs.read_status(run)
        assert (found.state, found.pid, found.why, found.ended) == (RUNNING, process.pid, "", "")


def test_a_run_that_said_nothing_has_failed(tmp_path: Path) -> None:
    assert (found := runs.read_status(made(tmp_path))).state == FAILED
    assert found.why == KILLED


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"state": "asleep"}',
        "{}",
        '{"state": "complete", "round": "3"}',
        '{"state": "complete", "waiting": ["a"]}',
        '{"state": "complete", "delivered": "a"}',
        '{"state": "complete", "of": 3}',
    ],
)
def test_a_damaged_status_is_told_with_a_remedy(tmp_path: Path, text: str) -> None:
    run = made(tmp_path)
    run.status.write_text(text)
    with pytest.raises(StorageError, match=r"status\.json: cannot be read .* remove it"):
        runs.read_status(run)
    assert json.loads((run.root / "started.json").read_text())


# --- What it has to say ----------------------------------------------------------------------------------------------


def test_the_log_is_read_to_its_end_without_what_a_terminal_would_obey(tmp_path: Path) -> None:
    run = made(tmp_path)
    assert list(runs.lines(run, follow=False)) == []
    run.log.write_bytes("one\ntwo \x1b[31mred\nthree é".encode()[:-1])
    assert list(runs.lines(run, follow=True)) == [
        "one",
        "two \N{REPLACEMENT CHARACTER}[31mred",
        "three \N{REPLACEMENT CHARACTER}",
    ]


def test_a_log_is_followed_until_nobody_drives_the_run(tmp_path: Path) -> None:
    run = made(tmp_path)
    run.log.write_text("before\nha")
    with driven(run) as process:
        told = runs.lines(run, follow=True)
        assert next(told) == "before"
        append_line(run.log, "lf")
        assert next(told) == "half"
        append_line(run.log, "last")
        process.kill()
        process.wait()
        assert list(told) == ["last"]
