"""What the three commands share: exit codes, where output goes, how errors are told.

Imported by every `--help`, so nothing heavy is imported here.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from common.errors import ConfigError, DataError, ModelError, RunStopped, SilotuneError, StorageError, Unreachable

if TYPE_CHECKING:
    import click
    from rich.console import Console

EXIT_CODES: dict[type[SilotuneError], int] = {
    ConfigError: 2,
    DataError: 3,
    ModelError: 4,
    StorageError: 5,
    RunStopped: 6,
    Unreachable: 7,
}
"""By cause; 1 is any other error, 2 also a command line that cannot be read."""

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

EPILOG = (
    "Exit codes: 0 done, 2 configuration or command line, 3 records, 4 model or adapter, 5 disk, 6 run stopped,"
    " 7 no connection or no answer, 130 interrupted, 1 anything else."
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout at the end; all else to stderr.")]

PassphraseFd = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Read the passphrase of the private keys from this file descriptor, as 3 in 3<FILE."
    ),
]
PassphraseCredential = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Read the passphrase of the private keys from this systemd credential."),
]


class Interrupted(SilotuneError):
    """The user stopped the command; the message says what is kept and how to go on."""


class Commands(TyperGroup):
    """Commands that tell an error a user can mend in plain words, with the exit code of its cause."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _tell("interrupted; run the same command again")
            raise typer.Exit(INTERRUPTED) from None
        except Interrupted as error:
            _tell(str(error))
            raise typer.Exit(INTERRUPTED) from None
        except SilotuneError as error:
            _tell(f"error: {error}")
            raise typer.Exit(exit_code(error)) from None


def application(purpose: str) -> typer.Typer:
    """An empty command with `--version`; its subcommands report errors as `Commands` says."""
    app = typer.Typer(
        cls=Commands,
        help=purpose,
        epilog=EPILOG,
        no_args_is_help=True,
        add_completion=False,
        # A stack trace means a bug of ours; it must show code, and not the values, which may be records.
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def common_options(
        version: Annotated[
            bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
        ] = False,
    ) -> None:
        pass

    return app


def exit_code(error: SilotuneError) -> int:
    """The code of the error's class or of its nearest ancestor that has one; else 1."""
    return next((EXIT_CODES[cause] for cause in type(error).__mro__ if cause in EXIT_CODES), 1)


@contextlib.contextmanager
def progress_console(as_json: bool) -> Iterator[Console]:
    """Where a command shows its progress.

    With `--json` that is stderr, and whatever a library prints meanwhile goes there too, so that stdout holds the
    result and nothing else.
    """
    from rich.console import Console

    if as_json:
        with contextlib.redirect_stdout(sys.stderr):
            yield Console(stderr=True)
    else:
        yield Console()


def say(console: Console, *lines: str) -> None:
    """Whole lines, as they are: fingerprints are compared by eye, and paths may hold rich's markup."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def confirm(question: str) -> None:
    """Raises ConfigError unless a person at the terminal says yes."""
    import click

    try:
        agreed = typer.confirm(question, err=True)
    except click.Abort:
        agreed = False
    if not agreed:
        raise ConfigError("expected a yes, found none; nothing was changed, and the same command asks again")


def print_json(result: Mapping[str, Any]) -> None:
    """The result of a command on stdout, in the form of `summary.json`."""
    typer.echo(json.dumps(result, indent=2, allow_nan=False))


def _tell(message: str) -> None:
    from rich.console import Console

    # Messages quote names, paths and values: no markup is read from them, and long lines stay whole for grep.
    Console(stderr=True).print(message, markup=False, highlight=False, soft_wrap=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"silotune {version('silotune')}")
        raise typer.Exit
