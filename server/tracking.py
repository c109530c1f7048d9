"""Curves of a run for TensorBoard, MLflow and Weights & Biases.

Only what the coordinator sees goes there: sums over institutions, its own scores, bytes and seconds, and the settings
of the training. Never an institution's name or a number of one, nor what these packages would gather by themselves
(the console, the command line, the machine): they may send it to somebody else's server.

The checkpoint is the truth, as it is for metrics.jsonl: on every start the whole history is offered again, and each
place takes the rounds that it does not hold yet.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from common.config import Config, TrackingConfig
from common.errors import ConfigError
from common.files import storage_errors, write_json
from server.rounds import RoundRecord

log = logging.getLogger("silotune.server")

_TOLD = ("lora", "train", "federation", "quantise", "evaluation")  # sections that name no institution and no path


class Place(Protocol):
    """Where curves are kept.

    local: on the coordinator's own disk, so that a failure is one of the run; another's failure costs only curves.
    """

    local: bool

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Keeps a round's values; a round that is there already stays as it is."""

    def close(self, complete: bool) -> None:
        """Ends the curves; complete: the run went to its end."""


def require(tracking: TrackingConfig) -> None:
    """Raises ConfigError when a package that the configuration asks for is not installed."""
    for package, wanted in (("mlflow", tracking.mlflow), ("wandb", tracking.wandb)):
        spec = find_spec(package) if wanted else None
        # A mere folder of that name, such as wandb leaves behind where it ran, is found too, without an origin.
        if wanted and (spec is None or spec.origin is None):
            raise ConfigError(
                f"tracking.{package}: found {wanted!r}, and no package {package} to send curves with; "
                f"`pip install {package}`, or leave it empty: `tracking.{package}=`"
            )


def values(record: RoundRecord) -> dict[str, float]:
    """A round as scalars by name; what was not measured is left out."""
    found = {
        "train/loss": record.train_loss,
        **{f"validation/{name}": value for name, value in (record.validation or {}).items()},
        "institutions/perplexity": record.institutions_perplexity,
        "round/contributors": record.contributors,
        "round/refused": len(record.refused),
        "round/void": record.void,
        "bytes/up": record.bytes_up,
        "bytes/down": record.bytes_down,
        **{f"seconds/{phase}": seconds for phase, seconds in record.seconds.items()},
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def settings(config: Config) -> dict[str, str]:
    """The configuration as far as it may be told: by dotted key, without names, records or paths of anybody."""
    told: dict[str, Any] = {
        "name": config.name,
        "seed": config.seed,
        "model": Path(config.model.path).name,
        "institutions": len(config.data.institutions),
        **dict(_flat({section: asdict(getattr(config, section)) for section in _TOLD})),
    }
    return {key: str(value) for key, value in told.items()}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class Tracker:
    """Hands every complete round to every place, in order."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places
        self._told = [0] * len(places)

    def follow(self, history: Sequence[RoundRecord]) -> None:
        """Writes the rounds that are new since the last call.

        Raises StorageError when the disk refuses. A service that fails is told of in the log, and offered the round
        again with the next one: a run that trains is not stopped for its curves.
        """
        for index, place in enumerate(self._places):
            for record in history[self._told[index] :]:
                try:
                    place.write(record.round, values(record))
                except Exception as error:
                    if place.local:
                        raise
                    log.warning("%s did not take round %d: %s", type(place).__name__, record.round, error)
                    break
                self._told[index] = record.round


@contextmanager
def tracker(config: Config, run: str, directory: Path) -> Iterator[Tracker]:
    """The tracker of the run in `directory`, with all places that `config.tracking` names; closes them at the end.

    Raises ConfigError when a package is not installed or its service cannot be used.
    """
    wanted = config.tracking
    require(wanted)
    places: list[Place] = []
    complete = False
    try:
        if wanted.tensorboard:
            places.append(TensorBoard(directory / "tensorboard"))
        if wanted.mlflow:
            places.append(_opened("mlflow", lambda: MLflow(config, run, _identity(directory))))
        if wanted.wandb:
            places.append(_opened("wandb", lambda: WeightsAndBiases(config, run, _identity(directory), directory)))
        yield Tracker(places)
        complete = True
    finally:
        for place in places:
            _close(place, complete)


def _opened(key: str, place: Callable[[], Place]) -> Place:
    try:
        return place()
    except Exception as error:
        raise ConfigError(
            f"tracking.{key}: its service cannot be used: {error}. Mend that, or do without: `tracking.{key}=`, "
            "for a run that is resumed in its config.yaml"
        ) from error


def _close(place: Place, complete: bool) -> None:
    try:
        place.close(complete)
    except Exception as error:
        if place.local:
            raise
        log.warning("%s was not closed: %s", type(place).__name__, error)


def _identity(directory: Path) -> str:
    """The run's own name at a service: two runs of one configuration are two, a resumed one stays itself.

    Kept before it is used, so that a kill in between makes no second run.
    """
    file = directory / "tracking.json"
    if not file.is_file():
        write_json(file, {"id": secrets.token_hex(8)})
    return str(json.loads(file.read_text(encoding="utf-8"))["id"])


class TensorBoard:
    """Event files in the run's directory, one each time the run is begun or resumed, synced round by round."""

    local = True

    def __init__(self, directory: Path) -> None:
        with storage_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            self._held = {event.step for file in directory.glob("*tfevents*") for event in read_events(file)}
        # TensorBoard reads files in the order of their names; its own also hold the machine's name.
        self._file = directory / f"events.out.tfevents.{time.time_ns()}"
        self._writer: Any = None  # until there is something to write: a run that was complete stays as it is

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.record_writer import RecordWriter

        if step in self._held:
            return
        with storage_errors(self._file):
            if self._writer is None:
                self._writer = RecordWriter(str(self._file))
                self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
            summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
            self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())
        self._writer.flush()

    def close(self, complete: bool) -> None:
        if self._writer is not None:
            self._writer.close()


