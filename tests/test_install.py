"""The wheel, built, unpacked elsewhere and used from there: it must not lean on the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Installed:
    """wheel: the built file. site: where it was installed, without what it depends on. work: an empty directory."""

    wheel: Path
    site: Path
    work: Path

    def call(self, *command: str) -> str:
        """Standard output of a command that runs from `work` and finds the installed packages before the checkout."""
        environment = {**os.environ, "PYTHONPATH": str(self.site)}
        done = subprocess.run(command, cwd=self.work, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    base = tmp_path_factory.mktemp("install")
    work, dist, site = base / "work", base / "dist", base / "site"
    work.mkdir()
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), str(ROOT)]
    subprocess.run(build, cwd=work, check=True, capture_output=True)
    (wheel,) = dist.glob("silotune-*.whl")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(install, cwd=work, check=True, capture_output=True)
    return Installed(wheel, site, work)


def test_everything_that_is_not_code_ships(installed: Installed) -> None:
    shipped = set(zipfile.ZipFile(installed.wheel).namelist())
    patterns = ("common/embedded/*", "server/*.j2")
    data = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}
    assert {"common/embedded/model.safetensors", "common/embedded/config.json", "server/report.html.j2"} <= data
    configs = {f"common/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert {"common/configs/hospitals.yaml", "common/configs/banks.yaml", "common/configs/smoke.yaml"} <= configs
    assert data | configs <= shipped


def test_every_module_ships(installed: Installed) -> None:
    shipped = set(zipfile.ZipFile(installed.wheel).namelist())
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in ("common", "client", "server", "simulations")
        for path in (ROOT / package).rglob("*.py")
    }
    assert {"common/secagg/participant.py", "client/secure.py", "server/secure.py"} <= modules
    assert modules <= shipped


def test_nothing_else_ships(installed: Installed) -> None:
    folders = {name.partition("/")[0] for name in zipfile.ZipFile(installed.wheel).namelist()}
    assert folders == {"common", "client", "server", "simulations", "silotune-0.1.0.dist-info"}


def test_the_embedded_model_stays_small() -> None:
    assert sum(path.stat().st_size for path in (ROOT / "common" / "embedded").rglob("*") if path.is_file()) <= 12e6


def test_configurations_are_found_by_name(installed: Installed) -> None:
    code = "from common.config_files import configs_dir, load; print(configs_dir()); print(load('hospitals').name)"
    assert installed.call(sys.executable, "-c", code).split() == [str(installed.site / "common/configs"), "hospitals"]


def test_the_embedded_model_is_found(installed: Installed) -> None:
    code = "from common.base_model import model_directory; print(model_directory('embedded'))"
    assert installed.call(sys.executable, "-c", code).strip() == str(installed.site / "common/embedded")


def test_the_commands_run(installed: Installed) -> None:
    scripts = installed.site / "bin"
    told = json.loads(installed.call(str(scripts / "silotune-sim"), "data", "hospitals", "--out", "records", "--json"))
    assert list(told["institutions"]) == ["riverside", "northgate", "lakeside", "summit"]
    test = Path("records") / "coordinator" / "test.jsonl"
    assert "coding" in installed.call(str(scripts / "silotune-client"), "data", str(test))
    for command in ("silotune-sim", "silotune-server", "silotune-client"):
        assert installed.call(str(scripts / command), "--version").strip() == "silotune 0.1.0"
