"""Reading JSON that other people wrote: a mistake names its place, and no text can disguise itself."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import StorageError

LONGEST_NAME = 80
"""Characters shown of a name; the rest is cut, so that one name cannot fill the page."""

LONGEST_TEXT = 200
"""Characters shown of any other text."""


def clean(text: str, most: int | None = None) -> str:
    """Text without control, direction-changing or unpaired characters, cut to `most`."""
    kept = "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    return kept if most is None or len(kept) <= most else kept[: most - 1] + "…"


def text_of(file: Path, remedy: str) -> str:
    """What a file holds. Raises StorageError, with `remedy`, when it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{file}: {getattr(error, 'strerror', None) or error}; {remedy}") from error


def object_in(text: str, where: str) -> dict[str, Any]:
    """The JSON object that a text is. where: what errors call it. Raises StorageError."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{where}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise StorageError(f"{where}: expected a JSON object, found {type(found).__name__}")
    return found


@dataclass(frozen=True)
class Node:
    """A place in a JSON document that knows its own path, so that an error can name it.

    remedy: what such an error ends with. All readers raise StorageError for another type than their own.
    """

    value: Any
    path: str
    remedy: str = "is this a finished run's directory?"

    def refusal(self, expected: str) -> StorageError:
        """What to raise when something else was expected here."""
        found = repr(self.value)
        found = found if len(found) <= 60 else found[:59] + "…"
        return StorageError(f"{self.path}: expected {expected}, found {found}; {self.remedy}")

    def get(self, key: str) -> Node | None:
        """The value under `key`, or None when it is missing or null."""
        if not isinstance(self.value, Mapping):
            raise self.refusal("an object")
        value = self.value.get(key)
        return None if value is None else self._below(value, f".{key}")

    def __getitem__(self, key: str) -> Node:
        node = self.get(key)
        if node is None:
            raise StorageError(f"{self.path}: expected a value for {key!r}, found none; {self.remedy}")
        return node

    def items(self) -> Iterator[tuple[str, Node]]:
        """Keys, cleaned, with their values."""
        if not isinstance(self.value, Mapping):
            raise self.refusal("an object")
        for key, value in self.value.items():
            yield clean(str(key), LONGEST_NAME), self._below(value, f".{key}")

    def elements(self) -> Iterator[Node]:
        """Of a list, in order."""
        if not isinstance(self.value, list | tuple):
            raise self.refusal("a list")
        for i, value in enumerate(self.value):
            yield self._below(value, f"[{i}]")

    def number(self) -> float:
        """Whole or not; infinities and NaN among them."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise self.refusal("a number")
        return float(self.value)

    def whole(self) -> int:
        """A whole number."""
        if isinstance(self.value, bool) or not isinstance(self.value, int):
            raise self.refusal("a whole number")
        return self.value

    def flag(self) -> bool:
        """True or false."""
        if not isinstance(self.value, bool):
            raise self.refusal("true or false")
        return self.value

    def text(self, most: int = LONGEST_TEXT) -> str:
        """A text, cleaned and cut to `most` characters."""
        if not isinstance(self.value, str):
            raise self.refusal("a text")
        return clean(self.value, most)

    def plain(self) -> str:
        """Any scalar as a short text."""
        if isinstance(self.value, bool):
            return "yes" if self.value else "no"
        return clean("none" if self.value is None else str(self.value), LONGEST_TEXT)

    def _below(self, value: Any, step: str) -> Node:
        return replace(self, value=value, path=self.path + step)
