"""What the settings of a run promise of differential privacy, for whoever is about to launch it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from common.config import UNITS, Config
from common.privacy.accounting import epsilon, rounded_up
from common.privacy.mechanism import planned_event

OFF = "differential privacy is off: nothing bounds what the sums and the published adapter tell of one person"
"""What the person who launches a run without it is told."""

MOST = 10.0
"""A larger epsilon is warned of: Ponomareva et al. (2023, "How to DP-fy ML") call it weak to no formal guarantee."""


@dataclass(frozen=True)
class Promise:
    """What a whole run costs each institution, each round in one attempt.

    unit: that epsilon speaks of. noise_multiplier: the least that may be added; with noise in shares rounding makes it
    a little more. rounds, steps: of the run. colluders: members that epsilon holds against, where it does not hold
    against everybody; 0 where it does.
    """

    mode: str
    unit: str
    epsilon: float
    delta: float
    noise_multiplier: float
    rounds: int
    steps: int
    colluders: int

    def told(self) -> str:
        """In one line."""
        times = f"{self.steps} step{'' if self.steps == 1 else 's'}"
        if self.colluders:
            members = "one member" if self.colluders == 1 else f"up to {self.colluders} members"
            whom = f"whoever sees the sums, {members} among them; a round that is repeated counts again"
        else:
            times += f" ({self.rounds} round{'' if self.rounds == 1 else 's'})"
            whom = "everybody"
        return (
            f"differential privacy is on, mode {self.mode}: epsilon at most {self.epsilon:g} for each {self.unit} at"
            f" delta {self.delta:g} over the whole run, with a noise multiplier of {self.noise_multiplier:g} in"
            f" {times}, against {whom}"
        )

    def warning(self) -> str | None:
        """What to mind of a large epsilon; None of another."""
        if self.epsilon <= MOST:
            return None
        return (
            f"privacy: found an epsilon of {self.epsilon:g} over the whole run, which promises little to a single"
            f" {self.unit}; expected at most {MOST:g}: ask for a smaller privacy.epsilon or a larger"
            " privacy.noise_multiplier"
        )

    def as_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


def promise_of(config: Config) -> Promise | None:
    """None without differential privacy. Takes seconds where noise has to be found for an epsilon.

    Raises ConfigError where no noise reaches `privacy.epsilon`.
    """
    privacy, rounds = config.privacy, config.federation.rounds
    event = planned_event(privacy, config.train.passes_per_round, rounds)
    if event is None:
        return None
    whole = replace(event, steps=rounds * event.steps)
    return Promise(
        mode=privacy.mode,
        unit=UNITS[privacy.mode],
        epsilon=rounded_up(epsilon([whole], privacy.delta)),
        delta=privacy.delta,
        noise_multiplier=whole.sigma,
        rounds=rounds,
        steps=whole.steps,
        colluders=config.secure_aggregation.colluders if privacy.shared_noise else 0,
    )
