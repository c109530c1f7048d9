"""A run as the coordinator sees it: who takes part, the rounds, and what is kept on disk.

The run directory holds config.yaml, metrics.jsonl (one object a round), refused.json, checkpoints/, tensorboard/ and,
at the end, adapter/.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from common import config_files
from common.adapter import Adapter
from common.base_model import fingerprint
from common.config import Config, TrainConfig
from common.errors import ConfigError, RunStopped
from common.evaluation import Scores, evaluate
from common.examples import examples_of
from common.files import append_line, write_json, write_text
from common.messages import NOT_INVITED, PROTOCOL, Hello, Introduction, Plan, Refused
from common.models import LoraModel, load, save_adapter
from common.records import read_jsonl
from common.secagg.identity import Roster
from common.text import Example
from server import checkpoints, tracking
from server.attempts import Attempts
from server.collect import Clock, Collect, Collected, Members, OnReply, collect_in_clear
from server.rounds import Progress, begin, finished, record_as_json, run_rounds
from server.secure import collect_securely

log = logging.getLogger("silotune.server")


class Transport(Members, Protocol):
    """Members that can also be asked who they are."""

    def meet(self, hello: Hello, expected: int, timeout_s: float) -> Mapping[str, Introduction | Refused]:
        """Says hello to everybody and returns the answers by name."""


@dataclass(frozen=True)
class Observer:
    """Whom to tell while a run goes on. on_reply(round, answered, invited); on_round after each round."""

    on_reply: Callable[[int, int, int], None] = lambda *_: None
    on_round: Callable[[Progress], None] = lambda _: None
    on_refusal: Callable[[str, Refused], None] = lambda *_: None


@dataclass(frozen=True)
class Outcome:
    """A finished run. refused: institutions that did not take part, with reason code and the parts that differ."""

    progress: Progress
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """The coordinator's own model and its records, loaded once. start: the fresh adapter that a run begins with."""

    model: LoraModel
    exact: tuple[str, ...]
    train: TrainConfig
    start: Adapter

    @classmethod
    def of(cls, config: Config) -> Bench:
        """Raises ModelError when the base model cannot be loaded."""
        model = load(config.model, config.lora, config.seed)
        return cls(model, tuple(config.evaluation.exact), config.train, model.read())

    def read(self, file: Path) -> tuple[Example, ...]:
        """Tokenised records of a jsonl file. Raises DataError when it cannot be read."""
        return examples_of(read_jsonl(file), self.model.tokenizer, self.train, file).examples

    def scores(self, adapter: Adapter, examples: tuple[Example, ...]) -> Scores:
        """Perplexity and exact answers of the base model with `adapter`."""
        self.model.write(adapter)
        return evaluate(self.model, examples, self.exact)


def run_name(config: Config) -> str:
    """The run's name: the same for the same configuration, so that a resumed run keeps its own."""
    return f"{config.name}-{config_files.digest(config)[:12]}"


