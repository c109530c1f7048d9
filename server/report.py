"""The report of a run: the page `report.html`, and two tables for the terminal.

The page loads nothing, and its content security policy forbids scripts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from common.files import write_text
from server import attack_results, charts
from server.attack_results import Attack
from server.documents import clean, object_in, text_of
from server.protection import last
from server.results import ACCURACY_TOLERANCE, PERPLEXITY_TOLERANCE, SIGNS, Round, Summary, without_paths
from server.verdict import (
    accuracy_text,
    bytes_text,
    comparison_texts,
    gap_text,
    judge,
    measure_text,
    perplexity_text,
    seconds_text,
    share_text,
)

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
    first = _table(
        "On the coordinator's test records" if s.deployed else "On everybody's test",
        ["", "perplexity", "accuracy"][: 1 + measures],
    )
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
    privacy = Text(*_privacy_line(s))
    return Group(first, line, privacy) if s.deployed else Group(first, second, line, privacy)


def _privacy_line(s: Summary) -> tuple[str, str]:
    """What noise bounds, and the style that it is told in."""
    spending = s.protection.spending
    if not s.protection.private:
        return "No differential privacy: nothing bounds what the adapter tells of a single person's records.", "red"
    if spending is None:
        return f"Differential privacy of mode {s.protection.mode}.", ""
    spent = measure_text(last(spending.curves[0]))
    return f"Epsilon {spent} per {spending.unit} at delta {spending.delta:g}, mode {s.protection.mode}.", ""


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
    spent = _spent(s, span)
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
    return [curve for curve in [*found, spent] if curve]


def _spent(s: Summary, span: tuple[int, int]) -> charts.Curve | None:
    """Epsilon over rounds; of several institutions the dearest, and the others beside it."""
    spending = s.protection.spending
    if spending is None:
        return None
    dearest, *others = spending.curves
    who = "of the institution that spent most" if others else "of each institution" if spending.ledgers else "implied"
    return charts.curve(
        f"Epsilon per {spending.unit}", f"{who}, at delta {spending.delta:g}; lower protects more", dearest,
        span=span, best_round=s.best_round, text=measure_text,
        limits=(0.0, 1.06 * last(dearest) or 1.0), others=others,
    )  # fmt: skip


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
        "gap": gap_text, "share": share_text, "measure": measure_text,
    }  # fmt: skip
    return environment.from_string(files("server").joinpath("report.html.j2").read_text(encoding="utf-8"))


_REMEDY = "give the name or the directory of a run that has ended"


def write(directory: Path, page: Path | None = None) -> dict[str, Any]:
    """Writes the page of an ended run from what lies in its directory, and returns what its summary.json holds.

    Read are summary.json, metrics.jsonl, config.yaml and the results of attacks, if any. page: where it goes;
    report.html in the directory when left out.

    Raises:
        StorageError: a file is missing, damaged, or lacks something (named), or the page cannot be written.
    """
    file = directory / "metrics.jsonl"
    lines = enumerate(text_of(file, _REMEDY).splitlines(), 1)
    summary = object_in(text_of(directory / "summary.json", _REMEDY), str(directory / "summary.json"))
    rounds = [object_in(line, f"{file}:{number}") for number, line in lines]
    config_yaml = text_of(directory / "config.yaml", _REMEDY)
    written = render(summary, rounds, config_yaml, attack_results.found_in(directory))
    write_text(page or directory / "report.html", written)
    return summary


def render(
    summary: Mapping[str, Any],
    rounds: Sequence[Mapping[str, Any]],
    config_yaml: str,
    attacks: Sequence[Attack] = (),
) -> str:
    """The report as one self-contained HTML page.

    summary: `summary.json`. rounds: the lines of `metrics.jsonl`, in order; may be empty.
    config_yaml: the resolved configuration, shown with absolute paths cut to their last part.
    attacks: what attacks on the run found.

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
        attacks=attacks,
        last=last,
        verdict_signs=attack_results.SIGNS,
        config="\n".join(clean(line) for line in without_paths(config_yaml).splitlines()),
    )
    return page.lstrip()
