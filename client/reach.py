"""The way to the coordinator, one step after the other, so that what stands in it is told by its name."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from types import TracebackType

from cryptography.hazmat.primitives.asymmetric import ec

from client.fleet import (
    ACTIVATE,
    ENROLLED,
    MOST_AHEAD_S,
    MOST_BEHIND_S,
    UNKNOWN,
    impossible_activation,
    signed_headers,
    trust_in,
)
from common.enrolment import Address
from common.errors import Unreachable

_ANSWER_BYTES = 1 << 16
_UNSURE_S = 3  # by which two clocks may be further apart than can be told

# What OpenSSL says of a certificate (openssl/x509_vfy.h).
_NOT_YET_VALID, _EXPIRED, _OTHER_HOST, _OTHER_ADDRESS = 9, 10, 62, 64


class Way:
    """A connection that is made step by step: `resolve`, `connect`, `greet`, `ask`. Each raises Unreachable."""

    def __init__(
        self,
        address: Address,
        authority: bytes,
        timeout_s: float = 10.0,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """authority: certificates in PEM; nothing else is trusted. clock: gives the time, with its zone."""
        self._address = address
        self._authority = authority
        self._timeout_s = timeout_s
        self._clock = clock
        self._socket: socket.socket | None = None

    def __enter__(self) -> Way:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._socket is not None:
            self._socket.close()

    def resolve(self) -> tuple[str, ...]:
        """The addresses behind the host's name."""
        host = self._address.host
        try:
            found = socket.getaddrinfo(host, self._address.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise Unreachable(
                f"expected an address for {host}, found none ({getattr(error, 'strerror', None) or error}); see that"
                " this machine asks a name server that knows the name, or ask the coordinator for its right name"
            ) from error
        return tuple(dict.fromkeys(str(where[4][0]) for where in found))

    def connect(self) -> None:
        """A TCP connection."""
        try:
            self._socket = socket.create_connection((self._address.host, self._address.port), self._timeout_s)
        except OSError as error:
            if isinstance(error, TimeoutError):
                why = f"no answer within {self._timeout_s:g} s; a firewall on the way must let it out"
            elif isinstance(error, ConnectionRefusedError):
                why = "nobody listens; ask the coordinator whether `silotune-server up` runs, and on which port"
            else:
                why = f"{error.strerror or error}; see this machine's network"
            raise Unreachable(f"expected a connection to {self._address}, found none: {why}") from error

    def greet(self) -> datetime:
        """TLS with the pinned authority; until when the coordinator's certificate is valid."""
        if self._socket is None:
            raise ValueError("connect first")
        trust = trust_in(self._authority)
        try:
            secured = trust.wrap_socket(self._socket, server_hostname=self._address.host)
        except ssl.SSLCertVerificationError as error:
            raise Unreachable(self._mistrusted(error)) from error
        except (ssl.SSLError, OSError) as error:
            raise Unreachable(
                f"expected TLS 1.3 at {self._address}, found something else ({_said(error)}); see that the port is the"
                " members' one, and that no proxy on the way takes connections apart"
            ) from error
        self._socket = secured
        found = secured.getpeercert() or {}
        return datetime.fromtimestamp(ssl.cert_time_to_seconds(str(found["notAfter"])), UTC)

    def _mistrusted(self, error: ssl.SSLCertVerificationError) -> str:
        address, code = self._address, error.verify_code
        if code in (_OTHER_HOST, _OTHER_ADDRESS):
            return (
                f"expected a certificate for {address.host}, found one of the pinned authority for other names"
                f" ({error.verify_message}); the coordinator must make one with that name: silotune-server renew"
            )
        if code in (_EXPIRED, _NOT_YET_VALID):
            when = "that has expired" if code == _EXPIRED else "that is not valid yet"
            return (
                f"expected a certificate of {address} that is valid at {self._clock():%Y-%m-%d %H:%M} UTC, which is"
                f" what this machine's clock shows, found one {when}; where the clock is right, the coordinator must"
                " renew it: silotune-server renew"
            )
        return (
            f"expected at {address} a certificate of the authority in the trusted roster, found one of another"
            f" ({error.verify_message}); somebody else answers there, or a proxy takes connections apart, or the"
            " coordinator has a new authority: then compare its new roster and trust it"
        )

    def ask(self, key: ec.EllipticCurvePrivateKey) -> float | None:
        """Returns when the coordinator knows the node with this key: a signed call that changes nothing, there or here.

        It does not disturb a daemon that runs with the same key. Gives the seconds that this machine's clock is ahead
        of the coordinator's at least, negative when it is behind, and None when that cannot be told.
        """
        connection = http.client.HTTPConnection(self._address.host, self._address.port, timeout=self._timeout_s)
        connection.sock = self._socket
        begun = self._clock()
        try:
            connection.request("POST", ACTIVATE, impossible_activation(key.public_key()), signed_headers(key, begun))
            found = connection.getresponse()
            content = found.read(_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(
                f"expected an answer of the coordinator at {self._address}, found none ({_said(error)}); ask it to see"
                " `silotune-server status`"
            ) from error
        ahead_s = ahead(begun, self._clock(), found.headers.get("date", ""))
        told = (found.status, _code(content))
        if told == (400, ENROLLED):
            return ahead_s
        raise Unreachable(self._refusal(told, ahead_s))

    def _refusal(self, told: tuple[int, int | None], ahead_s: float | None) -> str:
        status, code = told
        if told == (412, UNKNOWN):
            return (
                "expected the coordinator to know this node's key, found that it does not: the card was not enrolled,"
                " or was removed; hand card.json over again (silotune-server enroll CARD)"
            )
        if status == 401:
            if ahead_s is not None and not _UNSURE_S - MOST_BEHIND_S < ahead_s < MOST_AHEAD_S - _UNSURE_S:
                return (
                    f"expected this machine's clock within {MOST_AHEAD_S} s ahead and {MOST_BEHIND_S} s behind the"
                    f" coordinator's, found it {_apart(ahead_s)}; set the right time here (NTP), or there"
                )
            return (
                "expected the coordinator to take this node's signature, found it refused although the clocks agree;"
                " see that both sides run the same version of Silotune"
            )
        if status in (429, 502, 503, 504):
            return (
                f"expected the coordinator's service behind {self._address}, found it away at present (status"
                f" {status}); ask the coordinator, or try again in a minute"
            )
        return (
            f"expected the members' port of a coordinator at {self._address}, found something that answers {status}"
            f"{f' ({code})' if code else ''}; see that both sides run the same version of Silotune, and that the"
            " address in the roster is right"
        )


def ahead(begun: datetime, ended: datetime, date: str) -> float | None:
    """Seconds that this clock is ahead of another one at least, which said `date` between these two moments here.

    Zero when the clocks may agree: dates are told in whole seconds, and servers say one that is a second old. None for
    what is no date.
    """
    theirs = None
    with suppress(ValueError, TypeError):
        theirs = parsedate_to_datetime(date)
    if theirs is None or theirs.tzinfo is None:
        return None
    least = (begun - (theirs + timedelta(seconds=2))).total_seconds()
    most = (ended - theirs).total_seconds()
    return max(least, 0.0) + min(most, 0.0)


def _apart(ahead_s: float) -> str:
    return f"{abs(ahead_s):.0f} s {'ahead' if ahead_s > 0 else 'behind'}"


def _code(content: bytes) -> int | None:
    """Flower's code of an error; None where there is none."""
    with suppress(ValueError, RecursionError):
        found = json.loads(content)
        if isinstance(found, dict) and type(found.get("code")) is int:
            return int(found["code"])
    return None


def _said(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error) or type(error).__name__
