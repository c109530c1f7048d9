"""The ClientApp at its rim, with Flower's own messages: always a reply, and in it a reason code at most."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from client.app import build_client_app
from client.institution import Institution
from common.adapter import Adapter
from common.config import Config
from common.errors import DataError, Refusal
from common.flower import ADAPTER, HELLO, MESSAGES, ROUND, SECURE, from_records, kind_of, to_records
from common.messages import (
    DATA_UNREADABLE,
    INTERNAL_ERROR,
    MALFORMED,
    PROTOCOL,
    PROTOCOL_DIFFERS,
    Contribution,
    Introduction,
    Published,
    Refused,
    Reply,
    Request,
    TrainRequest,
)
from common.publication import Publication
from common.secagg.messages import Consents, Inbox, KeyList, Survivors, ToMember
from common.secagg.reasons import ATTEMPT_UNKNOWN
from common.wire import Wire, from_wire, to_wire
from tests.client.conftest import make_config, make_hello, make_plan

NODE = 77
SECRET = "patient-QXZQXZ"


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's own runtime says who sends a message; outside of it a test has to."""
    for name, value in (("_task_id", 1), ("_run_id", 5), ("_node_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, value)


@pytest.fixture
def config(base_model: str) -> Config:
    return make_config(base_model)


def context() -> Context:
    return Context(run_id=5, node_id=NODE, node_config={"partition-id": 0}, state=RecordDict(), run_config={})


def message(content: RecordDict, kind: str = ROUND) -> Message:
    made = Message(content, dst_node_id=NODE, message_type=kind, ttl=60.0)
    made.metadata.__dict__["_message_id"] = "message-1"
    return made


def bytes_of(content: RecordDict) -> bytes:
    """Every byte of what a reply carries."""
    found = b""
    for name, record in content.items():
        found += name.encode()
        for key, value in record.items():
            found += key.encode() + (value.data if isinstance(value, Array) else str(value).encode())
    return found


def ask(app: ClientApp, content: RecordDict, kind: str = ROUND) -> Reply:
    """Sends a message and reads the reply, which is always content and never a Flower error."""
    answer = app(message(content, kind), context())
    assert not answer.has_error()
    assert answer.metadata.reply_to_message_id == "message-1"
    assert SECRET.encode() not in bytes_of(answer.content)
    reply = from_wire(from_records(answer.content))
    assert isinstance(reply, Reply)
    return reply


def records(request: Request) -> RecordDict:
    return to_records(to_wire(request))


def test_hello_is_answered_with_an_introduction(institution: Callable[..., Institution], config: Config) -> None:
    app = build_client_app(lambda _: nullcontext(institution()))
    answer = ask(app, records(make_hello(config)), HELLO)
    assert isinstance(answer, Introduction)
    assert answer.name == "alder"


def test_a_round_is_answered_as_the_institution_itself_would(
    institution: Callable[..., Institution], config: Config, start: Adapter
) -> None:
    member = institution()
    request = TrainRequest(make_plan(config, start), start)
    answer = ask(build_client_app(lambda _: nullcontext(member)), records(request))
    direct = member.answer(request)
    assert isinstance(answer, Contribution)
    assert isinstance(direct, Contribution)
    assert answer.plan_digest == direct.plan_digest
    assert np.array_equal(answer.vector, direct.vector)


def test_the_institution_is_found_by_the_context(institution: Callable[..., Institution], config: Config) -> None:
    seen: list[int | str] = []

    def find(found: Context) -> AbstractContextManager[Institution]:
        seen.append(found.node_config["partition-id"])
        return nullcontext(institution("birch"))

    answer = ask(build_client_app(find), records(make_hello(config)), HELLO)
    assert isinstance(answer, Introduction)
    assert (answer.name, seen) == ("birch", [0])


def test_the_institution_is_left_after_every_message_and_before_the_reply(
    institution: Callable[..., Institution], config: Config
) -> None:
    told: list[str] = []

    class Telling(Institution):
        def answer(self, request: Request) -> Reply:
            told.append(type(request).__name__)
            return super().answer(request)

    @contextmanager
    def find(_: Context) -> Iterator[Institution]:
        told.append("opened")
        yield Telling(**vars(institution()))
        told.append("left")

    app = build_client_app(find)
    for request, kind in ((make_hello(config), HELLO), (Survivors("0" * 64, ("alder",)), SECURE)):
        ask(app, records(request), kind)
    assert told == ["opened", "Hello", "left", "opened", "Survivors", "left"]


@pytest.mark.parametrize(
    "request_",
    [KeyList("0" * 64, {}), Inbox("0" * 64, {}), Survivors("0" * 64, ("alder",)), Consents("0" * 64, {})],
    ids=lambda request: type(request).__name__,
)
def test_every_later_message_reaches_the_institution(
    request_: ToMember, institution: Callable[..., Institution]
) -> None:
    app = build_client_app(lambda _: nullcontext(institution()))
    assert ask(app, records(request_), SECURE) == Refused(ATTEMPT_UNKNOWN, "alder")


@pytest.mark.parametrize("error", [RuntimeError(SECRET), OSError(28, SECRET)])
def test_an_institution_that_cannot_be_left_is_a_reason_code(
    error: Exception, institution: Callable[..., Institution], config: Config
) -> None:
    @contextmanager
    def find(_: Context) -> Iterator[Institution]:
        yield institution()
        raise error

    answer = ask(build_client_app(find), records(make_hello(config)), HELLO)
    assert answer == Refused(INTERNAL_ERROR)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(SECRET), INTERNAL_ERROR),
        (KeyError(SECRET), INTERNAL_ERROR),
        (DataError(SECRET), INTERNAL_ERROR),
        (FileNotFoundError(2, "No such file", f"/data/{SECRET}"), INTERNAL_ERROR),
        (MemoryError(SECRET), INTERNAL_ERROR),
        (Refusal(DATA_UNREADABLE, SECRET), DATA_UNREADABLE),
    ],
)
def test_an_institution_that_cannot_be_found_is_a_reason_code(
    error: Exception, reason: str, config: Config, start: Adapter
) -> None:
    def fail(_: Context) -> AbstractContextManager[Institution]:
        raise error

    assert ask(build_client_app(fail), records(TrainRequest(make_plan(config, start), start))) == Refused(reason)


