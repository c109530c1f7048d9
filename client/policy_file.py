"""`policy.yaml`: what this institution agrees to, whatever a coordinator asks. Checked before any record is read."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from client import yaml_file
from client.policy import Policy
from client.units import PATIENT
from common import policy_reasons as reasons
from common.base_model import Fingerprint
from common.config import UNITS, PrivacyConfig, QuantiseConfig
from common.config_rules import DATA_SET, RULES, Rule
from common.errors import Refusal, StorageError
from common.files import write_json
from common.messages import Hello, Plan
from common.methods import METHODS
from common.private_files import locked, private_directory
from common.secagg.canonical import canonical
from common.secagg.identity import Roster
from common.secagg.reasons import SECURE_AGGREGATION_REQUIRED, SETTINGS_DIFFER
from common.secagg.terms import OFF, smallest_cohort

AUTOMATIC, MANUAL = APPROVALS = ("automatic", "manual")

METRICS: Mapping[str, tuple[str, ...]] = {
    "train_loss": ("train_loss", "train_tokens"),
    "validation_loss": ("validation_loss", "validation_tokens"),
}
"""What a policy may let out, and the counters of a vector that it stands for. A mean needs both."""

NONE = "none"

log = logging.getLogger("silotune.client")


@dataclass(frozen=True)
class Budget:
    """Data sets that share persons, the modes that they may be trained under, and the epsilon at `delta` for all.

    No value of it has a default that can be meant: a budget is said in full.
    """

    data_sets: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    epsilon: float = 0.0
    delta: float = 0.0


@dataclass(frozen=True)
class Population:
    """Whose data are used together, so that what is spent on one of its data sets is spent on all.

    A data set in no population of the policy is one by itself, under its own name, that may be trained on in any mode
    and without limit. delta: of the budget; without limit, the one that spends are told at.
    """

    name: str
    data_sets: tuple[str, ...]
    modes: tuple[str, ...] = (NONE, *UNITS)
    epsilon: float = math.inf
    delta: float = PrivacyConfig.delta

    @property
    def limited(self) -> bool:
        """Whether it has a budget."""
        return self.epsilon < math.inf


@dataclass(frozen=True)
class SecureTerms:
    """required: whether an update leaves under masks only. colluders: T. smallest_cohort: fewest names in a sum."""

    required: bool = True
    colluders: int = 1
    smallest_cohort: int = 3


@dataclass(frozen=True)
class Asked:
    """What a plan asks for, as far as a policy speaks of it.

    secure: whether under secure aggregation. mode: of differential privacy.
    """

    fingerprint: Fingerprint
    data_set: str
    method: str
    rank: int
    passes: float
    weight_unit: int
    quantise: QuantiseConfig
    secure: bool
    mode: str = NONE

    @classmethod
    def of(cls, message: Hello | Plan) -> Asked:
        """What a run announces, or a round of it."""
        settings = message.settings
        return cls(
            fingerprint=message.fingerprint,
            data_set=settings.data_set,
            method=settings.method,
            rank=settings.lora.rank,
            passes=settings.train.passes_per_round,
            weight_unit=settings.weight_unit,
            quantise=settings.quantise,
            secure=bool(message.roster) if isinstance(message, Hello) else message.secure is not None,
            mode=settings.privacy.mode,
        )


@dataclass(frozen=True)
class InstitutionPolicy:
    """An institution's terms. `TEMPLATE` explains every field; an empty list allows nothing."""

    secure_aggregation: SecureTerms = field(default_factory=SecureTerms)
    base_models: tuple[str, ...] = ()
    data_sets: tuple[str, ...] = ()
    populations: Mapping[str, Budget] = field(default_factory=dict)
    methods: tuple[str, ...] = ("fedavg", "ffa")
    largest_rank: int = 64
    largest_passes: float = 10.0
    rounds_per_day: int = 200
    quantise: QuantiseConfig = field(default_factory=QuantiseConfig)
    weight_unit: int = 16
    metrics: tuple[str, ...] = ("train_loss", "validation_loss")
    bundles: tuple[str, ...] = ()
    approval: str = AUTOMATIC

    def warnings(self) -> tuple[str, ...]:
        """What the institution should know of its own policy, one line each."""
        lines = [] if self.secure_aggregation.required else [f"secure_aggregation.required is false; when {OFF}"]
        for name, budget in self.populations.items():
            units = sorted({UNITS[mode] for mode in budget.modes})
            if len(units) > 1:
                lines.append(
                    f"populations.{name}.modes protect different units ({', '.join(units)}): what they spend is added"
                    " up, and holds for each unit's own share only; modes of one unit say more"
                )
        return tuple(lines)

    @property
    def budgeted(self) -> tuple[Population, ...]:
        """The populations that have a budget."""
        return tuple(
            Population(name, budget.data_sets, budget.modes, budget.epsilon, budget.delta)
            for name, budget in self.populations.items()
        )

    def population_of(self, data_set: str) -> Population:
        """The population that a data set belongs to; one by itself and without limit where the policy names none."""
        found = (population for population in self.budgeted if data_set in population.data_sets)
        return next(found, Population(data_set, (data_set,)))

    def accept_base_model(self, found: Fingerprint) -> None:
        """Raises Refusal(base_model_not_allowed) for a base model that is not listed."""
        if found.digest() not in self.base_models:
            raise Refusal(reasons.BASE_MODEL_NOT_ALLOWED, f"base model {found.digest()} is not in base_models")

    def accept_rank(self, rank: int) -> None:
        """Raises Refusal(rank_too_large) for an adapter that could hold more than was agreed."""
        if not 1 <= rank <= self.largest_rank:
            raise Refusal(reasons.RANK_TOO_LARGE, f"rank {rank}, allowed: up to {self.largest_rank}")

    def accept(
        self, asked: Asked, known: Collection[str], approved: bool, without_persons: Collection[str] = ()
    ) -> None:
        """Checks all that needs no state; reads nothing, and changes nothing.

        known: names in this institution's data file. without_persons: those of them of which nobody knows whose a
        record is. approved: whether a person said yes to this run.

        Raises Refusal, in this order: secure_aggregation_required, base_model_not_allowed, method_not_allowed,
        rank_too_large, passes_too_many, settings_differ, data_set_not_allowed, data_set_unknown, privacy_required,
        persons_unknown, not_approved. A name that the policy does not allow is told so whether or not there is such a
        data set.
        """
        self._accept_masks(asked)
        self.accept_base_model(asked.fingerprint)
        self._accept_method(asked.method)
        self.accept_rank(asked.rank)
        if not 0 < asked.passes <= self.largest_passes:
            raise Refusal(reasons.PASSES_TOO_MANY, f"{asked.passes} passes a round, allowed: {self.largest_passes}")
        if (asked.quantise, asked.weight_unit) != (self.quantise, self.weight_unit):
            raise Refusal(
                SETTINGS_DIFFER,
                f"{asked.quantise} with a weight unit of {asked.weight_unit}, agreed: {self.quantise} with"
                f" {self.weight_unit}",
            )
        if asked.data_set not in self.data_sets:
            raise Refusal(reasons.DATA_SET_NOT_ALLOWED, f"data set {asked.data_set!r:.80} is not in data_sets")
        if asked.data_set not in known:
            raise Refusal(reasons.DATA_SET_UNKNOWN, f"data set {asked.data_set!r:.80} is allowed, but has no file here")
        self._accept_mode(asked.data_set, asked.mode)
        if asked.mode == PATIENT and asked.data_set in without_persons:
            raise Refusal(
                reasons.PERSONS_UNKNOWN,
                f"privacy mode {PATIENT} on {asked.data_set}, of which data.yaml names no column of persons: single"
                " records would be protected, not persons; name it, or allow mode record in their place",
            )
        if self.approval != AUTOMATIC and not approved:
            raise Refusal(reasons.NOT_APPROVED, "the run waits for this institution's approval")

    def secure(self, roster: Roster) -> Policy:
        """The terms of secure aggregation."""
        return Policy(
            roster=roster,
            colluders=self.secure_aggregation.colluders,
            smallest=self.secure_aggregation.smallest_cohort,
            methods=self.methods,
            weight_unit=self.weight_unit,
            quantise=self.quantise,
            required=self.secure_aggregation.required,
        )

    def leaving(self, counters: Mapping[str, int]) -> dict[str, int]:
        """The counters of a vector, those that may not leave set to zero.

        Zero tokens with a loss of zero add nothing to either part of a mean: the coordinator's mean is then over the
        other institutions, and where nobody lets a metric out it has none. The vector's form does not change, so that
        nobody sees from outside who left what out.
        """
        hidden = {name for metric, names in METRICS.items() if metric not in self.metrics for name in names}
        return {name: 0 if name in hidden else value for name, value in counters.items()}

    def _accept_masks(self, asked: Asked) -> None:
        """Whatever the policy says: noise in shares is enough in a sum alone, and a single update shows most of it."""
        if asked.secure:
            return
        if self.secure_aggregation.required:
            raise Refusal(SECURE_AGGREGATION_REQUIRED, "the plan asks for an update in the clear")
        if PrivacyConfig(asked.mode).shared_noise:
            raise Refusal(
                SECURE_AGGREGATION_REQUIRED,
                f"privacy mode {asked.mode}, whose noise is enough in a sum only, and the plan asks for an update in"
                " the clear",
            )

    def _accept_method(self, method: str) -> None:
        if method not in self.methods:
            raise Refusal(reasons.METHOD_NOT_ALLOWED, f"method {method!r:.80}, allowed: {', '.join(self.methods)}")

    def _accept_mode(self, data_set: str, mode: str) -> None:
        population = self.population_of(data_set)
        if mode not in population.modes:
            raise Refusal(
                reasons.PRIVACY_REQUIRED,
                f"privacy mode {mode!r:.80} on {data_set}; allowed in population {population.name}:"
                f" {', '.join(population.modes)}",
            )


