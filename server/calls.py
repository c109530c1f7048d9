"""Calls of the SuperLink on this machine, as Flower's own programs make them."""

from __future__ import annotations

import random
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import httpx
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

from common.errors import Unreachable
from server.superlink import Endpoint


class ServiceError(Unreachable):
    """A service of the coordinator that does not start, answer, or do what it was asked."""


class Proto(Protocol):
    """A message of Flower's wire protocol."""

    def SerializeToString(self, *, deterministic: bool = ...) -> bytes: ...  # noqa: N802

    def ParseFromString(self, serialized: bytes) -> int: ...  # noqa: N802


R = TypeVar("R", bound=Proto)


class Status(ServiceError):
    """An answer with a status other than 200."""

    def __init__(self, method: str, status: int, text: str) -> None:
        super().__init__(f"the SuperLink refused {method}: {status} {text}")
        self.status = status


class Calls:
    """Calls of one SuperLink on this machine.

    patience_s: how long one that is not there is tried again; not once `stop` is set. timeout_s: how long each try may
    take. heard: told of every answer, whatever it is.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        component: str,
        patience_s: float,
        stop: threading.Event | None = None,
        timeout_s: float = 30.0,
        heard: Callable[[], None] = lambda: None,
    ) -> None:
        trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trust.load_verify_locations(cadata=endpoint.root.decode("ascii"))
        self._stop = stop or threading.Event()
        self._patience_s = patience_s
        self._heard = heard
        self._http = httpx.Client(
            base_url=f"https://{endpoint.address}",
            verify=trust,
            timeout=timeout_s,
            trust_env=False,  # a proxy of the environment is not for the loopback interface
            limits=httpx.Limits(keepalive_expiry=30),
            headers={
                **dict(RuntimeVersionMetadata.from_local_component(component).as_metadata()),
                "content-type": PROTOBUF_MEDIA_TYPE,
                "accept": PROTOBUF_MEDIA_TYPE,
                "accept-encoding": "identity",
            },
        )

    def __call__(self, path: str, request: Proto, response: type[R], headers: Mapping[str, str] | None = None) -> R:
        """One call. Raises Status, or ServiceError when nobody answers within the patience."""
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
            self._heard()
            if found.status_code != httpx.codes.OK:
                raise Status(path, found.status_code, found.text[:500])
            parsed = response()
            parsed.ParseFromString(found.content)
            return parsed

    def close(self) -> None:
        self._http.close()
