"""Whole steps as CUDA graphs: the recorded lessons of the players, and their optimisers' moves.

A graph is launched as one, so that neither Python nor the launches of small kernels count. It
works on fixed addresses: a batch is copied to where the graph reads it.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_symeq.binding import copied
from pyro_symeq.capture import Capture, Lesson, Occasion
from pyro_symeq.grouped import Merged, torch_optimizer
from pyro_symeq.operations import CannotRecord
from pyro_symeq.play import Ascent
from pyro_symeq.recording import headline
from pyro_symeq.strategy import Strategy

NUM_KEPT = 8

Rounds = Sequence[tuple[str, ...]]
Move = Callable[[Rounds, Callable[[str], Ascent]], dict[str, Tensor]]


class StepGraph:
    """A step on batches of a kind.

    Args:
        step: Takes a step on the tensors of such batches, and returns the utilities.
        tensors: Such tensors.
        device: Where the step is taken.
        pool: The memory that graphs share.
    """

    def __init__(
        self,
        step: Callable[[Sequence[Tensor]], dict[str, Tensor]],
        tensors: Sequence[Tensor],
        device: torch.device,
        pool: Any,
    ) -> None:
        self._device = device
        self._inputs = [copied(x.detach()) for x in tensors]
        with torch.cuda.device(device), pyro.validation_enabled(False):
            self._graph = torch.cuda.CUDAGraph()
            # Other threads, a loader's say, may go on using the device.
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._utilities = step(self._inputs)

    def __call__(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Takes a step on others, without waiting for it."""
        with torch.cuda.device(self._device), torch.no_grad():
            for place, x in zip(self._inputs, tensors, strict=True):
                place.copy_(x, non_blocking=True)
            self._graph.replay()
            return {name: utility.clone() for name, utility in self._utilities.items()}


@dataclass(frozen=True)
class _Entry:
    """A graph, and what it was captured of.

    Args:
        graph: The graph, if there can be one.
        lessons: The lessons in it.
        merged: The optimisers in it.
        versions: How often tensors on the CPU had changed, whose values are in the graph.
    """

    graph: StepGraph | None
    lessons: Mapping[str, Lesson]
    merged: Sequence[Merged]
    versions: Sequence[int]

    def is_of(self, lessons: Mapping[str, Lesson]) -> bool:
        """Whether it was captured of these lessons, and its optimisers are as they were."""
        return (
            all(self.lessons[name] is lesson for name, lesson in lessons.items())
            and all(merged.is_of(merged.leaves) for merged in self.merged)
            and self.versions == _versions(lessons.values())
        )


class StepGraphs:
    """The steps that are captured.

    Args:
        capture: The recorded lessons.
        strategies: The strategies of the players.
        move: Lets players move along ascents.
        is_awaited: Whether the host looks at utilities even with validation off.
    """

    def __init__(
        self,
        capture: Capture,
        strategies: Mapping[str, Strategy],
        move: Move,
        is_awaited: bool = False,
    ) -> None:
        self._capture = capture
        self._strategies = strategies
        self._move = move
        self._is_awaited = is_awaited
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._pool: Any = None

    def step(self, occasion: Occasion, rounds: Rounds) -> dict[str, Tensor] | None:
        """Takes such a step by its graph, if there is one by now; returns the utilities.

        A step with a utility that is not finite is taken back, if the host looks at it. There are
        no utilities then, as without a graph: the programs can tell which site it is.
        """
        lessons = {}
        for name in {name for names in rounds for name in names}:
            lesson = self._capture.confirmed(name, occasion)
            if lesson is None or not lesson.is_on_cuda:
                return None
            lessons[name] = lesson
        key = (occasion.kind, tuple(rounds))
        entry = self._entries.get(key)
        if entry is None or not entry.is_of(lessons):
            entry = self._entries[key] = self._entry(occasion.tensors, rounds, lessons)
            if len(self._entries) > NUM_KEPT:
                self._entries.popitem(last=False)
        self._entries.move_to_end(key)
        if entry.graph is None:
            return None
        for name, lesson in lessons.items():
            self._strategies[name].remember([*lesson.parameters.values(), *lesson.buffers])
        utilities = entry.graph(occasion.tensors)
        is_awaited = self._is_awaited or is_validation_enabled()
        if is_awaited and not all(map(torch.isfinite, utilities.values())):
            for name in lessons:
                self._strategies[name].take_back()
            return None
        return utilities

    def _entry(
        self, tensors: Sequence[Tensor], rounds: Rounds, lessons: Mapping[str, Lesson]
    ) -> _Entry:
        merged: list[Merged] = []
        graph = None
        try:
            merged = [_merged(self._strategies[name], x) for name, x in lessons.items()]
            device = _device_of(tensors, lessons.values(), merged)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = StepGraph(
                lambda inputs: self._move(rounds, lambda name: lessons[name](inputs)),
                tensors,
                device,
                self._pool,
            )
        except Exception as error:
            for leaf in (leaf for one in merged for leaf in one.leaves):
                leaf.grad = None
            self._capture.warn("the whole step, though each player's lesson", headline(error))
        return _Entry(graph, lessons, merged, _versions(lessons.values()))


def _merged(strategy: Strategy, lesson: Lesson) -> Merged:
    """The optimisers that move along a lesson.

    Raises:
        CannotRecord: They take steps in a way of their own.
    """
    if not strategy.grouped.is_plain:
        raise CannotRecord(f"{type(strategy.optim).__name__} takes steps in a way of its own")
    return strategy.merged(lesson.parameters)


def _versions(lessons: Collection[Lesson]) -> list[int]:
    constants = (x for lesson in lessons for x in lesson.recording.constants)
    return [x._version for x in constants if not x.is_cuda]


def _device_of(
    tensors: Sequence[Tensor], lessons: Collection[Lesson], merged: Sequence[Merged]
) -> torch.device:
    """The one device of all that a step needs.

    Raises:
        CannotRecord: There are several, or an optimiser has no place in a graph.
    """
    constants = [x for lesson in lessons for x in lesson.recording.constants]
    parameters = [leaf for lesson in lessons for leaf in lesson.parameters.values()]
    devices = {x.device for x in constants if x.is_cuda} | {leaf.device for leaf in parameters}
    if len(devices) > 1:
        raise CannotRecord(f"parameters lie on several devices, {sorted(map(str, devices))}")
    (device,) = devices
    for i, x in enumerate(tensors):
        if x.device != device and any(lesson.recording.reads(i) for lesson in lessons):
            raise CannotRecord(
                f"an argument of shape {tuple(x.shape)} lies on {x.device}, and the parameters on "
                f"{device}"
            )
    if any(lesson.recording.draws_on_cpu for lesson in lessons):
        raise CannotRecord("a program draws random numbers on the CPU")
    for one in merged:
        if one.unfused:
            kept = torch_optimizer(one.optim.optim_objs[one.unfused[0]])
            raise CannotRecord(
                f"the steps of {type(kept).__name__} aren't fused. Use Adam, AdamW, or SGD without "
                "momentum"
            )
    return device
