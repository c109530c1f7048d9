"""Files that are their owner's alone, passphrases, and the keys that both protect."""

from __future__ import annotations

import base64
import os
import re
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from common.errors import ConfigError, SilotuneError, StorageError
from common.private_files import (
    check_new_passphrase,
    keep_curve_key,
    keep_identity_key,
    locked,
    private_directory,
    read_curve_key,
    read_identity_key,
    read_passphrase,
    read_private,
    sweep,
    write_private,
)

SECRET = b"correct horse battery staple"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- Private files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def wide_open() -> Iterator[None]:
    """A user who lets everyone read new files."""
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.usefixtures("wide_open")
def test_private_files_are_private_from_their_first_byte_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    opened = os.open

    def watched(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        handle = opened(path, flags, *arguments, **named)
        if flags & os.O_CREAT:
            assert flags & os.O_EXCL
            modes.append(stat.S_IMODE(os.fstat(handle).st_mode))
        return handle

    monkeypatch.setattr(os, "open", watched)
    private_directory(tmp_path / "keys")
    write_private(tmp_path / "keys" / "a", b"secret")
    write_private(tmp_path / "keys" / "a", b"other", replace=True)
    assert modes == [0o600, 0o600]
    assert mode(tmp_path / "keys") == 0o700
    assert mode(tmp_path / "keys" / "a") == 0o600
    assert read_private(tmp_path / "keys" / "a", 5) == b"other"
    assert names(tmp_path / "keys") == ["a"]


def test_what_is_there_is_never_overwritten_unasked(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for path in (kept, tmp_path / "link"):
        with pytest.raises(ConfigError, match="is there already, and is never overwritten"):
            write_private(path, b"new")
    assert kept.read_text() == "kept"
    assert names(tmp_path) == ["kept", "link"]


def test_links_are_not_followed_when_writing(tmp_path: Path) -> None:
    """Neither one in the file's own place nor one that lies where the unfinished file goes."""
    victim = tmp_path / "victim"
    victim.write_text("kept")
    home = tmp_path / "home"
    home.mkdir(0o700)
    for name in ("file", ".file.partial"):
        (home / name).symlink_to(victim)
    write_private(home / "file", b"new", replace=True)
    assert victim.read_text() == "kept"
    assert not (home / "file").is_symlink()
    assert names(home) == ["file"]


def test_what_a_kill_left_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / ".identity.pem.partial").write_text("half a key")
    (tmp_path / "identity.pem").write_text("a key")
    sweep(tmp_path)
    assert names(tmp_path) == ["identity.pem"]


@pytest.mark.parametrize("replace_it", [False, True])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, replace_it: bool) -> None:
    if replace_it:
        (tmp_path / "file").write_text("kept")
    script = (
        "import resource, sys\nfrom pathlib import Path\nfrom common.private_files import *\n"
        "from common.errors import StorageError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try:\n    write_private(Path(sys.argv[1]) / 'file', b'secret' * 100, sys.argv[2] == 'True')\n"
        "except StorageError as error:\n    sys.exit(f'refused: {error}')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", script, str(tmp_path), str(replace_it)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "refused: cannot write" in done.stderr, done.stderr
    assert "File too large. Free space or choose a writable directory" in done.stderr
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == ({"file": "kept"} if replace_it else {})


def test_directories_that_others_can_enter_are_refused_with_the_remedy(tmp_path: Path) -> None:
    loose = tmp_path / "a place"
    loose.mkdir()
    for bits in (0o755, 0o710, 0o701, 0o770, 0o777):
        loose.chmod(bits)
        with pytest.raises(ConfigError, match=rf"found mode {bits:04o}; run: chmod 700 '{re.escape(str(loose))}'$"):
            private_directory(loose)
        assert mode(loose) == bits
    loose.chmod(0o700)
    private_directory(loose)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="expected a directory"):
        private_directory(tmp_path / "file")
    with pytest.raises(StorageError, match="cannot write"):
        private_directory(tmp_path / "file" / "below")


def test_private_files_that_others_can_read_are_refused_with_the_remedy(tmp_path: Path) -> None:
    file = tmp_path / "a key"
    file.write_bytes(b"secret")
    for bits in (0o640, 0o604, 0o644, 0o620, 0o602, 0o610, 0o777):
        file.chmod(bits)
        with pytest.raises(ConfigError, match=rf"found mode {bits:04o}; run: chmod 600 '{re.escape(str(file))}'"):
            read_private(file, 100)
    for bits in (0o600, 0o400):
        file.chmod(bits)
        assert read_private(file, 100) == b"secret"
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(ConfigError, match="expected a plain file, found a link"):
        read_private(tmp_path / "link", 100)


