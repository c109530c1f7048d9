"""Membership: who is a member, what the two scores are, and an adapter that has learned its records by heart."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client.state import LocalState
from client.training import Assignment, train
from common.adapter import Adapter
from common.config import Config, PrivacyConfig, TrainConfig
from common.config_files import load
from common.examples import examples_of
from common.models import LoraModel
from common.records import Record, read_jsonl
from simulations.attacks import membership
from simulations.attacks.arms import BASE, FEDERATED, LOCAL, PRIVATE, open_ground, with_privacy
from simulations.attacks.membership import KINDS, LOSS, RATIO, Sides, by_unit, scored, sides
from simulations.attacks.result import Result
from simulations.generate.federation import alike, generate

CONFIG = load("smoke")


def test_others_are_made_as_members_are_and_are_no_members(tmp_path: Path) -> None:
    ground = open_ground(CONFIG, tmp_path)
    found = sides(ground)
    seen = {record.texts for side in found.values() for record in side.members}
    for name, side in found.items():
        assert side.members == generate(CONFIG.data).institutions[name].train
        assert len(side.others) > 0.8 * membership.FEWEST  # but for those that say what a member says
        assert not {record.texts for record in side.others} & seen
        assert not {record.person for record in side.others} & {record.person for record in side.members}


def test_records_alike_come_from_the_same_house_and_topics() -> None:
    """An institution's own share of each topic: an illness that is most of its records is most of theirs."""
    data = replace(CONFIG.data, train_records=[200, 200, 200])
    for name in data.names:
        codes = [
            {r.completion for r in records if r.kind == "coding"}
            for records in (generate(data).institutions[name].train, alike(data, name, 200))
        ]
        assert len(codes[0] & codes[1]) > 0.5 * len(codes[0] | codes[1])
    assert alike(data, "riverside", 20) == alike(data, "riverside", 20) != alike(data, "northgate", 20)


def test_where_records_come_from_elsewhere_held_out_ones_are_the_others(tmp_path: Path) -> None:
    ground = open_ground(CONFIG, tmp_path / "made")
    given = open_ground(replace(CONFIG, data=replace(CONFIG.data, directory=str(ground.records))), tmp_path / "given")
    held_out = read_jsonl(ground.records / "riverside" / "validation.jsonl")
    assert set(held_out) <= set(sides(given)["riverside"].others)


def test_what_was_learned_by_heart_is_told_apart(model: LoraModel, start: Adapter) -> None:
    records = alike(CONFIG.data, "riverside", 60)
    side = Sides(records[:24], tuple(r for r in records[24:] if r.texts not in {m.texts for m in records[:24]}))
    examples = examples_of(side.members, model.tokenizer, CONFIG.train).examples
    config = TrainConfig(learning_rate=2e-2, passes_per_round=20.0, batch_size=8)
    by_heart = train(model, examples, start, LocalState(), config, Assignment(1, 1, tuple(start.factors), 1, "x"))
    model.write(start)
    adapters = {(LOCAL, "a"): by_heart.adapter, (FEDERATED, ""): start, (PRIVATE, ""): start}
    found = scored(CONFIG, model, {"a": side}, adapters)
    curves = {key: membership.auc(*scores) for key, scores in found.items()}
    assert curves[LOCAL, RATIO] > 0.75
    assert curves[LOCAL, LOSS] > 0.9 > 0.75 > curves[BASE, LOSS]
    assert curves[FEDERATED, RATIO] == 0.5  # it is the base model, which is its own reference
    # A ratio is against models that did not see the record: here the base alone.
    np.testing.assert_allclose(found[LOCAL, RATIO][0], found[LOCAL, LOSS][0] - found[BASE, LOSS][0])
    private = with_privacy(CONFIG)
    result = membership.result(private, 8.0, found, by_unit(proof_of(found), {"a": side}, "patient"), "")
    assert result.verdict == "held"
    assert result.value(LOCAL, "AUC, likelihood ratio") == curves[LOCAL, RATIO]


# Every value twice, so that the half that chooses the threshold and the half that proves it are the same.
ALIKE = (np.repeat(np.arange(100.0), 2), np.repeat(np.arange(100.0), 2))
APART = (ALIKE[0] + 300, ALIKE[1])


def proof_of(found: membership.Arms) -> list[membership.Pair]:
    return [found[PRIVATE, kind] for kind in KINDS]


def judge(config: Config, epsilon: float, found: membership.Arms) -> Result:
    """Where every record is a unit."""
    return membership.result(config, epsilon, found, proof_of(found), "")


def scores_of(arm: str, kind: str) -> membership.Arms:
    """Members are told from others in one arm by one kind of score, and nowhere else."""
    arms = {(of, by): ALIKE for of in (BASE, LOCAL, FEDERATED, PRIVATE) for by in (LOSS, RATIO)}
    return arms | {(arm, kind): APART}


