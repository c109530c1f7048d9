"""Messages as they travel: a JSON text for what is small, arrays for what is large.

Both sides turn a message into a `Wire` and back with the same two functions; only the last step, from `Wire` to the
transport's own records, belongs to a side.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from common.adapter import Adapter, flatten, unflatten
from common.base_model import Fingerprint
from common.errors import Refusal, SilotuneError
from common.messages import (
    MALFORMED,
    PROTOCOL,
    PROTOCOL_DIFFERS,
    REASONS,
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
    is_part,
)
from common.publication import Publication
from common.secagg import messages as secagg
from common.secagg.terms import Terms
from common.typed import built

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
            return _with_adapter(kind, {"plan": plan_fields(plan)}, adapter)
        case Published(publication, adapter):
            return _with_adapter(kind, {"publication": publication.to_json()}, adapter)
        case Hello():
            return Wire(kind, json.dumps({**asdict(message), "settings": message.settings.to_json()}))
        case Contribution(plan_digest, vector):
            return Wire(kind, json.dumps({"plan_digest": plan_digest}), {ARRAY: vector})
        case secagg.MaskedInput(plan, vector):
            return Wire(kind, json.dumps({"plan": plan}), {ARRAY: vector})
        case _:
            return Wire(kind, json.dumps(_plain(asdict(message))))


def _with_adapter(kind: str, fields: dict[str, Any], adapter: Adapter) -> Wire:
    shapes = {key: list(factor.shape) for key, factor in adapter.factors.items()}
    return Wire(kind, json.dumps({**fields, "shapes": shapes}), {ARRAY: flatten(adapter.factors, adapter.factors)})


def size(wire: Wire) -> int:
    """Bytes that a message takes, transport aside."""
    return len(wire.text) + sum(array.nbytes for array in wire.arrays.values())


def from_wire(wire: Wire) -> Request | Reply:
    """The message that travelled.

    Raises Refusal(protocol_differs) for a Hello of another protocol, whatever else it holds, and Refusal(malformed) for
    anything that `to_wire` does not write.
    """
    try:
        fields = json.loads(wire.text)
        spoken = fields["protocol"] if wire.kind == "Hello" else PROTOCOL
        if type(spoken) is not int or spoken == PROTOCOL:
            return _read(wire.kind, fields, wire.arrays)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError, SilotuneError) as error:
        raise Refusal(MALFORMED, f"a message {wire.kind!r:.40} cannot be read: {error}") from error
    raise Refusal(PROTOCOL_DIFFERS, f"the coordinator speaks protocol {spoken}, this is {PROTOCOL}", (str(PROTOCOL),))


def _read(kind: str, fields: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Request | Reply:
    match kind:
        case "Hello":
            hello = built(Hello, {**_with_fingerprint(fields), "settings": Settings.from_json(fields["settings"])})
            _require_word(hello.version)
            _require_word(hello.run)
            return hello
        case "Introduction":
            introduction = built(Introduction, _with_fingerprint(fields))
            _require_word(introduction.name)
            _require_word(introduction.version)
            return introduction
        case "TrainRequest":
            return TrainRequest(read_plan(fields["plan"]), _adapter(fields, arrays, "plan"))
        case "Published":
            publication = Publication.from_json(fields["publication"])
            _require_word(publication.run)
            return Published(publication, _adapter(fields, arrays, "publication"))
        case "Received":
            _require_word(fields["run"])
            return built(Received, fields)
        case "Contribution":
            if set(fields) != {"plan_digest"} or not isinstance(fields["plan_digest"], str):
                raise ValueError("expected the digest of a plan")
            return Contribution(fields["plan_digest"], _vector(arrays, np.uint32))
        case "MaskedInput":
            masked = secagg.MaskedInput(fields["plan"], _vector(arrays, np.uint32))
            return _about_a_plan(masked, fields, {"plan"})
        case "Keys":
            return _keys(fields)
        case "KeyList":
            keys = {_name(name): _keys(found) for name, found in fields["keys"].items()}
            return _about_a_plan(secagg.KeyList(fields["plan"], keys), fields, {"plan", "keys"})
        case "Shares":
            return _about_a_plan(secagg.Shares(fields["plan"], _sealed(fields["sealed"])), fields, {"plan", "sealed"})
        case "Inbox":
            return _about_a_plan(secagg.Inbox(fields["plan"], _sealed(fields["sealed"])), fields, {"plan", "sealed"})
        case "Survivors":
            names = tuple(_name(name) for name in _tuple(fields["names"]))
            return _about_a_plan(secagg.Survivors(fields["plan"], names), fields, {"plan", "names"})
        case "Consent":
            consent = secagg.Consent(fields["plan"], _bytes(fields["signature"]))
            return _about_a_plan(consent, fields, {"plan", "signature"})
        case "Consents":
            signatures = {_name(name): _bytes(found) for name, found in fields["signatures"].items()}
            return _about_a_plan(secagg.Consents(fields["plan"], signatures), fields, {"plan", "signatures"})
        case "Revealed":
            shares = {_name(name): _bytes(found) for name, found in fields["shares"].items()}
            return _about_a_plan(secagg.Revealed(fields["plan"], shares), fields, {"plan", "shares"})
        case "Refused":
            refused = built(Refused, {**fields, "parts": _tuple(fields["parts"])})
            if refused.reason not in REASONS or not all(is_part(part) for part in refused.parts):
                raise ValueError("unknown reason code, or a part that is none")
            if refused.name:
                _require_word(refused.name)
            return refused
        case _:
            raise ValueError("unknown kind of message")


def _adapter(fields: dict[str, Any], arrays: Mapping[str, NDArray[Any]], beside: str) -> Adapter:
    """The adapter of a message that has the field `beside` besides."""
    if set(fields) != {beside, "shapes"}:
        raise ValueError(f"expected a {beside} and the shapes of an adapter")
    # Only their shapes are used, so they take no memory, however large a sender says they are.
    shapes = {key: np.broadcast_to(np.float32(0), _shape(shape)) for key, shape in fields["shapes"].items()}
    return Adapter(unflatten(_vector(arrays, np.float32), shapes, shapes))


def _with_fingerprint(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "fingerprint": built(Fingerprint, fields["fingerprint"])}


def plan_fields(plan: Plan) -> dict[str, Any]:
    """A plan as JSON can hold it; `read_plan` is its inverse."""
    return {**asdict(plan), "settings": plan.settings.to_json()}


def read_plan(fields: dict[str, Any]) -> Plan:
    """Raises an error of its own kind for whatever `plan_fields` does not write; `from_wire` makes one of all."""
    settings = Settings.from_json(fields["settings"])
    secure = fields["secure"]
    if secure is not None:
        secure = built(SecurePlan, {**secure, "terms": built(Terms, secure["terms"])})
    plan = built(
        Plan,
        {**_with_fingerprint(fields), "cohort": _tuple(fields["cohort"]), "settings": settings, "secure": secure},
    )
    if secure is not None and secure.attempt < 1:
        raise ValueError("attempts of a run count from 1")
    for name in (plan.run, *plan.cohort):
        _require_word(name)
    if plan.round < 1 or plan.parameters < 0 or len(set(plan.cohort)) < len(plan.cohort):
        raise ValueError("round, parameters or cohort of a plan cannot be meant")
    return plan


T = TypeVar("T", bound=secagg.FromMember | secagg.ToMember)


def _about_a_plan(message: T, fields: dict[str, Any], expected: set[str]) -> T:
    """The message, if its fields are the expected ones and it names a plan."""
    if set(fields) != expected or not isinstance(message.plan, str):
        raise ValueError(f"expected {', '.join(sorted(expected))}")
    return message


def _keys(fields: dict[str, Any]) -> secagg.Keys:
    parts = {key: _bytes(value) for key, value in fields.items() if key != "plan"}
    return built(secagg.Keys, {**parts, "plan": fields["plan"]})


def _sealed(found: dict[str, Any]) -> dict[str, secagg.Sealed]:
    return {
        _name(name): built(secagg.Sealed, {key: _bytes(value) for key, value in parts.items()})
        for name, parts in found.items()
    }


def _plain(value: Any) -> Any:
    """Bytes as base64, in dictionaries of any depth."""
    if isinstance(value, bytes):
        return b64encode(value).decode()
    return {key: _plain(part) for key, part in value.items()} if isinstance(value, dict) else value


def _bytes(text: Any) -> bytes:
    if not isinstance(text, str):
        raise ValueError(f"expected base64, found {type(text).__name__}")
    found = b64decode(text, validate=True)
    if b64encode(found).decode() != text:  # the last character has bits that decoding passes over
        raise ValueError("expected base64 as it is written here")
    return found


def _name(text: str) -> str:
    _require_word(text)
    return text


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
