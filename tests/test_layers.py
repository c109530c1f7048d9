"""The layer rule: who may import whom. Imports are read from the source, those inside functions included."""

from __future__ import annotations

import ast
import re
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
    "client/calls.py",
    "client/departures.py",
    "client/fleet.py",
    "client/node.py",
    "client/node_memory.py",
    "server/app.py",
    "server/calls.py",
    "server/loopback.py",
    "server/operator.py",
    "simulations/benchmarks/secagg.py",
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


NO_IO = sorted((ROOT / "common" / "secagg").rglob("*.py"))
PURE = {
    "__future__",
    "base64",
    "collections",
    "contextlib",
    "cryptography",
    "dataclasses",
    "enum",
    "functools",
    "hashlib",
    "itertools",
    "json",
    "math",
    "numpy",
    "operator",
    "secrets",  # the operating system's generator: the one thing from outside
    "struct",
    "types",
    "typing",
    "common",
}
"""All that the protocol of secure aggregation may import: no file, no network, no clock, no log."""

OF_COMMON = {"common.secagg", "common.errors", "common.fixed_point"}
"""What it may use of our own; these have no I/O either."""

TOUCHES_THE_OUTSIDE = re.compile(
    r"(open|input|print|exec|eval|compile|breakpoint|__import__|globals|locals)"
    r"|.*\.(open|read_text|read_bytes|write_text|write_bytes|tofile|fromfile|memmap|loadtxt|savetxt|genfromtxt)"
    r"|(np|numpy)\.(load|save|savez|savez_compressed|DataSource)"
    r"|json\.(load|dump)"
)
"""Calls by which what is imported above could still reach a file or the screen."""


def called(source: str) -> Iterator[str]:
    """What a source calls, or hands on to be called, as it is written there."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield ast.unparse(node)


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


def test_every_part_of_the_protocol_is_looked_at() -> None:
    names = {file.stem for file in NO_IO}
    assert names >= {"aggregator", "attempt", "identity", "masks", "messages", "participant", "sealing", "shamir"}


@pytest.mark.parametrize("file", NO_IO, ids=lambda file: file.stem)
def test_secure_aggregation_does_no_io(file: Path) -> None:
    source = file.read_text()
    modules = set(imported(source, "common.secagg"))
    assert {name.partition(".")[0] for name in modules} <= PURE
    ours = {name for name in modules if name.partition(".")[0] == "common"}
    assert all(any(name == root or name.startswith(f"{root}.") for root in OF_COMMON) for name in ours)
    assert [name for name in called(source) if TOUCHES_THE_OUTSIDE.fullmatch(name)] == []


@pytest.mark.parametrize("module", ["common/errors.py", "common/fixed_point.py", "common/adapter.py"])
def test_what_it_leans_on_does_no_io_either(module: str) -> None:
    source = (ROOT / module).read_text()
    modules = set(imported(source, "common"))
    assert {name.partition(".")[0] for name in modules} <= PURE
    assert {name for name in modules if name.startswith("common")} <= {"common.errors", "common.adapter"}
    assert [name for name in called(source) if TOUCHES_THE_OUTSIDE.fullmatch(name)] == []


@pytest.mark.parametrize(
    "source",
    [
        "open('a')",
        "with open('a', 'wb') as file: pass",
        "Path('a').write_bytes(b'')",
        "vector.tofile('a')",
        "np.save('a', vector)",
        "x = list(map(open, names))",
        "json.dump(state, file)",
        "print(secret)",
        "def f():\n    return __import__('os')",
    ],
)
def test_every_way_out_is_seen(source: str) -> None:
    assert any(TOUCHES_THE_OUTSIDE.fullmatch(name) for name in called(source))


@pytest.mark.parametrize("module", ["socket", "pathlib", "time", "logging", "os", "io", "sys", "subprocess", "flwr"])
def test_what_reaches_outside_is_not_among_what_it_may_import(module: str) -> None:
    assert module not in PURE
    assert set(imported(f"import {module}", "common")) == {module}
