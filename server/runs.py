"""The coordinator's runs: where each one's files lie, who drives it, and what became of it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import UnionType
from typing import Any, get_origin, get_type_hints

from common.config import Config
from common.errors import ConfigError, StorageError
from common.files import storage_errors, write_json
from common.private_files import private_directory, writing
from server.documents import clean

RUNNING, COMPLETE, STOPPED, FAILED = "running", "complete", "stopped", "failed"
STATES = (RUNNING, COMPLETE, STOPPED, FAILED)
"""Being driven; all rounds done and scored; ended by the operator; ended by itself, or with its driver."""

KILLED = "its driver is gone: killed, or the machine was restarted"

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}"  # what institutions take as the name of a run
_LONGEST_CONFIG_NAME = 100
_LOCK_PATIENCE_S = 2.0
_SHOWN = 20
_FOLLOW_S = 0.25


@dataclass(frozen=True)
class Run:
    """A run's directory; its name is the run's, which institutions keep it under. Readable by its owner alone."""

    root: Path

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def config(self) -> Path:
        """The resolved configuration; written last, so that where it is, the rest is there."""
        return self.root / "config.yaml"

    @property
    def started(self) -> Path:
        return self.root / "started.json"

    @property
    def log(self) -> Path:
        return self.root / "run.log"

    @property
    def status(self) -> Path:
        """How it stands; see `Status`."""
        return self.root / "status.json"

    @property
    def lock(self) -> Path:
        """Held by the process that drives the run, whose number it holds."""
        return self.root / "driver.lock"

    @property
    def validation(self) -> Path:
        """The coordinator's own records that choose the published round."""
        return self.root / "validation.jsonl"

    @property
    def test(self) -> Path:
        """The coordinator's own records that are read once, at the end."""
        return self.root / "test.jsonl"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"


