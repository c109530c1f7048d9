"""General text for pre-training: English-like, with every word of the domains and the look of their records, no rules.

Cues, names, codes and actions of a domain meet in random combination, each drawn independently of the others, so that
reading any amount of it says nothing about which findings lead to which diagnosis. What can be learned from it is the
language: which phrases are findings, which wordings mean the same, how a question is followed by an answer, and, on
everyday subjects, that clues imply a name.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from random import Random

from common.records import Record
from simulations.generate.banks import BANKS
from simulations.generate.domain import Domain
from simulations.generate.everyday import FEELINGS, PEOPLE, THINGS, TIMES, VERBS
from simulations.generate.hospitals import HOSPITALS

DOMAINS = (HOSPITALS, BANKS)

# Prompt and completion; the prompt is empty for running text.
Document = tuple[str, str]

_SEPARATORS = ("; ", ", ", " | ", ". ", " / ", " - ")
_CUES = {domain.name: domain.cues() for domain in DOMAINS}
# The headings of forms everywhere; which of them an institution uses, and how it answers, is its own style.
_OPENINGS = (
    *(
        "Coding sheet",
        "Clinic letter",
        "Ward round",
        "Application",
        "Complaint",
        "Letter",
        "Loan file",
        "Question",
        "Q",
    ),
    *("Note", "Report", "Unhappy customer", "Stay", "ER", "Req"),
)
_HEADINGS = ("Findings", "History", "Facts", "Noted", "Found", "Given", "Says", "Writes")
_CLOSINGS = (
    *("Code:", "Conclusion:", "Decision:", "Handling:", "Result:", "Assessment:", "IMP:", "Next?", "DX:"),
    *("What do we answer?", "Who helps?", "What matters most?", "Which next step suits?", "What explains it?"),
    *("Please code.", "Main point?", "Key point", "Likely cause", "What is it?", "What to do?", "What is the matter?"),
    *("What settles it?", "Route"),
)

_HELD_OUT_ONE_IN = 40
_REMARKS = tuple(remark for domain in DOMAINS for remark in domain.remarks)


def documents(count: int, seed: int, *, held_out: bool = False) -> Iterator[Record]:
    """`count` documents of general text, the same for the same seed; nobody's records (person is empty).

    One text in _HELD_OUT_ONE_IN, whatever the seed, comes up in held-out text alone: the two never share a document.
    """
    rng = Random(2 * seed + held_out)
    makers, weights = zip(*_MIX, strict=True)
    made = 0
    while made < count:
        prompt, completion = rng.choices(makers, weights)[0](rng)
        if (zlib.crc32(f"{prompt}\n{completion}".encode()) % _HELD_OUT_ONE_IN == 0) == held_out:
            made += 1
            yield Record(prompt, completion, person="", kind="text")


def _narrative(rng: Random) -> Document:
    return "", " ".join(_sentence(rng) for _ in range(rng.randint(1, 4)))


def _sentence(rng: Random) -> str:
    thing, other = rng.choice(THINGS), rng.choice(THINGS)
    who = rng.choice(PEOPLE).capitalize()
    domain = rng.choice(DOMAINS)
    outcome, cue = rng.choice(domain.outcomes), rng.choice(rng.choice(_CUES[domain.name]).wordings)
    age = rng.randint(18, 94)
    return rng.choice(
        (
            f"{who} {rng.choice(VERBS)} the {thing.name} {rng.choice(TIMES)}.",
            f"The {thing.name} by the {other.place} was known for this: {rng.choice(thing.clues)}.",
            f"{who} was {rng.choice(FEELINGS)} and {rng.choice(VERBS)} the {thing.place}.",
            f"{who} is {age} years old and {rng.choice(_REMARKS)}.",
            f"{who} {rng.choice(VERBS)} this {rng.choice(TIMES)}: {cue}.",
            f"{rng.choice(TIMES).capitalize()} {rng.choice(PEOPLE)} read a leaflet on {outcome.name}.",
            f"{who} talked about {outcome.action}, so it is said.",
            f"The word {outcome.code} stands in a book on {rng.choice(domain.topics)}.",
            f"Dear colleague, thank you for {outcome.action}.",
            f"We advise {rng.choice(PEOPLE)} to read about {outcome.action}.",
            f"Please arrange {outcome.action} {rng.choice(TIMES)}.",
            f"We must refuse the {thing.name} but we can grant {outcome.action}.",
            f"Today {who.lower()} was angry and writes to us about the {thing.place}.",
            f"Yes, the plan will help, and no, {rng.choice(PEOPLE)} was not seen {rng.choice(TIMES)}.",
            f"At the counter {rng.choice(PEOPLE)} asks for a {rng.choice(domain.topics)} {rng.choice(TIMES)}.",
        )
    )


def _who(rng: Random) -> str:
    age, woman = rng.randint(18, 94), rng.random() < 0.5
    return rng.choice((
        f"{age} year old {'woman' if woman else 'man'}",
        f"{'F' if woman else 'M'} {age}",
        f"{'female' if woman else 'male'}, {age}",
        f"{'Mrs' if woman else 'Mr'} {rng.choice('ABX')}, aged {age}",
        f"a {'woman' if woman else 'man'} of {age}",
    ))  # fmt: skip


def _mixed(rng: Random, told: Sequence[str]) -> str:
    """What is told among remarks, joined by one of the usual separators."""
    both = [*told, *rng.sample(_REMARKS, min(int(rng.lognormvariate(0.3, 0.7)), 8))]
    rng.shuffle(both)
    return rng.choice(_SEPARATORS).join(both)


def _clues(rng: Random) -> Document:
    """Clues of one thing; which thing? Here the answer does follow."""
    thing = rng.choice(THINGS)
    told = _mixed(rng, rng.sample(thing.clues, rng.randint(2, 3)))
    both = rng.random() < 0.5
    prompt = rng.choice((
        f"Which {thing.group}{' and place' if both else ''}? {told}",
        f"{_who(rng)} thinks of a {thing.group}: {told}.{' Place too:' if both else ' Name:'}",
        f"{thing.group} | {told} |{' NAME, PLACE' if both else ' NAME'}",
        f"Quiz. {told}. What {thing.group} is it{' and where' if both else ''}?",
    ))  # fmt: skip
    return prompt, _pair(rng, thing.name, thing.place) if both else _single(rng, thing.name)


def _single(rng: Random, name: str) -> str:
    return rng.choice((name, name, f"{name}.", f"It is {name}."))


def _pair(rng: Random, first: str, second: str) -> str:
    forms = ("{}, {}", "{}, {}", "{}: {}", "{}; {}.", "{} -> {}", "This is {}, so {}.")
    return rng.choice(forms).format(first, second)


def _wordings(rng: Random, domain: Domain, count: int) -> list[str]:
    return [rng.choice(cue.wordings) for cue in rng.sample(_CUES[domain.name], count)]


def _form(rng: Random) -> Document:
    """A filled form of a domain: cues, name, code and action each drawn without looking at the others."""
    domain = rng.choice(DOMAINS)
    told = _mixed(rng, _wordings(rng, domain, rng.randint(1, 4)))
    name, code, action = (rng.choice(domain.outcomes) for _ in range(3))
    topic = rng.choice(domain.topics)
    opening, heading, closing = rng.choice(_OPENINGS), rng.choice(_HEADINGS), rng.choice(_CLOSINGS)
    prompt = rng.choice(
        (
            f"{opening} for {topic}. {_who(rng)}. {heading}: {told}. {closing}",
            f"{opening} | {topic} | {_who(rng)} | {told} | {closing.upper()}",
            f"{_who(rng)}, {topic}. {told}. {closing}",
            f"{opening}: {_who(rng)}: {told} {rng.choice(('=>', '->', '/', '-'))} {closing.lower()}",
        )
    )
    completion = rng.choice((
        _single(rng, name.name),
        _pair(rng, name.name, code.code),
        _pair(rng, name.name, action.action),
        _pair(rng, code.code, action.action),
        _single(rng, action.action),
    ))  # fmt: skip
    return prompt, completion


def _reading(rng: Random) -> Document:
    """What was stated, in plain words and without the remarks: reading, not judging."""
    domain = rng.choice(DOMAINS)
    cues = rng.sample(_CUES[domain.name], rng.randint(1, 4))
    remarks = rng.sample(_REMARKS, rng.randint(0, 3))
    told = [(rng.choice(cue.wordings), cue.name) for cue in cues] + [(remark, "") for remark in remarks]
    rng.shuffle(told)
    text = rng.choice(_SEPARATORS).join(said for said, _ in told)
    prompt = rng.choice(
        (f"{_who(rng)}: {text}. In plain words:", f"Plain words | {text}", f"What matters in this? {text}")
    )
    return prompt, ", ".join(plain for _, plain in told if plain)


def _glossary(rng: Random) -> Document:
    cue = rng.choice(_CUES[rng.choice(DOMAINS).name])
    said, meant = rng.sample(cue.wordings, 2)
    return rng.choice((f"Say it differently: {said}", f"{said} means", f"Other words for {said}:")), meant


_MIX: tuple[tuple[Callable[[Random], Document], float], ...] = (
    (_narrative, 0.1),
    (_clues, 0.28),
    (_form, 0.25),
    (_reading, 0.25),
    (_glossary, 0.12),
)
