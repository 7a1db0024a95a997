"""How the bits that latents carry come and go, as a picture: a panel for each architecture."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from runs import Record
from verdicts import Verdicts

__all__ = ["draw"]

COLORS = {"game": "#e07a1f", "cure": "#0b5fa5", "svi": "#8c8c8c", "rws": "#b23a48"}
LABELS = {"game": "the game alone", "cure": "with code warm-up", "svi": "SVI", "rws": "RWS"}
NUM_COLUMNS = 6


def draw(records: Sequence[Record], path: Path) -> None:
    """Writes a picture of runs with one data set, a line for each run.

    Args:
        records: What the runs have come to.
        path: The file to write.
    """
    verdicts = Verdicts(records)
    names = verdicts.architectures
    num_rows = math.ceil(len(names) / NUM_COLUMNS)
    figure = Figure(figsize=(11, 1.7 * num_rows + 0.7), layout="constrained")
    grid = figure.subplots(num_rows, NUM_COLUMNS, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for axes, name in zip(panels, names, strict=False):
        _panel(axes, name, verdicts)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    panels[0].set_ylim(bottom=0)
    figure.supxlabel("steps", fontsize=10)
    figure.supylabel("bits about a batch, all latents", fontsize=10)
    lines = [panels[0].plot([], [], color=COLORS[m], label=LABELS[m])[0] for m in verdicts.methods]
    figure.legend(handles=lines, loc="outside upper right", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


def _panel(axes: Axes, name: str, verdicts: Verdicts) -> None:
    for method in verdicts.methods:
        for record in verdicts.of(method, name):
            steps, bits = zip(*record.history, strict=True) if record.history else ((), ())
            axes.plot(steps, bits, color=COLORS[method], linewidth=1.2)
    axes.axhline(verdicts.few_bits, color="0.5", linewidth=0.7, linestyle=":")
    axes.set_title(name, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
