"""Whether a run's delta means something to the units of its institutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from common.config import UNITS, Config
from common.privacy.delta import about_institutions, delta_warning
from common.records import Record


def about_delta(config: Config, training: Callable[[str], Sequence[Record]]) -> str | None:
    """What to mind of `privacy.delta` where it is too large at the institution with the most units.

    training: the training records of the institution of that name, which are all that a run may tell of; read under
    differential privacy alone. With the institution as the unit, all institutions are counted.
    """
    if not config.privacy.private:
        return None
    unit = UNITS[config.privacy.mode]
    if unit == "institution":
        return about_institutions(config.privacy, len(config.data.names))
    count, name = max((_units(training(name), unit), name) for name in config.data.names)
    return delta_warning("privacy.delta", config.privacy.delta, count, unit, f"that {name} trains on, the most of all")


def _units(records: Sequence[Record], unit: str) -> int:
    return len({record.person for record in records}) if unit == "patient" else len(records)
