"""The command `silotune-client`: one institution's.

Heavy modules are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client import adapter_commands, check_command, daemon_commands
from client.ledger_commands import ledger
from client.log_commands import log
from client.options import Home
from common import cli
from common.config import ColumnsConfig, FileConfig

if TYPE_CHECKING:
    from rich.console import Console

    from common.enrolment import Card
    from common.records import Record

app = cli.application("Take part in a federation as one institution: see what training would read from its records.")


@app.command(epilog=cli.EPILOG)
def init(
    name: Annotated[str, typer.Option(metavar="NAME", help="The institution's name: a-z, 0-9, - and _.")],
    base_model: Annotated[
        str,
        typer.Option(metavar="DIR", help="The base model that may be trained on, a directory or `embedded`."),
    ] = "",
    data_set: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Records that may be trained on, and what the federation calls them."),
    ] = None,
    home: Home = None,
    passphrase_fd: cli.PassphraseFd = None,
    passphrase_credential: cli.PassphraseCredential = None,
    as_json: cli.Json = False,
) -> None:
    """Make this institution's keys, commented policy.yaml and data.yaml, and the card that the coordinator enrols.

    Sends nothing. Without --base-model and --data-set nothing is allowed until somebody edits the two files.
    """
    from client import keys
    from client.home import ClientHome
    from common.private_files import read_passphrase

    where = ClientHome.at(home)
    secret = read_passphrase(passphrase_fd, passphrase_credential)
    made = keys.init(where, name, secret, base_model, _data_sets(data_set or []))
    lines = [
        f"data         {where.data}: which files stand behind the names of data sets, and which machine trains",
        f"policy       {where.policy}: read it, and say there what this institution agrees to",
        "Hand the card to the coordinator, and tell it the fingerprint over another channel.",
    ]
    _show_card(made, where.card, lines, as_json)


@app.command(epilog=cli.EPILOG)
def card(home: Home = None, as_json: cli.Json = False) -> None:
    """Show this institution's card and its fingerprint."""
    from client import keys
    from client.home import ClientHome

    where = ClientHome.at(home)
    _show_card(keys.card(where), where.card, [], as_json)


@app.command(epilog=cli.EPILOG)
def trust(
    roster: Annotated[Path, typer.Argument(metavar="ROSTER", help="The roster.json that the coordinator handed out.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask: the fingerprints have been compared.")] = False,
    fingerprint: Annotated[
        str | None,
        typer.Option(metavar="HEX", help="Do not ask: trust the roster if this is its fingerprint, from elsewhere."),
    ] = None,
    home: Home = None,
    passphrase_fd: cli.PassphraseFd = None,
    passphrase_credential: cli.PassphraseCredential = None,
    as_json: cli.Json = False,
) -> None:
    """Show every fingerprint of a roster and what it changes, and trust that roster and no other from now on."""
    from datetime import UTC, datetime

    from client import keys, trust
    from client.home import ClientHome
    from common.enrolment import check_fingerprint, read_roster
    from common.private_files import read_passphrase

    where = ClientHome.at(home)
    own = keys.load(where, read_passphrase(passphrase_fd, passphrase_credential))
    offered = read_roster(roster)
    changed = trust.examine(where, offered, keys.card(where))
    with cli.progress_console(as_json) as console:
        cli.say(console, *trust.told(offered, own.identity.name), *[f"change       {line}" for line in changed])
        if fingerprint is not None:
            check_fingerprint(offered, fingerprint)
        elif changed and not yes:
            cli.confirm("Do they agree with what coordinator and members told you over another channel?")
        pinned = trust.pin(where, offered, own, datetime.now(UTC))
        cli.say(console, f"trusted      since {pinned.since}" + ("" if changed else ", nothing changed"))
    if as_json:
        cli.print_json(
            {**trust.fingerprints(offered), "changes": list(changed), "since": pinned.since, "file": str(where.roster)}
        )


app.add_typer(log, name="log", epilog=cli.EPILOG)
app.add_typer(ledger, name="ledger", epilog=cli.EPILOG)
daemon_commands.register(app)
check_command.register(app)
adapter_commands.register(app)


