"""Mistakes of ours and of libraries, raised anywhere: a reason code, whatever the exception says."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from dataclasses import replace

import pytest

from common.errors import ConfigError, DataError, ModelError, Refusal, StorageError
from common.messages import (
    BASE_MODEL_DIFFERS,
    DATA_UNREADABLE,
    INTERNAL_ERROR,
    MODEL_UNUSABLE,
    NOT_CONFIGURED,
    STORAGE_FAILED,
    Hello,
    Published,
    Refused,
    Request,
    TrainRequest,
)
from common.secagg.messages import Survivors
from tests.client.border.changes import Failing
from tests.client.border.conftest import MARK, NOBODY, Make
from tests.client.conftest import NAMES
from tests.client.guarded import ME


class Panic(BaseException):
    """As pyo3's, which a library in Rust raises: no Exception."""


class Twisted(Exception):
    """Cannot even be shown."""

    def __str__(self) -> str:
        raise RuntimeError(MARK)


def chained() -> Exception:
    try:
        try:
            raise KeyError(MARK)
        except KeyError as error:
            raise ValueError(f"of patient {MARK}") from error
    except ValueError as error:
        error.add_note(MARK)
        return error


ERRORS: list[tuple[BaseException, str]] = [
    (RuntimeError(MARK), INTERNAL_ERROR),
    (KeyError(MARK), INTERNAL_ERROR),
    (AssertionError(MARK), INTERNAL_ERROR),
    (UnicodeDecodeError("utf-8", MARK.encode(), 0, 1, MARK), INTERNAL_ERROR),
    (StopIteration(MARK), INTERNAL_ERROR),
    (RecursionError(MARK), INTERNAL_ERROR),
    (MemoryError(MARK), INTERNAL_ERROR),
    (GeneratorExit(MARK), INTERNAL_ERROR),
    (ExceptionGroup(MARK, [ValueError(MARK)]), INTERNAL_ERROR),
    (Panic(MARK), INTERNAL_ERROR),
    (chained(), INTERNAL_ERROR),
    (StorageError(MARK), STORAGE_FAILED),
    (ConfigError(MARK), NOT_CONFIGURED),
    (ModelError(MARK), MODEL_UNUSABLE),
    (DataError(MARK), DATA_UNREADABLE),
    (OSError(5, MARK, f"/srv/{MARK}"), STORAGE_FAILED),
    (FileNotFoundError(2, "No such file", f"/srv/{MARK}"), STORAGE_FAILED),
    (Refusal(DATA_UNREADABLE, MARK), DATA_UNREADABLE),
    # Refusals in words of no protocol: a text in the place of the code, or beside it.
    (Refusal(f"cannot read /srv/{MARK}"), INTERNAL_ERROR),
    (Refusal("", MARK), INTERNAL_ERROR),
    (Refusal(DATA_UNREADABLE, MARK, (MARK,)), INTERNAL_ERROR),
    (Refusal(BASE_MODEL_DIFFERS, MARK, ("weights", f"/srv/{MARK}")), INTERNAL_ERROR),
    (Refusal(DATA_UNREADABLE, MARK, ("241 records",)), INTERNAL_ERROR),
]


def test_an_exception_in_reading_or_keeping_is_a_reason_code(border: Make) -> None:
    made = border()
    for number, (error, reason) in enumerate(ERRORS, 1):
        made.member = replace(made.member, data=Failing(error), shelf=Failing(error))
        assert made.ask(made.place.request(made.start, attempt=number)) == Refused(reason, ME), repr(error)
        assert made.ask(made.honest(Published)) == Refused(reason, ME), repr(error)
    by_reason: dict[str, set[int]] = {}
    for departed in made.left:
        by_reason.setdefault(json.loads(departed.wire.text)["reason"], set()).add(len(departed.data))
    assert all(len(sizes) <= 2 for sizes in by_reason.values())  # one for each type of message


@pytest.mark.parametrize("asked", [Hello, TrainRequest, Survivors, Published], ids=lambda kind: kind.__name__)
def test_an_exception_around_the_institution_is_a_reason_code(asked: type[Request], border: Make) -> None:
    """Where nobody can say yet what the cause is, all but a refusal are one."""
    made = border()
    request = Survivors(NOBODY, NAMES) if asked is Survivors else made.honest(asked)
    for error, reason in ERRORS:
        expected = Refused(reason if isinstance(error, Refusal) else INTERNAL_ERROR)
        made.heard, made.open = Failing(error), lambda _: nullcontext(made.member)
        assert made.ask(request) == expected, repr(error)
        made.heard, made.open = lambda *_: None, Failing(error)
        assert made.ask(request) == expected, repr(error)


def test_an_exception_that_cannot_be_shown_is_a_reason_code(border: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)  # as in the daemon; pytest's own handler would raise
    made = border()
    made.member = replace(made.member, data=Failing(Twisted()))
    assert made.ask(made.honest(TrainRequest)) == Refused(INTERNAL_ERROR, ME)
