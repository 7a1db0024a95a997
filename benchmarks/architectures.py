r"""Stacks of latents :math:`z_0, \dots, z_L` over images :math:`x`, as people build them every day.

The decoder and the encoder are

.. math::
    p_\theta(x, z) &= p(z_0) \, p_\theta(z_1 \mid z_0) \cdots p_\theta(x \mid z_L), \\
    q_\varphi(z \mid x) &= q_\varphi(z_0 \mid x) \, q_{\theta,\varphi}(z_1 \mid z_0, x) \cdots
        q_{\theta,\varphi}(z_L \mid z_{L-1}, x),

where a linear head on features :math:`f_\varphi(x)` adds to the decoder's own logits of each
layer, or to its means. All weights start as PyTorch has them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ladders import Rows

__all__ = ["ARCHITECTURES", "QUICK", "Architecture", "Stack"]

NUM_CLASSES = 8
NUM_CHANNELS = 8
SCALE = 0.3  # of gray pixels, at first

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
SIZES: dict[int, dict[tuple[str, int], tuple[int, ...]]] = {
    28: {
        ("binary", 2): (30, 100),
        ("binary", 3): (30, 60, 100),
        ("binary", 4): (20, 30, 60, 100),
        ("categorical", 2): (5, 20),
        ("gaussian", 2): (10, 30),
    },
    8: {
        ("binary", 2): (10, 40),
        ("binary", 3): (10, 20, 40),
        ("binary", 4): (8, 10, 20, 40),
        ("categorical", 2): (3, 10),
        ("gaussian", 2): (5, 15),
    },
}
WIDTHS = {28: {"dense": 200, "conv": 100}, 8: {"dense": 100, "conv": 50}}


@dataclass(frozen=True)
class Architecture:
    """What a pair is made of.

    Args:
        net: Whether the networks at the pixels are dense or convolutional.
        activation: The name of the nonlinearity.
        norm: What normalises hidden layers.
        centred: Whether networks see bits and pixels as -1 to 1, rather than 0 to 1.
        latent: What the latents are.
        num_layers: The number of layers of latents.
        observation: The law of the pixels, black and white or gray.
        depth: The number of hidden layers of the dense networks at the pixels.
    """

    net: Literal["dense", "conv"] = "dense"
    activation: str = "relu"
    norm: Literal["none", "batch", "layer"] = "none"
    centred: bool = False
    latent: Literal["binary", "categorical", "gaussian"] = "binary"
    num_layers: int = 2
    observation: Literal["bernoulli", "gaussian"] = "bernoulli"
    depth: int = 1


ARCHITECTURES = {
    "dense-relu": Architecture(),
    "dense-leaky": Architecture(activation="leaky"),
    "dense-gelu": Architecture(activation="gelu"),
    "dense-silu": Architecture(activation="silu"),
    "dense-tanh": Architecture(activation="tanh"),
    "dense-relu-centred": Architecture(centred=True),
    "dense-relu-batch": Architecture(norm="batch"),
    "dense-gelu-layer": Architecture(activation="gelu", norm="layer"),
    "dense-relu-3": Architecture(num_layers=3),
    "dense-relu-4": Architecture(num_layers=4),
    "dense-relu-categorical": Architecture(latent="categorical"),
    "dense-relu-gaussian": Architecture(latent="gaussian"),
    "dense-relu-gray": Architecture(observation="gaussian"),
    "dense-relu-deep": Architecture(depth=3),
    "conv-relu": Architecture("conv"),
    "conv-gelu": Architecture("conv", "gelu"),
    "conv-tanh": Architecture("conv", "tanh"),
    "conv-silu-centred": Architecture("conv", "silu", centred=True),
    "conv-relu-batch": Architecture("conv", norm="batch"),
    "conv-relu-layer": Architecture("conv", norm="layer"),
    "conv-relu-3": Architecture("conv", num_layers=3),
    "conv-relu-4": Architecture("conv", num_layers=4),
    "conv-relu-categorical": Architecture("conv", latent="categorical"),
    "conv-relu-gray": Architecture("conv", observation="gaussian"),
}
QUICK = (
    "dense-relu",
    "dense-tanh",
    "dense-relu-4",
    "dense-relu-gaussian",
    "conv-relu",
    "conv-relu-batch",
)


class Layer(ABC):
    """The latents of a layer, and how networks see them.

    Args:
        num_latents: How many there are.
    """

    def __init__(self, num_latents: int) -> None:
        self.num_latents = num_latents

    @property
    def width(self) -> int:
        """How many numbers networks see of a draw, and give to the decoder's distribution."""
        return self.num_latents

    @property
    def head_width(self) -> int:
        """How many numbers a head gives to the encoder's distribution."""
        return self.width

    def code(self, z: Tensor) -> Tensor:
        """What networks see of a draw, with shape :math:`(*, W)`."""
        return z

    @abstractmethod
    def p(self, h: Tensor) -> TorchDistribution:
        """The decoder's distribution, given the output of its network."""

    def q(self, h: Tensor, head: Tensor) -> TorchDistribution:
        """The encoder's distribution, given the decoder's output and the head's."""
        return self.p(h + head)


