"""The code for the data that the encoder makes up itself, and when it learns one."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import SGD, Adam
from torch import nn
from torch.distributions.transforms import SigmoidTransform

from pyro_symeq import SymmetricEquilibrium, SymmetricUtility
from pyro_symeq.code import deal, hold
from pyro_symeq.rows import Rows
from pyro_symeq.tracing import run
from tests.comparison import same
from tests.programs import PROGRAMS

ROWS = Rows(dim=-1, size=6)


def bits(logits):
    return dist.Bernoulli(logits=logits).to_event(1)


class Pair(nn.Module):
    """Two layers of bits; the guide's logits are as large as its gain makes them."""

    def __init__(self, gain=1e-3, num_latents=6):
        super().__init__()
        self.num_latents = num_latents
        self.units = nn.Linear(num_latents, num_latents)
        self.pixels = nn.Linear(num_latents, 8)
        self.features = nn.Linear(8, 2 * num_latents)
        with torch.no_grad():
            self.features.weight.mul_(gain)

    def model(self, x):
        pyro.module("units", self.units)
        pyro.module("pixels", self.pixels)
        with pyro.plate("rows", len(x)):
            z0 = pyro.sample("z0", bits(x.new_zeros(self.num_latents)))
            z1 = pyro.sample("z1", bits(self.units(z0)))
            pyro.sample("x", bits(self.pixels(z1)), obs=x)

    def guide(self, x):
        pyro.module("features", self.features)
        with pyro.plate("rows", len(x)):
            first, second = self.features(2 * x - 1).chunk(2, -1)
            z0 = pyro.sample("z0", bits(first))
            pyro.sample("z1", bits(second + self.units(z0)))


def data(num_rows=32):
    return (torch.rand(num_rows, 8) < 0.5).double()


def game(pair, optim=None, **options):
    return SymmetricEquilibrium(pair.model, pair.guide, optim or Adam({"lr": 1e-2}), **options)


def rest():
    return SGD({"lr": 0.0})


def steps(symeq, x, number):
    return [symeq.step(x) for _ in range(number)]


def begun(symeq, step):
    """Lets the code have begun after some step."""
    symeq._code.begun = step
    return symeq


# --- how values are dealt out ---------------------------------------------------------------


def test_the_largest_value_goes_to_the_row_with_the_largest_mean():
    means = torch.tensor([0.3, -2.0, 0.1, 5.0, -0.2, 0.0])
    values = torch.tensor([10.0, 60.0, 20.0, 50.0, 40.0, 30.0])
    dealt = deal({"z": values}, {"z": dist.Normal(means, 1.0)}, ROWS)["z"]
    assert dealt.tolist() == [50.0, 10.0, 40.0, 60.0, 20.0, 30.0]


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e3])
def test_it_matters_not_how_small_the_means_are_nor_in_what_unit(scale):
    means, values = torch.randn(6, 3), torch.randn(6, 3)
    law = dist.Normal(7 + means, 1.0).to_event(1)
    small = dist.Normal(scale * means, 1.0).to_event(1)
    one, other = (deal({"z": values}, {"z": each}, ROWS)["z"] for each in (law, small))
    assert torch.equal(one, other)


@pytest.mark.parametrize("rows", [-1, -2])
def test_each_variable_keeps_its_values(rows):
    values = torch.randn(6, 6, 3)
    law = dist.Normal(torch.randn(6, 6, 3), 1.0).to_event(1)
    dealt = deal({"z": values}, {"z": law}, Rows(rows, 6))["z"]
    dim = rows - 1
    assert not torch.equal(dealt, values)
    assert torch.equal(dealt.sort(dim).values, values.sort(dim).values)


VECTORS = {
    "one-hot": lambda: dist.OneHotCategorical(logits=torch.randn(6, 4, 5)).to_event(1),
    "simplex": lambda: dist.Dirichlet(torch.rand(6, 4, 3) + 0.5).to_event(1),
    "plane": lambda: dist.MultivariateNormal(torch.randn(6, 4, 2), torch.eye(2)).to_event(1),
}


@pytest.mark.parametrize("kind", VECTORS)
def test_vectors_stay_whole(kind):
    law = VECTORS[kind]()
    values = law.sample()
    dealt = deal({"z": values}, {"z": law}, ROWS)["z"]
    for before, after in zip(values.unbind(1), dealt.unbind(1), strict=True):
        assert sorted(map(tuple, after.tolist())) == sorted(map(tuple, before.tolist()))


