"""What a coordinator signs of a published adapter: nothing of it can be changed, and nothing else is read."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.base_model import Fingerprint
from common.config import LoraConfig
from common.errors import ConfigError
from common.publication import Publication
from common.secagg.identity import Identity

COORDINATOR = Identity.generate("coordinator")
BASE = Fingerprint("1" * 64, "2" * 64, "3" * 64)
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.25, target_modules=["q_proj", "v_proj"])
PUBLICATION = Publication("run-1", 3, BASE, LORA, "ab" * 32)
SIGNED = PUBLICATION.signed(COORDINATOR)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
modules = st.lists(st.sampled_from(["q_proj", "k_proj", "v_proj", "mlp.up_proj"]), min_size=1, unique=True)
loras = st.builds(
    LoraConfig,
    rank=st.integers(1, 10**6),
    alpha=st.floats(1e-9, 1e9),
    dropout=st.floats(0, 1, exclude_max=True),
    target_modules=modules,
)
publications = st.builds(
    Publication, texts, st.integers(0, 2**63 - 1), st.builds(Fingerprint, texts, texts, texts), loras, texts
)


def leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where something stands in the JSON form."""
    if isinstance(value, dict):
        return [found for key, part in value.items() for found in leaves(part, (*path, key))]
    return [path]


def put(value: Any, path: tuple[str, ...], new: Any) -> Any:
    if not path:
        return new
    return {**value, path[0]: put(value[path[0]], path[1:], new)}


