"""A small federation of real institutions in this process, each with a policy, a guard and a shelf of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from client import adapters
from client.control import Control
from client.data_sets import RecordFolder
from client.guard import Guard
from client.home import ClientHome
from client.institution import Institution
from client.policy_file import AUTOMATIC, InstitutionPolicy, RoundBook
from client.secure import SecureMember
from common.base_model import fingerprint
from common.config import Config, DataConfig, LoraConfig, named
from common.messages import Hello, Introduction, Published, Refused, Reply, Request
from common.records import write_jsonl
from common.secagg.identity import Identity, Roster
from server.coordinator import Bench, Observer, Outcome, coordinate
from simulations.members import InProcessMembers
from tests.client.conftest import make_config, make_records

NAMES = ("alder", "birch", "cedar", "dogwood")
IDENTITIES = {name: Identity.generate(name) for name in NAMES}
KEYS = Roster.of(*IDENTITIES.values())
COORDINATOR = Identity.generate("coordinator")
RUN = "oncology-2030-01"
GATHER_S = 600.0


def federation_config(base_model: str, **federation: Any) -> Config:
    """A round of four institutions under masks, of whom one may be missing."""
    config = make_config(
        base_model,
        data=DataConfig(name="notes", institutions=named(*NAMES), train_records=[5] * 4),
        lora=LoraConfig(rank=2, alpha=4.0, dropout=0.0),
    )
    return replace(config, federation=replace(config.federation, **{"rounds": 1, "gather_s": GATHER_S, **federation}))


def write_records(root: Path) -> Path:
    """Everybody's records, the coordinator's among them."""
    for name in NAMES:
        write_jsonl(root / name / "train.jsonl", make_records(5, name))
        write_jsonl(root / name / "validation.jsonl", make_records(2, f"{name}-validation"))
    write_jsonl(root / "coordinator.jsonl", make_records(4, "coordinator"))
    return root


@dataclass
class Clock:
    """Time that passes when somebody rests, and not otherwise."""

    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now


@dataclass
class Hall:
    """The institutions as a coordinator reaches them: whoever is `away` is not there.

    asked: who was asked for what, in order, Hello and Published only. rests: how long the coordinator rested, each
    time; `meanwhile` is called then, with how often it rested so far.
    """

    members: InProcessMembers
    clock: Clock
    away: set[str] = field(default_factory=set)
    asked: list[tuple[str, type[Request]]] = field(default_factory=list)
    rests: list[float] = field(default_factory=list)
    meanwhile: Any = None

    def meet(self, hello: Hello, known: Collection[str], timeout_s: float) -> Mapping[str, Introduction | Refused]:
        there = InProcessMembers([m for n, m in self.members._institutions.items() if n not in self.away])
        answers = there.meet(hello, known, timeout_s)
        self.asked += [(name, Hello) for name in answers]
        return answers

    def reachable(self) -> tuple[str, ...]:
        return tuple(name for name in self.members.reachable() if name not in self.away)

    def rest(self, seconds: float) -> None:
        self.rests.append(seconds)
        self.clock.now += seconds
        if self.meanwhile is not None:
            self.meanwhile(len(self.rests))

    def ask(self, requests: Mapping[str, Request], timeout_s: float) -> Iterator[tuple[str, Reply]]:
        for name, reply in self.members.ask(requests, timeout_s):
            if isinstance(requests[name], Published):
                self.asked.append((name, Published))
            yield name, reply

    def greeted(self) -> list[str]:
        """Names to whom hello was said, in order."""
        return [name for name, kind in self.asked if kind is Hello]

    def handed(self) -> list[str]:
        """Names to whom the adapter was handed, in order."""
        return [name for name, kind in self.asked if kind is Published]


@dataclass(frozen=True)
class Guarded:
    """One directory in which such a federation runs, stops and goes on."""

    root: Path
    records: Path
    config: Config
    bench: Bench
    clock: Clock

    @property
    def directory(self) -> Path:
        return self.root / "run"

    def home(self, name: str) -> ClientHome:
        return ClientHome(self.root / "homes" / name)

    def control(self, name: str) -> Control:
        """What its people tell an institution."""
        return Control(self.home(name).control)

    def institution(self, name: str, approval: str = AUTOMATIC, trusts: Identity = COORDINATOR) -> Institution:
        """One that agrees to what the configuration asks. trusts: the coordinator whose key it pinned."""
        home, config = self.home(name), self.config
        policy = InstitutionPolicy(
            base_models=(fingerprint(config.model.path).digest(),),
            data_sets=(config.data.name,),
            quantise=config.quantise,
            weight_unit=config.federation.weight_unit,
            approval=approval,
        )
        book = RoundBook(home.control / "rounds-of-the-day.json")
        guard = Guard(policy, (config.data.name,), (), book, self.control(name), trusts.public)
        return Institution(
            name=name,
            data=RecordFolder(self.records / name),
            home=home.runs,
            model=config.model,
            secure=SecureMember(IDENTITIES[name], policy.secure(KEYS), lambda run: home.runs / run / "marks.json"),
            guard=guard,
            shelf=lambda publication, adapter: void(adapters.keep(home, publication, adapter, config.model.path)),
        )

    def hall(self, **instead: Institution) -> Hall:
        """All of them, there and willing. instead: another one of that name."""
        return Hall(InProcessMembers([instead.get(name) or self.institution(name) for name in NAMES]), self.clock)

    def go(self, members: Any = None, observer: Observer | None = None, signer: Identity | None = None) -> Outcome:
        """Begins the run, or goes on with it."""
        return coordinate(
            self.config,
            self.directory,
            self.records / "coordinator.jsonl",
            members if members is not None else self.hall(),
            observer or Observer(),
            self.bench,
            KEYS,
            RUN,
            signer,
        )


def void(_: object) -> None:
    """A shelf gives nothing back."""
