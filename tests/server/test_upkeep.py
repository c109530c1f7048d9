"""`silotune-server up`: real processes that are killed, a roster that changes, and an end that leaves nothing."""

from __future__ import annotations

import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from typer.testing import CliRunner

import server.main
from client import events as told_of
from client import node
from client.calls import Connection
from common.bundle import bundle_digest
from common.enrolment import Card
from common.log_files import LARGEST_BYTES
from common.secagg.identity import Identity
from server import authority, enrolment, ports, upkeep
from server.enrolment import Settings
from server.home import ServerHome
from server.services import state
from tests.deployments import Events, free_port, gone, introduction, wait_for

PASSPHRASE = b"correct horse battery staple"


def made_home(root: Path) -> ServerHome:
    """A coordinator whose keys have a passphrase, which its services do without."""
    home = ServerHome(root)
    settings = Settings("tests", ("127.0.0.1",), free_port(), free_port())
    enrolment.init(home, settings, PASSPHRASE, datetime.now(UTC))
    return home


def certify(home: ServerHome, days: int) -> None:
    """Another certificate of the same authority, which ends in so many days and some hours."""
    begin = datetime.now(UTC) + timedelta(days=days - authority.SERVER_DAYS, hours=6)
    made = authority.server_certificate(
        x509.load_pem_x509_certificate(home.authority.read_bytes()),
        authority.read_curve_key(home.authority_key, PASSPHRASE),
        authority.read_curve_key(home.tls_key, None).public_key(),
        ["127.0.0.1"],
        begin,
    )
    home.tls_certificate.write_bytes(made.public_bytes(Encoding.PEM))


