"""One step of all the torch optimisers that a ``PyroOptim`` keeps, one for each parameter.

Stepping them one after another costs a dozen small operations for each parameter. Most optimisers
treat each element by itself, so that one of them over many parameters takes the same step: in one
fused kernel, or a few grouped ones. It works on the very state of the many, who remain what the
user sees, saves, loads and schedules.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor, optim
from torch.optim import Optimizer

from pyro_symeq.binding import is_dense

FUSED = frozenset({optim.Adam, optim.AdamW, optim.SGD})
ELEMENTWISE = FUSED | {
    optim.ASGD,
    optim.Adadelta,
    optim.Adagrad,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
    optim.Rprop,
}
SCHEDULERS = (optim.lr_scheduler.LRScheduler, optim.lr_scheduler.ReduceLROnPlateau)
CALLS = (PyroOptim.__call__, PyroLRScheduler.__call__)
NUM_KEPT = 8  # sets of parameters: batches of several kinds may touch several

Settings = dict[str, Any]


class Grouped:
    """Steps a ``PyroOptim``, with as few operations as it can.

    Args:
        optim: The optimiser.
        is_captured: Whether its steps are to be recorded in a CUDA graph, which reads learning
            rates from the device.
    """

    def __init__(self, optim: PyroOptim, is_captured: bool = False) -> None:
        self.optim = optim
        self.is_captured = is_captured
        self._merged: dict[tuple[int, ...], Merged] = {}

    def __call__(self, leaves: list[Tensor], found_inf: Tensor | None = None) -> None:
        """Takes a step along the ``grad`` of some parameters.

        Args:
            leaves: The parameters.
            found_inf: A number on their device; fused optimisers stay where they are if it's 1.
        """
        _lay_out_gradients(leaves)
        if not self.is_plain:
            self.optim(leaves)
            return
        if new := [leaf for leaf in leaves if leaf not in self.optim.optim_objs]:
            self.optim(new)
            leaves = [leaf for leaf in leaves if not any(leaf is x for x in new)]
        self.merged(leaves).step(found_inf)

    @property
    def is_plain(self) -> bool:
        """Whether the optimiser steps as Pyro's do, by torch optimisers that it keeps."""
        return type(self.optim).__call__ in CALLS

    def merged(self, leaves: list[Tensor]) -> "Merged":
        """The optimisers of some parameters, merged; all of them have moved before."""
        key = tuple(map(id, leaves))
        merged = self._merged.get(key)
        if merged is None or not merged.is_of(leaves):
            if len(self._merged) >= NUM_KEPT:
                self._merged.clear()
            merged = self._merged[key] = Merged(self.optim, leaves, self.is_captured)
        return merged


def _lay_out_gradients(leaves: Sequence[Tensor]) -> None:
    """Puts gradients into the layout of their parameters, each in memory of its own.

    What ``torch.autograd.grad`` returns may be expanded or transposed, and one for several leaves.
    """
    places: set[int] = set()
    for leaf in leaves:
        if leaf.grad is not None and not leaf.grad.is_sparse:
            if leaf.grad.stride() != leaf.stride() or leaf.grad.data_ptr() in places:
                leaf.grad = torch.empty_like(leaf).copy_(leaf.grad)
            places.add(leaf.grad.data_ptr())


def torch_optimizer(kept: Any) -> Optimizer:
    """What a ``PyroOptim`` keeps for a parameter, without the scheduler that may be around it."""
    return getattr(kept, "optimizer", kept)


@dataclass(frozen=True)
class _Member:
    """A parameter, and what its optimiser was when it was merged.

    Args:
        leaf: The parameter.
        kept: What the ``PyroOptim`` keeps for it.
        own: Its own optimiser.
        settings: The settings of that.
        state: The state of that.
        stride: How the parameter lay in memory.
    """

    leaf: Tensor
    kept: Any
    own: Optimizer
    settings: Settings
    state: dict[str, Any]
    stride: tuple[int, ...]

    def is_kept(self, optim: PyroOptim) -> bool:
        """Whether nobody has exchanged its optimiser or its state, or asks for another step."""
        return (
            optim.optim_objs.get(self.leaf) is self.kept
            and self.own.state.get(self.leaf) is self.state
            and self.leaf.stride() == self.stride
            and _can_be_merged(self.kept, self.leaf)
        )


