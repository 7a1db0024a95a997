r"""Which argument of the programs holds the value of which observed site.

When the encoder dreams, the guide must be called with the *dreamed* :math:`x` in the place of the
real one. That place is a leaf of ``(args, kwargs)``, however deep in tuples, lists, dicts and
dataclasses, and is written as a path: the keys that lead to it. A leaf holds a site's value if the
``obs=`` value is that tensor, a view of it or of a part of it, or a reshape or cast of all of it.
"""

import copy
import dataclasses
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

Path = tuple[Any, ...]
Program = Callable[..., Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]  # args, kwargs
Kind = Literal["itself", "view", "copy", "pick", "told"]


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Walks over what a nest of containers holds, with the path to each leaf."""
    if isinstance(tree, (tuple, list)):
        for i, branch in enumerate(tree):
            yield from leaves(branch, (*path, i))
    elif isinstance(tree, Mapping):
        for key, branch in tree.items():
            yield from leaves(branch, (*path, key))
    elif _is_dataclass(tree):
        for field in dataclasses.fields(tree):
            yield from leaves(getattr(tree, field.name), (*path, field.name))
    else:
        yield path, tree


def _is_dataclass(tree: Any) -> bool:
    return dataclasses.is_dataclass(tree) and not isinstance(tree, type)


def put(tree: Any, path: Path, value: Any) -> Any:
    """Copies the containers along a path and puts a value at its end."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(tree, (tuple, list)):
        branches = list(tree)
        branches[key] = put(branches[key], rest, value)
        return _of_branches(tree, branches)
    if isinstance(tree, Mapping):
        return _with_item(tree, key, put(tree.get(key), rest, value))
    return _with_field(tree, key, put(getattr(tree, key), rest, value))


def _of_branches(like: Any, branches: list[Any]) -> Any:
    """A list or a tuple, be it a named one, of the kind of another."""
    make = type(like)
    return make(*branches) if hasattr(like, "_fields") else make(branches)


def _with_item(tree: Mapping[Any, Any], key: Any, value: Any) -> Any:
    """A copy of a mapping with another value at a key.

    Raises:
        ValueError: It can neither be changed nor be made of items.
    """
    if isinstance(tree, MutableMapping):
        twin = _twin(tree)
        twin[key] = value
        return twin
    try:
        return type(tree)({**tree, key: value})  # type: ignore[call-arg]
    except TypeError as error:
        raise ValueError(
            f"Expected mappings that a dream can be put into a copy of, got {type(tree).__name__}, "
            "which can't be changed. Pass a dict."
        ) from error


def _twin(tree: MutableMapping[Any, Any]) -> MutableMapping[Any, Any]:
    """A copy of a mapping that holds the same values, and through which the mapping isn't changed.

    A shallow copy of a class of one's own may share what holds its items.
    """
    if not isinstance(tree, dict) and not hasattr(tree, "__copy__"):
        return copy.deepcopy(tree, {id(value): value for value in tree.values()})
    twin = copy.copy(tree)
    if getattr(tree, "__dict__", None) is tree:  # its items are its attributes, too
        twin.__dict__ = twin  # type: ignore[assignment]
    return twin


def own(tree: Any) -> Any:
    """Copies the containers of a nest, so that what is left in the copies is in no others."""
    if isinstance(tree, tuple):
        branches = [own(branch) for branch in tree]
        if all(map(operator.is_, branches, tree)):
            return tree
        return _of_branches(tree, branches)
    if isinstance(tree, (list, MutableMapping)):
        twin = copy.copy(tree) if isinstance(tree, list) else _twin(tree)
        for key, branch in enumerate(tree) if isinstance(tree, list) else tree.items():
            if (inner := own(branch)) is not branch:
                twin[key] = inner
        return twin
    if _is_dataclass(tree) and not isinstance(tree, nn.Module):
        twin = copy.copy(tree)
        for field in dataclasses.fields(tree):
            object.__setattr__(twin, field.name, own(getattr(tree, field.name)))
        return twin
    return tree


def _with_field(tree: Any, name: str, value: Any) -> Any:
    """A copy of an object with another value in a field.

    What a dataclass computes of its fields is computed anew, unless that would change others or
    it has been changed since.
    """
    if _is_dataclass(tree):
        fields = {field.name: field.init for field in dataclasses.fields(tree)}
        expected = {key: getattr(tree, key) for key in fields if fields[key]} | {name: value}
        try:
            twin = dataclasses.replace(tree, **{name: value})
            if all(getattr(twin, key) is x for key, x in expected.items()):
                if computed := fields.keys() - expected.keys():
                    _keep_changed(tree, computed, twin)
                return twin
        except (TypeError, ValueError):  # it can't be made of its fields, or not of these
            pass
    twin = copy.copy(tree)
    object.__setattr__(twin, name, value)
    return twin


