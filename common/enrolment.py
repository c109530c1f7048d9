"""Enrolment: the card that an institution hands over, the roster it gets back, signed by their keys.

A card and a roster are verified whenever one is made, so that none exists in this program that does not verify. They
prove who signed them, not who that is: fingerprints are compared over another channel.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from common.config import COORDINATOR, POOLED
from common.errors import ConfigError
from common.private_files import read_file
from common.secagg.canonical import canonical
from common.secagg.identity import PUBLIC_BYTES, SIGNATURE_BYTES, Identity, Roster

FORM = 1
"""Version of the form of cards and rosters."""

CARD_LIMIT, ROSTER_LIMIT = 1 << 14, 1 << 24
"""Most bytes of a file that is read as one: longer ones are none."""

_NAME, _LONGEST_NAME = r"[a-z0-9][a-z0-9_-]*", 64
_DIGEST = r"[0-9a-f]{64}"
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_LABEL = r"[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?"
_GROUP = 4

T = TypeVar("T")


# --- Words -----------------------------------------------------------------------------------------------------------


def check_name(name: str) -> str:
    """The name of an institution, as it was given. Raises ConfigError for what cannot be one."""
    if not re.fullmatch(_NAME, name) or len(name) > _LONGEST_NAME or name in (COORDINATOR, POOLED):
        raise ConfigError(
            f"expected as an institution's name 1 to {_LONGEST_NAME} of a-z, 0-9, - and _, a letter or digit first,"
            f" other than {COORDINATOR} and {POOLED}; found {_short(name)}; choose another"
        )
    return name


def check_host(text: str) -> str:
    """A host name in lower case, or an IP address in its usual form. Raises ConfigError for anything else."""
    host = text.lower()
    try:
        return str(ipaddress.ip_address(host)) if "%" not in host else _no_host(text)
    except ValueError:
        labels = host.split(".")
        known = all(re.fullmatch(_LABEL, label) for label in labels) and not labels[-1].isdigit()
        return host if known and len(host) <= 253 else _no_host(text)


def _no_host(text: str) -> str:
    raise ConfigError(
        f"expected a host name such as coordinator.example.org, or an IP address, found {_short(text)}; give it without"
        " scheme, port or wildcard, and a name outside ASCII as it stands in the DNS (xn--...)"
    )


def grouped(digest: str) -> str:
    """A fingerprint as people read it to each other: 16 groups of 4 hexadecimal digits."""
    return " ".join(digest[at : at + _GROUP] for at in range(0, len(digest), _GROUP))


def ungrouped(text: str) -> str:
    """The 64 hexadecimal digits of a fingerprint, however it was grouped. Raises ConfigError when it is none."""
    digits = re.sub(r"[\s:-]", "", text).lower()
    if not re.fullmatch(_DIGEST, digits):
        raise ConfigError(
            f"expected a fingerprint of 64 hexadecimal digits, found {_short(text)}; give the whole of it"
        )
    return digits


def timestamp(now: datetime) -> str:
    """A moment in UTC, to the second."""
    return now.astimezone(UTC).strftime(_TIME)


def key_fingerprint(public: bytes) -> str:
    """SHA-256 that stands for a coordinator's identity key."""
    return hashlib.sha256(canonical("coordinator's key", public)).hexdigest()


def certificate_fingerprint(pem: str) -> str:
    """SHA-256 of a certificate, the one that `openssl x509 -fingerprint -sha256` prints."""
    return hashlib.sha256(x509.load_pem_x509_certificate(pem.encode()).public_bytes(Encoding.DER)).hexdigest()


