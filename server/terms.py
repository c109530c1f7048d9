"""What protects a whole run, for whoever launches it; the numbers of secure aggregation for its summary, too."""

from __future__ import annotations

from collections.abc import Collection

from rich.text import Text

from common.config import Config
from common.privacy import promise
from common.privacy.delta import about_institutions
from common.privacy.promise import promise_of
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


def privacy_lines(config: Config) -> tuple[Text, ...]:
    """What this run promises of differential privacy, red where there is none, and what to mind of it.

    Raises ConfigError where no noise reaches `privacy.epsilon`.
    """
    found = promise_of(config)
    if found is None:
        return (Text(promise.OFF, "red"),)
    warning = found.warning()
    return (Text(found.told()), *([] if warning is None else [Text(warning, "yellow")]))


def launch_lines(config: Config) -> tuple[Text, ...]:
    """What a coordinator should know before it launches this run; of privacy, what can be known without any record.

    Raises ConfigError where no noise reaches `privacy.epsilon`.
    """
    about_delta = about_institutions(config.privacy, len(config.data.names))
    return (launch_line(config), *privacy_lines(config), *([Text(about_delta, "yellow")] if about_delta else []))
