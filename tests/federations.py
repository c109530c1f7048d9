"""A federation in miniature: real members with real marks on disk, and a coordinator that goes as far as a test says.

Everything that anybody says goes through its wire form, on request through Flower's records and the ClientApp too. Only
training is left out: a member's vector is ready when a plan comes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from flwr.app import Context, Message, RecordDict

from client.app import build_client_app
from client.data_sets import RecordFolder
from client.institution import Institution
from client.policy import Policy
from client.secure import SecureMember, Update
from common import fixed_point
from common.adapter import Adapter, flatten
from common.base_model import Fingerprint
from common.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    FederationConfig,
    ModelConfig,
    QuantiseConfig,
    SecureAggregationConfig,
    named,
)
from common.fixed_point import NATS, Layout, Ring
from common.flower import ROUND, SECURE, from_records, to_records
from common.messages import Plan, Reply, Request, SecurePlan, Settings, TrainRequest
from common.randomness import seeded
from common.secagg.aggregator import Aggregator
from common.secagg.identity import Identity, Roster
from common.secagg.messages import Consent, Consents, Inbox, KeyList, Keys, MaskedInput, Revealed, Shares, Survivors
from common.secagg.terms import Terms
from common.wire import Wire, from_wire, to_wire

NAMES = ("alder", "birch", "cedar", "dogwood", "elm", "fir", "gorse")
RUN = "tiny-run"
BASE = Fingerprint("config", "weights", "tokenizer")

K = TypeVar("K", Keys, Shares, MaskedInput, Consent, Revealed)


def adapter_of(seed: int) -> Adapter:
    """A global adapter of 14 parameters; another seed, another digest."""
    rng = np.random.default_rng(seed)
    A, B = rng.standard_normal((2, 3), np.float32), np.zeros((4, 2), np.float32)
    return Adapter({"layer.lora_A.weight": A, "layer.lora_B.weight": B})


ADAPTER = adapter_of(1)
PARAMETERS = len(flatten(ADAPTER.factors, ADAPTER.factors))


def federation_config(
    names: tuple[str, ...] = NAMES[:4], repeats: int = 2, colluders: int = 1, **federation: Any
) -> Config:
    return Config(
        name="tiny",
        seed=4,
        data=DataConfig(institutions=named(*names), directory="unused"),
        federation=FederationConfig(**{"rounds": 4, "weight_unit": 1, "timeout_s": 60.0, **federation}),
        secure_aggregation=SecureAggregationConfig(colluders=colluders, repeats=repeats, timeout_s=7.0),
        quantise=QuantiseConfig(clip=1.0, bits=20, weight_bits=6),
        evaluation=EvaluationConfig(exact=[]),
    )


def vector_of(name: str, adapter_digest: str, layout: Layout) -> Ring:
    """The vector that `name` computes from an adapter, the same whenever it is asked."""
    rng = seeded("update", name, adapter_digest)
    update = rng.uniform(-1.2, 1.2, layout.parameters).astype(np.float32)  # some of it beyond the clip
    counters = {"train_loss": 7 * NATS, "train_tokens": 3, "validation_loss": 5 * NATS, "validation_tokens": 2}
    return fixed_point.encode(update, len(name), counters, layout, rng)


def _no_update(name: str, plan: Plan) -> Ring:
    return vector_of(name, plan.adapter_digest, plan.layout)


def kept(former: Update | None, make: Callable[[], Ring]) -> tuple[Update, Ring]:
    """What an institution without noise computes: a repeat has the vector that the attempt before had."""
    vector = make() if former is None else former.astype(np.uint32, copy=False)
    return vector, vector


@dataclass(frozen=True)
class Seat(Institution):
    """An institution that has its vector ready instead of a model to train; all else is the real one's."""

    train: Callable[[str, Plan], Ring] = field(default=_no_update)

    def _contribute(self, request: TrainRequest) -> Reply:
        assert self.secure is not None
        return self.secure.begin(
            request.plan, PARAMETERS, lambda former: kept(former, lambda: self.train(self.name, request.plan))
        )


def through_app(institution: Institution, wire: Wire, kind: str = ROUND) -> Reply:
    """What an institution answers to a message in the form in which Flower brings it."""
    message = Message(to_records(wire), dst_node_id=77, message_type=kind, ttl=60.0)
    message.metadata.__dict__["_message_id"] = "message-1"
    context = Context(run_id=5, node_id=77, node_config={}, state=RecordDict(), run_config={})
    answer = build_client_app(lambda _: nullcontext(institution))(message, context)
    assert not answer.has_error()
    reply = from_wire(from_records(answer.content))
    assert isinstance(reply, Reply)
    return reply


