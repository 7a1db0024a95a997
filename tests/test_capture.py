"""Captured training: it is the eager one, or says why it isn't captured."""

import copy
import functools
import gc
import inspect
import io
import math
import os
import random
import re
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import optim, poutine
from torch import nn
from torch.fx import GraphModule
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from pyro_symeq import (
    Batch,
    Game,
    Player,
    SymmetricEquilibrium,
    SymmetricLoss,
    SymmetricUtility,
)
from tests.comparison import RATE, same
from tests.enumerable import Ladder, gradients
from tests.montecarlo import assert_mean
from tests.programs import PROGRAMS
from tests.test_equilibrium import clone, identical
from tests.test_game import SCHEDULES, Chase
from tests.test_utility import PATTERNS, X, assert_unbiased, by_step

Adam = optim.Adam
IS_NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"  # all programs of the matrix
ROWS = [torch.randn(5, 3, generator=torch.Generator().manual_seed(i)) for i in range(12)]


def rows(i):
    """Another batch of five rows for each number."""
    return ROWS[i % len(ROWS)].to(torch.get_default_dtype())


class Watched:
    """A program that counts its runs."""

    def __init__(self, program):
        self.program = program
        self.num_runs = 0
        function = program.forward if isinstance(program, nn.Module) else program
        self.__signature__ = inspect.signature(function)
        self.__wrapped__ = program

    def __call__(self, *args, **kwargs):
        self.num_runs += 1
        return self.program(*args, **kwargs)


@dataclass
class History:
    """What a training did.

    Args:
        losses: What its steps returned.
        leaves: The parameters in the end.
        reasons: Why it was not captured, as the warnings say.
        last_runs: How often programs ran in the last step.
        random: The random state in the end.
    """

    losses: list
    leaves: dict
    reasons: list
    last_runs: int
    random: torch.Tensor


def history(make, drive, capture, optimizer=None, **options):
    """Trains a pair from a fixed start."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pair = make()
    model, guide = Watched(pair.model), Watched(pair.guide)
    optimizer = optimizer() if optimizer else Adam({"lr": RATE})
    symeq = SymmetricEquilibrium(model, guide, optimizer, capture=capture, **options)
    pyro.set_rng_seed(1)
    losses, last_runs = [], 0
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for loss in drive(symeq, pair):
            losses.append((loss.decoder, loss.encoder) if hasattr(loss, "decoder") else loss)
            last_runs = model.num_runs + guide.num_runs
            model.num_runs = guide.num_runs = 0
    leaves = {n: x.detach().clone() for n, x in pyro.get_param_store().named_parameters()}
    reasons = [str(w.message) for w in seen if str(w.message).startswith("Not captured")]
    return History(losses, leaves, reasons, last_runs, torch.get_rng_state())


def assert_alike(captured, eager):
    """Up to rounding, which gradients that are as good as zero carry into Adam's steps."""
    torch.testing.assert_close(captured.losses, eager.losses, rtol=1e-9, atol=1e-9)
    assert captured.leaves.keys() == eager.leaves.keys()
    for name, leaf in eager.leaves.items():
        torch.testing.assert_close(captured.leaves[name], leaf, rtol=1e-8, atol=1e-9, msg=name)
    assert torch.equal(captured.random, eager.random), "other draws"


# The matrix of programs.

VALUES = "the host reads the elements"  # what is done depends on the values of tensors
SUBSAMPLED = "aten.equal"  # which rows a dream stands for is found by its values

NOT_CAPTURED = {
    "latents: one site, VonMises": VALUES,
    "plates: sequential": VALUES,
    "plates: sequential and subsampled": VALUES,
    "plates: subsampled, data[ind]": SUBSAMPLED,
    "plates: subsampled, data[ind, :]": SUBSAMPLED,
    "plates: subsampled, index_select": SUBSAMPLED,
    "plates: subsampled, take along a dim": SUBSAMPLED,
    "plates: subsampled, gather": SUBSAMPLED,
    "plates: subsampled, pyro.subsample": SUBSAMPLED,
    "plates: subsampled from, in a dict": SUBSAMPLED,
    "plates: subsampled from, images flattened": SUBSAMPLED,
    "plates: subsampled from, columns of a table": SUBSAMPLED,
    "plates: subsampled from, cast": SUBSAMPLED,
    "plates: subsampled with a global latent": SUBSAMPLED,
    "plates: subsampled with labels": SUBSAMPLED,
    "plates: subsampled twice": SUBSAMPLED,
    "plates: subsampled groups of members": SUBSAMPLED,
    "plates: subsampled local parameters": SUBSAMPLED,
    "sequences: subsampled sequences": SUBSAMPLED,
    "sequences: list of sequences of different lengths": VALUES,
    "sequences: deep markov model with packed reversed sequences, padding as dreamed": VALUES,
    "sequences: deep markov model with packed reversed sequences, padding zeroed": VALUES,
    "stochastic: branch with a latent of its own": VALUES,
    "stochastic: branch for each row": VALUES,
    "stochastic: geometric number of latents": VALUES,
    "stochastic: recursive programs": VALUES,
    "stochastic: observed site whose name depends on a draw": VALUES,
    "stochastic: whole data observed at one site or another": VALUES,
    "stochastic: parameters of the branch taken": VALUES,
    "stochastic: particles of a branch": VALUES,
    "stochastic: particles of a subsample, in a loop": SUBSAMPLED,
    "stochastic: particles of a subsample, best of several": SUBSAMPLED,
}


def trained(name, capture, device, steps=4):
    """Trains a program of the matrix; the first step is eager, and two are recorded."""

    def make():
        with device:
            return PROGRAMS[name]()

    def drive(symeq, program):
        for _ in range(steps):
            yield [tuple(symeq.step(*args, **kw).utilities.values()) for args, kw in program.calls]

    options = PROGRAMS[name]().options
    return history(make, drive, capture, loss=SymmetricUtility(**options))


@pytest.mark.parametrize("name", list(PROGRAMS)[:: 1 if IS_NIGHTLY else 9])
def test_same_noise_same_numbers(name, device):
    """Captured, a program trains as ever, whether its operations are recorded or not."""
    eager, captured = (trained(name, capture, device) for capture in (False, True))
    assert_alike(captured, eager)
    assert eager.last_runs > 0
    lessons = [reason for reason in captured.reasons if "the whole step" not in reason]
    assert (captured.last_runs == 0) == (not lessons)
    if device.type == "cpu":
        assert bool(captured.reasons) == (name in NOT_CAPTURED), captured.reasons
        assert all(NOT_CAPTURED[name] in reason for reason in captured.reasons)


def test_the_programs_that_are_not_captured_are_in_the_matrix():
    assert NOT_CAPTURED.keys() <= PROGRAMS.keys()


# Trainings in which something changes on the way.


