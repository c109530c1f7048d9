"""What the policy and the people of an institution refuse: a run at hello and in every round, and any message."""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import pytest

from client.policy_file import Budget
from common import policy_reasons
from common.base_model import Fingerprint
from common.config import PrivacyConfig
from common.messages import (
    BASE_MODEL_DIFFERS,
    MALFORMED,
    MODEL_UNUSABLE,
    NOT_CONFIGURED,
    PROTOCOL,
    PROTOCOL_DIFFERS,
    STORAGE_FAILED,
    VERSION_DIFFERS,
    Hello,
    Request,
    TrainRequest,
)
from common.secagg import reasons
from tests.client.border.changes import (
    OTHER_BASE,
    allow_other_base,
    broken,
    full_disk,
    in_the_way,
    lora_of,
    plan_of,
    settings_of,
    unreadable,
    write,
)
from tests.client.border.conftest import MARK, NOBODY, REQUESTS, Border, Case, Make, refuses
from tests.client.guarded import RUN

AT_HELLO = [
    Case(
        "another roster, whoever approved it",
        Hello,
        reasons.ROSTER_DIFFERS,
        {"approval": "manual"},
        change=lambda b, r: replace(r, roster=NOBODY),
    ),
    Case(
        "a roster, without a part in secure aggregation",
        Hello,
        reasons.ROSTER_DIFFERS,
        damage=lambda b: setattr(b, "member", replace(b.member, secure=None)),
    ),
    Case(
        "another protocol",
        Hello,
        PROTOCOL_DIFFERS,
        change=lambda b, r: replace(r, protocol=PROTOCOL + 1),
        named=False,
        parts=(str(PROTOCOL),),
    ),
    Case(
        "another release",
        Hello,
        VERSION_DIFFERS,
        change=lambda b, r: replace(r, version=f"9.{MARK}"),
        parts=(version("silotune"),),
    ),
    Case("a full disk", Hello, STORAGE_FAILED, {"approval": "manual"}, damage=full_disk),
]


def train_of(message: Any, **changes: Any) -> Any:
    settings = message.plan.settings if isinstance(message, TrainRequest) else message.settings
    return settings_of(message, train=replace(settings.train, **changes))


def base_of(message: Any, found: Fingerprint) -> Any:
    if isinstance(message, TrainRequest):
        return replace(message, plan=replace(message.plan, fingerprint=found))
    return replace(message, fingerprint=found)


def run_of(message: Any, run: str) -> Any:
    if isinstance(message, TrainRequest):
        return replace(message, plan=replace(message.plan, run=run))
    return replace(message, run=run)


def clear(message: Any) -> Any:
    return replace(message, roster="") if isinstance(message, Hello) else plan_of(message, secure=None)


def seen_by_others(border: Border) -> None:
    border.place.control.pause()
    (border.place.home.control / "paused.json").chmod(0o644)


def of_nobody(border: Border) -> None:
    """The institution begins anew, with records of which nobody knows whose they are."""
    border.place.forget_persons()
    border.member = border.place.institution()


