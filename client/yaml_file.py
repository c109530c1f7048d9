"""The YAML files that an institution writes for itself, read into frozen dataclasses.

Stricter than a run's configuration: every value has the very type of its field, and nothing is looked up elsewhere
(`${...}` stays plain text, which no field allows). All mistakes of a file are told at once.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from common.config_rules import Rule, short
from common.errors import ConfigError
from common.files import write_text

T = TypeVar("T")

ANY = "*"
"""Stands for a name of the file's own in the keys of rules: `data_sets.*.path`."""

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def read(path: Path, kind: type[T], rules: Mapping[str, Rule]) -> T:
    """The file as a `kind`; what it leaves out has the default.

    rules: by full key, for values that have the type of their field already; a mapping's rule is of its names.

    Raises ConfigError, one line a mistake, for a file that cannot be read, is empty or is not YAML, unknown keys,
    values of another type and values that a rule forbids.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    return parse(text, str(path), kind, rules)


def parse(text: str, source: str, kind: type[T], rules: Mapping[str, Rule]) -> T:
    """As `read`, from text; `source` is what errors call it."""
    tree = _tree(text, source)
    if not tree:
        # A file that was cut off must not read as one that says nothing.
        raise ConfigError(f"{source}: expected keys such as {next(iter(_fields(kind)))}, found an empty file")
    reader = _Reader(kind, rules)
    found = reader.section(tree, kind, "", "")
    if reader.mistakes:
        raise told(source, reader.mistakes)
    return cast(T, found)


def told(source: str, mistakes: list[str]) -> ConfigError:
    """The error that tells all mistakes of a file."""
    counted = f"{len(mistakes)} mistakes" if len(mistakes) > 1 else "1 mistake"
    return ConfigError("\n  ".join([f"{source}: {counted}", *mistakes]))


def write_new(path: Path, text: str) -> None:
    """Writes a file that is not there yet. Raises ConfigError when it is, StorageError when it cannot be written."""
    if path.exists():
        raise ConfigError(f"{path} is there already; edit it, or move it away to have a new one")
    write_text(path, text)


def _tree(text: str, source: str) -> dict[Any, Any]:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except yaml.MarkedYAMLError as error:
        where = error.problem_mark or error.context_mark
        line = f"line {where.line + 1}, column {where.column + 1}: " if where else ""
        raise ConfigError(f"{source}: {line}not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{source}: not valid YAML: {said:.200}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected keys at the top level, found a list")
    return tree


def _fields(kind: type) -> dict[str, Any]:
    """Types of a section's fields by name, in order."""
    return {field.name: get_type_hints(kind)[field.name] for field in dataclasses.fields(kind)}


def _keys(kind: type, prefix: str = "") -> Iterator[str]:
    """Every key below a section, sections among them."""
    for name, hint in _fields(kind).items():
        yield f"{prefix}{name}"
        if get_origin(hint) in (dict, Mapping):
            name, hint = f"{name}.{ANY}", get_args(hint)[1]
        if dataclasses.is_dataclass(hint):
            yield from _keys(cast(type, hint), f"{prefix}{name}.")


class _Reader:
    """Collects mistakes while it builds; what it builds is of use only when there are none."""

    def __init__(self, kind: type, rules: Mapping[str, Rule]) -> None:
        self.mistakes: list[str] = []
        self._rules = rules
        self._known = tuple(_keys(kind))

    def section(self, raw: Any, kind: type, key: str, pattern: str) -> Any:
        """key: where the section stands in the file. pattern: the same, as rules call it."""
        fields = _fields(kind)
        if raw is None:  # a section whose every line is commented out
            raw = {}
        if not isinstance(raw, dict):
            self.mistakes.append(f"{key}: found {short(raw)}; allowed: a section with the keys {', '.join(fields)}")
            return None
        self.mistakes += [self._unknown(key, pattern, name) for name in raw if name not in fields]
        made = {}
        for field in dataclasses.fields(kind):
            inner, inside = _below(key, field.name), _below(pattern, field.name)
            hint = fields[field.name]
            if field.name in raw:
                made[field.name] = self._value(raw[field.name], hint, inner, inside)
            elif dataclasses.is_dataclass(hint):
                made[field.name] = self.section({}, cast(type, hint), inner, inside)
            else:
                default = field.default
                made[field.name] = field.default_factory() if callable(field.default_factory) else default
                self._left_out(made[field.name], inner, inside)
        return kind(**made)

    def _value(self, raw: Any, hint: Any, key: str, pattern: str) -> Any:
        if dataclasses.is_dataclass(hint):
            return self.section(raw, cast(type, hint), key, pattern)
        if get_origin(hint) in (dict, Mapping):
            return self._mapping(raw, get_args(hint)[1], key, pattern)
        if get_origin(hint) is tuple:
            part = get_args(hint)[0]
            raw = [] if raw is None else raw
            if not isinstance(raw, list) or not all(_is(element, part) for element in raw):
                return self._misread(raw, f"a list of {_WORDS[part]}", key, pattern)
            value: Any = tuple(raw)
        elif _is(raw, hint):
            value = float(raw) if hint is float else raw
        else:
            return self._misread(raw, _WORDS[hint], key, pattern)
        self._rule(value, key, pattern)
        return value

    def _mapping(self, raw: Any, kind: type, key: str, pattern: str) -> Any:
        raw = {} if raw is None else raw
        if not isinstance(raw, dict):
            return self._misread(raw, "names, each with a section", key, pattern)
        rule = self._rules[pattern]
        self.mistakes += [
            f"{key}.{name}: found {short(name)} as a name; allowed: {rule.allowed}"
            for name in raw
            if not (isinstance(name, str) and rule.holds(name))
        ]
        return {name: self.section(part, kind, f"{key}.{name}", f"{pattern}.{ANY}") for name, part in raw.items()}

    def _misread(self, raw: Any, kind: str, key: str, pattern: str) -> None:
        rule = self._rules.get(pattern)
        allowed = kind if rule is None or rule.allowed.startswith(kind) else f"{kind}: {rule.allowed}"
        self.mistakes.append(f"{key}: found {short(raw)}; allowed: {allowed}")

    def _left_out(self, default: Any, key: str, pattern: str) -> None:
        """A default that its own rule forbids stands for none: the file must say the value."""
        rule = self._rules.get(pattern)
        if rule is not None and not isinstance(default, Mapping) and not rule.holds(default):
            self.mistakes.append(f"{key}: missing; allowed: {rule.allowed}")

    def _rule(self, value: Any, key: str, pattern: str) -> None:
        rule = self._rules.get(pattern)
        if rule is not None and not isinstance(value, Mapping) and not rule.holds(value):
            shown = list(value) if isinstance(value, tuple) else value
            why = f" ({said})" if (said := rule.why(value)) else ""
            self.mistakes.append(f"{key}: found {short(shown)}; allowed: {rule.allowed}{why}")

    def _unknown(self, section: str, pattern: str, name: Any) -> str:
        """The line that names the known key most like an unknown one, rather in the section where it stands."""

        def likeness(known: str) -> float:
            place, _, leaf = known.rpartition(".")
            alike = difflib.SequenceMatcher(None, str(name), leaf).ratio()
            return alike + (0.3 if place == pattern else 0.0)

        nearest = max((known for known in self._known if not known.endswith(ANY)), key=likeness)
        return f"{_below(section, name)}: unknown key; the nearest known one is {nearest}"


def _below(section: str, name: Any) -> str:
    return f"{section}.{name}" if section else str(name)


def _is(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
