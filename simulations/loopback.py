"""A deployment on one machine: one coordinator and its institutions as real processes, over TLS on loopback.

Every step is a command that an operator or an institution would type, in the order of docs/deployment.md. What differs
from real institutions is where they are, that one person holds all keys, and that nobody compares fingerprints.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from client.data_sets import DataSet
from client.ledger import by_unit
from client.ledger_account import round_event
from common import config_files
from common.config import COORDINATOR, Config, FileConfig, named
from common.errors import ConfigError, DataError, RunStopped
from common.files import storage_errors, write_text
from common.privacy.accounting import epsilon
from common.records import Record, read_jsonl, write_jsonl
from common.splits import split
from simulations import prepare

DATA_SET = "notes"
"""What the federation calls the records."""

_READY_S, _STOP_S = 120.0, 30.0
_SEEDS = 1000  # tried for a split; two persons leave a set empty under all of them

Say = Callable[[str], None]


@dataclass(frozen=True)
class Loopback:
    """A federation's directories: one home each, records outside of them, and what the services print."""

    root: Path
    names: tuple[str, ...]

    @property
    def server(self) -> Path:
        return self.root / COORDINATOR / "home"

    def client(self, name: str) -> Path:
        return self.root / name / "home"

    def records(self, name: str) -> Path:
        return self.root / name / "records.jsonl"

    def log(self, name: str) -> Path:
        """What the service of that name prints."""
        return self.root / name / "up.log"

    @property
    def config(self) -> Path:
        """What the operator hands to `silotune-server run`."""
        return self.root / "federation.yaml"


@dataclass(frozen=True)
class Result:
    """What came of it.

    summary: of the run, as the coordinator has it. adapters: what each institution finds of the published adapter on
    its own records. egress: entries of each institution's egress log, all verified. ledgers: what each one's privacy
    ledger, verified, says of its records; empty without differential privacy. seconds: by step.
    """

    summary: Mapping[str, Any]
    adapters: Mapping[str, Mapping[str, Any]]
    egress: Mapping[str, int]
    ledgers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "summary": self.summary,
            "adapters": self.adapters,
            "egress": self.egress,
            "ledgers": self.ledgers,
            "seconds": {step: round(value, 2) for step, value in self.seconds.items()},
        }


def federate(config: Config, root: Path, say: Say, local: bool = True) -> Result:
    """Plays a deployment of `config` in the new directory `root`, from keys to the published adapter.

    say: told each command before it runs. local: whether each institution also trains by itself, to compare. Every
    process that was started is gone when this returns or raises.

    Raises ConfigError when `root` holds something, RunStopped when a step fails, with what it said.
    """
    watch = Watch()
    with standing(config, root, say, watch) as place:
        summary = call(say, "silotune-server", "run", str(place.config), home=place.server)
        watch.lap("run")
    watch.lap("stop")
    options = () if local else ("--no-local",)
    adapters = {
        name: call(
            say, "silotune-client", "adapter", "evaluate", str(summary["run"]), *options, home=place.client(name)
        )
        for name in place.names
    }
    watch.lap("evaluate")
    egress = {}
    for name in place.names:
        found = call(say, "silotune-client", "log", "verify", home=place.client(name))
        egress[name] = int(found["entries"])
    ledgers = {name: _ledger(place.client(name), say) for name in place.names} if config.privacy.private else {}
    return Result(summary, adapters, egress, ledgers, watch.seconds)


def _ledger(home: Path, say: Say) -> Mapping[str, Any]:
    """What an institution's ledger, verified, says of its records."""
    call(say, "silotune-client", "ledger", "verify", home=home)
    found: Mapping[str, Any] = call(say, "silotune-client", "ledger", "show", home=home)["populations"][0]
    return found


