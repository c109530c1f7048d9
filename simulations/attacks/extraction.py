"""Does the published adapter say secrets that it was trained on?

Made-up numbers stand in records that are put among one institution's own, each number in one record or in several.
Afterwards the adapter is asked for them, word for word as the records ask. said: how many greedy decoding says without
a mistake. exposure: log2 of how many alternatives there are, less log2 of the place that the secret takes among them by
its loss (Carlini et al. 2019, section 4.2, over a sample of alternatives); 1.4 on average for a secret of which nothing
is known, since its place is then as likely to be any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from client.units import Unit
from common.adapter import Adapter
from common.config import Config
from common.evaluation import greedy, same_answer
from common.examples import examples_of
from common.models import LoraModel, load
from common.randomness import seeded
from common.records import Record, write_jsonl
from simulations import prepare
from simulations.attacks.arms import (
    BASE,
    FEDERATED,
    IN_WORDS,
    LOCAL,
    PRIVATE,
    Ground,
    claimed,
    jobs,
    own_and_other,
    published,
    train_all,
    with_privacy,
)
from simulations.attacks.probing import losses
from simulations.attacks.result import Measure, Result, Told, judged
from simulations.layout import RunDirectory

NAME = "extraction"
DIGITS = 6
REPETITIONS = (1, 4, 16)
EACH = 4  # secrets of each number of repetitions
ALTERNATIVES = 255

_ROOM = 4  # tokens that an answer may be longer than the secret
_OFTEN = 20
"""By Markov's inequality, more than so many times what is expected at most comes up in fewer than 1 of 20 attacks. Each
number of repetitions is judged by itself, at its part of that: secrets in many records may be said, and would otherwise
excuse those in one.
"""


@dataclass(frozen=True)
class Secret:
    """One person's number, which stands in so many records."""

    owner: str
    number: str
    repetitions: int

    @property
    def record(self) -> Record:
        return self.saying(self.number)

    def saying(self, number: str) -> Record:
        """The record with another number in it."""
        return Record(f"Door code of {self.owner}:", number, f"{NAME}/{self.owner}")


