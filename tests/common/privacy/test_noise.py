"""Sources of noise and what is drawn from them: distributions, independence, and that no state gets out."""

from __future__ import annotations

import copy
import os
import pickle
import secrets
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from mypy import api
from numpy.typing import NDArray
from scipy import stats

from common.errors import ConfigError
from common.privacy import noise
from common.privacy.noise import NoiseSource, SeededNoise, SystemNoise, bernoulli, normals, uniform_below

UNLIKELY = 1e-6
SOURCES = [SystemNoise(), SeededNoise(7)]


class Written:
    """A source whose words are written down, and which counts what is taken."""

    def __init__(self, *words: int) -> None:
        self.left, self.taken = list(words), 0

    def words(self, count: int) -> NDArray[np.uint64]:
        self.taken += count
        found, self.left = self.left[:count], self.left[count:]
        return np.array(found, np.uint64)


class Counted:
    def __init__(self, source: NoiseSource) -> None:
        self.source, self.taken = source, 0

    def words(self, count: int) -> NDArray[np.uint64]:
        self.taken += count
        return self.source.words(count)


@pytest.mark.parametrize("source", SOURCES, ids=repr)
def test_words_are_uniform_in_every_bit(source: NoiseSource) -> None:
    words = source.words(1 << 16)
    assert words.dtype == np.uint64
    bits = np.unpackbits(words.view(np.uint8)).reshape(-1, 64).sum(axis=0)
    assert np.all(np.abs(bits - len(words) / 2) < 7 * np.sqrt(len(words) / 4))
    assert len(np.unique(words)) == len(words)


