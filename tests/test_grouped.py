"""Grouped steps against those that Pyro's PyroOptim takes, one optimiser after another."""

import io
import itertools

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.optim import SGD, Adam, PyroOptim
from torch import nn

from pyro_symeq import Game, Player
from pyro_symeq.grouped import Grouped
from tests.comparison import same
from tests.test_game import Chase

SHAPES = {"net$$$weight": (3, 4), "net$$$bias": (5,), "scale": (), "none": (0, 2)}
STEPS = 6


class Training:
    """Some parameters in Pyro's store, moved by an optimiser, in groups or one by one."""

    def __init__(self, make, is_grouped, device="cpu", shapes=SHAPES, dtypes=None):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        self.leaves = {}
        for name, shape in shapes.items():
            dtype = (dtypes or {}).get(name, torch.float64)
            value = torch.randn(shape, dtype=torch.float64).to(device, dtype)
            self.leaves[name] = pyro.param(name, value).unconstrained()
        self.optim = make()
        self.is_grouped = is_grouped
        self.grouped = Grouped(self.optim)

    def own(self, name):
        kept = self.optim.optim_objs[self.leaves[name]]
        return getattr(kept, "optimizer", kept)

    def settings(self, name):
        return self.own(name).param_groups[0]

    def all_settings(self):
        return [self.settings(name) for name in self.leaves]

    def step(self, gradients):
        """Moves the parameters that have an entry, along it."""
        leaves = [self.leaves[name] for name in gradients]
        for leaf, gradient in zip(leaves, gradients.values(), strict=True):
            leaf.grad = None
            if gradient is not None:  # a copy, as clips may write to it
                leaf.grad = gradient.to(leaf.device, leaf.dtype, copy=True)
        (self.grouped if self.is_grouped else self.optim)(leaves)
        for leaf in leaves:
            leaf.grad = None

    def run(self, gradients, event=None):
        for t, by_name in enumerate(gradients):
            self.step(by_name)
            if event is not None:
                event(self, t)
        return self

    @property
    def values(self):
        return {name: leaf.detach().double() for name, leaf in self.leaves.items()}

    @property
    def memories(self):
        """The state and the settings of all optimisers, by parameter name."""
        memories = {}
        for name, leaf in self.leaves.items():
            if leaf in self.optim.optim_objs:
                own = self.own(name)
                memories[name] = {
                    key: torch.as_tensor(x).double()
                    for key, x in own.state.get(leaf, {}).items()
                    if x is not None
                }
                memories[name]["lr"] = torch.as_tensor(own.param_groups[0]["lr"]).double()
        return memories


def drawn(shapes=SHAPES, steps=STEPS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(steps)
    ]


def assert_alike(make, gradients=None, event=None, tolerance=1e-12, **options):
    """Grouped steps end where PyroOptim's own do, up to rounding."""
    gradients = gradients or drawn(options.get("shapes", SHAPES))
    expected, seen = (
        Training(make, is_grouped, **options).run(gradients, event) for is_grouped in (False, True)
    )
    torch.testing.assert_close(seen.values, expected.values, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        seen.memories, expected.memories, rtol=tolerance, atol=tolerance, check_device=False
    )
    return seen


# Every optimiser.

