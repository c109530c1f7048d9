"""An audit of differential privacy from within: canaries that the auditor put there, and its guesses at them.

One run, many canaries (Steinke, Nasr & Jagielski 2023). A canary is a whole unit of privacy: a document that answers a
few random tokens with another one. Each is in by a fair coin, or nothing is in its place. Whoever guesses the coins
better than epsilon allows has shown that epsilon is larger. What is audited is the private training of one institution
as modes `record` and `patient` have it, with the configuration's model, factors, clip, sampling and target; how long it
trains and at which rate is the auditor's choice, since the promise holds for any. The same run without noise says what
the audit could have seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from client.private_training import NoisedStep, train_privately
from client.state import LocalState
from client.training import Assignment
from client.units import Unit
from common.adapter import Adapter
from common.config import Config
from common.errors import ConfigError
from common.methods import method_named
from common.models import LoraModel, load
from common.privacy.noise import SeededNoise
from common.randomness import seeded
from common.text import Example
from simulations.attacks.arms import Ground, event_of, spent, with_privacy
from simulations.attacks.bounds import OneRun, auc, gaussian_epsilon, one_run
from simulations.attacks.probing import losses, ordinary_tokens
from simulations.attacks.result import Measure, Result, Told, judged
from simulations.attacks.single_step import CONFIDENCE, SIGMA, Steps, audit, last_layer, real_steps, scene
from simulations.processes import process_pool

NAME = "canary"
CANARIES = 400
TRIALS = 300
EPSILON = 1.0
"""What is claimed where the configuration has no privacy of its own."""

NOISED, SILENT = "with its noise", "noise left out"

_PASSES = 15.0  # over the canaries, at least
_RATE = 1e-2
_QUESTION = 4  # tokens before the one that is learned
_OTHERS = 5  # other canaries' questions that each answer is held against


@dataclass(frozen=True)
class Claim:
    """What a run says of itself: epsilon at delta for each unit. sigma: the noise multiplier of its steps."""

    epsilon: float
    delta: float
    sigma: float


def audited(config: Config) -> Config:
    """The configuration as it is audited.

    Raises ConfigError for modes whose noise is in the sum of all institutions only.
    """
    mine = with_privacy(config, EPSILON)
    if mine.privacy.shared_noise:
        raise ConfigError(
            f"privacy.mode: found {mine.privacy.mode}, whose noise is in the sum of all institutions; allowed here:"
            " record and patient, where one institution's own training has it; or none, for patient at epsilon 1"
        )
    rounds = max(mine.federation.rounds, math.ceil(_PASSES / mine.train.passes_per_round))
    return replace(
        mine,
        train=replace(mine.train, learning_rate=_RATE),
        federation=replace(mine.federation, rounds=rounds),
    )


def claim_of(config: Config) -> Claim:
    """What an audited configuration promises, by the accountant of every run."""
    event = event_of(config, parameters=0)
    return Claim(spent(config, event), config.privacy.delta, event.sigma)


def attack(ground: Ground, tell: Told, canaries: int = CANARIES, trials: int = TRIALS) -> Result:
    """Audits the configuration's private training. canaries: of the one run. trials: single steps of each kind.

    Raises ConfigError as `audited` does, and ModelError as its name says.
    """
    config = audited(ground.config)
    claim = claim_of(config)
    with process_pool(min(2, ground.config.simulation.actors)) as pool:
        arms = {of: pool.submit(_trained, config, canaries, claim, of == NOISED) for of in (NOISED, SILENT)}
        found = {}
        for of, future in arms.items():
            found[of] = future.result()
            tell(f"{of}: {canaries} canaries, epsilon is at least {found[of][0].epsilon:.2f}")
    tell(f"single steps: {trials} with the canary, {trials} without")
    return result(ground.config, claim, canaries, found, single_steps(config, trials))


def result(config: Config, claim: Claim, canaries: int, found: dict[str, tuple[OneRun, float]], steps: Steps) -> Result:
    """What one run's canaries with and without noise, and many single steps, say together.

    config: of the run that is attacked. claim: of the configuration as it is audited.
    """
    mode, promised = audited(config).privacy.mode, config.privacy.private
    proved, power = found[NOISED][0].epsilon, found[SILENT][0].epsilon
    weak = "" if power > claim.epsilon else ", but the audit is too weak here to see noise left out"
    own, beside = (f"proves epsilon of at least {proved:.2f}", f"without noise the same audit proves {power:.2f}")
    if not promised:
        own = f"and no noise, of which this run adds none, proves epsilon of at least {power:.2f}"
        beside = f"with the noise of epsilon {claim.epsilon:.2f} the same audit proves {proved:.2f}"
    step_claim = gaussian_epsilon(1 / SIGMA, claim.delta)
    measures = [
        Measure(NOISED, "epsilon claimed", claim.epsilon, f"delta {claim.delta:g}, {mode}"),
        *(
            measure
            for of, (one, area) in found.items()
            for measure in (
                Measure(of, "epsilon at least", one.epsilon, f"95 %, {one.right} of {one.guesses} guesses right"),
                Measure(of, "AUC", area, f"{canaries} canaries, chance 0.5"),
            )
        ),
        Measure(
            "single step",
            "epsilon at least",
            gaussian_epsilon(steps.mu, claim.delta),
            f"{100 * CONFIDENCE:g} %, {steps.trials} trials each, claimed {step_claim:.2f}",
        ),
        Measure("single step", "reach of a unit over the clip", steps.reach, "claimed: at most 1"),
        Measure(
            "single step",
            "noise over what is claimed",
            steps.noise,
            f"claimed: 1; under {steps.least_noise:.2f} is no accident ({100 * CONFIDENCE:g} %)",
        ),
    ]
    return judged(
        NAME,
        "differential privacy",
        promised=promised,
        kept=proved <= claim.epsilon and steps.holds,
        claim=f"With differential privacy, every {mode} has epsilon = {claim.epsilon:.2f} at delta = {claim.delta:g}"
        " against whoever has the adapter.",
        finding=f"An audit with {canaries} canaries {own}; {beside}{weak}. Single steps"
        f" {'agree with' if steps.holds else 'CONTRADICT'} the noise and the clip that are claimed.",
        measures=measures,
    )


# --- One run ----------------------------------------------------------------------------------------------------------


def planted(model: LoraModel, count: int, seed: int) -> list[Unit]:
    """Canaries: a few random tokens each, and one more that is to be learned."""
    rng, ordinary = seeded(seed, "canaries"), ordinary_tokens(model)
    begin = [] if model.tokenizer.bos_token_id is None else [int(model.tokenizer.bos_token_id)]
    return [
        _asked((*begin, *(int(token) for token in rng.choice(ordinary, _QUESTION))), int(rng.choice(ordinary)))
        for _ in range(count)
    ]


def _asked(question: tuple[int, ...], answer: int) -> Unit:
    return Unit((Example((*question, answer), len(question), "", None),))


def own_losses(model: LoraModel, adapter: Adapter, units: Sequence[Unit]) -> NDArray[np.float64]:
    """How much less each canary's answer surprises after its own question than after other canaries', in nats.

    What all canaries teach together, such as that odd tokens follow odd ones, is in both and cancels.
    """
    ids = [unit.examples[0].ids for unit in units]
    alone, among = losses(model, adapter, units), np.zeros(len(units))
    for shift in range(1, _OTHERS + 1):
        mixed = [_asked(ids[(place + shift) % len(ids)][:-1], own[-1]) for place, own in enumerate(ids)]
        among += losses(model, adapter, mixed) / _OTHERS
    return among - alone


def one_run_audit(
    config: Config, model: LoraModel, canaries: int, claim: Claim, noise: bool
) -> tuple[OneRun, NDArray[np.float64], NDArray[np.bool_]]:
    """Trains on the canaries whose coin says so; what is proved, each one's score, and who was in.

    noise: without it the very same training is audited with its noise left out, whatever it claims.
    """
    privacy = config.privacy
    units = planted(model, canaries, config.seed)
    inside = seeded(config.seed, "canaries in").random(canaries) < 0.5
    # Nothing in place of a canary that is out, so that the number of units, which is public, does not tell how many.
    data = [unit if there else Unit(()) for unit, there in zip(units, inside, strict=True)]
    step = NoisedStep(claim.sigma if noise else 0.0, privacy.clip, privacy.sampling_rate)
    adapter, state, rounds = model.read(), LocalState(), config.federation.rounds
    keys = method_named(config.federation.method).trained(adapter)
    for number in range(1, rounds + 1):
        task = Assignment(number, rounds, keys, config.seed, NAME)
        source = SeededNoise(config.seed, NAME, number)
        trained = train_privately(model, data, adapter, state, config.train, step, task, source)
        adapter, state = trained.adapter, trained.state
    scores = own_losses(model, adapter, units)
    return one_run(scores, inside, claim.delta), scores, inside


def _trained(config: Config, canaries: int, claim: Claim, noise: bool) -> tuple[OneRun, float]:
    """One audit in a process of its own: what it proves, and the area under its curve."""
    import torch

    torch.set_num_threads(config.simulation.threads)
    model = load(config.model, config.lora, config.seed)
    found, scores, inside = one_run_audit(config, model, canaries, claim, noise)
    return found, auc(scores[inside], scores[~inside])


def single_steps(config: Config, trials: int) -> Steps:
    """Many single steps of the configuration's model, on the factors of one layer."""
    model = load(config.model, config.lora, config.seed)
    start = model.read()
    keys = last_layer(start)
    return audit(real_steps(model, start, keys, scene(model, start, keys, config.seed)), trials, config.seed)
