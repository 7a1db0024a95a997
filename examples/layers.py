"""Layers whose outputs have unit variance at the start, so that dreams depend on all latents.

With PyTorch's smaller initial weights, dreams of the untrained decoder hardly depend on its
latents, the encoder finds nothing to learn, and the pair gets stuck there.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["ChannelsLast", "convolution", "dense", "linear"]

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


class ChannelsLast(nn.Module):
    """Lays images out as the convolutions of a GPU want them, and leaves others as they are.

    The layers that follow keep to it. It doesn't help before the first convolution of an image of
    one channel, or of one pixel, which is laid out in both ways at once.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps images to the same images."""
        return x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x


def linear(num_inputs: int, num_outputs: int) -> nn.Linear:
    """An affine layer that turns inputs of unit variance into outputs of unit variance."""
    return _unit_variance(nn.Linear(num_inputs, num_outputs))


def dense(num_inputs: int, width: int, num_outputs: int) -> nn.Module:
    """Two affine layers with a smooth activation between them."""
    return nn.Sequential(linear(num_inputs, width), nn.SiLU(), linear(width, num_outputs))


def convolution(
    num_inputs: int, num_outputs: int, size: int, stride: int = 1, padding: int | None = None
) -> nn.Conv2d:
    """A convolution that turns inputs of unit variance into outputs of unit variance.

    Args:
        num_inputs: The number of channels that come in.
        num_outputs: The number of channels that come out.
        size: The number of rows, and of columns, of the kernel.
        stride: How many rows and columns the kernel moves.
        padding: The number of rows and columns added at each side; by default, half the size.
    """
    padding = size // 2 if padding is None else padding
    return _unit_variance(nn.Conv2d(num_inputs, num_outputs, size, stride, padding))


def _unit_variance(layer: Layer) -> Layer:
    nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
    nn.init.zeros_(layer.get_parameter("bias"))
    return layer
