"""An institution's part in secure aggregation: one attempt at a time, under one lock."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.marks import Marks
from client.policy import Policy
from common.errors import Refusal
from common.fixed_point import Ring
from common.messages import Plan
from common.secagg import reasons
from common.secagg.identity import Identity
from common.secagg.messages import Consents, FromMember, Inbox, KeyList, Keys, Survivors, ToMember
from common.secagg.participant import Participant, restore_in_simulation, snapshot_for_simulation
from common.wire import plan_fields, read_plan

Update = NDArray[np.uint32] | NDArray[np.float32] | NDArray[np.float64]
"""What is kept for a repeat: a vector as it is, or an update without its noise."""

Snapshot = tuple[str, Ring, Update]


@dataclass
class _Session:
    """The attempt under way.

    vector: this member's own, in the clear, which leaves only under masks. update: what is kept for a repeat.
    """

    plan: Plan
    participant: Participant
    vector: Ring = field(repr=False)
    update: Update = field(repr=False)


class SecureMember:
    """Takes part in one attempt at a time; a plan that is accepted ends the attempt before it.

    What a message may do depends on what came before it, and two may come at once, so everything happens under one
    lock. Round secrets live in this object alone: a restart makes the member a dropout. simulated: whether `snapshot`
    may take them out; never in deployment.
    """

    def __init__(
        self, identity: Identity, policy: Policy, marks: Callable[[str], Path], simulated: bool = False
    ) -> None:
        self.identity = identity
        self.policy = policy
        self.simulated = simulated
        self._marks = marks
        self._lock = threading.Lock()
        self._session: _Session | None = None

    @property
    def run(self) -> str:
        """The run whose attempt is under way; empty when there is none."""
        session = self._session
        return "" if session is None else session.plan.run

    def require_roster(self, named: str) -> None:
        """Raises Refusal(roster_differs) for the digest of another roster than the one this member agreed to."""
        self.policy.accept_roster(named, self.identity.name, self.identity.public)

    def begin(self, plan: Plan, parameters: int, compute: Callable[[Update | None], tuple[Update, Ring]]) -> Keys:
        """Checks a plan, has its vector made, and answers with this attempt's keys.

        compute: makes what is kept for a repeat, and the vector of this attempt, which may be the same. It is given
        what was kept in the attempt before where this one is a repeat at the same sum, and else None; what of it may
        serve once more, it decides itself. parameters: the length of the update, from the adapter that came.

        Raises what `Policy.accept` and `Marks.accept` raise; the attempt that was under way then stays. After what
        `compute` raises none is under way, and nothing is kept.
        """
        with self._lock:
            attempt = self.policy.accept(plan, self.identity.name, self.identity.public, parameters)
            Marks(self._marks(plan.run)).accept(plan)
            before = self._session
            self._end()
            update, vector = compute(before.update if before is not None and _same_update(before.plan, plan) else None)
            participant = Participant(attempt, self.identity, self.policy.roster, self.simulated)
            self._session = _Session(plan, participant, vector, update)
            return participant.keys()

    def answer(self, request: ToMember) -> FromMember:
        """Answers a message of the attempt under way.

        Raises Refusal(attempt_unknown) for a message of any other attempt, and what the participant raises.
        """
        with self._lock:
            session = self._session
            if session is None or session.participant.attempt.plan != request.plan:
                raise Refusal(reasons.ATTEMPT_UNKNOWN, "no such attempt is under way here")
            participant = session.participant
            match request:
                case KeyList():
                    return participant.on_key_list(request)
                case Inbox():
                    return participant.on_inbox(request, session.vector)
                case Survivors():
                    marks = Marks(self._marks(session.plan.run))
                    adapter = session.plan.adapter_digest
                    return participant.on_survivors(request, lambda names: marks.consent(adapter, names))
                case Consents():
                    return participant.on_consents(request)

    def _end(self) -> None:
        if self._session is not None:
            self._session.participant.wipe()
            self._session = None

    # --- Simulation -------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The attempt under way, its vector and what is kept for a repeat, for an engine that plays this member in
        another process next.

        Empty when there is none; the last is, where it is the vector. Raises RuntimeError for a member that is not
        simulated.
        """
        session = self._session
        if session is None:
            return "", np.zeros(0, np.uint32), np.zeros(0, np.float32)
        secret = snapshot_for_simulation(session.participant)
        text = json.dumps({"plan": plan_fields(session.plan), "participant": secret})
        return text, session.vector, np.zeros(0, np.float32) if session.update is session.vector else session.update

    def restore(self, snapshot: Snapshot) -> None:
        """Goes on from a `snapshot`. Raises RuntimeError for a member that is not simulated."""
        if not self.simulated:
            raise RuntimeError("an attempt goes on in another process only in a simulation")
        text, vector, update = snapshot
        if text:
            found = json.loads(text)
            plan = read_plan(found["plan"])
            participant = restore_in_simulation(found["participant"], plan.attempt, self.identity, self.policy.roster)
            self._session = _Session(plan, participant, vector, update if len(update) else vector)


def _same_update(before: Plan, now: Plan) -> bool:
    """Whether a plan asks for the very update that another one asked for: a repeat of an attempt at the same sum."""
    asked = [(p.run, p.round, p.adapter_digest, p.settings, p.parameters, p.layout) for p in (before, now)]
    return asked[0] == asked[1]
