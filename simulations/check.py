"""What a run would do with its records and its memory, told before anything is trained.

Reads and tokenises all records as a run would, looks for copies across sets, loads the base model where there is room,
and estimates memory. Trains nothing, writes nothing. What is shown of records is for whoever runs the command on their
own machine; the returned object holds counts only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from client.units import left_out, require_units_apart
from common.chat import special_ids
from common.config import COORDINATOR, Config, TrainConfig
from common.errors import DataError
from common.examples import Counts, Tokenised, examples_of
from common.models import load, load_tokenizer
from common.privacy.promise import Promise, promise_of
from common.records import Record
from common.secagg.terms import OFF
from common.text import Example
from server.terms import privacy_lines, terms_of
from simulations import prepare
from simulations.delta import about_delta
from simulations.footprint import Footprint, Form, bytes_per_round, footprint, form_of
from simulations.generate.federation import Federation
from simulations.generate.similarity import NEAR, Index

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT = ("validation", "test")
# Words that are compared for near copies; more would take minutes and gigabytes.
_MOST_WORDS = 500_000
_SHOWN_TOKENS = 400


@dataclass(frozen=True)
class Set:
    """One set of one owner's records. name: `train`, `validation` or `test`."""

    owner: str
    name: str
    records: tuple[Record, ...]
    found: Tokenised


@dataclass(frozen=True)
class Copies:
    """Records that stand where they should not. None: not looked for.

    held_out: validation and test records that are word for word in somebody's training set. test: test records that are
    so in a validation set. near: held-out records that share half of their runs of three words with a training record.
    persons_in_sets, persons_in_institutions: persons in more than one set, or at more than one institution.
    """

    held_out: int
    test: int
    near: int | None
    persons_in_sets: int
    persons_in_institutions: int


def check(config: Config, console: Console, samples: bool) -> dict[str, Any]:
    """Checks a configuration and its records, and returns what `--json` prints.

    samples: whether to show one record of each institution.

    Raises DataError, ModelError and ConfigError where a run would stop at them.
    """
    promise = promise_of(config)
    federation = prepare.gather(config.data)
    tokenizer = load_tokenizer(config.model.path)
    sets = _tokenised(federation, tokenizer, config)
    copies = _copies(sets)
    form = form_of(config)
    prints = {name: footprint(config, form, _of(sets, name, "train").found.examples) for name in config.data.names}
    loaded = _try_model(config, prints)
    warnings = [
        *_warnings(config, sets, copies, form, prints, tokenizer, promise),
        *([] if loaded else [_not_tried(prints)]),
    ]
    terms = terms_of(config)
    notes = [*([] if terms is None else [terms.told()]), *_about_weights(config, sets)]
    if samples:
        for name in config.data.names:
            console.print(_sample(_of(sets, name, "train"), tokenizer))
    sent = bytes_per_round(config, form)
    console.print(_records_table(config, sets), _examples_table(config, sets))
    console.print(_memory_table(prints), _traffic(config, sent))
    _conclude(config, sets, copies, notes, warnings, console)
    return {
        "ready": not warnings,
        "warnings": warnings,
        "notes": notes,
        "secure_aggregation": None if terms is None else terms.as_dict(),
        "differential_privacy": None if promise is None else promise.as_dict(),
        "institutions": {name: _as_dict(sets, name) for name in config.data.names},
        "coordinator": _as_dict(sets, COORDINATOR),
        "copies": asdict(copies),
        "memory_bytes": {name: found.as_dict() for name, found in prints.items()},
        "bytes_per_client_round": sent,
        "model_loaded": loaded,
    }


def _tokenised(federation: Federation, tokenizer: PreTrainedTokenizerBase, config: Config) -> list[Set]:
    """Every set as a run would tokenise it. Raises DataError that tells of every set that cannot be."""
    parts = {
        (name, part): getattr(splits, part)
        for name, splits in federation.institutions.items()
        for part in ("train", *HELD_OUT)
    } | {(COORDINATOR, part): getattr(federation.coordinator, part) for part in HELD_OUT}
    sets: list[Set] = []
    mistakes: list[str] = []
    for (owner, part), records in parts.items():
        try:
            found = examples_of(records, tokenizer, config.train, f"{owner}/{part}")
        except DataError as error:
            mistakes.append(str(error))
        else:
            sets.append(Set(owner, part, records, found))
    if mistakes:
        raise DataError("\n  ".join(["records cannot be used", *mistakes]) if len(mistakes) > 1 else mistakes[0])
    return sets


