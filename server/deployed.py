"""A run in deployment: the ServerApp of the simulation, in this very process, over the SuperLink of this machine."""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from common.enrolment import SignedRoster
from server.app import build_server_app
from server.flower import FlowerMembers
from server.loopback import NotRunning, acquire
from server.nodes import names
from server.operator import Operator
from server.superlink import Endpoint

_PATIENCE_S = 120.0  # how long a SuperLink that restarts is waited for, as by the grid


def drive(
    endpoint: Endpoint,
    directory: Path,
    coordinate: Callable[[FlowerMembers], None],
    stop: threading.Event,
    on_run: Callable[[int], None] = lambda _: None,
    roster: SignedRoster | None = None,
) -> None:
    """Starts a run and hands its members to `coordinate`; what that raises is raised here.

    directory: of the services, for the lock that keeps two processes from taking over each other's runs. on_run: is
    told the run's number once it runs. roster: says by its node keys who is behind which node; without it a node is who
    it says it is. Setting `stop` ends it between messages, and so does stopping the run at the SuperLink (RunStopped).
    A process that is killed leaves a run behind which the SuperLink fails after a minute; resuming is another run of
    the same configuration.
    """
    with _one_at_a_time(directory / "start.lock"):
        with Operator(endpoint) as operator:
            run = operator.start_run()
        task = acquire(endpoint, run, stop)
    operator = Operator(endpoint, patience_s=_PATIENCE_S, stop=stop)
    failure: list[BaseException] = []
    lost = threading.Event()

    def guarded(members: FlowerMembers) -> None:
        try:
            coordinate(members)
        except BaseException as error:
            failure.append(error)

    def who(signed: SignedRoster) -> Mapping[int, str]:
        return names(signed, operator.nodes())

    def on_lost() -> None:
        lost.set()
        stop.set()

    try:
        grid, context = task.begin()
        on_run(run)
        with task.alive(on_lost):
            build_server_app(guarded, stop, names=partial(who, roster) if roster else None)(grid, context)
        if not lost.is_set():
            task.finish(not failure, type(failure[0]).__name__ if failure else "")
    finally:
        operator.close()
        task.close()
    if lost.is_set() and failure:
        raise NotRunning from failure[0]
    if failure:
        raise failure[0]


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
