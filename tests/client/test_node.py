"""An institution's connection: what it answers, what it refuses, what it survives; with a real SuperLink behind TLS."""

from __future__ import annotations

import hashlib
import inspect
import io
import os
import re
import signal
import socket
import ssl
import sys
import threading
import time
import zipfile
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Message, RecordDict
from flwr.proto import control_pb2, fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from client import calls, fleet, node, node_memory
from client import events as told_of
from client.node_memory import NodeMemory
from common.errors import ConfigError, StorageError
from common.flower import HELLO, ROUND, SECURE, to_records
from common.messages import BUNDLE_REFUSED, INTERNAL_ERROR, MESSAGE_TYPE_REFUSED
from common.wire import Wire, to_wire
from server.loopback import LoopbackGrid, Task, acquire
from server.operator import Operator
from server.superlink import loopback_certificate
from tests.deployments import (
    HELLO_ALL,
    Deployment,
    ask_by_hand,
    deployment,
    free_port,
    introduction,
    reply_in,
    running,
)

__all__ = ["deployment", "running"]

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


def hello() -> RecordDict:
    return to_records(to_wire(HELLO_ALL))


def told(message: Message) -> dict[str, Any]:
    """The small fields of a reply."""
    import json

    found: dict[str, Any] = json.loads(reply_in(message).text)
    return found


def refusal(reason: str) -> dict[str, Any]:
    return {"reason": reason, "name": "", "parts": []}


def number_of(deployment: Deployment, name: str) -> int:
    with Operator(deployment.endpoint) as operator:
        return next(found.number for found in operator.nodes() if found.name == name)


# --- What of Flower is relied on --------------------------------------------------------------------------------------

CALLS = {
    "activate-node": fleet_pb2.ActivateNodeRequest,
    "confirm-message-received": message_pb2.ConfirmMessageReceivedRequest,
    "deactivate-node": fleet_pb2.DeactivateNodeRequest,
    "get-fab": fab_pb2.GetFabRequest,
    "get-run": run_pb2.GetRunRequest,
    "pull-messages": fleet_pb2.PullMessagesRequest,
    "pull-object": message_pb2.PullObjectRequest,
    "push-messages": fleet_pb2.PushMessagesRequest,
    "push-object": message_pb2.PushObjectRequest,
    "send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest,
}


@pytest.mark.parametrize(("method", "request_type"), CALLS.items(), ids=list(CALLS))
def test_a_call_has_the_path_and_the_request_that_the_superlink_expects(method: str, request_type: type) -> None:
    assert PROTOBUF_REQUEST_TYPES["POST", f"/v1/fleet/{method}"] is request_type


def test_the_calls_that_are_checked_are_all_that_are_made() -> None:
    source = inspect.getsource(node) + inspect.getsource(calls)
    assert set(re.findall(r'(?:\.call|\._insist)\("([a-z-]+)"', source)) == set(CALLS)


def test_helpers_of_flower_take_what_they_are_given() -> None:
    def parameters(function: Callable[..., Any]) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert parameters(fleet.sign_message) == ["private_key", "message"]
    assert parameters(fleet.public_key_to_bytes) == ["public_key"]
    assert parameters(node.message_from_proto) == ["message_proto"]
    assert parameters(node_memory.message_to_proto) == ["message"]
    assert parameters(node_memory.remove_content_from_message) == ["message"]
    assert parameters(node.iterate_object_tree) == ["tree"]
    assert parameters(node.inflate_object_from_contents)[:2] == ["object_id", "object_contents"]
    assert parameters(fleet.RuntimeVersionMetadata.from_local_component)[0] == "component_name"
    assert calls.HEARTBEAT_MIN_INTERVAL == 10
    assert {"clientapp_runtime_list", "message_object_trees", "messages_list", "node"} <= {
        found.name for found in fleet_pb2.PushMessagesRequest.DESCRIPTOR.fields
    }


