"""Members that answer by a rule instead of a model, for rounds in milliseconds; and the small base model of the
institutions' tests, for rounds with real ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.policy import Policy
from client.secure import SecureMember
from common import fixed_point
from common.adapter import Adapter, flatten
from common.base_model import Fingerprint
from common.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    FederationConfig,
    QuantiseConfig,
    SecureAggregationConfig,
    named,
)
from common.errors import Refusal
from common.evaluation import Scores
from common.fixed_point import NATS, Ring
from common.messages import Contribution, Hello, Plan, Published, Refused, Reply, Request, TrainRequest
from common.methods import METHODS
from common.randomness import seeded
from common.secagg.identity import Identity, Roster
from server.collect import OnHeard
from server.coordinator import collector
from server.rounds import Progress, begin, run_rounds
from tests.client.conftest import base_model, institution
from tests.federations import kept

__all__ = ["base_model", "institution"]

ROSTER = ("alder", "birch", "cedar", "dogwood")
IDENTITIES = {name: Identity.generate(name) for name in ROSTER}
KEYS = Roster.of(*IDENTITIES.values())
BASE = Fingerprint("config", "weights", "tokenizer")
A, B = "layer.lora_A.weight", "layer.lora_B.weight"


def small_adapter(seed: int = 1) -> Adapter:
    rng = np.random.default_rng(seed)
    return Adapter({A: rng.standard_normal((2, 3)), B: np.zeros((4, 2))})


def rounds_config(
    institutions: Sequence[str] = ROSTER,
    evaluation: EvaluationConfig | None = None,
    secure: bool = False,
    **federation: Any,
) -> Config:
    """Four rounds of four institutions, in the clear unless `secure`; a keyword changes the federation."""
    return Config(
        name="tiny",
        seed=4,
        data=DataConfig(institutions=named(*institutions), directory="unused"),
        federation=FederationConfig(
            **{"rounds": 4, "weight_unit": 1, "min_cohort": 3 if secure else 2, "timeout_s": 5.0, **federation}
        ),
        secure_aggregation=SecureAggregationConfig(enabled=secure),
        quantise=QuantiseConfig(clip=1.0, bits=20, weight_bits=8),
        evaluation=evaluation or EvaluationConfig(exact=[]),
    )


@dataclass(frozen=True)
class Share:
    """What an institution puts into the sum: the same amount in every element, a weight, and sums of nats."""

    amount: float = 0.1
    weight: int = 1
    train: tuple[float, int] = (10.0, 5)
    validation: tuple[float, int] = (8.0, 4)

    def vector(self, plan: Plan, name: str) -> Ring:
        counters = {
            "train_loss": round(self.train[0] * NATS),
            "train_tokens": self.train[1],
            "validation_loss": round(self.validation[0] * NATS),
            "validation_tokens": self.validation[1],
        }
        update = np.full(plan.parameters, self.amount, np.float32)
        return fixed_point.encode(update, self.weight, counters, plan.layout, seeded("rounding", name, plan.round))


Update = Callable[[str, TrainRequest], Ring]
Rule = Callable[[str, TrainRequest], Reply]


def towards_one(name: str, request: TrainRequest) -> Ring:
    """An update towards 1 that depends on name and adapter, so that a round cannot be mixed up with another."""
    adapter, plan = request.adapter, request.plan
    begin = flatten(adapter.factors, METHODS[plan.settings.method].trained(adapter))
    rng = seeded("update", name, plan.round)
    update = (0.3 * (1 - begin) + 0.05 * rng.standard_normal(len(begin))).astype(np.float32)
    weight = 1 + ROSTER.index(name) if name in ROSTER else 1
    counters = {"train_loss": 7 * NATS, "train_tokens": 3, "validation_loss": 5 * NATS, "validation_tokens": 2}
    return fixed_point.encode(update, weight, counters, plan.layout, seeded("rounding", name, plan.round))


def in_clear(vector: Ring, plan: Plan) -> Contribution:
    """A vector as it travels without secure aggregation."""
    return Contribution(plan.digest(), fixed_point.pack(vector, plan.layout.ring_bits))


def contribute(name: str, request: TrainRequest) -> Reply:
    return in_clear(towards_one(name, request), request.plan)


def amounts(of: Mapping[str, Share]) -> Update:
    """Each institution's share, the same in every round."""
    return lambda name, request: of[name].vector(request.plan, name)


