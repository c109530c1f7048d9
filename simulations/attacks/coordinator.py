"""What a coordinator that looks learns of a member: which words its records hold more of than the coordinator's own.

Without secure aggregation it holds the member's update. With it, it holds the masked vector, the sum, and perhaps the
sum over a cohort without that member. For each of them the same question is asked: which of the tokens that the
coordinator's own validation records answer with does the member's training answer with more often?

From the gradients of single tokens in its own records the coordinator knows which update each token would cause; it
fits the update as a sum of those (ridge regression: inference of a property from an update, as Melis et al. 2019 have
it), and takes off what the same fit gives for an update that it trains on its own records.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.state import LocalState
from client.training import Assignment, train
from client.units import Unit
from common import fixed_point
from common.adapter import Adapter, flatten
from common.base_model import fingerprint
from common.config import COORDINATOR, Config, TrackingConfig, named
from common.errors import DataError
from common.evaluation import Scores as Evaluation
from common.examples import examples_of
from common.fixed_point import Layout, Ring
from common.messages import Contribution, Hello, Introduction, Plan, Refused, Reply, Request, TrainRequest
from common.methods import method_named
from common.models import LoraModel, load
from common.randomness import seeded
from common.records import read_jsonl
from common.secagg.messages import MaskedInput
from common.secagg.terms import smallest_cohort
from common.text import Example
from server.collect import Clock, Collected
from server.coordinator import collector
from server.rounds import begin, run_round
from simulations.attacks.arms import Ground, with_privacy, without_privacy
from simulations.attacks.probing import gradients
from simulations.attacks.result import Measure, Result, Told, judged
from simulations.identities import SimulatedIdentities
from simulations.institutions import virtual
from simulations.layout import RunDirectory
from simulations.members import InProcessMembers

NAME = "coordinator"
CLEAR, DP, MASKED = "update in the clear", "update in the clear, DP", "masked vector"
SUM, DIFFERENCE = "sum of the cohort", "difference of two sums"
IN_WORDS = {
    CLEAR: "its update",
    DP: "its noised update",
    MASKED: "its masked vector",
    SUM: "the sum",
    DIFFERENCE: "two sums that differ by it",
}

Vector = NDArray[np.float64]

_SHARE = 0.1  # of the tokens are what is looked for
_CONTEXTS = 6  # of each token, whose gradients make its signature
_RIDGE = 1.0  # over the mean square of the signatures
_NUMBERS = 1 << 26  # that all signatures take together, at most
_ORDERS = 400  # random rankings, for what chance gives
_ROUNDS_APART = 1  # added to the seed of the other cohort's run


# --- What the coordinator sees ----------------------------------------------------------------------------------------


@dataclass
class Watched:
    """Members whose vectors somebody looks at on their way.

    plan: of the round. vectors: what each member sent, in the clear or under masks, as elements of the ring.
    """

    members: InProcessMembers
    plan: Plan | None = None
    vectors: dict[str, Ring] = field(default_factory=dict)

    def meet(self, hello: Hello, known: Collection[str], timeout_s: float) -> dict[str, Introduction | Refused]:
        return self.members.meet(hello, known, timeout_s)

    def reachable(self) -> tuple[str, ...]:
        return self.members.reachable()

    def rest(self, seconds: float) -> None:
        self.members.rest(seconds)

    def ask(self, requests: Mapping[str, Request], timeout_s: float) -> Iterator[tuple[str, Reply]]:
        for request in requests.values():
            if isinstance(request, TrainRequest):
                self.plan = request.plan
        for name, reply in self.members.ask(requests, timeout_s):
            if isinstance(reply, Contribution | MaskedInput):
                assert self.plan is not None
                layout = self.plan.layout
                self.vectors[name] = fixed_point.unpack(reply.vector, layout.length, layout.ring_bits)
            yield name, reply


@dataclass(frozen=True)
class Seen:
    """A round in a coordinator's hands. total: the sum of weight x update [m]. weight: of all. layout: of `vectors`."""

    total: Vector
    weight: int
    layout: Layout
    vectors: Mapping[str, Ring]


