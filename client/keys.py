"""An institution's own keys and its enrolment card: made once, and loaded by every command that signs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from cryptography.hazmat.primitives.asymmetric import ec

from client import data_sets as data_sets_file
from client import policy_file
from client.home import ClientHome
from client.ledger import Ledger
from common.base_model import EMBEDDED, fingerprint
from common.bundle import bundle_digest
from common.enrolment import (
    Card,
    check_name,
    read_card,
)
from common.errors import ConfigError
from common.private_files import (
    check_new_passphrase,
    check_private_directory,
    keep_curve_key,
    keep_identity_key,
    locked,
    private_directory,
    read_curve_key,
    read_identity_key,
    sweep,
    write_private_json,
)
from common.secagg.identity import Identity


@dataclass(frozen=True)
class Keys:
    """identity: signs the institution's part of the protocol, and its logs. node: how Flower knows the machine.

    No text form shows either, and pickling raises TypeError.
    """

    identity: Identity
    node: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def flower(self) -> tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey]:
        """The node's keys as Flower's fleet client takes them."""
        return self.node, self.node.public_key()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("keys are never pickled: they stay in this process")


def init(
    home: ClientHome,
    name: str,
    passphrase: bytes | None,
    base_model: str = "",
    data_sets: Mapping[str, Path] | None = None,
) -> Card:
    """Makes keys, a commented policy and data file, and the card; goes on where an earlier call was stopped, and
    overwrites nothing.

    The card is written last: where it is, the home is complete. base_model: a directory, or `embedded`, that policy and
    data file are to name; data_sets: files by name, likewise. What they do not name is not allowed.

    Raises ConfigError for a name that cannot be one, a home that is complete already or that others can enter, and a
    passphrase that is too short or not that of the keys there; ModelError for a base model that is none; StorageError
    when a file cannot be written.
    """
    check_name(name)
    named = {name: str(file.expanduser().absolute()) for name, file in (data_sets or {}).items()}
    digests = [fingerprint(base_model).digest()] if base_model else []
    check_new_passphrase(passphrase)
    private_directory(home.root)
    with locked(home.root):
        if home.card.exists():
            raise ConfigError(
                f"{home.root}: expected no institution here yet, found {card(home).name}, whose keys are never"
                " overwritten; `silotune-client card` shows its card, and another institution needs another --home"
            )
        private_directory(home.identity_key.parent)
        for directory in (home.root, home.identity_key.parent):
            sweep(directory)
        identity = Identity(name, keep_identity_key(home.identity_key, passphrase))
        node = keep_curve_key(home.node_key, passphrase)
        if not home.policy.exists():
            policy_file.write_template(home.policy, digests, list(named), [bundle_digest()])
        if not home.data.exists():
            model = base_model if base_model in ("", EMBEDDED) else str(Path(base_model).expanduser().absolute())
            data_sets_file.write_template(home.data, named, model or EMBEDDED)
        Ledger(home.ledger, identity).begin()
        made = Card.of(identity, node.public_key())
        write_private_json(home.card, made.to_json())
    return made


def own_home(path: Path | None) -> ClientHome:
    """The home that a command means, where there is an institution. Raises as `card` and `ClientHome.at` do."""
    home = ClientHome.at(path)
    card(home)
    return home


def card(home: ClientHome) -> Card:
    """The card that `init` made. Raises ConfigError when there is none or it was changed, and StorageError."""
    if not home.card.exists():
        raise ConfigError(f"{home.card}: expected this institution's card, found none; run: silotune-client init")
    return read_card(home.card)


def load(home: ClientHome, passphrase: bytes | None) -> Keys:
    """The keys of the institution whose card lies there.

    Raises ConfigError when there is no card or it is not that of these keys, when others can enter the directories or
    read the keys (with the command that mends it), and when the passphrase is missing, wrong or too much; StorageError
    when a key is missing or damaged. No error shows a key.
    """
    shown = card(home)
    for directory in (home.root, home.identity_key.parent):
        check_private_directory(directory)
    identity = Identity(shown.name, read_identity_key(home.identity_key, passphrase))
    node = read_curve_key(home.node_key, passphrase)
    if Card.of(identity, node.public_key()) != shown:
        raise ConfigError(
            f"{home.card}: expected the card of the keys in {home.identity_key.parent}, found another; restore both"
            " from the same copy"
        )
    return Keys(identity, node)
