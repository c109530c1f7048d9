"""`silotune-client check`: whether everything that a run needs is there and works."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from client.options import Home
from common import cli

if TYPE_CHECKING:
    from rich.text import Text

    from client.findings import Line

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "skipped": "dim"}


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog=cli.EPILOG)(check)


def check(
    offline: Annotated[bool, typer.Option("--offline", help="Leave the coordinator out; nothing is sent.")] = False,
    data_set: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only this data set; else all that the policy allows.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=4, metavar="N", help="Longest record in tokens, as the run will say in train.max_tokens."),
    ] = None,
    home: Home = None,
    passphrase_fd: cli.PassphraseFd = None,
    passphrase_credential: cli.PassphraseCredential = None,
    as_json: cli.Json = False,
) -> None:
    """Try everything that a run needs: keys, policy, roster, records, base model, disk, one training step, the network.

    Nothing is sent but one signed call that changes nothing. The exit code is that of the first failure.
    """
    from client.check import Question
    from client.check import check as checked
    from client.findings import FAIL, WARN
    from client.home import ClientHome
    from common.config import TrainConfig
    from common.private_files import read_passphrase

    asked = Question(
        home=ClientHome.at(home),
        passphrase=read_passphrase(passphrase_fd, passphrase_credential),
        data_set=data_set,
        network=not offline,
        max_tokens=max_tokens or TrainConfig().max_tokens,
    )
    with cli.progress_console(as_json) as console:
        lines = checked(asked, lambda line: console.print(_row(line), soft_wrap=True))
        failed = [line for line in lines if line.verdict == FAIL]
        warned = [line for line in lines if line.verdict == WARN]
        told = f"{len(failed)} failed, {len(warned)} to mind, of {len(lines)}"
        cli.say(console, f"not ready: {told}" if failed else f"ready: {told}")
    if as_json:
        cli.print_json(
            {
                "ready": not failed,
                "failed": [line.name for line in failed],
                "warned": [line.name for line in warned],
                "checks": [line.as_dict() for line in lines],
            }
        )
    if failed and failed[0].error is not None:
        raise typer.Exit(cli.exit_code(failed[0].error))


def _row(line: Line) -> Text:
    """One line of the table, which grows while it is looked on."""
    from rich.text import Text

    name = f"{line.name:<22} "
    told = line.told.replace("\n", "\n" + " " * (9 + len(name)))
    return Text.assemble((f"{line.verdict:<9}", _STYLES[line.verdict]), name, told)
