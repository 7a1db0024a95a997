"""Convolutional networks from maps to bits, from bits to maps, and from both to maps.

A map has some channels for each pixel of an image; bits are a vector of -1 and +1. The networks
work at a quarter of the image's resolution and below, where the channels of a place tell of its
4x4 pixels.
"""

from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import silu

from layers import convolution, linear

__all__ = ["Decoder", "Encoder", "Hourglass"]

FINEST, COARSEST = 4, 16  # how many rows of pixels make up a row of the finest and coarsest maps


def _widths(width: int) -> list[int]:
    """The numbers of channels at a quarter, an eighth and a sixteenth of the resolution."""
    return [width, 2 * width, 2 * width]


def _entry(channels: int, width: int) -> nn.Module:
    """From pixels to the finest maps."""
    return convolution(channels, width, 2 * FINEST, stride=FINEST, padding=FINEST // 2)


def _exit(width: int, channels: int) -> nn.Module:
    """From the finest maps to pixels."""
    return nn.Sequential(convolution(width, FINEST**2 * channels, 3), nn.PixelShuffle(FINEST))


def _halving(num_inputs: int, num_outputs: int) -> nn.Module:
    """A layer after which a map has half as many rows and columns."""
    return convolution(num_inputs, num_outputs, 4, stride=2, padding=1)


def _doubling(num_inputs: int, num_outputs: int) -> nn.Module:
    """A layer after which a map has twice as many rows and columns."""
    return nn.Sequential(convolution(num_inputs, 4 * num_outputs, 1), nn.PixelShuffle(2))


def _from_bits(bits: int, width: int, side: int) -> nn.Module:
    """From bits to the coarsest maps."""
    rows = side // COARSEST
    return nn.Sequential(linear(bits, width * rows**2), nn.Unflatten(1, (width, rows, rows)))


class Encoder(nn.Module):
    """A network from a map to logits of bits.

    Args:
        side: The number of rows, and of columns, of an image; a multiple of 16.
        channels: The number of channels of the map.
        bits: The number of logits.
        width: The number of channels at a quarter of the resolution.
    """

    def __init__(self, side: int, channels: int, bits: int, width: int) -> None:
        super().__init__()
        widths = _widths(width)
        self.layers = nn.Sequential(_entry(channels, width))
        for fine, coarse in pairwise(widths):
            self.layers.extend([nn.SiLU(), _halving(fine, coarse)])
        num_features = widths[-1] * (side // COARSEST) ** 2
        self.layers.extend([nn.SiLU(), nn.Flatten(), linear(num_features, bits)])

    def forward(self, x: Tensor) -> Tensor:
        """The logits of bits, given maps with shape :math:`(N, C, H, H)`."""
        return self.layers(x)


class Decoder(nn.Module):
    """A network from bits to a map.

    Args:
        side: The number of rows, and of columns, of an image; a multiple of 16.
        bits: The number of bits.
        channels: The number of channels of the map.
        width: The number of channels at a quarter of the resolution.
    """

    def __init__(self, side: int, bits: int, channels: int, width: int) -> None:
        super().__init__()
        widths = _widths(width)[::-1]
        self.layers = nn.Sequential(_from_bits(bits, widths[0], side))
        for coarse, fine in pairwise(widths):
            self.layers.extend([nn.SiLU(), _doubling(coarse, fine)])
        self.layers.extend([nn.SiLU(), _exit(width, channels)])

    def forward(self, bits: Tensor) -> Tensor:
        """Maps with shape :math:`(N, C, H, H)`, given bits."""
        return self.layers(bits)


class Hourglass(nn.Module):
    """A network from a map and bits to a map, with links between equal resolutions.

    Args:
        side: The number of rows, and of columns, of an image; a multiple of 16.
        channels_in: The number of channels of the map that comes in.
        bits: The number of bits.
        channels_out: The number of channels of the map that comes out.
        width: The number of channels at a quarter of the resolution.
    """

    def __init__(
        self, side: int, channels_in: int, bits: int, channels_out: int, width: int
    ) -> None:
        super().__init__()
        widths = _widths(width)
        self.entry = _entry(channels_in, width)
        self.down = nn.ModuleList(_halving(*pair) for pair in pairwise(widths))
        self.bits = _from_bits(bits, widths[-1], side)
        self.up = nn.ModuleList(_doubling(*pair) for pair in pairwise(widths[::-1]))
        self.exit = _exit(width, channels_out)

    def forward(self, x: Tensor, bits: Tensor) -> Tensor:
        """Maps with shape :math:`(N, C', H, H)`, given maps and bits."""
        maps = [self.entry(x)]
        for layer in self.down:
            maps.append(layer(silu(maps[-1])))
        y = maps.pop() + self.bits(bits)
        for layer in self.up:
            y = maps.pop() + layer(silu(y))
        return self.exit(silu(y))

    def start_at_zero(self) -> None:
        """Lets the maps that come out be zero at first."""
        for parameter in self.exit.parameters():
            nn.init.zeros_(parameter)
