"""Logs of `client.chain` as others see them: copies at one moment, exports, and the first thing in one that is wrong.

Nothing here needs a private key or writes to a log, and no lock is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from client.chain import CUT_OFF, HEAD, E, Form, Head, explains, genuine, is_cut_off, line_of, read_head, split
from common.errors import StorageError
from common.files import write_atomically

ALTERED, REMOVED, ADDED, MOVED, HEAD_WRONG = "altered", "removed", "added", "moved", "head"

_LAST_LINE = 1 << 14  # more bytes than a head has
_BLOCK = 1 << 20
_TRIES = 1000


# --- Copies -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line with its end, and where it stands."""

    where: str
    raw: bytes


@dataclass(frozen=True)
class Copy(Generic[E]):
    """A log at one moment, in its directory or in an exported file. parts: files, and how many bytes of each.

    head: as it stands there; None when it is missing, was altered or is not signed by the key that it names.
    """

    form: Form[E]
    parts: tuple[tuple[Path, int], ...]
    head: Head | None

    def lines(self) -> Iterator[Line]:
        """All lines but the head, in order. Raises StorageError when a file cannot be read."""
        for file, size in self.parts:
            try:
                with file.open("rb") as handle:
                    number = 0
                    while size > 0 and (raw := handle.readline(size)):
                        size -= len(raw)
                        number += 1
                        yield Line(f"{file.name}:{number}", raw)
            except OSError as error:
                raise StorageError(f"{file} cannot be read: {error.strerror}") from error


def open_copy(form: Form[E], path: Path) -> Copy[E]:
    """The log in a directory, or in the file that `export` wrote.

    A directory may be written to meanwhile: what comes later is not looked at. Raises StorageError when there is no log
    or it cannot be read.
    """
    asked = f"give {form.title}'s directory or an export of it"
    try:
        found = _in_directory(form, path) if path.is_dir() else _in_file(form, path)
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}; {asked}") from error
    if found is None:
        raise StorageError(f"{path}: expected {form.title}, found none; {asked}")
    return found


def own_copy(form: Form[E], directory: Path) -> Copy[E] | None:
    """The log that an institution keeps in a directory; None where neither a head nor an entry is there.

    Raises StorageError when it cannot be read.
    """
    try:
        return _in_directory(form, directory)
    except OSError as error:
        raise StorageError(
            f"{directory} cannot be read: {error.strerror}; see what lies there and who owns it"
        ) from error


def _in_directory(form: Form[E], path: Path) -> Copy[E] | None:
    for _ in range(_TRIES):
        head = _head_bytes(path)
        parts = tuple((file, file.stat().st_size) for file in form.files(path))
        if _head_bytes(path) == head:  # no entry was finished meanwhile: there is one more than it knows, or none
            if not parts and head is None:
                return None
            return Copy(form, parts, None if head is None else read_head(form, head))
    raise StorageError(f"{path}: is written to all the time; try again")


def _head_bytes(path: Path) -> bytes | None:
    try:
        return (path / HEAD).read_bytes()
    except FileNotFoundError:
        return None


def _in_file(form: Form[E], path: Path) -> Copy[E]:
    size = path.stat().st_size
    with path.open("rb") as handle:
        handle.seek(max(0, size - _LAST_LINE))
        lines = split(handle.read())
    last = lines[-1] if lines else b""
    head = read_head(form, last)
    return Copy(form, ((path, size if head is None else size - len(last)),), head)


def export(form: Form[E], directory: Path, file: Path) -> int:
    """Writes all entries that the head knows, and the head as the last line, into one file; returns their number.

    It does not verify them. Raises StorageError when there is no log, when its head is missing or not genuine, and when
    `file` is there already or cannot be written.
    """
    copy = own_copy(form, directory)
    if copy is None:
        raise form.missing(directory)
    head = copy.head
    if head is None:
        raise StorageError(f"{directory / HEAD} is missing or was altered; `{form.command}` says more")
    if file.exists():
        raise StorageError(f"{file} is there already; give another name")

    def write(partial: Path) -> None:
        with partial.open("wb") as out:
            for part, size in copy.parts:
                left = min(size, head.size) if part.name == head.file else size if part.name < head.file else 0
                with part.open("rb") as handle:
                    while left > 0 and (block := handle.read(min(left, _BLOCK))):
                        left -= len(block)
                        out.write(block)
            out.write(line_of(head))

    write_atomically(file, write)
    return head.count


