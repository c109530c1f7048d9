"""An audit of differential privacy from within: canaries that the attacker put there itself, and its guesses about them.

One run, many canaries (Steinke, Nasr & Jagielski 2023): each canary is a whole unit of privacy, in by a fair coin of its
own and replaced by nothing else. Who then tells better than epsilon allows which were in, has proved that epsilon is
larger. The run is what modes `record` and `patient` promise for: one institution's training, all rounds of it, with
noise of its own. Whoever else takes part only adds to what it sends, so that this is the worst case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from client.private_training import NoisedStep, train_privately
from client.state import LocalState
from client.training import Assignment, Trained, train
from client.units import PATIENT, RECORD, Unit, units_of
from common.adapter import flatten
from common.config import Config
from common.errors import ConfigError
from common.examples import examples_of
from common.methods import method_named
from common.models import LoraModel, load
from common.privacy.accounting import Event, epsilon
from common.privacy.mechanism import noise_multiplier, steps_per_round
from common.privacy.noise import SeededNoise
from common.randomness import seeded
from common.text import Example
from simulations import prepare
from simulations.attacks.figures import OneRun, one_run
from simulations.attacks.gradient_canary import Audit, audit, real_release, scene
from simulations.attacks.probing import gradients, losses

CANARY_TOKENS = 32
_ADVERSARIES = 2


@dataclass(frozen=True)
class Claim:
    """What a run says of itself. epsilon: None without differential privacy. sigma: of the noise that is claimed."""

    unit: str
    epsilon: float | None
    delta: float
    sigma: float
    steps: int


@dataclass(frozen=True)
class Audited:
    """What one run tells of its canaries: to whoever sees each round's update, and to whoever has the last adapter."""

    coordinator: OneRun
    published: OneRun

    @property
    def bound(self) -> float:
        """A lower bound on epsilon that holds with 95 % confidence."""
        return max(self.coordinator.bound, self.published.bound)


def claim_of(config: Config) -> Claim:
    """What the configuration promises for one institution's units over the whole run.

    Raises ConfigError for modes whose noise is in the sum of all institutions only.
    """
    privacy = config.privacy
    if privacy.shared_noise:
        raise ConfigError(
            f"privacy.mode: found {privacy.mode}, whose noise is in the sum of all institutions; this audit knows none,"
            " record and patient, where one institution's own updates have it"
        )
    if not privacy.private:
        return Claim(PATIENT, None, privacy.delta, 0.0, 0)
    steps = steps_per_round(config.train.passes_per_round, privacy.sampling_rate)
    sigma = noise_multiplier(privacy, config.federation.rounds, steps)
    event = Event("gaussian", sigma, privacy.sampling_rate, config.federation.rounds * steps)
    return Claim(privacy.mode, epsilon([event], privacy.delta).bound, privacy.delta, sigma, event.steps)


def attack(config: Config, console: Console, canaries: int, trials: int, noise: bool = True) -> dict[str, Any]:
    """Audits the configuration's own training, and one step of it many times; returns what stands in the result.

    noise: without it, what is audited is the same run with its noise left out, whatever it claims.

    Raises ConfigError as `claim_of` does, DataError and ModelError as their names say.
    """
    claim = claim_of(config)
    model = load(config.model, config.lora, config.seed)
    audited = one_run_audit(config, model, claim, canaries, noise, console)
    single = single_step_audit(config, model, trials) if claim.epsilon is not None else None
    return {
        "attack": "canary",
        "mode": config.privacy.mode,
        "unit": claim.unit,
        "institution": config.data.names[0],
        "claimed_epsilon": None if claim.epsilon is None else round(claim.epsilon, 3),
        "delta": claim.delta,
        "noise": noise,
        "canaries": canaries,
        "bound": round(audited.bound, 3),
        "coordinator": audited.coordinator.as_dict(),
        "published": audited.published.as_dict(),
        "single_step": None if single is None else single.as_dict(),
        "verdict": verdict(claim, audited, single, noise),
    }


def verdict(claim: Claim, audited: Audited, single: Audit | None, noise: bool) -> str:
    """One sentence or two; a bound below the claim proves nothing but itself, and the words say so."""
    bound = f"One run proves that epsilon is at least {audited.bound:.2f}"
    if claim.epsilon is None:
        return f"{bound}; nothing was claimed."
    if not noise:
        seen = "noticed" if audited.bound > claim.epsilon else "not noticed"
        return f"{bound}, claimed is {claim.epsilon:.2f}: that the noise was left out is {seen}."
    broken = audited.bound > claim.epsilon or (single is not None and not single.holds)
    steps = "" if single is None else f"; single steps prove at least {single.found.bound:.2f} of {single.claimed:.2f}"
    said = "THIS CONTRADICTS THE CLAIM" if broken else "nothing here contradicts the claim, and nothing here proves it"
    return f"{bound}, claimed is {claim.epsilon:.2f}{steps}: {said}."


