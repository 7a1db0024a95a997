r"""A hierarchical VAE with two layers of binary latents, 30 bits z0 and 100 bits z1.

The decoder draws from the top,

.. math:: p_\theta(x, z) = p(z_0) \, p_\theta(z_1 \mid z_0) \, p_\theta(x \mid z_1),

with a uniform :math:`p(z_0)`. The encoder has one of two factorisations. A *ladder* goes the same
way and leans on the decoder: a function :math:`f_\varphi(x)` of the image adds to the decoder's
logits of :math:`z_1` (eqs. 9 and 10 of Flach, Schlesinger, Shekhovtsov, 2024),

.. math::
    q(z \mid x) = q_\varphi(z_0 \mid x) \, q_{\theta,\varphi}(z_1 \mid z_0, x), \qquad
    q_{\theta,\varphi}(z_1 \mid z_0, x)
        \propto p_\theta(z_1 \mid z_0) \, \exp \langle f_\varphi(x), z_1 \rangle.

In *reverse*, as in a Helmholtz machine, it goes from the image up,

.. math:: q(z \mid x) = q_\varphi(z_1 \mid x) \, q_\varphi(z_0 \mid z_1).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from layers import ChannelsLast

__all__ = ["DEEP", "FACTORISATIONS", "HVAE", "STYLES", "Size", "Style"]

NUM_TOP, NUM_UNITS = 30, 100
Latent = type[dist.Bernoulli]
AFFINE = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


@dataclass(frozen=True)
class Style:
    """What all networks of a pair have in common.

    Args:
        activation: Makes what stands between affine layers.
        is_centred: Whether networks see bits as -1 and +1, and not as 0 and 1.
        has_unit_variance: Whether affine layers turn inputs of unit variance into outputs of unit
            variance at the start, and don't have PyTorch's smaller initial weights.
    """

    activation: Callable[[], nn.Module]
    is_centred: bool
    has_unit_variance: bool


STYLES = {
    "tanh": Style(nn.Tanh, is_centred=False, has_unit_variance=False),
    "silu": Style(nn.SiLU, is_centred=True, has_unit_variance=True),
}


@dataclass(frozen=True)
class Size:
    """How large the networks are.

    Args:
        width: The number of hidden units of a dense layer.
        num_channels: The number of channels next to the image, with twice as many one convolution
            further; 0 stands for the four convolutions of :data:`DEEP`.
    """

    width: int
    num_channels: int


DEEP = Size(width=256, num_channels=0)  # 2.2 and 0.8 million parameters, for 28x28 pixels


class Network(nn.Sequential):
    """Affine layers with activations between them, from bits to logits.

    Args:
        style: What networks have in common.
        layers: Affine layers, and what shapes their inputs.
    """

    def __init__(self, style: Style, *layers: nn.Module) -> None:
        *hidden, last = (layer for layer in layers if isinstance(layer, AFFINE))
        super().__init__()
        if style.is_centred:
            self.append(_Centred())
        for layer in layers:
            self.append(layer)
            if layer in hidden:
                self.append(style.activation())
        if style.has_unit_variance:
            for layer in (*hidden, last):
                _start_with_unit_variance(layer)

    def forward(self, bits: Tensor) -> Tensor:
        """Maps bits, with shape :math:`(*, N, D)`, to logits, with shape :math:`(*, N, E)`.

        Logits are as precise as bits are, also where autocast makes layers less so.
        """
        rows = bits.flatten(0, -2)
        return super().forward(rows).to(bits.dtype).flatten(1).unflatten(0, bits.shape[:-1])


class _Centred(nn.Module):
    def forward(self, bits: Tensor) -> Tensor:
        return 2 * bits - 1


def _start_with_unit_variance(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d) -> None:
    if isinstance(layer, nn.ConvTranspose2d):
        kernel = layer.weight[0, 0].numel() / (layer.stride[0] * layer.stride[1])
        num_inputs = layer.in_channels * kernel
    else:
        num_inputs = layer.weight[0].numel()
    nn.init.normal_(layer.weight, std=num_inputs**-0.5)
    nn.init.zeros_(layer.get_parameter("bias"))


def _from_image(side: int, size: Size) -> list[nn.Module]:
    """Layers from an image to hidden units."""
    image = nn.Unflatten(1, (1, side, side))
    if size == DEEP:
        return [
            image,
            nn.Conv2d(1, 32, 4, stride=2, padding=1),
            ChannelsLast(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),
            nn.Conv2d(64, 224, 3, stride=2, padding=1),
            nn.Conv2d(224, 512, 4),
            nn.Flatten(),
            nn.Linear(512, size.width),
        ]
    num_channels, quarter = size.num_channels, side // 4
    return [
        image,
        nn.Conv2d(1, num_channels, 4, stride=2, padding=1),
        nn.Conv2d(num_channels, 2 * num_channels, 4, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(2 * num_channels * quarter**2, size.width),
    ]


def _to_image(side: int, size: Size) -> list[nn.Module]:
    """Layers from the bits z1 to an image."""
    if size == DEEP:
        return [
            nn.Unflatten(1, (NUM_UNITS, 1, 1)),
            nn.ConvTranspose2d(NUM_UNITS, 256, 4),
            ChannelsLast(),
            nn.ConvTranspose2d(256, 96, 3, stride=2, padding=1),
            nn.ConvTranspose2d(96, 64, 4, stride=2, padding=1),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
            nn.Conv2d(32, 1, 3, padding=1),
        ]
    num_channels, quarter = size.num_channels, side // 4
    return [
        nn.Linear(NUM_UNITS, 2 * num_channels * quarter**2),
        nn.Unflatten(1, (2 * num_channels, quarter, quarter)),
        nn.ConvTranspose2d(2 * num_channels, num_channels, 4, stride=2, padding=1),
        nn.ConvTranspose2d(num_channels, 1, 4, stride=2, padding=1),
    ]


class Decoder(nn.Module):
    """The networks of the decoder.

    Args:
        side: The number of rows, and of columns, of an image.
        size: How large they are.
        style: What they have in common.

    Attributes:
        units: From z0 to the logits of p(z1 | z0).
        pixels: From z1 to the logits of p(x | z1).
    """

    def __init__(self, side: int, size: Size, style: Style) -> None:
        super().__init__()
        dense = nn.Linear(NUM_TOP, size.width), nn.Linear(size.width, NUM_UNITS)
        self.units = Network(style, *dense)
        self.pixels = Network(style, *_to_image(side, size))


class HVAE(nn.Module, ABC):
    """The pair of programs.

    Args:
        side: The number of rows, and of columns, of an image.
        size: How large the networks are.
        style: What the networks have in common.
        latent: The distribution that the encoder draws a bit from.
    """

    encoder: nn.Module

    def __init__(
        self, side: int, size: Size, style: Style, latent: Latent = dist.Bernoulli
    ) -> None:
        super().__init__()
        self.latent = latent
        self.decoder = Decoder(side, size, style)

    def model(self, x: Tensor) -> None:
        """The decoder's program, for images with shape :math:`(N, D)`."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("images", len(x)):
            z0 = pyro.sample("z0", bits(x.new_zeros(NUM_TOP)))
            z1 = pyro.sample("z1", bits(self.decoder.units(z0)))
            pyro.sample("x", bits(self.decoder.pixels(z1)), obs=x)

    def guide(self, x: Tensor) -> None:
        """The encoder's program, for images with shape :math:`(N, D)`."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("images", len(x)):
            self.encode(x)

    @torch.no_grad()
    def probabilities(self, z1: Tensor) -> Tensor:
        """The probabilities of pixels, given the bits z1."""
        return torch.cat([self.decoder.pixels(part).sigmoid() for part in z1.split(2000)])

    @abstractmethod
    def encode(self, x: Tensor) -> None:
        """Draws the latents of images."""

    def draw(self, name: str, logits: Tensor) -> Tensor:
        """Draws bits as the encoder does."""
        return pyro.sample(name, bits(logits, self.latent))


class Ladder(HVAE):
    """A pair whose encoder leans on its decoder."""

    def __init__(
        self, side: int, size: Size, style: Style, latent: Latent = dist.Bernoulli
    ) -> None:
        super().__init__(side, size, style, latent)
        last = nn.Linear(size.width, NUM_TOP + NUM_UNITS)
        self.encoder = Network(style, *_from_image(side, size), last)

    def encode(self, x: Tensor) -> None:  # noqa: D102
        z0_logits, f = self.encoder(x).split([NUM_TOP, NUM_UNITS], dim=-1)
        z0 = self.draw("z0", z0_logits)
        self.draw("z1", self.decoder.units(z0) + f)


class Reverse(HVAE):
    """A pair whose encoder goes from the image up."""

    def __init__(
        self, side: int, size: Size, style: Style, latent: Latent = dist.Bernoulli
    ) -> None:
        super().__init__(side, size, style, latent)
        last = nn.Linear(size.width, NUM_UNITS)
        dense = nn.Linear(NUM_UNITS, size.width), nn.Linear(size.width, NUM_TOP)
        self.units = Network(style, *_from_image(side, size), last)
        self.top = Network(style, *dense)
        self.encoder = nn.ModuleList([self.units, self.top])

    def encode(self, x: Tensor) -> None:  # noqa: D102
        z1 = self.draw("z1", self.units(x))
        self.draw("z0", self.top(z1))


FACTORISATIONS: dict[str, Callable[..., HVAE]] = {"ladder": Ladder, "reverse": Reverse}


def bits(logits: Tensor, latent: Latent = dist.Bernoulli) -> dist.Independent:
    """Independent binary variables along the last dimension."""
    return latent(logits=logits).to_event(1)
