"""One step of DP-SGD beside the same step without privacy, and beside Opacus's default hooks over padded batches.

All three have the same model, adapter, records, AdamW and threads; they take turns in one process, in changing order,
so that a noisy machine is noisy for all. Timed is what training calls: everything from records that are tokenised to
an adapter that is read. A lot is one step's records, each a unit of its own, and every lot is another.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.text import Example
from simulations.benchmarks.arms import SEED, TRAIN, Factors, Shape, examples, write_model

Step = Callable[[Sequence[Example]], Factors]

ARMS = ("nonprivate", "private", "opacus_padded")
CLIP = 1.0


def step_costs(
    shape: Shape, directory: Path, lot: int, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Seconds of `repeats` steps of each arm over lots of `lot` records, and the medians of their ratios.

    directory: where a model of this shape is written to. step_vs_nonprivate: of the private step, over the one without
    privacy. speedup_vs_opacus_padded: of Opacus's step, over the private one. Ratios are of the same lot.
    clock: on a machine that is busy with other work, `time.process_time` and one thread tell more than the wall clock.
    """
    write_model(shape, directory)
    steps = arms(shape, directory, noise_multiplier=1.0)
    made = examples(shape, lot * (repeats + 1))
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for turn in range(repeats + 1):
        records = made[turn * lot : (turn + 1) * lot]
        for arm in ARMS[turn % 3 :] + ARMS[: turn % 3]:
            began = clock()
            steps[arm](records)
            if turn:  # the first turn warms up
                seconds[arm].append(clock() - began)
    return {
        "shape": shape.name,
        "lot": lot,
        "tokens": sum(len(example.ids) for example in made[lot:]),
        "step_vs_nonprivate": _ratio(seconds["private"], seconds["nonprivate"]),
        "speedup_vs_opacus_padded": _ratio(seconds["opacus_padded"], seconds["private"]),
        "seconds": {arm: [round(taken, 4) for taken in found] for arm, found in seconds.items()},
    }


def _ratio(one: Sequence[float], other: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def arms(shape: Shape, directory: Path, noise_multiplier: float) -> dict[str, Step]:
    """Each arm's step, by name: it takes a lot, begins with the adapter in `directory`/start and returns the next."""
    plain, private = _ours(shape, directory, noise_multiplier)
    return dict(zip(ARMS, (plain, private, _opacus(shape, directory, noise_multiplier)), strict=True))


def _ours(shape: Shape, directory: Path, noise_multiplier: float) -> tuple[Step, Step]:
    """Without and with privacy, by the functions that the ClientApp calls; noise from the system, as in deployment."""
    from client.private_training import NoisedStep, train_privately
    from client.state import LocalState
    from client.training import Assignment, train
    from client.units import Unit
    from common.models import load, load_adapter
    from common.privacy.noise import SystemNoise

    model = load(shape.model(directory), shape.lora(), SEED)
    start = load_adapter(directory / "start")
    assignment = Assignment(1, 1, tuple(start.factors), SEED, "bench")
    # With a sampling rate of 1 a lot is all there is, and so the same for every arm.
    noised = NoisedStep(noise_multiplier, CLIP, sampling_rate=1.0)

    def plain(records: Sequence[Example]) -> Factors:
        config = replace(TRAIN, batch_size=len(records))
        return dict(train(model, records, start, LocalState(), config, assignment).adapter.factors)

    def private(records: Sequence[Example]) -> Factors:
        units = [Unit((example,)) for example in records]
        found = train_privately(model, units, start, LocalState(), TRAIN, noised, assignment, SystemNoise())
        return dict(found.adapter.factors)

    return plain, private


def _opacus(shape: Shape, directory: Path, noise_multiplier: float) -> Step:
    """The model as anyone would load it, with Opacus's hooks on it, over a batch padded to its longest record."""
    import contextlib
    import warnings

    import torch
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM

    from client.training import learning_rate

    base = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, shape.dtype), attn_implementation="sdpa", use_safetensors=True
    )
    base.config.use_cache = False
    peft = PeftModel.from_pretrained(base, directory / "start", is_trainable=True)
    start = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(peft).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hooked = GradSampleModule(peft.train(), loss_reduction="sum")
    trained = [parameter for parameter in hooked.parameters() if parameter.requires_grad]

    def step(records: Sequence[Example]) -> Factors:
        set_peft_model_state_dict(peft, start)
        adamw = torch.optim.AdamW(trained, lr=learning_rate(TRAIN, 1.0), weight_decay=TRAIN.weight_decay, foreach=True)
        optimizer = DPOptimizer(
            adamw, noise_multiplier=noise_multiplier, max_grad_norm=CLIP, expected_batch_size=len(records)
        )
        ids = [torch.tensor(record.ids) for record in records]
        labels = [torch.tensor([-100] * r.prompt_tokens + list(r.ids[r.prompt_tokens :]))[1:] for r in records]
        low = shape.dtype == "bfloat16"
        with torch.autocast("cpu", torch.bfloat16) if low else contextlib.nullcontext():
            logits = hooked(
                input_ids=pad_sequence(ids, batch_first=True),
                attention_mask=pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            ).logits[:, :-1]
        targets = pad_sequence(labels, batch_first=True, padding_value=-100)
        losses = cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=-100, reduction="none")
        (losses.sum(dim=1) / (targets != -100).sum(dim=1)).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {key: tensor.float().numpy() for key, tensor in get_peft_model_state_dict(peft).items()}

    return step
