"""`silotune-client log`: the egress log, shown, verified and exported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client import chain_commands
from client.chain_commands import PublicKey
from client.home import ClientHome
from client.options import Home
from common import cli

if TYPE_CHECKING:
    from collections import deque

    from rich.console import Console

    from client.egress import Copy, Entry

log = typer.Typer(help="What left this institution, message by message: show it, verify it, export it.")

_NOTHING = "nothing has left yet"

_FILE = typer.Argument(metavar="[LOG]", help="An exported log, or a copy of the directory; else the one in the home.")


@log.command(epilog=cli.EPILOG)
def show(
    file: Annotated[Path | None, _FILE] = None,
    run: Annotated[str | None, typer.Option(metavar="RUN", help="Only messages of this run.")] = None,
    last: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the last N of them.")] = None,
    home: Home = None,
    as_json: cli.Json = False,
) -> None:
    """Show what left: when, for which run, round and phase, how many bytes, their digest. It does not verify them."""
    from collections import deque

    from client.egress import read_entry

    unreadable = 0
    entries: deque[Entry] = deque(maxlen=last)
    copy, _ = _opened(file, home)
    for line in () if copy is None else copy.lines():
        entry = read_entry(line.raw)
        if entry is None:
            unreadable += 1
        elif run is None or entry.run == run:
            entries.append(entry)
    with cli.progress_console(as_json) as console:
        if copy is None:
            cli.say(console, _NOTHING)
        elif not as_json:
            _print_entries(entries, console)
        if unreadable:
            console.print(f"{unreadable} lines are no entries; see `silotune-client log verify`", highlight=False)
    if as_json:
        cli.print_json({"entries": [entry.as_dict() for entry in entries], "unreadable": unreadable})


@log.command(epilog=cli.EPILOG)
def verify(
    file: Annotated[Path | None, _FILE] = None,
    public_key: PublicKey = None,
    home: Home = None,
    as_json: cli.Json = False,
) -> None:
    """Check every entry, the chain and the end of the log; name the first entry that is not as it was written.

    Needs no network, and for a copy no home. Ends with exit code 5 when something was altered, removed or added, and
    when the whole log is gone although this institution has answered before.
    """
    copy, place = _opened(file, home)
    if copy is not None:
        chain_commands.verify(copy, place, public_key, ClientHome.at(home).card, as_json)
        return
    with cli.progress_console(as_json) as console:
        cli.say(console, _NOTHING)
    if as_json:
        none = dict.fromkeys(("last", "public_key", "key_from", "finding"))
        cli.print_json({"whole": True, "entries": 0, "ahead": False, "cut_off_bytes": 0, **none})


@log.command(epilog=cli.EPILOG)
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to; a file that is not there yet.")],
    home: Home = None,
    as_json: cli.Json = False,
) -> None:
    """Write the whole log into one file, which `log verify` checks anywhere. It holds no records and no keys.

    Ends with exit code 5, and writes nothing, before the first `up`: there is no log yet.
    """
    from client.egress import FORM

    _, place = _opened(None, home)
    chain_commands.export(FORM, place, file, as_json)


def _opened(file: Path | None, home: Path | None) -> tuple[Copy | None, Path]:
    """The log that is meant, and where it lies; None for the home's own where nothing has left yet.

    Raises StorageError for a copy that is not there, and for an own log that is gone.
    """
    from client.egress import lost, open_copy, own_copy
    from client.keys import own_home
    from common.errors import StorageError

    if file is not None:
        return open_copy(file), file
    own = own_home(home)
    copy = own_copy(own.egress)
    if copy is None and (told := lost(own, copy)):
        raise StorageError(told)
    return copy, own.egress


def _print_entries(entries: deque[Entry], console: Console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    cells = {
        "no.": [str(entry.number) for entry in entries],
        "time (UTC)": [entry.time[:19].replace("T", " ") for entry in entries],
        "kind": [entry.kind for entry in entries],
        "run": [entry.run for entry in entries],
        "round": [str(entry.round or "") for entry in entries],
        "attempt": [str(entry.attempt or "") for entry in entries],
        "bytes": [str(entry.size) for entry in entries],
        "epsilon": [f"{entry.epsilon:g}" if entry.epsilon else "" for entry in entries],
        "sha256": [entry.sha256[:8] for entry in entries],
    }
    shown = {name: column for name, column in cells.items() if any(column)}
    table = Table(title="what left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    if "epsilon" in shown:
        # An entry has no unit: the ledger's entry of the same round and attempt has it.
        table.caption = "epsilon: of the unit that `silotune-client ledger show` names"
    for name in shown:
        number = name in ("no.", "round", "attempt", "bytes", "epsilon")
        table.add_column(
            name, justify="right" if number else "left", overflow="fold", no_wrap=name not in ("run", "kind")
        )
    for row in zip(*shown.values(), strict=True):
        table.add_row(*map(Text, row))
    console.print(table)
