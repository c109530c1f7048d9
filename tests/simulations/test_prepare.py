"""Own files in place of generated records: split, written, run, and gone on with."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from common import config_files
from common.config import (
    ColumnsConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    FederationConfig,
    FileConfig,
    InstitutionConfig,
    ModelConfig,
    SecureAggregationConfig,
    TrainConfig,
)
from common.errors import ConfigError, DataError
from common.records import Record, read_jsonl
from server.coordinator import Observer, coordinate
from simulations import prepare
from simulations.generate.federation import Federation
from simulations.institutions import virtual
from simulations.layout import RunDirectory
from simulations.members import InProcessMembers
from tests.client.conftest import write_base_model

COMMAND = [str(Path(sys.executable).with_name("silotune-sim"))]
NAMES = ("alder", "birch", "cedar")
Files = Callable[..., DataConfig]


def rows_of(name: str, persons: range) -> list[dict[str, str]]:
    return [
        {"patient": f"mrn-{person}", "question": f"{name} asks {person}.{number}", "answer": f"code {person % 7}"}
        for person in persons
        for number in range(2)
    ]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Three csv files whose patients overlap, and what a configuration says of them."""

    def write(**changes: object) -> DataConfig:
        institutions = []
        for place, name in enumerate(NAMES):
            file = tmp_path / f"{name}.csv"
            rows = rows_of(name, range(60 * place, 60 * place + 90))
            with file.open("w", newline="") as handle:
                writer = csv.DictWriter(handle, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            columns = ColumnsConfig(prompt="question", completion="answer")
            institutions.append(InstitutionConfig(str(file), "patient", columns, name))
        return replace(DataConfig(institutions=institutions, seed=3), **changes)

    return write


def sets_of(federation: Federation) -> dict[tuple[str, str], tuple[Record, ...]]:
    own = {
        (name, part): getattr(splits, part)
        for name, splits in federation.institutions.items()
        for part in ("train", "validation", "test")
    }
    central = federation.coordinator
    return {**own, ("coordinator", "validation"): central.validation, ("coordinator", "test"): central.test}


def test_no_record_is_lost_and_no_person_stands_in_two_sets_anywhere(files: Files) -> None:
    data = files()
    sets = sets_of(prepare.gather(data))
    said = sorted(record.prompt for records in sets.values() for record in records)
    assert said == sorted(
        row["question"] for n, name in enumerate(NAMES) for row in rows_of(name, range(60 * n, 60 * n + 90))
    )
    places: dict[str, set[str]] = {}
    for (owner, part), records in sets.items():
        for record in records:
            places.setdefault(record.person, set()).add(part if owner != "coordinator" else f"central {part}")
    assert len(places) == 210
    assert all(len(found) == 1 for found in places.values())  # those known at two institutions as well
    assert sets == sets_of(prepare.gather(data))
    assert sets != sets_of(prepare.gather(replace(data, seed=4)))


def test_a_coordinator_with_a_file_of_its_own_borrows_nothing(files: Files, tmp_path: Path) -> None:
    own = tmp_path / "central.jsonl"
    own.write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(20)))
    data = files(coordinator=FileConfig(str(own), person="-"))
    federation = prepare.gather(data)
    central = federation.coordinator
    assert {record.completion for record in (*central.validation, *central.test)} == {f"text {n}" for n in range(20)}
    lending = prepare.gather(files())
    for name in NAMES:
        mine, theirs = federation.institutions[name], lending.institutions[name]
        assert (mine.validation, mine.test) == (theirs.validation, theirs.test)
        assert len(mine.train) > len(theirs.train)


def test_mistakes_of_all_institutions_are_told_at_once(files: Files, tmp_path: Path) -> None:
    data = files()
    (tmp_path / "alder.csv").write_bytes("patient,question,answer\n1,é,b\n".encode("latin-1"))
    (tmp_path / "birch.csv").write_text("patient,question\n1,a\n")
    (tmp_path / "cedar.csv").unlink()
    with pytest.raises(DataError) as caught:
        prepare.gather(data)
    told = str(caught.value).split("\n  ")
    assert told[0] == "records cannot be used"
    assert [line.split(":")[0] for line in told[1:]] == list(NAMES)
    assert [word in line for word, line in zip(("UTF-8", "'answer'", "found none"), told[1:], strict=True)] == [
        True
    ] * 3


def test_too_few_persons_are_told(files: Files, tmp_path: Path) -> None:
    data = files()
    (tmp_path / "birch.csv").write_text("patient,question,answer\n1,a,b\n2,a,b\n")
    with pytest.raises(DataError, match=r"^birch: .*birch\.csv: expected persons enough for every set, found 2"):
        prepare.gather(data)


def test_what_is_written_is_a_directory_that_says_the_same(files: Files, tmp_path: Path) -> None:
    config = Config(data=files())
    federation = prepare.gather(config.data)
    prepare.write(federation, tmp_path / "out")
    later = prepare.from_now_on(config, tmp_path / "out")
    config_files.validate(later)
    assert prepare.gather(later.data) == federation
    (tmp_path / "out" / "birch" / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"birch/test\.jsonl"):
        prepare.gather(later.data)
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="missing: alder, birch, cedar, coordinator"):
        prepare.gather(prepare.from_now_on(config, tmp_path / "other").data)


