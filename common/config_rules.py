"""The rules: which values of a configuration can be meant.

One rule a field, and agreements between fields; `impossible` tells all that is broken at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from common import methods
from common.config import COORDINATOR, LEAST_CLIP, POOLED, UNITS, ColumnsConfig, InstitutionConfig
from common.fixed_point import RING_BITS, member_bits
from common.formats import NOBODY
from common.secagg.terms import smallest_cohort

GENERATORS = ("hospitals", "banks")


@dataclass(frozen=True)
class Rule:
    """What one field allows, in words for the user and as a test on a value that has the field's type.

    why: more about a value that is not allowed, where there is more to say of it.
    """

    allowed: str
    holds: Callable[[Any], bool]
    why: Callable[[Any], str] = lambda value: ""


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


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]


def _one_of(*names: str) -> Rule:
    return Rule(_either(names), lambda value: value in names)


def _distinct(names: Sequence[str], pattern: str) -> bool:
    return len(set(names)) == len(names) and all(re.fullmatch(pattern, name) for name in names)


_NAME = r"[a-z0-9][a-z0-9_-]*"
DATA_SET = r"[a-z0-9][a-z0-9_-]{0,63}"
"""The name of a data set, which coordinators say and institutions' files map to their own records."""
_PATH = Rule("a path, or empty", lambda path: path == path.strip() and "${" not in path)
_COLUMN = Rule("the name of a column", lambda name: bool(name.strip()))


def _file(prefix: str) -> dict[str, Rule]:
    """The rules of a FileConfig."""
    columns = {f"{prefix}columns.{field.name}": _COLUMN for field in fields(ColumnsConfig)}
    return {f"{prefix}path": _PATH, f"{prefix}person": _COLUMN, **columns}


def _institutions(institutions: Sequence[InstitutionConfig]) -> bool:
    names = [institution.name for institution in institutions]
    return (
        len(names) > 0
        and not {COORDINATOR, POOLED} & set(names)
        and _distinct(names, _NAME)
        and len({bool(institution.path) for institution in institutions}) == 1
        and all(_PATH.holds(institution.path) and _COLUMN.holds(institution.person) for institution in institutions)
        and all(_COLUMN.holds(name) for institution in institutions for name in asdict(institution.columns).values())
    )


