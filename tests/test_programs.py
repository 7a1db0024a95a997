"""Programs as users write them, each through every route."""

import dataclasses
import inspect
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.optim import PyroOptim
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pyro_symeq import Batch, SymmetricEquilibrium, SymmetricUtility
from tests.programs import PROGRAMS, Program

each_program = pytest.mark.parametrize("name", PROGRAMS)


def fresh(name, device):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with device:
        return PROGRAMS[name]()


def leaves():
    """The unconstrained parameters by name."""
    return dict(pyro.get_param_store().named_parameters())


def tensors(tree, path=()):
    """The tensors in a nest of containers, by path."""
    if isinstance(tree, Tensor):
        return {path: tree}
    if isinstance(tree, Batch):
        tree = tree.call
    if isinstance(tree, Mapping):
        branches = tree.items()
    elif isinstance(tree, (tuple, list)):
        branches = enumerate(tree)
    elif dataclasses.is_dataclass(tree):
        branches = vars(tree).items()
    else:
        return {}
    return {p: x for key, branch in branches for p, x in tensors(branch, (*path, key)).items()}


def close(a, b):
    """Compares gradients by name, where none is as good as zero."""
    for key in a.keys() | b.keys():
        one, other = (grads.get(key, torch.zeros(())) for grads in (a, b))
        one, other = torch.broadcast_tensors(one.cpu(), other.cpu())
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=str(key))


class Recorder(PyroOptim):
    """Keeps the gradients by parameter name while it follows them."""

    def __init__(self, lr=0.0):
        super().__init__(torch.optim.SGD, {"lr": lr})
        self.seen = {}

    def __call__(self, params, *args, **kwargs):
        params = list(params)
        store = pyro.get_param_store()
        for leaf in params:
            if leaf.grad is not None:
                self.seen[store.param_name(leaf)] = leaf.grad.clone()
        super().__call__(params, *args, **kwargs)


def equilibrium(program, lr=0.0, **options):
    recorders = Recorder(lr), Recorder(lr)
    utility = SymmetricUtility(**program.options)
    symeq = SymmetricEquilibrium(program.model, program.guide, recorders, utility, **options)
    return symeq, recorders


def by_step(program):
    symeq, recorders = equilibrium(program, updates="simultaneous")

    def draw(*args, **kwargs):
        for recorder in recorders:
            recorder.seen.clear()
        loss = symeq.step(*args, **kwargs)
        assert not recorders[0].seen.keys() & recorders[1].seen.keys()
        return loss, recorders[0].seen | recorders[1].seen

    return draw, symeq.evaluate_loss


def by_svi(program):
    recorder = Recorder()
    utility = SymmetricUtility(**program.options)
    svi = SVI(program.model, program.guide, recorder, loss=utility)

    def draw(*args, **kwargs):
        recorder.seen.clear()
        return svi.step(*args, **kwargs), dict(recorder.seen)

    return draw, svi.evaluate_loss


def by_module(program):
    module = SymmetricUtility(**program.options)(program.model, program.guide)

    def draw(*args, **kwargs):
        for leaf in leaves().values():
            leaf.grad = None
        loss = module(*args, **kwargs)
        loss.backward()
        grads = {name: leaf.grad for name, leaf in leaves().items() if leaf.grad is not None}
        return loss.item(), grads

    @torch.no_grad()
    def evaluate(*args, **kwargs):
        return module(*args, **kwargs).item()

    return draw, evaluate


ROUTES = {"step": by_step, "SVI": by_svi, "module": by_module}


