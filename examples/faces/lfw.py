"""LFW Part Labels: photographs of faces, 64x64, with the classes background, skin and hair.

A file for each split holds ``images``, bytes with shape ``(N, 64, 64, 3)``, and ``masks``, bytes
with shape ``(N, 64, 64)``.

References:
    Augmenting CRFs with Boltzmann Machine Shape Priors for Image Labeling (Kae, Sohn, Lee,
    Learned-Miller, 2013).
"""

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import DataError

__all__ = ["CLASS_NAMES", "HAS_MIRROR_IMAGES", "files", "read"]

CLASS_NAMES = ("background", "skin", "hair")
HAS_MIRROR_IMAGES = True
FOLDER = "lfw_part_labels"
SPLITS = {"training": "train.npz", "held-out": "val.npz"}
SIDE = 64


def files(root: Path) -> list[Path]:
    """The files of the data set.

    Raises:
        DataError: One is missing.
    """
    paths = [root / FOLDER / name for name in SPLITS.values()]
    for path in paths:
        if not path.is_file():
            raise DataError(
                f"There is no {path}. Name the folder that has {FOLDER} in it: --data-root PATH, "
                "or the environment variable PYRO_SYMEQ_DATA."
            )
    return paths


def read(root: Path) -> dict[str, Tensor]:
    """Reads images and masks, as bytes.

    Raises:
        DataError: A file is missing or damaged, or holds something else.
    """
    parts = {}
    for split, path in zip(SPLITS, files(root), strict=True):
        images, masks = _arrays(path)
        parts[f"{split} images"] = images.permute(0, 3, 1, 2).contiguous()
        parts[f"{split} masks"] = masks
    return parts


def _arrays(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            images, masks = (torch.from_numpy(content[name]) for name in ("images", "masks"))
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged ({error}). Remove it and get it again.") from error
    shapes = (len(masks), SIDE, SIDE, 3), (len(images), SIDE, SIDE)
    if (images.shape, masks.shape) != shapes or {images.dtype, masks.dtype} != {torch.uint8}:
        raise DataError(
            f"Expected {path} to hold bytes, images (N, {SIDE}, {SIDE}, 3) and masks (N, {SIDE}, "
            f"{SIDE}); got {images.dtype} {tuple(images.shape)} and {masks.dtype} "
            f"{tuple(masks.shape)}."
        )
    if masks.max() >= len(CLASS_NAMES):
        raise DataError(
            f"Expected the masks in {path} to hold classes 0 to {len(CLASS_NAMES) - 1}, got "
            f"{masks.max()}."
        )
    return images, masks
