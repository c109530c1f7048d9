"""The privacy ledger: nothing is spent beyond a budget, and nothing that was spent is ever free again."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from client import chain
from client.chain import HEAD
from client.chain_audit import ADDED, ALTERED, HEAD_WRONG, REMOVED, verify
from client.egress import EgressLog, Payload
from client.egress import open_copy as open_egress
from client.ledger import (
    BUDGET,
    NO_BUDGET,
    SPENT,
    BudgetSet,
    CutOff,
    Ledger,
    Spend,
    Spent,
    export,
    open_copy,
    read_entry,
    spent_by,
)
from client.policy_file import Population
from common.errors import ConfigError, Refusal, StorageError
from common.policy_reasons import BUDGET_EXHAUSTED
from common.privacy.accounting import Event, epsilon, times_left
from common.secagg.identity import Identity

ALDER = Identity("alder", Ed25519PrivateKey.from_private_bytes(b"a" * 32))
BIRCH = Identity("birch", Ed25519PrivateKey.from_private_bytes(b"b" * 32))
NOON = datetime(2030, 1, 31, 12, tzinfo=UTC)
FILE = "ledger-000000000001.jsonl"

CLINIC = Population("clinic", ("notes", "letters"), ("record", "patient"), 3.0, 1e-5)
ROUND = Spend("gaussian", 2.0, 0.1, 10, "patient", "run-1", 1, 1, "notes")
WHOLE = Spend("gaussian", 10.0, 1.0, 1, "record", "run-1", 1, 1, "notes")
"""Without sampling, so that its bound is quick to compute."""

FORK = multiprocessing.get_context("fork")  # a process of its own that need not import everything anew


def ledger_in(directory: Path, identity: Identity = ALDER, largest: int = 1 << 20) -> Ledger:
    """As a daemon that has just started has it."""
    return Ledger(directory, identity, lambda: NOON, largest)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The directory of a ledger that was begun."""
    ledger_in(tmp_path / "ledger").begin()
    return tmp_path / "ledger"


def spent_in(place: Path, population: Population = CLINIC) -> tuple[Spent, ...]:
    return spent_by(ledger_in(place).entries(), population)


def whole(place: Path, entries: int) -> bool:
    found = verify(open_copy(place), ALDER.public)
    return (found.finding, found.entries, found.cut_off, found.ahead) == (None, entries, 0, False)


def refused(ledger: Ledger, population: Population, spend: Spend) -> bool:
    try:
        ledger.spend(population, spend)
    except Refusal as refusal:
        if refusal.reason == BUDGET_EXHAUSTED:
            return True
        raise
    return False


# --- What is written


def test_a_spend_is_an_entry_that_says_what_it_cost_and_whose_it_is(place: Path) -> None:
    ledger = ledger_in(place)
    receipt = ledger.spend(CLINIC, ROUND)
    budget, entry = ledger.entries()
    assert entry == receipt.entry
    assert isinstance(budget, BudgetSet)
    assert budget.terms == (BUDGET, "clinic", "notes,letters", 3.0, 1e-5)
    told = json.loads((place / FILE).read_bytes().splitlines()[1])
    assert told == {
        "number": 2,
        "time": "2030-01-31T12:00:00.000Z",
        "kind": SPENT,
        "population": "clinic",
        "data_set": "notes",
        "run": "run-1",
        "round": 1,
        "attempt": 1,
        "unit": "patient",
        "mechanism": "gaussian",
        "sigma": 2.0,
        "q": 0.1,
        "steps": 10,
        "previous": budget.hash,
        "hash": receipt.entry.hash,
        "signature": receipt.entry.signature,
    }
    assert receipt.entry.event == Event("gaussian", 2.0, 0.1, 10)
    assert receipt.added > 0
    assert ledger.spend(CLINIC, ROUND).entry.number == 3  # the budget is the same, and no entry
    assert whole(place, 3)


def test_a_spend_is_made_of_an_event_and_a_mode() -> None:
    event = Event("gaussian", 2, 1, 3)
    for mode, unit in {
        "record": "record",
        "patient": "patient",
        "institution": "institution",
        "distributed": "record",
    }.items():
        made = Spend.of(event, mode, "run", 2, 7, "notes")
        assert made == Spend("gaussian", 2.0, 1.0, 3, unit, "run", 2, 7, "notes")
        assert (type(made.sigma), type(made.q), made.event) == (float, float, event)
    with pytest.raises(ConfigError, match="unit"):
        Spend.of(event, "none", "run", 1, 1, "notes")


