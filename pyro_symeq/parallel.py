r"""What the processes of a group do together, each of which has a shard of the data.

Rank :math:`r` of :math:`n` draws a player's utility :math:`u^{(r)}` on rows of its own, with random
numbers of its own. On all ranks the player moves along the mean,

.. math::
    u = \frac{1}{n} \sum_r u^{(r)}, \qquad
    \nabla_\theta u = \frac{1}{n} \sum_r \nabla_\theta u^{(r)},

so that strategies that are equal at the start stay equal.

Before tensors are exchanged, ranks compare in a few bytes what they are about to exchange. A rank
that can't go on says so instead. So all of them raise an error where one does, and none waits for
tensors that never come.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_map_only

from pyro_symeq import randomness
from pyro_symeq.nonfinite import NotFiniteError, is_of_nonfinite
from pyro_symeq.play import Ascent
from pyro_symeq.recording import headline
from pyro_symeq.strategy import State, Strategy

Group: TypeAlias = "torch.distributed.ProcessGroup | None"
T = TypeVar("T")
Place = tuple[Any, ...]  # what tells an exchange from others
Kind = Literal["not finite", "wrong value", "other"]  # of errors

NEW: Place = ("new parameters or buffers",)
UTILITY = ""  # no parameter has this name


class Alone:
    """One process: there is nobody to share anything with."""

    def __init__(self) -> None:
        self._num_processes = _num_processes()

    def working(self) -> AbstractContextManager[None]:
        """Within, a rank works alone; the others hear of its errors at the next exchange.

        Raises:
            RuntimeError: There are other processes by now, and it was made before.
        """
        if (num_processes := _num_processes()) > self._num_processes:
            raise RuntimeError(
                "This game was made before torch.distributed.init_process_group(), where "
                f"torch.distributed.group.WORLD is None, and there are {num_processes} processes "
                "now. Make it after that: with process_group=torch.distributed.group.WORLD to "
                "train together, or without to train alone."
            )
        return nullcontext()

    def rehearsing(self, strategies: Collection[Strategy]) -> AbstractContextManager[None]:
        """Within, a rank tries its programs; then all take over the first rank's values.

        Args:
            strategies: The strategies of all players, which have met their parameters by then.
        """
        return nullcontext()

    def ascent(
        self, place: Place, ascend: Callable[[], Ascent], known: Mapping[str, Tensor]
    ) -> Ascent:
        """Where a player goes, on average over ranks.

        Args:
            place: Where in the training this is.
            ascend: Tells where it goes by this rank's rows.
            known: The player's parameters.
        """
        return ascend()

    def mean(self, place: Place, draw: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The means over ranks of the utilities that each of them draws."""
        return draw()

    def gathered(self, place: Place, compute: Callable[[], T]) -> list[T]:
        """What each rank computes; of several ranks, on the host."""
        return [compute()]

    def seed(self, num_steps: int) -> None:
        """Seeds the random numbers that follow after so many steps."""

    def state_dict(self) -> State:
        """All that random numbers depend on from here."""
        return randomness.get_state()

    def load_state_dict(self, state: State, num_steps: int) -> None:
        """Goes back to the random numbers that followed after so many steps."""
        randomness.set_state(state)


def _num_processes() -> int:
    """How many processes torch.distributed has brought together."""
    is_one_of_many = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_one_of_many else 1


