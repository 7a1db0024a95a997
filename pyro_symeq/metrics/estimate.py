"""Estimates with their standard errors."""

import math
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Estimate"]


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error.

    Args:
        mean: The mean.
        error: Its standard error; NaN where a single value doesn't tell.

    Example:
        >>> estimate = Estimate.of(torch.tensor([1.0, 2.0, 3.0]))
        >>> print(estimate, f"{estimate:6.3f}")
        2.00 ± 0.58  2.000 ± 0.577
    """

    mean: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> "Estimate":
        """The mean of independent values.

        Args:
            values: The values, with shape :math:`(N)`.
        """
        num = len(values)
        error = values.std().item() / math.sqrt(num) if num > 1 else math.nan
        return cls(values.mean().item(), error)

    def __format__(self, spec: str) -> str:
        spec = spec or ".2f"
        return f"{self.mean:{spec}} ± {format(self.error, spec).strip()}"

    def __str__(self) -> str:
        return format(self)
