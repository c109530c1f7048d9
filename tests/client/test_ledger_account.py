"""What a ledger says of each population, and how much of a configuration still fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from client.ledger import Entry, Ledger, Spend
from client.ledger_account import account, accounts, forecasts, round_event
from client.policy_file import NONE, UNITS, Budget, InstitutionPolicy, Population
from common.config import Config, DataConfig, FederationConfig, PrivacyConfig, TrainConfig
from common.errors import Refusal
from common.policy_reasons import BUDGET_EXHAUSTED
from common.privacy.accounting import Epsilon, Event, epsilon
from common.privacy.mechanism import round_event as planned_event
from common.secagg.identity import Identity
from common.secagg.terms import Terms

POLICY = InstitutionPolicy(
    data_sets=("notes", "letters", "scans"),
    populations={"clinic": Budget(("notes", "letters"), ("patient", "institution"), 6.0, 1e-5)},
)
CLINIC = POLICY.population_of("notes")
STEP = Spend("gaussian", 8.0, 1.0, 2, "patient", "first", 1, 1, "notes")
CONFIG = Config(
    data=DataConfig(name="notes"),
    train=TrainConfig(passes_per_round=1.0),
    federation=FederationConfig(rounds=12),
    privacy=PrivacyConfig(mode="patient", noise_multiplier=2.0, sampling_rate=0.1),
)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger(tmp_path / "ledger", Identity.generate("alder"))
    made.begin()
    return made


def spend(ledger: Ledger, *spends: Spend) -> tuple[Entry, ...]:
    for one in spends:
        ledger.spend(POLICY.population_of(one.data_set), one)
    return ledger.entries()


def rounds(run: str, numbers: range, **changes: object) -> Iterator[Spend]:
    for number in numbers:
        yield replace(STEP, run=run, round=number, **changes)  # type: ignore[arg-type]


# --- What was spent


def test_an_account_says_what_is_spent_and_left_by_run(ledger: Ledger) -> None:
    entries = spend(
        ledger,
        *rounds("second", range(1, 4), data_set="letters"),
        *rounds("first", range(1, 3)),
        replace(STEP, run="first", round=2, attempt=2, unit="institution"),
        replace(STEP, data_set="scans", unit="record", steps=9),
    )
    clinic, scans = accounts(entries, POLICY, points=3)
    assert clinic.population == CLINIC
    assert (clinic.updates, clinic.units) == (6, ("institution", "patient"))
    assert clinic.epsilon == epsilon([Event("gaussian", 8.0, 1.0, 12)], 1e-5)
    assert clinic.left == 6.0 - clinic.epsilon.bound
    assert [(run.name, run.rounds, run.updates, run.steps) for run in clinic.runs] == [
        ("second", 3, 3, 6),
        ("first", 2, 3, 6),
    ]
    assert {run.epsilon for run in clinic.runs} == {epsilon([Event("gaussian", 8.0, 1.0, 6)], 1e-5)}
    assert [(point.number, point.run, point.round) for point in clinic.points] == [
        (2, "second", 2),
        (4, "first", 1),
        (6, "first", 2),
    ]
    assert [point.epsilon for point in clinic.points] == [
        epsilon([Event("gaussian", 8.0, 1.0, steps)], 1e-5) for steps in (4, 8, 12)
    ]
    assert scans.population == Population("scans", ("scans",), (NONE, *UNITS))
    # What the institution spent as the unit is of all it sends.
    assert (scans.updates, scans.left, scans.units, scans.others) == (2, None, ("institution", "record"), ("clinic",))
    assert clinic.others == ()


def test_a_budget_that_nothing_was_spent_of_names_the_units_that_it_is_open_to() -> None:
    (clinic,) = accounts([], POLICY, points=3)
    assert (clinic.updates, clinic.units) == (0, ("institution", "patient"))
    assert account([], POLICY.population_of("scans"), points=3).units == ()


def test_accounts_and_forecasts_go_by_the_ties_that_the_ledger_knows(ledger: Ledger) -> None:
    """clinic was split, and notes are in no population any more."""
    entries = spend(ledger, *rounds("first", range(1, 4)))
    part = Budget(("letters",), ("patient",), 6.0, 1e-5)
    split = replace(POLICY, populations={"clinic-b": part})
    whole = epsilon([Event("gaussian", 8.0, 1.0, 6)], 1e-5)
    letters, notes = accounts(entries, split, points=1)
    assert (letters.population.name, letters.others) == ("clinic-b", ("clinic",))
    assert (notes.population, notes.others) == (Population("notes", ("notes",)), ("clinic",))
    assert (letters.updates, notes.updates, letters.left) == (3, 3, 6.0 - whole.bound)
    foretold = {one.population.name: one.spent for one in forecasts(entries, split, CONFIG)}
    assert foretold == {"clinic-b": letters.epsilon, "notes": notes.epsilon, "scans": Epsilon(0.0, 0.0)}


def test_populations_that_spent_nothing_are_told_and_data_sets_alone_are_not(ledger: Ledger) -> None:
    (clinic,) = accounts(ledger.entries(), POLICY, points=5)
    assert (clinic.epsilon, clinic.left, clinic.runs, clinic.points) == (Epsilon(0.0, 0.0), 6.0, (), ())
    assert accounts(ledger.entries(), InstitutionPolicy(), points=5) == ()


@pytest.mark.parametrize(("updates", "points"), [(1, 1), (1, 9), (2, 1), (3, 9), (9, 4)])
def test_the_last_update_is_always_among_the_points(updates: int, points: int, ledger: Ledger) -> None:
    entries = spend(ledger, *rounds("first", range(1, updates + 1), sigma=100.0))
    (found,) = accounts(entries, POLICY, points)
    numbers = [point.number for point in found.points]
    assert numbers[-1] == updates
    assert numbers == sorted(set(numbers))
    assert len(numbers) == min(updates, points)


def test_more_than_the_budget_leaves_nothing(ledger: Ledger) -> None:
    """As after a policy was lowered."""
    entries = spend(ledger, STEP)
    strict = replace(CLINIC, epsilon=0.01)
    found = account([entry for entry in entries if entry.kind == "spent"], strict, 1)  # type: ignore[misc]
    assert found.left == 0.0


# --- What still fits


def test_the_rounds_that_are_left_are_those_that_the_ledger_lets_pass(ledger: Ledger) -> None:
    entries = spend(ledger, *rounds("first", range(1, 3), sigma=4.0))
    clinic, scans = forecasts(entries, POLICY, CONFIG)
    event = clinic.event
    assert event == Event("gaussian", 2.0, 0.1, 10)
    assert clinic.rounds_left is not None
    assert clinic.rounds_left > 3
    assert (clinic.asked, clinic.allowed) == (True, True)
    past = [Event("gaussian", 4.0, 1.0, 4)]
    assert clinic.spent == epsilon(past, 1e-5)
    assert clinic.whole == epsilon([*past, replace(event, steps=120)], 1e-5)
    assert (scans.asked, scans.allowed, scans.rounds_left) == (False, True, None)
    private = Spend.of(event, "patient", "next", 1, 1, "letters")
    ledger.spend(CLINIC, replace(private, steps=10 * (clinic.rounds_left - 1)))
    ledger.spend(CLINIC, private)
    with pytest.raises(Refusal, match=BUDGET_EXHAUSTED):
        ledger.spend(CLINIC, private)


def test_the_rounds_that_are_left_fit_into_every_budget_that_counts_them(ledger: Ledger) -> None:
    ward = Budget(("scans",), ("institution",), 90.0, 1e-5)
    policy = replace(POLICY, populations={**POLICY.populations, "ward": ward})
    privacy = PrivacyConfig(mode="institution", noise_multiplier=4.0, delta=1e-5)
    asked = replace(CONFIG, data=replace(CONFIG.data, name="scans"), privacy=privacy)
    clinic, scans = forecasts(ledger.entries(), policy, asked)
    letters = forecasts(ledger.entries(), POLICY, asked)[1]
    assert clinic.tightest == scans.tightest == letters.tightest == policy.population_of("notes")
    assert clinic.rounds_left == scans.rounds_left == letters.rounds_left
    assert clinic.rounds_left is not None
    population, event = policy.population_of("scans"), clinic.event
    assert event is not None
    spend = Spend.of(event, "institution", "next", 1, 1, "scans")
    for _ in range(clinic.rounds_left):
        ledger.spend(population, spend, policy.budgeted)
    with pytest.raises(Refusal, match="population clinic"):
        ledger.spend(population, spend, policy.budgeted)


def test_what_the_policy_does_not_allow_has_no_rounds() -> None:
    for privacy in (PrivacyConfig(), replace(CONFIG.privacy, mode="record")):
        clinic, scans = forecasts((), POLICY, replace(CONFIG, privacy=privacy))
        assert (clinic.allowed, clinic.rounds_left) == (False, 0)
        assert (scans.allowed, scans.rounds_left) == (True, None)
        assert (scans.event is None) == (privacy.mode == NONE)


@pytest.mark.parametrize("mode", sorted(UNITS))
@pytest.mark.parametrize("target", [{"noise_multiplier": 2.5}, {"noise_multiplier": 0.0, "epsilon": 4.0}])
def test_a_forecast_is_never_cheaper_than_the_round(mode: str, target: dict[str, float]) -> None:
    """In modes with noise in shares the real noise is rounded up, by as much as the vector's length says."""
    config = replace(CONFIG, privacy=replace(CONFIG.privacy, mode=mode, **target))
    told = round_event(config)
    terms = Terms(members=5, colluders=1, threshold=4, smallest=3)
    real = planned_event(config.privacy, config.quantise, 1.0, config.federation.rounds, 1000, terms)
    assert told is not None
    assert real is not None
    assert (told.mechanism, told.q, told.steps) == (real.mechanism, real.q, real.steps)
    assert real.sigma * 0.98 < told.sigma <= real.sigma
