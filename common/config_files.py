"""Reading configurations from YAML and overrides through OmegaConf, and writing them.

All mistakes of a file and its overrides are told at once. OmegaConf is imported only when something is loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args, get_type_hints

from common.config import Config, InstitutionConfig
from common.config_rules import RULES, impossible, short
from common.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig, ValueNode

# One source of values: nested dicts, with references to other keys not yet resolved.
Layer = dict[Any, Any]

_UNDER_PRIVACY: Mapping[str, Any] = {"lora.dropout": 0.0, "federation.weighting": "uniform"}
"""What is left out means this under differential privacy, in place of the default."""

_KEY = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
_REFERENCE = r"\$\{" + _KEY + r"\}"


def configs_dir() -> Path:
    """The folder with the shipped YAML files: inside this package in a wheel, beside it in a checkout.

    Raises:
        ConfigError: the installation holds neither.
    """
    package = Path(__file__).resolve().parent
    checkout = package.parent
    if (package / "configs").is_dir():
        return package / "configs"
    if (checkout / "configs").is_dir() and (checkout / "pyproject.toml").is_file():
        return checkout / "configs"
    raise ConfigError(
        f"the shipped configurations are missing: neither {package / 'configs'} nor {checkout / 'configs'} is there;"
        " install Silotune again, or name a YAML file by its path"
    )


def load(name_or_path: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of one run, complete and valid.

    Args:
        name_or_path: the name of a shipped configuration (`hospitals`), or the path of a YAML file.
        overrides: `key=value`, keys in full (`train.batch_size=8`), values in YAML; later ones win.

    Raises:
        ConfigError: with every mistake, one a line.
    """
    path = _locate(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    return parse(text, source=str(path), overrides=overrides)


def parse(text: str, source: str, overrides: Sequence[str] = ()) -> Config:
    """As `load`, from YAML text; `source` is what error messages call it."""
    document, mistakes = _read_document(text)
    layers, unreadable = _read_overrides(overrides)
    mistakes += unreadable
    for layer in [document or {}, *layers]:
        mistakes += _misplaced(layer, Config)
    values: dict[str, Any] = {}
    if document is not None:  # Without it, every field that has no default would be told as missing.
        values, misread = _read_values([document, *layers])
        if values.get("privacy.mode", "none") != "none":
            values |= {key: fit for key, fit in _UNDER_PRIVACY.items() if not _said(key, [document, *layers])}
        mistakes += misread + impossible(values)
    if mistakes:
        sources = f"{source} and overrides" if overrides else source
        counted = f"{len(mistakes)} mistakes" if len(mistakes) > 1 else "1 mistake"
        raise ConfigError("\n  ".join([f"{sources}: {counted}", *mistakes]))
    return _build(values)


def _said(key: str, layers: Sequence[Layer]) -> bool:
    """Whether any of the layers gives this key a value."""

    def there(layer: object, parts: list[str]) -> bool:
        return not parts or (isinstance(layer, dict) and parts[0] in layer and there(layer[parts[0]], parts[1:]))

    return any(there(layer, key.split(".")) for layer in layers)


def validate(config: Config) -> None:
    """Check a configuration that was built in code; `load` and `parse` have already done so.

    Raises:
        ConfigError: with every impossible value, one a line.
    """
    mistakes = impossible({key: reduce(getattr, key.split("."), config) for key in _kinds(Config)})
    if mistakes:
        raise ConfigError("\n  ".join([f"configuration {config.name!r} cannot be meant", *mistakes]))


def to_yaml(config: Config) -> str:
    """Every field, defaults included; `parse` gives the equal configuration back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(_plain(config)))


def digest(config: Config) -> str:
    """SHA-256 (hex) over canonical JSON: equal for equal configurations, whatever file or overrides they came from.

    Where curves are sent changes no result, and is left out: a run can be resumed when such a service is gone.
    """
    plain = {name: section for name, section in _plain(config).items() if name != "tracking"}
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _plain(config: Config) -> dict[str, Any]:
    """Nested dicts in declaration order; an int given where a float is declared becomes one, so that digests agree."""

    def convert(value: Any, kind: object) -> Any:
        if isinstance(value, InstitutionConfig):
            return value.brief()
        if dataclasses.is_dataclass(value):
            kinds = get_type_hints(type(value))
            return {name: convert(getattr(value, name), kinds[name]) for name in kinds}
        if isinstance(value, list):
            return [convert(part, get_args(kind)[0]) for part in value]
        return float(value) if kind is float else value

    plain: dict[str, Any] = convert(config, Config)
    return plain


def _build(values: Mapping[str, Any]) -> Config:
    def section(kind: type, prefix: str) -> Any:
        return kind(
            **{
                name: section(cast(type, hint), f"{prefix}{name}.")
                if dataclasses.is_dataclass(hint)
                else values[f"{prefix}{name}"]
                for name, hint in get_type_hints(kind).items()
            }
        )

    config = section(Config, "")
    assert isinstance(config, Config)
    return config


def _locate(name_or_path: str) -> Path:
    shipped = configs_dir()
    names = sorted(path.relative_to(shipped).with_suffix("").as_posix() for path in shipped.rglob("*.yaml"))
    # A name means the shipped file even where a file of that name happens to lie around.
    if name_or_path in names:
        return shipped / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    if path.is_file():
        return path
    hint = f"the shipped configurations are {', '.join(names)}"
    if "/" in name_or_path or path.suffix in (".yaml", ".yml"):
        raise ConfigError(f"no such file: {name_or_path!r}; give the path of a YAML file, or a name: {hint}")
    close = difflib.get_close_matches(name_or_path, names, 1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    raise ConfigError(f"no configuration is called {name_or_path!r}{meant}; {hint}; or give the path of a YAML file")


def _read_document(text: str) -> tuple[Layer | None, list[str]]:
    """The file's layer, or none and the line that says why."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except yaml.MarkedYAMLError as error:
        where = error.problem_mark or error.context_mark
        line = f"line {where.line + 1}, column {where.column + 1}: " if where else ""
        return None, [f"{line}not valid YAML: {error.problem or error.context}"]
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        return None, [f"not valid YAML: {_one_line(error)}"]
    if not isinstance(tree, dict):
        return None, ["expected sections such as `train:` at the top level, found a list"]
    return tree, []


def _read_overrides(overrides: Sequence[str]) -> tuple[list[Layer], list[str]]:
    """A layer for each override, and one line for each that cannot be read."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    layers: list[Layer] = []
    mistakes = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            mistakes.append(f"override {override!r}: no `=` in it; write key=value, such as train.batch_size=8")
        elif not re.fullmatch(_KEY, key):
            mistakes.append(f"override {override!r}: {key!r} is no key; write it in full, such as train.batch_size=8")
        else:
            # YAML reads nothing at all as null; here it is the empty text, as in `data.generator=`.
            readable = override if value.strip() else f"{key}=''"
            try:
                layers.append(cast(Layer, OmegaConf.to_container(OmegaConf.from_dotlist([readable]), resolve=False)))
            except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
                mistakes.append(f"override {override!r}: its value is not valid YAML: {_one_line(error)}")
    return layers, mistakes


def _misplaced(layer: object, section: type, prefix: str = "") -> Iterator[str]:
    """One line for each key that its section does not have, and for each section that is not one."""
    kinds = get_type_hints(section)
    if not isinstance(layer, dict):
        yield f"{prefix.rstrip('.')}: found {short(layer)}; allowed: a section with the keys {', '.join(kinds)}"
        return
    for name, value in layer.items():
        key = f"{prefix}{name}"
        if name not in kinds:
            for unknown in _flatten({name: value}, prefix):
                yield f"{unknown}: unknown key; the nearest known one is {_nearest(unknown)}"
        elif dataclasses.is_dataclass(kinds[name]):
            yield from _misplaced(value, kinds[name], f"{key}.")


def _read_values(layers: Sequence[Layer]) -> tuple[dict[str, Any], list[str]]:
    """The value of every field by its full key, and one line for each that has none of its type."""
    from omegaconf import OmegaConf

    merged: Layer = _plain(Config())
    for layer in layers:
        merged = _merge(merged, layer)
    # Resolvers such as oc.env would copy secrets of this machine into files that are shown to others. While there is
    # one anywhere, nothing is resolved: another key might refer to it.
    safe = not _calls_resolver(merged)
    tree = OmegaConf.create(merged if safe else {})
    values = {}
    mistakes = []
    for key, kind in _kinds(Config).items():
        *sections, leaf = key.split(".")
        section: object = merged
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if not isinstance(section, dict) or leaf not in section:
            continue  # its section is not one, which `_misplaced` has told
        raw = section[leaf]
        try:
            if _calls_resolver(raw):
                raise _MisreadError(f"found {short(raw)}, but only references to other keys, such as ${{seed}}, work")
            if safe or not _refers(raw):
                values[key] = _convert(_dereference(raw, key, tree), kind)
        except _MisreadError as error:
            mistakes.append(f"{key}: {error}; allowed: {RULES[key].allowed}")
    return values, mistakes


def _merge(below: Layer, above: Layer) -> Layer:
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(name), dict)
        merged[name] = _merge(below[name], value) if both else value
    return merged


class _MisreadError(Exception):
    """Why a field has no value of its type, as the middle of a line: `key: ...; allowed: ...`."""


def _refers(value: object) -> bool:
    return any("${" in text for text in _texts(value))


def _calls_resolver(value: object) -> bool:
    """Whether anything is left that OmegaConf would interpolate once plain references to keys are taken out."""
    return any("${" in re.sub(_REFERENCE, "", text) for text in _texts(value))


def _dereference(raw: object, key: str, tree: DictConfig) -> object:
    """The value with references such as `${train.learning_rate}` replaced by what they name.

    Raises:
        _MisreadError: a reference is circular or names nothing.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not _refers(raw):
        return raw
    try:
        found = OmegaConf.select(tree, key)
        value = OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
    except (OmegaConfBaseException, RecursionError) as error:
        raise _MisreadError(f"found {short(raw)}, which cannot be resolved ({_one_line(error)})") from error
    if _refers(value):
        raise _MisreadError(f"found {short(raw)}, which gives another reference")
    return value


def _convert(value: object, kind: object) -> object:
    """The value in a field's type by OmegaConf's rules; a list may also be text with commas.

    Raises:
        _MisreadError: it cannot be converted without loss.
    """
    from omegaconf import BooleanNode, FloatNode, IntegerNode, StringNode
    from omegaconf.errors import OmegaConfBaseException

    nodes: dict[object, ValueNode] = {int: IntegerNode(), float: FloatNode(), str: StringNode(), bool: BooleanNode()}

    def single(part: object, kind: object) -> object:
        if dataclasses.is_dataclass(kind) and isinstance(part, str | dict):
            return _element(part, cast(type, kind))
        if dataclasses.is_dataclass(kind) or part is None or part == "???" or isinstance(part, dict | list):
            raise _MisreadError(f"found {short(value)}")
        return nodes[kind].validate_and_convert(part)

    try:
        if not get_args(kind):
            return single(value, kind)
        parts = [part.strip() for part in value.split(",")] if isinstance(value, str) and value else value or []
        if isinstance(parts, dict):
            raise _MisreadError(f"found {short(value)}")
        if not isinstance(parts, list):
            parts = [parts]
        return [single(part, get_args(kind)[0]) for part in parts]
    except OmegaConfBaseException as error:
        raise _MisreadError(f"found {short(value)}") from error


def _element(value: object, kind: type) -> object:
    """One entry of a list of sections; a plain name stands for a section that has nothing else.

    Raises:
        _MisreadError: a key is unknown, or a value has not its type.
    """
    layer = value if isinstance(value, dict) else {"name": value}
    hints = get_type_hints(kind)
    if unknown := [str(name) for name in layer if name not in hints]:
        close = difflib.get_close_matches(unknown[0], hints, 1, 0)[0]
        raise _MisreadError(f"found {short(value)}, where {unknown[0]} is unknown and the nearest known key is {close}")
    made = {}
    for name, hint in hints.items():
        if name in layer:
            nested = dataclasses.is_dataclass(hint) and isinstance(layer[name], dict)
            try:
                made[name] = _element(layer[name], cast(type, hint)) if nested else _convert(layer[name], hint)
            except _MisreadError as error:
                raise _MisreadError(f"in {short(value)}, {name}: {error}") from error
    return kind(**made)


def _kinds(section: type, prefix: str = "") -> dict[str, object]:
    """The type of every field below a section, by full key, in declaration order."""
    found: dict[str, object] = {}
    for name, kind in get_type_hints(section).items():
        nested = dataclasses.is_dataclass(kind)
        found |= _kinds(cast(type, kind), f"{prefix}{name}.") if nested else {f"{prefix}{name}": kind}
    return found


def _flatten(layer: Layer, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in layer.items():
        nested = isinstance(value, dict) and value
        flat |= _flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def _nearest(unknown: str) -> str:
    """The known key most like an unknown one: by its last name first, and rather in the section where it stood."""
    section, _, leaf = unknown.rpartition(".")

    def likeness(known: str) -> float:
        known_section, _, known_leaf = known.rpartition(".")
        initials = "".join(word[0] for word in known_leaf.split("_"))
        same_leaf = 1.0 if leaf == initials else difflib.SequenceMatcher(None, leaf, known_leaf).ratio()
        whole = difflib.SequenceMatcher(None, unknown, known).ratio()
        return same_leaf + 0.5 * whole + (0.3 if section == known_section else 0.0)

    fields = _kinds(Config)
    sections = {field.rpartition(".")[0] for field in fields} - {""}
    return max([*fields, *sorted(sections)], key=likeness)


def _texts(value: object) -> Iterator[str]:
    """Every text inside a value; keys too, since OmegaConf may yet read them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value:
            yield from _texts(part)
        if isinstance(value, Mapping):
            yield from _texts(list(value.values()))


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