def at(value: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


# --- The signature


@given(publications)
def test_what_was_signed_verifies_and_comes_back_as_it_was(publication: Publication) -> None:
    signed = publication.signed(COORDINATOR)
    assert replace(signed, signature=b"") == publication
    assert signed.verifies(COORDINATOR.public)
    told = json.loads(json.dumps(signed.to_json()))
    assert Publication.from_json(told) == signed
    assert Publication.from_json(told).verifies(COORDINATOR.public)


@given(publications, publications)
def test_a_signature_fits_nothing_else(one: Publication, other: Publication) -> None:
    moved = replace(other, signature=one.signed(COORDINATOR).signature)
    assert moved.verifies(COORDINATOR.public) == (one == other)
    assert (one.statement() == other.statement()) == (one == other)


@given(publications, st.data())
def test_any_change_of_any_field_breaks_it(publication: Publication, data: st.DataObject) -> None:
    told = publication.signed(COORDINATOR).to_json()
    path = data.draw(st.sampled_from(leaves(told)))
    other = data.draw(publications).signed(COORDINATOR).to_json()
    changed = put(told, path, at(other, path))
    if changed != told:
        assert not Publication.from_json(changed).verifies(COORDINATOR.public)


CHANGES: dict[tuple[str, ...], Any] = {
    ("run",): "run-2",
    ("round",): 4,
    ("fingerprint", "config"): "9" * 64,
    ("fingerprint", "weights"): "9" * 64,
    ("fingerprint", "tokenizer"): "9" * 64,
    ("lora", "rank"): 5,
    ("lora", "alpha"): 8.000000000000002,
    ("lora", "dropout"): 0.2500000000000001,
    ("lora", "target_modules"): ["v_proj", "q_proj"],
    ("adapter",): "ab" * 31 + "ac",
    ("signature",): SIGNED.signature.hex()[:-2] + f"{SIGNED.signature[-1] ^ 1:02x}",
}


def test_a_change_is_tried_of_every_field() -> None:
    assert set(CHANGES) == set(leaves(SIGNED.to_json()))
    assert {path[0] for path in CHANGES} == {field.name for field in fields(Publication)}


@pytest.mark.parametrize("path", CHANGES, ids=".".join)
def test_the_smallest_change_breaks_it(path: tuple[str, ...]) -> None:
    changed = put(SIGNED.to_json(), path, CHANGES[path])
    assert not Publication.from_json(changed).verifies(COORDINATOR.public)


def test_parts_that_are_glued_otherwise_are_another_statement() -> None:
    for change in (
        {"fingerprint": Fingerprint("1" * 64 + "2", "2" * 63, "3" * 64)},
        {"run": "run-1" + chr(3)},
        {"lora": replace(LORA, target_modules=["q_projv_proj"])},
        {"lora": replace(LORA, target_modules=["q_proj", "v_proj", ""])},
    ):
        assert replace(PUBLICATION, **change).statement() != PUBLICATION.statement()


def test_a_whole_number_for_a_fraction_is_the_same() -> None:
    """JSON of another maker may write 8 for 8.0."""
    assert replace(SIGNED, lora=replace(LORA, alpha=8)).verifies(COORDINATOR.public)


@pytest.mark.parametrize(
    "signature",
    [b"", bytes(64), SIGNED.signature[:-1], SIGNED.signature + b"\0", SIGNED.signature[::-1], bytes(10**6)],
    ids=["none", "zeros", "cut short", "too long", "backwards", "a megabyte"],
)
def test_no_other_bytes_are_a_signature(signature: bytes) -> None:
    assert not replace(SIGNED, signature=signature).verifies(COORDINATOR.public)


def test_nobody_else_signs_for_the_coordinator() -> None:
    other = Identity.generate("coordinator")
    assert not SIGNED.verifies(other.public)
    assert not PUBLICATION.signed(other).verifies(COORDINATOR.public)


@pytest.mark.parametrize("public", [b"", bytes(31), bytes(33), bytes(32), b"\xff" * 32])
def test_what_is_no_key_of_the_coordinators_verifies_nothing(public: bytes) -> None:
    assert not SIGNED.verifies(public)


def test_a_signature_for_another_purpose_is_none() -> None:
    """The same key signs rosters, whose bytes begin with another purpose."""
    statement = PUBLICATION.statement()
    assert b"published adapter" in statement
    other = COORDINATOR.sign(statement.replace(b"published adapter", b"published-adapter"))
    assert not replace(PUBLICATION, signature=other).verifies(COORDINATOR.public)


def test_a_name_that_is_no_text_of_utf_8_verifies_nothing() -> None:
    assert not replace(SIGNED, run="\ud800").verifies(COORDINATOR.public)


def test_a_signature_is_not_printed() -> None:
    assert "signature" not in repr(SIGNED)


# --- What is read


def test_the_json_form_has_every_field() -> None:
    found = SIGNED.to_json()
    assert found == {**asdict(PUBLICATION), "signature": SIGNED.signature.hex()}
    assert Publication.from_json(found) == SIGNED
    assert Publication.from_json(PUBLICATION.to_json()) == PUBLICATION


WRONG: list[tuple[tuple[str, ...], Any]] = [
    *(((name,), value) for name in ("run", "adapter") for value in (None, 7, b"x", ["run-1"], True)),
    *((("round",), value) for value in (None, -1, 1.0, "3", True, 2**63, 10**400)),
    *((("fingerprint",), value) for value in (None, [], "word", {}, {"config": "c", "weights": "w"})),
    (("fingerprint", "weights"), 7),
    *((("lora",), value) for value in (None, [], "word", {})),
    *((("lora", "rank"), value) for value in (0, -1, 1.0, "4", True, None, 10**400)),
    *((("lora", "alpha"), value) for value in (0, -1.0, float("nan"), float("inf"), "8", None, 10**400)),
    *((("lora", "dropout"), value) for value in (-0.1, 1.0, float("nan"), "0", None)),
    *(
        (("lora", "target_modules"), value)
        for value in ([], "q_proj", None, [7], ["a", "a"], ["a b"], ["all-linear", "a"])
    ),
    *(
        (("signature",), value)
        for value in (None, 7, b"ab", "a", "zz", "AB", "ab cd", " ab", "ab\n", ["ab"], "\u0661\u0662")
    ),
]


@pytest.mark.parametrize(("path", "value"), WRONG, ids=lambda value: f"{value!r:.40}")
def test_what_no_coordinator_writes_is_refused(path: tuple[str, ...], value: Any) -> None:
    with pytest.raises(ConfigError, match="expected what a coordinator says of a published adapter"):
        Publication.from_json(put(SIGNED.to_json(), path, value))


@pytest.mark.parametrize("found", [None, 7, "text", [], {}, {"run": "run-1"}, {**SIGNED.to_json(), "more": 1}])
def test_other_fields_are_refused(found: object) -> None:
    with pytest.raises(ConfigError, match="ask it to hand the adapter out again"):
        Publication.from_json(found)


@pytest.mark.parametrize("name", SIGNED.to_json())
def test_a_missing_field_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        Publication.from_json({key: value for key, value in SIGNED.to_json().items() if key != name})


@pytest.mark.parametrize("section", ["fingerprint", "lora"])
def test_a_field_too_many_in_a_section_is_refused(section: str) -> None:
    with pytest.raises(ConfigError):
        Publication.from_json(put(SIGNED.to_json(), (section,), {**SIGNED.to_json()[section], "more": 1}))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([(), *leaves(SIGNED.to_json()), ("fingerprint",), ("lora",)]), anything)
def test_what_is_read_is_exactly_what_was_said_or_refused(path: tuple[str, ...], value: Any) -> None:
    found = put(SIGNED.to_json(), path, value)
    try:
        read = Publication.from_json(found)
    except ConfigError:
        return
    assert read.to_json() == found
