"""From records to tokens: what is supervised, what is cut, and how documents are packed."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from common.records import Record
from common.text import Example, pack, packs, tokenise

# Surrogates are no text; everything else may stand in a record.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
completions = texts.filter(str.strip)
BOS, EOS = 0, 1
ROOM = 10_000

examples = st.builds(
    lambda ids, prompt: Example(tuple(ids), min(prompt, len(ids)), "x", ""),
    st.lists(st.integers(0, 300), min_size=1, max_size=12),
    st.integers(1, 12),
)


def own_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@given(prompt=texts.filter(bool), completion=completions)
def test_supervised_is_exactly_the_completion_and_its_end(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    example = tokenise(Record(prompt, completion, "p", "note"), tokenizer, ROOM)
    start, given, supervised = (
        example.ids[0],
        example.ids[1 : example.prompt_tokens],
        example.ids[example.prompt_tokens :],
    )
    assert start == BOS
    assert tokenizer.decode(list(given)) == prompt + "\n"
    assert tokenizer.decode(list(supervised[:-1])) == completion
    assert supervised[-1] == EOS
    assert example.ids[:-1].count(EOS) == 0
    assert example.supervised == len(supervised)
    assert (example.kind, example.answer) == ("note", completion)


@given(completion=completions)
def test_the_prompt_has_the_same_tokens_whatever_is_answered(
    completion: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    alone = tokenise(Record("has a", "x", "p"), tokenizer, ROOM)
    example = tokenise(Record("has a", completion, "p"), tokenizer, ROOM)
    assert example.ids[: example.prompt_tokens] == alone.ids[: alone.prompt_tokens]


def test_an_empty_prompt_leaves_only_the_begin_token_before_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    example = tokenise(Record("", "a fever", "p"), tokenizer, ROOM)
    assert example.ids == (BOS, *own_tokens("a fever", tokenizer), EOS)
    assert example.prompt_tokens == 1


def test_without_a_begin_token_the_first_token_cannot_be_predicted(
    tokenizer_without_begin: PreTrainedTokenizerBase,
) -> None:
    plain = tokenise(Record("", "a fever", "p"), tokenizer_without_begin, ROOM)
    assert plain.ids == (*own_tokens("a fever", tokenizer_without_begin), EOS)
    assert plain.prompt_tokens == 1
    asked = tokenise(Record("the", "a fever", "p"), tokenizer_without_begin, ROOM)
    assert asked.prompt_tokens == len(own_tokens("the\n", tokenizer_without_begin))
    assert asked.ids[asked.prompt_tokens :] == plain.ids


@pytest.mark.parametrize("text", ["</s>", "a </s> b", "<s><pad></s>"])
def test_a_special_token_spelled_out_in_a_record_is_ordinary_text(
    text: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    example = tokenise(Record(text, text, "p"), tokenizer, ROOM)
    assert [token for token in example.ids if token < 3] == [BOS, EOS]
    assert tokenizer.decode(list(example.ids[example.prompt_tokens : -1])) == text


@given(prompt=texts, completion=completions, most=st.integers(2, 40))
def test_a_long_record_loses_the_beginning_of_its_prompt_then_the_end_of_its_answer(
    prompt: str, completion: str, most: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    record = Record(prompt, completion, "p")
    whole, cut = tokenise(record, tokenizer, ROOM), tokenise(record, tokenizer, most)
    asked, answer = whole.ids[1 : whole.prompt_tokens], whole.ids[whole.prompt_tokens :]
    assert cut.ids[0] == BOS
    assert len(cut.ids) == min(most, len(whole.ids))
    room = max(most - 1 - len(answer), 0)
    assert cut.ids[1 : cut.prompt_tokens] == (asked[-room:] if room else ())
    assert cut.ids[cut.prompt_tokens :] == answer[: most - 1]
    assert cut.supervised > 0
    assert cut.answer == completion


@given(st.lists(examples, min_size=1, max_size=6))
def test_a_pack_supervises_the_places_just_before_the_supervised_tokens(found: list[Example]) -> None:
    row = pack(found)
    ids = [token for example in found for token in example.ids]
    starts = [sum(len(example.ids) for example in found[:index]) for index in range(len(found))]
    supervised = [
        start + place
        for start, example in zip(starts, found, strict=True)
        for place in range(example.prompt_tokens, len(example.ids))
    ]
    assert row.ids.tolist() == [ids]
    assert row.lengths == tuple(len(example.ids) for example in found)
    assert row.positions.tolist() == [[place for example in found for place in range(len(example.ids))]]
    assert row.predict.tolist() == [place - 1 for place in supervised]
    assert row.targets.tolist() == [ids[place] for place in supervised]
    assert not set(row.predict.tolist()) & {start - 1 for start in starts}  # never from one document into the next


@given(st.lists(examples, max_size=20), st.integers(1, 30))
def test_packs_keep_order_and_fill_rows_up_to_the_limit(found: list[Example], most: int) -> None:
    rows = list(packs(found, most))
    assert [token for row in rows for token in row.ids[0].tolist()] == [t for example in found for t in example.ids]
    assert [length for row in rows for length in row.lengths] == [len(example.ids) for example in found]
    assert all(sum(row.lengths) <= most or len(row.lengths) == 1 for row in rows)
    for row, after in pairwise(rows):
        assert sum(row.lengths) + after.lengths[0] > most  # else the next document would have fitted
