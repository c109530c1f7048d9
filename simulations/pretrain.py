"""Pre-training of the embedded base: a small Llama and its tokenizer, from generated general text.

The same seed, steps, thread count and CPU type give the same weights, bit for bit. Elsewhere floating-point sums are
ordered differently; the held-out perplexity then agrees to a fraction of a percent.
"""

from __future__ import annotations

import hashlib
import math
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from common.errors import StorageError
from common.files import write_json
from common.records import Record
from simulations.generate.general import documents

if TYPE_CHECKING:  # torch and transformers take seconds to import
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCABULARY = 2048
HIDDEN, LAYERS, HEADS, INTERMEDIATE, POSITIONS = 192, 4, 6, 512, 512

STEPS = 1600
BATCH = 32
_PEAK_RATE, _FINAL_SHARE, _WARMUP_STEPS = 3e-3, 0.05, 50
_MAX_GRAD_NORM = 1.0
# Batches are cut from blocks of this many, sorted by length, so that little of a batch is padding.
_BLOCK = 32
_TOKENIZER_DOCUMENTS = 20_000
_HELD_OUT_DOCUMENTS = 1_000

PRETRAINING_FILE = "pretraining.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class PretrainResult:
    """What a pre-training gave; written as pretraining.json beside the model, `seconds` left out.

    perplexity: per token of held-out general text. digest: sha256 of model.safetensors. tokens: trained on.
    """

    perplexity: float
    seconds: float
    digest: str
    seed: int
    steps: int
    tokens: int
    threads: int
    cpu: str
    torch: str


def pretrain(
    out: Path,
    seed: int,
    steps: int | None = None,
    threads: int = 2,
    progress: Callable[[int, int, float], None] | None = None,
) -> PretrainResult:
    """Trains tokenizer and model, then writes them to `out` as transformers loads them.

    steps: optimizer steps; None is the shipped model's number. progress: called with (step, steps, loss) after each.
    Uses `threads` CPU threads and leaves torch's settings as they were.

    Raises:
        StorageError: `out` cannot be made or written to.
    """
    import torch

    _claim(out)
    started = time.monotonic()
    steps = STEPS if steps is None else steps
    threads_before, deterministic_before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        tokenizer = train_tokenizer(seed)
        encoded = encode(tokenizer, list(training_text(seed, steps)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = new_model(tokenizer)
            _train(model, batches(encoded, seed), steps, progress)
        perplexity = held_out_perplexity(model, tokenizer, seed)
    finally:
        torch.set_num_threads(threads_before)
        torch.use_deterministic_algorithms(deterministic_before)
    digest = _save(model, tokenizer, out)
    tokens = sum(len(ids) for ids in encoded)
    result = PretrainResult(
        perplexity, time.monotonic() - started, digest, seed, steps, tokens, threads, cpu_model(), torch.__version__
    )
    described = {key: value for key, value in asdict(result).items() if key != "seconds"}
    write_json(out / PRETRAINING_FILE, described)
    return result


def training_text(seed: int, steps: int) -> Iterator[Record]:
    """Every document the model is trained on; the tokenizer sees the first of them (or as many more as it needs)."""
    return documents(steps * BATCH, seed)


def tokenizer_text(seed: int) -> Iterator[Record]:
    """Every document the tokenizer is trained on: what the model's training text begins with."""
    return documents(_TOKENIZER_DOCUMENTS, seed)


def held_out_text(seed: int) -> Iterator[Record]:
    return documents(_HELD_OUT_DOCUMENTS, seed, held_out=True)


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Sennrich et al. 2016); digits stand alone, and no special token is added unasked."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(" ?[0-9]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{r.prompt}\n{r.completion}" for r in tokenizer_text(seed)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained base, drawn from torch's global generator."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=INTERMEDIATE,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[Record]) -> list[list[int]]:
    """<s> prompt newline completion </s>, prompt and completion tokenised apart; without a prompt no newline."""
    prompts = tokenizer([f"{text.prompt}\n" if text.prompt else "" for text in texts])["input_ids"]
    completions = tokenizer([text.completion for text in texts])["input_ids"]
    return [
        [tokenizer.bos_token_id, *prompt, *completion, tokenizer.eos_token_id]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def batches(encoded: list[list[int]], seed: int) -> Iterator[list[list[int]]]:
    """Batches of documents of like length, in random order within a block; each document once."""
    rng = Random(seed)
    for start in range(0, len(encoded), _BLOCK * BATCH):
        block = sorted(encoded[start : start + _BLOCK * BATCH], key=len)
        cut = [block[i : i + BATCH] for i in range(0, len(block), BATCH)]
        rng.shuffle(cut)
        yield from cut


def held_out_perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> float:
    """The exponential of the mean negative log-likelihood of a token of held-out general text, <s> not counted."""
    import torch

    encoded = sorted(encode(tokenizer, list(held_out_text(seed))), key=len)
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(encoded), BATCH):
            batch = encoded[start : start + BATCH]
            counted = sum(len(ids) - 1 for ids in batch)
            total += _mean_loss(model, batch).item() * counted
            tokens += counted
    return math.exp(total / tokens)


def cpu_model() -> str:
    """The processor as the system names it; weights are reproduced bit for bit on the same one."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _train(
    model: LlamaForCausalLM,
    rows: Iterator[list[list[int]]],
    steps: int,
    progress: Callable[[int, int, float], None] | None,
) -> None:
    import torch

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    for step, batch in zip(range(steps), rows, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = _PEAK_RATE * _rate_share(step, steps)
        loss = _mean_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if progress is not None:
            progress(step + 1, steps, loss.item())
    model.eval()


def _rate_share(step: int, steps: int) -> float:
    """Linear warm-up, then cosine to a twentieth of the peak."""
    if step < _WARMUP_STEPS:
        return (step + 1) / _WARMUP_STEPS
    done = (step - _WARMUP_STEPS) / max(1, steps - _WARMUP_STEPS)
    return _FINAL_SHARE + (1 - _FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * done))


def _mean_loss(model: LlamaForCausalLM, batch: list[list[int]]) -> torch.Tensor:
    """Mean cross-entropy per token. Padding stands right of the text, where causal attention never looks."""
    import torch

    longest = max(len(ids) for ids in batch)
    inputs = torch.zeros((len(batch), longest), dtype=torch.long)  # [b, s]
    labels = torch.full((len(batch), longest), -100)
    for row, ids in enumerate(batch):
        inputs[row, : len(ids)] = torch.tensor(ids)
        labels[row, : len(ids)] = torch.tensor(ids)
    logits = model(input_ids=inputs, use_cache=False).logits  # [b, s, vocabulary]
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _claim(out: Path) -> None:
    """Makes `out` and tries to write there: better refused now than after minutes of training."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise StorageError(f"cannot write a model to {out}: {error.strerror}; choose another --out") from error


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> str:
    """Writes to a folder within `out` first, so that a full disk leaves no half model; returns the weights' digest."""
    try:
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            digest = hashlib.sha256((Path(scratch) / WEIGHTS_FILE).read_bytes()).hexdigest()
            for file in sorted(Path(scratch).iterdir()):
                file.chmod(0o644)  # safetensors makes files that only their owner may read
                shutil.move(file, out / file.name)
    except OSError as error:
        raise StorageError(f"cannot write the model to {out}: {error.strerror}; choose another --out") from error
    return digest
