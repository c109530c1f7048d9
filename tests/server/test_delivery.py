"""A published adapter on its way to the institutions: signed, once to each, over kills, refusals and absences."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from client import adapters
from common.adapter import Adapter
from common.base_model import fingerprint
from common.config import Config, ServerOptimizerConfig
from common.errors import RunStopped
from common.messages import ADAPTER_DIGEST_DIFFERS, SIGNATURE_DIFFERS, Published, Received, Reply, Request
from common.models import load_adapter
from common.policy_reasons import LEFT
from common.publication import Publication
from common.secagg.identity import Identity
from server.coordinator import Bench, Observer, deliver
from tests.server.guarded import COORDINATOR, NAMES, RUN, Clock, Guarded, Hall, federation_config, write_records

A, B, C, D = NAMES


@pytest.fixture(scope="module")
def config(base_model: str) -> Config:
    return federation_config(base_model)


@pytest.fixture(scope="module")
def bench(config: Config) -> Bench:
    return Bench.of(config)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("records"))


@pytest.fixture
def here(tmp_path: Path, records: Path, config: Config, bench: Bench) -> Guarded:
    return Guarded(tmp_path, records, config, bench, Clock())


class Killed(BaseException):
    """What no code may catch by mistake."""


@dataclass
class Delivered:
    """Who was told to have the adapter; the coordinator is killed when so many do."""

    kill_at: int = 99
    names: list[str] = field(default_factory=list)

    def observer(self) -> Observer:
        return Observer(on_delivered=self)

    def __call__(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) == self.kill_at:
            raise Killed


def stated(here: Guarded) -> Publication:
    return Publication.from_json(json.loads((here.directory / "publication.json").read_text()))


def holders(here: Guarded) -> list[str]:
    """Institutions that have an adapter of the run, found to be what the coordinator signed."""
    found = [name for name in NAMES if adapters.names(here.home(name))]
    for name in found:
        assert adapters.names(here.home(name)) == (RUN,)
        kept = adapters.verified(here.home(name), RUN, COORDINATOR.public)
        assert kept.publication == stated(here)
        assert kept.adapter.digest() == stated(here).adapter
    return found


def test_a_run_that_ends_hands_its_best_adapter_signed_to_everybody(here: Guarded) -> None:
    hall, told = here.hall(), Delivered()
    outcome = here.go(hall, told.observer(), COORDINATOR)
    assert outcome.delivered == NAMES
    assert told.names == hall.handed() == list(NAMES)
    assert holders(here) == list(NAMES)
    said = stated(here)
    assert said.verifies(COORDINATOR.public)
    assert not said.verifies(Identity.generate("coordinator").public)
    published = load_adapter(here.directory / "adapter").digest()
    base = fingerprint(here.config.model.path)
    expected = Publication(RUN, outcome.progress.best_round, base, here.config.lora, published)
    assert replace(said, signature=b"") == expected
    assert published == outcome.progress.best.digest()
    assert json.loads((here.directory / "delivered.json").read_text()) == dict.fromkeys(NAMES, published)


def test_what_is_handed_out_is_the_best_rounds_and_not_the_last_ones(here: Guarded) -> None:
    """A server whose step changes the adapter and no score: what the run began with stays the best, as round 0."""
    federation = replace(here.config.federation, server_optimizer=ServerOptimizerConfig("fedavg", learning_rate=1e-30))
    here = replace(here, config=replace(here.config, federation=federation))
    outcome = here.go(signer=COORDINATOR)
    assert (outcome.progress.round, outcome.progress.best_round) == (1, 0)
    assert outcome.progress.adapter.digest() != here.bench.start.digest()
    assert (stated(here).round, stated(here).adapter) == (0, here.bench.start.digest())
    assert holders(here) == list(NAMES)


def test_an_interruption_while_it_is_handed_out_leaves_the_rest_for_later(here: Guarded) -> None:
    class Stopped(Hall):
        def ask(self, requests: Mapping[str, Request], timeout_s: float) -> Iterator[tuple[str, Reply]]:
            for name, reply in super().ask(requests, timeout_s):
                yield name, reply
                if isinstance(reply, Received):
                    raise RunStopped("interrupted")

    hall = here.hall()
    with pytest.raises(RunStopped, match=r"^interrupted$"):
        here.go(Stopped(hall.members, hall.clock), signer=COORDINATOR)
    assert holders(here) == [A]
    later = here.hall()
    assert here.go(later, signer=COORDINATOR).delivered == NAMES
    assert later.asked == [(name, Published) for name in (B, C, D)]


def test_without_a_signer_nothing_is_handed_out(here: Guarded) -> None:
    hall = here.hall()
    outcome = here.go(hall)
    assert (outcome.delivered, hall.handed(), holders(here)) == ((), [], [])
    assert not (here.directory / "publication.json").exists()
    assert not (here.directory / "delivered.json").exists()


def test_a_run_that_is_complete_hands_out_nothing_twice(here: Guarded) -> None:
    here.go(signer=COORDINATOR)
    before = {file: file.read_bytes() for file in here.directory.rglob("*") if file.is_file()}
    hall, told = here.hall(), Delivered()
    outcome = here.go(hall, told.observer(), COORDINATOR)
    assert outcome.delivered == NAMES
    assert (hall.asked, told.names) == ([], [])
    assert {file: file.read_bytes() for file in here.directory.rglob("*") if file.is_file()} == before


def test_who_is_away_at_the_end_gets_it_when_the_run_is_resumed(here: Guarded) -> None:
    hall, told = here.hall(), Delivered()

    def leave(_: object) -> None:
        hall.away = {B, D}

    observer = replace(told.observer(), on_round=leave)
    assert here.go(hall, observer, COORDINATOR).delivered == (A, C)
    assert holders(here) == [A, C]
    later = here.hall()
    later.away = {D}
    assert here.go(later, told.observer(), COORDINATOR).delivered == (A, B, C)
    assert later.asked == [(B, Published)]
    last = here.hall()
    assert here.go(last, told.observer(), COORDINATOR).delivered == NAMES
    assert last.asked == [(D, Published)]
    assert told.names == [A, C, B, D]
    assert holders(here) == list(NAMES)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_killed_in_the_middle_it_goes_on_with_who_has_not_got_it(number: int, here: Guarded) -> None:
    told = Delivered(kill_at=number)
    with pytest.raises(Killed):
        here.go(here.hall(), told.observer(), COORDINATOR)
    assert told.names == holders(here) == list(NAMES[:number])
    before = stated(here)
    hall = here.hall()
    assert here.go(hall, Delivered().observer(), COORDINATOR).delivered == NAMES
    assert hall.asked == [(name, Published) for name in NAMES[number:]]
    assert stated(here) == before
    assert holders(here) == list(NAMES)


def test_killed_before_it_is_written_that_one_has_it_it_is_handed_out_again_which_does_no_harm(here: Guarded) -> None:
    class Cut(Hall):
        def ask(self, requests: Mapping[str, Request], timeout_s: float) -> Iterator[tuple[str, Reply]]:
            for name, reply in super().ask(requests, timeout_s):
                if isinstance(reply, Received) and name == B:
                    raise Killed
                yield name, reply

    hall = here.hall()
    with pytest.raises(Killed):
        here.go(Cut(hall.members, hall.clock), signer=COORDINATOR)
    assert holders(here) == [A, B]
    again = here.hall()
    assert here.go(again, signer=COORDINATOR).delivered == NAMES
    assert again.handed() == [B, C, D]
    assert holders(here) == list(NAMES)


Lines = Callable[[], list[str]]


def test_refusals_are_logged_and_cost_nobody_else_the_adapter(here: Guarded, log_lines: Lines) -> None:
    """Birch pinned another coordinator's key, and dogwood left the run after its last round."""
    hall = here.hall(birch=here.institution(B, trusts=Identity.generate("coordinator")))
    told = Delivered()
    observer = replace(told.observer(), on_round=lambda _: here.control(D).leave(RUN))
    outcome, lines = here.go(hall, observer, COORDINATOR), log_lines()
    assert outcome.delivered == (A, C)
    assert told.names == holders(here) == [A, C]
    assert f"birch did not take the adapter: {SIGNATURE_DIFFERS}" in lines
    assert f"dogwood did not take the adapter: {LEFT}" in lines
    assert sum("did not take the adapter" in line for line in lines) == 2
    assert outcome.progress.round == here.config.federation.rounds
    # Whoever refused is asked again when the run is resumed, and no other.
    mended = here.hall()
    assert here.go(mended, signer=COORDINATOR).delivered == (A, B, C)
    assert mended.handed() == [B, D]


