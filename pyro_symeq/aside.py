"""Programs that run on the side, and leave no trace."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from pyro_symeq import randomness

Keep = Callable[[Iterable[Tensor]], None]


@contextmanager
def aside() -> Iterator[None]:
    """Runs programs on the side: random states and module buffers end as they were."""
    with randomness.kept(), buffers_kept(), torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def buffers_kept(only_on_error: bool = False) -> Iterator[Keep]:
    """Lets module buffers, such as running averages, end as they were.

    A module may change a buffer in place or, in its ``forward``, put another tensor there.

    Args:
        only_on_error: Whether to do so only if an error, or an interrupt, comes.

    Yields:
        What keeps the buffers of modules that are used without being called.
    """
    buffers: dict[Tensor, Tensor] = {}
    places: dict[tuple[torch.nn.Module, str], Tensor | None] = {}
    replaced: set[tuple[torch.nn.Module, str]] = set()
    is_over = False

    def keep(others: Iterable[Tensor]) -> None:
        for buffer in others:
            if buffer not in buffers:
                buffers[buffer] = buffer.detach().clone()

    def keep_those_of(module: torch.nn.Module, _: Any) -> None:
        for name, buffer in module._buffers.items():
            if (module, name) not in replaced:
                places[module, name] = buffer
                keep([] if buffer is None else [buffer])

    def note_replaced(module: torch.nn.Module, _: Any, __: Any) -> None:
        for name, buffer in module._buffers.items():
            if buffer is not places.get((module, name), buffer):
                replaced.add((module, name))

    hooks = [
        register_module_forward_pre_hook(keep_those_of),
        register_module_forward_hook(note_replaced, always_call=True),
    ]
    try:
        yield keep
        is_over = True
    finally:
        for hook in hooks:
            hook.remove()
        if not (is_over and only_on_error):
            for module, name in replaced:
                module._buffers[name] = places[module, name]
            for buffer, before in buffers.items():
                buffer.detach().copy_(before)
