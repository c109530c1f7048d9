"""Whole runs with real institutions in this process: what is published, what is kept, and that a kill costs nothing."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import time
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.data_sets import RecordFolder
from client.institution import Institution
from client.policy import Policy
from client.secure import SecureMember
from client.training import Trained
from common import config_files
from common.adapter import Adapter
from common.base_model import fingerprint
from common.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    FederationConfig,
    LoraConfig,
    ModelConfig,
    SecureAggregationConfig,
    ServerOptimizerConfig,
    TrackingConfig,
    TrainConfig,
    named,
)
from common.errors import ConfigError, DataError, ModelError, RunStopped, StorageError
from common.evaluation import Scores, evaluate
from common.messages import PROTOCOL, TIMED_OUT, Hello, Introduction, Plan, Refused, Reply, Request, TrainRequest
from common.models import LoraModel, load, load_adapter
from common.records import write_jsonl
from common.secagg.identity import Identity, Roster
from common.secagg.messages import Consents, Inbox, KeyList, Keys, Survivors, ToMember
from common.text import Example
from server import checkpoints
from server.collect import Heard
from server.coordinator import Bench, Observer, Outcome, coordinate, run_name
from server.rounds import Progress, groups_of
from server.tracking import read_events
from simulations.members import InProcessMembers
from tests.client.conftest import make_config, make_records, write_base_model

RECORDS = {"alder": 9, "birch": 7, "cedar": 5, "dogwood": 6, "elm": 8, "fir": 4}
NAMES = tuple(RECORDS)
IDENTITIES = {name: Identity.generate(name) for name in NAMES}
KEYS = Roster.of(*IDENTITIES.values())
INVITED = 3  # of six, in two groups that take turns


@pytest.fixture(scope="module")
def config(base_model: str) -> Config:
    """All that could make a resumed run another one: dropout, cohorts that change, moments here and there, masks."""
    return make_config(
        base_model,
        data=DataConfig(institutions=named(*NAMES), train_records=list(RECORDS.values())),
        lora=LoraConfig(rank=4, alpha=8.0, dropout=0.2),
        train=TrainConfig(batch_size=3, learning_rate=5e-3, passes_per_round=0.7, max_tokens=48),
        federation=FederationConfig(
            rounds=4,
            weight_unit=1,
            fraction=0.5,
            timeout_s=20.0,
            server_optimizer=ServerOptimizerConfig("fedadam", learning_rate=0.02, epsilon=1e-2),
        ),
    )


@pytest.fixture(scope="module")
def bench(config: Config) -> Bench:
    return Bench.of(config)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everybody's records."""
    root = tmp_path_factory.mktemp("records")
    for name, count in RECORDS.items():
        write_jsonl(root / name / "train.jsonl", make_records(count, name))
        write_jsonl(root / name / "validation.jsonl", make_records(2, f"{name}-validation"))
    write_jsonl(root / "coordinator" / "validation.jsonl", make_records(6, "coordinator"))
    return root


Spoil = Callable[[Trained, Plan], Trained]


@dataclass(frozen=True)
class Stage:
    """One directory in which a federation runs, is killed, and goes on."""

    root: Path
    records: Path
    config: Config
    bench: Bench

    @property
    def directory(self) -> Path:
        return self.root / "run"

    def members(self, names: Sequence[str] = NAMES, changed: Config | None = None, **spoils: Spoil) -> InProcessMembers:
        """The institutions, with what they have on disk; one that is not to mask its updates has no secure part."""
        config = changed or self.config
        return InProcessMembers([self.institution(name, config, spoil=spoils.get(name)) for name in names])

    def institution(self, name: str, config: Config, **changes: Any) -> Institution:
        home = self.root / "homes" / name
        secure = None
        if config.secure_aggregation.enabled:
            secure = SecureMember(IDENTITIES[name], Policy.of(config, KEYS), lambda run: home / run / "marks.json")
        found = Institution(name, RecordFolder(self.records / name), home, config.model, secure)
        return replace(found, **changes)

    def go(
        self,
        members: Any = None,
        observer: Observer | None = None,
        bench: Bench | None = None,
        roster: Roster | None = KEYS,
        **changes: Any,
    ) -> Outcome:
        """Runs the federation; a keyword changes a section of its configuration, for all sides."""
        config = replace(self.config, **changes)
        return coordinate(
            config,
            self.directory,
            self.records / "coordinator" / "validation.jsonl",
            members or self.members(changed=config),
            observer or Observer(),
            bench or self.bench,
            roster,
        )

    def lines(self) -> list[dict[str, Any]]:
        """metrics.jsonl without the time that rounds took."""
        lines = [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]
        return [{**line, "seconds": None} for line in lines]

    def curves(self) -> list[tuple[int, dict[str, float]]]:
        """What the event files hold of each round, without the time that it took, in the order of writing."""
        return [
            (event.step, {v.tag: v.simple_value for v in event.summary.value if not v.tag.startswith("seconds/")})
            for file in sorted((self.directory / "tensorboard").iterdir())
            for event in read_events(file)
        ]

    def checkpoints(self) -> list[str]:
        return sorted(file.name for file in (self.directory / "checkpoints").iterdir())