class Federation:
    """n members, each with a home of its own below `root`.

    sent: everything that left a member, in order. trained: how often each was asked for a new vector. spent: attempts
    before those that a test counts from 1. vector: what a name computes from an adapter.
    through_flower: whether messages also take the form of Flower's records, and pass the ClientApp.
    """

    def __init__(self, root: Path, config: Config | None = None, through_flower: bool = False) -> None:
        self.root = root
        self.config = config or federation_config()
        self.names = self.config.data.names
        self.through_flower = through_flower
        self.identities = {name: Identity.generate(name) for name in self.names}
        self.roster = Roster.of(*self.identities.values())
        self.policy = Policy.of(self.config, self.roster)
        self.sent: list[tuple[str, Reply]] = []
        self.trained: Counter[str] = Counter()
        self.spent = 0
        self.vector = vector_of
        self.seats = {name: self._seat(name) for name in self.names}

    def _seat(self, name: str, policy: Policy | None = None) -> Seat:
        secure = SecureMember(self.identities[name], policy or self.policy, lambda run: self.marks(name, run))
        return Seat(
            name, RecordFolder(self.root / "data"), self.home(name), ModelConfig("unused"), secure, train=self.train
        )

    def home(self, name: str) -> Path:
        return self.root / name

    def marks(self, name: str, run: str = RUN) -> Path:
        """What a member must not forget of a run."""
        return self.home(name) / run / "marks.json"

    def restart(self, name: str, policy: Policy | None = None) -> None:
        """A new process on the same disk."""
        self.seats[name] = self._seat(name, policy)

    def member(self, name: str) -> SecureMember:
        secure = self.seats[name].secure
        assert secure is not None
        return secure

    def train(self, name: str, plan: Plan) -> Ring:
        self.trained[name] += 1
        return self.vector(name, plan.adapter_digest, plan.layout)

    def total(self, plan: Plan, names: tuple[str, ...]) -> Ring:
        """The plain sum of the vectors of `names`."""
        vectors = [self.vector(name, plan.adapter_digest, plan.layout) for name in names]
        total: Ring = np.sum(vectors, axis=0, dtype=np.uint32)
        return total & np.uint32(plan.layout.ring_mask)

    # --- Messages -------------------------------------------------------------------------------------------------

    def plan(
        self, attempt: int = 1, cohort: tuple[str, ...] = (), adapter: Adapter = ADAPTER, first: int = 0, **changes: Any
    ) -> Plan:
        """An honest plan. cohort: all, unless said. first: size of the first attempt's cohort, unless it is this."""
        cohort = cohort or self.names
        agreed = self.config
        terms = Terms.of(first or len(cohort), agreed.secure_aggregation.colluders, agreed.federation.min_cohort)
        draft = Plan(RUN, 1, cohort, PARAMETERS, adapter.digest(), BASE, Settings.of(agreed))
        draft = replace(draft, secure=SecurePlan(self.spent + attempt, self.roster.digest(), terms, 0, 0))
        return replace(fitting(draft), **changes)

    def announce(self, name: str, plan: Plan, adapter: Adapter = ADAPTER) -> Reply:
        """What `name` answers to a plan."""
        return self.ask(name, TrainRequest(plan, adapter))

    def ask(self, name: str, request: Request) -> Reply:
        """What `name` answers, as it arrives."""
        reply = self._through_app(name, request) if self.through_flower else self._through_wire(name, request)
        self.sent.append((name, reply))
        return reply

    def _through_wire(self, name: str, request: Request) -> Reply:
        received = from_wire(to_wire(request))
        assert isinstance(received, Request)
        reply = from_wire(to_wire(self.seats[name].answer(received)))
        assert isinstance(reply, Reply)
        return reply

    def _through_app(self, name: str, request: Request) -> Reply:
        kind = ROUND if isinstance(request, TrainRequest) else SECURE
        return through_app(self.seats[name], to_wire(request), kind)

    def coordinator(self, plan: Plan | None = None) -> Coordinator:
        return Coordinator(self, plan or self.plan())


def fitting(plan: Plan) -> Plan:
    """The plan with the vector's length and the bits of the ring that follow from the rest of it."""
    assert plan.secure is not None
    layout = plan.layout
    return replace(plan, secure=replace(plan.secure, length=layout.length, ring_bits=layout.ring_bits))


def with_terms(plan: Plan, **changes: Any) -> Plan:
    """The plan with other terms; length and ring as they follow from these."""
    assert plan.secure is not None
    return fitting(replace(plan, secure=replace(plan.secure, terms=replace(plan.secure.terms, **changes))))


def with_secure(plan: Plan, **changes: Any) -> Plan:
    """The plan with something else said of secure aggregation."""
    assert plan.secure is not None
    return replace(plan, secure=replace(plan.secure, **changes))


