"""What a run found, told to people: the page `report.html`, two tables for the terminal, and one verdict for both.

The question is always the same: did the federation pay off, and for whom? The verdict is computed from the numbers
in `summary.json` and says "no", "for some" or "not compared" as readily as "yes".

Names of institutions, the configuration and version strings are other people's input. They are cleaned of control
and direction-changing characters on reading, and escaped by the template on writing; the page loads nothing and its
content security policy forbids scripts.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from common.errors import StorageError
from server import charts

PERPLEXITY_TOLERANCE = 0.01
"""Relative change of perplexity below which two arms count as even."""

ACCURACY_TOLERANCE = 0.05
"""Change of accuracy below which two arms count as even: an institution's own test asks tens of exact questions."""

SMALL_GAP = 1.05
"""Below this ratio of perplexities, best local-only to pooled, `gap_closed` divides by next to nothing."""

LONGEST_NAME = 80
"""Characters shown of a name; the rest is cut, so that one name cannot fill the page."""

SIGNS = {"gained": "▲", "lost": "▼", "even": "=", "mixed": "◆", "not compared": "–"}
"""Outcomes of a comparison, each with a sign: colour alone never carries a meaning."""


# ---- reading summary.json and metrics.jsonl ------------------------------------------------------------------------


def _clean(text: str, most: int | None = None) -> str:
    """Text without control, direction-changing or unpaired characters, cut to `most`."""
    kept = "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    return kept if most is None or len(kept) <= most else kept[: most - 1] + "…"


@dataclass(frozen=True)
class _Node:
    """A place in a JSON document that knows its own path, so that an error can name it."""

    value: Any
    path: str

    def _refuse(self, expected: str) -> StorageError:
        found = repr(self.value)
        found = found if len(found) <= 60 else found[:59] + "…"
        return StorageError(f"{self.path}: expected {expected}, found {found}; is this a finished run's directory?")

    def get(self, key: str) -> _Node | None:
        """The value under `key`, or None when it is missing or null."""
        if not isinstance(self.value, Mapping):
            raise self._refuse("an object")
        value = self.value.get(key)
        return None if value is None else _Node(value, f"{self.path}.{key}")

    def __getitem__(self, key: str) -> _Node:
        node = self.get(key)
        if node is None:
            raise StorageError(
                f"{self.path}: expected a value for {key!r}, found none; is this a finished run's directory?"
            )
        return node

    def items(self) -> Iterator[tuple[str, _Node]]:
        if not isinstance(self.value, Mapping):
            raise self._refuse("an object")
        for key, value in self.value.items():
            yield _clean(str(key), LONGEST_NAME), _Node(value, f"{self.path}.{key}")

    def elements(self) -> Iterator[_Node]:
        if not isinstance(self.value, list | tuple):
            raise self._refuse("a list")
        for i, value in enumerate(self.value):
            yield _Node(value, f"{self.path}[{i}]")

    def number(self) -> float:
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise self._refuse("a number")
        return float(self.value)

    def whole(self) -> int:
        if isinstance(self.value, bool) or not isinstance(self.value, int):
            raise self._refuse("a whole number")
        return self.value

    def flag(self) -> bool:
        if not isinstance(self.value, bool):
            raise self._refuse("true or false")
        return self.value

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self._refuse("a text")
        return _clean(self.value, 200)

    def plain(self) -> str:
        """Any scalar as a short text."""
        if isinstance(self.value, bool):
            return "yes" if self.value else "no"
        return _clean("none" if self.value is None else str(self.value), 200)


@dataclass(frozen=True)
class Score:
    """perplexity: per supervised token, infinite if a model diverged. accuracy: a share, None if nothing was asked."""

    perplexity: float
    accuracy: float | None

    @classmethod
    def read(cls, node: _Node) -> Score:
        """Read one; a perplexity that is missing or NaN is one that could not be computed, so infinite."""
        given, accuracy = node.get("perplexity"), node.get("accuracy")
        perplexity = math.inf if given is None else given.number()
        exact = None if accuracy is None else accuracy.number()
        return cls(
            math.inf if math.isnan(perplexity) else perplexity,
            None if exact is None or math.isnan(exact) else exact,
        )


