"""The honest comparison: every reference arm is a federation of one, run by the same round code.

local-only: one institution with its own records. pooled: one institution that holds everybody's. All arms have the same
number of rounds, passes over each record, learning-rate schedule and rule for choosing the published round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

from common.config import POOLED, ArmConfig, Config, named
from common.errors import RunStopped
from common.evaluation import Scores
from common.files import storage_errors
from common.models import load_adapter
from common.privacy.mechanism import alone
from common.records import read_jsonl, write_jsonl
from server.coordinator import Bench
from server.rounds import Progress
from simulations.federate import federate
from simulations.layout import RunDirectory
from simulations.processes import process_pool


@dataclass(frozen=True)
class ArmScores:
    """An arm's scores on test records: everybody's, and the own ones of institutions, by name.

    stopped: why its training ended before time, such as a loss that diverged; its last good round is scored.
    """

    everyone: Scores
    own: Mapping[str, Scores]
    stopped: str = ""


def arm_config(config: Config, arm: str) -> Config:
    """The configuration of a reference arm: `pooled` or an institution's name.

    Between rounds an arm is scored by perplexity alone, which is what the published round is chosen by. Its updates are
    not masked: a federation of one in this process has nobody to hide from.

    Its privacy is that of one who trains alone (`mechanism.alone`), and has a ledger of its own.
    """
    tuned: ArmConfig = config.compare.pooled if arm == POOLED else config.compare.local
    privacy, passes = alone(config.privacy, config.train.passes_per_round)
    return replace(
        config,
        name=f"{config.name}-{arm}",
        privacy=privacy,
        data=replace(config.data, institutions=named(arm), train_records=[]),
        train=replace(
            config.train,
            batch_size=tuned.batch_size,
            learning_rate=tuned.learning_rate,
            passes_per_round=passes,
        ),
        federation=replace(
            config.federation,
            fraction=1.0,
            min_cohort=1,
            server_optimizer=replace(config.federation.server_optimizer, name="fedavg", learning_rate=1.0),
        ),
        secure_aggregation=replace(config.secure_aggregation, enabled=False),
        evaluation=replace(config.evaluation, exact=[], institutions=False),
        # What one institution reaches alone is for this machine only.
        tracking=replace(config.tracking, mlflow="", wandb=""),
        simulation=replace(config.simulation, faults=[]),
    )


def write_pooled(config: Config, directory: RunDirectory) -> None:
    """Puts all training records into one institution's folder."""
    records = directory.records(config)
    together = [record for name in config.data.names for record in read_jsonl(records / name / "train.jsonl")]
    write_jsonl(directory.pooled_records / POOLED / "train.jsonl", together)


def run_arm(config: Config, directory: RunDirectory, arm: str) -> Progress:
    """Runs one reference arm in this process, or goes on with it. Raises RunStopped when its updates are void."""
    home = RunDirectory(directory.arms / arm)
    mine = arm_config(config, arm)
    source = directory.pooled_records if arm == POOLED else directory.records(config)
    return federate(mine, home, source, directory.central(config, "validation"))


def score(
    config: Config, directory: RunDirectory, bench: Bench, adapter: Path | None, homes: Sequence[str]
) -> ArmScores:
    """Reads the test records once, for one adapter: everybody's, and the own ones of the institutions `homes`.

    Without an adapter it is the base model that is scored.
    """
    found = bench.start if adapter is None else load_adapter(adapter)
    records = directory.records(config)
    return ArmScores(
        everyone=bench.scores(found, bench.read(directory.central(config, "test"))),
        own={name: bench.scores(found, bench.read(records / name / "test.jsonl")) for name in homes},
    )


def score_arm(config: Config, directory: RunDirectory, bench: Bench, arm: str, progress: Progress | None) -> ArmScores:
    """Reads the test records once, for one reference arm; progress: None where it stopped early.

    Everybody's with the adapter of the round that everybody's validation records chose. At home an institution that
    trains alone would choose by its own validation records, so there the last round stands beside that one.
    """
    file = directory.arms / arm / "adapter"
    published = load_adapter(file) if file.exists() else bench.start
    everyone = bench.scores(published, bench.read(directory.central(config, "test")))
    if arm == POOLED:
        return ArmScores(everyone, {})
    home, quick = directory.records(config) / arm, replace(bench, exact=())
    validation = bench.read(home / "validation.jsonl")
    candidates = [published] if progress is None else [published, progress.adapter]
    chosen = min(candidates, key=lambda adapter: quick.scores(adapter, validation).perplexity)
    return ArmScores(everyone, {arm: bench.scores(chosen, bench.read(home / "test.jsonl"))})


def gap_closed(local_best: float, federated: float, pooled: float) -> float | None:
    """(log local - log federated) / (log local - log pooled); None when pooling gains nothing: no gap to close."""
    gap = math.log(local_best) - math.log(pooled)
    return (math.log(local_best) - math.log(federated)) / gap if gap > 1e-9 else None


def _arm_process(config: Config, root: Path, arm: str) -> tuple[str, ArmScores]:
    """One arm from beginning to end, in a process of its own."""
    import torch

    torch.set_num_threads(config.simulation.threads)
    directory = RunDirectory(root)
    stopped, progress = "", None
    try:
        progress = run_arm(config, directory, arm)
    except RunStopped as error:
        stopped = str(error)
    return arm, replace(score_arm(config, directory, Bench.of(config), arm, progress), stopped=stopped)


def run_arms(config: Config, directory: RunDirectory, on_arm: Callable[[str, ArmScores], None]) -> dict[str, ArmScores]:
    """Runs all reference arms, `simulation.actors` at a time, and scores each on the test records.

    Arms that were complete before an interruption go on from their last checkpoint and so cost only their scoring.
    """
    with storage_errors(directory.arms):
        write_pooled(config, directory)
    # The pooled arm is as long as all the others together, so it goes first.
    arms = (POOLED, *config.data.names)
    results: dict[str, ArmScores] = {}
    with process_pool(config.simulation.actors) as pool:
        futures: list[Future[tuple[str, ArmScores]]] = [
            pool.submit(_arm_process, config, directory.root, arm) for arm in arms
        ]
        try:
            for future in as_completed(futures):
                arm, scores = future.result()
                results[arm] = scores
                on_arm(arm, scores)
        except BrokenProcessPool as error:
            raise RunStopped("a process of the comparison died; resume, and its arm goes on") from error
    return results
