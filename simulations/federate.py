"""A federation in this very process, without an engine: the rounds and messages of every run."""

from __future__ import annotations

from pathlib import Path

from common.config import Config
from server.coordinator import Observer, coordinate
from server.rounds import Progress
from simulations.identities import SimulatedIdentities
from simulations.institutions import virtual
from simulations.layout import RunDirectory
from simulations.members import InProcessMembers


def federate(config: Config, home: RunDirectory, records: Path, validation: Path) -> Progress:
    """Trains in `home`, or goes on there, and leaves the published adapter in its folder `adapter`.

    records: a folder for each institution. validation: the coordinator's own records.

    Raises what `coordinate` raises, RunStopped when updates are void among them.
    """
    names = config.data.names
    identities = SimulatedIdentities.fresh(names) if config.secure_aggregation.enabled else None
    members = InProcessMembers([virtual(config, home, name, records, identities) for name in names])
    roster = identities.roster() if identities else None
    return coordinate(config, home.root, validation, members, Observer(), roster=roster).progress
