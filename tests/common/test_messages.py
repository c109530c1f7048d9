"""Plans and settings: what an institution is told, and what of it a digest covers."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from importlib.metadata import version

import pytest

from common import messages, policy_reasons
from common.base_model import Fingerprint
from common.config import Config, FederationConfig, LoraConfig, QuantiseConfig
from common.errors import ConfigError, Refusal
from common.messages import PROTOCOL, REASONS, Hello, Plan, Refused, SecurePlan, Settings
from common.secagg import reasons as secagg_reasons
from common.secagg.terms import Terms

SETTINGS = Settings.of(Config(seed=7))
PLAN = Plan("run-1", 2, ("north", "south"), 12, "ab" * 32, Fingerprint("c", "w", "t"), SETTINGS)
SECURE = replace(
    PLAN,
    cohort=("east", "north", "south", "west"),
    secure=SecurePlan(3, "cd" * 32, Terms.of(5, 1, 3), length=42, ring_bits=23),
)


def test_settings_are_taken_from_the_configuration() -> None:
    config = Config(seed=9, federation=FederationConfig(rounds=3, method="ffa", weighting="uniform", weight_unit=2))
    config = replace(config, data=replace(config.data, name="discharge-letters"))
    settings = Settings.of(config)
    assert (settings.seed, settings.rounds, settings.method) == (9, 3, "ffa")
    assert settings.data_set == "discharge-letters"
    assert (settings.weighting, settings.weight_unit) == ("uniform", 2)
    assert (settings.lora, settings.train, settings.quantise) == (config.lora, config.train, config.quantise)


def test_settings_come_back_from_their_text() -> None:
    settings = replace(SETTINGS, lora=LoraConfig(rank=3, alpha=1e-7, target_modules=["a.b", "c"]), method="new-in-2027")
    assert Settings.from_json(settings.to_json()) == settings
    assert Settings.from_json(settings.to_json()).to_json() == settings.to_json()
    assert settings.to_json() != SETTINGS.to_json()


def altered(path: str, value: object) -> str:
    """The settings' text with one value replaced, or added."""
    found = json.loads(SETTINGS.to_json())
    *sections, key = path.split(".")
    inner = found
    for section in sections:
        inner = inner[section]
    inner[key] = value
    return json.dumps(found)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "7",
        "{}",
        "[" * 100_000,
        altered("unknown", 1),
        altered("lora.unknown", 1),
        altered("lora", None),
        altered("lora", []),
        altered("train", {}),
        altered("seed", "7"),
        altered("seed", True),
        altered("seed", 1.0),
        altered("seed", -1),
        altered("seed", 2**64),
        altered("data_set", ""),
        altered("data_set", None),
        altered("data_set", ["records"]),
        altered("data_set", "../records"),
        altered("data_set", "/etc/passwd"),
        altered("data_set", "Records"),
        altered("data_set", "records\n"),
        altered("data_set", "r" * 65),
        altered("data_set", "\ud800"),
        altered("rounds", 0),
        altered("evaluate", 1),
        altered("weighting", "by-hand"),
        altered("weight_unit", 0),
        altered("method", None),
        altered("lora.rank", "4"),
        altered("lora.rank", 0),
        altered("lora.alpha", float("nan")),
        altered("lora.dropout", 1.0),
        altered("lora.target_modules", "q_proj"),
        altered("lora.target_modules", []),
        altered("lora.target_modules", ["q_proj", 3]),
        altered("train.learning_rate", float("inf")),
        altered("train.learning_rate", 10**400),
        altered("train.max_tokens", 1),
        altered("train.optimizer_state", "burn"),
        altered("quantise.clip", 0),
        altered("quantise.bits", 1),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="settings of a plan cannot be"):
        Settings.from_json(text)


def test_a_whole_number_will_do_for_a_fraction() -> None:
    assert Settings.from_json(altered("lora.alpha", 8)).lora.alpha == 8


def other_values(value: object) -> object:
    match value:
        case Fingerprint():
            return replace(value, weights="other")
        case Settings():
            return replace(value, train=replace(value.train, learning_rate=value.train.learning_rate * 2))
        case tuple():
            return value[::-1]
        case int():
            return value + 1
        case None:
            return SECURE.secure
        case _:
            return f"{value}x"


@pytest.mark.parametrize("name", [field.name for field in fields(Plan)])
def test_the_digest_covers_every_field_of_a_plan(name: str) -> None:
    assert PLAN.digest() == replace(PLAN).digest()
    assert replace(PLAN, **{name: other_values(getattr(PLAN, name))}).digest() != PLAN.digest()


@pytest.mark.parametrize("name", [field.name for field in fields(SecurePlan)])
def test_the_digest_covers_every_field_of_secure_aggregation(name: str) -> None:
    assert SECURE.secure is not None
    value = getattr(SECURE.secure, name)
    other = Terms.of(7, 1, 3) if isinstance(value, Terms) else other_values(value)
    assert replace(SECURE, secure=replace(SECURE.secure, **{name: other})).digest() != SECURE.digest()


@pytest.mark.parametrize(
    "other", [Terms.of(6, 1, 3), Terms(5, 1, 5, 3), Terms.of(5, 1, 4), Terms(5, 2, 4, 4), Terms(5, 1, 4, 4)]
)
def test_the_digest_covers_all_terms(other: Terms) -> None:
    assert SECURE.secure is not None
    assert replace(SECURE, secure=replace(SECURE.secure, terms=other)).digest() != SECURE.digest()


