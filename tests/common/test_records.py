"""Records on disk: what is written comes back, and every error names file and line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from common.records import ASSISTANT, SYSTEM, USER, Message, Record, read_jsonl, write_jsonl

GOOD = '{"prompt": "p", "completion": "c", "person": "n"}'
# Where str.splitlines cuts, and JSON does not.
SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"

texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(SEPARATORS + "\r\n\ufeff"))
filled = texts.filter(str.strip)
prompted = st.builds(Record, prompt=texts, completion=filled, person=filled, kind=texts)
chats = st.builds(
    lambda system, turns, answer, person, kind: Record.of_chat(
        [*system, *turns, Message(ASSISTANT, answer)], person, kind
    ),
    st.lists(st.builds(Message, st.just(SYSTEM), texts), max_size=1),
    st.lists(st.builds(Message, st.sampled_from([USER, ASSISTANT]), texts), max_size=3),
    filled,
    filled,
    texts,
)
records = prompted | chats


def read(directory: Path, content: str | bytes) -> tuple[Record, ...]:
    file = directory / "train.jsonl"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_jsonl(file)


@settings(max_examples=40)  # each writes to disk, synced
@given(st.lists(records, min_size=1, max_size=4))
def test_what_is_written_comes_back(found: list[Record]) -> None:
    with TemporaryDirectory() as directory:
        file = Path(directory) / "new" / "train.jsonl"
        write_jsonl(file, found)
        assert read_jsonl(file) == tuple(found)
        assert file.read_bytes().count(b"\n") == len(found)


@pytest.mark.parametrize("separator", SEPARATORS)
def test_a_line_separator_inside_a_text_ends_no_line(tmp_path: Path, separator: str) -> None:
    text = f"one{separator}two"
    record = Record(text, text, text, text)
    write_jsonl(tmp_path / "train.jsonl", [record, record])
    assert read_jsonl(tmp_path / "train.jsonl") == (record, record)


@pytest.mark.parametrize("separator", SEPARATORS)
def test_nor_does_it_shift_the_number_of_a_line(tmp_path: Path, separator: str) -> None:
    if separator >= "\x20":  # others may stand in JSON only when escaped
        first = json.dumps({"completion": f"a{separator}b", "person": "n"}, ensure_ascii=False)
        with pytest.raises(DataError, match=r"train\.jsonl:2: "):
            read(tmp_path, f"{first}\n{{\n")
    else:
        with pytest.raises(DataError, match=r"train\.jsonl:1: .*not JSON"):
            read(tmp_path, f'{{"completion": "a{separator}b", "person": "n"}}\n')


def test_defaults_and_fields_of_others(tmp_path: Path) -> None:
    found = read(tmp_path, '{"completion": "c", "person": "n", "ward": 3}\n')
    assert found == (Record(prompt="", completion="c", person="n", kind="text"),)


@pytest.mark.parametrize(
    "content",
    [
        f"{GOOD}\n{GOOD}",
        f"{GOOD}\r\n{GOOD}\r\n",
        f"\ufeff{GOOD}\n{GOOD}\n",
        f"\n\n{GOOD}\n  \t\n{GOOD}\n\n\n",
        f"\ufeff\r\n{GOOD}\r\n\r\n{GOOD}",
        f"  {GOOD}  \n\t{GOOD}\n",
    ],
    ids=["no last end of line", "CRLF", "byte order mark", "blank lines", "all of Windows", "indented"],
)
def test_files_as_other_programs_write_them(tmp_path: Path, content: str) -> None:
    assert read(tmp_path, content) == (Record("p", "c", "n"),) * 2


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "not JSON"),
        (GOOD[:-1], "not JSON"),
        (GOOD + GOOD, "not JSON"),
        (f"{GOOD},", "not JSON"),
        ("'p'", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("9" * 5000, "not JSON"),
        ("[]", "expected a JSON object, found list"),
        ("null", "found NoneType"),
        ('"text"', "found str"),
        ("{}", "expected text in `completion`, found None"),
        ('{"prompt": "p", "person": "n"}', "expected text in `completion`, found None"),
        ('{"completion": "c"}', "expected text in `person`, found None"),
        ('{"completion": "", "person": "n"}', "expected text in `completion`, found ''"),
        ('{"completion": " \\n", "person": "n"}', "expected text in `completion`"),
        ('{"completion": "c", "person": "\\t"}', "expected text in `person`"),
        ('{"completion": "c", "person": 17}', "expected text in `person`, found 17"),
        ('{"completion": ["c"], "person": "n"}', "expected text in `completion`"),
        ('{"completion": "c", "person": "n", "prompt": null}', "expected text in `prompt`, found NoneType"),
        ('{"completion": "c", "person": "n", "kind": 3}', "expected text in `kind`, found int"),
        ('{"completion": "c \\ud800", "person": "n"}', "half of a surrogate pair"),
        ('{"messages": [], "person": "n"}', "expected `messages` as a list of {role, content}, found []"),
        ('{"messages": "hello", "person": "n"}', "expected `messages` as a list of {role, content}, found 'hello'"),
        ('{"messages": [3], "person": "n"}', "message 1: expected {role, content}, found int"),
        (
            '{"messages": [{"from": "gpt"}], "person": "n"}',
            "expected a role of system, user, assistant, found None amon",
        ),
        ('{"messages": [{"role": "tool", "content": ""}], "person": "n"}', "found 'tool'"),
        ('{"messages": [{"role": "user"}], "person": "n"}', "message 1: expected text in `content`, found NoneType"),
        ('{"messages": [{"role": "user", "content": "a"}], "person": "n"}', "an answer of the assistant, found none"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "person": "n"}',
            "message 2: expected the system's message first",
        ),
        ('{"messages": [{"role": "assistant", "content": " "}], "person": "n"}', "found none to learn from"),
        ('{"messages": [{"role": "assistant", "content": "b"}]}', "expected text in `person`, found None"),
        ('{"messages": [{"role": "assistant", "content": "b"}], "completion": "c", "person": "n"}', "found both"),
        ('{"messages": [{"role": "assistant", "content": "\\ud800"}], "person": "n"}', "half of a surrogate pair"),
    ],
)
def test_every_mistake_is_told_with_file_and_line(tmp_path: Path, line: str, told: str) -> None:
    for before, number in (("", 1), (f"{GOOD}\n\n{GOOD}\r\n", 4)):
        with pytest.raises(DataError, match=rf"train\.jsonl:{number}: .*{re.escape(told)}") as caught:
            read(tmp_path, f"{before}{line}\n{GOOD}\n")
        assert len(str(caught.value)) < 400  # of a record no more is shown than tells which it is


def test_a_byte_order_mark_between_two_joined_files_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:2: .*not JSON"):
        read(tmp_path, f"\ufeff{GOOD}\n\ufeff{GOOD}\n")


@pytest.mark.parametrize("content", ["", "\n", " \r\n\t\n", "\ufeff"])
def test_a_file_without_records_is_an_error(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl: expected at least one record, found none"):
        read(tmp_path, content)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe{\x00", GOOD.encode("utf-16"), GOOD.replace("p", "\xe9").encode("latin-1")]
)
def test_another_encoding_is_an_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl: expected UTF-8"):
        read(tmp_path, content)


def test_another_encoding_is_told_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found other bytes in line 3"):
        read(tmp_path, f"{GOOD}\n\n".encode() + GOOD.replace("p", "\xe9").encode("latin-1"))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: expected a jsonl file, found none"):
        read_jsonl(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"can be read: .*directory"):
        read_jsonl(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="can be read"):
        read_jsonl(tmp_path / "file" / "train.jsonl")