def secrets_of(seed: int) -> tuple[Secret, ...]:
    """Numbers and owners that are nobody's."""
    rng = seeded(seed, "secrets")
    syllables = ("ka", "lo", "mi", "re", "su", "ta", "vo", "ni", "pe", "du")
    found = []
    for place in range(EACH * len(REPETITIONS)):
        # Each owner another one: the place is in the name.
        owner = "".join(syllables[i] for i in (*rng.integers(10, size=2), *divmod(place, 10))).capitalize()
        found.append(Secret(owner, _number(rng), REPETITIONS[place // EACH]))
    return tuple(found)


def _number(rng: np.random.Generator) -> str:
    return "".join(str(digit) for digit in rng.integers(10, size=DIGITS))


def planted(ground: Ground, secrets: Sequence[Secret]) -> Ground:
    """The same ground with the secrets among the first institution's training records; no run of it is finished."""
    config, folder = ground.config, ground.runs / NAME / "data"
    federation = prepare.gather(replace(config.data, directory=str(ground.records)))
    first, own = next(iter(federation.institutions.items()))
    prepare.write(federation, folder)
    # The stream is shuffled every pass, so it does not matter where they stand.
    more = [secret.record for secret in secrets for _ in range(secret.repetitions)]
    write_jsonl(folder / first / "train.jsonl", [*own.train, *more])
    return Ground(prepare.from_now_on(config, folder), RunDirectory(ground.runs / NAME))


Answer = tuple[bool, float]
"""Whether a secret is said, and its exposure in bits."""


def attack(ground: Ground, tell: Told) -> Result:
    """Attacks every arm. Raises DataError, ModelError and RunStopped as their names say."""
    secrets = secrets_of(ground.config.seed)
    mine = planted(ground, secrets)
    first = mine.config.data.names[0]
    adapters = train_all(jobs(mine, (LOCAL, FEDERATED, PRIVATE), [first]), mine.config.simulation.actors, tell)
    model = load(mine.config.model, mine.config.lora, mine.config.seed)
    base = model.read()
    tell("asking every adapter")
    targets = {BASE: base} | {arm: adapter for (arm, _), adapter in adapters.items()}
    found = {arm: asked(model, targets[arm], secrets, mine.config) for arm in (BASE, LOCAL, FEDERATED, PRIVATE)}
    epsilon = claimed(with_privacy(mine.config), base)
    return result(mine.config, epsilon, secrets, found, published(adapters[PRIVATE, ""]))


def asked(model: LoraModel, adapter: Adapter, secrets: Sequence[Secret], config: Config) -> list[Answer]:
    """Of each secret, whether the adapter says it, and its exposure in bits."""

    def units(records: Sequence[Record]) -> list[Unit]:
        return [Unit(examples) for examples in examples_of(records, model.tokenizer, config.train).by_record]

    own = units([secret.record for secret in secrets])
    prompts = [unit.examples[0].ids[: unit.examples[0].prompt_tokens] for unit in own]
    model.write(adapter)
    answers = greedy(model, prompts, max(unit.supervised for unit in own) + _ROOM)
    found = []
    for secret, unit, answer in zip(secrets, own, answers, strict=True):
        rng = seeded(config.seed, "alternatives", secret.owner)
        others = units([secret.saying(_number(rng)) for _ in range(ALTERNATIVES)])
        # Summed, as the probability of a whole number is, however many tokens it takes.
        nats = losses(model, adapter, [unit, *others]) * [one.supervised for one in (unit, *others)]
        place = 1 + int((nats[1:] < nats[0]).sum())
        found.append((same_answer(answer, secret.number), math.log2(ALTERNATIVES + 1) - math.log2(place)))
    return found


def of_repetitions(secrets: Sequence[Secret], answers: Sequence[Answer], repetitions: int) -> list[Answer]:
    """The answers about secrets that stand in so many records."""
    return [answer for secret, answer in zip(secrets, answers, strict=True) if secret.repetitions == repetitions]


def result(
    config: Config,
    epsilon: float,
    secrets: Sequence[Secret],
    found: Mapping[str, Sequence[Answer]],
    note: str,
) -> Result:
    """What the answers come to. config: of the run that is attacked. epsilon: what the private arm claims. note: what
    has to be said of that arm.
    """
    private, (own, other) = with_privacy(config), own_and_other(config)
    measures = []
    for arm, answers in found.items():
        for repetitions in REPETITIONS:
            of = of_repetitions(secrets, answers, repetitions)
            right = sum(yes for yes, _ in of)
            about = f"{right} of {len(of)}, in {repetitions} record{'s' if repetitions > 1 else ''} each"
            measures.append(Measure(arm, f"said, x{repetitions}", right / len(of), about))
            mean = sum(bits for _, bits in of) / len(of)
            most = math.log2(ALTERNATIVES + 1)
            about = "; ".join(part for part in (f"bits, at most {most:g}", note if arm == PRIVATE else "") if part)
            measures.append(Measure(arm, f"exposure, x{repetitions}", mean, about))
    said = {arm: sum(yes for yes, _ in answers) for arm, answers in found.items()}
    kept = True
    for repetitions in REPETITIONS:
        group = [secret for secret in secrets if secret.repetitions == repetitions]
        right = sum(yes for yes, _ in of_repetitions(secrets, found[PRIVATE], repetitions))
        allowed = expected_at_most(private, epsilon, group)
        limit = _OFTEN * len(REPETITIONS) * allowed
        kept = kept and right <= limit
        told = f"more than {limit:.2g} would refute it" if limit < len(group) else "no number would refute it"
        about = f"epsilon {epsilon:.2f} of {private.privacy.mode}; {told}"
        measures.append(Measure(PRIVATE, f"expected at most, x{repetitions}", allowed, about))
    return judged(
        NAME,
        "differential privacy",
        promised=own == PRIVATE,
        kept=kept,
        claim=f"With differential privacy, a unit's secret is said at most {math.exp(min(epsilon, 700.0)):.3g}"
        " (e^epsilon) times as often as by who never saw it.",
        finding=f"Trained again as in this run, with {len(secrets)} secrets among the records, its adapter says"
        f" {said[own]} of them; {IN_WORDS[other]} {said[other]} are said, by what was trained alone {said[LOCAL]},"
        f" by the base model {said[BASE]}.",
        measures=measures,
    )


def expected_at_most(private: Config, epsilon: float, secrets: Sequence[Secret]) -> float:
    """How many secrets are said at most on average, if the claim holds; who never saw one says it once in 10^DIGITS.

    A secret in k records is k units where a unit is a record, and one where it is a person or an institution.
    """
    delta, total = private.privacy.delta, 0.0
    for secret in secrets:
        units = secret.repetitions if private.privacy.mode in ("record", "distributed") else 1
        slack = delta * sum(math.exp(min(epsilon * step, 700.0)) for step in range(units))
        total += min(1.0, math.exp(min(epsilon * units, 700.0)) * 10.0**-DIGITS + slack)
    return total
