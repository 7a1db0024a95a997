"""The strategy of a player: the values of its parameters, and the optimiser that moves them."""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_symeq.grouped import Grouped, Merged, torch_optimizer

State = dict[str, Any]


class Strategy:
    """The parameters of a player, and the optimiser that moves them.

    Args:
        name: The name of the player.
        optim: The optimiser, which may be other players' too.
        is_captured: Whether moves are to be recorded in a CUDA graph.
    """

    def __init__(self, name: str, optim: PyroOptim, is_captured: bool = False) -> None:
        self.name = name
        self.optim = optim
        self.grouped = Grouped(optim, is_captured)
        self.parameters: dict[str, Tensor] = {}
        self.pending: State = {"parameters": {}, "optim": {}}
        self.resumed = False
        self._before: dict[Tensor, tuple[Tensor, State | None]] | None = None

    def adopt(self, parameters: Mapping[str, Tensor]) -> bool:
        """Takes note of parameters; new ones get the loaded values that wait for their names.

        Returns:
            Whether any value was set.
        """
        new = {name: leaf for name, leaf in parameters.items() if name not in self.parameters}
        self.parameters.update(parameters)
        waiting = [name for name in new if name in self.pending["parameters"]]
        if self.resumed and len(waiting) < len(new):
            warnings.warn(
                f"The loaded state has no values for these parameters of the {self.name}, which "
                f"keep their initial ones: {sorted(new.keys() - set(waiting))}.",
                stacklevel=2,
            )
        for name in waiting:
            self._set(name, self.pending["parameters"].pop(name), self.pending["optim"])
        return bool(waiting)

    def move(
        self,
        parameters: Mapping[str, Tensor],
        gradients: Sequence[Tensor | None],
        found_inf: Tensor | None = None,
    ) -> None:
        """Lets the optimiser take a step along the gradients of the negative utility.

        Args:
            parameters: The parameters that move.
            gradients: Their gradients.
            found_inf: A number on their device; fused optimisers stay where they are if it's 1.
        """
        by_leaf = dict(zip(parameters.values(), gradients, strict=True))  # names may share one
        for leaf in by_leaf:
            self._note(leaf)
        try:
            for leaf, gradient in by_leaf.items():
                leaf.grad = gradient
            self.grouped(list(by_leaf), found_inf)
        finally:
            for leaf in by_leaf:
                leaf.grad = None

    def merged(self, parameters: Mapping[str, Tensor]) -> Merged:
        """The optimisers of parameters that have moved, merged."""
        return self.grouped.merged(list(dict.fromkeys(parameters.values())))

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Takes moves back when an error follows."""
        self._before = {}
        try:
            yield
        except BaseException:
            self._take_back()
            raise
        finally:
            self._before = None

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Takes moves back at the end, and forgets parameters that have come up."""
        parameters, pending = dict(self.parameters), copy.deepcopy(self.pending)
        self._before = {}
        try:
            yield
        finally:
            self._take_back()
            self._before = None
            self.parameters, self.pending = parameters, pending

    def _note(self, leaf: Tensor) -> None:
        """Keeps what a parameter is before it first moves, if moves may be taken back."""
        if self._before is not None and leaf not in self._before:
            self._before[leaf] = leaf.detach().clone(), self._memory(leaf)

    def _take_back(self) -> None:
        for leaf, (value, memory) in (self._before or {}).items():
            leaf.detach().copy_(value)
            if memory is None:
                self.optim.optim_objs.pop(leaf, None)
            else:
                optimizer = torch_optimizer(self.optim.optim_objs[leaf])
                optimizer.state[leaf] = memory["state"]
                optimizer.param_groups[0].update(memory["settings"])

    def _memory(self, leaf: Tensor) -> State | None:
        """What the optimiser of a parameter remembers: its averages, and its settings by now."""
        if leaf not in self.optim.optim_objs:
            return None
        optimizer = torch_optimizer(self.optim.optim_objs[leaf])
        settings = {key: x for key, x in optimizer.param_groups[0].items() if key != "params"}
        state = {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in optimizer.state[leaf].items()
        }
        return {"state": state, "settings": settings}

    def state_dict(self) -> State:
        """Copies the parameters (unconstrained) and the optimiser's state, by parameter name."""
        optimizers = self.optim.optim_objs
        state = {
            "parameters": {name: leaf.detach() for name, leaf in self.parameters.items()},
            "optim": {
                name: _optimizer_state(optimizers[leaf])
                for name, leaf in self.parameters.items()
                if leaf in optimizers
            },
        }
        return copy.deepcopy({key: state[key] | self.pending[key] for key in state})

    def check(self, state: State) -> None:
        """Compares the parameters with those of a state.

        Raises:
            ValueError: The state is not of these parameters.
        """
        if state.keys() != self.pending.keys():
            raise ValueError(
                f"Expected the state of the {self.name} to have the keys {sorted(self.pending)}, "
                f"got {sorted(state)}."
            )
        expected = {name: tuple(leaf.shape) for name, leaf in self.parameters.items()}
        got = {name: tuple(value.shape) for name, value in state["parameters"].items()}
        differing = sorted(n for n in expected if got.get(n) != expected[n])
        if differing:
            raise ValueError(
                f"The state doesn't fit the parameters of the {self.name}. Expected "
                f"{ {n: expected[n] for n in differing} }, got "
                f"{ {n: got.get(n, 'nothing') for n in differing} }. Load a state of the same "
                "programs."
            )

    def load_state_dict(self, state: State) -> None:
        """Sets known parameters, and keeps the rest for when the programs touch them."""
        self.resumed = True
        self.pending = copy.deepcopy({key: dict(state[key]) for key in self.pending})
        for name in self.parameters:
            self._set(name, self.pending["parameters"].pop(name), self.pending["optim"])

    def _set(self, name: str, value: Tensor, optimizers: State) -> None:
        leaf = self.parameters[name]
        if leaf.shape != value.shape:
            raise ValueError(
                f"The loaded value of parameter '{name}' of the {self.name} has shape "
                f"{tuple(value.shape)}; expected {tuple(leaf.shape)}."
            )
        self._note(leaf)
        with torch.no_grad():
            leaf.copy_(value)
        self.optim.optim_objs.pop(leaf, None)
        if name in optimizers:
            leaf.grad = None
            self.optim([leaf])  # without a gradient, only creates the optimiser
            _load_optimizer_state(self.optim.optim_objs[leaf], optimizers.pop(name))


def _optimizer_state(optimizer: Any) -> State:
    inner = torch_optimizer(optimizer)
    state = {"optimizer": inner.state_dict()}
    return state if inner is optimizer else state | {"scheduler": optimizer.state_dict()}


def _load_optimizer_state(optimizer: Any, state: State) -> None:
    torch_optimizer(optimizer).load_state_dict(state["optimizer"])
    if "scheduler" in state:
        optimizer.load_state_dict(state["scheduler"])
