"""`silotune-server up`: the coordinator's services, until it is told to stop."""

from __future__ import annotations

from typing import Annotated

import typer

from common import cli
from server.options import Home


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog=cli.EPILOG)(up)


def up(
    listen: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where members' connections are taken; :: for all of IPv6.")
    ] = "0.0.0.0",
    home: Home = None,
    as_json: cli.Json = False,
) -> None:
    """Run the services that members connect to, until SIGTERM or Ctrl-C; needs no passphrase.

    Both are started again when they end, the SuperLink also when it answers nothing for a minute. Who is enrolled or
    removed meanwhile is let in or shut out within seconds.
    """
    import threading
    from collections import Counter
    from contextlib import suppress
    from datetime import UTC, datetime

    from common.enrolment import timestamp
    from common.processes import stopped_by_signals
    from server import upkeep
    from server.home import ServerHome

    where = ServerHome.at(home)
    stop = threading.Event()
    begin = datetime.now(UTC)
    counted: Counter[str] = Counter()
    with cli.progress_console(as_json) as console, stopped_by_signals(stop):

        def tell(event: upkeep.Event) -> None:
            counted[event.kind] += 1
            with suppress(OSError, SystemExit):  # whoever read along is gone: no reason to end the services
                cli.say(console, f"{timestamp(datetime.now(UTC))}  {event.text}")

        cli.say(console, f"starting; Ctrl-C or SIGTERM stops; logs: {where.services}")
        upkeep.serve(where, stop, tell, listen)
        cli.say(console, "stopped")
    if as_json:
        told = {"since": timestamp(begin), "until": timestamp(datetime.now(UTC)), "restarts": counted[upkeep.RESTART]}
        cli.print_json(told)
