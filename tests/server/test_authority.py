"""Certificates of the members' port, tried with real handshakes over sockets."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
import stat
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.enrolment import certificate_fingerprint
from common.errors import ConfigError, StorageError
from common.private_files import (
    private_directory,
    read_curve_key,
    read_private,
)
from server import authority
from server.authority import Existing
from server.home import ServerHome

NOW = datetime.now(UTC)
HOSTS = ("coordinator.example.org", "127.0.0.1", "::1")
SECRET = b"correct horse battery staple"


@pytest.fixture
def home(tmp_path: Path) -> ServerHome:
    made = ServerHome(tmp_path / "home")
    private_directory(made.root)
    return made


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def reached(home: ServerHome, host: str, trusted: Path, strict: bool = True) -> str:
    """The version of TLS that a member and a server with the home's files agree on, over a real socket."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(home.tls_certificate, home.tls_key)
    client = ssl.create_default_context(cafile=str(trusted))
    if strict:
        client.verify_flags |= ssl.VERIFY_X509_STRICT
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with contextlib.suppress(OSError), server.wrap_socket(connection, server_side=True) as secured:
                secured.recv(1)

        serving = threading.Thread(target=serve)
        serving.start()
        try:
            with (
                socket.create_connection(listening.getsockname()) as plain,
                client.wrap_socket(plain, server_hostname=host) as secured,
            ):
                secured.send(b"x")
                return str(secured.version())
        finally:
            serving.join()


# --- An authority of the coordinator's own ---------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
def test_a_member_reaches_every_host(home: ServerHome, host: str) -> None:
    authority.make(home, "oncology", HOSTS, None, NOW)
    assert reached(home, host, home.authority) == "TLSv1.3"


def test_a_member_refuses_another_authority_and_another_host(home: ServerHome, tmp_path: Path) -> None:
    authority.make(home, "oncology", HOSTS, None, NOW)
    other = ServerHome(tmp_path / "other")
    private_directory(other.root)
    authority.make(other, "oncology", HOSTS, None, NOW)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"unable to get local issuer|signature failure"):
        reached(home, HOSTS[0], other.authority)
    for host in ("other.example.org", "example.org", "127.0.0.2", "localhost"):
        with pytest.raises(ssl.SSLCertVerificationError, match=r"is not valid for|doesn't match"):
            reached(home, host, home.authority)