# --- One run ----------------------------------------------------------------------------------------------------------


def one_run_audit(
    config: Config, model: LoraModel, claim: Claim, canaries: int, noise: bool, console: Console
) -> Audited:
    """Trains the first institution's units and those canaries whose coin says so, and guesses which those were."""
    planted = planted_units(model, canaries, config.seed)
    inside = seeded(config.seed, "canaries in").random(canaries) < 0.5
    # What is not in is nothing, so that the number of units, which is public, does not tell how many are in.
    units = [*_own_units(config, model, claim.unit), *(c if there else Unit(()) for c, there in zip(planted, inside, strict=True))]
    start = model.read()
    documents = [*planted, *(_shuffled(unit, config.seed, place) for place, unit in enumerate(planted))]
    before = losses(model, start, documents)
    adapter, state = start, LocalState()
    keys = method_named(config.federation.method).trained(start)
    moved: NDArray[np.float64] = np.zeros(canaries)
    for number in track(range(1, config.federation.rounds + 1), "one run with canaries", console=console):
        assignment = Assignment(number, config.federation.rounds, keys, config.seed, "audited")
        trained = _train(config, model, units, adapter, state, assignment, claim, noise)
        update = flatten(trained.adapter.factors, keys).astype(np.float64) - flatten(adapter.factors, keys)
        moved -= _along(update, np.stack(list(gradients(model, adapter, keys, planted))))
        adapter, state = trained.adapter, trained.state
    learnt = before - losses(model, adapter, documents)
    # Beyond what is learnt of the same tokens in another order, which every canary teaches a little.
    own = learnt[:canaries] - learnt[canaries:]
    return Audited(one_run(moved, inside, claim.delta, _ADVERSARIES), one_run(own, inside, claim.delta, _ADVERSARIES))


def _along(update: NDArray[np.float64], directions: NDArray[np.float32]) -> NDArray[np.float64]:
    """How far an update goes along what is each canary's own in its gradient, beside what all of them have in common."""
    own = directions - directions.mean(axis=0)
    lengths = np.linalg.norm(own, axis=1)
    return np.asarray((own @ update.astype(np.float32)) / np.where(lengths > 0, lengths, 1.0), np.float64)


def _shuffled(unit: Unit, seed: int, place: int) -> Unit:
    """A canary's tokens in another order."""
    (example,) = unit.examples
    first, *rest = example.ids
    order = seeded(seed, "shuffled canaries", place).permutation(len(rest))
    return Unit((replace(example, ids=(first, *(rest[i] for i in order))),))


def planted_units(model: LoraModel, count: int, seed: int) -> list[Unit]:
    """Units that nobody else's records are like: one document each, of tokens drawn evenly."""
    rng = seeded(seed, "canaries")
    special = set(model.tokenizer.all_special_ids)
    ordinary = [token for token in range(len(model.tokenizer)) if token not in special]
    return [
        Unit((Example(tuple(int(token) for token in rng.choice(ordinary, CANARY_TOKENS)), 1, "", None),))
        for _ in range(count)
    ]


def _own_units(config: Config, model: LoraModel, unit: str) -> Sequence[Unit]:
    """The first institution's training records, as units."""
    records = prepare.gather(config.data).institutions[config.data.names[0]].train
    tokenised = examples_of(records, model.tokenizer, config.train)
    kind = RECORD if unit == RECORD else PATIENT
    return units_of(records, tokenised, kind, config.privacy.records_per_person, "audit")


def _train(
    config: Config,
    model: LoraModel,
    units: Sequence[Unit],
    adapter: Any,
    state: LocalState,
    assignment: Assignment,
    claim: Claim,
    noise: bool,
) -> Trained:
    """One round of the institution's own training."""
    if claim.epsilon is None:
        examples = [example for unit in units for example in unit.examples]
        return train(model, examples, adapter, state, config.train, assignment)
    privacy = config.privacy
    step = NoisedStep(claim.sigma if noise else 0.0, privacy.clip, privacy.sampling_rate)
    source = SeededNoise(config.seed, "audited", assignment.round)
    return train_privately(model, units, adapter, state, config.train, step, assignment, source)


# --- One step ---------------------------------------------------------------------------------------------------------


def single_step_audit(config: Config, model: LoraModel, trials: int) -> Audit:
    """One step of the private training, many times (`simulations.attacks.gradient_canary`)."""
    from common.models import load as fresh

    start = fresh(config.model, config.lora, config.seed).read()
    keys = method_named(config.federation.method).trained(start)
    found = scene(model, start, keys, config.seed, config.train.max_tokens)
    return audit(real_release(model, start, keys, found), trials, config.seed)
