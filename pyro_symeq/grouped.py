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
CALLS = (PyroOptim.__call__, PyroLRScheduler.__call__)

Settings = dict[str, Any]


class Grouped:
    """Steps a ``PyroOptim``, with as few operations as it can.

    Args:
        optim: The optimiser.
    """

    def __init__(self, optim: PyroOptim) -> None:
        self.optim = optim
        self._merged = _Merged(optim, [])

    def __call__(self, leaves: list[Tensor]) -> None:
        """Takes a step along the ``grad`` of some parameters."""
        if type(self.optim).__call__ not in CALLS:
            self.optim(leaves)
            return
        if new := [leaf for leaf in leaves if leaf not in self.optim.optim_objs]:
            self.optim(new)
            leaves = [leaf for leaf in leaves if not any(leaf is x for x in new)]
        if not self._merged.is_of(leaves):
            self._merged = _Merged(self.optim, leaves)
        self._merged.step()


def torch_optimizer(kept: Any) -> Optimizer:
    """What a ``PyroOptim`` keeps for a parameter, without the scheduler that may be around it."""
    return getattr(kept, "optimizer", kept)


@dataclass(frozen=True)
class _Member:
    """A parameter, and what its optimiser was when it was merged.

    Args:
        leaf: The parameter.
        kept: What the ``PyroOptim`` keeps for it.
        settings: The settings of its optimiser.
        state: The state of its optimiser.
    """

    leaf: Tensor
    kept: Any
    settings: Settings
    state: dict[str, Any]

    def is_current(self, optim: PyroOptim) -> bool:
        """Whether nobody has changed or exchanged the optimiser."""
        own = torch_optimizer(self.kept)
        return (
            optim.optim_objs.get(self.leaf) is self.kept
            and own.param_groups[0] == self.settings
            and own.state.get(self.leaf) is self.state
        )


class _Merged:
    """The optimisers of some parameters, merged where they can be."""

    def __init__(self, optim: PyroOptim, leaves: Sequence[Tensor]) -> None:
        self.optim = optim
        self.leaves = list(leaves)
        self.alone: list[Tensor] = []
        self.members: list[_Member] = []
        kinds: dict[type[Optimizer], list[_Member]] = {}
        for leaf in leaves:
            kept = optim.optim_objs[leaf]
            own = torch_optimizer(kept)
            if not _can_be_merged(own, leaf):
                self.alone.append(leaf)
                continue
            member = _Member(leaf, kept, dict(own.param_groups[0]), own.state[leaf])
            kinds.setdefault(type(own), []).append(member)
            self.members.append(member)
        self.optimizers = [_merge(kind, members) for kind, members in kinds.items()]

    def is_of(self, leaves: Sequence[Tensor]) -> bool:
        """Whether these parameters were merged, and nothing has changed since."""
        return (
            len(leaves) == len(self.leaves)
            and all(map(operator.is_, leaves, self.leaves))
            and all(member.is_current(self.optim) for member in self.members)
        )

    def step(self) -> None:
        """Takes the step of all of them."""
        clips = self.optim.grad_clip
        for member in self.members:
            if clips[member.leaf] is not None:
                clips[member.leaf](member.leaf)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.alone:
            self.optim(self.alone)


def _can_be_merged(own: Optimizer, leaf: Tensor) -> bool:
    hooks = (own._optimizer_step_pre_hooks, own._optimizer_step_post_hooks)
    return (
        type(own) in ELEMENTWISE
        and not any(hooks)
        and not (leaf.grad is not None and leaf.grad.is_sparse)
    )


def _merge(kind: type[Optimizer], members: Sequence[_Member]) -> Optimizer:
    groups: list[Settings] = []
    for member in members:
        settings = {key: x for key, x in member.settings.items() if key != "params"}
        if kind in FUSED and _may_be_fused(settings, member.leaf):
            settings["fused"] = True
            if "step" in member.state:
                step = member.state["step"]
                member.state["step"] = step.to(member.leaf.device, torch.float32)
        group = next((g for g in groups if g | settings == g), None)
        if group is None:
            groups.append(settings | {"params": [member.leaf]})
        else:
            group["params"].append(member.leaf)
    optimizer = kind(groups)  # type: ignore[call-arg]
    optimizer.state.update({member.leaf: member.state for member in members})
    return optimizer


def _may_be_fused(settings: Settings, leaf: Tensor) -> bool:
    """Whether the user leaves the way of stepping open, and there is a kernel for it."""
    is_open = not any(settings.get(key) for key in ("foreach", "fused", "differentiable"))
    return is_open and leaf.is_floating_point() and leaf.device.type in ("cpu", "cuda")
