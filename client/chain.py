"""A log whose entries are chained by hash, signed and synced; only ever appended to, by any number of processes.

A directory holds `<word>-<number of its first entry>.jsonl` files, one entry a line, and `head.json`, which says how
many entries there are and which is the last. An entry is written, then the head, and only then what it speaks of may
happen. So after a crash there may be one entry more than the head knows (what it speaks of did not happen), or a line
that was cut off: it stays where it is, closed by `#`, and the entry after it, of kind `log.cut_off`, gives its length
and SHA-256. Both are mended at the next entry; neither is an alarm.

What no log can show by itself: files and head that were both put back to an earlier state, unless somebody who still
knows the later state goes on with it. An export kept elsewhere shows that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar, get_type_hints

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from common.errors import StorageError
from common.files import append_line, storage_errors, write_bytes
from common.private_files import locked, private_directory
from common.secagg.canonical import Value, canonical
from common.secagg.identity import Identity

CUT_OFF = "log.cut_off"
"""Kind of the entries that stand for nothing, but for a line before them that a crash cut off."""

LARGEST_FILE = 16 << 20
HEAD = "head.json"

_CLOSE = b"#\n"
_SEALS = ("hash", "signature")


@dataclass(frozen=True)
class Link:
    """Where an entry stands. number: from 1, without gaps. time: UTC. previous: hash of the entry before."""

    number: int
    time: str
    previous: str


class Entry:
    """What the entries of every chain have in common.

    A kind of entry is a frozen dataclass below this class, with these fields and its own, of text, whole numbers and
    floats. All of them, in order, are what is written, hashed and signed. hash: SHA-256 over all but the last two.
    signature: of the institution over the same. WORD: that of its chain. NAMES: what a file calls a field, if not by
    its name.
    """

    number: int
    time: str
    kind: str
    previous: str
    hash: str
    signature: str

    WORD: ClassVar[str]
    NAMES: ClassVar[Mapping[str, str]] = {}

    def statement(self) -> bytes:
        """What is hashed and signed."""
        values: list[Value] = []
        for name, kind in _fields(type(self)).items():
            if name not in _SEALS:
                value = getattr(self, name)
                values.append(repr(value) if kind is float else value)
        return canonical(f"{self.WORD} entry", *values)

    def as_dict(self) -> dict[str, Any]:
        """As the file has it."""
        return {self.NAMES.get(name, name): getattr(self, name) for name in _fields(type(self))}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """Raises TypeError for other keys than an entry has, and for values of other types."""
        own = {called: name for name, called in cls.NAMES.items()}
        values = {own.get(called, called): value for called, value in found.items()}
        kinds = _fields(cls)
        if len(values) != len(found) or values.keys() != kinds.keys():
            raise TypeError(f"expected {', '.join(kinds)}, found {', '.join(values)}")
        for name, kind in kinds.items():
            if type(values[name]) is not kind:
                raise TypeError(f"{name}: expected {kind.__name__}, found {type(values[name]).__name__}")
        return cls(**values)

    def signed(self, identity: Identity) -> Self:
        """The same with its hash and its signature."""
        statement = self.statement()
        seals = {"hash": hashlib.sha256(statement).hexdigest(), "signature": identity.sign(statement).hex()}
        return type(self)(**{name: getattr(self, name) for name in _fields(type(self))} | seals)


def _fields(kind: Any) -> dict[str, type]:
    """Names and types of a dataclass's fields, in order."""
    return _known_fields(kind)


@lru_cache(maxsize=32)
def _known_fields(kind: Any) -> dict[str, type]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


E = TypeVar("E", bound=Entry)


