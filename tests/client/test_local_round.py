"""Differential privacy in a round of a real institution: what leaves, what is spent for it, and whose noise it has."""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import local_round
from client.assembly import assemble
from client.data_sets import RecordSet, RecordSource
from client.guard import Guard
from client.institution import Institution
from client.ledger import Ledger, Spent
from client.local_round import LocalRound
from client.policy_file import Budget
from client.private_training import clipped_sum
from client.state import StateStore
from client.training import Trained
from client.units import Unit
from common import fixed_point
from common.adapter import Adapter
from common.config import Config, PrivacyConfig
from common.errors import DataError, Refusal
from common.examples import examples_of
from common.fixed_point import Ring
from common.messages import (
    DATA_UNREADABLE,
    INTERNAL_ERROR,
    MODEL_UNUSABLE,
    STORAGE_FAILED,
    Introduction,
    Plan,
    Refused,
    TrainRequest,
)
from common.methods import METHODS
from common.models import LoraModel
from common.policy_reasons import BUDGET_EXHAUSTED, PRIVACY_REQUIRED
from common.privacy.accounting import epsilon
from common.privacy.noise import SeededNoise, SystemNoise
from common.secagg.identity import Identity, Roster
from common.secagg.messages import Keys
from common.secagg.reasons import SETTINGS_DIFFER
from tests.client.conftest import NAMES, make_config, make_plan, secured, write_dynamic
from tests.client.guarded import DATA_SET, Attempt, Guarded, Untouchable

MODES = ("record", "patient", "institution", "distributed")
TRAINED = ("record", "patient", "institution")
"""Modes in which an institution trains, so that a test can step in between training and what is sent."""

DELTA = 1e-5
SIX_SIGMA = 6.0  # a correct result fails with a probability below 2e-9

Make = Callable[..., Institution]


def private(config: Config, mode: str, **changes: Any) -> Config:
    """The configuration under differential privacy."""
    said = {"noise_multiplier": 1.0, "clip": 0.05, "sampling_rate": 0.5, "delta": DELTA, **changes}
    return replace(
        config,
        privacy=PrivacyConfig(mode, **said),
        federation=replace(config.federation, weighting="uniform"),
    )


@pytest.fixture
def deployed(tmp_path: Path, base_model: str) -> Callable[..., Guarded]:
    """Makes an institution as its daemon has it, and the terms of a run in a mode."""

    def make(mode: str, marker: str = "", records: int = 40, **policy: Any) -> Guarded:
        place = Guarded(tmp_path, base_model, records, marker, **policy)
        place.config = private(place.config, mode)
        return place

    return make


def part_of(member: Institution, plan: Plan) -> LocalRound:
    """What the institution does in that round."""
    return LocalRound(
        plan=plan,
        name=member.name,
        data=member.data,
        directory=member.run_directory(plan.run),
        model=member.model,
        guard=member.guard,
        ledger=member.ledger,
        row_tokens=member.row_tokens,
        spoil=member.spoil,
        log=member.log,
    )


def spends(member: Institution) -> list[Spent]:
    assert member.ledger is not None
    return [entry for entry in member.ledger.entries() if isinstance(entry, Spent)]


def not_finite(trained: Trained, plan: Plan) -> Trained:
    return replace(trained, loss=math.nan)


def diverged(trained: Trained, plan: Plan) -> Trained:
    factors = {key: np.full_like(value, np.nan) for key, value in trained.adapter.factors.items()}
    return replace(trained, adapter=replace(trained.adapter, factors=factors))


# --- What leaves ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("records", [40, 80])
@pytest.mark.parametrize("mode", MODES)
def test_of_the_counters_only_those_leave_that_depend_on_no_record(
    mode: str, records: int, deployed: Callable[..., Guarded], start: Adapter
) -> None:
    place = deployed(mode, records=records)
    attempt = Attempt(place, start, place.institution().answer)
    found = fixed_point.decode(attempt.sum(), attempt.plan.layout, members=1)
    assert {name: value for name, value in found.counters.items() if value} == {"weight": 1, "members": 1}
    assert found.update.any()


