"""The grid of a process that holds a run, part by part."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from common.flower import ROUND, to_records
from common.wire import Wire
from server.loopback import LoopbackGrid
from tests.deployments import reply_in


class Pieces:
    """A task whose SuperLink is a dictionary of parts."""

    run = 5

    def __init__(self, replies: list[tuple[Message, Any]], parts: dict[str, bytes]) -> None:
        self.replies = replies
        self.parts = parts
        self.asked: list[str] = []
        self.confirmed: list[str] = []

    def call(self, method: str, request: Any, response: Any) -> Any:
        self.asked.append(method)
        if method == "pull-messages":
            heads = [message_to_proto(remove_content_from_message(m)) for m, _ in self.replies]
            found = response(messages_list=heads, message_object_trees=[tree for _, tree in self.replies])
            self.replies = []
            return found
        if method == "pull-object":
            content = self.parts.get(request.object_id)
            return response(object_found=content is not None, object_available=bool(content), object_content=content)
        assert method == "confirm-message-received"
        self.confirmed.append(request.message_object_id)
        return response()


def reply_with_parts(reply_to: str = "asked") -> tuple[Message, Any, dict[str, bytes]]:
    metadata = Metadata(
        run_id=5,
        message_id="",
        src_node_id=77,
        dst_node_id=1,
        reply_to_message_id=reply_to,
        group_id="",
        created_at=time.time(),
        ttl=60,
        message_type=ROUND,
    )
    content = to_records(Wire("Contribution", "{}", {"array": np.arange(4, dtype=np.uint32)}))
    message = make_message(metadata=metadata, content=content)
    message.metadata.__dict__["_message_id"] = message.object_id
    parts = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
    return message, get_object_tree(message), parts


def grid_over(pieces: Pieces) -> LoopbackGrid:
    return LoopbackGrid(pieces, SimpleNamespace(run_id=5))  # type: ignore[arg-type]


def test_a_reply_that_is_still_being_sent_keeps_nobody_waiting() -> None:
    message, tree, parts = reply_with_parts()
    last = tree.object_id
    pieces = Pieces([(message, tree)], {**parts, last: b""})
    grid = grid_over(pieces)
    begin = time.monotonic()
    assert list(grid.pull_messages(["asked"])) == []
    assert time.monotonic() - begin < 0.5
    assert pieces.confirmed == []
    pulled = pieces.asked.count("pull-object")
    pieces.parts[last] = parts[last]
    (reply,) = grid.pull_messages(["asked"])
    assert reply_in(reply).arrays["array"].tolist() == [0, 1, 2, 3]
    assert pieces.confirmed == [message.metadata.message_id]
    assert pieces.asked.count("pull-object") == pulled + 1  # what had come is not fetched again
    assert pieces.asked.count("pull-messages") == 1  # the SuperLink has given the reply away already


@pytest.mark.parametrize("broken", ["missing", "garbled", "of another kind"])
def test_a_reply_that_cannot_be_read_is_an_error_and_ends_nothing(broken: str) -> None:
    message, tree, parts = reply_with_parts()
    root = tree.object_id
    if broken == "missing":
        del parts[root]
    elif broken == "garbled":
        parts[root] = b"Message \x00\xff"
    else:
        parts[root] = next(content for content in parts.values() if content.startswith(b"ConfigRecord"))
    (reply,) = grid_over(Pieces([(message, tree)], parts)).pull_messages(["asked"])
    assert reply.has_error()
    assert reply.metadata.reply_to_message_id == "asked"


def test_what_a_sender_writes_inside_a_reply_does_not_make_it_another_members() -> None:
    """Flower takes sender and question from the inner message, which the SuperLink never looks at."""
    message, tree, parts = reply_with_parts("the question of somebody else")
    head = make_message(metadata=reply_with_parts("asked")[0].metadata, content=RecordDict())
    head.metadata.__dict__["_message_id"] = message.object_id
    (reply,) = grid_over(Pieces([(head, tree)], parts)).pull_messages(["asked"])
    assert reply.metadata.reply_to_message_id == "asked"
