"""Whether this institution is ready: everything that a run would need, tried on the spot, one line each.

Without the network: keys, policy, roster, records, base model, disk, and one training step and one evaluation on real
records. With it: the way to the coordinator, and whether it knows this node. Nothing is sent but one signed call that
changes nothing, and nothing is written but a file that shows that the disk takes one. What the lines say is for whoever
runs the command on their own machine.
"""

from __future__ import annotations

import filecmp
import logging
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client import chain_audit, data_sets, egress, keys, ledger, policy_file, trial, trust
from client.chain_audit import Copy
from client.control import Control
from client.data_sets import DataFile, DataSets
from client.findings import Found, Line, Look, given
from client.home import ClientHome
from client.keys import Keys
from client.ledger import INSTITUTION
from client.policy_file import InstitutionPolicy, Population
from client.trust import TrustedRoster
from client.units import PATIENT, RECORD
from common.bundle import bundle_digest
from common.config import UNITS, TrainConfig
from common.enrolment import check_authority, grouped
from common.errors import ConfigError
from common.examples import Tokenised
from common.messages import PROTOCOL
from common.models import LoraModel
from common.privacy.delta import delta_warning
from common.private_files import check_private_directory, locked, write_private
from common.records import Record
from common.secagg.terms import Terms
from common.splits import SETS

if TYPE_CHECKING:
    from client.reach import Way

_SOON = timedelta(days=30)
_ROOM = 1 << 30  # bytes that a log, a few small files and an operating system need besides
_COPIES = 12  # of an adapter: two moments in each of four rounds' states, the published, the local-only, two half ones
_UNEVEN_S = 2.0

Sets = Mapping[str, tuple[Record, ...]]
"""A data set's records by set."""


@dataclass(frozen=True)
class Question:
    """What is to be looked at.

    data_set: only this one of those that the policy allows. network: whether the coordinator is to be reached.
    max_tokens: longest record, as the run will say it in `train.max_tokens`.
    """

    home: ClientHome
    passphrase: bytes | None = field(default=None, repr=False)
    data_set: str | None = None
    network: bool = True
    max_tokens: int = TrainConfig().max_tokens


def check(asked: Question, tell: Callable[[Line], None] = lambda _: None) -> tuple[Line, ...]:
    """Looks at everything; a thing that fails stops only what needs it. tell: gets each line when it is there."""
    look, home = Look(tell), asked.home
    look.at("versions", _versions)
    own = look.at("keys", lambda: _keys(asked))
    terms = look.at("policy", lambda: _policy(home))
    look.at("control", lambda: _control(home))
    roster = look.at("roster", lambda: _roster(home, given(terms, "policy")))
    look.at("bundle", lambda: _bundle(given(terms, "policy"), given(roster, "roster")))
    file = look.at("data file", lambda: _data_file(home, given(terms, "policy")))
    look.at("populations", lambda: _populations(home, given(terms, "policy"), given(file, "data file")))
    look.at("base model", lambda: trial.base_model(given(file, "data file").machine, given(terms, "policy")))
    model = look.at("device", lambda: trial.device(given(file, "data file").machine, given(terms, "policy")))
    look.at("disk", lambda: _disk(home, given(terms, "policy"), model))
    look.at("egress log", lambda: _egress(home))
    look.at("privacy ledger", lambda: _ledger(home))
    if file is not None and terms is not None:
        records = DataSets(file, home.data.parent)
        read = {name: _look_at_records(look, asked, terms, file, records, name, model) for name in _names(asked, terms)}
        for population in dict.fromkeys(terms.population_of(name) for name in read):
            if population.limited:
                _look_at_delta(look, population, read, roster)
    if asked.network:
        _look_at_network(look, roster, own)
    return tuple(look.lines)


# --- What lies in the home --------------------------------------------------------------------------------------------


def _versions() -> Found[None]:
    told = {name: version(package) for name, package in (("Silotune", "silotune"), ("Flower", "flwr"))}
    told |= {"protocol": str(PROTOCOL), "Python": platform.python_version()}
    return Found(None, ", ".join(f"{name} {number}" for name, number in told.items()), numbers={"versions": told})


def _keys(asked: Question) -> Found[Keys]:
    found = keys.load(asked.home, asked.passphrase)
    shown = keys.card(asked.home)
    told = f"of {shown.name}, fingerprint {grouped(shown.fingerprint)}"
    return Found(found, told, numbers={"institution": shown.name, "fingerprint": grouped(shown.fingerprint)})