@pytest.mark.parametrize("mode", TRAINED)
def test_a_loss_that_is_not_finite_does_not_show(mode: str, deployed: Callable[..., Guarded], start: Adapter) -> None:
    place = deployed(mode)
    attempt = Attempt(place, start, place.institution(spoil=not_finite).answer)
    found = fixed_point.decode(attempt.sum(), attempt.plan.layout, members=1)
    assert {name: value for name, value in found.counters.items() if value} == {"weight": 1, "members": 1}
    assert found.update.any()


def test_a_member_whose_update_cannot_be_used_adds_its_noise_all_the_same(
    deployed: Callable[..., Guarded], start: Adapter
) -> None:
    place = deployed("institution")
    attempt = Attempt(place, start, place.institution(spoil=diverged).answer)
    found = fixed_point.decode(attempt.sum(), attempt.plan.layout, members=1)
    noise = attempt.plan.shared_noise
    assert noise is not None
    assert (found.weight, found.void) == (1, 0)
    variance = (float(noise.scale) * noise.step) ** 2
    assert np.mean(found.update**2) / variance == pytest.approx(1, abs=SIX_SIGMA * math.sqrt(2 / noise.parameters))


# --- What a run holds to ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "secure"),
    [*((mode, True) for mode in ("none", *MODES)), *((mode, False) for mode in ("none", "record", "patient"))],
)
def test_other_settings_under_the_name_of_a_run_are_refused_and_equal_ones_are_not(
    mode: str,
    secure: bool,
    simulated: Callable[..., tuple[Institution, Config]],
    start: Adapter,
    lora_model: LoraModel,
) -> None:
    member, config = simulated(mode)
    asked = simulated_plan(config, start, "one") if secure else make_plan(config, start, run="one")
    part_of(member, asked).compute(start, lora_model)
    paid = len(spends(member))
    records = Untouchable()
    for changed in ({"seed": 4}, {"rounds": 4}, {"privacy": replace(config.privacy, clip=0.06)}):
        other = replace(asked, round=2, settings=replace(asked.settings, **changed))
        with pytest.raises(Refusal, match="settings") as caught:
            part_of(replace(member, data=records), other).compute(start, lora_model)
        assert caught.value.reason == SETTINGS_DIFFER
    assert records.opened == []
    assert len(spends(member)) == paid
    part_of(member, replace(asked, round=2)).compute(start, lora_model)
    another = replace(asked, run="two", settings=replace(asked.settings, seed=4))
    part_of(member, another).compute(start, lora_model)


# --- What is spent ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_without_its_ledger_an_institution_answers_nothing(
    mode: str, deployed: Callable[..., Guarded], start: Adapter
) -> None:
    place = deployed(mode)
    place.home.ledger.rename(place.home.ledger.with_name("elsewhere"))
    records = Untouchable()
    member = place.institution(data=records)
    assert member.answer(place.request(start)) == Refused(STORAGE_FAILED, member.name)
    assert records.opened == []


@dataclass
class Unreadable:
    """Records that cannot be read. ledger: of whom they are. known: what was in it by then."""

    ledger: Ledger | None = None
    known: int | None = None

    def find(self, data_set: str, part: str) -> RecordSet:
        assert self.ledger is not None
        self.known = sum(isinstance(entry, Spent) for entry in self.ledger.entries())
        raise DataError("the last record is in pieces")


@pytest.mark.parametrize("mode", MODES)
def test_what_an_attempt_costs_is_written_down_before_a_record_is_read_and_spent_if_it_fails(
    mode: str, deployed: Callable[..., Guarded], start: Adapter
) -> None:
    place = deployed(mode)
    records = Unreadable()
    member = place.institution(data=records)
    records.ledger = member.ledger
    for number in (1, 2):
        assert member.answer(place.request(start, attempt=number)) == Refused(DATA_UNREADABLE, member.name)
        assert records.known == number
    assert [entry.attempt for entry in spends(member)] == [1, 2]
    assert {entry.event for entry in spends(member)} == {part_of(member, place.plan(start)).event}


