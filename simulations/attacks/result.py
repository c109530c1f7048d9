"""What an attack comes to: what was promised, what was found, and the figures behind it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table

from common.files import write_text
from simulations.layout import RunDirectory

Verdict = Literal["held", "broken", "not promised"]


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

    verdict: `held` says that this attack did not get past the claim, and no more.
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


Told = Callable[[str], None]
"""Whom to tell what is done."""
