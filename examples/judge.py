r"""What a hierarchical VAE is asked once it has learned, and in short on the way.

Latents are drawn from the prior of the decoder, for real images from the encoder, and from the
limiting distribution of both. An image of latents is that of its most probable pixels.
"""

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from hvae import HVAE
from pyro_symeq import LimitingDistribution
from pyro_symeq.metrics import (
    Features,
    consistency,
    frechet_distance,
    information,
    log_likelihood,
)

__all__ = ["LAYERS", "Judge", "Latents"]

LAYERS = ("z0", "z1")
AT_ONCE = 1000

Latents = dict[str, Tensor]
Figures = dict[str, float]


class Judge:
    """Asks a pair.

    Args:
        hvae: The pair.
        features: The features in which images are compared.
        x: Real images, with shape :math:`(N, D)`.
    """

    def __init__(self, hvae: HVAE, features: Features, x: Tensor) -> None:
        self.hvae = hvae
        self.features = features
        self.x = x
        self._known = features(x)

    def prior(self, num_samples: int) -> Latents:
        """Latents of the decoder."""
        return _latents(poutine.uncondition(self.hvae.model), self._rows(num_samples))

    def posterior(self, num_samples: int) -> Latents:
        """Latents that the encoder draws for real images, some again where there are fewer."""
        return _latents(self.hvae.guide, self._rows(num_samples))

    def limiting(self, num_samples: int, num_rounds: int) -> Latents:
        """Latents of the limiting distribution, after so many rounds from those of the decoder."""
        chains = LimitingDistribution(self.hvae.model, self.hvae.guide)
        draws = chains.sample(1, self._rows(num_samples), num_steps=num_rounds)
        return {name: draws[name][0] for name in LAYERS}

    def _rows(self, num_samples: int) -> Tensor:
        return self.x[torch.arange(num_samples, device=self.x.device) % len(self.x)]

    @torch.no_grad()
    def probabilities(self, latents: Latents) -> Tensor:
        """The probabilities of the pixels, with shape :math:`(N, D)`."""
        parts = latents["z1"].split(AT_ONCE)
        return torch.cat([self.hvae.decoder.pixels(z1).sigmoid() for z1 in parts])

    def distances(self, **samples: Latents) -> Figures:
        """The Fréchet distances of images from real ones, by the names of their latents."""
        told: Figures = {}
        for name, latents in samples.items():
            images = (self.probabilities(latents) > 0.5).to(self.x)
            told |= self._distance(name, self.features(images), self._known)
        return told

    def floor(self) -> Figures:
        """The Fréchet distance between two halves of the real images."""
        order = torch.randperm(len(self.x), device=self.x.device)
        return self._distance("floor", *self._known[order].chunk(2))

    def _distance(self, name: str, a: Tensor, b: Tensor) -> Figures:
        distance = frechet_distance(a, b, self.features.name)
        return {f"{distance.name}/{name}": distance.value}

    def consistency(self, num_samples: int, num_rounds: int) -> Figures:
        """How far the laws of each layer, and of images, are from one another."""
        pair = self.hvae.model, self.hvae.guide
        features = {"x": self.features}
        told = consistency(*pair, self.x[:num_samples], features=features, num_steps=num_rounds)
        return {
            f"consistency/{site}/{laws}/{name}": value
            for site, comparisons in told.items()
            for laws, comparison in comparisons.items()
            for name, value in comparison.items()
        }

    def bits(self, num_draws: int = 10) -> Figures:
        """The information of each layer about 1,000 images, or all of fewer (bits)."""
        latents = information(self.hvae.guide, self.x[:AT_ONCE], num_draws=num_draws)
        return {f"bits/{name}": each.sum().item() for name, each in latents.items()}

    def likelihood(self, num_draws: int) -> Figures:
        """The importance-weighted log-likelihood of as many images, and their ELBO (nats)."""
        rows = self.x[:AT_ONCE]
        told = log_likelihood(self.hvae.model, self.hvae.guide, rows, num_draws=num_draws)
        return {
            f"log-likelihood/{num_draws} draws": told.mean,
            f"log-likelihood/{num_draws} draws, standard error": told.error,
            "log-likelihood/effective draws": told.effective_sizes.mean().item(),
            "log-likelihood/elbo": told.elbo.mean,
            "log-likelihood/elbo, standard error": told.elbo.error,
        }


@torch.no_grad()
def _latents(program: Callable[[Tensor], Any], x: Tensor) -> Latents:
    nodes: Any = poutine.trace(program).get_trace(x).nodes
    return {name: nodes[name]["value"] for name in LAYERS}
