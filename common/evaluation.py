"""Evaluation: perplexity per supervised token, and the share of exact answers."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.chat import special_ids
from common.text import Example, packs

if TYPE_CHECKING:
    from common.models import LoraModel

ROW_TOKENS = 2048  # tokens of one evaluation row; bounds memory
ANSWERS_AT_ONCE = 64


@dataclass(frozen=True)
class Scores:
    """Sums over records, so that scores of disjoint sets add up.

    loss: nats. tokens: supervised tokens. correct, answers: exact answers and how many were asked.
    """

    loss: float = 0.0
    tokens: int = 0
    correct: int = 0
    answers: int = 0

    @property
    def perplexity(self) -> float:
        """Exp of the mean loss per supervised token; infinite where exp overflows, NaN where nothing was scored."""
        if not self.tokens:
            return math.nan
        mean = self.loss / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def accuracy(self) -> float | None:
        """Share of answers that were exact; None when none was asked."""
        return self.correct / self.answers if self.answers else None

    def as_dict(self) -> dict[str, float | None]:
        """As it stands in reports; a perplexity that is not finite becomes None."""
        return {"perplexity": self.perplexity if math.isfinite(self.perplexity) else None, "accuracy": self.accuracy}


def evaluate(model: LoraModel, examples: Sequence[Example], exact: Sequence[str] = ()) -> Scores:
    """Scores the model as it stands on examples; those whose kind is in `exact` must also be answered.

    A record in pieces counts with every supervised token, and is asked once.

    Dropout is off, nothing is trained and no random state is touched.
    """
    loss, tokens = _loss(model, examples)
    asked = [example.asked or example for example in examples if example.kind in exact and example.answer is not None]
    return Scores(loss, tokens, _correct(model, asked), len(asked))


def _loss(model: LoraModel, examples: Sequence[Example]) -> tuple[float, int]:
    import torch

    model.peft.eval()
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for row in packs(examples, ROW_TOKENS, padded=not model.packed):
            logits = model.logits(row).float()
            losses = torch.nn.functional.cross_entropy(logits, row.targets.to(logits.device), reduction="none")
            total += float(losses.double().sum())
            tokens += len(row.targets)
    return total, tokens


def same_answer(found: str, expected: str) -> bool:
    """Whether two answers are equal after white space is folded."""
    return found.split() == expected.split()


def _correct(model: LoraModel, examples: Sequence[Example]) -> int:
    """How many answers greedy generation gets right. Batches go by length, so that little is padded."""
    ordered = sorted(examples, key=lambda example: (example.prompt_tokens, example.ids))
    correct = 0
    for start in range(0, len(ordered), ANSWERS_AT_ONCE):
        batch = ordered[start : start + ANSWERS_AT_ONCE]
        prompts = [example.ids[: example.prompt_tokens] for example in batch]
        answers = greedy(model, prompts, _room(batch), {example.ids[-1] for example in batch})
        correct += sum(same_answer(found, example.answer or "") for found, example in zip(answers, batch, strict=True))
    return correct


def _room(batch: Sequence[Example]) -> int:
    """Tokens an answer may take: the longest expected one, and some for an answer spelled in other tokens."""
    return max(example.answer_tokens for example in batch) + 4


def greedy(
    model: LoraModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Collection[int] = ()
) -> list[str]:
    """Greedy continuations of tokenised prompts, as text, up to the end-of-text token or a special one of `ends`."""
    import torch
    from transformers import GenerationConfig

    tokenizer = model.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])  # [b, s]
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])  # [b, s]
    end = sorted({int(tokenizer.eos_token_id), *(special_ids(tokenizer) & set(ends))})
    model.peft.eval()
    with torch.inference_mode(), model.arithmetic():
        output = model.peft.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=end
            ),
        )
    return list(tokenizer.batch_decode(output[:, width:], skip_special_tokens=True))
