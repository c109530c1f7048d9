"""A round at one institution: from its records to what leaves, and what stays.

What leaves is a vector of numbers, in the clear or under masks. Under differential privacy it holds the update alone:
no loss, no count and no weight that depends on data.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from client.data_sets import RecordSet, RecordSource
from client.faults import asked_for
from client.guard import Guard
from client.ledger import Ledger, Spend
from client.policy_file import Population
from client.private_training import NoisedStep, clipped_sum, noised_step, train_privately
from client.secure import Update
from client.state import LocalState, StateStore
from client.training import Assignment, Trained, train
from client.units import PATIENT, RECORD, Unit, left_out, require_units_apart, units_under
from common import fixed_point
from common.adapter import Adapter
from common.config import ModelConfig, PrivacyConfig, TrainConfig
from common.errors import Refusal
from common.evaluation import Scores, evaluate
from common.examples import Tokenised, examples_of
from common.files import append_line, write_text
from common.fixed_point import NATS, Ring
from common.messages import Plan
from common.methods import METHODS
from common.models import LoraModel, load_tokenizer
from common.privacy.accounting import Event
from common.privacy.distributed import noised
from common.privacy.mechanism import round_event
from common.privacy.noise import NoiseSource, SeededNoise, SystemNoise
from common.randomness import seeded
from common.secagg.reasons import SETTINGS_DIFFER


@lru_cache(maxsize=64)
def _tokenised(records: RecordSet, model_path: str, train: TrainConfig, log: str) -> Tokenised:
    """Tokenised records; a changed file is a different key."""
    found = examples_of(records.records, load_tokenizer(model_path), train, records.where)
    for note in found.counts.notes():
        logging.getLogger(log).warning("%s: %s", records.where, note)
    return found


@lru_cache(maxsize=64)
def _tell_what_is_left_out(records: RecordSet, privacy: PrivacyConfig, log: str) -> None:
    """Once for each file and setting; into the institution's own log alone."""
    if (found := left_out(privacy, records.records)) is not None:
        logging.getLogger(log).warning("%s: %s", records.where, found.told())


