"""`data.yaml`: which file stands behind the name of a data set, and which machine trains on it.

A coordinator sends names only. Records are read from where they lie, split by person in memory, and copied nowhere.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from client import yaml_file
from client.policy_file import NAME
from common.base_model import EMBEDDED
from common.config import FileConfig, ModelConfig
from common.config_rules import RULES, Rule
from common.errors import DataError, Refusal
from common.formats import NOBODY, read_records
from common.policy_reasons import DATA_SET_UNKNOWN
from common.records import Record, read_jsonl
from common.sources import read_table
from common.splits import SETS, Shares, split


@dataclass(frozen=True)
class DataSet(FileConfig):
    """A file of records with its split. held_out: share of its persons in each of validation and test."""

    held_out: float = 0.1
    seed: int = 1


@dataclass(frozen=True)
class Machine:
    """The machine that trains. row_tokens: most tokens that go through the model at a time; it bounds memory."""

    model: str = "embedded"
    device: str = "auto"
    dtype: str = "auto"
    weights: str = "full"
    row_tokens: int = 8192

    def config(self) -> ModelConfig:
        """How this machine holds the base model."""
        return ModelConfig(self.model, self.device, self.dtype, self.weights)


@dataclass(frozen=True)
class DataFile:
    """What `data.yaml` says."""

    data_sets: Mapping[str, DataSet] = field(default_factory=dict)
    machine: Machine = field(default_factory=Machine)


@dataclass(frozen=True)
class RecordSet:
    """One set of a data set: of equal ones, all but the records is equal, and that is what is compared.

    version: differs when the file does. where: what the institution's own log calls it.
    """

    where: str
    version: str
    records: tuple[Record, ...] = field(compare=False, repr=False)


class RecordSource(Protocol):
    """Where an institution has its records from."""

    def find(self, data_set: str, part: str) -> RecordSet:
        """One set (`train`, `validation` or `test`) of the data set of that name.

        Raises Refusal(data_set_unknown) and DataError.
        """


class DataSets:
    """The data sets of one institution.

    Each file's records stay in memory, split, until the file is another one (by device, inode, size and time of its
    last change) or another process reads them. Nothing of them is written anywhere.
    """

    def __init__(self, file: DataFile, folder: Path) -> None:
        """folder: where relative paths of `file` begin."""
        self._file = file
        self._folder = folder
        self._lock = threading.Lock()
        self._read: dict[str, tuple[str, Shares]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names that a coordinator may say, in order."""
        return tuple(self._file.data_sets)

    @property
    def without_persons(self) -> tuple[str, ...]:
        """Those of them of which nobody knows whose a record is, so that each is taken for a person of its own."""
        return tuple(name for name, spec in self._file.data_sets.items() if spec.person == NOBODY)

    def find(self, data_set: str, part: str) -> RecordSet:
        """One set of a data set, split as a simulation splits that file for a coordinator with records of its own.

        Raises Refusal(data_set_unknown) for a name that has no file, and DataError for a file that is missing, empty,
        not readable or not what was said of it, that has too few persons, or that changed while it was read.
        """
        if part not in SETS:
            raise ValueError(f"expected one of {', '.join(SETS)}, found {part!r}")
        if data_set not in self._file.data_sets:
            raise Refusal(DATA_SET_UNKNOWN, f"no data set is called {data_set!r:.80}; there are {self.names}")
        spec = self._file.data_sets[data_set]
        path = path_of(spec, self._folder)
        with self._lock:
            version = _version(path)
            if data_set not in self._read or self._read[data_set][0] != version:
                self._read.pop(data_set, None)  # the former records need not stay in memory meanwhile
                records = read_records(read_table(path), spec)
                if _version(path) != version:
                    raise DataError(f"{path}: changed while it was read; try again when nobody writes to it")
                shares = split(records, spec.held_out, spec.seed, lends=False, source=f"data set {data_set}")
                self._read[data_set] = (version, shares)
            return RecordSet(f"{data_set}/{part}", version, getattr(self._read[data_set][1], part))


class RecordFolder:
    """A directory with a jsonl file for each set, as a simulation writes them; it has them under any name."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def find(self, data_set: str, part: str) -> RecordSet:
        """Raises DataError for a file that is missing or not readable."""
        file = self._directory / f"{part}.jsonl"
        version = _version(file)
        return RecordSet(str(file), version, read_jsonl(file))


def path_of(spec: DataSet, folder: Path) -> Path:
    """Where a data set's file lies; folder: where relative paths begin."""
    return folder / Path(spec.path).expanduser()


