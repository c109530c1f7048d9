"""Where an institution's daemon keeps what is its own: keys, policy, roster, runs and logs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "SILOTUNE_CLIENT_HOME"


@dataclass(frozen=True)
class ClientHome:
    """The directory of one institution on one machine; readable by its owner alone."""

    root: Path

    @classmethod
    def at(cls, path: Path | None) -> ClientHome:
        """The given directory, else the one that SILOTUNE_CLIENT_HOME names, else ~/.silotune/client."""
        return cls((path or Path(os.environ.get(VARIABLE, "~/.silotune/client"))).expanduser().absolute())

    @property
    def identity_key(self) -> Path:
        """Ed25519, PEM: signs this institution's part of secure aggregation, and its logs."""
        return self.root / "keys" / "identity.pem"

    @property
    def node_key(self) -> Path:
        """ECDSA P-384, PEM: how Flower knows this node."""
        return self.root / "keys" / "node.pem"

    @property
    def card(self) -> Path:
        """What the coordinator gets: name and public keys."""
        return self.root / "card.json"

    @property
    def policy(self) -> Path:
        """What this institution agrees to."""
        return self.root / "policy.yaml"

    @property
    def data(self) -> Path:
        """Which of its files stands behind which data set's name, and which machine trains on it."""
        return self.root / "data.yaml"

    @property
    def roster(self) -> Path:
        """The roster that was compared over another channel and pinned."""
        return self.root / "roster.json"

    @property
    def runs(self) -> Path:
        """One directory a run: state, marks, metrics."""
        return self.root / "runs"

    @property
    def egress(self) -> Path:
        """Directory of the egress log."""
        return self.root / "egress"

    @property
    def ledger(self) -> Path:
        """Directory of the privacy ledger."""
        return self.root / "ledger"

    @property
    def adapters(self) -> Path:
        """Published adapters, one directory a run."""
        return self.root / "adapters"

    @property
    def control(self) -> Path:
        """What the commands and the daemon tell each other: paused, approved runs, status."""
        return self.root / "control"

    @property
    def log(self) -> Path:
        """The daemon's own log, which may speak of data and stays here."""
        return self.root / "client.log"