def test_categories_are_dealt_out_in_the_order_of_their_numbers():
    probs = torch.eye(6)[[3, 0, 5, 1, 4, 2]]
    values = torch.tensor([5, 4, 3, 2, 1, 0])
    dealt = deal({"z": values}, {"z": dist.Categorical(probs)}, ROWS)["z"]
    assert dealt.tolist() == [3, 0, 5, 1, 4, 2]


def test_variables_of_one_opinion_are_dealt_out_less_alike():
    """All bits see one direction of the data, with a little of others.

    Ranked as they are, their codes would be almost the same.
    """
    shared, own = torch.randn(200, 1), torch.randn(200, 8)
    means = shared + 0.3 * own
    values = torch.randn(200, 8)
    dealt = deal({"z": values}, {"z": dist.Normal(means, 1.0).to_event(1)}, Rows(-1, 200))["z"]

    def correlation(x):
        return (torch.corrcoef(x.T).sum() - 8) / 56

    assert correlation(means) > 0.85
    assert correlation(dealt) < correlation(means) - 0.3


def test_autocast_makes_no_difference(device):
    values, means = torch.randn(2, 200, 8, device=device).float()
    law = dist.Normal(means, 1.0).to_event(1)
    plain = deal({"z": values}, {"z": law}, Rows(-1, 200))["z"]
    with torch.autocast(device.type, torch.bfloat16):
        mixed = deal({"z": values}, {"z": law}, Rows(-1, 200))["z"]
    assert torch.equal(mixed, plain)


def test_sites_without_a_mean_are_left_out():
    law = dist.TransformedDistribution(dist.Normal(torch.randn(6), 1.0), [SigmoidTransform()])
    values = {"u": torch.randn(6), "w": torch.rand(6)}
    assert deal({"w": values["w"]}, {"w": law}, ROWS) == {}
    assert deal(values, {"u": dist.Normal(torch.randn(6), 1.0), "w": law}, ROWS).keys() == {"u"}


def test_latents_above_are_held():
    """What the guide makes of a row is due to its data alone."""
    pair = Pair(gain=0.0)
    values = {"z0": torch.rand(32, 6).round(), "z1": torch.rand(32, 6).round()}
    trace = run(pair.guide, ((data(),), {}), hold(values, Rows(-1, 32)))
    means = trace.nodes["z1"]["fn"].mean
    assert torch.equal(means, means[:1].expand(means.shape))
    assert torch.equal(trace.nodes["z0"]["value"], values["z0"][:1].expand(32, 6))


# --- what the encoder makes of it -----------------------------------------------------------


def gradients(symeq, pair, x, seed=3):
    """The steps that the players take at rate 1, and the loss."""
    before = copy.deepcopy(pair.state_dict())
    pyro.set_rng_seed(seed)
    loss = symeq.step(x)
    moved = {name: before[name] - value for name, value in pair.state_dict().items()}
    pair.load_state_dict(before)
    return moved, loss


def test_the_code_counts_in_the_gradient_of_the_encoder_alone():
    pair, x = Pair(gain=0.3), data()
    plain = gradients(game(pair, SGD({"lr": 1.0}), code_warmup=0), pair, x)
    pyro.clear_param_store()
    coded = gradients(begun(game(pair, SGD({"lr": 1.0}), code_warmup=4), 0), pair, x)
    assert coded[1] == plain[1]
    assert (coded[1].decoder, coded[1].encoder) == (plain[1].decoder, plain[1].encoder)
    for name, step in plain[0].items():
        assert torch.equal(coded[0][name], step) != name.startswith("features"), name


def test_its_weight_falls_in_a_line_to_nothing():
    """It counts in every fourth step."""
    pair, x = Pair(gain=0.3), data()
    symeq = game(pair, SGD({"lr": 1.0}), code_warmup=10)
    plain = gradients(symeq, pair, x)[0]
    excess = []
    for since in (0, 1, 2, 3, 4, 8, 9, 10, 12):
        begun(symeq, symeq.num_steps - since)
        moved = gradients(symeq, pair, x)[0]
        excess.append(moved["features.weight"] - plain["features.weight"])
    shares = [1, 0, 0, 0, 0.6, 0.2, 0, 0, 0]
    for share, one in zip(shares, excess, strict=True):
        torch.testing.assert_close(one, share * excess[0])
    assert excess[0].abs().max() > 0.1


