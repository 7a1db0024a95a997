"""Sets of sites that change from draw to draw, and several draws at once."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from tests.programs.base import Program, program, variants


@program
def branch_with_a_latent_of_its_own():
    """w is there if on is 1."""
    net = nn.Linear(2, 3)

    def model(x):
        shift = pyro.param("shift", x.new_zeros(2))
        on = pyro.sample("on", dist.Bernoulli(x.new_tensor(0.5)))
        w = x.new_zeros(2)
        if on:
            w = pyro.sample("w", dist.Normal(shift, 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w + shift, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        f = net(x.mean(0))
        if pyro.sample("on", dist.Bernoulli(logits=f[2])):
            pyro.sample("w", dist.Normal(f[:2], 1.0).to_event(1))

    return Program(model, guide, (torch.randn(4, 2),))


@program
def branch_for_each_row():
    net = nn.Linear(2, 2)

    def model(x):
        shift = pyro.param("shift", x.new_zeros(()))
        for i in pyro.plate("data", len(x)):
            loc = shift
            if pyro.sample(f"on_{i}", dist.Bernoulli(x.new_tensor(0.5))):
                loc = pyro.sample(f"loc_{i}", dist.Normal(shift, 2.0))
            pyro.sample(f"x_{i}", dist.Normal(loc.expand(2), 1.0).to_event(1), obs=x[i])

    def guide(x):
        pyro.module("net", net)
        for i in pyro.plate("data", len(x)):
            logits, loc = net(x[i]).unbind(-1)
            if pyro.sample(f"on_{i}", dist.Bernoulli(logits=logits)):
                pyro.sample(f"loc_{i}", dist.Normal(loc, 1.0))

    return Program(model, guide, (torch.randn(3, 2),))


@program
def geometric_number_of_latents():
    net = nn.Linear(2, 3)

    def model(x):
        step = pyro.param("step", x.new_ones(2))
        loc, i = x.new_zeros(2), 0
        while pyro.sample(f"go_{i}", dist.Bernoulli(x.new_tensor(0.5))):
            loc = pyro.sample(f"z_{i}", dist.Normal(loc + step, 1.0).to_event(1))
            i += 1
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        f, i = net(x.mean(0)), 0
        while pyro.sample(f"go_{i}", dist.Bernoulli(logits=f[2])):
            pyro.sample(f"z_{i}", dist.Normal(f[:2], 1.0).to_event(1))
            i += 1

    return Program(model, guide, (torch.randn(3, 2),))


@program
def recursive_programs():
    """A random tree with a number in each leaf; the data are the sum of the leaves."""
    net = nn.Linear(2, 2)

    def grow(x, bias, name=""):
        depth = len(name)
        if depth < 3 and pyro.sample(f"split{name}", dist.Bernoulli(x.new_tensor(0.4))):
            return grow(x, bias, name + "l") + grow(x, bias, name + "r")
        return pyro.sample(f"leaf{name}", dist.Normal(bias, 1.0))

    def model(x):
        bias = pyro.param("bias", x.new_zeros(()))
        total = grow(x, bias)
        pyro.sample("x", dist.Normal(total.expand(2), 0.5).to_event(1), obs=x)

    def fit(f, name=""):
        if len(name) < 3 and pyro.sample(f"split{name}", dist.Bernoulli(logits=f[0])):
            fit(f, name + "l")
            fit(f, name + "r")
        else:
            pyro.sample(f"leaf{name}", dist.Normal(f[1], 1.0))

    def guide(x):
        pyro.module("net", net)
        fit(net(x))

    return Program(model, guide, (torch.randn(2),))


@program
def observed_site_whose_name_depends_on_a_draw():
    net = nn.Linear(2, 1)

    def model(x):
        locs = pyro.param("locs", torch.tensor([[0.0, 1.0], [1.0, 0.0]]).to(x))
        for i in pyro.plate("data", len(x)):
            k = int(pyro.sample(f"k_{i}", dist.Bernoulli(x.new_tensor(0.5))))
            name = f"left_{i}" if k else f"right_{i}"
            pyro.sample(name, dist.Normal(locs[k], 1.0).to_event(1), obs=x[i])

    def guide(x):
        pyro.module("net", net)
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"k_{i}", dist.Bernoulli(logits=net(x[i]).squeeze(-1)))

    return Program(model, guide, (torch.randn(3, 2),))


@program
def whole_data_observed_at_one_site_or_another():
    net = nn.Linear(2, 1)

    def model(x):
        locs = pyro.param("locs", torch.tensor([[0.0, 1.0], [1.0, 0.0]]).to(x))
        k = int(pyro.sample("k", dist.Bernoulli(x.new_tensor(0.5))))
        with pyro.plate("data", len(x)):
            name = "left" if k else "right"
            pyro.sample(name, dist.Normal(locs[k], 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        pyro.sample("k", dist.Bernoulli(logits=net(x.mean(0)).squeeze(-1)))

    return Program(model, guide, (torch.randn(3, 2),))


@program
def parameters_of_the_branch_taken():
    net = nn.Linear(2, 1)

    def model(x):
        k = int(pyro.sample("k", dist.Bernoulli(x.new_tensor(0.5))))
        loc = pyro.param(f"loc_{k}", x.new_full((2,), float(k)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        pyro.sample("k", dist.Bernoulli(logits=net(x.mean(0)).squeeze(-1)))

    return Program(model, guide, (torch.randn(3, 2),))


class Pair:
    """A ladder of a binary and a normal latent, row by row."""

    def __init__(self):
        self.decoder = nn.Linear(3, 4)
        self.encoder = nn.Linear(4, 3)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[-2]):
            y = pyro.sample("y", dist.Bernoulli(x.new_tensor(0.5)))
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            code = torch.cat([y[..., None], z], -1)
            pyro.sample("x", dist.Normal(self.decoder(code), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        f = self.encoder(x)
        with pyro.plate("data", x.shape[-2]):
            y = pyro.sample("y", dist.Bernoulli(logits=f[..., 0]))
            pyro.sample("z", dist.Normal(f[..., 1:] + y[..., None], 1.0).to_event(1))


PARTICLES = {
    "in a loop": {"num_particles": 3},
    "vectorised": {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1},
    "vectorised, guessed": {"num_particles": 3, "vectorize_particles": True},
    "best of several": {"num_proposals": 3},
    "best of several, in a loop": {"num_particles": 2, "num_proposals": 3},
}


@variants(PARTICLES)
def particles(options):
    pair = Pair()
    return Program(pair.model, pair.guide, (torch.randn(5, 4),), options=options, is_sum=False)


@program
def particles_of_a_branch():
    pair = branch_with_a_latent_of_its_own()
    options = {"num_particles": 2}
    return Program(pair.model, pair.guide, pair.args, options=options, is_sum=False)


@variants({"in a loop": {"num_particles": 2}, "best of several": {"num_proposals": 2}})
def particles_of_a_subsample(options):
    pair = Pair()

    def model(data):
        pyro.module("decoder", pair.decoder)
        with pyro.plate("data", len(data), subsample_size=3) as ind:
            y = pyro.sample("y", dist.Bernoulli(data.new_tensor(0.5)))
            z = pyro.sample("z", dist.Normal(data.new_zeros(2), 1.0).to_event(1))
            code = torch.cat([y[..., None], z], -1)
            pyro.sample("x", dist.Normal(pair.decoder(code), 1.0).to_event(1), obs=data[ind])

    def guide(data):
        pyro.module("encoder", pair.encoder)
        with pyro.plate("data", len(data), subsample_size=3) as ind:
            f = pair.encoder(data[ind])
            y = pyro.sample("y", dist.Bernoulli(logits=f[..., 0]))
            pyro.sample("z", dist.Normal(f[..., 1:] + y[..., None], 1.0).to_event(1))

    return Program(model, guide, (torch.randn(6, 4),), options=options, is_sum=False)


@variants({name: PARTICLES[name] for name in ("in a loop", "vectorised", "best of several")})
def particles_with_labels(options):
    pair = Pair()

    def model(x, y=None):
        pyro.module("decoder", pair.decoder)
        with pyro.plate("data", x.shape[-2]):
            y = pyro.sample("y", dist.Bernoulli(x.new_tensor(0.5)), obs=y)
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            code = torch.cat([y[..., None].expand(*z.shape[:-1], 1), z], -1)
            pyro.sample("x", dist.Normal(pair.decoder(code), 1.0).to_event(1), obs=x)

    x, y = torch.randn(4, 4), torch.tensor([1.0, 0.0, 1.0, 1.0])
    return Program(
        model,
        lambda x, y=None: pair.guide(x),
        (x, y),
        options=options,
        labels={"y": y},
        is_sum=False,
    )
