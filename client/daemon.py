"""The institution's daemon: checks what can be checked, and keeps the process that answers and trains running.

Two processes: this one is light, holds the passphrase and outlives whatever happens to the other, which runs
`client.worker`, and which ends with this one however this one ends.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from client import data_sets, keys, policy_file, trust
from client.control import Control
from client.egress import EgressLog
from client.home import ClientHome
from client.status import STARTING, Status
from common.base_model import model_directory
from common.enrolment import timestamp
from common.errors import ConfigError, SilotuneError, StorageError
from common.private_files import check_private_directory, private_directory, writing
from common.processes import STARTED, Child, ChildEvent, ended, supervise

FINAL = frozenset({2, 3, 4, 5})
"""Exit codes of the worker for what a person has to mend: starting it again would not."""

_LOOK_S = 0.1
_LOOK_AT_FILES_S = 1.0
_PATIENCE_S = 1.0  # with whoever only looks whether a daemon runs
_GRACE_S = 8.0  # the worker itself takes at most six seconds

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Checked:
    """What was found to be in order. entries: of the egress log. warnings: what is allowed, and yet hardly meant."""

    institution: str
    federation: str
    address: str
    data_sets: tuple[str, ...]
    entries: int
    warnings: tuple[str, ...]


def check(home: ClientHome, passphrase: bytes | None) -> Checked:
    """All that can be checked without the network, torch and the records; mends what a crash left in the egress log.

    Raises ConfigError, ModelError and StorageError that say what to mend.
    """
    own = keys.load(home, passphrase)
    roster = trust.pinned(home)
    policy = policy_file.read(home.policy)
    file = data_sets.read(home.data)
    model_directory(file.machine.model)
    head = EgressLog(home.egress, own.identity).mend()
    Control(home.control).paused()
    known = tuple(file.data_sets)
    unknown = [name for name in policy.data_sets if name not in known]
    warnings = [
        *(f"data_sets of {home.policy} names {name}, which {home.data} does not know" for name in unknown),
        *([] if policy.data_sets else [f"data_sets of {home.policy} is empty: every run is refused"]),
        *([] if policy.base_models else [f"base_models of {home.policy} is empty: every run is refused"]),
        *([] if policy.bundles else [f"bundles of {home.policy} is empty: every run is refused"]),
    ]
    return Checked(own.identity.name, roster.federation, str(roster.address), known, head.count, tuple(warnings))


@contextmanager
def alone(home: ClientHome) -> Iterator[None]:
    """Is the one daemon of this home.

    Raises ConfigError when another is, and when others can enter the home; StorageError when nothing can be written.
    """
    check_private_directory(home.root)
    private_directory(home.control)
    with _lock(home, os.O_RDWR | os.O_CREAT) as lock:
        end = time.monotonic() + _PATIENCE_S
        while not _try(lock, fcntl.LOCK_EX):
            if time.monotonic() >= end:
                raise ConfigError(
                    f"{home.root}: expected no daemon here, found one that runs; `silotune-client status` shows it, and"
                    " SIGTERM stops it"
                )
            time.sleep(0.05)
        yield


def is_running(home: ClientHome) -> bool:
    """Whether a daemon runs at this home."""
    try:
        with _lock(home, os.O_RDONLY) as lock:
            return not _try(lock, fcntl.LOCK_SH)
    except StorageError:
        return False


@contextmanager
def _lock(home: ClientHome, flags: int) -> Iterator[int]:
    path = home.control / "daemon.lock"
    with writing(path):
        handle = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield handle
    finally:
        os.close(handle)


def _try(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def keep_running(home: ClientHome, passphrase: bytes | None, stop: Callable[[], bool], tell: Tell) -> int | None:
    """Keeps the worker running until `stop()`; then ends it within seconds, and returns None.

    One that crashes or is killed is started again, later each time. When the roster, policy.yaml or data.yaml changes
    and still holds together, the worker is replaced at once by one that knows the change. The exit code of a worker
    that found what only a person can mend is returned.
    """
    worker = _Worker(home, passphrase, tell)
    watch = _Watch(home)
    while not stop():
        changed, code = _until_change(worker, watch, stop, tell)
        if not changed:
            return code
        tell("begins anew with what has changed")
    return None


def _until_change(worker: _Worker, watch: _Watch, stop: Callable[[], bool], tell: Tell) -> tuple[bool, int | None]:
    """Keeps it running until `stop()`, a final exit code or a change, and says whether it was that, and the code."""
    over = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(supervise, worker.start, over, on_event=worker.tell, final=FINAL, grace_s=_GRACE_S)
        try:
            looked, changed = time.monotonic(), False
            while not (stop() or changed or running.done()):
                time.sleep(_LOOK_S)
                if time.monotonic() - looked >= _LOOK_AT_FILES_S:
                    looked, changed = time.monotonic(), watch.changed(tell)
        finally:
            over.set()
        return changed, running.result()


class _Worker:
    """Starts workers, and tells what becomes of them."""

    def __init__(self, home: ClientHome, passphrase: bytes | None, tell: Tell) -> None:
        self._home = home
        self._passphrase = passphrase
        self._tell = tell
        self._starts = 0
        self._trouble = ""

    def start(self) -> Child:
        control, now = Control(self._home.control), timestamp(datetime.now(UTC))
        address, starts = str(trust.pinned(self._home).address), self._starts
        first = Status(version("silotune"), os.getpid(), 0, now, starts, address, STARTING, now)
        with suppress(StorageError):  # on a full disk the status is old, and all else goes on
            control.write_status(replace(first, trouble=self._trouble, trouble_since=now if self._trouble else ""))
        arguments = [str(self._home.root), str(os.getpid()), str(starts)]
        self._starts += 1
        return Child("from client.worker import work; work()", arguments, None, secret=self._passphrase)

    def tell(self, event: ChildEvent) -> None:
        if event.kind == STARTED:
            self._tell(f"worker {event.pid} started")
        elif event.wait_s is not None:
            self._trouble = f"worker {event.pid} {ended(event.code)}"
            self._tell(f"{self._trouble}; the next one starts in {event.wait_s:.0f} s")


_Stamp = tuple[tuple[int, int, int] | None, ...]


class _Watch:
    """Looks for changes of the files that a worker reads at its start."""

    def __init__(self, home: ClientHome) -> None:
        self._home = home
        self._files: dict[Path, Callable[[], object]] = {
            home.roster: lambda: trust.pinned(home),
            home.policy: lambda: policy_file.read(home.policy),
            home.data: lambda: data_sets.read(home.data),
        }
        self._known = self._last = self._stamp()

    def changed(self, tell: Tell) -> bool:
        """Whether they changed, stayed as they are since the last look, and hold together; tells when they do not."""
        before, self._last = self._last, self._stamp()
        if self._last == self._known or self._last != before:
            return False  # nothing new, or somebody is still writing
        self._known = self._last
        try:
            for read in self._files.values():
                read()
        except SilotuneError as error:
            tell(f"goes on with what it knew, since a change cannot be taken up: {error}")
            return False
        return True

    def _stamp(self) -> _Stamp:
        return tuple(_stamp_of(file) for file in self._files)


def _stamp_of(file: Path) -> tuple[int, int, int] | None:
    with suppress(OSError):
        found = file.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns
    return None
