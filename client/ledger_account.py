"""What a ledger says of each population: what is spent and left, by run and over rounds, and how much still fits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from client.ledger import Entry, Spend, Spent, spent_by, spent_with, units_in
from client.policy_file import InstitutionPolicy, Population
from common.config import UNITS, Config
from common.privacy.accounting import Epsilon, Event, epsilon, moments, times_left
from common.privacy.mechanism import planned_event


@dataclass(frozen=True)
class Run:
    """One run's part. rounds: different ones; updates: times that an update was computed. epsilon: of these alone."""

    name: str
    rounds: int
    updates: int
    steps: int
    epsilon: Epsilon


@dataclass(frozen=True)
class Point:
    """All that was spent up to an update, the first of a population being number 1."""

    number: int
    run: str
    round: int
    epsilon: Epsilon


@dataclass(frozen=True)
class Account:
    """A population's part, as `ledger.spent_by` tells it.

    units: what its epsilon speaks of; where nothing was spent, what its budget does. others: populations under whose
    names a part of it was spent; each counts it as well. left: below the budget; None without one.
    """

    population: Population
    units: tuple[str, ...]
    others: tuple[str, ...]
    updates: int
    epsilon: Epsilon
    left: float | None
    runs: tuple[Run, ...]
    points: tuple[Point, ...]


def accounts(entries: Sequence[Entry], policy: InstitutionPolicy, points: int) -> tuple[Account, ...]:
    """Of every population of the policy, and of every data set outside them that anything was spent on.

    points: at most so many along the way, the last among them.
    """
    named = [policy.population_of(name) for budget in policy.populations.values() for name in budget.data_sets]
    others = [policy.population_of(entry.data_set) for entry in entries if isinstance(entry, Spent)]
    return tuple(account(spent_by(entries, one), one, points) for one in dict.fromkeys([*named, *others]))


def account(spent: Sequence[Spent], population: Population, points: int) -> Account:
    """Of one population, from what was spent of it."""
    delta = population.delta
    total = _epsilon(spent, delta)
    last = len(spent)
    by_run = [(name, list(own)) for name, own in groupby(sorted(spent, key=_run), key=_run)]
    first = {entry.run: entry.number for entry in reversed(spent)}
    return Account(
        population=population,
        units=units_in(spent, *_budgeted(population, spent)),
        others=tuple(sorted({entry.population for entry in spent} - {population.name})),
        updates=last,
        epsilon=total,
        left=max(population.epsilon - total.bound, 0.0) if population.limited else None,
        runs=tuple(
            Run(name, len({entry.round for entry in own}), len(own), _steps(own), _epsilon(own, delta))
            for name, own in sorted(by_run, key=lambda pair: first[pair[0]])
        ),
        points=tuple(
            Point(number, spent[number - 1].run, spent[number - 1].round, _epsilon(spent[:number], delta))
            for number in moments(last, points)
        ),
    )


def _budgeted(population: Population, spent: Sequence[Spent]) -> list[str]:
    """The units of the modes that a budget is open to, as long as nothing says which of them it went to."""
    return [UNITS[mode] for mode in population.modes] if population.limited and not spent else []


def _run(entry: Spent) -> str:
    return entry.run


def _steps(spent: Iterable[Spent]) -> int:
    return sum(entry.steps for entry in spent)


def _epsilon(spent: Iterable[Spent], delta: float) -> Epsilon:
    return epsilon([entry.event for entry in spent], delta)


# --- What still fits --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """What a configuration would cost a population, beside what is spent.

    allowed: whether the policy lets its mode train there. units: what the epsilons speak of, the mode's own unit among
    them. event: of a round in one attempt; None without noise. spent, whole: so far, and with the whole run besides, at
    `delta`: that of the population's budget, else the configuration's. rounds_left: that fit into its budget, and into
    every other that counts them, the tightest of which is `tightest`'s; None where nothing limits them, and 0 where
    nothing is allowed.
    """

    population: Population
    asked: bool
    allowed: bool
    units: tuple[str, ...]
    event: Event | None
    delta: float
    spent: Epsilon
    whole: Epsilon | None
    tightest: Population | None
    rounds_left: int | None


def round_event(config: Config) -> Event | None:
    """What a round of a configuration costs each institution at most, in one attempt. See `mechanism.planned_event`."""
    return planned_event(config.privacy, config.train.passes_per_round, config.federation.rounds)


def forecasts(entries: Sequence[Entry], policy: InstitutionPolicy, config: Config) -> tuple[Forecast, ...]:
    """What a configuration would cost each population that the policy's data sets are of.

    asked: the one whose data set the configuration names. Raises ConfigError as `round_event` does.
    """
    event = round_event(config)
    populations = dict.fromkeys(policy.population_of(name) for name in policy.data_sets)
    return tuple(_forecast(entries, one, policy.budgeted, event, config) for one in populations)


def _forecast(
    entries: Sequence[Entry],
    population: Population,
    budgeted: Iterable[Population],
    event: Event | None,
    config: Config,
) -> Forecast:
    spent = spent_by(entries, population)
    past = [entry.event for entry in spent]
    delta = population.delta if population.limited else config.privacy.delta
    found = Forecast(
        population=population,
        asked=config.data.name in population.data_sets,
        allowed=config.privacy.mode in population.modes,
        units=units_in(spent, *([UNITS[config.privacy.mode]] if config.privacy.private else [])),
        event=event,
        delta=delta,
        spent=epsilon(past, delta),
        whole=None,
        tightest=None,
        rounds_left=None,
    )
    if event is None:
        return replace(found, rounds_left=None if found.allowed else 0)
    whole = replace(event, steps=event.steps * config.federation.rounds)
    spend = Spend.of(event, config.privacy.mode, "forecast", 0, 0, population.data_sets[0])
    left = {
        one: times_left([entry.event for entry in before], event, one.epsilon, one.delta)
        for one, before in spent_with(entries, population, spend, dict.fromkeys([population, *budgeted]))
        if one.limited
    }
    tightest = min(left, key=lambda one: left[one], default=None)
    return replace(
        found,
        whole=epsilon([*past, whole], delta),
        tightest=tightest,
        rounds_left=0 if not found.allowed else None if tightest is None else left[tightest],
    )
