"""Certificates of the members' port: an authority of the coordinator's own, or files from elsewhere.

Every certificate that is taken into use has passed a TLS handshake in memory as a member makes it, once for each host.
"""

from __future__ import annotations

import ipaddress
import re
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import NamedTemporaryFile, gettempdir

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.enrolment import check_authority, check_host
from common.errors import ConfigError
from common.private_files import (
    keep_curve_key,
    private_directory,
    read_curve_key,
    read_file,
    read_private,
    write_private,
    writing,
)
from server.home import ServerHome

AUTHORITY_DAYS, SERVER_DAYS = 3650, 365

_LIMIT = 1 << 16
_CLOCKS = timedelta(hours=1)  # a certificate is valid a little before it was made, for clocks that are behind
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


@dataclass(frozen=True)
class Existing:
    """Files from elsewhere, all in PEM.

    certificate: of the server, with those between it and the authority after it. key: without a passphrase, and
    readable by its owner alone. authority: the certificate that members are to trust.
    """

    certificate: Path
    key: Path
    authority: Path


@dataclass(frozen=True)
class Expiry:
    """Until when the certificates are valid."""

    authority: datetime
    server: datetime


def make(home: ServerHome, federation: str, hosts: Sequence[str], passphrase: bytes | None, now: datetime) -> None:
    """Makes an authority and a server certificate; keys that are there already are kept. Call it under `locked`.

    Raises ConfigError for a key that cannot be used (see `read_curve_key`), and StorageError.
    """
    _directories(home)
    key = keep_curve_key(home.authority_key, passphrase)
    write_private(home.authority, _pem(authority_certificate(key, federation, now)), replace=True)
    _issue(home, hosts, key, now)


def renew(home: ServerHome, hosts: Sequence[str], passphrase: bytes | None, now: datetime) -> None:
    """Makes another server certificate from the same authority, for the key that is there. Call it under `locked`.

    The key is kept so that one file changes and a crash leaves a pair that fits; without a key, a new one is made.

    Raises ConfigError when the authority is not the coordinator's own, when it expires within a day, and for a key
    that cannot be used; StorageError.
    """
    if not home.authority_key.exists():
        raise ConfigError(
            f"{home.authority_key}: expected the authority's key, found none, since the certificates came from"
            " elsewhere; get new ones there, then run:"
            " silotune-server renew --certificate FILE --key FILE --authority FILE"
        )
    _issue(home, hosts, read_curve_key(home.authority_key, passphrase), now)


def take(home: ServerHome, hosts: Sequence[str], existing: Existing, replace: bool) -> None:
    """Copies certificates from elsewhere into the home, once they have proved to fit. Call it under `locked`.

    replace: whether they may take the place of others.

    Raises ConfigError when they do not belong together, do not cover a host, are expired or not yet valid, when the key
    has a passphrase or others can read it, and when another key is there already; StorageError.
    """
    if home.authority_key.exists():
        raise ConfigError(
            f"{home.authority_key}: expected no authority of the coordinator's own beside certificates from elsewhere,"
            " found its key; move it away, or leave --certificate, --key and --authority out"
        )
    key = read_private(existing.key, _LIMIT)
    chain = b"".join(found + b"\n" for found in _PEM.findall(read_file(existing.certificate, _LIMIT)))
    root = _pem(check_authority(_one_certificate(existing.authority, read_file(existing.authority, _LIMIT))))
    check(chain, existing.key, root, hosts)
    _directories(home)
    if not replace and home.tls_key.exists() and read_private(home.tls_key, _LIMIT) != key:
        raise ConfigError(f"{home.tls_key}: another key is there already, and is not overwritten; move it away first")
    write_private(home.tls_key, key, replace=True)
    write_private(home.tls_certificate, chain, replace=True)
    write_private(home.authority, root, replace=True)


