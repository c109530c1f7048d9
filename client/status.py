"""What the daemon says of itself: connected or not, at what it is, and what became of the messages so far."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from client.events import ANSWERED, CONNECTION, LOST, RECEIVED, STOPPED, Event
from common.enrolment import timestamp
from common.errors import SilotuneError
from common.messages import Contribution, Hello, Published, Refused, TrainRequest
from common.secagg.messages import Revealed
from common.typed import built

STARTING = "starting"
IDLE = "idle"

_OUTSIDE = frozenset({kind.__name__ for kind in (Hello, Published, TrainRequest)})  # before or after an attempt
_LAST = frozenset({kind.__name__ for kind in (Contribution, Revealed, Refused)})  # of an attempt
_LONGEST_TEXT = 400
_PAUSE_S = 0.2  # between two that are written

log = logging.getLogger("silotune.client")


@dataclass(frozen=True)
class Place:
    """What a message belongs to; empty and zero where that is not known."""

    run: str = ""
    round: int = 0
    attempt: int = 0


@dataclass(frozen=True)
class Status:
    """One moment of a daemon; for this institution only. Times are UTC.

    supervisor, worker: numbers of its two processes. started, restarts: of the worker. connection: STARTING, or the
    last word of `client.events` on the connection; since, about: since when, and what came with it. run, round,
    attempt: what the last message belonged to, where that is known. doing: the kind of the message that is being
    answered, or IDLE. in_attempt: whether this institution has begun its part in an attempt, and not finished it.
    answered, refused, lost: messages since the worker started; refused ones were answered as well.
    trouble: what went wrong last.
    """

    version: str
    supervisor: int
    worker: int
    started: str
    restarts: int
    coordinator: str
    connection: str
    since: str
    about: str = ""
    run: str = ""
    round: int = 0
    attempt: int = 0
    doing: str = IDLE
    doing_since: str = ""
    in_attempt: bool = False
    answered: int = 0
    refused: int = 0
    lost: int = 0
    trouble: str = ""
    trouble_since: str = ""

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Status:
        """Raises TypeError for anything but all of its fields."""
        return built(cls, dict(found))


class StatusBoard:
    """The status of this process, which any of its threads may change.

    A thread of its own writes it down, so that nobody waits for the disk, and many changes at once are one.
    """

    def __init__(self, first: Status, write: Callable[[Status], None]) -> None:
        self._status = first
        self._write = write
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._changed.set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)
        self._thread.start()

    @property
    def now(self) -> Status:
        with self._lock:
            return self._status

    def heard(self, kind: str, place: Place) -> None:
        """A message of that kind is being answered."""
        self._change(doing=kind, doing_since=_now(), run=place.run, round=place.round, attempt=place.attempt)
        if kind in _OUTSIDE:
            self._change(in_attempt=kind == TrainRequest.__name__)

    def leaves(self, kind: str, reason: str = "") -> None:
        """A reply of that kind leaves; a no has its reason."""
        if kind in _LAST:
            self._change(in_attempt=False)
        if kind == Refused.__name__:
            self._count(refused=1)
            self.trouble(f"refused: {reason}")

    def trouble(self, text: str) -> None:
        """Something went wrong."""
        self._change(trouble=text[:_LONGEST_TEXT], trouble_since=_now())

    def tell(self, event: Event) -> None:
        """Something happened to the connection or to a message."""
        if event.kind in CONNECTION or event.kind == STOPPED:
            self._change(connection=event.kind, since=_now(), about=event.text[:_LONGEST_TEXT])
        if event.kind == RECEIVED:
            self._change(doing=event.text[:_LONGEST_TEXT], doing_since=_now())
        if event.kind in (ANSWERED, LOST):
            self._count(answered=int(event.kind == ANSWERED), lost=int(event.kind == LOST))
            self._change(doing=IDLE, doing_since=_now())
        if event.kind == LOST:
            self.trouble(f"no answer left: {event.text}")

    def close(self) -> None:
        """Writes what is not written yet."""
        self._over.set()
        self._changed.set()
        self._thread.join(2)

    def _count(self, answered: int = 0, refused: int = 0, lost: int = 0) -> None:
        with self._lock:
            now = self._status
            self._status = replace(
                now, answered=now.answered + answered, refused=now.refused + refused, lost=now.lost + lost
            )

    def _change(self, **values: Any) -> None:
        with self._lock:
            self._status = replace(self._status, **values)
        self._changed.set()

    def _run(self) -> None:
        while not self._over.is_set() or self._changed.is_set():
            self._changed.wait()
            self._changed.clear()
            try:
                self._write(self.now)
            except SilotuneError as error:  # a full disk: the status is old then, and all else goes on
                log.warning("the status cannot be written: %s", error)
            self._over.wait(_PAUSE_S)


def _now() -> str:
    return timestamp(datetime.now(UTC))