@pytest.mark.parametrize(
    "wrong",
    [
        {"sigma": float("nan")},
        {"sigma": float("inf")},
        {"sigma": -1.0},
        {"sigma": 0.0},
        {"sigma": 1e-9},
        {"q": float("nan")},
        {"q": 0.0},
        {"q": -0.1},
        {"q": 1.1},
        {"steps": 0},
        {"steps": -1},
        {"steps": 1.0},
        {"steps": True},
        {"round": -1},
        {"attempt": -1},
        {"mechanism": "laplace"},
        {"unit": "person"},
        {"data_set": ""},
    ],
)
def test_what_no_event_can_be_is_no_spend(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        replace(ROUND, **wrong)


def test_a_data_set_of_another_population_is_a_mistake_and_not_written(place: Path) -> None:
    with pytest.raises(ValueError, match="data set of population clinic"):
        ledger_in(place).spend(CLINIC, replace(ROUND, data_set="scans"))
    assert spent_in(place) == ()


def test_entry_and_head_are_synced_before_anything_may_leave(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = ledger_in(place)
    ledger.spend(CLINIC, ROUND)
    synced: list[tuple[str, bytes]] = []
    original = os.fsync

    def fsync(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").resolve()
        synced.append((path.name, path.read_bytes() if path.is_file() else b""))
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    ledger.spend(CLINIC, ROUND)
    assert synced == [
        (FILE, (place / FILE).read_bytes()),
        (f".{HEAD}.partial", (place / HEAD).read_bytes()),
        ("ledger", b""),
    ]


def test_what_cannot_be_kept_is_not_spent(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = ledger_in(place)
    ledger.spend(CLINIC, ROUND)

    def full(*_: Any) -> None:
        raise StorageError("no space left")

    for name in ("append_line", "write_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(chain, name, full)
            with pytest.raises(StorageError, match="no space left"):
                ledger.spend(CLINIC, ROUND)
    assert ledger.spend(CLINIC, ROUND).entry.round == 1
    # The entry whose head could not be written counts, since nobody knows whether anything left.
    assert len(spent_in(place)) == 3


# --- The budget


def test_the_round_that_would_exceed_the_budget_is_refused_and_the_one_before_is_not(place: Path) -> None:
    fits = times_left([], ROUND.event, CLINIC.epsilon, CLINIC.delta)
    assert fits > 3
    ledger = ledger_in(place)
    for number in range(1, fits + 1):
        ledger.spend(CLINIC, replace(ROUND, round=number))
    before = (place / FILE).read_bytes()
    late = replace(ROUND, round=fits + 1)
    with pytest.raises(Refusal) as caught:
        ledger.spend(CLINIC, late)
    assert caught.value.reason == BUDGET_EXHAUSTED
    spent = epsilon([entry.event for entry in spent_in(place)], CLINIC.delta)
    assert spent == epsilon([replace(ROUND.event, steps=10 * fits)], CLINIC.delta)
    assert spent.bound <= CLINIC.epsilon
    assert epsilon([replace(ROUND.event, steps=10 * (fits + 1))], CLINIC.delta).bound > CLINIC.epsilon
    for told in (
        "budget is epsilon 3 at delta 1e-05, by patient;",
        f"{spent.bound:.4g} of it is spent",
        f"{3 - spent.bound:.4g} left",
    ):
        assert told in caught.value.detail
    assert caught.value.parts == ()
    with pytest.raises(Refusal, match="at delta 1e-05, by patient and record; "):
        ledger.spend(CLINIC, replace(late, unit="record"))
    assert (place / FILE).read_bytes() == before
    # Something smaller may still fit.
    assert not refused(ledger, CLINIC, replace(ROUND, sigma=1000.0))


def test_a_bound_by_renyi_divergences_alone_would_refuse_too_early(place: Path) -> None:
    """So the last rounds are those that only the tighter bound lets pass."""
    fits = times_left([], ROUND.event, CLINIC.epsilon, CLINIC.delta)
    assert epsilon([replace(ROUND.event, steps=10 * fits)], CLINIC.delta).rdp > CLINIC.epsilon
    all_but_one = replace(ROUND, steps=10 * (fits - 1))
    ledger = ledger_in(place)
    ledger.spend(CLINIC, all_but_one)
    ledger.spend(CLINIC, ROUND)
    assert refused(ledger, CLINIC, ROUND)


FRESH: dict[str, tuple[Population, dict[str, Any]]] = {
    "another round": (CLINIC, {"round": 9}),
    "another attempt": (CLINIC, {"attempt": 9}),
    "another run": (CLINIC, {"run": "run-2"}),
    "another unit": (CLINIC, {"unit": "record"}),
    "another data set of the population": (CLINIC, {"data_set": "letters"}),
    "another name of the population": (replace(CLINIC, name="ward"), {}),
    "a data set that joined it": (replace(CLINIC, data_sets=("scans",)), {"data_set": "scans"}),
    "a data set that left it": (Population("ward", ("notes",), ("record",), 3.0, 1e-5), {}),
}


@pytest.mark.parametrize(("population", "changes"), FRESH.values(), ids=FRESH)
def test_nothing_opens_a_fresh_budget(population: Population, changes: dict[str, Any], place: Path) -> None:
    ledger_in(place).spend(CLINIC, replace(WHOLE, sigma=1.7))
    assert refused(ledger_in(place), population, replace(WHOLE, sigma=1.7, **changes))
    assert len(spent_in(place)) == 1


def test_what_was_together_once_shares_what_it_spent_for_good(place: Path) -> None:
    """A population is split, its part renamed, another data set joins the part: ties hold over every step."""
    ledger_in(place).spend(CLINIC, replace(WHOLE, sigma=1.7))
    part = replace(CLINIC, name="clinic-b", data_sets=("letters",))
    late = replace(WHOLE, sigma=1.7, data_set="letters")
    assert refused(ledger_in(place), part, late)  # nothing was ever spent on letters, and clinic-b is a new name
    other = replace(CLINIC, name="ward", data_sets=("letters", "scans"))
    assert not refused(ledger_in(place), other, replace(WHOLE, sigma=1000.0, data_set="scans"))
    for number, population in enumerate((replace(other, name="x", data_sets=("scans",)), replace(CLINIC, name="ward"))):
        assert refused(ledger_in(place), population, replace(late, data_set=population.data_sets[0])), number
        assert len(spent_in(place, population)) == 2
    # Backwards as well: what the part spends counts for those that stayed.
    larger = replace(part, epsilon=9.0)
    ledger_in(place).spend(larger, late)
    assert [entry.population for entry in spent_in(place)] == ["clinic", "ward", "clinic-b"]


def test_a_population_that_is_refused_ties_its_data_sets_by_being_asked(place: Path) -> None:
    ledger_in(place).spend(Population("notes", ("notes",)), replace(WHOLE, sigma=1.7))
    assert refused(ledger_in(place), CLINIC, replace(WHOLE, sigma=1.7, data_set="letters"))
    assert refused(
        ledger_in(place),
        replace(CLINIC, data_sets=("letters",), name="b"),
        replace(WHOLE, sigma=1.7, data_set="letters"),
    )


def test_a_data_set_that_left_every_population_goes_on_counting_for_those_that_it_was_in(place: Path) -> None:
    ledger_in(place).spend(CLINIC, replace(WHOLE, sigma=1000.0))
    alone = Population("notes", ("notes",))
    assert not refused(ledger_in(place), alone, replace(WHOLE, sigma=1.7))
    assert refused(
        ledger_in(place), replace(CLINIC, data_sets=("letters",)), replace(WHOLE, sigma=1.7, data_set="letters")
    )
    # It has no budget, and is told what was spent of its persons.
    assert not refused(ledger_in(place), alone, replace(WHOLE, sigma=1.7))
    assert len(spent_in(place, alone)) == 3


def test_spends_tie_by_themselves_where_a_budget_cannot_be_read(place: Path) -> None:
    """As `ledger show` has them, which goes on over lines that are no entries."""
    for data_set in ("notes", "letters"):
        ledger_in(place).spend(CLINIC, replace(WHOLE, data_set=data_set))
    spends = spent_in(place)
    assert spent_by(spends, Population("notes", ("notes",))) == spends


def test_all_names_changed_at_once_are_not_noticed(place: Path) -> None:
    """As the docstring says."""
    ledger_in(place).spend(CLINIC, replace(WHOLE, sigma=1.7))
    renamed = replace(CLINIC, name="ward", data_sets=("texts",))
    assert not refused(ledger_in(place), renamed, replace(WHOLE, sigma=1.7, data_set="texts"))


def test_what_the_institution_spends_as_the_unit_counts_wherever_that_unit_may_be_spent(place: Path) -> None:
    everything = replace(WHOLE, sigma=1.7, unit="institution")
    clinic = replace(CLINIC, modes=("institution",))
    ward = Population("ward", ("scans",), ("institution",), 3.0, 1e-5)
    ledger_in(place).spend(clinic, everything)
    assert refused(ledger_in(place), ward, replace(everything, data_set="scans"))
    assert len(spent_in(place, ward)) == 1
    # Persons of another population are not in it.
    by_person = replace(ward, modes=("patient",))
    assert not refused(ledger_in(place), by_person, replace(everything, data_set="scans", unit="patient"))
    assert [entry.unit for entry in spent_in(place, by_person)] == ["patient"]
    assert [entry.unit for entry in spent_in(place, ward)] == ["institution", "patient"]
    # Neither are spends of a person in what another population's institution spends, which allows none now but did.
    assert [entry.unit for entry in spent_in(place, replace(clinic, modes=("record",)))] == ["institution"]


@pytest.mark.parametrize("loose", [True, False])
def test_no_budget_is_overspent_through_a_data_set_of_another_population(place: Path, loose: bool) -> None:
    """The coordinator names the data set: it would name one with a larger budget, or with none."""
    everything = replace(WHOLE, sigma=1.7, unit="institution", data_set="scans")
    clinic = replace(CLINIC, modes=("institution",))
    ward = Population("scans", ("scans",)) if loose else Population("ward", ("scans",), ("institution",), 90.0, 1e-5)
    ledger = ledger_in(place)
    ledger.spend(ward, everything, [clinic, ward])
    with pytest.raises(Refusal, match="population clinic: the budget is epsilon 3 at delta 1e-05, by institution"):
        ledger.spend(ward, everything, [clinic, ward])
    assert len(spent_in(place, clinic)) == 1
    # What clinic does not count, it does not limit.
    for _ in range(3):
        ledger.spend(ward, replace(everything, unit="patient"), [clinic, ward])
    assert len(spent_in(place, clinic)) == 1


def test_a_part_of_a_population_that_was_split_does_not_overspend_the_other(place: Path) -> None:
    ledger = ledger_in(place)
    ledger.spend(CLINIC, replace(WHOLE, sigma=20.0))
    ledger.spend(CLINIC, replace(WHOLE, sigma=20.0, data_set="letters"))
    notes, letters = (
        Population(f"{name}-only", (name,), ("record",), limit, 1e-5)
        for name, limit in (("notes", 9.0), ("letters", 3.0))
    )
    spend = replace(WHOLE, sigma=1.7)
    ledger.spend(notes, spend, [notes, letters])
    with pytest.raises(Refusal, match="population letters-only: the budget is epsilon 3"):
        ledger.spend(notes, spend, [notes, letters])


def test_a_population_that_ever_spent_as_the_institution_counts_all_such_spends(place: Path) -> None:
    everything = replace(WHOLE, sigma=20.0, unit="institution")
    ward = Population("ward", ("scans",), ("institution",), 3.0, 1e-5)
    ledger_in(place).spend(ward, replace(everything, data_set="scans"))
    assert spent_in(place) == ()
    ledger_in(place).spend(replace(CLINIC, modes=("institution",)), everything)
    assert len(spent_in(place)) == 2


def test_populations_that_share_no_data_have_budgets_of_their_own(place: Path) -> None:
    ledger = ledger_in(place)
    ledger.spend(CLINIC, replace(WHOLE, sigma=1.7))
    ward = replace(CLINIC, name="ward", data_sets=("scans",))
    assert not refused(ledger, ward, replace(WHOLE, sigma=1.7, data_set="scans"))


def test_what_was_spent_without_a_budget_counts_when_there_is_one(place: Path) -> None:
    alone = Population("notes", ("notes",))
    ledger_in(place).spend(alone, replace(WHOLE, sigma=1.7))
    assert refused(ledger_in(place), CLINIC, replace(WHOLE, sigma=1.7))


def test_a_smaller_delta_is_a_smaller_budget(place: Path) -> None:
    spend = replace(WHOLE, sigma=1.5)
    limit = epsilon([spend.event], 1e-5).bound
    strict, exact = (replace(CLINIC, epsilon=limit, delta=delta) for delta in (1e-6, 1e-5))
    assert refused(ledger_in(place), strict, spend)
    assert not refused(ledger_in(place), exact, spend)


def test_a_policy_that_was_changed_takes_effect_and_the_change_is_an_entry(place: Path) -> None:
    spend = replace(WHOLE, sigma=1.7)
    ledger = ledger_in(place)
    ledger.spend(CLINIC, spend)
    assert refused(ledger, CLINIC, spend)
    larger = replace(CLINIC, epsilon=9.0)
    ledger.spend(larger, spend)
    smaller = replace(CLINIC, delta=1e-6)
    assert refused(ledger, smaller, spend)
    assert refused(ledger, smaller, spend)
    ledger.spend(replace(larger, data_sets=("notes",)), replace(spend, sigma=50.0))
    unlimited = Population("clinic", ("notes",))
    ledger.spend(unlimited, spend)
    budgets = [entry.terms for entry in ledger.entries() if isinstance(entry, BudgetSet)]
    assert budgets == [
        (BUDGET, "clinic", "notes,letters", 3.0, 1e-5),
        (BUDGET, "clinic", "notes,letters", 9.0, 1e-5),
        (BUDGET, "clinic", "notes,letters", 3.0, 1e-6),
        (BUDGET, "clinic", "notes", 9.0, 1e-5),
        (NO_BUDGET, "clinic", "notes", 0.0, 1e-5),
    ]
    assert whole(place, 5 + 4)


def test_without_a_budget_nothing_is_refused_and_all_is_written_down(place: Path) -> None:
    alone = Population("scans", ("scans",))
    ledger = ledger_in(place)
    dear = replace(WHOLE, sigma=0.01, steps=10**6, data_set="scans")
    for _ in range(3):
        assert ledger.spend(alone, dear).added > 1e6
    assert len(spent_in(place, alone)) == 3


def test_mechanisms_compose_as_the_accountant_composes_them(place: Path) -> None:
    spends = [
        replace(WHOLE, mechanism="discrete-gaussian", sigma=4.0, q=0.2, steps=5),
        replace(WHOLE, sigma=9.0, steps=2),
        replace(WHOLE, mechanism="discrete-gaussian", sigma=6.0),
    ]
    events = [spend.event for spend in spends]
    exact = replace(CLINIC, epsilon=epsilon(events, CLINIC.delta).bound)
    ledger = ledger_in(place)
    for spend in spends:
        ledger.spend(exact, spend)
    found = [entry.event for entry in spent_in(place)]
    assert epsilon(found, CLINIC.delta) == epsilon(events, CLINIC.delta)
    assert refused(ledger, exact, replace(WHOLE, sigma=100.0))


SPENDS = st.builds(
    replace,
    st.just(WHOLE),
    mechanism=st.sampled_from(["gaussian", "discrete-gaussian"]),
    sigma=st.sampled_from([1.0, 2.0, 3.5, 5.0, 20.0]),
    steps=st.integers(1, 5),
    run=st.sampled_from(["run-1", "run-2"]),
    data_set=st.sampled_from(["notes", "letters"]),
)


@settings(max_examples=40, deadline=None)
@given(spends=st.lists(st.tuples(st.booleans(), st.booleans(), SPENDS), max_size=12), limit=st.floats(0.3, 8.0))
def test_two_that_take_turns_and_restart_never_overspend(spends: list[tuple[bool, bool, Spend]], limit: float) -> None:
    """And what is refused would have exceeded the budget."""
    population = replace(CLINIC, epsilon=limit)
    with TemporaryDirectory() as name:
        place = Path(name) / "ledger"
        both = [ledger_in(place, largest=700), ledger_in(place)]
        both[0].begin()
        past: list[Event] = []
        for second, restarts, spend in spends:
            if restarts:
                both[second] = ledger_in(place)
            exceeds = epsilon([*past, spend.event], population.delta).bound > limit
            assert refused(both[second], population, spend) == exceeds
            past += [] if exceeds else [spend.event]
        assert [entry.event for entry in spent_in(place, population)] == past
        assert verify(open_copy(place), ALDER.public).finding is None


@settings(max_examples=20, deadline=None)
@given(spends=st.lists(SPENDS, min_size=1, max_size=6))
def test_what_spends_add_adds_up_to_what_is_spent(spends: list[Spend]) -> None:
    with TemporaryDirectory() as name:
        ledger = ledger_in(Path(name) / "ledger")
        ledger.begin()
        alone = replace(CLINIC, epsilon=1e9)
        added = [ledger.spend(alone, spend).added for spend in spends]
    total = epsilon([replace(spend.event, mechanism="discrete-gaussian") for spend in spends], CLINIC.delta).bound
    assert all(part >= 0 for part in added)
    assert sum(added) == pytest.approx(total, rel=1e-9)


# --- Many at once


def _spend_all(place: Path, population: Population, start: Any) -> None:
    """In a process of its own: until the budget is used up."""
    ledger = ledger_in(place)
    start.wait()
    number = 0
    while not refused(ledger, population, replace(WHOLE, sigma=20.0, round=number, run=f"run-{os.getpid()}")):
        number += 1


def test_processes_that_spend_at_once_spend_no_more_than_the_budget(place: Path) -> None:
    population = replace(CLINIC, epsilon=1.2)
    fits = times_left([], replace(WHOLE, sigma=20.0).event, 1.2, CLINIC.delta)
    assert fits > 10
    start = FORK.Barrier(2)
    both = [FORK.Process(target=_spend_all, args=(place, population, start)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert len(spent_in(place)) == fits
    assert whole(place, fits + 1)


def test_threads_that_share_a_ledger_spend_no_more_than_the_budget(place: Path) -> None:
    population = replace(CLINIC, epsilon=1.0)
    fits = times_left([], replace(WHOLE, sigma=20.0).event, 1.0, CLINIC.delta)
    shared, failures = ledger_in(place), []

    def work() -> None:
        try:
            while not refused(shared, population, replace(WHOLE, sigma=20.0)):
                pass
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(spent_in(place)) == fits


def test_check_and_writing_are_one_step(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All wait for each other before they take the lock: with two steps, all would check before any writes."""
    population = replace(CLINIC, epsilon=1.0)
    spend = replace(WHOLE, sigma=5.0)
    assert times_left([], spend.event, 1.0, CLINIC.delta) == 1
    original = chain.locked

    @contextmanager
    def late(directory: Path) -> Iterator[None]:
        with suppress(threading.BrokenBarrierError):
            ready.wait(10)
        with original(directory):
            yield

    ready = threading.Barrier(4)
    found: list[bool] = []

    def work() -> None:
        found.append(refused(ledger_in(place), population, spend))

    with monkeypatch.context() as patch:
        patch.setattr(chain, "locked", late)
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(found) == [False, True, True, True]
    assert len(spent_in(place)) == 1


# --- Crashes


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_after(place: Path) -> None:
    ledger_in(place).spend(CLINIC, ROUND)
    _die()


def _killed_before_the_head(place: Path) -> None:
    ledger = ledger_in(place)
    ledger.spend(CLINIC, replace(ROUND, sigma=1000.0))
    chain.write_bytes = _die  # type: ignore[assignment]
    ledger.spend(CLINIC, ROUND)


def _killed_in_mid_line(place: Path) -> None:
    ledger = ledger_in(place)
    ledger.spend(CLINIC, replace(ROUND, sigma=1000.0))

    def half(path: Path, line: str) -> None:
        with path.open("a") as handle:
            handle.write(line[:100])
        _die()

    chain.append_line = half
    ledger.spend(CLINIC, ROUND)


@pytest.mark.parametrize(
    ("crash", "spent"), [(_killed_after, 1), (_killed_before_the_head, 1), (_killed_in_mid_line, 0)]
)
def test_a_process_that_is_killed_before_it_sends_has_spent_what_is_written(
    crash: Callable[[Path], None], spent: int, place: Path
) -> None:
    process = FORK.Process(target=crash, args=(place,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert verify(open_copy(place), ALDER.public).finding is None
    budget = replace(CLINIC, epsilon=epsilon([replace(ROUND.event, steps=10 * (1 + spent))], CLINIC.delta).bound + 0.05)
    ledger = ledger_in(place)
    assert not refused(ledger, budget, ROUND)
    assert refused(ledger, budget, ROUND)
    assert len([entry for entry in spent_in(place) if entry.sigma == ROUND.sigma]) == spent + 1
    assert verify(open_copy(place), ALDER.public).finding is None
    notes = [entry for entry in ledger_in(place).entries() if isinstance(entry, CutOff)]
    assert len(notes) == (1 if crash is _killed_in_mid_line else 0)


# --- A ledger that is not as it was left


def _spend_three(place: Path, identity: Identity = ALDER, largest: int = 1 << 20) -> Ledger:
    ledger = ledger_in(place, identity, largest)
    for number in (1, 2, 3):
        ledger.spend(CLINIC, replace(WHOLE, round=number))
    return ledger


def _without_the_last_line(file: Path) -> None:
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))


def _half_price(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'"sigma":10.0', b'"sigma":20.0', 1))


def _last_at_half_price(file: Path) -> None:
    *lines, last = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines, last.replace(b'"sigma":10.0', b'"sigma":20.0')]))


def _rehashed(place: int) -> Callable[[Path], None]:
    """Altered with care, as far as that goes without the key."""

    def change(file: Path) -> None:
        lines = file.read_bytes().splitlines(keepends=True)
        entry = read_entry(lines[place])
        assert isinstance(entry, Spent)
        entry = replace(entry, sigma=20.0)
        lines[place] = chain.line_of(replace(entry, hash=hashlib.sha256(entry.statement()).hexdigest()))
        assert read_entry(lines[place]) is not None
        file.write_bytes(b"".join(lines))

    return change


def _all_of_it(file: Path) -> None:
    for path in file.parent.glob("*.json*"):
        path.unlink()


SPOILT: dict[str, Callable[[Path], None]] = {
    "an entry altered": _half_price,
    "the last entry altered": _last_at_half_price,
    "an entry and its hash altered": _rehashed(1),
    "the last entry and its hash altered": _rehashed(-1),
    "the last entry removed": _without_the_last_line,
    "its file removed": Path.unlink,
    "its head removed": lambda file: (file.parent / HEAD).unlink(),
    "all of it removed": _all_of_it,
    "a line added": lambda file: file.write_bytes(file.read_bytes() + b"{}\n") and None,
}


@pytest.mark.parametrize(
    ("name", "restarted"),
    # What is known already is not read again: an entry that is altered under a process is found at its next start.
    [(name, restarted) for name in SPOILT for restarted in (True, False) if restarted or not name.endswith("altered")],
)
def test_with_a_ledger_that_was_tampered_with_nothing_may_be_spent(name: str, restarted: bool, place: Path) -> None:
    ledger = _spend_three(place)
    ledger.entries()
    SPOILT[name](place / FILE)
    before = {file.name: file.read_bytes() for file in place.iterdir()}
    if restarted:
        ledger = ledger_in(place)
    for population in (CLINIC, Population("notes", ("notes",))):
        with pytest.raises(StorageError, match="nothing may be spent") as caught:
            ledger.spend(population, WHOLE)
        assert "silotune-client ledger verify" in str(caught.value)
    assert {file.name: file.read_bytes() for file in place.iterdir()} == before


def test_a_ledger_that_is_put_back_is_noticed_by_whoever_knows_the_later_one(place: Path) -> None:
    ledger = _spend_three(place)
    earlier = {file.name: file.read_bytes() for file in place.iterdir()}
    ledger.spend(CLINIC, WHOLE)
    for name, content in earlier.items():
        (place / name).write_bytes(content)
    with pytest.raises(StorageError, match="it was put back"):
        ledger.spend(CLINIC, WHOLE)
    for number in (7, 8):  # and it went on otherwise, in a process that knew no better
        ledger_in(place).spend(CLINIC, replace(WHOLE, round=number))
    with pytest.raises(StorageError, match="not as it was written"):
        ledger.spend(CLINIC, WHOLE)


def test_nothing_is_spent_before_a_ledger_was_begun_and_beginning_mends_nothing(tmp_path: Path) -> None:
    place = tmp_path / "ledger"
    with pytest.raises(StorageError, match=r"head\.json is missing; nothing may be spent"):
        ledger_in(place).spend(CLINIC, WHOLE)
    ledger_in(place).begin()
    ledger = _spend_three(place)
    assert ledger.begin().count == 4
    assert len(spent_in(place)) == 3
    (place / HEAD).unlink()
    with pytest.raises(StorageError, match="nothing may be spent"):
        ledger_in(place).begin()


def test_a_ledger_of_another_identity_is_not_gone_on_with(place: Path) -> None:
    _spend_three(place)
    with pytest.raises(StorageError, match="signed by another identity"):
        ledger_in(place, BIRCH).spend(CLINIC, WHOLE)


def lines_of(place: Path) -> list[bytes]:
    return (place / FILE).read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("change", "kind", "number"),
    [
        (lambda lines: [lines[0], lines[1].replace(b'"steps":1', b'"steps":0'), *lines[2:]], ALTERED, 2),
        (lambda lines: [lines[0].replace(b'"epsilon":3.0', b'"epsilon":9.0'), *lines[1:]], ALTERED, 1),
        (lambda lines: [*lines[:2], *lines[3:]], REMOVED, 3),
        (lambda lines: lines[:-1], REMOVED, 4),
        (lambda lines: [*lines, lines[-1]], ADDED, 4),
        (lambda lines: [*lines, b"{}\n"], ADDED, 5),
    ],
)
def test_what_was_tampered_with_is_named(
    change: Callable[[list[bytes]], list[bytes]], kind: str, number: int, place: Path
) -> None:
    _spend_three(place)
    assert whole(place, 4)
    changed = change(lines_of(place))
    assert changed != lines_of(place)
    (place / FILE).write_bytes(b"".join(changed))
    found = verify(open_copy(place), ALDER.public).finding
    assert found is not None
    assert (found.kind, found.number) == (kind, number)


def test_every_field_of_every_kind_of_entry_is_signed_and_has_one_type(place: Path) -> None:
    _spend_three(place)
    with (place / FILE).open("ab") as handle:
        handle.write(b'{"number":5')
    entries = ledger_in(place).entries()
    assert {type(entry) for entry in entries} == {Spent, BudgetSet, CutOff}
    for entry in entries:
        raw = chain.line_of(entry)
        assert read_entry(raw) == entry
        told = entry.as_dict()
        for name in set(told) - {"hash", "signature"}:
            value = told[name]
            changed = {**told, name: value + "x" if isinstance(value, str) else value + 1}
            other: Any = str(value) if not isinstance(value, str) else 1
            assert type(entry).from_dict(changed).statement() != entry.statement(), name
            for wrong in ({**told, name: other}, {key: told[key] for key in told if key != name}, {**told, "more": 1}):
                with pytest.raises(TypeError):
                    type(entry).from_dict(wrong)
                assert read_entry((json.dumps(wrong, separators=(",", ":")) + "\n").encode()) is None


def test_an_entry_of_the_egress_log_is_none_of_the_ledger(place: Path, tmp_path: Path) -> None:
    """Though the same key signs both."""
    log = EgressLog(tmp_path / "egress", ALDER, clock=lambda: NOON)
    log.record("Keys", Payload.of_bytes(b"x"))
    (line,) = open_egress(tmp_path / "egress").lines()
    assert read_entry(line.raw) is None
    (place / FILE).write_bytes(line.raw)
    (place / HEAD).write_bytes((tmp_path / "egress" / HEAD).read_bytes())
    found = verify(open_copy(place), ALDER.public).finding
    assert found is not None
    with pytest.raises(StorageError, match="altered, or signed by another identity"):
        ledger_in(place).entries()
    ledger_in(tmp_path / "other").begin()
    assert ledger_in(tmp_path / "other").begin().hash != log.mend().hash


def test_an_export_is_verified_anywhere_and_shows_a_ledger_that_was_put_back(place: Path, tmp_path: Path) -> None:
    earlier = {file.name: file.read_bytes() for file in place.iterdir()}
    _spend_three(place)
    file = tmp_path / "ledger.jsonl"
    assert export(place, file) == 4
    kept = verify(open_copy(file), ALDER.public)
    assert (kept.finding, kept.entries) == (None, 4)
    (place / FILE).unlink()
    for name, content in earlier.items():
        (place / name).write_bytes(content)
    assert verify(open_copy(place), ALDER.public).entries == 0
    file.write_bytes(file.read_bytes()[:-1])
    found = verify(open_copy(file), ALDER.public).finding
    assert found is not None
    assert found.kind == HEAD_WRONG


def test_rotation_keeps_the_account(place: Path) -> None:
    _spend_three(place, largest=600)
    assert len(list(place.glob("ledger-*.jsonl"))) == 4
    kept = ledger_in(place, largest=600)
    assert len(spent_by(kept.entries(), CLINIC)) == 3
    kept.spend(CLINIC, WHOLE)
    assert len(spent_by(kept.entries(), CLINIC)) == 4
    assert whole(place, 5)


def test_what_is_known_is_not_read_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every round would read all that were before."""
    read: list[bytes] = []
    original = chain.read_entry

    def counted(form: Any, raw: bytes) -> Any:
        read.append(raw)
        return original(form, raw)

    ledger = _spend_three(place)
    monkeypatch.setattr(chain, "read_entry", counted)
    ledger.entries()
    assert [chain.line_of(entry) for entry in ledger.entries()] == lines_of(place)
    assert not read  # what it wrote itself
    other = ledger_in(place)
    assert [chain.line_of(entry) for entry in other.entries()] == lines_of(place)
    ledger.spend(CLINIC, WHOLE)
    assert len(read) == 4
    assert [chain.line_of(entry) for entry in other.entries()] == lines_of(place)
    assert len(read) == 4 + 1
