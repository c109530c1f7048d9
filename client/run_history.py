"""What this institution knows of its runs: how far each came here, and its own numbers, round by round."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.control import RUN, Control, Waiting
from client.home import ClientHome
from common.errors import ConfigError, StorageError

WAITING, APPROVED, IN_PROGRESS, COMPLETE, LEFT = STATES = ("waiting", "approved", "in_progress", "complete", "left")


@dataclass(frozen=True)
class KnownRun:
    """A run. rounds: how many this institution trained in; of: how many it has, where that is known.

    adapter: whether the published adapter is kept here. waiting: what it asks for, while it waits for approval.
    """

    name: str
    state: str
    rounds: int
    of: int | None
    adapter: bool
    waiting: Waiting | None


@dataclass(frozen=True)
class RoundNumbers:
    """A round that this institution trained in. times: how often; the numbers are the last time's.

    void: whether zeros left instead of an update, since the numbers were not finite. train_loss: mean a token, while
    training. validation_perplexity: of the global adapter that came, on this institution's own held-out records.
    """

    round: int
    void: bool
    steps: int
    train_loss: float | None
    validation_perplexity: float | None
    times: int


@dataclass(frozen=True)
class Report:
    """unreadable: lines that a crash cut off, or that hold something else."""

    run: str
    rounds: tuple[RoundNumbers, ...]
    unreadable: int


def known(home: ClientHome) -> tuple[KnownRun, ...]:
    """All runs that left a trace here, by name. Raises StorageError and ConfigError as `Control` does."""
    control = Control(home.control)
    left, waiting, approved = control.left(), control.waiting(), control.approvals()
    kept = _directories(home.adapters)
    names = {*left, *waiting, *approved, *kept, *_directories(home.runs)}
    return tuple(_known(home, name, left, waiting, approved, name in kept) for name in sorted(names))


def report(home: ClientHome, run: str | None) -> Report:
    """The numbers of a run, of the one that was trained in last when none is named.

    Raises ConfigError when this institution trained in no such run, StorageError when its file cannot be read.
    """
    files = {name: home.runs / name / "metrics.jsonl" for name in _directories(home.runs)}
    trained = {name: file.stat().st_mtime_ns for name, file in files.items() if file.is_file()}
    if run is None and trained:
        run = max(trained, key=lambda name: trained[name])
    if run is None or run not in trained:
        there = ", ".join(sorted(trained)) or "none"
        asked = "a run" if run is None else f"the numbers of run {run!r:.80}"
        raise ConfigError(
            f"expected {asked} in which this institution trained, found none; there are: {there}."
            " `silotune-client runs` shows all that are known"
        )
    return _report(run, files[run])


def _known(
    home: ClientHome,
    name: str,
    left: Mapping[str, str],
    waiting: Mapping[str, Waiting],
    approved: Mapping[str, str],
    adapter: bool,
) -> KnownRun:
    directory = home.runs / name
    metrics = directory / "metrics.jsonl"
    rounds = len(_report(name, metrics).rounds) if metrics.is_file() else 0
    if name in left:
        state = LEFT
    elif adapter:
        state = COMPLETE
    elif name in waiting:
        state = WAITING
    else:
        state = IN_PROGRESS if directory.is_dir() or name not in approved else APPROVED
    return KnownRun(name, state, rounds, _planned(directory), adapter, waiting.get(name))


def _planned(directory: Path) -> int | None:
    """How many rounds the run has by the settings that came with its first plan."""
    try:
        rounds = json.loads((directory / "settings.json").read_text(encoding="utf-8"))["rounds"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return rounds if type(rounds) is int else None


def _directories(parent: Path) -> frozenset[str]:
    try:
        return frozenset(entry.name for entry in parent.iterdir() if entry.is_dir() and re.fullmatch(RUN, entry.name))
    except FileNotFoundError:
        return frozenset()
    except OSError as error:
        raise StorageError(f"{parent} cannot be read: {error.strerror}; see who owns it") from error


def _report(run: str, file: Path) -> Report:
    rounds: dict[int, RoundNumbers] = {}
    unreadable = 0
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {error.strerror}") from error
    for line in lines:
        try:
            found = _round(json.loads(line), rounds)
        except (ValueError, TypeError, KeyError, RecursionError):
            unreadable += 1
        else:
            rounds[found.round] = found
    return Report(run, tuple(rounds[number] for number in sorted(rounds)), unreadable)


def _round(found: Mapping[str, Any], before: Mapping[int, RoundNumbers]) -> RoundNumbers:
    number = int(found["round"])
    times = before[number].times + 1 if number in before else 1
    return RoundNumbers(
        round=number,
        void=bool(found["void"]),
        steps=int(found["steps"]),
        train_loss=_number(found["train_loss"]),
        validation_perplexity=_number(found["validation_perplexity"]),
        times=times,
    )


def _number(found: Any) -> float | None:
    """None for what is not there or is no finite number, for which JSON has no word."""
    return float(found) if found is not None and math.isfinite(found) else None