@dataclass(frozen=True)
class Comparison:
    """What going from `before` to `after` brought by an institution's own test; `before` is None if not measured."""

    name: str
    before: Score | None
    after: Score

    @property
    def perplexity_change(self) -> float | None:
        """Relative, -0.2 is a fifth less; None where it cannot be said."""
        if self.before and math.isfinite(self.before.perplexity) and math.isfinite(self.after.perplexity):
            return self.after.perplexity / self.before.perplexity - 1
        return None

    @property
    def accuracy_change(self) -> float | None:
        """In shares, 0.2 is twenty points more; None where it cannot be said."""
        if self.before is None or self.before.accuracy is None or self.after.accuracy is None:
            return None
        return self.after.accuracy - self.before.accuracy

    @property
    def outcome(self) -> str:
        """`gained`, `lost`, `even`, `mixed` when perplexity and accuracy disagree, or `not compared`."""
        if self.before is None:
            return "not compared"
        before, after = self.before.perplexity, self.after.perplexity
        better = after < before * (1 - PERPLEXITY_TOLERANCE)  # of two infinities neither is better
        worse = after > before * (1 + PERPLEXITY_TOLERANCE)
        change = round(self.accuracy_change or 0.0, 9)  # 0.65 - 0.6 is a little less than 0.05
        better, worse = better or change >= ACCURACY_TOLERANCE, worse or change <= -ACCURACY_TOLERANCE
        return "mixed" if better and worse else "gained" if better else "lost" if worse else "even"


@dataclass(frozen=True)
class Arm:
    """One row of table 1. kind: `base`, `best` (of the local-only arms), `local`, `federated` or `pooled`."""

    kind: str
    score: Score
    institution: str = ""

    @property
    def label(self) -> str:
        """The arm in words, without the institution."""
        return {
            "base": "Base model", "best": "Best local-only", "local": "Local-only",
            "federated": "Federated", "pooled": "Pooled",
        }[self.kind]  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """The part of `summary.json` that the report tells. Names are cleaned; nothing here holds a path.

    local: local-only arms on everybody's test, best perplexity first. best: the one that `local_best` names.
    home: each institution's own test, to federated from local-only, or from the base if no comparison was run.
    home_compared: whether `home` starts from local-only.
    bytes_up, bytes_down: of one institution in one round. seconds: by phase, in order, with "total".
    """

    name: str
    method: str
    seed: int
    rounds_run: int
    rounds_planned: int
    best_round: int | None
    stopped_early: bool
    institutions: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]
    base: Score
    federated: Score
    best: tuple[str, Score] | None
    local: tuple[tuple[str, Score], ...]
    pooled: Score | None
    home: tuple[Comparison, ...]
    home_compared: bool
    gap_closed: float | None
    bytes_up: float
    bytes_down: float
    base_parameters: int
    adapter_parameters: int
    void_updates: int
    seconds: Mapping[str, float]
    secure_aggregation: bool
    privacy_mode: str
    privacy_details: tuple[tuple[str, str], ...]
    base_model: tuple[tuple[str, str], ...]
    versions: tuple[tuple[str, str], ...]
    started: str

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Summary:
        """Read `summary.json`; optional parts of a comparison may be missing or null.

        Raises:
            StorageError: something is missing or of the wrong type; names it.
        """
        root = _Node(data, "summary.json")
        everyone, privacy = root["everyone"], root["privacy"]
        best, pooled, gap, best_round = (
            everyone.get("local_best"), everyone.get("pooled"), root.get("gap_closed"), root.get("best_round")
        )  # fmt: skip
        local = [(name, Score.read(node)) for name, node in everyone["local"].items()] if everyone.get("local") else []
        own = list(root["own"].items())
        compared = any(node.get("local") for _, node in own)
        home = []
        for name, node in own:
            before = node.get("local" if compared else "base")
            home.append(Comparison(name, None if before is None else Score.read(before), Score.read(node["federated"])))
        gap_closed = None if gap is None else gap.number()
        return cls(
            name=_clean(root["name"].text(), LONGEST_NAME),
            method=root["method"].text(),
            seed=root["seed"].whole(),
            rounds_run=root["rounds_run"].whole(),
            rounds_planned=root["rounds_planned"].whole(),
            best_round=None if best_round is None else best_round.whole(),
            stopped_early=root["stopped_early"].flag(),
            institutions=tuple(_clean(node.text(), LONGEST_NAME) for node in root["institutions"].elements()),
            refused=tuple((name, node.text()) for name, node in root["refused"].items()) if root.get("refused") else (),
            base=Score.read(everyone["base"]),
            federated=Score.read(everyone["federated"]),
            best=None if best is None else (_clean(best["institution"].text(), LONGEST_NAME), Score.read(best)),
            local=tuple(sorted(local, key=lambda arm: arm[1].perplexity)),
            pooled=None if pooled is None else Score.read(pooled),
            home=tuple(home),
            home_compared=compared,
            gap_closed=gap_closed if gap_closed is not None and math.isfinite(gap_closed) else None,
            bytes_up=root["bytes_per_client_round"]["up"].number(),
            bytes_down=root["bytes_per_client_round"]["down"].number(),
            base_parameters=root["parameters"]["base"].whole(),
            adapter_parameters=root["parameters"]["adapter"].whole(),
            void_updates=root["void_updates"].whole(),
            seconds={name: node.number() for name, node in root["seconds"].items()},
            secure_aggregation=privacy["secure_aggregation"].flag(),
            privacy_mode=privacy["mode"].text(),
            privacy_details=tuple(
                (name, node.plain()) for name, node in privacy.items() if name not in {"secure_aggregation", "mode"}
            ),
            base_model=tuple((name, without_paths(node.plain())) for name, node in root["base_model"].items()),
            versions=tuple((name, without_paths(node.plain())) for name, node in root["versions"].items()),
            started=_moment(root["started"].text()),
        )

    @property
    def has_accuracy(self) -> bool:
        """Whether any arm was asked for exact answers."""
        return any(
            score.accuracy is not None for score in [*(a.score for a in self.arms), *(c.after for c in self.home)]
        )

    @property
    def arms(self) -> list[Arm]:
        """The rows of table 1, in reading order; the best local-only arm leads the local ones."""
        best = [Arm("best", self.best[1], self.best[0])] if self.best else []
        others = [Arm("local", score, name) for name, score in self.local if not best or name != best[0].institution]
        pooled = [Arm("pooled", self.pooled)] if self.pooled else []
        return [Arm("base", self.base), *best, *others, Arm("federated", self.federated), *pooled]

    @property
    def members(self) -> list[str]:
        """The roster without those that were refused."""
        absent = {name for name, _ in self.refused}
        return [name for name in self.institutions if name not in absent]

    def with_outcome(self, kind: str) -> list[str]:
        """Names of the institutions whose comparison with local-only came out as `kind`."""
        return [c.name for c in self.home if c.outcome == kind] if self.home_compared else []


