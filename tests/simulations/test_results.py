"""The shipped settings are what the search found, and the shipped recipe does what the README says."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config import ArmConfig
from common.config_files import configs_dir, load
from simulations.benchmarks import privacy, privacy_grid
from simulations.tune import ARMS, KEYS

RESULTS = Path(__file__).resolve().parents[2] / "simulations" / "results"
NAMES = ("hospitals", "banks")


def found(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}-tune.json").read_text())
    return result


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_ships_what_the_search_found(name: str) -> None:
    config, search = load(name), found(name)
    shipped = {
        "federated": ArmConfig(config.train.batch_size, config.train.learning_rate),
        "local": config.compare.local,
        "pooled": config.compare.pooled,
    }
    for arm in ARMS:
        trials = [trial for trial in search["trials"] if trial["arm"] == arm]
        best = min(trials, key=lambda trial: math.inf if trial["perplexity"] is None else trial["perplexity"])
        assert shipped[arm] == ArmConfig(best["batch_size"], best["learning_rate"]), KEYS[arm]


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_was_searched_over_the_grid_of_the_configuration(name: str) -> None:
    config, search = load(name), found(name)
    grid = {(size, rate) for size in config.tune.batch_sizes for rate in config.tune.learning_rates}
    for arm in ARMS:
        assert {(t["batch_size"], t["learning_rate"]) for t in search["trials"] if t["arm"] == arm} == grid


def main_job() -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / "main-job.json").read_text())
    return result


@pytest.mark.parametrize("name", NAMES)
def test_quoted_results_are_those_of_the_shipped_configuration(name: str) -> None:
    assert main_job()["configurations"][name] == yaml.safe_load((configs_dir() / f"{name}.yaml").read_text())


def test_quoted_results_are_those_that_were_measured() -> None:
    readme, results = (file.read_text() for file in (RESULTS.parents[1] / "README.md", RESULTS / "README.md"))
    for run in main_job()["runs"]:
        arms = [run[arm] for arm in ("base", "local_best", "federated", "pooled")]
        cells = [f"{arm['perplexity']:.2f} ({arm['accuracy'] * 100:.0f} %)" for arm in arms]
        home = f"{run['gained']} of {run['institutions']}"
        row = [f"{run['name']}, {run['seed']}", *cells, f"{run['gap_closed']:.2f}", home, f"{run['seconds_total']:.0f}"]
        assert f"| {' | '.join(row)} |" in results
        if run["seed"] == 1:
            cells = [f"{arm['perplexity']:.2f}, {arm['accuracy'] * 100:.0f} %" for arm in arms]
            assert f"| {' | '.join([*cells, format(run['gap_closed'], '.2f')])} |" in readme


def test_what_privacy_costs_is_quoted_as_it_was_measured() -> None:
    """Every line of the table, and no other; the figures; and how much of the grid there is."""
    readme, results = (RESULTS / "README.md").read_text(), privacy_grid.kept(RESULTS)
    table = readme[readme.index("## What privacy costs") : readme.index("`alone` is the best hospital alone")]
    quoted = [line for line in table.splitlines() if line.startswith(("| 80 |", "| 1000 |"))]
    assert sorted(quoted) == sorted(f"| {' | '.join(row)} |" for row in privacy.rows(results))
    for name, value in privacy.figures(results).items():
        assert f"`{name}` {value:.2f} (" in readme.replace("\n", " ")
    whole = set(privacy_grid.grid((1000, 80), (1, 2, 3)))
    there = sum(result.point in whole for result in results)
    assert f"({len(whole)} points, about 18 hours on two cores) {there} are there, and {len(results) - there}" in readme


def test_noise_in_shares_is_held_against_the_better_of_noise_at_home() -> None:
    readme = " ".join((RESULTS / "README.md").read_text().split())
    for epsilon, told in (
        (8.0, "at epsilon 8, where `record` by its better method (`fedavg`) has"),
        (1.0, "where that has"),
    ):
        points = [r for r in privacy_grid.kept(RESULTS) if (r.point.patients, r.point.epsilon) == (80, epsilon)]
        federated = [r for r in points if r.point.arm == privacy_grid.FEDERATED]
        shared, record = (
            min(r.perplexity for r in federated if r.point.mode == mode) for mode in ("distributed", "record")
        )
        assert f"{shared:.2f} at epsilon {epsilon:g}" in readme
        assert f"{told} {record:.2f}" in readme


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_the_federation_pays_off(name: str, seed: int, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("silotune-sim")), "run", name, f"seed={seed}", f"data.seed={seed}"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run"), "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    everyone = summary["everyone"]
    assert everyone["base"]["perplexity"] < 100
    assert everyone["base"]["accuracy"] < 0.1
    assert everyone["pooled"]["accuracy"] >= 0.7
    assert everyone["pooled"]["perplexity"] <= 0.75 * everyone["local_best"]["perplexity"]
    assert summary["gap_closed"] >= 0.5