def _of(sets: Sequence[Set], owner: str, name: str) -> Set:
    return next(part for part in sets if (part.owner, part.name) == (owner, name))


# --- Copies and persons


def _folded(record: Record) -> str:
    """A record's text without what a copy may change and a reader would not see: case and white space."""
    return " ".join(" ".join(record.texts).split()).casefold()


def _repeated(records: Sequence[Record]) -> int:
    """Records that say word for word what one before them says."""
    return len(records) - len({_folded(record) for record in records})


def _copies(sets: Sequence[Set]) -> Copies:
    said = {
        name: [_folded(record) for part in sets if part.name == name for record in part.records]
        for name in ("train", *HELD_OUT)
    }
    training, validation = set(said["train"]), set(said["validation"])
    held_out = [text for name in HELD_OUT for text in said[name]]
    places: dict[str, set[str]] = {}
    owners: dict[str, set[str]] = {}
    for part in sets:
        for person in {record.person for record in part.records}:
            places.setdefault(person, set()).add(f"{COORDINATOR}/{part.name}" if _central(part) else part.name)
            if not _central(part):
                owners.setdefault(person, set()).add(part.owner)
    return Copies(
        held_out=sum(1 for text in held_out if text in training),
        test=sum(1 for text in said["test"] if text in validation),
        near=_near(training, held_out),
        persons_in_sets=sum(1 for found in places.values() if len(found) > 1),
        persons_in_institutions=sum(1 for found in owners.values() if len(found) > 1),
    )


def _central(part: Set) -> bool:
    return part.owner == COORDINATOR


def _near(training: Iterable[str], held_out: Sequence[str]) -> int | None:
    training = sorted(training)
    if sum(text.count(" ") + 1 for text in (*training, *held_out)) > _MOST_WORDS:
        return None
    index, known = Index(training), set(training)
    return sum(1 for text in held_out if text not in known and index.similarity(text) >= NEAR)


# --- The model


def _try_model(config: Config, prints: Mapping[str, Footprint]) -> bool:
    """Loads the base model as a run would, where that leaves half of the memory free."""
    weights = max(found.weights for found in prints.values())
    if weights > memory_of(config) / 2:
        return False
    model = load(config.model, config.lora, config.seed)
    if config.privacy.samples:
        require_units_apart(model)
    return True


def memory_of(config: Config) -> int:
    """Bytes of the memory that the model would lie in."""
    import torch

    if config.model.device != "cpu" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- What to mind


def _not_tried(prints: Mapping[str, Footprint]) -> str:
    weights = max(found.weights for found in prints.values())
    return f"the base model was not loaded to try it: its weights take {_size(weights)}, more than half of the memory"


def _warnings(
    config: Config,
    sets: Sequence[Set],
    copies: Copies,
    form: Form,
    prints: Mapping[str, Footprint],
    tokenizer: PreTrainedTokenizerBase,
    promise: Promise | None,
) -> list[str]:
    return [
        *_about_lengths(config, sets, form),
        *_about_copies(copies),
        *_about_evaluation(config, sets),
        *_about_memory(config, prints),
        *_about_template(sets, tokenizer),
        *_about_privacy(config, sets, promise),
        *([] if config.secure_aggregation.enabled else [OFF]),
        *([] if (told := about_delta(config, lambda name: _of(sets, name, "train").records)) is None else [told]),
    ]


def _about_lengths(config: Config, sets: Sequence[Set], form: Form) -> Iterator[str]:
    for owner in (*config.data.names, COORDINATOR):
        counts = _total(sets, owner)
        if counts.truncated:
            more = f"; {counts.cut} of them lose tokens that are supervised" if counts.cut else ""
            remedy = "" if config.train.long == "chunk" else ", or set train.long=chunk"
            yield (
                f"{owner}: {counts.truncated} of {counts.records} records are longer than train.max_tokens ="
                f" {config.train.max_tokens} and lose {counts.lost} tokens{more}. Raise train.max_tokens{remedy}"
            )
    longest = max(len(example.ids) for part in sets for example in part.found.examples)
    if form.context and longest > form.context:
        yield (
            f"the longest example has {longest} tokens, and the base model was made for {form.context}; set"
            f" train.max_tokens={form.context} or less"
        )


def _about_copies(copies: Copies) -> Iterator[str]:
    if copies.held_out:
        yield f"validation or test records that repeat a training one word for word: {copies.held_out}; scores flatter"
    if copies.test:
        yield f"test records that repeat a validation record word for word: {copies.test}"
    if copies.near:
        yield f"validation or test records that nearly repeat a training one: {copies.near}; scores may flatter"
    if copies.persons_in_sets:
        yield f"persons with records in more than one of train, validation and test: {copies.persons_in_sets}"


