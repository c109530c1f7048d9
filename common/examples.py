"""From records to examples: what is supervised, what is cut, and what is told of it.

A record becomes [bos] prompt newline | completion [eos]; what stands after the bar is supervised. Prompt and
completion are tokenised by themselves, so that the model meets at test time exactly the prompt tokens it was trained
on. Chats are written by the tokenizer's own template (`common.chat`). Institution and coordinator both load records
through `examples_of`, so that training and every evaluation see the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, takewhile
from typing import TYPE_CHECKING

from common.chat import own_tokens, turns_of
from common.config import TrainConfig
from common.records import ASSISTANT, Record
from common.text import Example, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Counts:
    """What became of records; private to whose they are.

    tokens, supervised: over all examples. truncated: records that were too long; lost: their tokens that nobody sees.
    cut: records that lost tokens to learn from, or to be scored by. chunked: records in several pieces.
    apart: chats of which not all answers could stand in one sequence, since the template writes former turns in another
    way. moved: chats whose system message stands before the first user's. unanswered: chats whose last messages nobody
    answers, which are left out.
    """

    records: int = 0
    examples: int = 0
    tokens: int = 0
    supervised: int = 0
    truncated: int = 0
    lost: int = 0
    cut: int = 0
    chunked: int = 0
    apart: int = 0
    moved: int = 0
    unanswered: int = 0

    def __add__(self, other: Counts) -> Counts:
        mine, theirs = asdict(self), asdict(other)
        return Counts(**{name: mine[name] + theirs[name] for name in mine})

    def notes(self) -> list[str]:
        """What is not as a reader of the records might think, in words."""
        said = {
            f"{self.truncated} longer than train.max_tokens, {self.lost} tokens lost": self.truncated,
            f"{self.cut} of them lost supervised tokens": self.cut,
            f"{self.chunked} cut into pieces": self.chunked,
            f"{self.apart} chats taken apart, one example an answer": self.apart,
            f"{self.moved} chats with the system's message before the first user's": self.moved,
            f"{self.unanswered} chats that end without an answer, the end left out": self.unanswered,
        }
        return [f"{note} (of {self.records} records)" for note, count in said.items() if count]


@dataclass(frozen=True)
class Tokenised:
    """All examples of a set of records, in order.

    lengths: tokens of each record before anything is cut. pieces: how many examples each record has become.
    """

    examples: tuple[Example, ...]
    counts: Counts
    lengths: tuple[int, ...]
    pieces: tuple[int, ...]

    @property
    def by_record(self) -> tuple[tuple[Example, ...], ...]:
        """The examples of each record."""
        examples = iter(self.examples)
        return tuple(tuple(islice(examples, count)) for count in self.pieces)


def examples_of(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, train: TrainConfig, source: object = "records"
) -> Tokenised:
    """Tokenises records as `max_tokens`, `long`, `overlap` and `supervised` of `train` say.

    source: what errors call the records. Raises DataError, and ModelError for chats without a chat template.
    """
    fit = _pieces if train.long == "chunk" else _truncated
    examples: list[Example] = []
    counts, lengths, pieces = Counts(), [], []
    for number, record in enumerate(records, 1):
        whole, notes = _tokenise(record, tokenizer, train.supervised, f"{source}: record {number}")
        begins = tokenizer.bos_token_id is not None and whole[0].ids[0] == tokenizer.bos_token_id
        fitted = [piece for example in whole for piece in fit(example, train, 1 if begins else 0)]
        examples += fitted
        counts += notes + _compared(whole, fitted, train.max_tokens)
        lengths.append(sum(len(example.ids) for example in whole))
        pieces.append(len(fitted))
    return Tokenised(tuple(examples), counts, tuple(lengths), tuple(pieces))


def _compared(whole: Sequence[Example], fitted: Sequence[Example], most: int) -> Counts:
    long = any(len(example.ids) > most for example in whole)
    chunked = len(fitted) > len(whole)
    supervised = sum(example.supervised for example in fitted)
    tokens = sum(len(example.ids) for example in fitted)
    truncated = long and not chunked
    return Counts(
        records=1,
        examples=len(fitted),
        tokens=tokens,
        supervised=supervised,
        truncated=int(truncated),
        lost=sum(len(example.ids) for example in whole) - tokens if truncated else 0,
        cut=int(supervised < sum(example.supervised for example in whole)),
        chunked=int(chunked),
    )


def _tokenise(
    record: Record, tokenizer: PreTrainedTokenizerBase, supervised: str, where: str
) -> tuple[list[Example], Counts]:
    """The record whole: one example, or one an answer where a chat's answers do not stand in one sequence."""
    if record.messages:
        examples, counts = _chat(record, tokenizer, where)
    else:
        examples, counts = [_prompted(record, tokenizer)], Counts()
    if supervised == "all":
        examples = list(_all_supervised(examples))
    return examples, counts


