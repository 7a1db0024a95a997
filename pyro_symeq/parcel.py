"""Rows of several variables as plain bytes, in a form that sender and receiver have agreed on.

The bytes are those of the elements, variable after variable in the order of their names. Form and
number of rows are known beforehand, so they hold nothing else, and nothing in them is executed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__: list[str] = []


@dataclass(frozen=True)
class Form:
    """What the rows of a variable look like.

    Args:
        shape: The shape of a row.
        dtype: The type of its elements.
        device: Where the rows are to be.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, rows: Tensor) -> "Form":
        """The form of some rows."""
        return cls(tuple(rows.shape[1:]), rows.dtype, rows.device)

    def told(self) -> dict[str, Any]:
        """What others should know of it, as JSON takes it."""
        return {"shape": list(self.shape), "dtype": str(self.dtype).removeprefix("torch.")}

    @property
    def num_bytes(self) -> int:
        """The number of bytes of a row."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def pack(forms: Mapping[str, Form], values: Mapping[str, Tensor], num_rows: int) -> bytes:
    """Writes rows of variables.

    Args:
        forms: The forms of the variables that are wanted.
        values: Their values, in forms that may differ in how a row is folded.
        num_rows: The number of rows.

    Raises:
        ValueError: A variable is missing, or has rows of another size.
    """
    return b"".join(_bytes(name, forms[name], values, num_rows) for name in sorted(forms))


def unpack(forms: Mapping[str, Form], parcel: bytes, num_rows: int) -> dict[str, Tensor]:
    """Reads rows of variables.

    Args:
        forms: The forms of the variables.
        parcel: The bytes that :func:`pack` wrote.
        num_rows: The number of rows.

    Raises:
        ValueError: There are more bytes or fewer.
    """
    sizes = {name: num_rows * forms[name].num_bytes for name in sorted(forms)}
    if len(parcel) != sum(sizes.values()):
        raise ValueError(
            f"Expected {num_rows} rows of {sorted(forms)} in {sum(sizes.values())} bytes, got "
            f"{len(parcel)} bytes. Somebody else writes to the store; give each run its own."
        )
    values, start = {}, 0
    for name, size in sizes.items():
        form, part = forms[name], bytearray(parcel[start : start + size])
        flat = torch.frombuffer(part, dtype=form.dtype) if size else torch.empty(0)
        values[name] = flat.reshape(num_rows, *form.shape).to(form.device, form.dtype)
        start += size
    return values


def _bytes(name: str, form: Form, values: Mapping[str, Tensor], num_rows: int) -> bytes:
    value = values.get(name)
    shape = (num_rows, *form.shape)
    if value is None or value.numel() != torch.Size(shape).numel():
        got = "nothing" if value is None else f"shape {tuple(value.shape)}"
        raise ValueError(
            f"Expected the model to dream site '{name}' with shape {shape}, as at the start, got "
            f"{got}. Rows have one shape throughout a run: pad what varies."
        )
    flat = value.reshape(-1).to("cpu", form.dtype)
    return flat.view(torch.uint8).numpy().tobytes()
