"""What crosses the border of an institution when anything fails: a reason code of the protocol, and nothing else.

A real institution with its guard, put together as its daemon does it, behind the real ClientApp. Its records, persons,
paths, data sets and the texts of its exceptions all hold one word; every reply is looked through, byte by byte, for
that word, for paths, host and user, in every form in which they might stand there.
"""

from __future__ import annotations

import base64
import getpass
import json
import logging
import os
import re
import shutil
import socket
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client import data_sets as data_sets_module
from client import events as told_of
from client import institution as institution_module
from client.app import build_client_app
from client.institution import Institution
from client.policy_file import Budget, SecureTerms
from common import fixed_point, policy_reasons
from common.adapter import Adapter
from common.base_model import Fingerprint, fingerprint
from common.config import LoraConfig, PrivacyConfig
from common.errors import ConfigError, DataError, ModelError, Refusal, StorageError
from common.flower import HELLO, MESSAGES, from_records, kind_of, packed, to_records
from common.messages import (
    ADAPTER_DIGEST_DIFFERS,
    ADAPTER_DOES_NOT_FIT,
    BASE_MODEL_DIFFERS,
    BUNDLE_REFUSED,
    DATA_UNREADABLE,
    INTERNAL_ERROR,
    MALFORMED,
    MESSAGE_TYPE_REFUSED,
    METHOD_UNKNOWN,
    MODEL_UNUSABLE,
    NAME_DIFFERS,
    NOT_CONFIGURED,
    NOT_INVITED,
    PROTOCOL,
    PROTOCOL_DIFFERS,
    REASONS,
    RESTARTED,
    SIGNATURE_DIFFERS,
    STORAGE_FAILED,
    TIMED_OUT,
    VERSION_DIFFERS,
    Hello,
    Introduction,
    Published,
    Refused,
    Reply,
    Request,
    TrainRequest,
)
from common.models import load_tokenizer
from common.secagg import reasons
from common.secagg.attempt import key_list_digest
from common.secagg.identity import Identity
from common.secagg.messages import Consents, Inbox, KeyList, Keys, Sealed, Survivors
from common.sources import read_table
from common.wire import Wire, from_wire, to_wire
from tests.client.conftest import NAMES
from tests.client.guarded import ME, OTHERS, RUN, Attempt, Guarded
from tests.deployments import Deployment, ask_by_hand, deployment, running
from tests.federations import fitting

__all__ = ["deployment", "running"]

MARK = "qzvxkj7391wq"
"""Stands in everything that must not leave."""

NODE = 77
NOBODY = "0" * 64
OTHER_BASE = Fingerprint("1" * 64, "2" * 64, "3" * 64)

OF_THE_NODE = frozenset({BUNDLE_REFUSED, MESSAGE_TYPE_REFUSED, RESTARTED})
"""Said before a message reaches the ClientApp, or of one that a process before this had in hand."""

OF_THE_COORDINATOR = frozenset({TIMED_OUT, NAME_DIFFERS})
"""Never sent: what a coordinator notes of a member that said nothing, or something false."""


@pytest.fixture(autouse=True)
def _surroundings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's own runtime says who sends a message; outside of it a test has to."""
    if "deployment" not in request.fixturenames:
        for name, value in (("_task_id", 1), ("_run_id", 5), ("_node_id", 1)):
            monkeypatch.setattr(TaskIdentity, name, value)


