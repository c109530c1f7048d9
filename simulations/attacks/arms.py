"""The adapters that are attacked, trained by the round code that every run has: alone, together, and together with
differential privacy.

Institutions answer in the attack's own processes. Their vectors are masked only where the noise is in the sum and not
in each of them: the sum is the same bit for bit, and these attacks look at what is published.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

from common.adapter import Adapter
from common.config import COORDINATOR, Config, PrivacyConfig
from common.errors import RunStopped
from common.files import storage_errors
from common.models import load_adapter
from server.coordinator import Observer, coordinate
from simulations.compare import arm_config
from simulations.identities import SimulatedIdentities
from simulations.institutions import virtual
from simulations.layout import RunDirectory
from simulations.members import InProcessMembers
from simulations.processes import process_pool

LOCAL, FEDERATED, PRIVATE = "local-only", "federated", "federated + DP"


@dataclass(frozen=True)
class Job:
    """One adapter to train. key: what the attack calls it. records: a folder an institution and the coordinator's.

    home: its own directory, in which it goes on when it was interrupted.
    """

    key: tuple[str, ...]
    config: Config
    home: Path
    records: Path


def kinds(config: Config) -> tuple[str, ...]:
    """The arms that a configuration has: the private one only where it says how private."""
    return (LOCAL, FEDERATED, PRIVATE) if config.privacy.private else (LOCAL, FEDERATED)


def jobs(config: Config, home: Path, records: Path, arms: Sequence[str], *prefix: str) -> list[Job]:
    """What has to be trained for the arms: one job each, and for local-only one an institution."""
    found: list[Job] = []
    for arm in arms:
        kind = {LOCAL: "local", FEDERATED: "federated", PRIVATE: "private"}[arm]
        if arm == LOCAL:
            plain = without_privacy(config)
            found += [
                Job((*prefix, arm, name), arm_config(plain, name), home / f"{kind}-{name}", records)
                for name in config.data.names
            ]
        else:
            federated = config if arm == PRIVATE else without_privacy(config)
            found.append(Job((*prefix, arm), _federated(federated), home / kind, records))
    return found


def without_privacy(config: Config) -> Config:
    """The same run with no differential privacy."""
    return replace(config, privacy=PrivacyConfig())


def _federated(config: Config) -> Config:
    """The federation as it is configured, without what only its reader needs."""
    return replace(
        config,
        secure_aggregation=replace(config.secure_aggregation, enabled=config.privacy.shared_noise),
        evaluation=replace(config.evaluation, exact=[], institutions=False),
        tracking=replace(config.tracking, tensorboard=False, mlflow="", wandb=""),
        simulation=replace(config.simulation, faults=[]),
    )


def train(job: Job) -> Adapter:
    """Trains one adapter in this process, or goes on with it, and returns what it published.

    Raises RunStopped when its updates are void.
    """
    directory = RunDirectory(job.home)
    names = job.config.data.names
    identities = SimulatedIdentities.fresh(names) if job.config.secure_aggregation.enabled else None
    members = InProcessMembers([virtual(job.config, directory, name, job.records, identities) for name in names])
    validation = job.records / COORDINATOR / "validation.jsonl"
    roster = identities.roster() if identities else None
    coordinate(job.config, directory.root, validation, members, Observer(), roster=roster)
    return load_adapter(directory.root / "adapter")


def _train_apart(job: Job) -> tuple[tuple[str, ...], Adapter]:
    import torch

    torch.set_num_threads(job.config.simulation.threads)
    return job.key, train(job)


def train_all(
    wanted: Sequence[Job], actors: int, on_done: Callable[[tuple[str, ...]], None] = lambda _: None
) -> Mapping[tuple[str, ...], Adapter]:
    """All adapters by key, `actors` processes at a time. Raises RunStopped when one of those dies."""
    found: dict[tuple[str, ...], Adapter] = {}
    for job in wanted:
        with storage_errors(job.home):
            job.home.mkdir(parents=True, exist_ok=True)
    with process_pool(actors) as pool:
        futures: list[Future[tuple[tuple[str, ...], Adapter]]] = [pool.submit(_train_apart, job) for job in wanted]
        try:
            for future in as_completed(futures):
                key, adapter = future.result()
                found[key] = adapter
                on_done(key)
        except BrokenProcessPool as error:
            raise RunStopped("a process that trained died; the same command with the same --out goes on") from error
    return found
