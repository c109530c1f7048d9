"""What the node itself says, over TLS and a real SuperLink, before a message reaches the ClientApp or without it."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import Context, Message, RecordDict

from client import events as told_of
from client.app import build_client_app
from client.institution import Institution
from common.flower import HELLO, MESSAGES, to_records
from common.messages import (
    BUNDLE_REFUSED,
    INTERNAL_ERROR,
    MESSAGE_TYPE_REFUSED,
    RESTARTED,
    Introduction,
    Refused,
    Reply,
)
from common.wire import from_wire, to_wire
from tests.client.border.changes import Failing
from tests.client.border.conftest import MARK, OF_THE_NODE, Border, Departed, Make
from tests.client.guarded import ME
from tests.deployments import Deployment, ask_by_hand, deployment, running

__all__ = ["deployment", "running"]


@dataclass
class Sent:
    """The hook by which a node records a reply before any of it leaves."""

    border: Border
    replies: list[Reply] = field(default_factory=list)

    def __call__(self, reply: Message) -> None:
        departed = Departed.of(reply)
        asked = Message(RecordDict(), dst_node_id=1, message_type=reply.metadata.message_type)
        for name in ("run_id", "group_id"):
            asked.metadata.__dict__[f"_{name}"] = getattr(reply.metadata, name)
        asked.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
        self.border.look_through(departed, asked)
        found = from_wire(departed.wire)
        assert isinstance(found, Reply)
        self.replies.append(found)


def number_of(deployment: Deployment) -> int:
    from server.operator import Operator

    with Operator(deployment.endpoint) as operator:
        (found,) = operator.nodes()
        return int(found.number)


def test_what_a_node_refuses_by_itself_is_a_reason_code(deployment: Deployment, border: Make, tmp_path: Path) -> None:
    """Over TLS and a real SuperLink: types outside the protocol, bundles, an end of the process, a restart."""
    made = border()
    sent = Sent(made)
    app = build_client_app(lambda context: made.open(context))
    memory = tmp_path / f"{MARK}-memory"
    key = deployment.key(ME)
    begun, release = threading.Event(), threading.Event()

    def slowly(_: Context) -> AbstractContextManager[Institution]:
        begun.set()
        release.wait(60)
        raise RuntimeError(MARK)

    hello = to_records(to_wire(made.place.hello()))
    connection = deployment.connection(key, memory=memory, grace_s=0.2)
    with deployment.task() as (grid, _):
        with deployment.node(app, connection, record=sent) as events:
            events.wait(told_of.CONNECTED)
            number = number_of(deployment)
            ask_by_hand(grid, number, hello, HELLO)
            assert [type(reply) for reply in sent.replies] == [Introduction]
            for kind in ("query.other", "train.other", "evaluate.round"):
                ask_by_hand(grid, number, hello, kind)
                assert sent.replies[-1] == Refused(MESSAGE_TYPE_REFUSED)
            for error in (SystemExit(MARK), KeyboardInterrupt(MARK)):
                made.open = Failing(error)
                ask_by_hand(grid, number, hello, HELLO)
                assert sent.replies[-1] == Refused(INTERNAL_ERROR)
            count = len(sent.replies)
            made.open = slowly
            list(grid.push_messages([Message(hello, dst_node_id=number, message_type=HELLO, ttl=600)]))
            assert begun.wait(20)
        in_hand = (memory / "in-hand.bin").read_bytes()
        release.set()
        assert len(sent.replies) == count  # what it stopped in the middle of was not answered
        (memory / "in-hand.bin").write_bytes(in_hand)
        with deployment.node(app, connection, frozenset(), record=sent) as events:
            events.wait(told_of.CONNECTED)
            number = number_of(deployment)
            for kind in sorted(MESSAGES):
                ask_by_hand(grid, number, hello, kind)
    said = [reply.reason for reply in sent.replies if isinstance(reply, Refused)]
    assert said[-len(MESSAGES) - 1 :] == [RESTARTED, *[BUNDLE_REFUSED] * len(MESSAGES)]
    assert set(said) == OF_THE_NODE | {INTERNAL_ERROR}