# --- The file -----------------------------------------------------------------------------------------------------


def _distinct(values: Sequence[str]) -> bool:
    return len(set(values)) == len(values)


def _listed(names: Collection[str]) -> Rule:
    return Rule(
        f"a list of different names among {', '.join(names)}",
        lambda values: _distinct(values) and set(values) <= set(names),
    )


_DIGESTS = Rule(
    "a list of different SHA-256 digests of 64 hex digits, in lower case",
    lambda values: _distinct(values) and all(re.fullmatch(r"[0-9a-f]{64}", value) for value in values),
)
NAME = DATA_SET
_OWN = f"populations.{yaml_file.ANY}"
_SMALLEST = Rule("a whole number of at least 3", lambda value: value >= smallest_cohort(1))

_RULES: Mapping[str, Rule] = {
    "secure_aggregation.required": RULES["secure_aggregation.enabled"],
    "secure_aggregation.colluders": RULES["secure_aggregation.colluders"],
    "secure_aggregation.smallest_cohort": _SMALLEST,
    "base_models": _DIGESTS,
    "data_sets": Rule(
        "a list of different names of a-z, 0-9, - and _, a letter or digit first, at most 64 characters",
        lambda values: _distinct(values) and all(re.fullmatch(NAME, value) for value in values),
    ),
    "populations": Rule(
        "a name of a-z, 0-9, - and _, a letter or digit first, at most 64 characters",
        lambda name: re.fullmatch(NAME, name) is not None,
    ),
    f"{_OWN}.data_sets": Rule(
        "at least one name of data_sets, each once", lambda values: len(values) > 0 and _distinct(values)
    ),
    f"{_OWN}.modes": Rule(
        f"at least one of {', '.join(UNITS)}, each once",
        lambda values: len(values) > 0 and _distinct(values) and set(values) <= set(UNITS),
    ),
    f"{_OWN}.epsilon": Rule("a finite number above 0", lambda value: 0 < value < math.inf),
    f"{_OWN}.delta": RULES["privacy.delta"],
    "methods": _listed(METHODS),
    "largest_rank": RULES["lora.rank"],
    "largest_passes": RULES["train.passes_per_round"],
    "rounds_per_day": Rule("a whole number of at least 0", lambda value: value >= 0),
    "quantise.clip": RULES["quantise.clip"],
    "quantise.bits": RULES["quantise.bits"],
    "quantise.weight_bits": RULES["quantise.weight_bits"],
    "weight_unit": RULES["federation.weight_unit"],
    "metrics": _listed(METRICS),
    "bundles": _DIGESTS,
    "approval": Rule(" or ".join(APPROVALS), lambda value: value in APPROVALS),
}

