"""The process of an institution's daemon that is connected, answers and trains; `client.daemon` keeps it running."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from client.control import Control
from client.egress import EgressLog
from client.events import CONNECTION, LOST, REFUSED, Event
from client.home import ClientHome
from client.keys import load
from client.policy_file import read as read_policy
from client.status import STARTING, Status, StatusBoard
from client.trust import pinned
from common.cli import exit_code
from common.enrolment import timestamp
from common.errors import SilotuneError
from common.private_files import read_passphrase, writing

if TYPE_CHECKING:
    from common.messages import Request

LARGEST_LOG = 10 << 20
KEPT_LOGS = 4

_LOOK_S = 0.1
_GRACE_S = 2.0
_LONGEST_STOP_S = 6.0
_LONGEST_TAKEOVER_S = 15.0
_TROUBLE = frozenset({LOST, REFUSED})

log = logging.getLogger("silotune.client.daemon")


def work() -> None:
    """Runs until it is told to stop; never returns. Arguments: home, the supervisor's number, restarts, passphrase.

    The passphrase is read from the file descriptor of that number; there is none where the keys have none. Exit codes
    are those of the commands: 0 for a stop, 2 to 5 for what a person has to mend, 1 for anything else.
    """
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        # Only notes it: a handler that set an event could wait for a lock that its own thread holds.
        signal.signal(number, lambda found, _: asked.append(found))
    os.umask(0o077)
    os.dup2(2, 1)  # whatever a library prints is no result of the command's
    home, supervisor, restarts, *descriptor = sys.argv[1:]
    secret = int(descriptor[0]) if descriptor else None
    stop, ended = threading.Event(), _Ended()
    arguments = (ClientHome(Path(home)), int(supervisor), int(restarts), secret, stop, ended)
    # A thread, since nothing that hangs, neither a call nor training, may keep this process from stopping.
    threading.Thread(target=_run, args=arguments, name="daemon", daemon=True).start()
    while not asked and not ended.is_set():
        time.sleep(_LOOK_S)
    stop.set()
    if not ended.wait(_LONGEST_STOP_S):
        log.warning("stopped while something did not end within %g s", _LONGEST_STOP_S)
    logging.shutdown()
    os._exit(ended.code)  # training may still be under way in a thread; what it has made so far is of no use


class _Ended(threading.Event):
    """Set once the daemon's thread has ended; code: the exit code."""

    code = 0


def _run(
    home: ClientHome, supervisor: int, restarts: int, descriptor: int | None, stop: threading.Event, ended: _Ended
) -> None:
    try:
        _log_to(home.log)
        passphrase = read_passphrase(descriptor, None)
        if descriptor is not None:
            os.close(descriptor)  # no process that a library starts shall have it
        _serve(home, supervisor, restarts, passphrase, stop)
    except SilotuneError as error:
        log.error("%s", error)
        _say(f"error: {error}")
        ended.code = exit_code(error)
    except BaseException as error:  # what it says may be of the data, so it goes to the log alone
        log.exception("the daemon failed")
        _say(f"the daemon failed ({type(error).__name__}); see {home.log}")
        ended.code = 1
    finally:
        ended.set()


def _serve(home: ClientHome, supervisor: int, restarts: int, passphrase: bytes | None, stop: threading.Event) -> None:
    """Builds the institution and answers for it until `stop` is set."""
    from client.app import build_client_app
    from client.assembly import assemble
    from client.calls import Connection
    from client.departures import Departures
    from client.node import serve

    keys, roster, policy = load(home, passphrase), pinned(home), read_policy(home.policy)
    egress = EgressLog(home.egress, keys.identity)
    egress.mend()
    address, now = str(roster.address), timestamp(datetime.now(UTC))
    control = Control(home.control)
    before = control.read_status()
    trouble = (before.trouble, before.trouble_since) if before is not None else ("", "")
    first = Status(version("silotune"), supervisor, os.getpid(), now, restarts, address, STARTING, now)
    board = StatusBoard(replace(first, trouble=trouble[0], trouble_since=trouble[1]), control.write_status)
    departures = Departures(egress, board.leaves)
    institution = assemble(home, keys, roster, policy, departures.spent)

    def heard(message_id: str, request: Request) -> None:
        place = departures.heard(message_id, request)
        board.heard(type(request).__name__, place)
        log.info("%s, run %s, round %d, attempt %d", type(request).__name__, place.run, place.round, place.attempt)

    def tell(event: Event) -> None:
        board.tell(event)
        log.log(logging.WARNING if event.kind in _TROUBLE else logging.INFO, "%s: %s", event.kind, event.text)
        if event.kind in CONNECTION:
            _say(f"{event.kind.replace('_', ' ')}, {address}" + (f": {event.text}" if event.text else ""))

    connection = Connection(
        address,
        roster.authority.encode("ascii"),
        keys.node,
        memory=home.control / "node",
        grace_s=_GRACE_S,
        takeover_s=_LONGEST_TAKEOVER_S,
    )
    app = build_client_app(lambda _: nullcontext(institution), heard)
    try:
        if not stop.is_set():
            serve(connection, app, policy.bundles, stop, tell, departures.record)
    finally:
        board.close()


def _log_to(file: Path) -> None:
    """Our own log in full, and what libraries warn of; nothing of it goes anywhere else."""
    with writing(file):
        handler = RotatingFileHandler(file, maxBytes=LARGEST_LOG, backupCount=KEPT_LOGS, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("silotune").setLevel(logging.INFO)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # on a full disk it would tell the line elsewhere


def _say(text: str) -> None:
    """A line for whoever started the daemon: never of the data."""
    typer.echo(f"{timestamp(datetime.now(UTC))} {text}", err=True)
