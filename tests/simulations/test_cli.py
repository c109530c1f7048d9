"""The commands as a person meets them: help at once, errors in plain words, exit codes, clean JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner, Result

import client.main
import server.main
import simulations
import simulations.main
from common import cli
from common.config import Config
from common.errors import ConfigError, DataError, ModelError, Refusal, RunStopped, SilotuneError, StorageError
from common.files import append_line
from simulations.arguments import resumable

COMMANDS = [
    ("simulations", []),
    ("simulations", ["run"]),
    ("simulations", ["federation"]),
    ("simulations", ["check"]),
    ("simulations", ["tune"]),
    ("simulations", ["data"]),
    ("simulations", ["pretrain"]),
    ("simulations", ["bench"]),
    ("simulations", ["bench", "scale"]),
    ("simulations", ["bench", "secagg"]),
    ("simulations", ["bench", "trainer"]),
    ("simulations", ["bench", "privacy"]),
    ("simulations", ["attack"]),
    *(("simulations", ["attack", name]) for name in ("canary", "membership", "coordinator", "extraction")),
    ("server", []),
    *(("server", [name]) for name in ("init", "renew", "enroll", "roster", "remove", "up")),
    *(("server", [name]) for name in ("run", "resume", "status", "list", "stop", "logs", "report", "prune")),
    ("client", []),
    *(("client", [name]) for name in ("init", "card", "trust", "data", "fingerprint", "log")),
    *(("client", ["log", name]) for name in ("show", "verify", "export")),
    ("client", ["ledger"]),
    *(("client", ["ledger", name]) for name in ("show", "forecast", "verify", "export", "begin")),
    *(("client", [name]) for name in ("up", "status", "pause", "resume", "runs", "leave", "report", "approve")),
    ("client", ["check"]),
    ("client", ["adapter"]),
    *(("client", ["adapter", name]) for name in ("list", "export", "evaluate")),
]
HEAVY = ["torch", "transformers", "flwr", "ray", "peft", "datasets", "omegaconf", "numpy", "jinja2"]


def call(app: typer.Typer, *arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def sim(*arguments: str) -> Result:
    return call(simulations.main.app, *arguments)


# --- Help


def commands(apps: Mapping[str, typer.Typer]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every command of every application, and those of its groups."""
    for name, app in apps.items():
        yield from (
            (name, (found.name or found.callback.__name__,)) for found in app.registered_commands if found.callback
        )
        for group in app.registered_groups:
            assert group.name
            assert group.typer_instance
            yield name, (group.name,)
            yield from ((name, (group.name, *path)) for _, path in commands({name: group.typer_instance}))


def test_every_command_is_tested() -> None:
    apps = {"simulations": simulations.main.app, "server": server.main.app, "client": client.main.app}
    assert set(commands(apps)) == {(name, tuple(arguments)) for name, arguments in COMMANDS if arguments}


@pytest.mark.parametrize(("package", "arguments"), COMMANDS, ids=lambda value: " ".join(value))
def test_help_imports_nothing_heavy(package: str, arguments: list[str]) -> None:
    code = (
        f"import sys; from {package}.main import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code\n"
        f"print('heavy:', *sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)"
    )
    root = Path(simulations.main.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--help"], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "heavy:"
    assert "Usage:" in done.stdout


@pytest.mark.parametrize("app", [simulations.main.app, server.main.app, client.main.app])
def test_help_tells_the_exit_codes_and_version_the_version(app: typer.Typer) -> None:
    text = " ".join(call(app, "--help").stdout.split())
    for code in (*cli.EXIT_CODES.values(), cli.INTERRUPTED):
        assert f" {code} " in text
    shown = call(app, "--version")
    assert shown.exit_code == 0
    assert shown.stdout.startswith("silotune 0.")


def test_arguments_are_explained() -> None:
    assert "A shipped configuration" in sim("run", "--help").stdout


# --- Errors


class Unforeseen(SilotuneError):
    pass


class Full(StorageError):
    pass


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("c"), 2),
        (DataError("d"), 3),
        (ModelError("m"), 4),
        (StorageError("s"), 5),
        (Full("f"), 5),
        (RunStopped("r"), 6),
        (Refusal("policy", "p"), 1),
        (Unforeseen("u"), 1),
    ],
)
def test_an_error_is_told_without_a_trace_and_ends_with_its_code(error: SilotuneError, code: int) -> None:
    app = cli.application("test")

    @app.command()
    def fail() -> None:
        raise error

    result = call(app, "fail")
    assert result.exit_code == code
    assert result.stderr == f"error: {error}\n"
    assert result.stdout == ""


def test_messages_are_shown_as_they_are() -> None:
    app = cli.application("test")
    message = "[bold]data[/] " + "long " * 60 + "[/nope]"

    @app.command()
    def fail() -> None:
        raise DataError(message)

    assert call(app, "fail").stderr == f"error: {message}\n"


