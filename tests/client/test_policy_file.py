"""The institution's own policy: what it says, what is told of a wrong one, and what each field refuses."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from client import policy_file
from client.main import app
from client.policy import Policy
from client.policy_file import (
    METRICS,
    NONE,
    TEMPLATE,
    UNITS,
    Asked,
    Budget,
    InstitutionPolicy,
    Population,
    RoundBook,
    SecureTerms,
    parse,
    read,
    round_key,
    write_template,
)
from common import policy_reasons as reasons
from common.base_model import Fingerprint, fingerprint
from common.config import QuantiseConfig
from common.errors import ConfigError, Refusal, StorageError
from common.fixed_point import COUNTERS
from common.messages import Hello, Plan
from common.policy_reasons import PRIVACY_REQUIRED
from common.secagg.identity import Identity, Roster
from common.secagg.reasons import SECURE_AGGREGATION_REQUIRED, SETTINGS_DIFFER
from tests.federations import NAMES, Federation, federation_config

BASE = Fingerprint("1" * 64, "2" * 64, "3" * 64)
POLICY = InstitutionPolicy(base_models=(BASE.digest(),), data_sets=("notes", "letters"))
ASKED = Asked(BASE, "notes", "ffa", 16, 1.0, 16, QuantiseConfig(), secure=True)
NOON = datetime(2030, 1, 31, 12, tzinfo=UTC)


def mistakes(text: str) -> list[str]:
    """The lines of the error, without the first, which counts them."""
    with pytest.raises(ConfigError) as caught:
        parse(text, "policy.yaml")
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("policy.yaml: ")
    assert re.findall(r"\d+", first) == [str(len(lines))]
    return [line.strip() for line in lines]


def leaves(kind: type, prefix: str = "") -> list[str]:
    found = []
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            found += leaves(hint, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def with_value(key: str, value: str) -> str:
    """YAML that says one thing; `value` as YAML has it."""
    *sections, leaf = key.split(".")
    return "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(sections)) + (
        f"{'  ' * len(sections)}{leaf}: {value}\n"
    )


# --- The template


def test_the_template_says_the_defaults(tmp_path: Path) -> None:
    write_template(tmp_path / "policy.yaml")
    assert read(tmp_path / "policy.yaml") == InstitutionPolicy()


def test_the_template_lists_what_it_is_given_and_is_never_written_over(tmp_path: Path) -> None:
    file = tmp_path / "new" / "policy.yaml"
    write_template(file, ["a" * 64], ["notes", "more-notes"], ["b" * 64])
    found = read(file)
    assert found == InstitutionPolicy(base_models=("a" * 64,), data_sets=("notes", "more-notes"), bundles=("b" * 64,))
    with pytest.raises(ConfigError, match="is there already"):
        write_template(file)
    assert read(file) == found
    with pytest.raises(ConfigError, match="data_sets: found"):
        write_template(tmp_path / "other.yaml", data_sets=["../notes"])
    assert not (tmp_path / "other.yaml").exists()


def test_every_field_stands_in_the_template_once_and_is_explained() -> None:
    section, found = "", []
    lines = TEMPLATE.splitlines()
    for number, line in enumerate(lines):
        if not (match := re.match(r"( *)(\w+):(.*)", line)):
            continue
        indent, name, value = match.groups()
        section = section if indent else (f"{name}." if not value else "")
        if value:
            assert re.match(rf"{indent}# .+\.$", lines[number - 1]), name
            found.append(f"{section}{name}" if indent else name)
    assert found == [*leaves(InstitutionPolicy)]


def test_a_file_that_says_one_thing_has_the_defaults_for_the_rest() -> None:
    assert parse("largest_rank: 8", "policy.yaml") == InstitutionPolicy(largest_rank=8)
    assert parse("quantise: {bits: 12}", "p") == InstitutionPolicy(quantise=QuantiseConfig(bits=12))
    assert parse("largest_passes: 2", "p").largest_passes == 2.0


def test_what_is_commented_out_below_a_key_is_left_out() -> None:
    assert parse("base_models:\n#  - aa\nquantise:\n#  bits: 3\n", "p") == InstitutionPolicy()


def test_without_secure_aggregation_a_warning_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(TEMPLATE.format(base_models=[], data_sets=[], bundles=[]))
    assert read(file).warnings() == ()
    assert caplog.text == ""
    file.write_text("secure_aggregation: {required: false}")
    assert not read(file).secure_aggregation.required
    assert "the coordinator can read every update" in caplog.text


# --- Mistakes


@pytest.mark.parametrize("text", ["", "# nothing\n", "\n\n", "{}"])
def test_an_empty_file_is_no_policy(text: str) -> None:
    with pytest.raises(ConfigError, match="expected keys such as secure_aggregation, found an empty file"):
        parse(text, "policy.yaml")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1, 2]", "found a list"),
        ("just words", "policy.yaml: "),
        ("a: [1", r"line \d+, column \d+: not valid YAML"),
        ("largest_rank: 8\nlargest_rank: 9", "duplicate key"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_what_is_no_yaml_of_keys_is_told(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse(text, "policy.yaml")


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        read(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes("approval: é".encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot be read as UTF-8"):
        read(tmp_path / "latin.yaml")


def test_all_mistakes_are_told_at_once_each_with_its_key() -> None:
    lines = mistakes(
        "larges_rank: 8\nsecure_aggregation: {collders: 1, required: 'no'}\nquantise: 3\nrounds_per_day: -1\n"
        "methods: [fedavg, flora]\n7: x\n"
    )
    assert {line.split(":")[0] for line in lines} == {
        "larges_rank",
        "secure_aggregation.collders",
        "secure_aggregation.required",
        "quantise",
        "rounds_per_day",
        "methods",
        "7",
    }
    by_key = {line.split(":")[0]: line for line in lines}
    assert by_key["larges_rank"].endswith("unknown key; the nearest known one is largest_rank")
    assert by_key["secure_aggregation.collders"].endswith("the nearest known one is secure_aggregation.colluders")
    assert by_key["quantise"] == "quantise: found 3; allowed: a section with the keys clip, bits, weight_bits"
    assert "true or false" in by_key["secure_aggregation.required"]


def test_a_key_in_the_wrong_section_is_told_with_the_right_one() -> None:
    (line,) = mistakes("quantise: {required: true}")
    assert line == "quantise.required: unknown key; the nearest known one is secure_aggregation.required"


def test_of_two_keys_as_near_the_one_of_the_same_section_is_told() -> None:
    assert mistakes("weight: 3") == ["weight: unknown key; the nearest known one is weight_unit"]
    (line,) = mistakes("quantise: {weight: 3}")
    assert line == "quantise.weight: unknown key; the nearest known one is quantise.weight_bits"


WRONG: dict[str, list[str]] = {
    "secure_aggregation.required": ["1", "'true'", "~", "[true]"],
    "secure_aggregation.colluders": ["0", "true", "'1'", "1.0", "~"],
    "secure_aggregation.smallest_cohort": ["2", "3.0", "'3'"],
    "base_models": ["abc", "[abc]", f"[{'A' * 64}]", f"[{'a' * 64}, {'a' * 64}]", "[1]", "{a: b}", f"{'a' * 64}"],
    "data_sets": ["notes", "[../notes]", "[Notes]", "[a, a]", "['${oc.env:HOME}']", "[~]", f"[{'a' * 65}]", '["a\\n"]'],
    "populations": ["clinic", "[clinic]", "3"],
    "methods": ["fedavg", "[flora]", "[ffa, ffa]", "[true]"],
    "largest_rank": ["0", "1.5", "'8'", "true", "yes", "~"],
    "largest_passes": ["0", "-1", ".inf", ".nan", "'1'", "true"],
    "rounds_per_day": ["-1", "1.0", "'1'", "false"],
    "quantise.clip": ["0", ".inf", "'1'"],
    "quantise.bits": ["1", "31", "16.0", "'16'"],
    "quantise.weight_bits": ["0", "30", "true"],
    "weight_unit": ["0", "'1'", "1.0"],
    "metrics": ["[loss]", "train_loss", "[train_loss, train_loss]"],
    "bundles": ["[abc]", "abc"],
    "approval": ["yes", "sometimes", "[manual]", "~"],
}


def test_wrong_values_are_tried_for_every_field() -> None:
    assert list(WRONG) == leaves(InstitutionPolicy)


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_wrong_value_is_told_with_what_is_allowed(key: str, value: str) -> None:
    (line,) = mistakes(with_value(key, value))
    assert re.match(rf"{re.escape(key)}: found .+; allowed: .+", line)


def test_the_smallest_cohort_must_hide_two_honest_members() -> None:
    (line,) = mistakes("secure_aggregation: {colluders: 3, smallest_cohort: 4}")
    assert line.startswith("secure_aggregation.smallest_cohort: found 4; allowed: at least 5")
    assert parse("secure_aggregation: {colluders: 3, smallest_cohort: 5}", "p").secure_aggregation.colluders == 3


def test_nothing_of_the_machine_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAKED", "manual")
    (line,) = mistakes("approval: ${oc.env:LEAKED}")
    assert "found '${oc.env:LEAKED}'" in line


# --- Populations

CLINIC = "{data_sets: [notes, letters], modes: [patient], epsilon: 8, delta: 1e-4}"
BUDGET = Budget(("notes", "letters"), ("patient",), 8.0, 1e-4)


def populations(*said: str) -> str:
    return "data_sets: [notes, letters, scans]\npopulations:\n" + "".join(f"  {line}\n" for line in said)


def test_a_population_is_read_and_found_by_its_data_sets() -> None:
    found = parse(populations(f"clinic: {CLINIC}"), "p")
    assert found.populations == {"clinic": BUDGET}
    clinic = Population("clinic", ("notes", "letters"), ("patient",), 8.0, 1e-4)
    assert found.population_of("notes") == found.population_of("letters") == clinic
    assert clinic.limited
    alone = found.population_of("scans")
    assert alone == Population("scans", ("scans",), (NONE, *UNITS))
    assert not alone.limited


def test_the_example_of_the_template_is_one() -> None:
    (line,) = [
        line for line in TEMPLATE.format(base_models=[], data_sets=[], bundles=[]).splitlines() if "epsilon:" in line
    ]
    assert parse(populations(line.removeprefix("#").strip()), "p").populations == {"clinic": BUDGET}


@pytest.mark.parametrize(
    ("said", "key", "allowed"),
    [
        ("clinic: {data_sets: [], modes: [patient], epsilon: 8, delta: 1e-4}", "clinic.data_sets", "at least one"),
        ("clinic: {data_sets: [notes, notes], modes: [record], epsilon: 8, delta: 1e-4}", "clinic.data_sets", "once"),
        (
            "clinic: {data_sets: [others], modes: [record], epsilon: 8, delta: 1e-4}",
            "clinic.data_sets",
            "data_sets lists",
        ),
        ("clinic: {data_sets: [notes], modes: [], epsilon: 8, delta: 1e-4}", "clinic.modes", "at least one"),
        ("clinic: {data_sets: [notes], modes: [none], epsilon: 8, delta: 1e-4}", "clinic.modes", "record, patient"),
        ("clinic: {data_sets: [notes], modes: [record], epsilon: 0, delta: 1e-4}", "clinic.epsilon", "above 0"),
        ("clinic: {data_sets: [notes], modes: [record], epsilon: .inf, delta: 1e-4}", "clinic.epsilon", "finite"),
        ("clinic: {data_sets: [notes], modes: [record], epsilon: .nan, delta: 1e-4}", "clinic.epsilon", "finite"),
        ("clinic: {data_sets: [notes], modes: [record], epsilon: '8', delta: 1e-4}", "clinic.epsilon", "a number"),
        ("clinic: {data_sets: [notes], modes: [record], epsilon: 8, delta: 0}", "clinic.delta", "above 0"),
        ("clinic: {data_sets: [notes], modes: [record], epsilon: 8, delta: 1}", "clinic.delta", "below"),
        ("Clinic: {data_sets: [notes], modes: [record], epsilon: 8, delta: 1e-4}", "Clinic", "a name of a-z"),
        ("scans: {data_sets: [notes], modes: [record], epsilon: 8, delta: 1e-4}", "scans", "another name"),
    ],
)
def test_a_population_that_cannot_be_meant_is_told(said: str, key: str, allowed: str) -> None:
    (line,) = mistakes(populations(said))
    assert re.match(rf"populations\.{re.escape(key)}: found .+; allowed: .*{allowed}", line)


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("data_sets", "at least one"),
        ("modes", "at least one"),
        ("epsilon", "a finite number above 0"),
        ("delta", "above 0"),
    ],
)
def test_what_a_population_does_not_say_is_missing_and_not_a_number_that_nobody_wrote(key: str, allowed: str) -> None:
    said = re.sub(rf"{key}: (\[.*?\]|[^,}}]+)(, )?", "", CLINIC)
    (line,) = mistakes(populations(f"clinic: {said}"))
    assert re.match(rf"populations\.clinic\.{key}: missing; allowed: .*{allowed}", line)
    assert "found" not in line


def test_a_data_set_stands_in_one_population() -> None:
    lines = mistakes(
        populations(f"clinic: {CLINIC}", "ward: {data_sets: [letters], modes: [record], epsilon: 1, delta: 1e-4}")
    )
    assert [line.split(":")[0] for line in lines] == ["populations.clinic.data_sets", "populations.ward.data_sets"]
    assert all("found letters, which stands in 2 populations" in line for line in lines)


def test_a_population_may_have_the_name_of_one_of_its_data_sets() -> None:
    assert parse(populations(f"notes: {CLINIC}"), "p").population_of("letters").name == "notes"


def test_modes_of_different_units_are_warned_of() -> None:
    for modes, units in ((("record", "distributed"), ""), (("record", "patient"), "patient, record")):
        warnings = replace(POLICY, populations={"clinic": replace(BUDGET, modes=modes)}).warnings()
        assert ("".join(warnings) == "") == (units == "")
        assert units in "".join(warnings)


@pytest.mark.parametrize("mode", [NONE, *UNITS, "", "Patient"])
def test_a_data_set_of_a_population_is_trained_on_under_its_modes_only(mode: str) -> None:
    with_budget = replace(POLICY, populations={"clinic": replace(BUDGET, modes=("patient", "institution"))})
    for policy in (with_budget, replace(POLICY, approval="manual", populations=with_budget.populations)):
        asked = replace(ASKED, mode=mode)
        if mode in ("patient", "institution"):
            policy.accept(asked, ["notes"], approved=True)
            continue
        with pytest.raises(Refusal) as caught:
            policy.accept(asked, ["notes"], approved=False)
        assert caught.value.reason == PRIVACY_REQUIRED


@pytest.mark.parametrize("mode", [NONE, *UNITS])
def test_a_data_set_in_no_population_is_trained_on_in_every_mode(mode: str) -> None:
    policy = replace(POLICY, populations={"clinic": replace(BUDGET, data_sets=("letters",))})
    policy.accept(replace(ASKED, mode=mode), ["notes"], approved=False)


@pytest.mark.parametrize("mode", [NONE, *UNITS])
def test_patients_are_protected_only_where_somebody_knows_whose_a_record_is(mode: str) -> None:
    manual = replace(POLICY, data_sets=("notes", "letters"), approval="manual")
    for without, data_set in ((["notes"], "notes"), (["letters"], "notes"), (["notes", "letters"], "letters")):
        asked = replace(ASKED, mode=mode, data_set=data_set)
        with pytest.raises(Refusal) as caught:
            manual.accept(asked, ["notes", "letters"], approved=False, without_persons=without)
        expected = reasons.PERSONS_UNKNOWN if mode == "patient" and data_set in without else reasons.NOT_APPROVED
        assert caught.value.reason == expected


# --- What a plan may ask


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("secure_aggregation.required", {}, {"secure": False}, SECURE_AGGREGATION_REQUIRED),
    ("base_models", {"base_models": ()}, {}, reasons.BASE_MODEL_NOT_ALLOWED),
    ("base_models", {}, {"fingerprint": replace(BASE, tokenizer="4" * 64)}, reasons.BASE_MODEL_NOT_ALLOWED),
    ("methods", {"methods": ("fedavg",)}, {}, reasons.METHOD_NOT_ALLOWED),
    ("methods", {}, {"method": "flora"}, reasons.METHOD_NOT_ALLOWED),
    ("largest_rank", {"largest_rank": 15}, {}, reasons.RANK_TOO_LARGE),
    ("largest_rank", {}, {"rank": 65}, reasons.RANK_TOO_LARGE),
    ("largest_rank", {}, {"rank": 0}, reasons.RANK_TOO_LARGE),
    ("largest_passes", {"largest_passes": 0.5}, {}, reasons.PASSES_TOO_MANY),
    ("largest_passes", {}, {"passes": float("nan")}, reasons.PASSES_TOO_MANY),
    ("quantise", {}, {"quantise": QuantiseConfig(clip=2.0)}, SETTINGS_DIFFER),
    ("quantise", {}, {"quantise": QuantiseConfig(bits=15)}, SETTINGS_DIFFER),
    ("weight_unit", {"weight_unit": 1}, {}, SETTINGS_DIFFER),
    ("data_sets", {"data_sets": ("letters",)}, {}, reasons.DATA_SET_NOT_ALLOWED),
    ("data_sets", {}, {"data_set": "letters"}, reasons.DATA_SET_UNKNOWN),
    ("populations", {"populations": {"clinic": Budget(("notes",), ("record",), 1.0, 1e-5)}}, {}, PRIVACY_REQUIRED),
    ("approval", {"approval": "manual"}, {}, reasons.NOT_APPROVED),
]


def test_what_the_policy_allows_is_accepted() -> None:
    POLICY.accept(ASKED, ["notes"], approved=False)
    replace(POLICY, approval="manual").accept(ASKED, ["notes"], approved=True)
    replace(POLICY, largest_rank=16, largest_passes=1.0).accept(ASKED, ["notes"], approved=False)
    open_one = replace(POLICY, secure_aggregation=SecureTerms(required=False))
    open_one.accept(replace(ASKED, secure=False), ["notes"], approved=False)


@pytest.mark.parametrize(("policy", "asked", "reason"), [case[1:] for case in REFUSED])
def test_each_field_refuses_with_a_reason_of_its_own(
    policy: dict[str, Any], asked: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Refusal) as caught:
        replace(POLICY, **policy).accept(replace(ASKED, **asked), ["notes"], approved=False)
    assert caught.value.reason == reason


def test_the_default_policy_allows_no_base_model_and_no_data_set() -> None:
    for policy in (InstitutionPolicy(), InstitutionPolicy(base_models=POLICY.base_models)):
        with pytest.raises(Refusal):
            policy.accept(ASKED, ["notes"], approved=True)


def test_names_that_are_not_allowed_cannot_be_told_from_names_that_do_not_exist() -> None:
    told = set()
    for known in (["notes", "secret"], ["notes"]):
        with pytest.raises(Refusal) as caught:
            POLICY.accept(replace(ASKED, data_set="secret"), known, approved=True)
        told.add(caught.value.reason)
    assert told == {reasons.DATA_SET_NOT_ALLOWED}


def test_the_reasons_are_words_and_all_are_used() -> None:
    # What people said, how often, and at which price: see test_guard, the book below and test_ledger.
    used = {case[3] for case in REFUSED} | {reasons.ROUNDS_PER_DAY_EXCEEDED, reasons.PAUSED, reasons.LEFT}
    used |= {reasons.BUDGET_EXHAUSTED, reasons.PERSONS_UNKNOWN}
    assert used >= reasons.REASONS
    assert all(re.fullmatch(r"[a-z_]+", reason) for reason in reasons.REASONS)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return Federation(tmp_path_factory.mktemp("plans"), federation_config(NAMES))


def test_what_a_plan_asks_is_read_from_it(federation: Federation) -> None:
    plan: Plan = federation.plan()
    asked = Asked.of(plan)
    settings = plan.settings
    assert (asked.fingerprint, asked.method) == (plan.fingerprint, settings.method)
    assert asked.data_set == settings.data_set == federation.config.data.name
    named = replace(plan, settings=replace(settings, data_set="letters"))
    assert Asked.of(named) == replace(asked, data_set="letters")
    assert (asked.rank, asked.passes) == (settings.lora.rank, settings.train.passes_per_round)
    assert (asked.weight_unit, asked.quantise, asked.secure) == (settings.weight_unit, settings.quantise, True)
    private = replace(plan, settings=replace(settings, privacy=replace(settings.privacy, mode="patient")))
    assert (asked.mode, Asked.of(private).mode) == (settings.privacy.mode, "patient")
    assert not Asked.of(replace(plan, secure=None)).secure


@pytest.mark.parametrize("secure", [True, False])
def test_a_run_asks_at_hello_for_what_its_rounds_ask_for(secure: bool, federation: Federation) -> None:
    """Else a person would approve, or a policy allow, one thing and get another."""
    plan = federation.plan() if secure else replace(federation.plan(), secure=None)
    roster = federation.roster.digest() if secure else ""
    assert Asked.of(Hello.of(federation.config, plan.run, plan.fingerprint, roster)) == Asked.of(plan)


def test_the_terms_of_secure_aggregation_are_the_policys() -> None:
    roster = Roster.of(*(Identity.generate(name) for name in NAMES))
    policy = replace(POLICY, secure_aggregation=SecureTerms(colluders=2, smallest_cohort=5), weight_unit=3)
    assert policy.secure(roster) == Policy(roster, 2, 5, ("fedavg", "ffa"), 3, QuantiseConfig(), required=True)
    assert replace(policy, methods=("ffa",)).secure(roster).methods == ("ffa",)
    open_one = replace(policy, secure_aggregation=SecureTerms(required=False, colluders=2, smallest_cohort=5))
    assert open_one.secure(roster) == replace(policy.secure(roster), required=False)


@given(metrics=st.sets(st.sampled_from(sorted(METRICS))), values=st.lists(st.integers(0, 9), min_size=4, max_size=4))
def test_metrics_that_may_not_leave_are_sent_as_zeros(metrics: set[str], values: list[int]) -> None:
    names = [name for pair in METRICS.values() for name in pair]
    assert set(names) <= set(COUNTERS)
    counters = dict(zip(names, values, strict=True))
    left = replace(POLICY, metrics=tuple(metrics)).leaving(counters)
    assert left == {
        name: value if name.partition("_")[0] + "_loss" in metrics else 0 for name, value in counters.items()
    }


def test_the_command_prints_the_digest_that_a_policy_lists(base_model: str) -> None:
    shown = CliRunner().invoke(app, ["fingerprint", base_model, "--json"])
    assert shown.exit_code == 0
    found = json.loads(shown.stdout)
    assert found == {"digest": fingerprint(base_model).digest(), **fingerprint(base_model).as_dict()}
    assert found["digest"] in CliRunner().invoke(app, ["fingerprint", base_model]).stdout
    parse(f"base_models: [{found['digest']}]", "policy.yaml")
    wrong = CliRunner().invoke(app, ["fingerprint", f"{base_model}/nowhere"])
    assert wrong.exit_code == 4


# --- Rounds of a day


def test_only_the_repeat_of_a_round_is_the_same_round(federation: Federation) -> None:
    plan = federation.plan()
    assert plan.secure is not None
    repeat = replace(plan, cohort=plan.cohort[:-1], secure=replace(plan.secure, attempt=9))
    assert round_key(repeat) == round_key(plan)
    for change in (
        {"run": "other"},
        {"round": 2},
        {"adapter_digest": "0" * 64},
        {"settings": replace(plan.settings, seed=99)},
    ):
        assert round_key(replace(plan, **change)) != round_key(plan)


@pytest.fixture
def book(tmp_path: Path) -> RoundBook:
    return RoundBook(tmp_path / "home" / "rounds.json")


def refused(count: Callable[[], None]) -> bool:
    try:
        count()
    except Refusal as refusal:
        return refusal.reason == reasons.ROUNDS_PER_DAY_EXCEEDED
    return False


def test_rounds_of_a_day_are_counted_and_a_repeat_is_none(book: RoundBook) -> None:
    for _ in range(3):
        book.count(2, "a", NOON)
    book.count(2, "other", NOON)
    assert refused(lambda: book.count(2, "b", NOON))
    book.count(2, "a", NOON)
    book.count(3, "b", NOON)
    assert refused(lambda: book.count(0, "c", NOON))


def test_a_new_day_begins_at_midnight_utc_and_counts_from_zero(book: RoundBook) -> None:
    late = datetime(2030, 1, 31, 23, 59, 59, tzinfo=UTC)
    book.count(1, "a", late)
    assert refused(lambda: book.count(1, "b", late))
    east = timezone(timedelta(hours=14))
    assert refused(lambda: book.count(1, "b", late.astimezone(east)))  # tomorrow there, today in UTC
    book.count(1, "b", late + timedelta(seconds=1))
    assert refused(lambda: book.count(1, "a", late + timedelta(seconds=1)))


def test_a_clock_that_goes_back_opens_no_fresh_day(book: RoundBook) -> None:
    book.count(2, "a", NOON)
    for days in (1, 2, 400):
        earlier = NOON - timedelta(days=days)
        book.count(2, "b", earlier)
        assert refused(lambda now=earlier: book.count(2, "c", now))  # type: ignore[misc]
    assert refused(lambda: book.count(2, "c", NOON))
    book.count(2, "c", NOON + timedelta(days=1))


@settings(max_examples=40)
@given(days=st.lists(st.integers(-3, 3), max_size=20), most=st.integers(0, 3))
def test_no_clock_gives_more_rounds_than_days_it_has_reached(
    days: list[int], most: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    book = RoundBook(tmp_path_factory.mktemp("home") / "rounds.json")
    accepted: list[int] = []
    for number, day in enumerate(days):
        if not refused(lambda n=number, d=day: book.count(most, str(n), NOON + timedelta(days=d))):  # type: ignore[misc]
            accepted.append(max(days[: number + 1]))
    assert all(accepted.count(day) <= most for day in accepted)
    if most and days:
        assert accepted


def test_a_restart_forgets_no_round(tmp_path: Path) -> None:
    file = tmp_path / "rounds.json"
    code = (
        "import sys, os, signal; from pathlib import Path; from datetime import datetime, UTC\n"
        "from client.policy_file import RoundBook\n"
        "for key in 'ab': RoundBook(Path(sys.argv[1])).count(2, key, datetime(2030, 1, 31, tzinfo=UTC))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(policy_file.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, str(file)], cwd=root, check=False)
    assert done.returncode == -9
    assert refused(lambda: RoundBook(file).count(2, "c", NOON))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b'{"day": "2030-01-31"}',
        b'{"day": 3, "rounds": []}',
        b'{"day": "2030-01-31", "rounds": 3}',
        b'{"day": "tomorrow", "rounds": []}',
    ],
)
def test_without_its_count_nothing_begins(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "rounds.json"
    file.write_bytes(content)
    with pytest.raises(StorageError, match="restore it, or remove it"):
        RoundBook(file).count(9, "a", NOON)
    assert file.read_bytes() == content


def test_a_count_that_cannot_be_kept_lets_nothing_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise StorageError("no space")

    monkeypatch.setattr(policy_file, "write_json", full)
    with pytest.raises(StorageError, match="no space"):
        RoundBook(tmp_path / "rounds.json").count(9, "a", NOON)
