"""Calls of Flower's Fleet API, signed as this institution's node, and what becomes of them."""

from __future__ import annotations

import ssl
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Protocol, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import HEARTBEAT_MAX_INTERVAL, HEARTBEAT_MIN_INTERVAL
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from client.events import NOT_ADMITTED, NOT_ENROLLED, UNREACHABLE, UNTRUSTED, Event
from client.fleet import signed_headers, trust_in
from common.errors import ConfigError

_FLEET = "/v1/fleet/"
_RESPONSE_BYTES = 64 * 2**20  # Flower sends arrays in chunks of 5 MB, a bundle in one piece of 10 MB at most


class Proto(Protocol):
    """A message of Flower's wire protocol."""

    def SerializeToString(self, *, deterministic: bool = ...) -> bytes: ...  # noqa: N802

    def ParseFromString(self, serialized: bytes) -> int: ...  # noqa: N802


R = TypeVar("R", bound=Proto)


@dataclass(frozen=True)
class Connection:
    """Where the coordinator is and who this node is.

    address: host:port of the members' port. authority: certificates in PEM; nothing else is trusted, whatever the
    machine trusts. key: the node's P-384 key. memory: a directory for what a restart needs (see `serve`); None to keep
    nothing. heartbeat_s: how often the node shows that it is there; one that was killed without a memory is not let in
    again before twice this time has gone. grace_s: how long an answer that is under way may still take once it is to
    stop. takeover_s: how long a process before this one, which is ending, may take to let go of the memory. proxy: URL
    of an HTTP proxy; the environment's are not used.
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
    takeover_s: float = 0.0
    proxy: str | None = None

    def __post_init__(self) -> None:
        if not HEARTBEAT_MIN_INTERVAL <= self.heartbeat_s <= HEARTBEAT_MAX_INTERVAL:
            raise ConfigError(
                f"heartbeat_s: expected {HEARTBEAT_MIN_INTERVAL} to {HEARTBEAT_MAX_INTERVAL} seconds, which is what "
                f"Flower accepts, found {self.heartbeat_s!r}"
            )
        if not 0 < self.quickest_poll_s <= self.slowest_poll_s:
            raise ConfigError(f"polls: expected 0 < {self.quickest_poll_s!r} <= {self.slowest_poll_s!r}")


class Broken(Exception):
    """The connection does not work as it is.

    event: what to tell. patience_s: how long to wait at most before the next try. hopeless: whether it is this very
    call that fails, so that another message may fare better.
    """

    def __init__(self, event: Event, patience_s: float, hopeless: bool = False) -> None:
        super().__init__(event.text)
        self.event = event
        self.patience_s = patience_s
        self.hopeless = hopeless


class RunOver(Exception):
    """The run that a message belongs to is no longer running."""


class Fleet:
    """Calls of the Fleet API, signed as this node. It follows no redirects and trusts one authority."""

    def __init__(self, connection: Connection) -> None:
        self._key = connection.key
        self.public = public_key_to_bytes(connection.key.public_key())
        self._http = httpx.Client(
            base_url=f"https://{connection.address}",
            verify=trust_in(connection.authority),
            timeout=connection.timeout_s,
            trust_env=False,
            proxy=connection.proxy,
            limits=httpx.Limits(keepalive_expiry=30),
        )

    def close(self) -> None:
        self._http.close()

    def call(self, method: str, request: Proto, response: type[R], timeout_s: float | None = None) -> R:
        """One call. Raises Broken, or RunOver where Flower says 403."""
        headers = signed_headers(self._key, datetime.now(UTC))
        timeout = self._http.timeout if timeout_s is None else httpx.Timeout(timeout_s)
        try:
            body = request.SerializeToString(deterministic=True)
            with self._http.stream("POST", _FLEET + method, content=body, headers=headers, timeout=timeout) as found:
                if found.status_code != 200:
                    raise refusal(method, found)
                content = bytearray()
                for chunk in found.iter_raw():
                    content += chunk
                    if len(content) > _RESPONSE_BYTES:
                        raise Broken(Event(UNREACHABLE, f"{method}: more than {_RESPONSE_BYTES} bytes came"), 30)
        except httpx.HTTPError as error:
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, ssl.SSLCertVerificationError):
                    text = f"its certificate is not one of the pinned authority's: {cause.verify_message}"
                    raise Broken(Event(UNTRUSTED, text), 60) from error
                cause = cause.__cause__ or cause.__context__
            raise Broken(Event(UNREACHABLE, f"{method}: {type(error).__name__}: {error}"), 15) from error
        parsed = response()
        try:
            parsed.ParseFromString(bytes(content))
        except Exception as error:  # protobuf's own kind, which has no types
            raise Broken(Event(UNREACHABLE, f"{method}: what came is no answer of a SuperLink"), 30) from error
        return parsed


def refusal(method: str, found: httpx.Response) -> Exception:
    """What a status other than 200 means."""
    if found.status_code == 401:
        return Broken(Event(NOT_ENROLLED, f"the coordinator does not know this node's key{_clock(found)}"), 60)
    if found.status_code == 403:
        return RunOver()
    if found.status_code == 412 and method == "activate-node":
        text = "the coordinator does not admit this node: its key is not enrolled, or a node with it is still there"
        return Broken(Event(NOT_ADMITTED, text), 10)
    away = found.status_code in (429, 502, 503, 504)  # the door says so while the SuperLink starts anew
    return Broken(Event(UNREACHABLE, f"{method}: status {found.status_code}"), 15, hopeless=not away)


def _clock(found: httpx.Response) -> str:
    """Signatures hold a time: 5 s ahead of the coordinator's or 5 minutes behind are as bad as a wrong key."""
    with suppress(KeyError, ValueError, TypeError):
        apart = (datetime.now(UTC) - parsedate_to_datetime(found.headers["date"])).total_seconds()
        if abs(apart) > 3:
            return f"; this machine's clock is {apart:+.0f} s from the coordinator's, which may be all"
    return ""
