"""The egress log: every message that leaves is written down first, chained to the one before, signed and synced.

A directory holds `egress-<number of its first entry>.jsonl` files, one entry a line, and `head.json`, which says how
many entries there are and which is the last. Files are only ever appended to. An entry is written, then the head, then
the message may leave. So after a crash there may be one entry more than the head knows (its message did not leave), or
a line that was cut off: it stays where it is, closed by `#`, and the entry after it, of kind `log.cut_off`, gives its
length and SHA-256. Both are mended at the next entry; neither is an alarm.

What no log can show by itself: files and head that were both put back to an earlier state. An export kept elsewhere
shows that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from common.errors import StorageError
from common.files import append_line, storage_errors, write_atomically, write_bytes
from common.private_files import locked, private_directory
from common.secagg.canonical import canonical
from common.secagg.identity import Identity

if TYPE_CHECKING:
    from common.wire import Wire

CUT_OFF = "log.cut_off"
"""Kind of the entries that stand for no message, but for a line before them that a crash cut off."""

LARGEST_FILE = 16 << 20
HEAD = "head.json"

_CLOSE = b"#\n"
_LAST_LINE = 1 << 14  # more bytes than a head has
_BLOCK = 1 << 20
_TRIES = 1000


def beginning(public: bytes) -> str:
    """What the first entry is chained to."""
    return hashlib.sha256(canonical("egress log", public)).hexdigest()


@dataclass(frozen=True)
class Payload:
    """Size in bytes and SHA-256 of what leaves; of the content itself the log holds nothing."""

    size: int
    sha256: str

    @classmethod
    def of_bytes(cls, data: bytes) -> Payload:
        return cls(len(data), hashlib.sha256(data).hexdigest())

    @classmethod
    def of_wire(cls, wire: Wire) -> Payload:
        """Of a message before its transport packs it: over its kind, its text and every array."""
        import numpy as np

        from common.wire import size

        sha = hashlib.sha256(canonical("egress message", wire.kind, wire.text))
        for name, array in sorted(wire.arrays.items()):
            sha.update(canonical("egress array", name, str(array.dtype), array.shape))
            sha.update(np.ascontiguousarray(array).data)
        return cls(size(wire), sha.hexdigest())


@dataclass(frozen=True)
class Entry:
    """One message that was about to leave.

    number: from 1, without gaps. time: UTC. kind: of the message, or CUT_OFF. run, round, attempt, phase: what it
    belongs to, where that is known. size, sha256: of its content. epsilon: what of the privacy budget it spends.
    previous: hash of the entry before. hash: SHA-256 over all of these. signature: of the institution over the same.
    """

    number: int
    time: str
    kind: str
    run: str
    round: int
    attempt: int
    phase: str
    size: int
    sha256: str
    epsilon: float
    previous: str
    hash: str = ""
    signature: str = ""

    def statement(self) -> bytes:
        """What is hashed and signed."""
        return canonical(
            "egress entry",
            self.number,
            self.time,
            self.kind,
            self.run,
            self.round,
            self.attempt,
            self.phase,
            self.size,
            self.sha256,
            repr(self.epsilon),
            self.previous,
        )

    def as_dict(self) -> dict[str, Any]:
        """As the file has it; the size is called bytes there."""
        return {{"size": "bytes"}.get(name, name): getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Entry:
        """Raises TypeError for other keys than an entry has; values are not looked at."""
        return cls(**{{"bytes": "size", "size": "bytes"}.get(name, name): value for name, value in found.items()})


@dataclass(frozen=True)
class Head:
    """How far the log goes: entries, and the hash of the last. file, size: where they end. public: key that signs."""

    institution: str
    public: str
    count: int
    hash: str
    file: str
    size: int
    signature: str = ""

    def statement(self) -> bytes:
        return canonical("egress head", self.institution, self.public, self.count, self.hash, self.file, self.size)

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def _line(thing: Entry | Head) -> bytes:
    """The one way in which it is written."""
    return json.dumps(thing.as_dict(), separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _verifies(public: bytes, signature: str, statement: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(bytes.fromhex(signature), statement)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def read_entry(raw: bytes) -> Entry | None:
    """The entry that a line holds, signature aside; None for any line that `EgressLog` does not write."""
    try:
        entry = Entry.from_dict(json.loads(raw))
        right = _line(entry) == raw and hashlib.sha256(entry.statement()).hexdigest() == entry.hash
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return entry if right else None


def _genuine(raw: bytes, public: bytes) -> Entry | None:
    """The entry that a line holds and the institution signed."""
    entry = read_entry(raw)
    return entry if entry is not None and _verifies(public, entry.signature, entry.statement()) else None


def read_head(raw: bytes) -> Head | None:
    """The head that a line holds, if the key that it names signed it; None for any other line."""
    try:
        head = Head(**json.loads(raw))
        right = _line(head) == raw and _verifies(bytes.fromhex(head.public), head.signature, head.statement())
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return head if right else None


# --- Writing ------------------------------------------------------------------------------------------------------


class EgressLog:
    """An institution's log, to be written to by any number of threads and processes.

    largest: bytes of a file, after which a new one begins. clock: gives the time, with its zone.

    Raises ConfigError for a directory that others can enter, StorageError for one that cannot be made.
    """

    def __init__(
        self,
        directory: Path,
        identity: Identity,
        largest: int = LARGEST_FILE,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        private_directory(directory)
        self._directory = directory
        self._identity = identity
        self._largest = largest
        self._clock = clock

    def record(
        self,
        kind: str,
        payload: Payload,
        run: str = "",
        round_number: int = 0,
        attempt: int = 0,
        phase: str = "",
        epsilon: float = 0.0,
    ) -> Entry:
        """Writes down a message that is about to leave; it may leave when this has returned.

        Raises StorageError when the entry cannot be kept, or the log is not as it was left: then nothing may leave.
        """
        if kind == CUT_OFF:
            raise ValueError(f"{CUT_OFF} is the log's own kind")
        with locked(self._directory):
            head = self._mended()
            entry = self._entry(head, kind, payload, run, round_number, attempt, phase, float(epsilon))
            line = _line(entry)
            file = head.file if head.size == 0 or head.size + len(line) <= self._largest else _name(entry.number)
            self._append(file, line)
            self._keep(self._advanced(head, entry, file, len(line)))
            return entry

    def mend(self) -> Head:
        """Mends what a crash left, as every `record` does, and says how far the log goes. Raises StorageError."""
        with locked(self._directory):
            return self._mended()

    def _entry(
        self, head: Head, kind: str, payload: Payload, run: str, number: int, attempt: int, phase: str, epsilon: float
    ) -> Entry:
        time = self._clock().astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        size, sha256 = payload.size, payload.sha256
        bare = Entry(head.count + 1, time, kind, run, number, attempt, phase, size, sha256, epsilon, head.hash)
        statement = bare.statement()
        signed = {
            "hash": hashlib.sha256(statement).hexdigest(),
            "signature": self._identity.sign(statement).hex(),
        }
        return Entry.from_dict({**bare.as_dict(), **signed})

    def _advanced(self, head: Head, entry: Entry, file: str, added: int) -> Head:
        size = (head.size if file == head.file else 0) + added
        return self._signed(entry.number, entry.hash, file, size)

    def _signed(self, count: int, last: str, file: str, size: int) -> Head:
        bare = Head(self._identity.name, self._identity.public.hex(), count, last, file, size)
        return Head(**{**bare.as_dict(), "signature": self._identity.sign(bare.statement()).hex()})

    def _append(self, file: str, data: bytes) -> None:
        append_line(self._directory / file, data.decode().removesuffix("\n"))

    def _keep(self, head: Head) -> None:
        write_bytes(self._directory / HEAD, _line(head))  # syncs the directory too, where a new file may stand

    def _mended(self) -> Head:
        """The head, after what a crash left behind it has become part of the log."""
        head = self._read_head()
        with storage_errors(self._directory):
            for file in _files(self._directory):
                if file.name > head.file and file.stat().st_size == 0:  # made, and not yet written to
                    file.unlink()
        names = [file.name for file in _files(self._directory)]
        beyond = _tail(self._directory / head.file, head.size) if head.file in names else b""
        if beyond is None or (head.size and head.file not in names):
            raise self._spoilt(f"{head.file} is shorter than {HEAD} says")
        newer = [name for name in names if name > head.file]
        if newer and (beyond or newer != [_name(head.count + 1)]):
            raise self._spoilt(f"{newer[0]} holds more than {HEAD} knows")
        if newer:
            beyond = _tail(self._directory / newer[0], 0) or b""
        return self._take_in(head, newer[0] if newer else head.file, beyond)

    def _take_in(self, head: Head, file: str, beyond: bytes) -> Head:
        """The head after what stands in `file` beyond it: nothing, one entry, or a line that was cut off."""
        if not beyond:
            return head
        *before, last = _split(beyond)
        entry = _genuine(last, self._identity.public)
        if entry is None:
            if not _is_cut_off([*before, last]):
                raise self._spoilt(f"{file} has lines at its end that were not written here")
            said = beyond + _CLOSE
            entry = self._entry(head, CUT_OFF, Payload.of_bytes(said), "", 0, 0, "", 0.0)
            self._append(file, _CLOSE + _line(entry))
            beyond = said + _line(entry)
        elif (entry.number, entry.previous) != (head.count + 1, head.hash) or not _explains(entry, before):
            raise self._spoilt(f"entry {entry.number} at the end of {file} does not follow what {HEAD} knows")
        after = self._advanced(head, entry, file, len(beyond))
        self._keep(after)
        return after

    def _read_head(self) -> Head:
        try:
            raw = (self._directory / HEAD).read_bytes()
        except FileNotFoundError:
            if _files(self._directory):
                raise self._spoilt(f"{HEAD} is missing") from None
            head = self._signed(0, beginning(self._identity.public), _name(1), 0)
            self._keep(head)
            return head
        except OSError as error:
            raise StorageError(f"{self._directory / HEAD} cannot be read: {error.strerror}; nothing leaves") from error
        found = read_head(raw)
        if found is None or found.public != self._identity.public.hex():
            raise self._spoilt(f"{HEAD} was altered, or signed by another identity")
        return found

    def _spoilt(self, why: str) -> StorageError:
        return StorageError(
            f"the egress log in {self._directory} is not as it was left: {why}; nothing leaves. See `silotune-client"
            " log verify`, and restore the log; or move the directory away to keep it, and a new log begins"
        )


def _name(number: int) -> str:
    """A file's name, by the number of its first entry."""
    return f"egress-{number:012d}.jsonl"


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("egress-*.jsonl"))


