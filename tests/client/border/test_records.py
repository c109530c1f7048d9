"""Whatever is wrong with the records is refused with one code, and nobody outside can tell one thing from another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client import data_sets as data_sets_module
from common.errors import DataError
from common.messages import DATA_UNREADABLE, TrainRequest
from common.sources import read_table
from tests.client.border.changes import Failing, a_directory, unreadable
from tests.client.border.conftest import MARK, Border, Case, Make, refuses
from tests.client.guarded import ME


def a_loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


def bad_line(line: bytes) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        with file.open("ab") as handle:
            handle.write(line + b"\n")

    return damage


def of_one_person(file: Path) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "person": MARK}) + "\n" for row in rows))


RECORDS: dict[str, Callable[[Path], Any]] = {
    "missing": lambda file: file.unlink(),
    "with its whole directory": lambda file: shutil.rmtree(file.parent),
    "empty": lambda file: file.write_bytes(b""),
    "blank": lambda file: file.write_bytes(b"\n" * 17),
    "one record": lambda file: file.write_bytes(file.read_bytes().splitlines(keepends=True)[0]),
    "three records": lambda file: file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:3])),
    "of one person": of_one_person,
    "no JSON": bad_line(b'{"completion": "' + MARK.encode()),
    "too deep": bad_line(b"[" * 100_000),
    "no object": bad_line(json.dumps([MARK]).encode()),
    "no text": bad_line(json.dumps({"prompt": MARK, "person": MARK}).encode()),
    "no person": bad_line(json.dumps({"prompt": MARK, "completion": MARK, "person": [MARK]}).encode()),
    "a number too long": bad_line(b'{"completion": ' + b"9" * 5000 + b"}"),
    "not UTF-8": bad_line(b"\xff\xfe" + MARK.encode()),
    "a directory": a_directory,
    "a loop": a_loop,
    "unreadable": unreadable,
}
"""What can be wrong with a file of records; nobody outside may tell one from another."""


def while_it_is_read(border: Border) -> None:
    """The file changes between the first look at it and the last."""
    read, file = read_table, border.place.records

    def slowly(path: Path) -> Any:
        table = read(path)
        with file.open("a") as handle:
            handle.write("\n")
        return table

    border.patches.setattr(data_sets_module, "read_table", slowly)


def to_records_file(damage: Callable[[Path], Any]) -> Callable[[Border], Any]:
    return lambda border: damage(border.place.records)


OF_RECORDS = [
    *(
        Case(f"records: {told}", TrainRequest, DATA_UNREADABLE, damage=to_records_file(damage))
        for told, damage in RECORDS.items()
    ),
    Case("records: change while they are read", TrainRequest, DATA_UNREADABLE, damage=while_it_is_read),
]


@pytest.mark.parametrize("case", OF_RECORDS, ids=str)
def test_a_refusal_is_a_reason_code_and_nothing_else(case: Case, border: Make) -> None:
    refuses(case, border)


def test_what_is_wrong_with_records_cannot_be_told_from_outside(border: Make, tmp_path: Path) -> None:
    """Equal to the last byte but for the times and names of messages; all have the same size.

    What is no matter of records (a full disk, a mistake of ours) has another code of another length: that much a
    coordinator learns, and needs, to know whom to ask.
    """
    told: set[tuple[str, str]] = set()
    sizes: set[int] = set()
    for number, damage in enumerate([*RECORDS.values(), None]):
        made = border(root=tmp_path / str(number), records=30 + 7 * number)
        if damage is None:
            made.member = replace(made.member, data=Failing(DataError(f"{MARK} " * 50)))
        else:
            damage(made.place.records)
        made.ask(made.honest(TrainRequest))
        told.add((made.left[-1].wire.kind, made.left[-1].wire.text))
        sizes.add(len(made.left[-1].data))
    assert told == {("Refused", json.dumps({"reason": DATA_UNREADABLE, "name": ME, "parts": []}))}
    assert len(sizes) == 1
