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
from common.secagg.aggregator import AttemptFailed
from common.secagg.terms import Terms

# A coordinator whose newest checkpoint is damaged goes back to the one before, and so to an older sum.
_KEPT_SUMS = 4


@dataclass(frozen=True)
class Begun:
    """Attempts at the sum over one global adapter.

    number: of its latest attempt; attempts count through a run. adapter: digest of the global adapter. members: cohort
    of the first attempt at this sum. survivors: the set that was named for consent; None before that. tries: how many
    attempts there were at this sum.
    """

    number: int = 0
    adapter: str = ""
    members: tuple[str, ...] = ()
    survivors: tuple[str, ...] | None = None
    tries: int = 1


class Attempts:
    """The attempts of one run; every change is synced to disk before any member is told of it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._latest, self._before = self._read()

    def begin(self, adapter: str, invited: tuple[str, ...], colluders: int, smallest: int) -> tuple[Begun, Terms]:
        """A new attempt with a number of its own, and its terms.

        invited: whom to ask, in order. In a repeat of an attempt at the same sum, those of them who were in the first
        attempt; and once a survivor set was named, exactly that set, whoever is invited, since members consent to no
        other. The terms stay those of the first attempt. When nobody of that attempt is invited, it is another group's
        sum, and a first attempt of its own.

        Raises ConfigError when so many cannot hide each other, RunStopped when a repeat has too few members left.
        """
        number = self._latest.number + 1
        before = next((one for one in (self._latest, *self._before) if one.adapter == adapter), None)
        if before is None or not set(invited) & set(before.members):
            begun = Begun(number, adapter, invited)
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
            begun = replace(before, number=number, tries=before.tries + 1)
        self._keep(begun)
        return replace(begun, members=cohort), terms

    def name(self, survivors: tuple[str, ...]) -> None:
        """Keeps the survivor set that members are about to be asked to consent to.

        Raises AttemptFailed when another set was named for this sum before: whoever consented to it consents to no
        other, and it can still be summed when all of it are back.
        """
        named = self._latest.survivors
        if named is not None and named != survivors:
            gone = ", ".join(name for name in named if name not in survivors)
            raise AttemptFailed(
                f"{len(survivors)} of the {len(named)} members whose sum was named are left (without {gone}), and they "
                "can consent to no other set"
            )
        self._keep(replace(self._latest, survivors=survivors))

    def _keep(self, begun: Begun) -> None:
        others = [one for one in (self._latest, *self._before) if one.adapter not in ("", begun.adapter)]
        before = tuple(others[: _KEPT_SUMS - 1])
        write_json(self._file, [asdict(one) for one in (begun, *before)])
        self._latest, self._before = begun, before

    def _read(self) -> tuple[Begun, tuple[Begun, ...]]:
        if not self._file.exists():
            return Begun(), ()
        try:
            found: list[dict[str, Any]] = json.loads(self._file.read_text(encoding="utf-8"))
            latest, *before = [
                Begun(
                    number=int(one["number"]),
                    tries=int(one["tries"]),
                    adapter=str(one["adapter"]),
                    members=tuple(one["members"]),
                    survivors=None if one["survivors"] is None else tuple(one["survivors"]),
                )
                for one in found
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{self._file} cannot be read: {error}; it says which attempts were made, and without it institutions "
                "refuse. Restore it, or start a new run."
            ) from error
        return latest, tuple(before)
