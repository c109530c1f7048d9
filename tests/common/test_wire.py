"""Messages as they travel: every one comes back as it was, and whatever else comes is refused as malformed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from flwr.app import RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.adapter import Adapter
from common.base_model import Fingerprint
from common.config import Config, LoraConfig, QuantiseConfig, TrainConfig
from common.errors import Refusal
from common.flower import from_records, to_records
from common.messages import (
    MALFORMED,
    PROTOCOL,
    PROTOCOL_DIFFERS,
    REASONS,
    VERSION_DIFFERS,
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
from common.secagg.messages import (
    Consent,
    Consents,
    Inbox,
    KeyList,
    Keys,
    MaskedInput,
    Revealed,
    Sealed,
    Shares,
    Survivors,
)
from common.secagg.terms import Terms, smallest_cohort
from common.wire import ARRAY, Wire, from_wire, to_wire

Message = Request | Reply

texts = st.text(max_size=20)  # surrogates included: a sender can put them into JSON
words = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,15}", fullmatch=True)
versions = st.integers(-(2**63), 2**63 - 1)
positive = st.floats(1e-9, 1e9)
shares = st.floats(0, 1, exclude_max=True)
fingerprints = st.builds(Fingerprint, texts, texts, texts)
loras = st.builds(
    LoraConfig,
    rank=st.integers(1, 64),
    alpha=positive,
    dropout=shares,
    target_modules=st.lists(st.sampled_from(["q_proj", "k_proj", "mlp.up_proj"]), min_size=1, unique=True),
)
settings_ = st.builds(
    Settings,
    seed=st.integers(0, 2**32 - 1),
    data_set=st.from_regex(r"[a-z0-9][a-z0-9_-]{0,15}", fullmatch=True),
    rounds=st.integers(1, 10**6),
    method=texts,
    weighting=st.sampled_from(["records", "uniform"]),
    weight_unit=st.integers(1, 1000),
    evaluate=st.booleans(),
    lora=loras,
    train=st.builds(TrainConfig, passes_per_round=positive, learning_rate=positive, warmup=shares),
    quantise=st.builds(QuantiseConfig, clip=positive, bits=st.integers(2, 30), weight_bits=st.integers(1, 29)),
)


@st.composite
def terms(draw: st.DrawFn) -> Terms:
    colluders = draw(st.integers(1, 5))
    members = draw(st.integers(smallest_cohort(colluders), 300))
    return Terms.of(members, colluders, draw(st.integers(smallest_cohort(colluders), members)))


secure_plans = st.builds(
    SecurePlan,
    attempt=st.integers(1, 10**6),
    roster=texts,
    terms=terms(),
    length=versions,
    ring_bits=versions,
)
plans = st.builds(
    Plan,
    run=words,
    round=st.integers(1, 10**6),
    cohort=st.lists(words, unique=True, max_size=5).map(tuple),
    parameters=st.integers(0, 10**9),
    adapter_digest=texts,
    fingerprint=fingerprints,
    settings=settings_,
    secure=st.none() | secure_plans,
)
matrices = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=4))
adapters = st.builds(Adapter, st.dictionaries(texts, matrices, max_size=4))
vectors = hnp.arrays(np.uint32, st.integers(0, 50))
parts = st.binary(max_size=40)
keys = st.builds(Keys, texts, parts, parts, parts, parts)
sealed = st.dictionaries(words, st.builds(Sealed, parts, parts, parts), max_size=4)
secure_messages = st.one_of(
    keys,
    st.builds(KeyList, texts, st.dictionaries(words, keys, max_size=4)),
    st.builds(Shares, texts, sealed),
    st.builds(Inbox, texts, sealed),
    st.builds(MaskedInput, texts, vectors),
    st.builds(Survivors, texts, st.lists(words, max_size=5).map(tuple)),
    st.builds(Consent, texts, parts),
    st.builds(Consents, texts, st.dictionaries(words, parts, max_size=4)),
    st.builds(Revealed, texts, st.dictionaries(words, parts, max_size=4)),
)
publications = st.builds(Publication, words, st.integers(0, 10**6), fingerprints, loras, texts, parts)
messages = st.one_of(
    st.builds(Hello, st.just(PROTOCOL), words, words, fingerprints, settings_, texts),
    st.builds(Introduction, words, versions, words, fingerprints),
    st.builds(TrainRequest, plans, adapters),
    st.builds(Contribution, texts, vectors),
    st.builds(Published, publications, adapters),
    st.builds(Received, words),
    st.builds(
        Refused,
        st.sampled_from(sorted(REASONS)),
        st.one_of(st.just(""), words),
        st.lists(st.sampled_from([*Fingerprint.PARTS, "3", "0.1.0", "1.2.3rc4"]), unique=True).map(tuple),
    ),
    secure_messages,
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)

FINGERPRINT = Fingerprint("c", "w", "t")
ADAPTER = Adapter({"q.lora_A.weight": np.ones((2, 3)), "q.lora_B.weight": np.zeros((4, 2))})
PLAN = Plan(
    "run-1",
    2,
    ("north", "south", "west"),
    14,
    ADAPTER.digest(),
    FINGERPRINT,
    Settings.of(Config(seed=7)),
    SecurePlan(3, "cd" * 32, Terms.of(4, 1, 3), 40, 22),
)
KEYS = Keys(PLAN.digest(), b"share key", b"mask key", b"commitment", bytes(64))
SEALED = Sealed(b"shares", b"pair seed", bytes(64))
PUBLICATION = Publication("run-1", 3, FINGERPRINT, LoraConfig(), ADAPTER.digest(), bytes(range(64)))
EXAMPLES: dict[str, Message] = {
    "Hello": Hello(PROTOCOL, "0.1.0", "run-1", FINGERPRINT, Settings.of(Config(seed=7)), "cd" * 32),
    "Published": Published(PUBLICATION, ADAPTER),
    "Received": Received("run-1"),
    "Introduction": Introduction("north", PROTOCOL, "0.1.0", FINGERPRINT),
    "TrainRequest": TrainRequest(PLAN, ADAPTER),
    "Contribution": Contribution(PLAN.digest(), np.arange(5, dtype=np.uint32)),
    "Refused": Refused("base_model_differs", "north", ("weights",)),
    "Keys": KEYS,
    "KeyList": KeyList(PLAN.digest(), {"north": KEYS, "south": replace(KEYS, share_key=b"another")}),
    "Shares": Shares(PLAN.digest(), {"south": SEALED}),
    "Inbox": Inbox(PLAN.digest(), {"north": SEALED, "west": replace(SEALED, pair=b"")}),
    "MaskedInput": MaskedInput(PLAN.digest(), np.arange(5, dtype=np.uint32)),
    "Survivors": Survivors(PLAN.digest(), ("north", "south", "west")),
    "Consent": Consent(PLAN.digest(), bytes(64)),
    "Consents": Consents(PLAN.digest(), {"north": bytes(64), "south": b"\xff" * 64}),
    "Revealed": Revealed(PLAN.digest(), {"north": bytes(66), "south": b"\xff" * 66}),
}
# What members and coordinator say to each other in secure aggregation, by the field that names who it is from or for.
BY_NAME = {
    "KeyList": "keys",
    "Shares": "sealed",
    "Inbox": "sealed",
    "Consents": "signatures",
    "Revealed": "shares",
}
SECURE = ("Keys", "KeyList", "Shares", "Inbox", "MaskedInput", "Survivors", "Consent", "Consents", "Revealed")
ALIKE = {("Shares", "Inbox"), ("Inbox", "Shares")}  # of one form; which it is decides who may say it to whom


def same(one: Message, other: Message) -> bool:
    """Equality, with arrays bit for bit."""
    match one, other:
        case TrainRequest(), TrainRequest():
            return one.plan == other.plan and one.adapter.digest() == other.adapter.digest()
        case Published(), Published():
            return one.publication == other.publication and one.adapter.digest() == other.adapter.digest()
        case Contribution(), Contribution():
            return one.plan_digest == other.plan_digest and (
                (one.vector.dtype, one.vector.tobytes()) == (other.vector.dtype, other.vector.tobytes())
            )
        case MaskedInput(), MaskedInput():
            return one.plan == other.plan and (
                (one.vector.dtype, one.vector.tobytes()) == (other.vector.dtype, other.vector.tobytes())
            )
    return one == other


def assert_malformed(wire: Wire) -> None:
    with pytest.raises(Refusal) as caught:
        from_wire(wire)
    assert caught.value.reason == MALFORMED


# --- There and back ------------------------------------------------------------------------------------------------


@given(messages)
def test_every_message_comes_back_as_it_was(message: Message) -> None:
    wire = to_wire(message)
    assert wire.kind == type(message).__name__
    assert all(array.ndim == 1 for array in wire.arrays.values())
    assert same(from_wire(wire), message)
    if isinstance(message, TrainRequest):
        found = from_wire(wire)
        assert isinstance(found, TrainRequest)
        assert found.plan.digest() == message.plan.digest()  # by which a contribution says what it answers


@given(messages.filter(lambda message: "\\ud" not in to_wire(message).text))  # Flower's own text is UTF-8
def test_and_through_flowers_records(message: Message) -> None:
    records = to_records(to_wire(message))
    again = RecordDict.inflate(records.deflate(), children=inflated(records))
    assert same(from_wire(from_records(again)), message)


def inflated(found: Any) -> dict[str, Any]:
    """The parts of a record as Flower rebuilds them on the other side of a network, from bytes alone."""
    return {
        name: type(child).inflate(child.deflate(), children=inflated(child))
        for name, child in (found.children or {}).items()
    }


def test_there_is_an_example_of_every_kind() -> None:
    kinds = [kind for one in (Request, Reply) for kind in get_args(one)]
    assert sorted(EXAMPLES) == sorted(kind.__name__ for kind in kinds)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_an_example_comes_back_as_it_was(kind: str) -> None:
    assert same(from_wire(to_wire(EXAMPLES[kind])), EXAMPLES[kind])


def test_a_contribution_is_one_array_and_a_digest() -> None:
    """Nothing that an institution computes from its data travels beside the vector."""
    wire = to_wire(EXAMPLES["Contribution"])
    assert json.loads(wire.text) == {"plan_digest": PLAN.digest()}
    assert list(wire.arrays) == [ARRAY]
    assert wire.arrays[ARRAY].dtype == np.uint32


def test_a_masked_input_is_one_array_and_the_plan_that_it_belongs_to() -> None:
    wire = to_wire(EXAMPLES["MaskedInput"])
    assert json.loads(wire.text) == {"plan": PLAN.digest()}
    assert list(wire.arrays) == [ARRAY]
    assert wire.arrays[ARRAY].dtype == np.uint32


@pytest.mark.parametrize("secure", [PLAN.secure, None])
def test_a_plan_travels_with_and_without_secure_aggregation(secure: SecurePlan | None) -> None:
    plan = replace(PLAN, secure=secure)
    found = from_wire(to_wire(TrainRequest(plan, ADAPTER)))
    assert isinstance(found, TrainRequest)
    assert found.plan == plan
    assert found.plan.digest() == plan.digest()


@pytest.mark.parametrize("kind", SECURE)
def test_nothing_of_secure_aggregation_is_read_as_bytes_that_it_was_not(kind: str) -> None:
    """Signatures are over bytes, so not one may change on the way; large ones and empty ones neither."""
    long = bytes(range(256)) * 20
    changes: dict[str, dict[str, Any]] = {
        "Keys": {"share_key": long, "signature": b""},
        "KeyList": {"keys": {"north": replace(KEYS, mask_key=long)}},
        "Shares": {"sealed": {"north": Sealed(long, b"", long)}},
        "Inbox": {"sealed": {}},
        "MaskedInput": {"vector": np.zeros(0, np.uint32)},
        "Survivors": {"names": ()},
        "Consent": {"signature": long},
        "Consents": {"signatures": {"north": b"", "south": long}},
        "Revealed": {"shares": {"north": long}},
    }
    message = replace(EXAMPLES[kind], **changes[kind])
    assert same(from_wire(to_wire(message)), message)


# --- What to_wire does not write -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["", "hello", "Hello ", "Request", "dict", "Plan", "\ud800", "x" * 10_000])
def test_unknown_kinds_are_malformed(kind: str) -> None:
    assert_malformed(replace(to_wire(EXAMPLES["Hello"]), kind=kind))


@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize(
    "text", ["", "{", "null", "true", "7", '"text"', "[]", "[[]]", "{}", "[" * 100_000, "9" * 5000]
)
def test_text_of_another_form_is_malformed(kind: str, text: str) -> None:
    assert_malformed(replace(to_wire(EXAMPLES[kind]), text=text))


@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize("other", EXAMPLES)
def test_a_message_under_another_name_is_malformed(kind: str, other: str) -> None:
    if kind != other and (kind, other) not in ALIKE:
        assert_malformed(replace(to_wire(EXAMPLES[kind]), kind=other))


@pytest.mark.parametrize(("kind", "other"), sorted(ALIKE))
def test_a_message_of_the_same_form_is_what_its_name_says(kind: str, other: str) -> None:
    assert type(from_wire(replace(to_wire(EXAMPLES[kind]), kind=other))).__name__ == other


@given(st.sampled_from(sorted(EXAMPLES)), anything)
def test_arbitrary_json_is_malformed(kind: str, value: Any) -> None:
    assert_malformed(replace(to_wire(EXAMPLES[kind]), text=json.dumps(value)))


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, part in inner for found in paths(part, (*path, key)))]


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The JSON value with another part at `path`; the settings' own text is opened on the way."""
    if not path:
        return new
    key, *rest = path
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = put(copy[key], tuple(rest), new)
    return copy


