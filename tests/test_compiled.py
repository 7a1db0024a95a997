"""Captured steps as machine code."""

import shutil
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import Adam
from torch import nn

from pyro_symeq import SymmetricEquilibrium
from tests.montecarlo import assert_mean

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler"),
    pytest.mark.filterwarnings("ignore:Skipping serialization"),  # the compiler's own
]


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        self.decoder = nn.Sequential(
            nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)
        )
        self.encoder = nn.Linear(4, 2)

    def model(self, x, z=None):
        pyro.module("decoder", self.decoder)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1), obs=z)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x, z=None):
        pyro.module("encoder", self.encoder)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))


X = torch.eye(4).repeat(3, 1)


def train(capture, z=(), num_steps=8):
    pair = Pair()
    symeq = SymmetricEquilibrium(pair.model, pair.guide, Adam({"lr": 0.1}), capture=capture)
    losses = [symeq.step(X.double(), *z) for _ in range(num_steps)]
    return losses, pair, symeq


def test_the_same_data_give_the_same_training():
    """All is observed, so that nothing is drawn for the decoder to learn from."""
    z = (X[:, :2].double(),)
    compiled, pair, _ = train("compile", z)
    eager, expected, _ = train(False, z)
    utilities = [loss.decoder for loss in compiled]
    assert utilities == pytest.approx([loss.decoder for loss in eager], rel=1e-6)
    for mine, theirs in zip(pair.decoder.parameters(), expected.decoder.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_its_own_draws_have_the_same_law():
    """The utilities of a frozen pair, at 300 draws; fails by chance once in 10,000 runs."""
    _, _, symeq = train("compile", num_steps=4)
    x = X.double()
    capture = symeq._capture
    for player in ("decoder", "encoder"):
        lesson = capture.lesson(player, capture.occasion(((x,), {})))
        drawn = torch.stack([lesson([x]).utility for _ in range(300)])
        scored = torch.stack([symeq._stage.score(player, ((x,), {})).utility for _ in range(300)])
        assert len(drawn.unique()) > 100  # fresh draws in each replay
        assert_mean(drawn - scored.detach(), torch.zeros(()))


def test_what_the_compiler_refuses_runs_as_recorded(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no compiler\nand many more lines")

    monkeypatch.setattr(torch, "compile", refuse)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        recorded, _, symeq = train("compile")
    assert [str(w.message) for w in seen] == [
        "Not captured: the lesson of the decoder as machine code, since no compiler."
    ]
    eager, _, _ = train(False)
    assert recorded == pytest.approx(eager, rel=1e-9)
