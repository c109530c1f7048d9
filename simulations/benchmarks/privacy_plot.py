"""The picture of `silotune-sim bench privacy`: perplexity and exact answers against epsilon."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError
from common.files import write_atomically
from simulations.benchmarks.privacy_grid import EPSILONS, FEDERATED, METHODS, MODES, WITHOUT, Result

_COLOURS = dict(zip(MODES, ("#0b6e99", "#2a9d4e", "#b5651d", "#8a3ffc"), strict=True))
_DASHES = dict(zip(METHODS, ("-", "--"), strict=True))
_ALONE = ":"
_MEASURES = (("perplexity", "perplexity, log axis"), ("accuracy", "exact answers"))


def draw(results: Sequence[Result], file: Path) -> None:
    """Writes a PNG: a column for each number of patients, a row for each measure, medians over seeds.

    Raises ConfigError where matplotlib is not installed, StorageError when the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("the picture needs matplotlib: pip install 'silotune[bench]'") from error
    sizes = sorted({result.point.patients for result in results})
    figure = Figure(figsize=(6 * len(sizes), 8), layout="constrained")
    axes = figure.subplots(len(_MEASURES), len(sizes), squeeze=False)
    epsilons = [*sorted(EPSILONS), WITHOUT]
    for column, patients in enumerate(sizes):
        here = [result for result in results if result.point.patients == patients]
        for row, (measure, title) in enumerate(_MEASURES):
            axis = axes[row][column]
            for label, colour, dashes, mine in _curves(here):
                places, values = _line(mine, measure, epsilons)
                marker = "x" if dashes == _ALONE else "o"
                axis.plot(places, values, dashes, color=colour, marker=marker, markersize=5, label=label)
            bases = [value for result in here if (value := result.base[measure]) is not None]
            if bases:
                axis.axhline(statistics.median(bases), color="#999999", linewidth=1, label="base model")
            axis.set_xticks(range(len(epsilons)), [*(f"{e:g}" for e in epsilons[:-1]), "none"])
            axis.set_xlim(-0.3, len(epsilons) - 0.7)
            axis.set_xlabel("epsilon of the whole run")
            axis.set_ylabel(title)
            axis.grid(alpha=0.3)
            if measure == "perplexity":
                axis.set_yscale("log")
                axis.set_title(f"four hospitals, {patients} patients each")
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_formatter("{x:g}")
    named = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named, loc="outside lower center", ncols=2 * len(sizes), fontsize="small")
    write_atomically(file, lambda place: figure.savefig(place, format="png", dpi=110))


def _curves(results: Sequence[Result]) -> list[tuple[str, str, str, list[Result]]]:
    """Label, colour, dashes and results of each curve; each ends at the better method without privacy."""
    found = []
    for mode in MODES:
        for method in METHODS:
            mine = [r for r in results if r.point.mode == mode and r.point.method == method and _together(r)]
            without = [r for r in results if r.point.epsilon == WITHOUT and _together(r)]
            if mine:
                found.append((f"{mode}, {method}", _COLOURS[mode], _DASHES[method], mine + without))
    for mode in MODES:
        mine = [r for r in results if r.point.mode == mode and not _together(r)]
        without = [r for r in results if r.point.epsilon == WITHOUT and not _together(r)]
        if mine:
            found.append((f"{mode}, best hospital alone", _COLOURS[mode], _ALONE, mine + without))
    return found


def _together(result: Result) -> bool:
    return result.point.arm == FEDERATED


def _line(results: Sequence[Result], measure: str, epsilons: Sequence[float]) -> tuple[list[int], list[float]]:
    """Places on the axis and medians over seeds of the best; where nothing was run there is no place."""
    places, values = [], []
    for place, epsilon in enumerate(epsilons):
        mine = [result for result in results if result.point.epsilon == epsilon]
        by_seed = [
            min((r for r in mine if r.point.seed == seed), key=lambda r: r.perplexity)
            for seed in sorted({r.point.seed for r in mine})
        ]
        known = [value for r in by_seed if (value := r.everyone[measure]) is not None and math.isfinite(value)]
        if known:
            places.append(place)
            values.append(statistics.median(known))
    return places, values
