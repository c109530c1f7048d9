"""What privacy costs: perplexity and exact answers against epsilon, and the price of a private step.

A point is one training run: so many patients at each of four hospitals, a seed, a mode, a method, an epsilon, and who
trains: the federation, or one hospital alone. Points run the simulation's own code without its engine, as many at a
time as the configuration has actors. One that is done is kept, in the directory's privacy.json, and one that was
interrupted goes on from its last complete round. With equal patients all private points of a mode have equal passes
over each record; without privacy fewer are enough.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from rich import progress as bars
from rich.console import Console

from common import config_files
from common.config import COORDINATOR, Config
from common.errors import ConfigError, RunStopped
from common.files import storage_errors, write_json
from common.privacy.mechanism import steps_per_round
from common.records import Record
from server.coordinator import Bench
from server.rounds import Progress
from simulations import compare, prepare
from simulations.federate import federate
from simulations.generate.federation import Federation
from simulations.layout import RunDirectory
from simulations.processes import process_pool

CONFIG = "hospitals-private"
RESULTS = "privacy.json"
FEDERATED = "federated"
WITHOUT = math.inf
"""The epsilon of a run without privacy."""

EPSILONS = (8.0, 1.0, 4.0, 2.0)
MODES = ("patient", "record", "distributed", "institution")
METHODS = ("fedavg", "ffa")

_RECORDS_A_PATIENT = 2.7
"""That are generated at least; what is too much is left out."""


@dataclass(frozen=True)
class Point:
    """One training run. epsilon: infinite without privacy, where mode is `none`. arm: `federated`, or a hospital."""

    patients: int
    seed: int
    mode: str
    method: str
    epsilon: float
    arm: str = FEDERATED

    @property
    def name(self) -> str:
        """As its directory is called."""
        return f"{self.patients}-{self.mode}-{self.method}-{self.epsilon:g}-{self.seed}-{self.arm}"


@dataclass(frozen=True)
class Result:
    """What came of a point, on test records.

    everyone: scores on everybody's test. own: perplexity on each hospital's own; where one trained alone, on its own,
    of the adapter that its own validation records prefer (`score_arm`). base: the base model's scores on everybody's.
    best_round: whose adapter `everyone` is of. seconds: of one core. stopped: why it ended early.
    """

    point: Point
    everyone: Mapping[str, float | None]
    own: Mapping[str, float | None]
    base: Mapping[str, float | None]
    best_round: int
    seconds: float
    stopped: str = ""

    @property
    def perplexity(self) -> float:
        """On everybody's test; infinite where it is no number."""
        found = self.everyone["perplexity"]
        return math.inf if found is None else found

    def as_dict(self) -> dict[str, Any]:
        """As it is written; JSON has no word for infinity, so None."""
        point = asdict(self.point) | {"epsilon": None if self.point.epsilon == WITHOUT else self.point.epsilon}
        return point | {field.name: getattr(self, field.name) for field in fields(self) if field.name != "point"}

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> Result:
        """What `as_dict` made."""
        names = {field.name for field in fields(Point)}
        place = {name: value for name, value in said.items() if name in names}
        place["epsilon"] = WITHOUT if place["epsilon"] is None else place["epsilon"]
        return cls(Point(**place), **{name: value for name, value in said.items() if name not in names})


# --- What is run ------------------------------------------------------------------------------------------------------


def headline(patients: int, seed: int, epsilon: float = EPSILONS[0]) -> tuple[Point, ...]:
    """What the figures of `--json` need: mode `patient`, federated and every hospital alone, and no privacy at all."""
    private = Point(patients, seed, MODES[0], METHODS[0], epsilon)
    without = Point(patients, seed, "none", "fedavg", WITHOUT)
    return (private, without, *(replace(private, arm=name) for name in hospitals()))