class Pair:
    """Binary latents and a hook, ``change``, in the decoder."""

    def __init__(self, layers=nn.Linear):
        self.decoder, self.encoder = layers(2, 3), layers(3, 2)

    def change(self, h):
        return h

    def observed(self, h):
        return dist.Normal(h, 1.0)

    def model(self, x, *rest, **more):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
            h = self.change(self.decoder(z), *rest, **more)
            pyro.sample("x", self.observed(h).to_event(1), obs=x)

    def guide(self, x, *rest, **more):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))


def changed(change, base=Pair, **attributes):
    """A maker of pairs with a hook of this kind."""
    return type("Changed", (base,), {"change": change, **attributes})


SCENARIOS = {}  # name: a function that trains in both ways and compares


def scenario(make=Pair, reason=None, is_replayed=True, **options):
    """Registers a training, which is to be the eager one.

    Args:
        make: Makes the pair.
        reason: Why it can't be captured, if not; ``""`` where it may be or not.
        is_replayed: Whether no program runs in the last step.
        options: Those of SymmetricEquilibrium.
    """

    def register(drive):
        def check():
            eager, captured = (history(make, drive, on, **options) for on in (False, True))
            assert_alike(captured, eager)
            assert eager.last_runs > 0
            if reason:
                assert captured.reasons, "no warning"
                assert all(re.search(reason, text) for text in captured.reasons), captured.reasons
            elif reason is None:
                assert not captured.reasons
                assert (captured.last_runs == 0) == is_replayed

        SCENARIOS[drive.__name__.replace("_", " ")] = check
        return drive

    return register


def steps(symeq, numbers):
    for i in numbers:
        yield symeq.step(rows(i))


def plain(symeq, pair):
    yield from steps(symeq, range(6))


def called_with(*arguments):
    """Steps with these arguments after the rows, each four times."""

    def drive(symeq, pair):
        for i, argument in enumerate(a for a in arguments for _ in range(4)):
            yield symeq.step(rows(i), *argument)

    return drive


def named(name, drive=plain, **options):
    """Registers a training under a name of its own."""

    def renamed(symeq, pair):
        return drive(symeq, pair)

    renamed.__name__ = name
    scenario(**options)(renamed)


named("nothing changes")

OPTIMIZERS = {
    "SGD with momentum": lambda: optim.SGD({"lr": 0.05, "momentum": 0.9}),
    "RMSprop": lambda: optim.RMSprop({"lr": 0.01}),
    "ClippedAdam": lambda: optim.ClippedAdam({"lr": 0.05, "clip_norm": 0.5, "lrd": 0.9}),
    "Adagrad": lambda: optim.Adagrad({"lr": 0.05, "lr_decay": 0.1}),
    "AdagradRMSProp": lambda: optim.AdagradRMSProp({"eta": 0.1}),
    "AdamW": lambda: optim.AdamW({"lr": 0.05, "weight_decay": 0.1}),
    "Adam with amsgrad": lambda: Adam({"lr": 0.05, "amsgrad": True}),
    "Adam with clipped gradients": lambda: Adam({"lr": 0.05}, {"clip_norm": 0.1}),
    "a rate for each parameter": lambda: Adam(lambda n: {"lr": 0.1 if "bias" in n else 0.01}),
    "two": lambda: (Adam({"lr": 0.05}), optim.SGD({"lr": 0.01})),
}
for _name, _make in OPTIMIZERS.items():
    named(f"optimiser: {_name}", optimizer=_make)

OPTIONS = {
    "simultaneous": {"updates": "simultaneous"},
    "several steps": {"decoder_steps": 2, "encoder_steps": 3},
    "several steps at once": {
        "decoder_steps": 2,
        "encoder_steps": 3,
        "updates": "simultaneous",
        "encoder_warmup": 2,
    },
    "particles": {"loss": SymmetricUtility(num_particles=3)},
    "particles at once": {
        "loss": SymmetricUtility(
            num_particles=3, vectorize_particles=True, max_plate_nesting=1, num_proposals=2
        )
    },
    "proposals": {"loss": SymmetricUtility(num_proposals=4)},
}
for _name, _options in OPTIONS.items():
    named(f"option: {_name}", **_options)


@scenario(encoder_warmup=4)
def the_warmup_ends(symeq, pair):
    yield from steps(symeq, range(9))


@scenario()
def players_freeze_and_thaw(symeq, pair):
    yield from steps(symeq, range(4))
    symeq.freeze("decoder")
    yield from steps(symeq, range(2))
    symeq.thaw("decoder")
    symeq.freeze("encoder")
    yield from steps(symeq, range(2))
    symeq.thaw("encoder")
    yield from steps(symeq, range(3))


def to_the_end(resting):
    """Steps in which a player moves four times, then rests."""

    def drive(symeq, pair):
        yield from steps(symeq, range(4))
        symeq.freeze(resting)
        yield from steps(symeq, range(5))

    return drive


for _name in ("decoder", "encoder"):
    named(f"the {_name} rests to the end", to_the_end(_name))


@scenario(encoder_warmup=100)
def the_warmup_lasts(symeq, pair):
    yield from steps(symeq, range(5))


@scenario()
def frozen_before_the_first_step(symeq, pair):
    symeq.freeze("encoder")
    yield from steps(symeq, range(4))
    symeq.thaw("encoder")
    yield from steps(symeq, range(4))


def settings(symeq):
    for leaf, kept in symeq.optim.optim_objs.items():
        yield leaf, kept.param_groups[0]


@scenario()
def hyperparameters_change(symeq, pair):
    yield from steps(symeq, range(4))
    for change in ({"lr": 0.5}, {"betas": (0.5, 0.6)}, {"weight_decay": 0.3}, {"eps": 0.1}):
        for _, group in settings(symeq):
            group.update(change)
        yield from steps(symeq, range(2))
    for leaf, group in settings(symeq):
        group["lr"] = 0.01 if leaf.dim() == 2 else 0.3
    yield from steps(symeq, range(2))


@scenario(
    optimizer=lambda: optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.7}
    )
)
def rates_follow_a_schedule(symeq, pair):
    for i in range(8):
        yield symeq.step(rows(i))
        symeq.optim.step()


@scenario()
def losses_are_evaluated_between_steps(symeq, pair):
    for i in range(6):
        yield symeq.step(rows(i))
        yield symeq.evaluate_loss(rows(i + 1))
    yield symeq.step(rows(0))


@scenario()
def the_training_goes_back(symeq, pair):
    yield from steps(symeq, range(5))
    state = symeq.state_dict()
    once = list(steps(symeq, range(4)))
    symeq.load_state_dict(state)
    again = list(steps(symeq, range(4)))
    assert once == again
    yield from once
    yield from steps(symeq, range(2))


@scenario(is_replayed=False)
def the_store_is_cleared(symeq, pair):
    yield from steps(symeq, range(5))
    pyro.clear_param_store()
    yield from steps(symeq, range(1))


