"""An institution behind its ClientApp, of which every reply is looked through; and one way to fail of many.

A real institution with its guard, put together as its daemon does it, behind the real ClientApp. Its records, persons,
paths, data sets and the texts of its exceptions all hold one word; every reply is looked through, byte by byte, for
that word, for paths, host and user, in every form in which they might stand there.
"""

from __future__ import annotations

import getpass
import json
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.app import build_client_app
from client.institution import Institution
from common.adapter import Adapter
from common.base_model import Fingerprint, fingerprint
from common.flower import from_records, kind_of, packed, to_records
from common.messages import (
    BASE_MODEL_DIFFERS,
    BUNDLE_REFUSED,
    MESSAGE_TYPE_REFUSED,
    PROTOCOL,
    PROTOCOL_DIFFERS,
    REASONS,
    RESTARTED,
    VERSION_DIFFERS,
    Hello,
    Published,
    Refused,
    Reply,
    Request,
    TrainRequest,
)
from common.models import load_tokenizer
from common.secagg.messages import Consents, Inbox, KeyList, Survivors
from common.wire import Wire, from_wire, to_wire
from tests.client.border.searching import contains
from tests.client.conftest import NAMES
from tests.client.guarded import ME, OTHERS, Attempt, Guarded

MARK = "qzvxkj7391wq"
"""Stands in everything that must not leave."""

NODE = 77
NOBODY = "0" * 64

OF_THE_NODE = frozenset({BUNDLE_REFUSED, MESSAGE_TYPE_REFUSED, RESTARTED})
"""Said before a message reaches the ClientApp, or of one that a process before this had in hand."""

REQUESTS: tuple[type[Request], ...] = tuple(kind for part in get_args(Request) for kind in (get_args(part) or (part,)))


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


@pytest.fixture(autouse=True)
def _surroundings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's own runtime says who sends a message; outside of it a test has to."""
    if "deployment" not in request.fixturenames:
        for name, value in (("_task_id", 1), ("_run_id", 5), ("_node_id", 1)):
            monkeypatch.setattr(TaskIdentity, name, value)


@pytest.fixture(scope="session")
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


def refuses(case: Case, border: Make) -> None:
    """The case ends in its reason code and in nothing else that leaves."""
    made = border(own_base=case.own_base, policy=case.policy)
    case.prepare(made)
    honest = made.honest(case.asked)
    assert all(departed.wire.kind != "Refused" for departed in made.left)
    case.damage(made)
    reply = made.ask(case.change(made, honest))
    assert reply == Refused(case.reason, ME if case.named else "", case.parts)
