"""Our wire form in Flower's records and messages, for both sides: the one place where their format is known."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import InflatableObject, get_all_nested_objects, get_object_tree

from common.errors import Refusal
from common.messages import MALFORMED, Hello, Published, Request, TrainRequest
from common.wire import Wire

HELLO = "query.hello"
ROUND = "train.round"
SECURE = "train.secure_aggregation"
ADAPTER = "query.adapter"
MESSAGES = frozenset({HELLO, ROUND, SECURE, ADAPTER})
"""Every type of message of the protocol."""

_TEXT, _ARRAYS = "message", "arrays"
_WHOLE_BYTES = 2**20


def kind_of(request: Request) -> str:
    """The type of message in which a request travels."""
    match request:
        case Hello():
            return HELLO
        case TrainRequest():
            return ROUND
        case Published():
            return ADAPTER
        case _:
            return SECURE


def to_records(wire: Wire) -> RecordDict:
    """What a Flower message carries. Arrays travel as arrays, which Flower sends in chunks."""
    return RecordDict(
        {
            _TEXT: ConfigRecord({"kind": wire.kind, "text": wire.text}),
            _ARRAYS: ArrayRecord({name: Array(array) for name, array in wire.arrays.items()}),
        }
    )


def from_records(content: RecordDict) -> Wire:
    """The wire form of what came. Missing parts come out empty, and are refused where they are read.

    Raises Refusal(malformed) for bytes that are no array.
    """
    config = content.config_records.get(_TEXT, ConfigRecord())
    records = content.array_records.get(_ARRAYS, ArrayRecord())
    try:
        arrays = {name: array.numpy() for name, array in records.items()}
    except Exception as error:  # the bytes are the sender's, and numpy has a kind of error for each way to be wrong
        raise Refusal(MALFORMED, f"an array cannot be read: {error}") from error
    return Wire(kind=str(config.get("kind", "")), text=str(config.get("text", "")), arrays=arrays)


def packed(message: Message) -> tuple[MessageProto, ObjectTree, dict[str, InflatableObject]]:
    """A message's head, the tree of its parts, and the parts that are sent one by one.

    Each part is two calls of the SuperLink, which are most of what a short message costs. So one without arrays travels
    in its head, where Flower once had everything; what is left of its parts is the root, without which it is thrown
    away after three minutes.
    """
    if not any(message.content.array_records.values()):
        whole = message_to_proto(message)
        if whole.ByteSize() <= _WHOLE_BYTES:
            return whole, ObjectTree(object_id=message.object_id), {message.object_id: message}
    head = message_to_proto(remove_content_from_message(message))
    return head, get_object_tree(message), get_all_nested_objects(message)