OPTIMS = {
    "SGD": ("SGD", {}),
    "SGD, momentum": ("SGD", {"momentum": 0.9}),
    "SGD, damped": ("SGD", {"momentum": 0.9, "dampening": 0.3}),
    "SGD, Nesterov": ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "SGD, maximising": ("SGD", {"momentum": 0.9, "maximize": True, "weight_decay": 0.1}),
    "Adam": ("Adam", {}),
    "Adam, AMSGrad": ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    "Adam, maximising": ("Adam", {"maximize": True, "betas": (0.5, 0.9), "eps": 0.1}),
    "AdamW": ("AdamW", {}),
    "AdamW, AMSGrad": ("AdamW", {"amsgrad": True, "weight_decay": 0.3}),
    "RMSprop": ("RMSprop", {}),
    "RMSprop, centred": ("RMSprop", {"centered": True, "momentum": 0.9, "weight_decay": 0.1}),
    "Adagrad": ("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.2}),
    "Adadelta": ("Adadelta", {"weight_decay": 0.1}),
    "Adamax": ("Adamax", {"weight_decay": 0.1}),
    "ASGD": ("ASGD", {"t0": 2, "lambd": 0.1, "alpha": 0.5}),
    "NAdam": ("NAdam", {"momentum_decay": 0.1}),
    "NAdam, decoupled": ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "RAdam": ("RAdam", {"betas": (0.5, 0.6), "weight_decay": 0.1}),
    "Rprop": ("Rprop", {"step_sizes": (1e-3, 0.2)}),
    "ClippedAdam": ("ClippedAdam", {"clip_norm": 0.5, "lrd": 0.9}),
    "AdagradRMSProp": ("AdagradRMSProp", {"eta": 0.1}),
    "DCTAdam": ("DCTAdam", {}),
    "Adafactor": ("Adafactor", {}),
}


def makes(name, **more):
    kind, options = OPTIMS[name]
    options = options | more if "eta" in options else {"lr": 0.1} | options | more
    return lambda: getattr(pyro.optim, kind)(dict(options))


def shapes_for(name):
    """Some optimisers can't do with numbers, or with nothing."""
    few = {"DCTAdam": ["net$$$weight", "net$$$bias"], "Adafactor": ["net$$$weight", "net$$$bias"]}
    return {n: SHAPES[n] for n in few.get(name, SHAPES)}


@pytest.mark.parametrize("name", [n for n in OPTIMS if n != "AdagradRMSProp"])
def test_grouped_steps_are_those_of_each_optimiser(name, device):
    assert_alike(makes(name), shapes=shapes_for(name), device=device)


def test_an_optimiser_without_a_learning_rate_steps_as_ever():
    expected, seen = (
        Training(makes("AdagradRMSProp"), is_grouped).run(drawn()) for is_grouped in (False, True)
    )
    assert same(seen.values, expected.values)


def test_the_table_has_every_optimiser_of_pyro():
    names = {*pyro.optim.pytorch_optims, "ClippedAdam", "AdagradRMSProp", "DCTAdam"}
    optimisers = {n for n in names if issubclass(getattr(torch.optim, n, int), object)}
    schedulers = {n for n in names if hasattr(torch.optim.lr_scheduler, n)}
    special = {"SparseAdam", "Muon"}  # for sparse gradients, and for matrices
    assert {kind for kind, _ in OPTIMS.values()} == optimisers - schedulers - special


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["SGD, Nesterov", "Adam, AMSGrad", "AdamW", "NAdam", "RMSprop"])
def test_grouped_steps_agree_in_any_precision(name, dtype):
    """A fused kernel rounds once where Python rounds after each operation: 4 ulps for 6 steps."""
    tolerance = 4 * STEPS * torch.finfo(dtype).eps
    dtypes = dict.fromkeys(SHAPES, dtype)
    assert_alike(makes(name, eps=1e-3) if "SGD" not in name else makes(name), tolerance=tolerance,
                 dtypes=dtypes)  # fmt: skip


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["SGD, momentum", "Adam", "AdamW", "RMSprop", "NAdam"])
def test_parameters_of_several_dtypes_step_together(name, default):
    torch.set_default_dtype(default)
    dtypes = {"net$$$weight": torch.float32, "net$$$bias": torch.float64}
    assert_alike(makes(name), dtypes=dtypes, tolerance=2e-6)


def test_complex_parameters_step_too():
    def run(is_grouped):
        torch.manual_seed(0)
        leaves = [torch.randn(3, dtype=torch.complex128), torch.randn(4)]
        gradients = [[torch.randn_like(leaf) for leaf in leaves] for _ in range(STEPS)]
        optim = Adam({"lr": 0.1})
        step = Grouped(optim) if is_grouped else optim
        leaves = [leaf.requires_grad_() for leaf in leaves]
        for now in gradients:
            for leaf, gradient in zip(leaves, now, strict=True):
                leaf.grad = gradient
            step(leaves)
        return [leaf.detach() for leaf in leaves]

    torch.testing.assert_close(run(True), run(False), rtol=1e-12, atol=1e-12)


# Where parameters and gradients lie in memory.

