"""The coordinator's SuperLink: Flower's own process on the loopback interface, and what is asked of it.

Members reach it through server/front.py only; its Control API (nodes, runs) and Runtime API (the grid) are for this
machine. No bundle is ever run: `acquire` gives the ServerApp's part of a run to the process that calls it, with the
code that is installed there. Every private name of Flower that this side needs is in this module, and
tests/server/test_superlink.py fails when one of them changes.
"""

from __future__ import annotations

import hashlib
import io
import ipaddress
import logging
import os
import random
import secrets
import ssl
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol, TypeVar

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, message_from_proto, message_to_proto, run_from_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListNodesResponse,
    ListRunsRequest,
    ListRunsResponse,
    RegisterNodeRequest,
    RegisterNodeResponse,
    StartRunRequest,
    StartRunResponse,
    StopRunRequest,
    StopRunResponse,
    UnregisterNodeRequest,
    UnregisterNodeResponse,
)
from flwr.proto.fab_pb2 import Fab
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
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.run import Run
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from flwr.supercore.task_identity import TaskIdentity

from common.errors import ConfigError, RunStopped, SilotuneError
from common.files import write_bytes

log = logging.getLogger("silotune.server")

_SUPERLINK = "from flwr.superlink.cli import flower_superlink; flower_superlink()"
_CONTROL, _RUNTIME = "/v1/control/", "/v1/runtime/"
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_WHOLE_BYTES = 2**20
_CERTIFICATE_DAYS, _RENEW_DAYS = 3650, 365
_TASK_HEARTBEAT_S = 10.0
_PATIENCE_S = 120.0  # how long a SuperLink that restarts is waited for


class ServiceError(SilotuneError):
    """A service of the coordinator that does not start, answer, or do what it was asked."""


# --- The bundle -------------------------------------------------------------------------------------------------------

_PYPROJECT = """\
[project]
name = "silotune"
version = "1"
description = "Names what is installed; holds no code."
license = { text = "Apache-2.0" }
dependencies = []

[tool.flwr.app]
publisher = "silotune"

[tool.flwr.app.components]
serverapp = "server.app:installed"
clientapp = "client.app:installed"
"""


def bundle() -> bytes:
    """The bundle of every run: a project file without code, the same bytes on every machine.

    Flower has no run without a bundle. Members hash it and list the hash in their policy; nobody unpacks it.
    """
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        entry = zipfile.ZipInfo("pyproject.toml", date_time=(1980, 1, 1, 0, 0, 0))
        entry.create_system = 3
        entry.external_attr = 0o644 << 16
        archive.writestr(entry, _PYPROJECT)
    return packed.getvalue()


def bundle_digest() -> str:
    """SHA-256 of `bundle`, in hex, as members list it."""
    return hashlib.sha256(bundle()).hexdigest()


# --- The process ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Endpoint:
    """A SuperLink on this machine. root: its certificate in PEM. secret: what a ServerApp is taken over with."""

    address: str
    root: bytes = field(repr=False)
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class SuperLinkHome:
    """The files of a SuperLink, in a directory that only its owner may read."""

    directory: Path

    @property
    def database(self) -> Path:
        """Nodes, runs and messages; it keeps payloads and does not shrink."""
        return self.directory / "superlink.db"

    @property
    def secret(self) -> Path:
        return self.directory / "superexec.secret"

    @property
    def certificate(self) -> Path:
        """Self-signed, for the loopback interface alone; members never see it."""
        return self.directory / "loopback.crt"

    @property
    def key(self) -> Path:
        return self.directory / "loopback.key"

    @property
    def log(self) -> Path:
        return self.directory / "superlink.log"

    def prepare(self) -> None:
        """Makes what is missing, and renews the certificate in its last year."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.directory.chmod(0o700)
        if not self.secret.is_file():
            _write_private(self.secret, secrets.token_hex(32).encode("ascii"))
        if not self._certificate_serves():
            certificate, key = _loopback_certificate()
            _write_private(self.key, key)
            write_bytes(self.certificate, certificate)

    def endpoint(self, port: int) -> Endpoint:
        """Where and how the SuperLink of this directory is asked. Raises ConfigError when there never was one."""
        try:
            return Endpoint(f"127.0.0.1:{port}", self.certificate.read_bytes(), self.secret.read_bytes())
        except OSError as error:
            raise ConfigError(f"{self.directory}: no SuperLink was started here yet ({error.strerror})") from error

    def _certificate_serves(self) -> bool:
        try:
            found = x509.load_pem_x509_certificate(self.certificate.read_bytes())
        except (OSError, ValueError):
            return False
        return self.key.is_file() and found.not_valid_after_utc > datetime.now(UTC) + timedelta(days=_RENEW_DAYS)


def _write_private(path: Path, data: bytes) -> None:
    """Readable by its owner from the first byte on."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(handle)
    partial.replace(path)


