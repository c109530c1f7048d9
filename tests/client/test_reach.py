"""The way to the coordinator: every step that can fail is told by name, and asking disturbs nobody."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from flwr.app import Context, Message
from flwr.common import constant as flower
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from client import fleet, node, reach
from client.reach import Way
from common.enrolment import Address
from common.errors import ConfigError, Unreachable
from common.flower import HELLO, to_records
from common.wire import to_wire
from server.authority import authority_certificate, server_certificate
from server.operator import Operator
from tests.deployments import HELLO_ALL, Deployment, ask_by_hand, deployment, free_port, introduction, running

__all__ = ["deployment", "running"]

NOW = datetime.now(UTC)
AUTHORITY_KEY, SERVER_KEY, OTHER_KEY = (ec.generate_private_key(ec.SECP384R1()) for _ in range(3))
AUTHORITY = authority_certificate(AUTHORITY_KEY, "oncology", NOW - timedelta(days=1000))
PEM = AUTHORITY.public_bytes(Encoding.PEM)
NODE = ec.generate_private_key(ec.SECP384R1())


# --- What of Flower is relied on --------------------------------------------------------------------------------------


def test_the_call_has_the_path_and_the_request_that_the_superlink_expects() -> None:
    assert PROTOBUF_REQUEST_TYPES["POST", fleet.ACTIVATE] is ActivateNodeRequest
    asked = ActivateNodeRequest.FromString(fleet.impossible_activation(NODE.public_key()))
    assert not flower.HEARTBEAT_MIN_INTERVAL <= asked.heartbeat_interval <= flower.HEARTBEAT_MAX_INTERVAL
    assert asked.public_key


def test_a_known_node_is_refused_in_another_way_than_an_unknown_one() -> None:
    known, unknown = ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL, ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED
    assert (known, unknown) == (fleet.ENROLLED, fleet.UNKNOWN)
    assert [API_ERROR_MAP[code].http_status_code for code in (known, unknown)] == [400, 412]


def test_clocks_may_be_as_far_apart_as_is_told() -> None:
    assert (fleet.MOST_AHEAD_S, fleet.MOST_BEHIND_S) == (5, 305)


# --- A real coordinator -----------------------------------------------------------------------------------------------


def asked(deployment: Deployment, key: ec.EllipticCurvePrivateKey, apart_s: float = 0.0) -> float | None:
    """All four steps, by a clock that is so far ahead."""

    def clock() -> datetime:
        return datetime.now(UTC) + timedelta(seconds=apart_s)

    with Way(Address("127.0.0.1", deployment.door), deployment.authority, clock=clock) as way:
        assert way.resolve() == ("127.0.0.1",)
        way.connect()
        assert way.greet() > datetime.now(UTC)
        return way.ask(key)


def test_an_enrolled_node_is_known_and_any_other_is_not(deployment: Deployment) -> None:
    key = deployment.key("alder")
    assert asked(deployment, key) == 0
    with pytest.raises(Unreachable, match="expected the coordinator to know this node's key"):
        asked(deployment, NODE)
    deployment.forget_nodes()
    with pytest.raises(Unreachable, match=r"hand card\.json over again"):
        asked(deployment, key)


def test_asking_changes_nothing(deployment: Deployment) -> None:
    key = deployment.key("alder")
    with Operator(deployment.endpoint) as operator:
        before = operator.nodes()
        asked(deployment, key)
        assert operator.nodes() == before
    assert [found.online for found in before] == [False]


def test_a_daemon_with_the_same_key_is_not_disturbed(deployment: Deployment) -> None:
    key = deployment.key("alder")
    answers: list[Message] = []

    def answer(message: Message, context: Context) -> Message:
        asked(deployment, key)  # in the middle of a message
        answers.append(introduction("alder")(message, context))
        return answers[-1]

    with deployment.task() as (grid, _), deployment.node(answer, deployment.connection(key)) as events:
        number = int(events.wait(node.CONNECTED).text.split()[-1])
        asked(deployment, key)
        reply = ask_by_hand(grid, number, to_records(to_wire(HELLO_ALL)), HELLO)
        events.wait(node.ANSWERED)
        assert not reply.has_error()
        with Operator(deployment.endpoint) as operator:
            assert [(found.number, found.online) for found in operator.nodes()] == [(number, True)]
        assert events.kinds().count(node.CONNECTED) == 1
    assert len(answers) == 1


@pytest.mark.parametrize(("apart_s", "told"), [(40, r"[234]\d s ahead"), (-400, r"(3\d\d|400) s behind")])
def test_a_clock_that_is_wrong_is_told_as_such(deployment: Deployment, apart_s: float, told: str) -> None:
    key = deployment.key("alder")
    with pytest.raises(Unreachable, match=f"this machine's clock.*{told}"):
        asked(deployment, key, apart_s)


def test_a_clock_that_is_somewhat_wrong_is_measured(deployment: Deployment) -> None:
    found = asked(deployment, deployment.key("alder"), -100)
    assert found is not None
    assert -100 <= found <= -80


@pytest.mark.parametrize(
    ("date_s", "found"),
    [(0.0, 0.0), (0.9, 0.0), (-0.9, 0.0), (-1.9, 0.0), (-11.0, 9.0), (30.0, -29.5)],
)
def test_clocks_agree_as_far_as_can_be_told(date_s: float, found: float) -> None:
    begun = datetime(2030, 1, 31, 12, tzinfo=UTC)
    date = format_datetime((begun + timedelta(seconds=date_s)).replace(microsecond=0), usegmt=True)
    assert reach.ahead(begun, begun + timedelta(seconds=0.5), date) == pytest.approx(found)


@pytest.mark.parametrize("date", ["", "tomorrow", "Thu, 31 Jan 2030 12:00:00"])
def test_what_is_no_date_tells_nothing(date: str) -> None:
    assert reach.ahead(NOW, NOW, date) is None


# --- What can stand in the way ----------------------------------------------------------------------------------------


@contextmanager
def door(
    directory: Path,
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost"),
    made: datetime = NOW,
    authority_key: ec.EllipticCurvePrivateKey = AUTHORITY_KEY,
    newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
    status: int = 200,
    content: bytes = b"",
) -> Iterator[Address]:
    """A server behind TLS that answers everything alike."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    public = SERVER_KEY.public_key()
    issuer = authority_certificate(authority_key, "oncology", NOW - timedelta(days=1000))
    (directory / "door.crt").write_bytes(
        server_certificate(issuer, authority_key, public, hosts, made).public_bytes(Encoding.PEM)
    )
    (directory / "door.key").write_bytes(
        SERVER_KEY.private_bytes(Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = newest
    context.load_cert_chain(directory / "door.crt", directory / "door.key")
    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that hangs up is what is tried
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield Address("127.0.0.1", server.server_address[1])
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def greeted(address: Address) -> datetime:
    with Way(address, PEM, timeout_s=10) as way:
        way.connect()
        return way.greet()


def test_a_certificate_of_the_pinned_authority_is_taken(tmp_path: Path) -> None:
    with door(tmp_path) as address:
        assert abs(greeted(address) - NOW - timedelta(days=365)) < timedelta(seconds=2)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"authority_key": OTHER_KEY}, "found one of another"),
        ({"made": NOW - timedelta(days=366)}, "found one that has expired"),
        ({"made": NOW + timedelta(days=2)}, "found one that is not valid yet"),
        ({"hosts": ("10.0.0.7",)}, "expected a certificate for 127.0.0.1, found one of the pinned authority for other"),
        ({"newest": ssl.TLSVersion.TLSv1_2}, "expected TLS 1.3"),
    ],
    ids=["another authority", "expired", "not yet valid", "another name", "TLS 1.2"],
)
def test_each_way_to_be_mistrusted_has_its_own_words(tmp_path: Path, changes: dict[str, object], told: str) -> None:
    with door(tmp_path, **changes) as address, pytest.raises(Unreachable, match=told):  # type: ignore[arg-type]
        greeted(address)


