"""A base model with one adapter on it: loading, reading, writing, and PEFT's files."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.adapter import Adapter, check_same_form
from common.base_model import model_directory
from common.config import LoraConfig
from common.errors import ModelError
from common.files import write_directory
from common.text import Example, Pack, pack

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


class LoraModel:
    """A frozen base model with one LoRA adapter on it, and its tokenizer.

    The adapter's factors are written and read as plain arrays; nothing else of the model ever changes.
    """

    def __init__(self, peft_model: Any, tokenizer: PreTrainedTokenizerBase, lora: LoraConfig, path: str) -> None:
        self.peft = peft_model
        self.tokenizer = tokenizer
        self.lora = lora
        self.path = path
        self._parameters: dict[str, torch.nn.Parameter] = {
            name.replace(".default.", "."): parameter
            for name, parameter in peft_model.named_parameters()
            if ".lora_" in name
        }

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """LoRA parameters by the adapter's keys, sorted."""
        return {name: self._parameters[name] for name in sorted(self._parameters)}

    @property
    def base_parameters(self) -> int:
        """How many numbers the base model has."""
        return sum(int(p.numel()) for p in self.peft.parameters()) - self.read().parameters

    def read(self) -> Adapter:
        """A copy of the adapter."""
        return Adapter({name: p.detach().float().cpu().numpy().copy() for name, p in self._parameters.items()})

    def write(self, adapter: Adapter) -> None:
        """Puts the adapter's values into the model. Raises ModelError when names or shapes do not fit."""
        import torch

        check_same_form(adapter, self.read())
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(torch.from_numpy(np.array(adapter.factors[name])))

    def logits(self, pack: Pack) -> torch.Tensor:
        """Logits [t, vocabulary] at the places of `pack` whose next token is supervised."""
        device = next(iter(self._parameters.values())).device
        output = self.peft(
            input_ids=pack.ids.to(device),
            position_ids=pack.positions.to(device),
            document_lengths=pack.lengths,
            logits_to_keep=pack.predict.to(device),
            use_cache=False,
        )
        logits: torch.Tensor = output.logits[0]
        return logits


def _quiet_transformers() -> None:
    """Keeps transformers' progress bars and advice out of our own output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@lru_cache(maxsize=4)
def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory. Raises ModelError when it cannot be loaded or has no end-of-text token."""
    from transformers import AutoTokenizer

    directory = model_directory(path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # what is raised depends on which file is broken, and how
        raise ModelError(f"the tokenizer in {directory} cannot be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer in {directory} has no end-of-text token, which ends every answer")
    return tokenizer


def load(path: str, lora: LoraConfig, seed: int) -> LoraModel:
    """Loads the base model of `path`, freezes it and puts a fresh adapter on it (A random from `seed`, B zero).

    Raises ModelError when the directory holds no complete causal language model with a tokenizer that fits, or lacks a
    target module.
    """
    import torch
    from peft import get_peft_model

    directory = model_directory(path)
    base = _load_base(directory)
    tokenizer = load_tokenizer(path)
    if len(tokenizer) > base.get_input_embeddings().num_embeddings:
        raise ModelError(
            f"the tokenizer in {directory} has {len(tokenizer)} tokens, more than the "
            f"{base.get_input_embeddings().num_embeddings} that the model knows"
        )
    _check_targets(base, lora.target_modules, directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with warnings.catch_warnings():
                # PEFT reads a flag that transformers has renamed, and says so at every load.
                warnings.simplefilter("ignore", FutureWarning)
                peft_model = get_peft_model(base, peft_config(lora, str(directory)))
        except ValueError as error:
            raise ModelError(f"lora.target_modules: {error}") from error
    model = LoraModel(peft_model.eval(), tokenizer, lora, path)
    if not _keeps_documents_apart(model):
        raise ModelError(
            f"{directory} holds a {type(base).__name__}, which is not causal, does not keep packed documents apart or "
            "computes numbers that are not finite; expected a Llama or a model that attends as it does"
        )
    return model


def _load_base(directory: Path) -> Any:
    """The base model in float32 with our attention. Raises ModelError when it is broken or incomplete."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from common import attention

    _quiet_transformers()
    base: Any
    loading: dict[str, Any]
    try:
        base, loading = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]  # a pair, as asked for below
            directory,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation=attention.NAME,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # what is raised depends on which file is broken, and how
        raise ModelError(f"{directory} cannot be loaded as a causal language model: {error}") from error
    if missing := sorted(loading["missing_keys"]):
        # transformers would fill them with random numbers, which no two institutions share.
        raise ModelError(f"the weights in {directory} lack {len(missing)} tensors of the model (first: {missing[0]})")
    # What its makers recommend for sampling would otherwise bend greedy answers too.
    base.generation_config = GenerationConfig()
    return base


def _check_targets(base: torch.nn.Module, targets: Sequence[str], directory: Path) -> None:
    """Raises ModelError, naming what there is, when a target module is no linear layer: PEFT passes over some."""
    import torch

    linear = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)]
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in linear)]
    if unknown and list(targets) != ["all-linear"]:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise ModelError(
            f"lora.target_modules: expected linear layers of the model in {directory} ({there}) or all-linear, "
            f"found {', '.join(unknown)}"
        )


def _keeps_documents_apart(model: LoraModel) -> bool:
    """Whether two packed documents get the logits that each gets by itself, with a token more to look ahead to.

    Some architectures take our attention and the lengths of documents without a word, and heed neither.
    """
    import torch

    documents = [(0, 1, 2, 3), (2, 1, 0)]
    with torch.inference_mode():
        try:
            packed = model.logits(pack([Example(ids, 1, "", "") for ids in documents]))
            alone = [model.peft(input_ids=torch.tensor([[*ids, 3]])).logits[0, : len(ids) - 1] for ids in documents]
        except (TypeError, IndexError, RuntimeError):
            return False
    expected = torch.cat(alone)
    # Another order of the same sums in float32; what another document adds is larger by orders of magnitude.
    return packed.shape == expected.shape and bool((packed - expected).abs().max() < 1e-3 * expected.abs().max())


def peft_config(lora: LoraConfig, path: str) -> Any:
    """Our LoRA settings in PEFT's own form."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import TaskType

    modules = lora.target_modules
    return PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear" if list(modules) == ["all-linear"] else list(modules),
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=path,
    )


def save_adapter(adapter: Adapter, lora: LoraConfig, path: str, directory: Path) -> None:
    """Writes the adapter in PEFT's own format: `PeftModel.from_pretrained(base, directory)` loads it."""
    from safetensors.numpy import save

    def write(folder: Path) -> None:
        # As bytes, since the file that safetensors writes itself could be read by its owner only.
        content = save(dict(adapter.factors), metadata={"format": "pt"})
        (folder / "adapter_model.safetensors").write_bytes(content)
        # Its name alone: where the base model lies on this machine is nobody else's business.
        config = peft_config(lora, Path(path).name)
        config.inference_mode = True
        config.save_pretrained(str(folder))

    write_directory(directory, write)


def load_adapter(directory: Path) -> Adapter:
    """Reads an adapter that `save_adapter` or PEFT wrote. Raises ModelError when it is missing or broken."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file  # numpy's knows no bfloat16

    file = directory / "adapter_model.safetensors"
    try:
        return Adapter({key: tensor.float().numpy() for key, tensor in load_file(file).items()})
    except (OSError, SafetensorError) as error:
        raise ModelError(f"expected a PEFT adapter in {directory}, but {file.name} cannot be read: {error}") from error
