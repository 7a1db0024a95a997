r"""Programs for images :math:`x` with segmentations :math:`s`, and binary latents of both.

The bits :math:`z_1` tell shapes and the bits :math:`z_2` appearance; both are uniform a priori.
No joint law is written down, but conditionals, from networks :math:`f_1, f_2, \mu, \sigma, g_1, g_2`:

.. math::
    p(s \mid x, z) &\propto \exp \langle f_1(z_1) + f_2(x, z_2), s \rangle, \\
    p(x \mid s, z_2) &= \mathcal{N}(\mu(s, z_2), \sigma(s, z_2)), \\
    q(z \mid x, s) &\propto \exp \big( \langle g_1(s), z_1 \rangle + \langle g_2(x, s), z_2 \rangle
        \big).

As long as :math:`f_2` is zero, :math:`p(s \mid z_1)` and :math:`q(z_1 \mid s)` are a pair of its
own, and so are :math:`p(x \mid s, z_2)` and :math:`q(z_2 \mid x, s)`; both can be learned alone.

A colour is between -1 and 1, and a segmentation holds a class for each pixel. Networks see bits as
-1 and +1.

References:
    Symmetric Equilibrium Learning of VAEs (Flach, Schlesinger, Shekhovtsov, 2024), eqs. 17 and 18.
    https://arxiv.org/abs/2307.09883
"""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, cat, nn

from faces.networks import Decoder, Encoder, Hourglass
from pyro_symeq import Conditionals

__all__ = ["Networks", "Programs", "convolutional"]

COLOURS = 3
LEAST_SCALE = 0.05  # of a colour


