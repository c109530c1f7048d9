"""The ServerApp: the rim between Flower and the coordinator."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.flower import FlowerMembers


def build_server_app(
    coordinate: Callable[[FlowerMembers], None],
    stop: threading.Event,
    wave: int | None = None,
    names: Callable[[], Mapping[int, str]] | None = None,
) -> ServerApp:
    """A ServerApp that hands the members behind its grid to `coordinate`. Setting `stop` ends it between messages.

    wave: most messages under way at once; None for no limit. names: who is enrolled as which node.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        coordinate(FlowerMembers(grid, stop, wave, names))

    return app
