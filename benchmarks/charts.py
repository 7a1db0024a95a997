"""What was measured, as a picture: bars for ladders, and below them lines for what varies."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from results import HAND, Comparison, Results, cost_per_site
from rivals import RIVALS
from tables import COLUMNS

__all__ = ["draw"]

COLORS = {
    "hand": "#8c8c8c",
    "symeq": "#0b5fa5",
    "capture": "#5aa9e6",
    "vectorized": "#1b998b",
    "module": "#7a9cc6",
    "svi": "#e07a1f",
    "rws-0": "#b23a48",
    "rws-0.5": "#d98880",
}
AXES = {"chain": "latent sites", "batches": "rows of a batch", "particles": "particles"}


def draw(results: Results, path: Path) -> None:
    """Writes a picture of all experiments, each in a panel of its own.

    Args:
        results: What was measured.
        path: The file to write.
    """
    experiments = results.experiments()
    lines = [c for name, c in experiments.items() if name in COLUMNS]
    bars = [c[0] for name, c in experiments.items() if name not in COLUMNS]
    rows = [row for row in (bars, lines) if row]
    figure = Figure(figsize=(10, 3.2 * len(rows) + 0.6), layout="constrained")
    figure.suptitle("The cost of a training step, beside a loop by hand", fontsize=12)
    figure.supxlabel(", ".join(map(" ".join, results.environment.items())), fontsize=8)
    parts = iter(figure.subfigures(len(rows), 1, squeeze=False).flat)
    if bars:
        panels = next(parts).subplots(1, len(bars), sharey=True, squeeze=False).flat
        for axes, comparison in zip(panels, bars, strict=True):
            _bars(axes, comparison)
    if lines:
        panels = next(parts).subplots(1, len(lines), squeeze=False).flat
        for axes, comparisons in zip(panels, lines, strict=True):
            _lines(axes, comparisons)
    figure.savefig(path, dpi=150)


def _bars(axes: Axes, comparison: Comparison) -> None:
    """A bar for each rival, as long as the ratio of its time."""
    rivals = list(comparison.seconds)
    ratios = [comparison.ratio(rival) for rival in rivals]
    colors = [COLORS[rival] for rival in rivals]
    bars = axes.barh([RIVALS[rival].label for rival in rivals], ratios, color=colors, height=0.7)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.axvline(1, color="0.3", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1.15 * max(ratios))
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
    setting, by_hand = comparison.setting, 1e3 * comparison.median(HAND)
    title = f"{setting.model}, batches of {setting.batch_size}"
    _plain(axes, title, f"time, in units of {by_hand:.3g} ms")
    axes.tick_params(axis="y", length=0)


def _lines(axes: Axes, comparisons: Sequence[Comparison]) -> None:
    """A line for each rival but the loop by hand."""
    experiment, model = comparisons[0].experiment, comparisons[0].setting.model
    x = [getattr(comparison.setting, COLUMNS[experiment]) for comparison in comparisons]
    for rival in comparisons[0].seconds:
        if rival != HAND:
            y, label = _line(comparisons, rival)
            axes.plot(x, y, color=COLORS[rival], marker="o", markersize=4, label=label)
    if experiment == "chain":
        title = f"{model}, ms beyond by hand"
    else:
        title = f"{model}, ratio to by hand"
        axes.axhline(1, color="0.3", linewidth=0.8, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(x, map(str, x))
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    _plain(axes, title, AXES[experiment])


def _line(comparisons: Sequence[Comparison], rival: str) -> tuple[list[float], str]:
    """The heights of a line, and what it is called."""
    if comparisons[0].experiment != "chain":
        return [comparison.ratio(rival) for comparison in comparisons], rival
    label = f"{rival}, {1e6 * cost_per_site(comparisons, rival):.0f} µs for each site"
    return [1e3 * comparison.excess(rival) for comparison in comparisons], label


def _plain(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
