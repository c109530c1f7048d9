"""Files of records: jsonl, csv and parquet, as tables whose every row knows where it stands.

csv and parquet are read through Hugging Face `datasets`, as streams: nothing of a file is copied to its cache or
anywhere else. jsonl is read by `common.records`, since `datasets` guesses types there: a column of days comes out as
points in time, and the text "17.50" in a column that has a number elsewhere as 17.5.
"""

from __future__ import annotations

import contextlib
import csv
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.records import read_objects

FORMATS = (".jsonl", ".csv", ".parquet")
NEWLINE = b"\n"


@dataclass(frozen=True)
class Row:
    """One record as it stands in a file. where: file and line, or file and number of the record, counted from 1."""

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A file's columns and rows, all of them, in order."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def read_table(path: Path) -> Table:
    """Reads a file of records. Every cell of a csv file is text, as it stands there.

    Leaves no copy of the file on the disk, needs no network, and passes over blank lines only.

    Raises DataError, naming file and where it can be had the line, for a file that is missing, empty, in another
    encoding than UTF-8 (a byte order mark is passed over), or not what its name says.
    """
    if path.suffix.lower() not in FORMATS:
        raise DataError(f"{path}: expected a file that ends in {', '.join(FORMATS)}")
    if not path.is_file():
        there = "a directory; name the file in it" if path.is_dir() else "none; name one that is there"
        raise DataError(f"{path}: expected a file of records, found {there}")
    match path.suffix.lower():
        case ".jsonl":
            found = read_objects(path)
            columns = tuple(dict.fromkeys(name for _, values in found for name in values))
            table = Table(path, columns, tuple(Row(where, values) for where, values in found))
        case ".csv":
            table = _csv(path)
        case _:
            table = _parquet(path)
    if not table.rows:
        raise DataError(f"{path}: expected at least one record, found none")
    return table


def _csv(path: Path) -> Table:
    from datasets import Features, IterableDataset, Value

    columns = _header(path)
    rows = _stream(
        path,
        IterableDataset.from_csv,
        # Text, and no cell that means "nothing": else 007 becomes 7, and the answer "None" no answer.
        features=Features({name: Value("string") for name in columns}),
        na_filter=False,
        # Else a first row with a cell too many shifts all columns by one.
        index_col=False,
        encoding="utf-8-sig",
    )
    return _numbered(path, rows, columns)


def _parquet(path: Path) -> Table:
    import pyarrow.parquet
    from datasets import IterableDataset

    try:
        empty = pyarrow.parquet.read_metadata(path).num_rows == 0
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from error
    return Table(path, (), ()) if empty else _numbered(path, _stream(path, IterableDataset.from_parquet))


def _header(path: Path) -> tuple[str, ...]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            columns = next((row for row in csv.reader(file) if row), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(path, error) from error
    if not columns:
        raise DataError(f"{path}: expected a first line with the names of the columns, found none")
    if doubled := sorted({name for name in columns if columns.count(name) > 1}):
        raise DataError(f"{path}: expected a name for each column, found more than one column {doubled[0]!r:.40}")
    return tuple(columns)


def _numbered(path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...] = ()) -> Table:
    columns = columns or tuple(dict.fromkeys(name for row in rows for name in row))
    return Table(path, columns, tuple(Row(f"{path}: record {number}", row) for number, row in enumerate(rows, 1)))


def _stream(path: Path, read: Callable[..., Any], **settings: Any) -> list[dict[str, Any]]:
    """All rows through `datasets`. Its locks go to a directory of their own, which is removed again.

    Not through `load_dataset`, which tells its makers of every load.
    """
    with tempfile.TemporaryDirectory(prefix="silotune-") as directory, _silence():
        # Under a plain name: brackets and stars in a path would be taken for a pattern.
        plain = Path(directory) / f"records{path.suffix.lower()}"
        plain.symlink_to(path.resolve())
        try:
            return [dict(row) for row in read(str(plain), cache_dir=directory, **settings)]
        except Exception as error:  # what is raised depends on what is wrong, and on three libraries
            raise _unreadable(path, error) from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps what `datasets` logs of a file out of our output, and makes an error of a row that pandas would cut."""
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Length of header or names does not match")
            yield
    finally:
        logger.setLevel(level)


def _unreadable(path: Path, error: Exception) -> DataError:
    """What is wrong with a file, in our words where it is one of the common mistakes."""
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UnicodeError) or ("utf-8" in said.lower() and path.suffix.lower() == ".csv"):
        return DataError(f"{path}: expected UTF-8, found other bytes{_line_of_other_bytes(path)}; save it as UTF-8")
    if width := re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", said):
        expected, line, found = width.groups()
        return DataError(
            f"{path}:{line}: expected {expected} cells, as many as there are columns, found {found}; a text that holds"
            " a comma stands in quotation marks"
        )
    if "Length of header" in said:
        return DataError(
            f"{path}: expected as many cells in a row as there are columns, found more; a text that holds a comma"
            " stands in quotation marks"
        )
    return DataError(f"{path}: expected a {path.suffix[1:]} file that can be read: {said:.300}")


def _line_of_other_bytes(path: Path) -> str:
    content = path.read_bytes()
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return f" in line {content.count(NEWLINE, 0, error.start) + 1}"
    return ""
