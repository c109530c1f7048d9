"""One institution: what it answers to the coordinator, and what it keeps to itself.

Everything that it computes from its records leaves in the vector of a Contribution, or not at all.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from client.data_sets import RecordSource
from client.faults import asked_for, reason_of
from client.guard import Guard, roster_of
from client.ledger import Ledger
from client.local_round import LocalRound
from client.secure import SecureMember
from client.training import Trained
from common import fixed_point
from common.adapter import Adapter, check_same_form, flatten
from common.base_model import Fingerprint, fingerprint
from common.config import LoraConfig, ModelConfig
from common.errors import ModelError, Refusal
from common.messages import (
    ADAPTER_DIGEST_DIFFERS,
    ADAPTER_DOES_NOT_FIT,
    BASE_MODEL_DIFFERS,
    INTERNAL_ERROR,
    MALFORMED,
    METHOD_UNKNOWN,
    NOT_INVITED,
    PROTOCOL,
    STORAGE_FAILED,
    VERSION_DIFFERS,
    Contribution,
    Hello,
    Introduction,
    Plan,
    Published,
    Received,
    Refused,
    Reply,
    Request,
    TrainRequest,
)
from common.methods import METHODS
from common.models import LoraModel, load
from common.publication import Publication
from common.secagg.reasons import ATTEMPT_UNKNOWN, ROSTER_DIFFERS

_MODEL_IN_USE = threading.Lock()  # one model a process, so one contribution at a time


@lru_cache(maxsize=1)
def _shared_model(model: ModelConfig, lora_json: str) -> LoraModel:
    """The base model with an adapter on it, loaded once per process however many institutions it plays."""
    return load(model, LoraConfig(**json.loads(lora_json)), seed=0)


@dataclass(frozen=True)
class Institution:
    """One institution's name and places.

    data: where its records come from. home: its own directory for the state and private results of runs. model: where
    it keeps the base model, and how this machine holds it. secure: its part in secure aggregation; without one it takes
    part in the clear, with one only where its policy does not require masks. guard: what it agreed to; None in a
    simulation. shelf: keeps published adapters. ledger: what it spent of privacy budgets; without one it takes no part
    under differential privacy. row_tokens: most tokens that go through the model at a time on this machine; None as the
    run says. spoil: what a simulated fault does to its training (None in real life).
    """

    name: str
    data: RecordSource
    home: Path
    model: ModelConfig
    secure: SecureMember | None = None
    guard: Guard | None = None
    shelf: Callable[[Publication, Adapter], None] | None = None
    ledger: Ledger | None = None
    row_tokens: int | None = None
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
                    answer = self._contribute(request)
                if self.guard is not None:
                    self.guard.require_part(request.plan.run)  # somebody may have left while it trained
                return answer
            if isinstance(request, Published):
                with _MODEL_IN_USE:
                    return self._keep(request)
            if self.secure is None:
                raise Refusal(ATTEMPT_UNKNOWN, "this institution has no part in secure aggregation")
            if self.guard is not None:
                self.guard.require_part(self.secure.run)
            return self.secure.answer(request)
        except Refusal as refusal:
            self.log.warning("%s refused: %s", self.name, refusal)
            return Refused.of(refusal, self.name)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # what a library in Rust raises when it panics is no Exception
            reason = reason_of(error)
            if reason in (INTERNAL_ERROR, STORAGE_FAILED):  # which step it was, only a stack trace tells
                self.log.exception("%s failed, %s", self.name, reason)
            else:
                self.log.error("%s cannot take part, %s: %s", self.name, reason, error)
            return Refused(reason, self.name)

    def _introduce(self, hello: Hello) -> Reply:
        own = version("silotune")
        if _release(hello.version) != _release(own):
            raise Refusal(VERSION_DIFFERS, f"the coordinator runs Silotune {hello.version}, this is {own}", (own,))
        self.run_directory(hello.run)
        self._admit(hello)
        self._require_base(hello.fingerprint)
        return Introduction(self.name, PROTOCOL, own, fingerprint(self.model.path))

    def _admit(self, message: Hello | Plan) -> None:
        """Lets a run, or a round of it, pass before anything is read or computed.

        Raises Refusal(roster_differs), and only then what `Guard.admit` raises: nobody is asked to approve a run that
        could only be refused.
        """
        roster = roster_of(message)
        if roster is not None:
            if self.secure is None:
                raise Refusal(ROSTER_DIFFERS, "this institution is on no roster for secure aggregation")
            self.secure.require_roster(roster)
        if self.guard is not None:
            self.guard.admit(message)

    def _require_base(self, expected: Fingerprint) -> None:
        """Raises Refusal(base_model_differs), naming what differs, when another base model is meant than this one."""
        parts = fingerprint(self.model.path).differences(expected)
        if parts:
            raise Refusal(BASE_MODEL_DIFFERS, f"the base model differs in {', '.join(parts)}", parts)

    def _contribute(self, request: TrainRequest) -> Reply:
        plan, start = request.plan, request.adapter
        if self.name not in plan.cohort:
            raise Refusal(NOT_INVITED, f"the cohort is {plan.cohort}")
        if start.digest() != plan.adapter_digest:
            raise Refusal(ADAPTER_DIGEST_DIFFERS, "the adapter that came is not the one the plan names")
        settings = plan.settings
        if settings.method not in METHODS:
            raise Refusal(METHOD_UNKNOWN, f"method {settings.method!r}")
        # A round's number names a file: a false one would stand in the way of the rounds to come.
        if type(plan.round) is not int or not 1 <= plan.round <= settings.rounds:
            raise Refusal(MALFORMED, f"round {plan.round!r} of {settings.rounds!r}")
        self._admit(plan)
        self._require_base(plan.fingerprint)
        model = self._model(settings.lora)
        self._require_form(start, model)
        here = self._round(plan)
        parameters = len(flatten(start.factors, METHODS[settings.method].trained(start)))
        if self.secure is not None and (plan.secure is not None or self.secure.policy.required):
            return self.secure.begin(plan, parameters, lambda former: here.compute(start, model, former))
        if plan.parameters != parameters:
            raise Refusal(MALFORMED, f"{plan.parameters} parameters, expected {parameters}")
        _, vector = here.compute(start, model)
        return Contribution(plan.digest(), fixed_point.pack(vector, plan.layout.ring_bits))

    def _keep(self, request: Published) -> Received:
        """Keeps an adapter that the coordinator published."""
        publication, adapter = request.publication, request.adapter
        if self.guard is None or self.shelf is None:
            raise Refusal(MALFORMED, "published adapters are kept in deployments only")
        self.run_directory(publication.run)
        self.guard.take(publication)
        if adapter.digest() != publication.adapter:
            raise Refusal(ADAPTER_DIGEST_DIFFERS, "the adapter that came is not the one that the coordinator signed")
        self._require_base(publication.fingerprint)
        self._require_form(adapter, self._model(publication.lora))
        self.shelf(publication, adapter)
        return Received(publication.run)

    def _model(self, lora: LoraConfig) -> LoraModel:
        with asked_for():
            return _shared_model(self.model, json.dumps(asdict(lora)))

    def _require_form(self, adapter: Adapter, model: LoraModel) -> None:
        try:
            check_same_form(adapter, model.read())
        except ModelError as error:
            raise Refusal(ADAPTER_DOES_NOT_FIT, str(error)) from error

    def _round(self, plan: Plan) -> LocalRound:
        return LocalRound(
            plan=plan,
            name=self.name,
            data=self.data,
            directory=self.run_directory(plan.run),
            model=self.model,
            guard=self.guard,
            ledger=self.ledger,
            row_tokens=self.row_tokens,
            spoil=self.spoil,
            log=self.log,
        )

    def run_directory(self, run: str) -> Path:
        """Where this institution keeps what it did in a run.

        The run's name comes from outside, so it must be a plain word.

        Raises Refusal(malformed) for a name that could lead anywhere else.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", run):
            raise Refusal(MALFORMED, f"run name {run!r:.200}")
        return self.home / run


def _release(number: str) -> list[str]:
    """What of a release's number must be equal on both sides: all but its last place."""
    return number.split(".")[:2]
