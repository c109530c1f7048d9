"""The bundle that every run has: no code, and the same bytes everywhere."""

from __future__ import annotations

from flwr.common.config import get_fab_config

from common.bundle import bundle, bundle_digest


def test_the_bundle_is_the_same_everywhere_and_flower_takes_it() -> None:
    # Members list this hash in their policies: a change here shuts every run out until they list the new one.
    assert bundle_digest() == "9fce16d742f44e7dc30c94ef90bb2f57720984f66f93e352389be28a36ec334b"
    assert bundle() == bundle()
    config = get_fab_config(bundle())
    assert config["project"]["dependencies"] == []