@scenario()
def new_networks_take_the_place_of_the_old(symeq, pair):
    yield from steps(symeq, range(5))
    pyro.clear_param_store()
    pair.decoder, pair.encoder = nn.Linear(2, 3), nn.Linear(3, 2)
    yield from steps(symeq, range(5))


class WithScale(Pair):
    def observed(self, h):
        return dist.Normal(
            h, pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        )


@scenario(make=WithScale)
def a_parameter_is_set_in_the_store(symeq, pair):
    yield from steps(symeq, range(5))
    pyro.get_param_store()["scale"] = torch.tensor(3.0)
    yield from steps(symeq, range(5))


@scenario(make=WithScale)
def parameters_are_created_again(symeq, pair):
    """A parameter that is created in a recorded run is one all the same."""
    yield from steps(symeq, range(5))
    pyro.clear_param_store()
    yield from steps(symeq, range(5))


@scenario(make=WithScale)
def the_store_is_loaded(symeq, pair):
    yield from steps(symeq, range(1))
    state = copy.deepcopy(pyro.get_param_store().get_state())
    only_scale = {key: {"scale": values["scale"]} for key, values in state.items()}
    yield from steps(symeq, range(4))
    pyro.get_param_store().set_state(only_scale)
    yield from steps(symeq, range(5))


@scenario()
def parameters_get_other_memory(symeq, pair):
    """``parameter.data = ...``, as in ``vector_to_parameters`` and ``Module.to``."""
    yield from steps(symeq, range(5))
    nn.utils.vector_to_parameters(torch.linspace(-1, 1, 9), pair.decoder.parameters())
    yield from steps(symeq, range(5))


@scenario()
def parameters_are_changed_where_they_lie(symeq, pair):
    yield from steps(symeq, range(5))
    with torch.no_grad():
        pair.decoder.weight.mul_(2)
    pair.encoder.load_state_dict({k: x + 1 for k, x in pair.encoder.state_dict().items()})
    yield from steps(symeq, range(3))


@scenario(is_replayed=False, reason="")
def a_network_is_fixed_for_a_while(symeq, pair):
    yield from steps(symeq, range(5))
    pair.decoder.requires_grad_(False)
    yield from steps(symeq, range(3))
    pair.decoder.requires_grad_(True)
    yield from steps(symeq, range(3))


# Modules with a state.


def normalised(num_in, num_out):
    return nn.Sequential(
        nn.Linear(num_in, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, num_out)
    )


@scenario(make=lambda: Pair(normalised))
def modules_switch_between_training_and_evaluation(symeq, pair):
    for switch in (pair.decoder.eval, pair.encoder.eval, pair.decoder.train, pair.encoder.train):
        for i in range(3):
            yield symeq.step(rows(i))
            yield [x.tolist() for x in (*pair.decoder.buffers(), *pair.encoder.buffers())]
        yield symeq.evaluate_loss(rows(1))
        switch()
    yield from steps(symeq, range(5))


