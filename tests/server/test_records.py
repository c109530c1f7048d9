"""The coordinator's own records: where they come from, who falls into which set, and what no deployment can mean."""

from __future__ import annotations

import csv
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from common.config import (
    ColumnsConfig,
    Config,
    DataConfig,
    FileConfig,
    InstitutionConfig,
    ModelConfig,
    SimulationConfig,
    named,
)
from common.config_files import load, parse, to_yaml
from common.errors import ConfigError, DataError
from common.records import Record, read_jsonl, write_jsonl
from server import records, runs
from server.records import HeldOut

NAMES = ("alder", "birch", "cedar")
RECORDS = [Record(f"question {n}", f"answer {n}", f"person {n // 2}") for n in range(40)]


def config(**data: object) -> Config:
    said = DataConfig(**{"institutions": named(*NAMES), "generator": "", **data})  # type: ignore[arg-type]
    return Config(name="tiny", data=said)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "own.jsonl", RECORDS)
    return tmp_path / "own.jsonl"


# --- What a deployment can mean --------------------------------------------------------------------------------------


def test_names_that_are_not_on_the_roster_are_told_and_those_that_are(file: Path) -> None:
    found = config(coordinator=FileConfig(str(file)))
    records.check(found, {*NAMES, "dogwood"})
    with pytest.raises(ConfigError, match=r"found alder, cedar, not on the roster; allowed: birch, dogwood"):
        records.check(found, {"birch", "dogwood"})
    with pytest.raises(ConfigError, match="nobody yet, see silotune-server enroll"):
        records.check(found, ())


def test_every_mistake_is_told_at_once() -> None:
    paths = [InstitutionConfig(name=name, path=f"/records/{name}.csv") for name in NAMES]
    wrong = replace(config(institutions=paths), simulation=SimulationConfig(faults=["alder:nan"]))
    with pytest.raises(ConfigError) as told:
        records.check(wrong, NAMES[1:])
    said = str(told.value)
    assert all(key in said for key in ("not on the roster", "found a path; allowed: names only", "simulation.faults"))
    assert "/records" not in said


def test_without_records_of_its_own_a_coordinator_has_nothing_to_choose_by() -> None:
    with pytest.raises(ConfigError, match=r"data\.coordinator\.path: found ''"):
        records.check(load("hospitals"), ("riverside", "northgate", "lakeside", "summit"))


def test_the_shipped_deployment_can_be_meant() -> None:
    found = load("deployment")
    records.check(found, found.data.names)
    assert records.unused(found) == ()
    assert found.secure_aggregation.enabled


def test_what_only_simulations_use_is_named() -> None:
    said = records.unused(load("hospitals"))
    assert said == ("data.train_records", "compare", "tune")
    assert records.unused(load("smoke", ["simulation.actors=3"]))[-1] == "simulation"


def test_a_run_can_be_resumed_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = replace(config(coordinator=FileConfig("own.csv", "patient")), model=ModelConfig("models/llama"))
    found = records.settled(given)
    assert found.model.path == str(tmp_path / "models" / "llama")
    assert found.data.coordinator == FileConfig(str(tmp_path / "own.csv"), "patient")
    assert parse(to_yaml(found), "config.yaml") == found == records.settled(found)
    assert records.settled(config(directory="own")).data.directory == str(tmp_path / "own")
    assert records.settled(config()).model.path == "embedded"


# --- Where they come from --------------------------------------------------------------------------------------------


def test_no_person_is_in_both_sets_and_nobody_is_left_out(file: Path) -> None:
    found = records.gather(config(coordinator=FileConfig(str(file))).data)
    people = [{record.person for record in part} for part in (found.validation, found.test)]
    assert all(people)
    assert not people[0] & people[1]
    assert sorted((*found.validation, *found.test), key=RECORDS.index) == RECORDS
    assert records.gather(config(coordinator=FileConfig(str(file))).data) == found
    assert records.gather(config(coordinator=FileConfig(str(file)), seed=2).data) != found


def test_a_table_with_columns_of_its_own_is_read(tmp_path: Path) -> None:
    with (tmp_path / "own.csv").open("w", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(["patient", "q", "a"])
        rows.writerows([record.person, record.prompt, record.completion] for record in RECORDS)
    columns = ColumnsConfig(prompt="q", completion="a")
    data = config(coordinator=FileConfig(str(tmp_path / "own.csv"), "patient", columns)).data
    found = records.gather(data)
    assert {record.person for part in (found.validation, found.test) for record in part} == {r.person for r in RECORDS}


def test_sets_that_are_split_already_are_taken_as_they_are(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "coordinator" / "validation.jsonl", RECORDS[:10])
    write_jsonl(tmp_path / "coordinator" / "test.jsonl", RECORDS[10:])
    data = config(directory=str(tmp_path)).data
    assert records.gather(data) == HeldOut(tuple(RECORDS[:10]), tuple(RECORDS[10:]))
    write_jsonl(tmp_path / "coordinator" / "test.jsonl", RECORDS[9:])
    with pytest.raises(DataError, match="nobody in both validation and test, found 1 who are"):
        records.gather(data)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"own\.jsonl: expected a file of records, found none"):
        records.gather(config(coordinator=FileConfig(str(tmp_path / "own.jsonl"))).data)


def test_they_are_kept_for_their_owner_alone(tmp_path: Path) -> None:
    run = runs.create(tmp_path / "runs", config())
    before = os.umask(0)
    try:
        records.keep(run, HeldOut(tuple(RECORDS[:10]), tuple(RECORDS[10:])))
    finally:
        os.umask(before)
    assert read_jsonl(run.validation) == tuple(RECORDS[:10])
    assert read_jsonl(run.test) == tuple(RECORDS[10:])
    assert stat.S_IMODE(run.validation.stat().st_mode) == stat.S_IMODE(run.test.stat().st_mode) == 0o600
