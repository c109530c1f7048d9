"""Options that several commands of the institution have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Home = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="The institution's own directory; else $SILOTUNE_CLIENT_HOME, ~/.silotune/client."
    ),
]
