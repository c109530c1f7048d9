"""Checkpoints: one file a round, which holds all that is needed to go on, or to publish."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.adapter import Adapter
from common.errors import ConfigError, StorageError
from common.files import write_bytes
from server.optimizers import OptimizerState
from server.rounds import Progress, RoundRecord, record_as_json

_KEPT = 2  # the last complete one, and the one before in case the disk damaged it


def _file(directory: Path, round_number: int) -> Path:
    return directory / f"round-{round_number:05d}.safetensors"


def save(directory: Path, progress: Progress, config_digest: str) -> None:
    """Writes the progress after a round, atomically, and drops older checkpoints.

    Raises StorageError when the disk is full or read-only; the checkpoints before it stay.
    """
    from safetensors.numpy import save as to_bytes

    groups = {
        "adapter": progress.adapter.factors,
        "best": progress.best.factors,
        "first": progress.optimizer.first,
        "second": progress.optimizer.second,
    }
    tensors = {f"{group}/{key}": value for group, factors in groups.items() for key, value in factors.items()}
    about = {
        "config": config_digest,
        "best_round": progress.best_round,
        "best_perplexity": progress.best_perplexity if math.isfinite(progress.best_perplexity) else None,
        "history": [record_as_json(record) for record in progress.history],
    }
    text = json.dumps(about)
    # One entry: safetensors writes several in random order, and equal runs shall have equal bytes.
    metadata = {"progress": json.dumps({"digest": _digest(text, tensors), "about": text})}
    write_bytes(_file(directory, progress.round), to_bytes(tensors, metadata=metadata))
    for file in sorted(directory.glob("round-*.safetensors"))[:-_KEPT]:
        file.unlink(missing_ok=True)


def _digest(text: str, tensors: Mapping[str, NDArray[np.float32]]) -> str:
    """SHA-256 of what a checkpoint holds: safetensors itself would not notice a changed bit."""
    return hashlib.sha256((text + Adapter(tensors).digest()).encode()).hexdigest()


def latest(directory: Path, config_digest: str) -> Progress | None:
    """The progress after the last complete round; None when no round was completed.

    Raises ConfigError when the checkpoint belongs to another configuration, StorageError when none can be read.
    """
    files = sorted(directory.glob("round-*.safetensors"), reverse=True)
    for file in files:
        try:
            return _read(file, config_digest)
        except (OSError, ValueError, KeyError, TypeError) as error:
            unreadable = error
    if files:
        raise StorageError(f"no checkpoint in {directory} can be read ({unreadable}); start a new run")
    return None


def _read(file: Path, config_digest: str) -> Progress:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            metadata = tensors.metadata() or {}
            arrays = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    found = json.loads(metadata["progress"])
    if found["digest"] != _digest(found["about"], arrays):
        raise ValueError(f"{file.name} is damaged: its digest differs from what it holds")
    about = json.loads(found["about"])
    if about["config"] != config_digest:
        raise ConfigError(
            f"{file} was written under another configuration than config.yaml beside it; resume with the configuration "
            "the run began with, or start a new run"
        )
    groups: dict[str, dict[str, NDArray[np.float32]]] = {"adapter": {}, "best": {}, "first": {}, "second": {}}
    for key, array in arrays.items():
        group, _, name = key.partition("/")
        groups[group][name] = array
    best_perplexity = about["best_perplexity"]
    return Progress(
        adapter=Adapter(groups["adapter"]),
        best=Adapter(groups["best"]),
        best_round=about["best_round"],
        best_perplexity=math.inf if best_perplexity is None else best_perplexity,
        optimizer=OptimizerState(groups["first"], groups["second"]),
        history=tuple(RoundRecord(**record) for record in about["history"]),
    )
