"""The egress log: what it says of what left, that no change to it goes unnamed, and that no crash spoils it."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from client import chain, egress
from client.egress import (
    ADDED,
    ALTERED,
    CUT_OFF,
    HEAD,
    HEAD_WRONG,
    MOVED,
    REMOVED,
    EgressLog,
    Entry,
    Finding,
    Payload,
    Verdict,
    beginning,
    export,
    open_copy,
    read_entry,
    verify,
)
from common.errors import ConfigError, StorageError
from common.secagg.identity import Identity
from common.wire import Wire, size

ROOT = Path(egress.__file__).parents[1]
ALDER = Identity("alder", Ed25519PrivateKey.from_private_bytes(b"a" * 32))
BIRCH = Identity("birch", Ed25519PrivateKey.from_private_bytes(b"b" * 32))
NOON = datetime(2030, 1, 31, 12, tzinfo=UTC)
ONE_FILE = 1 << 20
COUNT = 6
PRELUDE = """\
import sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from client.egress import *
from common.secagg.identity import Identity
identity = Identity("alder", Ed25519PrivateKey.from_private_bytes(b"a" * 32))
"""
"""Of a process of its own, which may be killed or have limits."""


def log_in(directory: Path, largest: int = ONE_FILE, identity: Identity = ALDER) -> EgressLog:
    return EgressLog(directory, identity, largest, lambda: NOON)


def message(number: int) -> Payload:
    return Payload.of_bytes(b"x" * number)


def record(log: EgressLog, number: int) -> Entry:
    return log.record("MaskedInput", message(number), "run", number, number, "masked input")


def written(directory: Path, count: int = COUNT, largest: int = ONE_FILE) -> Path:
    """A log of so many entries, whose file is returned."""
    log = log_in(directory, largest)
    log.mend()
    for number in range(1, count + 1):
        record(log, number)
    return directory / "egress-000000000001.jsonl"


@lru_cache(maxsize=8)
def lines_of(count: int = COUNT) -> tuple[bytes, ...]:
    """The lines of such a log, and its head as the last one."""
    with TemporaryDirectory() as directory:
        file = written(Path(directory) / "egress", count)
        lines = file.read_bytes().splitlines(keepends=True) if count else []
        return *lines, (file.parent / HEAD).read_bytes()


def verdict(lines: bytes, head: bytes = lines_of()[-1], identity: Identity = ALDER) -> Verdict:
    """Of a log with such a file and such a head."""
    with TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "egress-000000000001.jsonl").write_bytes(lines)
        (directory / HEAD).write_bytes(head)
        return verify(open_copy(directory), identity.public)


def finding(lines: bytes, head: bytes = lines_of()[-1]) -> Finding:
    found = verdict(lines, head).finding
    assert found is not None
    return found


def whole(directory: Path, entries: int) -> bool:
    found = verify(open_copy(directory), ALDER.public)
    return (found.finding, found.entries, found.cut_off, found.ahead) == (None, entries, 0, False)


# --- What is written


def test_an_entry_says_what_left_and_is_chained_and_signed(tmp_path: Path) -> None:
    log = log_in(tmp_path / "egress")
    first = log.record("Keys", Payload.of_bytes(b"abc"), "run-1", 3, 7, "keys", epsilon=0.25)
    second = log.record("Refused", Payload.of_bytes(b""))
    assert first == replace(
        Entry(1, "2030-01-31T12:00:00.000Z", "Keys", "run-1", 3, 7, "keys", 3, "", 0.25, beginning(ALDER.public)),
        sha256=hashlib.sha256(b"abc").hexdigest(),
        hash=first.hash,
        signature=first.signature,
    )
    assert (second.number, second.previous, second.run, second.epsilon) == (2, first.hash, "", 0.0)
    for entry in (first, second):
        assert entry.hash == hashlib.sha256(entry.statement()).hexdigest()
        Ed25519PublicKey.from_public_bytes(ALDER.public).verify(bytes.fromhex(entry.signature), entry.statement())
    lines = (tmp_path / "egress" / "egress-000000000001.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["bytes"] for line in lines] == [3, 0]
    assert [read_entry(line + b"\n") for line in lines] == [first, second]


def test_every_field_of_an_entry_is_signed() -> None:
    entry = read_entry(lines_of()[0])
    assert entry is not None
    for name in set(Entry.__dataclass_fields__) - {"hash", "signature"}:
        value = getattr(entry, name)
        changed = replace(entry, **{name: value + "x" if isinstance(value, str) else value + 1})
        assert changed.statement() != entry.statement(), name


def test_the_directory_is_its_owners_alone(tmp_path: Path) -> None:
    log_in(tmp_path / "egress")
    assert (tmp_path / "egress").stat().st_mode & 0o777 == 0o700
    (tmp_path / "egress").chmod(0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        log_in(tmp_path / "egress")


def test_entry_and_head_are_synced_before_the_message_may_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file's content at the moment it was synced, in order."""
    synced: list[tuple[str, bytes]] = []
    original = os.fsync

    def fsync(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").resolve()
        synced.append((path.name, path.read_bytes() if path.is_file() else b""))
        original(handle)

    log = log_in(tmp_path / "egress")
    record(log, 1)
    monkeypatch.setattr(os, "fsync", fsync)
    record(log, 2)
    directory = tmp_path / "egress"
    content = (directory / "egress-000000000001.jsonl").read_bytes()
    assert synced == [
        ("egress-000000000001.jsonl", content),
        (f".{HEAD}.partial", (directory / HEAD).read_bytes()),
        ("egress", b""),
    ]


@given(
    text=st.text(max_size=5),
    kind=st.text(max_size=5),
    array=st.lists(st.integers(0, 255), max_size=5),
    other=st.tuples(st.text(max_size=5), st.text(max_size=5), st.lists(st.integers(0, 255), max_size=5)),
)
def test_the_digest_of_a_message_is_over_all_of_it(
    text: str, kind: str, array: list[int], other: tuple[str, str, list[int]]
) -> None:
    def wire(kind: str, text: str, values: list[int], dtype: type[np.generic] = np.uint32, name: str = "array") -> Wire:
        return Wire(kind, text, {name: np.array(values, dtype)})

    found = Payload.of_wire(wire(kind, text, array))
    assert found.size == size(wire(kind, text, array))
    assert found == Payload.of_wire(wire(kind, text, array))
    assert (found == Payload.of_wire(wire(*other))) == ((kind, text, array) == other)
    for different in (wire(kind, text, array, np.float32), wire(kind, text, array, name="b"), Wire(kind, text)):
        assert Payload.of_wire(different).sha256 != found.sha256


def test_arrays_that_are_not_contiguous_have_the_digest_of_their_values() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert Payload.of_wire(Wire("a", "", {"x": values.T})) == Payload.of_wire(Wire("a", "", {"x": values.T.copy()}))
    assert Payload.of_wire(Wire("a", "", {"x": values.T})) != Payload.of_wire(Wire("a", "", {"x": values}))


@pytest.mark.parametrize("epsilon", [float("nan"), float("inf")])
def test_what_cannot_be_written_down_does_not_leave(epsilon: float, tmp_path: Path) -> None:
    log = log_in(tmp_path / "egress")
    with pytest.raises(ValueError, match="JSON"):
        log.record("Keys", message(1), epsilon=epsilon)
    with pytest.raises(ValueError, match="the log's own kind"):
        log.record(CUT_OFF, message(1))
    record(log, 1)
    assert whole(tmp_path / "egress", 1)


# --- Logs of before

OF_BEFORE = """\
{"number":1,"time":"2030-01-31T12:00:00.000Z","kind":"Keys","run":"run-1","round":3,"attempt":7,"phase":"keys","bytes":3,"sha256":"ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad","epsilon":0.25,"previous":"0f6264045d31d45a4dbc9ad9ad9ea689dc59ed2b264affad11a5a0b35a5e76cb","hash":"110ad501b6e2debfa4b4de3ed1eca4902587b36a47b2e95c7dfdd72590e02e28","signature":"06ef9693c88c9e25c621e86323a4e3af9975143c6e9a4d80e4af2174864a98ea1721f4d56bd5aeb84235afe0039195873cec3caf2d142409a4600448af94b904"}
{"number":2,"ti#
{"number":2,"time":"2030-01-31T12:00:00.000Z","kind":"log.cut_off","run":"","round":0,"attempt":0,"phase":"","bytes":17,"sha256":"afb48387eaaf675e98c10f5b34f6f8cee40a23badcaa9201f742ce9ef472ac35","epsilon":0.0,"previous":"110ad501b6e2debfa4b4de3ed1eca4902587b36a47b2e95c7dfdd72590e02e28","hash":"2adb76ee99f1d207912bc68b8054f5958a79c38ff5414c34ea76d8ee4e92a99e","signature":"a9fae1253f71561ec44c4e5d1d319e0cb969f7c1d940a32486c86c3a2f5b492fdee6f94d6c6a059dd6df927ae44b1232360b039700d897b4d8009c3a7db63302"}
{"number":3,"time":"2030-01-31T12:00:00.000Z","kind":"Refused","run":"","round":0,"attempt":0,"phase":"","bytes":0,"sha256":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","epsilon":0.0,"previous":"2adb76ee99f1d207912bc68b8054f5958a79c38ff5414c34ea76d8ee4e92a99e","hash":"6095e03f7a3ebc1c97a13a24f6dbee76990aec62011ffe147d7bb9ba41b1bb9d","signature":"984db63c46cb8cc6ebb2dcaa812e7080b032201e8590262f5d46d91bcd5c5ee974b12d4c9efdd2187085cbc17a9d8740105adaac6578a8b02dee333f41536204"}
{"institution":"alder","public":"af06a3e3291714e4f356c19c9b15cd1951ec6e6662aa77be07547f289383341d","count":3,"hash":"6095e03f7a3ebc1c97a13a24f6dbee76990aec62011ffe147d7bb9ba41b1bb9d","file":"egress-000000000001.jsonl","size":1532,"signature":"492edb85fc35b46c4053829607122797c60b41f7cdce7d951222746893180555b857023a2d64d77cb92534360af5d120b5a07ae95b07a9647456006b9026d602"}
"""
"""As the first release wrote it: an entry, a line that was cut off, two entries more, and the head of the export."""


def test_logs_that_were_written_before_stay_valid_and_are_written_the_same(tmp_path: Path) -> None:
    log = log_in(tmp_path / "egress")
    log.record("Keys", Payload.of_bytes(b"abc"), "run-1", 3, 7, "keys", epsilon=0.25)
    with (tmp_path / "egress" / "egress-000000000001.jsonl").open("ab") as handle:
        handle.write(b'{"number":2,"ti')
    log.record("Refused", Payload.of_bytes(b""))
    export(tmp_path / "egress", tmp_path / "now.jsonl")
    assert (tmp_path / "now.jsonl").read_text() == OF_BEFORE
    found = verify(open_copy(tmp_path / "now.jsonl"), ALDER.public)
    assert (found.finding, found.entries) == (None, 3)


# --- Rotation


@settings(max_examples=30, deadline=None)
@given(largest=st.integers(0, 3000), count=st.integers(0, 8))
def test_rotation_at_any_boundary_keeps_the_chain(largest: int, count: int) -> None:
    """Clock, key and messages are the same, so the files are the one file, cut between lines."""
    with TemporaryDirectory() as name:
        directory = Path(name) / "egress"
        written(directory, count, largest)
        files = sorted(directory.glob("*.jsonl"))
        assert b"".join(file.read_bytes() for file in files) == b"".join(lines_of(8)[:count])
        for file in files:
            lines = file.read_bytes().splitlines(keepends=True)
            assert len(lines) == 1 or file.stat().st_size <= largest
            first = read_entry(lines[0])
            assert first is not None
            assert file.name == f"egress-{first.number:012d}.jsonl"
        if count:
            assert whole(directory, count)


def test_a_rotated_file_that_goes_missing_is_named(tmp_path: Path) -> None:
    directory = tmp_path / "egress"
    written(directory, 6, largest=1100)
    files = sorted(directory.glob("*.jsonl"))
    assert len(files) == 3
    for file, expected in zip(files, (1, 3, 5), strict=True):
        content = file.read_bytes()
        file.unlink()
        found = verify(open_copy(directory), ALDER.public).finding
        assert found is not None
        assert (found.kind, found.number) == (REMOVED, expected)
        file.write_bytes(content)
    assert whole(directory, 6)


# --- Changes, all named


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_byte_is_altered_its_entry_is_named(data: st.DataObject) -> None:
    lines = lines_of()[:-1]
    number = data.draw(st.integers(0, COUNT - 1))
    place = data.draw(st.integers(0, len(lines[number]) - 1) | st.just(len(lines[number]) - 1))
    byte = data.draw(st.integers(0, 255) | st.sampled_from(b'\n\r #0e{}"')).to_bytes()
    if lines[number][place : place + 1] == byte:
        return
    altered = lines[number][:place] + byte + lines[number][place + 1 :]
    found = finding(b"".join([*lines[:number], altered, *lines[number + 1 :]]))
    assert (found.kind, found.number, found.where) == (ALTERED, number + 1, f"egress-000000000001.jsonl:{number + 1}")


@pytest.mark.parametrize("name", sorted(set(Entry.__dataclass_fields__) - {"hash", "signature"}))
@pytest.mark.parametrize("signer", [None, BIRCH])
def test_whatever_field_is_altered_with_care_its_entry_is_named(name: str, signer: Identity | None) -> None:
    """The hash made anew; the signature left as it was, or made with another key."""
    lines = list(lines_of()[:-1])
    entry = read_entry(lines[2])
    assert entry is not None
    value = getattr(entry, name)
    entry = replace(entry, **{name: value + "0" if isinstance(value, str) else value + 1})
    entry = replace(entry, hash=hashlib.sha256(entry.statement()).hexdigest())
    if signer is not None:
        entry = replace(entry, signature=signer.sign(entry.statement()).hex())
    lines[2] = (json.dumps(entry.as_dict(), separators=(",", ":")) + "\n").encode()
    assert read_entry(lines[2]) == entry
    found = finding(b"".join(lines))
    assert (found.kind, found.number) == (ALTERED, 3)


def test_an_entry_in_another_form_is_altered() -> None:
    """The same fields and values, with spaces or in another order."""
    lines = list(lines_of()[:-1])
    fields = json.loads(lines[1])
    for other in (json.dumps(fields), json.dumps(dict(reversed(fields.items())), separators=(",", ":"))):
        assert finding(b"".join([lines[0], other.encode() + b"\n", *lines[2:]])).number == 2


@given(first=st.integers(0, COUNT - 1), length=st.integers(1, COUNT))
def test_whatever_entries_are_removed_the_first_is_named(first: int, length: int) -> None:
    lines = lines_of()[:-1]
    found = finding(b"".join(lines[:first] + lines[first + length :]))
    assert (found.kind, found.number) == (REMOVED, first + 1)
    last = min(first + length, COUNT)
    assert (f"entry {first + 1} was" if last == first + 1 else f"entries {first + 1} to {last} were") in found.said


@settings(max_examples=100)
@given(cut=st.integers(0, sum(map(len, lines_of()[:-1])) - 1))
def test_wherever_the_end_is_cut_off_the_first_lost_entry_is_named(cut: int) -> None:
    lines = lines_of()[:-1]
    ends = list(itertools.accumulate(map(len, lines)))
    kept = sum(end <= cut for end in ends)
    found = finding(b"".join(lines)[:cut])
    assert (found.kind, found.number) == (REMOVED if cut in (0, *ends) else ALTERED, kept + 1)


@given(
    place=st.integers(0, COUNT),
    line=st.binary(max_size=20).map(lambda data: data.replace(b"\n", b""))
    | st.sampled_from([b"{}", b"", b"[1]", b"#x"]),
)
def test_wherever_a_line_is_added_it_is_named(place: int, line: bytes) -> None:
    lines = lines_of()[:-1]
    if place == COUNT and line.endswith(b"#"):
        return  # what a crash leaves; it is told apart from a whole log all the same
    found = finding(b"".join([*lines[:place], line + b"\n", *lines[place:]]))
    assert (found.kind, found.number, found.where) == (ADDED, place + 1, f"egress-000000000001.jsonl:{place + 1}")


@given(place=st.integers(0, COUNT), copied=st.integers(0, COUNT - 1))
def test_a_copy_of_an_entry_is_named_wherever_it_stands(place: int, copied: int) -> None:
    lines = lines_of()[:-1]
    found = finding(b"".join([*lines[:place], lines[copied], *lines[place:]]))
    assert (found.kind, found.number) == (ADDED, copied + 1)
    expected = place if place not in (copied, copied + 1) else copied + 1  # beside itself, the second is the copy
    assert found.where == f"egress-000000000001.jsonl:{expected + 1}"


def test_an_entry_of_another_institution_is_named(tmp_path: Path) -> None:
    lines = lines_of()[:-1]
    other = log_in(tmp_path / "egress", identity=BIRCH)
    for number in range(1, 4):
        record(other, number)
    foreign = (tmp_path / "egress" / "egress-000000000001.jsonl").read_bytes().splitlines(keepends=True)
    added, replaced = finding(b"".join([*lines, foreign[2]])), finding(b"".join([*lines[:2], foreign[2], *lines[3:]]))
    assert (added.kind, added.number) == (ADDED, COUNT + 1)
    assert (replaced.kind, replaced.number) == (ALTERED, 3)


@given(pair=st.lists(st.integers(0, COUNT - 1), min_size=2, max_size=2, unique=True))
def test_whatever_entries_are_swapped_the_first_is_named(pair: list[int]) -> None:
    lines = list(lines_of()[:-1])
    first, second = sorted(pair)
    lines[first], lines[second] = lines[second], lines[first]
    found = finding(b"".join(lines))
    assert (found.kind, found.number) == (MOVED, first + 1)


def test_entries_of_a_log_that_was_put_back_and_went_on_otherwise_do_not_mix(tmp_path: Path) -> None:
    """Both histories are signed by the institution, and each entry fits its own alone."""
    logs = []
    for name, second in (("one", 2), ("other", 20)):
        log = log_in(tmp_path / name)
        for number in (1, second, 3):
            record(log, number)
        file = tmp_path / name / "egress-000000000001.jsonl"
        logs.append((file.read_bytes().splitlines(keepends=True), (tmp_path / name / HEAD).read_bytes()))
    (lines, head), (others, _) = logs
    assert lines[0] == others[0]
    found = finding(b"".join([lines[0], others[1], lines[2]]), head)
    assert (found.kind, found.number) == (ALTERED, 3)
    found = finding(b"".join(others), head)
    assert (found.kind, found.number, found.where) == (ALTERED, 3, HEAD)


@settings(max_examples=100)
@given(data=st.data())
def test_whatever_byte_of_the_head_is_altered_it_is_named(data: st.DataObject) -> None:
    *lines, head = lines_of()
    place = data.draw(st.integers(0, len(head) - 1))
    byte = data.draw(st.integers(0, 255)).to_bytes()
    if head[place : place + 1] != byte:
        found = finding(b"".join(lines), head[:place] + byte + head[place + 1 :])
        assert (found.kind, found.where) == (HEAD_WRONG, HEAD)


@pytest.mark.parametrize("name", ["institution", "public", "count", "hash", "file", "size"])
def test_every_field_of_the_head_is_signed(name: str) -> None:
    *lines, head = lines_of()
    fields = json.loads(head)
    value = {"public": BIRCH.public.hex(), "hash": "0" * 64, "file": "egress-2.jsonl"}.get(name, fields[name])
    fields[name] = value + 1 if isinstance(value, int) else value if value != fields[name] else f"{value}x"
    changed = (json.dumps(fields, separators=(",", ":")) + "\n").encode()
    assert finding(b"".join(lines), changed).kind == HEAD_WRONG


def test_a_missing_head_and_an_earlier_one_are_named(tmp_path: Path) -> None:
    *lines, head = lines_of()
    directory = tmp_path / "egress"
    written(directory)
    (directory / HEAD).unlink()
    found = verify(open_copy(directory), ALDER.public).finding
    assert found is not None
    assert found.kind == HEAD_WRONG
    for count in range(COUNT - 1):
        found = finding(b"".join(lines), lines_of(count)[-1])
        assert (found.kind, found.number) == (HEAD_WRONG, count + 1)
    # One entry more than the head knows is what a crash leaves.
    assert verdict(b"".join(lines), lines_of(COUNT - 1)[-1]) == replace(verdict(b"".join(lines), head), ahead=True)


def test_an_altered_entry_is_named_before_an_altered_head() -> None:
    *lines, head = lines_of()
    found = finding(b"".join([lines[0], b"x" + lines[1][1:], *lines[2:]]), head[:-1])
    assert (found.kind, found.number) == (ALTERED, 2)


def test_with_another_key_nothing_is_whole() -> None:
    found = verdict(b"".join(lines_of()[:-1]), identity=BIRCH)
    assert found.entries == 0
    assert found.finding is not None


def test_what_no_log_shows_by_itself_an_export_shows(tmp_path: Path) -> None:
    """Files and head put back together to an earlier state: whole, and shorter than the export."""
    earlier = lines_of(3)
    assert verdict(b"".join(earlier[:-1]), earlier[-1]).finding is None
    directory = tmp_path / "egress"
    written(directory)
    export(directory, tmp_path / "kept.jsonl")
    kept = verify(open_copy(tmp_path / "kept.jsonl"), ALDER.public)
    assert (kept.finding, kept.entries) == (None, COUNT)


# --- Crashes


class Killed(BaseException):
    """The process ends here."""


@settings(max_examples=60, deadline=None)
@given(
    crashes=st.lists(st.tuples(st.booleans(), st.floats(0, 1)) | st.none(), max_size=10),
    largest=st.sampled_from([0, 1100, ONE_FILE]),
)
def test_a_crash_at_any_byte_spoils_nothing(crashes: list[tuple[bool, float] | None], largest: int) -> None:
    """Each message goes through, or ends at a share of the bytes of what is written, or before the head is.

    While a crash is mended the next one may come.
    """
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        directory = Path(name) / "egress"
        original_append, original_write = chain.append_line, chain.write_bytes
        plan: list[tuple[bool, float] | None] = []

        def append(path: Path, line: str) -> None:
            crash = plan.pop(0) if plan else None
            if crash is not None and not crash[0]:
                data = (line + "\n").encode()
                with path.open("ab") as handle:
                    handle.write(data[: round(crash[1] * len(data))])
                raise Killed
            original_append(path, line)
            if crash is not None:
                patch.setattr(chain, "write_bytes", killed)

        def killed(path: Path, data: bytes) -> None:
            patch.setattr(chain, "write_bytes", original_write)
            raise Killed

        left: list[int] = []
        patch.setattr(chain, "append_line", append)
        for number, crash in enumerate(crashes, 1):
            plan[:] = [crash]
            with suppress(Killed):
                left.append(record(log_in(directory, largest), number).attempt)
            if (directory / HEAD).exists():
                found = verify(open_copy(directory), ALDER.public)
                assert found.finding is None
        plan.clear()
        left.append(record(log_in(directory, largest), 99).attempt)
        entries = [entry for line in open_copy(directory).lines() if (entry := read_entry(line.raw)) is not None]
        assert whole(directory, len(entries))
        recorded = [entry.attempt for entry in entries if entry.kind != CUT_OFF]
        assert set(left) <= set(recorded)  # what left was written down, and at most what crashed besides
        assert len(set(recorded)) == len(recorded)


def torn(directory: Path, cut: int) -> bytes:
    """A log of three entries, and the beginning of a fourth."""
    file = written(directory, 3)
    beginning_of_fourth = lines_of()[3][:cut]
    with file.open("ab") as handle:
        handle.write(beginning_of_fourth)
    return beginning_of_fourth


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(1, len(lines_of()[3]) - 1))
def test_a_line_that_was_cut_off_stays_and_is_explained(cut: int) -> None:
    with TemporaryDirectory() as name:
        directory = Path(name) / "egress"
        said = torn(directory, cut)
        found = verify(open_copy(directory), ALDER.public)
        assert found == replace(found, entries=3, cut_off=cut, ahead=False, finding=None)
        assert record(log_in(directory), 4).number == 5
        assert whole(directory, 5)
        lines = (directory / "egress-000000000001.jsonl").read_bytes().splitlines(keepends=True)
        assert lines[3] == said + b"#\n"
        note = read_entry(lines[4])
        assert note is not None
        assert (note.number, note.kind, note.size) == (4, CUT_OFF, cut + 2)
        assert note.sha256 == hashlib.sha256(said + b"#\n").hexdigest()


