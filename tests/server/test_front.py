"""The members' door: what passes, what does not, and what one who is not a member can take up."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.superlink.routers.fleet.router import router
from uvicorn.protocols.http.h11_impl import H11Protocol

from server import front
from server.front import METHODS, Limits, serve_front
from server.superlink import loopback_certificate
from tests.deployments import wait_for

PATH = "/v1/fleet/pull-messages"
LIMITS = Limits(body_bytes=6 * 2**20, connections=40, connections_each=12, quiet_s=1.0, request_s=4.0)


@dataclass
class Upstream:
    """Stands for the SuperLink: answers anything, and remembers what it was asked."""

    address: str = ""
    certificate: bytes = b""
    seen: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    answer: bytes = b"the answer"
    status: int = 200
    delay_s: float = 0.0


@contextmanager
def an_upstream(directory: Path) -> Iterator[Upstream]:
    upstream = Upstream()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", "0")))
            upstream.seen.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            time.sleep(upstream.delay_s)
            self.send_response(upstream.status)
            self.send_header("Content-Type", "application/protobuf")
            self.send_header("Set-Cookie", "tracked=1")
            self.send_header("Content-Length", str(len(upstream.answer)))
            with suppress(OSError):  # the door may have given up
                self.end_headers()
                self.wfile.write(upstream.answer)

        def log_message(self, *_: Any) -> None:
            pass

    upstream.certificate, key = loopback_certificate()
    (directory / "up.crt").write_bytes(upstream.certificate)
    (directory / "up.key").write_bytes(key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "up.crt", directory / "up.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.daemon_threads = True
    upstream.address = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield upstream
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Door:
    port: int
    authority: bytes
    upstream: Upstream

    def trust(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=self.authority.decode("ascii"))
        return context

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=f"https://127.0.0.1:{self.port}", verify=self.trust(), trust_env=False, timeout=10)

    def connect(self) -> ssl.SSLSocket:
        raw = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        return self.trust().wrap_socket(raw, server_hostname="127.0.0.1")

    def raw(self, request: bytes) -> bytes:
        """What comes back of these very bytes, to the end of the connection."""
        with self.connect() as connection:
            with suppress(ConnectionError, ssl.SSLError):  # it may have been hung up on already
                connection.sendall(request)
            return read_all(connection)

    def status(self, target: bytes, method: bytes = b"POST", head: bytes = b"", body: bytes = b"x") -> int:
        length = b"content-length: %d\r\n" % len(body)
        first = method + b" " + target + b" HTTP/1.1\r\nhost: door\r\n"
        answer = self.raw(first + head + length + b"connection: close\r\n\r\n" + body)
        return int(answer.split(b" ")[1]) if answer else 0


def read_all(connection: ssl.SSLSocket) -> bytes:
    found = b""
    try:
        while part := connection.recv(65536):
            found += part
    except (ConnectionError, ssl.SSLError, TimeoutError):
        pass
    return found


@contextmanager
def a_door(directory: Path, upstream: Upstream, limits: Limits = LIMITS) -> Iterator[Door]:
    certificate, key = loopback_certificate()
    (directory / "door.crt").write_bytes(certificate)
    (directory / "door.key").write_bytes(key)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    stop, ready = threading.Event(), threading.Event()
    thread = threading.Thread(
        target=serve_front,
        args=("127.0.0.1", port, directory / "door.crt", directory / "door.key"),
        kwargs={
            "upstream": upstream.address,
            "upstream_root": upstream.certificate,
            "stop": stop,
            "limits": limits,
            "on_ready": ready.set,
        },
    )
    thread.start()
    try:
        assert ready.wait(10)
        yield Door(port, certificate, upstream)
    finally:
        stop.set()
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    directory = tmp_path_factory.mktemp("front")
    with an_upstream(directory) as upstream, a_door(directory, upstream) as found:
        yield found


@pytest.fixture
def door(running: Door) -> Door:
    running.upstream.seen.clear()
    running.upstream.status, running.upstream.delay_s, running.upstream.answer = 200, 0.0, b"the answer"
    return running


# --- What of others is relied on --------------------------------------------------------------------------------------


def test_what_passes_is_what_flower_serves_to_members() -> None:
    served = {re.sub(r"^/v1/fleet/", "", route.path) for route in router.routes}  # type: ignore[attr-defined]
    # These two are for anonymous nodes, and refused by a SuperLink with node authentication.
    assert set(METHODS) == served - {"register-node", "unregister-node"}


def test_uvicorn_has_what_the_guard_stands_on() -> None:
    import inspect

    source = inspect.getsource(H11Protocol)
    assert '"raw_path": full_raw_path' in source
    for name in ("connection_made", "connection_lost", "on_response_complete"):
        assert hasattr(H11Protocol, name)
    assert "self.cycle" in source
    assert "self.client" in source


# --- What passes ------------------------------------------------------------------------------------------------------


def test_a_members_call_goes_through_as_it_is(door: Door) -> None:
    headers = {
        "content-type": "application/protobuf",
        "flwr-public-key": "a key",
        "flwr-signature": "a signature",
        "flwr-timestamp": "2026-01-01T00:00:00+00:00",
        "flwr-package-version": "1.41.0",
    }
    with door.client() as client:
        answer = client.post(PATH, content=b"\x00\xff a body", headers=headers)
    assert (answer.status_code, answer.content) == (200, b"the answer")
    ((method, path, passed, body),) = door.upstream.seen
    assert (method, path, body) == ("POST", PATH, b"\x00\xff a body")
    assert headers.items() <= passed.items()


def test_no_other_header_passes_either_way(door: Door) -> None:
    hostile = {
        "flwr-task-token": "stolen",
        "flwr-superexec-signature": "guessed",
        "x-forwarded-for": "10.0.0.1",
        "cookie": "a=b",
        "authorization": "Bearer x",
        "x-original-url": "/v1/control/start-run",
    }
    with door.client() as client:
        answer = client.post(PATH, content=b"x", headers=hostile)
    (_, _, passed, _) = door.upstream.seen[0]
    assert not set(hostile) & set(passed)
    assert "set-cookie" not in answer.headers
    assert "server" not in answer.headers
    assert "date" in answer.headers  # by which a member finds that its clock is wrong


def test_an_answer_of_megabytes_and_a_body_of_megabytes_go_through_whole(door: Door) -> None:
    import os

    chunk, door.upstream.answer = os.urandom(5 * 2**20), os.urandom(9 * 2**20)
    with door.client() as client:
        for _ in range(2):
            assert client.post(PATH, content=chunk).content == door.upstream.answer
    assert [body for _, _, _, body in door.upstream.seen] == [chunk, chunk]


@pytest.mark.parametrize("status", [401, 403, 412, 500])
def test_what_the_superlink_refuses_is_refused_the_same_way(door: Door, status: int) -> None:
    door.upstream.status = status
    with door.client() as client:
        assert client.post(PATH, content=b"x").status_code == status


# --- What does not ----------------------------------------------------------------------------------------------------

ELSEWHERE = [
    b"/",
    b"/docs",
    b"/health",
    b"/openapi.json",
    b"/v1/control/start-run",
    b"/v1/control/list-nodes",
    b"/v1/control/register-node",
    b"/v1/runtime/acquire-task",
    b"/v1/runtime/pull-messages",
    b"/v1/runtime/push-logs",
    b"/v1/fleet",
    b"/v1/fleet/",
    b"/v1/fleet/register-node",
    b"/v1/fleet/unregister-node",
    b"/v1/fleet/pull-messages/",
    b"/v1/fleet/pull-messages.",
    b"/v1/fleet/pull-messages..",
    b"//v1/fleet/pull-messages",
    b"/v1//fleet/pull-messages",
    b"/v1/fleet//pull-messages",
    b"/v1/fleet/./pull-messages",
    b"/v1/fleet/../fleet/pull-messages",
    b"/v1/fleet/../control/start-run",
    b"/v1/fleet/%2e%2e/control/start-run",
    b"/v1/fleet/%2E%2E/runtime/acquire-task",
    b"/v1/fleet/..%2fcontrol/start-run",
    b"/v1/fleet/%2e%2e%2fcontrol%2fstart-run",
    b"/v1/fleet/%252e%252e/control/start-run",
    b"/v1/fleet%2fpull-messages",
    b"/v1%2ffleet%2fpull-messages",
    b"/v1/fleet/..;/control/start-run",
    b"/v1/fleet/pull-messages;a=b",
    b"/v1/fleet/pull-messages%00",
    b"/v1/fleet/pull-messages%20",
    b"/v1/fleet/pull%2dmessages",
    b"/v1/fleet/Pull-Messages",
    b"/V1/FLEET/PULL-MESSAGES",
    b"/v1/fleet/pull-messages?x=1",
    b"/v1/fleet/pull-messages?/../../control/start-run",
    b"/v1/fleet/pull-messages#x",
    b"/v1\\fleet\\pull-messages",
    b"\\v1\\fleet\\pull-messages",
    b"v1/fleet/pull-messages",
    b"http://127.0.0.1/v1/fleet/pull-messages",
    b"https://door/v1/control/start-run",
    b"//door/v1/control/start-run",
    b"door:443",
    b"*",
]


@pytest.mark.parametrize("target", ELSEWHERE, ids=[target.decode() for target in ELSEWHERE])
def test_nothing_else_is_there(door: Door, target: bytes) -> None:
    assert door.status(target) in (400, 404)
    assert door.upstream.seen == []


@pytest.mark.parametrize(
    "target",
    [
        PATH.encode() + b"\x00",
        PATH.encode() + b"\xff",
        PATH.encode() + b" /v1/control/start-run",
        PATH.encode() + b"\r\nx: y",
        PATH.encode() + b"\t",
        b"",
    ],
    ids=["nul", "not ascii", "two targets", "a line break", "a tab", "none"],
)
def test_what_is_no_request_is_none(door: Door, target: bytes) -> None:
    assert door.status(target) in (0, 400, 404)
    assert door.upstream.seen == []


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"CONNECT", b"TRACE", b"post"])
def test_no_other_method_is_there(door: Door, method: bytes) -> None:
    assert door.status(PATH.encode(), method) in (400, 404)
    assert door.upstream.seen == []


def test_a_second_request_behind_a_refused_one_is_not_read(door: Door) -> None:
    smuggled = b"POST " + PATH.encode() + b" HTTP/1.1\r\nhost: door\r\ncontent-length: 1\r\n\r\nx"
    first = b"POST /v1/control/start-run HTTP/1.1\r\nhost: door\r\ncontent-length: %d\r\n\r\n" % len(smuggled)
    answer = door.raw(first + smuggled)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert door.upstream.seen == []


@pytest.mark.parametrize(
    "head",
    [
        b"transfer-encoding: chunked\r\n",
        b"content-length: 5\r\n",
        b"flwr-signature: one\r\nflwr-signature: two\r\n",
        b"content-length : 1\r\n",
    ],
    ids=["two ways to end", "two lengths", "a header twice", "a space before the colon"],
)
def test_a_head_that_can_be_read_in_two_ways_is_refused(door: Door, head: bytes) -> None:
    assert door.status(PATH.encode(), head=head) in (0, 400)
    assert door.upstream.seen == []


def test_an_upgrade_leads_nowhere(door: Door) -> None:
    head = b"upgrade: websocket\r\nsec-websocket-key: eA==\r\nsec-websocket-version: 13\r\n"
    assert door.status(b"/v1/control/start-run", b"GET", head) in (400, 404)
    assert door.upstream.seen == []


def test_a_body_without_a_length_is_refused(door: Door) -> None:
    request = (
        b"POST " + PATH.encode() + b" HTTP/1.1\r\nhost: door\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"
    )
    assert b" 400 " in door.raw(request).split(b"\r\n")[0]
    assert door.upstream.seen == []


# --- What one who is not a member can take up -------------------------------------------------------------------------


def test_a_body_that_is_too_large_is_not_read(door: Door) -> None:
    announced = b"POST " + PATH.encode() + b" HTTP/1.1\r\nhost: door\r\ncontent-length: 9999999999\r\n\r\n"
    assert b" 413 " in door.raw(announced).split(b"\r\n")[0]
    assert door.upstream.seen == []


def test_a_head_that_is_too_large_is_not_read(door: Door) -> None:
    for size in (20_000, 40_000, 400_000):
        assert door.status(PATH.encode(), head=b"x: " + b"y" * size + b"\r\n") in (0, 400)
        assert door.status(b"/" + b"y" * size) in (0, 400, 404)
    assert door.upstream.seen == []


def test_strangers_do_not_fill_the_log(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(10):
        assert door.status(b"/" + b"y" * 10_000) == 404
    lines = [record.getMessage() for record in caplog.records if record.name == "silotune.front"]
    assert len(lines) < 4
    assert all(len(line) < 250 for line in lines)


@pytest.mark.parametrize("sent", [b"", b"POST /v1/fl", b"POST /v1/fleet/pull-messages HTTP/1.1\r\nx: "])
def test_a_connection_on_which_nothing_comes_is_closed(door: Door, sent: bytes) -> None:
    begin = time.monotonic()
    with door.connect() as connection:
        connection.sendall(sent)
        read_all(connection)
    assert time.monotonic() - begin < 3


def test_a_body_that_does_not_come_is_not_waited_for(door: Door) -> None:
    begin = time.monotonic()
    answer = door.raw(b"POST " + PATH.encode() + b" HTTP/1.1\r\nhost: door\r\ncontent-length: 10\r\n\r\nx")
    assert 3 < time.monotonic() - begin < 8
    assert b" 504 " in answer.split(b"\r\n")[0] or answer == b""


def test_a_superlink_that_does_not_answer_is_not_waited_for(door: Door) -> None:
    door.upstream.delay_s = 6
    with door.client() as client:
        assert client.post(PATH, content=b"x").status_code == 504


def test_one_address_does_not_take_all_connections(door: Door) -> None:
    held = [door.connect() for _ in range(LIMITS.connections_each)]
    try:
        answer = b""
        with suppress(ConnectionError, ssl.SSLError), door.connect() as one_more:
            one_more.sendall(b"x")
            answer = one_more.recv(1)
        assert answer == b""
    finally:
        for connection in held:
            connection.close()
    time.sleep(0.3)
    with door.client() as client:
        assert client.post(PATH, content=b"x").status_code == 200


def test_a_superlink_that_is_gone_is_told_as_such(tmp_path: Path) -> None:
    with a_door(tmp_path, Upstream("127.0.0.1:1", loopback_certificate()[0])) as door, door.client() as client:
        assert client.post(PATH, content=b"x").status_code == 503


def test_another_superlink_than_the_one_that_is_known_is_not_asked(tmp_path: Path) -> None:
    with an_upstream(tmp_path) as upstream:
        stranger = Upstream(upstream.address, loopback_certificate()[0])
        with a_door(tmp_path, stranger) as door, door.client() as client:
            assert client.post(PATH, content=b"x").status_code == 503
        assert upstream.seen == []


# --- TLS, start and stop ----------------------------------------------------------------------------------------------


def test_only_tls_1_3_is_spoken(door: Door) -> None:
    old = door.trust()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", door.port)) as raw, pytest.raises(ssl.SSLError):
        old.wrap_socket(raw, server_hostname="127.0.0.1")
    with socket.create_connection(("127.0.0.1", door.port), timeout=5) as raw:
        raw.sendall(b"POST " + PATH.encode() + b" HTTP/1.1\r\ncontent-length: 1\r\n\r\nx")
        assert b"HTTP" not in raw.recv(100)
    assert door.upstream.seen == []


def test_a_port_that_is_taken_is_told(door: Door, tmp_path: Path) -> None:
    certificate, key = loopback_certificate()
    (tmp_path / "c").write_bytes(certificate)
    (tmp_path / "k").write_bytes(key)
    with pytest.raises(OSError, match="is the port in use"):
        serve_front(
            "127.0.0.1", door.port, tmp_path / "c", tmp_path / "k", "127.0.0.1:1", certificate, threading.Event()
        )


def test_it_stops_within_seconds_with_a_request_under_way(tmp_path: Path) -> None:
    with an_upstream(tmp_path) as upstream:
        upstream.delay_s = 5
        with a_door(tmp_path, upstream) as door:
            connection = door.connect()
            connection.sendall(b"POST " + PATH.encode() + b" HTTP/1.1\r\nhost: d\r\ncontent-length: 1\r\n\r\nx")
            time.sleep(0.3)
            begin = time.monotonic()
        assert time.monotonic() - begin < 4
        connection.close()


def test_the_application_is_for_http_alone() -> None:
    async def call() -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            raise AssertionError

        await front._Front("127.0.0.1:1", loopback_certificate()[0], LIMITS)({"type": "websocket"}, receive, send)
        return sent

    assert asyncio.run(call()) == []


def shown(door: Door) -> bytes:
    """The certificate that a member sees, whoever vouches for it."""
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", door.port), timeout=5) as raw, trust.wrap_socket(raw) as connection:
        found = connection.getpeercert(binary_form=True)
    assert found
    return ssl.DER_cert_to_PEM_cert(found).encode()


def test_a_certificate_is_taken_up_once_it_fits_its_key_and_connections_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def told(text: str) -> int:
        return sum(text in record.getMessage() for record in caplog.records)

    with an_upstream(tmp_path) as upstream, a_door(tmp_path, upstream) as door, door.client() as client:
        caplog.set_level("WARNING", "silotune.front")
        before = shown(door)
        assert client.post(PATH, content=b"x").status_code == 200
        certificate, key = loopback_certificate()
        (tmp_path / "door.key").write_bytes(key)
        wait_for(lambda: told("do not fit together") == 1)
        assert shown(door) == before
        (tmp_path / "door.crt").write_bytes(certificate)
        wait_for(lambda: shown(door) == certificate)
        (tmp_path / "door.crt").write_bytes(before)  # the other way round: the certificate first
        wait_for(lambda: told("do not fit together") == 2)
        assert shown(door) == certificate
        (tmp_path / "door.crt").unlink()
        wait_for(lambda: told("do not fit together") == 3)
        assert shown(door) == certificate
        assert client.post(PATH, content=b"x").status_code == 200  # on the connection that was there
        assert told("is another certificate") == 1
