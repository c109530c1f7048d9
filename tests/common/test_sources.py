"""Files as other programs write them: every value as it stands there, every mistake told, nothing left behind."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from common.sources import Table, read_table

ROOT = Path(__file__).resolve().parents[2]
SECRET = "patient-4711-has-a-fever"


def write(file: Path, rows: list[dict[str, Any]], encoding: str = "utf-8", end: str = "\n") -> Path:
    match file.suffix:
        case ".jsonl":
            file.write_bytes("".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode(encoding))
        case ".csv":
            with file.open("w", encoding=encoding, newline="") as handle:
                writer = csv.DictWriter(handle, list(rows[0]), lineterminator=end)
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
    return file


def values(table: Table) -> list[dict[str, Any]]:
    return [dict(row.values) for row in table.rows]


# Programs agree on no more than this in a csv cell: no lone carriage return, no zero byte.
texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from('\n,";\t\ufeff'), min_size=1)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@settings(max_examples=25)
@given(rows=st.lists(st.fixed_dictionaries({"text": texts, "person": texts}), min_size=1, max_size=5))
def test_a_file_is_read_as_it_was_written(
    suffix: str, rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    table = read_table(write(tmp_path_factory.mktemp("file") / f"records{suffix}", rows))
    assert values(table) == rows
    assert set(table.columns) == {"text", "person"}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_byte_order_marks_and_ends_of_lines_do_not_matter(suffix: str, encoding: str, end: str, tmp_path: Path) -> None:
    rows = [{"text": "é", "person": "a"}, {"text": "x\ny", "person": "b"}]
    assert values(read_table(write(tmp_path / f"records{suffix}", rows, encoding, end))) == rows


def test_nothing_is_guessed_of_a_cell(tmp_path: Path) -> None:
    """What `datasets` and pandas do to these by themselves: a time, a number, nothing."""
    rows = [{"text": text, "person": "007"} for text in ("2024-01-01", "17.50", "None", "NA", "true", "1e3", " x ")]
    assert values(read_table(write(tmp_path / "records.csv", rows))) == rows
    mixed = [*rows, {"text": "x", "person": 8}]
    assert values(read_table(write(tmp_path / "records.jsonl", mixed))) == mixed
    days = [{"text": "2024-01-01", "person": "a"}] * 2
    assert values(read_table(write(tmp_path / "days.jsonl", days))) == days


def test_numbers_and_nested_values_of_parquet_stay_what_they_are(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}], "person": 17, "ward": None}] * 2
    assert values(read_table(write(tmp_path / "records.parquet", rows))) == rows


def test_rows_know_their_place(tmp_path: Path) -> None:
    rows = [{"text": "a\nb", "person": "p"}, {"text": "c", "person": "p"}]
    file = write(tmp_path / "records.csv", rows)
    assert [row.where for row in read_table(file).rows] == [f"{file}: record 1", f"{file}: record 2"]
    file = write(tmp_path / "records.jsonl", rows, end="\n\n")
    assert [row.where for row in read_table(file).rows] == [f"{file}:1", f"{file}:3"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_a_path_with_signs_of_a_pattern_is_that_file_alone(suffix: str, tmp_path: Path) -> None:
    place = tmp_path / "wards [1-3] *?" / "Notes (final)"
    place.mkdir(parents=True)
    assert len(read_table(write(place / f"my records{suffix}", [{"text": "a", "person": "p"}])).rows) == 1


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("r.csv", "", "expected a first line with the names of the columns"),
        ("r.csv", "text,person\n", "expected at least one record, found none"),
        ("r.csv", "text,text\na,b\n", "found more than one column 'text'"),
        ("r.csv", "text,person\na,1\nb,2,3\n", r"r.csv:3: expected 2 cells.*found 3"),
        ("r.csv", "text,person\nb,2,3\n", "expected as many cells in a row as there are columns, found more"),
        ("r.csv", 'text,person\n"a,1\n', "expected a csv file that can be read: .*EOF inside string"),
        ("r.csv", "text,person\na,1\né,2\n".encode("latin-1"), "expected UTF-8, found other bytes in line 3"),
        ("r.csv", "text,person\na,1\n".encode("utf-16"), "expected UTF-8, found other bytes in line 1"),
        ("r.jsonl", '{"text": "é"}\n'.encode("latin-1"), "expected UTF-8, found other bytes in line 1"),
        ("r.jsonl", '{"text": "a"}\n{"text": \n', "r.jsonl:2: expected a JSON object, found a line that is not JSON"),
        ("r.jsonl", '[{"text": "a"}]', "r.jsonl:1: expected a JSON object, found list"),
        ("r.jsonl", "\n", "expected at least one record, found none"),
        ("r.parquet", b"nonsense", "expected a parquet file that can be read"),
        ("r.parquet", b"", "expected a parquet file that can be read"),
        ("r.xlsx", b"PK", "expected a file that ends in .jsonl, .csv, .parquet"),
    ],
)
def test_every_mistake_is_told_with_the_file(name: str, content: str | bytes, told: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=re.escape(str(tmp_path)) + ".*" + told):
        read_table(file)


def test_an_empty_parquet_file_and_files_that_are_none(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="expected at least one record"):
        read_table(tmp_path / "empty.parquet")
    with pytest.raises(DataError, match=r"nowhere\.csv: expected a file of records, found none"):
        read_table(tmp_path / "nowhere.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="found a directory"):
        read_table(tmp_path / "folder.csv")


def test_a_short_row_has_empty_cells(tmp_path: Path) -> None:
    """Whether that matters is for whoever knows which cells a record needs."""
    (tmp_path / "r.csv").write_text("text,person\na\nb,2\n")
    assert values(read_table(tmp_path / "r.csv"))[0] == {"text": "a", "person": ""}


@pytest.mark.parametrize("broken", [False, True])
def test_no_copy_stays_on_the_disk_and_no_network_is_asked_for(broken: bool, tmp_path: Path) -> None:
    """Of a file that can be read, and of one that cannot: caches and temporary directories are looked through."""
    write(tmp_path / "r.jsonl", [{"text": SECRET, "person": "p"}])
    write(tmp_path / "r.parquet", [{"text": SECRET, "person": "p"}])
    (tmp_path / "r.csv").write_text(f"text,person\n{SECRET},p\n" + ("one,cell,more\n" if broken else ""))
    home = tmp_path / "home"
    (home / "tmp").mkdir(parents=True)
    code = (
        "import socket\n"
        "def refuse(*_, **__): raise SystemExit('asked for a network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from pathlib import Path; from common.sources import read_table; from common.errors import DataError\n"
        "for name in ('r.jsonl', 'r.parquet', 'r.csv'):\n"
        f"    try:\n        print(len(read_table(Path({str(tmp_path)!r}) / name).rows))\n"
        "    except DataError as error:\n        print(error)\n"
    )
    places = {name: str(home) for name in ("HOME", "HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=home,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TMPDIR": str(home / "tmp"), **places},
        capture_output=True,
        text=True,
        check=True,
    )
    *read, last = done.stdout.splitlines()
    assert read == ["1", "1"]
    assert (last == "1") is not broken
    assert list((home / "tmp").iterdir()) == []
    left = [file for file in home.rglob("*") if file.is_file()]
    assert not [file for file in left if SECRET.encode() in file.read_bytes()]
    assert not [file for file in left if file.suffix in (".arrow", ".lock")]
    assert SECRET not in done.stderr
