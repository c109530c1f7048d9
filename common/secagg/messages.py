"""What members and coordinator say to each other in an attempt, in order. Each names the plan that it belongs to.

Every message is a member's answer to the coordinator's message above it; the first `Keys` answer the plan itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.fixed_point import Ring


@dataclass(frozen=True)
class Keys:
    """Member: two public keys (HPKE, 1216 bytes each) and the commitment to its self-mask seed, signed.

    share_key: to encrypt shares to it; its secret is never shared. mask_key: to encrypt pair seeds to it; what it
    derives from, the mask seed, is shared and can be reconstructed.
    """

    plan: str
    share_key: bytes
    mask_key: bytes
    commitment: bytes
    signature: bytes


@dataclass(frozen=True)
class KeyList:
    """Coordinator: the keys of all who announced some, by name; the same list for everyone."""

    plan: str
    keys: Mapping[str, Keys]


@dataclass(frozen=True)
class Sealed:
    """What one member sealed for another, signed.

    shares: of the self-mask seed and of the mask seed, to the recipient's share key. pair: the pair's seed, to its mask
    key, from the lower of the two names; empty from the higher.
    """

    shares: bytes
    pair: bytes
    signature: bytes


@dataclass(frozen=True)
class Shares:
    """Member: what it sealed for every other name of the key list, by recipient."""

    plan: str
    sealed: Mapping[str, Sealed]


@dataclass(frozen=True)
class Inbox:
    """Coordinator: what all others sealed for the one who receives this, by sender."""

    plan: str
    sealed: Mapping[str, Sealed]


@dataclass(frozen=True)
class MaskedInput:
    """Member: its vector under all masks, packed to the ring's bits (`fixed_point.pack`)."""

    plan: str
    vector: Ring = field(repr=False)


@dataclass(frozen=True)
class Survivors:
    """Coordinator: the names whose masked input is in the sum."""

    plan: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Consent:
    """Member: its signature over the survivor set; it gives one for no other set."""

    plan: str
    signature: bytes


@dataclass(frozen=True)
class Consents:
    """Coordinator: the signatures of at least t survivors, by name."""

    plan: str
    signatures: Mapping[str, bytes]


@dataclass(frozen=True)
class Revealed:
    """Member: for every name one share: of a survivor's self-mask seed, of anyone else's mask seed."""

    plan: str
    shares: Mapping[str, bytes] = field(repr=False)


FromMember = Keys | Shares | MaskedInput | Consent | Revealed
ToMember = KeyList | Inbox | Survivors | Consents
