r"""What a model and a guide give to held-out data, however they have learned.

For a row :math:`x` of the data and :math:`K` draws :math:`z_k \sim q(z \mid x)`, the weights
:math:`w_k = p(x, z_k) / q(z_k \mid x)` give two estimates that are on average lower bounds of
:math:`\log p(x)`,

.. math::
    \log \frac1K \sum_k w_k \qquad\text{and}\qquad \frac1K \sum_k \log w_k.

The first rises to :math:`\log p(x)` with :math:`K`; the second estimates the ELBO.

References:
    Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2016).
    https://arxiv.org/abs/1509.00519
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = ["Estimate", "bounds", "log_weights"]

Program = Callable[..., Any]


@dataclass(frozen=True)
class Estimate:
    """A mean over the rows of the data.

    Args:
        mean: The mean.
        error: Its standard error.
    """

    mean: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> "Estimate":
        """The mean of independent values, with shape :math:`(N)`."""
        return cls(values.mean().item(), values.std().item() / len(values) ** 0.5)

    def __str__(self) -> str:
        return f"{self.mean:9.2f} ± {self.error:.2f}"


def bounds(
    model: Program, guide: Program, *data: Tensor, num_draws: int, at_once: int = 20_000
) -> tuple[Tensor, Tensor]:
    r"""Estimates :math:`\log p(x)` and the ELBO for each row of the data.

    Args:
        model: Takes rows of the data, and has them in a plate at dimension -1, its only one.
        guide: Likewise.
        data: What both take, with :math:`N` rows each.
        num_draws: The number of draws :math:`K`.
        at_once: How many draws are held in memory at a time.

    Returns:
        The importance-weighted log-likelihood and the ELBO (nats), with shape :math:`(N)`.
    """
    log_w = [
        log_weights(model, guide, rows, num_draws)
        for rows in _chunks(data, max(at_once // num_draws, 1))
    ]
    likelihoods = [log.logsumexp(0) - math.log(num_draws) for log in log_w]
    return torch.cat(likelihoods), torch.cat([log.mean(0) for log in log_w])


@torch.no_grad()
def log_weights(
    model: Program, guide: Program, rows: tuple[Tensor, ...], num_draws: int
) -> Tensor:
    r"""Draws :math:`\log p(x, z_k) - \log q(z_k \mid x)`, with shape :math:`(K, N)`."""
    with pyro.plate("draws", num_draws, dim=-2):
        q = poutine.trace(guide).get_trace(*rows)
        p = poutine.trace(poutine.replay(model, q)).get_trace(*rows)
    return _log_prob(p) - _log_prob(q)


def _log_prob(trace: Trace) -> Tensor:
    """The log-probability of a trace for each draw and row."""
    trace.compute_log_prob()
    sites: list[Any] = [site for site in trace.nodes.values() if site["type"] == "sample"]
    scores = [site["log_prob"] for site in sites if not site_is_subsample(site)]
    return torch.stack(scores).sum(0)


def _chunks(data: tuple[Tensor, ...], size: int) -> Iterator[tuple[Tensor, ...]]:
    yield from zip(*(rows.split(size) for rows in data), strict=True)