TEMPLATE = """\
# The policy of this institution: whatever a coordinator asks, no more than this is done.
# It is read when the daemon starts, and when it changes. What is left out has the value that stands here; an empty list
# allows nothing.

secure_aggregation:
  # Whether updates leave under masks only. With false the coordinator can read every update: never without need.
  required: true
  # Members that may be on the coordinator's side, and still nobody learns this institution's update.
  colluders: 1
  # Fewest institutions in a sum: at least colluders + 2, and at least 3.
  smallest_cohort: 3

# Base models that may be trained on, by digest; `silotune-client fingerprint DIR` prints it.
base_models: {base_models}

# Data sets that may be trained on, by their name in data.yaml; any other is never opened.
data_sets: {data_sets}

# Budgets of differential privacy. All data sets that share persons belong into one population, such as
#   clinic: {{data_sets: [notes, letters], modes: [patient], epsilon: 8.0, delta: 1.0e-4}}
# They are then trained on under these modes only (record, patient, institution, distributed), and all training ever,
# over runs, restarts and changed files, costs at most epsilon at delta: a round that would exceed it is refused. Let
# delta be at most 1 / (10 x persons), which `silotune-client check` counts. What was spent is told by `silotune-client
# ledger show`; it stays spent when a population gets another name or another epsilon or is split: data sets that were
# once together share what they spent for good, unless all names change at once. A data set in no population may be
# trained on in every mode, without noise too, and without limit; what left without noise is in no ledger, and no later
# budget covers it. A second home over the same files has a ledger of its own: split the epsilon over the homes.
populations: {{}}

# Aggregation methods that may turn an update into a vector.
methods: [fedavg, ffa]

# Largest rank of an adapter: it bounds how much of the records an update can hold, and memory.
largest_rank: 64

# Most passes over the records in one round: it bounds the work that a coordinator can ask for.
largest_passes: 10.0

# Most rounds that begin in one day (UTC), over all runs; a repeat of a round counts once.
rounds_per_day: 200

# The fixed-point form of an update, exactly as the federation agreed on it.
quantise:
  # Largest absolute value of one element; larger ones are cut.
  clip: 1.0
  # Bits of an element.
  bits: 16
  # Bits of a weight, which is at most 2^weight_bits - 1.
  weight_bits: 4

# Records per unit of weight, as the federation agreed on it.
weight_unit: 16

# What may leave inside the sum besides the update; a metric that is not listed is sent as zeros.
metrics: [train_loss, validation_loss]

# SHA-256 of the application bundles that a coordinator may name; only installed code runs all the same.
bundles: {bundles}

# automatic: a run that this policy allows is answered. manual: it waits for `silotune-client approve RUN`.
approval: automatic
"""


