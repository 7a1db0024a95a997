r"""A variational autoencoder written for SVI learns by SVI, or as a game; both are measured alike.

The latents are :math:`z \in \mathbb{R}^L`, the images :math:`x \in \{0, 1\}^D`,

.. math::
    p_\theta(x, z) = \mathcal{N}(z; 0, I) \, p_\theta(x \mid z), \qquad
    q_\varphi(z \mid x) = \mathcal{N}\big(z; \mu_\varphi(x), \sigma_\varphi(x)^2\big).

SVI climbs the ELBO in :math:`\theta` and :math:`\varphi` at once, with gradients through the draws
of z. Symmetric equilibrium learning climbs, without such gradients,

.. math::
    L_p = \mathbb{E}_{\pi(x)} \mathbb{E}_{q_\varphi(z \mid x)} [\log p_\theta(x, z)]
        \text{ in } \theta, \qquad
    L_q = \mathbb{E}_{p_\theta(x, z)} [\log q_\varphi(z \mid x)] \text{ in } \varphi.

Networks, batches, steps and learning rate are the same; :func:`learn` has all that differs.

Run ``python examples/vae.py --help`` for the options.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.distributions import kl_divergence

from cli import begun, count, ended_cleanly, parser

with ended_cleanly("vae.py"):
    from data import DataError, Images, load
    from layers import dense
    from pyro_symeq import SymmetricEquilibrium, SymmetricUtility
    from pyro_symeq.metrics import Estimate, log_likelihood
    from tiles import draw
    from training import Inference, cosine, train


@dataclass(frozen=True)
class Settings:
    """What a training depends on, besides the data set and the seed.

    Args:
        steps: The number of steps, over which the learning rate falls to zero along a cosine.
        batch_size: The number of images of a step.
        learning_rate: The learning rate at the start.
        weight_decay: The weight decay.
        num_latents: The dimension of z.
        width: The number of hidden units of a network.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    num_latents: int
    width: int


SETTINGS = {
    "digits": Settings(1500, 128, 5e-3, 0.05, 8, 256),
    "mnist": Settings(6000, 128, 1e-3, 0.0, 20, 400),
    "fashion": Settings(6000, 128, 1e-3, 0.0, 20, 400),
}


class VAE(nn.Module):
    """The pair of programs.

    Args:
        num_pixels: The number of pixels of an image.
        num_latents: The dimension of z.
        width: The number of hidden units of a network.
    """

    def __init__(self, num_pixels: int, num_latents: int, width: int) -> None:
        super().__init__()
        self.num_latents = num_latents
        self.decoder = dense(num_latents, width, num_pixels)
        self.encoder = dense(num_pixels, width, 2 * num_latents)

    def model(self, x: Tensor) -> None:
        """The decoder's program.

        Args:
            x: Images, with shape :math:`(N, D)`.
        """
        pyro.module("decoder", self.decoder)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.num_latents), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The encoder's program.

        Args:
            x: Images, with shape :math:`(N, D)`.
        """
        pyro.module("encoder", self.encoder)
        with pyro.plate("images", len(x)):
            loc, log_scale = self.encoder(2 * x - 1).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def learn(inference: str, vae: VAE, x: Tensor, settings: Settings) -> float:
    """Trains a pair.

    Args:
        inference: ``svi`` or ``symeq``.
        vae: The pair.
        x: Images, with shape :math:`(N, D)`.
        settings: What else the training depends on.

    Returns:
        How long it took (seconds).
    """

    def batch() -> tuple[Tensor]:
        rows = torch.randint(len(x), (settings.batch_size,))
        return (x[rows.to(x.device)],)

    optim = cosine(settings.steps, settings.learning_rate, settings.weight_decay)
    algorithm: Inference
    if inference == "svi":
        algorithm = SVI(vae.model, vae.guide, optim, loss=Trace_ELBO())
    else:
        algorithm = SymmetricEquilibrium(vae.model, vae.guide, optim)
    return train(algorithm, optim, batch, settings.steps)


def report(vae: VAE, x: Tensor, num_draws: int, seconds: float) -> None:
    """Prints what a trained pair can do, in the same way however it has learned.

    Args:
        vae: The pair.
        x: Held-out images, with shape :math:`(N, D)`.
        num_draws: The number of importance-weighted draws for an image.
        seconds: How long the training took.
    """
    found = log_likelihood(vae.model, vae.guide, x, num_draws=num_draws)
    loss = SymmetricUtility().loss(vae.model, vae.guide, x)
    print(f"""
held-out log-likelihood           {Estimate.of(found.values):9.2f} nats per image ({num_draws} draws)
evidence lower bound (ELBO)       {found.elbo:9.2f}
utility of the decoder, L_p       {loss.decoder / len(x):9.2f}
utility of the encoder, L_q       {loss.encoder / len(x):9.2f}
KL divergence of q(z|x) from p(z) {rate(vae, x):9.2f}
training                          {seconds:9.1f} s""")


@torch.no_grad()
def rate(vae: VAE, x: Tensor) -> float:
    r"""The mean of :math:`D_\mathrm{KL}(q(z \mid x) \parallel p(z))` (nats); 0 if x is ignored."""
    z: Any = poutine.trace(vae.guide).get_trace(x).nodes["z"]
    q = z["fn"].base_dist
    p = dist.Normal(torch.zeros_like(q.loc), 1.0)
    return kl_divergence(q, p).sum(-1).mean().item()


@torch.no_grad()
def picture(vae: VAE, images: Images, path: Path, title: str, num_columns: int = 20) -> None:
    """Draws held-out images, reconstructions and samples; grey is the probability of a pixel."""
    x = images.held_out_x[:num_columns]

    def means(trace: poutine.Trace) -> Tensor:
        site: Any = trace.nodes["x"]
        return site["fn"].mean.view(-1, images.side, images.side)

    latents = poutine.trace(vae.guide).get_trace(x)
    reconstructed = poutine.trace(poutine.replay(vae.model, latents)).get_trace(x)
    rows = {
        "held out": x.view(-1, images.side, images.side),
        "reconstructed": means(reconstructed),
        "sampled": means(poutine.trace(vae.model).get_trace(x)),
    }
    draw(path, title, rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the options of the program."""
    options = parser("Trains a VAE with SVI or as a game, and measures it.", SETTINGS)
    options.add_argument(
        "--inference",
        choices=("symeq", "svi"),
        default="symeq",
        help="how to learn (default: %(default)s)",
    )
    options.add_argument(
        "--num-draws",
        type=count,
        default=100,
        help="for the held-out log-likelihood of an image (default: %(default)s)",
    )
    return options.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Trains a pair, reports and draws what it has learned."""
    settings = begun(options, SETTINGS[options.data])
    images = load(options.data, options.data_root).to(options.device)
    pyro.clear_param_store()
    pyro.set_rng_seed(options.seed)
    vae = VAE(images.x.shape[-1], settings.num_latents, settings.width).to(options.device)
    seconds = learn(options.inference, vae, images.x, settings)
    report(vae, images.held_out_x, options.num_draws, seconds)
    path = options.out / f"vae-{options.data}-{options.inference}.png"
    picture(vae, images, path, f"{options.data}: a VAE that has learned by {options.inference}")
    print(f"\nThe picture is in {path}.")


def main(arguments: list[str] | None = None) -> None:
    """Runs the program."""
    options = parse(arguments)
    with ended_cleanly("vae.py", DataError):
        run(options)


if __name__ == "__main__":
    main()
