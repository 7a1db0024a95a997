"""Effect handlers and statements around the sites of a program."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.infer import config_enumerate
from pyro.infer.reparam import LocScaleReparam
from torch import nn

from tests.programs.base import Program, program, variants


class Pair:
    """A pair of linear networks, with a prior of its own choice."""

    def __init__(self):
        self.decoder = nn.Linear(2, 3)
        self.encoder = nn.Linear(3, 2)

    def prior(self, x):
        return dist.Normal(x.new_zeros(2), 1.0).to_event(1)

    def likelihood(self, z):
        return dist.Normal(self.decoder(z), 1.0).to_event(1)

    def posterior(self, x):
        return dist.Normal(self.encoder(x), 1.0).to_event(1)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(x))
            pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(x))


def rows():
    return torch.randn(4, 3)


@program
def scale_within():
    pair = Pair()

    def model(x):
        with poutine.scale(scale=0.1):
            pair.model(x)

    def guide(x):
        with poutine.scale(scale=0.1):
            pair.guide(x)

    return Program(model, guide, (rows(),))


@program
def scale_without():
    pair = Pair()
    model = poutine.scale(pair.model, scale=1 / 12)
    return Program(model, poutine.scale(pair.guide, scale=1 / 12), (rows(),))


@program
def annealing_as_an_argument():
    pair = Pair()

    def model(x, annealing=1.0):
        pyro.module("decoder", pair.decoder)
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=annealing):
                z = pyro.sample("z", pair.prior(x))
            pyro.sample("x", pair.likelihood(z), obs=x)

    def guide(x, annealing=1.0):
        with poutine.scale(scale=annealing):
            pair.guide(x)

    x = rows()
    return Program(model, guide, (x, 0.2), later=(((x,), {"annealing": 0.7}), ((x,), {})))


@program
def mask_as_an_argument():
    """Rows of padding count for neither player."""
    pair = Pair()

    def model(x, mask):
        with poutine.mask(mask=mask):
            pair.model(x)

    def guide(x, mask):
        with poutine.mask(mask=mask):
            pair.guide(x)

    return Program(model, guide, (rows(), torch.tensor([True, True, False, True])))


@program
def masked_distributions():
    pair = Pair()
    pixels = torch.tensor([True, False, True])

    def model(x):
        pyro.module("decoder", pair.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pair.prior(x))
            law = dist.Normal(pair.decoder(z), 1.0).mask(pixels).to_event(1)
            pyro.sample("x", law, obs=x)

    return Program(model, pair.guide, (rows(),))


@program
def masked_rows_of_a_distribution():
    pair = Pair()

    def model(x, known):
        pyro.module("decoder", pair.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pair.prior(x))
            pyro.sample("x", pair.likelihood(z).mask(known), obs=x)

    known = torch.tensor([True, False, True, True])
    return Program(model, lambda x, known: pair.guide(x), (rows(), known))


@program
def condition_inside_on_the_argument():
    pair = Pair()

    def generate(n):
        pyro.module("decoder", pair.decoder)
        with pyro.plate("data", n):
            z = pyro.sample("z", pair.prior(pair.decoder.weight))
            return pyro.sample("x", pair.likelihood(z))

    def model(x):
        return poutine.condition(generate, {"x": x})(len(x))

    return Program(model, pair.guide, (rows(),))


class TwoLatents:
    """w and z, either of which may be set from outside."""

    def __init__(self):
        self.decoder = nn.Linear(4, 3)
        self.encoder = nn.Linear(3, 4)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            z = pyro.sample("z", dist.Normal(w, 1.0).to_event(1))
            loc = self.decoder(torch.cat([w, z], -1))
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        w, z = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("w", dist.Normal(w, 1.0).to_event(1))
            pyro.sample("z", dist.Normal(z, 1.0).to_event(1))


@program
def condition_outside_a_latent_on_a_constant():
    pair = TwoLatents()
    w = torch.randn(4, 2)
    model = poutine.condition(pair.model, {"w": w})
    return Program(model, pair.guide, (rows(),), labels={"w": w}, is_sum=False)


@program
def do_sets_a_latent():
    pair = TwoLatents()
    model = poutine.do(pair.model, {"w": torch.zeros(4, 2)})
    return Program(model, pair.guide, (rows(),))


@program
def lift_makes_latents_of_parameters():
    net = nn.Linear(2, 2)

    def weigh(x):
        loc = pyro.param("loc", x.new_zeros(2))
        scale = pyro.param("scale", x.new_ones(2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)

    def model(x):
        prior = {"loc": dist.Normal(x.new_zeros(2), 1.0).to_event(1)}
        return poutine.lift(weigh, prior)(x)

    def guide(x):
        pyro.module("net", net)
        pyro.sample("loc", dist.Normal(net(x.mean(0)), 0.5).to_event(1))

    return Program(model, guide, (torch.randn(5, 2),))


@program
def block_hides_a_local_variable():
    """A noise of the decoder that is integrated out by sampling, and no site of the pair."""
    pair = Pair()

    def noise(x):
        return pyro.sample("noise", dist.Normal(x.new_zeros(3), 0.1).to_event(1))

    def model(x):
        pyro.module("decoder", pair.decoder)
        jitter = poutine.block(noise)(x).detach()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pair.prior(x))
            law = dist.Normal(pair.decoder(z) + jitter, 1.0).to_event(1)
            pyro.sample("x", law, obs=x)

    return Program(model, pair.guide, (rows(),), is_sum=False)


@program
def infer_config():
    pair = Pair()

    def config(site):
        return {"was": site["name"]}

    model = poutine.infer_config(pair.model, config)
    return Program(model, poutine.infer_config(pair.guide, config), (rows(),))


@variants({"sequential": "sequential", "parallel": "parallel"})
def marks_for_enumeration(how):
    decoder, encoder = nn.Embedding(3, 4), nn.Linear(4, 3)

    @config_enumerate(default=how)
    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(x.new_ones(3)))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    @config_enumerate(default=how)
    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=encoder(x)), infer={"enumerate": how})

    return Program(model, guide, (torch.randn(4, 4),))


@program
def deterministic_sites():
    pair = Pair()

    def model(x):
        pyro.module("decoder", pair.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pair.prior(x))
            loc = pyro.deterministic("loc", pair.decoder(z), event_dim=1)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", pair.encoder)
        with pyro.plate("data", len(x)):
            features = pyro.deterministic("features", pair.encoder(x), event_dim=1)
            pyro.sample("z", dist.Normal(features, 1.0).to_event(1))

    return Program(model, guide, (rows(),))


@program
def factor_as_a_penalty():
    pair = Pair()

    def model(x):
        pair.model(x)
        pyro.factor("decay", -0.1 * pair.decoder.weight.square().sum())

    return Program(model, pair.guide, (rows(),))


@program
def factor_in_the_plate():
    pair = Pair()

    def model(x):
        pyro.module("decoder", pair.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pair.prior(x))
            loc = pair.decoder(z)
            pyro.factor("small", -0.1 * loc.square().sum(-1))
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    return Program(model, pair.guide, (rows(),))


@program
def reparametrised_latent():
    pair = Pair()

    def centred(x):
        pyro.module("decoder", pair.decoder)
        loc = pyro.param("loc", x.new_ones(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 2.0).to_event(1))
            pyro.sample("x", pair.likelihood(z), obs=x)

    def guide(x):
        pyro.module("encoder", pair.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z_decentered", pair.posterior(x))

    model = poutine.reparam(centred, config={"z": LocScaleReparam(0.0)})
    return Program(model, guide, (rows(),))


@program
def scope_prefixes_sites():
    pair = Pair()

    def model(x):
        with scope(prefix="part"):
            pair.model(x)

    def guide(x):
        with scope(prefix="part"):
            pair.guide(x)

    return Program(model, guide, (rows(),))


@program
def trace_and_return_values_within():
    pair = Pair()

    def model(x):
        pair.model(x)
        return x.mean()

    def guide(x):
        trace = poutine.trace(pair.guide).get_trace(x)
        return trace.nodes["z"]["value"]

    return Program(model, guide, (rows(),))
