"""What a summary says of seconds, absences and secure aggregation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common import config_files
from common.adapter import Adapter
from server import summary
from server.rounds import Progress, RoundRecord


def record(**seconds: float) -> RoundRecord:
    return RoundRecord(
        round=1, contributors=3, void=0, refused={}, train_loss=None, institutions_perplexity=None, validation=None,
        best=False, seconds=seconds, bytes_up=1, bytes_down=1,
    )  # fmt: skip


def progress(*records: RoundRecord) -> Progress:
    return Progress(Adapter({}), Adapter({}), history=records)


def rounds(count: int) -> list[RoundRecord]:
    return [record() for _ in range(count)]


def test_seconds_are_summed_by_phase_and_an_older_round_took_none_of_a_newer_phase() -> None:
    old, new = record(train=3.0, aggregate=1.0, evaluate=2.0), record(train=3.0, secure_aggregation=2.0, aggregate=1.0)
    assert summary.seconds_of(progress(old, new)) == {
        "train": 6.0, "secure_aggregation": 2.0, "aggregate": 2.0, "evaluate": 2.0,
    }  # fmt: skip
    assert set(summary.seconds_of(None).values()) == {0}


def test_the_share_is_of_the_rounds_own_time_and_there_is_none_without_secure_aggregation() -> None:
    timed = progress(record(train=3.0, secure_aggregation=2.0, aggregate=1.0, evaluate=2.0))
    on, off = (config_files.load("smoke", [f"secure_aggregation.enabled={word}"]) for word in ("true", "false"))
    assert summary.secure_share(on, timed) == 0.25
    assert summary.secure_share(off, timed) is None
    assert summary.secure_share(on, progress()) is None


def test_the_numbers_are_those_of_the_institutions_that_took_part() -> None:
    config = config_files.load("hospitals")
    assert summary.privacy(config, {}, 100, rounds(12)) == {
        "secure_aggregation": True,
        "mode": "none",
        "terms": {
            "cohort": 4, "colluders": 1, "threshold": 3, "smallest_sum": 3, "dropouts": 1, "ring_bits": 16 + 4 + 2,
        },
    }  # fmt: skip
    assert summary.privacy(config, {"summit": "base_model_differs"}, 100, rounds(12))["terms"]["dropouts"] == 0
    off = config_files.load("hospitals", ["secure_aggregation.enabled=false"])
    assert summary.privacy(off, {}, 100, rounds(12)) == {"secure_aggregation": False, "mode": "none"}


@pytest.mark.parametrize(
    ("mode", "unit", "rate", "steps"),
    [
        ("record", "record", 0.5, 4 * 4),
        ("patient", "patient", 0.5, 4 * 4),
        ("institution", "institution", 1.0, 4),
        ("distributed", "record", 0.5, 4),
    ],
)
def test_the_privacy_of_a_run_is_told_with_its_unit_and_what_its_rounds_cost(
    mode: str, unit: str, rate: float, steps: int
) -> None:
    overrides = [f"privacy.mode={mode}", "privacy.noise_multiplier=4.0", "privacy.sampling_rate=0.5"]
    overrides += [
        "federation.rounds=4",
        "train.passes_per_round=2.0",
        "lora.dropout=0.0",
        "federation.weighting=uniform",
    ]
    config = config_files.load("hospitals", overrides)
    told = summary.privacy(config, {}, 100, rounds(4))
    assert (told["mode"], told["unit"], told["sampling_rate"], told["steps"]) == (mode, unit, rate, steps)
    assert told["noise_multiplier"] == pytest.approx(4.0, rel=1e-3)
    assert (told["delta"], told["clip"]) == (config.privacy.delta, config.privacy.clip)
    assert 0 < told["epsilon"] <= told["epsilon_rdp"] + 1e-4
    assert summary.privacy(config, {}, 100, rounds(2))["epsilon"] < told["epsilon"]
    assert [number for number, _ in told["implied"]] == list(range(1, 5))
    assert [told["implied"][i][1] for i in (1, 3)] == [
        summary.privacy(config, {}, 100, rounds(2))["epsilon"],
        told["epsilon"],
    ]
    again = summary.privacy(config, {}, 100, [*rounds(3), replace(record(), attempts=3)])
    if mode in ("institution", "distributed"):  # each attempt draws fresh noise over the same data
        assert again["steps"] == told["steps"] + 2
        assert again["implied"][-1][1] == again["epsilon"] > told["epsilon"]
    else:
        assert again == told
    plain = config_files.load("hospitals", overrides[2:])
    bits = summary.privacy(plain, {}, 100, rounds(4))["terms"]["ring_bits"]
    assert (told["terms"]["ring_bits"] > bits) == (mode in ("institution", "distributed"))


def test_what_was_spent_is_never_told_as_nothing() -> None:
    overrides = ["privacy.mode=patient", "privacy.epsilon=1e-9", "privacy.sampling_rate=1", "federation.rounds=4"]
    told = summary.privacy(config_files.load("smoke", overrides), {}, 100, rounds(2))
    assert told["epsilon"] == 1e-4
    assert told["implied"] == [[1, 1e-4], [2, 1e-4]]


def test_absences_are_counted_by_name_and_reason() -> None:
    rounds = [replace(record(), refused=refused) for refused in ({"a": "paused"}, {"a": "paused", "b": "left"}, {})]
    assert summary.absences(rounds) == {"a": {"paused": 2}, "b": {"left": 1}}


def test_a_long_run_is_told_at_some_rounds_and_at_its_last() -> None:
    overrides = ["privacy.mode=institution", "privacy.noise_multiplier=4.0", "federation.rounds=100"]
    overrides += ["federation.weighting=uniform"]
    config = config_files.load("hospitals", overrides)
    told = summary.privacy(config, {}, 100, rounds(100))["implied"]
    assert len(told) == summary.MOST_MOMENTS
    assert told[-1][0] == 100
    assert summary.privacy(config, {}, 100, [])["implied"] == []
    assert summary.privacy(config, {}, 100, [])["epsilon"] == 0
