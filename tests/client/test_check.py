"""Whether an institution is ready: each thing that can be wrong shows in its own line, with its own exit code."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from typer.testing import CliRunner, Result

import client.main
from client import trial, trust
from client.check import Question, check
from client.control import Control
from client.data_sets import Machine
from client.egress import EgressLog, Payload
from client.findings import FAIL, OK, SKIPPED, WARN, Line
from client.ledger import Ledger, Spend
from client.policy_file import Budget, InstitutionPolicy, Population
from common.bundle import bundle_digest
from common.config import TrainConfig
from common.enrolment import Address
from common.errors import ConfigError, ModelError
from common.examples import Tokenised, examples_of
from common.models import LoraModel
from common.records import Record, write_jsonl
from server.authority import authority_certificate, server_certificate
from server.front import serve_front
from server.operator import Operator
from tests.client.conftest import make_records, tokenised, write_dynamic
from tests.client.enrolled import DATA_SET, Enrolled, authority_pem, enrol, roster_of
from tests.deployments import Deployment, deployment, free_port, introduction, running

__all__ = ["deployment", "running"]

SECRET = b"correct horse battery staple"


@pytest.fixture
def here(base_model: str, tmp_path: Path) -> Enrolled:
    return enrol(tmp_path, base_model)


def lines(here: Enrolled, **changes: Any) -> dict[str, Line]:
    return {line.name: line for line in check(Question(here.home, **{"network": False, **changes}))}


def verdicts(found: dict[str, Line]) -> dict[str, str]:
    return {name: line.verdict for name, line in found.items()}


ALONE = (
    *("versions", "keys", "policy", "control", "roster", "bundle", "data file", "populations", "base model", "device"),
    *("disk", "egress log", "privacy ledger", "data notes", "tokens notes", "training notes", "evaluation notes"),
)


def test_all_is_well(here: Enrolled, base_model: str) -> None:
    found = lines(here)
    assert verdicts(found) == dict.fromkeys(ALONE, OK)
    records = found["data notes"].numbers
    assert sum(records["records"].values()) == records["persons"] == 60
    assert all(records["records"].values())
    assert found["tokens notes"].numbers["tokens"]["records"] == 60
    assert found["training notes"].numbers["loss"] > 0
    assert found["training notes"].numbers["peak_bytes"] > 1 << 20
    assert found["evaluation notes"].numbers["perplexity"] > 1
    assert bundle_digest() in found["bundle"].told


def test_lines_are_told_as_they_come(here: Enrolled) -> None:
    told: list[Line] = []
    assert check(Question(here.home, network=False), told.append) == tuple(told)
    assert [line.name for line in told] == list(ALONE)


def test_nothing_is_left_behind_and_nothing_changed(here: Enrolled) -> None:
    def files() -> dict[str, tuple[int, bytes]]:
        return {
            str(file.relative_to(here.home.root)): (file.stat().st_mtime_ns, file.read_bytes())
            for file in sorted(here.home.root.rglob("*"))
            if file.is_file()
        }

    before = files()
    lines(here)
    assert files() == before


# --- What can be wrong ------------------------------------------------------------------------------------------------


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def other_authority(here: Enrolled, made: datetime) -> None:
    authority = authority_pem(ec.generate_private_key(ec.SECP384R1()), made)
    card = trust.pinned(here.home).cards["alder"]
    roster = roster_of(here.coordinator, card, authority, Address("coordinator.example.org", 9443), serial=2)
    trust.pin(here.home, roster, here.keys, datetime.now(UTC))


def tampered_log(here: Enrolled) -> None:
    log = EgressLog(here.home.egress, here.keys.identity)
    log.record("Contribution", Payload(10, "0" * 64), run="night")
    (file,) = here.home.egress.glob("egress-*.jsonl")
    edit(file, '"bytes":10', '"bytes":11')


def spend(here: Enrolled) -> None:
    population = Population("clinic", (DATA_SET,), ("record",), 8.0, 1e-5)
    step = Spend("gaussian", 1.0, 0.1, 10, "record", "night", 1, 1, DATA_SET)
    Ledger(here.home.ledger, here.keys.identity).spend(population, step)


def tampered_ledger(here: Enrolled) -> None:
    EgressLog(here.home.egress, here.keys.identity).record("Introduction", Payload(10, "0" * 64))
    spend(here)
    (file,) = here.home.ledger.glob("ledger-*.jsonl")
    edit(file, '"steps":10', '"steps":1')


WRONG: dict[str, tuple[Callable[[Enrolled], object], str, int, str]] = {
    "no key": (lambda here: here.home.identity_key.unlink(), "keys", 5, "identity.pem"),
    "a key that others can read": (lambda here: here.home.node_key.chmod(0o644), "keys", 2, "chmod 600"),
    "a home that others can enter": (lambda here: here.home.root.chmod(0o755), "keys", 2, "chmod 700"),
    "no policy": (lambda here: here.home.policy.unlink(), "policy", 2, "silotune-client init"),
    "a word too many": (
        lambda here: edit(here.home.policy, "largest_rank", "biggest_rank"), "policy", 2, "biggest_rank",
    ),
    "no roster": (lambda here: here.home.roster.unlink(), "roster", 2, "silotune-client trust ROSTER"),
    "a roster that was changed": (
        lambda here: edit(here.home.roster, "coordinator.example.org", "other.example.org"), "roster", 2, "signature",
    ),
    "an authority that has expired": (
        lambda here: other_authority(here, datetime.now(UTC) - timedelta(days=3651)), "roster", 2, "a new authority",
    ),
    "another bundle": (lambda here: edit(here.home.policy, bundle_digest(), "ab" * 32), "bundle", 2, bundle_digest()),
    "no data file": (lambda here: here.home.data.unlink(), "data file", 2, "data.yaml"),
    "another base model": (
        lambda here: edit(here.home.policy, "base_models: [", f'base_models: ["{"ab" * 32}"]  # ['), "base model", 2,
        "list it if it is the one that was agreed on",
    ),
    "no base model": (
        lambda here: here.home.data.write_text(here.home.data.read_text().replace("  model: ", "  model: /nowhere  #")),
        "base model", 4, "/nowhere",
    ),
    "weights kept as this machine cannot": (
        lambda here: edit(here.home.data, "weights: full", "weights: 8bit"), "device", 4, "needs a CUDA device",
    ),
    "a shelf that others can enter": (
        lambda here: (here.home.adapters.mkdir(), here.home.adapters.chmod(0o755)), "disk", 2, "chmod 700",
    ),
    "a log that was changed": (tampered_log, "egress log", 5, "silotune-client log verify"),
    "a ledger that was changed": (tampered_ledger, "privacy ledger", 5, "silotune-client ledger verify"),
    "a ledger that is gone": (
        lambda here: shutil.rmtree(here.home.ledger), "privacy ledger", 5, "restore it from a copy",
    ),
    "a ledger whose end is gone": (
        lambda here: (here.home.ledger / "head.json").unlink(), "privacy ledger", 5, "nothing may be spent",
    ),
    "no records": (lambda here: here.records.unlink(), "data notes", 3, "found none"),
    "a record that is none": (
        lambda here: here.records.write_text(here.records.read_text() + "{}\n"), "data notes", 3, "records.jsonl:61",
    ),
    "too few persons": (
        lambda here: write_jsonl(here.records, make_records(2, "alder")), "data notes", 3, "persons enough",
    ),
}  # fmt: skip


def silotune(here: Enrolled, *arguments: object, **more: Any) -> Result:
    said = ["check", "--home", str(here.home.root), *(str(argument) for argument in arguments)]
    return CliRunner().invoke(client.main.app, said, **more)


@pytest.mark.parametrize(("spoil", "name", "code", "told"), WRONG.values(), ids=list(WRONG))
def test_what_is_wrong_shows_in_its_line_and_in_the_exit_code(
    here: Enrolled, spoil: Callable[[Enrolled], object], name: str, code: int, told: str
) -> None:
    spoil(here)
    result = silotune(here, "--offline", "--json")
    assert result.exit_code == code, result.output
    found = json.loads(result.stdout)
    by_name = {line["name"]: line for line in found["checks"]}
    assert not found["ready"]
    assert found["failed"][0] == name
    assert told in by_name[name]["told"]
    assert "Traceback" not in result.output
    # What does not need it is looked at all the same.
    assert by_name["versions"]["verdict"] == OK
    for log in ("egress log", "privacy ledger"):
        assert by_name[log]["verdict"] == (FAIL if name == log else OK)


def test_what_needs_what_failed_is_passed_over(here: Enrolled) -> None:
    here.records.unlink()
    here.home.roster.unlink()
    found = lines(here)
    assert [name for name, line in found.items() if line.verdict == FAIL] == ["roster", "data notes"]
    assert [name for name, line in found.items() if line.verdict == SKIPPED] == [
        *("bundle", "tokens notes", "training notes", "evaluation notes"),
    ]
    assert "needs: roster" in found["bundle"].told


TO_MIND: dict[str, tuple[Callable[[Enrolled], object], str, str]] = {
    "in the clear": (lambda here: edit(here.home.policy, "required: true", "required: false"), "policy", "is off"),
    "no base model": (lambda here: edit(here.home.policy, "base_models: [", "base_models: [] #"), "policy", "is empty"),
    "pausing": (lambda here: Control(here.home.control).pause(), "control", "silotune-client resume"),
    "waiting": (
        lambda here: Control(here.home.control).ask("night-7", "ab" * 32, {"rank": 4}), "control", "night-7",
    ),
    "an authority that ends": (
        lambda here: other_authority(here, datetime.now(UTC) - timedelta(days=3640)), "roster", "expires on",
    ),
    "more members wanted": (
        lambda here: edit(here.home.policy, "smallest_cohort: 3", "smallest_cohort: 5"), "roster", "at least 5 members",
    ),
    "no file for a name": (
        lambda here: edit(here.home.policy, 'data_sets: ["notes"]', 'data_sets: ["notes", "images"]'),
        "data file", "allows images",
    ),
    "no log of what left, after a run": (
        lambda here: (here.home.runs / "night").mkdir(parents=True), "egress log", "runs holds runs, found nothing",
    ),
    "no log of what left, after a spend": (spend, "egress log", "ledger holds what was spent, found nothing"),
    "a new log of what left, after a spend": (
        lambda here: (spend(here), EgressLog(here.home.egress, here.keys.identity).mend()),
        "egress log", "restore the log. Only where it was moved away to be kept, go on",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "name", "told"), TO_MIND.values(), ids=list(TO_MIND))
def test_what_is_to_mind_shows_and_does_not_fail_by_itself(
    here: Enrolled, spoil: Callable[[Enrolled], object], name: str, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert verdicts(lines(here))[name] == OK
    spoil(here)
    found = lines(here)[name]
    assert found.verdict == WARN
    assert told in found.told
    assert told not in caplog.text  # once is enough


def test_a_disk_that_is_nearly_full_is_told(here: Enrolled, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(here.home.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    assert lines(here)["disk"].verdict == WARN


def test_a_disk_that_takes_nothing_is_told(here: Enrolled, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def full(path: Any, *arguments: Any, **more: Any) -> int:
        if str(path).endswith(".partial"):
            raise OSError(28, "No space left on device")
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, "open", full)
    found = lines(here)["disk"]
    assert (found.verdict, type(found.error).__name__) == (FAIL, "StorageError")


def test_a_log_is_told_by_how_much_it_holds(here: Enrolled) -> None:
    log = EgressLog(here.home.egress, here.keys.identity)
    assert lines(here)["egress log"].told == "nothing has left yet"
    log.record("Contribution", Payload(10, "0" * 64), run="night")
    assert lines(here)["egress log"].numbers == {"entries": 1}


def test_a_ledger_is_told_by_how_much_it_holds_and_stays_as_it_is(here: Enrolled) -> None:
    assert lines(here)["privacy ledger"].numbers == {"entries": 0}
    tampered_ledger(here)
    assert lines(here)["privacy ledger"].verdict == FAIL
    (file,) = here.home.ledger.glob("ledger-*.jsonl")
    edit(file, '"steps":1,', '"steps":10,')
    assert lines(here)["privacy ledger"].numbers == {"entries": 2}  # the budget, and what was spent of it


def test_long_records_are_told(here: Enrolled) -> None:
    assert "--max-tokens" in silotune(here, "--offline", "--max-tokens", 8).stdout
    found = lines(here, max_tokens=8)
    assert found["tokens notes"].verdict == WARN
    assert found["tokens notes"].numbers["tokens"]["lost"] > 0
    assert found["training notes"].verdict == OK


# --- Which data sets are opened ---------------------------------------------------------------------------------------


def second(here: Enrolled, allowed: bool) -> Path:
    """Gives the institution a second data set."""
    file = here.records.with_name("second.jsonl")
    write_jsonl(file, make_records(50, "second", marker="zebra"))
    edit(here.home.data, "data_sets:\n", f"data_sets:\n  second:\n    path: {json.dumps(str(file))}\n")
    if allowed:
        edit(here.home.policy, f'data_sets: ["{DATA_SET}"]', f'data_sets: ["{DATA_SET}", "second"]')
    return file


def test_what_the_policy_does_not_allow_is_never_opened(here: Enrolled) -> None:
    file = second(here, allowed=False)
    file.write_text("no record at all")
    found = lines(here)
    assert set(verdicts(found).values()) == {OK}
    assert "never opened: second" in found["data file"].told
    asked = lines(here, data_set="second")["data second"]
    assert (asked.verdict, type(asked.error).__name__) == (FAIL, "ConfigError")
    assert "not opened" in asked.told


def test_that_patients_cannot_be_protected_is_told_where_the_policy_allows_the_mode(here: Enrolled) -> None:
    name = f"data {DATA_SET}"
    assert lines(here)[name].verdict == OK
    path = f"    path: {json.dumps(str(here.records))}\n"
    edit(here.home.data, path, f'{path}    person: "-"\n')
    found = lines(here)[name]
    assert found.verdict == WARN
    assert "names no column of persons" in found.told
    budget = f"populations:\n  clinic: {{data_sets: [{DATA_SET}], modes: [record], epsilon: 1.0, delta: 1.0e-5}}\n"
    edit(here.home.policy, "populations: {}\n", budget)
    assert lines(here)[name].verdict == OK


def test_all_allowed_ones_are_tried_or_the_one_that_is_named(here: Enrolled) -> None:
    second(here, allowed=True)
    assert set(verdicts(lines(here)).values()) == {OK}
    assert [name for name in lines(here) if "second" in name] == [
        *("data second", "tokens second", "training second", "evaluation second"),
    ]
    assert not [name for name in lines(here, data_set="second") if DATA_SET in name]


def budgets(here: Enrolled, *populations: str) -> None:
    told = ", ".join(
        f"{name}: {{data_sets: [{name.replace('+', ', ')}], modes: [patient], epsilon: 3.0, delta: 1.0e-4}}"
        for name in populations
    )
    told = told.replace("notes+second:", "both:").replace("notes:", "clinic:").replace("second:", "ward:")
    edit(here.home.policy, "populations: {}", f"populations: {{{told}}}")


def budget(here: Enrolled, name: str, data_sets: str, modes: str, delta: float) -> None:
    told = f"{name}: {{data_sets: [{data_sets}], modes: [{modes}], epsilon: 3.0, delta: {delta!r}}}"
    policy = here.home.policy.read_text(encoding="utf-8")
    before = next(line for line in policy.splitlines() if line.startswith("populations:"))
    edit(here.home.policy, before, f"populations: {{{told}}}")


def records_of(persons: int, each: int) -> list[Record]:
    """Different ones, `each` of every person."""
    return [
        replace(record, person=f"person-{number % persons}")
        for number, record in enumerate(make_records(persons * each, "many"))
    ]


@pytest.mark.parametrize(
    ("modes", "units", "whose"),
    [
        ("patient", 40, "40 patients in its data sets"),
        ("record", 120, "120 records in its data sets"),
        ("distributed", 120, "120 records in its data sets"),
        ("patient, record", 120, "120 records in its data sets"),
        ("institution", 4, "4 institutions in the roster"),
        ("institution, patient", 40, "40 patients in its data sets"),
    ],
)
def test_a_delta_that_means_nothing_is_told(here: Enrolled, modes: str, units: int, whose: str) -> None:
    write_jsonl(here.records, records_of(40, 3))
    least = {"network": False, "max_tokens": 8}
    for delta, verdict in ((1.01 / (10 * units), WARN), (1 / (10 * units), OK)):
        budget(here, "clinic", DATA_SET, modes, delta)
        found = lines(here, **least)["delta clinic"]
        assert (found.verdict, f"{delta:g} for {whose}" in found.told) == (verdict, True), found.told
    budget(here, "clinic", DATA_SET, modes, 0.05)
    found = lines(here, **least)["delta clinic"]
    said, warning = found.told.splitlines()
    assert said == f"0.05 for {whose}"
    told = re.fullmatch(
        rf"policy\.yaml: populations\.clinic\.delta: found 0\.05 for {whose}; expected at most (\S+), which is"
        rf" 1 / \(10 x {units}\): .*; set it to (\S+) or less",
        warning,
    )
    assert told is not None
    assert told[1] == told[2]
    budget(here, "clinic", DATA_SET, modes, float(told[2]))
    assert lines(here, **least)["delta clinic"].verdict == OK


def test_a_delta_is_held_to_the_persons_of_all_data_sets_of_its_population(here: Enrolled) -> None:
    """60 and 50 persons, of whom 20 are in both; the one data set that is asked for says as much as it can."""
    file = second(here, allowed=True)
    own = [record.person for record in make_records(20, "alder")]
    shared = [replace(record, person=own[number]) for number, record in enumerate(make_records(20, "both"))]
    write_jsonl(file, [*shared, *make_records(30, "second")])
    budget(here, "both", f"{DATA_SET}, second", "patient", 1 / 890)
    found = lines(here, max_tokens=8)["delta both"]
    assert (found.verdict, "90 patients" in found.told) == (WARN, True)
    assert silotune(here, "--offline", "--max-tokens", 8).exit_code == 0  # it can run
    assert "60 patients" in lines(here, max_tokens=8, data_set=DATA_SET)["delta both"].told
    file.unlink()
    assert "60 patients" in lines(here, max_tokens=8)["delta both"].told
    here.records.unlink()
    found = lines(here, max_tokens=8)["delta both"]
    assert (found.verdict, "needs: data notes, data second" in found.told) == (SKIPPED, True)


def test_where_no_column_says_whose_a_record_is_records_are_counted(here: Enrolled) -> None:
    path = f"    path: {json.dumps(str(here.records))}\n"
    write_jsonl(here.records, records_of(4, 15))
    edit(here.home.data, path, f'{path}    person: "-"\n')
    budget(here, "clinic", DATA_SET, "record", 0.01)
    assert "for 60 records" in lines(here, max_tokens=8)["delta clinic"].told


def test_a_data_set_without_a_budget_has_no_delta_to_hold(here: Enrolled) -> None:
    assert not [name for name in lines(here, max_tokens=8) if name.startswith("delta")]


def as_link(first: Path, second: Path) -> None:
    second.unlink()
    second.symlink_to(first)


def as_hard_link(first: Path, second: Path) -> None:
    second.unlink()
    os.link(first, second)


def as_copy(first: Path, second: Path) -> None:
    shutil.copyfile(first, second)


def as_path(first: Path, second: Path) -> None:
    """Said in another way in the data file."""
    data = first.parent / "home" / "data.yaml"
    edit(data, json.dumps(str(second)), json.dumps(f"{first.parent}/home/../{first.name}"))


def gone(first: Path, second: Path) -> None:
    as_path(first, second)
    first.unlink()


@pytest.mark.parametrize(
    ("populations", "make", "verdict", "told"),
    [
        (("notes", "second"), as_path, FAIL, "notes (population clinic)"),
        (("notes",), as_path, FAIL, "second (no population)"),
        (("second",), as_link, FAIL, "second (population ward)"),
        (("notes",), as_hard_link, FAIL, "are the same file"),
        (("notes",), gone, FAIL, "are the same file"),
        (("notes",), as_copy, WARN, "hold the same bytes"),
        (("notes+second",), as_link, OK, "1 with a budget"),
        (("notes+second",), as_copy, OK, "1 with a budget"),
        ((), as_link, OK, "0 with a budget"),
        (("notes", "second"), lambda *_: None, OK, "2 with a budget"),
    ],
)
def test_a_file_in_two_populations_or_in_one_and_none_is_told(
    populations: tuple[str, ...], make: Callable[[Path, Path], None], verdict: str, told: str, here: Enrolled
) -> None:
    file = second(here, allowed=True)
    make(here.records, file)
    budgets(here, *populations)
    found = lines(here, data_set="none of them, which would be trained on")["populations"]
    assert (found.verdict, told in found.told) == (verdict, True), found.told
    assert type(found.error) is (ConfigError if verdict == FAIL else type(None))


def test_a_file_of_a_data_set_that_is_not_allowed_may_be_any(here: Enrolled) -> None:
    as_link(here.records, second(here, allowed=False))
    budgets(here, "notes")
    assert lines(here, data_set="none")["populations"].verdict == OK


def test_a_name_without_a_file_is_told(here: Enrolled) -> None:
    edit(here.home.policy, f'data_sets: ["{DATA_SET}"]', f'data_sets: ["{DATA_SET}", "images"]')
    assert "expected a file for data set images" in lines(here)["data images"].told


def test_records_are_not_shown(base_model: str, tmp_path: Path) -> None:
    here = enrol(tmp_path, base_model, make_records(60, "alder", marker="zebra"))
    for arguments in (("--offline",), ("--offline", "--json"), ("--offline", "--max-tokens", "8")):
        assert "zebra" not in silotune(here, *arguments).output


# --- Keys with a passphrase -------------------------------------------------------------------------------------------


def test_a_passphrase_opens_the_keys_and_is_shown_nowhere(base_model: str, tmp_path: Path) -> None:
    here = enrol(tmp_path, base_model, passphrase=SECRET)
    assert lines(here)["keys"].verdict == FAIL
    assert lines(here, passphrase=SECRET)["keys"].verdict == OK
    assert SECRET.decode() not in repr(Question(here.home, SECRET))
    file = tmp_path / "secret"
    file.write_bytes(SECRET)
    file.chmod(0o600)
    with file.open() as handle:
        os.set_inheritable(handle.fileno(), True)
        result = silotune(here, "--offline", "--passphrase-fd", handle.fileno())
    assert result.exit_code == 0, result.output
    assert SECRET.decode() not in result.output


# --- The trial step ---------------------------------------------------------------------------------------------------


def parts(model: LoraModel, count: int = 9) -> dict[str, Tokenised]:
    found = examples_of(make_records(count, "parts"), model.tokenizer, TrainConfig(max_tokens=48))
    return {"train": found, "validation": found}


def test_the_trial_takes_the_longest_records_and_leaves_the_model_as_it_was(lora_model: LoraModel) -> None:
    before = lora_model.read().digest()
    found = trial.training(lora_model, parts(lora_model), TrainConfig(max_tokens=48), Machine())
    lengths = sorted((len(one.ids) for one in tokenised(make_records(9, "parts"), lora_model)), reverse=True)
    assert f"the 4 longest records, {sum(lengths[:4])} tokens" in found.told
    assert lora_model.read().digest() == before


def test_a_trial_without_numbers_fails(lora_model: LoraModel) -> None:
    base = lora_model.peft.get_base_model().model.embed_tokens.weight
    before = base.detach().clone()
    with torch.no_grad():
        base.fill_(float("nan"))
    try:
        with pytest.raises(ModelError, match="a loss that is a finite number"):
            trial.training(lora_model, parts(lora_model), TrainConfig(max_tokens=48), Machine())
        with pytest.raises(ModelError, match="a perplexity that is a finite number"):
            trial.evaluation(lora_model, parts(lora_model))
    finally:
        with torch.no_grad():
            base.copy_(before)


def test_a_trial_that_does_not_fit_fails(lora_model: LoraModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", full)
    with pytest.raises(ModelError, match=r"lower machine\.row_tokens"):
        trial.training(lora_model, parts(lora_model), TrainConfig(max_tokens=48), Machine())


@pytest.mark.parametrize("modes", [("patient",), ("distributed", "institution"), ("institution",), ()])
def test_a_base_in_which_units_change_each_other_fails_where_single_units_are_protected(
    modes: tuple[str, ...], base_model: str, tmp_path: Path
) -> None:
    populations = {"clinic": Budget((DATA_SET,), modes, 3.0, 1e-4)} if modes else {}
    terms = InstitutionPolicy(data_sets=(DATA_SET,), populations=populations)
    machine = Machine(write_dynamic(Path(base_model), tmp_path / "dynamic"), "cpu")
    if {*modes} <= {"institution"}:
        assert trial.device(machine, terms).value is not None
    else:
        with pytest.raises(ModelError, match="found rope_type: dynamic"):
            trial.device(machine, terms)


@pytest.mark.parametrize(
    ("dtype", "modes", "told"),
    [
        ("bfloat16", ("distributed", "institution"), "single units (distributed)"),
        ("bfloat16", ("patient",), "machine.dtype: float32"),
        ("bfloat16", ("institution",), None),  # the update is clipped as a whole
        ("bfloat16", (), None),
        ("float32", ("patient",), None),
        ("auto", ("patient",), None),
    ],
)
def test_bfloat16_is_to_mind_where_single_units_are_protected(
    dtype: str, modes: tuple[str, ...], told: str | None, base_model: str
) -> None:
    populations = {"clinic": Budget((DATA_SET,), modes, 3.0, 1e-4)} if modes else {}
    terms = InstitutionPolicy(data_sets=(DATA_SET,), populations=populations)
    warnings = trial.device(Machine(base_model, "cpu", dtype), terms).warnings
    assert [told in warning for warning in warnings if told] == ([True] if told else [])
    assert len(warnings) == (told is not None)


def test_weights_that_are_more_than_the_memory_are_not_loaded(base_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: 10 if name == "SC_PHYS_PAGES" else real(name))
    with pytest.raises(ModelError, match=r"expected a base model that the memory holds \(41 kB\)"):
        trial.device(Machine(base_model, device="cpu"), InstitutionPolicy())


def test_little_memory_left_is_to_mind(lora_model: LoraModel, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: 10 if name == "SC_PHYS_PAGES" else real(name))
    found = trial.training(lora_model, parts(lora_model), TrainConfig(max_tokens=48), Machine(device="cpu"))
    assert any("lower machine.row_tokens" in warning for warning in found.warnings)


# --- With the network -------------------------------------------------------------------------------------------------


@pytest.fixture
def member(deployment: Deployment, base_model: str, tmp_path: Path) -> Iterator[Enrolled]:
    """An institution whose roster names a real coordinator, behind a certificate of the roster's authority."""
    now = datetime.now(UTC)
    authority_key, key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    authority = authority_certificate(authority_key, "oncology", now)
    certificate, private = tmp_path / "door.crt", tmp_path / "door.key"
    certificate.write_bytes(
        server_certificate(authority, authority_key, key.public_key(), ["localhost"], now).public_bytes(Encoding.PEM)
    )
    private.write_bytes(
        key.private_bytes(Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    port, stop, ready = free_port(), threading.Event(), threading.Event()
    front = threading.Thread(
        target=serve_front,
        args=("127.0.0.1", port, certificate, private, deployment.endpoint.address, deployment.endpoint.root, stop),
        kwargs={"on_ready": ready.set},
    )
    front.start()
    try:
        assert ready.wait(10)
        pem = authority.public_bytes(Encoding.PEM).decode()
        yield enrol(tmp_path, base_model, authority=pem, address=Address("localhost", port))
    finally:
        stop.set()
        front.join(10)


NETWORK = ("name", "connection", "certificate", "enrolment", "clock")


def test_a_member_reaches_its_coordinator(deployment: Deployment, member: Enrolled) -> None:
    unknown = lines(member, network=True)
    assert verdicts(unknown) == {**dict.fromkeys((*ALONE, *NETWORK[:3]), OK), "enrolment": FAIL}
    assert "expected the coordinator to know this node's key" in unknown["enrolment"].told
    assert silotune(member).exit_code == 7
    with Operator(deployment.endpoint) as operator:
        operator.register("alder", member.keys.node.public_key())
    assert verdicts(lines(member, network=True)) == dict.fromkeys((*ALONE, *NETWORK), OK)
    result = silotune(member)
    assert result.exit_code == 0
    assert "ready: 0 failed" in result.stdout
    with deployment.node(introduction("alder"), deployment.connection(member.keys.node)) as events:
        events.wait("connected")
        assert verdicts(lines(member, network=True))["enrolment"] == OK


def test_a_coordinator_with_another_authority_is_not_trusted(deployment: Deployment, member: Enrolled) -> None:
    address = trust.pinned(member.home).address
    card = trust.pinned(member.home).cards["alder"]
    other = authority_pem(ec.generate_private_key(ec.SECP384R1()))
    trust.pin(
        member.home, roster_of(member.coordinator, card, other, address, serial=2), member.keys, datetime.now(UTC)
    )
    found = lines(member, network=True)
    assert found["certificate"].verdict == FAIL
    assert "found one of another" in found["certificate"].told
    assert "enrolment" not in found


def test_offline_nothing_is_sent(here: Enrolled, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", never)
    monkeypatch.setattr(socket, "getaddrinfo", never)
    assert silotune(here, "--offline").exit_code == 0


def test_without_a_roster_the_coordinator_is_not_looked_for(here: Enrolled) -> None:
    here.home.roster.unlink()
    assert verdicts(lines(here, network=True))["coordinator"] == SKIPPED
