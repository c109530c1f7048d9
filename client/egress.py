"""The egress log: every message that leaves is written down first, chained to the one before, signed and synced.

How it is kept, and what it cannot show, is `client.chain`'s; how it is checked, `client.chain_audit`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from client import chain, chain_audit, ledger
from client.chain import CUT_OFF, HEAD, LARGEST_FILE, Chain, Form, Head, Link
from client.chain_audit import ADDED, ALTERED, HEAD_WRONG, MOVED, REMOVED, Finding, Verdict, verify
from client.home import ClientHome
from common.secagg.canonical import canonical
from common.secagg.identity import Identity

if TYPE_CHECKING:
    from common.wire import Wire

__all__ = [
    "ADDED",
    "ALTERED",
    "CUT_OFF",
    "HEAD",
    "HEAD_WRONG",
    "MOVED",
    "REMOVED",
    "Copy",
    "EgressLog",
    "Entry",
    "Finding",
    "Payload",
    "Verdict",
    "beginning",
    "export",
    "lost",
    "open_copy",
    "own_copy",
    "read_entry",
    "verify",
]


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
class Entry(chain.Entry):
    """One message that was about to leave.

    kind: of the message, or CUT_OFF. run, round, attempt, phase: what it belongs to, where that is known. size, sha256:
    of its content; a file calls the size bytes. epsilon: what of the privacy budget it spends.
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

    WORD = "egress"
    NAMES = {"size": "bytes"}  # noqa: RUF012


Copy = chain_audit.Copy[Entry]


def _cut_off(link: Link, size: int, sha256: str) -> Entry:
    return Entry(link.number, link.time, CUT_OFF, "", 0, 0, "", size, sha256, 0.0, link.previous)


FORM = Form(
    word=Entry.WORD,
    title="the egress log",
    halt="nothing leaves",
    command="silotune-client log verify",
    remedy="restore the log; or move the directory away to keep it, and a new log begins",
    absent="nothing has left yet, and a log begins with `silotune-client up`",
    kind=lambda _: Entry,
    cut_off=_cut_off,
)


class EgressLog(Chain[Entry]):
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
        super().__init__(FORM, directory, identity, largest, clock)

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

        def entry(link: Link) -> Entry:
            place = (kind, run, round_number, attempt, phase)
            return Entry(link.number, link.time, *place, payload.size, payload.sha256, float(epsilon), link.previous)

        with self.held() as held:
            return held.append(entry)

    def mend(self) -> Head:
        """Mends what a crash left, as every `record` does, and says how far the log goes. Raises StorageError."""
        return self.begin()


def beginning(public: bytes) -> str:
    """What the first entry is chained to."""
    return FORM.beginning(public)


def read_entry(raw: bytes) -> Entry | None:
    """The entry that a line holds, signature aside; None for any line that `EgressLog` does not write."""
    return chain.read_entry(FORM, raw)


def open_copy(path: Path) -> Copy:
    """The log in a directory, or in the file that `export` wrote. See `chain_audit.open_copy`."""
    return chain_audit.open_copy(FORM, path)


def own_copy(directory: Path) -> Copy | None:
    """The log that an institution keeps in a directory; None where none has begun. Raises StorageError."""
    return chain_audit.own_copy(FORM, directory)


def lost(home: ClientHome, copy: Copy | None) -> str:
    """What to say of an institution's own log that holds nothing although something must have left; empty else.

    What is in a run's directory or in the ledger came after an answer to the coordinator, which is in the log first.
    """
    traces = [f"{home.runs} holds runs"] if any(home.runs.glob("*")) else []
    traces += [f"{home.ledger} holds what was spent"] if ledger.FORM.files(home.ledger) else []
    if not traces or (copy is not None and copy.parts):
        return ""
    return (
        f"{home.egress}: expected what left, since {' and '.join(traces)}, found nothing; restore the log. Only where"
        " it was moved away to be kept, go on: `silotune-client up` begins a new one"
    )


def export(directory: Path, file: Path) -> int:
    """Writes the log into one file, and gives the number of its entries. See `chain_audit.export`."""
    return chain_audit.export(FORM, directory, file)
