"""Published adapters at the institution: kept whole, never exchanged, and used only as the coordinator signed them."""

from __future__ import annotations

import json
import os
import signal
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import client.main
from client import adapters, trust
from client.adapters import CONFIG, PUBLICATION
from client.home import ClientHome
from common.adapter import Adapter
from common.base_model import fingerprint
from common.config import LoraConfig
from common.errors import ConfigError, ModelError, Refusal, StorageError
from common.messages import ADAPTER_DIGEST_DIFFERS
from common.models import LoraModel
from common.publication import Publication
from common.secagg.identity import Identity
from common.text import pack
from tests.client.conftest import make_records, tokenised, write_base_model
from tests.client.enrolled import Enrolled, enrol

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0)
RUN = "night-2030.01"
TENSORS = "adapter_model.safetensors"


def learnt(start: Adapter, seed: int = 1) -> Adapter:
    """An adapter of the same form that does something."""
    rng = np.random.default_rng(seed)
    return Adapter({key: rng.normal(0, 0.3, factor.shape) for key, factor in start.factors.items()})


@pytest.fixture(scope="module")
def institution(base_model: str, tmp_path_factory: pytest.TempPathFactory) -> Enrolled:
    return enrol(tmp_path_factory.mktemp("institution"), base_model)


@pytest.fixture
def here(institution: Enrolled, tmp_path: Path) -> Enrolled:
    """The same institution with an empty shelf."""
    for name in adapters.names(institution.home):
        move_away(institution.home.adapters / name, tmp_path)
    return institution


def move_away(path: Path, to: Path) -> None:
    if path.is_dir():
        path.chmod(0o700)
    path.rename(to / f"was-{path.name}")


def publication(here: Enrolled, base_model: str, adapter: Adapter, run: str = RUN, **changes: Any) -> Publication:
    made = Publication(run, 7, fingerprint(base_model), LORA, adapter.digest())
    return replace(made, **changes).signed(here.coordinator)


@pytest.fixture
def kept(here: Enrolled, base_model: str, start: Adapter) -> Path:
    """The directory of an adapter that was kept."""
    adapter = learnt(start)
    return adapters.keep(here.home, publication(here, base_model, adapter), adapter, base_model)


def key_of(here: Enrolled) -> bytes:
    return trust.pinned(here.home).coordinator


# --- Keeping ----------------------------------------------------------------------------------------------------------


def test_what_is_kept_is_what_was_published(here: Enrolled, kept: Path, base_model: str, start: Adapter) -> None:
    assert kept == here.home.adapters / RUN
    assert sorted(file.name for file in kept.iterdir()) == sorted([CONFIG, TENSORS, PUBLICATION])
    found = adapters.verified(here.home, RUN, key_of(here))
    assert found.adapter.digest() == learnt(start).digest()
    assert found.publication == publication(here, base_model, learnt(start))
    assert found.base == Path(base_model).name
    assert base_model not in (kept / CONFIG).read_text()
    assert stat.S_IMODE(here.home.adapters.stat().st_mode) == 0o700
    assert adapters.names(here.home) == (RUN,)


def test_the_same_again_changes_nothing(here: Enrolled, kept: Path, base_model: str, start: Adapter) -> None:
    before = {file.name: (file.stat().st_ino, file.read_bytes()) for file in kept.iterdir()}
    adapter = learnt(start)
    assert adapters.keep(here.home, publication(here, base_model, adapter), adapter, base_model) == kept
    assert {file.name: (file.stat().st_ino, file.read_bytes()) for file in kept.iterdir()} == before


@pytest.mark.parametrize("changes", [{"round": 8}, {"lora": replace(LORA, alpha=16.0)}, {}])
def test_another_adapter_of_the_same_run_is_refused(
    here: Enrolled, kept: Path, base_model: str, start: Adapter, changes: dict[str, Any]
) -> None:
    adapter = learnt(start, seed=1 if changes else 2)
    with pytest.raises(Refusal, match="is kept already") as refused:
        adapters.keep(here.home, publication(here, base_model, adapter, **changes), adapter, base_model)
    assert refused.value.reason == ADAPTER_DIGEST_DIFFERS
    assert adapters.verified(here.home, RUN, key_of(here)).adapter.digest() == learnt(start).digest()


