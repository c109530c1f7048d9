"""What the commands of every chained log share: verify it, and write it into one file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common import cli

if TYPE_CHECKING:
    from client.chain import E, Form
    from client.chain_audit import Copy

_SAID = "nothing left for it"

PublicKey = Annotated[
    str | None,
    typer.Option(metavar="HEX", help="The institution's public key, as its card has it; else the home's own card."),
]


def verify(copy: Copy[E], place: Path, public_key: str | None, card: Path, as_json: bool) -> None:
    """Checks every entry, the chain and the end of a log, and shows what was found. place: where the log lies.

    Raises StorageError that names the first entry that is not as it was written, ConfigError where no key is to be had.
    """
    from client import chain_audit
    from common.errors import StorageError

    key, source = _key(public_key, copy, card)
    verdict = chain_audit.verify(copy, key)
    finding = verdict.finding
    with cli.progress_console(as_json) as console:
        cli.say(console, f"verified against {key.hex()}, {source}")
        if finding is None:
            cli.say(console, f"{verdict.entries} entries, all as they were written; the last is {verdict.last}")
        if finding is None and verdict.ahead:
            cli.say(
                console, f"the head does not know the last entry yet: it is being written, or a crash came; {_SAID}"
            )
        if finding is None and verdict.cut_off:
            cli.say(
                console, f"{verdict.cut_off} bytes more are of an entry that is being written or was cut off; {_SAID}"
            )
    if as_json:
        told = None
        if finding is not None:
            told = {"kind": finding.kind, "entry": finding.number, "where": finding.where, "said": finding.said}
        cli.print_json(
            {
                "whole": finding is None,
                "entries": verdict.entries,
                "last": verdict.last,
                "public_key": key.hex(),
                "key_from": source,
                "ahead": verdict.ahead,
                "cut_off_bytes": verdict.cut_off,
                "finding": told,
            }
        )
    if finding is not None:
        if not verdict.entries and copy.head is not None and copy.head.public != key.hex():
            raise StorageError(f"{place}: expected a log signed with {key.hex()}, found one with {copy.head.public}")
        before = f"the {verdict.entries} entries before are whole" if verdict.entries else "no entry before is there"
        raise StorageError(f"{place}: {finding}; {before}")


def export(form: Form[Any], directory: Path, file: Path, as_json: bool) -> None:
    """Writes a log into one file. Raises what `chain_audit.export` raises."""
    from client import chain_audit

    count = chain_audit.export(form, directory, file)
    with cli.progress_console(as_json) as console:
        cli.say(console, f"{count} entries in {file}")
    if as_json:
        cli.print_json({"entries": count, "file": str(file)})


def _key(public_key: str | None, copy: Copy[Any], card: Path) -> tuple[bytes, str]:
    """The key to verify against, and where it is from. Raises ConfigError when there is none to be had."""
    from common.enrolment import hexadecimal, read_card
    from common.errors import ConfigError
    from common.secagg.identity import PUBLIC_BYTES

    if public_key is not None:
        return hexadecimal(public_key.strip().lower(), PUBLIC_BYTES, "--public-key"), "the key that was given"
    if card.is_file():
        return read_card(card).identity, f"the key on {card}; give --public-key for another institution's log"
    if copy.head is None:
        raise ConfigError("expected the institution's public key, found none to go by; give --public-key")
    said = "the key that the log itself names, which proves nothing by itself: compare it with the institution's card"
    return bytes.fromhex(copy.head.public), said
