"""What an institution must never forget of a run: which attempts it answered, and which sums it consented to.

On its own disk, synced before the answer that it stands for leaves; so that a restart, of it or of the coordinator,
opens no way to a second sum over the same updates.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.errors import Refusal, StorageError
from common.files import write_json
from common.messages import Plan
from common.secagg import reasons

_FORM = {"attempt": int, "settings": str, "sums": dict}


class Marks:
    """The marks of one run, in one file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def accept(self, plan: Plan) -> None:
        """Marks an attempt as answered.

        Raises Refusal(attempt_old) unless its number exceeds every one before, and settings_differ unless its settings
        are the run's. For a repeat, which has the same global adapter: terms_differ with other terms than the first
        attempt's; cohort_unknown with members that the first did not have; survivors_differ, once this member
        consented to a set of survivors, with any other cohort than that set. survivors_differ as well for another
        adapter in a round in which it consented: two that differ in a sign of zero alone give the same update. Raises
        StorageError when the mark cannot be kept.
        """
        assert plan.secure is not None
        marks = self._read()
        if plan.secure.attempt <= marks["attempt"]:
            raise Refusal(reasons.ATTEMPT_OLD, f"attempt {plan.secure.attempt}, the last was {marks['attempt']}")
        settings = hashlib.sha256(plan.settings.to_json().encode()).hexdigest()
        if marks["settings"] not in ("", settings):
            raise Refusal(reasons.SETTINGS_DIFFER, "the settings are not those of the run's first plan")
        terms = asdict(plan.secure.terms)
        first = marks["sums"].setdefault(
            plan.adapter_digest,
            {"round": plan.round, "cohort": list(plan.cohort), "terms": terms, "survivors": None},
        )
        for number in {first["round"], plan.round}:
            _require_no_other(marks, plan.adapter_digest, number)
        if first["terms"] != terms:
            raise Refusal(reasons.TERMS_DIFFER, f"a repeat with {terms}, the first attempt had {first['terms']}")
        if not set(plan.cohort) <= set(first["cohort"]):
            raise Refusal(reasons.COHORT_UNKNOWN, "a repeat with members that the first attempt did not have")
        if first["survivors"] not in (None, list(plan.cohort)):
            raise Refusal(reasons.SURVIVORS_DIFFER, f"a repeat after consenting to the sum of {first['survivors']}")
        self._write({**marks, "attempt": plan.secure.attempt, "settings": settings})

    def consent(self, adapter_digest: str, survivors: tuple[str, ...]) -> None:
        """Marks that this member consents to the sum over `survivors`, for good.

        Raises Refusal(survivors_differ) when it consented to another sum from the same global adapter or in the same
        round, StorageError when the mark cannot be kept.
        """
        marks = self._read()
        first = marks["sums"].get(adapter_digest)
        if first is None:
            raise StorageError(f"{self._file} does not hold the attempt under way; restore it, or start a new run")
        if first["survivors"] not in (None, list(survivors)):
            raise Refusal(reasons.SURVIVORS_DIFFER, f"this member consented to the sum of {first['survivors']}")
        _require_no_other(marks, adapter_digest, first["round"])
        first["survivors"] = list(survivors)
        self._write(marks)

    def _read(self) -> dict[str, Any]:
        try:
            marks: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8"))
            if not isinstance(marks, dict) or {key: type(value) for key, value in marks.items()} != _FORM:
                raise ValueError("expected attempt, settings and sums")
        except FileNotFoundError:
            return {"attempt": 0, "settings": "", "sums": {}}
        except (OSError, ValueError, RecursionError) as error:
            # Without its marks a member cannot know what it consented to, so it answers nothing.
            raise StorageError(f"{self._file} cannot be read: {error}; restore it, or start a new run") from error
        return marks

    def _write(self, marks: dict[str, Any]) -> None:
        write_json(self._file, marks)


def _require_no_other(marks: dict[str, Any], adapter_digest: str, number: int) -> None:
    """Raises Refusal(survivors_differ) when this member consented, in that round, to a sum from another adapter."""
    for adapter, one in marks["sums"].items():
        if one["round"] == number and adapter != adapter_digest and one["survivors"] is not None:
            raise Refusal(reasons.SURVIVORS_DIFFER, f"this member consented to a sum of round {number} already")
