"""The command `silotune-client`: one institution's.

Heavy modules are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common import cli

if TYPE_CHECKING:
    from rich.console import Console

    from common.records import Record

app = cli.application("Take part in a federation as one institution: see what training would read from its records.")


@app.command(epilog=cli.EPILOG)
def data(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="jsonl files, one record a line.")],
    as_json: cli.Json = False,
) -> None:
    """Read record files as training would, and show how many records, people and kinds they hold. Nothing is sent."""
    from common.records import read_jsonl

    records = {str(file): read_jsonl(file) for file in files}
    summaries = {name: _summary(found) for name, found in records.items()}
    seen = Counter(person for found in records.values() for person in {record.person for record in found})
    shared = sum(1 for times in seen.values() if times > 1)
    with cli.progress_console(as_json) as console:
        _print_summaries(summaries, console)
        if len(records) > 1:
            console.print(f"people with records in more than one of these files: {shared}", highlight=False)
    if as_json:
        cli.print_json({"files": summaries, "people_in_several_files": shared})


def main() -> None:
    """Entry point of the command."""
    app()


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
