"""What is done to a request on its way, to an institution or to a file of it, so that a message is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from client import institution as institution_module
from client.policy_file import Budget
from common.adapter import Adapter
from common.base_model import Fingerprint, fingerprint
from common.config import PrivacyConfig
from common.messages import TrainRequest
from common.models import load_tokenizer
from tests.client.border.conftest import MARK, Border
from tests.federations import fitting

OTHER_BASE = Fingerprint("1" * 64, "2" * 64, "3" * 64)


def settings_of(message: Any, **changes: Any) -> Any:
    """A Hello or a TrainRequest with other settings."""
    if isinstance(message, TrainRequest):
        return replace(message, plan=settings_of(message.plan, **changes))
    return replace(message, settings=replace(message.settings, **changes))


def lora_of(message: Any, **changes: Any) -> Any:
    settings = message.plan.settings if isinstance(message, TrainRequest) else message.settings
    return settings_of(message, lora=replace(settings.lora, **changes))


def plan_of(request: TrainRequest, **changes: Any) -> TrainRequest:
    return replace(request, plan=replace(request.plan, **changes))


def private(request: TrainRequest) -> TrainRequest:
    """The same round under differential privacy."""
    privacy = PrivacyConfig(mode="record", noise_multiplier=1.0, sampling_rate=0.5)
    changed = settings_of(request, privacy=privacy, evaluate=False, weighting="uniform")
    assert isinstance(changed, TrainRequest)
    return replace(changed, plan=fitting(changed.plan))


def little(epsilon: float) -> dict[str, Any]:
    """A policy with that budget."""
    return {"populations": {f"{MARK}-people": Budget(("notes",), ("record",), epsilon, 1e-5)}, "metrics": ()}


def moved(adapter: Adapter) -> Adapter:
    return Adapter({key: factor + np.float32(0.5) for key, factor in adapter.factors.items()})


def restart(border: Border, **policy: Any) -> None:
    border.place.policy = replace(border.place.policy, **policy)
    border.member = border.place.institution()


def allow_other_base(border: Border) -> None:
    place = border.place
    place.policy = replace(place.policy, base_models=(*place.policy.base_models, OTHER_BASE.digest()))
    border.member = place.institution()


def write(file: Path, content: bytes = MARK.encode()) -> None:
    """A file of the owner's alone; directories above it are made."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    file.write_bytes(content)
    file.chmod(0o600)


def in_the_way(directory: Path) -> None:
    """A file where a directory is expected."""
    shutil.rmtree(directory, ignore_errors=True)
    write(directory)


def a_directory(file: Path) -> None:
    """A directory where a file is expected."""
    file.unlink(missing_ok=True)
    (file / MARK).mkdir(parents=True)


def unreadable(file: Path) -> None:
    """A file that not even root can read: every read of it fails."""
    file.unlink()
    file.symlink_to("/proc/self/mem")


def full_disk(border: Border) -> None:
    """From now on nothing can be synced; the system's own text names a path."""

    def full(_: int) -> None:
        raise OSError(28, f"No space left on {MARK}", str(border.place.home.root))

    border.patches.setattr(os, "fsync", full)


def broken(damage: Callable[[Path], Any]) -> Callable[[Border], None]:
    """Damages the base model before a process that has just started looks at it."""

    def change(border: Border) -> None:
        fingerprint.cache_clear()
        load_tokenizer.cache_clear()
        institution_module._shared_model.cache_clear()
        damage(Path(border.base))

    return change


@dataclass
class Failing:
    """A source of records, a shelf, an egress log or a home that raises."""

    error: BaseException

    def find(self, data_set: str, part: str) -> Any:
        raise self.error

    def __call__(self, *_: Any) -> Any:
        raise self.error
