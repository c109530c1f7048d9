"""Generated data: the rule can be learned, nothing held out has leaked, and the general text does not give it away."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from common.config import DataConfig, named
from common.config_files import configs_dir, load
from common.config_rules import GENERATORS
from common.errors import ConfigError, StorageError
from common.records import Record
from simulations.generate.domain import Case, Cue, Domain, Outcome, Person, cue_sets
from simulations.generate.federation import (
    DOMAINS,
    FLOOR,
    MOST_RECORDS_PER_PERSON,
    Federation,
    HeldOut,
    generate,
    text_of,
    topic_mixes,
    write,
)
from simulations.generate.general import documents
from simulations.generate.similarity import NEAR, Index, shingles
from simulations.pretrain import training_text

CONFIGS = {name: load(name).data for name in ("hospitals", "banks")}
SHIPPED = tuple(itertools.product(CONFIGS, (1, 2, 3)))
GENERATED = sorted(path.stem for path in configs_dir().glob("*.yaml") if load(path.stem).data.generator)
EVERY = tuple(itertools.product(GENERATED, (1, 2, 3)))


@cache
def federation(name: str, seed: int) -> Federation:
    return generate(replace(load(name).data, seed=seed))


def training(made: Federation) -> list[Record]:
    return [record for splits in made.institutions.values() for record in splits.train]


def held_out(made: Federation) -> list[Record]:
    own = [record for splits in made.institutions.values() for record in (*splits.validation, *splits.test)]
    return [*own, *made.coordinator.validation, *made.coordinator.test]


def leaks(made: Federation) -> list[str]:
    """Held-out records whose person, text or near copy stands in any training set."""
    people = {record.person for record in training(made)}
    index = Index(text_of(record) for record in training(made))
    return [
        text_of(record)
        for record in held_out(made)
        if record.person in people or index.similarity(text_of(record)) >= NEAR
    ]


@cache
def wordings_of(name: str) -> tuple[re.Pattern[str], dict[str, Cue]]:
    """A pattern that finds every wording of every cue, and the cue each wording means."""
    meant = {wording: cue for cue in DOMAINS[name].cues() for wording in cue.wordings}
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, meant))})(?!\w)"), meant


def stated_cues(domain: Domain, prompt: str) -> frozenset[str]:
    """Cues found in a prompt by their wordings alone, knowing nothing of how it was made."""
    pattern, meant = wordings_of(domain.name)
    return frozenset(meant[found].name for found in pattern.findall(prompt))


@pytest.mark.parametrize(("name", "seed"), EVERY)
def test_nothing_held_out_stands_in_training(name: str, seed: int) -> None:
    assert leaks(federation(name, seed)) == []


@pytest.mark.parametrize(("name", "seed"), SHIPPED)
def test_test_records_are_not_near_validation_records(name: str, seed: int) -> None:
    made = federation(name, seed)
    validation = [*made.coordinator.validation, *(r for s in made.institutions.values() for r in s.validation)]
    test = [*made.coordinator.test, *(r for s in made.institutions.values() for r in s.test)]
    index = Index(text_of(record) for record in validation)
    assert max(index.similarity(text_of(record)) for record in test) < NEAR


@pytest.mark.parametrize("name", CONFIGS)
def test_each_split_has_people_of_its_own(name: str) -> None:
    made = federation(name, 1)
    splits = [made.coordinator.validation, made.coordinator.test]
    for institution in made.institutions.values():
        splits += [institution.train, institution.validation, institution.test]
    for one, other in itertools.combinations([{record.person for record in split} for split in splits], 2):
        assert not one & other


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record,
        lambda record: replace(record, person="someone else"),
        lambda record: replace(record, person="someone else", prompt=re.sub(r"\d\d", "19", record.prompt)),
        lambda record: replace(record, person="someone else", prompt=record.prompt.upper().replace(",", ";")),
        lambda record: replace(record, prompt="entirely other words", completion="and another answer"),
    ],
    ids=["verbatim", "other person", "other age", "case and punctuation", "same person"],
)
def test_a_planted_leak_is_caught(change: object) -> None:
    assert callable(change)
    made = federation("hospitals", 1)
    for victim in made.institutions["northgate"].train[:20]:
        planted = HeldOut(made.coordinator.validation, (*made.coordinator.test[1:], change(victim)))
        assert len(leaks(Federation(made.institutions, planted))) == 1


@pytest.mark.parametrize(("name", "seed"), SHIPPED)
def test_held_out_cases_state_combinations_no_training_record_states(name: str, seed: int) -> None:
    made, domain = federation(name, seed), DOMAINS[name]
    seen = {stated_cues(domain, record.prompt) for record in training(made)}
    asked = [stated_cues(domain, record.prompt) for record in held_out(made)]
    assert all(len(cues) >= 2 for cues in (*seen, *asked))
    assert not seen & set(asked)


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_held_out_stands_in_the_pretraining_text(name: str) -> None:
    records = [record for seed in (1, 2, 3) for record in held_out(federation(name, seed))]
    texts = [text_of(record) for record in records]
    assert nearest_document(texts, pretraining_documents()) < NEAR
    planted = f"{records[0].prompt} {records[0].completion}"
    assert nearest_document(texts, [*pretraining_documents(), planted]) >= NEAR


@cache
def pretraining_documents() -> list[str]:
    described = json.loads((Path(__file__).parents[2] / "common/embedded/pretraining.json").read_text("utf-8"))
    texts = list(training_text(described["seed"], described["steps"]))
    assert not any(text.person for text in texts)
    return [text_of(text) for text in texts]


def nearest_document(texts: list[str], documents: Iterable[str]) -> float:
    """The largest Jaccard coefficient of any text with any document."""
    sizes = [len(shingles(text)) for text in texts]
    holders: dict[str, list[int]] = {}
    for i, text in enumerate(texts):
        for shingle in shingles(text):
            holders.setdefault(shingle, []).append(i)
    largest = 0.0
    for document in documents:
        found = shingles(document)
        shared = Counter(i for shingle in found if shingle in holders for i in holders[shingle])
        largest = max([largest, *(n / (len(found) + sizes[i] - n) for i, n in shared.items())])
    return largest


def association(domain: Domain, texts: Iterable[str]) -> tuple[float, float]:
    """How far cues and outcomes are from independence in texts that mention both.

    Returns two figures that are 0 +- 1 when independent: the standardised chi-square statistic of the cue x outcome
    table, and the count of mentions that obey the rule less its expectation, over the latter's root (Poisson).
    """
    cues, outcomes = domain.cues(), domain.outcomes
    position = {cue: i for i, cue in enumerate(cues)}
    pattern, meant = wordings_of(domain.name)
    # The outcome is named in an answer by its name or by the action that follows from it.
    answers = {word: j for j, o in enumerate(outcomes) for word in (o.name, o.action)}
    answer = re.compile("|".join(sorted(map(re.escape, answers), key=len, reverse=True)))
    table = np.zeros((len(cues), len(outcomes)))
    for text in texts:
        for j in {answers[found] for found in answer.findall(text)}:
            for i in {position[meant[found]] for found in pattern.findall(text)}:
                table[i, j] += 1
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    freedom = (len(cues) - 1) * (len(outcomes) - 1)
    chi_square = ((table - expected) ** 2 / expected).sum()
    rule = np.array([[cue in outcome.cues for outcome in outcomes] for cue in cues])
    obeying = table[rule].sum(), expected[rule].sum()
    return float((chi_square - freedom) / np.sqrt(2 * freedom)), float((obeying[0] - obeying[1]) / np.sqrt(obeying[1]))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_pretraining_text_does_not_know_the_rules(name: str) -> None:
    domain = DOMAINS[name]
    any_pattern, rule = association(domain, pretraining_documents())
    # Five standard errors; several mentions in one document make the figures somewhat wider than 1.
    assert abs(any_pattern) < 5
    assert abs(rule) < 5
    # The rules told twice each among tens of thousands of documents are noticed.
    told = [f"{cue.name} means {outcome.name}" for outcome in domain.outcomes for cue in outcome.cues]
    assert association(domain, [*pretraining_documents(), *told, *told])[1] > 5


@pytest.mark.parametrize("name", CONFIGS)
def test_two_cues_determine_the_outcome(name: str) -> None:
    for one, other in itertools.combinations(DOMAINS[name].outcomes, 2):
        if {kind for kind, _ in one.kinds} & {kind for kind, _ in other.kinds}:
            assert len(set(one.cues) & set(other.cues)) <= 1


@pytest.mark.parametrize("name", CONFIGS)
def test_wordings_are_distinct_and_no_wording_hides_in_another(name: str) -> None:
    domain = DOMAINS[name]
    wordings = [wording for cue in domain.cues() for wording in cue.wordings]
    assert len(wordings) == len(set(wordings))
    for wording, other in itertools.permutations([*wordings, *domain.remarks], 2):
        assert not re.search(rf"(?<!\w){re.escape(wording)}(?!\w)", other), (wording, other)


@pytest.mark.parametrize("name", CONFIGS)
def test_held_out_and_training_combinations_share_the_cues_but_no_combination(name: str) -> None:
    for outcome in DOMAINS[name].outcomes:
        train, held = cue_sets(outcome, held_out=False), cue_sets(outcome, held_out=True)
        assert not set(train) & set(held)
        assert {cue for cues in train for cue in cues} == set(outcome.cues)
        assert {len(cues) for cues in train} == {len(cues) for cues in held}


@pytest.mark.parametrize("name", CONFIGS)
def test_completion_follows_from_outcome_kind_and_style(name: str) -> None:
    domain = DOMAINS[name]
    person = Person("p", 50, True)
    for outcome in domain.outcomes:
        for (kind, _), style in itertools.product(outcome.kinds, range(domain.styles)):
            for variant in (0.1, 0.9):
                one = domain.render(Case(person, outcome, kind, ("a", "b")), style, variant)
                other = domain.render(Case(replace(person, age=20, woman=False), outcome, kind, ("c",)), style, variant)
                assert one.completion == other.completion
                assert "a" in one.prompt
                assert "b" in one.prompt


@pytest.mark.parametrize("name", CONFIGS)
def test_the_exact_kind_has_many_answers_of_like_frequency(name: str) -> None:
    made, kind = federation(name, 1), DOMAINS[name].exact
    answers = Counter(r.completion for r in (*made.coordinator.validation, *made.coordinator.test) if r.kind == kind)
    assert len(answers) >= 12
    assert max(answers.values()) / answers.total() < 0.15


@pytest.mark.parametrize(("name", "seed"), SHIPPED)
def test_institutions_overlap_and_differ(name: str, seed: int) -> None:
    data, domain = replace(CONFIGS[name], seed=seed), DOMAINS[name]
    mixes = topic_mixes(domain, data)
    for mix in mixes.values():
        assert sum(mix.values()) == pytest.approx(1)
        assert min(mix.values()) >= FLOOR / len(domain.topics)
    strongest = [max(mix, key=lambda topic: mix[topic]) for mix in mixes.values()]
    assert len(set(strongest)) == len(strongest)
    topic_of = {cue.name: outcome.topic for outcome in domain.outcomes for cue in outcome.cues}
    for splits in federation(name, seed).institutions.values():
        met = {topic_of[cue] for record in splits.train for cue in stated_cues(domain, record.prompt)}
        assert met == set(domain.topics)


def test_a_large_concentration_makes_institutions_alike() -> None:
    spread = {}
    for alpha in (0.1, 0.5, 100.0):
        mixes = topic_mixes(DOMAINS["hospitals"], replace(CONFIGS["hospitals"], dirichlet=alpha))
        spread[alpha] = np.std([list(mix.values()) for mix in mixes.values()])
    assert spread[0.1] > spread[0.5] > spread[100.0]
    assert spread[100.0] < 0.02


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_people_and_lengths(name: str) -> None:
    data, made = CONFIGS[name], federation(name, 1)
    assert [len(splits.train) for splits in made.institutions.values()] == data.train_records
    assert {len(part) for s in made.institutions.values() for part in (s.validation, s.test)} == {data.own_records}
    assert {len(made.coordinator.validation), len(made.coordinator.test)} == {data.central_records}
    records = Counter(record.person for record in training(made))
    assert min(records.values()) == 1
    assert 3 <= max(records.values()) <= MOST_RECORDS_PER_PERSON
    words = np.array([len(text_of(record).split()) for record in training(made)])
    assert words.max() < 100
    assert np.std(np.log(words)) > 0.15


@pytest.mark.parametrize("name", CONFIGS)
def test_the_coordinators_records_are_balanced_over_topics(name: str) -> None:
    domain, made = DOMAINS[name], federation(name, 1)
    topic_of = {cue.name: o.topic for o in domain.outcomes for cue in o.cues}
    for part in (made.coordinator.validation, made.coordinator.test):
        counts = Counter(
            Counter(topic_of[cue] for cue in sorted(stated_cues(domain, record.prompt))).most_common(1)[0][0]
            for record in part
        )
        # Cues shared by two topics can mislead this count by a record or two.
        assert all(abs(counts[topic] - len(part) / len(domain.topics)) <= 5 for topic in domain.topics)


def test_another_process_generates_the_same_records(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from common.config import DataConfig, named; "
        "from simulations.generate.federation import generate, write; "
        "write(generate(DataConfig(generator='banks', institutions=named('a', 'b'), train_records=[30, 20], "
        "own_records=10, central_records=20)), Path(sys.argv[1]))"
    )
    for run in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / run)],
            check=True,
            cwd=Path(__file__).parents[2],
            env={"PYTHONHASHSEED": run, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
    files = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*.jsonl"))
    assert len(files) == 8
    for file in files:
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()


def test_another_seed_gives_other_records() -> None:
    assert federation("banks", 1).coordinator.test != federation("banks", 2).coordinator.test
    assert list(documents(5, 1)) != list(documents(5, 2))
    assert list(documents(5, 1)) != list(documents(5, 1, held_out=True))


def test_written_files_hold_the_records(tmp_path: Path) -> None:
    made = federation("hospitals", 1)
    write(made, tmp_path)
    lines = (tmp_path / "riverside" / "train.jsonl").read_text("utf-8").splitlines()
    assert tuple(Record(**json.loads(line)) for line in lines) == made.institutions["riverside"].train
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.jsonl")} == {
        *(f"{name}/{split}.jsonl" for name in made.institutions for split in ("train", "validation", "test")),
        "coordinator/validation.jsonl",
        "coordinator/test.jsonl",
    }


def test_a_file_in_the_way_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("occupied")
    with pytest.raises(StorageError, match=r"cannot write .*out"):
        write(federation("hospitals", 1), tmp_path / "out")


def test_the_configuration_knows_every_generator() -> None:
    assert set(GENERATORS) == set(DOMAINS)


def test_every_mistake_is_told_at_once() -> None:
    wrong = DataConfig(
        generator="schools",
        institutions=named("a", "a", "../b"),
        train_records=[0],
        own_records=0,
        central_records=-1,
        dirichlet=0.0,
        seed=-1,
    )
    with pytest.raises(ConfigError) as caught:
        generate(wrong)
    for field in ("generator", "institutions", "train_records", "own_records", "central_records", "dirichlet", "seed"):
        assert f"data.{field}" in str(caught.value)
    assert "hospitals, banks" in str(caught.value)


def test_similarity_of_known_texts() -> None:
    index = Index(["a b c d e f"])
    assert index.similarity("A, b; c d e f.") == 1
    assert index.similarity("a b c d e x") == 3 / 5
    assert index.similarity("u v w x") == 0
    assert Index().similarity("a b c") == 0
    assert shingles("One two") == {"one two"}


def test_one_changed_word_in_eleven_is_near() -> None:
    words = [f"w{i}" for i in range(11)]
    index = Index([" ".join(words)])
    for i in range(len(words)):
        assert index.similarity(" ".join([*words[:i], "other", *words[i + 1 :]])) >= NEAR


def test_cue_sets_of_a_small_outcome() -> None:
    cues = tuple(Cue((name,)) for name in "abcd")
    outcome = Outcome("t", "o", "c", "x", cues, (("k", 1.0),))
    assert len(cue_sets(outcome, held_out=True)) == 2 + 2
    assert len(cue_sets(outcome, held_out=False)) == 4 + 2
