"""The command `silotune-server`: the coordinator's.

Heavy modules are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common import cli
from server import run_commands, service_commands
from server.options import Home

if TYPE_CHECKING:
    from common.enrolment import SignedRoster
    from server.authority import Existing
    from server.home import ServerHome

app = cli.application("Coordinate a federation: enrol its members, keep its services up, run and resume.")

Certificate = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A server certificate from elsewhere (PEM), those that lead to it after it."),
]
Key = Annotated[Path | None, typer.Option(metavar="FILE", help="Its private key (PEM), without a passphrase.")]
Authority = Annotated[Path | None, typer.Option(metavar="FILE", help="The authority (PEM) that members are to trust.")]


@app.command(epilog=cli.EPILOG)
def init(
    host: Annotated[
        list[str],
        typer.Option(
            metavar="NAME_OR_ADDRESS", help="How members reach this machine; repeat it; the first is announced."
        ),
    ],
    port: Annotated[int, typer.Option(help="The members' port.")] = 9443,
    superlink_port: Annotated[int, typer.Option(help="Flower's SuperLink, on loopback.")] = 9092,
    federation: Annotated[str, typer.Option(metavar="NAME", help="The federation's name.")] = "federation",
    certificate: Certificate = None,
    key: Key = None,
    authority: Authority = None,
    home: Home = None,
    passphrase_fd: cli.PassphraseFd = None,
    passphrase_credential: cli.PassphraseCredential = None,
    as_json: cli.Json = False,
) -> None:
    """Make the coordinator's identity, an authority with a certificate for the members' port, and an empty roster."""
    from datetime import UTC, datetime

    from common.private_files import read_passphrase
    from server import enrolment
    from server.home import ServerHome

    where = ServerHome.at(home)
    settings = enrolment.Settings(federation, tuple(host), port, superlink_port)
    secret = read_passphrase(passphrase_fd, passphrase_credential)
    signed = enrolment.init(where, settings, secret, datetime.now(UTC), _existing(certificate, key, authority))
    _show_setup(where, signed, as_json)


@app.command(epilog=cli.EPILOG)
def renew(
    certificate: Certificate = None,
    key: Key = None,
    authority: Authority = None,
    home: Home = None,
    passphrase_fd: cli.PassphraseFd = None,
    passphrase_credential: cli.PassphraseCredential = None,
    as_json: cli.Json = False,
) -> None:
    """Make a new server certificate for the hosts in server.yaml, or take one from elsewhere."""
    from datetime import UTC, datetime

    from common.private_files import read_passphrase
    from server import enrolment
    from server.home import ServerHome

    where = ServerHome.at(home)
    secret = read_passphrase(passphrase_fd, passphrase_credential)
    signed = enrolment.renew(where, secret, datetime.now(UTC), _existing(certificate, key, authority))
    _show_setup(where, signed, as_json)


@app.command(epilog=cli.EPILOG)
def enroll(
    cards: Annotated[list[Path], typer.Argument(metavar="CARD...", help="card.json of each institution to add.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask: the fingerprints have been compared.")] = False,
    home: Home = None,
    passphrase_fd: cli.PassphraseFd = None,
    passphrase_credential: cli.PassphraseCredential = None,
    as_json: cli.Json = False,
) -> None:
    """Add institutions to the roster, once their fingerprints agree; all of them or none."""
    from datetime import UTC, datetime

    from common.enrolment import grouped, read_card
    from common.private_files import read_passphrase
    from server import enrolment
    from server.home import ServerHome

    where = ServerHome.at(home)
    found = [read_card(file) for file in cards]
    enrolment.check_new(enrolment.roster(where), found)
    secret = read_passphrase(passphrase_fd, passphrase_credential)
    with cli.progress_console(as_json) as console:
        for card in found:
            cli.say(console, f"institution  {card.name}", f"fingerprint  {grouped(card.fingerprint)}")
            if not yes:
                cli.confirm(f"Does it agree with what {card.name} told you over another channel?")
        signed = enrolment.enroll(where, found, secret, datetime.now(UTC))
    _show_roster(where, signed, as_json)


@app.command(epilog=cli.EPILOG)
def roster(home: Home = None, as_json: cli.Json = False) -> None:
    """List the members, their fingerprints, and since when they are enrolled."""
    from server import enrolment
    from server.home import ServerHome

    where = ServerHome.at(home)
    _show_roster(where, enrolment.roster(where), as_json)


@app.command(epilog=cli.EPILOG)
def remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The member to take off the roster.")],
    home: Home = None,
    passphrase_fd: cli.PassphraseFd = None,
    passphrase_credential: cli.PassphraseCredential = None,
    as_json: cli.Json = False,
) -> None:
    """Take a member off the roster."""
    from datetime import UTC, datetime

    from common.private_files import read_passphrase
    from server import enrolment
    from server.home import ServerHome

    where = ServerHome.at(home)
    secret = read_passphrase(passphrase_fd, passphrase_credential)
    _show_roster(where, enrolment.remove(where, name, secret, datetime.now(UTC)), as_json)


service_commands.register(app)
run_commands.register(app)


def main() -> None:
    """Entry point of the command."""
    app()


def _existing(certificate: Path | None, key: Path | None, authority: Path | None) -> Existing | None:
    from common.errors import ConfigError
    from server.authority import Existing

    if certificate is None and key is None and authority is None:
        return None
    if certificate is None or key is None or authority is None:
        raise ConfigError(
            "expected --certificate, --key and --authority together, found not all of them; give the rest"
        )
    return Existing(certificate, key, authority)


def _show_setup(home: ServerHome, signed: SignedRoster, as_json: bool) -> None:
    from common.enrolment import (
        certificate_fingerprint,
        grouped,
        key_fingerprint,
        timestamp,
    )
    from server.authority import expiry

    contents, ends = signed.contents, expiry(home)
    told = {
        "federation": contents.federation,
        "address": str(contents.address),
        "coordinator": grouped(key_fingerprint(contents.coordinator)),
        "authority": grouped(certificate_fingerprint(contents.authority)),
        "authority_expires": timestamp(ends.authority),
        "certificate_expires": timestamp(ends.server),
        "serial": contents.serial,
        "roster": str(home.roster),
    }
    with cli.progress_console(as_json) as console:
        cli.say(console, *(f"{key.replace('_', ' '):<20} {value}" for key, value in told.items()))
        cli.say(console, f"Before {timestamp(ends.server)}, run: silotune-server renew")
    if as_json:
        cli.print_json(told)


def _show_roster(home: ServerHome, signed: SignedRoster, as_json: bool) -> None:
    from common.enrolment import grouped

    contents = signed.contents
    members = [
        {"name": member.card.name, "fingerprint": grouped(member.card.fingerprint), "enrolled": member.enrolled}
        for member in contents.members
    ]
    with cli.progress_console(as_json) as console:
        cli.say(
            console,
            f"federation   {contents.federation}, serial {contents.serial}, written {contents.written}",
            f"address      {contents.address}",
            f"fingerprint  {grouped(signed.fingerprint)}",
            f"members      {len(members)}",
        )
        for member in members:
            cli.say(
                console, f"  {member['name']}, enrolled {member['enrolled']}", f"             {member['fingerprint']}"
            )
        cli.say(console, f"Members trust this file: {home.roster}")
    if as_json:
        cli.print_json(
            {
                "federation": contents.federation,
                "serial": contents.serial,
                "address": str(contents.address),
                "fingerprint": grouped(signed.fingerprint),
                "members": members,
                "roster": str(home.roster),
            }
        )
