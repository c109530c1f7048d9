"""Options that several commands of the coordinator have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Home = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="The coordinator's own directory; else $SILOTUNE_SERVER_HOME, ~/.silotune/server."
    ),
]
