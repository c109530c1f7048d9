"""One verdict in words, computed from the numbers, for the page and the terminal alike.

The question is always the same: did the federation pay off, and for whom? The answer is "no", "for some" or "not
compared" as readily as "yes".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.results import SMALL_GAP, Comparison, Score, Summary


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


def share_text(value: float) -> str:
    """A share of time as a percentage with one decimal."""
    return "under 0.1%" if 0 < value < 0.0005 else f"{100 * value:.1f}%"


def measure_text(value: float | None) -> str:
    """Any number in four digits; a dash where there is none."""
    return "–" if value is None else f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def _short(name: str) -> str:
    """A name in a sentence; the tables have it whole. Cut in the middle: the ends tell long names apart."""
    return name if len(name) <= 32 else f"{name[:15].rstrip()}…{name[-16:].lstrip()}"


def listed(names: Sequence[str], most: int = 4) -> str:
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
    if s.deployed:
        return _deployed_headline(s)
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
            ending = f", and {listed(lost)} did better alone" if lost else ""
            return "partly", (
                "Only in general: the federated model is the best on everybody's test, but no institution clearly "
                f"gained on its own test{ending}."
            )
        whom = "its only institution" if members == 1 else f"any of its {members} institutions"
        return "no", f"No: the federation did not pay off for {whom}."
    if lost or mixed:
        losses = f"; {listed(lost)} did better alone" if lost else ""
        unclear = f"; for {listed(mixed)} the measures disagree" if mixed else ""
        return "partly", f"For some: {_institutions(len(gained), members)} gained{losses}{unclear}."
    rest = "" if len(gained) == members else ", and nobody lost"
    if everyone == "gained":
        return "yes", f"Yes: the federation paid off for {_institutions(len(gained), members)}{rest}."
    return "partly", (
        f"At home, yes: {_institutions(len(gained), members)} gained{rest}. But on everybody's test the federated "
        f"model is not clearly better than {best}'s own."
    )


def _deployed_headline(s: Summary) -> tuple[str, str]:
    """What a coordinator can say by itself: nobody told it how well an institution does alone."""
    if not math.isfinite(s.federated.perplexity):
        return "no", "No: the federated model diverged, its perplexity is not finite."
    if Comparison("everyone", s.base, s.federated).outcome == "gained":
        return "partly", "The federated model beats the base model."
    return "no", "No: the federated model is not clearly better than the base model."


_DEPLOYED_DETAIL = (
    "Whether that beats training alone, this page cannot know: no institution told the coordinator. Each can find out"
    " for itself, with `silotune-client adapter evaluate`."
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


_BADGES = {"yes": "Paid off", "partly": "Paid off in part", "no": "Did not pay off", "unknown": "Not compared"}
_DEPLOYED_BADGES = {"partly": "Better than the base", "no": "Not better than the base"}


def judge(s: Summary) -> Verdict:
    """The verdict with its parts, for the page."""
    tone, headline = _headline(s)
    badges = _DEPLOYED_BADGES if s.deployed else _BADGES
    where = "the coordinator's test records" if s.deployed else "everybody's test"
    sentences = [f"On {where} the federated model has perplexity {_score_text(s.federated)}"]
    if s.best is None:
        sentences[0] += f", the base model {_score_text(s.base)}."
    else:
        sentences[0] += f", the best local-only model, {_short(s.best[0])}, {_score_text(s.best[1])}."
        sentences.append(_gap_sentence(s))
    if s.federated.perplexity > s.base.perplexity:
        base = perplexity_text(s.base.perplexity)
        sentences.append(f"The federated model is worse than the base model before any training ({base}).")
    if s.refused:
        sentences.append(f"Refused or failed: {listed([name for name, _ in s.refused])}.")
    if s.absences:
        names = list(dict.fromkeys(name for name, _, _ in s.absences))
        sentences.append(f"Missed some rounds: {listed(names)}.")
    if s.undelivered:
        sentences.append(f"Without the adapter yet: {listed(s.undelivered)}.")
    if s.deployed:
        sentences.append(_DEPLOYED_DETAIL)
    return Verdict(tone, badges[tone], headline, " ".join(filter(None, sentences)))


def verdict(summary: Mapping[str, Any]) -> str:
    """Whether the federation paid off and for whom, in plain sentences computed from `summary.json`.

    Raises:
        StorageError: `summary` lacks something or has it in a wrong type; names it.
    """
    found = judge(Summary.from_json(summary))
    return f"{found.headline} {found.detail}"
