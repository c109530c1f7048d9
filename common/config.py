"""The configuration: small frozen dataclasses by topic, loaded from YAML through OmegaConf.

First the schema (what can be said), then the rules (what can be meant), then loading. All mistakes of a file and its
overrides are told at once. OmegaConf is imported only when something is loaded, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args, get_type_hints

from common.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig, ValueNode

# One source of values: nested dicts, with references to other keys not yet resolved.
Layer = dict[Any, Any]

_KEY = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
_REFERENCE = r"\$\{" + _KEY + r"\}"

GENERATORS = ("hospitals", "banks")
METHODS = ("fedavg", "ffa")


@dataclass(frozen=True)
class ModelConfig:
    """path: `embedded` (the small Llama shipped with Silotune) or a local directory that transformers can load."""

    path: str = "embedded"


@dataclass(frozen=True)
class LoraConfig:
    """The adapter, W + (alpha / rank) B A (Hu et al. 2021, section 4.1).

    target_modules: names of linear layers, or the one name `all-linear`.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.1
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])


@dataclass(frozen=True)
class DataConfig:
    """Generated institutions, or a directory of jsonl files as `silotune-sim data` writes it.

    generator: `hospitals` or `banks`; ignored when `directory` is set.
    directory: DIR/<institution>/{train,validation,test}.jsonl and DIR/coordinator/{validation,test}.jsonl.
    institutions: names, in order.
    train_records: one count per institution.
    own_records / central_records: records in each of validation and test, per institution / at the coordinator.
    dirichlet: concentration of each institution's mix of specialties; small means specialised (Hsu et al. 2019).
    seed: of the generator; independent of the run's seed.
    """

    generator: str = "hospitals"
    directory: str = ""
    institutions: list[str] = field(default_factory=list)
    train_records: list[int] = field(default_factory=list)
    own_records: int = 40
    central_records: int = 120
    dirichlet: float = 0.5
    seed: int = 1


@dataclass(frozen=True)
class TrainConfig:
    """Local training; the same in every arm of the comparison unless `compare` says otherwise.

    passes_per_round: passes over the institution's own records in one round; may be a fraction.
    batch_size: records per optimizer step.
    learning_rate: AdamW's peak, reached after `warmup` (share of all rounds), then cosine to `final_rate` x peak.
    optimizer_state: `keep` AdamW's moments at the institution between rounds, or `reset` them.
    proximal: mu of FedProx (Li et al. 2020, equation 2); 0 is off.
    max_tokens: longest record, in tokens; longer ones are cut.
    """

    passes_per_round: float = 1.0
    batch_size: int = 4
    learning_rate: float = 1e-3
    warmup: float = 0.05
    final_rate: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer_state: str = "keep"
    proximal: float = 0.0
    max_tokens: int = 256


@dataclass(frozen=True)
class ServerOptimizerConfig:
    """How the coordinator steps towards the mean update (Reddi et al. 2021, algorithm 2).

    name: `fedavg`, `fedavgm` or `fedadam`. momentum: FedAvgM's, and FedAdam's beta1.
    """

    name: str = "fedavg"
    learning_rate: float = 1.0
    momentum: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-3


@dataclass(frozen=True)
class FederationConfig:
    """The rounds.

    method: `fedavg` (A and B averaged; McMahan et al. 2017) or `ffa` (only B trained; Sun et al. 2024).
    weighting: `records` or `uniform`. weight_unit: records per unit of weight.
    fraction: share of the roster drawn each round. min_cohort: fewest institutions that make a round.
    timeout_s: how long a round waits for an institution.
    """

    rounds: int = 20
    method: str = "fedavg"
    weighting: str = "records"
    weight_unit: int = 16
    fraction: float = 1.0
    min_cohort: int = 2
    timeout_s: float = 600.0
    server_optimizer: ServerOptimizerConfig = field(default_factory=ServerOptimizerConfig)


@dataclass(frozen=True)
class QuantiseConfig:
    """The fixed-point form of an update; the sum of such vectors is exact in any order.

    clip: largest absolute value of one element; larger ones are cut. bits: per element. weight_bits: of a weight.
    """

    clip: float = 1.0
    bits: int = 20
    weight_bits: int = 8


@dataclass(frozen=True)
class EvaluationConfig:
    """Central evaluation on the coordinator's validation records, every `every` rounds.

    exact: kinds of record whose whole greedy answer is compared. patience: evaluations without a better
    perplexity before the run stops early; 0 never stops. institutions: whether each institution also scores the
    adapter it receives on its own validation records; only the sum over all of them reaches the coordinator.
    """

    every: int = 1
    exact: list[str] = field(default_factory=lambda: ["coding"])
    patience: int = 0
    institutions: bool = True


