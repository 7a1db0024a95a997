r"""The rivals: ways to take a training step with one pair of networks.

Each is built from a pair of its own, with the same initial weights, and is a function of a batch
that moves the parameters by Adam with the same learning rate. Where the data are on a CPU, it
returns numbers; on a GPU, the loops in plain PyTorch leave them there and don't wait for them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import SVI, ReweightedWakeSleep, Trace_ELBO
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor, nn

from pairs import Pair
from pyro_symeq import SymmetricEquilibrium, SymmetricUtility
from results import HAND

__all__ = ["RIVALS", "Rival", "Step"]

Step = Callable[[Tensor], Any]

LEARNING_RATE = 1e-3
TEMPERATURE = 2 / 3


@dataclass(frozen=True)
class Rival:
    """A way to take a step.

    Args:
        label: What tables call it.
        start: Builds the step, for a pair and a number of particles.
    """

    label: str
    start: Callable[[Pair, int], Step]


def hand(pair: Pair, num_particles: int) -> Step:
    """The game in plain PyTorch, as fast as its eager mode allows.

    The decoder moves, then the encoder against the new decoder. Draws are made without a graph,
    what drawing and scoring have in common is computed once, and nothing is checked.
    """
    decoder, encoder = _adam(pair.decoder), _adam(pair.encoder)

    def step(x: Tensor) -> list[Tensor] | list[float]:
        losses = [
            _descend(decoder, num_particles, pair.decoder_loss, x),
            _descend(encoder, num_particles, pair.encoder_loss, len(x)),
        ]
        return losses if x.is_cuda else [loss.item() for loss in losses]

    return step


def _descend(
    optim: torch.optim.Optimizer, num_particles: int, draw: Callable[..., Tensor], *args: Any
) -> Tensor:
    """Moves a player along the mean of several draws of its loss, and returns the mean."""
    loss = draw(*args)
    if num_particles > 1:
        loss = torch.stack([loss, *(draw(*args) for _ in range(num_particles - 1))]).mean()
    optim.zero_grad()
    loss.backward()
    optim.step()
    return loss.detach()


def _adam(module: nn.Module) -> torch.optim.Adam:
    """Adam in the fastest form there is for the device."""
    try:
        return torch.optim.Adam(module.parameters(), LEARNING_RATE, fused=True)
    except RuntimeError:
        return torch.optim.Adam(module.parameters(), LEARNING_RATE, foreach=True)


def symeq(pair: Pair, num_particles: int, vectorize: bool = False, **options: Any) -> Step:
    """Symmetric equilibrium learning with Pyro's Adam, as it is when a pair has a code."""
    optim = Adam({"lr": LEARNING_RATE})
    utility = SymmetricUtility(num_particles=num_particles, vectorize_particles=vectorize)
    game = SymmetricEquilibrium(pair.model, pair.guide, optim, utility, code_warmup=0, **options)
    return game.step


def captured(pair: Pair, num_particles: int) -> Step:
    """The same, captured in the first steps and replayed from then on."""
    return symeq(pair, num_particles, capture=True)


def compiled(pair: Pair, num_particles: int) -> Step:
    """The same, captured and compiled."""
    return symeq(pair, num_particles, capture="compile")


def vectorized(pair: Pair, num_particles: int) -> Step:
    """The same, with all particles in one run of the guide and of the model."""
    return symeq(pair, num_particles, vectorize=True)


def module(pair: Pair, num_particles: int) -> Step:
    """The objective as a module, with PyTorch's Adam: both players move at once."""
    utility: Any = SymmetricUtility(num_particles=num_particles)
    objective = utility(pair.model, pair.guide)
    optim = _adam(pair)

    def step(x: Tensor) -> Tensor | float:
        loss = objective(x)
        optim.zero_grad()
        loss.backward()
        optim.step()
        return loss.detach() if x.is_cuda else loss.item()

    return step


def svi(pair: Pair, num_particles: int) -> Step:
    """Pyro's SVI: the ELBO of a relaxed pair, with straight-through gradients."""
    pair.temperature = TEMPERATURE
    optim = Adam({"lr": LEARNING_RATE})
    return SVI(pair.model, pair.guide, optim, Trace_ELBO(num_particles=num_particles)).step


def reweighted(insomnia: float) -> Callable[[Pair, int], Step]:
    """Pyro's reweighted wake-sleep, which needs at least two particles.

    Its gradient reaches the decoder through the guide of a ladder too, which is another game of
    about the same cost.

    Args:
        insomnia: How much of the encoder's gradient comes from data; the rest is from dreams.
    """

    def start(pair: Pair, num_particles: int) -> Step:
        def model(observations: dict[str, Tensor]) -> None:
            pair.model(observations["x"])

        def guide(observations: dict[str, Tensor]) -> None:
            pair.guide(observations["x"])

        loss = ReweightedWakeSleep(max(num_particles, 2), insomnia, max_plate_nesting=1)
        algorithm = SVI(model, guide, Adam({"lr": LEARNING_RATE}), loss)
        return lambda x: algorithm.step(observations={"x": x})

    return start


RIVALS = {
    HAND: Rival("by hand, plain PyTorch", hand),
    "symeq": Rival("SymmetricEquilibrium", symeq),
    "capture": Rival("SymmetricEquilibrium, captured", captured),
    "compile": Rival("SymmetricEquilibrium, compiled", compiled),
    "vectorized": Rival("SymmetricEquilibrium, vectorised", vectorized),
    "module": Rival("SymmetricUtility as a module", module),
    "svi": Rival("SVI, Trace_ELBO, relaxed bits", svi),
    "rws-0": Rival("ReweightedWakeSleep of 2, insomnia 0", reweighted(0.0)),
    "rws-0.5": Rival("ReweightedWakeSleep of 2, insomnia 0.5", reweighted(0.5)),
}