def global_state():
    return (
        pyro.settings.get(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        list(_PYRO_STACK),
    )


@each_program
def test_routes_agree(name, device):
    """Losses and gradients are the same from the same seed, at the first call and later ones."""
    results = {}
    for route, make in ROUTES.items():
        program = fresh(name, device)
        state = global_state()
        given = tensors(program.calls)
        before = {path: x.clone() for path, x in given.items()}
        draw, evaluate = make(program)
        results[route] = []
        for args, kwargs in program.calls:
            losses, ends = [], []
            for run in (evaluate, draw):
                pyro.set_rng_seed(1)
                losses.append(run(*args, **kwargs))
                ends.append(torch.get_rng_state())
            losses[-1], grads = losses[-1]
            assert all(math.isfinite(loss) for loss in losses), losses
            assert losses[0] == losses[1], "the first call draws otherwise"
            assert torch.equal(ends[0], ends[1]), "the first call takes random numbers"
            assert grads
            assert all(torch.isfinite(gradient).all() for gradient in grads.values())
            results[route].append((losses[0], grads, leaves().keys()))
        assert global_state() == state
        assert all(torch.equal(x, before[path]) for path, x in given.items())
    for route in ("SVI", "module"):
        for one, other in zip(results["step"], results[route], strict=True):
            assert one[0] == pytest.approx(other[0], rel=1e-12)
            assert one[2] == other[2]
            close(one[1], other[1])


@dataclass
class Run:
    """What a program was called with, and what it did."""

    role: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    trace: poutine.Trace
    is_scored: bool

    @property
    def tensors(self):
        return tensors((self.args, self.kwargs))

    @property
    def parameters(self):
        return {name for name, site in self.trace.nodes.items() if site["type"] == "param"}

    @property
    def values(self):
        """What was drawn or observed; the parts that obs_mask= makes of a site count as one."""
        found = {
            name: site["value"]
            for name, site in self.trace.nodes.items()
            if site["type"] == "sample" and not site_is_subsample(site)
        }
        split = {name for name in found if f"{name}_unobserved" in found}
        parts = {f"{name}_{part}" for name in split for part in ("observed", "unobserved")}
        return {
            name.removesuffix("_unobserved"): value
            for name, value in found.items()
            if name not in parts
        }


def watch(program, role, runs):
    def watched(*args, **kwargs):
        traced = poutine.trace(program)
        traced(*args, **kwargs)
        runs.append(Run(role, args, kwargs, traced.trace, torch.is_grad_enabled()))

    function = program.forward if isinstance(program, nn.Module) else program
    watched.__signature__ = inspect.signature(function)
    return watched


def watched_runs(program):
    """A pair whose calls are noted, after the first of each kind."""
    runs = []
    watched = dataclasses.replace(
        program,
        model=watch(program.model, "model", runs),
        guide=watch(program.guide, "guide", runs),
    )
    return watched, runs


def equal(a, b):
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return a.numel() == b.numel() and torch.equal(a.flatten().to(b), b.flatten())


def leaks(seen, real):
    """Whether a tensor shows real data: some of the rows, if rows never repeat by chance."""
    if seen.untyped_storage().data_ptr() == real.untyped_storage().data_ptr():
        return True
    if seen.shape != real.shape:
        return False
    same = (seen == real).reshape(len(real), -1)
    same &= (real != 0).reshape(len(real), -1).any(1, keepdim=True)  # zeros stand for no data
    is_continuous = real.is_floating_point() and not torch.equal(real, real.round())
    return bool(same.all(1).any() if is_continuous else same.all())


def agrees(run, labels):
    """Whether a run has given labels at some site, where they are known (no NaN)."""
    rows = [s["value"] for s in run.trace.nodes.values() if site_is_subsample(s)]
    for name, label in labels.items():
        if name in run.values:
            label = label[rows[0]] if rows else label
            known = ~torch.isnan(label)
            if known.any() and equal(run.values[name].reshape(label.shape)[known], label[known]):
                return True
    return False


def is_dream_of(run, dream):
    """Whether a guide was run on the latents of a model's run."""
    shared = run.values.keys() & dream.values.keys()
    return bool(shared) and all(equal(run.values[name], dream.values[name]) for name in shared)


@each_program
def test_dreams_show_no_real_data(name, device):
    program = fresh(name, device)
    watched, runs = watched_runs(program)
    symeq, _ = equilibrium(watched)
    for args, kwargs in program.calls:
        symeq.step(*args, **kwargs)
        runs.clear()
        symeq.step(*args, **kwargs)
        dreams = [run for run in runs if run.role == "model" and not run.is_scored]
        awake = [run for run in runs if run.role == "model" and run.is_scored]
        asleep = [run for run in runs if run.role == "guide" and run.is_scored]
        assert asleep
        num_dreamed = 0
        for run in asleep:
            shown = [
                path
                for path, seen in run.tensors.items()
                if any(leaks(seen, real) for real in program.data)
            ]
            if shown and agrees(run, program.labels):
                continue  # scored at the data, whose labels are given
            assert not shown, f"the guide saw real data at {shown}"
            sources = [dream for dream in dreams if is_dream_of(run, dream)]
            assert sources, "the guide was scored on latents that no dream has"
            assert_pairs(run, sources, awake)
            num_dreamed += 1
        assert num_dreamed


def assert_pairs(run, dreams, awake):
    """An argument that is observed as a whole must hold what was dreamed with the latents."""
    for wake in awake:
        real = wake.tensors
        for site, value in wake.values.items():
            for path in (p for p in real if p in run.tensors and equal(real[p], value)):
                if wake.trace.nodes[site]["is_observed"] and site not in run.values:
                    dreamed = [value for dream in dreams for value in dream.values.values()]
                    assert any(equal(x, run.tensors[path]) for x in dreamed), (site, path)


@each_program
def test_each_player_moves_its_own_parameters(name, device):
    program = fresh(name, device)
    watched, runs = watched_runs(program)
    symeq, recorders = equilibrium(watched, lr=1e-4)
    declared = leaves().keys()
    scored, touched = defaultdict(set), defaultdict(set)
    start = {}
    for args, kwargs in program.calls:
        symeq.evaluate_loss(*args, **kwargs)
        for leaf_name, leaf in leaves().items():
            start.setdefault(leaf_name, leaf.detach().clone())
        symeq.step(*args, **kwargs)
    for run in runs:
        touched[run.role] |= run.parameters
        if run.is_scored:
            scored[run.role] |= run.parameters
    state = symeq.state_dict()["players"]
    decoder, encoder = ({*state[role]["parameters"]} for role in ("decoder", "encoder"))
    assert scored["model"] <= decoder <= touched["model"]
    assert scored["guide"] - touched["model"] <= encoder <= touched["guide"] - touched["model"]
    assert leaves().keys() == touched["model"] | touched["guide"] | declared
    assert recorders[0].seen.keys() <= decoder
    assert recorders[1].seen.keys() <= encoder
    followed = {
        name for r in recorders for name, grad in r.seen.items() if grad.abs().max() > 1e-9
    }
    moved = {name for name, value in start.items() if not torch.equal(leaves()[name], value)}
    assert followed & start.keys() <= moved <= decoder | encoder
    assert moved


def replayed(program, runs, role):
    """The sum of Pyro's own log-probabilities in the scored runs, with a graph."""
    total = torch.zeros(())
    for run in runs:
        if run.role == role and run.is_scored:
            again = poutine.trace(poutine.replay(getattr(program, role), run.trace))
            trace = again.get_trace(*run.args, **run.kwargs)
            total = total + trace.log_prob_sum(
                lambda name, site: site["is_observed"] or not site["infer"].get("is_auxiliary")
            )
    return total


def slope(utility, parameters, directions, width=1e-6):
    """A derivative by differences."""
    ends = []
    for sign in (1, -1):
        for leaf, direction in zip(parameters, directions, strict=True):
            leaf.detach().add_(direction, alpha=sign * width)
        ends.append(utility())
        for leaf, direction in zip(parameters, directions, strict=True):
            leaf.detach().sub_(direction, alpha=sign * width)
    return (ends[0] - ends[1]) / (2 * width)


@each_program
def test_gradients_are_those_of_each_players_utility(name, device):
    """Against Pyro's sums in a replay of the runs, or else against finite differences."""
    program = fresh(name, device)
    watched, runs = watched_runs(program)
    symeq, recorders = equilibrium(watched, updates="simultaneous")
    for args, kwargs in program.calls:
        symeq.step(*args, **kwargs)
        for recorder in recorders:
            recorder.seen.clear()
        runs.clear()
        pyro.set_rng_seed(1)
        loss = symeq.step(*args, **kwargs)
        noted = list(runs)
        for role, player, recorder in zip(
            ("model", "guide"), ("decoder", "encoder"), recorders, strict=True
        ):
            own = {n: leaves()[n] for n in symeq.state_dict()["players"][player]["parameters"]}
            if program.is_sum:
                total = replayed(program, noted, role)
                assert total.item() == pytest.approx(getattr(loss, player), rel=1e-10)
                expected = []
                if own and total.requires_grad:
                    expected = torch.autograd.grad(-total, list(own.values()), allow_unused=True)
                expected = dict(zip(own, expected, strict=False))
                close({n: g for n, g in expected.items() if g is not None}, recorder.seen)
            else:

                def utility(player=player):
                    pyro.set_rng_seed(1)
                    return getattr(symeq.evaluate_loss(*args, **kwargs), player)  # noqa: B023

                directions = [torch.randn_like(leaf) for leaf in own.values()]
                expected = -sum(
                    (recorder.seen.get(n, torch.zeros_like(d)) * d).sum().item()
                    for n, d in zip(own, directions, strict=True)
                )
                seen = slope(utility, list(own.values()), directions)
                assert seen == pytest.approx(expected, rel=1e-4, abs=1e-5)


@each_program
@pytest.mark.parametrize(
    ("dtype", "validation"),
    [(torch.float32, True), (torch.float32, False), (torch.float64, False)],
    ids=["float32", "float32 unchecked", "float64 unchecked"],
)
def test_dtypes_follow_the_programs(name, dtype, validation, device):
    torch.set_default_dtype(dtype)
    with pyro.validation_enabled(validation):
        program = fresh(name, device)
        draw, _ = by_svi(program)
        for args, kwargs in program.calls:
            loss, grads = draw(*args, **kwargs)
            assert math.isfinite(loss)
            assert all(gradient.dtype == dtype for gradient in grads.values())
        assert all(leaf.dtype == dtype for leaf in leaves().values())


class Faulty:
    """A sound pair, with a spot for a fault in each program."""

    def __init__(self):
        self.decoder = nn.Linear(2, 3)
        self.encoder = nn.Linear(3, 2)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            return pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))