def test_flower_does_not_call_home() -> None:
    for module in ("client.node", "server.loopback"):
        code = (
            f"import {module}; import flwr.supercore.telemetry as found; import os;"
            "assert found.FLWR_TELEMETRY_ENABLED == '0' and os.environ['FLWR_DISABLE_UPDATE_CHECK'] == '1'"
        )
        clean = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
        import subprocess

        assert subprocess.run([sys.executable, "-c", code], env=clean, check=False).returncode == 0


# --- Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"heartbeat_s": 5}, {"heartbeat_s": 2000}, {"quickest_poll_s": 0}])
def test_a_connection_that_cannot_work_is_refused_at_once(changes: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        node.Connection("127.0.0.1:1", b"", ec.generate_private_key(ec.SECP384R1()), **changes)  # type: ignore[arg-type]


def test_neither_key_nor_authority_is_printed() -> None:
    connection = node.Connection("127.0.0.1:1", b"an authority", ec.generate_private_key(ec.SECP384R1()))
    assert "authority" not in repr(connection)
    assert "key" not in repr(connection)


def test_waits_grow_differ_and_end() -> None:
    waits = [node._backoff(tries, 15) for tries in range(40)]
    assert waits[0] <= 0.5
    assert all(7.5 <= wait <= 15 for wait in waits[6:])
    assert len(set(waits)) == 40


@pytest.mark.parametrize(("apart_s", "told"), [(0, False), (-90, True), (400, True)])
def test_a_clock_that_is_wrong_is_told_as_such(apart_s: int, told: bool) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=apart_s), usegmt=True)
    refused = calls.refusal("pull-messages", httpx.Response(401, headers={"date": date}))
    assert isinstance(refused, calls.Broken)
    assert refused.event.kind == told_of.NOT_ENROLLED
    assert ("clock" in refused.event.text) == told


def test_a_memory_counts_on_the_same_boot_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = NodeMemory(tmp_path / "memory")
    with pytest.raises(ConfigError, match="another process is this node already"):
        NodeMemory(tmp_path / "memory")
    assert memory.node() is None
    memory.keep_node(12)
    assert memory.node() == 12
    monkeypatch.setattr(node_memory, "_boot", lambda: "a copy of the disk in another machine")
    assert memory.node() is None
    monkeypatch.undo()
    (tmp_path / "memory" / "node.json").write_text("{half", encoding="utf-8")
    (tmp_path / "memory" / "in-hand.bin").write_bytes(b"\xff half")
    assert memory.node() is None
    assert memory.in_hand() is None
    memory.close()
    NodeMemory(tmp_path / "memory").close()


def test_an_authority_that_is_none_is_refused_at_once() -> None:
    connection = node.Connection("127.0.0.1:1", b"no certificate", ec.generate_private_key(ec.SECP384R1()))
    with pytest.raises(ConfigError, match="expected certificates in PEM"):
        node.serve(connection, echo, set(), threading.Event())


# --- What is answered -------------------------------------------------------------------------------------------------


@pytest.fixture
def task(deployment: Deployment) -> Iterator[tuple[LoopbackGrid, Task]]:
    with deployment.task() as found:
        yield found


def echo(message: Message, context: Context) -> Message:
    """The array that came, and what else the ClientApp was given."""
    arrays = message.content.array_records.get("arrays")
    array = next(iter(arrays.values())).numpy() if arrays else np.zeros(0, np.uint32)
    text = f"{context.run_id} {context.node_id} {context.node_config} {context.run_config} {len(context.state)}"
    return Message(to_records(Wire("Echo", text, {"array": array} if arrays else {})), reply_to=message)