def _tail(file: Path, start: int) -> bytes | None:
    """What stands behind the first `start` bytes; None when there are not so many. Raises StorageError."""
    try:
        with file.open("rb") as handle:
            handle.seek(0, 2)
            if handle.tell() < start:
                return None
            handle.seek(start)
            return handle.read()
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {error.strerror}; nothing leaves") from error


def _split(data: bytes) -> list[bytes]:
    """Lines with their ends; only a line feed ends one."""
    return [part + b"\n" for part in data.split(b"\n")[:-1]] + ([rest] if (rest := data.split(b"\n")[-1]) else [])


def _is_cut_off(lines: list[bytes]) -> bool:
    """Whether these are what crashes leave: a line without an end, closed or not by an entry that was cut off too."""
    *closed, last = lines
    return all(line.endswith(_CLOSE) for line in closed) and (not last.endswith(b"\n") or last.endswith(_CLOSE))


def _explains(entry: Entry, before: list[bytes]) -> bool:
    """Whether the unreadable lines before an entry are the ones that it speaks of: none, but for CUT_OFF."""
    if entry.kind != CUT_OFF:
        return not before
    said = b"".join(before)
    return bool(said) and (entry.size, entry.sha256) == (len(said), hashlib.sha256(said).hexdigest())


# --- Reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line with its end, and where it stands."""

    where: str
    raw: bytes


