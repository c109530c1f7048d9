"""The configuration: what is accepted, what is told of what is not, and that nothing of the machine leaks in."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import (
    ArmConfig,
    ColumnsConfig,
    CompareConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    FederationConfig,
    InstitutionConfig,
    LoraConfig,
    ModelConfig,
    QuantiseConfig,
    SecureAggregationConfig,
    ServerOptimizerConfig,
    SimulationConfig,
    TrainConfig,
    named,
)
from common.config_files import configs_dir, digest, load, parse, to_yaml, validate
from common.config_rules import AGREEMENTS, RULES
from common.errors import ConfigError
from common.methods import NEEDS_SINGLE_UPDATES, FedAvg

SMALLEST = "data: {institutions: [a, b, c], train_records: [3, 4, 5]}"
PAIR = "data: {institutions: [a, b], train_records: [3, 4]}"
OFF = "secure_aggregation.enabled=false"


def mistakes(text: str = SMALLEST, *overrides: str) -> list[str]:
    """The lines of the error, without the first, which counts them."""
    with pytest.raises(ConfigError) as caught:
        parse(text, "test.yaml", overrides)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("test.yaml")
    assert re.findall(r"\d+", first) == [str(len(lines))]
    return [line.strip() for line in lines]


def leaves(section: type, prefix: str = "") -> list[str]:
    found = []
    for field in dataclasses.fields(section):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(default):
            found += leaves(type(default), f"{prefix}{field.name}.")
        else:
            found.append(prefix + field.name)
    return found


# --- What is accepted


def test_a_shipped_name_and_a_path_load_the_same() -> None:
    assert load("hospitals") == load(str(configs_dir() / "hospitals.yaml"))


def test_a_name_means_the_shipped_file_whatever_lies_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hospitals").write_text("not: [this")
    assert load("hospitals").name == "hospitals"


def test_defaults_fill_what_a_file_leaves_out() -> None:
    config = parse(SMALLEST, "test.yaml")
    assert config == Config(data=DataConfig(institutions=named("a", "b", "c"), train_records=[3, 4, 5]))
    assert config.secure_aggregation.enabled


def test_the_result_is_frozen() -> None:
    config = parse(SMALLEST, "test.yaml")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.batch_size = 9  # type: ignore[misc]


def test_overrides_win_over_the_file_and_later_ones_over_earlier() -> None:
    config = load("hospitals", ["train.batch_size=8", "train.batch_size=2", "federation.server_optimizer.name=fedadam"])
    assert config.train.batch_size == 2
    assert config.federation.server_optimizer.name == "fedadam"
    assert config.train.learning_rate == load("hospitals").train.learning_rate


def test_an_override_may_hold_equal_signs_sections_and_nothing() -> None:
    config = parse(SMALLEST, "test.yaml", ["model.path=/models/a=b", "train={batch_size: 2}", "data.directory="])
    assert (config.model.path, config.train.batch_size, config.data.directory) == ("/models/a=b", 2, "")
    assert config.train.max_tokens == TrainConfig().max_tokens


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("all-linear", ["all-linear"]),
        ("q_proj", ["q_proj"]),
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
    ],
)
def test_target_modules_may_be_a_list_or_text_with_commas(written: str, read: list[str]) -> None:
    assert parse(SMALLEST, "test.yaml", [f"lora.target_modules={written}"]).lora.target_modules == read


def test_a_list_of_counts_may_be_text_with_commas() -> None:
    assert parse(SMALLEST, "test.yaml", ["data.train_records=5,6,7"]).data.train_records == [5, 6, 7]


def test_kinds_to_score_may_be_none() -> None:
    assert parse(SMALLEST, "test.yaml", ["evaluation.exact=[]"]).evaluation.exact == []
    assert parse(SMALLEST, "test.yaml", ["evaluation.exact="]).evaluation.exact == []


def test_a_key_may_refer_to_another() -> None:
    config = parse(SMALLEST, "test.yaml", ["compare.local.batch_size=${train.batch_size}", "train.batch_size=7"])
    assert config.compare.local.batch_size == 7


def test_with_a_directory_counts_may_be_left_out() -> None:
    config = parse("data: {directory: records, generator: '', institutions: [a, b, c]}", "test.yaml")
    assert config.data.train_records == []


# --- What is told


def test_all_mistakes_are_told_at_once() -> None:
    lines = mistakes(
        "trian: {batch_size: 3}\nlora: {rank: x}\n" + SMALLEST,
        "train.batch_size=0",
        "seed",
        "federation.fraction=0.5",
    )
    assert [line.split()[0] for line in lines] == [
        "override",
        "trian.batch_size:",
        "lora.rank:",
        "train.batch_size:",
        "federation.fraction:",
    ]


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("train.batchsize", "train.batch_size"),
        ("train.lr", "train.learning_rate"),
        ("learning_rate", "train.learning_rate"),
        ("train.rounds", "federation.rounds"),
        ("federate.rounds", "federation.rounds"),
        ("quantize.bits", "quantise.bits"),
        ("lora.r", "lora.rank"),
        ("compare.locl.batch_size", "compare.local.batch_size"),
        ("server_optimizer.momentum", "federation.server_optimizer.momentum"),
        ("sed", "seed"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(unknown: str, nearest: str) -> None:
    assert mistakes(SMALLEST, f"{unknown}=1") == [f"{unknown}: unknown key; the nearest known one is {nearest}"]


def test_an_unknown_section_is_named_as_such() -> None:
    assert mistakes("trian: {}\n" + SMALLEST) == ["trian: unknown key; the nearest known one is train"]


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("train.batch_size=4.5", "4.5"),
        ("train.batch_size=many", "'many'"),
        ("train.batch_size=true", "True"),
        ("train.batch_size=null", "nothing"),
        ("train.batch_size=[4]", "[4]"),
        ("train.batch_size=???", "'???'"),
        ("train.learning_rate=fast", "'fast'"),
        ("train.learning_rate=", "''"),
        ("compare.enabled=perhaps", "'perhaps'"),
        ("name={a: 1}", "{'a': 1}"),
        ("data.train_records=[1, x]", "[1, 'x']"),
        ("data.institutions=[[a], b]", "[['a'], 'b']"),
        ("data.institutions={a: b}", "{'a': 'b'}"),
        ("lora.target_modules=[null]", "[None]"),
    ],
)
def test_a_wrong_type_says_field_value_and_what_is_allowed(override: str, found: str) -> None:
    key = override.partition("=")[0]
    assert mistakes(SMALLEST, override) == [f"{key}: found {found}; allowed: {RULES[key].allowed}"]


@pytest.mark.parametrize(
    "override",
    [
        "name=a/b",
        "name=..",
        "seed=-1",
        "model.path=",
        "model.digest=0123",
        f"model.digest={'A' * 64}",
        f"model.digest={'a' * 65}",
        "lora.rank=0",
        "lora.alpha=-1",
        "lora.dropout=1.0",
        "lora.target_modules=[]",
        "lora.target_modules=q_proj,q_proj",
        "lora.target_modules=q_proj,all-linear",
        "data.name=",
        "data.name=Notes",
        "data.name=../notes",
        "data.name=a/b",
        "data.name=-notes",
        f"data.name={'n' * 65}",
        "data.generator=shops",
        "data.institutions=[a, a]",
        "data.institutions=[a, B]",
        "data.institutions=[a, ../b]",
        "data.institutions=[a, coordinator]",
        "data.train_records=[1, 0]",
        "data.dirichlet=0",
        "train.learning_rate=.nan",
        "train.learning_rate=.inf",
        "train.warmup=1.1",
        "train.optimizer_state=lose",
        "train.proximal=-0.1",
        "federation.method=fedprox",
        "federation.weighting=size",
        "federation.fraction=0",
        "federation.fraction=1.01",
        "federation.min_cohort=1",
        "federation.gather_s=0",
        "federation.gather_s=.inf",
        "secure_aggregation.colluders=0",
        "secure_aggregation.repeats=-1",
        "secure_aggregation.timeout_s=0",
        "secure_aggregation.timeout_s=.inf",
        "federation.server_optimizer.momentum=1",
        "quantise.clip=.inf",
        "quantise.bits=1",
        "evaluation.patience=-1",
        "simulation.actors=0",
    ],
)
def test_an_impossible_value_says_field_value_and_what_is_allowed(override: str) -> None:
    key = override.partition("=")[0]
    (line,) = mistakes(SMALLEST, override)
    assert line.startswith(f"{key}: found ")
    assert line.endswith(f"; allowed: {RULES[key].allowed}")


def test_every_field_has_a_rule_and_every_rule_a_field() -> None:
    assert list(RULES) == leaves(Config)
    assert all(key in RULES for agreement in AGREEMENTS for key in agreement.keys)


FILES = (
    "data: {institutions: [{name: a, path: a.csv, person: pid, columns: {text: note}}, {name: b, path: b.jsonl},"
    " {name: c, path: c.jsonl}]}"
)


def test_institutions_may_bring_files_with_columns_of_their_own() -> None:
    config = parse(FILES, "test.yaml")
    assert config.data.names == ("a", "b", "c")
    assert config.data.has_files
    assert config.data.institutions[0] == InstitutionConfig(
        name="a", path="a.csv", person="pid", columns=ColumnsConfig(text="note")
    )
    assert parse(to_yaml(config), "again") == config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "data.institutions=[{name: a, path: x, persn: pid}]",
            "where persn is unknown and the nearest known key is person",
        ),
        ("data.institutions=[{name: a, columns: {txt: n}}]", "where txt is unknown and the nearest known key is text"),
        ("data.institutions=[{name: a, columns: 5}, b]", "columns: found 5"),
        ("data.institutions=[{name: a, path: x}, b]", "a path for each or for none"),
        ("data.institutions=[{path: x}, {path: y}]", "names all different"),
        ("data.directory=records", "found 'records', and a path in data.institutions; allowed: one of the two"),
        ("data.held_out=0.25", "allowed: a number above 0, below 0.25"),
        ("train.overlap=256", "allowed: less than train.max_tokens = 256"),
    ],
)
def test_what_cannot_be_meant_of_files_is_told(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse(FILES, "test.yaml", [override])


def test_the_coordinators_file_stands_beside_files_only() -> None:
    with pytest.raises(ConfigError, match=r"data\.coordinator\.path: found 'c\.csv', and no path"):
        parse(SMALLEST, "test.yaml", ["data.coordinator.path=c.csv"])


def test_counts_and_institutions_must_agree() -> None:
    (line,) = mistakes(SMALLEST, "data.train_records=[1]")
    assert "1 counts for 3 institutions" in line


def test_patients_are_protected_only_where_files_say_whose_a_record_is() -> None:
    files = "data: {generator: '', institutions: [%s, {name: b, path: b.csv}, {name: c, path: c.csv}]}"
    private = ["privacy.mode=patient", "privacy.epsilon=8"]
    text = files % "{name: a, path: a.csv, person: '-'}"
    (line,) = mistakes(text, *private)
    assert line.startswith("privacy.mode: found patient, and no column of persons at a,")
    assert "allowed: record" in line
    for mode, told in (("patient", files % "{name: a, path: a.csv}"), ("record", text)):
        assert parse(told, "test.yaml", [f"privacy.mode={mode}", private[1]]).privacy.mode == mode
    assert parse(SMALLEST, "test.yaml", private).privacy.mode == "patient"


def test_records_must_come_from_somewhere() -> None:
    (line,) = mistakes(SMALLEST, "data.generator=")
    assert line.startswith("data.generator:")
    assert "data.directory" in line
    assert "data.coordinator.path where institutions have their own" in line


# --- A deployment: records are with the institutions

DEPLOYED = "data: {name: notes, generator: '', institutions: [a, b, c], coordinator: {path: own.csv, person: pid}}"


def test_in_a_deployment_only_the_coordinators_records_and_a_name_are_said() -> None:
    data = parse(DEPLOYED, "test.yaml").data
    assert (data.name, data.generator, data.directory, data.has_files) == ("notes", "", "", False)
    assert (data.names, data.train_records) == (("a", "b", "c"), [])
    assert (data.coordinator.path, data.coordinator.person) == ("own.csv", "pid")
    assert parse(to_yaml(parse(DEPLOYED, "test.yaml")), "again").data == data


@pytest.mark.parametrize(
    "override",
    [
        "data.train_records=[3, 4, 5]",  # nobody uses them, and they fit
        f"model.digest={'0f' * 32}",
        "federation.gather_s=86400",
        f"data.name={'n' * 64}",
        "data.name=0_-",
    ],
)
def test_what_a_deployment_may_say_besides(override: str) -> None:
    parse(DEPLOYED, "test.yaml", [override])


@pytest.mark.parametrize(
    ("overrides", "key", "said"),
    [
        (["data.coordinator.path="], "data.generator", "or data.coordinator.path where institutions have their own"),
        (
            ["data.generator=hospitals", "data.train_records=[3, 4, 5]"],
            "data.coordinator.path",
            "allowed: beside those, or with an empty data.generator and data.directory where institutions have records",
        ),
        (["data.directory=records"], "data.coordinator.path", "with an empty data.generator and data.directory"),
        (
            ["data.institutions=[{name: a, path: a.csv}, b, c]"],
            "data.institutions",
            "a path for each or for none",
        ),
        (["data.train_records=[3, 4]"], "data.train_records", "found 2 counts for 3 institutions"),
        (["data.name=../notes"], "data.name", "a name of a-z, 0-9, - and _"),
    ],
)
def test_what_a_deployment_cannot_mean_is_told(overrides: list[str], key: str, said: str) -> None:
    (line,) = mistakes(DEPLOYED, *overrides)
    assert line.startswith(f"{key}: ")
    assert said in line


def test_files_of_institutions_may_stand_beside_the_coordinators_with_or_without_a_generator() -> None:
    for overrides in ([], ["data.generator="]):
        config = parse(FILES, "test.yaml", ["data.coordinator.path=own.csv", *overrides])
        assert config.data.has_files


def test_a_generated_federation_needs_its_counts() -> None:
    (line,) = mistakes("data: {institutions: [a, b, c]}")
    assert "found 0 counts for 3 institutions" in line


def test_a_round_must_draw_at_least_the_smallest_cohort() -> None:
    ten = f"data: {{institutions: [{', '.join('abcdefghij')}], train_records: [{', '.join('1' * 10)}]}}"
    assert parse(ten, "test.yaml", ["federation.fraction=0.7", "federation.min_cohort=7"]).federation.fraction == 0.7
    (line,) = mistakes(ten, "federation.fraction=0.6", "federation.min_cohort=7")
    assert "draws 6 of 10" in line
    assert "federation.min_cohort = 7" in line


@pytest.mark.parametrize(("institutions", "most"), [(3, 26), (4, 26), (5, 25), (16, 24), (17, 23)])
def test_the_sum_must_fit_the_ring(institutions: int, most: int) -> None:
    text = federation_of(institutions)
    assert parse(text, "test.yaml", [f"quantise.bits={most}"]).quantise.bits == most
    (line,) = mistakes(text, f"quantise.bits={most + 1}")
    assert f"allowed: at most {most}," in line
    assert "a ring of at most 32 bits" in line


# --- What secure aggregation asks for


def federation_of(institutions: int) -> str:
    """So many institutions and nothing else."""
    names = ", ".join(f"i{n}" for n in range(institutions))
    return f"data: {{institutions: [{names}], train_records: [{', '.join('1' * institutions)}]}}"


def test_with_fewer_than_three_a_sum_tells_one_the_others_update() -> None:
    (line,) = mistakes(PAIR)
    assert line == (
        "data.institutions: found 2; allowed: at least 3 of them with secure_aggregation.colluders = 1, since the sum"
        " over fewer would tell one institution another's update; or secure_aggregation.enabled=false and a"
        " federation.min_cohort of 2, with which the coordinator can read every update"
    )
    (line,) = mistakes(SMALLEST, "federation.min_cohort=2")
    assert line == (
        "federation.min_cohort: found 2; allowed: at least 3 with secure_aggregation.colluders = 1, since the sum over"
        " fewer would tell one institution another's update; or secure_aggregation.enabled=false, with which the"
        " coordinator can read every update"
    )
    both = mistakes(PAIR, "federation.min_cohort=2")
    assert [line.partition(":")[0] for line in both] == ["federation.min_cohort", "data.institutions"]


def test_what_the_message_offers_can_be_meant() -> None:
    assert parse(PAIR, "test.yaml", [OFF, "federation.min_cohort=2"]).federation.min_cohort == 2
    assert parse(SMALLEST, "test.yaml", [OFF, "federation.min_cohort=2"]).data.names == ("a", "b", "c")
    (line,) = mistakes(PAIR, OFF)
    assert line == "data.institutions: found 2; allowed: at least federation.min_cohort = 3 of them"


def test_more_colluders_need_a_larger_cohort() -> None:
    five = federation_of(5)
    assert parse(five, "test.yaml", ["secure_aggregation.colluders=3", "federation.min_cohort=5"])
    (line,) = mistakes(five, "secure_aggregation.colluders=3", "federation.min_cohort=4")
    assert line.startswith("federation.min_cohort: found 4; allowed: at least 5 with secure_aggregation.colluders = 3,")
    assert "would tell 3 institutions that collude another's update" in line
    lines = mistakes(five, "secure_aggregation.colluders=4", "federation.min_cohort=6")
    assert lines[0].startswith("data.institutions: found 5; allowed: at least 6 of them with")
    (line,) = mistakes(five, "federation.min_cohort=9")
    assert line == "data.institutions: found 5; allowed: at least federation.min_cohort = 9 of them"


@pytest.mark.parametrize("overrides", [[], [OFF]])
@pytest.mark.parametrize("name", NEEDS_SINGLE_UPDATES)
def test_methods_on_single_updates_are_refused_with_the_reason(name: str, overrides: list[str]) -> None:
    (line,) = mistakes(SMALLEST, f"federation.method={name}", *overrides)
    assert line.startswith(f"federation.method: found '{name}'; allowed: fedavg or ffa (")
    assert NEEDS_SINGLE_UPDATES[name] in line
    assert "secure aggregation hides" in line
    assert "use fedavg, or ffa, whose average is exact" in line


class Stacked(FedAvg):
    """A method that needs every update by itself."""

    name = "stacked"
    linear = False


def test_a_method_that_is_not_linear_is_refused_under_secure_aggregation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.methods.METHODS", {"fedavg": FedAvg(), "stacked": Stacked()})
    (line,) = mistakes(SMALLEST, "federation.method=stacked")
    assert line == (
        "federation.method: found 'stacked', which needs single updates, and secure aggregation hides them; allowed:"
        " fedavg; or secure_aggregation.enabled=false, with which the coordinator can read every update"
    )
    assert parse(SMALLEST, "test.yaml", ["federation.method=stacked", OFF]).federation.method == "stacked"


def test_sixteen_institutions_send_three_bytes_a_parameter() -> None:
    quantise = parse(federation_of(16), "test.yaml").quantise
    assert quantise.bits + quantise.weight_bits + 4 == 24


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 1\ntrain: {batch_size: [1\n", "line 3, column 1: not valid YAML"),
        ("seed: 1\nseed: 2\n", "line 2, column 1: not valid YAML: found duplicate key seed"),
        ("a: b: c", "line 1, column 5: not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("- a\n- b\n", "expected sections"),
    ],
)
def test_text_that_is_no_yaml_mapping_is_told_with_its_line_and_nothing_else(text: str, line: str) -> None:
    (found,) = mistakes(text)
    assert found.startswith(line)


def test_yaml_builds_no_objects() -> None:
    (line,) = mistakes("name: !!python/object/apply:os.getcwd []")
    assert "not valid YAML" in line


@pytest.mark.parametrize("section", ["train:", "train: 5", "train: [1]", "train: ${lora}"])
def test_a_section_that_is_none_lists_its_keys_and_its_fields_are_not_told_as_well(section: str) -> None:
    (line,) = mistakes(f"{section}\n{SMALLEST}")
    assert line.startswith("train: found ")
    assert "batch_size, learning_rate" in line


@pytest.mark.parametrize("override", ["seed", "=3", "a b=3", "train..seed=3", "3=3", "--seed=3", ".seed=1", ""])
def test_a_malformed_override_is_quoted(override: str) -> None:
    (line,) = mistakes(SMALLEST, override)
    assert line.startswith(f"override {override!r}: ")
    assert "train.batch_size=8" in line


def test_an_override_with_a_broken_value_is_quoted() -> None:
    (line,) = mistakes(SMALLEST, "data.train_records=[1,")
    assert line.startswith("override 'data.train_records=[1,': its value is not valid YAML")


def test_an_unknown_name_lists_those_that_exist() -> None:
    with pytest.raises(
        ConfigError,
        match=r"'hospital' \(did you mean hospitals\?\).*"
        "banks, clinics, deployment, hospitals, hospitals-private, smoke",
    ):
        load("hospital")


@pytest.mark.parametrize("path", ["nowhere.yaml", "./hospitals", "some/where.yml"])
def test_a_missing_file_is_named(path: str) -> None:
    with pytest.raises(ConfigError, match=f"no such file: '{re.escape(path)}'"):
        load(path)


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load(str(binary))


def test_a_configuration_built_in_code_is_held_to_the_same_rules() -> None:
    with pytest.raises(ConfigError) as caught:
        validate(Config(lora=LoraConfig(rank=0)))
    assert "lora.rank: found 0" in str(caught.value)
    assert "data.institutions: found []" in str(caught.value)
    validate(load("banks"))


# --- What must not leak


SECRET = "a-secret-of-this-machine"


@pytest.mark.parametrize(
    "text",
    [
        "name: ${oc.env:SILOTUNE_TEST}",
        "name: ${oc.env:SILOTUNE_TEST,fallback}",
        "name: prefix-${oc.env:SILOTUNE_TEST}",
        "name: ${oc.decode:${oc.env:SILOTUNE_TEST}}",
        "name: ${oc.${model.path}:SILOTUNE_TEST}\nmodel: {path: env}",
        "name: ${model.path}\nmodel: {path: '${oc.env:SILOTUNE_TEST}'}",
        "seed: ${model.path}\nmodel: {path: '${oc.env:SILOTUNE_TEST}'}",
        "seed: ${extra}\nextra: ${oc.env:SILOTUNE_TEST}",
        "name: ${model.path}${federation.method}\nmodel: {path: $}\nfederation: {method: '{oc.env:SILOTUNE_TEST}'}",
        "name: $${model.path}\nmodel: {path: '{oc.env:SILOTUNE_TEST}'}",
        r"name: \${oc.env:SILOTUNE_TEST}",
        "lora: {target_modules: ['${oc.env:SILOTUNE_TEST}']}",
        "evaluation: {exact: '${oc.env:SILOTUNE_TEST}'}",
        "seed: {'${oc.env:SILOTUNE_TEST}': 1}",
    ],
)
def test_the_environment_is_neither_read_nor_shown(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SILOTUNE_TEST", SECRET)
    lines = mistakes(f"{text}\n{SMALLEST}")
    assert SECRET not in "\n".join(lines)


@pytest.mark.parametrize(
    "override", ["seed=${seed}", "seed=${train.batch_size}", "seed=${nowhere}", "seed=${train}", "seed=${"]
)
def test_a_reference_that_gives_no_value_is_told(override: str) -> None:
    lines = mistakes(SMALLEST, override, "train.batch_size=${seed}")
    assert any("seed" in line for line in lines)


# --- Writing


def numbers(least: float, most: float, **options: bool) -> st.SearchStrategy[float]:
    return st.floats(least, most, allow_nan=False, **options)


NAMES = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,8}", fullmatch=True).filter(lambda name: name != "coordinator")
PATHS = st.text(min_size=1).filter(lambda path: bool(path.strip()) and path == path.strip() and "${" not in path)
SEEDS = st.integers(0, 2**32 - 1)
RATES = numbers(0, 1e300, exclude_min=True)
COUNTS = st.integers(1, 10**12)
ARMS = st.builds(ArmConfig, batch_size=COUNTS, learning_rate=RATES)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    institutions = draw(st.lists(NAMES, min_size=3, max_size=8, unique=True))
    fields = st.builds(
        Config,
        name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True),
        seed=SEEDS,
        model=st.builds(ModelConfig, path=PATHS),
        lora=st.builds(
            LoraConfig,
            rank=COUNTS,
            alpha=RATES,
            dropout=numbers(0, 1, exclude_max=True),
            target_modules=st.sampled_from([["all-linear"], ["q_proj"], ["q_proj", "v_proj"], ["1.5", "null"]]),
        ),
        data=st.builds(
            DataConfig,
            generator=st.sampled_from(["hospitals", "banks"]),
            directory=st.just("") | PATHS,
            institutions=st.just(named(*institutions)),
            train_records=st.lists(COUNTS, min_size=len(institutions), max_size=len(institutions)),
            dirichlet=numbers(0.01, 1e6),
            seed=SEEDS,
        ),
        train=st.builds(TrainConfig, learning_rate=RATES, proximal=numbers(0, 1e9), batch_size=COUNTS),
        federation=st.builds(
            FederationConfig,
            rounds=COUNTS,
            method=st.sampled_from(["fedavg", "ffa"]),
            server_optimizer=st.builds(ServerOptimizerConfig, name=st.sampled_from(["fedavgm", "fedadam"])),
        ),
        secure_aggregation=st.builds(
            SecureAggregationConfig, enabled=st.booleans(), repeats=st.integers(0, 9), timeout_s=RATES
        ),
        quantise=st.builds(QuantiseConfig, clip=RATES, bits=st.integers(2, 20), weight_bits=st.integers(1, 8)),
        evaluation=st.builds(EvaluationConfig, exact=st.sampled_from([[], ["coding"], ["yes", "07", "1e3"]])),
        compare=st.builds(CompareConfig, enabled=st.booleans(), local=ARMS, pooled=ARMS),
        simulation=st.builds(SimulationConfig, actors=COUNTS, threads=COUNTS),
    )
    return draw(fields)


@settings(max_examples=40, deadline=None)  # OmegaConf takes tens of milliseconds to load
@given(configs())
def test_what_is_written_reads_back_equal(config: Config) -> None:
    validate(config)
    again = parse(to_yaml(config), "test.yaml")
    assert again == config
    assert digest(again) == digest(config)


def test_the_digest_tells_configurations_apart_and_not_their_sources() -> None:
    hospitals = load("hospitals")
    assert re.fullmatch(r"[0-9a-f]{64}", digest(hospitals))
    assert digest(hospitals) == digest(load("hospitals", [f"seed={hospitals.seed}"]))
    assert digest(hospitals) == digest(
        dataclasses.replace(hospitals, lora=dataclasses.replace(hospitals.lora, alpha=32))
    )
    assert digest(hospitals) != digest(load("hospitals", ["seed=99"]))
    assert digest(hospitals) != digest(load("hospitals", ["compare.local.batch_size=99"]))


def test_where_curves_go_is_not_part_of_the_digest_so_that_a_run_outlives_its_service() -> None:
    hospitals = load("hospitals")
    assert digest(load("hospitals", ["tracking.mlflow=sqlite:///m.db", "tracking.tensorboard=false"])) == digest(
        hospitals
    )


# --- Differential privacy

NOISY = "privacy.noise_multiplier=1.0"


@pytest.mark.parametrize("mode", ["record", "patient", "institution", "distributed"])
def test_under_differential_privacy_dropout_and_weighting_that_are_left_out_fit_it(mode: str) -> None:
    config = parse(SMALLEST, "test.yaml", [f"privacy.mode={mode}", NOISY])
    assert (config.lora.dropout, config.federation.weighting) == (0.0, "uniform")
    assert config.privacy.private
    plain = parse(SMALLEST, "test.yaml")
    assert (plain.lora.dropout, plain.federation.weighting) == (LoraConfig().dropout, FederationConfig().weighting)
    assert not plain.privacy.private


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["privacy.mode=record"],
            "privacy.epsilon: found neither it nor privacy.noise_multiplier, with privacy.mode =",
        ),
        (["privacy.epsilon=8"], "privacy.epsilon: found 8, with privacy.mode = none, which adds no noise; allowed: a"),
        ([NOISY], "privacy.noise_multiplier: found 1, with privacy.mode = none, which adds no noise; allowed: a"),
        (["privacy.mode=record", NOISY, "privacy.epsilon=3.0"], "allowed: exactly one of the two above 0"),
        (["privacy.mode=patient", NOISY, "lora.dropout=0.1"], "lora.dropout: found 0.1; allowed: 0 with"),
        (
            ["privacy.mode=record", NOISY, "federation.weighting=records"],
            "federation.weighting: found records; allowed: uniform",
        ),
        (["privacy.mode=institution", NOISY, OFF], "privacy.mode: found institution, whose noise is in the sum only"),
        (["privacy.mode=distributed", NOISY, OFF], "privacy.mode: found distributed, whose noise is in the sum only"),
        (["privacy.mode=person", NOISY], "privacy.mode: found 'person'"),
    ],
)
def test_what_privacy_cannot_go_with_is_told(overrides: list[str], told: str) -> None:
    (line,) = mistakes(SMALLEST, *overrides)
    assert told in line


@pytest.mark.parametrize("mode", ["record", "patient"])
def test_noise_of_an_institutions_own_needs_no_secure_aggregation(mode: str) -> None:
    assert parse(SMALLEST, "test.yaml", [f"privacy.mode={mode}", NOISY, OFF]).privacy.mode == mode


def test_a_password_does_not_belong_into_a_configuration() -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD"):
        load("hospitals", ["tracking.mlflow=https://me:secret@host/path"])
    assert load("hospitals", ["tracking.mlflow=https://host/a@b"]).tracking.mlflow == "https://host/a@b"
