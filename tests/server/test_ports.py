"""Whether a service can listen somewhere."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from common.errors import ConfigError
from server import ports
from server.ports import check_address, check_free
from tests.deployments import free_port


@pytest.fixture
def taken() -> socket.socket:
    found = socket.socket()
    found.bind(("127.0.0.1", 0))
    found.listen(1)
    return found


def test_a_port_that_is_taken_is_told_with_what_to_do(taken: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_PATIENCE_S", 0.3)
    with taken:
        port = taken.getsockname()[1]
        for host in ("127.0.0.1", "0.0.0.0"):
            with pytest.raises(
                ConfigError, match=f"port: expected .* {port} of {host}, found: address .* in use; stop"
            ):
                check_free(host, port, "port")


def test_a_port_that_comes_free_is_waited_for(taken: socket.socket) -> None:
    port = taken.getsockname()[1]
    threading.Timer(0.5, taken.close).start()
    begin = time.monotonic()
    check_free("127.0.0.1", port, "port")
    assert time.monotonic() - begin > 0.3


def test_one_that_others_have_just_used_is_free() -> None:
    port = free_port()
    check_free("127.0.0.1", port, "port")
    check_free("127.0.0.1", port, "port")


def test_an_address_of_another_machine_is_told() -> None:
    with pytest.raises(ConfigError, match="give an address of this machine with --listen"):
        check_free("192.0.2.1", free_port(), "port")


@pytest.mark.parametrize("listen", ["0.0.0.0", "::", "127.0.0.1", "::1"])
def test_an_address_is_one(listen: str) -> None:
    check_address(listen)


@pytest.mark.parametrize("listen", ["", "localhost", "0.0.0.0:9443", "*"])
def test_anything_else_is_none(listen: str) -> None:
    with pytest.raises(ConfigError, match="--listen: expected an IP address"):
        check_address(listen)