# --- Looking through what left ----------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def forms(secret: str | bytes) -> set[bytes]:
    """How it could stand somewhere: raw, wide, in hex, in base64 at any place in a longer text, escaped, reversed."""
    texts = {secret, secret.upper(), secret[::-1]} if isinstance(secret, str) else set()
    raws = {form for text in texts for form in (text.encode(), text.encode("utf-16-le"), text.encode("utf-16-be"))}
    if isinstance(secret, bytes):
        raws = {secret}
    found = set(raws) | {quote(raw, safe="").encode() for raw in raws} | {repr(raw)[2:-1].encode() for raw in raws}
    for raw in raws:
        found |= {raw.hex().encode(), raw.hex().upper().encode(), ", ".join(map(str, raw)).encode()}
        for offset in range(3):
            whole = base64.b64encode(bytes(offset) + raw)
            # Without the characters at both ends that what stands beside it decides too.
            inner = whole[(0, 2, 3)[offset] : (offset + len(raw)) * 8 // 6]
            found |= {inner, inner.replace(b"+", b"-").replace(b"/", b"_")}
    return found


def unpacked(data: bytes) -> bytes:
    """The bytes, and what any zlib or gzip stream in them holds."""
    found = [data]
    for start in (match.start() for match in re.finditer(rb"\x78[\x01\x5e\x9c\xda]|\x1f\x8b", data)):
        try:
            found.append(zlib.decompressobj(47).decompress(data[start:], 1 << 20))
        except zlib.error:
            continue
    return b"\0".join(found)


def contains(data: bytes, *secrets: str | bytes) -> bool:
    """Whether any of the secrets is in there."""
    whole = unpacked(data)
    return any(form in whole for secret in secrets for form in forms(secret))


@pytest.mark.parametrize("secret", [MARK, "/srv/hospital/records.jsonl", bytes(range(100, 132))], ids=repr)
def test_the_search_would_find_it(secret: str | bytes) -> None:
    raw = secret.encode() if isinstance(secret, str) else secret
    shown = [raw, raw.hex().encode(), raw.hex().upper().encode(), repr(raw).encode(), str(list(raw)).encode()]
    shown += [base64.b64encode(b"." * n + raw + b"!?") for n in range(4)]
    shown += [base64.urlsafe_b64encode(b"\xff" * n + raw + b"\xfb") for n in range(4)]
    shown += [b"junk" + zlib.compress(b"a text with " + raw), zlib.compress(raw, 0), zlib.compress(raw, 9)]
    if isinstance(secret, str):
        shown += [
            secret.upper().encode(),
            secret.encode("utf-16-le"),
            secret.encode("utf-16-be"),
            secret[::-1].encode(),
        ]
        shown += [quote(secret, safe="").encode(), json.dumps({"text": secret}).encode()]
    for text in shown:
        assert contains(b"before " + text + b" after", secret), text
    assert not contains(os.urandom(1 << 16), secret)
    assert not contains(b"", secret)


@dataclass
class Departed:
    """A reply as it leaves: `data` is every byte that goes out, head, tree of parts and the parts themselves."""

    reply: Message
    data: bytes
    wire: Wire

    @classmethod
    def of(cls, reply: Message) -> Departed:
        reply.metadata.__dict__["_message_id"] = reply.object_id  # as client.node does
        head, tree, parts = packed(reply)
        assert {found.name for found, _ in head.ListFields()} <= {"metadata", "content"}
        wire = from_records(reply.content)
        sent = [head.SerializeToString(), tree.SerializeToString(), *(part.deflate() for part in parts.values())]
        # Arrays travel in one part or in chunks; a word across two of them counts too.
        arrays = [array.tobytes() for array in wire.arrays.values()]
        return cls(reply, b"\0".join([*sent, wire.kind.encode(), wire.text.encode(), *arrays]), wire)


def lengths(found: Any) -> Any:
    """A JSON value with the lengths of its texts in their place."""
    if isinstance(found, dict):
        return {key: lengths(part) for key, part in found.items()}
    return len(found) if isinstance(found, str) else found


def b64(size: int) -> int:
    return (size + 2) // 3 * 4


SEALED = {"shares": b64(1268), "pair": b64(1168), "signature": b64(64)}
IN_FORM: dict[str, Callable[[dict[str, Any]], bool]] = {
    "Introduction": lambda f: set(f) == {"name", "protocol", "version", "fingerprint"},
    "Keys": lambda f: (
        lengths(f)
        == {
            "plan": 64,
            "share_key": b64(1216),
            "mask_key": b64(1216),
            "commitment": b64(32),
            "signature": b64(64),
        }
    ),
    "Shares": lambda f: lengths(f) == {"plan": 64, "sealed": dict.fromkeys(OTHERS, SEALED)},
    "MaskedInput": lambda f: lengths(f) == {"plan": 64},
    "Consent": lambda f: lengths(f) == {"plan": 64, "signature": b64(64)},
    "Revealed": lambda f: lengths(f) == {"plan": 64, "shares": dict.fromkeys(NAMES, b64(66))},
    "Contribution": lambda f: lengths(f) == {"plan_digest": 64},
    "Received": lambda f: set(f) == {"run"},
    "Refused": lambda f: set(f) == {"reason", "name", "parts"},
}
"""What each kind of reply says beside its arrays: nothing whose length could follow from data."""

SPEAKING = frozenset({"Introduction", "Received", "Refused"})
"""Replies without keys, signatures or ciphertexts, in which even a short word cannot stand by chance."""


def exception_names() -> set[str]:
    """Names of all exceptions that are loaded: Python's, ours and those of libraries."""
    found, todo = set(), [BaseException]
    while todo:
        kind = todo.pop()
        if kind.__name__ not in found:
            found.add(kind.__name__)
            todo += kind.__subclasses__()
    return found


@dataclass
class Border:
    """An institution behind its ClientApp; everything that leaves is looked through.

    patches: by which a test breaks what cannot be broken from outside. left: all that left, in order.
    """

    root: Path
    start: Adapter
    base: str
    patches: pytest.MonkeyPatch
    policy: dict[str, Any] = field(default_factory=dict)
    records: int = 30
    left: list[Departed] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.place = Guarded(
            self.root / f"{MARK}-site",
            self.base,
            self.records,
            marker=MARK,
            folder=f"{MARK}-department",
            files=(f"{MARK}-set",),
            **self.policy,
        )
        train = replace(self.place.config.train, passes_per_round=0.3)
        self.place.config = replace(self.place.config, train=train)
        self.member = self.place.institution()
        self.open: Callable[[Context], AbstractContextManager[Institution]] = lambda _: nullcontext(self.member)
        self.heard: Callable[[str, Request], None] = lambda *_: None
        self.attempt = Attempt(self.place, self.start, self.ask)
        self._app = build_client_app(lambda context: self.open(context), lambda *found: self.heard(*found))

    # --- Asking ---------------------------------------------------------------------------------------------------

    def deliver(self, content: RecordDict, kind: str) -> Reply:
        """What comes back of a message with this content and of this type."""
        message = Message(content, dst_node_id=NODE, message_type=kind, ttl=600.0)
        return self.hand_over(message)

    def hand_over(self, message: Message) -> Reply:
        message.metadata.__dict__["_message_id"] = "message-1"
        context = Context(run_id=5, node_id=NODE, node_config={}, state=RecordDict(), run_config={})
        departed = Departed.of(self._app(message, context))
        self.left.append(departed)
        self.look_through(departed, message)
        reply = from_wire(departed.wire)
        assert isinstance(reply, Reply)
        return reply

    def ask(self, request: Request) -> Reply:
        return self.deliver(to_records(to_wire(request)), kind_of(request))

    def honest(self, kind: type[Request]) -> Request:
        """The next request of an honest coordinator, of that kind; what comes before it has been answered."""
        attempt = self.attempt
        steps: dict[type[Request], Callable[[], Request]] = {
            Hello: self.place.hello,
            TrainRequest: attempt.train_request,
            KeyList: attempt.key_list,
            Inbox: attempt.inbox,
            Survivors: attempt.survivors,
            Consents: attempt.consents,
            Published: lambda: self.place.published(self.start),
        }
        return steps[kind]()

    # --- Looking --------------------------------------------------------------------------------------------------

    def secrets(self) -> set[str | bytes]:
        """What must not leave in any form."""
        paths = {self.root, self.place.home.root, self.place.records, Path(self.base), Path.cwd(), Path.home()}
        found: set[str | bytes] = {
            MARK,
            "Traceback",
            "pytest-of-",
            *(str(path) for path in paths if len(str(path)) > 5),
        }
        found |= {name for name in (socket.gethostname(), getpass.getuser()) if len(name) > 5}
        found.add(self.place.keys.identity._key.private_bytes_raw())
        for chance in self.place.home.runs.glob("*/chance"):
            if chance.is_file():
                found.add(chance.read_bytes())
        return found

    def look_through(self, departed: Departed, message: Message) -> None:
        reply, wire = departed.reply, departed.wire
        assert not reply.has_error()
        about, asked = reply.metadata, message.metadata
        assert (about.run_id, about.reply_to_message_id) == (asked.run_id, asked.message_id)
        assert (about.message_type, about.group_id) == (asked.message_type, asked.group_id)
        assert set(reply.content) == {"message", "arrays"}
        assert set(reply.content["message"]) == {"kind", "text"}
        fields = json.loads(wire.text)
        assert IN_FORM[wire.kind](fields), wire.text
        assert set(wire.arrays) == ({"array"} if wire.kind in ("MaskedInput", "Contribution") else set())
        if wire.kind == "Refused":
            self._look_through_refusal(fields, wire)
        if wire.kind in SPEAKING:
            words = {word for form in (r"\w+", r"[\w.-]+") for word in re.findall(form, wire.text.lower())}
            assert not words & {word.lower() for word in (socket.gethostname(), getpass.getuser(), *exception_names())}
            assert "/" not in wire.text
        assert not contains(departed.data, *self.secrets())

    def _look_through_refusal(self, fields: dict[str, Any], wire: Wire) -> None:
        assert wire.text == json.dumps(fields)  # not a space that is not the protocol's
        assert fields["reason"] in REASONS
        assert fields["name"] in ("", ME)
        assert set(fields["parts"]) <= {*Fingerprint.PARTS, str(PROTOCOL), version("silotune")}
        speaks = {BASE_MODEL_DIFFERS, PROTOCOL_DIFFERS, VERSION_DIFFERS}
        assert bool(fields["parts"]) == (fields["reason"] in speaks)


Make = Callable[..., Border]


@pytest.fixture(scope="module")
def marked_base(base_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The base model in a directory that holds the word."""
    directory = tmp_path_factory.mktemp("models") / f"{MARK}-model"
    shutil.copytree(base_model, directory)
    return str(directory)


@pytest.fixture
def border(tmp_path: Path, marked_base: str, start: Adapter, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes a border below the test's own directory. own_base: with a base model that a test may break."""

    def make(own_base: bool = False, **changes: Any) -> Border:
        base = marked_base
        if own_base:
            base = str(tmp_path / f"{MARK}-own-model")
            shutil.copytree(marked_base, base)
        return Border(**{"root": tmp_path, "start": start, "base": base, "patches": monkeypatch, **changes})

    return make


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What one test broke must not stay in a cache."""
    yield
    fingerprint.cache_clear()
    load_tokenizer.cache_clear()


# --- What an institution refuses, kind by kind ------------------------------------------------------------------------

REQUESTS: tuple[type[Request], ...] = tuple(kind for part in get_args(Request) for kind in (get_args(part) or (part,)))
STEPS = (KeyList, Inbox, Survivors, Consents)


@dataclass(frozen=True)
class Case:
    """One way to fail. asked: the kind of request that is refused. reason: with what.

    policy: what the institution's says. prepare: done before anything is asked. damage: once the requests before this
    one were answered. change: what is sent in place of the honest request. own_base: whether a base model is broken.
    named: whether the refusal says who refuses.
    """

    told: str
    asked: type[Request]
    reason: str
    policy: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Border], Any] = lambda b: None
    damage: Callable[[Border], Any] = lambda b: None
    change: Callable[[Border, Any], Any] = lambda b, honest: honest
    own_base: bool = False
    named: bool = True
    parts: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.asked.__name__}: {self.told}"


def settings_of(message: Any, **changes: Any) -> Any:
    """A Hello or a TrainRequest with other settings."""
    if isinstance(message, TrainRequest):
        return replace(message, plan=settings_of(message.plan, **changes))
    return replace(message, settings=replace(message.settings, **changes))


def lora_of(message: Any, **changes: Any) -> Any:
    settings = message.plan.settings if isinstance(message, TrainRequest) else message.settings
    return settings_of(message, lora=replace(settings.lora, **changes))


def train_of(message: Any, **changes: Any) -> Any:
    settings = message.plan.settings if isinstance(message, TrainRequest) else message.settings
    return settings_of(message, train=replace(settings.train, **changes))


def base_of(message: Any, found: Fingerprint) -> Any:
    if isinstance(message, TrainRequest):
        return replace(message, plan=replace(message.plan, fingerprint=found))
    return replace(message, fingerprint=found)


def run_of(message: Any, run: str) -> Any:
    if isinstance(message, TrainRequest):
        return replace(message, plan=replace(message.plan, run=run))
    return replace(message, run=run)


def plan_of(request: TrainRequest, **changes: Any) -> TrainRequest:
    return replace(request, plan=replace(request.plan, **changes))


def secure_of(request: TrainRequest, **changes: Any) -> TrainRequest:
    assert request.plan.secure is not None
    return plan_of(request, secure=replace(request.plan.secure, **changes))


def allow_other_base(border: Border) -> None:
    place = border.place
    place.policy = replace(place.policy, base_models=(*place.policy.base_models, OTHER_BASE.digest()))
    border.member = place.institution()


def restart(border: Border, **policy: Any) -> None:
    border.place.policy = replace(border.place.policy, **policy)
    border.member = border.place.institution()


def moved(adapter: Adapter) -> Adapter:
    return Adapter({key: factor + np.float32(0.5) for key, factor in adapter.factors.items()})


def renamed(adapter: Adapter) -> Adapter:
    return Adapter({f"other.{key}": factor for key, factor in adapter.factors.items()})


def with_adapter(border: Border, adapter: Adapter) -> TrainRequest:
    plan = border.place.plan(border.start)
    return TrainRequest(replace(plan, adapter_digest=adapter.digest()), adapter)


def write(file: Path, content: bytes = MARK.encode()) -> None:
    """A file of the owner's alone; directories above it are made."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    file.write_bytes(content)
    file.chmod(0o600)


def in_the_way(directory: Path) -> None:
    """A file where a directory is expected."""
    shutil.rmtree(directory, ignore_errors=True)
    write(directory)


def a_directory(file: Path) -> None:
    """A directory where a file is expected."""
    file.unlink(missing_ok=True)
    (file / MARK).mkdir(parents=True)


def seen_by_others(border: Border) -> None:
    border.place.control.pause()
    (border.place.home.control / "paused.json").chmod(0o644)


def first_of(found: Iterable[str]) -> str:
    return next(name for name in found if name != ME)


def of_nobody(border: Border) -> None:
    """The institution begins anew, with records of which nobody knows whose they are."""
    border.place.forget_persons()
    border.member = border.place.institution()


def by_policy(asked: type[Request]) -> list[Case]:
    """What the policy refuses of a run at Hello, and of every round of it."""
    return [
        Case("in the clear", asked, reasons.SECURE_AGGREGATION_REQUIRED, change=lambda b, r: clear(r)),
        Case(
            "a base model that is not allowed",
            asked,
            policy_reasons.BASE_MODEL_NOT_ALLOWED,
            change=lambda b, r: base_of(r, OTHER_BASE),
        ),
        Case("a method", asked, policy_reasons.METHOD_NOT_ALLOWED, {"methods": ("ffa",)}),
        Case("a rank", asked, policy_reasons.RANK_TOO_LARGE, change=lambda b, r: lora_of(r, rank=10**6)),
        Case("passes", asked, policy_reasons.PASSES_TOO_MANY, change=lambda b, r: train_of(r, passes_per_round=1e6)),
        Case("a weight unit", asked, reasons.SETTINGS_DIFFER, {"weight_unit": 3}),
        Case(
            "a data set that is here and not allowed",
            asked,
            policy_reasons.DATA_SET_NOT_ALLOWED,
            change=lambda b, r: settings_of(r, data_set=f"{MARK}-set"),
        ),
        Case(
            "a data set that is not here and not allowed",
            asked,
            policy_reasons.DATA_SET_NOT_ALLOWED,
            change=lambda b, r: settings_of(r, data_set=f"{MARK}-other"),
        ),
        Case(
            "a data set that is allowed and has no file",
            asked,
            policy_reasons.DATA_SET_UNKNOWN,
            {"data_sets": ("notes", "letters")},
            change=lambda b, r: settings_of(r, data_set="letters"),
        ),
        Case(
            "differential privacy that it needs and is not offered",
            asked,
            policy_reasons.PRIVACY_REQUIRED,
            {"populations": {f"{MARK}-people": Budget(("notes",), ("record",), 1.0, 1e-5)}},
        ),
        Case(
            "patients' privacy on records of nobody",
            asked,
            policy_reasons.PERSONS_UNKNOWN,
            prepare=of_nobody,
            change=lambda b, r: settings_of(r, privacy=PrivacyConfig("patient", noise_multiplier=1.0)),
        ),
        Case("nobody approved it", asked, policy_reasons.NOT_APPROVED, {"approval": "manual"}),
        Case("a pause", asked, policy_reasons.PAUSED, damage=lambda b: b.place.control.pause()),
        Case(
            "a run name that leads elsewhere",
            asked,
            MALFORMED,
            change=lambda b, r: run_of(r, "run+1"),
        ),
        Case(
            "nobody knows whether it pauses",
            asked,
            STORAGE_FAILED,
            damage=lambda b: write(b.place.home.control / "paused.json"),
        ),
        Case(
            "a list of approvals in pieces",
            asked,
            STORAGE_FAILED,
            {"approval": "manual"},
            damage=lambda b: write(b.place.home.control / "approved.json"),
        ),
        Case(
            "what people said can be read by others",
            asked,
            NOT_CONFIGURED,
            damage=seen_by_others,
        ),
        Case(
            "a file where what waits is to be kept",
            asked,
            NOT_CONFIGURED,
            {"approval": "manual"},
            damage=lambda b: in_the_way(b.place.home.control),
        ),
        Case("no base model", asked, MODEL_UNUSABLE, damage=broken(shutil.rmtree), own_base=True),
        Case(
            "a base model whose settings are in pieces",
            asked,
            MODEL_UNUSABLE,
            damage=broken(lambda base: write(base / "config.json", b"{" + MARK.encode())),
            own_base=True,
        ),
        Case(
            "a base model whose settings are too deep",
            asked,
            MODEL_UNUSABLE,
            damage=broken(lambda base: write(base / "config.json", b"[" * 100_000)),
            own_base=True,
        ),
        Case(
            "a base model whose weights are in pieces",
            asked,
            MODEL_UNUSABLE,
            damage=broken(lambda base: write(base / "model.safetensors")),
            own_base=True,
        ),
        Case(
            "a base model without weights",
            asked,
            MODEL_UNUSABLE,
            damage=broken(lambda base: (base / "model.safetensors").unlink()),
            own_base=True,
        ),
        Case(
            "a base model whose tokenizer cannot be read",
            asked,
            MODEL_UNUSABLE,
            damage=broken(lambda base: unreadable(base / "tokenizer.json")),
            own_base=True,
        ),
        Case(
            "another tokenizer",
            asked,
            BASE_MODEL_DIFFERS,
            damage=broken(lambda base: write(base / "tokenizer.json")),
            own_base=True,
            parts=("tokenizer",),
        ),
        Case(
            "another base model that is allowed",
            asked,
            BASE_MODEL_DIFFERS,
            prepare=allow_other_base,
            change=lambda b, r: base_of(r, OTHER_BASE),
            parts=Fingerprint.PARTS,
        ),
    ]


def broken(damage: Callable[[Path], Any]) -> Callable[[Border], None]:
    """Damages the base model before a process that has just started looks at it."""

    def change(border: Border) -> None:
        fingerprint.cache_clear()
        load_tokenizer.cache_clear()
        institution_module._shared_model.cache_clear()
        damage(Path(border.base))

    return change


def clear(message: Any) -> Any:
    return replace(message, roster="") if isinstance(message, Hello) else plan_of(message, secure=None)


def anywhere(asked: type[Request]) -> list[Case]:
    """What can go wrong with any message."""
    return [
        Case("a run that was left", asked, policy_reasons.LEFT, damage=lambda b: b.place.control.leave(RUN)),
        Case(
            "nobody knows what was left",
            asked,
            STORAGE_FAILED,
            damage=lambda b: write(b.place.home.control / "left.json"),
        ),
        Case(
            "what was left is too deep",
            asked,
            STORAGE_FAILED,
            damage=lambda b: write(b.place.home.control / "left.json", b"[" * 100_000),
        ),
    ]


def unreadable(file: Path) -> None:
    """A file that not even root can read: every read of it fails."""
    file.unlink()
    file.symlink_to("/proc/self/mem")


def a_loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


def bad_line(line: bytes) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        with file.open("ab") as handle:
            handle.write(line + b"\n")

    return damage


def of_one_person(file: Path) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "person": MARK}) + "\n" for row in rows))


