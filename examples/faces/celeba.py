"""CelebAMask-HQ: photographs of faces with masks of 18 parts, in the layout of its authors.

``CelebAMask-HQ/CelebA-HQ-img/N.jpg`` is image N, and
``CelebAMask-HQ/CelebAMask-HQ-mask-anno/M/NNNNN_part.png``, with M = N // 2000, is the mask of one
of its parts, which is not black where the part is. Parts that an image lacks have no mask. Where
masks overlap, the later part in the order below lies above. All is reduced to 64x64.

References:
    MaskGAN: Towards Diverse and Interactive Facial Image Manipulation (Lee, Liu, Wu, Luo, 2020).
    https://arxiv.org/abs/1907.11922
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data import DataError

__all__ = ["CLASS_NAMES", "HAS_MIRROR_IMAGES", "files", "read"]

PARTS = (
    *("skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear"),
    *("mouth", "u_lip", "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth"),
)
CLASS_NAMES = ("background", *PARTS)
HAS_MIRROR_IMAGES = False  # left and right eyes are classes of their own
FOLDER = "CelebAMask-HQ"
IMAGES, MASKS = "CelebA-HQ-img", "CelebAMask-HQ-mask-anno"
PER_FOLDER = 2000  # images whose masks lie in one folder
HELD_OUT = 15  # one of so many images, the last ones
SIDE = 64


def files(root: Path) -> list[Path]:
    """The files of the data set.

    Raises:
        DataError: There are no images, or no masks.
    """
    images = sorted((root / FOLDER / IMAGES).glob("*.jpg"))
    masks = sorted((root / FOLDER / MASKS).glob("*/*.png"))
    for name, found in ((IMAGES, images), (MASKS, masks)):
        if not found:
            raise DataError(
                f"There are no files in {root / FOLDER / name}. Unpack CelebAMask-HQ.zip, and name "
                f"the folder that has {FOLDER} in it: --data-root PATH, or the environment "
                "variable PYRO_SYMEQ_DATA."
            )
    return images + masks


def read(root: Path) -> dict[str, Tensor]:
    """Reads images and masks, as bytes.

    Raises:
        DataError: A file is missing or damaged, or holds something else.
    """
    numbers = sorted(int(path.stem) for path in files(root) if path.parent.name == IMAGES)
    images = torch.empty(len(numbers), 3, SIDE, SIDE, dtype=torch.uint8)
    masks = torch.empty(len(numbers), SIDE, SIDE, dtype=torch.uint8)
    for row, number in enumerate(tqdm(numbers, unit="image", mininterval=0.5)):
        image = _opened(root / FOLDER / IMAGES / f"{number}.jpg", "RGB")
        reduced = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        images[row] = torch.from_numpy(np.array(reduced)).permute(2, 0, 1)
        masks[row] = _labels(root / FOLDER / MASKS, number)
    split = len(numbers) - max(len(numbers) // HELD_OUT, 1)
    return {
        "training images": images[:split],
        "training masks": masks[:split],
        "held-out images": images[split:].clone(),
        "held-out masks": masks[split:].clone(),
    }


def _labels(folder: Path, number: int) -> Tensor:
    """Merges the masks of an image's parts to a class for each pixel."""
    labels = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    paths = {part: folder / f"{number // PER_FOLDER}/{number:05d}_{part}.png" for part in PARTS}
    present = {part: path for part, path in paths.items() if path.is_file()}
    if not present:
        raise DataError(
            f"Image {number} has no masks: there is no file like {paths['skin']}. Unpack "
            "CelebAMask-HQ.zip again."
        )
    for part, path in present.items():
        mask = _opened(path, "L").resize((SIDE, SIDE), Image.Resampling.NEAREST)
        labels[torch.from_numpy(np.array(mask)) > 0] = CLASS_NAMES.index(part)
    return labels


def _opened(path: Path, mode: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except (OSError, SyntaxError) as error:
        raise DataError(f"{path} is damaged ({error}). Remove it and get it again.") from error