MATRIX = {"w": (3, 4)}
LAYOUTS = {
    "expanded": lambda g: g.mean().expand(3, 4),
    "expanded rows": lambda g: g[:1].expand(3, 4),
    "transposed": lambda g: g.t().contiguous().t(),
    "strided": lambda g: torch.stack([g, -g], dim=-1)[..., 0],
    "offset": lambda g: torch.cat([-g, g])[3:],
}
MERGED = ["SGD", "SGD, momentum", "SGD, Nesterov", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam"]


def assert_alike_in_layout(name, lay_leaf, lay_gradient, between=None):
    def run(is_grouped):
        torch.manual_seed(0)
        leaf = lay_leaf(torch.randn(3, 4)).requires_grad_()
        optim = makes(name)()
        step = Grouped(optim) if is_grouped else optim
        for t in range(STEPS):
            leaf.grad = lay_gradient(torch.randn(3, 4))
            step([leaf])
            if between is not None and t == 2:
                between(leaf)
        return leaf.detach()

    torch.testing.assert_close(run(True), run(False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MERGED)
def test_gradients_may_lie_in_memory_as_they_like(name, layout):
    assert_alike_in_layout(name, lambda x: x, LAYOUTS[layout])


@pytest.mark.parametrize("layout", ["transposed", "strided"])
@pytest.mark.parametrize("gradient", ["as the parameter", "contiguous"])
@pytest.mark.parametrize("name", MERGED)
def test_parameters_may_lie_in_memory_as_they_like(name, gradient, layout):
    lay = LAYOUTS[layout]
    assert_alike_in_layout(name, lay, lay if "parameter" in gradient else lambda g: g)


@pytest.mark.parametrize("name", MERGED)
def test_a_parameter_may_be_laid_out_anew_between_steps(name):
    """As ``network.to(memory_format=torch.channels_last)`` does; the optimiser's state stays."""

    def turn(leaf):
        leaf.data = LAYOUTS["transposed"](leaf.detach())

    as_leaf = LAYOUTS["transposed"]
    assert_alike_in_layout(name, lambda x: x, lambda g: g, turn)
    assert_alike_in_layout(name, lambda x: x, as_leaf, turn)


SUMS = {
    "of all": lambda w: w.sum(),
    "by rows": lambda w: w.sum(1).dot(torch.arange(3.0)),
    "of the transposed": lambda w: (w.t() * torch.arange(12.0).reshape(4, 3)).sum(),
    "einsum": lambda w: torch.einsum("ij,kj->ki", w, torch.arange(8.0).reshape(2, 4))[1].sum(),
}


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop", "ClippedAdam"])
@pytest.mark.parametrize("how", SUMS)
def test_a_game_moves_along_gradients_of_any_layout(how, name, device):
    """log N(1 | s(w), 1) has the gradient (1 - s) ds/dw."""
    w = (0.1 * torch.randn(3, 4)).to(device).requires_grad_()
    twin = w.detach().cpu().clone().requires_grad_()

    def program(target):
        loc = SUMS[how](pyro.param("w", w).cpu())
        pyro.sample("x", dist.Normal(loc, 1.0), obs=target)

    def utility(play, target):
        return play.log_prob("a", target)

    kind, options = OPTIMS[name]
    game = Game([Player("a", program, makes(name)(), utility)])
    by_hand = getattr(torch.optim, kind, pyro.optim.clipped_adam.ClippedAdam)
    by_hand = by_hand([twin], lr=0.1, **options)
    for _ in range(STEPS):
        game.step(torch.tensor(1.0))
        by_hand.zero_grad()
        (0.5 * (1 - SUMS[how](twin)) ** 2).backward()
        by_hand.step()
    torch.testing.assert_close(w.detach().cpu(), twin.detach(), rtol=1e-9, atol=1e-9)


# Gradients that are None, sparse, or shared; parameters that come and go.

GAPS = {
    "first": lambda t, i: t == 0 and i == 0,
    "first two": lambda t, i: t < 2 and i == 1,
    "in turn": lambda t, i: (t + i) % 3 == 0,
    "all at once": lambda t, i: t == 2,
    "always": lambda t, i: i == 1,
}


@pytest.mark.parametrize("gaps", GAPS)
@pytest.mark.parametrize("name", [n for n in OPTIMS if n not in ("AdagradRMSProp", "DCTAdam")])
def test_parameters_without_a_gradient_stay(name, gaps):
    shapes = shapes_for(name)
    gradients = [
        {n: None if GAPS[gaps](t, i) else g for i, (n, g) in enumerate(now.items())}
        for t, now in enumerate(drawn(shapes))
    ]
    assert_alike(makes(name), gradients, shapes=shapes)


TURNS = {
    "later": lambda t, i: t >= i,
    "alternating": lambda t, i: (t + i) % 2 == 0,
    "never all": lambda t, i: t != i,
    "one by one": lambda t, i: t % 4 == i,
}


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("name", ["SGD, Nesterov", "Adam", "AdamW, AMSGrad", "NAdam", "RMSprop"])
def test_parameters_may_come_later_and_take_turns(name, turns):
    gradients = [
        {n: g for i, (n, g) in enumerate(now.items()) if TURNS[turns](t, i)}
        for t, now in enumerate(drawn(steps=8))
    ]
    assert_alike(makes(name), gradients)


def test_the_order_of_parameters_may_change():
    gradients = [dict(reversed(x.items())) if t % 2 else x for t, x in enumerate(drawn())]
    assert_alike(makes("Adam"), gradients)


def test_more_sets_of_parameters_than_are_kept():
    names = list(SHAPES)
    sets = [s for k in (1, 2, 3) for s in itertools.combinations(names, k)]
    gradients = [
        {n: now[n] for n in chosen}
        for now, chosen in zip(drawn(steps=3 * len(sets)), 3 * sets, strict=True)
    ]
    assert_alike(makes("Adam"), gradients)


def test_networks_may_be_exchanged():
    """New parameters get optimisers of their own, also where ids are used again."""
    optim = Adam({"lr": 0.1})
    grouped = Grouped(optim)
    for _ in range(20):
        leaf = torch.zeros(2, requires_grad=True)
        for _ in range(2):
            leaf.grad = torch.ones(2)
            grouped([leaf])
        assert leaf.tolist() == pytest.approx([-0.2, -0.2], rel=1e-6)
        del leaf


def sparse(row):
    with torch.sparse.check_sparse_tensor_invariants():
        return torch.sparse_coo_tensor([[row]], torch.full((1, 4), 1.0 + row), (3, 4))


SPARSE = {
    "always": [sparse(0), sparse(2), sparse(1), sparse(2)],
    "not at first": [torch.ones(3, 4), torch.ones(3, 4), sparse(2), sparse(1)],
    "after none": [sparse(0), None, sparse(2), sparse(1)],
    "at times": [sparse(0), torch.ones(3, 4), torch.ones(3, 4), sparse(1)],
}


@pytest.mark.parametrize("when", SPARSE)
@pytest.mark.parametrize("name", ["SGD", "SGD, momentum", "Adagrad"])
def test_gradients_may_be_sparse(name, when):
    if (name, when) == ("SGD, momentum", "at times"):
        pytest.skip("PyTorch can't add dense gradients to a sparse average")
    gradients = [{"embedding": x, "bias": torch.ones(2) * t} for t, x in enumerate(SPARSE[when])]
    options = {"initial_accumulator_value": 0.2}
    make = makes(name) if name != "Adagrad" else lambda: pyro.optim.Adagrad({"lr": 0.1, **options})
    assert_alike(make, gradients, shapes={"embedding": (3, 4), "bias": (2,)})


def test_sparse_adam_steps_as_ever():
    gradients = [{"embedding": sparse(t % 3)} for t in range(5)]
    assert_alike(
        lambda: pyro.optim.SparseAdam({"lr": 0.1}), gradients, shapes={"embedding": (3, 4)}
    )


@pytest.mark.parametrize("optim", [SGD, pyro.optim.SparseAdam])
@pytest.mark.parametrize("rest_between", [False, True])
def test_a_sparse_embedding_learns_in_a_game(optim, rest_between):
    embedding = nn.Embedding(4, 2, sparse=True)
    before = embedding.weight.detach().clone()

    def program(rows, target):
        pyro.module("embedding", embedding)
        loc = embedding(rows) if rows is not None else torch.zeros(2, 2)
        with pyro.plate("rows", 2):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=target)

    game = Game(
        [Player("a", program, optim({"lr": 0.1}), lambda play, *x: play.log_prob("a", *x))]
    )
    rows, target = torch.tensor([0, 2]), torch.ones(2, 2)
    for t in range(4):
        game.step(None if rest_between and t == 1 else rows, target)
    after = embedding.weight.detach()
    assert torch.equal(after[[1, 3]], before[[1, 3]])
    assert ((after - 1).abs() < (before - 1).abs())[[0, 2]].all()


# Settings.


def one(name="net$$$bias", **settings):
    return lambda training: training.settings(name).update(settings)


def every(**settings):
    return lambda training: [s.update(settings) for s in training.all_settings()]


CHANGES = {
    "lr of all": every(lr=0.02),
    "lr of one": one(lr=0.02),
    "lr of all, one by one": lambda x: [
        s.update(lr=0.1 / (i + 2)) for i, s in enumerate(x.all_settings())
    ],
    "lr of all, tensor": every(lr=torch.tensor(0.02, dtype=torch.float64)),
    "lr 0": every(lr=0.0),
    "weight decay of all": every(weight_decay=0.3),
    "weight decay of one": one(weight_decay=0.3),
    "maximise of one": one(maximize=True),
    "lr and weight decay": every(lr=0.02, weight_decay=0.3),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["SGD, momentum", "Adam", "AdamW", "RMSprop", "NAdam"])
def test_settings_may_change_between_steps(name, change):
    assert_alike(
        makes(name), event=lambda training, t: CHANGES[change](training) if t == 2 else None
    )


@pytest.mark.parametrize("change", [every, one])
def test_betas_may_change_between_steps(change):
    change = change(betas=(0.1, 0.5))
    assert_alike(makes("Adam"), event=lambda training, t: change(training) if t == 2 else None)


@pytest.mark.parametrize("change", [every, one])
def test_momentum_may_be_turned_on_between_steps(change):
    change = change(momentum=0.9)
    assert_alike(makes("SGD"), event=lambda training, t: change(training) if t == 2 else None)


def test_learning_rates_may_change_at_every_step_and_be_equal_again():
    rates = [0.1, 0.2, 0.2, 0.05, 0.1, 0.3]

    def event(training, t):
        for i, settings in enumerate(training.all_settings()):
            settings["lr"] = rates[t] if t % 2 else rates[t] / (i + 1)

    assert_alike(makes("Adam"), event=event)


@pytest.mark.parametrize("name", ["SGD, momentum", "Adam", "RMSprop"])
def test_a_learning_rate_in_a_tensor_may_change_in_place(name):
    rates = {}

    def make():
        rates["now"] = torch.tensor(0.1)
        return makes(name, lr=rates["now"])()

    def event(training, t):
        training.settings("scale")["lr"].fill_(0.1 / (t + 2))

    assert_alike(make, event=event)


@pytest.mark.parametrize("which", ["net$$$weight", "net$$$bias"])
@pytest.mark.parametrize("name", ["SGD, momentum", "Adam", "RMSprop"])
def test_learning_rates_in_tensors_of_their_own_may_change_in_place(name, which):
    kind, options = OPTIMS[name]

    def event(training, t):
        if t == 2:
            training.settings(which)["lr"].fill_(0.02)

    assert_alike(
        lambda: getattr(pyro.optim, kind)(lambda _: {"lr": torch.tensor(0.1), **options}),
        event=event,
    )


def test_a_learning_rate_in_a_new_tensor_may_change_in_place():
    def event(training, t):
        if t == 2:
            every(lr=torch.tensor(0.2))(training)
        if t == 3:
            training.settings("scale")["lr"].fill_(0.01)

    assert_alike(lambda: Adam({"lr": torch.tensor(0.1)}), event=event)


def test_the_users_learning_rate_tensor_is_only_read():
    rate = torch.tensor(0.1)
    training = Training(lambda: Adam({"lr": rate}), is_grouped=True)
    training.run(drawn(), lambda training, t: every(lr=0.02)(training) if t == 2 else None)
    assert rate == 0.1


BY_PARAMETER = {
    "net.weight": {"lr": 0.01},
    "net.bias": {"lr": 0.2, "weight_decay": 0.1},
    "scale": {"lr": 0.01},
    "none": {"lr": 1.0},
}


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD", "RMSprop", "NAdam"])
def test_parameters_may_have_settings_of_their_own(kind):
    seen = assert_alike(lambda: getattr(pyro.optim, kind)(lambda name: BY_PARAMETER[name]))
    lrs = {name: seen.settings(name)["lr"] for name in SHAPES}
    assert [*lrs.values()] == [0.01, 0.2, 0.01, 1.0]


def test_parameters_may_have_settings_by_module():
    def options(module, name):
        return {"lr": 0.01 if module == "net" and name == "bias" else 0.1}

    assert_alike(lambda: Adam(options))


CLIPS = {
    "norm": {"clip_norm": 0.1},
    "value": {"clip_value": 0.05},
    "both": {"clip_norm": 2.0, "clip_value": 0.5},
    "norm, by parameter": lambda module, name: {"clip_norm": 0.1} if name == "bias" else {},
    "value, by parameter": lambda module, name: {"clip_value": 0.1} if module == "net" else {},
}


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("kind", ["SGD", "Adam", "NAdam", "ClippedAdam"])
def test_gradients_are_clipped(kind, clip):
    optimiser = {"ClippedAdam": pyro.optim.clipped_adam.ClippedAdam}
    torch_kind = optimiser.get(kind) or getattr(torch.optim, kind)
    gradients = drawn()
    shapes = {name: shape for name, shape in SHAPES.items() if name != "none"}
    gradients = [{name: 3 * x[name] for name in shapes} for x in gradients]
    assert_alike(lambda: PyroOptim(torch_kind, {"lr": 0.1}, CLIPS[clip]), gradients, shapes=shapes)


@pytest.mark.parametrize("clip", [{"clip_norm": 0.1}, {"clip_value": 0.05}])
@pytest.mark.parametrize("how", SUMS)
def test_gradients_of_a_game_are_clipped_whatever_their_layout(how, clip):
    w = (0.1 * torch.randn(3, 4)).requires_grad_()
    twin = w.detach().clone().requires_grad_()

    def program(target):
        pyro.sample("x", dist.Normal(SUMS[how](pyro.param("w", w)), 1.0), obs=target)

    optim = PyroOptim(torch.optim.SGD, {"lr": 0.1}, clip)
    game = Game([Player("a", program, optim, lambda play, *x: play.log_prob("a", *x))])
    by_hand = PyroOptim(torch.optim.SGD, {"lr": 0.1}, clip)
    for _ in range(3):
        game.step(torch.tensor(1.0))
        twin.grad = None
        (0.5 * (1 - SUMS[how](twin)) ** 2).backward()
        by_hand([twin])
    torch.testing.assert_close(w.detach(), twin.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clipped", ["a", "b"])
def test_clipping_one_parameter_leaves_the_gradient_of_another(clipped):
    """The gradients in a + b are one tensor."""
    leaves = {"a": torch.zeros(3, requires_grad=True), "b": torch.zeros(3, requires_grad=True)}

    def program(target):
        loc = pyro.param("net$$$a", leaves["a"]) + pyro.param("net$$$b", leaves["b"])
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=target)

    def clip(module, name):
        return {"clip_value": 0.1} if name == clipped else {}

    optim = PyroOptim(torch.optim.SGD, {"lr": 1.0}, clip)
    game = Game([Player("p", program, optim, lambda play, *x: play.log_prob("p", *x))])
    game.step(torch.ones(3))
    other = "ab".replace(clipped, "")
    assert leaves[clipped].tolist() == pytest.approx([0.1] * 3)
    assert leaves[other].tolist() == pytest.approx([1.0] * 3)
    # now the residual is -0.1 in each element, the bound itself; with 2 as target it is 0.9
    game.step(torch.full((3,), 2.0))
    assert leaves[clipped].tolist() == pytest.approx([0.2] * 3)
    assert leaves[other].tolist() == pytest.approx([1.9] * 3)


# Ways of stepping that users ask for.

WAYS = [
    {"foreach": True},
    {"foreach": False},
    {"fused": True},
    {"fused": False},
    {"capturable": False},
    {"differentiable": False},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", ["Adam, AMSGrad", "AdamW", "SGD, Nesterov", "Adagrad", "NAdam"])
def test_the_users_way_of_stepping_goes_as_ever(name, way):
    kind = getattr(torch.optim, OPTIMS[name][0])
    if not way.keys() <= kind([torch.zeros(1)], lr=0.1).defaults.keys():
        pytest.skip("no such way")
    options = {"lr_decay": 0.1} if name == "Adagrad" else OPTIMS[name][1]
    assert_alike(lambda: getattr(pyro.optim, OPTIMS[name][0])({"lr": 0.1, **options, **way}))


@pytest.mark.parametrize("way", [{"foreach": True}, {"foreach": False}, {"fused": False}], ids=str)
@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD"])
def test_what_the_user_has_not_fused_is_not_fused(kind, way, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("fused")

    for name in ("_fused_adam_", "_fused_adamw_", "_fused_sgd_"):
        monkeypatch.setattr(torch, name, refuse)
    make = getattr(pyro.optim, kind)
    Training(lambda: make({"lr": 0.1, **way}), is_grouped=True).run(drawn())


def test_ways_of_stepping_may_differ_by_parameter():
    ways = {"net.weight": {"foreach": True}, "net.bias": {"fused": True}, "scale": {}, "none": {}}
    assert_alike(lambda: Adam(lambda name: {"lr": 0.1, **ways[name]}))


@pytest.mark.parametrize("first", ["net.weight", "net.bias"])
def test_only_fused_optimisers_are_told_of_what_is_not_finite(first):
    """On a device, ``found_inf`` lets fused optimisers stay; others can't take it."""
    ways = {"net.weight": {}, "net.bias": {}, "scale": {}, "none": {}} | {first: {"foreach": True}}
    training = Training(lambda: Adam(lambda name: {"lr": 0.1, **ways[name]}), is_grouped=True)
    names = [n for n in SHAPES if n != "none"]
    leaves = [training.leaves[name] for name in names]
    for t in range(4):
        before = {name: training.values[name].clone() for name in names}
        for leaf in leaves:
            leaf.grad = torch.ones_like(leaf)
        training.grouped(leaves, torch.tensor(float(t == 3), dtype=torch.float32))
    stayed = {n for n in names if torch.equal(training.values[n], before[n])}
    assert stayed == {n for n in names if n.replace("$$$", ".") != first}


@pytest.mark.parametrize("name", ["Adam", "SGD", "RMSprop"])
@pytest.mark.parametrize("way", [{"differentiable": True}, {"capturable": True}], ids=str)
def test_what_fails_in_pyro_fails_in_groups(name, way):
    if name == "SGD" and "capturable" in way:
        pytest.skip("no such way")
    errors = []
    for is_grouped in (False, True):
        training = Training(makes(name, **way), is_grouped)
        try:
            training.run(drawn())
        except Exception as error:
            errors.append((type(error), str(error)))
    assert len(errors) in (0, 2)
    assert len({*errors}) <= 1


# Schedulers.

SCHEDULERS = {
    "ExponentialLR": {"gamma": 0.5},
    "StepLR": {"step_size": 2, "gamma": 0.1},
    "MultiStepLR": {"milestones": [1, 3], "gamma": 0.3},
    "LambdaLR": {"lr_lambda": lambda t: 1 / (t + 1)},
    "LinearLR": {"total_iters": 9},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "OneCycleLR": {"max_lr": 0.3, "total_steps": 10},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.3, "step_size_up": 2},
    "ReduceLROnPlateau": {"patience": 0, "factor": 0.3},
}


@pytest.mark.parametrize("inner", ["Adam", "AdamW", "SGD, Nesterov", "RMSprop, centred"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_go_on(scheduler, inner):
    kind, options = OPTIMS[inner]

    def make():
        return getattr(pyro.optim, scheduler)(
            {
                "optimizer": getattr(torch.optim, kind),
                "optim_args": {"lr": 0.1, **options},
                **SCHEDULERS[scheduler],
            }
        )

    def event(training, t):
        training.optim.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))

    seen = assert_alike(make, event=event)
    assert seen.settings("scale")["lr"] != 0.1 or scheduler == "CosineAnnealingWarmRestarts"


def test_schedulers_go_on_for_settings_by_parameter():
    def make():
        return pyro.optim.ExponentialLR(
            {
                "optimizer": torch.optim.Adam,
                "optim_args": lambda name: BY_PARAMETER[name],
                "gamma": 0.5,
            },
            {"clip_norm": 0.3},
        )

    gradients = [{n: g for n, g in x.items() if n != "none"} for x in drawn()]
    seen = assert_alike(
        make,
        gradients,
        event=lambda training, t: training.optim.step(),
        shapes={n: s for n, s in SHAPES.items() if n != "none"},
    )
    assert seen.settings("net$$$bias")["lr"] == pytest.approx(0.2 / 2**STEPS)


def test_parameters_that_come_later_have_schedules_of_their_own():
    gradients = [
        {n: g for i, (n, g) in enumerate(x.items()) if t >= i} for t, x in enumerate(drawn())
    ]

    def make():
        return pyro.optim.ExponentialLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5}
        )

    seen = assert_alike(make, gradients, event=lambda training, t: training.optim.step())
    lrs = [seen.settings(name)["lr"] for name in SHAPES]
    assert lrs == pytest.approx([0.1 / 2 ** (STEPS - i) for i in range(len(SHAPES))])