def coordinate(
    config: Config,
    directory: Path,
    validation: Path,
    members: Transport,
    observer: Observer,
    bench: Bench | None = None,
    roster: Roster | None = None,
) -> Outcome:
    """Runs a federation, or goes on with the one in `directory`, and publishes the best round's adapter there.

    roster: names and signing keys of the institutions, which secure aggregation needs.

    Raises RunStopped when too few institutions take part or contribute; what was reached until then is published all
    the same. Raises ConfigError when `directory` holds a run with another configuration, or curves cannot be sent where
    `config.tracking` says. A kill at any moment costs at most the round under way.
    """
    tracking.require(config.tracking)
    if config.secure_aggregation.enabled and (roster is None or not set(config.data.names) <= set(roster.keys)):
        raise ConfigError("secure aggregation: expected a roster with a key for every one of data.institutions")
    bench = bench or Bench.of(config)
    examples = bench.read(validation)
    digest = config_files.digest(config)
    # Before anything is written: a run that is already there keeps its configuration.
    progress = checkpoints.latest(directory / "checkpoints", digest)
    write_text(directory / "config.yaml", config_files.to_yaml(config))
    if progress is None:
        progress = begin(bench.start, bench.scores(bench.start, examples))
    _rewrite_metrics(directory / "metrics.jsonl", progress)

    refused = _read_refused(directory / "refused.json")
    with tracking.tracker(config, run_name(config), directory) as curves:
        curves.follow(progress.history)

        def keep(after: Progress) -> None:
            nonlocal progress
            progress = after
            checkpoints.save(directory / "checkpoints", after, digest)
            append_line(directory / "metrics.jsonl", json.dumps(record_as_json(after.history[-1])))
            curves.follow(after.history)
            observer.on_round(after)

        try:
            if not finished(config, progress):
                present, refused = _meet(config, members, observer)
                write_json(directory / "refused.json", refused)
                progress = run_rounds(
                    config=config,
                    run=run_name(config),
                    present=present,
                    fingerprint=fingerprint(config.model.path),
                    collect=collector(config, members, roster, directory, observer.on_reply),
                    evaluate=lambda adapter: bench.scores(adapter, examples),
                    progress=progress,
                    on_round=keep,
                )
        finally:
            if progress.round:
                save_adapter(progress.best, config.lora, config.model.path, directory / "adapter")
    return Outcome(progress, refused)


def collector(config: Config, members: Members, roster: Roster | None, directory: Path, on_reply: OnReply) -> Collect:
    """How a run comes to its sums: under secure aggregation with the roster, in the clear where the configuration says
    so. The run's attempts stand in `directory`.
    """
    if not config.secure_aggregation.enabled:

        def in_clear(plan: Plan, adapter: Adapter, clock: Clock) -> Collected:
            federation = config.federation
            return collect_in_clear(
                plan, adapter, members, federation.timeout_s, federation.min_cohort, clock, on_reply
            )

        return in_clear
    assert roster is not None
    keys = roster
    attempts = Attempts(directory / "attempts.json")

    def securely(plan: Plan, adapter: Adapter, clock: Clock) -> Collected:
        return collect_securely(plan, adapter, members, config, keys, attempts, clock, on_reply)

    return securely


def _meet(config: Config, members: Transport, observer: Observer) -> tuple[tuple[str, ...], dict[str, str]]:
    """Those who can take part, in order, and who cannot with the reason.

    Whoever is not among `data.institutions` stays outside: the sum is laid out for them, and counted by them.
    """
    hello = Hello(PROTOCOL, fingerprint(config.model.path))
    answers = members.meet(hello, len(config.data.names), config.federation.timeout_s)
    present: list[str] = []
    refused: dict[str, str] = {}
    for found, answer in sorted(answers.items()):
        if isinstance(answer, Introduction) and found in config.data.names:
            present.append(found)
            continue
        said = answer if isinstance(answer, Refused) else Refused(NOT_INVITED, found)
        # Nodes have numbers only; who says no is known by the name it gives, unless that is somebody's already.
        name = said.name if said.name and said.name not in {*answers, *refused} else found
        refused[name] = " ".join((said.reason, *said.parts))
        log.warning("%s does not take part: %s", name, refused[name])
        observer.on_refusal(name, said)
    if len(present) < config.federation.min_cohort:
        why = "; ".join(f"{name}: {reason}" for name, reason in sorted(refused.items())) or "nobody answered"
        raise RunStopped(
            f"{len(present)} institutions can take part, federation.min_cohort is {config.federation.min_cohort}: "
            f"{why}. Each institution's own log says why; mend it there, then resume."
        )
    return tuple(present), refused


def _read_refused(file: Path) -> dict[str, str]:
    """Who could not take part when the run last met everybody; a run that is complete meets nobody again."""
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _rewrite_metrics(file: Path, progress: Progress) -> None:
    """A kill between checkpoint and metrics leaves one line too few; the checkpoint is the truth."""
    write_text(file, "".join(json.dumps(record_as_json(record)) + "\n" for record in progress.history))