class Whole(nn.Module):
    """A module whose methods are the programs, so that itself it is never called."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))
        self.slope = nn.Parameter(torch.randn(3, 2))

    def model(self, x):
        weight = pyro.param("weight", self.weight)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
            h = nn.functional.dropout(z @ weight, 0.5, self.training)
            pyro.sample("x", dist.Normal(h, 1.0).to_event(1), obs=x)

    def guide(self, x):
        slope = pyro.param("slope", self.slope)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=x @ slope).to_event(1))


@scenario(make=Whole)
def a_module_that_is_never_called_switches(symeq, pair):
    yield from steps(symeq, range(5))
    pair.eval()
    yield from steps(symeq, range(5))


named("spectral norm", make=lambda: Pair(lambda a, b: spectral_norm(nn.Linear(a, b))))
named("weight norm", make=lambda: Pair(lambda a, b: weight_norm(nn.Linear(a, b))))


# What is around a step.


@scenario()
def a_handler_is_around_some_steps(symeq, pair):
    yield from steps(symeq, range(4))
    with poutine.scale(scale=2.0):
        yield from steps(symeq, range(4))
    yield from steps(symeq, range(4))


@scenario()
def a_handler_is_around_the_first_steps(symeq, pair):
    with poutine.scale(scale=2.0):
        yield from steps(symeq, range(4))
    yield from steps(symeq, range(4))


@scenario()
def gradients_are_off(symeq, pair):
    with torch.no_grad():
        yield from steps(symeq, range(6))


@scenario()
def the_rows_are_inference_tensors(symeq, pair):
    with torch.inference_mode():
        batches = [rows(i) + 1 for i in range(6)]
    for x in batches:
        yield symeq.step(x)


@pytest.mark.parametrize("start", [torch.float32, torch.float64])
def test_mixed_precision_comes_and_goes(start):
    """bfloat16 rounds to 8 bits, but both trainings round alike."""
    torch.set_default_dtype(start)

    def drive(symeq, pair):
        for is_mixed in (False, True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
                yield from steps(symeq, range(4))

    eager, captured = (history(Pair, drive, on) for on in (False, True))
    torch.testing.assert_close(captured.losses, eager.losses, rtol=1e-4, atol=1e-4)
    assert captured.last_runs == 0


@scenario()
def validation_comes_and_goes(symeq, pair):
    for is_on in (True, False, True):
        with pyro.validation_enabled(is_on):
            yield from steps(symeq, range(4))


# Arguments.

named(
    "rows of other numbers",
    lambda symeq, pair: (symeq.step(rows(i)[: 5 - i // 4]) for i in range(12)),
)
named(
    "None and tensors",
    called_with((), (None,), (torch.ones(3),)),
    make=changed(lambda s, h, a=None: h if a is None else h + a),
)
named(
    "kinds of numbers",
    called_with((1,), (1.0,), (True,), (2,)),
    make=changed(lambda s, h, a: h / a if isinstance(a, bool) else h * a),
)
named(
    "zeros of both signs",
    called_with((0.0,), (-0.0,)),
    make=changed(lambda s, h, a: h * math.copysign(2.0, a)),
)
named(
    "kinds of containers",
    called_with(([torch.ones(3)],), ((torch.ones(3),),)),
    make=changed(lambda s, h, a: h + a[0] if isinstance(a, list) else h - a[0]),
)
named(
    "nothing and an empty container",
    called_with((), ([],), ({},)),
    make=changed(lambda s, h, a=None: h + (0 if a is None else 1 if a == [] else 2)),
)


@dataclass
class Plus:
    x: torch.Tensor


@dataclass
class Minus:
    x: torch.Tensor


named(
    "kinds of dataclasses",
    called_with((Plus(torch.ones(3)),), (Minus(torch.ones(3)),)),
    make=changed(lambda s, h, a: h + a.x if isinstance(a, Plus) else h - a.x),
)
named(
    "nested containers",
    called_with(({"a": [torch.ones(3), (2.0, None)]},), ({"a": [torch.ones(3), (3.0, None)]},)),
    make=changed(lambda s, h, a: h + a["a"][0] * a["a"][1][0]),
)
named(
    "keywords",
    lambda symeq, pair: (symeq.step(x=rows(i), a=rows(i).mean()) for i in range(6)),
    make=changed(lambda s, h, a: h + a),
)
named(
    "other types of numbers",
    lambda symeq, pair: (
        symeq.step(rows(i), rows(i).mean().float() if i < 4 else rows(i).mean()) for i in range(8)
    ),
    make=changed(lambda s, h, a: h + a),
)
named(
    "arrays",
    called_with((np.ones(3),), (np.zeros(3),)),
    make=changed(lambda s, h, a: h + torch.as_tensor(a)),
    reason="ndarray, whose changes can't be seen",
)
named(
    "namespaces",
    called_with((SimpleNamespace(a=1.0),)),
    make=changed(lambda s, h, a: h * a.a),
    reason="SimpleNamespace, whose changes can't be seen",
)
named(
    "sparse tensors",
    called_with((torch.eye(3, dtype=torch.float64).to_sparse(),)),
    make=changed(lambda s, h, a: (a @ h.T).T),
    reason="",
)
named(
    "complex numbers and their conjugates",
    lambda symeq, pair: (
        symeq.step(rows(i), a)
        for i in range(8)
        for a in [torch.tensor(1 + 2j) if i < 4 else torch.tensor(1 + 2j).conj()]
    ),
    make=changed(lambda s, h, a: h + a.imag),
)
named(
    "strides",
    lambda symeq, pair: (
        symeq.step(x)
        for i in range(12)
        for x in [
            rows(i)
            if i < 4
            else rows(i).T.contiguous().T
            if i < 8
            else rows(i)[:, :1].expand(5, 3)
        ]
    ),
)


@scenario(make=changed(lambda s, h, y: h + y.mean()))
def arguments_share_memory_or_not(symeq, pair):
    table = torch.randn(5, 6)
    for _ in range(4):
        yield symeq.step(table[:, :3], table[:, 3:])
    for i in range(4):
        yield symeq.step(rows(i), rows(i + 1))
    for _ in range(4):
        yield symeq.step(torch.randn(5, 6)[:, :3], table[:, 3:])


@scenario(make=changed(lambda s, h, y: h + y.mean()))
def one_tensor_is_in_two_places(symeq, pair):
    for i in range(4):
        yield symeq.step(rows(i), rows(i + 1))
    for i in range(4):
        yield symeq.step(*[rows(i)] * 2)
    for i in range(4):
        yield symeq.step(rows(i), rows(i + 1))


@scenario(make=changed(lambda s, h: h + rows_kept[0].mean()))
def the_rows_are_seen_from_outside_too(symeq, pair):
    for _ in range(4):
        yield symeq.step(rows_kept[0])
    for i in range(4):
        yield symeq.step(rows_kept[i])


rows_kept = [x.double() for x in ROWS]


# What operations are not all of what a program does, or depend on values.


class Coin(Pair):
    """A branch by a draw, which two recordings may take alike by chance."""

    def model(self, x):
        pyro.module("decoder", self.decoder)
        z = pyro.sample("z", dist.Bernoulli(0.5))
        loc = self.decoder.bias if self.look(z) else -self.decoder.bias
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        pyro.sample("z", dist.Bernoulli(logits=self.encoder(x).sum()))


def from_seed(seed, symeq, pair):
    pyro.set_rng_seed(seed)
    yield from steps(symeq, range(12))


LOOKS = {
    "item": lambda self, z: z.item(),
    "if": lambda self, z: bool(z),
    "tolist": lambda self, z: z.tolist(),
    "numpy": lambda self, z: z.numpy(),
    "format": lambda self, z: f"{z:.0f}" == "1",
}
for _name, _look in LOOKS.items():
    for _seed in range(3):
        named(
            f"a branch by {_name}, seed {_seed}",
            functools.partial(from_seed, _seed + 20),
            make=type("Coin", (Coin,), {"look": _look}),
            reason="",
        )


def masked_mean(self, h, mask):
    return h + h[mask].sum(0) / len(h[mask])


def masked_rows(self, h, mask):
    chosen = h[mask]
    return h + (chosen + torch.zeros(len(chosen), 1)).mean(0)


MASKED = {
    "mean of masked rows": masked_mean,
    "masked rows": masked_rows,
    "nonzero": lambda s, h, mask: h + len(mask.nonzero()),
    "unique": lambda s, h, mask: h + len(mask.unique()),
    "masked_select": lambda s, h, mask: h + mask.masked_select(mask).numel(),
    "where": lambda s, h, mask: h + len(torch.where(mask)[0]),
}


def with_masks(symeq, pair):
    for i, k in enumerate((3, 3, 3, 3, 1, 4, 2, 5)):
        yield symeq.step(rows(i), torch.arange(5) < k)


for _name, _change in MASKED.items():
    named(f"shape by values: {_name}", with_masks, make=changed(_change), reason="")

named(
    "a value is set where a mask says so",
    with_masks,
    make=changed(lambda s, h, mask: h.clone().index_put((mask,), torch.zeros(()))),
    reason="",
)
named(
    "NumPy computes on an argument",
    called_with((torch.ones(3),), (torch.arange(3.0),)),
    make=changed(lambda s, h, a: h + torch.from_numpy(np.sort(a.double().numpy()))),
    reason="",
)


def seeded(self, h):
    torch.manual_seed(7)
    return h + torch.randn(3)


def forked(self, h):
    with torch.random.fork_rng(devices=[]):
        return seeded(self, h)


def by_own_generator(self, h):
    if not hasattr(self, "generator"):
        self.generator = torch.Generator().manual_seed(3)
    return h + torch.randn(3, generator=self.generator)


def in_place_of_array(self, h):
    shift = torch.from_numpy(np.zeros(3))
    shift += 1.0
    return h + shift


named("seeded by the program", make=changed(seeded), reason="")
named("random states are forked", make=changed(forked), reason="")
named("a generator of its own", make=changed(by_own_generator), reason="")
named("in place of an array", make=changed(in_place_of_array))
named("in place of a tensor", make=changed(lambda s, h: h + torch.tensor([1.0, 2, 3]).add_(1)))
named(
    "forgotten activations are computed again",
    make=changed(
        lambda s, h: checkpoint(
            lambda h: nn.functional.dropout(torch.tanh(h), 0.5), h, use_reentrant=False
        )
    ),
    reason="",
)
named("Python draws", make=changed(lambda s, h: h + random.random()), reason="Python or NumPy")
named("NumPy draws", make=changed(lambda s, h: h + np.random.rand()), reason="Python or NumPy")


class Sign(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return h.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].abs()


def climbed(self, h):
    with torch.enable_grad():
        y = h.detach().requires_grad_()
        return h + torch.autograd.grad((y**4).sum(), y)[0]


class Table(Pair):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3, sparse=True)

    def change(self, h):
        return h + pyro.module("table", self.table)(torch.arange(len(h)))


named("a gradient of its own", make=changed(lambda s, h: Sign.apply(h)))
named("a gradient within", make=changed(climbed))
named("vmap", make=changed(lambda s, h: torch.vmap(lambda row: row * 2)(h)))
named("sparse gradients", make=Table, optimizer=lambda: optim.SGD({"lr": 0.05}))


def counted(self, h):
    self.beta = getattr(self, "beta", 0.0) + 0.01
    return h * self.beta


def averaged(self, h):
    self.mean = 0.9 * getattr(self, "mean", 0.0) + 0.1 * h.detach().mean(0)
    return h + self.mean


def averaged_in_place(self, h):
    if not hasattr(self, "mean"):
        self.mean = torch.zeros(3)
    self.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
    return h + self.mean


@pytest.mark.parametrize("change", [counted, averaged])
def test_what_changes_at_each_step_is_not_captured(change):
    """Recordings run the programs more often, so that counters go ahead; the reason is told."""
    captured = history(changed(change), plain, True)
    assert captured.last_runs > 0
    assert captured.reasons
    assert all("changes from step to step" in text for text in captured.reasons)


named("a mean that a program keeps in a tensor", make=changed(averaged_in_place), reason="")


def test_numbers_that_are_set_later_are_not_seen_but_tensors_are():
    def run(set_to):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        pair = changed(lambda s, h: h * s.beta)()
        pair.beta = 1.0 if isinstance(set_to, float) else torch.tensor(1.0)
        symeq = SymmetricEquilibrium(pair.model, pair.guide, Adam({"lr": 0.1}), capture=True)
        losses = [*steps(symeq, range(4))]
        if isinstance(set_to, float):
            pair.beta = set_to
        else:
            pair.beta.copy_(set_to)
        return [*losses, *steps(symeq, range(2))]

    assert run(1.0) == run(0.0)
    assert run(torch.tensor(1.0)) == run(1.0)
    assert run(torch.tensor(0.0)) != run(1.0)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_training_is_the_eager_one(name):
    SCENARIOS[name]()


# Batches that are refused.


def trained_pair(make=Pair, capture=True, num_steps=5, batch=rows, optimizer=None, **options):
    pair = make()
    optimizer = optimizer or Adam({"lr": 0.05})
    symeq = SymmetricEquilibrium(pair.model, pair.guide, optimizer, capture=capture, **options)
    for i in range(num_steps):
        symeq.step(batch(i))
    return pair, symeq


def parameters_of(pair):
    return [*pair.decoder.parameters(), *pair.encoder.parameters()]


@pytest.mark.parametrize("num_steps", [1, 2, 5])  # while it is recorded, and later
@pytest.mark.parametrize("updates", ["alternating", "simultaneous"])
@pytest.mark.parametrize("num_bad", [1, 15])
def test_a_batch_with_nan_is_refused_and_moves_nothing(num_steps, updates, num_bad):
    pair, symeq = trained_pair(num_steps=num_steps, updates=updates)
    x = rows(5).clone()
    x.view(-1)[:num_bad] = math.nan
    before, state = clone(parameters_of(pair)), symeq.state_dict()
    with pytest.raises(ValueError, match=f"'x' is not finite: {num_bad} elements"):
        symeq.step(x)
    assert identical(parameters_of(pair), before)
    assert same(symeq.state_dict()["players"], state["players"])
    assert all(leaf.grad is None for leaf in parameters_of(pair))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = [symeq.step(rows(i)) for i in range(5)]
    assert all(map(math.isfinite, losses))
    assert not identical(parameters_of(pair), before)


def test_a_utility_that_is_not_finite_takes_earlier_moves_back():
    """The encoder scores itself at a latent that it gives no chance, after the decoder moved."""

    class Fragile(Pair):
        def model(self, x, scale):
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

        def guide(self, x, scale):
            pyro.module("encoder", self.encoder)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.encoder(x), scale).to_event(1))

    pair, symeq = trained_pair(Fragile, num_steps=0)
    for i in range(5):
        symeq.step(rows(i), torch.ones(()))
    before, state = clone(parameters_of(pair)), symeq.state_dict()["players"]
    with pytest.raises(ValueError, match="finite utility of the encoder"):
        symeq.step(rows(5), torch.tensor(1e-200))  # log q of dreams is -inf
    assert identical(parameters_of(pair), before)
    assert same(symeq.state_dict()["players"], state)


def test_the_support_is_checked_in_the_steps_before():
    """Validation looks at what runs, and nothing but operations runs in a replay."""
    make = changed(lambda s, h: h, observed=lambda s, h: dist.Bernoulli(logits=h))
    outside = 0.5 * (rows(5) > 0).double()
    with pytest.raises(ValueError, match="No log-probability at site 'x'"):
        trained_pair(make, True, batch=lambda i: outside)
    pyro.clear_param_store()
    _, symeq = trained_pair(make, True, batch=lambda i: (rows(i) > 0).double())
    assert math.isfinite(symeq.step(outside))


def test_inference_mode_is_refused():
    _, symeq = trained_pair()
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        symeq.step(rows(0))


# Signatures.


def test_signatures_that_never_repeat_give_one_warning():
    pair, symeq = trained_pair(num_steps=0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for num_rows in range(1, 100):
            symeq.step(torch.randn(num_rows, 3))
    assert len(seen) == 1
    assert "batches were alike" in str(seen[0].message)
    assert seen[0].filename == __file__


def num_graphs():
    gc.collect()
    return sum(issubclass(type(x), GraphModule) for x in gc.get_objects())


def test_few_recordings_are_kept_of_many_signatures(monkeypatch):
    monkeypatch.setattr("pyro_symeq.capture.NUM_KEPT", 4)
    pair, symeq = trained_pair(num_steps=0)
    before = num_graphs()
    for num_rows in range(1, 9):
        for _ in range(3):
            symeq.step(torch.randn(num_rows, 3))
    assert num_graphs() - before <= 4
    eager = SymmetricEquilibrium(pair.model, pair.guide, Adam({"lr": 0.05}))
    eager.load_state_dict(symeq.state_dict())  # and the first, forgotten by now, is as ever
    x, state = torch.randn(1, 3), symeq.state_dict()
    captured = [symeq.step(x) for _ in range(4)]
    symeq.load_state_dict(state)
    eager.load_state_dict(state)
    assert captured == pytest.approx([eager.step(x) for _ in range(4)], rel=1e-9)


def test_objects_that_are_gone_leave_no_recordings():
    before = num_graphs()
    for _ in range(3):
        pyro.clear_param_store()
        trained_pair()
    assert num_graphs() <= before


# States.

STATES = {
    "Adam": lambda: Adam({"lr": 0.03}),
    "two": lambda: (Adam({"lr": 0.03}), optim.SGD({"lr": 0.1, "momentum": 0.9})),
    "scheduled": lambda: optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9}
    ),
    "ClippedAdam": lambda: optim.ClippedAdam({"lr": 0.03, "lrd": 0.9}),
}


class Training:
    """A training that can be stopped and taken up, captured or not."""

    def __init__(self, optimizer, capture, state=None, **options):
        pyro.clear_param_store()
        pyro.set_rng_seed(0 if state is None else 1)
        self.ladder = Ladder()
        self.optim = STATES[optimizer]()
        self.symeq = SymmetricEquilibrium(
            self.ladder.model, self.ladder.guide, self.optim, capture=capture, **options
        )
        if state is not None:
            self.symeq.load_state_dict(state)

    def run(self, num_steps):
        for _ in range(num_steps):
            self.symeq.step(X[torch.randint(len(X), (5,))])
            if hasattr(self.optim, "step"):
                self.optim.step()
        return clone(self.ladder.parameters())


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


RESUMED = [
    *((optimizer, 5, (True, True)) for optimizer in STATES),
    ("Adam", 2, (True, True)),
    ("scheduled", 5, (True, False)),
    ("scheduled", 5, (False, True)),
]


@pytest.mark.parametrize(("optimizer", "stop", "ways"), RESUMED, ids=str)
def test_resumed_training_goes_on(optimizer, stop, ways):
    """From eager to captured and back too; bit for bit, as it is the same operations."""
    options = {"encoder_warmup": 3}
    uninterrupted = Training(optimizer, True, **options).run(9)
    first = Training(optimizer, ways[0], **options)
    first.run(stop)
    state = through_a_file(first.symeq.state_dict())
    first.run(1)
    resumed = Training(optimizer, ways[1], state, **options).run(9 - stop)
    torch.testing.assert_close(resumed, uninterrupted, rtol=1e-9, atol=1e-11)
    if all(ways):
        again = Training(optimizer, True, state, **options).run(9 - stop)
        assert identical(again, resumed)


def test_a_copy_trains_on_its_own():
    training = Training("Adam", True)
    training.run(5)
    before = clone(training.ladder.parameters())
    ladder, twin = copy.deepcopy((training.ladder, training.symeq))
    with pytest.raises(ValueError, match="have lost their names"):
        twin.step(X)  # the store holds those of the original
    pyro.clear_param_store()
    twin.step(X)
    assert identical(training.ladder.parameters(), before)
    assert not any(map(torch.equal, ladder.parameters(), before))


@pytest.mark.parametrize("capture", [False, True])
def test_networks_whose_names_a_loaded_store_has_taken_do_not_move(capture):
    pair, symeq = trained_pair(WithScale, num_steps=5, capture=capture)
    pyro.get_param_store().set_state(copy.deepcopy(pyro.get_param_store().get_state()))
    networks = nn.ModuleList([pair.decoder, pair.encoder])
    before = clone(networks.parameters())
    with pytest.raises(ValueError, match="have lost their names"):
        symeq.step(X)
    assert identical(networks.parameters(), before)


# Against enumeration, and ownership.


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("updates", ["alternating", "simultaneous"])
def test_mean_gradient_is_the_enumerated_one(updates, pattern):
    ladder = Ladder()
    draw = by_step(ladder, updates, capture=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_unbiased(draw, ladder, PATTERNS[pattern])


def test_the_encoder_can_learn_from_dreams_alone():
    ladder = Ladder()
    draw = by_step(ladder, capture=True, supervise_encoder=False)
    assert_unbiased(draw, ladder, PATTERNS["x and all latents"], supervise_encoder=False)


@pytest.mark.parametrize("still", ["decoder", "encoder"])
def test_each_player_moves_its_own_parameters_only(still):
    ladder = Ladder()
    frozen, moving = optim.SGD({"lr": 0.0}), Adam({"lr": 0.1})
    optims = (frozen, moving) if still == "decoder" else (moving, frozen)
    symeq = SymmetricEquilibrium(ladder.model, ladder.guide, optims, capture=True)
    theta, phi = clone(ladder.theta), clone(ladder.phi)
    for _ in range(5):
        symeq.step(X)
    assert identical(ladder.theta, theta) == (still == "decoder")
    assert identical(ladder.phi, phi) == (still == "encoder")
    assert all(leaf.grad is None for leaf in ladder.parameters())


def test_what_a_player_claims_is_its_own():
    shared = nn.Linear(2, 2)

    class Sharing(Pair):
        def model(self, x):
            pyro.module("shared", shared)
            bias = pyro.param("bias", torch.zeros(2))
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(shared(z) + bias, 1.0).to_event(1), obs=x)

        def guide(self, x):
            pyro.module("shared", shared)
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.Normal(shared(x), 1.0).to_event(1))

    pair = Sharing()
    symeq = SymmetricEquilibrium(
        pair.model,
        pair.guide,
        Adam({"lr": 0.1}),
        parameters={"encoder": shared},
        capture=True,
    )
    for i in range(5):
        symeq.step(rows(i)[:, :2])
    players = symeq.state_dict()["players"]
    assert players["decoder"]["parameters"].keys() == {"bias"}
    assert players["encoder"]["parameters"].keys() == {"weight", "bias"}
    symeq.freeze("encoder")
    before = clone(shared.parameters())
    symeq.step(rows(0)[:, :2])
    assert identical(shared.parameters(), before)


def test_a_parameter_that_changes_owners_is_no_longer_the_encoders():
    """The model comes to use the encoder's network in batches of another kind."""
    make = changed(lambda s, h, y=None: h if y is None else h + s.encoder(y).sum(-1, keepdim=True))

    class Late(make):
        def model(self, x, y=None):
            if y is not None:
                pyro.module("encoder", self.encoder)
            super().model(x, y)

    def drive(symeq, pair):
        yield from steps(symeq, range(5))
        for i in range(4):
            yield symeq.step(rows(i), torch.ones(5, 3))
        yield from steps(symeq, range(5))

    eager, captured = (history(Late, drive, on) for on in (False, True))
    assert_alike(captured, eager)
    assert captured.last_runs == 0


