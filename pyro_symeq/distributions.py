r"""Distributions that can be sampled and have no density.

Symmetric learning only draws from a prior that has no parameters, and never differentiates or
evaluates it. So :math:`p(z)` may be a simulator, another trained generator or a box of stored
codes.
"""

from collections.abc import Callable

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

__all__ = ["Implicit"]

Shape = torch.Size | list[int] | tuple[int, ...]


class Implicit(TorchDistribution):
    r"""A distribution given by a sampler alone.

    It stands where nothing is to be learned about the density: at a latent site of the model whose
    law has no parameters. There it adds nothing to :math:`\log p_\theta(x, z)`, which loses only a
    constant in :math:`\theta`. At a site of the guide, or at a data site, a density is needed and
    the utilities refuse it.

    Args:
        sampler: Takes a ``torch.Size`` and returns that many independent draws, as a tensor with
            shape :math:`(*shape, *event\_shape)`.
        event_shape: The shape of a single draw.
        batch_shape: The shape of a batch of independent draws.
        support: Where the draws lie.

    References:
        Symmetric Equilibrium Learning of VAEs (Flach, Schlesinger, Shekhovtsov, 2024), section 3
        after eq. 8. https://arxiv.org/abs/2307.09883

    Example:
        >>> codes = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        >>> def stored(shape):
        ...     return codes[torch.randint(len(codes), shape)]
        >>> Implicit(stored, event_shape=(2,)).sample((5,)).shape
        torch.Size([5, 2])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(
        self,
        sampler: Callable[[torch.Size], Tensor],
        event_shape: Shape = (),
        batch_shape: Shape = (),
        *,
        support: constraints.Constraint = constraints.real,
        validate_args: bool | None = None,
    ) -> None:
        if not callable(sampler):
            raise TypeError(
                "Expected sampler to be a function from a torch.Size to a tensor of draws, "
                f"got {type(sampler).__name__}."
            )
        self.sampler = sampler
        self._support = support
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:  # noqa: D102
        missing = len(self.event_shape) - self._support.event_dim
        return constraints.independent(self._support, missing) if missing > 0 else self._support

    def expand(self, batch_shape: Shape, _instance: Distribution | None = None) -> "Implicit":  # noqa: D102
        return Implicit(
            self.sampler,
            self.event_shape,
            batch_shape,
            support=self._support,
            validate_args=self._validate_args,
        )

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> "Implicit":  # noqa: D102
        batch = len(self.batch_shape)
        n = batch if reinterpreted_batch_ndims is None else reinterpreted_batch_ndims
        return Implicit(
            self.sampler,
            self.batch_shape[batch - n :] + self.event_shape,
            self.batch_shape[: batch - n],
            support=self._support,
            validate_args=self._validate_args,
        )

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        r"""Draws from the sampler.

        Args:
            sample_shape: The number of draws for each element of the batch.

        Returns:
            Draws, with shape :math:`(*sample\_shape, *batch\_shape, *event\_shape)`.

        Raises:
            ValueError: The sampler returned another shape.
        """
        shape = torch.Size(sample_shape) + self.batch_shape
        draws = self.sampler(shape)
        if draws.shape != shape + self.event_shape:
            raise ValueError(
                "Expected the sampler of Implicit to return shape "
                f"{tuple(shape + self.event_shape)} when asked for {tuple(shape)} draws with "
                f"event_shape {tuple(self.event_shape)}, got {tuple(draws.shape)}."
            )
        return draws

    def log_prob(self, value: Tensor) -> Tensor:
        """Raises an error: there is no density.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "An Implicit distribution can be sampled and has no density. It may stand at a "
            "latent site of the model whose law has no parameters; elsewhere use a distribution "
            "with log_prob."
        )
