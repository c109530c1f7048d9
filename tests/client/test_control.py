"""What commands and daemon tell each other: kept through crashes, bounded, and never read half."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from client.control import LONGEST_TERMS, MOST_WAITING, Control
from client.status import STARTING, Status
from common.errors import ConfigError, Refusal, SilotuneError, StorageError
from common.messages import MALFORMED

A, B = "a" * 64, "b" * 64
TERMS: dict[str, Any] = {"data_set": "notes", "rank": 8, "secure_aggregation": True}
HOSTILE = ["../up", "a/b", ".hidden", "", "-x", "a b", "a\nb", "\x1b[2J", "a" * 201, "a\0", "é", "run+1"]


@pytest.fixture
def control(tmp_path: Path) -> Control:
    return Control(tmp_path / "control")


def other(control: Control) -> Control:
    """What another process sees."""
    return Control(control.directory)


def test_nothing_is_said_at_first_and_asking_writes_nothing(control: Control) -> None:
    assert not control.paused()
    assert not control.has_left("run-1")
    assert not control.approved("run-1", A)
    assert control.waiting() == control.left() == control.approvals() == {}
    assert control.read_status() is None
    assert not control.directory.exists()


def test_a_pause_lasts_until_it_ends(control: Control) -> None:
    control.pause()
    assert other(control).paused()
    control.unpause()
    assert not other(control).paused()


def test_a_run_that_was_left_stays_left(control: Control) -> None:
    control.ask("run-1", A, TERMS)
    control.leave("run-1")
    assert other(control).has_left("run-1")
    assert not control.has_left("run-2")
    assert control.waiting() == {}
    since = control.left()["run-1"]
    later = Control(control.directory, lambda: datetime.now(UTC) + timedelta(days=1))
    later.leave("run-1")
    assert control.left() == {"run-1": since}
    with pytest.raises(ConfigError, match="stays left"):
        control.approve("run-1", A)


def test_an_approval_is_of_these_settings_and_no_others(control: Control) -> None:
    control.ask("run-1", A, TERMS)
    control.approve("run-1", A)
    assert other(control).approved("run-1", A)
    assert control.waiting() == {}
    assert not control.approved("run-1", B)
    assert not control.approved("run-2", A)
    assert not control.approved("run-1", "")
    control.ask("run-1", B, {**TERMS, "rank": 64})  # other settings under the same name wait anew
    assert control.waiting()["run-1"].digest == B
    assert control.approved("run-1", A)  # until a person decides again
    control.approve("run-1", B)
    assert control.approved("run-1", B)
    assert not control.approved("run-1", A)


def test_approving_what_was_shown_leaves_what_came_since_waiting(control: Control) -> None:
    control.ask("run-1", A, TERMS)
    control.ask("run-1", B, {**TERMS, "rank": 64})
    control.approve("run-1", A)
    assert control.waiting()["run-1"].digest == B
    assert not control.approved("run-1", B)


def test_the_same_question_again_changes_nothing(control: Control) -> None:
    control.ask("run-1", A, TERMS)
    file = control.directory / "waiting.json"
    before = file.stat().st_ino
    Control(control.directory, lambda: datetime.now(UTC) + timedelta(days=1)).ask("run-1", A, dict(TERMS))
    assert file.stat().st_ino == before
    control.ask("run-1", A, {**TERMS, "rank": 9})
    assert control.waiting()["run-1"].terms["rank"] == 9


def test_a_coordinator_that_invents_runs_fills_no_disk(control: Control) -> None:
    for number in range(MOST_WAITING + 20):
        control.ask(f"run-{number}", A, TERMS)
    names = list(control.waiting())
    assert names == [f"run-{number}" for number in range(20, MOST_WAITING + 20)]
    control.ask("run-0", A, TERMS)  # one that made room is back when it asks again
    assert "run-0" in control.waiting()
    assert "run-20" not in control.waiting()
    control.ask("run-30", B, TERMS)  # one that asks for something else waits behind the others, and costs none of them
    assert list(control.waiting())[-2:] == ["run-0", "run-30"]
    assert len(control.waiting()) == MOST_WAITING
    most = MOST_WAITING * (LONGEST_TERMS + 1000)
    for number in range(MOST_WAITING):
        control.ask(f"long-{number}" + "n" * 190, A, {"said": "ä\x00" * ((LONGEST_TERMS - 20) // 12)})
    assert len(control.waiting()) == MOST_WAITING
    assert sum(file.stat().st_size for file in control.directory.iterdir()) < most


@pytest.mark.parametrize("run", HOSTILE)
def test_a_name_that_no_run_has_is_not_taken(control: Control, run: str) -> None:
    with pytest.raises(Refusal) as refused:
        control.ask(run, A, TERMS)
    assert refused.value.reason == MALFORMED
    for command in (control.leave, lambda name: control.approve(name, A)):
        with pytest.raises(ConfigError, match="expected the name of a run"):
            command(run)
    assert not control.has_left(run)
    assert not control.approved(run, A)
    assert not control.directory.exists()


@pytest.mark.parametrize(
    ("digest", "terms"),
    [
        ("", TERMS),
        ("A" * 64, TERMS),
        ("a" * 63, TERMS),
        (A, {"said": "x" * LONGEST_TERMS}),
        (A, {"said": float("nan")}),
        (A, {"said": b"bytes"}),
    ],
)
def test_what_cannot_be_kept_is_refused(control: Control, digest: str, terms: dict[str, Any]) -> None:
    with pytest.raises(Refusal) as refused:
        control.ask("run-1", digest, terms)
    assert refused.value.reason == MALFORMED
    assert control.waiting() == {}


def test_others_may_not_look(control: Control) -> None:
    control.pause()
    control.ask("run-1", A, TERMS)
    assert stat.S_IMODE(control.directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in control.directory.iterdir()} == {0o600}
    (control.directory / "left.json").write_text("{}")
    (control.directory / "left.json").chmod(0o666)
    with pytest.raises(ConfigError, match="chmod 600"):
        control.has_left("run-1")


ASKED: dict[str, Callable[[Control], object]] = {
    "paused.json": lambda control: control.paused(),
    "left.json": lambda control: control.has_left("run-1"),
    "approved.json": lambda control: control.approved("run-1", A),
    "waiting.json": lambda control: control.waiting(),
}


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000])
def test_what_cannot_be_read_does_not_count_as_allowed(control: Control, name: str, content: str) -> None:
    control.pause()
    (control.directory / name).write_text(content)
    (control.directory / name).chmod(0o600)
    with pytest.raises(StorageError, match=f"{name} cannot be read.*restore it"):
        ASKED[name](control)


def test_entries_of_another_form_do_not_count_as_waiting(control: Control) -> None:
    control.ask("run-1", A, TERMS)
    (control.directory / "waiting.json").write_text(json.dumps({"run-1": {"digest": A}}))
    with pytest.raises(StorageError, match=r"waiting\.json cannot be read"):
        control.waiting()


# --- Status -----------------------------------------------------------------------------------------------------------

STATUS = Status("1", 10, 11, "2030-01-31T12:00:00Z", 0, "coordinator:9443", STARTING, "2030-01-31T12:00:00Z")


def test_a_status_is_read_as_it_was_written(control: Control) -> None:
    status = replace(STATUS, run="run-1", round=3, in_attempt=True, trouble="ä")
    control.write_status(status)
    assert other(control).read_status() == status


@pytest.mark.parametrize("content", ["", "{}", '{"version": "0"}', "[1]"])
def test_a_status_that_is_none_is_no_reason_to_stop(control: Control, content: str) -> None:
    control.write_status(STATUS)
    (control.directory / "status.json").write_text(content)
    assert control.read_status() is None


# --- Crashes, and more than one at a time -----------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from client.control import Control
control, mine = Control(Path(sys.argv[1])), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[3])):
    control.pause()
    control.leave(f"{mine}-{number}")
    control.ask(f"{mine}-asks-{number % 5}", "a" * 64, {"number": number})
    control.unpause()
print("done", flush=True)
"""


