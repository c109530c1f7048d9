"""What protected the updates of a run, read from its summary.json and told in plain sentences."""

from __future__ import annotations

from dataclasses import dataclass, fields

from common.config import UNITS
from server.documents import Node

NONE = "none"


@dataclass(frozen=True)
class Terms:
    """The numbers on which secure aggregation rested; see `common.secagg.terms`.

    smallest_sum: fewest institutions that a sum covered. dropouts: how many could fall silent. ring_bits: of a masked
    number.
    """

    cohort: int
    colluders: int
    threshold: int
    smallest_sum: int
    dropouts: int
    ring_bits: int

    @classmethod
    def read(cls, node: Node) -> Terms:
        return cls(**{field.name: node[field.name].whole() for field in fields(cls)})


Spent = tuple[tuple[int, float], ...]
"""Rounds, and the epsilon that was spent after each."""


@dataclass(frozen=True)
class Spending:
    """What was spent of a budget of privacy over rounds.

    unit: that epsilon speaks of. implied: what the settings say of an institution that took part in everything.
    ledgers: what each institution's own ledger says, by name; empty where nobody but they knows. arms: the mode of the
    reference arms; empty without any.
    """

    unit: str
    delta: float
    implied: Spent
    ledgers: tuple[tuple[str, Spent], ...]
    arms: str

    @classmethod
    def read(cls, node: Node) -> Spending | None:
        """None where nothing is told of the rounds."""
        implied, ledgers, arms = node.get("implied"), node.get("ledgers"), node.get("arms")
        if implied is None:
            return None
        return cls(
            unit=node["unit"].text(),
            delta=node["delta"].number(),
            implied=_spent(implied),
            ledgers=() if ledgers is None else tuple((name, _spent(own)) for name, own in ledgers.items()),
            arms="" if arms is None else arms.text(),
        )

    @property
    def curves(self) -> tuple[Spent, ...]:
        """Different ones, the dearest first; one that is only implied where no ledger is known."""
        found = dict.fromkeys(own for _, own in self.ledgers) or {self.implied: None}
        return tuple(sorted(found, key=last, reverse=True))


def last(spent: Spent) -> float:
    """What was spent in all."""
    return spent[-1][1] if spent else 0.0


def _spent(node: Node) -> Spent:
    return tuple(_moment(pair) for pair in node.elements())


def _moment(node: Node) -> tuple[int, float]:
    pair = list(node.elements())
    if len(pair) != 2:
        raise node.refusal("a round and an epsilon")
    return pair[0].whole(), pair[1].number()


@dataclass(frozen=True)
class Protection:
    """Secure aggregation and differential privacy of a run.

    terms: None where secure aggregation was off or not told. mode: of differential privacy. details: what else is told
    of it. spending: None without differential privacy, or where it is not told.
    """

    secure_aggregation: bool
    terms: Terms | None
    mode: str
    details: tuple[tuple[str, str], ...]
    spending: Spending | None

    @classmethod
    def read(cls, node: Node) -> Protection:
        """Read `privacy` of a summary. Raises StorageError as `Node` does."""
        terms = node.get("terms")
        told = {"secure_aggregation", "mode", "terms", "implied", "ledgers", "arms"}
        return cls(
            secure_aggregation=node["secure_aggregation"].flag(),
            terms=None if terms is None else Terms.read(terms),
            mode=node["mode"].text(),
            details=tuple((name, part.plain()) for name, part in node.items() if name not in told),
            spending=Spending.read(node),
        )

    @property
    def private(self) -> bool:
        """Whether there was any differential privacy."""
        return self.mode != NONE

    @property
    def hiding(self) -> str:
        """What secure aggregation kept from the coordinator."""
        terms = self.terms
        if terms is None:
            return "Updates were masked; the coordinator learned their sum only."
        among = "one of them colluded" if terms.colluders == 1 else f"up to {terms.colluders} of them colluded"
        silent = f"Up to {terms.dropouts}" if terms.dropouts else "None"
        return (
            f"Updates were masked: the coordinator learned only sums over at least {terms.smallest_sum} institutions,"
            f" and no single update, also if {among} with it. {silent} of the {terms.cohort} institutions of a round"
            " could fall silent without stopping it."
        )

    @property
    def against(self) -> str:
        """Against whom epsilon holds; empty where there is none."""
        if self.mode not in UNITS:
            return ""
        if self.mode in ("record", "patient"):
            return "It holds against everybody: the noise is in every update before it leaves an institution."
        if self.terms is None:
            return "It holds against whoever sees the sums, and nobody who sees single updates without their masks."
        honest = self.terms.threshold - self.terms.colluders
        members = "one member" if self.terms.colluders == 1 else f"up to {self.terms.colluders} members"
        return (
            f"It holds against whoever sees the sums or the adapter, the coordinator together with {members} among"
            f" them: the noise of {honest} other{'' if honest == 1 else 's'} in every sum is counted on. It does not"
            " hold against more members together."
        )

    def source(self, deployed: bool) -> str:
        """Where the figures over rounds come from. deployed: by real institutions, whose ledgers stay with them."""
        if self.spending is None:
            return ""
        if deployed:
            return (
                "No institution tells the coordinator what it spent: this is what the settings cost one that took part"
                " in every round and attempt. One that trained a round again, as after a restart of its own, spent"
                " more. Each one's ledger has its own figure, and what other runs added (see `silotune-client ledger`)."
            )
        return (
            "This is what each institution's own ledger says. In a simulation noise follows from the seed: it shows"
            " what protection would cost, and protects from nobody who knows the seed."
        )

    @property
    def arms(self) -> str:
        """How the reference arms were protected; empty where it is not told, or without any."""
        if self.spending is None or not self.spending.arms:
            return ""
        if self.spending.arms == NONE:
            return (
                "Local-only and pooled were trained without noise, since nothing leaves an institution that trains"
                " alone: they are protected from nobody."
            )
        return (
            f"Local-only and pooled were trained with the same noise in mode {self.spending.arms}, so at equal epsilon,"
            " which stands in ledgers of their own."
        )
