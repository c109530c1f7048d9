"""The daemon and what people tell it: `silotune-client up`, status, pause, resume, runs, leave, report, approve."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client.options import Home
from common import cli

if TYPE_CHECKING:
    from rich.console import Console

    from client.control import Waiting
    from client.status import Status

Run = Annotated[str, typer.Argument(metavar="RUN", help="The run's name, as `silotune-client runs` shows it.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    for command in (up, status, pause, resume, runs, leave, report, approve):
        app.command(epilog=cli.EPILOG)(command)


def up(
    home: Home = None,
    passphrase_fd: cli.PassphraseFd = None,
    passphrase_credential: cli.PassphraseCredential = None,
    as_json: cli.Json = False,
) -> None:
    """Run the daemon: stay connected, answer what the policy allows, train. Ends on SIGTERM or Ctrl-C within seconds.

    What crashes is started again, later each time; what only a person can mend ends the command and is told.

    Changes of policy.yaml, data.yaml or the trusted roster take effect at once: the connection begins anew with them,
    and an update under way is lost, as if this institution had dropped out of that attempt. To change them without
    that, `pause`, wait until `status` shows no attempt under way, change, and `resume`. A change that cannot be read is
    told, and the former state stays. `pause`, `resume`, `approve` and `leave` take effect with the coordinator's next
    message. Other keys, another passphrase or another release of Silotune need the command to be started again.
    """
    from datetime import UTC, datetime

    from client import daemon
    from client.keys import own_home
    from common.enrolment import timestamp
    from common.private_files import read_passphrase

    where = own_home(home)
    passphrase = read_passphrase(passphrase_fd, passphrase_credential)
    with cli.progress_console(as_json) as console, daemon.alone(where), _noted() as signals:
        checked = daemon.check(where, passphrase)
        begun = datetime.now(UTC)
        cli.say(
            console,
            f"institution  {checked.institution}, in {checked.federation} at {checked.address}",
            f"data sets    {', '.join(checked.data_sets) or 'none'}",
            f"egress log   {checked.entries} entries",
            f"log          {where.log}",
            *(f"warning      {line}" for line in checked.warnings),
        )

        def tell(text: str) -> None:
            cli.say(console, f"{timestamp(datetime.now(UTC))} {text}")

        code = daemon.keep_running(where, passphrase, lambda: bool(signals), tell)
        if code is not None:
            tell(f"ended, since only a person can mend what the worker found; see {where.log}")
            raise typer.Exit(code)
        said = signal.Signals(signals[0]).name
        tell(f"ended by {said}")
    if as_json:
        seconds = (datetime.now(UTC) - begun).total_seconds()
        cli.print_json({"institution": checked.institution, "ended_by": said, "seconds": round(seconds, 3)})


def status(home: Home = None, as_json: cli.Json = False) -> None:
    """Show whether the daemon runs and is connected, what it is doing, and which runs wait for approval."""
    from client import daemon
    from client.control import Control
    from client.egress import own_copy
    from client.home import ClientHome
    from client.keys import card

    where = ClientHome.at(home)
    institution = card(where).name
    control = Control(where.control)
    running, paused, waiting = daemon.is_running(where), control.paused(), control.waiting()
    found = control.read_status()
    log = own_copy(where.egress)
    entries = 0 if log is None or log.head is None else log.head.count
    with cli.progress_console(as_json) as console:
        cli.say(
            console,
            f"institution  {institution}",
            f"daemon       {'runs' if running else 'does not run; start it with `silotune-client up`'}",
            *(_told(found) if running and found is not None else ()),
            f"paused       {'yes: no run and no round is taken up' if paused else 'no'}",
            f"waiting      {', '.join(waiting) or 'no run'}{' for `silotune-client approve RUN`' if waiting else ''}",
            f"egress log   {entries} entries",
        )
    if as_json:
        from dataclasses import asdict

        cli.print_json(
            {
                "institution": institution,
                "running": running,
                "paused": paused,
                "waiting": list(waiting),
                "egress_entries": entries,
                "last": None if found is None else asdict(found),
            }
        )


def pause(home: Home = None, as_json: cli.Json = False) -> None:
    """Take up no run and no round until `resume`; an attempt under way is finished."""
    _set_paused(home, as_json, paused=True)


def resume(home: Home = None, as_json: cli.Json = False) -> None:
    """End a pause."""
    _set_paused(home, as_json, paused=False)


def runs(home: Home = None, as_json: cli.Json = False) -> None:
    """List the runs that are known here: waiting, approved, in progress, complete or left, and how far each came."""
    from dataclasses import asdict

    from client.keys import own_home
    from client.run_history import known

    found = known(own_home(home))
    with cli.progress_console(as_json) as console:
        if not as_json:
            rows = [
                (
                    one.name,
                    one.state.replace("_", " "),
                    f"{one.rounds}" if one.of is None else f"{one.rounds} of {one.of}",
                    "received" if one.adapter else "",
                )
                for one in found
            ]
            _print_table("runs", ("run", "state", "rounds", "adapter"), rows, console)
    if as_json:
        cli.print_json({"runs": [_plain(asdict(one)) for one in found]})


def leave(run: Run, yes: Yes = False, home: Home = None, as_json: cli.Json = False) -> None:
    """Leave a run for good: every message of it is refused from now on, also in a round under way."""
    from client.control import Control, check_run
    from client.keys import own_home
    from client.run_history import known

    where = own_home(home)
    control = Control(where.control)
    check_run(run)
    is_known = run in {one.name for one in known(where)}
    with cli.progress_console(as_json) as console:
        if not control.has_left(run):
            if not is_known:
                cli.say(console, f"no run {run} is known here yet")
            if not yes:
                cli.confirm(f"Leave run {run} for good? Updates that are in its sums already stay there.")
            control.leave(run)
        cli.say(console, f"left         {run}, since {control.left()[run]}")
    if as_json:
        cli.print_json({"run": run, "left_since": control.left()[run], "known": is_known})


def report(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="The run's name; else the one that was trained in last.")
    ] = None,
    home: Home = None,
    as_json: cli.Json = False,
) -> None:
    """Show this institution's own numbers of a run, round by round. They are in no message, and stay here."""
    from dataclasses import asdict

    from client import run_history
    from client.keys import own_home

    where = own_home(home)
    found = run_history.report(where, run)
    one = next(one for one in run_history.known(where) if one.name == found.run)
    with cli.progress_console(as_json) as console:
        if not as_json:
            rows = [
                (
                    str(line.round),
                    str(line.steps),
                    "" if line.train_loss is None else f"{line.train_loss:.4f}",
                    "" if line.validation_perplexity is None else f"{line.validation_perplexity:.3f}",
                    ", ".join([*(["void"] if line.void else []), *([f"{line.times} times"] if line.times > 1 else [])]),
                )
                for line in found.rounds
            ]
            columns = ("round", "steps", "train loss", "own validation perplexity", "note")
            _print_table(found.run, columns, rows, console)
            cli.say(console, "Perplexity is of the adapter that a round began with, on records held out here.")
            if any(line.void for line in found.rounds):
                cli.say(console, "void: the numbers were not finite, and zeros left instead; see the log")
            if found.unreadable:
                cli.say(console, f"{found.unreadable} lines cannot be read")
        if one.adapter:
            cli.say(console, f"The published adapter is here: silotune-client adapter evaluate {found.run}")
    if as_json:
        cli.print_json({**_plain(asdict(found)), "state": one.state, "of": one.of, "adapter": one.adapter})


