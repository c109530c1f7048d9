"""The coordinator's home and its roster: what is added stays, what is refused changes nothing."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.enrolment import (
    Address,
    Card,
    read_roster,
)
from common.errors import ConfigError, StorageError
from common.private_files import write_private_json
from common.secagg.identity import Identity
from server import authority, enrolment
from server.authority import Existing
from server.enrolment import Settings
from server.home import ServerHome

NOW = datetime.now(UTC)
SECRET = b"correct horse battery staple"
SETTINGS = Settings("oncology", ("coordinator.example.org", "127.0.0.1"), 9443, 9092)
ROOT = Path(__file__).resolve().parents[2]


def card(name: str) -> Card:
    return Card.of(Identity.generate(name), ec.generate_private_key(ec.SECP384R1()).public_key())


@pytest.fixture
def home(tmp_path: Path) -> ServerHome:
    made = ServerHome(tmp_path / "home")
    enrolment.init(made, SETTINGS, None, NOW)
    return made


def contents(home: ServerHome) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in home.root.rglob("*") if path.is_file()}


def python(script: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


# --- init ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passphrase", [None, SECRET])
def test_everything_is_made(tmp_path: Path, passphrase: bytes | None) -> None:
    home = ServerHome(tmp_path / "new" / "home")
    before = os.umask(0)
    try:
        signed = enrolment.init(home, SETTINGS, passphrase, NOW)
    finally:
        os.umask(before)
    modes = {path.relative_to(home.root).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in home.root.rglob("*")}
    files = {"keys/identity.pem", "keys/authority.pem", "keys/tls.pem", "tls/authority.crt", "tls/server.crt"}
    files |= {".lock", "server.yaml", "roster.json"}
    assert modes == {**dict.fromkeys(files, 0o600), "keys": 0o700, "tls": 0o700}
    assert stat.S_IMODE(home.root.stat().st_mode) == 0o700
    assert signed == enrolment.roster(home) == read_roster(home.roster)
    own = enrolment.identity(home, passphrase)
    assert (own.name, own.public) == ("coordinator", signed.contents.coordinator)
    assert enrolment.read_settings(home) == SETTINGS
    said = signed.contents
    assert (said.federation, said.serial, said.members, said.bundles) == ("oncology", 1, (), ())
    assert said.address == Address("coordinator.example.org", 9443)
    assert said.authority == authority.authority_pem(home)


def test_a_coordinator_is_never_made_over_another(home: ServerHome) -> None:
    before = contents(home)
    with pytest.raises(ConfigError, match=r"found one, whose keys are never overwritten.*renew.*another --home"):
        enrolment.init(home, SETTINGS, None, NOW)
    assert contents(home) == before


KILLED = """
import os, signal, sys
from datetime import UTC, datetime
from pathlib import Path
from server import enrolment
from server.home import ServerHome
calls = 0
sync = os.fsync
def dying(handle):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    sync(handle)
os.fsync = dying
settings = enrolment.Settings("oncology", ("coordinator.example.org", "127.0.0.1"), 9443, 9092)
enrolment.init(ServerHome(Path(sys.argv[1])), settings, None, datetime.now(UTC))
"""


@pytest.mark.parametrize("moment", [3, 5, 8, 10, 13, 15])
def test_a_kill_at_any_moment_leaves_what_init_can_finish(tmp_path: Path, moment: int) -> None:
    home = ServerHome(tmp_path / "home")
    killed = python(KILLED, str(home.root), str(moment))
    told = killed.communicate()[1]
    assert killed.returncode == -signal.SIGKILL, told
    assert not home.roster.exists()
    kept = {path: path.read_bytes() for path in home.root.rglob("keys/[a-z]*.pem")}
    enrolment.init(home, SETTINGS, None, NOW)
    assert {path: path.read_bytes() for path in kept} == kept
    assert enrolment.roster(home).contents.serial == 1
    authority.renew(home, SETTINGS.hosts, None, NOW)
    assert not list(home.root.rglob("*.partial"))


def test_nothing_is_made_where_nothing_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        enrolment.init(ServerHome(tmp_path / "file" / "home"), SETTINGS, None, NOW)
    home = ServerHome(tmp_path / "home")
    with pytest.raises(ConfigError, match="at least 16 bytes"):
        enrolment.init(home, SETTINGS, b"short", NOW)
    assert not home.root.exists()
    home.root.mkdir()
    home.root.chmod(0o755)
    with pytest.raises(ConfigError, match="run: chmod 700"):
        enrolment.init(home, SETTINGS, None, NOW)
    assert contents(home) == {}


# --- server.yaml -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        {"federation": "An Open One"},
        {"hosts": ()},
        {"hosts": ("a b",)},
        {"hosts": ("https://a",)},
        {"port": 0},
        {"port": 65536},
        {"superlink_port": -1},
        {"superlink_port": 9443},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(said: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        Settings(**{"federation": "oncology", "hosts": ("a",), "port": 9443, "superlink_port": 9092, **said})


def test_hosts_are_written_once_and_in_one_way() -> None:
    assert Settings("a", ("B.org", "b.org", "::0001", "::1"), 1, 2).hosts == ("b.org", "::1")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just text",
        "- a list",
        "federation: a",
        "a: [",
        "federation: a\nhosts: b\nport: 1\nsuperlink_port: 2",
        "federation: a\nhosts: [1]\nport: 1\nsuperlink_port: 2",
        "federation: a\nhosts: [b]\nport: '1'\nsuperlink_port: 2",
        "federation: a\nhosts: [b]\nport: true\nsuperlink_port: 2",
        "federation: a\nhosts: [b]\nport: 1\nsuperlink_port: 2\nmore: 3",
        "federation: a\nhosts: [b]\nport: 0\nsuperlink_port: 2",
        "federation: !!python/object/apply:os.system ['true']\nhosts: [b]\nport: 1\nsuperlink_port: 2",
        "\x00\x01",
        "[" * 20_000,
        "x" * 70_000,
    ],
)
def test_a_spoilt_server_yaml_is_refused(home: ServerHome, text: str) -> None:
    home.settings.write_text(text)
    with pytest.raises(ConfigError, match=r"server\.yaml: .*expected") as refused:
        enrolment.read_settings(home)
    assert len(str(refused.value)) < 500


def test_a_binary_server_yaml_is_refused(home: ServerHome) -> None:
    home.settings.write_bytes(b"\xff\xfe\x00" * 10)
    with pytest.raises(ConfigError, match="expected YAML"):
        enrolment.read_settings(home)


# --- The roster ------------------------------------------------------------------------------------------------------


def test_members_are_added_and_removed(home: ServerHome) -> None:
    cards = [card(name) for name in ("summit", "lakeside", "riverside")]
    first = enrolment.enroll(home, cards[:2], None, NOW)
    second = enrolment.enroll(home, cards[2:], None, NOW + timedelta(days=1))
    assert [member.card.name for member in second.contents.members] == ["lakeside", "riverside", "summit"]
    assert second.cards == {found.name: found for found in cards}
    assert (first.contents.serial, second.contents.serial) == (2, 3)
    assert len({member.enrolled for member in second.contents.members}) == 2
    third = enrolment.remove(home, "riverside", None, NOW)
    assert third.contents.members == first.contents.members
    assert third.contents.serial == 4
    assert enrolment.roster(home) == third
    assert enrolment.enroll(home, cards[2:], None, NOW).contents.serial == 5


def test_an_unknown_member_cannot_be_removed(home: ServerHome) -> None:
    enrolment.enroll(home, [card("riverside")], None, NOW)
    before = contents(home)
    with pytest.raises(ConfigError, match=r"expected the name of a member \(riverside\), found 'lakeside'"):
        enrolment.remove(home, "lakeside", None, NOW)
    assert contents(home) == before


def test_a_name_or_a_key_is_enrolled_once(home: ServerHome) -> None:
    identity, node = Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1()).public_key()
    other_node = ec.generate_private_key(ec.SECP384R1()).public_key()
    member = Card.of(Identity("riverside", identity), node)
    enrolment.enroll(home, [member], None, NOW)
    before = contents(home)
    for found, cards in (
        ("name and the identity key and the node key", [member]),
        ("name", [card("riverside")]),
        ("identity key", [Card.of(Identity("lakeside", identity), other_node)]),
        ("node key", [Card.of(Identity.generate("lakeside"), node)]),
        ("name", [card("summit"), card("summit")]),
        ("name", [card("summit"), member]),
    ):
        for call in (
            lambda cards=cards: enrolment.enroll(home, cards, None, NOW),
            lambda cards=cards: enrolment.check_new(enrolment.roster(home), cards),
        ):
            with pytest.raises(ConfigError, match=f"found the .*{found.split()[0]}"):
                call()
    assert contents(home) == before


def test_the_coordinator_s_own_key_cannot_be_enrolled(home: ServerHome) -> None:
    own = enrolment.identity(home, None)
    forged = Card.of(Identity("riverside", own._key), ec.generate_private_key(ec.SECP384R1()).public_key())
    with pytest.raises(ConfigError, match="identity key of their own"):
        enrolment.enroll(home, [forged], None, NOW)


def test_bundles_are_listed_and_kept(home: ServerHome) -> None:
    bundles = ["ab" * 32, "01" * 32]
    assert enrolment.allow_bundles(home, bundles, None, NOW).contents.serial == 2
    assert enrolment.allow_bundles(home, bundles, None, NOW).contents.serial == 2  # nothing new to sign
    found = enrolment.enroll(home, [card("riverside")], None, NOW)
    assert found.contents.bundles == tuple(bundles)
    with pytest.raises(ConfigError, match="bundles: expected"):
        enrolment.allow_bundles(home, ["not a digest"], None, NOW)
    assert enrolment.roster(home) == found


def test_two_at_once_lose_no_card(home: ServerHome, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom datetime import UTC, datetime\nfrom pathlib import Path\n"
        "from common.enrolment import read_card\nfrom server import enrolment\nfrom server.home import ServerHome\n"
        "for file in sys.argv[2:]:\n"
        "    enrolment.enroll(ServerHome(Path(sys.argv[1])), [read_card(Path(file))], None, datetime.now(UTC))\n"
    )
    batches = []
    for batch in range(3):
        files = [tmp_path / f"member-{batch}-{number}.json" for number in range(4)]
        for file in files:
            write_private_json(file, card(file.stem).to_json())
        batches.append([str(file) for file in files])
    running = [python(script, str(home.root), *files) for files in batches]
    told = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], told
    signed = enrolment.roster(home)
    assert sorted(signed.cards) == sorted(Path(file).stem for files in batches for file in files)
    assert signed.contents.serial == 13


def test_a_full_disk_leaves_the_roster_that_was_there(home: ServerHome) -> None:
    before = enrolment.enroll(home, [card("riverside")], None, NOW)
    shown = home.root.parent / "card.json"
    write_private_json(shown, card("lakeside").to_json())
    script = (
        "import resource, sys\nfrom datetime import UTC, datetime\nfrom pathlib import Path\n"
        "from common.enrolment import read_card\nfrom common.errors import StorageError\n"
        "from server import enrolment\nfrom server.home import ServerHome\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    enrolment.enroll(ServerHome(Path(sys.argv[1])), [read_card(Path(sys.argv[2]))], None,"
        " datetime.now(UTC))\n"
        "except StorageError as error:\n    sys.exit(f'refused: {error}')\n"
    )
    told = python(script, str(home.root), str(shown)).communicate()[1]
    assert "refused: cannot write" in told, told
    assert enrolment.roster(home) == before
    assert not list(home.root.rglob("*.partial"))
    enrolment.enroll(home, [card("lakeside")], None, NOW)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda file: file.write_bytes(b""), id="empty"),
        pytest.param(lambda file: file.write_text(file.read_text().replace('"serial": 1', '"serial": 9')), id="edited"),
        pytest.param(lambda file: file.write_bytes(b"\xff" * 99), id="binary"),
        pytest.param(lambda file: file.open("wb").truncate(1 << 40), id="huge"),
    ],
)
def test_a_spoilt_roster_is_not_built_upon(home: ServerHome, spoil: Callable[[Path], object]) -> None:
    spoil(home.roster)
    before = home.roster.stat()
    with pytest.raises(ConfigError, match=r"roster\.json: .*expected"):
        enrolment.enroll(home, [card("riverside")], None, NOW)
    assert home.roster.stat().st_mtime_ns == before.st_mtime_ns


def test_a_lost_roster_does_not_start_again_at_one(home: ServerHome) -> None:
    enrolment.enroll(home, [card("riverside")], None, NOW)
    home.roster.unlink()
    with pytest.raises(ConfigError, match="restore the newest roster from a copy"):
        enrolment.enroll(home, [card("lakeside")], None, NOW)
    with pytest.raises(ConfigError, match="found none; run: silotune-server init"):
        enrolment.roster(ServerHome(home.root / "elsewhere"))


def test_a_roster_of_another_coordinator_is_not_built_upon(home: ServerHome, tmp_path: Path) -> None:
    other = ServerHome(tmp_path / "other")
    enrolment.init(other, SETTINGS, None, NOW)
    home.roster.write_bytes(other.roster.read_bytes())
    with pytest.raises(ConfigError, match="found another's; restore both from the same copy"):
        enrolment.enroll(home, [card("riverside")], None, NOW)


def test_only_who_has_the_passphrase_changes_the_roster(tmp_path: Path) -> None:
    home = ServerHome(tmp_path / "home")
    enrolment.init(home, SETTINGS, SECRET, NOW)
    for given in (None, b"another passphrase"):
        with pytest.raises(ConfigError, match=r"expected (a|the) passphrase") as refused:
            enrolment.enroll(home, [card("riverside")], given, NOW)
        assert "another passphrase" not in str(refused.value)
    assert enrolment.enroll(home, [card("riverside")], SECRET, NOW).contents.serial == 2


@pytest.mark.parametrize(("name", "bits"), [("keys/identity.pem", 0o640), ("keys", 0o750), (".", 0o755)])
def test_what_others_can_read_is_refused(home: ServerHome, name: str, bits: int) -> None:
    (home.root / name).chmod(bits)
    with pytest.raises(ConfigError, match=rf"found mode {bits:04o}; run: chmod"):
        enrolment.enroll(home, [card("riverside")], None, NOW)


# --- renew -----------------------------------------------------------------------------------------------------------


def test_renewal_leaves_the_roster_as_it_is(home: ServerHome) -> None:
    before = home.roster.read_bytes(), home.tls_certificate.read_bytes()
    assert enrolment.renew(home, None, NOW).contents.serial == 1
    assert home.roster.read_bytes() == before[0]
    assert home.tls_certificate.read_bytes() != before[1]


def test_renewal_takes_what_server_yaml_says_now(home: ServerHome) -> None:
    member = card("riverside")
    enrolment.enroll(home, [member], None, NOW)
    home.settings.write_text(home.settings.read_text().replace("coordinator.example.org", "new.example.org"))
    found = enrolment.renew(home, None, NOW).contents
    assert (found.serial, str(found.address)) == (3, "new.example.org:9443")
    assert [shown.card for shown in found.members] == [member]
    authority.check(home.tls_certificate.read_bytes(), home.tls_key, home.authority.read_bytes(), ["new.example.org"])


def test_certificates_from_elsewhere_are_taken_and_renewed(tmp_path: Path) -> None:
    """Another coordinator's authority plays the one from elsewhere."""
    shop = ServerHome(tmp_path / "shop")
    enrolment.init(shop, SETTINGS, None, NOW)
    files = Existing(shop.tls_certificate, shop.tls_key, shop.authority)
    home = ServerHome(tmp_path / "home")
    signed = enrolment.init(home, SETTINGS, None, NOW, files)
    assert not home.authority_key.exists()
    assert signed.contents.authority == authority.authority_pem(shop)
    with pytest.raises(ConfigError, match="certificates came from elsewhere"):
        enrolment.renew(home, None, NOW)
    enrolment.renew(shop, None, NOW)
    assert enrolment.renew(home, None, NOW, files).contents.serial == 1
    assert home.tls_certificate.read_bytes() == shop.tls_certificate.read_bytes()
    other = ServerHome(tmp_path / "other")
    enrolment.init(other, SETTINGS, None, NOW)
    files = Existing(other.tls_certificate, other.tls_key, other.authority)
    moved = enrolment.renew(home, None, NOW, files).contents
    assert (moved.serial, moved.authority) == (2, authority.authority_pem(other))


def test_the_roster_file_is_plain_json(home: ServerHome) -> None:
    enrolment.enroll(home, [card("riverside")], None, NOW)
    said = json.loads(home.roster.read_text())
    assert said["members"][0]["card"]["name"] == "riverside"
    assert said["authority"].startswith("-----BEGIN CERTIFICATE-----")
    assert said["bundles"] == []
