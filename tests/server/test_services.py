"""What others may know of the services, and that one process at a time keeps them up."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from common.enrolment import Card
from common.errors import ConfigError
from common.secagg.identity import Identity
from server import enrolment, services
from server.enrolment import Settings
from server.home import ServerHome
from server.services import Said, ServicesState, alone, say, state


@pytest.fixture
def home(tmp_path: Path) -> ServerHome:
    found = ServerHome(tmp_path / "server")
    now = datetime.now(UTC)
    enrolment.init(found, Settings("tests", ("127.0.0.1",), 9443, 9092), None, now)
    cards = [
        Card.of(Identity.generate(name), ec.generate_private_key(ec.SECP384R1()).public_key())
        for name in ("alder", "birch")
    ]
    enrolment.enroll(found, cards, None, now)
    return found


def test_services_that_never_ran_are_told_as_such(home: ServerHome) -> None:
    found = state(home)
    assert found == ServicesState(
        False, False, "", {"alder": "enrolled", "birch": "enrolled"}, found.certificate_expires
    )
    assert found.certificate_expires > f"{datetime.now(UTC):%Y-%m-%d}"


def test_what_is_said_counts_while_they_are_kept_up(home: ServerHome) -> None:
    with alone(home):
        assert state(home).running
        assert not state(home).ready
        say(home, Said("2030-01-31T12:00:00Z", True, {"alder": "online", "fir": "online"}))
        found = state(home)
        assert (found.running, found.ready, found.since) == (True, True, "2030-01-31T12:00:00Z")
        assert found.members == {"alder": "online", "birch": "enrolled"}  # the roster says who is a member
    found = state(home)  # what a process that was killed has left counts for nothing
    assert (found.running, found.ready, found.since) == (False, False, "")
    assert found.members == {"alder": "enrolled", "birch": "enrolled"}


def test_nothing_more_is_said_once_that_was_said(home: ServerHome) -> None:
    with alone(home):
        say(home, Said("2030-01-31T12:00:00Z", True, {}))
        say(home, None)
        assert not state(home).ready


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b'{"since": 1, "ready": true}', b'{"since": "", "members": 3}'])
def test_what_cannot_be_read_counts_for_nothing(home: ServerHome, damaged: bytes) -> None:
    with alone(home):
        services._state_file(home).write_bytes(damaged)
        assert not state(home).ready


def test_one_process_at_a_time_keeps_them_up(home: ServerHome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "_LOCK_PATIENCE_S", 0.2)
    code = (
        "import sys; from pathlib import Path; from server.home import ServerHome; from server.services import alone\n"
        f"with alone(ServerHome(Path({str(home.root)!r}))):\n"
        "    print('there', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "there\n"
    with (
        pytest.raises(ConfigError, match=rf"found them running \(process {other.pid}\); stop that process"),
        alone(home),
    ):
        raise AssertionError
    other.kill()
    other.communicate()
    with alone(home):
        assert state(home).running


def test_an_error_within_is_the_callers_own(home: ServerHome) -> None:
    with pytest.raises(OSError, match="mine"), alone(home):
        raise OSError("mine")
    assert not state(home).running


def test_where_there_is_no_coordinator_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="silotune-server init"):
        state(ServerHome(tmp_path))
