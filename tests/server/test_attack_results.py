"""Results of attacks: read with every mistake named, and told on the page without a way to disguise themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import StorageError
from server import attack_results, report
from server.attack_results import Attack
from tests.server.test_report import CONFIG, GAIN, LOSS, ROUNDS, Page, summary


def result(**changes: Any) -> dict[str, Any]:
    return {
        "attack": "membership",
        "claim": "Nobody is told apart by the adapter.",
        "finding": "AUC 0.61.",
        "verdict": "broken",
        "measures": [
            {"of": "federated", "what": "AUC", "value": 0.6123456, "note": "400 records"},
            {"of": "local", "what": "TPR at 1 % FPR", "value": None},
        ],
    } | changes


def run_directory(root: Path, **attacks: Any) -> Path:
    (root / "summary.json").write_text(json.dumps(summary({"a": GAIN, "b": LOSS})))
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ROUNDS))
    (root / "config.yaml").write_text(CONFIG)
    for name, found in attacks.items():
        (root / "attacks").mkdir(exist_ok=True)
        (root / "attacks" / f"{name}.json").write_text(found if isinstance(found, str) else json.dumps(found))
    return root


def test_the_page_is_written_from_what_lies_in_the_directory(tmp_path: Path) -> None:
    directory = run_directory(tmp_path)
    assert report.write(directory) == summary({"a": GAIN, "b": LOSS})
    assert "Attacks on this run" not in (directory / "report.html").read_text()
    run_directory(tmp_path, membership=result(), canary=result(attack="canary", verdict="held", measures=[]))
    report.write(directory)
    text = Page((directory / "report.html").read_text()).text
    assert text.index("canary") < text.index("membership")
    for part in ("✕ broken", "✓ held", "Nobody is told apart", "AUC 0.61.", "0.6123", "400 records", "TPR at 1 % FPR"):
        assert part in text
    elsewhere = tmp_path / "elsewhere.html"
    report.write(directory, elsewhere)
    assert elsewhere.read_text() == (directory / "report.html").read_text()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("{", r"membership\.json: not JSON"),
        ("[]", r"membership\.json: expected a JSON object, found list"),
        *((result(**{key: None}), rf"membership\.json: expected a value for '{key}'") for key in result()),
        (result(verdict="won"), r"\.verdict: expected one of held, broken, not promised, found 'won'"),
        (result(verdict=["held"]), r"\.verdict: expected one of"),
        (result(claim=3), r"\.claim: expected a text, found 3"),
        (result(measures={}), r"\.measures: expected a list"),
        (result(measures=[{"what": "AUC", "value": 1}]), r"\.measures\[0\]: expected a value for 'of'"),
        (result(measures=[{"of": "a", "what": "AUC", "value": "1"}]), r"\.measures\[0\]\.value: expected a number"),
        (
            result(measures=[{"of": "a", "what": "b", "value": float("nan")}]),
            r"value: expected a finite number, or null",
        ),
    ],
)
def test_a_result_that_lacks_something_is_named_and_the_page_stays(tmp_path: Path, found: Any, message: str) -> None:
    directory = run_directory(tmp_path, membership=found)
    (directory / "report.html").write_text("before")
    with pytest.raises(StorageError, match=message):
        report.write(directory)
    assert (directory / "report.html").read_text() == "before"


@pytest.mark.parametrize("file", ["summary.json", "metrics.jsonl", "config.yaml"])
def test_a_directory_that_lacks_a_file_is_named(tmp_path: Path, file: str) -> None:
    directory = run_directory(tmp_path)
    (directory / file).unlink()
    with pytest.raises(StorageError, match=rf"{file}.*a run that has ended"):
        report.write(directory)
    assert not (directory / "report.html").exists()


def test_no_result_can_style_or_script_the_page() -> None:
    evil = '</p><script>alert("x")</script><img src=x onerror=y>\u202e\x07'
    told = Attack.from_json(
        result(
            attack=evil,
            claim=evil,
            finding=evil * 200,
            measures=[{"of": evil, "what": evil, "value": 1.0, "note": evil}],
        ),
        "attacks/evil.json",
    )
    page = Page(report.render(summary({"a": GAIN}), ROUNDS, CONFIG, [told]))
    plain = Page(report.render(summary({"a": GAIN}), ROUNDS, CONFIG, [Attack.from_json(result(), "x")]))
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    assert not page.open
    assert not page.all("script")
    assert not page.all("img")
    assert "\u202e" not in page.text
    assert "\x07" not in page.text
    assert page.text.count("alert") < 200  # cut, so that one sentence cannot fill the page


@pytest.mark.parametrize("verdict", attack_results.VERDICTS)
def test_a_verdict_is_told_by_word_sign_and_class(verdict: str) -> None:
    page = Page(report.render(summary({"a": GAIN}), ROUNDS, CONFIG, [Attack.from_json(result(verdict=verdict), "x")]))
    assert f"{attack_results.SIGNS[verdict]} {verdict}" in page.text
    assert {"class": f"pill {verdict.replace(' ', '-')}"} in page.all("span")
