"""Scores: perplexity against a loop by hand, answers against generation one token at a time without padding."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from common import evaluation
from common.adapter import Adapter
from common.config import LoraConfig, ModelConfig
from common.evaluation import Scores, evaluate, greedy, same_answer
from common.models import LoraModel, load
from common.text import Example, pack

Examples = Callable[..., list[Example]]
EOS = 1


def answer_by_hand(model: LoraModel, prompt: Sequence[int], most: int) -> list[int]:
    """The most likely token again and again, without batch, padding or cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + most:
        with torch.no_grad():
            ids.append(int(model.peft(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


def prompts_of(examples: Sequence[Example]) -> list[tuple[int, ...]]:
    return [example.ids for example in examples]


def test_perplexity_is_that_of_a_loop_by_hand(
    model: LoraModel, random_examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = random_examples((5, 9, 2, 14, 30, 3))
    loss, tokens = 0.0, 0
    for example in examples:
        with torch.no_grad():
            logits = model.peft(input_ids=torch.tensor([example.ids])).logits[0].double()
        for place in range(example.prompt_tokens, len(example.ids)):
            loss -= float(logits[place - 1].log_softmax(-1)[example.ids[place]])
            tokens += 1
    for row_tokens in (1, 20, 10_000):  # one document a row, some, all in one
        monkeypatch.setattr(evaluation, "ROW_TOKENS", row_tokens)
        scores = evaluate(model, examples)
        assert scores.tokens == tokens == sum(example.supervised for example in examples)
        assert scores.loss == pytest.approx(loss, rel=1e-5)  # float32 logits and losses
        assert scores.perplexity == pytest.approx(math.exp(loss / tokens), rel=1e-4)
        assert (scores.correct, scores.answers, scores.accuracy) == (0, 0, None)


@pytest.mark.parametrize("at_once", [1, 3, 64])
def test_answers_are_those_of_each_prompt_by_itself(
    model: LoraModel, random_examples: Examples, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Neither left padding nor neighbours in a batch may change an answer, nor may it matter when they end."""
    monkeypatch.setattr(evaluation, "ANSWERS_AT_ONCE", at_once)
    prompts = prompts_of(random_examples((2, 3, 3, 5, 8, 8, 13, 21, 34, 40, 41, 42), seed=11))
    by_hand = [answer_by_hand(model, prompt, 8) for prompt in prompts]
    ended = [EOS in answer for answer in by_hand]
    assert any(ended)
    assert not all(ended)
    texts = [model.tokenizer.decode(answer, skip_special_tokens=True) for answer in by_hand]
    assert len(set(texts)) > 5
    assert greedy(model, prompts, 8) == texts
    # Half of the records expect what the model says. The longest may take 4 tokens + 4 to spare.
    examples = [
        Example((*prompt, *[7] * 4), len(prompt), "coding", text if index % 2 else text + "x")
        for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    scores = evaluate(model, examples, ["coding"])
    assert (scores.correct, scores.answers) == (6, 12)


def test_an_answer_ends_where_a_chat_template_ends_it(
    model: LoraModel, base_path: Path, random_examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the special token that ends the expected answers, and not only at the end-of-text token."""
    (prompt,) = prompts_of(random_examples((9,), seed=11))
    by_hand = answer_by_hand(model, prompt, 8)
    end = by_hand[2]
    assert end not in {*by_hand[:2], EOS}
    assert greedy(model, [prompt], 8, {end}) == greedy(model, [prompt], 8)  # an ordinary token ends nothing
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base_path)
    tokenizer.add_special_tokens({"extra_special_tokens": [tokenizer.convert_ids_to_tokens(end)]})
    monkeypatch.setattr(model, "tokenizer", tokenizer)
    expected = tokenizer.decode(by_hand[:2])
    assert greedy(model, [prompt], 8, {end}) == [expected]
    assert evaluate(model, [Example((*prompt, *by_hand[:3]), len(prompt), "x", expected)], ["x"]).correct == 1


def test_only_exact_kinds_are_asked(model: LoraModel, random_examples: Examples) -> None:
    examples = [replace(example, kind=kind) for example, kind in zip(random_examples((5, 6, 7)), "abc", strict=True)]
    assert evaluate(model, examples).answers == 0
    assert evaluate(model, examples, ["b"]).answers == 1
    assert evaluate(model, examples, ["a", "c", "d"]).answers == 2


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ("J10", "J10", True),
        (" J10\n", "J10", True),
        ("acute  bronchitis\t(J20)", "acute bronchitis (J20)", True),
        ("J10 J10", "J10", False),
        ("J1 0", "J10", False),
        ("j10", "J10", False),
        ("", "J10", False),
        ("J10.", "J10", False),
    ],
)
def test_answers_are_compared_whole_with_white_space_folded(found: str, expected: str, same: bool) -> None:
    assert same_answer(found, expected) is same


def test_nothing_to_score(model: LoraModel) -> None:
    scores = evaluate(model, [], ["coding"])
    assert scores == Scores()
    assert math.isnan(scores.perplexity)
    assert scores.as_dict() == {"perplexity": None, "accuracy": None}


def test_records_without_supervised_tokens_count_for_nothing(model: LoraModel, random_examples: Examples) -> None:
    scored = random_examples((6, 9))
    silent = [replace(example, prompt_tokens=len(example.ids)) for example in random_examples((4, 5), seed=9)]
    assert evaluate(model, silent) == Scores()
    mixed = evaluate(model, [silent[0], scored[0], silent[1], scored[1]])
    alone = evaluate(model, scored)
    assert mixed.tokens == alone.tokens
    assert mixed.loss == pytest.approx(alone.loss, rel=1e-6)  # other rows, other order of float32 sums


@pytest.mark.parametrize(
    ("loss", "tokens", "perplexity"),
    [(0.0, 3, 1.0), (math.log(7) * 4, 4, 7.0), (7e5, 1000, math.inf), (1e9, 1, math.inf)],
)
def test_perplexity_of_sums(loss: float, tokens: int, perplexity: float) -> None:
    scores = Scores(loss, tokens)
    assert scores.perplexity == pytest.approx(perplexity)
    assert scores.as_dict()["perplexity"] == (pytest.approx(perplexity) if math.isfinite(perplexity) else None)


def test_accuracy_is_a_share() -> None:
    assert Scores(correct=3, answers=4).accuracy == 0.75
    assert Scores(correct=0, answers=4).accuracy == 0.0


def test_a_diverged_model_has_no_perplexity_and_raises_nothing(model: LoraModel, random_examples: Examples) -> None:
    adapter = model.read()
    model.write(Adapter({key: np.full_like(factor, np.nan) for key, factor in adapter.factors.items()}))
    assert evaluate(model, random_examples((5, 6))).as_dict()["perplexity"] is None


def test_evaluation_leaves_no_trace(model: LoraModel, random_examples: Examples) -> None:
    """Neither in random states nor in the model, so that a run is the same with and without it."""
    examples = [replace(example, kind="coding", answer="x") for example in random_examples((5, 9, 7))]
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate(), model.read().digest())  # noqa: NPY002
    first = evaluate(model, examples, ["coding"])
    after = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate(), model.read().digest())  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert np.array_equal(before[1], after[1])
    assert before[2:] == after[2:]
    assert evaluate(model, examples, ["coding"]) == first
    assert all(parameter.grad is None for parameter in model.peft.parameters())


def test_dropout_is_off(grouped_path: Path, random_examples: Examples, random_adapter: Callable[..., Adapter]) -> None:
    model = load(ModelConfig(str(grouped_path)), LoraConfig(rank=4, dropout=0.5), seed=1)
    model.write(random_adapter(model.read(), seed=2))
    row = pack(random_examples((20, 30)))
    model.peft.train()
    with torch.no_grad():
        assert not torch.equal(model.logits(row), model.logits(row))  # it was on
    scores = evaluate(model, random_examples((20, 30)))
    model.peft.train()
    assert evaluate(model, random_examples((20, 30))) == scores
