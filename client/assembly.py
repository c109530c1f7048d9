"""An institution put together from what its directory holds: keys, trusted roster, policy, data sets and machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from client import adapters, data_sets
from client.control import Control, check_run
from client.guard import Guard
from client.home import ClientHome
from client.institution import Institution
from client.keys import Keys
from client.ledger import Ledger, Receipt
from client.policy_file import InstitutionPolicy, RoundBook
from client.secure import SecureMember
from client.trust import TrustedRoster
from common.adapter import Adapter
from common.base_model import model_directory
from common.publication import Publication


def marks(home: ClientHome, run: str) -> Path:
    """The file of what must never be forgotten of a run. Raises ConfigError for a name that no run has."""
    return home.runs / check_run(run) / "marks.json"


def assemble(
    home: ClientHome,
    keys: Keys,
    roster: TrustedRoster,
    policy: InstitutionPolicy,
    on_spend: Callable[[Receipt], None] = lambda _: None,
) -> Institution:
    """The institution that answers from this home; neither records nor base model are read yet.

    on_spend: told what is spent of privacy budgets, before records are read for it.

    Raises ConfigError for a data file that is missing or has mistakes, ModelError when there is no base model where it
    says.
    """
    file = data_sets.read(home.data)
    model_directory(file.machine.model)
    known = data_sets.DataSets(file, home.data.parent)
    book, control = RoundBook(home.control / "rounds-of-the-day.json"), Control(home.control)

    def shelf(publication: Publication, adapter: Adapter) -> None:
        adapters.keep(home, publication, adapter, file.machine.model)

    return Institution(
        name=keys.identity.name,
        data=known,
        home=home.runs,
        model=file.machine.config(),
        secure=SecureMember(keys.identity, policy.secure(roster.secagg), lambda run: marks(home, run)),
        guard=Guard(policy, known.names, known.without_persons, book, control, roster.coordinator),
        shelf=shelf,
        ledger=Ledger(home.ledger, keys.identity, on_spend=on_spend),
        row_tokens=file.machine.row_tokens,
    )
