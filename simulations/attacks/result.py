"""What an attack comes to: what was promised, what was found, and the figures behind it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table

from common.files import write_text
from simulations.layout import RunDirectory

Verdict = Literal["held", "broken", "not promised"]
Guard = Literal["differential privacy", "secure aggregation"]
"""What a claim rests on."""


@dataclass(frozen=True)
class Measure:
    """One figure. of: the arm or the view that it is of. note: what to hold it against."""

    of: str
    what: str
    value: float
    note: str = ""


@dataclass(frozen=True)
class Result:
    """One attack. claim: what is promised, in a sentence. finding: what was found, in a sentence.

    verdict: of the run that was attacked, as `judged` has it. `held` says that this attack did not get past the claim,
    and no more.
    """

    attack: str
    claim: str
    finding: str
    verdict: Verdict
    measures: tuple[Measure, ...]

    def as_dict(self) -> dict[str, Any]:
        """As it stands in attacks/NAME.json. Raises ValueError for a figure that is not finite."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return found

    def value(self, of: str, what: str) -> float:
        """The figure of that name. Raises KeyError when there is none."""
        return {(measure.of, measure.what): measure.value for measure in self.measures}[of, what]

    def write(self, directory: RunDirectory) -> None:
        """Into the run's directory, where its report looks."""
        write_text(directory.attack(self.attack), json.dumps(self.as_dict(), indent=2) + "\n")

    def table(self) -> Table:
        """For people at a terminal."""
        table = Table(title=f"{self.attack}: {self.verdict}", caption=f"{self.claim}\n{self.finding}")
        for column in ("of", "what", "value", "note"):
            table.add_column(column, justify="right" if column == "value" else "left")
        for measure in self.measures:
            table.add_row(measure.of, measure.what, f"{measure.value:.4g}", measure.note)
        return table


def judged(
    attack: str, guard: Guard, promised: bool, kept: bool, claim: str, finding: str, measures: Sequence[Measure]
) -> Result:
    """The result of an attack on a run that may be without what the claim rests on.

    guard: that. promised: whether the run has it; where it has not, it was tried beside the run, and what came of that
    is never `held` of the run. kept: whether the claim withstood the attack where the guard is. claim: what it
    promises. finding: begins with what was found about the run itself.
    """
    if not promised:
        claim = f"This run has no {guard} and promises nothing against this attack. {claim}"
        finding += f" The same with {guard}, which is not this run, {'held' if kept else 'was BROKEN'}."
    verdict: Verdict = "broken" if not kept else "held" if promised else "not promised"
    return Result(attack, claim, finding, verdict, tuple(measures))


Told = Callable[[str], None]
"""Whom to tell what is done."""
