"""The ELBO by the estimator of DARN: exact where that is promised, and what Pyro climbs."""

import itertools
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from tests.processes import EXAMPLES

sys.path.append(str(EXAMPLES))

from elbo import DarnBernoulli, elbo  # noqa: E402


def expectation(logits, f):
    """The mean of f and of its estimated gradient in the logits, over all draws."""
    value, gradient = torch.zeros(()), torch.zeros_like(logits)
    for bits in itertools.product((0.0, 1.0), repeat=len(logits)):
        law = DarnBernoulli(logits=logits.clone().requires_grad_())
        law.sample = lambda shape, bits=bits: torch.tensor(bits)
        draw = law.rsample()
        assert draw.tolist() == list(bits)
        probability = law.log_prob(draw).sum().exp().detach()
        value = value + probability * f(draw).detach()
        gradient += probability * torch.autograd.grad(f(draw), law.logits)[0]
    return value, gradient


def enumerated(logits, f):
    """The gradient of the mean of f in the logits."""
    logits = logits.clone().requires_grad_()
    law = dist.Bernoulli(logits=logits)
    rows = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(logits))))
    mean = sum(law.log_prob(bits).sum().exp() * f(bits) for bits in rows)
    return mean.detach(), torch.autograd.grad(mean, logits)[0]


def quadratic(bits):
    """Quadratic in each bit, with products of different ones."""
    matrix = torch.arange(9.0).reshape(3, 3) - 3
    return bits @ matrix @ bits + bits[0] * bits[1] ** 2 * bits[2] - 2 * bits.sum()


def test_the_estimator_has_no_bias_for_quadratic_functions():
    logits = torch.tensor([-1.5, 0.3, 2.0])
    value, gradient = expectation(logits, quadratic)
    expected_value, expected_gradient = enumerated(logits, quadratic)
    assert value.item() == pytest.approx(expected_value.item())
    assert torch.allclose(gradient, expected_gradient)


def test_its_bias_for_others_is_that_of_the_trapezoid_rule():
    # (f'(0) + f'(1)) / 2 = 3/2 for b³, where f(1) - f(0) = 1; times dp/da = 1/4 at p = 1/2
    _, gradient = expectation(torch.zeros(1), lambda bits: bits[0] ** 3)
    assert gradient.item() == pytest.approx(1.5 / 4)


def pair(latent):
    torch.manual_seed(0)
    decoder, encoder = nn.Linear(3, 5), nn.Linear(5, 3)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=torch.zeros(3)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", latent(logits=encoder(x)).to_event(1))

    return model, guide, [*decoder.parameters(), *encoder.parameters()]


def test_it_is_what_svi_climbs():
    model, guide, parameters = pair(DarnBernoulli)
    x = torch.rand(20, 5).round()
    pyro.set_rng_seed(1)
    ours = elbo(model, guide, x)
    pyro.set_rng_seed(1)
    theirs = Trace_ELBO().differentiable_loss(model, guide, x)
    assert ours.item() == pytest.approx(-theirs.item())
    for a, b in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True
    ):
        assert torch.allclose(a, -b)
