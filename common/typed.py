"""Dataclasses from values that came from outside: every field there, none unknown, each of its declared type."""

from __future__ import annotations

from dataclasses import fields
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def built(kind: type[T], values: dict[str, Any]) -> T:
    """A dataclass from values that came from outside: all its fields, no others, each of its declared type.

    Raises TypeError for anything else.
    """
    made = kind(**values)
    hints = get_type_hints(kind)
    for field in fields(made):  # type: ignore[arg-type]  # kind is a dataclass
        value = getattr(made, field.name)
        if field.name not in values or not _has_type(value, hints[field.name]):
            raise TypeError(f"{kind.__name__}.{field.name}: expected {field.type}, found {value!r:.60}")
    return made


def _has_type(value: Any, kind: Any) -> bool:
    if isinstance(kind, UnionType):  # Terms | None
        return any(_has_type(value, part) for part in get_args(kind))
    if origin := get_origin(kind):  # list[str], tuple[str, ...]
        return isinstance(value, origin) and all(_has_type(part, get_args(kind)[0]) for part in value)
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int):  # JSON's have no end; numpy's and torch's do
        return kind in (int, float) and -(2**63) <= value < 2**63
    return isinstance(value, kind)
