"""Chains of programs as users write them."""

import re
from contextlib import ExitStack

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_symeq import Batch, LimitingDistribution, tracing
from tests.programs import PROGRAMS
from tests.test_programs import each_program, fresh, global_state, tensors, watched_runs

COPIES = 3

REFUSED = {
    "a plate is subsampled": [
        "plates: sequential and subsampled",
        "plates: minibatch given as the subsample",
        "plates: minibatch and its indices",
        "plates: subsampled, data[ind]",
        "plates: subsampled, data[ind, :]",
        "plates: subsampled, index_select",
        "plates: subsampled, take along a dim",
        "plates: subsampled, gather",
        "plates: subsampled, pyro.subsample",
        "plates: subsampled from, in a dict",
        "plates: subsampled from, images flattened",
        "plates: subsampled from, columns of a table",
        "plates: subsampled from, cast",
        "plates: subsampled with a global latent",
        "plates: subsampled with labels",
        "plates: subsampled twice",
        "plates: subsampled groups of members",
        "plates: subsampled local parameters",
        "sequences: subsampled sequences",
        "stochastic: particles of a subsample, in a loop",
        "stochastic: particles of a subsample, best of several",
    ],
    r"The sites \['.'\] are split by obs_mask=": [
        "semisupervised: labels of some rows, guide writes y",
        "semisupervised: labels of some rows, guide writes y_unobserved",
        "semisupervised: labels of some rows and a style",
        "semisupervised: data of some rows, some",
        "semisupervised: data of some rows, none",
        "semisupervised: data of some rows, all",
        "semisupervised: data of some rows, some, which the guide fills in",
        "semisupervised: data of some rows, none, which the guide fills in",
        "semisupervised: data of some rows, all, which the guide could fill in",
    ],
    r"Expected the programs to sample \[.*\] in each run": [
        "stochastic: branch with a latent of its own",
        "stochastic: branch for each row",
        "stochastic: geometric number of latents",
        "stochastic: recursive programs",
        "stochastic: observed site whose name depends on a draw",
        "stochastic: whole data observed at one site or another",
        "stochastic: particles of a branch",
    ],
}
ALWAYS = sum(REFUSED.values(), [])
# Latents that some batches of a program observe, and so are refused.
LATENTS = {
    "handlers: condition outside a latent on a constant": "w",
    "semisupervised: all latents given": "z",
    "semisupervised: batches in particles": "y",
    "semisupervised: batches of every pattern": "z",
    "semisupervised: batches with weights": "y",
    "semisupervised: guide that gives obs to its latent": "y",
    "semisupervised: integer labels": "y",
    "semisupervised: integer labels observed as one hot rows": "y",
    "semisupervised: labels come and go": "y",
    "semisupervised: labels for the decoder alone": "y",
    "semisupervised: labels given": "y",
    "semisupervised: labels in a dict": "y",
    "semisupervised: latents given and data missing": "z",
    "semisupervised: several batches in one step": "y",
    "semisupervised: two labels of which one is given": "ab",
    "stochastic: particles with labels, best of several": "y",
    "stochastic: particles with labels, in a loop": "y",
    "stochastic: particles with labels, vectorised": "y",
}
# Programs that run as they are, and not on copies of the rows.
UNCOPIED = {
    "no vectorised plate holds all random variables": [
        "arguments: rows as separate arguments",
        "classics: bayesian mixture",
        "classics: change point",
        "classics: item response",
        "classics: latent regression with unknown noise",
        "handlers: lift makes latents of parameters",
        "latents: global and local latents",
        "latents: global latent alone",
        "modules: random prior that depends on another",
        "modules: weights as latents",
        "plates: crossed",
        "plates: no plate at all",
        "plates: sequential",
        "sequences: hidden markov model of a single sequence",
        "sequences: list of sequences of different lengths",
        "stochastic: parameters of the branch taken",
    ],
    "for each row of the batch: (Expected site|Shape mismatch|shape '|Expected `len)": [
        "arguments: view, reshaped",
        "handlers: do sets a latent",
        "parameters: in nested plates",
        "plates: nested, by order",
        "plates: nested, with dim",
        "plates: nested, with other dim",
        "sequences: deep markov model with packed reversed sequences, padding as dreamed",
        "sequences: deep markov model with packed reversed sequences, padding zeroed",
    ],
    "the law of site 'x' in a row depends on the other copies": ["modules: batch normalisation"],
}

# Laws that differ from run to run.
RANDOM = (
    "handlers: block hides a local variable",
    "modules: dropout",
)
# Sites whose elements are only possible together.
WHOLE = (
    "classics: product topics",
    "observations: kind, bag of words",
    "semisupervised: guide that observes labels itself, auxiliary",
    "semisupervised: guide that observes labels itself, plain",
    "semisupervised: guide without a label network",
)
# Untrained networks soon drive each other to infinity.
DIVERGING = ("classics: counts with unknown rates", "latents: one site, Laplace")


