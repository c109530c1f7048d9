"""Base models and adapters on disk and in memory, over small random Llamas."""

from __future__ import annotations

import json
import math
import re
import stat
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft import load_peft_weights as load_stock_weights
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from common.adapter import Adapter, is_a, is_b
from common.base_model import EMBEDDED, Fingerprint, fingerprint, model_directory
from common.config import LoraConfig, ModelConfig
from common.errors import ConfigError, ModelError
from common.evaluation import evaluate, greedy
from common.models import LoraModel, load, load_adapter, load_tokenizer, save_adapter
from common.text import Example, pack

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0)
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
NORM = "model.norm.weight"

Copy = Callable[[Path], Path]
Change = Callable[[Path], Any]
Examples = Callable[..., list[Example]]


def edit_json(file: Path, **changes: Any) -> None:
    found = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in {**found, **changes}.items() if value is not ...}))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def config(**changes: Any) -> Change:
    return lambda path: edit_json(path / CONFIG, **changes)


def weights(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    return lambda path: edit_weights(path, edit)


def head(edit: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return weights(lambda found: found.update({"lm_head.weight": edit(found["lm_head.weight"])}))


def base_weights(model: LoraModel) -> dict[str, bytes]:
    return {
        name: parameter.detach().numpy().tobytes()
        for name, parameter in model.peft.named_parameters()
        if ".lora_" not in name
    }


# --- Fingerprints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("config", config(rms_norm_eps=1e-5)),
        ("config", config(rope_parameters={"rope_type": "default", "rope_theta": 1e5})),
        ("weights", weights(lambda found: found[NORM].mul_(1.0000001))),
        ("weights", weights(lambda found: found[NORM].view(torch.int32)[0].bitwise_xor_(1))),
        ("weights", weights(lambda found: found.update(extra=torch.zeros(1)))),
        ("weights", weights(lambda found: found.pop(NORM))),
        ("weights", head(lambda found: found.reshape(32, 320))),
        ("weights", head(lambda found: found.view(torch.int32))),
        ("tokenizer", lambda path: edit_json(path / "tokenizer_config.json", eos_token="<pad>")),
        ("tokenizer", lambda path: (path / TOKENIZER).write_text((path / TOKENIZER).read_text() + " ")),
        ("tokenizer", lambda path: (path / "chat_template.jinja").write_text("{{ messages }}")),
    ],
)
def test_a_fingerprint_changes_by_the_part_that_changed(
    grouped_path: Path, copy_of: Copy, part: str, change: Callable[[Path], Any]
) -> None:
    copy = copy_of(grouped_path)
    assert fingerprint(str(copy)) == fingerprint(str(grouped_path))
    fingerprint.cache_clear()
    change(copy)
    assert fingerprint(str(copy)).differences(fingerprint(str(grouped_path))) == (part,)


@pytest.mark.parametrize(
    "change",
    [
        config(transformers_version="4.0", _name_or_path="elsewhere", use_cache=False),
        config(dtype=..., torch_dtype="float32"),
        lambda path: (path / CONFIG).write_text(json.dumps(json.loads((path / CONFIG).read_text()), indent=9)),
        lambda path: (path / "README.md").write_text("about"),
        lambda path: (path / "tokenizer").mkdir(),
        lambda path: (path / WEIGHTS).rename(path / "weights.safetensors"),
    ],
)
def test_a_fingerprint_does_not_hang_on_what_changes_no_result(
    grouped_path: Path, copy_of: Copy, change: Callable[[Path], Any]
) -> None:
    copy = copy_of(grouped_path)
    change(copy)
    assert fingerprint(str(copy)) == fingerprint(str(grouped_path))


