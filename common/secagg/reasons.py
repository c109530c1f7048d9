"""Reason codes of secure aggregation: all that crosses the border when a side refuses, and nothing of the data."""

from __future__ import annotations

SECURE_AGGREGATION_REQUIRED = "secure_aggregation_required"
ROSTER_DIFFERS = "roster_differs"
COHORT_UNKNOWN = "cohort_unknown"
COHORT_TOO_SMALL = "cohort_too_small"
TERMS_DIFFER = "terms_differ"
SETTINGS_DIFFER = "settings_differ"
VECTOR_DIFFERS = "vector_differs"
ATTEMPT_OLD = "attempt_old"
ATTEMPT_UNKNOWN = "attempt_unknown"
ATTEMPT_OVER = "attempt_over"
PHASE_WRONG = "phase_wrong"
KEYS_UNVERIFIED = "keys_unverified"
SHARES_UNVERIFIED = "shares_unverified"
SHARES_UNREADABLE = "shares_unreadable"
TOO_FEW_LEFT = "too_few_left"
SURVIVORS_UNKNOWN = "survivors_unknown"
SURVIVORS_DIFFER = "survivors_differ"
SIGNATURES_UNVERIFIED = "signatures_unverified"

REASONS = frozenset(
    {
        SECURE_AGGREGATION_REQUIRED,
        ROSTER_DIFFERS,
        COHORT_UNKNOWN,
        COHORT_TOO_SMALL,
        TERMS_DIFFER,
        SETTINGS_DIFFER,
        VECTOR_DIFFERS,
        ATTEMPT_OLD,
        ATTEMPT_UNKNOWN,
        ATTEMPT_OVER,
        PHASE_WRONG,
        KEYS_UNVERIFIED,
        SHARES_UNVERIFIED,
        SHARES_UNREADABLE,
        TOO_FEW_LEFT,
        SURVIVORS_UNKNOWN,
        SURVIVORS_DIFFER,
        SIGNATURES_UNVERIFIED,
    }
)