@dataclass(frozen=True)
class Form(Generic[E]):
    """What tells one log from another.

    word: in what is signed, and in the names of files. title, halt: how errors call it, and what does not happen while
    it is not as it was left. command: verifies it. remedy: what is to be done then. absent: what holds and is to be
    done where there is none. kind: the class of entries that say they are of that kind, None where there is none.
    cut_off: the entry at a link that stands for so many bytes with this SHA-256. opens: a first entry begins a log
    where there is none; without it `Chain.begin` alone does, so that one that was deleted is not begun anew in silence.
    """

    word: str
    title: str
    halt: str
    command: str
    remedy: str
    absent: str
    kind: Callable[[str], type[E] | None]
    cut_off: Callable[[Link, int, str], E]
    opens: bool = True

    def beginning(self, public: bytes) -> str:
        """What the first entry is chained to."""
        return hashlib.sha256(canonical(f"{self.word} log", public)).hexdigest()

    def file(self, number: int) -> str:
        """A file's name, by the number of its first entry."""
        return f"{self.word}-{number:012d}.jsonl"

    def files(self, directory: Path) -> list[Path]:
        """In order."""
        return sorted(directory.glob(f"{self.word}-*.jsonl"))

    def missing(self, directory: Path) -> StorageError:
        """The error for an institution's own log of which nothing is there."""
        return StorageError(f"{directory}: expected {self.title}, found none; {self.absent}")

    def spoilt(self, directory: Path, why: str) -> StorageError:
        """The error for a log that is not as it was left."""
        return StorageError(
            f"{self.title} in {directory} is not as it was left: {why}; {self.halt}. See `{self.command}`, and"
            f" {self.remedy}"
        )


