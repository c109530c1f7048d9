"""Whether the coordinator's services run, and what others may know of them; without a passphrase.

`server.upkeep` runs them and writes what is read here.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from common.enrolment import timestamp
from common.errors import ConfigError, StorageError
from common.private_files import private_directory, write_private_json, writing
from server import authority, enrolment
from server.home import ServerHome

ONLINE, ENROLLED, SHUT_OUT = "online", "enrolled", "shut_out"
"""How a member stands: there, not there now, or not let in since its node key was removed once."""

_LOCK_PATIENCE_S = 1.0  # whoever only looks holds it for a moment


@dataclass(frozen=True)
class ServicesState:
    """The services as others see them.

    running: whether a process keeps them up. ready: whether members can reach them. since: when they were started
    (UTC), empty when they are not. members: one of the words above, by name. certificate_expires: that of the members'
    port (UTC).
    """

    running: bool
    ready: bool
    since: str
    members: Mapping[str, str]
    certificate_expires: str


def state(home: ServerHome) -> ServicesState:
    """What is known of the services, in whichever process they are kept up.

    Raises ConfigError when there is no coordinator in the home, and StorageError when it cannot be read.
    """
    names = tuple(enrolment.roster(home).cards)
    expires = timestamp(authority.expiry(home).server)
    running = _are_running(home)
    said = _said(home) if running else None
    if said is None:
        return ServicesState(running, False, "", dict.fromkeys(names, ENROLLED), expires)
    return ServicesState(
        True, said.ready, said.since, {name: said.members.get(name, ENROLLED) for name in names}, expires
    )


@dataclass(frozen=True)
class Said:
    """What the process that keeps the services up says of them."""

    since: str
    ready: bool
    members: Mapping[str, str]


def say(home: ServerHome, said: Said | None) -> None:
    """For who holds `alone`: what `state` tells from now on; None for nothing more. Raises StorageError."""
    path = _state_file(home)
    if said is None:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    else:
        value = {"since": said.since, "ready": said.ready, "members": dict(said.members)}
        write_private_json(path, value, replace=True)


@contextmanager
def alone(home: ServerHome) -> Iterator[None]:
    """The services do not run meanwhile, but for those of the caller: `up` itself, or who tidies up their database.

    Raises ConfigError when they run, and StorageError.
    """
    private_directory(home.services)
    with writing(_lock(home)):
        handle = os.open(_lock(home), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        end = time.monotonic() + _LOCK_PATIENCE_S
        while not _taken(handle, fcntl.LOCK_EX):
            if time.monotonic() > end:
                process = os.pread(handle, 20, 0).decode("ascii", "replace").strip() or "unknown"
                raise ConfigError(
                    f"{home.services}: expected that the services do not run, found them running (process {process});"
                    " stop that process first, or give another --home"
                )
            time.sleep(0.05)
        with writing(_lock(home)):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode("ascii"), 0)
        yield
    finally:
        os.close(handle)


def _are_running(home: ServerHome) -> bool:
    try:
        with _lock(home).open("rb") as file:
            return not _taken(file.fileno(), fcntl.LOCK_SH)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StorageError(f"{_lock(home)}: cannot be read: {error.strerror}; see that it is readable") from None


def _taken(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _said(home: ServerHome) -> Said | None:
    try:
        found = json.loads(_state_file(home).read_text(encoding="utf-8"))
        return Said(str(found["since"]), found["ready"] is True, dict(found["members"]))
    except (OSError, ValueError, TypeError, KeyError):  # not said yet
        return None


def _lock(home: ServerHome) -> Path:
    return home.services / "up.lock"


def _state_file(home: ServerHome) -> Path:
    return home.services / "state.json"
