"""What is written and shown of a run while it goes on."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from common.messages import BASE_MODEL_DIFFERS, Refused
from server import live, runs
from server.collect import Heard
from server.live import Board, Screen
from server.rounds import Progress, RoundRecord, begin
from server.runs import COMPLETE, FAILED, RUNNING, Run, Status
from tests.server.conftest import distance_to_one, rounds_config, small_adapter

CONFIG = rounds_config(secure=True)
FIRST = Status(RUNNING, rounds=4, pid=17, started="2030-01-01T00:00:00+00:00")
RECORD = RoundRecord(
    round=1, contributors=4, void=1, refused={"cedar": "timed_out"}, train_loss=1.5, institutions_perplexity=None,
    validation={"perplexity": 6.0, "accuracy": 0.25}, best=True, seconds={"train": 1.0}, bytes_up=1, bytes_down=1,
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return runs.create(tmp_path / "runs", CONFIG)


def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def shown(status: Status, now: datetime | None = None) -> str:
    console = Console(file=io.StringIO(), width=300)
    console.print(live.told(status, now))
    printed: str = console.file.getvalue()  # type: ignore[attr-defined]
    return printed


def progress(*records: RoundRecord) -> Progress:
    start = begin(small_adapter(), distance_to_one(small_adapter()))
    return replace(start, history=records, best_round=1, best_perplexity=6.0)


# --- What is written -------------------------------------------------------------------------------------------------


def test_what_is_told_is_shown_at_once_and_written_soon(run: Run) -> None:
    said: list[Status] = []
    with Board(run, FIRST, said.append) as board:
        assert runs.Status.from_json(FIRST.to_json()) == FIRST
        board.tell(phase="train", answered=("alder",))
        assert said[-1].answered == ("alder",)
        eventually(lambda: "alder" in run.status.read_text())
        board.tell(phase="done", state=COMPLETE)
    assert runs.read_status(run) == board.status == said[-1]


def test_time_is_counted_from_the_beginning_of_a_phase_and_of_a_round(run: Run) -> None:
    with Board(run, replace(FIRST, since="2030-01-01T00:00:00+00:00", phase="train")) as board:
        board.tell(answered=("alder",))
        assert board.status.since == "2030-01-01T00:00:00+00:00"
        board.tell(phase="train", round=1)
        assert board.status.since == board.status.updated != "2030-01-01T00:00:00+00:00"
        board.tell(phase="shares", since="2031-01-01T00:00:00+00:00")
        assert board.status.since == "2031-01-01T00:00:00+00:00"


def test_a_disk_that_refuses_stops_no_run(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    with Board(run, FIRST) as board:
        shutil.rmtree(run.root)
        run.root.write_text("in the way")
        board.tell(phase="train")
        eventually(lambda: "cannot write" in caplog.text)
        run.root.unlink()
        run.root.mkdir()
        board.tell(phase="shares")
    assert runs.read_status(run).phase == "shares"


# --- What happens ----------------------------------------------------------------------------------------------------


def test_a_run_is_told_from_gathering_to_delivery(run: Run) -> None:
    lines: list[str] = []
    with Board(run, FIRST) as board:
        observer = live.observer(CONFIG, board, lambda text: lines.append(text.plain))
        observer.on_gathering({"cedar": "paused", "birch": "absent"})
        observer.on_gathering({"cedar": "paused", "birch": "absent"})
        assert (board.status.phase, board.status.waiting["cedar"]) == ("gathering", "paused")
        observer.on_gathering({})
        observer.on_refusal("node-7", Refused(BASE_MODEL_DIFFERS, "dogwood", ("weights",)))
        assert board.status.refused == {"dogwood": "base_model_differs weights"}
        observer.on_heard(Heard(1, 3, "train", ("alder",), ("birch", "cedar")))
        assert (board.status.phase, board.status.round, board.status.attempt) == ("train", 0, 3)
        assert (board.status.answered, set(board.status.waiting)) == (("alder",), {"birch", "cedar"})
        observer.on_heard(Heard(1, 3, "train", ("alder", "birch", "cedar"), ()))
        assert board.status.phase == "train"
        observer.on_heard(Heard(1, 3, "unmask", ("alder", "birch", "cedar"), ()))
        assert board.status.phase == "evaluating"
        observer.on_round(progress(RECORD))
        assert (board.status.round, board.status.best_round, board.status.perplexity) == (1, 1, 6.0)
        assert board.status.phase == "evaluating"
        observer.on_round(progress(*[RECORD] * 4))
        assert board.status.phase == "delivering"
        observer.on_delivered("cedar")
        observer.on_delivered("alder")
        assert board.status.delivered == ("alder", "cedar")
    assert lines == [
        "waiting for birch (absent), cedar (paused)",
        "everybody is there",
        "round 1, train loss 1.500, perplexity 6.00, exact answers 25%, 1 void, cedar: timed_out best so far",
        "round 1, train loss 1.500, perplexity 6.00, exact answers 25%, 1 void, cedar: timed_out best so far",
        "cedar has the adapter",
        "alder has the adapter",
    ]


def test_in_the_clear_the_sum_is_there_once_all_have_trained(run: Run) -> None:
    with Board(run, FIRST) as board:
        observer = live.observer(rounds_config(), board, lambda _: None)
        observer.on_heard(Heard(1, 1, "train", ("alder",), ()))
        assert board.status.phase == "evaluating"


# --- What is shown ---------------------------------------------------------------------------------------------------


def test_who_is_late_is_seen_and_for_how_long() -> None:
    begun = datetime(2030, 1, 1, tzinfo=UTC)
    status = replace(
        FIRST, phase="masked input", since=begun.isoformat(), round=1, answered=("alder",), waiting={"birch": ""},
        refused={"elm": "left"}, perplexity=6.0, best_round=1,
    )  # fmt: skip
    said = shown(status, begun + timedelta(seconds=75))
    assert "round 2 of 4: institutions send masked vectors" in said
    assert "answered     alder" in said
    assert "waiting for  birch, 75 s so far" in said
    assert "no part      elm (left)" in said
    assert "perplexity 6.00, round 1" in said
    assert "so far" not in shown(replace(status, since=""), begun)


def test_who_pauses_is_seen_before_the_first_round() -> None:
    said = shown(replace(FIRST, phase="gathering", waiting={"birch": "not_approved", "cedar": "absent"}))
    assert "waiting for institutions" in said
    assert "birch (not_approved), cedar (absent)" in said


def test_a_run_that_ended_says_how() -> None:
    said = shown(replace(FIRST, state=FAILED, round=2, why="too few", perplexity=9.0))
    assert said.startswith("failed, 2 of 4 rounds")
    assert "too few" in said
    assert "the base model, which no round has beaten yet" in said
    assert "complete, 4 of 4" in shown(replace(FIRST, state=COMPLETE, round=4))


def test_a_thousand_names_do_not_fill_the_screen() -> None:
    said = shown(replace(FIRST, phase="train", waiting={f"i{n}": "" for n in range(1000)}))
    assert "and 988 others" in said
    assert len(said.splitlines()) == 2


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_stay_and_how_it_stands_is_for_terminals_alone(terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=terminal)
    with Screen(console) as screen:
        screen.show(replace(FIRST, phase="train", waiting={"birch": ""}))
        screen.line(Text("round 1 [red]of[/red] x"))
        if terminal:
            eventually(lambda: "birch" in console.file.getvalue())  # type: ignore[attr-defined]
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "round 1 [red]of[/red] x" in printed
    assert ("birch" in printed) is terminal
