r"""The utilities of the two players, from traces of their programs.

Each player maximises the likelihood of the training data under its own program, which is
:math:`p_\theta(x, z)` or :math:`q_\varphi(z \mid x)`; what an example lacks, the other player
fills in. For data :math:`x \sim \pi(x)`,

.. math::
    L_p(\theta, \varphi)
        &= \mathbb{E}_{\pi(x)} \mathbb{E}_{q_\varphi(z \mid x)} [\log p_\theta(x, z)], \\
    L_q(\theta, \varphi)
        &= \mathbb{E}_{p_\theta(x, z)} [\log q_\varphi(z \mid x)].

The decoder moves :math:`\theta` and the encoder :math:`\varphi` only.
"""

import math
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.infer.elbo import ELBOModule
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pyro_symeq.binding import Call, Program, module_of
from pyro_symeq.checks import check_count
from pyro_symeq.draws import Draws
from pyro_symeq.loss import SymmetricLoss
from pyro_symeq.ownership import NOTHING_TO_LEARN
from pyro_symeq.pair import Pair
from pyro_symeq.play import Stage
from pyro_symeq.rehearsal import Bind
from pyro_symeq.uncompiled import uncompiled

__all__ = ["SymmetricUtility"]

Identity = tuple[int, ...]

NUM_KEPT = 8  # pairs: handlers that are put around programs in each step make new ones


