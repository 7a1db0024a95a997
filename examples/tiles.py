"""Pictures of images, side by side in labelled rows."""

from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

__all__ = ["draw"]


def draw(path: Path, title: str, rows: Mapping[str, Tensor]) -> None:
    """Writes a picture.

    Args:
        path: The file to write.
        title: Stands above the picture.
        rows: The images of each row by the row's label, with shape :math:`(N, H, W)`: grey, from
            white (0) to black (1); or with shape :math:`(N, 3, H, W)`: red, green and blue.
    """
    images = torch.stack(list(rows.values()))
    num_columns, height, width = images.shape[1], *images.shape[-2:]
    gap = max(height // 8, 1)
    white = 0.0 if images.dim() == 4 else 1.0
    tiles = functional.pad(images, (0, gap, 0, gap), value=white)
    size = 0.54 * num_columns * width / height + 1.5, 0.54 * len(rows) + 0.4
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots()
    canvas = _canvas(tiles)[:-gap, :-gap]
    axes.imshow(canvas.numpy(force=True), cmap="gray_r", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([(height + gap) * row + height / 2 for row in range(len(rows))], rows.keys())
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=150)


def _canvas(tiles: Tensor) -> Tensor:
    """Joins tiles, with shape (rows, columns, H, W) or (rows, columns, 3, H, W), to an image."""
    if tiles.dim() == 5:
        tiles = tiles.movedim(2, -1)
    return tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)
