"""The adapters that are attacked: what institutions train alone, together, and together under differential privacy.

They are trained by the round code of every run, in the attack's own processes. Updates are masked only where the noise
is in their sum: the sum is the same bit for bit, and it is the published adapter that is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

from common import config_files
from common.adapter import Adapter, is_b
from common.config import COORDINATOR, Config, PrivacyConfig, TrackingConfig
from common.errors import ConfigError, RunStopped
from common.files import storage_errors, write_text
from common.methods import method_named
from common.models import load_adapter
from common.privacy.accounting import Event, epsilon
from common.privacy.mechanism import round_event
from server.terms import terms_of
from simulations import prepare
from simulations.attacks.result import Told
from simulations.compare import arm_config
from simulations.federate import federate
from simulations.layout import RunDirectory
from simulations.processes import process_pool

BASE, LOCAL, FEDERATED, PRIVATE = "base", "local-only", "federated", "federated + DP"

IN_WORDS = {FEDERATED: "without differential privacy", PRIVATE: "under differential privacy"}

EPSILON = 8.0
"""Of the private arm, where the configuration has no privacy of its own."""

Key = tuple[str, str]
"""Which arm, and whose: an institution's name, or nothing where all are together."""


@dataclass(frozen=True)
class Ground:
    """Where an attack takes place. config: of the run that is attacked. finished: whether it is in `directory`."""

    config: Config
    directory: RunDirectory
    finished: bool = False

    @property
    def records(self) -> Path:
        """A folder for each institution and the coordinator."""
        return self.directory.records(self.config)

    @property
    def runs(self) -> Path:
        """Where the runs are that attacks need."""
        return self.directory.attacks / "runs"


def open_ground(config: Config, out: Path) -> Ground:
    """Takes `out` for attacks on a run of `config`, which may have taken place in it; writes its records if they are
    not there.

    Raises ConfigError when `out` belongs to another configuration, DataError when records cannot be read.
    """
    directory = RunDirectory.at(out)
    for file in (directory.root / "config.yaml", directory.attacks / "config.yaml"):
        if file.exists() and config_files.digest(config_files.load(str(file))) != config_files.digest(config):
            raise ConfigError(
                f"{out} belongs to another configuration ({file.relative_to(directory.root)}); expected the one that is"
                " attacked: say the same overrides as its run, or choose another --out"
            )
    if not config.data.directory and not directory.records(config).exists():
        prepare.write(prepare.gather(config.data), directory.records(config))
    write_text(directory.attacks / "config.yaml", config_files.to_yaml(config))
    return Ground(config, directory, (directory.root / "summary.json").exists())


def without_privacy(config: Config) -> Config:
    """The same run with no differential privacy."""
    return replace(config, privacy=PrivacyConfig())


def with_privacy(config: Config, epsilon: float = EPSILON) -> Config:
    """The same run under the differential privacy that it is configured with, or else patients' at `epsilon`."""
    if config.privacy.private:
        return config
    return replace(
        config,
        privacy=PrivacyConfig(mode="patient", epsilon=epsilon),
        lora=replace(config.lora, dropout=0.0),
        federation=replace(config.federation, weighting="uniform"),
    )


def own_and_other(config: Config) -> tuple[str, str]:
    """Which of FEDERATED and PRIVATE the configured run is, and the one that is trained beside it."""
    return (PRIVATE, FEDERATED) if config.privacy.private else (FEDERATED, PRIVATE)


def event_of(config: Config, parameters: int) -> Event:
    """What a round under `with_privacy` costs each institution. parameters: of an update."""
    rounds, passes = config.federation.rounds, config.train.passes_per_round
    event = round_event(config.privacy, config.quantise, passes, rounds, parameters, terms_of(config))
    assert event is not None
    return event


def spent(config: Config, event: Event) -> float:
    """The epsilon of a whole run of such rounds."""
    return epsilon([replace(event, steps=event.steps * config.federation.rounds)], config.privacy.delta).bound


def claimed(config: Config, adapter: Adapter) -> float:
    """The epsilon that a run under `with_privacy` claims for each unit."""
    trained = method_named(config.federation.method).trained(adapter)
    return spent(config, event_of(config, sum(adapter.factors[key].size for key in trained)))


@dataclass(frozen=True)
class Job:
    """An adapter to train. home: its own directory, in which it goes on when it was interrupted. records: a folder for
    each institution and the coordinator. ready: there is nothing left to train.
    """

    key: Key
    config: Config
    home: Path
    records: Path
    ready: bool = False


def jobs(ground: Ground, arms: Sequence[str], names: Sequence[str] | None = None) -> list[Job]:
    """What the arms need: a run each, and for local-only one for each institution of `names` (or all).

    What the finished run has trained already is taken from it.
    """
    config, found = ground.config, []
    for arm in arms:
        if arm == LOCAL:
            ready = ground.finished and config.compare.enabled and not config.privacy.private
            place = ground.directory.arms if ready else ground.runs / "local"
            found += [
                Job((LOCAL, name), arm_config(without_privacy(config), name), place / name, ground.records, ready)
                for name in names or config.data.names
            ]
        else:
            ready = ground.finished and arm == own_and_other(config)[0]
            mine = with_privacy(config) if arm == PRIVATE else without_privacy(config)
            place = ground.directory.root if ready else ground.runs / ("private" if arm == PRIVATE else "federated")
            found.append(Job((arm, ""), _bare(mine), place, ground.records, ready))
    return found


def _bare(config: Config) -> Config:
    """Without what only readers of the run itself need."""
    return replace(
        config,
        secure_aggregation=replace(config.secure_aggregation, enabled=config.privacy.shared_noise),
        evaluation=replace(config.evaluation, exact=[], institutions=False),
        tracking=TrackingConfig(tensorboard=False),
        simulation=replace(config.simulation, faults=[]),
    )


def train(job: Job) -> Adapter:
    """Trains one adapter in this process, or goes on with it, and returns what was published.

    Raises RunStopped when its updates are void.
    """
    if not job.ready:
        federate(job.config, RunDirectory(job.home), job.records, job.records / COORDINATOR / "validation.jsonl")
    return load_adapter(job.home / "adapter")


def _train_apart(job: Job) -> tuple[Key, Adapter]:
    import torch

    torch.set_num_threads(job.config.simulation.threads)
    return job.key, train(job)


def train_all(wanted: Sequence[Job], actors: int, tell: Told) -> Mapping[Key, Adapter]:
    """All adapters, `actors` processes at a time. Raises RunStopped when one of those dies."""
    found = {job.key: train(job) for job in wanted if job.ready}
    # Federations take longest, so they go first.
    missing = sorted((job for job in wanted if not job.ready), key=lambda job: -len(job.config.data.names))
    for job in missing:
        with storage_errors(job.home):
            job.home.mkdir(parents=True, exist_ok=True)
    if not missing:
        return found
    with process_pool(min(actors, len(missing))) as pool:
        futures: list[Future[tuple[Key, Adapter]]] = [pool.submit(_train_apart, job) for job in missing]
        try:
            for future in as_completed(futures):
                key, found[key] = future.result()
                tell(f"trained: {' '.join(part for part in key if part)}")
        except BrokenProcessPool as error:
            raise RunStopped("a process that trained died; the same command with the same --out goes on") from error
    return found


def published(adapter: Adapter) -> str:
    """What has to be said of a published adapter: that it is the base model, where no round was better."""
    changed = any(factor.any() for key, factor in adapter.factors.items() if is_b(key))
    return "" if changed else "no round beat the base model, which is what was published"
