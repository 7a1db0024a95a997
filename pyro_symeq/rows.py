"""The rows of a batch: where they lie in values and arguments, and how chains get copies of them.

Programs read the size of a batch off their arguments. So chains that start from the same rows are
made by copying the rows of the arguments, not by a plate around the programs. The rows are the
outermost vectorised plate that all random variables of the programs share.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_symeq import passes
from pyro_symeq.binding import Call, Path, equal, leaves, put
from pyro_symeq.passes import Observations
from pyro_symeq.provenance import CASTS, take
from pyro_symeq.tracing import Record, Site

NO_ROWS = (
    "Expected all variables and factors of model and guide in one vectorised plate, whose rows "
    "are those of the data. Put pyro.plate around them."
)


@dataclass(frozen=True)
class Rows:
    """A plate that holds all random variables.

    Args:
        dim: Its dimension, counted from the right of the batch shape.
        size: The number of rows.
    """

    dim: int
    size: int


@dataclass(frozen=True)
class Variable:
    """A random variable of the programs.

    Args:
        law: A distribution of it.
        value: A value of it, for the batch as given.
        dim: Where the rows lie, counted from the right of the value, if there are rows.
    """

    law: Any
    value: Tensor
    dim: int | None

    def copied(self, value: Tensor, copies: int) -> Tensor:
        """Copies the rows of a value, one copy of all of them after another."""
        return value if self.dim is None else self.joined([value] * copies)

    def joined(self, values: list[Tensor]) -> Tensor:
        """The rows of values, one value after another."""
        assert self.dim is not None
        return torch.cat(values, self.dim)

    def by_chain(self, value: Tensor, copies: int) -> Tensor:
        """Brings the copies of the rows into a first dimension."""
        if self.dim is None:
            return value.unsqueeze(0)
        dim = value.dim() + self.dim
        return value.unflatten(dim, (copies, -1)).movedim(dim, 0)

    def beside(self, by_row: Tensor) -> Tensor:
        """Lets a vector with an element for each row broadcast with values."""
        return by_row if self.dim is None else by_row.reshape(-1, *[1] * (-self.dim - 1))


def shared_rows(traces: Iterable[Record]) -> Rows | None:
    """The outermost vectorised plate around all random variables of all traces, if any."""
    plates = [
        {(f.dim, f.size) for f in site["cond_indep_stack"] if f.vectorized}
        for trace in traces
        for _, site in trace.variables.items()
    ]
    shared = set.intersection(*plates)
    return Rows(*min(shared)) if shared else None


def required_rows(traces: Iterable[Record]) -> Rows:
    """The outermost vectorised plate around all random variables of all traces.

    Raises:
        ValueError: There is none.
    """
    rows = shared_rows(traces)
    if rows is None:
        raise ValueError(NO_ROWS)
    return rows


def variable(site: Site, rows: Rows | None) -> Variable:
    """The random variable at a site of a trace."""
    dim = None if rows is None else rows.dim - site["fn"].event_dim
    return Variable(site["fn"], site["value"], dim)


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether log-probabilities of the same rows are the same, up to rounding."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)


def shaped(value: Tensor, shape: torch.Size) -> Tensor:
    """Gives a value the shape of its distribution."""
    return value.reshape(shape) if value.numel() == shape.numel() else value.expand(shape)


def changed_call(
    call: Call,
    rows: Rows,
    observed: Observations,
    variables: dict[str, Variable],
    change: Callable[[Tensor, int], Tensor],
    with_others: bool,
) -> Call:
    """Changes the rows of the arguments: copies or selects them, say.

    A tensor that holds data is changed along the dimension where it holds their rows; any other
    one, if those are to be changed too, along the first if that has as many elements as there are
    rows.

    Args:
        call: The arguments.
        rows: The rows.
        observed: What the model observes of the arguments.
        variables: The random variables of the model by site.
        change: A function of a tensor and of the dimension of its rows.
        with_others: Whether to change tensors that hold no data.
    """
    dims: dict[Path, int] = {}
    for name, seen in observed.items():
        path = seen.origin.path
        if path is not None and name in variables:
            dim = _rows_dim(dict(leaves(call))[path], seen, variables[name], rows)
            dims |= {} if dim is None else {path: dim}
    for path, leaf in leaves(call):
        if isinstance(leaf, Tensor):
            dim = dims.get(path, 0)
            is_meant = path in dims or with_others
            if is_meant and leaf.dim() > dim and leaf.shape[dim] == rows.size:
                call = put(call, path, change(leaf.detach(), dim))
    return call


def _rows_dim(leaf: Tensor, seen: passes.Observation, of: Variable, rows: Rows) -> int | None:
    """The dimension of an argument that becomes the rows of the value picked from it."""
    numbers = torch.arange(rows.size, device=leaf.device)
    picks = tuple(pick for pick in seen.origin.picks if pick.name not in CASTS)
    expected = of.beside(numbers).expand(of.value.shape)
    for dim in (dim for dim, size in enumerate(leaf.shape) if size == rows.size):
        by_row = numbers.reshape(-1, *[1] * (leaf.dim() - dim - 1)).expand(leaf.shape)
        if equal(shaped(take(by_row, picks), of.value.shape), expected):
            return dim
    return None
