"""Processes of installed code that end with their parent, and one that keeps such a process running."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from common.errors import StorageError

STARTED, ENDED = "started", "ended"

_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0
_LOOK_S = 0.1
_SECRET_BYTES = 4096  # what every pipe takes at once, before anybody reads

# Ends with its parent, however that ends: the pipe to its standard input then closes.
_ENDS_WITH_PARENT = """\
import os, signal, sys, threading
def watch():
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(5)
    os._exit(1)
threading.Thread(target=watch, daemon=True).start()
"""


class Child:
    """A process that runs installed Python code and does not outlive this one, not even when this one is killed.

    It has a session of its own. log: takes what it prints, after what is there; None where it prints to what this
    process prints to. secret: it can read these bytes from a file descriptor, whose number is its last argument (see
    `common.private_files.read_passphrase`), and they are nowhere else.

    Raises StorageError when the log cannot be written, ValueError for a secret of more than 4096 bytes, and OSError
    when the machine has no room for another process.
    """

    def __init__(
        self,
        code: str,
        arguments: Iterable[str],
        log: Path | None,
        environment: Mapping[str, str] | None = None,
        secret: bytes | None = None,
    ) -> None:
        words = list(arguments)
        opened: list[int] = []
        passed: list[int] = []
        try:
            if log is not None:
                opened.append(_append_to(log))
            output = opened[0] if opened else None
            if secret is not None:
                passed.append(_readable(secret))
                words.append(str(passed[0]))
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _ENDS_WITH_PARENT + code, *words],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                pass_fds=passed,
                start_new_session=True,  # a Ctrl-C is for the parent, which ends its children in order
            )
        finally:
            for handle in (*opened, *passed):
                os.close(handle)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        """The exit code, below zero for a signal, or None while it runs."""
        return self._process.poll()

    def stop(self, grace_s: float = 4.0) -> int:
        """Ends it, by force after `grace_s`, and returns its exit code."""
        self._process.terminate()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._end_by_force()
        self._forget()
        return int(self._process.returncode)

    def kill(self) -> None:
        """As a power cut would. For tests."""
        self._end_by_force()
        self._forget()

    def _end_by_force(self) -> None:
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # it leads a group of its own
        self._process.wait()

    def _forget(self) -> None:
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()


@dataclass(frozen=True)
class ChildEvent:
    """What became of a process that `supervise` keeps running.

    kind: started or ended. code: of the one that ended; None when there was no room to start it. wait_s: until it is
    started again; None when it is not.
    """

    kind: str
    pid: int = 0
    code: int | None = None
    wait_s: float | None = None


def supervise(
    start: Callable[[], Child],
    stop: threading.Event,
    on_event: Callable[[ChildEvent], None] = lambda _: None,
    healthy_s: float = 30.0,
    final: Collection[int] = (),
    grace_s: float = 4.0,
    hangs: Callable[[], bool] = lambda: False,
) -> int | None:
    """Keeps a process running until `stop` is set; then ends it, by force after `grace_s`, and returns None.

    One that ends by itself is started again: after about a second at first, twice as long each time, a minute at most;
    after about a second again once it ran for `healthy_s`. final: exit codes that another start would not mend; such a
    code is returned at once. hangs: asked all the time; one that does is ended, by force after `grace_s`, as if it had
    ended by itself.

    Raises what `start` raises, but for OSError, which counts as an end.
    """
    wait_s = _FIRST_WAIT_S
    while not stop.is_set():
        begin = time.monotonic()
        try:
            child = start()
        except OSError:
            pid, code = 0, None
        else:
            pid = child.pid
            try:
                on_event(ChildEvent(STARTED, pid))
                while child.code is None and not hangs() and not stop.wait(_LOOK_S):
                    pass
            finally:
                code = child.stop(grace_s)
        if stop.is_set() or code in final:
            on_event(ChildEvent(ENDED, pid, code))
            return code if code in final and not stop.is_set() else None
        if time.monotonic() - begin >= healthy_s:
            wait_s = _FIRST_WAIT_S
        pause_s = wait_s * random.uniform(0.75, 1.25)  # so that services which fell together do not rise together
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        on_event(ChildEvent(ENDED, pid, code, pause_s))
        stop.wait(pause_s)
    return None


@contextmanager
def stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set `stop` within the block. For the main thread."""

    def handle(*_: object) -> None:
        # Not here: this thread may be the one that holds the event's own lock just now.
        threading.Thread(target=stop.set, name="stop").start()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ended(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None:
        return "could not be started"
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _append_to(log: Path) -> int:
    """The file, for its owner alone, to write after what is there, also once another process has shortened it."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(
            f"cannot write {log}: {error.strerror}; free space or make the directory writable, then try again"
        ) from error


def _readable(secret: bytes) -> int:
    """A file descriptor on which the bytes stand ready, and then the end."""
    if len(secret) > _SECRET_BYTES:
        raise ValueError(f"a secret has at most {_SECRET_BYTES} bytes")
    reading, writing = os.pipe()
    os.write(writing, secret)
    os.close(writing)
    return reading