class Binary(Layer):
    """Bits.

    Args:
        num_latents: How many there are.
        centred: Whether networks see them as -1 and 1.
    """

    def __init__(self, num_latents: int, centred: bool) -> None:
        super().__init__(num_latents)
        self.centred = centred

    def code(self, z: Tensor) -> Tensor:  # noqa: D102
        return 2 * z - 1 if self.centred else z

    def p(self, h: Tensor) -> TorchDistribution:  # noqa: D102
        return dist.Bernoulli(logits=h).to_event(1)


class Categorical(Layer):
    """Variables of a few classes, one-hot."""

    @property
    def width(self) -> int:  # noqa: D102
        return self.num_latents * NUM_CLASSES

    def code(self, z: Tensor) -> Tensor:  # noqa: D102
        return z.flatten(-2)

    def p(self, h: Tensor) -> TorchDistribution:  # noqa: D102
        logits = h.unflatten(-1, (self.num_latents, NUM_CLASSES))
        return dist.OneHotCategorical(logits=logits).to_event(1)


class Gaussian(Layer):
    """Real variables, of unit variance given those above."""

    @property
    def head_width(self) -> int:  # noqa: D102
        return 2 * self.num_latents

    def p(self, h: Tensor) -> TorchDistribution:  # noqa: D102
        return dist.Normal(h, torch.ones_like(h)).to_event(1)

    def q(self, h: Tensor, head: Tensor) -> TorchDistribution:  # noqa: D102
        loc, log_scale = head.chunk(2, -1)
        return dist.Normal(h + loc, log_scale.clamp(-5, 2).exp()).to_event(1)


class BlackAndWhite(nn.Module):
    """Pixels that are 0 or 1."""

    def forward(self, h: Tensor) -> TorchDistribution:
        """The distribution of pixels with these logits."""
        return dist.Bernoulli(logits=h).to_event(1)


class Gray(nn.Module):
    """Real pixels, with a scale that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(SCALE)))

    def forward(self, h: Tensor) -> TorchDistribution:
        """The distribution of pixels around these means."""
        return dist.Normal(h, self.log_scale.exp().expand_as(h)).to_event(1)


class Decoder(nn.Module):
    """The networks of the decoder.

    Args:
        width: Of the first layer's code.
        nets: From each layer's code to the next layer.
        last: From the last layer's code to the pixels.
        observation: The law of the pixels.
    """

    prior: Tensor

    def __init__(
        self, width: int, nets: list[nn.Module], last: nn.Module, observation: nn.Module
    ) -> None:
        super().__init__()
        self.register_buffer("prior", torch.zeros(width))
        self.nets = nn.ModuleList(nets)
        self.last = last
        self.observation = observation

    def z(self, code: Tensor | None, number: int) -> Tensor:
        """What the distribution of a layer takes, given the code of the one above."""
        return self.prior if code is None else self.nets[number - 1](code)

    def x(self, code: Tensor | None) -> TorchDistribution:
        """The distribution of the pixels, given the code of the last layer."""
        return self.observation(self.last(code))


class Encoder(nn.Module):
    """The networks of the encoder.

    Args:
        features: From the image to what all heads see.
        heads: From there to what is added to the decoder's parameters of each layer.
    """

    def __init__(self, features: nn.Module, heads: list[nn.Module]) -> None:
        super().__init__()
        self.features = features
        self.heads = nn.ModuleList(heads)


class Stack(nn.Module):
    """A pair, with latents ``z0``, ``z1``, ... and pixels ``x``.

    Args:
        architecture: What it is made of.
        side: The number of rows of an image, 28 or 8.
    """

    def __init__(self, architecture: Architecture, side: int) -> None:
        super().__init__()
        a = architecture
        self.centred = a.centred
        self.layers = [
            _layer(a, num_latents) for num_latents in SIZES[side][a.latent, a.num_layers]
        ]
        width = WIDTHS[side][a.net]
        ends = _dense_ends if a.net == "dense" else _conv_ends
        features, last = ends(a, side, width, self.layers[-1].width)
        nets: list[nn.Module] = [
            Rows(*_hidden(a, above.width, width // 2), nn.Linear(width // 2, below.width))
            for above, below in zip(self.layers, self.layers[1:], strict=False)
        ]
        observation = BlackAndWhite() if a.observation == "bernoulli" else Gray()
        self.decoder = Decoder(self.layers[0].width, nets, last, observation)
        heads: list[nn.Module] = [nn.Linear(width, layer.head_width) for layer in self.layers]
        self.encoder = Encoder(features, heads)

    def model(self, x: Tensor) -> None:
        """The decoder's program, for images with shape :math:`(N, D)`."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("images", x.shape[-2]):
            code = None
            for number, layer in enumerate(self.layers):
                z = pyro.sample(f"z{number}", layer.p(self.decoder.z(code, number)))
                code = layer.code(z)
            pyro.sample("x", self.decoder.x(code), obs=x)

    def guide(self, x: Tensor) -> None:
        """The encoder's program, for images with shape :math:`(N, D)`."""
        pyro.module("encoder", self.encoder)
        features = self.encoder.features(2 * x - 1 if self.centred else x)
        with pyro.plate("images", x.shape[-2]):
            code = None
            for number, (layer, head) in enumerate(
                zip(self.layers, self.encoder.heads, strict=True)
            ):
                q = layer.q(self.decoder.z(code, number), head(features))
                z = pyro.sample(f"z{number}", q, infer=_infer())
                code = layer.code(z)


