"""A federation of generated institutions: who sees what, split by person, and the files it is written to."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from common.config import COORDINATOR, DataConfig
from common.config_rules import RULES, impossible
from common.errors import ConfigError
from common.records import Record, write_jsonl
from simulations.generate.banks import BANKS
from simulations.generate.domain import Case, Domain, Outcome, Person, draw_cues
from simulations.generate.hospitals import HOSPITALS
from simulations.generate.similarity import NEAR, Index

DOMAINS: Mapping[str, Domain] = {domain.name: domain for domain in (HOSPITALS, BANKS)}

# Part of every institution's mix that is spread evenly over the topics, so that each sees some of every topic.
FLOOR = 0.3
MOST_RECORDS_PER_PERSON = 6
# How often an institution uses its own favourite wording of a cue; otherwise any wording.
_FAVOURITE = 0.7
# Redraws of one held-out record before the generator gives up on telling it apart from what stands already.
_ATTEMPTS = 500


@dataclass(frozen=True)
class Splits:
    """One institution's records; no person is in two of the three."""

    train: tuple[Record, ...]
    validation: tuple[Record, ...]
    test: tuple[Record, ...]


@dataclass(frozen=True)
class HeldOut:
    """The coordinator's records, balanced over topics; nobody in them is in any institution's records."""

    validation: tuple[Record, ...]
    test: tuple[Record, ...]


@dataclass(frozen=True)
class Federation:
    """institutions: by name, in the configuration's order."""

    institutions: dict[str, Splits]
    coordinator: HeldOut


@dataclass(frozen=True)
class _House:
    """How one institution writes: its style and, for each cue, its favourite wording."""

    style: int
    favourites: dict[str, str]


@dataclass(frozen=True)
class _Episode:
    """Records of one person about one outcome."""

    outcome: Outcome
    records: int


def generate(data: DataConfig) -> Federation:
    """All records of a federation, the same for the same `data` in any process.

    Held-out records state combinations of cues that no training record states, and are redrawn until none is a near
    duplicate (`similarity`) of a training record, nor a test record of a validation record.

    Raises:
        ConfigError: unknown generator, or names, counts or concentration that cannot be meant; all mistakes at once.
    """
    domain = _checked(data)
    names = list(data.names)
    houses = {name: _house(domain, position, name, data.seed) for position, name in enumerate(names)}
    mixes = topic_mixes(domain, data)
    shares = {name: _outcome_shares(domain, mixes[name], data, name) for name in names}
    balanced = _outcome_shares(domain, {topic: 1 / len(domain.topics) for topic in domain.topics}, None, COORDINATOR)
    everywhere = tuple(houses.values())

    index = Index()
    train = {
        name: _records(domain, data, f"{name}/train", (houses[name],), shares[name], count, None, index)
        for name, count in zip(names, data.train_records, strict=True)
    }
    held_out: dict[tuple[str, str], tuple[Record, ...]] = {}
    for split in ("validation", "test"):
        # Records of one split are not compared with each other, only with what stood before.
        before = index.copy()
        for name in names:
            stream = f"{name}/{split}"
            held_out[name, split] = _records(
                domain, data, stream, (houses[name],), shares[name], data.own_records, before, index
            )
        held_out[COORDINATOR, split] = _records(
            domain, data, f"{COORDINATOR}/{split}", everywhere, balanced, data.central_records, before, index
        )
    return Federation(
        {name: Splits(train[name], held_out[name, "validation"], held_out[name, "test"]) for name in names},
        HeldOut(held_out[COORDINATOR, "validation"], held_out[COORDINATOR, "test"]),
    )


def alike(data: DataConfig, name: str, count: int) -> tuple[Record, ...]:
    """`count` records of other people, drawn as that institution's training records are.

    Some may say what a training record says: people have illnesses in common.

    Raises:
        ConfigError: as `generate`.
    """
    domain = _checked(data)
    house = _house(domain, data.names.index(name), name, data.seed)
    shares = _outcome_shares(domain, topic_mixes(domain, data)[name], data, name)
    return _records(domain, data, f"{name}/alike", (house,), shares, count, None, Index())