def test_it_makes_the_encoder_tell_rows_apart():
    x, adam = data(), Adam({"lr": 0.03})
    coded = steps(begun(game(Pair(), adam, code_warmup=100, watch=60), 0), x, 60)[-1]
    pyro.clear_param_store()
    plain = steps(game(Pair(), adam, code_warmup=0, watch=60), x, 60)[-1]
    for site in ("z0", "z1"):
        assert coded.information[site].mean() > 0.05
        assert coded.information[site].mean() > 2 * plain.information[site].mean()


def test_after_the_warmup_the_game_is_what_it_was():
    """The players move as in a game that never had it, to the last bit."""
    pair, x = Pair(), data()
    symeq = game(pair, code_warmup=8)
    steps(symeq, x, 58)
    assert symeq.state_dict()["code_begun"] == 50
    state, weights = symeq.state_dict(), copy.deepcopy(pair.state_dict())
    losses = steps(symeq, x, 5)
    ends = copy.deepcopy(pair.state_dict())
    pyro.clear_param_store()
    pair.load_state_dict(weights)
    plain = game(pair, code_warmup=0)
    plain.load_state_dict(state)
    assert steps(plain, x, 5) == losses
    assert same(dict(pair.state_dict()), dict(ends))


@pytest.mark.parametrize("updates", ["alternating", "simultaneous"])
def test_the_gradient_at_the_end_is_that_of_the_utilities(updates):
    pair, x = Pair(gain=0.3), data()
    symeq = begun(game(pair, SGD({"lr": 1.0}), code_warmup=8, updates=updates), 0)
    steps(symeq, x, 8)
    plain = game(pair, SGD({"lr": 1.0}), code_warmup=0, updates=updates)
    moved, expected = (gradients(each, pair, x)[0] for each in (symeq, plain))
    for name, step in expected.items():
        assert torch.equal(moved[name], step)
        assert step.abs().max() > 0


# --- when it begins -------------------------------------------------------------------------


def begins(pair, x=None, optim=None, **options):
    symeq = game(pair, optim or rest(), **options)
    steps(symeq, data() if x is None else x, 51)
    return symeq.state_dict()["code_begun"]


def test_it_begins_where_latents_ignore_the_data():
    assert begins(Pair()) == 50


def test_it_does_not_begin_where_they_tell_of_them():
    assert begins(Pair(gain=10.0)) is None


def test_it_does_not_begin_in_small_pairs():
    assert begins(Pair(num_latents=3)) is None


class Normals(Pair):
    """The upper layer is of bits, the lower one of normal variables."""

    def model(self, x):
        pyro.module("units", self.units)
        pyro.module("pixels", self.pixels)
        with pyro.plate("rows", len(x)):
            z0 = pyro.sample("z0", bits(x.new_zeros(self.num_latents)))
            z1 = pyro.sample("z1", dist.Normal(self.units(z0), 1.0).to_event(1))
            pyro.sample("x", bits(self.pixels(z1)), obs=x)

    def guide(self, x):
        pyro.module("features", self.features)
        with pyro.plate("rows", len(x)):
            first, second = self.features(2 * x - 1).chunk(2, -1)
            z0 = pyro.sample("z0", bits(first))
            pyro.sample("z1", dist.Normal(second + self.units(z0), 1.0).to_event(1))


def test_continuous_latents_have_no_code():
    pair, x = Normals(gain=0.3), data()
    plain = gradients(game(pair, SGD({"lr": 1.0}), code_warmup=0), pair, x)[0]
    pyro.clear_param_store()
    coded = gradients(begun(game(pair, SGD({"lr": 1.0}), code_warmup=4), 0), pair, x)[0]
    excess = (coded["features.weight"] - plain["features.weight"]).abs().sum(-1)
    assert (excess[: pair.num_latents] > 1e-3).all()
    assert (excess[pair.num_latents :] == 0).all()


@pytest.mark.parametrize("num_latents", [6, 8])
def test_it_begins_where_there_are_enough_latents_that_have_one(num_latents):
    assert begins(Normals(num_latents=num_latents)) == (50 if num_latents == 8 else None)


def test_it_does_not_begin_where_it_is_turned_off():
    assert begins(Pair(), code_warmup=0) is None


