"""What stands around Flower's engine, and federations on it: two processes that play four institutions in turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from base64 import b64decode, b64encode
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from itertools import dropwhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from client.institution import Institution
from common import config_files
from common.config import Config, ModelConfig, SimulationConfig
from common.messages import INTERNAL_ERROR, Contribution, Hello, Introduction, Refused, Reply, Request, TrainRequest
from common.secagg.messages import Consents, Inbox, KeyList, Survivors
from server.coordinator import Observer, coordinate
from server.rounds import Progress
from simulations import prepare
from simulations.engine import _gpu_share, simulate
from simulations.identities import SimulatedIdentities
from simulations.institutions import VirtualInstitutions, virtual
from simulations.layout import RunDirectory
from simulations.members import InProcessMembers

if TYPE_CHECKING:
    from flwr.app import Context

NAMES = ("lakeside", "northgate", "riverside", "summit")
ROUNDS = 4


def test_nothing_calls_home() -> None:
    code = (
        "import simulations.run, flwr.supercore.telemetry, huggingface_hub.constants as hub; "
        "print(flwr.supercore.telemetry.FLWR_TELEMETRY_ENABLED, hub.HF_HUB_OFFLINE)"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("FLWR_", "HF_"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "True"]


@pytest.mark.parametrize(
    ("device", "gpus", "actors", "share"),
    [("auto", 0, 2, 0.0), ("cpu", 4, 2, 0.0), ("auto", 1, 2, 0.5), ("cuda", 2, 3, 0.5), ("auto", 4, 2, 1.0)],
)
def test_every_actor_finds_a_place_on_one_gpu(
    device: str, gpus: int, actors: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)  # wherever the test runs
    config = replace(Config(), model=ModelConfig(device=device), simulation=SimulationConfig(actors=actors))
    assert _gpu_share(config) == share
    assert not share or gpus * int(1 / share) >= actors


# ---- federations on the engine -------------------------------------------------------------------------------------


def configured(secure: bool = True) -> Config:
    """Four institutions, of whom one may fall silent."""
    return config_files.load(
        "smoke",
        [
            f"data.institutions=[{','.join(NAMES)}]", "data.train_records=[16,12,8,16]", f"federation.rounds={ROUNDS}",
            f"secure_aggregation.enabled={secure}".lower(), "evaluation.exact=[]", "simulation.actors=2",
        ],
    )  # fmt: skip


@dataclass(frozen=True)
class Noting(Institution):
    """Notes, outside of the run's directory, which process answers what and which secrets it then holds."""

    notes: Path = Path()

    def answer(self, request: Request) -> Reply:
        reply = super().answer(request)
        line: dict[str, Any] = {"process": os.getpid(), "request": type(request).__name__}
        if self.secure is not None:
            text, vector, _ = self.secure.snapshot()
            held = json.loads(json.loads(text)["participant"]) if text else {"seeds": [], "shares": {}}
            line["secrets"] = [*held["seeds"], *held["shares"].values()]
            line["vector"] = b64encode(vector.tobytes()).decode()
        self.notes.mkdir(parents=True, exist_ok=True)
        with (self.notes / f"{self.name}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return reply


DEAF = {1: KeyList, 2: Inbox, 3: Survivors, 4: Consents}
"""The question that the silent institution does not hear, by round; it announced its keys in each."""


@dataclass(frozen=True)
class Deaf(Noting):
    """Falls silent in every round, each time one question later."""

    def answer(self, request: Request) -> Reply:
        session = self.secure._session if self.secure is not None else None
        if session is not None and isinstance(request, DEAF[session.plan.round]):
            return Refused(INTERNAL_ERROR, self.name)
        return super().answer(request)


@dataclass(frozen=True)
class Watched:
    """Finds the institution that a node plays, and has it noted what it does; `silent` is the one that falls silent."""

    institutions: VirtualInstitutions
    notes: Path
    silent: str = ""

    @contextmanager
    def __call__(self, context: Context) -> Iterator[Institution]:
        with self.institutions(context) as found:
            kind = Deaf if found.name == self.silent else Noting
            yield kind(**{f.name: getattr(found, f.name) for f in fields(found)}, notes=self.notes)


@dataclass(frozen=True)
class Played:
    """A federation that was played: its directory, its notes, and what came out."""

    root: Path
    notes: Path
    progress: Progress
    identities: SimulatedIdentities | None

    def noted(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.notes / f"{name}.jsonl").read_text().splitlines()]


