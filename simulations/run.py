"""The main job: a whole federation on one machine, compared with its alternatives, and told honestly."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from common import config_files
from common.base_model import fingerprint
from common.config import POOLED, Config
from common.errors import ConfigError, RunStopped
from common.files import storage_errors, write_json, write_text
from common.fixed_point import Layout
from common.messages import Refused
from server import checkpoints, report, tracking
from server.coordinator import Bench, Observer, Outcome, coordinate
from server.flower import FlowerMembers
from server.rounds import Progress as RunProgress
from server.rounds import RoundRecord, record_as_json, stopped_early
from simulations import compare, prepare
from simulations.compare import ArmScores
from simulations.identities import SimulatedIdentities
from simulations.layout import RunDirectory
from simulations.terms import launch_line, terms_of

PHASES = ("train", "secure_aggregation", "aggregate", "evaluate")
"""Of a round, in order."""

LIBRARIES = ("silotune", "flwr", "torch", "transformers", "peft")


def run(config: Config, out: Path, console: Console) -> dict[str, Any]:
    """Runs a federation in the new directory `out` and returns what stands in its summary.json.

    Raises ConfigError when `out` holds a run already, DataError when records cannot be read, and what `resume` raises.
    """
    directory = RunDirectory.at(out)
    if (directory.root / "config.yaml").exists():
        raise ConfigError(
            f"{out} holds a run already; go on with it by `silotune-sim run --resume {out}`, or choose another --out"
        )
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
    before = _seconds(checkpoints.latest(directory.root / "checkpoints", config_files.digest(config)))
    console.print(
        f"[bold]{config.name}[/]: {len(config.data.names)} institutions, {config.federation.rounds} rounds of "
        f"{config.federation.method}, base model {escape(config.model.path)}; results in {escape(str(directory.root))}"
    )
    console.print(launch_line(config))
    tracking.require(config.tracking)
    bench = Bench.of(config)
    outcome = _federate(config, directory, bench, console)
    federated_at = time.perf_counter()
    base = compare.score(config, directory, bench, None, config.data.names)
    federated = compare.score(config, directory, bench, directory.root / "adapter", config.data.names)
    arms = _run_arms(config, directory, console) if config.compare.enabled else {}
    seconds = {
        **_seconds(outcome.progress),
        "compare": time.perf_counter() - federated_at,
        # Of an earlier call only its complete rounds are known.
        "total": time.perf_counter() - began + sum(before.values()),
    }
    summary = _summary(config, directory, bench, outcome, base, federated, arms, seconds)
    write_json(directory.root / "summary.json", summary)
    rounds = [record_as_json(record) for record in outcome.progress.history]
    write_text(directory.root / "report.html", report.render(summary, rounds, config_files.to_yaml(config)))
    console.print(report.tables(summary))
    console.print(f"report: {escape(str(directory.root / 'report.html'))}")
    return summary


def _seconds(progress: RunProgress | None) -> dict[str, float]:
    """Seconds of all complete rounds by phase; a phase that a round did not have took none of it."""
    history = progress.history if progress else ()
    return {phase: sum(record.seconds.get(phase, 0.0) for record in history) for phase in PHASES}


def _share(config: Config, progress: RunProgress) -> float | None:
    """Share of the rounds' seconds that secure aggregation took; None where it is off."""
    seconds = _seconds(progress)
    spent = sum(seconds.values())
    return seconds["secure_aggregation"] / spent if config.secure_aggregation.enabled and spent else None


def _privacy(config: Config, absent: Collection[str]) -> dict[str, Any]:
    """What protected the updates of all institutions but the absent ones, and what did not."""
    found = {"secure_aggregation": config.secure_aggregation.enabled, "mode": "none"}
    terms = terms_of(config, absent)
    if terms is None:
        return found
    layout = Layout(parameters=0, members=terms.members, **asdict(config.quantise))
    return {**found, "terms": {**terms.as_dict(), "ring_bits": layout.ring_bits}}


