"""Which runs are known here, how far each came, and the institution's own numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from client.control import Control
from client.home import ClientHome
from client.run_history import APPROVED, COMPLETE, IN_PROGRESS, LEFT, WAITING, RoundNumbers, known, report
from common.errors import ConfigError

A = "a" * 64
LINE: dict[str, Any] = {
    "round": 1,
    "void": False,
    "steps": 4,
    "train_loss": 2.5,
    "validation_perplexity": 12.0,
}


@pytest.fixture
def home(tmp_path: Path) -> ClientHome:
    return ClientHome(tmp_path / "home")


def trained(home: ClientHome, run: str, *lines: dict[str, Any] | str) -> Path:
    file = home.runs / run / "metrics.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def states(home: ClientHome) -> dict[str, str]:
    return {one.name: one.state for one in known(home)}


def test_nothing_is_known_at_first(home: ClientHome) -> None:
    assert known(home) == ()


def test_a_run_is_known_by_every_trace_of_it(home: ClientHome) -> None:
    control = Control(home.control)
    control.ask("asks", A, {"rank": 8})
    control.approve("said-yes", A)
    trained(home, "begun", LINE, {**LINE, "round": 2})
    (home.runs / "begun" / "settings.json").write_text('{"rounds": 5}')
    trained(home, "done", LINE)
    (home.adapters / "done").mkdir(parents=True)
    trained(home, "gone", LINE)
    control.leave("gone")
    control.leave("never-seen")
    control.approve("approved-and-begun", A)
    (home.runs / "approved-and-begun").mkdir()
    (home.runs / ".hidden").mkdir()
    (home.runs / "a file").write_text("")
    (home.adapters / "done-by-others").mkdir()
    assert states(home) == {
        "approved-and-begun": IN_PROGRESS,
        "asks": WAITING,
        "begun": IN_PROGRESS,
        "done": COMPLETE,
        "done-by-others": COMPLETE,
        "gone": LEFT,
        "never-seen": LEFT,
        "said-yes": APPROVED,
    }
    found = {one.name: one for one in known(home)}
    assert (found["begun"].rounds, found["begun"].of) == (2, 5)
    assert (found["done"].rounds, found["done"].of, found["done"].adapter) == (1, None, True)
    assert found["asks"].waiting is not None
    assert found["asks"].waiting.terms == {"rank": 8}


def test_a_run_that_waits_anew_waits(home: ClientHome) -> None:
    trained(home, "run-1", LINE)
    Control(home.control).ask("run-1", A, {})
    assert states(home) == {"run-1": WAITING}
    assert known(home)[0].rounds == 1


def test_a_round_that_was_repeated_counts_once_with_its_last_numbers(home: ClientHome) -> None:
    void = {**LINE, "round": 2, "void": True, "train_loss": None, "validation_perplexity": None}
    trained(home, "run-1", {**LINE, "round": 2}, LINE, {**LINE, "train_loss": 2.0, "more": 1}, void)
    found = report(home, "run-1")
    assert found.rounds == (RoundNumbers(1, False, 4, 2.0, 12.0, 2), RoundNumbers(2, True, 4, None, None, 2))
    assert found.unreadable == 0


@pytest.mark.parametrize(
    "line", ['{"round": 2, "vo', "null", "7", "[]", '{"round": 2}', '{"round": null}', "[" * 100_000, "\x00"]
)
def test_a_line_that_a_crash_cut_off_is_counted_and_passed_over(home: ClientHome, line: str) -> None:
    trained(home, "run-1", LINE, line)
    found = report(home, "run-1")
    assert ([one.round for one in found.rounds], found.unreadable) == ([1], 1)


def test_numbers_that_json_has_no_word_for_are_none(home: ClientHome) -> None:
    trained(home, "run-1", {**LINE, "validation_perplexity": float("inf"), "train_loss": float("nan")})
    (one,) = report(home, "run-1").rounds
    assert (one.validation_perplexity, one.train_loss) == (None, None)


def test_without_a_name_the_run_that_was_trained_in_last_is_meant(home: ClientHome) -> None:
    import os

    for number, run in enumerate(("older", "newest", "old")):
        os.utime(trained(home, run, LINE), (0, [10, 30, 20][number]))
    assert report(home, None).run == "newest"


@pytest.mark.parametrize("run", [None, "run-2", "../run-1", ""])
def test_a_run_without_numbers_is_told_with_those_that_have_some(home: ClientHome, run: str | None) -> None:
    if run is not None:
        trained(home, "run-1", LINE)
    with pytest.raises(ConfigError, match="there are: run-1" if run is not None else "there are: none"):
        report(home, run)
