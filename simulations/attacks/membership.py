"""Was this record trained on? Asked of the adapter that is published.

Members are institutions' training records. Everybody else's are records made in the same way for the same institutions,
or, where records come from files, the institutions' held-out ones; then a difference between the two kinds can look
like memory, and the base model's own figure says how much.

loss: the lower a record's loss, the likelier it was trained on (Yeom et al. 2018). likelihood ratio: the same against
what models that have not seen the record make of it, as offline LiRA with one variance for all (Carlini et al. 2022,
section 5.4 and equation 4); the reference models are the other institutions' own, trained alone, and the base: what an
institution has that attacks another one.

What is proved of epsilon is proved of its unit, since a person's records are no independent trials: a person's score is
the mean over them. Institutions, where they are the unit, are too few to prove anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from client.units import PATIENT, Unit
from common.adapter import Adapter
from common.config import Config
from common.examples import examples_of
from common.models import LoraModel, load
from common.records import Record, read_jsonl
from simulations.attacks.arms import (
    BASE,
    FEDERATED,
    IN_WORDS,
    LOCAL,
    PRIVATE,
    Ground,
    claimed,
    jobs,
    own_and_other,
    published,
    train_all,
    with_privacy,
)
from simulations.attacks.bounds import CONFIDENCE, Scores, auc, hits_at, rates
from simulations.attacks.probing import losses
from simulations.attacks.result import Measure, Result, Told, judged
from simulations.generate import federation as generator

NAME = "membership"
KINDS = LOSS, RATIO = "loss", "likelihood ratio"
FALSE = 0.01
"""The false positive rate at which true positives are counted."""
FEWEST = 50
"""Records that are made for an institution beside its own, at least."""


@dataclass(frozen=True)
class Sides:
    """Records of one institution: those that it trained on, and others like them."""

    members: tuple[Record, ...]
    others: tuple[Record, ...]


def sides(ground: Ground) -> dict[str, Sides]:
    """Both sides of every institution; a record that equals one that was trained on anywhere is on neither."""
    data, folder = ground.config.data, ground.records
    train = {name: read_jsonl(folder / name / "train.jsonl") for name in data.names}
    seen = {record.texts for records in train.values() for record in records}
    generated = not data.directory and not data.has_files
    found = {}
    for name, own in train.items():
        if generated:
            others: Sequence[Record] = generator.alike(data, name, max(len(own), FEWEST))
        else:
            others = [r for part in ("validation", "test") for r in read_jsonl(folder / name / f"{part}.jsonl")]
        found[name] = Sides(own, tuple(record for record in others if record.texts not in seen))
    return found


def attack(ground: Ground, tell: Told) -> Result:
    """Attacks every arm. Raises ConfigError, DataError, ModelError and RunStopped as their names say."""
    config = ground.config
    found = sides(ground)
    adapters = train_all(jobs(ground, (LOCAL, FEDERATED, PRIVATE)), config.simulation.actors, tell)
    model = load(config.model, config.lora, config.seed)
    tell("scoring every record under every adapter")
    scores = scored(config, model, found, adapters)
    private = with_privacy(config)
    proof = by_unit([scores[PRIVATE, kind] for kind in KINDS], found, private.privacy.mode)
    return result(config, claimed(private, model.read()), scores, proof, published(adapters[PRIVATE, ""]))


Pair = tuple[Scores, Scores]
"""Scores of members and of others, all institutions together."""
Arms = Mapping[tuple[str, str], Pair]
"""By arm and kind of attack, a score for each record."""


def by_unit(scores: Sequence[Pair], found: Mapping[str, Sides], mode: str) -> list[Pair]:
    """The mean score of each unit that `mode` protects; none of institutions, which are too few to prove anything.

    scores: by kind of attack, of all records of `found` in order.
    """
    if mode == "institution":
        return []

    def of_units(values: Scores, side: str) -> Scores:
        of = [(name, place, record) for name, s in found.items() for place, record in enumerate(getattr(s, side))]
        whose = [f"{name}/{record.person if mode == PATIENT else place}" for name, place, record in of]
        _, unit = np.unique(whose, return_inverse=True)
        return np.asarray(np.bincount(unit, weights=values) / np.bincount(unit), np.float64)

    return [(of_units(members, "members"), of_units(others, "others")) for members, others in scores]


def scored(
    config: Config, model: LoraModel, found: Mapping[str, Sides], adapters: Mapping[tuple[str, str], Adapter]
) -> Arms:
    """Scores of all records, higher for likelier members."""
    scores: dict[tuple[str, str], list[Pair]] = {}
    base = model.read()
    for name, side in found.items():
        kinds = [_units(records, model, config) for records in (side.members, side.others)]
        targets = {
            BASE: base,
            LOCAL: adapters[LOCAL, name],
            FEDERATED: adapters[FEDERATED, ""],
            PRIVATE: adapters[PRIVATE, ""],
        }
        strangers = [base, *(adapters[LOCAL, other] for other in found if other != name)]
        expected = [np.mean([losses(model, adapter, units) for adapter in strangers], axis=0) for units in kinds]
        for arm, adapter in targets.items():
            own = [losses(model, adapter, units) for units in kinds]
            scores.setdefault((arm, LOSS), []).append((-own[0], -own[1]))
            scores.setdefault((arm, RATIO), []).append((expected[0] - own[0], expected[1] - own[1]))
    return {
        key: (np.concatenate([one for one, _ in parts]), np.concatenate([other for _, other in parts]))
        for key, parts in scores.items()
    }


def _units(records: Sequence[Record], model: LoraModel, config: Config) -> list[Unit]:
    return [Unit(examples) for examples in examples_of(records, model.tokenizer, config.train).by_record]


def result(config: Config, epsilon: float, scores: Arms, proof: Sequence[Pair], note: str) -> Result:
    """What the scores come to. config: of the run that is attacked. epsilon: what the private arm claims. proof: the
    private arm's scores for each unit of privacy, by each kind of attack; empty where nothing is to be proved. note:
    what has to be said of that arm.
    """
    privacy, (own, other) = with_privacy(config).privacy, own_and_other(config)
    delta = privacy.delta
    # Bonferroni: the better of two tests is told, so that each has half of what is left open.
    each = 1 - (1 - CONFIDENCE) / len(KINDS)
    proved = max((rates(*units, each).epsilon(delta) for units in proof), default=0.0)
    measures = []
    for (arm, kind), (members, others) in scores.items():
        spread = math.sqrt((len(members) + len(others) + 1) / (12 * len(members) * len(others)))
        chance = f"{len(members)} members, {len(others)} others; chance 0.5 ± {spread:.2f}"
        said = "; ".join(part for part in (chance, note if arm == PRIVATE else "") if part)
        measures.append(Measure(arm, f"AUC, {kind}", auc(members, others), said))
        measures.append(Measure(arm, f"TPR at 1 % FPR, {kind}", hits_at(members, others, FALSE), f"chance {FALSE:g}"))
    trials = " and ".join(str(len(units)) for units in proof[0]) if proof else "no"
    about = f"{100 * CONFIDENCE:g} %, by {trials} units of {privacy.mode}, claimed {epsilon:.2f} at {delta:g}"
    measures.append(Measure(PRIVATE, "epsilon at least", proved, about))

    def best(arm: str) -> float:
        return max(auc(*scores[arm, kind]) for kind in KINDS)

    return judged(
        NAME,
        "differential privacy",
        promised=own == PRIVATE,
        kept=proved <= epsilon,
        claim=f"With differential privacy, every {privacy.mode} has epsilon = {epsilon:.2f} at delta = {delta:g}.",
        finding=f"This run's own adapter tells members apart with an AUC of {best(own):.2f}; {IN_WORDS[other]} it is"
        f" {best(other):.2f}, trained alone {best(LOCAL):.2f}, and {best(BASE):.2f} by the base model, which saw none.",
        measures=measures,
    )
