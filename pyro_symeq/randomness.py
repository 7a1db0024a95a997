"""The states of all random number generators that a program may draw from."""

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import numpy as np
import torch

State = dict[str, Any]


@contextmanager
def kept() -> Iterator[None]:
    """Lets all generators end as they were."""
    state = get_state()
    try:
        yield
    finally:
        set_state(state)


def get_state() -> State:
    """Reads the generators of torch (on every device in use), numpy and Python.

    Returns:
        Tensors, numbers and containers only, so that ``torch.load`` reads it with
        ``weights_only=True``.
    """
    kind, keys, *rest = cast(Any, np.random.get_state())
    return {
        "torch": torch.get_rng_state(),
        "accelerator": _accelerator().get_rng_state_all() if _in_use() else [],
        "numpy": [kind, torch.from_numpy(keys.astype("int64")), *rest],
        "random": random.getstate(),
    }


def set_state(state: State) -> None:
    """Sets the generators to a state from :func:`get_state`.

    Devices that it lacks keep theirs, and what it holds of devices that aren't there is ignored.
    """
    torch.set_rng_state(state["torch"].cpu())
    module = _accelerator()
    if state["accelerator"] and hasattr(module, "set_rng_state_all"):
        there = state["accelerator"][: module.device_count()]
        module.set_rng_state_all([s.cpu() for s in there])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype("uint32"), *rest))
    version, internal, gauss = state["random"]
    random.setstate((version, tuple(internal), gauss))


def mark() -> Callable[[], None]:
    """Marks where the generators of torch stand, that of the current device among them.

    It is cheap enough for each run of a program. A CUDA graph that is being captured keeps its own.

    Returns:
        What takes them back there.
    """
    state, module = torch.get_rng_state(), _accelerator()
    if not _in_use() or (module is torch.cuda and torch.cuda.is_current_stream_capturing()):
        return partial(torch.set_rng_state, state)
    on_device = module.get_rng_state()

    def take_back() -> None:
        torch.set_rng_state(state)
        module.set_rng_state(on_device)

    return take_back


def seed(*numbers: int) -> None:
    """Seeds all generators, so that they have nothing to do with those of other numbers."""
    digest = hashlib.blake2b(repr(numbers).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big"))
    np.random.seed(np.frombuffer(digest[8:40], dtype="<u4"))
    random.seed(digest[40:])


def _accelerator() -> Any:
    return torch.get_device_module()


def _in_use() -> bool:
    module = _accelerator()
    return hasattr(module, "get_rng_state_all") and module.is_initialized()
