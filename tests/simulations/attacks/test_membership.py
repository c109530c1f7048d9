"""Membership: who is a member, what the two scores are, and an adapter that has learned its records by heart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client.state import LocalState
from client.training import Assignment, train
from common.adapter import Adapter
from common.config import TrainConfig
from common.config_files import load
from common.examples import examples_of
from common.models import LoraModel
from common.records import read_jsonl
from simulations.attacks import membership
from simulations.attacks.arms import BASE, FEDERATED, LOCAL, PRIVATE, open_ground, with_privacy
from simulations.attacks.membership import LOSS, RATIO, Sides, scored, sides
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
    result = membership.result(private, 8.0, found, "")
    assert result.verdict == "held"
    assert result.value(LOCAL, "AUC, likelihood ratio") == curves[LOCAL, RATIO]


@pytest.mark.parametrize(("epsilon", "verdict"), [(1.0, "broken"), (8.0, "held")])
def test_a_claim_that_the_rates_forbid_is_broken(epsilon: float, verdict: str) -> None:
    apart = (np.arange(200.0) + 300, np.arange(200.0))
    alike_ = (np.arange(200.0), np.arange(200.0))
    scores = {(arm, kind): alike_ for arm in (BASE, LOCAL, FEDERATED, PRIVATE) for kind in (LOSS, RATIO)}
    scores[PRIVATE, RATIO] = apart
    result = membership.result(with_privacy(CONFIG), epsilon, scores, "")
    assert result.verdict == verdict
    assert 2.5 < result.value(PRIVATE, "epsilon at least") < 3.5  # 100 of 100 against 0 or 1 of 100
    assert result.value(PRIVATE, "TPR at 1 % FPR, likelihood ratio") == 1
