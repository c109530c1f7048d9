"""How the coordinator comes to a round's sum: here in the clear, in `server.secure` under secure aggregation."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from common.adapter import Adapter
from common.errors import ConfigError, RunStopped
from common.fixed_point import CorruptSum, Decoded, RunningSum, decode
from common.messages import MALFORMED, Contribution, Plan, Refused, Reply, Request, TrainRequest
from common.wire import size, to_wire

log = logging.getLogger("silotune.server")


@dataclass(frozen=True)
class Heard:
    """Who answered a question of a round so far, and who is waited for. phase: what was asked: train, or shares,
    masked input, consent and unmask of secure aggregation. answered: with an answer or a refusal.
    """

    round: int
    attempt: int
    phase: str
    answered: tuple[str, ...]
    waiting: tuple[str, ...]


OnHeard = Callable[[Heard], None]
"""Told when a question goes out, and with each answer."""


class Members(Protocol):
    """The institutions, however they are reached."""

    def ask(self, requests: Mapping[str, Request], timeout_s: float) -> Iterator[tuple[str, Reply]]:
        """Sends each named institution its request and yields one reply a name, in any order."""


class Listener:
    """Keeps who answered the question that is under way, and tells."""

    def __init__(self, round_number: int, attempt: int, on_heard: OnHeard) -> None:
        self._round = round_number
        self._attempt = attempt
        self._on_heard = on_heard
        self._phase = ""
        self._waiting: dict[str, bool] = {}

    def ask(self, phase: str, names: Iterable[str]) -> None:
        """A question goes out to these."""
        self._phase, self._waiting = phase, dict.fromkeys(names, True)
        self._tell()

    def hear(self, name: str) -> None:
        """One of them answered."""
        self._waiting[name] = False
        self._tell()

    def _tell(self) -> None:
        sides = (tuple(name for name, waits in self._waiting.items() if waits is side) for side in (False, True))
        self._on_heard(Heard(self._round, self._attempt, self._phase, *sides))


@dataclass(frozen=True)
class Collected:
    """The sum of a round.

    contributors: whose vectors are in it. refused: reason codes of those who were asked and are not. attempts: how many
    it took, those before a resume among them. bytes_up, bytes_down: the most that any institution sent, and received.
    """

    summed: Decoded
    contributors: tuple[str, ...]
    refused: Mapping[str, str]
    bytes_up: int
    bytes_down: int
    attempts: int = 1


class Clock:
    """Adds the time since the last lap to a phase."""

    def __init__(self) -> None:
        self.seconds = {"train": 0.0, "secure_aggregation": 0.0, "aggregate": 0.0, "evaluate": 0.0}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now


Collect = Callable[[Plan, Adapter, Clock], Collected]
"""Comes to the sum of a round; the clock is told what took how long."""


def collect_in_clear(
    plan: Plan, adapter: Adapter, members: Members, timeout_s: float, min_cohort: int, clock: Clock, on_heard: OnHeard
) -> Collected:
    """Adds each vector to the sum as it arrives and forgets it; the sum over fewer than `min_cohort` is not used.

    Nothing hides a vector from whoever runs this. Raises RunStopped when fewer than `min_cohort` contribute, or the sum
    is corrupt.
    """
    total, refused, contributors = RunningSum(plan.layout), dict[str, str](), list[str]()
    digest = plan.digest()
    request = TrainRequest(plan, adapter)
    bytes_up = 0
    listener = Listener(plan.round, 1, on_heard)
    listener.ask("train", plan.cohort)
    for name, reply in members.ask(dict.fromkeys(plan.cohort, request), timeout_s):
        clock.lap("train")
        if isinstance(reply, Contribution) and reply.plan_digest == digest:
            try:
                total.add_packed(reply.vector)
                contributors.append(name)
                bytes_up = max(bytes_up, size(to_wire(reply)))
            except ConfigError as error:
                log.warning("round %d: %s sent a vector of the wrong form: %s", plan.round, name, error)
                refused[name] = MALFORMED
        else:
            refused[name] = reply.reason if isinstance(reply, Refused) else MALFORMED
            log.warning("round %d: %s did not contribute: %s", plan.round, name, refused[name])
        del reply  # before the next one comes, so that no two vectors are held
        clock.lap("aggregate")
        listener.hear(name)
    if len(contributors) < min_cohort:
        said = ", ".join(f"{name}: {reason}" for name, reason in sorted(refused.items()))
        raise RunStopped(
            f"round {plan.round}: {len(contributors)} institutions contributed, federation.min_cohort is {min_cohort} "
            f"({said}). Each institution's own log says why; mend it there, then resume."
        )
    try:
        summed = decode(total.total(), plan.layout, members=len(contributors))
    except CorruptSum as error:
        raise RunStopped(f"round {plan.round}: {error} Resume to repeat the round.") from error
    return Collected(summed, tuple(contributors), refused, bytes_up, size(to_wire(request)))
