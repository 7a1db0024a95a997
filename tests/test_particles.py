"""Several draws for a utility: particles that are averaged, proposals of which one is chosen."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.optim import SGD

from pyro_symeq import Batch, Implicit, SymmetricEquilibrium, SymmetricUtility
from tests.enumerable import Ladder, bits, gradients, utilities
from tests.montecarlo import assert_mean

X = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
Z0 = torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
BATCHES = {"x": {"x": X}, "x and z0": {"x": X, "z0": Z0}}


@pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vectorised"])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_mean_utilities_and_gradients_are_the_enumerated_ones(batch, vectorize, device):
    """Of 100 estimates with 5 particles each; 5 standard errors."""
    ladder = Ladder()
    expected = utilities(ladder, **batch), gradients(ladder, **batch)
    ladder.to(device)
    batch = {name: value.to(device) for name, value in batch.items()}
    utility = SymmetricUtility(num_particles=5, vectorize_particles=vectorize)
    stage = utility.stage(ladder.model, ladder.guide)
    players = ("decoder", "encoder"), (ladder.theta, ladder.phi)
    for player, leaves, value, gradient in zip(*players, *expected, strict=True):
        scores = [stage.score(player, ((), batch)) for _ in range(100)]
        assert_mean(torch.stack([score.utility.detach().cpu() for score in scores]), value)
        drawn = [score.gradients(leaves) for score in scores]
        for i, grad in enumerate(gradient):
            if grad is not None:
                assert_mean(torch.stack([-g[i].cpu() for g in drawn]), grad)


def test_vectorised_particles_take_one_run_of_the_model():
    ladder, runs = Ladder(), []

    def model(x):
        runs.append(x)
        return ladder.model(x)

    for vectorize, expected in ((False, 7), (True, 1)):
        utility = SymmetricUtility(num_particles=7, vectorize_particles=vectorize)
        stage = utility.stage(model, ladder.guide)
        stage.score("decoder", ((X,), {}))
        runs.clear()
        stage.score("decoder", ((X,), {}))
        assert len(runs) == expected


def chosen(log_p, log_q, num_proposals):
    """Enumerates the law of the chosen state: draws from q, one kept with weight p / q."""
    q, w = log_q.exp(), (log_p - log_q).exp()
    law = torch.zeros_like(q)
    for draws in itertools.product(range(len(q)), repeat=num_proposals):
        draws = torch.tensor(draws, device=q.device)
        law.index_add_(0, draws, q[draws].prod() * w[draws] / w[draws].sum())
    return law


@pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vectorised"])
@pytest.mark.parametrize("num_proposals", [1, 3])
@pytest.mark.parametrize("given", [False, True], ids=["none given", "z0 given"])
def test_proposals_are_chosen_row_by_row_with_the_weight_p_over_q(
    num_proposals, given, vectorize, device
):
    """The frequencies of the states of 20,000 rows; 5 standard errors."""
    ladder, num_rows = Ladder().to(device), 20_000
    x = X[0].to(device).expand(num_rows, 3).contiguous()
    z0 = Z0[0].to(device)
    batch = {"x": x, "z0": z0.expand(num_rows, 2).contiguous()} if given else {"x": x}
    utility = SymmetricUtility(num_proposals=num_proposals, vectorize_particles=vectorize)
    trace, _ = utility._get_trace(ladder.model, ladder.guide, (), batch)
    states = torch.cat([trace.nodes[name]["value"] for name in ("z0", "z1")], -1)

    every = bits(4).to(device)
    if given:
        every = every[(every[:, :2] == z0).all(-1)]
    b0, b1 = every.split(2, -1)
    x_row = x[: len(every)]
    log_q = ladder.log_q(x_row, b0, b1) - (ladder.log_q0(x_row, b0) if given else 0)
    law = chosen(ladder.log_p(x_row, b0, b1).detach(), log_q.detach(), num_proposals)
    for state, probability in zip(every, law, strict=True):
        assert_mean((states == state).all(-1).double(), probability)


@pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vectorised"])
def test_proposals_under_nested_plates_masks_and_scales(vectorize):
    """Inner plates, masked rows and scales don't mix rows: each row is chosen as if alone."""
    num_rows, num_inner = 5000, 2
    x = torch.tensor([0.3, -0.4]).expand(num_rows, 2).contiguous()
    mask = torch.arange(num_rows) % 2 == 0

    def model(x):
        mean = pyro.param("mean", torch.tensor(1.0))
        with pyro.plate("rows", num_rows, dim=-2), poutine.scale(scale=3.0):
            z = pyro.sample("z", dist.Bernoulli(torch.full((1,), 0.3)))
            with pyro.plate("inner", num_inner, dim=-1), poutine.mask(mask=mask[:, None]):
                pyro.sample("x", dist.Normal(z * mean, 1.0), obs=x)

    def guide(x):
        logits = pyro.param("logits", torch.tensor(0.5))
        with pyro.plate("rows", num_rows, dim=-2):
            pyro.sample("z", dist.Bernoulli(logits=logits + 0 * x[:, :1]))

    utility = SymmetricUtility(num_proposals=2, vectorize_particles=vectorize)
    trace, _ = utility._get_trace(model, guide, (x,), {})
    z = torch.tensor([0.0, 1.0])
    log_q = dist.Bernoulli(logits=torch.tensor(0.5)).log_prob(z)
    prior = dist.Bernoulli(0.3).log_prob(z)
    likelihood = dist.Normal(z[:, None], 1.0).log_prob(x[0]).sum(-1)
    drawn = trace.nodes["z"]["value"][:, 0]
    for rows, log_p in ((mask, prior + likelihood), (~mask, prior)):
        assert_mean(drawn[rows], chosen(log_p, log_q, 2)[1])


@pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vectorised"])
def test_proposals_of_a_guide_without_plates_are_chosen_whole(vectorize):
    x, slope = torch.tensor([0.3, 2.0]), torch.tensor([1.0, -0.5])

    def model(x):
        with pyro.plate("rows", 2):
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.3)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Bernoulli(logits=slope * x))

    utility = SymmetricUtility(num_proposals=2, vectorize_particles=vectorize, max_plate_nesting=1)
    traces = [utility._get_trace(model, guide, (x,), {})[0] for _ in range(2000)]
    drawn = torch.stack([trace.nodes["z"]["value"] for trace in traces])
    states = bits(2).to(x)
    log_q = dist.Bernoulli(logits=slope * x).log_prob(states).sum(-1)
    log_p = dist.Bernoulli(0.3).log_prob(states) + dist.Normal(states, 1.0).log_prob(x)
    for state, probability in zip(states, chosen(log_p.sum(-1), log_q, 2), strict=True):
        assert_mean((drawn == state).all(-1).double(), probability)


def test_proposals_need_densities_and_one_set_of_sites():
    def model(x, implicit=False):
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            prior = Implicit(torch.rand) if implicit else dist.Normal(0.0, 1.0)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x, implicit=False):
        slope = pyro.param("slope", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 1.0))

    symeq = SymmetricEquilibrium(
        model, guide, SGD({"lr": 0.1}), loss=SymmetricUtility(num_proposals=2)
    )
    symeq.step(torch.ones(3))
    with pytest.raises(ValueError, match="'z' is Implicit"):
        symeq.step(torch.ones(3), True)


@pytest.mark.parametrize("option", ["num_particles", "num_proposals"])
def test_counts_are_checked(option):
    with pytest.raises(ValueError, match=f"Expected {option} to be an integer of at least 1"):
        SymmetricUtility(**{option: 0})


@pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vectorised"])
def test_particles_of_batches(vectorize):
    ladder = Ladder()
    utility = SymmetricUtility(num_particles=3, num_proposals=2, vectorize_particles=vectorize)
    symeq = SymmetricEquilibrium(ladder.model, ladder.guide, SGD({"lr": 0.1}), loss=utility)
    loss = symeq.step(Batch(X, z0=Z0), Batch(X))
    assert loss.decoder < 0 and loss.encoder < 0
