"""DP-SGD on the LoRA factors against a plain loop over one unit at a time, and the bound that it promises."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

import client.private_training as private_training
from client.noised_optimizer import NoisedOptimizer, sums_of_clipped
from client.private_training import NoisedStep, clipped_sum, pieces, train_privately
from client.state import LocalState
from client.training import Assignment, Trained, train
from client.units import Unit
from common.adapter import Adapter, flatten, is_a, is_b
from common.config import LEAST_CLIP, LoraConfig, ModelConfig, TrainConfig
from common.errors import ConfigError, DataError
from common.methods import METHODS
from common.models import LoraModel, load
from common.privacy.mechanism import steps_per_round
from common.privacy.noise import NoiseSource, SeededNoise, SystemNoise, bernoulli, normals
from common.text import Example, pack

PLAIN = TrainConfig(learning_rate=3e-3, warmup=0.2, final_rate=0.1, passes_per_round=1.5)
STEP = NoisedStep(noise_multiplier=0.7, clip=0.5, sampling_rate=0.37)
# Sums of float32 products in another order differ by some 1e-7 relative; steps of 3e-3 agree to a few 1e-6.
AGREES = 1e-5


@pytest.fixture(scope="session")
def units(examples: list[Example]) -> list[Unit]:
    """Two records of one person, three of another, one of two more: records of any length in a unit of any size."""
    return [Unit(tuple(examples[a:b])) for a, b in ((0, 2), (2, 5), (5, 6), (6, 7))]


def sources(*parts: str | int) -> Callable[[int], NoiseSource]:
    """Noise of its own for every round; twice the same for the same parts."""
    return lambda number: SeededNoise(*parts, number)


def run(
    model: LoraModel,
    units: Sequence[Unit],
    start: Adapter,
    config: TrainConfig = PLAIN,
    step: NoisedStep = STEP,
    rounds: int = 1,
    method: str = "fedavg",
    noise: Callable[[int], NoiseSource] = sources(1),  # noqa: B008 - it holds nothing
) -> list[Trained]:
    """Rounds of a federation of one: each goes on from the adapter and the state of the one before."""
    outcomes: list[Trained] = []
    adapter, state = start, LocalState()
    for number in range(1, rounds + 1):
        task = Assignment(number, rounds, METHODS[method].trained(start), seed=5, name="alder")
        outcomes.append(train_privately(model, units, adapter, state, config, step, task, noise(number)))
        adapter, state = outcomes[-1].adapter, outcomes[-1].state
    return outcomes


def vector(adapter: Adapter) -> NDArray[np.float32]:
    return flatten(adapter.factors, adapter.factors)


def gradient_of(outcome: Trained) -> NDArray[np.float64]:
    """The gradient that AdamW met in the only step of a run: its first moment is (1 - beta1) times that."""
    assert outcome.state.steps == 1
    return np.concatenate([outcome.state.first[key].ravel() for key in sorted(outcome.state.first)]).astype(float) * 10


def once(
    model: LoraModel, units: Sequence[Unit], start: Adapter, step: NoisedStep, noise: NoiseSource | None = None
) -> NDArray[np.float64]:
    """What one step makes of the units: the noised sum, before it is divided."""
    source = noise or SeededNoise("once")
    (outcome,) = run(model, units, start, replace(PLAIN, passes_per_round=0.0), step, noise=lambda _: source)
    return gradient_of(outcome) * step.sampling_rate * len(units)


@dataclass
class Oracle:
    """The same training written down again: one unit at a time, one document a row, every sum in float64."""

    model: LoraModel
    config: TrainConfig
    step: NoisedStep
    nats: float = 0.0
    tokens: int = 0
    lots: int = 0

    def train(
        self,
        units: Sequence[Unit],
        start: Adapter,
        keys: Sequence[str],
        rounds: int,
        noise: Callable[[int], NoiseSource],
    ) -> tuple[Adapter, torch.optim.AdamW]:
        config, step, model = self.config, self.step, self.model
        model.write(start)
        for key, parameter in model.parameters.items():
            parameter.requires_grad_(key in keys)
        parameters = [model.parameters[key] for key in sorted(keys)]
        optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=config.weight_decay)
        steps = round(config.passes_per_round / step.sampling_rate)
        for number in range(rounds):
            source = noise(number + 1)
            anchor = [parameter.detach().clone() for parameter in parameters]
            if config.optimizer_state == "reset":
                optimizer.state.clear()
            for index in range(steps):
                chosen = bernoulli(source, step.sampling_rate, len(units))
                totals = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
                for unit in itertools.compress(units, chosen):
                    gradients = [gradient.double() for gradient in torch.autograd.grad(self.loss(unit), parameters)]
                    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
                    for total, gradient in zip(totals, gradients, strict=True):
                        total += gradient * min(1.0, step.clip / norm)
                for parameter, total, before in zip(parameters, totals, anchor, strict=True):
                    drawn = torch.from_numpy(normals(source, parameter.numel())).view_as(parameter)
                    noised = total + step.noise_multiplier * step.clip * drawn
                    mean = (noised / (step.sampling_rate * len(units))).float()
                    parameter.grad = mean + config.proximal * (parameter.detach() - before)
                optimizer.param_groups[0]["lr"] = self.rate((number * steps + index + 1) / (rounds * steps))
                optimizer.step()
                self.lots += 1
        return model.read(), optimizer

    def loss(self, unit: Unit) -> torch.Tensor:
        total = torch.zeros(())
        for example in unit.examples:
            row = pack([example])
            total = total + cross_entropy(self.model.logits(row), row.targets, reduction="sum")
        self.nats += float(total.detach())
        self.tokens += unit.supervised
        return total / unit.supervised

    def rate(self, progress: float) -> float:
        """Linear to 3e-3 over the first fifth, then half a cosine down to a tenth of it."""
        if progress < 0.2:
            return 3e-3 * progress / 0.2
        return 3e-4 + 2.7e-3 * (1 + math.cos(math.pi * (progress - 0.2) / 0.8)) / 2


@pytest.mark.parametrize(
    ("config", "step", "method"),
    [
        pytest.param(PLAIN, STEP, "fedavg", id="plain"),
        pytest.param(PLAIN, STEP, "ffa", id="B only"),
        pytest.param(PLAIN, replace(STEP, sampling_rate=1.0), "fedavg", id="every unit in every step"),
        pytest.param(PLAIN, replace(STEP, clip=1e6, noise_multiplier=1e-8), "fedavg", id="nothing clipped"),
        pytest.param(PLAIN, replace(STEP, sampling_rate=0.1), "fedavg", id="empty lots"),
        pytest.param(replace(PLAIN, row_tokens=25), replace(STEP, sampling_rate=1.0), "fedavg", id="many pieces"),
        pytest.param(replace(PLAIN, row_tokens=1), replace(STEP, sampling_rate=0.9), "fedavg", id="units in many rows"),
        pytest.param(replace(PLAIN, checkpointing=True), STEP, "fedavg", id="checkpointing"),
        pytest.param(replace(PLAIN, proximal=3.0, weight_decay=0.1), STEP, "fedavg", id="FedProx and decay"),
        pytest.param(replace(PLAIN, optimizer_state="reset"), STEP, "fedavg", id="moments reset"),
        pytest.param(replace(PLAIN, batch_size=1, max_grad_norm=1e-6), STEP, "fedavg", id="batches of no account"),
    ],
)
def test_two_rounds_equal_one_uninterrupted_plain_loop(
    config: TrainConfig, step: NoisedStep, method: str, lora_model: LoraModel, units: list[Unit], start: Adapter
) -> None:
    first, second = run(lora_model, units, start, config, step, 2, method)
    keys = METHODS[method].trained(start)
    oracle = Oracle(lora_model, config, step)
    expected, optimizer = oracle.train(units, start, keys, 2, sources(1))
    np.testing.assert_allclose(vector(second.adapter), vector(expected), rtol=0, atol=AGREES)
    assert np.abs(vector(second.adapter) - vector(start)).max() > 100 * AGREES  # the tolerance hides no standing still
    assert first.loss + second.loss == pytest.approx(oracle.nats, rel=1e-5)
    assert first.tokens + second.tokens == oracle.tokens
    assert first.steps + second.steps == second.state.steps == oracle.lots == 2 * round(1.5 / step.sampling_rate)
    assert second.state.rounds == 2
    for key in keys if config.optimizer_state == "keep" else ():
        moments = optimizer.state[lora_model.parameters[key]]
        scale = float(moments["exp_avg"].abs().max())
        np.testing.assert_allclose(second.state.first[key], moments["exp_avg"], rtol=0, atol=1e-4 * scale)
    assert set(second.state.first) == (set(keys) if config.optimizer_state == "keep" else set())


def test_pieces_bounded_by_memory_add_up_to_the_same(
    lora_model: LoraModel, units: list[Unit], start: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = replace(STEP, sampling_rate=1.0)
    (expected,) = run(lora_model, units, start, step=every)
    monkeypatch.setattr(private_training, "_PIECE_BYTES", 1)  # one unit at a time
    (found,) = run(lora_model, units, start, step=every)
    np.testing.assert_allclose(vector(found.adapter), vector(expected.adapter), rtol=0, atol=AGREES)
    assert found.tokens == expected.tokens == sum(unit.supervised for unit in units) * found.steps


# ---- the bound -------------------------------------------------------------------------------------------------------

anything = st.one_of(
    st.floats(width=32),  # infinities and what is no number too
    st.floats(-10, 10, width=32),
    st.sampled_from([1e-45, 1e-30, 1e19, 3e38, -3e38, math.inf, math.nan]),
)


@given(
    units=st.lists(st.lists(anything, min_size=6, max_size=6), min_size=1, max_size=5),
    clip=st.floats(LEAST_CLIP, 1e6),
)
@settings(deadline=None, derandomize=True, max_examples=500)
def test_no_unit_contributes_more_than_the_clip(units: list[list[float]], clip: float) -> None:
    gradients = torch.tensor(units, dtype=torch.float32)
    parts = [gradients[:, :2].reshape(-1, 1, 2), gradients[:, 2:]]  # two factors: clipped jointly
    total = torch.zeros(6, dtype=torch.float64)
    for number, unit in enumerate(gradients.double()):
        alone = sums_of_clipped([part[number : number + 1] for part in parts], clip)
        mine = torch.cat([part.flatten() for part in alone]).double()
        assert float(mine.norm()) <= clip
        norm = float(unit.norm())
        if math.isfinite(norm) and 1e-20 < norm < 1e30:
            torch.testing.assert_close(mine, unit * min(1.0, clip / norm), rtol=2e-6, atol=1e-38)
        if not norm < clip / 1.2e-38:
            assert not mine.any()
        total += mine
    together = torch.cat([part.flatten() for part in sums_of_clipped(parts, clip)]).double()
    torch.testing.assert_close(together, total, rtol=0, atol=1e-6 * clip * len(units))


@pytest.mark.parametrize("size", [3e-38, 3e-8, 1e3])
def test_the_bound_holds_for_the_least_clip_and_a_smaller_one_is_refused(size: float) -> None:
    """Of many equal numbers each may be rounded up, and near the smallest that float32 has that would be to twice."""
    gradient = torch.full((1, 63_488), size)
    (mine,) = sums_of_clipped([gradient], LEAST_CLIP)
    assert float(mine.double().norm()) <= LEAST_CLIP
    for clip in (LEAST_CLIP / 2, 1.8e-43, 0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="expected a clip of at least 1e-12"):
            sums_of_clipped([gradient], clip)


def test_without_units_there_is_a_sum_too() -> None:
    assert [part.tolist() for part in sums_of_clipped([torch.zeros(0, 2, 1), torch.zeros(0, 3)], 1.0)] == [
        [[0], [0]],
        [0] * 3,
    ]


@pytest.mark.parametrize("clip", [1e-3, 0.05, 50.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_unit_that_is_there_or_not_changes_the_noised_sum_by_no_more_than_the_clip(
    dtype: str, clip: float, base_model: str, units: list[Unit], start: Adapter
) -> None:
    model = load(ModelConfig(base_model, device="cpu", dtype=dtype), LoraConfig(rank=4, alpha=8.0, dropout=0.0), 1)
    step = NoisedStep(noise_multiplier=0.01, clip=clip, sampling_rate=1.0)
    whole = once(model, units, start, step)
    free = [unit_gradient(model, unit, start) for unit in units]
    # Rounding: the sum, and in bfloat16 what a row of another shape does to all other units.
    rounding = (1e-6 if dtype == "float32" else 1e-2) * len(units)
    for number in range(len(units)):
        without = once(model, [*units[:number], Unit(()), *units[number + 1 :]], start, step)
        change = float(np.linalg.norm(whole - without))
        assert change <= clip * (1 + rounding)
        # In full where it is clipped, else as it is.
        norm = float(np.linalg.norm(free[number]))
        assert change == pytest.approx(min(clip, norm), rel=max(rounding, 1e-4))


@pytest.mark.parametrize("method", ["fedavg", "ffa"])
@pytest.mark.parametrize("row_tokens", [1, 25, 8192])
@pytest.mark.parametrize("rate", [1.0, 0.37, 1e-12])
def test_the_sum_for_noise_in_shares_is_the_one_that_a_step_is_made_of(
    rate: float, row_tokens: int, method: str, lora_model: LoraModel, units: list[Unit], start: Adapter
) -> None:
    config = replace(PLAIN, row_tokens=row_tokens, passes_per_round=0.0)
    keys = METHODS[method].trained(start)
    step = NoisedStep(0.0, 0.5, rate)
    found = clipped_sum(lora_model, units, start, keys[::-1], config, 0.5, rate, SeededNoise(1, 1))
    (outcome,) = run(lora_model, units, start, config, step, method=method)  # its lot is of the same noise
    if outcome.tokens == 0:
        assert rate < 1
        assert not found.any()
        return
    expected = [outcome.state.first[key].ravel() for key in keys[::-1]]
    np.testing.assert_allclose(found, np.concatenate(expected) * 10 * rate * len(units), rtol=1e-4, atol=1e-7)
    assert found.dtype == np.float64
    assert 0 < np.linalg.norm(found) <= 0.5 * len(units)


def test_the_sum_for_noise_in_shares_is_refused_as_training_is(
    lora_model: LoraModel, dropout_model: LoraModel, units: list[Unit], start: Adapter
) -> None:
    with pytest.raises(DataError, match="found none"):
        clipped_sum(lora_model, [], start, tuple(start.factors), PLAIN, 1.0, 0.5, SystemNoise())
    with pytest.raises(ConfigError, match=r"lora\.dropout"):
        clipped_sum(dropout_model, units, start, tuple(start.factors), PLAIN, 1.0, 0.5, SystemNoise())


def unit_gradient(model: LoraModel, unit: Unit, start: Adapter) -> NDArray[np.float64]:
    model.write(start)
    parameters = list(model.parameters.values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    rows = [pack([example]) for example in unit.examples]
    losses = [cross_entropy(model.logits(row).float(), row.targets, reduction="sum") for row in rows]
    found = torch.autograd.grad(torch.stack(losses).sum() / unit.supervised, parameters)
    return torch.cat([part.flatten() for part in found]).double().numpy()


def test_gradients_that_are_not_finite_become_noise_alone(
    lora_model: LoraModel, units: list[Unit], start: Adapter
) -> None:
    huge = Adapter({key: np.full_like(factor, 1e30) for key, factor in start.factors.items()})
    step = replace(STEP, sampling_rate=1.0)
    (outcome,) = run(lora_model, units, huge, replace(PLAIN, passes_per_round=0.0), step)
    assert not math.isfinite(outcome.loss)
    source = SeededNoise(1, 1)
    expected = [0.35 * normals(source, factor.size) for _, factor in sorted(start.factors.items())]
    np.testing.assert_allclose(gradient_of(outcome) * len(units), np.concatenate(expected), rtol=1e-4, atol=1e-6)
    assert np.isfinite(vector(outcome.adapter)).all()


def test_the_denominator_is_the_expected_lot_whatever_the_lot(
    lora_model: LoraModel, units: list[Unit], start: Adapter
) -> None:
    # Units that are nothing count as any other; without noise the rest is one unit's gradient.
    step = NoisedStep(noise_multiplier=0.0, clip=0.01, sampling_rate=1.0)
    for others in (0, 1, 7):
        lot = [units[0], *[Unit(())] * others]
        (outcome,) = run(lora_model, lot, start, replace(PLAIN, passes_per_round=0.0), step)
        assert np.linalg.norm(gradient_of(outcome)) == pytest.approx(0.01 / (1 + others), rel=1e-4)
    fraction = replace(step, sampling_rate=0.37)
    (outcome,) = run(lora_model, [units[0]] * 9, start, replace(PLAIN, passes_per_round=0.0), fraction)
    taken = int(bernoulli(SeededNoise(1, 1), 0.37, 9).sum())
    assert 0 < taken < 9
    assert np.linalg.norm(gradient_of(outcome)) == pytest.approx(taken * 0.01 / (0.37 * 9), rel=1e-4)


# ---- noise and sampling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [SystemNoise(), SeededNoise("many")], ids=["system", "seeded"])
def test_the_noise_has_the_standard_deviation_it_should(
    source: NoiseSource, lora_model: LoraModel, units: list[Unit], start: Adapter
) -> None:
    step = NoisedStep(noise_multiplier=2.5, clip=0.2, sampling_rate=1e-12)  # lots that are empty
    drawn = np.array([once(lora_model, units, start, step, source) for _ in range(40)])
    count = drawn.size
    assert count > 30_000
    # Six standard errors: of the mean sigma / sqrt(n), of the standard deviation sigma / sqrt(2 n).
    assert abs(drawn.mean()) < 6 * 0.5 / math.sqrt(count)
    assert abs(drawn.std() - 0.5) < 6 * 0.5 / math.sqrt(2 * count)
    # Every number has noise of its own: in each step, and from step to step.
    assert np.abs(drawn.std(axis=0) - 0.5).max() < 6 * 0.5 / math.sqrt(2 * len(drawn))
    assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 6 / math.sqrt(count)
    halves = drawn[:, : drawn.shape[1] // 2], drawn[:, -(drawn.shape[1] // 2) :]
    assert abs(np.corrcoef(halves[0].ravel(), halves[1].ravel())[0, 1]) < 6 / math.sqrt(count / 2)


def test_an_empty_lot_is_a_step_like_any_other(lora_model: LoraModel, units: list[Unit], start: Adapter) -> None:
    # 1 of 0.37 ^ 10 that a unit is never taken; here none is, in any step.
    never = replace(STEP, sampling_rate=1e-12)
    config = replace(PLAIN, passes_per_round=5e-12)
    (outcome,) = run(lora_model, units, start, config, never)
    assert (outcome.steps, outcome.state.steps, outcome.tokens, outcome.loss) == (5, 5, 0, 0.0)
    assert all(moment.any() for moment in outcome.state.first.values())
    moved = vector(outcome.adapter) - vector(start)
    assert np.count_nonzero(moved) > 0.99 * moved.size


def test_a_lot_for_noise_in_shares_is_taken_with_the_rate_itself(
    lora_model: LoraModel, units: list[Unit], start: Adapter
) -> None:
    alike, rate, clip = [units[3]] * 600, 0.05, 1e-4
    keys = METHODS["fedavg"].trained(start)
    total = clipped_sum(lora_model, alike, start, keys, PLAIN, clip, rate, SeededNoise(3))
    taken = np.linalg.norm(total) / clip  # equal gradients add up in one direction
    assert abs(taken - 600 * rate) < 3.5 * math.sqrt(600 * rate * (1 - rate))


@pytest.mark.parametrize("asked", [0.37, 0.05])
def test_units_are_taken_with_the_rate_itself(
    asked: float, lora_model: LoraModel, units: list[Unit], start: Adapter
) -> None:
    # 4 units at rate 0.37: a rate of 1 / ceil(1 / 0.37) or of a whole number of units would be 0.333 or 0.25; 0.05
    # is twice or nothing in one digit.
    step = NoisedStep(noise_multiplier=0.0, clip=1.0, sampling_rate=asked)
    alike = [replace(units[3])] * 40
    config = replace(PLAIN, passes_per_round=asked * 60)
    (outcome,) = run(lora_model, alike, start, config, step)
    assert outcome.steps == 60
    rate = outcome.tokens / units[3].supervised / (40 * 60)
    assert abs(rate - asked) < 3.5 * math.sqrt(asked * (1 - asked) / 2400)


@pytest.mark.parametrize(
    ("passes", "rate", "steps"), [(1.0, 0.1, 10), (1.0, 0.37, 3), (0.5, 1.0, 1), (0.01, 0.5, 1), (24.0, 1 / 3, 72)]
)
def test_a_round_has_as_many_steps_as_its_passes_take(passes: float, rate: float, steps: int) -> None:
    assert steps_per_round(passes, rate) == steps


def test_the_same_noise_gives_the_same_run_and_torch_has_no_say_in_it(
    lora_model: LoraModel, units: list[Unit], start: Adapter
) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    one = run(lora_model, units, start, rounds=2)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # type: ignore[index]  # noqa: NPY002
    torch.manual_seed(12)
    again = run(lora_model, units, start, rounds=2)
    assert [outcome.adapter.digest() for outcome in one] == [outcome.adapter.digest() for outcome in again]
    other = run(lora_model, units, start, rounds=2, noise=sources(2))
    system = [run(lora_model, units, start, noise=lambda _: SystemNoise())[0].adapter.digest() for _ in range(2)]
    assert len({one[0].adapter.digest(), other[0].adapter.digest(), *system}) == 4


# ---- lots ------------------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.lists(st.integers(2, 30), max_size=3), max_size=12),
    row_tokens=st.integers(1, 60),
    most=st.integers(1, 5),
)
@settings(deadline=None, derandomize=True)
def test_every_unit_of_a_lot_is_in_one_piece_whole(sizes: list[list[int]], row_tokens: int, most: int) -> None:
    lot = [Unit(tuple(Example((0,) * size, 1, "", "") for size in unit)) for unit in sizes]
    found = list(pieces(lot, row_tokens, most))
    assert [unit for piece in found for unit in piece] == lot
    assert all(len(piece) <= most for piece in found)
    assert all(len(piece) == 1 or sum(unit.tokens for unit in piece) <= row_tokens for piece in found if piece)
    assert found == [[]] if not lot else all(found)
    for piece, after in itertools.pairwise(found):  # none is cut off early
        assert len(piece) == most or sum(unit.tokens for unit in (*piece, after[0])) > row_tokens


# ---- what it refuses, and what it leaves -----------------------------------------------------------------------------


def test_ffa_leaves_a_bit_identical_and_moves_every_b(lora_model: LoraModel, units: list[Unit], start: Adapter) -> None:
    *_, last = run(lora_model, units, start, replace(PLAIN, weight_decay=0.5), rounds=2, method="ffa")
    for key, factor in start.factors.items():
        assert (last.adapter.factors[key].tobytes() == factor.tobytes()) == is_a(key), key
    assert all(is_b(key) for key in last.state.first)


def test_dropout_is_refused(dropout_model: LoraModel, units: list[Unit], start: Adapter) -> None:
    with pytest.raises(ConfigError, match=r"lora\.dropout: expected 0 under differential privacy, found 0\.3"):
        run(dropout_model, units, start)


def test_without_units_there_is_an_error(lora_model: LoraModel, start: Adapter) -> None:
    with pytest.raises(DataError, match="at least one unit to train on, found none"):
        run(lora_model, [], start)


@pytest.mark.parametrize(
    "change",
    [
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.01},
        {"sampling_rate": math.nan},
        {"clip": 0.0},
        {"clip": math.inf},
        {"clip": math.nan},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.inf},
        {"noise_multiplier": math.nan},
    ],
)
def test_a_step_that_bounds_nothing_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="expected a sampling rate above 0 and at most 1, a clip above 0"):
        replace(STEP, **change)


def test_training_without_privacy_is_the_same_before_and_after(
    lora_model: LoraModel, units: list[Unit], examples: list[Example], start: Adapter
) -> None:
    task = Assignment(1, 1, tuple(start.factors), seed=5, name="alder")
    before = train(lora_model, examples, start, LocalState(), PLAIN, task).adapter.digest()
    run(lora_model, units, start, replace(PLAIN, checkpointing=True), method="ffa")
    assert train(lora_model, examples, start, LocalState(), PLAIN, task).adapter.digest() == before


def test_a_gradient_is_never_used_twice() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = NoisedOptimizer(torch.optim.SGD([parameter], lr=1.0), 1.0, 1.0, 2.0, SeededNoise("twice"))
    parameter.grad_sample = torch.ones(2, 3)  # type: ignore[attr-defined]
    optimizer.step()
    with pytest.raises(ValueError, match="zero_grad"):
        optimizer.step()


def test_private_training_learns(lora_model: LoraModel, units: list[Unit], start: Adapter) -> None:
    config = replace(PLAIN, learning_rate=1e-2)
    outcomes = run(lora_model, units, start, config, replace(STEP, noise_multiplier=0.3, sampling_rate=1.0), rounds=12)
    losses = [outcome.loss / outcome.tokens for outcome in outcomes]
    assert losses[-1] < 0.9 * losses[0]
