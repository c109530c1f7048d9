"""The SuperLink's files, and how it starts."""

from __future__ import annotations

import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509

from common.errors import ConfigError
from common.processes import Child
from server import superlink
from server.calls import ServiceError
from server.operator import wait_until_ready
from server.superlink import SuperLinkHome, loopback_certificate
from tests.deployments import free_port


def test_what_is_secret_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    home = SuperLinkHome(tmp_path / "services")
    home.prepare()
    for path in (home.secret, home.key):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.directory.stat().st_mode) == 0o700
    before = home.secret.read_bytes(), home.certificate.read_bytes()
    home.prepare()
    assert (home.secret.read_bytes(), home.certificate.read_bytes()) == before


def test_a_certificate_in_its_last_year_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = SuperLinkHome(tmp_path)
    monkeypatch.setattr(superlink, "_CERTIFICATE_DAYS", 300)
    home.prepare()
    before = home.certificate.read_bytes()
    monkeypatch.undo()
    home.prepare()
    assert home.certificate.read_bytes() != before
    assert x509.load_pem_x509_certificate(home.certificate.read_bytes()).not_valid_after_utc.year > 2030


def test_a_key_that_a_crash_left_without_its_certificate_is_not_used(tmp_path: Path) -> None:
    home = SuperLinkHome(tmp_path / "services")
    home.prepare()
    before = home.certificate.read_bytes()
    home.key.write_bytes(loopback_certificate()[1])
    home.prepare()
    assert home.certificate.read_bytes() != before
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(home.certificate, home.key)


def test_a_directory_without_a_superlink_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no SuperLink was started here"):
        SuperLinkHome(tmp_path).endpoint(1)


def test_a_superlink_that_does_not_start_is_told(tmp_path: Path) -> None:
    home = SuperLinkHome(tmp_path)
    home.prepare()
    child = Child("raise SystemExit(3)", [], home.log)
    with pytest.raises(ServiceError, match="ended with code 3"):
        wait_until_ready(home.endpoint(free_port()), child)
    with pytest.raises(ServiceError, match="no SuperLink at"):
        wait_until_ready(home.endpoint(free_port()), timeout_s=0.3)
