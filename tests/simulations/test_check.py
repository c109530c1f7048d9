"""`silotune-sim check` as a person meets it: what it counts, shows and warns of, and every bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

import simulations.main
from common.config import ModelConfig, TrainConfig
from common.examples import examples_of
from common.models import load_tokenizer
from common.records import Message, Record
from simulations import check as module
from simulations.check import shown
from tests.client.conftest import write_base_model, write_dynamic

NAMES = ("alder", "birch", "cedar")
COMMAND = [str(Path(sys.executable).with_name("silotune-sim"))]
CHATML = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)


def check(*arguments: str) -> Result:
    return CliRunner().invoke(simulations.main.app, ["check", *arguments])


def told(result: Result) -> str:
    """What was printed, on one line and without frames."""
    return " ".join((result.stdout + result.stderr).replace("│", " ").split())


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model of a few thousand parameters, made for 128 tokens, without a chat template."""
    return write_base_model(tmp_path_factory.mktemp("base"), seed=4)


@pytest.fixture
def with_tokenizer(model: Path, tmp_path: Path) -> Callable[..., Path]:
    """The same model with a tokenizer that lacks or has something."""

    def make(**changes: Any) -> Path:
        directory = tmp_path / "model"
        directory.mkdir()
        for file in model.iterdir():
            if not file.name.startswith("tokenizer"):
                (directory / file.name).symlink_to(file)
        tokenizer = AutoTokenizer.from_pretrained(model)
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(directory)
        return directory

    return make


@pytest.fixture
def own(tmp_path: Path, model: Path) -> Callable[..., list[str]]:
    """Writes jsonl files of three institutions and returns the arguments that name them."""

    def write(rows: Callable[[str, int], dict[str, Any]], *more: str, base: Path | None = None) -> list[str]:
        places = []
        for name in NAMES:
            file = tmp_path / f"{name}.jsonl"
            found = [{"person": f"{name}-{n}", **rows(name, n)} for n in range(60)]
            file.write_text("".join(json.dumps(row) + "\n" for row in found))
            places.append(f"{{name: {name}, path: {file}}}")
        settings = [
            f"model.path={base or model}",
            "evaluation.exact=[]",
            "data.train_records=[]",
        ]
        return ["smoke", f"data.institutions=[{', '.join(places)}]", *settings, *more]

    return write


def plain(name: str, number: int) -> dict[str, Any]:
    return {"prompt": f"{name} case {number} of {number * 7}", "completion": f"code {name} {number * 31}"}


def a_chat(name: str, number: int) -> dict[str, Any]:
    said = [("system", "You code."), ("user", f"{name} {number * 3}?"), ("assistant", f"code {number * 31} {name}")]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


# --- What it says


def test_a_generated_configuration_is_ready() -> None:
    result = check("smoke")
    assert result.exit_code == 0, told(result)
    assert told(result).endswith("smoke is ready")
    assert re.search(r"each institution sends [\d.]+ kB a round and receives [\d.]+ kB", told(result))
    for name in ("riverside", "northgate", "lakeside"):
        assert f"{name}: the first training record, as the model sees it" in told(result)


def test_the_json_has_counts_and_no_records(own: Callable[..., list[str]]) -> None:
    arguments = own(plain)
    result = check(*arguments, "--json")
    assert result.exit_code == 0, told(result)
    found = json.loads(result.stdout)
    assert (found["ready"], found["warnings"], found["model_loaded"]) == (True, [], True)
    assert sum(found["institutions"]["alder"]["records"].values()) < 60  # some are lent
    counts = found["institutions"]["birch"]["train"]
    assert counts["records"] == counts["examples"] == found["institutions"]["birch"]["records"]["train"]
    assert found["bytes_per_client_round"]["up"] > 0
    assert all(found["memory_bytes"]["alder"][part] > 0 for part in ("weights", "adapter", "activations", "logits"))
    assert "case" not in result.stdout + result.stderr
    assert "alder-" not in result.stdout + result.stderr
    assert "alder case" in told(check(*arguments))  # and without --json one is shown


