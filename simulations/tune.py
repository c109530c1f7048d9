"""The search for batch size and learning rate: one grid, one rule, for every arm.

A weakly tuned reference flatters whatever is compared with it, so local-only and pooled are searched over the same grid
as the federation, and all by the perplexity of their best round on the coordinator's validation records. Test records
are not read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import track
from rich.table import Table

from common.config import POOLED, ArmConfig, Config, TuneConfig
from common.errors import RunStopped
from common.files import write_json, write_text
from server.rounds import Progress
from simulations import prepare
from simulations.compare import run_arm, write_pooled
from simulations.federate import federate
from simulations.layout import RunDirectory
from simulations.processes import process_pool

Arm = Literal["federated", "local", "pooled"]
ARMS: tuple[Arm, ...] = ("federated", "local", "pooled")
KEYS = {"federated": "train", "local": "compare.local", "pooled": "compare.pooled"}


@dataclass(frozen=True)
class Trial:
    """One point of the grid.

    perplexity: of the best round on central validation; for local-only the geometric mean over institutions. Infinite
    for a setting that diverged.
    """

    arm: Arm
    batch_size: int
    learning_rate: float
    perplexity: float

    def as_dict(self) -> dict[str, Any]:
        """As it stands in tune.json; JSON has no word for infinity, so None."""
        return {**asdict(self), "perplexity": self.perplexity if math.isfinite(self.perplexity) else None}


def tune(config: Config, out: Path, console: Console) -> dict[str, Any]:
    """Searches the grid `tune` of the configuration and returns the best settings of each arm and all trials.

    Writes tune.json and best.txt (overrides for the configuration) into `out`; a search that was interrupted goes on
    when it is called again with the same `out`.
    """
    directory = RunDirectory.at(out)
    if not config.data.directory:
        records = directory.records(config)
        if not records.exists():
            prepare.write(prepare.gather(config.data), records)
        config = prepare.from_now_on(config, records)
    grid = list(product(config.tune.batch_sizes, config.tune.learning_rates))
    trials: list[Trial] = []
    with process_pool(config.simulation.actors) as pool:
        futures: list[Future[Trial]] = [
            pool.submit(_trial, config, directory.root, arm, batch_size, rate)
            for arm in ARMS
            for batch_size, rate in grid
        ]
        for future in track(as_completed(futures), "searching", total=len(futures), console=console):
            trial = future.result()
            trials.append(trial)
            console.print(
                f"{trial.arm}: batch {trial.batch_size}, rate {trial.learning_rate:g}: {trial.perplexity:.3f}"
            )
    trials.sort(key=lambda trial: (ARMS.index(trial.arm), trial.batch_size, trial.learning_rate))
    best = {arm: min((t for t in trials if t.arm == arm), key=lambda t: t.perplexity) for arm in ARMS}
    found = {
        "best": {arm: trial.as_dict() for arm, trial in best.items()},
        "trials": [trial.as_dict() for trial in trials],
    }
    write_json(directory.root / "tune.json", found)
    lines = [f"{KEYS[arm]}.{field}={getattr(best[arm], field):g}" for arm in ARMS for field in asdict(ArmConfig())]
    write_text(directory.root / "best.txt", "\n".join(lines) + "\n")
    console.print(_table(trials, best))
    console.print("for the configuration:", *lines)
    return found


def _trial(config: Config, root: Path, arm: Arm, batch_size: int, rate: float) -> Trial:
    """Trains one arm with one setting, or reads it from where an earlier search left it."""
    import torch

    torch.set_num_threads(config.simulation.threads)
    config = replace(config, tune=TuneConfig())  # a wider grid later takes up the trials of a narrower one
    found = ArmConfig(batch_size, rate)
    place = RunDirectory(root / "trials" / f"{arm}-{batch_size}-{rate:g}")
    if arm == "federated":
        perplexity = _perplexity(_federated, config, place, found)
    else:
        trial = replace(config, compare=replace(config.compare, local=found, pooled=found))
        names = [POOLED] if arm == "pooled" else config.data.names
        if arm == "pooled":
            write_pooled(config, place)
        logs = [math.log(_perplexity(run_arm, trial, place, name)) for name in names]
        perplexity = math.exp(sum(logs) / len(logs))
    return Trial(arm, batch_size, rate, perplexity)


def _perplexity(train: Callable[..., Progress], *arguments: object) -> float:
    """Of the best round; a setting that diverges is as bad as can be."""
    try:
        return train(*arguments).best_perplexity
    except RunStopped:
        return math.inf


def _federated(config: Config, place: RunDirectory, found: ArmConfig) -> Progress:
    """The federation itself, without an engine: the messages and rounds are the same.

    Updates are not masked: in one process there is nobody to hide from, and the sum is the same to the bit.
    """
    trial = replace(
        config,
        train=replace(config.train, batch_size=found.batch_size, learning_rate=found.learning_rate),
        secure_aggregation=replace(config.secure_aggregation, enabled=False),
        evaluation=replace(config.evaluation, exact=[], institutions=False),
    )
    return federate(trial, place, place.records(trial), place.central(trial, "validation"))


def _table(trials: list[Trial], best: dict[Arm, Trial]) -> Table:
    table = Table(title="perplexity on central validation, best round")
    for column in ("arm", "batch", "learning rate", "perplexity"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for trial in trials:
        style = "bold green" if best[trial.arm] == trial else ""
        table.add_row(
            trial.arm, str(trial.batch_size), f"{trial.learning_rate:g}", f"{trial.perplexity:.3f}", style=style
        )
    return table