def one_round(config: Config, home: Path, records: Path, start: Adapter) -> Seen:
    """The first round of a run, by the code of every run, with the vectors that pass.

    Raises RunStopped when it has no sum.
    """
    names = config.data.names
    shutil.rmtree(home, ignore_errors=True)  # a round is quick, and members give no second sum of the same adapter
    identities = SimulatedIdentities.fresh(names) if config.secure_aggregation.enabled else None
    directory = RunDirectory(home)
    watched = Watched(InProcessMembers([virtual(config, directory, name, records, identities) for name in names]))
    roster = identities.roster() if identities else None
    collect = collector(config, watched, roster, home, lambda _: None)
    sums: list[Collected] = []

    def collected(plan: Plan, adapter: Adapter, clock: Clock) -> Collected:
        sums.append(collect(plan, adapter, clock))
        return sums[-1]

    nothing = begin(start, Evaluation())
    run_round(config, NAME, names, fingerprint(config.model.path), collected, lambda _: Evaluation(), nothing)
    assert watched.plan is not None
    return Seen(sums[0].summed.update, sums[0].summed.weight, watched.plan.layout, watched.vectors)


def as_update(vector: Ring, layout: Layout) -> Vector:
    """A vector's elements as numbers [m], whether or not they mean anything."""
    unused = 32 - layout.ring_bits
    signed = (vector[: layout.parameters] << np.uint32(unused)).view(np.int32) >> unused
    return np.asarray(signed * layout.error, np.float64)


def views(ground: Ground, start: Adapter, tell: Told) -> dict[str, dict[str, Vector]]:
    """What the coordinator has of each member, by what it looks at: a vector that holds its update, or should [m]."""
    plain, names = _watched(without_privacy(ground.config)), ground.config.data.names
    private = _watched(with_privacy(ground.config))

    def seen(config: Config, kind: str) -> Seen:
        tell(f"one round, {kind}")
        return one_round(config, ground.runs / NAME / kind.replace(" ", "-"), ground.records, start)

    clear = seen(_masked(plain, False), "in the clear")
    under = seen(_masked(plain, True), "masked")
    found = {
        CLEAR: {name: as_update(vector, clear.layout) for name, vector in clear.vectors.items()},
        MASKED: {name: as_update(vector, under.layout) for name, vector in under.vectors.items()},
        SUM: dict.fromkeys(names, under.total),
    }
    if not private.privacy.shared_noise:
        noised = seen(_masked(private, False), "in the clear, DP")
        found[DP] = {name: as_update(vector, noised.layout) for name, vector in noised.vectors.items()}
    if len(names) - 1 >= smallest_cohort(plain.secure_aggregation.colluders):
        # Another run: whoever is in both trains in another order, as a deployment has it.
        found[DIFFERENCE] = {
            name: under.total - seen(_masked(_without(plain, name), True), f"masked, without {name}").total
            for name in names
        }
    return found


def _watched(config: Config) -> Config:
    """A whole cohort, and nothing but the round itself."""
    return replace(
        config,
        federation=replace(config.federation, fraction=1.0),
        evaluation=replace(config.evaluation, exact=[], institutions=False),
        tracking=TrackingConfig(tensorboard=False),
        simulation=replace(config.simulation, faults=[]),
    )


def _masked(config: Config, enabled: bool) -> Config:
    return replace(config, secure_aggregation=replace(config.secure_aggregation, enabled=enabled))


def _without(config: Config, name: str) -> Config:
    left = [other for other in config.data.names if other != name]
    return replace(
        config,
        seed=config.seed + _ROUNDS_APART,
        data=replace(config.data, institutions=named(*left), train_records=[]),
        federation=replace(config.federation, min_cohort=min(config.federation.min_cohort, len(left))),
    )


# --- What it makes of it ----------------------------------------------------------------------------------------------


def answers(examples: Sequence[Example]) -> list[int]:
    """All supervised tokens."""
    return [token for example in examples for start, stop in example.spans for token in example.ids[start:stop]]