def test_files_of_another_user_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_bytes(b"secret")
    file.chmod(0o600)
    me = os.geteuid()
    for now, owner, refused in ((1000, 1001, True), (1000, 1000, False), (1000, 0, False), (0, 1001, False)):
        found = os.fstat

        def seen(handle: int, owner: int = owner, found: Callable[[int], os.stat_result] = found) -> os.stat_result:
            real = list(found(handle))
            real[stat.ST_UID] = owner
            return os.stat_result(real)

        with monkeypatch.context() as patched:
            patched.setattr(os, "geteuid", lambda now=now: now)
            patched.setattr(os, "fstat", seen)
            if refused:
                with pytest.raises(ConfigError, match=f"expected user {now} or root as its owner, found user {owner}"):
                    read_private(file, 100)
            else:
                assert read_private(file, 100) == b"secret"
    assert os.geteuid() == me


NOBODY = 2**32 - 1
SYSTEMD = ((0x01, 4, NOBODY), (0x02, 4, os.geteuid()), (0x04, 0, NOBODY), (0x10, 4, NOBODY), (0x20, 0, NOBODY))


def access_list(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


@pytest.mark.parametrize(
    ("access", "alone"),
    [
        pytest.param(access_list(*SYSTEMD), True, id="as systemd gives it to a service"),
        pytest.param(access_list(*SYSTEMD[:1], (0x02, 4, 4711), *SYSTEMD[2:]), False, id="another user"),
        pytest.param(access_list(*SYSTEMD, (0x02, 4, 4711)), False, id="another user besides"),
        pytest.param(access_list(*SYSTEMD[:2], (0x04, 4, NOBODY), *SYSTEMD[3:]), False, id="the group"),
        pytest.param(access_list(*SYSTEMD, (0x08, 4, 100)), False, id="a group"),
        pytest.param(access_list(*SYSTEMD[:4], (0x20, 4, NOBODY)), False, id="everyone"),
        pytest.param(b"", False, id="no list"),
        pytest.param(access_list(*SYSTEMD)[:-1], False, id="a cut list"),
        pytest.param(b"\x03" + access_list(*SYSTEMD)[1:], False, id="a list of another form"),
    ],
)
def test_systemd_s_access_lists_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, access: bytes, alone: bool
) -> None:
    """The mode shows the list's mask, 0440, in the group's place."""
    file = tmp_path / "credential"
    file.write_bytes(b"secret")
    file.chmod(0o440)
    monkeypatch.setattr(os, "getxattr", lambda handle, name: access)
    if alone:
        assert read_private(file, 100) == b"secret"
    else:
        with pytest.raises(ConfigError, match="found mode 0440"):
            read_private(file, 100)


def test_one_at_a_time(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom common.private_files import locked\n"
        "file = Path(sys.argv[1]) / 'count'\n"
        "for _ in range(20):\n"
        "    with locked(Path(sys.argv[1])):\n"
        "        found = int(file.read_text())\n        time.sleep(0.002)\n        file.write_text(str(found + 1))\n"
    )
    (tmp_path / "count").write_text("0")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", script, str(tmp_path)]
    running = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "60"


def test_a_lock_is_let_go_when_something_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path):
        raise RuntimeError
    with locked(tmp_path):
        assert mode(tmp_path / ".lock") == 0o600


# --- Passphrases -----------------------------------------------------------------------------------------------------


def pipe(data: bytes) -> int:
    there, here = os.pipe()
    os.write(here, data)
    os.close(here)
    return there


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_passphrase_comes_over_a_file_descriptor(end: bytes) -> None:
    assert read_passphrase(pipe(SECRET + end), None) == SECRET
    assert read_passphrase(None, None) is None


@pytest.mark.parametrize("said", [b"", b"\n", SECRET + b"\nmore", b"\n" + SECRET, b"x" * 1025, b"a\0b", b"x" * 60_000])
def test_what_is_no_passphrase_is_refused(said: bytes) -> None:
    with pytest.raises(ConfigError, match="expected as passphrase one line") as refused:
        read_passphrase(pipe(said), None)
    assert SECRET.decode() not in str(refused.value)


def test_a_passphrase_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "passphrase"
    file.write_bytes(SECRET)
    for bits, right in ((0o600, True), (0o400, True), (0o640, False), (0o604, False)):
        file.chmod(bits)
        with file.open("rb") as handle:
            if right:
                assert read_passphrase(handle.fileno(), None) == SECRET
            else:
                with pytest.raises(ConfigError, match=rf"found mode {bits:04o}; run: chmod 600"):
                    read_passphrase(handle.fileno(), None)


@pytest.mark.parametrize("descriptor", [-1, 999, 2**31, 2**70])
def test_a_file_descriptor_that_is_not_open_is_refused(descriptor: int) -> None:
    with pytest.raises(ConfigError, match="expected an open file descriptor"):
        read_passphrase(descriptor, None)


def test_a_passphrase_comes_as_a_credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(ConfigError, match="LoadCredential="):
        read_passphrase(None, "silotune")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    file = tmp_path / "silotune"
    file.write_bytes(SECRET + b"\n")
    file.chmod(0o400)
    assert read_passphrase(None, "silotune") == SECRET
    file.chmod(0o444)
    with pytest.raises(ConfigError, match="found mode 0444"):
        read_passphrase(None, "silotune")
    with pytest.raises(StorageError, match="cannot be read"):
        read_passphrase(None, "missing")
    for name in ("", ".", "..", "../secret", "/etc/hostname", "a\0b"):
        with pytest.raises(ConfigError, match="expected the name of a credential"):
            read_passphrase(None, name)
    with pytest.raises(ConfigError, match="found both"):
        read_passphrase(0, "silotune")