def play(base: Path, secure: bool = True, silent: str = "") -> Played:
    config, place, notes = configured(secure), RunDirectory.at(base / "run"), base / "notes"
    prepare.write(prepare.gather(config.data), place.records(config))
    identities = SimulatedIdentities.fresh(config.data.names) if secure else None
    found: list[Progress] = []

    def job(members: Any) -> None:
        roster = identities.roster() if identities else None
        validation = place.central(config, "validation")
        found.append(coordinate(config, place.root, validation, members, Observer(), roster=roster).progress)

    institution_of: Callable[[Context], AbstractContextManager[Institution]] = Watched(
        VirtualInstitutions.of(config, place.root, identities), notes, silent
    )
    simulate(config, place, job, institution_of)
    return Played(place.root, notes, found[0], identities)


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> Played:
    return play(tmp_path_factory.mktemp("hidden"))


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> Played:
    return play(tmp_path_factory.mktemp("disturbed"), silent="northgate")


@dataclass
class InClear:
    """The institutions in this process, without secure aggregation; whoever is `silent` trains and is not heard."""

    members: InProcessMembers
    silent: Mapping[int, str]

    def meet(self, hello: Hello, known: Collection[str], timeout_s: float) -> Mapping[str, Introduction | Refused]:
        return self.members.meet(hello, known, timeout_s)

    def reachable(self) -> tuple[str, ...]:
        return self.members.reachable()

    def rest(self, seconds: float) -> None:
        self.members.rest(seconds)

    def ask(self, requests: Mapping[str, Request], timeout_s: float) -> Iterator[tuple[str, Reply]]:
        for name, reply in self.members.ask(requests, timeout_s):
            asked = requests[name]
            assert isinstance(asked, TrainRequest)
            assert isinstance(reply, Contribution)
            yield name, Refused(INTERNAL_ERROR) if self.silent.get(asked.plan.round) == name else reply


def in_clear(root: Path, silent: Mapping[int, str]) -> Progress:
    config, place = configured(secure=False), RunDirectory.at(root)
    prepare.write(prepare.gather(config.data), place.records(config))
    threads = torch.get_num_threads()
    torch.set_num_threads(config.simulation.threads)
    try:
        found = InProcessMembers([virtual(config, place, name, place.records(config)) for name in config.data.names])
        validation = place.central(config, "validation")
        return coordinate(config, root, validation, InClear(found, silent), Observer()).progress
    finally:
        torch.set_num_threads(threads)


def learned(progress: Progress) -> list[Any]:
    """All of the rounds but what they cost."""
    return [replace(record, seconds={}, bytes_up=0, bytes_down=0) for record in progress.history]


def test_on_the_engine_secure_aggregation_changes_nothing_of_what_is_learned(hidden: Played, tmp_path: Path) -> None:
    plain = play(tmp_path, secure=False)
    assert hidden.progress.adapter.digest() == plain.progress.adapter.digest()
    assert learned(hidden.progress) == learned(plain.progress)
    assert [(record.contributors, record.attempts) for record in hidden.progress.history] == [(4, 1)] * ROUNDS
    assert all(record.train_loss is not None and record.train_loss > 0 for record in hidden.progress.history)
    for one, other in ((hidden, True), (plain, False)):
        assert (one.root / "attempts.json").exists() == other
    published = "adapter/adapter_model.safetensors"
    assert (hidden.root / published).read_bytes() == (plain.root / published).read_bytes()


