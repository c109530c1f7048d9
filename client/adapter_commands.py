"""`silotune-client adapter`: the adapters that the coordinator published, listed, exported and compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.options import Home
from common import cli
from common.errors import ConfigError, ModelError, SilotuneError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from client.adapters import Kept
    from client.comparison import Comparison
    from client.home import ClientHome

adapter = typer.Typer(help="Published adapters: every command verifies the coordinator's signature first.")

_RUN = typer.Argument(metavar="RUN", help="The run whose adapter it is; `adapter list` names them.")


def register(app: typer.Typer) -> None:
    """Adds the group."""
    app.add_typer(adapter, name="adapter", epilog=cli.EPILOG)


@adapter.command("list", epilog=cli.EPILOG)
def list_adapters(home: Home = None, as_json: cli.Json = False) -> None:
    """List the adapters that are kept here, and verify each. Ends with exit code 4 when one is damaged or forged."""
    from client import adapters
    from client.home import ClientHome

    where = ClientHome.at(home)
    coordinator = _coordinator(where)
    found: dict[str, Kept | SilotuneError] = {}
    for run in adapters.names(where):
        try:
            found[run] = adapters.verified(where, run, coordinator)
        except SilotuneError as error:
            found[run] = error
    bad = [run for run, kept in found.items() if isinstance(kept, SilotuneError)]
    with cli.progress_console(as_json) as console:
        if found:
            console.print(_listed(found))
        else:
            cli.say(console, f"no adapter is kept in {where.adapters} yet; one comes at the end of each run")
        cli.say(console, *(f"{run}: {found[run]}" for run in bad))
    if as_json:
        cli.print_json({"adapters": [_told(run, kept) for run, kept in found.items()]})
    if bad:
        raise ModelError(f"expected adapters as the coordinator published them, found others: {', '.join(bad)}")


@adapter.command(epilog=cli.EPILOG)
def export(
    run: Annotated[str, _RUN],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to; a directory that is new or empty.")],
    base: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="What adapter_config.json shall call the base model; else its name alone."),
    ] = None,
    home: Home = None,
    as_json: cli.Json = False,
) -> None:
    """Verify an adapter and write it as a plain PEFT directory, which `peft.PeftModel.from_pretrained` loads."""
    from client import adapters
    from client.home import ClientHome

    where = ClientHome.at(home)
    kept = adapters.verified(where, run, _coordinator(where))
    written = adapters.export(kept, directory, base)
    with cli.progress_console(as_json) as console:
        cli.say(console, f"verified     run {run}, round {kept.publication.round}", f"written      {written}")
    if as_json:
        cli.print_json({**_told(run, kept), "directory": str(written)})


@adapter.command(epilog=cli.EPILOG)
def evaluate(
    run: Annotated[str, _RUN],
    data_set: Annotated[
        str | None, typer.Option(metavar="NAME", help="Whose test records; else those of the data set of the run.")
    ] = None,
    exact: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND", help="Kind of record whose whole answer is compared; may be given again."),
    ] = None,
    local: Annotated[
        bool, typer.Option("--local/--no-local", help="Whether to train without the others, to compare with.")
    ] = True,
    rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            metavar="RATE",
            help="Of training alone; else the run's, which was chosen for many. With --no-noise else 1e-3.",
        ),
    ] = None,
    noise: Annotated[
        bool,
        typer.Option("--noise/--no-noise", help="Under differential privacy: whether training alone has it too."),
    ] = True,
    home: Home = None,
    as_json: cli.Json = False,
) -> None:
    """Compare an adapter with the base model and with training alone, on this institution's own test records.

    Local-only is trained here with the run's settings, for as many rounds as this institution took part in, and its
    best round by own validation records is taken. It is kept, so that it takes its time once. Nothing leaves, so no
    budget is spent; without noise it is what this institution could have for itself.
    """
    from client import adapters, data_sets, keys
    from client.comparison import LocalTraining, compare
    from client.data_sets import DataSets
    from client.home import ClientHome
    from common.config import EvaluationConfig

    where = ClientHome.at(home)
    kept = adapters.verified(where, run, _coordinator(where))
    file = data_sets.read(where.data)
    kinds = tuple(exact) if exact else tuple(EvaluationConfig().exact)
    if rate is not None and not 0 < rate < math.inf:
        raise ConfigError(f"--learning-rate: expected a number above 0, found {rate:g}")
    with cli.progress_console(as_json) as console:
        found = compare(
            home=where,
            name=keys.card(where).name,
            kept=kept,
            records=DataSets(file, where.data.parent),
            machine=file.machine,
            data_set=data_set,
            exact=kinds,
            local=LocalTraining(rate, noise) if local else None,
            tell=lambda line: cli.say(console, line),
        )
        _show(run, kept, found, console)
    if as_json:
        cli.print_json({**_told(run, kept), "exact": list(kinds), **found.as_dict()})


def _coordinator(home: ClientHome) -> bytes:
    """The key of the coordinator that this institution trusts."""
    from client import trust

    return trust.pinned(home).coordinator


def _told(run: str, kept: Kept | SilotuneError) -> dict[str, object]:
    if isinstance(kept, SilotuneError):
        return {"run": run, "verified": False, "error": str(kept)}
    said = kept.publication
    return {
        "run": run,
        "verified": True,
        "round": said.round,
        "rank": said.lora.rank,
        "parameters": kept.adapter.parameters,
        "base_model": said.fingerprint.digest(),
        "adapter": said.adapter,
    }


def _listed(found: dict[str, Kept | SilotuneError]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title="published adapters", box=box.SIMPLE)
    table.add_column("run", overflow="fold")
    for name in ("round", "rank", "parameters"):
        table.add_column(name, justify="right")
    for name in ("base model", "adapter", ""):
        table.add_column(name)
    for run, kept in found.items():
        if isinstance(kept, SilotuneError):
            table.add_row(Text(run), "", "", "", "", "", Text("REFUSED", "bold red"))
            continue
        said = kept.publication
        numbers = (str(said.round), str(said.lora.rank), str(kept.adapter.parameters))
        table.add_row(Text(run), *numbers, said.fingerprint.digest()[:8], said.adapter[:8], Text("verified", "green"))
    return table


def _show(run: str, kept: Kept, found: Comparison, console: Console) -> None:
    from rich import box
    from rich.table import Table

    names = {"base": "base model", "local": "local-only", "federated": "federated"}
    table = Table(title=f"{found.data_set}: own test records", box=box.SIMPLE)
    table.add_column("")
    for name in ("perplexity", "exact answers"):
        table.add_column(name, justify="right")
    for arm, scores in found.scores.items():
        exact = "–" if scores.accuracy is None else f"{scores.accuracy:.1%} of {scores.answers}"
        table.add_row(names[arm], f"{scores.perplexity:.4g}", exact)
    console.print(table)
    said = [
        f"{found.records} test records of {found.persons} persons; adapter of {run}, round {kept.publication.round}"
    ]
    if found.local is not None:
        once = "trained by an earlier call" if found.local.trained_before else "trained now"
        privacy, rate = found.local.settings.privacy, found.local.settings.train.learning_rate
        noise = f"with the noise of mode {privacy.mode}" if privacy.private else "without noise"
        said.append(
            f"local-only: {once}, {found.local.rounds} rounds {noise}, learning rate {rate:g}, the best of them"
            f" {found.local.best_round} (0 is the base model)"
        )
    cli.say(console, *said)
