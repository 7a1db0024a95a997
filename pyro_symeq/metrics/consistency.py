r"""How far a model and a guide are from agreeing on one joint law.

A pair is consistent if :math:`p(x, z)` and :math:`\pi(x)\, q(z \mid x)` are the same. Then each
latent has one law, whether it is drawn from the *prior* :math:`p(z)`, from the aggregated
*posterior* :math:`\int \pi(x)\, q(z \mid x)\, dx`, or from the *limiting* distribution of the
pair; and images have one law, whether they are *data*, or drawn from the *decoder*
:math:`\int p(z)\, p(x \mid z)\, dz` or the *limiting* distribution.
"""

from collections.abc import Mapping
from functools import partial
from itertools import combinations
from typing import Any

import torch
from pyro.distributions import Categorical
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_symeq import passes
from pyro_symeq.aside import buffers_kept
from pyro_symeq.batch import Batch, sole
from pyro_symeq.binding import Program
from pyro_symeq.informing import independent_parts
from pyro_symeq.limiting import LimitingDistribution
from pyro_symeq.metrics.frechet import Features, frechet_distance
from pyro_symeq.metrics.two_samples import two_sample_accuracy
from pyro_symeq.rehearsal import Bind
from pyro_symeq.rows import Rows, required_rows, shaped, variable
from pyro_symeq.tracing import Site

__all__ = ["consistency"]

Comparison = dict[str, float]


def consistency(
    model: Program,
    guide: Program,
    *args: Any,
    features: Mapping[str, Features] | None = None,
    num_steps: int = 100,
    bind: Bind | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> dict[str, dict[str, Comparison]]:
    """Compares the laws that a pair gives to each latent, and to images.

    Sets of as many draws as the batch has rows are compared by a Fréchet distance (see
    :func:`frechet_distance`) and by the accuracy of a classifier that tells them apart (see
    :func:`two_sample_accuracy`). Two sets of one law, ``"prior, prior"`` and
    ``"decoder, decoder"``, show what numbers mean nothing. The others that are about as small say
    that the pair is consistent, as far as so many draws can tell.

    Args:
        model: The decoder's program.
        guide: The encoder's program.
        args: What both take, or one :class:`~pyro_symeq.Batch`: a few thousand data, say, and no
            latents, with all variables in a vectorised plate.
        features: The features in which data are compared, by site; sites without are left out.
            They are given values in the shape of the site, with the rows in a first dimension, and
            in the type that dreams have.
        num_steps: The number of rounds of the chains, which start at dreams.
        bind: How dreams are handed to the guide, see :class:`~pyro_symeq.SymmetricUtility`.
        progress: Whether to show a progress bar of the chains.
        kwargs: More of what both programs take.

    Returns:
        Numbers that ``json`` can write, by site, pair of sets, and name: for a latent ``z``,
        ``result["z"]["prior, limiting"]`` has ``"frechet[z]"``, ``"accuracy[z]"`` and
        ``"accuracy[z] error"``; for data, the name of the features is in brackets.

    Raises:
        ImportError: torchmetrics or scikit-learn isn't installed.
        ValueError: There is no such plate or no such site, the batch is small or observes
            latents, or samples are not finite.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))  # the posterior
        >>> result = consistency(model, guide, 9 + torch.randn(100), num_steps=2)
        >>> list(result["z"])
        ['prior, prior', 'prior, posterior', 'prior, limiting', 'posterior, limiting']
        >>> result["z"]["prior, posterior"]["accuracy[z]"] > 0.9  # data are far from dreams
        True
    """
    call = sole((args, kwargs))
    features = features or {}
    limiting = LimitingDistribution(model, guide, bind=bind).sample(
        1, Batch(*call[0], **call[1]), num_steps=num_steps, progress=progress
    )
    with torch.no_grad(), buffers_kept():
        dream, twin = (passes.dream(model, call) for _ in range(2))
        guided = passes.fill_in(guide, call, {})
    rows = required_rows([dream.trace, guided])
    data = {name: seen.value for name, seen in dream.observed.items()}
    if unknown := sorted(features.keys() - data.keys()):
        raise ValueError(f"features= names {unknown}; the batch holds {sorted(data)}.")
    latents = passes.drawn(guided)
    found = {}
    for name, value in passes.drawn(dream.trace).items():
        site = dream.trace.variables[name]
        if name in latents:
            sets = {"prior": value, "posterior": latents[name], "limiting": limiting[name][0]}
            form, space = partial(_latents, site, rows), Features(name, torch.nn.Identity())
        elif name in features:
            sets = {"decoder": value, "data": data[name], "limiting": limiting[name][0]}
            form, space = partial(_by_row, site, rows), features[name]
        else:
            continue
        vectors = {kind: space(form(x)) for kind, x in sets.items()}
        found[name] = _compared(vectors, space(form(passes.value(twin.trace, name))), space.name)
    return found


def _by_row(site: Site, rows: Rows, value: Tensor) -> Tensor:
    """The values of a site, in the type of its dreams, with the rows in a first dimension."""
    of = variable(site, rows)
    assert of.dim is not None
    return shaped(value, of.value.shape).to(of.value.dtype).movedim(of.dim, 0)


def _latents(site: Site, rows: Rows, value: Tensor) -> Tensor:
    """The values of a latent by row; classes as one-hot vectors."""
    by_row = _by_row(site, rows, value)
    law, _ = independent_parts(site["fn"])
    if isinstance(law, Categorical):
        return one_hot(by_row.long(), law.probs.shape[-1])
    return by_row


def _compared(sets: Mapping[str, Tensor], twin: Tensor, space: str) -> dict[str, Comparison]:
    """Compares sets of vectors pairwise, the first with another one of its law too."""
    first = next(iter(sets))
    pairs = [(first, first), *combinations(sets, 2)]
    return {
        f"{a}, {b}": _comparison(sets[a], twin if a == b else sets[b], space) for a, b in pairs
    }


def _comparison(a: Tensor, b: Tensor, space: str) -> Comparison:
    accuracy = two_sample_accuracy(a, b)
    return {
        **frechet_distance(a, b, space).as_dict(),
        f"accuracy[{space}]": accuracy.mean,
        f"accuracy[{space}] error": accuracy.error,
    }