def opened(wire: Wire) -> Any:
    """The text as JSON, with the settings inside a plan as JSON too."""
    fields = json.loads(wire.text)
    if wire.kind == "TrainRequest":
        fields["plan"]["settings"] = json.loads(fields["plan"]["settings"])
    if wire.kind == "Hello":
        fields["settings"] = json.loads(fields["settings"])
    return fields


def closed(kind: str, fields: Any) -> str:
    plan = fields.get("plan") if kind == "TrainRequest" and isinstance(fields, dict) else None
    if isinstance(plan, dict) and "settings" in plan:
        fields = {**fields, "plan": {**plan, "settings": json.dumps(plan["settings"])}}
    if kind == "Hello" and isinstance(fields, dict) and "settings" in fields:
        fields = {**fields, "settings": json.dumps(fields["settings"])}
    return json.dumps(fields)


def speaks_another_protocol(kind: str, fields: Any) -> bool:
    spoken = fields.get("protocol") if kind == "Hello" and isinstance(fields, dict) else None
    return type(spoken) is int and spoken != PROTOCOL


@given(st.sampled_from(sorted(EXAMPLES)), anything, st.data())
def test_what_is_read_is_exactly_what_was_said_or_refused(kind: str, value: Any, data: st.DataObject) -> None:
    """Any part of any message replaced by anything: nothing is guessed, converted, filled in or passed over."""
    wire = to_wire(EXAMPLES[kind])
    before = opened(wire)
    fields = put(before, data.draw(st.sampled_from(paths(before))), value)
    try:
        message = from_wire(replace(wire, text=closed(kind, fields)))
    except Refusal as refusal:
        told = refusal.reason
    else:
        told = opened(to_wire(message))
    if speaks_another_protocol(kind, fields):
        assert told == PROTOCOL_DIFFERS
    else:
        assert told in (MALFORMED, fields)


