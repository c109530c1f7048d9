"""The embedded base: reproducible to make, and shipped with the figures it really has."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from common.config_files import load
from common.errors import StorageError
from common.records import Record
from simulations import pretrain as pretraining
from simulations.generate.domain import Domain
from simulations.generate.federation import DOMAINS, generate
from simulations.pretrain import BATCH, batches, encode, held_out_perplexity, held_out_text, pretrain, training_text

EMBEDDED = Path(__file__).parents[2] / "common" / "embedded"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The tensors are small: more threads would only wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    described: dict[str, Any] = json.loads((EMBEDDED / "pretraining.json").read_text("utf-8"))
    return described


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EMBEDDED)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(EMBEDDED)


def test_shipped_weights_have_the_stated_digest(described: dict[str, Any]) -> None:
    assert hashlib.sha256((EMBEDDED / "model.safetensors").read_bytes()).hexdigest() == described["digest"]


def test_shipped_model_has_the_stated_perplexity(model: Any, tokenizer: Any, described: dict[str, Any]) -> None:
    measured = held_out_perplexity(model, tokenizer, described["seed"])
    assert measured == pytest.approx(described["perplexity"], rel=0.02)
    assert measured < 6


def test_shipped_files_stay_small() -> None:
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) <= 12e6


def test_shipped_model_is_the_agreed_llama(model: Any) -> None:
    assert isinstance(model, LlamaForCausalLM)
    assert 1.9e6 < sum(parameter.numel() for parameter in model.parameters()) < 2.3e6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (0, 1, 2)


def test_tokenizer_adds_nothing_and_loses_nothing(tokenizer: Any) -> None:
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert len(tokenizer) == 2048
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    for text in ("", "heart failure, I50", "A  b\n\tZürich 1234 → é 漢"):
        ids = tokenizer(text)["input_ids"]
        assert not {0, 1, 2} & set(ids)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("domain", DOMAINS.values(), ids=DOMAINS)
def test_tokenizer_knows_the_domains_words(tokenizer: Any, domain: Domain) -> None:
    phrases = [wording for cue in domain.cues() for wording in cue.wordings]
    words = sum(len(re.findall(r"\w+", phrase)) for phrase in phrases)
    assert sum(len(tokenizer(f" {phrase}")["input_ids"]) for phrase in phrases) / words < 2


def test_a_document_is_encoded_as_records_are(tokenizer: Any) -> None:
    asked, plain = encode(tokenizer, [Record("Which?", "zebra", ""), Record("", "My aunt was late.", "")])
    assert asked == [0, *tokenizer("Which?\n")["input_ids"], *tokenizer("zebra")["input_ids"], 1]
    assert plain == [0, *tokenizer("My aunt was late.")["input_ids"], 1]


def test_each_document_is_in_one_batch() -> None:
    encoded = [[i] * (1 + i % 7) for i in range(8 * BATCH)]
    cut = list(batches(encoded, seed=1))
    assert [len(batch) for batch in cut] == [BATCH] * 8
    assert sorted(ids[0] for batch in cut for ids in batch) == list(range(8 * BATCH))
    assert cut != list(batches(encoded, seed=2))


def test_held_out_text_is_not_trained_on(described: dict[str, Any]) -> None:
    trained = {(text.prompt, text.completion) for text in training_text(described["seed"], described["steps"])}
    held_out = [(text.prompt, text.completion) for text in held_out_text(described["seed"])]
    assert len(held_out) > 500
    assert not trained & set(held_out)


def test_pretraining_repeats_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Less text than the shipped model's tokenizer needs: what is tested here does not depend on it.
    monkeypatch.setattr(pretraining, "_TOKENIZER_DOCUMENTS", 2_000)
    monkeypatch.setattr(pretraining, "_HELD_OUT_DOCUMENTS", 64)
    told: list[tuple[int, int, float]] = []
    threads = torch.get_num_threads()
    one = pretrain(tmp_path / "one", seed=5, steps=3, threads=1, progress=lambda *step: told.append(step))
    torch.manual_seed(99)  # whatever stands in the global generator must not matter
    other = pretrain(tmp_path / "other", seed=5, steps=3, threads=1)
    assert torch.get_num_threads() == threads
    assert one.digest == other.digest
    assert one.perplexity == other.perplexity
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "pretraining.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert [(step, steps) for step, steps, _ in told] == [(1, 3), (2, 3), (3, 3)]
    assert told[2][2] < told[0][2]
    assert one.perplexity < pretraining.VOCABULARY
    assert pretrain(tmp_path / "third", seed=6, steps=1, threads=1).digest != one.digest
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert held_out_perplexity(loaded, tokenizer, 5) == pytest.approx(one.perplexity, rel=1e-4)


def test_a_file_in_the_way_is_told_before_training(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("occupied")
    with pytest.raises(StorageError, match="choose another --out"):
        pretrain(tmp_path / "out", seed=1, steps=1, threads=1, progress=lambda *_: pytest.fail("trained in vain"))


@pytest.mark.parametrize("name", DOMAINS)
def test_the_base_speaks_the_domains_language_but_does_not_know_their_rules(
    name: str, model: Any, tokenizer: Any
) -> None:
    records = generate(load(name).data).coordinator.test
    answers = [tokenizer(record.completion)["input_ids"] + [1] for record in records]
    surprise, tokens, right = 0.0, 0, []
    for record, ids, answer in zip(records, encode(tokenizer, list(records)), answers, strict=True):
        with torch.inference_mode():
            predicted = model(torch.tensor([ids])).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
        surprise -= predicted.gather(1, torch.tensor(answer)[:, None]).sum().item()
        tokens += len(answer)
        if record.kind == DOMAINS[name].exact:
            # Greedy generation gives the answer if, and only if, each of its tokens is the likeliest there.
            right.append(predicted.argmax(-1).tolist() == answer)
    assert 2 < math.exp(surprise / tokens) < 100
    assert len(right) >= 40
    assert sum(right) / len(right) < 0.1