@pytest.mark.parametrize("mode", TRAINED)
def test_training_that_fails_is_spent_and_another_attempt_spends_again(
    mode: str, deployed: Callable[..., Guarded], start: Adapter
) -> None:
    place = deployed(mode)

    def breaks(trained: Trained, plan: Plan) -> Trained:
        raise RuntimeError("one record too many")

    member = place.institution(spoil=breaks)
    assert member.answer(place.request(start)) == Refused(INTERNAL_ERROR, member.name)
    assert member.secure is not None
    assert member.secure.run == ""  # no attempt is under way, so that nothing can be masked and sent
    again = place.institution()
    assert isinstance(again.answer(place.request(start, attempt=2)), Keys)
    assert [entry.attempt for entry in spends(again)] == [1, 2]


@pytest.mark.parametrize("mode", MODES)
def test_a_round_beyond_the_budget_is_refused_before_any_record_is_read(
    mode: str, deployed: Callable[..., Guarded], start: Adapter
) -> None:
    place = deployed(mode)
    event = part_of(place.institution(), place.plan(start)).event
    assert event is not None
    budget = Budget((DATA_SET,), (mode,), 1.05 * epsilon([event], DELTA).rdp, DELTA)
    place.policy = replace(place.policy, populations={"clinic": budget})
    first = place.institution()
    assert isinstance(first.answer(place.request(start)), Keys)
    records = Untouchable()
    member = place.institution(data=records)
    for plan in (place.plan(start, 2, attempt=2), place.plan(start, run="another-run")):
        assert member.answer(TrainRequest(plan, start)) == Refused(BUDGET_EXHAUSTED, member.name)
    assert records.opened == []
    assert len(spends(member)) == 1


def test_a_round_beyond_another_populations_budget_by_institution_is_refused(
    deployed: Callable[..., Guarded], start: Adapter
) -> None:
    """Everything that an institution sends is one unit, whichever data set the coordinator names."""
    place = deployed("institution")
    event = part_of(place.institution(), place.plan(start)).event
    assert event is not None
    budget = Budget(("letters",), ("institution",), 1.05 * epsilon([event], DELTA).rdp, DELTA)
    place.policy = replace(place.policy, populations={"clinic": budget})
    assert isinstance(place.institution().answer(place.request(start)), Keys)
    member = place.institution(data=Untouchable())
    assert member.answer(TrainRequest(place.plan(start, 2, attempt=2), start)) == Refused(BUDGET_EXHAUSTED, member.name)


@pytest.mark.parametrize("mode", ["record", "patient", "distributed"])
def test_a_base_in_which_units_change_each_other_is_refused_before_anything_is_spent(
    mode: str, tmp_path: Path, base_model: str, start: Adapter
) -> None:
    place = Guarded(tmp_path, write_dynamic(Path(base_model), tmp_path / "dynamic"))
    place.config = private(place.config, mode)
    member = place.institution(data=Untouchable())
    assert member.answer(place.request(start)) == Refused(MODEL_UNUSABLE, member.name)
    assert spends(member) == []


def test_a_run_without_noise_on_a_population_with_a_budget_is_refused_at_hello(
    deployed: Callable[..., Guarded],
) -> None:
    budget = Budget((DATA_SET,), ("record",), 8.0, DELTA)
    place = deployed("record", populations={"clinic": budget})
    assert isinstance(place.institution().answer(place.hello()), Introduction)
    place.config = replace(place.config, privacy=PrivacyConfig())
    member = place.institution(data=Untouchable())
    assert member.answer(place.hello()) == Refused(PRIVACY_REQUIRED, member.name)


@pytest.mark.parametrize("mode", MODES)
def test_a_repeat_spends_again_exactly_where_it_draws_fresh_noise(
    mode: str, deployed: Callable[..., Guarded], start: Adapter
) -> None:
    place = deployed(mode)
    member = place.institution()
    plans = [place.plan(start, attempt=number) for number in (1, 2)]
    one, two = (Attempt(place, start, member.answer, plan).sum() for plan in plans)
    shared = mode in ("institution", "distributed")
    assert np.array_equal(one, two) == (not shared)
    assert [entry.attempt for entry in spends(member)] == ([1, 2] if shared else [1])
    assert {entry.event for entry in spends(member)} == {part_of(member, plans[0]).event}


