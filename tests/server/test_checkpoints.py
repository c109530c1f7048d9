"""Checkpoints on a real disk: what is read is what was written, or it is not read at all."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import ServerOptimizerConfig
from common.errors import ConfigError, StorageError
from server import checkpoints
from server.rounds import Progress
from tests.server.conftest import RuleMembers, play, rounds_config

DIGEST = "d" * 64


@pytest.fixture(scope="module")
def run() -> list[Progress]:
    """The progress after each of four rounds with FedAdam, which has moments to keep."""
    seen: list[Progress] = []
    optimizer = ServerOptimizerConfig("fedadam", learning_rate=0.1)
    play(rounds_config(server_optimizer=optimizer), RuleMembers(), on_round=seen.append)
    return seen


def written(run: list[Progress], directory: Path) -> list[Path]:
    for progress in run:
        checkpoints.save(directory, progress, DIGEST)
    return sorted(directory.iterdir())


def assert_same(found: Progress | None, expected: Progress) -> None:
    assert found is not None
    assert found.adapter.digest() == expected.adapter.digest()
    assert found.best.digest() == expected.best.digest()
    assert (found.best_round, found.best_perplexity) == (expected.best_round, expected.best_perplexity)
    assert found.history == expected.history
    for mine, theirs in (
        (found.optimizer.first, expected.optimizer.first),
        (found.optimizer.second, expected.optimizer.second),
    ):
        assert {key: value.tobytes() for key, value in mine.items()} == {k: v.tobytes() for k, v in theirs.items()}
        assert all(value.dtype == np.float32 for value in mine.values())


def test_what_is_read_is_what_was_written(run: list[Progress], tmp_path: Path) -> None:
    for progress in run:
        checkpoints.save(tmp_path, progress, DIGEST)
        assert_same(checkpoints.latest(tmp_path, DIGEST), progress)


def test_an_infinite_perplexity_comes_back_infinite(run: list[Progress], tmp_path: Path) -> None:
    never_better = replace(run[0], best_round=0, best_perplexity=math.inf)
    checkpoints.save(tmp_path, never_better, DIGEST)
    assert_same(checkpoints.latest(tmp_path, DIGEST), never_better)


def test_equal_progress_has_equal_bytes(run: list[Progress], tmp_path: Path) -> None:
    for name in ("one", "other"):
        checkpoints.save(tmp_path / name, run[1], DIGEST)
    one, other = (next((tmp_path / name).iterdir()).read_bytes() for name in ("one", "other"))
    assert one == other


def test_the_last_two_are_kept(run: list[Progress], tmp_path: Path) -> None:
    assert [file.name for file in written(run, tmp_path)] == ["round-00003.safetensors", "round-00004.safetensors"]


def test_without_a_checkpoint_there_is_no_progress(tmp_path: Path) -> None:
    assert checkpoints.latest(tmp_path / "none", DIGEST) is None
    (tmp_path / ".round-00001.safetensors.partial").write_text("killed while writing")
    assert checkpoints.latest(tmp_path, DIGEST) is None


def test_a_checkpoint_of_another_configuration_is_an_error(run: list[Progress], tmp_path: Path) -> None:
    written(run, tmp_path)
    with pytest.raises(ConfigError, match=r"round-00004.*another configuration.*resume with the configuration"):
        checkpoints.latest(tmp_path, "e" * 64)


DAMAGE: list[Any] = [
    pytest.param(lambda data: b"", id="empty"),
    pytest.param(lambda data: data[:7], id="cut in the header's length"),
    pytest.param(lambda data: data[: len(data) // 2], id="cut"),
    pytest.param(lambda data: data[:-1], id="one byte short"),
    pytest.param(lambda data: b"\0" * len(data), id="zeros"),
    pytest.param(lambda data: data[:-5] + bytes([data[-5] ^ 16]) + data[-4:], id="one bit of a factor"),
    pytest.param(lambda data: data.replace(b"best_round", b"bestiround"), id="a name"),
    pytest.param(lambda data: data.replace(b"contributors", b"contributers"), id="a name in a record"),
    pytest.param(lambda data: data.replace(b'\\"round\\\\\\": 2', b'\\"round\\\\\\": 3'), id="a number in a record"),
    pytest.param(lambda data: data.replace(b'"progress"', b'"progrxss"'), id="no progress"),
    pytest.param(lambda data: data.replace(b"best/layer", b"bess/layer"), id="the name of a factor"),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    damage: Callable[[bytes], bytes], run: list[Progress], tmp_path: Path
) -> None:
    _, last = written(run, tmp_path)
    whole = last.read_bytes()
    last.write_bytes(damage(whole))
    assert last.read_bytes() != whole
    assert_same(checkpoints.latest(tmp_path, DIGEST), run[2])


def test_no_flipped_bit_goes_unnoticed(run: list[Progress], tmp_path: Path) -> None:
    _, last = written(run, tmp_path)
    whole = last.read_bytes()

    @given(place=st.integers(0, len(whole) - 1), bit=st.integers(0, 7))
    @settings(max_examples=200, deadline=None)
    def flip(place: int, bit: int) -> None:
        last.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        found = checkpoints.latest(tmp_path, DIGEST)
        assert found is not None
        # Mostly it is not read; where the bit says nothing (JSON has several forms), what is read is what was written.
        assert_same(found, run[found.round - 1])

    flip()


def test_a_safetensors_file_of_somebody_else_falls_back(run: list[Progress], tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    _, last = written(run, tmp_path)
    save_file({"w": np.zeros(3, np.float32)}, last)
    assert_same(checkpoints.latest(tmp_path, DIGEST), run[2])


def test_when_none_can_be_read_that_is_an_error_and_not_a_new_run(run: list[Progress], tmp_path: Path) -> None:
    for file in written(run, tmp_path):
        file.write_bytes(b"\0" * 100)
    with pytest.raises(StorageError, match=r"no checkpoint in .* can be read.*start a new run"):
        checkpoints.latest(tmp_path, DIGEST)


def test_a_damaged_checkpoint_is_replaced_when_its_round_is_repeated(run: list[Progress], tmp_path: Path) -> None:
    _, last = written(run, tmp_path)
    last.write_bytes(b"")
    checkpoints.save(tmp_path, run[3], DIGEST)
    assert_same(checkpoints.latest(tmp_path, DIGEST), run[3])


def test_a_full_disk_is_an_error_and_the_checkpoints_before_stay(run: list[Progress], tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in written(run[:2], tmp_path)}
    # A limit on the size of files fails as a full disk does, while writing; root heeds no permissions.
    script = """
import resource, sys
from pathlib import Path
from common.errors import StorageError
from server import checkpoints
found = checkpoints.latest(Path(sys.argv[1]), sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
from dataclasses import replace
try:
    checkpoints.save(Path(sys.argv[1]), replace(found, history=(*found.history, found.history[-1])), sys.argv[2])
except StorageError as error:
    sys.exit(f"refused: {error}")
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), DIGEST],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "refused: cannot write" in done.stderr, done.stderr
    assert "round-00003" in done.stderr
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert_same(checkpoints.latest(tmp_path, DIGEST), run[1])


def test_a_directory_that_cannot_be_made_is_an_error(run: list[Progress], tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a directory should be")
    with pytest.raises(StorageError, match="cannot write"):
        checkpoints.save(tmp_path / "checkpoints", run[0], DIGEST)