def _infer() -> Any:
    """What ``TraceGraph_ELBO`` needs to subtract a baseline; others ignore it."""
    return {"baseline": {"use_decaying_avg_baseline": True}}


def _layer(a: Architecture, num_latents: int) -> Layer:
    if a.latent == "binary":
        return Binary(num_latents, a.centred)
    return Categorical(num_latents) if a.latent == "categorical" else Gaussian(num_latents)


def _hidden(a: Architecture, num_inputs: int, width: int, depth: int = 1) -> list[nn.Module]:
    """Hidden dense layers."""
    layers: list[nn.Module] = []
    for num in [num_inputs, *[width] * (depth - 1)]:
        layers += [nn.Linear(num, width), *_normalised(a, width), ACTIVATIONS[a.activation]()]
    return layers


def _normalised(a: Architecture, width: int) -> list[nn.Module]:
    if a.norm == "none":
        return []
    return [nn.BatchNorm1d(width) if a.norm == "batch" else nn.LayerNorm(width)]


def _normalised_maps(a: Architecture, num_channels: int) -> list[nn.Module]:
    if a.norm == "none":
        return []
    return [nn.BatchNorm2d(num_channels) if a.norm == "batch" else nn.GroupNorm(1, num_channels)]


def _dense_ends(
    a: Architecture, side: int, width: int, num_codes: int
) -> tuple[nn.Module, nn.Module]:
    """Dense networks from the pixels, and to them."""
    features = Rows(*_hidden(a, side**2, width, a.depth))
    return features, Rows(*_hidden(a, num_codes, width, a.depth), nn.Linear(width, side**2))


def _conv_ends(
    a: Architecture, side: int, width: int, num_codes: int
) -> tuple[nn.Module, nn.Module]:
    """Convolutional networks from the pixels, and to them."""
    activation, c = ACTIVATIONS[a.activation], NUM_CHANNELS
    maps = (2 * c, side // 4, side // 4)
    features = Rows(
        nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, c, 4, stride=2, padding=1),
        *_normalised_maps(a, c),
        activation(),
        nn.Conv2d(c, 2 * c, 4, stride=2, padding=1),
        *_normalised_maps(a, 2 * c),
        activation(),
        nn.Flatten(),
        nn.Linear(math.prod(maps), width),
        activation(),
    )
    pixels = Rows(
        nn.Linear(num_codes, math.prod(maps)),
        activation(),
        nn.Unflatten(1, maps),
        nn.ConvTranspose2d(2 * c, c, 4, stride=2, padding=1),
        *_normalised_maps(a, c),
        activation(),
        nn.ConvTranspose2d(c, 1, 4, stride=2, padding=1),
        nn.Flatten(),
    )
    return features, pixels
