"""Batches of different kinds make up a step."""

import math
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import SGD
from torch import nn

from pyro_symeq import Batch, LimitingDistribution, SymmetricEquilibrium, SymmetricUtility
from pyro_symeq.metrics import consistency, dreamed_information, information, log_likelihood
from tests.enumerable import Ladder, bits
from tests.test_equilibrium import clone, identical

X = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
Z0 = torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
Z1 = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)


def kinds(device):
    x, z0, z1 = X.to(device), Z0.to(device), Z1.to(device)
    return [
        Batch(x, z0=z0).weighted(3.0),
        Batch(x[:1]),
        Batch(z0=z0, z1=z1).weighted(0.5),
        Batch(x, z0, z1).weighted(0.0),
    ]


@pytest.mark.parametrize("player", ["decoder", "encoder"])
def test_utilities_and_gradients_are_weighted_sums(player, device):
    ladder = Ladder().to(device)
    stage = SymmetricUtility().stage(ladder.model, ladder.guide)
    leaves = ladder.theta if player == "decoder" else ladder.phi
    stage.score(player, (tuple(kinds(device)), {}))  # rehearse
    pyro.set_rng_seed(1)
    score = stage.score(player, (tuple(kinds(device)), {}))
    pyro.set_rng_seed(1)
    parts = [(batch.weight, stage.score(player, batch.call)) for batch in kinds(device)]
    assert torch.allclose(score.utility, sum(w * part.utility for w, part in parts))
    gradients = [(w, part.gradients(leaves)) for w, part in parts]
    for i, gradient in enumerate(score.gradients(leaves)):
        terms = [w * parts[i] for w, parts in gradients if parts[i] is not None]
        assert torch.allclose(gradient, sum(terms))
    assert set(score.parameters) == set().union(*(part.parameters for _, part in parts))


def test_a_step_moves_on_all_batches():
    """The class is learned from the labelled rows, the images from all."""
    ladder = Ladder()
    symeq = SymmetricEquilibrium(ladder.model, ladder.guide, SGD({"lr": 0.1}))
    labelled, unlabelled = Batch(X, z0=Z0).weighted(2.0), Batch(bits(3))
    loss = symeq.step(labelled, unlabelled)
    assert loss == -(loss.decoder + loss.encoder)
    assert isinstance(symeq.evaluate_loss(labelled, unlabelled), float)
    assert symeq.num_steps == 1


@pytest.mark.parametrize(
    "call", [((Batch(X), X), {}), ((Batch(X),), {"z0": Z0}), ((X,), {"z0": Batch(Z0)})]
)
def test_batches_and_plain_arguments_do_not_mix(call):
    ladder = Ladder()
    symeq = SymmetricEquilibrium(ladder.model, ladder.guide, SGD({"lr": 0.1}))
    args, kwargs = call
    with pytest.raises(TypeError, match="one Batch or several"):
        symeq.step(*args, **kwargs)


@pytest.mark.parametrize("kind", [list, tuple])
def test_batches_come_one_by_one(kind):
    ladder = Ladder()
    symeq = SymmetricEquilibrium(ladder.model, ladder.guide, SGD({"lr": 0.1}))
    with pytest.raises(TypeError, match=f"one by one, got a {kind.__name__} of them"):
        symeq.step(kind([Batch(X), Batch(X)]))


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_bad_weights_are_refused(weight):
    with pytest.raises(ValueError, match="finite weight of at least 0"):
        Batch(X).weighted(weight)


@pytest.mark.parametrize("weight", ["a", None, 1j])
def test_weights_of_another_kind_are_refused(weight):
    with pytest.raises(TypeError, match=f"a number as the weight, got {type(weight).__name__}"):
        Batch(X).weighted(weight)


