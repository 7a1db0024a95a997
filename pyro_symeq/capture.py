"""Which steps are recorded, and when a recording takes the place of the programs.

The first step on a kind of batch runs as ever, so that all is set up. The second and the third are
recorded. If the two recordings agree, nothing in the programs has changed from one step to the
next, and further steps on such batches replay.
"""

import dataclasses
import warnings
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn

from pyro_symeq.batch import Batch, batches
from pyro_symeq.binding import Call, Path, leaves, module_of, put
from pyro_symeq.callers import stacklevel
from pyro_symeq.operations import CannotRecord
from pyro_symeq.ownership import Parameters
from pyro_symeq.play import Ascent, Scoring, Stage, ascent
from pyro_symeq.recording import Recording, headline, record

NUM_KEPT = 64
FIXED = (
    bool,
    bytes,
    int,
    str,
    type(None),
    Enum,
    FunctionType,
    MethodType,
    nn.Module,
    torch.device,
    torch.dtype,
)

CHANGES = (
    "what the programs do changes from step to step, by numbers or tensors that they take from "
    "Python. Pass what changes as a tensor among the arguments"
)
NONE_ALIKE = (
    f"no two of {NUM_KEPT} batches were alike in shapes and numbers. Leave out incomplete batches "
    "(drop_last=True), and pass numbers that change as tensors"
)


@dataclass(frozen=True)
class Occasion:
    """A step that may be replayed.

    Args:
        call: What the step was given.
        tensors: The tensors in it.
        kind: What tells it from steps of other kinds.
        number: Which step it is, counted from 1.
    """

    call: Call
    tensors: Sequence[Tensor]
    kind: Hashable
    number: int


@dataclass(frozen=True)
class Lesson:
    """What a player learns from batches of a kind, recorded.

    Args:
        recording: Computes the utility and its gradients, as far as there are any.
        parameters: The player's parameters.
        has_gradient: Which of them the utility depends on.
        num_changes: How often parameters had changed owners.
    """

    recording: Recording
    parameters: Parameters
    has_gradient: Sequence[bool]
    num_changes: int

    @cached_property
    def buffers(self) -> list[Tensor]:
        """The buffers of modules that it reads, and may change."""
        used = {id(x) for x in self.recording.sources}
        modules = (module for module, _ in self.recording.modules)
        return [x for m in modules for x in m.buffers(recurse=False) if id(x) in used]

    @property
    def is_on_cuda(self) -> bool:
        """Whether the parameters lie on CUDA."""
        return any(leaf.is_cuda for leaf in self.parameters.values())

    def __call__(self, tensors: Sequence[Tensor]) -> Ascent:
        """Replays it on the tensors of such batches.

        Raises:
            CannotRecord: An operation fails, as none did when it was recorded.
        """
        try:
            utility, *gradients = self.recording(*tensors)
        except Exception as error:
            raise CannotRecord(f"its replay fails: {headline(error)}") from error
        rest = iter(gradients)
        return Ascent(
            utility, self.parameters, [next(rest) if has else None for has in self.has_gradient]
        )


@dataclass
class _Entry:
    """What is known of a player and a kind of batch.

    Args:
        is_new: Whether there was no such step before.
        lesson: The last recording.
        recorded_in: The number of the step in which it was recorded.
        is_confirmed: Whether the one before it, of another step, agreed.
        is_refused: Whether it can't be recorded.
    """

    is_new: bool = True
    lesson: Lesson | None = None
    recorded_in: int = -1
    is_confirmed: bool = False
    is_refused: bool = False


