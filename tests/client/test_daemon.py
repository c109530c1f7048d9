"""The daemon as a machine runs it: real processes that are stopped, killed and told to begin anew."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from typer.testing import CliRunner

import client.main
from client import daemon, keys, trust
from client.control import Control
from client.egress import Entry, open_copy, read_entry, verify
from client.home import ClientHome
from client.status import STARTING, Status
from common.base_model import fingerprint
from common.enrolment import Address, Card, Contents, Member, SignedRoster
from common.errors import ConfigError
from common.flower import HELLO, ROUND, to_records
from common.messages import Hello, Refused, Reply, TrainRequest
from common.models import load
from common.records import write_jsonl
from common.secagg.identity import Identity
from common.wire import from_wire, to_wire
from server.loopback import LoopbackGrid
from server.operator import Operator
from server.superlink import loopback_certificate
from tests.client.conftest import make_config, make_plan, make_records
from tests.deployments import Deployment, ask_by_hand, deployment, free_port, gone, reply_in, running

__all__ = ["deployment", "running"]

PASSPHRASE = b"correct horse battery staple"
NOW = datetime(2030, 1, 31, 12, tzinfo=UTC)
WHEN = "2030-01-31T12:00:00Z"
COORDINATOR = Identity.generate("coordinator")
PATIENCE_S = 90.0


def until(holds: Callable[[], Any], what: str = "") -> Any:
    """What `holds` gives, once that is something."""
    end = time.monotonic() + PATIENCE_S
    while not (found := holds()):
        assert time.monotonic() < end, what or "it never came"
        time.sleep(0.05)
    return found


def enrol(
    home: ClientHome,
    address: str,
    authority: bytes,
    passphrase: bytes | None,
    base: str = "embedded",
    records: int = 30,
) -> keys.Keys:
    """An institution of three, with records, that trusts a roster."""
    file = home.root.parent / "records.jsonl"
    write_jsonl(file, make_records(records, "alder"))
    keys.init(home, "alder", passphrase, base, {"records": file})
    own = keys.load(home, passphrase)
    cards = [keys.card(home)]
    for name in ("birch", "cedar"):
        cards.append(Card.of(Identity.generate(name), ec.generate_private_key(ec.SECP384R1()).public_key()))
    host, _, port = address.rpartition(":")
    contents = Contents(
        federation="oncology",
        serial=1,
        written=WHEN,
        coordinator=COORDINATOR.public,
        address=Address(host, int(port)),
        authority=authority.decode(),
        members=tuple(Member(card, WHEN) for card in cards),
        bundles=(),
    )
    trust.pin(home, SignedRoster.of(contents, COORDINATOR), own, NOW)
    return own


def alone_in_the_world(home: ClientHome, passphrase: bytes | None = None) -> None:
    """An institution whose coordinator is not there."""
    enrol(home, f"127.0.0.1:{free_port()}", loopback_certificate()[0], passphrase)


class Up:
    """`silotune-client up` in a process of its own."""

    def __init__(self, home: ClientHome, *arguments: str, passphrase: bytes | None = None) -> None:
        self.home = home
        self.output = home.root.parent / "output"
        passed: tuple[int, ...] = ()
        if passphrase is not None:
            reading, writing = os.pipe()
            os.write(writing, passphrase)
            os.close(writing)
            passed = (reading,)
            arguments = (*arguments, "--passphrase-fd", str(reading))
        command = [
            sys.executable,
            "-c",
            "from client.main import main; main()",
            "up",
            "--json",
            "--home",
            str(home.root),
        ]
        with self.output.open("wb") as output:
            self.process = psutil.Popen(
                [*command, *arguments], stdout=subprocess.PIPE, stderr=output, pass_fds=passed, text=True
            )
        for descriptor in passed:
            os.close(descriptor)

    def told(self) -> str:
        return self.output.read_text(encoding="utf-8")

    def status(self) -> Status | None:
        return Control(self.home.control).read_status()

    def worker(self, other_than: int = 0, connection: str = "unreachable") -> int:
        """The number of the worker, once it is as far as that."""

        def there() -> int:
            assert self.process.poll() is None, self.told()
            found = self.status()
            if found is None or found.connection != connection or found.worker in (0, other_than):
                return 0
            return found.worker

        return int(until(there, f"no worker that is {connection}"))

    def stop(self) -> tuple[int, float]:
        """The exit code, and how long it took."""
        begin = time.monotonic()
        self.process.terminate()
        return int(self.process.wait(PATIENCE_S)), time.monotonic() - begin

    def finished(self) -> int:
        return int(self.process.wait(PATIENCE_S))


@contextmanager
def up(home: ClientHome, *arguments: str, passphrase: bytes | None = None) -> Iterator[Up]:
    found = Up(home, *arguments, passphrase=passphrase)
    try:
        yield found
    finally:
        family = [found.process, *found.process.children(recursive=True)] if found.process.is_running() else []
        if found.process.poll() is None:
            found.process.kill()
            found.process.wait()
        for one in family[1:]:
            until(lambda one=one: gone(one.pid), "a process was left behind")


@pytest.fixture
def home(tmp_path: Path) -> ClientHome:
    return ClientHome(tmp_path / "alder")


# --- Stopped, killed, changed -----------------------------------------------------------------------------------------


def test_a_daemon_lives_through_crashes_and_changes(home: ClientHome) -> None:
    alone_in_the_world(home, PASSPHRASE)
    with up(home, passphrase=PASSPHRASE) as found:
        first = found.worker()
        assert daemon.is_running(home)
        supervisor = found.process.pid
        assert found.status().supervisor == supervisor  # type: ignore[union-attr]

        # The passphrase is nowhere to be seen.
        for pid in (supervisor, first):
            seen = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
            assert PASSPHRASE not in seen
        assert stat.S_IMODE(home.log.stat().st_mode) == 0o600

        # There is one daemon at a home.
        second = subprocess.run(
            [sys.executable, "-c", "from client.main import main; main()", "up", "--home", str(home.root)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (second.returncode, second.stdout) == (2, "")
        assert "found one that runs" in second.stderr

        # A worker that is killed, as when memory runs out, is replaced.
        os.kill(first, signal.SIGKILL)
        after_kill = found.worker(other_than=first)
        status = found.status()
        assert status is not None
        assert status.restarts == 1
        assert "SIGKILL" in status.trouble

        # A change that holds together takes effect, one that does not is told.
        policy = home.policy.read_text(encoding="utf-8")
        home.policy.write_text(policy.replace("largest_rank: 64", "largest_rank: no number"), encoding="utf-8")
        until(lambda: "cannot be taken up" in found.told(), "a broken policy was not told")
        assert psutil.pid_exists(after_kill)
        home.policy.write_text(policy.replace("largest_rank: 64", "largest_rank: 32"), encoding="utf-8")
        after_change = found.worker(other_than=after_kill)
        assert gone(after_kill)
        assert "begins anew" in found.told()

        # What only a person can mend ends it, once the worker meets it.
        home.data.unlink()
        until(lambda: found.told().count("cannot be taken up") == 2, "a file that went away was not told")
        os.kill(after_change, signal.SIGKILL)
        assert found.finished() == 2
        assert "data.yaml" in found.told().splitlines()[-2]
        assert not daemon.is_running(home)
    assert PASSPHRASE.decode() not in found.told() + home.log.read_text(encoding="utf-8")
    assert "Traceback" not in found.told() + home.log.read_text(encoding="utf-8")


def test_a_coordinator_that_hangs_is_in_nobodys_way(home: ClientHome) -> None:
    """A worker that waits for it ends with its supervisor, another takes over, and that one stops within seconds."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        silent.settimeout(PATIENCE_S)
        enrol(home, f"127.0.0.1:{silent.getsockname()[1]}", loopback_certificate()[0], None)
        with up(home) as first:
            worker = first.worker(connection=STARTING)
            with silent.accept()[0]:
                first.process.kill()
                first.process.wait()
                with up(home) as second:
                    second.worker(other_than=worker, connection=STARTING)
                    with silent.accept()[0]:
                        assert gone(worker)
                        second.process.send_signal(signal.SIGINT)  # as Ctrl-C does
                        begin = time.monotonic()
                        assert second.finished() == 0
                        print(f"stopped {time.monotonic() - begin:.1f} s after it was told, in the middle of a call")
                        assert json.loads(second.process.stdout.read())["ended_by"] == "SIGINT"