@dataclass(frozen=True)
class Status:
    """How a run stands. It names institutions, so it is for the coordinator alone.

    state: one of STATES, as its driver last knew. phase: what it waits for or does, since when. round: rounds that are
    complete, of `rounds`. attempt: at a sum, counted through the run; 0 between rounds. answered: who answered in this
    phase. waiting: who did not yet, and why where that is known. refused: who takes no part, with the reason code.
    best_round, perplexity: of the round that would be published now. delivered: who has the published adapter.
    pid: of the driver. number: the SuperLink's, of the run. started, updated, ended: times in UTC; ended is empty while
    it runs. why: it stopped or failed.
    """

    state: str
    phase: str = "preparing"
    since: str = ""
    round: int = 0
    rounds: int = 0
    attempt: int = 0
    answered: tuple[str, ...] = ()
    waiting: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    best_round: int = 0
    perplexity: float | None = None
    delivered: tuple[str, ...] = ()
    pid: int = 0
    number: int = 0
    started: str = ""
    updated: str = ""
    ended: str = ""
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        """As the file has it."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: object) -> Status:
        """Raises ValueError for what `to_json` does not write."""
        if not isinstance(found, dict):
            raise ValueError(f"expected an object, found {type(found).__name__}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
        for key, kind in get_type_hints(cls).items():
            plain = kind if isinstance(kind, UnionType) else get_origin(kind) or kind
            if key in values and not isinstance(values[key], plain):
                raise ValueError(f"{key}: found {values[key]!r:.60}")
        try:
            made = cls(**values)
        except TypeError as error:
            raise ValueError(str(error)) from error
        if made.state not in STATES:
            raise ValueError(f"state: found {made.state!r:.60}")
        return made


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- Which runs there are --------------------------------------------------------------------------------------------


def create(runs: Path, config: Config) -> Run:
    """A directory for a new run of `config`, called NAME-XXXXXXXX; it is a run once its configuration is in it.

    Raises ConfigError for a name that is too long for one, or when others can enter `runs`; StorageError.
    """
    if len(config.name) > _LONGEST_CONFIG_NAME:
        raise ConfigError(
            f"name: expected at most {_LONGEST_CONFIG_NAME} characters, found {len(config.name)}; institutions keep"
            " the run under it: shorten it"
        )
    private_directory(runs)
    while True:
        run = Run(runs / f"{config.name}-{secrets.token_hex(4)}")
        with writing(run.root):
            try:
                run.root.mkdir(0o700)
            except FileExistsError:
                continue
        write_json(run.started, {"started": now()})
        return run


def all_runs(runs: Path) -> list[Run]:
    """Every run, the newest last."""
    try:
        found = [Run(path) for path in runs.iterdir() if is_name(path.name) and (path / "config.yaml").is_file()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"{runs}: cannot be read: {error.strerror}; give another --home") from error
    return sorted(found, key=lambda run: (started(run), run.name))


def find(runs: Path, name: str, or_else: str = "") -> Run:
    """The run of that name. Raises ConfigError, which lists those there are, when there is none.

    or_else: what else was allowed, for that error.
    """
    run = Run(runs / name) if is_name(name) else None
    if run is None or not run.config.is_file():
        known = [run.name for run in all_runs(runs)]
        listed = ", ".join(known[-_SHOWN:]) if known else "there is none yet"
        more = f" and {len(known) - _SHOWN} older ones, see: silotune-server list" if len(known) > _SHOWN else ""
        raise ConfigError(f"expected the name of a run ({listed}{more}){or_else}, found {ascii(name)[:80]}")
    return run


def is_name(name: str) -> bool:
    """Whether a run can be called so; a path, of whatever kind, cannot."""
    return re.fullmatch(_NAME, name) is not None


def started(run: Run) -> str:
    """When the run was begun; empty where that is not known any more."""
    try:
        return str(json.loads(run.started.read_text(encoding="utf-8"))["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


# --- Who drives it ---------------------------------------------------------------------------------------------------


@contextmanager
def driving(run: Run) -> Iterator[None]:
    """This process drives the run. Raises ConfigError when another one does."""
    with storage_errors(run.lock):
        handle = os.open(run.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        end = time.monotonic() + _LOCK_PATIENCE_S
        while not _locked(handle, fcntl.LOCK_EX):
            # Whoever looks whether the run is driven holds the lock for an instant.
            if time.monotonic() > end:
                raise ConfigError(
                    f"{run.name}: expected a run that nobody drives, found it driven by process {driver(run) or '?'};"
                    f" follow it: silotune-server logs {run.name} --follow"
                )
            time.sleep(0.02)
        with storage_errors(run.lock):
            os.ftruncate(handle, 0)
            os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        os.close(handle)


def driver(run: Run) -> int | None:
    """The process that drives the run; None when none does, and 0 when it has not said its number yet."""
    try:
        handle = os.open(run.lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if _locked(handle, fcntl.LOCK_SH):
            return None
        said = os.read(handle, 32)
        return int(said) if said.isdigit() else 0
    finally:
        os.close(handle)


def _locked(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# --- How it stands ---------------------------------------------------------------------------------------------------


def write_status(run: Run, status: Status) -> None:
    """Keeps how the run stands. Raises StorageError."""
    write_json(run.status, status.to_json())


def read_status(run: Run) -> Status:
    """How the run stands. What its driver could not say any more, because it was killed, is said here.

    Raises StorageError when the file cannot be read.
    """
    pid = driver(run)
    try:
        said = Status.from_json(json.loads(run.status.read_text(encoding="utf-8")))
    except FileNotFoundError:
        said = Status(RUNNING, started=started(run))
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{run.status}: cannot be read ({error}); remove it, and `silotune-server resume {run.name}` writes it anew"
        ) from error
    if pid is not None:
        return replace(said, state=RUNNING, pid=pid or said.pid, ended="", why="")
    if said.state == RUNNING:
        return replace(said, state=FAILED, answered=(), waiting={}, ended=said.updated or said.started, why=KILLED)
    return said


# --- What it has to say ----------------------------------------------------------------------------------------------


def lines(run: Run, follow: bool) -> Iterator[str]:
    """The lines of a run's log; with `follow` also those that come, until nobody drives it any more.

    Raises StorageError when it cannot be read.
    """
    rest = b""
    at = 0
    while True:
        driven = follow and driver(run) is not None  # asked first, so that the last lines are not missed
        try:
            with run.log.open("rb") as file:
                file.seek(at)
                found = file.read()
        except FileNotFoundError:
            found = b""
        except OSError as error:
            raise StorageError(f"{run.log}: cannot be read: {error.strerror}") from error
        at += len(found)
        *whole, rest = (rest + found).split(b"\n")
        yield from (clean(line.decode("utf-8", "replace")) for line in whole)
        if not driven:
            if rest:
                yield clean(rest.decode("utf-8", "replace"))
            return
        time.sleep(_FOLLOW_S)
