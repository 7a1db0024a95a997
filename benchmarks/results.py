r"""What was measured, and what follows from it.

In each round :math:`r`, each rival :math:`i` has its turn, in which a step takes :math:`t_{ir}`.
Rivals are compared within rounds, so that whatever slows a machine down for a while slows down all
of them:

.. math::
    \mathrm{ratio}_i = \mathrm{median}_r \, t_{ir} / t_{0r}, \qquad
    \mathrm{excess}_i = \mathrm{median}_r \, (t_{ir} - t_{0r}),

where rival 0 is the loop by hand.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

__all__ = ["HAND", "Comparison", "Results", "Setting", "cost_per_site"]

HAND = "hand"


@dataclass(frozen=True)
class Setting:
    """What rivals are compared on.

    Args:
        model: The name of the pair.
        batch_size: The number of rows of a batch.
        num_particles: The number of draws whose utilities are averaged.
        num_sites: The number of latent sites.
        device: Where to compute.
        validation: Whether Pyro's validation is on.
        precision: ``"single"``, ``"tf32"`` for matrix products in TF32, or ``"bf16"`` for that and
            bfloat16 by autocast.
    """

    model: str
    batch_size: int = 128
    num_particles: int = 1
    num_sites: int = 2
    device: str = "cpu"
    validation: bool = False
    precision: str = "single"


@dataclass(frozen=True)
class Comparison:
    """What rivals needed for a step.

    Args:
        experiment: What the comparison is a part of.
        setting: What they were compared on.
        seconds: By rival, the time for a step in each round.
        peaks: By rival, the peak of memory (MiB), where it was measured.
    """

    experiment: str
    setting: Setting
    seconds: dict[str, list[float]]
    peaks: dict[str, float] = field(default_factory=dict)

    def median(self, rival: str) -> float:
        """The median time for a step (s)."""
        return statistics.median(self.seconds[rival])

    def ratio(self, rival: str) -> float:
        """How many times as long as by hand a step takes."""
        return statistics.median(t / t_0 for t, t_0 in self._paired(rival))

    def excess(self, rival: str) -> float:
        """How much longer than by hand a step takes (s)."""
        return statistics.median(t - t_0 for t, t_0 in self._paired(rival))

    def peak_ratio(self, rival: str) -> float:
        """How many times as much memory as by hand it takes."""
        return self.peaks[rival] / self.peaks[HAND]

    def _paired(self, rival: str) -> list[tuple[float, float]]:
        return list(zip(self.seconds[rival], self.seconds[HAND], strict=True))


def cost_per_site(comparisons: Sequence[Comparison], rival: str) -> float:
    """What each further latent site costs over the loop by hand (s), by least squares."""
    sites = [comparison.setting.num_sites for comparison in comparisons]
    excesses = [comparison.excess(rival) for comparison in comparisons]
    return statistics.linear_regression(sites, excesses).slope


@dataclass(frozen=True)
class Results:
    """All that a run has measured.

    Args:
        environment: The machine and the versions.
        comparisons: What was compared, in order.
    """

    environment: dict[str, str]
    comparisons: list[Comparison] = field(default_factory=list)

    def experiments(self) -> dict[str, list[Comparison]]:
        """The comparisons by experiment, in order."""
        by_name: dict[str, list[Comparison]] = {}
        for comparison in self.comparisons:
            by_name.setdefault(comparison.experiment, []).append(comparison)
        return by_name

    def write(self, path: Path) -> None:
        """Writes a JSON file, with the times of all rounds."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Reads a file that :meth:`write` has written."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        comparisons = [
            Comparison(**comparison | {"setting": Setting(**comparison["setting"])})
            for comparison in raw["comparisons"]
        ]
        return cls(raw["environment"], comparisons)
