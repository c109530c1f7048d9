"""A base model with one adapter on it: loading, reading, writing, and PEFT's files."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.adapter import Adapter, check_same_form
from common.base_model import model_directory
from common.config import LoraConfig, ModelConfig
from common.errors import ConfigError, ModelError
from common.files import write_directory
from common.text import Example, Pack, pack

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


# Rotary positions that change with the longest document of a batch (Su et al. 2021; LongRoPE, Ding et al. 2024). Those
# of the first kind stay as that document left them, until a short one comes.
_DYNAMIC = "dynamic"
_ROW_LENGTH = {_DYNAMIC, "longrope"}


class LoraModel:
    """A frozen base model with one LoRA adapter on it, and its tokenizer.

    The adapter's factors are float32, and written and read as plain arrays; nothing else of the model ever changes.

    packed: whether the base attends document by document in packed rows. An architecture that cannot is given padded
    rows, with the same result and more work.
    """

    def __init__(
        self, peft_model: Any, tokenizer: PreTrainedTokenizerBase, lora: LoraConfig, path: str, packed: bool
    ) -> None:
        self.peft = peft_model
        self.tokenizer = tokenizer
        self.lora = lora
        self.path = path
        self.packed = packed
        self._parameters: dict[str, torch.nn.Parameter] = {
            name.replace(".default.", "."): parameter
            for name, parameter in peft_model.named_parameters()
            if ".lora_" in name
        }
        self._checkpointing = False
        self.device: torch.device = next(iter(self._parameters.values())).device

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """LoRA parameters by the adapter's keys, sorted."""
        return {name: self._parameters[name] for name in sorted(self._parameters)}

    @property
    def base_parameters(self) -> int:
        """How many numbers the base model has."""
        base = self.peft.get_base_model()
        count: int = base.num_parameters() - self.read().parameters
        return count

    @property
    def remembers(self) -> bool:
        """Whether what a document gives depends on those before it."""
        return _DYNAMIC in _ropes(self.peft.get_base_model().config)

    @property
    def dtype(self) -> torch.dtype:
        """Of the base model and its arithmetic."""
        found: torch.dtype = self.peft.get_base_model().dtype
        return found

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

    def checkpoint_activations(self, wanted: bool) -> None:
        """Whether training keeps activations, or computes them again in the backward pass.

        Raises ConfigError when the architecture cannot do the second.
        """
        if wanted == self._checkpointing:
            return
        base = self.peft.get_base_model()
        with warnings.catch_warnings():
            # transformers is about to call it activation checkpointing; its floor here knows the old name only.
            warnings.simplefilter("ignore", FutureWarning)
            if not wanted:
                base.gradient_checkpointing_disable()
            else:
                try:
                    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                except ValueError as error:
                    name = type(base).__name__
                    raise ConfigError(f"train.checkpointing: found true, which {name} does not know") from error
        self._checkpointing = wanted

    def arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        """What every forward pass runs in: bfloat16 products where the base is in bfloat16."""
        import torch

        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def logits(self, pack: Pack) -> torch.Tensor:
        """Logits [t, vocabulary] at the places of `pack` whose next token is supervised."""
        with self.arithmetic():
            return self._packed_logits(pack) if self.packed else self._padded_logits(pack)

    def _packed_logits(self, pack: Pack) -> torch.Tensor:
        output = self.peft(
            input_ids=pack.ids.to(self.device),
            position_ids=pack.positions.to(self.device),
            document_lengths=pack.lengths,
            logits_to_keep=pack.predict.to(self.device),
            use_cache=False,
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _padded_logits(self, pack: Pack) -> torch.Tensor:
        import torch

        if len(pack.lengths) > 1 and _ropes(self.peft.get_base_model().config) & _ROW_LENGTH:
            return torch.cat([self._padded_logits(alone) for alone in pack.documents()])
        rows = pack.ids[0].split(list(pack.lengths))
        ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)  # [b, s]
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        output = self.peft(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False)
        logits: torch.Tensor = output.logits[mask.bool().to(self.device)]  # [all tokens, vocabulary]
        return logits[pack.predict.to(self.device)]


def quiet_transformers() -> None:
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


def load(model: ModelConfig, lora: LoraConfig, seed: int) -> LoraModel:
    """Loads the base model, freezes it and puts a fresh adapter on it (A random from `seed`, B zero).

    Raises ModelError when the directory holds no complete causal language model with a tokenizer that fits, or when
    this machine cannot hold the model as `model` wants it; ConfigError for layers that the model has not.
    """
    import torch

    directory = model_directory(model.path)
    device = _device(model)
    for packed in (True, False):
        base: Any = None  # two large models have no room beside each other
        base = _load_base(directory, model, device, packed)
        if base is None or (packed and _sees_the_row(base.config)):
            continue
        tokenizer = load_tokenizer(model.path)
        if len(tokenizer) > base.get_input_embeddings().num_embeddings:
            raise ModelError(
                f"the tokenizer in {directory} has {len(tokenizer)} tokens, more than the "
                f"{base.get_input_embeddings().num_embeddings} that the model knows"
            )
        _check_targets(base, lora.target_modules, directory)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = LoraModel(_with_adapter(base, lora, directory), tokenizer, lora, model.path, packed)
        if _keeps_documents_apart(adapted, model.weights):
            return adapted
        del adapted
    raise ModelError(
        f"{directory} holds a {type(base).__name__}, which is not causal or computes numbers that are not finite; "
        "expected a Llama or another causal language model"
    )


