"""What a coordinator vouches for when it hands out the adapter of a run, and how a member checks that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from common.base_model import Fingerprint
from common.config import LoraConfig
from common.config_rules import RULES
from common.errors import ConfigError
from common.secagg.canonical import canonical
from common.secagg.identity import Identity
from common.typed import built

_FIELDS = {"run", "round", "fingerprint", "lora", "adapter", "signature"}


@dataclass(frozen=True)
class Publication:
    """One sentence of the coordinator's: this adapter is what that run published.

    run, round: the run, and its round that the adapter is of; 0 is what the run began with. fingerprint: of the base
    model it belongs on. lora: its form. adapter: its `Adapter.digest`. signature: of the coordinator over all of these.
    """

    run: str
    round: int
    fingerprint: Fingerprint
    lora: LoraConfig
    adapter: str
    signature: bytes = field(default=b"", repr=False)

    def statement(self) -> bytes:
        """What is signed."""
        lora = self.lora
        return canonical(
            "published adapter",
            self.run,
            self.round,
            (self.fingerprint.config, self.fingerprint.weights, self.fingerprint.tokenizer),
            (lora.rank, repr(float(lora.alpha)), repr(float(lora.dropout)), tuple(lora.target_modules)),
            self.adapter,
        )

    def signed(self, coordinator: Identity) -> Publication:
        """The same with the coordinator's signature."""
        return replace(self, signature=coordinator.sign(self.statement()))

    def verifies(self, coordinator: bytes) -> bool:
        """Whether the holder of this public key (Ed25519, 32 bytes) signed it."""
        try:
            Ed25519PublicKey.from_public_bytes(coordinator).verify(self.signature, self.statement())
        except (ValueError, InvalidSignature):
            return False
        return True

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "signature": self.signature.hex()}

    @classmethod
    def from_json(cls, found: object) -> Publication:
        """Raises ConfigError for anything that `to_json` does not write, or that no adapter can be."""
        try:
            if not isinstance(found, Mapping) or set(found) != _FIELDS:
                raise TypeError(f"expected {', '.join(sorted(_FIELDS))}")
            made = built(
                cls,
                {
                    **found,
                    "fingerprint": built(Fingerprint, found["fingerprint"]),
                    "lora": built(LoraConfig, found["lora"]),
                    "signature": bytes.fromhex(found["signature"]),
                },
            )
            if made.signature.hex() != found["signature"]:
                raise ValueError("expected hex digits as they are written here")
            impossible = [key for key, value in asdict(made.lora).items() if not RULES[f"lora.{key}"].holds(value)]
            if impossible or made.round < 0:
                raise ValueError(f"impossible {', '.join(impossible) or 'round'}")
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ConfigError(
                f"expected what a coordinator says of a published adapter, found something else ({error}); ask it to "
                "hand the adapter out again"
            ) from error
        return made
