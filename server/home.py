"""Where a coordinator keeps keys, certificates, roster, services and runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "SILOTUNE_SERVER_HOME"


@dataclass(frozen=True)
class ServerHome:
    """The directory of one coordinator; readable by its owner alone."""

    root: Path

    @classmethod
    def at(cls, path: Path | None) -> ServerHome:
        """The given directory, else the one that SILOTUNE_SERVER_HOME names, else ~/.silotune/server."""
        return cls((path or Path(os.environ.get(VARIABLE, "~/.silotune/server"))).expanduser().absolute())

    @property
    def settings(self) -> Path:
        """Host names, ports and whatever else `init` was told."""
        return self.root / "server.yaml"

    @property
    def identity_key(self) -> Path:
        """Ed25519, PEM: signs rosters and published adapters."""
        return self.root / "keys" / "identity.pem"

    @property
    def authority_key(self) -> Path:
        """Of the certificate authority that `init` made; not there with certificates from elsewhere."""
        return self.root / "keys" / "authority.pem"

    @property
    def authority(self) -> Path:
        """Certificate of the authority, which members pin."""
        return self.root / "tls" / "authority.crt"

    @property
    def tls_key(self) -> Path:
        return self.root / "keys" / "tls.pem"

    @property
    def tls_certificate(self) -> Path:
        return self.root / "tls" / "server.crt"

    @property
    def roster(self) -> Path:
        """Every member's card, signed by the coordinator; the file that members trust."""
        return self.root / "roster.json"

    @property
    def services(self) -> Path:
        """State of the SuperLink and what runs beside it: database, secret, sockets, logs."""
        return self.root / "services"

    @property
    def runs(self) -> Path:
        """One directory a run."""
        return self.root / "runs"