def test_a_line_that_was_cut_off_can_be_neither_altered_nor_removed_nor_given_to_another_entry(tmp_path: Path) -> None:
    directory = tmp_path / "egress"
    torn(directory, 50)
    record(log_in(directory), 4)
    head = (directory / HEAD).read_bytes()
    lines = (directory / "egress-000000000001.jsonl").read_bytes().splitlines(keepends=True)
    assert verdict(b"".join(lines), head).finding is None
    for changed, kind, number in (
        ([*lines[:3], lines[3][:9] + b"x" + lines[3][10:], *lines[4:]], ALTERED, 4),
        ([*lines[:3], *lines[4:]], REMOVED, 4),
        ([*lines[:2], lines[3], lines[2], *lines[4:]], ADDED, 3),
        ([*lines[:3], lines[4], lines[3], *lines[5:]], REMOVED, 4),
        ([*lines[:3], lines[3], lines[3], *lines[4:]], ALTERED, 4),
    ):
        found = finding(b"".join(changed), head)
        assert (found.kind, found.number) == (kind, number)


def test_an_entry_that_the_head_does_not_know_is_taken_in(tmp_path: Path) -> None:
    directory = tmp_path / "egress"
    for largest in (ONE_FILE, 0):
        place = directory / str(largest)
        written(place, 3, largest)
        before = (place / HEAD).read_bytes()
        record(log_in(place, largest), 4)
        (place / HEAD).write_bytes(before)
        assert verify(open_copy(place), ALDER.public).ahead
        assert log_in(place).mend().count == 4
        assert whole(place, 4)
        assert record(log_in(place, largest), 5).number == 5
        assert whole(place, 5)