@dataclass(frozen=True)
class Round:
    """One line of `metrics.jsonl`. train_loss: nats per supervised token. validation: None if not evaluated."""

    number: int
    contributors: int
    void: int
    train_loss: float | None
    validation: Score | None
    seconds: float
    bytes_up: float
    bytes_down: float

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Round:
        """Read one round.

        Raises:
            StorageError: something is missing or of the wrong type; names it.
        """
        node = _Node(data, "metrics.jsonl")
        loss, validation = node.get("train_loss"), node.get("validation")
        return cls(
            number=node["round"].whole(),
            contributors=node["contributors"].whole(),
            void=node["void"].whole(),
            train_loss=None if loss is None else loss.number(),
            validation=None if validation is None else Score.read(validation),
            seconds=sum(value.number() for _, value in node["seconds"].items()),
            bytes_up=node["bytes_up"].number(),
            bytes_down=node["bytes_down"].number(),
        )


_PATH = re.compile(
    r"""(?P<lead>^|[\s'"=,\[({])(?:file://)?(?:~|[A-Za-z]:)?[\\/](?=[^\s'"])(?:[^\n'",\]})]*[\\/])?""", re.MULTILINE
)


def without_paths(text: str) -> str:
    """Text in which absolute paths keep their last part only: a report travels further than its machine's layout.

    Errs on the side of hiding: of two paths on one line that only a space divides, the first is hidden whole.
    """
    return _PATH.sub(r"\g<lead>…/", text)


def _moment(stamp: str) -> str:
    """An ISO 8601 time for reading; left as it is when it is none."""
    try:
        moment = datetime.fromisoformat(stamp)
    except ValueError:
        return stamp
    return f"{moment.day} {moment:%B %Y, %H:%M} {moment.tzname() or ''}".strip()


# ---- numbers as text -----------------------------------------------------------------------------------------------


