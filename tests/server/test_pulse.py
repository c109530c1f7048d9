"""When a service counts as one that hangs: calls that it misses tell, and time alone does not."""

from __future__ import annotations

from server.pulse import Pulse


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def missing(pulse: Pulse, times: int = 3) -> Pulse:
    for _ in range(times):
        pulse.missed()
    return pulse


def test_it_hangs_once_it_was_silent_for_longer_than_it_may() -> None:
    clock = Clock()
    pulse = Pulse(60, 180, clock)
    pulse.answered()
    missing(pulse)
    clock.now += 60
    assert not pulse.hangs()
    clock.now += 0.1
    assert pulse.hangs()
    pulse.answered()  # too late: it is about to be ended
    assert pulse.hangs()
    pulse.started()
    assert not missing(pulse).hangs()


def test_an_answer_gives_it_the_whole_time_again() -> None:
    clock = Clock()
    pulse = missing(Pulse(60, 180, clock))
    for _ in range(5):
        clock.now += 59
        pulse.answered()
        assert not missing(pulse).hangs()


def test_it_may_take_longer_to_start() -> None:
    clock = Clock()
    pulse = missing(Pulse(60, 180, clock))
    clock.now += 180
    assert not pulse.hangs()
    clock.now += 1
    assert pulse.hangs()
    pulse.started()
    clock.now += 61
    assert not missing(pulse).hangs()


def test_time_alone_tells_nothing() -> None:
    """As after a machine that slept: everybody was silent, and nobody was asked."""
    clock = Clock()
    pulse = Pulse(60, 180, clock)
    pulse.answered()
    clock.now += 10**6
    assert not missing(pulse, 2).hangs()
    assert missing(pulse, 1).hangs()
