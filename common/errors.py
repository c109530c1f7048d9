"""The exceptions of Silotune, one class a cause.

Every message says what was expected, what was found and what to do next. Only `reason` of a `Refusal` may cross
the border of an institution: it is a fixed word that says nothing of the data.
"""

from __future__ import annotations


class SilotuneError(Exception):
    """Root of all errors a user can cause and mend; commands print them without a stack trace."""


class ConfigError(SilotuneError):
    """A configuration that cannot be meant: unknown key, wrong type, impossible value. Lists every mistake at once."""


class DataError(SilotuneError):
    """Records that cannot be read; names the file and the line."""


class ModelError(SilotuneError):
    """A base model or an adapter that is missing, broken, or not the one that was agreed."""


class StorageError(SilotuneError):
    """The disk refused: full, read-only, or not a run directory. What was written before is kept."""


class Unwritable(StorageError):
    """A file or a directory could not be written. Once there is room for it, the same may be tried again."""


class RunStopped(SilotuneError):
    """A run that ended before its last round; says why, what is kept, and how to go on."""


class Unreachable(SilotuneError):
    """Another machine or a service that cannot be reached, or does not answer as it must; says which step failed."""


class Refusal(SilotuneError):
    """An institution does not take part in a phase.

    reason: one word of `messages.REASONS`. parts: words that say what differs, none of them from data (see
    `messages.Refused`). Both are all that the coordinator learns.
    detail: for the institution's own log only. It may hold paths or data, so it is never sent.
    """

    def __init__(self, reason: str, detail: str = "", parts: tuple[str, ...] = ()) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
        self.parts = parts
