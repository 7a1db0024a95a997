"""Parameters: constrained, lazy, in plates, frozen, shared, and late."""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import nn

from tests.programs.base import Program, program, variants

# Each case: an initial value, its domain, and the law of a row of two that it gives.
DOMAINS = {
    "real": (lambda: torch.zeros(2), constraints.real, lambda p: dist.Normal(p, 1.0).to_event(1)),
    "positive": (
        lambda: torch.ones(2),
        constraints.positive,
        lambda p: dist.Normal(0 * p, p).to_event(1),
    ),
    "unit interval": (
        lambda: torch.full((2,), 0.3),
        constraints.unit_interval,
        lambda p: dist.Normal(p, 1.0).to_event(1),
    ),
    "simplex": (
        lambda: torch.full((2,), 0.5),
        constraints.simplex,
        lambda p: dist.Normal(p, 1.0).to_event(1),
    ),
    "lower Cholesky": (
        lambda: torch.eye(2),
        constraints.lower_cholesky,
        lambda p: dist.MultivariateNormal(p.new_zeros(2), scale_tril=p),
    ),
    "interval": (
        lambda: torch.ones(2),
        constraints.interval(0.5, 2.0),
        lambda p: dist.Normal(0 * p, p).to_event(1),
    ),
    "ordered": (
        lambda: torch.tensor([0.0, 1.0]),
        constraints.ordered_vector,
        lambda p: dist.Normal(p, 1.0).to_event(1),
    ),
}


@variants(DOMAINS)
def constrained(case):
    make, domain, law = case
    encoder, weight, start = nn.Linear(2, 2), torch.ones(2), make()

    def model(x):
        p = pyro.param("p", start, constraint=domain)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", law(p))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        scale = pyro.param("scale", weight, constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), scale).to_event(1))

    return Program(model, guide, (torch.randn(4, 2),))


class Affine:
    """A pair whose parameters are statements, made by ``decoder`` and ``encoder``."""

    def __init__(self, decoder, encoder):
        self.decoder = decoder
        self.encoder = encoder

    def model(self, x, **options):
        loc = self.decoder(x, **options)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + loc, 1.0).to_event(1), obs=x)

    def guide(self, x, **options):
        slope = self.encoder(x, **options)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 1.0).to_event(1))


@program
def lazily_created():
    pair = Affine(
        lambda x: pyro.param("loc", lambda: x.new_zeros(2)),
        lambda x: pyro.param("slope", lambda: x.new_ones(2), constraint=constraints.positive),
    )
    return Program(pair.model, pair.guide, (torch.randn(4, 2),))


@program
def created_from_a_number():
    pair = Affine(
        lambda x: pyro.param("loc", x.new_tensor(0.0)),
        lambda x: pyro.param("slope", x.new_tensor(1.0)),
    )
    return Program(pair.model, pair.guide, (torch.randn(4, 2),))


@program
def declared_outside():
    """The statement in the program only looks the value up."""
    loc, slope = torch.zeros(2), torch.ones(2)
    pair = Affine(lambda x: pyro.param("loc"), lambda x: pyro.param("slope"))

    def declare():
        pyro.param("loc", loc)
        pyro.param("slope", slope)

    declare()
    return Program(pair.model, pair.guide, (torch.randn(4, 2),))


@program
def read_by_both():
    """The guide reads the decoder's loc, which is moved by the decoder alone."""
    start = torch.zeros(2)

    def slope(x):
        return pyro.param("slope", torch.ones_like(start)) + 0 * pyro.param("loc", start)

    pair = Affine(lambda x: pyro.param("loc", start), slope)
    return Program(pair.model, pair.guide, (torch.randn(4, 2),))


@program
def appearing_at_a_later_step():
    def decoder(x, late=False):
        loc = pyro.param("loc", x.new_zeros(2))
        return loc + pyro.param("late_loc", x.new_ones(2)) if late else loc

    def encoder(x, late=False):
        slope = pyro.param("slope", x.new_ones(2))
        return slope * pyro.param("late_slope", x.new_ones(2)) if late else slope

    pair = Affine(decoder, encoder)
    x = torch.randn(4, 2)
    return Program(pair.model, pair.guide, (x,), later=(((x,), {"late": True}), ((x,), {})))


@program
def networks_for_some_batches_only():
    """A head for each of two tasks."""
    heads = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    tails = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def model(x, task=0):
        pyro.module(f"head_{task}", heads[task])
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(heads[task](z), 1.0).to_event(1), obs=x)

    def guide(x, task=0):
        pyro.module(f"tail_{task}", tails[task])
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(tails[task](x), 1.0).to_event(1))

    x = torch.randn(4, 2)
    return Program(model, guide, (x,), later=(((x,), {"task": 1}),))


@program
def in_a_plate_with_event_dim():
    """One row of centres for each cluster, as an event."""
    net = nn.Linear(2, 3)

    def model(x):
        with pyro.plate("clusters", 3):
            centres = pyro.param("centres", torch.eye(3, 2).to(x), event_dim=1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(x.new_ones(3)))
            pyro.sample("x", dist.Normal(centres[z], 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=net(x)))

    return Program(model, guide, (torch.randn(5, 2),))


@program
def in_nested_plates():
    net = nn.Linear(1, 1)

    def model(x):
        with pyro.plate("rows", 3, dim=-2):
            row = pyro.param("row", x.new_zeros(3, 1), event_dim=0)
            with pyro.plate("columns", 4, dim=-1):
                cell = pyro.param("cell", x.new_ones(3, 4), constraint=constraints.positive)
                z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.5)))
                pyro.sample("x", dist.Normal(row + z, cell), obs=x)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=net(x[..., None]).squeeze(-1)))

    return Program(model, guide, (torch.randn(3, 4),))


@program
def frozen_layers():
    decoder, encoder = nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    encoder[0].requires_grad_(False)
    encoder.eval()  # or else Pyro warns of what is frozen

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    return Program(model, guide, (torch.randn(4, 3),))


@program
def prior_alone_is_learned():
    net = nn.Linear(1, 1)

    def model(x):
        p = pyro.param("p", x.new_tensor(0.5), constraint=constraints.unit_interval)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(p))
            pyro.sample("x", dist.Normal(2 * z - 1, 1.0), obs=x)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=net(x[:, None]).squeeze(-1)))

    return Program(model, guide, (torch.randn(5),))


@program
def fixed_decoder():
    """Only the encoder has something to learn: inference in a simulator."""
    net = nn.Linear(2, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sin() + z, 0.5).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 1.0).to_event(1))

    return Program(model, guide, (torch.randn(4, 2),))


@program
def fixed_encoder():
    def model(x):
        loc = pyro.param("loc", x.new_zeros(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5).to_event(1))

    return Program(model, guide, (torch.randn(4, 2),))
