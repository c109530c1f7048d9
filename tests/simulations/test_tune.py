"""The search, through its command: one grid for every arm, judged on validation records, resumable."""

import json
import subprocess
import sys
from pathlib import Path

COMMAND = [str(Path(sys.executable).with_name("silotune-sim")), "tune", "smoke"]
GRID = ["federation.rounds=1", "tune.batch_sizes=[4]", "tune.learning_rates=[1e-9,3e-3]"]


def tune(out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *GRID, "--out", str(out), "--json"], capture_output=True, text=True, timeout=300, check=False
    )


def test_every_arm_is_searched_over_the_same_grid_without_test_records(tmp_path: Path) -> None:
    done = tune(tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {(t["arm"], t["batch_size"], t["learning_rate"]) for t in found["trials"]} == {
        (arm, 4, rate) for arm in ("federated", "local", "pooled") for rate in (1e-9, 3e-3)
    }
    # A rate of 1e-9 moves nothing, so a search that works finds the other one.
    assert {arm: best["learning_rate"] for arm, best in found["best"].items()} == dict.fromkeys(found["best"], 3e-3)
    lines = (tmp_path / "best.txt").read_text().split()
    assert "train.learning_rate=0.003" in lines
    assert "compare.pooled.batch_size=4" in lines

    # Test records were not needed, and what was found stands: a second call reads checkpoints instead of training.
    for file in (tmp_path / "data").glob("*/test.jsonl"):
        file.unlink()
    checkpoints = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("round-*.safetensors")}
    again = tune(tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["best"] == found["best"]
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("round-*.safetensors")} == checkpoints


def test_a_grid_that_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "tune.learning_rates=[-1]", "--out", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "tune.learning_rates" in done.stderr