class Networks(nn.Module):
    r"""The networks of the conditionals.

    Args:
        shape: :math:`f_1`, from the bits :math:`z_1` to logits of the classes.
        evidence: :math:`f_2`, from an image and the bits :math:`z_2` to what they add to these.
        painter: :math:`\mu` and :math:`\sigma`, from a one-hot segmentation and the bits
            :math:`z_2` to the means of the colours, and in one channel more to the logits of the
            pixels' scales.
        shape_code: :math:`g_1`, from a one-hot segmentation to logits of :math:`z_1`.
        appearance_code: :math:`g_2`, from an image and a one-hot segmentation, channel after
            channel, to logits of :math:`z_2`.
    """

    def __init__(
        self,
        shape: nn.Module,
        evidence: nn.Module,
        painter: nn.Module,
        shape_code: nn.Module,
        appearance_code: nn.Module,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.evidence = evidence
        self.painter = painter
        self.shape_code = shape_code
        self.appearance_code = appearance_code


def convolutional(
    side: int, num_classes: int, shape_bits: int, appearance_bits: int, width: int
) -> Networks:
    """Makes convolutional networks, of which the evidence is zero at first.

    Args:
        side: The number of rows, and of columns, of an image.
        num_classes: The number of classes of a pixel.
        shape_bits: The number of bits z1.
        appearance_bits: The number of bits z2.
        width: The number of channels at a quarter of the resolution.
    """
    shape = Decoder(side, shape_bits, num_classes, width)
    evidence = Hourglass(side, COLOURS, appearance_bits, num_classes, width)
    evidence.start_at_zero()
    return Networks(
        shape,
        evidence,
        Hourglass(side, num_classes, appearance_bits, COLOURS + 1, width),
        Encoder(side, num_classes, shape_bits, width),
        Encoder(side, COLOURS + num_classes, appearance_bits, width),
    )


class Programs:
    """The programs of the conditionals, and of the parts that learn before they do.

    Args:
        networks: The networks.
        num_classes: The number of classes of a pixel.
        shape_bits: The number of bits z1.
        appearance_bits: The number of bits z2.
    """

    def __init__(
        self, networks: Networks, num_classes: int, shape_bits: int, appearance_bits: int
    ) -> None:
        self.networks = networks
        self.num_classes = num_classes
        self.shape_bits = shape_bits
        self.appearance_bits = appearance_bits

    @property
    def conditionals(self) -> Conditionals:
        """The conditionals of all that is random."""
        programs: dict[str | tuple[str, ...], Callable[..., None]] = {
            "s": self.segment,
            "x": self.paint,
            ("z1", "z2"): self.encode,
        }
        return Conditionals(programs, prior=self.prior)

    # The three players of eq. 17, and what they start from.

    def segment(self, x: Tensor, z1: Tensor, z2: Tensor) -> None:
        """Segments images of known shape and appearance (eq. 18)."""
        with pyro.plate("images", len(x)):
            pyro.sample("s", classes(self.shape(z1) + self.evidence(x, z2)))

    def paint(self, s: Tensor, z2: Tensor) -> None:
        """Paints images for segmentations."""
        with pyro.plate("images", len(s)):
            pyro.sample("x", self.image(s, z2))

    def encode(self, x: Tensor, s: Tensor) -> None:
        """Encodes images and segmentations."""
        with pyro.plate("images", len(x)):
            pyro.sample("z1", bits(self.shape_code(s)))
            pyro.sample("z2", bits(self.appearance_code(x, s)))

    def prior(self, x: Tensor | None = None, s: Tensor | None = None) -> None:
        """Draws bits, and segmentations that the shapes alone tell, as many as there are data."""
        (like,) = [value for value in (x, s) if value is not None][:1]
        zeros = self._zeros(like)
        with pyro.plate("images", len(like)):
            pyro.sample("z2", bits(zeros[:, : self.appearance_bits]))
            z1 = pyro.sample("z1", bits(zeros[:, : self.shape_bits]))
            pyro.sample("s", classes(self.shape(z1)))

    # Pairs that are learned alone: of segmentations, and of images given segmentations.

    def draw_shape(self, s: Tensor) -> None:
        """A decoder of segmentations."""
        with pyro.plate("images", len(s)):
            z1 = pyro.sample("z1", bits(self._zeros(s)[:, : self.shape_bits]))
            pyro.sample("s", classes(self.shape(z1)), obs=s)

    def encode_shape(self, s: Tensor) -> None:
        """Its encoder."""
        with pyro.plate("images", len(s)):
            pyro.sample("z1", bits(self.shape_code(s)))

    def draw_appearance(self, x: Tensor, s: Tensor) -> None:
        """A decoder of images, given segmentations."""
        with pyro.plate("images", len(s)):
            z2 = pyro.sample("z2", bits(self._zeros(s)[:, : self.appearance_bits]))
            pyro.sample("x", self.image(s, z2), obs=x)

    def encode_appearance(self, x: Tensor, s: Tensor) -> None:
        """Its encoder."""
        with pyro.plate("images", len(s)):
            pyro.sample("z2", bits(self.appearance_code(x, s)))

    # The yardstick.

    def segment_alone(self, x: Tensor) -> None:
        """Segments images by their evidence, without latents."""
        z2 = x.new_full((len(x), self.appearance_bits), 0.5)
        with pyro.plate("images", len(x)):
            pyro.sample("s", classes(self.evidence(x, z2)))

    # What the programs are made of.

    def shape(self, z1: Tensor) -> Tensor:
        """The logits of classes that the shape tells, with shape :math:`(N, K, H, H)`."""
        pyro.module("shape", self.networks.shape)
        return self.networks.shape(2 * z1 - 1)

    def evidence(self, x: Tensor, z2: Tensor) -> Tensor:
        """What image and appearance add to these logits."""
        pyro.module("evidence", self.networks.evidence)
        return self.networks.evidence(2 * x, 2 * z2 - 1)

    def image(self, s: Tensor, z2: Tensor) -> dist.Independent:
        """The law of images, given segmentation and appearance."""
        pyro.module("painter", self.networks.painter)
        loc, scale = self.networks.painter(self.one_hot(s), 2 * z2 - 1).tensor_split([-1], dim=1)
        return dist.Normal(loc, LEAST_SCALE + scale.sigmoid()).to_event(3)

    def shape_code(self, s: Tensor) -> Tensor:
        """The logits of the bits z1, given segmentations."""
        pyro.module("shape_code", self.networks.shape_code)
        return self.networks.shape_code(self.one_hot(s))

    def appearance_code(self, x: Tensor, s: Tensor) -> Tensor:
        """The logits of the bits z2, given images and segmentations."""
        pyro.module("appearance_code", self.networks.appearance_code)
        return self.networks.appearance_code(cat([2 * x, self.one_hot(s)], dim=1))

    def one_hot(self, s: Tensor) -> Tensor:
        """Segmentations with a channel for each class, of mean square 1."""
        numbers = torch.arange(self.num_classes, device=s.device)[:, None, None]
        return self.num_classes**0.5 * (s[:, None] == numbers).to(torch.get_default_dtype())

    def _zeros(self, like: Tensor) -> Tensor:
        parameter = next(self.networks.parameters())
        return parameter.new_zeros(len(like), max(self.shape_bits, self.appearance_bits))


def bits(logits: Tensor) -> dist.Independent:
    """Independent binary variables along the last dimension."""
    return dist.Bernoulli(logits=logits).to_event(1)


def classes(logits: Tensor) -> dist.Independent:
    """A class for each pixel, given logits with shape :math:`(N, K, H, H)`."""
    return Classes(logits=logits.movedim(1, -1)).to_event(2)


class Classes(dist.Categorical):  # type: ignore[misc]
    """A categorical distribution that is drawn from by the maximum of Gumbel variables.

    With a few classes for each of many pixels, this takes a fifth of the time on the CPU.
    """

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws classes."""
        logits = self.logits.detach().expand(*sample_shape, *self.logits.shape)
        noisy = logits - (-torch.rand_like(logits).log()).log()
        return noisy.max(dim=-1).indices  # several times as fast as argmax
