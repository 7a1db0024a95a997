"""How whole steps are captured, with a stand-in for CUDA graphs; see test_capture.py for CUDA."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import Adam, ClippedAdam, ExponentialLR, PyroOptim
from torch import nn

from pyro_symeq import SymmetricEquilibrium, graphs
from pyro_symeq.capture import Lesson
from pyro_symeq.game import Game
from tests.comparison import same


class Replay:
    """Runs the step again where a CUDA graph would be replayed."""

    captured: list["Replay"] = []

    def __init__(self, step, tensors, device, pool):
        self.step = step
        self.inputs = [x.clone() for x in tensors]
        self.num_replays = 0
        Replay.captured.append(self)

    def __call__(self, tensors):
        for place, x in zip(self.inputs, tensors, strict=True):
            place.copy_(x)
        self.num_replays += 1
        return self.step(self.inputs)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    Replay.captured = []
    monkeypatch.setattr(graphs, "StepGraph", Replay)
    monkeypatch.setattr(graphs, "_device_of", lambda *_: None)
    monkeypatch.setattr(graphs, "_versions", lambda lessons: [])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(Lesson, "is_on_cuda", True)
    monkeypatch.setattr(
        Game,
        "_step_graphs",
        lambda game: (
            game._capture and graphs.StepGraphs(game._capture, game._strategies, game._move)
        ),
    )


class Pair(nn.Module):
    def __init__(self, optim, **options):
        super().__init__()
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        self.decoder, self.encoder = nn.Linear(2, 4), nn.Linear(4, 2)
        self.optim = optim
        self.symeq = SymmetricEquilibrium(self.model, self.guide, optim, **options)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))

    def train_on(self, batches, between=lambda pair, i: None):
        losses = []
        for i, x in enumerate(batches):
            between(self, i)
            losses.append(self.symeq.step(x))
        return losses, [p.detach().clone() for p in self.parameters()]


def batches(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [(torch.rand(n, 4, generator=generator) > 0.5).double() for n in sizes]


def set_rate(pair, i):
    if i == 6:
        for kept in pair.optim.optim_objs.values():
            kept.param_groups[0]["lr"] = 0.01


def set_betas(pair, i):
    if i == 6:
        for kept in pair.optim.optim_objs.values():
            kept.param_groups[0]["betas"] = (0.5, 0.9)


def go_back(pair, i):
    if i == 2:
        pair.state = pair.symeq.state_dict()
    if i == 6:
        pair.symeq.load_state_dict(pair.state)


def schedule(pair, i):
    if i:
        pair.optim.step()


def exponential():
    adam = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9}
    return ExponentialLR(adam)


CASES = {  # the optimiser, the batches, what happens between steps, the number of captures
    "one kind of batch": (lambda: Adam({"lr": 0.1}), [5] * 9, None, 1),
    "two kinds of batches": (lambda: Adam({"lr": 0.1}), [5, 3] * 6, None, 2),
    "another learning rate": (lambda: Adam({"lr": 0.1}), [5] * 10, set_rate, 1),
    "a schedule": (exponential, [5] * 10, schedule, 1),
    "other moments": (lambda: Adam({"lr": 0.1}), [5] * 10, set_betas, 2),
    "a former state": (lambda: Adam({"lr": 0.1}), [5] * 10, go_back, 2),
    "an optimiser that isn't merged": (lambda: ClippedAdam({"lr": 0.1}), [5] * 6, None, 1),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("updates", ["alternating", "simultaneous"])
def test_captured_steps_are_steps(name, updates):
    optim, sizes, between, num_captures = CASES[name]
    options = {"between": between} if between else {}
    eager = Pair(optim(), updates=updates).train_on(batches(*sizes), **options)
    captured = Pair(optim(), updates=updates, capture=True).train_on(batches(*sizes), **options)
    assert captured[0] == pytest.approx(eager[0], rel=1e-9)
    for mine, theirs in zip(captured[1], eager[1], strict=True):
        torch.testing.assert_close(mine, theirs)
    assert len(Replay.captured) == num_captures
    assert all(graph.num_replays >= 3 for graph in Replay.captured)


@pytest.mark.parametrize("updates", ["alternating", "simultaneous"])
def test_a_batch_that_is_refused_moves_nothing(updates):
    """With validation on; both players have moved in the graph when the error is seen."""
    pair = Pair(Adam({"lr": 0.1}), capture=True, updates=updates)
    _, before = pair.train_on(batches(*[5] * 6))
    state = pair.symeq.state_dict()
    (x,) = batches(5)
    x[2] = torch.nan
    with pytest.raises(ValueError, match="'x' is not finite: 4 elements"):
        pair.symeq.step(x)
    (graph,) = Replay.captured
    assert graph.num_replays == 4
    assert same([p.detach() for p in pair.parameters()], before)
    assert same(pair.symeq.state_dict()["players"], state["players"])
    losses, _ = pair.train_on(batches(*[5] * 3))
    assert all(map(math.isfinite, losses))


class Frugal(PyroOptim):
    """Moves in every second step."""

    def __init__(self):
        super().__init__(torch.optim.SGD, {"lr": 0.1})
        self.num_calls = 0

    def __call__(self, params, *args, **kwargs):
        self.num_calls += 1
        if self.num_calls % 2:
            super().__call__(params, *args, **kwargs)


def test_an_optimiser_with_steps_of_its_own_is_named():
    eager = Pair(Frugal()).train_on(batches(*[5] * 7))
    with pytest.warns(
        UserWarning, match="the whole step.* Frugal takes steps in a way of its own"
    ):
        captured = Pair(Frugal(), capture=True).train_on(batches(*[5] * 7))
    assert captured[0] == pytest.approx(eager[0], rel=1e-9)
    for mine, theirs in zip(captured[1], eager[1], strict=True):
        torch.testing.assert_close(mine, theirs)
    assert not Replay.captured


def test_the_schedule_tells_graphs_apart():
    """The encoder warms up alone, and the decoder rests later."""

    def rest(pair, i):
        if i == 8:
            pair.symeq.freeze("decoder")

    options = {"encoder_warmup": 4}
    eager = Pair(Adam({"lr": 0.1}), **options).train_on(batches(*[5] * 12), rest)
    captured = Pair(Adam({"lr": 0.1}), capture=True, **options).train_on(batches(*[5] * 12), rest)
    assert captured[0] == pytest.approx(eager[0], rel=1e-9)
    assert [graph.num_replays for graph in Replay.captured] == [5, 1]