@pytest.mark.parametrize("passphrase", [b"another horse and battery", None])
def test_a_wrong_passphrase_is_told_and_final(home: ClientHome, passphrase: bytes | None) -> None:
    alone_in_the_world(home, PASSPHRASE)
    with up(home, passphrase=passphrase) as found:
        assert found.finished() == 2
        assert "expected" in found.told()
        assert "passphrase" in found.told()
        assert "horse" not in found.told()
    assert not daemon.is_running(home)
    assert found.status() is None


LOG = """
import logging, os, resource, signal, sys
from pathlib import Path
from client import worker
worker.LARGEST_LOG = 2000
os.umask(0o077)
worker._log_to(Path(sys.argv[1]))
log = logging.getLogger("silotune.client.alder")
for number in range(500):
    log.info("patient %d", number)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
log.error("patient 4711")
"""


def test_the_log_is_bounded_private_and_goes_nowhere_else(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", LOG, str(tmp_path / "client.log")], capture_output=True, text=True, check=True
    )
    assert found.stdout + found.stderr == ""  # not even what a full disk could not take
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["client.log", *(f"client.log.{n}" for n in range(1, 5))]
    assert all(file.stat().st_size <= 2000 and stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    assert "patient 499" in files[0].read_text(encoding="utf-8")


# --- What is checked before anything starts ---------------------------------------------------------------------------


def test_what_is_in_order_is_told(home: ClientHome) -> None:
    alone_in_the_world(home)
    found = daemon.check(home, None)
    assert (found.institution, found.federation, found.data_sets) == ("alder", "oncology", ("records",))
    assert (found.entries, found.warnings) == (0, ())
    text = re.sub(r"^(data_sets|base_models|bundles): .*$", r"\1: []", home.policy.read_text("utf-8"), flags=re.M)
    home.policy.write_text(text.replace("data_sets: []", "data_sets: [notes]"), encoding="utf-8")
    warned = daemon.check(home, None).warnings
    assert ["notes" in line or "refused" in line for line in warned] == [True] * 3


BROKEN: dict[str, Callable[[ClientHome], object]] = {
    "roster.json": lambda home: home.roster.unlink(),
    "roster.json: expected a JSON": lambda home: home.roster.write_text("{"),
    "policy.yaml": lambda home: home.policy.write_text("approval: perhaps\n"),
    "data.yaml": lambda home: home.data.write_text("machine: {device: abacus}\n"),
    "no/such/model": lambda home: home.data.write_text("machine: {model: no/such/model}\n"),
    "head.json": lambda home: (home.egress / "head.json").write_text("{}"),
    "paused.json": lambda home: (Control(home.control).pause(), (home.control / "paused.json").write_text("{")),
    "chmod 700": lambda home: home.root.chmod(0o755),
    "chmod 600": lambda home: home.identity_key.chmod(0o644),
}


@pytest.mark.parametrize("said", BROKEN)
def test_what_is_not_in_order_is_named(home: ClientHome, said: str) -> None:
    from common.errors import SilotuneError

    alone_in_the_world(home)
    daemon.check(home, None)
    BROKEN[said](home)
    with pytest.raises(SilotuneError) as error:
        daemon.check(home, None)
    assert said.partition(":")[0] in str(error.value)


def test_whoever_looks_is_not_in_the_way_of_a_daemon(home: ClientHome) -> None:
    alone_in_the_world(home)
    assert not daemon.is_running(home)
    with daemon.alone(home):
        assert daemon.is_running(home)
        with pytest.raises(ConfigError, match="found one that runs"), daemon.alone(home):
            pass
    assert not daemon.is_running(home)
    assert stat.S_IMODE((home.control / "daemon.lock").stat().st_mode) == 0o600


def test_a_home_that_cannot_be_written_to_is_told_without_a_stack_trace(home: ClientHome) -> None:
    alone_in_the_world(home)
    (home.control / "daemon.lock").mkdir(parents=True)  # root may write where it is forbidden, but not into a directory
    home.control.chmod(0o700)
    assert not daemon.is_running(home)
    result = CliRunner().invoke(client.main.app, ["up", "--home", str(home.root)])
    assert result.exit_code == 5, result.output
    assert f"cannot write {home.control / 'daemon.lock'}: Is a directory" in " ".join(result.stderr.split())


# --- With a coordinator -----------------------------------------------------------------------------------------------


class Coordinator:
    """Asks one institution by hand."""

    def __init__(self, grid: LoopbackGrid, deployment: Deployment) -> None:
        self.grid = grid
        with Operator(deployment.endpoint) as operator:
            self.number = next(found.number for found in operator.nodes() if found.name == "alder")

    def ask(self, asked: Any, kind: str) -> Reply:
        reply = from_wire(reply_in(ask_by_hand(self.grid, self.number, to_records(to_wire(asked)), kind, PATIENCE_S)))
        assert not isinstance(reply, Hello | TrainRequest)
        return reply  # type: ignore[return-value]


def entries(home: ClientHome) -> list[Entry]:
    found = [read_entry(line.raw) for line in open_copy(home.egress).lines()]
    return [entry for entry in found if entry is not None]


def command(home: ClientHome, *arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(client.main.app, [*arguments, "--home", str(home.root), "--json"])
    assert result.exit_code == 0, result.output
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def test_a_daemon_takes_part_on_its_own_terms(deployment: Deployment, home: ClientHome, base_model: str) -> None:
    """From the first hello to SIGTERM in the middle of training, and back."""
    own = enrol(home, f"127.0.0.1:{deployment.door}", deployment.authority, None, base_model, records=4000)
    policy = home.policy.read_text(encoding="utf-8")
    for before, after in (
        ("weight_unit: 16", "weight_unit: 1"),
        ("required: true", "required: false"),
        ("approval: automatic", "approval: manual"),
    ):
        assert before in policy
        policy = policy.replace(before, after)
    home.policy.write_text(policy, encoding="utf-8")
    with Operator(deployment.endpoint) as operator:
        operator.register("alder", own.node.public_key())
    config = make_config(base_model)
    config = replace(config, train=replace(config.train, passes_per_round=10.0))
    hello = Hello.of(config, "run-1", fingerprint(base_model))

    with deployment.task() as (grid, _):
        with up(home) as found:
            worker = found.worker(connection="connected")
            coordinator = Coordinator(grid, deployment)

            # What people say counts with the next message.
            command(home, "pause")
            assert coordinator.ask(hello, HELLO) == Refused("paused", "alder")
            command(home, "resume")
            command(home, "leave", "run-0", "--yes")
            assert coordinator.ask(replace(hello, run="run-0"), HELLO) == Refused("left", "alder")

            # A run that has to wait is shown, and passes once a person has seen what it asks for.
            assert coordinator.ask(hello, HELLO) == Refused("not_approved", "alder")
            waiting = command(home, "runs")["runs"][-1]
            assert (waiting["name"], waiting["state"]) == ("run-1", "waiting")
            terms = command(home, "approve", "run-1", "--digest", waiting["waiting"]["digest"])["terms"]
            assert (terms["data_set"], terms["rank"], terms["secure_aggregation"]) == ("records", 4, False)
            introduction = coordinator.ask(hello, HELLO)
            assert type(introduction).__name__ == "Introduction"

            # SIGTERM while it trains: gone within seconds, and nothing of the training left.
            adapter = load(config.model, config.lora, 1).read()
            plan = make_plan(config, adapter, run="run-1")
            train = TrainRequest(plan, adapter)
            message = Message(
                to_records(to_wire(train)), dst_node_id=coordinator.number, message_type=ROUND, ttl=PATIENCE_S
            )
            asked = list(grid.push_messages([message]))

            def trains() -> bool:
                status = found.status()
                return status is not None and status.doing == "TrainRequest" and status.in_attempt

            until(trains, "it never trained")
            until(lambda: (home.runs / "run-1" / "settings.json").exists(), "it never began")
            shown = command(home, "status")
            assert (shown["running"], shown["last"]["run"], shown["last"]["round"]) == (True, "run-1", 1)
            code, seconds = found.stop()
            print(f"stopped {seconds:.1f} s after it was told, in the middle of training")
            assert (code, gone(worker)) == (0, True)
            assert json.loads(found.process.stdout.read())["ended_by"] == "SIGTERM"
            status = found.status()
            assert (status and status.connection) == "stopped"
        before = entries(home)
        assert [(entry.kind, entry.run) for entry in before] == [
            ("Refused", "run-1"),
            ("Refused", "run-0"),
            ("Refused", "run-1"),
            ("Introduction", "run-1"),
        ]
        list(grid.pull_messages(asked))

        # Killed in the middle of training, it answers what it had in hand as soon as it is back.
        with up(home) as found:
            worker = found.worker(connection="connected")
            message = Message(
                to_records(to_wire(train)), dst_node_id=coordinator.number, message_type=ROUND, ttl=PATIENCE_S
            )
            asked = list(grid.push_messages([message]))
            until(trains, "it never trained")
            os.kill(worker, signal.SIGKILL)
            (reply,) = until(lambda: list(grid.pull_messages(asked)), "nobody answered for the one that was killed")
            assert from_wire(reply_in(reply)) == Refused("restarted")
            assert found.stop()[0] == 0
    assert [(entry.kind, entry.run, entry.phase) for entry in entries(home)][-1] == ("Refused", "", ROUND)
    assert verify(open_copy(home.egress), own.identity.public).finding is None
