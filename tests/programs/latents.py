"""Latents of many kinds, one or several of them, and the ways in which a guide factorises."""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import SigmoidTransform
from torch import nn
from torch.nn.functional import one_hot

from pyro_symeq import Implicit
from tests.programs.base import Program, program, variants

# The law with four parameters, and four numbers that the decoder makes of a draw.
LAWS = {
    "Bernoulli": (lambda f: dist.Bernoulli(logits=f).to_event(1), lambda z: z),
    "Normal": (
        lambda f: dist.Normal(f[..., :2], f[..., 2:].exp()).to_event(1),
        lambda z: torch.cat([z, z**2], -1),
    ),
    "Laplace": (
        lambda f: dist.Laplace(f[..., :2], f[..., 2:].exp()).to_event(1),
        lambda z: torch.cat([z, z**2], -1),
    ),
    "LogNormal": (
        lambda f: dist.LogNormal(f[..., :2], 0.1 * f[..., 2:].exp()).to_event(1),
        lambda z: torch.cat([z, z.log()], -1),
    ),
    "MultivariateNormal": (
        lambda f: dist.MultivariateNormal(f, scale_tril=torch.eye(4).to(f)),
        lambda z: z,
    ),
    "Categorical": (
        lambda f: dist.Categorical(logits=f),
        lambda z: one_hot(z, 4).to(torch.get_default_dtype()),
    ),
    "OneHotCategorical": (lambda f: dist.OneHotCategorical(logits=f), lambda z: z),
    "Beta": (
        lambda f: dist.Beta(2 + f[..., :2].exp(), 2 + f[..., 2:].exp()).to_event(1),
        lambda z: torch.cat([z, 1 - z], -1),
    ),
    "Dirichlet": (lambda f: dist.Dirichlet(2 + f.exp()), lambda z: z),
    "Gamma": (lambda f: dist.Gamma(2 + f.exp(), 1.0).to_event(1), lambda z: z.log()),
    "Poisson": (lambda f: dist.Poisson(f.exp()).to_event(1), lambda z: z.sqrt()),
    "Geometric": (lambda f: dist.Geometric(logits=f).to_event(1), lambda z: z.sqrt()),
    "Binomial": (lambda f: dist.Binomial(3, logits=f).to_event(1), lambda z: z - 1.5),
    "Multinomial": (lambda f: dist.Multinomial(3, logits=f), lambda z: z - 0.75),
    "VonMises": (
        lambda f: dist.VonMises(f[..., :2], f[..., 2:].exp()).to_event(1),
        lambda z: torch.cat([z.sin(), z.cos()], -1),
    ),
    "transformed": (
        lambda f: dist.TransformedDistribution(dist.Normal(f, 1.0), SigmoidTransform()).to_event(
            1
        ),
        lambda z: z,
    ),
}


