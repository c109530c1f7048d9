"""Every YAML file under configs/ loads through the real loader, and says what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config_files import configs_dir, load
from server.terms import terms_of

FILES = sorted(configs_dir().rglob("*.y*ml"))


def test_the_files_are_found() -> None:
    assert [file.relative_to(configs_dir()).as_posix() for file in FILES] == [
        "banks.yaml",
        "clinics.yaml",
        "deployment.yaml",
        "hospitals-private.yaml",
        "hospitals.yaml",
        "smoke.yaml",
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_loads_and_is_named_as_its_file(file: Path) -> None:
    config = load(str(file))
    assert config.name == file.stem
    assert load(file.relative_to(configs_dir()).with_suffix("").as_posix()) == config


@pytest.mark.parametrize(
    ("name", "dropouts"),
    [("banks", 1), ("clinics", 32), ("deployment", 0), ("hospitals", 1), ("hospitals-private", 1), ("smoke", 0)],
)
def test_it_hides_updates_and_says_so(name: str, dropouts: int) -> None:
    terms = terms_of(load(name))
    assert terms is not None
    assert terms.dropouts == dropouts
    assert "secure_aggregation:" in (configs_dir() / f"{name}.yaml").read_text()


def test_the_one_for_a_deployment_leaves_records_to_the_institutions() -> None:
    data = load("deployment").data
    assert (data.generator, data.directory, data.has_files) == ("", "", False)
    assert (data.name, data.coordinator.path) == ("notes", "coordinator.jsonl")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_its_head_says_what_it_is_for_how_it_is_run_and_what_it_costs(file: Path) -> None:
    head = file.read_text().partition("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in head)
    assert any(line.startswith("# For: ") for line in head)
    command = "silotune-server" if file.stem == "deployment" else "silotune-sim"
    assert f"# Command: {command} run {file.stem}" in head
    assert any(line.startswith("# Cost: ") for line in head)