def test_chats_in_pieces_go_through_a_whole_round(tmp_path: Path) -> None:
    """Two turns and a system message, longer than a row may be: the institutions' tokens are the coordinator's."""
    base = write_base_model(tmp_path / "base", seed=5)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(base)
    institutions = []
    for name in NAMES:
        turns = [("system", "You code."), ("user", "fever " * 9), ("assistant", "J10 " * 9), ("user", "tea?")]
        rows = [
            {"who": n, "messages": [{"role": r, "content": c} for r, c in (*turns, ("assistant", f"no {n}"))]}
            for n in range(60)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        institutions.append(InstitutionConfig(str(tmp_path / f"{name}.jsonl"), "who", name=name))
    config = Config(
        model=ModelConfig(str(base)),
        data=DataConfig(institutions=institutions),
        train=TrainConfig(max_tokens=48, long="chunk", overlap=8, passes_per_round=0.2),
        federation=FederationConfig(rounds=1),
        secure_aggregation=SecureAggregationConfig(enabled=False),
        evaluation=EvaluationConfig(exact=["text"]),
    )
    place = RunDirectory.at(tmp_path / "run")
    prepare.write(prepare.gather(config.data), place.records(config))
    members = InProcessMembers([virtual(config, place, name, place.records(config)) for name in NAMES])
    (record,) = coordinate(
        config, place.root, place.central(config, "validation"), members, Observer()
    ).progress.history
    assert (record.contributors, record.void) == (3, 0)
    assert record.train_loss is not None
    assert record.validation is not None
    assert record.validation["accuracy"] is not None
    assert "cut into pieces" in (place.institutions / "alder" / "client.log").read_text()


# --- The commands


def silotune(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def config_file(files: Files, tmp_path: Path) -> Path:
    """A configuration as a person would write it, with JSON for YAML."""
    smoke = config_files.load("smoke", ["federation.rounds=1", "compare.enabled=false", "evaluation.exact=[]"])
    file = tmp_path / "own.yaml"
    file.write_text(config_files.to_yaml(replace(smoke, data=files())))
    return file


def test_data_splits_files(config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "split"
    done = silotune("data", config_file, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert set(told["institutions"]) == set(NAMES)
    assert told["institutions"]["alder"]["train"] == len(read_jsonl(out / "alder" / "train.jsonl"))
    assert told["coordinator"]["test"] == len(read_jsonl(out / "coordinator" / "test.jsonl"))
    assert silotune("check", config_file, "--json").returncode == 0


@pytest.mark.slow
def test_a_run_keeps_its_own_copy_of_the_records(config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = silotune("run", config_file, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["everyone"]["federated"]["perplexity"] > 1
    assert set(summary["own"]) == set(NAMES)
    for name in NAMES:
        (tmp_path / f"{name}.csv").unlink()
    again = silotune("run", "--resume", out, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["everyone"] == summary["everyone"]


@pytest.mark.slow
def test_the_example_of_the_guide_works(tmp_path: Path) -> None:
    guide = (Path(__file__).resolve().parents[2] / "docs" / "operating.md").read_text(encoding="utf-8")
    section = guide.split("## Your own records\n\n")[1].split("\n\nA file is")[0]
    lines = [line.removeprefix("    ") for line in section.splitlines()]
    assert lines[-1] == "silotune-sim run runs/own.yaml"
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", "-e", "-c", "\n".join(lines[:-1])],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # The generator keeps its own test apart; within a training set one person's records are alike to another's.
    assert done.stdout.strip().endswith("own can run; 1 warning stands")
    assert "nearly repeat a training one" in done.stdout


def test_nothing_is_begun_with_records_that_cannot_be_read(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "birch.csv").write_text("patient,question\n1,a\n")
    done = silotune("run", config_file, "--out", tmp_path / "run")
    assert done.returncode == 3
    assert "found the columns patient, question" in " ".join(done.stderr.split())
    assert not (tmp_path / "run").exists()


def test_generated_records_are_what_the_generator_makes() -> None:
    config = config_files.load("smoke")
    assert len(sets_of(prepare.gather(config.data))) == 11
    with pytest.raises(ConfigError):
        prepare.gather(replace(config.data, dirichlet=-1.0))


@pytest.mark.parametrize("command", ["run", "tune", "data", "check"])
def test_a_deployments_configuration_is_refused_with_words_and_nothing_is_written(command: str, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")] if command != "check" else []
    done = subprocess.run([*COMMAND, command, "deployment", *out], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert "found records that lie with the institutions" in said
    assert "such a run needs them and a coordinator: silotune-server run" in said
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_coordinators_file_alone_is_no_simulation() -> None:
    config = config_files.load("deployment")
    with pytest.raises(ConfigError, match="expected a generator, a directory or a path for every institution"):
        prepare.gather(config.data)
