"""Where attacks take place: what is trained, what is taken from a finished run, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from common import config_files
from common.config import PrivacyConfig
from common.config_files import load
from common.errors import ConfigError
from common.files import write_text
from simulations.attacks.arms import FEDERATED, LOCAL, PRIVATE, Ground, jobs, open_ground, with_privacy
from simulations.layout import RunDirectory

CONFIG = load("smoke")


def finished(config: object, root: Path) -> Ground:
    assert isinstance(config, type(CONFIG))
    write_text(root / "config.yaml", config_files.to_yaml(config))
    write_text(root / "summary.json", "{}")
    return open_ground(config, root)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    ground = finished(CONFIG, tmp_path)
    found = {job.key: job for job in jobs(ground, (LOCAL, FEDERATED, PRIVATE))}
    assert found[FEDERATED, ""].ready
    assert found[FEDERATED, ""].home == tmp_path
    assert found[LOCAL, "northgate"].home == tmp_path / "arms" / "northgate"
    assert not found[PRIVATE, ""].ready
    alone = replace(CONFIG, compare=replace(CONFIG.compare, enabled=False))
    assert not any(job.ready for job in jobs(finished(alone, tmp_path / "alone"), (LOCAL,)))


def test_a_finished_run_with_privacy_is_the_private_arm(tmp_path: Path) -> None:
    private = replace(with_privacy(CONFIG), privacy=PrivacyConfig("record", epsilon=3.0))
    found = {job.key: job for job in jobs(finished(private, tmp_path), (LOCAL, FEDERATED, PRIVATE))}
    assert [key for key, job in found.items() if job.ready] == [(PRIVATE, "")]
    assert found[PRIVATE, ""].config.privacy == private.privacy
    assert not found[FEDERATED, ""].config.privacy.private


def test_a_run_that_is_not_finished_is_left_alone(tmp_path: Path) -> None:
    write_text(tmp_path / "config.yaml", config_files.to_yaml(CONFIG))
    found = jobs(open_ground(CONFIG, tmp_path), (LOCAL, FEDERATED))
    assert all(tmp_path / "attacks" in job.home.parents for job in found)


@pytest.mark.parametrize("place", [".", "attacks"])
def test_another_configurations_directory_is_refused_and_left_as_it_was(tmp_path: Path, place: str) -> None:
    file = tmp_path / place / "config.yaml"
    write_text(file, config_files.to_yaml(CONFIG))
    before = file.read_bytes()
    with pytest.raises(ConfigError, match="another configuration"):
        open_ground(replace(CONFIG, seed=2), tmp_path)
    assert file.read_bytes() == before
    assert not (tmp_path / "data").exists()


def test_the_private_arm_can_be_meant(tmp_path: Path) -> None:
    config_files.validate(with_privacy(replace(CONFIG, lora=replace(CONFIG.lora, dropout=0.3))))
    (job,) = jobs(Ground(CONFIG, RunDirectory.at(tmp_path)), (PRIVATE,))
    config_files.validate(job.config)
    assert job.config.privacy.mode == "patient"


def test_noise_in_shares_needs_masks_and_nothing_else_does(tmp_path: Path) -> None:
    shared = replace(with_privacy(CONFIG), privacy=PrivacyConfig("institution", epsilon=3.0))
    ground = Ground(shared, RunDirectory.at(tmp_path))
    masked = {job.key[0]: job.config.secure_aggregation.enabled for job in jobs(ground, (FEDERATED, PRIVATE))}
    assert masked == {FEDERATED: False, PRIVATE: True}


def test_something_is_trained_for_each_institution_that_is_asked_for(tmp_path: Path) -> None:
    ground = Ground(CONFIG, RunDirectory.at(tmp_path))
    assert [job.key for job in jobs(ground, (LOCAL,))] == [(LOCAL, name) for name in CONFIG.data.names]
    assert [job.key for job in jobs(ground, (LOCAL,), ["lakeside"])] == [(LOCAL, "lakeside")]