def approve(
    run: Run,
    digest: Annotated[
        str | None,
        typer.Option(metavar="HEX", help="Do not ask: approve if this is the digest of what the run asks for."),
    ] = None,
    yes: Yes = False,
    home: Home = None,
    as_json: cli.Json = False,
) -> None:
    """Show what a waiting run asks for, and let it pass: these settings and no others, under this name."""
    from client.control import Control, check_run
    from client.keys import own_home
    from common.errors import ConfigError

    control = Control(own_home(home).control)
    found = control.waiting().get(check_run(run))
    approved = control.approvals().get(run)
    if found is None and (approved is None or digest not in (None, approved)):
        waiting = ", ".join(control.waiting()) or "none"
        raise ConfigError(f"expected a run that waits for approval, found {run}; there are: {waiting}")
    with cli.progress_console(as_json) as console:
        if found is None:
            cli.say(console, f"approved     {run} already")
        else:
            cli.say(console, f"run          {run}, waiting since {found.since}", *_asked(found))
            if digest is not None and digest.strip().lower() != found.digest:
                raise ConfigError(
                    f"--digest: expected {found.digest}, which is what run {run} asks for now, found {digest!r:.80};"
                    " look at the terms above before you approve them"
                )
            if digest is None and not yes:
                cli.confirm("Does this institution agree to all of it?")
            control.approve(run, found.digest)
            cli.say(console, f"approved     {run}")
    if as_json:
        terms = {} if found is None else dict(found.terms)
        cli.print_json({"run": run, "digest": approved if found is None else found.digest, "terms": terms})


@contextmanager
def _noted() -> Iterator[list[int]]:
    """The signals that ask for an end, in the order in which they come; they are only noted."""
    came: list[int] = []
    wanted = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, lambda found, _: came.append(found)) for number in wanted}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _set_paused(home: Path | None, as_json: bool, paused: bool) -> None:
    from client.control import Control
    from client.keys import own_home

    control = Control(own_home(home).control)
    changed = control.paused() != paused
    if changed:
        control.pause() if paused else control.unpause()
    with cli.progress_console(as_json) as console:
        said = "paused: no run and no round is taken up until `silotune-client resume`" if paused else "not paused"
        cli.say(console, said + ("" if changed else ", as before"))
    if as_json:
        cli.print_json({"paused": paused, "changed": changed})


def _told(found: Status) -> Sequence[str]:
    """The lines of a daemon that runs."""
    place = f"run {found.run}" + (f", round {found.round}" if found.round else "") if found.run else ""
    doing = found.doing if found.doing_since == "" else f"{found.doing} since {found.doing_since}"
    return (
        f"connection   {found.connection.replace('_', ' ')} since {found.since}, {found.coordinator}"
        + (f": {found.about}" if found.about else ""),
        f"doing        {doing}" + (f", {place}" if place else ""),
        f"attempt      {f'{found.attempt} under way' if found.in_attempt else 'none under way'}",
        f"messages     {found.answered} answered, {found.refused} of them refused, {found.lost} lost",
        f"worker       process {found.worker} since {found.started}, {found.restarts} restarts",
        *([f"trouble      {found.trouble_since} {found.trouble}"] if found.trouble else []),
    )


def _asked(found: Waiting) -> Sequence[str]:
    """What a run asks for. It comes from outside, so nothing of it may mean anything to a terminal."""
    import json

    lines = [f"{name.replace('_', ' '):<22}{json.dumps(value)}" for name, value in found.terms.items()]
    return (*("  " + ascii(line)[1:-1] for line in lines), f"digest       {found.digest}")


def _plain(found: Mapping[str, Any]) -> dict[str, Any]:
    """With JSON's kinds only."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