def _version(path: Path) -> str:
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected a file of records, found none; name one that is there") from error
    except OSError as error:
        raise DataError(f"{path}: expected a file of records that can be read: {error.strerror}") from error
    return f"{found.st_dev}-{found.st_ino}-{found.st_size}-{found.st_mtime_ns}"


# --- The file -----------------------------------------------------------------------------------------------------

_OWN = "data_sets.*."
_RULES: Mapping[str, Rule] = {
    "data_sets": Rule(
        "a name of a-z, 0-9, - and _, a letter or digit first, at most 64 characters",
        lambda name: re.fullmatch(NAME, name) is not None,
    ),
    f"{_OWN}held_out": RULES["data.held_out"],
    f"{_OWN}seed": RULES["data.seed"],
    **{
        f"{_OWN}{key.removeprefix('data.coordinator.')}": rule
        for key, rule in RULES.items()
        if key.startswith("data.coordinator.")
    },
    f"{_OWN}path": Rule(
        "the path of a jsonl, csv or parquet file",
        lambda path: bool(path) and path == path.strip() and "${" not in path,
    ),
    "machine.model": RULES["model.path"],
    "machine.device": RULES["model.device"],
    "machine.dtype": RULES["model.dtype"],
    "machine.weights": RULES["model.weights"],
    "machine.row_tokens": RULES["train.row_tokens"],
}

TEMPLATE = """\
# The records and the machine of this institution. A coordinator sends the names of data sets, never a path.
# What is left out has the value that stands here.

# By name. policy.yaml says in data_sets which of them may be trained on. Take the signs away and put in your own:
data_sets:
#  notes:
#    # A jsonl, csv or parquet file; read where it lies, never copied. A relative path begins at this file's folder.
#    path: /srv/records/notes.jsonl
#    # The column that says whose record it is: splits go by person. `-`: every record is a person of its own,
#    # and runs that protect patients are refused.
#    person: person
#    # What the file calls its columns, where it is not text, prompt, completion, instruction, input, output, messages
#    # and kind. `-`: that form is not meant.
#    columns: {prompt: question, completion: answer}
#    # Share of the persons that is kept for validation, and as much again for test; never trained on.
#    held_out: 0.1
#    # Another number puts other persons into the sets.
#    seed: 1

machine:
  # `embedded`, or the local directory of the base model; `silotune-client fingerprint DIR` prints what it is.
  model: embedded
  # cpu, cuda, or auto: CUDA where there is one.
  device: auto
  # Of the base model's arithmetic: float32, bfloat16, or auto: bfloat16 on CUDA that has it.
  dtype: auto
  # How the frozen base model is kept: full, or 8bit or 4bit on CUDA.
  weights: full
  # Most tokens that go through the model at a time: less needs less memory. Results stay the same but for dropout.
  row_tokens: 8192
"""


def write_template(path: Path, data_sets: Mapping[str, str] | None = None, model: str = Machine.model) -> None:
    """Writes a data file with every field explained, and what is given here. data_sets: files by name.

    Raises ConfigError when there is a file already or a value cannot be meant, StorageError when it cannot be written.
    """
    told = "".join(f"  {json.dumps(name)}:\n    path: {json.dumps(file)}\n" for name, file in (data_sets or {}).items())
    text = TEMPLATE.replace("data_sets:\n", f"data_sets:\n{told}", 1)
    if model != Machine.model:
        text = text.replace(f"model: {Machine.model}\n", f"model: {json.dumps(model)}\n", 1)
    yaml_file.parse(text, str(path), DataFile, _RULES)
    yaml_file.write_new(path, text)


def read(path: Path) -> DataFile:
    """What the file says; a relative path of the base model begins at its folder.

    Raises ConfigError that tells every mistake; whether the records can be read is not asked.
    """
    found = yaml_file.read(path, DataFile, _RULES)
    if found.machine.model == EMBEDDED:
        return found
    model = path.parent.absolute() / Path(found.machine.model).expanduser()
    return replace(found, machine=replace(found.machine, model=str(model)))


def open_data_sets(path: Path) -> DataSets:
    """The data sets of the file `path`, relative paths beginning at its folder. Raises as `read`."""
    return DataSets(read(path), path.parent)
