"""Files and directories that their owner alone can read, the private keys in them, and the passphrases of those.

No text form, log line or error of anything here holds a key or a passphrase.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat

from common.errors import ConfigError, StorageError

SHORTEST_PASSPHRASE = 16
"""Bytes; a PEM file stretches a passphrase little (PBKDF2, 2048 times), so a guessable one protects nothing."""

_LONGEST_PASSPHRASE = 1024
_KEY_LIMIT = 1 << 14
_PRIVATE, _PRIVATE_DIRECTORY = 0o600, 0o700


def read_file(path: Path, limit: int) -> bytes:
    """All of a plain file of at most `limit` bytes.

    Raises StorageError when it cannot be read, and ConfigError when it is a directory, a device or a pipe, or longer.
    """
    return _read(path, limit, follow=True, private=False)


# --- Files that are their owner's alone ------------------------------------------------------------------------------


def private_directory(path: Path) -> None:
    """Makes a directory that its owner alone can enter, and those above it where they are missing.

    Raises ConfigError when it is there and others can enter it, with the command that mends it; StorageError when it
    cannot be made.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir(_PRIVATE_DIRECTORY)
        except FileExistsError:
            check_private_directory(path)
        else:
            _sync(path.parent)


def check_private_directory(path: Path) -> None:
    """Raises ConfigError unless this is a directory of one's own that nobody else can enter."""
    try:
        found = path.stat()
    except OSError as error:
        raise StorageError(f"{path}: cannot be looked at: {error.strerror}; give another --home") from None
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{path}: expected a directory, found something else; give another --home")
    if found.st_mode & 0o077:
        raise ConfigError(
            f"{path}: expected a directory that its owner alone can enter, found mode"
            f" {stat.S_IMODE(found.st_mode):04o}; run: chmod 700 {shlex.quote(str(path))}"
        )
    _check_owner(path, found.st_uid)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Whoever else does this for the same directory waits until it is done. Raises StorageError."""
    path = directory / ".lock"
    with writing(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, _PRIVATE)
    try:
        with writing(path):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_private(path: Path, data: bytes, replace: bool = False) -> None:
    """Writes a file that its owner alone can read, from its first byte on; all of it or nothing.

    Raises ConfigError when a file is there and `replace` is not asked for, and StorageError when the disk is full or
    read-only; what was there is then as it was. Call it under `locked`.
    """
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        partial.unlink(missing_ok=True)  # of a command that was killed
        try:
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _PRIVATE)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(handle)
            if replace:
                partial.replace(path)
            else:
                path.hardlink_to(partial)  # unlike a rename, never onto what is there
        except FileExistsError:
            raise ConfigError(f"{path}: is there already, and is never overwritten; keep it, or move it away") from None
        finally:
            partial.unlink(missing_ok=True)
        _sync(path.parent)


def write_private_json(path: Path, value: Mapping[str, Any], replace: bool = False) -> None:
    """As `write_private`, an object as indented JSON."""
    write_private(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode(), replace)


def sweep(directory: Path) -> None:
    """Removes what a killed command left half written. Call it under `locked`. Raises StorageError."""
    with writing(directory):
        for left in directory.glob(".*.partial"):
            left.unlink()


def read_private(path: Path, limit: int) -> bytes:
    """All of a plain file of one's own.

    Raises ConfigError when it is a link or not a plain file, when others can read or change it (with the command that
    mends it), or when it is longer; StorageError when it cannot be read.
    """
    return _read(path, limit, follow=False, private=True)


def _read(path: Path, limit: int, follow: bool, private: bool) -> bytes:
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe would wait for a writer
    try:
        handle = os.open(path, flags if follow else flags | os.O_NOFOLLOW)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise ConfigError(f"{path}: expected a plain file, found something else; give the path of a file")
            if private:
                _check_private(path, handle)
            data = file.read(limit + 1)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ConfigError(f"{path}: expected a plain file, found a link; put the file itself there") from None
        if error.errno == errno.EISDIR:
            raise ConfigError(f"{path}: expected a plain file, found a directory; give the path of a file") from None
        raise StorageError(f"{path}: cannot be read: {error.strerror}; see that it is there and readable") from None
    if len(data) > limit:
        raise ConfigError(f"{path}: expected at most {limit} bytes, found more; give the right file")
    return data


def _check_private(path: Path, handle: int) -> None:
    found = os.fstat(handle)
    if found.st_mode & 0o077 and not _for_me_alone(_access_list(handle)):
        raise ConfigError(
            f"{path}: expected a file that its owner alone can read, found mode {stat.S_IMODE(found.st_mode):04o}; run:"
            f" chmod 600 {shlex.quote(str(path))} and, if others have read it, make a new secret"
        )
    _check_owner(path, found.st_uid)


def _check_owner(path: Path, owner: int) -> None:
    me = os.geteuid()
    if me and owner not in (me, 0):  # root reads what is a service's own
        raise ConfigError(f"{path}: expected user {me} or root as its owner, found user {owner}; take ownership of it")


def _access_list(handle: int) -> bytes:
    try:
        return os.getxattr(handle, "system.posix_acl_access")
    except OSError:
        return b""


def _for_me_alone(access: bytes) -> bool:
    """Whether a POSIX access list lets in its owner and this user only.

    systemd gives a credential to a service that way: the mode then shows the list's mask where the group's bits were.
    Layout: linux/posix_acl_xattr.h.
    """
    version, user_object, user, mask = 2, 0x01, 0x02, 0x10
    if len(access) < 4 or len(access) % 8 != 4 or struct.unpack_from("<I", access)[0] != version:
        return False
    entries = list(struct.iter_unpack("<HHI", access[4:]))
    return all(
        not permissions or tag in (user_object, mask) or (tag == user and who in (0, os.geteuid()))
        for tag, permissions, who in entries
    )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the operating system says of `path` into a StorageError with a remedy."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}. Free space or choose a writable directory, then run the same"
            " command again; what was there is as it was."
        ) from None


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- Private keys ----------------------------------------------------------------------------------------------------


def read_passphrase(descriptor: int | None, credential: str | None) -> bytes | None:
    """The passphrase on a file descriptor or in a systemd credential; None when neither is named.

    Raises ConfigError when both are named, when there is none, when it has more than one line, and when others can
    read the file it comes from.
    """
    if descriptor is None and credential is None:
        return None
    if descriptor is not None and credential is not None:
        raise ConfigError("expected one of --passphrase-fd and --passphrase-credential, found both; give one")
    said = _from_descriptor(descriptor) if descriptor is not None else _from_credential(credential or "")
    line = said.removesuffix(b"\n").removesuffix(b"\r")
    if not line or len(line) > _LONGEST_PASSPHRASE or any(mark in line for mark in (b"\n", b"\r", b"\0")):
        raise ConfigError(
            f"expected as passphrase one line of 1 to {_LONGEST_PASSPHRASE} bytes, found none or something else; see"
            " what is written there"
        )
    return line


def _from_descriptor(descriptor: int) -> bytes:
    name = Path(f"file descriptor {descriptor}")
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            _check_private(name, descriptor)
        said = b""
        while len(said) <= _LONGEST_PASSPHRASE + 2 and (more := os.read(descriptor, 4096)):
            said += more
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--passphrase-fd: expected an open file descriptor to read from, found {descriptor} ({why}); open it in"
            " the shell, as in --passphrase-fd 3 3<FILE"
        ) from None
    return said


def _from_credential(name: str) -> bytes:
    directory = os.environ.get("CREDENTIALS_DIRECTORY", "")
    if not directory:
        raise ConfigError(
            "--passphrase-credential: expected CREDENTIALS_DIRECTORY, which systemd sets, found none; run the command"
            " in a unit with LoadCredential= or LoadCredentialEncrypted=, or give --passphrase-fd"
        )
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ConfigError(f"--passphrase-credential: expected the name of a credential, found {name!r:.80}")
    return read_private(Path(directory) / name, _LONGEST_PASSPHRASE + 2)


def check_new_passphrase(passphrase: bytes | None) -> None:
    """Raises ConfigError for a passphrase that is too short to protect a new key."""
    if passphrase is not None and len(passphrase) < SHORTEST_PASSPHRASE:
        raise ConfigError(
            f"expected a passphrase of at least {SHORTEST_PASSPHRASE} bytes, found a shorter one; a generated one is"
            " best, such as from: openssl rand -hex 24"
        )


def keep_identity_key(path: Path, passphrase: bytes | None) -> Ed25519PrivateKey:
    """The Ed25519 key in a file; where there is none, a new one, written as PKCS8 in PEM. Call it under `locked`.

    Raises as `read_identity_key` and `write_private` do.
    """
    if os.path.lexists(path):
        return read_identity_key(path, passphrase)
    key = Ed25519PrivateKey.generate()
    write_private(path, _private_pem(key, passphrase))
    return key


def keep_curve_key(path: Path, passphrase: bytes | None) -> ec.EllipticCurvePrivateKey:
    """As `keep_identity_key`, for ECDSA P-384."""
    if os.path.lexists(path):
        return read_curve_key(path, passphrase)
    key = ec.generate_private_key(ec.SECP384R1())
    write_private(path, _private_pem(key, passphrase))
    return key


def read_identity_key(path: Path, passphrase: bytes | None) -> Ed25519PrivateKey:
    """The Ed25519 key in a file that its owner alone can read.

    Raises ConfigError when the file is not private (see `read_private`), when the passphrase is missing, wrong or too
    much, and when the key is of another kind; StorageError when it is missing or damaged. No error shows any of it.
    """
    key = _read_key(path, passphrase)
    if not isinstance(key, Ed25519PrivateKey):
        raise _other_kind(path, "Ed25519")
    return key


def read_curve_key(path: Path, passphrase: bytes | None) -> ec.EllipticCurvePrivateKey:
    """As `read_identity_key`, for ECDSA P-384."""
    key = _read_key(path, passphrase)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise _other_kind(path, "ECDSA P-384")
    return key


def _other_kind(path: Path, wanted: str) -> ConfigError:
    return ConfigError(f"{path}: expected a key for {wanted}, found one of another kind; restore the file")


def _private_pem(key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey, passphrase: bytes | None) -> bytes:
    protection = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)


def _read_key(path: Path, passphrase: bytes | None) -> object:
    pem = read_private(path, _KEY_LIMIT)
    encrypted = b"BEGIN ENCRYPTED PRIVATE KEY" in pem
    if encrypted and passphrase is None:
        raise ConfigError(
            f"{path}: expected a passphrase for this key, found none; give --passphrase-fd or --passphrase-credential"
        )
    if passphrase is not None and not encrypted and b"PRIVATE KEY" in pem:
        raise ConfigError(f"{path}: expected no passphrase, since this key has none, found one; leave it out")
    try:
        return serialization.load_pem_private_key(pem, passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        if encrypted:
            raise ConfigError(
                f"{path}: expected the passphrase of this key, found another, or the file is damaged; give the right"
                " one, or restore the file"
            ) from None
        raise StorageError(f"{path}: expected a private key in PEM, found something else; restore the file") from None
