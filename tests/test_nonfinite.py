"""Batches at which something is not finite: they stop a training, or are skipped, as the user says."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import SGD, Adam, ClippedAdam
from torch import nn

from pyro_symeq import Game, Player, SymmetricEquilibrium
from tests.comparison import same

NUM_PIXELS, NUM_BITS = 4, 2


class Pair:
    """A pair with running averages, in whose steps something may go wrong."""

    def __init__(self, optim=None, **options):
        self.decoder = nn.Sequential(nn.Linear(NUM_BITS, NUM_PIXELS), nn.BatchNorm1d(NUM_PIXELS))
        self.encoder = nn.Sequential(nn.BatchNorm1d(NUM_PIXELS), nn.Linear(NUM_PIXELS, NUM_BITS))
        self.scale = nn.Parameter(torch.ones(()))
        options = {"code_warmup": 0, "nonfinite": "skip"} | options
        self.optim = optim or Adam({"lr": 0.1})
        self.symeq = SymmetricEquilibrium(self.model, self.guide, self.optim, **options)

    def model(self, x, wrong):
        pyro.module("decoder", self.decoder)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(NUM_BITS), 1.0).to_event(1))
            loc = self.decoder(z) + wrong[0]
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(self, x, wrong):
        pyro.module("encoder", self.encoder)
        scale = pyro.param("scale", self.scale)
        # The square root has no finite slope at 0, which the others move it away from.
        scale = scale + torch.sqrt(0 * scale + wrong[1]) * 0
        with pyro.plate("rows", len(x)):
            loc = self.encoder(x) + wrong[2] * 1e200
            law = dist.Normal(loc, scale.abs() + 0.1)
            pyro.sample("z", law.to_event(1))

    @property
    def all(self):
        """All that may move."""
        nets = nn.ModuleList([self.decoder, self.encoder]).state_dict()
        state = self.symeq.state_dict()
        del state["random"], state["num_steps"]
        return {k: x.clone() for k, x in nets.items()}, state, self.scale.detach().clone()

    def run(self, num_steps):
        for _ in range(num_steps):
            assert math.isfinite(self.symeq.step(*good()))
        return self


def good():
    return torch.randn(5, NUM_PIXELS), torch.tensor([0.0, 1.0, 0.0])


def nan_in_the_data():
    x, wrong = good()
    x[0, 0] = math.nan
    return x, wrong


def infinity_in_the_data():
    x, wrong = good()
    x[0, 0] = math.inf
    return x, wrong


def a_law_of_nan():
    x, _ = good()
    return x, torch.tensor([math.nan, 1.0, 0.0])


def a_utility_that_overflows():
    x, _ = good()
    return x, torch.tensor([0.0, 1.0, 1e200])


def a_gradient_of_nan():
    x, _ = good()
    return x, torch.tensor([0.0, 0.0, 0.0])


BAD = [
    nan_in_the_data,
    infinity_in_the_data,
    a_law_of_nan,
    a_utility_that_overflows,
    a_gradient_of_nan,
]


@pytest.fixture(params=[True, False], ids=["validated", "unchecked"])
def validated(request):
    with pyro.validation_enabled(request.param):
        yield request.param


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("updates", "capture", "num_steps"),
    [
        ("alternating", False, 3),
        ("simultaneous", False, 3),
        ("alternating", True, 2),  # while it is recorded
        ("alternating", True, 5),  # in a replay
        ("simultaneous", True, 5),
    ],
)
@pytest.mark.usefixtures("default_device")
def test_a_bad_batch_is_skipped_and_moves_nothing(bad, updates, capture, num_steps, validated):
    pair = Pair(updates=updates, capture=capture).run(num_steps)
    before = pair.all
    with pytest.warns(
        UserWarning, match="Skipped a batch, and nobody moved: .*finite|nan"
    ) as seen:
        loss = pair.symeq.step(*bad())
    assert [warning.filename for warning in seen] == [__file__]
    assert math.isnan(loss)
    assert math.isnan(loss.decoder)
    assert math.isnan(loss.encoder)
    assert same(pair.all, before)
    assert pair.symeq.num_steps == num_steps + 1
    assert all(p.grad is None for p in [*pair.decoder.parameters(), pair.scale])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair.run(4)
    assert not same(pair.all, before)


@pytest.mark.parametrize("bad", BAD)
def test_the_first_batch_may_be_a_bad_one(bad, validated):
    pair = Pair()
    with pytest.warns(UserWarning, match="Skipped a batch"):
        pair.symeq.step(*bad())
    assert pair.symeq.num_steps == 1
    assert not pair.decoder[1].num_batches_tracked
    pair.run(2)


@pytest.mark.parametrize("bad", BAD[:4])
@pytest.mark.parametrize("capture", [False, True])
def test_by_default_a_bad_batch_is_an_error_and_moves_nothing(bad, capture):
    pair = Pair(nonfinite="raise", capture=capture).run(4)
    before = pair.all
    with pytest.raises(ValueError, match="finite|nan"):
        pair.symeq.step(*bad())
    assert same(pair.all, before)
    assert pair.symeq.num_steps == 4
    pair.run(2)


OPTIMS = {
    "momentum": lambda: SGD({"lr": 0.01, "momentum": 0.9}),
    "decaying": lambda: ClippedAdam({"lr": 0.1, "lrd": 0.9}),
}


@pytest.mark.parametrize("make", OPTIMS.values(), ids=OPTIMS.keys())
def test_optimisers_that_are_not_fused_remember_nothing_of_a_bad_batch(make, validated):
    pair = Pair(make()).run(3)
    before = pair.all
    for bad in BAD:
        with pytest.warns(UserWarning, match="Skipped"):
            pair.symeq.step(*bad())
    assert same(pair.all, before)


def test_errors_of_other_kinds_are_errors():
    pair = Pair().run(2)
    before = pair.all
    with pytest.raises((RuntimeError, ValueError), match="should contain 5 elements"):
        pair.symeq.step(torch.randn(5, NUM_PIXELS + 1), good()[1])
    assert same(pair.all, before)

    def model(x):
        pyro.module("outside", pair.decoder)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(NUM_BITS), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=pair.decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", pair.encoder)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(pair.encoder(x), 1.0).to_event(1))

    symeq = SymmetricEquilibrium(model, guide, Adam({"lr": 0.1}), nonfinite="skip")
    with pytest.raises(ValueError, match="No log-probability at site 'x'"):
        symeq.step(torch.full((5, NUM_PIXELS), 0.5))


@pytest.mark.parametrize("updates", ["alternating", "simultaneous", ["a", "b", "a"]])
def test_players_of_a_game_stay_where_they_were_if_one_of_them_meets_nan(updates, validated):
    def player(name):
        def program(x):
            loc = pyro.param(name, torch.zeros(()))
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

        def utility(play, x, bad):
            return play.log_prob(name, x) + (math.nan if name == bad else 0.0)

        return Player(name, program, Adam({"lr": 0.1}), utility)

    game = Game([player("a"), player("b")], updates=updates, nonfinite="skip")
    game.step(torch.ones(()), None)
    before = game.state_dict()["players"]
    for bad in "ab":
        with pytest.warns(UserWarning, match=f"finite utility of the {bad}, got nan"):
            loss = game.step(torch.ones(()), bad)
        assert all(map(math.isnan, loss.utilities.values()))
        assert loss.utilities.keys() == {"a", "b"}
    assert same(game.state_dict()["players"], before)
    with pytest.raises(ValueError, match="finite utility of the a"):
        game.evaluate_loss(torch.ones(()), "a")


def test_a_code_begins_one_step_later_if_the_batch_that_decides_is_bad():
    begun = []
    for bad in (set(), {49}, {49, 50}):
        pyro.clear_param_store()
        pair = Coded()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for i in range(60):
                x = torch.rand(8, NUM_PIXELS).round()
                pair.symeq.step(x * math.nan if i in bad else x)
        begun.append(pair.symeq.state_dict()["code_begun"])
    assert begun == [50, 51, 52]


class Coded:
    """A pair that never uses its bits, so that a code is called for."""

    def __init__(self):
        self.bias = nn.Parameter(torch.zeros(NUM_PIXELS))
        self.encoder = nn.Linear(NUM_PIXELS, 8)
        nn.init.zeros_(self.encoder.weight)
        self.symeq = SymmetricEquilibrium(
            self.model, self.guide, SGD({"lr": 1e-6}), nonfinite="skip"
        )

    def model(self, x):
        bias = pyro.param("bias", self.bias)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Bernoulli(torch.full((8,), 0.5)).to_event(1))
            logits = bias.expand(len(x), -1)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))


def test_a_policy_is_one_of_two():
    with pytest.raises(ValueError, match="Expected nonfinite='raise' or 'skip', got 'ignore'"):
        Pair(nonfinite="ignore")
