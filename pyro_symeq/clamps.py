"""What of the random variables is known, and stays as it is while the rest is drawn."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_symeq import passes
from pyro_symeq.passes import Observation, Observations
from pyro_symeq.rows import Variable
from pyro_symeq.tracing import Site

Values = Mapping[str, Any]  # tensors, or numbers that become tensors


class overlay(Messenger):  # noqa: N801
    """Lays what is known over what was drawn, before later statements see it.

    The handlers that draw stand inside of it.
    """

    def __init__(self, known: Observations) -> None:
        super().__init__()
        self.known = known

    def _pyro_sample(self, msg: Site) -> None:
        known = self.known.get(msg["name"])
        if known is not None:
            msg["value"] = known.over(msg["value"])


def by_site(option: str, values: Any) -> Values:
    """Reads an option that is a dict or ``None``.

    Raises:
        TypeError: It is something else.
    """
    if values is not None and not isinstance(values, Mapping):
        raise TypeError(
            f"Expected {option} to be a dict from sites to tensors, got {type(values).__name__}."
        )
    return values or {}


def clamps(
    variables: Mapping[str, Variable],
    batch: Mapping[str, Tensor],
    given: Values,
    mask: Values,
) -> Observations:
    """What ``given=`` and ``mask=`` say is known, in the shapes of the variables.

    Args:
        variables: The random variables by site.
        batch: Those values of them that the batch holds.
        given: Values by site.
        mask: Which elements of a site are known, if not all.

    Raises:
        TypeError: A mask is not boolean.
        ValueError: They don't fit the variables; the message names the site.
    """
    known = {}
    for name in dict.fromkeys([*given, *mask]):
        if name not in variables:
            raise ValueError(
                f"given= or mask= names the site '{name}'; there are {sorted(variables)}."
            )
        where = _mask(name, mask[name], variables[name]) if name in mask else None
        if name not in given and name not in batch:
            raise ValueError(
                f"The batch holds no value of site '{name}', which mask= names. Give it with "
                "given=."
            )
        value = _value(name, given[name] if name in given else batch[name], variables[name], where)
        known[name] = Observation(value, where)
    return known


def _mask(name: str, mask: Any, of: Variable) -> Tensor | None:
    """A mask in the shape of a variable; ``None`` if it is true everywhere."""
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"Expected the mask of site '{name}' to be a tensor of bool, true where the value is "
            f"known, got {kind}."
        )
    mask = _expanded(f"mask of site '{name}'", mask.to(of.value.device), of)
    return None if mask.all() else mask


def _value(name: str, value: Any, of: Variable, mask: Tensor | None) -> Tensor:
    """A value in the shape and type of a variable, with a draw where it isn't known."""
    given = torch.as_tensor(value, device=of.value.device).detach()
    full = _expanded(f"given value of site '{name}'", given, of)
    if mask is not None:
        full = torch.where(
            mask, full, of.value.to(torch.promote_types(full.dtype, of.value.dtype))
        )
    if is_validation_enabled() and not _may_lie(full, of):
        raise ValueError(
            f"The given value of site '{name}' lies outside the support of its distribution, "
            f"{of.law.support}."
        )
    return full.to(of.value.dtype)


def _expanded(what: str, value: Tensor, of: Variable) -> Tensor:
    try:
        return value.expand(of.value.shape)
    except RuntimeError as error:
        raise ValueError(
            f"The {what} has shape {tuple(value.shape)}, which doesn't broadcast to the shape of "
            f"the site, {tuple(of.value.shape)}."
        ) from error


def _may_lie(value: Tensor, of: Variable) -> bool:
    """Whether a value lies in the support of a variable, unless other draws have another."""
    with suppress(NotImplementedError):
        return _has_tensors(of.law.support) or passes.in_support(of.law, value)
    return True


def _has_tensors(support: Any) -> bool:
    """Whether a support has bounds of its own in each draw."""
    parts = vars(support).values()
    return any(
        isinstance(x, Tensor) or (isinstance(x, Constraint) and _has_tensors(x)) for x in parts
    )
