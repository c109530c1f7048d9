"""A deployment on loopback for tests: a SuperLink in a process of its own, the members' door, and nodes."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from flwr.app import Context, Message, RecordDict

from client import node
from common.base_model import Fingerprint
from common.bundle import bundle_digest
from common.enrolment import Address, Card, Contents, Member, SignedRoster, timestamp
from common.flower import from_records, to_records
from common.messages import PROTOCOL, Hello, Introduction, Refused
from common.secagg.identity import Identity
from common.wire import Wire, to_wire
from server.authority import authority_certificate
from server.deployed import drive
from server.flower import FlowerMembers
from server.front import Limits, serve_front
from server.loopback import LoopbackGrid, Task, acquire
from server.operator import Operator, wait_until_ready
from server.superlink import SuperLinkHome, loopback_certificate, start_superlink
from tests.client.conftest import make_config

BASE = Fingerprint("config", "weights", "tokenizer")
HELLO_ALL = Hello.of(make_config("base"), "tiny-run", BASE)

Answer = Callable[[Message, Context], Message]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def introduction(name: str) -> Answer:
    """An answer to anything: the institution's name."""

    def answer(message: Message, context: Context) -> Message:
        return Message(to_records(to_wire(Introduction(name, PROTOCOL, "1", BASE))), reply_to=message)

    return answer


def reply_in(message: Message) -> Wire:
    """What a reply says, reason codes that the coordinator does not know yet included."""
    return from_records(message.content)


class Deployment:
    """A SuperLink in a process of its own, the door for members in a thread, and nodes as a test wants them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = SuperLinkHome(root / "services")
        self.home.prepare()
        self.port, self.door = free_port(), free_port()
        self.superlink = start_superlink(self.home, self.port)
        self.endpoint = self.home.endpoint(self.port)
        certificate, key = loopback_certificate()
        self.authority = certificate
        (root / "door.crt").write_bytes(certificate)
        (root / "door.key").write_bytes(key)
        self._stop = threading.Event()
        ready = threading.Event()
        self._front = threading.Thread(
            target=serve_front,
            args=("127.0.0.1", self.door, root / "door.crt", root / "door.key"),
            kwargs={
                "upstream": self.endpoint.address,
                "upstream_root": self.endpoint.root,
                "stop": self._stop,
                "limits": Limits(connections_each=100),
                "on_ready": ready.set,
            },
        )
        try:
            wait_until_ready(self.endpoint, self.superlink)
            self._front.start()
            assert ready.wait(10)
        except BaseException:
            self.superlink.stop()
            raise

    def close(self) -> None:
        self._stop.set()
        self._front.join(10)
        self.superlink.stop()
        assert not self._front.is_alive()
        assert not psutil.pid_exists(self.superlink.pid)

    def restart(self) -> float:
        """Kills the SuperLink as a power cut would, starts it anew, and says how long it was away."""
        begin = time.monotonic()
        self.superlink.kill()
        self.superlink = start_superlink(self.home, self.port)
        wait_until_ready(self.endpoint, self.superlink)
        return time.monotonic() - begin

    def key(self, name: str = "") -> ec.EllipticCurvePrivateKey:
        """A new node key, enrolled under `name` if there is one."""
        key = ec.generate_private_key(ec.SECP384R1())
        if name:
            with Operator(self.endpoint) as operator:
                operator.register(name, key.public_key())
        return key

    def connection(self, key: ec.EllipticCurvePrivateKey, **changes: Any) -> node.Connection:
        return node.Connection(f"127.0.0.1:{self.door}", self.authority, key, **changes)

    @contextmanager
    def node(
        self,
        answer: Answer,
        connection: node.Connection,
        bundles: frozenset[str] = frozenset({bundle_digest()}),
        record: Callable[[Message], None] = lambda _: None,
    ) -> Iterator[Events]:
        """A node in a thread; ends with the block."""
        events, stop = Events(), threading.Event()
        thread = threading.Thread(
            target=node.serve, args=(connection, answer, bundles, stop, events.append, record), daemon=True
        )
        thread.start()
        try:
            yield events
        finally:
            stop.set()
            thread.join(15)
            assert not thread.is_alive()

    def drive(
        self,
        coordinate: Callable[[FlowerMembers], None],
        stop: threading.Event | None = None,
        roster: SignedRoster | None = None,
    ) -> None:
        drive(self.endpoint, self.home.directory, coordinate, stop or threading.Event(), roster=roster)

    @contextmanager
    def task(self) -> Iterator[tuple[LoopbackGrid, Task]]:
        """A run that a test drives by hand."""
        with Operator(self.endpoint) as operator:
            task = acquire(self.endpoint, operator.start_run())
        grid, _ = task.begin()
        try:
            yield grid, task
        finally:
            task.finish(completed=True)
            task.close()

    def forget_nodes(self) -> None:
        with Operator(self.endpoint) as operator:
            for found in operator.nodes():
                operator.unregister(found.number)


class Events(list[node.Event]):
    """What a node told, in order."""

    def wait(self, kind: str, timeout_s: float = 20.0, after: int = 0) -> node.Event:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            for event in self[after:]:
                if event.kind == kind:
                    return event
            time.sleep(0.02)
        raise AssertionError(f"no {kind!r} within {timeout_s} s, only {list(self)}")

    def kinds(self) -> list[str]:
        return [event.kind for event in self]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    found = Deployment(tmp_path_factory.mktemp("deployment"))
    yield found
    found.close()


@pytest.fixture
def deployment(running: Deployment) -> Iterator[Deployment]:
    """Services that the tests of a module share; each finds them without nodes."""
    running.forget_nodes()
    yield running
    running.forget_nodes()


def ask_by_hand(grid: LoopbackGrid, number: int, content: RecordDict, kind: str, timeout_s: float = 15.0) -> Message:
    message = Message(content, dst_node_id=number, message_type=kind, ttl=60)
    replies = list(grid.send_and_receive([message], timeout=timeout_s))
    assert len(replies) == 1
    return replies[0]


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_for(there: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Until it is so; fails when that takes too long."""
    end = time.monotonic() + timeout_s
    while not there():
        assert time.monotonic() < end
        time.sleep(0.02)


def meet(members: FlowerMembers, expected: int) -> dict[str, Introduction | Refused]:
    """Says hello until so many nodes have answered."""
    answers: dict[str, Introduction | Refused] = {}

    def answered() -> bool:
        answers.update(members.meet(HELLO_ALL, tuple(answers), timeout_s=30))
        return len(answers) >= expected

    wait_for(answered)
    return answers


def signed_roster(*cards: Card) -> SignedRoster:
    """A roster of these members, by a coordinator of its own."""
    coordinator = Identity.generate("coordinator")
    now = datetime.now(UTC)
    authority = authority_certificate(ec.generate_private_key(ec.SECP384R1()), "tests", now)
    contents = Contents(
        federation="tests",
        serial=1,
        written=timestamp(now),
        coordinator=coordinator.public,
        address=Address("localhost", 9443),
        authority=authority.public_bytes(Encoding.PEM).decode(),
        members=tuple(Member(card, timestamp(now)) for card in sorted(cards, key=lambda card: card.name)),
    )
    return SignedRoster.of(contents, coordinator)
