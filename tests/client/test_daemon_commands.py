"""What people tell a daemon and ask of it, by the commands they type; none runs here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from typer.testing import CliRunner, Result

import client.main
from client import keys
from client.control import Control
from client.home import ClientHome
from client.status import Status

A, B = "a" * 64, "b" * 64
TERMS: dict[str, Any] = {"data_set": "notes", "base_model": "c" * 64, "method": "fedavg", "rank": 8, "rounds": 5}


def silotune(*arguments: object, said: str | None = None) -> Result:
    return CliRunner().invoke(client.main.app, [str(argument) for argument in arguments], input=said)


def done(*arguments: object, said: str | None = None) -> str:
    result = silotune(*arguments, said=said)
    assert result.exit_code == 0, result.output
    return result.output


def told(*arguments: object) -> dict[str, Any]:
    result = silotune(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refused(*arguments: object, said: str | None = None) -> str:
    result = silotune(*arguments, said=said)
    assert result.exit_code == 2, result.output
    return result.stderr


@pytest.fixture
def home(tmp_path: Path) -> ClientHome:
    found = ClientHome(tmp_path / "alder")
    keys.init(found, "alder", None)
    return found


@pytest.fixture
def control(home: ClientHome) -> Control:
    return Control(home.control)


@pytest.fixture
def ask(home: ClientHome) -> Callable[..., str]:
    """A command of this institution that works."""

    def run(command: str, *arguments: object, said: str | None = None) -> str:
        return done(command, *arguments, "--home", home.root, said=said)

    return run


def test_a_pause_begins_and_ends(home: ClientHome, control: Control, ask: Callable[..., str]) -> None:
    assert "paused" in ask("pause")
    assert control.paused()
    assert "as before" in ask("pause")
    assert told("status", "--home", home.root)["paused"] is True
    assert told("resume", "--home", home.root) == {"paused": False, "changed": True}
    assert told("resume", "--home", home.root) == {"paused": False, "changed": False}
    assert not control.paused()


@pytest.mark.parametrize(
    "command",
    [
        *(["status"], ["pause"], ["resume"], ["leave", "run-1", "--yes"], ["up"], ["runs"], ["report"]),
        *(["approve", "run-1"], ["log", "show"], ["log", "verify"], ["log", "export", "copy.jsonl"]),
        *(["ledger", "show"], ["ledger", "verify"], ["ledger", "export", "copy.jsonl"], ["ledger", "begin", "--yes"]),
        *(["ledger", "forecast", "smoke"], ["adapter", "list"], ["adapter", "evaluate", "run-1"]),
    ],
    ids=" ".join,
)
def test_where_nobody_is_nothing_is_made(tmp_path: Path, command: list[str]) -> None:
    assert "silotune-client init" in refused(*command, "--home", tmp_path / "nobody")
    assert not (tmp_path / "nobody").exists()


def test_a_status_of_what_does_not_run_says_so(home: ClientHome, control: Control, ask: Callable[..., str]) -> None:
    control.ask("run-1", A, TERMS)
    control.write_status(Status("1", 1, 2, "then", 0, "coordinator:9443", "connected", "then", run="run-0", round=3))
    shown = ask("status")
    assert "does not run" in shown
    assert "connected" not in shown  # what it said last is over
    assert "run-1" in shown
    found = told("status", "--home", home.root)
    assert (found["institution"], found["running"], found["waiting"]) == ("alder", False, ["run-1"])
    assert found["egress_entries"] == 0
    assert found["last"]["run"] == "run-0"


def test_a_status_tells_how_many_messages_left(home: ClientHome) -> None:
    from client.egress import EgressLog, Payload

    log = EgressLog(home.egress, keys.load(home, None).identity)
    for _ in range(3):
        log.record("Introduction", Payload.of_bytes(b"x"))
    assert told("status", "--home", home.root)["egress_entries"] == 3


def test_runs_are_listed(home: ClientHome, control: Control, ask: Callable[..., str]) -> None:
    control.ask("asks", A, TERMS)
    file = home.runs / "begun" / "metrics.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text('{"round":1,"void":false,"steps":3,"train_loss":2.25,"validation_perplexity":9.5}\n')
    (file.parent / "settings.json").write_text('{"rounds": 5}')
    (home.adapters / "begun").mkdir(parents=True)
    shown = ask("runs")
    assert "asks" in shown
    assert "waiting" in shown
    assert "1 of 5" in shown
    found = {one["name"]: one for one in told("runs", "--home", home.root)["runs"]}
    assert found["asks"]["waiting"]["terms"] == TERMS
    assert (found["begun"]["state"], found["begun"]["rounds"], found["begun"]["adapter"]) == ("complete", 1, True)


def test_numbers_are_shown_round_by_round(home: ClientHome, ask: Callable[..., str]) -> None:
    file = home.runs / "run-1" / "metrics.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(
        '{"round":1,"void":false,"steps":3,"train_loss":2.25,"validation_perplexity":9.5}\n'
        '{"round":2,"void":true,"steps":3,"train_loss":null,"validation_perplexity":null}\n{"rou'
    )
    shown = ask("report")
    assert "2.2500" in shown
    assert "9.500" in shown
    assert "zeros left instead" in shown
    assert "1 lines cannot be read" in shown
    assert "adapter evaluate" not in shown
    (home.adapters / "run-1").mkdir(parents=True)
    assert "adapter evaluate run-1" in ask("report", "run-1")
    found = told("report", "run-1", "--home", home.root)
    assert [line["validation_perplexity"] for line in found["rounds"]] == [9.5, None]
    assert (found["state"], found["unreadable"]) == ("complete", 1)
    assert "there are: run-1" in refused("report", "run-2", "--home", home.root)


# --- Leaving ----------------------------------------------------------------------------------------------------------


def test_a_run_is_left_when_a_person_says_so(home: ClientHome, control: Control, ask: Callable[..., str]) -> None:
    control.ask("run-1", A, TERMS)
    assert "nothing was changed" in refused("leave", "run-1", "--home", home.root, said="n\n")
    assert not control.has_left("run-1")
    ask("leave", "run-1", said="y\n")
    assert control.has_left("run-1")
    assert control.waiting() == {}
    ask("leave", "run-1")  # nothing to ask
    assert told("leave", "run-2", "--yes", "--home", home.root)["known"] is False
    assert control.has_left("run-2")


@pytest.mark.parametrize("run", ["../up", "a b", ""])
def test_what_is_no_run_cannot_be_left_or_approved(home: ClientHome, run: str) -> None:
    for command in ("leave", "approve"):
        assert "expected the name of a run" in refused(command, run, "--yes", "--home", home.root)


# --- Approving --------------------------------------------------------------------------------------------------------


def test_all_that_a_run_asks_for_is_shown_before_it_is_approved(
    home: ClientHome, control: Control, ask: Callable[..., str]
) -> None:
    control.ask("run-1", A, TERMS)
    shown = silotune("approve", "run-1", "--home", home.root, said="n\n")
    assert shown.exit_code == 2
    for value in ("notes", "c" * 64, "fedavg", "8", "5", A):
        assert value in shown.stdout
    assert not control.approved("run-1", A)
    ask("approve", "run-1", said="y\n")
    assert control.approved("run-1", A)
    assert "already" in ask("approve", "run-1")
    assert told("approve", "run-1", "--home", home.root)["digest"] == A


def test_an_approval_can_be_bound_to_what_was_seen(home: ClientHome, control: Control, ask: Callable[..., str]) -> None:
    control.ask("run-1", A, TERMS)
    assert A in refused("approve", "run-1", "--digest", B, "--home", home.root)
    assert not control.approved("run-1", A)
    ask("approve", "run-1", "--digest", A.upper())
    assert control.approved("run-1", A)
    assert "expected a run that waits" in refused("approve", "run-1", "--digest", B, "--home", home.root)


def test_what_changes_while_a_person_reads_is_not_approved(
    home: ClientHome, control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    control.ask("run-1", A, TERMS)

    def reads(*_: object, **__: object) -> bool:
        control.ask("run-1", B, {**TERMS, "rank": 64})
        return True

    monkeypatch.setattr(typer, "confirm", reads)
    assert silotune("approve", "run-1", "--home", home.root).exit_code == 0
    assert control.approved("run-1", A)
    assert not control.approved("run-1", B)
    assert control.waiting()["run-1"].digest == B


def test_nobody_at_the_terminal_is_no_yes(home: ClientHome, control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    control.ask("run-1", A, TERMS)

    def nobody(*_: object, **__: object) -> bool:
        raise click.Abort

    monkeypatch.setattr(typer, "confirm", nobody)
    for command in ("approve", "leave"):
        assert silotune(command, "run-1", "--home", home.root).exit_code == 2
    assert not control.approved("run-1", A)
    assert not control.has_left("run-1")


def test_a_coordinator_writes_nothing_on_the_terminal_but_words(home: ClientHome, control: Control) -> None:
    control.ask("run-1", A, {"met\x1b[2Jhod": "\x1b]0;owned\x07[red]fed\navg\u202e"})
    shown = silotune("approve", "run-1", "--yes", "--home", home.root).stdout
    assert not set(shown) & {"\x1b", "\x07", "\u202e"}
    assert "[red]" in shown


def test_a_run_that_does_not_wait_is_told_with_those_that_do(home: ClientHome, control: Control) -> None:
    control.ask("run-1", A, TERMS)
    assert "there are: run-1" in refused("approve", "run-2", "--yes", "--home", home.root)
