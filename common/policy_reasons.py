"""Reason codes of an institution's policy: all that crosses the border when it refuses what a plan asks for."""

from __future__ import annotations

BASE_MODEL_NOT_ALLOWED = "base_model_not_allowed"
METHOD_NOT_ALLOWED = "method_not_allowed"
RANK_TOO_LARGE = "rank_too_large"
PASSES_TOO_MANY = "passes_too_many"
DATA_SET_NOT_ALLOWED = "data_set_not_allowed"
DATA_SET_UNKNOWN = "data_set_unknown"
NOT_APPROVED = "not_approved"
PRIVACY_REQUIRED = "privacy_required"
PERSONS_UNKNOWN = "persons_unknown"
BUDGET_EXHAUSTED = "budget_exhausted"
PAUSED = "paused"
LEFT = "left"
ROUNDS_PER_DAY_EXCEEDED = "rounds_per_day_exceeded"

REASONS = frozenset(
    {
        BASE_MODEL_NOT_ALLOWED,
        METHOD_NOT_ALLOWED,
        RANK_TOO_LARGE,
        PASSES_TOO_MANY,
        DATA_SET_NOT_ALLOWED,
        DATA_SET_UNKNOWN,
        NOT_APPROVED,
        PRIVACY_REQUIRED,
        PERSONS_UNKNOWN,
        BUDGET_EXHAUSTED,
        PAUSED,
        LEFT,
        ROUNDS_PER_DAY_EXCEEDED,
    }
)
