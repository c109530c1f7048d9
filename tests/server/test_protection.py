"""What protected a run, in sentences that say neither more nor less than what holds."""

from __future__ import annotations

from typing import Any

import pytest

from common.errors import StorageError
from server.documents import Node
from server.protection import Protection

TERMS = {"cohort": 8, "colluders": 2, "threshold": 6, "smallest_sum": 6, "dropouts": 2, "ring_bits": 22}
IMPLIED = [[1, 1.0], [2, 1.5], [3, 2.0]]


def told(mode: str = "patient", **changes: Any) -> dict[str, Any]:
    found = {"secure_aggregation": True, "mode": mode, "terms": TERMS, "unit": "patient", "delta": 1e-3}
    return found | {"implied": IMPLIED} | changes


def read(data: dict[str, Any]) -> Protection:
    return Protection.read(Node(data, "summary.json.privacy"))


@pytest.mark.parametrize("mode", ["record", "patient"])
def test_noise_in_an_update_holds_against_everybody(mode: str) -> None:
    assert read(told(mode)).against.startswith("It holds against everybody")


@pytest.mark.parametrize("mode", ["institution", "distributed"])
def test_noise_in_shares_holds_against_a_coordinator_with_so_many_members_and_no_more(mode: str) -> None:
    said = read(told(mode)).against
    assert "the coordinator together with up to 2 members" in said
    assert "the noise of 4 others in every sum is counted on" in said  # h = t - T
    assert "does not hold against more members" in said
    one = read(told(mode, terms=TERMS | {"colluders": 1, "threshold": 2})).against
    assert "together with one member among them: the noise of 1 other in every sum" in one


def test_without_noise_nothing_is_claimed() -> None:
    none = read({"secure_aggregation": True, "mode": "none"})
    assert not none.private
    assert (none.against, none.arms, none.source(True), none.source(False), none.spending) == ("", "", "", "", None)


def test_the_dearest_institution_leads_and_equal_ones_are_one_curve() -> None:
    cheap = [[1, 1.0], [2, 1.0], [3, 1.5]]
    spending = read(told(ledgers={"a": cheap, "b": IMPLIED, "c": IMPLIED})).spending
    assert spending is not None
    assert spending.curves == (((1, 1.0), (2, 1.5), (3, 2.0)), ((1, 1.0), (2, 1.0), (3, 1.5)))
    implied = read(told()).spending
    assert implied is not None
    assert implied.curves == (((1, 1.0), (2, 1.5), (3, 2.0)),)


def test_where_the_figures_come_from_is_said() -> None:
    found = read(told(ledgers={"a": IMPLIED}, arms="record"))
    assert "each institution's own ledger" in found.source(deployed=False)
    assert "protects from nobody who knows the seed" in found.source(deployed=False)
    assert "No institution tells the coordinator what it spent" in found.source(deployed=True)
    assert "the same noise in mode record, so at equal epsilon" in found.arms
    assert "protected from nobody" in read(told(arms="none")).arms


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit": None}, r"summary\.json\.privacy: expected a value for 'unit'"),
        ({"delta": "small"}, r"privacy\.delta: expected a number"),
        ({"implied": {}}, r"privacy\.implied: expected a list"),
        ({"implied": [[1]]}, r"privacy\.implied\[0\]: expected a round and an epsilon, found \[1\]"),
        ({"implied": [["1", 2.0]]}, r"privacy\.implied\[0\]\[0\]: expected a whole number"),
        ({"ledgers": {"a": [[1, None]]}}, r"privacy\.ledgers\.a\[0\]\[1\]: expected a number"),
        ({"mode": None}, r"expected a value for 'mode'"),
    ],
)
def test_what_is_missing_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StorageError, match=message):
        read(told(**changes))
