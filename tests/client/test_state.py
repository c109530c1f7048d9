"""What an institution keeps between rounds, on a real disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.state import LocalState, StateStore
from common.errors import StorageError


def state(number: int) -> LocalState:
    rng = np.random.default_rng(number)
    first = {key: rng.standard_normal((3, 4)).astype(np.float32) for key in ("x.lora_A.weight", "y.lora_B.weight")}
    second = {key: np.square(value) for key, value in first.items()}
    return LocalState(rounds=number, position=7 * number, steps=3 * number, first=first, second=second)


def assert_same(found: LocalState, expected: LocalState) -> None:
    assert (found.rounds, found.position, found.steps) == (expected.rounds, expected.position, expected.steps)
    for one, other in ((found.first, expected.first), (found.second, expected.second)):
        assert {key: value.tobytes() for key, value in one.items()} == {k: v.tobytes() for k, v in other.items()}
        assert {value.dtype for value in one.values()} <= {np.dtype(np.float32)}


def test_the_first_round_starts_from_nothing(tmp_path: Path) -> None:
    assert_same(StateStore(tmp_path / "none").before(1), LocalState())
    assert not (tmp_path / "none").exists()


def test_a_round_starts_from_the_last_one_taken_part_in(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.save(2, state(1))
    store.save(5, state(2))
    assert_same(store.before(9), state(2))
    assert_same(store.before(6), state(2))
    assert_same(store.before(5), state(1))
    assert_same(store.before(3), state(1))


def test_a_repeated_round_starts_from_the_same_state(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.save(1, state(1))
    before = store.before(2)
    store.save(2, state(2))
    assert_same(store.before(2), before)
    store.save(2, state(20))
    assert_same(store.before(2), before)
    assert_same(store.before(3), state(20))


def test_two_rounds_can_be_repeated_at_any_time(tmp_path: Path) -> None:
    # A coordinator killed in round r whose newest checkpoint, of r - 1, is damaged, repeats round r - 1.
    store = StateStore(tmp_path)
    for number in range(1, 8):
        store.save(number, state(number))
        assert_same(store.before(max(number - 1, 1)), state(number - 2) if number > 2 else LocalState())
        assert_same(store.before(number), state(number - 1) if number > 1 else LocalState())


def test_old_files_are_dropped(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    for number in range(1, 30):
        store.save(number, state(number))
        assert len(list(tmp_path.iterdir())) <= 3


def test_a_repeated_round_makes_what_came_after_it_void(tmp_path: Path) -> None:
    # Otherwise a round that this institution sits out would let the next one start from an abandoned future.
    store = StateStore(tmp_path)
    for number in (1, 2, 3):
        store.save(number, state(number))
    store.save(2, state(20))
    assert_same(store.before(4), state(20))
    assert_same(store.before(3), state(20))


def test_a_new_run_of_the_same_name_starts_anew(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    for number in (7, 8, 9):
        store.save(number, state(number))
    assert_same(store.before(1), LocalState())
    store.save(1, state(1))
    assert_same(store.before(2), state(1))
    assert_same(store.before(9), state(1))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12, unique=True))
@settings(max_examples=30, deadline=None)
def test_any_rounds_may_be_skipped(tmp_path_factory: pytest.TempPathFactory, taken: list[int]) -> None:
    store = StateStore(tmp_path_factory.mktemp("state"))
    last = LocalState()
    for number in sorted(taken):
        assert_same(store.before(number), last)
        last = state(number)
        store.save(number, last)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[: len(data) // 2], id="cut"),
        pytest.param(lambda data: b"\xff" * len(data), id="overwritten"),
        pytest.param(lambda data: data.replace(b'"steps"', b'"stepz"'), id="without a count"),
        pytest.param(lambda data: data.replace(b'"steps":"6"', b'"steps":"x"'), id="a count that is none"),
    ],
)
def test_a_broken_file_is_an_error_that_says_what_to_do(tmp_path: Path, damage: object) -> None:
    store = StateStore(tmp_path)
    store.save(1, state(1))
    store.save(2, state(2))
    file = tmp_path / "round-00002.safetensors"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))  # type: ignore[operator]
    assert file.read_bytes() != whole
    with pytest.raises(StorageError, match=r"round-00002.*restore it or start a new run"):
        store.before(3)
    assert_same(store.before(2), state(1))


def test_a_safetensors_file_of_somebody_else_is_an_error(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"w": np.zeros(3, np.float32)}, tmp_path / "round-00001.safetensors")
    with pytest.raises(StorageError, match="round-00001"):
        StateStore(tmp_path).before(2)


def test_a_full_disk_is_an_error_and_leaves_what_was_there(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.save(1, state(1))
    script = """
import resource, sys
from pathlib import Path
import numpy as np
from client.state import LocalState, StateStore
from common.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
big = LocalState(2, 2, 2, {"k": np.zeros(9999, np.float32)}, {"k": np.zeros(9999, np.float32)})
try:
    StateStore(Path(sys.argv[1])).save(2, big)
except StorageError as error:
    sys.exit(f"refused: {error}")
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert "refused: cannot write" in done.stderr, done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["round-00001.safetensors"]
    assert_same(store.before(2), state(1))