@dataclass(frozen=True)
class Reader:
    """Reads shares of tokens off an update.

    tokens: those of the coordinator's own records [v]. share: of each in those records [v]. places: of the update's
    elements that are looked at. signatures: the update that one more answer with each token would cause [v, places].
    inverse: of the fit [v, v]. own: what the fit gives for the coordinator's own records [v].
    """

    tokens: NDArray[np.int64]
    share: Vector
    places: NDArray[np.int64]
    signatures: NDArray[np.float32]
    inverse: Vector
    own: Vector

    def fit(self, update: Vector) -> Vector:
        """How much of each token an update holds [v]; of length 1."""
        found = self.inverse @ (self.signatures @ update[self.places].astype(np.float32)).astype(np.float64)
        return found / max(float(np.abs(found).sum()), 1e-300)

    def more(self, update: Vector) -> Vector:
        """How much more of each token than the coordinator's own records, in standard deviations of a count [v]."""
        return (self.fit(update) - self.own) / np.sqrt(self.share)

    def truth(self, examples: Sequence[Example]) -> Vector:
        """The same of records that are known [v]."""
        counts = np.bincount(answers(examples), minlength=int(self.tokens.max()) + 1)[self.tokens]
        return (counts / max(int(counts.sum()), 1) - self.share) / np.sqrt(self.share)


def reader(config: Config, model: LoraModel, start: Adapter, examples: Sequence[Example]) -> Reader:
    """What a coordinator with these records of its own can read. Raises DataError for records with too few tokens."""
    contexts: dict[int, list[Example]] = {}
    for example in examples:
        for begin_, stop in example.spans:
            for place in range(begin_, stop):
                contexts.setdefault(example.ids[place], []).append(Example(example.ids[: place + 1], place, "", None))
    tokens = np.array(sorted(contexts))
    if len(tokens) * _SHARE < 1:
        raise DataError(
            f"expected at least {1 / _SHARE:g} different tokens in the coordinator's answers, found {len(tokens)}"
        )
    keys = method_named(config.federation.method).trained(start)
    parameters = sum(start.factors[key].size for key in keys)
    most = max(1, _NUMBERS // len(tokens))
    places = np.arange(parameters)
    if parameters > most:
        places = np.sort(seeded(config.seed, "places").choice(parameters, most, replace=False))
    units = [Unit(tuple(contexts[int(token)][:_CONTEXTS])) for token in tokens]
    signatures = -np.stack([vector[places] for vector in gradients(model, start, keys, units)])
    # As AdamW does: what moves much for every token is worth as much as what moves little.
    signatures /= np.sqrt(np.mean(np.square(signatures), axis=0)) + 1e-12
    gram = (signatures @ signatures.T).astype(np.float64)
    inverse = np.linalg.inv(gram + _RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)))
    counts = np.bincount(answers(examples), minlength=int(tokens.max()) + 1)[tokens]
    blank = Reader(tokens, counts / counts.sum(), places, signatures, inverse, np.zeros(len(tokens)))
    task = Assignment(1, config.federation.rounds, keys, config.seed, COORDINATOR)
    trained = train(model, examples, start, LocalState(), config.train, task).adapter
    own = flatten(trained.factors, keys).astype(np.float64) - flatten(start.factors, keys)
    return replace(blank, own=blank.fit(own))


def average_precision(scores: Vector, wanted: NDArray[np.bool_]) -> float:
    """Mean precision over the places of what is wanted, in the ranking by score."""
    hit = wanted[np.argsort(-scores, kind="stable")]
    return float((np.cumsum(hit) / np.arange(1, len(hit) + 1))[hit].mean())


def recall(scores: Vector, wanted: NDArray[np.bool_]) -> float:
    """The share of what is wanted among as many of the first in the ranking."""
    return float(wanted[np.argsort(-scores, kind="stable")[: wanted.sum()]].mean())


@dataclass(frozen=True)
class Success:
    """Means over members. precision: average precision. recall: at as many as are wanted. likeness: correlation of what
    is read with what is true.
    """

    precision: float
    recall: float
    likeness: float


