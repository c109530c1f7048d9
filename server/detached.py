"""A run in the background: a process that outlives the command which started it, and its terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from common.errors import RunStopped, SilotuneError
from common.files import storage_errors
from server.home import ServerHome
from server.runs import Run

_DRIVER = "from server.detached import main; main()"
_ANSWER_BYTES = 1 << 16


def start(home: ServerHome, run: Run, passphrase: bytes | None) -> int:
    """Begins to drive the run in the background, and returns the process's number once it does.

    It has a session and a parent of its own, so that neither a closed terminal nor the end of this process ends it.
    What it prints goes to the run's log. The passphrase reaches it through a pipe and is nowhere else.

    Raises RunStopped when it ended before it began, with what it said of that; StorageError.
    """
    answers, answering = os.pipe()
    passed = [answering]
    words = [str(home.root), run.name, str(answering)]
    try:
        if passphrase is not None:
            reading, writing = os.pipe()
            passed.append(reading)
            words.append(str(reading))
            os.write(writing, passphrase)  # shorter than any pipe's room
            os.close(writing)
        with storage_errors(run.log), run.log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _DRIVER, *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=passed,
                start_new_session=True,
            )
    finally:
        for handle in passed:
            os.close(handle)
    with os.fdopen(answers, "rb") as file:
        answer = file.read(_ANSWER_BYTES)  # until it is begun, or over
    process.wait()
    try:
        found = json.loads(answer)
        pid, error = int(found.get("pid", 0)), str(found.get("error", ""))
    except ValueError:
        pid, error = 0, f"it said nothing; see: silotune-server logs {run.name}"
    if not pid:
        raise RunStopped(f"{run.name} could not be driven in the background: {error}")
    return pid


def main() -> None:
    """The process in the background: home, run, the descriptor to answer on, and that of the passphrase if any."""
    words = sys.argv[1:]
    answering = int(words[2])
    # The one that was started ends at once, so that the one which drives is nobody's child.
    if os.fork():
        os._exit(0)
    answer = _Answer(answering)
    try:
        _drive(ServerHome(Path(words[0])), words[1], int(words[3]) if len(words) > 3 else None, answer)
    except SilotuneError as error:
        answer.give(error=str(error))
        sys.exit(1)
    finally:
        answer.give(error="it failed, and its log says how")


class _Answer:
    """What the waiting command is told: once, and only the first thing."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "wb")

    def give(self, **told: object) -> None:
        if not self._file.closed:
            with suppress(OSError), self._file:  # whoever asked may be gone
                self._file.write(json.dumps(told).encode())


def _drive(home: ServerHome, name: str, descriptor: int | None, answer: _Answer) -> None:
    from common.private_files import read_passphrase
    from server import enrolment, runs
    from server.driver import Audience, conduct, interruptible

    with interruptible() as interruption:
        run = runs.find(home.runs, name)
        signer = enrolment.identity(home, read_passphrase(descriptor, None))
        conduct(home, run, signer, interruption.stop, Audience(on_ready=lambda: answer.give(pid=os.getpid())))
