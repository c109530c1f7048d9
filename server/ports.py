"""Whether a service can listen where it shall, told before it is started."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import time

from common.errors import ConfigError

_PATIENCE_S = 7.0  # services whose parent was killed need up to five seconds to end


def check_address(listen: str) -> None:
    """Raises ConfigError for what is no IP address."""
    try:
        ipaddress.ip_address(listen)
    except ValueError:
        raise ConfigError(
            "--listen: expected an IP address of this machine, 0.0.0.0 or :: for all of a kind, found"
            f" {ascii(listen)[:80]}; give one"
        ) from None


def check_free(host: str, port: int, key: str) -> None:
    """Waits a little for a port that is taken. key: what it is called in server.yaml.

    Raises ConfigError when nobody can listen there.
    """
    end = time.monotonic() + _PATIENCE_S
    while (error := _refusal(host, port)) == errno.EADDRINUSE and time.monotonic() < end:
        time.sleep(0.2)
    if error:
        raise ConfigError(
            f"{key}: expected that a service can listen on port {port} of {host}, found: {os.strerror(error).lower()};"
            f" {_remedy(error, port, key)}"
        )


def _remedy(error: int, port: int, key: str) -> str:
    change = f"change {key} in server.yaml and run `silotune-server renew`"
    match error:
        case errno.EADDRINUSE:
            return f"stop what listens there (`ss -ltnp 'sport = :{port}'` shows it), or {change}"
        case errno.EACCES:
            return f"allow this user ports below 1024 (CAP_NET_BIND_SERVICE), or {change}"
        case errno.EADDRNOTAVAIL:
            return "give an address of this machine with --listen"
    return change


def _refusal(host: str, port: int) -> int:
    """The system's number for why not, or 0."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the services do
        try:
            found.bind((host, port))
            found.listen(1)
        except OSError as error:
            return error.errno or errno.EINVAL
    return 0