def test_an_attempt_is_bound_to_the_whole_plan() -> None:
    assert SECURE.secure is not None
    attempt = SECURE.attempt
    assert (attempt.run, attempt.round, attempt.attempt) == ("run-1", 2, 3)
    assert (attempt.plan, attempt.cohort) == (SECURE.digest(), SECURE.cohort)
    assert (attempt.terms, attempt.layout) == (SECURE.secure.terms, SECURE.layout)
    again = replace(SECURE, secure=replace(SECURE.secure, attempt=4))
    assert again.attempt.plan != attempt.plan
    assert replace(SECURE, adapter_digest="ef" * 32).attempt.plan != attempt.plan


def test_a_plan_in_the_clear_has_no_attempts() -> None:
    with pytest.raises(ConfigError, match="a plan without secure aggregation has no attempts"):
        _ = PLAN.attempt


@pytest.mark.parametrize(
    ("cohort", "said"),
    [
        (("north", "east", "south", "west"), "in order"),
        (("east", "east", "south", "west"), "in order"),
        (("east", "north", "south"), "expected a cohort of 4 to 5 members, found 3"),
        (("a", "b", "c", "d", "e", "f"), "expected a cohort of 4 to 5 members, found 6"),
    ],
)
def test_a_cohort_that_does_not_fit_the_terms_has_no_attempt(cohort: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _ = replace(SECURE, cohort=cohort).attempt


def test_the_digest_covers_the_data_set() -> None:
    assert replace(PLAN, settings=replace(SETTINGS, data_set="letters")).digest() != PLAN.digest()


@pytest.mark.parametrize("section", ["lora", "train", "quantise"])
def test_the_digest_covers_every_setting(section: str) -> None:
    part = getattr(SETTINGS, section)
    for name, value in asdict(part).items():
        other = [*value, "x"] if isinstance(value, list) else f"{value}x" if isinstance(value, str) else value + 1
        settings = replace(SETTINGS, **{section: replace(part, **{name: other})})
        assert replace(PLAN, settings=settings).digest() != PLAN.digest(), name


def test_the_layout_follows_from_the_plan() -> None:
    layout = PLAN.layout
    assert (layout.parameters, layout.members) == (12, 2)
    assert (layout.clip, layout.bits, layout.weight_bits) == (1.0, 16, 4)
    wide = replace(PLAN, settings=replace(SETTINGS, quantise=QuantiseConfig(bits=25, weight_bits=8)))
    with pytest.raises(ConfigError, match="need 34 bits"):
        _ = wide.layout
    with pytest.raises(ConfigError, match="1 institution"):
        _ = replace(PLAN, cohort=()).layout


def test_a_repeat_with_fewer_members_keeps_the_layout_of_the_first_attempt() -> None:
    """Else the same vector could not be sent again."""
    assert SECURE.layout.members == 5
    assert replace(SECURE, cohort=(*SECURE.cohort, "west-2")).layout == SECURE.layout


def test_reason_codes_are_single_words() -> None:
    assert all(reason.replace("_", "").isalpha() and reason.islower() for reason in REASONS)
    assert secagg_reasons.REASONS | policy_reasons.REASONS < REASONS
    codes = [value for name, value in vars(messages).items() if name.isupper() and isinstance(value, str)]
    assert sorted(codes) == sorted(REASONS - secagg_reasons.REASONS - policy_reasons.REASONS)
    assert not secagg_reasons.REASONS & policy_reasons.REASONS


def test_a_refusal_leaves_in_the_words_of_the_protocol_only() -> None:
    detail = "/data/patients.csv: line 17"
    for reason in REASONS:
        assert Refused.of(Refusal(reason, detail), "north") == Refused(reason, "north")
    parts = ("weights", "3", "0.1.0", "1.0rc1", "0.2.0.dev3")
    assert Refused.of(Refusal("base_model_differs", detail, parts)) == Refused("base_model_differs", "", parts)


@pytest.mark.parametrize(
    "mistaken",
    [
        Refusal("cannot read /data/patients.csv"),
        Refusal(""),
        Refusal("Malformed"),
        Refusal("malformed "),
        Refusal("malformed", "", ("patients",)),
        Refusal("base_model_differs", "", ("weights", "/data/patients.csv")),
        Refusal("malformed", "", ("17 records",)),
        Refusal("malformed", "", ("1.2.3.4.5",)),
        Refusal("malformed", "", ("",)),
        Refusal("malformed", "", ("3\n",)),
        Refusal("malformed", "", ("\u0663",)),
    ],
    ids=repr,
)
def test_a_refusal_in_other_words_is_a_mistake_and_says_nothing(mistaken: Refusal) -> None:
    assert Refused.of(mistaken, "north") == Refused("internal_error", "north")


def test_there_is_one_code_for_each_thing_that_can_be_refused() -> None:
    for module in (secagg_reasons, policy_reasons):
        codes = [value for name, value in vars(module).items() if name.isupper() and name != "REASONS"]
        assert sorted(codes) == sorted(module.REASONS)


def test_the_protocol_is_the_third() -> None:
    """A member that speaks another one is told so at Hello, and nothing else is tried."""
    assert PROTOCOL == 3


def test_a_hello_says_the_whole_run() -> None:
    config = Config(seed=7)
    fingerprint = Fingerprint("c", "w", "t")
    hello = Hello.of(config, "run-1", fingerprint, "ab" * 32)
    assert hello == Hello(PROTOCOL, version("silotune"), "run-1", fingerprint, Settings.of(config), "ab" * 32)
    assert Hello.of(config, "run-1", fingerprint).roster == ""
