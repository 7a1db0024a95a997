"""Programs of tensor operations, recorded from functions of tensors.

Python and Pyro cost time at each statement, and the autograd engine at each operation. A recording
leaves only the operations: those of the forward passes, of the draws, and of the backward passes.
It draws fresh random numbers, reads parameters and other tensors where they lie, and computes with
the Python numbers of the recorded run.
"""

import random
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import one_hot
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from pyro_symeq import randomness
from pyro_symeq.aside import aside
from pyro_symeq.binding import is_dense
from pyro_symeq.operations import CannotRecord, tidy
from pyro_symeq.provenance import may_change, name_of

KINDS = ("cpu", "cuda")  # of devices with mixed precision
HALVES = frozenset({torch.float16, torch.bfloat16})
READS = frozenset({Tensor.tolist, Tensor.numpy, Tensor.__array__})

Function = Callable[..., list[Tensor]]


@dataclass(frozen=True)
class Recording:
    """What a function does to tensors.

    Args:
        operations: The operations, a program of the inputs and of the constants.
        run: Runs them.
        sources: The tensors that the function reads besides its inputs: parameters, buffers, and
            others.
        constants: The same without a graph, where they lay.
        names: The names of those that Pyro keeps as parameters.
        learned: All parameters, and whether they were to be learned.
        modules: The modules that were called, and whether they were in training.
        draws_on_cpu: Whether the operations draw by the CPU's generator.
    """

    operations: GraphModule
    run: Callable[..., list[Tensor]]
    sources: list[Tensor]
    constants: list[Tensor]
    names: dict[str, Tensor]
    learned: list[tuple[Tensor, bool]]
    modules: list[tuple[nn.Module, bool]]
    draws_on_cpu: bool

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Does the operations on other inputs of the same layout.

        Casts of mixed precision are among the operations, and no others are added.
        """
        with torch.no_grad(), ExitStack() as stack:
            for kind in KINDS:
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return self.run(*inputs, *self.constants)

    def compiled(self, inputs: Sequence[Tensor]) -> "Recording":
        """The same operations as machine code, by ``torch.compile``.

        Raises:
            Exception: There is no compiler, or it doesn't know an operation.
        """
        with randomness.kept(), warnings.catch_warnings():
            for kind in (DeprecationWarning, FutureWarning):  # of what the compiler itself uses
                warnings.simplefilter("ignore", kind)
            compiled = replace(self, run=torch.compile(self.operations.forward, dynamic=False))
            compiled.tried(*inputs)  # which compiles
        return compiled

    def tried(self, *inputs: Tensor) -> list[Tensor]:
        """Does the operations on copies of all tensors, of which some may change."""
        copies = [x.clone() if is_dense(x) and not x.is_conj() else x for x in inputs]
        return replace(self, constants=[x.clone() for x in self.constants])(*copies)

    def reads(self, i: int) -> bool:
        """Whether the operations make use of an input."""
        inputs = [node for node in self.operations.graph.nodes if node.op == "placeholder"]
        return bool(inputs[i].users)

    def is_valid(self) -> bool:
        """Whether all tensors and parameters are still those, and no module has switched."""
        kept = dict(pyro.get_param_store().named_parameters())
        return (
            all(kept.get(name) is leaf for name, leaf in self.names.items())
            and all(module.training is training for module, training in self.modules)
            and all(map(_is_in_place, self.sources, self.constants))
            and all(x.requires_grad == is_learned for x, is_learned in self.learned)
        )

    def agrees(self, other: "Recording") -> bool:
        """Whether another recording does the same to the same tensors."""
        return (
            str(self.operations.code) == str(other.operations.code)
            and len(self.constants) == len(other.constants)
            and all(map(_is_same, self.constants, other.constants))
        )


class _Watch(TorchFunctionMode):
    """Watches the run that is recorded, and undoes what it changes.

    It refuses what the host reads unseen, and computes one-hot codes without looking at them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.changed: dict[Tensor, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            raise CannotRecord("the host reads the elements of a tensor")
        if kwargs.get("generator") is not None:
            raise CannotRecord("it draws by a generator of its own")
        if func is one_hot:
            return _one_hot(*args, **kwargs)
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.layout == torch.strided and may_change(name_of(func)):
            if x not in self.changed:
                self.changed[x] = x.detach().clone()
        return func(*args, **kwargs)

    def undo(self, tensors: Iterable[Tensor]) -> None:
        """Gives tensors that were changed in place the elements that they had."""
        storages = {x.untyped_storage().data_ptr() for x in tensors}
        for x, before in reversed(self.changed.items()):  # views come after what they are of
            if x.untyped_storage().data_ptr() in storages:
                x.detach().copy_(before)


def record(
    function: Function, inputs: Sequence[Tensor], modules: Iterable[nn.Module] = ()
) -> Recording:
    """Records a function, on the side: random states and module buffers end as they were.

    Args:
        function: A function of tensors that returns tensors.
        inputs: Its inputs.
        modules: Modules that it may use, besides those that it calls.

    Raises:
        CannotRecord: What the function does depends on the values of tensors, or it draws random
            numbers where replays can't.
    """
    used = {module: module.training for module in modules}
    outputs: list[Tensor] = []
    watch = _Watch()

    def note(module: nn.Module, _: object) -> None:
        used.setdefault(module, module.training)

    def noted(*aliases: Tensor) -> list[Tensor]:
        outputs[:] = function(*aliases)
        return outputs

    aliases = [x.detach() for x in inputs]  # so that the programs' own tensors are no inputs
    hook = register_module_forward_pre_hook(note)
    try:
        with aside(), pyro.validation_enabled(False), watch:
            python, on_cpu = _python_state(), torch.get_rng_state()
            traced = make_fx(noted)(*aliases)
            drawn = randomness.get_state()
            if _python_state() != python:
                raise CannotRecord("it draws random numbers of Python or NumPy")
        draws_on_cpu = not torch.equal(on_cpu, drawn["torch"])
        recording = _recording(traced, used, draws_on_cpu)
        watch.undo([*aliases, *recording.sources])
        with randomness.kept():
            _check_replay(recording.tried(*aliases), outputs, randomness.get_state(), drawn)
    except Exception as error:
        watch.undo(watch.changed)
        if isinstance(error, CannotRecord):
            raise
        raise CannotRecord(_reason(error)) from error
    finally:
        hook.remove()
    return recording


def headline(error: Exception) -> str:
    """The first line of an error that tells something, without a full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    told = next((i for i, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return " ".join(lines[: told + 1]).rstrip(".")


def _reason(error: Exception) -> str:
    """Why a function can't be recorded, from what PyTorch says."""
    first = headline(error)
    if read := re.search(r"value out of a tracing tensor with (aten\.\w+)", first):
        return f"the host reads the elements of a tensor ({read[1]})"
    return f"{type(error).__name__}: {first}"


def _recording(
    traced: GraphModule, modules: dict[nn.Module, bool], draws_on_cpu: bool
) -> Recording:
    sources = tidy(traced)
    used = {id(x) for x in sources}
    kept = pyro.get_param_store().named_parameters()
    return Recording(
        traced,
        traced.forward,
        sources,
        [x.detach() for x in sources],
        {name: leaf for name, leaf in kept if id(leaf) in used},
        [(x, x.requires_grad) for x in sources if x.is_leaf],
        list(modules.items()),
        draws_on_cpu,
    )


def _check_replay(
    replayed: Sequence[Tensor], outputs: Sequence[Tensor], state: Any, drawn: Any
) -> None:
    """Checks that a replay does what was recorded, from the same random states.

    Raises:
        CannotRecord: It does something else.
    """
    is_same = all(map(_is_rounded, replayed, outputs))
    generators = ([x["torch"], *x["accelerator"]] for x in (state, drawn))
    if not (is_same and all(map(torch.equal, *generators))):
        raise CannotRecord("a replay of its operations does something else")


def _is_rounded(x: Tensor, y: Tensor) -> bool:
    """Whether tensors differ by no more than sums in another order do.

    On a GPU they are in no certain order, and in half precision that lets draws fall otherwise.
    """
    is_half = y.dtype in HALVES or any(map(torch.is_autocast_enabled, KINDS))
    x, y = (_strided(z).to(torch.float64).nan_to_num(nan=torch.pi) for z in (x, y))
    return bool((x - y).norm() <= (0.1 if is_half else 1e-3) * y.norm() + 1e-5)


def _python_state() -> tuple[object, bytes, object]:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), np.asarray(keys).tobytes(), (kind, *rest)


def _one_hot(x: Tensor, num_classes: int = -1) -> Tensor:
    """``one_hot``, which on the CPU looks whether all numbers are in range."""
    if num_classes < 1:
        return one_hot(x, num_classes)
    return (x.unsqueeze(-1) == torch.arange(num_classes, device=x.device)).long()


def _strided(x: Tensor) -> Tensor:
    return x if x.layout == torch.strided else x.to_dense()


def _is_in_place(source: Tensor, constant: Tensor) -> bool:
    return source.data_ptr() == constant.data_ptr()


def _is_same(a: Tensor, b: Tensor) -> bool:
    same_place = a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    return same_place or (a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))
