"""The deployment on one machine: every command of the guide, real processes, TLS, secure aggregation."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from client import keys
from client.data_sets import open_data_sets
from client.home import ClientHome
from common.config import Config
from common.config_files import load
from common.errors import ConfigError, RunStopped
from common.records import read_jsonl
from common.splits import SETS
from simulations import loopback

NAMES = ("riverside", "northgate", "lakeside", "summit")
OVERRIDES = (
    f"data.institutions=[{', '.join(NAMES)}]",
    "data.train_records=[24, 24, 24, 24]",
    "data.own_records=20",
    "federation.gather_s=240",
)


def test_the_table_names_the_unit_that_an_epsilon_is_of() -> None:
    ledger = {"units": ["patient"], "spent": {"epsilon": 1.5}, "budget": 8.0}
    adapters = {"summit": {"scores": {"base": None, "federated": None}}}
    shown = loopback.table(loopback.Result({}, adapters, {"summit": 3}, {"summit": ledger}))
    assert shown.columns[-1].header == "epsilon of its budget, by patient"
    assert list(shown.columns[-1].cells) == ["1.5 of 8"]
    assert len(loopback.table(loopback.Result({}, adapters, {"summit": 3})).columns) == len(shown.columns) - 1


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The command's directory, its object and what it told, once for all tests."""
    root = tmp_path_factory.mktemp("loopback") / "federation"
    code = "from simulations.main import main; main()"
    options = ("--out", str(root), "--no-local", "--json")
    done = subprocess.run(
        [sys.executable, "-c", code, "federation", "smoke", *OVERRIDES, *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout), done.stderr


def test_a_federation_of_real_processes_trains_and_publishes(played: tuple[Path, dict[str, Any], str]) -> None:
    _, found, _ = played
    summary = found["summary"]
    assert (summary["rounds_run"], summary["refused"], summary["absences"]) == (2, {}, {})
    assert summary["privacy"]["secure_aggregation"] is True
    assert summary["privacy"]["terms"]["cohort"] == len(NAMES)
    assert set(found["adapters"]) == set(NAMES)
    digests = {scores["adapter"] for scores in found["adapters"].values()}
    assert len(digests) == 1
    for scores in found["adapters"].values():
        assert scores["verified"] is True
        assert scores["run"] == summary["run"]
        assert set(scores["scores"]) == {"base", "federated"}


def test_every_message_that_left_is_in_a_log_that_verifies(played: tuple[Path, dict[str, Any], str]) -> None:
    root, found, _ = played
    place = loopback.Loopback(root, NAMES)
    for name in NAMES:
        lines = [json.loads(line) for file in (place.client(name) / "egress").glob("*.jsonl") for line in file.open()]
        assert len(lines) == found["egress"][name]
        kinds = [line["kind"] for line in lines if line["kind"] != "Introduction"]
        assert kinds == ["Keys", "Shares", "MaskedInput", "Consent", "Revealed"] * 2 + ["Received"]


def texts(file: Path) -> set[str]:
    """Prompts, which are long and somebody's."""
    found = [json.loads(line) for line in file.open()]
    return {record["prompt"] for record in found}


def test_the_coordinator_holds_no_record_of_an_institution(played: tuple[Path, dict[str, Any], str]) -> None:
    root, _, _ = played
    place = loopback.Loopback(root, NAMES)
    kept = b"".join(file.read_bytes() for file in sorted(place.server.rglob("*")) if file.is_file())
    own = texts(place.records("coordinator"))
    assert any(text.encode() in kept for text in own)  # it would be seen
    for name in NAMES:
        others = texts(place.records(name)) - own
        assert len(others) > 40
        assert not [text for text in others if text.encode() in kept]
        assert str(place.client(name)).encode() not in kept


def test_what_is_told_can_be_typed(played: tuple[Path, dict[str, Any], str]) -> None:
    _, _, told = played
    typed = [line[2:] for line in told.splitlines() if line.startswith("$ ")]
    assert [re.sub(r" --home \S+|/\S*/", " ", line).split()[:2] for line in typed].count(["silotune-client", "up"]) == 4
    assert all(line.startswith(("silotune-client ", "silotune-server ")) for line in typed)
    assert not any("passphrase" in line for line in typed)


def test_no_process_is_left_behind(played: tuple[Path, dict[str, Any], str]) -> None:
    root, _, _ = played
    left = [p.info for p in psutil.process_iter(["pid", "cmdline"]) if str(root) in " ".join(p.info["cmdline"] or ())]
    assert left == []


def test_few_persons_are_split_so_that_no_set_is_empty(tmp_path: Path) -> None:
    """The shipped `smoke`: 24 records an institution, which the seed that `init` writes leaves without a test set."""
    config = load("smoke")
    place = loopback.Loopback(tmp_path, config.data.names)
    loopback._write_records(config, place)
    changed = set()
    for name in place.names:
        home, own = ClientHome(place.client(name)), place.records(name)
        keys.init(home, name, None, "", {loopback.DATA_SET: own})
        before = home.data.read_text()
        loopback._split(home.data, read_jsonl(own))
        if home.data.read_text() != before:
            changed.add(name)
        sets = open_data_sets(home.data)
        assert all(sets.find(loopback.DATA_SET, part).records for part in SETS)
    assert changed
    assert changed != set(place.names)  # where the seed will do, the file stays as `init` wrote it


def test_a_directory_with_files_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="expected a new or empty directory"):
        loopback.federate(Config(), tmp_path, print)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_step_that_fails_says_which_and_leaves_no_process(tmp_path: Path) -> None:
    root = tmp_path / "federation"
    told: list[str] = []

    def sabotage(line: str) -> None:
        told.append(line)
        if " up " in line and "riverside" in line:
            (root / "riverside" / "home" / "policy.yaml").write_text("methods: [none]")

    waits = pytest.MonkeyPatch()
    waits.setattr(loopback, "_READY_S", 5.0)
    with waits.context(), pytest.raises(RunStopped, match=r"riverside.*not connected"):
        loopback.federate(load("smoke"), root, sabotage)
    waits.undo()
    left = [p for p in psutil.process_iter(["cmdline"]) if str(root) in " ".join(p.info["cmdline"] or ())]
    assert left == []
