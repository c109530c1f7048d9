"""Records: what an institution owns and never sends."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from common.errors import DataError
from common.files import write_text


@dataclass(frozen=True)
class Record:
    """One training or test record.

    prompt: what the model is given; may be empty (plain text). Not supervised.
    completion: what it should write. Supervised, followed by the end-of-text token.
    person: whose record it is; splits and privacy budgets go by person, and a person may have many records.
    kind: the task, such as "coding" or "note"; `evaluation.exact` names the kinds whose whole answer is scored.
    """

    prompt: str
    completion: str
    person: str
    kind: str = "text"


_FIELDS = tuple(field.name for field in fields(Record))


def read_jsonl(path: Path) -> tuple[Record, ...]:
    """Reads one JSON object a line; blank lines are passed over.

    Raises DataError, naming file and line, for a missing or empty file, a line that is not a JSON object, a record
    without a completion or a person, or a field that is not text.
    """
    try:
        # Lines end at a line feed only: str.splitlines also cuts at U+2028 and others, which JSON allows in a text.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected a jsonl file, found none; `silotune-sim data` writes one per set") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected UTF-8 text that can be read: {error}") from error
    records = tuple(_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip())
    if not records:
        raise DataError(f"{path}: expected at least one record, found none")
    return records


def _parse(line: str, where: str) -> Record:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected a JSON object, found a line that is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(found).__name__}")
    values = {"prompt": "", "kind": "text", **{name: found[name] for name in _FIELDS if name in found}}
    for name in ("completion", "person"):
        if not isinstance(values.get(name), str) or not str(values[name]).strip():
            raise DataError(f"{where}: expected text in `{name}`, found {values.get(name)!r:.40}")
    for name in ("prompt", "kind"):
        if not isinstance(values[name], str):
            raise DataError(f"{where}: expected text in `{name}`, found {type(values[name]).__name__}")
    try:
        "".join(values.values()).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: expected Unicode text, found half of a surrogate pair ({error})") from error
    return Record(**values)


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    """Writes one JSON object a line, atomically. The inverse of `read_jsonl`."""
    write_text(path, "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records))