RULES: dict[str, Rule] = {
    "name": Rule(
        "letters, digits, dot, - and _, a letter or digit first (it names the run's directory)",
        lambda name: re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None,
    ),
    "seed": _SEED,
    "model.path": Rule("embedded, or a local directory", lambda path: bool(path.strip()) and "${" not in path),
    "model.device": _one_of("auto", "cpu", "cuda"),
    "model.dtype": _one_of("auto", "float32", "bfloat16"),
    "model.weights": _one_of("full", "8bit", "4bit"),
    "model.digest": Rule(
        "64 hex digits, as `silotune-client fingerprint` prints them, or empty",
        lambda digest: re.fullmatch(r"([0-9a-f]{64})?", digest) is not None,
    ),
    "lora.rank": _whole(1),
    "lora.alpha": _POSITIVE,
    "lora.dropout": _SHARE_NOT_ONE,
    "lora.target_modules": Rule(
        "different names of linear layers, such as q_proj, v_proj; or all-linear by itself",
        lambda names: names == ["all-linear"] or (len(names) > 0 and _distinct(names, r"(?!all-linear$)[\w.-]+")),
    ),
    "data.name": Rule(
        "a name of a-z, 0-9, - and _, a letter or digit first, at most 64 characters",
        lambda name: re.fullmatch(DATA_SET, name) is not None,
    ),
    "data.generator": Rule(
        "hospitals or banks; or empty, where records come from elsewhere", lambda name: name in ("", *GENERATORS)
    ),
    "data.directory": Rule(
        "a directory, or empty to generate the records", lambda path: path == path.strip() and "${" not in path
    ),
    "data.institutions": Rule(
        "at least one name, or {name: ..., path: ..., person: ..., columns: {...}}; names all different, of a-z, 0-9,"
        f" - and _, a letter or digit first; `{COORDINATOR}` and `{POOLED}` are taken; a path for each or for none",
        _institutions,
    ),
    **_file("data.coordinator."),
    "data.held_out": Rule("a number above 0, below 0.25", lambda value: 0 < value < 0.25),
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
    "train.long": _one_of("truncate", "chunk"),
    "train.overlap": _whole(0),
    "train.supervised": _one_of("completion", "all"),
    "train.row_tokens": _whole(2),
    "train.checkpointing": _TRUTH,
    "federation.rounds": _whole(1),
    "federation.method": Rule(_either(tuple(methods.METHODS)), lambda name: name in methods.METHODS, methods.why_not),
    "federation.weighting": _one_of("records", "uniform"),
    "federation.weight_unit": _whole(1),
    "federation.fraction": _SHARE_NOT_ZERO,
    # The sum over one institution is that institution's update; with secure aggregation, the sum over two is as good.
    "federation.min_cohort": _whole(2),
    "federation.timeout_s": _POSITIVE,
    "federation.gather_s": _POSITIVE,
    "federation.server_optimizer.name": _one_of("fedavg", "fedavgm", "fedadam"),
    "federation.server_optimizer.learning_rate": _POSITIVE,
    "federation.server_optimizer.momentum": _SHARE_NOT_ONE,
    "federation.server_optimizer.beta2": _SHARE_NOT_ONE,
    "federation.server_optimizer.epsilon": _POSITIVE,
    "secure_aggregation.enabled": _TRUTH,
    "secure_aggregation.colluders": _whole(1),
    "secure_aggregation.repeats": _whole(0),
    "secure_aggregation.timeout_s": _POSITIVE,
    "privacy.mode": _one_of("none", *UNITS),
    "privacy.epsilon": _NOT_NEGATIVE,
    "privacy.delta": Rule("a number above 0, below 0.1", lambda value: 0 < value < 0.1),
    "privacy.noise_multiplier": _NOT_NEGATIVE,
    "privacy.clip": Rule(f"a finite number of at least {LEAST_CLIP:g}", lambda value: LEAST_CLIP <= value < math.inf),
    "privacy.sampling_rate": _SHARE_NOT_ZERO,
    "privacy.records_per_person": _whole(1),
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
    "tracking.tensorboard": _TRUTH,
    "tracking.mlflow": Rule(
        "a tracking URI without a password (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD hold them), or empty",
        lambda uri: uri == uri.strip() and not re.search(r"://[^/]*@", uri),
    ),
    "tracking.wandb": Rule("a project name, or empty", lambda project: project == project.strip()),
    "simulation.actors": _whole(1),
    "simulation.threads": _whole(1),
    "simulation.faults": Rule(
        "INSTITUTION:FAULT with a fault of nan, raise or silent",
        lambda entries: _distinct(entries, rf"{_NAME}:(nan|raise|silent)"),
    ),
}


def _sum_bits(bits: int, weight_bits: int, institutions: int) -> int:
    """Bits that hold the sum of one weighted element over so many institutions."""
    return bits + weight_bits + member_bits(institutions)


_UNSAFE = "with which the coordinator can read every update"


def _fewest(least: int, enabled: bool, colluders: int) -> int:
    """The fewest institutions that a sum may cover."""
    return max(least, smallest_cohort(colluders)) if enabled else least


def _since(colluders: int) -> str:
    """Why a sum covers no fewer."""
    whom = "one institution" if colluders == 1 else f"{colluders} institutions that collude"
    return (
        f" with secure_aggregation.colluders = {colluders}, since the sum over fewer would tell {whom} another's update"
    )


def _have_files(institutions: Sequence[InstitutionConfig]) -> bool:
    return any(institution.path for institution in institutions)


def _without_persons(institutions: Sequence[InstitutionConfig]) -> list[str]:
    """Those of whose files nobody knows whose a record is."""
    return [institution.name for institution in institutions if institution.path and institution.person == NOBODY]


def _asks_for_a_mode(key: str) -> Agreement:
    """Whoever asks for noise and names no mode would train without any, and believe otherwise."""
    return Agreement(
        (key, "privacy.mode"),
        lambda value, mode: value == 0 or mode != "none",
        lambda value, mode: (
            f"{key}: found {value:g}, with privacy.mode = none, which adds no noise; allowed: a privacy.mode of"
            f" {_either(tuple(UNITS))}; or 0, or left out"
        ),
    )


