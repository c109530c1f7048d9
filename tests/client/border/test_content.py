"""Content that is none, an error in its place, and content of another type of message: nothing more is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from common.flower import MESSAGES, kind_of, to_records
from common.messages import INTERNAL_ERROR, MALFORMED, Introduction, Refused, Request
from common.secagg import reasons
from common.secagg.messages import Consents, Inbox, KeyList, Survivors
from common.wire import Wire, to_wire
from tests.client.border.conftest import MARK, NOBODY, NODE, REQUESTS, Make
from tests.client.conftest import NAMES
from tests.client.guarded import ME

CONTENT: dict[str, Callable[[Wire], Any]] = {
    "nothing": lambda wire: RecordDict(),
    "an unknown kind": lambda wire: to_records(replace(wire, kind=MARK)),
    "a kind that is a reply": lambda wire: to_records(to_wire(Refused(MALFORMED, ME))),
    "no text": lambda wire: to_records(replace(wire, text="")),
    "no JSON": lambda wire: to_records(replace(wire, text="{" + MARK)),
    "deep JSON": lambda wire: to_records(replace(wire, text="[" * 100_000)),
    "deep JSON that is whole": lambda wire: to_records(replace(wire, text='{"a":' * 50_000 + "1" + "}" * 50_000)),
    "a list": lambda wire: to_records(replace(wire, text=json.dumps([MARK]))),
    "a number": lambda wire: to_records(replace(wire, text="9" * 4000)),
    "a number too long": lambda wire: to_records(replace(wire, text="9" * 5000)),
    "surrogates": lambda wire: to_records(replace(wire, text='{"plan": "\\ud800"}')),
    "no fields": lambda wire: to_records(replace(wire, text="{}")),
    "a field too many": lambda wire: to_records(replace(wire, text=json.dumps({**json.loads(wire.text), MARK: MARK}))),
    "fields of null": lambda wire: to_records(replace(wire, text=json.dumps(dict.fromkeys(json.loads(wire.text))))),
    "fields of other types": lambda wire: to_records(
        replace(wire, text=json.dumps({name: [{MARK: 1e309}] for name in json.loads(wire.text)}))
    ),
    "records of other types": lambda wire: RecordDict(
        {"message": ConfigRecord({"kind": 7, "text": b"\xff"}), "arrays": ArrayRecord()}
    ),
    "an array that is a pickle": lambda wire: RecordDict(
        {
            "message": ConfigRecord({"kind": wire.kind, "text": wire.text}),
            "arrays": ArrayRecord({"array": Array("float32", (3,), "pickle", MARK.encode())}),
        }
    ),
    "an array in pieces": lambda wire: RecordDict(
        {
            "message": ConfigRecord({"kind": wire.kind, "text": wire.text}),
            "arrays": ArrayRecord({"array": Array("float32", (3,), "numpy.ndarray", b"\x93NUMPY" + MARK.encode())}),
        }
    ),
    "an array of a size that fits no memory": lambda wire: RecordDict(
        {
            "message": ConfigRecord({"kind": wire.kind, "text": wire.text}),
            "arrays": ArrayRecord({"array": Array("float32", (10**12,), "numpy.ndarray", too_large())}),
        }
    ),
}


def too_large() -> bytes:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize("asked", REQUESTS, ids=lambda kind: kind.__name__)
def test_content_that_cannot_be_read_is_malformed_whatever_it_was_meant_to_be(
    asked: type[Request], border: Make
) -> None:
    made = border()
    examples: dict[type[Any], Any] = {
        KeyList: KeyList(NOBODY, {}),
        Inbox: Inbox(NOBODY, {}),
        Survivors: Survivors(NOBODY, NAMES),
        Consents: Consents(NOBODY, {}),
    }
    request = examples[asked] if asked in examples else made.honest(asked)
    wire = to_wire(request)
    sizes = set()
    for told, change in CONTENT.items():
        content = change(wire)
        kind = kind_of(request)
        assert made.deliver(content, kind) == Refused(MALFORMED), told
        sizes.add(len(made.left[-1].data))
    assert len(sizes) == 1
    # Without an array where there should be one.
    if wire.arrays:
        assert made.deliver(to_records(replace(wire, arrays={})), kind_of(request)) == Refused(MALFORMED)


@pytest.mark.parametrize("kind", sorted(MESSAGES))
def test_an_error_in_place_of_content_is_a_reason_code(kind: str, border: Make) -> None:
    made = border()
    message = Message(RecordDict(), dst_node_id=NODE, message_type=kind, ttl=600.0)
    message.__dict__.update(_content=None, _error=Error(code=0, reason=MARK))
    assert made.hand_over(message) == Refused(INTERNAL_ERROR)


@pytest.mark.parametrize("kind", sorted(MESSAGES))
def test_a_message_of_another_type_than_its_content_tells_nothing_more(kind: str, border: Make) -> None:
    made = border()
    assert isinstance(made.deliver(to_records(to_wire(made.place.hello())), kind), Introduction)
    late = to_records(to_wire(Survivors(NOBODY, NAMES)))
    assert made.deliver(late, kind) == Refused(reasons.ATTEMPT_UNKNOWN, ME)
