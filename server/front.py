"""The door for members: TLS on their port, and behind it the Fleet API of the loopback SuperLink and nothing else.

The SuperLink serves members, operators and app runners on one port. Here a request passes only when its target is, byte
for byte, one of the paths below; it then goes on under that path, with the few headers that Flower's clients send. All
else is answered 404, as if there were nothing.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger("silotune.front")

# What a node calls. Flower's other two register and unregister nodes, which is for the operator to do.
METHODS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
PATHS = {f"/v1/fleet/{method}".encode(): f"/v1/fleet/{method}" for method in METHODS}

_HEADERS = frozenset(
    {
        b"content-type",
        b"accept",
        b"flwr-public-key",
        b"flwr-signature",
        b"flwr-timestamp",
        b"flwr-package-name",
        b"flwr-package-version",
        b"flwr-component-name",
    }
)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """What one who is not a member can take up at most, since nobody is known before the SuperLink has looked.

    Flower sends arrays in chunks of 5 MB. connections_each: from one address. quiet_s: how long a connection may be
    open without a whole request under way. request_s: from a request's head to the last byte of its answer.
    """

    head_bytes: int = 16 * 1024
    body_bytes: int = 8 * 2**20
    connections: int = 256
    connections_each: int = 48
    quiet_s: float = 30.0
    request_s: float = 120.0


def serve_front(
    host: str,
    port: int,
    certificate: Path,
    key: Path,
    upstream: str,
    upstream_root: bytes,
    stop: threading.Event,
    limits: Limits | None = None,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serves until `stop` is set, then comes back within seconds.

    certificate, key: what members see, and others as soon as they fit together: connections go on. upstream: host:port
    of the SuperLink. upstream_root: its certificate in PEM, the only one that is trusted there. In a main thread
    SIGTERM and SIGINT stop it too, and then take their usual course.

    Raises OSError when the port is taken.
    """
    asyncio.run(
        _serve(host, port, certificate, key, _Front(upstream, upstream_root, limits or Limits()), stop, on_ready)
    )


def main() -> None:
    """`serve_front` as a process of its own, ended by SIGTERM.

    Arguments: those of the function as far as `upstream_root`, which is a file here.
    """
    host, port, certificate, key, upstream, root = sys.argv[1:]
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a line for each request that is none
    serve_front(host, int(port), Path(certificate), Path(key), upstream, Path(root).read_bytes(), threading.Event())


async def _serve(
    host: str,
    port: int,
    certificate: Path,
    key: Path,
    front: _Front,
    stop: threading.Event,
    on_ready: Callable[[], None],
) -> None:
    config = uvicorn.Config(
        front,
        host=host,
        port=port,
        ssl_certfile=str(certificate),
        ssl_keyfile=str(key),
        http=_protocol(front.limits),
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=front.limits.head_bytes,
        limit_concurrency=front.limits.connections,
        timeout_keep_alive=int(front.limits.quiet_s),
        timeout_graceful_shutdown=2,
    )
    shown = _Shown(certificate, key)  # first, so that a change from here on is seen
    config.load()
    assert config.ssl is not None
    config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    context = config.ssl
    server = uvicorn.Server(config)

    async def watch() -> None:
        while not server.started and not server.should_exit:
            await asyncio.sleep(0.02)
        if server.started:
            on_ready()
        while not stop.is_set():
            await asyncio.sleep(0.1)
            shown.renew(context)
        server.should_exit = True

    watching = asyncio.create_task(watch())
    try:
        await server.serve()
    except SystemExit as error:  # how uvicorn tells that it cannot listen
        raise OSError(f"cannot listen on {host}:{port}; is the port in use?") from error
    finally:
        watching.cancel()
        await front.close()


