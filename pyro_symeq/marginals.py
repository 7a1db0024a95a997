r"""Marginals of random variables, gathered while draws come in.

Of draws :math:`v_1, \dots, v_n`, taken some at a time, the mean and the sum of squares are kept:

.. math::
    \bar v \leftarrow \bar v + \tfrac{m}{n + m} (\bar v' - \bar v), \qquad
    S \leftarrow S + S' + \tfrac{n m}{n + m} (\bar v' - \bar v)^2,

where a dash marks those of :math:`m` new draws. They are kept in single precision at least, so that
small steps add up.

References:
    Updating formulae and a pairwise algorithm for computing sample variances (Chan, Golub,
    LeVeque, 1982).
"""

from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Independent, MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, OneHotCategorical
from torch.nn.functional import one_hot

__all__ = ["Completion", "Marginal"]


@dataclass(frozen=True)
class Marginal:
    r"""The marginal law of each element of a site.

    Args:
        probs: The frequency of 1 for ``Bernoulli`` and ``OneHotCategorical`` sites, with the shape
            of the site; that of each category for ``Categorical`` ones, in a last dimension more;
            ``None`` for others.
        mean: The mean for sites of other kinds, else ``None``.
        variance: Their mean squared deviation, else ``None``.
        decision: The value of maximum marginal, in the type of the site; for sites of other kinds
            the mean.
    """

    probs: Tensor | None
    mean: Tensor | None
    variance: Tensor | None
    decision: Tensor


@dataclass(frozen=True, repr=False)
class Completion:
    r"""What a chain says of data that are known in part.

    Args:
        samples: The last state of each chain by site, with shape :math:`(num\_samples, *site)`.
        marginals: The marginal laws by site, over all chains and all rounds that are kept.
    """

    samples: dict[str, Tensor]
    marginals: dict[str, Marginal]

    def __repr__(self) -> str:
        num_samples = len(next(iter(self.samples.values())))
        return f"Completion({list(self.samples)}, {num_samples=})"

    def decide(self) -> dict[str, Tensor]:
        """Decides for the values of maximum marginal, and for the mean where there is none.

        Returns:
            A value for each site, with its shape.
        """
        return {name: marginal.decision for name, marginal in self.marginals.items()}


class RunningMarginal:
    """The marginal of a site over the draws so far.

    Args:
        law: The distribution of the site.
    """

    def __init__(self, law: Any) -> None:
        while isinstance(law, (Independent, MaskedDistribution, ExpandedDistribution)):
            law = law.base_dist
        self.law = law
        self.dtypes: tuple[torch.dtype, ...] = ()  # of draws, and of what is told of them
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def update(self, draws: Tensor) -> None:
        """Takes in draws.

        Args:
            draws: Some draws, along the first dimension.
        """
        self.dtypes = draws.dtype, self._told_dtype(draws)
        mean, squares = self._moments(draws)
        m, n = len(draws), self.count
        shift = mean - self.mean
        self.count = n + m
        self.mean = self.mean + shift * (m / self.count)
        self.squares = self.squares + squares + shift.square() * (n * m / self.count)

    def result(self) -> Marginal:
        """The marginal; there must have been draws."""
        exact, (dtype, told) = torch.as_tensor(self.mean), self.dtypes
        mean = exact.to(told)
        if isinstance(self.law, Categorical):
            return Marginal(mean, None, None, exact.argmax(-1).to(dtype))
        if isinstance(self.law, OneHotCategorical):
            decision = one_hot(exact.argmax(-1), exact.shape[-1]).to(dtype)
            return Marginal(mean, None, None, decision)
        if isinstance(self.law, Bernoulli):
            return Marginal(mean, None, None, (exact >= 0.5).to(dtype))
        variance = torch.as_tensor(self.squares) / self.count
        return Marginal(None, mean, variance.to(told), mean)

    def _told_dtype(self, draws: Tensor) -> torch.dtype:
        """The type of frequencies and moments: that of draws, or of a law that draws integers."""
        if isinstance(self.law, Categorical):
            return self.law.logits.dtype
        return draws.dtype if draws.is_floating_point() else torch.get_default_dtype()

    def _moments(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of some draws, and the sum of their squared deviations."""
        dtype = torch.promote_types(self.dtypes[-1], torch.float32)
        if isinstance(self.law, Categorical):
            index = draws.long().movedim(0, -1)
            shape = *index.shape[:-1], self.law.param_shape[-1]
            ones = torch.ones(index.shape, dtype=dtype, device=draws.device)
            mean = ones.new_zeros(shape).scatter_add_(-1, index, ones) / len(draws)
            return mean, torch.zeros_like(mean)
        draws = draws.to(dtype)
        mean = draws.mean(0)
        return mean, (draws - mean).square().sum(0)