def _short(value: object) -> str:
    """A value from outside in one line: escaped, and not all of a long one."""
    try:
        text = ascii(value)
    except RecursionError:
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- Cards -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """What an institution hands over: its name and public keys, signed by its identity.

    identity: Ed25519, 32 bytes. node: ECDSA P-384 in OpenSSH's form, without a comment. signature: of the identity over
    the rest, so that nobody enrols under another's key.

    Raises ConfigError when a field is not what it should be, or the signature is not over these.
    """

    name: str
    identity: bytes
    node: str
    signature: bytes

    def __post_init__(self) -> None:
        check_name(self.name)
        _check_node(self.node)
        if not _signed(self.identity, self.signature, self._statement(self.name, self.identity, self.node)):
            raise ConfigError(
                f"card of {self.name}: expected a signature of its own identity key over name and keys, found another;"
                " the file was changed or damaged: ask the institution for `silotune-client card` again"
            )

    @classmethod
    def of(cls, identity: Identity, node: ec.EllipticCurvePublicKey) -> Card:
        """The card of an institution. Raises ConfigError for a name that cannot be one."""
        line = node.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        signature = identity.sign(cls._statement(identity.name, identity.public, line))
        return cls(identity.name, identity.public, line, signature)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over name and both keys."""
        return hashlib.sha256(self._statement(self.name, self.identity, self.node)).hexdigest()

    @staticmethod
    def _statement(name: str, identity: bytes, node: str) -> bytes:
        return canonical("enrolment card", FORM, name, identity, node)

    def to_json(self) -> dict[str, Any]:
        """As the file has it."""
        return {
            "form": FORM,
            "name": self.name,
            "identity_key": self.identity.hex(),
            "node_key": self.node,
            "signature": self.signature.hex(),
        }

    @classmethod
    def from_json(cls, value: object) -> Card:
        """The card in such an object. Raises ConfigError for any other."""
        kinds = {"form": int, "name": str, "identity_key": str, "node_key": str, "signature": str}
        found = fields(value, kinds, "card")
        return cls(
            name=found["name"],
            identity=hexadecimal(found["identity_key"], PUBLIC_BYTES, "card: identity_key"),
            node=found["node_key"],
            signature=hexadecimal(found["signature"], SIGNATURE_BYTES, "card: signature"),
        )


def read_card(path: Path) -> Card:
    """The card in a file. Raises ConfigError when it is none, and StorageError when it cannot be read."""
    return within(path, lambda: Card.from_json(parse_json(read_file(path, CARD_LIMIT))))


def _check_node(line: str) -> None:
    try:
        key = serialization.load_ssh_public_key(line.encode("ascii"))
        usual = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        right = isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1) and usual == line
    except (ValueError, UnsupportedAlgorithm, NotImplementedError):  # the last one for compressed points
        right = False
    if not right:
        raise ConfigError(
            f"card: node_key: expected an ECDSA P-384 key as `ecdsa-sha2-nistp384 ...` without a comment, found"
            f" {_short(line)}; ask the institution for `silotune-client card` again"
        )


# --- Rosters ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Address:
    """Where members reach the coordinator. Raises ConfigError for a host or a port that is none."""

    host: str
    port: int

    def __post_init__(self) -> None:
        if check_host(self.host) != self.host:
            raise ConfigError(f"address: expected the host as {check_host(self.host)}, found {_short(self.host)}")
        if not 0 < self.port < 1 << 16:
            raise ConfigError(f"address: expected a port from 1 to 65535, found {_short(self.port)}")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Member:
    """A card, and when it was enrolled (UTC, `2030-01-31T12:00:00Z`)."""

    card: Card
    enrolled: str


@dataclass(frozen=True)
class Contents:
    """What the coordinator says in a roster.

    serial: grows with every change. written: when (UTC). authority: the certificate (PEM) that vouches for the members'
    port. members: in order of their names. bundles: SHA-256 of each application bundle that the coordinator may send.

    Raises ConfigError when a field is not what it should be, and when two members share a name or a key.
    """

    federation: str
    serial: int
    written: str
    coordinator: bytes
    address: Address
    authority: str
    members: tuple[Member, ...] = ()
    bundles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_federation(self.federation)
        if not 0 < self.serial < 1 << 63:
            raise ConfigError(
                f"roster: serial: expected a whole number from 1 to 2^63 - 1, found {_short(self.serial)}"
            )
        for moment in (self.written, *(member.enrolled for member in self.members)):
            _check_time(moment)
        check_authority(self.authority)
        for bundle in self.bundles:
            if not re.fullmatch(_DIGEST, bundle):
                raise ConfigError(f"roster: bundles: expected 64 hexadecimal digits, found {_short(bundle)}")
        if len(set(self.bundles)) < len(self.bundles):
            raise ConfigError("roster: bundles: expected each once, found one twice")
        names = [member.card.name for member in self.members]
        if names != sorted(names):
            raise ConfigError("roster: members: expected in order of their names, found another order")
        _check_distinct(names, "name")
        _check_distinct([self.coordinator, *(member.card.identity for member in self.members)], "identity key")
        _check_distinct([member.card.node for member in self.members], "node key")

    def statement(self) -> bytes:
        """What the coordinator signs: every field."""
        return canonical(
            "federation roster",
            FORM,
            self.federation,
            self.serial,
            self.written,
            self.coordinator,
            self.address.host,
            self.address.port,
            self.authority,
            tuple(
                (member.card.name, member.card.identity, member.card.node, member.card.signature, member.enrolled)
                for member in self.members
            ),
            self.bundles,
        )


@dataclass(frozen=True)
class SignedRoster:
    """A roster with the coordinator's signature. Raises ConfigError when the signature is not over these contents."""

    contents: Contents
    signature: bytes

    def __post_init__(self) -> None:
        if not _signed(self.contents.coordinator, self.signature, self.contents.statement()):
            raise ConfigError(
                "roster: expected a signature of the coordinator's key over all of it, found another; the file was"
                " changed or damaged: ask the coordinator for it again"
            )

    @classmethod
    def of(cls, contents: Contents, coordinator: Identity) -> SignedRoster:
        """The contents, signed. Raises ConfigError when they name another coordinator's key."""
        return cls(contents, coordinator.sign(contents.statement()))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all that is signed."""
        return hashlib.sha256(self.contents.statement()).hexdigest()

    @property
    def cards(self) -> Mapping[str, Card]:
        """The members' cards by name."""
        return {member.card.name: member.card for member in self.contents.members}

    @property
    def secagg(self) -> Roster:
        """Names and identity keys, as secure aggregation knows them."""
        return Roster({name: card.identity for name, card in self.cards.items()})

    def to_json(self) -> dict[str, Any]:
        """As the file has it."""
        contents = self.contents
        return {
            "form": FORM,
            "federation": contents.federation,
            "serial": contents.serial,
            "written": contents.written,
            "coordinator_key": contents.coordinator.hex(),
            "host": contents.address.host,
            "port": contents.address.port,
            "authority": contents.authority,
            "members": [{"card": member.card.to_json(), "enrolled": member.enrolled} for member in contents.members],
            "bundles": list(contents.bundles),
            "signature": self.signature.hex(),
        }

    @classmethod
    def from_json(cls, value: object) -> SignedRoster:
        """The roster in such an object. Raises ConfigError for any other."""
        found = fields(value, _ROSTER_FIELDS, "roster")
        members = [fields(member, {"card": dict, "enrolled": str}, "roster: a member") for member in found["members"]]
        for bundle in found["bundles"]:
            if not isinstance(bundle, str):
                raise ConfigError(f"roster: bundles: expected 64 hexadecimal digits, found {_short(bundle)}")
        contents = Contents(
            federation=found["federation"],
            serial=found["serial"],
            written=found["written"],
            coordinator=hexadecimal(found["coordinator_key"], PUBLIC_BYTES, "roster: coordinator_key"),
            address=Address(found["host"], found["port"]),
            authority=found["authority"],
            members=tuple(Member(Card.from_json(member["card"]), member["enrolled"]) for member in members),
            bundles=tuple(found["bundles"]),
        )
        return cls(contents, hexadecimal(found["signature"], SIGNATURE_BYTES, "roster: signature"))


