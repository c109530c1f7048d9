"""What a run found, read from summary.json and metrics.jsonl into frozen dataclasses.

Names of institutions, the configuration and version strings are other people's input: they are cleaned of control and
direction-changing characters here, and escaped by the page's template on writing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from server.documents import LONGEST_NAME, Node, clean
from server.protection import Protection

PERPLEXITY_TOLERANCE = 0.01
"""Relative change of perplexity below which two arms count as even."""

ACCURACY_TOLERANCE = 0.05
"""Change of accuracy below which two arms count as even: an institution's own test asks tens of exact questions."""
SMALL_GAP = 1.05
"""Below this ratio of perplexities, best local-only to pooled, `gap_closed` divides by next to nothing."""

SIGNS = {"gained": "▲", "lost": "▼", "even": "=", "mixed": "◆", "not compared": "–"}
"""Outcomes of a comparison, each with a sign: colour alone never carries a meaning."""


@dataclass(frozen=True)
class Score:
    """perplexity: per supervised token, infinite if a model diverged. accuracy: a share, None if nothing was asked."""

    perplexity: float
    accuracy: float | None

    @classmethod
    def read(cls, node: Node) -> Score:
        """Read one; a perplexity that is missing or NaN is one that could not be computed, so infinite."""
        given, accuracy = node.get("perplexity"), node.get("accuracy")
        perplexity = math.inf if given is None else given.number()
        exact = None if accuracy is None else accuracy.number()
        return cls(
            math.inf if math.isnan(perplexity) else perplexity,
            None if exact is None or math.isnan(exact) else exact,
        )


@dataclass(frozen=True)
class Comparison:
    """What going from `before` to `after` brought by an institution's own test; `before` is None if not measured."""

    name: str
    before: Score | None
    after: Score

    @property
    def perplexity_change(self) -> float | None:
        """Relative, -0.2 is a fifth less; None where it cannot be said."""
        if self.before and math.isfinite(self.before.perplexity) and math.isfinite(self.after.perplexity):
            return self.after.perplexity / self.before.perplexity - 1
        return None

    @property
    def accuracy_change(self) -> float | None:
        """In shares, 0.2 is twenty points more; None where it cannot be said."""
        if self.before is None or self.before.accuracy is None or self.after.accuracy is None:
            return None
        return self.after.accuracy - self.before.accuracy

    @property
    def outcome(self) -> str:
        """`gained`, `lost`, `even`, `mixed` when perplexity and accuracy disagree, or `not compared`."""
        if self.before is None:
            return "not compared"
        before, after = self.before.perplexity, self.after.perplexity
        better = after < before * (1 - PERPLEXITY_TOLERANCE)  # of two infinities neither is better
        worse = after > before * (1 + PERPLEXITY_TOLERANCE)
        change = round(self.accuracy_change or 0.0, 9)  # 0.65 - 0.6 is a little less than 0.05
        better, worse = better or change >= ACCURACY_TOLERANCE, worse or change <= -ACCURACY_TOLERANCE
        return "mixed" if better and worse else "gained" if better else "lost" if worse else "even"