def topic_mixes(domain: Domain, data: DataConfig) -> dict[str, dict[str, float]]:
    """Each institution's share of every topic; sums to 1, at least FLOOR / topics each.

    The shares are one Dirichlet draw an institution (Hsu et al. 2019, section 2). Which topic gets which share is not
    left to chance: the larger ones go to topics that the institutions before, weighted by size, have least of, and
    the largest to one that is nobody's strongest yet, as long as there is such a topic. So different institutions are
    strong in different topics and nothing is rare everywhere.
    """
    rng = _generator(data.seed, "mixes")
    seen = dict.fromkeys((domain.topics[i] for i in rng.permutation(len(domain.topics))), 0.0)
    strongest: set[str] = set()
    mixes: dict[str, dict[str, float]] = {}
    for name, count in zip(data.names, data.train_records, strict=True):
        drawn = sorted(rng.dirichlet([data.dirichlet] * len(seen)), reverse=True)
        rarest_first = sorted(seen, key=lambda topic: seen[topic])
        leading = next((topic for topic in rarest_first if topic not in strongest), rarest_first[0])
        strongest.add(leading)
        rarest_first.sort(key=lambda topic: topic != leading)  # stable: the others keep their order
        mix = {
            topic: float(FLOOR / len(seen) + (1 - FLOOR) * share)
            for topic, share in zip(rarest_first, drawn, strict=True)
        }
        mixes[name] = mix
        seen = {topic: seen[topic] + count * mix[topic] for topic in seen}
    return mixes


def write(federation: Federation, out: Path) -> None:
    """Writes DIR/<institution>/{train,validation,test}.jsonl and DIR/coordinator/{validation,test}.jsonl.

    Raises:
        StorageError: the directory cannot be made or written to.
    """
    files: dict[str, tuple[Record, ...]] = {}
    for name, splits in federation.institutions.items():
        files |= {f"{name}/train": splits.train, f"{name}/validation": splits.validation, f"{name}/test": splits.test}
    files |= {
        f"{COORDINATOR}/validation": federation.coordinator.validation,
        f"{COORDINATOR}/test": federation.coordinator.test,
    }
    for stem, records in files.items():
        write_jsonl(out / f"{stem}.jsonl", records)


_SAID = [key for field in fields(DataConfig) if (key := f"data.{field.name}") in RULES]


def _checked(data: DataConfig) -> Domain:
    wrong = impossible({key: getattr(data, key.partition(".")[2]) for key in _SAID})
    if data.generator not in DOMAINS:
        wrong.append(f"data.generator: {data.generator!r} is none of {', '.join(DOMAINS)}")
    if len(data.train_records) != len(data.institutions):
        wrong.append(
            f"data.train_records: {len(data.train_records)} counts for {len(data.institutions)} institutions; one each"
        )
    if wrong:
        raise ConfigError("\n".join(wrong))
    return DOMAINS[data.generator]


def _generator(seed: int, stream: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(stream.encode())])


def _house(domain: Domain, position: int, name: str, seed: int) -> _House:
    rng = _generator(seed, f"{name}/house")
    favourites = {cue.name: cue.wordings[rng.integers(len(cue.wordings))] for cue in domain.cues()}
    return _House(position % domain.styles, favourites)


def _outcome_shares(
    domain: Domain, mix: Mapping[str, float], data: DataConfig | None, name: str
) -> list[tuple[Outcome, float]]:
    """Shares of the outcomes; within a topic skewed for an institution, as they come up for the coordinator (None)."""
    shares: list[tuple[Outcome, float]] = []
    for topic in domain.topics:
        outcomes = domain.of_topic(topic)
        common = np.array([outcome.share for outcome in outcomes])
        if data is not None:
            # Four times the concentration: institutions differ more in their topics than in what a topic brings them.
            skew = _generator(data.seed, f"{name}/{topic}").dirichlet([4 * data.dirichlet] * len(outcomes))
            common = common * (FLOOR / len(outcomes) + (1 - FLOOR) * skew)
        shares += [(outcome, mix[topic] * float(w)) for outcome, w in zip(outcomes, common / common.sum(), strict=True)]
    return shares


