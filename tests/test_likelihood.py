"""The log-likelihood of a batch, against enumeration and integration."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import kl_divergence

from pyro_symeq import Implicit
from pyro_symeq.metrics import Estimate, LogLikelihood, log_likelihood
from tests.enumerable import Ladder, bits

X = torch.linspace(-2.0, 2.0, 7, dtype=torch.double)
EXACT = dist.Normal(0.0, 2**0.5).log_prob(X)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.6 * x - 0.2, 0.9))


def posterior(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def assert_exact(found):
    """For the posterior, each weight is the likelihood."""
    torch.testing.assert_close(found.values, EXACT)
    torch.testing.assert_close(found.elbos, EXACT)
    sizes = torch.full_like(EXACT, found.num_draws)
    torch.testing.assert_close(found.effective_sizes, sizes)


# --- a truth to compare with ----------------------------------------------------------------


def test_agrees_with_integration():
    """Compares with log N(x; 0, 2), and with the ELBO less by the KL divergence.

    The bias of the likelihood is -Var[w] / (2 K) relative to p(x), far below its random error.
    """
    kl = kl_divergence(dist.Normal(0.6 * X - 0.2, 0.9), dist.Normal(X / 2, 0.5**0.5))
    found = log_likelihood(model, guide, X, num_draws=40_000)
    torch.testing.assert_close(found.values, EXACT, rtol=0, atol=0.03)
    torch.testing.assert_close(found.elbos, EXACT - kl, rtol=0, atol=0.03)
    assert ((found.effective_sizes > 1000) & (found.effective_sizes < 40_000)).all()


@pytest.mark.parametrize("at_once", [1, 6, 7, 100])
def test_rows_are_scored_in_order_however_few_at_once(at_once):
    assert_exact(log_likelihood(model, posterior, X, num_draws=3, at_once=at_once))


def enumerated(pair, x, known):
    """log p of what is known of each row, and the variance of a weight relative to it."""
    exact, variance = [], []
    for i, row in enumerate(x):
        z0, z1 = bits(4).split(2, -1)
        fits = torch.ones(16, dtype=torch.bool)
        for value, given in zip((z0, z1), known, strict=True):
            if given is not None:
                fits &= (value == given[i]).all(-1)
        z0, z1 = z0[fits], z1[fits]
        rows = row.expand(len(z0), 3)
        log_p, log_q = pair.log_p(rows, z0, z1), pair.log_q(rows, z0, z1)
        if known[0] is not None:
            log_q = log_q - pair.log_q0(rows, z0)
        if known[1] is not None:
            log_q = pair.log_q0(rows, z0) if known[0] is None else torch.zeros(len(z0))
        total = log_p.logsumexp(0)
        exact.append(total)
        variance.append((2 * (log_p - total) - log_q).logsumexp(0).expm1())
    return torch.stack(exact), torch.stack(variance).clamp(min=0)


@pytest.mark.parametrize("which", ["x", "x, z0", "x, z1", "x, z0, z1"])
def test_agrees_with_enumeration(which):
    """Of a million comparisons, seven fail by chance."""
    pair = Ladder()
    x, num_draws = bits(3), 20_000
    z0 = torch.rand(8, 2).round() if "z0" in which else None
    z1 = torch.rand(8, 2).round() if "z1" in which else None
    exact, variance = enumerated(pair, x, (z0, z1))
    found = log_likelihood(pair.model, pair.guide, x, z0, z1, num_draws=num_draws)
    assert not found.values.requires_grad
    assert ((found.values - exact).abs() <= 4.5 * (variance / num_draws).sqrt() + 1e-9).all()
    sizes = num_draws / (1 + variance)  # of infinitely many draws
    torch.testing.assert_close(found.effective_sizes, sizes, rtol=0.1, atol=0)


# --- what programs can be like --------------------------------------------------------------


def test_latents_observed_in_some_rows():
    """z is known in the even rows: log p(x, z) there, and log p(x) in the others."""
    is_known = torch.arange(7) % 2 == 0
    z = torch.linspace(1.0, -1.0, 7)

    def partly(x, z, is_known):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0), obs=z, obs_mask=is_known)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def encoder(x, z, is_known):
        posterior(x)

    found = log_likelihood(partly, encoder, X, z, is_known, num_draws=5, at_once=11)
    joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(X)
    torch.testing.assert_close(found.values, torch.where(is_known, joint, EXACT))


def test_data_observed_in_some_rows():
    """Nothing is known of the odd rows, which the guide is told: their likelihood is 1."""
    is_known = torch.arange(7) % 2 == 0

    def partly(x, is_known):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=is_known)

    def encoder(x, is_known):
        with pyro.plate("data", len(x)):
            loc, scale = torch.where(is_known, x / 2, 0.0), torch.where(is_known, 0.5**0.5, 1.0)
            pyro.sample("z", dist.Normal(loc, scale))

    found = log_likelihood(partly, encoder, X, is_known, num_draws=5)
    torch.testing.assert_close(found.values, torch.where(is_known, EXACT, torch.zeros(7)))


def test_parts_of_rows_add_up():
    """Two numbers in each row, in an inner plate, with rows along the last argument dimension."""
    x = torch.stack([X, X.flip(0)])

    def halves(batch, *, scale=None):
        with pyro.plate("data", batch["x"].shape[-1], dim=-2), pyro.plate("halves", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, scale[:, None]), obs=batch["x"].T)

    def encoder(batch, *, scale=None):
        with pyro.plate("data", batch["x"].shape[-1], dim=-2), pyro.plate("halves", 2, dim=-1):
            pyro.sample("z", dist.Normal(batch["x"].T / 2, 0.5**0.5))

    found = log_likelihood(halves, encoder, {"x": x}, scale=torch.ones(7), num_draws=3, at_once=10)
    torch.testing.assert_close(found.values, EXACT + EXACT.flip(0))


def single(x):
    """A model that can't have draws along a plate of their own."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        assert z.dim() == 1
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def mixing(x):
    """A model whose draws along a plate are not as each alone."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z if z.dim() == 1 else z.flip(0), 1.0), obs=x)


@pytest.mark.parametrize("program", [model, single, mixing])
@pytest.mark.parametrize("at_once", [5, 21, 50])
def test_memory_is_bounded(program, at_once):
    """But for three looks at the whole batch: a dream, and what laws its rows have."""
    sizes = []

    def watched(x):
        program(x)
        sizes.append(len(x))

    def encoder(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
            sizes.append(z.numel())

    assert_exact(log_likelihood(watched, encoder, X, num_draws=20, at_once=at_once))
    assert sum(size > at_once for size in sizes) == (3 if at_once < 7 else 0)
    assert max(sizes) > at_once / 2


def test_weights_of_rows_that_are_done_are_not_kept(monkeypatch):
    shapes, of = [], LogLikelihood.of

    def watched(log_w):
        shapes.append(log_w.shape)
        return of(log_w)

    monkeypatch.setattr(LogLikelihood, "of", watched)
    assert_exact(log_likelihood(model, posterior, X, num_draws=3, at_once=6))
    assert shapes == [(3, 2), (3, 2), (3, 2), (3, 1)]


def test_networks_see_a_row_once():
    """The guide's network need not run for each draw, where programs broadcast."""
    sizes = []

    def watched(x):
        sizes.append(len(x))
        posterior(x)

    assert_exact(log_likelihood(model, watched, X, num_draws=100, at_once=1000))
    assert max(sizes) == 14  # two copies, to see whether that can be done


