"""`silotune-client ledger`: what was spent of the budgets of privacy, what is left, and how long it lasts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client import chain_commands
from client.chain_commands import PublicKey
from client.home import ClientHome
from client.options import Home
from common import cli

if TYPE_CHECKING:
    from rich.console import Console

    from client.ledger import Entry
    from client.ledger_account import Account, Forecast
    from client.policy_file import Population
    from common.privacy.accounting import Epsilon

ledger = typer.Typer(help="What was spent of the budgets of privacy: show it, forecast a run, verify it, export it.")

_FILE = typer.Argument(metavar="[LEDGER]", help="An exported ledger, or a copy of the directory; else the home's own.")


@ledger.command(epilog=cli.EPILOG)
def show(
    points: Annotated[
        int, typer.Option(min=1, max=200, metavar="N", help="Most moments that epsilon is told for, along the way.")
    ] = 8,
    home: Home = None,
    as_json: cli.Json = False,
) -> None:
    """Show what was spent and what is left, by population and by run, and how epsilon grew.

    Two bounds are told, by composition of privacy loss (PRV) and by Renyi divergences (RDP); the smaller one holds.
    They are at the delta of the population's budget; for a data set without one they are at the delta that is shown.
    Ends with exit code 5, and tells no number, when the ledger is not as it was left: then nothing may be spent.
    """
    from client import policy_file
    from client.keys import own_home
    from client.ledger_account import accounts

    where = own_home(home)
    entries = _entries(where)
    with cli.progress_console(as_json) as console:
        found = accounts(entries, policy_file.read(where.policy), points)
        if not as_json:
            for account in found:
                _print_account(account, console)
            if not found:
                cli.say(console, "nothing was spent, and the policy has no populations")
    if as_json:
        cli.print_json({"populations": [_account(account) for account in found]})


@ledger.command(epilog=cli.EPILOG)
def forecast(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A shipped configuration's name, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it, as in federation.rounds=5.")
    ] = None,
    home: Home = None,
    as_json: cli.Json = False,
) -> None:
    """Show how many rounds of a configuration still fit into each budget, and what the whole run would cost.

    A round that has to be repeated counts again in modes institution and distributed. Epsilon is told at the delta of a
    population's budget, and where it has none at the configuration's. Nothing is written. Ends with exit code 5 when
    the ledger is not as it was left: then nothing may be spent.
    """
    from client import policy_file
    from client.keys import own_home
    from client.ledger_account import forecasts
    from common.config_files import load

    where = own_home(home)
    asked = load(config, overrides or [])
    entries = _entries(where)
    with cli.progress_console(as_json) as console:
        found = forecasts(entries, policy_file.read(where.policy), asked)
        rounds = asked.federation.rounds
        if not as_json:
            for one in found:
                cli.say(console, *_forecast_lines(one, asked.privacy.mode, rounds), "")
        if asked.data.name not in {name for one in found for name in one.population.data_sets}:
            cli.say(
                console, f"the policy allows no data set {asked.data.name}, which is what this configuration asks for"
            )
    if as_json:
        cli.print_json(
            {
                "mode": asked.privacy.mode,
                "data_set": asked.data.name,
                "rounds": rounds,
                "populations": [_forecast(one, rounds) for one in found],
            }
        )


@ledger.command(epilog=cli.EPILOG)
def verify(
    file: Annotated[Path | None, _FILE] = None,
    public_key: PublicKey = None,
    home: Home = None,
    as_json: cli.Json = False,
) -> None:
    """Check every entry, the chain and the end of the ledger; name the first entry that is not as it was written.

    Needs no network, and for a copy no home. Ends with exit code 5 when something was altered, removed or added.
    """
    from client.keys import own_home
    from client.ledger import open_copy, own_copy

    place = own_home(home).ledger if file is None else file
    copy = own_copy(place) if file is None else open_copy(place)
    chain_commands.verify(copy, place, public_key, ClientHome.at(home).card, as_json)


@ledger.command(epilog=cli.EPILOG)
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to; a file that is not there yet.")],
    home: Home = None,
    as_json: cli.Json = False,
) -> None:
    """Write the whole ledger into one file, which `ledger verify` checks anywhere. It holds no records and no keys."""
    from client.keys import own_home
    from client.ledger import FORM

    chain_commands.export(FORM, own_home(home).ledger, file, as_json)


@ledger.command(epilog=cli.EPILOG)
def begin(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask: nothing was ever spent here.")] = False,
    home: Home = None,
    passphrase_fd: cli.PassphraseFd = None,
    passphrase_credential: cli.PassphraseCredential = None,
    as_json: cli.Json = False,
) -> None:
    """Begin a ledger in a home that has none. One that was lost is to be restored from a copy instead.

    A ledger that is there is left as it is.
    """
    from client import keys
    from client.ledger import Ledger
    from common.private_files import read_passphrase

    root = ClientHome.at(home)
    where = root.ledger
    own = keys.load(root, read_passphrase(passphrase_fd, passphrase_credential))
    if not yes and not (where / "head.json").exists():
        cli.confirm("A new ledger knows of nothing that was spent before. Was nothing ever spent here?")
    head = Ledger(where, own.identity).begin()
    with cli.progress_console(as_json) as console:
        cli.say(console, f"{head.count} entries in {where}")
    if as_json:
        cli.print_json({"entries": head.count, "directory": str(where)})


def _entries(home: ClientHome) -> list[Entry]:
    """All entries; a line that a crash cut off is none.

    Raises StorageError when there is no ledger, or it is not as it was left: what it says would then be too little.
    """
    from client.chain_audit import intact
    from client.keys import card
    from client.ledger import own_copy, read_entry

    copy = own_copy(home.ledger)
    intact(copy, home.ledger, card(home).identity)
    return [entry for line in copy.lines() if (entry := read_entry(line.raw)) is not None]


# --- As a program reads it --------------------------------------------------------------------------------------------


def _bounds(found: Epsilon) -> dict[str, float | None]:
    return {"epsilon": found.bound, "prv": found.prv, "rdp": found.rdp}


def _population(population: Population, delta: float, else_from: str) -> dict[str, Any]:
    return {
        "population": population.name,
        "data_sets": list(population.data_sets),
        "budget": population.epsilon if population.limited else None,
        "delta": delta,
        "delta_from": "budget" if population.limited else else_from,
    }


def _account(account: Account) -> dict[str, Any]:
    return {
        **_population(account.population, account.population.delta, "default"),
        "units": list(account.units),
        "also_counted": list(account.others),
        "updates": account.updates,
        "spent": _bounds(account.epsilon),
        "left": account.left,
        "runs": [
            {"run": run.name, "rounds": run.rounds, "updates": run.updates, "steps": run.steps, **_bounds(run.epsilon)}
            for run in account.runs
        ],
        "over_rounds": [
            {"update": point.number, "run": point.run, "round": point.round, **_bounds(point.epsilon)}
            for point in account.points
        ],
    }


def _forecast(one: Forecast, rounds: int) -> dict[str, Any]:
    event = one.event
    return {
        **_population(one.population, one.delta, "configuration"),
        "asked": one.asked,
        "allowed": one.allowed,
        "units": list(one.units),
        "round": None
        if event is None
        else {"mechanism": event.mechanism, "sigma": event.sigma, "q": event.q, "steps": event.steps},
        "spent": _bounds(one.spent),
        "after_run": None if one.whole is None else _bounds(one.whole),
        "rounds_left": one.rounds_left,
        "limited_by": one.tightest and one.tightest.name,
        "fits": one.allowed and (one.rounds_left is None or one.rounds_left >= rounds),
    }


# --- As a person reads it ---------------------------------------------------------------------------------------------


def _told(found: Epsilon) -> str:
    return f"{found.bound:.4g}"


def _delta(population: Population, delta: float, otherwise: str) -> str:
    whence = "its budget's" if population.limited else otherwise
    return f"delta {delta:g} ({whence})"


def _both(found: Epsilon) -> tuple[str, str]:
    return "" if found.prv is None else f"{found.prv:.4g}", f"{found.rdp:.4g}"


def _print_account(account: Account, console: Console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from client.ledger import by_unit

    population = account.population
    budget = f"of {population.epsilon:g}, {account.left:.4g} left" if population.limited else "without limit"
    delta = _delta(population, population.delta, "no budget says another")
    cli.say(
        console,
        f"population   {population.name}: {', '.join(population.data_sets)}",
        f"spent        epsilon {_told(account.epsilon)} {budget}, at {delta}, in {account.updates}"
        f" updates{', ' + by_unit(account.units) if account.units else ''}",
        *([f"counts too   what was spent as {', '.join(account.others)}"] if account.others else []),
    )
    if not account.updates:
        cli.say(console, "")
        return
    runs = Table("run", "rounds", "updates", "steps", "PRV", "RDP", title="by run", box=box.SIMPLE)
    for run in account.runs:
        runs.add_row(Text(run.name), str(run.rounds), str(run.updates), str(run.steps), *_both(run.epsilon))
    along = Table("update", "run", "round", "PRV", "RDP", title="epsilon over rounds", box=box.SIMPLE)
    for point in account.points:
        along.add_row(str(point.number), Text(point.run), str(point.round), *_both(point.epsilon))
    console.print(runs, along)


def _forecast_lines(one: Forecast, mode: str, rounds: int) -> list[str]:
    from client.ledger import by_unit

    population = one.population
    lines = [
        f"population   {population.name}: {', '.join(population.data_sets)}"
        + (" (the configuration's)" if one.asked else "")
    ]
    if not one.allowed:
        return [*lines, f"refused      mode {mode}; the policy allows {', '.join(population.modes)}"]
    if one.event is None or one.whole is None:
        return [*lines, "no noise     costs no budget, and protects nobody"]
    event, unit = one.event, by_unit(one.units)
    delta = _delta(population, one.delta, "the configuration's")
    after = f"with {rounds} rounds of this {_told(one.whole)}"
    lines += [
        f"a round      {event.steps} steps at sampling rate {event.q:g} with noise multiplier {event.sigma:.4g}",
        f"spent        epsilon {_told(one.spent)} at {delta}, {after}, {unit}",
    ]
    if one.rounds_left is None or one.tightest is None:
        return [*lines, "left         without limit"]
    verdict = "the whole run fits" if one.rounds_left >= rounds else f"the run asks for {rounds}"
    whose = "a budget" if one.tightest == population else f"the budget of {one.tightest.name}, which counts them too,"
    return [*lines, f"left         {one.rounds_left} rounds of {whose} of {one.tightest.epsilon:g} {unit}; {verdict}"]
