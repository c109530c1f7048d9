"""What a coordinator reads: from a real round of the real protocol, and from updates of which the truth is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client.state import LocalState
from client.training import Assignment, train
from common import fixed_point
from common.adapter import Adapter, flatten
from common.config import COORDINATOR
from common.config_files import load
from common.errors import DataError
from common.examples import examples_of
from common.models import LoraModel
from common.records import read_jsonl
from simulations.attacks import coordinator
from simulations.attacks.arms import open_ground, with_privacy
from simulations.attacks.coordinator import (
    CLEAR,
    DIFFERENCE,
    DP,
    MASKED,
    SUM,
    Success,
    as_update,
    average_precision,
    by_chance,
    one_round,
    reader,
    recall,
)

CONFIG = load("smoke")


def test_a_round_in_the_clear_shows_updates_and_one_under_masks_their_sum_alone(tmp_path: Path, start: Adapter) -> None:
    ground = open_ground(CONFIG, tmp_path)
    config = replace(CONFIG, evaluation=replace(CONFIG.evaluation, institutions=False))
    in_clear = replace(config, secure_aggregation=replace(config.secure_aggregation, enabled=False))
    clear = one_round(in_clear, tmp_path / "clear", ground.records, start)
    masked = one_round(config, tmp_path / "masked", ground.records, start)
    assert set(clear.vectors) == set(masked.vectors) == set(CONFIG.data.names)
    np.testing.assert_array_equal(clear.total, masked.total)
    together = np.sum([as_update(vector, clear.layout) for vector in clear.vectors.values()], axis=0)
    np.testing.assert_allclose(together, clear.total, atol=1e-12)
    for name, vector in clear.vectors.items():
        decoded = fixed_point.decode(vector, clear.layout)
        np.testing.assert_array_equal(as_update(vector, clear.layout), decoded.update)
        # Under masks every element is as likely as any other: halves are halves, to five standard errors.
        hidden = masked.vectors[name].astype(np.int64)
        share = (hidden >> (masked.layout.ring_bits - 1)).mean()
        assert abs(share - 0.5) < 5 * 0.5 / np.sqrt(len(hidden))
        assert abs(np.corrcoef(as_update(masked.vectors[name], masked.layout), decoded.update)[0, 1]) < 0.05
    # A member gives one sum an adapter; another look begins anew.
    np.testing.assert_array_equal(one_round(config, tmp_path / "masked", ground.records, start).total, masked.total)


def test_an_update_says_what_its_records_hold_more_of(tmp_path: Path, model: LoraModel, start: Adapter) -> None:
    """Half of the coordinator's kinds of answer alone: what the other half answers is missed."""
    ground = open_ground(CONFIG, tmp_path)
    records = read_jsonl(ground.records / COORDINATOR / "validation.jsonl")

    def of(some: tuple[str, ...]) -> tuple[coordinator.Example, ...]:
        chosen = [record for record in records if record.kind in some]
        return examples_of(chosen, model.tokenizer, CONFIG.train).examples

    everything = examples_of(records, model.tokenizer, CONFIG.train).examples
    eye = reader(CONFIG, model, start, everything)
    notes = of(("note",))
    assert 0 < len(notes) < len(everything)
    task = Assignment(1, 2, tuple(start.factors), 7, "member")
    moved = train(model, notes, start, LocalState(), CONFIG.train, task).adapter
    update = flatten(moved.factors, start.factors).astype(np.float64) - flatten(start.factors, start.factors)
    truth = eye.truth(notes)
    assert np.corrcoef(eye.more(update), truth)[0, 1] > 0.3
    noise = np.random.default_rng(1).normal(0, 1, len(update))
    assert abs(np.corrcoef(eye.more(noise), truth)[0, 1]) < 0.3
    # What it reads of an update is of its direction, whatever its length.
    np.testing.assert_allclose(eye.more(3 * update), eye.more(update), rtol=1e-4, atol=1e-6)
    model.write(start)
    with pytest.raises(DataError, match="different tokens"):
        reader(CONFIG, model, start, [coordinator.Example((0, 5, 6), 2, "", None)])


def test_rankings_by_hand() -> None:
    wanted = np.array([True, False, True, False])
    scores = np.array([4.0, 3.0, 2.0, 1.0])
    assert average_precision(scores, wanted) == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert recall(scores, wanted) == 0.5
    mean, spread = by_chance(tokens=200, members=4, seed=1)
    assert 0.1 < mean < 0.15  # a little more than the share, since the last one found has a precision too
    assert 0 < spread < by_chance(200, 1, 1)[1]


CHANCE = (0.12, 0.01)
FOUND = {
    CLEAR: Success(0.4, 0.4, 0.5),
    DP: Success(0.2, 0.2, 0.1),
    MASKED: Success(0.13, 0.1, 0.0),
    SUM: Success(0.15, 0.1, 0.1),
}
READ = {**FOUND, MASKED: Success(0.31, 0.3, 0.3)}
IN_THE_CLEAR = replace(CONFIG, secure_aggregation=replace(CONFIG.secure_aggregation, enabled=False))


def test_verdicts() -> None:
    held = coordinator.result(CONFIG, FOUND, CHANCE, 180)
    assert held.verdict == "held"
    assert "0.13 from its masked vector, which is what it sends in this run (chance 0.12); 0.40 from" in held.finding
    assert "are refused" in held.finding
    both = coordinator.result(CONFIG, {**FOUND, DIFFERENCE: Success(0.3, 0.3, 0.3)}, CHANCE, 180)
    assert "0.30 from two sums" in both.finding
    assert "are refused" not in both.finding
    assert coordinator.result(CONFIG, READ, CHANCE, 180).verdict == "broken"


@pytest.mark.parametrize(
    ("found", "verdict", "words"),
    [(FOUND, "not promised", "not this run, held."), (READ, "broken", "not this run, was BROKEN.")],
)
def test_a_run_in_the_clear_is_promised_nothing(found: dict[str, Success], verdict: str, words: str) -> None:
    """Its coordinator has updates, noised ones where they are private; masks were on in another run."""
    for config, own in (
        (IN_THE_CLEAR, "0.40 from its update,"),
        (with_privacy(IN_THE_CLEAR), "0.20 from its noised update,"),
    ):
        result = coordinator.result(config, found, CHANCE, 180)
        assert result.verdict == verdict
        assert "no secure aggregation and promises nothing" in result.claim
        assert f"{own} which is what it sends in this run" in result.finding
        assert result.finding.endswith(f"The same with secure aggregation, which is {words}")


def test_what_is_judged_is_the_run_that_is_attacked(tmp_path: Path) -> None:
    """A whole attack on one without masks, which sees a masked round all the same."""
    result = coordinator.attack(open_ground(IN_THE_CLEAR, tmp_path), lambda _: None)
    assert result.verdict == "not promised"
    assert f"{result.value(CLEAR, 'average precision'):.2f} from its update, which" in result.finding
