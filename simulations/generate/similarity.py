"""Near duplicates: two texts that share half of their runs of three words.

Broder (1997) compares documents by the Jaccard coefficient of their shingles. With shingles of w words, changing one
word inside a text of n distinct shingles leaves (n - w) / (n + w). At w = 3 and a threshold of 0.5 every text of eleven
words or more that differs from another in one word (an age, a wording) is caught, and the records of this project
have about thirty; longer shingles, or a higher threshold, would let such copies of short records pass.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

SHINGLE_WORDS = 3
NEAR = 0.5

_WORD = re.compile(r"[a-z0-9]+")


def shingles(text: str) -> frozenset[str]:
    """The distinct runs of three words, lower case, without punctuation; a shorter text is one run."""
    words = _WORD.findall(text.lower())
    if len(words) <= SHINGLE_WORDS:
        return frozenset((" ".join(words),))
    return frozenset(" ".join(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1))


class Index:
    """Texts that others are compared with; grows, never shrinks."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._sizes: list[int] = []
        self._holders: dict[str, list[int]] = {}
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        found = shingles(text)
        for shingle in found:
            self._holders.setdefault(shingle, []).append(len(self._sizes))
        self._sizes.append(len(found))

    def copy(self) -> Index:
        twin = Index()
        twin._sizes = list(self._sizes)
        twin._holders = {shingle: list(holders) for shingle, holders in self._holders.items()}
        return twin

    def similarity(self, text: str) -> float:
        """The largest Jaccard coefficient with any text of the index, in [0, 1]; 0 when it is empty."""
        found = shingles(text)
        shared = Counter(holder for shingle in found for holder in self._holders.get(shingle, ()))
        return max((n / (len(found) + self._sizes[holder] - n) for holder, n in shared.items()), default=0.0)
