"""What many runs have come to, as plain text."""

from collections.abc import Iterator, Sequence

from runs import Record
from verdicts import Verdicts

__all__ = ["report"]

NONE = "-"
COLLAPSED = "*"


def report(records: Sequence[Record]) -> str:
    """The tables and the summary of each data set and number of steps."""
    parts: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        parts.setdefault((record.run.data, record.run.steps), []).append(record)
    return "\n\n".join(
        "\n".join([f"{data}, {steps} steps", "", *_table(verdicts), "", *_summary(verdicts)])
        for (data, steps), part in parts.items()
        for verdicts in [Verdicts(part)]
    )


def _table(verdicts: Verdicts) -> Iterator[str]:
    """A row for each architecture: bits, log-likelihood and time of each method."""
    rows = [["", *(cell for m in verdicts.methods for cell in (f"{m} bits", "nats", "time"))]]
    for architecture in verdicts.architectures:
        cells = [cell for m in verdicts.methods for cell in _cells(verdicts, m, architecture)]
        rows.append([architecture, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        rest = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        yield "  ".join([name.ljust(widths[0]), *rest])
    yield f"{COLLAPSED} carries fewer than {verdicts.few_bits:.0f} bits with one seed or more"


def _cells(verdicts: Verdicts, method: str, architecture: str) -> list[str]:
    bits, likelihood, ratio = (
        value(method, architecture)
        for value in (verdicts.bits, verdicts.likelihood, verdicts.ratio)
    )
    mark = COLLAPSED if bits is not None and bits < verdicts.few_bits else " "
    failed = verdicts.num_failed(method, architecture)
    return [
        (f"{failed} failed, " if failed else "") + _number(bits, ".1f") + mark,
        _number(likelihood, ".1f"),
        _number(ratio, ".2f"),
    ]


def _summary(verdicts: Verdicts) -> Iterator[str]:
    for method in verdicts.methods:
        yield f"{method}: {verdicts.num_carrying(method)} architectures carry information"
    if "game" not in verdicts.methods:
        return
    kinds = {
        "were stuck after 1,000 steps": verdicts.stuck,
        "weren't": lambda game: not verdicts.stuck(game),
        "carry no information in the end": verdicts.is_poor,
    }
    for kind, is_meant in kinds.items():
        yield f"warned within 500 steps, of the game's runs that {kind}: {verdicts.warned(is_meant)}"
    worst = verdicts.worst_loss()
    if worst is not None:
        nats, record = worst
        where = f"{record.run.architecture}, seed {record.run.seed}"
        yield f"the cure's worst loss against the game: {nats:.1f} nats ({where})"


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)