def test_an_adapter_that_the_publication_does_not_name_is_refused(
    here: Enrolled, base_model: str, start: Adapter
) -> None:
    with pytest.raises(Refusal, match=ADAPTER_DIGEST_DIFFERS):
        adapters.keep(here.home, publication(here, base_model, learnt(start)), learnt(start, seed=2), base_model)
    assert adapters.names(here.home) == ()


HOSTILE = ["", ".", "..", "../out", "a/b", "/tmp/out", ".hidden", "a\n", "a\0", "-a", "x" * 201, "café"]


@pytest.mark.parametrize("run", HOSTILE)
def test_a_name_that_leads_elsewhere_is_refused(here: Enrolled, base_model: str, start: Adapter, run: str) -> None:
    adapter = learnt(start)
    with pytest.raises(ConfigError, match="expected the name of a run"):
        adapters.keep(here.home, publication(here, base_model, adapter, run=run), adapter, base_model)
    with pytest.raises(ConfigError, match="expected the name of a run"):
        adapters.verified(here.home, run, key_of(here))
    assert adapters.names(here.home) == ()


@pytest.mark.parametrize("calls", [1, 2, 3, 4])
def test_a_disk_that_fails_leaves_nothing_half(
    here: Enrolled, base_model: str, start: Adapter, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    real, left = Path.rename, [calls]

    def failing(path: Path, target: Any) -> Path:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(28, "No space left on device")
        return real(path, target)

    adapter = learnt(start)
    said = publication(here, base_model, adapter)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(StorageError, match="No space left"):
        adapters.keep(here.home, said, adapter, base_model)
    monkeypatch.undo()
    assert adapters.names(here.home) == ()
    adapters.keep(here.home, said, adapter, base_model)
    assert adapters.names(here.home) == (RUN,)


def test_a_process_that_is_killed_leaves_nothing_half(here: Enrolled, base_model: str, start: Adapter) -> None:
    adapter = learnt(start)
    said = publication(here, base_model, adapter)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a copy of a process with threads may wait for one that it does not have
        real = Path.rename

        def dying(path: Path, target: Any) -> Path:
            if Path(target).name == RUN:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(path, target)

        Path.rename = dying  # type: ignore[method-assign]
        try:
            adapters.keep(here.home, said, adapter, base_model)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    assert adapters.names(here.home) == ()
    adapters.keep(here.home, said, adapter, base_model)
    assert adapters.verified(here.home, RUN, key_of(here)).adapter.digest() == adapter.digest()
    assert [entry.name for entry in here.home.adapters.iterdir() if entry.name.startswith(f".{RUN}")] == []


# --- Verifying --------------------------------------------------------------------------------------------------------


def change(file: Path, how: Callable[[dict[str, Any]], object]) -> None:
    found = json.loads(file.read_text())
    how(found)
    file.write_text(json.dumps(found))


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(bytes(data))


def forged(here: Enrolled, kept: Path, start: Adapter) -> None:
    """All files agree with each other, and somebody else signed."""
    adapter = learnt(start, seed=3)
    found = adapters.verified(here.home, RUN, key_of(here))
    said = replace(found.publication, adapter=adapter.digest()).signed(Identity.generate("coordinator"))
    for file in list(kept.iterdir()):
        file.unlink()
    adapters._fill(kept, replace(found, publication=said, adapter=adapter))


def unsigned(here: Enrolled, kept: Path, start: Adapter) -> None:
    """The coordinator's signature of one adapter under another."""
    adapter = learnt(start, seed=3)
    found = adapters.verified(here.home, RUN, key_of(here))
    for file in list(kept.iterdir()):
        file.unlink()
    said = replace(found.publication, adapter=adapter.digest())
    adapters._fill(kept, replace(found, publication=said, adapter=adapter))


def swapped(here: Enrolled, kept: Path, start: Adapter) -> None:
    """What the coordinator did sign, of another run."""
    found = adapters.verified(here.home, RUN, key_of(here))
    for file in list(kept.iterdir()):
        file.unlink()
    adapters._fill(kept, replace(found, publication=replace(found.publication, run="other").signed(here.coordinator)))


DAMAGES: dict[str, Callable[[Enrolled, Path, Adapter], object]] = {
    "a bit of the numbers": lambda here, kept, start: flip(kept / TENSORS, -5),
    "a bit of their header": lambda here, kept, start: flip(kept / TENSORS, 12),
    "no numbers": lambda here, kept, start: (kept / TENSORS).unlink(),
    "half of the numbers": lambda here, kept, start: (kept / TENSORS).write_bytes((kept / TENSORS).read_bytes()[:900]),
    "no publication": lambda here, kept, start: (kept / PUBLICATION).unlink(),
    "half a publication": lambda here, kept, start: (kept / PUBLICATION).write_text("{"),
    "another round": lambda here, kept, start: change(kept / PUBLICATION, lambda said: said.update(round=8)),
    "another scale": lambda here, kept, start: change(kept / PUBLICATION, lambda said: said["lora"].update(alpha=9.0)),
    "another base": lambda here, kept, start: change(
        kept / PUBLICATION, lambda said: said["fingerprint"].update(weights="0" * 64)
    ),
    "another signature": lambda here, kept, start: change(
        kept / PUBLICATION, lambda said: said.update(signature="00" * 64)
    ),
    "another run's": lambda here, kept, start: change(kept / PUBLICATION, lambda said: said.update(run="other")),
    "settings of another scale": lambda here, kept, start: change(
        kept / CONFIG, lambda said: said.update(lora_alpha=9)
    ),
    "settings of other places": lambda here, kept, start: change(
        kept / CONFIG, lambda said: said.update(target_modules=["q_proj"])
    ),
    "settings with a trick": lambda here, kept, start: change(
        kept / CONFIG, lambda said: said.update(alpha_pattern={"q_proj": 80})
    ),
    "no settings": lambda here, kept, start: (kept / CONFIG).unlink(),
    "forged": forged,
    "unsigned": unsigned,
    "swapped": swapped,
}


def silotune(*arguments: object) -> Result:
    return CliRunner().invoke(client.main.app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_or_forged_adapter_is_never_used(
    here: Enrolled, kept: Path, start: Adapter, tmp_path: Path, damage: Callable[[Enrolled, Path, Adapter], object]
) -> None:
    damage(here, kept, start)
    out, home = tmp_path / "out", here.home.root
    for command in (("export", RUN, out), ("evaluate", RUN, "--no-local", "--data-set", "notes")):
        result = silotune("adapter", *command, "--home", home)
        assert result.exit_code in (2, 4, 5), result.output
        assert str(kept) in result.stderr
        assert "expected" in result.stderr or "cannot be read" in result.stderr
        assert "perplexity" not in result.output
    assert not out.exists()
    listed = silotune("adapter", "list", "--home", home, "--json")
    assert listed.exit_code == 4
    (told,) = json.loads(listed.stdout)["adapters"]
    assert (told["run"], told["verified"]) == (RUN, False)
    assert "REFUSED" in silotune("adapter", "list", "--home", home).stdout


@pytest.mark.parametrize("damage", ["a bit of the numbers", "no publication", "no settings", "half of the numbers"])
def test_a_damaged_adapter_is_mended_when_it_is_handed_out_again(
    here: Enrolled, kept: Path, base_model: str, start: Adapter, damage: str
) -> None:
    DAMAGES[damage](here, kept, start)
    adapter = learnt(start)
    adapters.keep(here.home, publication(here, base_model, adapter), adapter, base_model)
    assert adapters.verified(here.home, RUN, key_of(here)).adapter.digest() == adapter.digest()


def test_a_run_that_is_not_there_is_told_with_those_that_are(here: Enrolled, kept: Path) -> None:
    with pytest.raises(ConfigError, match=f"found other; there are: {RUN}"):
        adapters.verified(here.home, "other", key_of(here))


def test_without_a_trusted_roster_nothing_is_shown(base_model: str, tmp_path: Path) -> None:
    here = enrol(tmp_path, base_model)
    here.home.roster.unlink()
    result = silotune("adapter", "list", "--home", here.home.root)
    assert result.exit_code == 2
    assert "silotune-client trust ROSTER" in result.stderr


def test_an_empty_shelf_is_no_error(here: Enrolled) -> None:
    result = silotune("adapter", "list", "--home", here.home.root)
    assert result.exit_code == 0
    assert "no adapter is kept" in result.stdout
    assert adapters.names(ClientHome(here.home.root / "nowhere")) == ()


def test_a_list_tells_what_each_is(here: Enrolled, kept: Path, start: Adapter, base_model: str) -> None:
    assert "verified" in silotune("adapter", "list", "--home", here.home.root).stdout
    (told,) = json.loads(silotune("adapter", "list", "--home", here.home.root, "--json").stdout)["adapters"]
    assert told == {
        "run": RUN,
        "verified": True,
        "round": 7,
        "rank": 4,
        "parameters": start.parameters,
        "base_model": fingerprint(base_model).digest(),
        "adapter": learnt(start).digest(),
    }


# --- Exporting --------------------------------------------------------------------------------------------------------


def test_what_is_exported_is_plain_peft(
    here: Enrolled, kept: Path, base_model: str, start: Adapter, lora_model: LoraModel, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    result = silotune("adapter", "export", RUN, out, "--base", base_model, "--home", here.home.root, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["directory"] == str(out)
    assert json.loads((out / CONFIG).read_text())["base_model_name_or_path"] == str(Path(base_model).resolve())
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_model), out).eval()
    (example,) = tokenised(make_records(1, "probe"), lora_model)
    ids = torch.tensor([example.ids])
    with torch.inference_mode():
        found = loaded(input_ids=ids).logits[0]
        with loaded.disable_adapter():
            base = loaded(input_ids=ids).logits[0]
        lora_model.write(learnt(start))
        ours = lora_model.logits(pack([example]))
    assert torch.allclose(found[pack([example]).predict], ours, atol=1e-4)
    assert not torch.allclose(found, base, atol=1e-2)


def test_without_a_path_the_base_model_has_its_name_alone(here: Enrolled, kept: Path, tmp_path: Path) -> None:
    written = adapters.export(adapters.verified(here.home, RUN, key_of(here)), tmp_path / "deep" / "out", None)
    said = json.loads((written / CONFIG).read_text())
    assert said["base_model_name_or_path"] == json.loads((kept / CONFIG).read_text())["base_model_name_or_path"]
    assert "/" not in said["base_model_name_or_path"]


def test_a_base_model_elsewhere_is_written_as_given(here: Enrolled, kept: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    found = adapters.verified(here.home, RUN, key_of(here))
    written = adapters.export(found, tmp_path / "empty", "/models/on/another/machine")
    assert json.loads((written / CONFIG).read_text())["base_model_name_or_path"] == "/models/on/another/machine"


def test_another_base_model_is_refused(here: Enrolled, kept: Path, tmp_path: Path) -> None:
    other = write_base_model(tmp_path / "other", seed=99)
    with pytest.raises(ModelError, match="one that differs in weights"):
        adapters.export(adapters.verified(here.home, RUN, key_of(here)), tmp_path / "out", str(other))
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(here: Enrolled, kept: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    found = adapters.verified(here.home, RUN, key_of(here))
    for place in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(ConfigError, match="expected a new or an empty directory"):
            adapters.export(found, place, None)
    assert (tmp_path / "mine.txt").read_text() == "mine"
