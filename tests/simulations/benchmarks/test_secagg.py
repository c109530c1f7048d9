"""The benchmark of secure aggregation, small: every figure it promises, and that a sum that is not exact ends it."""

from __future__ import annotations

import copy
import inspect
import json
import os
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import simulations.main
from common.errors import ConfigError, RunStopped
from common.fixed_point import packed_length
from common.secagg.masks import add_masks
from simulations.benchmarks import secagg
from simulations.benchmarks.secagg import HEADLINE, Case, Clock, bench, cases, plain_masking

COMMAND = [str(Path(sys.executable).with_name("silotune-sim")), "bench", "secagg"]


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """What the command prints, for cases that take a moment."""
    done = subprocess.run(
        [*COMMAND, "--cases", "2kx4,1kx5", "--repeats", "1", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "the coordinator's sum" in done.stderr  # the table, beside the object
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_last_case_stands_at_the_top_where_the_largest_was_not_measured(result: dict[str, Any]) -> None:
    assert list(result["cases"]) == ["2kx4", "1kx5"]
    assert (result["headline"], result["repeats"]) == ("1kx5", 1)
    top = result["cases"]["1kx5"]
    assert result["mask_speedup"] == pytest.approx(top["masking"]["speedup"], abs=5e-4)
    assert result["unmask_speedup"] == pytest.approx(top["coordinator"]["speedup"], abs=5e-4)
    assert result["mask_vs_limit"] == pytest.approx(top["draw_and_add"]["vs_limit"], abs=5e-4)
    assert result["upload_bytes_per_parameter"] == pytest.approx(top["upload"]["bytes_per_parameter"], abs=5e-4)
    assert result["coordinator_memory_64_to_8"] is None


def test_speedups_are_ratios_of_whole_sums_of_steps(result: dict[str, Any]) -> None:
    for case in result["cases"].values():
        for part, kinds in (("masking", {"quantise", "mask", "pack"}), ("coordinator", {"sum", "unmask", "decode"})):
            ours, theirs = case[part]["silotune"], case[part]["flower"]
            assert set(ours) == kinds | {"total"}
            assert set(theirs) == set(ours) | ({"secrets"} if part == "coordinator" else set())
            for arm in (ours, theirs):
                steps = [seconds for step, seconds in arm.items() if step != "total"]
                assert all(seconds > 0 for seconds in steps)
                assert arm["total"] == pytest.approx(sum(steps))
            assert case[part]["speedup"] == pytest.approx(theirs["total"] / ours["total"])
        limit = case["draw_and_add"]
        assert limit["vs_limit"] == pytest.approx(limit["silotune"] / limit["limit"])
        assert limit["searched"][str(limit["best_block"])] == min(limit["searched"].values())
        member = case["keys_and_shares"]["member"]
        assert all(seconds > 0 for arm in member.values() for seconds in arm.values())
        assert all(seconds > 0 for seconds in case["keys_and_shares"]["coordinator"]["silotune"].values())


def test_upload_counts_the_bytes_of_real_messages(result: dict[str, Any]) -> None:
    for case in result["cases"].values():
        upload, parameters = case["upload"], case["parameters"]
        layout = Case(parameters, case["members"]).layout
        words = 4 * packed_length(layout.length, layout.ring_bits)
        assert set(upload["silotune"]) == {"Keys", "Shares", "MaskedInput", "Consent", "Revealed"}
        assert words < upload["silotune"]["MaskedInput"] < words + 100  # the plan's digest
        assert upload["silotune"]["Keys"] > 2 * 1216
        assert upload["bytes_per_parameter"] == upload["silotune"]["MaskedInput"] / parameters
        assert upload["bytes_per_parameter_with_keys"] == sum(upload["silotune"].values()) / parameters
        # Eight bytes an element, and a header for each tensor and for the weight.
        assert 8 * (parameters + 1) < upload["flower"]["masked"] < 8 * (parameters + 1) + 2 * 200


def test_sixteen_members_take_three_bytes_an_element_and_little_beside() -> None:
    layout = Case(8_000_000, 16).layout
    assert layout.ring_bits == 24
    assert round(4 * packed_length(layout.length, layout.ring_bits) / layout.parameters, 3) == 3.0


def test_memory_of_the_coordinator_counts_vectors_and_keys(result: dict[str, Any]) -> None:
    for case in result["cases"].values():
        members = case["members"]
        assert case["coordinator_key_bytes"] > 2 * 1216 * members
        # Its sum, and a copy of it or a vector that arrives.
        assert case["coordinator_peak_bytes"] > case["coordinator_key_bytes"] + 6 * case["parameters"]


def test_memory_of_the_coordinator_is_no_more_for_more_vectors() -> None:
    peaks = []
    for members in (4, 12):
        case = Case(400_000, members)
        record, _ = secagg._play(secagg._attempt(case), case.update(), Clock(), Clock(), 1)
        peak, held = secagg._memory(record)
        peaks.append(peak - held)
    assert peaks[1] < 1.1 * peaks[0]


def test_a_sum_that_is_not_exact_ends_the_benchmark() -> None:
    case = Case(1000, 4)
    record, ready = secagg._play(secagg._attempt(case), case.update(), Clock(), Clock(), 1)
    expected = record.expected.copy()
    secagg._finish(copy.deepcopy(ready), record, Clock())
    expected[7] ^= 1
    with pytest.raises(RunStopped, match="not the plain sum"):
        secagg._finish(ready, replace(record, expected=expected), Clock())


def test_secrets_that_take_too_long_are_extrapolated_and_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secagg, "TOO_LONG", 0.0)
    shown = StringIO()
    found = bench([Case(1000, 4)], 1, Console(file=shown, width=200))
    coordinator = found["cases"]["1kx4"]["coordinator"]
    assert coordinator["flower_secrets_extrapolated"] is True
    steps = [seconds for step, seconds in coordinator["flower"].items() if step != "total"]
    assert coordinator["flower"]["total"] == pytest.approx(sum(steps))
    assert "~ extrapolated" in shown.getvalue()


def test_ratio_of_memory_needs_both_cases() -> None:
    found = {"1Mx8": {"coordinator_peak_bytes": 800}, "1Mx64": {"coordinator_peak_bytes": 1000}}
    assert secagg._ratio(found, "1Mx64", "1Mx8") == 1.25
    assert secagg._ratio({"1Mx8": found["1Mx8"]}, "1Mx64", "1Mx8") is None


@pytest.mark.parametrize("block", [256, 1024, 4096])
def test_the_plain_loop_adds_the_very_streams_that_members_add(block: int) -> None:
    keys = [os.urandom(32) for _ in range(3)]
    start = np.arange(2500, dtype=np.uint32)
    plain, ours = start.copy(), start.copy()
    plain_masking(plain, keys, block)
    add_masks(ours, keys, [])
    assert np.array_equal(plain, ours)
    assert not np.array_equal(plain, start)


def test_cases_are_read_from_the_command_line() -> None:
    assert cases("1Mx8, 250kx16,1500x4,1Mx8") == [Case(1_000_000, 8), Case(250_000, 16), Case(1500, 4)]
    default = inspect.signature(simulations.main.secagg).parameters["cases"].default
    assert ",".join(case.name for case in cases(default)) == default
    assert {HEADLINE, "1Mx8", "1Mx64"} <= {case.name for case in cases(default)}
    assert [case.name for case in cases("1000x4,1500x5,2000000x8")] == ["1kx4", "1500x5", "2Mx8"]


@pytest.mark.parametrize("text", ["", "1M", "1Mx3", "1Mx1025", "999x4", "65Mx4", "1Gx4", "1Mx8;2Mx8", "-1Mx8", "1Mx8,"])
def test_cases_that_cannot_be_measured_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--cases: expected parameters x members"):
        cases(text)


def test_wrong_options_are_refused_by_the_command() -> None:
    refused = subprocess.run([*COMMAND, "--cases", "1Mx2"], capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "--cases: expected parameters x members" in refused.stderr
    assert "Traceback" not in refused.stderr
    result = CliRunner().invoke(simulations.main.app, ["bench", "secagg", "--repeats", "0"])
    assert result.exit_code == 2
