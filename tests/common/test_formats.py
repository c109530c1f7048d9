"""Columns to records: four forms, each known by its columns, and every way to get them wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.config import ColumnsConfig, FileConfig
from common.errors import DataError
from common.formats import read_records
from common.records import Message, Record
from common.sources import Row, Table

FILE = FileConfig(path="notes.jsonl", person="patient")
CHAT = [{"role": "user", "content": "fever?"}, {"role": "assistant", "content": "J10"}]
MESSAGES = (Message("user", "fever?"), Message("assistant", "J10"))


def read(rows: list[dict[str, Any]], file: FileConfig = FILE) -> tuple[Record, ...]:
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    return read_records(
        Table(Path("notes.jsonl"), columns, tuple(Row(f"notes.jsonl:{n}", row) for n, row in enumerate(rows, 1))), file
    )


def read_one(file: FileConfig = FILE, **cells: Any) -> Record:
    (record,) = read([{"patient": "p", **cells}], file)
    return record


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({"text": "a fever"}, Record("", "a fever", "p")),
        ({"prompt": "a", "completion": "b"}, Record("a", "b", "p")),
        ({"prompt": None, "completion": "b"}, Record("", "b", "p")),
        ({"completion": "b"}, Record("", "b", "p")),
        ({"instruction": "code", "output": "b"}, Record("code", "b", "p")),
        ({"instruction": "code", "input": "a", "output": "b"}, Record("code\n\na", "b", "p")),
        ({"instruction": "code", "input": "", "output": "b"}, Record("code", "b", "p")),
        ({"instruction": "code", "input": None, "output": "b"}, Record("code", "b", "p")),
        ({"messages": CHAT}, Record.of_chat(MESSAGES, "p")),
        ({"messages": json.dumps(CHAT)}, Record.of_chat(MESSAGES, "p")),  # as in a csv cell
        ({"messages": [{**part, "name": None} for part in CHAT]}, Record.of_chat(MESSAGES, "p")),  # as in parquet
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, Record.of_chat(MESSAGES, "p")),
        ({"text": "a", "kind": "note"}, Record("", "a", "p", "note")),
        ({"text": "a", "kind": None}, Record("", "a", "p", "text")),
        ({"text": "a", "kind": ""}, Record("", "a", "p", "text")),
        ({"text": "a", "ward": 3, "date": object()}, Record("", "a", "p")),
        ({"text": "a", "patient": 17}, Record("", "a", "17")),
        ({"text": "a", "patient": 17.0}, Record("", "a", "17")),
        ({"text": "a", "patient": " 17 "}, Record("", "a", "17")),
    ],
)
def test_every_form(cells: dict[str, Any], expected: Record) -> None:
    assert read_one(**cells) == expected


def test_columns_by_other_names() -> None:
    file = replace(FILE, columns=ColumnsConfig(prompt="question", completion="answer", kind="task"))
    assert read_one(file, question="a", answer="b", task="t", prompt=3) == Record("a", "b", "p", "t")


def test_a_form_that_is_not_meant_can_be_named_so() -> None:
    cells = {"instruction": "a", "output": "b", "text": "a b"}  # as Alpaca has it
    with pytest.raises(DataError, match=r"fit several \(text; or instruction, output\).*columns: \{text: '-'\}"):
        read_one(**cells)
    assert read_one(replace(FILE, columns=ColumnsConfig(text="-")), **cells) == Record("a", "b", "p")


@pytest.mark.parametrize(
    ("cells", "file", "told"),
    [
        (
            {"note": "a"},
            FILE,
            r"expected the columns of a form .*found the columns patient, note.*columns: \{text: pat",
        ),
        ({"prompt": "a"}, FILE, "expected the columns of a form"),
        ({"instruction": "a"}, FILE, "expected the columns of a form"),
        (
            {"text": "a"},
            replace(FILE, person="mrn"),
            "expected a column 'mrn', which person names; found .*patient, text",
        ),
        ({"text": "a"}, replace(FILE, columns=ColumnsConfig(text="note")), "'note', which columns.text names"),
        ({"text": "a"}, replace(FILE, columns=ColumnsConfig(kind="task")), "'task', which columns.kind names"),
        # The other form that is there is not what was asked for.
        ({"text": "a"}, replace(FILE, columns=ColumnsConfig(messages="chat")), "'chat', which columns.messages names"),
    ],
)
def test_columns_that_are_missing_are_told_with_those_that_are_there(
    cells: dict[str, Any], file: FileConfig, told: str
) -> None:
    with pytest.raises(DataError, match=f"notes.jsonl: {told}|{told}"):
        read_one(file, **cells)


def test_a_file_separated_by_something_else_is_told_so() -> None:
    with pytest.raises(DataError, match="Cells are separated by commas"):
        read([{"patient;text": "p;a"}])


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        ({"text": None}, "expected text in `text`, found nothing"),
        ({"text": " \n"}, "expected text in `text`, found nothing"),
        ({"text": 3}, "expected text in `text`, found int"),
        ({"prompt": "a", "completion": ""}, "expected text in `completion`, found nothing"),
        ({"prompt": 3, "completion": "b"}, "expected text in `prompt`, found int"),
        ({"prompt": "a", "completion": CHAT[1:]}, "expected messages in `prompt`, found str"),
        ({"prompt": CHAT[:1], "completion": "b"}, "expected text in `prompt`, found list"),
        ({"instruction": "a", "output": None}, "expected text in `output`, found nothing"),
        ({"instruction": "a", "input": ["x"], "output": "b"}, "expected text in `input`, found list"),
        ({"messages": []}, "expected text in `messages`, found nothing"),
        ({"messages": "user: hi"}, "expected JSON in `messages`, found a text that is none"),
        ({"messages": '"hi"'}, "expected `messages` as a list"),
        (
            {"messages": [{"from": "human", "value": "a"}]},
            "expected a role of system, user, assistant, found None among f",
        ),
        ({"messages": [{"role": "function", "content": "a"}]}, "found 'function'"),
        ({"messages": [{"role": "assistant", "content": None}]}, "expected text in `content`, found NoneType"),
        ({"messages": CHAT[:1]}, "an answer of the assistant, found none"),
        ({"text": "a", "patient": None}, "expected text or a whole number in `patient`, found nothing"),
        ({"text": "a", "patient": "  "}, "expected text in `person`, found ''"),
        ({"text": "a", "patient": True}, "expected text or a whole number in `patient`, found bool"),
        ({"text": "a", "patient": 1.5}, "expected text or a whole number in `patient`, found float"),
        ({"text": "a", "kind": ["x"]}, "expected text or a whole number in `kind`, found list"),
        ({"text": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_a_row_that_cannot_be_learned_from_is_told_with_its_place(cells: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError) as caught:
        read(
            [
                {"text": "a", "patient": "p"} if "text" in cells else {**cells, **GOOD[min(cells)]},
                {"patient": "p", **cells},
            ]
        )
    assert str(caught.value).startswith("notes.jsonl:2: ")
    assert told in str(caught.value)


GOOD: dict[str, dict[str, Any]] = {
    "completion": {"prompt": "a", "completion": "b", "patient": "p"},
    "input": {"instruction": "a", "input": "b", "output": "c", "patient": "p"},
    "instruction": {"instruction": "a", "output": "c", "patient": "p"},
    "messages": {"messages": CHAT, "patient": "p"},
}


def test_without_persons_each_record_is_one_and_its_copy_is_the_same() -> None:
    rows = [{"text": text} for text in ("a", "b", "a")]
    one, two, copy = read(rows, replace(FILE, person="-"))
    assert one == copy
    assert one.person != two.person
    assert "a" not in {one.person, two.person}
    (elsewhere,) = read(rows[:1], FileConfig(path="other.csv", person="-"))
    assert elsewhere.person == one.person
