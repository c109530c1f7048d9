"""Exact per-document attention over packed rows.

Several documents stand one after the other in one row without padding; each attends to itself only. transformers finds
packed rows by itself only when there is neither a mask nor a cache, and otherwise lets documents see each other in
silence, so the lengths are passed explicitly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from common.errors import ModelError

NAME = "silotune_documents"
_ADDITIONS = ("softcap", "s_aux", "position_bias", "head_mask")


def document_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, heads, s, head_dim]
    key: torch.Tensor,  # [1, key heads, s, head_dim]
    value: torch.Tensor,  # [1, key heads, s, head_dim]
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    document_lengths: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document of a packed row; without `document_lengths`, transformers' own SDPA.

    document_lengths: tokens of each document, in order; they sum to s. sliding_window: a token sees at most so many
    places, its own included (Beltagy et al. 2020, as Mistral has it). Returns [1, s, heads, head_dim].

    Raises ModelError for what some architectures add to attention and SDPA leaves out in silence.
    """
    if more := [name for name in _ADDITIONS if kwargs.get(name) is not None]:
        raise ModelError(f"attention with {more[0]} is not what packed rows compute")
    if document_lengths is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    grouped = query.shape[1] != key.shape[1]
    lengths = list(document_lengths)
    outputs = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        near = None if sliding_window is None or q.shape[2] <= sliding_window else _band(q.shape[2], sliding_window, q)
        causal = near is None
        outputs.append(
            sdpa(q, k, v, attn_mask=near, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=grouped)
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _band(length: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """Bool [length, length]: which places each token sees, the last `window` up to its own."""
    everywhere = torch.ones(length, length, dtype=torch.bool, device=like.device)
    return everywhere.tril() & everywhere.triu(1 - window)


ALL_ATTENTION_FUNCTIONS.register(NAME, document_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