@contextmanager
def standing(config: Config, root: Path, say: Say, watch: Watch | None = None) -> Iterator[Loopback]:
    """A deployment for runs of `config` in the new directory `root`, everybody enrolled, started and connected.

    Its processes end with the block. Raises what `federate` raises.
    """
    watch = watch or Watch()
    with storage_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        if any(root.iterdir()):
            raise ConfigError(f"{root}: expected a new or empty directory, found files in it; choose another")
    place = Loopback(root.resolve(), config.data.names)
    _write_records(config, place)
    _enrol(config, place, say)
    watch.lap("enrolment")
    with ExitStack() as services:
        services.enter_context(_service("silotune-server", ("up",), place.server, place.log(COORDINATOR), say))
        for name in place.names:
            services.enter_context(_service("silotune-client", ("up",), place.client(name), place.log(name), say))
        _wait_until_ready(place)
        watch.lap("start")
        yield place


def table(found: Result) -> Table:
    """What each institution finds on its own test records."""
    shown = Table(title="The published adapter, on each institution's own test records")
    arms = ("base", "local", "federated")
    units = sorted({unit for own in found.ledgers.values() for unit in own["units"]})
    spent = (f"epsilon of its budget, {by_unit(units)}",) if found.ledgers else ()
    for column in ("institution", *arms, "egress entries", *spent):
        shown.add_column(column, justify="left" if column == "institution" else "right")
    for name, scores in found.adapters.items():
        cells = [_cell(scores["scores"].get(arm)) for arm in arms]
        own = found.ledgers.get(name)
        budget = () if own is None else (f"{own['spent']['epsilon']:.4g} of {own['budget']:g}",)
        shown.add_row(name, *cells, f"{found.egress[name]}, verified", *budget)
    return shown


def _cell(scores: Mapping[str, Any] | None) -> str:
    if scores is None:
        return "-"
    accuracy = "" if scores["accuracy"] is None else f" ({scores['accuracy']:.0%})"
    return "not finite" if scores["perplexity"] is None else f"{scores['perplexity']:.2f}{accuracy}"


class Watch:
    """Seconds by step, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, step: str) -> None:
        """Ends a step."""
        now = time.perf_counter()
        self.seconds[step] = now - self._last
        self._last = now


def _write_records(config: Config, place: Loopback) -> None:
    """Each institution's records in one file of its own, and the configuration that names them."""
    found = prepare.gather(config.data)
    for name, own in found.institutions.items():
        write_jsonl(place.records(name), [*own.train, *own.validation, *own.test])
    write_jsonl(place.records(COORDINATOR), [*found.coordinator.validation, *found.coordinator.test])
    data = replace(
        config.data,
        name=DATA_SET,
        generator="",
        directory="",
        institutions=named(*place.names),
        coordinator=FileConfig(path=str(place.records(COORDINATOR))),
        train_records=[],
    )
    write_text(place.config, config_files.to_yaml(replace(config, data=data)))


def _enrol(config: Config, place: Loopback, say: Say) -> None:
    for name in place.names:
        options = ("--name", name, "--base-model", config.model.path, "--data-set", f"{DATA_SET}={place.records(name)}")
        call(say, "silotune-client", "init", *options, home=place.client(name))
        _agree(config, place.client(name) / "policy.yaml")
        _split(place.client(name) / "data.yaml", read_jsonl(place.records(name)))
    port, loopback = _free_ports()
    options = ("--host", "127.0.0.1", "--port", str(port), "--superlink-port", str(loopback))
    call(say, "silotune-server", "init", *options, "--federation", config.name, home=place.server)
    cards = [str(place.client(name) / "card.json") for name in place.names]
    call(say, "silotune-server", "enroll", "--yes", *cards, home=place.server)
    for name in place.names:
        roster = str(place.server / "roster.json")
        call(say, "silotune-client", "trust", "--yes", roster, home=place.client(name))


def _agree(config: Config, policy: Path) -> None:
    """Edits a policy as an institution would that agrees to this configuration."""
    said = yaml.safe_load(policy.read_text(encoding="utf-8"))
    said["secure_aggregation"] = {
        "required": config.secure_aggregation.enabled,
        "colluders": config.secure_aggregation.colluders,
        "smallest_cohort": max(config.federation.min_cohort, 3),
    }
    said["methods"] = [config.federation.method]
    said["largest_rank"] = config.lora.rank
    said["largest_passes"] = config.train.passes_per_round
    said["quantise"] = {name: getattr(config.quantise, name) for name in ("clip", "bits", "weight_bits")}
    said["weight_unit"] = config.federation.weight_unit
    said["rounds_per_day"] = config.federation.rounds
    if config.privacy.private:
        budget = {"data_sets": [DATA_SET], "modes": [config.privacy.mode]}
        said["populations"] = {DATA_SET: {**budget, "epsilon": _budget(config), "delta": config.privacy.delta}}
    write_text(policy, yaml.safe_dump(said, sort_keys=False))