RECORDS: dict[str, Callable[[Path], Any]] = {
    "missing": lambda file: file.unlink(),
    "with its whole directory": lambda file: shutil.rmtree(file.parent),
    "empty": lambda file: file.write_bytes(b""),
    "blank": lambda file: file.write_bytes(b"\n" * 17),
    "one record": lambda file: file.write_bytes(file.read_bytes().splitlines(keepends=True)[0]),
    "three records": lambda file: file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:3])),
    "of one person": of_one_person,
    "no JSON": bad_line(b'{"completion": "' + MARK.encode()),
    "too deep": bad_line(b"[" * 100_000),
    "no object": bad_line(json.dumps([MARK]).encode()),
    "no text": bad_line(json.dumps({"prompt": MARK, "person": MARK}).encode()),
    "no person": bad_line(json.dumps({"prompt": MARK, "completion": MARK, "person": [MARK]}).encode()),
    "a number too long": bad_line(b'{"completion": ' + b"9" * 5000 + b"}"),
    "not UTF-8": bad_line(b"\xff\xfe" + MARK.encode()),
    "a directory": a_directory,
    "a loop": a_loop,
    "unreadable": unreadable,
}
"""What can be wrong with a file of records; nobody outside may tell one from another."""


def while_it_is_read(border: Border) -> None:
    """The file changes between the first look at it and the last."""
    read, file = read_table, border.place.records

    def slowly(path: Path) -> Any:
        table = read(path)
        with file.open("a") as handle:
            handle.write("\n")
        return table

    border.patches.setattr(data_sets_module, "read_table", slowly)


