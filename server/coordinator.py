"""A run as the coordinator sees it: who takes part, the rounds, and what is kept on disk.

The run directory holds config.yaml, metrics.jsonl (one object a round), refused.json, checkpoints/, tensorboard/ and,
at the end, adapter/.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from common import config_files
from common.adapter import Adapter
from common.base_model import fingerprint
from common.config import Config, TrainConfig
from common.errors import ConfigError, ModelError, RunStopped
from common.evaluation import Scores, evaluate
from common.examples import examples_of
from common.files import append_line, write_json, write_text
from common.messages import (
    NOT_INVITED,
    PROTOCOL,
    PROTOCOL_DIFFERS,
    TIMED_OUT,
    VERSION_DIFFERS,
    Hello,
    Introduction,
    Plan,
    Published,
    Received,
    Refused,
)
from common.models import LoraModel, load, save_adapter
from common.policy_reasons import NOT_APPROVED, PAUSED
from common.publication import Publication
from common.records import read_jsonl
from common.secagg.identity import Identity, Roster
from common.text import Example
from server import checkpoints, tracking
from server.attempts import Attempts
from server.collect import Clock, Collect, Collected, Members, OnHeard, collect_in_clear
from server.rounds import Progress, begin, finished, record_as_json, run_rounds
from server.secure import collect_securely

log = logging.getLogger("silotune.server")

ABSENT = "absent"
"""Said of an institution that was not seen yet."""


class Transport(Members, Protocol):
    """Members that can also be asked who they are."""

    def meet(self, hello: Hello, known: Collection[str], timeout_s: float) -> Mapping[str, Introduction | Refused]:
        """Says hello to everybody who is there, but for those `known` from an earlier call; answers by name."""

    def reachable(self) -> tuple[str, ...]:
        """Names of those who can be asked now."""

    def rest(self, seconds: float) -> None:
        """Waits. Raises RunStopped when the run is interrupted."""


@dataclass(frozen=True)
class Observer:
    """Whom to tell while a run goes on.

    on_gathering: who is waited for before the first round, and why: absent, paused or not_approved. on_refusal: who
    takes no part. on_heard: with each answer in a round. on_round: after each round. on_delivered: who has the adapter
    that was published.
    """

    on_gathering: Callable[[Mapping[str, str]], None] = lambda _: None
    on_refusal: Callable[[str, Refused], None] = lambda *_: None
    on_heard: OnHeard = lambda _: None
    on_round: Callable[[Progress], None] = lambda _: None
    on_delivered: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    refused: institutions that did not take part, with reason code and the parts that differ. delivered: who has the
    adapter that was published, by name.
    """

    progress: Progress
    refused: Mapping[str, str] = field(default_factory=dict)
    delivered: tuple[str, ...] = ()


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
    run: str | None = None,
    signer: Identity | None = None,
) -> Outcome:
    """Runs a federation, or goes on with the one in `directory`, and publishes the best round's adapter there.

    roster: names and signing keys of the institutions, which secure aggregation needs. run: its name; None for the one
    that follows from the configuration. signer: the coordinator's identity; with one, a run that is complete hands its
    adapter, signed, to every institution that can be reached and has not got it yet.

    Raises RunStopped when too few institutions take part or contribute; what was reached until then is published all
    the same. Raises ConfigError when `directory` holds a run with another configuration, or curves cannot be sent where
    `config.tracking` says; ModelError when the base model is not the one that `config.model.digest` names. A kill at
    any moment costs at most the round under way.
    """
    tracking.require(config.tracking)
    if config.secure_aggregation.enabled and (roster is None or not set(config.data.names) <= set(roster.keys)):
        raise ConfigError("secure aggregation: expected a roster with a key for every one of data.institutions")
    base = fingerprint(config.model.path)
    if config.model.digest not in ("", base.digest()):
        raise ModelError(
            f"model.digest: expected the base model {config.model.digest}, found {base.digest()} in "
            f"{config.model.path}; name the right directory in model.path"
        )
    run = run or run_name(config)
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
    with tracking.tracker(config, run, directory) as curves:
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
                masked = config.secure_aggregation.enabled and roster is not None
                hello = Hello.of(config, run, base, roster.digest() if masked and roster is not None else "")
                present, refused = _gather(config, members, observer, hello)
                write_json(directory / "refused.json", refused)
                progress = run_rounds(
                    config=config,
                    run=run,
                    present=present,
                    fingerprint=base,
                    collect=collector(config, members, roster, directory, observer.on_heard),
                    evaluate=lambda adapter: bench.scores(adapter, examples),
                    progress=progress,
                    on_round=keep,
                )
        finally:
            if progress.round:
                save_adapter(progress.best, config.lora, config.model.path, directory / "adapter")
    if signer is None:
        return Outcome(progress, refused)
    publication = Publication(run, progress.best_round, base, config.lora, progress.best.digest()).signed(signer)
    delivered = deliver(config, Published(publication, progress.best), members, directory, observer.on_delivered)
    return Outcome(progress, refused, delivered)


