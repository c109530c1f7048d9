"""The benchmark of local training: same records for every arm, and figures that mean what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from simulations.benchmarks.arms import SHAPES, TRAIN, batches, examples


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """What the command prints, for a shape that takes seconds."""
    command = [str(Path(sys.executable).with_name("silotune-sim")), "bench", "trainer", "--shape", "tiny"]
    done = subprocess.run(
        [*command, "--records", "48", "--repeats", "1", "--threads", "1", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_arm_is_timed_on_the_same_records(result: dict[str, Any]) -> None:
    shape = result["shapes"]["tiny"]
    assert set(shape["arms"]) == {"silotune", "hf", "trl", "trl_padding_free"}
    for arm in shape["arms"].values():
        assert arm["tokens_per_second"] == pytest.approx(shape["tokens"] / arm["seconds"][0], rel=0.01)
        assert arm["peak_mib"] > 0.5  # AdamW's moments of 8 x 16 x 128 numbers, and a row's activations
    assert shape["padded_tokens"] > shape["tokens"]


def test_speedups_are_ratios_of_tokens_per_second(result: dict[str, Any]) -> None:
    speed = {name: arm["tokens_per_second"] for name, arm in result["shapes"]["tiny"]["arms"].items()}
    assert result["speedup_vs_hf"] == pytest.approx(speed["silotune"] / speed["hf"])
    assert result["speedup_vs_trl"] == pytest.approx(speed["silotune"] / speed["trl"])


def test_every_arm_trains_the_same_adapter(result: dict[str, Any]) -> None:
    arms = result["shapes"]["tiny"]["arms"]
    assert arms["silotune"]["adapter_difference"] == 0
    # Sums in another order; a record in another batch, or another rate, moves an adapter by more than a tenth.
    assert all(arm["adapter_difference"] < 1e-3 for arm in arms.values())


def test_our_loss_curve_is_the_padded_loops(result: dict[str, Any]) -> None:
    assert 0 < result["loss_max_abs_diff"] < 1e-4


def test_records_vary_in_length_and_are_supervised_as_the_shape_says() -> None:
    made = examples(SHAPES["m-qv-32k"], 2000)
    lengths = [len(example.ids) for example in made]
    assert 50 < sum(lengths) / len(lengths) < 65  # log-normal with mean 60, cut at 512
    assert max(lengths) <= 512
    assert sum(example.supervised for example in made) / sum(lengths) == pytest.approx(0.25, abs=0.01)
    assert max(max(example.ids) for example in made) > 30_000


def test_batches_hold_every_record_once() -> None:
    made = examples(SHAPES["tiny"], 64)
    taken = batches(made)
    assert [len(batch) for batch in taken] == [TRAIN.batch_size] * 4
    assert sorted(example.ids for batch in taken for example in batch) == sorted(example.ids for example in made)
    assert taken[0] != list(made[: TRAIN.batch_size])  # shuffled, as training does
