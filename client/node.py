"""The institution's connection to its coordinator: Flower's Fleet API from inside the daemon, without an executor.

It takes the place of Flower's SuperNode, which would unpack and run the bundle that a coordinator sends, pass on how
long each answer took, and end the whole process when a connection fails. Here a bundle is only ever hashed; what runs
is the `answer` that is installed. Private names of Flower that this side needs are in this module and in
`client.calls`, `client.fleet` and `client.node_memory`; tests/client/test_node.py fails when one of them changes.
"""

from __future__ import annotations

import hashlib
import logging
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from contextlib import suppress
from queue import SimpleQueue

from flwr.app import Context, Message, RecordDict
from flwr.common.serde import message_from_proto, run_from_proto
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
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest, GetRunResponse
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from client.calls import Broken, Connection, Fleet, Proto, R, RunOver
from client.events import (
    ANSWERED,
    CONNECTED,
    CONNECTION,
    LOST,
    NOT_ENROLLED,
    RECEIVED,
    REFUSED,
    STOPPED,
    UNREACHABLE,
    Event,
)
from client.node_memory import NodeMemory
from common.flower import MESSAGES, packed, to_records
from common.messages import BUNDLE_REFUSED, INTERNAL_ERROR, MESSAGE_TYPE_REFUSED, RESTARTED, Refused
from common.wire import to_wire

log = logging.getLogger("silotune.client")

_RUNS_REMEMBERED = 64
_HOPELESS_TRIES = 4


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
    run whose bundle has its SHA-256 (in hex) in `allowed_bundles`; any other is answered with a reason code, and not
    even its content is fetched. The bundle itself is hashed in memory: it is never unpacked, imported or written.
    record: called with every reply before any of it leaves; when it raises, that reply stays here.

    Whatever the coordinator or the network does, this goes on: it tells of it (`on_event`), waits longer each time, and
    tries again. With a `memory`, a node that was killed goes on at once as the node it was, and answers what it had
    taken up with the reason code `restarted`, so that nobody waits for it.

    An answer that is still under way `grace_s` after `stop` is left to its own thread, which ends with the process.

    Raises ConfigError when the authority is none, and when another process holds the memory and does not let go of it
    within the connection's `takeover_s`.
    """
    _Daemon(connection, answer, frozenset(allowed_bundles), stop, on_event, record).run()


class _Stopped(Exception):
    """`stop` was set while something was still to do."""


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
        self._fleet = Fleet(connection)
        self._memory = NodeMemory(connection.memory, connection.takeover_s)
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
                except (_Stopped, RunOver):
                    continue
                except Broken as broken:
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
            except Broken as broken:
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
            raise Broken(Event(NOT_ENROLLED, "the coordinator has removed this node"), 60)

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
            except Broken as broken:
                if broken.event.kind == NOT_ENROLLED:
                    self._lapsed.set()
                else:
                    pause = min(pause, 3.0)
            except RunOver:
                pass

    def _leave(self, heart: threading.Thread | None) -> None:
        """Says goodbye, for as long as that takes a second or two: whoever has stopped must not be waited for."""
        self._over.set()
        self._beat_now.set()
        if self._node.node_id:
            with suppress(Broken, RunOver):
                request = DeactivateNodeRequest(node_id=self._node.node_id)
                self._fleet.call("deactivate-node", request, DeactivateNodeResponse, timeout_s=2)
        if heart is not None:
            heart.join(timeout=1)
        self._fleet.close()
        self._memory.close()
        self._tell(STOPPED)

    def _tell(self, kind: str, text: str = "", run: int = 0) -> None:
        """Tells of the state of the connection once, of what happens to a message each time."""
        if kind in CONNECTION:
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
                raise Broken(Event(NOT_ENROLLED, "the coordinator has removed this node"), 60)
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
            raise Broken(Event(UNREACHABLE, f"a message without a head came: {error}"), 15) from error
        run = message.metadata.run_id
        try:
            self._memory.take(message)
            reply = self._reply_to(message, tree)
            self._push(reply)
        except RunOver:
            self._tell(LOST, "the run is over", run)
        except _Stopped:
            # To go away is an answer: the coordinator counts the message as lost. Were the next process there before it
            # looks, that one answers.
            raise
        except Broken:
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
        if kind not in MESSAGES:
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
        except (Broken, RunOver, _Stopped):
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
        digest = hashlib.sha256(self._insist("get-fab", request, GetFabResponse).fab.content).hexdigest()
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
        with suppress(Broken, RunOver):
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
            except Broken as broken:
                self._hold_on(broken, tries)
                tries += 1

    def _hold_on(self, broken: Broken, tries: int) -> None:
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
            except Broken as broken:
                self._hold_on(broken, tries)
                tries += 1
            else:
                break
        self._tell(CONNECTED)
        self._tell(ANSWERED, reply.metadata.message_type, reply.metadata.run_id)

    def _push_once(self, reply: Message) -> None:
        reply.metadata.__dict__["_message_id"] = reply.object_id  # as Flower's own code sets it
        with no_object_id_recompute():
            head, tree, parts = packed(reply)
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
                    raise Broken(Event(UNREACHABLE, text), 15, hopeless=True)


class _Unusable(Exception):
    """A message or a reply that nobody can do anything with."""


def _backoff(tries: int, longest_s: float) -> float:
    """Half a second, then twice as long each time; everybody somewhat differently, so that not all come at once."""
    return min(0.5 * 2.0 ** min(tries, 10), longest_s) * random.uniform(0.5, 1.0)