@given(st.sampled_from(sorted(EXAMPLES)), st.data())
def test_a_missing_or_additional_field_is_malformed(kind: str, data: st.DataObject) -> None:
    wire = to_wire(EXAMPLES[kind])
    fields = opened(wire)
    by_name = (("shapes",), (BY_NAME.get(kind),))  # in these a name more or less is another message
    objects = [path for path in paths(fields) if isinstance(at(fields, path), dict) and path not in by_name]
    path = data.draw(st.sampled_from(objects))
    values = dict(at(fields, path))
    if data.draw(st.booleans()):
        values["additional"] = data.draw(anything)
    else:
        del values[data.draw(st.sampled_from(sorted(values)))]
    assert_malformed(replace(wire, text=closed(kind, put(fields, path, values))))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def changed(kind: str, path: tuple[Any, ...], value: Any) -> Wire:
    wire = to_wire(EXAMPLES[kind])
    return replace(wire, text=closed(kind, put(opened(wire), path, value)))


HOSTILE_NAMES = [
    "",
    " ",
    ".",
    "..",
    "../north",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "north\n",
    "no\nrth",
    "\x1b[31mnorth",
    "[red]north",
    "<b>",
    "nörth",
    "\u202enorth",
    "\ud800",
    "a\0b",
    "-rf",
    "n" * 201,
    None,
    7,
    True,
    [],
    ["north"],
    {},
]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=repr)
@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("Introduction", ("name",)),
        ("Introduction", ("version",)),
        ("Hello", ("version",)),
        ("Hello", ("run",)),
        ("Published", ("publication", "run")),
        ("Received", ("run",)),
        ("Refused", ("name",)),
        ("TrainRequest", ("plan", "run")),
        ("TrainRequest", ("plan", "cohort", 0)),
        ("Survivors", ("names", 1)),
    ],
)
def test_names_that_mean_something_in_a_path_a_log_or_a_page_are_malformed(
    kind: str, path: tuple[Any, ...], name: Any
) -> None:
    if (kind, name) == ("Refused", ""):  # says that the name is not known yet
        assert from_wire(changed(kind, path, name)) == replace(EXAMPLES[kind], name="")
    else:
        assert_malformed(changed(kind, path, name))


