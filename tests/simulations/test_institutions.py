"""Institutions of the simulation: what the configuration can ask of them."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

from common.config import Config, DataConfig, named
from common.config_rules import RULES
from simulations.institutions import FAULTS, SILENT, VirtualInstitutions, virtual
from simulations.layout import RunDirectory


def test_the_configuration_knows_every_fault_and_no_other() -> None:
    rule = RULES["simulation.faults"]
    known = [*FAULTS, SILENT]
    assert all(rule.holds([f"riverside:{fault}"]) and fault in rule.allowed for fault in known)
    assert not rule.holds(["riverside:other"])


def test_what_travels_with_every_message_stays_small() -> None:
    names = [f"institution-{number:04d}" for number in range(1000)]
    config = Config(data=DataConfig(institutions=named(*names), train_records=[40] * 1000))
    institutions = VirtualInstitutions.of(config, Path("/run"))
    assert institutions.names == tuple(names)
    assert len(pickle.dumps(institutions)) < len(pickle.dumps(tuple(names))) + 4000


def test_many_institutions_in_one_process_keep_their_logs_and_no_file_open(tmp_path: Path) -> None:
    names = [f"institution-{number}" for number in range(20)]
    config = Config(data=DataConfig(institutions=named(*names)))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for line in ("first", "second"):
        for name in names:
            virtual(config, RunDirectory(tmp_path), name, tmp_path / "data")
            logging.getLogger(f"silotune.client.{name}").warning("%s line", line)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
    for name in names:
        lines = (tmp_path / "institutions" / name / "client.log").read_text().splitlines()
        assert [line.split(" WARNING ")[1] for line in lines] == ["first line", "second line"]
