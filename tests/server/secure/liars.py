"""A member that lies in one of its answers, and the lie, made of the honest answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from common.fixed_point import Ring
from common.messages import Plan, Reply, Request, TrainRequest
from common.secagg.messages import Consent, KeyList, Keys, MaskedInput, Revealed, Shares
from tests.federations import Federation
from tests.server.secure.conftest import Ask

Change = Callable[[Federation, Plan, Reply], Reply]


class Liar:
    """One member's answers to one kind of request, as `change` makes them; it knows the plan and its own identity."""

    def __init__(
        self, federation: Federation, name: str, kind: type[Request], change: Change, attempts: int = 99
    ) -> None:
        self.federation, self.name, self.kind, self.change, self.attempts = federation, name, kind, change, attempts
        self.plan: Plan | None = None
        self.list: KeyList | None = None

    def __call__(self, name: str, request: Request, ask: Ask) -> Reply:
        if isinstance(request, TrainRequest):
            self.plan = request.plan
        if isinstance(request, KeyList):
            self.list = request
        reply = ask(request)
        if name != self.name or type(request) is not self.kind or self.attempts == 0:
            return reply
        self.attempts -= 1
        assert self.plan is not None
        return self.change(self.federation, self.plan, reply)


def keys(change: Callable[[Federation, Plan, Keys], Keys]) -> Change:
    def changed(federation: Federation, plan: Plan, reply: Reply) -> Reply:
        assert isinstance(reply, Keys)
        return change(federation, plan, reply)

    return changed


def shares(change: Callable[[Shares], Shares]) -> Change:
    def changed(federation: Federation, plan: Plan, reply: Reply) -> Reply:
        assert isinstance(reply, Shares)
        return change(reply)

    return changed


def masked(change: Callable[[Ring, Plan], Ring]) -> Change:
    def changed(federation: Federation, plan: Plan, reply: Reply) -> Reply:
        assert isinstance(reply, MaskedInput)
        return replace(reply, vector=change(reply.vector, plan))

    return changed


def consent(change: Callable[[Federation, bytes], bytes]) -> Change:
    def changed(federation: Federation, plan: Plan, reply: Reply) -> Reply:
        assert isinstance(reply, Consent)
        return replace(reply, signature=change(federation, reply.signature))

    return changed


def revealed(change: Callable[[dict[str, bytes]], dict[str, bytes]]) -> Change:
    def changed(federation: Federation, plan: Plan, reply: Reply) -> Reply:
        assert isinstance(reply, Revealed)
        return replace(reply, shares=change(dict(reply.shares)))

    return changed