@dataclass(frozen=True)
class ArmConfig:
    """Batch size and learning rate of a reference arm, as `silotune-sim tune` found them."""

    batch_size: int = 4
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class CompareConfig:
    """The honest comparison: base, local-only, federated, pooled at equal passes over each record."""

    enabled: bool = True
    local: ArmConfig = field(default_factory=ArmConfig)
    pooled: ArmConfig = field(default_factory=ArmConfig)


@dataclass(frozen=True)
class TuneConfig:
    """The grid that `silotune-sim tune` searches, the same for every arm."""

    batch_sizes: list[int] = field(default_factory=lambda: [2, 4, 8])
    learning_rates: list[float] = field(default_factory=lambda: [1e-3, 2e-3, 4e-3])


@dataclass(frozen=True)
class SimulationConfig:
    """actors: processes that play the institutions. threads: CPU threads of each.

    faults: INSTITUTION:FAULT, institutions that misbehave, to see what a run makes of it; a fault is `nan` (an update
    that is not finite) or `raise` (a program that fails).
    """

    actors: int = 2
    threads: int = 1
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Config:
    """Everything a run depends on; written resolved beside its results."""

    name: str = "unnamed"
    seed: int = 1
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    quantise: QuantiseConfig = field(default_factory=QuantiseConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    simulation: SimulationConfig = field(default_factory=SimulationConfig)


# --- Rules ---------------------------------------------------------------------------------------------------------

RING_BITS = 32  # Sums are taken in 32-bit integers; a sum that wraps around would decode to nonsense.


@dataclass(frozen=True)
class Rule:
    """What one field allows, in words for the user and as a test on a value that has the field's type."""

    allowed: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Agreement:
    """What several fields must satisfy together.

    keys: their values are the arguments of `holds` and `mistake`; skipped when one of them is itself a mistake.
    mistake: what is wrong and what to do, in one line that starts with the key to change.
    """

    keys: tuple[str, ...]
    holds: Callable[..., bool]
    mistake: Callable[..., str]


def _whole(least: int, most: int | None = None) -> Rule:
    limit = f"of at least {least}" if most is None else f"from {least} to {most}"
    return Rule(f"a whole number {limit}", lambda value: value >= least and (most is None or value <= most))


_SEED = Rule("a whole number from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)
_TRUTH = Rule("true or false", lambda value: True)
_POSITIVE = Rule("a finite number above 0", lambda value: math.isfinite(value) and value > 0)
_NOT_NEGATIVE = Rule("a finite number of at least 0", lambda value: math.isfinite(value) and value >= 0)
_SHARE = Rule("a number from 0 to 1", lambda value: 0 <= value <= 1)
_SHARE_NOT_ZERO = Rule("a number above 0, at most 1", lambda value: 0 < value <= 1)
_SHARE_NOT_ONE = Rule("a number from 0 up to, but not including, 1", lambda value: 0 <= value < 1)


def _one_of(*names: str) -> Rule:
    return Rule(f"{', '.join(names[:-1])} or {names[-1]}", lambda value: value in names)


def _distinct(names: Sequence[str], pattern: str) -> bool:
    return len(set(names)) == len(names) and all(re.fullmatch(pattern, name) for name in names)


_NAME = r"[a-z0-9][a-z0-9_-]*"

RULES: dict[str, Rule] = {
    "name": Rule(
        "letters, digits, dot, - and _, a letter or digit first (it names the run's directory)",
        lambda name: re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None,
    ),
    "seed": _SEED,
    "model.path": Rule("embedded, or a local directory", lambda path: bool(path.strip()) and "${" not in path),
    "lora.rank": _whole(1),
    "lora.alpha": _POSITIVE,
    "lora.dropout": _SHARE_NOT_ONE,
    "lora.target_modules": Rule(
        "different names of linear layers, such as q_proj, v_proj; or all-linear by itself",
        lambda names: names == ["all-linear"] or (len(names) > 0 and _distinct(names, r"(?!all-linear$)[\w.-]+")),
    ),
    "data.generator": Rule("hospitals or banks; or empty, with data.directory", lambda name: name in ("", *GENERATORS)),
    "data.directory": Rule(
        "a directory, or empty to generate the records", lambda path: path == path.strip() and "${" not in path
    ),
    "data.institutions": Rule(
        "at least one name, all different, of a-z, 0-9, - and _, a letter or digit first; `coordinator` is taken",
        lambda names: len(names) > 0 and "coordinator" not in names and _distinct(names, _NAME),
    ),
    "data.train_records": Rule(
        "whole numbers of at least 1, one for each institution", lambda counts: all(count >= 1 for count in counts)
    ),
    "data.own_records": _whole(1),
    "data.central_records": _whole(1),
    "data.dirichlet": Rule("a number from 0.01 to 1e6", lambda value: 0.01 <= value <= 1e6),  # numpy's draw underflows
    "data.seed": _SEED,
    "train.passes_per_round": _POSITIVE,
    "train.batch_size": _whole(1),
    "train.learning_rate": _POSITIVE,
    "train.warmup": _SHARE,
    "train.final_rate": _SHARE,
    "train.weight_decay": _NOT_NEGATIVE,
    "train.max_grad_norm": _POSITIVE,
    "train.optimizer_state": _one_of("keep", "reset"),
    "train.proximal": _NOT_NEGATIVE,
    "train.max_tokens": _whole(2),
    "federation.rounds": _whole(1),
    "federation.method": _one_of(*METHODS),
    "federation.weighting": _one_of("records", "uniform"),
    "federation.weight_unit": _whole(1),
    "federation.fraction": _SHARE_NOT_ZERO,
    "federation.min_cohort": _whole(2),  # The sum over one institution is that institution's update.
    "federation.timeout_s": _POSITIVE,
    "federation.server_optimizer.name": _one_of("fedavg", "fedavgm", "fedadam"),
    "federation.server_optimizer.learning_rate": _POSITIVE,
    "federation.server_optimizer.momentum": _SHARE_NOT_ONE,
    "federation.server_optimizer.beta2": _SHARE_NOT_ONE,
    "federation.server_optimizer.epsilon": _POSITIVE,
    "quantise.clip": _POSITIVE,
    "quantise.bits": _whole(2, RING_BITS - 2),
    "quantise.weight_bits": _whole(1, RING_BITS - 3),
    "evaluation.every": _whole(1),
    "evaluation.exact": Rule(
        "different kinds of record, such as coding; or none", lambda kinds: _distinct(kinds, r"[^,$\s]+")
    ),
    "evaluation.patience": _whole(0),
    "evaluation.institutions": _TRUTH,
    "compare.enabled": _TRUTH,
    "compare.local.batch_size": _whole(1),
    "compare.local.learning_rate": _POSITIVE,
    "compare.pooled.batch_size": _whole(1),
    "compare.pooled.learning_rate": _POSITIVE,
    "tune.batch_sizes": Rule(
        "at least one whole number of at least 1", lambda sizes: bool(sizes) and all(size >= 1 for size in sizes)
    ),
    "tune.learning_rates": Rule(
        "at least one finite number above 0",
        lambda rates: bool(rates) and all(math.isfinite(rate) and rate > 0 for rate in rates),
    ),
    "simulation.actors": _whole(1),
    "simulation.threads": _whole(1),
    "simulation.faults": Rule(
        "INSTITUTION:FAULT with a fault of nan or raise",
        lambda entries: _distinct(entries, rf"{_NAME}:(nan|raise)"),
    ),
}


def _sum_bits(bits: int, weight_bits: int, institutions: Sequence[str]) -> int:
    """Bits that hold the sum of one weighted element over all institutions."""
    return bits + weight_bits + math.ceil(math.log2(len(institutions)))


AGREEMENTS: tuple[Agreement, ...] = (
    Agreement(
        ("data.generator", "data.directory"),
        lambda generator, directory: bool(generator or directory),
        lambda generator, directory: (
            "data.generator: found '', and data.directory is empty; one of the two must say where records come from"
        ),
    ),
    Agreement(
        ("data.train_records", "data.institutions", "data.directory"),
        lambda counts, names, directory: len(counts) == len(names) or (directory and not counts),
        lambda counts, names, directory: (
            f"data.train_records: found {len(counts)} counts for {len(names)} institutions; allowed: one count for each"
        ),
    ),
    Agreement(
        ("simulation.faults", "data.institutions"),
        lambda entries, names: {entry.partition(":")[0] for entry in entries} <= set(names),
        lambda entries, names: (
            f"simulation.faults: found {', '.join(entries)}; allowed: institutions {', '.join(names)}"
        ),
    ),
    Agreement(
        ("federation.fraction", "data.institutions", "federation.min_cohort"),
        lambda fraction, names, least: fraction * len(names) >= least - 1e-9,  # 0.7 * 10 is just under 7
        lambda fraction, names, least: (
            f"federation.fraction: found {fraction:g}, which draws {fraction * len(names):g} of {len(names)}"
            f" institutions; allowed: at least federation.min_cohort = {least} of them"
        ),
    ),
    Agreement(
        ("quantise.bits", "quantise.weight_bits", "data.institutions"),
        lambda bits, weight_bits, names: _sum_bits(bits, weight_bits, names) <= RING_BITS,
        lambda bits, weight_bits, names: (
            f"quantise.bits: found {bits}, with quantise.weight_bits = {weight_bits} and {len(names)} institutions;"
            f" allowed: at most {bits - _sum_bits(bits, weight_bits, names) + RING_BITS},"
            f" since the weighted sum must fit a {RING_BITS}-bit ring:"
            f" bits + weight_bits + ceil(log2(institutions)) <= {RING_BITS}"
        ),
    ),
)


def _impossible(values: Mapping[str, Any]) -> list[str]:
    """One line for each value, and each set of values, that no run can mean."""
    broken = {key for key, value in values.items() if not RULES[key].holds(value)}
    mistakes = [f"{key}: found {_short(values[key])}; allowed: {RULES[key].allowed}" for key in values if key in broken]
    for agreement in AGREEMENTS:
        if all(key in values and key not in broken for key in agreement.keys):
            arguments = [values[key] for key in agreement.keys]
            if not agreement.holds(*arguments):
                mistakes.append(agreement.mistake(*arguments))
    return mistakes


# --- Loading -------------------------------------------------------------------------------------------------------


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
        mistakes += misread + _impossible(values)
    if mistakes:
        sources = f"{source} and overrides" if overrides else source
        counted = f"{len(mistakes)} mistakes" if len(mistakes) > 1 else "1 mistake"
        raise ConfigError("\n  ".join([f"{sources}: {counted}", *mistakes]))
    return _build(values)


def validate(config: Config) -> None:
    """Check a configuration that was built in code; `load` and `parse` have already done so.

    Raises:
        ConfigError: with every impossible value, one a line.
    """
    mistakes = _impossible(_flatten(_plain(config)))
    if mistakes:
        raise ConfigError("\n  ".join([f"configuration {config.name!r} cannot be meant", *mistakes]))


def to_yaml(config: Config) -> str:
    """Every field, defaults included; `parse` gives the equal configuration back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(_plain(config)))


def digest(config: Config) -> str:
    """SHA-256 (hex) over canonical JSON: equal for equal configurations, whatever file or overrides they came from."""
    canonical = json.dumps(_plain(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _plain(config: Config) -> dict[str, Any]:
    """Nested dicts in declaration order; an int given where a float is declared becomes one, so that digests agree."""

    def convert(value: Any, kind: object) -> Any:
        if dataclasses.is_dataclass(value):
            kinds = get_type_hints(type(value))
            return {name: convert(getattr(value, name), kinds[name]) for name in kinds}
        if isinstance(value, list):
            return list(value)
        return float(value) if kind is float else value

    plain: dict[str, Any] = convert(config, Config)
    return plain


def _build(values: Mapping[str, Any]) -> Config:
    from omegaconf import OmegaConf

    tree = OmegaConf.create({})
    for key, value in values.items():
        OmegaConf.update(tree, key, value)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), tree))
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
        yield f"{prefix.rstrip('.')}: found {_short(layer)}; allowed: a section with the keys {', '.join(kinds)}"
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
                raise _MisreadError(f"found {_short(raw)}, but only references to other keys, such as ${{seed}}, work")
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
        raise _MisreadError(f"found {_short(raw)}, which cannot be resolved ({_one_line(error)})") from error
    if _refers(value):
        raise _MisreadError(f"found {_short(raw)}, which gives another reference")
    return value


def _convert(value: object, kind: object) -> object:
    """The value in a field's type by OmegaConf's rules; a list of plain values may also be text with commas.

    Raises:
        _MisreadError: it cannot be converted without loss.
    """
    from omegaconf import BooleanNode, FloatNode, IntegerNode, StringNode
    from omegaconf.errors import OmegaConfBaseException

    nodes: dict[object, ValueNode] = {int: IntegerNode(), float: FloatNode(), str: StringNode(), bool: BooleanNode()}

    def scalar(part: object, kind: object) -> object:
        if part is None or part == "???" or isinstance(part, dict | list):
            raise _MisreadError(f"found {_short(value)}")
        return nodes[kind].validate_and_convert(part)

    try:
        if not get_args(kind):
            return scalar(value, kind)
        parts = [part.strip() for part in value.split(",")] if isinstance(value, str) and value else value or []
        if not isinstance(parts, list):
            parts = [parts]
        return [scalar(part, get_args(kind)[0]) for part in parts]
    except OmegaConfBaseException as error:
        raise _MisreadError(f"found {_short(value)}") from error


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


def _short(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
