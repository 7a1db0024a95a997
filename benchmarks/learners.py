"""The ways to learn a pair: the game without and with its cure for collapse, and Pyro's own."""

from collections.abc import Callable
from typing import Any

from pyro.infer import SVI, ReweightedWakeSleep, Trace_ELBO, TraceGraph_ELBO
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor

from architectures import Architecture, Stack
from pyro_symeq import SymmetricEquilibrium

__all__ = ["METHODS", "Step", "learn"]

Step = Callable[[Tensor], object]

LEARNING_RATE = 1e-3
NUM_PARTICLES = 2  # of reweighted wake-sleep, which needs two at least
INSOMNIA = 0.5


def learn(method: str, pair: Stack, architecture: Architecture) -> Step:
    """Starts a method, and returns its step.

    Args:
        method: Its name among ``METHODS``.
        pair: What is to learn.
        architecture: What the pair is made of.
    """
    return METHODS[method](pair, architecture)


def game(pair: Stack, architecture: Architecture) -> Step:
    """The plain game from its first step."""
    return _symmetric(pair, code_warmup=0)


def cure(pair: Stack, architecture: Architecture) -> Step:
    """The game as it is by default, which first helps the players to agree on a code."""
    return _symmetric(pair)


def svi(pair: Stack, architecture: Architecture) -> Step:
    """The ELBO, by reparametrised draws or by score functions with a baseline."""
    is_gaussian = architecture.latent == "gaussian"
    loss = Trace_ELBO() if is_gaussian else TraceGraph_ELBO()
    return SVI(pair.model, pair.guide, _adam(), loss).step


def rws(pair: Stack, architecture: Architecture) -> Step:
    """Reweighted wake-sleep, whose encoder learns from data and dreams alike."""

    def model(observations: dict[str, Tensor]) -> None:
        pair.model(observations["x"])

    def guide(observations: dict[str, Tensor]) -> None:
        pair.guide(observations["x"])

    loss = ReweightedWakeSleep(NUM_PARTICLES, INSOMNIA, max_plate_nesting=1)
    algorithm = SVI(model, guide, _adam(), loss)
    return lambda x: algorithm.step(observations={"x": x})


def _symmetric(pair: Stack, **options: Any) -> Step:
    return SymmetricEquilibrium(pair.model, pair.guide, _adam(), capture=True, **options).step


def _adam() -> Adam:
    return Adam({"lr": LEARNING_RATE})


METHODS: dict[str, Callable[[Stack, Architecture], Step]] = {
    "game": game,
    "cure": cure,
    "svi": svi,
    "rws": rws,
}
