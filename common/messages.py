"""What coordinator and institutions say to each other, as frozen dataclasses.

The Flower adapters at the rim turn these into Flower messages and back; nothing else knows Flower.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from common import policy_reasons
from common.adapter import Adapter
from common.base_model import Fingerprint
from common.config import Config, LoraConfig, PrivacyConfig, QuantiseConfig, TrainConfig
from common.config_rules import RULES
from common.errors import ConfigError, Refusal
from common.fixed_point import Layout, Ring
from common.privacy.distributed import SharedNoise
from common.privacy.mechanism import shared_noise
from common.publication import Publication
from common.secagg import reasons as secagg_reasons
from common.secagg.attempt import Attempt
from common.secagg.messages import FromMember, ToMember
from common.secagg.terms import Terms
from common.typed import built

PROTOCOL = 3

# Reason codes: all that a coordinator ever learns of why an institution did not answer.
PROTOCOL_DIFFERS = "protocol_differs"
VERSION_DIFFERS = "version_differs"
BASE_MODEL_DIFFERS = "base_model_differs"
ADAPTER_DIGEST_DIFFERS = "adapter_digest_differs"
ADAPTER_DOES_NOT_FIT = "adapter_does_not_fit"
METHOD_UNKNOWN = "method_unknown"
DATA_UNREADABLE = "data_unreadable"
MODEL_UNUSABLE = "model_unusable"
NOT_CONFIGURED = "not_configured"
STORAGE_FAILED = "storage_failed"
NOT_INVITED = "not_invited"
MALFORMED = "malformed"
INTERNAL_ERROR = "internal_error"
BUNDLE_REFUSED = "bundle_refused"
MESSAGE_TYPE_REFUSED = "message_type_refused"
RESTARTED = "restarted"
SIGNATURE_DIFFERS = "signature_differs"

# Said by the coordinator of an institution: it did not answer, or gave another name than the one it is enrolled by.
TIMED_OUT = "timed_out"
NAME_DIFFERS = "name_differs"

REASONS = frozenset(
    {
        PROTOCOL_DIFFERS,
        VERSION_DIFFERS,
        BASE_MODEL_DIFFERS,
        ADAPTER_DIGEST_DIFFERS,
        ADAPTER_DOES_NOT_FIT,
        METHOD_UNKNOWN,
        DATA_UNREADABLE,
        MODEL_UNUSABLE,
        NOT_CONFIGURED,
        STORAGE_FAILED,
        NOT_INVITED,
        MALFORMED,
        INTERNAL_ERROR,
        BUNDLE_REFUSED,
        MESSAGE_TYPE_REFUSED,
        RESTARTED,
        SIGNATURE_DIFFERS,
        TIMED_OUT,
        NAME_DIFFERS,
        *secagg_reasons.REASONS,
        *policy_reasons.REASONS,
    }
)


@dataclass(frozen=True)
class Introduction:
    """An institution's answer to Hello: its roster name, its versions and the base model it holds."""

    name: str
    protocol: int
    version: str
    fingerprint: Fingerprint


@dataclass(frozen=True)
class Settings:
    """What an institution needs to know of the coordinator's configuration, the same in every round of a run.

    data_set: name of the records that are trained on; each institution's own files say where those are.
    """

    seed: int
    data_set: str
    rounds: int
    method: str
    weighting: str
    weight_unit: int
    evaluate: bool
    lora: LoraConfig
    train: TrainConfig
    quantise: QuantiseConfig
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)

    @classmethod
    def of(cls, config: Config) -> Settings:
        return cls(
            seed=config.seed,
            data_set=config.data.name,
            rounds=config.federation.rounds,
            method=config.federation.method,
            weighting=config.federation.weighting,
            weight_unit=config.federation.weight_unit,
            # Under differential privacy no exact sum over held-out records leaves.
            evaluate=config.evaluation.institutions and not config.privacy.private,
            lora=config.lora,
            train=config.train,
            quantise=config.quantise,
            privacy=config.privacy,
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
                    "privacy": built(PrivacyConfig, values["privacy"]),
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
            f"{part}.{key}": value
            for part in ("lora", "train", "quantise", "privacy")
            for key, value in values[part].items()
        }
        return nested | {
            "seed": self.seed,
            "data.name": self.data_set,
            "federation.rounds": self.rounds,
            "federation.weighting": self.weighting,
            "federation.weight_unit": self.weight_unit,
        }


@dataclass(frozen=True)
class Hello:
    """The coordinator's first message of a run: who it is, and all that the run will ask for.

    protocol, version: what it speaks, and its release of Silotune. roster: digest of the names and keys that it holds
    for secure aggregation; empty where vectors travel in the clear.
    """

    protocol: int
    version: str
    run: str
    fingerprint: Fingerprint
    settings: Settings
    roster: str = ""

    @classmethod
    def of(cls, config: Config, run: str, fingerprint: Fingerprint, roster: str = "") -> Hello:
        """What this release says of a run with that configuration."""
        return cls(PROTOCOL, version("silotune"), run, fingerprint, Settings.of(config), roster)


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
        quantise, terms = self.settings.quantise, self.secure.terms if self.secure else None
        members = terms.members if terms else len(self.cohort)
        noise = self.shared_noise
        headroom = noise.headroom if noise else 0
        return Layout(self.parameters, members, quantise.clip, quantise.bits, quantise.weight_bits, headroom=headroom)

    @property
    def shared_noise(self) -> SharedNoise | None:
        """What every member adds to its vector before masking; None in modes without.

        Raises ConfigError when the numbers do not fit each other.
        """
        settings = self.settings
        if not settings.privacy.shared_noise or self.secure is None:
            return None
        terms = self.secure.terms
        return shared_noise(settings.privacy, settings.quantise, self.parameters, settings.rounds, terms)

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

    reason: one of REASONS. name: who refuses, where that is not known yet. parts: of a base model, those that differ;
    of a protocol or a version, what the institution has.
    """

    reason: str
    name: str = ""
    parts: tuple[str, ...] = ()

    @classmethod
    def of(cls, refusal: Refusal, name: str = "") -> Refused:
        """All of a refusal that may leave.

        One in other words than the protocol's is a mistake of ours, and perhaps speaks of data: it leaves as
        internal_error.
        """
        known = refusal.reason in REASONS and all(is_part(part) for part in refusal.parts)
        return cls(refusal.reason, name, refusal.parts) if known else cls(INTERNAL_ERROR, name)


def is_part(text: str) -> bool:
    """Whether a refusal may hold it: a part of a base model, or the number of a protocol or a release."""
    release = r"[0-9]{1,6}(\.[0-9]{1,6}){0,3}(\.?[a-z]{1,4}[0-9]{0,6})?"
    return text in Fingerprint.PARTS or re.fullmatch(release, text) is not None


@dataclass(frozen=True)
class Published:
    """The adapter that a run ends with, and what the coordinator signs of it. Coordinator to every institution."""

    publication: Publication
    adapter: Adapter


@dataclass(frozen=True)
class Received:
    """An institution keeps the adapter that a run published."""

    run: str


Request = Hello | TrainRequest | ToMember | Published
Reply = Introduction | Contribution | FromMember | Received | Refused
