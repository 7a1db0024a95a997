"""What becomes of the operations of a recording before they are replayed.

Passes over their graph leave results as they are. They refuse what replays can't do, leave out
views of a tensor that is as it is, compute once what several draws depend on, and make inputs of
the tensors that the program holds.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten
VIEWS = frozenset({aten.alias.default, aten.expand.default, aten.view.default})


class CannotRecord(Exception):
    """A function can't be recorded; the message says why."""


def tidy(traced: GraphModule) -> list[Tensor]:
    """Makes operations ready for replays.

    Args:
        traced: The operations as they were recorded, which are changed.

    Returns:
        The tensors that they hold, which are their last inputs from now on.

    Raises:
        CannotRecord: They can't be replayed.
    """
    _refuse_unknown_shapes(traced.graph)
    _leave_out_idle(traced.graph)
    _let_draws_be_nan(traced.graph)
    constants = _lift_constants(traced)
    _compute_once(traced.graph)
    traced.graph.eliminate_dead_code(_is_impure)
    traced.recompile()
    return constants


def _refuse_unknown_shapes(graph: Graph) -> None:
    """Refuses operations whose outputs have as many elements as values say.

    Raises:
        CannotRecord: There is such an operation.
    """
    for node in graph.nodes:
        tags = getattr(node.target, "tags", ())
        is_choosing = node.target is aten.index.Tensor and any(map(_is_mask, node.args[1]))
        is_dynamic = (
            torch.Tag.dynamic_output_shape in tags and node.target is not aten.index.Tensor
        )
        if is_choosing or is_dynamic:
            raise CannotRecord("how many elements a tensor has depends on values")


def _is_mask(index: Any) -> bool:
    if not isinstance(index, Node):
        return False
    kept = getattr(index.graph.owning_module, str(index.target), index.meta.get("tensor_meta"))
    return kept is None or kept.dtype in (torch.bool, torch.uint8)


def _leave_out_idle(graph: Graph) -> None:
    """Leaves out views of a tensor that are as it is, and checks for which the host waits."""
    for node in list(graph.nodes):
        if node.target is aten._linalg_check_errors.default:
            graph.erase_node(node)
        elif node.target in VIEWS:
            source = node.args[0]
            was, is_ = (x.meta.get("tensor_meta") for x in (source, node))
            if was and is_ and (was.shape, was.stride) == (is_.shape, is_.stride):
                node.replace_all_uses_with(source)


def _let_draws_be_nan(graph: Graph) -> None:
    r"""Lets bits be NaN where their probabilities are: :math:`b + (p - p)` for :math:`b \sim p`.

    The utility is NaN then, which is refused. PyTorch stops a GPU at such a draw for good.
    """
    for node in list(graph.find_nodes(op="call_function", target=aten.bernoulli.default)):
        (p,) = node.args
        with graph.inserting_before(node):
            node.args = (graph.call_function(aten.nan_to_num.default, (p,)),)
        with graph.inserting_after(node):
            zero = graph.call_function(aten.sub.Tensor, (p, p))
        with graph.inserting_after(zero):
            bits = graph.call_function(aten.add.Tensor, (node, zero))
        node.replace_all_uses_with(bits, lambda user, bits=bits: user is not bits)


def _compute_once(graph: Graph) -> None:
    """Computes once what draws depend on: a network's output at the data, of several draws.

    Gradients are left as they are, and all else on which no draw depends, so that no two of them
    become one tensor. So is everything where a tensor changes in place.
    """
    if any(map(_changes_tensors, graph.nodes)):
        return
    needed: set[Node] = set()
    for node in reversed(graph.nodes):
        if node in needed or _is_draw(node):
            needed.update(node.all_input_nodes)
    known: dict[Hashable, Node] = {}
    for node in list(graph.nodes):
        if node in needed and node.op == "call_function" and not _is_draw(node):
            first = known.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _changes_tensors(node: Node) -> bool:
    """Whether an operation changes a tensor in place, as batch normalisation does unseen."""
    schema = getattr(node.target, "_schema", None)
    return getattr(schema, "is_mutable", False) or "batch_norm" in str(node.target)


def _is_draw(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _lift_constants(traced: GraphModule) -> list[Tensor]:
    """Makes inputs of the tensors that a program holds, and returns them.

    Raises:
        CannotRecord: It holds something else.
    """
    graph = traced.graph
    constants: dict[str, Tensor] = {}
    places: dict[str, Node] = {}
    last = next((n for n in reversed(graph.nodes) if n.op == "placeholder"), None)
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        constant = getattr(traced, node.target)
        if not isinstance(constant, Tensor) or constant.layout != torch.strided:
            what = getattr(constant, "layout", type(constant).__name__)
            raise CannotRecord(f"it uses a tensor or object of its own of the kind {what}")
        if node.target not in places:
            first = next(iter(graph.nodes))
            with graph.inserting_before(first) if last is None else graph.inserting_after(last):
                places[node.target] = last = graph.placeholder(f"c{len(places)}")
            constants[node.target] = constant
        node.replace_all_uses_with(places[node.target])
        graph.erase_node(node)
    return list(constants.values())


def _is_impure(node: Node) -> bool:
    """Whether a node has an effect. A draw has one, on what is drawn next."""
    return node.is_impure() or _is_draw(node)
