"""One institution: what it answers to the coordinator, and what it keeps to itself.

Everything that it computes from its records leaves in the vector of a Contribution, or not at all.
"""

from __future__ import annotations

import json
import logging
import math
import re
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from client.secure import SecureMember
from client.state import StateStore
from client.training import Assignment, Trained, train
from common import fixed_point
from common.adapter import Adapter, check_same_form, flatten
from common.base_model import Fingerprint, fingerprint
from common.config import LoraConfig, ModelConfig, TrainConfig
from common.errors import ConfigError, DataError, ModelError, Refusal
from common.evaluation import Scores, evaluate
from common.examples import examples_of
from common.files import append_line
from common.fixed_point import NATS
from common.messages import (
    ADAPTER_DIGEST_DIFFERS,
    ADAPTER_DOES_NOT_FIT,
    BASE_MODEL_DIFFERS,
    DATA_UNREADABLE,
    INTERNAL_ERROR,
    MALFORMED,
    METHOD_UNKNOWN,
    NOT_INVITED,
    PROTOCOL,
    PROTOCOL_DIFFERS,
    Contribution,
    Hello,
    Introduction,
    Plan,
    Refused,
    Reply,
    Request,
    TrainRequest,
)
from common.methods import METHODS
from common.models import LoraModel, load, load_tokenizer
from common.randomness import seeded
from common.records import read_jsonl
from common.secagg.reasons import ATTEMPT_UNKNOWN, ROSTER_DIFFERS
from common.text import Example

_MODEL_IN_USE = threading.Lock()  # one model a process, so one contribution at a time


@lru_cache(maxsize=1)
def _shared_model(model: ModelConfig, lora_json: str) -> LoraModel:
    """The base model with an adapter on it, loaded once per process however many institutions it plays."""
    return load(model, LoraConfig(**json.loads(lora_json)), seed=0)


@lru_cache(maxsize=64)
def _examples(file: Path, modified_ns: int, model_path: str, train: TrainConfig, log: str) -> tuple[Example, ...]:
    """Tokenised records; `modified_ns` makes a changed file a different key."""
    found = examples_of(read_jsonl(file), load_tokenizer(model_path), train, file)
    for note in found.counts.notes():
        logging.getLogger(log).warning("%s: %s", file.name, note)
    return found.examples


