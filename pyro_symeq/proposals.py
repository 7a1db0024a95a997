r"""Completions that are chosen among several draws of the encoder.

Of :math:`K` draws :math:`z_1, \dots, z_K \sim q_\varphi(z \mid x)` one is kept, with probability

.. math::
    \frac{w_k}{w_1 + \dots + w_K}, \qquad w_k = \frac{p_\theta(x, z_k)}{q_\varphi(z_k \mid x)},

separately for each row of the plates that all sites share. With growing :math:`K` its law tends to
the decoder's own posterior :math:`p_\theta(z \mid x)`, and the decoder's step to that of
reweighted wake-sleep (Bornschein and Bengio, 2015, https://arxiv.org/abs/1406.2751).
"""

from dataclasses import dataclass
from itertools import chain

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Categorical

from pyro_symeq import passes
from pyro_symeq.passes import Term


@dataclass(frozen=True)
class Proposal:
    r"""A draw of the guide, with the terms of its importance weight.

    Args:
        completion: The trace of the guide.
        numerator: The terms of :math:`\log p_\theta(x, z)`.
        denominator: The terms of :math:`\log q_\varphi(z \mid x)`.
    """

    completion: Trace
    numerator: list[Term]
    denominator: list[Term]


def choose(proposals: list[Proposal]) -> dict[str, Tensor]:
    """Chooses a value for each site of the guide, row by row.

    Raises:
        ValueError: The proposals differ in their sites, so that their rows can't be mixed.
    """
    traces = [proposal.completion for proposal in proposals]
    sites = [dict(passes.sample_sites(trace)) for trace in traces]
    if differing := set().union(*sites) - set(sites[0]).intersection(*sites):
        raise ValueError(
            f"Only some draws of the guide have the sites {sorted(differing)}, so they can't be "
            "compared row by row. Let the guide sample the same sites in each run, or set "
            "num_proposals=1."
        )
    shared = set.intersection(
        *(_plate_dims(term) for p in proposals for term in chain(p.numerator, p.denominator))
    )
    log_w = [_sum(p.numerator, shared) - _sum(p.denominator, shared) for p in proposals]
    logits = torch.nan_to_num(torch.stack(log_w, dim=-1), nan=-torch.inf)
    chosen = Categorical(logits=logits.clamp(min=torch.finfo(logits.dtype).min)).sample()
    return passes.subsamples(traces[0]) | {
        name: _gather([passes.value(trace, name) for trace in traces], chosen, site["fn"])
        for name, site in sites[0].items()
    }


def _plate_dims(term: Term) -> set[int]:
    return {frame.dim for frame in term.site["cond_indep_stack"] if frame.vectorized}


def _sum(terms: list[Term], dims: set[int]) -> Tensor:
    """Sums log-probabilities over all but some of the (negative) dimensions of their batches."""
    return torch.stack([_summed(term, dims) for term in terms]).sum(0)


def _summed(term: Term, dims: set[int]) -> Tensor:
    log_prob = scale_and_mask(term.log_prob, 1.0, term.mask)
    others = [dim for dim in range(-log_prob.dim(), 0) if dim not in dims]
    rows = log_prob.sum(others, keepdim=True) if others else log_prob
    return rows.reshape(rows.shape[rows.dim() + min(dims, default=0) :])


def _gather(draws: list[Tensor], chosen: Tensor, fn: passes.Site) -> Tensor:
    """Takes the chosen draw of each row."""
    index = chosen.reshape(chosen.shape + (1,) * fn.event_dim)
    shape = torch.broadcast_shapes(index.shape, draws[0].shape)
    stacked = torch.stack([draw.expand(shape) for draw in draws])
    return stacked.gather(0, index.expand(shape)[None])[0]