@pytest.mark.parametrize("name", [name for name in HOSTILE_NAMES if isinstance(name, str)], ids=repr)
@pytest.mark.parametrize("kind", BY_NAME)
def test_nor_are_such_names_read_of_members(kind: str, name: str) -> None:
    found = at(json.loads(to_wire(EXAMPLES[kind]).text), (BY_NAME[kind],))
    assert_malformed(changed(kind, (BY_NAME[kind],), {**found, name: next(iter(found.values()))}))


NO_BYTES = [
    *("A", "AB", "ABC", "=", "AA=A", "AA==AA==", "AA===", "AA-_", "AA==\n", " AA==", "ÄÄ==", "\ud800", "AAA=\0"),
    *(None, 7, 1.5, True, [], ["AA=="], [0, 1], {}),
]


@pytest.mark.parametrize("value", NO_BYTES, ids=repr)
@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("Keys", ("share_key",)),
        ("Keys", ("mask_key",)),
        ("Keys", ("commitment",)),
        ("Keys", ("signature",)),
        ("KeyList", ("keys", "south", "signature")),
        ("Shares", ("sealed", "south", "shares")),
        ("Shares", ("sealed", "south", "pair")),
        ("Inbox", ("sealed", "north", "signature")),
        ("Consent", ("signature",)),
        ("Consents", ("signatures", "south")),
        ("Revealed", ("shares", "south")),
    ],
)
def test_what_is_not_base64_is_malformed(kind: str, path: tuple[Any, ...], value: Any) -> None:
    assert_malformed(changed(kind, path, value))


