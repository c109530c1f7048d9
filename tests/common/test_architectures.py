"""Which architectures train as they should, in packed rows or padded ones, and what this machine can hold of them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

from common.adapter import Adapter, is_b
from common.config import LoraConfig, ModelConfig
from common.errors import ModelError
from common.evaluation import evaluate, greedy
from common.models import load, save_adapter
from common.text import Example, pack

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0)
LORA_EVERYWHERE = replace(LORA, target_modules=["all-linear"])
Examples = Callable[..., list[Example]]

SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OLD = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama-1": ("LlamaConfig", {**SMALL, "num_key_value_heads": 4}, True),
    "llama-3": (
        "LlamaConfig",
        {
            **SMALL,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        True,
    ),
    "mistral": ("MistralConfig", {**SMALL, "sliding_window": 5}, True),
    "mixtral": ("MixtralConfig", {**SMALL, "num_local_experts": 4}, True),
    "qwen-2": ("Qwen2Config", SMALL, True),
    "qwen-3": ("Qwen3Config", {**SMALL, "head_dim": 8}, True),
    "gemma-3": ("Gemma3TextConfig", {**SMALL, "head_dim": 8, "sliding_window": 5}, True),
    "phi-3": ("Phi3Config", SMALL, True),
    "olmo-2": ("Olmo2Config", SMALL, True),
    "gpt-neox": ("GPTNeoXConfig", OLD, True),
    # What these add to attention, or leave out of it, does not go with packed rows.
    "gemma-2": ("Gemma2Config", {**SMALL, "head_dim": 8}, False),
    "gpt-oss": ("GptOssConfig", {**SMALL, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, False),
    "falcon": ("FalconConfig", OLD, False),
    # Its positions follow the longest document of a row: one document a row.
    "phi-3-long": (
        "Phi3Config",
        {
            **SMALL,
            "original_max_position_embeddings": 10,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "original_max_position_embeddings": 10,
            },
        },
        False,
    ),
    "bloom": ("BloomConfig", {"vocab_size": 320, "hidden_size": 32, "n_layer": 2, "n_head": 4}, False),
}


def write_architecture(name: str, directory: Path, tokenizer: Path) -> tuple[Path, bool]:
    """A small random model of an architecture, and whether it takes packed rows."""
    kind, settings, packed = ARCHITECTURES[name]
    write_model(kind, settings, directory, tokenizer)
    return directory, packed


def write_model(kind: str, settings: dict[str, Any], directory: Path, tokenizer: Path) -> None:
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings))
    with torch.no_grad():  # random weights are so small that attention hardly matters
        for parameter in base.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    base.save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, directory / file)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_gives_the_loss_that_stock_transformers_gives_one_document_at_a_time(
    name: str, grouped_path: Path, tmp_path: Path, random_examples: Examples, random_adapter: Callable[..., Adapter]
) -> None:
    directory, packed = write_architecture(name, tmp_path / "model", grouped_path)
    found = load(ModelConfig(str(directory)), LORA_EVERYWHERE, 1)
    assert found.packed == packed
    adapter = random_adapter(found.read(), seed=2, scale=0.1)
    found.write(adapter)
    save_adapter(adapter, found.lora, str(directory), tmp_path / "adapter")
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager"),
        tmp_path / "adapter",
    )
    documents = random_examples((7, 12, 9, 20))
    expected = 0.0
    with torch.no_grad():
        for document in documents:
            logits = stock(input_ids=torch.tensor([document.ids])).logits[0, document.prompt_tokens - 1 : -1]
            targets = torch.tensor(document.ids[document.prompt_tokens :])
            expected += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    scores = evaluate(found, documents)
    assert scores.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["llama-3", "mistral", "gemma-2", "falcon"])
def test_every_architecture_can_be_trained_and_asked(
    name: str, grouped_path: Path, tmp_path: Path, random_examples: Examples
) -> None:
    directory, _ = write_architecture(name, tmp_path / "model", grouped_path)
    found = load(ModelConfig(str(directory)), LORA_EVERYWHERE, 1)
    row = pack(random_examples((7, 12, 9)))
    torch.nn.functional.cross_entropy(found.logits(row), row.targets).backward()
    gradients = [p.grad for key, p in found.parameters.items() if is_b(key)]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    prompts = [[5, 6, 7], [8, 9]]
    assert greedy(found, prompts, 4) == [greedy(found, [prompt], 4)[0] for prompt in prompts]


# ---- what this machine can hold ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"device": "cuda"}, "model.device: expected a CUDA device, found none; set it to cpu or auto"),
        ({"weights": "4bit"}, "model.weights: found 4bit, which needs a CUDA device, and the model is on cpu"),
        ({"weights": "8bit", "device": "cpu"}, "model.weights: found 8bit, which needs a CUDA device"),
    ],
)
def test_what_needs_cuda_is_told_before_anything_is_loaded(
    grouped_path: Path, settings: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # wherever the test runs
    with pytest.raises(ModelError, match=re.escape(said)):
        load(ModelConfig(str(grouped_path), **settings), LORA, 1)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_base_is_held_as_asked_and_the_adapter_in_float32(
    grouped_path: Path, random_examples: Examples, dtype: str, expected: torch.dtype
) -> None:
    found = load(ModelConfig(str(grouped_path), device="cpu", dtype=dtype), LORA, 1)
    assert found.dtype == expected
    assert {p.dtype for p in found.parameters.values()} == {torch.float32}
    assert {p.dtype for p in found.peft.parameters()} == {expected, torch.float32}
    assert found.logits(pack(random_examples((5, 9)))).dtype == expected


def test_on_cpu_auto_is_float32_so_that_a_run_is_the_same_on_every_machine(grouped_path: Path) -> None:
    assert load(ModelConfig(str(grouped_path), device="cpu"), LORA, 1).dtype == torch.float32


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_loads_in_bfloat16(name: str, grouped_path: Path, tmp_path: Path) -> None:
    directory, packed = write_architecture(name, tmp_path / "model", grouped_path)
    found = load(ModelConfig(str(directory), device="cpu", dtype="bfloat16"), LORA_EVERYWHERE, 1)
    # Experts may sum in another order, and then stand in padded rows; but never the other way round.
    assert found.packed <= packed