def success(read: Mapping[str, Vector], truth: Mapping[str, Vector]) -> Success:
    """How well what is read of each member fits what is true of it; wanted are the tokens it has most of."""
    rows = []
    for name, scores in read.items():
        wanted = _wanted(truth[name])
        likeness = float(np.corrcoef(scores, truth[name])[0, 1]) if scores.std() > 0 else 0.0
        rows.append((average_precision(scores, wanted), recall(scores, wanted), likeness))
    return Success(*(float(value) for value in np.mean(rows, axis=0)))


def _wanted(truth: Vector) -> NDArray[np.bool_]:
    wanted = np.zeros(len(truth), np.bool_)
    wanted[np.argsort(-truth, kind="stable")[: max(1, round(_SHARE * len(truth)))]] = True
    return wanted


def by_chance(tokens: int, members: int, seed: int) -> tuple[float, float]:
    """Average precision of random rankings, averaged over so many members: its mean and standard deviation."""
    rng, wanted = seeded(seed, "chance"), _wanted(-np.arange(tokens, dtype=np.float64))
    drawn = np.array([average_precision(rng.random(tokens), wanted) for _ in range(_ORDERS)])
    return float(drawn.mean()), float(drawn.std() / math.sqrt(members))


def attack(ground: Ground, tell: Told) -> Result:
    """Looks at one round. Raises DataError, ModelError and RunStopped as their names say."""
    config = without_privacy(ground.config)
    model = load(config.model, config.lora, config.seed)
    start = model.read()
    seen = views(ground, start, tell)
    tell("reading what was seen")

    def read(file: Path) -> tuple[Example, ...]:
        return examples_of(read_jsonl(file), model.tokenizer, config.train, file).examples

    eye = reader(config, model, start, read(ground.directory.central(ground.config, "validation")))
    truth = {name: eye.truth(read(ground.records / name / "train.jsonl")) for name in config.data.names}
    found = {
        of: success({name: eye.more(update) for name, update in updates.items()}, truth) for of, updates in seen.items()
    }
    return result(ground.config, found, by_chance(len(eye.tokens), len(truth), config.seed), len(eye.tokens))


def sent(config: Config) -> str:
    """What members of a run send to its coordinator."""
    if config.secure_aggregation.enabled:
        return MASKED
    return DP if config.privacy.private else CLEAR


def result(config: Config, found: Mapping[str, Success], chance: tuple[float, float], tokens: int) -> Result:
    """What was read, against chance: mean and standard deviation of a random ranking's average precision.

    config: of the run that is attacked.
    """
    (mean, spread), own = chance, sent(config)
    order = [of for of in IN_WORDS if of in found]
    measures = []
    for of in order:
        about = f"{round(_SHARE * tokens)} of {tokens} tokens; chance {mean:.2f} ± {spread:.2f}"
        measures += [
            Measure(of, "average precision", found[of].precision, about),
            Measure(of, "recall at k", found[of].recall, f"chance {_SHARE:g}"),
            Measure(of, "correlation with the true shares", found[of].likeness, "chance 0"),
        ]
    others = [f"{found[of].precision:.2f} from {IN_WORDS[of]}" for of in order if of != own]
    if DIFFERENCE not in found:
        others.append(f"{IN_WORDS[DIFFERENCE]} are refused, since one would be of too few")
    return judged(
        NAME,
        "secure aggregation",
        promised=config.secure_aggregation.enabled,
        # Five standard deviations: a masked vector is uniform whatever it hides, so that more is no accident.
        kept=found[MASKED].precision <= mean + 5 * spread,
        claim="With secure aggregation the coordinator learns sums and no update; what a sum tells is not bounded.",
        finding="What a member's records hold most of is found with an average precision of"
        f" {found[own].precision:.2f} from {IN_WORDS[own]}, which is what it sends in this run (chance {mean:.2f});"
        f" {', '.join(others)}.",
        measures=measures,
    )
