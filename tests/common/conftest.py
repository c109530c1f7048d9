"""Small random Llamas and their tokenizer, written as any model directory is: no test needs the shipped model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.adapter import Adapter
from common.base_model import fingerprint
from common.config import LoraConfig, ModelConfig
from common.models import LoraModel, load, load_tokenizer
from common.text import Example

# The same examples in every run, and no time limit on each: the machine may be busy with other work.
settings.register_profile("silotune", deadline=None, derandomize=True)
settings.load_profile("silotune")

SEED = 20240
WORDS = "the patient has a fever and a cough since yesterday; coded as J10 by the ward"
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """These matrices are too small for two threads, which then only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_tokenizer(directory: Path, begin: bool = True) -> None:
    """A byte-level BPE tokenizer, with or without a begin-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    special = {"eos_token": "</s>", "pad_token": "<pad>", **({"bos_token": "<s>"} if begin else {})}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)


def write_model(directory: Path, key_heads: int = 2, seed: int = SEED) -> None:
    """A random Llama of 2 layers and 4 heads; `key_heads` below 4 means grouped-query attention."""
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=key_heads,
        max_position_embeddings=256,
        initializer_range=0.3,  # large, so that what a token attends to moves its logits by much more than rounding
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            model.lm_head.weight[1] *= 3.0  # else a random model hardly ever ends an answer
    model.save_pretrained(directory)


@pytest.fixture(scope="session")
def grouped_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four query heads over two key heads."""
    directory = tmp_path_factory.mktemp("models") / "grouped"
    write_model(directory)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def dense_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many key heads as query heads."""
    directory = tmp_path_factory.mktemp("models") / "dense"
    write_model(directory, key_heads=4)
    write_tokenizer(directory)
    return directory


@pytest.fixture(params=["dense", "grouped"])
def base_path(request: pytest.FixtureRequest, dense_path: Path, grouped_path: Path) -> Path:
    """Each of the two in turn."""
    return dense_path if request.param == "dense" else grouped_path


@pytest.fixture(scope="session")
def models_by_path() -> dict[Path, LoraModel]:
    return {}


@pytest.fixture
def model(base_path: Path, models_by_path: dict[Path, LoraModel], random_adapter: Callable[..., Adapter]) -> LoraModel:
    """A LoRA model over each base, loaded once, with an adapter that has an effect."""
    if base_path not in models_by_path:
        models_by_path[base_path] = load(ModelConfig(str(base_path)), LORA, seed=1)
    found = models_by_path[base_path]
    found.write(random_adapter(found.read(), seed=2))
    found.peft.eval()
    return found


@pytest.fixture(scope="session")
def tokenizer(grouped_path: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(grouped_path))


@pytest.fixture(scope="session")
def tokenizer_without_begin(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, begin=False)
    return PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.fixture
def copy_of(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """Copies a model directory, so that a test may break it; what was cached of any directory is forgotten."""

    def copy(source: Path) -> Path:
        target = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(source, target)
        return target

    yield copy
    fingerprint.cache_clear()
    load_tokenizer.cache_clear()


@pytest.fixture(scope="session")
def random_adapter() -> Callable[..., Adapter]:
    """Makes an adapter of the same form as another, with random factors, B included."""

    def make(like: Adapter, seed: int, scale: float = 0.3) -> Adapter:
        rng = np.random.default_rng(seed)
        return Adapter({key: rng.normal(0, scale, factor.shape) for key, factor in like.factors.items()})

    return make


@pytest.fixture(scope="session")
def random_examples() -> Callable[..., list[Example]]:
    """Makes documents of random ordinary tokens; about the share `prompt` of each is not supervised."""

    def make(lengths: Sequence[int], seed: int = 3, prompt: float = 0.5) -> list[Example]:
        rng = np.random.default_rng(seed)
        tokens = [tuple(int(token) for token in rng.integers(3, 290, length - 1)) for length in lengths]
        return [Example((0, *ids), max(1, int((len(ids) + 1) * prompt)), "x", "") for ids in tokens]

    return make