class Capture:
    """The recorded lessons of the players.

    Args:
        stage: Where their game is played.
        is_compiled: Whether to compile them.
    """

    def __init__(self, stage: Stage, is_compiled: bool = False) -> None:
        self._stage = stage
        self._is_compiled = is_compiled
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._num_occasions = 0
        self._num_unlike = 0
        self._warned: set[str] = set()

    def occasion(self, call: Call) -> Occasion | None:
        """Looks at a step, and whether it may be replayed at all."""
        if am_i_wrapped():  # in a handler of the user's, which is in no recording
            return None
        self._num_occasions += 1
        try:
            tensors = [leaf for _, _, leaf in _places(call)]
            return Occasion(call, tensors, _kind_of(call), self._num_occasions)
        except CannotRecord as error:
            self.warn("the step", str(error))
            return None

    def lesson(self, player: str, occasion: Occasion, scoring: Scoring = ascent) -> Lesson | None:
        """The lesson of a player in such steps, if it is recorded by now.

        Args:
            player: The name of the player.
            occasion: The step.
            scoring: ``ascent`` if the player moves in it, ``standing`` if it rests.

        Raises:
            CannotRecord: It can't be recorded.
        """
        entry = self._entry(player, occasion, scoring)
        self._update(entry, player, occasion, scoring)
        return entry.lesson

    def refuse(
        self, player: str, occasion: Occasion, scoring: Scoring, reason: CannotRecord
    ) -> None:
        """Records such lessons no more, since the programs run where a recording doesn't."""
        entry = self._entry(player, occasion, scoring)
        entry.lesson, entry.is_refused = None, True
        self.warn(f"the lesson of the {player}", str(reason))

    def confirmed(self, player: str, occasion: Occasion) -> Lesson | None:
        """Where a player goes in such steps, if it was recorded twice and stands."""
        entry = self._entries.get((player, ascent, occasion.kind))
        if entry is None or not entry.is_confirmed or not self._is_valid(entry.lesson):
            return None
        return entry.lesson

    def warn(self, what: str, reason: str) -> None:
        """Warns, once for each reason, that something isn't captured."""
        if reason not in self._warned:
            self._warned.add(reason)
            level = stacklevel()
            warnings.warn(f"Not captured: {what}, since {reason}.", stacklevel=level)

    def _entry(self, player: str, occasion: Occasion, scoring: Scoring) -> _Entry:
        key = (player, scoring, occasion.kind)
        if key not in self._entries:
            self._entries[key] = _Entry()
            if len(self._entries) > NUM_KEPT:
                self._entries.popitem(last=False)
        self._entries.move_to_end(key)
        return self._entries[key]

    def _update(self, entry: _Entry, player: str, occasion: Occasion, scoring: Scoring) -> None:
        """Records a lesson where that has to be done."""
        if entry.is_new:
            entry.is_new = False
            self._num_unlike += 1
            if self._num_unlike == NUM_KEPT:
                self.warn(f"the last {NUM_KEPT} lessons", NONE_ALIKE)
            return
        self._num_unlike = 0
        if entry.is_refused:
            return
        if entry.lesson is not None and not self._is_valid(entry.lesson):
            entry.lesson, entry.is_confirmed = None, False
            return  # a run as ever sets up what is new
        if not entry.is_confirmed and entry.recorded_in != occasion.number:
            lesson = self._record(player, occasion, scoring)
            if entry.lesson is not None:
                if not lesson.recording.agrees(entry.lesson.recording):
                    raise CannotRecord(CHANGES)
                entry.is_confirmed = True
                lesson = self._compiled(lesson, player, occasion)
            entry.lesson, entry.recorded_in = lesson, occasion.number

    def _compiled(self, lesson: Lesson, player: str, occasion: Occasion) -> Lesson:
        """The lesson, compiled if that is wanted and can be."""
        if not self._is_compiled:
            return lesson
        try:
            return replace(lesson, recording=lesson.recording.compiled(occasion.tensors))
        except Exception as error:
            self.warn(f"the lesson of the {player} as machine code", headline(error))
            return lesson

    def _is_valid(self, lesson: Lesson | None) -> bool:
        return (
            lesson is not None
            and lesson.num_changes == self._stage.owners.num_changes
            and lesson.recording.is_valid()
        )

    def _modules(self) -> Iterator[nn.Module]:
        """The modules whose methods are programs."""
        for program in self._stage.programs.values():
            module = module_of(program)
            if module is not None:
                yield from module.modules()

    def _record(self, player: str, occasion: Occasion, scoring: Scoring) -> Lesson:
        ways: list[Ascent] = []

        def learn(*inputs: Tensor) -> list[Tensor]:
            call = _with_tensors(occasion.call, inputs)
            way = scoring(partial(self._stage.score, player), call)
            ways.append(way)
            return [way.utility, *(x for x in way.gradients if x is not None)]

        num_changes = self._stage.owners.num_changes
        recording = record(learn, occasion.tensors, self._modules())
        has_gradient = [x is not None for x in ways[-1].gradients]
        return Lesson(recording, ways[-1].parameters, has_gradient, num_changes)


def _with_tensors(call: Call, others: Sequence[Tensor]) -> Call:
    """What a step is given, with other tensors in the places of its own."""
    parts = batches(call)
    calls = [batch.call for batch in parts]
    for (i, path, _), other in zip(_places(call), others, strict=True):
        calls[i] = put(calls[i], path, other)
    return tuple(
        Batch(*args, **kwargs).weighted(batch.weight)
        for (args, kwargs), batch in zip(calls, parts, strict=True)
    ), {}


def _kind_of(call: Call) -> Hashable:
    """Tells steps apart by all that isn't in the elements of their tensors."""
    storages: dict[int, int] = {}
    parts = tuple((batch.weight, _kind(batch.call, storages)) for batch in batches(call))
    precision = [torch.get_default_dtype()]
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            precision.append(torch.get_autocast_dtype(device))
    return parts, tuple(precision)


def _places(call: Call) -> Iterator[tuple[int, Path, Tensor]]:
    for i, batch in enumerate(batches(call)):
        for path, leaf in leaves(batch.call):
            if isinstance(leaf, Tensor):
                yield i, path, leaf


def _kind(tree: Any, storages: dict[int, int]) -> Hashable:
    """What a step depends on besides the elements of tensors: numbers count by their value.

    Raises:
        CannotRecord: There is something whose changes can't be seen.
    """
    if isinstance(tree, Tensor):
        return _tensor_kind(tree, storages)
    if isinstance(tree, Mapping):
        branches = tuple((key, _kind(branch, storages)) for key, branch in tree.items())
        return type(tree), branches
    if isinstance(tree, (tuple, list)):
        return type(tree), tuple(_kind(branch, storages) for branch in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [field.name for field in dataclasses.fields(tree)]
        return type(tree), tuple(_kind(getattr(tree, name), storages) for name in names)
    if isinstance(tree, (float, complex)):
        return type(tree), repr(tree)
    if isinstance(tree, FIXED):
        return type(tree), tree
    raise CannotRecord(
        f"an argument is of type {type(tree).__name__}, whose changes can't be seen. Pass a tensor"
    )


def _tensor_kind(x: Tensor, storages: dict[int, int]) -> Hashable:
    if x.layout != torch.strided:
        raise CannotRecord("an argument is a sparse tensor")
    storage = x.untyped_storage().data_ptr()
    start = storages.setdefault(storage, int(x.storage_offset()))
    shared = list(storages).index(storage), int(x.storage_offset()) - start
    bits = x.is_conj(), x.is_neg()
    return shared, bits, type(x), x.shape, x.stride(), x.dtype, x.device
