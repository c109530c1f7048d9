"""What the commands of `silotune-sim` are given, and where they put what they find."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common import cli
from common.errors import Unwritable

if TYPE_CHECKING:
    from common.config import Config

CONFIG_HELP = "A shipped configuration such as hospitals, or a YAML file."
ConfigName = Annotated[str, typer.Argument(metavar="CONFIG", help=CONFIG_HELP)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Other values, such as train.batch_size=8.")
]


def load(name_or_path: str, overrides: list[str] | None) -> Config:
    """The configuration that was named. Raises ConfigError with every mistake in it."""
    from common import config_files

    return config_files.load(name_or_path, overrides or ())


def new_directory(name: str) -> Path:
    """Where a command puts what it finds, where nobody said."""
    from datetime import UTC, datetime

    return Path("runs") / f"{name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"


@contextlib.contextmanager
def resumable(directory: Path, *arguments: str) -> Iterator[None]:
    """Says after Ctrl-C, and where something could not be written, how to go on with what stands in `directory`."""
    try:
        yield
    except (KeyboardInterrupt, Unwritable) as error:
        if not any((directory / begun).exists() for begun in ("config.yaml", "trials", "attacks")):
            raise
        remedy = f"complete rounds are kept, go on with: {shlex.join(['silotune-sim', *arguments])}"
        if isinstance(error, Unwritable):
            raise Unwritable(f"{error}\n{remedy}") from error
        raise cli.Interrupted(f"interrupted; {remedy}") from None
