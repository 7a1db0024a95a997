r"""The ELBO of pairs with binary latents, by the gradient estimator of DARN.

For a bit :math:`b` with :math:`p(b = 1) = p = \sigma(a)`, the gradient of an expectation is

.. math::
    \frac{\partial}{\partial p} \mathbb{E}[f(b)] = f(1) - f(0).

By the trapezoid rule this is :math:`\tfrac12 f'(0) + \tfrac12 f'(1)` for a quadratic :math:`f`, so
that a single draw gives an estimate that has no bias for such functions,

.. math::
    \frac{f'(b)}{2 \, p(b)}, \qquad\text{in the logit}\qquad
    \tfrac12 \, |b - p| \, f'(b).

It is the score-function estimator with the baseline :math:`f(b) + f'(b) (\tfrac12 - b)`, the value
at one half by the tangent at the draw. Backpropagation carries :math:`f'(b)` down a hierarchy: the
estimator is a layer that draws in the forward pass, with derivative :math:`\tfrac12 |b - p|`.

References:
    Deep AutoRegressive Networks (Gregor, Danihelka, Mnih, Blundell, Wierstra, 2014).
    https://arxiv.org/abs/1310.8499

    MuProp: Unbiased Backpropagation for Stochastic Neural Networks (Gu, Levine, Sutskever, Mnih,
    2016), where it is the 1/2-estimator. https://arxiv.org/abs/1511.05176
"""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

__all__ = ["DarnBernoulli", "elbo"]

Program = Callable[..., Any]


class DarnBernoulli(dist.Bernoulli):  # type: ignore[misc]
    """A Bernoulli distribution whose draws let gradients pass as those of DARN do."""

    has_rsample = True

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draws bits, with the derivative that is half of their distance from the mean."""
        bits = self.sample(sample_shape)
        slope = (bits - self.probs.detach()).abs() / 2
        return bits + slope * (self.logits - self.logits.detach())


def elbo(model: Program, guide: Program, *data: Tensor) -> Tensor:
    r"""Draws the ELBO, with a gradient in the parameters of both programs.

    This is what ``SVI`` with ``Trace_ELBO`` climbs, for guides whose draws all have derivatives;
    but nothing is read by the host, so that a step can be captured.

    Args:
        model: The decoder's program.
        guide: The encoder's program.
        data: What both take.

    Returns:
        The value :math:`\log p(x, z) - \log q(z \mid x)` (nats, summed over the batch) at a draw.
    """
    q = poutine.trace(guide).get_trace(*data)
    p = poutine.trace(poutine.replay(model, q)).get_trace(*data)
    return torch.as_tensor(p.log_prob_sum() - q.log_prob_sum())
