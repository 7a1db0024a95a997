"""What was measured, as plain text."""

from collections.abc import Sequence
from dataclasses import replace

from results import HAND, Comparison, Setting, cost_per_site
from rivals import RIVALS

__all__ = ["COLUMNS", "table"]

COLUMNS = {"chain": "num_sites", "batches": "batch_size", "particles": "num_particles"}
"""By experiment that compares rivals on several settings, what varies."""


def table(comparisons: Sequence[Comparison]) -> str:
    """The table of an experiment, whatever it is."""
    experiment = comparisons[0].experiment
    if experiment not in COLUMNS:
        return "\n\n".join(map(_by_rival, comparisons))
    lines = _by_setting(comparisons, COLUMNS[experiment])
    if experiment == "chain":
        lines += _costs_per_site(comparisons)
    return "\n".join(lines)


def _by_rival(comparison: Comparison) -> str:
    """A row for each rival: its time, its memory, and both as multiples of the loop by hand."""
    rows = [["", "", "ms", "ratio", *(["MiB", "ratio"] if comparison.peaks else [])]]
    for rival in comparison.seconds:
        row = [rival, RIVALS[rival].label, *_cells(comparison, rival)]
        if comparison.peaks:
            peak = comparison.peaks[rival]
            row += [f"{peak:.0f}", f"{comparison.peak_ratio(rival):.2f}"]
        rows.append(row)
    return "\n".join([_title(comparison), *_aligned(rows, num_left=2)])


def _by_setting(comparisons: Sequence[Comparison], column: str) -> list[str]:
    """A row for each setting: the times of all rivals, and the multiples."""
    rivals = list(comparisons[0].seconds)
    rows = [[column, *(head for rival in rivals for head in (f"{rival} ms", "ratio"))]]
    for comparison in comparisons:
        cells = [cell for rival in rivals for cell in _cells(comparison, rival)]
        rows.append([str(getattr(comparison.setting, column)), *cells])
    return [_title(comparisons[0], varied=column), *_aligned(rows)]


def _costs_per_site(comparisons: Sequence[Comparison]) -> list[str]:
    rivals = [rival for rival in comparisons[0].seconds if rival != HAND]
    rows = [[r, f"{1e6 * cost_per_site(comparisons, r):.0f} µs"] for r in rivals]
    return ["", "each further site costs, over the loop by hand", *_aligned(rows, num_left=1)]


def _cells(comparison: Comparison, rival: str) -> list[str]:
    return [f"{1e3 * comparison.median(rival):.2f}", f"{comparison.ratio(rival):.2f}"]


def _title(comparison: Comparison, varied: str | None = None) -> str:
    """Names the experiment, and what of its setting isn't as usual."""
    setting = comparison.setting
    usual = replace(Setting(setting.model), batch_size=0, device=setting.device)
    told = [
        f"{name}={value}"
        for name, value in vars(setting).items()
        if name != varied and value != getattr(usual, name)
    ]
    rounds = f"{len(comparison.seconds[HAND])} rounds"
    return f"{setting.model}, {', '.join([*told, rounds])}"


def _aligned(rows: Sequence[Sequence[str]], num_left: int = 0) -> list[str]:
    """Lines of cells, of which the first few columns are flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < num_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
