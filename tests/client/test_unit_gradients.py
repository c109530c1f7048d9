"""Gradients of units against autograd over one unit at a time, and against Opacus's hooks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from client.unit_gradients import Layout, UnitGradients
from client.units import Unit
from common.adapter import Adapter, is_b
from common.config import LoraConfig, ModelConfig
from common.errors import ModelError
from common.models import LoraModel, load, save_adapter
from common.text import Example, pack
from tests.common.conftest import write_tokenizer
from tests.common.test_architectures import ARCHITECTURES, OLD, SMALL, write_architecture, write_model

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0)
EVERYWHERE = LoraConfig(rank=4, alpha=8.0, dropout=0.0, target_modules=["all-linear"])
# Sums of float32 products in another order differ by some 1e-7 relative; bfloat16 has 8 bits of mantissa.
SAME = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def documents(lengths: Sequence[int], seed: int = 3, most: int = 290) -> tuple[Example, ...]:
    rng = np.random.default_rng(seed)
    return tuple(Example((0, *map(int, rng.integers(3, most, n - 1))), max(1, n // 2), "x", "") for n in lengths)


def some_units(seed: int = 3) -> list[Unit]:
    """Of one document and of several, one that is nothing, and one longer than a row of 60 tokens."""
    return [Unit(documents(lengths, seed)) for lengths in ((7, 12), (40,), (), (9, 30, 33), (5,), (70, 3))]


def write_random(model: LoraModel, scale: float = 0.1) -> None:
    rng = np.random.default_rng(2)
    model.write(
        Adapter(
            {key: rng.normal(0, scale, factor.shape).astype(np.float32) for key, factor in model.read().factors.items()}
        )
    )


def trained(model: LoraModel, only_b: bool = False) -> dict[str, torch.nn.Parameter]:
    for key, parameter in model.parameters.items():
        parameter.requires_grad_(is_b(key) or not only_b)
    return {key: parameter for key, parameter in model.parameters.items() if parameter.requires_grad}


def computed(
    model: LoraModel, units: Sequence[Unit], row_tokens: int = 60, checkpointing: bool = False, only_b: bool = False
) -> torch.Tensor:
    """Ours, [units, m]."""
    parameters = trained(model, only_b)
    with UnitGradients(model, parameters, checkpointing) as gradients:
        gradients.compute(units, row_tokens)
        assert all(parameter.grad is None for parameter in parameters.values())
        return torch.cat([parameter.grad_sample.flatten(1) for parameter in parameters.values()], dim=1)  # type: ignore[attr-defined]


def alone(model: LoraModel, units: Sequence[Unit], only_b: bool = False) -> torch.Tensor:
    """By autograd: one unit after the other, each document in a row of its own, without any hook."""
    parameters = trained(model, only_b)
    found = []
    for unit in units:
        total = sum((parameter.sum() * 0 for parameter in parameters.values()), torch.zeros(()))
        for example in unit.examples:
            row = pack([example])
            total = total + cross_entropy(model.logits(row).float(), row.targets, reduction="sum") / unit.supervised
        gradient = torch.autograd.grad(total, list(parameters.values()))
        found.append(torch.cat([part.flatten() for part in gradient]))
    return torch.stack(found)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest relative difference between the gradients of a unit."""
    norms = other.norm(dim=1)
    assert bool((one[norms == 0] == 0).all())
    return float(((one - other).norm(dim=1)[norms > 0] / norms[norms > 0]).max())


@pytest.fixture
def adapted(lora_model: LoraModel) -> LoraModel:
    write_random(lora_model)
    return lora_model


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return directory