def writer(control: Control, name: str, times: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", WRITER, str(control.directory), name, str(times)]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(*writers: subprocess.Popen[str]) -> None:
    """Lets them write, all at once."""
    for process in writers:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()


def test_two_who_write_lose_nothing_and_who_reads_sees_whole_files(control: Control) -> None:
    times = 12
    writers = [writer(control, name, times) for name in ("first", "second")]
    go(*writers)
    looks = 0
    while any(process.poll() is None for process in writers):
        control.paused()
        control.approved("run-1", A)
        assert all(since.endswith("Z") for since in control.left().values())
        assert all(set(one.terms) == {"number"} for one in control.waiting().values())
        looks += 1
    assert [process.wait() for process in writers] == [0, 0]
    assert looks > 5
    assert set(control.left()) == {f"{name}-{number}" for name in ("first", "second") for number in range(times)}
    assert len(control.waiting()) == 10


def test_whoever_is_killed_leaves_what_can_be_read_and_written(control: Control) -> None:
    for round_number in range(3):
        process = writer(control, f"killed-{round_number}", 100_000)
        go(process)
        end = time.monotonic() + 30
        while len(control.left()) < 4 * (round_number + 1) and time.monotonic() < end:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = set(control.left())
        control.paused()
        control.waiting()
        control.leave(f"after-{round_number}")
        assert set(control.left()) == {*before, f"after-{round_number}"}
        assert not list(control.directory.glob(".*.partial"))


def test_what_was_half_written_is_swept_away(control: Control) -> None:
    control.leave("run-1")
    (control.directory / ".waiting.json.partial").write_text("{half")
    control.pause()
    assert {file.name for file in control.directory.iterdir()} == {".lock", "left.json", "paused.json"}


def test_a_full_disk_is_told_and_changes_nothing(control: Control) -> None:
    control.leave("run-1")
    control.directory.chmod(0o500)
    try:
        import os

        if os.geteuid() == 0:  # root writes everywhere; a file size of zero stops it too
            code = (
                "import resource, signal, sys; from pathlib import Path; from client.control import Control\n"
                "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
                "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
                "from common.errors import StorageError\n"
                "try:\n    Control(Path(sys.argv[1])).leave('run-2')\nexcept StorageError as error:\n    sys.exit(7)\n"
            )
            found = subprocess.run([sys.executable, "-c", code, str(control.directory)], check=False)
            assert found.returncode == 7
        else:
            with pytest.raises(SilotuneError):
                control.leave("run-2")
    finally:
        control.directory.chmod(0o700)
    assert set(control.left()) == {"run-1"}
