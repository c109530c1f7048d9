"""What a run's summary.json says, whoever ran it; docs/operating.md describes its shape."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from common.base_model import fingerprint
from common.config import UNITS, Config
from common.fixed_point import Layout
from common.methods import method_named
from common.privacy.accounting import Epsilon, epsilon, over_rounds, rounded_up
from common.privacy.mechanism import round_event, shared_noise
from server.coordinator import Bench, Outcome
from server.rounds import Progress, RoundRecord, stopped_early
from server.terms import terms_of

PHASES = ("train", "secure_aggregation", "aggregate", "evaluate")
"""Of a round, in order."""

LIBRARIES = ("silotune", "flwr", "torch", "transformers", "peft")


def facts(config: Config, outcome: Outcome, bench: Bench, seconds: Mapping[str, float], started: str) -> dict[str, Any]:
    """All of a summary but the scores: what was run, who took part, what it cost and what protected it."""
    progress, history = outcome.progress, outcome.progress.history
    share = secure_share(config, progress)
    return {
        "name": config.name,
        "method": config.federation.method,
        "seed": config.seed,
        "rounds_run": progress.round,
        "rounds_planned": config.federation.rounds,
        "best_round": progress.best_round,
        "stopped_early": stopped_early(config, progress),
        "institutions": list(config.data.names),
        "refused": dict(outcome.refused),
        "absences": absences(history),
        "bytes_per_client_round": {"up": history[-1].bytes_up, "down": history[-1].bytes_down},
        "parameters": {"base": bench.model.base_parameters, "adapter": progress.adapter.parameters},
        "void_updates": sum(record.void for record in history),
        "seconds": {phase: round(value, 2) for phase, value in seconds.items()},
        "secure_aggregation_share": None if share is None else round(share, 4),
        "privacy": privacy(config, outcome.refused, trained_parameters(config, progress), history),
        "base_model": {"name": config.model.path, **fingerprint(config.model.path).as_dict()},
        "versions": {library: version(library) for library in LIBRARIES},
        "started": started,
    }


def seconds_of(progress: Progress | None) -> dict[str, float]:
    """Seconds of all complete rounds by phase; a phase that a round did not have took none of it."""
    history = progress.history if progress else ()
    return {phase: sum(record.seconds.get(phase, 0.0) for record in history) for phase in PHASES}


def secure_share(config: Config, progress: Progress) -> float | None:
    """Share of the rounds' seconds that secure aggregation took; None where it is off."""
    seconds = seconds_of(progress)
    spent = sum(seconds.values())
    return seconds["secure_aggregation"] / spent if config.secure_aggregation.enabled and spent else None


def trained_parameters(config: Config, progress: Progress) -> int:
    """Length of an update."""
    adapter = progress.adapter
    return sum(adapter.factors[key].size for key in method_named(config.federation.method).trained(adapter))


MOST_MOMENTS = 30
"""Rounds that epsilon is told after; of a longer run so many of them, evenly spread."""


def privacy(config: Config, absent: Collection[str], parameters: int, history: Sequence[RoundRecord]) -> dict[str, Any]:
    """What protected the updates of all institutions but the absent ones, and what did not.

    parameters: of an update. history: rounds that were run. epsilon is what the settings say that these cost an
    institution that took part in all of them and, in modes with noise in shares, in every attempt; `implied` is the
    same after each round. What an institution has really spent stands in its own ledger.
    """
    said = config.privacy
    found: dict[str, Any] = {"secure_aggregation": config.secure_aggregation.enabled, "mode": said.mode}
    terms = terms_of(config, absent)
    passes, planned = config.train.passes_per_round, config.federation.rounds
    event = round_event(said, config.quantise, passes, planned, parameters, terms)
    if event is not None:
        # A noised update that was stored is sent again; noise in shares is drawn anew, over the same data.
        times = [record.attempts if said.shared_noise else 1 for record in history]
        spent = over_rounds([[event] * attempts for attempts in times], said.delta, MOST_MOMENTS)
        last = spent[-1][1] if spent else epsilon([], said.delta)
        found |= {
            "unit": UNITS[said.mode],
            "epsilon": rounded_up(last),
            "delta": said.delta,
            "epsilon_rdp": rounded_up(Epsilon(None, last.rdp)),
            "noise_multiplier": event.sigma,
            "clip": said.clip,
            "sampling_rate": event.q,
            "steps": event.steps * sum(times),
            "implied": as_pairs(spent),
        }
    if terms is None:
        return found
    noise = shared_noise(said, config.quantise, parameters, planned, terms) if said.shared_noise else None
    layout = Layout(
        parameters=0, members=terms.members, **asdict(config.quantise), headroom=noise.headroom if noise else 0
    )
    return {**found, "terms": {**terms.as_dict(), "ring_bits": layout.ring_bits}}


def as_pairs(spent: Sequence[tuple[int, Epsilon]]) -> list[list[float]]:
    """Rounds with what was spent after each, as summary.json has them."""
    return [[number, rounded_up(found)] for number, found in spent]


def absences(history: Sequence[RoundRecord]) -> dict[str, dict[str, int]]:
    """How many rounds each member missed, by name and reason code."""
    missed: dict[str, dict[str, int]] = {}
    for record in history:
        for name, reason in record.refused.items():
            reasons = missed.setdefault(name, {})
            reasons[reason] = reasons.get(reason, 0) + 1
    return missed
