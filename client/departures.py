"""Every reply is an entry of the egress log before any of it leaves, with the run, round and attempt it belongs to."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from flwr.app import Message

from client.egress import EgressLog, Payload
from client.ledger import Receipt
from client.status import Place
from common.flower import MESSAGES, ROUND, from_records
from common.messages import Hello, Published, Refused, Request, TrainRequest
from common.wire import from_wire

OTHER = "other"

_REMEMBERED = 64

K = TypeVar("K", bound=Hashable)


class _Recent(Generic[K]):
    """The places that were noted last: a coordinator that sends without end fills no memory."""

    def __init__(self) -> None:
        self._places: OrderedDict[K, Place] = OrderedDict()

    def note(self, key: K, place: Place) -> None:
        self._places[key] = place
        self._places.move_to_end(key)
        while len(self._places) > _REMEMBERED:
            self._places.popitem(last=False)

    def find(self, key: K) -> Place:
        return self._places.get(key, Place())


class Departures:
    """Writes replies into the egress log; requests are heard in one thread, and replies recorded in another."""

    def __init__(self, log: EgressLog, leaves: Callable[[str, str], None] = lambda *_: None) -> None:
        """leaves: told the kind of each reply that was written down, and the reason of a no."""
        self._log = log
        self._leaves = leaves
        self._lock = threading.Lock()
        self._requests: _Recent[str] = _Recent()
        self._plans: _Recent[str] = _Recent()
        self._spent: dict[Place, float] = {}  # of the attempt under way: its reply takes it out

    def heard(self, message_id: str, request: Request) -> Place:
        """Remembers what a message belongs to, and says it. Messages of an attempt name its plan only."""
        with self._lock:
            place = self._place(request)
            if isinstance(request, TrainRequest):
                self._plans.note(request.plan.digest(), place)
            self._requests.note(message_id, place)
        return place

    def spent(self, receipt: Receipt) -> None:
        """Remembers what an update spent of a privacy budget, for the entry of the reply that it leaves in."""
        entry = receipt.entry
        with self._lock:
            self._spent[Place(entry.run, entry.round, entry.attempt)] = receipt.added

    def record(self, reply: Message) -> None:
        """Writes down a reply that is about to leave; it may leave when this has returned.

        The entry's kind is that of the reply, its phase the exchange it is part of, OTHER outside the protocol. What
        answers a message that was never heard, because the node itself refused it, has no run.

        Raises StorageError when the entry cannot be kept, ValueError for a reply without content: neither may leave.
        """
        if not reply.has_content():
            raise ValueError("expected a reply with content, found none; it stays here")
        wire, kind = from_records(reply.content), reply.metadata.message_type
        with self._lock:
            place = self._requests.find(reply.metadata.reply_to_message_id)
            epsilon = self._spent.pop(place, 0.0) if kind == ROUND else 0.0
        self._log.record(
            wire.kind,
            Payload.of_wire(wire),
            run=place.run,
            round_number=place.round,
            attempt=place.attempt,
            phase=kind if kind in MESSAGES else OTHER,
            epsilon=epsilon,
        )
        said = from_wire(wire) if wire.kind == Refused.__name__ else None
        self._leaves(wire.kind, said.reason if isinstance(said, Refused) else "")

    def _place(self, request: Request) -> Place:
        match request:
            case Hello():
                return Place(request.run)
            case TrainRequest(plan):
                return Place(plan.run, plan.round, plan.secure.attempt if plan.secure else 0)
            case Published(publication):
                return Place(publication.run, publication.round)
            case _:
                return self._plans.find(request.plan)
