"""What each virtual institution's own ledger says it spent over the rounds of a run."""

from __future__ import annotations

from client.ledger import Spent, open_copy, read_entry
from common.config import Config
from common.privacy.accounting import Event, over_rounds
from server.summary import MOST_MOMENTS, as_pairs
from simulations.layout import RunDirectory


def spending(config: Config, directory: RunDirectory, rounds: int) -> dict[str, list[list[float]]]:
    """Of every institution: rounds, and what it had spent after each at the run's delta.

    rounds: that were run. A round's part is all that an institution's ledger has of it, repeats included; of one that
    it took no part in, nothing. What the reference arms spend stands in ledgers of their own.

    Raises StorageError for a ledger that cannot be read.
    """
    return {
        name: as_pairs(over_rounds(_by_round(directory, name, rounds), config.privacy.delta, MOST_MOMENTS))
        for name in config.data.names
    }


def _by_round(directory: RunDirectory, name: str, rounds: int) -> list[list[Event]]:
    found: list[list[Event]] = [[] for _ in range(rounds)]
    for line in open_copy(directory.ledger(name)).lines():
        entry = read_entry(line.raw)
        if isinstance(entry, Spent):
            # A round under way when the run was stopped for good used data as well.
            found[min(entry.round, rounds) - 1].append(entry.event)
    return found
