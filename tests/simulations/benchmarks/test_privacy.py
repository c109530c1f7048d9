"""The benchmark of what privacy costs: points that are what they say, figures by hand, and nothing trained twice."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from common.errors import ConfigError
from common.records import read_jsonl
from simulations.benchmarks import privacy, privacy_grid
from simulations.benchmarks.privacy_grid import FEDERATED, METHODS, MODES, WITHOUT, Point, Result
from simulations.benchmarks.privacy_plot import draw

QUICK = (
    "federation.rounds=1",
    "train.passes_per_round=1",
    "train.max_tokens=64",
    "privacy.sampling_rate=0.5",
    "data.own_records=4",
    "data.central_records=12",
)
PRIVATE = Point(8, 1, "patient", "ffa", 8.0)
HOSPITALS = ("riverside", "northgate", "lakeside", "summit")


def made(perplexity: float, point: Point = PRIVATE, own: float | None = None, base: float = 4.0) -> Result:
    at_home = perplexity if own is None else own
    homes = HOSPITALS if point.arm == FEDERATED else (point.arm,)
    return Result(
        point=point,
        everyone={"perplexity": perplexity, "accuracy": 0.25},
        own=dict.fromkeys(homes, at_home),
        base={"perplexity": base, "accuracy": 0.0},
        best_round=1,
        seconds=1.0,
    )


def alone(perplexity: float, name: str, own: float, seed: int = 1) -> Result:
    return made(perplexity, replace(PRIVATE, arm=name, seed=seed), own)


# --- What is run ------------------------------------------------------------------------------------------------------


def test_the_headline_is_one_mode_at_one_epsilon_together_and_alone_and_no_privacy() -> None:
    points = privacy_grid.headline(1000, 1)
    assert len(points) == 6
    assert {point.arm for point in points if point.mode == "patient"} == {FEDERATED, *HOSPITALS}
    assert [point for point in points if point.mode == "none"] == [Point(1000, 1, "none", "fedavg", WITHOUT)]
    assert {point.epsilon for point in points if point.mode != "none"} == {8.0}


def test_the_grid_has_every_mode_method_and_epsilon_once_for_each_seed_and_size() -> None:
    points = privacy_grid.grid((1000, 80), (1, 2, 3))
    assert len(points) == len(set(points)) == len({point.name for point in points})
    together = [point for point in points if point.arm == FEDERATED and point.epsilon != WITHOUT]
    assert len(together) == 2 * 3 * len(MODES) * len(METHODS) * 4
    assert {point.epsilon for point in together} == {1.0, 2.0, 4.0, 8.0}
    assert points[:6] == privacy_grid.headline(1000, 1)


@pytest.mark.parametrize(("patients", "delta"), [(1000, 1e-4), (80, 1e-3), (99, 1e-3), (100, 1e-3), (101, 1e-4)])
def test_delta_is_below_one_in_ten_times_the_patients(patients: int, delta: float) -> None:
    assert privacy_grid.delta_for(patients) == delta
    assert delta <= 1 / (10 * patients)


@pytest.mark.parametrize("text", ["", "0", "80,", "a", "1.5", "-3"])
def test_numbers_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--seeds: expected whole numbers"):
        privacy_grid.numbers(text, "--seeds")
    assert privacy_grid.numbers("80, 7,80", "--seeds") == (80, 7)


@pytest.mark.parametrize("mode", [*MODES, "none"])
def test_points_promise_what_they_say_and_noise_at_units_is_compared_at_equal_passes(mode: str, tmp_path: Path) -> None:
    expected = privacy_grid.config_of(replace(PRIVATE, patients=1000), tmp_path)
    epsilon = WITHOUT if mode == "none" else 2.0
    config = privacy_grid.config_of(Point(1000, 3, mode, "fedavg", epsilon), tmp_path)
    passes = config.federation.rounds * config.train.passes_per_round
    share = 0.5 if mode in ("none", "institution") else 1.0  # where fewer passes are enough
    assert passes == pytest.approx(share * expected.federation.rounds * expected.train.passes_per_round)
    assert (config.privacy.mode, config.privacy.delta, config.seed) == (mode, 1e-4, 3)
    assert config.privacy.epsilon == (0.0 if mode == "none" else 2.0)
    assert config.federation.weighting == ("records" if mode == "none" else "uniform")
    if mode == "distributed":
        assert config.train.passes_per_round == config.privacy.sampling_rate


def test_every_hospital_has_exactly_so_many_patients(tmp_path: Path) -> None:
    records = privacy_grid.records_of(tmp_path, 9, 1)
    for name in HOSPITALS:
        found = read_jsonl(records / name / "train.jsonl")
        assert len({record.person for record in found}) == 9
    before = (records / "summit" / "train.jsonl").stat().st_mtime_ns
    assert privacy_grid.records_of(tmp_path, 9, 1) == records
    assert (records / "summit" / "train.jsonl").stat().st_mtime_ns == before


# --- Running it -------------------------------------------------------------------------------------------------------


def test_points_are_trained_once_and_gone_on_with(tmp_path: Path) -> None:
    points = (PRIVATE, replace(PRIVATE, arm="summit"), Point(8, 1, "none", "fedavg", WITHOUT))
    console = Console(quiet=True)
    first = {result.point: result for result in privacy_grid.run_points(points, tmp_path, console, QUICK)}
    assert list(first) == [points[2], points[0], points[1]]  # in the order of their names
    for result in first.values():
        assert result.stopped == ""
        assert math.isfinite(result.perplexity)
        assert set(result.own) == (set(HOSPITALS) if result.point.arm == FEDERATED else {"summit"})
    assert first[points[2]].perplexity < first[PRIVATE].perplexity  # eight patients teach little
    kept = tmp_path / "points" / PRIVATE.name / "result.json"
    said = json.loads(kept.read_text())
    kept.write_text(json.dumps({**said, "seconds": 12345.0}))
    assert privacy_grid.run_point(PRIVATE, tmp_path, QUICK).seconds == 12345.0
    with pytest.raises(ConfigError, match="name the same, or choose another --out"):
        privacy_grid.run_points(points, tmp_path, console, ())


def test_what_a_results_file_has_is_not_run_again(tmp_path: Path) -> None:
    """A grid goes on from its privacy.json alone, on another machine, say; what was not asked for stays in it."""
    held = [made(2.0), made(1.5, replace(PRIVATE, epsilon=4.0))]
    (tmp_path / "privacy.json").write_text(json.dumps({"points": [result.as_dict() for result in held]}))
    with pytest.raises(ConfigError, match="holds points with no overrides"):
        privacy_grid.run_points((PRIVATE,), tmp_path, Console(quiet=True), QUICK)
    (tmp_path / "overrides.json").write_text(json.dumps(QUICK))
    seen: list[list[Point]] = []
    asked = (PRIVATE, replace(PRIVATE, arm="summit"))
    console = Console(quiet=True)
    found = privacy_grid.run_points(
        asked, tmp_path, console, QUICK, lambda results: seen.append([result.point for result in results])
    )
    assert [result for result in found if result.point != asked[1]] == held
    assert seen == [[result.point for result in held], [result.point for result in found]]
    assert [place.name for place in (tmp_path / "points").iterdir()] == [asked[1].name]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"points": [{}]}', '{"points": [{"epsilon": 8.0, "arm": "x"}]}'])
def test_a_results_file_of_something_else_is_named_and_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "privacy.json").write_text(text)
    with pytest.raises(ConfigError, match=r"privacy\.json: expected what `bench privacy` writes"):
        privacy_grid.run_points((PRIVATE,), tmp_path, Console(quiet=True))
    assert (tmp_path / "privacy.json").read_text() == text
    assert not (tmp_path / "records").exists()


def test_a_point_that_was_interrupted_goes_on_from_its_last_round(tmp_path: Path) -> None:
    """Its result is gone, its rounds are not: what it comes to is the same, and no round is trained again."""
    privacy_grid.records_of(tmp_path, 8, 1, QUICK)
    point = Point(8, 1, "distributed", "ffa", 8.0)
    first = privacy_grid.run_point(point, tmp_path, QUICK)
    place = tmp_path / "points" / point.name
    (place / "result.json").unlink()
    rounds = (place / "metrics.jsonl").read_text()
    assert len(rounds.splitlines()) == 2  # two steps in a pass
    again = privacy_grid.run_point(point, tmp_path, QUICK)
    assert (again.everyone, again.own, again.best_round) == (first.everyone, first.own, first.best_round)
    assert (place / "metrics.jsonl").read_text() == rounds


def test_the_benchmark_times_steps_runs_its_points_and_keeps_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(privacy, "STEPS", ("tiny",))
    points = (PRIVATE, replace(PRIVATE, epsilon=1.0))
    found = privacy.bench(points, tmp_path, Console(quiet=True), QUICK)
    assert json.loads((tmp_path / "privacy.json").read_text()) == found
    assert [place["epsilon"] for place in found["points"]] == [8.0, 1.0]
    assert found["step_vs_nonprivate"] == pytest.approx(found["steps"][0]["step_vs_nonprivate"], abs=1e-3)
    assert found["speedup_vs_opacus_padded"] > 0
    assert found["progress_share_eps8_patient"] is None  # nothing was run without privacy
    assert (tmp_path / "privacy.png").exists()


@given(
    st.builds(
        Point,
        st.integers(1, 9),
        st.integers(1, 9),
        st.sampled_from(MODES),
        st.sampled_from(METHODS),
        st.sampled_from([1.0, 8.0, WITHOUT]),
        st.sampled_from([FEDERATED, *HOSPITALS]),
    ),
    st.none() | st.floats(1, 1e6),
)
def test_a_result_is_written_and_read_alike(point: Point, perplexity: float | None) -> None:
    result = replace(made(2.0, point), everyone={"perplexity": perplexity, "accuracy": None}, stopped="void")
    text = json.dumps(result.as_dict(), allow_nan=False)
    assert Result.from_dict(json.loads(text)) == result


# --- Figures ----------------------------------------------------------------------------------------------------------


def test_figures_by_hand() -> None:
    without = Point(8, 1, "none", "fedavg", WITHOUT)
    results = [
        made(2.0, own=3.0),
        made(1.0, without),
        made(1.5, replace(without, method="ffa")),
        alone(2.5, "summit", own=3.0),
        alone(3.5, "lakeside", own=12.0),
        made(3.4, replace(PRIVATE, arm="lakeside", method="fedavg"), own=20.0),  # at home the other is better
        made(1.1, replace(PRIVATE, epsilon=4.0)),  # of no account
        made(1.1, replace(PRIVATE, mode="record")),
    ]
    found = privacy.figures(results)
    assert found["progress_share_eps8_patient"] == pytest.approx(math.log(2) / math.log(4), abs=1e-4)
    assert found["federated_vs_local_eps8"] == pytest.approx(2.0 / 2.5)
    assert found["federated_vs_local_own_eps8"] == pytest.approx(3.0 / 6.0)


def test_figures_are_medians_over_seeds_of_the_most_patients() -> None:
    results: list[Result] = []
    for seed, perplexity in ((1, 2.0), (2, 3.0), (3, 2.2)):
        results += [made(perplexity, replace(PRIVATE, seed=seed)), alone(4.0, "summit", own=4.0, seed=seed)]
    results.append(made(1.0, replace(PRIVATE, patients=4)))
    found = privacy.figures(results)
    assert found["federated_vs_local_eps8"] == pytest.approx(2.2 / 4.0)
    assert found["progress_share_eps8_patient"] is None


def test_figures_of_nothing_are_none() -> None:
    assert set(privacy.figures([]).values()) == {None}


def test_a_line_of_the_table_is_a_setting_with_its_medians() -> None:
    results = [made(2.0), made(3.0, replace(PRIVATE, seed=2)), alone(5.0, "summit", 6.0), alone(4.0, "lakeside", 1.5)]
    assert privacy.rows(results) == [
        ("8", "patient", "ffa", "8", "2.50", "25 %", "2.50", "2"),
        ("8", "patient", "ffa, alone", "8", "4.00", "25 %", "3.00", "1"),
    ]


def test_the_picture_is_a_png_of_whatever_was_run(tmp_path: Path) -> None:
    results = [made(2.0), made(1.2, Point(8, 1, "none", "ffa", WITHOUT)), alone(3.0, "summit", 3.0)]
    diverged: dict[str, Any] = {"perplexity": None, "accuracy": 0.0}
    results.append(replace(made(2.0, replace(PRIVATE, patients=80)), everyone=diverged))
    draw(results, tmp_path / "privacy.png")
    assert (tmp_path / "privacy.png").read_bytes().startswith(b"\x89PNG")
