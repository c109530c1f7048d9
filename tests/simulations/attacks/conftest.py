"""The base model that ships, with a small adapter on it: attacks are of real training."""

from __future__ import annotations

import pytest
import torch

from common.adapter import Adapter, is_a
from common.config import LoraConfig, ModelConfig
from common.models import LoraModel, load


@pytest.fixture(scope="session")
def model() -> LoraModel:
    torch.set_num_threads(1)
    return load(ModelConfig(), LoraConfig(rank=4, alpha=8.0, dropout=0.0), seed=1)


@pytest.fixture
def start(model: LoraModel, _fresh: Adapter) -> Adapter:
    """The adapter that a run begins with, which is in the model again: B is zero."""
    model.write(_fresh)
    return _fresh


@pytest.fixture(scope="session")
def _fresh(model: LoraModel) -> Adapter:
    return Adapter({key: factor if is_a(key) else 0 * factor for key, factor in model.read().factors.items()})
