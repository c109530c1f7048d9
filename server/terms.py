"""The numbers of secure aggregation in a whole run, for whoever launches it and for its summary."""

from __future__ import annotations

from collections.abc import Collection

from rich.text import Text

from common.config import Config
from common.privacy.delta import about_institutions
from common.secagg.terms import OFF, Terms
from server.rounds import groups_of


def terms_of(config: Config, absent: Collection[str] = ()) -> Terms | None:
    """The terms of the smallest group that can have a round, so that all rounds keep them; None without masks.

    absent: institutions that take no part; a group that has too few without them has no round.
    """
    if not config.secure_aggregation.enabled:
        return None
    least = config.federation.min_cohort
    sizes = [sum(name not in absent for name in group) for group in groups_of(config)]
    return Terms.of(min(size for size in sizes if size >= least), config.secure_aggregation.colluders, least)


def launch_line(config: Config) -> Text:
    """What the coordinator of this run can learn, in one line; red when that is every update."""
    terms = terms_of(config)
    return Text(OFF, "red") if terms is None else Text(terms.told())


def launch_lines(config: Config) -> tuple[Text, ...]:
    """What a coordinator should know before it launches this run; of privacy, what can be known without any record."""
    about_delta = about_institutions(config.privacy, len(config.data.names))
    return (launch_line(config), *([Text(about_delta, "yellow")] if about_delta else []))
