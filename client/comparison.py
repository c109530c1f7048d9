"""What a published adapter is worth here: base model, local-only and federated on this institution's test records.

Nothing of it leaves: scores, and the adapter that is trained for comparison, stay in the institution's own directory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from client.adapters import Kept, require_base, write_peft
from client.data_sets import DataSets, Machine, RecordSet
from client.home import ClientHome
from client.private_training import noised_step, train_privately
from client.state import LocalState
from client.training import Assignment, train
from client.units import units_under
from common.adapter import Adapter
from common.config import PrivacyConfig, TrainConfig
from common.enrolment import parse_json, within
from common.errors import ConfigError, SilotuneError
from common.evaluation import Scores, evaluate
from common.examples import Tokenised, examples_of
from common.files import write_directory
from common.messages import Settings
from common.methods import method_named
from common.models import LoraModel, load, load_adapter
from common.privacy.mechanism import alone
from common.privacy.noise import SystemNoise
from common.private_files import locked, private_directory, read_file
from common.secagg.canonical import canonical

BASE, LOCAL, FEDERATED = ARMS = ("base", "local", "federated")

_NOTES = "comparison.json"
_LIMIT = 1 << 22


@dataclass(frozen=True)
class LocalTraining:
    """How this institution trains without the others.

    rate: the learning rate; None is the run's, which was chosen for the federation.
    noise: as private as the run (`mechanism.alone`). Nothing of it leaves, so that no budget is spent either way;
    without noise it is what this institution can have for itself, and the run's rate, chosen for noised steps, of no
    use: None is then what configurations have that name none.
    """

    rate: float | None = None
    noise: bool = True

    def of(self, run: Settings) -> Settings:
        """The settings of a run as they are for training alone."""
        privacy, passes = alone(run.privacy, run.train.passes_per_round)
        rate = self.rate or run.train.learning_rate
        if privacy.private and not self.noise:
            privacy, rate = PrivacyConfig(), self.rate or TrainConfig().learning_rate
        return replace(run, privacy=privacy, train=replace(run.train, passes_per_round=passes, learning_rate=rate))


@dataclass(frozen=True)
class LocalOnly:
    """What this institution would have without the others.

    settings: it was trained with. adapter: of the best round by its own validation records, round 0 among them.
    rounds: how many were trained. trained_before: by an earlier call.
    """

    settings: Settings = field(repr=False)
    adapter: Adapter = field(repr=False)
    best_round: int
    rounds: int
    trained_before: bool


@dataclass(frozen=True)
class Comparison:
    """Scores by arm on the test records of a data set; private to the institution."""

    data_set: str
    records: int
    persons: int
    scores: Mapping[str, Scores]
    local: LocalOnly | None

    def as_dict(self) -> dict[str, Any]:
        local = self.local
        return {
            "data_set": self.data_set,
            "test_records": self.records,
            "test_persons": self.persons,
            "scores": {arm: {**asdict(found), **found.as_dict()} for arm, found in self.scores.items()},
            "local": local
            and {
                "privacy": local.settings.privacy.mode,
                "learning_rate": local.settings.train.learning_rate,
                "rounds": local.rounds,
                "best_round": local.best_round,
                "trained_before": local.trained_before,
            },
        }


def settings_of(home: ClientHome, run: str) -> Settings | None:
    """The settings with which this institution trained in a run; None when it never did. Raises ConfigError."""
    file = home.runs / run / "settings.json"
    if not file.exists():
        return None
    return within(file, lambda: Settings.from_json(read_file(file, _LIMIT).decode(errors="replace")))


def compare(
    home: ClientHome,
    name: str,
    kept: Kept,
    records: DataSets,
    machine: Machine,
    data_set: str | None,
    exact: Sequence[str],
    local: LocalTraining | None,
    tell: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Scores base model, local-only and federated on a data set's test records.

    name: this institution's. data_set: None for the one of the run. exact: kinds of record whose whole answer is
    compared. local: how local-only is trained, for as many rounds as this institution took part in; it is kept, so that
    it is quick the second time. None compares without. tell: is told what is under way.

    Raises ConfigError when the run's settings are needed and not there, or there is no such data set; DataError and
    ModelError when records or the base model cannot be read, or the model is not the one of the adapter.
    """
    run, settings = kept.publication.run, settings_of(home, kept.publication.run)
    if settings is None and (local or data_set is None):
        raise ConfigError(
            f"{home.runs / run}: expected the settings of run {run}, found none, since this institution did not"
            " train in it; give --data-set NAME --no-local"
        )
    named = data_set or (settings.data_set if settings else "")
    if named not in records.names:
        raise ConfigError(
            f"expected a data set that {home.data} names ({', '.join(records.names) or 'none'}), found {named!r:.80};"
            " give --data-set NAME"
        )
    require_base(machine.model, kept)
    config = replace(settings.train if settings else TrainConfig(), row_tokens=machine.row_tokens)
    tell("loading the base model")
    model = load(machine.config(), kept.publication.lora, settings.seed if settings else 0)
    fresh = model.read()

    def tokenised(part: str) -> tuple[RecordSet, Tokenised]:
        found = records.find(named, part)
        return found, examples_of(found.records, model.tokenizer, config, found.where)

    test, asked = tokenised("test")
    scores: dict[str, Scores] = {}
    tell(f"base model: {len(test.records)} test records")
    scores[BASE] = evaluate(model, asked.examples, exact)
    local_only = None
    if local and settings is not None:
        place = home.runs / run / "local-only" / named
        parts = [records.find(named, part) for part in ("train", "validation")]
        rounds = min(_rounds_trained(home.runs / run) or settings.rounds, settings.rounds)
        mine = local.of(settings)
        work = _Work(
            name,
            replace(mine, train=replace(mine.train, row_tokens=machine.row_tokens), lora=kept.publication.lora),
            rounds,
            _key(name, mine, rounds, kept, machine, parts),
        )
        private_directory(place.parent)
        with locked(place.parent):
            local_only = _kept(place, work, fresh) or _trained(place, work, model, fresh, tokenised, tell)
        model.write(local_only.adapter)
        tell("local-only: test records")
        scores[LOCAL] = evaluate(model, asked.examples, exact)
    model.write(kept.adapter)
    tell("federated: test records")
    scores[FEDERATED] = evaluate(model, asked.examples, exact)
    return Comparison(named, len(test.records), len({record.person for record in test.records}), scores, local_only)


