"""A round's sum under secure aggregation: five questions to every member, and repeats when an attempt gives no sum."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from common.adapter import Adapter
from common.config import Config
from common.errors import Refusal, RunStopped
from common.fixed_point import CorruptSum, decode
from common.messages import MALFORMED, Plan, Refused, Request, SecurePlan, TrainRequest
from common.secagg.aggregator import Aggregator, AttemptFailed
from common.secagg.identity import Roster
from common.secagg.messages import Consent, Keys, MaskedInput, Revealed, Shares
from common.wire import size, to_wire
from server.attempts import Attempts
from server.collect import Clock, Collected, Listener, Members, OnHeard

log = logging.getLogger("silotune.server")

Answer = TypeVar("Answer", Keys, Shares, MaskedInput, Consent, Revealed)


def collect_securely(
    plan: Plan,
    adapter: Adapter,
    members: Members,
    config: Config,
    roster: Roster,
    attempts: Attempts,
    clock: Clock,
    on_heard: OnHeard,
) -> Collected:
    """The sum over the institutions of `plan.cohort`, or over those that are left of them; no vector by itself.

    roster: everyone's name and signing key. attempts: the run's, on disk. Raises RunStopped when all
    `secure_aggregation.repeats` repeats gave no sum either, or too few are left for another.
    """
    refused: dict[str, str] = {}
    repeats = config.secure_aggregation.repeats
    for _ in range(repeats + 1):
        attempt = _Attempt(plan, members, config, roster, attempts, clock, on_heard)
        try:
            collected = attempt.run(adapter)
            # A survivor that fell silent after its vector was added is in the sum all the same.
            gone = {n: why for n, why in (refused | attempt.refused).items() if n not in collected.contributors}
            return replace(collected, refused=gone, attempts=attempt.tries)
        except (AttemptFailed, CorruptSum) as error:
            said = (
                ", ".join(f"{name}: {reason}" for name, reason in sorted(attempt.refused.items())) or "nobody refused"
            )
            failure = f"{error} ({said})"
            log.warning("round %d: attempt %d gave no sum: %s", plan.round, attempt.number, failure)
            refused |= attempt.refused
    raise RunStopped(
        f"round {plan.round}: {repeats + 1} attempts gave no sum; the last: {failure}. Each institution's own log says "
        "why; mend it there, then resume."
    )


class _Attempt:
    """One attempt: asks, hands the answers to the aggregator, and notes who left with which reason code."""

    def __init__(
        self,
        plan: Plan,
        members: Members,
        config: Config,
        roster: Roster,
        attempts: Attempts,
        clock: Clock,
        on_heard: OnHeard,
    ) -> None:
        begun, terms = attempts.begin(
            plan.adapter_digest, plan.cohort, config.secure_aggregation.colluders, config.federation.min_cohort
        )
        draft = replace(plan, cohort=begun.members, secure=SecurePlan(begun.number, roster.digest(), terms, 0, 0))
        layout = draft.layout
        secure = SecurePlan(begun.number, roster.digest(), terms, layout.length, layout.ring_bits)
        self.plan = replace(draft, secure=secure)
        self.number = begun.number
        self.tries = begun.tries
        self.refused: dict[str, str] = {}
        self._aggregator = Aggregator(self.plan.attempt, roster)
        self._members = members
        self._attempts = attempts
        self._clock = clock
        self._listener = Listener(plan.round, self.number, on_heard)
        self._patience = config.federation.timeout_s, config.secure_aggregation.timeout_s
        self._bytes_up = self._bytes_down = 0

    def run(self, adapter: Adapter) -> Collected:
        """Raises AttemptFailed when too few are left, CorruptSum when what they sent does not fit together."""
        aggregator = self._aggregator
        request = TrainRequest(self.plan, adapter)
        self._ask("train", dict.fromkeys(self.plan.cohort, request), Keys, aggregator.on_keys)
        key_list = aggregator.key_list()
        self._ask("shares", dict.fromkeys(key_list.keys, key_list), Shares, aggregator.on_shares)
        self._ask("masked input", aggregator.inboxes(), MaskedInput, aggregator.on_masked)
        survivors = aggregator.survivors()
        self._attempts.name(survivors.names)
        self._ask("consent", dict.fromkeys(survivors.names, survivors), Consent, aggregator.on_consent)
        consents = aggregator.consents()
        self._ask("unmask", dict.fromkeys(consents.signatures, consents), Revealed, aggregator.on_revealed)
        total = aggregator.unmask()
        summed = decode(total, self.plan.layout, members=len(survivors.names))
        self._clock.lap("secure_aggregation")
        return Collected(summed, survivors.names, self.refused, self._bytes_up, self._bytes_down)

    def _ask(
        self,
        phase: str,
        requests: Mapping[str, Request],
        kind: type[Answer],
        take: Callable[[str, Answer], None],
    ) -> None:
        """Asks, and lets the aggregator take the answers as they come; who gives none that it takes has left."""
        # Whoever answers the first question has trained.
        lap, patience = ("train", self._patience[0]) if phase == "train" else ("secure_aggregation", self._patience[1])
        self._listener.ask(phase, requests)
        # The same question to everybody is measured once.
        self._bytes_down += max(size(to_wire(request)) for request in {id(r): r for r in requests.values()}.values())
        sent = 0
        for name, reply in self._members.ask(requests, patience):
            try:
                if not isinstance(reply, kind):
                    raise Refusal(
                        reply.reason if isinstance(reply, Refused) else MALFORMED, "no answer to the question"
                    )
                sent = max(sent, size(to_wire(reply)))
                take(name, reply)
            except Refusal as refusal:
                self.refused[name] = refusal.reason
                log.warning("round %d, attempt %d: %s left: %s", self.plan.round, self.number, name, refusal)
            self._clock.lap(lap)
            self._listener.hear(name)
            del reply  # before the next one comes, so that no two vectors are held
        self._bytes_up += sent
