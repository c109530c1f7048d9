"""Seconds a round and memory with 10, 100 and 1000 virtual clients: the whole thing on Flower's engine, only small.

Each size is a process of its own, so that no size's memory is counted for another. Its coordinator shares that process
with Flower's link state, Flower's worker threads and Ray's driver, and all of them count. The institutions are played
by `actors` further processes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from client import institution
from client.institution import Institution
from common.config import (
    COORDINATOR,
    Config,
    DataConfig,
    EvaluationConfig,
    FederationConfig,
    QuantiseConfig,
    SecureAggregationConfig,
    SimulationConfig,
    TrainConfig,
    named,
)
from common.config_files import validate
from common.errors import ConfigError, RunStopped
from common.files import write_json
from common.messages import Reply, Request
from common.records import Record, write_jsonl
from server.coordinator import Bench, Observer, coordinate
from server.flower import FlowerMembers
from server.rounds import Progress
from simulations.engine import simulate
from simulations.institutions import VirtualInstitutions
from simulations.layout import RunDirectory

MOST = 2**15  # 16 bits of an element, one of its weight, and these, are the 32 of the ring
RECORDS = 2  # of each institution; what is measured is the machinery around training, not training


@dataclass(frozen=True)
class Scale:
    """What one process plays. wave: messages under way at most; 0 is as many as the engine sets by itself.

    rounds: of which the first, in which actors load their model, counts for nothing but memory.
    """

    clients: int
    rounds: int = 3
    actors: int = 2
    wave: int = 0


@dataclass(frozen=True)
class Measured:
    """What one process measured; memory in MiB.

    coordinator_before, coordinator_peak: resident memory of the coordinator's process, once its model is loaded and at
    its highest. actor_peaks: highest of each actor. loads: how often each actor loaded the base model.
    seconds: of each round after the first; phases: medians over these rounds.
    """

    clients: int
    wave: int
    seconds: list[float]
    phases: dict[str, float]
    coordinator_before: float
    coordinator_peak: float
    actor_peaks: list[float]
    loads: list[int]
    adapter_bytes: int

    @property
    def seconds_per_round(self) -> float:
        return statistics.median(self.seconds)


def sizes(text: str) -> list[int]:
    """Numbers of clients from `10,100,1000`. Raises ConfigError for anything else."""
    found = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(found) < 2 or max(found) > MOST:
        raise ConfigError(
            f"--clients: expected whole numbers from 2 to {MOST} with commas, such as 10,100; found {text!r}"
        )
    return sorted(set(found))


def scale(clients: Sequence[int], rounds: int, actors: int, console: Console) -> dict[str, Any]:
    """Plays every size, and the largest again with all its messages under way at once, to see what waves save.

    Raises RunStopped when a size does not come to its end.
    """
    found: list[Measured] = []
    for plan in [*(Scale(n, rounds, actors) for n in clients), Scale(clients[-1], rounds, actors, wave=clients[-1])]:
        how = ", all messages at once" if plan.wave else ""
        console.print(f"{plan.clients} clients{how}: {plan.rounds} rounds ...")
        found.append(_in_a_process(plan))
        console.print(f"  {found[-1].seconds_per_round:.2f} s a round, {found[-1].coordinator_peak:.0f} MiB")
    *waved, at_once = found
    console.print(_table(found))
    first, last = waved[0], waved[-1]
    return {
        "seconds_per_round": {str(m.clients): round(m.seconds_per_round, 3) for m in waved},
        f"coordinator_rss_{last.clients}_to_{first.clients}": round(last.coordinator_peak / first.coordinator_peak, 3),
        "all_at_once": {
            "seconds_per_round": round(at_once.seconds_per_round, 3),
            "coordinator_rss_to_waves": round(at_once.coordinator_peak / last.coordinator_peak, 3),
        },
        "model_loads_per_actor": max(count for m in found for count in m.loads),
        "sizes": [asdict(m) for m in found],
    }


def _in_a_process(plan: Scale) -> Measured:
    with tempfile.TemporaryDirectory(prefix="silotune-scale-") as out:
        # Not -m: what a module called __main__ defines travels to the actors by value, with every message.
        command = [sys.executable, "-c", f"from {__name__} import main; main()", json.dumps(asdict(plan)), out]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        result = Path(out) / "measured.json"
        if done.returncode or not result.is_file():
            said = "\n".join(done.stderr.strip().splitlines()[-20:])
            raise RunStopped(f"{plan.clients} clients: the process ended with {done.returncode} and said:\n{said}")
        return Measured(**json.loads(result.read_text(encoding="utf-8")))


def play(plan: Scale, out: Path) -> Measured:
    """One size in this process, from the first message to the last."""
    directory = RunDirectory.at(out)
    config = configuration(plan, directory.root / "records")
    write_records(config)
    bench = Bench.of(config)
    before, ends, after = _resident("VmRSS"), [], Progress(bench.start, bench.start)

    def job(members: FlowerMembers) -> None:
        nonlocal after
        if plan.wave:
            members.wave = plan.wave
        ends.append(time.perf_counter())
        observer = Observer(on_round=lambda _: ends.append(time.perf_counter()))
        validation = directory.central(config, "validation")
        after = coordinate(config, directory.root, validation, members, observer, bench).progress

    simulate(config, directory, job, Watched(VirtualInstitutions.of(config, directory.root), directory.root))
    actors = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((directory.root / "actors").iterdir())]
    counted = after.history[1:]
    return Measured(
        clients=plan.clients,
        wave=plan.wave,
        seconds=[end - begin for begin, end in pairwise(ends[1:])],
        phases={phase: statistics.median(r.seconds[phase] for r in counted) for phase in counted[0].seconds},
        coordinator_before=before,
        coordinator_peak=_resident("VmHWM"),
        actor_peaks=[actor["peak"] for actor in actors],
        loads=[actor["loads"] for actor in actors],
        adapter_bytes=after.adapter.bytes,
    )


def configuration(plan: Scale, records: Path) -> Config:
    """A federation of that many institutions; the adapter is the same at every size."""
    config = Config(
        name=f"scale-{plan.clients}",
        data=DataConfig(
            generator="",
            directory=str(records),
            institutions=named(*(f"institution-{number:05d}" for number in range(plan.clients))),
        ),
        train=TrainConfig(batch_size=RECORDS, max_tokens=64),
        federation=FederationConfig(rounds=plan.rounds, weighting="uniform", min_cohort=2, timeout_s=3600.0),
        # What is measured is the coordinator and the engine; `bench secagg` measures what every pair of members costs.
        secure_aggregation=SecureAggregationConfig(enabled=False),
        # What is left of 32 bits beside a weight of 1 and the most institutions, so that every size has the same form.
        quantise=QuantiseConfig(bits=16, weight_bits=1),
        evaluation=EvaluationConfig(exact=[]),
        simulation=SimulationConfig(actors=plan.actors),
    )
    validate(config)
    return config


def write_records(config: Config) -> None:
    """A few short records for everybody."""
    root = Path(config.data.directory)
    for name in (*config.data.names, COORDINATOR):
        for split in ("train", "validation"):
            write_jsonl(
                root / name / f"{split}.jsonl",
                [Record(f"note {n} of {name}", "rest and drink", f"{name}-{n}", "coding") for n in range(RECORDS)],
            )


@dataclass(frozen=True)
class Watched:
    """The virtual institutions, whose process notes after each answer what it has needed so far."""

    institutions: VirtualInstitutions
    root: Path

    @contextmanager
    def __call__(self, context: Any) -> Iterator[Institution]:
        with self.institutions(context) as found:
            yield _WatchedInstitution(**{f.name: getattr(found, f.name) for f in fields(found)}, root=self.root)


@dataclass(frozen=True)
class _WatchedInstitution(Institution):
    root: Path = Path()

    def answer(self, request: Request) -> Reply:
        reply = super().answer(request)
        loads = institution._shared_model.cache_info().misses
        write_json(self.root / "actors" / str(os.getpid()), {"peak": _resident("VmHWM"), "loads": loads})
        return reply


def _resident(key: str) -> float:
    """Of this process in MiB; VmRSS: now, VmHWM: at its highest.

    Not getrusage, whose ru_maxrss begins with what the parent process had before it started this one.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"/proc/self/status has no {key}")


def _table(found: Sequence[Measured]) -> Table:
    table = Table(title="seconds and MiB; the last row has all messages under way at once")
    for column in ("clients", "s/round", "train", "aggregate", "evaluate", "coordinator before", "peak", "actor peak"):
        table.add_column(column, justify="right")
    for m in found:
        table.add_row(
            str(m.clients),
            f"{m.seconds_per_round:.2f}",
            *(f"{m.phases[phase]:.2f}" for phase in ("train", "aggregate", "evaluate")),
            *(f"{mib:.0f}" for mib in (m.coordinator_before, m.coordinator_peak, max(m.actor_peaks))),
        )
    return table


def main() -> None:
    """One size: a plan as JSON and a directory, in which measured.json is left."""
    plan, out = Scale(**json.loads(sys.argv[1])), Path(sys.argv[2])
    write_json(out / "measured.json", asdict(play(plan, out)))


if __name__ == "__main__":
    main()