# Optimisers that are more than they seem.


@pytest.mark.parametrize("when", [0, 1, 3])
@pytest.mark.parametrize("kind", ["pre", "post"])
def test_hooks_of_an_inner_optimiser_are_called(kind, when):
    calls = []

    def event(training, t):
        if t == when:
            own = training.own("net$$$bias")
            register = getattr(own, f"register_step_{kind}_hook")
            register(lambda *_: calls.append(training.is_grouped))

    assert_alike(makes("Adam"), event=event)
    assert calls.count(True) == calls.count(False) == STEPS - when - 1


def test_hooks_may_be_removed():
    handles, calls = {}, []

    def event(training, t):
        own = training.own("net$$$bias")
        if t == 1:
            hook = own.register_step_pre_hook(lambda *_: calls.append(training.is_grouped))
            handles[training.is_grouped] = hook
        if t == 3:
            handles[training.is_grouped].remove()

    assert_alike(makes("Adam"), event=event)
    assert calls.count(True) == calls.count(False) == 2


class Backwards(torch.optim.Adam):
    """Climbs where Adam descends."""

    def step(self, closure=None):
        for group in self.param_groups:
            for leaf in group["params"]:
                leaf.grad = -leaf.grad
        return super().step(closure)


class EveryOther:
    """Wraps an optimiser, and lets it step every other time."""

    def __init__(self, leaves, **options):
        self.optimizer = torch.optim.Adam(leaves, **options)
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state
        self.calls = 0

    def step(self):
        self.calls += 1
        if self.calls % 2:
            self.optimizer.step()


