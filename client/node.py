"""The institution's connection to its coordinator: Flower's Fleet API from inside the daemon, without an executor.

It takes the place of Flower's SuperNode, which would unpack and run the bundle that a coordinator sends, pass on how
long each answer took, and end the whole process when a connection fails. Here a bundle is only ever hashed; what runs
is the `answer` that is installed. Every private name of Flower that this side needs is in this module, and
tests/client/test_node.py fails when one of them changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import random
import ssl
import threading
import time
from base64 import b64encode
from collections import OrderedDict
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Protocol, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import (
    HEARTBEAT_MAX_INTERVAL,
    HEARTBEAT_MIN_INTERVAL,
    HEARTBEAT_PATIENCE,
    TIMESTAMP_HEADER,
)
from flwr.common.serde import message_from_proto, message_to_proto, run_from_proto
from flwr.proto.fab_pb2 import GetFabRequest, GetFabResponse
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    DeactivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest, GetRunResponse
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

from common.errors import ConfigError
from common.files import write_bytes, write_json
from common.flower import HELLO, ROUND, SECURE, to_records
from common.messages import BUNDLE_REFUSED, INTERNAL_ERROR, MESSAGE_TYPE_REFUSED, RESTARTED, Refused
from common.wire import to_wire

log = logging.getLogger("silotune.client")


# What `serve` tells of. The text that comes with it is for this institution only.
CONNECTED = "connected"
UNREACHABLE = "unreachable"
UNTRUSTED = "untrusted"
NOT_ENROLLED = "not_enrolled"
NOT_ADMITTED = "not_admitted"
RECEIVED = "received"
REFUSED = "refused"
ANSWERED = "answered"
LOST = "lost"
STOPPED = "stopped"

_MESSAGES = frozenset({HELLO, ROUND, SECURE})
_FLEET = "/v1/fleet/"
_RESPONSE_BYTES = 64 * 2**20  # Flower sends arrays in chunks of 5 MB, a bundle in one piece of 10 MB at most
_WHOLE_BYTES = 2**20
_RUNS_REMEMBERED = 64
_HOPELESS_TRIES = 4


class Proto(Protocol):
    """A message of Flower's wire protocol."""

    def SerializeToString(self, *, deterministic: bool = ...) -> bytes: ...  # noqa: N802

    def ParseFromString(self, serialized: bytes) -> int: ...  # noqa: N802


R = TypeVar("R", bound=Proto)


@dataclass(frozen=True)
class Event:
    """Something that `serve` came upon. kind: one of the words above. run: Flower's number of a run, 0 for none."""

    kind: str
    text: str = ""
    run: int = 0


@dataclass(frozen=True)
class Connection:
    """Where the coordinator is and who this node is.

    address: host:port of the members' port. authority: certificates in PEM; nothing else is trusted, whatever the
    machine trusts. key: the node's P-384 key. memory: a directory for what a restart needs (see `serve`); None to keep
    nothing. heartbeat_s: how often the node shows that it is there; one that was killed without a memory is not let in
    again before twice this time has gone. proxy: URL of an HTTP proxy; the environment's are not used.
    """

    address: str
    authority: bytes = field(repr=False)
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    memory: Path | None = None
    heartbeat_s: float = 20.0
    timeout_s: float = 30.0
    quickest_poll_s: float = 0.1
    slowest_poll_s: float = 2.0
    grace_s: float = 3.0
    proxy: str | None = None

    def __post_init__(self) -> None:
        if not HEARTBEAT_MIN_INTERVAL <= self.heartbeat_s <= HEARTBEAT_MAX_INTERVAL:
            raise ConfigError(
                f"heartbeat_s: expected {HEARTBEAT_MIN_INTERVAL} to {HEARTBEAT_MAX_INTERVAL} seconds, which is what "
                f"Flower accepts, found {self.heartbeat_s!r}"
            )
        if not 0 < self.quickest_poll_s <= self.slowest_poll_s:
            raise ConfigError(f"polls: expected 0 < {self.quickest_poll_s!r} <= {self.slowest_poll_s!r}")


def bundle_digest(content: bytes) -> str:
    """What a policy lists of a bundle: SHA-256 of its bytes, in hex."""
    return hashlib.sha256(content).hexdigest()