@dataclass(frozen=True)
class LocalRound:
    """A round that an institution was asked for, and what of the institution it needs.

    directory: of the run. ledger: where what it spends of a privacy budget is written down before a record is read.
    The others are as `Institution` has them.
    """

    plan: Plan
    name: str
    data: RecordSource
    directory: Path
    model: ModelConfig
    guard: Guard | None
    ledger: Ledger | None
    row_tokens: int | None
    spoil: Callable[[Trained, Plan], Trained] | None
    log: logging.Logger

    def compute(self, start: Adapter, model: LoraModel, former: Update | None = None) -> tuple[Update, Ring]:
        """What is kept for a repeat, and the vector of this attempt, made from `start`.

        former: what was kept in the attempt before, where this is a repeat at the same sum. Without noise, and with
        noise from training, the vector itself is kept: a repeat sends it again and spends nothing. In mode
        `institution` the update is kept, and every attempt is noised anew. In mode `distributed` nothing is: every
        attempt takes a lot of its own, since the ledger counts it as one.

        What the attempt spends of a privacy budget is in the ledger before the first record is read, so that it is
        spent whatever comes of it: that training fails, and how, tells of the records too.

        Raises, before any record is read: Refusal(settings_differ), Refusal(malformed), ModelError
        for one that bounds no unit's influence, Refusal(rounds_per_day_exceeded), Refusal(budget_exhausted) and
        StorageError. Then DataError and StorageError.
        """
        privacy = self.plan.settings.privacy
        if former is not None and not privacy.shared_noise:
            return former, self._noised(former)
        self._begin(model)
        if privacy.mode == "distributed":
            vector = self._noised(self._summed_gradients(start, model))
            return vector, vector
        update = self._trained_update(start, model) if former is None else former
        return update, self._noised(update)

    def _begin(self, model: LoraModel) -> None:
        """All that must hold before a record is read."""
        self._require_settings()
        if self.plan.settings.privacy.samples:
            require_units_apart(model)
        with asked_for():
            _ = self.plan.layout, self._step  # before the round counts
        if self.guard is not None:
            self.guard.begin(self.plan)
        if (spend := self._cost) is not None:
            self._ledger.spend(self._population, spend, self.guard.budgeted if self.guard else ())
        if not self._settings.exists():
            write_text(self._settings, self.plan.settings.to_json())

    @property
    def _settings(self) -> Path:
        """The file of those that the run's first round had."""
        return self.directory / "settings.json"

    def _require_settings(self) -> None:
        """Raises Refusal(settings_differ) for others than the run's: its state is kept by its name alone."""
        if self._settings.exists() and self._settings.read_bytes() != self.plan.settings.to_json().encode():
            raise Refusal(SETTINGS_DIFFER, f"the settings are not those of the run's first round, in {self._settings}")

    def _trained_update(self, start: Adapter, model: LoraModel) -> Update:
        """What training gives: the vector, or, where noise is in shares, the update without it.

        Keeps the state for the rounds to come.
        """
        plan, settings = self.plan, self.plan.settings
        store = StateStore(self.directory / self._state)
        scores = Scores()
        if settings.evaluate:
            model.write(start)
            scores = evaluate(model, self._load("validation").examples)
        trained, records = self._trained(start, model, store.before(plan.round))
        if self.spoil is not None:
            trained = self.spoil(trained, plan)
        vector, usable = self._vector(start, trained, scores, records)
        # An unusable update must not poison the rounds to come: the institution goes on from the state before it.
        if usable:
            store.save(plan.round, trained.state)
        self._remember(trained, scores, usable)
        return vector

    def _noised(self, update: Update) -> Ring:
        """The vector as it is, or, where noise is added in shares, with fresh noise."""
        noise = self.plan.shared_noise
        if noise is None:
            assert update.dtype == np.uint32
            return update.astype(np.uint32, copy=False)
        return fixed_point.encode_levels(
            noised(update.astype(np.float64), noise, self._noise("shares", self._attempt)), self.plan.layout
        )

    # --- Training -----------------------------------------------------------------------------------------------------

    def _trained(self, start: Adapter, model: LoraModel, state: LocalState) -> tuple[Trained, int]:
        """What training made of `start`, and how many examples it has."""
        settings = self.plan.settings
        trained = METHODS[settings.method].trained(start)
        assignment = Assignment(self.plan.round, settings.rounds, trained, settings.seed, self.chance)
        step = self._step
        if step is None:
            examples = self._load("train").examples
            with asked_for():
                return train(model, examples, start, state, self._config, assignment), len(examples)
        units, noise = self._units(), self._noise("training")
        with asked_for():
            return train_privately(model, units, start, state, self._config, step, assignment, noise), 0

    @property
    def _state(self) -> str:
        """The directory of what is kept between rounds.

        Noised steps go on from what noised steps left behind, and from nothing else: moments of others would bring into
        an update what its noise does not cover, were a run's mode another one in a later round.
        """
        return "noised-state" if self.plan.settings.privacy.mode in (RECORD, PATIENT) else "state"

    def _summed_gradients(self, start: Adapter, model: LoraModel) -> Update:
        """Of mode `distributed`: minus the sum of one lot's clipped gradients [parameters], float64, without noise."""
        settings = self.plan.settings
        keys = METHODS[settings.method].trained(start)
        privacy, noise, units = settings.privacy, self._noise("lot", self._attempt), self._units()
        with asked_for():
            total = clipped_sum(model, units, start, keys, self._config, privacy.clip, privacy.sampling_rate, noise)
        append_line(self.directory / "metrics.jsonl", json.dumps({"round": self.plan.round, "void": False, "steps": 1}))
        return -total

    @property
    def _step(self) -> NoisedStep | None:
        """What each step of DP-SGD bounds and adds; None in modes without. Raises ConfigError."""
        settings = self.plan.settings
        return noised_step(settings.privacy, settings.train.passes_per_round, settings.rounds)

    @property
    def _config(self) -> TrainConfig:
        train_config = self.plan.settings.train
        return train_config if self.row_tokens is None else replace(train_config, row_tokens=self.row_tokens)

    def _units(self) -> tuple[Unit, ...]:
        settings = self.plan.settings
        records = self.data.find(settings.data_set, "train")
        _tell_what_is_left_out(records, settings.privacy, self.log.name)
        return units_under(settings.privacy, records.records, self._load("train"))

    def _load(self, part: str) -> Tokenised:
        settings = self.plan.settings
        said = settings.train
        # The other settings do not change an example, and would only keep more than one copy of each.
        text = TrainConfig(max_tokens=said.max_tokens, long=said.long, overlap=said.overlap, supervised=said.supervised)
        return _tokenised(self.data.find(settings.data_set, part), self.model.path, text, self.log.name)

    @property
    def _attempt(self) -> int:
        """Its number; 0 in the clear, where there are none."""
        return self.plan.secure.attempt if self.plan.secure else 0

    # --- Chance -------------------------------------------------------------------------------------------------------

    @property
    def chance(self) -> str:
        """What seeds order, dropout and rounding here, besides the seed that everybody knows.

        In a deployment it is drawn once a run and stays here: training again from the same adapter in another run gives
        another update, so that two sums over sets that differ by one member do not differ by exactly its update. In a
        simulation it is the name, and runs are repeatable.
        """
        if self.guard is None:
            return self.name
        file = self.directory / "chance"
        if not file.exists():
            write_text(file, secrets.token_hex(32))
        return file.read_text(encoding="utf-8")

    def _noise(self, purpose: str, attempt: int = 0) -> NoiseSource:
        """Of differential privacy: the operating system's, but in a simulation, whose runs are repeatable."""
        if self.guard is not None:
            return SystemNoise()
        return SeededNoise(self.plan.settings.seed, purpose, self.name, self.plan.round, attempt)

    # --- Privacy ------------------------------------------------------------------------------------------------------

    @property
    def event(self) -> Event | None:
        """What this round costs, in one attempt; None without differential privacy."""
        plan, settings = self.plan, self.plan.settings
        terms = plan.secure.terms if plan.secure else None
        passes = settings.train.passes_per_round
        return round_event(settings.privacy, settings.quantise, passes, settings.rounds, plan.parameters, terms)

    @property
    def _cost(self) -> Spend | None:
        plan, settings = self.plan, self.plan.settings
        with asked_for():
            event = self.event
            if event is None:
                return None
            return Spend.of(event, settings.privacy.mode, plan.run, plan.round, self._attempt, settings.data_set)

    @property
    def _population(self) -> Population:
        """Whose data are used; in a simulation each data set is a population without limit."""
        name = self.plan.settings.data_set
        return Population(name, (name,)) if self.guard is None else self.guard.population_of(name)

    @property
    def _ledger(self) -> Ledger:
        if self.ledger is None:
            raise RuntimeError("nothing private is computed without a ledger")
        return self.ledger

    # --- What leaves, and what stays ----------------------------------------------------------------------------------

    def _vector(self, start: Adapter, trained: Trained, scores: Scores, records: int) -> tuple[Update, bool]:
        """What leaves, and whether it holds the update or, for want of finite numbers, zeros."""
        plan, settings = self.plan, self.plan.settings
        layout = plan.layout
        update = METHODS[settings.method].encode(trained.adapter, start)
        finite = bool(np.isfinite(update).all())
        if not settings.privacy.private:
            finite = finite and math.isfinite(trained.loss) and math.isfinite(scores.loss)
        if not finite:
            self.log.error("%s: round %d gave numbers that are not finite; sent as zeros", self.name, plan.round)
        if settings.privacy.shared_noise:
            # The sum counts on this member's noise, and whether its update was usable is data.
            return (update if finite else np.zeros_like(update)), finite
        if not finite:
            return fixed_point.void(layout), False
        rng = seeded(settings.seed, "rounding", self.chance, plan.round)
        vector = fixed_point.encode(update, self._weight(records), self._counters(trained, scores), layout, rng)
        # A loss can be finite and yet too large for its counter; such a vector is void too.
        usable = not np.array_equal(vector, fixed_point.void(layout))
        if not usable:
            self.log.error("%s: round %d gave sums out of range; sent as zeros", self.name, plan.round)
        return vector, usable

    def _weight(self, records: int) -> int:
        settings, layout = self.plan.settings, self.plan.layout
        if settings.weighting != "records" or settings.privacy.private:
            return 1
        weight = fixed_point.weight_of(records, settings.weight_unit, layout)
        if weight == layout.max_weight and records > weight * settings.weight_unit:
            self.log.warning(
                "%s: %d records weigh as %d only; a larger federation.weight_unit would count them all",
                self.name,
                records,
                weight * settings.weight_unit,
            )
        return weight

    def _counters(self, trained: Trained, scores: Scores) -> dict[str, int]:
        """Sums that leave inside the vector; none under differential privacy."""
        if self.plan.settings.privacy.private:
            return {}
        counters = {
            "train_loss": round(trained.loss * NATS),
            "train_tokens": trained.tokens,
            "validation_loss": round(scores.loss * NATS),
            "validation_tokens": scores.tokens,
        }
        return counters if self.guard is None else self.guard.leaving(counters)

    def _remember(self, trained: Trained, scores: Scores, usable: bool) -> None:
        """One line in the institution's own file; nobody else is told."""
        line: dict[str, Any] = {
            "round": self.plan.round,
            "void": not usable,
            "steps": trained.steps,
            "train_loss": trained.loss / trained.tokens if usable and trained.tokens else None,
            "validation_perplexity": scores.as_dict()["perplexity"],
        }
        append_line(self.directory / "metrics.jsonl", json.dumps(line))
