"""The privacy ledger: every attempt that uses data, written down and synced before the first record is read.

What is spent is spent for good, and for all data sets of a population: another run, another round or attempt, a changed
file, a restart, or an attempt that then fails: none opens a fresh budget. How the ledger is kept is
`client.chain`'s, how it is checked `client.chain_audit`'s. It holds what plans and policy say, and nothing of the data.

One that was deleted, altered or cut short lets nothing be spent; it is begun by `Ledger.begin` alone.

What it cannot notice:
- files and head that were put back together to an earlier state while no process knew the later one; an export kept
  elsewhere, and the epsilons of the egress log, show it;
- training without noise, which is in no ledger;
- a second home over the same files, as for a second federation: each home's ledger begins empty, and has the whole
  budget. One budget is then to be split over the homes by hand;
- a population and its data sets that all get other names at once, and the same persons under names that no policy in
  force at a spend ever put together (see `spent_by`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from client import chain, chain_audit
from client.chain import CUT_OFF, LARGEST_FILE, Chain, Form, Head, Held, Link
from client.policy_file import Population
from common.config import UNITS
from common.errors import ConfigError, Refusal
from common.policy_reasons import BUDGET_EXHAUSTED
from common.privacy.accounting import Event, Mechanism, epsilon
from common.secagg.identity import Identity

SPENT, BUDGET, NO_BUDGET = "spent", "budget", "budget.none"

INSTITUTION = UNITS["institution"]

LEAST_SIGMA = 0.01
"""Noise multipliers below it cost more than can be told in numbers."""


@dataclass(frozen=True)
class Spend:
    """What one attempt costs: an `Event` of the accountant, and what it belongs to.

    unit: what the epsilon speaks of: record, patient or institution. data_set: whose records were used.

    Raises ConfigError for what no event can be.
    """

    mechanism: Mechanism
    sigma: float
    q: float
    steps: int
    unit: str
    run: str
    round: int
    attempt: int
    data_set: str

    def __post_init__(self) -> None:
        numbers = (self.steps, self.round, self.attempt)
        if not all(type(number) is int and number >= 0 for number in numbers) or self.steps == 0:
            raise ConfigError(f"expected at least 1 step, and a round and an attempt from 0, found {numbers}")
        if not self.sigma >= LEAST_SIGMA:
            raise ConfigError(f"expected a noise multiplier of at least {LEAST_SIGMA}, found {self.sigma}")
        if self.unit not in UNITS.values():
            raise ConfigError(f"expected a unit of {', '.join(sorted(set(UNITS.values())))}, found {self.unit!r:.40}")
        if not self.data_set:
            raise ConfigError("expected the name of a data set, found none")
        _ = self.event

    @classmethod
    def of(cls, event: Event, mode: str, run: str, round_number: int, attempt: int, data_set: str) -> Spend:
        """Of an event in a mode of the configuration."""
        made = (event.mechanism, float(event.sigma), float(event.q), event.steps)
        return cls(*made, UNITS.get(mode, mode), run, round_number, attempt, data_set)

    @property
    def event(self) -> Event:
        """As the accountant counts it."""
        return Event(self.mechanism, self.sigma, self.q, self.steps)


# --- Entries ----------------------------------------------------------------------------------------------------------


class Entry(chain.Entry):
    """What the entries of a ledger have in common."""

    WORD = "ledger"


@dataclass(frozen=True)
class Spent(Entry):
    """What an attempt cost, that was about to begin. population: its name at that time. The rest as in `Spend`."""

    number: int
    time: str
    kind: str
    population: str
    data_set: str
    run: str
    round: int
    attempt: int
    unit: str
    mechanism: str
    sigma: float
    q: float
    steps: int
    previous: str
    hash: str = ""
    signature: str = ""

    @property
    def event(self) -> Event:
        """As the accountant counts it."""
        return Event(cast(Mechanism, self.mechanism), self.sigma, self.q, self.steps)


@dataclass(frozen=True)
class BudgetSet(Entry):
    """The terms of a population, where they are other ones than before.

    kind: BUDGET, or NO_BUDGET with an epsilon of 0. data_sets: names, with commas between them.
    """

    number: int
    time: str
    kind: str
    population: str
    data_sets: str
    epsilon: float
    delta: float
    previous: str
    hash: str = ""
    signature: str = ""

    @property
    def terms(self) -> tuple[str, str, str, float, float]:
        """What is compared."""
        return self.kind, self.population, self.data_sets, self.epsilon, self.delta


@dataclass(frozen=True)
class CutOff(Entry):
    """A line before it that a crash cut off; a file calls the size bytes."""

    number: int
    time: str
    kind: str
    size: int
    sha256: str
    previous: str
    hash: str = ""
    signature: str = ""

    NAMES = {"size": "bytes"}  # noqa: RUF012


_KINDS: dict[str, type[Entry]] = {SPENT: Spent, BUDGET: BudgetSet, NO_BUDGET: BudgetSet, CUT_OFF: CutOff}

Copy = chain_audit.Copy[Entry]

_REMEDY = (
    "restore it from a copy; only where nothing was ever spent, move the directory away and begin one with"
    " `silotune-client ledger begin`"
)

FORM: Form[Entry] = Form(
    word=Entry.WORD,
    title="the privacy ledger",
    halt="nothing may be spent",
    command="silotune-client ledger verify",
    remedy=_REMEDY,
    absent=f"nothing may be spent without it: {_REMEDY}",
    kind=_KINDS.get,
    cut_off=lambda link, size, sha256: CutOff(link.number, link.time, CUT_OFF, size, sha256, link.previous),
    opens=False,
)


def read_entry(raw: bytes) -> Entry | None:
    """The entry that a line holds, signature aside; None for any line that `Ledger` does not write."""
    return chain.read_entry(FORM, raw)


def open_copy(path: Path) -> Copy:
    """The ledger in a directory, or in the file that `export` wrote. See `chain_audit.open_copy`."""
    return chain_audit.open_copy(FORM, path)


def own_copy(directory: Path) -> Copy:
    """The ledger that an institution keeps in a directory.

    Raises StorageError, with what to do, when there is none, and when it cannot be read.
    """
    found = chain_audit.own_copy(FORM, directory)
    if found is None:
        raise FORM.missing(directory)
    return found


def export(directory: Path, file: Path) -> int:
    """Writes the ledger into one file, and gives the number of its entries. See `chain_audit.export`."""
    return chain_audit.export(FORM, directory, file)


def spent_by(entries: Sequence[Entry], population: Population) -> tuple[Spent, ...]:
    """All that ever was spent of a population, in order; the one account that budgets, forecasts and tables go by.

    That is what was spent under any name or on any data set that was ever tied to it, over however many steps: by a
    budget or a spend in the ledger, or by the population itself. So no other name, no data set that changes its
    population, and no population that is split gives anything back; parts of one each count what all of them spent.
    A data set in no population is a population of its own, tied to those that it was in. Where a name and all of its
    data sets change at once nothing ties the new ones to the old ones, and a tie that the policy took back before
    anything was spent under it is in no ledger.

    An event with the institution as its unit is about everything that the institution sends. So it counts, whatever
    population it was for, in each one that allows this unit or ever spent by it.
    """
    names, data_sets = {population.name}, set(population.data_sets)
    ties = {tie for entry in entries if (tie := _tie(entry)) is not None}
    while near := {tie for tie in ties if tie[0] in names or not data_sets.isdisjoint(tie[1])}:
        ties -= near
        names |= {name for name, _ in near}
        data_sets |= {data_set for _, tied in near for data_set in tied}
    spent = [entry for entry in entries if isinstance(entry, Spent)]
    own = [entry for entry in spent if entry.population in names]
    if INSTITUTION not in {*(UNITS.get(mode) for mode in population.modes), *(entry.unit for entry in own)}:
        return tuple(own)
    return tuple(entry for entry in spent if entry.population in names or entry.unit == INSTITUTION)


def spent_with(
    entries: Sequence[Entry], population: Population, spend: Spend, among: Iterable[Population]
) -> list[tuple[Population, tuple[Spent, ...]]]:
    """Those of `among` that a spend for `population` would count in, each with what was spent of it before."""
    new = _entry(Link(0, "", ""), population, spend)
    after = {one: spent_by([*entries, new], one) for one in among}
    return [(one, spent[:-1]) for one, spent in after.items() if spent and spent[-1] is new]


def units_in(spent: Iterable[Spent], *more: str) -> tuple[str, ...]:
    """The units of privacy that what was spent is of, and those besides, in order."""
    return tuple(sorted({entry.unit for entry in spent} | set(more)))


def by_unit(units: Iterable[str]) -> str:
    """The units that an epsilon speaks of, as a person reads them beside it."""
    return f"by {' and '.join(units)}"


def _tie(entry: Entry) -> tuple[str, tuple[str, ...]] | None:
    """The name of a population, and data sets that were of it."""
    if isinstance(entry, BudgetSet):
        return entry.population, tuple(entry.data_sets.split(","))
    return (entry.population, (entry.data_set,)) if isinstance(entry, Spent) else None


# --- Writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Receipt:
    """What was written down. added: epsilon that it added at the population's delta, by Renyi divergences."""

    entry: Spent
    added: float


