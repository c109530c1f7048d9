"""Base model, tokens, one training step and one evaluation, tried on this machine with this institution's records."""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Mapping
from dataclasses import asdict, replace

from client.data_sets import Machine
from client.findings import Found
from client.policy_file import InstitutionPolicy
from client.state import LocalState
from client.training import Assignment, train
from client.units import require_units_apart
from common.base_model import fingerprint, model_directory
from common.config import LoraConfig, TrainConfig
from common.errors import ConfigError, ModelError
from common.evaluation import evaluate
from common.examples import Tokenised, examples_of
from common.models import LoraModel, dtype_of, load, load_tokenizer
from common.records import Record

TRIED = 4
"""Records of the trial step, and of a step where a run says nothing else."""

_RANK = 8
_SCORED = 16


def base_model(machine: Machine, terms: InstitutionPolicy) -> Found[None]:
    digest = fingerprint(machine.model).digest()
    if digest not in terms.base_models:
        raise ConfigError(
            f"policy.yaml: base_models: expected the base model in {machine.model}, {digest}, found"
            f" {', '.join(terms.base_models) or 'an empty list'}; list it if it is the one that was agreed on, or give"
            " the directory of that one in data.yaml"
        )
    return Found(None, f"{machine.model}, {digest}, which the policy allows", numbers={"digest": digest})


def device(machine: Machine, terms: InstitutionPolicy) -> Found[LoraModel]:
    """The base model, loaded as a run would, with an adapter on all its linear layers."""
    _require_memory(machine)
    model = load(machine.config(), LoraConfig(min(_RANK, terms.largest_rank), 16.0, 0.0, ["all-linear"]), seed=0)
    kind = str(model.dtype).removeprefix("torch.")
    kept = "" if machine.weights == "full" else f", weights kept in {machine.weights}"
    told = (
        f"{_device_name(model)}, {model.base_parameters / 1e6:.3g} million parameters in {kind}{kept},"
        f" memory {size(_memory(machine))}"
    )
    numbers = {"device": model.device.type, "dtype": kind, "memory_bytes": _memory(machine)}
    by_unit = {mode for budget in terms.populations.values() for mode in budget.modes if mode != "institution"}
    warnings = []
    if kind == "bfloat16" and by_unit:
        warnings.append(
            f"the policy protects single units ({', '.join(sorted(by_unit))}), and in bfloat16 a unit's gradient may"
            " depend on its neighbours by more than last bits, which no noise is for; set machine.dtype: float32 in"
            " data.yaml"
        )
    if by_unit:
        require_units_apart(model)
    return Found(model, told, warnings, numbers)


def _device_name(model: LoraModel) -> str:
    import torch

    if model.device.type == "cuda":
        return str(torch.cuda.get_device_name(model.device))
    return f"CPU, {torch.get_num_threads()} threads"


def _memory(machine: Machine) -> int:
    """Bytes of the memory that the model lies in."""
    import torch

    if machine.device != "cpu" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGESIZE") * os.sysconf("SC_PHYS_PAGES")


def _require_memory(machine: Machine) -> None:
    """Raises ModelError where the weights alone are more than the memory: the system would end the process for it."""
    import torch
    from safetensors import SafetensorError, safe_open

    directory = model_directory(machine.model)
    parameters = 0
    try:
        for file in directory.glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                parameters += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the weights in {directory} are broken: {error}; restore them") from error
    cuda = machine.device != "cpu" and torch.cuda.is_available()
    each = dtype_of(machine.config(), torch.device("cuda" if cuda else "cpu")).itemsize
    memory = _memory(machine)
    needed = int(parameters * {"full": each, "8bit": 1.0, "4bit": 0.5}[machine.weights])
    if needed > memory:
        raise ModelError(
            f"{directory}: expected a base model that the memory holds ({size(memory)}), found one whose weights take"
            f" {size(needed)}; use a machine with more, or on CUDA machine.weights: 8bit or 4bit in data.yaml"
        )


