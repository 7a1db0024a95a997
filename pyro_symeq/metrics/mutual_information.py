r"""How much each latent says about the data.

For a latent :math:`z_j` of the guide and rows :math:`x_1, \dots, x_N` of the data it is the mutual
information

.. math::
    I(z_j; x) = H\Bigl[ \tfrac1N \sum_n q(z_j \mid x_n) \Bigr]
        - \tfrac1N \sum_n H\bigl[ q(z_j \mid x_n) \bigr],

which is zero for a latent that ignores the data.
"""

from typing import Any

import torch
from torch import Tensor

from pyro_symeq import passes
from pyro_symeq.binding import Program
from pyro_symeq.checks import check_count
from pyro_symeq.informing import in_latents
from pyro_symeq.rehearsal import buffers_kept
from pyro_symeq.rows import shared_rows

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
