"""Memory against what autograd really keeps, and bytes against the messages of a real run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common import config_files
from common.config import Config, LoraConfig, ModelConfig, TrainConfig, named
from common.errors import ModelError
from common.models import load
from common.text import Example, pack
from server.coordinator import Observer, coordinate
from simulations import prepare
from simulations.footprint import bytes_per_round, footprint, form_of
from simulations.institutions import virtual
from simulations.layout import RunDirectory
from simulations.members import InProcessMembers

SMALL = Config(lora=LoraConfig(rank=8, dropout=0.0), train=TrainConfig(batch_size=2))


def examples(*lengths: int) -> list[Example]:
    return [Example((0, *(5 + place % 50 for place in range(length - 1))), length // 2, "", "") for length in lengths]


def kept(config: Config, row: Sequence[Example]) -> tuple[int, int]:
    """Bytes that the backward pass of one row keeps: inside the model, and for the loss."""
    model = load(config.model, config.lora, 1)
    model.peft.train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.peft.parameters()}
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        packed = pack(row)
        logits = model.logits(packed)
        inside = sum(found.values())
        torch.nn.functional.cross_entropy(logits.float(), packed.targets)
    return inside, sum(found.values()) - inside


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["all-linear"]])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_are_those_that_autograd_keeps(targets: list[str], dropout: float) -> None:
    config = replace(SMALL, lora=LoraConfig(rank=8, dropout=dropout, target_modules=targets))
    row = examples(100, 60)
    found = footprint(config, form_of(config), row)
    inside, loss = kept(config, row)
    assert 0.95 * inside < found.activations < 1.25 * inside
    # Besides the log-softmax, which is kept, there are the logits and their gradient.
    assert found.logits == pytest.approx(3 * loss, rel=0.01)


def test_weights_and_adapter_are_those_of_the_model() -> None:
    form = form_of(SMALL)
    model = load(SMALL.model, SMALL.lora, 1)
    assert form.parameters == model.base_parameters
    assert {key: factor.shape for key, factor in form.adapter.factors.items()} == {
        key: factor.shape for key, factor in model.read().factors.items()
    }
    found = footprint(SMALL, form, examples(10))
    assert found.weights == 4 * model.base_parameters
    assert found.adapter == 16 * model.read().parameters
    assert found.total == sum(found.as_dict().values()) - found.total
    assert form.context == 512


def test_what_is_set_for_less_memory_takes_less() -> None:
    form, row = form_of(SMALL), examples(100, 90, 80)
    plain = footprint(SMALL, form, row)
    checkpointed = footprint(replace(SMALL, train=replace(SMALL.train, checkpointing=True)), form, row)
    assert checkpointed.activations < plain.activations / 2
    rows = footprint(replace(SMALL, train=replace(SMALL.train, row_tokens=64)), form, row)
    assert rows.activations == pytest.approx(plain.activations * 100 / 190)  # the longest stays whole
    quantised = footprint(replace(SMALL, model=ModelConfig(weights="4bit")), form, row)
    assert plain.weights / 8 < quantised.weights < plain.weights / 2
    half = footprint(replace(SMALL, model=ModelConfig(dtype="bfloat16")), form, row)
    assert half.weights == plain.weights / 2
    assert half.activations < plain.activations


@pytest.mark.parametrize("method", ["fedavg", "ffa"])
def test_bytes_are_those_of_a_real_round(method: str, tmp_path: Path) -> None:
    config = config_files.load("smoke", [f"federation.method={method}", "federation.rounds=1", "evaluation.exact=[]"])
    place = RunDirectory.at(tmp_path)
    prepare.write(prepare.gather(config.data), place.records(config))
    members = InProcessMembers([virtual(config, place, name, place.records(config)) for name in config.data.names])
    (record,) = coordinate(config, tmp_path, place.central(config, "validation"), members, Observer()).progress.history
    assert bytes_per_round(config, form_of(config)) == {"up": record.bytes_up, "down": record.bytes_down}


def test_a_directory_without_a_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ModelError, match="does not say what form its model has"):
        form_of(
            replace(SMALL, model=ModelConfig(str(tmp_path)), data=replace(SMALL.data, institutions=named("a", "b")))
        )