def full_disk(border: Border) -> None:
    """From now on nothing can be synced; the system's own text names a path."""

    def full(_: int) -> None:
        raise OSError(28, f"No space left on {MARK}", str(border.place.home.root))

    border.patches.setattr(os, "fsync", full)


def private(request: TrainRequest) -> TrainRequest:
    """The same round under differential privacy."""
    privacy = PrivacyConfig(mode="record", noise_multiplier=1.0, sampling_rate=0.5)
    changed = settings_of(request, privacy=privacy, evaluate=False, weighting="uniform")
    assert isinstance(changed, TrainRequest)
    return replace(changed, plan=fitting(changed.plan))


def little(epsilon: float) -> dict[str, Any]:
    """A policy with that budget."""
    return {"populations": {f"{MARK}-people": Budget(("notes",), ("record",), epsilon, 1e-5)}, "metrics": ()}


def to_records_file(damage: Callable[[Path], Any]) -> Callable[[Border], Any]:
    return lambda border: damage(border.place.records)


IN_TRAINING = [
    *(
        Case(f"records: {told}", TrainRequest, DATA_UNREADABLE, damage=to_records_file(damage))
        for told, damage in RECORDS.items()
    ),
    Case("records: change while they are read", TrainRequest, DATA_UNREADABLE, damage=while_it_is_read),
    Case("not invited", TrainRequest, NOT_INVITED, change=lambda b, r: plan_of(r, cohort=tuple(OTHERS))),
    Case(
        "another adapter than the plan's",
        TrainRequest,
        ADAPTER_DIGEST_DIFFERS,
        change=lambda b, r: replace(r, adapter=moved(r.adapter)),
    ),
    Case(
        "an adapter of another form",
        TrainRequest,
        ADAPTER_DOES_NOT_FIT,
        change=lambda b, r: with_adapter(b, renamed(b.start)),
    ),
    Case("no adapter", TrainRequest, ADAPTER_DOES_NOT_FIT, change=lambda b, r: with_adapter(b, Adapter({}))),
    Case(
        "layers that the model has not",
        TrainRequest,
        MALFORMED,
        change=lambda b, r: lora_of(r, target_modules=["no_such_layer"]),
    ),
    Case(
        "a cohort that no sum can hold",
        TrainRequest,
        MALFORMED,
        {"secure_aggregation": SecureTerms(required=False)},
        change=lambda b, r: plan_of(r, secure=None, cohort=(ME, *(f"member-{n:04}" for n in range(5000)))),
    ),
    Case(
        "dropout under differential privacy",
        TrainRequest,
        MALFORMED,
        little(1000.0),
        change=lambda b, r: private(lora_of(r, dropout=0.5)),
    ),
    Case("an unknown method", TrainRequest, METHOD_UNKNOWN, change=lambda b, r: settings_of(r, method="flora")),
    Case("a round too many", TrainRequest, MALFORMED, change=lambda b, r: plan_of(r, round=4)),
    Case("another roster", TrainRequest, reasons.ROSTER_DIFFERS, change=lambda b, r: secure_of(r, roster=NOBODY)),
    Case(
        "a cohort with a stranger",
        TrainRequest,
        reasons.COHORT_UNKNOWN,
        change=lambda b, r: plan_of(r, cohort=(*NAMES, "mallory")),
    ),
    Case(
        "a cohort below its own least",
        TrainRequest,
        reasons.COHORT_TOO_SMALL,
        change=lambda b, r: plan_of(r, cohort=(ME, OTHERS[0])),
    ),
    Case(
        "other terms than its own",
        TrainRequest,
        reasons.TERMS_DIFFER,
        prepare=lambda b: restart(b, secure_aggregation=SecureTerms(colluders=2, smallest_cohort=3)),
    ),
    Case("another length", TrainRequest, reasons.VECTOR_DIFFERS, change=lambda b, r: plan_of(r, parameters=7)),
    Case(
        "the same plan again",
        TrainRequest,
        reasons.ATTEMPT_OLD,
        prepare=lambda b: b.ask(b.attempt.train_request()),
    ),
    Case(
        "the day's rounds are over",
        TrainRequest,
        policy_reasons.ROUNDS_PER_DAY_EXCEEDED,
        {"rounds_per_day": 0},
    ),
    Case(
        "a book of rounds in pieces",
        TrainRequest,
        STORAGE_FAILED,
        damage=lambda b: write(b.place.book),
    ),
    Case(
        "a directory in place of the book",
        TrainRequest,
        STORAGE_FAILED,
        damage=lambda b: a_directory(b.place.book),
        prepare=lambda b: b.place.keep_the_day(),
    ),
    Case("marks in pieces", TrainRequest, STORAGE_FAILED, damage=lambda b: write(b.place.marks)),
    Case(
        "marks that are too deep", TrainRequest, STORAGE_FAILED, damage=lambda b: write(b.place.marks, b"[" * 100_000)
    ),
    Case(
        "a directory in place of the marks", TrainRequest, STORAGE_FAILED, damage=lambda b: a_directory(b.place.marks)
    ),
    Case("a file in place of the run", TrainRequest, STORAGE_FAILED, damage=lambda b: write(b.place.home.runs / RUN)),
    Case("a file in place of all runs", TrainRequest, STORAGE_FAILED, damage=lambda b: write(b.place.home.runs)),
    Case(
        "a state in pieces",
        TrainRequest,
        STORAGE_FAILED,
        damage=lambda b: write(b.place.home.runs / RUN / "state" / "round-00000.safetensors"),
    ),
    Case(
        "a file in place of the states",
        TrainRequest,
        STORAGE_FAILED,
        damage=lambda b: write(b.place.home.runs / RUN / "state"),
    ),
    Case(
        "a directory in place of its metrics",
        TrainRequest,
        STORAGE_FAILED,
        damage=lambda b: a_directory(b.place.home.runs / RUN / "metrics.jsonl"),
    ),
    Case(
        "a run that began with other settings",
        TrainRequest,
        reasons.SETTINGS_DIFFER,
        damage=lambda b: write(b.place.home.runs / RUN / "settings.json", b"{}"),
    ),
    Case(
        "its own chance in pieces",
        TrainRequest,
        INTERNAL_ERROR,
        damage=lambda b: write(b.place.home.runs / RUN / "chance", b"\xff\xfe"),
    ),
    Case("a full disk", TrainRequest, STORAGE_FAILED, damage=full_disk),
    Case(
        "a budget that is spent",
        TrainRequest,
        policy_reasons.BUDGET_EXHAUSTED,
        little(0.01),
        change=lambda b, r: private(r),
    ),
    Case(
        "a ledger in pieces",
        TrainRequest,
        STORAGE_FAILED,
        little(1000.0),
        damage=lambda b: in_the_way(b.place.home.ledger),
        change=lambda b, r: private(r),
    ),
    Case(
        "a base model that is gone since it was fingerprinted",
        TrainRequest,
        MODEL_UNUSABLE,
        prepare=lambda b: institution_module._shared_model.cache_clear(),
        damage=lambda b: shutil.rmtree(b.base),
        own_base=True,
    ),
]