def test_a_fingerprint_does_not_hang_on_how_weights_are_sharded(grouped_path: Path, copy_of: Copy) -> None:
    whole, sharded, mixed = (copy_of(grouped_path) for _ in range(3))
    (sharded / WEIGHTS).unlink()
    LlamaForCausalLM.from_pretrained(whole, dtype=torch.float32).save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert fingerprint(str(sharded)) == fingerprint(str(whole))
    counts = {load(ModelConfig(str(path)), LORA, 1).base_parameters for path in (sharded, whole)}
    assert len(counts) == 1
    tensors = load_file(mixed / WEIGHTS)
    (mixed / WEIGHTS).unlink()
    for start, file in enumerate(("b.safetensors", "a.safetensors")):
        save_file({name: tensors[name] for name in sorted(tensors)[start::2]}, mixed / file)
    assert fingerprint(str(mixed)) == fingerprint(str(whole))
    # A tensor that stands in two files, of which one would be loaded, is not the same model any more.
    save_file({"lm_head.weight": torch.zeros(320, 32)}, sharded / "a.safetensors", {"format": "pt"})
    fingerprint.cache_clear()
    assert fingerprint(str(sharded)).differences(fingerprint(str(whole))) == ("weights",)


def test_a_part_of_one_tokenizer_file_is_not_part_of_another(grouped_path: Path, copy_of: Copy) -> None:
    one, two = copy_of(grouped_path), copy_of(grouped_path)
    (one / "vocab.a").write_bytes(b"xvocab.b\0y")
    (two / "vocab.a").write_bytes(b"x")
    (two / "vocab.b").write_bytes(b"y")
    assert fingerprint(str(one)).differences(fingerprint(str(two))) == ("tokenizer",)


def test_bfloat16_weights_have_a_fingerprint_and_load_as_float32(grouped_path: Path, copy_of: Copy) -> None:
    copy = copy_of(grouped_path)
    edit_weights(copy, lambda found: found.update({name: tensor.bfloat16() for name, tensor in found.items()}))
    assert fingerprint(str(copy)).differences(fingerprint(str(grouped_path))) == ("weights",)
    assert {parameter.dtype for parameter in load(ModelConfig(str(copy)), LORA, 1).peft.parameters()} == {torch.float32}


def test_differences_are_named_in_order() -> None:
    here = Fingerprint("a", "b", "c")
    assert here.differences(here) == ()
    assert here.differences(Fingerprint("x", "b", "z")) == ("config", "tokenizer")
    assert here.as_dict() == {"config": "a", "weights": "b", "tokenizer": "c"}


# --- Directories that hold no usable model -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["nowhere", "/nowhere/at/all", "a\0b", "~nobody-here/model", "x" * 5000, "pyproject.toml/x"]
)
def test_a_path_to_no_directory(path: str) -> None:
    for use in (lambda: load(ModelConfig(path), LORA, 1), lambda: fingerprint(path), lambda: load_tokenizer(path)):
        with pytest.raises(ModelError, match=r"model\.path: expected `embedded` or a directory") as caught:
            use()
        assert len(str(caught.value)) < 6000


def test_the_embedded_model_is_a_directory_of_this_package() -> None:
    assert model_directory(EMBEDDED).parent.name == "common"


def case(change: Change, told: str, *, no_fingerprint: bool = False) -> Any:
    return pytest.param(change, told, no_fingerprint, id=told)


