"""Messages as they travel: a JSON text for what is small, arrays for what is large.

Both sides turn a message into a `Wire` and back with the same two functions; only the last step, from `Wire` to the
transport's own records, belongs to a side.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.adapter import Adapter, flatten, unflatten
from common.errors import Refusal, SilotuneError
from common.messages import (
    MALFORMED,
    REASONS,
    Contribution,
    Hello,
    Introduction,
    Plan,
    Refused,
    Reply,
    Request,
    Settings,
    TrainRequest,
)
from common.models import Fingerprint

ARRAY = "array"


@dataclass(frozen=True)
class Wire:
    """kind: name of the message's class. text: JSON of its small fields. arrays: one-dimensional, by name."""

    kind: str
    text: str
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)


def to_wire(message: Request | Reply) -> Wire:
    """The form in which a message travels."""
    kind = type(message).__name__
    match message:
        case TrainRequest(plan, adapter):
            shapes = {key: list(factor.shape) for key, factor in adapter.factors.items()}
            fields = {"plan": {**asdict(plan), "settings": plan.settings.to_json()}, "shapes": shapes}
            return Wire(kind, json.dumps(fields), {ARRAY: flatten(adapter.factors, adapter.factors)})
        case Contribution(plan_digest, vector):
            return Wire(kind, json.dumps({"plan_digest": plan_digest}), {ARRAY: vector})
        case _:
            return Wire(kind, json.dumps(asdict(message)))


def from_wire(wire: Wire) -> Request | Reply:
    """The message that travelled. Raises Refusal(malformed) for anything that `to_wire` does not write."""
    try:
        return _read(wire.kind, json.loads(wire.text), wire.arrays)
    except (ValueError, TypeError, KeyError, AttributeError, SilotuneError) as error:
        raise Refusal(MALFORMED, f"a message {wire.kind!r:.40} cannot be read: {error}") from error


def _read(kind: str, fields: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Request | Reply:
    match kind:
        case "Hello":
            return Hello(**{**fields, "fingerprint": Fingerprint(**fields["fingerprint"])})
        case "Introduction":
            return Introduction(**{**fields, "fingerprint": Fingerprint(**fields["fingerprint"])})
        case "TrainRequest":
            shapes = {key: np.empty(tuple(shape), np.float32) for key, shape in fields["shapes"].items()}
            plan = dict(fields["plan"])
            plan |= {
                "cohort": tuple(plan["cohort"]),
                "settings": Settings.from_json(plan["settings"]),
                "fingerprint": Fingerprint(**plan["fingerprint"]),
            }
            return TrainRequest(Plan(**plan), Adapter(unflatten(_vector(arrays, np.float32), shapes, shapes)))
        case "Contribution":
            return Contribution(str(fields["plan_digest"]), _vector(arrays, np.uint32))
        case "Refused":
            if fields["reason"] not in REASONS:
                raise ValueError("unknown reason code")
            parts = tuple(part for part in fields["parts"] if part in Fingerprint.PARTS)
            return Refused(fields["reason"], str(fields["name"]), parts)
        case _:
            raise ValueError("unknown kind of message")


def _vector(arrays: Mapping[str, NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    vector = arrays[ARRAY]
    if vector.dtype != dtype or vector.ndim != 1:
        raise ValueError(f"expected a vector of {np.dtype(dtype)}, found {vector.ndim} dimensions of {vector.dtype}")
    return vector
