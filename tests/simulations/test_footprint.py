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
from simulations.identities import SimulatedIdentities
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


@pytest.mark.parametrize("institutions", [3, 5])
@pytest.mark.parametrize("method", ["fedavg", "ffa"])
@pytest.mark.parametrize("secure", [True, False])
def test_bytes_are_those_of_a_real_round(secure: bool, method: str, institutions: int, tmp_path: Path) -> None:
    names = ["riverside", "northgate", "lakeside", "summit", "kingsbridge"][:institutions]
    changes = [
        f"federation.method={method}",
        f"secure_aggregation.enabled={secure}".lower(),
        f"data.institutions=[{','.join(names)}]",
        f"data.train_records={[8] * institutions}",
        "federation.rounds=1",
        "evaluation.exact=[]",
    ]
    config = config_files.load("smoke", changes)
    place = RunDirectory.at(tmp_path)
    prepare.write(prepare.gather(config.data), place.records(config))
    identities = SimulatedIdentities.fresh(config.data.names) if secure else None
    members = InProcessMembers(
        [virtual(config, place, name, place.records(config), identities) for name in config.data.names]
    )
    roster = identities.roster() if identities else None
    validation = place.central(config, "validation")
    (record,) = coordinate(config, tmp_path, validation, members, Observer(), roster=roster).progress.history
    found = bytes_per_round(config, form_of(config))
    # Numbers in JSON differ by a few digits; arrays and keys are to the byte.
    for told, real in ((found["up"], record.bytes_up), (found["down"], record.bytes_down)):
        assert abs(told - real) <= min(0.01 * real, 300)


def test_what_protects_an_update_costs_bytes_that_grow_with_the_cohort() -> None:
    def cost(count: int, secure: bool) -> dict[str, int]:
        names = ",".join(f"n{number:02d}" for number in range(count))
        changes = [
            f"data.institutions=[{names}]", "data.train_records=[]", "data.generator=", "data.directory=/unused",
            f"secure_aggregation.enabled={secure}".lower(),
        ]  # fmt: skip
        config = config_files.load("smoke", changes)
        return bytes_per_round(config, form_of(config))

    more = {
        count: {way: cost(count, True)[way] - cost(count, False)[way] for way in ("up", "down")} for count in (5, 9)
    }
    for way in ("up", "down"):
        each = (more[9][way] - more[5][way]) / 4
        # For every other member at least its keys (1216 bytes each) or a part sealed to one of them, in base64.
        assert 1216 * 4 / 3 < each < 10 * 1216
        assert more[5][way] > 4 * each * 0.9


def test_a_directory_without_a_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ModelError, match="does not say what form its model has"):
        form_of(
            replace(SMALL, model=ModelConfig(str(tmp_path)), data=replace(SMALL.data, institutions=named("a", "b")))
        )