@pytest.mark.parametrize("mode", ["institution", "distributed"])
def test_a_repeat_has_a_lot_of_its_own_where_lots_are_what_is_counted(
    mode: str, deployed: Callable[..., Guarded], start: Adapter
) -> None:
    place = deployed(mode)
    place.config = private(place.config, mode, noise_multiplier=0.05)
    member = place.institution()
    plans = [place.plan(start, attempt=number) for number in (1, 2)]
    one, two = (
        fixed_point.decode(Attempt(place, start, member.answer, plan).sum(), plan.layout, members=1).update
        for plan in plans
    )
    noise = plans[0].shared_noise
    assert noise is not None
    apart = np.mean((one - two) ** 2) / (2 * (float(noise.scale) * noise.step) ** 2)  # 1: by nothing but the noise
    if mode == "distributed":
        assert apart > 2
    else:
        assert apart == pytest.approx(1, abs=SIX_SIGMA * math.sqrt(2 / noise.parameters))
    assert [(entry.attempt, entry.event) for entry in spends(member)] == [
        (n, part_of(member, plans[0]).event) for n in (1, 2)
    ]


def test_a_simulated_repeat_has_a_lot_of_its_own_too(
    simulated: Callable[..., tuple[Institution, Config]], start: Adapter, lora_model: LoraModel
) -> None:
    member, config = simulated("distributed")
    plan = simulated_plan(config, start, "repeats")
    assert plan.secure is not None
    repeat = replace(plan, secure=replace(plan.secure, attempt=2))
    one, two = (part_of(member, asked)._summed_gradients(start, lora_model) for asked in (plan, repeat))
    assert not np.array_equal(one, two)


@pytest.mark.parametrize("mode", ["institution", "distributed"])
def test_a_simulated_repeat_has_noise_of_its_own_too(
    mode: str, simulated: Callable[..., tuple[Institution, Config]], start: Adapter
) -> None:
    """The difference of two sums over one update would be free of noise."""
    member, config = simulated(mode)
    plan = simulated_plan(config, start, "repeats")
    assert plan.secure is not None
    repeat = replace(plan, secure=replace(plan.secure, attempt=2))
    update = np.zeros(plan.parameters)
    one, again, two = (part_of(member, asked)._noised(update) for asked in (plan, plan, repeat))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, two)


@pytest.mark.parametrize("mode", MODES)
def test_how_many_records_there_are_is_not_told_even_where_settings_ask_for_it(
    mode: str, simulated: Callable[..., tuple[Institution, Config]], start: Adapter
) -> None:
    member, config = simulated(mode)
    plan = simulated_plan(config, start, "weights")
    asked = replace(plan, settings=replace(plan.settings, weighting="records"))
    without = replace(asked, settings=replace(asked.settings, privacy=PrivacyConfig()))
    assert part_of(member, without)._weight(1000) > 1
    assert part_of(member, asked)._weight(1000) == 1


# --- Whose noise ------------------------------------------------------------------------------------------------------


@pytest.fixture
def simulated(institution: Make, base_model: str, tmp_path: Path) -> Callable[..., tuple[Institution, Config]]:
    """Makes an institution of a simulation with a ledger, and the configuration of its run."""

    def make(mode: str, name: str = NAMES[0], records: int = 12, **privacy: Any) -> tuple[Institution, Config]:
        ledger = Ledger(tmp_path / name / "ledger", Identity.generate(name))
        ledger.begin()
        return institution(name, records, ledger=ledger), private(make_config(base_model), mode, **privacy)

    return make


def simulated_plan(config: Config, start: Adapter, run: str) -> Plan:
    roster = Roster.of(*(Identity.generate(name) for name in NAMES))
    return secured(make_plan(config, start, run=run), config, roster)


