"""The commands for runs as an operator meets them, without services."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

import server.main
from common import config_files
from common.config import Config, DataConfig, FileConfig, named
from common.errors import StorageError
from server import enrolment, runs
from server.enrolment import Settings
from server.home import ServerHome
from server.run_commands import _drive
from server.runs import COMPLETE, FAILED, STOPPED, Run, Status
from tests.server.test_prune import NAMES, card
from tests.server.test_report import ROUNDS, deployed

HOSTILE = ["../x", "..", "/etc/passwd", "a/b", "-rf", "a\nb"]


@pytest.fixture
def home(tmp_path: Path) -> ServerHome:
    made = ServerHome(tmp_path / "home")
    enrolment.init(made, Settings("oncology", ("127.0.0.1",), 9443, 9092), None, datetime.now(UTC))
    enrolment.enroll(made, [card(name) for name in NAMES], None, datetime.now(UTC))
    return made


@pytest.fixture
def command(home: ServerHome) -> Callable[..., Result]:
    def call(*arguments: object) -> Result:
        verb, *words = map(str, arguments)
        words = [verb, "--home", str(home.root), *words]
        return CliRunner().invoke(server.main.app, words, env={"COLUMNS": "200"})

    return call


def told(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refused(result: Result, code: int = 2) -> str:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return re.sub(r"\s+", " ", result.stderr)


def made(home: ServerHome, state: str, **changes: Any) -> Run:
    data = DataConfig(generator="", institutions=named(*NAMES), coordinator=FileConfig("/own.jsonl"))
    config = Config(name="oncology", data=data)
    run = runs.create(home.runs, config)
    runs.write_status(run, Status(state, rounds=20, started=runs.started(run), **changes))
    run.config.write_text(config_files.to_yaml(config))
    return run


Command = Callable[..., Result]


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("verb", ["status", "stop", "logs", "resume"])
def test_a_path_is_the_name_of_no_run(home: ServerHome, command: Command, verb: str, name: str) -> None:
    run = made(home, STOPPED)
    (home.root / "x").mkdir()
    (home.root / "x" / "config.yaml").write_text("")
    said = refused(command(verb, "--", name))
    assert f"expected the name of a run ({run.name})" in said


@pytest.mark.parametrize("verb", ["status", "stop", "logs", "resume"])
def test_an_unknown_run_lists_the_known_ones(home: ServerHome, command: Command, verb: str) -> None:
    assert "there is none yet" in refused(command(verb, "oncology-00000000"))
    names = [made(home, STOPPED).name for _ in range(2)]
    said = refused(command(verb, "oncology-00000000"))
    assert all(name in said for name in names)


@pytest.mark.parametrize("options", [(), ("--detach",), ("--json",)])
def test_without_services_nothing_is_begun(
    home: ServerHome, command: Command, tmp_path: Path, options: tuple[str, ...]
) -> None:
    run = made(home, STOPPED)
    assert "start them: silotune-server up" in refused(command("resume", run.name, *options))
    assert "start them: silotune-server up" in refused(command("run", "deployment", *options))
    assert runs.all_runs(home.runs) == [run]


def test_a_run_that_cannot_be_written_says_how_to_go_on(home: ServerHome) -> None:
    run = made(home, STOPPED)
    run.lock.mkdir()
    with pytest.raises(StorageError, match=rf"go on with: silotune-server resume {run.name}"):
        _drive(home, run, enrolment.identity(home, None), None, False, Console())


def test_a_configuration_with_mistakes_is_refused_before_anything(command: Command) -> None:
    assert "no configuration is called" in refused(command("run", "hospital"))
    assert "federation.rounds: found 0" in refused(command("run", "deployment", "federation.rounds=0"))
    hopeless = ("privacy.mode=patient", "privacy.epsilon=1e-9", "lora.dropout=0", "federation.weighting=uniform")
    assert "cost more than epsilon 1e-09" in refused(command("run", "deployment", *hopeless))


def test_a_coordinator_that_was_never_set_up_is_told_how(tmp_path: Path) -> None:
    for words in (["run", "deployment"], ["status"], ["list"], ["prune"]):
        result = CliRunner().invoke(server.main.app, [*words, "--home", str(tmp_path / "none")])
        assert "silotune-server init" in refused(result)
    assert not (tmp_path / "none").exists()


# --- What is shown ---------------------------------------------------------------------------------------------------


def test_runs_are_listed_with_their_state(home: ServerHome, command: Command) -> None:
    assert "no runs yet" in command("list").output
    assert told(command("list", "--json")) == {"runs": []}
    best = made(home, COMPLETE, round=20, best_round=17, perplexity=4.5)
    failed, damaged = made(home, FAILED, round=3, why="too few"), made(home, STOPPED)
    damaged.status.write_text("{")
    for year, run in enumerate((best, failed, damaged), 2001):
        run.started.write_text(json.dumps({"started": f"{year}-01-01T00:00:00+00:00"}))
    lines = command("list").output.splitlines()
    assert len(lines) == 4
    assert all(word in lines[1] for word in ("complete", "20 of 20", "4.50"))
    assert all(word in lines[2] for word in ("failed", "3 of 20", "–"))
    found = told(command("list", "--json"))["runs"]
    assert [run["state"] for run in found] == ["complete", "failed", "failed"]
    assert found[0]["perplexity"] == 4.5
    assert "cannot be read" in found[2]["why"]


def test_one_run_is_shown_in_detail(home: ServerHome, command: Command) -> None:
    run = made(home, FAILED, round=3, why="too few [red]institutions[/red]", perplexity=4.5, best_round=2)
    run.log.write_text("what happened\n")
    said = command("status", run.name).output
    assert "failed, 3 of 20 rounds" in said
    assert "too few [red]institutions[/red]" in said
    assert f"silotune-server resume {run.name}" in said
    assert str(run.log) in said
    assert told(command("status", run.name, "--json"))["round"] == 3
    assert "what happened" in command("logs", run.name).output
    assert told(command("logs", run.name, "--follow", "--json")) == {"run": run.name, "log": ["what happened"]}


def test_services_and_runs_under_way_are_shown_together(home: ServerHome, command: Command) -> None:
    run = made(home, STOPPED, round=3)
    said = command("status").output
    assert "not running; start them: silotune-server up" in said
    assert "no run is under way" in said
    with runs.driving(run):
        assert f"driven by process {os.getpid()}" in command("status").output
        found = told(command("status", "--json"))
    assert found["services"]["running"] is False
    assert found["services"]["members"] == dict.fromkeys(NAMES, "enrolled")
    assert [under_way["run"] for under_way in found["runs"]] == [run.name]


def test_a_run_that_is_not_driven_needs_no_stop(home: ServerHome, command: Command) -> None:
    run = made(home, STOPPED, why="interrupted")
    assert f"{run.name} was not running" in command("stop", run.name).output
    assert told(command("stop", run.name, "--json"))["state"] == STOPPED


# --- What is written again, and what goes ----------------------------------------------------------------------------


def test_a_report_is_written_of_a_run_by_name_and_of_a_directory(
    home: ServerHome, command: Command, tmp_path: Path
) -> None:
    run = made(home, COMPLETE)
    assert "give the name or the directory of a run that has ended" in refused(command("report", run.name), 5)
    run.summary.write_text(json.dumps(deployed()))
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in ROUNDS))
    found = told(command("report", run.name, "--json"))
    assert found == {"report": str(run.report), "summary": deployed()}
    assert "What this page does not know" in run.report.read_text()
    elsewhere = tmp_path / "page.html"
    assert "The federated model beats the base model." in command("report", run.root, "--out", elsewhere).output
    assert elsewhere.read_text() == run.report.read_text()


def test_what_would_go_is_told_before_it_goes(home: ServerHome, command: Command) -> None:
    run = made(home, COMPLETE, round=20, delivered=NAMES, ended="2020-01-01T00:00:00+00:00")
    run.checkpoints.mkdir()
    (run.checkpoints / "round-00020.safetensors").write_bytes(b"0" * 1000)
    assert told(command("prune", "--dry-run", "--json"))["checkpoints"] == [run.name]
    assert run.checkpoints.is_dir()
    assert told(command("prune", "--older-than", 100_000, "--json"))["checkpoints"] == []
    assert "1.0 kB removed" in command("prune").output
    assert not run.checkpoints.exists()