class Ledger:
    """An institution's ledger, to be written to by any number of threads and processes.

    clock: gives the time, with its zone. largest: bytes of a file, after which a new one begins. on_spend: told of each
    spend once it is written down.

    Raises ConfigError for a directory that others can enter, StorageError for one that cannot be made.
    """

    def __init__(
        self,
        directory: Path,
        identity: Identity,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        largest: int = LARGEST_FILE,
        on_spend: Callable[[Receipt], None] = lambda _: None,
    ) -> None:
        self._on_spend = on_spend
        self._chain = Chain(FORM, directory, identity, largest, clock)
        self._known: Head | None = None
        self._entries: list[Entry] = []

    def begin(self) -> Head:
        """Begins the ledger where there is none yet, and leaves one that is there. Raises StorageError."""
        return self._chain.begin()

    def spend(self, population: Population, spend: Spend, others: Iterable[Population] = ()) -> Receipt:
        """Writes down a spend; what it is for may begin when this has returned, and counts as spent from now on.

        Check and writing are one step: nobody else spends meanwhile. A budget that the policy changed is written down
        first, and holds. others: further populations of the policy; where one of them counts this spend (`spent_by`),
        its budget holds as well.

        Raises Refusal(budget_exhausted), with what is left in its detail, where it would cost more than one of these
        budgets; StorageError when the ledger is not as it was left, or cannot be written: then nothing may begin
        either. ValueError for a data set that is not of the population.
        """
        if spend.data_set not in population.data_sets:
            raise ValueError(f"expected a data set of population {population.name}, found {spend.data_set!r:.80}")
        with self._chain.held() as held:
            entries = self._read(held)
            self._note_budget(held, entries, population)
            for one, spent in spent_with(entries, population, spend, [population, *others]):
                if refusal := _refusal(spent, one, spend):
                    raise refusal
            past = [entry.event for entry in spent_by(entries, population)]
            added = _by_renyi([*past, spend.event], population.delta) - _by_renyi(past, population.delta)
            entry = self._append(held, lambda link: _entry(link, population, spend))
        assert isinstance(entry, Spent)
        receipt = Receipt(entry, max(added, 0.0))
        self._on_spend(receipt)
        return receipt

    def entries(self) -> tuple[Entry, ...]:
        """All entries, in order. Raises StorageError when the ledger is not as it was left."""
        with self._chain.held() as held:
            return tuple(self._read(held))

    def _read(self, held: Held[Entry]) -> list[Entry]:
        """All entries; those that are known already are not read again."""
        self._entries += held.since(self._known)
        self._known = held.head
        return self._entries

    def _append(self, held: Held[Entry], make: Callable[[Link], Entry]) -> Entry:
        """Writes an entry, and knows of it from then on: a ledger that is put back behind it is noticed."""
        entry = held.append(make)
        self._entries.append(entry)
        self._known = held.head
        return entry

    def _note_budget(self, held: Held[Entry], entries: Sequence[Entry], population: Population) -> None:
        kind, limit = (BUDGET, float(population.epsilon)) if population.limited else (NO_BUDGET, 0.0)
        terms = (kind, population.name, ",".join(population.data_sets), limit, float(population.delta))
        before = [entry for entry in entries if isinstance(entry, BudgetSet) and entry.population == population.name]
        if not before or before[-1].terms != terms:
            self._append(held, lambda link: BudgetSet(link.number, link.time, *terms, link.previous))


