"""Batches of different kinds, which make up one step together."""

import math
from typing import Any

from pyro_symeq.binding import Call

__all__ = ["Batch"]


class Batch:
    r"""What model and guide take, as one of several parts of a step.

    Parts may observe different sites. The utilities of a step on batches :math:`b` with weights
    :math:`w_b` are the sums :math:`\sum_b w_b L_p^{(b)}` and :math:`\sum_b w_b L_q^{(b)}`.

    Args:
        args: The arguments of model and guide.
        kwargs: Their keyword arguments.

    Example:
        >>> x, y, unlabelled = torch.zeros(2, 3), torch.eye(2), torch.zeros(5, 3)
        >>> Batch(x, y=y).weighted(10.0), Batch(unlabelled)
        (Batch(Tensor, y=Tensor).weighted(10.0), Batch(Tensor))
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.call: Call = (args, kwargs)
        self.weight = 1.0

    def weighted(self, weight: float) -> "Batch":
        """The same batch with another weight.

        Args:
            weight: How much its utilities count.

        Raises:
            TypeError: The weight is no number.
            ValueError: The weight is negative or not finite.
        """
        if not hasattr(weight, "__float__"):
            raise TypeError(f"Expected a number as the weight, got {type(weight).__name__}.")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"Expected a finite weight of at least 0, got {weight!r}.")
        args, kwargs = self.call
        batch = Batch(*args, **kwargs)
        batch.weight = float(weight)
        return batch

    def __repr__(self) -> str:
        args, kwargs = self.call
        arguments = [type(value).__name__ for value in args]
        arguments += [f"{name}={type(value).__name__}" for name, value in kwargs.items()]
        weight = "" if self.weight == 1 else f".weighted({self.weight})"
        return f"Batch({', '.join(arguments)}){weight}"


def batches(call: Call) -> list[Batch]:
    """The parts of a step; plain arguments are a single one.

    Raises:
        TypeError: Batches are mixed with plain arguments, or come in a container.
    """
    args, kwargs = call
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Batch):
            raise TypeError(
                f"Expected the batches of a step one by one, got a {type(value).__name__} of them. "
                "Give them as step(Batch(...), Batch(...)), or step(*batches)."
            )
    are_batches = [isinstance(value, Batch) for value in (*args, *kwargs.values())]
    if not any(are_batches):
        return [Batch(*args, **kwargs)]
    if kwargs or not all(are_batches):
        raise TypeError(
            "Expected either the arguments of model and guide, or one Batch or several and "
            "nothing else. Put all arguments into batches: Batch(x, y=y)."
        )
    return list(args)


def sole(call: Call) -> Call:
    """The arguments in a single batch; plain arguments are those.

    Raises:
        TypeError: Batches are mixed with plain arguments, or come in a container.
        ValueError: There are several, or the batch has a weight.
    """
    first, *others = batches(call)
    if others:
        raise ValueError(f"Expected one Batch at most, got {1 + len(others)}.")
    if first.weight != 1:
        raise ValueError(f"Expected a Batch without a weight, which means nothing here: {first}.")
    return first.call
