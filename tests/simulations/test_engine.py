"""What stands around Flower's engine."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from common.config import Config, ModelConfig, SimulationConfig
from simulations.engine import _gpu_share


def test_nothing_calls_home() -> None:
    code = (
        "import simulations.run, flwr.supercore.telemetry, huggingface_hub.constants as hub; "
        "print(flwr.supercore.telemetry.FLWR_TELEMETRY_ENABLED, hub.HF_HUB_OFFLINE)"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("FLWR_", "HF_"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "True"]


@pytest.mark.parametrize(
    ("device", "gpus", "actors", "share"),
    [("auto", 0, 2, 0.0), ("cpu", 4, 2, 0.0), ("auto", 1, 2, 0.5), ("cuda", 2, 3, 0.5), ("auto", 4, 2, 1.0)],
)
def test_every_actor_finds_a_place_on_one_gpu(
    device: str, gpus: int, actors: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)  # wherever the test runs
    config = replace(Config(), model=ModelConfig(device=device), simulation=SimulationConfig(actors=actors))
    assert _gpu_share(config) == share
    assert not share or gpus * int(1 / share) >= actors