class Lookahead(torch.optim.Optimizer):
    """Wraps an optimiser, and goes back half the way after each second step."""

    def __init__(self, leaves, **options):
        self.optimizer = torch.optim.Adam(leaves, **options)
        super().__init__(leaves, options)
        self.slow = [leaf.detach().clone() for leaf in leaves]
        self.calls = 0

    def step(self, closure=None):
        self.optimizer.step(closure)
        self.calls += 1
        if self.calls % 2 == 0:
            for leaf, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
                slow.lerp_(leaf.detach(), 0.5)
                leaf.detach().copy_(slow)


@pytest.mark.parametrize("kind", [Backwards, EveryOther, Lookahead])
def test_optimisers_of_the_users_own_are_not_merged(kind):
    assert_alike(lambda: PyroOptim(kind, {"lr": 0.1}))


def test_a_function_that_makes_optimisers_is_as_good_as_a_class():
    def make(leaves, **options):
        (leaf,) = leaves
        return (torch.optim.Adam if leaf.dim() else torch.optim.SGD)([leaf], **options)

    seen = assert_alike(lambda: PyroOptim(make, {"lr": 0.1}))
    assert isinstance(seen.own("scale"), torch.optim.SGD)


def test_an_optimiser_with_a_step_of_its_own_takes_it():
    taken = []

    class Mine(PyroOptim):
        def __call__(self, params, *args, **kwargs):
            taken.append(len(params))
            super().__call__(params, *args, **kwargs)

    assert_alike(lambda: Mine(torch.optim.Adam, {"lr": 0.1}))
    assert taken == 2 * STEPS * [len(SHAPES)]


