"""`silotune-sim bench privacy`: the figures that say what privacy costs, their table and their picture."""

from __future__ import annotations

import math
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from common.files import write_json
from simulations.benchmarks.arms import SHAPES
from simulations.benchmarks.privacy_grid import FEDERATED, RESULTS, WITHOUT, Point, Result, run_points
from simulations.benchmarks.privacy_plot import draw
from simulations.benchmarks.privacy_step import step_costs

STEPS = ("m-qv", "s-all")
"""Shapes whose steps are timed; the first is the headline's."""

_LOT, _REPEATS = 32, 5


def bench(points: Sequence[Point], root: Path, console: Console, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Times private steps, runs the points in `root`, or goes on with them, and returns what `--json` prints.

    Writes privacy.json, and privacy.png where there is more than one epsilon to draw, into `root` whenever a point is
    done, so that a grid that was interrupted shows what it has. Figures are of all that `root` holds.
    """
    steps = [_steps(name, console) for name in STEPS]

    def found(results: Sequence[Result]) -> dict[str, Any]:
        return {**figures(results), **_ratios(steps[0]), "steps": steps, "points": [r.as_dict() for r in results]}

    def write(results: Sequence[Result]) -> None:
        write_json(root / RESULTS, found(results))
        if len({result.point.epsilon for result in results if result.point.epsilon != WITHOUT}) > 1:
            draw(results, root / "privacy.png")

    results = run_points(points, root, console, overrides, write)
    console.print(table(results))
    console.print(f"results: {root}", markup=False, highlight=False)
    return found(results)


def _steps(name: str, console: Console) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what libraries that are stood beside will change one day
        found = step_costs(SHAPES[name], Path(directory), _LOT, _REPEATS)
    console.print(
        f"{name}: a private step takes {found['step_vs_nonprivate']:.2f} x one without privacy, and Opacus's hooks over"
        f" padded batches {found['speedup_vs_opacus_padded']:.2f} x the private one",
        highlight=False,
    )
    return found


def _ratios(step: dict[str, Any]) -> dict[str, float]:
    return {key: round(step[key], 3) for key in ("step_vs_nonprivate", "speedup_vs_opacus_padded")}


# --- Figures ----------------------------------------------------------------------------------------------------------


def figures(results: Sequence[Result]) -> dict[str, float | None]:
    """The figures of mode `patient` at epsilon 8, of the most patients that were run, medians over seeds.

    progress_share_eps8_patient: log perplexity gained from the base on everybody's test, over what the better method
    without privacy gains. federated_vs_local_eps8: perplexity on everybody's test, over the best hospital's alone at
    equal epsilon; federated_vs_local_own_eps8: of geometric means over each hospital's own test, where each alone has
    the better of the methods that were run. None where a run is missing.
    """
    patients = max((result.point.patients for result in results), default=0)
    here = [result for result in results if result.point.patients == patients]
    seeds = sorted({result.point.seed for result in here})
    each = [_of_seed([result for result in here if result.point.seed == seed]) for seed in seeds]
    return {key: _median([figure[key] for figure in each]) for key in _of_seed(())}


def _of_seed(results: Sequence[Result]) -> dict[str, float | None]:
    private = [r for r in results if r.point.mode == "patient" and r.point.epsilon == 8.0]
    federated = best([r for r in private if r.point.arm == FEDERATED])
    alone = [r for r in private if r.point.arm != FEDERATED]
    without = best([r for r in results if r.point.epsilon == WITHOUT and r.point.arm == FEDERATED])
    local = best(alone)
    at_home = [min((r for r in alone if r.point.arm == name), key=_at_home) for name in {r.point.arm for r in alone}]
    return {
        "progress_share_eps8_patient": progress(federated) / progress(without) if federated and without else None,
        "federated_vs_local_eps8": federated.perplexity / local.perplexity if federated and local else None,
        "federated_vs_local_own_eps8": _at_home(federated) / _at_home(*at_home) if federated and local else None,
    }


def best(results: Sequence[Result]) -> Result | None:
    """The one with the lowest perplexity on everybody's test; None of none."""
    return min(results, key=lambda result: result.perplexity, default=None)


def progress(result: Result) -> float:
    """Nats a token that the adapter gains on the base model, on everybody's test."""
    base = result.base["perplexity"]
    assert base is not None
    return math.log(base) - math.log(result.perplexity)


def _at_home(*results: Result) -> float:
    """Geometric mean of the perplexities on hospitals' own tests."""
    own = [value for result in results for value in result.own.values()]
    return math.exp(statistics.fmean(math.inf if value is None else math.log(value) for value in own))


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 4) if known else None


# --- Table ------------------------------------------------------------------------------------------------------------


def table(results: Sequence[Result]) -> Table:
    """One line for each setting: medians over the seeds that were run, and how many these were."""
    title = "perplexity and exact answers on everybody's test; own: perplexity at home; alone: the best hospital"
    found = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    for column in ("patients", "mode", "method", "epsilon", "perplexity", "exact", "own", "seeds"):
        found.add_column(column, justify="left" if column in ("mode", "method") else "right")
    for row in rows(results):
        found.add_row(*row)
    return found


def rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """The table's lines, as text; `alone` stands behind the method where the best hospital alone is meant."""
    settings = {
        (r.point.patients, r.point.mode, r.point.method, r.point.epsilon, r.point.arm != FEDERATED) for r in results
    }
    lines: list[tuple[str, ...]] = []
    for patients, mode, method, epsilon, alone in sorted(settings, key=lambda s: (-s[0], s[1], s[4], s[2], -s[3])):
        mine = [
            result
            for result in results
            if (result.point.patients, result.point.mode, result.point.method, result.point.epsilon)
            == (patients, mode, method, epsilon)
            and (result.point.arm != FEDERATED) == alone
        ]
        by_seed = [[r for r in mine if r.point.seed == seed] for seed in sorted({r.point.seed for r in mine})]
        chosen = [found for group in by_seed if (found := best(group))]
        accuracies = [r.everyone["accuracy"] for r in chosen if r.everyone["accuracy"] is not None]
        lines.append(
            (
                str(patients),
                mode,
                f"{method}, alone" if alone else method,
                "none" if epsilon == WITHOUT else f"{epsilon:g}",
                f"{statistics.median(r.perplexity for r in chosen):.2f}",
                f"{100 * statistics.median(accuracies):.0f} %" if accuracies else "–",
                f"{statistics.median(_at_home(*(group if alone else group[:1])) for group in by_seed):.2f}",
                str(len(chosen)),
            )
        )
    return lines
