"""The ways to train that `silotune-sim bench trainer` sets side by side, and what they train.

All have the same records in the same batches, type, AdamW, schedule and clipping, no dropout and no checkpointing; none
evaluates, logs or saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.base_model import model_directory
from common.config import LoraConfig, ModelConfig, TrainConfig
from common.errors import RunStopped
from common.randomness import seeded
from common.text import Example

SEED = 1
NAME = "bench"
TRAIN = TrainConfig(batch_size=16, learning_rate=1e-3, warmup=0.1)


@dataclass(frozen=True)
class Shape:
    """What is trained. supervised: share of a record's tokens. vocabulary: at least the embedded tokenizer's."""

    name: str
    hidden: int
    layers: int
    target_modules: tuple[str, ...]
    vocabulary: int = 2048
    supervised: float = 1.0
    dtype: str = "float32"

    def lora(self) -> LoraConfig:
        return LoraConfig(rank=16, alpha=32.0, dropout=0.0, target_modules=list(self.target_modules))

    def model(self, directory: Path) -> ModelConfig:
        return ModelConfig(str(directory), device="cpu", dtype=self.dtype)


QV = ("q_proj", "v_proj")
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("m-qv", 512, 8, QV),
        Shape("s-all", 256, 6, ("all-linear",)),
        Shape("m-qv-32k", 512, 8, QV, vocabulary=32_000, supervised=0.25),
        Shape("m-qv-bf16", 512, 8, QV, dtype="bfloat16"),
        Shape("tiny", 64, 2, QV),  # to see that everything runs
    )
}


Factors = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Pass:
    """A training pass that is ready to begin. run: what is timed. factors: the adapter afterwards."""

    run: Callable[[], object]
    factors: Callable[[], Factors]


@dataclass(frozen=True)
class Arm:
    """One way to train. ready: everything up to training, from a model as it was loaded, each time anew."""

    title: str
    ready: Callable[[Shape, Path, Sequence[Example]], Pass]


def examples(shape: Shape, records: int) -> tuple[Example, ...]:
    """Random records: lengths log-normal with mean 60 and sigma 0.9, from 4 to 512 tokens."""
    rng = seeded(SEED, "bench", shape.name)
    sigma = 0.9
    lengths = rng.lognormal(math.log(60) - sigma**2 / 2, sigma, records).round().clip(4, 512).astype(int)
    made = []
    for length in lengths:
        ids = tuple(int(token) for token in rng.integers(3, shape.vocabulary, length))
        supervised = min(max(round(shape.supervised * length), 1), length - 1)
        made.append(Example(ids, int(length) - supervised, "text", ""))
    return tuple(made)


def write_model(shape: Shape, directory: Path) -> None:
    """A Llama with random weights and the embedded tokenizer, and a fresh adapter in `directory`/start."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from common.models import load, quiet_transformers, save_adapter

    quiet_transformers()
    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=round(shape.hidden * 8 / 3 / 32) * 32,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=shape.hidden // 64,
        vocab_size=shape.vocabulary,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    for file in model_directory("embedded").glob("*token*"):
        shutil.copy(file, directory)
    model = load(replace(shape.model(directory), dtype="float32"), shape.lora(), SEED)
    save_adapter(model.read(), shape.lora(), str(directory), directory / "start")


def batches(records: Sequence[Example]) -> list[list[Example]]:
    """The records in the very batches that local training takes them in."""
    from client.training import order

    stream = order(len(records), 0, len(records), SEED, NAME)
    return [[records[i] for i in stream[k : k + TRAIN.batch_size]] for k in range(0, len(stream), TRAIN.batch_size)]


def _ours(shape: Shape, directory: Path, records: Sequence[Example]) -> Pass:
    """The function that the ClientApp calls."""
    from client.state import LocalState
    from client.training import Assignment, Trained, train
    from common.models import load, load_adapter

    model = load(shape.model(directory), shape.lora(), SEED)
    start = load_adapter(directory / "start")
    assignment = Assignment(1, 1, tuple(start.factors), SEED, NAME)
    done: list[Trained] = []
    return Pass(
        lambda: done.append(train(model, records, start, LocalState(), TRAIN, assignment)),
        lambda: dict(done[-1].adapter.factors),
    )