def test_what_is_heard_is_told_with_its_id_before_it_is_answered(
    institution: Callable[..., Institution], config: Config, start: Adapter
) -> None:
    told: list[Any] = []

    @contextmanager
    def find(_: Context) -> Iterator[Institution]:
        told.append("opened")
        yield institution()

    app = build_client_app(find, lambda message_id, request: told.append((message_id, request)))
    hello, late = make_hello(config), Survivors("0" * 64, ("alder",))
    ask(app, records(hello), HELLO)
    ask(app, records(late), SECURE)
    assert told == [("message-1", hello), "opened", ("message-1", late), "opened"]
    ask(app, RecordDict(), SECURE)  # what cannot be read was not heard
    ask(app, to_records(to_wire(Refused(MALFORMED))), HELLO)
    assert len(told) == 4


@pytest.mark.parametrize("error", [RuntimeError(SECRET), OSError(28, SECRET), DataError(SECRET)])
def test_what_cannot_be_told_is_not_answered(
    error: Exception, institution: Callable[..., Institution], config: Config
) -> None:
    def fail(message_id: str, request: Request) -> None:
        raise error

    def never(_: Context) -> AbstractContextManager[Institution]:
        raise AssertionError("looked for an institution")

    assert ask(build_client_app(never, fail), records(make_hello(config)), HELLO) == Refused(INTERNAL_ERROR)


@pytest.mark.parametrize("protocol", [0, 2, PROTOCOL + 1, -1, 2**62, 10**4000])
def test_another_protocol_is_refused_with_the_number_of_this_one_whatever_else_is_said(
    protocol: int, institution: Callable[..., Institution], config: Config
) -> None:
    app = build_client_app(lambda _: nullcontext(institution()))
    wire = to_wire(make_hello(config))
    for fields in ({**json.loads(wire.text), "protocol": protocol}, {"protocol": protocol, "anything": SECRET}):
        told = ask(app, to_records(replace(wire, text=json.dumps(fields))), HELLO)
        assert told == Refused(PROTOCOL_DIFFERS, "", (str(PROTOCOL),))


def test_a_published_adapter_reaches_the_institution(
    institution: Callable[..., Institution], config: Config, start: Adapter
) -> None:
    """Which keeps none here: no coordinator is trusted yet."""
    app = build_client_app(lambda _: nullcontext(institution()))
    publication = Publication("tiny-run", 3, make_hello(config).fingerprint, config.lora, start.digest())
    request = Published(publication, start)
    assert kind_of(request) == ADAPTER
    assert ask(app, records(request), ADAPTER) == Refused(MALFORMED, "alder")