def test_a_trained_pair_is_left_alone():
    pair = Pair(gain=10.0)
    symeq = game(pair, rest(), code_warmup=20)
    steps(symeq, data(), 60)
    plain = game(pair, rest(), code_warmup=0)
    assert gradients(symeq, pair, data())[0].keys() == gradients(plain, pair, data())[0].keys()


def test_the_first_steps_are_those_of_the_game_alone():
    x, ends = data(), []
    for options in ({}, {"code_warmup": 0}):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        pair = Pair()
        steps(game(pair, **options), x, 50)
        ends.append(dict(pair.state_dict()))
    assert same(*ends)


def test_a_training_goes_on_in_the_middle_of_it():
    pair, x = Pair(), data()
    symeq = game(pair, code_warmup=20)
    steps(symeq, x, 55)
    state = copy.deepcopy(symeq.state_dict())
    losses = steps(symeq, x, 5)
    pyro.clear_param_store()
    other = game(Pair(), code_warmup=20)
    other.load_state_dict(state)
    assert steps(other, x, 5) == losses


def test_states_from_before_there_was_a_code_are_read():
    symeq = game(Pair())
    state = symeq.state_dict()
    del state["code_begun"]
    symeq.load_state_dict(state)
    assert symeq.state_dict()["code_begun"] is None


def test_a_wrong_state_is_refused():
    symeq = game(Pair())
    with pytest.raises(ValueError, match="Expected code_begun to be an integer"):
        symeq.load_state_dict({**symeq.state_dict(), "code_begun": "soon"})
    with pytest.raises(ValueError, match="Expected a state of SymmetricEquilibrium"):
        symeq.load_state_dict([symeq.state_dict()])


@pytest.mark.parametrize("option", ["code_warmup", "watch"])
def test_options_are_checked(option):
    with pytest.raises(ValueError, match=f"Expected {option} to be an integer of at least 0"):
        game(Pair(), **{option: -1})


def test_captured_and_eager_steps_agree():
    x, ends = data(), []
    for capture in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        pair = Pair()
        losses = steps(game(pair, code_warmup=5, capture=capture), x, 60)
        ends.append((dict(pair.state_dict()), losses))
    for name, value in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][name], value)
    torch.testing.assert_close(*(torch.tensor([float(x) for x in end[1]]) for end in ends))


def test_a_frozen_encoder_learns_no_code():
    pair, x = Pair(), data()
    symeq = game(pair, code_warmup=20)
    symeq.freeze("encoder")
    before = copy.deepcopy(pair.features.state_dict())
    steps(symeq, x, 60)
    assert same(dict(pair.features.state_dict()), dict(before))


def test_svi_with_the_same_utility_knows_of_no_code():
    pair, x, utility = Pair(gain=0.3), data(), SymmetricUtility()
    symeq = begun(game(pair, rest(), loss=utility, code_warmup=20), 0)
    symeq.step(x)
    pyro.set_rng_seed(5)
    utility(pair.model, pair.guide)(x).backward()
    found = [p.grad.clone() for p in pair.features.parameters()]
    pair.zero_grad()
    pyro.set_rng_seed(5)
    SymmetricUtility()(pair.model, pair.guide)(x).backward()
    for gradient, p in zip(found, pair.features.parameters(), strict=True):
        assert torch.equal(gradient, p.grad)


NOISY = {"latents: auxiliary latent of the guide", "modules: dropout"}  # noise of the guide's own
MIXED = {  # where a code is learned, the guide draws what is continuous, and later draws are others
    "semisupervised: labels missing",
    "semisupervised: labels come and go",
    "semisupervised: batches in particles",
    "stochastic: particles, in a loop",
    "stochastic: particles, vectorised",
    "stochastic: particles, vectorised, guessed",
    "stochastic: particles, best of several, in a loop",
    "stochastic: particles of a subsample, in a loop",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_kind_of_pair_learns_through_it(name):
    """The utilities are those of the game, whatever latents can be given a code."""
    losses = []
    for begins_at in (None, 0):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        program = PROGRAMS[name]()
        utility = SymmetricUtility(**program.options)
        symeq = SymmetricEquilibrium(program.model, program.guide, rest(), loss=utility, watch=1)
        begun(symeq, begins_at)
        losses.append([symeq.step(*args, **kwargs) for args, kwargs in program.calls])
    for plain, coded in zip(*losses, strict=True):
        assert coded.information.keys() == plain.information.keys()
        if name not in MIXED:
            assert coded.decoder == plain.decoder
            assert (coded.encoder == plain.encoder) != (name in NOISY)
