"""What the coordinator was set up with, and the roster it signs: the members' cards and how they reach it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from common.config import COORDINATOR
from common.enrolment import (
    Address,
    Card,
    Contents,
    Member,
    SignedRoster,
    check_federation,
    check_host,
    read_roster,
    timestamp,
)
from common.errors import ConfigError
from common.private_files import (
    check_new_passphrase,
    check_private_directory,
    keep_identity_key,
    locked,
    private_directory,
    read_file,
    read_identity_key,
    sweep,
    write_private,
    write_private_json,
)
from common.secagg.identity import Identity
from server import authority
from server.authority import Existing
from server.home import ServerHome

_LIMIT = 1 << 16

_YAML = """\
# What `silotune-server init` was told. After a change: silotune-server renew

# The federation's name, as the roster has it.
federation: {federation}

# Host names and IP addresses by which members reach this machine; all are in its certificate, the first one is in the
# roster.
hosts: {hosts}

# The members' port: TLS, open to them.
port: {port}

# Where Flower's SuperLink listens: on loopback only, and nobody else reaches it.
superlink_port: {superlink_port}
"""


@dataclass(frozen=True)
class Settings:
    """server.yaml. hosts: the first one is where members turn to. superlink_port: on loopback.

    Raises ConfigError for names, hosts and ports that are none.
    """

    federation: str
    hosts: tuple[str, ...]
    port: int
    superlink_port: int

    def __post_init__(self) -> None:
        check_federation(self.federation)
        if not self.hosts:
            raise ConfigError("hosts: expected at least one host name or IP address of this machine, found none")
        object.__setattr__(self, "hosts", tuple(dict.fromkeys(check_host(host) for host in self.hosts)))
        for port in (self.port, self.superlink_port):
            Address(self.hosts[0], port)
        if self.port == self.superlink_port:
            raise ConfigError(f"superlink_port: expected another one than the members' {self.port}, found the same")

    @property
    def address(self) -> Address:
        """The members' port."""
        return Address(self.hosts[0], self.port)


def init(
    home: ServerHome, settings: Settings, passphrase: bytes | None, now: datetime, existing: Existing | None = None
) -> SignedRoster:
    """Makes identity, certificates, server.yaml and a roster without members, or takes certificates that exist.

    Goes on where an earlier call was stopped; keys are never overwritten. The roster is written last: where it is, the
    home is complete.

    Raises ConfigError for a home that is complete or that others can enter, a passphrase that is too short or not that
    of the keys there, and certificates that do not fit; StorageError when a file cannot be written.
    """
    check_new_passphrase(passphrase)
    private_directory(home.root)
    with locked(home.root):
        if home.roster.exists():
            raise ConfigError(
                f"{home.root}: expected no coordinator here yet, found one, whose keys are never overwritten;"
                " `silotune-server renew` makes a new certificate, and another federation needs another --home"
            )
        private_directory(home.identity_key.parent)
        for directory in (home.root, home.identity_key.parent):
            sweep(directory)
        own = Identity(COORDINATOR, keep_identity_key(home.identity_key, passphrase))
        if existing is None:
            authority.make(home, settings.federation, settings.hosts, passphrase, now)
        else:
            authority.take(home, settings.hosts, existing, replace=False)
        write_private(home.settings, _yaml(settings).encode(), replace=True)
        signed = SignedRoster.of(
            Contents(
                federation=settings.federation,
                serial=1,
                written=timestamp(now),
                coordinator=own.public,
                address=settings.address,
                authority=authority.authority_pem(home),
            ),
            own,
        )
        write_private_json(home.roster, signed.to_json())
    return signed


def renew(home: ServerHome, passphrase: bytes | None, now: datetime, existing: Existing | None = None) -> SignedRoster:
    """Makes, or takes, a new server certificate for the hosts in server.yaml.

    Returns the roster, which is a new one where address, federation or authority are no longer as it says.

    Raises ConfigError and StorageError as `authority.renew`, `authority.take` and `enroll` do.
    """
    settings = read_settings(home)
    with locked(home.root):
        if existing is None:
            authority.renew(home, settings.hosts, passphrase, now)
        else:
            authority.take(home, settings.hosts, existing, replace=True)
        said = roster(home)
        kept = (said.contents.federation, said.contents.address, said.contents.authority)
        if kept == (settings.federation, settings.address, authority.authority_pem(home)):
            return said
        return _rewrite(home, identity(home, passphrase), now, said.contents.members, said.contents.bundles)


def identity(home: ServerHome, passphrase: bytes | None) -> Identity:
    """The coordinator's signing key.

    Raises ConfigError when there is none, when others can enter the directories or read it, and for a passphrase that
    is missing, wrong or too much; StorageError when it is damaged.
    """
    require_coordinator(home)
    for directory in (home.root, home.identity_key.parent):
        check_private_directory(directory)
    return Identity(COORDINATOR, read_identity_key(home.identity_key, passphrase))


def roster(home: ServerHome) -> SignedRoster:
    """The roster as it stands. Raises ConfigError when there is none or it was changed, and StorageError."""
    require_coordinator(home)
    return read_roster(home.roster)


def enroll(home: ServerHome, cards: Sequence[Card], passphrase: bytes | None, now: datetime) -> SignedRoster:
    """Adds members: all of these or none.

    Raises ConfigError when a name or a key is on the roster already, or twice among these; StorageError.
    """
    added = tuple(Member(card, timestamp(now)) for card in cards)
    return _change(home, passphrase, now, lambda members: (*members, *_all_new(members, added)))


