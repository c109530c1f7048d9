"""That these tests miss nothing: the search finds, and every reason, request and reply has its case."""

from __future__ import annotations

import base64
import json
import os
import zlib
from typing import Any, get_args
from urllib.parse import quote

import pytest

from common.flower import MESSAGES, kind_of
from common.messages import NAME_DIFFERS, REASONS, TIMED_OUT, Reply
from tests.client.border.conftest import IN_FORM, MARK, OF_THE_NODE, REQUESTS
from tests.client.border.searching import contains
from tests.client.border.test_attempts import IN_ATTEMPTS
from tests.client.border.test_policy import OF_RUNS
from tests.client.border.test_publication import AT_THE_END
from tests.client.border.test_records import OF_RECORDS
from tests.client.border.test_training import IN_TRAINING

OF_THE_COORDINATOR = frozenset({TIMED_OUT, NAME_DIFFERS})
"""Never sent: what a coordinator notes of a member that said nothing, or something false."""

CASES = [*OF_RUNS, *OF_RECORDS, *IN_TRAINING, *IN_ATTEMPTS, *AT_THE_END]


def test_every_reason_code_has_a_case() -> None:
    """Whoever adds one adds a case to one of these lists, in which it really leaves."""
    assert {case.reason for case in CASES} == REASONS - OF_THE_NODE - OF_THE_COORDINATOR


def test_every_kind_of_request_and_every_type_of_message_has_cases() -> None:
    assert {case.asked for case in CASES} == set(REQUESTS)
    assert sorted(kind.__name__ for kind in REQUESTS) == [
        "Consents",
        "Hello",
        "Inbox",
        "KeyList",
        "Published",
        "Survivors",
        "TrainRequest",
    ]
    # Whatever is no kind of its own travels as secure aggregation, so this is all of them.
    examples: list[Any] = [kind.__new__(kind) for kind in REQUESTS]
    assert {kind_of(example) for example in examples} == MESSAGES


def test_every_kind_of_reply_has_a_form() -> None:
    kinds = {kind.__name__ for part in get_args(Reply) for kind in (get_args(part) or (part,))}
    assert set(IN_FORM) == kinds


@pytest.mark.parametrize("secret", [MARK, "/srv/hospital/records.jsonl", bytes(range(100, 132))], ids=repr)
def test_the_search_would_find_it(secret: str | bytes) -> None:
    raw = secret.encode() if isinstance(secret, str) else secret
    shown = [raw, raw.hex().encode(), raw.hex().upper().encode(), repr(raw).encode(), str(list(raw)).encode()]
    shown += [base64.b64encode(b"." * n + raw + b"!?") for n in range(4)]
    shown += [base64.urlsafe_b64encode(b"\xff" * n + raw + b"\xfb") for n in range(4)]
    shown += [b"junk" + zlib.compress(b"a text with " + raw), zlib.compress(raw, 0), zlib.compress(raw, 9)]
    if isinstance(secret, str):
        shown += [
            secret.upper().encode(),
            secret.encode("utf-16-le"),
            secret.encode("utf-16-be"),
            secret[::-1].encode(),
        ]
        shown += [quote(secret, safe="").encode(), json.dumps({"text": secret}).encode()]
    for text in shown:
        assert contains(b"before " + text + b" after", secret), text
    assert not contains(os.urandom(1 << 16), secret)
    assert not contains(b"", secret)
