"""What each latent says about the data, and the warning where that is next to nothing."""

import math
import re
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import SGD
from torch import nn
from torch.distributions.transforms import SigmoidTransform

from pyro_symeq import Batch, SymmetricEquilibrium
from pyro_symeq.metrics import information
from tests.comparison import same
from tests.enumerable import Ladder, bits
from tests.test_code import Pair, data, game, rest, steps


def entropy(p):
    return -sum(q * math.log2(q) for q in p if q > 0)


def squashed(loc):
    """A distribution whose mean is not known."""
    return dist.TransformedDistribution(dist.Normal(loc, 1.0), [SigmoidTransform()])


def guide_of(law):
    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", law(x))

    return guide


# --- against the definition -----------------------------------------------------------------

PROBS = torch.tensor(
    [[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.2, 0.1, 0.7]], dtype=torch.double
)


def test_a_bit():
    p = PROBS[:, 0]
    bits = information(guide_of(lambda x: dist.Bernoulli(p)), PROBS)["z"]
    mean = p.mean().item()
    within = sum(entropy([q, 1 - q]) for q in p.tolist()) / 4
    assert bits.item() == pytest.approx(entropy([mean, 1 - mean]) - within)


@pytest.mark.parametrize("kind", [dist.Categorical, dist.OneHotCategorical])
def test_a_category(kind):
    found = information(guide_of(lambda x: kind(x)), PROBS)["z"]
    expected = entropy(PROBS.mean(0).tolist()) - sum(map(entropy, PROBS.tolist())) / 4
    assert found.shape == ()
    assert found.item() == pytest.approx(expected)


def test_a_count():
    p = PROBS[:, 0]
    found = information(guide_of(lambda x: dist.Binomial(3, p)), PROBS)["z"]
    laws = [[math.comb(3, k) * q**k * (1 - q) ** (3 - k) for k in range(4)] for q in p.tolist()]
    mean = [sum(column) / 4 for column in zip(*laws, strict=True)]
    assert found.item() == pytest.approx(entropy(mean) - sum(map(entropy, laws)) / 4)


def test_a_count_out_of_another_number_in_each_row():
    counts = torch.tensor([1.0, 3.0, 4.0, 2.0]).double()
    law = dist.Binomial(counts, PROBS[:, 0])  # its values can't be enumerated: by its moments
    found = information(guide_of(lambda x: law), PROBS)["z"]
    total = law.mean.var(unbiased=False) + law.variance.mean()
    assert found.item() == pytest.approx((total.log2() - law.variance.log2().mean()).item() / 2)


def test_a_normal_variable():
    """Normal data and a linear guide: one half of the logarithm of one plus signal to noise."""
    x = torch.randn(20_000)
    x = (x - x.mean()) / x.std(unbiased=False)
    found = information(guide_of(lambda x: dist.Normal(3 * x, 2.0)), x)["z"]
    assert found.item() == pytest.approx(0.5 * math.log2(1 + 9 / 4))


def test_each_latent_counts_alone():
    p = torch.stack([PROBS[:, 0], torch.full((4,), 0.5)], -1)
    found = information(guide_of(lambda x: dist.Bernoulli(p).to_event(1)), PROBS)["z"]
    assert found.shape == (2,)
    assert found[0] > 0.2
    assert found[1] == 0


def test_rows_are_the_plate_that_all_latents_share():
    def guide(x):
        with pyro.plate("rows", 4, dim=-2), pyro.plate("parts", 3, dim=-1):
            pyro.sample("z", dist.Bernoulli(x))

    found = information(guide, PROBS)["z"]
    expected = [
        information(guide_of(lambda x, j=j: dist.Bernoulli(x[:, j])), PROBS) for j in range(3)
    ]
    torch.testing.assert_close(found, torch.stack([each["z"] for each in expected]))


def subsampling(x):
    """One bit: whether a row comes before or after the median of its subsample."""
    with pyro.plate("rows", len(x), subsample_size=20) as index:
        logits = 100 * (x[index] - x[index].median()) - 50
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("sign", torch.ones(())) * logits))


def test_all_runs_look_at_the_same_rows():
    assert information(subsampling, torch.arange(200.0))["z"].item() == pytest.approx(1)


def test_latents_above_are_averaged_out():
    """The enumerated posterior of the second layer; the estimate has a bias of 1/K."""
    ladder, x = Ladder(), bits(3)
    with torch.no_grad():
        for p in [*ladder.phi, *ladder.d1.parameters()]:
            p.mul_(5)
        q0 = torch.sigmoid(ladder.e0(x))
        z0 = bits(2)
        weights = torch.where(z0[:, None] > 0, q0, 1 - q0).prod(-1)
        q1 = torch.sigmoid(ladder.d1(z0)[:, None] + ladder.e1(x))
        q = (weights[..., None] * q1).sum(0)
    expected = [
        entropy([p.mean().item(), 1 - p.mean().item()])
        - sum(entropy([each, 1 - each]) for each in p.tolist()) / 8
        for p in q.T
    ]
    found = information(ladder.guide, x, num_draws=4000)["z1"]
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-3, rtol=0)
    single = [information(ladder.guide, x, num_draws=1)["z1"].sum() for _ in range(100)]
    assert torch.stack(single).mean() > found.sum() + 0.02


def test_it_is_nothing_where_the_guide_ignores_the_data():
    for law in (dist.Bernoulli(0.3), dist.Normal(1.0, 2.0), dist.Gamma(2.0, 1.0)):
        assert information(guide_of(lambda x, law=law: law.expand([4])), PROBS)["z"].item() < 1e-12


