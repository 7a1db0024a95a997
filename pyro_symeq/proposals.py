r"""Completions that are chosen among several draws of the encoder.

Of :math:`K` draws :math:`z_1, \dots, z_K \sim q_\varphi(z \mid x)` one is kept, with probability

.. math::
    \frac{w_k}{w_1 + \dots + w_K}, \qquad w_k = \frac{p_\theta(x, z_k)}{q_\varphi(z_k \mid x)},

separately for each row of the plates that all sites share. With growing :math:`K` its law tends to
the decoder's own posterior :math:`p_\theta(z \mid x)`, and the decoder's step to that of
reweighted wake-sleep (Bornschein and Bengio, 2015, https://arxiv.org/abs/1406.2751).
"""

from dataclasses import dataclass

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import Categorical

from pyro_symeq import passes
from pyro_symeq.passes import Term
from pyro_symeq.tracing import Record, Site


@dataclass(frozen=True)
class Proposals:
    r"""One draw of the guide, or several along an outermost plate, with their importance weights.

    Args:
        completion: The trace of the guide.
        numerator: The terms of :math:`\log p_\theta(x, z)`.
        denominator: The terms of :math:`\log q_\varphi(z \mid x)`.
        dim: The dimension of the plate of several draws.
    """

    completion: Record
    numerator: list[Term]
    denominator: list[Term]
    dim: int | None = None

    def plate_dims(self) -> set[int]:
        """The dimensions of the plates that all sites share."""
        return set.intersection(*map(_plate_dims, (*self.numerator, *self.denominator)))

    def log_ratios(self, dims: set[int]) -> Tensor:
        """The logarithms of the weights, by row of some plates and draw."""
        return _sum(self.numerator, dims) - _sum(self.denominator, dims)

    def log_weights(self, dims: set[int]) -> list[Tensor]:
        """The logarithm of each draw's weight, by row of some plates."""
        log_w = self.log_ratios(dims)
        if self.dim is None:
            return [log_w]
        return [_last(log, -min(dims - {self.dim}, default=0)) for log in log_w.unbind(self.dim)]

    def values(self, name: str, site: Site) -> list[Tensor]:
        """The value of a site in each draw."""
        value = passes.value(self.completion, name)
        if self.dim is None:
            return [value]
        frames = [f for f in site["cond_indep_stack"] if f.vectorized and f.dim != self.dim]
        num_dims = max((-f.dim for f in frames), default=0) + site["fn"].event_dim
        return [_last(draw, num_dims) for draw in value.unbind(0)]


def choose(proposals: list[Proposals]) -> dict[str, Tensor]:
    """Chooses a value for each site of the guide, row by row.

    Raises:
        ValueError: The proposals differ in their sites, so that their rows can't be mixed.
    """
    sites = [some.completion.variables for some in proposals]
    if differing := set().union(*sites) - set(sites[0]).intersection(*sites):
        raise ValueError(
            f"Only some draws of the guide have the sites {sorted(differing)}, so they can't be "
            "compared row by row. Let the guide sample the same sites in each run, or set "
            "num_proposals=1."
        )
    rows = set.intersection(*(some.plate_dims() for some in proposals))
    log_w = torch.stack([log for some in proposals for log in some.log_weights(rows)], dim=-1)
    log_w = torch.nan_to_num(log_w, nan=-torch.inf).clamp(min=torch.finfo(log_w.dtype).min)
    chosen = Categorical(logits=log_w).sample()
    return passes.subsamples(proposals[0].completion) | {
        name: _gather([x for some in proposals for x in some.values(name, site)], chosen, site)
        for name, site in sites[0].items()
        if not site["is_observed"]
    }


def _plate_dims(term: Term) -> set[int]:
    return {frame.dim for frame in term.site["cond_indep_stack"] if frame.vectorized}


def _sum(terms: list[Term], dims: set[int]) -> Tensor:
    """Sums log-probabilities over all but some of the (negative) dimensions of their batches."""
    if not terms:
        return torch.zeros(())
    return torch.stack([_summed(term, dims) for term in terms]).sum(0)


def _summed(term: Term, dims: set[int]) -> Tensor:
    log_prob = scale_and_mask(term.log_prob, 1.0, term.mask)
    others = [dim for dim in range(-log_prob.dim(), 0) if dim not in dims]
    rows = log_prob.sum(others, keepdim=True) if others else log_prob
    return _last(rows, -min(dims, default=0))


def _last(x: Tensor, num_dims: int) -> Tensor:
    """Leaves out dimensions of size 1 before the last ones, as far as there are such."""
    while x.dim() > num_dims and len(x) == 1:
        x = x[0]
    return x


def _gather(draws: list[Tensor], chosen: Tensor, site: Site) -> Tensor:
    """Takes the chosen draw of each row."""
    index = chosen.reshape(chosen.shape + (1,) * site["fn"].event_dim)
    shape = torch.broadcast_shapes(index.shape, draws[0].shape)
    stacked = torch.stack([draw.expand(shape) for draw in draws])
    return stacked.gather(0, index.expand(shape)[None])[0]