def test_an_exception_in_training_is_a_reason_code(
    institution: Callable[..., Institution], config: Config, start: Adapter
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError(SECRET)

    app = build_client_app(lambda _: nullcontext(institution(spoil=fail)))
    answer = ask(app, records(TrainRequest(make_plan(config, start), start)))
    assert answer == Refused(INTERNAL_ERROR, "alder")


def altered(wire: Wire, **changes: Any) -> RecordDict:
    return to_records(replace(wire, **changes))


MALFORMED_CONTENT = [
    pytest.param(lambda wire: RecordDict(), id="nothing"),
    pytest.param(lambda wire: altered(wire, kind="Goodbye"), id="unknown kind"),
    pytest.param(lambda wire: altered(wire, kind="Hello"), id="text of another kind"),
    pytest.param(lambda wire: altered(wire, text=""), id="no text"),
    pytest.param(lambda wire: altered(wire, text="{"), id="no JSON"),
    pytest.param(lambda wire: altered(wire, text="[1]"), id="JSON of another shape"),
    pytest.param(lambda wire: altered(wire, text="[" * 100_000), id="deep JSON"),
    pytest.param(
        lambda wire: altered(wire, text=wire.text.replace("weight_unit", "weight_onit")), id="unknown setting"
    ),
    pytest.param(lambda wire: altered(wire, arrays={}), id="no adapter"),
    pytest.param(lambda wire: altered(wire, arrays={"array": wire.arrays["array"][:-1]}), id="short adapter"),
    pytest.param(lambda wire: altered(wire, arrays={"array": wire.arrays["array"].astype("f8")}), id="float64"),
    pytest.param(lambda wire: altered(wire, arrays={"array": wire.arrays["array"][None]}), id="two dimensions"),
    pytest.param(
        lambda wire: RecordDict({"message": ConfigRecord({"kind": 7, "text": b"\xff"}), "arrays": ArrayRecord()}),
        id="other types",
    ),
    pytest.param(
        lambda wire: RecordDict(
            {
                "message": ConfigRecord({"kind": wire.kind, "text": wire.text}),
                "arrays": ArrayRecord({"array": Array("float32", (3,), "pickle", SECRET.encode())}),
            }
        ),
        id="an array in another form",
    ),
]


@pytest.mark.parametrize("change", MALFORMED_CONTENT)
def test_malformed_content_is_a_reason_code(
    change: Callable[[Wire], RecordDict], institution: Callable[..., Institution], config: Config, start: Adapter
) -> None:
    app = build_client_app(lambda _: nullcontext(institution()))
    content = change(to_wire(TrainRequest(make_plan(config, start), start)))
    answer = ask(app, content)
    assert isinstance(answer, Refused)
    assert answer.reason in (MALFORMED, INTERNAL_ERROR)
    assert (answer.name, answer.parts) == ("", ())


@pytest.mark.parametrize("reply", [Refused(MALFORMED), Contribution("x", np.zeros(3, np.uint32))])
def test_a_reply_where_a_request_is_expected_is_refused_before_an_institution_is_looked_for(reply: Reply) -> None:
    def never(_: Context) -> AbstractContextManager[Institution]:
        raise AssertionError("looked for an institution")

    assert ask(build_client_app(never), to_records(to_wire(reply))) == Refused(MALFORMED)


def test_an_error_in_place_of_content_is_a_reason_code(institution: Callable[..., Institution]) -> None:
    made = message(RecordDict())
    made.__dict__.update(_content=None, _error=Error(code=0, reason=SECRET))
    answer = build_client_app(lambda _: nullcontext(institution()))(made, context())
    assert from_wire(from_records(answer.content)) == Refused(INTERNAL_ERROR)


def test_only_the_kinds_of_message_of_the_protocol_are_heard(
    institution: Callable[..., Institution], config: Config
) -> None:
    app = build_client_app(lambda _: nullcontext(institution()))
    hello = records(make_hello(config))
    assert {HELLO, ROUND, SECURE, ADAPTER} == MESSAGES
    for kind in MESSAGES:
        assert isinstance(ask(app, hello, kind), Introduction)
    for kind in ("evaluate", "train", "query", "train.other", "query.other", "train.adapter"):
        with pytest.raises(ValueError, match=r"No .* function registered") as raised:
            app(message(hello, kind), context())
        assert SECRET not in str(raised.value)