def limiting_of(program):
    return LimitingDistribution(program.model, program.guide, bind=program.options.get("bind"))


def why_not(table, name):
    """The message by which a program is refused, if it is."""
    return next((message for message, names in table.items() if name in names), None)


def given_latents(program, name, batch):
    """The latents that the model observes of a batch."""
    args, kwargs = batch.call
    trace = poutine.trace(program.model).get_trace(*args, **kwargs)
    sites = [site for site in LATENTS.get(name, "") if site in trace]
    return [site for site in sites if trace.nodes[site]["is_observed"]]


def batches(program):
    """The batches of all calls, without the weights that they have in a step."""
    for args, kwargs in program.calls:
        parts = [part.weighted(1.0) for part in args if isinstance(part, Batch)]
        yield from parts or [Batch(*args, **kwargs)]


class force(Messenger):  # noqa: N801
    """Gives all random variables their values."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg):
        if msg["name"] in self.values and not isinstance(msg["fn"], str):
            msg.update(value=self.values[msg["name"]], is_observed=False, done=True)


def laws(program, call, values):
    """The log-probabilities of a program at given values, by site and row."""
    args, kwargs = call
    with torch.no_grad():
        trace = poutine.trace(force(values)(program)).get_trace(*args, **kwargs)
    return log_probs(trace, values)


def log_probs(trace, names):
    sites = {name: trace.nodes[name] for name in names}
    return {
        name: site["fn"].log_prob(site["value"])
        for name, site in sites.items()
        if not hasattr(site["fn"], "sampler")
    }


def rows_dim(one, many):
    """Where the rows of one batch lie, seen from the same with copies of them."""
    assert one.dim() == many.dim()
    dims = [d for d in range(one.dim()) if one.shape[d] != many.shape[d]]
    assert len(dims) <= 1, (one.shape, many.shape)
    assert all(many.shape[d] == COPIES * one.shape[d] for d in dims)
    return dims[0] if dims else None


def copy_of(k, one, many):
    """The k-th copy of the rows."""
    dim = rows_dim(one, many)
    return many if dim is None else many.chunk(COPIES, dim)[k]


def replaced(tree, seen, k):
    """The arguments of the k-th copy: those of the batch, with dreams in the place of data."""
    if isinstance(tree, Tensor):
        return copy_of(k, tree, seen)
    if isinstance(tree, dict):
        return type(tree)({key: replaced(tree[key], seen[key], k) for key in tree})
    if isinstance(tree, (tuple, list)):
        parts = [replaced(*both, k) for both in zip(tree, seen, strict=True)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    if hasattr(tree, "__dataclass_fields__"):
        twin = object.__new__(type(tree))
        for key in tree.__dataclass_fields__:
            part = replaced(getattr(tree, key), getattr(seen, key), k)
            object.__setattr__(twin, key, part)
        return twin
    return tree


def sites_of(trace):
    return {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }


def assert_copies(program, call, run, single):
    """Each copy of the rows has the law that the batch itself has with its values."""
    values = {name: x for name, x in sites_of(run.trace).items() if name in single}
    seen = log_probs(run.trace, values)
    for k in range(COPIES):
        of_copy = {name: copy_of(k, single[name], x) for name, x in values.items()}
        # The model's arguments are the batch; the guide's have this copy of a dream in them.
        own = call if run.role == "model" else replaced(call, (run.args, run.kwargs), k)
        expected = laws(getattr(program, run.role), own, of_copy)
        for name, log_prob in expected.items():
            torch.testing.assert_close(copy_of(k, log_prob, seen[name]), log_prob, msg=name)


@each_program
def test_copies_of_rows_are_chains_of_their_own(name, device):
    """Each copy has the law of the batch, and the guide sees the dream whose latents it redraws."""
    program = fresh(name, device)
    watched, runs = watched_runs(program)
    state = global_state()
    given = tensors(program.calls)
    before = {path: x.clone() for path, x in given.items()}
    for batch in batches(program):
        message = why_not(REFUSED | UNCOPIED, name)
        if latents := given_latents(program, name, batch):
            message = re.escape(f"The model observes the latents {latents} of this batch")
        if message is not None:
            with pytest.raises(ValueError, match=message):
                limiting_of(program).sample(1 if name in ALWAYS else 6, batch, num_steps=60)
            continue
        runs.clear()
        num_steps = 1 if name in DIVERGING else 2
        draws = limiting_of(watched).sample(
            COPIES * num_steps, batch, num_steps=num_steps, burn_in=0
        )
        args, kwargs = batch.call
        single = {}
        for role in ("model", "guide"):
            trace = poutine.trace(getattr(program, role)).get_trace(*args, **kwargs)
            single = sites_of(trace) | single
        for site, values in draws.items():
            assert values.shape == (COPIES * num_steps, *single[site].shape), site
            assert values.isfinite().all(), site
        dream, shown = ([run for run in runs if run.role == r][-1] for r in ("model", "guide"))
        for run in (dream, shown):
            assert not run.is_scored
            if name not in RANDOM:
                assert_copies(program, batch.call, run, single)
        # The model, called as the guide was, observes what the model has drawn before.
        trace = poutine.trace(program.model).get_trace(*shown.args, **shown.kwargs)
        for site, node in trace.nodes.items():
            if site in draws and node["is_observed"]:
                seen, drawn = node["value"], dream.values[site]
                torch.testing.assert_close(seen.reshape(drawn.shape).to(drawn), drawn, msg=site)
    assert global_state() == state
    assert all(torch.equal(x, before[path]) for path, x in given.items())


@pytest.mark.parametrize("name", [n for n in PROGRAMS if why_not(REFUSED, n) is None])
def test_what_is_known_stays(name, device):
    """Every other element of a data site is known, or every other row."""
    program = fresh(name, device)
    for batch in batches(program):
        if given_latents(program, name, batch):
            continue
        args, kwargs = batch.call
        sites = tracing.run(program.model, batch.call).variables
        site = next(site for site, node in sites.items() if node["is_observed"])
        shape = sites[site]["fn"].shape()
        rows = shape[:1] + (1,) * (len(shape) - 1) if name in WHOLE else shape
        known = torch.arange(rows.numel(), device=device).reshape(rows) % 2 == 0
        completion = limiting_of(program).complete(
            batch, mask={site: known}, num_steps=1 if name in DIVERGING else 2, start="data"
        )
        value, known = sites[site]["value"], known.expand(shape)
        value = value.reshape(shape) if value.numel() == shape.numel() else value.expand(shape)
        drawn = completion.samples[site][0]
        assert torch.equal(drawn[known], value[known].to(drawn))
        if value.is_floating_point() and not known.all():
            assert not torch.equal(drawn, value.to(drawn))
        for other, values in completion.samples.items():
            decided = completion.decide()[other]
            assert values.isfinite().all(), other
            assert values.shape == (1, *decided.shape), other
            assert values.dtype == decided.dtype, other


def encoded(code, num_plates=1):
    """A pair whose guide hardly errs: z is a function of the arguments."""

    def within(plates, x):
        for i in range(num_plates):
            plates.enter_context(pyro.plate(f"dim {i}", x.shape[i], dim=i - num_plates))

    def model(x, *_):
        with ExitStack() as plates:
            within(plates, x)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = z.reshape(z.shape + (1,) * (x.dim() - num_plates)).expand(x.shape)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(x.dim() - num_plates), obs=x)

    def guide(x, *args):
        with ExitStack() as plates:
            within(plates, x)
            pyro.sample("z", dist.Normal(code(x, *args), 1e-4))

    return model, guide


MEETING = {
    "an argument of as many rows": (lambda x, w: (x @ w.T).sum(-1), (3, 4), (3, 4)),
    "a square argument": (lambda x, w: (x @ w[:4].T).sum(-1) + w.sum(), (4, 4), (4, 4)),
    "an argument of one row with one row": (lambda x, w: x.sum(-1) + w.sum(), (1, 4), (1,)),
    "rows that are summed": (lambda x, _: x.sum(-1) + x.sum(), (3, 4), ()),
    "steps within the rows": (lambda x, _: x.cumsum(0), (3, 2), ()),
}


@pytest.mark.parametrize("case", MEETING)
def test_copies_are_as_the_batch_itself_or_refused(case, device):
    code, shape, other = MEETING[case]
    x, w = torch.randn(shape, device=device), torch.randn(other, device=device)
    limiting = LimitingDistribution(*encoded(code, num_plates=2 if "steps" in case else 1))
    alone = limiting.complete(x, w, given={"x": x}, num_steps=1).samples["z"]
    try:
        copies = limiting.complete(x, w, given={"x": x}, num_steps=1, num_samples=COPIES)
    except ValueError as error:
        assert "can't run 3 chains for each row" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(
            copies.samples["z"], alone.expand(COPIES, *alone.shape[1:]), rtol=0, atol=1e-2
        )


@pytest.mark.parametrize("seed", range(4))
def test_sites_of_later_runs_are_not_left_out(seed):
    def model(x):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        loc = pyro.sample("w", dist.Normal(3.0, 1.0)) if k else 0.0
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x):
        k = pyro.sample("k", dist.Bernoulli(logits=x.mean()))
        if k:
            pyro.sample("w", dist.Normal(x.mean(), 1.0))

    pyro.set_rng_seed(seed)
    try:
        draws = LimitingDistribution(model, guide).sample(1, torch.zeros(2), num_steps=3)
    except ValueError as error:
        assert "in each run" in str(error)  # noqa: PT017
    else:
        assert bool(draws["k"]) == ("w" in draws)
