"""What a configuration takes: memory for training, estimated, and bytes a round, from the messages themselves.

The base model's form is read from its configuration file; its weights are not.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.adapter import Adapter, flatten
from common.base_model import fingerprint, model_directory
from common.config import Config
from common.errors import ConfigError, ModelError
from common.fixed_point import Ring, pack, void
from common.messages import Contribution, Plan, Reply, Request, SecurePlan, Settings, TrainRequest
from common.methods import method_named
from common.models import peft_config
from common.secagg.identity import SIGNATURE_BYTES
from common.secagg.messages import (
    Consent,
    Consents,
    Inbox,
    KeyList,
    Keys,
    MaskedInput,
    Revealed,
    Sealed,
    Shares,
    Survivors,
)
from common.secagg.sealing import OVERHEAD, PUBLIC_BYTES, SEED_BYTES
from common.secagg.shamir import SHARE_BYTES
from common.secagg.terms import Terms
from common.text import Example
from common.wire import size, to_wire
from server.coordinator import run_name
from server.rounds import cohort_of

_HALF, _SINGLE = 2, 4  # bytes of a number
_QUANTISED = {"full": None, "8bit": 1.0, "4bit": 0.5}


@dataclass(frozen=True)
class Form:
    """Sizes of a base model and of the adapter on it.

    queries, keys: heads times their size. inner: of the feed-forward part. linear: parameters in the layers' linear
    maps, which quantisation makes smaller. inputs: of all adapted maps, together; rank: summed over them.
    context: tokens that the model was made for; 0 where it does not say. adapter: of zeros, in the run's own form.
    """

    layers: int
    hidden: int
    queries: int
    keys: int
    inner: int
    vocabulary: int
    context: int
    parameters: int
    linear: int
    inputs: int
    rank: int
    adapter: Adapter


@dataclass(frozen=True)
class Footprint:
    """Bytes that training takes, by what for."""

    weights: int
    adapter: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.activations + self.logits

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def form_of(config: Config) -> Form:
    """Reads the form of the base model and its adapter. Raises ModelError when there is none to be had."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = model_directory(config.model.path)
    try:
        found = AutoConfig.from_pretrained(directory, local_files_only=True)
        with torch.device("meta"), warnings.catch_warnings():  # sizes without numbers
            # PEFT reads a flag that transformers has renamed, and says so.
            warnings.simplefilter("ignore", FutureWarning)
            base = AutoModelForCausalLM.from_config(found)
            parameters = base.num_parameters()
            linear = sum(
                module.weight.numel()
                for name, module in base.named_modules()
                if isinstance(module, torch.nn.Linear) and "lm_head" not in name
            )
            adapted = _adapted(base, config, directory)
    except (ConfigError, ModelError):
        raise
    except Exception as error:  # what is raised depends on which file is broken, and how
        raise ModelError(f"{directory} does not say what form its model has: {error}") from error
    factors = {
        name.replace(".default.", "."): tuple(parameter.shape)
        for name, parameter in adapted.named_parameters()
        if ".lora_" in name
    }
    first = [shape for name, shape in factors.items() if ".lora_A." in name]
    text: Any = found.get_text_config()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Form(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        queries=heads * size,
        keys=(getattr(text, "num_key_value_heads", None) or heads) * size,
        inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        context=int(getattr(text, "max_position_embeddings", 0) or 0),
        parameters=parameters,
        linear=linear,
        inputs=sum(shape[1] for shape in first),
        rank=sum(shape[0] for shape in first),
        adapter=Adapter({name: np.zeros(shape, np.float32) for name, shape in factors.items()}),
    )


def _adapted(base: Any, config: Config, directory: Path) -> Any:
    from peft import get_peft_model

    try:
        return get_peft_model(base, peft_config(config.lora, str(directory)))
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {error}") from error


def bytes_per_round(config: Config, form: Form) -> dict[str, int]:
    """The most that an institution sends, and receives, in a round: the sizes of the messages that would travel."""
    trained = method_named(config.federation.method).trained(form.adapter)
    cohort = cohort_of(config, config.data.names, 1)
    secure = config.secure_aggregation
    terms = Terms.of(len(cohort), secure.colluders, config.federation.min_cohort) if secure.enabled else None
    plan = Plan(
        run=run_name(config),
        round=1,
        cohort=cohort,
        parameters=len(flatten(form.adapter.factors, trained)),
        adapter_digest=form.adapter.digest(),
        fingerprint=fingerprint(config.model.path),
        settings=Settings.of(config),
    )
    if terms is not None:
        plan = replace(plan, secure=SecurePlan(1, "0" * 64, terms, plan.layout.length, plan.layout.ring_bits))
    vector = pack(void(plan.layout), plan.layout.ring_bits)
    up: list[Request | Reply] = []
    down: list[Request | Reply] = [TrainRequest(plan, form.adapter)]
    if terms is None:
        up.append(Contribution(plan.digest(), vector))
    else:
        said, asked = _secure_messages(plan.digest(), cohort, vector, terms)
        up, down = up + said, down + asked
    return {"up": sum(size(to_wire(m)) for m in up), "down": sum(size(to_wire(m)) for m in down)}


