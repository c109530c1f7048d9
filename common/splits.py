"""Splits by person: who stands in training, and who is kept for validation and test."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import DataError
from common.records import Record

SETS = ("train", "validation", "test")


@dataclass(frozen=True)
class Shares:
    """The sets of one file. No person is in two of them.

    central_validation, central_test: what an institution of a simulation lends to a coordinator without a file.
    """

    train: tuple[Record, ...] = ()
    validation: tuple[Record, ...] = ()
    test: tuple[Record, ...] = ()
    central_validation: tuple[Record, ...] = ()
    central_test: tuple[Record, ...] = ()


def place_of(person: str, seed: int) -> float:
    """A number in [0, 1), evenly spread over persons.

    Of person and seed alone (BLAKE2 keyed by the seed), so that somebody who is known by the same key in two files
    falls into the same set in both. A key that two institutions give to different people does no harm.
    """
    digest = hashlib.blake2b(person.encode(), digest_size=7, key=seed.to_bytes(8, "big")).digest()
    return int.from_bytes(digest, "big") / 2**56


def split(records: Sequence[Record], held_out: float, seed: int, lends: bool, source: object) -> Shares:
    """Splits an institution's records: the share `held_out` of persons in each set but `train`, order kept.

    lends: whether as much again goes to the coordinator's validation and test.

    Raises DataError when a set of its own stays empty.
    """
    parts = ["validation", "test", *(["central_validation", "central_test"] if lends else [])]
    found: dict[str, list[Record]] = {name: [] for name in (*parts, "train")}
    for record in records:
        number = int(place_of(record.person, seed) / held_out)
        found[parts[number] if number < len(parts) else "train"].append(record)
    empty = [name for name in SETS if not found[name]]
    if empty:
        raise DataError(_too_few(records, empty, held_out, source))
    return Shares(**{name: tuple(part) for name, part in found.items()})


def split_held_out(records: Sequence[Record], seed: int, source: object) -> tuple[tuple[Record, ...], ...]:
    """The coordinator's validation and test, half of the persons each. Raises DataError when one is empty."""
    halves = tuple(
        tuple(record for record in records if (place_of(record.person, seed) < 0.5) is first) for first in (True, False)
    )
    empty = [name for name, half in zip(("validation", "test"), halves, strict=True) if not half]
    if empty:
        raise DataError(_too_few(records, empty, 0.5, source))
    return halves


def _too_few(records: Sequence[Record], empty: Sequence[str], share: float, source: object) -> str:
    persons = len({record.person for record in records})
    return (
        f"{source}: expected persons enough for every set, found {persons} in {len(records)} records, of which none"
        f" falls into {' or '.join(empty)} (the share of persons in each held-out set is {share:g}). Give more records,"
        " raise data.held_out, or try another data.seed"
    )
