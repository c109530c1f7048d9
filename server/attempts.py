"""Which attempts at a sum were made, on the coordinator's disk: a resumed run must not use a number twice, and a round
that came as far as a survivor set can end with that set only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import RunStopped, StorageError
from common.files import write_json
from common.secagg.terms import Terms


@dataclass(frozen=True)
class Begun:
    """Attempts at the sum over one global adapter.

    number: of the latest attempt; attempts count through a run. adapter: digest of the global adapter. members: cohort
    of the first attempt at this sum. survivors: the set that was named for consent; None before that.
    """

    number: int = 0
    adapter: str = ""
    members: tuple[str, ...] = ()
    survivors: tuple[str, ...] | None = None


class Attempts:
    """The attempts of one run; every change is synced to disk before any member is told of it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._begun = self._read()

    def begin(self, adapter: str, invited: tuple[str, ...], colluders: int, smallest: int) -> tuple[Begun, Terms]:
        """A new attempt with a number of its own, and its terms.

        invited: whom to ask, in order. In a repeat of an attempt at the same sum, those of them who were in the first
        attempt; and once a survivor set was named, exactly that set, whoever is invited, since members consent to no
        other. The terms stay those of the first attempt.

        Raises ConfigError when so many cannot hide each other, RunStopped when a repeat has too few members left.
        """
        before = self._begun
        if before.adapter != adapter:
            begun = Begun(before.number + 1, adapter, invited)
            terms = Terms.of(len(invited), colluders, smallest)
            cohort = invited
        else:
            terms = Terms.of(len(before.members), colluders, smallest)
            cohort = before.survivors or tuple(name for name in invited if name in before.members)
            if len(cohort) < terms.survivors:
                raise RunStopped(
                    f"{len(cohort)} institutions are left of the {terms.members} that this round began with, "
                    f"{terms.survivors} are needed. Resume when they are back; what was complete is kept."
                )
            begun = replace(before, number=before.number + 1)
        self._keep(begun)
        return replace(begun, members=cohort), terms

    def name(self, survivors: tuple[str, ...]) -> None:
        """Keeps the survivor set that members are about to be asked to consent to."""
        self._keep(replace(self._begun, survivors=survivors))

    @property
    def named(self) -> bool:
        """Whether a survivor set was named for the sum under way."""
        return self._begun.survivors is not None

    def _keep(self, begun: Begun) -> None:
        write_json(self._file, asdict(begun))
        self._begun = begun

    def _read(self) -> Begun:
        if not self._file.exists():
            return Begun()
        try:
            found: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8"))
            survivors = found["survivors"]
            return Begun(
                number=int(found["number"]),
                adapter=str(found["adapter"]),
                members=tuple(found["members"]),
                survivors=None if survivors is None else tuple(survivors),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{self._file} cannot be read: {error}; it says which attempts were made, and without it institutions "
                "refuse. Restore it, or start a new run."
            ) from error
