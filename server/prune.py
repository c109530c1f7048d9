"""What takes room and is needed no more: checkpoints of complete runs, and the messages in Flower's database."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from common import config_files
from common.errors import SilotuneError, StorageError
from common.files import storage_errors
from server import enrolment, runs, services
from server.home import ServerHome
from server.runs import COMPLETE, Run
from server.superlink import SuperLinkHome


@dataclass(frozen=True)
class Plan:
    """What would be removed. checkpoints: of which runs. database: Flower's files. kept: what stays, and why.

    size: of all that would be removed, in bytes.
    """

    checkpoints: tuple[Run, ...]
    database: tuple[Path, ...]
    kept: Mapping[str, str]
    size: int


def plan(home: ServerHome, older_than: timedelta, now: datetime) -> Plan:
    """What can go, of runs that ended longer than `older_than` ago. Removes nothing. Raises StorageError.

    Adapters, reports, summaries, metrics and logs stay. A run that can still be resumed keeps its checkpoints: one that
    is not complete, and one whose adapter a member has not got yet. The database can go while no service and no run
    uses it: `silotune-server up` registers every member of the roster again.
    """
    found = runs.all_runs(home.runs)
    members = set(enrolment.roster(home).cards)
    kept: dict[str, str] = {}
    able: list[Run] = []
    for run in found:
        if not run.checkpoints.is_dir():
            continue
        why = _needed(run, members, now - older_than)
        if why:
            kept[run.name] = why
        else:
            able.append(run)
    database = tuple(sorted(SuperLinkHome(home.services).database.parent.glob("superlink.db*")))
    if database and (services.state(home).running or any(runs.driver(run) is not None for run in found)):
        kept["superlink.db"] = "the services use it, or a run does; stop them first"
        database = ()
    files = [file for run in able for file in run.checkpoints.rglob("*")] + list(database)
    return Plan(tuple(able), database, kept, sum(file.stat().st_size for file in files if file.is_file()))


def carry_out(home: ServerHome, found: Plan) -> None:
    """Removes what is planned. Raises StorageError, and ConfigError when a run or the services have begun meanwhile."""
    for run in found.checkpoints:
        with runs.driving(run), storage_errors(run.checkpoints):
            shutil.rmtree(run.checkpoints)
    if found.database:
        with services.alone(home):
            for file in found.database:
                with storage_errors(file):
                    file.unlink(missing_ok=True)


def _needed(run: Run, members: Collection[str], before: datetime) -> str:
    """Why the checkpoints of a run are still needed; empty when they are not."""
    try:
        status = runs.read_status(run)
        if status.state != COMPLETE:
            return f"{status.state}: it can be resumed"
        if datetime.fromisoformat(status.ended).astimezone(UTC) > before:
            return f"ended {status.ended}"
        names = config_files.load(str(run.config)).data.names
    except (StorageError, ValueError) as error:
        return str(error)
    except SilotuneError:  # of an older release
        return "its configuration cannot be read any more"
    missing = [name for name in names if name in members and name not in status.delivered]
    return f"{', '.join(missing)} without its adapter; resume it, or take them off the roster" if missing else ""
