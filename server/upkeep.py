"""The coordinator's services, kept running: the SuperLink, the members' door, and the nodes as the roster has them."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from common.enrolment import SignedRoster, timestamp
from common.errors import ConfigError, SilotuneError
from common.log_files import keep_small
from common.private_files import read_file
from common.processes import STARTED, Child, ChildEvent, ended, supervise
from server import authority, nodes, services
from server.calls import ServiceError, Status
from server.enrolment import Settings, read_settings, roster
from server.home import ServerHome
from server.operator import KeyRemovedError, Operator
from server.ports import check_address, check_free
from server.pulse import Pulse
from server.superlink import SuperLinkHome, start_superlink

# What `serve` tells of.
READY = "ready"
NOT_READY = "not_ready"
RESTART = "restart"
ENROLLED = "enrolled"
REMOVED = "removed"
SHUT_OUT = "shut_out"
ONLINE = "online"
OFFLINE = "offline"
CERTIFICATE = "certificate"
TROUBLE = "trouble"

EVERYWHERE = "0.0.0.0"

_FRONT = "from server.front import main; main()"
_LOOK_S = 1.0
_ANSWER_S = 5.0  # for one call of the SuperLink; a signal waits as long at most
_SILENT_S, _STARTING_S = 60.0, 600.0  # until a SuperLink that answers nothing is started anew
_WARN_DAYS = 30
_LIMIT = 1 << 16


@dataclass(frozen=True)
class Event:
    """Something that happened to the services. kind: one of the words above. name: of the member that it is about."""

    kind: str
    text: str
    name: str = ""


def serve(
    home: ServerHome,
    stop: threading.Event,
    on_event: Callable[[Event], None] = lambda _: None,
    listen: str = EVERYWHERE,
) -> None:
    """Keeps the services running until `stop` is set; then ends them within seconds.

    What ends by itself is started again, and so is a SuperLink that answers nothing for a minute. The SuperLink's nodes
    are kept equal to the roster, whenever that changes, and the members' door takes up another certificate by itself.
    listen: the address of the members' port; the SuperLink's is on loopback only. on_event: is called by one thread at
    a time.

    Raises ConfigError when there is no coordinator in the home, the services run already, a port is taken, an address
    is none, or a member would refuse the certificate; StorageError when the disk does.
    """
    settings, signed = read_settings(home), roster(home)
    check_address(listen)
    _check_certificate(home, settings)
    with services.alone(home):
        check_free(listen, settings.port, "port")
        check_free("127.0.0.1", settings.superlink_port, "superlink_port")
        superlink = SuperLinkHome(home.services)
        superlink.prepare()
        _Upkeep(home, settings, signed, superlink, listen, on_event).run(stop)


class _Upkeep:
    """The two processes, and what is known of the members behind them."""

    def __init__(
        self,
        home: ServerHome,
        settings: Settings,
        signed: SignedRoster,
        superlink: SuperLinkHome,
        listen: str,
        on_event: Callable[[Event], None],
    ) -> None:
        self._home = home
        self._settings = settings
        self._roster = signed
        self._superlink = superlink
        self._listen = listen
        self._on_event = on_event
        self._telling = threading.Lock()
        self._since = timestamp(datetime.now(UTC))
        self._ready = False
        self._door_answers = threading.Event()
        self._pulse = Pulse(_SILENT_S, _STARTING_S)
        self._members: dict[str, str] = {}
        self._refused: set[str] = set()  # node keys, as on their cards, that the SuperLink does not take back
        self._roster_stamp: tuple[int, int, int] | None = None  # looked at again: it may have changed meanwhile
        self._expires: datetime | None = None
        self._noticed = ""
        self._complaints: dict[str, str] = {}  # what was last told of each trouble
        self._said: services.Said | None = None

    @property
    def _door_log(self) -> Path:
        return self._home.services / "front.log"

    def run(self, stop: threading.Event) -> None:
        over = threading.Event()
        self._say()
        try:
            with ThreadPoolExecutor(2, "supervise") as pool:
                kept: list[Future[int | None]] = []
                try:
                    kept.append(
                        pool.submit(supervise, self._start_superlink, over, self._on_superlink, hangs=self._pulse.hangs)
                    )
                    kept.append(pool.submit(supervise, self._start_door, over, self._on_door))
                    endpoint = self._superlink.endpoint(self._settings.superlink_port)
                    with Operator(endpoint, 0, timeout_s=_ANSWER_S, heard=self._pulse.answered) as operator:
                        while not stop.wait(_LOOK_S) and not any(found.done() for found in kept):
                            self._look(operator)
                finally:
                    over.set()
            for found in kept:
                found.result()
        finally:
            services.say(self._home, None)

    # --- The processes ------------------------------------------------------------------------------------------------

    def _start_superlink(self) -> Child:
        self._pulse.started()
        return start_superlink(self._superlink, self._settings.superlink_port)

    def _start_door(self) -> Child:
        self._door_answers.clear()
        arguments = [
            *(self._listen, str(self._settings.port), str(self._home.tls_certificate), str(self._home.tls_key)),
            *(f"127.0.0.1:{self._settings.superlink_port}", str(self._superlink.certificate)),
        ]
        return Child(_FRONT, arguments, self._door_log)

    def _on_superlink(self, event: ChildEvent) -> None:
        hung = f"answered nothing for {_SILENT_S:.0f} s and " if self._pulse.hangs() else ""
        self._tell_of(f"the SuperLink {hung}".rstrip(), event, self._superlink.log)

    def _on_door(self, event: ChildEvent) -> None:
        if event.kind != STARTED:
            self._door_answers.clear()
        self._tell_of("the members' door", event, self._door_log)

    def _tell_of(self, what: str, event: ChildEvent, log: Path) -> None:
        if event.kind != STARTED and event.wait_s is not None:
            self._tell(RESTART, f"{what} {ended(event.code)}; started again in {event.wait_s:.0f} s; see {log}")

    # --- A look, about once a second ----------------------------------------------------------------------------------

    def _look(self, operator: Operator) -> None:
        keep_small(self._superlink.log)
        keep_small(self._door_log)
        self._watching("certificate", self._watch_certificate)
        self._watching("roster", self._watch_roster)
        try:
            self._equalise(operator)
            answers = True
        except ServiceError as error:
            answers = False
            if isinstance(error, Status):  # it is there, and says no
                self._complain("SuperLink", str(error))
            else:
                self._pulse.missed()
        self._set_ready(answers and self._reach_door())
        self._watching("state", self._say)

    def _watching(self, what: str, look: Callable[[], None]) -> None:
        """A file that cannot be read or written ends nothing; it is told once for each reason."""
        try:
            look()
            self._complaints.pop(what, None)
        except (SilotuneError, OSError) as error:
            self._complain(what, str(error))

    def _complain(self, what: str, why: str) -> None:
        if self._complaints.get(what) != why:
            self._complaints[what] = why
            self._tell(TROUBLE, why)

    def _watch_certificate(self) -> None:
        expires = authority.expiry(self._home).server
        if self._expires not in (None, expires):
            told = f"there is another certificate, which members see from now on; it ends {timestamp(expires)}"
            self._tell(CERTIFICATE, told)
        self._expires = expires
        text = notice(expires, datetime.now(UTC))
        if text and text != self._noticed:
            self._tell(CERTIFICATE, text)
        self._noticed = text

    def _watch_roster(self) -> None:
        """Takes up a roster that was changed, when the same coordinator signed it later."""
        found = _stamp(self._home.roster)
        if found == self._roster_stamp:
            return
        signed, now = roster(self._home), self._roster.contents
        if signed.contents.coordinator != now.coordinator:
            raise ConfigError(
                f"{self._home.roster}: expected one that this coordinator's key signed, found another's, and went on"
                " with the one before; restore it, or stop the services first"
            )
        if signed.contents.serial < now.serial:
            raise ConfigError(
                f"{self._home.roster}: expected serial {now.serial} or a later one, found {signed.contents.serial}, and"
                " went on with the one before; restore the newest: members refuse an older one too"
            )
        self._roster, self._roster_stamp = signed, found

    def _equalise(self, operator: Operator) -> None:
        """Registers who is on the roster and shuts out who is not. Raises ServiceError when the SuperLink is away."""
        found = operator.nodes()
        wanted = nodes.changes(self._roster, found)
        for node in wanted.unregister:
            if operator.unregister(node.number):
                self._tell(REMOVED, f"{node.name} is no longer on the roster: its node is shut out", node.name)
        for card in wanted.register:
            if card.node in self._refused:
                continue
            try:
                operator.register(card.name, nodes.node_key(card))
                self._tell(ENROLLED, f"{card.name} is on the roster: its node may take part", card.name)
            except KeyRemovedError:
                self._refused.add(card.node)
                self._tell(SHUT_OUT, _SHUT_OUT.format(name=card.name), card.name)
        self._set_members(frozenset(nodes.names(self._roster, (node for node in found if node.online)).values()))

    def _set_members(self, here: frozenset[str]) -> None:
        before = self._members
        self._members = {
            name: services.ONLINE
            if name in here
            else services.SHUT_OUT
            if card.node in self._refused
            else services.ENROLLED
            for name, card in self._roster.cards.items()
        }
        for name, word in self._members.items():
            was_here, is_here = before.get(name) == services.ONLINE, word == services.ONLINE
            if is_here and not was_here:
                self._tell(ONLINE, f"{name} is online", name)
            elif was_here and not is_here:
                self._tell(OFFLINE, f"{name} is offline", name)

    def _reach_door(self) -> bool:
        """Whether the door answers as members ask it: tried until it does, and anew after each start."""
        if not self._door_answers.is_set():
            here = {EVERYWHERE: "127.0.0.1", "::": "::1"}.get(self._listen, self._listen)
            try:
                trust = ssl.create_default_context(cadata=authority.authority_pem(self._home))
                with (
                    socket.create_connection((here, self._settings.port), timeout=2) as connection,
                    trust.wrap_socket(connection, server_hostname=self._settings.hosts[0]),
                ):
                    self._door_answers.set()
            except (OSError, SilotuneError):  # of TLS, and of files that cannot be read, too
                return False
        return True

    # --- What others learn --------------------------------------------------------------------------------------------

    def _set_ready(self, ready: bool) -> None:
        if ready and not self._ready:
            self._tell(READY, f"ready: members reach it at {self._settings.address}")
        elif self._ready and not ready:
            self._tell(NOT_READY, "not ready: a service does not answer")
        self._ready = ready

    def _tell(self, kind: str, text: str, name: str = "") -> None:
        with self._telling:
            self._on_event(Event(kind, text, name))

    def _say(self) -> None:
        said = services.Said(self._since, self._ready, self._members)
        if said != self._said:
            services.say(self._home, said)
            self._said = said


_SHUT_OUT = (
    "{name}: expected a new node key, found one that was removed before, which Flower never takes back; {name} makes"
    " another (silotune-client init with another --home) and sends its card; then run: silotune-server remove {name};"
    " silotune-server enroll CARD"
)


def notice(expires: datetime, now: datetime) -> str:
    """What to say of a certificate that ends then: another text each day of its last 30; empty before."""
    left = (expires - now).days
    if left >= _WARN_DAYS:
        return ""
    ends = f"ends {timestamp(expires)}, {f'in {left} days' if left > 0 else 'within a day'}"
    word = ends if left >= 0 else f"ended {timestamp(expires)}, and members refuse it"
    return f"the certificate {word}; run: silotune-server renew"


def _check_certificate(home: ServerHome, settings: Settings) -> None:
    try:
        chain = read_file(home.tls_certificate, _LIMIT)
        authority.check(chain, home.tls_key, authority.authority_pem(home).encode("ascii"), settings.hosts)
    except ConfigError as error:
        raise ConfigError(f"{home.tls_certificate}: {error}; `silotune-server renew` makes or takes another") from None


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Another one whenever the file was changed or replaced."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