def test_new_keys_are_not_protected_by_a_short_passphrase() -> None:
    check_new_passphrase(None)
    check_new_passphrase(b"x" * 16)
    with pytest.raises(ConfigError, match="at least 16 bytes") as refused:
        check_new_passphrase(b"hunter2")
    assert "hunter2" not in str(refused.value)


# --- Keys ------------------------------------------------------------------------------------------------------------

KINDS = {"identity": (keep_identity_key, read_identity_key), "node": (keep_curve_key, read_curve_key)}


def material(key: Any) -> set[str]:
    """The private parts of a key, as somebody might show them."""
    der = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    if isinstance(key, Ed25519PrivateKey):
        raw = key.private_bytes_raw()
    else:
        raw = key.private_numbers().private_value.to_bytes(48, "big")
    numbers = {str(int.from_bytes(raw, "big")), str(list(raw))}
    return {raw.hex(), repr(raw), base64.b64encode(raw).decode()[:-4], base64.b64encode(der).decode()[20:60]} | numbers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passphrase", [None, SECRET])
def test_a_key_is_made_once(tmp_path: Path, kind: str, passphrase: bytes | None) -> None:
    keep, read = KINDS[kind]
    file = tmp_path / "key.pem"
    made = keep(file, passphrase)
    assert mode(file) == 0o600
    before = file.read_bytes()
    assert (b"BEGIN ENCRYPTED PRIVATE KEY" in before) == (passphrase is not None)
    for again in (keep(file, passphrase), read(file, passphrase)):
        assert material(again) == material(made)
    assert file.read_bytes() == before
    loaded = serialization.load_pem_private_key(before, passphrase)  # PKCS8, which every tool reads
    assert material(loaded) == material(made)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_passphrase_is_told_from_a_missing_one(tmp_path: Path, kind: str) -> None:
    keep, read = KINDS[kind]
    keep(tmp_path / "locked.pem", SECRET)
    keep(tmp_path / "open.pem", None)
    for name, passphrase, told in (
        ("locked.pem", None, "expected a passphrase for this key, found none; give --passphrase-fd"),
        ("locked.pem", b"another passphrase", "expected the passphrase of this key, found another"),
        ("open.pem", SECRET, "expected no passphrase, since this key has none"),
    ):
        for call in (keep, read):
            with pytest.raises(ConfigError, match=told) as refused:
                call(tmp_path / name, passphrase)
            assert SECRET.decode() not in str(refused.value)
            assert "another passphrase" not in str(refused.value)


def test_keys_of_other_kinds_are_refused(tmp_path: Path) -> None:
    keep_identity_key(tmp_path / "identity.pem", None)
    keep_curve_key(tmp_path / "node.pem", None)
    small = ec.generate_private_key(ec.SECP256R1())
    write_private(tmp_path / "small.pem", small.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    for read, name in (
        (read_identity_key, "node.pem"),
        (read_curve_key, "identity.pem"),
        (read_curve_key, "small.pem"),
        (read_identity_key, "small.pem"),
    ):
        with pytest.raises(ConfigError, match="found one of another kind"):
            read(tmp_path / name, None)


def leaks(error: BaseException, key: Any) -> set[str]:
    """Private parts in anything that could be shown of an error, what led to it included."""
    told, seen = "", error
    while seen is not None:
        told += f"{seen}{seen!r}{seen.args}"
        seen = seen.__cause__  # type: ignore[assignment]
    return {part for part in material(key) if part in told}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passphrase", [None, SECRET])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda pem: b"", id="empty"),
        pytest.param(lambda pem: pem[: len(pem) // 2], id="cut"),
        pytest.param(lambda pem: b"\xff\x00" * 50, id="binary"),
        pytest.param(lambda pem: pem.replace(b"M", b"N", 3), id="changed"),
        pytest.param(lambda pem: pem[:60] + b"\n" + pem[61:], id="broken"),
        pytest.param(lambda pem: pem * 200, id="huge"),
        pytest.param(lambda pem: pem.replace(b"PRIVATE", b"PUBLIC"), id="called public"),
    ],
)
def test_damaged_keys_are_refused_without_showing_them(
    tmp_path: Path, kind: str, passphrase: bytes | None, damage: Callable[[bytes], bytes]
) -> None:
    keep, read = KINDS[kind]
    file = tmp_path / "key.pem"
    key = keep(file, passphrase)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(SilotuneError, match=r"expected.*found") as refused:
        read(file, passphrase)
    assert leaks(refused.value, key) == set()
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__ or refused.value.__context__ is None


def test_a_missing_key_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"key\.pem: cannot be read: No such file"):
        read_identity_key(tmp_path / "key.pem", None)
