"""The commands for runs: start one and follow it, look at it from elsewhere, end it, go on with it, tidy up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common import cli
from server.options import Home

if TYPE_CHECKING:
    from rich.console import Console

    from common.secagg.identity import Identity
    from server.home import ServerHome
    from server.runs import Run, Status

Name = Annotated[str, typer.Argument(metavar="RUN", help="A run, as `silotune-server list` names it.")]
Detach = Annotated[bool, typer.Option("--detach", help="Drive it in the background, and return once it is begun.")]


def register(app: typer.Typer) -> None:
    """Adds these commands to the application."""
    for command in (run, resume, status, stop, logs, report, prune):
        app.command(epilog=cli.EPILOG)(command)
    app.command("list", epilog=cli.EPILOG)(list_runs)


def run(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or a shipped configuration's name.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Other values, such as train.batch_size=8.")
    ] = None,
    detach: Detach = False,
    home: Home = None,
    passphrase_fd: cli.PassphraseFd = None,
    passphrase_credential: cli.PassphraseCredential = None,
    as_json: cli.Json = False,
) -> None:
    """Run a federation over the services that `up` keeps running, and follow it to its end.

    Ctrl-C ends it between two messages; complete rounds are kept, and `resume` goes on with it.
    """
    from common import config_files
    from common.privacy.promise import promise_of
    from common.private_files import read_passphrase
    from server import driver, enrolment, records
    from server.home import ServerHome

    where = ServerHome.at(home)
    loaded = config_files.load(config, overrides or ())
    promise_of(loaded)  # what no noise reaches is refused before there is a run
    secret = read_passphrase(passphrase_fd, passphrase_credential)
    signer = enrolment.identity(where, secret)
    with cli.progress_console(as_json) as console:
        driver.superlink(where)
        begun = driver.prepare(where, loaded)
        if unused := records.unused(loaded):
            cli.say(console, f"for simulations only, and not used here: {', '.join(unused)}")
        found = _drive(where, begun, signer, secret, detach, console)
    if as_json:
        cli.print_json(found)


def resume(
    name: Name,
    detach: Detach = False,
    home: Home = None,
    passphrase_fd: cli.PassphraseFd = None,
    passphrase_credential: cli.PassphraseCredential = None,
    as_json: cli.Json = False,
) -> None:
    """Go on with a run from its last complete round, as it was configured.

    A run that is complete hands its adapter to the members whom it did not reach.
    """
    from common.private_files import read_passphrase
    from server import driver, enrolment, runs
    from server.home import ServerHome

    where = ServerHome.at(home)
    found = runs.find(where.runs, name)
    secret = read_passphrase(passphrase_fd, passphrase_credential)
    signer = enrolment.identity(where, secret)
    with cli.progress_console(as_json) as console:
        driver.superlink(where)
        result = _drive(where, found, signer, secret, detach, console)
    if as_json:
        cli.print_json(result)


def status(
    name: Annotated[str | None, typer.Argument(metavar="[RUN]", help="One run, in detail.")] = None,
    home: Home = None,
    as_json: cli.Json = False,
) -> None:
    """Show the services, who is connected, and the runs under way; or how one run stands."""
    from server import runs
    from server.home import ServerHome

    where = ServerHome.at(home)
    if name is None:
        _show_services(where, as_json)
        return
    found = runs.find(where.runs, name)
    stands = runs.read_status(found)
    with cli.progress_console(as_json) as console:
        _show_status(console, found, stands)
    if as_json:
        cli.print_json(_described(found, stands))


def list_runs(home: Home = None, as_json: cli.Json = False) -> None:
    """List all runs: which state, how many rounds, and the best perplexity on the coordinator's validation records."""
    from rich.table import Table

    from server import enrolment, runs
    from server.home import ServerHome
    from server.verdict import perplexity_text

    where = ServerHome.at(home)
    enrolment.require_coordinator(where)
    found = [(each, _stands(each)) for each in runs.all_runs(where.runs)]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("run", "state", "rounds", "perplexity", "started"):
        table.add_column(column, overflow="fold")
    for each, stands in found:
        best = "–" if stands.perplexity is None else perplexity_text(stands.perplexity)
        table.add_row(each.name, stands.state, f"{stands.round} of {stands.rounds}", best, stands.started)
    with cli.progress_console(as_json) as console:
        if found:
            console.print(table, highlight=False)
        else:
            cli.say(console, f"no runs yet in {where.runs}; start one: silotune-server run CONFIG")
    if as_json:
        cli.print_json({"runs": [_described(each, stands) for each, stands in found]})


