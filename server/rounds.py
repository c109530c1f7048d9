"""The rounds: invite, collect, sum, decode, step, evaluate, record.

The same code runs a federation on Flower, a federation in one process and, as a federation of one, every reference
arm of the comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from common.adapter import Adapter, flatten
from common.base_model import Fingerprint
from common.config import Config
from common.errors import RunStopped
from common.evaluation import Scores
from common.fixed_point import Decoded
from common.messages import Plan, Settings
from common.methods import method_named
from common.randomness import seeded
from server.collect import Clock, Collect
from server.optimizers import OptimizerState, step


@dataclass(frozen=True)
class RoundRecord:
    """What the coordinator knows of a round: sums over institutions, its own evaluation, and what it cost.

    train_loss, institutions_perplexity: means over all institutions' tokens, read from the sum.
    validation: scores on the coordinator's validation records, or None when the round was not evaluated.
    best: whether its adapter was the best so far. seconds: by phase. attempts: how many it took to come to the sum.
    bytes_up, bytes_down: the most that an institution sent, and received, in the last of them.
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
    attempts: int = 1


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


def cohort_of(config: Config, present: tuple[str, ...], round_number: int) -> tuple[str, ...]:
    """The institutions of a round, by name: all who are present, or `fraction` of them.

    In the clear that is a seeded draw each round. Under secure aggregation it is a fixed group, the groups taking
    turns: the sums of two cohorts that differ by one member would differ by its update. A group with fewer than
    `min_cohort` members present is passed over. Raises RunStopped when every group is.
    """
    federation = config.federation
    size = max(round(len(present) * federation.fraction), min(federation.min_cohort, len(present)), 1)
    if not config.secure_aggregation.enabled:
        drawn = seeded(config.seed, "cohort", round_number).choice(len(present), size=size, replace=False)
        return tuple(sorted(present)[i] for i in sorted(drawn))
    there = [tuple(name for name in group if name in present) for group in groups_of(config)]
    able = [group for group in there if len(group) >= federation.min_cohort]
    if not able:
        raise RunStopped(
            f"round {round_number}: {len(present)} institutions are present, but no group of federation.fraction = "
            f"{federation.fraction:g} has {federation.min_cohort} of them. Resume when more are back."
        )
    return able[(round_number - 1) % len(able)]


def groups_of(config: Config) -> tuple[tuple[str, ...], ...]:
    """All institutions, dealt once for the whole run into groups of `fraction` of them, at least `min_cohort` each."""
    names, federation = sorted(config.data.names), config.federation
    size = max(round(len(names) * federation.fraction), federation.min_cohort)
    count = max(len(names) // size, 1)
    order = seeded(config.seed, "groups").permutation(len(names))
    return tuple(tuple(sorted(names[i] for i in order[group::count])) for group in range(count))


def run_rounds(
    config: Config,
    run: str,
    present: tuple[str, ...],
    fingerprint: Fingerprint,
    collect: Collect,
    evaluate: Callable[[Adapter], Scores],
    progress: Progress,
    on_round: Callable[[Progress], None],
) -> Progress:
    """Runs the remaining rounds and returns the last progress.

    on_round sees the progress after every round, before the next begins; what it writes is what a resume finds.
    Raises RunStopped when a round has no sum, or every update of it is void.
    """
    while not finished(config, progress):
        progress = run_round(config, run, present, fingerprint, collect, evaluate, progress)
        on_round(progress)
    return progress


def run_round(
    config: Config,
    run: str,
    present: tuple[str, ...],
    fingerprint: Fingerprint,
    collect: Collect,
    evaluate: Callable[[Adapter], Scores],
    progress: Progress,
) -> Progress:
    """One round, from invitation to record."""
    number = progress.round + 1
    plan = _plan(config, run, cohort_of(config, present, number), fingerprint, progress)
    clock = Clock()
    collected = collect(plan, progress.adapter, clock)
    summed = collected.summed
    adapter, optimizer = _server_step(config, progress, summed, number)
    clock.lap("aggregate")
    scores = _central_scores(config, number, adapter, evaluate)
    clock.lap("evaluate")
    best = scores is not None and scores.perplexity < progress.best_perplexity
    loss = summed.mean_loss("validation")
    record = RoundRecord(
        round=number,
        contributors=len(collected.contributors),
        void=summed.void,
        refused=collected.refused,
        train_loss=summed.mean_loss("train"),
        institutions_perplexity=None if loss is None else math.exp(min(loss, 700.0)),
        validation=None if scores is None else scores.as_dict(),
        best=best,
        seconds=clock.seconds,
        bytes_up=collected.bytes_up,
        bytes_down=collected.bytes_down,
        attempts=collected.attempts,
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


def record_as_json(record: RoundRecord) -> dict[str, Any]:
    """A round as one object of metrics.jsonl."""
    return {
        **record.__dict__,
        "refused": dict(record.refused),
        "validation": None if record.validation is None else dict(record.validation),
        "seconds": dict(record.seconds),
    }
