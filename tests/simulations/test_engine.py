"""What stands around Flower's engine."""

from __future__ import annotations

import os
import subprocess
import sys


def test_nothing_calls_home() -> None:
    code = (
        "import simulations.run, flwr.supercore.telemetry, huggingface_hub.constants as hub; "
        "print(flwr.supercore.telemetry.FLWR_TELEMETRY_ENABLED, hub.HF_HUB_OFFLINE)"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("FLWR_", "HF_"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "True"]