class Ranks(Alone):
    """The processes of a group.

    Args:
        group: The group, of which this process is one.

    Raises:
        TypeError: It is no group, or this process isn't in it.
    """

    def __init__(self, group: "distributed.ProcessGroup") -> None:
        if not (distributed.is_available() and isinstance(group, distributed.ProcessGroup)):
            raise TypeError(
                "Expected process_group to be a torch.distributed.ProcessGroup that this process "
                f"is in, got {group!r}. Call torch.distributed.init_process_group() first, and "
                "take torch.distributed.group.WORLD then."
            )
        self._group = group
        self._rank = distributed.get_rank(group)
        self._size = distributed.get_world_size(group)
        self._first = distributed.get_global_rank(group, 0)
        self._device = _device_of(group)
        self._met: set[Tensor] = set()
        self._base = self._gather(torch.initial_seed())[0]

    @contextmanager
    def working(self) -> Iterator[None]:  # noqa: D102
        try:
            yield
        except Exception as error:
            plan = _Plan((), error=str(error), kind=_kind_of(error))
            if not self._is_everyones(plan):
                self._gather(plan)
            raise

    @contextmanager
    def rehearsing(self, strategies: Collection[Strategy]) -> Iterator[None]:  # noqa: D102
        with self.working(), _modules_run() as modules:
            yield
        parameters = {
            f"{name} of the {strategy.name}": leaf
            for strategy in strategies
            for name, leaf in strategy.parameters.items()
        }
        self._meet(_unnamed(modules, parameters.values()) | parameters)

    def ascent(  # noqa: D102
        self, place: Place, ascend: Callable[[], Ascent], known: Mapping[str, Tensor]
    ) -> Ascent:
        with self.working():
            way = ascend()
        while self._meet(way.parameters):
            with self.working():
                way = ascend()
        pairs = zip(way.parameters, way.gradients, strict=True)
        own = {name: gradient for name, gradient in pairs if gradient is not None}
        own[UTILITY] = way.utility
        names = self._agreed(place, own, {**known, UTILITY: way.utility})
        parts = [own[n] if n in own else torch.zeros_like(known[n]) for n in names]
        means = dict(zip(names, self._exchanged(parts, self._average), strict=True))
        utility = means.pop(UTILITY)
        parameters = way.parameters | {name: known[name] for name in means}
        return Ascent(utility, parameters, [means.get(name) for name in parameters])

    def mean(  # noqa: D102
        self, place: Place, draw: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        with self.working():
            utilities = draw()
        names = self._agreed(place, utilities, utilities)
        means = self._exchanged([utilities[name] for name in names], self._average)
        return dict(zip(names, means, strict=True))

    def gathered(self, place: Place, compute: Callable[[], T]) -> list[T]:  # noqa: D102
        with self.working():
            own = tree_map_only(Tensor, Tensor.cpu, compute())
        self._agreed(place, {}, {})
        return self._gather(own)

    def seed(self, num_steps: int) -> None:  # noqa: D102
        randomness.seed(self._base, num_steps, self._rank)

    def state_dict(self) -> State:  # noqa: D102
        return super().state_dict() | {"seed": self._base}

    def load_state_dict(self, state: State, num_steps: int) -> None:  # noqa: D102
        self._base = state.get("seed", self._base)
        self._met = set()
        self.seed(num_steps)

    def _meet(self, tensors: Mapping[str, Tensor]) -> bool:
        """Gives tensors the first rank's values, when they first come up.

        Returns:
            Whether there were any.
        """
        new = {name: x for name, x in tensors.items() if x not in self._met}
        if new:
            names = self._agreed(NEW, new, new)
            places = [new[name].detach() for name in names]
            values = self._exchanged(places, self._broadcast)
            for place, value in zip(places, values, strict=True):
                place.copy_(value)
            self._met.update(new.values())
        return bool(new)

    def _agreed(
        self, place: Place, tensors: Mapping[str, Tensor], known: Mapping[str, Tensor]
    ) -> list[str]:
        """The names of tensors that some rank has at least, in the same order on all.

        Args:
            place: Where in the training this is.
            tensors: What this rank has.
            known: What it can have.

        Raises:
            RuntimeError: Another rank can't go on.
            ValueError: Ranks are in different places, some can't have what others have, or another
                rank can't go on because of a wrong value.
        """
        plan = _Plan(place, _described(tensors))
        if not self._is_everyones(plan):
            plans = self._gather(_Plan(place, plan.tensors, _described(known)))
            _check_errors(plans)
            _check_alike(plans)
            return sorted({name for plan in plans for name in plan.tensors})
        return sorted(tensors)

    def _is_everyones(self, plan: "_Plan") -> bool:
        """Whether all ranks have the same plan."""
        facts = repr((plan.place, sorted(plan.tensors.items()), plan.error)).encode()
        number = int.from_bytes(blake2b(facts, digest_size=8).digest(), "big") >> 1
        extremes = torch.tensor([number, -number], device=self._device)
        with _together():
            distributed.all_reduce(extremes, distributed.ReduceOp.MAX, self._group)
        most, least = extremes.tolist()
        return most == -least

    def _gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self._size
        with _together():
            distributed.all_gather_object(values, value, self._group)
        return values

    def _exchanged(
        self, tensors: Sequence[Tensor], exchange: Callable[[Tensor], None]
    ) -> list[Tensor]:
        """Exchanges tensors, all of a device and type in one piece."""
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i, x in enumerate(tensors):
            kinds.setdefault((x.dtype, x.device), []).append(i)
        exchanged = list(tensors)
        for members in kinds.values():
            flat = torch.cat([tensors[i].to_dense().reshape(-1) for i in members])
            with _together():
                exchange(flat)
            parts = flat.split([tensors[i].numel() for i in members])
            for i, part in zip(members, parts, strict=True):
                exchanged[i] = part.view(tensors[i].shape)
        return exchanged

    def _average(self, x: Tensor) -> None:
        x /= self._size
        distributed.all_reduce(x, group=self._group)

    def _broadcast(self, x: Tensor) -> None:
        distributed.broadcast(x, self._first, self._group)


@dataclass(frozen=True)
class _Plan:
    """What a rank is about to exchange.

    Args:
        place: Where in the training it is.
        tensors: What it has, and of which type, shape and device.
        known: What it can have.
        error: Why it can't go on, if it can't.
        kind: What kind of error that is.
    """

    place: Place
    tensors: Mapping[str, str] = field(default_factory=dict)
    known: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None
    kind: Kind = "other"


def _described(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{x.dtype} {tuple(x.shape)} on {x.device.type}" for name, x in tensors.items()}


def _kind_of(error: Exception) -> Kind:
    if is_of_nonfinite(error):
        return "not finite"
    return "wrong value" if isinstance(error, ValueError) else "other"


def _check_errors(plans: Sequence[_Plan]) -> None:
    for rank, plan in enumerate(plans):
        if plan.error is not None:
            message = f"Rank {rank} of the process group can't go on: {plan.error}"
            if plan.kind == "not finite":
                raise NotFiniteError(message)
            if plan.kind == "wrong value":
                raise ValueError(message)
            raise RuntimeError(message)


def _check_alike(plans: Sequence[_Plan]) -> None:
    if any(plan.place != plans[0].place for plan in plans):
        places = {
            rank: (*plan.place, *plan.tensors) if plan.place == NEW else plan.place
            for rank, plan in enumerate(plans)
        }
        raise ValueError(
            f"The ranks of the process group do different things: {places}. Give all of them the "
            "same players and schedule, freeze the same players, and load the same state."
        )
    lacking = {
        name: {rank: plan.known.get(name, "nothing") for rank, plan in enumerate(plans)}
        for name in sorted({name for plan in plans for name in plan.tensors})
        if len({plan.known.get(name) for plan in plans}) > 1
    }
    if lacking:
        raise ValueError(
            f"The ranks of the process group differ in {plans[0].place}: {lacking}. Build the same "
            "programs on all of them, and let programs name all of their parameters in each run "
            "(pyro.module and pyro.param before the first choice)."
        )


def _device_of(group: "distributed.ProcessGroup") -> torch.device:
    """Where ranks compare their plans: on the host if the group can, so that no device is awaited."""
    backends = distributed.get_backend_config(group).split(",")
    devices = [backend.split(":")[0] for backend in backends]
    return torch.device("cpu" if "cpu" in devices else devices[0])


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"The ranks of the process group can't go on together: {headline(error)}. If one of "
            "them has died or has taken its last step, look for the first error in the output of "
            "all. What was saved before is good."
        ) from error


@contextmanager
def _modules_run() -> Iterator[dict[nn.Module, None]]:
    """Notes the modules that run, in their order."""
    modules: dict[nn.Module, None] = {}
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: modules.setdefault(module)
    )
    try:
        yield modules
    finally:
        hook.remove()


def _unnamed(modules: Iterable[nn.Module], named: Iterable[Tensor]) -> dict[str, Tensor]:
    """What modules hold besides named parameters: buffers, and parameters that nobody learns."""
    known = set(named)
    found = [
        x
        for module in modules
        for x in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if x not in known
    ]
    return {f"tensor {i} of modules": x for i, x in enumerate(dict.fromkeys(found))}