def serve(
    connection: Connection,
    answer: Callable[[Message, Context], Message],
    allowed_bundles: Collection[str],
    stop: threading.Event,
    on_event: Callable[[Event], None] = lambda _: None,
    record: Callable[[Message], None] = lambda _: None,
) -> None:
    """Answers the coordinator's messages, one at a time, until `stop` is set; comes back within seconds of that.

    answer: the installed ClientApp. It is given a message only when that is of a type of our protocol and belongs to a
    run whose bundle is in `allowed_bundles` (see `bundle_digest`); any other is answered with a reason code, and not
    even its content is fetched. The bundle itself is hashed in memory: it is never unpacked, imported or written.
    record: called with every reply before any of it leaves; when it raises, that reply stays here.

    Whatever the coordinator or the network does, this goes on: it tells of it (`on_event`), waits longer each time, and
    tries again. With a `memory`, a node that was killed goes on at once as the node it was, and answers what it had
    taken up with the reason code `restarted`, so that nobody waits for it.

    An answer that is still under way `grace_s` after `stop` is left to its own thread, which ends with the process.

    Raises ConfigError, at once, when the authority is none or another process holds the memory.
    """
    _Daemon(connection, answer, frozenset(allowed_bundles), stop, on_event, record).run()


class _Broken(Exception):
    """The connection does not work as it is.

    event: what to tell. patience_s: how long to wait at most before the next try. hopeless: whether it is this very
    call that fails, so that another message may fare better.
    """

    def __init__(self, event: Event, patience_s: float, hopeless: bool = False) -> None:
        super().__init__(event.text)
        self.event = event
        self.patience_s = patience_s
        self.hopeless = hopeless


class _RunOver(Exception):
    """The run that a message belongs to is no longer running."""


class _Stopped(Exception):
    """`stop` was set while something was still to do."""


class _Fleet:
    """Calls of the Fleet API, signed as this node. It follows no redirects and trusts one authority."""

    def __init__(self, connection: Connection) -> None:
        trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trust.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            trust.load_verify_locations(cadata=connection.authority.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(f"authority: expected certificates in PEM, found none ({error})") from error
        self._key = connection.key
        self.public = public_key_to_bytes(connection.key.public_key())
        version = RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata()
        self._headers = {
            **dict(version),
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(self.public).decode("ascii"),
            "content-type": PROTOBUF_MEDIA_TYPE,
            "accept": PROTOBUF_MEDIA_TYPE,
            "accept-encoding": "identity",
            "user-agent": "silotune",
        }
        self._http = httpx.Client(
            base_url=f"https://{connection.address}",
            verify=trust,
            timeout=connection.timeout_s,
            trust_env=False,
            proxy=connection.proxy,
            limits=httpx.Limits(keepalive_expiry=30),
        )

    def close(self) -> None:
        self._http.close()

    def call(self, method: str, request: Proto, response: type[R], timeout_s: float | None = None) -> R:
        """One call. Raises _Broken, or _RunOver where Flower says 403."""
        moment = datetime.now(UTC).isoformat()
        signature = b64encode(sign_message(self._key, moment.encode("ascii"))).decode("ascii")
        headers = {**self._headers, TIMESTAMP_HEADER: moment, FLEET_HTTP_SIGNATURE_HEADER: signature}
        timeout = self._http.timeout if timeout_s is None else httpx.Timeout(timeout_s)
        try:
            body = request.SerializeToString(deterministic=True)
            with self._http.stream("POST", _FLEET + method, content=body, headers=headers, timeout=timeout) as found:
                if found.status_code != 200:
                    raise _refusal(method, found)
                content = bytearray()
                for chunk in found.iter_raw():
                    content += chunk
                    if len(content) > _RESPONSE_BYTES:
                        raise _Broken(Event(UNREACHABLE, f"{method}: more than {_RESPONSE_BYTES} bytes came"), 30)
        except httpx.HTTPError as error:
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, ssl.SSLCertVerificationError):
                    text = f"its certificate is not one of the pinned authority's: {cause.verify_message}"
                    raise _Broken(Event(UNTRUSTED, text), 60) from error
                cause = cause.__cause__ or cause.__context__
            raise _Broken(Event(UNREACHABLE, f"{method}: {type(error).__name__}: {error}"), 15) from error
        parsed = response()
        try:
            parsed.ParseFromString(bytes(content))
        except Exception as error:  # protobuf's own kind, which has no types
            raise _Broken(Event(UNREACHABLE, f"{method}: what came is no answer of a SuperLink"), 30) from error
        return parsed