@dataclass(frozen=True)
class Institution:
    """One institution's name and places.

    data: directory with train.jsonl and validation.jsonl. home: its own directory for state and private results.
    model: where it keeps the base model. secure: its part in secure aggregation; without one it takes part in the
    clear, with one never. spoil: what a simulated fault does to its training (None in real life).
    """

    name: str
    data: Path
    home: Path
    model: ModelConfig
    secure: SecureMember | None = None
    spoil: Callable[[Trained, Plan], Trained] | None = None

    @property
    def log(self) -> logging.Logger:
        """The institution's own log, which may speak of its data and stays with it."""
        return logging.getLogger(f"silotune.client.{self.name}")

    def answer(self, request: Request) -> Reply:
        """Answers one message of the coordinator.

        Never raises: whatever goes wrong is logged here in full, and crosses the border as a reason code.
        """
        try:
            if isinstance(request, Hello):
                return self._introduce(request)
            if isinstance(request, TrainRequest):
                with _MODEL_IN_USE:
                    return self._contribute(request)
            if self.secure is None:
                raise Refusal(ATTEMPT_UNKNOWN, "this institution has no part in secure aggregation")
            return self.secure.answer(request)
        except Refusal as refusal:
            self.log.warning("%s refused: %s", self.name, refusal)
            return Refused(refusal.reason, self.name)
        except (DataError, OSError) as error:
            self.log.error("%s cannot read its records: %s", self.name, error)
            return Refused(DATA_UNREADABLE, self.name)
        except (ConfigError, ModelError) as error:
            self.log.error("%s cannot follow the plan: %s", self.name, error)
            return Refused(MALFORMED, self.name)
        except Exception:
            self.log.exception("%s failed", self.name)
            return Refused(INTERNAL_ERROR, self.name)

    def _introduce(self, hello: Hello) -> Reply:
        if hello.protocol != PROTOCOL:
            raise Refusal(PROTOCOL_DIFFERS, f"the coordinator speaks protocol {hello.protocol}, this is {PROTOCOL}")
        return self._other_base(hello.fingerprint) or Introduction(
            self.name, PROTOCOL, version("silotune"), fingerprint(self.model.path)
        )

    def _other_base(self, expected: Fingerprint) -> Refused | None:
        """The refusal that names what differs, when the coordinator means another base model than this one."""
        parts = fingerprint(self.model.path).differences(expected)
        if not parts:
            return None
        self.log.warning("%s refused: the base model differs in %s", self.name, ", ".join(parts))
        return Refused(BASE_MODEL_DIFFERS, self.name, parts)

    def _contribute(self, request: TrainRequest) -> Reply:
        plan, start = request.plan, request.adapter
        if self.name not in plan.cohort:
            raise Refusal(NOT_INVITED, f"the cohort is {plan.cohort}")
        if start.digest() != plan.adapter_digest:
            raise Refusal(ADAPTER_DIGEST_DIFFERS, "the adapter that came is not the one the plan names")
        if refused := self._other_base(plan.fingerprint):
            return refused
        settings = plan.settings
        if settings.method not in METHODS:
            raise Refusal(METHOD_UNKNOWN, f"method {settings.method!r}")
        # A round's number names a file: a false one would stand in the way of the rounds to come.
        if type(plan.round) is not int or not 1 <= plan.round <= settings.rounds:
            raise Refusal(MALFORMED, f"round {plan.round!r} of {settings.rounds!r}")
        model = _shared_model(self.model, json.dumps(asdict(settings.lora)))
        try:
            check_same_form(start, model.read())
        except ModelError as error:
            raise Refusal(ADAPTER_DOES_NOT_FIT, str(error)) from error
        if self.secure is not None:
            trained = METHODS[settings.method].trained(start)
            parameters = len(flatten(start.factors, trained))
            return self.secure.begin(plan, parameters, lambda: self._train(plan, start, model))
        if plan.secure is not None:
            raise Refusal(ROSTER_DIFFERS, "this institution is on no roster for secure aggregation")
        vector = self._train(plan, start, model)
        return Contribution(plan.digest(), fixed_point.pack(vector, plan.layout.ring_bits))

    def _train(self, plan: Plan, start: Adapter, model: LoraModel) -> fixed_point.Ring:
        """This institution's vector for a round, in the clear: it leaves in a Contribution or under masks."""
        settings = plan.settings
        store = StateStore(self.run_directory(plan.run) / "state")
        method = METHODS[settings.method]
        examples = self._load("train", settings.train)
        scores = Scores()
        if settings.evaluate:
            model.write(start)
            scores = evaluate(model, self._load("validation", settings.train))
        assignment = Assignment(plan.round, settings.rounds, method.trained(start), settings.seed, self.name)
        trained = train(model, examples, start, store.before(plan.round), settings.train, assignment)
        if self.spoil is not None:
            trained = self.spoil(trained, plan)
        vector, usable = self._vector(plan, start, trained, scores, len(examples))
        # An unusable update must not poison the rounds to come: the institution goes on from the state before it.
        if usable:
            store.save(plan.round, trained.state)
        self._remember(plan, trained, scores, usable)
        return vector

    def run_directory(self, run: str) -> Path:
        """Where this institution keeps what it did in a run.

        The run's name comes from outside, so it must be a plain word.

        Raises Refusal(malformed) for a name that could lead anywhere else.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", run):
            raise Refusal(MALFORMED, f"run name {run!r:.200}")
        return self.home / run

    def _load(self, split: str, train: TrainConfig) -> tuple[Example, ...]:
        file = self.data / f"{split}.jsonl"
        if not file.is_file():
            raise DataError(f"{file}: expected a jsonl file, found none")
        # The other settings do not change an example, and would only keep more than one copy of each.
        text = TrainConfig(
            max_tokens=train.max_tokens, long=train.long, overlap=train.overlap, supervised=train.supervised
        )
        return _examples(file, file.stat().st_mtime_ns, self.model.path, text, self.log.name)

    def _vector(
        self, plan: Plan, start: Adapter, trained: Trained, scores: Scores, records: int
    ) -> tuple[fixed_point.Ring, bool]:
        """The vector that leaves, and whether it holds the update or, for want of finite numbers, zeros."""
        layout, settings = plan.layout, plan.settings
        update = METHODS[settings.method].encode(trained.adapter, start)
        if not (np.isfinite(update).all() and math.isfinite(trained.loss) and math.isfinite(scores.loss)):
            self.log.error("%s: round %d gave numbers that are not finite; sent as zeros", self.name, plan.round)
            return fixed_point.void(layout), False
        weight = 1
        if settings.weighting == "records":
            weight = fixed_point.weight_of(records, settings.weight_unit, layout)
            if weight == layout.max_weight and records > weight * settings.weight_unit:
                self.log.warning(
                    "%s: %d records weigh as %d only; a larger federation.weight_unit would count them all",
                    self.name,
                    records,
                    weight * settings.weight_unit,
                )
        counters = {
            "train_loss": round(trained.loss * NATS),
            "train_tokens": trained.tokens,
            "validation_loss": round(scores.loss * NATS),
            "validation_tokens": scores.tokens,
        }
        # Rounding noise is repeatable and hides nothing; masks and DP noise come from the system's generator.
        rng = seeded(settings.seed, "rounding", self.name, plan.round)
        vector = fixed_point.encode(update, weight, counters, layout, rng)
        # A loss can be finite and yet too large for its counter; such a vector is void too.
        usable = not np.array_equal(vector, fixed_point.void(layout))
        if not usable:
            self.log.error("%s: round %d gave sums out of range; sent as zeros", self.name, plan.round)
        return vector, usable

    def _remember(self, plan: Plan, trained: Trained, scores: Scores, usable: bool) -> None:
        """One line in the institution's own file; nobody else is told."""
        line: dict[str, Any] = {
            "round": plan.round,
            "void": not usable,
            "steps": trained.steps,
            "train_loss": trained.loss / trained.tokens if usable and trained.tokens else None,
            "validation_perplexity": scores.as_dict()["perplexity"],
        }
        append_line(self.run_directory(plan.run) / "metrics.jsonl", json.dumps(line))
