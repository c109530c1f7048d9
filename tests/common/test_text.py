"""Packed rows: where documents lie, and which of their tokens are predicted."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from common.text import Example, pack, packs


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """Any ids, with any supervised spans that an example may have."""
    ids = tuple(draw(st.lists(st.integers(0, 300), min_size=1, max_size=12)))
    cuts = sorted(draw(st.lists(st.integers(1, len(ids)), unique=True, max_size=7)))
    spans = tuple(zip(cuts[::2], cuts[1::2], strict=False))
    last = draw(st.integers(spans[-1][1] if spans else min(1, len(ids)), len(ids)))
    return Example(ids, last, "x", "", spans)


@given(st.lists(examples(), min_size=1, max_size=6))
def test_a_pack_supervises_the_places_just_before_the_supervised_tokens(found: list[Example]) -> None:
    row = pack(found)
    ids = [token for example in found for token in example.ids]
    starts = [sum(len(example.ids) for example in found[:index]) for index in range(len(found))]
    supervised = [
        start + place
        for start, example in zip(starts, found, strict=True)
        for place in range(len(example.ids))
        if any(a <= place < b for a, b in (*example.earlier, (example.prompt_tokens, len(example.ids))))
    ]
    assert row.ids.tolist() == [ids]
    assert row.lengths == tuple(len(example.ids) for example in found)
    assert row.positions.tolist() == [[place for example in found for place in range(len(example.ids))]]
    assert row.predict.tolist() == [place - 1 for place in supervised]
    assert row.targets.tolist() == [ids[place] for place in supervised]
    assert len(supervised) == sum(example.supervised for example in found)
    assert not set(row.predict.tolist()) & {start - 1 for start in starts}  # never from one document into the next


@given(st.lists(examples(), max_size=20), st.integers(1, 30))
def test_packs_keep_order_and_fill_rows_up_to_the_limit(found: list[Example], most: int) -> None:
    rows = list(packs(found, most))
    assert [token for row in rows for token in row.ids[0].tolist()] == [t for example in found for t in example.ids]
    assert [length for row in rows for length in row.lengths] == [len(example.ids) for example in found]
    assert all(sum(row.lengths) <= most or len(row.lengths) == 1 for row in rows)
    for row, after in pairwise(rows):
        assert sum(row.lengths) + after.lengths[0] > most  # else the next document would have fitted


@given(st.lists(st.integers(2, 40), min_size=1, max_size=12), st.integers(2, 120))
def test_padded_rows_count_what_is_filled_up(lengths: list[int], most: int) -> None:
    examples = [Example(tuple(range(length)), 1, "text", "") for length in lengths]
    rows = list(packs(examples, most, padded=True))
    assert [length for row in rows for length in row.lengths] == lengths
    for row in rows:
        assert len(row.lengths) == 1 or max(row.lengths) * len(row.lengths) <= most


def test_documents_of_a_pack_are_the_packs_of_its_documents() -> None:
    examples = [
        Example((5, 6, 7, 8), 2, "text", ""),
        Example((9, 10, 11), 1, "text", ""),
        Example((12, 13), 1, "t", ""),
    ]
    for found, example in zip(pack(examples).documents(), examples, strict=True):
        alone = pack([example])
        assert found.lengths == alone.lengths
        for name in ("ids", "positions", "predict", "targets"):
            assert torch.equal(getattr(found, name), getattr(alone, name))
