"""Messages as they travel: a JSON text for what is small, arrays for what is large.

Both sides turn a message into a `Wire` and back with the same two functions; only the last step, from `Wire` to the
transport's own records, belongs to a side.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.adapter import Adapter, flatten, unflatten
from common.base_model import Fingerprint
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
    built,
)

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
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError, SilotuneError) as error:
        raise Refusal(MALFORMED, f"a message {wire.kind!r:.40} cannot be read: {error}") from error


def _read(kind: str, fields: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Request | Reply:
    match kind:
        case "Hello":
            return built(Hello, _with_fingerprint(fields))
        case "Introduction":
            introduction = built(Introduction, _with_fingerprint(fields))
            _require_word(introduction.name)
            _require_word(introduction.version)
            return introduction
        case "TrainRequest":
            # Only their shapes are used, so they take no memory, however large a sender says they are.
            shapes = {key: np.broadcast_to(np.float32(0), _shape(shape)) for key, shape in fields["shapes"].items()}
            if set(fields) != {"plan", "shapes"}:
                raise ValueError("expected a plan and the shapes of an adapter")
            plan = _plan(fields["plan"])
            return TrainRequest(plan, Adapter(unflatten(_vector(arrays, np.float32), shapes, shapes)))
        case "Contribution":
            if set(fields) != {"plan_digest"} or not isinstance(fields["plan_digest"], str):
                raise ValueError("expected the digest of a plan")
            return Contribution(fields["plan_digest"], _vector(arrays, np.uint32))
        case "Refused":
            refused = built(Refused, {**fields, "parts": _tuple(fields["parts"])})
            if refused.reason not in REASONS or not set(refused.parts) <= set(Fingerprint.PARTS):
                raise ValueError("unknown reason code or part of a base model")
            if refused.name:
                _require_word(refused.name)
            return refused
        case _:
            raise ValueError("unknown kind of message")


def _with_fingerprint(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "fingerprint": built(Fingerprint, fields["fingerprint"])}


def _plan(fields: dict[str, Any]) -> Plan:
    settings = Settings.from_json(fields["settings"])
    plan = built(Plan, {**_with_fingerprint(fields), "cohort": _tuple(fields["cohort"]), "settings": settings})
    for name in (plan.run, *plan.cohort):
        _require_word(name)
    if plan.round < 1 or plan.parameters < 0 or len(set(plan.cohort)) < len(plan.cohort):
        raise ValueError("round, parameters or cohort of a plan cannot be meant")
    return plan


def _tuple(found: Any) -> tuple[Any, ...]:
    if not isinstance(found, list):
        raise ValueError(f"expected a list, found {type(found).__name__}")
    return tuple(found)


def _shape(found: Any) -> tuple[int, ...]:
    shape = _tuple(found)
    if len(shape) != 2 or not all(type(size) is int for size in shape):
        raise ValueError("expected the two sizes of a factor")
    return shape


def _require_word(text: str) -> None:
    """Names become parts of paths, lines of logs and rows of tables, so they hold nothing that means more there."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}", text):
        raise ValueError(f"expected a plain word, found {text!r:.60}")


def _vector(arrays: Mapping[str, NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    vector = arrays[ARRAY]
    if vector.dtype != dtype or vector.ndim != 1:
        raise ValueError(f"expected a vector of {np.dtype(dtype)}, found {vector.ndim} dimensions of {vector.dtype}")
    return vector