def _secure_messages(
    digest: str, cohort: tuple[str, ...], vector: Ring, terms: Terms
) -> tuple[list[Request | Reply], list[Request | Reply]]:
    """Messages of full size in a cohort that nobody leaves: from its first member, who has all pair seeds to give, and
    to its last, who receives them.
    """
    share, signature = bytes(SHARE_BYTES), bytes(SIGNATURE_BYTES)
    key = bytes(PUBLIC_BYTES)
    keys = Keys(digest, key, key, bytes(32), signature)
    sealed = Sealed(bytes(2 * SHARE_BYTES + OVERHEAD), bytes(SEED_BYTES + OVERHEAD), signature)
    said: list[Request | Reply] = [
        keys,
        Shares(digest, dict.fromkeys(cohort[1:], sealed)),
        MaskedInput(digest, vector),
        Consent(digest, signature),
        Revealed(digest, dict.fromkeys(cohort, share)),
    ]
    asked: list[Request | Reply] = [
        KeyList(digest, dict.fromkeys(cohort, keys)),
        Inbox(digest, dict.fromkeys(cohort[:-1], sealed)),
        Survivors(digest, cohort),
        Consents(digest, dict.fromkeys(cohort, signature)),
    ]
    return said, asked


def footprint(config: Config, form: Form, examples: Sequence[Example]) -> Footprint:
    """Memory of one institution's longest step.

    Activations are counted as Korthikanti et al. (2022, "Reducing Activation Recomputation in Large Transformer
    Models", section 4.1) count them, adapted to what is trained here. What the backward pass keeps of a token in a
    layer of a Llama with a frozen base: the inputs of both norms, in float32 (2 h), the queries and what attention
    gives (2 q), keys and values (2 k), and the gate, its activation and what it is multiplied with (3 f). Their 5 a s /
    h is missing: attention keeps no matrix of weights. So are the inputs of frozen maps, whose weights get no gradient.
    Of an adapted map its input and the r numbers between A and B are kept; with dropout also the input that is left,
    and a byte of mask for each number. With checkpointing, a layer keeps its input only, and one layer at a time is
    computed again.

    Logits: the model's own, a float32 copy where it computes in less, their log-softmax and the gradient, for the
    supervised tokens of a row. The adapter: weights, gradients and AdamW's two moments, in float32.

    An estimate: buffers of the libraries, and what a matrix product takes while it runs, are not in it.
    """
    size = _number_size(config)
    tokens, supervised = _longest_row(config, examples)
    dropout = config.lora.dropout > 0
    frozen = 2 * form.hidden * _SINGLE + (2 * form.queries + 2 * form.keys + 3 * form.inner) * size
    adapted = form.inputs * (_SINGLE + (_SINGLE + 1 if dropout else 0)) + form.rank * _SINGLE
    everything = frozen * form.layers + adapted
    if config.train.checkpointing:
        everything = form.layers * form.hidden * size + everything // form.layers
    quantised = _QUANTISED[config.model.weights]
    weights = form.parameters * size
    if quantised is not None:
        weights = int((form.parameters - form.linear) * size + form.linear * quantised)
    logits = 3 * _SINGLE + (2 * _HALF if size == _HALF else 0)
    return Footprint(
        weights=weights,
        adapter=4 * _SINGLE * form.adapter.parameters,
        activations=tokens * everything,
        logits=supervised * form.vocabulary * logits,
    )


def _number_size(config: Config) -> int:
    """Bytes of a number of the base model, as `common.models` would load it."""
    import torch

    from common.models import dtype_of

    on_cuda = config.model.device != "cpu" and torch.cuda.is_available()
    return int(dtype_of(config.model, torch.device("cuda" if on_cuda else "cpu")).itemsize)


def _longest_row(config: Config, examples: Sequence[Example]) -> tuple[int, int]:
    """Tokens, and supervised tokens, of the longest row that a step could pack."""
    batch = min(config.train.batch_size, len(examples))
    lengths = sorted((len(example.ids) for example in examples), reverse=True)
    supervised = sorted((example.supervised for example in examples), reverse=True)
    most = max(config.train.row_tokens, lengths[0])
    tokens = min(sum(lengths[:batch]), most)
    return tokens, min(sum(supervised[:batch]), tokens)