def refused(model, guide, args, **options):
    return Program(model, guide, args, options=options, data=())


def factor_in_the_guide():
    pair = Faulty()

    def guide(x):
        z = pair.guide(x)
        pyro.factor("penalty", -z.square().sum(), has_rsample=False)

    return refused(pair.model, guide, (torch.randn(4, 3),))


def automatic_guide():
    pair = Faulty()
    return refused(pair.model, AutoNormal(pair.model), (torch.randn(4, 3),))


def guide_that_closes_over_its_data():
    pair = Faulty()
    x = torch.randn(4, 3)
    return refused(pair.model, lambda _: pair.guide(x), (x,))


def guide_site_that_the_model_lacks():
    pair = Faulty()

    def guide(x):
        z = pair.guide(x)
        pyro.sample("w", dist.Normal(z.sum(), 1.0))

    return refused(pair.model, guide, (torch.randn(4, 3),))


def model_site_that_the_guide_lacks():
    pair = Faulty()

    def model(x):
        pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        pair.model(x)

    return refused(model, pair.guide, (torch.randn(4, 3),))


def data_from_outside():
    pair = Faulty()
    x = torch.randn(4, 3)

    def generate(scale):
        pyro.module("decoder", pair.decoder)
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(scale * torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(pair.decoder(z), 1.0).to_event(1))

    return refused(
        poutine.condition(generate, {"x": x}), lambda scale: pair.guide(x), (torch.ones(()),)
    )


