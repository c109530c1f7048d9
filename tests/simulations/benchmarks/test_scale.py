"""The benchmark of sizes, small: every number it promises, and that an actor loads the base model once."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from common.errors import ConfigError
from simulations.benchmarks.scale import Scale, configuration, scale, sizes


def test_each_actor_loads_the_base_model_once_and_every_promised_number_is_there() -> None:
    shown = StringIO()
    found = scale([6], rounds=2, actors=2, console=Console(file=shown, width=200))
    assert [(size["clients"], size["wave"]) for size in found["sizes"]] == [(6, 0), (6, 6)]
    assert [size["loads"] for size in found["sizes"]] == [[1, 1], [1, 1]]
    assert found["model_loads_per_actor"] == 1
    assert set(found["seconds_per_round"]) == {"6"}
    assert all(seconds > 0 for seconds in found["seconds_per_round"].values())
    assert found["coordinator_rss_6_to_6"] == 1.0
    assert found["all_at_once"]["seconds_per_round"] > 0
    assert 0.8 < found["all_at_once"]["coordinator_rss_to_waves"] < 1.25
    assert len({size["adapter_bytes"] for size in found["sizes"]}) == 1
    for size in found["sizes"]:
        assert 0 < size["coordinator_before"] <= size["coordinator_peak"]
        assert all(peak > 0 for peak in size["actor_peaks"])
        assert set(size["phases"]) == {"train", "secure_aggregation", "aggregate", "evaluate"}
        assert size["phases"]["secure_aggregation"] == 0
    assert "all messages at once" in shown.getvalue()


@pytest.mark.parametrize("clients", [2, 1000, 2**15])
def test_every_size_is_a_configuration_that_can_be_meant(clients: int) -> None:
    config = configuration(Scale(clients), Path("records"))
    assert len(config.data.names) == clients
    assert config.quantise == configuration(Scale(3), Path("records")).quantise


def test_sizes_are_read_from_the_command_line() -> None:
    assert sizes("100, 10,1000,10") == [10, 100, 1000]


@pytest.mark.parametrize("text", ["", "1", "10,", "10;100", "-3", "ten", "32769"])
def test_sizes_that_cannot_be_meant_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--clients: expected whole numbers from 2 to 32768"):
        sizes(text)
