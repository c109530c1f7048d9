"""An institution's keys: made once, loaded by whoever holds the passphrase, and shown to nobody."""

from __future__ import annotations

import base64
import copy
import json
import logging
import os
import pickle
import signal
import stat
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from client import data_sets, keys, policy_file
from client.home import ClientHome
from client.policy_file import InstitutionPolicy
from common.base_model import fingerprint, model_directory
from common.bundle import bundle_digest
from common.enrolment import Card, read_card
from common.errors import ConfigError, DataError, ModelError, SilotuneError, StorageError
from common.private_files import write_private_json
from common.records import Record, write_jsonl
from common.secagg.identity import Identity

SECRET = b"correct horse battery staple"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def home(tmp_path: Path) -> ClientHome:
    return ClientHome(tmp_path / "home")


def files(home: ClientHome) -> dict[str, int]:
    """Modes by path, of everything below a home."""
    return {path.relative_to(home.root).as_posix(): stat.S_IMODE(path.lstat().st_mode) for path in home.root.rglob("*")}


def material(found: keys.Keys) -> set[str]:
    """The private parts, as somebody might show them."""
    seed = found.identity._key.private_bytes_raw()
    number = found.node.private_numbers().private_value
    scalar = number.to_bytes(48, "big")
    pem = found.node.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode().splitlines()[2]
    return {seed.hex(), scalar.hex(), repr(seed), repr(scalar), base64.b64encode(seed).decode()[:40], str(number), pem}


# --- init ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passphrase", [None, SECRET])
def test_everything_is_made_and_can_be_loaded(home: ClientHome, passphrase: bytes | None) -> None:
    before = os.umask(0)
    try:
        made = keys.init(home, "riverside", passphrase)
    finally:
        os.umask(before)
    modes = files(home)
    made_of = {"card.json", "data.yaml", "policy.yaml", "keys", "keys/identity.pem", "keys/node.pem", "ledger", ".lock"}
    assert set(modes) == made_of | {"ledger/.lock", "ledger/head.json"}
    assert stat.S_IMODE(home.root.stat().st_mode) == modes["keys"] == 0o700
    assert {modes[name] for name in ("keys/identity.pem", "keys/node.pem", "card.json")} == {0o600}
    loaded = keys.load(home, passphrase)
    assert made == keys.card(home) == read_card(home.card) == Card.of(loaded.identity, loaded.node.public_key())
    assert loaded.identity.name == "riverside"
    assert isinstance(loaded.node.curve, ec.SECP384R1)
    assert policy_file.read(home.policy) == InstitutionPolicy(bundles=(bundle_digest(),))
    assert data_sets.read(home.data) == data_sets.DataFile()


def test_what_may_be_trained_on_can_be_named_at_once(
    home: ClientHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "my notes.jsonl", [Record(f"q{i}", "a", f"p{i}", "coding") for i in range(40)])
    monkeypatch.chdir(tmp_path)
    keys.init(home, "riverside", None, "embedded", {"notes": Path("my notes.jsonl"), "yes": Path("~/more.csv")})
    policy = policy_file.read(home.policy)
    assert policy.data_sets == ("notes", "yes")
    assert policy.base_models == (fingerprint("embedded").digest(),)
    found = data_sets.open_data_sets(home.data)
    assert found.names == ("notes", "yes")
    assert len(found.find("notes", "train").records) > 20
    with pytest.raises(DataError, match=str(Path.home())):
        found.find("yes", "train")


