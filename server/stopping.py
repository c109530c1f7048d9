"""Ending a run that another process drives."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

from common.errors import RunStopped, SilotuneError
from server import runs
from server.driver import superlink
from server.home import ServerHome
from server.operator import Operator
from server.runs import Run, Status

_LOOK_S = 0.1


def stop(home: ServerHome, run: Run, patience_s: float) -> Status:
    """Asks whoever drives the run to end it, waits, and returns how it stands then; complete rounds are kept.

    First politely: it ends between two messages. Not gone after `patience_s`, it is asked again and ends at once, and
    the SuperLink is told to end the run, which also reaches a driver that no signal of ours does.

    Raises RunStopped when it goes on all the same.
    """
    if runs.driver(run) is None:
        _stop_at_superlink(home, run)  # what a killed driver left behind
        return runs.read_status(run)
    _signal(run)
    if not _gone(run, patience_s):
        _stop_at_superlink(home, run)
        _signal(run)
        if not _gone(run, patience_s):
            raise RunStopped(
                f"{run.name}: expected its driver, process {runs.driver(run)}, to end within {2 * patience_s:.0f} s,"
                " found it running; if it is on this machine, kill it: complete rounds are kept"
            )
    return runs.read_status(run)


def _signal(run: Run) -> None:
    """SIGTERM to the driver, and to nobody who got its number after it."""
    pid = runs.driver(run)
    with suppress(ProcessLookupError, PermissionError):
        handle = os.pidfd_open(pid) if pid else None
        if handle is None:
            return
        try:
            if runs.driver(run) == pid:  # it held the lock after the handle was opened, so the handle is of it
                signal.pidfd_send_signal(handle, signal.SIGTERM)
        finally:
            os.close(handle)


def _gone(run: Run, patience_s: float) -> bool:
    end = time.monotonic() + patience_s
    while runs.driver(run) is not None:
        if time.monotonic() > end:
            return False
        time.sleep(_LOOK_S)
    return True


def _stop_at_superlink(home: ServerHome, run: Run) -> None:
    with suppress(SilotuneError):  # services that are down have no run
        number = runs.read_status(run).number
        if number:
            with Operator(superlink(home)) as operator:
                operator.stop_run(number)
