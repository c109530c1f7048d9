"""Units of privacy: which records are one unit, and that nobody's records decide what is used of another's."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.units import Unit, left_out, units_of, units_under
from common.config import PrivacyConfig, TrainConfig
from common.errors import ConfigError
from common.examples import Tokenised, examples_of
from common.models import LoraModel
from common.records import Record
from tests.client.conftest import make_records

SHORT = TrainConfig(max_tokens=12, long="chunk", overlap=2)


def several(persons: dict[str, int]) -> list[Record]:
    """As many records of each person, no two alike, in turn."""
    made = [
        replace(record, person=person, prompt=f"{record.prompt} {number}")
        for person, count in persons.items()
        for number, record in enumerate(make_records(count, f"of {person}"))
    ]
    rounds = itertools.zip_longest(*(list(group) for _, group in itertools.groupby(made, lambda r: r.person)))
    return [record for turn in rounds for record in turn if record is not None]


def tokens(records: list[Record], model: LoraModel, train: TrainConfig = SHORT) -> Tokenised:
    return examples_of(records, model.tokenizer, train)


def test_pieces_of_a_long_record_are_one_unit(lora_model: LoraModel) -> None:
    records = make_records(6, "long", "a long one " * 3)
    found = tokens(records, lora_model)
    units = units_of(records, found, "record", 1, "k")
    assert len(units) == len(records) < len(found.examples)
    assert max(len(unit.examples) for unit in units) > 1
    assert tuple(example for unit in units for example in unit.examples) == found.examples
    for record, unit in zip(records, units, strict=True):
        assert unit.examples == tokens([record], lora_model).examples


def test_all_records_of_a_person_are_one_unit(lora_model: LoraModel) -> None:
    records = several({"ann": 3, "bob": 1, "cem": 4})
    units = units_of(records, tokens(records, lora_model), "patient", 8, "k")
    assert len(units) == 3
    for person, unit in zip(("ann", "bob", "cem"), units, strict=True):
        own = [record for record in records if record.person == person]
        expected = tokens(own, lora_model).examples
        assert sorted(unit.examples, key=lambda e: e.ids) == sorted(expected, key=lambda e: e.ids)
        assert unit.tokens == sum(len(example.ids) for example in expected)
        assert unit.supervised == sum(example.supervised for example in expected)


def test_no_more_than_the_cap_of_a_persons_records_are_used(lora_model: LoraModel) -> None:
    records = several({"ann": 9, "bob": 2})
    whole = TrainConfig(max_tokens=100)
    uncut = units_of(records, tokens(records, lora_model, whole), "patient", 3, "k")
    assert [len(unit.examples) for unit in uncut] == [3, 2]
    # Cut into pieces, the same records are used whole.
    for person, unit, pieces in zip(
        ("ann", "bob"), uncut, units_of(records, tokens(records, lora_model), "patient", 3, "k"), strict=True
    ):
        own = [record for record in records if record.person == person]
        used = [record for record in own if tokens([record], lora_model, whole).examples[0] in unit.examples]
        expected = tokens(used, lora_model).examples
        assert sorted(pieces.examples, key=lambda e: e.ids) == sorted(expected, key=lambda e: e.ids)


@given(others=st.lists(st.tuples(st.sampled_from(["bob", "cem", "dee"]), st.integers(0, 9)), max_size=8), cut=st.data())
@settings(deadline=None, derandomize=True, max_examples=40)
def test_what_is_used_of_a_person_does_not_depend_on_anybody_else(
    others: list[tuple[str, int]], cut: st.DataObject, lora_model: LoraModel
) -> None:
    ann = several({"ann": 6})
    stock = make_records(10, "others")
    mixed = list(ann)
    for person, number in others:
        mixed.insert(cut.draw(st.integers(0, len(mixed))), replace(stock[number], person=person))
    alone = units_of(ann, tokens(ann, lora_model), "patient", 2, "k")
    among = units_of(mixed, tokens(mixed, lora_model), "patient", 2, "k")
    assert alone[0] in among
    assert len(among) == 1 + len({person for person, _ in others})


def test_the_order_of_a_file_does_not_change_the_choice_but_the_key_does(lora_model: LoraModel) -> None:
    records = several({"ann": 9})
    forth = units_of(records, tokens(records, lora_model), "patient", 3, "k")
    back = units_of(records[::-1], tokens(records[::-1], lora_model), "patient", 3, "k")
    assert forth == back
    choices = {units_of(records, tokens(records, lora_model), "patient", 3, f"k{i}") for i in range(8)}
    assert len(choices) > 4


def test_records_that_differ_in_where_a_text_ends_are_placed_apart(lora_model: LoraModel) -> None:
    # With a cap of 1 and two records, each key picks one; were the texts run together, both would be one to it.
    pair = [Record("fever", " cough", "ann"), Record("fever ", "cough", "ann")]
    found = tokens(pair, lora_model, TrainConfig())
    chosen = {units_of(pair, found, "patient", 1, f"k{i}")[0].examples[0].ids for i in range(20)}
    assert len(chosen) == 2


@pytest.mark.parametrize(
    ("unit", "cap", "said"),
    [("institution", 1, "expected record or patient"), ("patient", 0, "at least 1 record a person, found 0")],
)
def test_what_is_no_unit_is_refused(unit: str, cap: int, said: str, lora_model: LoraModel) -> None:
    records = make_records(2, "few")
    with pytest.raises(ConfigError, match=said):
        units_of(records, tokens(records, lora_model), unit, cap, "k")


def test_examples_of_other_records_are_refused(lora_model: LoraModel) -> None:
    records = make_records(3, "few")
    with pytest.raises(ValueError, match="zip"):
        units_of(records[:2], tokens(records, lora_model), "record", 1, "k")


def test_a_unit_without_examples_is_nothing() -> None:
    assert (Unit(()).tokens, Unit(()).supervised) == (0, 0)


def test_what_is_left_out_is_counted(lora_model: LoraModel) -> None:
    records = several({"ann": 9, "bob": 3, "cem": 5})
    found = tokens(records, lora_model, TrainConfig(max_tokens=100))
    for most, told in ((4, "6 of 17 training records are left out, since 2 persons have more than"), (9, None)):
        privacy = PrivacyConfig("patient", noise_multiplier=1.0, records_per_person=most)
        out = left_out(privacy, records)
        used = sum(len(unit.examples) for unit in units_under(privacy, records, found))
        assert used == len(records) - (0 if out is None else out.records)
        assert (None if out is None else out.told()[: len(told or "")]) == told
    assert left_out(PrivacyConfig("record", noise_multiplier=1.0, records_per_person=1), records) is None
