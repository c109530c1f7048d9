"""What the coordinator's operator asks of the SuperLink: who may take part, and which runs there are."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
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
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from common.bundle import bundle
from common.processes import Child
from server.calls import Calls, ServiceError, Status
from server.superlink import Endpoint

_CONTROL = "/v1/control/"


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


class KeyRemovedError(ServiceError):
    """A node key that was removed once; another has to be enrolled."""


class Operator:
    """What the coordinator's operator asks of the SuperLink. Close it, or use it in a `with`."""

    def __init__(
        self,
        endpoint: Endpoint,
        patience_s: float = 20.0,
        stop: threading.Event | None = None,
        timeout_s: float = 30.0,
        heard: Callable[[], None] = lambda: None,
    ) -> None:
        """The rest as `Calls` has it."""
        self._calls = Calls(endpoint, "flwr", patience_s, stop, timeout_s, heard)

    def __enter__(self) -> Operator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._calls.close()

    def register(self, name: str, key: ec.EllipticCurvePublicKey) -> int:
        """Lets the node with this key take part, and returns its number. A key that is there already keeps its own.

        Raises KeyRemovedError when the key was removed before: Flower does not take one again.
        """
        public = public_key_to_bytes(key)
        for node in self.nodes():
            if node.key == public:
                return node.number
        request = RegisterNodeRequest(public_key=public, name=name)
        try:
            number = int(self._calls(_CONTROL + "register-node", request, RegisterNodeResponse).node_id)
        except Status as error:
            if error.status == httpx.codes.PRECONDITION_FAILED:
                raise KeyRemovedError(
                    f"the SuperLink does not take back a node key that was removed ({name})"
                ) from error
            raise
        if not number:
            raise ServiceError(f"the SuperLink did not register the node of {name}; its log says why")
        return number

    def unregister(self, number: int) -> bool:
        """Shuts out a node, at once and its key for good. False when there is none of that number."""
        try:
            self._calls(_CONTROL + "unregister-node", UnregisterNodeRequest(node_id=number), UnregisterNodeResponse)
        except Status as error:
            if error.status == httpx.codes.NOT_FOUND:
                return False
            raise
        return True

    def nodes(self) -> tuple[NodeRecord, ...]:
        """All registered nodes."""
        found = self._calls(_CONTROL + "list-nodes", ListNodesRequest(), ListNodesResponse)
        return tuple(
            NodeRecord(node.node_id, node.name, node.public_key, node.status == "online")
            for node in found.nodes_info
            if node.status != "unregistered"
        )

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
        except Status as error:
            if error.status in (404, 409, 412):
                return False
            raise

    def runs(self) -> tuple[RunRecord, ...]:
        """All runs that the database holds."""
        found = self._calls(_CONTROL + "list-runs", ListRunsRequest(), ListRunsResponse)
        return tuple(RunRecord(run.run_id, run.status.status, run.status.sub_status) for run in found.run_dict.values())


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
