"""Checkpoints: files that hold a state whole, and that can run nothing when they are read.

A state is written to another file in the same folder, which takes the place of the former one when
all of it is on the disk. A process that dies, or a disk that is full, leaves the former one. What
is read are tensors, numbers, strings and containers of such.
"""

import glob
import os
import secrets
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

__all__ = ["load", "replaced", "save"]

State = dict[str, Any]

TAG, VERSION = "pyro_symeq", 1
LEFT_AFTER = 3600  # seconds in which nobody has written


def save(path: str | Path, state: Mapping[str, Any]) -> None:
    """Writes a state to a file; until all of it is there, the former file is.

    Args:
        path: The file.
        state: Tensors, numbers, strings, and containers of such, by name.

    Raises:
        OSError: It can't be written, as on a full disk; the former file is as it was.
        TypeError: The state holds other objects.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> save(folder / "run.pt", {"place": torch.zeros(2), "steps": 3})
        >>> load(folder / "run.pt")
        {'place': tensor([0., 0.]), 'steps': 3}
    """
    try:
        with replaced(path) as file:
            torch.save({TAG: VERSION, **state}, file)
            file.seek(0)
            unsafe = get_unsafe_globals_in_checkpoint(file)
            if unsafe:
                raise TypeError(
                    f"Expected a state of tensors, numbers, strings and containers, got objects "
                    f"made by {sorted(unsafe)}, which would not be read again: that could run code."
                )
    except (OSError, RuntimeError) as error:  # PyTorch's writer hides the one in the other
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"Can't write {path}: {reason}. What was there is as it was.") from error


def load(path: str | Path) -> State:
    """Reads a state from a file, onto the CPU; nothing in the file can run.

    Args:
        path: A file that :func:`save` wrote.

    Raises:
        OSError: There is no such file, or it can't be read.
        ValueError: It is damaged, or holds something else.
    """
    with open(path, "rb") as file:
        _check_whole(path, file)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"Can't load {path}: it holds more than tensors, numbers and containers of such, "
                f"or is another kind of file ({type(error).__name__}). Whatever could run code "
                "isn't read."
            ) from error
    if not isinstance(state, dict) or TAG not in state:
        raise ValueError(
            f"Can't load {path}: it was not saved by pyro_symeq. Files of torch.save are read by "
            "torch.load."
        )
    version = state.pop(TAG)
    if version != VERSION:
        raise ValueError(
            f"Can't load {path}: it has format {version}, and this version of pyro_symeq reads "
            f"format {VERSION}. Install the version that wrote it."
        )
    return state


@contextmanager
def replaced(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to, which then takes the place of another at once.

    It lies in the same folder and is on the disk before it does. If anything fails, it is removed
    and the other is as it was. What processes that were killed have left is removed an hour later.

    Args:
        path: The file that is replaced; a link leads to it.
    """
    target = Path(path).resolve()
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp")
    _remove_left(target)
    try:
        with open(temporary, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync(target.parent)


def _remove_left(target: Path) -> None:
    """Removes what processes that died while they wrote a file have left."""
    for temporary in target.parent.glob(f"{glob.escape(target.name)}.{'[0-9a-f]' * 8}.tmp"):
        with suppress(OSError):
            if time.time() - temporary.stat().st_mtime > LEFT_AFTER:
                temporary.unlink()


def _sync(folder: Path) -> None:
    """Writes the names in a folder to the disk, where the system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _check_whole(path: str | Path, file: BinaryIO) -> None:
    """Compares a file with its checksums, which PyTorch writes and doesn't read.

    Raises:
        ValueError: It is damaged, or of another kind.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except Exception as error:  # of any kind, as files may hold anything
        raise ValueError(
            f"Can't load {path}: it is empty, cut off or no checkpoint. Take another one."
        ) from error
    if damaged is not None:
        raise ValueError(
            f"Can't load {path}: it is damaged, as the checksum of '{damaged}' tells. Take another "
            "one."
        )
    file.seek(0)
