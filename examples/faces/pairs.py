r"""Images with segmentations: faces as two data sets have them, and digits on textured ground.

An image :math:`x` has colours between -1 and 1, with shape :math:`(3, H, H)`; its segmentation
:math:`s` has a class for each pixel, with shape :math:`(H, H)`. What is read and made is kept in a
file with a checksum, as bytes, and taken from there as long as the source is the same.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data import DataError
from faces import celeba, lfw, textured_digits
from pyro_symeq import checkpoint

__all__ = ["Pairs", "Splits", "load"]

SOURCES = {"digits": textured_digits, "lfw": lfw, "celeba": celeba}


@dataclass(frozen=True)
class Pairs:
    """Images with their segmentations.

    Args:
        x: The images, with shape :math:`(N, 3, H, H)`.
        s: The segmentations, with shape :math:`(N, H, H)`.
    """

    x: Tensor
    s: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | slice) -> "Pairs":
        return Pairs(self.x[rows], self.s[rows])

    def to(self, device: torch.device) -> "Pairs":
        """Moves all of it to a device."""
        return Pairs(self.x.to(device), self.s.to(device))


@dataclass(frozen=True)
class Splits:
    """A data set.

    Args:
        training: Pairs to learn from.
        held_out: Pairs that are kept from training.
        class_names: The names of the classes.
        has_mirror_images: Whether the mirror image of a pair is as good as the pair.
    """

    training: Pairs
    held_out: Pairs
    class_names: tuple[str, ...]
    has_mirror_images: bool

    def to(self, device: torch.device) -> "Splits":
        """Moves all pairs to a device."""
        pairs = self.training.to(device), self.held_out.to(device)
        return Splits(*pairs, self.class_names, self.has_mirror_images)

    @property
    def side(self) -> int:
        """The number of rows, and of columns, of an image."""
        return self.training.x.shape[-1]


def load(name: str, root: Path, folder: Path) -> Splits:
    """Loads a data set, prepared before if it was.

    Args:
        name: ``digits``, made from MNIST; ``lfw``, LFW Part Labels; or ``celeba``, CelebAMask-HQ.
        root: The folder of the data sets.
        folder: The folder where prepared tensors are kept.

    Returns:
        The pairs, in torch's default dtype and ``int64``.

    Raises:
        DataError: Files are missing or damaged.
    """
    source = SOURCES[name]
    fingerprint = _fingerprint(source.files(root))
    path = folder / f"{name}.pairs.pt"
    parts = _kept(path, fingerprint)
    if parts is None:
        parts = source.read(root)
        _keep(path, fingerprint, parts)
    training, held_out = (
        Pairs(parts[f"{split} images"], parts[f"{split} masks"])
        for split in ("training", "held-out")
    )
    pairs = _scaled(training), _scaled(held_out)
    return Splits(*pairs, source.CLASS_NAMES, source.HAS_MIRROR_IMAGES)


def _scaled(pairs: Pairs) -> Pairs:
    return Pairs(pairs.x.to(torch.get_default_dtype()) / 127.5 - 1, pairs.s.long())


def _fingerprint(files: Iterable[Path]) -> str:
    """Tells whether files are those of before, by their names, sizes and times of change."""
    seen = hashlib.sha256()
    for file in files:
        stat = file.stat()
        seen.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return seen.hexdigest()


def _checksum(parts: dict[str, Tensor]) -> str:
    seen = hashlib.sha256()
    for name, part in parts.items():
        seen.update(f"{name} {tuple(part.shape)}\n".encode() + part.numpy().tobytes())
    return seen.hexdigest()


def _keep(path: Path, fingerprint: str, parts: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {"source": fingerprint, "checksum": _checksum(parts), "parts": parts}
    checkpoint.save(path, kept)


def _kept(path: Path, fingerprint: str) -> dict[str, Tensor] | None:
    """What is kept in a file, if there is one and the source has not changed.

    Raises:
        DataError: The file is damaged.
    """
    if not path.exists():
        return None
    try:
        kept = checkpoint.load(path)
        source, checksum, parts = kept["source"], kept["checksum"], kept["parts"]
        is_whole = _checksum(parts) == checksum
    except (AttributeError, KeyError, TypeError, ValueError):
        is_whole = False
    if not is_whole:
        raise DataError(f"{path} is damaged. Remove it; it is made anew from the data set.")
    return parts if source == fingerprint else None