def test_ctrl_c_ends_with_130() -> None:
    app = cli.application("test")

    @app.command()
    def wait() -> None:
        raise KeyboardInterrupt

    result = call(app, "wait")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["run"], 2, "name a configuration"),
        (["run", "--resume", "somewhere", "hospitals"], 2, "stands alone"),
        (["run", "--resume", "somewhere", "--out", "elsewhere"], 2, "stands alone"),
        (["run", "hospital"], 2, "did you mean hospitals?"),
        (["run", "hospitals", "train.lr=1"], 2, "train.learning_rate"),
        (["run", "hospitals", "federation.method=flora"], 2, "which secure aggregation hides"),
        (["run", "smoke", "federation.min_cohort=2"], 2, "secure_aggregation.enabled=false"),
        (["tune", "smoke", "lora.rank=0"], 2, "lora.rank: found 0"),
        (["data", "smoke", "train.proximal=-1e-3", "--out", "out"], 2, "train.proximal: found -0.001"),
        (["data", "smoke", "odd", "=", "a=b=c", "--out", "out"], 2, "override 'odd'"),
        (["data", "smoke", "data.directory=here", "--out", "out"], 2, "nothing to generate"),
        (["data", "smoke"], 2, "--out"),
        (["pretrain", "--steps", "0"], 2, "--steps"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    arguments: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = sim(*arguments)
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


# --- data


def test_data_writes_what_the_client_reads(tmp_path: Path) -> None:
    out = tmp_path / "records"
    result = sim("data", "smoke", "data.seed=5", "--out", str(out), "--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert list(told["institutions"]) == ["riverside", "northgate", "lakeside"]
    assert all(row["train"] == 16 for row in told["institutions"].values())
    assert told["coordinator"]["test"] == 12

    files = sorted(str(file) for file in (out / "riverside").glob("*.jsonl"))
    read = json.loads(call(client.main.app, "data", *files, "--json").stdout)
    assert [read["files"][file]["records"] for file in files] == [4, 16, 4]
    assert read["people_in_several_files"] == 0


def test_data_beside_a_file_of_that_name_says_what_is_in_the_way(tmp_path: Path) -> None:
    file = tmp_path / "alder.jsonl"
    file.write_text("{}\n")
    result = sim("data", "smoke", "--out", str(file))
    assert result.exit_code == 5
    assert "A file stands where a directory is needed: choose another place" in result.stderr
    assert not {"resume", "round"} & set(re.findall(r"\w+", result.stderr.partition("Not a directory")[2]))
    assert file.read_text() == "{}\n"


def test_data_prints_a_table_of_counts(tmp_path: Path) -> None:
    result = sim("data", "smoke", "--out", str(tmp_path))
    assert "northgate" in result.stdout
    assert "coordinator" in result.stdout


@pytest.mark.parametrize(
    ("content", "said"), [(None, "nowhere.jsonl"), ("", "at least one record"), ('{"prompt": 1', "nowhere.jsonl:1")]
)
def test_the_client_names_file_and_line_of_what_it_cannot_read(content: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "nowhere.jsonl"
    if content is not None:
        file.write_text(content)
    result = call(client.main.app, "data", str(file))
    assert result.exit_code == 3
    assert said in result.stderr


# --- report


SUMMARY: dict[str, Any] = {
    "name": "hospitals", "method": "fedavg", "seed": 7, "rounds_run": 0, "rounds_planned": 3, "best_round": 0,
    "stopped_early": False, "institutions": ["riverside"], "refused": {},
    "everyone": {name: {"perplexity": 9.5, "accuracy": None} for name in ("base", "federated")},
    "own": {"riverside": {name: {"perplexity": 8.5, "accuracy": None} for name in ("base", "federated")}},
    "gap_closed": None, "bytes_per_client_round": {"up": 10, "down": 20},
    "parameters": {"base": 100, "adapter": 10}, "void_updates": 0,
    "seconds": {"train": 1.0, "aggregate": 0.4, "evaluate": 2.0, "total": 4.0},
    "privacy": {"secure_aggregation": False, "mode": "none"},
    "base_model": {"name": "embedded", "config": "3f" * 32, "weights": "a9" * 32, "tokenizer": "0c" * 32},
    "versions": {"silotune": "0.1.0"}, "started": "2026-11-23T18:00:00+00:00",
}  # fmt: skip


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "config.yaml").write_text("name: hospitals\n")
    return tmp_path


def report(*arguments: str | Path) -> Result:
    return call(server.main.app, "report", *map(str, arguments))


def test_report_writes_the_page_and_prints_the_tables(finished: Path) -> None:
    result = report(finished)
    assert result.exit_code == 0
    assert "riverside" in result.stdout
    assert "riverside" in (finished / "report.html").read_text()


def test_report_of_what_is_no_run_and_no_directory_lists_the_runs(tmp_path: Path) -> None:
    for name in ("nosuch", str(tmp_path / "nowhere")):
        result = report(name, "--home", tmp_path / "home")
        assert result.exit_code == 2
        assert (
            "expected the name of a run (there is none yet) or the directory of a finished simulation" in result.stderr
        )
    assert list(tmp_path.iterdir()) == []


def test_report_goes_where_it_is_told(finished: Path) -> None:
    page = finished / "other.html"
    result = report(finished, "--out", page, "--json")
    assert json.loads(result.stdout) == {"report": str(page), "summary": SUMMARY}
    assert page.is_file()
    assert not (finished / "report.html").exists()


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("summary.json", None, "a run that has ended"),
        ("summary.json", "{", "summary.json: not JSON"),
        ("summary.json", "{}", "everyone"),
        ("metrics.jsonl", "{}\n[1]\n", "metrics.jsonl:2: expected a JSON object, found list"),
        ("config.yaml", None, "config.yaml"),
    ],
)
def test_report_names_what_it_cannot_read(file: str, content: str | None, said: str, finished: Path) -> None:
    (finished / file).unlink()
    if content is not None:
        (finished / file).write_text(content)
    result = report(finished)
    assert result.exit_code == 5
    assert said in result.stderr
    assert "[Errno" not in result.stderr
    assert not (finished / "report.html").exists()