def _stock(shape: Shape, directory: Path) -> Any:
    """The same model as anyone would load it with transformers and PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, shape.dtype), attn_implementation="sdpa", use_safetensors=True
    )
    base.config.use_cache = False
    return PeftModel.from_pretrained(base, directory / "start", is_trainable=True)


def _rows(records: Sequence[Example]) -> list[dict[str, list[int]]]:
    """Tokens and labels of the records, in the order of `batches`."""
    return [
        {"input_ids": list(e.ids), "labels": [-100] * e.prompt_tokens + list(e.ids[e.prompt_tokens :])}
        for batch in batches(records)
        for e in batch
    ]


def _optimizers(model: Any, steps: int) -> tuple[Any, Any]:
    """Our AdamW and our schedule for another trainer."""
    import torch

    from client.training import learning_rate

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=TRAIN.learning_rate, weight_decay=TRAIN.weight_decay, foreach=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(TRAIN, min(step + 1, steps) / steps) / TRAIN.learning_rate
    )
    return optimizer, schedule


def _arguments(shape: Shape, directory: Path) -> dict[str, Any]:
    return {
        "output_dir": str(directory / "trainer"),
        "per_device_train_batch_size": TRAIN.batch_size,
        "num_train_epochs": 1,
        "max_grad_norm": TRAIN.max_grad_norm,
        "train_sampling_strategy": "sequential",  # the records come in the order of the batches
        "gradient_checkpointing": False,
        "bf16": shape.dtype == "bfloat16",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": SEED,
    }


def _hf(shape: Shape, directory: Path, records: Sequence[Example]) -> Pass:
    """The Trainer of transformers over PEFT's model, batches padded to their longest record."""
    from transformers import Trainer, TrainingArguments

    model = _stock(shape, directory)
    rows = _rows(records)
    steps = math.ceil(len(rows) / TRAIN.batch_size)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**_arguments(shape, directory)),
        train_dataset=rows,
        data_collator=_padded,
        optimizers=_optimizers(model, steps),
    )
    return Pass(trainer.train, lambda: _factors(trainer, model, steps))


def _factors(trainer: Any, model: Any, steps: int) -> Factors:
    from peft import get_peft_model_state_dict

    if trainer.state.global_step != steps:
        raise RunStopped(f"expected {steps} steps, found {trainer.state.global_step}")
    return {key: tensor.float().numpy() for key, tensor in get_peft_model_state_dict(model).items()}


def _padded(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Any]:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.tensor(row["input_ids"]) for row in rows]
    labels = [torch.tensor(row["labels"]) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }


def _trl(padding_free: bool) -> Callable[[Shape, Path, Sequence[Example]], Pass]:
    """TRL's SFTTrainer, padded as it is by default, or with each batch flattened to one row with positions.

    It computes entropy and accuracy of tokens at every step, which cannot be switched off.
    """

    def ready(shape: Shape, directory: Path, records: Sequence[Example]) -> Pass:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        from common.models import load_tokenizer

        model = _stock(shape, directory)
        rows = Dataset.from_list(_rows(records))
        steps = math.ceil(len(rows) / TRAIN.batch_size)
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                **_arguments(shape, directory),
                max_length=None,
                packing=False,
                padding_free=padding_free,
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=rows,
            processing_class=load_tokenizer(str(directory)),
            optimizers=_optimizers(model, steps),
        )
        return Pass(trainer.train, lambda: _factors(trainer, model, steps))

    return ready


ARMS = {
    "silotune": Arm("Silotune", _ours),
    "hf": Arm("HF Trainer + PEFT, padded", _hf),
    "trl": Arm("TRL SFTTrainer, padded", _trl(padding_free=False)),
    "trl_padding_free": Arm("TRL SFTTrainer, padding-free", _trl(padding_free=True)),
}


def padded_losses(shape: Shape, directory: Path, records: Sequence[Example]) -> list[float]:
    """Mean loss at every step of a plain loop over padded batches: the reference."""
    import contextlib

    import torch

    model = _stock(shape, directory)
    steps = batches(records)
    optimizer, schedule = _optimizers(model, len(steps))
    rows = iter(_rows(records))
    losses = []
    for batch in steps:
        inputs = _padded([next(rows) for _ in batch])
        low = shape.dtype == "bfloat16"
        with torch.autocast("cpu", torch.bfloat16) if low else contextlib.nullcontext():
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], TRAIN.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def our_losses(shape: Shape, directory: Path, records: Sequence[Example]) -> list[float]:
    """Mean loss at every step of local training: as many rounds of one step, the optimizer kept between them."""
    from client.state import LocalState
    from client.training import Assignment, train
    from common.models import load, load_adapter

    model = load(shape.model(directory), shape.lora(), SEED)
    adapter, state = load_adapter(directory / "start"), LocalState()
    steps = math.ceil(len(records) / TRAIN.batch_size)
    config = replace(TRAIN, passes_per_round=TRAIN.batch_size / len(records))
    losses = []
    for step in range(steps):
        trained = train(
            model, records, adapter, state, config, Assignment(step + 1, steps, tuple(adapter.factors), SEED, NAME)
        )
        adapter, state = trained.adapter, trained.state
        losses.append(trained.loss / trained.tokens)
    return losses
