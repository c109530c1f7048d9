"""Flower's records, which hold whatever a sender puts into them."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from common.errors import Refusal
from common.flower import from_records, to_records
from common.messages import MALFORMED, Contribution
from common.secagg.messages import Sealed, Shares
from common.wire import ARRAY, Wire, from_wire, to_wire

VECTOR = np.arange(7, dtype=np.uint32)
WIRE = to_wire(Contribution("digest", VECTOR))


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, array=VECTOR)
    return buffer.getvalue()


def declared(shape: str, dtype: str = "<u4") -> bytes:
    """An array that says what it holds, and holds nothing."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def with_array(data: bytes, form: str = "numpy.ndarray") -> RecordDict:
    records = to_records(WIRE)
    records["arrays"] = ArrayRecord({ARRAY: Array("uint32", VECTOR.shape, form, data)})
    return records


def assert_malformed(records: RecordDict) -> None:
    with pytest.raises(Refusal) as caught:
        from_wire(from_records(records))
    assert caught.value.reason == MALFORMED


def test_a_wire_comes_back_as_it_was() -> None:
    found = from_records(to_records(WIRE))
    assert (found.kind, found.text) == (WIRE.kind, WIRE.text)
    assert found.arrays[ARRAY].dtype == np.uint32
    assert found.arrays[ARRAY].tobytes() == VECTOR.tobytes()
    assert from_wire(from_records(with_array(npy(VECTOR)))).vector.tolist() == VECTOR.tolist()  # type: ignore[union-attr]


def test_a_message_without_arrays_comes_back_as_it_was() -> None:
    message = Shares("digest", {"birch": Sealed(b"\x00\xff", b"", b"\x80" * 64)})
    assert from_wire(from_records(to_records(to_wire(message)))) == message


def test_arrays_travel_as_arrays() -> None:
    """Which Flower sends in chunks: text would have to fit one message."""
    records = to_records(Wire("kind", "text", {"one": VECTOR, "two": VECTOR}))
    assert list(records.array_records["arrays"]) == ["one", "two"]
    assert dict(records.config_records["message"]) == {"kind": "kind", "text": "text"}
    assert not records.metric_records  # which a strategy of Flower's own would average and log


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"no array at all",
        b"\x80\x04K\x01.",  # a pickle
        npy(VECTOR)[:-1],
        npy(VECTOR)[:20],
        npz(),
        npz()[:-10],
        declared("(7,)"),
        declared("(10**6,)"),
        declared("(1000000000000,)"),  # would be 4 terabytes
        declared("(-7,)"),
        declared("7"),
        declared("(7,)", "|O"),
        declared("(7,)", "nonsense"),
        declared("(" * 50),
    ],
)
def test_bytes_that_are_no_array_are_malformed(data: bytes) -> None:
    assert_malformed(with_array(data))


@given(st.binary(max_size=200), st.integers(0, 150))
def test_arbitrary_bytes_are_malformed_or_an_array_of_the_right_form(data: bytes, place: int) -> None:
    good = npy(VECTOR)
    for hostile in (data, good[:place] + data, b"\x93NUMPY\x01\x00" + data):
        try:
            found = from_wire(from_records(with_array(hostile)))
        except Refusal as refusal:
            told = refusal.reason
        else:  # other numbers in the same form
            assert isinstance(found, Contribution)
            told = f"{found.vector.ndim} dimension of {found.vector.dtype}"
        assert told in (MALFORMED, "1 dimension of uint32")


@pytest.mark.parametrize("form", ["", "pickle", "torch.Tensor"])
def test_arrays_in_another_form_are_malformed(form: str) -> None:
    assert_malformed(with_array(npy(VECTOR), form))


@pytest.mark.parametrize(
    "records",
    [
        RecordDict(),
        RecordDict({"message": ConfigRecord(), "arrays": ArrayRecord()}),
        RecordDict({"message": ConfigRecord({"kind": WIRE.kind, "text": WIRE.text})}),
        RecordDict({"arrays": ArrayRecord({ARRAY: Array(VECTOR)})}),
        RecordDict({"message": MetricRecord({"kind": 1}), "arrays": ConfigRecord({"array": 1})}),
        RecordDict({"message": ConfigRecord({"kind": 7, "text": b"\xff"})}),
        RecordDict({"message": ConfigRecord({"kind": [WIRE.kind], "text": [1.5, math.nan]})}),
        RecordDict({"other": ConfigRecord({"kind": WIRE.kind, "text": WIRE.text})}),
    ],
)
def test_records_of_another_form_are_malformed(records: RecordDict) -> None:
    assert_malformed(records)