@pytest.mark.parametrize("kind", [HELLO, ROUND, SECURE])
@pytest.mark.parametrize("elements", [0, 5, 4_000_000], ids=["without an array", "a short array", "16 MB"])
def test_a_message_of_the_protocol_is_answered(
    deployment: Deployment, task: tuple[LoopbackGrid, Task], kind: str, elements: int
) -> None:
    grid, held = task
    array = np.arange(elements, dtype=np.uint32)
    with deployment.node(echo, deployment.connection(deployment.key("alder"))) as events:
        events.wait(told_of.CONNECTED)
        number = number_of(deployment, "alder")
        content = to_records(Wire("Ask", "{}", {"array": array} if elements else {}))
        reply = ask_by_hand(grid, number, content, kind, timeout_s=60)
        events.wait(told_of.ANSWERED)
    assert not reply.has_error()
    # Nothing of the run's configuration or of the coordinator's node settings comes through.
    assert reply_in(reply).text == f"{held.run} {number} {{}} {{}} 0"
    if elements:
        assert np.array_equal(reply_in(reply).arrays["array"], array)


def test_how_long_an_answer_took_is_not_told(deployment: Deployment, task: tuple[LoopbackGrid, Task]) -> None:
    def slowly(message: Message, context: Context) -> Message:
        time.sleep(0.5)
        return echo(message, context)

    grid, held = task
    with deployment.node(slowly, deployment.connection(deployment.key("alder"))) as events:
        events.wait(told_of.CONNECTED)
        ask_by_hand(grid, number_of(deployment, "alder"), hello(), HELLO)
    with Operator(deployment.endpoint) as operator:
        found = operator._calls("/v1/control/list-runs", control_pb2.ListRunsRequest(), control_pb2.ListRunsResponse)
        assert found.run_dict[held.run].clientapp_runtime == 0


def test_an_answer_that_fails_is_a_reason_code_and_no_text(
    deployment: Deployment, task: tuple[LoopbackGrid, Task], caplog: pytest.LogCaptureFixture
) -> None:
    def fails(message: Message, context: Context) -> Message:
        raise SystemExit("patient 4711 of /data/cardiology")

    grid, _ = task
    with deployment.node(fails, deployment.connection(deployment.key("alder"))) as events:
        events.wait(told_of.CONNECTED)
        for _ in range(2):
            reply = ask_by_hand(grid, number_of(deployment, "alder"), hello(), HELLO)
            assert told(reply) == refusal(INTERNAL_ERROR)
            assert "4711" not in str(reply)
    assert "patient 4711" in caplog.text  # in its own log


def test_a_reply_is_recorded_before_it_leaves_or_does_not_leave(
    deployment: Deployment, task: tuple[LoopbackGrid, Task]
) -> None:
    grid, _ = task
    recorded: list[Message] = []

    def record(message: Message) -> None:
        recorded.append(message)
        if len(recorded) == 2:
            raise OSError("the disk is full")

    connection = deployment.connection(deployment.key("alder"))
    with deployment.node(echo, connection, record=record) as events:
        events.wait(told_of.CONNECTED)
        number = number_of(deployment, "alder")
        first = ask_by_hand(grid, number, hello(), HELLO)
        assert reply_in(recorded[0]) == reply_in(first)
        message = Message(hello(), dst_node_id=number, message_type=HELLO, ttl=60)
        waiting = list(grid.push_messages([message]))
        assert "disk is full" in events.wait(told_of.LOST).text
        assert list(grid.pull_messages(waiting)) == []
        refused = ask_by_hand(grid, number, hello(), "query.other")  # what is refused is recorded too
        assert reply_in(recorded[2]) == reply_in(refused)


@pytest.mark.parametrize("kind", ["query.other", "train.round_", "train.secure_aggregation2", "evaluate.round"])
def test_any_other_type_of_message_is_refused_and_answered(
    deployment: Deployment, task: tuple[LoopbackGrid, Task], kind: str
) -> None:
    grid, _ = task
    asked: list[Message] = []

    def never(message: Message, context: Context) -> Message:
        asked.append(message)
        return echo(message, context)

    with deployment.node(never, deployment.connection(deployment.key("alder"))) as events:
        events.wait(told_of.CONNECTED)
        reply = ask_by_hand(grid, number_of(deployment, "alder"), hello(), kind)
        assert told(reply) == refusal(MESSAGE_TYPE_REFUSED)
        assert repr(kind) in events.wait(told_of.REFUSED).text
    assert asked == []