def test_the_certificates_say_what_they_are_for(home: ServerHome) -> None:
    authority.make(home, "oncology", HOSTS, None, NOW)
    root, leaf = certificate(home.authority), certificate(home.tls_certificate)

    def found(of: x509.Certificate, kind: type[x509.ExtensionType]) -> x509.Extension[x509.ExtensionType]:
        return of.extensions.get_extension_for_class(kind)

    assert found(root, x509.BasicConstraints).critical
    assert found(root, x509.BasicConstraints).value == x509.BasicConstraints(ca=True, path_length=0)
    assert found(leaf, x509.BasicConstraints).value == x509.BasicConstraints(ca=False, path_length=None)
    signs, handshakes = found(root, x509.KeyUsage).value, found(leaf, x509.KeyUsage).value
    assert isinstance(signs, x509.KeyUsage)
    assert isinstance(handshakes, x509.KeyUsage)
    assert (signs.key_cert_sign, signs.crl_sign, signs.digital_signature) == (True, True, False)
    assert (handshakes.key_cert_sign, handshakes.crl_sign, handshakes.digital_signature) == (False, False, True)
    assert found(leaf, x509.ExtendedKeyUsage).value == x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    names = found(leaf, x509.SubjectAlternativeName).value
    assert isinstance(names, x509.SubjectAlternativeName)
    assert names.get_values_for_type(x509.DNSName) == ["coordinator.example.org"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    assert leaf.issuer == root.subject == root.issuer
    leaf.verify_directly_issued_by(root)
    assert root.not_valid_after_utc - NOW > timedelta(days=3649)
    assert timedelta(days=364) < leaf.not_valid_after_utc - NOW <= timedelta(days=365)
    assert leaf.not_valid_before_utc < NOW
    ends = authority.expiry(home)
    assert (ends.authority, ends.server) == (root.not_valid_after_utc, leaf.not_valid_after_utc)


def test_serial_numbers_are_random(home: ServerHome) -> None:
    authority.make(home, "oncology", HOSTS, None, NOW)
    seen = {certificate(home.authority).serial_number, certificate(home.tls_certificate).serial_number}
    for _ in range(3):
        authority.renew(home, HOSTS, None, NOW)
        seen.add(certificate(home.tls_certificate).serial_number)
    assert len(seen) == 5
    assert min(seen) > 1 << 64


def test_files_are_private_and_the_authority_s_key_has_the_passphrase(home: ServerHome) -> None:
    authority.make(home, "oncology", HOSTS, SECRET, NOW)
    for file in (home.authority_key, home.tls_key, home.authority, home.tls_certificate):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert b"BEGIN ENCRYPTED" in home.authority_key.read_bytes()
    for given in (None, b"another passphrase"):
        with pytest.raises(ConfigError, match=r"expected (a|the) passphrase"):
            authority.renew(home, HOSTS, given, NOW)
    authority.renew(home, HOSTS, SECRET, NOW)
    assert reached(home, HOSTS[0], home.authority)


def test_openssl_agrees(home: ServerHome) -> None:
    authority.make(home, "oncology", HOSTS, None, NOW)
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile"]
    done = subprocess.run([*command, home.authority, home.tls_certificate], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    command = ["openssl", "x509", "-noout", "-fingerprint", "-sha256", "-in", str(home.authority)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.split("=")[1].strip().replace(":", "").lower() == certificate_fingerprint(authority.authority_pem(home))


def test_renewal_keeps_authority_and_key(home: ServerHome) -> None:
    authority.make(home, "oncology", ("old.example.org",), None, NOW)
    kept = {file: file.read_bytes() for file in (home.authority, home.authority_key, home.tls_key)}
    authority.renew(home, ("new.example.org",), None, NOW)
    assert {file: file.read_bytes() for file in kept} == kept
    assert reached(home, "new.example.org", home.authority)
    with pytest.raises(ssl.SSLCertVerificationError):
        reached(home, "old.example.org", home.authority)
    home.tls_key.unlink()  # how a key is changed
    authority.renew(home, ("new.example.org",), None, NOW)
    assert home.tls_key.read_bytes() != kept[home.tls_key]
    assert reached(home, "new.example.org", home.authority)


def test_no_certificate_outlives_its_authority(home: ServerHome) -> None:
    authority.make(home, "oncology", HOSTS, None, NOW)
    old = authority.authority_certificate(read_curve_key(home.authority_key, None), "oncology", NOW - timedelta(3600))
    home.authority.write_bytes(pem(old))
    authority.renew(home, HOSTS, None, NOW)
    ends = authority.expiry(home)
    assert ends.server == ends.authority < NOW + timedelta(days=51)


def test_an_authority_that_ends_is_refused(home: ServerHome) -> None:
    authority.make(home, "oncology", HOSTS, None, NOW)
    with pytest.raises(ConfigError, match="expected an authority that is valid for a day or longer"):
        authority.renew(home, HOSTS, None, NOW + timedelta(days=3650))


def test_an_authority_that_is_not_the_key_s_is_refused(home: ServerHome, tmp_path: Path) -> None:
    authority.make(home, "oncology", HOSTS, None, NOW)
    other = ServerHome(tmp_path / "other")
    private_directory(other.root)
    authority.make(other, "oncology", HOSTS, None, NOW)
    home.authority.write_bytes(other.authority.read_bytes())
    with pytest.raises(ConfigError, match="found another's; restore both together"):
        authority.renew(home, HOSTS, None, NOW)


def test_a_certificate_that_would_be_refused_is_not_taken_into_use(home: ServerHome) -> None:
    authority.make(home, "oncology", HOSTS, None, NOW)
    before = home.tls_certificate.read_bytes()
    with pytest.raises(ConfigError, match="certificate has expired"):
        authority.renew(home, HOSTS, None, NOW - timedelta(days=400))
    assert home.tls_certificate.read_bytes() == before


def test_a_full_disk_leaves_the_certificate_that_was_there(home: ServerHome, monkeypatch: pytest.MonkeyPatch) -> None:
    authority.make(home, "oncology", HOSTS, None, NOW)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(StorageError, match="No space left on device"):
            authority.renew(home, HOSTS, None, NOW)
    assert reached(home, HOSTS[0], home.authority)


# --- Certificates from elsewhere -------------------------------------------------------------------------------------

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True)
class Issuer:
    name: str
    key: Key
    certificate: x509.Certificate


def issuer(name: str, above: Issuer | None = None, key: Key | None = None) -> Issuer:
    own = key or ec.generate_private_key(ec.SECP256R1())
    made = issue(name, own, above or Issuer(name, own, None), authority=True)  # type: ignore[arg-type]
    return Issuer(name, own, made)


def issue(
    name: str,
    key: Key,
    above: Issuer,
    hosts: Sequence[str] = (),
    authority: bool = False,
    start: datetime = NOW - timedelta(days=1),
    end: datetime = NOW + timedelta(days=90),
    usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.SERVER_AUTH,
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, above.name)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(above.key.public_key()), critical=False)
    )
    if hosts:
        names: list[x509.GeneralName] = []
        for host in hosts:
            try:
                names.append(x509.IPAddress(ipaddress.ip_address(host)))
            except ValueError:
                names.append(x509.DNSName(host))
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if not authority:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    return builder.sign(above.key, hashes.SHA256())


def pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(made.public_bytes(Encoding.PEM) for made in certificates)


def private(key: Key, encryption: KeySerializationEncryption | None = None) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())


@dataclass(frozen=True)
class Bought:
    """A root, one between, and a server's certificate, as files."""

    root: Issuer
    between: Issuer
    key: Key
    files: Existing


@pytest.fixture(scope="module", params=["ec", "rsa"])
def shop(request: pytest.FixtureRequest) -> tuple[Issuer, Issuer, Key]:
    root = issuer("A root")
    between = issuer("One between", root)
    key = rsa.generate_private_key(65537, 2048) if request.param == "rsa" else ec.generate_private_key(ec.SECP256R1())
    return root, between, key


@pytest.fixture
def bought(shop: tuple[Issuer, Issuer, Key], tmp_path: Path) -> Bought:
    root, between, key = shop
    files = Existing(tmp_path / "server.crt", tmp_path / "server.key", tmp_path / "root.crt")
    files.certificate.write_bytes(pem(issue("server", key, between, HOSTS), between.certificate))
    files.key.write_bytes(private(key))
    files.key.chmod(0o600)
    files.authority.write_bytes(b"# A remark\n" + pem(root.certificate))
    return Bought(root, between, key, files)


def test_certificates_from_elsewhere_are_taken(home: ServerHome, bought: Bought) -> None:
    authority.take(home, HOSTS, bought.files, replace=False)
    assert home.authority.read_bytes() == pem(bought.root.certificate)
    for host in HOSTS:
        assert reached(home, host, home.authority, strict=False)
    assert stat.S_IMODE(home.tls_key.stat().st_mode) == 0o600
    assert read_private(home.tls_key, 1 << 14) == private(bought.key)
    with pytest.raises(ConfigError, match="certificates came from elsewhere"):
        authority.renew(home, HOSTS, None, NOW)


def refused(home: ServerHome, files: Existing, told: str, hosts: Sequence[str] = HOSTS) -> None:
    with pytest.raises(ConfigError, match=told):
        authority.take(home, hosts, files, replace=False)
    assert not home.tls_key.exists()
    assert not home.tls_certificate.exists()
    assert not home.authority.exists()


