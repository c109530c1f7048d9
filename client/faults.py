"""Whose fault an error is, and the one word by which the coordinator learns of it; the rest stays here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import ConfigError, DataError, ModelError, Refusal, StorageError
from common.messages import (
    DATA_UNREADABLE,
    INTERNAL_ERROR,
    MALFORMED,
    MODEL_UNUSABLE,
    NOT_CONFIGURED,
    STORAGE_FAILED,
)

_CODES: tuple[tuple[type[Exception], str], ...] = (
    (DataError, DATA_UNREADABLE),
    (ModelError, MODEL_UNUSABLE),
    (ConfigError, NOT_CONFIGURED),
    (StorageError, STORAGE_FAILED),
    (OSError, STORAGE_FAILED),
)


def reason_of(error: BaseException) -> str:
    """The reason code of an error that is no refusal: this institution's own fault, or internal_error, our mistake."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), INTERNAL_ERROR)


@contextmanager
def asked_for() -> Iterator[None]:
    """Around what follows from the coordinator's message alone: numbers that cannot be meant are its own fault.

    Raises Refusal(malformed) in place of ConfigError.
    """
    try:
        yield
    except ConfigError as error:
        raise Refusal(MALFORMED, str(error)) from error