def test_nothing_is_written(own: Callable[..., list[str]], tmp_path: Path) -> None:
    arguments = own(plain)
    work = tmp_path / "work"
    (work / "tmp").mkdir(parents=True)
    places = {"HOME": str(work), "TMPDIR": str(work / "tmp"), "PATH": "/usr/bin:/bin"}
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    done = subprocess.run(
        [*COMMAND, "check", *arguments], cwd=work, env=places, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before


def test_a_directory_is_checked_as_it_lies(own: Callable[..., list[str]], tmp_path: Path) -> None:
    arguments = own(plain)
    split = CliRunner().invoke(simulations.main.app, ["data", *arguments, "--out", str(tmp_path / "split")])
    assert split.exit_code == 0, told(split)
    there = [f"data.directory={tmp_path / 'split'}", f"data.institutions=[{', '.join(NAMES)}]", "data.train_records=[]"]
    settings = [argument for argument in arguments[2:] if not argument.startswith("data.")]
    by_directory = json.loads(check("smoke", *there, *settings, "--json").stdout)
    assert by_directory == json.loads(check(*arguments, "--json").stdout)


# --- What the federation hides


def test_it_says_what_the_coordinator_learns_and_who_may_fall_silent() -> None:
    said = told(check("smoke"))
    assert "secure aggregation is on: of 3 institutions a round none may fall silent;" in said
    found = json.loads(check("smoke", "--json").stdout)
    assert found["secure_aggregation"] == {
        "cohort": 3, "colluders": 1, "threshold": 3, "smallest_sum": 3, "dropouts": 0,
    }  # fmt: skip
    assert [note[:24] for note in found["notes"]] == ["secure aggregation is on"]


def test_without_secure_aggregation_a_warning_stands() -> None:
    off = "secure_aggregation.enabled=false"
    assert told(check("smoke", off)).endswith("can read every update smoke can run; 1 warning stands")
    found = json.loads(check("smoke", off, "--json").stdout)
    assert found["warnings"] == ["secure aggregation is off: the coordinator can read every update"]
    assert (found["ready"], found["secure_aggregation"], found["notes"]) == (False, None, [])


PATIENTS = ("privacy.mode=patient", "privacy.delta=0.001")


def test_it_says_what_differential_privacy_promises_and_that_there_is_none() -> None:
    noise = ("privacy.noise_multiplier=2", "privacy.sampling_rate=0.5")
    said = told(check("smoke", *PATIENTS, *noise))
    found = json.loads(check("smoke", *PATIENTS, *noise, "--json").stdout)["differential_privacy"]
    assert (found["mode"], found["unit"], found["noise_multiplier"], found["steps"]) == ("patient", "patient", 2, 4)
    assert f"is on, mode patient: epsilon at most {found['epsilon']:g} for each patient at delta 0.001" in said
    assert "differential privacy is off: nothing bounds what" in told(check("smoke"))
    assert json.loads(check("smoke", "--json").stdout)["differential_privacy"] is None


def test_an_epsilon_that_promises_little_is_warned_of() -> None:
    found = json.loads(check("smoke", *PATIENTS, "privacy.epsilon=30", "--json").stdout)
    assert [warning[:26] for warning in found["warnings"]] == ["privacy: found an epsilon "]


def test_records_that_are_left_out_are_counted(own: Callable[..., list[str]]) -> None:
    """Thirty persons of two records each at every institution; those in training have one too many."""

    def of_few(name: str, number: int) -> dict[str, Any]:
        return {**plain(name, number), "person": f"{name}-{number % 30}"}

    many = ("privacy.noise_multiplier=50", "privacy.records_per_person=1", "data.held_out=0.15")
    private = (*PATIENTS, *many)
    found = json.loads(check(*own(of_few, *private), "--json").stdout)
    for name in NAMES:
        (line,) = (line for line in found["warnings"] if line.startswith(f"{name}: ") and "left out" in line)
        records = found["institutions"][name]["records"]["train"]
        assert f"{records // 2} of {records} training records are left out, since {records // 2} persons have" in line
    other = ("privacy.mode=record", "privacy.delta=0.001", *many)
    assert json.loads(check(*own(of_few, *other), "--json").stdout)["warnings"] == []


@pytest.mark.parametrize(
    ("mode", "keys"),
    [
        ("record", ["batch_size", "max_grad_norm"]),
        ("patient", ["batch_size", "max_grad_norm"]),
        ("institution", []),
        ("distributed", ["batch_size", "max_grad_norm", "passes_per_round", "learning_rate"]),
    ],
)
def test_settings_without_effect_are_warned_of(mode: str, keys: list[str]) -> None:
    train = ("batch_size=7", "max_grad_norm=0.5", "passes_per_round=2", "learning_rate=0.5")
    chosen = [f"train.{one}" for one in train]
    private = (f"privacy.mode={mode}", "privacy.noise_multiplier=3", "privacy.delta=0.001")
    found = json.loads(check("smoke", *private, *chosen, "--json").stdout)
    assert [warning.split(":")[0] for warning in found["warnings"]] == [f"train.{key}" for key in keys]
    assert all(f"has no effect with privacy.mode = {mode}: " in warning for warning in found["warnings"])


def test_a_delta_that_means_nothing_is_warned_of() -> None:
    private = ("privacy.mode=patient", "privacy.noise_multiplier=2", "federation.weighting=uniform")
    found = json.loads(check("smoke", *private, "privacy.delta=0.05", "--json").stdout)
    assert (found["ready"], len(found["warnings"])) == (False, 1)
    assert found["warnings"][0].startswith("privacy.delta: found 0.05 for 14 patients that lakeside trains on")
    assert json.loads(check("smoke", *private, "privacy.delta=0.007", "--json").stdout)["ready"]


def test_a_weight_that_is_cut_is_noted_with_the_unit_that_fits() -> None:
    """16 records in units of 2 are 8, and three bits of weight end at 7."""
    small = ("federation.weight_unit=2", "quantise.weight_bits=3", "--json")
    _, *notes = json.loads(check("smoke", *small).stdout)["notes"]
    assert [note.partition(":")[0] for note in notes] == ["riverside", "northgate", "lakeside"]
    assert "its 16 training examples count as 14, the largest weight with federation.weight_unit = 2" in notes[0]
    assert "federation.weight_unit=3 would fit all institutions" in notes[0]
    for other in ("federation.weight_unit=3", "federation.weighting=uniform"):
        assert len(json.loads(check("smoke", *small, other).stdout)["notes"]) == 1


# --- What it warns of


def test_records_that_are_too_long(own: Callable[..., list[str]]) -> None:
    def long(name: str, number: int) -> dict[str, Any]:
        return {"text": f"{name} {number} " + " ".join(f"{name}{number}x{word}" for word in range(number % 24))}

    result = check(*own(long, "train.max_tokens=16", "train.overlap=4"))
    assert "records are longer than train.max_tokens = 16 and lose" in told(result)
    assert "of them lose tokens that are supervised. Raise train.max_tokens, or set train.long=chunk" in told(result)
    assert told(result).endswith("smoke can run; 4 warnings stand")
    chunked = json.loads(
        check(*own(long, "train.max_tokens=16", "train.long=chunk", "train.overlap=4"), "--json").stdout
    )
    assert chunked["warnings"] == []
    assert chunked["institutions"]["alder"]["train"]["chunked"] > 0
    beyond = check(*own(long, "train.max_tokens=200"))
    assert "tokens, and the base model was made for 128; set train.max_tokens=128 or less" in told(beyond)


def test_copies_and_persons_across_sets(own: Callable[..., list[str]], tmp_path: Path) -> None:
    texts = [
        f"the patient number {n} has a fever and a cough since {n} days and was sent to ward {n * 7}" for n in range(60)
    ]

    def copied(name: str, number: int) -> dict[str, Any]:
        # The others have each text again, other in case and white space, under another person.
        return {"text": texts[number] if name == "alder" else f"  {texts[number].upper()}\n"}

    found = json.loads(check(*own(copied), "--json").stdout)
    assert found["ready"] is False
    assert found["copies"]["held_out"] > 10
    assert any("repeat a training one word for word" in warning for warning in found["warnings"])

    def nearly(name: str, number: int) -> dict[str, Any]:
        return {"text": texts[number] + {"alder": "", "birch": " again", "cedar": " once more"}[name]}

    found = json.loads(check(*own(nearly), "--json").stdout)
    assert (found["copies"]["held_out"], found["copies"]["near"] > 10) == (0, True)

    def shared(name: str, number: int) -> dict[str, Any]:
        return {**plain(name, number), "person": f"mrn {number}"}

    arguments = own(shared)
    found = json.loads(check(*arguments, "--json").stdout)
    assert found["copies"]["persons_in_institutions"] > 20
    assert found["copies"]["persons_in_sets"] == 0
    assert "persons known at more than one institution: " in told(check(*arguments))


def test_a_person_in_two_sets_of_a_directory(own: Callable[..., list[str]], tmp_path: Path) -> None:
    arguments = own(plain)
    CliRunner().invoke(simulations.main.app, ["data", *arguments, "--out", str(tmp_path / "split")])
    train, test = (tmp_path / "split" / "alder" / f"{part}.jsonl" for part in ("train", "test"))
    person = json.loads(train.read_text().splitlines()[0])["person"]
    lines = [json.loads(line) for line in test.read_text().splitlines()]
    test.write_text("".join(json.dumps({**line, "person": person}) + "\n" for line in lines))
    there = [f"data.directory={tmp_path / 'split'}", f"data.institutions=[{', '.join(NAMES)}]", *arguments[2:]]
    assert "persons with records in more than one of train, validation and test: 1" in told(check("smoke", *there))


def test_kinds_that_nobody_will_be_asked(own: Callable[..., list[str]]) -> None:
    (warning,) = json.loads(check(*own(plain, "evaluation.exact=[coding]"), "--json").stdout)["warnings"]
    assert "no test record of the coordinator is of the kind coding" in warning
    assert "the records have 1 other kinds" in warning
    assert "text" not in warning  # a kind is a cell of the records, and this may be passed on


def test_a_model_that_leaves_no_room_is_not_tried(
    own: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "memory_of", lambda config: 50_000)
    found = json.loads(check(*own(plain), "--json").stdout)
    assert found["model_loaded"] is False
    assert any("was not loaded to try it" in warning for warning in found["warnings"])
    assert any("lower simulation.actors" in warning for warning in found["warnings"])


@pytest.mark.parametrize("compare", [True, False])
def test_memory_counts_every_model_that_a_run_holds(
    own: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, compare: bool
) -> None:
    arguments = own(plain, f"compare.enabled={str(compare).lower()}", "simulation.actors=2")
    found = json.loads(check(*arguments, "--json").stdout)["memory_bytes"].values()
    parts = ("weights", "adapter", "activations", "logits")
    total, weights = max((sum(one[part] for part in parts), one["weights"]) for one in found)
    needed = 2 * (total + weights) if compare else 2 * total + weights
    for room in (needed, needed - 1):
        monkeypatch.setattr(module, "memory_of", lambda config, room=room: room)
        warnings = json.loads(check(*arguments, "--json").stdout)["warnings"]
        assert any("lower simulation.actors" in warning for warning in warnings) == (room < needed)


# --- What it refuses


def refused(code: int, words: Sequence[str], *arguments: str) -> None:
    result = check(*arguments)
    assert result.exit_code == code, told(result)
    for word in words:
        assert word in told(result)
    assert "Traceback" not in told(result)


def test_a_base_in_which_units_change_each_other(own: Callable[..., list[str]], model: Path, tmp_path: Path) -> None:
    dynamic = Path(write_dynamic(model, tmp_path / "dynamic"))
    private = ["privacy.mode=record", "privacy.noise_multiplier=2", "federation.weighting=uniform"]
    refused(4, ["found rope_type: dynamic", "Use another base model"], *own(plain, *private, base=dynamic))
    assert check(*own(plain, base=dynamic)).exit_code == 0


def test_a_wrong_column(own: Callable[..., list[str]]) -> None:
    arguments = own(lambda name, n: {"note": "a"})
    refused(3, ["alder: ", "birch: ", "found the columns person, note", "Say what they are called"], *arguments)
    refused(3, ["expected a column 'mrn', which person names"], *[a.replace("}", ", person: mrn}") for a in own(plain)])


def test_a_wrong_encoding(own: Callable[..., list[str]], tmp_path: Path) -> None:
    arguments = own(plain)
    file = tmp_path / "birch.jsonl"
    file.write_bytes(file.read_bytes() + '{"person": "x", "completion": "é"}\n'.encode("latin-1"))
    refused(3, ["birch.jsonl: expected UTF-8, found other bytes in line 61"], *arguments)


def test_chats_without_a_template(own: Callable[..., list[str]]) -> None:
    refused(4, ["the tokenizer has no chat template", "records with prompt and completion"], *own(a_chat))


def test_a_template_that_cannot_write_the_records(
    own: Callable[..., list[str]], with_tokenizer: Callable[..., Path]
) -> None:
    base = with_tokenizer(chat_template="{{ raise_exception('only poems') }}")
    arguments = own(a_chat, base=base)
    refused(
        3, ["alder/train: record 1: the tokenizer's chat template cannot write message 3", "only poems"], *arguments
    )


def test_chats_with_a_template(own: Callable[..., list[str]], with_tokenizer: Callable[..., Path]) -> None:
    result = check(*own(a_chat, base=with_tokenizer(chat_template=CHATML)))
    assert result.exit_code == 0, told(result)
    assert "<s>system You code.</s>" in told(result)
    assert "<s>assistant ⟦code" in told(result)
    assert told(result).endswith("smoke is ready")


def test_a_template_that_fails_on_system_messages(
    own: Callable[..., list[str]], with_tokenizer: Callable[..., Path]
) -> None:
    result = check(*own(a_chat, base=with_tokenizer(chat_template=NO_SYSTEM)))
    assert result.exit_code == 0, told(result)
    assert "<s>user You code. alder" in told(result)
    assert "chats with the system's message before the first user's" in told(result)


def test_a_tokenizer_without_pad_and_begin_tokens(
    own: Callable[..., list[str]], with_tokenizer: Callable[..., Path]
) -> None:
    result = check(*own(plain, base=with_tokenizer(pad_token=None, bos_token=None)))
    assert result.exit_code == 0, told(result)
    assert told(result).endswith("smoke is ready")


def test_a_model_that_does_not_load(own: Callable[..., list[str]], with_tokenizer: Callable[..., Path]) -> None:
    refused(2, ["lora.target_modules", "wings"], *own(plain, "lora.target_modules=[q_proj, wings]"))
    refused(2, ["lora.target_modules", "wings"], *own(plain, "lora.target_modules=[wings]"))
    base = with_tokenizer()
    (base / "model.safetensors").unlink()
    refused(4, ["cannot be loaded as a causal language model"], *own(plain, base=base))


# --- The sample


def test_a_sample_shows_every_token_and_marks_what_is_supervised(model: Path) -> None:
    tokenizer = load_tokenizer(str(model))
    record = Record("cold </s> é [bold]x[/]", "warm tea", "p")
    (example,) = examples_of([record], tokenizer, TrainConfig()).examples
    text = shown(example, tokenizer)
    assert text.plain == "<s>cold </s> é [bold]x[/]\n⟦warm tea</s>⟧"
    green = "".join(text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style))
    assert green == "⟦warm tea</s>⟧"
    reverse = [text.plain[span.start : span.end] for span in text.spans if "reverse" in str(span.style)]
    assert reverse == ["<s>", "</s>"]  # the one that was written out is text


