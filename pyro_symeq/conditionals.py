r"""Conditional programs, one for each block of variables.

A joint law need not be written down: it may be given by its conditionals

.. math::
    p_b(v_b \mid v_{\neg b}), \qquad b = 1, \dots, K,

where the variables fall into blocks :math:`v_1, \dots, v_K`, and a program draws each block from
some of the others. They need not be those of one joint law.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter
from typing import Any

from torch import Tensor

from pyro_symeq.binding import Program, open_parameters

__all__ = ["Conditionals"]

State = dict[str, Tensor]


class Conditionals:
    r"""Conditional programs, one for each block of variables.

    Each program samples the sites of its block, and takes the variables that it depends on as
    arguments of their names. With ``**kwargs`` it is given all the others. A parameter that is no
    variable keeps its default.

    Args:
        programs: The program of each block, by the name of its site or a tuple of names.
        prior: Draws starting values :math:`\pi(v)` of some variables. It may take variables too,
            such as data whose length tells how many to draw.

    Attributes:
        blocks: The sites of each block, by the name of the block: its site, or its sites joined by
            commas.
        programs: The program of each block.
        parents: The variables that the program of each block takes.

    Raises:
        TypeError: Something is no program, no name, or takes arguments that have no name.
        ValueError: Two blocks share a site, or a program takes what no conditional draws.

    References:
        Symmetric Equilibrium Learning of VAEs (Flach, Schlesinger, Shekhovtsov, 2024), eq. 17 and
        appendix B. https://arxiv.org/abs/2307.09883

    Example:
        >>> def p_s(x):
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("s", dist.Bernoulli(logits=x))
        >>> def p_x(s):
        ...     with pyro.plate("rows", len(s)):
        ...         pyro.sample("x", dist.Normal(s, 1.0))
        >>> Conditionals({"s": p_s, "x": p_x})
        Conditionals(s | x; x | s)
    """

    def __init__(
        self,
        programs: Mapping[str | tuple[str, ...], Program],
        prior: Program | None = None,
    ) -> None:
        if not isinstance(programs, Mapping) or not programs:
            raise TypeError(
                "Expected programs to be a dict {site or tuple of sites: program} with an entry "
                f"for each block, got {programs!r}."
            )
        self.blocks: dict[str, tuple[str, ...]] = {}
        self.programs: dict[str, Program] = {}
        for key, program in programs.items():
            sites, block = _sites(key), block_name(key)
            self.blocks[block], self.programs[block] = sites, program
        self.prior = prior
        for name, count in Counter(self.variables).items():
            if count > 1:
                raise ValueError(
                    f"Several blocks draw the site '{name}': {list(self.blocks)}. Let one draw it."
                )
        self.parents = {
            block: tuple(
                _Signature(
                    f"program of block '{block}'", program, self.variables, self.blocks[block]
                ).takes
            )
            for block, program in self.programs.items()
        }
        self._prior = None if prior is None else _Signature("prior", prior, self.variables, ())

    def __repr__(self) -> str:
        laws = (
            f"{block} | {', '.join(parents)}" if parents else block
            for block, parents in self.parents.items()
        )
        return f"Conditionals({'; '.join(laws)})"

    @property
    def variables(self) -> tuple[str, ...]:
        """The names of all variables, block by block."""
        return tuple(name for sites in self.blocks.values() for name in sites)

    def arguments(self, block: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the program of a block is called with.

        Args:
            block: The name of the block.
            state: Values of the variables, or at least of the block's parents.

        Returns:
            The values of its parents, by name.
        """
        return {name: state[name] for name in self.parents[block]}

    def prior_arguments(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the prior is called with.

        Args:
            state: Values of some variables.

        Returns:
            Those of them that the prior takes, by name.

        Raises:
            ValueError: The prior needs others too.
        """
        takes = {} if self._prior is None else self._prior.takes
        if missing := [name for name, needed in takes.items() if needed and name not in state]:
            raise ValueError(f"The prior takes {missing}. Give them in the batch: Batch(...).")
        return {name: state[name] for name in takes if name in state}

    def filled(self, state: State, draw: Callable[[str, State], State]) -> State:
        """Draws the blocks that lack values and whose parents have some, one after another.

        Args:
            state: Values of some variables.
            draw: Draws a block given a state.

        Returns:
            The state, with the values that could be drawn.
        """
        for block, sites in self.blocks.items():
            is_ready = state.keys() >= {*self.parents[block]}
            if is_ready and not state.keys() >= {*sites}:
                return self.filled(draw(block, state) | state, draw)
        return state

    def values(self, block: str, drawn: State) -> State:
        """Checks what the program of a block has drawn.

        Args:
            block: The name of the block.
            drawn: The values of the program's random variables, by name.

        Returns:
            The values of the block's sites.

        Raises:
            ValueError: The program didn't sample its sites, or sampled others.
        """
        sites = self.blocks[block]
        if missing := [name for name in sites if name not in drawn]:
            raise ValueError(
                f"The program of block '{block}' never samples {missing}. Let it sample its sites "
                "in each run, under these names."
            )
        _refuse_further(f"program of block '{block}'", drawn, sites)
        return drawn

    def prior_values(self, drawn: State) -> State:
        """Checks what the prior has drawn.

        Args:
            drawn: The values of its random variables, by name.

        Returns:
            The same values.

        Raises:
            ValueError: The prior samples what is no variable.
        """
        _refuse_further("prior", drawn, self.variables)
        return drawn


class _Signature:
    """The variables that a program takes, and whether it needs them."""

    def __init__(
        self, what: str, program: Any, variables: Iterable[str], own: Iterable[str]
    ) -> None:
        others = [name for name in variables if name not in own]
        self.takes: dict[str, bool] = {}
        for p in _parameters(what, program):
            if p.kind is p.VAR_POSITIONAL:
                continue
            if p.kind is p.VAR_KEYWORD:
                self.takes |= {name: False for name in others if name not in self.takes}
            elif p.name in others and p.kind is not p.POSITIONAL_ONLY:
                self.takes[p.name] = p.default is p.empty
            elif p.default is p.empty:
                raise _uncovered(what, p.name, own)


def _uncovered(what: str, name: str, own: Iterable[str]) -> ValueError:
    reason = "which it draws itself" if name in own else "which no conditional draws by that name"
    return ValueError(
        f"The conditionals don't cover the variables: the {what} takes '{name}', {reason}. Add a "
        "conditional for it, or fix it with functools.partial."
    )


def _parameters(what: str, program: Any) -> list[Parameter]:
    """The parameters of a program that are not fixed."""
    try:
        return open_parameters(program)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"Expected the {what} to be a function whose parameters are named like variables, got "
            f"{type(program).__name__}: {error}"
        ) from error


def block_name(key: str | tuple[str, ...]) -> str:
    """The name of a block: its site, or its sites joined by commas."""
    return ", ".join(_sites(key))


def _sites(key: Any) -> tuple[str, ...]:
    sites = key if isinstance(key, tuple) else (key,)
    if not sites or not all(isinstance(name, str) for name in sites):
        raise TypeError(f"Expected a block to be a site or a tuple of sites, got {key!r}.")
    return sites


def _refuse_further(what: str, sampled: Iterable[str], expected: Iterable[str]) -> None:
    if further := [name for name in sampled if name not in expected]:
        raise ValueError(
            f"The {what} samples {further} too, which it shouldn't. Leave them out, add them to "
            "its block, or mark them with infer={'is_auxiliary': True}."
        )
