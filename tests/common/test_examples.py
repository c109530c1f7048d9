"""From records to examples: what is supervised, what is cut, and what is counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from common.adapter import Adapter
from common.config import TrainConfig
from common.errors import DataError
from common.evaluation import evaluate
from common.examples import Counts, _pieces, _truncated, examples_of
from common.models import LoraModel
from common.records import Message, Record
from common.text import Example

# Surrogates are no text; everything else may stand in a record.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
completions = texts.filter(str.strip)
BOS, EOS = 0, 1
ROOM = TrainConfig(max_tokens=10_000)


def tokenise(record: Record, tokenizer: PreTrainedTokenizerBase, train: TrainConfig = ROOM) -> Example:
    (example,) = examples_of([record], tokenizer, train).examples
    return example


def own_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --- A prompt and its completion


@given(prompt=texts.filter(bool), completion=completions)
def test_supervised_is_exactly_the_completion_and_its_end(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    example = tokenise(Record(prompt, completion, "p", "note"), tokenizer)
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
    assert example.spans == ((example.prompt_tokens, len(example.ids)),)
    assert example.supervised == example.answer_tokens == len(supervised)
    assert (example.kind, example.answer, example.asked) == ("note", completion, None)


@given(completion=completions)
def test_the_prompt_has_the_same_tokens_whatever_is_answered(
    completion: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    alone = tokenise(Record("has a", "x", "p"), tokenizer)
    example = tokenise(Record("has a", completion, "p"), tokenizer)
    assert example.ids[: example.prompt_tokens] == alone.ids[: alone.prompt_tokens]


def test_an_empty_prompt_leaves_only_the_begin_token_before_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    example = tokenise(Record("", "a fever", "p"), tokenizer)
    assert example.ids == (BOS, *own_tokens("a fever", tokenizer), EOS)
    assert example.prompt_tokens == 1


def test_without_a_begin_token_the_first_token_cannot_be_predicted(
    tokenizer_without_begin: PreTrainedTokenizerBase,
) -> None:
    plain = tokenise(Record("", "a fever", "p"), tokenizer_without_begin)
    assert plain.ids == (*own_tokens("a fever", tokenizer_without_begin), EOS)
    assert plain.prompt_tokens == 1
    asked = tokenise(Record("the", "a fever", "p"), tokenizer_without_begin)
    assert asked.prompt_tokens == len(own_tokens("the\n", tokenizer_without_begin))
    assert asked.ids[asked.prompt_tokens :] == plain.ids


@pytest.mark.parametrize("text", ["</s>", "a </s> b", "<s><pad></s>"])
def test_a_special_token_spelled_out_in_a_record_is_ordinary_text(
    text: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    example = tokenise(Record(text, text, "p"), tokenizer)
    assert [token for token in example.ids if token < 3] == [BOS, EOS]
    assert tokenizer.decode(list(example.ids[example.prompt_tokens : -1])) == text


# --- All tokens supervised


@given(prompt=texts, completion=completions)
def test_all_supervises_whatever_can_be_predicted(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    record = Record(prompt, completion, "p")
    usual, example = (
        tokenise(record, tokenizer),
        tokenise(record, tokenizer, replace(ROOM, supervised="all")),
    )
    assert [place for span in example.spans for place in range(*span)] == list(range(1, len(example.ids)))
    # What is asked, and expected, stays the same.
    assert replace(example, earlier=()) == usual


# --- Too long


@given(prompt=texts, completion=completions, most=st.integers(2, 40))
def test_a_long_record_loses_the_beginning_of_its_prompt_then_the_end_of_its_answer(
    prompt: str, completion: str, most: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    record = Record(prompt, completion, "p")
    whole, cut = tokenise(record, tokenizer), tokenise(record, tokenizer, TrainConfig(max_tokens=most))
    asked, answer = whole.ids[1 : whole.prompt_tokens], whole.ids[whole.prompt_tokens :]
    assert cut.ids[0] == BOS
    assert len(cut.ids) == min(most, len(whole.ids))
    room = max(most - 1 - len(answer), 0)
    assert cut.ids[1 : cut.prompt_tokens] == (asked[-room:] if room else ())
    assert cut.ids[cut.prompt_tokens :] == answer[: most - 1]
    assert cut.supervised > 0
    assert cut.answer == completion


@given(text=completions, most=st.integers(2, 12))
def test_a_long_text_without_a_begin_token_keeps_its_beginning(
    text: str, most: int, tokenizer_without_begin: PreTrainedTokenizerBase
) -> None:
    whole = tokenise(Record("", text, "p"), tokenizer_without_begin)
    cut = tokenise(Record("", text, "p"), tokenizer_without_begin, TrainConfig(max_tokens=most))
    assert cut.ids == whole.ids[:most]
    assert cut.prompt_tokens == 1


@st.composite
def wholes(draw: st.DrawFn) -> tuple[Example, int]:
    """An example whose every token is another, so that it tells its place, and how many begin tokens it has."""
    length = draw(st.integers(2, 60))
    cuts = sorted(draw(st.lists(st.integers(1, length - 1), unique=True, max_size=7)))
    spans = tuple(zip(cuts[::2], cuts[1::2], strict=False))
    last = draw(st.integers(spans[-1][1] if spans else 1, length - 1))
    return Example(tuple(range(length)), last, "x", "the answer", spans), draw(st.integers(0, 1))


def places(example: Example) -> list[int]:
    return [place for span in example.spans for place in range(*span)]


@given(wholes(), st.integers(2, 20), st.integers(0, 19))
def test_pieces_supervise_each_supervised_token_once_and_from_its_own_context(
    whole: tuple[Example, int], most: int, overlap: int
) -> None:
    example, begin = whole
    train = TrainConfig(max_tokens=most, overlap=min(overlap, most - 1))
    pieces = _pieces(example, train, begin)
    assert [token for piece in pieces for token in (piece.ids[place] for place in places(piece))] == places(example)
    for piece in pieces:
        assert len(piece.ids) <= most
        assert piece.supervised > 0
        assert piece.spans[0][0] >= 1
        assert piece.ids[:begin] == example.ids[:begin]
        body = piece.ids[begin:]
        assert body == tuple(range(body[0], body[0] + len(body)))  # one stretch of the record
    assert pieces[-1].answer == example.answer
    assert all(piece.answer is None for piece in pieces[:-1])
    if len(example.ids) > most:
        # Asked is with as much of the prompt as fits, wherever the pieces begin.
        assert pieces[-1].asked == _truncated(example, train, begin)[0]


@given(wholes(), st.integers(4, 20), st.integers(1, 19))
def test_neighbouring_pieces_share_as_many_tokens_as_asked_and_the_last_what_fits(
    whole: tuple[Example, int], most: int, overlap: int
) -> None:
    example, begin = replace(whole[0], prompt_tokens=1, earlier=()), whole[1]  # all supervised, so no piece is left out
    train = TrainConfig(max_tokens=most, overlap=min(overlap, most - 1))
    pieces = _pieces(example, train, begin)
    for one, other in pairwise(pieces):
        assert len(other.ids) == most
        assert other.prompt_tokens == len(set(one.ids) & set(other.ids))  # context is not supervised again
        assert other.prompt_tokens >= train.overlap
        assert other.prompt_tokens == train.overlap or other is pieces[-1]


@given(wholes(), st.integers(2, 20), st.integers(0, 19))
def test_a_short_answer_keeps_as_much_of_its_prompt_in_pieces_as_truncated(
    whole: tuple[Example, int], most: int, overlap: int
) -> None:
    example, begin = replace(whole[0], prompt_tokens=len(whole[0].ids) - 1, earlier=()), whole[1]
    train = TrainConfig(max_tokens=most, overlap=min(overlap, most - 1))
    (piece,) = _pieces(example, train, begin)
    (cut,) = _truncated(example, train, begin)
    assert replace(piece, asked=None) == cut


@given(wholes(), st.integers(2, 20))
def test_what_is_truncated_fits_and_still_ends_with_what_is_learned(whole: tuple[Example, int], most: int) -> None:
    example, begin = whole
    (cut,) = _truncated(example, TrainConfig(max_tokens=most), begin)
    assert len(cut.ids) == min(most, len(example.ids))
    assert {cut.ids[place] for place in places(cut)} <= set(places(example))
    assert cut.supervised > 0
    assert cut.spans[0][0] >= 1
    assert cut.ids[:begin] == example.ids[:begin]


# --- Counts


def test_counts_tell_what_was_lost(tokenizer: PreTrainedTokenizerBase) -> None:
    records = [Record("a", "b", "p"), Record("a " * 30, "b", "p"), Record("", "c d " * 30, "p")]
    whole = examples_of(records, tokenizer, ROOM)
    assert whole.counts.notes() == []
    cut = examples_of(records, tokenizer, TrainConfig(max_tokens=20))
    assert cut.lengths == whole.lengths
    assert (cut.counts.records, cut.counts.examples, cut.counts.truncated, cut.counts.cut) == (3, 3, 2, 1)
    assert cut.counts.lost == sum(length - 20 for length in whole.lengths if length > 20)
    assert cut.counts.tokens == whole.counts.tokens - cut.counts.lost
    chunked = examples_of(records, tokenizer, TrainConfig(max_tokens=20, long="chunk", overlap=4))
    assert (chunked.counts.chunked, chunked.counts.truncated, chunked.counts.cut) == (1, 1, 0)
    assert chunked.counts.supervised == whole.counts.supervised
    assert chunked.counts.examples == len(chunked.examples) > 3
    assert [note for counts in (cut.counts, chunked.counts) for note in counts.notes()] == [
        f"2 longer than train.max_tokens, {cut.counts.lost} tokens lost (of 3 records)",
        "1 of them lost supervised tokens (of 3 records)",
        f"1 longer than train.max_tokens, {chunked.counts.lost} tokens lost (of 3 records)",  # of a prompt
        "1 cut into pieces (of 3 records)",
    ]


def test_counts_add_up() -> None:
    assert Counts(records=1, lost=3) + Counts(records=2, moved=1) == Counts(records=3, lost=3, moved=1)


# --- Evaluation


def test_evaluation_scores_every_token_of_a_record_in_pieces_and_asks_it_once(
    model: LoraModel, random_adapter: Callable[..., Adapter]
) -> None:
    records = [
        Record("the patient has a fever and " * 4, "a cough since yesterday", "p", "coding"),
        Record("", "coded as J10 by the ward; " * 6, "p", "note"),
    ]
    whole = examples_of(records, model.tokenizer, ROOM)
    chunked = examples_of(records, model.tokenizer, TrainConfig(max_tokens=24, long="chunk", overlap=8))
    truncated = examples_of(records, model.tokenizer, TrainConfig(max_tokens=24))
    assert len(chunked.examples) > len(records)
    scores = evaluate(model, chunked.examples, ["coding"])
    assert scores.tokens == whole.counts.supervised
    assert scores.answers == 1
    assert evaluate(model, truncated.examples).tokens < scores.tokens
    # The one that is asked is asked as it would be if records were truncated.
    assert [e.asked for e in chunked.examples if e.answer is not None] == list(truncated.examples)


def test_an_error_names_the_record(tokenizer_without_begin: PreTrainedTokenizerBase) -> None:
    tokenizer_without_begin.chat_template = "{{ raise_exception('no chats today') }}"
    try:
        chat = Record.of_chat([Message("user", "a"), Message("assistant", "b")], "p")
        with pytest.raises(DataError, match=r"train\.jsonl: record 2: .*no chats today"):
            examples_of([Record("", "x", "p"), chat], tokenizer_without_begin, ROOM, "train.jsonl")
    finally:
        tokenizer_without_begin.chat_template = None
