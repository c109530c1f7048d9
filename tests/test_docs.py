"""The documents, where they must keep in step with the code or with what a reader's renderer makes of them."""

from __future__ import annotations

import re
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest

from common.config import PrivacyConfig

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("simulations/**/*.md")})


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_table_has_a_head(file: Path) -> None:
    """Rows below a blank line are no part of the table above it, and are shown as text."""
    lines = ["", *file.read_text(encoding="utf-8").splitlines(), ""]
    first = [number for number, (above, line) in enumerate(pairwise(lines), 1) if line[:1] == "|" and above[:1] != "|"]
    assert [n for n in first if not re.fullmatch(r"\|(:?-+:?\|)+", lines[n + 1].replace(" ", ""))] == []


def test_the_settings_of_privacy_are_listed_with_their_defaults() -> None:
    text = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    table = text.split("| setting | default |")[1].split("\n\n")[0]
    listed = re.findall(r"^\| `privacy\.(\w+)` \| (\S+) \|", table, re.MULTILINE)
    said = {
        key: f"`{value}`" if isinstance(value, str) else f"{value:g}" for key, value in asdict(PrivacyConfig()).items()
    }
    assert dict(listed) == said
