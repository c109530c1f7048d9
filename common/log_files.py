"""Log files that other processes append to, kept small."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

LARGEST_BYTES = 8 * 2**20


def keep_small(log: Path, largest_bytes: int = LARGEST_BYTES) -> bool:
    """Moves what is in a log of more than `largest_bytes` to a file beside it (`.1`), in the place of the last.

    Who writes must append: it goes on at the new beginning, and what it writes just then may be lost. On a full disk
    the old lines are lost, since a log that grows on would be worse. Returns whether it was too long.
    """
    try:
        if log.stat().st_size <= largest_bytes:
            return False
    except OSError:
        return False
    before = log.with_name(f"{log.name}.1")
    try:
        before.touch(mode=0o600)
        shutil.copyfile(log, before)
    except OSError:
        with suppress(OSError):
            before.unlink()
    with suppress(OSError), log.open("r+b") as file:
        file.truncate(0)
    return True
