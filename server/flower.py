"""Flower's grid as a set of members by name."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.errors import RunStopped
from common.flower import from_records, kind_of, to_records
from common.messages import (
    INTERNAL_ERROR,
    MALFORMED,
    NAME_DIFFERS,
    TIMED_OUT,
    Hello,
    Introduction,
    Refused,
    Reply,
    Request,
)
from common.wire import from_wire, to_wire

log = logging.getLogger("silotune.server")

# Between two looks for replies: a twentieth of the time since the last one, within these limits, so that neither quick
# rounds wait nor long ones ask a server fifty times a second.
_POLL_S, _SLOWEST_POLL_S = 0.02, 1.0
_NO_ANSWER = frozenset({3, 4, 5})  # Flower's codes for a message, a reply or a node that is not there (any more)


class FlowerMembers:
    """The institutions behind a Flower grid.

    Nodes have numbers, institutions have names. names: who is enrolled as which node; without it (a simulation, which
    plays them all) a node is who it says it is.
    wave: most messages under way at once, for nodes that share a machine; None where each has its own, since who is
    asked later than the others keeps them waiting.
    """

    def __init__(
        self,
        grid: Grid,
        stop: threading.Event,
        wave: int | None = None,
        names: Callable[[], Mapping[int, str]] | None = None,
    ) -> None:
        self.wave = wave
        self._grid = grid
        self._stop = stop
        self._names = names
        self._nodes: dict[str, int] = {}

    def meet(self, hello: Hello, known: Collection[str], timeout_s: float) -> dict[str, Introduction | Refused]:
        """Says hello to every node that is there, but for those `known` by these names from an earlier call.

        Returns answers by roster name; a node that refuses, or repeats another's name, is listed as "node-<number>",
        and by the name that it is enrolled by where that is known. Under any other name it takes no part.
        """
        enrolled = self._names() if self._names is not None else None
        there = set(self._grid.get_node_ids())
        # Who is known and away for a moment keeps its place: it may be back when the next question comes.
        self._nodes = {name: node for name, node in self._nodes.items() if name in known}
        if enrolled is None:
            met = {node for node in there if f"node-{node}" in known}
        else:
            met = {node for node in there if node not in enrolled or enrolled[node] in known}
        asked = sorted(there - met - set(self._nodes.values()))
        answers: dict[str, Introduction | Refused] = {}
        for node, reply in self._exchange([(node, hello) for node in asked], timeout_s):
            listed = f"node-{node}" if enrolled is None else enrolled[node]
            if not isinstance(reply, Introduction):
                no = reply if isinstance(reply, Refused) else Refused(MALFORMED)
                answers[listed] = no if enrolled is None else replace(no, name=listed)
            elif enrolled is not None and reply.name != listed:
                log.warning("%s introduces itself as %s: refused", listed, reply.name)
                answers[listed] = Refused(NAME_DIFFERS, listed)
            elif reply.name in self._nodes:
                answers[listed] = Refused(NAME_DIFFERS)
            else:
                self._nodes[reply.name] = node
                answers[reply.name] = reply
        return answers

    def reachable(self) -> tuple[str, ...]:
        """Names of those who can be asked now: who is there and enrolled, or, where nobody is, who was met."""
        if self._names is not None:
            enrolled, there = self._names(), set(self._grid.get_node_ids())
            self._nodes = {name: node for node, name in enrolled.items() if node in there}
        return tuple(sorted(self._nodes))

    def rest(self, seconds: float) -> None:
        """Waits. Raises RunStopped when the run is interrupted."""
        if self._stop.wait(seconds):
            raise RunStopped("interrupted")

    def ask(self, requests: Mapping[str, Request], timeout_s: float) -> Iterator[tuple[str, Reply]]:
        """Sends each named institution its request and yields replies as they arrive, each name exactly once."""
        names = {self._nodes[name]: name for name in requests}
        for node, reply in self._exchange(
            [(self._nodes[name], request) for name, request in requests.items()], timeout_s
        ):
            yield names[node], reply

    def _exchange(self, requests: Iterable[tuple[int, Request]], timeout_s: float) -> Iterator[tuple[int, Reply]]:
        """At most one wave of messages is under way; those with the same request share its records."""
        waiting: dict[str, int] = {}
        ahead = iter(requests)
        end = time.monotonic() + timeout_s
        heard = time.monotonic()
        exhausted = False
        sent: Request | None = None
        records = RecordDict()
        while True:
            while not exhausted and (self.wave is None or len(waiting) < self.wave):
                node, request = next(ahead, (0, None))
                if request is None:
                    exhausted = True
                    break
                kind = kind_of(request)
                # Nobody shall train for a round that no longer waits.
                ttl = max(end - time.monotonic(), _POLL_S)
                if request is not sent:
                    sent, records = request, to_records(to_wire(request))
                message = Message(records, dst_node_id=node, message_type=kind, ttl=ttl)
                pushed = list(self._grid.push_messages([message]))
                if pushed:
                    waiting[pushed[0]] = node
                else:
                    yield node, Refused(INTERNAL_ERROR)
            if not waiting:
                return
            for message in self._grid.pull_messages(list(waiting)):
                heard = time.monotonic()
                yield waiting.pop(message.metadata.reply_to_message_id), _reply(message)
            if time.monotonic() > end:
                for node in waiting.values():
                    yield node, Refused(TIMED_OUT)
                for node, _ in ahead:
                    yield node, Refused(TIMED_OUT)
                return
            self.rest(min(max((time.monotonic() - heard) / 20, _POLL_S), _SLOWEST_POLL_S))


def _reply(message: Message) -> Reply:
    """Our form of a reply; a crash in Flower's own machinery, or what cannot be read, counts as a refusal."""
    if message.has_error():
        return Refused(TIMED_OUT if message.error.code in _NO_ANSWER else INTERNAL_ERROR)
    try:
        reply = from_wire(from_records(message.content))
    except Exception as error:  # no reply, however wrong, may end a run
        log.warning("node %d sent what cannot be read: %s", message.metadata.src_node_id, error)
        return Refused(MALFORMED)
    return reply if isinstance(reply, Reply) else Refused(MALFORMED)