def without_me(listed: KeyList) -> KeyList:
    return replace(listed, keys={name: found for name, found in listed.keys.items() if name != ME})


def swapped(listed: KeyList) -> KeyList:
    one, other = OTHERS
    return replace(listed, keys={**listed.keys, one: listed.keys[other], other: listed.keys[one]})


def alone(listed: KeyList) -> KeyList:
    return replace(listed, keys={ME: listed.keys[ME]})


def false_sealed(box: Inbox) -> Inbox:
    sender = first_of(box.sealed)
    return replace(box, sealed={**box.sealed, sender: replace(box.sealed[sender], signature=bytes(64))})


def closed_sealed(border: Border, box: Inbox) -> Inbox:
    """A member seals rubbish, and signs it."""
    sender, attempt = first_of(box.sealed), border.attempt.plan.attempt
    listed = key_list_digest(attempt, border.attempt.listed.keys)
    honest = box.sealed[sender]
    said = attempt.sealed_statement(listed, sender, ME, bytes(1268), honest.pair)
    rubbish = Sealed(bytes(1268), honest.pair, border.place.identities[sender].sign(said))
    return replace(box, sealed={**box.sealed, sender: rubbish})


def consented_otherwise(border: Border) -> None:
    """The marks say that it consented to another set."""
    marks = json.loads(border.place.marks.read_text())
    for one in marks["sums"].values():
        one["survivors"] = [ME, MARK]
    border.place.marks.write_text(json.dumps(marks))


def another_vector(border: Border) -> None:
    secure = border.member.secure
    assert secure is not None
    assert secure._session is not None
    secure._session.vector = np.zeros(11, np.uint32)


def exhausted(border: Border) -> None:
    """Memory ends in the middle of a phase."""
    secure = border.member.secure
    assert secure is not None
    assert secure._session is not None

    def never(*_: Any) -> Any:
        raise MemoryError(f"{MARK} in {border.place.records}")

    for name in ("on_key_list", "on_inbox", "on_survivors", "on_consents"):
        border.patches.setattr(secure._session.participant, name, never)


def in_an_attempt(asked: type[Any]) -> list[Case]:
    """What every later message of an attempt can meet."""
    wrong = {KeyList: Inbox, Inbox: KeyList, Survivors: Consents, Consents: Survivors}[asked]
    early: dict[type[Any], Any] = {
        KeyList: lambda b: KeyList(b.attempt.plan.digest(), {}),
        Inbox: lambda b: Inbox(b.attempt.plan.digest(), {}),
        Survivors: lambda b: Survivors(b.attempt.plan.digest(), NAMES),
        Consents: lambda b: Consents(b.attempt.plan.digest(), {}),
    }
    return [
        Case("of another plan", asked, reasons.ATTEMPT_UNKNOWN, change=lambda b, r: replace(r, plan=NOBODY)),
        Case(
            "after a restart",
            asked,
            reasons.ATTEMPT_UNKNOWN,
            damage=restart,
        ),
        Case(
            "another message in its turn",
            wrong,
            reasons.PHASE_WRONG,
            # The honest request of `wrong` is made and not sent; one of `asked` is, out of turn.
            change=lambda b, r: early[asked](b),
        ),
        Case(
            "again after a refusal",
            asked,
            reasons.ATTEMPT_OVER,
            damage=lambda b: b.ask(early[wrong](b)),
        ),
        Case("the end of memory", asked, INTERNAL_ERROR, damage=exhausted),
        Case(
            "without a part in secure aggregation",
            asked,
            reasons.ATTEMPT_UNKNOWN,
            damage=lambda b: setattr(b, "member", replace(b.member, secure=None)),
        ),
    ]


