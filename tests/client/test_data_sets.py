"""An institution's data sets: what the file says, what is read of it, and that it is split as a simulation splits."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client import data_sets
from client.data_sets import (
    TEMPLATE,
    DataFile,
    DataSet,
    DataSets,
    Machine,
    RecordFolder,
    open_data_sets,
    read,
    write_template,
)
from common.config import ColumnsConfig, DataConfig, FileConfig, InstitutionConfig, ModelConfig
from common.errors import ConfigError, DataError, Refusal
from common.policy_reasons import DATA_SET_UNKNOWN
from common.records import Record, write_jsonl
from common.sources import Table
from common.splits import SETS
from simulations import prepare

SECRET = "patient-4711-has-a-fever"

FORMS: dict[str, tuple[list[str], ColumnsConfig]] = {
    "text": (["note"], ColumnsConfig(text="note")),
    "completion": (["question", "answer"], ColumnsConfig(prompt="question", completion="answer")),
    "instruction": (["instruction", "input", "output"], ColumnsConfig()),
    "chat": (["messages"], ColumnsConfig()),
}


def rows_of(form: str, persons: int) -> list[dict[str, Any]]:
    """Three records of each person, in a form of record."""
    rows = []
    for number in range(3 * persons):
        cells: dict[str, Any] = {name: f"{name} {number}" for name in FORMS[form][0]}
        if form == "chat":
            turns = [{"role": "user", "content": f"q {number}"}, {"role": "assistant", "content": f"a {number}"}]
            cells = {"messages": json.dumps(turns)}
        rows.append({"patient": f"p{number % persons}", **cells})
    return rows


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    match file.suffix:
        case ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".csv":
            with file.open("w", newline="") as handle:
                writer = csv.DictWriter(handle, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        case _:
            pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
    return file


def one(file: Path, **changes: Any) -> DataSets:
    """A data set called `notes`, of patients with notes."""
    spec = DataSet(str(file), "patient", ColumnsConfig(text="note"))
    return DataSets(DataFile({"notes": replace(spec, **changes)}), file.parent)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "notes.jsonl", rows_of("text", 40))


# --- What is read


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_file_is_split_as_a_simulation_splits_it(form: str, suffix: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path / f"records{suffix}", rows_of(form, 60))
    central = write_rows(tmp_path / "central.jsonl", rows_of("text", 40))
    simulated = DataConfig(
        institutions=[InstitutionConfig(str(file), "patient", FORMS[form][1], "alder")],
        coordinator=FileConfig(str(central), "patient", ColumnsConfig(text="note")),
        held_out=0.15,
        seed=5,
    )
    expected = prepare.gather(simulated).institutions["alder"]
    found = one(file, columns=FORMS[form][1], held_out=0.15, seed=5)
    for part in SETS:
        assert found.find("notes", part).records == getattr(expected, part)
    assert sum(len(found.find("notes", part).records) for part in SETS) == 180


def test_what_a_simulation_lends_to_a_coordinator_is_trained_on_here(notes: Path) -> None:
    own = InstitutionConfig(str(notes), "patient", ColumnsConfig(text="note"), "alder")
    simulated = prepare.gather(DataConfig(institutions=[own], held_out=0.1, seed=1))
    expected = simulated.institutions["alder"]
    found = one(notes)
    assert found.find("notes", "validation").records == expected.validation
    assert found.find("notes", "test").records == expected.test
    lent = {*simulated.coordinator.validation, *simulated.coordinator.test}
    assert lent
    assert {*found.find("notes", "train").records} == {*expected.train} | lent


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.1, 0.2))
def test_no_person_is_in_two_sets_and_no_record_is_lost(
    seed: int, share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = write_rows(tmp_path_factory.mktemp("data") / "notes.jsonl", rows_of("text", 150))
    found = one(file, seed=seed, held_out=share)
    persons = [{record.person for record in found.find("notes", part).records} for part in SETS]
    assert sum(len(part) for part in persons) == len(set.union(*persons)) == 150


def test_names_are_told_in_order_and_no_other_is_opened(notes: Path) -> None:
    found = DataSets(
        DataFile({"letters": DataSet("nowhere.csv"), "notes": DataSet(notes.name, "patient")}), notes.parent
    )
    assert found.names == ("letters", "notes")
    for name in ("", "other", "notes/train", str(notes), notes.name, "../notes", "Notes"):
        with pytest.raises(Refusal) as caught:
            found.find(name, "train")
        assert caught.value.reason == DATA_SET_UNKNOWN


def test_a_set_that_there_is_not_is_a_mistake_of_ours(notes: Path) -> None:
    for part in ("", "records", "central_test", "__class__"):
        with pytest.raises(ValueError, match="expected one of train, validation, test"):
            one(notes).find("notes", part)


def test_relative_paths_begin_at_the_file_that_names_them(
    notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    entry = "person: patient, columns: {text: note}"
    (tmp_path / "data.yaml").write_text(f"data_sets: {{notes: {{path: {notes.name}, {entry}}}}}")
    assert len(open_data_sets(Path("../data.yaml")).find("notes", "train").records) > 90
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere" / "data.yaml").write_text(f"data_sets: {{notes: {{path: ~/{notes.name}, {entry}}}}}")
    assert len(open_data_sets(Path("data.yaml")).find("notes", "train").records) > 90


# --- The cache


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that are read, in order."""
    seen: list[Path] = []
    original = data_sets.read_table

    def counted(path: Path) -> Table:
        seen.append(path)
        return original(path)

    monkeypatch.setattr(data_sets, "read_table", counted)
    return seen


