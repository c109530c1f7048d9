"""What becomes of a verdict: it is of the run that was attacked, on the console and in that run's report."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from server import report
from simulations.attacks.result import Measure, Result, judged
from simulations.layout import RunDirectory
from tests.server.test_attack_results import run_directory
from tests.server.test_report import Page


def of_run(promised: bool, kept: bool) -> Result:
    measures = [Measure("federated", "said, x1", 1.0, "4 of 4")]
    return judged("extraction", "differential privacy", promised, kept, "Claimed.", "It says 11 secrets.", measures)


@pytest.mark.parametrize(
    ("promised", "kept", "verdict"),
    [(True, True, "held"), (True, False, "broken"), (False, True, "not promised"), (False, False, "broken")],
)
def test_only_a_run_that_promises_can_hold(promised: bool, kept: bool, verdict: str) -> None:
    result = of_run(promised, kept)
    assert result.verdict == verdict
    assert result.claim.endswith("Claimed.")
    assert result.finding.startswith("It says 11 secrets.")
    for text, words in ((result.claim, "promises nothing"), (result.finding, "which is not this run")):
        assert (words in text) is not promised


def test_an_unprotected_run_says_so_on_its_page_and_on_the_console(tmp_path: Path) -> None:
    result = of_run(promised=False, kept=True)
    directory = run_directory(tmp_path)
    result.write(RunDirectory.at(directory))
    report.write(directory)
    page = Page((directory / "report.html").read_text())
    console = Console(file=io.StringIO(), width=200)
    console.print(result.table())
    printed: str = console.file.getvalue()  # type: ignore[attr-defined]
    for text in (page.text, " ".join(printed.split())):
        assert "not promised" in text
        assert "This run has no differential privacy and promises nothing against this attack. Claimed." in text
        assert "It says 11 secrets. The same with differential privacy, which is not this run, held." in text
    assert "✓ held" not in page.text
    assert {"class": "pill not-promised"} in page.all("span")
    assert {"class": "pill held"} not in page.all("span")
    # The section does not say that each attack was on what this run promises.
    assert "break what is claimed" not in page.text
    assert "Not promised: this run promises nothing against this attack" in page.text
