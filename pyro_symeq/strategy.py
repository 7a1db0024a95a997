"""The strategy of a player: the values of its parameters, and the optimiser that moves them."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_symeq.callers import stacklevel
from pyro_symeq.grouped import Grouped, Merged, torch_optimizer

State = dict[str, Any]


@dataclass(frozen=True)
class _Before:
    """What a parameter was before it moved, and its optimiser.

    Args:
        value: Its value.
        kept: What the ``PyroOptim`` kept for it, if it had moved before.
        state: What that remembered: averages, say.
        settings: The settings of that.
    """

    value: Tensor
    kept: Any = None
    state: State = field(default_factory=dict)
    settings: State = field(default_factory=dict)


class Strategy:
    """The parameters of a player, and the optimiser that moves them.

    Args:
        name: The name of the player.
        optim: The optimiser, which may be other players' too.
        is_captured: Whether moves are to be recorded in a CUDA graph.
        parameters: The parameters that are known from the start.
    """

    def __init__(
        self,
        name: str,
        optim: PyroOptim,
        is_captured: bool = False,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.name = name
        self.optim = optim
        self.grouped = Grouped(optim, is_captured)
        self.parameters = dict(parameters or {})
        self.pending: State = {"parameters": {}, "optim": {}}
        self.resumed = False
        self._before: dict[Tensor, _Before] | None = None

    def adopt(self, parameters: Mapping[str, Tensor]) -> bool:
        """Takes note of parameters; new ones get the loaded values that wait for their names.

        Returns:
            Whether any value was set.

        Raises:
            ValueError: These have other shapes; no value was set.
        """
        self.check_waiting(parameters)
        new = self._new(parameters)
        self.parameters.update(parameters)
        waiting = [name for name in new if name in self.pending["parameters"]]
        if self.resumed and len(waiting) < len(new):
            warnings.warn(
                f"The loaded state has no values for these parameters of the {self.name}, which "
                f"keep their initial ones: {sorted(new.keys() - set(waiting))}.",
                stacklevel=stacklevel(),
            )
        for name in waiting:
            self._set(name, self.pending["parameters"].pop(name))
        self._resume(parameters)
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

        Raises:
            ValueError: The optimiser goes by names that parameters lack; none has moved.
        """
        self._refuse_nameless(parameters)
        by_leaf = dict(zip(parameters.values(), gradients, strict=True))  # names may share one
        self.remember(by_leaf)
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

    def remember(self, leaves: Iterable[Tensor]) -> None:
        """Keeps what parameters are before they first move, if moves may be taken back."""
        if self._before is not None:
            for leaf in leaves:
                if leaf not in self._before:
                    self._before[leaf] = self._look_at(leaf)

    @contextmanager
    def undone(self, only_on_error: bool = False) -> Iterator[None]:
        """Takes moves and loaded values back at the end, and forgets parameters that have come up.

        Args:
            only_on_error: Whether to do so only if an error, or an interrupt, comes.
        """
        waiting = {key: dict(values) for key, values in self.pending.items()}
        before = dict(self.parameters), waiting, self.resumed
        self._before = {}
        is_over = False
        try:
            yield
            is_over = True
        finally:
            if not (is_over and only_on_error):
                self.take_back()
                self.parameters, self.pending, self.resumed = before
            self._before = None

    def take_back(self) -> None:
        """Takes back the moves since it began to remember."""
        for leaf, before in (self._before or {}).items():
            leaf.detach().copy_(before.value)
            if before.kept is None:
                self.optim.optim_objs.pop(leaf, None)
                continue
            self.optim.optim_objs[leaf] = before.kept
            optimizer = torch_optimizer(before.kept)
            optimizer.state[leaf] = before.state
            optimizer.param_groups[0].update(before.settings)
        self._before = {}

    def _look_at(self, leaf: Tensor) -> "_Before":
        """What a parameter is by now, and what its optimiser remembers."""
        value, kept = leaf.detach().clone(), self.optim.optim_objs.get(leaf)
        if kept is None:
            return _Before(value)
        optimizer = torch_optimizer(kept)
        state = {
            key: x.clone() if isinstance(x, Tensor) else x
            for key, x in optimizer.state[leaf].items()
        }
        settings = {key: x for key, x in optimizer.param_groups[0].items() if key != "params"}
        return _Before(value, kept, state, settings)

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

    @property
    def is_waiting(self) -> bool:
        """Whether anything that was loaded waits for a program to name its parameter."""
        return any(self.pending.values())

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
        self._refuse_misfits(self.parameters, state["parameters"])

    def check_waiting(self, parameters: Mapping[str, Tensor]) -> None:
        """Compares parameters with the loaded values that wait for them.

        Raises:
            ValueError: Some have other shapes.
        """
        values = self.pending["parameters"]
        new = self._new(parameters)
        self._refuse_misfits({name: new[name] for name in new if name in values}, values)

    def warn_of_waiting(self) -> None:
        """Warns of loaded values for which there is no parameter by now."""
        if waiting := sorted(self.pending["parameters"]):
            warnings.warn(
                f"The loaded state has values for parameters of the {self.name} that no program "
                f"has touched by now: {waiting}. They wait, and are saved with the others. If the "
                "programs have changed, load a state of the same programs.",
                stacklevel=stacklevel(),
            )

    def _new(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: leaf for name, leaf in parameters.items() if name not in self.parameters}

    def _refuse_misfits(
        self, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> None:
        expected = {name: tuple(leaf.shape) for name, leaf in parameters.items()}
        got = {name: tuple(value.shape) for name, value in values.items()}
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
            self._set(name, self.pending["parameters"].pop(name))
        self._resume(self.parameters)

    def _set(self, name: str, value: Tensor) -> None:
        leaf = self.parameters[name]
        self.remember([leaf])
        with torch.no_grad():
            leaf.copy_(value)
        self.optim.optim_objs.pop(leaf, None)

    def _resume(self, parameters: Mapping[str, Tensor]) -> None:
        """Sets the optimisers that are loaded for parameters, where they can be created by now."""
        for name in [name for name in parameters if name in self.pending["optim"]]:
            leaf = self.parameters[name]
            if not self._can_create(leaf):
                continue
            self.remember([leaf])
            leaf.grad = None
            self.optim([leaf])  # without a gradient, only creates the optimiser
            kept = copy.deepcopy(self.pending["optim"].pop(name))  # as moves change it in place
            _load_optimizer_state(self.optim.optim_objs[leaf], kept)

    def _refuse_nameless(self, parameters: Mapping[str, Tensor]) -> None:
        if not (self._goes_by_names and self.grouped.is_plain):
            return
        nameless = [
            name
            for name, leaf in parameters.items()
            if not (leaf in self.optim.optim_objs or self._can_create(leaf))
        ]
        if nameless:
            raise ValueError(
                f"The optimiser of the {self.name} goes by the names of parameters, and the "
                f"parameter store has none for {nameless}. Register their network in the program "
                '(pyro.module("name", network)), or give the optimiser a dict of settings.'
            )

    def _can_create(self, leaf: Tensor) -> bool:
        """Whether a parameter has its name in the store, if the optimiser's settings go by names."""
        return not self._goes_by_names or bool(pyro.get_param_store().param_name(leaf))

    @property
    def _goes_by_names(self) -> bool:
        return callable(self.optim.pt_optim_args) or callable(self.optim.pt_clip_args)


def _optimizer_state(optimizer: Any) -> State:
    inner = torch_optimizer(optimizer)
    state = {"optimizer": inner.state_dict()}
    return state if inner is optimizer else state | {"scheduler": optimizer.state_dict()}


def _load_optimizer_state(optimizer: Any, state: State) -> None:
    torch_optimizer(optimizer).load_state_dict(state["optimizer"])
    if "scheduler" in state:
        optimizer.load_state_dict(state["scheduler"])