def collector(config: Config, members: Members, roster: Roster | None, directory: Path, on_heard: OnHeard) -> Collect:
    """How a run comes to its sums: under secure aggregation with the roster, in the clear where the configuration says
    so. The run's attempts stand in `directory`.
    """
    if not config.secure_aggregation.enabled:

        def in_clear(plan: Plan, adapter: Adapter, clock: Clock) -> Collected:
            federation = config.federation
            return collect_in_clear(
                plan, adapter, members, federation.timeout_s, federation.min_cohort, clock, on_heard
            )

        return in_clear
    assert roster is not None
    keys = roster
    attempts = Attempts(directory / "attempts.json")

    def securely(plan: Plan, adapter: Adapter, clock: Clock) -> Collected:
        return collect_securely(plan, adapter, members, config, keys, attempts, clock, on_heard)

    return securely


_STILL = {NOT_APPROVED: NOT_APPROVED, PAUSED: PAUSED, TIMED_OUT: ABSENT}
"""Refusals that a person or time may mend, and what is said of whom they come from meanwhile."""

# Between two looks for those who are waited for: a twentieth of the time so far, within these limits. Each of them has
# an egress log that keeps every answer, and a person who is to approve a run may take a day.
_FIRST_LOOK_S, _SLOWEST_LOOK_S = 0.05, 30.0

# For an answer to hello, which takes no training. Whoever is busy with another run is asked again, and keeps nobody
# who comes meanwhile.
_HELLO_S = 60.0