def test_a_new_file_that_nothing_was_written_to_is_no_harm(tmp_path: Path) -> None:
    directory = tmp_path / "egress"
    written(directory, 3)
    (directory / "egress-000000000004.jsonl").touch()
    assert whole(directory, 3)
    for number in (4, 5):
        record(log_in(directory, ONE_FILE if number == 4 else 0), number)
        assert whole(directory, number)
    assert len(list(directory.glob("*.jsonl"))) == 2


def test_a_process_that_is_killed_again_and_again_leaves_a_log_that_is_whole(tmp_path: Path) -> None:
    """What it says has left is in the log, however it ended."""
    code = (
        f"{PRELUDE}"
        "log = EgressLog(Path(sys.argv[1]), identity, 1500)\n"
        "while True: print(log.record('Keys', Payload.of_bytes(b'x')).hash, flush=True)\n"
    )
    directory = tmp_path / "egress"
    left: set[str] = set()
    for count in (1, 2, 3, 5, 8, 13):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(directory)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(count):
            left.add(process.stdout.readline().strip())
        process.send_signal(signal.SIGKILL)
        left |= {line.strip() for line in process.stdout if line.endswith("\n")}
        process.wait()
        process.stdout.close()
        assert verify(open_copy(directory), ALDER.public).finding is None
    log_in(directory).mend()
    entries = [read_entry(line.raw) for line in open_copy(directory).lines()]
    assert left <= {entry.hash for entry in entries if entry is not None}
    assert verify(open_copy(directory), ALDER.public).finding is None
    assert len(left) >= 32


