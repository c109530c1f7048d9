"""What an institution's node must know after a restart: which node it is, and the message in hand."""

from __future__ import annotations

import fcntl
import json
import time
from pathlib import Path
from typing import IO

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto

from common.errors import ConfigError
from common.files import write_bytes, write_json


class NodeMemory:
    """What the next process must know: which node this is, and the message in hand.

    The node's number counts only on the same boot of the same machine: a copy of the disk elsewhere must not take part
    beside the original, so it has to ask to be admitted, and is not while that one is there.
    """

    def __init__(self, directory: Path | None, patience_s: float = 0.0) -> None:
        """patience_s: how long another process may take to let go of it. Raises ConfigError when it does not."""
        self._node = directory / "node.json" if directory else None
        self._message = directory / "in-hand.bin" if directory else None
        self._lock = _locked(directory, patience_s) if directory else None

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def node(self) -> int | None:
        if self._node is None:
            return None
        try:
            kept = json.loads(self._node.read_text(encoding="utf-8"))
            return int(kept["node"]) if kept["boot"] == _boot() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep_node(self, node: int) -> None:
        if self._node is not None and self.node() != node:
            write_json(self._node, {"node": node, "boot": _boot()})

    def forget_node(self) -> None:
        if self._node is not None:
            self._node.unlink(missing_ok=True)

    def in_hand(self) -> Message | None:
        """The message that was in hand when the process ended, without its content."""
        if self._message is None:
            return None
        try:
            return message_from_proto(MessageProto.FromString(self._message.read_bytes()))
        except Exception:  # half a file, or none
            return None

    def take(self, message: Message) -> None:
        if self._message is not None:
            header = message_to_proto(remove_content_from_message(message))
            write_bytes(self._message, header.SerializeToString())

    def put_down(self) -> None:
        if self._message is not None:
            self._message.unlink(missing_ok=True)


def _locked(directory: Path, patience_s: float) -> IO[str]:
    """A file that one process at a time holds; the system lets go of it when that ends, however it ends."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = (directory / "lock").open("w")
    end = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if time.monotonic() >= end:
                lock.close()
                raise ConfigError(f"{directory}: another process is this node already; stop that one first") from error
            time.sleep(0.1)
        else:
            return lock


def _boot() -> str:
    """Another word for each start of the operating system; empty where there is none, which then matches itself."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
