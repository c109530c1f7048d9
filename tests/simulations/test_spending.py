"""What is told of epsilon over rounds is what each virtual institution's own ledger holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.ledger import Ledger, Spend
from client.policy_file import Population
from common import config_files
from common.errors import StorageError
from common.privacy.accounting import Event, epsilon, rounded_up
from common.secagg.identity import Identity
from simulations.layout import RunDirectory
from simulations.spending import spending

DELTA = 1e-3
CONFIG = config_files.load("smoke", ["privacy.mode=record", "privacy.noise_multiplier=2", f"privacy.delta={DELTA}"])
STEP = Event("gaussian", 2.0, 1.0, 3)  # without sampling, whose bound is quick to compute


def spend(directory: RunDirectory, name: str, *rounds: int) -> None:
    place = directory.ledger(name)
    place.mkdir(parents=True, mode=0o700)
    ledger = Ledger(place, Identity.generate(name))
    ledger.begin()
    for attempt, number in enumerate(rounds, 1):
        ledger.spend(Population("records", ("records",)), Spend.of(STEP, "record", "run", number, attempt, "records"))


def after(times: int) -> float:
    return rounded_up(epsilon([STEP] * times, DELTA))


def test_each_institution_has_what_its_own_ledger_says(tmp_path: Path) -> None:
    directory = RunDirectory.at(tmp_path)
    spend(directory, "riverside", 1, 2, 3)
    spend(directory, "northgate", 1, 3, 3)  # missed the second round, and its third took two attempts
    spend(directory, "lakeside")
    assert spending(CONFIG, directory, 3) == {
        "riverside": [[1, after(1)], [2, after(2)], [3, after(3)]],
        "northgate": [[1, after(1)], [2, after(1)], [3, after(3)]],
        "lakeside": [[1, 0.0], [2, 0.0], [3, 0.0]],
    }
    assert after(1) < after(2) < after(3)


def test_the_run_s_delta_counts_and_not_the_ledger_s(tmp_path: Path) -> None:
    directory = RunDirectory.at(tmp_path)
    for name in CONFIG.data.names:
        spend(directory, name, 1)
    small = config_files.load("smoke", ["privacy.mode=record", "privacy.noise_multiplier=2", "privacy.delta=1e-6"])
    assert spending(small, directory, 1)["riverside"][0][1] == rounded_up(epsilon([STEP], 1e-6)) > after(1)


def test_a_ledger_that_is_gone_is_not_an_empty_one(tmp_path: Path) -> None:
    directory = RunDirectory.at(tmp_path)
    spend(directory, "riverside", 1)
    with pytest.raises(StorageError, match="northgate"):
        spending(CONFIG, directory, 1)
