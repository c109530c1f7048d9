"""Curves: what they are called, that no round is twice or missing, and that they tell nothing of an institution.

The tests of MLflow and W&B exist only where those are installed: `pip install mlflow wandb`, in an environment of
one's own, and then this file again.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from common.config import Config, FileConfig, InstitutionConfig, TrackingConfig
from common.errors import ConfigError, StorageError
from server.rounds import RoundRecord
from server.tracking import TensorBoard, Tracker, read_events, require, settings, tracker, values
from tests.server.conftest import rounds_config


def record(number: int, loss: float | None = None) -> RoundRecord:
    return RoundRecord(
        round=number,
        contributors=3,
        void=1,
        refused={"birch": "timed_out"},
        train_loss=2.0 / number if loss is None else loss,
        institutions_perplexity=None,
        validation={"perplexity": 4.0 / number, "accuracy": None},
        best=True,
        seconds={"train": 1.5, "aggregate": 0.25, "evaluate": 0.5},
        bytes_up=100,
        bytes_down=200,
    )


HISTORY = tuple(record(number) for number in (1, 2, 3, 4))


def curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """All event files of a run, by name of the curve, in the order of the files."""
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted((directory / "tensorboard").iterdir()):
        for event in read_events(file):
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def losses(directory: Path) -> list[tuple[int, float]]:
    return [(step, pytest.approx(loss, rel=1e-6)) for step, loss in curves(directory)["train/loss"]]


EXPECTED_LOSSES = [(1, 2.0), (2, 1.0), (3, 2 / 3), (4, 0.5)]


# ---- what is told --------------------------------------------------------------------------------------------------


def test_a_round_has_the_names_people_look_for_and_leaves_out_what_was_not_measured() -> None:
    assert values(record(2)) == {
        "train/loss": 1.0,
        "validation/perplexity": 2.0,
        "round/contributors": 3.0,
        "round/refused": 1.0,
        "round/void": 1.0,
        "bytes/up": 100.0,
        "bytes/down": 200.0,
        "seconds/train": 1.5,
        "seconds/aggregate": 0.25,
        "seconds/evaluate": 0.5,
    }
    assert "train/loss" not in values(replace(record(2), train_loss=None, validation=None))


def telling_config() -> Config:
    """Everything in it that is an institution's, a path or a secret can be found again."""
    config = rounds_config()
    return replace(
        config,
        model=replace(config.model, path="/srv/secret/llama"),
        data=replace(
            config.data,
            directory="/srv/secret/records",
            institutions=[
                InstitutionConfig(name="alder", path="/srv/secret/alder.jsonl"),
                InstitutionConfig(name="birch", path="/srv/secret/birch.jsonl"),
            ],
            coordinator=FileConfig("/srv/secret/own.jsonl"),
            train_records=[98765001, 98765002],
        ),
        simulation=replace(config.simulation, faults=["birch:nan"]),
        tracking=TrackingConfig(mlflow="https://someone:secret@example.org"),
    )


def test_settings_tell_the_training_and_nothing_of_anybody() -> None:
    told = settings(telling_config())
    assert told["lora.rank"] == "16"
    assert told["federation.server_optimizer.name"] == "fedavg"
    assert told["model"] == "llama"
    assert told["institutions"] == "2"
    assert not [word for word in ("alder", "birch", "98765", "secret", "/") if word in str(told)]


def test_no_institution_is_named_in_an_event_file(tmp_path: Path) -> None:
    with tracker(rounds_config(), "run", tmp_path) as found:
        found.follow(HISTORY)
    files = list((tmp_path / "tensorboard").iterdir())
    assert files
    assert not [name for file in files for name in (b"birch", b"timed_out") if name in file.read_bytes()]
    assert all(re.fullmatch(r"events\.out\.tfevents\.\d+", file.name) for file in files)  # not the machine's either


# ---- no round twice, none missing ----------------------------------------------------------------------------------


def test_the_step_of_a_curve_is_the_round(tmp_path: Path) -> None:
    with tracker(rounds_config(), "run", tmp_path) as found:
        for count in range(5):
            found.follow(HISTORY[:count])
    assert losses(tmp_path) == EXPECTED_LOSSES
    assert set(curves(tmp_path)) == set(values(HISTORY[0]))


@pytest.mark.parametrize("kept", [0, 1, 3, 4])
def test_a_resumed_run_writes_what_is_missing_only(kept: int, tmp_path: Path) -> None:
    """A kill between checkpoint and event: the checkpoint's history is longer than the file."""
    with tracker(rounds_config(), "run", tmp_path) as found:
        found.follow(HISTORY[:kept])
    for _ in range(2):
        with tracker(rounds_config(), "run", tmp_path) as found:
            found.follow(HISTORY)
    assert losses(tmp_path) == EXPECTED_LOSSES


@pytest.mark.parametrize("cut", [1, 4, 5, 100, 200])
def test_an_event_that_a_kill_cut_short_is_written_again(cut: int, tmp_path: Path) -> None:
    with tracker(rounds_config(), "run", tmp_path) as found:
        found.follow(HISTORY[:2])
    (file,) = (tmp_path / "tensorboard").iterdir()
    os.truncate(file, file.stat().st_size - cut)
    assert [event.step for event in read_events(file)] == [1]
    with tracker(rounds_config(), "run", tmp_path) as found:
        found.follow(HISTORY)
    assert losses(tmp_path) == EXPECTED_LOSSES


