"""FlowerMembers on Flower's own in-memory grid and link state: nodes are threads that answer as a SuperNode would."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import (
    HEARTBEAT_INTERVAL_INF,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    SUPERLINK_NODE_ID,
    ErrorCode,
)
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState, RunRecord
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, NodeStatus
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid

from client.app import build_client_app
from client.data_sets import RecordFolder
from client.institution import Institution
from client.policy import Policy
from client.secure import SecureMember
from common.adapter import flatten
from common.base_model import fingerprint
from common.config import LoraConfig, ModelConfig, SecureAggregationConfig
from common.errors import RunStopped
from common.flower import from_records, to_records
from common.messages import (
    BASE_MODEL_DIFFERS,
    INTERNAL_ERROR,
    MALFORMED,
    NAME_DIFFERS,
    PROTOCOL,
    PROTOCOL_DIFFERS,
    TIMED_OUT,
    VERSION_DIFFERS,
    Contribution,
    Hello,
    Introduction,
    Plan,
    Published,
    Refused,
    Reply,
    Request,
    Settings,
    TrainRequest,
)
from common.policy_reasons import PAUSED
from common.publication import Publication
from common.records import write_jsonl
from common.secagg.identity import Identity, Roster
from common.secagg.messages import Consents, Inbox, KeyList, Survivors
from common.wire import from_wire, to_wire
from server.coordinator import Bench, Observer, coordinate
from server.flower import FlowerMembers
from simulations.members import InProcessMembers
from tests.client.conftest import NAMES, make_config, make_records
from tests.server.conftest import BASE, ROSTER, rounds_config, small_adapter

RUN, TASK = 5, 1
HELLO = Hello.of(rounds_config(), "run", BASE)
Answer = Callable[[Message], Message | None]


@dataclass
class Network:
    """A link state with nodes, each a thread that takes its messages and answers them; None is no answer."""

    state: InMemoryLinkState
    grid: InMemoryGrid
    stop: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)  # messages under way, each time one was taken
    watch: Callable[[int], None] = lambda _: None  # told the node that takes a message

    def add(self, answer: Answer) -> int:
        node = self.state.create_node(
            NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, secrets.token_bytes(32), heartbeat_interval=HEARTBEAT_INTERVAL_INF
        )
        self.state.acknowledge_node_heartbeat(node_id=node, heartbeat_interval=HEARTBEAT_INTERVAL_INF)
        thread = threading.Thread(target=self._serve, args=(node, answer), daemon=True)
        self.threads.append(thread)
        thread.start()
        return node

    def _serve(self, node: int, answer: Answer) -> None:
        while not self.stop.is_set():
            for message in self.state.get_message_ins(node_id=node, limit=1):
                self.waiting.append(self.state.num_message_ins())
                self.watch(node)
                reply = answer(message)
                if reply is not None:
                    reply.metadata.__dict__["_message_id"] = str(uuid4())
                    self.state.store_message_res(reply)
            time.sleep(0.002)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    """As flwr.simulation sets it up, but for the engine that plays the nodes."""
    for name, value in (("_task_id", TASK), ("_run_id", RUN), ("_node_id", SUPERLINK_NODE_ID)):
        monkeypatch.setattr(TaskIdentity, name, value)
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it tells at length of each message that is provoked here
    factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    state = cast(InMemoryLinkState, factory.state())
    run = Run.create_empty(run_id=RUN)
    run.primary_task_id, run.federation_id = TASK, NOOP_FEDERATION_ID
    state.run_ids[RUN] = RunRecord(run=run)
    state.task_store[TASK] = Task(task_id=TASK, run_id=RUN)
    grid = InMemoryGrid(state_factory=factory)
    grid.set_run(run)
    made = Network(state, grid)
    yield made
    made.stop.set()
    for thread in made.threads:
        thread.join(timeout=10)
    logger.setLevel(level)


def says(rule: Callable[[Request], Reply]) -> Answer:
    """A node that answers with our messages."""

    def answer(message: Message) -> Message:
        request = from_wire(from_records(message.content))
        assert isinstance(request, Request)
        return Message(to_records(to_wire(rule(request))), reply_to=message)

    return answer


def named(name: str) -> Answer:
    """A node that introduces itself, and contributes a vector that shows which round and who."""

    def rule(request: Request) -> Reply:
        if isinstance(request, Hello):
            return Introduction(name, PROTOCOL, "1", BASE)
        assert isinstance(request, TrainRequest)
        return Contribution(request.plan.digest(), np.full(3, request.plan.round, np.uint32))

    return says(rule)


def silent(message: Message) -> None:
    """A node that never answers."""


def then(hello: Answer, later: Answer) -> Answer:
    """A node that behaves at first."""
    return lambda message: (hello if message.metadata.message_type == "query.hello" else later)(message)


def members_of(network: Network, wave: int = 64) -> FlowerMembers:
    return FlowerMembers(network.grid, threading.Event(), wave)


def request(number: int = 1) -> TrainRequest:
    adapter = small_adapter()
    settings = Settings.of(rounds_config())
    plan = Plan("run", number, ROSTER, len(flatten(adapter.factors, adapter.factors)), adapter.digest(), BASE, settings)
    return TrainRequest(plan, adapter)


def test_institutions_are_known_by_name_and_asked_by_name(network: Network) -> None:
    for name in ROSTER:
        network.add(named(name))
    members = members_of(network)
    assert members.meet(HELLO, (), 20.0) == {name: Introduction(name, PROTOCOL, "1", BASE) for name in ROSTER}
    for number in (1, 2):
        asked = request(number)
        found = dict(members.ask(dict.fromkeys(("alder", "cedar"), asked), 20.0))
        assert set(found) == {"alder", "cedar"}
        for reply in found.values():
            assert isinstance(reply, Contribution)
            assert reply.plan_digest == asked.plan.digest()
            assert reply.vector.tolist() == [number] * 3


def test_a_request_arrives_as_it_was_sent(network: Network) -> None:
    seen: list[Request] = []

    def rule(asked: Request) -> Reply:
        seen.append(asked)
        return Introduction("alder", PROTOCOL, "1", BASE) if isinstance(asked, Hello) else Refused(MALFORMED)

    network.add(says(rule))
    members = members_of(network)
    members.meet(HELLO, (), 20.0)
    sent = request()
    list(members.ask({"alder": sent}, 20.0))
    hello, train = seen
    assert hello == HELLO
    assert isinstance(train, TrainRequest)
    assert train.plan == sent.plan
    assert train.adapter.digest() == sent.adapter.digest()


def test_a_later_look_asks_only_who_came_since(network: Network) -> None:
    greeted: list[str] = []

    def counted(name: str) -> Answer:
        def answer(message: Message) -> Message | None:
            greeted.append(name)
            return named(name)(message)

        return answer

    network.add(counted("alder"))
    members = members_of(network)
    assert set(members.meet(HELLO, (), 20.0)) == {"alder"}
    network.add(counted("birch"))
    assert set(members.meet(HELLO, ("alder",), 20.0)) == {"birch"}
    assert members.meet(HELLO, ("alder", "birch"), 20.0) == {}
    assert greeted == ["alder", "birch"]
    assert {name for name, _ in members.ask(dict.fromkeys(("alder", "birch"), request()), 20.0)} == {"alder", "birch"}


def test_meeting_does_not_wait_for_who_is_not_there(network: Network) -> None:
    began = time.monotonic()
    assert members_of(network).meet(HELLO, (), 60.0) == {}
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("enrolled", [True, False])
def test_a_refusal_that_is_settled_is_not_asked_for_again_and_another_is(enrolled: bool, network: Network) -> None:
    asked: list[int] = []

    def refusing(number: int) -> Answer:
        def rule(_: Request) -> Reply:
            asked.append(number)
            return Refused(PAUSED, f"n{number}")

        return says(rule)

    first, second = network.add(refusing(1)), network.add(refusing(2))
    one, other = ("n1", "n2") if enrolled else (f"node-{first}", f"node-{second}")
    members = enrolled_in(network, lambda: {first: "n1", second: "n2"}) if enrolled else members_of(network)
    assert set(members.meet(HELLO, (), 20.0)) == {one, other}
    assert members.meet(HELLO, (one,), 20.0) == {other: Refused(PAUSED, "n2")}
    assert asked.count(1) == 1
    assert asked.count(2) == 2


def test_names_may_look_like_numbers_of_nodes(network: Network) -> None:
    network.add(named("node-a"))
    network.add(named("node-7"))
    members = members_of(network)
    assert set(members.meet(HELLO, (), 20.0)) == {"node-a", "node-7"}
    network.add(named("alder"))
    assert set(members.meet(HELLO, ("node-a", "node-7"), 20.0)) == {"alder"}
    assert len(list(members.ask(dict.fromkeys(("node-a", "node-7", "alder"), request()), 20.0))) == 3


@pytest.mark.parametrize("enrolled", [True, False])
def test_who_is_away_for_a_moment_keeps_its_place(enrolled: bool, network: Network) -> None:
    """Its daemon is restarted while the run still waits for others."""
    alder, birch = network.add(named("alder")), network.add(named("birch"))
    names = {alder: "alder", birch: "birch"}
    members = enrolled_in(network, lambda: names) if enrolled else members_of(network)
    assert set(members.meet(HELLO, (), 20.0)) == {"alder", "birch"}
    network.state.nodes[alder].status = NodeStatus.OFFLINE
    assert set(members.meet(HELLO, ("alder", "birch"), 20.0)) == set()
    network.state.nodes[alder].status = NodeStatus.ONLINE
    assert set(members.meet(HELLO, ("alder", "birch"), 20.0)) == set()
    replies = dict(members.ask(dict.fromkeys(("alder", "birch"), request()), 20.0))
    assert all(isinstance(replies[name], Contribution) for name in ("alder", "birch"))


def test_who_is_gone_when_asked_is_told_and_the_others_go_on(network: Network) -> None:
    alder = network.add(named("alder"))
    network.add(named("birch"))
    members = members_of(network)
    members.meet(HELLO, (), 20.0)
    network.state.delete_node(NOOP_FLWR_AID, alder)
    assert members.meet(HELLO, ("alder", "birch"), 20.0) == {}
    replies = dict(members.ask(dict.fromkeys(("alder", "birch"), request()), 20.0))
    assert replies["alder"] == Refused(INTERNAL_ERROR)
    assert isinstance(replies["birch"], Contribution)


# ---- names bound to enrolment --------------------------------------------------------------------------------------


def enrolled_in(network: Network, names: Callable[[], Mapping[int, str]]) -> FlowerMembers:
    return FlowerMembers(network.grid, threading.Event(), None, names)


@pytest.mark.parametrize("first", [True, False])
def test_who_takes_anothers_name_takes_no_part_and_does_not_displace_the_real_one(
    first: bool, network: Network, log_lines: Callable[[], list[str]]
) -> None:
    nodes = sorted([network.add(named("alder")), network.add(named("alder"))])
    nodes = nodes if first else nodes[::-1]  # the lower number is asked first
    names = {nodes[0]: "mallory", nodes[1]: "alder"}
    members = enrolled_in(network, lambda: names)
    answers = members.meet(HELLO, (), 20.0)
    assert answers == {
        "mallory": Refused(NAME_DIFFERS, "mallory"),
        "alder": Introduction("alder", PROTOCOL, "1", BASE),
    }
    assert log_lines() == ["mallory introduces itself as alder: refused"]
    asked: list[int] = []
    network.watch = asked.append
    assert [name for name, _ in members.ask({"alder": request()}, 20.0)] == ["alder"]
    assert asked == [nodes[1]]


def test_whoever_says_what_is_heard_under_the_name_it_is_enrolled_by(network: Network) -> None:
    alder = network.add(says(lambda _: Refused(PAUSED, "birch")))
    birch = network.add(says(lambda _: Refused(BASE_MODEL_DIFFERS, "", ("weights",))))
    cedar = network.add(says(lambda _: Contribution("x", np.zeros(3, np.uint32))))
    names = {alder: "alder", birch: "birch", cedar: "cedar"}
    assert enrolled_in(network, lambda: names).meet(HELLO, (), 20.0) == {
        "alder": Refused(PAUSED, "alder"),
        "birch": Refused(BASE_MODEL_DIFFERS, "birch", ("weights",)),
        "cedar": Refused(MALFORMED, "cedar"),
    }


def test_a_node_that_is_not_enrolled_is_asked_nothing(network: Network) -> None:
    asked: list[int] = []
    network.watch = asked.append
    network.add(named("mallory"))
    alder = network.add(named("alder"))
    members = enrolled_in(network, lambda: {alder: "alder"})
    assert set(members.meet(HELLO, (), 20.0)) == {"alder"}
    assert members.reachable() == ("alder",)
    list(members.ask({"alder": request()}, 20.0))
    assert asked == [alder, alder]


def test_who_is_enrolled_later_is_met_at_the_next_look(network: Network) -> None:
    alder, birch = network.add(named("alder")), network.add(named("birch"))
    names = {alder: "alder"}
    members = enrolled_in(network, lambda: names)
    assert set(members.meet(HELLO, (), 20.0)) == {"alder"}
    names[birch] = "birch"
    assert set(members.meet(HELLO, ("alder",), 20.0)) == {"birch"}


def test_reachable_is_who_is_enrolled_and_there_met_or_not(network: Network) -> None:
    alder, birch, cedar = (network.add(named(name)) for name in ("alder", "birch", "cedar"))
    names = {alder: "alder", birch: "birch", 4711: "dogwood"}
    members = enrolled_in(network, lambda: names)
    assert members.reachable() == ("alder", "birch")
    network.state.nodes[birch].status = NodeStatus.OFFLINE
    assert members.reachable() == ("alder",)
    network.state.nodes[birch].status = NodeStatus.ONLINE
    names[cedar] = "cedar"
    assert members.reachable() == ("alder", "birch", "cedar")
    found = dict(members.ask(dict.fromkeys(members.reachable(), request()), 20.0))
    assert all(isinstance(found[name], Contribution) for name in ("alder", "birch", "cedar"))


def test_reachable_is_who_was_met_where_nobody_is_enrolled(network: Network) -> None:
    for name in ("cedar", "alder"):
        network.add(named(name))
    members = members_of(network)
    assert members.reachable() == ()
    members.meet(HELLO, (), 20.0)
    assert members.reachable() == ("alder", "cedar")


# ---- waves, silence, and whatever a node sends ---------------------------------------------------------------------


def test_who_refuses_or_takes_anothers_name_is_listed_by_number(network: Network) -> None:
    first = network.add(named("alder"))
    second = network.add(named("alder"))
    third = network.add(says(lambda _: Refused(BASE_MODEL_DIFFERS, "cedar", ("weights",))))
    fourth = network.add(says(lambda _: Contribution("x", np.zeros(3, np.uint32))))
    members = members_of(network)
    answers = members.meet(HELLO, (), 20.0)
    assert answers.pop("alder") == Introduction("alder", PROTOCOL, "1", BASE)
    assert answers.pop(f"node-{third}") == Refused(BASE_MODEL_DIFFERS, "cedar", ("weights",))
    assert answers.pop(f"node-{fourth}") == Refused(MALFORMED)
    ((again, refused),) = answers.items()
    assert again in (f"node-{first}", f"node-{second}")
    assert refused == Refused(NAME_DIFFERS)
    # Only one of the two is asked from then on.
    assert [name for name, _ in members.ask({"alder": request()}, 20.0)] == ["alder"]


def test_meeting_again_finds_the_same_institutions(network: Network) -> None:
    network.add(named("alder"))
    members = members_of(network)
    assert set(members.meet(HELLO, (), 20.0)) == set(members.meet(HELLO, (), 20.0)) == {"alder"}


def test_more_nodes_than_a_wave_are_asked_in_waves(network: Network) -> None:
    names = [f"n{number:02d}" for number in range(11)]
    for name in names:
        network.add(named(name))
    members = members_of(network, wave=3)
    assert set(members.meet(HELLO, (), 20.0)) == set(names)
    network.waiting.clear()
    replies = list(members.ask(dict.fromkeys(names, request()), 20.0))
    assert sorted(name for name, _ in replies) == names
    assert all(isinstance(reply, Contribution) for _, reply in replies)
    assert len(network.waiting) == len(names)
    assert max(network.waiting) <= 3
    assert network.state.num_message_ins() == network.state.num_message_res() == 0  # nothing is left behind


def test_without_a_wave_everybody_is_asked_at_once(network: Network) -> None:
    everybody = threading.Barrier(5)

    def together(name: str) -> Answer:
        def answer(message: Message) -> Message | None:
            everybody.wait(timeout=10)  # broken, and so an error, unless all five are asked before one has answered
            return named(name)(message)

        return answer

    names = [f"n{number}" for number in range(5)]
    for name in names:
        network.add(then(named(name), together(name)))
    members = FlowerMembers(network.grid, threading.Event())
    members.meet(HELLO, (), 20.0)
    replies = dict(members.ask(dict.fromkeys(names, request()), 20.0))
    assert all(isinstance(reply, Contribution) for reply in replies.values())


def test_one_request_to_many_is_written_once(network: Network) -> None:
    seen: list[RecordDict] = []

    def keeping(name: str) -> Answer:
        def answer(message: Message) -> Message | None:
            seen.append(message.content)
            return named(name)(message)

        return answer

    names = ["alder", "birch", "cedar"]
    for name in names:
        network.add(then(named(name), keeping(name)))
    members = members_of(network)
    members.meet(HELLO, (), 20.0)
    assert len(list(members.ask(dict.fromkeys(names, request(1)), 20.0))) == 3
    assert len(list(members.ask({name: request(2) for name in names}, 20.0))) == 3
    assert len({id(content) for content in seen[:3]}) == 1
    assert len({id(content) for content in seen[3:]}) == 3


def test_who_is_long_silent_is_asked_after_less_often(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    pulls: list[float] = []
    pull = network.grid.pull_messages

    def counted(ids: Any) -> Any:
        pulls.append(time.monotonic())
        return pull(ids)

    network.add(then(named("alder"), silent))
    members = members_of(network)
    members.meet(HELLO, (), 20.0)
    monkeypatch.setattr(network.grid, "pull_messages", counted)
    assert list(members.ask({"alder": request()}, 2.0)) == [("alder", Refused(TIMED_OUT))]
    assert len(pulls) < 70  # every 20 ms would be 100
    assert pulls[1] - pulls[0] < pulls[-1] - pulls[-2]


def test_a_node_that_never_answers_costs_the_time_limit_and_nobody_else(network: Network) -> None:
    network.add(named("alder"))
    network.add(then(named("birch"), silent))
    members = members_of(network)
    members.meet(HELLO, (), 20.0)
    began = time.monotonic()
    replies = []
    for name, reply in members.ask(dict.fromkeys(("alder", "birch"), request()), 1.0):
        replies.append((name, type(reply), time.monotonic() - began))
    assert [(name, kind) for name, kind, _ in replies] == [("alder", Contribution), ("birch", Refused)]
    assert replies[0][2] < 1.0 <= replies[1][2] + 0.1
    # The next round works, and the late one is asked again.
    again = dict(members.ask(dict.fromkeys(("alder", "birch"), request(2)), 0.3))
    assert isinstance(again["alder"], Contribution)
    assert again["birch"] == Refused(TIMED_OUT)


@pytest.mark.parametrize("timeout_s", [0.05, 0.2, 0.21, 0.22, 0.23])
def test_silence_is_always_told_as_a_time_out(timeout_s: float, network: Network) -> None:
    # Flower drops a message by the wall clock, about when we stop waiting by ours; both must come out alike.
    network.add(then(named("alder"), silent))
    members = members_of(network)
    members.meet(HELLO, (), 20.0)
    assert list(members.ask({"alder": request()}, timeout_s)) == [("alder", Refused(TIMED_OUT))]


def test_who_was_not_reached_in_time_is_told_too(network: Network) -> None:
    names = ["alder", "birch", "cedar"]
    for name in names:
        network.add(then(named(name), silent))
    members = members_of(network, wave=1)
    members.meet(HELLO, (), 20.0)
    replies = list(members.ask(dict.fromkeys(names, request()), 0.3))
    assert sorted(replies) == [(name, Refused(TIMED_OUT)) for name in names]
    assert network.state.num_message_ins() <= 1


def test_nobody_trains_for_a_round_that_no_longer_waits(network: Network) -> None:
    taken: list[float] = []

    def slow(message: Message) -> Message | None:
        taken.append(message.metadata.ttl)
        time.sleep(0.3)
        return named("alder")(message)

    network.add(then(named("alder"), slow))
    network.add(then(named("birch"), slow))
    members = members_of(network, wave=1)
    members.meet(HELLO, (), 20.0)
    list(members.ask(dict.fromkeys(("alder", "birch"), request()), 1.5))
    first, second = taken
    assert first <= 1.5
    assert second <= 1.5 - 0.3  # the second message lives only as long as the round still waits


def test_a_node_that_goes_away_is_told_as_a_time_out(network: Network) -> None:
    node = network.add(then(named("alder"), silent))
    members = members_of(network)
    members.meet(HELLO, (), 20.0)
    threading.Timer(0.1, lambda: network.state.delete_node(NOOP_FLWR_AID, node)).start()
    began = time.monotonic()
    assert list(members.ask({"alder": request()}, 20.0)) == [("alder", Refused(TIMED_OUT))]
    assert time.monotonic() - began < 10  # Flower says so before the time is up
    # From then on not even the message can be sent.
    assert list(members.ask({"alder": request()}, 20.0)) == [("alder", Refused(INTERNAL_ERROR))]


def crashed(code: int) -> Answer:
    return lambda message: Message(Error(code=code, reason="the record of patient 4711"), reply_to=message)


def replaced(content: Callable[[], RecordDict]) -> Answer:
    return lambda message: Message(content(), reply_to=message)


def with_arrays(arrays: ArrayRecord) -> RecordDict:
    text = ConfigRecord({"kind": "Contribution", "text": '{"plan_digest": "x"}'})
    return RecordDict({"message": text, "arrays": arrays})


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        pytest.param(crashed(ErrorCode.CLIENT_APP_RAISED_EXCEPTION), INTERNAL_ERROR, id="an exception"),
        pytest.param(crashed(ErrorCode.CLIENT_APP_CRASHED), INTERNAL_ERROR, id="a crash"),
        pytest.param(crashed(ErrorCode.LOAD_CLIENT_APP_EXCEPTION), INTERNAL_ERROR, id="no app"),
        pytest.param(replaced(RecordDict), MALFORMED, id="nothing"),
        pytest.param(
            replaced(lambda: RecordDict({"message": ConfigRecord({"kind": "Refused", "text": "["})})),
            MALFORMED,
            id="no JSON",
        ),
        pytest.param(
            replaced(lambda: RecordDict({"message": ConfigRecord({"kind": "Refused", "text": "[" * 100_000})})),
            MALFORMED,
            id="deep JSON",
        ),
        pytest.param(
            replaced(lambda: with_arrays(ArrayRecord({"array": Array("uint32", (3,), "pickle", b"x")}))),
            MALFORMED,
            id="an array in another form",
        ),
        pytest.param(
            replaced(lambda: with_arrays(ArrayRecord({"array": Array("uint32", (3,), "numpy.ndarray", b"x")}))),
            MALFORMED,
            id="broken bytes",
        ),
        pytest.param(replaced(lambda: to_records(to_wire(HELLO))), MALFORMED, id="a request as a reply"),
        pytest.param(replaced(lambda: to_records(to_wire(request()))), MALFORMED, id="an adapter as a reply"),
        pytest.param(says(lambda _: Refused(BASE_MODEL_DIFFERS, "alder")), BASE_MODEL_DIFFERS, id="a refusal"),
    ],
)
def test_whatever_a_node_sends_is_a_reason_code_and_the_others_go_on(
    answer: Answer, reason: str, network: Network
) -> None:
    network.add(then(named("alder"), answer))
    network.add(named("birch"))
    members = members_of(network)
    members.meet(HELLO, (), 20.0)
    replies = dict(members.ask(dict.fromkeys(("alder", "birch"), request()), 20.0))
    refused = replies["alder"]
    assert isinstance(refused, Refused)
    assert refused.reason == reason
    assert isinstance(replies["birch"], Contribution)


def test_codes_that_mean_no_answer_are_flowers_own() -> None:
    from server import flower

    unavailable = {
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
    }
    assert unavailable == flower._NO_ANSWER


def test_a_stop_ends_waiting_at_once(network: Network) -> None:
    network.add(then(named("alder"), silent))
    stop = threading.Event()
    members = FlowerMembers(network.grid, stop)
    members.meet(HELLO, (), 20.0)
    threading.Timer(0.1, stop.set).start()
    began = time.monotonic()
    with pytest.raises(RunStopped, match="interrupted"):
        list(members.ask({"alder": request()}, 60.0))
    with pytest.raises(RunStopped, match="interrupted"):
        members.rest(60.0)
    network.add(silent)
    with pytest.raises(RunStopped, match="interrupted"):
        members.meet(HELLO, (), 60.0)
    assert time.monotonic() - began < 10


def test_rest_is_over_when_the_time_is_up(network: Network) -> None:
    began = time.monotonic()
    members_of(network).rest(0.2)
    assert time.monotonic() - began >= 0.2


def test_hello_a_round_what_follows_it_and_an_adapter_are_four_kinds_of_message(network: Network) -> None:
    seen: list[tuple[str, str]] = []

    def answer(message: Message) -> Message | None:
        asked = from_wire(from_records(message.content))
        seen.append((type(asked).__name__, message.metadata.message_type))
        return named("alder")(message) if isinstance(asked, Hello) else says(lambda _: Refused(MALFORMED))(message)

    network.add(answer)
    members = members_of(network)
    members.meet(HELLO, (), 20.0)
    later: list[Request] = [
        KeyList("0" * 64, {}),
        Inbox("0" * 64, {}),
        Survivors("0" * 64, ("alder",)),
        Consents("0" * 64, {}),
    ]
    publication = Publication("run", 1, BASE, LoraConfig(), small_adapter().digest())
    for asked in (request(), *later, Published(publication, small_adapter())):
        assert list(members.ask({"alder": asked}, 20.0)) == [("alder", Refused(MALFORMED))]
    assert seen == [
        ("Hello", "query.hello"),
        ("TrainRequest", "train.round"),
        *((type(asked).__name__, "train.secure_aggregation") for asked in later),
        ("Published", "query.adapter"),
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({"protocol": PROTOCOL + 1}, Refused(PROTOCOL_DIFFERS, "birch", (str(PROTOCOL),)), id="protocol"),
        pytest.param({"version": "99.1.0"}, Refused(VERSION_DIFFERS, "birch", (version("silotune"),)), id="version"),
    ],
)
def test_an_institution_that_differs_says_what_it_has(
    changes: dict[str, Any],
    expected: Refused,
    network: Network,
    institution: Callable[..., Institution],
    base_model: str,
) -> None:
    """The real ClientApp, whose refusal of a protocol names nobody; who it is follows from its enrolment."""
    found = institution("birch")
    app = build_client_app(lambda _: nullcontext(found))
    node = network.add(lambda message: app(message, Context(RUN, 1, {}, RecordDict(), {})))
    members = enrolled_in(network, lambda: {node: "birch"})
    hello = replace(HELLO, fingerprint=fingerprint(base_model))
    assert members.meet(replace(hello, **changes), (), 20.0) == {"birch": expected}
    assert isinstance(members.meet(hello, (), 20.0)["birch"], Introduction)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_run_on_flower_is_the_run_in_one_process(
    enabled: bool, network: Network, base_model: str, tmp_path: Path
) -> None:
    """The real ClientApp behind every node; one contract, two transports, the same bytes."""
    config = make_config(base_model, secure_aggregation=SecureAggregationConfig(enabled=enabled))
    bench = Bench.of(config)
    for name in NAMES:
        write_jsonl(tmp_path / name / "train.jsonl", make_records(5, name))
        write_jsonl(tmp_path / name / "validation.jsonl", make_records(2, f"{name}-validation"))
    central = tmp_path / "central.jsonl"
    write_jsonl(central, make_records(3, "coordinator"))
    identities = [Identity.generate(name) for name in NAMES]
    roster = Roster.of(*identities)

    def institution(identity: Identity, place: str) -> Institution:
        home = tmp_path / place / identity.name
        policy = Policy.of(config, roster)
        secure = SecureMember(identity, policy, lambda run: home / run / "marks.json") if enabled else None
        return Institution(identity.name, RecordFolder(tmp_path / identity.name), home, ModelConfig(base_model), secure)

    def institutions(place: str) -> list[Institution]:
        return [institution(identity, place) for identity in identities]

    one_at_a_time = threading.Lock()  # institutions of one process share its model

    def play(app: ClientApp, node: int) -> Answer:
        def answer(message: Message) -> Message:
            context = Context(RUN, node, {"partition-id": node}, RecordDict(), {})
            with one_at_a_time:
                return app(message, context)

        return answer

    places = {
        network.add(play(build_client_app(lambda _, member=member: nullcontext(member)), number)): member.name  # type: ignore[misc]
        for number, member in enumerate(institutions("flower"))
    }

    def go(name: str, members: Any) -> tuple[str, list[dict[str, Any]]]:
        directory = tmp_path / name
        outcome = coordinate(config, directory, central, members, Observer(), bench, roster if enabled else None)
        history = [{**vars(replace(record, seconds={}))} for record in outcome.progress.history]
        return outcome.progress.adapter.digest(), history

    # As in a deployment with masks, as in a simulation without.
    enrolled = enrolled_in(network, lambda: places) if enabled else members_of(network)
    flower = go("run-flower", enrolled)
    direct = go("run-direct", InProcessMembers(institutions("direct")))
    assert flower == direct
    assert (tmp_path / "run-flower" / "adapter" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "run-direct" / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    assert flower[0] != bench.start.digest()
    assert (tmp_path / "run-flower" / "attempts.json").exists() == enabled
