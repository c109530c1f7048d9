"""What `prune` takes away, and above all what it leaves."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from common import config_files
from common.config import Config, DataConfig, FileConfig, named
from common.enrolment import Card
from common.errors import ConfigError
from common.secagg.identity import Identity
from server import enrolment, prune, runs, services
from server.enrolment import Settings
from server.home import ServerHome
from server.runs import COMPLETE, FAILED, RUNNING, STOPPED, Run, Status

NAMES = ("alder", "birch", "cedar")
NOW = datetime(2030, 1, 31, tzinfo=UTC)
NONE = timedelta()
KEPT = ("adapter/adapter_model.safetensors", "report.html", "summary.json", "metrics.jsonl", "run.log", "config.yaml")


def card(name: str) -> Card:
    return Card.of(Identity.generate(name), ec.generate_private_key(ec.SECP384R1()).public_key())


@pytest.fixture
def home(tmp_path: Path) -> ServerHome:
    made = ServerHome(tmp_path / "home")
    enrolment.init(made, Settings("oncology", ("127.0.0.1",), 9443, 9092), None, datetime.now(UTC))
    enrolment.enroll(made, [card(name) for name in NAMES], None, datetime.now(UTC))
    return made


def made(home: ServerHome, state: str = COMPLETE, days: float = 3, delivered: tuple[str, ...] = NAMES) -> Run:
    """A run that ended so many days ago."""
    data = DataConfig(generator="", institutions=named(*NAMES), coordinator=FileConfig("/own.jsonl"))
    run = runs.create(home.runs, Config(name="oncology", data=data))
    ended = (NOW - timedelta(days=days)).isoformat(timespec="seconds")
    runs.write_status(run, Status(state, round=3, rounds=3, delivered=delivered, ended=ended))
    for file in KEPT:
        (run.root / file).parent.mkdir(exist_ok=True)
        (run.root / file).write_text("kept")
    run.config.write_text(config_files.to_yaml(Config(name="oncology", data=data)))
    run.checkpoints.mkdir()
    (run.checkpoints / "round-00003.safetensors").write_bytes(b"0" * 1000)
    return run


def database(home: ServerHome) -> list[Path]:
    home.services.mkdir(mode=0o700, exist_ok=True)
    files = [home.services / name for name in ("superlink.db", "superlink.db-shm", "superlink.db-wal")]
    for file in files:
        file.write_bytes(b"0" * 500)
    (home.services / "superexec.secret").write_bytes(b"kept")
    return files


def test_checkpoints_of_complete_runs_go_and_nothing_else_of_them(home: ServerHome) -> None:
    one, other = made(home), made(home)
    found = prune.plan(home, NONE, NOW)
    assert set(found.checkpoints) == {one, other}
    assert found.size == 2000
    assert one.checkpoints.is_dir()
    prune.carry_out(home, found)
    for run in (one, other):
        assert not run.checkpoints.exists()
        assert all((run.root / file).is_file() for file in KEPT)
    again = prune.plan(home, NONE, NOW)
    assert (again.checkpoints, again.kept, again.size) == ((), {}, 0)


@pytest.mark.parametrize(("state", "why"), [(STOPPED, "stopped"), (FAILED, "failed"), (RUNNING, "failed")])
def test_what_can_be_resumed_stays(home: ServerHome, state: str, why: str) -> None:
    run = made(home, state)
    found = prune.plan(home, NONE, NOW)
    assert found.checkpoints == ()
    assert found.kept == {run.name: f"{why}: it can be resumed"}


def test_only_old_ones_go(home: ServerHome) -> None:
    old, young = made(home, days=3), made(home, days=1)
    found = prune.plan(home, timedelta(days=2), NOW)
    assert found.checkpoints == (old,)
    assert found.kept[young.name].startswith("ended 2030-01-30")


def test_an_adapter_that_a_member_has_not_got_can_still_be_handed_out(home: ServerHome) -> None:
    run = made(home, delivered=("alder", "cedar"))
    found = prune.plan(home, NONE, NOW)
    assert found.checkpoints == ()
    assert "birch without its adapter" in found.kept[run.name]
    enrolment.remove(home, "birch", None, datetime.now(UTC))
    assert prune.plan(home, NONE, NOW).checkpoints == (run,)


def test_what_cannot_be_read_stays(home: ServerHome) -> None:
    damaged, older = made(home), made(home)
    damaged.status.write_text("{")
    older.config.write_text("of: another release\n")
    found = prune.plan(home, NONE, NOW)
    assert found.checkpoints == ()
    assert "cannot be read" in found.kept[damaged.name]
    assert "cannot be read any more" in found.kept[older.name]


def test_a_run_that_was_begun_again_meanwhile_stays(home: ServerHome) -> None:
    run = made(home)
    found = prune.plan(home, NONE, NOW)
    with runs.driving(run), pytest.raises(ConfigError, match="nobody drives"):
        prune.carry_out(home, found)
    assert run.checkpoints.is_dir()


def test_the_database_goes_while_nobody_uses_it(home: ServerHome) -> None:
    files = database(home)
    found = prune.plan(home, NONE, NOW)
    assert list(found.database) == files
    assert found.size == 1500
    prune.carry_out(home, found)
    assert not any(file.exists() for file in files)
    assert (home.services / "superexec.secret").exists()


def test_the_database_stays_while_the_services_run(home: ServerHome) -> None:
    files = database(home)
    ahead = prune.plan(home, NONE, NOW)
    with services.alone(home):
        found = prune.plan(home, NONE, NOW)
        assert found.database == ()
        assert "stop them first" in found.kept["superlink.db"]
        with pytest.raises(ConfigError, match="found them running"):
            prune.carry_out(home, ahead)
    assert all(file.exists() for file in files)


def test_the_database_stays_while_a_run_waits_for_services_that_are_away(home: ServerHome) -> None:
    run, _ = made(home, STOPPED), database(home)
    with runs.driving(run):
        found = prune.plan(home, NONE, NOW)
    assert found.database == ()
    assert set(found.kept) == {run.name, "superlink.db"}
    assert replace(found, kept={}).size == 0