class Coordinator:
    """An honest coordinator of one attempt. Each method is one phase: it asks everybody, and takes the answers."""

    def __init__(self, federation: Federation, plan: Plan) -> None:
        self.federation = federation
        self.plan = plan
        self.aggregator = Aggregator(plan.attempt, federation.roster)
        self.answers: dict[str, Reply] = {}
        self.list: KeyList | None = None
        self.boxes: dict[str, Inbox] = {}
        self.named: Survivors | None = None

    def _ask(self, requests: Mapping[str, Request], kind: type[K], take: Callable[[str, K], None]) -> None:
        self.answers = {name: self.federation.ask(name, request) for name, request in requests.items()}
        for name, reply in self.answers.items():
            assert isinstance(reply, kind), f"{name} answered {reply}"
            take(name, reply)

    def keys(self, without: tuple[str, ...] = (), adapter: Adapter = ADAPTER) -> KeyList:
        """Announces the plan and lists the keys."""
        request = TrainRequest(self.plan, adapter)
        names = [name for name in self.plan.cohort if name not in without]
        self._ask(dict.fromkeys(names, request), Keys, self.aggregator.on_keys)
        self.list = self.aggregator.key_list()
        return self.list

    def shares(self, without: tuple[str, ...] = (), adapter: Adapter = ADAPTER) -> dict[str, Inbox]:
        """As far as the inboxes; members of `without` fall silent after their keys."""
        key_list = self.list or self.keys(adapter=adapter)
        names = [name for name in key_list.keys if name not in without]
        self._ask(dict.fromkeys(names, key_list), Shares, self.aggregator.on_shares)
        self.boxes = self.aggregator.inboxes()
        return self.boxes

    def masked(self, without: tuple[str, ...] = (), adapter: Adapter = ADAPTER) -> Survivors:
        """As far as the masked input; members of `without` fall silent after their shares."""
        boxes = self.boxes or self.shares(adapter=adapter)
        self._ask(
            {name: box for name, box in boxes.items() if name not in without}, MaskedInput, self.aggregator.on_masked
        )
        self.named = self.aggregator.survivors()
        return self.named

    def consents(self, without: tuple[str, ...] = (), adapter: Adapter = ADAPTER) -> Consents:
        """As far as the consents; survivors of `without` give none."""
        named = self.named or self.masked(adapter=adapter)
        names = [name for name in named.names if name not in without]
        self._ask(dict.fromkeys(names, named), Consent, self.aggregator.on_consent)
        return self.aggregator.consents()

    def sum(self, adapter: Adapter = ADAPTER) -> Ring:
        """To the end."""
        consents = self.consents(adapter=adapter)
        self._ask(dict.fromkeys(consents.signatures, consents), Revealed, self.aggregator.on_revealed)
        return self.aggregator.unmask()


# --- Members of a run -----------------------------------------------------------------------------------------------

Answer = Callable[[str, Request, Callable[[Request], Reply]], Reply]
"""What comes back of a request to a name; the last argument is the honest way to ask."""


def honestly(name: str, request: Request, ask: Callable[[Request], Reply]) -> Reply:
    return ask(request)


class WiredMembers:
    """The members of a federation as `server.secure` asks them. answer: what a test does to messages on the way.

    asked: names and kind of request, by phase. requests: themselves. replies: what came back, by phase. patience: how
    long the coordinator would have waited. late: what also arrives with the answers to a kind of request.
    """

    def __init__(self, federation: Federation, answer: Answer = honestly) -> None:
        self.federation = federation
        self.answer = answer
        self.asked: list[tuple[tuple[str, ...], type[Request]]] = []
        self.requests: list[Mapping[str, Request]] = []
        self.replies: list[list[tuple[str, Reply]]] = []
        self.patience: list[float] = []
        self.late: dict[type[Request], list[tuple[str, Reply]]] = {}

    def ask(self, requests: Mapping[str, Request], timeout_s: float) -> Iterator[tuple[str, Reply]]:
        kind = type(next(iter(requests.values())))
        self.asked.append((tuple(requests), kind))
        self.requests.append(requests)
        self.replies.append([])
        self.patience.append(timeout_s)
        for name, request in requests.items():
            reply = self.answer(name, request, partial(self.federation.ask, name))
            self.replies[-1].append((name, reply))
            yield name, from_wire(to_wire(reply))  # type: ignore[misc]  # a Reply stays one
        yield from self.late.pop(kind, [])


# --- What tests look for --------------------------------------------------------------------------------------------


def told(records: list[logging.LogRecord], logger: str, *words: str) -> bool:
    """Whether a line of at least a warning in `logger` has all these words."""
    return any(
        record.name == logger and record.levelno >= logging.WARNING and all(w in record.getMessage() for w in words)
        for record in records
    )
