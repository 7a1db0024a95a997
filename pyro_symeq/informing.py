"""The information that latents carry about the rows of a batch, from runs of a guide."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from pyro.distributions import Independent, MaskedDistribution
from torch import Tensor

from pyro_symeq import passes
from pyro_symeq.binding import Call, Program
from pyro_symeq.passes import Observation
from pyro_symeq.rows import Rows, shared_rows
from pyro_symeq.tracing import Record


def several_runs(
    guide: Program,
    call: Call,
    num_runs: int,
    given: Mapping[str, Observation] | None = None,
    rows: Mapping[str, Tensor] | None = None,
) -> list[Record]:
    """Runs a guide several times on the same rows of a batch.

    Args:
        guide: The guide.
        call: Its arguments.
        num_runs: How often it runs.
        given: What was observed of some of its sites.
        rows: The subsamples of plates that the first run is not to draw.
    """
    runs: list[Record] = []
    for _ in range(num_runs):
        runs.append(passes.fill_in(guide, call, given or {}, rows))
        rows = passes.subsamples(runs[0])
    return runs


def in_latents(runs: Sequence[Record], given: Iterable[str] = ()) -> dict[str, Tensor]:
    """The information (bits) in latents that runs of a guide drew for one batch.

    See :func:`pyro_symeq.metrics.information`.

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
        with suppress(NotImplementedError):  # Binomial, with other total counts in other rows
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
