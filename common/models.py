"""Base models: loading, fingerprints, and the adapter that stands on them."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from common.adapter import Adapter, check_same_form
from common.config import LoraConfig
from common.errors import ModelError
from common.files import write_directory
from common.text import Pack

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

EMBEDDED = "embedded"
# Differ between copies of one model without changing what it computes.
_VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 of what makes a base model the one that was agreed: configuration, weights and tokenizer."""

    PARTS: ClassVar = ("config", "weights", "tokenizer")

    config: str
    weights: str
    tokenizer: str

    def differences(self, other: Fingerprint) -> tuple[str, ...]:
        """Names of the parts that differ; empty for the same base model."""
        return tuple(part for part in self.PARTS if getattr(self, part) != getattr(other, part))

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def model_directory(path: str) -> Path:
    """The directory behind `model.path`. Raises ModelError when there is none, or no model in it."""
    directory = Path(__file__).parent / "embedded" if path == EMBEDDED else Path(path).expanduser()
    if not directory.is_dir():
        raise ModelError(
            f"model.path: expected `{EMBEDDED}` or a directory with a causal language model, found {path!r}"
        )
    if not (directory / "config.json").is_file():
        raise ModelError(f"model.path: {directory} has no config.json; expected a directory that transformers can load")
    return directory


@lru_cache(maxsize=4)
def fingerprint(path: str) -> Fingerprint:
    """The fingerprint of a model directory.

    Tensors are hashed by name, type, shape and bytes, so that the same weights in other files have the same digest.
    """
    from safetensors import SafetensorError, safe_open

    directory = model_directory(path)
    try:
        config = json.loads((directory / "config.json").read_text())
    except ValueError as error:
        raise ModelError(f"{directory / 'config.json'} is not JSON: {error}") from error
    config = {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG}
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{directory} has no *.safetensors weights; convert them with save_pretrained first")
    sha = hashlib.sha256()
    try:
        where = {name: file for file in files for name in _tensor_names(file)}
        for name in sorted(where):
            with safe_open(where[name], framework="pt") as tensors:
                tensor = tensors.get_tensor(name)
            sha.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            sha.update(_raw_bytes(tensor))
    except SafetensorError as error:
        raise ModelError(f"the weights in {directory} are broken: {error}") from error
    vocabulary = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        if file.name.startswith(("tokenizer", "special_tokens", "vocab", "merges", "added_tokens", "chat_template")):
            vocabulary.update(file.name.encode() + b"\0" + file.read_bytes())
    return Fingerprint(
        config=hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        weights=sha.hexdigest(),
        tokenizer=vocabulary.hexdigest(),
    )


def _tensor_names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _raw_bytes(tensor: torch.Tensor) -> bytes:
    import torch

    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


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
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the tokenizer in {directory} cannot be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer in {directory} has no end-of-text token, which ends every answer")
    return tokenizer


def load(path: str, lora: LoraConfig, seed: int) -> LoraModel:
    """Loads the base model of `path`, freezes it and puts a fresh adapter on it (A random from `seed`, B zero).

    Raises ModelError when the directory holds no causal language model or lacks a target module.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from common import attention

    _quiet_transformers()
    directory = model_directory(path)
    try:
        base = AutoModelForCausalLM.from_pretrained(
            directory, local_files_only=True, attn_implementation=attention.NAME, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{directory} cannot be loaded as a causal language model: {error}") from error
    tokenizer = load_tokenizer(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with warnings.catch_warnings():
                # PEFT reads a flag that transformers has renamed, and says so at every load.
                warnings.simplefilter("ignore", FutureWarning)
                peft_model = get_peft_model(base, peft_config(lora, str(directory)))
        except ValueError as error:
            raise ModelError(f"lora.target_modules: {error}") from error
    return LoraModel(peft_model.eval(), tokenizer, lora, path)


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
    from safetensors.numpy import save_file

    def write(folder: Path) -> None:
        save_file(dict(adapter.factors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = peft_config(lora, path)
        config.inference_mode = True
        config.save_pretrained(str(folder))

    write_directory(directory, write)


def load_adapter(directory: Path) -> Adapter:
    """Reads an adapter that `save_adapter` or PEFT wrote. Raises ModelError when it is missing or broken."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    file = directory / "adapter_model.safetensors"
    try:
        return Adapter(load_file(file))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"expected a PEFT adapter in {directory}, but {file.name} cannot be read: {error}") from error