def test_a_name_is_compared_as_well_as_an_address(tmp_path: Path) -> None:
    with (
        door(tmp_path, hosts=("coordinator.example.org",)) as address,
        pytest.raises(Unreachable, match=r"expected a certificate for localhost, .*for other names"),
    ):
        greeted(Address("localhost", address.port))


@pytest.mark.parametrize(
    ("status", "content", "told"),
    [
        (404, b"", "something that answers 404"),
        (400, b'{"code": 1}', r"something that answers 400 \(1\)"),
        (400, b"\xff", "something that answers 400"),
        (412, b'{"code": 2003}', "something that answers 412"),
        (200, b"", "something that answers 200"),
        (401, b"", "signature, found it refused although the clocks agree"),
        (503, b"", "away at present"),
    ],
)
def test_only_a_coordinator_passes_for_one(tmp_path: Path, status: int, content: bytes, told: str) -> None:
    with door(tmp_path, status=status, content=content) as address, Way(address, PEM) as way:
        way.connect()
        way.greet()
        with pytest.raises(Unreachable, match=told):
            way.ask(NODE)


def test_a_clock_that_may_be_what_is_wrong_is_told_as_such(tmp_path: Path) -> None:
    def clock() -> datetime:
        return datetime.now(UTC) + timedelta(seconds=6)

    with door(tmp_path, status=401) as address, Way(address, PEM, clock=clock) as way:
        way.connect()
        way.greet()
        with pytest.raises(Unreachable, match=r"this machine's clock .* found it \d s ahead"):
            way.ask(NODE)


def test_nobody_there_is_told() -> None:
    with Way(Address("127.0.0.1", free_port()), PEM) as way, pytest.raises(Unreachable, match="nobody listens"):
        way.connect()


def test_a_name_that_nobody_knows_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with (
        Way(Address("coordinator.example.org", 443), PEM) as way,
        pytest.raises(Unreachable, match=r"an address for coordinator\.example\.org, found none \(Name or service"),
    ):
        way.resolve()


@contextmanager
def listening(then: Callable[[socket.socket], None]) -> Iterator[Address]:
    """A port where each connection meets with `then`."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection, suppress(OSError):
                        then(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Address("127.0.0.1", server.getsockname()[1])
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(10)


@pytest.mark.parametrize(
    "then",
    [
        lambda found: found.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        lambda found: None,
        lambda found: (found.settimeout(5), found.recv(1 << 16), found.recv(1)),
    ],
    ids=["plain HTTP", "hangs up", "says nothing"],
)
def test_a_port_without_tls_is_told(then: Callable[[socket.socket], None]) -> None:
    with listening(then) as address, Way(address, PEM, timeout_s=0.5) as way:
        way.connect()
        with pytest.raises(Unreachable, match=r"expected TLS 1\.3"):
            way.greet()


def test_an_authority_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected certificates in PEM"):
        fleet.trust_in(b"none")