def _keep_changed(tree: Any, computed: Iterable[str], twin: Any) -> None:
    """Hands over what has been put into fields since a dataclass computed them."""
    same = dataclasses.replace(tree)
    for name in computed:
        held = getattr(tree, name)
        if not _alike(held, getattr(same, name, None)):
            object.__setattr__(twin, name, held)


def _alike(a: Any, b: Any) -> bool:
    """Whether two values are equal, as far as that can be told."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and equal(a, b)
    try:
        return a is b or bool(a == b)
    except (RuntimeError, ValueError):  # it takes more than one comparison
        return type(a) is type(b)


def get(tree: Any, path: Path) -> Any:
    """Follows a path; ``None`` where an optional argument was not given."""
    for key in path:
        if isinstance(tree, Mapping):
            tree = tree.get(key)
        else:
            tree = tree[key] if isinstance(tree, (tuple, list)) else getattr(tree, key)
    return tree


def layout(tree: Any) -> tuple[tuple[Path, Any], ...]:
    """Tells calls apart by containers, types, switches and what is ``None``.

    A string is a switch (``mode="train"``), and so is whether a number is zero (``ratio=0.0``),
    unless an argument holds it in a tuple or list: there they are data that differ from batch to
    batch, such as the names of files or lengths.
    """
    return tuple((path, _kind(path, leaf)) for path, leaf in leaves(tree))


def _kind(path: Path, leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.dtype
    if leaf is None or isinstance(leaf, bool):
        return leaf
    is_listed = any(isinstance(key, int) for key in path[2:])  # within an argument
    if isinstance(leaf, (int, float)) and not is_listed:
        return type(leaf), leaf == 0
    return leaf if isinstance(leaf, str) and not is_listed else type(leaf)


def module_of(program: Any) -> nn.Module | None:
    """The module that a program is, or whose method it is, perhaps with handlers around it."""
    while program is not None:
        for place in (program, getattr(program, "__self__", None)):
            if isinstance(place, nn.Module):
                return place
        program = getattr(program, "func", getattr(program, "__wrapped__", None))
    return None


def parameters(program: Program) -> list[inspect.Parameter]:
    """What a program takes; of a module, what its ``forward`` does.

    Raises:
        TypeError: It is no function.
        ValueError: It is one that doesn't tell.
    """
    function = program.forward if isinstance(program, torch.nn.Module) else program
    return list(inspect.signature(function).parameters.values())


def open_parameters(program: Program) -> list[inspect.Parameter]:
    """What a program takes that ``functools.partial`` has not fixed by keyword."""
    fixed = program.keywords if isinstance(program, partial) else {}
    return [p for p in parameters(program) if p.name not in fixed]


class Names:
    """Writes paths into ``(args, kwargs)`` as a user does: ``x``, ``batch.image``, ``args.1``."""

    def __init__(self, program: Program) -> None:
        try:
            taken = parameters(program)
        except (TypeError, ValueError):
            taken = []
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.positional = [p.name for p in taken if p.kind in positional]
        self.optional = [p.name for p in taken if p.default is None]

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
    if leaf.numel() != value.numel() or not share_storage(leaf, value):
        return False
    whole = leaf.reshape(value.shape)  # a view, if a value in the same order can be one
    return whole.data_ptr() == value.data_ptr() and _strides(whole) == _strides(value)


def _strides(x: Tensor) -> list[int]:
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def is_part(leaf: Tensor, value: Tensor) -> bool:
    """Whether a value is a view of a tensor, perhaps of some of its elements in another order."""
    if not share_storage(leaf, value) or not _covers(leaf, value):
        return False
    rest = np.full(value.shape, value.storage_offset() - leaf.storage_offset())
    for dim, (size, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
        rest = rest + (np.arange(size) * stride).reshape(-1, *[1] * (value.dim() - dim - 1))
    inside = rest >= 0
    for stride, size in sorted(zip(leaf.stride(), leaf.shape, strict=True), reverse=True):
        if size > 1:
            inside &= rest // stride < size
            rest = rest % stride
    return bool((inside & (rest == 0)).all())


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have elements in memory in common."""
    if not (share_storage(a, b) and a.numel() and b.numel()):
        return False
    starts = [x.storage_offset() for x in (a, b)]
    ends = [start + _extent(x) for start, x in zip(starts, (a, b), strict=True)]
    if max(starts) >= min(ends):
        return False
    marks = torch.zeros(max(ends) - min(starts), dtype=torch.bool, device=a.device)

    def marks_of(x: Tensor) -> Tensor:
        once = [1 if step == 0 else n for n, step in zip(x.shape, x.stride(), strict=True)]
        return marks.as_strided(once, x.stride(), x.storage_offset() - min(starts))

    marks_of(a).fill_(True)
    return bool(marks_of(b).any())


