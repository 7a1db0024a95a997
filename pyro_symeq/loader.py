"""Batches of data that lie on the device already."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_symeq.checks import check_count

__all__ = ["TensorLoader"]


class TensorLoader:
    r"""Batches of the rows of tensors, shuffled on the device that holds them.

    A loop over it is an epoch, which gives each row once. Its order is drawn when it begins, by
    the device, for which the host never waits. One tensor gives batches that are tensors. Several
    give tuples, in which rows that belong together stay together.

    The ``state_dict()`` of a training covers the default generator of the device, which draws the
    order. A training that is resumed between two epochs meets the same batches.

    Args:
        tensors: The data, with a row for each example.
        batch_size: The number of rows in a batch.
        shuffle: Whether the rows come in a random order. Otherwise batches are views: to write to
            one is to change the data.
        drop_last: Whether to leave out the last batch of an epoch where it would be smaller. Then
            all batches have one shape, as a step that is captured in a CUDA graph needs.
        generator: Draws the order in the place of the default generator, on the same device. A
            ``state_dict()`` doesn't hold its state.

    Attributes:
        num_rows: The number of rows of the data.

    Raises:
        TypeError: There are no data, or something else than tensors.
        ValueError: The tensors have different numbers of rows or none, lie on different devices,
            or not on that of the generator; or ``batch_size`` is no count, or leaves no batch.

    Example:
        >>> x, y = torch.arange(10.0).unsqueeze(-1), torch.arange(10)
        >>> loader = TensorLoader(x, y, batch_size=4)
        >>> loader, len(loader)
        (TensorLoader(2 tensors of 10 rows, batch_size=4), 3)
        >>> [len(x_batch) for x_batch, y_batch in loader]
        [4, 4, 2]
    """

    def __init__(
        self,
        *tensors: Tensor,
        batch_size: int,
        shuffle: bool = True,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        check_count("batch_size", batch_size, at_least=1)
        self.num_rows = _check_tensors(tensors)
        if drop_last and batch_size > self.num_rows:
            raise ValueError(
                f"Expected batch_size to be at most the number of rows, {self.num_rows}, got "
                f"{batch_size}: with drop_last=True there would be no batch. Make the batches "
                "smaller, or leave drop_last= out."
            )
        kind = tensors[0].device.type
        if generator is not None and generator.device.type != kind:
            raise ValueError(
                f"Expected the generator to be on the device of the data, {kind!r}, got one on "
                f"{generator.device.type!r}. Make it there: torch.Generator({kind!r})."
            )
        self.tensors = tensors
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.generator = generator

    def __len__(self) -> int:
        rest = 0 if self.drop_last else self.batch_size - 1
        return (self.num_rows + rest) // self.batch_size

    def __iter__(self) -> Iterator[Any]:
        order = None
        if self.shuffle:
            device = self.tensors[0].device
            order = torch.randperm(self.num_rows, device=device, generator=self.generator)
        return (self._batch(order, number) for number in range(len(self)))

    def _batch(self, order: Tensor | None, number: int) -> Tensor | tuple[Tensor, ...]:
        rows = slice(number * self.batch_size, (number + 1) * self.batch_size)
        if order is None:
            batch = tuple(tensor[rows] for tensor in self.tensors)
        else:
            batch = tuple(tensor.index_select(0, order[rows]) for tensor in self.tensors)
        return batch if len(batch) > 1 else batch[0]

    def __repr__(self) -> str:
        count = "1 tensor" if len(self.tensors) == 1 else f"{len(self.tensors)} tensors"
        return f"TensorLoader({count} of {self.num_rows} rows, batch_size={self.batch_size})"


def _check_tensors(tensors: tuple[Tensor, ...]) -> int:
    """Counts the rows, which all tensors have in common."""
    if not tensors:
        raise TypeError(
            "Expected at least one tensor, got none. Give the data first: "
            "TensorLoader(x, batch_size=100)."
        )
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"Expected the data to be tensors, got {type(tensor).__name__}. Convert an array "
                "or a list of numbers by torch.as_tensor, and give several tensors one by one: "
                "TensorLoader(x, y, batch_size=100)."
            )
    if len({tensor.device for tensor in tensors}) > 1:
        raise ValueError(
            f"Expected all tensors on one device, got {[str(t.device) for t in tensors]}. Move "
            "them with .to(device)."
        )
    counts = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    if len(counts) > 1 or 0 in counts:
        raise ValueError(
            "Expected all tensors to have as many rows, at least one, got the shapes "
            f"{[tuple(tensor.shape) for tensor in tensors]}. The first dimension numbers the "
            "examples."
        )
    return counts.pop()