def test_sites_without_a_mean_are_left_out():
    found = information(guide_of(lambda x: squashed(torch.randn(4))), PROBS)
    assert found == {}


def test_sites_that_have_no_mean():
    found = information(guide_of(lambda x: dist.Cauchy(x[:, 0], 1.0)), PROBS)
    assert found["z"].isnan()


def test_vectors_that_are_not_enumerated_count_by_element():
    found = information(guide_of(lambda x: dist.MultivariateNormal(x, torch.eye(3))), PROBS)
    apart = information(guide_of(lambda x: dist.Normal(x, 1.0).to_event(1)), PROBS)
    torch.testing.assert_close(found["z"], apart["z"])


def test_masked_rows_count():
    is_counted = torch.arange(4) > 1
    found = information(guide_of(lambda x: dist.Bernoulli(x[:, 0]).mask(is_counted)), PROBS)
    assert found == information(guide_of(lambda x: dist.Bernoulli(x[:, 0])), PROBS)


def test_what_the_guide_observes_is_not_counted():
    def guide(x):
        with pyro.plate("rows", 4):
            pyro.sample("y", dist.Bernoulli(x[:, 0]), obs=torch.ones(4))
            pyro.sample("z", dist.Bernoulli(x[:, 0]))

    assert information(guide, PROBS).keys() == {"z"}


def test_latents_without_rows_are_refused():
    def guide(x):
        pyro.sample("z", dist.Bernoulli(x[:, 0]).to_event(1))

    with pytest.raises(ValueError, match="in one vectorised plate, whose rows are those of the"):
        information(guide, PROBS)


@pytest.mark.parametrize("number", [0, 1.5])
def test_draws_are_counted(number):
    with pytest.raises(ValueError, match="Expected num_draws to be an integer of at least 1"):
        information(guide_of(lambda x: dist.Bernoulli(x[:, 0])), PROBS, num_draws=number)


def test_averages_of_modules_stay():
    norm = nn.BatchNorm1d(3)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    guide = guide_of(lambda x: dist.Bernoulli(logits=norm(x)).to_event(1))
    assert information(guide, PROBS)["z"].requires_grad is False
    assert same(dict(norm.state_dict()), before)


# --- in the result of a step ----------------------------------------------------------------


def test_the_loss_has_it_where_it_is_watched():
    symeq = game(Pair(gain=3.0), rest(), watch=3)
    losses = steps(symeq, data(), 6)
    assert [loss.information is None for loss in losses] == [True, True, False] * 2
    shapes = {site: each.shape for site, each in losses[2].information.items()}
    assert shapes == {"z0": (6,), "z1": (6,)}


def test_it_is_that_of_the_guide_on_the_batch():
    pair, x = Pair(gain=3.0), data()
    loss = game(pair, rest(), watch=1).step(x)
    assert torch.allclose(loss.information["z0"], information(pair.guide, x)["z0"])
    assert loss.information["z0"].sum() > 0.5


def test_it_is_that_of_some_rows_where_plates_leave_out_others():
    def model(x):
        with pyro.plate("rows", len(x), subsample_size=20) as index:
            prior = pyro.param("prior", torch.zeros(()))
            z = pyro.sample("z", dist.Bernoulli(logits=prior.expand(20)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    symeq = SymmetricEquilibrium(model, subsampling, SGD({"lr": 0.0}), watch=1)
    loss = symeq.step(torch.arange(200.0))
    assert loss.information["z"].item() == pytest.approx(1)


def test_to_be_watched_changes_nothing():
    x, ends = data(), []
    for watch in (0, 2):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        pair = Pair()
        losses = steps(game(pair, watch=watch), x, 8)
        ends.append([dict(pair.state_dict()), losses, torch.get_rng_state()])
    assert same(*ends)


def test_observed_latents_are_not_counted_and_missing_data_say_nothing():
    ladder, x = Ladder(), bits(3)
    symeq = SymmetricEquilibrium(ladder.model, ladder.guide, SGD({"lr": 0.0}), watch=1)
    z0, z1 = torch.zeros(8, 2), torch.zeros(8, 2)
    assert symeq.step(x=x).information.keys() == {"z0", "z1"}
    assert symeq.step(x=x, z0=z0).information.keys() == {"z1"}
    assert symeq.step(z0=z0, z1=z1).information == {}
    both = symeq.step(Batch(z0=z0, z1=z1), Batch(x=x)).information
    assert both.keys() == {"z0", "z1"}


# --- the warning ----------------------------------------------------------------------------

COLLAPSE = re.escape("After 500 steps the latents say hardly anything about the data: {'z0'")


def test_it_warns_of_a_collapse_and_names_the_layers():
    symeq = game(Pair(gain=0.0), rest(), code_warmup=0)
    steps(symeq, data(), 499)
    with pytest.warns(UserWarning, match=COLLAPSE + ".* 'z1'.*code_warmup=.*2 \\* z - 1.*SiLU"):
        steps(symeq, data(), 1)


def test_it_warns_of_a_late_collapse():
    pair = Pair(gain=3.0)
    symeq = game(pair, rest(), code_warmup=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(symeq, data(), 500)
        nn.init.zeros_(pair.features.weight)
        steps(symeq, data(), 1499)
    late = "After 2000 steps the latents say hardly anything"
    with pytest.warns(UserWarning, match=late) as seen:
        steps(symeq, data(), 1)
    assert seen[0].filename == steps.__code__.co_filename  # where step is called


@pytest.mark.parametrize("options", [{"gain": 3.0}, {"gain": 0.0, "num_latents": 3}])
def test_it_is_silent_where_latents_tell_of_the_data_and_in_small_pairs(options):
    pair = Pair(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(game(pair, rest(), code_warmup=0), data(), 510)
