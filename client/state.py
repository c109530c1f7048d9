"""What an institution keeps between rounds: optimizer moments and its place in its own records.

Kept on the institution's own disk, one file a round, so that a killed round is repeated from where it began.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import StorageError
from common.files import write_bytes

# The round under way, the last complete one, and the one before it: a coordinator whose newest checkpoint is damaged
# goes back to the one before and repeats a round that was complete.
_KEPT_ROUNDS = 3


@dataclass(frozen=True)
class LocalState:
    """An institution's own state after a round; never leaves it.

    rounds, position, steps: rounds trained, records seen and optimizer steps taken since the run began.
    first, second: AdamW's moment estimates by adapter key; empty before the first step.
    """

    rounds: int = 0
    position: int = 0
    steps: int = 0
    first: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    second: dict[str, NDArray[np.float32]] = field(default_factory=dict)


class StateStore:
    """The states of one run on disk; `before(r)` is what round r starts from."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def _file(self, round_number: int) -> Path:
        return self.directory / f"round-{round_number:05d}.safetensors"

    def _saved_rounds(self) -> list[int]:
        return sorted(int(file.stem.split("-")[1]) for file in self.directory.glob("round-*.safetensors"))

    def before(self, round_number: int) -> LocalState:
        """The state after the last round before `round_number` that this institution took part in.

        Raises StorageError when the file cannot be read.
        """
        earlier = [number for number in self._saved_rounds() if number < round_number]
        return self._read(self._file(earlier[-1])) if earlier else LocalState()

    def save(self, round_number: int, state: LocalState) -> None:
        """Keeps the state after `round_number`; drops what no repeat can need, and later rounds, which it undoes.

        Raises StorageError when the disk is full or read-only; the states before stay.
        """
        from safetensors.numpy import save

        tensors = {f"first/{key}": value for key, value in state.first.items()}
        tensors |= {f"second/{key}": value for key, value in state.second.items()}
        about = {"rounds": str(state.rounds), "position": str(state.position), "steps": str(state.steps)}
        write_bytes(self._file(round_number), save(tensors, metadata=about))
        saved = self._saved_rounds()
        needed = [number for number in saved if number <= round_number][-_KEPT_ROUNDS:]
        for number in set(saved) - set(needed):
            self._file(number).unlink(missing_ok=True)

    def _read(self, file: Path) -> LocalState:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="np") as tensors:
                about = tensors.metadata() or {}
                arrays = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 - not a mapping
            rounds, position, steps = (int(about[name]) for name in ("rounds", "position", "steps"))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise StorageError(f"local state {file} cannot be read: {error}; restore it or start a new run") from error
        return LocalState(
            rounds=rounds,
            position=position,
            steps=steps,
            first={key.removeprefix("first/"): value for key, value in arrays.items() if key.startswith("first/")},
            second={key.removeprefix("second/"): value for key, value in arrays.items() if key.startswith("second/")},
        )
