"""The rounds: invite, collect, sum, decode, step, evaluate, record.

The same code runs a federation on Flower, a federation in one process and, as a federation of one, every reference
arm of the comparison.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from common.adapter import Adapter, flatten
from common.base_model import Fingerprint
from common.config import Config, FederationConfig
from common.errors import ConfigError, RunStopped
from common.evaluation import Scores
from common.fixed_point import Decoded, RunningSum, decode
from common.messages import MALFORMED, Contribution, Plan, Refused, Reply, Request, Settings, TrainRequest
from common.methods import method_named
from common.randomness import seeded
from server.optimizers import OptimizerState, step

log = logging.getLogger("silotune.server")


class Members(Protocol):
    """The institutions, however they are reached."""

    def ask(self, requests: Mapping[str, Request], timeout_s: float) -> Iterator[tuple[str, Reply]]:
        """Sends each named institution its request and yields one reply a name, in any order."""


@dataclass(frozen=True)
class RoundRecord:
    """What the coordinator knows of a round: sums over institutions, its own evaluation, and what it cost.

    train_loss, institutions_perplexity: means over all institutions' tokens, read from the sum.
    validation: scores on the coordinator's validation records, or None when the round was not evaluated.
    best: whether its adapter was the best so far. seconds: by phase. bytes_up, bytes_down: of one institution.
    """

    round: int
    contributors: int
    void: int
    refused: Mapping[str, str]
    train_loss: float | None
    institutions_perplexity: float | None
    validation: Mapping[str, float | None] | None
    best: bool
    seconds: Mapping[str, float]
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class Progress:
    """A run between two rounds; all that is needed to go on from there.

    best: the adapter to publish, of `best_round`; 0 is the adapter the run began with.
    """

    adapter: Adapter
    best: Adapter
    best_round: int = 0
    best_perplexity: float = math.inf
    optimizer: OptimizerState = field(default_factory=OptimizerState)
    history: tuple[RoundRecord, ...] = ()

    @property
    def round(self) -> int:
        """Rounds that are complete."""
        return len(self.history)


def begin(adapter: Adapter, scores: Scores) -> Progress:
    """A run that has not had a round yet. `scores` are its first adapter's, which is the base model's behaviour: a
    round has to beat it to be published.
    """
    return Progress(adapter, adapter, best_perplexity=scores.perplexity)


def finished(config: Config, progress: Progress) -> bool:
    """Whether all rounds are done, or `evaluation.patience` evaluations went by without a better perplexity."""
    return progress.round >= config.federation.rounds or stopped_early(config, progress)


def stopped_early(config: Config, progress: Progress) -> bool:
    """Whether the run ended because it had stopped improving."""
    if not config.evaluation.patience:
        return False
    since = sum(1 for record in progress.history[progress.best_round :] if record.validation is not None)
    return since >= config.evaluation.patience


def cohort_of(roster: tuple[str, ...], federation: FederationConfig, seed: int, round_number: int) -> tuple[str, ...]:
    """The institutions of a round, by roster name: all, or a seeded draw of `fraction` of them."""
    size = max(round(len(roster) * federation.fraction), min(federation.min_cohort, len(roster)), 1)
    drawn = seeded(seed, "cohort", round_number).choice(len(roster), size=size, replace=False)
    return tuple(sorted(roster)[i] for i in sorted(drawn))


def run_rounds(
    config: Config,
    run: str,
    roster: tuple[str, ...],
    fingerprint: Fingerprint,
    members: Members,
    evaluate: Callable[[Adapter], Scores],
    progress: Progress,
    on_round: Callable[[Progress], None],
    on_reply: Callable[[int, int, int], None] = lambda *_: None,
) -> Progress:
    """Runs the remaining rounds and returns the last progress.

    on_round sees the progress after every round, before the next begins; what it writes is what a resume finds.
    on_reply(round, answered, invited) is told as replies come in.
    Raises RunStopped when fewer than `min_cohort` institutions contribute, or every update of a round is void.
    """
    while not finished(config, progress):
        progress = run_round(config, run, roster, fingerprint, members, evaluate, progress, on_reply)
        on_round(progress)
    return progress


def run_round(
    config: Config,
    run: str,
    roster: tuple[str, ...],
    fingerprint: Fingerprint,
    members: Members,
    evaluate: Callable[[Adapter], Scores],
    progress: Progress,
    on_reply: Callable[[int, int, int], None],
) -> Progress:
    """One round, from invitation to record."""
    number = progress.round + 1
    plan = _plan(config, run, cohort_of(roster, config.federation, config.seed, number), fingerprint, progress)
    clock = _Clock()
    total, refused = _collect(plan, progress.adapter, members, config.federation.timeout_s, clock, on_reply)
    _require_enough(total, refused, config.federation.min_cohort, number)
    summed = decode(total.total(), plan.layout)
    adapter, optimizer = _server_step(config, progress, summed, number)
    clock.lap("aggregate")
    scores = _central_scores(config, number, adapter, evaluate)
    clock.lap("evaluate")
    best = scores is not None and scores.perplexity < progress.best_perplexity
    loss = summed.mean_loss("validation")
    record = RoundRecord(
        round=number,
        contributors=total.count,
        void=summed.void,
        refused=refused,
        train_loss=summed.mean_loss("train"),
        institutions_perplexity=None if loss is None else math.exp(min(loss, 700.0)),
        validation=None if scores is None else scores.as_dict(),
        best=best,
        seconds=clock.seconds,
        bytes_up=total.total().nbytes,
        bytes_down=progress.adapter.bytes,
    )
    progress = replace(progress, adapter=adapter, optimizer=optimizer, history=(*progress.history, record))
    if best and scores is not None:
        progress = replace(progress, best=adapter, best_round=number, best_perplexity=scores.perplexity)
    return progress


def _plan(config: Config, run: str, cohort: tuple[str, ...], fingerprint: Fingerprint, progress: Progress) -> Plan:
    adapter = progress.adapter
    trained = method_named(config.federation.method).trained(adapter)
    return Plan(
        run=run,
        round=progress.round + 1,
        cohort=cohort,
        parameters=len(flatten(adapter.factors, trained)),
        adapter_digest=adapter.digest(),
        fingerprint=fingerprint,
        settings=Settings.of(config),
    )


def _collect(
    plan: Plan,
    adapter: Adapter,
    members: Members,
    timeout_s: float,
    clock: _Clock,
    on_reply: Callable[[int, int, int], None],
) -> tuple[RunningSum, dict[str, str]]:
    """Adds each vector to the sum as it arrives and forgets it; names who refused, with the reason code."""
    total, refused = RunningSum(plan.layout), {}
    digest = plan.digest()
    for name, reply in members.ask(dict.fromkeys(plan.cohort, TrainRequest(plan, adapter)), timeout_s):
        clock.lap("train")
        if isinstance(reply, Contribution) and reply.plan_digest == digest:
            try:
                total.add(reply.vector)
            except ConfigError as error:
                log.warning("round %d: %s sent a vector of the wrong form: %s", plan.round, name, error)
                refused[name] = MALFORMED
        else:
            refused[name] = reply.reason if isinstance(reply, Refused) else MALFORMED
            log.warning("round %d: %s did not contribute: %s", plan.round, name, refused[name])
        del reply  # before the next one comes, so that no two vectors are held
        clock.lap("aggregate")
        on_reply(plan.round, total.count + len(refused), len(plan.cohort))
    return total, refused


def _require_enough(total: RunningSum, refused: Mapping[str, str], min_cohort: int, number: int) -> None:
    if total.count < min_cohort:
        said = ", ".join(f"{name}: {reason}" for name, reason in sorted(refused.items()))
        raise RunStopped(
            f"round {number}: {total.count} institutions contributed, federation.min_cohort is {min_cohort} ({said}). "
            "Each institution's own log says why; mend it there, then resume."
        )


def _server_step(config: Config, progress: Progress, summed: Decoded, number: int) -> tuple[Adapter, OptimizerState]:
    if summed.weight == 0:
        raise RunStopped(
            f"round {number}: all {summed.void} updates were void (not finite). Lower train.learning_rate or raise "
            "train.warmup; the adapter of the last good round is kept."
        )
    method = method_named(config.federation.method)
    proposed = method.decode(summed.update, summed.weight, progress.adapter)
    return step(config.federation.server_optimizer, progress.optimizer, progress.adapter, proposed)


def _central_scores(
    config: Config, number: int, adapter: Adapter, evaluate: Callable[[Adapter], Scores]
) -> Scores | None:
    due = number % config.evaluation.every == 0 or number == config.federation.rounds
    return evaluate(adapter) if due else None


class _Clock:
    """Adds the time since the last lap to a phase."""

    def __init__(self) -> None:
        self.seconds = {"train": 0.0, "aggregate": 0.0, "evaluate": 0.0}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now


def record_as_json(record: RoundRecord) -> dict[str, Any]:
    """A round as one object of metrics.jsonl."""
    return {
        **record.__dict__,
        "refused": dict(record.refused),
        "validation": None if record.validation is None else dict(record.validation),
        "seconds": dict(record.seconds),
    }
