"""Players' utilities at a draw, and who owns which parameter."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_symeq import passes

Role = Literal["decoder", "encoder"]
Masks = dict[str, Tensor]

NOTHING_TO_LEARN = (
    "There is nothing to learn: neither the model nor the guide touches a parameter. Declare "
    "parameters with pyro.param, or register networks with pyro.module or as attributes of a "
    "PyroModule."
)


@dataclass(frozen=True)
class Score:
    """A player's utility at one draw.

    Args:
        utility: The utility, a scalar with a graph to the player's program.
        parameters: The player's parameters (leaves), by the names of their statements.
        unnamed: Parameters of the player that its program uses without a statement.
    """

    utility: Tensor
    parameters: dict[str, Tensor]
    unnamed: list[Tensor]

    def gradients(self, parameters: Iterable[Tensor]) -> list[Tensor | None]:
        """The gradient of the negative utility in some of the player's parameters."""
        leaves = list(parameters)
        if not (leaves and self.utility.requires_grad):
            return [None] * len(leaves)
        return list(torch.autograd.grad(-self.utility, leaves, allow_unused=True))


def total(scores: list[Score], weights: list[float]) -> Score:
    """The weighted sum of utilities of one player."""
    if len(scores) == 1 and weights == [1.0]:
        return scores[0]
    utility = torch.stack(
        [weight * score.utility for weight, score in zip(weights, scores, strict=True)]
    ).sum()
    parameters: dict[str, Tensor] = {}
    for score in scores:
        parameters |= score.parameters
    unnamed = dict.fromkeys(leaf for score in scores for leaf in score.unnamed)
    return Score(utility, parameters, list(unnamed))


@dataclass(frozen=True)
class Scored:
    """A run of a player's program, and where it is scored.

    Args:
        trace: The trace.
        names: The random variables and factors that count.
        masks: Where some of them count, if not everywhere.
    """

    trace: Trace
    names: list[str]
    masks: Masks


class Owners:
    """Scores players, and keeps who owns which parameter.

    What the model touches belongs to the decoder, the rest of what the guide touches to the
    encoder.
    """

    def __init__(self) -> None:
        self._of_decoder: set[Tensor] = set()
        self._uses_unnamed: dict[tuple[str, ...], bool] = {}

    def score(self, role: Role, *runs: Scored) -> Score:
        """Sums the log-probabilities of runs of a player's program; finds its own parameters.

        Raises:
            ValueError: The sum is not finite.
        """
        log_probs = [
            (name, log_prob)
            for run in runs
            for name, log_prob in passes.log_probs(run.trace, run.names, run.masks).items()
        ]
        utility = torch.stack([log_prob for _, log_prob in log_probs]).sum()
        _refuse_infinite(role, utility, log_probs)
        parameters: dict[str, Tensor] = {}
        for run in runs:
            parameters |= passes.parameters(run.trace)
        unnamed = self._unnamed(role, utility, parameters, runs[0].trace)
        if role == "decoder":
            self._of_decoder.update(parameters.values(), unnamed)
        else:
            parameters = {n: p for n, p in parameters.items() if p not in self._of_decoder}
            unnamed = [p for p in unnamed if p not in self._of_decoder]
        return Score(utility, parameters, unnamed)

    def _unnamed(
        self, role: Role, utility: Tensor, parameters: dict[str, Tensor], trace: Trace
    ) -> list[Tensor]:
        """Finds the leaves behind a utility that no parameter statement names.

        The graph is searched once for each set of sites, and always where there are such leaves.
        """
        sites = (role, *trace.nodes)
        if not utility.requires_grad or not self._uses_unnamed.get(sites, True):
            return []
        named = set(parameters.values())
        unnamed = [leaf for leaf in _graph_leaves(utility) if leaf not in named]
        self._uses_unnamed[sites] = bool(unnamed)
        return unnamed


def _refuse_infinite(role: Role, utility: Tensor, log_probs: list[tuple[str, Tensor]]) -> None:
    if not torch.isfinite(utility):
        sites = {name: value.item() for name, value in log_probs if not torch.isfinite(value)}
        raise ValueError(
            f"Expected a finite utility of the {role}, got these log-probabilities (nats): "
            f"{sites}. Look for NaN in the data, for values outside the support of these sites, "
            "and for a learning rate that is too large."
        )


def _graph_leaves(value: Tensor) -> Iterator[Tensor]:
    """Walks over the tensors that a gradient of a value would be accumulated in."""
    nodes = [value.grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes.extend(parent for parent, _ in node.next_functions)
