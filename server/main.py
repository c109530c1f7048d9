"""The command `silotune-server`: the coordinator's.

Heavy modules are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common import cli

if TYPE_CHECKING:
    from common.errors import SilotuneError

app = cli.application("Coordinate a federation: what a run found, as a page for those who took part.")


@app.command(epilog=cli.EPILOG)
def report(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A finished run: summary.json, metrics.jsonl and config.yaml.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the page goes; DIR/report.html when left out.")
    ] = None,
    as_json: cli.Json = False,
) -> None:
    """Write the report of a finished run again, and print its tables."""
    from common.files import write_text
    from server.report import render, tables

    summary = _json_object(_text(directory / "summary.json"), str(directory / "summary.json"))
    rounds = [
        _json_object(line, f"{directory / 'metrics.jsonl'}:{number}")
        for number, line in enumerate(_text(directory / "metrics.jsonl").splitlines(), 1)
    ]
    page = out or directory / "report.html"
    write_text(page, render(summary, rounds, _text(directory / "config.yaml")))
    with cli.progress_console(as_json) as console:
        console.print(tables(summary))
        console.print(f"written to {page}", markup=False, highlight=False)
    if as_json:
        cli.print_json({"report": str(page), "summary": summary})


def main() -> None:
    """Entry point of the command."""
    app()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(str(path), f"{error}; give the directory of a run that has ended") from error


def _json_object(text: str, where: str) -> dict[str, Any]:
    import json

    try:
        found = json.loads(text)
    except ValueError as error:
        raise _unreadable(where, f"not JSON ({error})") from error
    if not isinstance(found, dict):
        raise _unreadable(where, f"expected a JSON object, found {type(found).__name__}")
    return found


def _unreadable(where: str, why: str) -> SilotuneError:
    from common.errors import StorageError

    return StorageError(f"{where}: {why}")