def _device(model: ModelConfig) -> torch.device:
    """Where the model goes. Raises ModelError when the machine lacks what `model` asks for."""
    import torch

    there = torch.cuda.is_available()
    if model.device == "cuda" and not there:
        raise ModelError("model.device: expected a CUDA device, found none; set it to cpu or auto")
    device = torch.device("cuda" if there and model.device != "cpu" else "cpu")
    if model.weights != "full":
        if device.type != "cuda":
            raise ModelError(
                f"model.weights: found {model.weights}, which needs a CUDA device, and the model is on {device.type}; "
                "set it to full"
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ModelError(
                f"model.weights: found {model.weights}, which needs bitsandbytes: pip install bitsandbytes, or full"
            )
    return device


def dtype_of(model: ModelConfig, device: torch.device) -> torch.dtype:
    """The type of the base model and its arithmetic, on that device."""
    import torch

    if model.dtype == "auto":
        cuda = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if cuda else torch.float32
    return torch.bfloat16 if model.dtype == "bfloat16" else torch.float32


def _ropes(config: Any) -> set[str]:
    """The kinds of rotary positions, of all layers or by kind of layer, as far as the configuration says."""
    said = getattr(config, "rope_parameters", None)
    settings = said if isinstance(said, dict) else {}
    every = [one for one in (settings, *settings.values()) if isinstance(one, dict)]
    return {str(one["rope_type"]) for one in every if "rope_type" in one}


def _sees_the_row(config: Any) -> bool:
    """Whether something depends on the row's longest document, or stands in the mask, which packed rows have not."""
    return bool(_ropes(config) & _ROW_LENGTH) or getattr(config, "attention_chunk_size", None) is not None


def _load_base(directory: Path, model: ModelConfig, device: torch.device, packed: bool) -> Any:
    """The base model with our attention where `packed`, else with plain attention; None where it does not take ours.

    Raises ModelError when it is broken or incomplete.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

    from common import attention

    quiet_transformers()
    quantised = None
    if model.weights != "full":
        quantised = BitsAndBytesConfig(
            load_in_8bit=model.weights == "8bit",
            load_in_4bit=model.weights == "4bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype_of(model, device),
        )
    base: Any
    loading: dict[str, Any]
    try:
        base, loading = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]  # a pair, as asked for below
            directory,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation=attention.NAME if packed else "eager",
            dtype=dtype_of(model, device),
            output_loading_info=True,
            **({} if quantised is None else {"quantization_config": quantised, "device_map": {"": 0}}),
        )
    except Exception as error:  # what is raised depends on which file is broken, and how
        if packed and attention.NAME in str(error):
            return None
        raise ModelError(f"{directory} cannot be loaded as a causal language model: {error}") from error
    if missing := sorted(loading["missing_keys"]):
        # transformers would fill them with random numbers, which no two institutions share.
        raise ModelError(f"the weights in {directory} lack {len(missing)} tensors of the model (first: {missing[0]})")
    # What its makers recommend for sampling would otherwise bend greedy answers too.
    base.generation_config = GenerationConfig()
    return base if quantised else base.to(device)


def _with_adapter(base: Any, lora: LoraConfig, directory: Path) -> Any:
    """PEFT's model with a fresh adapter, from torch's random state."""
    from peft import get_peft_model

    try:
        with warnings.catch_warnings():
            # PEFT reads a flag that transformers has renamed, and names layers of experts, which it passes over.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", RuntimeWarning)
            return get_peft_model(base, peft_config(lora, str(directory))).eval()
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {error}") from error


def _check_targets(base: torch.nn.Module, targets: Sequence[str], directory: Path) -> None:
    """Raises ConfigError, naming what there is, when a target module is no linear layer: PEFT passes over some."""
    import torch

    linear = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)]
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in linear)]
    if unknown and list(targets) != ["all-linear"]:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise ConfigError(
            f"lora.target_modules: expected linear layers of the model in {directory} ({there}) or all-linear, "
            f"found {', '.join(unknown)}"
        )


def _keeps_documents_apart(model: LoraModel, weights: str) -> bool:
    """Whether each of two documents gets the logits that it gets by itself, whatever stands beside or after it.

    Some architectures take our attention and the lengths of documents without a word, and heed neither; so what a
    document gets by itself is computed with the architecture's plain attention.
    """
    import torch

    documents = [(0, 1, 2, 3, 1, 0), (2, 1, 0, 3)]
    others = [(1, 0, 3, 3, 2, 1), (2, 1, 0, 1)]
    second = slice(len(documents[0]) - 1, None)
    base = model.peft.get_base_model()
    ours = base.config._attn_implementation

    def together(ids: Sequence[tuple[int, ...]]) -> torch.Tensor:
        return model.logits(pack([Example(one, 1, "", "") for one in ids])).float()

    def differ(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
        return one.shape != other.shape or not bool((one - other).abs().max() <= tolerance * other.abs().max())

    with torch.inference_mode():
        try:
            found = together(documents)
            # Another first document, another last token. To the bit for most architectures; experts are grouped by
            # what stands in the row, and sum in another order then. Padded rows are apart by their form, and 8-bit
            # products choose their outliers by all that stands in a batch (Dettmers et al. 2022, section 3.2).
            exact = weights != "8bit" and (model.packed or model.dtype == torch.float32)
            if differ(together(others)[second], found[second], 1e-5 if exact else 5e-2):
                return False
            base.set_attn_implementation("eager")
            with model.arithmetic():
                alone = [
                    model.peft(input_ids=torch.tensor([ids], device=model.device)).logits[0, :-1] for ids in documents
                ]
        except torch.cuda.OutOfMemoryError as error:
            raise ModelError(f"the model does not fit this device's memory: {error}") from error
        except (TypeError, IndexError, RuntimeError, ValueError, ModelError):
            return False
        finally:
            base.set_attn_implementation(ours)
    rounding = 1e-3 if model.dtype == torch.float32 and weights != "8bit" else 5e-2
    return not differ(found, torch.cat(alone).float(), rounding)


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
