"""Dataclasses from outside: every field, no other, each of its declared type."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import TrainConfig
from common.typed import built


@dataclass(frozen=True)
class Inner:
    word: str


@dataclass(frozen=True)
class Sample:
    word: str
    number: int
    share: float
    flag: bool
    data: bytes
    words: list[str]
    pair: tuple[str, ...]
    inner: Inner | None
    last: str = "a default does not stand in for what is missing"


GOOD = Sample("w", 1, 0.5, True, b"b", ["a"], ("b",), Inner("i"), "l")
VALUES = {name: getattr(GOOD, name) for name in GOOD.__dataclass_fields__}


def test_what_is_there_and_of_its_type_is_taken_as_it_is() -> None:
    assert built(Sample, VALUES) == GOOD
    assert built(Sample, {**VALUES, "inner": None}) == replace(GOOD, inner=None)
    assert built(Sample, {**VALUES, "words": [], "pair": ()}) == replace(GOOD, words=[], pair=())
    whole = built(Sample, {**VALUES, "share": 2}).share
    assert (whole, type(whole)) == (2, int)
    for number in (-(2**63), 2**63 - 1):
        assert built(Sample, {**VALUES, "number": number}).number == number


WRONG: list[tuple[str, Any]] = [
    *(("word", value) for value in (None, 1, b"w", ["w"])),
    *(("number", value) for value in (None, 1.0, "1", True, 2**63, -(2**63) - 1, 10**400)),
    *(("share", value) for value in (None, "0.5", False, 10**400, 1j)),
    *(("flag", value) for value in (None, 0, 1, "true")),
    *(("data", value) for value in (None, "b", [98], bytearray(b"b"))),
    *(("words", value) for value in (None, "a", ("a",), [1], ["a", None], [["a"]], {"a": 1})),
    *(("pair", value) for value in (None, "b", ["b"], (1,), ("b", None))),
    *(("inner", value) for value in ({"word": "i"}, "i", 0, False)),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: f"{value!r:.30}")
def test_another_type_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"Sample\.{name}: expected"):
        built(Sample, {**VALUES, name: value})


@pytest.mark.parametrize("name", VALUES)
def test_a_missing_field_is_refused_also_where_there_is_a_default(name: str) -> None:
    with pytest.raises(TypeError):
        built(Sample, {key: value for key, value in VALUES.items() if key != name})


def test_a_field_too_many_is_refused() -> None:
    with pytest.raises(TypeError):
        built(Sample, {**VALUES, "more": 1})


@pytest.mark.parametrize("values", [None, [], "text", 7])
def test_what_is_no_object_is_refused(values: Any) -> None:
    with pytest.raises(TypeError):
        built(Sample, values)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from([*VALUES, "more"]), anything))
def test_whatever_comes_is_taken_as_it_is_or_a_type_error(changes: dict[str, Any]) -> None:
    values = {**VALUES, **changes}
    try:
        made = built(Sample, values)
    except TypeError:
        return
    assert {name: getattr(made, name) for name in VALUES} == values or "nan" in str(values)


def test_configurations_take_all_fields_of_their_types_and_no_others() -> None:
    values = asdict(TrainConfig())
    assert built(TrainConfig, values) == TrainConfig()
    with pytest.raises(TypeError):
        built(TrainConfig, {**values, "unknown": 1})
    with pytest.raises(TypeError, match=r"TrainConfig\.warmup: expected float"):
        built(TrainConfig, {key: value for key, value in values.items() if key != "warmup"})
    with pytest.raises(TypeError, match=r"TrainConfig\.batch_size: expected int, found 2\.0"):
        built(TrainConfig, {**values, "batch_size": 2.0})
