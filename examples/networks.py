r"""A labelled ladder: a hierarchical VAE with binary latents whose encoder leans on its decoder.

The latents are :math:`z_0 = (s, y)`, style bits and a one-hot class, and bits :math:`z_1`. The
decoder draws images :math:`x` of binary pixels from

.. math::
    p_\theta(x, z) = p(s) \, p(y) \, p_\theta(z_1 \mid s, y) \, p_\theta(x \mid z_1)

with uniform :math:`p(s)` and :math:`p(y)`. The encoder is a ladder (eqs. 9 and 10 of Flach,
Schlesinger, Shekhovtsov, 2024): :math:`s` and :math:`y` are independent given :math:`x`, and a
function :math:`f_\varphi(x)` of the image adds to the decoder's logits of :math:`z_1`,

.. math::
    q_\varphi(z \mid x)
        &= q_\varphi(s \mid x) \, q_\varphi(y \mid x) \, q_{\theta,\varphi}(z_1 \mid s, y, x), \\
    q_{\theta,\varphi}(z_1 \mid s, y, x)
        &\propto p_\theta(z_1 \mid s, y) \, \exp \langle f_\varphi(x), z_1 \rangle.

Networks see bits as -1 and +1, and a class with its one-hot vector scaled to weigh as much as ten
bits. Their logits are as precise as what they see, also where autocast makes layers less so.
"""

from itertools import pairwise

import pyro
import pyro.distributions as dist
from torch import Tensor, cat, nn

from layers import convolution, dense, linear

__all__ = ["LadderVAE"]

NUM_CLASSES = 10


def _halving(num_inputs: int, num_outputs: int) -> nn.Module:
    """A convolution after which an image has half as many rows and columns."""
    return convolution(num_inputs, num_outputs, 4, stride=2, padding=1)


def _doubling(num_inputs: int, num_outputs: int) -> nn.Module:
    """A convolution after which an image has twice as many rows and columns."""
    layer = nn.ConvTranspose2d(num_inputs, num_outputs, 4, stride=2, padding=1)
    nn.init.normal_(layer.weight, std=(4 * num_inputs) ** -0.5)  # 2 x 2 inputs reach an output
    nn.init.zeros_(layer.get_parameter("bias"))
    return layer


class Decoder(nn.Module):
    """The networks of the decoder.

    Args:
        side: The number of rows, and of columns, of an image.
        num_styles: The number of style bits.
        num_units: The number of bits of z1.
        width: The number of hidden units of a layer.
        num_channels: The number of channels before the last convolution, with twice as many before
            the one that precedes it; without channels, a dense layer leads to the pixels.
    """

    def __init__(
        self, side: int, num_styles: int, num_units: int, width: int, num_channels: int | None
    ) -> None:
        super().__init__()
        self.units = dense(num_styles + NUM_CLASSES, width, num_units)
        if num_channels is None:
            self.pixels = dense(num_units, width, side**2)
        else:
            self.pixels = nn.Sequential(
                dense(num_units, width, 2 * num_channels * (side // 4) ** 2),
                nn.SiLU(),
                nn.Unflatten(1, (2 * num_channels, side // 4, side // 4)),
                _doubling(2 * num_channels, num_channels),
                nn.SiLU(),
                _doubling(num_channels, 1),
                nn.Flatten(),
            )

    def z1(self, style: Tensor, y: Tensor) -> Tensor:
        """The logits of p(z1 | style, y)."""
        return self.units(cat([2 * style - 1, NUM_CLASSES**0.5 * y], dim=-1)).to(style.dtype)

    def x(self, z1: Tensor) -> Tensor:
        """The logits of p(x | z1)."""
        return self.pixels(2 * z1 - 1).to(z1.dtype)


class Encoder(nn.Module):
    """The networks of the encoder.

    Args:
        side: The number of rows, and of columns, of an image.
        num_styles: The number of style bits.
        num_units: The number of bits of z1.
        width: The number of hidden units of a layer.
        num_channels: The number of channels of the first convolution; the second has twice as
            many.
        num_layers: The number of hidden layers of that width.
    """

    def __init__(
        self,
        side: int,
        num_styles: int,
        num_units: int,
        width: int,
        num_channels: int,
        num_layers: int,
    ) -> None:
        super().__init__()
        sizes = [2 * num_channels * (side // 4) ** 2, *[width] * num_layers]
        self.features = nn.Sequential(
            nn.Unflatten(1, (1, side, side)),
            _halving(1, num_channels),
            nn.SiLU(),
            _halving(num_channels, 2 * num_channels),
            nn.SiLU(),
            nn.Flatten(),
        )
        for num_inputs, num_outputs in pairwise(sizes):
            self.features.extend([linear(num_inputs, num_outputs), nn.SiLU()])
        self.style = linear(width, num_styles)
        self.y = linear(width, NUM_CLASSES)
        self.z1 = linear(width, num_units)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The logits of q(style | x) and q(y | x), and what x adds to the logits of z1."""
        features = self.features(2 * x - 1)
        style, y, z1 = (head(features).to(x.dtype) for head in (self.style, self.y, self.z1))
        return style, y, z1


class LadderVAE(nn.Module):
    """The pair of programs.

    Args:
        side: The number of rows, and of columns, of an image.
        num_styles: The number of style bits.
        num_units: The number of bits of z1.
        width: The number of hidden units of a layer.
        num_channels: The number of channels of the decoder, if it has convolutions.
        encoder_channels: The number of channels of the encoder's first convolution.
        encoder_layers: The number of hidden layers of that width in the encoder.
    """

    def __init__(
        self,
        side: int,
        num_styles: int,
        num_units: int,
        width: int,
        num_channels: int | None,
        encoder_channels: int = 16,
        encoder_layers: int = 1,
    ) -> None:
        super().__init__()
        self.num_styles = num_styles
        self.decoder = Decoder(side, num_styles, num_units, width, num_channels)
        self.encoder = Encoder(
            side, num_styles, num_units, width, encoder_channels, encoder_layers
        )

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        """The decoder's program.

        Args:
            x: Images, with shape :math:`(N, D)`.
            y: Their classes, with shape :math:`(N, 10)`, if they are known.
        """
        pyro.module("decoder", self.decoder)
        with pyro.plate("images", len(x)):
            style = pyro.sample("style", bits(x.new_zeros(self.num_styles)))
            y = pyro.sample(
                "class", dist.OneHotCategorical(logits=x.new_zeros(NUM_CLASSES)), obs=y
            )
            z1 = pyro.sample("z1", bits(self.decoder.z1(style, y)))
            pyro.sample("x", bits(self.decoder.x(z1)), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """The encoder's program; it leaves what is known of the class to the decoder.

        Args:
            x: Images, with shape :math:`(N, D)`.
            y: Their classes, with shape :math:`(N, 10)`, if they are known.
        """
        pyro.module("encoder", self.encoder)
        with pyro.plate("images", len(x)):
            style_logits, y_logits, z1_logits = self.encoder(x)
            style = pyro.sample("style", bits(style_logits))
            y = pyro.sample("class", dist.OneHotCategorical(logits=y_logits))
            pyro.sample("z1", bits(self.decoder.z1(style, y) + z1_logits))


def bits(logits: Tensor) -> dist.Independent:
    """Independent binary variables along the last dimension."""
    return dist.Bernoulli(logits=logits).to_event(1)
