"""Well-known models: mixtures, factor analysis, topics, regressions, point processes."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from tests.programs.base import Program, program


@program
def mixture_of_normals():
    net = nn.Linear(2, 3)

    def model(x):
        simplex = dist.constraints.simplex
        weights = pyro.param("weights", x.new_full((3,), 1 / 3), constraint=simplex)
        locs = pyro.param("locs", torch.eye(3, 2).to(x))
        scale = pyro.param("scale", x.new_tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(locs[k], scale).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=net(x)))

    return Program(model, guide, (torch.randn(5, 2),))


@program
def bayesian_mixture():
    """Weights and centres are latents too, read off the whole data set by the guide."""
    weigh, place, assign = nn.Linear(2, 3), nn.Linear(2, 6), nn.Linear(2, 3)

    def model(x):
        noise = pyro.param("noise", x.new_tensor(1.0), constraint=dist.constraints.positive)
        weights = pyro.sample("weights", dist.Dirichlet(x.new_ones(3)))
        with pyro.plate("clusters", 3):
            locs = pyro.sample("locs", dist.Normal(x.new_zeros(2), 2.0).to_event(1))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(locs[k], noise).to_event(1), obs=x)

    def guide(x):
        for name, net in (("weigh", weigh), ("place", place), ("assign", assign)):
            pyro.module(name, net)
        mean = x.mean(0)
        pyro.sample("weights", dist.Dirichlet(1 + weigh(mean).exp()))
        with pyro.plate("clusters", 3):
            pyro.sample("locs", dist.Normal(place(mean).reshape(3, 2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=assign(x)))

    return Program(model, guide, (torch.randn(5, 2),))


@program
def factor_analysis():
    encoder = nn.Linear(4, 2)

    def model(x):
        loadings = pyro.param("loadings", x.new_ones(2, 4))
        noise = pyro.param("noise", x.new_ones(4), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ loadings, noise).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        scale = pyro.param("scale", x.new_ones(2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), scale).to_event(1))

    return Program(model, guide, (torch.randn(5, 4),))


@program
def topics():
    """Words one by one, in documents of different lengths."""
    net = nn.Linear(6, 2)

    def model(words, lengths):
        logits = pyro.param("logits", net.weight.new_zeros(2, 6))
        known = torch.arange(words.shape[0], device=words.device)[:, None] < lengths
        with pyro.plate("documents", words.shape[1]):
            mix = pyro.sample("mix", dist.Dirichlet(logits.new_ones(2)))
            with pyro.plate("words", words.shape[0], dim=-2):
                topic = pyro.sample("topic", dist.Categorical(mix).mask(known))
                law = dist.Categorical(logits=logits[topic]).mask(known)
                pyro.sample("word", law, obs=words)

    def guide(words, lengths):
        pyro.module("net", net)
        known = torch.arange(words.shape[0], device=words.device)[:, None] < lengths
        f = net(torch.eye(6).to(net.weight)[words])
        with pyro.plate("documents", words.shape[1]):
            pyro.sample("mix", dist.Dirichlet(1 + (f * known[..., None]).sum(0).exp()))
            with pyro.plate("words", words.shape[0], dim=-2):
                pyro.sample("topic", dist.Categorical(logits=f).mask(known))

    words = torch.randint(6, (5, 3))
    return Program(model, guide, (words, torch.tensor([5, 3, 4])))


@program
def product_topics():
    """ProdLDA: a normal latent for each document, and its words as counts."""
    net = nn.Linear(8, 4)
    decoder = nn.Linear(2, 8, bias=False)

    def model(docs):
        pyro.module("decoder", decoder)
        with pyro.plate("documents", docs.shape[0]):
            theta = pyro.sample("theta", dist.Normal(docs.new_zeros(2), 1.0).to_event(1))
            law = dist.Multinomial(9, logits=decoder(theta.softmax(-1)))
            pyro.sample("counts", law, obs=docs)

    def guide(docs):
        pyro.module("net", net)
        loc, log_scale = net(docs).chunk(2, -1)
        with pyro.plate("documents", docs.shape[0]):
            pyro.sample("theta", dist.Normal(loc, log_scale.exp()).to_event(1))

    docs = torch.tensor([[3.0, 0, 2, 1, 1, 0, 2, 0], [0, 1, 0, 4, 0, 2, 2, 0]])
    return Program(model, guide, (docs,))


@program
def latent_regression_with_unknown_noise():
    net = nn.Linear(6, 2)

    def model(y, inputs):
        slope = pyro.param("slope", y.new_zeros(2))
        precision = pyro.sample("precision", dist.Gamma(y.new_tensor(3.0), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(inputs @ slope, precision.rsqrt()), obs=y)

    def guide(y, inputs):
        pyro.module("net", net)
        a, b = net(y).exp().unbind(-1)
        pyro.sample("precision", dist.Gamma(1 + a, 0.5 + b))

    return Program(model, guide, (torch.randn(6), torch.randn(6, 2)))


@program
def item_response():
    """Who answered which question right."""
    ability, difficulty = nn.Linear(8, 1), nn.Linear(6, 1)

    def model(right):
        mean = pyro.param("mean", right.new_zeros(()))
        people = pyro.plate("people", right.shape[0], dim=-2)
        questions = pyro.plate("questions", right.shape[1], dim=-1)
        with people:
            a = pyro.sample("ability", dist.Normal(mean, 1.0))
        with questions:
            b = pyro.sample("difficulty", dist.Normal(right.new_zeros(()), 1.0))
        with people, questions:
            pyro.sample("right", dist.Bernoulli(logits=a - b), obs=right)

    def guide(right):
        pyro.module("ability_net", ability)
        pyro.module("difficulty_net", difficulty)
        with pyro.plate("people", right.shape[0], dim=-2):
            pyro.sample("ability", dist.Normal(ability(right), 1.0))
        with pyro.plate("questions", right.shape[1], dim=-1):
            pyro.sample("difficulty", dist.Normal(difficulty(right.T).squeeze(-1), 1.0))

    return Program(model, guide, (torch.rand(6, 8).round(),))


@program
def sigmoid_belief_network():
    """Three binary layers, top-down and bottom-up."""
    down = nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 20)])
    up = nn.ModuleList([nn.Linear(20, 3), nn.Linear(3, 2)])

    def model(x):
        pyro.module("down", down)
        h = x.new_full((2,), 0.5).logit()
        with pyro.plate("data", len(x)):
            for i, net in enumerate(down):
                h = net(pyro.sample(f"h_{i}", dist.Bernoulli(logits=h).to_event(1)))
            pyro.sample("x", dist.Bernoulli(logits=h).to_event(1), obs=x)

    def guide(x):
        pyro.module("up", up)
        h = x
        with pyro.plate("data", len(x)):
            for i, net in zip((1, 0), up, strict=True):
                h = pyro.sample(f"h_{i}", dist.Bernoulli(logits=net(h)).to_event(1))

    return Program(model, guide, (torch.rand(4, 20).round(),))


@program
def counts_with_unknown_rates():
    net = nn.Linear(8, 2)

    def model(counts):
        a = pyro.param("a", counts.new_tensor(2.0), constraint=dist.constraints.positive)
        with pyro.plate("shops", counts.shape[1]):
            rate = pyro.sample("rate", dist.Gamma(a, 1.0))
            with pyro.plate("days", counts.shape[0]):
                pyro.sample("counts", dist.Poisson(rate), obs=counts)

    def guide(counts):
        pyro.module("net", net)
        a, b = net(counts.T).exp().unbind(-1)
        with pyro.plate("shops", counts.shape[1]):
            pyro.sample("rate", dist.Gamma(1 + a, 0.5 + b))

    return Program(model, guide, (torch.poisson(2 * torch.ones(8, 3)),))


@program
def change_point():
    net = nn.Linear(6, 6)

    def model(x):
        levels = pyro.param("levels", torch.tensor([0.0, 1.0]).to(x))
        k = pyro.sample("k", dist.Categorical(x.new_ones(6)))
        after = (torch.arange(6, device=x.device) >= k).long()
        with pyro.plate("time", 6):
            pyro.sample("x", dist.Normal(levels[after], 1.0), obs=x)

    def guide(x):
        pyro.module("net", net)
        pyro.sample("k", dist.Categorical(logits=net(x)))

    return Program(model, guide, (torch.randn(6),))


@program
def hidden_causes_of_two_views():
    """Probabilistic canonical correlation: one shared and two private latents."""
    down = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
    up = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(6, 2)])

    def model(left, right):
        pyro.module("down", down)
        normal = dist.Normal(left.new_zeros(2), 1.0).to_event(1)
        with pyro.plate("data", len(left)):
            shared = pyro.sample("shared", normal)
            for name, net, x in zip(("left", "right"), down, (left, right), strict=True):
                z = torch.cat([pyro.sample(f"z_{name}", normal), shared], -1)
                pyro.sample(name, dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(left, right):
        pyro.module("up", up)
        inputs = {"z_left": left, "z_right": right, "shared": torch.cat([left, right], -1)}
        with pyro.plate("data", len(left)):
            for (name, x), net in zip(inputs.items(), up, strict=True):
                pyro.sample(name, dist.Normal(net(x), 1.0).to_event(1))

    data = torch.randn(4, 3), torch.randn(4, 3)
    return Program(model, guide, data, data=data)