@dataclass(frozen=True)
class _Work:
    """What local-only training is to do. key: differs where anything does that its result depends on."""

    name: str
    settings: Settings
    rounds: int
    key: str


def _key(name: str, settings: Settings, rounds: int, kept: Kept, machine: Machine, parts: Sequence[RecordSet]) -> str:
    publication = kept.publication
    said = json.dumps([asdict(machine.config()), machine.row_tokens, asdict(publication.lora)], sort_keys=True)
    versions = tuple(part.version for part in parts)
    statement = canonical(
        "local-only", name, settings.to_json(), rounds, publication.fingerprint.digest(), said, versions
    )
    return hashlib.sha256(statement).hexdigest()


def _rounds_trained(run: Path) -> int:
    """The last round of a run that this institution trained in, by its own notes; 0 when it cannot be told."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return max((int(json.loads(line)["round"]) for line in lines), default=0)
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _kept(place: Path, work: _Work, fresh: Adapter) -> LocalOnly | None:
    """The result of an earlier call; None when there is none, or another, or a damaged one."""
    try:
        found = parse_json(read_file(place / _NOTES, _LIMIT))
        adapter = load_adapter(place)
    except SilotuneError:
        return None
    if not isinstance(found, dict) or (found.get("key"), found.get("adapter")) != (work.key, adapter.digest()):
        return None
    best = found.get("best_round")
    same = adapter.factors.keys() == fresh.factors.keys()
    if not same or type(best) is not int:
        return None
    return LocalOnly(work.settings, adapter, best, work.rounds, trained_before=True)


def _trained(
    place: Path,
    work: _Work,
    model: LoraModel,
    fresh: Adapter,
    tokenised: Callable[[str], tuple[RecordSet, Tokenised]],
    tell: Callable[[str], None],
) -> LocalOnly:
    """Trains alone, round by round as in the federation, and keeps the result for the next call."""
    settings = work.settings
    (held, training), validation = tokenised("train"), tokenised("validation")[1].examples
    step = noised_step(settings.privacy, settings.train.passes_per_round, settings.rounds)
    units = units_under(settings.privacy, held.records, training) if step else ()
    keys = method_named(settings.method).trained(fresh)
    model.write(fresh)
    adapter, state = fresh, LocalState()
    best, best_round, least = fresh, 0, evaluate(model, validation).perplexity
    for number in range(1, work.rounds + 1):
        assignment = Assignment(number, settings.rounds, keys, settings.seed, work.name)
        if step is None:
            found = train(model, training.examples, adapter, state, settings.train, assignment)
        else:
            noise = SystemNoise()
            found = train_privately(model, units, adapter, state, settings.train, step, assignment, noise)
        if not math.isfinite(found.loss):
            tell(f"local-only: round {number} of {work.rounds} diverged, which ends it")
            break
        adapter, state = found.adapter, found.state
        perplexity = evaluate(model, validation).perplexity
        tell(f"local-only: round {number} of {work.rounds}, perplexity {perplexity:.3f} on validation records")
        if perplexity < least:
            best, best_round, least = adapter, number, perplexity

    def write(folder: Path) -> None:
        write_peft(folder, best, settings.lora, Path(model.path).name)
        notes = {"key": work.key, "adapter": best.digest(), "best_round": best_round}
        (folder / _NOTES).write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")

    write_directory(place, write)
    return LocalOnly(settings, best, best_round, work.rounds, trained_before=False)