# --- When it cannot be written


def test_without_room_for_an_entry_nothing_leaves_and_later_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "egress"
    log = log_in(directory)
    record(log, 1)

    def full(*_: Any) -> None:
        raise StorageError("no space left")

    for name in ("append_line", "write_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(chain, name, full)
            with pytest.raises(StorageError, match="no space left"):
                record(log, 2)
        assert verify(open_copy(directory), ALDER.public).finding is None
    record(log, 3)
    assert whole(directory, 3)


def test_a_disk_that_fills_in_mid_line_leaves_nothing_of_it(tmp_path: Path) -> None:
    """A real limit of the operating system, on the size of a file."""
    code = (
        f"{PRELUDE}import resource, signal\nfrom common.errors import StorageError\n"
        "log = EgressLog(Path(sys.argv[1]), identity)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1200, resource.RLIM_INFINITY))\n"
        "for number in range(1, 9):\n"
        "    try: print(log.record('Keys', Payload.of_bytes(b'x')).number)\n"
        "    except StorageError as error: print('refused')\n"
    )
    directory = tmp_path / "egress"
    done = subprocess.run(
        [sys.executable, "-c", code, str(directory)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    said = done.stdout.split()
    assert said == ["1", "2", *["refused"] * 6]
    assert whole(directory, 2)
    record(log_in(directory), 3)
    assert whole(directory, 3)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _extend(data: bytes) -> Callable[[Path], None]:
    def extend(file: Path) -> None:
        file.write_bytes(file.read_bytes() + data)

    return extend


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("egress-000000000001.jsonl", _cut),
        ("egress-000000000001.jsonl", Path.unlink),
        ("egress-000000000001.jsonl", _extend(b"{}\n")),
        ("egress-000000000001.jsonl", _extend(b"\n")),
        ("egress-000000000001.jsonl", _extend(lines_of()[2])),
        ("egress-000000000001.jsonl", _extend(lines_of()[3] + lines_of()[4])),
        ("egress-000000000001.jsonl", _extend(lines_of()[4])),
        (HEAD, _cut),
        (HEAD, Path.unlink),
        (HEAD, lambda file: file.write_bytes(lines_of(1)[-1]) and None),
    ],
)
def test_after_a_log_that_was_tampered_with_nothing_leaves(
    name: str, change: Callable[[Path], None], tmp_path: Path
) -> None:
    directory = tmp_path / "egress"
    written(directory, 3)
    change(directory / name)
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    with pytest.raises(StorageError, match="nothing leaves"):
        record(log_in(directory), 4)
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before


@pytest.mark.parametrize(
    ("end", "newer", "content"),
    [
        (b"", 4, b"{}\n"),
        (b"", 5, lines_of()[3]),
        (b"", 4, lines_of()[4]),
        (b"", 5, lines_of()[3][:20]),
        (lines_of()[3][:20], 4, lines_of()[3]),
        (lines_of()[3], 5, lines_of()[4]),
    ],
)
def test_after_a_file_that_was_put_there_nothing_leaves(end: bytes, newer: int, content: bytes, tmp_path: Path) -> None:
    directory = tmp_path / "egress"
    file = written(directory, 3)
    file.write_bytes(file.read_bytes() + end)
    (directory / f"egress-{newer:012d}.jsonl").write_bytes(content)
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    with pytest.raises(StorageError, match="nothing leaves"):
        record(log_in(directory), 4)
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before


def test_a_line_that_was_added_is_not_taken_for_one_that_was_cut_off(tmp_path: Path) -> None:
    """Even with the beginning of an entry behind it."""
    directory = tmp_path / "egress"
    file = written(directory, 3)
    file.write_bytes(file.read_bytes() + b"{}\n" + lines_of()[3][:50])
    found = verify(open_copy(directory), ALDER.public).finding
    assert found is not None
    assert (found.kind, found.number) == (ADDED, 4)
    with pytest.raises(StorageError, match="nothing leaves"):
        record(log_in(directory), 4)


def test_a_log_of_another_identity_is_not_gone_on_with(tmp_path: Path) -> None:
    written(tmp_path / "egress", 2)
    with pytest.raises(StorageError, match="signed by another identity"):
        record(log_in(tmp_path / "egress", identity=BIRCH), 3)


# --- Many at once


def test_threads_keep_one_chain(tmp_path: Path) -> None:
    directory = tmp_path / "egress"
    shared, failures = log_in(directory, 2000), []

    def work(own: EgressLog) -> None:
        try:
            for number in range(10):
                record(own, number)
        except BaseException as error:
            failures.append(error)

    logs = [shared, shared, log_in(directory, 2000), log_in(directory, 1)]
    threads = [threading.Thread(target=work, args=(log,)) for log in logs]
    for thread in threads:
        thread.start()
    # Who reads meanwhile finds a log that is whole, but for the entry that is being written.
    while any(thread.is_alive() for thread in threads):
        if (directory / HEAD).exists():
            assert verify(open_copy(directory), ALDER.public).finding is None
    for thread in threads:
        thread.join()
    assert failures == []
    assert whole(directory, 40)


def test_processes_keep_one_chain(tmp_path: Path) -> None:
    code = (
        f"{PRELUDE}"
        "log = EgressLog(Path(sys.argv[1]), identity, 3000)\n"
        "sys.stdin.read()\n"
        "for number in range(20): log.record('Keys', Payload.of_bytes(b'x'))\n"
    )
    directory = tmp_path / "egress"
    command = [sys.executable, "-c", code, str(directory)]
    processes = [subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE) for _ in range(3)]
    for process in processes:  # all begin when all are ready
        assert process.stdin is not None
        process.stdin.close()
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert whole(directory, 60)