# --- Verifying --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """The first thing in a log that is not as it was written.

    kind: ALTERED, REMOVED, ADDED, MOVED or HEAD_WRONG. number: of the entry, or of the one that should follow what was
    added. where: file and line.
    """

    kind: str
    number: int
    where: str
    said: str

    def __str__(self) -> str:
        return f"{self.where}: {self.said}"


@dataclass(frozen=True)
class Verdict:
    """entries: as many as are as they were written, from the first. last: hash of the last of these.

    cut_off: bytes at the end of an entry that is not there as a whole. ahead: whether the head does not know the last
    entry yet. A crash leaves one or the other, mended at the next entry, and so it looks while one is written.
    finding: None for a log that is whole.
    """

    entries: int
    last: str
    cut_off: int
    ahead: bool
    finding: Finding | None


def verify(copy: Copy[E], public: bytes) -> Verdict:
    """Checks every entry, the chain and the head against the institution's public key.

    Needs nothing but the copy. Raises StorageError when a file cannot be read.
    """
    lines = iter(copy.lines())
    head = copy.head if copy.head is not None and copy.head.public == public.hex() else None
    count, last, where = 0, copy.form.beginning(public), "its beginning"
    at_head = last
    strange: list[Line] = []
    finding = None
    for line in lines:
        where = line.where
        entry = genuine(copy.form, line.raw, public)
        if entry is None:
            strange.append(line)
            continue
        finding = _out_of_place(copy.form, entry, line, count + 1, last, strange, lines, public)
        if finding is not None:
            return Verdict(count, last, 0, False, finding)
        count, last, strange = count + 1, entry.hash, []
        if head is not None and count == head.count:
            at_head = last
    cut_off = 0
    if strange:
        first = strange[0].where
        if head is not None and head.count > count:
            finding = _altered(count + 1, first)
        elif is_cut_off([line.raw for line in strange]):
            cut_off = sum(len(line.raw) for line in strange)
        elif head is None:  # whether there was an entry cannot be told
            finding = _altered(count + 1, first)
        else:
            finding = _added(count + 1, first)
    finding = finding or _head_finding(head, count, at_head, where)
    ahead = finding is None and head is not None and count > head.count
    return Verdict(count, last, cut_off, ahead, finding)


def intact(copy: Copy[E], directory: Path, public: bytes) -> Verdict:
    """What `verify` says of an institution's own log, where that is no finding.

    Raises StorageError, with what does not happen meanwhile and what to do, for a log that is not as it was left.
    """
    verdict = verify(copy, public)
    if verdict.finding is not None:
        raise copy.form.spoilt(directory, str(verdict.finding))
    return verdict


def _out_of_place(
    form: Form[E],
    entry: E,
    line: Line,
    number: int,
    last: str,
    strange: list[Line],
    rest: Iterable[Line],
    public: bytes,
) -> Finding | None:
    """What is wrong with a genuine entry where entry `number`, chained to `last`, should stand; None if it is that.

    strange: lines before it that are no entries. rest: what follows.
    """
    if (entry.number, entry.previous) == (number, last):
        if explains(form, entry, [unread.raw for unread in strange]):
            return None
        if entry.kind != CUT_OFF:
            return _added(number, strange[0].where)
        said = f"the line that was cut off before entry {number} is"
        if not strange:
            return Finding(REMOVED, number, line.where, f"{said} missing")
        return Finding(ALTERED, number, strange[0].where, f"{said} not the one that the entry speaks of")
    if strange:
        return _altered(number, strange[0].where) if entry.number > number else _added(number, strange[0].where)
    if entry.number < number:
        said = f"entry {entry.number} stands here a second time"
        return Finding(ADDED, entry.number, line.where, said)
    if entry.number == number:
        said = f"entry {number} follows another entry {number - 1} than the one before it"
        return Finding(ALTERED, number, line.where, said)
    moved = None
    for later in rest:
        found = genuine(form, later.raw, public)
        if found == entry:
            return Finding(ADDED, entry.number, line.where, f"entry {entry.number} stands here and at {later.where}")
        if found is not None and moved is None and (found.number, found.previous) == (number, last):
            said = f"entry {entry.number} stands where entry {number} belongs, which comes later ({later.where})"
            moved = Finding(MOVED, number, line.where, said)
    if moved is not None:
        return moved
    return _removed(number, entry.number - 1, line.where)


def _head_finding(head: Head | None, count: int, at_head: str, where: str) -> Finding | None:
    """What the head says against a log of `count` entries that are whole."""
    if head is None:
        said = "the head is missing, or was altered: whether entries are missing at the end cannot be told"
        return Finding(HEAD_WRONG, count, HEAD, said)
    if head.count > count:
        return _removed(count + 1, head.count, f"after {where}")
    if head.hash != at_head:
        return Finding(ALTERED, head.count, HEAD, f"entry {head.count} is another than the one that the head knows")
    if head.count < count - 1:
        said = f"the head knows {head.count} entries and {count} are here: an earlier head was put back"
        return Finding(HEAD_WRONG, head.count + 1, HEAD, said)
    return None


def _altered(number: int, where: str) -> Finding:
    return Finding(ALTERED, number, where, f"entry {number} was altered: the line is none that this institution signed")


def _added(number: int, where: str) -> Finding:
    said = f"a line was added before entry {number}: the line is none that this institution signed"
    return Finding(ADDED, number, where, said)


def _removed(first: int, last: int, where: str) -> Finding:
    said = f"entry {first} was removed" if first == last else f"entries {first} to {last} were removed"
    return Finding(REMOVED, first, where, said)