@dataclass(frozen=True)
class Copy:
    """A log at one moment, in its directory or in an exported file. parts: files, and how many bytes of each.

    head: as it stands there; None when it is missing, was altered or is not signed by the key that it names.
    """

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


def open_copy(path: Path) -> Copy:
    """The log in a directory, or in the file that `export` wrote. Nothing is written, no lock is taken.

    A directory may be written to meanwhile: what comes later is not looked at. Raises StorageError when there is no log
    or it cannot be read.
    """
    try:
        return _in_directory(path) if path.is_dir() else _in_file(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}; give an egress log or an export") from error


def _in_directory(path: Path) -> Copy:
    for _ in range(_TRIES):
        head = _head_bytes(path)
        parts = tuple((file, file.stat().st_size) for file in _files(path))
        if _head_bytes(path) == head:  # no entry was finished meanwhile: there is one more than it knows, or none
            if not parts and head is None:
                raise StorageError(f"{path}: expected an egress log, found none; there is one once a message has left")
            return Copy(parts, None if head is None else read_head(head))
    raise StorageError(f"{path}: is written to all the time; try again")


def _head_bytes(path: Path) -> bytes | None:
    try:
        return (path / HEAD).read_bytes()
    except FileNotFoundError:
        return None


def _in_file(path: Path) -> Copy:
    size = path.stat().st_size
    with path.open("rb") as handle:
        handle.seek(max(0, size - _LAST_LINE))
        lines = _split(handle.read())
    last = lines[-1] if lines else b""
    head = read_head(last)
    return Copy(((path, size if head is None else size - len(last)),), head)


