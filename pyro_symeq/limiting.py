r"""The joint law that a pair of programs, or more conditionals, settle in.

A model :math:`p(x \mid z)` and a guide :math:`q(z \mid x)` that don't agree on one joint law still
define one: alternating them gives a chain, whose limit with a fair draw for the program that came
last is

.. math:: m(x, z) = \tfrac{1}{2} m(z)\, p(x \mid z) + \tfrac{1}{2} m(x)\, q(z \mid x).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_symeq.aside import buffers_kept
from pyro_symeq.batch import sole
from pyro_symeq.binding import Program
from pyro_symeq.chain import Chain, Rounds, Start
from pyro_symeq.checks import check_count
from pyro_symeq.clamps import Values, by_site
from pyro_symeq.conditional_chain import ConditionalChain
from pyro_symeq.conditionals import Conditionals, State
from pyro_symeq.diagnostics import Diagnostics
from pyro_symeq.marginals import Completion, RunningMarginal
from pyro_symeq.pair_chain import PairChain
from pyro_symeq.rehearsal import Bind

__all__ = ["LimitingDistribution"]

Mask = Mapping[str, Tensor]
Functional = Callable[[State], Tensor]


class LimitingDistribution:
    r"""The limiting distribution of a pair, or of more conditionals.

    In a round of its chain, the data are drawn from :math:`p(x \mid z)`, then the latents from
    :math:`q(z \mid x)`; of conditionals, each block is drawn given the others, in their order.
    Many chains run at once, without a graph, where the tensors of the programs are.

    What ``given=`` and ``mask=`` say is known stays as it is: it is laid over each draw. So the
    rest of a site is drawn from its conditional if the elements of the site are independent given
    the other blocks.

    Where there are several chains for each row, they are made of copies of the rows of the
    arguments: of tensors that hold data, and of others that have an element for each row along
    their first dimension.

    Args:
        model: The decoder's program :math:`p(x, z)`, or :class:`Conditionals`.
        guide: The encoder's program :math:`q(z \mid x)`; it takes the model's arguments.
        bind: How dreams are handed to the guide, see :class:`SymmetricUtility`.

    Raises:
        TypeError: There is no guide, or there is one with conditionals.

    References:
        Symmetric Equilibrium Learning of VAEs (Flach, Schlesinger, Shekhovtsov, 2024), eqs. 12
        and 28. https://arxiv.org/abs/2307.09883

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Bernoulli(0.5))
        ...         pyro.sample("x", dist.Normal(z, 0.1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Bernoulli(logits=20 * x - 10))
        >>> limiting = LimitingDistribution(model, guide)
        >>> limiting.sample(5, torch.zeros(2))["x"].shape
        torch.Size([5, 2])
        >>> completion = limiting.complete(torch.ones(2), mask={"x": torch.tensor([True, False])})
        >>> completion.marginals["z"].probs.round(decimals=2)[0]
        tensor(1.)
    """

    def __init__(
        self,
        model: Program | Conditionals,
        guide: Program | None = None,
        *,
        bind: Bind | None = None,
    ) -> None:
        if isinstance(model, Conditionals) and (guide is not None or bind is not None):
            raise TypeError("Expected Conditionals alone, got a guide or bind= too.")
        if not isinstance(model, Conditionals) and guide is None:
            raise TypeError("Expected a model and a guide, or Conditionals; got no guide.")
        self.model = model
        self.guide = guide
        self.bind = bind

    def __repr__(self) -> str:
        programs = [self.model] if self.guide is None else [self.model, self.guide]
        names = (getattr(program, "__name__", repr(program)) for program in programs)
        return f"LimitingDistribution({', '.join(names)})"

    @torch.no_grad()
    def sample(
        self,
        num_samples: int,
        *args: Any,
        num_steps: int = 1000,
        burn_in: int | None = None,
        thin: int = 1,
        start: Start = "dream",
        given: Values | None = None,
        mask: Mask | None = None,
        progress: bool = False,
    ) -> dict[str, Tensor]:
        r"""Draws from the limiting distribution.

        Each chain gives a draw after the rounds ``burn_in + thin``, ``burn_in + 2 * thin``, ... of
        its ``num_steps``. There are as many chains as it takes, for each row of the batch.

        Args:
            num_samples: The number of draws for each row.
            args: What model and guide take, or a :class:`Batch`. For conditionals none, or a batch
                with values of variables. They tell how many rows there are.
            num_steps: The number of rounds.
            burn_in: How many to leave out at first; by default all but the last ``thin``.
            thin: Of the other rounds, every ``thin``-th is kept.
            start: Where the chains start: at a ``"dream"`` of the model (a draw of the prior, for
                conditionals), or at the ``"data"`` in the batch.
            given: Values of sites that stay as they are.
            mask: Where a site stays as it is, in its shape with its event dimensions; with the
                values that ``given`` or else the batch holds there. Other elements may be NaN.
            progress: Whether to show a progress bar.

        Returns:
            Draws by site, with shape :math:`(num\_samples, *site)`, chain after chain.

        Raises:
            TypeError: An option is of the wrong kind.
            ValueError: An option is impossible, or a chain meets NaN.
        """
        rounds = _rounds(num_steps, burn_in, thin, start, only_last=True)
        check_count("num_samples", num_samples, at_least=1)
        copies, rest = divmod(num_samples, rounds.num_draws)
        if rest:
            raise ValueError(
                f"Expected num_samples to be a multiple of the {rounds.num_draws} draws that each "
                f"chain gives, (num_steps - burn_in) // thin, got {num_samples}."
            )
        chain = self._chain(args, copies, given, mask)
        draws: dict[str, Tensor] = {}
        for k, state in enumerate(_run(chain, rounds, progress)):
            for name, value in _by_chain(chain, state).items():
                if name not in draws:
                    shape = (copies, rounds.num_draws, *value.shape[1:])
                    draws[name] = value.new_empty(shape)
                draws[name][:, k] = value
        return {name: value.flatten(0, 1) for name, value in draws.items()}

    @torch.no_grad()
    def complete(
        self,
        *args: Any,
        given: Values | None = None,
        mask: Mask | None = None,
        num_samples: int = 1,
        num_steps: int = 1000,
        burn_in: int | None = None,
        thin: int = 1,
        start: Start = "dream",
        progress: bool = False,
    ) -> Completion:
        """Completes data that are known in part.

        Args:
            args: As for :meth:`sample`.
            given: As for :meth:`sample`.
            mask: As for :meth:`sample`. All that ``given`` and ``mask`` don't name is drawn.
            num_samples: The number of chains for each row.
            num_steps: The number of rounds.
            burn_in: How many to leave out at first; by default half of them.
            thin: Of the other rounds, every ``thin``-th is kept.
            start: As for :meth:`sample`.
            progress: Whether to show a progress bar.

        Returns:
            The last state of each chain, and the marginals over all rounds that are kept.

        Raises:
            TypeError: An option is of the wrong kind.
            ValueError: Nothing is known, an option is impossible, or a chain meets NaN.
        """
        given, mask = by_site("given", given), by_site("mask", mask)
        if not given and not mask:
            raise ValueError(
                "Nothing is known to complete. Tell by given= and mask= what is, or use sample()."
            )
        rounds = _rounds(num_steps, burn_in, thin, start)
        check_count("num_samples", num_samples, at_least=1)
        chain = self._chain(args, num_samples, given, mask)
        running = {name: RunningMarginal(v.law) for name, v in chain.variables.items()}
        samples: dict[str, Tensor] = {}
        for state in _run(chain, rounds, progress):
            samples = _by_chain(chain, state)
            for name, value in samples.items():
                running[name].update(value)
        return Completion(samples, {name: marginal.result() for name, marginal in running.items()})

    @torch.no_grad()
    def diagnose(
        self,
        functionals: Mapping[str, Functional],
        num_chains: int,
        *args: Any,
        num_steps: int = 1000,
        burn_in: int | None = None,
        thin: int = 1,
        start: Start = "dream",
        given: Values | None = None,
        mask: Mask | None = None,
        progress: bool = False,
    ) -> Diagnostics:
        """Follows functions of the state along the chains, to see how well they mix.

        Args:
            functionals: Functions by name. Each takes the values of all sites, a dict, with the
                rows of all chains, and returns a number or tensor for each row.
            num_chains: The number of chains for each row.
            args: As for :meth:`sample`.
            num_steps: The number of rounds.
            burn_in: How many to leave out at first; by default half of them.
            thin: Of the other rounds, every ``thin``-th is kept.
            start: As for :meth:`sample`.
            given: As for :meth:`sample`.
            mask: As for :meth:`sample`.
            progress: Whether to show a progress bar.

        Returns:
            The values of the functions by chain and draw.

        Raises:
            TypeError: An option is of the wrong kind, or there is no function.
            ValueError: An option is impossible, a function returns another number of rows, or a
                chain meets NaN.
        """
        rounds = _rounds(num_steps, burn_in, thin, start)
        check_count("num_chains", num_chains, at_least=1)
        if not isinstance(functionals, Mapping) or not functionals:
            raise TypeError(
                "Expected functionals to be a dict {name: function} with at least one function, "
                f"got {functionals!r}."
            )
        chain = self._chain(args, num_chains, given, mask)
        values: dict[str, list[Tensor]] = {name: [] for name in functionals}
        for state in _run(chain, rounds, progress):
            for name, functional in functionals.items():
                values[name].append(_by_row(name, functional(state), chain))
        return Diagnostics({name: torch.stack(draws, 1) for name, draws in values.items()})

    def _chain(
        self, args: tuple[Any, ...], copies: int, given: Values | None, mask: Mask | None
    ) -> Chain:
        call, given, mask = sole((args, {})), by_site("given", given), by_site("mask", mask)
        chain: Chain
        with buffers_kept():
            if isinstance(self.model, Conditionals):
                if call[0]:
                    raise TypeError(
                        "Expected values of variables by name, Batch(x=x), got positional "
                        "arguments: conditionals have no order."
                    )
                chain = ConditionalChain(self.model, call[1], given)
            else:
                assert self.guide is not None
                chain = PairChain(self.model, self.guide, self.bind, call)
            chain.prepare(copies, given, mask)
        return chain


def _rounds(
    num_steps: int, burn_in: int | None, thin: int, start: Start, only_last: bool = False
) -> Rounds:
    check_count("num_steps", num_steps, at_least=1)
    check_count("thin", thin, at_least=1)
    if burn_in is None:
        burn_in = max(num_steps - thin, 0) if only_last else num_steps // 2
    return Rounds(num_steps, burn_in, thin, start)


def _run(chain: Chain, rounds: Rounds, progress: bool) -> Iterator[State]:
    with buffers_kept():
        yield from chain.rounds(rounds, _ticks(rounds.last, progress))


def _by_chain(chain: Chain, state: State) -> State:
    return {n: chain.variables[n].by_chain(v, chain.copies) for n, v in state.items()}


def _by_row(name: str, value: Any, chain: Chain) -> Tensor:
    """The values of a function, with the chains in a first dimension."""
    rows = chain.num_rows
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if not isinstance(value, Tensor) or value.shape[:1] != (rows,):
        raise ValueError(
            f"Expected functional '{name}' to return a tensor whose first dimension has the "
            f"{rows} rows of all chains, got {shape}."
        )
    return value.unflatten(0, (chain.copies, -1)).clone()


def _ticks(last: int, progress: bool) -> Iterable[int]:
    """The numbers of the rounds, 1, 2, ..., with a progress bar where asked for."""
    ticks = range(1, last + 1)
    if not progress:
        return ticks
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("A progress bar needs tqdm. Run: pip install tqdm.") from error
    return tqdm(ticks, desc="rounds")
