"""A run while it goes on: what is written down of it for other commands, and what its operator sees.

Names of institutions are in both, so both are for the coordinator alone.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from common.config import Config
from common.errors import StorageError
from common.messages import Refused
from server import runs
from server.collect import Heard
from server.coordinator import Observer
from server.rounds import Progress, RoundRecord, finished
from server.runs import Run, Status
from server.verdict import perplexity_text, seconds_text

log = logging.getLogger("silotune.server")

_WRITE_S = 0.5
_MOST_NAMES = 12

PHASES = {
    "preparing": "loading the base model, and scoring it",
    "gathering": "waiting for institutions",
    "train": "institutions train",
    "shares": "institutions exchange shares",
    "masked input": "institutions send masked vectors",
    "consent": "institutions agree who is in the sum",
    "unmask": "institutions reveal what unmasks the sum",
    "evaluating": "evaluating the sum",
    "delivering": "handing out the adapter",
    "scoring": "scoring on test records",
    "done": "done",
}
"""What a run waits for or does, in words."""


class Board:
    """How a run stands, kept up to date: shown at once, and written at most twice a second, by a thread of its own.

    A round with many institutions has thousands of answers, and what matters is the last one before a silence.
    """

    def __init__(self, run: Run, first: Status, show: Callable[[Status], None] = lambda _: None) -> None:
        self.status = first
        self._run = run
        self._show = show
        self._lock = threading.Lock()
        self._written: Status | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="status", daemon=True)

    def __enter__(self) -> Board:
        self.write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._write_or_tell()

    def tell(self, **changes: Any) -> None:
        """What changed."""
        now = runs.now()
        with self._lock:
            phase = changes.get("phase", self.status.phase)
            moved = phase != self.status.phase or changes.get("round", self.status.round) != self.status.round
            since = now if moved or not self.status.since else self.status.since
            self.status = replace(self.status, **{"since": since, **changes, "updated": now})
        self._show(self.status)

    def write(self) -> None:
        """Writes what is new. Raises StorageError."""
        with self._lock:
            status = self.status
        if status != self._written:
            runs.write_status(self._run, status)
            self._written = status

    def _keep_writing(self) -> None:
        while not self._over.wait(_WRITE_S):
            self._write_or_tell()

    def _write_or_tell(self) -> None:
        try:
            self.write()
        except StorageError as error:  # a run is not stopped for this; its checkpoints speak for themselves
            log.warning("%s", error)


def observer(config: Config, board: Board, tell: Callable[[Text], None]) -> Observer:
    """Keeps the board, and tells in lines what is worth one: who is waited for, each round, who has the adapter."""
    last = "unmask" if config.secure_aggregation.enabled else "train"

    def say(text: Text) -> None:
        log.info("%s", text.plain)
        tell(text)

    def on_gathering(waiting: Mapping[str, str]) -> None:
        if dict(waiting) != dict(board.status.waiting) or board.status.phase != "gathering":
            said = ", ".join(f"{name} ({reason})" for name, reason in sorted(waiting.items()))
            say(Text(f"waiting for {said}" if said else "everybody is there"))
        board.tell(phase="gathering", waiting=dict(waiting), answered=())

    def on_refusal(name: str, refused: Refused) -> None:
        said = " ".join((refused.reason, *refused.parts))
        board.tell(refused={**board.status.refused, refused.name or name: said})  # the log has a line of it

    def on_heard(heard: Heard) -> None:
        board.tell(
            phase="evaluating" if heard.phase == last and not heard.waiting else heard.phase,
            round=heard.round - 1,
            attempt=heard.attempt,
            answered=heard.answered,
            waiting=dict.fromkeys(heard.waiting, ""),
        )

    def on_round(progress: Progress) -> None:
        changes = standing(progress) | ({"phase": "delivering"} if finished(config, progress) else {})
        board.tell(attempt=0, answered=(), waiting={}, **changes)
        say(round_line(progress.history[-1]))

    def on_delivered(name: str) -> None:
        board.tell(phase="delivering", delivered=tuple(sorted({*board.status.delivered, name})))
        say(Text(f"{name} has the adapter"))

    return Observer(
        on_gathering=on_gathering,
        on_refusal=on_refusal,
        on_heard=on_heard,
        on_round=on_round,
        on_delivered=on_delivered,
    )


def standing(progress: Progress | None) -> dict[str, Any]:
    """What a status says of a run's progress."""
    if progress is None:
        return {"round": 0, "best_round": 0, "perplexity": None}
    best = progress.best_perplexity
    return {
        "round": progress.round,
        "best_round": progress.best_round,
        "perplexity": best if math.isfinite(best) else None,
    }