def _policy(home: ClientHome) -> Found[InstitutionPolicy]:
    if not home.policy.exists():
        raise ConfigError(f"{home.policy}: expected this institution's policy, found none; run: silotune-client init")
    with _quiet(policy_file.log):
        found = policy_file.read(home.policy)
    empty = {
        "base_models": "`silotune-client fingerprint MODEL` prints the digest to list",
        "data_sets": "list the names in data.yaml that may be trained on",
        "methods": "list the aggregation methods that are agreed on",
    }
    warnings = [
        *found.warnings(),
        *(
            f"{name} is empty, so every run is refused; {what}"
            for name, what in empty.items()
            if not getattr(found, name)
        ),
    ]
    terms = found.secure_aggregation
    told = (
        f"base models: {len(found.base_models)}, data sets: {', '.join(found.data_sets) or 'none'}, sums over at least"
        f" {terms.smallest_cohort}, {terms.colluders} may collude, approval {found.approval}"
    )
    return Found(found, told, warnings)


@contextmanager
def _quiet(log: logging.Logger) -> Iterator[None]:
    """Keeps a log quiet: what it would say is among the lines."""
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _control(home: ClientHome) -> Found[None]:
    control = Control(home.control)
    warnings = []
    if control.paused():
        warnings.append("this institution pauses and takes up nothing; `silotune-client resume` ends that")
    if waiting := control.waiting():
        warnings.append(f"waiting for `silotune-client approve`: {', '.join(waiting)}")
    return Found(None, f"runs approved: {len(control.approvals())}, left: {len(control.left())}", warnings)


def _roster(home: ClientHome, terms: InstitutionPolicy) -> Found[TrustedRoster]:
    found = trust.pinned(home)
    ends = check_authority(found.authority).not_valid_after_utc
    now = datetime.now(UTC)
    if ends <= now:
        raise ConfigError(
            f"{home.roster}: expected an authority that is valid, found one until {ends:%Y-%m-%d %H:%M} UTC, and this"
            f" machine's clock shows {now:%Y-%m-%d %H:%M}; where the clock is right, the coordinator needs a new"
            " authority and hands out a new roster"
        )
    warnings = []
    if ends - now < _SOON:
        warnings.append(f"its authority expires on {ends:%Y-%m-%d}; ask the coordinator for a new roster before")
    agreed, members = terms.secure_aggregation, len(found.cards)
    try:
        Terms.of(members, agreed.colluders, agreed.smallest_cohort)
    except ConfigError as error:
        warnings.append(f"the policy asks for more members than there are yet: {error}")
    told = (
        f"federation {found.federation}, serial {found.serial}, {members} members, trusted since {found.since};"
        f" coordinator at {found.address}"
    )
    numbers = {"members": members, "serial": found.serial, "fingerprint": grouped(found.fingerprint)}
    return Found(found, told, warnings, numbers)


def _bundle(terms: InstitutionPolicy, roster: TrustedRoster) -> Found[None]:
    own, named = bundle_digest(), roster.bundles
    if not set(terms.bundles) & set(named or (own,)):
        raise ConfigError(
            f"policy.yaml: bundles: expected {' or '.join(named or (own,))}, found"
            f" {', '.join(terms.bundles) or 'an empty list'}, so every run is refused; list it if the coordinator"
            " confirms it over another channel"
        )
    if named and own not in named:
        return Found(
            None,
            "the policy lists one that the coordinator sends",
            ["it is not the one of this version of Silotune: see that the coordinator's is the same release"],
        )
    return Found(None, f"the policy lists {own}, which this version and the coordinator's name runs by")


def _data_file(home: ClientHome, terms: InstitutionPolicy) -> Found[DataFile]:
    found = data_sets.read(home.data)
    unknown = [name for name in terms.data_sets if name not in found.data_sets]
    closed = [name for name in found.data_sets if name not in terms.data_sets]
    warnings = [
        f"the policy allows {name}, and {home.data.name} names no file for it; add one, or take it out"
        for name in unknown
    ]
    told = f"data sets: {', '.join(found.data_sets) or 'none'}; base model {found.machine.model}"
    if closed:
        told += f"; not allowed by the policy, and never opened: {', '.join(closed)}"
    return Found(found, told, warnings)


