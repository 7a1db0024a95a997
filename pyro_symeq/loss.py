"""What a step returns: a loss that carries the utilities of the players."""

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from numbers import Real
from typing import Any, TypeVar, cast

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["GameLoss", "SymmetricLoss"]

Loss = TypeVar("Loss", bound="GameLoss")


class GameLoss(float):
    r"""The loss :math:`-\sum_i u_i` of a step, a float that carries the utilities (nats).

    Args:
        utilities: The utilities :math:`u_i` by the names of the players.

    Example:
        >>> loss = GameLoss({"image": -7.0, "segmentation": -2.0, "encoder": -1.0})
        >>> loss, loss.utilities["image"]
        (10.0, -7.0)
    """

    utilities: dict[str, float]

    def __new__(cls: type[Loss], utilities: Mapping[str, float]) -> Loss:  # noqa: D102
        if isinstance(utilities, Real):  # `statistics` makes means of losses by their type
            return cast(Loss, float(utilities))
        loss = super().__new__(cls, -sum(utilities.values()))
        loss.utilities = dict(utilities)
        return loss

    def __getnewargs__(self) -> tuple[dict[str, float]]:  # type: ignore[override]
        return (self.utilities,)

    @classmethod
    def of(cls: type[Loss], utilities: Mapping[str, float]) -> Loss:
        """The loss of these utilities."""
        return cls(utilities)


class SymmetricLoss(GameLoss):
    r"""The loss :math:`-(L_p + L_q)` of a step, a float that carries both utilities (nats).

    Args:
        decoder: The decoder's utility :math:`L_p`.
        encoder: The encoder's utility :math:`L_q`.

    Attributes:
        information: Where the step looked: what each latent says about the batch (bits), by site.

    Example:
        >>> loss = SymmetricLoss(decoder=-7.0, encoder=-2.0)
        >>> loss, loss.decoder, loss + 1
        (9.0, -7.0, 10.0)
    """

    information: dict[str, Tensor] | None = None

    def __new__(cls, decoder: float, encoder: float | None = None) -> "SymmetricLoss":  # noqa: D102
        if encoder is None:
            return super().__new__(cls, decoder)  # type: ignore[arg-type]
        return super().__new__(cls, {"decoder": decoder, "encoder": encoder})

    def __getnewargs__(self) -> tuple[float, float]:  # type: ignore[override]
        return self.decoder, self.encoder

    @classmethod
    def of(cls, utilities: Mapping[str, float]) -> "SymmetricLoss":  # noqa: D102
        return cls(**utilities)

    @property
    def decoder(self) -> float:  # noqa: D102
        return self.utilities["decoder"]

    @property
    def encoder(self) -> float:  # noqa: D102
        return self.utilities["encoder"]


def loss_of(kind: type[Loss], utilities: Mapping[str, Tensor], is_awaited: bool) -> Loss:
    """The loss of utilities, read at once if it is awaited or nobody has to wait."""
    if all(utility.device.type == "cpu" for utility in utilities.values()):
        return kind.of({name: utility.item() for name, utility in utilities.items()})
    pending = PendingLoss(kind, utilities)
    return cast(Loss, pending.read() if is_awaited else pending)


class PendingLoss:
    """A loss that is read from the device when somebody looks at it.

    It passes for the loss that it will be: ``isinstance`` says so, and whatever is done with it as
    with a float reads it. Where floats are taken apart without asking Python, as by ``json``, give
    ``float(loss)``.

    Args:
        kind: The class of the loss.
        utilities: The utilities by the names of the players, scalars on a device.

    Raises:
        ValueError: A utility is not finite. This comes when the loss is read.
    """

    def __init__(self, kind: type[GameLoss], utilities: Mapping[str, Tensor]) -> None:
        self._kind = kind
        self._utilities = dict(utilities)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self._kind

    def read(self) -> GameLoss:
        """Waits for the device."""
        return self._loss

    @cached_property
    def _loss(self) -> GameLoss:
        utilities = {name: utility.item() for name, utility in self._utilities.items()}
        if not all(map(math.isfinite, utilities.values())):
            raise ValueError(
                f"Expected finite utilities, got {utilities}. This was seen when the loss was "
                "read: with validation off, nobody waits for the device. Players with fused "
                "optimisers have stayed where they were. To stop at such a batch, and to be told "
                "the sites, turn on pyro.enable_validation()."
            )
        return self._kind.of(utilities)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loss, name)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return np.array(float(self._loss), *args, **kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def read(x: Any) -> Any:
            return float(x) if type(x) is PendingLoss else x

        return func(*tree_map(read, args), **tree_map(read, kwargs or {}))

    def __reduce__(self) -> Any:
        return self._kind.of, (self._loss.utilities,)


def _read_first(name: str) -> Callable[..., Any]:
    def method(self: PendingLoss, *args: Any) -> Any:
        others = [x._loss if type(x) is PendingLoss else x for x in args]
        return getattr(self._loss, name)(*others)

    return method


for _name in (
    "abs add bool ceil divmod eq float floor floordiv format ge gt hash int le lt mod mul ne neg "
    "pos pow radd rdivmod repr rfloordiv rmod rmul round rpow rsub rtruediv str sub truediv trunc"
).split():
    setattr(PendingLoss, f"__{_name}__", _read_first(f"__{_name}__"))