def data_as_a_global():
    """Neither program takes an argument."""
    pair = Faulty()
    x = torch.randn(4, 3)
    return refused(lambda: pair.model(x), lambda: pair.guide(x), ())


def computed_value_of_the_data():
    pair = Faulty()

    def model(x):
        pair.model((x - x.mean(0)) / x.std(0))

    return refused(model, pair.guide, (torch.randn(4, 3),))


def guide_that_reads_an_integer_label():
    """The model observes one_hot(y); a dreamed row of it is no integer that could be handed."""
    pair = Faulty()
    classify = nn.Linear(3, 2)

    def model(x, y):
        pyro.module("decoder", pair.decoder)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(x.new_ones(2)), obs=one_hot(y, 2).to(x))
            z = pyro.sample("z", dist.Normal(y, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(pair.decoder(z), 1.0).to_event(1), obs=x)

    def guide(x, y):
        pyro.module("classify", classify)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.OneHotCategorical(logits=classify(x)))
        pair.guide(x + y[:, None])

    return refused(model, guide, (torch.randn(4, 3), torch.tensor([0, 1, 1, 0])))


def same_data_in_two_arguments():
    pair = Faulty()
    x = torch.randn(4, 3)
    return refused(lambda x, y: pair.model(x), lambda x, y: pair.guide(x + y), (x, x))


def guide_without_the_plate_of_the_subsample():
    """Rows that the guide draws for itself are others than those that the model observes."""
    pair = Faulty()

    def model(data):
        pyro.module("decoder", pair.decoder)
        with pyro.plate("data", len(data), subsample_size=2) as ind:
            z = pyro.sample("z", dist.Normal(data.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(pair.decoder(z), 1.0).to_event(1), obs=data[ind])

    def guide(data):
        pyro.module("encoder", pair.encoder)
        with pyro.plate("other", len(data), subsample_size=2) as ind:
            pyro.sample("z", dist.Normal(pair.encoder(data[ind]), 1.0).to_event(1))

    return refused(model, guide, (torch.randn(5, 3),))


def several_proposals_of_a_branch():
    """Draws that don't have the same sites can't be compared row by row."""
    pair = PROGRAMS["stochastic: branch with a latent of its own"]()
    return refused(pair.model, pair.guide, pair.args, num_proposals=30)


REFUSED = {
    factor_in_the_guide: "factor",
    automatic_guide: "The guide ignores the data.*an AutoGuide",
    guide_that_closes_over_its_data: "The guide ignores the data",
    guide_site_that_the_model_lacks: r"The guide samples \['w'\], which the model doesn't",
    model_site_that_the_guide_lacks: r"The guide never samples \['w'\], which the model does",
    data_from_outside: "No argument holds the observed value of site 'x'",
    data_as_a_global: "No argument holds the observed value of site 'x'",
    computed_value_of_the_data: "No argument holds the observed value of site 'x'",
    guide_that_reads_an_integer_label: "site 'y'",
    same_data_in_two_arguments: "Several arguments hold the observed value of site 'x'",
    guide_without_the_plate_of_the_subsample: "plate",
    several_proposals_of_a_branch: r"Only some draws of the guide have the sites \['w'\]",
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__.replace("_", " "))
def test_what_cannot_learn_is_refused_by_name(make, route):
    program = make()
    draw, _ = ROUTES[route](program)
    with pytest.raises(ValueError, match=REFUSED[make]):
        draw(*program.args)