def _covers(leaf: Tensor, value: Tensor) -> bool:
    """Whether the stretch of memory of a value lies in that of a tensor without overlaps."""
    if any(
        stride == 0 for stride, size in zip(leaf.stride(), leaf.shape, strict=True) if size > 1
    ):
        return False
    start = value.storage_offset() - leaf.storage_offset()
    return bool(start >= 0 and start + _extent(value) <= _extent(leaf))


def _extent(x: Tensor) -> int:
    return 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))


def share_storage(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one type lie in the same memory."""
    return (
        is_strided(a)
        and is_strided(b)
        and a.dtype == b.dtype
        and a.device == b.device
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    )


def is_strided(x: Tensor) -> bool:
    """Whether a tensor keeps its elements one by one in memory, as no sparse or nested one does."""
    return x.layout == torch.strided and not x.is_nested


def is_cast(leaf: Tensor, value: Tensor) -> bool:
    """Whether a value can only be a cast, or a reshape with a copy, of a tensor."""
    needs_copy = (
        leaf.dtype != value.dtype or leaf.device != value.device or not leaf.is_contiguous()
    )
    return needs_copy and equal(leaf, value)


def equal(a: Tensor, b: Tensor) -> bool:
    """Compares the elements in order, whatever shape, type and device; NaN equals NaN."""
    if not (is_strided(a) and is_strided(b)) or a.numel() != b.numel():
        return False
    a = a.detach().to(b.device, b.dtype).reshape(b.shape)
    return bool(((a == b) | ((a != a) & (b != b))).all())


def close(a: Tensor, b: Tensor) -> bool:
    """Compares the elements in order, up to the rounding of a floating-point cast."""
    if a.numel() != b.numel():
        return False
    a, b = a.detach().to(b.device).double().flatten(), b.detach().double().flatten()
    size = b[b.isfinite()].abs()
    atol = 1e-2 * min(size.max().item(), 1.0) if size.numel() else 0.0
    return torch.allclose(a, b, rtol=1e-2, atol=atol, equal_nan=True)


def strided(call: Call) -> Iterator[tuple[Path, Tensor]]:
    """The tensors among the arguments that can hold a value: no sparse or nested ones."""
    for path, leaf in leaves(call):
        if isinstance(leaf, Tensor) and is_strided(leaf):
            yield path, leaf


def find(value: Tensor, call: Call) -> list[Path]:
    """Finds the leaves that a value is, is a view of or, if there are none, may be a cast of."""
    tensors = list(strided(call))
    for holds in (same_memory, is_part, is_cast):
        if found := [path for path, leaf in tensors if holds(leaf, value)]:
            return found
    return []


def kind(leaf: Tensor, value: Tensor) -> Kind:
    """How a leaf holds a value."""
    if same_memory(leaf, value):
        return "itself"
    return "view" if is_part(leaf, value) else "copy"


def is_dense(x: Tensor) -> bool:
    """Whether the elements of a tensor fill its stretch of memory, each once."""
    return x.stride() == torch.empty_like(x).stride()


def copied(x: Tensor, stride: tuple[int, ...] | None = None) -> Tensor:
    """Copies a tensor into new memory of the same, or of another, layout."""
    twin = torch.empty_strided(x.shape, stride or x.stride(), dtype=x.dtype, device=x.device)
    return twin.copy_(x)


def substitute(leaf: Tensor, observed: Tensor, dreamed: Tensor, into: Tensor) -> Tensor | None:
    """Puts a dreamed value where an argument held the observed one.

    Args:
        leaf: The argument.
        observed: What the model observed of it.
        dreamed: What takes the place of that, with the same number of elements.
        into: The argument as it is by now; other sites may have filled other parts of it.

    Returns:
        A tensor like the argument, or ``None`` if the dreamed value does not fit.
    """
    is_view = share_storage(leaf, observed) and _covers(leaf, observed)
    if same_memory(leaf, observed) or (not is_view and leaf.numel() == dreamed.numel()):
        return dreamed.to(leaf.dtype).reshape(leaf.shape)
    if not is_view:
        return None
    twin = copied(into, leaf.stride())
    offset = observed.storage_offset() - leaf.storage_offset()
    twin.as_strided(observed.shape, observed.stride(), offset).copy_(
        dreamed.reshape(observed.shape)
    )
    return twin
