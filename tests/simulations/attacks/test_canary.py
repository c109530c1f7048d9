"""The audit from within: a claim that is kept stays unbroken, and noise that is left out is seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.adapter import Adapter
from common.config import Config, PrivacyConfig
from common.config_files import load
from common.errors import ConfigError
from common.models import LoraModel
from common.privacy.accounting import Event, epsilon
from simulations.attacks import canary
from simulations.attacks.arms import Ground
from simulations.attacks.bounds import OneRun, auc
from simulations.attacks.result import Result
from simulations.attacks.single_step import Steps
from simulations.layout import RunDirectory

CONFIG = load("smoke")
KEPT = Steps(reach=1.0, mu=0.7, noise=1.0, trials=300)


def test_without_privacy_of_its_own_a_configuration_is_audited_at_epsilon_1() -> None:
    config = canary.audited(CONFIG)
    claim = canary.claim_of(config)
    assert (config.privacy.mode, config.privacy.epsilon) == ("patient", 1.0)
    assert 0.98 < claim.epsilon <= 1.0
    steps = config.federation.rounds * round(config.train.passes_per_round / config.privacy.sampling_rate)
    assert claim.epsilon == epsilon([Event("gaussian", claim.sigma, 0.1, steps)], claim.delta).bound


def test_what_is_configured_is_what_is_audited() -> None:
    mine = replace(CONFIG, privacy=PrivacyConfig("record", epsilon=3.0, sampling_rate=0.25, clip=0.3))
    assert canary.audited(mine).privacy == mine.privacy


@pytest.mark.parametrize("mode", ["institution", "distributed"])
def test_modes_whose_noise_is_in_the_sum_only_are_refused(mode: str) -> None:
    with pytest.raises(ConfigError, match="record and patient"):
        canary.audited(replace(CONFIG, privacy=PrivacyConfig(mode, epsilon=1.0)))


def test_noise_that_is_left_out_is_seen_and_noise_that_is_there_is_believed(model: LoraModel, start: Adapter) -> None:
    """The very code of an institution, at epsilon 1: with its noise the bound stays below, without it is above."""
    config = canary.audited(replace(CONFIG, privacy=PrivacyConfig("patient", epsilon=1.0, sampling_rate=0.2)))
    claim = canary.claim_of(config)
    quiet, scores, inside = canary.one_run_audit(config, model, 240, claim, noise=False)
    assert 80 < inside.sum() < 160
    assert auc(scores[inside], scores[~inside]) > 0.75
    assert quiet.epsilon > claim.epsilon
    model.write(start)
    noised, scores, inside = canary.one_run_audit(config, model, 240, claim, noise=True)
    assert noised.epsilon <= claim.epsilon
    assert 0.38 < auc(scores[inside], scores[~inside]) < 0.62  # three standard errors about a coin


def test_canaries_are_all_different_and_nobody_elses(model: LoraModel) -> None:
    units = canary.planted(model, 200, seed=1)
    assert len({unit.examples[0].ids for unit in units}) == 200
    assert all(unit.supervised == 1 for unit in units)
    assert not {token for unit in units for token in unit.examples[0].ids[1:]} & set(model.tokenizer.all_special_ids)


def judged(config: Config, proved: float, power: float, steps: Steps) -> Result:
    found = {canary.NOISED: (OneRun(proved, 40, 30), 0.6), canary.SILENT: (OneRun(power, 40, 39), 0.9)}
    return canary.result(config, canary.claim_of(canary.audited(config)), 400, found, steps)


@pytest.mark.parametrize(
    ("proved", "power", "steps", "verdict", "words"),
    [
        (0.4, 2.0, KEPT, "held", "without noise the same audit proves 2.00"),
        (0.4, 0.6, KEPT, "held", "too weak"),
        (1.4, 2.0, KEPT, "broken", "at least 1.40"),
        (0.4, 2.0, replace(KEPT, mu=1.7), "broken", "CONTRADICT"),
        (0.4, 2.0, replace(KEPT, reach=1.2), "broken", "CONTRADICT"),
        (0.4, 2.0, replace(KEPT, noise=0.85), "broken", "CONTRADICT"),
    ],
)
def test_verdicts(proved: float, power: float, steps: Steps, verdict: str, words: str) -> None:
    result = judged(canary.audited(CONFIG), proved, power, steps)
    assert result.verdict == verdict
    assert words in result.finding
    assert result.value(canary.NOISED, "epsilon at least") == proved
    assert all(np.isfinite(measure["value"]) for measure in result.as_dict()["measures"])


@pytest.mark.parametrize(
    ("proved", "power", "steps", "verdict", "words"),
    [
        (0.4, 2.0, KEPT, "not promised", "not this run, held."),
        (1.4, 2.0, KEPT, "broken", "not this run, was BROKEN."),
        (0.4, 2.0, replace(KEPT, mu=1.7), "broken", "not this run, was BROKEN."),
    ],
)
def test_a_run_without_privacy_is_promised_nothing(
    proved: float, power: float, steps: Steps, verdict: str, words: str
) -> None:
    result = judged(CONFIG, proved, power, steps)
    assert result.verdict == verdict
    assert "no differential privacy and promises nothing" in result.claim
    assert f"no noise, of which this run adds none, proves epsilon of at least {power:.2f}" in result.finding
    assert f"with the noise of epsilon 1.00 the same audit proves {proved:.2f}" in result.finding
    assert result.finding.endswith(f"The same with differential privacy, which is {words}")


def test_what_is_judged_is_the_run_that_is_attacked(tmp_path: Path) -> None:
    """A whole audit, small: it trains privately all the same, and the run's own configuration decides."""
    result = canary.attack(Ground(CONFIG, RunDirectory.at(tmp_path)), lambda _: None, canaries=20, trials=8)
    assert result.verdict == "not promised"
    assert result.value(canary.NOISED, "epsilon claimed") > 0
