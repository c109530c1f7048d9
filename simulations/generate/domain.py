"""What an invented profession knows: cues, the outcomes they imply, and how its people write.

A rule is `an application or a patient with these cues has this outcome`. Two outcomes share at most one cue, so any
two cues of an outcome determine it: the right answer is never ambiguous.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

FEWEST_CUES, MOST_CUES = 2, 4


@dataclass(frozen=True)
class Cue:
    """Something stated in a record. wordings: ways to say it, all with the same meaning; the first is the plain one."""

    wordings: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.wordings[0]


@dataclass(frozen=True)
class Outcome:
    """What its cues imply.

    topic: the specialty or product it belongs to.
    name, code, action: what answers are made of; each follows from the cues and from nothing else.
    kinds: kinds of record that ask for it, with their shares.
    share: how often it comes up, relative to the other outcomes of its topic.
    """

    topic: str
    name: str
    code: str
    action: str
    cues: tuple[Cue, ...]
    kinds: tuple[tuple[str, float], ...]
    share: float = 1.0


@dataclass(frozen=True)
class Person:
    """A patient or applicant. key: unique in a federation. age: in years."""

    key: str
    age: int
    woman: bool


@dataclass(frozen=True)
class Case:
    """The facts behind one record. stated: cues and background remarks, worded and in the order of the text."""

    person: Person
    outcome: Outcome
    kind: str
    stated: tuple[str, ...]


@dataclass(frozen=True)
class Text:
    """prompt: what is given, cues included. completion: the answer, fully determined by outcome, kind and style."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Domain:
    """One kind of institution.

    topics: in a fixed order. outcomes: every outcome of every topic.
    remarks: true but irrelevant statements; none of them is a wording of a cue.
    styles: number of house styles; institution i writes in style i modulo this.
    render: (case, style, variant in [0, 1)) -> text.
    exact: the kind whose whole answer is scored.
    """

    name: str
    topics: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    remarks: tuple[str, ...]
    styles: int
    render: Callable[[Case, int, float], Text]
    exact: str

    def of_topic(self, topic: str) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.topic == topic)

    def cues(self) -> tuple[Cue, ...]:
        """Every cue once, in order of first mention."""
        return tuple(dict.fromkeys(cue for outcome in self.outcomes for cue in outcome.cues))


def parse_cues(*worded: str) -> tuple[Cue, ...]:
    """Cues from `plain wording/other wording` strings."""
    return tuple(Cue(tuple(text.split("/"))) for text in worded)


@cache
def cue_sets(outcome: Outcome, held_out: bool) -> tuple[tuple[Cue, ...], ...]:
    """The combinations of cues that records of one side may state; the two sides share none.

    A third of the combinations of each size is kept for held-out people, chosen by a digest of the names so that the
    choice never moves. A model that answers on them has learned what cues mean, not which records it saw.
    """
    chosen: list[tuple[Cue, ...]] = []
    for size in range(FEWEST_CUES, min(MOST_CUES, len(outcome.cues) - 1) + 1):
        ranked = sorted(itertools.combinations(outcome.cues, size), key=lambda cues: _digest(outcome, cues))
        cut = math.ceil(len(ranked) / 3)
        chosen.extend(ranked[:cut] if held_out else ranked[cut:])
    return tuple(chosen)


def draw_cues(outcome: Outcome, held_out: bool, rng: np.random.Generator) -> tuple[Cue, ...]:
    """A combination of cues; its size is drawn first, larger ones more often in proportion, then the combination."""
    sets = cue_sets(outcome, held_out)
    sizes = np.array(sorted({len(cues) for cues in sets}))
    size = rng.choice(sizes, p=sizes / sizes.sum())
    candidates = [cues for cues in sets if len(cues) == size]
    return candidates[rng.integers(len(candidates))]


def _digest(outcome: Outcome, cues: tuple[Cue, ...]) -> bytes:
    text = "|".join((outcome.topic, outcome.name, *sorted(cue.name for cue in cues)))
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
