r"""What all pairs of the benchmarks have in common: Pyro programs, and the same game by hand.

The latents :math:`z` and the data :math:`x` are binary, the decoder is
:math:`p_\theta(x, z)` with a uniform prior, and the encoder :math:`q_\varphi(z \mid x)`. A pair is
written twice: as a Pyro model and guide, and as the losses :math:`-L_p` and :math:`-L_q` of a loop
in plain PyTorch, with the same networks and the same draws in the same order.
"""

from abc import ABC, abstractmethod

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

__all__ = ["Pair", "binary", "code", "cross_entropy", "draw"]


class Pair(nn.Module, ABC):
    """A decoder and an encoder with binary latents.

    Args:
        name: Tells the parameters of several pairs apart in Pyro's parameter store.
        decoder: The networks of the decoder.
        encoder: The networks of the encoder.
    """

    num_pixels: int

    def __init__(self, name: str, decoder: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.decoder = decoder
        self.encoder = encoder
        self.temperature: float | None = None

    def bits(self, logits: Tensor) -> TorchDistribution:
        """The distribution of latent bits, relaxed if there is a temperature."""
        if self.temperature is None:
            return binary(logits)
        temperature = logits.new_tensor(self.temperature)
        relaxed = dist.RelaxedBernoulliStraightThrough(temperature, logits=logits)
        return relaxed.to_event(1)

    @abstractmethod
    def model(self, x: Tensor) -> None:
        """The decoder's program, for data with shape :math:`(*, N, D)`."""

    @abstractmethod
    def guide(self, x: Tensor) -> None:
        """The encoder's program, for data with shape :math:`(*, N, D)`."""

    @abstractmethod
    def decoder_loss(self, x: Tensor) -> Tensor:
        """By hand, a draw of -L_p (nats) for data with shape :math:`(N, D)`."""

    @abstractmethod
    def encoder_loss(self, num_rows: int) -> Tensor:
        """By hand, a draw of -L_q (nats) with as many dreams."""


def binary(logits: Tensor) -> TorchDistribution:
    """Independent binary variables along the last dimension."""
    return dist.Bernoulli(logits=logits).to_event(1)


def code(bits: Tensor) -> Tensor:
    """Bits as networks see them, -1 and +1."""
    return 2 * bits - 1


def draw(logits: Tensor) -> Tensor:
    """Draws bits by hand.

    This is the function that Pyro draws with, so that a seed gives both the same bits. On CPUs,
    ``torch.rand_like(p) < p`` draws other bits of the same law two to three times as fast.
    """
    return torch.bernoulli(logits.sigmoid())


def cross_entropy(logits: Tensor, bits: Tensor) -> Tensor:
    """By hand, the negative log-probability of bits (nats), summed."""
    return binary_cross_entropy_with_logits(logits, bits, reduction="sum")
