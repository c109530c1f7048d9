"""`silotune-sim attack`: what it takes. `tests/simulations/test_run.py` has one on a finished run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from simulations.main import app

NAMES = ("canary", "membership", "coordinator", "extraction")


def test_every_attack_is_a_command() -> None:
    said = CliRunner().invoke(app, ["attack", "--help"]).output
    assert all(name in said for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_help_and_mistakes_come_before_anything_is_done(name: str, tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["attack", name, "--help"])
    assert run.exit_code == 0
    assert "--json" in run.output
    run = CliRunner().invoke(app, ["attack", name, "smoke", "train.batch_sise=3", "--out", str(tmp_path / "new")])
    assert run.exit_code == 2
    assert not (tmp_path / "new").exists()


def test_help_loads_no_torch() -> None:
    code = "import sys, simulations.main; sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