_ROSTER_FIELDS = {
    "form": int,
    "federation": str,
    "serial": int,
    "written": str,
    "coordinator_key": str,
    "host": str,
    "port": int,
    "authority": str,
    "members": list,
    "bundles": list,
    "signature": str,
}


def read_roster(path: Path) -> SignedRoster:
    """The roster in a file. Raises ConfigError when it is none, and StorageError when it cannot be read."""
    return within(path, lambda: SignedRoster.from_json(parse_json(read_file(path, ROSTER_LIMIT))))


def check_fingerprint(roster: SignedRoster, expected: str) -> None:
    """Raises ConfigError unless this is the roster's fingerprint, grouped in any way."""
    if ungrouped(expected) != roster.fingerprint:
        raise ConfigError(
            f"roster: expected the fingerprint {grouped(ungrouped(expected))}, found {grouped(roster.fingerprint)}; it"
            " is another roster: ask the coordinator for the one whose fingerprint you have"
        )


def check_federation(name: str) -> str:
    """The name of a federation, as it was given. Raises ConfigError for what cannot be one."""
    if not re.fullmatch(_NAME, name) or len(name) > _LONGEST_NAME:
        raise ConfigError(
            f"expected as a federation's name 1 to {_LONGEST_NAME} of a-z, 0-9, - and _, a letter or digit first; found"
            f" {_short(name)}; choose another"
        )
    return name


