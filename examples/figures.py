"""Pictures of what a pair has learned."""

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

__all__ = ["draw"]


def draw(
    path: Path, title: str, held_out: Tensor, reconstructions: Tensor, samples: Tensor
) -> None:
    """Writes a picture of images, with a column for each class.

    Args:
        path: The file to write.
        title: Stands above the picture.
        held_out: Images, with shape :math:`(R, 10, D)`.
        reconstructions: Their reconstructions, with the same shape.
        samples: Samples, with shape :math:`(S, 10, D)`.
    """
    pairs = torch.stack([held_out, reconstructions], dim=1).flatten(0, 1)
    heights = [len(pairs), len(samples)]
    figure = Figure(figsize=(6.4, 0.54 * sum(heights) + 1.3), layout="constrained")
    figure.suptitle(title, fontsize=11)
    top, bottom = figure.subplots(2, 1, height_ratios=heights)
    _grid(top, pairs, "Held-out images, each above its reconstruction")
    top.set_yticks(top.get_yticks(), ["image", "reconstruction"] * len(held_out))
    _grid(bottom, samples, "Samples of the decoder, given the class")
    bottom.set_yticks([])
    bottom.set_xlabel("class")
    figure.savefig(path, dpi=150)


def _grid(axes: Axes, images: Tensor, title: str) -> None:
    """Shows images, with shape (rows, columns, pixels), side by side."""
    rows, columns, num_pixels = images.shape
    side = round(num_pixels**0.5)
    gap = max(side // 8, 1)
    pitch = side + gap
    tiles = functional.pad(images.view(rows, columns, side, side), (0, gap, 0, gap))
    canvas = tiles.transpose(1, 2).reshape(rows * pitch, columns * pitch)[:-gap, :-gap]
    axes.imshow(canvas.numpy(force=True), cmap="gray_r", vmin=0, vmax=1)
    axes.set_title(title, fontsize=10)
    axes.set_xticks(
        [pitch * column + side / 2 for column in range(columns)], map(str, range(columns))
    )
    axes.set_yticks([pitch * row + side / 2 for row in range(rows)])
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
