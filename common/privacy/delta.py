"""How small a delta must be for a guarantee that means something to each unit of privacy.

Delta is the probability with which the guarantee may fail. Who lays one unit out of n open, drawn at random, keeps to
(0, 1/n)-differential privacy (Dwork & Roth 2014, section 2.3): a delta near 1/n promises nothing to anybody.
"""

from __future__ import annotations

from decimal import ROUND_FLOOR, Context, Decimal

from common.config import PrivacyConfig

MARGIN = 10
"""Delta is to be at most 1 / (MARGIN x units)."""


def largest_delta(units: int) -> float:
    """The largest delta that means something among so many units, at least 1; rounded down to two digits."""
    return float(Context(prec=2, rounding=ROUND_FLOOR).divide(Decimal(1), Decimal(MARGIN * units)))


def about_institutions(privacy: PrivacyConfig, institutions: int) -> str | None:
    """What to mind of a run's delta where the institution is the unit; anybody can count those."""
    if privacy.mode != "institution":
        return None
    return delta_warning("privacy.delta", privacy.delta, institutions, "institution", "in the run")


def delta_warning(key: str, delta: float, units: int, unit: str, whose: str) -> str | None:
    """What to mind of a delta that is larger than 1 / (MARGIN x units); None where it is not.

    key: what the setting is called. unit: of privacy, in the singular. whose: where they are.
    """
    if delta <= 1 / (MARGIN * units):
        return None
    most = f"{largest_delta(units):g}"
    return (
        f"{key}: found {delta:g} for {units} {unit}{'' if units == 1 else 's'} {whose}; expected at most {most}, which"
        f" is 1 / ({MARGIN} x {units}): a guarantee that may fail with a larger probability means nothing to a single"
        f" {unit}; set it to {most} or less"
    )