@dataclass(frozen=True)
class Arm:
    """One row of table 1. kind: `base`, `best` (of the local-only arms), `local`, `federated` or `pooled`."""

    kind: str
    score: Score
    institution: str = ""

    @property
    def label(self) -> str:
        """The arm in words, without the institution."""
        return {
            "base": "Base model", "best": "Best local-only", "local": "Local-only",
            "federated": "Federated", "pooled": "Pooled",
        }[self.kind]  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """The part of `summary.json` that the report tells. Names are cleaned; nothing here holds a path.

    local: local-only arms on everybody's test, best perplexity first. best: the one that `local_best` names.
    home: each institution's own test, to federated from local-only, or from the base if no comparison was run.
    home_compared: whether `home` starts from local-only.
    bytes_up, bytes_down: of one institution in one round. seconds: by phase, in order, with "total".
    secure_aggregation_share: of the rounds' seconds; None where it was off or not measured. run: the name of a run of
    real institutions, whose own scores nobody but they know; empty for a simulation. delivered: who has the adapter,
    of such a run.
    """

    name: str
    method: str
    seed: int
    rounds_run: int
    rounds_planned: int
    best_round: int | None
    stopped_early: bool
    institutions: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]
    absences: tuple[tuple[str, str, int], ...]
    base: Score
    federated: Score
    best: tuple[str, Score] | None
    local: tuple[tuple[str, Score], ...]
    pooled: Score | None
    home: tuple[Comparison, ...]
    home_compared: bool
    gap_closed: float | None
    bytes_up: float
    bytes_down: float
    base_parameters: int
    adapter_parameters: int
    void_updates: int
    seconds: Mapping[str, float]
    secure_aggregation_share: float | None
    protection: Protection
    base_model: tuple[tuple[str, str], ...]
    versions: tuple[tuple[str, str], ...]
    started: str
    run: str
    delivered: tuple[str, ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Summary:
        """Read `summary.json`; optional parts of a comparison may be missing or null.

        Raises:
            StorageError: something is missing or of the wrong type; names it.
        """
        root = Node(data, "summary.json")
        everyone = root["everyone"]
        best, pooled, gap, best_round = (
            everyone.get("local_best"), everyone.get("pooled"), root.get("gap_closed"), root.get("best_round")
        )  # fmt: skip
        local = [(name, Score.read(node)) for name, node in everyone["local"].items()] if everyone.get("local") else []
        own = list(root["own"].items())
        compared = any(node.get("local") for _, node in own)
        home = []
        for name, node in own:
            before = node.get("local" if compared else "base")
            home.append(Comparison(name, None if before is None else Score.read(before), Score.read(node["federated"])))
        gap_closed = None if gap is None else gap.number()
        share = root.get("secure_aggregation_share")
        return cls(
            name=clean(root["name"].text(), LONGEST_NAME),
            method=root["method"].text(),
            seed=root["seed"].whole(),
            rounds_run=root["rounds_run"].whole(),
            rounds_planned=root["rounds_planned"].whole(),
            best_round=None if best_round is None else best_round.whole(),
            stopped_early=root["stopped_early"].flag(),
            institutions=_names(root["institutions"]),
            refused=tuple((name, node.text()) for name, node in root["refused"].items()) if root.get("refused") else (),
            absences=_absences(root.get("absences")),
            base=Score.read(everyone["base"]),
            federated=Score.read(everyone["federated"]),
            best=None if best is None else (clean(best["institution"].text(), LONGEST_NAME), Score.read(best)),
            local=tuple(sorted(local, key=lambda arm: arm[1].perplexity)),
            pooled=None if pooled is None else Score.read(pooled),
            home=tuple(home),
            home_compared=compared,
            gap_closed=gap_closed if gap_closed is not None and math.isfinite(gap_closed) else None,
            bytes_up=root["bytes_per_client_round"]["up"].number(),
            bytes_down=root["bytes_per_client_round"]["down"].number(),
            base_parameters=root["parameters"]["base"].whole(),
            adapter_parameters=root["parameters"]["adapter"].whole(),
            void_updates=root["void_updates"].whole(),
            seconds={name: node.number() for name, node in root["seconds"].items()},
            secure_aggregation_share=None if share is None else share.number(),
            protection=Protection.read(root["privacy"]),
            base_model=tuple((name, without_paths(node.plain())) for name, node in root["base_model"].items()),
            versions=tuple((name, without_paths(node.plain())) for name, node in root["versions"].items()),
            started=_moment(root["started"].text()),
            run="" if (run := root.get("run")) is None else clean(run.text(), 2 * LONGEST_NAME),
            delivered=_names(root.get("delivered")),
        )

    @property
    def has_accuracy(self) -> bool:
        """Whether any arm was asked for exact answers."""
        return any(
            score.accuracy is not None for score in [*(a.score for a in self.arms), *(c.after for c in self.home)]
        )

    @property
    def arms(self) -> list[Arm]:
        """The rows of table 1, in reading order; the best local-only arm leads the local ones."""
        best = [Arm("best", self.best[1], self.best[0])] if self.best else []
        others = [Arm("local", score, name) for name, score in self.local if not best or name != best[0].institution]
        pooled = [Arm("pooled", self.pooled)] if self.pooled else []
        return [Arm("base", self.base), *best, *others, Arm("federated", self.federated), *pooled]

    @property
    def deployed(self) -> bool:
        """Whether real institutions took part, each of which keeps its own scores to itself."""
        return bool(self.run)

    @property
    def undelivered(self) -> list[str]:
        """Who has not got the adapter of such a run yet."""
        return [name for name in self.institutions if self.deployed and name not in self.delivered]

    @property
    def members(self) -> list[str]:
        """The roster without those that were refused."""
        absent = {name for name, _ in self.refused}
        return [name for name in self.institutions if name not in absent]

    def with_outcome(self, kind: str) -> list[str]:
        """Names of the institutions whose comparison with local-only came out as `kind`."""
        return [c.name for c in self.home if c.outcome == kind] if self.home_compared else []


def _names(node: Node | None) -> tuple[str, ...]:
    return tuple(clean(part.text(), LONGEST_NAME) for part in node.elements()) if node else ()


def _absences(node: Node | None) -> tuple[tuple[str, str, int], ...]:
    """Institution, reason code and number of rounds it missed for that reason."""
    if not node:
        return ()
    return tuple((name, reason, rounds.whole()) for name, reasons in node.items() for reason, rounds in reasons.items())


@dataclass(frozen=True)
class Round:
    """One line of `metrics.jsonl`. train_loss: nats per supervised token. validation: None if not evaluated."""

    number: int
    contributors: int
    void: int
    train_loss: float | None
    validation: Score | None
    seconds: float
    bytes_up: float
    bytes_down: float

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Round:
        """Read one round.

        Raises:
            StorageError: something is missing or of the wrong type; names it.
        """
        node = Node(data, "metrics.jsonl")
        loss, validation = node.get("train_loss"), node.get("validation")
        return cls(
            number=node["round"].whole(),
            contributors=node["contributors"].whole(),
            void=node["void"].whole(),
            train_loss=None if loss is None else loss.number(),
            validation=None if validation is None else Score.read(validation),
            seconds=sum(value.number() for _, value in node["seconds"].items()),
            bytes_up=node["bytes_up"].number(),
            bytes_down=node["bytes_down"].number(),
        )


_PATH = re.compile(
    r"""(?P<lead>^|[\s'"=,\[({])(?:file://)?(?:~|[A-Za-z]:)?[\\/](?=[^\s'"])(?:[^\n'",\]})]*[\\/])?""", re.MULTILINE
)


def without_paths(text: str) -> str:
    """Text in which absolute paths keep their last part only: a report travels further than its machine's layout.

    Errs on the side of hiding: of two paths on one line that only a space divides, the first is hidden whole.
    """
    return _PATH.sub(r"\g<lead>…/", text)


def _moment(stamp: str) -> str:
    """An ISO 8601 time for reading; left as it is when it is none."""
    try:
        moment = datetime.fromisoformat(stamp)
    except ValueError:
        return stamp
    return f"{moment.day} {moment:%B %Y, %H:%M} {moment.tzname() or ''}".strip()
