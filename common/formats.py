"""The forms a record may have in a file, and the columns they are known by.

| form | columns | becomes |
|---|---|---|
| plain text | text | a completion without a prompt |
| prompt and completion | prompt, completion | as it stands; lists of messages in both become one chat |
| instruction | instruction, input (may be empty or missing), output | prompt: instruction, blank line, input |
| chat | messages | a chat |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from common.config import ColumnsConfig, FileConfig
from common.errors import DataError
from common.records import Record, record_of
from common.sources import Row, Table

NOBODY = "-"
"""As `person`: there is no column of persons. As the name of any other column: the form is not meant."""


@dataclass(frozen=True)
class Form:
    """needs: columns by which the form is known, as `ColumnsConfig` calls them; the last is what is learned.

    may: those it can do without. lists: whether cells may hold lists of messages in place of text.
    """

    needs: tuple[str, ...]
    may: tuple[str, ...]
    lists: bool
    read: Callable[[Mapping[str, Any]], dict[str, Any]]


def _text(cells: Mapping[str, Any]) -> dict[str, Any]:
    return {"completion": cells["text"]}


def _prompted(cells: Mapping[str, Any]) -> dict[str, Any]:
    prompt, completion = cells.get("prompt"), cells["completion"]
    if isinstance(completion, list):
        return {"messages": [*(prompt or []), *completion]}
    return {"prompt": prompt or "", "completion": completion}


def _instructed(cells: Mapping[str, Any]) -> dict[str, Any]:
    parts = [cells["instruction"], cells.get("input")]
    return {"prompt": "\n\n".join(part for part in parts if part and part.strip()), "completion": cells["output"]}


def _chat(cells: Mapping[str, Any]) -> dict[str, Any]:
    messages = cells["messages"]
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"expected JSON in `messages`, found a text that is none ({error})") from error
    return {"messages": messages}


FORMS = (
    Form(("text",), (), False, _text),
    Form(("completion",), ("prompt",), True, _prompted),
    Form(("instruction", "output"), ("input",), False, _instructed),
    Form(("messages",), (), True, _chat),
)


def read_records(table: Table, file: FileConfig) -> tuple[Record, ...]:
    """Every row of a table as a record, in order.

    Without a column of persons each record is a person of its own, known by a digest of what it says: a copy of a
    record, here or at another institution, is then the same person's and falls into the same set.

    Raises DataError: for columns that are missing, or fit more than one form; for a row without a text or a person.
    """
    form = _form(table, file)
    named = {name: getattr(file.columns, name) for name in (*form.needs, *form.may, "kind")}
    return tuple(_record(row, form, named, file.person) for row in table.rows)


def _form(table: Table, file: FileConfig) -> Form:
    columns, usual = asdict(file.columns), ColumnsConfig()
    chosen = {name: column for name, column in columns.items() if column != getattr(usual, name) and column != NOBODY}
    wanted = {f"columns.{name}": column for name, column in chosen.items()}
    if file.person != NOBODY:
        wanted["person"] = file.person
    there = f"found the columns {', '.join(table.columns)}"
    for key, column in wanted.items():
        if column not in table.columns:
            remedy = f", or {NOBODY} where every record is a person of its own" if key == "person" else ""
            raise DataError(
                f"{table.path}: expected a column {column!r:.40}, which {key} names; {there}. Set {key} to one of"
                f" these{remedy}.{_separated(table)}"
            )
    found = [form for form in FORMS if all(columns[name] in table.columns for name in form.needs)]
    if len(found) == 1:
        return found[0]
    told = "; or ".join(", ".join(columns[name] for name in form.needs) for form in (found or FORMS))
    if found:
        raise DataError(
            f"{table.path}: expected columns of one form of record, {there}, which fit several ({told}). Name those"
            f" that are not meant {NOBODY}, as in columns: {{{found[0].needs[0]}: '{NOBODY}'}}"
        )
    raise DataError(
        f"{table.path}: expected the columns of a form of record ({told}), {there}. Say what they are called, as in"
        f" columns: {{{FORMS[0].needs[0]}: {table.columns[0]}}}.{_separated(table)}"
    )


def _separated(table: Table) -> str:
    """Where a csv file seems to be separated by something else."""
    if len(table.columns) == 1 and any(sign in table.columns[0] for sign in ";\t|"):
        return " Cells are separated by commas."
    return ""


def _record(row: Row, form: Form, named: Mapping[str, str], person: str) -> Record:
    cells = {name: row.values.get(column) for name, column in named.items()}
    try:
        _check(form, cells, named)
        found = form.read(cells)
        kind = "" if cells["kind"] is None else _word(cells["kind"], named["kind"])
        found["person"] = NOBODY if person == NOBODY else _word(row.values.get(person), person)
    except ValueError as error:
        raise DataError(f"{row.where}: {error}") from error
    record = record_of({**found, **({"kind": kind} if kind else {})}, row.where)
    return _anonymous(record) if person == NOBODY else record


def _check(form: Form, cells: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Raises ValueError for a cell that holds something else than text or messages, and for nothing to learn from."""
    lists = form.lists and isinstance(cells[form.needs[-1]], list)
    for name in (*form.needs, *form.may):
        value = cells[name]
        if not (value is None or isinstance(value, list if lists else str)):
            expected = "messages" if lists else "text"
            raise ValueError(f"expected {expected} in `{named[name]}`, found {type(value).__name__}")
    learned = cells[form.needs[-1]]
    if learned is None or not (learned if lists else learned.strip()):
        raise ValueError(f"expected text in `{named[form.needs[-1]]}`, found nothing")


def _word(value: object, column: str) -> str:
    """A name or a number, as text. Raises ValueError for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # what a table makes of a column of numbers with gaps
    if isinstance(value, bool) or not isinstance(value, str | int):
        found = "nothing" if value is None else type(value).__name__
        raise ValueError(f"expected text or a whole number in `{column}`, found {found}")
    return str(value).strip()


def _anonymous(record: Record) -> Record:
    said = json.dumps([*record.texts, *(message.role for message in record.messages)])
    return replace(record, person=f"record-{hashlib.sha256(said.encode()).hexdigest()[:16]}")
