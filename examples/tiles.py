"""Pictures of images, side by side in labelled rows."""

from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

__all__ = ["draw"]


def draw(path: Path, title: str, rows: Mapping[str, Tensor]) -> None:
    """Writes a picture; the grey of a pixel is its value, from white (0) to black (1).

    Args:
        path: The file to write.
        title: Stands above the picture.
        rows: The images of each row by the row's label, with shape :math:`(N, H, W)`.
    """
    images = torch.stack(list(rows.values()))
    _, num_columns, height, width = images.shape
    gap = max(height // 8, 1)
    tiles = functional.pad(images, (0, gap, 0, gap))
    canvas = tiles.transpose(1, 2).flatten(2).flatten(0, 1)[:-gap, :-gap]
    size = 0.54 * num_columns * width / height + 1.5, 0.54 * len(rows) + 0.4
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots()
    axes.imshow(canvas.numpy(force=True), cmap="gray_r", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([(height + gap) * row + height / 2 for row in range(len(rows))], rows.keys())
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=150)