def check_authority(pem: str) -> x509.Certificate:
    """The certificate of an authority, the only thing in `pem`. Raises ConfigError for anything else."""
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode("ascii"))
        alone = certificate.public_bytes(Encoding.PEM).decode() == pem
        signs = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion, x509.ExtensionNotFound, x509.DuplicateExtension):
        alone = signs = False
    if not (alone and signs):
        raise ConfigError(
            f"authority: expected one certificate in PEM, of an authority (CA: true), found {_short(pem)}; give the"
            " file of the authority's certificate and nothing else"
        )
    return certificate


def _check_time(moment: str) -> None:
    try:
        usual = timestamp(datetime.strptime(moment, _TIME).replace(tzinfo=UTC))
    except ValueError:
        usual = ""
    if usual != moment:
        raise ConfigError(f"roster: expected a time in UTC such as 2030-01-31T12:00:00Z, found {_short(moment)}")


def _check_distinct(values: list[Any], what: str) -> None:
    if len(set(values)) < len(values):
        raise ConfigError(
            f"roster: expected for everyone a {what} of their own, found one twice; ask the coordinator for another"
            " roster"
        )


def _signed(public: bytes, signature: bytes, statement: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, statement)
    except (ValueError, InvalidSignature):
        return False
    return True


# --- Reading what others wrote ---------------------------------------------------------------------------------------


def parse_json(data: bytes) -> object:
    """What the JSON says. Raises ConfigError for what is not JSON, and for an object that says one thing twice."""
    try:
        return json.loads(data.decode(), object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else _reason(error)
        raise ConfigError(f"expected JSON in UTF-8, found something else ({why}); ask for the file again") from None


def fields(value: object, kinds: Mapping[str, type], what: str) -> dict[str, Any]:
    """The object, which has exactly these keys with values of these types. Raises ConfigError for any other."""
    if not isinstance(value, dict):
        raise ConfigError(f"{what}: expected a JSON object, found {_short(value)}; give the right file")
    if "form" in kinds and value.get("form", FORM) != FORM:
        raise ConfigError(
            f"{what}: expected form {FORM}, found {_short(value['form'])}; both sides need the same version of Silotune"
        )
    if set(value) != set(kinds):
        raise ConfigError(
            f"{what}: expected the keys {', '.join(kinds)}; found {_short(', '.join(value))}; give the right file"
        )
    for key, kind in kinds.items():
        if type(value[key]) is not kind:
            raise ConfigError(
                f"{what}: {key}: expected a value of type {kind.__name__}, found {_short(value[key])}; ask for the file"
                " again"
            )
    return value


def hexadecimal(text: str, size: int, what: str) -> bytes:
    """So many bytes. Raises ConfigError unless `text` has two digits for each, in lower case."""
    if not re.fullmatch(rf"[0-9a-f]{{{2 * size}}}", text):
        raise ConfigError(
            f"{what}: expected {2 * size} hexadecimal digits in lower case, found {_short(text)}; ask for the file"
            " again"
        )
    return bytes.fromhex(text)


def within(path: Path, read: Callable[[], T]) -> T:
    """What `read` gives; a ConfigError of it names the file."""
    try:
        return read()
    except ConfigError as error:
        told = str(error)
        raise ConfigError(told if told.startswith(str(path)) else f"{path}: {told}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number")


def _reason(error: ValueError) -> str:
    """Why text cannot be decoded, without the text."""
    return error.reason if isinstance(error, UnicodeError) and hasattr(error, "reason") else str(error)
