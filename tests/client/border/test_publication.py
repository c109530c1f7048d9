"""What is refused of the adapter that a coordinator publishes at the end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from common import policy_reasons
from common.base_model import Fingerprint
from common.config import LoraConfig
from common.messages import (
    ADAPTER_DIGEST_DIFFERS,
    ADAPTER_DOES_NOT_FIT,
    BASE_MODEL_DIFFERS,
    MALFORMED,
    MODEL_UNUSABLE,
    NOT_CONFIGURED,
    SIGNATURE_DIFFERS,
    STORAGE_FAILED,
    Published,
)
from common.secagg.identity import Identity
from tests.client.border.changes import OTHER_BASE, allow_other_base, broken, full_disk, in_the_way, moved
from tests.client.border.conftest import Border, Case, Make, refuses


def published(**changes: Any) -> Callable[[Border, Any], Published]:
    return lambda b, r: b.place.published(b.start, **changes)


AT_THE_END = [
    Case(
        "unsigned",
        Published,
        SIGNATURE_DIFFERS,
        change=lambda b, r: replace(r, publication=replace(r.publication, signature=b"")),
    ),
    Case(
        "signed by another",
        Published,
        SIGNATURE_DIFFERS,
        change=lambda b, r: b.place.published(b.start, Identity.generate("coordinator")),
    ),
    Case(
        "another adapter", Published, ADAPTER_DIGEST_DIFFERS, change=lambda b, r: replace(r, adapter=moved(r.adapter))
    ),
    Case(
        "a second adapter of the run",
        Published,
        ADAPTER_DIGEST_DIFFERS,
        prepare=lambda b: b.ask(b.place.published(moved(b.start))),
    ),
    Case(
        "of a base model that is not allowed",
        Published,
        policy_reasons.BASE_MODEL_NOT_ALLOWED,
        change=published(fingerprint=OTHER_BASE),
    ),
    Case(
        "of another base model that is allowed",
        Published,
        BASE_MODEL_DIFFERS,
        prepare=allow_other_base,
        change=published(fingerprint=OTHER_BASE),
        parts=Fingerprint.PARTS,
    ),
    Case("of too large a rank", Published, policy_reasons.RANK_TOO_LARGE, change=published(lora=LoraConfig(rank=999))),
    Case("of another rank", Published, ADAPTER_DOES_NOT_FIT, change=published(lora=LoraConfig(rank=8))),
    Case(
        "of layers that the model has not",
        Published,
        MALFORMED,
        change=published(lora=LoraConfig(rank=4, target_modules=["no_such_layer"])),
    ),
    Case("of a run that leads elsewhere", Published, MALFORMED, change=published(run="run+1")),
    Case("no shelf", Published, MALFORMED, damage=lambda b: setattr(b, "member", replace(b.member, shelf=None))),
    Case(
        "a file in place of all adapters", Published, NOT_CONFIGURED, damage=lambda b: in_the_way(b.place.home.adapters)
    ),
    Case(
        "adapters that others can see",
        Published,
        NOT_CONFIGURED,
        damage=lambda b: b.place.home.adapters.mkdir(mode=0o755),
    ),
    Case("a full disk", Published, STORAGE_FAILED, damage=full_disk),
    Case(
        "no base model",
        Published,
        MODEL_UNUSABLE,
        damage=broken(shutil.rmtree),
        own_base=True,
    ),
]


@pytest.mark.parametrize("case", AT_THE_END, ids=str)
def test_a_refusal_is_a_reason_code_and_nothing_else(case: Case, border: Make) -> None:
    refuses(case, border)
