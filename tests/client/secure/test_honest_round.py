"""An honest round: the plain sum bit for bit, and nothing more from anybody once it is over."""

from __future__ import annotations

from tests.client.secure.conftest import ABC, ABCD, A, B, C, D, gives_nothing_more
from tests.federations import Federation, adapter_of


def test_an_honest_round_gives_the_plain_sum_bit_for_bit(routed: Federation) -> None:
    coordinator = routed.coordinator()
    assert coordinator.sum().tobytes() == routed.total(coordinator.plan, ABCD).tobytes()
    assert routed.trained == dict.fromkeys(ABCD, 1)
    for name in ABCD:
        gives_nothing_more(routed, coordinator, name)


def test_a_round_after_it_is_another_sum_with_an_update_of_its_own(federation: Federation) -> None:
    federation.coordinator().sum()
    later = adapter_of(2)
    coordinator = federation.coordinator(federation.plan(2, ABC, later, round=2))
    assert coordinator.sum(later).tobytes() == federation.total(coordinator.plan, ABC).tobytes()
    assert federation.trained == {A: 2, B: 2, C: 2, D: 1}
