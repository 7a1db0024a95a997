"""A model and a guide, scored as the decoder and the encoder of a game."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_symeq import passes
from pyro_symeq.binding import Call, Program, layout
from pyro_symeq.pattern import Pattern
from pyro_symeq.rehearsal import Bind, aside, rehearse

Role = Literal["decoder", "encoder"]
Observed = dict[str, Tensor]
T = TypeVar("T")

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


class Pair:
    """A model and a guide, with what is known of their batches and of who owns which parameter.

    Args:
        model: The decoder's program.
        guide: The encoder's program.
        bind: How dreams are handed to the guide, see :class:`SymmetricUtility`.
        supervise_encoder: Whether observed latents train the encoder too.
    """

    def __init__(
        self, model: Program, guide: Program, bind: Bind | None, supervise_encoder: bool
    ) -> None:
        self.model = model
        self.guide = guide
        self.bind = bind
        self.supervise_encoder = supervise_encoder
        self._patterns: dict[Any, Pattern] = {}
        self._of_decoder: set[Tensor] = set()
        self._uses_unnamed: dict[tuple[str, ...], bool] = {}

    def decoder(self, call: Call) -> Score:
        r"""Scores the model at the data, completed by the guide.

        Args:
            call: The arguments of both programs.

        Returns:
            :math:`\log p_\theta(x, z)` with :math:`z \sim q_\varphi(z \mid x)`, where observed
            latents keep their values. Missing data are left out: with latents alone,
            :math:`\log p_\theta(z)`.
        """
        return self._play(self._decoder, call)

    def encoder(self, call: Call) -> Score:
        r"""Scores the guide at a dream, and at the latents that the data hold.

        Args:
            call: The arguments of both programs.

        Returns:
            :math:`\log q_\varphi(z \mid x)` with :math:`(x, z) \sim p_\theta(x, z)`, plus
            :math:`\log q_\varphi(y \mid x)` at observed latents :math:`y`. With latents alone,
            :math:`\log q_\varphi(z \mid x)` with :math:`x \sim p_\theta(x \mid z)`.
        """
        return self._play(self._encoder, call)

    def wake(self, call: Call) -> tuple[Trace, Trace]:
        """Traces the guide at the data, without a graph, and the model at them so completed."""
        return self._play(self._wake, call)

    def _play(self, play: Callable[[Pattern, Call], tuple[T, Observed]], call: Call) -> T:
        """Plays with the pattern that such calls have, and looks again where it does not fit."""
        key = layout(call)
        if (pattern := self._patterns.get(key)) is not None:
            result, observed = play(pattern, call)
            if pattern.fits(observed, call):
                return result
        pattern = self._patterns[key] = self._rehearse(call)
        result, observed = play(pattern, call)
        if not pattern.fits(observed, call):
            raise ValueError(
                f"The model observed {sorted(observed)} in one run and {sorted(pattern.observed)} "
                "in another with the same arguments. Let the arguments decide which sites are "
                "observed."
            )
        return result

    def _rehearse(self, call: Call) -> Pattern:
        """Finds the pattern of a call, and tries both players before anything moves."""
        pattern = rehearse(self.model, self.guide, call, self.bind)
        with aside():
            self._decoder(pattern, call)
            self._encoder(pattern, call)
        return pattern

    def _decoder(self, pattern: Pattern, call: Call) -> tuple[Score, Observed]:
        (_, trace), observed = self._wake(pattern, call)
        names = [
            name
            for name, site in trace.nodes.items()
            if site["type"] == "sample"
            and name not in pattern.missing
            and not passes.is_implicit(site)
        ]
        return self._score("decoder", (trace, names)), observed

    def _encoder(self, pattern: Pattern, call: Call) -> tuple[Score, Observed]:
        dream, observed = self._dream(pattern, call)
        trace = passes.replay(self.guide, pattern.hand_over(dream, observed, call), dream)
        pattern.check_dreamed(dream, trace)
        scored = [(trace, passes.scored(trace, dream))]
        if pattern.supervised and self.supervise_encoder and not pattern.lacks_data:
            at_data = passes.fill_in(self.guide, call, self._given(pattern, call))
            scored.append((at_data, sorted(pattern.supervised)))
        return self._score("encoder", *scored), observed

    def _wake(self, pattern: Pattern, call: Call) -> tuple[tuple[Trace, Trace], Observed]:
        completion = Trace()
        if not pattern.is_complete:
            try:
                with torch.no_grad():
                    completion = passes.fill_in(self.guide, call, self._given(pattern, call))
            except ValueError:
                pattern.check_finite(call)
                raise
        trace = passes.replay(self.model, call, completion)
        pattern.check_completed(trace, completion)
        return (completion, trace), passes.observations(trace)

    def _given(self, pattern: Pattern, call: Call) -> Observed:
        """The observed latents; the model is run to read those that no argument holds."""
        if pattern.latents <= pattern.arguments.keys():
            return pattern.given(call)
        with aside():
            _, observed = passes.dream(self.model, call)
        return {name: observed[name] for name in pattern.latents}

    def _dream(self, pattern: Pattern, call: Call) -> tuple[Trace, Observed]:
        if not pattern.lacks_data:
            return passes.dream(self.model, call)
        with torch.no_grad():
            trace = passes.fill_in(self.model, call, {})
        return trace, passes.observations(trace)

    def _score(self, role: Role, *scored: tuple[Trace, list[str]]) -> Score:
        """Sums the log-probabilities at sites of a player's program; finds its own parameters."""
        log_probs = [
            (name, log_prob)
            for trace, names in scored
            for name, log_prob in passes.log_probs(trace, names).items()
        ]
        utility = torch.stack([log_prob for _, log_prob in log_probs]).sum()
        _refuse_infinite(role, utility, log_probs)
        parameters: dict[str, Tensor] = {}
        for trace, _ in scored:
            parameters |= passes.parameters(trace)
        unnamed = self._unnamed(role, utility, parameters, scored[0][0])
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