def shares(of: Mapping[str, Share]) -> Rule:
    """Each institution contributes its share in every round."""
    return lambda name, request: in_clear(of[name].vector(request.plan, name), request.plan)


@dataclass
class RuleMembers:
    """Members that answer by a rule; `asked` are the cohorts so far."""

    rule: Rule = contribute
    order: Callable[[list[str]], Sequence[str]] = list

    def __post_init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    def ask(self, requests: Mapping[str, Request], timeout_s: float) -> Iterator[tuple[str, Reply]]:
        self.asked.append(tuple(requests))
        for name in self.order(list(requests)):
            request = requests[name]
            assert isinstance(request, TrainRequest)
            yield name, self.rule(name, request)


class SecureMembers:
    """Real members of secure aggregation, without a model: their vectors follow a rule."""

    def __init__(self, config: Config, homes: Path, update: Update = towards_one) -> None:
        self.update = update
        self.homes = homes
        self.members = {name: self._member(name, Policy.of(config, KEYS)) for name in config.data.names}

    def _member(self, name: str, policy: Policy) -> SecureMember:
        return SecureMember(IDENTITIES[name], policy, lambda run: self.homes / name / run / "marks.json")

    def ask(self, requests: Mapping[str, Request], timeout_s: float) -> Iterator[tuple[str, Reply]]:
        for name, request in requests.items():
            try:
                yield name, self._answer(name, request)
            except Refusal as refusal:
                yield name, Refused(refusal.reason, name)

    def _answer(self, name: str, request: Request) -> Reply:
        assert not isinstance(request, Hello | Published)
        if not isinstance(request, TrainRequest):
            return self.members[name].answer(request)
        adapter = request.adapter
        trained = METHODS[request.plan.settings.method].trained(adapter)
        parameters = len(flatten(adapter.factors, trained))
        return self.members[name].begin(
            request.plan, parameters, lambda former: kept(former, lambda: self.update(name, request))
        )


def distance_to_one(adapter: Adapter) -> Scores:
    """A central evaluation: the nearer to 1, the better."""
    factors = flatten(adapter.factors, adapter.factors).astype(np.float64)
    return Scores(loss=float(np.abs(factors - 1).mean()) * 10, tokens=10)


def play(
    config: Config,
    members: Any,
    progress: Progress | None = None,
    evaluate: Callable[[Adapter], Scores] = distance_to_one,
    on_round: Callable[[Progress], None] = lambda _: None,
    present: Sequence[str] = ROSTER,
    on_heard: OnHeard = lambda _: None,
    directory: Path | None = None,
) -> Progress:
    """The rounds as a coordinator runs them. directory: where attempts are kept, for secure aggregation."""
    start = small_adapter()
    if config.secure_aggregation.enabled:
        assert directory is not None
    collect = collector(config, members, KEYS, directory or Path("unused"), on_heard)
    return run_rounds(
        config=config,
        run="tiny-run",
        present=tuple(present),
        fingerprint=BASE,
        collect=collect,
        evaluate=evaluate,
        progress=progress or begin(start, evaluate(start)),
        on_round=on_round,
    )


@pytest.fixture
def log_lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What the coordinator's log says so far, whatever a command did to it before."""
    for name in ("silotune", "silotune.server"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    caplog.set_level(logging.DEBUG, "silotune")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "silotune.server"]


@pytest.fixture
def frozen_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are the one thing in a record that two equal rounds do not share."""
    monkeypatch.setattr("time.perf_counter", lambda: 0.0)


def without_seconds(progress: Progress) -> Progress:
    return replace(progress, history=tuple(replace(record, seconds={}) for record in progress.history))
