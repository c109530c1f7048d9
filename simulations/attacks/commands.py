"""`silotune-sim attack`: tries to learn from a run what it should not tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common import cli
from simulations.arguments import ConfigName, Overrides, load, new_directory, resumable

if TYPE_CHECKING:
    from simulations.attacks.arms import Ground
    from simulations.attacks.result import Result, Told

attack = typer.Typer(
    no_args_is_help=True,
    help="Try to learn from a run what it should not tell. Results stand in DIR/attacks, and in the run's report.",
)

Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="The directory of a run of this configuration, whose adapters are then attacked, or a new one;"
        " runs/NAME-attack-TIME when left out. An attack that was interrupted goes on there.",
    ),
]


@attack.command(epilog=cli.EPILOG)
def canary(
    config: ConfigName,
    overrides: Overrides = None,
    out: Out = None,
    canaries: Annotated[int, typer.Option(min=20, help="Units that are in by a fair coin each.")] = 400,
    trials: Annotated[int, typer.Option(min=8, help="Single steps with a canary, and as many without.")] = 300,
    as_json: cli.Json = False,
) -> None:
    """Which epsilon does one run with many canaries prove, with noise and without? Is a step's noise what it claims?

    Of one institution's private training; patients at epsilon 1, where the configuration has no privacy of its own.
    """

    def found(ground: Ground, tell: Told) -> Result:
        from simulations.attacks.canary import attack as audit

        return audit(ground, tell, canaries, trials)

    _attack("canary", found, config, overrides, out, as_json)


@attack.command(epilog=cli.EPILOG)
def membership(config: ConfigName, overrides: Overrides = None, out: Out = None, as_json: cli.Json = False) -> None:
    """Was this record trained on? Asked of the published adapter: trained alone, federated, federated with privacy."""

    def found(ground: Ground, tell: Told) -> Result:
        from simulations.attacks.membership import attack as infer

        return infer(ground, tell)

    _attack("membership", found, config, overrides, out, as_json)


@attack.command(epilog=cli.EPILOG)
def coordinator(config: ConfigName, overrides: Overrides = None, out: Out = None, as_json: cli.Json = False) -> None:
    """What do a member's records hold most of? From its update, its masked vector, sums, and differences of sums."""

    def found(ground: Ground, tell: Told) -> Result:
        from simulations.attacks.coordinator import attack as look

        return look(ground, tell)

    _attack("coordinator", found, config, overrides, out, as_json)


@attack.command(epilog=cli.EPILOG)
def extraction(config: ConfigName, overrides: Overrides = None, out: Out = None, as_json: cli.Json = False) -> None:
    """Does the adapter say made-up numbers that were planted among one institution's records?"""

    def found(ground: Ground, tell: Told) -> Result:
        from simulations.attacks.extraction import attack as ask

        return ask(ground, tell)

    _attack("extraction", found, config, overrides, out, as_json)


def _attack(
    name: str,
    found: Callable[[Ground, Told], Result],
    config: str,
    overrides: list[str] | None,
    out: Path | None,
    as_json: bool,
) -> None:
    loaded = load(config, overrides)
    directory = out or new_directory(f"{loaded.name}-attack")
    again = ("attack", name, config, *(overrides or ()), "--out", str(directory))
    with cli.progress_console(as_json) as console, resumable(directory, *again):
        import torch

        from server import report
        from simulations.attacks.arms import open_ground

        torch.set_num_threads(loaded.simulation.threads)
        ground = open_ground(loaded, directory)
        result = found(ground, lambda line: cli.say(console, line))
        result.write(ground.directory)
        if ground.finished:
            report.write(ground.directory.root)
        console.print(result.table())
        cli.say(console, f"written to {ground.directory.attack(name)}{', and the report' if ground.finished else ''}")
    if as_json:
        cli.print_json(result.as_dict())
