"""Pictures of what the programs do: change appearances, reconstruct, dream and complete."""

from pathlib import Path

import torch
from matplotlib import colormaps
from torch import Tensor

import tiles
from faces.judging import Judge, squares
from faces.pairs import Pairs

__all__ = ["picture_appearances", "picture_completions", "picture_pairs"]


def picture_appearances(path: Path, judge: Judge, shapes: Pairs, appearances: Pairs) -> None:
    """Draws images whose appearance is that of others (Fig. 3).

    Args:
        path: The file to write.
        judge: Asks the programs.
        shapes: Pairs whose segmentations stand in the top row.
        appearances: Pairs whose images stand in the first column.
    """
    blank = torch.ones_like(shapes.x[:1])
    rows = {"segmentation": torch.cat([blank, _colours(shapes.s)])}
    images = judge.repainted(shapes.s, appearances)
    for number, (x, row) in enumerate(zip(appearances.x, images, strict=True), 1):
        rows[f"appearance {number}"] = _light(torch.cat([x[None], row]))
    tiles.draw(path, "Segmentations, painted like the images on the left", rows)


def picture_pairs(path: Path, judge: Judge, pairs: Pairs, num_rounds: int) -> None:
    """Draws pairs, their reconstructions, and pairs of the limiting distribution (Fig. 4).

    Args:
        path: The file to write.
        judge: Asks the programs.
        pairs: Pairs to reconstruct.
        num_rounds: The number of rounds to a pair of the limiting distribution.
    """
    rows = {}
    again, dreams = judge.reconstructed(pairs), judge.dreamed(pairs.x, num_rounds)
    for label, each in {"data": pairs, "reconstructed": again, "drawn": dreams}.items():
        rows[f"{label}: image"] = _light(each.x)
        rows[f"{label}: segmentation"] = _colours(each.s)
    tiles.draw(path, "Pairs", rows)


def picture_completions(path: Path, judge: Judge, pairs: Pairs, num_rounds: int) -> None:
    """Draws images with a hidden square, and what was found (Fig. 5).

    Args:
        path: The file to write.
        judge: Asks the programs.
        pairs: Pairs of which the images are shown in part.
        num_rounds: The number of rounds of the chains.
    """
    visible = squares(len(pairs), pairs.x.shape[-1]).to(pairs.x.device)
    found = judge.segmented(pairs.x, visible, num_rounds)
    rows = {
        "what is seen": _light(torch.where(visible, pairs.x, -1)),
        "segmented": _colours(found.s),
        "true": _colours(pairs.s),
        "in-painted": _light(found.x),
        "whole image": _light(pairs.x),
    }
    tiles.draw(path, "Images with hidden squares", rows)


def _light(x: Tensor) -> Tensor:
    """Images with colours between 0 and 1."""
    return ((x + 1) / 2).clamp(0, 1).cpu()


def _colours(s: Tensor) -> Tensor:
    """Segmentations with a colour for each class."""
    bright_and_pale = torch.tensor(colormaps["tab20"](range(20)))[:, :3]
    palette = torch.cat([bright_and_pale[::2], bright_and_pale[1::2]])
    return palette[s.cpu()].movedim(-1, 1).to(torch.get_default_dtype())
