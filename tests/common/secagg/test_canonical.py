"""One way to write values as bytes: whatever differs in the values differs in the bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.secagg.canonical import DOMAIN, Value, canonical

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
scalars = st.one_of(words, st.binary(max_size=6), st.integers(0, 2**70))
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)
lists = st.tuples(words, st.lists(values, max_size=4))


def kinds(value: Value) -> object:
    """The value with its types, which Python's own equality passes over."""
    return (type(value), tuple(map(kinds, value)) if isinstance(value, tuple) else value)


def write(said: tuple[str, list[Value]]) -> bytes:
    return canonical(said[0], *said[1])


@given(lists, lists)
def test_different_values_never_give_the_same_bytes(
    one: tuple[str, list[Value]], other: tuple[str, list[Value]]
) -> None:
    assert (write(one) == write(other)) == (kinds((one[0], *one[1])) == kinds((other[0], *other[1])))


@given(lists, st.data())
def test_a_list_differs_from_its_nearest_neighbours(said: tuple[str, list[Value]], data: st.DataObject) -> None:
    """Split, joined, nested, reordered, turned into another type or shortened: what random pairs hardly ever are."""
    purpose, found = said
    near: list[tuple[str, list[Value]]] = [
        (purpose, [tuple(found)]),
        (purpose, [*found, ()]),
        (purpose, [*found, b""]),
        (purpose, [*found, ""]),
        (purpose, [*found, 0]),
        (purpose + "\0", found),
        ("", [purpose, *found]),
        (purpose, found[:-1]),
        (purpose, found[1:]),
        (purpose, found[::-1]),
    ]
    if found and isinstance(found[0], str):
        near += [(purpose + found[0], found[1:]), (purpose, [found[0].encode(), *found[1:]])]
    if len(found) > 1:
        near.append((purpose, [tuple(found[:2]), *found[2:]]))
    assert len({write(case) for case in [*near, said]}) == len({kinds((case[0], *case[1])) for case in [*near, said]})


@given(values)
def test_writing_is_reversible(value: Value) -> None:
    """A reader that knows only the form of the bytes gets back purpose and fields, and so no two lists meet."""
    read, rest = parse(canonical("purpose", value, 7))
    assert (kinds(read), rest) == (kinds((DOMAIN, "purpose", value, 7)), b"")


def parse(text: bytes) -> tuple[Value, bytes]:
    kind, size = text[:1], int.from_bytes(text[1:9], "big")
    content, rest = text[9 : 9 + size], text[9 + size :]
    assert len(content) == size
    match kind:
        case b"b":
            return content, rest
        case b"s":
            return content.decode(), rest
        case b"i":
            return int.from_bytes(content, "big"), rest
    assert kind == b"t"
    parts = []
    while content:
        part, content = parse(content)
        parts.append(part)
    return tuple(parts), rest


def test_the_form_is_the_same_in_every_release() -> None:
    """Members of different releases have to meet in what they sign; the form may change only with DOMAIN."""

    def part(kind: bytes, content: bytes) -> bytes:
        return kind + bytes(7) + bytes([len(content)]) + content

    fields = part(b"b", b"\x01") + part(b"i", b"\x01\x00") + part(b"t", part(b"s", b"n") + part(b"i", b""))
    expected = part(b"t", part(b"s", b"silotune/secagg/1") + part(b"s", b"p") + fields)
    assert canonical("p", b"\x01", 256, ("n", 0)) == expected


@pytest.mark.parametrize(
    "value", [1.0, float("nan"), True, False, -1, None, [], ["a"], {}, {"a": 1}, bytearray(b"a"), memoryview(b"a"),
              np.uint32(1), {1}, object()], ids=lambda value: type(value).__name__,
)  # fmt: skip
@pytest.mark.parametrize("place", [lambda value: (value,), lambda value: ("a", (b"b", (value,)))], ids=["bare", "deep"])
def test_other_types_and_negative_numbers_are_refused(value: Any, place: Any) -> None:
    with pytest.raises(TypeError, match="expected text, bytes, a number of at least 0 or a tuple"):
        canonical("purpose", *place(value))


def test_half_a_character_is_refused() -> None:
    with pytest.raises(ValueError):
        canonical("purpose", "\ud800")