@pytest.mark.parametrize("mode", MODES)
def test_two_runs_from_one_adapter_differ_in_a_deployment_and_agree_in_a_simulation(
    mode: str,
    deployed: Callable[..., Guarded],
    simulated: Callable[..., tuple[Institution, Config]],
    start: Adapter,
    lora_model: LoraModel,
) -> None:
    place = deployed(mode)
    member, config = simulated(mode)
    runs = ("one", "two")
    real = [part_of(place.institution(), place.plan(start, run=run)) for run in runs]
    played = [part_of(member, simulated_plan(config, start, run)) for run in runs]
    for parts, equal in ((real, False), (played, True)):
        one, two = (part.compute(start, lora_model)[1] for part in parts)
        assert np.array_equal(one, two) == equal
    assert isinstance(real[0]._noise("training"), SystemNoise)
    assert isinstance(played[0]._noise("training"), SeededNoise)


@pytest.mark.parametrize("mode", ["record", "patient"])
@pytest.mark.parametrize("before", ["none", "institution"])
def test_noised_steps_take_nothing_from_steps_without_noise(
    before: str, mode: str, simulated: Callable[..., tuple[Institution, Config]], start: Adapter, lora_model: LoraModel
) -> None:
    """Whoever changes the mode within a run gets the moments of steps without noise in no update."""

    member, config = simulated(mode)

    def computed(plan: Plan) -> Ring:
        part = part_of(member, plan)
        (part.directory / "settings.json").unlink(missing_ok=True)  # else another mode would be refused
        return part.compute(start, lora_model)[1]

    def second_round() -> Ring:
        return computed(replace(simulated_plan(config, start, "one"), round=2))

    alone = second_round()
    plain = replace(config, privacy=replace(config.privacy, mode=before))
    computed(simulated_plan(plain, start, "one"))
    assert np.array_equal(second_round(), alone)
    assert alone.any()


@pytest.mark.parametrize("mode", MODES)
def test_in_a_deployment_no_seeded_source_is_ever_made(
    mode: str, deployed: Callable[..., Guarded], start: Adapter, lora_model: LoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: SeededNoise, *parts: str | int) -> None:
        raise AssertionError("a seeded source in a deployment")

    monkeypatch.setattr(SeededNoise, "__init__", refuse)
    place = deployed(mode)
    part = part_of(place.institution(), place.plan(start))
    assert part.guard is not None
    assert part.compute(start, lora_model)[1].any()


def test_seeded_noise_is_named_in_one_place_and_an_institution_is_made_in_one() -> None:
    """Whatever way it would be called by, it would have to be named."""
    packages = [Path(local_round.__file__).parents[1] / name for name in ("client", "common", "server")]
    named: dict[str, dict[str, int]] = {r"\bSeededNoise\b": {}, r"\bInstitution\(": {}}
    for file in (file for package in packages for file in package.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        for word, places in named.items():
            if found := re.findall(word, text):
                places[file.name] = len(found)
    # An import and a call; the class, and its name in two docstrings. `assemble` gives its institution a guard.
    assert list(named.values()) == [{"local_round.py": 2, "noise.py": 3}, {"assembly.py": 1}]
    assert inspect.signature(assemble).parameters.keys() == {"home", "keys", "roster", "policy", "on_spend"}


def test_nothing_that_an_institution_is_made_from_can_bring_a_source_of_noise() -> None:
    signatures = [inspect.signature(made) for made in (LocalRound, Institution, Guard)]
    told = [str(parameter.annotation) for found in signatures for parameter in found.parameters.values()]
    assert not [annotation for annotation in told if "Noise" in annotation or annotation == "Any"]
    assert not [field.name for field in fields(PrivacyConfig) if "seed" in field.name or "source" in field.name]
    packages = [Path(local_round.__file__).parents[1] / name for name in ("client", "common", "server")]
    files = [file for package in packages for file in package.rglob("*.py")]
    assert {"local_round.py", "noise.py", "distributed.py"} <= {file.name for file in files}
    found = {(file.name, name) for file in files for name in sources_made_in(file.read_text(encoding="utf-8"))}
    local_round_only = {("local_round.py", "SystemNoise"), ("local_round.py", "SeededNoise")}
    assert found == local_round_only | {("comparison.py", "SystemNoise")}


def sources_made_in(code: str) -> set[str]:
    """The kinds of noise that a module makes, or names without making them, as `common.privacy.noise` calls them.

    Under whatever name they were imported or assigned, and through whatever module; an import or a type alone is none.
    """
    kinds, tree = {"SystemNoise", "SeededNoise"}, ast.parse(code)
    known = {kind: kind for kind in kinds}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name: alias.name for alias in node.names if alias.name in kinds}
    types = {id(part) for node in ast.walk(tree) for said in types_of(node) for part in ast.walk(said)}
    used = [node for node in ast.walk(tree) if id(node) not in types]
    return (
        {known[node.id] for node in used if isinstance(node, ast.Name) and node.id in known}
        | {node.attr for node in used if isinstance(node, ast.Attribute) and node.attr in kinds}
        | {node.value for node in used if isinstance(node, ast.Constant) and node.value in kinds}
    )


