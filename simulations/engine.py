"""Flower's simulation engine. Everything that is particular to it, and nothing else, is here."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from client.app import build_client_app
from client.institution import Institution
from common.config import Config
from server.app import build_server_app
from server.flower import FlowerMembers
from simulations.identities import SimulatedIdentities
from simulations.institutions import VirtualInstitutions
from simulations.layout import RunDirectory

if TYPE_CHECKING:
    from flwr.app import Context

# Messages under way for each actor. Flower looks for new ones ten times a second, so some must lie ready; and it goes
# through all that are under way once for each node, so more would be slower (simulations/benchmarks/README.md).
_WAVE = 4

# Warnings of Ray and tokenizers that say nothing of use here; actors inherit these.
_SILENCE = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "TOKENIZERS_PARALLELISM": "false"}


def simulate(
    config: Config,
    directory: RunDirectory,
    coordinate: Callable[[FlowerMembers], None],
    institution_of: Callable[[Context], AbstractContextManager[Institution]] | None = None,
    identities: SimulatedIdentities | None = None,
) -> None:
    """Plays every institution of `config` as a virtual Flower client and hands them to `coordinate`.

    `simulation.actors` processes share the work; each loads the base model once. What `coordinate` raises is raised
    here. The first Ctrl-C ends the run cleanly (KeyboardInterrupt), a second one at once. institution_of: who a virtual
    client is, if not simply the institution itself. identities: of all, for secure aggregation.
    """
    os.environ.update(_SILENCE)
    from flwr.simulation import run_simulation

    # Flower announces at length that the simulation's Python API will move; errors still come through.
    logging.getLogger("flwr").setLevel(logging.ERROR)
    stop = threading.Event()
    failure: list[BaseException] = []

    def guarded(members: FlowerMembers) -> None:
        try:
            coordinate(members)
        except BaseException as error:
            failure.append(error)

    threads = config.simulation.threads
    with _first_interrupt_sets(stop):
        run_simulation(
            server_app=build_server_app(guarded, stop, wave=_WAVE * config.simulation.actors),
            client_app=build_client_app(institution_of or VirtualInstitutions.of(config, directory.root, identities)),
            num_supernodes=len(config.data.names),
            backend_config={
                "client_resources": {"num_cpus": threads, "num_gpus": _gpu_share(config)},
                "init_args": {
                    "num_cpus": config.simulation.actors * threads,
                    "include_dashboard": False,
                    "log_to_driver": False,
                },
            },
        )
    if stop.is_set():
        raise KeyboardInterrupt
    if failure:
        raise failure[0]


def _gpu_share(config: Config) -> float:
    """The share of one GPU that each actor has, such that all actors find a place: Ray gives nobody parts of two."""
    import torch

    there = 0 if config.model.device == "cpu" else torch.cuda.device_count()
    return 1.0 / math.ceil(config.simulation.actors / there) if there else 0.0


@contextmanager
def _first_interrupt_sets(stop: threading.Event) -> Iterator[None]:
    """Flower's main thread only waits, so an interrupt is passed on to the thread that runs the rounds."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