def test_a_base_model_elsewhere_is_named_in_full(
    home: ClientHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(model_directory("embedded"))
    keys.init(home, "riverside", None, "base")
    assert data_sets.read(home.data).machine.model == str(tmp_path / "base")


def test_what_cannot_be_named_makes_no_card(home: ClientHome) -> None:
    with pytest.raises(ModelError, match="expected `embedded` or a directory"):
        keys.init(home, "riverside", None, "no-such-model")
    with pytest.raises(ConfigError, match="data_sets"):
        keys.init(home, "riverside", None, "", {"../notes": Path("x")})
    assert not home.card.exists()
    keys.init(home, "riverside", None, "", {"notes": Path("x")})
    assert policy_file.read(home.policy).data_sets == ("notes",)


def test_keys_fit_flower(home: ClientHome, tmp_path: Path) -> None:
    """The pair is what the fleet client takes; the card's line is what `flwr supernode register` takes."""
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.primitives.asymmetric import sign_message, uses_nist_ec_curve, verify_signature

    made = keys.init(home, "riverside", None)
    private, public = keys.load(home, None).flower
    line = tmp_path / "node.pub"
    line.write_text(made.node)
    assert try_load_public_key(line) == public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert uses_nist_ec_curve(public)
    assert verify_signature(public, b"a moment", sign_message(private, b"a moment"))


def test_keys_are_never_overwritten(home: ClientHome) -> None:
    keys.init(home, "riverside", None)
    before = {path: path.read_bytes() for path in home.root.rglob("*") if path.is_file()}
    for name in ("riverside", "lakeside"):
        with pytest.raises(ConfigError, match=r"found riverside, whose keys are never overwritten.*another --home"):
            keys.init(home, name, None)
    assert {path: path.read_bytes() for path in home.root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("missing", [("card.json",), ("card.json", "policy.yaml"), ("card.json", "keys/node.pem")])
def test_a_half_finished_init_can_be_repeated(home: ClientHome, missing: tuple[str, ...]) -> None:
    made = keys.init(home, "riverside", SECRET)
    policy = "# edited\n" + home.policy.read_text()
    home.policy.write_text(policy)
    for name in missing:
        (home.root / name).unlink()
    kept = home.identity_key.read_bytes()
    (home.root / "keys" / ".node.pem.partial").write_text("half a key")
    with pytest.raises(ConfigError, match="expected a passphrase"):
        keys.init(home, "riverside", None)
    again = keys.init(home, "riverside", SECRET)
    assert home.identity_key.read_bytes() == kept
    assert again.identity == made.identity
    assert (again == made) == ("keys/node.pem" not in missing)
    assert (home.policy.read_text() == policy) == ("policy.yaml" not in missing)
    assert not list(home.root.rglob("*.partial"))


KILLED = """
import os, signal, sys
from pathlib import Path
from client import keys
from client.home import ClientHome
calls = 0
sync = os.fsync
def dying(handle):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    sync(handle)
os.fsync = dying
keys.init(ClientHome(Path(sys.argv[1])), "riverside", None)
"""


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("moment", [1, 2, 3, 4, 6, 8])
def test_a_kill_at_any_moment_leaves_what_init_can_finish(home: ClientHome, moment: int) -> None:
    killed = python(KILLED, str(home.root), str(moment))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not home.card.exists()
    keys.init(home, "riverside", None)
    assert keys.load(home, None).identity.name == "riverside"
    assert not list(home.root.rglob("*.partial"))


@pytest.mark.parametrize("limit", [0, 60, 200, 400])
def test_a_full_disk_leaves_what_init_can_finish(home: ClientHome, limit: int) -> None:
    script = (
        "import resource, sys\nfrom pathlib import Path\nfrom client import keys\nfrom client.home import ClientHome\n"
        "from common.errors import StorageError\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "try:\n    keys.init(ClientHome(Path(sys.argv[1])), 'riverside', None)\n"
        "except StorageError as error:\n    sys.exit(f'refused: {error}')\n"
    )
    done = python(script, str(home.root))
    assert "refused: cannot write" in done.stderr, done.stderr
    assert "PRIVATE" not in done.stderr
    assert not list(home.root.rglob("*.partial"))
    assert not home.card.exists()
    keys.init(home, "riverside", None)
    assert keys.load(home, None).identity.name == "riverside"


def test_two_at_once_make_one_institution(home: ClientHome) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom client import keys\nfrom client.home import ClientHome\n"
        "keys.init(ClientHome(Path(sys.argv[1])), sys.argv[2], None)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen([sys.executable, "-c", script, str(home.root), name], env=environment, stderr=subprocess.PIPE)
        for name in ("riverside", "lakeside")
    ]
    told = [process.communicate()[1] for process in running]
    assert sorted(process.returncode for process in running) == [0, 1]
    assert any(b"whose keys are never overwritten" in text for text in told)
    assert keys.load(home, None).identity.name in ("riverside", "lakeside")


@pytest.mark.parametrize("name", ["", "River Side", "coordinator", "pooled", "../up"])
def test_nothing_is_made_for_a_name_that_is_none(home: ClientHome, name: str) -> None:
    with pytest.raises(ConfigError, match="expected as an institution's name"):
        keys.init(home, name, None)
    with pytest.raises(ConfigError, match="at least 16 bytes"):
        keys.init(home, "riverside", b"short")
    assert not home.root.exists()


def test_a_home_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*file/home: File exists"):
        keys.init(ClientHome(tmp_path / "file" / "home"), "riverside", None)
    with pytest.raises(StorageError, match="cannot write /proc"):
        keys.init(ClientHome(Path("/proc/silotune")), "riverside", None)
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "open").chmod(0o755)
    with pytest.raises(ConfigError, match=r"found mode 0755; run: chmod 700"):
        keys.init(ClientHome(tmp_path / "open"), "riverside", None)
    assert list((tmp_path / "open").iterdir()) == []


# --- load ------------------------------------------------------------------------------------------------------------


def test_a_home_without_keys_says_what_to_run(home: ClientHome) -> None:
    for call in (lambda: keys.load(home, None), lambda: keys.card(home)):
        with pytest.raises(ConfigError, match="found none; run: silotune-client init"):
            call()


