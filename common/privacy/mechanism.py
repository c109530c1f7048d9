"""From what a configuration says of privacy to the mechanism of a run; the same for whoever knows the settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, cast

from common.config import PrivacyConfig, QuantiseConfig
from common.errors import ConfigError
from common.privacy.accounting import Event, noise_for
from common.privacy.distributed import SharedNoise, planned
from common.secagg.terms import Terms


def alone(privacy: PrivacyConfig, passes: float) -> tuple[PrivacyConfig, float]:
    """What protects the same unit where one institution trains alone, and its passes over its records in a round.

    Unit, target and noise are the run's. Noise in shares needs a sum of many: what `distributed` bounds, `record`
    bounds with one step a round over the same lots. With the institution as the unit nothing is left to protect where
    none sends anything: there is no noise.
    """
    match privacy.mode:
        case "distributed":
            return replace(privacy, mode="record"), privacy.sampling_rate
        case "institution":
            return PrivacyConfig(), passes
        case _:
            return privacy, passes


def steps_per_round(passes_per_round: float, sampling_rate: float) -> int:
    """Steps in which a unit is expected to be seen `passes_per_round` times; the same at every institution."""
    return max(1, round(passes_per_round / sampling_rate))


def noise_multiplier(privacy: PrivacyConfig, rounds: int, steps: int) -> float:
    """Of DP-SGD in modes `record` and `patient`, with so many steps a round.

    Raises ConfigError where no noise reaches `privacy.epsilon`.
    """
    if privacy.noise_multiplier:
        return privacy.noise_multiplier
    return noise_for(privacy.epsilon, privacy.delta, privacy.sampling_rate, rounds * steps)


def shared_noise(
    privacy: PrivacyConfig, quantise: QuantiseConfig, parameters: int, rounds: int, terms: Terms
) -> SharedNoise:
    """Of modes `institution` and `distributed`: what every member adds, and what the sum guarantees.

    Against the coordinator and up to T members with it: h = t - T others' noise is counted on.

    Raises ConfigError where the numbers do not fit each other.
    """
    return planned(
        mode=cast(Literal["institution", "distributed"], privacy.mode),
        clip=privacy.clip,
        bits=quantise.bits,
        parameters=parameters,
        members=terms.members,
        threshold=terms.threshold,
        colluders=terms.colluders,
        delta=privacy.delta,
        rounds=rounds,
        target=privacy.epsilon,
        sigma=privacy.noise_multiplier,
        q=privacy.sampling_rate if privacy.samples else 1.0,
        element_clip=quantise.clip,
    )


def round_event(
    privacy: PrivacyConfig, quantise: QuantiseConfig, passes: float, rounds: int, parameters: int, terms: Terms | None
) -> Event | None:
    """What one round costs each institution, in one attempt; None without differential privacy.

    passes: over its records in a round. parameters: of the update. terms: of secure aggregation, which modes with noise
    in shares need.

    Raises ConfigError where these modes have no terms, and as the functions above do.
    """
    if not privacy.private:
        return None
    if privacy.shared_noise:
        if terms is None:
            raise ConfigError(
                f"privacy.mode: expected secure aggregation with {privacy.mode}, whose noise is in the sum only, found"
                " none; choose record or patient, or turn it on"
            )
        return shared_noise(privacy, quantise, parameters, rounds, terms).event()
    return planned_event(privacy, passes, rounds)


def planned_event(privacy: PrivacyConfig, passes: float, rounds: int) -> Event | None:
    """What one round costs at most, as far as it is known without a base model; None without differential privacy.

    In modes with noise in shares `round_event` is never dearer: there the noise that is asked for is rounded up, by as
    much as the length of the update and the members say.

    Raises ConfigError where no noise reaches `privacy.epsilon`.
    """
    if not privacy.private:
        return None
    if not privacy.shared_noise:
        steps = steps_per_round(passes, privacy.sampling_rate)
        return Event("gaussian", noise_multiplier(privacy, rounds, steps), privacy.sampling_rate, steps)
    q = privacy.sampling_rate if privacy.samples else 1.0
    sigma = privacy.noise_multiplier or noise_for(privacy.epsilon, privacy.delta, q, rounds, "discrete-gaussian")
    return Event("discrete-gaussian", sigma, q, 1)
