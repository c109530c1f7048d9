"""Virtual institutions: the client's own code, with directories of the simulation in place of a hospital's disks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from client.institution import Institution
from client.training import Trained
from common.adapter import Adapter
from common.config import Config
from common.messages import Plan
from simulations.layout import RunDirectory

if TYPE_CHECKING:
    from flwr.app import Context


def _not_a_number(trained: Trained, plan: Plan) -> Trained:
    """An update that diverged."""
    factors = {key: np.full_like(factor, np.nan) for key, factor in trained.adapter.factors.items()}
    return replace(trained, adapter=Adapter(factors))


def _raise(trained: Trained, plan: Plan) -> Trained:
    """A program that fails at the worst moment, with something secret in its message."""
    raise RuntimeError(f"the records of patient 4711 broke round {plan.round}")


FAULTS = {"nan": _not_a_number, "raise": _raise}


def _fault(config: Config, name: str) -> Callable[[Trained, Plan], Trained] | None:
    """What `simulation.faults` says of an institution."""
    found = dict(entry.split(":") for entry in config.simulation.faults)
    return FAULTS[found[name]] if name in found else None


def virtual(config: Config, directory: RunDirectory, name: str, records: Path) -> Institution:
    """The institution of that name in a simulated run, with its folder in `records`.

    Its own log goes to a file in its own home.
    """
    home = directory.institutions / name
    _log_to(home / "client.log", name)
    return Institution(
        name=name,
        data=records / name,
        home=home,
        model=config.model,
        spoil=_fault(config, name),
    )


class _LogFile(logging.FileHandler):
    """Opens its file for a line and closes it: a process may play more institutions than it may have files open."""

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        self.close()


def _log_to(file: Path, name: str) -> None:
    logger = logging.getLogger(f"silotune.client.{name}")
    if not any(getattr(handler, "baseFilename", None) == str(file) for handler in logger.handlers):
        logger.handlers.clear()
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(file, delay=True)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


@dataclass(frozen=True)
class VirtualInstitutions:
    """Finds the institution that a virtual Flower node plays.

    It travels to an actor with every message, so what is long holds for all and is not in its `config`: `names`.
    """

    config: Config
    names: tuple[str, ...]
    root: Path

    @classmethod
    def of(cls, config: Config, root: Path) -> VirtualInstitutions:
        """All institutions of a run in the directory `root`."""
        short = replace(config, data=replace(config.data, institutions=[], train_records=[]))
        return cls(short, config.data.names, root)

    def __call__(self, context: Context) -> Institution:
        import torch

        torch.set_num_threads(self.config.simulation.threads)
        name = self.names[int(context.node_config["partition-id"])]
        directory = RunDirectory(self.root)
        return virtual(self.config, directory, name, directory.records(self.config))
