"""Processes that end with their parent, and what keeps one running."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from common import processes
from common.errors import StorageError
from common.processes import ENDED, STARTED, Child, ChildEvent, ended, stopped_by_signals, supervise
from tests.deployments import gone, wait_for


def test_a_child_does_not_outlive_a_parent_that_was_killed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from common.processes import Child\n"
        f"child = Child('import time; time.sleep(60)', [], Path({str(tmp_path / 'log')!r}))\n"
        "print(child.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert not gone(child)
    parent.kill()
    parent.communicate()
    end = time.monotonic() + 10
    while not gone(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert gone(child)


def test_a_child_that_does_not_listen_is_ended_by_force(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    child = Child(deaf, [], tmp_path / "log")
    while b"up" not in (tmp_path / "log").read_bytes():
        time.sleep(0.02)
    assert child.stop(grace_s=0.3) == -signal.SIGKILL
    assert gone(child.pid)


def test_a_secret_is_read_from_a_descriptor_and_stands_nowhere_else(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom common.private_files import read_passphrase\n"
        "said = read_passphrase(int(sys.argv[-1]), None)\n"
        "print(sys.argv[1:-1], len(said), said[::-1].decode(), flush=True)\nimport time; time.sleep(60)"
    )
    child = Child(code, ["one"], tmp_path / "log", secret=b"correct horse battery")
    try:
        wait_for(lambda: (tmp_path / "log").read_text().endswith("\n"))
        assert (tmp_path / "log").read_text() == "['one'] 21 yrettab esroh tcerroc\n"
        for shown in ("cmdline", "environ"):
            assert b"correct horse" not in Path(f"/proc/{child.pid}/{shown}").read_bytes()
        assert "correct horse" not in repr(vars(child))
    finally:
        child.stop()


def test_a_secret_that_no_pipe_takes_at_once_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4096"):
        Child("", [], tmp_path / "log", secret=bytes(4097))


def test_a_child_prints_where_its_parent_does_when_there_is_no_log(capfd: pytest.CaptureFixture[str]) -> None:
    child = Child("print('here', flush=True)", [], None)
    wait_for(lambda: child.code == 0)
    assert child.stop() == 0
    assert capfd.readouterr().out == "here\n"


def test_a_log_is_for_its_owner_alone_and_is_added_to(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for word in ("one", "two"):
        child = Child(f"print({word!r})", [], log)
        wait_for(lambda found=child: found.code == 0)  # type: ignore[misc]
        child.stop()
    assert log.read_text() == "one\ntwo\n"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    with pytest.raises(StorageError, match="cannot write"):
        Child("", [], log / "below")


def test_ended_by_force_it_takes_its_own_processes_along(tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "below = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(below.pid, flush=True); time.sleep(60)"
    )
    child = Child(code, [], tmp_path / "log")
    wait_for(lambda: (tmp_path / "log").read_text().endswith("\n"))
    below = int((tmp_path / "log").read_text())
    child.stop(grace_s=0.1)
    wait_for(lambda: gone(below))


# --- Supervision ------------------------------------------------------------------------------------------------------


def supervised(code: str, log: Path, stop: threading.Event, events: list[ChildEvent], **settings: Any) -> int | None:
    return supervise(lambda: Child(code, [], log), stop, events.append, **settings)


def test_what_ends_is_started_again_later_each_time_and_soon_again_when_it_was_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_FIRST_WAIT_S", 0.1)
    monkeypatch.setattr(processes, "_LONGEST_WAIT_S", 0.4)
    stop, events = threading.Event(), list[ChildEvent]()

    def tell(event: ChildEvent) -> None:
        events.append(event)
        if len(events) == 10:
            stop.set()

    lasts = iter([0.0, 0.0, 0.0, 1.0, 0.0])

    def start() -> Child:
        return Child(f"import time; time.sleep({next(lasts)}); raise SystemExit(7)", [], tmp_path / "log")

    assert supervise(start, stop, tell, healthy_s=1.0) is None
    assert [event.kind for event in events] == [STARTED, ENDED] * 5
    ends = [event for event in events if event.kind == ENDED]
    assert {event.code for event in ends} == {7}
    waits = [event.wait_s or 0.0 for event in ends]
    for wait_s, about_s in zip(waits, [0.1, 0.2, 0.4, 0.1, 0.2], strict=True):
        assert 0.75 * about_s <= wait_s <= 1.25 * about_s


def test_an_end_that_no_start_would_mend_is_told_at_once(tmp_path: Path) -> None:
    events: list[ChildEvent] = []
    assert supervised("raise SystemExit(2)", tmp_path / "log", threading.Event(), events, final={2}) == 2
    assert events[1:] == [ChildEvent(ENDED, events[0].pid, 2)]


def test_what_hangs_is_ended_and_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_FIRST_WAIT_S", 0.01)
    stop, events, hangs = threading.Event(), list[ChildEvent](), threading.Event()

    def tell(event: ChildEvent) -> None:
        events.append(event)
        if event.kind == STARTED and len(events) == 1:
            os.kill(event.pid, signal.SIGSTOP)
            hangs.set()
        elif event.kind == ENDED:
            hangs.clear()
        else:
            stop.set()

    def start() -> Child:
        return Child("import time; time.sleep(60)", [], tmp_path / "log")

    found = supervise(start, stop, tell, grace_s=0.2, hangs=hangs.is_set)
    assert found is None
    first, end, second, *_ = events
    assert (end.pid, end.wait_s is not None) == (first.pid, True)
    assert end.code in (-signal.SIGTERM, -signal.SIGKILL)  # as far as it came before it was stopped
    assert second.kind == STARTED
    assert gone(first.pid)


@pytest.mark.parametrize("deaf", [False, True])
def test_stop_ends_the_child_and_waits_for_nothing_else(tmp_path: Path, deaf: bool) -> None:
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if deaf else ""
    stop, events = threading.Event(), list[ChildEvent]()
    code = ignore + "import time; print('up', flush=True); time.sleep(60)"
    thread = threading.Thread(
        target=supervised, args=(code, tmp_path / "log", stop, events), kwargs={"grace_s": 0.3}, daemon=True
    )
    thread.start()
    wait_for(lambda: bool(events) and b"up" in (tmp_path / "log").read_bytes())
    stop.set()
    thread.join(10)
    assert not thread.is_alive()
    assert gone(events[0].pid)
    assert events[1] == ChildEvent(ENDED, events[0].pid, -signal.SIGKILL if deaf else -signal.SIGTERM)


def test_stop_ends_a_wait_too(tmp_path: Path) -> None:
    stop = threading.Event()

    def tell(event: ChildEvent) -> None:
        if event.kind == ENDED:
            assert event.wait_s is not None
            threading.Timer(0.05, stop.set).start()

    found = supervise(lambda: Child("raise SystemExit(2)", [], tmp_path / "log"), stop, tell)
    assert found is None


def test_no_room_for_a_process_is_an_end_and_no_room_for_a_log_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_FIRST_WAIT_S", 0.01)
    stop, events = threading.Event(), list[ChildEvent]()
    tries = iter([OSError(11, "no room"), OSError(11, "no room")])

    def start() -> Child:
        for error in tries:
            raise error
        return Child("raise SystemExit(2)", [], tmp_path / "log")

    assert supervise(start, stop, events.append, final={2}) == 2
    assert [(event.kind, event.code) for event in events] == [(ENDED, None), (ENDED, None), (STARTED, None), (ENDED, 2)]
    with pytest.raises(StorageError):
        supervise(lambda: Child("", [], tmp_path / "log" / "below"), stop)


def test_a_signal_sets_stop_within_the_block_alone() -> None:
    stop, before = threading.Event(), signal.getsignal(signal.SIGTERM)
    with stopped_by_signals(stop):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(10)
    assert signal.getsignal(signal.SIGTERM) is before


def test_how_a_process_ended_is_told_in_words() -> None:
    assert [ended(code) for code in (3, -9, -250, None)] == [
        "ended with code 3",
        "was ended by SIGKILL",
        "was ended by signal 250",
        "could not be started",
    ]
