"""Published adapters at the institution: kept as the coordinator signed them, verified whenever they are used."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.control import check_run
from client.home import ClientHome
from common.adapter import Adapter
from common.base_model import fingerprint, model_directory
from common.config import LoraConfig
from common.enrolment import parse_json, within
from common.errors import ConfigError, ModelError, Refusal, SilotuneError
from common.files import write_directory
from common.messages import ADAPTER_DIGEST_DIFFERS
from common.models import load_adapter, save_adapter
from common.private_files import locked, private_directory, read_file
from common.publication import Publication

PUBLICATION = "publication.json"
CONFIG = "adapter_config.json"

_LIMIT = 1 << 20
# What else PEFT's settings could say, and what it must be for the adapter to compute what was published.
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layers_to_transform": None,
}


@dataclass(frozen=True)
class Kept:
    """A published adapter on this disk. base: what its settings call the base model."""

    publication: Publication
    adapter: Adapter = field(repr=False)
    base: str


def keep(home: ClientHome, publication: Publication, adapter: Adapter, base: str) -> Path:
    """Puts an adapter that was found to be signed under its run's name; the same again changes nothing.

    base: path of the base model, whose last part is written down. What lies there damaged is replaced.

    Raises Refusal(adapter_digest_differs) for another adapter than the one that the publication names, and for one that
    differs from what is kept of that run already; ConfigError for a name that no run has; StorageError.
    """
    directory = home.adapters / check_run(publication.run)
    if adapter.digest() != publication.adapter:
        raise Refusal(ADAPTER_DIGEST_DIFFERS, "the adapter is not the one that the publication names")
    private_directory(home.adapters)
    with locked(home.adapters):
        try:
            there = _read(directory).publication
        except SilotuneError:
            there = None
        if there is None:
            write_directory(directory, lambda folder: _fill(folder, Kept(publication, adapter, Path(base).name)))
        elif there.statement() != publication.statement():
            raise Refusal(ADAPTER_DIGEST_DIFFERS, f"another adapter of run {publication.run} is kept already")
    return directory


def names(home: ClientHome) -> tuple[str, ...]:
    """The runs of which an adapter is kept, in order."""
    found = home.adapters.iterdir() if home.adapters.is_dir() else ()
    return tuple(sorted(entry.name for entry in found if not entry.name.startswith(".")))


def verified(home: ClientHome, run: str, coordinator: bytes) -> Kept:
    """The adapter of a run, after it was found to be what the coordinator with that public key published.

    Raises ConfigError when there is none of that run, ModelError when it was forged or damaged, StorageError when it
    cannot be read.
    """
    directory = home.adapters / check_run(run)
    if not directory.is_dir():
        there = ", ".join(names(home)) or "none at all"
        raise ConfigError(f"expected a run whose adapter is kept here, found {run}; there are: {there}")
    found = _read(directory)
    if not found.publication.verifies(coordinator):
        raise ModelError(
            f"{directory / PUBLICATION}: expected the signature of the trusted roster's coordinator, found another;"
            " the adapter is not used: it was changed or forged, or the coordinator has a new key since, and must hand"
            " it out again"
        )
    return found


def export(kept: Kept, directory: Path, base: str | None) -> Path:
    """Writes a plain PEFT directory, with what the coordinator signed beside it; gives the directory's full path.

    base: what its settings shall call the base model; one that lies there must be the one that was trained on. None for
    its name alone.

    Raises ConfigError when there is something already, ModelError for another base model, StorageError.
    """
    directory = directory.expanduser().resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory}: expected a new or an empty directory, found something there; give another")
    if base is not None:
        base = _checked(base, kept)
    write_directory(directory, lambda folder: _fill(folder, Kept(kept.publication, kept.adapter, base or kept.base)))
    return directory


def _checked(base: str, kept: Kept) -> str:
    """The base model's full path where it lies on this machine; else the word as it was given."""
    if base != "embedded" and not Path(base).expanduser().is_dir():
        return base
    require_base(base, kept)
    return str(model_directory(base).resolve())


def require_base(base: str, kept: Kept) -> None:
    """Raises ModelError unless the base model at that path is the one that the adapter belongs on."""
    differing = fingerprint(base).differences(kept.publication.fingerprint)
    if differing:
        raise ModelError(
            f"{base}: expected the base model that the adapter of {kept.publication.run} was trained on"
            f" ({kept.publication.fingerprint.digest()}), found one that differs in {', '.join(differing)}; give the"
            " directory of that one"
        )


def write_peft(folder: Path, adapter: Adapter, lora: LoraConfig, base: str) -> None:
    """Writes PEFT's two files into a directory that is there. base: what they call the base model."""
    inner = folder / "peft"
    save_adapter(adapter, lora, base, inner)
    for file in sorted(inner.iterdir()):
        file.rename(folder / file.name)
    inner.rmdir()
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    said = {**settings, "base_model_name_or_path": base}
    (folder / CONFIG).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _fill(folder: Path, kept: Kept) -> None:
    write_peft(folder, kept.adapter, kept.publication.lora, kept.base)
    told = json.dumps(kept.publication.to_json(), indent=2)
    (folder / PUBLICATION).write_text(told + "\n", encoding="utf-8")


def _read(directory: Path) -> Kept:
    """What lies there, found to agree with itself; who signed it is not looked at.

    Raises ModelError when its parts do not belong together, ConfigError and StorageError when one cannot be read.
    """
    place = directory / PUBLICATION
    publication = within(place, lambda: Publication.from_json(parse_json(read_file(place, _LIMIT))))
    if publication.run != directory.name:
        raise _damaged(directory, f"the publication of run {directory.name}", f"that of {publication.run!r:.80}")
    settings = directory / CONFIG
    found = within(settings, lambda: parse_json(read_file(settings, _LIMIT)))
    base = _base(found, publication.lora)
    if base is None:
        raise _damaged(settings, "the settings of the adapter that the coordinator signed", "others")
    adapter = load_adapter(directory)
    if adapter.digest() != publication.adapter:
        raise _damaged(directory, "the very numbers that the coordinator signed", "others")
    return Kept(publication, adapter, base)


def _base(settings: object, lora: LoraConfig) -> str | None:
    """What PEFT's settings call the base model; None when they say anything else of the adapter than `lora`."""
    if not isinstance(settings, dict):
        return None
    modules = settings.get("target_modules")
    wanted = {**_PLAIN, "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    right = all(settings.get(key, value) == value for key, value in wanted.items())
    if lora.target_modules == ["all-linear"]:
        right = right and (modules == "all-linear" or isinstance(modules, list))  # PEFT may write the names it found
    else:
        right = right and isinstance(modules, list) and sorted(map(str, modules)) == sorted(lora.target_modules)
    base = settings.get("base_model_name_or_path")
    return base if right and isinstance(base, str) else None


def _damaged(place: Path, expected: str, found: str) -> ModelError:
    return ModelError(
        f"{place}: expected {expected}, found {found}; it was damaged or changed and is not used: remove the directory,"
        " and ask the coordinator to hand the adapter out again"
    )