# --- What is shown ---------------------------------------------------------------------------------------------------


def round_line(record: RoundRecord) -> Text:
    """A round in one line, with what went wrong in red."""
    parts = [Text(f"round {record.round}")]
    if record.train_loss is not None:
        parts.append(Text(f"train loss {record.train_loss:.3f}"))
    if record.validation is not None:
        perplexity, accuracy = record.validation["perplexity"], record.validation["accuracy"]
        parts.append(Text("perplexity " + ("not finite" if perplexity is None else f"{perplexity:.2f}")))
        parts += [] if accuracy is None else [Text(f"exact answers {accuracy:.0%}")]
    if record.void:
        parts.append(Text(f"{record.void} void", "red"))
    parts += [Text(f"{name}: {reason}", "red") for name, reason in record.refused.items()]
    return Text.assemble(Text(", ").join(parts), (" best so far", "green") if record.best else "")


def told(status: Status, now: datetime | None = None) -> Group:
    """How a run stands, in a few lines. now: makes the time that somebody is waited for visible."""
    of = f"round {min(status.round + 1, status.rounds)} of {status.rounds}"
    if status.state == runs.RUNNING:
        head = Text(f"{of}: {PHASES.get(status.phase, status.phase)}", "bold")
    else:
        head = Text(f"{status.state}, {status.round} of {status.rounds} rounds", _STYLES[status.state])
    lines = [head]
    if status.answered:
        lines.append(Text(f"  answered     {_listed(status.answered)}"))
    if status.waiting:
        names = [f"{name} ({why})" if why else name for name, why in sorted(status.waiting.items())]
        lines.append(Text(f"  waiting for  {_listed(names)}{_for_how_long(status.since, now)}", "yellow"))
    if status.refused:
        names = [f"{name} ({why})" for name, why in sorted(status.refused.items())]
        lines.append(Text(f"  no part      {_listed(names)}", "red"))
    if status.perplexity is not None:
        round_ = f"round {status.best_round}" if status.best_round else "the base model, which no round has beaten yet"
        lines.append(Text(f"  best         perplexity {perplexity_text(status.perplexity)}, {round_}"))
    if status.delivered:
        lines.append(Text(f"  delivered    {_listed(status.delivered)}"))
    if status.why:
        lines.append(Text(f"  why          {status.why}"))
    return Group(*lines)


_STYLES = {runs.COMPLETE: "bold green", runs.STOPPED: "bold yellow", runs.FAILED: "bold red", runs.RUNNING: "bold"}


def _for_how_long(since: str, now: datetime | None) -> str:
    try:
        waited = (now - datetime.fromisoformat(since)).total_seconds() if now else 0.0
    except ValueError:
        return ""
    return f", {seconds_text(waited)} so far" if waited >= 1 else ""


def _listed(names: Sequence[str]) -> str:
    """The first names; the tail of a long list becomes a number."""
    shown = ", ".join(names[:_MOST_NAMES])
    return shown if len(names) <= _MOST_NAMES else f"{shown} and {len(names) - _MOST_NAMES} others"


class Screen:
    """What the operator of a run in the foreground sees: lines that stay, and how it stands beneath them.

    In a file or a pipe, where nothing can be taken back, only the lines.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None
        self._live = Live(console=console, refresh_per_second=4, transient=True, get_renderable=self._renderable)

    def __enter__(self) -> Screen:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def line(self, text: Text) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    def show(self, status: Status) -> None:
        self._status = status

    def _renderable(self) -> Group:
        return Group() if self._status is None else told(self._status, datetime.now(UTC))
