"""`silotune-client log` as a person meets it: what is shown, what is found, and how it ends."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner, Result

from client.egress import EgressLog, Payload
from client.home import VARIABLE, ClientHome
from client.main import app
from common.enrolment import Card
from common.private_files import write_private_json
from common.secagg.identity import Identity

NOW = datetime(2030, 1, 31, 12, tzinfo=UTC)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["log", *map(str, arguments)])


def said(result: Result) -> str:
    return " ".join(result.output.split())


@pytest.fixture
def identity() -> Identity:
    return Identity.generate("alder")


@pytest.fixture
def home(tmp_path: Path, identity: Identity) -> ClientHome:
    """An institution's home with a card and a log of five messages, of two runs."""
    found = ClientHome.at(tmp_path / "home")
    log = EgressLog(found.egress, identity, clock=lambda: NOW)
    for number, (kind, run) in enumerate([("Introduction", ""), *[("Keys", "first"), ("Refused", "[b]two")] * 2]):
        log.record(kind, Payload.of_bytes(b"x" * number), run, round_number=number, epsilon=number / 4)
    node = ec.generate_private_key(ec.SECP384R1()).public_key()
    write_private_json(found.card, Card.of(identity, node).to_json())
    return found


def log_file(home: ClientHome) -> Path:
    return home.egress / "egress-000000000001.jsonl"


# --- show


def test_show_tells_what_left(home: ClientHome) -> None:
    shown = call("show", "--home", home.root)
    assert shown.exit_code == 0
    rows = [line.split() for line in shown.stdout.splitlines() if "2030-01-31" in line]
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5"]
    assert rows[1][3:6] == ["Keys", "first", "1"]
    assert "[b]two" in shown.stdout
    assert "0.75" in shown.stdout
    assert "unit that `silotune-client ledger show` names" in said(shown)
    free = said(call("show", "--run", "", "--home", home.root))  # only what spent nothing
    assert ("Introduction" in free, "ledger show" in free) == (True, False)


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ([], [1, 2, 3, 4, 5]),
        (["--run", "first"], [2, 4]),
        (["--last", "2"], [4, 5]),
        (["--run", "first", "--last", "1"], [4]),
        (["--run", "nobody's"], []),
        (["--last", "9"], [1, 2, 3, 4, 5]),
    ],
)
def test_show_can_be_asked_for_a_part(options: list[str], numbers: list[int], home: ClientHome) -> None:
    shown = call("show", "--home", home.root, "--json", *options)
    found = json.loads(shown.stdout)
    assert [entry["number"] for entry in found["entries"]] == numbers
    assert found["unreadable"] == 0
    if numbers:
        lines = log_file(home).read_bytes().splitlines()
        assert found["entries"] == [json.loads(lines[number - 1]) for number in numbers]


def test_show_says_that_lines_are_no_entries(home: ClientHome) -> None:
    with log_file(home).open("ab") as handle:
        handle.write(b"{}\nsomething")
    assert "2 lines are no entries; see `silotune-client log verify`" in call("show", "--home", home.root).stdout
    assert json.loads(call("show", "--home", home.root, "--json").stdout)["unreadable"] == 2


def test_the_home_may_stand_in_the_environment(home: ClientHome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(home.root))
    assert len(json.loads(call("show", "--json").stdout)["entries"]) == 5


@pytest.mark.parametrize("directory", [False, True])
def test_before_anything_left_that_is_what_is_told(home: ClientHome, tmp_path: Path, directory: bool) -> None:
    shutil.rmtree(home.egress)
    if directory:
        home.egress.mkdir(0o700)
    for command in ("show", "verify"):
        shown = call(command, "--home", home.root)
        assert (shown.exit_code, said(shown)) == (0, "nothing has left yet")
    assert json.loads(call("show", "--home", home.root, "--json").stdout) == {"entries": [], "unreadable": 0}
    found = json.loads(call("verify", "--home", home.root, "--json").stdout)
    assert (found["whole"], found["entries"], found["last"], found["finding"]) == (True, 0, None, None)
    written = call("export", tmp_path / "file", "--home", home.root)
    assert written.exit_code == 5  # who reads the file afterwards must not find none in silence
    assert "nothing has left yet, and a log begins with `silotune-client up`" in said(written)
    assert not (tmp_path / "file").exists()


def test_a_log_that_has_only_begun_is_shown_verified_and_exported(
    home: ClientHome, identity: Identity, tmp_path: Path
) -> None:
    shutil.rmtree(home.egress)
    EgressLog(home.egress, identity).mend()
    assert json.loads(call("show", "--home", home.root, "--json").stdout)["entries"] == []
    assert "0 entries, all as they were written" in said(call("verify", "--home", home.root))
    assert "0 entries" in said(call("export", tmp_path / "file", "--home", home.root))


def test_a_log_that_is_gone_is_told_by_what_it_left_behind(home: ClientHome, tmp_path: Path) -> None:
    (home.runs / "first").mkdir(parents=True)
    home.egress.rename(tmp_path / "away")
    for command in (["show"], ["verify"], ["export", tmp_path / "file"]):
        shown = call(*command, "--home", home.root)
        assert shown.exit_code == 5
        assert f"{home.egress}: expected what left, since {home.runs} holds runs, found nothing" in said(shown)
    assert "5 entries" in said(call("verify", tmp_path / "away", "--home", home.root))


