"""Differential privacy between real processes: budgets that hold, floors that refuse, ledgers that add up."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from client.ledger import Spent, open_copy, read_entry
from client.ledger_account import round_event
from common import config_files
from common.config import Config
from common.errors import RunStopped
from common.privacy.accounting import epsilon
from simulations import loopback
from simulations.loopback import Loopback

POOR, *OTHERS, STRICT = NAMES = ("riverside", "northgate", "lakeside", "summit", "fairview")
"""The first can pay one round; the last agrees to no mode but `institution`, or where that is asked for `record`."""

DELTA = 1e-3
ROUNDS = 2
OVERRIDES = [
    f"data.institutions=[{', '.join(NAMES)}]",
    "data.train_records=[16, 16, 16, 16, 16]",
    "data.own_records=20",
    "data.held_out=0.2",
    "privacy.noise_multiplier=2.0",
    f"privacy.delta={DELTA}",
    f"federation.rounds={ROUNDS}",
    "federation.gather_s=240",
    "evaluation.exact=[]",
]


def config_of(mode: str, *overrides: str) -> Config:
    return config_files.load("smoke", [*OVERRIDES, f"privacy.mode={mode}", *overrides])


def cost(config: Config, rounds: int) -> float:
    event = round_event(config)
    assert event is not None
    return epsilon([event] * rounds, DELTA).bound


def say_nothing(line: str) -> None:
    pass


def amend(policy: Path, **changes: Any) -> None:
    """Changes the only population of a policy."""
    said = yaml.safe_load(policy.read_text())
    said["populations"][loopback.DATA_SET] |= changes
    policy.write_text(yaml.safe_dump(said))


@dataclass(frozen=True)
class Played:
    config: Config
    place: Loopback
    summary: dict[str, Any]

    def ledger(self, name: str, *words: str) -> dict[str, Any]:
        home = self.place.client(name)
        return loopback.call(say_nothing, "silotune-client", "ledger", *words, home=home)

    def egress(self, name: str) -> list[dict[str, Any]]:
        files = sorted((self.place.client(name) / "egress").glob("*.jsonl"))
        return [json.loads(line) for file in files for line in file.open()]

    def log(self, name: str) -> str:
        return (self.place.client(name) / "client.log").read_text()


@pytest.fixture(
    scope="module",
    params=[pytest.param(mode, marks=pytest.mark.slow) for mode in ("patient", "record", "institution", "distributed")],
)
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """A run of a mode, once for all tests."""
    mode = str(request.param)
    config = config_of(mode)
    root = tmp_path_factory.mktemp("private") / mode

    def terms(line: str) -> None:
        if line.startswith("silotune-server up"):  # all policies are there, and no daemon has read one
            place = Loopback(root, NAMES)
            amend(place.client(POOR) / "policy.yaml", epsilon=1.02 * cost(config, 1))
            other = "record" if mode == "institution" else "institution"
            amend(place.client(STRICT) / "policy.yaml", modes=[other])

    with loopback.standing(config, root, terms) as place:
        summary = loopback.call(say_nothing, "silotune-server", "run", str(place.config), home=place.server)
    return Played(config, place, summary)


def test_the_run_goes_on_without_whom_it_asks_too_much(played: Played) -> None:
    summary = played.summary
    assert summary["rounds_run"] == ROUNDS
    assert summary["refused"] == {STRICT: "privacy_required"}
    assert summary["absences"] == {POOR: {"budget_exhausted": 1}}


def test_the_round_that_would_exceed_the_budget_is_refused_with_what_is_left(played: Played) -> None:
    refusals = [line for line in played.log(POOR).splitlines() if "budget_exhausted" in line]
    assert len(refusals) == 1
    assert f"at delta {DELTA:g}" in refusals[0]
    assert "left; with this round it would be" in refusals[0]
    (population,) = played.ledger(POOR, "show")["populations"]
    assert population["updates"] == 1
    assert 0 < population["left"] < 0.05 * population["budget"]
    (forecast,) = played.ledger(POOR, "forecast", str(played.place.config))["populations"]
    assert (forecast["allowed"], forecast["rounds_left"], forecast["fits"]) == (True, 0, False)


def test_a_mode_below_the_floor_is_refused_before_anything_is_spent(played: Played) -> None:
    assert "privacy_required" in played.log(STRICT)
    (population,) = played.ledger(STRICT, "show")["populations"]
    assert (population["updates"], population["spent"]["epsilon"]) == (0, 0)
    assert {entry["kind"] for entry in played.egress(STRICT)} <= {"Introduction", "Refused", "Received"}
    (forecast,) = played.ledger(STRICT, "forecast", str(played.place.config))["populations"]
    assert (forecast["allowed"], forecast["rounds_left"]) == (False, 0)


@pytest.mark.parametrize("name", OTHERS)
def test_an_institution_s_own_ledger_has_what_the_settings_imply(played: Played, name: str) -> None:
    assert played.ledger(name, "verify")["whole"] is True
    (population,) = played.ledger(name, "show")["populations"]
    told = played.summary["privacy"]
    assert population["updates"] == ROUNDS
    assert population["units"] == [told["unit"]]
    spent = [point["epsilon"] for point in population["over_rounds"]]
    assert spent == pytest.approx([value for _, value in told["implied"]], rel=1e-3)
    assert population["spent"]["epsilon"] == pytest.approx(told["epsilon"], rel=1e-3)
    assert population["spent"]["epsilon"] <= population["budget"]


@pytest.mark.parametrize("name", [POOR, *OTHERS])
def test_what_was_spent_stands_in_the_egress_log_once_for_each_update(played: Played, name: str) -> None:
    entries = played.egress(name)
    (population,) = played.ledger(name, "show")["populations"]
    told = [entry for entry in entries if entry.get("epsilon")]
    assert len(told) == population["updates"]
    # What each one added is told by a bound that is quicker to compute, and never below.
    assert 0.9999 <= sum(entry["epsilon"] for entry in told) / population["spent"]["rdp"] < 1.02
    # The first message after records are read; the vector leaves in a later one.
    assert {entry["kind"] for entry in told} == {"Keys"}


def test_the_page_says_that_only_the_settings_are_known(played: Played) -> None:
    text = (played.place.server / "runs" / played.summary["run"] / "report.html").read_text()
    assert "No institution tells the coordinator what it spent" in text
    assert f"Epsilon per {played.summary['privacy']['unit']}" in text


def test_no_process_is_left_behind(played: Played) -> None:
    assert not processes(played.place.root)


# --- Three of them, of whom none may be missing -----------------------------------------------------------------------


def test_a_run_whose_sum_needs_everybody_stops_where_a_budget_ends(tmp_path: Path) -> None:
    few = [
        f"data.institutions=[{', '.join(NAMES[:3])}]",
        "data.train_records=[16, 16, 16]",
        "secure_aggregation.repeats=0",
    ]
    config, root = config_of("patient", *few), tmp_path / "federation"

    def terms(line: str) -> None:
        if line.startswith("silotune-server up"):
            amend(Loopback(root, NAMES).client(POOR) / "policy.yaml", epsilon=1.02 * cost(config, 1))

    said = rf"code 6:(.|\n)*round 2(.|\n)*{POOR}: budget_exhausted"
    with loopback.standing(config, root, terms) as place, pytest.raises(RunStopped, match=said):
        loopback.call(say_nothing, "silotune-server", "run", str(place.config), home=place.server)
    played = Played(config, place, {})
    refusals = [line for line in played.log(POOR).splitlines() if "budget_exhausted" in line]
    assert refusals
    assert all(f"at delta {DELTA:g}" in line and "left; with this round it would be" in line for line in refusals)
    spent = {name: spends(place.client(name)) for name in place.names}
    assert [entry.round for entry in spent[POOR]] == [1]
    # What the others trained in vain was spent.
    assert [entry.round for entry in spent[OTHERS[0]]] == [entry.round for entry in spent[OTHERS[1]]] == [1, 2]
    assert played.ledger(POOR, "verify")["whole"] is True
    for name in place.names:
        told = [entry for entry in played.egress(name) if entry["epsilon"]]
        assert [entry["round"] for entry in told] == [entry.round for entry in spent[name]]
        assert told[0]["epsilon"] == pytest.approx(epsilon([spent[name][0].event], DELTA).rdp, rel=0.02)


# --- Killed -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_daemon_killed_before_its_vector_leaves_has_spent_and_spends_again(tmp_path: Path) -> None:
    """SIGKILL for all its processes as soon as the ledger says that records are read; then it is started anew."""
    config, root = config_of("patient"), tmp_path / "federation"
    run = ("silotune-server", "run")
    with loopback.standing(config, root, say_nothing) as place, ThreadPoolExecutor(1) as others:
        home = place.client(POOR)
        running = others.submit(loopback.call, say_nothing, *run, str(place.config), home=place.server)
        while not spends(home):
            assert not running.done()
            time.sleep(0.02)
        for process in processes(home):
            process.kill()
        played = Played(config, place, {})
        assert "MaskedInput" not in {entry["kind"] for entry in played.egress(POOR)}
        assert [entry.round for entry in spends(home)] == [1]
        assert played.ledger(POOR, "verify")["whole"] is True
        with loopback._service("silotune-client", ("up",), home, place.log(POOR), say_nothing):
            summary = running.result()
    assert summary["rounds_run"] == ROUNDS
    played = Played(config, place, summary)
    assert played.ledger(POOR, "verify")["whole"] is True
    vectors = [entry for entry in played.egress(POOR) if entry["kind"] == "MaskedInput"]
    spent = spends(home)
    assert len(spent) > len(vectors)
    assert len({(entry.round, entry.attempt) for entry in spent}) == len(spent)
    (population,) = played.ledger(POOR, "show")["populations"]
    assert population["updates"] == len(spent)
    assert population["spent"]["epsilon"] == pytest.approx(cost(config, len(spent)), rel=1e-3)


def processes(home: Path) -> list[psutil.Process]:
    found = psutil.process_iter(["cmdline"])
    return [process for process in found if str(home) in " ".join(process.info["cmdline"] or ())]


def spends(home: Path) -> list[Spent]:
    if not (home / "ledger").exists():
        return []
    found = [read_entry(line.raw) for line in open_copy(home / "ledger").lines()]
    return [entry for entry in found if isinstance(entry, Spent)]