@pytest.fixture
def stage(tmp_path: Path, place: Path, config: Config, bench: Bench) -> Stage:
    return Stage(tmp_path, place, config, bench)


@pytest.fixture
def everyone(stage: Stage) -> dict[str, Any]:
    """All six in every round, of whom two may fall silent."""
    return {"federation": replace(stage.config.federation, fraction=1.0)}


def in_clear(stage: Stage) -> SecureAggregationConfig:
    return replace(stage.config.secure_aggregation, enabled=False)


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, place: Path, config: Config, bench: Bench
) -> tuple[Stage, Progress]:
    """A run from beginning to end that nothing interrupts."""
    stage = Stage(tmp_path_factory.mktemp("whole"), place, config, bench)
    return stage, stage.go().progress


def assert_ended_like(stage: Stage, progress: Progress, whole: tuple[Stage, Progress]) -> None:
    expected_stage, expected = whole
    assert progress.adapter.digest() == expected.adapter.digest()
    assert progress.best.digest() == expected.best.digest()
    lines, expected_lines = ([{**line, "attempts": None} for line in s.lines()] for s in (stage, expected_stage))
    assert lines == expected_lines  # a kill may cost an attempt
    assert stage.curves() == expected_stage.curves()
    published = {file.name: file.read_bytes() for file in (stage.directory / "adapter").iterdir()}
    assert published == {file.name: file.read_bytes() for file in (expected_stage.directory / "adapter").iterdir()}


# ---- a run ---------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_what_it_should(whole: tuple[Stage, Progress], config: Config) -> None:
    stage, progress = whole
    assert progress.round == 4
    assert progress.best_round > 0
    assert {path.name for path in stage.directory.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "refused.json",
        "attempts.json",
        "checkpoints",
        "tensorboard",
        "adapter",
    }
    assert config_files.parse((stage.directory / "config.yaml").read_text(), "config.yaml") == config
    assert [line["round"] for line in stage.lines()] == [1, 2, 3, 4]
    assert all((line["contributors"], line["attempts"]) == (INVITED, 1) for line in stage.lines())
    assert [step for step, _ in stage.curves()] == [1, 2, 3, 4]
    assert stage.curves()[3][1]["train/loss"] == pytest.approx(progress.history[3].train_loss)
    assert stage.checkpoints() == ["round-00003.safetensors", "round-00004.safetensors"]
    assert min(line["validation"]["perplexity"] for line in stage.lines()) == progress.best_perplexity


