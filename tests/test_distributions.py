"""Implicit distributions, and those without an inverse."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms
from pyro.optim import SGD, Adam
from torch import nn

from pyro_symeq import Implicit, SymmetricEquilibrium, SymmetricUtility
from tests.montecarlo import assert_mean

CENTRES = torch.tensor([[-2.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)


def mixture(shape):
    """Draws from a mixture of two Gaussians, with the sampler alone."""
    which = torch.multinomial(WEIGHTS, max(shape.numel(), 1), replacement=True).reshape(shape)
    return CENTRES[which] + 0.5 * torch.randn(*shape, 2)


IMPLICIT = Implicit(mixture, event_shape=(2,))
EXPLICIT = dist.MixtureSameFamily(dist.Categorical(WEIGHTS), dist.Normal(CENTRES, 0.5).to_event(1))


def test_shapes():
    assert IMPLICIT.sample().shape == (2,)
    assert IMPLICIT.sample((3, 4)).shape == (3, 4, 2)
    assert IMPLICIT.expand(torch.Size((5,))).sample((3,)).shape == (3, 5, 2)
    events = IMPLICIT.expand(torch.Size((5, 6))).to_event(1)
    assert (events.batch_shape, events.event_shape) == ((5,), (6, 2))
    assert IMPLICIT.expand(torch.Size((5, 6))).to_event().event_shape == (5, 6, 2)
    assert IMPLICIT.support.event_dim == 1


def test_draws_are_the_samplers():
    draws = IMPLICIT.sample((20_000,))
    assert_mean(draws, WEIGHTS @ CENTRES)
    assert_mean(draws**2, WEIGHTS @ (CENTRES**2) + 0.25)


def test_no_density():
    with pytest.raises(NotImplementedError, match="use a distribution with log_prob"):
        IMPLICIT.log_prob(torch.zeros(2))


def test_sampler_of_a_wrong_shape():
    with pytest.raises(ValueError, match=r"return shape \(3, 2\) when asked for \(3,\) draws"):
        Implicit(lambda shape: torch.zeros(shape), event_shape=(2,)).sample((3,))


def test_sampler_of_a_wrong_kind():
    with pytest.raises(TypeError, match="Expected sampler to be a function"):
        Implicit(torch.zeros(3))


class Pair(nn.Module):
    """Two-dimensional codes, three-dimensional data."""

    def __init__(self, prior):
        super().__init__()
        self.prior = prior
        self.decoder = nn.Linear(2, 3)
        self.encoder = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 4))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior)
            pyro.sample("x", dist.Normal(self.decoder(z), 0.3).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        loc, log_scale = self.encoder(x).chunk(2, dim=-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def test_gradients_are_those_of_the_same_prior_with_a_density():
    """The prior has no parameters, so its density is a constant to the decoder."""
    implicit, explicit = Pair(IMPLICIT), Pair(EXPLICIT)
    explicit.load_state_dict(implicit.state_dict())
    x = torch.randn(4, 3).repeat(25, 1)
    draws = {}
    for name, pair in {"implicit": implicit, "explicit": explicit}.items():
        loss = SymmetricUtility()(pair.model, pair.guide)
        draws[name] = []
        for _ in range(300):
            pair.zero_grad()
            loss(x).backward()
            draws[name].append(torch.cat([p.grad.flatten() for p in pair.parameters()]))
    assert_mean(torch.stack(draws["implicit"]) - torch.stack(draws["explicit"]), 0.0)


def test_decoder_gradient_is_the_same_draw_by_draw():
    gradients = []
    implicit = Pair(IMPLICIT)
    for prior in (IMPLICIT, EXPLICIT):
        pyro.clear_param_store()
        pair = Pair(prior)
        pair.load_state_dict(implicit.state_dict())
        symeq = SymmetricEquilibrium(pair.model, pair.guide, (SGD({"lr": 1.0}), SGD({"lr": 0.0})))
        x = torch.ones(4, 3)
        symeq.evaluate_loss(x)
        pyro.set_rng_seed(3)
        symeq.step(x)
        gradients.append(torch.cat([p.detach().flatten() for p in pair.decoder.parameters()]))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("capture", [False, True])
def test_latents_alone_teach_the_encoder(capture, device):
    """Only the prior could score them, so there is nothing for the decoder in such a batch."""
    moved = []
    for prior in (IMPLICIT, EXPLICIT):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        pair, drawn = Pair(prior).to(device), torch.randn(8, 2, device=device)
        start = {name: x.clone() for name, x in pair.state_dict().items()}

        def model(x, z, pair=pair):
            pyro.module("decoder", pair.decoder)
            with pyro.plate("data", 8):
                z = pyro.sample("z", pair.prior, obs=z)
                pyro.sample("x", dist.Normal(pair.decoder(z), 0.3).to_event(1), obs=x)

        def guide(x, z, pair=pair):
            pair.guide(x)

        symeq = SymmetricEquilibrium(model, guide, SGD({"lr": 0.01}), capture=capture)
        symeq.step(torch.ones(8, 3, device=device), drawn)
        symeq.step(None, drawn)
        pair.load_state_dict(start)
        pyro.set_rng_seed(1)
        losses = [symeq.step(None, drawn) for _ in range(5)]
        after = pair.decoder.state_dict()
        assert all(torch.equal(after[name], start[f"decoder.{name}"]) for name in after)
        moved.append([p.detach().cpu() for p in pair.encoder.parameters()])
        if prior is IMPLICIT:
            assert [loss.decoder for loss in losses] == [0.0] * 5
            assert all(loss.encoder != 0 for loss in losses)
    torch.testing.assert_close(*moved)


@pytest.mark.slow
def test_a_pair_learns_with_a_prior_that_can_only_be_sampled(device):
    """Data x = A z + noise: pushed away from A, the decoder comes back."""
    matrix = torch.randn(2, 3)
    x = (EXPLICIT.sample((4_000,)) @ matrix + 0.3 * torch.randn(4_000, 3)).to(device)
    prior = Implicit(lambda shape: mixture(shape).to(device), event_shape=(2,))
    pair = Pair(prior).to(device)
    with torch.no_grad():
        pair.decoder.weight.copy_(matrix.T + 0.5 * torch.randn(3, 2))
    symeq = SymmetricEquilibrium(pair.model, pair.guide, Adam({"lr": 0.01}))
    errors = []
    for step in range(3_000):
        symeq.step(x[torch.randint(len(x), (100,))])
        if step % 50 == 0:
            with torch.no_grad():
                dreams = pair.decoder(prior.sample((20_000,)))
            noise = 0.09 * torch.eye(3).to(device)
            spread = (dreams.T.cov() + noise - x.T.cov()).abs().max()
            errors.append(torch.stack([(dreams.mean(0) - x.mean(0)).abs().max(), spread]).cpu())
    start, end = errors[0], torch.stack(errors[-20:]).mean(0)
    assert (start > 0.5).all()
    assert (end < 0.2 * start).all()


class FlowingPair(Pair):
    """A pair whose prior, or whose guide, is a flow."""

    def __init__(self, flow, flows_in_guide):
        law = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        super().__init__(law if flows_in_guide else dist.TransformedDistribution(law, [flow]))
        self.flow, self.flows_in_guide = flow, flows_in_guide

    def model(self, x):
        if not self.flows_in_guide:
            pyro.module("flow", self.flow)
        super().model(x)

    def guide(self, x):
        if not self.flows_in_guide:
            super().guide(x)
            return
        pyro.module("encoder", self.encoder)
        pyro.module("flow", self.flow)
        law = dist.Normal(self.encoder(x)[:, :2], 1.0).to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(law, [self.flow]))


@pytest.mark.parametrize("kind", [transforms.planar, transforms.radial, transforms.sylvester])
@pytest.mark.parametrize("flows_in_guide", [False, True])
def test_flows_need_an_inverse(kind, flows_in_guide):
    """A flow remembers where its own draws come from, but is scored at the other player's."""
    pair = FlowingPair(kind(2), flows_in_guide)
    symeq = SymmetricEquilibrium(pair.model, pair.guide, SGD({"lr": 0.1}))
    with pytest.raises(ValueError, match="at site 'z' of values that its law did not draw: .*inv"):
        symeq.step(torch.randn(4, 3))


def test_flows_of_latents_that_all_rows_share_need_an_inverse():
    flow, network = transforms.planar(2), nn.Linear(3, 2)
    law, ones = dist.Normal(torch.zeros(2), 1.0).to_event(1), torch.ones(2, 3)

    def model(x):
        w = pyro.sample("w", law)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", law)
            pyro.sample("x", dist.Normal((w + z) @ ones, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("flow", flow)
        pyro.sample("w", dist.TransformedDistribution(law, [flow]))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(network(x), 1.0).to_event(1))

    with pytest.raises(ValueError, match="at site 'w' of values that its law did not draw"):
        SymmetricEquilibrium(model, guide, SGD({"lr": 0.1})).step(torch.randn(4, 3))


@pytest.mark.parametrize("flows_in_guide", [False, True])
def test_flows_with_an_inverse_learn(flows_in_guide):
    pair = FlowingPair(transforms.affine_autoregressive(2, [8]), flows_in_guide)
    symeq = SymmetricEquilibrium(pair.model, pair.guide, SGD({"lr": 0.01}))
    assert symeq.step(torch.randn(4, 3)) < torch.inf
