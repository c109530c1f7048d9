"""Writing files so that a crash leaves the old one or the new one, never half of either."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.errors import Unwritable

_REMEDY = "Free space or choose a writable directory, and try again; what was complete before is kept"

_IN_THE_WAY: Mapping[int | None, str] = {
    errno.ENOTDIR: "A file stands where a directory is needed: choose another place, or move that file away",
    errno.EEXIST: "A file stands where a directory is needed: choose another place, or move that file away",
    errno.EISDIR: "A directory stands where a file is needed: choose another name",
}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system says of `path` into Unwritable, a StorageError, with a remedy."""
    from safetensors import SafetensorError  # how safetensors tells of a full disk

    try:
        yield
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or error
        remedy = _IN_THE_WAY.get(getattr(error, "errno", None), _REMEDY)
        raise Unwritable(f"cannot write {path}: {said}. {remedy}.") from error


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a file beside `path`, syncs it and renames it onto `path`.

    Raises StorageError when the disk is full or read-only; `path` is then as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(partial)
            with partial.open("rb") as handle:
                os.fsync(handle.fileno())
            partial.replace(path)
            _sync_directory(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, atomically."""
    write_atomically(path, lambda partial: _write_bytes(partial, text.encode()))


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` atomically."""
    write_atomically(path, lambda partial: _write_bytes(partial, data))


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. NaN and infinity are refused: JSON has no word for them."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_directory(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a directory beside `path`, syncs its files and renames it onto `path`, replacing it whole.

    A directory cannot be renamed onto another, so the old one steps aside first. Killed just between the two renames,
    neither stands under its name: the next `write_directory` puts the old one back before it begins.
    """
    partial = path.with_name(f".{path.name}.partial")
    old = path.with_name(f".{path.name}.old")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            write(partial)
            for file in partial.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            _sync_directory(partial)
            if path.is_dir():
                path.rename(old)
            partial.rename(path)
            _sync_directory(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def append_line(path: Path, line: str) -> None:
    """Appends one line and syncs it to disk. Raises StorageError when there is no room; no part of the line stays."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as handle:
            size = handle.tell()
            data = (line + "\n").encode()
            try:
                written = 0
                while written < len(data):
                    written += handle.write(data[written:])
                os.fsync(handle.fileno())
            except OSError:
                with suppress(OSError):
                    os.ftruncate(handle.fileno(), size)
                raise
