"""The main job: a whole federation on one machine, compared with its alternatives, and told honestly."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from common import config_files
from common.config import POOLED, Config
from common.errors import ConfigError, RunStopped
from common.files import storage_errors, write_json, write_text
from common.messages import Refused
from common.privacy.mechanism import alone
from common.privacy.promise import promise_of
from common.records import read_jsonl
from server import checkpoints, report, tracking
from server.collect import Heard
from server.coordinator import Bench, Observer, Outcome, coordinate
from server.flower import FlowerMembers
from server.live import round_line
from server.rounds import Progress as RunProgress
from server.summary import facts, seconds_of
from server.terms import launch_line, privacy_lines
from simulations import compare, prepare
from simulations.compare import ArmScores
from simulations.delta import about_delta
from simulations.identities import SimulatedIdentities
from simulations.layout import RunDirectory
from simulations.spending import spending


def run(config: Config, out: Path, console: Console) -> dict[str, Any]:
    """Runs a federation in the new directory `out` and returns what stands in its summary.json.

    Raises ConfigError when `out` holds a run already, DataError when records cannot be read, and what `resume` raises.
    """
    directory = RunDirectory.at(out)
    if (directory.root / "config.yaml").exists():
        raise ConfigError(
            f"{out} holds a run already; go on with it by `silotune-sim run --resume {out}`, or choose another --out"
        )
    promise_of(config)  # refuses what no noise reaches
    # All of them, before anything is written or trained.
    records = prepare.gather(config.data)
    with storage_errors(directory.root):
        directory.root.mkdir(parents=True, exist_ok=True)
    if not config.data.directory:
        prepare.write(records, directory.records(config))
    write_json(directory.root / "started.json", {"started": datetime.now(UTC).isoformat(timespec="seconds")})
    # Last, since it is what makes the directory a run that can be resumed.
    write_text(directory.root / "config.yaml", config_files.to_yaml(config))
    return _go_on(config, directory, console)


def resume(directory: Path, console: Console) -> dict[str, Any]:
    """Goes on with the run in `directory` from its last complete round.

    Raises ConfigError when there is no run, RunStopped when too few institutions contribute, DataError, ModelError and
    StorageError as their names say. Whatever was complete is kept.
    """
    found = RunDirectory.at(directory)
    file = found.root / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{directory}: expected the directory of a run, found no config.yaml in it")
    return _go_on(config_files.load(str(file)), found, console)


def _go_on(config: Config, directory: RunDirectory, console: Console) -> dict[str, Any]:
    began = time.perf_counter()
    before = seconds_of(checkpoints.latest(directory.root / "checkpoints", config_files.digest(config)))
    console.print(
        f"[bold]{config.name}[/]: {len(config.data.names)} institutions, {config.federation.rounds} rounds of "
        f"{config.federation.method}, base model {escape(config.model.path)}; results in {escape(str(directory.root))}"
    )
    for line in (launch_line(config), *privacy_lines(config)):
        console.print(line)
    if told := about_delta(config, lambda name: read_jsonl(directory.records(config) / name / "train.jsonl")):
        console.print(Text(told, "yellow"))
    tracking.require(config.tracking)
    bench = Bench.of(config)
    outcome = _federate(config, directory, bench, console)
    federated_at = time.perf_counter()
    base = compare.score(config, directory, bench, None, config.data.names)
    federated = compare.score(config, directory, bench, directory.root / "adapter", config.data.names)
    arms = _run_arms(config, directory, console) if config.compare.enabled else {}
    seconds = {
        **seconds_of(outcome.progress),
        "compare": time.perf_counter() - federated_at,
        # Of an earlier call only its complete rounds are known.
        "total": time.perf_counter() - began + sum(before.values()),
    }
    summary = _summary(config, directory, bench, outcome, base, federated, arms, seconds)
    write_json(directory.root / "summary.json", summary)
    report.write(directory.root)
    console.print(report.tables(summary))
    console.print(f"report: {escape(str(directory.root / 'report.html'))}")
    return summary


def _federate(config: Config, directory: RunDirectory, bench: Bench, console: Console) -> Outcome:
    from simulations.engine import simulate

    outcome: list[Outcome] = []
    identities = SimulatedIdentities.fresh(config.data.names) if config.secure_aggregation.enabled else None
    roster = identities.roster() if identities else None
    with _bar(console) as bar:
        task = bar.add_task("starting the engine", total=config.federation.rounds)

        def on_heard(heard: Heard) -> None:
            # Whoever answers a later question has trained: only the first is worth a line.
            if heard.phase == "train":
                answered, invited = len(heard.answered), len(heard.answered) + len(heard.waiting)
                bar.update(task, description=f"round {heard.round}: {answered} of {invited} institutions answered")

        def on_round(progress: RunProgress) -> None:
            bar.update(task, completed=progress.round)
            console.print(round_line(progress.history[-1]), highlight=False)

        def on_refusal(name: str, refused: Refused) -> None:
            parts = f" in {', '.join(refused.parts)}" if refused.parts else ""
            console.print(f"[red]{refused.name or name} does not take part: {refused.reason}{parts}[/]")

        def job(members: FlowerMembers) -> None:
            validation = directory.central(config, "validation")
            observer = Observer(on_heard=on_heard, on_round=on_round, on_refusal=on_refusal)
            outcome.append(coordinate(config, directory.root, validation, members, observer, bench, roster))

        simulate(config, directory, job, identities=identities)
    if not outcome:
        raise RunStopped(f"the simulation engine ended before the run did; resume with --resume {directory.root}")
    return outcome[0]


def _run_arms(config: Config, directory: RunDirectory, console: Console) -> dict[str, ArmScores]:
    with _bar(console) as bar:
        task = bar.add_task("comparing: local-only and pooled", total=len(config.data.names) + 1)

        def on_arm(arm: str, scores: ArmScores) -> None:
            if scores.stopped:
                console.print(f"[red]{arm} stopped early: {scores.stopped}[/]")
            bar.update(task, advance=1, description=f"comparing: {arm} done")

        return compare.run_arms(config, directory, on_arm)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def _summary(
    config: Config,
    directory: RunDirectory,
    bench: Bench,
    outcome: Outcome,
    base: ArmScores,
    federated: ArmScores,
    arms: Mapping[str, ArmScores],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Everything that is reported; the shape is described in docs/operating.md."""
    everyone: dict[str, Any] = {"base": base.everyone.as_dict(), "federated": federated.everyone.as_dict()}
    gap = None
    local = {name: arms[name] for name in config.data.names if name in arms}
    if local:
        best = min(local, key=lambda name: local[name].everyone.perplexity)
        everyone["local"] = {name: scores.everyone.as_dict() for name, scores in local.items()}
        everyone["local_best"] = {"institution": best, **everyone["local"][best]}
        everyone["pooled"] = arms[POOLED].everyone.as_dict()
        gap = compare.gap_closed(
            local[best].everyone.perplexity, federated.everyone.perplexity, arms[POOLED].everyone.perplexity
        )
    began = json.loads((directory.root / "started.json").read_text())["started"]
    found = facts(config, outcome, bench, seconds, began)
    if config.privacy.private:
        found["privacy"] |= {"ledgers": spending(config, directory, outcome.progress.round)}
        if arms:
            found["privacy"] |= {"arms": alone(config.privacy, config.train.passes_per_round)[0].mode}
    return {
        **found,
        "everyone": everyone,
        "own": {
            name: {
                "base": base.own[name].as_dict(),
                **({"local": local[name].own[name].as_dict()} if name in local else {}),
                "federated": federated.own[name].as_dict(),
            }
            for name in config.data.names
        },
        "gap_closed": gap,
    }