class _Attach(torch.autograd.Function):
    """Gives a value gradients that are already known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, *(upstream * gradient for gradient in ctx.saved_tensors)


def _identity(program: Program) -> Identity:
    """Tells existing programs apart, hashable or not; a method is made anew at each look."""
    if isinstance(program, MethodType):
        return id(program.__self__), id(program.__func__)
    return (id(program),)


def attach(value: Tensor, gradients: Mapping[Tensor, Tensor]) -> Tensor:
    """Gives a value gradients that are already known.

    Args:
        value: The value.
        gradients: Its gradients by leaf.
    """
    return _Attach.apply(value, list(gradients.values()), *gradients)


class SymmetricUtility(ELBO):
    r"""The objective of symmetric equilibrium learning, in the shape of a Pyro ELBO.

    With data :math:`x`, and latents :math:`y` that some batches observe, a draw of the utilities
    is

    .. math::
        L_p &= \log p_\theta(x, y, z), \quad z \sim q_\varphi(z \mid x, y), \\
        L_q &= \log q_\varphi(z', y' \mid x') + \log q_\varphi(y \mid x),
            \quad (x', y', z') \sim p_\theta,

    summed over the batch, scaled and masked as Pyro does (nats). The loss is :math:`-(L_p + L_q)`;
    its gradient is exactly :math:`(-\nabla_\theta L_p, -\nabla_\varphi L_q)`, even where the guide
    uses the decoder's parameters: what the model touches belongs to the decoder, and the rest of
    what the guide touches to the encoder.

    It works as ``SVI(model, guide, optim, loss=SymmetricUtility())``, where both players move at
    once, and ``SymmetricUtility()(model, guide)`` is an ``nn.Module`` whose output is the loss,
    for torch optimisers and ``DistributedDataParallel``. It has the parameters of a model and a
    guide that are modules or methods of modules.

    Args:
        bind: Which argument holds the value of which observed site, where that can't be found
            out: a dict ``{argument: site}``, with dots for what is nested (``"batch.image"``), or
            a function ``(trace, args, kwargs) -> (args, kwargs)`` that puts the values of a dream
            into the arguments.
        supervise_encoder: Whether latents that a batch observes train the encoder too (eq. 11); if
            not, it learns from dreams alone (eq. 16).
        num_particles: The number of draws whose utilities are averaged, in both passes.
        vectorize_particles: Whether the guide completes data, and the model is scored, for all
            particles and proposals in one run, along outermost plates. This needs programs that
            broadcast, as it does with Pyro's ELBOs. Dreams come one after another, because guides
            read the size of a batch off their arguments.
        max_plate_nesting: The number of batch dimensions that plates take up, for vectorised
            particles; if left out, the first run of the model tells.
        num_proposals: The number of draws of the guide of which one is the completion, row by row
            with probability proportional to :math:`p_\theta(x, z) / q_\varphi(z \mid x)`: the decoder's
            step of reweighted wake-sleep.

    References:
        Symmetric Equilibrium Learning of VAEs (Flach, Schlesinger, Shekhovtsov, 2024), eqs. 5, 8,
        11 and 16. https://arxiv.org/abs/2307.09883

    Example:
        >>> def model(x):
        ...     p = pyro.param("p", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Bernoulli(p))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     slope = pyro.param("slope", torch.tensor(1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Bernoulli(logits=slope * x))
        >>> loss = SymmetricUtility()(model, guide)
        >>> loss(torch.zeros(3)).requires_grad
        True
    """

    def __init__(
        self,
        *,
        bind: Bind | None = None,
        supervise_encoder: bool = True,
        num_particles: int = 1,
        vectorize_particles: bool = False,
        max_plate_nesting: float = math.inf,
        num_proposals: int = 1,
    ) -> None:
        if not (bind is None or callable(bind) or isinstance(bind, Mapping)):
            raise TypeError(
                "Expected bind to be a dict {argument: site} or a function "
                f"(trace, args, kwargs) -> (args, kwargs), got {type(bind).__name__}."
            )
        check_count("num_particles", num_particles, at_least=1)
        check_count("num_proposals", num_proposals, at_least=1)
        super().__init__(num_particles, max_plate_nesting, vectorize_particles=vectorize_particles)
        self.bind = bind
        self.draws = Draws(
            num_particles,
            num_proposals,
            vectorize_particles,
            None if math.isinf(max_plate_nesting) else int(max_plate_nesting),
        )
        self.supervise_encoder = supervise_encoder
        self._known: dict[tuple[Identity, Identity], tuple[Pair, Stage]] = {}

    def __call__(self, model: Program, guide: Program) -> ELBOModule:
        """A module whose output is the loss of a model and a guide."""
        module = super().__call__(model, guide)  # type: ignore[arg-type]
        owners = [module_of(program) for program in (model, guide)]
        methods_of = [owner for owner in owners if owner not in (None, model, guide)]
        module.methods_of = nn.ModuleList(dict.fromkeys(methods_of))
        return module

    def stage(self, model: Program, guide: Program) -> Stage:
        """The two players, with what is found out about them on the way."""
        return self._on_stage(model, guide)[1]

    def pair(self, model: Program, guide: Program) -> Pair:
        """The two programs, with what is known of their batches."""
        return self._on_stage(model, guide)[0]

    def _on_stage(self, model: Program, guide: Program) -> tuple[Pair, Stage]:
        key = _identity(model), _identity(guide)
        if key not in self._known:
            if len(self._known) >= NUM_KEPT:
                self._known.clear()
            pair = Pair(model, guide, self.bind, self.supervise_encoder, self.draws)
            utilities = {"decoder": pair.decoder, "encoder": pair.encoder}
            stage = Stage({"decoder": model, "encoder": guide}, utilities)
            self._known[key] = pair, stage
        return self._known[key]

    @uncompiled
    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> SymmetricLoss:
        r"""Estimates :math:`-(L_p + L_q)` (nats) without a gradient."""
        with torch.no_grad():
            decoder, encoder = self._utilities(model, guide, (args, kwargs))
        return SymmetricLoss(decoder.item(), encoder.item())

    @uncompiled
    @torch.enable_grad()
    def loss_and_grads(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> SymmetricLoss:
        r"""Estimates the loss, and adds to the ``grad`` of each player's own parameters."""
        utilities, gradients = self._gradients(model, guide, (args, kwargs))
        for leaf, gradient in gradients.items():
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        return SymmetricLoss(*(utility.item() for utility in utilities))

    @uncompiled
    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        r"""Estimates the loss as a tensor with each player's gradient in its own parameters."""
        if not torch.is_grad_enabled():
            return -torch.stack(self._utilities(model, guide, (args, kwargs))).sum()
        utilities, gradients = self._gradients(model, guide, (args, kwargs))
        return attach(-torch.stack(utilities).sum(), gradients)

    def _utilities(self, model: Program, guide: Program, call: Call) -> list[Tensor]:
        stage = self.stage(model, guide)
        scores = [stage.score(player, call) for player in stage.utilities]
        for score in scores:
            score.check()
        return [score.utility for score in scores]

    def _gradients(
        self, model: Program, guide: Program, call: Call
    ) -> tuple[list[Tensor], dict[Tensor, Tensor]]:
        """The utilities, and the gradients of their negatives by parameter."""
        utilities: list[Tensor] = []
        gradients: dict[Tensor, Tensor] = {}
        stage = self.stage(model, guide)
        for player in stage.utilities:
            score = stage.score(player, call)
            score.check()
            leaves = [*score.parameters.values(), *score.unnamed]
            utilities.append(score.utility.detach())
            gradients |= {
                leaf: gradient
                for leaf, gradient in zip(leaves, score.gradients(leaves), strict=True)
                if gradient is not None
            }
        if not gradients:
            raise ValueError(NOTHING_TO_LEARN)
        return utilities, gradients

    def _get_trace(
        self, model: Program, guide: Program, args: Any, kwargs: Any
    ) -> tuple[Trace, Trace]:
        pair, stage = self._on_stage(model, guide)
        guide_trace, model_trace = pair.wake(stage.play(), (args, kwargs))
        return model_trace, guide_trace