def test_what_another_signs_is_taken_by_nobody(here: Guarded, log_lines: Lines) -> None:
    outcome, lines = here.go(signer=Identity.generate("coordinator")), log_lines()
    assert outcome.delivered == ()
    assert [name for name in NAMES if adapters.names(here.home(name))] == []
    assert sum(SIGNATURE_DIFFERS in line for line in lines) == len(NAMES)


def test_an_answer_that_is_none_does_not_count(here: Guarded, log_lines: Lines) -> None:
    class Elsewhere(Hall):
        def ask(self, requests: Mapping[str, Request], timeout_s: float) -> Iterator[tuple[str, Reply]]:
            for name, reply in super().ask(requests, timeout_s):
                yield name, Received("another-run") if isinstance(reply, Received) and name == B else reply

    hall = here.hall()
    outcome, lines = here.go(Elsewhere(hall.members, hall.clock), signer=COORDINATOR), log_lines()
    assert outcome.delivered == (A, C, D)
    assert lines == ["birch did not take the adapter: Received"]
    assert B not in json.loads((here.directory / "delivered.json").read_text())


def test_another_adapter_under_the_same_name_is_refused_and_not_counted(here: Guarded) -> None:
    """As when somebody put another run's directory in its place: what has another digest was not delivered."""
    published = here.go(signer=COORDINATOR).progress.best
    other = Adapter({key: factor + 1 for key, factor in published.factors.items()})
    publication = replace(stated(here), adapter=other.digest()).signed(COORDINATOR)
    hall = here.hall()
    replies: list[Reply] = []

    class Heard(Hall):
        def ask(self, requests: Mapping[str, Request], timeout_s: float) -> Iterator[tuple[str, Reply]]:
            for name, reply in super().ask(requests, timeout_s):
                replies.append(reply)
                yield name, reply

    made = Heard(hall.members, hall.clock)
    assert deliver(here.config, Published(publication, other), made, here.directory) == ()
    assert made.handed() == list(NAMES)
    assert {getattr(reply, "reason", "") for reply in replies} == {ADAPTER_DIGEST_DIFFERS}