def test_rows_that_depend_on_each_other_run_together():
    """Also where only the mean of the batch matters, and where its size is fixed."""

    def depending(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + x.mean().round(), 0.5**0.5))

    def fixed(x):
        with pyro.plate("data", 7):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    for encoder in (depending, fixed):
        sizes = []

        def watched(x, encoder=encoder, sizes=sizes):
            sizes.append(len(x))
            encoder(x)

        assert_exact(log_likelihood(model, watched, X, num_draws=3, at_once=4))
        assert sizes[-3:] == [7, 7, 7]


def test_buffers_gradients_and_parameters_stay():
    norm = nn.BatchNorm1d(1)

    def normed(x):
        pyro.module("norm", norm)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(norm(x[:, None])[:, 0], 1.0))

    before = {name: value.clone() for name, value in norm.state_dict().items()}
    found = log_likelihood(model, normed, X, num_draws=50)
    assert found.values.shape == (7,)
    assert not found.values.requires_grad
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in norm.parameters())
    assert norm.training


def test_follows_device_and_type(device):
    def standard(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = X.float().to(device)
    found = log_likelihood(standard, posterior, x, num_draws=4)
    assert found.values.dtype == torch.float32
    assert found.values.device.type == found.effective_sizes.device.type == device.type
    torch.testing.assert_close(found.values.double().cpu(), EXACT, rtol=0, atol=1e-5)


def test_auxiliary_draws_of_the_guide():
    """A mixture of guides, of which the weights know the component that has drawn."""

    def mixture(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(0.5), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(x / 2 + 0.4 * a, 1.0))

    found = log_likelihood(model, mixture, X, num_draws=20_000)
    torch.testing.assert_close(found.values, EXACT, rtol=0, atol=0.03)


def test_rows_without_any_weight():
    log_w = torch.tensor([[0.0, -math.inf], [0.0, -math.inf], [0.0, -math.inf]])
    found = LogLikelihood.of(log_w)
    assert found.values.tolist() == [pytest.approx(0.0), -math.inf]
    assert found.effective_sizes.tolist() == [pytest.approx(3.0), 0.0]


# --- what is told ---------------------------------------------------------------------------


def test_means_and_errors():
    found = LogLikelihood.of(torch.tensor([[-1.0, -2.0, -3.0]]))
    assert (found.mean, found.error) == pytest.approx((-2, 1 / math.sqrt(3)))
    assert found.elbo == Estimate(found.mean, found.error)
    assert str(found) == "-2.00 ± 0.58 nats (1 draws)"


def test_a_single_row_has_no_error():
    found = log_likelihood(model, posterior, X[:1], num_draws=2)
    assert math.isnan(found.error)


# --- misuse ---------------------------------------------------------------------------------


def refused(message, *programs, **options):
    with pytest.raises(ValueError, match=message):
        log_likelihood(*(programs or (model, guide)), X, **options)


def test_counts():
    refused("Expected num_draws to be an integer of at least 1, got 0", num_draws=0)
    refused("Expected at_once to be an integer of at least 1, got 2.5", at_once=2.5)


def test_a_prior_without_a_density():
    def implicit(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Implicit(lambda shape: torch.randn(*shape, len(x)), (len(x),)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    refused("site 'z' is Implicit and has no density", implicit, guide)


def test_programs_without_rows():
    def whole(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.expand(len(x)), 1.0).to_event(1), obs=x)

    def encoder(x):
        pyro.sample("z", dist.Normal(x.mean(), 1.0))

    def factor(x):
        model(x)
        pyro.factor("extra", x.sum())

    refused("in one vectorised plate, whose rows", whole, encoder)
    refused("in one vectorised plate, whose rows", factor, guide)


def test_subsamples():
    def some(x):
        with pyro.plate("data", len(x), subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def encoder(x):
        with pyro.plate("data", len(x), subsample_size=3) as index:
            pyro.sample("z", dist.Normal(x[index], 1.0))

    refused("A plate leaves out rows", some, encoder)


def test_latents_alone():
    pair = Ladder()
    z0, z1 = torch.zeros(3, 2), torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"observes latents alone.* Give \['x'\] too"):
        log_likelihood(pair.model, pair.guide, None, z0, z1)
