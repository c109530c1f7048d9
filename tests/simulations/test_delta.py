"""Whether a run's delta means something: by the mode's own unit, and at the institution with the most."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from common import config_files
from common.config import Config
from common.errors import ConfigError
from common.records import Record
from simulations import run as module
from simulations.delta import about_delta
from tests.client.conftest import make_records

PERSONS = {"riverside": 40, "northgate": 20, "lakeside": 30}
"""Each with three records."""


def config(mode: str, delta: float) -> Config:
    private = ["privacy.mode=" + mode, "privacy.noise_multiplier=2", f"privacy.delta={delta}"] if mode != "none" else []
    return config_files.load("smoke", private)


def training(name: str) -> Sequence[Record]:
    count = PERSONS[name]
    return [
        replace(record, person=f"{name}-{number % count}")
        for number, record in enumerate(make_records(3 * count, name))
    ]


@pytest.mark.parametrize(
    ("mode", "units", "said"),
    [
        ("patient", 40, "40 patients that riverside trains on, the most of all"),
        ("record", 120, "120 records that riverside trains on, the most of all"),
        ("distributed", 120, "120 records that riverside trains on, the most of all"),
        ("institution", 3, "3 institutions in the run"),
    ],
)
def test_a_delta_that_means_nothing_is_told_and_one_that_does_is_not(mode: str, units: int, said: str) -> None:
    assert about_delta(config(mode, 1 / (10 * units)), training) is None
    told = about_delta(config(mode, 1.01 / (10 * units)), training)
    assert told is not None
    assert told.startswith("privacy.delta: found ")
    assert f"for {said}; expected at most" in told
    assert f"1 / (10 x {units})" in told


@pytest.mark.parametrize("mode", ["none", "institution"])
def test_records_are_read_only_where_they_are_counted(mode: str) -> None:
    def never(name: str) -> Sequence[Record]:
        raise AssertionError(f"the records of {name} were read")

    about_delta(config(mode, 1e-5), never)


@pytest.mark.parametrize(("delta", "times"), [(0.05, 1), (1e-5, 0)])
def test_a_run_says_it_once_at_launch_and_again_when_it_is_taken_up(
    delta: float, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tracker that is not there ends the run after what is said at launch, and before any training."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    asked = config("patient", delta)
    asked = replace(asked, tracking=replace(asked.tracking, wandb="nowhere"))
    for go in (
        lambda console: module.run(asked, tmp_path / "run", console),
        lambda console: module.resume(tmp_path / "run", console),
    ):
        said = StringIO()
        with pytest.raises(ConfigError, match="wandb"):
            go(Console(file=said, width=1000))
        assert said.getvalue().count("privacy.delta: found") == times
        assert said.getvalue().count("secure aggregation is on") == 1
        assert said.getvalue().count("differential privacy is on, mode patient: epsilon at most") == 1


def test_an_epsilon_that_no_noise_reaches_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    hopeless = config_files.load("smoke", ["privacy.mode=patient", "privacy.epsilon=1e-9"])
    with pytest.raises(ConfigError, match="whatever the noise"):
        module.run(hopeless, tmp_path / "run", Console(file=StringIO()))
    assert not (tmp_path / "run").exists()
