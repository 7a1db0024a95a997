"""What latents say about dreams, against enumeration and closed forms."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_symeq import Implicit
from pyro_symeq.metrics import dreamed_information, information
from tests.enumerable import Ladder, bits
from tests.montecarlo import assert_mean

# --- against enumeration --------------------------------------------------------------------


def enumerated(pair):
    """The bounds, and the information of each bit itself."""
    x, z0, z1 = bits(7).split([3, 2, 2], -1)
    log_joint = pair.log_p(x, z0, z1)
    joint, log_q, log_q0 = log_joint.exp(), pair.log_q(x, z0, z1), pair.log_q0(x, z0)
    z0_logits = pair.z0_logits.expand_as(z0)
    log_p0 = dist.Bernoulli(logits=z0_logits).log_prob(z0).sum(-1)
    log_p1 = pair.log_p_z(z0, z1) - log_p0

    def mean(value):
        return ((joint * value).sum() / math.log(2)).item()

    def marginal(weights, *columns):
        """For each row, the sum of weights over rows that agree in some columns."""
        key = torch.cat(columns, -1)
        agree = (key[:, None] == key).all(-1)
        return (agree * weights).sum(-1)

    layers = {"z0": mean(log_q0 - log_p0), "z1": mean(log_q - log_q0 - log_p1)}
    units, true = {}, {}
    for name, z in (("z0", z0), ("z1", z1)):
        units[name], true[name] = [], []
        for j in range(2):
            unit = z[:, j : j + 1]
            p = marginal(joint, unit)
            q = marginal(log_q.exp(), unit, x)
            posterior = marginal(joint, unit, x) / marginal(joint, x)
            units[name].append(mean(q.log() - p.log()))
            true[name].append(mean(posterior.log() - p.log()))
    return layers, units, true


@pytest.fixture
def pair():
    """A ladder that uses its latents, and an encoder that roughly knows how."""
    ladder = Ladder()
    with torch.no_grad():
        ladder.d1.weight.copy_(2 * torch.eye(2))
        ladder.dx.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, -3.0], [1.0, 1.0]]))
        ladder.e1.weight.copy_(torch.tensor([[3.0, 0.0, 1.0], [0.0, -3.0, 1.0]]))
        ladder.e1.bias.copy_(torch.tensor([-2.0, 1.0]))
    return ladder


@torch.no_grad()
def test_bounds_agree_with_enumeration(pair):
    """Those of layers are unbiased; those of units off by about 1 / K and 1 / N nats."""
    layers, units, true = enumerated(pair)
    found = [
        dreamed_information(pair.model, pair.guide, torch.zeros(400, 3), num_draws=100)
        for _ in range(30)
    ]
    for name in ("z0", "z1"):
        assert_mean(torch.stack([each.layers[name] for each in found]), layers[name])
        draws = torch.stack([each.units[name] for each in found])
        assert draws.shape == (30, 2)
        error = draws.std(0) / 30**0.5
        expected = torch.tensor(units[name])
        assert ((draws.mean(0) - expected.clamp(min=0)).abs() < 5 * error + 0.02).all()
        assert (expected <= torch.tensor(true[name]) + 1e-9).all()
    assert min(units["z1"]) > 0.1


# --- against closed forms, with exact encoders ----------------------------------------------


def normal_ladder(x):
    """z0 ~ N(0, 1), z1 ~ N(z0, 1), x ~ N(z1, 1)."""
    with pyro.plate("data", len(x)):
        z0 = pyro.sample("z0", dist.Normal(torch.zeros(len(x)), 1.0))
        z1 = pyro.sample("z1", dist.Normal(z0, 1.0))
        pyro.sample("x", dist.Normal(z1, 1.0), obs=x)


def normal_encoder(x):
    with pyro.plate("data", len(x)):
        z0 = pyro.sample("z0", dist.Normal(x / 3, (2 / 3) ** 0.5))
        pyro.sample("z1", dist.Normal((z0 + x) / 2, 0.5**0.5))


def test_normal_layers():
    """I(z0; x) = 1/2 log 3/2, I(z1; x) = 1/2 log 3, and I(z0, z1; x) is the latter."""
    found = dreamed_information(normal_ladder, normal_encoder, torch.zeros(4000), num_draws=200)
    above, below = math.log2(1.5) / 2, math.log2(3) / 2
    assert found.units["z0"].item() == pytest.approx(above, abs=0.05)
    assert found.units["z1"].item() == pytest.approx(below, abs=0.07)
    assert found.layers["z0"].item() == pytest.approx(above, abs=0.05)
    assert sum(found.layers.values()).item() == pytest.approx(below, abs=0.07)


def test_order_of_layers():
    """The sum over layers is a bound in the reverse order as well, and here it is exact."""

    def reverse(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(2 * x / 3, (2 / 3) ** 0.5))
            pyro.sample("z0", dist.Normal(z1 / 2, 0.5**0.5))

    found = dreamed_information(normal_ladder, reverse, torch.zeros(4000))
    assert sum(found.layers.values()).item() == pytest.approx(math.log2(3) / 2, abs=0.07)


@pytest.mark.parametrize("kind", [dist.Categorical, dist.OneHotCategorical])
def test_a_class(kind):
    """Four classes that can be told apart are two bits."""

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", kind(torch.full((len(x), 4), 0.25)))
            number = y.double() if y.dim() == 1 else y @ torch.arange(4.0)
            pyro.sample("x", dist.Normal(number, 0.01), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", kind(logits=-1000 * (x[:, None] - torch.arange(4.0)).square()))

    found = dreamed_information(model, guide, torch.zeros(50))
    assert found.units["y"].shape == found.layers["y"].shape == ()
    assert found.units["y"].item() == pytest.approx(2)
    assert found.layers["y"].item() == pytest.approx(2)


JOINT_OR_APART = {
    "joint": lambda loc, scale: dist.MultivariateNormal(loc, scale_tril=scale * torch.eye(2)),
    "apart": lambda loc, scale: dist.Normal(loc, scale).to_event(1),
}


@pytest.mark.parametrize("prior", JOINT_OR_APART)
@pytest.mark.parametrize("posterior", JOINT_OR_APART)
def test_what_model_or_guide_keep_together_is_one_unit(prior, posterior):
    """Units that are independent for both add up to their layer."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", JOINT_OR_APART[prior](torch.zeros(len(x), 2), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", JOINT_OR_APART[posterior](x / 2, 0.5**0.5))

    found = dreamed_information(model, guide, torch.zeros(500, 2))
    assert found.units["z"].shape == ((2,) if prior == posterior == "apart" else ())
    assert found.layers["z"] > 0.5
    torch.testing.assert_close(found.units["z"].sum(), found.layers["z"])


def test_parts_of_rows_count_alone():
    """Only the first of two parts of each row matters, and rows lie in an outer plate."""

    def guide(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("parts", 2, dim=-1):
            logits = 100 * (x - 0.5) * torch.tensor([1.0, 0.0])
            pyro.sample("z", dist.Bernoulli(logits=logits))

    def model(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("parts", 2, dim=-1):
            z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(len(x), 2)))
            pyro.sample("x", dist.Normal(z, torch.tensor([0.01, 1e3])), obs=x)

    found = dreamed_information(model, guide, torch.zeros(100, 2))
    torch.testing.assert_close(found.units["z"], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(found.layers["z"], torch.tensor(1.0))


def test_all_runs_look_at_the_rows_of_the_dream():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=20) as index:
            z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(20)))
            pyro.sample("x", dist.Normal(z, 0.01), obs=x[index])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=20) as index:
            pyro.sample("z", dist.Bernoulli(logits=100 * (x[index] - 0.5)))

    found = dreamed_information(model, guide, torch.zeros(200))
    torch.testing.assert_close(found.units["z"], torch.tensor(1.0))
    torch.testing.assert_close(found.layers["z"], torch.tensor(1.0))