def _prompted(record: Record, tokenizer: PreTrainedTokenizerBase) -> Example:
    prompt = own_tokens(record.prompt + "\n", tokenizer) if record.prompt else []
    completion = [*own_tokens(record.completion, tokenizer), int(tokenizer.eos_token_id)]
    start = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    # Without a begin token the first token of a plain text has nothing before it to be predicted from.
    prompt_tokens = max(len(start) + len(prompt), 1)
    return Example((*start, *prompt, *completion), prompt_tokens, record.kind, record.completion)


def _chat(record: Record, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[list[Example], Counts]:
    turns, moved = turns_of(record.messages, tokenizer, where)
    examples: list[Example] = []
    for turn in turns:
        ids = turn.prompt + turn.answer
        earlier: tuple[Span, ...] = ()
        if examples and turn.prompt[: len(examples[-1].ids)] == examples[-1].ids:
            earlier = examples.pop().spans
        examples.append(Example(ids, len(turn.prompt), record.kind, None, earlier))
    # The question of a chat is its last answer.
    examples[-1] = replace(examples[-1], answer=turns[-1].text)
    unanswered = record.messages[-1].role != ASSISTANT
    return examples, Counts(apart=int(len(examples) > 1), moved=int(moved), unanswered=int(unanswered))


def _all_supervised(examples: Sequence[Example]) -> Iterator[Example]:
    """The prompt as well; what a former example of the same chat has said already is not said again."""
    before: tuple[int, ...] = ()
    for example in examples:
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, example.ids, strict=False)))
        start = min(max(same, 1), example.prompt_tokens)
        earlier = ((start, example.prompt_tokens),) if start < example.prompt_tokens else ()
        yield replace(example, earlier=earlier)
        before = example.ids


def _truncated(example: Example, train: TrainConfig, begin: int) -> list[Example]:
    """One example; too long a one loses the beginning of its prompt, then the end of its answer.

    begin: begin tokens, 0 or 1, which are kept.
    """
    most, length = train.max_tokens, len(example.ids)
    if length <= most:
        return [example]
    head = max(begin, 1 if example.prompt_tokens == 1 else 0)
    room = max(most - head - example.answer_tokens, 0)
    gone = max(example.prompt_tokens - head - room, 0)
    ids = (example.ids[:head] + example.ids[head + gone :])[:most]
    spans = _moved(example.spans, lambda place: max(place - gone, head, 1), len(ids))
    return [replace(example, ids=ids, prompt_tokens=spans[-1][0], earlier=spans[:-1])]


def _moved(spans: Sequence[Span], move: Callable[[int], int], length: int) -> tuple[Span, ...]:
    found = [(min(move(start), length), min(move(stop), length)) for start, stop in spans]
    return tuple(span for span in found if span[0] < span[1])


def _pieces(example: Example, train: TrainConfig, begin: int) -> list[Example]:
    """Pieces of at most `max_tokens` that share at least `overlap` tokens, the begin token among them; each supervised
    token is supervised once.

    Pieces without one are left out, and so is the end of a piece that nothing is learned from; a piece reaches back as
    far as there is room then. One shared token is the least: from nothing, the first token could not be predicted.
    Exact answers are asked by the truncated record.
    """
    most, shared = train.max_tokens, max(train.overlap, 1)
    if len(example.ids) <= most:
        return [example]
    found: list[Example] = []
    known = 1  # places before are the context of what is still to be supervised
    for start in range(begin, len(example.ids), most - shared):
        stop = min(start + most - begin, len(example.ids))
        spans = [(max(a, known), min(b, stop)) for a, b in example.spans if max(a, known) < min(b, stop)]
        if spans:
            end = spans[-1][1]
            back = max(end - most, 0)  # the body begins here, after the begin token
            ids = example.ids[:begin] + example.ids[back + begin : end]
            inside = tuple((a - back, b - back) for a, b in spans)
            found.append(Example(ids, inside[-1][0], example.kind, None, inside[:-1]))
        known = max(known, stop)
    if example.answer is not None:
        found[-1] = replace(found[-1], answer=example.answer, asked=_truncated(example, train, begin)[0])
    return found