def stop(
    name: Name,
    wait: Annotated[float, typer.Option(min=1, help="Seconds to wait for its end before asking again.")] = 60.0,
    home: Home = None,
    as_json: cli.Json = False,
) -> None:
    """End a run; its complete rounds are kept, and `resume` goes on with it."""
    from server import runs, stopping
    from server.home import ServerHome

    where = ServerHome.at(home)
    found = runs.find(where.runs, name)
    was = runs.read_status(found).state
    with cli.progress_console(as_json) as console:
        stands = stopping.stop(where, found, wait)
        if was != runs.RUNNING:
            cli.say(console, f"{found.name} was not running")
        _show_status(console, found, stands)
    if as_json:
        cli.print_json(_described(found, stands))


def logs(
    name: Name,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    home: Home = None,
    as_json: cli.Json = False,
) -> None:
    """Print what a run has to say."""
    from server import runs
    from server.home import ServerHome

    found = runs.find(ServerHome.at(home).runs, name)
    lines = []
    with cli.progress_console(as_json) as console:
        for line in runs.lines(found, follow):
            cli.say(console, line)
            lines.append(line)
    if as_json:
        cli.print_json({"run": found.name, "log": lines})


def report(
    which: Annotated[str, typer.Argument(metavar="RUN|DIR", help="A run, or the directory of a finished simulation.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the page goes; report.html of the run when left out.")
    ] = None,
    home: Home = None,
    as_json: cli.Json = False,
) -> None:
    """Write the report of a finished run again, and print its tables."""
    from server import runs
    from server.home import ServerHome
    from server.report import tables, write

    known = runs.Run(ServerHome.at(home).runs / which) if runs.is_name(which) else None
    directory = known.root if known is not None and known.config.is_file() else Path(which)
    if not directory.is_dir():
        runs.find(ServerHome.at(home).runs, which, or_else=" or the directory of a finished simulation")
    page = out or directory / "report.html"
    summary = write(directory, page)
    with cli.progress_console(as_json) as console:
        console.print(tables(summary))
        console.print(f"written to {page}", markup=False, highlight=False)
    if as_json:
        cli.print_json({"report": str(page), "summary": summary})


def prune(
    older_than: Annotated[float, typer.Option(min=0, metavar="DAYS", help="Only runs that ended so long ago.")] = 0.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
    home: Home = None,
    as_json: cli.Json = False,
) -> None:
    """Remove checkpoints of complete runs and, while the services are down, the messages in Flower's database.

    Adapters, reports, metrics and logs stay. A run whose adapter a member has not got yet keeps its checkpoints.
    """
    from datetime import UTC, datetime, timedelta

    from server import prune as pruning
    from server.home import ServerHome
    from server.verdict import bytes_text

    where = ServerHome.at(home)
    planned = pruning.plan(where, timedelta(days=older_than), datetime.now(UTC))
    if not dry_run:
        pruning.carry_out(where, planned)
    done = "would be removed" if dry_run else "removed"
    with cli.progress_console(as_json) as console:
        cli.say(console, *(f"checkpoints of {found.name}: {done}" for found in planned.checkpoints))
        cli.say(console, *(f"{file}: {done}" for file in planned.database))
        cli.say(console, *(f"{name}: kept, {why}" for name, why in planned.kept.items()))
        cli.say(console, f"{bytes_text(planned.size)} {done}")
    if as_json:
        cli.print_json(
            {
                "dry_run": dry_run,
                "checkpoints": [found.name for found in planned.checkpoints],
                "database": [str(file) for file in planned.database],
                "kept": dict(planned.kept),
                "bytes": planned.size,
            }
        )