# --- collapse -------------------------------------------------------------------------------


def test_a_collapse_of_the_decoder_shows_though_the_encoder_reads_the_data():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(len(x), 2)).to_event(1))
            pyro.sample("x", dist.Normal(torch.zeros(len(x)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            logits = torch.stack([3 * x, torch.zeros_like(x)], -1)
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

    x = torch.randn(500)
    assert information(guide, x)["z"][0] > 0.2
    found = dreamed_information(model, guide, x)
    assert (found.units["z"] < 1e-9).all()
    assert found.layers["z"] < 0


def test_large_batches_are_looked_at_in_parts(monkeypatch):
    from pyro_symeq.metrics import mutual_information

    found = []
    for at_once in (2**24, 1, 70):
        monkeypatch.setattr(mutual_information, "AT_ONCE", at_once)
        pyro.set_rng_seed(0)
        found.append(dreamed_information(normal_ladder, normal_encoder, torch.zeros(30)))
    for other in found[1:]:
        torch.testing.assert_close(found[0].units, other.units)


# --- programs of other kinds ----------------------------------------------------------------


def test_latents_without_a_density_are_left_out():
    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", Implicit(torch.randn, batch_shape=(len(x),)))
            z = pyro.sample("z", dist.Normal(y, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0))

    found = dreamed_information(model, guide, torch.zeros(20))
    assert list(found.units) == list(found.layers) == ["z"]


def test_buffers_gradients_and_devices(device):
    norm = nn.BatchNorm1d(2).to(device)
    net = nn.Linear(2, 2).to(device)

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones_like(x)).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("norm", norm)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=norm(x)).to_event(1))

    before = {name: value.clone() for name, value in norm.state_dict().items()}
    found = dreamed_information(model, guide, torch.zeros(20, 2, device=device))
    for value in itertools.chain(found.units.values(), found.layers.values()):
        assert value.device.type == device.type
        assert not value.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_misuse():
    with pytest.raises(ValueError, match="Expected num_draws to be an integer of at least 1"):
        dreamed_information(normal_ladder, normal_encoder, torch.zeros(3), num_draws=0)

    def whole(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z.expand(len(x)), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x.mean(), 1.0))

    with pytest.raises(ValueError, match="in one vectorised plate, whose rows"):
        dreamed_information(whole, guide, torch.zeros(3))
