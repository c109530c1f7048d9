"""How a run gathers its institutions: who is waited for, until when, and who is not. All of them are real ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from client.policy_file import MANUAL
from common.base_model import fingerprint
from common.config import Config
from common.errors import RunStopped
from common.messages import (
    BASE_MODEL_DIFFERS,
    INTERNAL_ERROR,
    NAME_DIFFERS,
    PROTOCOL,
    PROTOCOL_DIFFERS,
    TIMED_OUT,
    VERSION_DIFFERS,
    Hello,
    Introduction,
    Refused,
)
from common.policy_reasons import LEFT, NOT_APPROVED, PAUSED
from server import coordinator
from server.coordinator import ABSENT, Bench, Observer, Outcome
from tests.server.guarded import GATHER_S, NAMES, RUN, Clock, Guarded, Hall, federation_config, write_records

A, B, C, D = NAMES
AFTERNOON = 4 * 3600.0


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
def here(tmp_path: Path, records: Path, config: Config, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Guarded:
    """A federation whose coordinator waits without time going by."""
    clock = Clock()
    monkeypatch.setattr(coordinator, "time", SimpleNamespace(monotonic=clock.monotonic))
    return Guarded(tmp_path, records, config, bench, clock)


@dataclass
class Told:
    """What an observer heard of."""

    gathering: list[dict[str, str]] = field(default_factory=list)
    refusals: list[tuple[str, Refused]] = field(default_factory=list)
    rounds: int = 0

    def observer(self) -> Observer:
        return Observer(
            on_gathering=lambda waiting: self.gathering.append(dict(waiting)),
            on_refusal=lambda name, no: self.refusals.append((name, no)),
            on_round=self._on_round,
        )

    def _on_round(self, _: Any) -> None:
        self.rounds += 1


def contributors(outcome: Outcome) -> list[int]:
    return [record.contributors for record in outcome.progress.history]


def at(number: int, do: Callable[[], Any]) -> Callable[[int], None]:
    """Does it while the coordinator rests for that time."""

    def meanwhile(count: int) -> None:
        if count == number:
            do()

    return meanwhile


def test_when_everybody_is_there_nobody_waits(here: Guarded) -> None:
    hall, told = here.hall(), Told()
    outcome = here.go(hall, told.observer())
    assert (told.gathering, told.refusals, hall.rests) == ([{}], [], [])
    assert hall.greeted() == list(NAMES)
    assert dict(outcome.refused) == {}
    assert contributors(outcome) == [4]


def test_who_comes_later_takes_part_from_the_first_round_on(here: Guarded) -> None:
    hall, told = here.hall(), Told()
    hall.away = {B, D}

    def come(count: int) -> None:
        hall.away -= {2: {D}, 4: {B}}.get(count, set())

    hall.meanwhile = come
    outcome = here.go(hall, told.observer())
    assert told.gathering == [{B: ABSENT, D: ABSENT}, {B: ABSENT}, {}]
    assert len(hall.rests) == 4
    # Each of them was asked once.
    assert hall.greeted() == [A, C, D, B]
    assert dict(outcome.refused) == {}
    assert contributors(outcome) == [4]


def test_who_pauses_is_asked_again_until_it_does_not(here: Guarded) -> None:
    hall, told = here.hall(), Told()
    here.control(B).pause()
    hall.meanwhile = at(3, here.control(B).unpause)
    outcome = here.go(hall, told.observer())
    assert told.gathering == [{B: PAUSED}, {}]
    assert hall.greeted() == [*NAMES, B, B, B]
    assert told.refusals == []
    assert contributors(outcome) == [4]


def test_who_is_to_approve_is_waited_for_and_a_person_sees_what_is_asked(here: Guarded) -> None:
    hall, told = here.hall(birch=here.institution(B, approval=MANUAL)), Told()
    control = here.control(B)

    def approve() -> None:
        (waiting,) = control.waiting().items()
        assert waiting[0] == RUN
        assert waiting[1].terms["data_set"] == "notes"
        control.approve(RUN, waiting[1].digest)

    hall.meanwhile = at(2, approve)
    outcome = here.go(hall, told.observer())
    assert told.gathering == [{B: NOT_APPROVED}, {}]
    assert contributors(outcome) == [4]


def test_whoever_watches_is_told_when_it_changes_and_not_otherwise(here: Guarded) -> None:
    hall, told = here.hall(birch=here.institution(B, approval=MANUAL)), Told()
    control = here.control(B)
    control.pause()
    hall.away = {B}
    steps: dict[int, Callable[[], Any]] = {
        3: hall.away.clear,
        5: control.unpause,
        8: lambda: hall.away.add(B),
        10: hall.away.clear,
        12: lambda: control.approve(RUN, control.waiting()[RUN].digest),
    }
    hall.meanwhile = lambda count: steps.get(count, lambda: None)()
    outcome = here.go(hall, told.observer())
    reasons = [ABSENT, PAUSED, NOT_APPROVED, ABSENT, NOT_APPROVED]
    assert told.gathering == [*({B: reason} for reason in reasons), {}]
    assert contributors(outcome) == [4]


def test_when_the_time_is_up_the_run_begins_with_those_who_are_there(here: Guarded) -> None:
    hall, told = here.hall(), Told()
    hall.away = {B}
    outcome = here.go(hall, told.observer())
    assert told.gathering == [{B: ABSENT}]
    assert sum(hall.rests) == pytest.approx(GATHER_S)
    assert told.refusals == [(B, Refused(ABSENT, B))]
    assert dict(outcome.refused) == {B: ABSENT}
    assert contributors(outcome) == [3]
    # Nobody is asked for anything who was not there at the beginning.
    assert not (here.home(B).runs / RUN).exists()


@pytest.mark.parametrize("reason", [PAUSED, NOT_APPROVED])
def test_who_is_not_ready_in_time_takes_no_part(reason: str, here: Guarded) -> None:
    hall, told = here.hall(birch=here.institution(B, approval=MANUAL)), Told()
    if reason == PAUSED:
        here.control(B).pause()
    outcome = here.go(hall, told.observer())
    assert told.refusals == [(B, Refused(reason, B))]
    assert dict(outcome.refused) == {B: reason}
    assert contributors(outcome) == [3]
    assert hall.clock.now == pytest.approx(1000 + GATHER_S)


def test_an_afternoon_is_waited_with_few_questions_and_an_early_yes_is_soon_heard(here: Guarded) -> None:
    federation = replace(here.config.federation, gather_s=AFTERNOON)
    here = replace(here, config=replace(here.config, federation=federation))
    hall = here.hall()
    here.control(B).pause()
    here.go(hall)
    assert sum(hall.rests) == pytest.approx(AFTERNOON)
    assert hall.greeted().count(B) == len(hall.rests) + 1 < 700
    # Whoever is ready after ten seconds, a minute or an hour is asked within a twentieth of that, and half a minute.
    passed = 0.0
    for rest in hall.rests:
        assert rest <= max(0.05, passed / 20) + 1e-9
        assert rest <= 30
        passed += rest


def test_too_few_in_time_stop_the_run_which_goes_on_when_they_are_there(here: Guarded) -> None:
    hall = here.hall()
    hall.away = {D}
    here.control(B).pause()
    expected = (
        "2 institutions can take part, federation.min_cohort is 3: birch: paused; dogwood: absent. "
        "Each institution's own log says why; mend it there, then resume."
    )
    with pytest.raises(RunStopped) as stopped:
        here.go(hall)
    assert str(stopped.value) == expected
    here.control(B).unpause()
    assert contributors(here.go(here.hall())) == [4]


def test_an_interruption_ends_waiting_and_the_run_goes_on_later(here: Guarded) -> None:
    hall, told = here.hall(), Told()
    hall.away = {B}

    def interrupt() -> None:
        raise RunStopped("interrupted")

    hall.meanwhile = at(2, interrupt)
    with pytest.raises(RunStopped, match=r"^interrupted$"):
        here.go(hall, told.observer())
    assert told.rounds == 0
    assert not (here.directory / "adapter").exists()
    assert not any((here.home(name).runs / RUN).exists() for name in NAMES)
    assert contributors(here.go()) == [4]


def test_a_refusal_that_is_final_is_not_asked_for_again(here: Guarded) -> None:
    hall, told = here.hall(), Told()
    here.control(C).leave(RUN)
    hall.away = {B}
    hall.meanwhile = at(3, hall.away.clear)
    outcome = here.go(hall, told.observer())
    assert told.gathering == [{B: ABSENT}, {}]
    assert hall.greeted() == [A, C, D, B]
    assert told.refusals == [(C, Refused(LEFT, C))]
    assert dict(outcome.refused) == {C: LEFT}
    assert contributors(outcome) == [3]


def test_a_run_that_goes_on_gathers_anew(here: Guarded) -> None:
    class Killed(BaseException):
        pass

    def kill(_: object) -> None:
        raise Killed

    here = replace(here, config=replace(here.config, federation=replace(here.config.federation, rounds=2)))
    first = here.hall()
    first.away = {B}
    with pytest.raises(Killed):
        here.go(first, Observer(on_round=kill))
    told = Told()
    outcome = here.go(here.hall(), told.observer())
    assert told.gathering == [{}]
    assert dict(outcome.refused) == {}
    assert contributors(outcome) == [3, 4]


# ---- what nodes say ------------------------------------------------------------------------------------------------


class Nodes(Hall):
    """Where some of those who answer hello are not who they seem, or say something else than an institution would.

    says: what is heard of whom at the first look, the second, and so on, the last again and again; None: it is not
    there. A name that stands here and is an institution's is answered for by the real one after the last.
    """

    says: Mapping[str, list[Refused | Introduction | None]]
    looks = 0

    def meet(self, hello: Hello, known: Collection[str], timeout_s: float) -> Mapping[str, Introduction | Refused]:
        said = {}
        for name, answers in self.says.items():
            if self.looks < len(answers) or name not in NAMES:
                self.away.add(name)
                said[name] = answers[min(self.looks, len(answers) - 1)]
            else:
                self.away.discard(name)
        self.looks += 1
        found = {name: answer for name, answer in said.items() if answer is not None and name not in known}
        self.asked += [(name, Hello) for name in found]
        return {**found, **super().meet(hello, known, timeout_s)}


def nodes(here: Guarded, **says: list[Refused | Introduction | None]) -> Nodes:
    hall = here.hall()
    made = Nodes(hall.members, hall.clock)
    made.says = {name.replace("_", "-"): answers for name, answers in says.items()}
    return made


def test_who_does_not_answer_in_time_counts_as_absent_and_is_asked_again(here: Guarded) -> None:
    """Its machine was restarted between the question and the answer."""
    hall, told = nodes(here, birch=[Refused(TIMED_OUT, B), Refused(TIMED_OUT, B), None]), Told()
    outcome = here.go(hall, told.observer())
    assert told.gathering == [{B: ABSENT}, {}]
    assert told.refusals == []
    assert contributors(outcome) == [4]


@pytest.mark.parametrize(("timeout_s", "most"), [(5.0, 5.0), (7200.0, 60.0)])
def test_who_is_busy_keeps_nobody_who_comes_meanwhile(timeout_s: float, most: float, here: Guarded) -> None:
    """Training may take hours, and an answer to hello does not: it is waited for shortly, and asked for again."""
    waits: list[float] = []

    class Waits(Nodes):
        def meet(self, hello: Hello, known: Collection[str], timeout_s: float) -> Mapping[str, Introduction | Refused]:
            waits.append(timeout_s)
            return super().meet(hello, known, timeout_s)

    here = replace(here, config=replace(here.config, federation=replace(here.config.federation, timeout_s=timeout_s)))
    hall = Waits(here.hall().members, here.clock)
    hall.says = {B: [Refused(TIMED_OUT, B)] * 3, C: [None, None]}
    assert contributors(here.go(hall)) == [4]
    assert hall.greeted() == [B, A, D, B, B, C, B]
    assert waits == [most] * 4


def test_who_never_answers_is_told_as_that(here: Guarded) -> None:
    hall, told = nodes(here, birch=[Refused(TIMED_OUT, B)] * 1000), Told()
    outcome = here.go(hall, told.observer())
    assert told.gathering == [{B: ABSENT}]
    assert told.refusals == [(B, Refused(TIMED_OUT, B))]
    assert dict(outcome.refused) == {B: TIMED_OUT}
    assert contributors(outcome) == [3]


def test_who_refused_and_went_away_is_absent(here: Guarded) -> None:
    """What it said no longer holds; it may have been unpaused meanwhile."""
    hall, told = nodes(here, birch=[Refused(PAUSED, B), *[None] * 1000]), Told()
    outcome = here.go(hall, told.observer())
    assert told.gathering == [{B: PAUSED}, {B: ABSENT}]
    assert dict(outcome.refused) == {B: ABSENT}


@pytest.mark.parametrize("reason", [PAUSED, NOT_APPROVED, TIMED_OUT])
def test_who_is_not_of_the_run_is_not_waited_for(reason: str, here: Guarded) -> None:
    hall, told = nodes(here, mallory=[Refused(reason, "mallory")]), Told()
    outcome = here.go(hall, told.observer())
    assert (told.gathering, hall.rests) == ([{}], [])
    assert told.refusals == [("mallory", Refused(reason, "mallory"))]
    assert dict(outcome.refused) == {"mallory": reason}
    assert contributors(outcome) == [4]


def test_who_is_not_of_the_run_does_not_stand_for_one_who_is(here: Guarded) -> None:
    """A member of the roster that this run did not invite refuses; birch, who is invited, is waited for."""
    hall, told = nodes(here, mallory=[Refused(LEFT, "mallory")], birch=[None, None]), Told()
    outcome = here.go(hall, told.observer())
    assert told.gathering == [{B: ABSENT}, {}]
    assert contributors(outcome) == [4]


def test_a_stranger_that_introduces_itself_stays_outside(here: Guarded) -> None:
    stranger = Introduction("mallory", PROTOCOL, version("silotune"), fingerprint(here.config.model.path))
    hall, told = nodes(here, mallory=[stranger]), Told()
    outcome = here.go(hall, told.observer())
    assert told.gathering == [{}]
    assert dict(outcome.refused) == {"mallory": "not_invited"}
    assert contributors(outcome) == [4]


def test_nodes_that_have_numbers_only_are_waited_for_by_the_names_they_give(here: Guarded) -> None:
    """Where nobody is enrolled: a simulation. Birch refuses as node 7, and is greeted as itself once it does not."""
    hall, told = nodes(here, node_7=[Refused(PAUSED, B), Refused(PAUSED, B), None], birch=[None, None]), Told()
    outcome = here.go(hall, told.observer())
    assert told.gathering == [{B: PAUSED}, {}]
    assert dict(outcome.refused) == {}
    assert contributors(outcome) == [4]


def test_a_node_that_gives_no_name_may_be_anyone_who_is_missing(here: Guarded) -> None:
    """It crashed before it could say who it is: nobody else is to be waited for."""
    hall, told = nodes(here, node_7=[Refused(INTERNAL_ERROR)], birch=[None] * 1000), Told()
    outcome = here.go(hall, told.observer())
    assert (told.gathering, hall.rests) == ([{}], [])
    assert told.refusals == [("node-7", Refused(INTERNAL_ERROR))]
    assert dict(outcome.refused) == {"node-7": INTERNAL_ERROR}


def test_a_node_without_a_name_that_may_come_back_is_waited_for(here: Guarded) -> None:
    hall, told = nodes(here, node_7=[Refused(TIMED_OUT), None], birch=[None]), Told()
    outcome = here.go(hall, told.observer())
    assert told.gathering == [{"node-7": ABSENT}, {}]
    assert contributors(outcome) == [4]


def test_who_refuses_under_the_name_of_one_who_takes_part_is_told_by_its_number(here: Guarded) -> None:
    hall, told = nodes(here, node_7=[Refused(LEFT, A)]), Told()
    outcome = here.go(hall, told.observer())
    assert told.gathering == [{}]
    assert dict(outcome.refused) == {"node-7": LEFT}
    assert contributors(outcome) == [4]


@pytest.mark.parametrize("other", [A, C])
def test_who_is_known_is_told_by_its_own_name_whatever_it_says(other: str, here: Guarded) -> None:
    """Neither is cedar, who is away, taken for one who pauses, nor alder, who is there."""
    hall, told = nodes(here, birch=[Refused(PAUSED, other)] * 1000, cedar=[None, None]), Told()
    outcome = here.go(hall, told.observer())
    assert told.gathering == [{B: PAUSED, C: ABSENT}, {B: PAUSED}]
    assert dict(outcome.refused) == {B: PAUSED}
    assert contributors(outcome) == [3]


def test_who_is_known_is_not_taken_for_one_who_never_came(here: Guarded) -> None:
    hall = nodes(here, birch=[Refused(PAUSED, C)] * 1000, cedar=[None] * 1000)
    with pytest.raises(RunStopped, match=r"2 institutions.*: birch: paused; cedar: absent\."):
        here.go(hall)


def test_who_was_found_under_another_name_is_told_by_its_own(here: Guarded) -> None:
    hall, told = nodes(here, birch=[Refused(NAME_DIFFERS, B)] * 1000), Told()
    outcome = here.go(hall, told.observer())
    assert (told.gathering, hall.rests) == ([{}], [])
    assert dict(outcome.refused) == {B: NAME_DIFFERS}
    assert contributors(outcome) == [3]


# ---- what differs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("no", "said", "kept"),
    [
        pytest.param(
            Refused(VERSION_DIFFERS, B, ("99.1.0",)),
            f"version_differs 99.1.0 there, {version('silotune')} here",
            "version_differs 99.1.0",
            id="version",
        ),
        pytest.param(
            Refused(PROTOCOL_DIFFERS, B, ("2",)),
            f"protocol_differs 2 there, {PROTOCOL} here",
            "protocol_differs 2",
            id="protocol",
        ),
        pytest.param(Refused(PROTOCOL_DIFFERS, B), "protocol_differs", "protocol_differs", id="an old one says none"),
        pytest.param(
            Refused(BASE_MODEL_DIFFERS, B, ("weights", "tokenizer")),
            "base_model_differs weights tokenizer",
            "base_model_differs weights tokenizer",
            id="base model",
        ),
    ],
)
def test_what_differs_is_told_with_both_sides(
    no: Refused, said: str, kept: str, here: Guarded, log_lines: Callable[[], list[str]]
) -> None:
    outcome = here.go(nodes(here, birch=[no] * 9))
    assert f"birch does not take part: {said}" in log_lines()
    assert dict(outcome.refused) == {B: kept}
    again = replace(here, root=here.root / "another")
    with pytest.raises(RunStopped, match=rf"2 institutions.*: birch: {said}; cedar: {said}\. Each"):
        again.go(nodes(again, birch=[no] * 9, cedar=[replace(no, name=C)] * 9))