def export(directory: Path, file: Path) -> int:
    """Writes all entries that the head knows, and the head as the last line, into one file; returns their number.

    It does not verify them. Raises StorageError when the head is missing or not genuine, and when `file` is there
    already or cannot be written.
    """
    copy = open_copy(directory)
    head = copy.head
    if head is None:
        raise StorageError(f"{directory / HEAD} is missing or was altered; `silotune-client log verify` says more")
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
            out.write(_line(head))

    write_atomically(file, write)
    return head.count


# --- Verifying ----------------------------------------------------------------------------------------------------

ALTERED, REMOVED, ADDED, MOVED, HEAD_WRONG = "altered", "removed", "added", "moved", "head"


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
    entry yet. A crash leaves one or the other, mended at the next message, and so it looks while one is written.
    finding: None for a log that is whole.
    """

    entries: int
    last: str
    cut_off: int
    ahead: bool
    finding: Finding | None


def verify(copy: Copy, public: bytes) -> Verdict:
    """Checks every entry, the chain and the head against the institution's public key.

    Needs nothing but the copy. Raises StorageError when a file cannot be read.
    """
    lines = iter(copy.lines())
    head = copy.head if copy.head is not None and copy.head.public == public.hex() else None
    count, last, where = 0, beginning(public), "its beginning"
    at_head = last
    strange: list[Line] = []
    finding = None
    for line in lines:
        where = line.where
        entry = _genuine(line.raw, public)
        if entry is None:
            strange.append(line)
            continue
        finding = _out_of_place(entry, line, count + 1, last, strange, lines, public)
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
        elif _is_cut_off([line.raw for line in strange]):
            cut_off = sum(len(line.raw) for line in strange)
        elif head is None:  # whether there was an entry cannot be told
            finding = _altered(count + 1, first)
        else:
            finding = _added(count + 1, first)
    finding = finding or _head_finding(head, count, at_head, where)
    ahead = finding is None and head is not None and count > head.count
    return Verdict(count, last, cut_off, ahead, finding)


def _out_of_place(
    entry: Entry, line: Line, number: int, last: str, strange: list[Line], rest: Iterable[Line], public: bytes
) -> Finding | None:
    """What is wrong with a genuine entry where entry `number`, chained to `last`, should stand; None if it is that.

    strange: lines before it that are no entries. rest: what follows.
    """
    if (entry.number, entry.previous) == (number, last):
        if _explains(entry, [unread.raw for unread in strange]):
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
        found = _genuine(later.raw, public)
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
