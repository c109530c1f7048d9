"""The report: its verdict in every case, the two tables, the curves, and a page that survives hostile input."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from copy import deepcopy
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from common.errors import StorageError
from server import charts
from server.report import render, tables
from server.results import Comparison, Score, without_paths
from server.verdict import bytes_text, gap_text, percent_change_text, perplexity_text, seconds_text, verdict

CONFIG = "name: hospitals\nmodel:\n  path: embedded\n"


def score(perplexity: float | None, accuracy: float | None = None) -> dict[str, float | None]:
    return {"perplexity": perplexity, "accuracy": accuracy}


def summary(
    own: Mapping[str, tuple[float, float]],
    *,
    best: float = 8.0,
    federated: float = 5.0,
    pooled: float = 4.0,
    accuracy: float | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """A summary.json. own: perplexity alone and federated of each institution at home; the first is the best alone."""
    names = list(own)
    gap = math.log(best / federated) / math.log(best / pooled) if pooled < best and federated < math.inf else None
    return {
        "name": "hospitals", "method": "fedavg", "seed": 7, "rounds_run": 3, "rounds_planned": 3, "best_round": 2,
        "stopped_early": False, "institutions": names, "refused": {},
        "everyone": {
            "base": score(31.2, accuracy), "federated": score(federated, accuracy), "pooled": score(pooled, accuracy),
            "local_best": {"institution": names[0], **score(best, accuracy)},
            "local": {name: score(best + i, accuracy) for i, name in enumerate(names)},
        },
        "own": {
            name: {"base": score(30.0, accuracy), "local": score(alone, accuracy), "federated": score(both, accuracy)}
            for name, (alone, both) in own.items()
        },
        "gap_closed": gap, "bytes_per_client_round": {"up": 123456, "down": 2_000_000},
        "parameters": {"base": 2164416, "adapter": 45056}, "void_updates": 0,
        "seconds": {"train": 70.0, "aggregate": 0.4, "evaluate": 21.0, "compare": 120.0, "total": 231.0},
        "privacy": {"secure_aggregation": False, "mode": "none"},
        "base_model": {"name": "embedded", "config": "3f" * 32, "weights": "a9" * 32, "tokenizer": "0c" * 32},
        "versions": {"silotune": "0.1.0", "torch": "2.13.0"}, "started": "2026-11-23T18:00:00+00:00",
    } | changes  # fmt: skip


def one_round(number: int, perplexity: float | None, **changes: Any) -> dict[str, Any]:
    return {
        "round": number, "contributors": 2, "void": 0, "train_loss": 1.5,
        "validation": None if perplexity is None else score(perplexity, 0.5), "best": False,
        "seconds": {"train": 1.0, "aggregate": 0.1, "evaluate": 0.4}, "bytes_up": 10, "bytes_down": 20,
    } | changes  # fmt: skip


GAIN, LOSS, EVEN = (5.0, 4.0), (5.0, 6.0), (5.0, 5.02)
ROUNDS = [one_round(1, 20.0), one_round(2, 5.0), one_round(3, 6.0)]


def uncompared() -> dict[str, Any]:
    data = summary({"riverside": GAIN, "northgate": LOSS}, gap_closed=None)
    for arm in ("local_best", "local", "pooled"):
        del data["everyone"][arm]
    for arms in data["own"].values():
        del arms["local"]
    return data


def deployed(**changes: Any) -> dict[str, Any]:
    """A summary of real institutions, which keep their own scores to themselves."""
    data = uncompared() | {"run": "hospitals-0a1b2c3d", "own": {}, "delivered": ["riverside"]}
    return data | changes


def terminal(data: Mapping[str, Any], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system="truecolor", force_terminal=True)
    console.print(tables(data))
    printed: str = console.file.getvalue()  # type: ignore[attr-defined]
    return printed


def unstyled(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


class Page(HTMLParser):
    """Tags with attributes, text and the nesting of a page."""

    void = frozenset({"meta", "link", "br"})
    shapes = frozenset({"line", "polyline", "circle", "rect"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.shapes
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.mark.parametrize(
    ("data", "beginning"),
    [
        (summary({"a": GAIN, "b": GAIN}), "Yes: the federation paid off for both institutions."),
        (summary({"a": GAIN, "b": GAIN, "c": GAIN}), "Yes: the federation paid off for all 3 institutions."),
        (summary({"a": GAIN, "b": EVEN}), "Yes: the federation paid off for 1 of 2 institutions, and nobody lost."),
        (summary({"a": GAIN}), "Yes: the federation paid off for the only institution."),
        (summary({"a": GAIN, "b": LOSS}), "For some: 1 of 2 institutions gained; b did better alone."),
        (summary({"a": LOSS, "b": EVEN}), "Only in general: the federated model is the best on everybody's test, but"),
        (summary({"a": LOSS, "b": LOSS}, federated=9.0), "No: the federation did not pay off for any of its 2 instit"),
        (summary({"a": GAIN, "b": GAIN}, federated=8.0), "At home, yes: both institutions gained. But on everybody's"),
        (summary({"a": GAIN}, federated=math.inf), "No: the federated model diverged"),
        (uncompared(), "No comparison was run, so this report cannot say whether the federation paid off."),
    ],
)  # fmt: skip
def test_the_headline_says_for_whom(data: dict[str, Any], beginning: str) -> None:
    assert verdict(data).startswith(beginning)


@pytest.mark.parametrize(
    ("arms", "sentence"),
    [
        ({}, "That closes 68% of the gap to pooled training (4.00)."),
        ({"federated": 3.5}, "That is even better than pooled training (4.00): 119% of the gap closed."),
        ({"federated": 9.0}, "It closes none of the gap to pooled training (4.00): \N{MINUS SIGN}17%."),
        ({"pooled": 8.5}, "Pooled training (8.50) was no better than that, so there was no gap to close."),
        ({"pooled": 7.9, "federated": 7.95}, "The gap itself is small, so this share says little."),
        ({"federated": 40.0}, "The federated model is worse than the base model before any training (31.20)."),
        ({"refused": {"c": "base_model_differs"}}, "Refused or failed: c."),
    ],
)
def test_the_detail_gives_the_numbers(arms: dict[str, Any], sentence: str) -> None:
    found = verdict(summary({"a": GAIN, "b": GAIN}, **arms))
    assert sentence in found
    assert "the best local-only model, a, 8.00" in found


def test_accuracy_against_perplexity_is_mixed_and_said() -> None:
    data = summary({"a": GAIN, "b": GAIN}, accuracy=0.6)
    data["own"]["b"]["federated"]["accuracy"] = 0.5
    assert verdict(data).startswith("For some: 1 of 2 institutions gained; for b the measures disagree.")
    assert "◆ mixed" in unstyled(terminal(data))


@pytest.mark.parametrize(
    ("before", "after", "outcome"),
    [
        (Score(5.0, None), Score(4.94, None), "gained"),
        (Score(5.0, None), Score(4.96, None), "even"),
        (Score(5.0, None), Score(5.06, None), "lost"),
        (Score(5.0, 0.6), Score(5.0, 0.65), "gained"),  # 0.65 - 0.6 is below 0.05 in floating point
        (Score(5.0, 0.6), Score(5.0, 0.56), "even"),
        (Score(5.0, 0.6), Score(4.0, 0.5), "mixed"),
        (Score(math.inf, None), Score(5.0, None), "gained"),
        (Score(5.0, None), Score(math.inf, None), "lost"),
        (Score(math.inf, None), Score(math.inf, None), "even"),
        (None, Score(5.0, None), "not compared"),
    ],
)
def test_outcome_of_a_comparison(before: Score | None, after: Score, outcome: str) -> None:
    assert Comparison("a", before, after).outcome == outcome


def test_page_and_terminal_say_the_same() -> None:
    data = summary({"a": GAIN, "b": LOSS}, accuracy=0.6)
    headline, _, detail = verdict(data).partition("alone. ")
    text = Page(render(data, ROUNDS, CONFIG)).text
    assert headline in text
    assert detail in text
    assert verdict(data) in unstyled(terminal(data, width=1000))


def test_tables_in_the_terminal() -> None:
    lines = [line.split() for line in unstyled(terminal(summary({"a": GAIN, "b": LOSS}, accuracy=0.6))).splitlines()]
    assert ["Base", "model", "31.20", "60.0%"] in lines
    assert ["Best", "local-only:", "a", "8.00", "60.0%"] in lines
    assert ["Local-only:", "b", "9.00", "60.0%"] in lines
    assert ["Federated", "5.00", "60.0%"] in lines
    assert ["Pooled", "4.00", "60.0%"] in lines
    assert ["a", "5.00", "→", "4.00", "60.0%", "→", "60.0%", "▲", "gained"] in lines
    assert ["b", "5.00", "→", "6.00", "60.0%", "→", "60.0%", "▼", "lost"] in lines


def test_tables_on_the_page() -> None:
    page = render(summary({"a": GAIN, "b": LOSS}, accuracy=0.6), ROUNDS, CONFIG)
    home = page[page.index('<table class="home"') :]
    cells = re.findall(r'data-label="([^"]*)">([^<]*)<', home)
    assert cells[6:] == [
        ("perplexity alone", "5.00"), ("federated", "6.00"), ("change", "+20.0%"),
        ("accuracy alone", "60.0%"), ("federated", "60.0%"), ("change", "0.0 pts"),
    ]  # fmt: skip
    rows = [" ".join(Page(row).text.split()) for row in re.findall(r"<tr class=.*?</tr>", page)]
    assert rows == [
        "Base model31.2060.0%", "Best local-only: a8.0060.0%", "Local-only: b9.0060.0%",
        "Federated5.0060.0%", "Pooled4.0060.0%",
    ]  # fmt: skip


def test_outcome_is_a_word_beside_its_colour() -> None:
    page = render(summary({"a": GAIN, "b": LOSS}), ROUNDS, CONFIG)
    assert re.findall(r'pill \w+"><span aria-hidden="true">(.)</span> (\w+)<', page) == [("▲", "gained"), ("▼", "lost")]


def test_without_accuracy_nothing_speaks_of_it() -> None:
    data = summary({"a": GAIN, "b": LOSS})
    rounds = [one_round(n, 5.0, validation=score(5.0)) for n in (1, 2)]
    page = render(data, rounds, CONFIG)
    assert "Exact answers" not in page
    assert ">Accuracy</th>" not in page[page.index('<table class="arms"') :]
    assert "accuracy" not in unstyled(terminal(data))


def test_without_comparison_the_base_is_the_reference() -> None:
    page = render(uncompared(), ROUNDS, CONFIG)
    assert 'Gap closed</dt><dd class="figure">' not in page
    assert "comparison included" in render(summary({"a": GAIN}), ROUNDS, CONFIG)
    assert "comparison included" not in page
    assert "gained" not in Page(page).text
    assert 'data-label="perplexity base">30.00<' in page
    assert ["riverside", "30.00", "→", "4.00"] in [
        line.split() for line in unstyled(terminal(uncompared())).splitlines()
    ]


def test_privacy_that_is_off_is_said_in_red() -> None:
    off = render(summary({"a": GAIN}), ROUNDS, CONFIG)
    assert off.count('<div class="fact off">') == 2
    privacy = {"secure_aggregation": True, "mode": "central", "epsilon": 4.0, "unit": "person"}
    on = render(summary({"a": GAIN}, privacy=privacy), ROUNDS, CONFIG)
    assert on.count('<div class="fact on">') == 2
    assert "epsilon: 4.0; unit: person" in on


def spending(**changes: Any) -> dict[str, Any]:
    spent = [[1, 1.5], [2, 2.25], [3, 3.125]]
    return {
        "secure_aggregation": True, "mode": "patient", "unit": "patient", "epsilon": 3.125, "epsilon_rdp": 3.5,
        "delta": 1e-3, "implied": spent, "ledgers": {"a": spent, "b": spent}, "arms": "patient",
    } | changes  # fmt: skip


def test_epsilon_over_rounds_stands_beside_accuracy_with_unit_delta_mode_and_against_whom() -> None:
    source = render(summary({"a": GAIN, "b": LOSS}, accuracy=0.6, privacy=spending()), ROUNDS, CONFIG)
    page = Page(source)
    charts_shown = re.findall(r"<figcaption><b>(.*?)</b><span>(.*?)</span>", source)
    assert ("Epsilon per patient", "of each institution, at delta 0.001; lower protects more") in charts_shown
    assert "Exact answers" in dict(charts_shown)
    for part in ("round 1: 1.5", "round 2: 2.25", "round 3: 3.125"):
        assert part in page.text
    assert "Epsilon is of one patient at delta 0.001, in mode patient. This is what each institution's own" in page.text
    assert "Epsilon 3.125 for one patient at delta 0.001." in page.text
    assert "It holds against everybody" in page.text
    assert "at equal epsilon" in page.text
    assert "epsilon rdp: 3.5" in page.text
    table = source[source.index("What each institution's ledger says") :].partition("</table>")[0]
    assert table.count("<td>3.125</td>") == 2
    assert "polyline class" not in source
    assert "Epsilon 3.125 per patient at delta 0.001, mode patient." in unstyled(
        terminal(summary({"a": GAIN, "b": LOSS}, privacy=spending()), width=1000)
    )


def test_the_dearest_of_several_institutions_is_read_out_and_the_others_stand_beside_it() -> None:
    ledgers = {"a": [[1, 1.5], [2, 1.5], [3, 2.0]], "b": spending()["implied"]}
    source = render(summary({"a": GAIN, "b": LOSS}, privacy=spending(ledgers=ledgers)), ROUNDS, CONFIG)
    assert "of the institution that spent most, at delta 0.001" in source
    assert source.count('<polyline class="other"') == 1
    assert "round 3: 3.125" in source
    assert "round 3: 2<" not in source


def test_real_institutions_keep_their_spending_and_the_page_says_what_the_settings_imply() -> None:
    implied = spending()
    del implied["ledgers"], implied["arms"]
    text = Page(render(deployed(privacy=implied), ROUNDS, CONFIG)).text
    assert "implied, at delta 0.001" in text
    assert "No institution tells the coordinator what it spent" in text
    assert "Epsilon 3.125 for one patient at delta 0.001, at most." in text
    assert "What each institution's ledger says" not in text


def test_without_noise_no_epsilon_is_shown_and_the_terminal_says_so_in_red() -> None:
    assert "psilon" not in Page(render(summary({"a": GAIN}), ROUNDS, CONFIG)).text
    printed = terminal(summary({"a": GAIN}), width=1000)
    assert "\x1b[31mNo differential privacy: nothing bounds" in printed


TERMS = {"cohort": 4, "colluders": 1, "threshold": 3, "smallest_sum": 3, "dropouts": 1, "ring_bits": 22}


def private(mode: str = "none", **terms: int) -> dict[str, Any]:
    return {"secure_aggregation": True, "mode": mode, "terms": TERMS | terms}


def test_what_the_coordinator_learned_is_said_with_what_that_does_not_hide() -> None:
    text = Page(render(summary({"a": GAIN}, privacy=private()), ROUNDS, CONFIG)).text
    assert "the coordinator learned only sums over at least 3 institutions, and no single update" in text
    assert "also if one of them colluded with it." in text
    assert "Up to 1 of the 4 institutions of a round could fall silent" in text
    assert "It does not hide what the sums and the published adapter tell about the data" in text
    assert "threshold 3, masked numbers of 22 bits" in text
    assert "No noise was added" in text


def test_three_tolerate_no_silence_and_noise_bounds_what_a_sum_tells() -> None:
    privacy = private("central", cohort=3, dropouts=0, colluders=2)
    source = render(summary({"a": GAIN}, privacy=privacy), ROUNDS, CONFIG)
    assert "None of the 3 institutions of a round could fall silent" in Page(source).text
    assert "if up to 2 of them colluded" in Page(source).text
    assert "It does not hide" not in source
    assert "terms:" not in Page(source).text


def test_a_term_that_is_missing_is_named() -> None:
    privacy = private()
    del privacy["terms"]["threshold"]
    with pytest.raises(StorageError, match=r"summary\.json\.privacy\.terms: expected a value for 'threshold'"):
        verdict(summary({"a": GAIN}, privacy=privacy))


@pytest.mark.parametrize(
    ("share", "said"), [(0.0213, "took 2.1%."), (0.0, "took 0.0%."), (0.0001, "took under 0.1%."), (None, "")]
)
def test_the_share_of_secure_aggregation_stands_with_the_seconds(share: float | None, said: str) -> None:
    seconds = {"train": 70.0, "secure_aggregation": 1.5, "aggregate": 0.4, "evaluate": 21.0, "total": 99.0}
    data = summary({"a": GAIN}, privacy=private(), seconds=seconds, secure_aggregation_share=share)
    source = render(data, ROUNDS, CONFIG)
    text = Page(source[source.index('<h2 id="time"') :].partition("</section>")[0]).text
    assert "secure aggregation 1.5 s 2%" in " ".join(text.split())
    assert said in text
    assert ("secure aggregation took" in text) == (share is not None)


def test_refused_institutions_stand_with_their_code() -> None:
    page = render(summary({"a": GAIN}, institutions=["a", "c"], refused={"c": "base_model_differs"}), ROUNDS, CONFIG)
    assert "<code>base_model_differs</code>" in page
    assert "1 of 2 institutions" in Page(page).text


@pytest.mark.parametrize("rounds", [[], ROUNDS[:1], ROUNDS, [one_round(n, None, train_loss=None) for n in (1, 2)]])
def test_the_page_is_whole_and_loads_nothing(rounds: list[dict[str, Any]]) -> None:
    source = render(summary({"a": GAIN, "b": LOSS}, accuracy=0.6), rounds, CONFIG)
    page = Page(source)
    assert source.startswith("<!doctype html>")
    assert page.open == []
    assert not {"script", "img", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in page.tags}
    assert [link["href"] for link in page.all("link")] == ["data:,"]
    assert not re.search(r"https?://|url\(|@import|\bsrc\s*=|\bon\w+\s*=", source)
    assert "default-src 'none'" in source
    assert all(th.get("scope") for th in page.all("th"))
    assert len(source) < 300_000


def test_a_long_run_stays_small() -> None:
    rounds = [one_round(n, 5.0 + 1 / n) for n in range(1, 1001)]
    assert len(render(summary({"a": GAIN}, rounds_run=1000, best_round=777), rounds, CONFIG)) < 500_000


HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "{{ 7 * 7 }}{% raw %}",
    "</title></style></svg>&lt;",
    "x" * 5000,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_strings_stay_text(text: str) -> None:
    data = summary(
        {text: GAIN, "b": LOSS}, name=text, method=text, refused={"c" + text: text}, started=text,
        base_model={text: text}, versions={text: text}, privacy={"secure_aggregation": True, "mode": text, text: text},
        seconds={text: 1.0, "total": 2.0},
    )  # fmt: skip
    plain = Page(render(summary({"a": GAIN, "b": LOSS}, refused={"c": "r"}), ROUNDS, CONFIG))
    source = render(data, ROUNDS, f"name: {text}\n")
    page = Page(source)
    assert page.open == []
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "src"]
    assert text[:60] in page.text
    assert "49" not in page.text  # 7 * 7: a template language ran


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_words_of_privacy_stay_text(text: str) -> None:
    spent = [[1, 1.0], [2, 2.0]]
    privacy = spending(mode=text, unit=text, arms=text, ledgers={text: spent, "b": spent[:1]})
    page = Page(render(summary({"a": GAIN}, privacy=privacy), ROUNDS, CONFIG))
    plain = Page(render(summary({"a": GAIN}, privacy=spending(ledgers={"a": spent})), ROUNDS, CONFIG))
    assert page.open == []
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    assert text[:60] in page.text


def test_hostile_names_cannot_drive_the_terminal() -> None:
    name = "[red]a[/red][/]\x1b[2J\x9b31m\u202e\ud800\r\n"
    printed = terminal(summary({name: GAIN, "b": LOSS}))
    assert "\x1b[2J" not in printed
    assert not {"\x9b", "\u202e", "\ud800", "\r"} & set(printed)
    assert "[red]a[/red][/]\N{REPLACEMENT CHARACTER}[2J" in unstyled(printed)
    render(summary({name: GAIN, "b": LOSS}), ROUNDS, name).encode("utf-8")


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("path: /srv/models/llama 3/base", "path: …/base"),
        ("- '/home/ops/fed data/x.jsonl'", "- '…/x.jsonl'"),
        ("{a: /x/y, b: ~/z/w}", "{a: …/y, b: …/w}"),
        (r"path: C:\Users\ops\model", "path: …/model"),
        ("path: file:///srv/model", "path: …/model"),
        ("path: models/base", "path: models/base"),
        ("ratio: 3/4", "ratio: 3/4"),
        ("a / b", "a / b"),
    ],
)
def test_absolute_paths_keep_their_last_part(line: str, shown: str) -> None:
    assert without_paths(line) == shown
    assert without_paths(f"first: 1\n{line}\nlast: 2") == f"first: 1\n{shown}\nlast: 2"


def test_no_absolute_path_reaches_the_page() -> None:
    data = summary({"a": GAIN}, base_model={"name": "/srv/secret/llama"})
    source = render(data, ROUNDS, "model:\n  path: /srv/secret/llama\n")
    assert "secret" not in source
    assert source.count("…/llama") == 2


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (
            ("everyone", "federated", "perplexity"),
            "low",
            "summary.json.everyone.federated.perplexity: expected a number",
        ),
        (("everyone", "base"), None, "summary.json.everyone: expected a value for 'base'"),
        (("own",), [], "summary.json.own: expected an object"),
        (("institutions",), "ab", "summary.json.institutions: expected a list"),
        (("seed",), True, "summary.json.seed: expected a whole number"),
        (("privacy", "secure_aggregation"), "no", "expected true or false"),
    ],
)
def test_a_broken_summary_names_what_is_wrong(place: tuple[str, ...], value: object, message: str) -> None:
    data = deepcopy(summary({"a": GAIN}))
    target = data
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    with pytest.raises(StorageError, match=re.escape(message)):
        verdict(data)


def test_a_perplexity_that_is_missing_or_nan_is_not_finite() -> None:
    for value in (None, math.nan):
        data = summary({"a": GAIN, "b": GAIN})
        data["own"]["b"]["federated"] = score(value)
        assert verdict(data).startswith("For some: 1 of 2 institutions gained; b did better alone.")
        assert "not finite" in render(data, ROUNDS, CONFIG)


def test_curves_stand_on_the_page_with_the_published_round() -> None:
    source = render(summary({"a": GAIN, "b": LOSS}, accuracy=0.6), ROUNDS, CONFIG)
    for label in ("round 1: 20.00", "round 2: 5.00", "round 3: 6.00", "round 3: 50.0%", "round 3: 1.500"):
        assert f"<title>{label}</title>" in source
    assert "published, round 2: 5.00" in source
    assert "Every institution contributed to every round" in source
    assert len(Page(source).all("polyline")) == 3


def test_absent_and_void_updates_get_their_own_picture() -> None:
    rounds = [ROUNDS[0], one_round(2, 5.0, contributors=1, void=1), ROUNDS[2]]
    source = render(summary({"a": GAIN, "b": LOSS}, void_updates=1), rounds, CONFIG)
    assert "✕ 1 void update: counted, with weight 0" in source
    assert "<title>round 2: 1 of 2, 1 void</title>" in source
    assert "Every institution contributed to every round" not in source


def test_one_that_failed_later_is_missed_in_the_rounds_after() -> None:
    picture = charts.participation([(1, 3, 0), (2, 2, 0)], roster=2)
    assert picture is not None
    assert [(bar.label, bar.height) for bar in picture.bars] == [
        ("round 1: 3 of 3", 100.0),
        ("round 2: 2 of 3", pytest.approx(66.667)),
    ]
    assert charts.participation([(1, 2, 0), (2, 2, 0)], roster=2) is None


def test_a_curve_is_placed_by_the_logarithm() -> None:
    curve = charts.curve(
        "P", "", [(1, 100.0), (2, 10.0), (3, 1.0)], span=(1, 3), best_round=3, text=str, log=True, limits=(1.0, 100.0)
    )
    assert curve is not None
    assert curve.lines == ("0.0,0.0 50.0,50.0 100.0,100.0",)
    assert [(tick.label, tick.at) for tick in curve.y_ticks] == [("1", 100.0), ("10", 50.0), ("100", 0.0)]
    assert curve.best is not None
    assert (curve.best.x, curve.best.y) == (100.0, 100.0)
    assert sum(dot.band_width for dot in curve.dots) == pytest.approx(100)


def test_a_value_that_cannot_be_drawn_breaks_the_line() -> None:
    points = [(1, 4.0), (2, 3.0), (3, math.inf), (4, 3.0), (5, 2.0), (6, math.nan)]
    curve = charts.curve("P", "", points, span=(1, 6), best_round=None, text=str, log=True)
    assert curve is not None
    assert [len(line.split()) for line in curve.lines] == [2, 2]
    assert len(curve.dots) == 4
    assert charts.curve("P", "", [(1, math.nan)], span=(1, 1), best_round=1, text=str) is None


@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 1.0), (0.0, 1.0), (5.02, 5.07), (1.3, 88.0), (1e-3, 1e9), (17.0, 17.1), (2.0, 3.5)]
)
def test_ticks_stay_inside_and_few(low: float, high: float) -> None:
    linear = charts.linear_ticks(low, high)
    assert 1 <= len(linear) <= 6
    slack = 1e-9 * (high - low)  # a mark may miss an end by the rounding of its step
    assert all(low - slack <= mark <= high + slack for mark in linear)
    if low > 0:
        logarithmic = charts.log_ticks(low, high)
        assert 1 <= len(logarithmic) <= 6
        assert all(low - slack <= mark <= high + slack for mark in logarithmic)


def test_numbers_as_text() -> None:
    assert [perplexity_text(v) for v in (1.234, 99.99, 1234.5, 2e7, math.inf)] == [
        "1.23", "99.99", "1,234", "2.0e+07", "not finite",
    ]  # fmt: skip
    assert [bytes_text(v) for v in (999, 1000, 123456, 999_999, 5e9)] == [
        "999 B",
        "1.0 kB",
        "123 kB",
        "1.0 MB",
        "5.0 GB",
    ]
    assert [seconds_text(v) for v in (0.4, 70, 231, 3720)] == ["0.4 s", "70 s", "3 min 51 s", "1 h 2 min"]
    assert [percent_change_text(v) for v in (0.1234, -0.5, -0.0001, None)] == [
        "+12.3%",
        "\N{MINUS SIGN}50.0%",
        "0.0%",
        "–",
    ]
    assert [gap_text(v) for v in (0.71, -0.12, 1.2)] == ["71%", "\N{MINUS SIGN}12%", "120%"]


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_has_contrast_in_light_and_dark(scheme: int) -> None:
    blocks = re.findall(r":root \{(.*?)\}", render(summary({"a": GAIN}), ROUNDS, CONFIG), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[scheme]))
    pairs = [("ink", "paper"), ("ink", "card"), ("ink", "accent-wash"), ("soft", "paper"), ("soft", "card")]
    pairs += [("soft", "wash"), ("accent", "paper"), ("bad", "card"), ("good", "card")]
    pairs += [(name, f"{name}-wash") for name in ("good", "bad", "mixed")]
    for text, ground in pairs:
        light, dark = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)  # level AA for text


# --- A run of real institutions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("federated", "headline", "badge"),
    [
        (5.0, "The federated model beats the base model.", "Better than the base"),
        (31.2, "No: the federated model is not clearly better than the base model.", "Not better than the base"),
        (40.0, "No: the federated model is not clearly better than the base model.", "Not better than the base"),
        (None, "No: the federated model diverged, its perplexity is not finite.", "Not better than the base"),
    ],
)
def test_a_coordinator_compares_with_the_base_and_claims_no_more(
    federated: float | None, headline: str, badge: str
) -> None:
    data = deployed()
    data["everyone"]["federated"] = score(federated)
    assert verdict(data).startswith(headline)
    assert "Whether that beats training alone, this page cannot know" in verdict(data)
    page = Page(render(data, ROUNDS, CONFIG))
    assert headline in page.text
    assert badge in page.text
    assert "Paid off" not in page.text
    assert not page.open


def test_a_page_of_real_institutions_says_what_it_does_not_know_and_who_has_the_adapter() -> None:
    data = deployed(absences={"northgate": {"timed_out": 2}})
    text = Page(render(data, ROUNDS, CONFIG)).text
    assert "What this page does not know" in text
    assert "hospitals-0a1b2c3d" in text
    assert "with riverside; not yet with northgate" in text
    assert "Without the adapter yet: northgate." in text
    assert "timed_out" in text
    for absent in ("everybody's test", "At home", "Local-only", "Gap closed", "pooled"):
        assert absent not in text
    assert "with nobody yet" in Page(render(deployed(delivered=[]), ROUNDS, CONFIG)).text
    assert "not yet with" not in Page(render(deployed(delivered=data["institutions"]), ROUNDS, CONFIG)).text


def test_the_terminal_has_one_table_of_a_run_of_real_institutions() -> None:
    printed = unstyled(terminal(deployed(), width=1000))
    assert "On the coordinator's test records" in printed
    assert "At home" not in printed
    assert verdict(deployed()) in printed


def test_a_simulation_knows_nothing_of_delivery() -> None:
    text = Page(render(uncompared(), ROUNDS, CONFIG)).text
    assert "What this page does not know" not in text
    assert "without the adapter" not in text.lower()