class Merged:
    """The optimisers of some parameters, merged where they can be.

    Args:
        optim: What keeps them.
        leaves: The parameters.
        is_captured: Whether learning rates are to lie on the device.
    """

    def __init__(
        self, optim: PyroOptim, leaves: Sequence[Tensor], is_captured: bool = False
    ) -> None:
        self.optim = optim
        self.leaves = list(leaves)
        self.alone: list[Tensor] = []
        self._groups: list[tuple[Settings, list[_Member]]] = []
        self._optimizers: list[Optimizer] = []
        kinds: dict[tuple[type[Optimizer], bool], list[_Member]] = {}
        for leaf in leaves:
            kept = optim.optim_objs[leaf]
            if not _can_be_merged(kept, leaf):
                self.alone.append(leaf)
                continue
            own = torch_optimizer(kept)
            settings = dict(own.param_groups[0])
            member = _Member(leaf, kept, own, settings, own.state[leaf], leaf.stride())
            is_fused = type(own) in FUSED and _may_be_fused(settings, leaf)
            kinds.setdefault((type(own), is_fused), []).append(member)
        for (kind, is_fused), members in kinds.items():
            self._merge(kind, members, is_fused, is_captured)

    @property
    def unfused(self) -> list[Tensor]:
        """The parameters whose optimisers are not fused."""
        groups = ((settings.get("fused"), members) for settings, members in self._groups)
        return self.alone + [m.leaf for fused, members in groups if not fused for m in members]

    def is_of(self, leaves: Sequence[Tensor]) -> bool:
        """Whether these parameters were merged, and nothing has changed but learning rates."""
        return (
            len(leaves) == len(self.leaves)
            and all(map(operator.is_, leaves, self.leaves))
            and all(self._follows(*group) for group in self._groups)
        )

    def step(self, found_inf: Tensor | None = None) -> None:
        """Takes the step of all of them."""
        clips = self.optim.grad_clip
        for _, members in self._groups:
            for member in members:
                if clips[member.leaf] is not None:
                    clips[member.leaf](member.leaf)
        for optimizer in self._optimizers:
            if optimizer.param_groups[0].get("fused"):
                optimizer.found_inf = found_inf  # type: ignore[attr-defined]
            optimizer.step()
        if self.alone:
            self.optim(self.alone)

    def _follows(self, group: Settings, members: list[_Member]) -> bool:
        """Lets a group have the learning rate of its members, if that is all that has changed."""
        if not all(member.is_kept(self.optim) for member in members):
            return False
        settings = [member.own.param_groups[0] for member in members]
        if all(map(operator.eq, settings, (member.settings for member in members))):
            return True
        lr = settings[0]["lr"]
        if isinstance(lr, Tensor) or any(
            s != m.settings | {"lr": lr} for s, m in zip(settings, members, strict=True)
        ):
            return False
        for member in members:
            member.settings["lr"] = lr
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
        return True

    def _merge(
        self,
        kind: type[Optimizer],
        members: list[_Member],
        is_fused: bool,
        is_captured: bool,
    ) -> None:
        alike: list[tuple[Settings, list[_Member]]] = []
        for member in members:
            settings = {key: x for key, x in member.settings.items() if key != "params"}
            same = next((group for given, group in alike if given == settings), None)
            if same is None:
                alike.append((settings, [member]))
            else:
                same.append(member)
        if is_fused:
            for settings, group in alike:
                _fuse(settings, group, is_captured)
        optimizer = kind(  # type: ignore[call-arg]
            [{**settings, "params": [m.leaf for m in group]} for settings, group in alike]
        )
        optimizer.state.update({member.leaf: member.state for member in members})
        self._optimizers.append(optimizer)
        self._groups += [
            (settings, group)
            for settings, (_, group) in zip(optimizer.param_groups, alike, strict=True)
        ]


def _can_be_merged(kept: Any, leaf: Tensor) -> bool:
    own = torch_optimizer(kept)
    return (
        type(own) in ELEMENTWISE
        and (own is kept or isinstance(kept, SCHEDULERS))
        and not (own._optimizer_step_pre_hooks or own._optimizer_step_post_hooks)
        and not isinstance(own.param_groups[0]["lr"], Tensor)
        and not (leaf.grad is not None and leaf.grad.is_sparse)
    )


def _may_be_fused(settings: Settings, leaf: Tensor) -> bool:
    """Whether the user leaves the way of stepping open, and there is a kernel for it.

    The kernels go over memory without gaps. That of SGD can't have momentum for some parameters
    and not yet for others.
    """
    return (
        settings["foreach"] is None
        and settings["fused"] is None
        and not settings["differentiable"]
        and not settings.get("momentum")
        and leaf.is_floating_point()
        and leaf.device.type in ("cpu", "cuda")
        and is_dense(leaf)
    )


def _fuse(settings: Settings, members: list[_Member], is_captured: bool) -> None:
    """Puts what a fused kernel reads where and how it reads it."""
    settings["fused"] = True
    device = members[0].leaf.device
    if is_captured and device.type == "cuda":
        settings["lr"] = torch.tensor(settings["lr"], dtype=torch.float32, device=device)
        if "capturable" in settings:
            settings["capturable"] = True
    for member in members:
        for key, value in member.state.items():
            if key == "step":
                member.state[key] = value.to(member.leaf.device, torch.float32)
            elif isinstance(value, Tensor) and value.stride() != member.stride:
                member.state[key] = torch.empty_like(member.leaf, dtype=value.dtype).copy_(value)
