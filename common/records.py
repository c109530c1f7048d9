"""Records: what an institution owns and never sends."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.files import write_text

SYSTEM, USER, ASSISTANT = ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn of a chat. role: `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True)
class Record:
    """One training or test record: a prompt and its completion, or a chat.

    prompt: what the model is given; may be empty (plain text). Not supervised.
    completion: what it should write. Supervised, followed by the end-of-text token. Of a chat, the last answer.
    person: whose record it is; splits and privacy budgets go by person, and a person may have many records.
    kind: the task, such as "coding" or "note"; `evaluation.exact` names the kinds whose whole answer is scored.
    messages: all turns of a chat, of which every answer is supervised; empty for any other record.
    """

    prompt: str
    completion: str
    person: str
    kind: str = "text"
    messages: tuple[Message, ...] = ()

    @classmethod
    def of_chat(cls, messages: Sequence[Message], person: str, kind: str = "text") -> Record:
        """A chat with at least one answer."""
        answers = [message.content for message in messages if message.role == ASSISTANT]
        return cls("", answers[-1], person, kind, tuple(messages))

    @property
    def texts(self) -> tuple[str, ...]:
        """All that the model reads or writes, in order."""
        if self.messages:
            return tuple(message.content for message in self.messages)
        return (self.prompt, self.completion)


_TEXTS = tuple(field.name for field in fields(Record) if field.name != "messages")


def read_jsonl(path: Path) -> tuple[Record, ...]:
    """Reads one JSON object a line, with `completion` or `messages`, and `person`; blank lines are passed over.

    Raises DataError, naming file and line, for a missing or empty file, a line that is not a JSON object, a record
    without a completion or a person, or a field that is not text.
    """
    records = tuple(record_of(found, where) for where, found in read_objects(path))
    if not records:
        raise DataError(f"{path}: expected at least one record, found none")
    return records


def read_objects(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The JSON object of each line that is not blank, with `file:line`. Raises DataError as `read_jsonl` does."""
    try:
        # Lines end at a line feed only: str.splitlines also cuts at U+2028 and others, which JSON allows in a text.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected a jsonl file, found none; `silotune-sim data` writes one per set") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}: expected UTF-8, found other bytes in line {line} ({error.reason})") from error
    except OSError as error:
        raise DataError(f"{path}: expected UTF-8 text that can be read: {error}") from error
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def _parse(line: str, where: str) -> tuple[str, dict[str, Any]]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected a JSON object, found a line that is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(found).__name__}")
    return where, found


def record_of(found: Mapping[str, Any], where: str) -> Record:
    """A record from fields of any type. Raises DataError, which begins with `where`, when one is missing or wrong."""
    if "messages" in found:
        if "completion" in found or found.get("prompt"):
            raise DataError(f"{where}: expected `messages`, or `prompt` and `completion`; found both")
        messages = messages_of(found["messages"], where)
        answer = next((message.content for message in reversed(messages) if message.role == ASSISTANT), "")
        found = {**found, "completion": answer, "prompt": ""}
        if not answer.strip():
            raise DataError(f"{where}: expected `messages` with an answer of the {ASSISTANT}, found none to learn from")
    else:
        messages = ()
    values = {"prompt": "", "kind": "text", **{name: found[name] for name in _TEXTS if name in found}}
    for name in ("completion", "person"):
        if not isinstance(values.get(name), str) or not str(values[name]).strip():
            raise DataError(f"{where}: expected text in `{name}`, found {values.get(name)!r:.40}")
    for name in ("prompt", "kind"):
        if not isinstance(values[name], str):
            raise DataError(f"{where}: expected text in `{name}`, found {type(values[name]).__name__}")
    record = Record(**values, messages=messages)
    try:
        "".join((*record.texts, record.person, record.kind)).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: expected Unicode text, found half of a surrogate pair ({error})") from error
    return record


def messages_of(found: object, where: str) -> tuple[Message, ...]:
    """A list of {role, content}. Raises DataError for anything else, and for a system message that is not the first."""
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        raise DataError(f"{where}: expected `messages` as a list of {{role, content}}, found {found!r:.40}")
    messages = tuple(_message(part, f"{where}: message {number}") for number, part in enumerate(found, 1))
    late = [number for number, message in enumerate(messages, 1) if message.role == SYSTEM and number > 1]
    if late:
        raise DataError(f"{where}: message {late[0]}: expected the {SYSTEM}'s message first, found it here")
    return messages


def _message(found: object, where: str) -> Message:
    if not isinstance(found, Mapping):
        raise DataError(f"{where}: expected {{role, content}}, found {type(found).__name__}")
    # Tables fill what other messages have with nothing.
    given = {key: value for key, value in found.items() if value is not None}
    role, content = given.get("role"), given.get("content")
    if role not in ROLES:
        keys = f" among {', '.join(sorted(map(str, given)))}" if role is None else ""
        raise DataError(f"{where}: expected a role of {', '.join(ROLES)}, found {role!r:.40}{keys}")
    if not isinstance(content, str):
        raise DataError(f"{where}: expected text in `content`, found {type(content).__name__}")
    return Message(role, content)


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    """Writes one JSON object a line, atomically. The inverse of `read_jsonl`."""
    write_text(path, "".join(json.dumps(_plain(record), ensure_ascii=False) + "\n" for record in records))


def _plain(record: Record) -> dict[str, Any]:
    """Without what the record does not have, so that a file holds one form or the other."""
    absent = ("prompt", "completion") if record.messages else ("messages",)
    return {name: value for name, value in asdict(record).items() if name not in absent}