def test_an_optimiser_with_clips_of_its_own_takes_them():
    class Mine(PyroOptim):
        @staticmethod
        def _clip_grad(params, **_):
            params.grad.mul_(0.5)

    assert_alike(lambda: Mine(torch.optim.SGD, {"lr": 0.1}, {"clip_norm": 1.0}))


# Memory: optimisers that are looked at, saved, loaded and exchanged.


def test_an_optimiser_may_be_exchanged_between_steps():
    def event(training, t):
        leaf = training.leaves["net$$$bias"]
        if t == 2:
            training.optim.optim_objs[leaf] = torch.optim.SGD([leaf], lr=0.3)
        if t == 4:
            del training.optim.optim_objs[leaf]

    assert_alike(makes("Adam"), event=event)


@pytest.mark.parametrize("name", ["SGD, momentum", "Adam", "AdamW, AMSGrad", "NAdam", "RMSprop"])
def test_averages_may_be_forgotten_between_steps(name):
    def event(training, t):
        if t == 1:
            training.own("net$$$bias").state.clear()
        if t == 3:
            for key, x in (
                training.own("net$$$weight").state[training.leaves["net$$$weight"]].items()
            ):
                if key != "step":
                    x.zero_()

    assert_alike(makes(name), event=event)


@pytest.mark.parametrize("name", ["SGD, momentum", "Adam", "AdamW, AMSGrad", "NAdam", "RMSprop"])
def test_states_may_be_loaded_between_steps(name):
    def event(training, t):
        if t == 1:
            training.kept = {n: training.own(n).state_dict() for n in SHAPES}
            training.kept = torch.load(through_a_file(training.kept), weights_only=True)
        if t == 3:
            for n in ("net$$$bias", "scale"):
                training.own(n).load_state_dict(training.kept[n])

    assert_alike(makes(name), event=event)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(
    "name", ["SGD", "SGD, momentum", "Adam", "AdamW, AMSGrad", "NAdam", "ASGD"]
)
def test_pyros_own_files_hold_the_state_of_grouped_steps(name, resumed, tmp_path):
    """And the other way round."""
    gradients = drawn(steps=8)
    expected = Training(makes(name), is_grouped=False).run(gradients)
    first = Training(makes(name), is_grouped=not resumed).run(gradients[:4])
    first.optim.save(tmp_path / "optim.pt")
    second = Training(makes(name), is_grouped=resumed)
    second.optim.load(tmp_path / "optim.pt")
    for leaf, value in zip(second.leaves.values(), first.values.values(), strict=True):
        leaf.detach().copy_(value)
    second.run(gradients[4:])
    torch.testing.assert_close(second.values, expected.values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(second.memories, expected.memories, rtol=1e-12, atol=1e-12)


def test_steps_in_groups_and_alone_may_alternate():
    def run(turns):
        training = Training(makes("Adam, AMSGrad"), is_grouped=False)
        for is_grouped, now in zip(turns, drawn(), strict=True):
            training.is_grouped = is_grouped
            training.step(now)
        return training.values

    expected = run([False] * STEPS)
    torch.testing.assert_close(run([False, True] * 3), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(run([True, False] * 3), expected, rtol=1e-12, atol=1e-12)


# Games.

GAMES = ["SGD", "SGD, Nesterov", "Adam", "AdamW, AMSGrad", "NAdam", "RMSprop", "ASGD", "Rprop"]
PULLS = [0.5, -1.0, 0.7, 0.2, -0.3, 1.1]


def one_by_one(chase):
    """The same game, whose optimisers step one after another as Pyro lets them."""
    for strategy in chase.game._strategies.values():
        strategy.grouped = lambda leaves, found_inf=None, optim=strategy.optim: optim(leaves)
    return chase


def stepped(chase, pulls):
    for pull in pulls:
        chase.game.step(pull)
    return chase


def close(seen, expected):
    torch.testing.assert_close(seen, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("updates", ["alternating", "simultaneous", ["a", "b", "b", "c", "a"]])
@pytest.mark.parametrize("name", GAMES)
def test_players_share_one_optimiser(name, updates, device):
    chase = stepped(Chase(makes(name)(), updates=updates, device=device), PULLS)
    pyro.clear_param_store()
    twin = stepped(one_by_one(Chase(makes(name)(), updates=updates, device=device)), PULLS)
    close(chase.values, twin.values)
    assert len(chase.optim.optim_objs) == 3


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("name", GAMES)
def test_a_game_goes_on_bit_for_bit(name, stop, device):
    expected = stepped(Chase(makes(name)(), device=device), PULLS).values
    pyro.clear_param_store()
    first = stepped(Chase(makes(name)(), device=device), PULLS[:stop])
    file = through_a_file(first.game.state_dict())
    pyro.clear_param_store()
    second = Chase(makes(name)(), device=device)
    second.game.load_state_dict(torch.load(file, weights_only=True))
    assert same(stepped(second, PULLS[stop:]).values, expected)


@pytest.mark.parametrize("name", GAMES)
def test_states_of_steps_taken_one_by_one_can_be_loaded(name):
    first = stepped(one_by_one(Chase(makes(name)())), PULLS[:3])
    file = through_a_file(first.game.state_dict())
    expected = stepped(first, PULLS[3:]).values
    pyro.clear_param_store()
    second = Chase(makes(name)())
    second.game.load_state_dict(torch.load(file, weights_only=True))
    close(stepped(second, PULLS[3:]).values, expected)


def memories_of(chase):
    """What the optimisers remember, by player."""
    states = chase.game.state_dict()["players"]
    return {
        name: [x for x in state["optim"][name]["optimizer"]["state"].values() if x]
        for name, state in states.items()
        if name in state["optim"]
    }


@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("broken", ["b", "c"])
@pytest.mark.parametrize("name", GAMES)
def test_moves_are_taken_back_after_an_error_and_go_on_right(name, broken, before):
    chase = stepped(Chase(makes(name)()), PULLS[:before])
    values, state = chase.values, memories_of(chase)
    chase.broken = broken
    with pytest.raises(ValueError, match="support|finite"):
        chase.game.step(0.1)
    assert same(chase.values, values)
    if before:
        assert same(memories_of(chase), state)
    assert all(leaf.grad is None for leaf in chase.leaves.values())
    chase.broken = None
    stepped(chase, PULLS[before:])
    pyro.clear_param_store()
    assert same(chase.values, stepped(Chase(makes(name)()), PULLS).values)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_an_error_in_an_optimiser_leaves_no_gradient_behind(name):
    chase = stepped(Chase(makes(name)()), PULLS[:2])
    values = chase.values

    def fail(*_):
        raise RuntimeError("clip")

    clip = chase.optim.grad_clip
    clip[chase.leaves["b"]] = fail
    with pytest.raises(RuntimeError, match="clip"):
        chase.game.step(0.1)
    clip[chase.leaves["b"]] = None
    assert same(chase.values, values)
    assert all(leaf.grad is None for leaf in chase.leaves.values())
    stepped(chase, PULLS[2:])
    pyro.clear_param_store()
    close(chase.values, stepped(Chase(makes(name)()), PULLS).values)


@pytest.mark.parametrize("scheduler", ["ExponentialLR", "OneCycleLR"])
def test_a_scheduled_game_warns_of_nothing(scheduler):
    def make():
        options = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}}
        return getattr(pyro.optim, scheduler)(options | SCHEDULERS[scheduler])

    def run(chase):
        for pull in PULLS:
            chase.game.step(pull)
            chase.optim.step()
        return chase.values

    values = run(Chase(make()))
    pyro.clear_param_store()
    close(values, run(one_by_one(Chase(make()))))


def test_a_resumed_schedule_warns_of_nothing():
    def make():
        options = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}}
        return pyro.optim.ExponentialLR(options | SCHEDULERS["ExponentialLR"])

    def run(chase, pulls):
        for pull in pulls:
            chase.game.step(pull)
            chase.optim.step()
        return chase

    first = run(Chase(make()), PULLS[:3])
    file = through_a_file(first.game.state_dict())
    pyro.clear_param_store()
    second = Chase(make())
    second.game.load_state_dict(torch.load(file, weights_only=True))
    run(second, PULLS[3:])
    pyro.clear_param_store()
    assert same(second.values, run(Chase(make()), PULLS).values)
