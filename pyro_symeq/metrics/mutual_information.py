r"""How much each latent says about the data, for the guide and for the model.

For a latent :math:`z_j` of the guide and rows :math:`x_1, \dots, x_N` of the data it is the mutual
information

.. math::
    I(z_j; x) = H\Bigl[ \tfrac1N \sum_n q(z_j \mid x_n) \Bigr]
        - \tfrac1N \sum_n H\bigl[ q(z_j \mid x_n) \bigr],

which is zero for a latent that ignores the data.

For a latent of the model the data are its dreams, whose posterior isn't known. The guide in its
place gives a lower bound (Barber and Agakov, 2003),

.. math:: I(z_j; x) \ge \mathbb{E}_{p(x, z)} \log_2 \frac{q(z_j \mid x)}{p(z_j)}.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor

from pyro_symeq import passes
from pyro_symeq.aside import buffers_kept
from pyro_symeq.batch import sole
from pyro_symeq.binding import Program
from pyro_symeq.checks import check_count
from pyro_symeq.informing import in_latents, independent_parts, several_runs
from pyro_symeq.rehearsal import Bind, rehearse
from pyro_symeq.rows import Rows, required_rows, shared_rows
from pyro_symeq.tracing import Record

__all__ = ["DreamedInformation", "dreamed_information", "information"]

AT_ONCE = 2**24  # numbers in memory


@dataclass(frozen=True)
class DreamedInformation:
    """What latents say about the data, under a model.

    Args:
        units: Bits by latent site, with the shape of the site without its rows.
        layers: Bits by latent site, each a scalar: what a layer adds to those before it.
    """

    units: dict[str, Tensor]
    layers: dict[str, Tensor]


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
        args: Its arguments, or one :class:`~pyro_symeq.Batch`, of a few hundred rows, say.
        num_draws: The number of draws :math:`K`.
        kwargs: Its keyword arguments.

    Returns:
        Bits by latent site, with the shape of the site without its rows. A latent with vectors for
        values counts as one if they are enumerated (``OneHotCategorical``), and by element if not
        (``MultivariateNormal``, ``Dirichlet``). Sites whose mean isn't known are left out; one
        that has no mean (``Cauchy``) gives NaN. All rows count, masked ones too.

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
    call = sole((args, kwargs))
    with torch.no_grad(), buffers_kept():
        runs = several_runs(guide, call, num_draws)
    if shared_rows(runs) is None:
        raise ValueError(
            "Expected all latents of the guide in one vectorised plate, whose rows are those of "
            "the data. Put pyro.plate around them."
        )
    return in_latents(runs)


@torch.no_grad()
def dreamed_information(
    model: Program,
    guide: Program,
    *args: Any,
    num_draws: int = 10,
    bind: Bind | None = None,
    **kwargs: Any,
) -> DreamedInformation:
    r"""Estimates how much each latent of a model says about its dreams, in bits.

    All numbers are lower bounds, which the guide makes: the better it knows the posterior, the
    closer they are. A decoder that ignores a latent gives it no bits, whatever the guide makes of
    the data; that is how a collapse looks from the side of the decoder.

    For a single latent, those on which it depends are averaged out: over :math:`N` dreams in the
    model, and over :math:`K` draws of the guide for each,

    .. math::
        I(z_j; x) \ge \frac1N \sum_n \log_2
            \frac{\frac1K \sum_k q(z_{nj} \mid z^k_{<j}, x_n)}
                 {\frac1N \sum_m p(z_{nj} \mid z_{m,<j})}.

    For a layer as a whole it is what the layer says besides those before it,

    .. math::
        I(z_l; x \mid z_{<l}) \ge \mathbb{E}_{p(x, z)}
            \log_2 \frac{q(z_l \mid z_{<l}, x)}{p(z_l \mid z_{<l})},

    if the guide draws the layers in the order of the model. Whatever its order, the sum over the
    layers is a bound of what all latents say together, :math:`I(z; x)`. Dreams being draws, an
    estimate may come out below zero; those of single latents are cut off there.

    Args:
        model: The decoder's program.
        guide: The encoder's program.
        args: What both take, or one :class:`~pyro_symeq.Batch`, of as many rows as there are to be
            dreams, a few hundred, say. All variables are in a vectorised plate.
        num_draws: The number of draws :math:`K`.
        bind: How dreams are handed to the guide, see :class:`~pyro_symeq.SymmetricUtility`.
        kwargs: More of what both programs take.

    Returns:
        Bits of units and of layers; a latent with vectors for values in model or guide
        (``OneHotCategorical`` or ``MultivariateNormal``, say) counts as one unit. Latents without a
        density (``Implicit``) are left out. What is masked adds nothing to layers, and counts like
        all else in units; both are means over all rows.

    Raises:
        ValueError: ``num_draws`` isn't a positive integer, there is no such plate, or the guide
            can't be given the dreams.

    References:
        The IM Algorithm: A Variational Approach to Information Maximization (Barber, Agakov,
        2003). Advances in Neural Information Processing Systems 16.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Bernoulli(torch.full((len(x),), 0.5)))
        ...         pyro.sample("x", dist.Normal(20 * z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Bernoulli(logits=20 * x - 200))
        >>> found = dreamed_information(model, guide, torch.zeros(500))
        >>> found.units["z"].round(decimals=3)  # z can be read off x
        tensor(1.)
    """
    check_count("num_draws", num_draws, at_least=1)
    call = sole((args, kwargs))
    pattern, _ = rehearse(model, guide, call, bind)
    with buffers_kept():
        dream = passes.dream(model, call, followed=pattern.is_followed)
        dreamed = pattern.hand_over(dream, call)
        guided = passes.replay(guide, dreamed, passes.values(dream.trace))
        subsamples = passes.subsamples(dream.trace)
        runs = several_runs(guide, dreamed, num_draws, rows=subsamples)
    rows = required_rows([dream.trace, guided, *runs])
    latents = [
        name
        for name, site in dream.trace.variables.items()
        if name in guided.variables and not passes.is_implicit(site)
    ]
    return DreamedInformation(
        {name: _unit_bits(name, dream.trace, runs, rows) for name in latents},
        {name: _layer_bits(name, dream.trace, guided, rows) for name in latents},
    )


def _unit_bits(name: str, dream: Record, runs: Sequence[Record], rows: Rows) -> Tensor:
    """The mean over the dreams of log q(z_j | x) - log p(z_j), for the units of a site."""
    z, p = passes.value(dream, name), dream.variables[name]["fn"]
    laws = [run.variables[name]["fn"] for run in runs if name in run.variables]
    num_dims = min(independent_parts(law)[1] for law in (p, *laws))
    log_q = _log_mean(torch.stack([_log_prob(q, z, num_dims) for q in laws]), 0)
    dim, dim_of_z = rows.dim - num_dims, rows.dim - p.event_dim
    by_dream = z.movedim(dim_of_z, 0).unsqueeze(dim_of_z)  # beside the laws of all dreams
    log_p = [
        _log_mean(_log_prob(p, some, num_dims), dim)
        for some in by_dream.split(max(AT_ONCE // z.numel(), 1))
    ]
    return ((log_q.mean(dim) - torch.cat(log_p).mean(0)) / math.log(2)).clamp(min=0)


def _log_prob(law: Any, z: Tensor, num_dims: int) -> Tensor:
    """The log-probability of units: independent parts that lie along so many dimensions.

    Parts along more dimensions, of a law that splits finer than others of its site, add up.
    """
    part, num_parts_dims = independent_parts(law)
    return sum_rightmost(part.log_prob(z), num_parts_dims - num_dims)


def _layer_bits(name: str, dream: Record, guided: Record, rows: Rows) -> Tensor:
    """The mean over the dreams of log q - log p at a site."""
    log_q, log_p = (
        sum(
            scale_and_mask(term.log_prob, 1.0, term.mask).sum()
            for term in passes.terms(trace, [name], {})
        )
        for trace in (guided, dream)
    )
    return (log_q - log_p) / (rows.size * math.log(2))


def _log_mean(log_p: Tensor, dim: int) -> Tensor:
    """The logarithm of the mean of probabilities along a dimension."""
    return log_p.logsumexp(dim) - math.log(log_p.shape[dim])
