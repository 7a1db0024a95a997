r"""Chains that draw each block from its conditional :math:`p_b(v_b \mid v_{\neg b})`."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from pyro_symeq import passes
from pyro_symeq.aside import aside
from pyro_symeq.binding import Program
from pyro_symeq.chain import Around, Chain, Start, refuse_parts, unhandled
from pyro_symeq.clamps import Values, overlay
from pyro_symeq.conditionals import Conditionals, State
from pyro_symeq.rows import shared_rows, variable
from pyro_symeq.tracing import Record


class ConditionalChain(Chain):
    """Chains that draw from conditionals.

    Args:
        conditionals: The programs.
        batch: Values of some variables.
        given: Values of some variables that are to be clamped.

    Raises:
        ValueError: The batch names what is no variable, or the chains can't start.
    """

    def __init__(
        self, conditionals: Conditionals, batch: Mapping[str, Any], given: Values
    ) -> None:
        if unknown := [name for name in batch if name not in conditionals.variables]:
            raise ValueError(
                f"The batch names {unknown}; the variables are {list(conditionals.variables)}."
            )
        self.conditionals = conditionals
        values = {name: torch.as_tensor(value).detach() for name, value in batch.items()}
        super().__init__(conditionals.blocks, {}, values, None)
        with aside(), torch.no_grad():
            state = self._start("dream", {n: torch.as_tensor(v) for n, v in given.items()})
            traces = {block: self._trace(block, state) for block in self.blocks}
            for block, trace in traces.items():
                conditionals.values(block, passes.drawn(trace))
        refuse_parts(*traces.values())
        self.rows = shared_rows(traces.values())
        self.variables = {
            name: variable(traces[block].nodes[name], self.rows)
            for block, sites in self.blocks.items()
            for name in sites
        }
        self.check_shapes(self.batch)
        self.batch = {n: v.to(self.variables[n].value.dtype) for n, v in self.batch.items()}

    def copy_arguments(self, copies: int, with_others: bool) -> None:  # noqa: D102
        pass  # programs see values, whose rows are copied

    def traces(self, state: State) -> Iterator[Record]:  # noqa: D102
        return (self._trace(block, state) for block in self.blocks)

    def start(self, start: Start) -> State:  # noqa: D102
        state = self._start(start, {})
        self.check_shapes(state)
        return state

    def draw(self, block: str, state: State, around: Around = unhandled) -> State:  # noqa: D102
        return self.conditionals.values(block, passes.drawn(self._trace(block, state, around)))

    def _trace(self, block: str, state: State, around: Around = unhandled) -> Record:
        program, arguments = self.conditionals.programs[block], self.conditionals.arguments
        return self._run(program, arguments(block, state), around)

    def _run(self, program: Program, arguments: State, around: Around = unhandled) -> Record:
        with overlay(self.known):
            return passes.fill_in(around(program), ((), dict(arguments)), {})

    def _start(self, start: Start, last_resort: State) -> State:
        """Values of all variables: what is known, then draws, then what the batch holds.

        Raises:
            ValueError: Some are still missing.
        """
        batch = {
            name: self.known[name].over(value) if name in self.known else value
            for name, value in self.batch.items()
        }
        state = {name: seen.value for name, seen in self.known.items() if seen.mask is None}
        if start == "data":
            data = {name: value for name, value in batch.items() if name not in self.known}
            self.check_finite(data, 0)
            state |= data
        if (prior := self.conditionals.prior) is not None:
            arguments = self.conditionals.prior_arguments(batch | state)
            drawn = passes.drawn(self._run(prior, arguments))
            state = self.conditionals.prior_values(drawn) | state
        usable = {n: v for n, v in batch.items() if v.isfinite().all()}
        for others in ({}, usable, last_resort):
            state = self.conditionals.filled(others | state, self.draw)
        if missing := [name for name in self.conditionals.variables if name not in state]:
            raise ValueError(
                f"The chains can't start: {missing} are neither drawn by the prior nor given in "
                "the batch, without NaN, and no program that draws them has all its arguments. "
                "Draw them in the prior, or give them in the batch."
            )
        return state