@pytest.mark.parametrize("only_b", [False, True], ids=["A and B", "B only"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("row_tokens", [1, 60, 10_000])
def test_gradients_are_those_of_one_unit_at_a_time(
    row_tokens: int, checkpointing: bool, only_b: bool, adapted: LoraModel
) -> None:
    expected = alone(adapted, some_units(), only_b)
    assert apart(computed(adapted, some_units(), row_tokens, checkpointing, only_b), expected) < SAME[torch.float32]
    assert [bool(row.any()) for row in expected] == [bool(unit.examples) for unit in some_units()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_in_every_architecture(name: str, dtype: str, tokenizer_files: Path, tmp_path: Path) -> None:
    directory, _ = write_architecture(name, tmp_path / "model", tokenizer_files)
    model = load(ModelConfig(str(directory), device="cpu", dtype=dtype), EVERYWHERE, 1)
    write_random(model)
    expected = alone(model, some_units())
    for checkpointing in (False, True):
        found = computed(model, some_units(), checkpointing=checkpointing)
        assert found.dtype == torch.float32
        assert apart(found, expected) < SAME[model.dtype]


def test_equal_those_of_opacus_hooks(adapted: LoraModel, tmp_path: Path) -> None:
    from opacus import GradSampleModule
    from peft import PeftModel

    save_adapter(adapted.read(), adapted.lora, adapted.path, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(adapted.path, dtype=torch.float32, attn_implementation="eager")
    stock = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    hooked = GradSampleModule(stock.train(), loss_reduction="sum")
    units = [Unit((example,)) for example in documents((7, 12, 40, 5))]
    rows = [unit.examples[0] for unit in units]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(row.ids)] for row in rows])
    logits = hooked(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    losses = [
        cross_entropy(logits[i, row.prompt_tokens - 1 : len(row.ids) - 1], ids[i, row.prompt_tokens : len(row.ids)])
        for i, row in enumerate(rows)
    ]
    torch.stack(losses).sum().backward()
    theirs = {
        name.removeprefix("_module.").replace(".default.", "."): parameter.grad_sample.flatten(1)
        for name, parameter in hooked.named_parameters()
        if parameter.requires_grad
    }
    expected = torch.cat([theirs[key] for key in trained(adapted)], dim=1)
    assert apart(computed(adapted, units), expected) < SAME[torch.float32]


@given(
    neighbours=st.lists(st.lists(st.integers(2, 60), max_size=3), min_size=1, max_size=5),
    place=st.integers(0, 5),
    row_tokens=st.sampled_from([1, 40, 100, 1000]),
    seed=st.integers(0, 5),
)
@settings(deadline=None, derandomize=True, max_examples=40)
def test_neighbours_do_not_change_the_gradient_of_a_unit(
    neighbours: list[list[int]], place: int, row_tokens: int, seed: int, lora_model: LoraModel
) -> None:
    write_random(lora_model)
    mine = Unit(documents((11, 25), seed=77))
    among = [Unit(documents(lengths, seed)) for lengths in neighbours]
    at = min(place, len(among))
    found = computed(lora_model, [*among[:at], mine, *among[at:]], row_tokens)[at]
    by_itself = computed(lora_model, [mine])[0]
    # Were a loss divided by the tokens of the lot, the norm would be a fraction of it.
    assert float((found - by_itself).norm() / by_itself.norm()) < 1e-6


def test_the_loss_of_a_unit_is_the_mean_over_its_own_tokens(adapted: LoraModel) -> None:
    # Twice the same documents are twice as many tokens, and the same mean.
    once, twice = Unit(documents((7, 30))), Unit(documents((7, 30)) * 2)
    found = computed(adapted, [once, twice], row_tokens=30)
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-6


def test_the_sum_of_nats_is_over_all_supervised_tokens(adapted: LoraModel) -> None:
    units = some_units()
    expected = 0.0
    for unit in units:
        for example in unit.examples:
            row = pack([example])
            expected += float(cross_entropy(adapted.logits(row), row.targets, reduction="sum").detach())
    with UnitGradients(adapted, trained(adapted), False) as gradients:
        assert float(gradients.compute(units, 60)) == pytest.approx(expected, rel=1e-6)
        assert float(gradients.compute([], 60)) == 0
        assert {len(p.grad_sample) for p in gradients.parameters.values()} == {0}  # type: ignore[attr-defined]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_dropout_of_the_base_model_is_drawn(checkpointing: bool, tokenizer_files: Path, tmp_path: Path) -> None:
    with_dropout: dict[str, Any] = {**OLD, "hidden_dropout": 0.5, "attention_dropout": 0.5}
    config = GPTNeoXConfig(**with_dropout)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for file in tokenizer_files.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = load(ModelConfig(str(tmp_path), device="cpu"), EVERYWHERE, 1)
    write_random(model)
    expected = alone(model, some_units())
    before = torch.get_rng_state()
    assert apart(computed(model, some_units(), checkpointing=checkpointing), expected) < SAME[torch.float32]
    assert torch.equal(before, torch.get_rng_state())


def saved_bytes(model: LoraModel, units: Sequence[Unit], checkpointing: bool) -> int:
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        computed(model, units, 10_000, checkpointing)
    return kept


def test_checkpointing_keeps_less(adapted: LoraModel) -> None:
    units = some_units()
    computed(adapted, units, checkpointing=True)  # the trials are behind
    computed(adapted, units)
    assert saved_bytes(adapted, units, checkpointing=True) < 0.7 * saved_bytes(adapted, units, checkpointing=False)


def test_the_model_is_left_as_it_was(adapted: LoraModel) -> None:
    before, modes = adapted.read().digest(), [module.training for module in adapted.peft.modules()]
    attributes = {name: set(vars(parameter)) for name, parameter in adapted.parameters.items()}
    expected = alone(adapted, some_units())
    computed(adapted, some_units(), checkpointing=True)
    with pytest.raises(IndexError), UnitGradients(adapted, trained(adapted), False) as gradients:
        gradients.compute([*some_units(), Unit(documents((9,), most=10_000))], 60)  # a token that the model lacks
    assert adapted.read().digest() == before
    assert [module.training for module in adapted.peft.modules()] == modes
    assert {name: set(vars(parameter)) for name, parameter in adapted.parameters.items()} == attributes
    assert not any("forward" in vars(module) for module in adapted.peft.modules())
    assert all(parameter.grad is None for parameter in adapted.parameters.values())
    assert torch.equal(alone(adapted, some_units()), expected)


# ---- where units cannot share rows -----------------------------------------------------------------------------------


def one_at_a_time(model: LoraModel) -> bool:
    with UnitGradients(model, trained(model), False) as gradients:
        return not gradients.together


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "v_proj"]])
def test_factors_on_experts_take_one_unit_at_a_time(
    targets: list[str], tokenizer_files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory, _ = write_architecture("mixtral", tmp_path / "model", tokenizer_files)
    model = load(ModelConfig(str(directory), device="cpu"), LoraConfig(4, 8.0, 0.0, targets), 1)
    on_experts = targets == ["all-linear"]
    with caplog.at_level(logging.WARNING, "silotune.client"):
        assert one_at_a_time(model) == on_experts
    assert ("MixtralForCausalLM" in caplog.text) == on_experts


def test_a_factor_on_the_head_takes_one_unit_at_a_time(base_model: str) -> None:
    # In a packed row the head sees supervised places only.
    model = load(ModelConfig(base_model, device="cpu"), LoraConfig(4, 8.0, 0.0, ["lm_head", "q_proj"]), 1)
    write_random(model)
    assert one_at_a_time(model)
    assert apart(computed(model, some_units()), alone(model, some_units())) < SAME[torch.float32]


def test_eight_bit_products_take_one_unit_at_a_time(base_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(ModelConfig(base_model, device="cpu"), LORA, 1)
    # As transformers marks a model that bitsandbytes has quantised, which takes a CUDA device.
    monkeypatch.setattr(model.peft.get_base_model(), "is_loaded_in_8bit", True, raising=False)
    assert one_at_a_time(model)


class _Mixing(torch.nn.Module):
    """A layer that carries over something of every token to all others of the row."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        found: torch.Tensor = self.inner(hidden, **kwargs)
        return found + 0.1 * found.mean(dim=tuple(range(found.dim() - 1)), keepdim=True)


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("LlamaConfig", {**SMALL, "rope_parameters": DYNAMIC}),
        (
            "Gemma3TextConfig",
            {
                **SMALL,
                "head_dim": 8,
                "layer_types": ["sliding_attention", "full_attention"],
                "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": PLAIN},
            },
        ),
    ],
)
def test_a_base_that_remembers_how_long_texts_were_is_refused(
    kind: str, settings: dict[str, Any], tokenizer_files: Path, tmp_path: Path
) -> None:
    """A text longer than the model was made for changes what every long one after it gives, in rows of its own too."""
    write_model(kind, {**settings, "max_position_embeddings": 16}, tmp_path / "model", tokenizer_files)
    model = load(ModelConfig(str(tmp_path / "model"), device="cpu"), EVERYWHERE, 1)
    write_random(model)
    first, longest, short = (Unit(documents((length,))) for length in (24, 60, 4))
    before = alone(model, [short, first])[1:]
    assert apart(alone(model, [short, longest, first])[2:], before) > 0.01
    assert apart(alone(model, [short, first])[1:], before) < SAME[torch.float32]
    with pytest.raises(ModelError, match="expected a base model whose rotary positions follow from a text alone"):
        computed(model, [first])


def test_a_base_that_mixes_documents_takes_one_unit_at_a_time(base_model: str) -> None:
    model = load(ModelConfig(base_model, device="cpu"), LORA, 1)
    assert not one_at_a_time(model)
    mixing = load(ModelConfig(base_model, device="cpu"), LORA, 1)
    layer = mixing.peft.get_base_model().model.layers[0]
    layer.mlp = _Mixing(layer.mlp)
    assert one_at_a_time(mixing)
    write_random(mixing)
    mine, other = Unit(documents((11,))), Unit(documents((25,)))
    assert torch.equal(computed(mixing, [other, mine])[1], computed(mixing, [mine])[0])


# ---- the chunks of the batched product -------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(1, 150), max_size=4), min_size=1, max_size=6).filter(any), st.booleans())
@settings(deadline=None, derandomize=True, max_examples=100)
def test_every_token_stands_in_one_chunk_of_its_own_unit(units: list[list[int]], packed: bool) -> None:
    lengths = [length for unit in units for length in unit]
    owners = [number for number, unit in enumerate(units) for _ in unit]
    layout = Layout.of(lengths, owners, packed, torch.device("cpu"))
    rows, width = layout.shape
    # Each token carries its unit's number and its own; what is padding carries what must not be found.
    tokens = torch.full((rows * width, 2), 1e9)
    numbered, begin = 1, 0
    for row, (length, owner) in enumerate(zip(lengths, owners, strict=True)):
        first = begin if packed else row * width
        tokens[first : first + length, 0] = owner + 1.0
        tokens[first : first + length, 1] = torch.arange(numbered, numbered + length)
        numbered, begin = numbered + length, begin + length
    layout.chunks("left", torch.full_like(tokens, 7.0))  # what another layer of this width left there
    chunks = layout.chunks("left", tokens)
    layout.chunks("right", torch.full_like(tokens, 7.0))
    layout.chunks("left", torch.full_like(tokens[:, :1], 7.0))
    for owner, chunk in zip(layout.owner, chunks, strict=True):
        real = chunk[chunk[:, 1] > 0]
        assert len(real)
        assert bool((real[:, 0] == owner + 1.0).all())
    found = chunks[..., 1].flatten()
    assert torch.equal(found[found > 0].sort().values, torch.arange(1.0, numbered))