def test_the_published_adapter_is_the_best_rounds_and_plain_peft_loads_it(
    whole: tuple[Stage, Progress], place: Path, bench: Bench
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    stage, progress = whole
    assert load_adapter(stage.directory / "adapter").digest() == progress.best.digest()
    base = AutoModelForCausalLM.from_pretrained(stage.config.model.path)
    peft = PeftModel.from_pretrained(base, stage.directory / "adapter").eval()
    loss, tokens = 0.0, 0
    with torch.inference_mode():
        for example in bench.read(place / "coordinator" / "validation.jsonl"):
            logits = peft(input_ids=torch.tensor([example.ids])).logits[0, example.prompt_tokens - 1 : -1]
            targets = torch.tensor(example.ids[example.prompt_tokens :])
            loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            tokens += len(targets)
    # float32 sums in another order
    assert math.exp(loss / tokens) == pytest.approx(progress.best_perplexity, rel=1e-4)


def test_a_run_starts_from_a_fresh_adapter_whatever_the_bench_did_before(
    stage: Stage, whole: tuple[Stage, Progress], place: Path
) -> None:
    _, expected = whole
    stage.bench.scores(expected.adapter, stage.bench.read(place / "coordinator" / "validation.jsonl"))
    assert stage.go().progress.adapter.digest() == expected.adapter.digest()


@dataclass
class Around:
    """Members as they are; those below do one thing differently."""

    members: Any

    def meet(self, hello: Hello, known: Collection[str], timeout_s: float) -> Mapping[str, Introduction | Refused]:
        found: Mapping[str, Introduction | Refused] = self.members.meet(hello, known, timeout_s)
        return found

    def reachable(self) -> tuple[str, ...]:
        found: tuple[str, ...] = self.members.reachable()
        return found

    def rest(self, seconds: float) -> None:
        self.members.rest(seconds)

    def ask(self, requests: Mapping[str, Request], timeout_s: float) -> Iterator[tuple[str, Reply]]:
        yield from self.members.ask(requests, timeout_s)


class Permuted(Around):
    """Collects a round's replies and hands them on in another order."""

    def meet(self, hello: Hello, known: Collection[str], timeout_s: float) -> Mapping[str, Introduction | Refused]:
        return dict(reversed(super().meet(hello, known, timeout_s).items()))

    def ask(self, requests: Mapping[str, Request], timeout_s: float) -> Iterator[tuple[str, Reply]]:
        asked = dict(reversed(requests.items()))
        yield from reversed(list(self.members.ask(asked, timeout_s)))


def test_neither_the_order_of_work_nor_of_replies_matters(stage: Stage, whole: tuple[Stage, Progress]) -> None:
    assert_ended_like(stage, stage.go(Permuted(stage.members(NAMES[::-1]))).progress, whole)


def test_curves_for_a_package_that_is_not_there_are_refused_before_anything_is_done(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as if it were not installed, where it is
    with pytest.raises(ConfigError, match="pip install mlflow"):
        stage.go(tracking=TrackingConfig(mlflow="sqlite:///runs.db"))
    assert not stage.directory.exists()


def test_observers_are_told(stage: Stage) -> None:
    told: list[Heard | int | Mapping[str, str]] = []
    observer = Observer(
        on_gathering=told.append,
        on_heard=told.append,
        on_round=lambda progress: told.append(progress.round),
        on_refusal=lambda *refusal: pytest.fail(f"nobody refused, but {refusal}"),
        on_delivered=lambda name: pytest.fail(f"nothing was handed to {name}"),
    )
    stage.go(observer=observer)
    groups = groups_of(stage.config)
    expected: list[Heard | int | Mapping[str, str]] = [{}]
    for number in (1, 2, 3, 4):
        names = groups[(number - 1) % 2]
        for phase in ("train", "shares", "masked input", "consent", "unmask"):
            expected += [Heard(number, number, phase, names[:count], names[count:]) for count in range(INVITED + 1)]
        expected.append(number)
    assert told == expected


def test_the_name_of_a_run_follows_its_configuration(config: Config) -> None:
    assert run_name(config) == run_name(replace(config))
    assert run_name(config) != run_name(replace(config, seed=8))
    assert re.fullmatch(r"tiny-[0-9a-f]{12}", run_name(config))


# ---- with and without secure aggregation ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedavg", "ffa"])
def test_secure_aggregation_changes_nothing_of_what_a_run_learns(
    method: str, stage: Stage, everyone: dict[str, Any], tmp_path: Path
) -> None:
    federation = replace(everyone["federation"], method=method, rounds=3)
    hidden = stage.go(federation=federation)
    clear = replace(stage, root=tmp_path / "clear")
    plain = clear.go(federation=federation, secure_aggregation=in_clear(stage), roster=None)
    assert hidden.progress.adapter.digest() == plain.progress.adapter.digest()
    assert hidden.progress.best.digest() == plain.progress.best.digest()
    assert hidden.progress.adapter.digest() != stage.bench.start.digest()
    files = [place.directory / "adapter" / "adapter_model.safetensors" for place in (stage, clear)]
    assert files[0].read_bytes() == files[1].read_bytes()
    # Losses, perplexities, contributors: all of a round but what it cost.
    cost = {"bytes_up": 0, "bytes_down": 0}
    assert [{**line, **cost} for line in stage.lines()] == [{**line, **cost} for line in clear.lines()]
    assert all(line["train_loss"] > 0 and line["institutions_perplexity"] > 1 for line in stage.lines())
    assert not (clear.directory / "attempts.json").exists()
    seconds = [[record.seconds["secure_aggregation"] for record in o.progress.history] for o in (hidden, plain)]
    assert all(found > 0 for found in seconds[0])
    assert seconds[1] == [0, 0, 0]


@pytest.mark.parametrize(
    "roster", [None, Roster.of(*(IDENTITIES[name] for name in NAMES[:-1]))], ids=["no roster", "somebody is missing"]
)
def test_without_everybodys_key_nothing_begins(roster: Roster | None, stage: Stage) -> None:
    with pytest.raises(ConfigError, match=r"secure aggregation: expected a roster with a key for every one of"):
        stage.go(roster=roster)
    assert not stage.directory.exists()
    assert not (stage.root / "homes").exists()


def test_institutions_that_mask_give_nothing_to_a_coordinator_that_asks_in_the_clear(stage: Stage) -> None:
    with pytest.raises(RunStopped, match=r"0 institutions contributed.*secure_aggregation_required"):
        stage.go(stage.members(), secure_aggregation=in_clear(stage))
    assert list((stage.root / "homes").rglob("state")) == []


def test_a_coordinator_with_another_roster_gets_nothing(stage: Stage) -> None:
    other = Roster.of(*(Identity.generate(name) for name in NAMES))
    with pytest.raises(RunStopped, match=r"^0 institutions can take part.*alder: roster_differs"):
        stage.go(roster=other)
    assert list((stage.root / "homes").rglob("state")) == []


def forms(secret: bytes) -> list[bytes]:
    return [secret, secret.hex().encode(), b64encode(secret), urlsafe_b64encode(secret)]


def test_no_private_key_and_no_vector_is_in_a_file(stage: Stage) -> None:
    vectors: list[np.ndarray] = []

    class Seen(InProcessMembers):
        def ask(self, requests: Mapping[str, Request], timeout_s: float) -> Iterator[tuple[str, Reply]]:
            for name, reply in super().ask(requests, timeout_s):
                secure = self._institutions[name].secure
                if isinstance(reply, Keys) and secure is not None and secure._session is not None:
                    vectors.append(secure._session.vector)
                yield name, reply

    stage.go(Seen(list(stage.members()._institutions.values())))
    assert len(vectors) == INVITED * 4
    secrets = [form for identity in IDENTITIES.values() for form in forms(identity._key.private_bytes_raw())]
    files = [file.read_bytes() for file in stage.root.rglob("*") if file.is_file()]
    assert len(files) > 20
    assert not any(secret in found for secret in secrets for found in files)
    # Zeros are everywhere (A does not move before B does); a run of 64 different elements is a vector's own.
    runs = [vector[place : place + 64] for vector in vectors for place in range(0, len(vector) - 64, 64)]
    own = [run.tobytes() for run in runs if len(np.unique(run)) > 48]
    assert len(own) >= len(vectors)
    assert not any(run in found for run in own for found in files)


# ---- killed at any moment ------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What no code may catch by mistake."""


@dataclass(frozen=True)
class FailingBench(Bench):
    """Is killed at its n-th evaluation; the first is the base model's."""

    kill_at: int = 0
    calls: list[int] = field(default_factory=list)

    def scores(self, adapter: Adapter, examples: tuple[Example, ...]) -> Scores:
        self.calls.append(1)
        if len(self.calls) == self.kill_at:
            raise Killed
        return super().scores(adapter, examples)


def kill(condition: bool) -> None:
    if condition:
        raise Killed


def after_round(stage: Stage, number: int) -> None:
    stage.go(observer=Observer(on_round=lambda progress: kill(progress.round == number)))


def trained(heard: Heard, number: int, count: int) -> bool:
    """Whether so many have answered in the round, each with an update ready, and nothing else was asked yet."""
    return (heard.round, heard.phase, len(heard.answered)) == (number, "train", count)


def while_replies_come(stage: Stage, number: int) -> None:
    stage.go(observer=Observer(on_heard=lambda heard: kill(trained(heard, number, 1))))


def when_all_have_replied(stage: Stage, number: int) -> None:
    stage.go(observer=Observer(on_heard=lambda heard: kill(trained(heard, number, INVITED))))


def while_evaluating(stage: Stage, number: int) -> None:
    found = stage.bench
    stage.go(bench=FailingBench(found.model, found.exact, found.train, found.start, kill_at=number + 1))


def between_checkpoint_and_metrics(stage: Stage, number: int) -> None:
    """The disk takes the checkpoint and no line more."""
    metrics = stage.directory / "metrics.jsonl"
    kept: list[str] = []

    def sabotage(heard: Heard) -> None:
        if trained(heard, number, 1):
            kept.append(metrics.read_text())
            metrics.unlink()
            metrics.mkdir()

    try:
        stage.go(observer=Observer(on_heard=sabotage))
    except StorageError as error:
        assert stage.checkpoints()[-1] == f"round-{number:05d}.safetensors"
        metrics.rmdir()
        metrics.write_text(kept[0] + '{"round": 3, "contrib')  # and half a line, as a power cut leaves it
        raise Killed from error


def while_writing_the_checkpoint(stage: Stage, number: int) -> None:
    partial = stage.directory / "checkpoints" / f".round-{number:05d}.safetensors.partial"

    def sabotage(heard: Heard) -> None:
        if trained(heard, number, 1):
            (partial / "in the way").mkdir(parents=True)

    try:
        stage.go(observer=Observer(on_heard=sabotage))
    except StorageError as error:
        shutil.rmtree(partial)
        partial.write_bytes(b"half a checkpoint")
        raise Killed from error


@dataclass
class Between(Around):
    """Members whose coordinator is killed in a round, with one answer to that question in and others on their way."""

    kind: type[ToMember]
    number: int
    round: int = 0

    def ask(self, requests: Mapping[str, Request], timeout_s: float) -> Iterator[tuple[str, Reply]]:
        asked = next(iter(requests.values()))
        if isinstance(asked, TrainRequest):
            self.round = asked.plan.round
        for place, answer in enumerate(self.members.ask(requests, timeout_s)):
            kill(place == 1 and isinstance(asked, self.kind) and self.round == self.number)
            yield answer


def while_sealing(stage: Stage, number: int) -> None:
    stage.go(Between(stage.members(), KeyList, number))


def while_masking(stage: Stage, number: int) -> None:
    stage.go(Between(stage.members(), Inbox, number))


def while_consenting(stage: Stage, number: int) -> None:
    stage.go(Between(stage.members(), Survivors, number))


def while_revealing(stage: Stage, number: int) -> None:
    stage.go(Between(stage.members(), Consents, number))


PLACES = [
    after_round,
    while_replies_come,
    when_all_have_replied,
    while_sealing,
    while_masking,
    while_consenting,
    while_revealing,
    while_evaluating,
    between_checkpoint_and_metrics,
    while_writing_the_checkpoint,
]


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("killed", PLACES)
def test_a_killed_run_goes_on_and_ends_like_one_that_was_not(
    killed: Callable[[Stage, int], None], number: int, stage: Stage, whole: tuple[Stage, Progress]
) -> None:
    with pytest.raises(Killed):
        killed(stage, number)
    assert_ended_like(stage, stage.go().progress, whole)


def test_a_run_killed_again_and_again_ends_like_one_that_was_not(stage: Stage, whole: tuple[Stage, Progress]) -> None:
    for number, killed in [(1, while_replies_come), (1, after_round), (2, while_consenting), (2, while_revealing)]:
        with pytest.raises(Killed):
            killed(stage, number)
    with pytest.raises(Killed):
        when_all_have_replied(stage, 3)
    with pytest.raises(Killed):
        while_evaluating(stage, 1)  # the first evaluation of a resumed run is that of its round, 3
    with pytest.raises(Killed):
        between_checkpoint_and_metrics(stage, 4)
    assert_ended_like(stage, stage.go().progress, whole)


@pytest.mark.parametrize("kind", [KeyList, Inbox, Survivors, Consents])
def test_institutions_that_outlive_their_coordinator_do_not_train_twice(
    kind: type[ToMember], stage: Stage, whole: tuple[Stage, Progress]
) -> None:
    members = stage.members()
    with pytest.raises(Killed):
        stage.go(Between(members, kind, 2))
    assert_ended_like(stage, stage.go(members).progress, whole)
    trained = [
        [json.loads(line)["round"] for line in file.read_text().splitlines()]
        for file in (stage.root / "homes").glob("*/*/metrics.jsonl")
    ]
    assert sorted(trained) == [[1, 3]] * INVITED + [[2, 4]] * INVITED


def attempts(stage: Stage) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((stage.directory / "attempts.json").read_text())[0]
    return found


def test_attempts_count_on_over_every_kill(stage: Stage) -> None:
    for number, killed in enumerate([while_replies_come, while_masking, while_consenting], start=1):
        with pytest.raises(Killed):
            killed(stage, 1)
        assert attempts(stage)["number"] == number
    assert attempts(stage)["survivors"] is not None
    progress = stage.go().progress
    assert attempts(stage)["number"] == 3 + 4
    assert [record.attempts for record in progress.history] == [3 + 1, 1, 1, 1]


def test_without_its_attempts_a_run_uses_no_number_twice(stage: Stage, whole: tuple[Stage, Progress]) -> None:
    with pytest.raises(Killed):
        after_round(stage, 2)
    (stage.directory / "attempts.json").write_text("{")
    with pytest.raises(StorageError, match=r"attempts\.json cannot be read.*Restore it, or start a new run"):
        stage.go()
    # Where it is lost the numbers begin anew; institutions remember, and refuse until theirs are reached.
    (stage.directory / "attempts.json").unlink()
    progress = stage.go().progress
    assert [record.attempts for record in progress.history] == [1, 1, 2, 1]
    assert progress.adapter.digest() == whole[1].adapter.digest()


@dataclass
class Silent(Around):
    """Members of which one does not hear a question in one round; what it contributes in the clear is lost likewise."""

    name: str
    kind: type[Request]
    number: int
    round: int = 0

    def ask(self, requests: Mapping[str, Request], timeout_s: float) -> Iterator[tuple[str, Reply]]:
        asked = next(iter(requests.values()))
        if isinstance(asked, TrainRequest):
            self.round = asked.plan.round
        lost = isinstance(asked, self.kind) and self.round == self.number
        heard = {name: request for name, request in requests.items() if not (lost and name == self.name)}
        if isinstance(asked, TrainRequest):
            heard = dict(requests)  # it trains, and its answer is lost
        for name, reply in self.members.ask(heard, timeout_s):
            if not (lost and name == self.name):
                yield name, reply
        if lost and self.name in requests:
            yield self.name, Refused(TIMED_OUT)


@pytest.mark.parametrize("kind", [KeyList, Inbox])
def test_who_falls_silent_before_its_vector_is_sent_costs_its_vector_and_nothing_else(
    kind: type[ToMember], stage: Stage, everyone: dict[str, Any], tmp_path: Path
) -> None:
    config = replace(stage.config, **everyone)
    progress = stage.go(Silent(stage.members(changed=config), "birch", kind, 2), **everyone).progress
    assert [record.contributors for record in progress.history] == [6, 5, 6, 6]
    assert [dict(record.refused) for record in progress.history] == [{}, {"birch": TIMED_OUT}, {}, {}]
    assert {record.attempts for record in progress.history} == {1}

    clear = replace(config, secure_aggregation=in_clear(stage))
    beside = replace(stage, root=tmp_path / "clear", config=clear)
    plain = beside.go(Silent(beside.members(), "birch", TrainRequest, 2)).progress
    assert progress.adapter.digest() == plain.adapter.digest()


@pytest.mark.parametrize("kind", [Survivors, Consents])
def test_who_falls_silent_after_its_vector_was_added_is_in_the_sum(
    kind: type[ToMember], stage: Stage, everyone: dict[str, Any], tmp_path: Path
) -> None:
    config = replace(stage.config, **everyone)
    progress = stage.go(Silent(stage.members(changed=config), "birch", kind, 2), **everyone).progress
    assert [(record.contributors, dict(record.refused)) for record in progress.history] == [(6, {})] * 4
    beside = replace(stage, root=tmp_path / "undisturbed", config=config)
    assert progress.adapter.digest() == beside.go().progress.adapter.digest()


@pytest.mark.parametrize("kind", [Survivors, Consents])
def test_a_resumed_round_ends_with_the_survivors_that_were_named_though_the_silent_one_is_back(
    kind: type[ToMember], stage: Stage, everyone: dict[str, Any], tmp_path: Path
) -> None:
    config = replace(stage.config, **everyone)
    beside = replace(stage, root=tmp_path / "not-killed", config=config)
    expected = beside.go(Silent(beside.members(), "birch", Inbox, 2)).progress

    with pytest.raises(Killed):
        stage.go(Silent(Between(stage.members(changed=config), kind, 2), "birch", Inbox, 2), **everyone)
    assert attempts(stage)["survivors"] == [name for name in NAMES if name != "birch"]
    progress = stage.go(**everyone).progress
    assert [record.contributors for record in progress.history] == [6, 5, 6, 6]
    assert progress.adapter.digest() == expected.adapter.digest()


def test_a_damaged_newest_checkpoint_costs_a_round_and_changes_nothing(
    stage: Stage, whole: tuple[Stage, Progress]
) -> None:
    # Killed in round 3 with both replies in: the institutions are two rounds ahead of the checkpoint that is left.
    with pytest.raises(Killed):
        when_all_have_replied(stage, 3)
    (stage.directory / "checkpoints" / "round-00002.safetensors").write_bytes(b"damaged")
    rounds: list[int] = []
    outcome = stage.go(observer=Observer(on_round=lambda progress: rounds.append(progress.round)))
    assert rounds == [2, 3, 4]
    assert_ended_like(stage, outcome.progress, whole)


def test_a_finished_run_is_left_as_it_is(stage: Stage, whole: tuple[Stage, Progress]) -> None:
    stage.go()
    before = {file: file.read_bytes() for file in stage.directory.rglob("*") if file.is_file()}

    class Nobody:
        def meet(self, *_: Any) -> Mapping[str, Introduction | Refused]:
            raise AssertionError("a finished run asks nobody")

    outcome = stage.go(Nobody())
    assert {file: file.read_bytes() for file in stage.directory.rglob("*") if file.is_file()} == before
    assert_ended_like(stage, outcome.progress, whole)


def test_an_interrupted_run_publishes_what_it_reached(stage: Stage) -> None:
    seen: list[Progress] = []

    def stop(progress: Progress) -> None:
        seen.append(progress)
        kill(progress.round == 2)

    with pytest.raises(Killed):
        stage.go(observer=Observer(on_round=stop))
    assert load_adapter(stage.directory / "adapter").digest() == seen[-1].best.digest()


# ---- what does not fit ---------------------------------------------------------------------------------------------


def test_a_directory_with_a_run_of_another_configuration_is_left_alone(stage: Stage) -> None:
    with pytest.raises(Killed):
        after_round(stage, 2)
    before = {file: file.read_bytes() for file in stage.directory.rglob("*") if file.is_file()}
    with pytest.raises(ConfigError, match="another configuration"):
        stage.go(seed=99)
    assert {file: file.read_bytes() for file in stage.directory.rglob("*") if file.is_file()} == before


def test_checkpoints_that_are_all_damaged_do_not_start_the_run_anew(stage: Stage) -> None:
    with pytest.raises(Killed):
        after_round(stage, 2)
    for name in stage.checkpoints():
        (stage.directory / "checkpoints" / name).write_bytes(b"")
    metrics = (stage.directory / "metrics.jsonl").read_bytes()
    with pytest.raises(StorageError, match="no checkpoint"):
        stage.go()
    assert (stage.directory / "metrics.jsonl").read_bytes() == metrics


def test_a_disk_that_refuses_a_checkpoint_is_an_error_and_keeps_the_ones_before(stage: Stage) -> None:
    partial = stage.directory / "checkpoints" / ".round-00003.safetensors.partial"

    def sabotage(heard: Heard) -> None:
        if trained(heard, 3, 1):
            partial.mkdir()

    with pytest.raises(StorageError, match=r"cannot write .*round-00003.*A directory stands where a file is needed"):
        stage.go(observer=Observer(on_heard=sabotage))
    partial.rmdir()
    assert stage.checkpoints() == ["round-00001.safetensors", "round-00002.safetensors"]
    found = checkpoints.latest(stage.directory / "checkpoints", config_files.digest(stage.config))
    assert found is not None
    assert found.round == 2


def test_a_run_directory_that_cannot_be_written_is_an_error(stage: Stage) -> None:
    stage.directory.write_text("a file where the run should be")
    with pytest.raises(StorageError, match="cannot write"):
        stage.go()


@pytest.mark.parametrize("known", [True, False])
def test_a_run_may_name_its_base_model(known: bool, stage: Stage, base_model: str) -> None:
    found = fingerprint(base_model).digest()
    if known:
        config = replace(stage.config, model=replace(stage.config.model, digest=found))
        federation = replace(config.federation, rounds=1)
        assert replace(stage, config=config).go(federation=federation).progress.round == 1
        return
    config = replace(stage.config, model=replace(stage.config.model, digest="0f" * 32))
    with pytest.raises(
        ModelError, match=rf"model\.digest: expected the base model {'0f' * 32}, found {found} in"
    ) as no:
        replace(stage, config=config).go()
    assert base_model in str(no.value)
    assert not stage.directory.exists()
    assert not (stage.root / "homes").exists()


def test_a_run_may_be_given_a_name(stage: Stage) -> None:
    seen: set[str] = set()

    class Watched(Around):
        def meet(self, hello: Hello, known: Collection[str], timeout_s: float) -> Mapping[str, Introduction | Refused]:
            assert hello == Hello.of(config, "winter-2030", fingerprint(config.model.path), KEYS.digest())
            return super().meet(hello, known, timeout_s)

        def ask(self, requests: Mapping[str, Request], timeout_s: float) -> Iterator[tuple[str, Reply]]:
            seen.update(request.plan.run for request in requests.values() if isinstance(request, TrainRequest))
            yield from super().ask(requests, timeout_s)

    config = replace(stage.config, federation=replace(stage.config.federation, rounds=1))
    central = stage.records / "coordinator" / "validation.jsonl"
    members = Watched(stage.members(changed=config))
    coordinate(config, stage.directory, central, members, Observer(), stage.bench, KEYS, "winter-2030")
    assert seen == {"winter-2030"}
    assert {path.name for path in (stage.root / "homes").glob("*/*")} == {"winter-2030"}


def test_hello_names_the_roster_under_masks_only(stage: Stage) -> None:
    said: list[Hello] = []

    class Watched(Around):
        def meet(self, hello: Hello, known: Collection[str], timeout_s: float) -> Mapping[str, Introduction | Refused]:
            said.append(hello)
            raise RunStopped("seen")

    config = replace(stage.config, secure_aggregation=in_clear(stage))
    for changes in ({}, {"secure_aggregation": in_clear(stage)}):
        with pytest.raises(RunStopped, match="seen"):
            stage.go(Watched(stage.members()), **changes)
    base = fingerprint(config.model.path)
    assert said == [
        Hello.of(stage.config, run_name(stage.config), base, KEYS.digest()),
        Hello.of(config, run_name(config), base),
    ]


def test_without_central_records_nothing_begins(stage: Stage, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        coordinate(stage.config, stage.directory, empty, stage.members(), Observer(), stage.bench, KEYS)
    assert not stage.directory.exists()


# ---- who takes part ------------------------------------------------------------------------------------------------


def test_an_institution_with_another_base_model_stays_outside_and_the_run_goes_on(
    stage: Stage, base_model: str, tmp_path: Path
) -> None:
    other = str(write_base_model(tmp_path / "other-base", seed=12))
    members = stage.members()
    members._institutions["cedar"] = stage.institution("cedar", stage.config, model=ModelConfig(other))
    told: list[tuple[str, Refused]] = []
    outcome = stage.go(members, Observer(on_refusal=lambda name, refused: told.append((name, refused))))
    assert dict(outcome.refused) == {"cedar": "base_model_differs weights"}
    assert told == [("cedar", Refused("base_model_differs", "cedar", ("weights",)))]
    assert outcome.progress.round == 4
    assert not (stage.root / "homes" / "cedar").exists()


class Named:
    """Answers hello as told; asks nobody."""

    def __init__(self, answers: Callable[[Hello], Mapping[str, Introduction | Refused]]) -> None:
        self.answers = answers

    def meet(self, hello: Hello, known: Collection[str], timeout_s: float) -> Mapping[str, Introduction | Refused]:
        return {name: answer for name, answer in self.answers(hello).items() if name not in known}

    def rest(self, seconds: float) -> None:
        time.sleep(seconds)


def impatient(stage: Stage) -> FederationConfig:
    """Waits for nobody who is not there at once."""
    return replace(stage.config.federation, gather_s=0.01)


def test_who_is_not_of_the_federation_stays_outside(stage: Stage) -> None:
    def answers(hello: Hello) -> Mapping[str, Introduction | Refused]:
        return {name: Introduction(name, PROTOCOL, "1", hello.fingerprint) for name in ("alder", "mallory")}

    others = r"birch: absent; cedar: absent; dogwood: absent; elm: absent; fir: absent"
    with pytest.raises(
        RunStopped, match=rf"1 institutions can take part.*min_cohort is 3: {others}; mallory: not_invited\."
    ):
        stage.go(Named(answers), federation=impatient(stage))


def test_refusals_are_told_by_the_name_they_give_unless_it_is_somebody_elses(stage: Stage) -> None:
    def answers(hello: Hello) -> Mapping[str, Introduction | Refused]:
        return {
            "alder": Introduction("alder", PROTOCOL, "1", hello.fingerprint),
            "node-1": Refused("data_unreadable", "birch"),
            "node-2": Refused("malformed", "alder"),
            "node-3": Refused("timed_out"),
        }

    # Node 3 may be any of the four that are left; whoever the others are, they were not seen.
    expected = r"birch: data_unreadable; (\w+: absent; ){3}node-2: malformed; node-3: timed_out\."
    with pytest.raises(RunStopped, match=expected):
        stage.go(Named(answers), federation=impatient(stage))


def test_a_run_that_nobody_joins_says_so(stage: Stage) -> None:
    with pytest.raises(RunStopped, match=r"0 institutions can take part.*nobody answered"):
        stage.go(Named(lambda _: {}), federation=impatient(stage))
    assert not (stage.directory / "adapter").exists()


def raises(trained: Trained, plan: Plan) -> Trained:
    raise RuntimeError("the record of patient 4711")


def test_an_institution_that_raises_is_left_out_and_the_others_go_on(stage: Stage) -> None:
    everyone = replace(stage.config.federation, fraction=1.0)
    outcome = stage.go(stage.members(birch=raises), federation=everyone)
    assert [dict(record.refused) for record in outcome.progress.history] == [{"birch": "internal_error"}] * 4
    kept = b"".join(file.read_bytes() for file in stage.directory.rglob("*") if file.is_file())
    assert b"4711" not in kept


def test_a_run_stops_when_too_few_contribute_and_goes_on_once_they_are_mended(
    stage: Stage, whole: tuple[Stage, Progress]
) -> None:
    def later(trained: Trained, plan: Plan) -> Trained:
        return raises(trained, plan) if plan.round >= 3 else trained

    with pytest.raises(
        RunStopped, match=r"round 3: 3 attempts gave no sum.*0 of 3 members are left.*alder: internal_error"
    ):
        stage.go(stage.members(**dict.fromkeys(NAMES, later)))
    assert [line["round"] for line in stage.lines()] == [1, 2]
    found = checkpoints.latest(stage.directory / "checkpoints", config_files.digest(stage.config))
    assert found is not None
    assert load_adapter(stage.directory / "adapter").digest() == found.best.digest()
    assert_ended_like(stage, stage.go().progress, whole)


def not_a_number(trained: Trained, plan: Plan) -> Trained:
    if plan.round != 2:
        return trained
    return replace(trained, adapter=Adapter({k: f * np.float32(np.nan) for k, f in trained.adapter.factors.items()}))


def test_void_updates_are_counted_and_the_run_goes_on(stage: Stage) -> None:
    everyone = replace(stage.config.federation, fraction=1.0)
    outcome = stage.go(stage.members(alder=not_a_number, cedar=not_a_number), federation=everyone)
    assert [(record.contributors, record.void) for record in outcome.progress.history] == [
        (6, 0),
        (6, 2),
        (6, 0),
        (6, 0),
    ]
    assert all(math.isfinite(record.train_loss or math.nan) for record in outcome.progress.history)


def test_when_all_updates_are_void_the_best_adapter_before_is_published(stage: Stage) -> None:
    seen: list[Progress] = []
    with pytest.raises(RunStopped, match="round 2: all 3 updates were void"):
        stage.go(stage.members(**dict.fromkeys(NAMES, not_a_number)), Observer(on_round=seen.append))
    assert len(seen) == 1
    assert load_adapter(stage.directory / "adapter").digest() == seen[0].best.digest()


def test_a_learning_rate_that_gives_no_numbers_stops_the_run_before_anything_is_published(stage: Stage) -> None:
    with pytest.raises(RunStopped, match=r"round 1: all 3 updates were void.*learning_rate"):
        stage.go(train=replace(stage.config.train, learning_rate=1e37, batch_size=1, warmup=0.0))
    assert not (stage.directory / "adapter").exists()
    assert stage.lines() == []


def test_updates_that_explode_and_stay_finite_are_not_void_but_clipped(stage: Stage) -> None:
    train = replace(stage.config.train, learning_rate=1e30, batch_size=1)
    progress = stage.go(train=train, federation=FederationConfig(rounds=1, weight_unit=1, fraction=0.5)).progress
    moved = [progress.adapter.factors[key] - factor for key, factor in stage.bench.start.factors.items()]
    assert max(float(np.abs(m).max()) for m in moved) == pytest.approx(1.0)  # quantise.clip
    assert progress.history[0].void == 0


def test_early_stop_publishes_the_best_round(stage: Stage) -> None:
    # A server that throws the adapter about: after some round nothing gets better any more.
    federation = replace(
        stage.config.federation, rounds=12, server_optimizer=ServerOptimizerConfig("fedavg", learning_rate=40.0)
    )
    seen: list[Progress] = []
    outcome = stage.go(
        observer=Observer(on_round=seen.append),
        federation=federation,
        evaluation=EvaluationConfig(exact=[], patience=2),
    )
    progress = outcome.progress
    assert progress.round == progress.best_round + 2 < 12
    best = seen[progress.best_round - 1].adapter if progress.best_round else stage.bench.start
    assert load_adapter(stage.directory / "adapter").digest() == best.digest()


def test_scores_of_the_bench_are_those_of_the_adapter_given(
    whole: tuple[Stage, Progress], bench: Bench, place: Path, config: Config
) -> None:
    examples = bench.read(place / "coordinator" / "validation.jsonl")
    model: LoraModel = load(config.model, config.lora, 77)
    model.write(whole[1].best)
    assert bench.scores(whole[1].best, examples) == evaluate(model, examples)
    assert bench.scores(bench.start, examples) != bench.scores(whole[1].best, examples)