# Batches of several kinds, and games.


def test_batches_of_several_kinds_make_up_a_step():
    def run(capture):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        ladder = Ladder()
        adam = Adam({"lr": 0.05})
        symeq = SymmetricEquilibrium(ladder.model, ladder.guide, adam, capture=capture)
        losses = []
        for weight in (1.0, 0.5, 0.0):
            for i in range(4):
                first = Batch(**{n: v.roll(i, 0) for n, v in PATTERNS["x and z0"].items()})
                second = Batch(**PATTERNS["latents only"]).weighted(weight)
                losses.append(symeq.step(first, second, Batch(X.repeat(i % 2 + 1, 1))))
        return [float(loss) for loss in losses], clone(ladder.parameters())

    torch.testing.assert_close(run(True), run(False), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("as_tensor", [True, False], ids=["tensors", "numbers"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_games_follow_their_schedules(schedule, as_tensor):
    """There are no draws, so that gradient steps by hand are the same."""
    rounds = SCHEDULES[schedule]
    updates = schedule if schedule in ("alternating", "simultaneous") else rounds
    chase = Chase(updates=updates, capture=True)
    pulls = [0.5, 0.5, 0.5, 0.5, 0.5]
    theta, utilities = chase.by_hand(rounds, pulls)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pull in pulls:
            loss = chase.game.step(torch.tensor(pull) if as_tensor else pull)
    torch.testing.assert_close(chase.values, theta, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss.utilities, utilities, rtol=1e-12, atol=1e-12)


def test_a_player_without_utility_is_drawn_from():
    def prior():
        pyro.sample("z", dist.Normal(pyro.param("fixed", torch.tensor(0.7)), 1.0))

    def fitted(z):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=z)

    def utility(play, num):
        return play.log_prob("fitted", play.sample("prior")["z"])

    players = [Player("prior", prior), Player("fitted", fitted, optim.SGD({"lr": 0.05}), utility)]
    game = Game(players, capture=True)
    for _ in range(400):
        game.step(torch.zeros(()))
    # An average with rate 0.05 of N(0.7, 1): its deviation is about sqrt(0.05 / 1.95) = 0.16; five
    # of them are missed once in 1.7 million runs.
    assert pyro.param("loc").item() == pytest.approx(0.7, abs=0.8)
    assert pyro.param("fixed").item() == 0.7


# On CUDA, whole steps are graphs.

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
NUM_FIRST = 3  # steps before there is a graph: one eager, two recorded


@pytest.fixture
def unchecked():
    """Validation is off and numbers are single, as where speed counts."""
    torch.set_default_dtype(torch.float32)
    with pyro.validation_enabled(False):
        yield torch.device("cuda")


@pytest.fixture
def no_waiting():
    """Whatever waits for the device is an error."""

    @contextmanager
    def watched():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a prototype, it says
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return watched


class OnDevice(Pair):
    """A pair whose tensors are where its rows are."""

    def __init__(self, layers=nn.Linear):
        super().__init__(layers)
        self.decoder.cuda()
        self.encoder.cuda()

    def model(self, x, *rest, **more):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((2,), 0.5)).to_event(1))
            h = self.change(self.decoder(z), *rest, **more)
            pyro.sample("x", self.observed(h).to_event(1), obs=x)


