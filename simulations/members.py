"""Institutions in this very process: the same messages and the same round, without a network."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence

from client.institution import Institution
from common.messages import Hello, Introduction, Refused, Reply, Request
from common.wire import from_wire, to_wire


class InProcessMembers:
    """Answers for a list of institutions. Every message goes through its wire form, as it does on a network."""

    def __init__(self, institutions: Sequence[Institution]) -> None:
        self._institutions = {institution.name: institution for institution in institutions}

    def meet(self, hello: Hello, known: Collection[str], timeout_s: float) -> dict[str, Introduction | Refused]:
        """Every institution's answer to hello, by name, but for those that are known."""
        names = [name for name in self._institutions if name not in known]
        answers = dict(self.ask(dict.fromkeys(names, hello), timeout_s))
        return {name: answer for name, answer in answers.items() if isinstance(answer, Introduction | Refused)}

    def reachable(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(self._institutions)

    def rest(self, seconds: float) -> None:
        time.sleep(seconds)

    def ask(self, requests: Mapping[str, Request], timeout_s: float) -> Iterator[tuple[str, Reply]]:
        """Each institution's reply, in the order of the requests."""
        for name, request in requests.items():
            received = from_wire(to_wire(request))
            assert isinstance(received, Request)
            reply = from_wire(to_wire(self._institutions[name].answer(received)))
            assert isinstance(reply, Reply)
            yield name, reply
