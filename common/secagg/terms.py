"""How many may fall silent and how many may collude: the numbers on which the guarantee rests.

n members are invited, T of them may collude with the coordinator, t must take part to the end. Two sets of t members
share more than T of them when 2t > n + T, so two survivor sets that were both signed by t members would need an honest
member that signed both, which none does (Bonawitz et al. 2017, section 6.2).
"""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import ConfigError

SMALLEST_COHORT = 3  # the sum of two tells either of them the other's update

OFF = "secure aggregation is off: the coordinator can read every update"
"""What the person who launches a run without it is told."""


def threshold(members: int, colluders: int) -> int:
    """The smallest t with 2t > n + T."""
    return (members + colluders) // 2 + 1


def smallest_cohort(colluders: int) -> int:
    """The fewest survivors that hide each other: T + 2, at least 3, so that two honest ones are among them."""
    return max(colluders + 2, SMALLEST_COHORT)


@dataclass(frozen=True)
class Terms:
    """The numbers of an attempt.

    members: n, the cohort of the round's first attempt; a repeat with fewer keeps it. colluders: T. threshold: t.
    smallest: fewest names in a survivor set.

    Raises ConfigError when T >= 1, 2t > n + T, t <= n, smallest >= T + 2 or smallest <= n does not hold.
    """

    members: int
    colluders: int
    threshold: int
    smallest: int

    def __post_init__(self) -> None:
        if self.colluders < 1:
            raise ConfigError(
                f"secure aggregation: expected at least 1 colluder to be tolerated, found {self.colluders}"
            )
        if self.smallest < smallest_cohort(self.colluders):
            raise ConfigError(
                f"secure aggregation: expected a smallest cohort of at least {smallest_cohort(self.colluders)} with "
                f"{self.colluders} colluders, so that two honest members hide each other; found {self.smallest}"
            )
        if self.smallest > self.members:
            raise ConfigError(
                f"secure aggregation: expected a cohort of at least {self.smallest} members, found {self.members}"
            )
        if not self.members + self.colluders < 2 * self.threshold <= 2 * self.members:
            raise ConfigError(
                f"secure aggregation: expected a threshold from {threshold(self.members, self.colluders)} to "
                f"{self.members} for {self.members} members and {self.colluders} colluders, found {self.threshold}"
            )

    @classmethod
    def of(cls, members: int, colluders: int, smallest: int) -> Terms:
        """The terms of a cohort of `members`, with the smallest threshold that is safe."""
        return cls(members, colluders, threshold(members, colluders), smallest)

    @property
    def survivors(self) -> int:
        """Fewest members with which an attempt ends well: max(t, smallest)."""
        return max(self.threshold, self.smallest)

    @property
    def dropouts(self) -> int:
        """Members that may fall silent, at any time, without stopping an attempt."""
        return self.members - self.survivors

    def as_dict(self) -> dict[str, int]:
        """As it stands in a run's summary."""
        return {
            "cohort": self.members,
            "colluders": self.colluders,
            "threshold": self.threshold,
            "smallest_sum": self.survivors,
            "dropouts": self.dropouts,
        }

    def told(self) -> str:
        """What the numbers mean, in one line for the person who launches a run."""
        silent = f"up to {self.dropouts}" if self.dropouts else "none"
        colluding = "one of them colludes" if self.colluders == 1 else f"up to {self.colluders} of them collude"
        return (
            f"secure aggregation is on: of {self.members} institutions a round {silent} may fall silent; the "
            f"coordinator learns the sum over at least {self.survivors} of them and no single update, also when "
            f"{colluding} with it"
        )
