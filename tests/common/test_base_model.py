"""The fingerprint of a base model in one word, by which policies and rosters name it."""

from __future__ import annotations

import re
from dataclasses import fields, replace

from hypothesis import given
from hypothesis import strategies as st

from common.base_model import Fingerprint

BASE = Fingerprint("1" * 64, "2" * 64, "3" * 64)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
fingerprints = st.builds(Fingerprint, texts, texts, texts)


def test_the_digest_tells_every_part_of_a_base_model_apart() -> None:
    assert tuple(field.name for field in fields(Fingerprint)) == Fingerprint.PARTS
    others = [replace(BASE, **{part: "9" * 64}) for part in Fingerprint.PARTS]
    assert len({found.digest() for found in (BASE, *others, Fingerprint("2" * 64, "1" * 64, "3" * 64))}) == 5


@given(fingerprints, fingerprints)
def test_only_equal_fingerprints_have_one_digest(one: Fingerprint, other: Fingerprint) -> None:
    """Also where parts of one are glued from parts of another."""
    assert (one.digest() == other.digest()) == (one == other)
    joined = Fingerprint(one.config + one.weights, "", one.tokenizer)
    assert (joined.digest() == one.digest()) == (joined == one)


def test_the_digest_is_a_word_that_stays_the_same_from_release_to_release() -> None:
    """Policies list it."""
    assert re.fullmatch("[0-9a-f]{64}", BASE.digest())
    assert BASE.digest() == "3f8c80bb6424ba19836746dfcf269665b2f5dd27ef26c029aff2848f42707c56"


def test_what_differs_is_named() -> None:
    assert BASE.differences(BASE) == ()
    assert BASE.differences(replace(BASE, weights="x", tokenizer="y")) == ("weights", "tokenizer")
