"""Our wire form in Flower's records, for both sides: the one place where their format is known."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from common.errors import Refusal
from common.messages import MALFORMED
from common.wire import Wire

HELLO = "query.hello"
ROUND = "train.round"
SECURE = "train.secure_aggregation"

_TEXT, _ARRAYS = "message", "arrays"


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