def types_of(node: ast.AST) -> list[ast.AST]:
    """What of it is a type."""
    found = [getattr(node, name, None) for name in ("annotation", "returns")]
    return [said for said in found if isinstance(said, ast.AST)]


@pytest.mark.parametrize(
    "code",
    [
        "from common.privacy.noise import SeededNoise\nnoise = SeededNoise(1)",
        "from common.privacy.noise import SeededNoise as SystemNoise\nnoise = SystemNoise(1)",
        "from common.privacy import noise\nfound = noise.SeededNoise(1)",
        "import common.privacy.noise as other\nfound = other.SeededNoise(1)",
        "import common.privacy.noise\nfound = common.privacy.noise.SeededNoise(1)",
        "from common.privacy.noise import SeededNoise\nkind = SeededNoise\nfound = kind(1)",
        "from common.privacy import noise\nfound = partial(noise.SeededNoise, 1)",
        "from common.privacy import noise\nfound = getattr(noise, 'SeededNoise')(1)",
    ],
)
def test_a_source_is_seen_by_whatever_name_it_is_made(code: str) -> None:
    assert sources_made_in(code) == {"SeededNoise"}
    assert sources_made_in("from common.privacy.noise import SeededNoise\ndef f(noise: SeededNoise): ...") == set()


# --- Whose influence is bounded ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OfThreePersons:
    """Somebody's records, as if they were those of three persons."""

    source: RecordSource

    def find(self, data_set: str, part: str) -> RecordSet:
        found = self.source.find(data_set, part)
        return replace(
            found,
            records=tuple(replace(record, person=f"{place % 3}") for place, record in enumerate(found.records)),
        )


@pytest.mark.parametrize("cap", [1, 2, 8])
@pytest.mark.parametrize("mode", ["record", "patient", "distributed"])
def test_the_unit_and_its_cap_are_those_of_the_settings(
    mode: str, cap: int, simulated: Callable[..., tuple[Institution, Config]], start: Adapter
) -> None:
    member, config = simulated(mode, records_per_person=cap)
    member = replace(member, data=OfThreePersons(member.data))
    part = part_of(member, simulated_plan(config, start, "units"))
    persons = Counter(record.person for record in member.data.find(config.data.name, "train").records)
    assert max(persons.values()) > 2  # the cap is of account
    if mode == "patient":
        assert [len(unit.examples) for unit in part._units()] == [min(count, cap) for count in persons.values()]
    else:
        assert [len(unit.examples) for unit in part._units()] == [1] * persons.total()