def test_a_file_is_read_once_for_all_its_sets(notes: Path, reads: list[Path]) -> None:
    found = one(notes)
    versions = {found.find("notes", part).version for part in (*SETS, *SETS)}
    assert len(versions) == 1
    assert reads == [notes]


def _appended(file: Path) -> None:
    with file.open("a") as handle:
        handle.write(json.dumps({"patient": "late", "note": "one more"}) + "\n")


def _replaced(file: Path) -> None:
    """Another file of the same size and time of change."""
    time = file.stat().st_mtime_ns
    other = file.with_name("other.jsonl")
    other.write_text(file.read_text().replace("note 1", "note X"))
    os.utime(other, ns=(time, time))
    other.replace(file)


def _rewritten(file: Path) -> None:
    """The same file, size and all, at another time."""
    time = file.stat().st_mtime_ns
    file.write_text(file.read_text().replace("note 1", "note X"))
    os.utime(file, ns=(time, time + 1))


@pytest.mark.parametrize("change", [_appended, _replaced, _rewritten])
def test_a_changed_file_is_read_again(change: Callable[[Path], None], notes: Path, reads: list[Path]) -> None:
    found = one(notes)
    before = [found.find("notes", part) for part in SETS]
    change(notes)
    after = [found.find("notes", part) for part in SETS]
    assert reads == [notes, notes]
    assert before != after
    assert {record for part in before for record in part.records} != {r for part in after for r in part.records}


def test_equal_versions_are_equal_without_comparing_records(notes: Path) -> None:
    """So that what is made of a set can be kept by it, at no cost."""
    first, second = one(notes).find("notes", "train"), one(notes).find("notes", "train")
    assert first == second
    assert hash(first) == hash(second)
    assert first != one(notes).find("notes", "test")
    assert replace(first, records=()) == first
    assert hash(replace(first, records=())) == hash(first)
    assert "note" not in repr(first).replace("notes", "")