def check(chain: bytes, key: Path, authority: bytes, hosts: Sequence[str]) -> None:
    """Makes the handshake of a member that trusts `authority`, in memory, once for each host.

    Raises ConfigError when key and certificate do not fit, and when a member would refuse: another authority, expired,
    a host not covered, not for a server.
    """
    with writing(Path(gettempdir())), NamedTemporaryFile() as file:
        file.write(chain)  # certificates are public; the key is read where it lies
        file.flush()
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            server.load_cert_chain(file.name, key, password=_no_passphrase)
        except (ssl.SSLError, ValueError, OSError) as error:
            why = "a key with a passphrase" if isinstance(error, _PassphraseError) else "files that do not fit together"
            raise ConfigError(
                f"certificate and key: expected a certificate in PEM and its own key without a passphrase, found {why};"
                " give the key that the certificate was made for"
            ) from None
    client = ssl.create_default_context(cadata=authority.decode("ascii"))
    for host in hosts:
        try:
            _handshake(server, client, host)
        except ssl.SSLError as error:
            why = getattr(error, "verify_message", "") or error.reason or "no common ground"
            raise ConfigError(
                f"certificate: expected one with which a member reaches {host}, found that it would refuse: {why}; give"
                " a certificate of this authority that is valid now and names every host"
            ) from None


def expiry(home: ServerHome) -> Expiry:
    """Raises ConfigError and StorageError when the certificates cannot be read."""
    authority = check_authority(authority_pem(home))
    return Expiry(authority.not_valid_after_utc, _server_certificate(home).not_valid_after_utc)


def authority_pem(home: ServerHome) -> str:
    """The authority's certificate. Raises ConfigError and StorageError when it cannot be read."""
    return _one_certificate(home.authority, read_file(home.authority, _LIMIT))


def authority_certificate(key: ec.EllipticCurvePrivateKey, federation: str, now: datetime) -> x509.Certificate:
    """Of an authority that may sign servers, and no other authority."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Silotune authority of {federation}"[:64])])
    return (
        _builder(name, name, key.public_key(), now, now + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )


def server_certificate(
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    public: ec.EllipticCurvePublicKey,
    hosts: Sequence[str],
    now: datetime,
) -> x509.Certificate:
    """Of a server that members reach as any of `hosts`; no longer valid than its authority."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Silotune coordinator")])
    end = min(now + timedelta(days=SERVER_DAYS), authority.not_valid_after_utc)
    return (
        _builder(name, authority.subject, public, now, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_alternative(host) for host in hosts]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA384())
    )


def _directories(home: ServerHome) -> None:
    for path in (home.tls_key.parent, home.tls_certificate.parent):
        private_directory(path)


def _issue(home: ServerHome, hosts: Sequence[str], key: ec.EllipticCurvePrivateKey, now: datetime) -> None:
    authority = check_authority(authority_pem(home))
    if authority.public_key() != key.public_key():
        raise ConfigError(
            f"{home.authority}: expected the certificate of {home.authority_key}, found another's; restore both"
            " together"
        )
    if authority.not_valid_after_utc - now < timedelta(days=1):
        raise ConfigError(
            f"{home.authority}: expected an authority that is valid for a day or longer, found its end at"
            f" {authority.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; run `silotune-server init` with another --home, and"
            " let members trust its roster"
        )
    own = keep_curve_key(home.tls_key, None)
    pem = _pem(server_certificate(authority, key, own.public_key(), hosts, now))
    check(pem, home.tls_key, _pem(authority), hosts)
    write_private(home.tls_certificate, pem, replace=True)


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now.astimezone(UTC) - _CLOCKS)
        .not_valid_after(end.astimezone(UTC))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    """Either signing certificates and lists of revoked ones, or signing a handshake."""
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(check_host(host)))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> bytes:
    pem: bytes = certificate.public_bytes(Encoding.PEM)
    return pem


def _one_certificate(path: Path, data: bytes) -> str:
    """The one certificate in a file that may say more around it, as OpenSSL's commands do."""
    found: list[bytes] = _PEM.findall(data)
    if len(found) != 1:
        raise ConfigError(f"{path}: expected one certificate in PEM, found {len(found)}; give the authority's own file")
    return (found[0] + b"\n").decode("ascii", "replace")


def _server_certificate(home: ServerHome) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(read_file(home.tls_certificate, _LIMIT))
    except (ValueError, x509.InvalidVersion):
        raise ConfigError(
            f"{home.tls_certificate}: expected a certificate in PEM, found something else; run: silotune-server renew"
        ) from None


class _PassphraseError(ValueError):
    """OpenSSL asked for one."""


def _no_passphrase() -> str:
    raise _PassphraseError


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> None:
    """Raises ssl.SSLError when either side refuses."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends: list[Callable[[], None]] = [
        client.wrap_bio(down, up, server_hostname=host).do_handshake,
        server.wrap_bio(up, down, server_side=True).do_handshake,
    ]
    while ends:
        for end in list(ends):
            try:
                end()
            except ssl.SSLWantReadError:
                continue
            ends.remove(end)