def tokens(
    sets: Mapping[str, tuple[Record, ...]], machine: Machine, config: TrainConfig, name: str, model: LoraModel | None
) -> Found[dict[str, Tokenised]]:
    tokenizer = load_tokenizer(machine.model)
    found = {part: examples_of(records, tokenizer, config, f"{name}/{part}") for part, records in sets.items()}
    lengths = sorted(length for part in found.values() for length in part.lengths)
    counts = found["train"].counts + found["validation"].counts + found["test"].counts
    typical, most = lengths[len(lengths) // 2], lengths[-1]
    told = f"{counts.tokens} in all; a record has {typical} typically and {most} at most"
    warnings = []
    if counts.truncated:
        warnings.append(
            f"{counts.truncated} of {counts.records} records are longer than {config.max_tokens} tokens, the"
            f" train.max_tokens that was assumed here, and lose {counts.lost}; ask the coordinator for a larger one, or"
            " for train.long=chunk (--max-tokens tries another)"
        )
    context = _context(model)
    if context and min(most, config.max_tokens) > context:
        warnings.append(f"the base model was made for {context} tokens; longer ones give it nothing it knows")
    numbers = {"tokens": asdict(counts), "typical_length": typical, "longest": most, "max_tokens": config.max_tokens}
    return Found(found, told, warnings, numbers)


def _context(model: LoraModel | None) -> int:
    found = None if model is None else getattr(model.peft.get_base_model().config, "max_position_embeddings", None)
    return int(found or 0)


def training(model: LoraModel, parts: Mapping[str, Tokenised], config: TrainConfig, machine: Machine) -> Found[None]:
    """One step on the longest records, which need most memory."""
    import torch

    longest = sorted(parts["train"].examples, key=lambda example: -len(example.ids))[:TRIED]
    start = model.read()
    config = replace(config, batch_size=len(longest), passes_per_round=1.0)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    begun = time.monotonic()
    try:
        assignment = Assignment(1, 1, tuple(start.factors), 0, "check")
        trained = train(model, longest, start, LocalState(), config, assignment)
    except torch.cuda.OutOfMemoryError as error:
        raise ModelError(
            f"expected memory enough for one step on the {len(longest)} longest records, found {size(_memory(machine))}"
            " too little; lower machine.row_tokens in data.yaml, or keep the weights in 8bit or 4bit"
        ) from error
    finally:
        model.write(start)
    seconds = time.monotonic() - begun
    loss = trained.loss / max(trained.tokens, 1)
    if not math.isfinite(loss):
        raise ModelError(
            f"expected a loss that is a finite number, found {loss}; try machine.dtype: float32 in data.yaml"
        )
    peak, memory = _peak(model), _memory(machine)
    warnings = []
    if peak > 0.9 * memory:
        warnings.append(f"that is nearly all of {size(memory)}; lower machine.row_tokens in data.yaml")
    told = (
        f"one step on the {len(longest)} longest records, {sum(len(example.ids) for example in longest)} tokens, took"
        f" {seconds:.2g} s and at most {size(peak)} of memory; loss {loss:.3g}"
    )
    return Found(None, told, warnings, {"seconds": seconds, "peak_bytes": peak, "loss": loss})


def _peak(model: LoraModel) -> int:
    """Most bytes that were in use: on CUDA since it was reset, else by this process since it began."""
    import torch

    if model.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(model.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def evaluation(model: LoraModel, parts: Mapping[str, Tokenised]) -> Found[None]:
    examples = parts["validation"].examples[:_SCORED]
    begun = time.monotonic()
    scores = evaluate(model, examples)
    seconds = time.monotonic() - begun
    if not math.isfinite(scores.perplexity):
        raise ModelError(f"expected a perplexity that is a finite number, found {scores.perplexity}; see machine.dtype")
    told = f"the base model on {len(examples)} validation records: perplexity {scores.perplexity:.4g}, {seconds:.2g} s"
    return Found(None, told, numbers={"seconds": seconds, "perplexity": scores.perplexity})


def size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
