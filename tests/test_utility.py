"""The utilities and their gradients, against enumeration."""

import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import SGD, PyroOptim

from pyro_symeq import SymmetricEquilibrium, SymmetricLoss, SymmetricUtility
from tests.enumerable import Decoder, Encoder, Ladder, gradients, utilities
from tests.montecarlo import assert_mean

DRAWS = 400
COPIES = 20  # independent draws for each row in one call

X = torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.float64)
Z0 = torch.tensor([[1, 0], [1, 1]], dtype=torch.float64)
Z1 = torch.tensor([[0, 0], [1, 0]], dtype=torch.float64)

PATTERNS = {
    "x": {"x": X},
    "x and z0": {"x": X, "z0": Z0},
    "x and z1": {"x": X, "z1": Z1},
    "x and all latents": {"x": X, "z0": Z0, "z1": Z1},
    "latents only": {"z0": Z0, "z1": Z1},
}


class Recorder(PyroOptim):
    """Keeps the gradients that it is asked to follow, and moves nothing."""

    def __init__(self):
        super().__init__(torch.optim.SGD, {"lr": 0.0})
        self.seen = {}

    def __call__(self, params, *args, **kwargs):
        self.seen = {p: p.grad.clone() for p in params if p.grad is not None}


def by_step(ladder, updates="alternating", **options):
    recorders = Recorder(), Recorder()
    symeq = SymmetricEquilibrium(ladder.model, ladder.guide, recorders, updates=updates, **options)

    def draw(**batch):
        symeq.step(**batch)
        return recorders[0].seen | recorders[1].seen

    return draw


def by_svi(ladder, **options):
    recorder = Recorder()
    svi = SVI(ladder.model, ladder.guide, recorder, loss=SymmetricUtility(**options))

    def draw(**batch):
        svi.step(**batch)
        return recorder.seen

    return draw


def by_module(ladder, **options):
    return _module_draws(ladder, SymmetricUtility(**options)(ladder.model, ladder.guide))


def by_pyro_module(ladder, **options):
    decoder = Decoder(ladder)
    loss = SymmetricUtility(**options)(decoder, Encoder(ladder, decoder))
    assert {*loss.parameters()} == {*ladder.parameters()}
    return _module_draws(ladder, loss)


def by_unregistered_module(ladder, **options):
    ladder.register = lambda decoder: None
    return by_module(ladder, **options)


def _module_draws(ladder, loss):
    def draw(**batch):
        ladder.zero_grad()
        loss(**batch).backward()
        return {p: p.grad.clone() for p in ladder.parameters() if p.grad is not None}

    return draw


ROUTES = {
    "step, alternating": by_step,
    "step, simultaneous": lambda ladder, **options: by_step(ladder, "simultaneous", **options),
    "SVI": by_svi,
    "module": by_module,
    "PyroModule": by_pyro_module,
    "module, unregistered": by_unregistered_module,
}


def assert_unbiased(draw, ladder, batch, supervise_encoder=True):
    device = ladder.z0_logits.device
    batch = {name: value.to(device) for name, value in batch.items()}
    copies = {name: value.repeat(COPIES, 1) for name, value in batch.items()}
    draws = [draw(**copies) for _ in range(DRAWS)]
    with device:
        expected = gradients(ladder, **batch, supervise_encoder=supervise_encoder)
    leaves = [*ladder.theta, *ladder.phi]
    for leaf, gradient in zip(leaves, [*expected[0], *expected[1]], strict=True):
        if gradient is None:
            assert all(leaf not in seen for seen in draws)
            continue
        seen = torch.stack([seen.get(leaf, torch.zeros_like(leaf)) for seen in draws])
        assert_mean(-seen / COPIES, gradient)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("route", ROUTES)
def test_mean_gradient_is_the_enumerated_one(route, pattern, device):
    ladder = Ladder().to(device)
    assert_unbiased(ROUTES[route](ladder), ladder, PATTERNS[pattern])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_routes_agree_bit_for_bit(pattern):
    ladder = Ladder()
    seen = {}
    for route in ("step, simultaneous", "SVI", "module", "PyroModule"):
        pyro.clear_param_store()
        draw = ROUTES[route](ladder)
        draw(**PATTERNS[pattern])
        pyro.set_rng_seed(1)
        seen[route] = draw(**PATTERNS[pattern])
    first, *others = seen.values()
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[leaf], other[leaf]) for leaf in first)


