"""Every reply is in the egress log before it leaves, with what it belongs to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client import departures
from client.app import build_client_app
from client.departures import OTHER, Departures
from client.egress import EgressLog, Entry, Payload, open_copy, read_entry, verify
from client.ledger import Ledger, Spend
from client.policy_file import Population
from client.status import Place
from common.adapter import Adapter
from common.base_model import Fingerprint
from common.errors import StorageError
from common.flower import HELLO, ROUND, SECURE, to_records
from common.messages import (
    INTERNAL_ERROR,
    Contribution,
    Hello,
    Introduction,
    Plan,
    Published,
    Received,
    Refused,
    Reply,
    Request,
    SecurePlan,
    Settings,
    TrainRequest,
)
from common.publication import Publication
from common.secagg.identity import Identity
from common.secagg.messages import Consent, Consents, Inbox, KeyList, Keys, MaskedInput, Survivors
from common.secagg.terms import Terms
from common.wire import to_wire
from tests.client.conftest import make_config

BASE = Fingerprint("config", "weights", "tokenizer")
CONFIG = make_config("base")
ADAPTER = Adapter({"a.lora_A": np.zeros((2, 3), np.float32)})
ALDER = Identity.generate("alder")
PLAN = Plan("run-1", 3, ("alder", "birch", "cedar"), 6, ADAPTER.digest(), BASE, Settings.of(CONFIG))
SECURED = replace(PLAN, secure=SecurePlan(7, "roster", Terms.of(3, 1, 3), 0, 0))


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's own runtime says who sends a message; outside of it a test has to."""
    for name, value in (("_task_id", 1), ("_run_id", 5), ("_node_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, value)


@pytest.fixture
def log(tmp_path: Path) -> EgressLog:
    return EgressLog(tmp_path / "egress", ALDER)


@pytest.fixture
def entries(tmp_path: Path) -> Callable[[], list[Entry]]:
    def read() -> list[Entry]:
        found = [read_entry(line.raw) for line in open_copy(tmp_path / "egress").lines()]
        assert None not in found
        return [entry for entry in found if entry is not None]

    return read


def request(asked: Request, kind: str, number: int = 0) -> Message:
    """A message as it comes, with an id of its own."""
    message = Message(to_records(to_wire(asked)), dst_node_id=number + 1, message_type=kind)
    message.metadata.__dict__["_message_id"] = f"{message.object_id}-{number}"
    return message


def reply(to: Message, said: Reply) -> Message:
    return Message(to_records(to_wire(said)), reply_to=to)


VECTOR = np.arange(5, dtype=np.uint32)
KEYS = Keys("plan", b"share", b"mask", b"commitment", b"signature")
EXCHANGES: list[tuple[str, Request, Reply, tuple[Any, ...]]] = [
    (HELLO, Hello.of(CONFIG, "run-1", BASE), Introduction("alder", 2, "1", BASE), ("run-1", 0, 0, "Introduction")),
    (ROUND, TrainRequest(PLAN, ADAPTER), Contribution("digest", VECTOR), ("run-1", 3, 0, "Contribution")),
    (ROUND, TrainRequest(SECURED, ADAPTER), KEYS, ("run-1", 3, 7, "Keys")),
    (ROUND, TrainRequest(SECURED, ADAPTER), Refused("not_invited", "alder"), ("run-1", 3, 7, "Refused")),
    (SECURE, Inbox(SECURED.digest(), {}), MaskedInput(SECURED.digest(), VECTOR), ("run-1", 3, 7, "MaskedInput")),
    (SECURE, Survivors(SECURED.digest(), ("alder",)), Consent("plan", b"signature"), ("run-1", 3, 7, "Consent")),
    (SECURE, Consents("another plan", {}), Refused("attempt_unknown", "alder"), ("", 0, 0, "Refused")),
    (
        ROUND,
        Published(Publication("run-1", 5, BASE, CONFIG.lora, ADAPTER.digest()), ADAPTER),
        Received("run-1"),
        ("run-1", 5, 0, "Received"),
    ),
]


def test_what_an_update_spends_is_told_with_the_reply_that_it_leaves_in(
    tmp_path: Path, log: EgressLog, entries: Callable[[], list[Entry]]
) -> None:
    tried = Departures(log)
    ledger = Ledger(tmp_path / "ledger", ALDER, on_spend=tried.spent)
    ledger.begin()
    event = Spend("gaussian", 1.0, 0.1, 10, "record", "run-1", 3, 7, "notes")
    receipt = ledger.spend(Population("notes", ("notes",)), event)
    assert receipt.added > 0
    for number, (kind, asked, said, _) in enumerate(EXCHANGES):
        message = request(asked, kind, number)
        tried.heard(message.metadata.message_id, asked)
        tried.record(reply(message, said))
    epsilons = {(entry.kind, entry.attempt): entry.epsilon for entry in entries() if entry.epsilon}
    assert epsilons == {("Keys", 7): receipt.added}


def test_every_exchange_is_an_entry_with_its_run_round_and_attempt(
    log: EgressLog, entries: Callable[[], list[Entry]]
) -> None:
    left: list[tuple[str, str]] = []
    tried = Departures(log, lambda kind, reason: left.append((kind, reason)))
    for number, (kind, asked, said, expected) in enumerate(EXCHANGES):
        message = request(asked, kind, number)
        assert tried.heard(message.metadata.message_id, asked) == Place(*expected[:3])
        tried.record(reply(message, said))
        assert left[-1] == (expected[3], said.reason if isinstance(said, Refused) else "")
        entry = entries()[-1]
        assert (entry.run, entry.round, entry.attempt, entry.kind) == expected
        assert entry.phase == kind
        payload = Payload.of_wire(to_wire(said))
        assert (entry.size, entry.sha256, entry.epsilon) == (payload.size, payload.sha256, 0.0)
    assert len(entries()) == len(EXCHANGES)
    assert verify(open_copy(log._directory), ALDER.public).finding is None


def test_what_the_node_itself_refuses_is_an_entry_too(log: EgressLog, entries: Callable[[], list[Entry]]) -> None:
    tried = Departures(log)
    never_read = Message(RecordDict(), dst_node_id=1, message_type="query.something_" + "x" * 5000)
    tried.record(reply(never_read, Refused("message_type_refused")))
    (entry,) = entries()
    assert (entry.kind, entry.run, entry.phase) == ("Refused", "", OTHER)


def test_an_entry_stands_before_record_returns_or_the_reply_stays(log: EgressLog, tmp_path: Path) -> None:
    tried = Departures(log)
    message = request(EXCHANGES[0][1], HELLO)
    tried.heard(message.metadata.message_id, EXCHANGES[0][1])
    tried.record(reply(message, EXCHANGES[0][2]))
    (tmp_path / "egress" / "head.json").unlink()
    with pytest.raises(StorageError, match="nothing leaves"):
        tried.record(reply(message, EXCHANGES[0][2]))


def test_a_reply_without_content_stays_here(log: EgressLog) -> None:
    from flwr.app import Error

    message = request(EXCHANGES[0][1], HELLO)
    with pytest.raises(ValueError, match="expected a reply with content"):
        Departures(log).record(Message(Error(0, "patient 4711"), reply_to=message))


def test_an_endless_coordinator_fills_no_memory(log: EgressLog) -> None:
    tried = Departures(log)
    for number in range(1000):
        plan = replace(SECURED, round=number + 1)
        tried.heard(f"message-{number}", TrainRequest(plan, ADAPTER))
    assert len(tried._plans._places) == len(tried._requests._places) == departures._REMEMBERED
    last = replace(SECURED, round=1000)
    assert tried.heard("x", KeyList(last.digest(), {})) == Place("run-1", 1000, 7)
    assert tried.heard("y", KeyList(replace(SECURED, round=1).digest(), {})) == Place()


def test_what_is_used_is_not_what_is_forgotten(log: EgressLog) -> None:
    """A plan that is heard again is among the last ones; an attempt that is under way is not pushed out by its own."""
    tried = Departures(log)
    first = TrainRequest(SECURED, ADAPTER)
    tried.heard("first", first)
    for number in range(departures._REMEMBERED - 1):
        tried.heard(f"other-{number}", TrainRequest(replace(SECURED, round=number + 10), ADAPTER))
    tried.heard("again", first)
    tried.heard("one more", TrainRequest(replace(SECURED, round=999), ADAPTER))
    assert tried.heard("x", KeyList(SECURED.digest(), {})) == Place("run-1", 3, 7)


def test_replies_are_recorded_while_requests_are_heard(log: EgressLog, entries: Callable[[], list[Entry]]) -> None:
    tried = Departures(log)
    stop = threading.Event()

    def hear() -> None:
        number = 0
        while not stop.is_set():
            tried.heard(f"noise-{number % 10}", TrainRequest(SECURED, ADAPTER))
            number += 1

    thread = threading.Thread(target=hear)
    thread.start()
    try:
        for number in range(20):
            message = request(EXCHANGES[0][1], HELLO, number)
            tried.heard(message.metadata.message_id, EXCHANGES[0][1])
            tried.record(reply(message, EXCHANGES[0][2]))
    finally:
        stop.set()
        thread.join()
    assert [entry.run for entry in entries()] == ["run-1"] * 20


def test_the_client_app_tells_every_request_before_it_is_answered(
    log: EgressLog, entries: Callable[[], list[Entry]]
) -> None:
    """Also one whose answer then fails."""
    from flwr.app import Context

    tried = Departures(log)

    def fails(context: Context) -> Any:
        raise OSError("patient 4711")

    app = build_client_app(fails, tried.heard)
    message = request(EXCHANGES[2][1], ROUND)
    answer = app(message, Context(1, 1, {}, RecordDict(), {}))
    tried.record(answer)
    (entry,) = entries()
    assert (entry.run, entry.round, entry.attempt, entry.kind) == ("run-1", 3, 7, "Refused")
    assert answer.content == to_records(to_wire(Refused(INTERNAL_ERROR)))