def perplexity_text(value: float) -> str:
    """Two decimals where they mean something, fewer for large values."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def accuracy_text(value: float | None) -> str:
    """A share as a percentage; a dash where nothing was asked."""
    return "–" if value is None else f"{100 * value:.1f}%"


def comparison_texts(c: Comparison) -> list[str]:
    """Perplexity before, after and its change, then the same of accuracy."""
    return [
        "–" if c.before is None else perplexity_text(c.before.perplexity),
        perplexity_text(c.after.perplexity),
        percent_change_text(c.perplexity_change),
        "–" if c.before is None else accuracy_text(c.before.accuracy),
        accuracy_text(c.after.accuracy),
        points_text(c.accuracy_change),
    ]


def _signed(value: float, decimals: int) -> str:
    """With a sign that is as wide as the plus, and none on a rounded zero."""
    rounded = f"{abs(value):.{decimals}f}"
    return rounded if not float(rounded) else ("+" if value > 0 else "\N{MINUS SIGN}") + rounded


def percent_change_text(value: float | None) -> str:
    """A relative change."""
    return "–" if value is None else f"{_signed(100 * value, 1)}%"


def points_text(value: float | None) -> str:
    """A change of a share, in percentage points."""
    return "–" if value is None else f"{_signed(100 * value, 1)} pts"


def gap_text(value: float) -> str:
    """Share of the gap closed, as a percentage."""
    return f"{_signed(100 * value, 0).removeprefix('+')}%"


def bytes_text(value: float) -> str:
    """Decimal units, as network tariffs have them."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.5 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def seconds_text(value: float) -> str:
    """Seconds below two minutes, then the two largest units."""
    if value < 120:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _short(name: str) -> str:
    """A name in a sentence; the tables have it whole. Cut in the middle: the ends tell long names apart."""
    return name if len(name) <= 32 else f"{name[:15].rstrip()}…{name[-16:].lstrip()}"


def _listed(names: Sequence[str], most: int = 4) -> str:
    """Names in a sentence; the tail of a long list becomes a number."""
    names = [_short(name) for name in names]
    if len(names) > most:
        return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} others"
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _institutions(number: int, of: int) -> str:
    """`3 of 4 institutions`, `all 4 institutions`, `the only institution`."""
    if of == 1:
        return "the only institution"
    every = "both" if of == 2 else f"all {of}"
    return f"{every} institutions" if number == of else f"{number} of {of} institutions"


# ---- the verdict ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """The answer to the report's question.

    tone: `yes`, `partly`, `no` or `unknown`. badge: the same in a word or three. headline: one sentence.
    detail: the numbers behind it.
    """

    tone: str
    badge: str
    headline: str
    detail: str


def _headline(s: Summary) -> tuple[str, str]:
    """Tone and sentence; weighs the institutions' own tests first, since they decide who joins the next federation."""
    if s.best is None:
        return "unknown", "No comparison was run, so this report cannot say whether the federation paid off."
    if not math.isfinite(s.federated.perplexity):
        return "no", "No: the federated model diverged, its perplexity is not finite."
    everyone = Comparison("everyone", s.best[1], s.federated).outcome
    best = _short(s.best[0])
    gained, lost, mixed, even = (s.with_outcome(kind) for kind in ("gained", "lost", "mixed", "even"))
    members = len(gained) + len(lost) + len(mixed) + len(even)
    if not members:
        if everyone == "gained":
            return "yes", "Yes, on everybody's test: the federated model beats every institution's own."
        return "no", f"No: on everybody's test the federated model is not clearly better than {best}'s own."
    if not gained:
        if everyone == "gained":
            ending = f", and {_listed(lost)} did better alone" if lost else ""
            return "partly", (
                "Only in general: the federated model is the best on everybody's test, but no institution clearly "
                f"gained on its own test{ending}."
            )
        whom = "its only institution" if members == 1 else f"any of its {members} institutions"
        return "no", f"No: the federation did not pay off for {whom}."
    if lost or mixed:
        losses = f"; {_listed(lost)} did better alone" if lost else ""
        unclear = f"; for {_listed(mixed)} the measures disagree" if mixed else ""
        return "partly", f"For some: {_institutions(len(gained), members)} gained{losses}{unclear}."
    rest = "" if len(gained) == members else ", and nobody lost"
    if everyone == "gained":
        return "yes", f"Yes: the federation paid off for {_institutions(len(gained), members)}{rest}."
    return "partly", (
        f"At home, yes: {_institutions(len(gained), members)} gained{rest}. But on everybody's test the federated "
        f"model is not clearly better than {best}'s own."
    )