def _populations(home: ClientHome, terms: InstitutionPolicy, file: DataFile) -> Found[None]:
    """That no file is in two populations, or in one and in none: what is spent on it would count once of twice."""
    paths = {
        name: data_sets.path_of(file.data_sets[name], home.data.parent)
        for name in terms.data_sets
        if name in file.data_sets
    }
    same, alike = [], []
    for one, other in combinations(paths, 2):
        whose = [terms.population_of(name) for name in (one, other)]
        if whose[0] == whose[1] or not any(population.limited for population in whose):
            continue
        told = " and ".join(
            f"{name} ({f'population {population.name}' if population.limited else 'no population'})"
            for name, population in zip((one, other), whose, strict=True)
        )
        if _same_file(paths[one], paths[other]):
            same.append(f"{told} are the same file, {paths[one]}")
        elif _equal(paths[one], paths[other]):
            alike.append(f"{told} hold the same bytes; if they are the same persons, put both into one population")
    if same:
        raise ConfigError(
            f"{home.data.name}: expected each file in one population of {home.policy.name}, found "
            + "; ".join(same)
            + "; what is spent on one would not count for the other: put both into one population"
        )
    return Found(None, f"{len(terms.populations)} with a budget; none shares a file with another data set", alike)


def _same_file(one: Path, other: Path) -> bool:
    """Whatever the paths look like; links are followed."""
    try:
        return one.samefile(other)
    except OSError:  # one is missing, which its own line says
        return one.resolve() == other.resolve()


def _equal(one: Path, other: Path) -> bool:
    """Whether two files hold the same bytes; False where one cannot be read."""
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False


def _egress(home: ClientHome) -> Found[None]:
    copy = egress.own_copy(home.egress)
    found = Found(None, "nothing has left yet") if copy is None else _verified(copy, home.egress, home)
    told = egress.lost(home, copy)
    return replace(found, told="no entries", warnings=[told]) if told else found


def _ledger(home: ClientHome) -> Found[None]:
    return _verified(ledger.own_copy(home.ledger), home.ledger, home)


def _verified(copy: Copy[Any], place: Path, home: ClientHome) -> Found[None]:
    """That every entry of a log is as it was written, the last one included."""
    verdict = chain_audit.intact(copy, place, keys.card(home).identity)
    return Found(None, f"{verdict.entries} entries, all as they were written", numbers={"entries": verdict.entries})


# --- The machine ------------------------------------------------------------------------------------------------------


def _disk(home: ClientHome, terms: InstitutionPolicy, model: LoraModel | None) -> Found[None]:
    check_private_directory(home.root)
    for directory in (home.egress, home.adapters, home.control):
        if directory.exists():
            check_private_directory(directory)
    with locked(home.root):
        written = home.root / "check"
        write_private(written, bytes(1 << 16), replace=True)
        written.unlink()
    free = shutil.disk_usage(home.root).free
    told = f"{home.root}: private, takes files, {trial.size(free)} free"
    needed = _ROOM
    if model is not None:
        largest = model.read().bytes // model.lora.rank * terms.largest_rank
        needed += _COPIES * largest
        told += f"; a run with the largest adapter that the policy allows keeps up to {trial.size(_COPIES * largest)}"
    warnings = [f"expected at least {trial.size(needed)} free; make room, or move the home"] if free < needed else []
    return Found(None, told, warnings, {"free_bytes": free})


# --- Records ----------------------------------------------------------------------------------------------------------


def _names(asked: Question, terms: InstitutionPolicy) -> tuple[str, ...]:
    return terms.data_sets if asked.data_set is None else (asked.data_set,)


def _look_at_records(
    look: Look,
    asked: Question,
    terms: InstitutionPolicy,
    file: DataFile,
    records: DataSets,
    name: str,
    model: LoraModel | None,
) -> Sets | None:
    """The records, where they can be read."""
    sets = look.at(f"data {name}", lambda: _records(terms, records, name))
    config = TrainConfig(batch_size=trial.TRIED, max_tokens=asked.max_tokens, row_tokens=file.machine.row_tokens)
    parts = look.at(
        f"tokens {name}", lambda: trial.tokens(given(sets, f"data {name}"), file.machine, config, name, model)
    )

    def tried(step: Callable[[LoraModel, Mapping[str, Tokenised]], Found[None]]) -> Callable[[], Found[None]]:
        return lambda: step(given(model, "device"), given(parts, f"tokens {name}"))

    look.at(f"training {name}", tried(lambda model, parts: trial.training(model, parts, config, file.machine)))
    look.at(f"evaluation {name}", tried(trial.evaluation))
    return sets