class _Shown:
    """The certificate that members see; another one is taken up when its files change and fit together."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = certificate, key
        self._seen = self._complained = self._stamps()

    def renew(self, context: ssl.SSLContext) -> None:
        """Lets new connections see what is in the files now. Files that do not fit, yet, leave all as it was."""
        stamps = self._stamps()
        if stamps == self._seen:
            return
        try:
            for found in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), context):
                found.load_cert_chain(*self._files, password="")  # without a passphrase: nobody is there to be asked
        except (OSError, ValueError) as error:
            if stamps != self._complained:
                self._complained = stamps
                log.warning("%s and its key do not fit together; the one before is shown: %s", self._files[0], error)
            return
        self._seen = stamps
        log.warning("%s is another certificate, and is shown from now on", self._files[0])

    def _stamps(self) -> list[tuple[int, int, int]]:
        """Others whenever a file was changed or replaced."""
        try:
            found = [file.stat() for file in self._files]
        except OSError:
            return []
        return [(file.st_ino, file.st_mtime_ns, file.st_size) for file in found]


class _Front:
    """The ASGI application."""

    def __init__(self, upstream: str, upstream_root: bytes, limits: Limits) -> None:
        trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trust.load_verify_locations(cadata=upstream_root.decode("ascii"))
        self.limits = limits
        self._said, self._unsaid = -1.0, 0
        self._upstream = f"https://{upstream}"
        self._timeouts = httpx.Timeout(limits.request_s, connect=10, pool=10).as_dict()
        # Without a client around it there are no cookies, redirects, proxies or headers but those that are given here.
        self._http = httpx.AsyncHTTPTransport(
            verify=trust,
            trust_env=False,
            limits=httpx.Limits(max_connections=limits.connections, keepalive_expiry=30),
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path = PATHS.get(scope["raw_path"])
        if path is None or scope["query_string"] or scope["method"] != "POST":
            self._complain("%s asked for what is not there: %.10s %.100r", scope, scope["method"], scope["raw_path"])
            await _answer(send, 404)
            return
        headers = [(name, value) for name, value in scope["headers"] if name in _HEADERS]
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        chunked = any(name == b"transfer-encoding" for name, _ in scope["headers"])
        size = sum(len(name) + len(value) for name, value in scope["headers"])  # h11 takes what comes at once
        twice = len({name for name, _ in headers}) != len(headers)
        if twice or chunked or len(lengths) != 1 or size > self.limits.head_bytes:
            await _answer(send, 400)
            return
        length = int(lengths[0])  # digits only, as h11 has checked
        if length > self.limits.body_bytes:
            await _answer(send, 413)
            return
        begun = _Begun(send)
        try:
            async with asyncio.timeout(self.limits.request_s):
                await self._forward(path, [*headers, (b"content-length", lengths[0])], receive, begun)
        except (httpx.HTTPError, TimeoutError, _Gone) as error:
            self._complain("%s: %s was cut short: %s %.100s", scope, path, type(error).__name__, error)
            if not begun.done:
                await _answer(send, 504 if isinstance(error, TimeoutError | httpx.TimeoutException) else 503)
            elif not isinstance(error, _Gone):
                raise  # the connection is closed, so that half an answer is not taken for a whole one

    def _complain(self, text: str, scope: Scope, *what: object) -> None:
        """One line a second at most: strangers must not be able to fill a disk."""
        self._unsaid += 1
        now = time.monotonic()
        if now - self._said > 1:
            log.warning(text + " (%d like it since the last line)", _address(scope), *what, self._unsaid - 1)
            self._said, self._unsaid = now, 0

    async def _forward(self, path: str, headers: list[tuple[bytes, bytes]], receive: Receive, begun: _Begun) -> None:
        url = self._upstream + path
        extensions = {"timeout": self._timeouts}
        request = httpx.Request("POST", url, headers=headers, content=_body(receive), extensions=extensions)
        found = await self._http.handle_async_request(request)
        try:
            kept = [(name, value) for name, value in found.headers.raw if name.lower() in _ANSWER_HEADERS]
            await begun.send({"type": "http.response.start", "status": found.status_code, "headers": kept})
            begun.done = True
            async for chunk in found.aiter_raw():
                await begun.send({"type": "http.response.body", "body": chunk, "more_body": True})
            await begun.send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await found.aclose()


_ANSWER_HEADERS = frozenset({b"content-type", b"content-length"})


class _Gone(Exception):
    """The member hung up."""


@dataclass
class _Begun:
    """Whether an answer has begun: then there is no other any more."""

    send: Send
    done: bool = False


async def _body(receive: Receive) -> AsyncIterator[bytes]:
    """The request's body as it comes; h11 holds it to its announced length."""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone("the member hung up")
        more = message.get("more_body", False)
        if part := message.get("body", b""):
            yield part


async def _answer(send: Send, status: int) -> None:
    """Nothing but a status. The connection ends with it, so that an unread body is not read."""
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return client[0] if client else "?"


def _protocol(limits: Limits) -> type[H11Protocol]:
    """Uvicorn's protocol, which has no timeout for a request that never comes and no limit for one address."""
    open_from: Counter[str] = Counter()

    class Guarded(H11Protocol):
        _quiet_since = 0.0
        _counted = ""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            address = self.client[0] if self.client else ""
            self._counted = address
            open_from[address] += 1
            if open_from[address] > limits.connections_each:
                log.warning("%s has %d connections: one more is refused", address, limits.connections_each)
                transport.abort()
                return
            self._quiet_since = self.loop.time()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            open_from[self._counted] -= 1
            if not open_from[self._counted]:
                del open_from[self._counted]
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            self._quiet_since = self.loop.time()
            super().on_response_complete()

        def _watch(self) -> None:
            if self.transport.is_closing():
                return
            busy = self.cycle is not None and not self.cycle.response_complete
            if not busy and self.loop.time() - self._quiet_since > limits.quiet_s:
                self.transport.abort()
                return
            self.loop.call_later(limits.quiet_s / 4, self._watch)

    return Guarded