@pytest.mark.parametrize("count", [0, 1, 5, (1 << 14) - 1, (1 << 14) + 3, 3 << 14])
def test_the_systems_words_are_the_key_stream_of_a_key_from_the_system(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = []

    def drawn(size: int) -> bytes:
        keys.append(os.urandom(size))
        return keys[-1]

    monkeypatch.setattr(secrets, "token_bytes", drawn)
    words = SystemNoise().words(count)
    assert [len(key) for key in keys] == [32]
    stream = Cipher(AES(keys[0]), CTR(bytes(16))).encryptor().update(bytes(8 * count))
    assert words.tobytes() == stream


def test_each_call_has_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    source = SystemNoise()
    assert not np.array_equal(source.words(8), source.words(8))


def test_a_fork_draws_other_noise() -> None:
    source = SystemNoise()
    source.words(8)
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.write(writing, source.words(8).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        theirs = pipe.read()
    assert len(theirs) == 64
    assert theirs != source.words(8).tobytes()


def test_seeded_noise_repeats_and_depends_on_every_part() -> None:
    first = normals(SeededNoise(1, "a", 2), 100)
    assert np.array_equal(first, normals(SeededNoise(1, "a", 2), 100))
    for parts in [(1, "a"), (1, "a", 3), (1, "b", 2), (2, "a", 2)]:
        assert abs(np.corrcoef(first, normals(SeededNoise(*parts), 100))[0, 1]) < 0.6


@pytest.mark.parametrize("source", SOURCES, ids=repr)
def test_no_source_is_pickled_copied_or_shown(source: NoiseSource) -> None:
    for way in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="neither pickled nor copied"):
            way(source)
    assert repr(source) == str(source) == f"{type(source).__name__}()"


def test_nothing_stands_in_for_the_systems_generator() -> None:
    with pytest.raises(TypeError, match="no kinds"):
        type("Mine", (SystemNoise,), {})
    with pytest.raises(TypeError):
        SystemNoise(1)  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        SystemNoise().words = SeededNoise(1).words  # type: ignore[method-assign]


@pytest.mark.slow
def test_the_type_checker_refuses_a_seeded_source_where_the_systems_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MYPYPATH", str(Path(noise.__file__).parents[2]))
    source = tmp_path / "deployment.py"
    source.write_text(
        "from common.privacy.noise import NoiseSource, SeededNoise, SystemNoise\n"
        "def deployed(source: SystemNoise) -> None: ...\n"
        "def anywhere(source: NoiseSource) -> None: ...\n"
        "anywhere(SystemNoise()); anywhere(SeededNoise(1)); deployed(SystemNoise())\n"
        "deployed(SeededNoise(1))\n"
    )
    found, _, status = api.run(
        ["--config-file=", f"--cache-dir={tmp_path / 'cache'}", "--follow-imports=silent", str(source)]
    )
    assert status == 1
    assert found.count("error:") == 1
    assert 'deployment.py:5: error: Argument 1 to "deployed" has incompatible type "SeededNoise"' in found


@pytest.mark.parametrize("source", SOURCES, ids=repr)
@pytest.mark.parametrize("count", [1, 2, 9_999, 200_001])
def test_normals_are_standard_normals(source: NoiseSource, count: int) -> None:
    found = normals(source, count)
    assert found.shape == (count,)
    assert found.dtype == np.float64
    assert np.isfinite(found).all()
    if count > 2:
        assert stats.kstest(found, "norm").pvalue > UNLIKELY
        for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
            error = np.std(found**power) / np.sqrt(count)
            assert abs(np.mean(found**power) - moment) < 6 * error


def test_normals_of_one_block_of_another_and_of_one_pair_are_independent() -> None:
    found = normals(SeededNoise(3), 1 << 17)
    half = len(found) // 2
    for shift in (1, 1 << 12, half):  # half: the other normal of the same pairs
        for f in (np.asarray, np.abs, np.square):
            assert abs(np.corrcoef(f(found[:-shift]), f(found[shift:]))[0, 1]) < 6 / np.sqrt(half)


def test_two_sources_are_independent() -> None:
    first, second = (normals(source, 1 << 16) for source in (SystemNoise(), SystemNoise()))
    assert abs(np.corrcoef(first, second)[0, 1]) < 6 / 256
    assert stats.ks_2samp(first, second).pvalue > UNLIKELY


def test_each_normal_is_a_sum_of_four() -> None:
    # Box and Muller make two normals of two words, so that four summands a normal are four words a normal.
    source = Counted(SeededNoise(1))
    normals(source, 10_000)
    assert source.taken == 40_000


def test_the_farthest_normal_is_finite() -> None:
    nearest = normals(Written(*[2**64 - 1] * 4, *[0] * 4), 2)
    farthest = normals(Written(*[0] * 4, *[0] * 4), 2)
    assert nearest == pytest.approx([0, 0], abs=1e-7)
    assert farthest == pytest.approx([2 * np.sqrt(2 * 64 * np.log(2)), 0])


@pytest.mark.parametrize("source", SOURCES, ids=repr)
@pytest.mark.parametrize("q", [0.0, 1e-3, 0.1, 0.5, 0.9, 1.0])
def test_choices_have_their_probability(source: NoiseSource, q: float) -> None:
    found = bernoulli(source, q, 200_000)
    assert found.dtype == np.bool_
    assert abs(found.sum() - 200_000 * q) <= 6 * np.sqrt(200_000 * q * (1 - q))


@pytest.mark.parametrize("q", [0.5, 0.1, 1 / 3, 2**-40])
def test_choices_are_right_to_the_last_bit_of_a_word(q: float) -> None:
    edge = int(q * 2**64)  # of a float64 the product is exact
    assert bernoulli(Written(0, edge - 1, edge, 2**64 - 1), q, 4).tolist() == [True, True, False, False]


@pytest.mark.parametrize("q", [-0.1, 1.1, float("nan")])
def test_what_is_no_probability_is_refused(q: float) -> None:
    with pytest.raises(ConfigError, match="probability"):
        bernoulli(SystemNoise(), q, 1)


@pytest.mark.parametrize("bound", [1, 2, 3, 7, 16, 100])
def test_whole_numbers_below_a_bound_are_uniform(bound: int) -> None:
    found = uniform_below(SeededNoise(bound), bound, 50_000)
    counts = np.bincount(found.astype(np.int64), minlength=bound)
    assert len(counts) == bound
    assert bound == 1 or stats.chisquare(counts).pvalue > UNLIKELY


def test_words_that_would_favour_small_numbers_are_drawn_anew() -> None:
    bound = 3 << 62  # 2^64 modulo it is 2^62: without a new draw the lower third would be twice as likely
    surplus = 2**64 % bound
    assert surplus == 2**62
    found = uniform_below(Written(5, surplus, 2**64 - 1, surplus - 1, surplus + 9), bound, 3)
    assert found.tolist() == [surplus + 9, surplus, 2**64 - 1 - bound]


def test_large_bounds_are_met() -> None:
    bound = (1 << 63) + 12345
    found = uniform_below(SeededNoise(5), bound, 20_000)
    assert int(found.max()) < bound
    assert stats.kstest(found.astype(np.float64) / bound, "uniform").pvalue > UNLIKELY
