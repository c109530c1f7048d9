"""What a published adapter is worth here: the very scores of each arm, and local-only trained as a run trains."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import client.main
from client import adapters, comparison, data_sets
from client.adapters import Kept
from client.comparison import BASE, FEDERATED, LOCAL, Comparison, LocalTraining
from client.data_sets import DataSets
from client.state import LocalState
from client.training import Assignment, train
from common.adapter import Adapter
from common.base_model import fingerprint
from common.config import DataConfig, FederationConfig, LoraConfig, ModelConfig, PrivacyConfig, TrainConfig, named
from common.errors import ConfigError, DataError, ModelError
from common.evaluation import evaluate
from common.examples import examples_of
from common.messages import Settings
from common.models import LoraModel, load
from common.publication import Publication
from common.records import write_jsonl
from common.text import Example
from tests.client.conftest import make_config, make_records, write_base_model
from tests.client.enrolled import DATA_SET, Enrolled, enrol

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0)
RUN = "night-1"
ROUNDS = 3


@pytest.fixture
def here(base_model: str, tmp_path: Path) -> Enrolled:
    return enrol(tmp_path, base_model)


@pytest.fixture(scope="module")
def settings(base_model: str) -> Settings:
    return Settings.of(
        make_config(
            base_model,
            lora=LORA,
            data=DataConfig(name=DATA_SET, institutions=named("alder", "birch", "cedar"), train_records=[9, 7, 5]),
            train=TrainConfig(batch_size=4, learning_rate=0.1, warmup=0.0, final_rate=1.0, max_tokens=48),
            federation=FederationConfig(rounds=ROUNDS, weight_unit=1),
        )
    )


@pytest.fixture(scope="module")
def model(base_model: str, settings: Settings) -> LoraModel:
    return load(ModelConfig(base_model), LORA, settings.seed)


def examples(here: Enrolled, model: LoraModel, settings: Settings, part: str) -> tuple[Example, ...]:
    records = data_sets.open_data_sets(here.home.data).find(DATA_SET, part)
    return examples_of(records.records, model.tokenizer, settings.train).examples


def alone(here: Enrolled, model: LoraModel, settings: Settings, rounds: int) -> list[tuple[Adapter, float]]:
    """What training alone gives after each round, and its perplexity on validation records; by the plain loop."""
    start = load(ModelConfig(model.path), LORA, settings.seed).read()
    training, validation = (examples(here, model, settings, part) for part in ("train", "validation"))
    adapter, state, found = start, LocalState(), []
    for number in range(rounds + 1):
        if number:
            assignment = Assignment(number, settings.rounds, tuple(start.factors), settings.seed, "alder")
            trained = train(model, training, adapter, state, settings.train, assignment)
            adapter, state = trained.adapter, trained.state
        model.write(adapter)
        found.append((adapter, evaluate(model, validation).perplexity))
    return found


@pytest.fixture(scope="module")
def learnt(base_model: str, model: LoraModel, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """An adapter that such records were learnt with."""
    there = enrol(tmp_path_factory.mktemp("there"), base_model)
    return alone(there, model, replace(settings, seed=settings.seed + 1), 2)[-1][0]


@pytest.fixture
def federated(here: Enrolled, learnt: Adapter, settings: Settings, base_model: str) -> Adapter:
    """An adapter that was published, in a run that this institution trained in."""
    adapter = learnt
    said = Publication(RUN, 2, fingerprint(base_model), LORA, adapter.digest()).signed(here.coordinator)
    adapters.keep(here.home, said, adapter, base_model)
    run = here.home.runs / RUN
    run.mkdir(parents=True)
    (run / "settings.json").write_text(settings.to_json())
    return adapter


def kept(here: Enrolled) -> Kept:
    return adapters.verified(here.home, RUN, here.coordinator.public)


def compared(here: Enrolled, told: list[str] | None = None, **changes: Any) -> Comparison:
    file = data_sets.read(here.home.data)
    asked: dict[str, Any] = {
        "home": here.home,
        "name": "alder",
        "kept": kept(here),
        "records": DataSets(file, here.home.root),
        "machine": file.machine,
        "data_set": None,
        "exact": ("coding",),
        "local": LocalTraining(),
        "tell": (told if told is not None else []).append,
    }
    return comparison.compare(**{**asked, **changes})


def test_each_arm_has_its_own_scores(
    here: Enrolled, model: LoraModel, settings: Settings, federated: Adapter, base_model: str
) -> None:
    found = compared(here)
    by_hand = alone(here, model, settings, ROUNDS)
    best = min(range(ROUNDS + 1), key=lambda number: by_hand[number][1])
    assert 0 < best < ROUNDS  # such a rate goes too far, so that the last round is not the best
    assert found.local is not None
    assert (found.local.best_round, found.local.rounds, found.local.trained_before) == (best, ROUNDS, False)
    assert found.local.adapter.digest() == by_hand[best][0].digest()
    test = examples(here, model, settings, "test")
    for arm, adapter in ((BASE, by_hand[0][0]), (LOCAL, by_hand[best][0]), (FEDERATED, federated)):
        model.write(adapter)
        assert found.scores[arm] == evaluate(model, test, ["coding"])
    perplexities = [found.scores[arm].perplexity for arm in (BASE, LOCAL, FEDERATED)]
    assert len(set(perplexities)) == 3
    assert perplexities[0] == max(perplexities)
    assert found.records == len(test) > 2
    assert found.scores[BASE].answers == len(test)


def test_the_second_call_trains_nothing(here: Enrolled, federated: Adapter) -> None:
    first, second = [], []
    once, again = compared(here, first), compared(here, second)
    assert once.local is not None
    assert again.local is not None
    assert again.local.trained_before
    assert again.local.best_round == once.local.best_round
    assert again.scores == once.scores
    assert sum("round" in line for line in first) == ROUNDS
    assert sum("round" in line for line in second) == 0


def change_records(here: Enrolled, settings: Settings) -> None:
    write_jsonl(here.records, make_records(61, "alder"))


def change_settings(here: Enrolled, settings: Settings) -> None:
    changed = replace(settings, train=replace(settings.train, learning_rate=0.2))
    (here.home.runs / RUN / "settings.json").write_text(changed.to_json())


def damage_adapter(here: Enrolled, settings: Settings) -> None:
    file = here.home.runs / RUN / "local-only" / DATA_SET / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))


def damage_notes(here: Enrolled, settings: Settings) -> None:
    (here.home.runs / RUN / "local-only" / DATA_SET / "comparison.json").write_text("{")


def fewer_rounds(here: Enrolled, settings: Settings) -> None:
    (here.home.runs / RUN / "metrics.jsonl").write_text('{"round": 1}\n{"round": 2}\n')


def test_what_no_longer_fits_is_trained_anew(here: Enrolled, settings: Settings, federated: Adapter) -> None:
    compared(here)
    for change in (change_records, change_settings, damage_adapter, damage_notes, fewer_rounds):
        change(here, settings)
        after = compared(here)
        assert after.local is not None
        assert not after.local.trained_before, change.__name__
        assert after.local.rounds == (2 if change is fewer_rounds else ROUNDS)
    again = compared(here)
    assert again.local is not None
    assert again.local.trained_before
    assert again.scores == after.scores


def test_as_many_rounds_are_trained_as_the_institution_took_part_in(
    here: Enrolled, model: LoraModel, settings: Settings, federated: Adapter
) -> None:
    (here.home.runs / RUN / "metrics.jsonl").write_text('{"round": 1, "void": false}\n')
    found = compared(here)
    by_hand = alone(here, model, settings, 1)
    assert found.local is not None
    assert found.local.rounds == 1
    assert found.local.adapter.digest() == min(by_hand, key=lambda pair: pair[1])[0].digest()


def test_training_that_diverges_ends_with_the_best_before(
    here: Enrolled, settings: Settings, federated: Adapter
) -> None:
    wild = replace(settings, train=replace(settings.train, learning_rate=2e37, max_grad_norm=1e30))
    (here.home.runs / RUN / "settings.json").write_text(wild.to_json())
    told: list[str] = []
    found = compared(here, told)
    assert found.local is not None
    assert "local-only: round 1 of 3 diverged, which ends it" in told
    assert found.local.best_round == 0
    assert math.isfinite(found.scores[LOCAL].perplexity)
    assert found.scores[LOCAL] == found.scores[BASE]


def private(settings: Settings, mode: str = "patient") -> Settings:
    privacy = PrivacyConfig(mode=mode, noise_multiplier=1, sampling_rate=0.5)
    return replace(settings, privacy=privacy, train=replace(settings.train, passes_per_round=1.0))


def test_after_a_private_run_local_only_is_as_private(here: Enrolled, settings: Settings, federated: Adapter) -> None:
    (here.home.runs / RUN / "settings.json").write_text(private(settings).to_json())
    spent = {file: file.read_bytes() for file in here.home.ledger.iterdir()}

    def trained_twice(how: LocalTraining) -> tuple[list[str], list[str]]:
        told: tuple[list[str], list[str]] = ([], [])
        for lines in told:
            found = compared(here, lines, local=how)
            assert found.local is not None
            assert not found.local.trained_before
            damage_notes(here, settings)
        return told

    once, again = trained_twice(LocalTraining())
    assert len(once) == len(again)
    assert once != again  # of fresh noise each time
    once, again = trained_twice(LocalTraining(noise=False))
    assert once == again
    assert spent == {file: file.read_bytes() for file in here.home.ledger.iterdir()}  # nothing leaves


@pytest.mark.parametrize(
    ("mode", "alone", "passes"),
    [("none", "none", 1.0), ("record", "record", 1.0), ("patient", "patient", 1.0), ("distributed", "record", 0.5)],
)
def test_who_trains_alone_has_the_privacy_of_the_run(settings: Settings, mode: str, alone: str, passes: float) -> None:
    run = private(settings, mode)
    assert LocalTraining().of(run) == replace(
        run, privacy=replace(run.privacy, mode=alone), train=replace(run.train, passes_per_round=passes)
    )


def test_who_sends_nothing_protects_no_institution(settings: Settings) -> None:
    run = private(settings, "institution")
    assert not LocalTraining().of(run).privacy.private
    assert LocalTraining().of(run).train == run.train


def test_without_noise_another_rate_is_taken(settings: Settings) -> None:
    run = private(settings)
    assert LocalTraining(noise=False).of(run).privacy == PrivacyConfig()
    assert LocalTraining(noise=False).of(run).train.learning_rate == TrainConfig().learning_rate
    assert LocalTraining(rate=0.3, noise=False).of(run).train.learning_rate == 0.3
    assert LocalTraining(rate=0.3).of(settings).train.learning_rate == 0.3
    assert LocalTraining(noise=False).of(settings) == settings  # which has none to leave out


def test_without_the_others_arm_nothing_is_trained(here: Enrolled, federated: Adapter) -> None:
    found = compared(here, local=None)
    assert found.local is None
    assert set(found.scores) == {BASE, FEDERATED}
    assert not (here.home.runs / RUN / "local-only").exists()


def test_a_run_that_was_not_taken_part_in_needs_to_be_told_more(here: Enrolled, federated: Adapter) -> None:
    (here.home.runs / RUN / "settings.json").unlink()
    for changes in ({}, {"local": None}, {"data_set": DATA_SET}):
        with pytest.raises(ConfigError, match=r"expected the settings of run .* --data-set NAME --no-local"):
            compared(here, **changes)
    assert set(compared(here, local=None, data_set=DATA_SET).scores) == {BASE, FEDERATED}


def test_a_data_set_that_is_not_there_is_told(here: Enrolled, federated: Adapter) -> None:
    with pytest.raises(ConfigError, match=r"expected a data set that .* names \(notes\), found 'images'"):
        compared(here, data_set="images")


def test_another_base_model_is_refused(here: Enrolled, federated: Adapter, tmp_path: Path) -> None:
    other = write_base_model(tmp_path / "other", seed=77)
    with pytest.raises(ModelError, match="differs in weights"):
        compared(here, machine=replace(data_sets.read(here.home.data).machine, model=str(other)))


def test_records_that_are_gone_are_told(here: Enrolled, federated: Adapter) -> None:
    here.records.unlink()
    with pytest.raises(DataError, match="expected a file of records, found none"):
        compared(here)


# --- The command ------------------------------------------------------------------------------------------------------


def silotune(*arguments: object) -> Result:
    return CliRunner().invoke(client.main.app, ["adapter", "evaluate", *(str(argument) for argument in arguments)])


def test_the_command_shows_a_table(here: Enrolled, federated: Adapter) -> None:
    result = silotune(RUN, "--home", here.home.root)
    assert result.exit_code == 0, result.output
    for word in ("base model", "local-only", "federated", "perplexity", "exact answers", "test records"):
        assert word in result.stdout


def test_the_command_gives_the_same_as_json(here: Enrolled, federated: Adapter) -> None:
    result = silotune(RUN, "--home", here.home.root, "--exact", "coding", "--json")
    assert result.exit_code == 0, result.output
    told, expected = json.loads(result.stdout), compared(here)
    assert {arm: scores["perplexity"] for arm, scores in told["scores"].items()} == {
        arm: scores.perplexity for arm, scores in expected.scores.items()
    }
    assert told["run"] == RUN
    assert told["exact"] == ["coding"]
    assert told["local"]["rounds"] == ROUNDS
    none = json.loads(silotune(RUN, "--home", here.home.root, "--no-local", "--exact", "note", "--json").stdout)
    assert none["local"] is None
    assert none["scores"]["base"]["accuracy"] is None


@pytest.mark.parametrize("rate", ["0", "-0.1", "inf", "nan"])
def test_a_rate_that_is_none_is_refused(here: Enrolled, federated: Adapter, rate: str) -> None:
    result = silotune(RUN, "--home", here.home.root, "--learning-rate", rate)
    assert result.exit_code == 2
    assert "--learning-rate: expected a number above 0" in " ".join(result.stderr.split())


def test_the_command_tells_how_local_only_was_trained(here: Enrolled, settings: Settings, federated: Adapter) -> None:
    (here.home.runs / RUN / "settings.json").write_text(private(settings).to_json())
    noised = silotune(RUN, "--home", here.home.root)
    assert noised.exit_code == 0, noised.output
    assert "with the noise of mode patient, learning rate 0.1," in " ".join(noised.stdout.split())
    free = json.loads(silotune(RUN, "--home", here.home.root, "--no-noise", "--learning-rate", 0.2, "--json").stdout)
    assert (free["local"]["privacy"], free["local"]["learning_rate"]) == ("none", 0.2)