IN_ATTEMPTS = [
    *(case for asked in STEPS for case in in_an_attempt(asked)),
    Case("keys without its own", KeyList, reasons.TOO_FEW_LEFT, change=lambda b, r: without_me(r)),
    Case("keys of others swapped", KeyList, reasons.KEYS_UNVERIFIED, change=lambda b, r: swapped(r)),
    Case("its own keys alone", KeyList, reasons.TOO_FEW_LEFT, change=lambda b, r: alone(r)),
    Case("a false signature", Inbox, reasons.SHARES_UNVERIFIED, change=lambda b, r: false_sealed(r)),
    Case("nothing that opens", Inbox, reasons.SHARES_UNREADABLE, change=closed_sealed),
    Case("nobody's shares", Inbox, reasons.TOO_FEW_LEFT, change=lambda b, r: replace(r, sealed={})),
    Case("a vector of another length", Inbox, reasons.VECTOR_DIFFERS, damage=another_vector),
    Case("a stranger", Survivors, reasons.SURVIVORS_UNKNOWN, change=lambda b, r: replace(r, names=(ME, "mallory"))),
    Case("itself alone", Survivors, reasons.TOO_FEW_LEFT, change=lambda b, r: replace(r, names=(ME,))),
    Case("a second set", Survivors, reasons.SURVIVORS_DIFFER, damage=consented_otherwise),
    Case("marks in pieces", Survivors, STORAGE_FAILED, damage=lambda b: write(b.place.marks)),
    Case("marks that are gone", Survivors, STORAGE_FAILED, damage=lambda b: b.place.marks.unlink()),
    Case("a full disk", Survivors, STORAGE_FAILED, damage=full_disk),
    Case("no signatures", Consents, reasons.SIGNATURES_UNVERIFIED, change=lambda b, r: replace(r, signatures={})),
    Case(
        "a false signature",
        Consents,
        reasons.SIGNATURES_UNVERIFIED,
        change=lambda b, r: replace(r, signatures={**r.signatures, OTHERS[0]: bytes(64)}),
    ),
    Case(
        "the same again",
        Consents,
        reasons.ATTEMPT_OVER,
        change=lambda b, r: (b.ask(r), r)[1],
    ),
]


def published(**changes: Any) -> Callable[[Border, Any], Published]:
    return lambda b, r: b.place.published(b.start, **changes)


AT_THE_END = [
    Case(
        "unsigned",
        Published,
        SIGNATURE_DIFFERS,
        change=lambda b, r: replace(r, publication=replace(r.publication, signature=b"")),
    ),
    Case(
        "signed by another",
        Published,
        SIGNATURE_DIFFERS,
        change=lambda b, r: b.place.published(b.start, Identity.generate("coordinator")),
    ),
    Case(
        "another adapter", Published, ADAPTER_DIGEST_DIFFERS, change=lambda b, r: replace(r, adapter=moved(r.adapter))
    ),
    Case(
        "a second adapter of the run",
        Published,
        ADAPTER_DIGEST_DIFFERS,
        prepare=lambda b: b.ask(b.place.published(moved(b.start))),
    ),
    Case(
        "of a base model that is not allowed",
        Published,
        policy_reasons.BASE_MODEL_NOT_ALLOWED,
        change=published(fingerprint=OTHER_BASE),
    ),
    Case(
        "of another base model that is allowed",
        Published,
        BASE_MODEL_DIFFERS,
        prepare=allow_other_base,
        change=published(fingerprint=OTHER_BASE),
        parts=Fingerprint.PARTS,
    ),
    Case("of too large a rank", Published, policy_reasons.RANK_TOO_LARGE, change=published(lora=LoraConfig(rank=999))),
    Case("of another rank", Published, ADAPTER_DOES_NOT_FIT, change=published(lora=LoraConfig(rank=8))),
    Case(
        "of layers that the model has not",
        Published,
        MALFORMED,
        change=published(lora=LoraConfig(rank=4, target_modules=["no_such_layer"])),
    ),
    Case("of a run that leads elsewhere", Published, MALFORMED, change=published(run="run+1")),
    Case("no shelf", Published, MALFORMED, damage=lambda b: setattr(b, "member", replace(b.member, shelf=None))),
    Case(
        "a file in place of all adapters", Published, NOT_CONFIGURED, damage=lambda b: in_the_way(b.place.home.adapters)
    ),
    Case(
        "adapters that others can see",
        Published,
        NOT_CONFIGURED,
        damage=lambda b: b.place.home.adapters.mkdir(mode=0o755),
    ),
    Case("a full disk", Published, STORAGE_FAILED, damage=full_disk),
    Case(
        "no base model",
        Published,
        MODEL_UNUSABLE,
        damage=broken(shutil.rmtree),
        own_base=True,
    ),
]

AT_HELLO = [
    Case(
        "another roster, whoever approved it",
        Hello,
        reasons.ROSTER_DIFFERS,
        {"approval": "manual"},
        change=lambda b, r: replace(r, roster=NOBODY),
    ),
    Case(
        "a roster, without a part in secure aggregation",
        Hello,
        reasons.ROSTER_DIFFERS,
        damage=lambda b: setattr(b, "member", replace(b.member, secure=None)),
    ),
    Case(
        "another protocol",
        Hello,
        PROTOCOL_DIFFERS,
        change=lambda b, r: replace(r, protocol=PROTOCOL + 1),
        named=False,
        parts=(str(PROTOCOL),),
    ),
    Case(
        "another release",
        Hello,
        VERSION_DIFFERS,
        change=lambda b, r: replace(r, version=f"9.{MARK}"),
        parts=(version("silotune"),),
    ),
    Case("a full disk", Hello, STORAGE_FAILED, {"approval": "manual"}, damage=full_disk),
]

