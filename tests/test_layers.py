"""The layer rule: who may import whom. Imports are read from the source, those inside functions included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MAY_IMPORT = {
    "common": {"common"},
    "client": {"client", "common"},
    "server": {"server", "common"},
    "simulations": {"simulations", "client", "server", "common"},
}

FLOWER_RIM = {
    "client/app.py",
    "server/app.py",
    "common/flower.py",
    "server/flower.py",
    "simulations/engine.py",
    "simulations/institutions.py",
}
"""The only modules that know Flower; everything else runs in a test without it."""

FILES = sorted(file for package in MAY_IMPORT for file in (ROOT / package).rglob("*.py"))


def imported(source: str, package: str) -> Iterator[str]:
    """Full names of the modules that a source imports; relative ones are within its own package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield package if node.level else node.module or ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            # A name that is computed cannot be judged, so it is not allowed either.
            literal = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else "a computed name"
            yield str(literal)


def test_every_package_is_looked_at() -> None:
    assert {file.relative_to(ROOT).parts[0] for file in FILES} == set(MAY_IMPORT)
    assert len(FILES) > 30


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_imports_go_one_way(file: Path) -> None:
    package = file.relative_to(ROOT).parts[0]
    ours = {name.partition(".")[0] for name in imported(file.read_text(), package)} & {*MAY_IMPORT, "tests"}
    assert ours <= MAY_IMPORT[package]


def test_flower_stays_at_the_rim() -> None:
    knowing = {
        file.relative_to(ROOT).as_posix()
        for file in FILES
        if any(name.partition(".")[0] == "flwr" for name in imported(file.read_text(), file.parent.name))
    }
    assert knowing <= FLOWER_RIM


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import simulations.run", ["simulations.run"]),
        ("from server import report", ["server"]),
        ("def f():\n    from flwr.app import Message", ["flwr.app"]),
        ("if TYPE_CHECKING:\n    import client", ["client"]),
        ("from .other import x", ["common"]),
        ("import importlib\nimportlib.import_module('server.app')", ["importlib", "server.app"]),
    ],
)
def test_every_form_of_import_is_seen(source: str, found: list[str]) -> None:
    assert list(imported(source, "common")) == found
