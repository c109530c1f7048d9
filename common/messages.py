"""What coordinator and institutions say to each other, as frozen dataclasses.

The Flower adapters at the rim turn these into Flower messages and back; nothing else knows Flower.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from common import policy_reasons
from common.adapter import Adapter
from common.base_model import Fingerprint
from common.config import Config, LoraConfig, QuantiseConfig, TrainConfig
from common.config_rules import RULES
from common.errors import ConfigError
from common.fixed_point import Layout, Ring
from common.secagg import reasons as secagg_reasons
from common.secagg.attempt import Attempt
from common.secagg.messages import FromMember, ToMember
from common.secagg.terms import Terms

PROTOCOL = 2

# Reason codes: all that a coordinator ever learns of why an institution did not answer.
PROTOCOL_DIFFERS = "protocol_differs"
BASE_MODEL_DIFFERS = "base_model_differs"
ADAPTER_DIGEST_DIFFERS = "adapter_digest_differs"
ADAPTER_DOES_NOT_FIT = "adapter_does_not_fit"
METHOD_UNKNOWN = "method_unknown"
DATA_UNREADABLE = "data_unreadable"
NOT_INVITED = "not_invited"
MALFORMED = "malformed"
INTERNAL_ERROR = "internal_error"
BUNDLE_REFUSED = "bundle_refused"
MESSAGE_TYPE_REFUSED = "message_type_refused"
RESTARTED = "restarted"
TIMED_OUT = "timed_out"  # said by the coordinator of an institution that did not answer

REASONS = frozenset(
    {
        PROTOCOL_DIFFERS,
        BASE_MODEL_DIFFERS,
        ADAPTER_DIGEST_DIFFERS,
        ADAPTER_DOES_NOT_FIT,
        METHOD_UNKNOWN,
        DATA_UNREADABLE,
        NOT_INVITED,
        MALFORMED,
        INTERNAL_ERROR,
        BUNDLE_REFUSED,
        MESSAGE_TYPE_REFUSED,
        RESTARTED,
        TIMED_OUT,
        *secagg_reasons.REASONS,
        *policy_reasons.REASONS,
    }
)


T = TypeVar("T")


def built(kind: type[T], values: dict[str, Any]) -> T:
    """A dataclass from values that came from outside: all its fields, no others, each of its declared type.

    Raises TypeError for anything else.
    """
    made = kind(**values)
    hints = get_type_hints(kind)
    for field in fields(made):  # type: ignore[arg-type]  # kind is a dataclass
        value = getattr(made, field.name)
        if field.name not in values or not _has_type(value, hints[field.name]):
            raise TypeError(f"{kind.__name__}.{field.name}: expected {field.type}, found {value!r:.60}")
    return made


def _has_type(value: Any, kind: Any) -> bool:
    if isinstance(kind, UnionType):  # Terms | None
        return any(_has_type(value, part) for part in get_args(kind))
    if origin := get_origin(kind):  # list[str], tuple[str, ...]
        return isinstance(value, origin) and all(_has_type(part, get_args(kind)[0]) for part in value)
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int):  # JSON's have no end; numpy's and torch's do
        return kind in (int, float) and -(2**63) <= value < 2**63
    return isinstance(value, kind)


@dataclass(frozen=True)
class Hello:
    """The coordinator's first message of a run: which protocol it speaks, and which base model it means."""

    protocol: int
    fingerprint: Fingerprint


@dataclass(frozen=True)
class Introduction:
    """An institution's answer to Hello: its roster name, its versions and the base model it holds."""

    name: str
    protocol: int
    version: str
    fingerprint: Fingerprint