def cuda_rows(i):
    return rows(i).cuda()


def cuda_trained(capture=True, num_steps=6, make=OnDevice, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pair, symeq = trained_pair(make, capture, 0, **options)
    pyro.set_rng_seed(1)
    return pair, symeq, [symeq.step(cuda_rows(i)) for i in range(num_steps)]


@on_cuda
@pytest.mark.parametrize("updates", ["alternating", "simultaneous"])
def test_a_graph_takes_the_eager_step(updates, unchecked):
    """Random numbers are counted in graphs as out of them, so that draws are the same.

    Single precision, and atomic sums in no certain order: 1e-4 is 1000 roundings.
    """
    options = {"updates": updates, "decoder_steps": 2, "encoder_warmup": 4}
    results = []
    for capture in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pair, _, losses = cuda_trained(capture, 12, **options)
        results.append(([float(loss) for loss in losses], clone(parameters_of(pair))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@on_cuda
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_graphs_follow_the_schedule_of_a_game(schedule):
    """Without draws, so that gradient steps by hand are the same, to rounding."""
    rounds = SCHEDULES[schedule]
    updates = schedule if schedule in ("alternating", "simultaneous") else rounds
    with pyro.validation_enabled(False):
        chase = Chase(updates=updates, capture=True, device="cuda")
        pulls = [0.5, -1.0, 0.7, 0.2, 0.1, -0.3, 0.4]
        theta, utilities = chase.by_hand(rounds, pulls)
        for pull in pulls:
            loss = chase.game.step(torch.tensor(pull, device="cuda"))
    torch.testing.assert_close(chase.values, theta, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dict(loss.utilities), utilities, rtol=1e-10, atol=1e-10)


@on_cuda
def test_gradients_of_graphs_are_the_enumerated_ones():
    """SGD moves from the same point along each draw of the gradient; 5 standard errors each."""
    ladder, rate, copies = Ladder().cuda(), 1e-3, 20
    x = X.cuda().repeat(copies, 1)
    leaves = [*ladder.theta, *ladder.phi]
    start = clone(leaves)
    draws = []
    with pyro.validation_enabled(False):
        symeq = SymmetricEquilibrium(
            ladder.model,
            ladder.guide,
            optim.SGD({"lr": rate}),
            updates="simultaneous",
            capture=True,
        )
        for _ in range(400):
            with torch.no_grad():
                for leaf, value in zip(leaves, start, strict=True):
                    leaf.copy_(value)
            symeq.step(x)
            pairs = zip(leaves, start, strict=True)
            draws.append([(leaf.detach() - value) / rate for leaf, value in pairs])
    for leaf, value in zip(leaves, start, strict=True):
        leaf.detach().copy_(value)
    with torch.device("cuda"):
        theta, phi = gradients(ladder, x=X.cuda())
    for seen, gradient in zip(zip(*draws, strict=True), [*theta, *phi], strict=True):
        assert_mean(torch.stack(seen) / copies, gradient)


@on_cuda
def test_a_captured_step_waits_for_nothing(unchecked, no_waiting):
    _, symeq, _ = cuda_trained()
    batches = [cuda_rows(i) for i in range(5)]
    with no_waiting():
        losses = [symeq.step(x) for x in batches]
    assert all(isinstance(loss, SymmetricLoss) for loss in losses)
    assert all(map(math.isfinite, losses))
    assert len(set(map(float, losses))) == len(losses)  # none is overwritten by later steps


@on_cuda
def test_draws_differ_from_replay_to_replay(unchecked):
    _, symeq, _ = cuda_trained(optimizer=optim.SGD({"lr": 0.0}))
    x = cuda_rows(0)
    assert len({float(symeq.step(x)) for _ in range(10)}) > 5


@on_cuda
def test_a_seed_fixes_the_draws_of_a_graph(unchecked):
    _, symeq, _ = cuda_trained(optimizer=optim.SGD({"lr": 0.0}))
    x, runs = cuda_rows(0), []
    for _ in range(2):
        pyro.set_rng_seed(5)
        runs.append([float(symeq.step(x)) for _ in range(4)])
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


@on_cuda
@pytest.mark.parametrize("how", ["settings", "foreach", "Adagrad", "weight decay"])
def test_settings_that_change_reach_the_graph(how, unchecked):
    makes = {
        "settings": lambda: Adam({"lr": 0.05}),
        "foreach": lambda: optim.SGD({"lr": 0.05, "foreach": True}),
        "Adagrad": lambda: optim.Adagrad({"lr": 0.05}),
        "weight decay": lambda: Adam({"lr": 0.05}),
    }
    results = []
    for capture in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some are not captured
            pair, symeq, _ = cuda_trained(capture, optimizer=makes[how]())
            for _, group in settings(symeq):
                group.update({"weight_decay": 0.5} if how == "weight decay" else {"lr": 0.0})
            before = clone(parameters_of(pair))
            for i in range(3):
                symeq.step(cuda_rows(i))
        assert identical(parameters_of(pair), before) == (how != "weight decay")
        results.append(clone(parameters_of(pair)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@on_cuda
def test_a_graph_goes_on_from_a_loaded_state(unchecked):
    pair, symeq, _ = cuda_trained()
    state = symeq.state_dict()
    runs = []
    for _ in range(2):
        symeq.load_state_dict(state)
        runs.append([float(symeq.step(cuda_rows(i))) for i in range(4)])
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


@on_cuda
@pytest.mark.parametrize("make", [Adam, optim.AdamW, optim.SGD])
def test_a_batch_with_nan_moves_nothing_and_is_told_when_the_loss_is_read(make, unchecked):
    pair, symeq, _ = cuda_trained(optimizer=make({"lr": 0.05}))
    before = clone(parameters_of(pair))
    state = symeq.state_dict()["players"]
    loss = symeq.step(cuda_rows(0) * torch.tensor([[1.0], [torch.nan], [1], [1], [1]]).cuda())
    with pytest.raises(ValueError, match="finite utilities"):
        float(loss)
    assert identical(parameters_of(pair)[:2], before[:2])  # the decoder saw the NaN, or both did
    assert all(torch.isfinite(leaf).all() for leaf in parameters_of(pair))
    assert same(
        symeq.state_dict()["players"]["decoder"]["parameters"], state["decoder"]["parameters"]
    )
    assert math.isfinite(symeq.step(cuda_rows(1)))


@on_cuda
def test_with_validation_on_a_batch_with_nan_is_refused_at_once():
    torch.set_default_dtype(torch.float32)
    pair, symeq, _ = cuda_trained()
    before = clone(parameters_of(pair))
    with pytest.raises(ValueError, match="finite"):
        symeq.step(cuda_rows(0) * torch.nan)
    assert identical(parameters_of(pair), before)
    assert math.isfinite(symeq.step(cuda_rows(1)))


@on_cuda
def test_another_number_of_rows_is_captured_anew(unchecked, no_waiting):
    _, symeq, _ = cuda_trained()
    for _ in range(NUM_FIRST + 1):
        symeq.step(cuda_rows(0)[:3])
    x, y = cuda_rows(0)[:3], cuda_rows(1)
    with no_waiting():
        losses = symeq.step(x), symeq.step(y), symeq.step(x)
    assert all(map(math.isfinite, losses))


@on_cuda
@pytest.mark.parametrize("make", [optim.RMSprop, optim.ClippedAdam, optim.Adagrad])
def test_other_optimisers_step_outside_of_graphs(make, unchecked):
    """Each player's lesson is still captured, and later draws are as ever."""
    results = []
    for capture in (False, True):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            pair, _, losses = cuda_trained(capture, 8, optimizer=make({"lr": 0.01}))
        assert [str(w.message)[:28] for w in seen] == ["Not captured: the whole step"] * capture
        results.append(([float(loss) for loss in losses], clone(parameters_of(pair))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


class WithCovariance(OnDevice):
    """torch.linalg.cholesky looks for errors, for which the host waits."""

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((2,), 0.5)).to_event(1))
            covariance = torch.eye(3, device=x.device)
            pyro.sample("x", dist.MultivariateNormal(self.decoder(z), covariance), obs=x)


class WithScaleOnCPU(OnDevice):
    """A scalar parameter that lies on the CPU, as Pyro and torch allow."""

    def observed(self, h):
        return dist.Normal(h * pyro.param("scale", torch.tensor(1.0)).exp(), 1.0)


@on_cuda
@pytest.mark.parametrize("make", [WithCovariance, WithScaleOnCPU])
def test_what_a_graph_refuses_runs_as_ever(make, unchecked):
    """A capture that fails on the way leaves the device and its random numbers as they were."""
    results = []
    for capture in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pair, _, losses = cuda_trained(capture, 8, make=make)
        results.append(([float(loss) for loss in losses], clone(parameters_of(pair))))
        torch.rand(3, device="cuda")
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@on_cuda
def test_arguments_on_the_cpu_are_not_captured(unchecked):
    make = changed(lambda s, h, a: h + a.to(h), OnDevice)
    pair, symeq = trained_pair(make, num_steps=0)
    with pytest.warns(UserWarning, match="lies on cpu"):
        for i in range(NUM_FIRST + 2):
            symeq.step(cuda_rows(i), torch.tensor(float(i)))
    before = clone(parameters_of(pair))
    results = []
    for shift in (0.0, 100.0):  # the argument counts, as ever
        with torch.no_grad():
            for leaf, value in zip(parameters_of(pair), before, strict=True):
                leaf.copy_(value)
        pyro.set_rng_seed(2)
        results.append(float(symeq.step(cuda_rows(0), torch.tensor(shift))))
    assert results[1] > results[0] + 1000


@on_cuda
def test_a_scalar_on_the_cpu_that_changes_reaches_the_graph(unchecked):
    make = changed(lambda s, h: h * s.beta, OnDevice)
    losses = []
    for last in (1.0, 100.0):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        pair = make()
        pair.beta = torch.tensor(1.0)
        adam = Adam({"lr": 0.01})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            symeq = SymmetricEquilibrium(pair.model, pair.guide, adam, capture=True)
            for i in range(6):
                symeq.step(cuda_rows(i))
            pair.beta.fill_(last)
            losses.append(float(symeq.step(cuda_rows(0))))
    assert losses[1] > losses[0] + 100


@on_cuda
def test_modules_that_switch_leave_the_graph(unchecked):
    make = lambda: OnDevice(normalised)  # noqa: E731
    pair, symeq, _ = cuda_trained(make=make)
    mean = pair.decoder[1].running_mean.clone()
    symeq.step(cuda_rows(0))
    assert not torch.equal(pair.decoder[1].running_mean, mean)  # buffers advance in graphs
    pair.decoder.eval()
    pair.encoder.eval()
    mean = pair.decoder[1].running_mean.clone()
    for i in range(NUM_FIRST + 2):
        symeq.step(cuda_rows(i))
    assert torch.equal(pair.decoder[1].running_mean, mean)


def test_what_changes_between_steps_is_seen_whatever_the_number_of_moves():
    """Both recordings are of different steps, though a player moves several times in each."""

    def drive(symeq, pair):
        for i in range(6):
            pair.beta = 0.1 * i
            yield symeq.step(rows(i))

    make = changed(lambda s, h: h * (1 + s.beta))
    options = {"decoder_steps": 3, "encoder_steps": 3}
    eager, captured = (history(make, drive, capture, **options) for capture in (False, True))
    assert_alike(captured, eager)
    assert len(captured.reasons) == 1
    assert "changes from step to step" in captured.reasons[0]
