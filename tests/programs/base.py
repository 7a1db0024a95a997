"""What a program of the matrix is, and the register of them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

PROGRAMS = {}  # name: a function that makes the program, with fresh parameters


@dataclass
class Program:
    """A pair with its calls.

    Args:
        model: The decoder's program.
        guide: The encoder's program.
        args: What both take in the first call.
        kwargs: Likewise.
        options: Those of SymmetricUtility.
        data: The tensors that no dream may show; the first argument if not given.
        labels: The values by which a scored run of the guide at the data is known, by site.
        later: Further calls, as pairs of args and kwargs.
        is_sum: Whether each utility is the sum of all log-probabilities in the scored runs.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    data: tuple[Tensor, ...] | None = None
    labels: dict[str, Tensor] = field(default_factory=dict)
    later: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...] = ()
    is_sum: bool = True

    def __post_init__(self):
        if self.data is None:
            self.data = (self.args[0],)

    @property
    def calls(self):
        return [(self.args, self.kwargs), *self.later]


def program(make):
    PROGRAMS[_title(make)] = make
    return make


def variants(cases):
    """Registers one program for each case, which the maker takes."""

    def register(make):
        for name, case in cases.items():
            PROGRAMS[f"{_title(make)}, {name}"] = functools.partial(make, case)
        return make

    return register


def _title(make):
    theme = make.__module__.rpartition(".")[2]
    return f"{theme}: {make.__name__.replace('_', ' ')}"
