"""Programs of tensor operations, recorded from functions of tensors.

Python and Pyro cost time at each statement, and the autograd engine at each operation. A recording
leaves only the operations: those of the forward passes, of the draws, and of the backward passes.
It draws fresh random numbers, reads parameters and other tensors where they lie, and computes with
the Python numbers of the recorded run.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import pyro
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_symeq import randomness
from pyro_symeq.rehearsal import aside

VIEWS = frozenset(
    {torch.ops.aten.alias.default, torch.ops.aten.expand.default, torch.ops.aten.view.default}
)

Function = Callable[..., list[Tensor]]


class CannotRecord(Exception):
    """A function can't be recorded; the message says why."""


@dataclass(frozen=True)
class Recording:
    """What a function does to tensors.

    Args:
        operations: The operations, a program of the inputs and of the constants.
        run: Runs them.
        constants: The tensors that the function reads besides its inputs: parameters, buffers,
            and others.
        names: The names of those parameters that Pyro keeps.
        modules: The modules that were called, and whether they were in training.
    """

    operations: GraphModule
    run: Callable[..., list[Tensor]]
    constants: list[Tensor]
    names: list[tuple[Tensor, str | None]]
    modules: list[tuple[nn.Module, bool]]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Does the operations on other inputs of the same layout.

        Casts of mixed precision are among the operations, and no others are added.
        """
        with torch.no_grad(), ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return self.run(*inputs, *self.constants)

    def compiled(self, inputs: Sequence[Tensor]) -> "Recording":
        """The same operations as machine code, by ``torch.compile``.

        Raises:
            Exception: There is no compiler, or it doesn't know an operation.
        """
        compiled = replace(self, run=torch.compile(self.operations, dynamic=False))
        trial = replace(compiled, constants=[x.clone() for x in self.constants])
        with randomness.kept():
            trial(*inputs)  # which compiles
        return compiled

    def reads(self, i: int) -> bool:
        """Whether the operations make use of an input."""
        inputs = [node for node in self.operations.graph.nodes if node.op == "placeholder"]
        return bool(inputs[i].users)

    def is_valid(self) -> bool:
        """Whether the parameters are still those of their names, and no module has switched."""
        name_of = pyro.get_param_store().param_name
        return all(name_of(leaf) == name for leaf, name in self.names) and all(
            module.training is training for module, training in self.modules
        )

    def agrees(self, other: "Recording") -> bool:
        """Whether another recording does the same to the same tensors."""
        return (
            str(self.operations.code) == str(other.operations.code)
            and len(self.constants) == len(other.constants)
            and all(map(_is_same, self.constants, other.constants))
        )


def record(function: Function, inputs: Sequence[Tensor]) -> Recording:
    """Records a function, on the side: random states and module buffers end as they were.

    Args:
        function: A function of tensors that returns tensors.
        inputs: Its inputs.

    Raises:
        CannotRecord: What the function does depends on the values of tensors, or it draws
            random numbers where replays can't.
    """
    modules: dict[nn.Module, bool] = {}

    def note(module: nn.Module, _: object) -> None:
        modules.setdefault(module, module.training)

    hook = register_module_forward_pre_hook(note)
    try:
        with aside(), pyro.validation_enabled(False):
            before, on_cpu = _python_state(), torch.get_rng_state()
            traced = make_fx(function)(*inputs)
            if _python_state() != before:
                raise CannotRecord("it draws random numbers of Python or NumPy")
            is_elsewhere = any(x.device.type != "cpu" for x in inputs)
            if is_elsewhere and not torch.equal(on_cpu, torch.get_rng_state()):
                raise CannotRecord("it draws random numbers on the CPU")
    except CannotRecord:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise CannotRecord(f"{type(error).__name__}: {reason}") from error
    finally:
        hook.remove()
    _leave_out_idle_views(traced.graph)
    constants = _lift_constants(traced)
    traced.graph.eliminate_dead_code(_is_impure)
    traced.recompile()
    store = pyro.get_param_store()
    leaves = [x for x in constants if x.requires_grad]
    return Recording(
        traced,
        traced.forward,
        [x.detach() for x in constants],
        [(leaf, store.param_name(leaf)) for leaf in leaves],
        list(modules.items()),
    )


def _python_state() -> tuple[object, bytes, object]:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), np.asarray(keys).tobytes(), (kind, *rest)


def _leave_out_idle_views(graph: Graph) -> None:
    """Leaves out views of a tensor that are as it is, of which distributions make many."""
    for node in graph.nodes:
        if node.target in VIEWS:
            source = node.args[0]
            was, is_ = (x.meta.get("tensor_meta") for x in (source, node))
            if was and is_ and (was.shape, was.stride) == (is_.shape, is_.stride):
                node.replace_all_uses_with(source)


def _lift_constants(traced: GraphModule) -> list[Tensor]:
    """Makes inputs of the tensors that a program holds, and returns them."""
    constants: dict[str, Tensor] = {}
    inputs: dict[str, Node] = {}
    *_, last = (node for node in traced.graph.nodes if node.op == "placeholder")
    for node in [node for node in traced.graph.nodes if node.op == "get_attr"]:
        if node.target not in inputs:
            constants[node.target] = getattr(traced, node.target)
            with traced.graph.inserting_after(last):
                inputs[node.target] = last = traced.graph.placeholder(f"c{len(inputs)}")
        node.replace_all_uses_with(inputs[node.target])
        traced.graph.erase_node(node)
    return list(constants.values())


def _is_impure(node: Node) -> bool:
    """Whether a node has an effect. A draw has one, on what is drawn next."""
    tags = getattr(node.target, "tags", ())
    return node.is_impure() or torch.Tag.nondeterministic_seeded in tags


def _is_same(a: Tensor, b: Tensor) -> bool:
    same_place = a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    return same_place or (a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))