def test_zeros_that_a_power_cut_left_are_no_events(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.1").write_bytes(bytes(500))
    with tracker(rounds_config(), "run", tmp_path) as found:
        found.follow(HISTORY)
    assert losses(tmp_path) == EXPECTED_LOSSES


def test_each_event_is_on_disk_before_the_round_is_told(tmp_path: Path) -> None:
    with tracker(rounds_config(), "run", tmp_path) as found:
        found.follow(HISTORY[:1])
        assert losses(tmp_path) == EXPECTED_LOSSES[:1]


# ---- when something fails ------------------------------------------------------------------------------------------


class Moody:
    """A service that is away for a while."""

    def __init__(self, away: set[int], local: bool = False) -> None:
        self.local = local
        self.away = away
        self.got: list[int] = []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step in self.away:
            self.away.remove(step)
            raise ConnectionError("no route to host")
        self.got.append(step)

    def close(self, complete: bool) -> None:
        pass


def test_a_service_that_is_away_gets_its_rounds_later_and_in_order(caplog: pytest.LogCaptureFixture) -> None:
    moody, steady = Moody({2}), Moody(set())
    found = Tracker([moody, steady])
    for count in (1, 2, 3, 4):
        found.follow(HISTORY[:count])
    assert moody.got == steady.got == [1, 2, 3, 4]
    assert "Moody did not take round 2: no route to host" in caplog.text


def test_what_fails_on_the_own_disk_fails_the_run() -> None:
    with pytest.raises(ConnectionError):
        Tracker([Moody({1}, local=True)]).follow(HISTORY)


def test_a_disk_that_refuses_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(StorageError, match="tensorboard"):
        TensorBoard(tmp_path / "tensorboard")


def test_nothing_is_written_when_it_is_off(tmp_path: Path) -> None:
    config = replace(rounds_config(), tracking=TrackingConfig(tensorboard=False))
    with tracker(config, "run", tmp_path) as found:
        found.follow(HISTORY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["mlflow", "wandb"])
def test_a_package_that_is_not_installed_is_asked_for_in_words(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there, where it is
    wanted = TrackingConfig(**{package: "somewhere"})
    with pytest.raises(ConfigError, match=rf"tracking\.{package}: found 'somewhere'.*`pip install {package}`"):
        require(wanted)
    require(TrackingConfig())


def test_a_folder_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()  # what wandb leaves where it ran
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match="pip install wandb"):
        require(TrackingConfig(wandb="project"))


# ---- with the packages, where they are installed -------------------------------------------------------------------

if find_spec("mlflow") is not None:

    def test_mlflow_holds_each_round_once_in_one_run(tmp_path: Path) -> None:
        from mlflow import MlflowClient

        store = f"sqlite:///{tmp_path / 'mlflow.db'}"
        config = replace(telling_config(), tracking=TrackingConfig(mlflow=store))
        for told in (HISTORY[:2], HISTORY[:3], HISTORY):
            with tracker(config, "tiny-run", tmp_path) as found:
                found.follow(told)
        with tracker(config, "tiny-run", tmp_path / "another"):
            pass
        client = MlflowClient(store)
        experiment = client.get_experiment_by_name("tiny")
        assert experiment is not None
        runs = {len(run.data.metrics): run for run in client.search_runs([experiment.experiment_id])}
        assert set(runs) == {0, len(values(HISTORY[0]))}
        run = runs[len(values(HISTORY[0]))]
        assert run.info.run_name == "tiny-run"
        assert run.info.status == "FINISHED"
        assert run.data.params == settings(config)
        for name in values(HISTORY[0]):
            assert [point.step for point in client.get_metric_history(run.info.run_id, name)] == [1, 2, 3, 4]
        assert not [word for word in (b"alder", b"birch", b"98765") if word in (tmp_path / "mlflow.db").read_bytes()]

    def test_a_service_that_is_not_there_is_told_before_any_training(tmp_path: Path) -> None:
        config = replace(rounds_config(), tracking=TrackingConfig(mlflow="http://127.0.0.1:9"))
        with pytest.raises(ConfigError, match=r"tracking\.mlflow: its service cannot be used"):
            tracker(config, "run", tmp_path).__enter__()


if find_spec("wandb") is not None:

    def test_wandb_is_told_nothing_of_an_institution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WANDB_MODE", "offline")
        config = replace(telling_config(), tracking=TrackingConfig(wandb="silotune"))
        with tracker(config, "tiny-run", tmp_path) as found:
            sys.stderr.write("birch timed out")
            found.follow(HISTORY)
        (kept,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
        assert b"train/loss" in kept.read_bytes()
        files = [file.read_bytes() for file in (tmp_path / "wandb").rglob("*") if file.is_file()]
        hidden = (b"alder", b"birch", b"98765", b"timed out")
        assert not [word for word in hidden for file in files if word in file]
