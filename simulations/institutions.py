"""Virtual institutions: the client's own code, with directories of the simulation in place of a hospital's disks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from client.data_sets import RecordFolder
from client.institution import Institution
from client.ledger import Ledger
from client.policy import Policy
from client.secure import SecureMember, Snapshot
from client.training import Trained
from common.adapter import Adapter
from common.config import Config
from common.messages import TIMED_OUT, Hello, Plan, Refused, Reply, Request, TrainRequest
from common.private_files import keep_identity_key, private_directory
from common.secagg.identity import Identity
from simulations.identities import SimulatedIdentities
from simulations.layout import RunDirectory

if TYPE_CHECKING:
    from flwr.app import Context


_SESSION, _VECTOR = "secure_aggregation", "secure_aggregation_vector"


def _not_a_number(trained: Trained, plan: Plan) -> Trained:
    """An update that diverged."""
    factors = {key: np.full_like(factor, np.nan) for key, factor in trained.adapter.factors.items()}
    return replace(trained, adapter=Adapter(factors))


def _raise(trained: Trained, plan: Plan) -> Trained:
    """A program that fails at the worst moment, with something secret in its message."""
    raise RuntimeError(f"the records of patient 4711 broke round {plan.round}")


FAULTS = {"nan": _not_a_number, "raise": _raise}
"""What a fault does to the training of a round."""

SILENT = "silent"


class SilentInstitution(Institution):
    """An institution that is not heard of again in a round, once the keys of secure aggregation are out."""

    def answer(self, request: Request) -> Reply:
        """Trains and announces keys, or introduces itself; to anything else it says only that it is not there."""
        if isinstance(request, Hello | TrainRequest):
            return super().answer(request)
        return Refused(TIMED_OUT, self.name)


def _fault(config: Config, name: str) -> Callable[[Trained, Plan], Trained] | None:
    """What `simulation.faults` says of an institution's training."""
    return FAULTS.get(_faults(config).get(name, ""))


def _faults(config: Config) -> dict[str, str]:
    """Faults by institution."""
    return dict(entry.split(":") for entry in config.simulation.faults)


def virtual(
    config: Config, directory: RunDirectory, name: str, records: Path, identities: SimulatedIdentities | None = None
) -> Institution:
    """The institution of that name in a simulated run, with its folder in `records`.

    Its own log goes to a file in its own home. identities: of all, for secure aggregation; None without it.
    """
    home = directory.institutions / name
    _log_to(home / "client.log", name)
    secure = None
    if identities is not None:
        policy = Policy.of(config, identities.roster())
        secure = SecureMember(identities.identity(name), policy, lambda run: home / run / "marks.json", simulated=True)
    ledger = None
    if config.privacy.private:
        # The same key whenever the run is taken up again.
        place = directory.ledger(name)
        private_directory(place)
        ledger = Ledger(place, Identity(name, keep_identity_key(place / "identity.pem", None)))
        ledger.begin()
    kind = SilentInstitution if _faults(config).get(name) == SILENT else Institution
    return kind(
        name=name,
        data=RecordFolder(records / name),
        home=home,
        model=config.model,
        secure=secure,
        ledger=ledger,
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
    """Finds the institution that a virtual Flower node plays, and keeps its session between messages.

    It travels to an actor with every message, so what is long holds for all and is not in its `config`: `names`.
    """

    config: Config
    names: tuple[str, ...]
    root: Path
    identities: SimulatedIdentities | None = None

    @classmethod
    def of(cls, config: Config, root: Path, identities: SimulatedIdentities | None = None) -> VirtualInstitutions:
        """All institutions of a run in the directory `root`."""
        short = replace(config, data=replace(config.data, institutions=[], train_records=[]))
        # The very tuple that the identities hold: it is then sent once.
        return cls(short, identities.names if identities else config.data.names, root, identities)

    @contextmanager
    def __call__(self, context: Context) -> Iterator[Institution]:
        import torch

        torch.set_num_threads(self.config.simulation.threads)
        name = self.names[int(context.node_config["partition-id"])]
        directory = RunDirectory(self.root)
        institution = virtual(self.config, directory, name, directory.records(self.config), self.identities)
        if institution.secure is None:
            yield institution
            return
        # The next message may find this institution in another process; only the node's own state follows it there.
        institution.secure.restore(session_in(context))
        yield institution
        keep_session(context, institution.secure.snapshot())


def session_in(context: Context) -> Snapshot:
    """What `keep_session` put into a node's state; empty for a node that has none."""
    records = context.state
    if _SESSION not in records.config_records:
        return "", np.zeros(0, np.uint32), np.zeros(0, np.float32)
    arrays = records.array_records[_VECTOR]
    return str(records.config_records[_SESSION]["text"]), arrays["vector"].numpy(), arrays["update"].numpy()


def keep_session(context: Context, session: Snapshot) -> None:
    """Puts a member's session into its node's state, which Flower holds in memory."""
    from flwr.app import Array, ArrayRecord, ConfigRecord

    text, vector, update = session
    context.state[_SESSION] = ConfigRecord({"text": text})
    context.state[_VECTOR] = ArrayRecord({"vector": Array(vector), "update": Array(update)})
