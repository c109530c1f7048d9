"""A run of the deployment from beginning to end: prepared by a command, driven by one process, resumed by another."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from rich.text import Text

from common import config_files
from common.base_model import model_directory
from common.config import Config
from common.enrolment import SignedRoster
from common.errors import ConfigError, RunStopped, SilotuneError
from common.files import storage_errors, write_json, write_text
from common.models import load_adapter
from common.secagg.identity import Identity
from server import checkpoints, enrolment, live, loopback, records, report, runs, services, summary, tracking
from server.calls import ServiceError
from server.coordinator import Bench, Outcome, coordinate
from server.deployed import drive
from server.flower import FlowerMembers
from server.home import ServerHome
from server.live import Board
from server.operator import Operator
from server.runs import COMPLETE, FAILED, RUNNING, STOPPED, Run, Status
from server.superlink import Endpoint, SuperLinkHome

log = logging.getLogger("silotune.server")

INTERRUPTED = "interrupted"

_PATIENCE_S = 30.0  # for services that have just been started


@dataclass(frozen=True)
class Audience:
    """Who follows a run. on_ready: it is about to begin, and nothing is wrong that can be seen beforehand. tell: lines
    worth keeping. show: how it stands.
    """

    on_ready: Callable[[], None] = lambda: None
    tell: Callable[[Text], None] = lambda _: None
    show: Callable[[Status], None] = lambda _: None


def superlink(home: ServerHome) -> Endpoint:
    """The SuperLink of this machine, which answers. Raises ConfigError when it does not."""
    if not services.state(home).running:
        raise ConfigError(f"expected the services of {home.root} to run, found none; start them: silotune-server up")
    try:
        endpoint = SuperLinkHome(home.services).endpoint(enrolment.read_settings(home).superlink_port)
        with Operator(endpoint, patience_s=_PATIENCE_S) as operator:
            operator.nodes()
    except (ServiceError, ConfigError) as error:
        raise ConfigError(
            f"expected the services of {home.root} to answer, found that they do not ({error}); the logs in"
            f" {home.services} say why"
        ) from error
    return endpoint


def prepare(home: ServerHome, config: Config) -> Run:
    """A new run of this configuration, with the coordinator's own records in its directory; not begun yet.

    Raises ConfigError for what no deployment can mean and names that are not on the roster, DataError when the records
    cannot be read, ModelError when there is no base model, StorageError.
    """
    records.check(config, enrolment.roster(home).cards)
    settled = records.settled(config)
    tracking.require(settled.tracking)
    model_directory(settled.model.path)
    held_out = records.gather(settled.data)
    run = runs.create(home.runs, settled)
    records.keep(run, held_out)
    first = Status(STOPPED, rounds=settled.federation.rounds, started=runs.started(run), why="not begun yet")
    runs.write_status(run, first)
    write_text(run.config, config_files.to_yaml(settled))
    return run


def conduct(
    home: ServerHome, run: Run, signer: Identity, stop: threading.Event, audience: Audience | None = None
) -> dict[str, Any]:
    """Drives a run to its end, from wherever it stands, and returns what is in its summary.json.

    A run whose rounds are all done only hands its adapter to whom it did not reach. signer: the coordinator's identity.

    Raises RunStopped when `stop` is set, or when too few institutions take part; ConfigError when another process
    drives it, the services do not run or its checkpoints were pruned; DataError, ModelError, StorageError.
    """
    to = audience or Audience()
    with runs.driving(run), _logged(run, to.tell):
        config = config_files.load(str(run.config))
        roster = enrolment.roster(home)
        records.check(config, roster.cards)
        endpoint = superlink(home)
        progress = checkpoints.latest(run.checkpoints, config_files.digest(config))
        if progress is None and run.summary.is_file():
            raise ConfigError(
                f"{run.name}: expected its checkpoints, found them pruned; its adapter is in {run.adapter}"
            )
        first = Status(RUNNING, rounds=config.federation.rounds, pid=os.getpid(), started=runs.started(run))
        done = 0 if progress is None else progress.round
        log.info("process %d drives %s from round %d of %d", os.getpid(), run.name, done, config.federation.rounds)
        with Board(run, replace(first, **live.standing(progress)), to.show) as board:
            board.tell(phase="preparing")
            to.on_ready()  # now that what an earlier driver said of it is gone
            try:
                found = _conduct(home, run, config, roster, endpoint, signer, stop, board, to)
            except BaseException as error:
                board.tell(**_ended(error, stop.is_set(), run.summary.is_file()))
                raise
            board.tell(state=COMPLETE, phase="done", answered=(), waiting={}, ended=runs.now())
            return found


def _conduct(
    home: ServerHome,
    run: Run,
    config: Config,
    roster: SignedRoster,
    endpoint: Endpoint,
    signer: Identity,
    stop: threading.Event,
    board: Board,
    to: Audience,
) -> dict[str, Any]:
    began = time.perf_counter()
    before = sum(summary.seconds_of(checkpoints.latest(run.checkpoints, config_files.digest(config))).values())
    bench = Bench.of(config)
    outcomes: list[Outcome] = []

    def job(members: FlowerMembers) -> None:
        told = live.observer(config, board, to.tell)
        outcomes.append(
            coordinate(config, run.root, run.validation, members, told, bench, roster.secagg, run.name, signer)
        )

    drive(endpoint, home.services, job, stop, lambda number: board.tell(number=number), roster)
    if stop.is_set():
        raise RunStopped(INTERRUPTED)
    outcome = outcomes[0]
    board.tell(phase="scoring", delivered=outcome.delivered, **live.standing(outcome.progress))
    if run.summary.is_file():
        found = {**json.loads(run.summary.read_text(encoding="utf-8")), "delivered": list(outcome.delivered)}
    else:
        found = _summary(run, config, outcome, bench, lambda: time.perf_counter() - began + before)
    write_json(run.summary, found)
    report.write(run.root)
    if missing := [name for name in config.data.names if name not in outcome.delivered]:
        to.tell(Text(f"without the adapter yet: {', '.join(missing)}; silotune-server resume {run.name} hands it out"))
    return found


def _summary(run: Run, config: Config, outcome: Outcome, bench: Bench, total: Callable[[], float]) -> dict[str, Any]:
    """What a coordinator can know: its own scores, sums and costs. Nobody was trained alone, so nothing is compared."""
    test = bench.read(run.test)
    base = bench.scores(bench.start, test)
    federated = bench.scores(load_adapter(run.adapter), test)
    seconds = {**summary.seconds_of(outcome.progress), "total": total()}
    return {
        **summary.facts(config, outcome, bench, seconds, runs.started(run)),
        "run": run.name,
        "everyone": {"base": base.as_dict(), "federated": federated.as_dict()},
        "own": {},
        "gap_closed": None,
        "delivered": list(outcome.delivered),
    }


def _ended(error: BaseException, stopped: bool, complete: bool) -> dict[str, Any]:
    """What the status says of a run that did not go to its end. complete: it did before, and was handing out what it
    ended with.
    """
    changes = {"answered": (), "waiting": {}, "ended": runs.now()}
    at_superlink = isinstance(error, loopback.NotRunning)
    if stopped or at_superlink or isinstance(error, KeyboardInterrupt):
        log.info("stopped: %s", error or INTERRUPTED)
        return {**changes, "state": COMPLETE if complete else STOPPED, "why": str(error) or INTERRUPTED}
    if isinstance(error, SilotuneError):
        log.error("failed: %s", error)
        why = str(error)
    else:
        log.error("failed", exc_info=error)
        why = f"{type(error).__name__}; run.log has the details"
    return {**changes, "state": COMPLETE if complete else FAILED, "why": why}


@dataclass(frozen=True)
class Interruption:
    """stop: ends the run between messages. asked: whether a signal to this process did; the SuperLink may have, too."""

    stop: threading.Event = field(default_factory=threading.Event)
    asked: threading.Event = field(default_factory=threading.Event)


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """What the first Ctrl-C or SIGTERM sets; a second one ends at once (KeyboardInterrupt)."""
    found = Interruption()

    def on_signal(number: int, frame: object) -> None:
        if found.asked.is_set():
            raise KeyboardInterrupt
        found.asked.set()
        found.stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Tells(logging.Handler):
    """Shows warnings, such as who left a round and why, to whoever follows; an error is raised as well."""

    def __init__(self, tell: Callable[[Text], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.ERROR:
            self._tell(Text(record.getMessage(), "yellow"))


@contextmanager
def _logged(run: Run, tell: Callable[[Text], None]) -> Iterator[None]:
    """What the run has to say goes to its log, after what is there."""
    with storage_errors(run.log):
        file = logging.FileHandler(run.log, encoding="utf-8", delay=False)
    form = logging.Formatter("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    form.converter = time.gmtime
    file.setFormatter(form)
    handlers = (file, _Tells(tell))
    ours = logging.getLogger("silotune")
    level = ours.level
    ours.setLevel(logging.INFO)
    for handler in handlers:
        ours.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            ours.removeHandler(handler)
        ours.setLevel(level)
        file.close()