def _apportion(shares: Sequence[float], count: int) -> list[int]:
    """Whole numbers near shares x count that sum to count (largest remainders)."""
    exact = [share * count / sum(shares) for share in shares]
    whole = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (whole[i] - exact[i], i))
    for i in by_remainder[: count - sum(whole)]:
        whole[i] += 1
    return whole


def _people(
    shares: Sequence[tuple[Outcome, float]], count: int, rng: np.random.Generator
) -> list[tuple[_Episode, ...]]:
    """Episodes grouped by person: most people have one, some two; together `count` records."""
    episodes: list[_Episode] = []
    for (outcome, _), records in zip(shares, _apportion([share for _, share in shares], count), strict=True):
        while records:
            size = min(records, int(rng.choice([1, 2, 3, 4], p=[0.4, 0.3, 0.2, 0.1])))
            episodes.append(_Episode(outcome, size))
            records -= size
    shuffled = [episodes[i] for i in rng.permutation(len(episodes))]
    people: list[tuple[_Episode, ...]] = []
    while shuffled:
        own = [shuffled.pop()]
        if shuffled and rng.random() < 0.25 and own[0].records + shuffled[-1].records <= MOST_RECORDS_PER_PERSON:
            own.append(shuffled.pop())
        people.append(tuple(own))
    return people


def _records(
    domain: Domain,
    data: DataConfig,
    stream: str,
    houses: tuple[_House, ...],
    shares: Sequence[tuple[Outcome, float]],
    count: int,
    before: Index | None,
    index: Index,
) -> tuple[Record, ...]:
    """`count` records of people of their own.

    before: None for training records; else what they must not resemble. index: takes every record made.
    """
    rng = _generator(data.seed, stream)
    records: list[Record] = []
    for number, episodes in enumerate(_people(shares, count, rng)):
        person = Person(f"{stream}/{number:04d}", int(rng.integers(18, 95)), bool(rng.random() < 0.5))
        house = houses[rng.integers(len(houses))]
        for episode in episodes:
            records += [_record(domain, person, episode.outcome, house, before, rng) for _ in range(episode.records)]
    for record in records:
        index.add(text_of(record))
    return tuple(records[i] for i in rng.permutation(len(records)))


def _record(
    domain: Domain, person: Person, outcome: Outcome, house: _House, before: Index | None, rng: np.random.Generator
) -> Record:
    kinds, weights = zip(*outcome.kinds, strict=True)
    kind = str(rng.choice(kinds, p=weights))
    for _ in range(_ATTEMPTS):
        stated = _stated(domain, outcome, house, before is not None, rng)
        text = domain.render(Case(person, outcome, kind, stated), house.style, float(rng.random()))
        record = Record(text.prompt, text.completion, person.key, kind)
        if before is None or before.similarity(text_of(record)) < NEAR:
            return record
    raise ConfigError(
        f"data.train_records: no held-out record about {outcome.name!r} can be told apart from those already drawn; "
        "ask for fewer records"
    )


def _stated(
    domain: Domain, outcome: Outcome, house: _House, held_out: bool, rng: np.random.Generator
) -> tuple[str, ...]:
    """Cues of the outcome among remarks, in random order; the number of remarks is lognormal, as a note's length is."""
    cues = [
        house.favourites[cue.name] if rng.random() < _FAVOURITE else cue.wordings[rng.integers(len(cue.wordings))]
        for cue in draw_cues(outcome, held_out, rng)
    ]
    num_remarks = min(int(rng.lognormal(0.2, 0.8)), 12)
    remarks = [domain.remarks[i] for i in rng.choice(len(domain.remarks), num_remarks, replace=False)]
    both = cues + remarks
    return tuple(both[i] for i in rng.permutation(len(both)))


def text_of(record: Record) -> str:
    """What is compared in the search for near duplicates: the whole record."""
    return f"{record.prompt}\n{record.completion}"