def read_events(file: Path) -> Iterator[Any]:
    """The events with values in a file of TensorBoard, up to where a kill or a power cut damaged it.

    A record is its length (8 bytes), a checksum of that (4), the event, and a checksum of it (4).
    """
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    left = file.read_bytes()
    while left:
        size = int.from_bytes(left[:8], "little")
        text, checksum = left[12 : 12 + size], left[12 + size : 16 + size]
        if checksum != masked_crc32c(text).to_bytes(4, "little"):
            return
        event = Event.FromString(text)
        if event.HasField("summary"):
            yield event
        left = left[16 + size :]


class MLflow:
    """A run in the experiment that is called as the configuration is."""

    local = False

    def __init__(self, config: Config, run: str, identity: str) -> None:
        # Read when it is first imported. Its own seven tries of two minutes would hold up every round of an outage.
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient(tracking_uri=config.tracking.mlflow)
        experiment = self._client.get_experiment_by_name(config.name)
        home = experiment.experiment_id if experiment else self._client.create_experiment(config.name)
        found = self._client.search_runs([home], filter_string=f"tags.silotune_run = '{identity}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            self._run = self._client.create_run(home, run_name=run, tags={"silotune_run": identity}).info.run_id
        self._client.log_batch(self._run, params=[Param(key, value) for key, value in settings(config).items()])
        self._held = {
            (name, metric.step)
            for name in self._client.get_run(self._run).data.metrics
            for metric in self._client.get_metric_history(self._run, name)
        }

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        new = [Metric(name, value, now, step) for name, value in values.items() if (name, step) not in self._held]
        if new:
            self._client.log_batch(self._run, metrics=new, synchronous=True)

    def close(self, complete: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if complete else "FAILED")


class WeightsAndBiases:
    """A run in the project that the configuration names; WANDB_MODE and the other variables of wandb hold."""

    local = False

    def __init__(self, config: Config, run: str, identity: str, directory: Path) -> None:
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        import wandb

        # The console names institutions, and the command line and the machine's files may.
        quiet = wandb.Settings(
            console="off",
            quiet=True,
            disable_git=True,
            save_code=False,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=config.tracking.wandb,
            id=identity,
            resume="allow",
            name=run,
            config=settings(config),
            dir=str(directory),
            settings=quiet,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # Where a run goes on, W&B says from which step; offline it cannot, and the new folder holds every round.
        if step >= self._run.starting_step:
            self._run.log(dict(values), step=step, commit=True)

    def close(self, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)
