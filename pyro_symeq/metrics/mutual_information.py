r"""How much each latent says about the data.

For a latent :math:`z_j` of the guide and rows :math:`x_1, \dots, x_N` of the data it is the mutual
information

.. math::
    I(z_j; x) = H\Bigl[ \tfrac1N \sum_n q(z_j \mid x_n) \Bigr]
        - \tfrac1N \sum_n H\bigl[ q(z_j \mid x_n) \bigr],

which is zero for a latent that ignores the data.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pyro.distributions import Independent, MaskedDistribution
from torch import Tensor

from pyro_symeq import passes
from pyro_symeq.binding import Program
from pyro_symeq.checks import check_count
from pyro_symeq.rehearsal import buffers_kept
from pyro_symeq.rows import Rows, shared_rows
from pyro_symeq.tracing import Record

__all__ = ["information"]


def information(
    guide: Program, *args: Any, num_draws: int = 10, **kwargs: Any
) -> dict[str, Tensor]:
    r"""Estimates how much each latent of a guide says about a batch, in bits.

    Latents on which that of :math:`z_j` depends are averaged out,
    :math:`q(z_j \mid x) \approx \frac1K \sum_k q(z_j \mid z^k_{<j}, x)`. With few draws their noise
    is taken for information about the data; for a bit, that adds at most about
    :math:`1 / (2 K \ln 2)`. Discrete latents are enumerated. For others, with means
    :math:`m_n` and variances :math:`v_n` of :math:`q(z_j \mid x_n)`, it is

    .. math::
        \tfrac12 \log_2 \bigl( \operatorname{Var}_n[m_n] + \tfrac1N \textstyle\sum_n v_n \bigr)
            - \tfrac1N \textstyle\sum_n \tfrac12 \log_2 v_n,

    an upper bound of the information if :math:`q(z_j \mid x_n)` is normal.

    A sum over latents is an upper bound of what they say together if they are independent given
    the data; it counts twice what two of them say alike.

    Args:
        guide: The encoder's program, with all its latents in a vectorised plate whose rows are
            those of the data.
        args: Its arguments, a batch of a few hundred rows, say.
        num_draws: The number of draws :math:`K`.
        kwargs: Its keyword arguments.

    Returns:
        Bits by latent site, with the shape of the site without its rows; a latent with vectors for
        values (``OneHotCategorical``, say) counts as one. Sites without a mean are left out.

    Raises:
        ValueError: ``num_draws`` isn't a positive integer, or there is no such plate.

    Example:
        >>> encoder = torch.nn.Linear(4, 2)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Bernoulli(logits=encoder(x)).to_event(1))
        >>> information(guide, torch.eye(4))["z"].shape
        torch.Size([2])
    """
    check_count("num_draws", num_draws, at_least=1)
    with torch.no_grad(), buffers_kept():
        runs = [passes.fill_in(guide, (args, kwargs), {}) for _ in range(num_draws)]
    if shared_rows(runs) is None:
        raise ValueError(
            "Expected all latents of the guide in one vectorised plate, whose rows are those of "
            "the data. Put pyro.plate around them."
        )
    return in_latents(runs)


def in_latents(runs: Sequence[Record], given: Iterable[str] = ()) -> dict[str, Tensor]:
    """The information (bits) in latents that runs of a guide drew for one batch, see above.

    Args:
        runs: The runs.
        given: The latents that were not drawn.
    """
    rows = shared_rows(runs)
    if rows is None:
        return {}
    found = {}
    for name in passes.unobserved(runs[0], given):
        laws = [run.variables[name]["fn"] for run in runs if name in run.variables]
        bits = _information(laws, rows)
        if bits is not None:
            found[name] = bits
    return found


def _information(laws: Sequence[Any], rows: Rows) -> Tensor | None:
    parts = [independent_parts(law) for law in laws]
    num_dims = parts[0][1]
    elements = [part for part, _ in parts]
    dim = rows.dim - num_dims
    if elements[0].has_enumerate_support:
        q = torch.stack([_probabilities(part) for part in elements]).mean(0)
        return (_entropy(q.mean(dim, keepdim=True)) - _entropy(q)).mean(dim).clamp(min=0)
    try:
        means = torch.stack([part.mean for part in elements])
        variances = torch.stack([part.variance for part in elements])
    except NotImplementedError:
        return None
    dim -= elements[0].event_dim
    within = variances.mean(0) + means.var(0, unbiased=False)
    total = means.mean(0).var(dim, unbiased=False) + within.mean(dim)
    return ((total.log2() - within.log2().mean(dim)) / 2).clamp(min=0)


def independent_parts(law: Any) -> tuple[Any, int]:
    """The distribution of the independent parts of a law, and over how many dimensions they are."""
    num_dims = 0
    while isinstance(law, (Independent, MaskedDistribution)):
        num_dims += getattr(law, "reinterpreted_batch_ndims", 0)
        law = law.base_dist
    return law, num_dims


def _probabilities(law: Any) -> Tensor:
    """The probabilities of the values of a discrete distribution, along a new first dimension."""
    return law.log_prob(law.enumerate_support(expand=False)).exp()


def _entropy(q: Tensor) -> Tensor:
    """The entropy (bits) along the first dimension."""
    return torch.special.entr(q).sum(0) / math.log(2)