def hostile_bundle(trace: Path) -> bytes:
    """A bundle that leaves a file behind when any of it is imported."""
    packed = io.BytesIO()
    code = f"open({str(trace)!r}, 'w').write('I was here')\n"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(
            "pyproject.toml",
            '[project]\nname = "evil"\nversion = "1"\nlicense = { text = "x" }\ndependencies = []\n'
            '[tool.flwr.app]\npublisher = "evil"\n'
            '[tool.flwr.app.components]\nserverapp = "evil:app"\nclientapp = "evil:app"\n',
        )
        archive.writestr("evil/__init__.py", code)
        archive.writestr("evil.py", code)
        archive.writestr("sitecustomize.py", code)
        archive.writestr("../../evil.py", code)
    return packed.getvalue()


def test_a_bundle_that_is_not_listed_is_refused_and_never_touched(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace"
    content = hostile_bundle(trace)
    home = tmp_path / "flower"
    monkeypatch.setenv("FLWR_HOME", str(home))
    asked: list[Message] = []

    def never(message: Message, context: Context) -> Message:
        asked.append(message)
        return echo(message, context)

    with Operator(deployment.endpoint) as operator:
        # It says of itself that it is the listed one.
        fab = fab_pb2.Fab(hash_str=hashlib.sha256(b"another").hexdigest(), content=content)
        request = control_pb2.StartRunRequest(fab=fab)
        started = operator._calls("/v1/control/start-run", request, control_pb2.StartRunResponse)
    held = acquire(deployment.endpoint, started.run_id)
    grid, _ = held.begin()
    before = set(tmp_path.rglob("*"))
    memory = tmp_path / "memory"
    try:
        connection = deployment.connection(deployment.key("alder"), memory=memory)
        with deployment.node(never, connection) as events:
            events.wait(told_of.CONNECTED)
            for kind in (HELLO, ROUND, SECURE, "query.other"):
                reply = ask_by_hand(grid, number_of(deployment, "alder"), hello(), kind)
                expected = BUNDLE_REFUSED if kind != "query.other" else MESSAGE_TYPE_REFUSED
                assert told(reply) == refusal(expected)
            assert events.kinds().count(told_of.REFUSED) == 4
    finally:
        held.finish(completed=True)
        held.close()
    assert asked == []
    assert not trace.exists()
    assert "evil" not in sys.modules
    assert not home.exists()
    assert set(tmp_path.rglob("*")) - before == {memory, memory / "node.json", memory / "lock"}


# --- Who is let in ----------------------------------------------------------------------------------------------------


def test_a_node_that_nobody_enrolled_stays_outside_and_goes_on_asking(deployment: Deployment) -> None:
    key = deployment.key()
    with deployment.node(echo, deployment.connection(key)) as events:
        assert "not enrolled" in events.wait(told_of.NOT_ADMITTED).text
        with Operator(deployment.endpoint) as operator:
            assert operator.nodes() == ()
            operator.register("alder", key.public_key())
        events.wait(told_of.CONNECTED)
        with Operator(deployment.endpoint) as operator:
            assert operator.unregister(operator.nodes()[0].number)
        events.wait(told_of.NOT_ENROLLED)


def test_a_coordinator_with_another_authority_learns_nothing(deployment: Deployment) -> None:
    stranger = replace(deployment.connection(deployment.key("alder")), authority=loopback_certificate()[0])
    with deployment.node(echo, stranger) as events:
        assert "pinned authority" in events.wait(told_of.UNTRUSTED).text
    with Operator(deployment.endpoint) as operator:
        assert [found.online for found in operator.nodes()] == [False]


def test_what_a_machine_trusts_is_not_trusted(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(deployment.root / "door.crt"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    stranger = replace(deployment.connection(deployment.key("alder")), authority=loopback_certificate()[0])
    with deployment.node(echo, stranger) as events:
        events.wait(told_of.UNTRUSTED)
    with deployment.node(echo, deployment.connection(deployment.key("birch"))) as events:
        events.wait(told_of.CONNECTED)  # and the environment's proxy is not asked


def _signed(
    deployment: Deployment, path: str, request: Any, shown: ec.EllipticCurvePublicKey, key: ec.EllipticCurvePrivateKey
) -> httpx.Response:
    """A call as a node would make it that shows one key and signs with another."""
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trust.load_verify_locations(cadata=deployment.authority.decode("ascii"))
    moment = datetime.now(UTC).isoformat()
    headers = {
        "content-type": "application/protobuf",
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_key_to_bytes(shown)).decode("ascii"),
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(key, moment.encode("ascii"))).decode("ascii"),
        "flwr-timestamp": moment,
    }
    with httpx.Client(verify=trust, trust_env=False) as client:
        address = f"https://127.0.0.1:{deployment.door}{path}"
        return client.post(address, content=request.SerializeToString(), headers=headers)


def test_a_stolen_roster_is_of_no_use(deployment: Deployment) -> None:
    """Public keys, names and numbers of the members, without a private key."""
    member, thief = deployment.key("alder"), deployment.key()
    number = number_of(deployment, "alder")
    whole = node.Node(node_id=number)
    calls = {
        "/v1/fleet/activate-node": fleet_pb2.ActivateNodeRequest(
            public_key=public_key_to_bytes(member.public_key()), heartbeat_interval=30
        ),
        "/v1/fleet/pull-messages": fleet_pb2.PullMessagesRequest(node=whole),
        "/v1/fleet/send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest(node=whole, heartbeat_interval=30),
    }
    for path, request in calls.items():
        for shown in (member.public_key(), thief.public_key()):
            assert _signed(deployment, path, request, shown, thief).status_code == 401
    assert _signed(deployment, "/v1/fleet/activate-node", calls["/v1/fleet/activate-node"], member.public_key(), member)


def test_a_member_does_not_speak_for_another(deployment: Deployment) -> None:
    key, other = deployment.key("alder"), deployment.key("birch")
    request = fleet_pb2.PullMessagesRequest(node=node.Node(node_id=number_of(deployment, "birch")))
    assert _signed(deployment, "/v1/fleet/pull-messages", request, key.public_key(), key).status_code == 401
    assert _signed(deployment, "/v1/fleet/pull-messages", request, other.public_key(), other).status_code == 200


@pytest.mark.parametrize(
    ("path", "request_type"),
    sorted((path, found) for (_, path), found in PROTOBUF_REQUEST_TYPES.items() if "/fleet/" not in path),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_member_reaches_neither_the_operators_interface_nor_the_apps(
    deployment: Deployment, path: str, request_type: Any
) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    answer = _signed(deployment, path, request_type(), key.public_key(), key)
    assert (answer.status_code, answer.content) == (404, b"")


def test_an_operators_own_node_is_not_to_be_had_through_the_door(deployment: Deployment) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    request = fleet_pb2.RegisterNodeFleetRequest(public_key=public_key_to_bytes(key.public_key()))
    assert _signed(deployment, "/v1/fleet/register-node", request, key.public_key(), key).status_code == 404


# --- What it survives -------------------------------------------------------------------------------------------------


def test_nobody_there_is_no_reason_to_end(tmp_path: Path) -> None:
    stop, events = threading.Event(), []
    interrupted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: interrupted.append(number))
    try:
        connection = node.Connection(
            f"127.0.0.1:{free_port()}", loopback_certificate()[0], ec.generate_private_key(ec.SECP384R1())
        )
        thread = threading.Thread(target=node.serve, args=(connection, echo, set(), stop, events.append))
        thread.start()
        time.sleep(1.5)
        assert thread.is_alive()
        stop.set()
        thread.join(5)
        assert not thread.is_alive()
    finally:
        signal.signal(signal.SIGINT, before)
    assert [event.kind for event in events] == [told_of.UNREACHABLE, told_of.STOPPED]
    assert interrupted == []


def test_what_is_no_superlink_is_no_reason_to_end(tmp_path: Path) -> None:
    """A peer that accepts, and speaks something else."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        stop, events = threading.Event(), []
        connection = node.Connection(
            f"127.0.0.1:{listening.getsockname()[1]}",
            loopback_certificate()[0],
            ec.generate_private_key(ec.SECP384R1()),
            timeout_s=0.5,
        )
        thread = threading.Thread(target=node.serve, args=(connection, echo, set(), stop, events.append))
        thread.start()
        peer, _ = listening.accept()
        peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        peer.close()
        time.sleep(1)
        assert thread.is_alive()
        stop.set()
        thread.join(5)
        assert not thread.is_alive()
    assert told_of.UNREACHABLE in {event.kind for event in events}


def test_it_stops_within_seconds_with_an_answer_under_way(
    deployment: Deployment, task: tuple[LoopbackGrid, Task], tmp_path: Path
) -> None:
    begun, release = threading.Event(), threading.Event()

    def trains(message: Message, context: Context) -> Message:
        begun.set()
        release.wait(60)
        return echo(message, context)

    grid, _ = task
    connection = deployment.connection(deployment.key("alder"), memory=tmp_path / "memory", grace_s=0.5)
    with deployment.node(trains, connection) as events:
        events.wait(told_of.CONNECTED)
        message = Message(hello(), dst_node_id=number_of(deployment, "alder"), message_type=HELLO, ttl=60)
        waiting = list(grid.push_messages([message]))
        assert begun.wait(20)
        begin = time.monotonic()
    assert time.monotonic() - begin < 4
    (reply,) = grid.pull_messages(waiting)
    assert reply.error.code == 5  # the node is not there: nobody waits for it
    release.set()
    assert (tmp_path / "memory" / "in-hand.bin").is_file()
    with Operator(deployment.endpoint) as operator:
        assert [found.online for found in operator.nodes()] == [False]


def test_a_run_that_ends_while_it_answers_ends_nothing_here(deployment: Deployment) -> None:
    begun, release = threading.Event(), threading.Event()

    def trains(message: Message, context: Context) -> Message:
        begun.set()
        release.wait(60)
        return echo(message, context)

    connection = deployment.connection(deployment.key("alder"))
    with deployment.node(trains, connection) as events:
        events.wait(told_of.CONNECTED)
        number = number_of(deployment, "alder")
        with deployment.task() as (grid, _):
            list(grid.push_messages([Message(hello(), dst_node_id=number, message_type=HELLO, ttl=60)]))
            assert begun.wait(20)
        release.set()
        assert events.wait(told_of.LOST).text == "the run is over"
        with deployment.task() as (grid, _):
            assert not ask_by_hand(grid, number, hello(), HELLO).has_error()


def test_a_coordinator_that_no_longer_waits_is_not_answered(
    deployment: Deployment, task: tuple[LoopbackGrid, Task]
) -> None:
    def slowly(message: Message, context: Context) -> Message:
        time.sleep(2)
        return echo(message, context)

    grid, _ = task
    with deployment.node(slowly, deployment.connection(deployment.key("alder"))) as events:
        events.wait(told_of.CONNECTED)
        number = number_of(deployment, "alder")
        list(grid.push_messages([Message(hello(), dst_node_id=number, message_type=HELLO, ttl=1)]))
        assert "no longer waits" in events.wait(told_of.LOST).text


def test_a_disk_that_is_full_is_no_reason_to_end(
    deployment: Deployment, task: tuple[LoopbackGrid, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageError("cannot write: no space left")

    grid, _ = task
    connection = deployment.connection(deployment.key("alder"), memory=tmp_path)
    with deployment.node(echo, connection) as events:
        events.wait(told_of.CONNECTED)
        number = number_of(deployment, "alder")
        monkeypatch.setattr(node_memory, "write_bytes", full)
        list(grid.push_messages([Message(hello(), dst_node_id=number, message_type=HELLO, ttl=60)]))
        assert "no space left" in events.wait(told_of.LOST).text
        monkeypatch.undo()
        assert not ask_by_hand(grid, number, hello(), HELLO).has_error()


def test_a_call_that_never_works_is_given_up_and_the_next_message_answered(
    deployment: Deployment, task: tuple[LoopbackGrid, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a SuperLink that has lost its head about one run."""
    honest = calls.Fleet.call

    def call(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        if method == "confirm-message-received":
            raise calls.refusal(method, httpx.Response(500))
        return honest(self, method, *arguments, **options)

    grid, _ = task
    with deployment.node(echo, deployment.connection(deployment.key("alder"))) as events:
        events.wait(told_of.CONNECTED)
        number = number_of(deployment, "alder")
        monkeypatch.setattr(calls.Fleet, "call", call)
        monkeypatch.setattr(node, "_backoff", lambda *_: 0.05)
        list(grid.push_messages([Message(hello(), dst_node_id=number, message_type=HELLO, ttl=60)]))
        assert "status 500" in events.wait(told_of.LOST).text
        monkeypatch.undo()
        assert not ask_by_hand(grid, number, hello(), HELLO).has_error()


def test_what_cannot_be_read_is_refused(deployment: Deployment, task: tuple[LoopbackGrid, Task]) -> None:
    """Parts that are no message, sent by a coordinator that means harm."""
    grid, held = task
    message = Message(to_records(Wire("x", "{}", {"a": np.zeros(3, np.uint32)})), 0, HELLO, ttl=60)
    with deployment.node(echo, deployment.connection(deployment.key("alder"))) as events:
        events.wait(told_of.CONNECTED)
        message.metadata.dst_node_id = number_of(deployment, "alder")
        message.metadata.__dict__["_message_id"] = message.object_id
        head = node_memory.message_to_proto(node_memory.remove_content_from_message(message))
        # The tree leads to a part that is no message.
        part = message.content
        from flwr.proto.runtime_pb2 import PushAppMessagesRequest, PushAppMessagesResponse

        head.metadata.message_id = part.object_id
        tree = get_object_tree(part)
        taken = held.call(
            "push-messages",
            PushAppMessagesRequest(messages_list=[head], message_object_trees=[tree]),
            PushAppMessagesResponse,
        )
        for name, found in get_all_nested_objects(part).items():
            request = message_pb2.PushObjectRequest(
                node=node.Node(node_id=1),
                run_id=held.run,
                object_id=name,
                object_content=found.deflate(),
                session_id=taken.session_id,
            )
            held.call("push-object", request, message_pb2.PushObjectResponse)
        end = time.monotonic() + 15
        replies: list[Message] = []
        while not replies and time.monotonic() < end:
            replies = list(grid.pull_messages(list(taken.message_ids)))
            time.sleep(0.05)
        assert told(replies[0]) == refusal(INTERNAL_ERROR)
        events.wait(told_of.ANSWERED)


def test_two_nodes_with_one_key_do_not_take_part_together(deployment: Deployment, tmp_path: Path) -> None:
    key = deployment.key("alder")
    with (
        deployment.node(introduction("alder"), deployment.connection(key)) as first,
        deployment.node(introduction("alder"), deployment.connection(key, memory=tmp_path)) as second,
    ):
        end = time.monotonic() + 60
        expected = {told_of.NOT_ADMITTED, told_of.CONNECTED}
        while time.monotonic() < end and not expected <= {*first.kinds(), *second.kinds()}:
            time.sleep(0.05)
        connected = [events for events in (first, second) if told_of.CONNECTED in events.kinds()]
        assert len(connected) == 1
