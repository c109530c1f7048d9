"""What an institution's node tells of its connection and of the messages that come over it."""

from __future__ import annotations

from dataclasses import dataclass

# Of the connection; each is told when it begins.
CONNECTED = "connected"
UNREACHABLE = "unreachable"
UNTRUSTED = "untrusted"
NOT_ENROLLED = "not_enrolled"
NOT_ADMITTED = "not_admitted"
STOPPED = "stopped"

# Of a message; told each time.
RECEIVED = "received"
REFUSED = "refused"
ANSWERED = "answered"
LOST = "lost"

CONNECTION = frozenset({CONNECTED, UNREACHABLE, UNTRUSTED, NOT_ENROLLED, NOT_ADMITTED})


@dataclass(frozen=True)
class Event:
    """Something that a node came upon. kind: one of the words above. run: Flower's number of a run, 0 for none.

    text: for this institution only.
    """

    kind: str
    text: str = ""
    run: int = 0