def test_a_sample_of_a_chat_marks_every_answer(with_tokenizer: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(str(with_tokenizer(chat_template=CHATML)))
    turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
    (example,) = examples_of([Record.of_chat(turns, "p")], tokenizer, TrainConfig()).examples
    said = shown(example, tokenizer).plain
    assert said == "<s>user\na</s>\n<s>assistant\n⟦b</s>⟧\n<s>user\nc</s>\n<s>assistant\n⟦d</s>⟧"


def test_a_record_does_not_steer_the_terminal(model: Path) -> None:
    tokenizer = load_tokenizer(str(model))
    (example,) = examples_of([Record("\x1b[2J\x07gone", "\x9b31mred", "p")], tokenizer, TrainConfig()).examples
    console = Console(record=True, force_terminal=True, color_system=None, width=200)
    with console.capture() as captured:
        console.print(shown(example, tokenizer))
    assert "\\x1b[2J\\x07gone" in captured.get()
    assert "\x1b[2J" not in captured.get()
    assert "\x9b" not in captured.get()


def test_a_long_sample_is_cut(model: Path) -> None:
    tokenizer = load_tokenizer(str(model))
    (example,) = examples_of([Record("", "tea " * 900, "p")], tokenizer, TrainConfig(max_tokens=1000)).examples
    assert shown(example, tokenizer).plain.endswith(f" … and {len(example.ids) - 400} tokens more")


def test_memory_is_that_of_the_machine() -> None:
    from common.config import Config

    assert module.memory_of(Config(model=ModelConfig(device="cpu"))) > 1e8