def _gather(
    config: Config, members: Transport, observer: Observer, hello: Hello
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Those who can take part, in order, and who cannot with the reason.

    Waits for those who are not there, pause, or have yet to approve the run, at most `federation.gather_s`. Whoever is
    not among `data.institutions` stays outside: the sum is laid out for them, and counted by them.
    """
    names = config.data.names
    answers: dict[str, Introduction | Refused] = {}
    began = time.monotonic()
    told: dict[str, str] | None = None
    patience = min(config.federation.timeout_s, _HELLO_S)
    while True:
        # Who may still come is asked anew; until it answers it is as if it had not been there.
        answers = {n: a for n, a in answers.items() if not (isinstance(a, Refused) and a.reason in _STILL)}
        answers.update(members.meet(hello, tuple(answers), patience))
        waiting = _waited_for(names, answers)
        if waiting != told:
            told = waiting
            observer.on_gathering(waiting)
        passed = time.monotonic() - began
        if not waiting or passed >= config.federation.gather_s:
            break
        pause = min(max(passed / 20, _FIRST_LOOK_S), _SLOWEST_LOOK_S)
        members.rest(min(pause, config.federation.gather_s - passed))
    present = tuple(sorted(n for n, a in answers.items() if isinstance(a, Introduction) and n in names))
    noes = _refusals(names, present, answers)
    noes |= {n: Refused(ABSENT, n) for n, why in waiting.items() if why == ABSENT and n not in noes}
    for name, no in noes.items():
        log.warning("%s does not take part: %s", name, _explained(no))
        observer.on_refusal(name, no)
    if len(present) < config.federation.min_cohort:
        why = "; ".join(f"{name}: {_explained(no)}" for name, no in sorted(noes.items()))
        raise RunStopped(
            f"{len(present)} institutions can take part, federation.min_cohort is {config.federation.min_cohort}: "
            f"{why if answers else 'nobody answered'}. Each institution's own log says why; mend it there, then resume."
        )
    return present, {name: " ".join((no.reason, *no.parts)) for name, no in noes.items()}


def _waited_for(names: Collection[str], answers: Mapping[str, Introduction | Refused]) -> dict[str, str]:
    """Those of the run who may still come, and why they are not there."""
    noes = {found: answer for found, answer in answers.items() if isinstance(answer, Refused)}
    # Where nodes have numbers only, one that refuses is known by the name it gives, or not at all.
    who = {found: found if found in names else no.name or found for found, no in noes.items()}
    nameless = [found for found, no in noes.items() if found not in names and not no.name]
    waiting = {
        who[found]: _STILL[no.reason]
        for found, no in noes.items()
        if no.reason in _STILL and (who[found] in names or found in nameless)
    }
    absent = [name for name in names if name not in answers and name not in who.values()]
    return waiting | dict.fromkeys(absent[: max(len(absent) - len(nameless), 0)], ABSENT)


def _refusals(
    names: Collection[str], present: Collection[str], answers: Mapping[str, Introduction | Refused]
) -> dict[str, Refused]:
    """Everybody else who answered, by name."""
    noes: dict[str, Refused] = {}
    for found, answer in sorted(answers.items()):
        if found not in present:
            no = answer if isinstance(answer, Refused) else Refused(NOT_INVITED, found)
            # A node with a number only is known by the name it gives, unless that is somebody's already.
            known = found in names or not no.name or no.name in {*answers, *noes}
            noes[found if known else no.name] = no
    return noes


def _explained(no: Refused) -> str:
    """A refusal with both sides of what differs, where the institution says its own."""
    ours = {PROTOCOL_DIFFERS: str(PROTOCOL), VERSION_DIFFERS: version("silotune")}
    said = " ".join((no.reason, *no.parts))
    return f"{said} there, {ours[no.reason]} here" if no.reason in ours and no.parts else said


def deliver(
    config: Config,
    published: Published,
    members: Transport,
    directory: Path,
    on_delivered: Callable[[str], None] = lambda _: None,
) -> tuple[str, ...]:
    """Hands a published adapter to the institutions of the run that can be reached and have not got it yet.

    Who has it, and what the coordinator signs of it, stands in the run's `directory`. Returns the names of all who have
    it. Whoever is away gets it when the run is resumed.
    """
    write_json(directory / "publication.json", published.publication.to_json())
    file = directory / "delivered.json"
    has = _read_delivered(file)
    digest = published.publication.adapter
    missing = [n for n in members.reachable() if n in config.data.names and has.get(n) != digest]
    for name, reply in members.ask(dict.fromkeys(missing, published), config.federation.timeout_s):
        if reply == Received(published.publication.run):
            has[name] = digest
            write_json(file, has)
            on_delivered(name)
        else:
            said = reply.reason if isinstance(reply, Refused) else type(reply).__name__
            log.warning("%s did not take the adapter: %s", name, said)
    return tuple(sorted(name for name, got in has.items() if got == digest))


def _read_delivered(file: Path) -> dict[str, str]:
    """Digest of the adapter that each institution has, by name; nobody where the file cannot be read, since an adapter
    that is handed out twice does no harm.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): str(digest) for name, digest in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _read_refused(file: Path) -> dict[str, str]:
    """Who could not take part when the run last met everybody; a run that is complete meets nobody again."""
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _rewrite_metrics(file: Path, progress: Progress) -> None:
    """A kill between checkpoint and metrics leaves one line too few; the checkpoint is the truth."""
    write_text(file, "".join(json.dumps(record_as_json(record)) + "\n" for record in progress.history))