def _federate(config: Config, directory: RunDirectory, bench: Bench, console: Console) -> Outcome:
    from simulations.engine import simulate

    outcome: list[Outcome] = []
    identities = SimulatedIdentities.fresh(config.data.names) if config.secure_aggregation.enabled else None
    roster = identities.roster() if identities else None
    with _bar(console) as bar:
        task = bar.add_task("starting the engine", total=config.federation.rounds)

        def on_reply(number: int, answered: int, invited: int) -> None:
            bar.update(task, description=f"round {number}: {answered} of {invited} institutions answered")

        def on_round(progress: RunProgress) -> None:
            bar.update(task, completed=progress.round)
            console.print(_line(progress.history[-1]))

        def on_refusal(name: str, refused: Refused) -> None:
            parts = f" in {', '.join(refused.parts)}" if refused.parts else ""
            console.print(f"[red]{refused.name or name} does not take part: {refused.reason}{parts}[/]")

        def job(members: FlowerMembers) -> None:
            validation = directory.central(config, "validation")
            observer = Observer(on_reply=on_reply, on_round=on_round, on_refusal=on_refusal)
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


def _line(record: RoundRecord) -> str:
    parts = [f"round {record.round}"]
    if record.train_loss is not None:
        parts.append(f"train loss {record.train_loss:.3f}")
    if record.validation is not None:
        perplexity, accuracy = record.validation["perplexity"], record.validation["accuracy"]
        parts.append("perplexity " + ("not finite" if perplexity is None else f"{perplexity:.2f}"))
        parts += [] if accuracy is None else [f"exact answers {accuracy:.0%}"]
    if record.void:
        parts.append(f"[red]{record.void} void[/]")
    parts += [f"[red]{name}: {reason}[/]" for name, reason in record.refused.items()]
    return ", ".join(parts) + (" [green]best so far[/]" if record.best else "")


def _absences(history: Sequence[RoundRecord]) -> dict[str, dict[str, int]]:
    """How many rounds each member missed, by name and reason code."""
    missed: dict[str, dict[str, int]] = {}
    for record in history:
        for name, reason in record.refused.items():
            reasons = missed.setdefault(name, {})
            reasons[reason] = reasons.get(reason, 0) + 1
    return missed


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
    progress, history = outcome.progress, outcome.progress.history
    everyone: dict[str, Any] = {"base": base.everyone.as_dict(), "federated": federated.everyone.as_dict()}
    gap = None
    share = _share(config, progress)
    local = {name: arms[name] for name in config.data.names if name in arms}
    if local:
        best = min(local, key=lambda name: local[name].everyone.perplexity)
        everyone["local"] = {name: scores.everyone.as_dict() for name, scores in local.items()}
        everyone["local_best"] = {"institution": best, **everyone["local"][best]}
        everyone["pooled"] = arms[POOLED].everyone.as_dict()
        gap = compare.gap_closed(
            local[best].everyone.perplexity, federated.everyone.perplexity, arms[POOLED].everyone.perplexity
        )
    return {
        "name": config.name,
        "method": config.federation.method,
        "seed": config.seed,
        "rounds_run": progress.round,
        "rounds_planned": config.federation.rounds,
        "best_round": progress.best_round,
        "stopped_early": stopped_early(config, progress),
        "institutions": list(config.data.names),
        "refused": dict(outcome.refused),
        "absences": _absences(history),
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
        "bytes_per_client_round": {"up": history[-1].bytes_up, "down": history[-1].bytes_down},
        "parameters": {"base": bench.model.base_parameters, "adapter": progress.adapter.parameters},
        "void_updates": sum(record.void for record in history),
        "seconds": {phase: round(value, 2) for phase, value in seconds.items()},
        "secure_aggregation_share": None if share is None else round(share, 4),
        "privacy": _privacy(config, outcome.refused),
        "base_model": {"name": config.model.path, **fingerprint(config.model.path).as_dict()},
        "versions": {library: version(library) for library in LIBRARIES},
        "started": json.loads((directory.root / "started.json").read_text())["started"],
    }