def grid(patients: Sequence[int], seeds: Sequence[int], epsilons: Sequence[float] = EPSILONS) -> tuple[Point, ...]:
    """Every mode with every method at every epsilon, and without privacy; hospitals alone beside them.

    In an order that tells most first: the headline, its mode and method at every epsilon, other modes and methods at
    the first epsilon, and the rest. A hospital alone has no sum to hide in: beside `distributed` stands `record`, and
    beside `institution` nothing. Under privacy it trains by the first method only.
    """
    found: list[Point] = []
    for seed, size in product(seeds, patients):
        found += [Point(size, seed, "none", method, WITHOUT) for method in METHODS]
        found += [Point(size, seed, "none", "fedavg", WITHOUT, name) for name in hospitals()]
        for epsilon, mode in product(epsilons, MODES):
            found += [Point(size, seed, mode, method, epsilon) for method in METHODS]
            if mode in ("patient", "record"):
                found += [Point(size, seed, mode, METHODS[0], epsilon, name) for name in hospitals()]

    def place(point: Point) -> tuple[int, int]:
        ours = (point.mode, point.method) == (MODES[0], METHODS[0]) or point.epsilon == WITHOUT
        return point.seed, 0 if ours else 1 if point.epsilon == epsilons[0] else 2

    first = headline(patients[0], seeds[0], epsilons[0])
    return tuple(dict.fromkeys([*first, *sorted(found, key=place)]))


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Different whole numbers from 1, as `1000,80` says them. Raises ConfigError for anything else."""
    found = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(found) < 1:
        raise ConfigError(
            f"{option}: expected whole numbers of at least 1 with commas, such as 1000,80; found {text!r}"
        )
    return tuple(dict.fromkeys(found))


def hospitals() -> tuple[str, ...]:
    """Their names."""
    return config_files.load(CONFIG).data.names


def delta_for(patients: int) -> float:
    """The largest power of ten that is at most 1 / (10 x patients)."""
    return float(f"1e{-math.ceil(math.log10(10 * patients) - 1e-9)}")


def config_of(point: Point, records: Path, overrides: Sequence[str] = ()) -> Config:
    """The shipped configuration as this point has it, with records that lie in `records`.

    overrides: `key=value`, for every point alike. Raises ConfigError for a point that cannot be.
    """
    shared = point.mode in ("distributed", "institution")
    said: dict[str, Any] = {
        "seed": point.seed,
        "data.seed": point.seed,
        "federation.method": point.method,
        "privacy.mode": point.mode,
        "privacy.epsilon": 0 if point.epsilon == WITHOUT else point.epsilon,
        "privacy.delta": delta_for(point.patients),
        # Elsewhere masks change no bit of the result, and only cost.
        "secure_aggregation.enabled": str(shared).lower(),
        "evaluation.exact": "[]",  # test records are answered once, at the end
        "evaluation.institutions": "false",
        "tracking.tensorboard": "false",
        **_settings(point),
    }
    config = config_files.load(CONFIG, [*(f"{key}={value}" for key, value in said.items()), *overrides])
    if point.mode == "distributed":
        config = _one_step_a_round(config)
    return prepare.from_now_on(config, records)


_WITHOUT_NOISE = {"train.batch_size": 16, "train.learning_rate": 4e-3}
_WHOLE_PASSES = {"federation.rounds": 6, "train.passes_per_round": 1.0}
_ALONE_WITHOUT_NOISE = {"compare.local.batch_size": 16, "compare.local.learning_rate": 4e-3}


def _settings(point: Point) -> dict[str, Any]:
    """What a point has otherwise than the shipped configuration, which is of mode `patient`, method `fedavg`.

    Rates were searched on validation records of seed 1; simulations/results/README.md has the search.
    """
    found: dict[str, Any] = {}
    if point.mode in ("none", "institution"):
        found |= _WITHOUT_NOISE | _ALONE_WITHOUT_NOISE | _WHOLE_PASSES
    elif point.method == "ffa":
        found |= {"train.learning_rate": 4e-2, "compare.local.learning_rate": 1.5e-2}
    if point.mode == "distributed":
        found |= {
            "federation.server_optimizer.name": "fedadam",
            "federation.server_optimizer.learning_rate": 2e-2 if point.method == "ffa" else 1e-2,
            "quantise.clip": 4,  # an element of a sum over a lot
        }
    if point.patients < _FEW:
        # Lots of as many patients as there are to hide among, and smaller steps.
        found |= {"federation.rounds": 8, "train.passes_per_round": 1.0, "privacy.sampling_rate": 0.25}
        if point.mode in ("patient", "record"):
            found |= {"train.learning_rate": 2e-2, "compare.local.learning_rate": 1e-2}
        if point.mode == "distributed":
            found["federation.server_optimizer.learning_rate"] = 5e-3
    return found


_FEW = 300
"""Patients below which a hospital has few."""


def _one_step_a_round(config: Config) -> Config:
    """As many steps in all, each a round of its own."""
    rate = config.privacy.sampling_rate
    rounds = config.federation.rounds * steps_per_round(config.train.passes_per_round, rate)
    return replace(
        config,
        train=replace(config.train, passes_per_round=rate),
        federation=replace(config.federation, rounds=rounds),
        evaluation=replace(config.evaluation, every=max(1, rounds // config.federation.rounds)),
    )


def records_of(root: Path, patients: int, seed: int, overrides: Sequence[str] = ()) -> Path:
    """A directory of generated records, of exactly so many patients at every hospital; written once."""
    out = root / "records" / f"{patients}-{seed}"
    if not (out / COORDINATOR / "test.jsonl").exists():  # the last to be written
        data = replace(config_files.load(CONFIG, overrides).data, seed=seed)
        data = replace(data, train_records=[math.ceil(_RECORDS_A_PATIENT * patients)] * len(data.names))
        made = prepare.gather(data)
        own = {
            name: replace(splits, train=_of_the_first(splits.train, patients))
            for name, splits in made.institutions.items()
        }
        prepare.write(Federation(own, made.coordinator), out)
    return out


def _of_the_first(records: Sequence[Record], patients: int) -> tuple[Record, ...]:
    """The records of the first so many patients. Raises ConfigError where there are fewer."""
    kept = set(list(dict.fromkeys(record.person for record in records))[:patients])
    if len(kept) < patients:
        raise ConfigError(f"expected records of {patients} patients, generated those of {len(kept)}")
    return tuple(record for record in records if record.person in kept)


# --- Running it -------------------------------------------------------------------------------------------------------


def run_point(point: Point, root: Path, overrides: Sequence[str] = ()) -> Result:
    """Trains what a point says and reads the test records once; what was done before is only read."""
    import torch

    torch.set_num_threads(1)
    place = RunDirectory.at(root / "points" / point.name)
    kept = place.root / "result.json"
    if kept.exists():
        return Result.from_dict(json.loads(kept.read_text(encoding="utf-8")))
    began = time.process_time()
    config = config_of(point, root / "records" / f"{point.patients}-{point.seed}", overrides)
    stopped, progress = "", None
    try:
        progress = _train(point, config, place)
    except RunStopped as error:
        stopped = str(error)
    bench = Bench.of(replace(config, evaluation=replace(config.evaluation, exact=["coding"])))
    if point.arm == FEDERATED:
        trained = place.root / "adapter"
        found = compare.score(config, place, bench, trained if trained.exists() else None, config.data.names)
    else:
        found = compare.score_arm(config, place, bench, point.arm, progress)
    base = bench.scores(bench.start, bench.read(place.central(config, "test")))
    result = Result(
        point=point,
        everyone=found.everyone.as_dict(),
        own={name: scores.as_dict()["perplexity"] for name, scores in found.own.items()},
        base=base.as_dict(),
        best_round=progress.best_round if progress else 0,
        seconds=round(time.process_time() - began, 1),
        stopped=stopped,
    )
    write_json(kept, result.as_dict())
    return result


def _train(point: Point, config: Config, place: RunDirectory) -> Progress:
    if point.arm != FEDERATED:
        return compare.run_arm(config, place, point.arm)
    return federate(config, place, place.records(config), place.central(config, "validation"))


def run_points(
    points: Sequence[Point],
    root: Path,
    console: Console,
    overrides: Sequence[str] = (),
    on_results: Callable[[Sequence[Result]], None] = lambda _: None,
) -> list[Result]:
    """Runs all points, as many at a time as the configuration has actors, in the order given.

    Returns the results of everything that `root` holds: what its privacy.json has is not run again, and is returned
    whether asked for or not.
    on_results: called with all that is done at the beginning, and whenever a point ends.

    Raises ConfigError where `root` has points with other overrides or a privacy.json that is none, and RunStopped when
    a process dies: what is done is kept.
    """
    _require_same(root, overrides)
    results = {result.point: result for result in kept(root)}
    todo = [point for point in points if point not in results]
    on_results(_sorted(results.values()))
    with storage_errors(root):
        for patients, seed in dict.fromkeys((point.patients, point.seed) for point in todo):
            records_of(root, patients, seed, overrides)
    columns = (bars.TextColumn("training"), bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeElapsedColumn())
    bar = bars.Progress(*columns, console=console)
    with bar, process_pool(config_files.load(CONFIG).simulation.actors) as pool:
        task = bar.add_task("training", total=len(points), completed=len(points) - len(todo))
        futures: list[Future[Result]] = [pool.submit(run_point, point, root, tuple(overrides)) for point in todo]
        try:
            for future in as_completed(futures):
                result = future.result()
                results[result.point] = result
                bar.update(task, advance=1)
                on_results(_sorted(results.values()))
                console.print(f"{result.point.name}: {result.perplexity:.3f}, {result.seconds:.0f} s", highlight=False)
        except BrokenProcessPool as error:
            raise RunStopped(f"a process of the benchmark died; call it again with --out {root} to go on") from error
    return _sorted(results.values())


def kept(root: Path) -> list[Result]:
    """The results that `root`/privacy.json has; none where there is no such file. Raises ConfigError for another's."""
    file = root / RESULTS
    if not file.exists():
        return []
    try:
        return [Result.from_dict(said) for said in json.loads(file.read_text(encoding="utf-8"))["points"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file}: expected what `bench privacy` writes, found something else; move it away, or choose another --out"
        ) from error


def _sorted(results: Iterable[Result]) -> list[Result]:
    """In one order, whenever each was run."""

    def place(result: Result) -> tuple[Any, ...]:
        point = result.point
        return -point.patients, point.seed, point.mode, point.method, -point.epsilon, point.arm

    return sorted(results, key=place)


def _require_same(root: Path, overrides: Sequence[str]) -> None:
    """A results file without word of overrides, such as the published one, has none."""
    file = root / "overrides.json"
    held = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    if (file.exists() or (root / RESULTS).exists()) and held != list(overrides):
        raise ConfigError(f"{root} holds points with {held or 'no overrides'}; name the same, or choose another --out")
    write_json(file, list(overrides))