@pytest.mark.parametrize("plan", [None, 7, True, [], ["p"], {}, {"plan": "p"}], ids=repr)
@pytest.mark.parametrize("kind", SECURE)
def test_a_message_of_no_plan_is_malformed(kind: str, plan: Any) -> None:
    assert_malformed(changed(kind, ("plan",), plan))


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        *((kind, (field,), value) for kind, field in BY_NAME.items() for value in (None, 7, "north", [], ["north"])),
        *((kind, (field, "north"), []) for kind, field in BY_NAME.items()),
        *((kind, (field, "north"), {}) for kind, field in BY_NAME.items()),
        ("KeyList", ("keys", "north", "plan"), 7),
        ("KeyList", ("keys", "north", "plan"), None),
        ("KeyList", ("keys", "north"), {"share_key": "", "mask_key": "", "commitment": "", "signature": ""}),
        ("Inbox", ("sealed", "north"), {"shares": "", "pair": ""}),
        ("Inbox", ("sealed", "north"), {"shares": "", "pair": "", "signature": "", "more": ""}),
        ("Survivors", ("names",), "north"),
        ("Survivors", ("names",), {"north": 1}),
        ("Survivors", ("names",), None),
        ("Survivors", ("names",), [["north"]]),
    ],
    ids=lambda value: f"{value!r:.40}",
)
def test_secure_aggregation_in_another_form_is_malformed(kind: str, path: tuple[Any, ...], value: Any) -> None:
    fields = json.loads(to_wire(EXAMPLES[kind]).text)
    *outer, last = path
    at(fields, tuple(outer))[last] = value
    assert_malformed(replace(to_wire(EXAMPLES[kind]), text=json.dumps(fields)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("reason",), "because"),
        (("reason",), "patient 17 is ill"),
        (("reason",), ""),
        (("reason",), ["malformed"]),
        (("reason",), None),
        (("parts",), ["diagnoses"]),
        (("parts",), ["weights", "/data/notes.csv"]),
        (("parts",), ["1.2.3.4.5"]),
        (("parts",), ["0.1.0 "]),
        (("parts",), ["0.1.0\n"]),
        (("parts",), ["3\n"]),
        (("parts",), ["1234567"]),
        (("parts",), ["3cardiology"]),
        (("parts",), ["\u0663"]),
        (("parts",), [""]),
        (("parts",), "weights"),
        (("parts",), [["weights"]]),
        (("parts",), [7]),
        (("parts",), None),
    ],
)
def test_a_refusal_says_nothing_but_known_words(path: tuple[Any, ...], value: Any) -> None:
    assert_malformed(changed("Refused", path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("plan", "round"), 0),
        (("plan", "round"), 2.0),
        (("plan", "round"), "2"),
        (("plan", "parameters"), -1),
        (("plan", "cohort"), ["north", "north"]),
        (("plan", "cohort"), "north"),
        (("plan", "cohort"), {"north": 1}),
        (("plan", "secure"), False),
        (("plan", "secure"), {}),
        (("plan", "secure"), []),
        (("plan", "secure"), "on"),
        (("plan", "secure", "attempt"), 0),
        (("plan", "secure", "attempt"), -1),
        (("plan", "secure", "attempt"), True),
        (("plan", "secure", "attempt"), 1.0),
        (("plan", "secure", "attempt"), 2**63),
        (("plan", "secure", "roster"), None),
        (("plan", "secure", "roster"), 7),
        (("plan", "secure", "length"), "40"),
        (("plan", "secure", "length"), 40.0),
        (("plan", "secure", "ring_bits"), None),
        (("plan", "secure", "terms"), None),
        (("plan", "secure", "terms"), {}),
        (("plan", "secure", "terms"), [4, 1, 3, 3]),
        (("plan", "secure", "terms", "members"), 6),  # 2t > n + T no longer holds
        (("plan", "secure", "terms", "colluders"), 0),
        (("plan", "secure", "terms", "colluders"), 2),
        (("plan", "secure", "terms", "threshold"), 2),
        (("plan", "secure", "terms", "threshold"), 5),
        (("plan", "secure", "terms", "threshold"), 3.0),
        (("plan", "secure", "terms", "threshold"), True),
        (("plan", "secure", "terms", "smallest"), 2),
        (("plan", "secure", "terms", "smallest"), 5),
        (("plan", "secure", "terms", "smallest"), "3"),
        (("plan", "fingerprint"), {"config": "c", "weights": "w"}),
        (("plan", "fingerprint", "weights"), 7),
        (("plan", "settings"), "{}"),
        (("plan", "settings", "train", "learning_rate"), float("nan")),
        (("plan", "settings", "lora", "rank"), 10**400),
        (("shapes",), []),
        (("shapes",), {}),
        (("shapes", "q.lora_A.weight"), [3, 3]),
        (("shapes", "q.lora_A.weight"), [6]),
        (("shapes", "q.lora_A.weight"), [2, 3, 1]),
        (("shapes", "q.lora_A.weight"), "23"),
        (("shapes", "q.lora_A.weight"), [2.0, 3]),
        (("shapes", "q.lora_A.weight"), [-2, -3]),
        (("shapes", "q.lora_A.weight"), [10**12, 10**5]),  # would be 400 petabytes
        (("shapes", "q.lora_A.weight"), [2**62, 2**62]),
        (("shapes", "q.lora_A.weight"), [10**400, 0]),
    ],
    ids=lambda value: f"{value!r:.40}",
)
def test_plans_and_shapes_that_cannot_be_meant_are_malformed(path: tuple[Any, ...], value: Any) -> None:
    assert_malformed(changed("TrainRequest", path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((), None),
        ((), []),
        ((), "text"),
        (("round",), -1),
        (("round",), 1.0),
        (("round",), True),
        (("round",), "3"),
        (("round",), 2**63),
        (("adapter",), None),
        (("adapter",), 7),
        (("fingerprint",), None),
        (("fingerprint",), {"config": "c", "weights": "w"}),
        (("fingerprint", "weights"), 7),
        (("lora",), None),
        (("lora",), {}),
        (("lora", "rank"), 0),
        (("lora", "rank"), "4"),
        (("lora", "alpha"), float("nan")),
        (("lora", "alpha"), 10**400),
        (("lora", "dropout"), 1.0),
        (("lora", "target_modules"), []),
        (("lora", "target_modules"), "q_proj"),
        (("lora", "target_modules"), ["q_proj", "q_proj"]),
        (("signature",), None),
        (("signature",), 7),
        (("signature",), "0"),
        (("signature",), "zz"),
        (("signature",), "AB"),
        (("signature",), "ab cd"),
        (("signature",), " abcd"),
        (("signature",), "abcd\n"),
        (("signature",), ["ab"]),
    ],
    ids=lambda value: f"{value!r:.40}",
)
def test_a_publication_that_cannot_be_meant_is_malformed(path: tuple[Any, ...], value: Any) -> None:
    assert_malformed(changed("Published", ("publication", *path), value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("protocol",), None),
        (("protocol",), True),
        (("protocol",), float(PROTOCOL)),
        (("protocol",), str(PROTOCOL)),
        (("protocol",), [PROTOCOL]),
        (("fingerprint",), None),
        (("fingerprint", "config"), 7),
        (("roster",), None),
        (("roster",), 7),
        (("settings",), None),
        (("settings",), {}),
        (("settings", "data_set"), "../records"),
        (("settings", "data_set"), 7),
        (("settings", "lora", "rank"), 0),
        (("settings", "train", "max_tokens"), 10**400),
        (("settings", "quantise", "clip"), float("inf")),
    ],
    ids=lambda value: f"{value!r:.40}",
)
def test_a_hello_that_cannot_be_meant_is_malformed(path: tuple[Any, ...], value: Any) -> None:
    assert_malformed(changed("Hello", path, value))