def test_what_does_not_fit_is_refused(home: ServerHome, bought: Bought, tmp_path: Path) -> None:
    files, between = bought.files, bought.between
    key = ec.generate_private_key(ec.SECP256R1())

    def other(certificate: x509.Certificate, *more: x509.Certificate) -> Existing:
        file = tmp_path / "other.crt"
        file.write_bytes(pem(certificate, *more))
        return replace(files, certificate=file)

    def made(**said: object) -> Existing:
        return other(issue("server", bought.key, between, HOSTS, **said), between.certificate)  # type: ignore[arg-type]

    stranger = issuer("A root")
    another_root = tmp_path / "another.crt"
    another_root.write_bytes(pem(stranger.certificate))
    refused(home, replace(files, authority=another_root), "would refuse: .*(issuer|signature)")
    refused(home, other(issue("server", key, between, HOSTS), between.certificate), "do not fit together")
    refused(home, other(issue("server", bought.key, between, HOSTS)), "would refuse: unable to get local issuer")
    refused(home, files, r"a member reaches elsewhere\.org, found that it would refuse", (*HOSTS, "elsewhere.org"))
    refused(home, made(end=NOW - timedelta(hours=1)), "certificate has expired")
    refused(home, made(start=NOW + timedelta(days=1)), "not yet valid")
    refused(home, made(usage=ExtendedKeyUsageOID.CLIENT_AUTH), "would refuse: .*purpose")
    refused(home, replace(files, authority=files.certificate), "expected one certificate in PEM, found 2")
    leaf = other(issue("server", bought.key, between, HOSTS))
    refused(home, replace(files, authority=leaf.certificate), r"of an authority \(CA: true\)")


@pytest.mark.parametrize(
    "content", [b"", b"\xff\x00" * 50, b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"]
)
@pytest.mark.parametrize("which", ["certificate", "key", "authority"])
def test_files_that_are_none_of_these_are_refused(home: ServerHome, bought: Bought, which: str, content: bytes) -> None:
    getattr(bought.files, which).write_bytes(content)
    refused(home, bought.files, "expected")


def test_keys_that_others_can_read_or_that_ask_for_a_passphrase_are_refused(home: ServerHome, bought: Bought) -> None:
    bought.files.key.chmod(0o644)
    refused(home, bought.files, r"found mode 0644; run: chmod 600 \S+server\.key")
    bought.files.key.write_bytes(private(bought.key, BestAvailableEncryption(SECRET)))
    bought.files.key.chmod(0o600)
    refused(home, bought.files, "found a key with a passphrase")


def test_other_keys_are_replaced_only_when_asked(home: ServerHome, bought: Bought) -> None:
    authority.take(home, HOSTS, bought.files, replace=False)
    authority.take(home, HOSTS, bought.files, replace=False)  # a half-finished init, repeated
    key = ec.generate_private_key(ec.SECP256R1())
    bought.files.certificate.write_bytes(pem(issue("server", key, bought.between, HOSTS), bought.between.certificate))
    bought.files.key.write_bytes(private(key))
    with pytest.raises(ConfigError, match="another key is there already"):
        authority.take(home, HOSTS, bought.files, replace=False)
    assert home.tls_key.read_bytes() == private(bought.key)
    authority.take(home, HOSTS, bought.files, replace=True)
    assert home.tls_key.read_bytes() == private(key)


def test_an_authority_of_ones_own_is_not_mixed_with_another(home: ServerHome, bought: Bought) -> None:
    authority.make(home, "oncology", HOSTS, None, NOW)
    for again in (False, True):
        with pytest.raises(ConfigError, match="expected no authority of the coordinator's own"):
            authority.take(home, HOSTS, bought.files, replace=again)
    assert reached(home, HOSTS[0], home.authority)
