"""Where things lie in the directory of a simulated run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.config import COORDINATOR, Config


@dataclass(frozen=True)
class RunDirectory:
    """A run's directory; all paths absolute, since actors may have another working directory.

    records: the generated or given records. institutions: each virtual client's own files, which the coordinator of
    the simulation does not read while it runs. arms: one directory a reference arm. attacks: what attacks found, and
    the runs that they needed.
    """

    root: Path

    @classmethod
    def at(cls, path: Path) -> RunDirectory:
        return cls(path.expanduser().resolve())

    def records(self, config: Config) -> Path:
        return Path(config.data.directory).expanduser().resolve() if config.data.directory else self.root / "data"

    def central(self, config: Config, split: str) -> Path:
        """The coordinator's own records: `validation` or `test`."""
        return self.records(config) / COORDINATOR / f"{split}.jsonl"

    @property
    def institutions(self) -> Path:
        return self.root / "institutions"

    def ledger(self, name: str) -> Path:
        """The privacy ledger of a virtual client."""
        return self.institutions / name / "ledger"

    @property
    def pooled_records(self) -> Path:
        """Where the institution of the pooled arm has its folder."""
        return self.root / "pooled"

    @property
    def arms(self) -> Path:
        return self.root / "arms"

    @property
    def attacks(self) -> Path:
        return self.root / "attacks"

    def attack(self, name: str) -> Path:
        """What the attack of that name found."""
        return self.attacks / f"{name}.json"