@given(st.integers(), anything)
def test_another_protocol_is_told_so_whatever_else_its_hello_holds(protocol: int, value: Any) -> None:
    text = json.dumps({"protocol": protocol, "rest": value})
    with pytest.raises(Refusal) as caught:
        from_wire(Wire("Hello", text))
    expected = (MALFORMED, ()) if protocol == PROTOCOL else (PROTOCOL_DIFFERS, (str(PROTOCOL),))
    assert (caught.value.reason, caught.value.parts) == expected


@pytest.mark.parametrize("own", ["0.1.0", "1.0", "2", "0.2.0.dev3", "1.0rc1", "1.2.post4", "10.20.30.40"])
def test_a_refusal_of_a_release_names_that_of_the_institution(own: str) -> None:
    told = Refused(VERSION_DIFFERS, "north", (own,))
    assert from_wire(to_wire(told)) == told


ADAPTERS = ["TrainRequest", "Published"]


@pytest.mark.parametrize("kind", [*ADAPTERS, "Contribution", "MaskedInput"])
@pytest.mark.parametrize(
    "hostile",
    [
        lambda good: {},
        lambda good: {"other": good},
        lambda good: {ARRAY: good[None]},
        lambda good: {ARRAY: good[0]},
        lambda good: {ARRAY: good.astype(np.float64)},
        lambda good: {ARRAY: good.astype(np.int32)},
        lambda good: {ARRAY: good.astype(np.uint64)},
        lambda good: {ARRAY: good.astype(good.dtype.newbyteorder(">"))},
        lambda good: {ARRAY: good.astype(object)},
        lambda good: {ARRAY: good.astype(str)},
        lambda good: {ARRAY: good.tolist()},
        lambda good: {ARRAY: None},
    ],
)
def test_arrays_of_another_form_are_malformed(kind: str, hostile: Callable[[Any], Mapping[str, Any]]) -> None:
    wire = to_wire(EXAMPLES[kind])
    assert_malformed(replace(wire, arrays=hostile(wire.arrays[ARRAY])))


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("length", [0, 13, 15])
def test_an_adapter_of_another_length_is_malformed(length: int, kind: str) -> None:
    assert_malformed(replace(to_wire(EXAMPLES[kind]), arrays={ARRAY: np.zeros(length, np.float32)}))


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("shape", [[3, 3], [6], [2, 3, 1], [2.0, 3], [-2, -3], [10**12, 10**5], [2**62, 2**62]])
def test_shapes_that_do_not_fit_what_came_are_malformed(shape: list[Any], kind: str) -> None:
    assert_malformed(changed(kind, ("shapes", "q.lora_A.weight"), shape))
