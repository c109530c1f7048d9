"""A base model of a few thousand parameters, institutions that hold records for it, and plans for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from client.data_sets import RecordFolder
from client.institution import Institution
from common.adapter import Adapter, flatten
from common.base_model import fingerprint
from common.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    FederationConfig,
    LoraConfig,
    ModelConfig,
    TrainConfig,
    named,
)
from common.examples import examples_of
from common.messages import Hello, Plan, SecurePlan, Settings
from common.methods import METHODS
from common.models import LoraModel, load
from common.randomness import seeded
from common.records import Record, write_jsonl
from common.secagg.identity import Roster
from common.secagg.terms import Terms
from common.text import Example

torch.set_num_threads(1)

SEED = 3
NAMES = ("alder", "birch", "cedar")
WORDS = "fever cough ankle wrist rest iron salt tea warm cold left right old young sees needs takes has".split()


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a random Llama (2 layers, hidden 32) and a BPE tokenizer, as save_pretrained writes them."""
    return str(write_base_model(tmp_path_factory.mktemp("base"), seed=SEED))


def write_base_model(directory: Path, seed: int) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Larger weights than usual, so that an adapter on this random model changes what it says.
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(fast),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=128,
                initializer_range=0.2,
                bos_token_id=fast.bos_token_id,
                eos_token_id=fast.eos_token_id,
                pad_token_id=fast.pad_token_id,
            )
        )
    model.save_pretrained(directory)
    return directory


def write_dynamic(base_model: Path, directory: Path) -> str:
    """The same model with rotary positions that go by the longest text so far."""
    shutil.copytree(base_model, directory)
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def make_records(count: int, name: str, marker: str = "") -> list[Record]:
    """Seeded records of different lengths; `marker` stands in the prompt, the completion and the person."""
    rng = seeded(SEED, "records", name)
    made = []
    for number in range(count):
        prompt = [*rng.choice(WORDS, size=int(rng.integers(1, 6))), *([marker] if marker else [])]
        answer = [*rng.choice(WORDS, size=int(rng.integers(1, 4))), *([marker] if marker else [])]
        made.append(Record(" ".join(prompt), " ".join(answer), f"{name}-{number}{marker}", "coding"))
    return made


def tokenised(records: Sequence[Record], model: LoraModel) -> list[Example]:
    """Each record as one example of at most 48 tokens, as `make_config` has it."""
    return list(examples_of(records, model.tokenizer, TrainConfig(max_tokens=48)).examples)


def make_config(base_model: str, **changes: Any) -> Config:
    """A run of three institutions and three rounds over `base_model`; a keyword replaces a whole section."""
    config = Config(
        name="tiny",
        seed=SEED,
        model=ModelConfig(base_model),
        lora=LoraConfig(rank=4, alpha=8.0, dropout=0.0),
        data=DataConfig(institutions=named(*NAMES), train_records=[9, 7, 5]),
        train=TrainConfig(batch_size=2, learning_rate=5e-3, max_tokens=48),
        federation=FederationConfig(rounds=3, weight_unit=1, timeout_s=20.0),
        evaluation=EvaluationConfig(exact=[]),
    )
    return replace(config, **changes)


def make_plan(config: Config, adapter: Adapter, number: int = 1, cohort: Sequence[str] = NAMES, **changes: Any) -> Plan:
    """The plan that a coordinator would announce for round `number`."""
    trained = METHODS[config.federation.method].trained(adapter)
    plan = Plan(
        run="tiny-run",
        round=number,
        cohort=tuple(cohort),
        parameters=len(flatten(adapter.factors, trained)),
        adapter_digest=adapter.digest(),
        fingerprint=fingerprint(config.model.path),
        settings=Settings.of(config),
    )
    return replace(plan, **changes)


def make_hello(config: Config, run: str = "tiny-run", roster: str = "", **changes: Any) -> Hello:
    """What a coordinator with that configuration would say first."""
    return replace(Hello.of(config, run, fingerprint(config.model.path), roster), **changes)


def secured(plan: Plan, config: Config, roster: Roster, attempt: int = 1) -> Plan:
    """The same plan as one for secure aggregation, on the terms that the configuration states."""
    terms = Terms.of(len(plan.cohort), config.secure_aggregation.colluders, config.federation.min_cohort)
    draft = replace(plan, secure=SecurePlan(attempt, roster.digest(), terms, 0, 0))
    layout = draft.layout
    return replace(plan, secure=SecurePlan(attempt, roster.digest(), terms, layout.length, layout.ring_bits))


@pytest.fixture
def institution(base_model: str, tmp_path: Path) -> Callable[..., Institution]:
    """Makes an institution with its records under the test's own directory."""

    def make(name: str = NAMES[0], records: int = 6, marker: str = "", **changes: Any) -> Institution:
        data, home = tmp_path / name / "data", tmp_path / name / "home"
        write_jsonl(data / "train.jsonl", make_records(records, name, marker))
        write_jsonl(data / "validation.jsonl", make_records(3, f"{name}-validation", marker))
        return replace(Institution(name, RecordFolder(data), home, ModelConfig(base_model)), **changes)

    return make


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[[Institution], Path]:
    """Where an institution of the fixture above has its records."""
    return lambda member: tmp_path / member.name / "data"


@pytest.fixture(scope="session")
def lora_model(base_model: str) -> LoraModel:
    """The base model with an adapter without dropout; tests may overwrite the adapter."""
    return load(ModelConfig(base_model), LoraConfig(rank=4, alpha=8.0, dropout=0.0), SEED)


@pytest.fixture(scope="session")
def dropout_model(base_model: str) -> LoraModel:
    """The same with dropout 0.3."""
    return load(ModelConfig(base_model), LoraConfig(rank=4, alpha=8.0, dropout=0.3), SEED)


@pytest.fixture(scope="session")
def start(base_model: str) -> Adapter:
    """A fresh adapter: A random, B zero."""
    return load(ModelConfig(base_model), LoraConfig(rank=4, alpha=8.0, dropout=0.0), SEED).read()


@pytest.fixture(scope="session")
def examples(lora_model: LoraModel) -> list[Example]:
    """Seven tokenised records of different lengths."""
    return tokenised(make_records(7, "examples"), lora_model)
