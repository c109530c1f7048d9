"""`silotune-client ledger` as a person meets it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from client import keys
from client.home import ClientHome
from client.keys import Keys
from client.ledger import Ledger, Spend
from client.ledger_commands import ledger as commands
from client.policy_file import read
from common import cli
from common.privacy.accounting import Event, epsilon
from common.secagg.identity import Identity

app = cli.application("test")
app.add_typer(commands, name="ledger")

POLICY = """\
data_sets: [notes, letters, scans]
populations:
  clinic: {data_sets: [notes, letters], modes: [patient], epsilon: 6.0, delta: 1.0e-5}
"""
STEP = Spend("gaussian", 8.0, 1.0, 2, "patient", "[b]first", 1, 1, "notes")
FILE = "ledger-000000000001.jsonl"
CONFIG = (
    "deployment",
    "data.name=notes",
    "data.coordinator.path=here.jsonl",
    "privacy.mode=patient",
    "privacy.noise_multiplier=2",
    "federation.weighting=uniform",
    "lora.dropout=0",
    "train.passes_per_round=1",
    "federation.rounds=12",
)


def call(*arguments: object, said: str = "") -> Result:
    return CliRunner().invoke(app, ["ledger", *map(str, arguments)], input=said)


def told(*arguments: object) -> dict[str, Any]:
    shown = call(*arguments, "--json")
    assert shown.exit_code == 0, shown.output
    found: dict[str, Any] = json.loads(shown.stdout)
    return found


def words(result: Result) -> str:
    return " ".join(result.output.split())


@pytest.fixture
def enrolled(tmp_path: Path) -> tuple[ClientHome, Keys]:
    home = ClientHome.at(tmp_path / "home")
    keys.init(home, "alder", None)
    home.policy.write_text(POLICY)
    return home, keys.load(home, None)


@pytest.fixture
def home(enrolled: tuple[ClientHome, Keys]) -> ClientHome:
    """With a ledger in which three rounds were spent on notes, and one on scans."""
    found, own = enrolled
    ledger = Ledger(found.ledger, own.identity)
    ledger.begin()
    policy = read(found.policy)
    for number in (1, 2, 3):
        ledger.spend(policy.population_of("notes"), replace(STEP, round=number))
    ledger.spend(policy.population_of("scans"), replace(STEP, data_set="scans", unit="record"))
    return found


# --- show


def test_show_tells_what_is_spent_and_left(home: ClientHome) -> None:
    found = told("show", "--home", home.root)
    clinic, scans = found["populations"]
    spent = epsilon([Event("gaussian", 8.0, 1.0, 6)], 1e-5)
    bounds = {"epsilon": spent.bound, "prv": spent.prv, "rdp": spent.rdp}
    assert (clinic["population"], clinic["data_sets"], clinic["budget"]) == ("clinic", ["notes", "letters"], 6.0)
    assert (clinic["spent"], clinic["left"]) == (bounds, 6.0 - spent.bound)
    assert clinic["runs"] == [{"run": "[b]first", "rounds": 3, "updates": 3, "steps": 6, **bounds}]
    assert [point["round"] for point in clinic["over_rounds"]] == [1, 2, 3]
    assert (scans["population"], scans["budget"], scans["left"], scans["units"]) == ("scans", None, None, ["record"])
    shown = call("show", "--home", home.root)
    assert shown.exit_code == 0
    for text in (
        f"epsilon {spent.bound:.4g} of 6, {6 - spent.bound:.4g} left",
        "without limit",
        "[b]first",
        f"{spent.rdp:.4g}",
    ):
        assert text in words(shown)
    assert len(told("show", "--points", 1, "--home", home.root)["populations"][0]["over_rounds"]) == 1


def test_show_says_where_each_delta_is_from(home: ClientHome) -> None:
    found = told("show", "--home", home.root)["populations"]
    assert [(one["delta"], one["delta_from"]) for one in found] == [(1e-5, "budget"), (1e-5, "default")]
    shown = words(call("show", "--home", home.root))
    for whence in ("its budget's", "no budget says another"):
        assert f"at delta 1e-05 ({whence})" in shown


def test_show_names_the_populations_whose_spends_count_too(home: ClientHome) -> None:
    assert [one["also_counted"] for one in told("show", "--home", home.root)["populations"]] == [[], []]
    home.policy.write_text(POLICY.replace("clinic", "ward").replace("[notes, letters]", "[letters]"))
    ward = told("show", "--home", home.root)["populations"][0]
    assert (ward["population"], ward["updates"], ward["also_counted"]) == ("ward", 3, ["clinic"])
    assert "what was spent as clinic" in words(call("show", "--home", home.root))


# --- A ledger that is not as it was left


def edited(file: Path, old: bytes, new: bytes) -> None:
    assert old in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(old, new))


def without_lines(home: ClientHome, *numbers: int) -> None:
    lines = (home.ledger / FILE).read_bytes().splitlines(keepends=True)
    (home.ledger / FILE).write_bytes(b"".join(line for number, line in enumerate(lines, 1) if number not in numbers))


SPOILT: dict[str, Callable[[ClientHome], object]] = {
    "no entries": lambda home: (home.ledger / FILE).unlink(),
    "an empty file": lambda home: (home.ledger / FILE).write_bytes(b""),
    "the last entries are gone": lambda home: without_lines(home, 5, 6),
    "an entry in the middle is gone": lambda home: without_lines(home, 3),
    "a changed number": lambda home: edited(home.ledger / FILE, b'"steps":2', b'"steps":1'),
    "a line that is none": lambda home: (home.ledger / FILE).write_bytes((home.ledger / FILE).read_bytes() + b"{}\n"),
    "an empty head": lambda home: (home.ledger / "head.json").write_bytes(b""),
    "another head": lambda home: (home.ledger / "head.json").write_bytes(b'{"x":1}\n'),
    "no head": lambda home: (home.ledger / "head.json").unlink(),
}


@pytest.mark.parametrize("command", [["show"], ["show", "--json"], ["forecast", *CONFIG]])
@pytest.mark.parametrize("spoil", SPOILT.values(), ids=list(SPOILT))
def test_of_a_ledger_that_is_not_as_it_was_left_no_number_is_told(
    home: ClientHome, spoil: Callable[[ClientHome], object], command: list[str]
) -> None:
    spoil(home)
    shown = call(*command, "--home", home.root)
    assert (shown.exit_code, shown.stdout) == (5, "")
    for text in ("is not as it was left", "nothing may be spent", "`silotune-client ledger verify`", "from a copy"):
        assert text in words(shown)


def test_a_ledger_that_another_identity_signed_counts_for_nothing(home: ClientHome, tmp_path: Path) -> None:
    other = Ledger(tmp_path / "other", Identity.generate("alder"))
    other.begin()
    shutil.rmtree(home.ledger)
    shutil.copytree(tmp_path / "other", home.ledger)
    assert call("show", "--home", home.root).exit_code == 5


def test_what_a_crash_leaves_is_no_alarm_and_an_entry_that_was_written_counts(
    home: ClientHome, enrolled: tuple[ClientHome, Keys]
) -> None:
    before = (home.ledger / "head.json").read_bytes()
    Ledger(home.ledger, enrolled[1].identity).spend(read(home.policy).population_of("notes"), replace(STEP, round=4))
    (home.ledger / "head.json").write_bytes(before)  # killed before the head was written
    for _ in range(2):
        assert told("show", "--home", home.root)["populations"][0]["updates"] == 4
        assert told("forecast", *CONFIG, "--home", home.root)["populations"]
        file = home.ledger / FILE
        file.write_bytes(file.read_bytes() + b'{"number":8')  # killed while it wrote


def test_a_ledger_that_has_only_begun_is_whole(enrolled: tuple[ClientHome, Keys]) -> None:
    (clinic,) = told("show", "--home", enrolled[0].root)["populations"]
    assert (clinic["updates"], clinic["left"]) == (0, 6.0)


@pytest.mark.parametrize("lose", [shutil.rmtree, lambda ledger: (ledger / "head.json").unlink()], ids=["all", "head"])
def test_one_that_is_missing_is_told_as_check_tells_it(
    enrolled: tuple[ClientHome, Keys], tmp_path: Path, lose: Callable[[Path], object]
) -> None:
    home, _ = enrolled
    lose(home.ledger)
    for command in (["show"], ["forecast", *CONFIG], ["verify"], ["export", tmp_path / "file"]):
        shown = call(*command, "--home", home.root)
        assert (shown.exit_code, shown.stdout) == (5, "")
        assert f"{home.ledger}: expected the privacy ledger, found none; nothing may be spent without it" in words(
            shown
        )
        assert "restore it from a copy" in words(shown)
    assert not (tmp_path / "file").exists()


def test_a_copy_that_is_not_there_is_asked_for(home: ClientHome, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "nowhere"):
        shown = call("verify", place, "--home", home.root)
        assert shown.exit_code == 5
        assert "give the privacy ledger's directory or an export of it" in words(shown)


# --- forecast


def test_forecast_tells_how_many_rounds_still_fit(home: ClientHome) -> None:
    found = told("forecast", *CONFIG, "--home", home.root)
    assert (found["mode"], found["data_set"], found["rounds"]) == ("patient", "notes", 12)
    clinic, scans = found["populations"]
    assert clinic["round"] == {"mechanism": "gaussian", "sigma": 2.0, "q": 0.1, "steps": 10}
    assert clinic["asked"]
    left = clinic["rounds_left"]
    past = Event("gaussian", 8.0, 1.0, 6)
    costs = [epsilon([past, Event("gaussian", 2.0, 0.1, 10 * n)], 1e-5).bound for n in (left, left + 1)]
    assert costs[0] <= 6.0 < costs[1]
    assert clinic["fits"] == (left >= 12)
    assert (scans["rounds_left"], scans["fits"]) == (None, True)
    shown = call("forecast", *CONFIG, "--home", home.root)
    assert f"{left} rounds of a budget of 6 by patient;" in words(shown)
    assert (clinic["units"], scans["units"]) == (["patient"], ["patient", "record"])
    both = [f"with 12 rounds of this {one['after_run']['epsilon']:.4g}" for one in (clinic, scans)]
    assert f"{both[0]}, by patient left" in words(shown)
    assert f"{both[1]}, by patient and record left without limit" in words(shown)
    assert "10 steps at sampling rate 0.1 with noise multiplier 2" in words(shown)
    long = told("forecast", *CONFIG, f"federation.rounds={left + 1}", "--home", home.root)
    assert not long["populations"][0]["fits"]


def test_forecast_without_a_budget_is_at_the_configurations_delta(home: ClientHome) -> None:
    command = ("forecast", *CONFIG, "privacy.delta=1e-7", "--home", home.root)
    clinic, scans = told(*command)["populations"]
    assert [(one["delta"], one["delta_from"]) for one in (clinic, scans)] == [
        (1e-5, "budget"),
        (1e-7, "configuration"),
    ]
    past = Event("gaussian", 8.0, 1.0, 2)
    run = Event("gaussian", 2.0, 0.1, 120)
    assert scans["spent"]["epsilon"] == epsilon([past], 1e-7).bound
    assert scans["after_run"]["epsilon"] == epsilon([past, run], 1e-7).bound
    shown = words(call(*command))
    assert "at delta 1e-05 (its budget's), with 12 rounds" in shown
    assert "at delta 1e-07 (the configuration's), with 12 rounds" in shown


def test_forecast_says_what_is_refused(home: ClientHome) -> None:
    clinic, scans = told("forecast", *CONFIG, "privacy.mode=record", "--home", home.root)["populations"]
    assert (clinic["allowed"], clinic["fits"], clinic["rounds_left"]) == (False, False, 0)
    assert scans["fits"]
    assert (clinic["units"], scans["units"]) == (["patient", "record"], ["record"])
    plain = (*CONFIG, "privacy.mode=none", "privacy.noise_multiplier=0")
    without = told("forecast", *plain, "--home", home.root)["populations"]
    assert [one["units"] for one in without] == [["patient"], ["record"]]
    shown = call("forecast", *plain, "data.name=elsewhere", "--home", home.root)
    for text in ("mode none; the policy allows patient", "protects nobody", "allows no data set elsewhere"):
        assert text in words(shown)
    wrong = call("forecast", *CONFIG, "privacy.sampling_rate=2", "--home", home.root)
    assert wrong.exit_code == 2


# --- verify and export


def test_a_ledger_and_its_export_are_verified(home: ClientHome, tmp_path: Path) -> None:
    found = told("verify", "--home", home.root)
    assert (found["whole"], found["entries"], found["finding"]) == (True, 6, None)
    assert "6 entries, all as they were written" in words(call("verify", "--home", home.root))
    file = tmp_path / "ledger.jsonl"
    assert told("export", file, "--home", home.root) == {"entries": 6, "file": str(file)}
    away = tmp_path / "away"
    assert told("verify", file, "--home", away, "--public-key", found["public_key"])["entries"] == 6
    assert "proves nothing by itself" in words(call("verify", file, "--home", away))
    assert not away.exists()
    assert call("export", file, "--home", home.root).exit_code == 5


def test_an_export_that_cannot_be_written_speaks_of_no_run(home: ClientHome) -> None:
    shown = call("export", "/dev/full/ledger", "--home", home.root)
    assert shown.exit_code == 5
    assert "A file stands where a directory is needed: choose another place" in words(shown)
    assert "resume" not in words(shown)


def test_the_first_altered_entry_is_named_and_the_exit_code_is_5(home: ClientHome) -> None:
    file = home.ledger / FILE
    file.write_bytes(file.read_bytes().replace(b'"round":2', b'"round":3'))
    shown = call("verify", "--home", home.root, "--json")
    assert shown.exit_code == 5
    assert json.loads(shown.stdout)["finding"]["entry"] == 3
    assert f"{FILE}:3: entry 3 was altered" in shown.stderr
    assert "the 2 entries before are whole" in shown.stderr


# --- begin


def test_a_ledger_is_begun_after_a_yes_and_never_over_one(enrolled: tuple[ClientHome, Keys]) -> None:
    home, own = enrolled
    shutil.rmtree(home.ledger)
    assert call("begin", "--home", home.root, said="n\n").exit_code == 2
    assert not (home.ledger / "head.json").exists()
    assert call("begin", "--home", home.root, said="y\n").exit_code == 0
    Ledger(home.ledger, own.identity).spend(read(home.policy).population_of("notes"), STEP)
    assert told("begin", "--home", home.root) == {"entries": 2, "directory": str(home.ledger)}


def test_of_a_ledger_that_was_lost_in_part_none_is_begun(home: ClientHome) -> None:
    (home.ledger / "head.json").unlink()
    shown = call("begin", "--yes", "--home", home.root)
    assert shown.exit_code == 5
    assert "restore it from a copy" in words(shown)