# --- run, on an engine of the test's own


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Puts an engine in place of the real one that prints, then returns or raises what it is told; lists its calls."""

    def install(result: dict[str, Any] | BaseException) -> list[Any]:
        calls: list[Any] = []

        def act(*arguments: Any) -> dict[str, Any]:
            calls.append(arguments)
            *_, directory, console = arguments
            console.print("progress")
            print("noise of a library")
            if isinstance(result, BaseException):
                directory.mkdir()
                (directory / "config.yaml").touch()
                raise result
            return result

        stand_in = ModuleType("simulations.run")
        stand_in.run = stand_in.resume = act  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "simulations.run", stand_in)
        monkeypatch.setattr(simulations, "run", stand_in, raising=False)
        return calls

    return install


def test_run_hands_on_the_configuration_and_a_directory_of_its_name(engine: Callable[..., list[Any]]) -> None:
    calls = engine({})
    assert sim("run", "hospitals", "train.batch_size=3").exit_code == 0
    ((config, directory, console),) = calls
    assert isinstance(config, Config)
    assert config.train.batch_size == 3
    assert directory.parent == Path("runs")
    assert directory.name.startswith("hospitals-2")
    assert isinstance(console, Console)


def test_options_may_stand_among_the_overrides(engine: Callable[..., list[Any]], tmp_path: Path) -> None:
    calls = engine({})
    assert sim("run", "hospitals", "seed=3", "--out", str(tmp_path), "train.batch_size=3").exit_code == 0
    ((config, directory, _),) = calls
    assert (config.seed, config.train.batch_size, directory) == (3, 3, tmp_path)


def test_resume_needs_the_directory_alone(engine: Callable[..., list[Any]], tmp_path: Path) -> None:
    calls = engine({})
    assert sim("run", "--resume", str(tmp_path)).exit_code == 0
    assert [arguments[0] for arguments in calls] == [tmp_path]


def test_with_json_stdout_holds_the_result_and_nothing_else(engine: Callable[..., list[Any]]) -> None:
    engine({"gap_closed": 0.5})
    result = sim("run", "hospitals", "--json")
    assert json.loads(result.stdout) == {"gap_closed": 0.5}
    assert "progress" in result.stderr
    assert "noise" in result.stderr


def test_without_json_progress_goes_to_stdout(engine: Callable[..., list[Any]]) -> None:
    engine({"gap_closed": 0.5})
    result = sim("run", "hospitals")
    assert "progress" in result.stdout
    assert "gap_closed" not in result.stdout


def test_ctrl_c_says_how_to_go_on(engine: Callable[..., list[Any]], tmp_path: Path) -> None:
    engine(KeyboardInterrupt())
    out = tmp_path / "my run"
    result = sim("run", "hospitals", "--out", str(out))
    assert result.exit_code == 130
    assert f"silotune-sim run --resume '{out}'" in result.stderr


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_that_cannot_be_written_says_how_to_go_on_where_it_has_begun(begun: bool, tmp_path: Path) -> None:
    if begun:
        (tmp_path / "config.yaml").touch()
    with pytest.raises(StorageError) as caught, resumable(tmp_path, "run", "--resume", str(tmp_path)):
        append_line(Path("/dev/full"), "line")
    assert "Free space" in str(caught.value)
    assert (f"go on with: silotune-sim run --resume {tmp_path}" in str(caught.value)) == begun


def test_a_run_that_stops_says_why(engine: Callable[..., list[Any]], tmp_path: Path) -> None:
    engine(RunStopped("all institutions were void"))
    result = sim("run", "hospitals", "--out", str(tmp_path / "out"))
    assert result.exit_code == 6
    assert result.stderr == "error: all institutions were void\n"