def _refusal(method: str, found: httpx.Response) -> Exception:
    """What a status other than 200 means."""
    if found.status_code == 401:
        return _Broken(Event(NOT_ENROLLED, f"the coordinator does not know this node's key{_clock(found)}"), 60)
    if found.status_code == 403:
        return _RunOver()
    if found.status_code == 412 and method == "activate-node":
        text = "the coordinator does not admit this node: its key is not enrolled, or a node with it is still there"
        return _Broken(Event(NOT_ADMITTED, text), 10)
    away = found.status_code in (429, 502, 503, 504)  # the door says so while the SuperLink starts anew
    return _Broken(Event(UNREACHABLE, f"{method}: status {found.status_code}"), 15, hopeless=not away)


def _clock(found: httpx.Response) -> str:
    """Signatures hold a time: 5 s ahead of the coordinator's or 5 minutes behind are as bad as a wrong key."""
    with suppress(KeyError, ValueError, TypeError):
        apart = (datetime.now(UTC) - parsedate_to_datetime(found.headers["date"])).total_seconds()
        if abs(apart) > 3:
            return f"; this machine's clock is {apart:+.0f} s from the coordinator's, which may be all"
    return ""


class _Memory:
    """What the next process must know: which node this is, and the message in hand.

    The node's number counts only on the same boot of the same machine: a copy of the disk elsewhere must not take part
    beside the original, so it has to ask to be admitted, and is not while that one is there.
    """

    def __init__(self, directory: Path | None) -> None:
        self._node = directory / "node.json" if directory else None
        self._message = directory / "in-hand.bin" if directory else None
        self._lock = _locked(directory) if directory else None

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def node(self) -> int | None:
        if self._node is None:
            return None
        try:
            kept = json.loads(self._node.read_text(encoding="utf-8"))
            return int(kept["node"]) if kept["boot"] == _boot() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep_node(self, node: int) -> None:
        if self._node is not None and self.node() != node:
            write_json(self._node, {"node": node, "boot": _boot()})

    def forget_node(self) -> None:
        if self._node is not None:
            self._node.unlink(missing_ok=True)

    def in_hand(self) -> Message | None:
        """The message that was in hand when the process ended, without its content."""
        if self._message is None:
            return None
        try:
            return message_from_proto(MessageProto.FromString(self._message.read_bytes()))
        except Exception:  # half a file, or none
            return None

    def take(self, message: Message) -> None:
        if self._message is not None:
            header = message_to_proto(remove_content_from_message(message))
            write_bytes(self._message, header.SerializeToString())

    def put_down(self) -> None:
        if self._message is not None:
            self._message.unlink(missing_ok=True)


def _locked(directory: Path) -> IO[str]:
    """A file that one process at a time holds; the system lets go of it when that ends, however it ends."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = (directory / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise ConfigError(f"{directory}: another process is this node already; stop that one first") from error
    return lock


def _boot() -> str:
    """Another word for each start of the operating system; empty where there is none, which then matches itself."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


class _Made(threading.Event):
    """Set once an answer is there; None where none could be made."""

    reply: Message | None = None


class _Worker:
    """One thread for all answers, since a model's own threads belong to the one that called it."""

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Callable[[], Message], _Made]] = SimpleQueue()
        threading.Thread(target=self._run, name="answer", daemon=True).start()

    def start(self, answer: Callable[[], Message]) -> _Made:
        made = _Made()
        self._work.put((answer, made))
        return made

    def _run(self) -> None:
        while True:
            answer, made = self._work.get()
            try:
                made.reply = answer()
            except BaseException:
                log.exception("no answer could be made")
            made.set()


