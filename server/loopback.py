"""The ServerApp's part of a run, held by the process that asks for it, and Flower's grid over it.

No bundle is ever run: `acquire` gives the part to this process, with the code that is installed here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import httpx
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, message_from_proto, run_from_proto
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
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    AcquireTaskResponse,
    GetNodesRequest,
    GetNodesResponse,
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PullTaskInputRequest,
    PullTaskInputResponse,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
    PushTaskOutputRequest,
    PushTaskOutputResponse,
    SendTaskHeartbeatRequest,
    SendTaskHeartbeatResponse,
)
from flwr.serverapp import Grid
from flwr.supercore.auth import create_superexec_auth_metadata, derive_auth_secret
from flwr.supercore.constant import TASK_TOKEN_HEADER, TaskType
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from common.errors import RunStopped
from common.flower import packed
from server.calls import Calls, Proto, R, ServiceError, Status
from server.superlink import Endpoint

log = logging.getLogger("silotune.server")

_RUNTIME = "/v1/runtime/"
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_TASK_HEARTBEAT_S = 10.0
_PATIENCE_S = 120.0  # how long a SuperLink that restarts is waited for


class Task:
    """The ServerApp's part of a run, held by this process from `acquire` to `finish`."""

    def __init__(self, calls: Calls, token: str, run: int) -> None:
        self.run = run
        self._calls = calls
        self._headers = {TASK_TOKEN_HEADER: token}
        self._over = threading.Event()

    def call(self, method: str, request: Proto, response: type[R]) -> R:
        """A call in the name of the run. Raises RunStopped once the run is no longer this process's."""
        try:
            return self._calls(_RUNTIME + method, request, response, self._headers)
        except Status as error:
            if error.status == httpx.codes.UNAUTHORIZED:
                raise NotRunning from error
            raise

    def begin(self) -> tuple[LoopbackGrid, Context]:
        """Marks the run as running. Makes this process the one that speaks for it: one run a process at a time."""
        given = self.call("pull-task-input", PullTaskInputRequest(), PullTaskInputResponse)
        run = run_from_proto(given.run)
        # Flower's messages take their sender from here when they are made.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = given.task_id, run.run_id, SUPERLINK_NODE_ID
        return LoopbackGrid(self, run), context_from_proto(given.context)

    @contextmanager
    def alive(self, on_lost: Callable[[], None]) -> Iterator[None]:
        """Shows the SuperLink that this process is there. on_lost: the run was stopped, or given up."""

        def beat() -> None:
            while not self._over.wait(_TASK_HEARTBEAT_S):
                try:
                    request = SendTaskHeartbeatRequest()
                    if not self.call("send-task-heartbeat", request, SendTaskHeartbeatResponse).success:
                        raise NotRunning
                except RunStopped:
                    on_lost()
                    return
                except (ServiceError, RuntimeError) as error:  # httpx says the latter of a client that was closed
                    if not self._over.is_set():
                        log.warning("%s", error)

        thread = threading.Thread(target=beat, name="task-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()

    def finish(self, completed: bool, details: str = "") -> None:
        """Tells the SuperLink how the run ended. A SuperLink that no longer knows the run is told nothing."""
        outcome = SubStatus.COMPLETED if completed else SubStatus.FAILED
        with suppress(ServiceError, RunStopped):
            request = PushTaskOutputRequest(sub_status=outcome, details=details)
            self.call("push-task-output", request, PushTaskOutputResponse)

    def close(self) -> None:
        self._over.set()
        self._calls.close()


def acquire(endpoint: Endpoint, run: int, stop: threading.Event | None = None, timeout_s: float = 30.0) -> Task:
    """Takes over the ServerApp's part of a pending run. stop: once set, a SuperLink that is away is not waited for.

    Flower hands out the oldest pending run, whichever that is. Whoever starts a run takes it over under the same lock,
    so a run before it was left behind by a process that is gone: it is ended as failed.

    Raises ServiceError when the run is not handed out in time.
    """
    calls = Calls(endpoint, "flwr-serverapp", _PATIENCE_S, stop)
    secret = derive_auth_secret(endpoint.secret)
    end = time.monotonic() + timeout_s
    try:
        while time.monotonic() < end:
            request = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
            signed = create_superexec_auth_metadata(auth_secret=secret, method=_ACQUIRE, request=request)
            found = calls(_RUNTIME + "acquire-task", request, AcquireTaskResponse, signed)
            if not found.token:
                time.sleep(0.1)
                continue
            task = Task(calls, found.token, found.task.run_id)
            if task.run == run:
                return task
            log.warning("run %d was left behind by its coordinator: ended", task.run)
            task.finish(completed=False, details="left behind")
        raise ServiceError(f"run {run} was not handed out within {timeout_s:.0f} s")
    except BaseException:
        calls.close()
        raise


@dataclass
class _Arriving:
    """A reply whose parts are still being sent."""

    head: Message
    tree: ObjectTree
    parts: dict[str, bytes] = field(default_factory=dict)


class LoopbackGrid(Grid):
    """Flower's grid for the process that holds a run.

    It differs from Flower's own where that one would wait or trust. A reply whose parts are not all there yet is left
    for the next `pull_messages`, while Flower's stops everything for a second and more, and for an hour when the
    sender is gone. A reply is from whom, and to what, the SuperLink says, not what the sender wrote inside. One that
    cannot be read is an error reply and ends nothing.
    """

    def __init__(self, task: Task, run: Run) -> None:
        self._task = task
        self._run = run
        self._node = Node(node_id=SUPERLINK_NODE_ID)
        self._arriving: dict[str, _Arriving] = {}
        super().__init__()

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        found = self._task.call("get-nodes", GetNodesRequest(), GetNodesResponse)
        return [node.node_id for node in found.nodes]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Sends messages and returns their ids, in order, without those that the SuperLink did not take."""
        sent = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id  # as Flower's own code sets it
            with no_object_id_recompute():
                head, tree, parts = packed(message)
                request = PushAppMessagesRequest(messages_list=[head], message_object_trees=[tree])
            taken = self._task.call("push-messages", request, PushAppMessagesResponse)
            missing = set(taken.objects_to_push)
            for name, part in parts.items():
                if name in missing:
                    pushed = PushObjectRequest(
                        node=self._node,
                        run_id=self._task.run,
                        object_id=name,
                        object_content=part.deflate(),
                        session_id=taken.session_id,
                    )
                    stored = self._task.call("push-object", pushed, PushObjectResponse).stored
                    # Whoever answers before all has arrived, with a refusal or because the rest is not needed, ends the
                    # message. Where it was lost otherwise, no answer comes, and that member is late.
                    if not stored:
                        break
            sent += [found for found in taken.message_ids if found]
        return sent

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages that are complete by now; it waits for none."""
        wanted = list(message_ids)
        if asked := [name for name in wanted if name not in self._arriving]:
            request = PullAppMessagesRequest(message_ids=asked)
            pulled = self._task.call("pull-messages", request, PullAppMessagesResponse)
            for proto, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
                head = message_from_proto(proto)
                self._arriving[head.metadata.reply_to_message_id] = _Arriving(head, tree)
        replies = []
        for name in wanted:
            if name in self._arriving and (reply := self._complete(self._arriving[name])) is not None:
                del self._arriving[name]
                replies.append(reply)
        return replies

    def _complete(self, arriving: _Arriving) -> Message | None:
        """The whole reply, or None while a part is missing."""
        head = arriving.head
        whole = head.has_content() and bool(head.content)  # a short message comes whole, a long one in parts
        for part in () if whole else iterate_object_tree(arriving.tree):
            if part.object_id in arriving.parts:
                continue
            request = PullObjectRequest(node=self._node, run_id=self._task.run, object_id=part.object_id)
            found = self._task.call("pull-object", request, PullObjectResponse)
            if not found.object_found:
                return _error(head, ErrorCode.MESSAGE_UNAVAILABLE, "a part of the reply is not there")
            if not found.object_available:
                return None
            arriving.parts[part.object_id] = found.object_content
        done = ConfirmMessageReceivedRequest(
            node=self._node, run_id=self._task.run, message_object_id=head.metadata.message_id
        )
        self._task.call("confirm-message-received", done, ConfirmMessageReceivedResponse)
        if whole:
            return head
        try:
            inflated = inflate_object_from_contents(arriving.tree.object_id, arriving.parts)
            if not isinstance(inflated, Message):
                raise TypeError(type(inflated).__name__)
            if inflated.has_error():
                return make_message(metadata=head.metadata, error=inflated.error)
            return make_message(metadata=head.metadata, content=inflated.content)
        except Exception as error:  # the parts are the sender's
            log.warning("node %d sent a reply that cannot be read: %s", head.metadata.src_node_id, error)
            return _error(head, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "the reply cannot be read")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        waiting = set(self.push_messages(messages))
        end = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and (end is None or time.monotonic() < end):
            found = list(self.pull_messages(waiting))
            replies += found
            waiting -= {reply.metadata.reply_to_message_id for reply in found}
            if waiting:
                time.sleep(0.1)
        return replies


def _error(head: Message, code: int, reason: str) -> Message:
    return make_message(metadata=head.metadata, error=Error(code, reason))


class NotRunning(RunStopped):
    """The SuperLink no longer has the run as running."""

    def __init__(self) -> None:
        super().__init__(
            "the run was stopped, or the SuperLink did not hear of it for a minute. What was reached is kept: "
            "`silotune-server resume` goes on with it."
        )
