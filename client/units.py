"""Units of privacy: whose influence on an update is bounded, and what of their data is used."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.config import PrivacyConfig
from common.errors import ConfigError, ModelError
from common.examples import Tokenised
from common.records import Record
from common.text import Example

if TYPE_CHECKING:
    from common.models import LoraModel

RECORD, PATIENT = "record", "patient"

_EVERY_RUN = "silotune: which of a person's records are used"


@dataclass(frozen=True)
class Unit:
    """All examples of one record, or of one person; private to the institution.

    Empty, it is a unit that contributes nothing: what the neighbour of a data set has in its place.
    """

    examples: tuple[Example, ...]

    @property
    def tokens(self) -> int:
        """All tokens."""
        return sum(len(example.ids) for example in self.examples)

    @property
    def supervised(self) -> int:
        """Tokens that are learned from."""
        return sum(example.supervised for example in self.examples)


def units_of(
    records: Sequence[Record], tokenised: Tokenised, unit: str, records_per_person: int, key: str
) -> tuple[Unit, ...]:
    """The units of a set of records, in the order in which each first appears.

    unit: `record` or `patient`. The pieces of a long record are one unit, and so are all records of a person, of which
    the `records_per_person` with the smallest keyed hash are used. The hash is of the record and `key` alone, so that
    nobody's records decide which of another person's are used; a key that stays the same keeps the choice the same.

    Raises ConfigError for another unit or a cap below 1, ValueError when `tokenised` is not of these records.
    """
    if unit not in (RECORD, PATIENT):
        raise ConfigError(f"expected {RECORD} or {PATIENT} as the unit of privacy, found {unit!r:.40}")
    if records_per_person < 1:
        raise ConfigError(f"expected at least 1 record a person, found {records_per_person}")
    pairs = list(zip(records, tokenised.by_record, strict=True))
    if unit == RECORD:
        return tuple(Unit(examples) for _, examples in pairs)
    persons: dict[str, list[tuple[bytes, tuple[Example, ...]]]] = {}
    for record, examples in pairs:
        persons.setdefault(record.person, []).append((_place(record, key), examples))
    return tuple(_unit(own, records_per_person) for own in persons.values())


def units_under(privacy: PrivacyConfig, records: Sequence[Record], tokenised: Tokenised) -> tuple[Unit, ...]:
    """The units that `privacy` has, where it takes any; of a person's records the same in every run.

    Raises what `units_of` raises.
    """
    unit = PATIENT if privacy.mode == PATIENT else RECORD
    return units_of(records, tokenised, unit, privacy.records_per_person, _EVERY_RUN)


@dataclass(frozen=True)
class LeftOut:
    """Records that are not trained on, since their persons have more than are used of one. most: that are used."""

    records: int
    of: int
    persons: int
    most: int

    def told(self) -> str:
        """In one line, for whoever has the records."""
        whose = "1 person has" if self.persons == 1 else f"{self.persons} persons have"
        return (
            f"{self.records} of {self.of} training records are left out, since {whose} more than"
            f" privacy.records_per_person = {self.most}; a larger one takes no more noise"
        )


def left_out(privacy: PrivacyConfig, records: Sequence[Record]) -> LeftOut | None:
    """What `units_under` leaves out of a set; None where it leaves out nothing."""
    if privacy.mode != PATIENT:
        return None
    most = privacy.records_per_person
    more = [count - most for count in Counter(record.person for record in records).values() if count > most]
    return LeftOut(sum(more), len(records), len(more), most) if more else None


def require_units_apart(model: LoraModel) -> None:
    """Raises ModelError for a model in which a unit's gradient depends on the units before it, whatever its rows."""
    if model.remembers:
        raise ModelError(
            f"{model.path}: expected a base model whose rotary positions follow from a text alone, found"
            " rope_type: dynamic, which goes by the longest text so far; a unit's gradient would depend on other units,"
            " which no noise is for. Use another base model, or rope_type: linear, yarn or llama3 if it bears that"
        )


def _unit(own: list[tuple[bytes, tuple[Example, ...]]], most: int) -> Unit:
    used = sorted(own, key=lambda pair: pair[0])[:most]
    return Unit(tuple(example for _, examples in used for example in examples))


def _place(record: Record, key: str) -> bytes:
    """Where a record stands among those of its person."""
    keyed = hashlib.blake2b(digest_size=16, key=hashlib.sha256(key.encode()).digest())
    for text in (*record.texts, record.kind):
        content = text.encode()
        keyed.update(len(content).to_bytes(8, "big") + content)
    return keyed.digest()