def test_entries_that_are_written_while_a_log_is_opened_are_no_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the head was read and before the files are looked at, and again."""
    directory = tmp_path / "egress"
    written(directory, 2)
    original, rounds = chain.Form.files, iter(range(2))

    def files(form: chain.Form[Entry], path: Path) -> list[Path]:
        for number in range(3 * (next(rounds, None) is not None)):
            with monkeypatch.context() as patch:
                patch.setattr(chain.Form, "files", original)
                record(log_in(directory), number)
        return original(form, path)

    monkeypatch.setattr(chain.Form, "files", files)
    found = verify(open_copy(directory), ALDER.public)
    assert (found.finding, found.entries) == (None, 8)


# --- Copies


def test_an_export_is_the_log_and_its_head(tmp_path: Path) -> None:
    directory, file = tmp_path / "egress", tmp_path / "log.jsonl"
    for number in range(1, 5):
        record(log_in(directory, 1100), number)
    torn_line = lines_of()[4][:40]
    with max(directory.glob("*.jsonl")).open("ab") as handle:
        handle.write(torn_line)
    record(log_in(directory, 1100), 5)
    assert export(directory, file) == 6
    found = verify(open_copy(file), ALDER.public)
    assert found == verify(open_copy(directory), ALDER.public)
    assert (found.finding, found.entries) == (None, 6)
    with pytest.raises(StorageError, match="is there already"):
        export(directory, file)


def test_what_no_message_left_for_is_not_exported(tmp_path: Path) -> None:
    torn(tmp_path / "egress", 30)
    assert export(tmp_path / "egress", tmp_path / "log.jsonl") == 3
    assert (tmp_path / "log.jsonl").read_bytes() == b"".join([*lines_of()[:3], lines_of(3)[-1]])


@settings(max_examples=60)
@given(data=st.data())
def test_whatever_byte_of_an_export_is_altered_it_is_named(data: st.DataObject) -> None:
    *lines, head = lines_of()
    content = b"".join([*lines, head])
    place = data.draw(st.integers(0, len(content) - 1))
    byte = data.draw(st.integers(0, 255)).to_bytes()
    if content[place : place + 1] == byte:
        return
    number = sum(end <= place for end in itertools.accumulate(map(len, lines)))
    with TemporaryDirectory() as name:
        file = Path(name) / "log.jsonl"
        file.write_bytes(content[:place] + byte + content[place + 1 :])
        found = verify(open_copy(file), ALDER.public).finding
    assert found is not None
    if number < COUNT:
        assert (found.kind, found.number) == (ALTERED, number + 1)
    else:
        assert found.kind in (HEAD_WRONG, ALTERED)


def test_an_export_without_its_head_or_its_last_entries_is_named(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    *lines, head = lines_of()
    for content, kind, number in (
        (lines, HEAD_WRONG, COUNT),
        ([*lines[:4], head], REMOVED, 5),
        ([head], REMOVED, 1),
        ([], HEAD_WRONG, 0),
        ([*lines, lines_of(3)[-1]], HEAD_WRONG, 4),
        ([*lines, head, head], ADDED, COUNT + 1),
    ):
        file.write_bytes(b"".join(content))
        found = verify(open_copy(file), ALDER.public).finding
        assert found is not None
        assert (found.kind, found.number) == (kind, number)


def test_what_is_no_log_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, said in ((tmp_path / "empty", "found none"), (tmp_path / "nowhere", "cannot be read")):
        with pytest.raises(StorageError, match=said):
            open_copy(path)
    (tmp_path / "empty" / "egress-000000000001.jsonl").write_bytes(lines_of()[0])
    with pytest.raises(StorageError, match="missing or was altered"):
        export(tmp_path / "empty", tmp_path / "log.jsonl")
    assert not (tmp_path / "log.jsonl").exists()


def test_reading_writes_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "egress"
    torn(directory, 30)
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    verify(open_copy(directory), ALDER.public)
    export(directory, tmp_path / "log.jsonl")
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before
