"""What a round of training is refused for: its plan, its adapter, files in pieces, a full disk, a spent budget."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client import institution as institution_module
from client.policy_file import SecureTerms
from common import policy_reasons
from common.adapter import Adapter
from common.messages import (
    ADAPTER_DIGEST_DIFFERS,
    ADAPTER_DOES_NOT_FIT,
    INTERNAL_ERROR,
    MALFORMED,
    METHOD_UNKNOWN,
    MODEL_UNUSABLE,
    NOT_INVITED,
    STORAGE_FAILED,
    Refused,
    TrainRequest,
)
from common.secagg import reasons
from common.secagg.messages import Keys
from tests.client.border.changes import (
    a_directory,
    full_disk,
    in_the_way,
    little,
    lora_of,
    moved,
    plan_of,
    private,
    restart,
    settings_of,
    write,
)
from tests.client.border.conftest import MARK, NOBODY, Border, Case, Departed, Make, refuses
from tests.client.conftest import NAMES
from tests.client.guarded import ME, OTHERS, RUN


def secure_of(request: TrainRequest, **changes: Any) -> TrainRequest:
    assert request.plan.secure is not None
    return plan_of(request, secure=replace(request.plan.secure, **changes))


def renamed(adapter: Adapter) -> Adapter:
    return Adapter({f"other.{key}": factor for key, factor in adapter.factors.items()})


def with_adapter(border: Border, adapter: Adapter) -> TrainRequest:
    plan = border.place.plan(border.start)
    return TrainRequest(replace(plan, adapter_digest=adapter.digest()), adapter)


IN_TRAINING = [
    Case("not invited", TrainRequest, NOT_INVITED, change=lambda b, r: plan_of(r, cohort=tuple(OTHERS))),
    Case(
        "another adapter than the plan's",
        TrainRequest,
        ADAPTER_DIGEST_DIFFERS,
        change=lambda b, r: replace(r, adapter=moved(r.adapter)),
    ),
    Case(
        "an adapter of another form",
        TrainRequest,
        ADAPTER_DOES_NOT_FIT,
        change=lambda b, r: with_adapter(b, renamed(b.start)),
    ),
    Case("no adapter", TrainRequest, ADAPTER_DOES_NOT_FIT, change=lambda b, r: with_adapter(b, Adapter({}))),
    Case(
        "layers that the model has not",
        TrainRequest,
        MALFORMED,
        change=lambda b, r: lora_of(r, target_modules=["no_such_layer"]),
    ),
    Case(
        "a cohort that no sum can hold",
        TrainRequest,
        MALFORMED,
        {"secure_aggregation": SecureTerms(required=False)},
        change=lambda b, r: plan_of(r, secure=None, cohort=(ME, *(f"member-{n:04}" for n in range(5000)))),
    ),
    Case(
        "dropout under differential privacy",
        TrainRequest,
        MALFORMED,
        little(1000.0),
        change=lambda b, r: private(lora_of(r, dropout=0.5)),
    ),
    Case("an unknown method", TrainRequest, METHOD_UNKNOWN, change=lambda b, r: settings_of(r, method="flora")),
    Case("a round too many", TrainRequest, MALFORMED, change=lambda b, r: plan_of(r, round=4)),
    Case("another roster", TrainRequest, reasons.ROSTER_DIFFERS, change=lambda b, r: secure_of(r, roster=NOBODY)),
    Case(
        "a cohort with a stranger",
        TrainRequest,
        reasons.COHORT_UNKNOWN,
        change=lambda b, r: plan_of(r, cohort=(*NAMES, "mallory")),
    ),
    Case(
        "a cohort below its own least",
        TrainRequest,
        reasons.COHORT_TOO_SMALL,
        change=lambda b, r: plan_of(r, cohort=(ME, OTHERS[0])),
    ),
    Case(
        "other terms than its own",
        TrainRequest,
        reasons.TERMS_DIFFER,
        prepare=lambda b: restart(b, secure_aggregation=SecureTerms(colluders=2, smallest_cohort=3)),
    ),
    Case("another length", TrainRequest, reasons.VECTOR_DIFFERS, change=lambda b, r: plan_of(r, parameters=7)),
    Case(
        "the same plan again",
        TrainRequest,
        reasons.ATTEMPT_OLD,
        prepare=lambda b: b.ask(b.attempt.train_request()),
    ),
    Case(
        "the day's rounds are over",
        TrainRequest,
        policy_reasons.ROUNDS_PER_DAY_EXCEEDED,
        {"rounds_per_day": 0},
    ),
    Case(
        "a book of rounds in pieces",
        TrainRequest,
        STORAGE_FAILED,
        damage=lambda b: write(b.place.book),
    ),
    Case(
        "a directory in place of the book",
        TrainRequest,
        STORAGE_FAILED,
        damage=lambda b: a_directory(b.place.book),
        prepare=lambda b: b.place.keep_the_day(),
    ),
    Case("marks in pieces", TrainRequest, STORAGE_FAILED, damage=lambda b: write(b.place.marks)),
    Case(
        "marks that are too deep", TrainRequest, STORAGE_FAILED, damage=lambda b: write(b.place.marks, b"[" * 100_000)
    ),
    Case(
        "a directory in place of the marks", TrainRequest, STORAGE_FAILED, damage=lambda b: a_directory(b.place.marks)
    ),
    Case("a file in place of the run", TrainRequest, STORAGE_FAILED, damage=lambda b: write(b.place.home.runs / RUN)),
    Case("a file in place of all runs", TrainRequest, STORAGE_FAILED, damage=lambda b: write(b.place.home.runs)),
    Case(
        "a state in pieces",
        TrainRequest,
        STORAGE_FAILED,
        damage=lambda b: write(b.place.home.runs / RUN / "state" / "round-00000.safetensors"),
    ),
    Case(
        "a file in place of the states",
        TrainRequest,
        STORAGE_FAILED,
        damage=lambda b: write(b.place.home.runs / RUN / "state"),
    ),
    Case(
        "a directory in place of its metrics",
        TrainRequest,
        STORAGE_FAILED,
        damage=lambda b: a_directory(b.place.home.runs / RUN / "metrics.jsonl"),
    ),
    Case(
        "a run that began with other settings",
        TrainRequest,
        reasons.SETTINGS_DIFFER,
        damage=lambda b: write(b.place.home.runs / RUN / "settings.json", b"{}"),
    ),
    Case(
        "its own chance in pieces",
        TrainRequest,
        INTERNAL_ERROR,
        damage=lambda b: write(b.place.home.runs / RUN / "chance", b"\xff\xfe"),
    ),
    Case("a full disk", TrainRequest, STORAGE_FAILED, damage=full_disk),
    Case(
        "a budget that is spent",
        TrainRequest,
        policy_reasons.BUDGET_EXHAUSTED,
        little(0.01),
        change=lambda b, r: private(r),
    ),
    Case(
        "a ledger in pieces",
        TrainRequest,
        STORAGE_FAILED,
        little(1000.0),
        damage=lambda b: in_the_way(b.place.home.ledger),
        change=lambda b, r: private(r),
    ),
    Case(
        "a base model that is gone since it was fingerprinted",
        TrainRequest,
        MODEL_UNUSABLE,
        prepare=lambda b: institution_module._shared_model.cache_clear(),
        damage=lambda b: shutil.rmtree(b.base),
        own_base=True,
    ),
]


@pytest.mark.parametrize("case", IN_TRAINING, ids=str)
def test_a_refusal_is_a_reason_code_and_nothing_else(case: Case, border: Make) -> None:
    refuses(case, border)


def test_of_a_disk_that_fills_up_nobody_outside_sees_where(
    border: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every single sync on the way to the keys fails in turn: all the same to the coordinator, all told at home."""
    sync, left = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            raise OSError(28, f"No space left on {MARK}", str(tmp_path))
        sync(handle)

    departed: list[Departed] = []
    for number in range(60):
        made = border(root=tmp_path / str(number))
        left = number
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            reply = made.ask(made.honest(TrainRequest))
        if isinstance(reply, Keys):
            break
        assert reply == Refused(STORAGE_FAILED, ME)
        departed += made.left
    assert isinstance(reply, Keys)
    assert len({len(found.data) for found in departed}) == 1
    told = set(re.findall(r"cannot write \S*/([\w.-]+): ", caplog.text))
    assert told == {
        "marks.json",
        "control",
        "rounds-of-the-day.json",
        "settings.json",
        "chance",
        "round-00001.safetensors",
        "metrics.jsonl",
    }
