r"""What follows from the records of runs with one data set.

A pair carries information if its latents, all of them together, say more bits about held-out images
than a threshold. A run is stuck if they say less than a quarter of that about a batch after 1,000
steps. So a run that carries no information in the end was stuck, or it has lost what it had.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from runs import Record

__all__ = ["Share", "Verdicts"]

FEW_BITS = {"mnist": 20.0, "digits": 8.0}
SOON, STUCK_AFTER = 500, 1000


@dataclass(frozen=True)
class Share:
    """How many of some things are of a kind.

    Args:
        num: The number of those.
        num_all: The number of all.
    """

    num: int
    num_all: int

    @classmethod
    def of(cls, are: Iterable[bool]) -> "Share":
        """Counts."""
        each = list(are)
        return cls(sum(each), len(each))

    def __str__(self) -> str:
        percent = f" ({self.num / self.num_all:.0%})" if self.num_all else ""
        return f"{self.num} of {self.num_all}{percent}"


class Verdicts:
    """Judges the records of runs with one data set and one number of steps.

    Args:
        records: The records.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.few_bits = FEW_BITS[records[0].run.data]
        self.architectures = _in_order(record.run.architecture for record in records)
        self.methods = _in_order(record.run.method for record in records)
        self._records = {
            (record.run.method, record.run.architecture, record.run.seed): record
            for record in records
        }

    def of(self, method: str, architecture: str) -> list[Record]:
        """The records of a method and an architecture."""
        return [
            record
            for record in self._records.values()
            if (record.run.method, record.run.architecture) == (method, architecture)
        ]

    def num_failed(self, method: str, architecture: str) -> int:
        """How many runs have failed."""
        return sum(record.error is not None for record in self.of(method, architecture))

    def bits(self, method: str, architecture: str) -> float | None:
        """The fewest bits of all seeds."""
        return min(_known(record.total for record in self.of(method, architecture)), default=None)

    def likelihood(self, method: str, architecture: str) -> float | None:
        """The mean over seeds of the log-likelihood of held-out images (nats)."""
        values = _known(record.likelihood for record in self.of(method, architecture))
        return statistics.fmean(values) if values else None

    def ratio(self, method: str, architecture: str) -> float | None:
        """How many times as long as the plain game it takes, the median of seeds."""
        ratios = [
            record.seconds / game.seconds
            for game, record in self._beside_game(method, architecture)
            if record.error is None and game.error is None
        ]
        return statistics.median(ratios) if ratios else None

    def is_poor(self, record: Record) -> bool:
        """Whether the latents of a run that ended carry hardly any information."""
        return record.total is not None and record.total < self.few_bits

    def carries(self, method: str, architecture: str) -> bool:
        """Whether the runs of all seeds carry information."""
        records = self.of(method, architecture)
        return all(record.error is None and not self.is_poor(record) for record in records)

    def num_carrying(self, method: str) -> Share:
        """How many architectures carry information."""
        return Share.of(
            self.carries(method, architecture)
            for architecture in self.architectures
            if self.of(method, architecture)
        )

    def stuck(self, record: Record) -> bool:
        """Whether the latents of a run said next to nothing after 1,000 steps, or at its end."""
        early = [bits for step, bits in record.history if step <= STUCK_AFTER]
        return bool(early) and early[-1] < self.few_bits / 4

    def warned(self, is_meant: Callable[[Record], bool]) -> Share:
        """How many runs of the plain game warned soon, of those that are meant."""
        return Share.of(
            game.warned is not None and game.warned <= SOON
            for game in self._games()
            if is_meant(game)
        )

    def worst_loss(self) -> tuple[float, Record] | None:
        """The most nats that the cure lost against the plain game, and in which of its runs."""
        losses = [
            (game.likelihood - cured.likelihood, cured)
            for architecture in self.architectures
            for game, cured in self._beside_game("cure", architecture)
            if game.likelihood is not None and cured.likelihood is not None
        ]
        return max(losses, key=lambda loss: loss[0], default=None)

    def _games(self) -> Iterator[Record]:
        for architecture in self.architectures:
            yield from (game for game in self.of("game", architecture) if game.error is None)

    def _beside_game(self, method: str, architecture: str) -> Iterator[tuple[Record, Record]]:
        """The runs of the plain game, and those of a method from the same start."""
        for record in self.of(method, architecture):
            game = self._records.get(("game", architecture, record.run.seed))
            if game is not None:
                yield game, record


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