def by_policy(asked: type[Request]) -> list[Case]:
    """What the policy refuses of a run at Hello, and of every round of it."""
    return [
        Case("in the clear", asked, reasons.SECURE_AGGREGATION_REQUIRED, change=lambda b, r: clear(r)),
        Case(
            "a base model that is not allowed",
            asked,
            policy_reasons.BASE_MODEL_NOT_ALLOWED,
            change=lambda b, r: base_of(r, OTHER_BASE),
        ),
        Case("a method", asked, policy_reasons.METHOD_NOT_ALLOWED, {"methods": ("ffa",)}),
        Case("a rank", asked, policy_reasons.RANK_TOO_LARGE, change=lambda b, r: lora_of(r, rank=10**6)),
        Case("passes", asked, policy_reasons.PASSES_TOO_MANY, change=lambda b, r: train_of(r, passes_per_round=1e6)),
        Case("a weight unit", asked, reasons.SETTINGS_DIFFER, {"weight_unit": 3}),
        Case(
            "a data set that is here and not allowed",
            asked,
            policy_reasons.DATA_SET_NOT_ALLOWED,
            change=lambda b, r: settings_of(r, data_set=f"{MARK}-set"),
        ),
        Case(
            "a data set that is not here and not allowed",
            asked,
            policy_reasons.DATA_SET_NOT_ALLOWED,
            change=lambda b, r: settings_of(r, data_set=f"{MARK}-other"),
        ),
        Case(
            "a data set that is allowed and has no file",
            asked,
            policy_reasons.DATA_SET_UNKNOWN,
            {"data_sets": ("notes", "letters")},
            change=lambda b, r: settings_of(r, data_set="letters"),
        ),
        Case(
            "differential privacy that it needs and is not offered",
            asked,
            policy_reasons.PRIVACY_REQUIRED,
            {"populations": {f"{MARK}-people": Budget(("notes",), ("record",), 1.0, 1e-5)}},
        ),
        Case(
            "patients' privacy on records of nobody",
            asked,
            policy_reasons.PERSONS_UNKNOWN,
            prepare=of_nobody,
            change=lambda b, r: settings_of(r, privacy=PrivacyConfig("patient", noise_multiplier=1.0)),
        ),
        Case("nobody approved it", asked, policy_reasons.NOT_APPROVED, {"approval": "manual"}),
        Case("a pause", asked, policy_reasons.PAUSED, damage=lambda b: b.place.control.pause()),
        Case(
            "a run name that leads elsewhere",
            asked,
            MALFORMED,
            change=lambda b, r: run_of(r, "run+1"),
        ),
        Case(
            "nobody knows whether it pauses",
            asked,
            STORAGE_FAILED,
            damage=lambda b: write(b.place.home.control / "paused.json"),
        ),
        Case(
            "a list of approvals in pieces",
            asked,
            STORAGE_FAILED,
            {"approval": "manual"},
            damage=lambda b: write(b.place.home.control / "approved.json"),
        ),
        Case(
            "what people said can be read by others",
            asked,
            NOT_CONFIGURED,
            damage=seen_by_others,
        ),
        Case(
            "a file where what waits is to be kept",
            asked,
            NOT_CONFIGURED,
            {"approval": "manual"},
            damage=lambda b: in_the_way(b.place.home.control),
        ),
        Case("no base model", asked, MODEL_UNUSABLE, damage=broken(shutil.rmtree), own_base=True),
        Case(
            "a base model whose settings are in pieces",
            asked,
            MODEL_UNUSABLE,
            damage=broken(lambda base: write(base / "config.json", b"{" + MARK.encode())),
            own_base=True,
        ),
        Case(
            "a base model whose settings are too deep",
            asked,
            MODEL_UNUSABLE,
            damage=broken(lambda base: write(base / "config.json", b"[" * 100_000)),
            own_base=True,
        ),
        Case(
            "a base model whose weights are in pieces",
            asked,
            MODEL_UNUSABLE,
            damage=broken(lambda base: write(base / "model.safetensors")),
            own_base=True,
        ),
        Case(
            "a base model without weights",
            asked,
            MODEL_UNUSABLE,
            damage=broken(lambda base: (base / "model.safetensors").unlink()),
            own_base=True,
        ),
        Case(
            "a base model whose tokenizer cannot be read",
            asked,
            MODEL_UNUSABLE,
            damage=broken(lambda base: unreadable(base / "tokenizer.json")),
            own_base=True,
        ),
        Case(
            "another tokenizer",
            asked,
            BASE_MODEL_DIFFERS,
            damage=broken(lambda base: write(base / "tokenizer.json")),
            own_base=True,
            parts=("tokenizer",),
        ),
        Case(
            "another base model that is allowed",
            asked,
            BASE_MODEL_DIFFERS,
            prepare=allow_other_base,
            change=lambda b, r: base_of(r, OTHER_BASE),
            parts=Fingerprint.PARTS,
        ),
    ]


def anywhere(asked: type[Request]) -> list[Case]:
    """What can go wrong with any message."""
    return [
        Case("a run that was left", asked, policy_reasons.LEFT, damage=lambda b: b.place.control.leave(RUN)),
        Case(
            "nobody knows what was left",
            asked,
            STORAGE_FAILED,
            damage=lambda b: write(b.place.home.control / "left.json"),
        ),
        Case(
            "what was left is too deep",
            asked,
            STORAGE_FAILED,
            damage=lambda b: write(b.place.home.control / "left.json", b"[" * 100_000),
        ),
    ]


OF_RUNS = [
    *AT_HELLO,
    *(case for asked in (Hello, TrainRequest) for case in by_policy(asked)),
    *(case for asked in REQUESTS for case in anywhere(asked)),
]


@pytest.mark.parametrize("case", OF_RUNS, ids=str)
def test_a_refusal_is_a_reason_code_and_nothing_else(case: Case, border: Make) -> None:
    refuses(case, border)
