"""What is not finite, and errors that come of it."""

import traceback
from typing import Any

from torch import Tensor
from torch.distributions import Distribution

from pyro_symeq.tracing import tensors


class NotFiniteError(ValueError):
    """Data, a utility or a gradient that is NaN or infinite."""


def is_of_nonfinite(error: BaseException | None) -> bool:
    """Whether an error says that something is not finite, or comes of it.

    Distributions refuse NaN by errors of several kinds, and samplers by others. It tells that the
    distribution where it came up is made of NaN, or was given a value that is not finite.
    """
    if error is None or isinstance(error, NotFiniteError):
        return error is not None
    frames = (frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(map(_meets_nonfinite, frames)) or is_of_nonfinite(error.__context__)


def _meets_nonfinite(variables: dict[str, Any]) -> bool:
    """Whether a method of a distribution, of these variables, has to do with such a value."""
    law, value = variables.get("self"), variables.get("value")
    if not isinstance(law, Distribution):
        return False
    is_bad = isinstance(value, Tensor) and not value.isfinite().all()
    return bool(is_bad or any(x.isnan().any() for x in tensors(law)))