def _budget(config: Config) -> float:
    """What the whole run costs, each round in one attempt, where it does not say so itself."""
    if config.privacy.epsilon:
        return config.privacy.epsilon
    event = round_event(config)
    assert event is not None
    whole = epsilon([replace(event, steps=event.steps * config.federation.rounds)], config.privacy.delta).bound
    return math.ceil(whole * 100) / 100


def _split(data: Path, records: Sequence[Record]) -> None:
    """Edits a data file as an institution would whose few persons leave a set empty: it tries other seeds."""
    said = yaml.safe_load(data.read_text(encoding="utf-8"))
    spec = DataSet(**said["data_sets"][DATA_SET])
    seeds = range(spec.seed, spec.seed + _SEEDS)
    seed = next((seed for seed in seeds if _fills_every_set(records, replace(spec, seed=seed))), spec.seed)
    if seed != spec.seed:
        said["data_sets"][DATA_SET]["seed"] = seed
        write_text(data, yaml.safe_dump(said, sort_keys=False))


def _fills_every_set(records: Sequence[Record], spec: DataSet) -> bool:
    try:
        split(records, spec.held_out, spec.seed, lends=False, source=DATA_SET)
    except DataError:
        return False
    return True


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        for found in (one, other):
            found.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1]), int(other.getsockname()[1])


def _wait_until_ready(place: Loopback) -> None:
    """Until the services answer and every institution is connected."""
    end = time.monotonic() + _READY_S
    missing = set(place.names)
    while missing:
        missing = {name for name in missing if not _connected(place.client(name))}
        if missing and time.monotonic() > end:
            logs = ", ".join(str(place.log(name)) for name in sorted(missing))
            raise RunStopped(f"{', '.join(sorted(missing))}: not connected after {_READY_S:.0f} s; see {logs}")
        if missing:
            time.sleep(0.5)


def _connected(home: Path) -> bool:
    found = _quietly("silotune-client", "status", home=home)
    return bool(found.get("running")) and (found["last"] or {}).get("connection") == "connected"


# --- Commands -----------------------------------------------------------------------------------------------------

_MAIN = {
    "silotune-client": "from client.main import main; main()",
    "silotune-server": "from server.main import main; main()",
}


def _argv(command: str, arguments: tuple[str, ...], home: Path) -> list[str]:
    """The command as this very installation has it, wherever its scripts lie."""
    return [sys.executable, "-c", _MAIN[command], *arguments, "--home", str(home), "--json"]


def _environment() -> dict[str, str]:
    """One thread each: the institutions share this machine."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def call(say: Say, command: str, *arguments: str, home: Path) -> dict[str, Any]:
    """Runs a command to its end and returns its object. Raises RunStopped with what it said when it fails."""
    typed = shlex.join((command, *arguments, "--home", str(home)))
    say(typed)
    done = subprocess.run(
        _argv(command, arguments, home), env=_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RunStopped(f"`{typed}` ended with code {done.returncode}:\n{done.stderr.strip()[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _quietly(command: str, *arguments: str, home: Path) -> dict[str, Any]:
    """The object of a command that may fail; empty then."""
    done = subprocess.run(
        _argv(command, arguments, home), env=_environment(), capture_output=True, text=True, check=False
    )
    found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
    return found


@contextmanager
def _service(command: str, arguments: tuple[str, ...], home: Path, log: Path, say: Say) -> Iterator[None]:
    """A service in the background; ended in order with the block, and by force if it does not end."""
    say(shlex.join((command, *arguments, "--home", str(home))) + " &")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            _argv(command, arguments, home),
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            say(f"{command} in {home} did not end within {_STOP_S:.0f} s and was killed; see {log}")
