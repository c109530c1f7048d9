"""Documents packed into one row must be as strangers: neither forwards nor backwards may one reach another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from common.attention import document_attention
from common.errors import ModelError
from common.models import LoraModel
from common.text import Example, Pack, pack

LENGTHS = (7, 2, 12, 9)
Examples = Callable[..., list[Example]]


def logits_by_document(model: LoraModel, row: Pack) -> list[torch.Tensor]:
    """Logits of every place of every document."""
    everywhere = torch.arange(sum(row.lengths))
    with torch.no_grad():
        return list(model.logits(replace(row, predict=everywhere)).split(list(row.lengths)))


def changed(examples: list[Example], index: int, other: list[Example]) -> list[Example]:
    return [*examples[:index], other[index], *examples[index + 1 :]]


@pytest.mark.parametrize("index", range(len(LENGTHS)))
def test_another_documents_tokens_change_nothing(model: LoraModel, random_examples: Examples, index: int) -> None:
    examples = random_examples(LENGTHS)
    before = logits_by_document(model, pack(examples))
    after = logits_by_document(model, pack(changed(examples, index, random_examples(LENGTHS, seed=4))))
    for document, (old, new) in enumerate(zip(before, after, strict=True)):
        if document == index:
            assert (old[1:] - new[1:]).abs().max() > 0.1  # the logits do hang on the tokens
        else:
            assert torch.equal(old, new)


@pytest.mark.parametrize("lengths", [(), (3,), (40,), (1, 30, 2)])
def test_what_stands_before_and_after_a_document_changes_nothing(
    model: LoraModel, random_examples: Examples, lengths: tuple[int, ...]
) -> None:
    document, others = random_examples((12,))[0], random_examples(lengths, seed=5)
    alone = logits_by_document(model, pack([document]))[0]
    for place in range(len(others) + 1):
        packed = logits_by_document(model, pack([*others[:place], document, *others[place:]]))[place]
        # Matrices of another height are multiplied in another order: a few float32 steps of logits of about 10.
        assert torch.allclose(packed, alone, rtol=0, atol=2e-5)


def test_without_lengths_documents_would_be_seen(model: LoraModel, random_examples: Examples) -> None:
    """The tests above have eyes: in one document of the same tokens they find the influence."""
    examples = random_examples(LENGTHS)
    others = changed(examples, 0, random_examples(LENGTHS, seed=4))
    rows = [replace(pack(found), lengths=(sum(LENGTHS),)) for found in (examples, others)]
    before, after = (logits_by_document(model, row)[0] for row in rows)
    assert (before[LENGTHS[0] :] - after[LENGTHS[0] :]).abs().max() > 0.1


@pytest.mark.parametrize("index", range(len(LENGTHS)))
def test_a_documents_loss_reaches_no_other_documents_embeddings(
    model: LoraModel, random_examples: Examples, index: int
) -> None:
    leaves: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    row = pack(random_examples(LENGTHS))
    places = torch.arange(sum(LENGTHS)).split(list(LENGTHS))[index][:-1]
    handle = model.peft.get_input_embeddings().register_forward_hook(keep)
    model.peft.train()
    try:
        logits = model.logits(replace(row, predict=places))
    finally:
        model.peft.eval()
        handle.remove()
    torch.nn.functional.cross_entropy(logits, row.ids[0][places + 1]).backward()
    gradients = leaves[0].grad
    assert gradients is not None
    for document, gradient in enumerate(gradients[0].split(list(LENGTHS))):
        # The last token is predicted and predicts nothing.
        assert bool((gradient[:-1] != 0).any()) == (document == index)
        assert not gradient[-1].any()
    for parameter in model.parameters.values():
        parameter.grad = None


@pytest.mark.parametrize("seed", range(3))
def test_packed_loss_is_stock_transformers_loss_of_one_document_at_a_time(
    base_path: Path, model: LoraModel, random_examples: Examples, seed: int
) -> None:
    stock = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32).eval()
    examples = random_examples((5, 30, 2, 17, 9), seed)
    row = pack(examples)
    with torch.no_grad(), model.peft.disable_adapter():
        losses = torch.nn.functional.cross_entropy(model.logits(row), row.targets, reduction="none")
        expected = []
        for example in examples:
            ids = torch.tensor([example.ids])
            labels = ids.clone()
            labels[0, : example.prompt_tokens] = -100
            expected.append(float(stock(ids, labels=labels).loss) * example.supervised)
    found = [float(part.sum()) for part in losses.split([example.supervised for example in examples])]
    assert found == pytest.approx(expected, rel=1e-5)  # float32 sums of up to 15 losses


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (4, 1)]),
    scaling=st.sampled_from([None, 0.1, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_attention_is_softmax_over_the_earlier_places_of_the_same_document(
    lengths: list[int], heads: tuple[int, int], scaling: float | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size, s = 8, sum(lengths)
    query, key, value = (
        torch.randn(1, count, s, size, generator=generator, dtype=torch.float64) for count in (heads[0], *heads[1:] * 2)
    )
    output, weights = document_attention(
        torch.nn.Module(), query, key, value, None, scaling=scaling, document_lengths=tuple(lengths)
    )
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    allowed = (document[:, None] == document) & (torch.arange(s)[:, None] >= torch.arange(s))
    shared = heads[0] // heads[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = query @ key.transpose(2, 3) * (size**-0.5 if scaling is None else scaling)
    expected = torch.where(allowed, scores, -torch.inf).softmax(-1) @ value
    assert weights is None
    assert torch.allclose(output, expected.transpose(1, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("lengths", [(3, 3), (3, 5), (8,)])
def test_lengths_that_do_not_cover_the_row_are_an_error(lengths: tuple[int, ...]) -> None:
    tensor = torch.zeros(1, 2, 7, 4)
    with pytest.raises(RuntimeError, match="split_sizes"):
        document_attention(torch.nn.Module(), tensor, tensor, tensor, None, document_lengths=lengths)


def test_without_lengths_it_is_what_transformers_computes(
    base_path: Path, model: LoraModel, random_examples: Examples
) -> None:
    """Padding at the left and all, as in generation."""
    stock = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32, attn_implementation="eager").eval()
    long, short = (example.ids for example in random_examples((9, 5)))
    ids = torch.tensor([long, (2, 2, 2, 2, *short)])
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    with torch.no_grad(), model.peft.disable_adapter():
        found = model.peft(input_ids=ids, attention_mask=mask).logits
        expected = stock(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(found[0], expected[0], rtol=0, atol=2e-5)
    assert torch.allclose(found[1, 4:], expected[1, 4:], rtol=0, atol=2e-5)


@pytest.mark.parametrize("window", [1, 3, 7, 50])
def test_a_sliding_window_ends_at_the_documents_beginning(window: int) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = (7, 2, 12)
    query, key, value = (torch.randn(1, 2, sum(lengths), 8, generator=generator) for _ in range(3))
    found, _ = document_attention(
        torch.nn.Module(), query, key, value, None, scaling=0.5, sliding_window=window, document_lengths=lengths
    )
    begin = 0
    for length in lengths:
        for place in range(begin, begin + length):
            first = max(begin, place - window + 1)
            scores = 0.5 * torch.einsum("hd,hsd->hs", query[0, :, place], key[0, :, first : place + 1])
            expected = torch.einsum("hs,hsd->hd", scores.softmax(-1), value[0, :, first : place + 1])
            assert torch.allclose(found[0, place], expected, atol=1e-6)
        begin += length


@pytest.mark.parametrize("addition", ["softcap", "s_aux"])
def test_what_would_be_left_out_in_silence_is_refused(addition: str) -> None:
    states = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ModelError, match=addition):
        document_attention(torch.nn.Module(), states, states, states, None, **{addition: 50.0})