@pytest.mark.parametrize(
    ("change", "told", "no_fingerprint"),
    [
        case(lambda path: (path / CONFIG).unlink(), "has no config.json", no_fingerprint=True),
        case(lambda path: (path / CONFIG).write_text("{"), "JSON", no_fingerprint=True),
        case(lambda path: (path / CONFIG).write_text("[]"), "object|model_type", no_fingerprint=True),
        case(lambda path: (path / CONFIG).write_bytes(b"\xff\xfe{}"), "JSON", no_fingerprint=True),
        case(config(model_type=...), "model_type"),
        case(config(model_type="lama"), "lama"),
        case(config(hidden_size="x"), "hidden_size"),
        case(config(num_attention_heads=5), "attention heads"),
        case(config(intermediate_size=64), "ignore_mismatched_sizes"),
        case(config(num_hidden_layers=3), r"lack 9 tensors of the model \(first: model\.layers\.2"),
        case(lambda path: (path / WEIGHTS).unlink(), "safetensors", no_fingerprint=True),
        case(lambda path: (path / WEIGHTS).write_bytes(b""), "header too small", no_fingerprint=True),
        case(lambda path: (path / WEIGHTS).write_bytes(b"garbage" * 99), "header", no_fingerprint=True),
        case(lambda path: truncate(path / WEIGHTS), "incomplete metadata", no_fingerprint=True),
        case(lambda path: (path / WEIGHTS).unlink() or (path / WEIGHTS).mkdir(), WEIGHTS, no_fingerprint=True),
        case(weights(lambda found: found.pop(NORM)), r"lack 1 tensors of the model \(first: model\.norm\.weight\)"),
        case(weights(lambda found: found[NORM].fill_(math.nan)), "numbers that are not finite"),
        case(lambda path: [file.unlink() for file in path.glob("tokenizer*")], "tokenizer in .* cannot be loaded: "),
        case(lambda path: (path / TOKENIZER).write_text("{"), "tokenizer in .* cannot be loaded: Expecting"),
        case(lambda path: (path / TOKENIZER).write_text("{}"), "tokenizer in .* cannot be loaded: 'added_tokens'"),
        case(lambda path: edit_json(path / "tokenizer_config.json", eos_token=...), "no end-of-text token"),
    ],
)
def test_a_broken_directory_is_told(
    grouped_path: Path, copy_of: Copy, change: Callable[[Path], Any], told: str, no_fingerprint: bool
) -> None:
    copy = copy_of(grouped_path)
    change(copy)
    with pytest.raises(ModelError, match=re.escape(str(copy))) as caught:
        load(ModelConfig(str(copy)), LORA, 1)
    assert re.search(told, str(caught.value))
    if no_fingerprint:
        with pytest.raises(ModelError, match=re.escape(str(copy))):
            fingerprint(str(copy))


def test_weights_without_a_head_are_not_filled_with_random_ones(grouped_path: Path, copy_of: Copy) -> None:
    copy = copy_of(grouped_path)
    LlamaModel.from_pretrained(copy).save_pretrained(copy)
    with pytest.raises(ModelError, match=r"lack 1 tensors of the model \(first: lm_head\.weight\)"):
        load(ModelConfig(str(copy)), LORA, 1)


def test_tied_weights_have_a_head(grouped_path: Path, copy_of: Copy) -> None:
    copy = copy_of(grouped_path)
    edit_json(copy / CONFIG, tie_word_embeddings=True)
    edit_weights(copy, lambda found: found.pop("lm_head.weight"))
    tied, whole = (load(ModelConfig(str(path)), LORA, 1).base_parameters for path in (copy, grouped_path))
    assert tied == whole - 320 * 32


def test_a_tokenizer_with_more_tokens_than_the_model(grouped_path: Path, copy_of: Copy) -> None:
    copy = copy_of(grouped_path)
    known = len(load_tokenizer(str(copy))) - 1
    edit_json(copy / CONFIG, vocab_size=known)
    edit_weights(
        copy,
        lambda found: found.update(
            {name: found[name][:known].clone() for name in ("lm_head.weight", "model.embed_tokens.weight")}
        ),
    )
    with pytest.raises(ModelError, match=rf"has {known + 1} tokens, more than the {known} that the model knows"):
        load(ModelConfig(str(copy)), LORA, 1)