# --- Records that cannot be read


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("nowhere.jsonl", None, "expected a file of records, found none"),
        ("empty.jsonl", "", "expected at least one record"),
        ("empty.csv", "", "expected a first line"),
        ("notes.txt", "x", "expected a file that ends in"),
        ("notes.jsonl", "{", "notes.jsonl:1: expected a JSON object"),
        ("notes.jsonl", '{"note": "a"}\n', "expected a column 'patient'"),
        ("notes.jsonl", '{"patient": "a", "text": "a"}\n', "expected a column 'note'"),
        ("notes.jsonl", '{"patient": "a", "note": "a"}\n', "data set notes: expected persons enough"),
        ("notes.parquet", "x", "expected a parquet file"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(name: str, content: str | None, told: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=told):
        one(file).find("notes", "train")


def test_a_directory_and_a_path_through_a_file_are_told(notes: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="found a directory"):
        one(tmp_path / "folder.jsonl").find("notes", "train")
    with pytest.raises(DataError, match="expected a file of records"):
        one(notes / "more.jsonl").find("notes", "train")


def test_a_file_that_may_not_be_read_is_told(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operating system says to anybody but root."""

    def forbidden(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(notes))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", forbidden)
        with pytest.raises(DataError, match="Permission denied"):
            one(notes).find("notes", "train")
    monkeypatch.setattr(Path, "stat", forbidden)
    with pytest.raises(DataError, match="Permission denied"):
        one(notes).find("notes", "train")


@pytest.mark.parametrize("change", [_appended, _replaced, _rewritten, Path.unlink])
def test_a_file_that_changes_while_it_is_read_is_not_used(
    change: Callable[[Path], None], notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = data_sets.read_table
    found = one(notes)

    def disturbed(path: Path) -> Table:
        table = original(path)
        change(notes)
        return table

    with monkeypatch.context() as patch:
        patch.setattr(data_sets, "read_table", disturbed)
        with pytest.raises(DataError, match=r"changed while it was read|found none"):
            found.find("notes", "train")
    if change is not Path.unlink:
        assert len(found.find("notes", "train").records) > 90


def test_after_a_failure_the_former_records_are_not_used(notes: Path) -> None:
    found = one(notes)
    found.find("notes", "train")
    content = notes.read_text()
    notes.write_text("{")
    for _ in range(2):
        with pytest.raises(DataError, match="not JSON"):
            found.find("notes", "train")
    notes.write_text(content)
    assert found.find("notes", "train").records


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_no_copy_of_a_record_is_left_on_the_disk(suffix: str, tmp_path: Path) -> None:
    rows = [{"patient": str(number), "note": f"{SECRET} {number}"} for number in range(90)]
    file = write_rows(tmp_path / f"notes{suffix}", rows)
    home = tmp_path / "home"
    (home / "tmp").mkdir(parents=True)
    code = (
        "import sys; from pathlib import Path\n"
        "from common.config import ColumnsConfig; from client.data_sets import *\n"
        "file = Path(sys.argv[1])\n"
        "spec = DataSet(str(file), 'patient', ColumnsConfig(text='note'))\n"
        "print(len(DataSets(DataFile({'notes': spec}), file.parent).find('notes', 'train').records))\n"
    )
    surroundings = {**os.environ, "HOME": str(home), "TMPDIR": str(home / "tmp"), "HF_HOME": str(home / "hf")}
    root = Path(data_sets.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], cwd=root, env=surroundings, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 50
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path != file]
    assert not any(SECRET.encode() in path.read_bytes() for path in left)
    assert list((home / "tmp").iterdir()) == []


# --- A folder of a simulation


def test_a_folder_has_a_file_for_each_set(tmp_path: Path) -> None:
    records = [Record("q", "a", "p")]
    write_jsonl(tmp_path / "train.jsonl", records)
    folder = RecordFolder(tmp_path)
    first = folder.find("whatever", "train")
    assert first.records == tuple(records)
    assert folder.find("", "train") == first
    write_jsonl(tmp_path / "train.jsonl", [*records, *records])
    assert folder.find("", "train") != first
    with pytest.raises(DataError, match=r"test\.jsonl"):
        folder.find("", "test")


# --- The file


def parse(text: str, tmp_path: Path) -> DataFile:
    (tmp_path / "data.yaml").write_text(text)
    return read(tmp_path / "data.yaml")


def mistakes(text: str, tmp_path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, tmp_path)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith(str(tmp_path / "data.yaml"))
    return [line.strip() for line in lines]


def test_the_template_says_the_defaults_and_is_never_written_over(tmp_path: Path) -> None:
    write_template(tmp_path / "data.yaml")
    assert read(tmp_path / "data.yaml") == DataFile()
    assert open_data_sets(tmp_path / "data.yaml").names == ()
    with pytest.raises(ConfigError, match="is there already"):
        write_template(tmp_path / "data.yaml")


def test_the_example_in_the_template_can_be_used_as_it_stands(tmp_path: Path) -> None:
    found = parse(re.sub(r"(?m)^#(?=  )", "", TEMPLATE), tmp_path)
    columns = ColumnsConfig(prompt="question", completion="answer")
    assert found == DataFile({"notes": DataSet("/srv/records/notes.jsonl", "person", columns, 0.1, 1)})


def test_every_field_is_explained_in_the_template() -> None:
    lines = TEMPLATE.splitlines()
    explained = {
        match.group(1)
        for before, line in itertools.pairwise(lines)
        if re.match(r"#? +# .+|# .+", before) and (match := re.match(r"#? *([a-z_]+):", line))
    }
    assert explained >= {*DataSet.__dataclass_fields__, *Machine.__dataclass_fields__, "data_sets"}
    assert all(name in TEMPLATE for name in ColumnsConfig.__dataclass_fields__)


def test_the_machine_is_what_training_needs_to_know(tmp_path: Path) -> None:
    found = parse(
        "machine: {model: /models/llama, device: cuda, dtype: bfloat16, weights: 4bit, row_tokens: 512}", tmp_path
    )
    assert found.machine.config() == ModelConfig("/models/llama", "cuda", "bfloat16", "4bit")
    assert found.machine.row_tokens == 512
    assert Machine().config() == ModelConfig()


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ("{path: ''}", "path"),
        ("{path: 3}", "path"),
        ("{path: ' a.csv'}", "path"),
        ("{path: '${oc.env:HOME}/a.csv'}", "path"),
        ("{path: a.csv, person: ''}", "person"),
        ("{path: a.csv, person: 3}", "person"),
        ("{path: a.csv, held_out: 0}", "held_out"),
        ("{path: a.csv, held_out: 0.25}", "held_out"),
        ("{path: a.csv, held_out: '0.1'}", "held_out"),
        ("{path: a.csv, held_out: .nan}", "held_out"),
        ("{path: a.csv, seed: -1}", "seed"),
        ("{path: a.csv, seed: 1.0}", "seed"),
        ("{path: a.csv, columns: [text]}", "columns"),
        ("{path: a.csv, columns: {text: 3}}", "columns.text"),
        ("{path: a.csv, columns: {text: ' '}}", "columns.text"),
    ],
)
def test_a_wrong_entry_is_told_with_its_key(entry: str, key: str, tmp_path: Path) -> None:
    (line,) = mistakes(f"data_sets: {{notes: {entry}}}", tmp_path)
    assert line.startswith(f"data_sets.notes.{key}: found ")
    assert "; allowed: " in line


def test_a_data_set_without_a_path_is_told(tmp_path: Path) -> None:
    (line,) = mistakes("data_sets: {notes: {}}", tmp_path)
    assert line == "data_sets.notes.path: missing; allowed: the path of a jsonl, csv or parquet file"


@pytest.mark.parametrize("name", ["Notes", "'../notes'", "'a b'", "-a", "7", "a.b", "a" * 65, "''"])
def test_a_wrong_name_is_told(name: str, tmp_path: Path) -> None:
    (line,) = mistakes(f"data_sets: {{{name}: {{path: a.csv}}}}", tmp_path)
    assert "as a name; allowed: a name of a-z" in line


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data_sets: {notes: {path: a.csv, persn: x}}", "data_sets.notes.persn: unknown key; the nearest known one is"),
        ("machine: {rows_token: 3}", "machine.rows_token: unknown key; the nearest known one is machine.row_tokens"),
        ("datasets: {}\nmachine: {}", "datasets: unknown key; the nearest known one is data_sets"),
        ("machine: {row_tokens: 1}", "machine.row_tokens: found 1; allowed: a whole number of at least 2"),
        ("machine: {row_tokens: '8'}", "machine.row_tokens: found '8'"),
        ("machine: {device: gpu}", "machine.device: found 'gpu'; allowed: auto, cpu or cuda"),
        ("machine: {dtype: float16}", "machine.dtype"),
        ("machine: {weights: 4}", "machine.weights"),
        ("machine: {model: ''}", "machine.model"),
        ("data_sets: [notes]", "data_sets: found"),
        ("data_sets: {notes: a.csv}", "data_sets.notes: found 'a.csv'; allowed: a section"),
    ],
)
def test_other_mistakes_are_told(text: str, told: str, tmp_path: Path) -> None:
    (line,) = mistakes(text, tmp_path)
    assert line.startswith(told)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    lines = mistakes("data_sets: {A: {path: x.csv}, b: {seed: -1}}\nmachine: {device: 3}\nextra: 1", tmp_path)
    assert [line.split(":")[0] for line in lines] == [
        "extra",
        "data_sets.A",
        "data_sets.b.path",
        "data_sets.b.seed",
        "machine.device",
    ]


def test_an_empty_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found an empty file"):
        parse("", tmp_path)