def _entry(link: Link, population: Population, spend: Spend) -> Spent:
    return Spent(
        number=link.number,
        time=link.time,
        kind=SPENT,
        population=population.name,
        data_set=spend.data_set,
        run=spend.run,
        round=spend.round,
        attempt=spend.attempt,
        unit=spend.unit,
        mechanism=spend.mechanism,
        sigma=float(spend.sigma),
        q=float(spend.q),
        steps=spend.steps,
        previous=link.previous,
    )


def _refusal(spent: Sequence[Spent], population: Population, spend: Spend) -> Refusal | None:
    """Why a spend does not fit into the budget; None where it does."""
    if not population.limited:
        return None
    limit, delta, past = population.epsilon, population.delta, [entry.event for entry in spent]
    if _by_renyi([*past, spend.event], delta) <= limit:
        return None
    after = epsilon([*past, spend.event], delta).bound
    if after <= limit:  # never true of a number that is none
        return None
    before = epsilon(past, delta).bound
    return Refusal(
        BUDGET_EXHAUSTED,
        f"population {population.name}: the budget is epsilon {limit:g} at delta {delta:g},"
        f" {by_unit(units_in(spent, spend.unit))}; {before:.4g} of it is spent and {max(limit - before, 0.0):.4g} left;"
        f" with this round it would be {after:.4g}",
    )


def _by_renyi(events: Iterable[Event], delta: float) -> float:
    """An upper bound on epsilon that is quick however many different events there are.

    Renyi divergences only: what bounds those of a sum of discrete Gaussians bounds those of the normal noise as well.
    """
    return epsilon([Event("discrete-gaussian", event.sigma, event.q, event.steps) for event in events], delta).bound