def _records(terms: InstitutionPolicy, records: DataSets, name: str) -> Found[Sets]:
    if name not in terms.data_sets:
        raise ConfigError(
            f"expected a data set that the policy allows ({', '.join(terms.data_sets) or 'none'}), found {name!r:.80};"
            " it is not opened"
        )
    if name not in records.names:
        raise ConfigError(f"expected a file for data set {name} in data.yaml, found none; add it there")
    found = {part: records.find(name, part).records for part in SETS}
    persons = len({record.person for part in found.values() for record in part})
    sizes = {part: len(part_records) for part, part_records in found.items()}
    told = f"{sum(sizes.values())} of {persons} persons: " + ", ".join(f"{part} {size}" for part, size in sizes.items())
    warnings = []
    if name in records.without_persons and PATIENT in terms.population_of(name).modes:
        warnings.append(
            f"the policy allows privacy mode {PATIENT}, and data.yaml names no column of persons: runs in it are"
            " refused, since single records would be protected; name the column, or leave the mode out"
        )
    return Found(found, told, warnings, {"records": sizes, "persons": persons})


def _look_at_delta(
    look: Look, population: Population, read: Mapping[str, Sets | None], roster: TrustedRoster | None
) -> None:
    """Whether a budget's delta means something to the units that it is about, as far as they were counted.

    Units that were not counted would ask for a smaller one still.
    """
    sets = [found for name in population.data_sets if (found := read.get(name)) is not None]
    records = [record for found in sets for part in found.values() for record in part]
    counted = {
        RECORD: len(records),
        PATIENT: len({record.person for record in records}),
        INSTITUTION: 0 if roster is None else len(roster.cards),
    }
    needed = ", ".join(f"data {name}" for name in population.data_sets)
    unit = max(sorted({UNITS[mode] for mode in population.modes}), key=lambda unit: counted[unit])

    def told() -> Found[None]:
        units = given(counted[unit] or None, "roster" if unit == INSTITUTION else needed)
        whose = "in the roster" if unit == INSTITUTION else "in its data sets"
        key, delta = f"policy.yaml: populations.{population.name}.delta", population.delta
        warning = delta_warning(key, delta, units, unit, whose)
        return Found(None, f"{delta:g} for {units} {unit}s {whose}", [] if warning is None else [warning])

    look.at(f"delta {population.name}", told)


# --- The network ------------------------------------------------------------------------------------------------------


def _look_at_network(look: Look, roster: TrustedRoster | None, own: Keys | None) -> None:
    """One step after the other, as far as it goes."""
    from client.reach import Way

    if roster is None:
        look.at("coordinator", lambda: given(roster, "roster"))
        return
    with Way(roster.address, roster.authority.encode()) as way:
        if not look.at("name", lambda: _resolved(way, roster)):
            return
        if look.at("connection", lambda: _connected(way, roster)) and look.at("certificate", lambda: _greeted(way)):
            answer = look.at("enrolment", lambda: _enrolled(way, given(own, "keys")))
            if answer is not None:
                look.at("clock", lambda: _clock(answer))


def _resolved(way: Way, roster: TrustedRoster) -> Found[bool]:
    found = way.resolve()
    return Found(True, f"{roster.address.host} is at {', '.join(found)}", numbers={"addresses": list(found)})


def _connected(way: Way, roster: TrustedRoster) -> Found[bool]:
    way.connect()
    return Found(True, f"to {roster.address}")


def _greeted(way: Way) -> Found[bool]:
    ends = way.greet()
    soon = ends - datetime.now(UTC) < _SOON
    warnings = ["it expires soon; tell the coordinator: silotune-server renew"] if soon else []
    return Found(True, f"of the pinned authority, until {ends:%Y-%m-%d}", warnings)


@dataclass(frozen=True)
class _Answer:
    """ahead_s: as `Way.ask` gives it."""

    ahead_s: float | None


def _enrolled(way: Way, own: Keys) -> Found[_Answer]:
    return Found(_Answer(way.ask(own.node)), "the coordinator knows this node's key")


def _clock(answer: _Answer) -> Found[None]:
    apart = answer.ahead_s
    if apart is None:
        return Found(None, "the coordinator takes its time; how far it is from its own was not told")
    told = f"{abs(apart):.1f} s {'ahead of' if apart > 0 else 'behind'} the coordinator's at least"
    warnings = ["signatures are refused from 5 s ahead or 5 minutes behind: set the right time here (NTP)"]
    if abs(apart) < _UNEVEN_S:
        return Found(None, "within two seconds of the coordinator's", numbers={"ahead_s": apart})
    return Found(None, told, warnings, {"ahead_s": apart})
