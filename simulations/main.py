"""The command `silotune-sim`: a whole federation on one machine.

Heavy modules are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from common import cli
from simulations.arguments import CONFIG_HELP, ConfigName, Overrides, load, new_directory, resumable
from simulations.attacks.commands import attack

if TYPE_CHECKING:
    from rich.console import Console

    from simulations.generate.federation import HeldOut, Splits

app = cli.application("Play a whole federation on one machine: does it pay off, for whom, and at which cost?")

bench = typer.Typer(no_args_is_help=True, help="Measure what a round costs on this machine.")
app.add_typer(bench, name="bench", epilog=cli.EPILOG)

app.add_typer(attack, name="attack", epilog=cli.EPILOG)


@app.command(epilog=cli.EPILOG)
def run(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help=f"{CONFIG_HELP} Left out with --resume.")
    ] = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where results go; runs/NAME-TIME when left out.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Go on with the run in DIR, as it was configured.")
    ] = None,
    as_json: cli.Json = False,
) -> None:
    """Fine-tune one model across all institutions, and compare with training alone and with pooled records."""
    if resume is not None and (config is not None or out is not None):
        raise click.UsageError("--resume DIR stands alone: the run keeps its directory and its configuration")
    if resume is None and config is None:
        raise click.UsageError("name a configuration, such as hospitals; or a run to go on with, --resume DIR")
    loaded = None if config is None else load(config, overrides)
    directory = resume or out or new_directory("unnamed" if loaded is None else loaded.name)
    with cli.progress_console(as_json) as console, resumable(directory, "run", "--resume", str(directory)):
        from simulations import run as runs

        summary = runs.resume(directory, console) if loaded is None else runs.run(loaded, directory, console)
    if as_json:
        cli.print_json(summary)


@app.command(epilog=cli.EPILOG)
def federation(
    config: Annotated[str, typer.Argument(metavar="[CONFIG]", help=CONFIG_HELP)] = "hospitals",
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A new directory for homes, logs and results; removed when left out."),
    ] = None,
    local: Annotated[
        bool, typer.Option("--local/--no-local", help="Whether each institution also trains by itself, to compare.")
    ] = True,
    as_json: cli.Json = False,
) -> None:
    """Play the deployment on this machine: real processes, keys, TLS and logs, from `init` to the published adapter."""
    import tempfile

    loaded = load(config, overrides)
    with contextlib.ExitStack() as stack, cli.progress_console(as_json) as console:
        from simulations import loopback

        root = out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="silotune-")))
        found = loopback.federate(loaded, root, lambda line: cli.say(console, f"$ {line}"), local)
        console.print(loopback.table(found))
        cli.say(console, f"homes, logs and results: {root}" if out else "every process ended, every file removed")
    if as_json:
        cli.print_json(found.as_dict())


@app.command(epilog=cli.EPILOG)
def check(config: ConfigName, overrides: Overrides = None, as_json: cli.Json = False) -> None:
    """Read all records as a run would, and tell what to mind. Trains nothing, writes nothing.

    One training record of each institution is shown as the model will see it: keep the output to yourself. With --json
    no record is shown, and the object holds counts only.
    """
    loaded = load(config, overrides)
    with cli.progress_console(as_json) as console:
        from simulations.check import check as look

        found = look(loaded, console, samples=not as_json)
    if as_json:
        cli.print_json(found)


@app.command(epilog=cli.EPILOG)
def tune(
    config: ConfigName,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where results go; runs/NAME-tune-TIME when left out.")
    ] = None,
    as_json: cli.Json = False,
) -> None:
    """Search batch size and learning rate of every arm, on validation records only."""
    loaded = load(config, overrides)
    directory = out or new_directory(f"{loaded.name}-tune")
    again = ("tune", config, *(overrides or ()), "--out", str(directory))
    with cli.progress_console(as_json) as console, resumable(directory, *again):
        from simulations.tune import tune as search

        found = search(loaded, directory, console)
    if as_json:
        cli.print_json(found)


@app.command(epilog=cli.EPILOG)
def data(
    config: ConfigName,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the records go, one folder an institution.")],
    overrides: Overrides = None,
    as_json: cli.Json = False,
) -> None:
    """Write the records of every institution and of the coordinator, generated or split from files, as jsonl files."""
    from common.config import COORDINATOR
    from common.errors import ConfigError

    loaded = load(config, overrides)
    if loaded.data.directory:
        raise ConfigError(
            f"data.directory: found {loaded.data.directory!r}, so there is nothing to generate or to split;"
            " allowed: empty, as in `data.directory=`"
        )
    from simulations import prepare

    with cli.progress_console(as_json) as console:
        federation = prepare.gather(loaded.data)
        prepare.write(federation, out)
        counts = {name: _counts(splits) for name, splits in federation.institutions.items()}
        coordinator = _counts(federation.coordinator)
        _print_counts({**counts, COORDINATOR: coordinator}, console)
        console.print(f"written to {out}", markup=False, highlight=False)
    if as_json:
        cli.print_json({"out": str(out), "institutions": counts, "coordinator": coordinator})


@app.command(epilog=cli.EPILOG)
def pretrain(
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the model goes; runs/pretrain-TIME when left out.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of text, tokenizer and weights.")] = 1,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps; as many as the shipped model had when left out.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; the result depends on their number.")] = 2,
    as_json: cli.Json = False,
) -> None:
    """Train the small base model that ships with Silotune again, from generated general text."""
    directory = out or new_directory("pretrain")
    with cli.progress_console(as_json) as console:
        result = _pretrain(directory, seed, steps, threads, console)
    if as_json:
        cli.print_json({"out": str(directory), **result})


@bench.command(epilog=cli.EPILOG)
def scale(
    clients: Annotated[str, typer.Option(metavar="N,N,...", help="Sizes to measure.")] = "10,100,1000",
    rounds: Annotated[int, typer.Option(min=2, help="Of each size; the first is not timed.")] = 3,
    actors: Annotated[int, typer.Option(min=1, help="Processes that play the clients.")] = 2,
    as_json: cli.Json = False,
) -> None:
    """Seconds a round and memory of coordinator and actors, by number of virtual clients.

    Each size is a process of its own on the real engine. About 2 MB of temporary files a client.
    """
    with cli.progress_console(as_json) as console:
        from simulations.benchmarks import scale as benchmark

        found = benchmark.scale(benchmark.sizes(clients), rounds, actors, console)
    if as_json:
        cli.print_json(found)


@bench.command(epilog=cli.EPILOG)
def trainer(
    shape: Annotated[
        str, typer.Option(metavar="NAME,NAME,...", help="m-qv, s-all, m-qv-32k, m-qv-bf16, tiny; or all.")
    ] = "m-qv",
    records: Annotated[int, typer.Option(min=16, help="Of each pass; whole batches of 16.")] = 192,
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes of each arm, after one that warms up.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each arm.")] = 2,
    as_json: cli.Json = False,
) -> None:
    """Local training beside Hugging Face's Trainer and TRL's SFTTrainer: speed, memory and loss curve.

    The arms take turns on the same records, each in a process of its own.
    """
    with cli.progress_console(as_json) as console:
        from simulations.benchmarks import trainer as benchmark

        found = benchmark.bench(benchmark.shapes(shape), records, repeats, threads, console)
    if as_json:
        cli.print_json(found)


@bench.command(epilog=cli.EPILOG)
def secagg(
    cases: Annotated[
        str, typer.Option(metavar="PxN,PxN,...", help="Parameters x members, such as 250kx4.")
    ] = "1Mx8,1Mx16,8Mx8,8Mx16,1Mx64,1Mx256",
    repeats: Annotated[int, typer.Option(min=1, help="Times that each arm is timed; medians count.")] = 3,
    as_json: cli.Json = False,
) -> None:
    """Secure aggregation beside the primitives of Flower's SecAgg+: speed, upload and memory, one member silent.

    Everything runs in this process, on one thread. All cases take about five minutes and 1.5 GB of memory.
    """
    with cli.progress_console(as_json) as console:
        from simulations.benchmarks import secagg as benchmark

        found = benchmark.bench(benchmark.cases(cases), repeats, console)
    if as_json:
        cli.print_json(found)


@bench.command(epilog=cli.EPILOG)
def privacy(
    overrides: Overrides = None,
    full: Annotated[
        bool, typer.Option("--full", help="Every mode, method, epsilon and seed: about 18 hours on two cores.")
    ] = False,
    patients: Annotated[
        str, typer.Option(metavar="N,N,...", help="Of each hospital; without --full the first one.")
    ] = "1000,80",
    seeds: Annotated[
        str, typer.Option(metavar="N,N,...", help="Of records and training; without --full the first one.")
    ] = "1,2,3",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where points are kept, and gone on with; runs/bench-privacy-TIME if left out."
        ),
    ] = None,
    as_json: cli.Json = False,
) -> None:
    """What privacy costs: accuracy against epsilon, and a private step beside one without and beside Opacus's hooks.

    Without --full: mode patient at epsilon 8, four hospitals of 1000 patients, together and alone.
    """
    directory = out or new_directory("bench-privacy")
    said = (*(["--full"] if full else []), "--patients", patients, "--seeds", seeds, "--out", str(directory))
    with cli.progress_console(as_json) as console, resumable(directory, "bench", "privacy", *(overrides or ()), *said):
        from simulations.benchmarks import privacy as benchmark
        from simulations.benchmarks import privacy_grid

        given = [privacy_grid.numbers(text, name) for text, name in ((patients, "--patients"), (seeds, "--seeds"))]
        points = privacy_grid.grid(*given) if full else privacy_grid.headline(*(one[0] for one in given))
        found = benchmark.bench(points, directory.expanduser().resolve(), console, overrides or ())
    if as_json:
        cli.print_json(found)


def main() -> None:
    """Entry point of the command."""
    app()


def _counts(splits: Splits | HeldOut) -> dict[str, int]:
    """Records of each set, and the people they are about."""
    sets = {name: getattr(splits, name) for name in ("train", "validation", "test") if hasattr(splits, name)}
    people = {record.person for records in sets.values() for record in records}
    return {**{name: len(records) for name, records in sets.items()}, "people": len(people)}


def _print_counts(counts: Mapping[str, Mapping[str, int]], console: Console) -> None:
    from rich.table import Table

    columns = ("train", "validation", "test", "people")
    table = Table(title="records")
    table.add_column("of")
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in counts.items():
        table.add_row(name, *(str(row.get(column, "–")) for column in columns))
    console.print(table)


def _pretrain(directory: Path, seed: int, steps: int | None, threads: int, console: Console) -> dict[str, Any]:
    from dataclasses import asdict

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from simulations.pretrain import pretrain as train

    loss_column = TextColumn("loss {task.fields[loss]:.3f}")
    bar = Progress(
        TextColumn("pre-training"),
        BarColumn(),
        MofNCompleteColumn(),
        loss_column,
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task("pre-training", total=steps, loss=math.nan)
        result = train(
            directory,
            seed,
            steps,
            threads,
            lambda step, total, loss: bar.update(task, completed=step, total=total, loss=loss),
        )
    console.print(
        f"perplexity {result.perplexity:.2f} on held-out general text, {result.seconds:.0f} s; written to {directory}",
        markup=False,
        highlight=False,
    )
    return asdict(result)