def test_an_option_without_meaning_is_refused() -> None:
    assert call("show", "--last", "0").exit_code == 2


# --- verify


def test_a_log_that_is_whole(home: ClientHome, identity: Identity) -> None:
    shown = call("verify", "--home", home.root)
    assert shown.exit_code == 0
    assert "5 entries, all as they were written" in said(shown)
    assert str(home.card) in shown.stdout
    assert f"verified against {identity.public.hex()}" in said(shown)
    found = json.loads(call("verify", "--home", home.root, "--json").stdout)
    assert (found["whole"], found["entries"], found["finding"]) == (True, 5, None)
    assert found["public_key"] == identity.public.hex()


def test_the_first_altered_entry_is_named_and_the_exit_code_is_5(home: ClientHome) -> None:
    content = log_file(home).read_bytes()
    log_file(home).write_bytes(content.replace(b'"round":2', b'"round":3'))
    shown = call("verify", "--home", home.root)
    assert shown.exit_code == 5
    assert "egress-000000000001.jsonl:3: entry 3 was altered" in shown.stderr
    assert "the 2 entries before are whole" in shown.stderr
    assert "as they were written" not in shown.stdout
    shown = call("verify", "--home", home.root, "--json")
    assert shown.exit_code == 5
    found = json.loads(shown.stdout)
    assert (found["whole"], found["entries"]) == (False, 2)
    assert (found["finding"]["kind"], found["finding"]["entry"]) == ("altered", 3)
    assert found["finding"]["where"] == "egress-000000000001.jsonl:3"


def test_what_a_crash_left_is_told_and_is_no_finding(home: ClientHome) -> None:
    with log_file(home).open("ab") as handle:
        handle.write(b'{"number":6')
    shown = call("verify", "--home", home.root)
    assert shown.exit_code == 0
    assert "11 bytes more are of an entry" in said(shown)
    found = json.loads(call("verify", "--home", home.root, "--json").stdout)
    assert (found["whole"], found["cut_off_bytes"], found["ahead"]) == (True, 11, False)


def test_an_entry_that_the_head_does_not_know_is_told(home: ClientHome, identity: Identity) -> None:
    head = (home.egress / "head.json").read_bytes()
    EgressLog(home.egress, identity).record("Keys", Payload.of_bytes(b""))
    (home.egress / "head.json").write_bytes(head)
    shown = call("verify", "--home", home.root)
    assert shown.exit_code == 0
    assert "the head does not know the last entry yet" in said(shown)
    assert json.loads(call("verify", "--home", home.root, "--json").stdout)["ahead"]


# --- export, and verifying elsewhere


def test_an_export_is_verified_anywhere(home: ClientHome, identity: Identity, tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    shown = call("export", file, "--home", home.root, "--json")
    assert json.loads(shown.stdout) == {"entries": 5, "file": str(file)}
    away = tmp_path / "another machine"
    key = identity.public.hex()
    shown = call("verify", file, "--home", away, "--public-key", key)
    assert shown.exit_code == 0
    assert "the key that was given" in said(shown)
    shown = call("verify", file, "--home", away)
    assert shown.exit_code == 0
    assert "proves nothing by itself" in said(shown)
    assert call("show", file, "--home", away, "--json").stdout == call("show", "--home", home.root, "--json").stdout
    assert not away.exists()
    assert call("export", file, "--home", home.root).exit_code == 5


@pytest.mark.parametrize("place", ["home", "export"])
def test_a_log_of_another_institution_is_none_of_this_ones(place: str, home: ClientHome, tmp_path: Path) -> None:
    call("export", tmp_path / "log.jsonl", "--home", home.root)
    where = ["--home", home.root] if place == "home" else [tmp_path / "log.jsonl"]
    shown = call("verify", *where, "--public-key", Identity.generate("birch").public.hex())
    assert shown.exit_code == 5
    assert "expected a log signed with" in said(shown)


@pytest.mark.parametrize("key", ["", "abc", "g" * 64, "a" * 63])
def test_a_key_that_is_none_is_told(key: str, home: ClientHome) -> None:
    shown = call("verify", "--home", home.root, "--public-key", key)
    assert shown.exit_code == 2
    assert "--public-key" in said(shown)


def test_without_head_and_card_a_key_is_asked_for(home: ClientHome, identity: Identity, tmp_path: Path) -> None:
    file = tmp_path / "cut.jsonl"
    file.write_bytes(log_file(home).read_bytes())
    away = tmp_path / "away"
    shown = call("verify", file, "--home", away)
    assert shown.exit_code == 2
    assert "give --public-key" in said(shown)
    shown = call("verify", file, "--home", away, "--public-key", identity.public.hex())
    assert shown.exit_code == 5
    assert "the head is missing" in said(shown)
    assert "the 5 entries before are whole" in said(shown)
