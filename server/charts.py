"""The geometry of the report's pictures: plain numbers in percent of the plot area, drawn by the page's template.

Percentages rather than pixels, so that a picture takes any width while its text keeps the size of the page's text.
x runs from 0 (first round) to 100 (last), y from 0 (top) to 100 (bottom), as in SVG.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

MAX_DOTS = 150
"""Dots with a read-out in one curve. A longer run keeps its whole line; its dots are thinned for the page's size."""

LARGEST = 1e100
"""Larger values, infinity and NaN are a run that diverged, not a point to scale an axis by."""


@dataclass(frozen=True)
class Tick:
    """A mark on an axis, `at` percent of its length."""

    at: float
    label: str


@dataclass(frozen=True)
class Dot:
    """One round on a curve. band_start, band_width: the strip that shows `label` when pointed at, in percent."""

    x: float
    y: float
    label: str
    band_start: float
    band_width: float


@dataclass(frozen=True)
class Curve:
    """A line over rounds.

    lines: point lists in percent, one for each unbroken stretch; a value that cannot be drawn breaks the line.
    others: point lists of curves beside it, drawn fainter and without read-outs.
    best: the published round, if it was measured here.
    summary: the curve in words, for who cannot see it.
    """

    title: str
    note: str
    summary: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[str, ...]
    dots: tuple[Dot, ...]
    best: Dot | None
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bar:
    """One round's contributors: a column `height` percent high. void: updates that were counted but not finite."""

    x: float
    width: float
    height: float
    void: int
    label: str


@dataclass(frozen=True)
class Participation:
    """Contributors over rounds."""

    summary: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    bars: tuple[Bar, ...]


def linear_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within [low, high], at most `most` of them; `low` alone when the interval is empty."""
    if not high > low:
        return [low]
    magnitude = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (magnitude * factor for factor in (1, 2, 2.5, 5, 10, 20)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            return [round(step * i, 12) for i in range(first, last + 1)]
    return [low]  # not reached: the largest step leaves at most two marks


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers within [low, high] for a logarithmic axis; both ends must be positive."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
        marks = [m * 10.0**d for d in decades for m in mantissas if low <= m * 10.0**d <= high]
        if len(marks) >= 3:
            return marks[:: math.ceil(len(marks) / most)]
    return linear_ticks(low, high)


def _round_axis(first: int, last: int) -> tuple[Callable[[int], float], tuple[Tick, ...]]:
    """Place of a round on the x axis, and the axis' ticks. A run of one round stands in the middle."""
    if last == first:
        return (lambda _: 50.0), (Tick(50.0, str(first)),)

    def place(number: int) -> float:
        return round(100 * (number - first) / (last - first), 3)

    marks = [int(mark) for mark in linear_ticks(first, last) if float(mark).is_integer()]
    inner = [mark for mark in marks if place(mark) > 12 and place(mark) < 88]
    return place, tuple(Tick(place(mark), str(mark)) for mark in [first, *inner, last])


def curve(
    title: str,
    note: str,
    points: Sequence[tuple[int, float]],
    *,
    span: tuple[int, int],
    best_round: int | None,
    text: Callable[[float], str],
    tick_text: Callable[[float], str] = "{:g}".format,
    log: bool = False,
    limits: tuple[float, float] | None = None,
    others: Sequence[Sequence[tuple[int, float]]] = (),
) -> Curve | None:
    """Lay out one curve.

    points: (round, value) in order. Values beyond `LARGEST`, or on a log axis not positive, break the line.
    span: first and last round of the run, so that all curves of a page share their x axis.
    text, tick_text: how a value reads in a label, and on the axis.
    limits: ends of the y axis; taken from the values when not given.
    others: curves beside it, within the same limits.

    Returns None when no value can be drawn.
    """
    drawable = [(n, v) for n, v in points if abs(v) < LARGEST and (v > 0 or not log)]
    if not drawable:
        return None
    scale: Callable[[float], float] = math.log10 if log else float
    low, high = limits or (min(v for _, v in drawable), max(v for _, v in drawable))
    bottom, top = scale(low), scale(high)
    if limits is None:
        margin = 0.06 * (top - bottom) or 0.05 * max(abs(top), 1.0)
        bottom, top = bottom - margin, top + margin
    marks = log_ticks(10**bottom, 10**top) if log else linear_ticks(bottom, top)
    place, x_ticks = _round_axis(*span)

    def height(value: float) -> float:
        return round(100 * (top - scale(value)) / (top - bottom), 3)

    every = math.ceil(len(drawable) / MAX_DOTS)
    shown = [p for i, p in enumerate(drawable) if i % every == 0 or p[0] == best_round or i == len(drawable) - 1]
    edges = [0.0, *((place(a) + place(b)) / 2 for (a, _), (b, _) in pairwise(shown)), 100.0]
    dots = tuple(
        Dot(place(n), height(v), f"round {n}: {text(v)}", round(left, 3), round(right - left, 3))
        for (n, v), left, right in zip(shown, edges[:-1], edges[1:], strict=True)
    )
    best = next((dot for dot, (n, _) in zip(dots, shown, strict=True) if n == best_round), None)

    kept = set(drawable)
    stretches: list[list[str]] = [[]]
    for point in points:
        if point in kept:
            stretches[-1].append(f"{place(point[0])},{height(point[1])}")
        else:
            stretches.append([])
    (first, start), (last, end) = drawable[0], drawable[-1]
    summary = f"{title}: {text(start)} in round {first}"
    if last != first:
        summary += f", {text(end)} in round {last}"
    if best:
        summary += f"; published {best.label}"
    lines = tuple(" ".join(stretch) for stretch in stretches if len(stretch) > 1)
    y_ticks = tuple(Tick(height(mark), tick_text(mark)) for mark in marks)
    beside = tuple(" ".join(f"{place(n)},{height(v)}" for n, v in other) for other in others if len(other) > 1)
    return Curve(title, note, summary, x_ticks, y_ticks, lines, dots, best, beside)


def participation(rounds: Sequence[tuple[int, int, int]], roster: int) -> Participation | None:
    """Lay out contributors over rounds, each given as (round, contributors, void updates).

    roster: institutions that could have contributed.

    Returns None when all of them did in every round and no update was void: one sentence says that better.
    """
    roster = max([roster, *(contributors for _, contributors, _ in rounds)])  # one that failed later contributed too
    if not rounds or all(contributors >= roster and void == 0 for _, contributors, void in rounds):
        return None
    most = max(roster, 1)
    width = 100 / len(rounds)
    bars = tuple(
        Bar(
            x=round(i * width + 0.1 * width, 3),
            width=round(0.8 * width, 3),
            height=round(100 * contributors / most, 3),
            void=void,
            label=f"round {number}: {contributors} of {roster}" + (f", {void} void" if void else ""),
        )
        for i, (number, contributors, void) in enumerate(rounds)
    )
    fewest = min(contributors for _, contributors, _ in rounds)
    voids = sum(void for *_, void in rounds)
    numbers = [number for number, *_ in rounds]
    _, x_ticks = _round_axis(numbers[0], numbers[-1])
    centred = tuple(
        Tick(round((numbers.index(int(tick.label)) + 0.5) * width, 3), tick.label)
        for tick in x_ticks
        if int(tick.label) in numbers
    )
    y_ticks = tuple(Tick(100 - 100 * mark / most, f"{mark:g}") for mark in linear_ticks(0, most, 4) if mark % 1 == 0)
    summary = f"Contributing institutions: at least {fewest} of {roster} in every round; {voids} void updates in all"
    return Participation(summary, centred, y_ticks, bars)