def _loopback_certificate() -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "silotune loopback")])
    begin = datetime.now(UTC) - timedelta(minutes=5)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=_CERTIFICATE_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return certificate.public_bytes(Encoding.PEM), private


# Ends with its parent, however that ends: the pipe to its standard input then closes.
_CHILD = """\
import os, signal, sys, threading
def watch():
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(5)
    os._exit(1)
threading.Thread(target=watch, daemon=True).start()
"""


class Child:
    """A process that runs installed Python code and does not outlive this one, not even when this one is killed.

    log: takes what it prints, after what is there.
    """

    def __init__(
        self, code: str, arguments: Iterable[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CHILD + code, *arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # a Ctrl-C is for the parent, which ends its children in order
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._process.poll()

    def stop(self, grace_s: float = 4.0) -> int:
        """Ends it, by force after `grace_s`, and returns its exit code."""
        self._process.terminate()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        return int(self._process.returncode)

    def kill(self) -> None:
        """As a power cut would. For tests."""
        self._process.kill()
        self.stop()


def start_superlink(home: SuperLinkHome, port: int) -> Child:
    """Flower's SuperLink on 127.0.0.1, with node authentication, and nobody but a holder of the secret may run an app.

    It answers some seconds later: see `wait_until_ready`.
    """
    home.prepare()
    arguments = [
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--ssl-ca-certfile", str(home.certificate)),
        *("--ssl-certfile", str(home.certificate)),
        *("--ssl-keyfile", str(home.key)),
        "--enable-supernode-auth",
        *("--isolation", "process"),
        *("--superexec-auth-secret-file", str(home.secret)),
        *("--database", str(home.database)),
        "--disable-runtime-dependency-installation",
    ]
    return Child(_SUPERLINK, arguments, home.log, {"FLWR_HOME": str(home.directory / "flower")})


def wait_until_ready(endpoint: Endpoint, child: Child | None = None, timeout_s: float = 60.0) -> None:
    """Returns once the SuperLink answers. Raises ServiceError when its process ended, or the time is up."""
    end = time.monotonic() + timeout_s
    with Operator(endpoint, patience_s=0) as operator:
        while True:
            if child is not None and child.code is not None:
                raise ServiceError(f"the SuperLink ended with code {child.code}; its log says why")
            try:
                operator.nodes()
                return
            except ServiceError as error:
                if time.monotonic() > end:
                    raise ServiceError(
                        f"no SuperLink at {endpoint.address} after {timeout_s:.0f} s: {error}"
                    ) from error
            time.sleep(0.1)


# --- Calls ------------------------------------------------------------------------------------------------------------


class _Proto(Protocol):
    def SerializeToString(self, *, deterministic: bool = ...) -> bytes: ...  # noqa: N802

    def ParseFromString(self, serialized: bytes) -> int: ...  # noqa: N802


R = TypeVar("R", bound=_Proto)


class _Status(ServiceError):
    """An answer with a status other than 200."""

    def __init__(self, method: str, status: int, text: str) -> None:
        super().__init__(f"the SuperLink refused {method}: {status} {text}")
        self.status = status


class _Calls:
    """Calls of one SuperLink on this machine.

    patience_s: how long one that is not there is tried again; not once `stop` is set.
    """

    def __init__(
        self, endpoint: Endpoint, component: str, patience_s: float, stop: threading.Event | None = None
    ) -> None:
        trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trust.load_verify_locations(cadata=endpoint.root.decode("ascii"))
        self._stop = stop or threading.Event()
        self._patience_s = patience_s
        self._http = httpx.Client(
            base_url=f"https://{endpoint.address}",
            verify=trust,
            timeout=30.0,
            trust_env=False,  # a proxy of the environment is not for the loopback interface
            limits=httpx.Limits(keepalive_expiry=30),
            headers={
                **dict(RuntimeVersionMetadata.from_local_component(component).as_metadata()),
                "content-type": PROTOBUF_MEDIA_TYPE,
                "accept": PROTOBUF_MEDIA_TYPE,
                "accept-encoding": "identity",
            },
        )

    def __call__(self, path: str, request: _Proto, response: type[R], headers: Mapping[str, str] | None = None) -> R:
        """One call. Raises _Status, or ServiceError when nobody answers within the patience."""
        body = request.SerializeToString(deterministic=True)
        end = time.monotonic() + self._patience_s
        wait_s = 0.1
        while True:
            try:
                found = self._http.post(path, content=body, headers=dict(headers or {}))
            except httpx.TransportError as error:
                if time.monotonic() >= end or self._stop.is_set():
                    raise ServiceError(f"the SuperLink does not answer {path}: {error}") from error
                self._stop.wait(wait_s * random.uniform(0.5, 1.0))
                wait_s = min(2 * wait_s, 2.0)
                continue
            if found.status_code != httpx.codes.OK:
                raise _Status(path, found.status_code, found.text[:500])
            parsed = response()
            parsed.ParseFromString(found.content)
            return parsed

    def close(self) -> None:
        self._http.close()


# --- The operator -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NodeRecord:
    """A registered node. key: its public key in PEM. online: whether its heart was heard lately."""

    number: int
    name: str
    key: bytes = field(repr=False)
    online: bool = False


@dataclass(frozen=True)
class RunRecord:
    """A run as the SuperLink knows it. status: pending, starting, running or finished; outcome: how it finished."""

    number: int
    status: str
    outcome: str = ""


class Operator:
    """What the coordinator's operator asks of the SuperLink. Close it, or use it in a `with`."""

    def __init__(self, endpoint: Endpoint, patience_s: float = 20.0) -> None:
        self._calls = _Calls(endpoint, "flwr", patience_s)

    def __enter__(self) -> Operator:
        return self

    def __exit__(self, *_: object) -> None:
        self._calls.close()

    def register(self, name: str, key: ec.EllipticCurvePublicKey) -> int:
        """Lets the node with this key take part, and returns its number. A key that is there already keeps its own.

        Raises ServiceError when the key was removed before: Flower does not take one again.
        """
        public = public_key_to_bytes(key)
        for node in self.nodes():
            if node.key == public:
                return node.number
        request = RegisterNodeRequest(public_key=public, name=name)
        return int(self._calls(_CONTROL + "register-node", request, RegisterNodeResponse).node_id)

    def unregister(self, key: ec.EllipticCurvePublicKey) -> bool:
        """Shuts out the node with this key, at once and for good. False when there is none."""
        public = public_key_to_bytes(key)
        for node in self.nodes():
            if node.key == public:
                request = UnregisterNodeRequest(node_id=node.number)
                self._calls(_CONTROL + "unregister-node", request, UnregisterNodeResponse)
                return True
        return False

    def nodes(self) -> tuple[NodeRecord, ...]:
        """All registered nodes."""
        found = self._calls(_CONTROL + "list-nodes", ListNodesRequest(), ListNodesResponse)
        return tuple(
            NodeRecord(node.node_id, node.name, node.public_key, node.status == "online")
            for node in found.nodes_info
            if node.status != "unregistered"
        )

    def names(self) -> Mapping[int, str]:
        """Who stands behind which node's number, as enrolled: not what a node says of itself."""
        return {node.number: node.name for node in self.nodes()}

    def start_run(self) -> int:
        """Creates a run of the installed code; it stays pending until `acquire`. Returns its number."""
        content = bundle()
        fab = Fab(hash_str=hashlib.sha256(content).hexdigest(), content=content)
        started = self._calls(_CONTROL + "start-run", StartRunRequest(fab=fab), StartRunResponse)
        if not started.run_id:
            raise ServiceError("the SuperLink did not start a run; its log says why")
        return int(started.run_id)

    def stop_run(self, number: int) -> bool:
        """Ends a run; whoever drives it is told at its next heartbeat. False when it is over already."""
        try:
            request = StopRunRequest(run_id=number)
            return bool(self._calls(_CONTROL + "stop-run", request, StopRunResponse).success)
        except _Status as error:
            if error.status in (404, 409, 412):
                return False
            raise

    def runs(self) -> tuple[RunRecord, ...]:
        """All runs that the database holds."""
        found = self._calls(_CONTROL + "list-runs", ListRunsRequest(), ListRunsResponse)
        return tuple(RunRecord(run.run_id, run.status.status, run.status.sub_status) for run in found.run_dict.values())


# --- The ServerApp's part of a run ------------------------------------------------------------------------------------


class Task:
    """The ServerApp's part of a run, held by this process from `acquire` to `finish`."""

    def __init__(self, calls: _Calls, token: str, run: int) -> None:
        self.run = run
        self._calls = calls
        self._headers = {TASK_TOKEN_HEADER: token}
        self._over = threading.Event()

    def call(self, method: str, request: _Proto, response: type[R]) -> R:
        """A call in the name of the run. Raises RunStopped once the run is no longer this process's."""
        try:
            return self._calls(_RUNTIME + method, request, response, self._headers)
        except _Status as error:
            if error.status == httpx.codes.UNAUTHORIZED:
                raise stopped() from error
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
                        raise stopped()
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
    calls = _Calls(endpoint, "flwr-serverapp", _PATIENCE_S, stop)
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
                head, tree, parts = _packed(message)
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
                    # The root alone comes too late when the member was quicker, and has all it needs.
                    if not stored and len(parts) > 1:
                        raise ServiceError("the SuperLink did not keep a part of a message")
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


def _error(head: Message, code: int, reason: str) -> Message:
    return make_message(metadata=head.metadata, error=Error(code, reason))


def stopped() -> RunStopped:
    """What a run ends with when the SuperLink no longer has it as running."""
    return RunStopped(
        "the run was stopped, or the SuperLink did not hear of it for a minute. What was reached is kept: "
        "`silotune-server resume` goes on with it."
    )