@pytest.mark.parametrize("name", ["keys/identity.pem", "keys/node.pem"])
def test_a_key_that_others_can_read_is_refused(home: ClientHome, name: str) -> None:
    keys.init(home, "riverside", None)
    (home.root / name).chmod(0o640)
    with pytest.raises(ConfigError, match=rf"{name}: .*found mode 0640; run: chmod 600 {home.root / name}"):
        keys.load(home, None)


@pytest.mark.parametrize("name", [".", "keys"])
def test_a_directory_that_others_can_enter_is_refused(home: ClientHome, name: str) -> None:
    keys.init(home, "riverside", None)
    (home.root / name).chmod(0o750)
    with pytest.raises(ConfigError, match=rf"found mode 0750; run: chmod 700 {home.root / name}"):
        keys.load(home, None)


@pytest.mark.parametrize("name", ["identity", "node"])
def test_a_missing_damaged_or_linked_key_is_refused(home: ClientHome, tmp_path: Path, name: str) -> None:
    keys.init(home, "riverside", None)
    file = home.root / "keys" / f"{name}.pem"
    whole = file.read_bytes()
    file.unlink()
    with pytest.raises(StorageError, match=rf"{name}.pem: cannot be read: No such file"):
        keys.load(home, None)
    elsewhere = tmp_path / "elsewhere.pem"
    elsewhere.write_bytes(whole)
    elsewhere.chmod(0o600)
    file.symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="found a link"):
        keys.load(home, None)
    file.unlink()
    file.touch(0o600)
    with pytest.raises(StorageError, match="expected a private key in PEM"):
        keys.load(home, None)


def test_keys_that_are_not_those_of_the_card_are_refused(home: ClientHome, tmp_path: Path) -> None:
    """Whoever exchanges the card, by which the pinned roster is verified, cannot make it fit the keys."""
    keys.init(home, "riverside", None)
    forged = Card.of(Identity.generate("riverside"), ec.generate_private_key(ec.SECP384R1()).public_key())
    write_private_json(home.card, forged.to_json(), replace=True)
    with pytest.raises(ConfigError, match="expected the card of the keys in"):
        keys.load(home, None)
    other = ClientHome(tmp_path / "other")
    keys.init(other, "riverside", None)
    for name in ("identity_key", "node_key"):
        third = ClientHome(tmp_path / name)
        keys.init(third, "riverside", None)
        getattr(third, name).write_bytes(getattr(other, name).read_bytes())
        with pytest.raises(ConfigError, match="expected the card of the keys in"):
            keys.load(third, None)


def test_a_changed_card_is_refused(home: ClientHome) -> None:
    keys.init(home, "riverside", None)
    said = json.loads(home.card.read_text())
    home.card.write_text(json.dumps({**said, "name": "lakeside"}))
    for call in (lambda: keys.load(home, None), lambda: keys.card(home)):
        with pytest.raises(ConfigError, match=r"card\.json: .*expected a signature of its own identity key"):
            call()


@pytest.mark.parametrize("given", [None, b"another passphrase"])
def test_a_wrong_or_missing_passphrase_is_refused(home: ClientHome, given: bytes | None) -> None:
    keys.init(home, "riverside", SECRET)
    with pytest.raises(ConfigError, match=r"expected (a|the) passphrase") as refused:
        keys.load(home, given)
    assert SECRET.decode() not in str(refused.value)
    assert "another passphrase" not in str(refused.value)


# --- Nothing shows them ----------------------------------------------------------------------------------------------


def test_no_text_form_no_log_and_no_pickle_shows_them(home: ClientHome, caplog: pytest.LogCaptureFixture) -> None:
    keys.init(home, "riverside", None)
    found = keys.load(home, None)
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("silotune.client").info("%s %r", found, found)
    shown = f"{found} {found!r} {found.identity!r} {found.node!r} {vars(found.identity)} {caplog.text}"
    assert [part for part in material(found) if part in shown] == []
    assert "riverside" in repr(found)
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            copied(found)


@pytest.mark.parametrize("passphrase", [None, SECRET])
def test_no_error_shows_them(home: ClientHome, passphrase: bytes | None) -> None:
    keys.init(home, "riverside", passphrase)
    private = material(keys.load(home, passphrase))
    pems = {file: file.read_bytes() for file in (home.identity_key, home.node_key)}
    told = ""
    for file, pem in pems.items():
        for damaged in (pem[:80], pem[:-40], pem.replace(b"A", b"B"), pem + pem, b"", pem[::-1], pem * 200):
            file.write_bytes(damaged)
            try:
                keys.load(home, passphrase)
            except SilotuneError as error:
                told += "".join(traceback.format_exception(error))
        file.write_bytes(pem)
    assert "expected" in told
    secrets = private | {line for pem in pems.values() for line in pem.decode().splitlines() if "-----" not in line}
    assert [part for part in secrets if part in told] == []
    assert SECRET.decode() not in told