@pytest.mark.parametrize("route", ROUTES)
def test_unsupervised_encoder_learns_from_dreams_alone(route):
    ladder = Ladder()
    draw = ROUTES[route](ladder, supervise_encoder=False)
    assert_unbiased(draw, ladder, PATTERNS["x and z0"], supervise_encoder=False)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_mean_utilities_are_the_enumerated_ones(pattern, device):
    ladder = Ladder().to(device)
    symeq = SymmetricEquilibrium(ladder.model, ladder.guide, SGD({"lr": 0.1}))
    batch = {name: value.to(device) for name, value in PATTERNS[pattern].items()}
    copies = {name: value.repeat(COPIES, 1) for name, value in batch.items()}
    draws = [symeq.evaluate_loss(**copies) for _ in range(DRAWS)]
    with torch.device(device):
        expected = torch.stack(utilities(ladder, **batch))
    seen = torch.tensor([[loss.decoder, loss.encoder] for loss in draws]) / COPIES
    assert_mean(seen, expected.detach().cpu())
    assert all(loss == -(loss.decoder + loss.encoder) for loss in draws)


@pytest.mark.parametrize("local", [False, True])
def test_module_local_params(local):
    ladder = Ladder()
    decoder = Decoder(ladder)
    with pyro.settings.context(module_local_params=local):
        decoder = Decoder(ladder)
        draw = _module_draws(ladder, SymmetricUtility()(decoder, Encoder(ladder, decoder)))
        assert_unbiased(draw, ladder, PATTERNS["x"])


def test_gradients_scale_with_the_loss():
    ladder = Ladder()
    loss = SymmetricUtility()(ladder.model, ladder.guide)
    grads = []
    for factor in (1.0, 3.0):
        pyro.set_rng_seed(1)
        ladder.zero_grad()
        (factor * loss(X)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in ladder.parameters()]))
    torch.testing.assert_close(3 * grads[0], grads[1])


def test_nothing_is_differentiated_without_grad():
    ladder = Ladder()
    loss = SymmetricUtility()(ladder.model, ladder.guide)
    with torch.no_grad():
        assert not loss(X).requires_grad


def test_torch_optimisers_drive_the_module():
    ladder = Ladder()
    loss = SymmetricUtility()(ladder.model, ladder.guide)
    batch = X.repeat(50, 1)
    optim = torch.optim.Adam(ladder.parameters(), lr=0.05)
    before = utilities(ladder, X)[0]
    for _ in range(100):
        optim.zero_grad()
        loss(batch).backward()
        optim.step()
    assert utilities(ladder, X)[0] > before + 1


def test_loss_is_a_float_with_both_utilities():
    loss = SymmetricLoss(decoder=-3.0, encoder=-1.0)
    assert loss == 4.0
    assert sum([loss, loss]) == 8.0
    copy = pickle.loads(pickle.dumps(loss))
    assert (copy, copy.decoder, copy.encoder) == (4.0, -3.0, -1.0)


def test_bind_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="Expected bind to be a dict"):
        SymmetricUtility(bind="x")


def test_traces_are_those_of_the_wake_pass():
    ladder = Ladder()
    model_trace, guide_trace = SymmetricUtility()._get_trace(ladder.model, ladder.guide, (X,), {})
    for name in ("z0", "z1"):
        assert model_trace.nodes[name]["value"] is guide_trace.nodes[name]["value"]


def test_programs_of_former_steps_are_not_kept():
    ladder, utility = Ladder(), SymmetricUtility()
    programs = []
    for _ in range(20):
        model, guide = (pyro.poutine.scale(f, 0.5) for f in (ladder.model, ladder.guide))
        utility.differentiable_loss(model, guide, x=X)
        programs += [weakref.ref(model), weakref.ref(guide)]
    del model, guide
    gc.collect()
    assert sum(program() is not None for program in programs) <= 16


@dataclass
class Program:
    """A program that can't be hashed, as dataclasses that can be compared can't."""

    statements: Callable

    def __call__(self, x):
        self.statements(x)


def test_programs_may_be_unhashable():
    ladder, utility = Ladder(), SymmetricUtility()
    model, guide = Program(ladder.model), Program(ladder.guide)
    assert utility.stage(model, guide) is utility.stage(model, guide)
    assert utility.stage(model, guide) is not utility.stage(Program(ladder.model), guide)
    assert utility.stage(model.__call__, guide) is utility.stage(model.__call__, guide)
    assert SymmetricEquilibrium(model, guide, SGD({"lr": 0.1})).step(X) < torch.inf
    assert utility.differentiable_loss(model, guide, X).requires_grad