def test_an_institution_is_played_by_one_process_and_then_by_another(hidden: Played) -> None:
    asked = ["TrainRequest", "KeyList", "Inbox", "Survivors", "Consents"] * ROUNDS
    processes = defaultdict[str, list[int]](list)
    for name in NAMES:
        # Who is slow to come, on a machine that does other work as well, is greeted again.
        noted = list(dropwhile(lambda line: line["request"] == "Hello", hidden.noted(name)))
        assert len(noted) < len(hidden.noted(name))
        assert [line["request"] for line in noted] == asked
        processes[name] = [line["process"] for line in noted]
    assert len({process for found in processes.values() for process in found}) == 2
    assert os.getpid() not in {process for found in processes.values() for process in found}
    # Within an attempt, so that its secrets had to follow.
    moved = [
        found[place] != found[place + 1]
        for found in processes.values()
        for place in range(len(found) - 1)
        if asked[place + 1] != "TrainRequest"
    ]
    assert any(moved)


def forms(secret: bytes) -> Iterator[bytes]:
    """A secret as it could stand in a file: as it is, in hexadecimal, and in base64 wherever it begins."""
    yield secret
    yield secret.hex().encode()
    for before in range(3):
        # Without the characters that depend on what stands before and after it.
        whole = b64encode(bytes(before) + secret)
        yield whole[4 if before else 0 : -4]


def test_neither_keys_nor_round_secrets_nor_vectors_are_in_a_file(hidden: Played) -> None:
    identities = hidden.identities
    assert identities is not None
    files = {file: file.read_bytes() for file in hidden.root.rglob("*") if file.is_file()}
    assert {"marks.json", "attempts.json", "metrics.jsonl"} <= {file.name for file in files}
    keys = [identities.secret, *(identities.identity(name)._key.private_bytes_raw() for name in NAMES)]
    rounds: set[bytes] = set()
    vectors: set[bytes] = set()
    for name in NAMES:
        for line in hidden.noted(name):
            rounds |= {b64decode(secret) for secret in line["secrets"]}
            vectors.add(b64decode(line["vector"]))
    rounds = {secret for secret in rounds if any(secret)}  # wiped ones are zeros
    # In each attempt three seeds of each, and from each of the four a share of both secrets.
    assert len(rounds) == ROUNDS * len(NAMES) * (3 + 4)
    vectors.discard(b"")
    assert len(vectors) == ROUNDS * len(NAMES)
    runs = [
        vector[place : place + 256]
        for vector in vectors
        for place in range(0, len(vector) - 256, 256)
        if len(np.unique(np.frombuffer(vector[place : place + 256], np.uint32))) > 48
    ]
    assert len(runs) >= len(vectors)
    for file, found in files.items():
        for secret in (*keys, *rounds):
            assert not any(form in found for form in forms(secret)), file
        assert not any(run in found for run in runs), file


def test_a_secret_in_a_file_would_be_found() -> None:
    secret = bytes(range(100, 132))
    texts = [secret.hex().encode(), *(b64encode(b"x" * before + secret + b"yy") for before in range(3)), b"a" + secret]
    assert all(any(form in text for form in forms(secret)) for text in texts)
    assert not any(form in b64encode(bytes(range(200, 232))) for form in forms(secret))


def test_who_falls_silent_after_its_keys_costs_at_most_its_own_update(disturbed: Played, tmp_path: Path) -> None:
    history = disturbed.progress.history
    # Before its vector was sent it is not in the sum, afterwards it is; the others never have to begin again.
    lost = {"northgate": INTERNAL_ERROR}
    assert [(record.contributors, dict(record.refused)) for record in history] == [
        (3, lost),
        (3, lost),
        (4, {}),
        (4, {}),
    ]
    assert [record.attempts for record in history] == [1] * ROUNDS
    expected = in_clear(tmp_path / "some", {1: "northgate", 2: "northgate"})
    assert disturbed.progress.adapter.digest() == expected.adapter.digest()
    assert learned(disturbed.progress) == learned(expected)


def test_that_makes_a_difference(disturbed: Played, hidden: Played) -> None:
    assert disturbed.progress.adapter.digest() != hidden.progress.adapter.digest()
    asked = [line["request"] for line in disturbed.noted("northgate")]
    assert asked == [
        "Hello",
        *["TrainRequest"],
        *["TrainRequest", "KeyList"],
        *["TrainRequest", "KeyList", "Inbox"],
        *["TrainRequest", "KeyList", "Inbox", "Survivors"],
    ]