def _gap_sentence(s: Summary) -> str:
    """How far the federation came from the best local-only model towards pooled training."""
    if s.best is None or s.pooled is None:
        return ""
    pooled = perplexity_text(s.pooled.perplexity)
    if s.gap_closed is None:
        if s.pooled.perplexity >= s.best[1].perplexity:
            return f"Pooled training ({pooled}) was no better than that, so there was no gap to close."
        return f"Pooled training reached {pooled}."
    share = gap_text(s.gap_closed)
    if s.gap_closed > 1:
        sentence = f"That is even better than pooled training ({pooled}): {share} of the gap closed."
    elif s.gap_closed > 0:
        sentence = f"That closes {share} of the gap to pooled training ({pooled})."
    else:
        sentence = f"It closes none of the gap to pooled training ({pooled}): {share}."
    if s.best[1].perplexity < SMALL_GAP * s.pooled.perplexity:
        sentence += " The gap itself is small, so this share says little."
    return sentence


def _score_text(score: Score) -> str:
    accuracy = "" if score.accuracy is None else f" (accuracy {accuracy_text(score.accuracy)})"
    return perplexity_text(score.perplexity) + accuracy


def judge(s: Summary) -> Verdict:
    """The verdict with its parts, for the page."""
    tone, headline = _headline(s)
    badge = {"yes": "Paid off", "partly": "Paid off in part", "no": "Did not pay off", "unknown": "Not compared"}[tone]
    sentences = [f"On everybody's test the federated model has perplexity {_score_text(s.federated)}"]
    if s.best is None:
        sentences[0] += f", the base model {_score_text(s.base)}."
    else:
        sentences[0] += f", the best local-only model, {_short(s.best[0])}, {_score_text(s.best[1])}."
        sentences.append(_gap_sentence(s))
    if s.federated.perplexity > s.base.perplexity:
        base = perplexity_text(s.base.perplexity)
        sentences.append(f"The federated model is worse than the base model before any training ({base}).")
    if s.refused:
        sentences.append(f"Refused or failed: {_listed([name for name, _ in s.refused])}.")
    return Verdict(tone, badge, headline, " ".join(filter(None, sentences)))


def verdict(summary: Mapping[str, Any]) -> str:
    """Whether the federation paid off and for whom, in plain sentences computed from `summary.json`.

    Raises:
        StorageError: `summary` lacks something or has it in a wrong type; names it.
    """
    found = judge(Summary.from_json(summary))
    return f"{found.headline} {found.detail}"


# ---- the terminal --------------------------------------------------------------------------------------------------

_STYLES = {
    "gained": "green", "lost": "red", "even": "dim", "mixed": "yellow", "not compared": "dim",
    "yes": "bold green", "no": "bold red", "partly": "bold yellow", "unknown": "bold",
}  # fmt: skip


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=Text(title, style="bold"), title_justify="left", box=SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if i == 0 else "right", overflow="fold")
    return table


def tables(summary: Mapping[str, Any]) -> Group:
    """The verdict and the report's two tables, for `rich.print`.

    Every cell is a `Text`, never markup, so that no name can style or hide anything.

    Raises:
        StorageError: `summary` lacks something or has it in a wrong type; names it.
    """
    s = Summary.from_json(summary)
    found = judge(s)
    measures = 2 if s.has_accuracy else 1
    first = _table("On everybody's test", ["", "perplexity", "accuracy"][: 1 + measures])
    for arm in s.arms:
        label = f"{arm.label}: {arm.institution}" if arm.institution else arm.label
        cells = [label, perplexity_text(arm.score.perplexity), accuracy_text(arm.score.accuracy)]
        first.add_row(*map(Text, cells[: 1 + measures]), style="bold" if arm.kind == "federated" else None)

    before = "alone" if s.home_compared else "base"
    heads = ["", f"perplexity\n{before} → federated", f"accuracy\n{before} → federated"][: 1 + measures]
    second = _table("At home: each institution on its own test", [*heads, "outcome"] if s.home_compared else heads)
    for c in s.home:
        old_perplexity, perplexity, _, old_accuracy, accuracy, _ = comparison_texts(c)
        cells = [c.name, f"{old_perplexity} → {perplexity}", f"{old_accuracy} → {accuracy}"][: 1 + measures]
        result = Text(f"{SIGNS[c.outcome]} {c.outcome}", style=_STYLES[c.outcome])
        second.add_row(*map(Text, cells), *([result] if s.home_compared else []))
    line = Text.assemble((found.headline, _STYLES[found.tone]), " ", found.detail)
    return Group(first, second, line)


