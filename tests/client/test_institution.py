"""What an institution answers, what it refuses and in which words, and what it keeps to itself."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client import institution as institution_module
from client import local_round
from client.data_sets import RecordFolder
from client.institution import Institution
from client.policy import Policy
from client.secure import SecureMember
from client.state import LocalState
from client.training import Assignment, Trained, train
from common import fixed_point
from common.adapter import Adapter, flatten
from common.base_model import fingerprint
from common.config import Config, EvaluationConfig, LoraConfig, ModelConfig, QuantiseConfig
from common.errors import ConfigError, DataError, ModelError, Refusal, StorageError
from common.evaluation import evaluate
from common.fixed_point import NATS, Ring
from common.messages import (
    ADAPTER_DIGEST_DIFFERS,
    ADAPTER_DOES_NOT_FIT,
    BASE_MODEL_DIFFERS,
    DATA_UNREADABLE,
    INTERNAL_ERROR,
    MALFORMED,
    METHOD_UNKNOWN,
    NOT_INVITED,
    PROTOCOL,
    PROTOCOL_DIFFERS,
    REASONS,
    STORAGE_FAILED,
    VERSION_DIFFERS,
    Contribution,
    Introduction,
    Plan,
    Refused,
    Reply,
    Request,
    TrainRequest,
)
from common.models import LoraModel
from common.records import Record, write_jsonl
from common.secagg.aggregator import Aggregator
from common.secagg.identity import Identity, Roster
from common.secagg.messages import Consents, Inbox, KeyList, Keys, Survivors, ToMember
from common.secagg.reasons import (
    ATTEMPT_OLD,
    ATTEMPT_UNKNOWN,
    ROSTER_DIFFERS,
    SECURE_AGGREGATION_REQUIRED,
    VECTOR_DIFFERS,
)
from common.wire import from_wire, to_wire
from tests.client.conftest import (
    NAMES,
    make_config,
    make_hello,
    make_plan,
    make_records,
    secured,
    tokenised,
    write_base_model,
)

Make = Callable[..., Institution]
FolderOf = Callable[[Institution], Path]
SLOW_FIXTURE = [HealthCheck.function_scoped_fixture]
NOBODY = "0" * 64


@pytest.fixture
def config(base_model: str) -> Config:
    return make_config(base_model)


def bytes_of(reply: Reply) -> bytes:
    """Every byte that crosses the border."""
    wire = to_wire(reply)
    arrays = b"".join(name.encode() + array.tobytes() for name, array in wire.arrays.items())
    return wire.kind.encode() + wire.text.encode() + arrays


def vector_of(answer: Reply, plan: Plan) -> Ring:
    """The vector in a contribution, whose wire form has k bits an element."""
    assert isinstance(answer, Contribution)
    return fixed_point.unpack(answer.vector, plan.layout.length, plan.layout.ring_bits)


def summed(answer: Reply, plan: Plan) -> fixed_point.Decoded:
    """What a coordinator would read if this were the only contribution."""
    return fixed_point.decode(vector_of(answer, plan), plan.layout, members=1)


def files_below(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


# ---- hello ---------------------------------------------------------------------------------------------------------


def test_the_same_base_model_is_greeted_with_a_name(institution: Make, base_model: str, config: Config) -> None:
    answer = institution().answer(make_hello(config))
    assert isinstance(answer, Introduction)
    assert (answer.name, answer.protocol, answer.fingerprint) == ("alder", PROTOCOL, fingerprint(base_model))


def test_another_protocol_is_refused_before_an_institution_hears_of_it(config: Config) -> None:
    with pytest.raises(Refusal) as caught:
        from_wire(to_wire(make_hello(config, protocol=PROTOCOL + 1)))
    assert (caught.value.reason, caught.value.parts) == (PROTOCOL_DIFFERS, (str(PROTOCOL),))
    assert f"{PROTOCOL + 1}, this is {PROTOCOL}" in caught.value.detail


OWN = version("silotune")


@pytest.mark.parametrize("other", ["0.0.9", "9.9.9", f"{OWN}.1.x"[2:], f"1{OWN}", "none"])
def test_another_release_is_refused_naming_both(
    other: str, institution: Make, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    answer = institution().answer(make_hello(config, version=other))
    assert answer == Refused(VERSION_DIFFERS, "alder", (OWN,))
    assert from_wire(to_wire(answer)) == answer
    assert f"the coordinator runs Silotune {other}, this is {OWN}" in caplog.text


def test_the_last_place_of_a_release_may_differ(institution: Make, config: Config) -> None:
    major, minor, _ = OWN.split(".")
    answer = institution().answer(make_hello(config, version=f"{major}.{minor}.999"))
    assert isinstance(answer, Introduction)
    assert answer.version == OWN


@pytest.mark.parametrize("run", ["../../etc", "..", "", "a/b", "a\n", "x" * 201])
def test_a_hello_of_a_run_whose_name_is_no_plain_word_is_refused(run: str, institution: Make, config: Config) -> None:
    assert institution().answer(make_hello(config, run)) == Refused(MALFORMED, "alder")


@pytest.mark.parametrize("parts", [("config",), ("weights",), ("tokenizer",), ("config", "tokenizer")])
def test_another_base_model_is_refused_by_the_name_of_what_differs(
    parts: tuple[str, ...], institution: Make, base_model: str, config: Config, start: Adapter
) -> None:
    other = replace(fingerprint(base_model), **dict.fromkeys(parts, NOBODY))
    expected = Refused(BASE_MODEL_DIFFERS, "alder", parts)
    assert institution().answer(make_hello(config, fingerprint=other)) == expected
    assert institution().answer(TrainRequest(make_plan(config, start, fingerprint=other), start)) == expected


def test_weights_of_another_seed_are_another_base_model(institution: Make, config: Config, tmp_path: Path) -> None:
    other = str(write_base_model(tmp_path / "other-base", seed=99))
    answer = institution(model=ModelConfig(other)).answer(make_hello(config))
    assert answer == Refused(BASE_MODEL_DIFFERS, "alder", ("weights",))


# ---- refusals in a round -------------------------------------------------------------------------------------------


def longer(adapter: Adapter) -> Adapter:
    return Adapter({key: np.concatenate([factor, factor]) for key, factor in adapter.factors.items()})


def renamed(adapter: Adapter) -> Adapter:
    return Adapter({f"other.{key}": factor for key, factor in adapter.factors.items()})


def moved(adapter: Adapter) -> Adapter:
    return Adapter({key: factor + np.float32(1e-6) for key, factor in adapter.factors.items()})


def test_a_cohort_without_its_name_is_refused(institution: Make, config: Config, start: Adapter) -> None:
    plan = make_plan(config, start, cohort=("birch", "cedar"))
    assert institution().answer(TrainRequest(plan, start)) == Refused(NOT_INVITED, "alder")


def test_an_adapter_that_is_not_the_one_of_the_plan_is_refused(
    institution: Make, config: Config, start: Adapter
) -> None:
    answer = institution().answer(TrainRequest(make_plan(config, start), moved(start)))
    assert answer == Refused(ADAPTER_DIGEST_DIFFERS, "alder")


@pytest.mark.parametrize("change", [longer, renamed, lambda adapter: Adapter({})])
def test_an_adapter_of_another_form_is_refused(
    change: Callable[[Adapter], Adapter], institution: Make, config: Config, start: Adapter
) -> None:
    other = change(start)
    answer = institution().answer(TrainRequest(make_plan(config, other), other))
    assert answer == Refused(ADAPTER_DOES_NOT_FIT, "alder")


def test_an_unknown_method_is_refused(institution: Make, config: Config, start: Adapter) -> None:
    plan = make_plan(config, start)
    plan = replace(plan, settings=replace(plan.settings, method="flora"))
    assert institution().answer(TrainRequest(plan, start)) == Refused(METHOD_UNKNOWN, "alder")


@pytest.mark.parametrize(
    "run",
    ["../../etc", "..", ".", "", "/etc/passwd", "a/b", "a\\b", "-rf", ".hidden", "a\n", "a\0b", "ünïcode", "x" * 201],
)
def test_a_run_name_that_is_no_plain_word_is_refused_before_anything_is_written(
    run: str, institution: Make, config: Config, start: Adapter, tmp_path: Path
) -> None:
    member = institution()
    before = files_below(tmp_path)
    assert member.answer(TrainRequest(make_plan(config, start, run=run), start)) == Refused(MALFORMED, "alder")
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("number", [0, -1, 4, 10**30, "1", 1.0, True, None])
def test_a_round_that_the_run_does_not_have_is_refused_and_leaves_the_others_possible(
    number: Any, institution: Make, config: Config, start: Adapter
) -> None:
    member = institution()
    assert member.answer(TrainRequest(make_plan(config, start, number), start)) == Refused(MALFORMED, "alder")
    assert isinstance(member.answer(TrainRequest(make_plan(config, start), start)), Contribution)


def test_a_plan_whose_sum_would_not_fit_the_ring_is_refused(institution: Make, config: Config, start: Adapter) -> None:
    plan = make_plan(replace(config, quantise=QuantiseConfig(bits=24, weight_bits=8)), start)
    assert institution().answer(TrainRequest(plan, start)) == Refused(MALFORMED, "alder")


def test_a_plan_with_another_length_of_the_update_is_refused(institution: Make, config: Config, start: Adapter) -> None:
    member = institution()
    plan = make_plan(config, start)
    answer = member.answer(TrainRequest(replace(plan, parameters=plan.parameters + 1), start))
    assert answer == Refused(MALFORMED, "alder")
    assert files_below(member.home) == {}


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda file: file.unlink(), id="missing"),
        pytest.param(lambda file: file.write_text(""), id="empty"),
        pytest.param(lambda file: file.write_text("\n\n"), id="blank lines"),
        pytest.param(lambda file: file.write_text('{"completion": "x", '), id="not JSON"),
        pytest.param(lambda file: file.write_text('{"prompt": "x", "person": "p"}'), id="without text"),
        pytest.param(lambda file: file.write_bytes(b"\xff\xfe\x00"), id="not UTF-8"),
        pytest.param(lambda file: (file.unlink(), file.mkdir()), id="a directory"),
    ],
)
def test_records_that_cannot_be_read_are_told_as_a_reason_code(
    split: str, damage: Callable[[Path], Any], institution: Make, folder_of: FolderOf, config: Config, start: Adapter
) -> None:
    member = institution()
    damage(folder_of(member) / f"{split}.jsonl")
    assert member.answer(TrainRequest(make_plan(config, start), start)) == Refused(DATA_UNREADABLE, "alder")
    assert set(files_below(member.home)) == {"tiny-run/settings.json"}  # which came from outside


def test_a_base_model_that_is_gone_is_a_reason_code(
    institution: Make, config: Config, start: Adapter, tmp_path: Path
) -> None:
    member = institution(model=ModelConfig(str(tmp_path / "gone")))
    assert isinstance(member.answer(make_hello(config)), Refused)
    answer = member.answer(TrainRequest(make_plan(config, start), start))
    assert isinstance(answer, Refused)
    assert answer.reason in REASONS


SETTINGS = [
    ("train", "batch_size", 0),
    ("train", "batch_size", "many"),
    ("train", "passes_per_round", math.inf),
    ("train", "passes_per_round", math.nan),
    ("train", "learning_rate", "fast"),
    ("train", "max_grad_norm", None),
    ("lora", "rank", 0),
    ("lora", "rank", "4"),
    ("lora", "target_modules", ["no_such_layer"]),
    ("quantise", "clip", 0.0),
    ("quantise", "bits", -3),
    ("quantise", "weight_bits", "x"),
    ("", "weight_unit", 0),
    ("", "rounds", 0),
    ("", "rounds", "3"),
    ("", "method", ["fedavg"]),
]


@pytest.mark.parametrize(("section", "field", "value"), SETTINGS)
def test_settings_that_cannot_be_meant_are_refused_and_do_no_lasting_harm(
    section: str, field: str, value: Any, institution: Make, config: Config, start: Adapter
) -> None:
    member = institution()
    whole = member.answer(TrainRequest(make_plan(config, start, run="before"), start))
    plan = make_plan(config, start)
    part = replace(getattr(plan.settings, section) if section else plan.settings, **{field: value})
    changed = replace(plan, settings=replace(plan.settings, **{section: part}) if section else part)
    answer = member.answer(TrainRequest(changed, start))
    assert isinstance(answer, Refused)
    assert answer.reason in REASONS
    after = member.answer(TrainRequest(make_plan(config, start, run="after"), start))
    assert isinstance(whole, Contribution)
    assert isinstance(after, Contribution)
    assert np.array_equal(whole.vector, after.vector)


odd = st.one_of(st.none(), st.text(max_size=8), st.integers(), st.floats(), st.lists(st.integers(), max_size=2))


@given(field=st.sampled_from(["run", "round", "cohort", "parameters", "adapter_digest", "fingerprint"]), value=odd)
@settings(max_examples=60, deadline=None, suppress_health_check=SLOW_FIXTURE)
def test_no_plan_makes_an_institution_raise_or_write_outside_its_home(
    field: str, value: object, institution: Make, config: Config, start: Adapter, tmp_path: Path
) -> None:
    member = institution()
    outside = {name: data for name, data in files_below(tmp_path).items() if not name.startswith("alder/home")}
    answer = member.answer(TrainRequest(replace(make_plan(config, start), **{field: value}), start))
    assert isinstance(answer, Contribution) or (isinstance(answer, Refused) and answer.reason in REASONS)
    assert {n: d for n, d in files_below(tmp_path).items() if not n.startswith("alder/home")} == outside


# ---- what leaves ---------------------------------------------------------------------------------------------------


def expected_round(
    member: Institution,
    model: LoraModel,
    config: Config,
    start: Adapter,
    number: int = 1,
    state: LocalState | None = None,
) -> tuple[Trained, int]:
    """Training as the institution should do it, and the supervised tokens of its validation records."""
    examples = tokenised(make_records(6, member.name), model)
    keys = tuple(start.factors)
    task = Assignment(number, config.federation.rounds, keys, config.seed, member.name)
    return train(model, examples, start, state or LocalState(), config.train, task), len(examples)


def test_the_vector_holds_update_weight_and_sums_and_nothing_else(
    institution: Make, config: Config, start: Adapter, lora_model: LoraModel
) -> None:
    member = institution()
    config = replace(config, quantise=QuantiseConfig(bits=20, weight_bits=4))  # fine, to see a wrong element
    plan = make_plan(config, start)
    answer = member.answer(TrainRequest(plan, start))
    assert isinstance(answer, Contribution)
    assert answer.plan_digest == plan.digest()
    found = summed(answer, plan)
    trained, records = expected_round(member, lora_model, config, start)
    validation = tokenised(make_records(3, "alder-validation"), lora_model)
    lora_model.write(start)
    scores = evaluate(lora_model, validation)
    assert dict(found.counters) == {
        "weight": records,
        "void": 0,
        "members": 1,
        "train_loss": round(trained.loss * NATS),
        "train_tokens": trained.tokens,
        "validation_loss": round(scores.loss * NATS),
        "validation_tokens": scores.tokens,
    }
    update = flatten(trained.adapter.factors, start.factors) - flatten(start.factors, start.factors)
    # Stochastic rounding moves an element by at most one level.
    np.testing.assert_allclose(found.update / records, update, rtol=0, atol=plan.layout.error * (1 + 1e-9))
    assert np.abs(update).max() > 1000 * plan.layout.error


def test_weights_are_uniform_or_follow_the_records(institution: Make, config: Config, start: Adapter) -> None:
    member = institution(records=12)

    def weight(weighting: str, unit: int = 1) -> int:
        federation = replace(config.federation, weighting=weighting, weight_unit=unit)
        plan = make_plan(replace(config, federation=federation), start, run=f"{weighting}-{unit}")
        answer = member.answer(TrainRequest(plan, start))
        assert isinstance(answer, Contribution)
        return summed(answer, plan).weight

    assert weight("uniform") == 1
    assert weight("records", 1) == 12
    assert weight("records", 5) == 2
    assert weight("records", 100) == 1


def test_a_weight_has_an_upper_limit_and_whoever_reaches_it_is_told_at_home(
    institution: Make, config: Config, start: Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    member = institution(records=40)

    def weight(unit: int) -> int:
        caplog.clear()
        changed = replace(config, federation=replace(config.federation, weight_unit=unit))
        plan = make_plan(changed, start, run=f"by-{unit}")
        return summed(member.answer(TrainRequest(plan, start)), plan).weight

    assert weight(2) == 15  # 2^weight_bits - 1
    assert "40 records weigh as 30 only; a larger federation.weight_unit would count them all" in caplog.text
    assert weight(3) == 13
    assert "weigh as" not in caplog.text


def test_a_contribution_takes_no_more_bits_than_the_sum_needs(
    institution: Make, config: Config, start: Adapter
) -> None:
    plan = make_plan(config, start)
    assert plan.layout.ring_bits == 16 + 4 + 2
    answer = institution().answer(TrainRequest(plan, start))
    assert isinstance(answer, Contribution)
    assert answer.vector.nbytes <= plan.layout.length * 22 / 8 + 4 * 22
    assert int(vector_of(answer, plan).max()) < 1 << 22


def test_without_evaluation_at_institutions_no_validation_record_is_read(
    institution: Make, folder_of: FolderOf, config: Config, start: Adapter
) -> None:
    member = institution()
    (folder_of(member) / "validation.jsonl").unlink()
    plan = make_plan(replace(config, evaluation=EvaluationConfig(exact=[], institutions=False)), start)
    answer = member.answer(TrainRequest(plan, start))
    assert isinstance(answer, Contribution)
    counters = summed(answer, plan).counters
    assert (counters["validation_loss"], counters["validation_tokens"]) == (0, 0)
    assert counters["train_tokens"] > 0


def test_a_repeated_round_gives_the_same_bytes(institution: Make, base_model: str, start: Adapter) -> None:
    config = make_config(base_model, lora=LoraConfig(rank=4, alpha=8.0, dropout=0.3))
    member = institution()
    request = [TrainRequest(make_plan(config, start, number), start) for number in (1, 2, 3)]
    once = [bytes_of(member.answer(r)) for r in (request[0], request[1])]
    again = [bytes_of(member.answer(r)) for r in (request[1], request[0], request[1])]
    assert again == [once[1], once[0], once[1]]
    assert once[0] != once[1]


def test_the_moments_of_the_round_before_are_used(
    institution: Make, config: Config, start: Adapter, lora_model: LoraModel
) -> None:
    member = institution()
    plan = make_plan(config, start, 2)
    first, _ = expected_round(member, lora_model, config, start)
    second, records = expected_round(member, lora_model, config, start, 2, first.state)
    fresh, _ = expected_round(member, lora_model, config, start, 2)
    member.answer(TrainRequest(make_plan(config, start), start))
    answer = member.answer(TrainRequest(plan, start))
    assert isinstance(answer, Contribution)
    found = summed(answer, plan).update / records
    begin = flatten(start.factors, start.factors)
    update = flatten(second.adapter.factors, start.factors) - begin
    np.testing.assert_allclose(found, update, rtol=0, atol=plan.layout.error * (1 + 1e-9))
    assert np.abs(found - (flatten(fresh.adapter.factors, start.factors) - begin)).max() > 100 * plan.layout.error


def test_institutions_that_share_a_process_do_not_touch_each_other(
    institution: Make, base_model: str, start: Adapter, tmp_path: Path
) -> None:
    config = make_config(base_model, lora=LoraConfig(rank=4, alpha=8.0, dropout=0.3))

    def play(names: tuple[str, ...], run: str) -> dict[str, np.ndarray]:
        vectors = {}
        for number in (1, 2):
            for name in names:
                answer = institution(name).answer(TrainRequest(make_plan(config, start, number, run=run), start))
                assert isinstance(answer, Contribution)
                vectors[f"{name} {number}"] = answer.vector
        return vectors

    one, other = play(NAMES, "one"), play(NAMES[::-1], "other")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)
    assert len({vector.tobytes() for vector in one.values()}) == len(one)


def test_a_changed_file_of_records_is_read_again(
    institution: Make, folder_of: FolderOf, config: Config, start: Adapter
) -> None:
    member = institution(records=6)
    plan = make_plan(config, start)

    def weight() -> int:
        answer = member.answer(TrainRequest(plan, start))
        assert isinstance(answer, Contribution)
        return summed(answer, plan).weight

    assert weight() == 6
    write_jsonl(folder_of(member) / "train.jsonl", make_records(8, "alder"))
    assert weight() == 8


# ---- secure aggregation --------------------------------------------------------------------------------------------


IDENTITIES = tuple(Identity.generate(name) for name in NAMES)
EVERYBODY = Roster.of(*IDENTITIES)


def with_secure(member: Institution, config: Config, roster: Roster = EVERYBODY) -> Institution:
    """The same institution with a part in secure aggregation, on the terms that the configuration states."""
    identity = next(identity for identity in IDENTITIES if identity.name == member.name)
    secure = SecureMember(identity, Policy.of(config, roster), lambda run: member.home / run / "marks.json")
    return replace(member, secure=secure)


def test_a_plan_in_the_clear_is_refused_before_anything_is_trained(
    institution: Make, config: Config, start: Adapter
) -> None:
    member = with_secure(institution(), config)
    assert member.answer(TrainRequest(make_plan(config, start), start)) == Refused(SECURE_AGGREGATION_REQUIRED, "alder")
    assert files_below(member.home) == {}


def test_without_a_part_in_it_a_plan_for_secure_aggregation_is_refused_before_anything_is_trained(
    institution: Make, config: Config, start: Adapter
) -> None:
    member = institution()
    plan = secured(make_plan(config, start), config, EVERYBODY)
    assert member.answer(TrainRequest(plan, start)) == Refused(ROSTER_DIFFERS, "alder")
    assert files_below(member.home) == {}


@pytest.mark.parametrize("kind", [KeyList, Inbox, Consents])
def test_without_an_attempt_under_way_its_messages_are_refused(
    kind: Callable[[str, dict[str, Any]], ToMember], institution: Make, config: Config
) -> None:
    for member in (institution(), with_secure(institution(), config)):
        assert member.answer(kind("0" * 64, {})) == Refused(ATTEMPT_UNKNOWN, "alder")
        assert member.answer(Survivors("0" * 64, NAMES)) == Refused(ATTEMPT_UNKNOWN, "alder")


def test_what_is_wrong_with_the_adapter_or_the_round_is_told_before_the_attempt_counts(
    institution: Make, config: Config, start: Adapter
) -> None:
    member = with_secure(institution(), config)
    plan = secured(make_plan(config, start), config, EVERYBODY)
    wrong = [
        (TrainRequest(plan, moved(start)), ADAPTER_DIGEST_DIFFERS),
        (TrainRequest(replace(plan, cohort=("birch", "cedar")), start), NOT_INVITED),
        (TrainRequest(replace(plan, round=4), start), MALFORMED),
        (TrainRequest(replace(plan, run="../else"), start), MALFORMED),
        (TrainRequest(replace(plan, parameters=plan.parameters + 1), start), VECTOR_DIFFERS),
    ]
    for request, reason in wrong:
        assert member.answer(request) == Refused(reason, "alder")
        assert files_below(member.home) == {}
    assert isinstance(member.answer(TrainRequest(plan, start)), Keys)


def play_attempt(members: dict[str, Institution], plan: Plan, start: Adapter) -> tuple[Ring, list[Reply]]:
    """One attempt from plan to sum, as an honest coordinator has it; and every answer."""
    aggregator = Aggregator(plan.attempt, EVERYBODY)
    answers: list[Reply] = []

    def ask(requests: Mapping[str, Request], take: Callable[[str, Any], None]) -> None:
        for name, request in requests.items():
            answers.append(members[name].answer(request))
            take(name, answers[-1])

    ask(dict.fromkeys(members, TrainRequest(plan, start)), aggregator.on_keys)
    ask(dict.fromkeys(members, aggregator.key_list()), aggregator.on_shares)
    ask(aggregator.inboxes(), aggregator.on_masked)
    ask(dict.fromkeys(members, aggregator.survivors()), aggregator.on_consent)
    ask(dict.fromkeys(members, aggregator.consents()), aggregator.on_revealed)
    return aggregator.unmask(), answers


def test_the_sum_is_that_of_the_vectors_in_the_clear_and_none_of_them_leaves(
    institution: Make, config: Config, start: Adapter, tmp_path: Path
) -> None:
    plan = secured(make_plan(config, start), config, EVERYBODY)
    in_clear = make_plan(config, start)
    vectors = {
        name: vector_of(institution(name, home=tmp_path / "clear" / name).answer(TrainRequest(in_clear, start)), plan)
        for name in NAMES
    }
    members = {name: with_secure(institution(name), config) for name in NAMES}
    total, answers = play_attempt(members, plan, start)
    expected = np.sum(list(vectors.values()), axis=0, dtype=np.uint32) & np.uint32(plan.layout.ring_mask)
    assert np.array_equal(total, expected)
    assert len(answers) == 5 * len(NAMES)
    sent = b"".join(bytes_of(answer) for answer in answers)
    for vector in vectors.values():
        packed = fixed_point.pack(vector, plan.layout.ring_bits).tobytes()
        assert all(packed[place : place + 16] not in sent for place in range(0, len(packed) - 16, 16))


def test_a_repeat_has_fresh_keys_and_the_same_vector_without_another_training(
    institution: Make, config: Config, start: Adapter
) -> None:
    members = {name: with_secure(institution(name), config) for name in NAMES}
    plan = make_plan(config, start)
    one, first = play_attempt(members, secured(plan, config, EVERYBODY, 1), start)
    other, second = play_attempt(members, secured(plan, config, EVERYBODY, 2), start)
    assert np.array_equal(one, other)
    assert not {bytes_of(answer) for answer in first} & {bytes_of(answer) for answer in second}
    for member in members.values():
        assert len((member.home / plan.run / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_training_that_fails_ends_the_attempt_and_the_next_one_can_begin(
    institution: Make, config: Config, start: Adapter
) -> None:
    def fail(trained: Trained, plan: Plan) -> Trained:
        raise RuntimeError("the record of QXZQXZ")

    member = with_secure(institution(), config)
    failing = replace(member, spoil=fail)
    plans = [secured(make_plan(config, start), config, EVERYBODY, attempt) for attempt in (1, 2)]
    assert failing.answer(TrainRequest(plans[0], start)) == Refused(INTERNAL_ERROR, "alder")
    assert failing.answer(KeyList(plans[0].digest(), {})) == Refused(ATTEMPT_UNKNOWN, "alder")
    assert member.answer(TrainRequest(plans[0], start)) == Refused(ATTEMPT_OLD, "alder")
    assert isinstance(member.answer(TrainRequest(plans[1], start)), Keys)


# ---- void updates --------------------------------------------------------------------------------------------------


def nan_somewhere(trained: Trained, plan: Plan) -> Trained:
    factors = {key: factor.copy() for key, factor in trained.adapter.factors.items()}
    next(iter(factors.values()))[0, 0] = np.nan
    return replace(trained, adapter=Adapter(factors))


def infinite_somewhere(trained: Trained, plan: Plan) -> Trained:
    factors = {key: factor.copy() for key, factor in trained.adapter.factors.items()}
    next(iter(factors.values()))[0, 0] = -np.inf
    return replace(trained, adapter=Adapter(factors))


UNUSABLE = [
    pytest.param(nan_somewhere, id="a factor is NaN"),
    pytest.param(infinite_somewhere, id="a factor is infinite"),
    pytest.param(lambda trained, plan: replace(trained, loss=math.nan), id="the loss is NaN"),
    pytest.param(lambda trained, plan: replace(trained, loss=math.inf), id="the loss is infinite"),
    pytest.param(lambda trained, plan: replace(trained, loss=1e30), id="the loss is finite but beyond its counter"),
]


@pytest.mark.parametrize("spoil", UNUSABLE)
def test_an_unusable_update_leaves_as_zeros_and_is_forgotten_at_home(
    spoil: Callable[[Trained, Plan], Trained], institution: Make, config: Config, start: Adapter
) -> None:
    member = institution()
    plan = make_plan(config, start)
    answer = replace(member, spoil=spoil).answer(TrainRequest(plan, start))
    assert isinstance(answer, Contribution)
    found = summed(answer, plan)
    assert not found.update.any()
    assert dict(found.counters) == {**dict.fromkeys(found.counters, 0), "void": 1, "members": 1}
    assert not (member.home / plan.run / "state").exists()
    (line,) = (member.home / plan.run / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["void"] is True
    assert json.loads(line)["train_loss"] is None
    # The next round goes on from the state before it, as if this round had not been.
    then = member.answer(TrainRequest(make_plan(config, start, 2), start))
    elsewhere = institution("alder", home=member.home / "elsewhere").answer(
        TrainRequest(make_plan(config, start, 2), start)
    )
    assert isinstance(then, Contribution)
    assert isinstance(elsewhere, Contribution)
    assert np.array_equal(then.vector, elsewhere.vector)


def test_a_void_round_after_a_good_one_keeps_the_good_state(institution: Make, config: Config, start: Adapter) -> None:
    member = institution()
    member.answer(TrainRequest(make_plan(config, start, 1), start))
    state = files_below(member.home / "tiny-run" / "state")
    assert len(state) == 1
    replace(member, spoil=nan_somewhere).answer(TrainRequest(make_plan(config, start, 2), start))
    assert files_below(member.home / "tiny-run" / "state") == state


def test_a_global_adapter_that_is_not_finite_gives_a_void_vector(
    institution: Make, config: Config, start: Adapter
) -> None:
    broken = Adapter({key: np.full_like(factor, np.nan) for key, factor in start.factors.items()})
    plan = make_plan(config, broken)
    answer = institution().answer(TrainRequest(plan, broken))
    assert isinstance(answer, Contribution)
    assert np.array_equal(vector_of(answer, plan), fixed_point.void(plan.layout))


# ---- what stays ----------------------------------------------------------------------------------------------------


def test_private_numbers_are_written_in_its_own_home_only(
    institution: Make, config: Config, start: Adapter, lora_model: LoraModel, tmp_path: Path
) -> None:
    member, neighbour = institution(), institution("birch")
    before = files_below(tmp_path)
    member.answer(TrainRequest(make_plan(config, start), start))
    after = files_below(tmp_path)
    assert {name for name in after if after[name] != before.get(name)} == {
        "alder/home/tiny-run/metrics.jsonl",
        "alder/home/tiny-run/settings.json",
        "alder/home/tiny-run/state/round-00001.safetensors",
    }
    assert not neighbour.home.exists()
    trained, _ = expected_round(member, lora_model, config, start)
    (line,) = after["alder/home/tiny-run/metrics.jsonl"].decode().splitlines()
    found = json.loads(line)
    assert (found["round"], found["void"], found["steps"]) == (1, False, trained.steps)
    assert found["train_loss"] == pytest.approx(trained.loss / trained.tokens)


KINDS = [RuntimeError, ValueError, KeyError, OSError, DataError, ConfigError, ModelError, StorageError, MemoryError]
secrets = st.text(alphabet="QXZJK", min_size=10, max_size=14)


@given(secret=secrets, kind=st.sampled_from(KINDS))
@settings(max_examples=25, deadline=None, suppress_health_check=SLOW_FIXTURE)
def test_no_text_of_an_exception_leaves(
    secret: str, kind: type[Exception], institution: Make, config: Config, start: Adapter
) -> None:
    def fail(trained: Trained, plan: Plan) -> Trained:
        raise kind(f"the record of {secret}")

    answer = institution(spoil=fail).answer(TrainRequest(make_plan(config, start), start))
    assert isinstance(answer, Refused)
    assert answer.reason in REASONS
    assert (answer.name, answer.parts) == ("alder", ())
    assert secret.encode() not in bytes_of(answer)


def test_the_detail_of_a_refusal_stays(institution: Make, config: Config, start: Adapter) -> None:
    def refuse(trained: Trained, plan: Plan) -> Trained:
        raise Refusal(MALFORMED, "record of QXZQXZ")

    answer = institution(spoil=refuse).answer(TrainRequest(make_plan(config, start), start))
    assert answer == Refused(MALFORMED, "alder")


@given(
    secret=secrets,
    damage=st.sampled_from(["nothing", "a line", "a file", "the state", "the home", "the model", "the adapter"]),
    number=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None, suppress_health_check=SLOW_FIXTURE)
def test_no_text_of_a_record_or_a_path_leaves(
    secret: str, damage: str, number: int, base_model: str, config: Config, start: Adapter, tmp_path: Path
) -> None:
    place = tmp_path / secret
    data = place / "data"
    member = Institution("alder", RecordFolder(data), place / "home", ModelConfig(base_model))
    write_jsonl(data / "train.jsonl", make_records(4, "alder", secret))
    write_jsonl(data / "validation.jsonl", make_records(2, "alder-validation", secret))
    plan, adapter = make_plan(config, start, number), start
    if damage == "a line":
        with (data / "train.jsonl").open("a") as file:
            file.write(json.dumps({"completion": secret, "person": [secret]}) + "\n")
    elif damage == "a file":
        (data / "validation.jsonl").unlink()
    elif damage == "the state":
        (member.home / plan.run / "state").mkdir(parents=True, exist_ok=True)
        (member.home / plan.run / "state" / "round-00000.safetensors").write_text(secret)
    elif damage == "the home":
        member.home.mkdir(parents=True, exist_ok=True)
        (member.home / plan.run).unlink(missing_ok=True) if (member.home / plan.run).is_file() else None
        plan = replace(plan, run="a-file")
        (member.home / "a-file").write_text(secret)
    elif damage == "the model":
        member = replace(member, model=ModelConfig(str(place / "model")))
    elif damage == "the adapter":
        adapter = moved(start)
    for answer in (
        member.answer(TrainRequest(plan, adapter)),
        member.answer(make_hello(config)),
        member.answer(make_hello(config, version="9.9.9")),
    ):
        assert secret.encode() not in bytes_of(answer)
        if isinstance(answer, Refused):
            assert answer.reason in REASONS
    if damage == "nothing":
        assert secret in (data / "train.jsonl").read_text()


def test_the_institutions_own_log_tells_what_the_reply_does_not(
    institution: Make, folder_of: FolderOf, config: Config, start: Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    member = institution()
    (folder_of(member) / "train.jsonl").write_text('{"completion": 7}')
    with caplog.at_level(logging.INFO, "silotune.client.alder"):
        answer = member.answer(TrainRequest(make_plan(config, start), start))
    assert answer == Refused(DATA_UNREADABLE, "alder")
    assert "train.jsonl:1" in caplog.text


def test_a_broken_state_is_refused_not_forgotten(institution: Make, config: Config, start: Adapter) -> None:
    member = institution()
    member.answer(TrainRequest(make_plan(config, start), start))
    (member.home / "tiny-run" / "state" / "round-00001.safetensors").write_bytes(b"gone")
    assert member.answer(TrainRequest(make_plan(config, start, 2), start)) == Refused(STORAGE_FAILED, "alder")


def test_a_record_longer_than_max_tokens_still_trains(
    institution: Make, folder_of: FolderOf, config: Config, start: Adapter
) -> None:
    member = institution()
    write_jsonl(folder_of(member) / "train.jsonl", [Record("cold " * 90, "tea " * 90, "p", "coding")] * 2)
    answer = member.answer(TrainRequest(make_plan(config, start), start))
    assert isinstance(answer, Contribution)
    plan = make_plan(config, start)
    assert summed(answer, plan).counters["train_tokens"] == 2 * 47


def test_a_fresh_load_gives_the_same_vector(institution: Make, config: Config, start: Adapter) -> None:
    member = institution()
    one = bytes_of(member.answer(TrainRequest(make_plan(config, start, run="one"), start)))
    institution_module._shared_model.cache_clear()
    local_round._tokenised.cache_clear()
    other_plan = make_plan(config, start, run="one")
    assert bytes_of(member.answer(TrainRequest(other_plan, start))) == one