def test_members_of_the_roster_that_the_run_did_not_invite_get_nothing(here: Guarded) -> None:
    config = federation_config(here.config.model.path)
    invited = replace(config, data=replace(config.data, institutions=config.data.institutions[:3]))
    narrow = replace(here, config=invited)
    hall = narrow.hall()
    assert narrow.go(hall, signer=COORDINATOR).delivered == (A, B, C)
    assert hall.handed() == [A, B, C]
    assert D not in holders(narrow)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda file: file.write_text(""), id="empty"),
        pytest.param(lambda file: file.write_bytes(b"\xff\xfe"), id="not text"),
        pytest.param(lambda file: file.write_text('{"alder": "0'), id="cut short"),
        pytest.param(lambda file: file.write_text('["alder"]'), id="a list"),
        pytest.param(lambda file: file.unlink(), id="gone"),
    ],
)
def test_where_it_is_forgotten_who_has_it_everybody_gets_it_again(damage: Callable[[Path], Any], here: Guarded) -> None:
    here.go(signer=COORDINATOR)
    damage(here.directory / "delivered.json")
    hall = here.hall()
    hall.away = {D}
    assert here.go(hall, signer=COORDINATOR).delivered == (A, B, C)
    assert hall.handed() == [A, B, C]
    assert holders(here) == list(NAMES)


def test_a_run_that_stops_early_publishes_here_and_hands_out_nothing(here: Guarded) -> None:
    """Resumed, it may end with a better one; who has it is told once, at the end."""
    here = replace(here, config=replace(here.config, federation=replace(here.config.federation, rounds=2)))

    def kill(_: object) -> None:
        raise Killed

    hall = here.hall()
    with pytest.raises(Killed):
        here.go(hall, Observer(on_round=kill), COORDINATOR)
    assert (here.directory / "adapter").exists()
    assert hall.handed() == []
    assert here.go(here.hall(), signer=COORDINATOR).delivered == NAMES