# ---- the page ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """A stretch of a logarithmic strip from one perplexity to another, in percent of the strip's width."""

    start: float
    end: float

    @property
    def left(self) -> float:
        """Its left end."""
        return min(self.start, self.end)

    @property
    def width(self) -> float:
        """Its width."""
        return round(abs(self.end - self.start), 2)


def _strip(pairs: Sequence[tuple[float, float]]) -> list[Span | None]:
    """Places of perplexities on one logarithmic strip shared by all pairs; None where one is not finite."""
    known = [math.log(v) for pair in pairs for v in pair if 0 < v < charts.LARGEST]
    low, high = min(known, default=0.0), max(known, default=0.0)

    def place(value: float) -> float:
        return round(100 * (math.log(value) - low) / (high - low), 2) if high > low else 50.0

    return [
        Span(place(start), place(end)) if 0 < start < charts.LARGEST and 0 < end < charts.LARGEST else None
        for start, end in pairs
    ]


def _curves(s: Summary, rounds: Sequence[Round]) -> list[charts.Curve]:
    """The curves of the page; a measure that was never taken has none."""
    if not rounds:
        return []
    span = (rounds[0].number, rounds[-1].number)
    scores = [(r.number, r.validation) for r in rounds if r.validation]
    accuracies = [(n, score.accuracy) for n, score in scores if score.accuracy is not None]
    highest = max((accuracy for _, accuracy in accuracies), default=0.0)
    losses = [(r.number, r.train_loss) for r in rounds if r.train_loss is not None]
    ceiling = next(top for top in (0.05, 0.1, 0.25, 0.5, 1.0) if highest <= 0.95 * top or top == 1.0)
    found = [
        charts.curve(
            "Validation perplexity", "lower is better, log axis", [(n, score.perplexity) for n, score in scores],
            span=span, best_round=s.best_round, text=perplexity_text, log=True,
        ),
        charts.curve(
            "Exact answers", "validation accuracy, higher is better", accuracies,
            span=span, best_round=s.best_round, text=accuracy_text,
            tick_text=lambda share: f"{100 * share:g}%", limits=(0.0, ceiling),
        ),
        charts.curve(
            "Training loss", "nats per token, mean of all", losses,
            span=span, best_round=s.best_round, text="{:.3f}".format,
        ),
    ]  # fmt: skip
    return [curve for curve in found if curve]


def _phases(seconds: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """Phases with their seconds and their share in percent; what no phase accounts for stands last as `other`."""
    named = [(name, value) for name, value in seconds.items() if name != "total" and value > 0]
    spent = sum(value for _, value in named)
    total = max(seconds.get("total", spent), spent)
    if total - spent > 0.005 * total:
        named.append(("other", total - spent))
    return [(name, value, round(100 * value / total, 2)) for name, value in named]


@cache
def _template() -> Template:
    """The page's template; everything put into it is escaped, and a name it lacks is an error."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "ppl": perplexity_text, "acc": accuracy_text, "bytes": bytes_text, "secs": seconds_text,
        "gap": gap_text, "change": percent_change_text, "listed": _listed,
    }  # fmt: skip
    return environment.from_string(files("server").joinpath("report.html.j2").read_text(encoding="utf-8"))


def render(summary: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]], config_yaml: str) -> str:
    """The report as one self-contained HTML page.

    summary: `summary.json`. rounds: the lines of `metrics.jsonl`, in order; may be empty.
    config_yaml: the resolved configuration, shown with absolute paths cut to their last part.

    Raises:
        StorageError: `summary` or a round lacks something or has it in a wrong type; names it.
    """
    s = Summary.from_json(summary)
    history = [Round.from_json(line) for line in rounds]
    arms = s.arms
    page = _template().render(
        s=s,
        verdict=judge(s),
        gained=s.with_outcome("gained"),
        arms=list(zip(arms, _strip([(arm.score.perplexity, arm.score.perplexity) for arm in arms]), strict=True)),
        home=list(
            zip(
                s.home,
                _strip([(c.before.perplexity if c.before else math.inf, c.after.perplexity) for c in s.home]),
                strict=True,
            )
        ),
        comparison_texts=comparison_texts,
        signs=SIGNS,
        tolerances=(PERPLEXITY_TOLERANCE, ACCURACY_TOLERANCE),
        curves=_curves(s, history),
        participation=charts.participation([(r.number, r.contributors, r.void) for r in history], len(s.members)),
        history=history,
        phases=_phases(s.seconds),
        config="\n".join(_clean(line) for line in without_paths(config_yaml).splitlines()),
    )
    return page.lstrip()
