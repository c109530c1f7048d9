"""Local training beside Hugging Face's Trainer and TRL's SFTTrainer, on the same records in the same run.

Every arm is a process of its own that loads the same base model and the same adapter; they take turns, so that a noisy
machine is noisy for all. All have the same records in the same batches, type, threads, AdamW, schedule and clipping, no
dropout and no checkpointing; no arm evaluates, logs or saves. Timed is the call that trains (`train`, `Trainer.train`),
and neither loading nor setting up. That all train the same is checked: the adapters that come out are compared.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import math
import os
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from common.errors import ConfigError, RunStopped
from common.text import Example
from simulations.benchmarks.arms import (
    ARMS,
    SHAPES,
    TRAIN,
    Factors,
    Pass,
    Shape,
    batches,
    examples,
    our_losses,
    padded_losses,
    write_model,
)


@dataclass(frozen=True)
class Timing:
    """One training pass. seconds: of the call. peak_bytes: resident memory at its highest, above that before it."""

    seconds: float
    peak_bytes: int


def shapes(text: str) -> list[str]:
    """The shapes that a command line names; `all` are those that the documentation shows."""
    names = [name for name in SHAPES if name != "tiny"] if text == "all" else [part.strip() for part in text.split(",")]
    if unknown := [name for name in names if name not in SHAPES]:
        raise ConfigError(f"--shape: expected {', '.join(SHAPES)} or all, found {unknown[0]!r:.40}")
    return names


def bench(names: Sequence[str], records: int, repeats: int, threads: int, console: Console) -> dict[str, Any]:
    """Runs the named shapes and returns figures by shape; those of the first stand at the top as well.

    speedup_vs_hf, speedup_vs_trl: medians of real tokens per second over theirs. loss_max_abs_diff: over the steps, to
    the padded loop. Real tokens are the records' own: padding is not counted.
    """
    if importlib.util.find_spec("trl") is None:
        raise ConfigError("the benchmark stands beside TRL, which is not installed: pip install 'silotune[bench]'")
    found = {name: _shape(SHAPES[name], records, repeats, threads, console) for name in names}
    first = found[names[0]]
    keys = ("speedup_vs_hf", "speedup_vs_trl", "loss_max_abs_diff")
    return {**{key: first[key] for key in keys}, "threads": threads, "shapes": found}


def _shape(shape: Shape, records: int, repeats: int, threads: int, console: Console) -> dict[str, Any]:
    whole = max(records // TRAIN.batch_size, 1) * TRAIN.batch_size
    made = examples(shape, whole)
    tokens = sum(len(example.ids) for example in made)
    padded = sum(max(len(e.ids) for e in batch) * len(batch) for batch in batches(made))
    console.print(
        f"[bold]{shape.name}[/]: hidden {shape.hidden}, {shape.layers} layers, vocabulary {shape.vocabulary}, "
        f"LoRA on {', '.join(shape.target_modules)}, {shape.supervised:.0%} supervised, {shape.dtype}; "
        f"{whole} records, {tokens} tokens ({padded} when padded), {threads} threads"
    )
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        directory = Path(folder)
        write_model(shape, directory)
        workers = {name: stack.enter_context(_Worker(name, shape, directory, made, threads)) for name in ARMS}
        timings: dict[str, list[Timing]] = {name: [] for name in ARMS}
        for turn in range(repeats + 1):
            for name, worker in workers.items():
                timing = worker.ask("time")
                if turn:  # the first turn warms up
                    timings[name].append(timing)
        factors: dict[str, Factors] = {name: worker.ask("factors") for name, worker in workers.items()}
        start = workers["silotune"].ask("start")
        ours, theirs = workers["silotune"].ask("our_losses"), workers["hf"].ask("padded_losses")
    difference = float(np.abs(np.subtract(ours, theirs)).max())
    speed = {name: tokens / statistics.median(t.seconds for t in taken) for name, taken in timings.items()}
    arms = {
        name: {
            "title": ARMS[name].title,
            "tokens_per_second": speed[name],
            "seconds": [round(t.seconds, 3) for t in taken],
            "adapter_difference": _difference(factors[name], factors["silotune"], start),
            "peak_mib": round(statistics.median(t.peak_bytes for t in taken) / 2**20, 1),
        }
        for name, taken in timings.items()
    }
    result = {
        "shape": asdict(shape),
        "records": whole,
        "tokens": tokens,
        "padded_tokens": padded,
        "speedup_vs_hf": speed["silotune"] / speed["hf"],
        "speedup_vs_trl": speed["silotune"] / speed["trl"],
        "speedup_vs_trl_padding_free": speed["silotune"] / speed["trl_padding_free"],
        "loss_max_abs_diff": difference,
        "arms": arms,
    }
    console.print(_table(result))
    return result


def _difference(found: Factors, ours: Factors, start: Factors) -> float:
    """How far apart two adapters ended, relative to how far ours moved (Euclidean)."""
    apart = math.sqrt(sum(float(np.square(found[key] - ours[key]).sum()) for key in ours))
    return apart / math.sqrt(sum(float(np.square(ours[key] - start[key]).sum()) for key in ours))


def _table(result: Mapping[str, Any]) -> Table:
    table = Table(caption=f"loss curve against the padded loop: at most {result['loss_max_abs_diff']:.1e} apart")
    for column in ("", "real tokens/s", "of HF", "peak above model, MiB", "adapter from ours"):
        table.add_column(column, justify="right" if column else "left")
    for arm in result["arms"].values():
        ratio = arm["tokens_per_second"] / result["arms"]["hf"]["tokens_per_second"]
        table.add_row(
            arm["title"],
            f"{arm['tokens_per_second']:.0f}",
            f"{ratio:.2f}",
            f"{arm['peak_mib']:.0f}",
            f"{arm['adapter_difference']:.1e}",
        )
    return table


class _Worker:
    """The process of one arm; answers one request at a time."""

    def __init__(self, arm: str, shape: Shape, directory: Path, records: Sequence[Example], threads: int) -> None:
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(other, arm, shape, directory, records, threads), daemon=True
        )

    def __enter__(self) -> _Worker:
        self._process.start()
        self.ask("ready")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()

    def ask(self, what: str) -> Any:
        """Raises RunStopped with the arm's own trace when it fails."""
        self._pipe.send(what)
        while not self._pipe.poll(1.0):
            if not self._process.is_alive():
                raise RunStopped(f"the process of an arm ended with code {self._process.exitcode}")
        failed, answer = self._pipe.recv()
        if failed:
            raise RunStopped(f"an arm of the benchmark failed:\n{answer}")
        return answer


