"""Our wire form in Flower's records, for both sides: the one place where their format is known."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from common.wire import Wire

HELLO = "query.hello"
ROUND = "train.round"

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
    """The wire form of what came. Missing parts come out empty, and are refused where they are read."""
    config = content.config_records.get(_TEXT, ConfigRecord())
    arrays = content.array_records.get(_ARRAYS, ArrayRecord())
    return Wire(
        kind=str(config.get("kind", "")),
        text=str(config.get("text", "")),
        arrays={name: array.numpy() for name, array in arrays.items()},
    )
