"""Small model-guide pairs as users write them, by theme."""

from tests.programs import (
    arguments,
    classics,
    handlers,
    latents,
    modules,
    observations,
    parameters,
    plates,
    semisupervised,
    sequences,
    stochastic,
)
from tests.programs.base import PROGRAMS, Program

__all__ = [
    "PROGRAMS",
    "Program",
    "arguments",
    "classics",
    "handlers",
    "latents",
    "modules",
    "observations",
    "parameters",
    "plates",
    "semisupervised",
    "sequences",
    "stochastic",
]
