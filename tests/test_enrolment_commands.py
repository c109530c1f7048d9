"""From nothing to a trusted roster by the commands that people type, and what they see when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from typer.testing import CliRunner, Result

import client.main
import server.main
from client import trust
from client.home import ClientHome
from common.enrolment import ungrouped

ROOT = Path(__file__).resolve().parents[1]
SECRET = b"correct horse battery staple"


def silotune_client(*arguments: object, said: str | None = None) -> Result:
    return CliRunner().invoke(client.main.app, [str(argument) for argument in arguments], input=said)


def silotune_server(*arguments: object, said: str | None = None) -> Result:
    return CliRunner().invoke(server.main.app, [str(argument) for argument in arguments], input=said)


def done(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def told(result: Result) -> dict[str, Any]:
    """The one object that `--json` prints on stdout."""
    found = json.loads(done(result))
    assert isinstance(found, dict)
    return found


def refused(result: Result, code: int = 2) -> str:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert result.stderr.startswith(("error: ", "Do", "Does"))
    return result.stderr


@pytest.fixture
def members(tmp_path: Path) -> dict[str, Path]:
    """Homes of three institutions, by name."""
    homes = {name: tmp_path / name for name in ("riverside", "northgate", "lakeside")}
    for name, home in homes.items():
        done(silotune_client("init", "--name", name, "--home", home))
    return homes


@pytest.fixture
def coordinator(tmp_path: Path) -> Path:
    home = tmp_path / "coordinator"
    done(silotune_server("init", "--host", "localhost", "--host", "127.0.0.1", "--home", home))
    return home


def test_from_nothing_to_a_trusted_roster(members: dict[str, Path], coordinator: Path) -> None:
    shown = {name: told(silotune_client("card", "--home", home, "--json")) for name, home in members.items()}
    cards = [found["card"] for found in shown.values()]
    enrolled = done(silotune_server("enroll", *cards, "--home", coordinator, said="y\ny\ny\n"))
    for found in shown.values():
        assert found["fingerprint"] in enrolled
    listed = told(silotune_server("roster", "--home", coordinator, "--json"))
    assert {member["name"]: member["fingerprint"] for member in listed["members"]} == {
        name: found["fingerprint"] for name, found in shown.items()
    }
    roster = coordinator / "roster.json"
    assert listed["roster"] == str(roster)
    for name, home in members.items():
        text = done(silotune_client("trust", roster, "--home", home, said="y\n"))
        assert f"{name} (this institution)" in text
        assert listed["fingerprint"] in text
        assert all(found["fingerprint"] in text for found in shown.values())
    trusted = [trust.pinned(ClientHome(home)) for home in members.values()]
    assert {found.fingerprint for found in trusted} == {ungrouped(listed["fingerprint"])}
    assert len({found.secagg.digest() for found in trusted}) == 1

    left = told(silotune_server("remove", "lakeside", "--home", coordinator, "--json"))
    assert [member["name"] for member in left["members"]] == ["northgate", "riverside"]
    anew = done(silotune_client("trust", roster, "--home", members["riverside"], said="y\n"))
    assert "removed: lakeside" in anew
    assert "serial: 2 -> 3" in anew
    assert "found no card of that name" in refused(
        silotune_client("trust", roster, "--home", members["lakeside"], "--yes")
    )
    assert trust.pinned(ClientHome(members["lakeside"])).serial == 2


def test_a_fingerprint_is_the_same_wherever_it_is_shown(members: dict[str, Path], coordinator: Path) -> None:
    card = members["riverside"] / "card.json"
    first = told(silotune_client("card", "--home", members["riverside"], "--json"))["fingerprint"]
    assert len(first.split()) == 16
    for result in (
        silotune_client("card", "--home", members["riverside"]),
        silotune_server("enroll", card, "--yes", "--home", coordinator),
        silotune_server("roster", "--home", coordinator),
        silotune_client("trust", coordinator / "roster.json", "--yes", "--home", members["riverside"]),
    ):
        assert first in done(result)


@pytest.mark.parametrize("said", ["n\n", "", "\n"])
def test_without_a_yes_nothing_changes(members: dict[str, Path], coordinator: Path, said: str) -> None:
    card = members["riverside"] / "card.json"
    roster = coordinator / "roster.json"
    before = roster.read_bytes()
    assert "expected a yes, found none" in refused(silotune_server("enroll", card, "--home", coordinator, said=said))
    assert roster.read_bytes() == before
    done(silotune_server("enroll", card, "--home", coordinator, "--yes"))
    home = members["riverside"]
    assert "expected a yes, found none" in refused(silotune_client("trust", roster, "--home", home, said=said))
    assert not (home / "roster.json").exists()


def test_one_no_among_several_cards_adds_none(members: dict[str, Path], coordinator: Path) -> None:
    cards = [home / "card.json" for home in members.values()]
    refused(silotune_server("enroll", *cards, "--home", coordinator, said="y\nn\n"))
    assert told(silotune_server("roster", "--home", coordinator, "--json"))["members"] == []


def test_a_fingerprint_from_elsewhere_stands_for_the_comparison(members: dict[str, Path], coordinator: Path) -> None:
    home = members["riverside"]
    done(silotune_server("enroll", home / "card.json", "--home", coordinator, "--yes"))
    roster = coordinator / "roster.json"
    right = told(silotune_server("roster", "--home", coordinator, "--json"))["fingerprint"]
    wrong = right.translate(str.maketrans("0123456789abcdef", "123456789abcdef0"))
    for given, said in (
        (wrong, f"expected the fingerprint {wrong}, found {right}"),
        (right[:19], "64 hexadecimal digits"),
    ):
        assert said in refused(silotune_client("trust", roster, "--home", home, "--fingerprint", given))
        assert not (home / "roster.json").exists()
    again = refused(silotune_client("trust", roster, "--home", home, "--fingerprint", wrong, "--yes"))
    assert "expected the fingerprint" in again
    shown = told(silotune_client("trust", roster, "--home", home, "--fingerprint", right, "--json"))
    assert shown["roster"] == right
    assert shown["changes"] == ["no roster was trusted before"]
    assert told(silotune_client("trust", roster, "--home", home, "--json"))["changes"] == []


def test_the_server_s_expiry_and_renewal_are_shown(coordinator: Path) -> None:
    before = (coordinator / "tls" / "server.crt").read_bytes()
    text = done(silotune_server("renew", "--home", coordinator))
    assert "certificate expires" in text
    assert "run: silotune-server renew" in text
    assert (coordinator / "tls" / "server.crt").read_bytes() != before
    shown = told(silotune_server("renew", "--home", coordinator, "--json"))
    assert set(shown) >= {"address", "coordinator", "authority", "authority_expires", "certificate_expires", "roster"}
    assert shown["address"] == "localhost:9443"


def test_certificates_from_elsewhere_are_asked_for_together(coordinator: Path, tmp_path: Path) -> None:
    files = ["--certificate", coordinator / "tls" / "server.crt", "--key", coordinator / "keys" / "tls.pem"]
    home = tmp_path / "second"
    said = refused(silotune_server("init", "--host", "localhost", "--home", home, *files))
    assert "expected --certificate, --key and --authority together" in said
    files += ["--authority", coordinator / "tls" / "authority.crt"]
    assert "a member reaches elsewhere.org" in refused(
        silotune_server("init", "--host", "localhost", "--host", "elsewhere.org", "--home", home, *files)
    )
    done(silotune_server("init", "--host", "localhost", "--home", home, *files))
    assert (home / "tls" / "authority.crt").read_bytes() == (coordinator / "tls" / "authority.crt").read_bytes()


def test_nothing_is_done_twice(members: dict[str, Path], coordinator: Path) -> None:
    home = members["riverside"]
    assert "never overwritten" in refused(silotune_client("init", "--name", "riverside", "--home", home))
    assert "never overwritten" in refused(silotune_server("init", "--host", "localhost", "--home", coordinator))
    done(silotune_server("enroll", home / "card.json", "--home", coordinator, "--yes"))
    said = refused(silotune_server("enroll", home / "card.json", "--home", coordinator, "--yes"))
    assert "silotune-server remove riverside" in said


def test_a_home_is_found_by_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SILOTUNE_CLIENT_HOME", str(tmp_path / "c"))
    monkeypatch.setenv("SILOTUNE_SERVER_HOME", str(tmp_path / "s"))
    done(silotune_client("init", "--name", "riverside"))
    done(silotune_server("init", "--host", "localhost"))
    done(silotune_server("enroll", tmp_path / "c" / "card.json", "--yes"))
    done(silotune_client("trust", tmp_path / "s" / "roster.json", "--yes"))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["card"], 2),
        (["trust", "{missing}"], 2),
        (["init", "--name", "Not A Name"], 2),
        (["init", "--name", "riverside", "--passphrase-fd", "999"], 2),
        (["init", "--name", "riverside", "--passphrase-credential", "../x"], 2),
    ],
)
def test_mistakes_at_an_institution_are_told_plainly(tmp_path: Path, arguments: Sequence[str], code: int) -> None:
    given = [argument.format(missing=tmp_path / "missing") for argument in arguments]
    assert "expected" in refused(silotune_client(*given, "--home", tmp_path / "home"), code)
    assert not (tmp_path / "home").exists()


def test_bad_files_are_told_plainly(members: dict[str, Path], coordinator: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    for content in (b"", b"\xff\x00" * 99, b"[1]", b'{"name": "\x1b[31mriverside"}', b"x" * 100_000, b'{"a": "[red]"}'):
        bad.write_bytes(content)
        for result in (
            silotune_server("enroll", bad, "--yes", "--home", coordinator),
            silotune_client("trust", bad, "--yes", "--home", members["riverside"]),
        ):
            text = refused(result)
            assert "expected" in text
            assert "\x1b" not in text
    for result in (
        silotune_server("enroll", tmp_path / "missing", "--yes", "--home", coordinator),
        silotune_client("trust", tmp_path / "missing", "--yes", "--home", members["riverside"]),
    ):
        assert "cannot be read" in refused(result, 5)
    for path in (tmp_path, Path("/dev/zero")):
        assert "plain file" in refused(silotune_server("enroll", path, "--yes", "--home", coordinator))


def test_a_card_is_not_a_roster(members: dict[str, Path], coordinator: Path) -> None:
    card = members["riverside"] / "card.json"
    assert "expected the keys" in refused(silotune_client("trust", card, "--yes", "--home", members["riverside"]))
    assert "expected the keys" in refused(
        silotune_server("enroll", coordinator / "roster.json", "--yes", "--home", coordinator)
    )


# --- Passphrases, in processes of their own --------------------------------------------------------------------------


def process(module: str, *arguments: object, secret: bytes | None = None, **environment: str) -> tuple[int, str]:
    """Exit code and all output of a command that gets its passphrase over a pipe."""
    command = [sys.executable, "-c", f"from {module}.main import main; main()", *map(str, arguments)]
    handles: list[int] = []
    if secret is not None:
        there, here = os.pipe()
        os.write(here, secret)
        os.close(here)
        command += ["--passphrase-fd", str(there)]
        handles.append(there)
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    run = subprocess.run(command, env=surroundings, pass_fds=handles, capture_output=True, text=True, check=False)
    for handle in handles:
        os.close(handle)
    return run.returncode, run.stdout + run.stderr


def test_passphrases_come_over_a_descriptor_or_a_credential(tmp_path: Path) -> None:
    member, coordinator, credentials = tmp_path / "riverside", tmp_path / "coordinator", tmp_path / "credentials"
    roster = coordinator / "roster.json"
    credentials.mkdir()
    (credentials / "keys").write_bytes(SECRET)
    (credentials / "keys").chmod(0o400)
    systemd = {"CREDENTIALS_DIRECTORY": str(credentials)}
    outputs = []
    for code, result in (
        (0, process("client", "init", "--name", "riverside", "--home", member, secret=SECRET + b"\n")),
        (0, process("server", "init", "--host", "localhost", "--home", coordinator, secret=SECRET)),
        (2, process("server", "enroll", member / "card.json", "--yes", "--home", coordinator)),
        (2, process("server", "enroll", member / "card.json", "--yes", "--home", coordinator, secret=b"another one")),
        (0, process("server", "enroll", member / "card.json", "--yes", "--home", coordinator, secret=SECRET)),
        (2, process("client", "trust", roster, "--yes", "--home", member)),
        (
            0,
            process("client", "trust", roster, "--yes", "--home", member, "--passphrase-credential", "keys", **systemd),
        ),
        (0, process("client", "card", "--home", member)),
        (0, process("server", "renew", "--home", coordinator, secret=SECRET)),
    ):
        assert result[0] == code, result[1]
        outputs.append(result[1])
    assert SECRET.decode() not in "".join(outputs)
    assert "another one" not in "".join(outputs)
    assert trust.pinned(ClientHome(member)).serial == 2
    for key in (member / "keys" / "identity.pem", member / "keys" / "node.pem", coordinator / "keys" / "identity.pem"):
        assert b"BEGIN ENCRYPTED PRIVATE KEY" in key.read_bytes()


@pytest.mark.parametrize("app", [client.main.app, server.main.app])
def test_no_option_and_no_variable_holds_a_secret(app: typer.Typer) -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    for command in group.commands.values():
        for parameter in command.params:
            assert not parameter.envvar
            if "pass" in (parameter.name or ""):
                assert parameter.name in ("passphrase_fd", "passphrase_credential")


def test_help_answers_without_heavy_imports() -> None:
    script = (
        "import sys\nimport client.main, server.main\n"
        "heavy = {'torch', 'transformers', 'flwr', 'cryptography', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "--passphrase-fd" in done(silotune_client("init", "--help"))
    assert "--host" in done(silotune_server("init", "--help"))
