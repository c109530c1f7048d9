"""What the commands and the daemon tell each other: paused, which runs wait, are approved or were left, and a status.

One directory with a small file for each. A change replaces its file whole and is synced before it counts; a question
reads the file anew, so the daemon knows at once what a command said. What a coordinator causes to be written, runs that
wait, has a file of its own and is bounded; what a person decided is written by commands only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from client.status import Status
from common.enrolment import timestamp
from common.errors import ConfigError, Refusal, StorageError
from common.messages import MALFORMED
from common.private_files import locked, private_directory, read_private, sweep, write_private_json
from common.typed import built

RUN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}"
"""A run's name: it comes from outside, and becomes part of paths, lines and tables."""

DIGEST = r"[0-9a-f]{64}"

MOST_WAITING = 64
LONGEST_TERMS = 4096

_PAUSED, _STATUS = "paused.json", "status.json"
_LEFT, _APPROVED, _WAITING = "left.json", "approved.json", "waiting.json"
_LIMIT = 4 << 20


def check_run(run: str) -> str:
    """The name itself. Raises ConfigError for one that no run has."""
    if not re.fullmatch(RUN, run):
        raise ConfigError(
            f"expected the name of a run (letters, digits, . - and _, at most 200), found {run!r:.80}; see"
            " `silotune-client runs`"
        )
    return run


@dataclass(frozen=True)
class Waiting:
    """A run that waits for approval. digest: of all that it asks for. terms: the same, to be shown. since: UTC."""

    digest: str
    terms: Mapping[str, Any]
    since: str


class Control:
    """The directory, to be read and changed by any number of threads and processes.

    Each method raises StorageError when a file cannot be read or written, ConfigError when others can enter the
    directory or read it: what is not known must not count as allowed.
    """

    def __init__(self, directory: Path, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.directory = directory
        self._clock = clock

    # --- Pausing and leaving ----------------------------------------------------------------------------------------

    def paused(self) -> bool:
        """Whether nothing new is to be taken up."""
        return bool(self._read(_PAUSED).get("paused", False))

    def pause(self) -> None:
        """Takes up no run and no round from now on."""
        self._set_paused(True)

    def unpause(self) -> None:
        """Ends a pause."""
        self._set_paused(False)

    def has_left(self, run: str) -> bool:
        """Whether this institution left that run."""
        return run in self._read(_LEFT)

    def left(self) -> Mapping[str, str]:
        """The runs that were left, and when (UTC)."""
        return MappingProxyType({run: str(since) for run, since in self._read(_LEFT).items()})

    def leave(self, run: str) -> None:
        """Leaves a run for good; one that is not known yet as well. Raises ConfigError for a name that no run has."""
        check_run(run)
        with self._changing():
            left = self._read(_LEFT)
            if run not in left:
                self._write(_LEFT, {**left, run: self._now()})
            self._forget(run)

    # --- Approval ---------------------------------------------------------------------------------------------------

    def approved(self, run: str, digest: str) -> bool:
        """Whether a person approved that run with exactly these settings."""
        return bool(digest) and self._read(_APPROVED).get(run, "") == digest

    def approvals(self) -> Mapping[str, str]:
        """The runs that were approved, and the digest of what they asked for then."""
        return MappingProxyType({run: str(digest) for run, digest in self._read(_APPROVED).items()})

    def approve(self, run: str, digest: str) -> None:
        """Approves a run with the settings of that digest, and with no others; a former approval of it ends.

        Raises ConfigError for what is no name or no digest, and for a run that was left.
        """
        check_run(run)
        if not re.fullmatch(DIGEST, digest):
            raise ConfigError(f"expected a digest of 64 hex digits in lower case, found {digest!r:.80}")
        with self._changing():
            if run in self._read(_LEFT):
                raise ConfigError(
                    f"expected a run that was not left, found {run}; what was left stays left, so ask the coordinator"
                    " for a new run"
                )
            self._write(_APPROVED, {**self._read(_APPROVED), run: digest})
            found = self.waiting().get(run)
            if found is not None and found.digest == digest:
                self._forget(run)

    def ask(self, run: str, digest: str, terms: Mapping[str, Any]) -> None:
        """Notes that a run waits for approval; the same again changes nothing, other settings replace the former.

        At most MOST_WAITING wait: the one that asked first makes room, and is back when it asks again.

        Raises Refusal(malformed) for a name or a digest that is none, and for terms longer than LONGEST_TERMS.
        """
        if not re.fullmatch(RUN, run) or not re.fullmatch(DIGEST, digest):
            raise Refusal(MALFORMED, f"a run {run!r:.80} with the digest {digest!r:.80} asks for approval")
        try:
            told = json.dumps(dict(terms), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise Refusal(MALFORMED, f"what run {run} asks for cannot be written down: {error}") from error
        if len(told) > LONGEST_TERMS:
            raise Refusal(MALFORMED, f"what run {run} asks for takes {len(told)} bytes, at most {LONGEST_TERMS}")
        plain: dict[str, Any] = json.loads(told)
        before = self.waiting().get(run)
        if before is not None and (before.digest, before.terms) == (digest, plain):
            return
        with self._changing():
            waiting = dict(self.waiting())
            waiting.pop(run, None)
            while len(waiting) >= MOST_WAITING:
                waiting.pop(next(iter(waiting)))  # the file is in the order of asking
            self._keep({**waiting, run: Waiting(digest, plain, self._now())})

    def waiting(self) -> Mapping[str, Waiting]:
        """The runs that wait for approval, the one that asked first before the others."""
        try:
            found = {run: built(Waiting, {**one}) for run, one in self._read(_WAITING).items()}
        except TypeError as error:
            raise self._unreadable(_WAITING, error) from error
        return MappingProxyType(found)

    # --- Status -----------------------------------------------------------------------------------------------------

    def write_status(self, status: Status) -> None:
        """Says what the daemon is doing."""
        with self._changing():
            self._write(_STATUS, asdict(status))

    def read_status(self) -> Status | None:
        """What the daemon said last, also when it is gone; None where there is nothing, or nothing to understand."""
        try:
            return Status.from_json(self._read(_STATUS))
        except (StorageError, TypeError):
            return None

    # --- Files ------------------------------------------------------------------------------------------------------

    def _changing(self) -> AbstractContextManager[None]:
        private_directory(self.directory)
        return locked(self.directory)

    def _set_paused(self, paused: bool) -> None:
        with self._changing():
            self._write(_PAUSED, {"paused": paused, "since": self._now()})

    def _forget(self, run: str) -> None:
        waiting = dict(self.waiting())
        if waiting.pop(run, None) is not None:
            self._keep(waiting)

    def _keep(self, waiting: Mapping[str, Waiting]) -> None:
        self._write(_WAITING, {run: asdict(one) for run, one in waiting.items()})

    def _read(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        if not path.exists():
            return {}
        try:
            found = json.loads(read_private(path, _LIMIT))
            if not isinstance(found, dict):
                raise ValueError("expected an object")
        except (ValueError, RecursionError) as error:
            raise self._unreadable(name, error) from error
        return found

    def _unreadable(self, name: str, error: Exception) -> StorageError:
        return StorageError(
            f"{self.directory / name} cannot be read: {error}; restore it, or remove it to begin without what it said"
        )

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        sweep(self.directory)
        write_private_json(self.directory / name, value, replace=True)

    def _now(self) -> str:
        return timestamp(self._clock())