@pytest.mark.parametrize(("epsilon", "verdict"), [(1.0, "broken"), (8.0, "held")])
def test_a_claim_that_the_rates_forbid_is_broken(epsilon: float, verdict: str) -> None:
    result = judge(with_privacy(CONFIG), epsilon, scores_of(PRIVATE, RATIO))
    assert result.verdict == verdict
    assert 2.5 < result.value(PRIVATE, "epsilon at least") < 3.5  # 100 of 100 against 0 or 1 of 100
    assert result.value(PRIVATE, "TPR at 1 % FPR, likelihood ratio") == 1
    assert "This run's own adapter tells members apart with an AUC of 1.00" in result.finding


@pytest.mark.parametrize(
    ("arm", "own", "verdict", "words"),
    [
        (FEDERATED, "1.00", "not promised", "not this run, held."),
        (PRIVATE, "0.50", "broken", "not this run, was BROKEN."),
    ],
)
def test_a_run_without_privacy_is_promised_nothing(arm: str, own: str, verdict: str, words: str) -> None:
    """Whatever the private arm beside it withstands; where that arm's claim breaks, it is said."""
    result = judge(CONFIG, 1.0, scores_of(arm, LOSS))
    assert result.verdict == verdict
    assert "no differential privacy and promises nothing" in result.claim
    assert f"This run's own adapter tells members apart with an AUC of {own}" in result.finding
    assert result.finding.endswith(f"The same with differential privacy, which is {words}")


@pytest.mark.parametrize("kind", [LOSS, RATIO])
def test_the_better_of_two_tests_holds_with_95_percent(kind: str) -> None:
    """All of 100 against none of 100: an exact end is the 100th root of its tail, and four tails share the 5 %."""
    private = with_privacy(CONFIG)
    most = (0.05 / 4) ** (1 / 100)
    expected = math.log((most - private.privacy.delta) / (1 - most))
    result = judge(private, 8.0, scores_of(PRIVATE, kind))
    assert result.value(PRIVATE, "epsilon at least") == pytest.approx(expected)


def side_of(persons: dict[str, int], word: str) -> tuple[Record, ...]:
    """So many records of each person, one after the other in turn."""
    order = [(place, name) for name, count in persons.items() for place in range(count)]
    return tuple(Record(f"{word} {name}", str(place), name) for place, name in sorted(order))


def test_a_units_score_is_the_mean_over_its_records() -> None:
    found = {
        "a": Sides(side_of({"p": 2, "q": 1}, "in"), side_of({"r": 1}, "out")),
        "b": Sides(side_of({"p": 1}, "in"), side_of({"s": 2}, "out")),
    }
    scores = [(np.array([1.0, 2.0, 5.0, 9.0]), np.array([3.0, 4.0, 6.0]))]  # of p, q, p; p. r; s, s
    ((members, others),) = by_unit(scores, found, "patient")
    assert (members.tolist(), others.tolist()) == ([3.0, 2.0, 9.0], [3.0, 5.0])  # b's p is another one
    ((members, others),) = by_unit(scores, found, "record")
    assert (sorted(members), sorted(others)) == ([1.0, 2.0, 5.0, 9.0], [3.0, 4.0, 6.0])
    assert by_unit(scores, found, "institution") == []


def test_records_of_one_person_do_not_break_an_honest_claim() -> None:
    """Each person's records show one number with noise for a claim of 0.16; taken as trials they prove too much."""
    private, rng = with_privacy(CONFIG), np.random.default_rng(0)
    each = {f"p{number}": 8 for number in range(65)}
    found = {"a": Sides(side_of(each, "in"), side_of(each, "out"))}
    as_units = as_records = 0
    for _ in range(60):
        pair = (np.tile(rng.normal(0.05, 1, 65), 8), np.tile(rng.normal(0.0, 1, 65), 8))
        scores = dict.fromkeys(((arm, kind) for arm in (BASE, LOCAL, FEDERATED, PRIVATE) for kind in KINDS), pair)
        proof = by_unit(proof_of(scores), found, "patient")
        as_units += membership.result(private, 0.16, scores, proof, "").verdict == "broken"
        as_records += judge(private, 0.16, scores).verdict == "broken"
    assert as_units <= 3
    assert as_records >= 6


def test_of_institutions_nothing_is_proved() -> None:
    config = replace(CONFIG, privacy=PrivacyConfig("institution", epsilon=8.0))
    result = membership.result(config, 8.0, scores_of(PRIVATE, LOSS), [], "")
    assert (result.verdict, result.value(PRIVATE, "epsilon at least")) == ("held", 0.0)
    assert any("by no units of institution" in measure.note for measure in result.measures)
