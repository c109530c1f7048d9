"""Records: what an institution owns and never sends."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """One training or test record.

    prompt: what the model is given; may be empty (plain text). Not supervised.
    completion: what it should write. Supervised, followed by the end-of-text token.
    person: whose record it is; splits and privacy budgets go by person, and a person may have many records.
    kind: the task, such as "coding" or "note"; `evaluation.exact` names the kinds whose whole answer is scored.
    """

    prompt: str
    completion: str
    person: str
    kind: str = "text"
