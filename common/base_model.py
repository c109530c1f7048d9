"""The base model: where it lies, and the fingerprint by which all know that they have the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from common.errors import ModelError
from common.secagg.canonical import canonical

if TYPE_CHECKING:
    import torch

EMBEDDED = "embedded"
# Differ between copies of one model without changing what it computes.
_VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")
_TOKENIZER_FILES = ("tokenizer", "special_tokens", "vocab", "merges", "added_tokens", "chat_template")


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

    def digest(self) -> str:
        """A base model in one word of 64 hex digits: SHA-256 over the three parts."""
        return hashlib.sha256(canonical("base model", self.config, self.weights, self.tokenizer)).hexdigest()

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def model_directory(path: str) -> Path:
    """The directory behind `model.path`. Raises ModelError when there is none, or no model in it."""
    expected = f"model.path: expected `{EMBEDDED}` or a directory with a causal language model, found {path!r:.200}"
    try:
        directory = Path(__file__).parent / EMBEDDED if path == EMBEDDED else Path(path).expanduser()
        if not directory.is_dir():
            raise ModelError(expected)
        if not (directory / "config.json").is_file():
            raise ModelError(
                f"model.path: {directory} has no config.json; expected a directory that transformers can load"
            )
    except (OSError, RuntimeError) as error:  # no permission, too long, ~ of an unknown user
        raise ModelError(f"{expected}: {error}") from error
    return directory


@lru_cache(maxsize=4)
def fingerprint(path: str) -> Fingerprint:
    """The fingerprint of a model directory.

    Tensors are hashed by name, type, shape and bytes, so that the same weights in other files have the same digest.
    """
    from safetensors import SafetensorError, safe_open

    directory = model_directory(path)
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{directory / 'config.json'} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{directory / 'config.json'}: expected a JSON object, found {type(config).__name__}")
    config = {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG}
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{directory} has no *.safetensors weights; convert them with save_pretrained first")
    sha = hashlib.sha256()
    try:
        # A tensor that stands in two files counts twice: which one transformers would load is not for us to guess.
        for name, file in sorted((name, shard) for shard in files for name in _tensor_names(shard)):
            with safe_open(file, framework="pt") as tensors:
                tensor = tensors.get_tensor(name)
            sha.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
            sha.update(_raw_bytes(tensor))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the weights in {directory} are broken: {error}") from error
    vocabulary = hashlib.sha256()
    try:
        for file in sorted(directory.iterdir()):
            if file.name.startswith(_TOKENIZER_FILES) and file.is_file():
                content = hashlib.sha256(file.read_bytes()).hexdigest()
                vocabulary.update(json.dumps([file.name, content]).encode())
    except OSError as error:
        raise ModelError(f"the tokenizer in {directory} cannot be read: {error}") from error
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
