"""Token sequences, and the packed rows in which they go through a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Span = tuple[int, int]
"""Places of a sequence, from the first up to but not including the second."""


@dataclass(frozen=True)
class Example:
    """A tokenised record, or a piece of one. What is supervised is predicted from what stands before it.

    ids: all tokens. prompt_tokens: how many of them, from the start, stand before the last supervised span, which goes
    on to the end. earlier: supervised spans before that, in order: former answers of a chat, or the prompt.
    kind, answer: of the record; the answer is the text of the last span, by which exact answers are scored, and None
    where there is nothing to ask.
    asked: the truncated record, where exact answers are asked by that and not by this piece.
    """

    ids: tuple[int, ...]
    prompt_tokens: int
    kind: str
    answer: str | None
    earlier: tuple[Span, ...] = ()
    asked: Example | None = None

    @property
    def spans(self) -> tuple[Span, ...]:
        """All supervised spans, in order; none begins at the first token, which nothing predicts."""
        return (*self.earlier, (self.prompt_tokens, len(self.ids)))

    @property
    def supervised(self) -> int:
        """Supervised tokens, those that end an answer included."""
        return sum(stop - start for start, stop in self.spans)

    @property
    def answer_tokens(self) -> int:
        """Tokens of the last supervised span."""
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

    def documents(self) -> Iterator[Pack]:
        """Each document as a row of its own."""
        start = 0
        for length in self.lengths:
            inside = (self.predict >= start) & (self.predict < start + length)
            places = slice(start, start + length)
            yield Pack(
                self.ids[:, places],
                self.positions[:, places],
                (length,),
                self.predict[inside] - start,
                self.targets[inside],
            )
            start += length


def pack(examples: Sequence[Example]) -> Pack:
    """Packs examples, in order, into one row."""
    import torch

    ids: list[int] = []
    positions: list[int] = []
    predict: list[int] = []
    for example in examples:
        for start, stop in example.spans:
            predict.extend(range(len(ids) + start - 1, len(ids) + stop - 1))
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


def packs(examples: Sequence[Example], max_tokens: int, padded: bool = False) -> Iterator[Pack]:
    """All examples, in order, in rows of at most `max_tokens` (a longer example gets a row of its own).

    padded: each will be filled up to the longest of its row, and counts as much.
    """

    def size(together: Sequence[Example]) -> int:
        lengths = [len(example.ids) for example in together]
        return max(lengths) * len(lengths) if padded else sum(lengths)

    waiting: list[Example] = []
    for example in examples:
        if waiting and size([*waiting, example]) > max_tokens:
            yield pack(waiting)
            waiting = []
        waiting.append(example)
    if waiting:
        yield pack(waiting)