@dataclass(frozen=True)
class Head:
    """How far a log goes: entries, and the hash of the last. file, size: where they end. public: key that signs."""

    institution: str
    public: str
    count: int
    hash: str
    file: str
    size: int
    signature: str = ""

    def statement(self, word: str) -> bytes:
        return canonical(f"{word} head", self.institution, self.public, self.count, self.hash, self.file, self.size)

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def line_of(thing: Entry | Head) -> bytes:
    """The one way in which it is written."""
    return json.dumps(thing.as_dict(), separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _verifies(public: bytes, signature: str, statement: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(bytes.fromhex(signature), statement)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def read_entry(form: Form[E], raw: bytes) -> E | None:
    """The entry that a line holds, signature aside; None for any line that a `Chain` of this form does not write."""
    try:
        found = json.loads(raw)
        kind = form.kind(found["kind"])
        entry = None if kind is None else kind.from_dict(found)
        right = (
            entry is not None and line_of(entry) == raw and hashlib.sha256(entry.statement()).hexdigest() == entry.hash
        )
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    return entry if right else None


def genuine(form: Form[E], raw: bytes, public: bytes) -> E | None:
    """The entry that a line holds and the institution signed."""
    entry = read_entry(form, raw)
    return entry if entry is not None and _verifies(public, entry.signature, entry.statement()) else None


def read_head(form: Form[Any], raw: bytes) -> Head | None:
    """The head that a line holds, if the key that it names signed it; None for any other line."""
    try:
        head = Head(**json.loads(raw))
        signed = head.statement(form.word)
        right = line_of(head) == raw and _verifies(bytes.fromhex(head.public), head.signature, signed)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return head if right else None


def split(data: bytes) -> list[bytes]:
    """Lines with their ends; only a line feed ends one."""
    return [part + b"\n" for part in data.split(b"\n")[:-1]] + ([rest] if (rest := data.split(b"\n")[-1]) else [])


def is_cut_off(lines: list[bytes]) -> bool:
    """Whether these are what crashes leave: a line without an end, closed or not by an entry that was cut off too."""
    *closed, last = lines
    return all(line.endswith(_CLOSE) for line in closed) and (not last.endswith(b"\n") or last.endswith(_CLOSE))


def explains(form: Form[E], entry: E, before: list[bytes]) -> bool:
    """Whether the unreadable lines before an entry are the ones that it speaks of: none, but for CUT_OFF."""
    if entry.kind != CUT_OFF:
        return not before
    link = Link(entry.number, entry.time, entry.previous)
    return bool(before) and entry.statement() == form.cut_off(link, *_of(b"".join(before))).statement()


def _of(data: bytes) -> tuple[int, str]:
    return len(data), hashlib.sha256(data).hexdigest()


class Chain(Generic[E]):
    """An institution's log, to be written to by any number of threads and processes.

    largest: bytes of a file, after which a new one begins. clock: gives the time, with its zone.

    Raises ConfigError for a directory that others can enter, StorageError for one that cannot be made.
    """

    def __init__(
        self,
        form: Form[E],
        directory: Path,
        identity: Identity,
        largest: int = LARGEST_FILE,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        private_directory(directory)
        self._form = form
        self._directory = directory
        self._identity = identity
        self._largest = largest
        self._clock = clock

    def begin(self) -> Head:
        """Begins the log where there is none, and leaves one that is there. Raises as `held` does."""
        with locked(self._directory):
            return self._mended(begins=True)

    @contextmanager
    def held(self) -> Iterator[Held[E]]:
        """The log, mended, while nobody else reads or writes it.

        Raises StorageError when it is not as it was left or cannot be written: then what it is for must not happen.
        """
        with locked(self._directory):
            yield Held(self, self._mended(begins=self._form.opens))

    def _appended(self, head: Head, make: Callable[[Link], E]) -> tuple[E, Head]:
        entry = self._entry(head, make)
        line = line_of(entry)
        fits = head.size == 0 or head.size + len(line) <= self._largest
        file = head.file if fits else self._form.file(entry.number)
        self._append(file, line)
        after = self._advanced(head, entry, file, len(line))
        self._keep(after)
        return entry, after

    def _entry(self, head: Head, make: Callable[[Link], E]) -> E:
        time = self._clock().astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return make(Link(head.count + 1, time, head.hash)).signed(self._identity)

    def _advanced(self, head: Head, entry: E, file: str, added: int) -> Head:
        size = (head.size if file == head.file else 0) + added
        return self._signed(entry.number, entry.hash, file, size)

    def _signed(self, count: int, last: str, file: str, size: int) -> Head:
        bare = Head(self._identity.name, self._identity.public.hex(), count, last, file, size)
        return dataclasses.replace(bare, signature=self._identity.sign(bare.statement(self._form.word)).hex())

    def _append(self, file: str, data: bytes) -> None:
        append_line(self._directory / file, data.decode().removesuffix("\n"))

    def _keep(self, head: Head) -> None:
        write_bytes(self._directory / HEAD, line_of(head))  # syncs the directory too, where a new file may stand

    def _mended(self, begins: bool) -> Head:
        """The head, after what a crash left behind it has become part of the log."""
        head = self._read_head(begins)
        with storage_errors(self._directory):
            for file in self._form.files(self._directory):
                if file.name > head.file and file.stat().st_size == 0:  # made, and not yet written to
                    file.unlink()
        names = [file.name for file in self._form.files(self._directory)]
        beyond = self._bytes(head.file, head.size) if head.file in names else b""
        if beyond is None or (head.size and head.file not in names):
            raise self.spoilt(f"{head.file} is shorter than {HEAD} says")
        newer = [name for name in names if name > head.file]
        if newer and (beyond or newer != [self._form.file(head.count + 1)]):
            raise self.spoilt(f"{newer[0]} holds more than {HEAD} knows")
        if newer:
            beyond = self._bytes(newer[0], 0) or b""
        return self._take_in(head, newer[0] if newer else head.file, beyond)

    def _take_in(self, head: Head, file: str, beyond: bytes) -> Head:
        """The head after what stands in `file` beyond it: nothing, one entry, or a line that was cut off."""
        if not beyond:
            return head
        *before, last = split(beyond)
        entry = genuine(self._form, last, self._identity.public)
        if entry is None:
            if not is_cut_off([*before, last]):
                raise self.spoilt(f"{file} has lines at its end that were not written here")
            said = beyond + _CLOSE
            entry = self._entry(head, lambda link: self._form.cut_off(link, *_of(said)))
            self._append(file, _CLOSE + line_of(entry))
            beyond = said + line_of(entry)
        elif (entry.number, entry.previous) != (head.count + 1, head.hash) or not explains(self._form, entry, before):
            raise self.spoilt(f"entry {entry.number} at the end of {file} does not follow what {HEAD} knows")
        after = self._advanced(head, entry, file, len(beyond))
        self._keep(after)
        return after

    def _read_head(self, begins: bool) -> Head:
        try:
            raw = (self._directory / HEAD).read_bytes()
        except FileNotFoundError:
            if self._form.files(self._directory) or not begins:
                raise self.spoilt(f"{HEAD} is missing") from None
            head = self._nothing()
            self._keep(head)
            return head
        except OSError as error:
            raise self._unreadable(HEAD, error) from error
        found = read_head(self._form, raw)
        if found is None or found.public != self._identity.public.hex():
            raise self.spoilt(f"{HEAD} was altered, or signed by another identity")
        return found

    def _nothing(self) -> Head:
        return self._signed(0, self._form.beginning(self._identity.public), self._form.file(1), 0)

    def since(self, known: Head | None, head: Head) -> list[E]:
        """The entries behind a head that was right before, up to `head`; all of them without one. See `Held.since`."""
        known = known or self._nothing()
        if known.count > head.count:
            raise self.spoilt(f"it ended with entry {head.count}, and had {known.count} a while ago: it was put back")
        count, last = known.count, known.hash
        strange: list[bytes] = []
        found = []
        for raw in self._lines(known, head):
            entry = read_entry(self._form, raw)
            if entry is None:
                strange.append(raw)
                continue
            if (entry.number, entry.previous) != (count + 1, last) or not explains(self._form, entry, strange):
                raise self.spoilt(f"entry {count + 1} is not as it was written")
            count, last, strange = entry.number, entry.hash, []
            found.append(entry)
        if strange or (count, last) != (head.count, head.hash):
            raise self.spoilt(f"entry {min(count + 1, head.count)} is not as it was written")
        return found

    def _lines(self, known: Head, head: Head) -> Iterator[bytes]:
        for path in self._form.files(self._directory):
            if known.file <= path.name <= head.file:
                data = self._bytes(path.name, known.size if path.name == known.file else 0)
                if data is None:
                    raise self.spoilt(f"{path.name} is shorter than it was")
                yield from split(data)

    def _bytes(self, file: str, start: int) -> bytes | None:
        """What stands behind the first `start` bytes; None when there are not so many. Raises StorageError."""
        try:
            with (self._directory / file).open("rb") as handle:
                handle.seek(0, 2)
                if handle.tell() < start:
                    return None
                handle.seek(start)
                return handle.read()
        except OSError as error:
            raise self._unreadable(file, error) from error

    def _unreadable(self, file: str, error: OSError) -> StorageError:
        return StorageError(f"{self._directory / file} cannot be read: {error.strerror}; {self._form.halt}")

    def spoilt(self, why: str) -> StorageError:
        """The error for a log that is not as it was left."""
        return self._form.spoilt(self._directory, why)


class Held(Generic[E]):
    """A log that nobody else reads or writes meanwhile. head: how far it goes."""

    def __init__(self, chain: Chain[E], head: Head) -> None:
        self._chain = chain
        self.head = head

    def append(self, make: Callable[[Link], E]) -> E:
        """Writes down and syncs the entry that `make` gives at its place; what it speaks of may happen afterwards.

        Raises StorageError when it cannot be kept, ValueError for what cannot be written.
        """
        entry, self.head = self._chain._appended(self.head, make)
        return entry

    def since(self, known: Head | None) -> list[E]:
        """The entries behind a head that was right before; all without one.

        The chain of hashes, which ends in the signed head, is checked, and so is what `known` says of the past;
        signatures of single entries are `chain_audit.verify`'s. Raises StorageError, as `Chain.held` does.
        """
        return self._chain.since(known, self.head)
