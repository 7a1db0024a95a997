"""Batches made of the rows of another one: some of them, or several times the same."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pyro_symeq import passes
from pyro_symeq.aside import aside
from pyro_symeq.binding import Call, Program
from pyro_symeq.passes import Run
from pyro_symeq.rows import Rows, alike, changed_call, variable
from pyro_symeq.tracing import Record

Select = Callable[[Tensor], Call]  # of the numbers of rows


def selection(
    model: Program, guide: Program, call: Call, dream: Run, rows: Rows, at_once: int
) -> Select | None:
    """Finds out how to call the programs with other rows, and tries whether they bear it.

    Args:
        model: The decoder's program.
        guide: The encoder's program.
        call: The arguments of both.
        dream: A dream of the model, in which the arguments were followed.
        rows: The rows of the programs.
        at_once: How many rows there are to be at most.

    Returns:
        A function of the numbers of rows; or none, where programs fail with other rows, or the law
        of a row depends on what other rows there are.
    """
    variables = {name: variable(site, rows) for name, site in dream.trace.variables.items()}

    def select(index: Tensor, with_others: bool) -> Call:
        def take(leaf: Tensor, dim: int) -> Tensor:
            return leaf.index_select(dim, index.to(leaf.device))

        return changed_call(call, rows, dream.observed, variables, take, with_others)

    def bears(index: Tensor, with_others: bool) -> bool:
        latents = passes.values(dream.trace)
        try:
            again = select(index, with_others)
            return all(
                _is_alike(program, again, passes.replay(program, call, latents), rows, index)
                for program in (guide, model)
            )
        except Exception:  # an argument stands for something else, or sizes are fixed
            return False

    with aside():
        index = torch.randint(rows.size, (min(at_once, 2 * rows.size),))
        for with_others in (True, False):
            if bears(index, with_others):
                return partial(select, with_others=with_others)
    return None


def _is_alike(program: Program, call: Call, trace: Record, rows: Rows, index: Tensor) -> bool:
    """Whether a program gives rows, called with some of them, the laws that they have in a trace."""

    def select(value: Tensor, dim: int) -> Tensor:
        return value.index_select(dim, index.to(value.device))

    values = {
        name: select(passes.value(trace, name), rows.dim - site["fn"].event_dim)
        for name, site in trace.variables.items()
    }
    again = passes.replay(program, call, values)
    found, expected = (
        [term.log_prob for term in passes.terms(run, run.variables, {})] for run in (again, trace)
    )
    return len(found) == len(expected) and all(
        alike(x, select(y, rows.dim)) for x, y in zip(found, expected, strict=True)
    )
