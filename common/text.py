"""From records to token sequences, and from sequences to packed rows.

A record becomes [bos] prompt newline | completion [eos]; what stands after the bar is supervised. Prompt and
completion are tokenised by themselves, so that the model meets at test time exactly the prompt tokens it was trained
on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.records import Record

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """A tokenised record. ids: all tokens. prompt_tokens: how many of them, from the start, are not supervised."""

    ids: tuple[int, ...]
    prompt_tokens: int
    kind: str
    answer: str

    @property
    def supervised(self) -> int:
        """Supervised tokens, the end-of-text token included."""
        return len(self.ids) - self.prompt_tokens


@dataclass(frozen=True)
class Pack:
    """Documents one after the other in one row.

    ids, positions: int64 [1, s]; positions start at 0 in every document. lengths: tokens per document.
    predict: int64 [t], places whose next token is supervised. targets: int64 [t], those tokens.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    lengths: tuple[int, ...]
    predict: torch.Tensor
    targets: torch.Tensor


def tokenise(record: Record, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Example:
    """Tokenises a record; one over `max_tokens` loses the beginning of its prompt, then the end of its answer."""
    prompt: list[int] = []
    if record.prompt:
        prompt = _tokens(record.prompt + "\n", tokenizer)
    completion = _tokens(record.completion, tokenizer)
    completion = [*completion, int(tokenizer.eos_token_id)]
    start = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    room = max_tokens - len(start) - len(completion)
    prompt = prompt[-room:] if room > 0 else []
    ids = (*start, *prompt, *completion)[:max_tokens]
    # Without a begin token the first token of a plain text has nothing before it to be predicted from.
    return Example(ids, max(len(start) + len(prompt), 1), record.kind, record.completion)


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The text's own tokens. "</s>" in a record is four characters like others and ends nothing."""
    tokens: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return tokens


def pack(examples: Sequence[Example]) -> Pack:
    """Packs examples, in order, into one row."""
    import torch

    ids: list[int] = []
    positions: list[int] = []
    predict: list[int] = []
    for example in examples:
        predict.extend(range(len(ids) + example.prompt_tokens - 1, len(ids) + len(example.ids) - 1))
        positions.extend(range(len(example.ids)))
        ids.extend(example.ids)
    row = torch.tensor(ids, dtype=torch.int64)
    places = torch.tensor(predict, dtype=torch.int64)
    return Pack(
        ids=row[None],
        positions=torch.tensor(positions, dtype=torch.int64)[None],
        lengths=tuple(len(example.ids) for example in examples),
        predict=places,
        targets=row[places + 1],
    )


def packs(examples: Sequence[Example], max_tokens: int) -> Iterator[Pack]:
    """All examples, in order, in rows of at most `max_tokens` (a longer example gets a row of its own)."""
    waiting: list[Example] = []
    for example in examples:
        if waiting and sum(len(other.ids) for other in waiting) + len(example.ids) > max_tokens:
            yield pack(waiting)
            waiting = []
        waiting.append(example)
    if waiting:
        yield pack(waiting)
