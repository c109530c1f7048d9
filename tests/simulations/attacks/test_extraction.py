"""Planted secrets: where they go, and what it takes to be counted as said."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from client.state import LocalState
from client.training import Assignment, train
from common.adapter import Adapter
from common.config import PrivacyConfig, TrainConfig
from common.config_files import load
from common.examples import examples_of
from common.models import LoraModel
from common.records import read_jsonl
from simulations.attacks import extraction
from simulations.attacks.arms import BASE, FEDERATED, LOCAL, PRIVATE, open_ground, with_privacy
from simulations.attacks.extraction import EACH, REPETITIONS, asked, expected_at_most, planted, secrets_of

CONFIG = load("smoke")


def test_secrets_are_planted_in_one_institutions_training_records_alone(tmp_path: Path) -> None:
    ground = open_ground(CONFIG, tmp_path)
    secrets = secrets_of(1)
    mine = planted(ground, secrets)
    assert len({secret.owner for secret in secrets}) == len(secrets) == EACH * len(REPETITIONS)
    first, *rest = CONFIG.data.names
    before, after = (read_jsonl(g.records / first / "train.jsonl") for g in (ground, mine))
    assert after[: len(before)] == before
    for secret in secrets:
        assert after[len(before) :].count(secret.record) == secret.repetitions
    for name in rest:
        assert (mine.records / name / "train.jsonl").read_bytes() == (
            ground.records / name / "train.jsonl"
        ).read_bytes()
    assert not mine.finished


def test_what_was_learned_by_heart_is_said(model: LoraModel, start: Adapter) -> None:
    secrets = secrets_of(1)[:4]
    before = asked(model, start, secrets, CONFIG)
    assert not any(said for said, _ in before)
    examples = examples_of([secret.record for secret in secrets], model.tokenizer, CONFIG.train).examples
    config = TrainConfig(learning_rate=2e-2, passes_per_round=80.0, batch_size=4)
    adapter = train(
        model, examples, start, LocalState(), config, Assignment(1, 1, tuple(start.factors), 1, "x")
    ).adapter
    after = asked(model, adapter, secrets, CONFIG)
    model.write(start)
    assert sum(said for said, _ in after) >= 3
    assert sum(bits for _, bits in after) / 4 > 7 > sum(bits for _, bits in before) / 4
    assert max(bits for _, bits in after) == math.log2(extraction.ALTERNATIVES + 1)


def test_what_a_claim_allows_by_hand() -> None:
    secrets = secrets_of(1)
    person = replace(CONFIG, privacy=PrivacyConfig("patient", epsilon=2.0, delta=1e-5))
    assert expected_at_most(person, 2.0, secrets) == pytest.approx(12 * (math.exp(2) * 1e-6 + 1e-5))
    record = replace(CONFIG, privacy=PrivacyConfig("record", epsilon=2.0, delta=1e-5))
    once = [secret for secret in secrets if secret.repetitions == 1]
    assert expected_at_most(record, 2.0, once) == pytest.approx(4 * (math.exp(2) * 1e-6 + 1e-5))
    # Sixteen records are sixteen units: no more is bounded.
    assert expected_at_most(record, 2.0, [s for s in secrets if s.repetitions == 16]) == 4


@pytest.mark.parametrize(("epsilon", "verdict"), [(2.0, "broken"), (14.0, "held")])
def test_a_secret_that_should_not_be_said_breaks_the_claim(epsilon: float, verdict: str) -> None:
    secrets = secrets_of(1)
    silent = [(False, 1.0)] * len(secrets)
    found = dict.fromkeys((BASE, LOCAL, FEDERATED), silent) | {PRIVATE: [(True, 8.0), *silent[1:]]}
    result = extraction.result(with_privacy(CONFIG), epsilon, secrets, found, "")
    assert result.verdict == verdict
    assert "its adapter says 1 of them; without differential privacy 0 are said" in result.finding
    assert result.value(PRIVATE, "said, x1") == 1 / EACH
    assert extraction.result(with_privacy(CONFIG), epsilon, secrets, {**found, PRIVATE: silent}, "").verdict == "held"


@pytest.mark.parametrize(
    ("epsilon", "repetitions", "verdict"),
    [
        (1.0, 1, "broken"),
        (8.0, 1, "broken"),
        (1.0, 4, "broken"),
        (8.0, 4, "held"),
        (1.0, 16, "held"),
        (8.0, 16, "held"),
    ],
)
def test_secrets_in_many_records_do_not_excuse_those_in_one(epsilon: float, repetitions: int, verdict: str) -> None:
    """Where a record is the unit, sixteen records bound nothing, and four of them only a small epsilon."""
    config = replace(CONFIG, privacy=PrivacyConfig("record", epsilon=epsilon, delta=1e-5))
    secrets = secrets_of(1)
    silent = [(False, 1.0)] * len(secrets)
    says = [(secret.repetitions == repetitions, 8.0) for secret in secrets]
    found = dict.fromkeys((BASE, LOCAL, FEDERATED), silent) | {PRIVATE: says}
    result = extraction.result(config, epsilon, secrets, found, "")
    assert result.verdict == verdict
    told = {measure.what: measure.note for measure in result.measures}
    assert "no number would refute it" in told["expected at most, x16"]
    assert " would refute it" in told["expected at most, x1"]


@pytest.mark.parametrize(
    ("private_says", "verdict", "words"),
    [(False, "not promised", "not this run, held."), (True, "broken", "not this run, was BROKEN.")],
)
def test_a_run_without_privacy_is_promised_nothing(private_says: bool, verdict: str, words: str) -> None:
    """Its own adapter says 11 of 12; the private arm, which is another run, withstands or not."""
    secrets = secrets_of(1)
    silent = [(False, 1.0)] * len(secrets)
    own, beside = [*[(True, 8.0)] * 11, silent[0]], [(private_says, 8.0), *silent[1:]]
    found = dict.fromkeys((BASE, LOCAL), silent) | {FEDERATED: own, PRIVATE: beside}
    result = extraction.result(CONFIG, 2.0, secrets, found, "")
    assert result.verdict == verdict
    assert "no differential privacy and promises nothing" in result.claim
    assert f"its adapter says 11 of them; under differential privacy {private_says:d} are said" in result.finding
    assert result.finding.endswith(f"The same with differential privacy, which is {words}")