class Member:
    """An institution's keys, and its node when it is connected."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.identity = Identity.generate(name)
        self.key = ec.generate_private_key(ec.SECP384R1())
        self.events = Events()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def card(self) -> Card:
        return Card.of(self.identity, self.key.public_key())

    def connect(self, up: Up) -> None:
        settings = enrolment.read_settings(up.home)
        connection = Connection(f"127.0.0.1:{settings.port}", up.home.authority.read_bytes(), self.key, heartbeat_s=10)
        arguments = (connection, introduction(self.name), {bundle_digest()}, self._stop, self.events.append)
        self._thread = threading.Thread(target=node.serve, args=arguments, daemon=True)
        self._thread.start()

    def leave(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(15)
            assert not self._thread.is_alive()


class Up:
    """`silotune-server up` in a process of its own."""

    def __init__(self, home: ServerHome, *arguments: str, impatient: bool = False) -> None:
        """impatient: with a SuperLink that hangs, for seconds only."""
        self.home = home
        self.log = home.root.parent / f"{home.root.name}.out"
        self.errors = home.root.parent / f"{home.root.name}.err"
        code = "from server import upkeep; from server.main import main; "
        if impatient:
            code += "upkeep._ANSWER_S, upkeep._SILENT_S = 1.0, 2.0; "
        code += "main()"
        with self.log.open("wb") as out, self.errors.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, "up", "--home", str(home.root), *arguments], stdout=out, stderr=err
            )
        self.seen: set[int] = set()

    def says(self, pattern: str, times: int = 1, timeout_s: float = 40.0) -> None:
        def said() -> bool:
            text = self.log.read_text() + self.errors.read_text()
            assert self.process.poll() is None, text
            return len(re.findall(pattern, text)) >= times

        try:
            wait_for(said, timeout_s)
        except AssertionError:
            raise AssertionError(f"no {pattern!r} in:\n{self.log.read_text()}{self.errors.read_text()}") from None

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.log.read_text()))

    def child(self, code: str) -> int:
        """The process of one of the services."""
        (found,) = [
            child.pid for child in psutil.Process(self.process.pid).children() if code in " ".join(child.cmdline())
        ]
        self.seen.add(found)
        return int(found)

    @property
    def superlink(self) -> int:
        return self.child("flower_superlink()")

    @property
    def door(self) -> int:
        return self.child("server.front import main")

    def enroll(self, *members: Member) -> None:
        enrolment.enroll(self.home, [member.card for member in members], PASSPHRASE, datetime.now(UTC))

    def remove(self, name: str) -> None:
        enrolment.remove(self.home, name, PASSPHRASE, datetime.now(UTC))

    def end(self, number: int = signal.SIGTERM, timeout_s: float = 15.0) -> int:
        """Ends it, and sees that nothing is left behind."""
        if self.process.poll() is None:
            self.seen |= {child.pid for child in psutil.Process(self.process.pid).children(recursive=True)}
            self.process.send_signal(number)
        code = self.process.wait(timeout_s)
        wait_for(lambda: all(map(gone, self.seen)), 10)
        return code


@pytest.fixture(scope="module")
def alder() -> Iterator[Member]:
    member = Member("alder")
    yield member
    member.leave()


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, alder: Member) -> Iterator[Up]:
    """One for the tests of this module; alder was enrolled before it, and stays connected."""
    home = made_home(tmp_path_factory.mktemp("up") / "server")
    enrolment.enroll(home, [alder.card], PASSPHRASE, datetime.now(UTC))
    certify(home, days=15)
    found = Up(home)
    try:
        found.says("ready: members reach it at 127.0.0.1")
        alder.connect(found)
        alder.events.wait(told_of.CONNECTED)
        found.says("alder is online")
        yield found
    finally:
        found.end(signal.SIGKILL)


def shown_certificate(up: Up) -> x509.Certificate:
    """What a member sees at the door."""
    trust = ssl.create_default_context(cadata=up.home.authority.read_text())
    port = enrolment.read_settings(up.home).port
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as raw,
        trust.wrap_socket(raw, server_hostname="127.0.0.1") as connection,
    ):
        found = connection.getpeercert(binary_form=True)
    assert found
    return x509.load_der_x509_certificate(found)


# --- While it runs ----------------------------------------------------------------------------------------------------


def test_who_was_enrolled_before_takes_part_and_what_runs_is_told(up: Up) -> None:
    up.says("alder is on the roster: its node may take part")
    found = state(up.home)
    assert (found.running, found.ready, dict(found.members)) == (True, True, {"alder": "online"})
    assert found.since <= f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def test_a_certificate_that_ends_soon_is_told(up: Up) -> None:
    ends = state(up.home).certificate_expires
    up.says(f"the certificate ends {ends}, in 15 days; run: silotune-server renew")
    assert up.count("the certificate ends") == 1


def test_the_superlink_is_on_loopback_alone_and_the_door_everywhere(up: Up) -> None:
    settings = enrolment.read_settings(up.home)
    listening = {
        process: {found.laddr for found in psutil.Process(process).net_connections() if found.status == "LISTEN"}
        for process in (up.superlink, up.door)
    }
    assert listening == {
        up.superlink: {("127.0.0.1", settings.superlink_port)},
        up.door: {("0.0.0.0", settings.port)},
    }
    with pytest.raises(ConnectionRefusedError):  # another address of the same interface
        socket.create_connection(("127.0.0.2", settings.superlink_port), timeout=5)
    socket.create_connection(("127.0.0.2", settings.port), timeout=5).close()


def test_a_second_one_is_refused(up: Up) -> None:
    done = CliRunner().invoke(server.main.app, ["up", "--home", str(up.home.root)])
    assert done.exit_code == 2
    assert f"found them running (process {up.process.pid})" in done.stderr
    assert state(up.home).ready


def test_who_is_enrolled_gets_in_and_who_is_removed_is_shut_out_for_good(up: Up) -> None:
    birch = Member("birch")
    birch.connect(up)
    try:
        birch.events.wait(told_of.NOT_ADMITTED)
        up.enroll(birch)
        up.says("birch is on the roster")
        birch.events.wait(told_of.CONNECTED, timeout_s=30)
        up.says("birch is online")
        wait_for(lambda: state(up.home).members == {"alder": "online", "birch": "online"})
        up.remove("birch")
        birch.events.wait(told_of.NOT_ENROLLED)
        up.says("birch is no longer on the roster: its node is shut out")
        wait_for(lambda: state(up.home).members == {"alder": "online"})
        up.enroll(birch)
        up.says("birch: expected a new node key, found one that was removed before")
        wait_for(lambda: state(up.home).members == {"alder": "online", "birch": "shut_out"})
        up.enroll(Member("dogwood"))
        up.says("dogwood is on the roster")
        assert up.count("birch: expected a new node key") == 1  # told once, and not asked for again
    finally:
        birch.leave()
    up.remove("birch")
    up.remove("dogwood")
    again = Member("birch")
    up.enroll(again)
    up.says("birch is on the roster", times=2)
    wait_for(lambda: state(up.home).members == {"alder": "online", "birch": "enrolled"})
    assert alder_was_never_away(up)


def alder_was_never_away(up: Up) -> bool:
    return up.count("alder is offline") == 0


@pytest.mark.parametrize("service", ["superlink", "door"])
def test_a_service_that_is_killed_is_started_again_and_members_come_back(up: Up, alder: Member, service: str) -> None:
    before, heard = getattr(up, service), len(alder.events)
    ready = up.count("ready: members")
    psutil.Process(before).kill()
    up.says(
        {"superlink": "the SuperLink was ended by SIGKILL; started again in", "door": "the members' door was"}[service]
    )
    alder.events.wait(told_of.UNREACHABLE, after=heard)
    alder.events.wait(told_of.CONNECTED, after=heard, timeout_s=40)
    up.says("ready: members", times=ready + 1)
    assert getattr(up, service) != before
    assert state(up.home).ready


def test_another_certificate_is_taken_up_and_connections_go_on(up: Up, alder: Member) -> None:
    door, before, heard = up.door, shown_certificate(up).serial_number, len(alder.events)
    enrolment.renew(up.home, PASSPHRASE, datetime.now(UTC))
    made = x509.load_pem_x509_certificate(up.home.tls_certificate.read_bytes())
    assert made.serial_number != before
    wait_for(lambda: shown_certificate(up).serial_number == made.serial_number)
    up.says(
        f"there is another certificate, which members see from now on; it ends {state(up.home).certificate_expires}"
    )
    assert up.door == door
    assert told_of.UNREACHABLE not in alder.events[heard:]


def test_a_roster_of_anybody_else_or_of_earlier_counts_for_nothing(up: Up, tmp_path: Path) -> None:
    newest, members = up.home.roster.read_bytes(), dict(state(up.home).members)
    up.enroll(Member("cedar"))
    up.says("cedar is on the roster")
    latest = up.home.roster.read_bytes()
    other = made_home(tmp_path / "other")
    for damaged, told in (
        (newest, "expected serial .* or a later one"),
        (other.roster.read_bytes(), "expected one that this coordinator's key signed"),
        (latest.replace(b'"serial": ', b'"serial": 1'), "expected a signature of the coordinator's key"),
        (b"", "expected JSON"),
    ):
        up.home.roster.write_bytes(damaged)
        up.says(told)
    up.home.roster.write_bytes(latest)
    up.remove("cedar")
    up.says("cedar is no longer on the roster")
    wait_for(lambda: dict(state(up.home).members) == members)
    assert up.count("cedar is on the roster") == 1
    assert alder_is_online(up)


def alder_is_online(up: Up) -> bool:
    return state(up.home).members["alder"] == "online"


@pytest.mark.parametrize("name", ["superlink.log", "front.log"])
def test_logs_stay_small(up: Up, name: str) -> None:
    log = up.home.services / name
    with log.open("ab") as file:
        file.write(b"x" * (LARGEST_BYTES + 1))
    wait_for(lambda: log.stat().st_size < 10_000)
    assert (up.home.services / f"{name}.1").stat().st_size > LARGEST_BYTES


def test_a_signal_ends_all_within_seconds(up: Up, alder: Member) -> None:
    heard = len(alder.events)
    assert up.end(signal.SIGTERM) == 0
    assert "stopped" in up.log.read_text().split("\n")[-2]
    assert not state(up.home).running
    alder.events.wait(told_of.UNREACHABLE, after=heard)
    for port in (enrolment.read_settings(up.home).port, enrolment.read_settings(up.home).superlink_port):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)


# --- Starts and ends --------------------------------------------------------------------------------------------------


def test_one_that_is_killed_leaves_nothing_and_the_next_goes_on_also_when_the_superlink_hangs(tmp_path: Path) -> None:
    home = made_home(tmp_path / "server")
    alder, birch = Member("alder"), Member("birch")
    first = Up(home)
    try:
        first.says("ready: members")
        first.enroll(alder, birch)
        first.says("birch is on the roster")
        psutil.Process(first.process.pid).kill()
    finally:
        first.end(signal.SIGKILL)
    first.remove("birch")
    second = Up(home, "--json", impatient=True)
    try:
        second.says("ready: members")
        second.says("birch is no longer on the roster")
        assert state(home).members == {"alder": "enrolled"}
        hung = second.superlink
        psutil.Process(hung).suspend()
        second.says(r"the SuperLink answered nothing for 2 s and was ended by SIGKILL; started again in")
        assert gone(hung)
        second.says("ready: members", times=2)
        assert second.superlink != hung
        psutil.Process(second.superlink).suspend()  # nor does one that hangs keep it from ending
    finally:
        code = second.end(signal.SIGINT)
    assert code == 0
    told: dict[str, Any] = json.loads(second.log.read_text())
    assert told["restarts"] >= 1
    assert told["since"] <= told["until"]


def refused(home: ServerHome, *arguments: str) -> str:
    done = CliRunner().invoke(server.main.app, ["up", "--home", str(home.root), *arguments])
    assert done.exit_code == 2, done.stderr
    return done.stderr


def test_what_keeps_them_from_starting_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_PATIENCE_S", 0.2)
    assert "run: silotune-server init" in refused(ServerHome(tmp_path / "nobody"))
    home = made_home(tmp_path / "server")
    assert "--listen: expected an IP address" in refused(home, "--listen", "localhost")
    settings = enrolment.read_settings(home)
    for key, port in (("port", settings.port), ("superlink_port", settings.superlink_port)):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", port))
            taken.listen(1)
            told = refused(home)
        assert f"error: {key}: expected that a service can listen on port {port}" in told
    certify(home, days=-2)
    told = refused(home)
    assert "certificate has expired" in told
    assert "silotune-server renew" in told
    assert not state(home).running


@pytest.mark.parametrize(
    ("left", "told"),
    [
        (timedelta(days=30), ""),
        (
            timedelta(days=29, hours=23),
            "the certificate ends 2030-01-31T12:00:00Z, in 29 days; run: silotune-server renew",
        ),
        (timedelta(hours=23), "the certificate ends 2030-01-31T12:00:00Z, within a day; run: silotune-server renew"),
        (
            timedelta(seconds=-1),
            "the certificate ended 2030-01-31T12:00:00Z, and members refuse it; run: silotune-server renew",
        ),
    ],
)
def test_a_certificates_last_days_are_told(left: timedelta, told: str) -> None:
    ends = datetime(2030, 1, 31, 12, tzinfo=UTC)
    assert upkeep.notice(ends, ends - left) == told