def _serve(pipe: Connection, arm: str, shape: Shape, directory: Path, records: Sequence[Example], threads: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with Path(os.devnull).open("w") as nowhere:  # both trainers print their own figures
        os.dup2(nowhere.fileno(), 1)
    warnings.simplefilter("ignore")
    import torch

    from common.models import load_adapter, quiet_transformers

    torch.set_num_threads(threads)
    quiet_transformers()
    ready: Pass | None = None
    while True:
        request = pipe.recv()
        try:
            answer: Any = None
            if request == "time":
                ready = None  # the model of the pass before
                ready = ARMS[arm].ready(shape, directory, records)
                answer = _timed(ready.run)
            elif request == "factors" and ready is not None:
                answer = ready.factors()
            elif request == "start":
                answer = dict(load_adapter(directory / "start").factors)
            elif request == "our_losses":
                answer = our_losses(shape, directory, records)
            elif request == "padded_losses":
                answer = padded_losses(shape, directory, records)
            pipe.send((False, answer))
        except Exception:
            pipe.send((True, traceback.format_exc()))


def _timed(run: Callable[[], object]) -> Timing:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what passes before have left in the allocator is not this one's baseline
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the peak of this call
    began = time.perf_counter()
    run()
    return Timing(time.perf_counter() - began, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    """Bytes of this process by /proc (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
