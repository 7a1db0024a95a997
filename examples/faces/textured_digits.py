r"""Digits on textured ground, with the classes ground, shadow and digit; no person is in them.

Each image is made from a digit of MNIST:

- the ground has a colour of its own, with waves of light of some direction and length,
- the digit has a colour of its own, some size and some place,
- it throws a shadow on the ground, which lies to its right and below and is darker,
- all pixels have some noise.

The colours are drawn, so that a digit may look much like its ground. The same seed makes the same
images.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from data import TORCHVISION_NAMES, load_gray

__all__ = ["CLASS_NAMES", "HAS_MIRROR_IMAGES", "files", "read"]

CLASS_NAMES = ("ground", "shadow", "digit")
HAS_MIRROR_IMAGES = False
SIDE = 32
NUM_PAIRS = {"training": 4000, "held-out": 500}
SIZES = 0.6, 0.95  # of the digits, as parts of the side
SHIFT = 0.12  # of the digits and back, likewise
SHADOW = 0.1  # how far it lies from its digit, likewise
DARKNESS = 0.4  # what it leaves of the ground's light
DIMNESS = 0.6  # what is left of it between waves
NOISE = 0.04  # of a colour between 0 and 1
INK = 0.4  # how dark a pixel of MNIST is, at least, to be a part of the digit


def files(root: Path) -> list[Path]:
    """The files of MNIST that are there."""
    return sorted((root / TORCHVISION_NAMES["mnist"] / "raw").glob("*-ubyte*"))


def read(root: Path) -> dict[str, Tensor]:
    """Makes images and masks, as bytes.

    Raises:
        DataError: MNIST is missing or damaged.
    """
    mnist = load_gray("mnist", root)
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for (split, number), x in zip(NUM_PAIRS.items(), (mnist.x, mnist.held_out_x), strict=True):
        ink = x[:number].float().view(-1, 1, mnist.side, mnist.side)
        parts[f"{split} images"], parts[f"{split} masks"] = _made(ink, generator)
    return parts


def _made(ink: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Makes images and masks for digits, with shape (N, 1, 28, 28)."""

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(len(ink), *shape, generator=generator)

    size = uniform(1, low=SIZES[0], high=SIZES[1])
    place = uniform(2, low=-SHIFT, high=SHIFT)
    digit = _placed(ink, size, place) > INK
    shadow = (_placed(ink, size, place + SHADOW) > INK) & ~digit
    colour, ground = uniform(3, 1, 1), uniform(3, 1, 1)
    waves = _waves(uniform(1, 1), uniform(1, 1), uniform(1, 1))
    ground = ground * (DIMNESS + (1 - DIMNESS) * waves)
    x = torch.where(digit, colour, torch.where(shadow, DARKNESS * ground, ground))
    x = x + NOISE * torch.randn(x.shape, generator=generator)
    masks = (2 * digit + shadow.int()).squeeze(1)
    return (255 * x.clamp(0, 1)).round().to(torch.uint8), masks.to(torch.uint8)


def _placed(ink: Tensor, size: Tensor, place: Tensor) -> Tensor:
    """Digits of some size at some place, on squares of the side of an image."""
    maps = torch.cat([torch.eye(2) / size[..., None], (-2 * place / size)[..., None]], dim=-1)
    grid = functional.affine_grid(maps, [len(ink), 1, SIDE, SIDE], align_corners=False)
    return functional.grid_sample(ink, grid, align_corners=False)


def _waves(direction: Tensor, length: Tensor, phase: Tensor) -> Tensor:
    """Waves between 0 and 1, with shape (N, 1, H, H)."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    angle = torch.pi * direction
    along = rows * angle.sin() + columns * angle.cos()
    cycles = along / (8 + 16 * length) + phase
    return 0.5 + 0.5 * (2 * torch.pi * cycles).sin()[:, None]
