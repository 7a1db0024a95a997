"""Data of many kinds."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.nn.functional import softplus

from tests.programs.base import Program, program, variants

# Each case: data with 4 rows, the law of a row with 12 parameters, what the encoder sees of it.
KINDS = {
    "Bernoulli": (
        lambda: torch.rand(4, 12).round(),
        lambda f: dist.Bernoulli(logits=f).to_event(1),
        lambda x: x,
    ),
    "continuous Bernoulli": (
        lambda: torch.rand(4, 12),
        lambda f: dist.ContinuousBernoulli(logits=f).to_event(1),
        lambda x: x,
    ),
    "Normal with a scale": (
        lambda: torch.randn(4, 6),
        lambda f: dist.Normal(f[..., :6], softplus(f[..., 6:]) + 0.1).to_event(1),
        lambda x: torch.cat([x, x], -1),
    ),
    "MultivariateNormal": (
        lambda: torch.randn(4, 12),
        lambda f: dist.MultivariateNormal(f, torch.eye(12).to(f)),
        lambda x: x,
    ),
    "Poisson": (
        lambda: torch.poisson(2 * torch.ones(4, 12)),
        lambda f: dist.Poisson(softplus(f) + 0.1).to_event(1),
        lambda x: x,
    ),
    "negative binomial": (
        lambda: torch.poisson(2 * torch.ones(4, 12)),
        lambda f: dist.NegativeBinomial(3.0, logits=f).to_event(1),
        lambda x: x,
    ),
    "zero-inflated Poisson": (
        lambda: torch.poisson(2 * torch.ones(4, 12)),
        lambda f: dist.ZeroInflatedPoisson(
            softplus(f) + 0.1, gate=0.2 * torch.ones_like(f)
        ).to_event(1),
        lambda x: x,
    ),
    "Beta": (
        lambda: 0.1 + 0.8 * torch.rand(4, 6),
        lambda f: dist.Beta(1 + softplus(f[..., :6]), 1 + softplus(f[..., 6:])).to_event(1),
        lambda x: torch.cat([x, x], -1),
    ),
    "words": (
        lambda: torch.randint(3, (4, 12)),
        lambda f: dist.Categorical(logits=torch.stack([f, -f, 0 * f], -1)).to_event(1),
        lambda x: x.to(torch.get_default_dtype()),
    ),
    "bag of words": (
        lambda: torch.tensor([[3.0, 1, 0, 2, 0, 0, 1, 0, 0, 1, 0, 0]]).repeat(4, 1),
        lambda f: dist.Multinomial(8, logits=f),
        lambda x: x,
    ),
    "low-rank Normal": (
        lambda: torch.randn(4, 12),
        lambda f: dist.LowRankMultivariateNormal(f, f[..., None] + 1, torch.ones_like(f)),
        lambda x: x,
    ),
    "Student": (
        lambda: torch.randn(4, 12),
        lambda f: dist.StudentT(5.0, f, 1.0).to_event(1),
        lambda x: x,
    ),
}


@variants(KINDS)
def kind(case):
    draw, law, read = case
    decoder, encoder = nn.Linear(2, 12), nn.Linear(12, 2)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(decoder.weight.new_full((2,), 0.5)).to_event(1))
            pyro.sample("x", law(decoder(z)), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=encoder(read(x))).to_event(1))

    return Program(model, guide, (draw(),))


@program
def autoregressive_likelihood():
    """Each entry of a row is a site of its own, given those before it."""
    decoder, encoder = nn.Linear(2, 1), nn.Linear(3, 1)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            before = torch.zeros_like(z)
            for i in range(x.shape[1]):
                loc = decoder(torch.stack([z, before], -1)).squeeze(-1)
                before = pyro.sample(f"x_{i}", dist.Normal(loc, 1.0), obs=x[:, i])

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x).squeeze(-1), 1.0))

    return Program(model, guide, (torch.randn(4, 3),))


@program
def noise_that_is_learned():
    encoder = nn.Linear(2, 2)

    def model(x):
        noise = pyro.param("noise", x.new_ones(2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, noise).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    return Program(model, guide, (torch.randn(4, 2),))