def write_template(
    path: Path, base_models: Sequence[str] = (), data_sets: Sequence[str] = (), bundles: Sequence[str] = ()
) -> None:
    """Writes a policy with every field explained: the defaults, and what is listed here.

    Raises ConfigError when there is a file already or a value cannot be meant, StorageError when it cannot be written.
    """
    lists = {"base_models": base_models, "data_sets": data_sets, "bundles": bundles}
    text = TEMPLATE.format(**{name: json.dumps(list(values)) for name, values in lists.items()})
    parse(text, str(path))
    yaml_file.write_new(path, text)


def read(path: Path) -> InstitutionPolicy:
    """The institution's policy; what it must know of it is logged as a warning.

    Raises ConfigError that tells every mistake of the file.
    """
    found = _agreeing(yaml_file.read(path, InstitutionPolicy, _RULES), str(path))
    for warning in found.warnings():
        log.warning("%s: %s", path, warning)
    return found


def parse(text: str, source: str) -> InstitutionPolicy:
    """As `read`, from text and without warnings; `source` is what errors call it."""
    return _agreeing(yaml_file.parse(text, source, InstitutionPolicy, _RULES), source)


def _agreeing(found: InstitutionPolicy, source: str) -> InstitutionPolicy:
    terms = found.secure_aggregation
    least = smallest_cohort(terms.colluders)
    lines = _strange_populations(found)
    if terms.smallest_cohort < least:
        lines.append(
            f"secure_aggregation.smallest_cohort: found {terms.smallest_cohort}; allowed: at least {least} with"
            f" secure_aggregation.colluders = {terms.colluders}, so that two honest institutions hide each other"
        )
    if lines:
        raise yaml_file.told(source, lines)
    return found