AGREEMENTS: tuple[Agreement, ...] = (
    Agreement(
        ("data.generator", "data.directory", "data.institutions", "data.coordinator.path"),
        lambda generator, directory, institutions, path: bool(
            generator or directory or _have_files(institutions) or path
        ),
        lambda generator, directory, institutions, path: (
            "data.generator: found '', and neither data.directory nor a path in data.institutions; one of the three"
            " must say where records come from, or data.coordinator.path where institutions have their own"
        ),
    ),
    Agreement(
        ("data.directory", "data.institutions"),
        lambda directory, institutions: not (directory and _have_files(institutions)),
        lambda directory, institutions: (
            f"data.directory: found {short(directory)}, and a path in data.institutions; allowed: one of the two"
        ),
    ),
    Agreement(
        ("data.coordinator.path", "data.institutions", "data.generator", "data.directory"),
        lambda path, institutions, generator, directory: (
            not path or _have_files(institutions) or not (generator or directory)
        ),
        lambda path, institutions, generator, directory: (
            f"data.coordinator.path: found {short(path)}, and no path in data.institutions; allowed: beside those, or"
            " with an empty data.generator and data.directory where institutions have records of their own"
        ),
    ),
    Agreement(
        ("data.train_records", "data.institutions", "data.directory", "data.generator"),
        lambda counts, institutions, directory, generator: (
            len(counts) == len(institutions)
            or (not counts and bool(directory or _have_files(institutions) or not generator))
        ),
        lambda counts, institutions, directory, generator: (
            f"data.train_records: found {len(counts)} counts for {len(institutions)} institutions;"
            " allowed: one count for each"
        ),
    ),
    Agreement(
        ("train.overlap", "train.max_tokens"),
        lambda overlap, most: overlap < most,
        lambda overlap, most: f"train.overlap: found {overlap}; allowed: less than train.max_tokens = {most}",
    ),
    Agreement(
        ("simulation.faults", "data.institutions"),
        lambda entries, institutions: {entry.partition(":")[0] for entry in entries} <= {i.name for i in institutions},
        lambda entries, institutions: (
            f"simulation.faults: found {', '.join(entries)}; allowed:"
            f" institutions {', '.join(institution.name for institution in institutions)}"
        ),
    ),
    *(_asks_for_a_mode(key) for key in ("privacy.epsilon", "privacy.noise_multiplier")),
    Agreement(
        ("privacy.mode", "privacy.epsilon", "privacy.noise_multiplier"),
        lambda mode, epsilon, noise: mode == "none" or (epsilon > 0) != (noise > 0),
        lambda mode, epsilon, noise: (
            f"privacy.epsilon: found {epsilon:g}, with privacy.noise_multiplier = {noise:g} and privacy.mode = {mode};"
            " allowed: exactly one of the two above 0"
            if epsilon > 0
            else f"privacy.epsilon: found neither it nor privacy.noise_multiplier, with privacy.mode = {mode}; allowed:"
            " exactly one of the two, above 0"
        ),
    ),
    Agreement(
        ("privacy.mode", "data.institutions"),
        lambda mode, institutions: mode != "patient" or not _without_persons(institutions),
        lambda mode, institutions: (
            f"privacy.mode: found {mode}, and no column of persons at {', '.join(_without_persons(institutions))},"
            " where it would protect single records; allowed: record, or the name of the column that says whose record"
            " it is in `person`"
        ),
    ),
    Agreement(
        ("privacy.mode", "lora.dropout"),
        lambda mode, dropout: mode == "none" or dropout == 0,
        lambda mode, dropout: (
            f"lora.dropout: found {dropout:g}; allowed: 0 with privacy.mode = {mode}, or left out, since a gradient"
            " under dropout depends on more than its unit"
        ),
    ),
    Agreement(
        ("privacy.mode", "federation.weighting"),
        lambda mode, weighting: mode == "none" or weighting == "uniform",
        lambda mode, weighting: (
            f"federation.weighting: found {weighting}; allowed: uniform with privacy.mode = {mode}, since how many"
            " records an institution has is data"
        ),
    ),
    Agreement(
        ("privacy.mode", "secure_aggregation.enabled"),
        lambda mode, enabled: enabled or mode not in ("institution", "distributed"),
        lambda mode, enabled: (
            f"privacy.mode: found {mode}, whose noise is in the sum only, and secure aggregation is off; allowed:"
            " record or patient, or secure_aggregation.enabled=true"
        ),
    ),
    Agreement(
        ("federation.method", "secure_aggregation.enabled"),
        lambda method, enabled: not enabled or methods.METHODS[method].linear,
        lambda method, enabled: (
            f"federation.method: found {short(method)}, which needs single updates, and secure aggregation hides them;"
            f" allowed: {_either([name for name, known in methods.METHODS.items() if known.linear])};"
            f" or secure_aggregation.enabled=false, {_UNSAFE}"
        ),
    ),
    Agreement(
        ("federation.min_cohort", "secure_aggregation.enabled", "secure_aggregation.colluders"),
        lambda least, enabled, colluders: least >= _fewest(2, enabled, colluders),
        lambda least, enabled, colluders: (
            f"federation.min_cohort: found {least}; allowed: at least {smallest_cohort(colluders)}{_since(colluders)};"
            f" or secure_aggregation.enabled=false, {_UNSAFE}"
        ),
    ),
    Agreement(
        ("data.institutions", "federation.min_cohort", "secure_aggregation.enabled", "secure_aggregation.colluders"),
        lambda names, least, enabled, colluders: len(names) >= _fewest(least, enabled, colluders),
        lambda names, least, enabled, colluders: (
            f"data.institutions: found {len(names)}; allowed: at least federation.min_cohort = {least} of them"
            if len(names) < least and (not enabled or least > smallest_cohort(colluders))
            else f"data.institutions: found {len(names)}; allowed: at least {smallest_cohort(colluders)} of them"
            f"{_since(colluders)}; or secure_aggregation.enabled=false and a federation.min_cohort of 2, {_UNSAFE}"
        ),
    ),
    Agreement(
        ("federation.fraction", "data.institutions", "federation.min_cohort"),
        # Too few institutions at all have their own line above. 0.7 * 10 is just under 7.
        lambda fraction, names, least: len(names) < least or fraction * len(names) >= least - 1e-9,
        lambda fraction, names, least: (
            f"federation.fraction: found {fraction:g}, which draws {fraction * len(names):g} of {len(names)}"
            f" institutions; allowed: at least federation.min_cohort = {least} of them"
        ),
    ),
    Agreement(
        ("quantise.bits", "quantise.weight_bits", "data.institutions"),
        lambda bits, weight_bits, names: _sum_bits(bits, weight_bits, len(names)) <= RING_BITS,
        lambda bits, weight_bits, names: (
            f"quantise.bits: found {bits}, with quantise.weight_bits = {weight_bits} and {len(names)} institutions;"
            f" allowed: at most {bits - _sum_bits(bits, weight_bits, len(names)) + RING_BITS},"
            f" since the weighted sum must fit a ring of at most {RING_BITS} bits:"
            f" bits + weight_bits + ceil(log2(institutions)) <= {RING_BITS}"
        ),
    ),
)


def impossible(values: Mapping[str, Any]) -> list[str]:
    """One line for each value, and each set of values, that no run can mean."""
    broken = {key for key, value in values.items() if not RULES[key].holds(value)}
    mistakes = [_mistake(RULES[key], key, values[key]) for key in values if key in broken]
    for agreement in AGREEMENTS:
        if all(key in values and key not in broken for key in agreement.keys):
            arguments = [values[key] for key in agreement.keys]
            if not agreement.holds(*arguments):
                mistakes.append(agreement.mistake(*arguments))
    return mistakes


def _mistake(rule: Rule, key: str, value: object) -> str:
    more = f" ({why})" if (why := rule.why(value)) else ""
    return f"{key}: found {short(value)}; allowed: {rule.allowed}{more}"


def short(value: object) -> str:
    """A value as an error message shows it."""
    if isinstance(value, list):
        value = [part.brief() if isinstance(part, InstitutionConfig) else part for part in value]
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
