"""Low and mixed precision, and memory formats."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import SGD, Adam, PyroOptim
from torch import nn

from pyro_symeq import Game, Player, SymmetricEquilibrium, passes
from pyro_symeq.tracing import run
from tests.comparison import RATE
from tests.test_utility import Recorder

HALVES = [torch.bfloat16, torch.float16]
SINGLE = dict(rtol=1e-5, atol=0.0)  # a sum of some thousand numbers in single precision


# Sums of log-probabilities.


def rows_in(dtype):
    """Numbers whose log-probabilities add up to more than low precision can tell."""
    x = torch.randn(64, 100).to(dtype)
    return x, torch.full((), 0.3, dtype=dtype)


SHAPES = {
    "in an event": lambda x, loc: dist.Normal(loc, 1.0).expand(x.shape).to_event(1),
    "in nested events": lambda x, loc: dist.Independent(dist.Normal(loc, 1.0).expand(x.shape), 1),
    "in plates": lambda x, loc: dist.Normal(loc, 1.0).expand(x.shape),
}


def scored(x, loc, shape):
    """A program that observes rows."""

    def program():
        law = SHAPES[shape](x, loc)
        with pyro.plate("rows", len(x), dim=-1 if law.event_dim else -2):
            pyro.sample("x", law, obs=x)

    return program


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_log_probabilities_are_summed_in_single_precision(shape, dtype):
    x, loc = rows_in(dtype)
    elements = dist.Normal(loc, 1.0).log_prob(x)
    assert elements.dtype == dtype
    expected = elements.float().sum()
    trace = run(scored(x, loc, shape), ((), {}))
    (seen,) = passes.log_probs(trace, ["x"]).values()
    assert seen.dtype == torch.float32
    torch.testing.assert_close(seen, expected, **SINGLE)
    assert not torch.isclose(elements.sum().float(), expected, **SINGLE)  # what is avoided


@pytest.mark.parametrize("how", ["mask", "scale", "both"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_masked_and_scaled_log_probabilities_are_summed_in_single_precision(shape, dtype, how):
    x, loc = rows_in(dtype)
    kept = torch.arange(64) % 3 > 0 if how in ("mask", "both") else torch.ones(64, dtype=bool)
    scale = torch.linspace(0.5, 2.0, 64) if how in ("scale", "both") else torch.ones(64)
    elements = dist.Normal(loc, 1.0).log_prob(x)
    expected = (elements.float() * scale.float()[:, None])[kept].sum()
    side = (slice(None), None) if shape == "in plates" else ()
    program = scored(x, loc, shape)
    if how != "scale":
        program = pyro.poutine.mask(program, mask=kept[side])
    if how != "mask":
        program = pyro.poutine.scale(program, scale=scale.float()[side])
    (seen,) = passes.log_probs(run(program, ((), {})), ["x"]).values()
    torch.testing.assert_close(seen.float(), expected, **SINGLE)


def test_higher_precision_is_kept():
    for dtype in (torch.float32, torch.float64):
        x, loc = rows_in(dtype)
        (seen,) = passes.log_probs(run(scored(x, loc, "in an event"), ((), {})), ["x"]).values()
        assert seen.dtype == dtype


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("validated", [True, False])
def test_a_game_of_low_precision_tells_its_utility_in_single_precision(dtype, validated, device):
    x, start = rows_in(dtype)
    x, leaf = x.to(device), start.to(device).requires_grad_()
    expected = dist.Normal(leaf.detach(), 1.0).log_prob(x).float().sum()

    def program(x):
        loc = pyro.param("loc", leaf)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).expand(x.shape).to_event(1), obs=x)

    game = Game([Player("a", program, SGD({"lr": 0.0}), lambda play, x: play.log_prob("a", x))])
    with pyro.validation_enabled(validated):
        for loss in (game.evaluate_loss(x), game.step(x)):
            torch.testing.assert_close(
                torch.tensor(-float(loss)).float(), expected.cpu(), **SINGLE
            )
    assert leaf.dtype == dtype


@pytest.mark.parametrize("optim", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_networks_of_low_precision_learn(optim, device):
    pair = Pair(torch.float32, device).to(torch.bfloat16)
    before = [leaf.detach().clone() for leaf in pair.parameters()]
    symeq = SymmetricEquilibrium(pair.model, pair.guide, getattr(pyro.optim, optim)({"lr": 0.05}))
    for _ in range(3):
        symeq.step(pair.x.bfloat16())
    for leaf, value in zip(pair.parameters(), before, strict=True):
        assert leaf.dtype == torch.bfloat16
        assert leaf.isfinite().all()
        assert not torch.equal(leaf, value)


# Mixed precision.


class Pair(nn.Module):
    """A decoder and an encoder in single precision."""

    def __init__(self, dtype=torch.float32, device="cpu"):
        super().__init__()
        torch.manual_seed(0)
        self.decoder = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 8))
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        self.to(device, dtype)
        self.x = torch.rand(32, 8).round().to(device, dtype)
        self.dreams = []

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("rows", len(x)):
            half = torch.full((4,), 0.5, dtype=x.dtype, device=x.device)
            z = pyro.sample("z", dist.Bernoulli(half).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        self.dreams.append(x)
        pyro.module("encoder", self.encoder)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))


def mixed(device):
    return torch.autocast(device.type, torch.bfloat16)


@pytest.mark.filterwarnings("ignore:Not captured. the whole step")
@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("updates", ["alternating", "simultaneous"])
def test_under_autocast_gradients_reach_all_parameters(updates, capture, device):
    """Autocast keeps the casts of weights, and those that were made without a graph have none."""
    pair = Pair(device=device)
    recorders = Recorder(), Recorder()
    symeq = SymmetricEquilibrium(
        pair.model, pair.guide, recorders, updates=updates, capture=capture
    )
    for _ in range(4):
        with mixed(device):
            symeq.step(pair.x)
        for recorder, net in zip(recorders, (pair.decoder, pair.encoder), strict=True):
            assert {*recorder.seen} == {*net.parameters()}
            assert all(g.dtype == torch.float32 and g.any() for g in recorder.seen.values())


@pytest.mark.parametrize("updates", ["alternating", "simultaneous"])
def test_gradients_under_autocast_are_those_of_full_precision_up_to_rounding(updates, device):
    """With latents that are given, the decoder learns from no draw."""
    grads = []
    for is_mixed in (False, True):
        pyro.clear_param_store()
        pair = Pair(device=device)
        recorders = Recorder(), Recorder()
        z = torch.rand(32, 4, generator=torch.Generator().manual_seed(1)).round()
        observed = pyro.poutine.condition(pair.model, data={"z": z.float().to(device)})
        symeq = SymmetricEquilibrium(observed, pair.guide, recorders, updates=updates)
        with torch.autocast(device.type, torch.bfloat16, enabled=is_mixed):
            symeq.step(pair.x)
        grads.append([recorders[0].seen[leaf] for leaf in pair.decoder.parameters()])
    for seen, expected in zip(*grads, strict=True):
        # 2^-8 for each of some operations
        error = (seen - expected).norm() / expected.norm()
        assert 0 < error < 0.05


class Jump(PyroOptim):
    """Sets the last bias of a network, so that its logits are large."""

    def __init__(self, net):
        super().__init__(torch.optim.SGD, {"lr": 0.0})
        self.net = net

    def __call__(self, params, *args, **kwargs):
        with torch.no_grad():
            for leaf in self.net.parameters():
                leaf.fill_(100.0 if leaf is self.net[-1].bias else 0.0)


def dream_after_a_jump(device):
    """What the encoder is shown after the decoder has learned to draw ones alone."""
    pair = Pair(device=device)
    optims = Jump(pair.decoder), SGD({"lr": 0.0})
    symeq = SymmetricEquilibrium(pair.model, pair.guide, optims)
    with torch.no_grad():
        pair.decoder[-1].bias.fill_(-100.0)
    with torch.autocast(device.type, enabled=False):
        symeq.step(pair.x)  # looks at the programs
    with torch.no_grad():
        pair.decoder[-1].bias.fill_(-100.0)
    pair.dreams.clear()
    with mixed(device):
        symeq.step(pair.x)
    shown = [x for x in pair.dreams if x is not pair.x and not torch.equal(x, pair.x)]
    return shown[-1].unique().tolist()


def test_under_autocast_dreams_are_those_of_the_decoder_after_its_move(device):
    assert dream_after_a_jump(device) == [1.0]


def test_without_a_cleared_cache_dreams_would_be_those_before_the_move(device, monkeypatch):
    """If this fails, PyTorch has learned to see that weights have changed."""
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: None)
    assert dream_after_a_jump(device) == [0.0]


@pytest.mark.parametrize("optim", ["SGD", "Adam", "RMSprop"])
def test_a_step_under_autocast_ends_where_a_step_after_step_autocast_does(optim, device):
    """One autocast around many steps is as good as one around each."""

    def train(is_around_all):
        pyro.clear_param_store()
        pair = Pair(device=device)
        make = getattr(pyro.optim, optim)
        symeq = SymmetricEquilibrium(pair.model, pair.guide, make({"lr": 0.05}))
        pyro.set_rng_seed(1)
        if is_around_all:
            with mixed(device):
                losses = [float(symeq.step(pair.x)) for _ in range(4)]
        else:
            losses = []
            for _ in range(4):
                with mixed(device):
                    losses.append(float(symeq.step(pair.x)))
        return losses, [leaf.detach().clone() for leaf in pair.parameters()]

    (losses, leaves), (others, other_leaves) = train(True), train(False)
    assert losses == others
    assert all(map(torch.equal, leaves, other_leaves))


def test_a_utility_under_autocast_is_summed_in_single_precision(device):
    pair = Pair(device=device)
    z = torch.rand(32, 4).round().float().to(device)
    with mixed(device), torch.no_grad():
        logits = pair.decoder(z)
        law = dist.Bernoulli(logits=logits)
        expected = law.log_prob(pair.x).float().sum().item() - 32 * 4 * math.log(2)
        observed = pyro.poutine.condition(pair.model, data={"z": z})
        symeq = SymmetricEquilibrium(observed, pair.guide, SGD({"lr": 0.0}))
        assert logits.dtype == torch.bfloat16
        assert symeq.evaluate_loss(pair.x).decoder == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_the_precision_of_products_is_the_users(precision):
    """On the CPU it changes nothing in double precision, and the choice stays."""

    def train():
        pyro.clear_param_store()
        pair = Pair(torch.float64)
        symeq = SymmetricEquilibrium(pair.model, pair.guide, Adam({"lr": 0.05}))
        pyro.set_rng_seed(1)
        return [float(symeq.step(pair.x)) for _ in range(3)]

    expected = train()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert train() == expected
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


# Memory formats.


class Images(nn.Module):
    """A convolutional decoder and encoder, of images in some memory format."""

    def __init__(self, device, memory_format):
        super().__init__()
        self.memory_format = memory_format
        torch.manual_seed(0)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 3, padding=1)
        )
        self.encoder = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 3, padding=1)
        )
        self.to(device)
        self.x = torch.rand(3, 4, 5, 5, device=device).round()

    def laid_out(self, x):
        return x.contiguous(memory_format=self.memory_format)

    def model(self, x):
        with pyro.plate("rows", len(x)):
            half = torch.full((4, 5, 5), 0.5, device=x.device)
            z = pyro.sample("z", dist.Bernoulli(half).to_event(3))
            logits = self.decoder(self.laid_out(2 * z - 1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)

    def guide(self, x):
        with pyro.plate("rows", len(x)):
            pyro.sample(
                "z", dist.Bernoulli(logits=self.encoder(self.laid_out(2 * x - 1))).to_event(3)
            )


def trained_on_images(optim, device, nets, x, *, since=0, lr=RATE, capture=False, reloaded=False):
    """Parameters after some steps; the networks have their format since one of them.

    Pyro's store has contiguous parameters only, so that the players claim theirs.
    """
    pyro.clear_param_store()
    images = Images(device, x)
    batch = images.laid_out(images.x)
    optims, games = [], []

    def begin():
        optims.append(getattr(pyro.optim, optim)({"lr": lr}))
        parameters = {"decoder": images.decoder, "encoder": images.encoder}
        games.append(
            SymmetricEquilibrium(
                images.model, images.guide, optims[-1], parameters=parameters, capture=capture
            )
        )

    begin()
    pyro.set_rng_seed(1)
    for t in range(6):
        if t == since:
            images.to(memory_format=nets)
            if reloaded:
                state = games[-1].state_dict()
                begin()
                games[-1].load_state_dict(state)
        games[-1].step(batch)
    return {name: leaf.detach().contiguous() for name, leaf in images.named_parameters()}


CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last
formats = pytest.mark.parametrize(
    ("nets", "x"), [(LAST, LAST), (LAST, CONTIGUOUS), (CONTIGUOUS, LAST)], ids=str
)


@formats
@pytest.mark.parametrize("since", [0, 1, 3])
@pytest.mark.parametrize("optim", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_channels_last_gives_the_same_numbers(optim, since, nets, x, device):
    expected = trained_on_images(optim, device, CONTIGUOUS, CONTIGUOUS)
    seen = trained_on_images(optim, device, nets, x, since=since)
    torch.testing.assert_close(seen, expected, rtol=1e-9, atol=1e-9)


@formats
@pytest.mark.parametrize("optim", ["SGD", "Adam", "RMSprop"])
def test_channels_last_gives_the_same_numbers_in_single_precision(optim, nets, x, device):
    """Where other kernels are used, whose gradients may have another layout than the weights.

    Six steps move a weight by some 0.01, and gradients agree to far better than a percent.
    """
    torch.set_default_dtype(torch.float32)
    expected = trained_on_images(optim, device, CONTIGUOUS, CONTIGUOUS, lr=1e-3)
    seen = trained_on_images(optim, device, nets, x, lr=1e-3)
    torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-4)


@formats
@pytest.mark.parametrize("optim", ["SGD", "Adam"])
def test_channels_last_gives_the_same_numbers_captured(optim, nets, x, device):
    expected = trained_on_images(optim, device, CONTIGUOUS, CONTIGUOUS)
    seen = trained_on_images(optim, device, nets, x, capture=True)
    torch.testing.assert_close(seen, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("optim", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_the_state_of_contiguous_networks_serves_those_of_channels_last(optim, device):
    expected = trained_on_images(optim, device, CONTIGUOUS, CONTIGUOUS)
    seen = trained_on_images(optim, device, LAST, LAST, since=3, reloaded=True)
    torch.testing.assert_close(seen, expected, rtol=1e-9, atol=1e-9)
