"""What a step returns: a loss that carries the utilities of the players."""

from collections.abc import Mapping
from typing import TypeVar

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
        loss = super().__new__(cls, -sum(utilities.values()))
        loss.utilities = dict(utilities)
        return loss

    def __getnewargs__(self) -> tuple[dict[str, float]]:  # type: ignore[override]
        return (self.utilities,)


class SymmetricLoss(GameLoss):
    r"""The loss :math:`-(L_p + L_q)` of a step, a float that carries both utilities (nats).

    Args:
        decoder: The decoder's utility :math:`L_p`.
        encoder: The encoder's utility :math:`L_q`.

    Example:
        >>> loss = SymmetricLoss(decoder=-7.0, encoder=-2.0)
        >>> loss, loss.decoder, loss + 1
        (9.0, -7.0, 10.0)
    """

    def __new__(cls, decoder: float, encoder: float) -> "SymmetricLoss":  # noqa: D102
        return super().__new__(cls, {"decoder": decoder, "encoder": encoder})

    def __getnewargs__(self) -> tuple[float, float]:  # type: ignore[override]
        return self.decoder, self.encoder

    @property
    def decoder(self) -> float:  # noqa: D102
        return self.utilities["decoder"]

    @property
    def encoder(self) -> float:  # noqa: D102
        return self.utilities["encoder"]
