"""An institution as its daemon puts it together, from a directory of its own; and an honest coordinator's part."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from client import keys
from client.assembly import assemble
from client.control import Control
from client.data_sets import RecordSet
from client.home import ClientHome
from client.institution import Institution
from client.policy_file import InstitutionPolicy
from client.trust import TrustedRoster
from common.adapter import Adapter
from common.base_model import fingerprint
from common.config import DataConfig, named
from common.enrolment import Address, Card, Contents, Member, SignedRoster
from common.messages import Hello, Plan, Published, Reply, Request, TrainRequest
from common.publication import Publication
from common.records import write_jsonl
from common.secagg.aggregator import Aggregator
from common.secagg.identity import Identity, Roster
from common.secagg.participant import Participant
from tests.client.conftest import NAMES, make_config, make_hello, make_plan, make_records, secured
from tests.client.enrolled import WHEN, authority_pem

RUN = "tiny-run"
DATA_SET = "notes"
ME, *OTHERS = NAMES


@dataclass
class Untouchable:
    """Records that nobody may look at. opened: who did all the same."""

    opened: list[tuple[str, str]] = field(default_factory=list)

    def find(self, data_set: str, part: str) -> RecordSet:
        self.opened.append((data_set, part))
        raise AssertionError("records were opened")


class Guarded:
    """The institution `alder` at a home of its own, two more names on its roster, and the coordinator that it trusts.

    policy: what allows the run of `config`, unless a test says more. files: names of further data sets in data.yaml.
    """

    def __init__(
        self,
        root: Path,
        base_model: str,
        records: int = 40,
        marker: str = "",
        folder: str = "data",
        files: tuple[str, ...] = (),
        **policy: Any,
    ) -> None:
        self.config = replace(
            make_config(base_model),
            data=DataConfig(name=DATA_SET, institutions=named(*NAMES), train_records=[9, 7, 5]),
        )
        self.home = ClientHome(root / f"home{marker}")
        self.records = root / folder / f"records{marker}.jsonl"
        write_jsonl(self.records, make_records(records, ME, marker))
        named_files = {DATA_SET: self.records, **{name: self.records.with_name(f"{name}.jsonl") for name in files}}
        card = keys.init(self.home, ME, None, base_model, named_files)
        self.keys = keys.load(self.home, None)
        self.coordinator = Identity.generate("coordinator")
        self.identities = {ME: self.keys.identity, **{name: Identity.generate(name) for name in OTHERS}}
        strangers = {name: ec.generate_private_key(ec.SECP384R1()).public_key() for name in OTHERS}
        cards = [card, *(Card.of(self.identities[name], key) for name, key in strangers.items())]
        contents = Contents(
            "oncology",
            1,
            WHEN,
            self.coordinator.public,
            Address("coordinator.example.org", 9443),
            authority_pem(ec.generate_private_key(ec.SECP384R1())),
            tuple(Member(found, WHEN) for found in cards),
        )
        self.trusted = TrustedRoster(SignedRoster.of(contents, self.coordinator), WHEN)
        self.policy = replace(
            InstitutionPolicy(
                base_models=(fingerprint(base_model).digest(),),
                data_sets=(DATA_SET,),
                weight_unit=self.config.federation.weight_unit,
                quantise=self.config.quantise,
            ),
            **policy,
        )

    @property
    def roster(self) -> Roster:
        return self.trusted.secagg

    @property
    def control(self) -> Control:
        """What a command would use."""
        return Control(self.home.control)

    @property
    def book(self) -> Path:
        return self.home.control / "rounds-of-the-day.json"

    @property
    def marks(self) -> Path:
        return self.home.runs / RUN / "marks.json"

    def without(self, name: str) -> TrustedRoster:
        """The roster after a member was removed, as this institution would pin it."""
        now = self.trusted.roster.contents
        members = tuple(member for member in now.members if member.card.name != name)
        left = replace(now, serial=now.serial + 1, members=members)
        return TrustedRoster(SignedRoster.of(left, self.coordinator), WHEN)

    def forget_persons(self) -> None:
        """Lets the data file name no column that says whose record it is."""
        told = self.home.data.read_text(encoding="utf-8")
        path = f"path: {json.dumps(str(self.records))}\n"
        assert told.count(path) == 1
        self.home.data.write_text(told.replace(path, f'{path}    person: "-"\n'), encoding="utf-8")

    def institution(self, **changes: Any) -> Institution:
        """As a daemon that has just started has it; a keyword replaces a part of it."""
        return replace(assemble(self.home, self.keys, self.trusted, self.policy), **changes)

    def keep_the_day(self) -> None:
        """Lets no day begin during a test: the book counts on tomorrow until the clock has passed it."""
        tomorrow = (datetime.now(UTC) + timedelta(days=1)).date()
        self.control.pause()
        self.control.unpause()
        self.book.write_text(json.dumps({"day": tomorrow.isoformat(), "rounds": []}))

    # --- What a coordinator says ----------------------------------------------------------------------------------

    def hello(self, secure: bool = True, **changes: Any) -> Hello:
        return make_hello(self.config, RUN, self.roster.digest() if secure else "", **changes)

    def plan(self, start: Adapter, number: int = 1, attempt: int = 1, secure: bool = True, **changes: Any) -> Plan:
        plan = make_plan(self.config, start, number, run=RUN)
        return replace(secured(plan, self.config, self.roster, attempt) if secure else plan, **changes)

    def request(self, start: Adapter, *args: Any, **kwargs: Any) -> TrainRequest:
        return TrainRequest(self.plan(start, *args, **kwargs), start)

    def published(self, adapter: Adapter, signer: Identity | None = None, **changes: Any) -> Published:
        """An adapter of the run, signed by the coordinator or by who is said."""
        publication = Publication(
            RUN, self.config.federation.rounds, fingerprint(self.config.model.path), self.config.lora, adapter.digest()
        )
        return Published(replace(publication, **changes).signed(signer or self.coordinator), adapter)


class Attempt:
    """An honest attempt in which everybody but one member plays in memory. ask: how that one is reached.

    Each method brings everybody as far as it says and gives what the one member is to be asked next.
    """

    def __init__(
        self, place: Guarded, start: Adapter, ask: Callable[[Request], Reply], plan: Plan | None = None
    ) -> None:
        self.place = place
        self.start = start
        self.plan = plan or place.plan(start)
        self.ask = ask
        self.aggregator = Aggregator(self.plan.attempt, place.roster)
        self.others = {name: Participant(self.plan.attempt, place.identities[name], place.roster) for name in OTHERS}
        self._vector = np.zeros(self.plan.layout.length, np.uint32)

    def _play(self, mine: Request, theirs: Mapping[str, Any], take: Callable[[str, Any], None]) -> None:
        take(ME, self.ask(mine))
        for name, answer in theirs.items():
            take(name, answer)

    def train_request(self) -> TrainRequest:
        return TrainRequest(self.plan, self.start)

    def key_list(self) -> Request:
        theirs = {name: one.keys() for name, one in self.others.items()}
        self._play(self.train_request(), theirs, self.aggregator.on_keys)
        self.listed = self.aggregator.key_list()
        return self.listed

    def inbox(self) -> Request:
        listed = self.key_list()
        theirs = {name: one.on_key_list(listed) for name, one in self.others.items()}  # type: ignore[arg-type]
        self._play(listed, theirs, self.aggregator.on_shares)
        self.boxes = self.aggregator.inboxes()
        return self.boxes[ME]

    def survivors(self) -> Request:
        mine = self.inbox()
        theirs = {name: one.on_inbox(self.boxes[name], self._vector) for name, one in self.others.items()}
        self._play(mine, theirs, self.aggregator.on_masked)
        return self.aggregator.survivors()

    def consents(self) -> Request:
        named_ = self.survivors()
        theirs = {name: one.on_survivors(named_, lambda _: None) for name, one in self.others.items()}  # type: ignore[arg-type]
        self._play(named_, theirs, self.aggregator.on_consent)
        return self.aggregator.consents()

    def sum(self) -> np.ndarray:
        """To the end: the one member's vector, since everybody else's is zero."""
        signed = self.consents()
        theirs = {name: one.on_consents(signed) for name, one in self.others.items()}  # type: ignore[arg-type]
        self._play(signed, theirs, self.aggregator.on_revealed)
        return self.aggregator.unmask()
