"""Whether a service that runs still answers, or hangs and has to be started anew."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_LEAST_MISSES = 3  # a machine that slept finds everything silent at once; only calls that fail tell


class Pulse:
    """What is known of a service from calls that it answered and missed; for any number of threads.

    silent_s: how long it may be silent. starting_s: how long before its first answer. clock: seconds that only grow.
    """

    def __init__(self, silent_s: float, starting_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._silent_s = silent_s
        self._starting_s = starting_s
        self._clock = clock
        self._lock = threading.Lock()
        self.started()

    def started(self) -> None:
        """It was started just now."""
        self._hangs = False
        self._begin(self._starting_s)

    def answered(self) -> None:
        """A call was answered, whatever with."""
        self._begin(self._silent_s)

    def missed(self) -> None:
        """A call was not answered."""
        with self._lock:
            self._misses += 1

    def hangs(self) -> bool:
        """Whether it missed several calls, and answered none, for longer than it may; then so until it is started."""
        with self._lock:
            silent = self._misses >= _LEAST_MISSES and self._clock() - self._since > self._patience_s
            self._hangs = self._hangs or silent
            return self._hangs

    def _begin(self, patience_s: float) -> None:
        with self._lock:
            self._since, self._patience_s, self._misses = self._clock(), patience_s, 0