def _about_evaluation(config: Config, sets: Sequence[Set]) -> Iterator[str]:
    kinds = {record.kind for record in _of(sets, COORDINATOR, "test").records}
    if missing := [kind for kind in config.evaluation.exact if kind not in kinds]:
        yield (
            f"evaluation.exact: no test record of the coordinator is of the kind {', '.join(missing)}, so no answers of"
            f" it are scored; the records have {len(kinds)} other kinds"
        )


def _about_memory(config: Config, prints: Mapping[str, Footprint]) -> Iterator[str]:
    largest = max(prints.values(), key=lambda found: found.total)
    # The coordinator has a model of its own, and so has every process of the comparison, beside its institution's.
    needed = largest.total * config.simulation.actors + largest.weights
    if config.compare.enabled:
        needed = max(needed, (largest.total + largest.weights) * config.simulation.actors)
    if needed > memory_of(config):
        yield (
            f"training needs about {_size(needed)} in {config.simulation.actors} processes, and the memory has"
            f" {_size(memory_of(config))}; lower simulation.actors, train.row_tokens or train.max_tokens, or set"
            " train.checkpointing=true"
        )


def _about_template(sets: Sequence[Set], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    if any(record.messages for part in sets for record in part.records):
        template = tokenizer.get_chat_template()
        if "strftime_now" in template and "date_string" not in template:
            yield "the tokenizer's chat template writes today's date, so a run cannot be repeated another day"


def _about_privacy(config: Config, sets: Sequence[Set], promise: Promise | None) -> Iterator[str]:
    for name in config.data.names:
        if (found := left_out(config.privacy, _of(sets, name, "train").records)) is not None:
            yield f"{name}: {found.told()}"
    yield from _without_effect(config)
    if promise is not None and (told := promise.warning()) is not None:
        yield told


_SAMPLED = {
    "batch_size": "privacy.sampling_rate says how many units a step takes",
    "max_grad_norm": "privacy.clip bounds each unit's gradient",
}
_ONE_STEP = {
    "passes_per_round": "a round is one step",
    "learning_rate": "the coordinator takes the step, by federation.server_optimizer",
}


def _without_effect(config: Config) -> Iterator[str]:
    """Settings of training that somebody chose, and that do nothing where units are sampled and clipped."""
    mode = config.privacy.mode
    instead = (_SAMPLED if config.privacy.samples else {}) | (_ONE_STEP if mode == "distributed" else {})
    for name, why in instead.items():
        if (found := getattr(config.train, name)) != getattr(TrainConfig(), name):
            yield f"train.{name}: found {found:g}, which has no effect with privacy.mode = {mode}: {why}; leave it out"


def _about_weights(config: Config, sets: Sequence[Set]) -> Iterator[str]:
    """Institutions that weigh less than their records, since a weight has an end."""
    if config.federation.weighting != "records":
        return
    unit, most = config.federation.weight_unit, 2**config.quantise.weight_bits - 1
    counts = {name: _of(sets, name, "train").found.counts.examples for name in config.data.names}
    fitting = math.ceil(max(counts.values()) / most)
    for name, count in counts.items():
        if count > unit * most:
            yield (
                f"{name}: its {count} training examples count as {unit * most}, the largest weight with"
                f" federation.weight_unit = {unit} and quantise.weight_bits = {config.quantise.weight_bits};"
                f" federation.weight_unit={fitting} would fit all institutions"
            )


def _total(sets: Sequence[Set], owner: str) -> Counts:
    return sum((part.found.counts for part in sets if part.owner == owner), Counts())


# --- Showing it


def _as_dict(sets: Sequence[Set], owner: str) -> dict[str, Any]:
    mine = [part for part in sets if part.owner == owner]
    lengths = [length for part in mine for length in part.found.lengths]
    return {
        "records": {part.name: len(part.records) for part in mine},
        "persons": len({record.person for part in mine for record in part.records}),
        "duplicates": {part.name: _repeated(part.records) for part in mine},
        "length": _lengths(lengths),
        **{part.name: asdict(part.found.counts) for part in mine},
    }


def _lengths(lengths: Sequence[int]) -> dict[str, int]:
    """Tokens of a record before anything is cut."""
    return {
        "median": int(np.median(lengths)),
        "p95": int(np.quantile(lengths, 0.95, method="higher")),
        "max": max(lengths),
    }


def _records_table(config: Config, sets: Sequence[Set]) -> Table:
    table = _table("records", "train", "validation", "test", "persons", "repeated")
    for owner in (*config.data.names, COORDINATOR):
        found = _as_dict(sets, owner)
        counts = [str(found["records"].get(name, "–")) for name in ("train", *HELD_OUT)]
        table.add_row(owner, *counts, str(found["persons"]), str(sum(found["duplicates"].values())))
    return table


def _examples_table(config: Config, sets: Sequence[Set]) -> Table:
    table = _table("training", "examples", "tokens", "supervised", "length", "truncated", "pieces")
    table.caption = "length: median / 95 % / longest, in tokens; pieces: records cut into several"
    for name in config.data.names:
        part = _of(sets, name, "train")
        counts = part.found.counts
        numbers = (counts.examples, counts.tokens, counts.supervised)
        lengths = " / ".join(map(str, _lengths(part.found.lengths).values()))
        table.add_row(name, *map(str, numbers), lengths, str(counts.truncated), str(counts.chunked))
    return table


def _memory_table(prints: Mapping[str, Footprint]) -> Table:
    table = _table("memory for training, estimated", "base", "adapter", "activations", "logits", "together")
    for name, found in prints.items():
        table.add_row(name, *map(_size, (*asdict(found).values(), found.total)))
    table.caption = "of one process, without what Python and torch take themselves"
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column("of", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _traffic(config: Config, sent: Mapping[str, int]) -> Text:
    return Text(
        f"each institution sends {_size(sent['up'])} a round and receives {_size(sent['down'])}"
        f" (federation.method={config.federation.method})"
    )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _sample(part: Set, tokenizer: PreTrainedTokenizerBase) -> Panel:
    example = part.found.examples[0]
    text = shown(example, tokenizer)
    title = f"{part.owner}: the first training record, as the model sees it"
    supervised = f"{len(example.ids)} tokens; ⟦{example.supervised} supervised⟧"
    return Panel(text, title=Text(title), subtitle=Text(supervised), title_align="left", subtitle_align="right")


def shown(example: Example, tokenizer: PreTrainedTokenizerBase) -> Text:
    """An example in colours: special tokens by their names, supervised tokens between ⟦ and ⟧."""
    special = special_ids(tokenizer)
    supervised = {place for span in example.spans for place in range(*span)}
    text = Text()
    waiting: list[int] = []

    def flush(style: str) -> None:
        if waiting:
            text.append(_printable(str(tokenizer.decode(waiting))), style)
            waiting.clear()

    for place, token in enumerate(example.ids[:_SHOWN_TOKENS]):
        style = "bold green" if place in supervised else ""
        if place in supervised and place - 1 not in supervised:
            flush("")
            text.append("⟦", style)
        if token in special:
            flush(style)
            text.append(str(tokenizer.convert_ids_to_tokens(token)), f"{style} reverse".strip())
        else:
            waiting.append(token)
        if place in supervised and place + 1 not in supervised:
            flush(style)
            text.append("⟧", style)
    flush("bold green" if min(len(example.ids), _SHOWN_TOKENS) - 1 in supervised else "")
    if (more := len(example.ids) - _SHOWN_TOKENS) > 0:
        text.append(f" … and {more} tokens more", "dim")
    return text


def _printable(text: str) -> str:
    """What a record holds must not steer the terminal."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else f"\\x{ord(sign):02x}" for sign in text)


def _conclude(
    config: Config,
    sets: Sequence[Set],
    copies: Copies,
    notes: Sequence[str],
    warnings: Sequence[str],
    console: Console,
) -> None:
    for owner in (*config.data.names, COORDINATOR):
        # Those that are too long are among the warnings.
        for note in replace(_total(sets, owner), truncated=0, cut=0).notes():
            console.print(Text(f"{owner}: {note}"), style="dim")
    if copies.persons_in_institutions:
        console.print(f"persons known at more than one institution: {copies.persons_in_institutions}", style="dim")
    if copies.near is None:
        console.print("near copies were not looked for: the records are too many", style="dim")
    for note in notes:
        console.print(Text(note), style="dim")
    console.print(privacy_lines(config)[0])
    for warning in warnings:
        console.print(Text(f"! {warning}", "yellow"))
    if warnings:
        counted = "1 warning stands" if len(warnings) == 1 else f"{len(warnings)} warnings stand"
        console.print(Text(f"{config.name} can run; {counted}", "bold yellow"))
    else:
        console.print(Text(f"{config.name} is ready", "bold green"))