# --- What several commands do ----------------------------------------------------------------------------------------


def _drive(
    home: ServerHome,
    run: Run,
    signer: Identity,
    secret: bytes | None,
    detach: bool,
    console: Console,
) -> dict[str, Any]:
    """Begins a run, or goes on with it, here or in the background; what `--json` prints of it."""
    from common import config_files
    from common.errors import RunStopped, Unwritable
    from server import detached, driver, live, report, terms

    config = config_files.load(str(run.config))
    cli.say(
        console,
        f"{run.name}: {len(config.data.names)} institutions, {config.federation.rounds} rounds of"
        f" {config.federation.method} on {config.data.name}, base model {config.model.path}; results in {run.root}",
    )
    for line in terms.launch_lines(config):
        console.print(line, soft_wrap=True)
    if detach:
        pid = detached.start(home, run, secret)
        cli.say(console, f"driven by process {pid}; follow it: silotune-server logs {run.name} --follow")
        return {"run": run.name, "directory": str(run.root), "pid": pid}
    with driver.interruptible() as interruption, live.Screen(console) as screen:
        audience = driver.Audience(tell=screen.line, show=screen.show)
        try:
            found = driver.conduct(home, run, signer, interruption.stop, audience)
        except (RunStopped, Unwritable, KeyboardInterrupt) as error:
            remedy = f"complete rounds are kept, go on with: silotune-server resume {run.name}"
            if isinstance(error, Unwritable):
                raise Unwritable(f"{error}\n{remedy}") from error
            if interruption.asked.is_set():
                raise cli.Interrupted(f"stopped; {remedy}") from None
            raise
    console.print(report.tables(found))
    cli.say(console, f"adapter: {run.adapter}", f"report: {run.report}")
    return {"run": run.name, **found}


def _stands(run: Run) -> Status:
    """How a run stands; one whose status is damaged must not hide the others."""
    from common.errors import StorageError
    from server import runs

    try:
        return runs.read_status(run)
    except StorageError as error:
        return runs.Status(runs.FAILED, started=runs.started(run), why=str(error))


def _described(run: Run, stands: Status) -> dict[str, Any]:
    return {"run": run.name, "directory": str(run.root), **stands.to_json()}


def _show_status(console: Console, run: Run, stands: Status) -> None:
    from datetime import UTC, datetime

    from server import live, runs

    began = f", driven by process {stands.pid}" if stands.state == runs.RUNNING else ""
    cli.say(console, f"{run.name}, started {stands.started}{began}")
    console.print(live.told(stands, datetime.now(UTC)), highlight=False, soft_wrap=True)
    if stands.state in (runs.STOPPED, runs.FAILED):
        cli.say(console, f"  go on        silotune-server resume {run.name}")
    files = [run.adapter, run.report] if stands.state == runs.COMPLETE else [run.log]
    cli.say(console, *(f"  {file.name:<12} {file}" for file in files if file.exists()))


def _show_services(home: ServerHome, as_json: bool) -> None:
    from server import runs, services

    found = services.state(home)
    under_way = [(run, stands) for run in runs.all_runs(home.runs) if (stands := _stands(run)).state == runs.RUNNING]
    word = "ready" if found.ready else "starting" if found.running else "not running; start them: silotune-server up"
    with cli.progress_console(as_json) as console:
        cli.say(console, f"services     {word}{f', since {found.since}' if found.since else ''}")
        cli.say(console, f"certificate  ends {found.certificate_expires}")
        cli.say(console, *(f"member       {name}: {said}" for name, said in sorted(found.members.items())))
        for run, stands in under_way:
            _show_status(console, run, stands)
        if not under_way:
            cli.say(console, "no run is under way")
    if as_json:
        cli.print_json(
            {
                "services": {
                    "running": found.running,
                    "ready": found.ready,
                    "since": found.since,
                    "certificate_expires": found.certificate_expires,
                    "members": dict(found.members),
                },
                "runs": [_described(run, stands) for run, stands in under_way],
            }
        )
