r"""Which argument of the programs holds the value of which observed site.

When the encoder dreams, the guide must be called with the *dreamed* :math:`x` in the place of the
real one. That place is a leaf of ``(args, kwargs)``, however deep in tuples, lists, dicts and
dataclasses, and is written as a path: the keys that lead to it. A leaf holds a site's value if the
``obs=`` value is that tensor, a view or reshape of it in the same order, or a cast of it.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

Path = tuple[Any, ...]
Program = Callable[..., Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]  # args, kwargs


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Walks over what a nest of containers holds, with the path to each leaf."""
    if isinstance(tree, (tuple, list)):
        for i, branch in enumerate(tree):
            yield from leaves(branch, (*path, i))
    elif isinstance(tree, Mapping):
        for key, branch in tree.items():
            yield from leaves(branch, (*path, key))
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield from leaves(getattr(tree, field.name), (*path, field.name))
    else:
        yield path, tree


def put(tree: Any, path: Path, value: Any) -> Any:
    """Copies the containers along a path and puts a value at its end."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(tree, (tuple, list)):
        branches = list(tree)
        branches[key] = put(branches[key], rest, value)
        return type(tree)(*branches) if hasattr(tree, "_fields") else type(tree)(branches)
    twin = copy.copy(tree)
    if isinstance(twin, MutableMapping):
        twin[key] = put(tree.get(key), rest, value)
    else:
        object.__setattr__(twin, key, put(getattr(tree, key), rest, value))
    return twin


def get(tree: Any, path: Path) -> Any:
    """Follows a path; ``None`` where an optional argument was not given."""
    for key in path:
        if isinstance(tree, Mapping):
            tree = tree.get(key)
        else:
            tree = tree[key] if isinstance(tree, (tuple, list)) else getattr(tree, key)
    return tree


def layout(tree: Any) -> tuple[tuple[Path, Any], ...]:
    """Tells calls apart by containers, types, switches and what is ``None``."""
    return tuple((path, _kind(leaf)) for path, leaf in leaves(tree))


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.dtype
    return leaf if leaf is None or isinstance(leaf, (bool, str)) else type(leaf)


class Names:
    """Writes paths into ``(args, kwargs)`` as a user does: ``x``, ``batch.image``, ``args.1``."""

    def __init__(self, program: Program) -> None:
        function = program.forward if isinstance(program, torch.nn.Module) else program
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):
            parameters = []
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.positional = [p.name for p in parameters if p.kind in positional]
        self.optional = [p.name for p in parameters if p.default is None]

    def __call__(self, path: Path) -> str:
        """Writes a path."""
        side, key, *rest = path
        if side == 0:
            known = key < len(self.positional)
            rest = [self.positional[key], *rest] if known else ["args", key, *rest]
        else:
            rest = [key, *rest]
        return ".".join(map(str, rest))

    def absent(self, call: Call) -> Iterator[Path]:
        """Paths of the arguments that are ``None``, given so or by default."""
        args, kwargs = call
        yield from (path for path, leaf in leaves(call) if leaf is None)
        given = {*self.positional[: len(args)], *kwargs}
        yield from ((1, name) for name in self.optional if name not in given)


def same_memory(leaf: Tensor, value: Tensor) -> bool:
    """Whether a value is a tensor itself, or a view or reshape of all of it in the same order."""
    if leaf is value:
        return True
    if leaf.numel() != value.numel() or leaf.dtype != value.dtype:
        return False
    if leaf.device != value.device or leaf.data_ptr() != value.data_ptr():
        return False
    return leaf.reshape(value.shape).stride() == value.stride() or equal(leaf, value)


def same_cast(leaf: Tensor, value: Tensor) -> bool:
    """Whether a value can only be a cast, or a reshape with a copy, of a tensor."""
    needs_copy = (
        leaf.dtype != value.dtype or leaf.device != value.device or not leaf.is_contiguous()
    )
    return needs_copy and equal(leaf, value)


def equal(a: Tensor, b: Tensor) -> bool:
    """Compares the elements in order, whatever shape, type and device; NaN equals NaN."""
    if a.numel() != b.numel():
        return False
    a = a.detach().to(b.device, b.dtype).reshape(b.shape)
    return bool(((a == b) | ((a != a) & (b != b))).all())


def close(a: Tensor, b: Tensor) -> bool:
    """Compares the elements in order, up to the rounding of a floating-point cast."""
    return a.numel() == b.numel() and torch.allclose(
        a.detach().to(b.device).double().flatten(),
        b.detach().double().flatten(),
        rtol=1e-2,
        atol=1e-2,
        equal_nan=True,
    )


def find(value: Tensor, call: Call) -> list[Path]:
    """Finds the leaves that share a value's memory or, if none does, that it may be a cast of."""
    tensors = [(path, leaf) for path, leaf in leaves(call) if isinstance(leaf, Tensor)]
    for holds in (same_memory, same_cast):
        if found := [path for path, leaf in tensors if holds(leaf, value)]:
            return found
    return []


def fit(site: str, value: Tensor, leaf: Tensor | None, name: str) -> Tensor:
    """Gives a dreamed value the shape and type of the argument that it stands in for.

    Raises:
        ValueError: The number of elements differs.
    """
    if leaf is None:
        return value
    if leaf.numel() != value.numel():
        raise ValueError(
            f"The model dreams site '{site}' with shape {tuple(value.shape)}, which does not fit "
            f"the argument '{name}' with shape {tuple(leaf.shape)}. Let the model draw as much as "
            "it observes (check its plates and event dimensions), or pass bind=, a function "
            "(trace, args, kwargs) -> (args, kwargs)."
        )
    return value.to(leaf.dtype).reshape(leaf.shape)