def remove(home: ServerHome, name: str, passphrase: bytes | None, now: datetime) -> SignedRoster:
    """Takes a member off the roster. Raises ConfigError when there is none of that name; StorageError."""

    def without(members: tuple[Member, ...]) -> tuple[Member, ...]:
        names = [member.card.name for member in members]
        if name not in names:
            raise ConfigError(
                f"expected the name of a member ({', '.join(names) or 'there is none'}), found {ascii(name)[:80]}; see:"
                " silotune-server roster"
            )
        return tuple(member for member in members if member.card.name != name)

    return _change(home, passphrase, now, without)


def allow_bundles(home: ServerHome, bundles: Sequence[str], passphrase: bytes | None, now: datetime) -> SignedRoster:
    """Says which application bundles (SHA-256) the coordinator may send, where that is not what the roster says.

    Raises ConfigError for what is no digest, and for one given twice; StorageError.
    """
    own = identity(home, passphrase)
    with locked(home.root):
        said = roster(home).contents
        return roster(home) if said.bundles == tuple(bundles) else _rewrite(home, own, now, said.members, bundles)


def check_new(signed: SignedRoster, cards: Sequence[Card]) -> None:
    """Raises ConfigError when a name or a key of these cards is on the roster already, or twice among them."""
    _all_new(signed.contents.members, tuple(Member(card, signed.contents.written) for card in cards))


def read_settings(home: ServerHome) -> Settings:
    """server.yaml. Raises ConfigError for what cannot be meant, and StorageError when it cannot be read."""
    import yaml

    require_coordinator(home)
    kinds: dict[str, type] = {"federation": str, "hosts": list, "port": int, "superlink_port": int}
    try:
        said: Any = yaml.safe_load(read_file(home.settings, _LIMIT).decode())
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"{home.settings}: expected YAML, found something else; restore the file") from None
    if not isinstance(said, dict) or set(said) != set(kinds):
        found = ", ".join(map(str, said)) if isinstance(said, dict) else type(said).__name__
        raise ConfigError(
            f"{home.settings}: expected the keys {', '.join(kinds)}, found {ascii(found)[:80]}; correct it"
        )
    for key, kind in kinds.items():
        if type(said[key]) is not kind or (kind is list and not all(isinstance(host, str) for host in said[key])):
            wanted = "a list of texts" if kind is list else f"a value of type {kind.__name__}"
            raise ConfigError(f"{home.settings}: {key}: expected {wanted}, found {ascii(said[key])[:80]}; correct it")
    try:
        return Settings(said["federation"], tuple(said["hosts"]), said["port"], said["superlink_port"])
    except ConfigError as error:
        raise ConfigError(f"{home.settings}: {error}") from None


def _yaml(settings: Settings) -> str:
    return _YAML.format(
        federation=json.dumps(settings.federation),
        hosts=json.dumps(list(settings.hosts)),
        port=settings.port,
        superlink_port=settings.superlink_port,
    )


def require_coordinator(home: ServerHome) -> None:
    """Raises ConfigError where no coordinator was set up, or its roster is gone."""
    if home.roster.exists():
        return
    if home.identity_key.exists():
        raise ConfigError(
            f"{home.roster}: expected the roster, found none; run `silotune-server init` again if it was stopped, else"
            " restore the newest roster from a copy: members refuse one that starts again at 1"
        )
    raise ConfigError(f"{home.root}: expected a coordinator here, found none; run: silotune-server init")


def _all_new(members: tuple[Member, ...], added: tuple[Member, ...]) -> tuple[Member, ...]:
    cards = [member.card for member in members]
    for card in (member.card for member in added):
        for other in cards:
            shared = [
                what
                for what, mine, theirs in (
                    ("name", card.name, other.name),
                    ("identity key", card.identity, other.identity),
                    ("node key", card.node, other.node),
                )
                if mine == theirs
            ]
            if shared:
                raise ConfigError(
                    f"card of {card.name}: expected a name and keys of its own, found the {' and the '.join(shared)} of"
                    f" the member {other.name}; if it is to take its place: silotune-server remove {other.name}"
                )
        cards.append(card)
    return added


def _change(
    home: ServerHome,
    passphrase: bytes | None,
    now: datetime,
    edit: Callable[[tuple[Member, ...]], tuple[Member, ...]],
) -> SignedRoster:
    own = identity(home, passphrase)
    with locked(home.root):
        said = roster(home).contents
        return _rewrite(home, own, now, edit(said.members), said.bundles)


def _rewrite(
    home: ServerHome, own: Identity, now: datetime, members: tuple[Member, ...], bundles: Sequence[str]
) -> SignedRoster:
    """The next roster, with what settings and certificates say now. Call it under `locked`."""
    before = roster(home).contents
    if before.coordinator != own.public:
        raise ConfigError(
            f"{home.roster}: expected a roster that {home.identity_key} signed, found another's; restore both from the"
            " same copy"
        )
    settings = read_settings(home)
    signed = SignedRoster.of(
        Contents(
            federation=settings.federation,
            serial=before.serial + 1,
            written=timestamp(now),
            coordinator=own.public,
            address=settings.address,
            authority=authority.authority_pem(home),
            members=tuple(sorted(members, key=lambda member: member.card.name)),
            bundles=tuple(bundles),
        ),
        own,
    )
    write_private_json(home.roster, signed.to_json(), replace=True)
    return signed