@pytest.mark.parametrize("modules", [["all-linear"], ["query"], ["q_proj"]])
def test_an_encoder_is_no_causal_language_model(grouped_path: Path, copy_of: Copy, modules: list[str]) -> None:
    sizes = {
        "vocab_size": 320,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    lora = replace(LORA, target_modules=modules)
    headless, whole = copy_of(grouped_path), copy_of(grouped_path)
    BertModel(BertConfig(**sizes)).save_pretrained(headless)
    with pytest.raises(ModelError, match=r"lack \d+ tensors of the model"):
        load(ModelConfig(str(headless)), lora, 1)
    BertLMHeadModel(BertConfig(**sizes)).save_pretrained(whole)
    with pytest.raises(
        (ModelError, ConfigError), match=r"BertLMHeadModel, which is not causal|target_modules: expected linear layers"
    ):
        load(ModelConfig(str(whole)), lora, 1)


def test_an_encoder_and_decoder_is_no_causal_language_model(grouped_path: Path, copy_of: Copy) -> None:
    copy = copy_of(grouped_path)
    sizes = {"vocab_size": 320, "d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(copy)
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        load(ModelConfig(str(copy)), replace(LORA, target_modules=["all-linear"]), 1)


# --- Loading -------------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_is_random_in_a_and_zero_in_b_by_its_seed(grouped_path: Path) -> None:
    one, again, other = (load(ModelConfig(str(grouped_path)), LORA, seed).read() for seed in (5, 5, 6))
    assert one.digest() == again.digest()
    for key, factor in one.factors.items():
        if is_b(key):
            assert not factor.any()
        else:
            assert is_a(key)
            assert factor.any()
            assert not np.array_equal(factor, other.factors[key])


def test_loading_leaves_random_state_alone(grouped_path: Path) -> None:
    before = torch.get_rng_state()
    load(ModelConfig(str(grouped_path)), LORA, 5)
    assert torch.equal(before, torch.get_rng_state())


def test_loading_says_nothing(grouped_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(ModelConfig(str(grouped_path)), LORA, 5)
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["k_proj"], {"k_proj"}),
        (["mlp.up_proj", "o_proj"], {"up_proj", "o_proj"}),
        (["all-linear"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_target_modules(grouped_path: Path, modules: list[str], expected: set[str]) -> None:
    adapter = load(ModelConfig(str(grouped_path)), replace(LORA, target_modules=modules), 1).read()
    found = {key.split(".lora_")[0].rpartition(".")[2] for key in adapter.factors}
    assert found == expected
    assert len(adapter.factors) == 2 * 2 * len(expected)  # A and B in each of 2 layers
    for key, factor in adapter.factors.items():
        assert factor.shape[0 if is_a(key) else 1] == LORA.rank


@pytest.mark.parametrize(
    "modules",
    [["nosuch"], ["q_proj", "nosuch"], ["proj"], ["embed_tokens"], ["norm"], ["mlp"], ["q_proj", "all-linear"]],
)
def test_an_unknown_target_module_is_told_with_those_there_are(grouped_path: Path, modules: list[str]) -> None:
    with pytest.raises(ConfigError, match=rf"target_modules: .*k_proj, .*v_proj\) or all-linear, found {modules[-1]}$"):
        load(ModelConfig(str(grouped_path)), replace(LORA, target_modules=modules), 1)


def test_only_the_adapter_can_be_trained_and_the_base_never_changes(
    grouped_path: Path, random_adapter: Callable[..., Adapter], random_examples: Examples
) -> None:
    model = load(ModelConfig(str(grouped_path)), replace(LORA, dropout=0.2), 1)
    stock = LlamaForCausalLM.from_pretrained(grouped_path, dtype=torch.float32)
    before = base_weights(model)
    assert sorted(before.values()) == sorted(p.detach().numpy().tobytes() for p in stock.parameters())
    assert model.base_parameters == sum(p.numel() for p in stock.parameters())
    trainable = {name for name, parameter in model.peft.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.peft.named_parameters() if ".lora_" in name}
    model.write(random_adapter(model.read(), seed=1))
    model.peft.train()
    optimizer = torch.optim.AdamW(model.parameters.values(), lr=0.1)
    row = pack(random_examples((6, 9)))
    written = model.read().digest()
    torch.nn.functional.cross_entropy(model.logits(row), row.targets).backward()
    optimizer.step()
    evaluate(model, random_examples((6, 9)))
    assert model.read().digest() != written
    assert base_weights(model) == before
    assert all(parameter.grad is None for name, parameter in model.peft.named_parameters() if ".lora_" not in name)


# --- Writing and reading the adapter -------------------------------------------------------------------------------


def test_what_is_written_is_read_and_is_a_copy(model: LoraModel, random_adapter: Callable[..., Adapter]) -> None:
    adapter = random_adapter(model.read(), seed=7)
    model.write(adapter)
    read = model.read()
    assert read.digest() == adapter.digest()
    assert list(read.factors) == list(model.parameters) == sorted(model.parameters)
    with torch.no_grad():
        for parameter in model.parameters.values():
            parameter.zero_()
    assert read.digest() == adapter.digest()
    model.write(adapter)
    for factor in adapter.factors.values():
        factor[:] = 9
    assert model.read().digest() == read.digest()


def test_logits_are_those_of_the_supervised_places(model: LoraModel, random_examples: Examples) -> None:
    examples = random_examples((9, 5), prompt=0.7)
    row = pack(examples)
    with torch.no_grad():
        logits = model.logits(row)
        alone = [model.peft(input_ids=torch.tensor([example.ids])).logits[0] for example in examples]
    expected = [logit[example.prompt_tokens - 1 : -1] for logit, example in zip(alone, examples, strict=True)]
    assert logits.shape == (len(row.targets), 320)
    assert torch.allclose(logits, torch.cat(expected), rtol=0, atol=2e-5)


def test_the_adapter_adds_alpha_over_r_times_b_a(grouped_path: Path, random_adapter: Callable[..., Adapter]) -> None:
    """Against the dense weights, so that what federation averages is what the notation says it is."""
    model = load(ModelConfig(str(grouped_path)), LORA, 1)
    adapter = random_adapter(model.read(), seed=3)
    model.write(adapter)
    dense = LlamaForCausalLM.from_pretrained(grouped_path, dtype=torch.float32)
    with torch.no_grad():
        for key, factor in adapter.factors.items():
            if is_a(key):
                b = adapter.factors[key.replace("lora_A", "lora_B")]
                name = key.removeprefix("base_model.model.").split(".lora_")[0]
                dense.get_submodule(name).weight += torch.from_numpy(LORA.alpha / LORA.rank * b @ factor)
        ids = torch.tensor([[0, 9, 8, 7, 6]])
        assert torch.allclose(model.peft(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("other", [replace(LORA, rank=3), replace(LORA, target_modules=["q_proj"])])
def test_an_adapter_for_other_settings_is_refused_and_nothing_is_written(
    grouped_path: Path, model: LoraModel, other: LoraConfig
) -> None:
    before = model.read().digest()
    with pytest.raises(ModelError, match=r"expected shape|does not fit the base model and LoRA settings"):
        model.write(load(ModelConfig(str(grouped_path)), other, 1).read())
    assert model.read().digest() == before


def test_an_adapter_from_another_base_is_refused(grouped_path: Path, dense_path: Path, tmp_path: Path) -> None:
    """Their value projections have different sizes."""
    save_adapter(load(ModelConfig(str(dense_path)), LORA, 1).read(), LORA, str(dense_path), tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"v_proj.lora_B.weight: expected shape \(16, 4\), found \(32, 4\)"):
        load(ModelConfig(str(grouped_path)), LORA, 1).write(load_adapter(tmp_path / "adapter"))


def stock_perplexity(model: torch.nn.Module, examples: list[Example]) -> float:
    """By transformers' own loss, one document at a time."""
    loss = 0.0
    for example in examples:
        ids = torch.tensor([example.ids])
        labels = ids.clone()
        labels[0, : example.prompt_tokens] = -100
        with torch.no_grad():
            loss += float(model(input_ids=ids, labels=labels).loss) * example.supervised
    return math.exp(loss / sum(example.supervised for example in examples))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's, of a name in transformers
@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], ["all-linear"]])
def test_a_saved_adapter_is_one_of_pefts_own(
    base_path: Path,
    tmp_path: Path,
    modules: list[str],
    random_adapter: Callable[..., Adapter],
    random_examples: Examples,
) -> None:
    """Stock transformers and PEFT load it over the stock base, one document at a time, and find the same perplexity."""
    lora = LoraConfig(rank=3, alpha=7.5, dropout=0.25, target_modules=modules)
    model = load(ModelConfig(str(base_path)), lora, 1)
    adapter = random_adapter(model.read(), seed=4)
    model.write(adapter)
    examples = random_examples((5, 12, 30, 8))
    ours = evaluate(model, examples)
    save_adapter(adapter, lora, str(base_path), tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32).eval()
    without = stock_perplexity(base, examples)
    stock = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert not any(parameter.requires_grad for parameter in stock.parameters())
    assert stock_perplexity(stock, examples) == pytest.approx(ours.perplexity, rel=1e-4)  # float32 over 30 losses
    assert without != pytest.approx(ours.perplexity, rel=1e-2)


def test_a_saved_adapter_comes_back_bit_for_bit(
    model: LoraModel, tmp_path: Path, random_adapter: Callable[..., Adapter]
) -> None:
    adapter = random_adapter(model.read(), seed=8)
    for _ in range(2):  # new, and over the old one
        save_adapter(adapter, LORA, "somewhere", tmp_path / "adapter")
        assert load_adapter(tmp_path / "adapter").digest() == adapter.digest()
    stock = load_stock_weights(str(tmp_path / "adapter"))
    assert {key: tensor.numpy().tobytes() for key, tensor in stock.items()} == {
        key: factor.tobytes() for key, factor in adapter.factors.items()
    }


def test_whoever_may_read_the_directory_may_read_the_published_adapter(model: LoraModel, tmp_path: Path) -> None:
    save_adapter(model.read(), LORA, "somewhere", tmp_path / "adapter")
    (tmp_path / "plain").write_text("")
    modes = {stat.S_IMODE(file.stat().st_mode) for file in [*(tmp_path / "adapter").iterdir(), tmp_path / "plain"]}
    assert len(modes) == 1


def test_an_adapter_that_peft_wrote_in_bfloat16_can_be_read(
    grouped_path: Path, tmp_path: Path, random_adapter: Callable[..., Adapter]
) -> None:
    model = load(ModelConfig(str(grouped_path)), LORA, 1)
    model.write(random_adapter(model.read(), seed=5))
    exact = model.read()
    model.peft.to(torch.bfloat16).save_pretrained(str(tmp_path / "adapter"))
    found = load_adapter(tmp_path / "adapter")
    for key, factor in exact.factors.items():
        assert found.factors[key].dtype == np.float32
        assert np.allclose(found.factors[key], factor, rtol=2**-8, atol=0)  # bfloat16 keeps 8 bits


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 20])
def test_an_adapter_that_is_missing_or_broken_is_told(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"expected a PEFT adapter in .*adapter_model\.safetensors cannot be read"):
        load_adapter(tmp_path)


def test_what_a_model_recommends_for_sampling_does_not_bend_greedy_answers(
    grouped_path: Path, copy_of: Copy, random_examples: Examples
) -> None:

    copy = copy_of(grouped_path)
    edit_json(
        copy / "generation_config.json",
        repetition_penalty=5.0,
        num_beams=4,
        no_repeat_ngram_size=1,
        do_sample=True,
        temperature=2.0,
        min_new_tokens=7,
        suppress_tokens=list(range(3, 200)),
    )
    prompts = [example.ids for example in random_examples((2, 5, 9, 14))]
    plain, bent = (greedy(load(ModelConfig(str(path)), LORA, 1), prompts, 8) for path in (grouped_path, copy))
    assert bent == plain
