"""The coordinator's own records, for its central evaluation: read once at a run's beginning, split by person, and kept.

Institutions' records are theirs; a configuration for a deployment names a data set, and never a file of theirs.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from common.base_model import EMBEDDED
from common.config import COORDINATOR, CompareConfig, Config, DataConfig, SimulationConfig, TuneConfig
from common.errors import ConfigError, DataError
from common.formats import read_records
from common.records import Record, read_jsonl, write_jsonl
from common.sources import read_table
from common.splits import split_held_out
from server.runs import Run


@dataclass(frozen=True)
class HeldOut:
    """validation: chooses the published round. test: is read once, at the end. No person is in both."""

    validation: tuple[Record, ...]
    test: tuple[Record, ...]


def check(config: Config, members: Collection[str]) -> None:
    """Raises ConfigError, with every mistake, when no deployment can mean this configuration.

    members: names on the roster.
    """
    mistakes = []
    if strangers := [name for name in config.data.names if name not in members]:
        mistakes.append(
            f"data.institutions: found {', '.join(strangers)}, not on the roster; allowed:"
            f" {', '.join(sorted(members)) or 'nobody yet, see silotune-server enroll'}"
        )
    if config.data.has_files:
        mistakes.append(
            "data.institutions: found a path; allowed: names only, since each institution's own data.yaml says which"
            " of its files stands behind data.name"
        )
    elif not config.data.coordinator.path and not config.data.directory:
        mistakes.append(
            "data.coordinator.path: found '', and no data.directory; allowed: a file of the coordinator's own records,"
            " with an empty data.generator, or a data.directory with coordinator/validation.jsonl and"
            " coordinator/test.jsonl in it"
        )
    if config.simulation.faults:
        mistakes.append("simulation.faults: found some; allowed: none, since a deployment has faults of its own")
    if mistakes:
        raise ConfigError("\n  ".join(["the configuration does not fit this federation", *mistakes]))


def unused(config: Config) -> tuple[str, ...]:
    """Keys that say something, and say it to simulations only."""
    plain = DataConfig()
    keys = ("train_records", "own_records", "central_records", "dirichlet", "held_out")
    said = [f"data.{key}" for key in keys if getattr(config.data, key) != getattr(plain, key)]
    sections: tuple[tuple[str, object, object], ...] = (
        ("compare", config.compare, CompareConfig()),
        ("tune", config.tune, TuneConfig()),
        ("simulation", config.simulation, SimulationConfig()),
    )
    return (*said, *(name for name, found, default in sections if found != default))


def settled(config: Config) -> Config:
    """The configuration with the coordinator's paths made absolute: a run may be resumed from another directory."""

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().resolve()) if path else ""

    data, model = config.data, config.model
    return replace(
        config,
        model=model if model.path == EMBEDDED else replace(model, path=absolute(model.path)),
        data=replace(
            data,
            directory=absolute(data.directory),
            coordinator=replace(data.coordinator, path=absolute(data.coordinator.path)),
        ),
    )


def gather(data: DataConfig) -> HeldOut:
    """The coordinator's validation and test; the same for the same `data` and file. Raises DataError."""
    if data.directory:
        folder = Path(data.directory).expanduser() / COORDINATOR
        found = HeldOut(*(read_jsonl(folder / f"{part}.jsonl") for part in ("validation", "test")))
        if both := {r.person for r in found.validation} & {r.person for r in found.test}:
            raise DataError(
                f"{folder}: expected nobody in both validation and test, found {len(both)} who are; put all records of"
                " a person into one of the two"
            )
        return found
    source = data.coordinator.path
    records = read_records(read_table(Path(source).expanduser()), data.coordinator)
    return HeldOut(*split_held_out(records, data.seed, source))


def keep(run: Run, records: HeldOut) -> None:
    """Writes them into the run's directory, for its owner alone. Raises StorageError."""
    for file, part in ((run.validation, records.validation), (run.test, records.test)):
        write_jsonl(file, part)
        file.chmod(0o600)
