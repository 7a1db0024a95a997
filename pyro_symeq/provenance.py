r"""Which elements of which argument a value is made of, found by following a program's tensors.

A program may observe a copy of a part of an argument, such as the rows ``x[ind]`` of a subsample.
Memory does not tell where a copy came from. So while the program runs, the functions that lead
from its arguments to its values are noted. A value that only *picks* elements of an argument can
then be replaced there: the picks are retraced backwards.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_symeq.binding import Call, Path, leaves, share_storage

CASTS = frozenset("bfloat16 cpu cuda double float half int long short to type type_as".split())
IN_ORDER = CASTS | frozenset(
    "clone contiguous detach flatten ravel reshape reshape_as squeeze unflatten unsqueeze view "
    "view_as".split()
)
VIEWS = frozenset(
    "T chunk mT movedim narrow permute select split swapaxes swapdims t tensor_split transpose "
    "unbind".split()
)
INDEXED = frozenset(
    "__getitem__ flip gather index_select masked_select roll take take_along_dim".split()
)


def name_of(function: Any) -> str:
    """The name of a function or property of tensors."""
    name = getattr(function, "__name__", "")
    return function.__self__.__name__ if name == "__get__" else name


@dataclass(frozen=True)
class Pick:
    """A function that takes some elements of a tensor, in some order.

    Args:
        function: A function of the tensor and of more arguments.
        args: The arguments after the tensor.
        kwargs: The keyword arguments.
        output: Which of several outputs is meant.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: int | None

    @property
    def name(self) -> str:
        """The name of the function."""
        return name_of(self.function)

    def __call__(self, x: Tensor) -> Tensor:
        """The elements that are taken."""
        result = self.function(x, *self.args, **self.kwargs)
        return result if self.output is None else result[self.output]

    def put_back(self, x: Tensor, part: Tensor) -> None:
        """Copies elements to where they would be taken from."""
        if self.name == "__getitem__":
            x[self.args[0]] = part
        elif self.name in INDEXED:
            numbers = torch.arange(x.numel(), device=x.device).reshape(x.shape)
            x.put_(self(numbers), part)
        elif self.name in CASTS:  # what stays the same is not rounded
            x.copy_(torch.where(part == self(x), x, part.to(x.dtype)))
        else:
            x.copy_(part.reshape(x.shape))


Picks = tuple[Pick, ...]


def take(x: Tensor, picks: Picks) -> Tensor:
    """The elements that a chain of picks takes."""
    for pick in picks:
        x = pick(x)
    return x


def put_back(x: Tensor, picks: Picks, value: Tensor) -> None:
    """Writes values to the elements that a chain of picks takes, in place."""
    if not picks:
        x.copy_(value.reshape(x.shape))
        return
    part = picks[0](x)
    put_back(part, picks[1:], value)
    if not share_storage(x, part):
        picks[0].put_back(x, part)


def subsampled_dim(x: Tensor, chains: list[Picks], size: int, index: Tensor) -> int | None:
    """The dimension of a size along which chains of picks take the elements of an index."""
    for dim in (dim for dim in range(x.dim()) if x.shape[dim] == size):
        numbers = torch.arange(size, device=x.device).reshape(-1, *[1] * (x.dim() - dim - 1))
        numbers = numbers.expand(x.shape)
        taken = [take(numbers, tuple(p for p in c if p.name not in CASTS)) for c in chains]
        if torch.equal(torch.cat([t.flatten() for t in taken]).unique(), index.sort().values):
            return dim
    return None


@dataclass(frozen=True)
class Origin:
    """Where a value comes from.

    Args:
        paths: The arguments that it was computed from.
        path: The argument whose elements it takes, if it is not computed.
        picks: How it takes them.
    """

    paths: frozenset[Path]
    path: Path | None = None
    picks: Picks = ()


UNKNOWN = Origin(frozenset())


class follow(TorchFunctionMode):  # noqa: N801
    """Notes where tensors come from that a program makes from its arguments."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        # The tensors are kept, so that no other one gets the id of any.
        self._origins: dict[int, tuple[Tensor, Origin]] = {}
        for path, leaf in leaves(call):
            if isinstance(leaf, Tensor):
                self._origins[id(leaf)] = leaf, Origin(frozenset({path}), path)

    def origin(self, value: Tensor) -> Origin:
        """Where a value comes from."""
        return self._origins[id(value)][1] if id(value) in self._origins else UNKNOWN

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        paths = frozenset[Path]().union(
            *(self.origin(x).paths for _, x in leaves((args, kwargs)) if isinstance(x, Tensor))
        )
        if paths:
            self._note(func, args, kwargs, result, paths)
        return result

    def _note(
        self, func: Any, args: Any, kwargs: dict[str, Any], result: Any, paths: frozenset[Path]
    ) -> None:
        name, x = name_of(func), args[0] if args and isinstance(args[0], Tensor) else None
        source = UNKNOWN if x is None else self.origin(x)
        if x is not None and _changes(name, x, result):
            self._origins[id(x)] = x, Origin(paths)
            return
        is_pick = source.path is not None and name in IN_ORDER | VIEWS | INDEXED
        for output, value in _outputs(result):
            if id(value) in self._origins:  # the function has returned its own argument
                continue
            origin = Origin(paths)
            if is_pick:
                pick = Pick(func, tuple(args[1:]), kwargs, output)
                origin = Origin(paths, source.path, (*source.picks, pick))
            self._origins[id(value)] = value, origin


def may_change(name: str) -> bool:
    """Whether a function may change its argument in place, as ``add_`` and ``x += 1`` do."""
    is_underscored = name.endswith("_") and not name.endswith("__")
    return name == "__setitem__" or is_underscored or name.startswith("__i")


def _changes(name: str, x: Tensor, result: Any) -> bool:
    return may_change(name) and (not name.startswith("__i") or result is x)


def _outputs(result: Any) -> Iterator[tuple[int | None, Tensor]]:
    if isinstance(result, Tensor):
        yield None, result
    elif isinstance(result, (tuple, list)):
        yield from ((i, value) for i, value in enumerate(result) if isinstance(value, Tensor))