CASES = [
    *AT_HELLO,
    *(case for asked in (Hello, TrainRequest) for case in by_policy(asked)),
    *(case for asked in REQUESTS for case in anywhere(asked)),
    *IN_TRAINING,
    *IN_ATTEMPTS,
    *AT_THE_END,
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_refusal_is_a_reason_code_and_nothing_else(case: Case, border: Make) -> None:
    made = border(own_base=case.own_base, policy=case.policy)
    case.prepare(made)
    honest = made.honest(case.asked)
    assert all(departed.wire.kind != "Refused" for departed in made.left)
    case.damage(made)
    reply = made.ask(case.change(made, honest))
    assert reply == Refused(case.reason, ME if case.named else "", case.parts)


def test_every_reason_code_has_a_case() -> None:
    """Whoever adds one adds a case here, in which it really leaves."""
    assert {case.reason for case in CASES} == REASONS - OF_THE_NODE - OF_THE_COORDINATOR


def test_every_kind_of_request_and_every_type_of_message_has_cases() -> None:
    assert {case.asked for case in CASES} == set(REQUESTS)
    assert sorted(kind.__name__ for kind in REQUESTS) == [
        "Consents",
        "Hello",
        "Inbox",
        "KeyList",
        "Published",
        "Survivors",
        "TrainRequest",
    ]
    # Whatever is no kind of its own travels as secure aggregation, so this is all of them.
    examples: list[Any] = [kind.__new__(kind) for kind in REQUESTS]
    assert {kind_of(example) for example in examples} == MESSAGES


def test_every_kind_of_reply_has_a_form() -> None:
    kinds = {kind.__name__ for part in get_args(Reply) for kind in (get_args(part) or (part,))}
    assert set(IN_FORM) == kinds


# --- Content that is none ---------------------------------------------------------------------------------------------

CONTENT: dict[str, Callable[[Wire], Any]] = {
    "nothing": lambda wire: RecordDict(),
    "an unknown kind": lambda wire: to_records(replace(wire, kind=MARK)),
    "a kind that is a reply": lambda wire: to_records(to_wire(Refused(MALFORMED, ME))),
    "no text": lambda wire: to_records(replace(wire, text="")),
    "no JSON": lambda wire: to_records(replace(wire, text="{" + MARK)),
    "deep JSON": lambda wire: to_records(replace(wire, text="[" * 100_000)),
    "deep JSON that is whole": lambda wire: to_records(replace(wire, text='{"a":' * 50_000 + "1" + "}" * 50_000)),
    "a list": lambda wire: to_records(replace(wire, text=json.dumps([MARK]))),
    "a number": lambda wire: to_records(replace(wire, text="9" * 4000)),
    "a number too long": lambda wire: to_records(replace(wire, text="9" * 5000)),
    "surrogates": lambda wire: to_records(replace(wire, text='{"plan": "\\ud800"}')),
    "no fields": lambda wire: to_records(replace(wire, text="{}")),
    "a field too many": lambda wire: to_records(replace(wire, text=json.dumps({**json.loads(wire.text), MARK: MARK}))),
    "fields of null": lambda wire: to_records(replace(wire, text=json.dumps(dict.fromkeys(json.loads(wire.text))))),
    "fields of other types": lambda wire: to_records(
        replace(wire, text=json.dumps({name: [{MARK: 1e309}] for name in json.loads(wire.text)}))
    ),
    "records of other types": lambda wire: RecordDict(
        {"message": ConfigRecord({"kind": 7, "text": b"\xff"}), "arrays": ArrayRecord()}
    ),
    "an array that is a pickle": lambda wire: RecordDict(
        {
            "message": ConfigRecord({"kind": wire.kind, "text": wire.text}),
            "arrays": ArrayRecord({"array": Array("float32", (3,), "pickle", MARK.encode())}),
        }
    ),
    "an array in pieces": lambda wire: RecordDict(
        {
            "message": ConfigRecord({"kind": wire.kind, "text": wire.text}),
            "arrays": ArrayRecord({"array": Array("float32", (3,), "numpy.ndarray", b"\x93NUMPY" + MARK.encode())}),
        }
    ),
    "an array of a size that fits no memory": lambda wire: RecordDict(
        {
            "message": ConfigRecord({"kind": wire.kind, "text": wire.text}),
            "arrays": ArrayRecord({"array": Array("float32", (10**12,), "numpy.ndarray", too_large())}),
        }
    ),
}


def too_large() -> bytes:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize("asked", REQUESTS, ids=lambda kind: kind.__name__)
def test_content_that_cannot_be_read_is_malformed_whatever_it_was_meant_to_be(
    asked: type[Request], border: Make
) -> None:
    made = border()
    examples: dict[type[Any], Any] = {
        KeyList: KeyList(NOBODY, {}),
        Inbox: Inbox(NOBODY, {}),
        Survivors: Survivors(NOBODY, NAMES),
        Consents: Consents(NOBODY, {}),
    }
    request = examples[asked] if asked in examples else made.honest(asked)
    wire = to_wire(request)
    sizes = set()
    for told, change in CONTENT.items():
        content = change(wire)
        kind = kind_of(request)
        assert made.deliver(content, kind) == Refused(MALFORMED), told
        sizes.add(len(made.left[-1].data))
    assert len(sizes) == 1
    # Without an array where there should be one.
    if wire.arrays:
        assert made.deliver(to_records(replace(wire, arrays={})), kind_of(request)) == Refused(MALFORMED)


@pytest.mark.parametrize("kind", sorted(MESSAGES))
def test_an_error_in_place_of_content_is_a_reason_code(kind: str, border: Make) -> None:
    made = border()
    message = Message(RecordDict(), dst_node_id=NODE, message_type=kind, ttl=600.0)
    message.__dict__.update(_content=None, _error=Error(code=0, reason=MARK))
    assert made.hand_over(message) == Refused(INTERNAL_ERROR)


@pytest.mark.parametrize("kind", sorted(MESSAGES))
def test_a_message_of_another_type_than_its_content_tells_nothing_more(kind: str, border: Make) -> None:
    made = border()
    assert isinstance(made.deliver(to_records(to_wire(made.place.hello())), kind), Introduction)
    late = to_records(to_wire(Survivors(NOBODY, NAMES)))
    assert made.deliver(late, kind) == Refused(reasons.ATTEMPT_UNKNOWN, ME)


# --- Mistakes of ours, and of libraries -------------------------------------------------------------------------------


class Panic(BaseException):
    """As pyo3's, which a library in Rust raises: no Exception."""


class Twisted(Exception):
    """Cannot even be shown."""

    def __str__(self) -> str:
        raise RuntimeError(MARK)


def chained() -> Exception:
    try:
        try:
            raise KeyError(MARK)
        except KeyError as error:
            raise ValueError(f"of patient {MARK}") from error
    except ValueError as error:
        error.add_note(MARK)
        return error


ERRORS: list[tuple[BaseException, str]] = [
    (RuntimeError(MARK), INTERNAL_ERROR),
    (KeyError(MARK), INTERNAL_ERROR),
    (AssertionError(MARK), INTERNAL_ERROR),
    (UnicodeDecodeError("utf-8", MARK.encode(), 0, 1, MARK), INTERNAL_ERROR),
    (StopIteration(MARK), INTERNAL_ERROR),
    (RecursionError(MARK), INTERNAL_ERROR),
    (MemoryError(MARK), INTERNAL_ERROR),
    (GeneratorExit(MARK), INTERNAL_ERROR),
    (ExceptionGroup(MARK, [ValueError(MARK)]), INTERNAL_ERROR),
    (Panic(MARK), INTERNAL_ERROR),
    (chained(), INTERNAL_ERROR),
    (StorageError(MARK), STORAGE_FAILED),
    (ConfigError(MARK), NOT_CONFIGURED),
    (ModelError(MARK), MODEL_UNUSABLE),
    (DataError(MARK), DATA_UNREADABLE),
    (OSError(5, MARK, f"/srv/{MARK}"), STORAGE_FAILED),
    (FileNotFoundError(2, "No such file", f"/srv/{MARK}"), STORAGE_FAILED),
    (Refusal(DATA_UNREADABLE, MARK), DATA_UNREADABLE),
    # Refusals in words of no protocol: a text in the place of the code, or beside it.
    (Refusal(f"cannot read /srv/{MARK}"), INTERNAL_ERROR),
    (Refusal("", MARK), INTERNAL_ERROR),
    (Refusal(DATA_UNREADABLE, MARK, (MARK,)), INTERNAL_ERROR),
    (Refusal(BASE_MODEL_DIFFERS, MARK, ("weights", f"/srv/{MARK}")), INTERNAL_ERROR),
    (Refusal(DATA_UNREADABLE, MARK, ("241 records",)), INTERNAL_ERROR),
]


@dataclass
class Failing:
    """A source of records, a shelf, an egress log or a home that raises."""

    error: BaseException

    def find(self, data_set: str, part: str) -> Any:
        raise self.error

    def __call__(self, *_: Any) -> Any:
        raise self.error


def test_an_exception_in_reading_or_keeping_is_a_reason_code(border: Make) -> None:
    made = border()
    for number, (error, reason) in enumerate(ERRORS, 1):
        made.member = replace(made.member, data=Failing(error), shelf=Failing(error))
        assert made.ask(made.place.request(made.start, attempt=number)) == Refused(reason, ME), repr(error)
        assert made.ask(made.honest(Published)) == Refused(reason, ME), repr(error)
    by_reason: dict[str, set[int]] = {}
    for departed in made.left:
        by_reason.setdefault(json.loads(departed.wire.text)["reason"], set()).add(len(departed.data))
    assert all(len(sizes) <= 2 for sizes in by_reason.values())  # one for each type of message


@pytest.mark.parametrize("asked", [Hello, TrainRequest, Survivors, Published], ids=lambda kind: kind.__name__)
def test_an_exception_around_the_institution_is_a_reason_code(asked: type[Request], border: Make) -> None:
    """Where nobody can say yet what the cause is, all but a refusal are one."""
    made = border()
    request = Survivors(NOBODY, NAMES) if asked is Survivors else made.honest(asked)
    for error, reason in ERRORS:
        expected = Refused(reason if isinstance(error, Refusal) else INTERNAL_ERROR)
        made.heard, made.open = Failing(error), lambda _: nullcontext(made.member)
        assert made.ask(request) == expected, repr(error)
        made.heard, made.open = lambda *_: None, Failing(error)
        assert made.ask(request) == expected, repr(error)


def test_an_exception_that_cannot_be_shown_is_a_reason_code(border: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)  # as in the daemon; pytest's own handler would raise
    made = border()
    made.member = replace(made.member, data=Failing(Twisted()))
    assert made.ask(made.honest(TrainRequest)) == Refused(INTERNAL_ERROR, ME)


# --- One cause cannot be told from another ----------------------------------------------------------------------------


def test_what_is_wrong_with_records_cannot_be_told_from_outside(border: Make, tmp_path: Path) -> None:
    """Equal to the last byte but for the times and names of messages; all have the same size.

    What is no matter of records (a full disk, a mistake of ours) has another code of another length: that much a
    coordinator learns, and needs, to know whom to ask.
    """
    told: set[tuple[str, str]] = set()
    sizes: set[int] = set()
    for number, damage in enumerate([*RECORDS.values(), None]):
        made = border(root=tmp_path / str(number), records=30 + 7 * number)
        if damage is None:
            made.member = replace(made.member, data=Failing(DataError(f"{MARK} " * 50)))
        else:
            damage(made.place.records)
        made.ask(made.honest(TrainRequest))
        told.add((made.left[-1].wire.kind, made.left[-1].wire.text))
        sizes.add(len(made.left[-1].data))
    assert told == {("Refused", json.dumps({"reason": DATA_UNREADABLE, "name": ME, "parts": []}))}
    assert len(sizes) == 1


def test_of_a_disk_that_fills_up_nobody_outside_sees_where(
    border: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every single sync on the way to the keys fails in turn: all the same to the coordinator, all told at home."""
    sync, left = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            raise OSError(28, f"No space left on {MARK}", str(tmp_path))
        sync(handle)

    departed: list[Departed] = []
    for number in range(60):
        made = border(root=tmp_path / str(number))
        left = number
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            reply = made.ask(made.honest(TrainRequest))
        if isinstance(reply, Keys):
            break
        assert reply == Refused(STORAGE_FAILED, ME)
        departed += made.left
    assert isinstance(reply, Keys)
    assert len({len(found.data) for found in departed}) == 1
    told = set(re.findall(r"cannot write \S*/([\w.-]+): ", caplog.text))
    assert told == {
        "marks.json",
        "control",
        "rounds-of-the-day.json",
        "settings.json",
        "chance",
        "round-00001.safetensors",
        "metrics.jsonl",
    }


# --- What leaves when nothing fails -----------------------------------------------------------------------------------


def shape(departed: Departed) -> tuple[Any, ...]:
    arrays = {name: (array.dtype.str, array.shape) for name, array in departed.wire.arrays.items()}
    return departed.wire.kind, lengths(json.loads(departed.wire.text)), arrays, len(departed.data)


def played(made: Border) -> tuple[list[tuple[Any, ...]], np.ndarray]:
    """A whole run: the shape of all that left, and the sum, which is this member's own vector."""
    made.ask(made.honest(Hello))
    total = made.attempt.sum()
    made.ask(made.place.published(made.start))
    return [shape(departed) for departed in made.left], total


def test_of_an_honest_run_nothing_leaves_whose_form_depends_on_data(border: Make, tmp_path: Path) -> None:
    """Two institutions, one with many times the records of the other: all that leaves has the same form and size."""
    small = border(root=tmp_path / "one", records=30)
    large = border(root=tmp_path / "two", records=240)
    one, one_sum = played(small)
    other, other_sum = played(large)
    assert [found[0] for found in one] == [
        "Introduction",
        "Keys",
        "Shares",
        "MaskedInput",
        "Consent",
        "Revealed",
        "Received",
    ]
    assert one == other
    counters = [
        fixed_point.decode(total, made.attempt.plan.layout, members=1).counters
        for made, total in ((small, one_sum), (large, other_sum))
    ]
    assert counters[0] != counters[1]  # inside the sum the two differ


def test_under_differential_privacy_nothing_leaves_whose_form_depends_on_data(border: Make, tmp_path: Path) -> None:
    shapes = []
    for records in (30, 240):
        made = border(root=tmp_path / str(records), records=records, policy=little(1000.0))
        plan = private(made.place.request(made.start)).plan
        made.attempt = Attempt(made.place, made.start, made.ask, plan)
        made.attempt.sum()
        shapes.append([shape(departed) for departed in made.left])
    assert [found[0] for found in shapes[0]] == ["Keys", "Shares", "MaskedInput", "Consent", "Revealed"]
    assert shapes[0] == shapes[1]


def test_an_update_that_is_not_finite_leaves_in_the_same_form(border: Make, tmp_path: Path) -> None:
    broken_start = Adapter({key: np.full_like(f, np.nan) for key, f in border().start.factors.items()})
    well, broken = border(root=tmp_path / "well"), border(root=tmp_path / "broken", start=broken_start)
    one, _ = played(well)
    other, total = played(broken)
    assert one == other
    found = fixed_point.decode(total, broken.attempt.plan.layout, members=1)
    assert (found.counters["void"], found.weight) == (1, 0)
    assert not found.update.any()


def test_in_the_clear_the_vector_leaves_and_nothing_beside_it(border: Make, tmp_path: Path) -> None:
    policy = {"secure_aggregation": SecureTerms(required=False)}
    shapes = []
    for records in (30, 240):
        made = border(root=tmp_path / str(records), records=records, policy=policy)
        made.ask(made.place.request(made.start, secure=False))
        shapes.append(shape(made.left[-1]))
    assert shapes[0][0] == "Contribution"
    assert shapes[0] == shapes[1]


def test_every_kind_of_reply_was_looked_through_when_nothing_fails(border: Make, tmp_path: Path) -> None:
    made = border(policy={"secure_aggregation": SecureTerms(required=False)})
    played(made)
    made.ask(made.place.request(made.start, 2, secure=False))
    made.ask(Survivors(NOBODY, NAMES))
    assert {departed.wire.kind for departed in made.left} == set(IN_FORM)


# --- What the node itself says ----------------------------------------------------------------------------------------


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