@pytest.mark.parametrize("capture", [False, True])
def test_parts_of_a_batch_make_the_steps_of_the_whole(capture, device):
    """All is observed and draws don't matter: the decoder's steps are those of one batch."""
    ends = []
    for parts in (1, 3):
        pyro.set_rng_seed(0)
        ladder = Ladder().to(device)
        options = {"supervise_encoder": False, "capture": capture}
        symeq = SymmetricEquilibrium(ladder.model, ladder.guide, SGD({"lr": 0.01}), **options)
        x, z0, z1 = (torch.cat([known, 1 - known, known]).to(device) for known in (X, Z0, Z1))
        splits = zip(x.chunk(parts), z0.chunk(parts), z1.chunk(parts), strict=True)
        batches = [Batch(*part) for part in splits]
        utilities = [symeq.step(*batches).decoder for _ in range(5)]
        ends.append((utilities, [leaf.detach().clone() for leaf in ladder.theta]))
        pyro.clear_param_store()
    (whole, theta), (summed, theta_of_parts) = ends
    assert summed == pytest.approx(whole)
    for mine, theirs in zip(theta_of_parts, theta, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_one_graph_at_a_time_takes_memory():
    """What is saved for backward passes is freed before the next batch is scored."""
    alive, peak = weakref.WeakSet(), 0

    class Saved:
        def __init__(self, value):
            nonlocal peak
            self.value = value.detach()
            alive.add(self)
            peak = max(peak, len(alive))

    peaks = []
    for parts in (1, 8):
        ladder, peak = Ladder(), 0
        symeq = SymmetricEquilibrium(ladder.model, ladder.guide, SGD({"lr": 0.01}))
        batches = [Batch(X)] * parts
        symeq.step(*batches)
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.value):
            peak = 0
            symeq.step(*batches)
        peaks.append(peak)
        pyro.clear_param_store()
    assert peaks[0] == peaks[1] > 0


def test_latents_alone_may_come_first_where_the_prior_has_no_parameters():
    """The decoder learns nothing from them; a decoder that can't learn from data is refused then."""
    decoder, encoder, learns = nn.Linear(4, 3), nn.Linear(3, 4), False

    def model(x=None, y=None):
        pyro.module("decoder", decoder)
        with pyro.plate("rows", 4):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(4)), obs=y)
            loc = decoder(y)
            loc = loc if learns else loc.detach()
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x=None, y=None):
        pyro.module("encoder", encoder)
        with pyro.plate("rows", 4):
            pyro.sample("y", dist.OneHotCategorical(logits=encoder(x)))

    symeq = SymmetricEquilibrium(model, guide, SGD({"lr": 0.1}))
    before = clone([*decoder.parameters(), *encoder.parameters()])
    with pytest.raises(
        ValueError, match="utility of the decoder doesn't depend on its parameters"
    ):
        symeq.step(Batch(y=torch.eye(4)), Batch(torch.randn(4, 3)))
    loss = symeq.step(y=torch.eye(4))
    assert loss.utilities["decoder"] == pytest.approx(4 * math.log(1 / 4))
    assert identical(decoder.parameters(), before[:2])
    assert not identical(encoder.parameters(), before[2:])
    with pytest.raises(
        ValueError, match="utility of the decoder doesn't depend on its parameters"
    ):
        symeq.step(torch.randn(4, 3))
    learns = True
    symeq.step(torch.randn(4, 3))
    assert not identical(decoder.parameters(), before[:2])


LOOKS = {
    "log_likelihood": lambda pair, *args: log_likelihood(*pair, *args).values,
    "information": lambda pair, *args: information(pair[1], *args)["z0"],
    "dreamed_information": lambda pair, *args: dreamed_information(*pair, *args).layers["z0"],
    "consistency": lambda pair, *args: torch.tensor(
        list(consistency(*pair, *args, num_steps=2)["z0"]["prior, posterior"].values())
    ),
    "sample": lambda pair, *args: LimitingDistribution(*pair).sample(1, *args)["z0"],
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_look_at_a_batch(look, device):
    ladder = Ladder().to(device)
    pair, x = (ladder.model, ladder.guide), X.to(device).repeat(20, 1)
    found = []
    for args in (x,), (Batch(x),):
        pyro.set_rng_seed(0)
        found.append(look(pair, *args))
    assert torch.equal(*found)
    with pytest.raises(ValueError, match="Expected one Batch at most, got 2"):
        look(pair, Batch(x), Batch(x))
    with pytest.raises(ValueError, match="Expected a Batch without a weight, which means nothing"):
        look(pair, Batch(x).weighted(2.0))
