"""Local training against a plain loop: one record at a time, torch's AdamW, autograd for every term of the loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.state import LocalState
from client.training import Assignment, Trained, learning_rate, order, train
from common.adapter import Adapter, flatten, is_a, is_b
from common.config import LoraConfig, ModelConfig, TrainConfig
from common.errors import DataError
from common.methods import METHODS
from common.models import LoraModel, load
from common.text import Example

PLAIN = TrainConfig(batch_size=3, learning_rate=3e-3, warmup=0.2, final_rate=0.1)
# Sums of float32 products in another order (packed row against single records) differ by some 1e-7 relative; AdamW
# divides by the gradient's own size, so steps of 3e-3 agree to a few 1e-6.
AGREES = 1e-5


def assignment(round_number: int = 1, rounds: int = 2, method: str = "fedavg", **changes: object) -> Assignment:
    base = Assignment(round_number, rounds, (), seed=5, name="alder")
    return replace(base, **{"trained": method, **changes})  # type: ignore[arg-type]


def run(
    model: LoraModel, examples: Sequence[Example], start: Adapter, config: TrainConfig, rounds: int, **changes: object
) -> list[Trained]:
    """Rounds of a federation of one: each goes on from the adapter and the state of the one before."""
    outcomes: list[Trained] = []
    adapter, state = start, LocalState()
    for number in range(1, rounds + 1):
        task = assignment(number, rounds, **changes)
        task = replace(task, trained=METHODS[str(task.trained)].trained(start))
        outcomes.append(train(model, examples, adapter, state, config, task))
        adapter, state = outcomes[-1].adapter, outcomes[-1].state
    return outcomes


def vector(adapter: Adapter) -> np.ndarray:
    return flatten(adapter.factors, adapter.factors)


@dataclass
class Oracle:
    """The same training written down again without packing, without our schedule and without our moments."""

    model: LoraModel
    config: TrainConfig
    losses: float = 0.0
    tokens: int = 0

    def train(
        self, examples: Sequence[Example], start: Adapter, keys: Sequence[str], rounds: int, per_round: int
    ) -> tuple[Adapter, torch.optim.AdamW]:
        config, model = self.config, self.model
        model.write(start)
        for key, parameter in model.parameters.items():
            parameter.requires_grad_(key in keys)
        parameters = [model.parameters[key] for key in keys]
        optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=config.weight_decay)
        stream = order(len(examples), 0, rounds * per_round, seed=5, name="alder")
        for number in range(rounds):
            anchor = [parameter.detach().clone() for parameter in parameters]  # this round's global adapter
            mine = stream[number * per_round : (number + 1) * per_round]
            starts = range(0, per_round, config.batch_size)
            for step, first in enumerate(starts):
                optimizer.param_groups[0]["lr"] = self.rate((number + (step + 1) / len(starts)) / rounds)
                batch = [examples[i] for i in mine[first : first + config.batch_size]]
                loss = sum((self.loss(example) for example in batch), torch.zeros(()))
                supervised = sum(len(example.ids) - example.prompt_tokens for example in batch)
                self.losses += float(loss.detach())
                self.tokens += supervised
                distance = sum((p - a).square().sum() for p, a in zip(parameters, anchor, strict=True))
                optimizer.zero_grad()
                (loss / supervised + config.proximal / 2 * distance).backward()
                torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                optimizer.step()
        return model.read(), optimizer

    def loss(self, example: Example) -> torch.Tensor:
        ids = torch.tensor([example.ids])
        logits = self.model.peft(input_ids=ids).logits[0, :-1]
        labels = ids[0, 1:].clone()
        labels[: example.prompt_tokens - 1] = -100
        return torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")

    def rate(self, progress: float) -> float:
        """Linear to 3e-3 over the first fifth, then half a cosine down to a tenth of it."""
        if progress < 0.2:
            return 3e-3 * progress / 0.2
        return 3e-4 + 2.7e-3 * (1 + math.cos(math.pi * (progress - 0.2) / 0.8)) / 2


@pytest.mark.parametrize(
    ("config", "method"),
    [
        pytest.param(PLAIN, "fedavg", id="plain"),
        pytest.param(replace(PLAIN, weight_decay=0.1, max_grad_norm=0.05), "fedavg", id="decay and clipping"),
        pytest.param(replace(PLAIN, proximal=3.0), "fedavg", id="FedProx"),
        pytest.param(PLAIN, "ffa", id="B only"),
        pytest.param(replace(PLAIN, batch_size=1), "fedavg", id="one record a step"),
        pytest.param(replace(PLAIN, batch_size=50), "fedavg", id="one step a round"),
        pytest.param(replace(PLAIN, batch_size=50, row_tokens=30), "fedavg", id="many rows a step"),
        pytest.param(replace(PLAIN, row_tokens=2), "fedavg", id="a row for each record"),
        pytest.param(replace(PLAIN, checkpointing=True), "fedavg", id="checkpointing"),
    ],
)
def test_two_rounds_equal_one_uninterrupted_plain_loop(
    config: TrainConfig, method: str, lora_model: LoraModel, examples: list[Example], start: Adapter
) -> None:
    first, second = run(lora_model, examples, start, config, rounds=2, trained=method)
    keys = METHODS[method].trained(start)
    oracle = Oracle(lora_model, config)
    expected, optimizer = oracle.train(examples, start, keys, rounds=2, per_round=len(examples))
    np.testing.assert_allclose(vector(second.adapter), vector(expected), rtol=0, atol=AGREES)
    assert np.abs(vector(second.adapter) - vector(start)).max() > 100 * AGREES  # the tolerance hides no standing still
    assert first.loss + second.loss == pytest.approx(oracle.losses, rel=1e-5)
    assert first.tokens + second.tokens == oracle.tokens == 2 * sum(example.supervised for example in examples)
    for key in keys:  # the first moment is a mean of gradients, and so compares the gradients themselves
        moments = optimizer.state[lora_model.parameters[key]]
        scale = float(moments["exp_avg"].abs().max())
        np.testing.assert_allclose(second.state.first[key], moments["exp_avg"], rtol=0, atol=1e-4 * scale)
        np.testing.assert_allclose(second.state.second[key], moments["exp_avg_sq"], rtol=1e-3, atol=1e-6 * scale**2)
    assert second.state.steps == first.steps + second.steps == 2 * math.ceil(len(examples) / config.batch_size)


def test_moments_that_are_reset_every_round_end_elsewhere(
    lora_model: LoraModel, examples: list[Example], start: Adapter
) -> None:
    kept = run(lora_model, examples, start, PLAIN, rounds=2)
    reset = run(lora_model, examples, start, replace(PLAIN, optimizer_state="reset"), rounds=2)
    assert kept[0].adapter.digest() == reset[0].adapter.digest()  # there is nothing to forget in the first round
    assert np.abs(vector(kept[1].adapter) - vector(reset[1].adapter)).max() > 1e-4
    assert (reset[1].state.first, reset[1].state.second) == ({}, {})


def test_first_moment_after_one_step_is_the_clipped_gradient(
    lora_model: LoraModel, examples: list[Example], start: Adapter
) -> None:
    config = replace(PLAIN, batch_size=50, max_grad_norm=0.01)
    (outcome,) = run(lora_model, examples, start, config, rounds=1)
    norm = math.sqrt(sum(float(np.square(moment, dtype=np.float64).sum()) for moment in outcome.state.first.values()))
    assert norm == pytest.approx(0.1 * 0.01, rel=1e-4)  # (1 - beta1) times a gradient cut to max_grad_norm


def test_a_stronger_pull_ends_nearer_to_the_start(
    lora_model: LoraModel, examples: list[Example], start: Adapter
) -> None:
    # Several passes in one round: the pull is towards the adapter that the round began with.
    config = replace(PLAIN, batch_size=1, passes_per_round=6.0)
    distances = [
        float(np.linalg.norm(vector(run(lora_model, examples, start, c, rounds=1)[0].adapter) - vector(start)))
        for c in (replace(config, proximal=mu) for mu in (0.0, 0.3, 3.0, 30.0))
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.7 * distances[0]


def test_ffa_leaves_a_bit_identical_and_moves_every_b(
    dropout_model: LoraModel, examples: list[Example], start: Adapter
) -> None:
    *_, last = run(dropout_model, examples, start, replace(PLAIN, weight_decay=0.5), rounds=2, trained="ffa")
    for key, factor in start.factors.items():
        same = last.adapter.factors[key].tobytes() == factor.tobytes()
        assert same == is_a(key), key
    assert all(is_b(key) for key in last.state.first)


def test_training_is_repeatable_whatever_the_model_did_before(
    dropout_model: LoraModel, examples: list[Example], start: Adapter
) -> None:
    before = run(dropout_model, examples, start, PLAIN, rounds=2)
    run(dropout_model, examples[:3], before[-1].adapter, PLAIN, rounds=1, trained="ffa", name="birch")
    torch.rand(3)
    after = run(dropout_model, examples, start, PLAIN, rounds=2)
    assert [outcome.adapter.digest() for outcome in before] == [outcome.adapter.digest() for outcome in after]
    assert [outcome.loss for outcome in before] == [outcome.loss for outcome in after]


@pytest.mark.parametrize("change", [{"seed": 6}, {"name": "birch"}, {"round": 2}])
def test_dropout_depends_on_seed_name_and_round(
    change: dict[str, object], dropout_model: LoraModel, lora_model: LoraModel, examples: list[Example], start: Adapter
) -> None:
    # One step over all records without a schedule, so that neither the order nor the rate tells the two runs apart;
    # from an adapter with an effect, since with B = 0 dropout does not show in the loss.
    config = replace(PLAIN, batch_size=50, warmup=0.0, final_rate=1.0)
    keys = tuple(start.factors)
    moved = run(lora_model, examples, start, PLAIN, rounds=2)[-1].adapter
    for model, differs in ((dropout_model, True), (lora_model, False)):
        one = train(model, examples, moved, LocalState(), config, assignment(trained=keys))
        other = train(model, examples, moved, LocalState(), config, assignment(trained=keys, **change))
        # Another order of the same records in one row changes float32 sums by about 1e-6 of the loss, no more.
        assert (abs(one.loss - other.loss) > 1e-4 * one.loss) == differs


def test_training_leaves_the_global_random_state_alone(
    dropout_model: LoraModel, examples: list[Example], start: Adapter
) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()  # noqa: NPY002
    run(dropout_model, examples, start, PLAIN, rounds=1)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002


def test_base_weights_stay_as_they_are(dropout_model: LoraModel, examples: list[Example], start: Adapter) -> None:
    def base() -> dict[str, bytes]:
        named = dropout_model.peft.named_parameters()
        return {name: p.detach().numpy().tobytes() for name, p in named if ".lora_" not in name}

    before = base()
    outcomes = run(dropout_model, examples, start, replace(PLAIN, weight_decay=0.5), rounds=2)
    assert len(before) > 10
    assert base() == before
    assert outcomes[-1].adapter.digest() != start.digest()


def test_dropout_is_on_in_training_and_off_afterwards(
    dropout_model: LoraModel, lora_model: LoraModel, examples: list[Example], start: Adapter
) -> None:
    # From an adapter with an effect: with B = 0 dropout does not show in the loss.
    moved = run(lora_model, examples, start, PLAIN, rounds=2)[-1].adapter
    (without,) = run(lora_model, examples, moved, PLAIN, rounds=1)
    (with_dropout,) = run(dropout_model, examples, moved, PLAIN, rounds=1)
    assert abs(without.loss - with_dropout.loss) > 1e-3
    assert not any(module.training for module in dropout_model.peft.modules())


@pytest.mark.parametrize("method", ["fedavg", "ffa"])
def test_a_run_that_diverges_does_not_come_out_finite(
    method: str, lora_model: LoraModel, examples: list[Example], start: Adapter
) -> None:
    config = replace(PLAIN, learning_rate=1e37, batch_size=1, warmup=0.0)
    (outcome,) = run(lora_model, examples, start, config, rounds=1, trained=method)
    assert not math.isfinite(outcome.loss)
    assert not np.isfinite(vector(outcome.adapter)).all()


def test_without_records_there_is_an_error(lora_model: LoraModel, start: Adapter) -> None:
    with pytest.raises(DataError, match="at least one training record, found none"):
        train(lora_model, [], start, LocalState(), PLAIN, assignment(trained=tuple(start.factors)))


@pytest.mark.parametrize("passes", [0.05, 0.3, 1.0, 1.7])
def test_fractions_of_passes_add_up_over_rounds(
    passes: float, lora_model: LoraModel, examples: list[Example], start: Adapter
) -> None:
    rounds = 9
    outcomes = run(lora_model, examples, start, replace(PLAIN, passes_per_round=passes), rounds=rounds)
    positions = [outcome.state.position for outcome in outcomes]
    for number, (before, after) in enumerate(zip([0, *positions], positions, strict=False), 1):
        # As many records as the passes so far come to, rounded; at least one new one in every round.
        assert after == max(round(len(examples) * passes * number), before + 1)
    stream = order(len(examples), 0, positions[-1], seed=5, name="alder")
    seen = [examples[i].supervised for i in stream]
    assert [outcome.tokens for outcome in outcomes] == [
        sum(seen[before:after]) for before, after in zip([0, *positions], positions, strict=False)
    ]
    assert [outcome.state.rounds for outcome in outcomes] == list(range(1, rounds + 1))


@given(
    records=st.integers(1, 40), cuts=st.lists(st.integers(0, 200), min_size=2, max_size=6), seed=st.integers(0, 2**32)
)
@settings(deadline=None)
def test_slices_of_the_stream_join_up_and_every_pass_visits_every_record_once(
    records: int, cuts: list[int], seed: int
) -> None:
    cuts = sorted({0, *cuts})
    stream = [i for a, b in itertools.pairwise(cuts) for i in order(records, a, b, seed, "alder")]
    assert stream == order(records, 0, cuts[-1], seed, "alder")
    assert len(stream) == cuts[-1]
    for first in range(0, len(stream) - records + 1, records):
        assert sorted(stream[first : first + records]) == list(range(records))


def test_order_differs_by_pass_seed_and_name() -> None:
    one = order(30, 0, 30, seed=1, name="alder")
    assert one != order(30, 30, 60, seed=1, name="alder")
    assert one != order(30, 0, 30, seed=2, name="alder")
    assert one != order(30, 0, 30, seed=1, name="birch")
    assert one != list(range(30))


schedules = st.builds(
    TrainConfig,
    learning_rate=st.floats(1e-6, 1.0),
    warmup=st.floats(0.0, 0.99),
    final_rate=st.floats(0.0, 1.0),
)


@given(schedules, st.floats(0.0, 1.0), st.floats(0.0, 1.0))
@settings(max_examples=300, deadline=None)
def test_schedule_rises_to_its_peak_and_then_falls_to_its_end(train: TrainConfig, one: float, other: float) -> None:
    earlier, later = sorted((one, other))
    at_earlier, at_later = learning_rate(train, earlier), learning_rate(train, later)
    rounding = 1e-12 * train.learning_rate
    assert 0 <= at_earlier <= train.learning_rate + rounding
    if later < train.warmup:
        assert at_earlier == pytest.approx(at_later * earlier / later if later else 0.0, abs=rounding)
    if earlier >= train.warmup:
        assert at_earlier >= at_later - rounding
        assert at_later >= train.final_rate * train.learning_rate - rounding


@given(schedules)
@settings(deadline=None)
def test_schedule_has_its_peak_at_the_end_of_warm_up_and_the_final_rate_at_the_end(train: TrainConfig) -> None:
    assert learning_rate(train, train.warmup) == pytest.approx(train.learning_rate)
    assert learning_rate(train, 1.0) == pytest.approx(train.final_rate * train.learning_rate)
    middle = (1 + train.warmup) / 2
    assert learning_rate(train, middle) == pytest.approx((1 + train.final_rate) / 2 * train.learning_rate)


def test_without_warm_up_the_first_rate_is_the_peak_and_a_whole_warm_up_ends_at_it() -> None:
    assert learning_rate(TrainConfig(learning_rate=0.5, warmup=0.0), 0.0) == 0.5
    assert learning_rate(TrainConfig(learning_rate=0.5, warmup=1.0), 1.0) == 0.5
    assert learning_rate(TrainConfig(learning_rate=0.5, warmup=1.0), 0.25) == 0.125


def saved_bytes(model: LoraModel, examples: list[Example], start: Adapter, config: TrainConfig) -> int:
    """Bytes of tensors that autograd keeps for the backward pass of one step."""
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        train(model, examples, start, LocalState(), config, assignment(rounds=1, trained=tuple(start.factors)))
    return kept


def test_checkpointing_keeps_less_for_the_backward_pass(
    lora_model: LoraModel, examples: list[Example], start: Adapter
) -> None:
    whole = replace(PLAIN, batch_size=len(examples))
    plain = saved_bytes(lora_model, examples, start, whole)
    less = saved_bytes(lora_model, examples, start, replace(whole, checkpointing=True))
    again = saved_bytes(lora_model, examples, start, whole)
    assert less < 0.7 * plain
    assert again == plain  # it is switched off again


def test_bfloat16_trains_about_as_float32_does(base_model: str, examples: list[Example], start: Adapter) -> None:
    lora = LoraConfig(rank=4, alpha=8.0, dropout=0.0)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        model = load(ModelConfig(base_model, device="cpu", dtype=dtype), lora, 1)
        assert {p.dtype for p in model.parameters.values()} == {torch.float32}
        assert {p.dtype for p in model.peft.get_base_model().parameters() if not p.requires_grad} <= {
            getattr(torch, dtype)
        }
        outcomes = run(model, examples, start, PLAIN, rounds=3)
        losses[dtype] = [outcome.loss / outcome.tokens for outcome in outcomes]
        assert losses[dtype][-1] < losses[dtype][0]
        assert all(moment.dtype == np.float32 for moment in outcomes[-1].state.first.values())
    # bfloat16 has 8 bits of mantissa: some 0.4 % a product, less in a mean over tokens.
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.01)
