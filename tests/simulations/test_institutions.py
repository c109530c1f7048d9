"""Institutions of the simulation: what the configuration can ask of them."""

from __future__ import annotations

from common.config_rules import RULES
from simulations.institutions import FAULTS


def test_the_configuration_knows_every_fault_and_no_other() -> None:
    rule = RULES["simulation.faults"]
    assert rule.holds([f"riverside:{fault}" for fault in FAULTS])
    assert not rule.holds(["riverside:other"])
    assert all(fault in rule.allowed for fault in FAULTS)
