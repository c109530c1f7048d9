"""The records of a simulation, wherever they come from: generated, from a directory, or a file an institution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from common.config import COORDINATOR, Config, DataConfig, FileConfig, named
from common.errors import ConfigError, DataError
from common.formats import read_records
from common.records import Record, read_jsonl
from common.sources import read_table
from common.splits import Shares, split, split_held_out
from simulations.generate import federation as generator
from simulations.generate.federation import Federation, HeldOut, Splits


def gather(data: DataConfig) -> Federation:
    """All records of a federation, split by person; the same for the same `data` and files.

    Raises ConfigError for what cannot be generated, and DataError, which tells of every institution whose records
    cannot be read.
    """
    if data.directory:
        return _from_directory(data)
    if not data.generator and not data.has_files:
        raise ConfigError(
            "data: expected a generator, a directory or a path for every institution, found records that lie with the"
            " institutions; such a run needs them and a coordinator: silotune-server run"
        )
    return _from_files(data) if data.has_files else generator.generate(data)


def write(federation: Federation, out: Path) -> None:
    """Writes DIR/<institution>/{train,validation,test}.jsonl and DIR/coordinator/{validation,test}.jsonl."""
    generator.write(federation, out)


def from_now_on(config: Config, records: Path) -> Config:
    """The configuration whose records lie in `records`, as `write` left them."""
    data = replace(
        config.data,
        directory=str(records),
        institutions=named(*config.data.names),
        coordinator=FileConfig(),
    )
    return replace(config, data=data)


def _from_directory(data: DataConfig) -> Federation:
    records = Path(data.directory).expanduser().resolve()
    missing = [name for name in (*data.names, COORDINATOR) if not (records / name).is_dir()]
    if missing:
        raise DataError(
            f"data.directory: expected a folder for each institution and the coordinator in {records}, "
            f"missing: {', '.join(missing)}"
        )

    def read(name: str, part: str) -> tuple[Record, ...]:
        return read_jsonl(records / name / f"{part}.jsonl")

    return Federation(
        {name: Splits(read(name, "train"), read(name, "validation"), read(name, "test")) for name in data.names},
        HeldOut(read(COORDINATOR, "validation"), read(COORDINATOR, "test")),
    )


def _from_files(data: DataConfig) -> Federation:
    lends = not data.coordinator.path
    shares: dict[str, Shares] = {}
    central = HeldOut((), ())
    mistakes: list[str] = []
    for institution in data.institutions:
        try:
            records = _read(institution)
            shares[institution.name] = split(records, data.held_out, data.seed, lends, institution.path)
        except DataError as error:
            mistakes.append(f"{institution.name}: {error}")
    try:
        central = _lent(shares) if lends else HeldOut(*_halves(data))
    except DataError as error:
        mistakes.append(f"{COORDINATOR}: {error}")
    if mistakes:
        raise DataError("\n  ".join(["records cannot be used", *mistakes]) if len(mistakes) > 1 else mistakes[0])
    own = {name: Splits(part.train, part.validation, part.test) for name, part in shares.items()}
    return Federation(own, central)


def _read(file: FileConfig) -> tuple[Record, ...]:
    return read_records(read_table(Path(file.path).expanduser()), file)


def _halves(data: DataConfig) -> tuple[tuple[Record, ...], ...]:
    return split_held_out(_read(data.coordinator), data.seed, data.coordinator.path)


def _lent(shares: Mapping[str, Shares]) -> HeldOut:
    """What all institutions lend to the coordinator."""

    def together(parts: Sequence[tuple[Record, ...]]) -> tuple[Record, ...]:
        return tuple(record for part in parts for record in part)

    found = HeldOut(
        together([part.central_validation for part in shares.values()]),
        together([part.central_test for part in shares.values()]),
    )
    # Where an institution could not be read, that is the mistake to tell.
    if shares and not (found.validation and found.test):
        raise DataError(
            "expected the institutions to lend records for validation and test, found persons too few for that. Give"
            " more records, raise data.held_out, set data.coordinator.path, or try another data.seed"
        )
    return found
