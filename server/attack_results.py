"""What attacks on a run found, read from `attacks/NAME.json` in its directory for the report.

Each file is one object: `attack`, its name; `claim`, what was promised, in a sentence; `finding`, what came of it;
`verdict`, one of VERDICTS; and `measures`, a list of objects with `of` (whose number it is), `what` it is, its `value`
(null where there is none) and a `note`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.documents import LONGEST_NAME, Node, object_in, text_of

DIRECTORY = "attacks"

HELD, BROKEN, NOT_PROMISED = VERDICTS = ("held", "broken", "not promised")
"""Of the run: its claim held, a claim did not hold, or the run claims nothing against the attack."""

SIGNS = {HELD: "✓", BROKEN: "✕", NOT_PROMISED: "–"}
"""A sign for each verdict: colour alone never carries a meaning."""

_LONGEST_SENTENCE = 1000
_REMEDY = "run the attack again, or remove the file"


@dataclass(frozen=True)
class Measure:
    """One number. value: None where there is none."""

    of: str
    what: str
    value: float | None
    note: str


@dataclass(frozen=True)
class Attack:
    """One attack's result; texts are cleaned."""

    name: str
    claim: str
    finding: str
    verdict: str
    measures: tuple[Measure, ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> Attack:
        """Read one file's object. where: what errors call it.

        Raises:
            StorageError: something is missing or of the wrong type; names it.
        """
        node = Node(data, where, _REMEDY)
        said = node["verdict"]
        if said.value not in VERDICTS:
            raise said.refusal(f"one of {', '.join(VERDICTS)}")
        return cls(
            name=node["attack"].text(LONGEST_NAME),
            claim=node["claim"].text(_LONGEST_SENTENCE),
            finding=node["finding"].text(_LONGEST_SENTENCE),
            verdict=said.text(),
            measures=tuple(_measure(part) for part in node["measures"].elements()),
        )


def _measure(node: Node) -> Measure:
    value, note = node.get("value"), node.get("note")
    number = None if value is None else value.number()
    if value is not None and number is not None and not math.isfinite(number):
        raise value.refusal("a finite number, or null")
    return Measure(node["of"].text(), node["what"].text(), number, "" if note is None else note.text(_LONGEST_SENTENCE))


def found_in(directory: Path) -> tuple[Attack, ...]:
    """Whatever attacks there are in the directory of a run, by the names of their files.

    Raises StorageError for a file that cannot be read or that lacks something; names it.
    """
    return tuple(
        Attack.from_json(object_in(text_of(file, _REMEDY), str(file)), f"{DIRECTORY}/{file.name}")
        for file in sorted((directory / DIRECTORY).glob("*.json"))
    )
