"""The policy at work: asked before anything is read or computed, whatever the coordinator wants."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from client.control import Control
from client.policy_file import Asked, InstitutionPolicy, Population, RoundBook, round_key
from common import policy_reasons as reasons
from common.errors import Refusal
from common.messages import SIGNATURE_DIFFERS, Hello, Plan
from common.publication import Publication
from common.secagg.canonical import canonical


class Guard:
    """Stands between the coordinator's messages and this institution's records, in a deployment.

    policy: what the institution agreed to. data_sets: names in its data file. without_persons: those of them of which
    nobody knows whose a record is. book: counts the rounds of a day.
    control: what people told the daemon. coordinator: public key of the roster that was pinned.
    """

    def __init__(
        self,
        policy: InstitutionPolicy,
        data_sets: Collection[str],
        without_persons: Collection[str],
        book: RoundBook,
        control: Control,
        coordinator: bytes,
    ) -> None:
        self._policy = policy
        self._data_sets = data_sets
        self._without_persons = without_persons
        self._book = book
        self._control = control
        self._coordinator = coordinator

    def admit(self, message: Hello | Plan) -> None:
        """Lets a run, or a round of it, pass; reads no record.

        Raises Refusal(left) and Refusal(paused) as people decided, and what `InstitutionPolicy.accept` raises. A run
        that waits for approval is kept for a person to see; other settings under the same name wait anew.
        """
        self.require_part(message.run)
        if self._control.paused():
            raise Refusal(reasons.PAUSED, "this institution pauses")
        said = digest(message)
        try:
            approved = self._control.approved(message.run, said)
            self._policy.accept(Asked.of(message), self._data_sets, approved, self._without_persons)
        except Refusal as refusal:
            if refusal.reason == reasons.NOT_APPROVED:
                self._control.ask(message.run, said, terms(message))
            raise

    def require_part(self, run: str) -> None:
        """Raises Refusal(left) for a run that this institution left."""
        if self._control.has_left(run):
            raise Refusal(reasons.LEFT, "this institution left the run")

    def begin(self, plan: Plan) -> None:
        """Counts a round that is about to begin. Raises what `RoundBook.count` raises: then nothing may begin."""
        self._book.count(self._policy.rounds_per_day, round_key(plan), datetime.now(UTC))

    def population_of(self, data_set: str) -> Population:
        """Whose data a data set holds, with the budget that the policy gives them."""
        return self._policy.population_of(data_set)

    @property
    def budgeted(self) -> tuple[Population, ...]:
        """All populations that the policy gives a budget."""
        return self._policy.budgeted

    def leaving(self, counters: Mapping[str, int]) -> dict[str, int]:
        """The counters of a vector, those that may not leave set to zero."""
        return self._policy.leaving(counters)

    def take(self, publication: Publication) -> None:
        """Lets a published adapter pass.

        Raises Refusal(left), Refusal(signature_differs) unless the pinned coordinator signed it,
        Refusal(base_model_not_allowed) and Refusal(rank_too_large).
        """
        self.require_part(publication.run)
        if not publication.verifies(self._coordinator):
            raise Refusal(SIGNATURE_DIFFERS, "the adapter is not signed by the coordinator of the trusted roster")
        self._policy.accept_base_model(publication.fingerprint)
        self._policy.accept_rank(publication.lora.rank)


def digest(message: Hello | Plan) -> str:
    """What a person approves: run, base model, settings (data set among them) and roster; SHA-256 in hex."""
    parts = (message.run, message.fingerprint.digest(), message.settings.to_json(), roster_of(message) or "")
    return hashlib.sha256(canonical("terms of a run", *parts)).hexdigest()


def terms(message: Hello | Plan) -> dict[str, Any]:
    """What a run asks for, for a person to read."""
    settings = message.settings
    return {
        "data_set": settings.data_set,
        "base_model": message.fingerprint.digest(),
        "method": settings.method,
        "rank": settings.lora.rank,
        "rounds": settings.rounds,
        "passes_per_round": settings.train.passes_per_round,
        "evaluates_here": settings.evaluate,
        "privacy": settings.privacy.mode if not settings.privacy.private else asdict(settings.privacy),
        "secure_aggregation": roster_of(message) is not None,
    }


def roster_of(message: Hello | Plan) -> str | None:
    """The digest of the roster that it names; None in the clear."""
    if isinstance(message, Hello):
        return message.roster or None
    return message.secure.roster if message.secure is not None else None
