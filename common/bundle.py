"""The application bundle of every run: what Flower asks for, without code."""

from __future__ import annotations

import hashlib
import io
import zipfile

_PYPROJECT = """\
[project]
name = "silotune"
version = "1"
description = "Names what is installed; holds no code."
license = { text = "Apache-2.0" }
dependencies = []

[tool.flwr.app]
publisher = "silotune"

[tool.flwr.app.components]
serverapp = "server.app:installed"
clientapp = "client.app:installed"
"""


def bundle() -> bytes:
    """The bundle of every run: a project file without code, the same bytes on every machine.

    Flower has no run without a bundle. Members hash it and list the hash in their policy; nobody unpacks it.
    """
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        entry = zipfile.ZipInfo("pyproject.toml", date_time=(1980, 1, 1, 0, 0, 0))
        entry.create_system = 3
        entry.external_attr = 0o644 << 16
        archive.writestr(entry, _PYPROJECT)
    return packed.getvalue()


def bundle_digest() -> str:
    """SHA-256 of `bundle`, in hex, as members list it."""
    return hashlib.sha256(bundle()).hexdigest()