@dataclass(frozen=True)
class Settings:
    """What an institution needs to know of the coordinator's configuration, the same in every round of a run."""

    seed: int
    rounds: int
    method: str
    weighting: str
    weight_unit: int
    evaluate: bool
    lora: LoraConfig
    train: TrainConfig
    quantise: QuantiseConfig

    @classmethod
    def of(cls, config: Config) -> Settings:
        return cls(
            seed=config.seed,
            rounds=config.federation.rounds,
            method=config.federation.method,
            weighting=config.federation.weighting,
            weight_unit=config.federation.weight_unit,
            evaluate=config.evaluation.institutions,
            lora=config.lora,
            train=config.train,
            quantise=config.quantise,
        )

    def to_json(self) -> str:
        """Canonical: equal settings give equal text."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Raises ConfigError when the text is not what `to_json` writes, or holds a value that no run can mean."""
        try:
            values = json.loads(text)
            settings = built(
                cls,
                {
                    **values,
                    "lora": built(LoraConfig, values["lora"]),
                    "train": built(TrainConfig, values["train"]),
                    "quantise": built(QuantiseConfig, values["quantise"]),
                },
            )
            impossible = [key for key, value in settings._rulable().items() if not RULES[key].holds(value)]
        except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
            raise ConfigError(f"settings of a plan cannot be read: {error}") from error
        if impossible:
            told = "; ".join(f"{key}: allowed: {RULES[key].allowed}" for key in impossible)
            raise ConfigError(f"settings of a plan cannot be meant: {told}")
        return settings

    def _rulable(self) -> dict[str, Any]:
        """Values by their key in the configuration. Not the method: one that is unknown here has its own refusal."""
        values = asdict(self)
        nested = {
            f"{part}.{key}": value for part in ("lora", "train", "quantise") for key, value in values[part].items()
        }
        return nested | {
            "seed": self.seed,
            "federation.rounds": self.rounds,
            "federation.weighting": self.weighting,
            "federation.weight_unit": self.weight_unit,
        }


@dataclass(frozen=True)
class SecurePlan:
    """What a plan says of secure aggregation.

    attempt: counts the attempts of the run, over all its rounds. roster: digest of the names and keys that the
    coordinator holds. length, ring_bits: of the vectors; they follow from the rest, and are said so that a difference
    shows before anything is computed.
    """

    attempt: int
    roster: str
    terms: Terms
    length: int
    ring_bits: int


@dataclass(frozen=True)
class Plan:
    """One round as the coordinator announces it to every institution of its cohort.

    adapter_digest: of the global adapter that travels with the plan. parameters: length of the update. secure: None
    where vectors travel in the clear.
    """

    run: str
    round: int
    cohort: tuple[str, ...]
    parameters: int
    adapter_digest: str
    fingerprint: Fingerprint
    settings: Settings
    secure: SecurePlan | None = None

    @property
    def layout(self) -> Layout:
        """The form of the vectors of this round. Raises ConfigError when their sum would not fit."""
        quantise = self.settings.quantise
        members = self.secure.terms.members if self.secure else len(self.cohort)
        return Layout(self.parameters, members, quantise.clip, quantise.bits, quantise.weight_bits)

    @property
    def attempt(self) -> Attempt:
        """What everything in this attempt is bound to. Raises ConfigError when its terms cannot be met."""
        if self.secure is None:
            raise ConfigError("a plan without secure aggregation has no attempts")
        return Attempt(
            self.run, self.round, self.secure.attempt, self.digest(), self.cohort, self.secure.terms, self.layout
        )

    def digest(self) -> str:
        """SHA-256 over every field."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class TrainRequest:
    """Plan and global adapter, coordinator to institution."""

    plan: Plan
    adapter: Adapter


@dataclass(frozen=True)
class Contribution:
    """An institution's vector without secure aggregation, packed: whoever holds it can read the update."""

    plan_digest: str
    vector: Ring


@dataclass(frozen=True)
class Refused:
    """An institution's polite no.

    reason: one of REASONS. name: who refuses, where that is not known yet. parts: of a base model, those that differ.
    """

    reason: str
    name: str = ""
    parts: tuple[str, ...] = ()


Request = Hello | TrainRequest | ToMember
Reply = Introduction | Contribution | FromMember | Refused
