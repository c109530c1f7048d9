"""Institutions in this very process: the same messages and the same round, without a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from client.institution import Institution
from common.messages import Hello, Introduction, Refused, Reply, Request
from common.wire import from_wire, to_wire


class InProcessMembers:
    """Answers for a list of institutions. Every message goes through its wire form, as it does on a network."""

    def __init__(self, institutions: Sequence[Institution]) -> None:
        self._institutions = {institution.name: institution for institution in institutions}

    def meet(self, hello: Hello, expected: int, timeout_s: float) -> dict[str, Introduction | Refused]:
        """Every institution's answer to hello, by name."""
        answers = dict(self.ask(dict.fromkeys(self._institutions, hello), timeout_s))
        return {name: answer for name, answer in answers.items() if isinstance(answer, Introduction | Refused)}

    def ask(self, requests: Mapping[str, Request], timeout_s: float) -> Iterator[tuple[str, Reply]]:
        """Each institution's reply, in the order of the requests."""
        for name, request in requests.items():
            received = from_wire(to_wire(request))
            assert isinstance(received, Request)
            reply = from_wire(to_wire(self._institutions[name].answer(received)))
            assert isinstance(reply, Reply)
            yield name, reply