@app.command(epilog=cli.EPILOG)
def data(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files of records: jsonl, csv or parquet.")],
    person: Annotated[
        str,
        typer.Option(metavar="COLUMN", help="The column that says whose record it is; `-`: there is none."),
    ] = FileConfig.person,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COLUMN", help="What the files call a column, as in prompt=question."),
    ] = None,
    as_json: cli.Json = False,
) -> None:
    """Read record files as training would, and show how many records, people and kinds they hold. Nothing is sent.

    --person and --column say what `person` and `columns` of data.yaml say, with the same defaults.
    """
    from common.formats import read_records
    from common.sources import read_table

    form = FileConfig(person=person, columns=_columns(column or []))
    records = {str(file): read_records(read_table(file), form) for file in files}
    summaries = {name: _summary(found) for name, found in records.items()}
    seen = Counter(person for found in records.values() for person in {record.person for record in found})
    shared = sum(1 for times in seen.values() if times > 1)
    with cli.progress_console(as_json) as console:
        _print_summaries(summaries, console)
        if len(records) > 1:
            console.print(f"people with records in more than one of these files: {shared}", highlight=False)
    if as_json:
        cli.print_json({"files": summaries, "people_in_several_files": shared})


@app.command(epilog=cli.EPILOG)
def fingerprint(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A base model's directory, or `embedded`.")],
    as_json: cli.Json = False,
) -> None:
    """Print what a base model is: the digest that `base_models` of policy.yaml lists, and its three parts."""
    from common.base_model import fingerprint as fingerprint_of

    found = fingerprint_of(model)
    with cli.progress_console(as_json) as console:
        for name, value in {"digest": found.digest(), **found.as_dict()}.items():
            console.print(f"{name:<10}{value}", highlight=False, soft_wrap=True)
    if as_json:
        cli.print_json({"digest": found.digest(), **found.as_dict()})


def main() -> None:
    """Entry point of the command."""
    app()


def _show_card(made: Card, file: Path, more: list[str], as_json: bool) -> None:
    from common.enrolment import grouped

    with cli.progress_console(as_json) as console:
        cli.say(
            console, f"institution  {made.name}", f"fingerprint  {grouped(made.fingerprint)}", f"card         {file}"
        )
        cli.say(console, *more)
    if as_json:
        cli.print_json({"name": made.name, "fingerprint": grouped(made.fingerprint), "card": str(file)})


def _data_sets(said: list[str]) -> dict[str, Path]:
    """Files by name. Raises ConfigError for what is not NAME=FILE, and for a name given twice."""
    from common.errors import ConfigError

    found = {name: Path(file) for name, sign, file in (entry.partition("=") for entry in said) if sign and file}
    if len(found) != len(said):
        raise ConfigError(f"--data-set: expected NAME=FILE, each name once, found {' '.join(said)!r:.200}")
    return found


def _columns(said: list[str]) -> ColumnsConfig:
    """What columns are called. Raises ConfigError for what is not NAME=COLUMN, and a name unknown or given twice."""
    from common.errors import ConfigError

    known = [field.name for field in fields(ColumnsConfig)]
    found = {name: column for name, sign, column in (entry.partition("=") for entry in said) if sign and column.strip()}
    if len(found) != len(said) or not set(found) <= set(known):
        raise ConfigError(
            f"--column: expected NAME=COLUMN, each name once and of {', '.join(known)}; found {' '.join(said)!r:.200}"
        )
    return ColumnsConfig(**found)


def _summary(records: Sequence[Record]) -> dict[str, Any]:
    """Counts only: the output may be shown to others."""
    return {
        "records": len(records),
        "people": len({record.person for record in records}),
        "kinds": dict(sorted(Counter(record.kind for record in records).items())),
        "characters": sum(len(text) for record in records for text in record.texts),
    }


def _print_summaries(summaries: dict[str, dict[str, Any]], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="records")
    table.add_column("file", overflow="fold")
    for column in ("records", "people", "characters"):
        table.add_column(column, justify="right")
    table.add_column("kinds", overflow="fold")
    for name, found in summaries.items():
        numbers = [str(found[column]) for column in ("records", "people", "characters")]
        kinds = ", ".join(f"{kind} {count}" for kind, count in found["kinds"].items())
        table.add_row(Text(name), *numbers, Text(kinds))  # Text, since names and kinds may hold rich's markup
    console.print(table)