class _Daemon:
    """The loop of `serve` and its state."""

    def __init__(
        self,
        connection: Connection,
        answer: Callable[[Message, Context], Message],
        allowed: frozenset[str],
        stop: threading.Event,
        on_event: Callable[[Event], None],
        record: Callable[[Message], None],
    ) -> None:
        self._connection = connection
        self._answer = answer
        self._allowed = allowed
        self._stop = stop
        self._on_event = on_event
        self._record = record
        self._fleet = _Fleet(connection)
        self._memory = _Memory(connection.memory)
        self._node = Node()
        self._runs: OrderedDict[int, bool] = OrderedDict()  # whether the bundle is listed
        self._told = ""
        self._tries = 0  # since a look for messages last worked
        self._lapsed = threading.Event()  # the heartbeat learned that the node is no longer known
        self._beat_now = threading.Event()
        self._over = threading.Event()
        self._worker = _Worker()

    def run(self) -> None:
        heart: threading.Thread | None = None
        try:
            while not self._stop.is_set():
                try:
                    self._join()
                    if heart is None:
                        heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
                        heart.start()
                    self._tell(CONNECTED, f"as node {self._node.node_id}")
                    self._finish_in_hand()
                    self._attend()
                except (_Stopped, _RunOver):
                    continue
                except _Broken as broken:
                    self._tell(broken.event.kind, broken.event.text)
                    self._stop.wait(_backoff(self._tries, broken.patience_s))
                    self._tries += 1
                except Exception as error:  # a full disk, or a mistake of ours: no reason to end either
                    log.exception("the connection is taken up anew")
                    self._tell(UNREACHABLE, f"{type(error).__name__}: {error}")
                    self._stop.wait(_backoff(self._tries, 15))
                    self._tries += 1
        finally:
            self._leave(heart)

    # --- Being there ------------------------------------------------------------------------------------------------

    def _join(self) -> None:
        """Becomes, or remains, a node that the coordinator sees."""
        self._lapsed.clear()
        known = self._node.node_id or self._memory.node()
        if known:
            self._node = Node(node_id=known)
            try:
                self._send_heartbeat()
                return
            except _Broken as broken:
                if broken.event.kind != NOT_ENROLLED:
                    raise
                # Another federation's number, or one that was removed: ask as if new.
                self._node = Node()
                self._memory.forget_node()
        request = ActivateNodeRequest(public_key=self._fleet.public, heartbeat_interval=self._connection.heartbeat_s)
        self._node = Node(node_id=self._fleet.call("activate-node", request, ActivateNodeResponse).node_id)
        self._memory.keep_node(self._node.node_id)

    def _send_heartbeat(self) -> None:
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=self._connection.heartbeat_s)
        sent = self._fleet.call("send-node-heartbeat", request, SendNodeHeartbeatResponse, timeout_s=5)
        if not sent.success:
            raise _Broken(Event(NOT_ENROLLED, "the coordinator has removed this node"), 60)

    def _beat(self) -> None:
        """Runs beside the loop, so that a node which trains for an hour is still there."""
        pause = self._connection.heartbeat_s * 0.7
        while not self._over.is_set():
            self._beat_now.wait(pause * random.uniform(0.9, 1.1))
            self._beat_now.clear()
            if self._over.is_set() or not self._node.node_id:
                continue
            pause = self._connection.heartbeat_s * 0.7
            try:
                self._send_heartbeat()
            except _Broken as broken:
                if broken.event.kind == NOT_ENROLLED:
                    self._lapsed.set()
                else:
                    pause = min(pause, 3.0)
            except _RunOver:
                pass

    def _leave(self, heart: threading.Thread | None) -> None:
        """Says goodbye, for as long as that takes a second or two: whoever has stopped must not be waited for."""
        self._over.set()
        self._beat_now.set()
        if self._node.node_id:
            with suppress(_Broken, _RunOver):
                request = DeactivateNodeRequest(node_id=self._node.node_id)
                self._fleet.call("deactivate-node", request, DeactivateNodeResponse, timeout_s=2)
        if heart is not None:
            heart.join(timeout=1)
        self._fleet.close()
        self._memory.close()
        self._tell(STOPPED)

    def _tell(self, kind: str, text: str = "", run: int = 0) -> None:
        """Tells of the state of the connection once, of what happens to a message each time."""
        if kind in (CONNECTED, UNREACHABLE, UNTRUSTED, NOT_ENROLLED, NOT_ADMITTED):
            if kind == self._told:
                return
            self._told = kind
        try:
            self._on_event(Event(kind, text, run))
        except Exception:
            log.exception("an event could not be told")

    def _wait(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise _Stopped

    # --- Messages ---------------------------------------------------------------------------------------------------

    def _attend(self) -> None:
        """Looks for messages, the less often the longer ago the last one was: within a twentieth of that time."""
        heard = time.monotonic()
        slowest = self._connection.slowest_poll_s
        while True:
            if self._lapsed.is_set():
                raise _Broken(Event(NOT_ENROLLED, "the coordinator has removed this node"), 60)
            pulled = self._fleet.call("pull-messages", PullMessagesRequest(node=self._node), PullMessagesResponse)
            self._tries = 0
            if pulled.messages_list:
                self._take(pulled)
                heard = time.monotonic()
            else:
                quiet = (time.monotonic() - heard) / 20
                self._wait(min(max(quiet, self._connection.quickest_poll_s), slowest))

    def _take(self, pulled: PullMessagesResponse) -> None:
        """Answers one message. A connection that breaks meanwhile is mended here: the message comes only once."""
        try:
            message = message_from_proto(pulled.messages_list[0])
            tree = pulled.message_object_trees[0]
        except Exception as error:  # whatever a coordinator can put there
            raise _Broken(Event(UNREACHABLE, f"a message without a head came: {error}"), 15) from error
        run = message.metadata.run_id
        try:
            self._memory.take(message)
            reply = self._reply_to(message, tree)
            self._push(reply)
        except _RunOver:
            self._tell(LOST, "the run is over", run)
        except _Stopped:
            # To go away is an answer: the coordinator counts the message as lost. Were the next process there before it
            # looks, that one answers.
            raise
        except _Broken:
            self._memory.put_down()
            raise
        except _Unusable as error:
            self._tell(LOST, str(error), run)
        except Exception as error:
            # Nothing that a reply is made of may end the daemon, or go further than its own log.
            log.exception("a reply could not be sent")
            self._tell(LOST, f"{type(error).__name__}: {error}", run)
        self._memory.put_down()

    def _reply_to(self, message: Message, tree: ObjectTree) -> Message:
        run, kind = message.metadata.run_id, message.metadata.message_type
        self._tell(RECEIVED, kind, run)
        if kind not in _MESSAGES:
            return self._refuse(message, MESSAGE_TYPE_REFUSED, f"a message of type {kind!r:.60}")
        if not self._is_listed(run):
            return self._refuse(message, BUNDLE_REFUSED, "the run's bundle is not one that the policy lists")
        try:
            if not message.content:  # a short message comes whole, a long one in parts
                inflated = inflate_object_from_contents(tree.object_id, self._fetch(run, tree))
                if not isinstance(inflated, Message):
                    raise _Unusable(f"expected a message, found {type(inflated).__name__}")
                # The head that came with the message decides what it is, not the one inside.
                message.content = inflated.content
            self._confirm(message)
        except (_Broken, _RunOver, _Stopped):
            raise
        except Exception as error:
            log.warning("a message cannot be read: %s", error)
            return self._refuse(message, INTERNAL_ERROR, f"it cannot be read: {error}")
        context = Context(run, self._node.node_id, node_config={}, state=RecordDict(), run_config={})
        return self._answered(message, context)

    def _is_listed(self, run: int) -> bool:
        """Whether the policy lists the bundle of a run: decided by the hash of what came, once a run."""
        if run in self._runs:
            return self._runs[run]
        found = self._insist("get-run", GetRunRequest(node=self._node, run_id=run), GetRunResponse)
        named = run_from_proto(found.run).fab_hash
        request = GetFabRequest(node=self._node, hash_str=named, run_id=run)
        digest = bundle_digest(self._insist("get-fab", request, GetFabResponse).fab.content)
        listed = digest in self._allowed
        if not listed:
            log.warning("run %d: the coordinator's bundle has SHA-256 %s, which the policy does not list", run, digest)
        self._runs[run] = listed
        while len(self._runs) > _RUNS_REMEMBERED:
            self._runs.popitem(last=False)
        return listed

    def _refuse(self, message: Message, reason: str, text: str) -> Message:
        self._tell(REFUSED, f"{reason}: {text}", message.metadata.run_id)
        self._confirm(message)
        return Message(to_records(to_wire(Refused(reason))), reply_to=message)

    def _answered(self, message: Message, context: Context) -> Message:
        """The answer, made in a thread of its own, so that one which takes an hour does not outlive `stop`."""
        made = self._worker.start(lambda: self._answer(message, context))
        while not made.wait(0.5):
            if self._stop.is_set() and not made.wait(self._connection.grace_s):
                raise _Stopped
        if made.reply is not None:
            return made.reply
        return Message(to_records(to_wire(Refused(INTERNAL_ERROR))), reply_to=message)

    def _finish_in_hand(self) -> None:
        """Answers the message that a process before this one had in hand."""
        message = self._memory.in_hand()
        if message is None:
            return
        self._memory.put_down()
        with suppress(_Broken, _RunOver):
            reply = Message(to_records(to_wire(Refused(RESTARTED))), reply_to=message)
            self._record(reply)
            self._push_once(reply)

    # --- Objects: a message travels in parts, each named by its hash ------------------------------------------------

    def _insist(self, method: str, request: Proto, response: type[R]) -> R:
        """A call that is tried again until it works, the run is over, or `stop` is set."""
        tries = 0
        while True:
            try:
                return self._fleet.call(method, request, response)
            except _Broken as broken:
                self._hold_on(broken, tries)
                tries += 1

    def _hold_on(self, broken: _Broken, tries: int) -> None:
        """Waits until it makes sense to try again; a node that was removed can only begin anew."""
        if broken.event.kind == NOT_ENROLLED:
            raise broken
        if broken.hopeless and tries >= _HOPELESS_TRIES:
            raise _Unusable(broken.event.text)
        self._tell(broken.event.kind, broken.event.text)
        self._wait(_backoff(tries, broken.patience_s))
        self._beat_now.set()

    def _fetch(self, run: int, tree: ObjectTree) -> dict[str, bytes]:
        contents: dict[str, bytes] = {}
        for part in iterate_object_tree(tree):
            request = PullObjectRequest(node=self._node, run_id=run, object_id=part.object_id)
            waited = 0.05
            while part.object_id not in contents:
                found = self._insist("pull-object", request, PullObjectResponse)
                if not found.object_found:
                    raise _Unusable("a part of it is not there")
                if found.object_available:
                    contents[part.object_id] = found.object_content
                else:  # the coordinator is still sending it
                    self._wait(waited)
                    waited = min(2 * waited, 2.0)
        return contents

    def _confirm(self, message: Message) -> None:
        """Lets the coordinator throw the parts of a message away."""
        metadata = message.metadata
        request = ConfirmMessageReceivedRequest(
            node=self._node, run_id=metadata.run_id, message_object_id=metadata.message_id
        )
        self._insist("confirm-message-received", request, ConfirmMessageReceivedResponse)

    def _push(self, reply: Message) -> None:
        """Sends a reply, after it was recorded. To send it twice is to send it once: it is named by its hash."""
        self._record(reply)
        tries = 0
        while True:
            if reply.metadata.ttl <= 0 or time.time() > reply.metadata.created_at + reply.metadata.ttl:
                raise _Unusable("the coordinator no longer waits for it")
            try:
                self._push_once(reply)
            except _Broken as broken:
                self._hold_on(broken, tries)
                tries += 1
            else:
                break
        self._tell(CONNECTED)
        self._tell(ANSWERED, reply.metadata.message_type, reply.metadata.run_id)

    def _push_once(self, reply: Message) -> None:
        reply.metadata.__dict__["_message_id"] = reply.object_id  # as Flower's own code sets it
        with no_object_id_recompute():
            head, tree, parts = _packed(reply)
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[head],
                message_object_trees=[tree],
                clientapp_runtime_list=[0.0],  # how long training takes tells how many records there are
            )
        wanted = self._fleet.call("push-messages", request, PushMessagesResponse)
        missing = set(wanted.objects_to_push)
        for name, part in parts.items():
            if name in missing:
                pushed = PushObjectRequest(
                    node=self._node,
                    run_id=reply.metadata.run_id,
                    object_id=name,
                    object_content=part.deflate(),
                    session_id=wanted.session_id,
                )
                stored = self._fleet.call("push-object", pushed, PushObjectResponse).stored
                # The root alone comes too late when the coordinator was quicker, and has all it needs.
                if not stored and len(parts) > 1:
                    text = "the coordinator did not keep a part of the reply"
                    raise _Broken(Event(UNREACHABLE, text), 15, hopeless=True)


def _packed(message: Message) -> tuple[MessageProto, ObjectTree, dict[str, InflatableObject]]:
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


class _Unusable(Exception):
    """A message or a reply that nobody can do anything with."""


def _backoff(tries: int, longest_s: float) -> float:
    """Half a second, then twice as long each time; everybody somewhat differently, so that not all come at once."""
    return min(0.5 * 2.0 ** min(tries, 10), longest_s) * random.uniform(0.5, 1.0)


def time_until_readmitted_s(connection: Connection) -> float:
    """How long a node that was killed and has no memory is refused at most."""
    return HEARTBEAT_PATIENCE * connection.heartbeat_s
