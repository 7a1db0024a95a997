r"""Labelled images of handwritten digits and of clothes, as binary vectors.

An image is a vector :math:`x \in \{0, 1\}^D` of its pixels, row by row; its class :math:`y` is
one-hot.
"""

import gzip
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["DataError", "Images", "load", "load_gray"]

NUM_CLASSES = 10
TORCHVISION_NAMES = {"mnist": "MNIST", "fashion": "FashionMNIST"}
LEAST_INK = {"digits": 8 / 16, "mnist": 112 / 255, "fashion": 112 / 255}


class DataError(Exception):
    """Images that can't be had; the message says what to do."""


@dataclass(frozen=True)
class Images:
    """Images with their classes, some of them held out.

    Args:
        x: Training images, with shape :math:`(N, D)`.
        y: Their classes, with shape :math:`(N, 10)`.
        held_out_x: Images kept from training, with shape :math:`(M, D)`.
        held_out_y: Their classes, with shape :math:`(M, 10)`.
    """

    x: Tensor
    y: Tensor
    held_out_x: Tensor
    held_out_y: Tensor

    @property
    def side(self) -> int:
        """The number of rows, and of columns, of an image."""
        return round(self.x.shape[-1] ** 0.5)

    def to(self, device: torch.device) -> "Images":
        """Moves all of it to a device."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items()})


def load(name: str, root: Path) -> Images:
    """Loads a data set of binary images.

    Args:
        name: ``digits`` (comes with scikit-learn), ``mnist`` or ``fashion``.
        root: The folder that holds MNIST and Fashion-MNIST as torchvision lays them out; they are
            downloaded to it where they are missing.

    Returns:
        The images and classes, in torch's default dtype.

    Raises:
        DataError: The files are missing and the download failed, or they are damaged.
    """
    gray, least = load_gray(name, root), LEAST_INK[name]
    x, held_out_x = ((x >= least).to(x) for x in (gray.x, gray.held_out_x))
    return replace(gray, x=x, held_out_x=held_out_x)


def load_gray(name: str, root: Path) -> Images:
    """Loads a data set of gray images, whose pixels are between 0 and 1.

    Args:
        name: See :func:`load`.
        root: Likewise.

    Returns:
        The images and classes, in torch's default dtype.

    Raises:
        DataError: The files are missing and the download failed, or they are damaged.
    """
    return _digits() if name == "digits" else _torchvision(TORCHVISION_NAMES[name], root)


def _images(x: Tensor, y: Tensor, held_out_x: Tensor, held_out_y: Tensor) -> Images:
    dtype = torch.get_default_dtype()
    one_hot = [
        functional.one_hot(labels.long(), NUM_CLASSES).to(dtype) for labels in (y, held_out_y)
    ]
    return Images(x.flatten(1).to(dtype), one_hot[0], held_out_x.flatten(1).to(dtype), one_hot[1])


def _digits(num_training: int = 1400) -> Images:
    """1,797 digits of 8x8 pixels with 17 gray values, in a fixed shuffled order."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.from_numpy(digits.data) / 16
    y = torch.from_numpy(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    training, held_out = order[:num_training], order[num_training:]
    return _images(x[training], y[training], x[held_out], y[held_out])


def _torchvision(name: str, root: Path) -> Images:
    """60,000 images for training and 10,000 held out, of 28x28 pixels with 256 gray values."""
    folder = root / name / "raw"
    stems = [
        f"{part}-{kind}-ubyte"
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ]
    if not all(_find(folder, stem) for stem in stems):
        _download(name, root, stems)
    x, y, held_out_x, held_out_y = (_read(folder, stem) for stem in stems)
    return _images(x / 255, y, held_out_x / 255, held_out_y)


def _find(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def _download(name: str, root: Path, stems: list[str]) -> None:
    from torchvision import datasets

    try:
        getattr(datasets, name)(root, download=True)
    except (OSError, RuntimeError) as error:
        files = ", ".join(f"{stem}.gz" for stem in stems)
        raise DataError(
            f"There is no {name} in {root / name / 'raw'}, and it can't be downloaded. Put "
            f"{files} into that folder, or name the folder that has {name}/raw in it: --data-root "
            "PATH, or the environment variable PYRO_SYMEQ_DATA."
        ) from error


def _read(folder: Path, stem: str) -> Tensor:
    """Reads an idx file of bytes: two zeros, type, number of dimensions, dimensions, data."""
    path = _find(folder, stem)
    if path is None:
        raise DataError(f"Expected {stem} or {stem}.gz in {folder}.")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        start = 4 + 4 * content[3]
        shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
        return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)
    except (OSError, EOFError, IndexError, ValueError, RuntimeError) as error:
        raise DataError(f"{path} is damaged ({error}). Remove it and get it again.") from error