def _strange_populations(found: InstitutionPolicy) -> list[str]:
    """A line for each thing in the populations that cannot be meant beside the data sets and each other."""
    lines = []
    times = Counter(name for budget in found.populations.values() for name in budget.data_sets)
    for population, budget in found.populations.items():
        for name in budget.data_sets:
            if name not in found.data_sets:
                lines.append(f"populations.{population}.data_sets: found {name}; allowed: names that data_sets lists")
            elif times[name] > 1:
                lines.append(
                    f"populations.{population}.data_sets: found {name}, which stands in {times[name]} populations;"
                    " allowed: one, since its persons have one budget; put data sets that share persons together"
                )
        if population in found.data_sets and population not in budget.data_sets:
            lines.append(
                f"populations.{population}: found the name of a data set outside it; allowed: another name, since the"
                " ledger calls a data set without a population by its own"
            )
    return lines


# --- Rounds of a day ----------------------------------------------------------------------------------------------


def round_key(plan: Plan) -> str:
    """What tells the rounds of a day apart: equal for a repeat of an attempt at the same sum, and for nothing else."""
    settings = plan.settings.to_json()
    return hashlib.sha256(canonical("round of a day", plan.run, plan.round, plan.adapter_digest, settings)).hexdigest()


class RoundBook:
    """Counts the rounds of a day (UTC) in one file, synced before anything is trained, so that a restart forgets none.

    The day is the latest that the clock ever showed: a clock that goes back opens no fresh day, and rounds count on the
    later one until the clock has passed it.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def count(self, most: int, key: str, now: datetime) -> None:
        """Counts a round that is about to begin, once. key: its `round_key`. now: with its time zone.

        Raises Refusal(rounds_per_day_exceeded), and counts nothing, when the day has had `most` rounds, and
        StorageError when the count cannot be read or kept (ConfigError in a directory that others can enter): then
        nothing may begin.
        """
        today = now.astimezone(UTC).date()
        private_directory(self._file.parent)
        with locked(self._file.parent):
            day, rounds = self._read()
            if day is None or today > day:
                day, rounds = today, ()
            if key in rounds:
                return
            if len(rounds) >= most:
                late = f"; the clock shows {today}, which is earlier" if today < day else ""
                raise Refusal(reasons.ROUNDS_PER_DAY_EXCEEDED, f"{len(rounds)} rounds on {day}, allowed: {most}{late}")
            write_json(self._file, {"day": day.isoformat(), "rounds": [*rounds, key]})

    def _read(self) -> tuple[date | None, tuple[str, ...]]:
        try:
            found: Any = json.loads(self._file.read_text(encoding="utf-8"))
            if not isinstance(found, dict) or set(found) != {"day", "rounds"} or not isinstance(found["rounds"], list):
                raise ValueError("expected day and rounds")
            return date.fromisoformat(found["day"]), tuple(str(key) for key in found["rounds"])
        except FileNotFoundError:
            return None, ()
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise StorageError(
                f"{self._file} cannot be read: {error}; restore it, or remove it to count this day's rounds from zero"
            ) from error
