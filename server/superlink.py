"""The coordinator's SuperLink: Flower's own process on the loopback interface, and its files.

Members reach it through server/front.py only; its Control API (server/operator.py: nodes, runs) and Runtime API
(server/loopback.py: the grid) are for this machine. Every private name of Flower that this side needs is in these two,
in server/calls.py and in the command line below; tests/server/test_flower_contract.py fails when one of them changes.
"""

from __future__ import annotations

import ipaddress
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from common.errors import ConfigError
from common.private_files import private_directory, write_private
from common.processes import Child

_SUPERLINK = "from flwr.superlink.cli import flower_superlink; flower_superlink()"
_CERTIFICATE_DAYS, _RENEW_DAYS = 3650, 365


@dataclass(frozen=True)
class Endpoint:
    """A SuperLink on this machine. root: its certificate in PEM. secret: what a ServerApp is taken over with."""

    address: str
    root: bytes = field(repr=False)
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class SuperLinkHome:
    """The files of a SuperLink, in a directory that only its owner may read."""

    directory: Path

    @property
    def database(self) -> Path:
        """Nodes, runs and messages; it keeps payloads and does not shrink."""
        return self.directory / "superlink.db"

    @property
    def secret(self) -> Path:
        return self.directory / "superexec.secret"

    @property
    def certificate(self) -> Path:
        """Self-signed, for the loopback interface alone; members never see it."""
        return self.directory / "loopback.crt"

    @property
    def key(self) -> Path:
        return self.directory / "loopback.key"

    @property
    def log(self) -> Path:
        return self.directory / "superlink.log"

    def prepare(self) -> None:
        """Makes what is missing, and renews the certificate in its last year. For one process at a time.

        Raises ConfigError for a directory that others can enter, and StorageError when it cannot be written.
        """
        private_directory(self.directory)
        if not self.secret.is_file():
            write_private(self.secret, secrets.token_hex(32).encode("ascii"))
        if not self._certificate_serves():
            certificate, key = loopback_certificate()
            write_private(self.key, key, replace=True)
            write_private(self.certificate, certificate, replace=True)

    def endpoint(self, port: int) -> Endpoint:
        """Where and how the SuperLink of this directory is asked. Raises ConfigError when there never was one."""
        try:
            return Endpoint(f"127.0.0.1:{port}", self.certificate.read_bytes(), self.secret.read_bytes())
        except OSError as error:
            raise ConfigError(f"{self.directory}: no SuperLink was started here yet ({error.strerror})") from error

    def _certificate_serves(self) -> bool:
        try:
            found = x509.load_pem_x509_certificate(self.certificate.read_bytes())
            key = load_pem_private_key(self.key.read_bytes(), None)
        except (OSError, ValueError):
            return False
        lasts = found.not_valid_after_utc > datetime.now(UTC) + timedelta(days=_RENEW_DAYS)
        return lasts and key.public_key() == found.public_key()  # unlike after a crash between the two


def start_superlink(home: SuperLinkHome, port: int) -> Child:
    """Flower's SuperLink on 127.0.0.1, with node authentication, and nobody but a holder of the secret may run an app.

    home: prepared. It answers some seconds later: see `server.operator.wait_until_ready`.
    """
    arguments = [
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--ssl-ca-certfile", str(home.certificate)),
        *("--ssl-certfile", str(home.certificate)),
        *("--ssl-keyfile", str(home.key)),
        "--enable-supernode-auth",
        *("--isolation", "process"),
        *("--superexec-auth-secret-file", str(home.secret)),
        *("--database", str(home.database)),
        "--disable-runtime-dependency-installation",
    ]
    quiet = {"FLWR_LOG_LEVEL": "WARNING"}  # else two lines for every call
    return Child(_SUPERLINK, arguments, home.log, {"FLWR_HOME": str(home.directory / "flower"), **quiet})


def loopback_certificate() -> tuple[bytes, bytes]:
    """A certificate for 127.0.0.1 that vouches for itself, and its key, both in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "silotune loopback")])
    begin = datetime.now(UTC) - timedelta(minutes=5)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=_CERTIFICATE_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return certificate.public_bytes(Encoding.PEM), private
