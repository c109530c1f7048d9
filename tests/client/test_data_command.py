"""`silotune-client data`: it reads what training would, in every form of the guide."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner, Result

import client.main

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "operating.md"
ROWS = [{"mrn": 17, "question": "Fever, cough.", "answer": "J10"}, {"mrn": 18, "question": "Rash.", "answer": "L20"}]
OTHER = ("--person", "mrn", "--column", "prompt=question", "--column", "completion=answer")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(client.main.app, ["data", *map(str, arguments)])


def summary(*arguments: object) -> dict[str, Any]:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    ((_, found),) = json.loads(result.stdout)["files"].items()
    return dict(found)


def examples() -> list[str]:
    """The guide's lines of jsonl."""
    return re.findall(r"^\| [^|]+ \| `[^|]+ \| `(\{.*\})` \|$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_guide_has_an_example_of_every_form() -> None:
    assert len(examples()) == 4


@pytest.mark.parametrize("line", examples())
def test_the_guides_own_examples_are_read(line: str, tmp_path: Path) -> None:
    file = tmp_path / "notes.jsonl"
    file.write_text(line + "\n")
    found = summary(file)
    assert (found["records"], found["people"], found["kinds"]) == (1, 1, {"text": 1})
    assert found["characters"] > 0


def jsonl(file: Path) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def table(file: Path) -> None:
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)


def parquet(file: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)


@pytest.mark.parametrize(("name", "write"), [("a.jsonl", jsonl), ("a.csv", table), ("a.parquet", parquet)])
def test_every_format_is_read_with_columns_of_other_names(
    name: str, write: Callable[[Path], None], tmp_path: Path
) -> None:
    write(tmp_path / name)
    found = summary(tmp_path / name, *OTHER)
    assert (found["records"], found["people"], found["characters"]) == (2, 2, len("Fever, cough.J10Rash.L20"))


def test_without_a_column_of_persons_every_record_is_one(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert summary(file, "--person", "-")["people"] == 2
    refused = call(file)
    assert refused.exit_code == 3
    assert "expected a column 'person', which person names" in refused.stderr


@pytest.mark.parametrize("said", [["question"], ["prompt="], ["note=a"], ["text=a", "text=b"]])
def test_what_names_no_column_is_refused(said: list[str], tmp_path: Path) -> None:
    refused = call(tmp_path / "a.jsonl", *(word for one in said for word in ("--column", one)))
    assert refused.exit_code == 2
    assert "--column: expected NAME=COLUMN, each name once and of text, prompt," in refused.stderr


def test_a_file_that_is_missing_is_told_without_a_word_of_simulations(tmp_path: Path) -> None:
    refused = call(tmp_path / "notes.jsonl")
    assert refused.exit_code == 3
    assert "notes.jsonl: expected a file of records, found none; name one that is there" in refused.stderr
    assert "silotune-sim" not in refused.stderr
    assert "found a directory; name the file in it" in call(_directory(tmp_path / "d.csv")).stderr


def _directory(path: Path) -> Path:
    path.mkdir()
    return path