@variants(LAWS)
def one_site(case):
    law, code = case
    decoder, encoder = nn.Linear(4, 3), nn.Linear(3, 4)
    start = torch.zeros(4)

    def model(x):
        pyro.module("decoder", decoder)
        prior = pyro.param("prior", start)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", law(prior))
            pyro.sample("x", dist.Normal(decoder(code(z)), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", law(encoder(x)))

    return Program(model, guide, (torch.randn(3, 3),))


@program
def several_sites_of_different_kinds():
    decoder, encoder = nn.Linear(6, 3), nn.Linear(3, 6)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            on = pyro.sample("on", dist.Bernoulli(x.new_tensor(0.3)))
            kind = pyro.sample("kind", dist.OneHotCategorical(x.new_ones(3)))
            pose = pyro.sample("pose", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            code = torch.cat([on[..., None], kind, pose], -1)
            pyro.sample("x", dist.Normal(decoder(code), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        f = encoder(x)
        with pyro.plate("data", len(x)):
            pyro.sample("pose", dist.Normal(f[:, :2], 1.0).to_event(1))
            pyro.sample("kind", dist.OneHotCategorical(logits=f[:, 2:5]))
            pyro.sample("on", dist.Bernoulli(logits=f[:, 5]))

    return Program(model, guide, (torch.randn(4, 3),))


class Ladder:
    """x <- z1 <- z0, binary."""

    def __init__(self):
        self.top = nn.Parameter(torch.zeros(2))
        self.middle = nn.Linear(2, 3)
        self.bottom = nn.Linear(3, 6)
        self.up1 = nn.Linear(6, 3)
        self.up0 = nn.Linear(3, 2)
        self.side = nn.Linear(6, 2)

    def model(self, x):
        pyro.module("middle", self.middle)
        pyro.module("bottom", self.bottom)
        top = pyro.param("top", self.top)
        with pyro.plate("data", len(x)):
            z0 = pyro.sample("z0", dist.Bernoulli(logits=top).to_event(1))
            z1 = pyro.sample("z1", dist.Bernoulli(logits=self.middle(z0)).to_event(1))
            pyro.sample("x", dist.Normal(self.bottom(z1), 1.0).to_event(1), obs=x)

    def bottom_up(self, x):
        pyro.module("up1", self.up1)
        pyro.module("up0", self.up0)
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Bernoulli(logits=self.up1(x)).to_event(1))
            pyro.sample("z0", dist.Bernoulli(logits=self.up0(z1)).to_event(1))

    def top_down(self, x):
        """q(z_i | z_<i, x) ∝ p(z_i | z_<i) f(z_i, x), with the decoder's own networks."""
        pyro.module("up1", self.up1)
        pyro.module("side", self.side)
        with pyro.plate("data", len(x)):
            z0 = pyro.sample("z0", dist.Bernoulli(logits=self.top + self.side(x)).to_event(1))
            logits = self.middle(z0) + self.up1(x)
            pyro.sample("z1", dist.Bernoulli(logits=logits).to_event(1))


@program
def reverse_factorisation():
    pair = Ladder()
    return Program(pair.model, pair.bottom_up, (torch.randn(3, 6),))


@program
def ladder_that_reuses_the_decoder():
    pair = Ladder()
    return Program(pair.model, pair.top_down, (torch.randn(3, 6),))


@program
def ladder_of_normal_latents():
    top, middle, bottom = nn.Linear(2, 4), nn.Linear(3, 2), nn.Linear(2, 3)

    def model(x):
        pyro.module("top", top)
        pyro.module("bottom", bottom)
        with pyro.plate("data", len(x)):
            z0 = pyro.sample("z0", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc, log_scale = top(z0).chunk(2, -1)
            z1 = pyro.sample("z1", dist.Normal(loc, log_scale.exp()).to_event(1))
            pyro.sample("x", dist.Normal(bottom(z1), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("middle", middle)
        with pyro.plate("data", len(x)):
            z0 = pyro.sample("z0", dist.Normal(middle(x), 1.0).to_event(1))
            loc, log_scale = top(z0).chunk(2, -1)
            z1 = 0.5 * loc + 0.5 * x[:, :2]
            pyro.sample("z1", dist.Normal(z1, log_scale.exp()).to_event(1))

    return Program(model, guide, (torch.randn(3, 3),))


@program
def implicit_prior():
    decoder, encoder = nn.Linear(2, 3), nn.Linear(3, 2)
    codes = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    prior = Implicit(lambda shape: codes[torch.randint(3, shape)], (2,))

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=encoder(x)).to_event(1))

    return Program(model, guide, (torch.randn(4, 3),), is_sum=False)


@program
def auxiliary_latent_of_the_guide():
    decoder, encoder, inner = nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 2)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        pyro.module("inner", inner)
        with pyro.plate("data", len(x)):
            a = pyro.sample(
                "a", dist.Normal(x.new_zeros(2), 1.0).to_event(1), infer={"is_auxiliary": True}
            )
            pyro.sample("z", dist.Normal(encoder(x) + inner(a), 1.0).to_event(1))

    return Program(model, guide, (torch.randn(4, 3),))


@program
def global_latent_alone():
    decoder, encoder = nn.Linear(2, 3), nn.Linear(3, 2)

    def model(x):
        pyro.module("decoder", decoder)
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        pyro.sample("z", dist.Normal(encoder(x.mean(0)), 1.0).to_event(1))

    return Program(model, guide, (torch.randn(5, 3),))


@program
def global_and_local_latents():
    decoder, encoder, summary = nn.Linear(4, 3), nn.Linear(5, 2), nn.Linear(3, 2)

    def model(x):
        pyro.module("decoder", decoder)
        style = pyro.sample("style", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            both = torch.cat([z, style.expand_as(z)], -1)
            pyro.sample("x", dist.Normal(decoder(both), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        pyro.module("summary", summary)
        style = pyro.sample("style", dist.Normal(summary(x.mean(0)), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            both = torch.cat([x, style.expand(len(x), 2)], -1)
            pyro.sample("z", dist.Normal(encoder(both), 1.0).to_event(1))

    return Program(model, guide, (torch.randn(4, 3),))