def test_records_that_are_left_out_are_told_once_and_to_the_institutions_own_log(
    simulated: Callable[..., tuple[Institution, Config]], start: Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    member, config = simulated("patient", records_per_person=2)
    member = replace(member, data=OfThreePersons(member.data))
    count = len(member.data.find(config.data.name, "train").records)
    part = part_of(member, simulated_plan(config, start, "told"))
    for _ in range(2):
        part._units()
    (line,) = (record for record in caplog.records if "left out" in record.getMessage())
    assert line.name == member.log.name
    assert f"{count - 6} of {count} training records are left out, since 3 persons have more" in line.getMessage()


@pytest.mark.parametrize("mode", ["institution", "distributed"])
def test_a_sum_has_room_for_the_noise_of_all(mode: str, deployed: Callable[..., Guarded], start: Adapter) -> None:
    plan = deployed(mode).plan(start)
    assert plan.shared_noise is not None
    assert plan.layout.headroom == plan.shared_noise.headroom > 0


# --- How much noise ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["institution", "distributed"])
def test_the_sum_is_that_of_clipped_updates_with_the_planned_noise(
    mode: str,
    simulated: Callable[..., tuple[Institution, Config]],
    start: Adapter,
    lora_model: LoraModel,
) -> None:
    expected, vectors = np.zeros(0), []
    for name in NAMES:
        member, config = simulated(mode, name, noise_multiplier=0.1)
        plan = simulated_plan(config, start, "sums")
        part = part_of(member, plan)
        update, vector = part.compute(start, lora_model)
        if mode == "distributed":  # which keeps none
            update = part._summed_gradients(start, lora_model)
        clipped = update.astype(np.float64)
        if mode == "institution":
            norm = float(np.linalg.norm(clipped))
            assert norm > config.privacy.clip
            clipped *= config.privacy.clip / norm
        expected = expected + clipped if len(expected) else clipped
        vectors.append(vector)
    noise = plan.shared_noise
    assert noise is not None
    running = fixed_point.RunningSum(plan.layout)
    for vector in vectors:
        running.add(vector)
    found = fixed_point.decode(running.total(), plan.layout, members=3)
    rest = found.update - expected
    deviation = math.sqrt(3) * float(noise.scale) * noise.step
    assert np.mean(rest**2) / deviation**2 == pytest.approx(1, abs=SIX_SIGMA * math.sqrt(2 / noise.parameters))
    length = float(np.linalg.norm(expected))
    assert abs(rest @ expected) / length < SIX_SIGMA * deviation < length  # nothing of the sum is missing


def test_mode_distributed_takes_one_lot_a_round(
    simulated: Callable[..., tuple[Institution, Config]], start: Adapter, lora_model: LoraModel
) -> None:
    member, config = simulated("distributed", sampling_rate=1.0)
    config = replace(config, train=replace(config.train, passes_per_round=5.0))
    plan = simulated_plan(config, start, "lots")
    part = part_of(member, plan)
    records = member.data.find(config.data.name, "train").records
    units = [Unit(found) for found in examples_of(records, lora_model.tokenizer, config.train).by_record]
    keys = METHODS[config.federation.method].trained(start)
    whole = clipped_sum(lora_model, units, start, keys, config.train, config.privacy.clip, 1.0, SeededNoise(0))
    assert np.allclose(part._summed_gradients(start, lora_model), -whole, rtol=1e-4, atol=1e-7)
    event = part.event
    assert event is not None
    assert (event.steps, event.q) == (1, 1.0)


@pytest.mark.parametrize(("sigma", "clip", "rate"), [(50.0, 0.05, 0.5), (200.0, 0.05, 0.5), (50.0, 0.4, 1.0)])
def test_the_noise_of_mode_record_follows_the_settings(
    sigma: float,
    clip: float,
    rate: float,
    simulated: Callable[..., tuple[Institution, Config]],
    start: Adapter,
    lora_model: LoraModel,
) -> None:
    member, config = simulated("record", noise_multiplier=sigma, clip=clip, sampling_rate=rate)
    config = replace(config, train=replace(config.train, passes_per_round=rate, optimizer_state="keep"))
    part = part_of(member, simulated_plan(config, start, "noisy"))
    part.compute(start, lora_model)
    state = StateStore(part.directory / "noised-state").before(2)
    assert state.steps == 1
    gradient = np.concatenate([value.ravel() for value in state.first.values()]).astype(np.float64) / 0.1
    deviation = sigma * clip / (rate * 12)  # of the lot's sum over the expected number of its twelve units
    assert np.std(gradient) / deviation == pytest.approx(1, abs=SIX_SIGMA / math.sqrt(2 * len(gradient)) + 1e-3)
