"""Functions that a user compiles may train pairs."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import Adam
from torch import nn

from pyro_symeq import SymmetricEquilibrium, SymmetricUtility
from tests.comparison import same

X = torch.eye(4, dtype=torch.float64).repeat(3, 1)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        self.decoder, self.encoder = nn.Linear(2, 4), nn.Linear(4, 2)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))


def symeq(pair):
    return SymmetricEquilibrium(pair.model, pair.guide, Adam({"lr": 0.1}))


def step(pair):
    return symeq(pair).step


def respond(pair):
    game = symeq(pair)
    return lambda x: game.respond("encoder", x)


def evaluate(pair):
    game = symeq(pair)
    return lambda x: (float(game.evaluate_loss(x)), game.evaluate("decoder", x))


def module(pair):
    return SymmetricUtility()(pair.model, pair.guide)


@pytest.mark.parametrize("make", [step, respond, evaluate, module])
def test_what_calls_the_library_may_be_compiled(make):
    found = []
    for compiled in (False, True):
        pair = Pair()
        function = make(pair)
        if compiled:
            function = torch.compile(lambda x, f=function: f(2 * x / 2), backend="eager")
        told = [function(X) for _ in range(3)]
        if make is module:
            sum(told).backward()
        found.append((told, [(p.detach(), p.grad) for p in pair.parameters()]))
    torch.compiler.reset()
    assert same(*found)
