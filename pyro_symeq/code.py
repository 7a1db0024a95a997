r"""A code for the data that an encoder makes up itself.

Latents :math:`z_1, \dots, z_N` of a dream are dealt out to the rows :math:`x_1, \dots, x_N` of a
batch. Each latent variable is dealt out alone: its largest value goes to the row whose score is
largest, and so on down. The scores are the means that the encoder gives to the variable,
decorrelated in part over the rows, so that variables say different things. All depends on the row
as much as it can, then, be the scores ever so small; and the values still are draws of the prior.

Latents that are continuous have no code. An encoder that learns one gives them next to no variance,
and the pair may diverge long after.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical

from pyro_symeq.informing import independent_parts
from pyro_symeq.rows import Rows
from pyro_symeq.tracing import Site

DECORRELATION = 0.75  # from 0: scores as they are, to 1: no two of them correlated


class hold:  # noqa: N801
    """Gives sites the values of a dream, those of its first row in all rows.

    What a guide then makes of a row is due to its data, and not to latents drawn before.

    Args:
        values: The values by site.
        rows: Where the rows lie.
    """

    def __init__(self, values: Mapping[str, Tensor], rows: Rows) -> None:
        self.values = values
        self.rows = rows

    def __call__(self, msg: Site) -> None:  # noqa: D102
        value = self.values.get(msg["name"])
        if msg["value"] is None and value is not None:
            dim = self.rows.dim - msg["fn"].event_dim
            msg["value"] = value.narrow(dim, 0, 1).expand(value.shape)
            msg["done"] = True


def is_dealt(law: Any) -> bool:
    """Whether a latent with such a distribution has a code: whether it is discrete."""
    return bool(independent_parts(law)[0].has_enumerate_support)


def deal(values: Mapping[str, Tensor], laws: Mapping[str, Any], rows: Rows) -> dict[str, Tensor]:
    """Deals values out to rows, in the order of the means that laws give to the rows.

    Args:
        values: Values by site.
        laws: Distributions of the same sites, of the same shapes.
        rows: Where the rows lie.

    Returns:
        The values in their new places; sites whose distribution has no mean are left out.
    """
    means = {name: mean for name, law in laws.items() if (mean := _mean(law)) is not None}
    if not means:
        return {}
    device = next(iter(means.values())).device
    with torch.autocast(device.type, enabled=False):  # eigenvalues need more than bfloat16
        scores = [_by_variable(mean, laws[name], rows) for name, mean in means.items()]
        decorrelated = _decorrelated(torch.cat(scores)).split([len(x) for x in scores])
        return {
            name: _dealt(values[name], order, laws[name], rows)
            for name, order in zip(means, decorrelated, strict=True)
        }


def _mean(law: Any) -> Tensor | None:
    part, _ = independent_parts(law)
    try:
        return (part.probs @ _ramp(part.probs)) if isinstance(part, Categorical) else part.mean
    except NotImplementedError:
        return None


def _by_variable(value: Tensor, law: Any, rows: Rows) -> Tensor:
    """One number for each independent variable and row, with shape :math:`(J, N)`."""
    value = torch.nan_to_num(value.float())
    part, num_dims = independent_parts(law)
    for _ in range(part.event_dim):
        value = value @ _ramp(value)
    return value.movedim(rows.dim - num_dims, -1).reshape(-1, rows.size)


def _ramp(value: Tensor) -> Tensor:
    """The direction along which vectors are ordered: one-hot ones by their category."""
    return torch.arange(value.shape[-1], device=value.device).to(value)


def _decorrelated(scores: Tensor) -> Tensor:
    r"""Shrinks the differences between the variances of the principal components of scores.

    For scores :math:`U S V^T`, centred and of unit variance, it is :math:`U S^{1 - d} V^T`.
    """
    tiny = torch.finfo(scores.dtype).tiny
    centred = scores - scores.mean(1, keepdim=True)
    scaled = centred / centred.square().mean(1, keepdim=True).sqrt().clamp(min=tiny)
    x = scaled if len(scores) < scores.shape[1] else scaled.T
    variances, components = torch.linalg.eigh(x @ x.T)
    least = (1e-6 * variances[-1]).clamp(min=tiny)
    x = (components * variances.clamp(min=least).pow(-DECORRELATION / 2)) @ (components.T @ x)
    return x if len(scores) < scores.shape[1] else x.T


def _dealt(value: Tensor, scores: Tensor, law: Any, rows: Rows) -> Tensor:
    part, num_dims = independent_parts(law)
    source = torch.empty_like(scores, dtype=torch.long)
    source.scatter_(1, scores.argsort(1), _by_variable(value, law, rows).argsort(1))
    dim = rows.dim - num_dims - part.event_dim
    ones = (1,) * part.event_dim
    moved = value.movedim(dim, 0)
    index = source.T.reshape(moved.shape[: moved.dim() - part.event_dim] + ones)
    return moved.gather(0, index.expand(moved.shape)).movedim(0, dim)
