"""What a look at one thing after the other gives: a line each, and what later looks go on with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from common.errors import SilotuneError

OK, WARN, FAIL, SKIPPED = "ok", "warn", "fail", "skipped"

T = TypeVar("T")


@dataclass(frozen=True)
class Line:
    """What was found of one thing. verdict: OK, WARN, FAIL or SKIPPED. error: why it failed. numbers: for programs."""

    name: str
    verdict: str
    told: str
    error: SilotuneError | None = None
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "verdict": self.verdict, "told": self.told, **self.numbers}


@dataclass(frozen=True)
class Found(Generic[T]):
    """What a look at one thing gave. value: for what is looked at later. warnings: what to do, one line each."""

    value: T
    told: str
    warnings: Sequence[str] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)


class _Missing(Exception):
    """What is needed was found wanting before."""


class Look:
    """Looks at one thing after the other. tell: gets each line when it is there."""

    def __init__(self, tell: Callable[[Line], None]) -> None:
        self._tell = tell
        self.lines: list[Line] = []

    def at(self, name: str, what: Callable[[], Found[T]]) -> T | None:
        """What was found, None where that is nothing that can be gone on with."""
        try:
            found = what()
        except _Missing as missing:
            self._add(Line(name, SKIPPED, f"not looked at, since it needs: {missing}"))
        except SilotuneError as error:
            self._add(Line(name, FAIL, str(error), error))
        else:
            verdict = WARN if found.warnings else OK
            self._add(Line(name, verdict, "\n".join([found.told, *found.warnings]), numbers=found.numbers))
            return found.value
        return None

    def _add(self, line: Line) -> None:
        self.lines.append(line)
        self._tell(line)


def given(value: T | None, name: str) -> T:
    """What an earlier look at `name` gave; a look that needs it is passed over when that was nothing."""
    if value is None:
        raise _Missing(name)
    return value
