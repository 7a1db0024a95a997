r"""Ladders of binary latents: 30 bits :math:`z_0`, 100 bits :math:`z_1` and 784 pixels :math:`x`.

The decoder and the encoder are

.. math::
    p_\theta(x, z) &= p(z_0) \, p_\theta(z_1 \mid z_0) \, p_\theta(x \mid z_1), \\
    q_\varphi(z \mid x) &= q_\varphi(z_0 \mid x) \, q_{\theta,\varphi}(z_1 \mid z_0, x),

where a function :math:`f_\varphi(x)` of the image adds to the decoder's logits of :math:`z_1`
(eqs. 9 and 10 of Flach, Schlesinger, Shekhovtsov, 2024), and the logits of :math:`z_0` are a
function of :math:`f_\varphi(x)`.
"""

import math

import pyro
import torch
from torch import Tensor, nn

from pairs import Pair, binary, code, cross_entropy, draw

__all__ = ["Ladder", "convolutional", "dense"]

NUM_TOP, NUM_UNITS, SIDE = 30, 100, 28


class Decoder(nn.Module):
    """The networks of the decoder.

    Args:
        units: From z0 to the logits of p(z1 | z0).
        pixels: From z1 to the logits of p(x | z1).
    """

    def __init__(self, units: nn.Module, pixels: nn.Module) -> None:
        super().__init__()
        self.units = units
        self.pixels = pixels

    def z1(self, z0: Tensor) -> Tensor:
        """The logits of p(z1 | z0)."""
        return self.units(code(z0))

    def x(self, z1: Tensor) -> Tensor:
        """The logits of p(x | z1)."""
        return self.pixels(code(z1))


class Encoder(nn.Module):
    """The networks of the encoder.

    Args:
        features: From x to what it adds to the logits of z1.
        top: From there to the logits of q(z0 | x).
    """

    def __init__(self, features: nn.Module, top: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.top = top

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of q(z0 | x), and what x adds to the logits of z1."""
        features = self.features(code(x))
        return self.top(features), features


class Ladder(Pair):
    """A ladder, as programs and by hand.

    Args:
        name: Tells the parameters of several pairs apart in Pyro's parameter store.
        decoder: The networks of the decoder.
        encoder: The networks of the encoder.
    """

    num_pixels = SIDE**2
    decoder: Decoder
    encoder: Encoder
    prior: Tensor
    fair: Tensor

    def __init__(self, name: str, decoder: Decoder, encoder: Encoder) -> None:
        super().__init__(name, decoder, encoder)
        self.register_buffer("prior", torch.zeros(NUM_TOP))
        self.register_buffer("fair", torch.full((NUM_TOP,), 0.5))

    def model(self, x: Tensor) -> None:
        """The decoder's program, with the sites z0, z1 and x."""
        pyro.module(f"{self.name}.decoder", self.decoder)
        with pyro.plate("rows", x.shape[-2]):
            z0 = pyro.sample("z0", self.bits(self.prior))
            z1 = pyro.sample("z1", self.bits(self.decoder.z1(z0)))
            pyro.sample("x", binary(self.decoder.x(z1)), obs=x)

    def guide(self, x: Tensor) -> None:
        """The encoder's program, with the sites z0 and z1."""
        pyro.module(f"{self.name}.encoder", self.encoder)
        with pyro.plate("rows", x.shape[-2]):
            z0_logits, features = self.encoder(x)
            z0 = pyro.sample("z0", self.bits(z0_logits))
            pyro.sample("z1", self.bits(self.decoder.z1(z0) + features))

    def decoder_loss(self, x: Tensor) -> Tensor:
        """By hand, a draw of -L_p (nats)."""
        with torch.no_grad():
            z0_logits, features = self.encoder(x)
            z0 = draw(z0_logits)
        z1_logits = self.decoder.z1(z0)
        z1 = draw(z1_logits.detach() + features)
        loss = cross_entropy(z1_logits, z1) + cross_entropy(self.decoder.x(z1), x)
        return loss + z0.numel() * math.log(2)

    def encoder_loss(self, num_rows: int) -> Tensor:
        """By hand, a draw of -L_q (nats)."""
        with torch.no_grad():
            z0 = torch.bernoulli(self.fair.expand(num_rows, -1))
            z1_logits = self.decoder.z1(z0)
            z1 = draw(z1_logits)
            x = draw(self.decoder.x(z1))
        z0_logits, features = self.encoder(x)
        return cross_entropy(z0_logits, z0) + cross_entropy(z1_logits + features, z1)


def dense(name: str) -> Ladder:
    """A small ladder, 784-200-100-30, whose layers are all dense."""
    decoder = Decoder(
        nn.Linear(NUM_TOP, NUM_UNITS),
        nn.Sequential(nn.Linear(NUM_UNITS, 200), nn.SiLU(), nn.Linear(200, SIDE**2)),
    )
    encoder = Encoder(
        nn.Sequential(nn.Linear(SIDE**2, 200), nn.SiLU(), nn.Linear(200, NUM_UNITS)),
        nn.Sequential(nn.SiLU(), nn.Linear(NUM_UNITS, NUM_TOP)),
    )
    return Ladder(name, decoder, encoder)


def convolutional(name: str) -> Ladder:
    """A ladder of the size of the paper's for MNIST, 2.2 and 0.8 million parameters.

    Its networks are of tanh layers without normalisation; from the top, images have 1, 4, 7, 14
    and 28 rows. On a GPU, the channels of a pixel lie side by side.
    """
    decoder = Decoder(
        nn.Sequential(nn.Linear(NUM_TOP, 200), nn.Tanh(), nn.Linear(200, NUM_UNITS)),
        Rows(
            nn.Unflatten(1, (NUM_UNITS, 1, 1)),
            nn.ConvTranspose2d(NUM_UNITS, 256, 4),
            ChannelsLast(),
            nn.Tanh(),
            nn.ConvTranspose2d(256, 96, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.ConvTranspose2d(96, 64, 4, stride=2, padding=1),
            nn.Tanh(),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
            nn.Tanh(),
            nn.Conv2d(32, 1, 3, padding=1),
            nn.Flatten(),
        ),
    )
    encoder = Encoder(
        Rows(
            nn.Unflatten(1, (1, SIDE, SIDE)),
            nn.Conv2d(1, 32, 4, stride=2, padding=1),
            ChannelsLast(),
            nn.Tanh(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),
            nn.Tanh(),
            nn.Conv2d(64, 224, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Conv2d(224, 512, 4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(512, 256),
            nn.Tanh(),
            nn.Linear(256, NUM_UNITS),
        ),
        nn.Sequential(nn.Tanh(), nn.Linear(NUM_UNITS, 256), nn.Tanh(), nn.Linear(256, NUM_TOP)),
    )
    return Ladder(name, decoder, encoder)


class ChannelsLast(nn.Module):
    """Lays images out as the convolutions of a GPU want them, and leaves others as they are."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps images to the same images."""
        return x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x


class Rows(nn.Sequential):
    """Layers that take one batch dimension, and here any number of them."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps rows with shape :math:`(*, D)`."""
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
