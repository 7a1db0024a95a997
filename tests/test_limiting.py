import gc
import math
import sys
import time
import weakref
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_symeq import Batch, Conditionals, Implicit, LimitingDistribution
from pyro_symeq.marginals import RunningMarginal
from tests.enumerable import Ladder
from tests.test_limiting_law import Ladder as Classes
from tests.test_limiting_law import Triple

A, B, C, S = 1.5, 0.4, 2.0, 0.5


def gauss_model(x):
    """x ~ N(A z + C, 1), where z ~ N(0, 1) is only the start of the chains."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(A * z + C, 1.0), obs=x)


def gauss_guide(x):
    """z ~ N(B x, S²), so that z is autoregressive with factor A B, and noise B e + S e'."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(B * x, S))


GAUSS = LimitingDistribution(gauss_model, gauss_guide)
MEAN_Z = B * C / (1 - A * B)
VAR_Z = (B**2 + S**2) / (1 - (A * B) ** 2)
MEAN_X, VAR_X = A * MEAN_Z + C, A**2 * VAR_Z + 1


# Shapes and rows


@dataclass
class Batched:
    """A pair whose rows lie somewhere, with a covariate that tells them apart."""

    model: object
    guide: object
    args: tuple
    rows: object  # x by row, from a draw of the site "x"


def flat():
    def model(x, c):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            law = dist.Normal((c + 0.1 * z)[:, None].expand(-1, 2), 0.001)
            pyro.sample("x", law.to_event(1), obs=x)

    def guide(x, c):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=100 * (x.mean(-1) - c - 0.05)))

    return Batched(model, guide, (torch.zeros(3, 2), torch.arange(3.0)), lambda x: x)


def time_major():
    def model(batch):
        x = batch["x"]
        with pyro.plate("data", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("time", len(x), dim=-2):
                loc = batch["lengths"] + 0.1 * z.sum(-1).tanh()
                pyro.sample("x", dist.Normal(loc, 0.001), obs=x)

    def guide(batch):
        with pyro.plate("rows", batch["x"].shape[1]):
            loc = batch["x"].mean(0)[:, None].expand(-1, 2)
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    batch = {"x": torch.zeros(3, 3), "lengths": torch.arange(3.0), "on": True}
    return Batched(model, guide, (batch,), lambda x: x.transpose(-1, -2))


def transposed():
    """The argument has its rows first, the site has them last; and a part of it is a covariate."""

    def model(batch):
        x, c = batch[:, :3].T, batch[:, 3]
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Categorical(torch.ones(3)))
            with pyro.plate("time", len(x)):
                pyro.sample("x", dist.Normal(c + 0.01 * z, 0.001), obs=x)

    def guide(batch):
        with pyro.plate("data", len(batch)):
            pyro.sample("z", dist.Categorical(logits=batch[:, :3]))

    batch = torch.cat([torch.zeros(3, 3), torch.arange(3.0)[:, None]], -1)
    return Batched(model, guide, (batch,), lambda x: x.transpose(-1, -2))


def several_latents():
    def model(x, c, *, shift):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.OneHotCategorical(torch.ones(3)))
            z = pyro.sample("z", dist.Normal(0.01 * s.sum(-1), 0.01))
            pyro.sample("x", dist.Normal(c + z + shift, 0.001), obs=x)

    def guide(x, c, *, shift):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.OneHotCategorical(logits=torch.outer(x, torch.ones(3))))
            pyro.sample("z", dist.Normal(0.01 * s[:, 0], 0.01))

    args = (Batch(torch.zeros(3), torch.arange(3.0), shift=0.01),)
    return Batched(model, guide, args, lambda x: x)


LAYOUTS = [flat, time_major, transposed, several_latents]


@pytest.mark.parametrize("rows", LAYOUTS)
@pytest.mark.parametrize("start", ["dream", "data"])
def test_rows_stay_apart_and_shapes_are_those_of_predictive(rows, start):
    pair = rows()
    args, kwargs = pair.args[0].call if isinstance(pair.args[0], Batch) else (pair.args, {})
    expected = Predictive(poutine.uncondition(pair.model), num_samples=6)(*args, **kwargs)
    limiting = LimitingDistribution(pair.model, pair.guide)
    draws = limiting.sample(6, *pair.args, num_steps=5, burn_in=2, thin=1, start=start)
    sites = poutine.trace(pair.model).get_trace(*args, **kwargs).nodes
    assert draws.keys() == expected.keys()
    for name, value in draws.items():
        assert value.shape == (6, *sites[name]["value"].shape)
        assert value.squeeze().shape == expected[name].squeeze().shape  # Predictive adds ones
    x = pair.rows(draws["x"]).reshape(6, 3, -1)
    assert ((x - torch.arange(3.0)[:, None]).abs() < 0.3).all()


@pytest.mark.parametrize("size", [None, 2])
def test_the_outer_one_of_nested_plates_makes_chains(size):
    """Unless its size is fixed."""

    def model(x):
        with pyro.plate("outer", size or len(x), dim=-2), pyro.plate("inner", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("outer", size or len(x), dim=-2), pyro.plate("inner", 3, dim=-1):
            pyro.sample("z", dist.Normal(x, 1.0))

    limiting = LimitingDistribution(model, guide)
    x = torch.zeros(2, 3)
    assert limiting.sample(1, x, num_steps=2)["z"].shape == (1, 2, 3)
    if size is None:
        assert limiting.sample(4, x, num_steps=2)["z"].shape == (4, 2, 3)
    else:
        with pytest.raises(ValueError, match="can't run 4 chains for each row of the batch"):
            limiting.sample(4, x, num_steps=2)


def counter(after=None):
    """A pair whose x counts the rounds, but for small noise that tells chains apart."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1e-2))
            pyro.sample("x", dist.Normal(z + 1, 1e-9), obs=x)

    def guide(x):
        if after is not None:
            after(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1e-9))

    return LimitingDistribution(model, guide)


def test_which_rounds_are_kept():
    """The rounds burn_in + thin, burn_in + 2 thin, ..., chain after chain."""
    x = counter().sample(6, torch.zeros(2), num_steps=12, burn_in=4, thin=3)["x"]
    assert x.shape == (6, 2)
    assert (x.round() == torch.tensor([7.0, 10.0] * 3)[:, None]).all()
    noise = x - x.round()
    assert (noise[0::2] - noise[1::2]).abs().max() < 1e-6
    assert (noise[0] - noise[2]).abs().min() > 1e-5


def test_no_round_is_run_in_vain():
    seen = []
    limiting = counter(after=seen.append)
    limiting.sample(1, torch.zeros(2), num_steps=1)
    before, seen[:] = len(seen), []
    limiting.sample(2, torch.zeros(2), num_steps=12, burn_in=4, thin=3)
    assert len(seen) - before == 10 - 1


def test_callable_bind_hands_dreams_over():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.01), obs=2 * x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.01))

    def bind(trace, args, kwargs):
        return (trace.nodes["y"]["value"] / 2,), kwargs

    limiting = LimitingDistribution(model, guide, bind=bind)
    assert limiting.sample(4, torch.zeros(3), num_steps=3)["y"].shape == (4, 3)


def test_priors_may_be_implicit():
    """The law of the start has no density; here it is two of the four codes, both kept by q."""
    codes = torch.tensor([[0.0, 1.0], [1.0, 0.0]])

    def model(x):
        with pyro.plate("data", len(x)):
            prior = Implicit(lambda shape: codes[torch.randint(2, shape)], event_shape=(2,))
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Bernoulli(z).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(x).to_event(1))

    z = LimitingDistribution(model, guide).sample(50, torch.zeros(2, 2), num_steps=3)["z"]
    assert (z.sum(-1) == 1).all()
    assert z.reshape(-1, 2).unique(dim=0).shape == (2, 2)


def test_objects_print_usefully():
    assert repr(GAUSS) == "LimitingDistribution(gauss_model, gauss_guide)"
    conditionals = LimitingDistribution(Triple().conditionals())
    assert repr(conditionals) == "LimitingDistribution(Conditionals(s | x, z; x | s, z; z | x, s))"
    x = torch.zeros(2)
    completion = GAUSS.complete(x, given={"z": 1}, num_steps=2, num_samples=3)
    assert repr(completion) == "Completion(['z', 'x'], num_samples=3)"
    found = GAUSS.diagnose({"z": lambda s: s["z"]}, 3, x, num_steps=4)
    assert repr(found) == "Diagnostics(['z'], num_chains=3, num_draws=2)"


# What is known


def test_clamps_are_laid_over_what_later_sites_see():
    """Pixel 0 is seen by a second data site in the same round."""

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            u = pyro.sample("x", dist.Normal(z[:, None].expand(-1, 2), 1.0).to_event(1), obs=x)
            pyro.sample("y", dist.Normal(10 * u[:, 0], 1e-6), obs=y)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.sum(-1) / 3, 1.0))

    x = torch.tensor([[3.0, torch.nan], [5.0, torch.inf]])
    draws = LimitingDistribution(model, guide).sample(
        4, x, torch.zeros(2), num_steps=3, mask={"x": torch.tensor([True, False])}
    )
    assert (draws["x"][..., 0] == torch.tensor([3.0, 5.0])).all()
    assert draws["x"].isfinite().all()
    torch.testing.assert_close(draws["y"], 10 * draws["x"][..., 0], rtol=0, atol=1e-4)


def test_given_values_take_the_type_of_the_site():
    draws = Classes().limiting().sample(2, torch.zeros(4, 2), num_steps=2, given={"z": [1, 0]})
    assert (draws["z"] == torch.tensor([1.0, 0.0])).all()
    assert draws["z"].dtype is torch.float64


@pytest.mark.parametrize("start", ["dream", "data"])
def test_what_is_known_comes_before_the_batch(start):
    limiting = Classes().limiting()
    x, known = torch.tensor([[0.0, torch.nan]]), torch.tensor([1.0, 0.0])
    draws = limiting.sample(3, x, num_steps=2, start=start, given={"x": known})
    assert (draws["x"] == known).all()
    mask = {"x": torch.tensor([True, False])}
    draws = limiting.sample(50, x, num_steps=1, start=start, mask=mask)
    assert (draws["x"][..., 0] == 0).all()
    assert draws["x"][..., 1].unique().tolist() == [0, 1]


OPTIONS = {
    "given no dict": (
        {"given": [1]}, TypeError, "Expected given to be a dict from sites to tensors, got list"
    ),
    "unknown": (
        {"given": {"t": 1}}, ValueError, r"names the site 't'; there are \['c', 'x', 'z'\]"
    ),
    "unknown in mask": ({"mask": {"t": torch.tensor(True)}}, ValueError, "names the site 't'"),
    "shape": (
        {"given": {"c": torch.zeros(3)}},
        ValueError,
        r"given value of site 'c' has shape \(3,\), which doesn't broadcast .* \(4,\)",
    ),
    "mask shape": (
        {"mask": {"x": torch.ones(3, dtype=torch.bool)}},
        ValueError,
        r"mask of site 'x' has shape \(3,\), which doesn't broadcast .* \(4, 2\)",
    ),
    "mask type": (
        {"mask": {"x": torch.ones(2)}},
        TypeError,
        "mask of site 'x' to be a tensor of bool, .* got torch.float",
    ),
    "mask no tensor": ({"mask": {"x": True}}, TypeError, "to be a tensor of bool, .* got bool"),
    "mask of a latent": (
        {"given": {}, "mask": {"c": torch.tensor(True)}}, ValueError, "holds no value of site 'c'"
    ),
    "support": (
        {"given": {"c": 3}},
        ValueError,
        r"given value of site 'c' lies outside the support of its distribution, IntegerInterval",
    ),
    "support of a bit": ({"given": {"x": 0.5}}, ValueError, "'x' lies outside the support"),
    "fraction of a class": ({"given": {"c": 1.5}}, ValueError, "'c' lies outside the support"),
    "nan": ({"given": {"x": torch.nan}}, ValueError, "'x' lies outside the support"),
    "all": (
        {"given": {"c": 1, "z": 1.0}, "mask": {"x": torch.tensor(True)}},
        ValueError,
        "There is nothing left to draw",
    ),
    "steps": ({"num_steps": 0}, ValueError, "Expected num_steps to be an integer of at least 1"),
    "burn-in": (
        {"burn_in": -1}, ValueError, "Expected burn_in to be an integer of at least 0, got -1"
    ),
    "thin": ({"thin": 1.0}, ValueError, "Expected thin to be an integer of at least 1, got 1.0"),
    "no round": (
        {"num_steps": 5, "burn_in": 4, "thin": 2}, ValueError, "No round is kept: num_steps=5"
    ),
    "start": ({"start": "prior"}, ValueError, "Expected start='dream' or 'data', got 'prior'"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "message"), OPTIONS.values(), ids=OPTIONS.keys())
def test_impossible_options_are_refused(options, kind, message):
    limiting = Classes().limiting()
    options = {"given": {"c": 1}} | options
    options = {"num_steps": 2} | options
    with pytest.raises(kind, match=message):
        limiting.sample(1, torch.zeros(4, 2), **options)
    with pytest.raises(kind, match=message):
        limiting.complete(torch.zeros(4, 2), **options)
    with pytest.raises(kind, match=message):
        limiting.diagnose({"c": lambda state: state["c"]}, 2, torch.zeros(4, 2), **options)


def test_impossible_numbers_of_samples_are_refused():
    limiting, x = Classes().limiting(), torch.zeros(4, 2)
    with pytest.raises(ValueError, match="Expected num_samples to be an integer of at least 1"):
        limiting.sample(0, x)
    with pytest.raises(ValueError, match="num_samples to be a multiple of the 5 draws .* got 7"):
        limiting.sample(7, x, num_steps=10, burn_in=5)
    with pytest.raises(ValueError, match="Expected num_samples to be an integer of at least 1"):
        limiting.complete(x, given={"c": 1}, num_samples=0)
    with pytest.raises(ValueError, match="Expected num_chains to be an integer of at least 1"):
        limiting.diagnose({"c": lambda state: state["c"]}, 0, x)
    with pytest.raises(ValueError, match="Nothing is known to complete"):
        limiting.complete(x)
    with pytest.raises(ValueError, match="Expected one Batch at most, got 2"):
        limiting.sample(1, Batch(x), Batch(x))


def test_a_pair_or_conditionals_are_needed():
    with pytest.raises(TypeError, match="Expected a model and a guide, or Conditionals"):
        LimitingDistribution(gauss_model)
    with pytest.raises(TypeError, match="Expected Conditionals alone"):
        LimitingDistribution(Triple().conditionals(), gauss_guide)


# Programs and batches that chains can't take


def test_observed_latents_are_refused():
    ladder = Ladder()
    limiting = LimitingDistribution(ladder.model, ladder.guide)
    with pytest.raises(
        ValueError, match=r"observes the latents \['z0'\] .* clamp them with given"
    ):
        limiting.sample(1, Batch(torch.zeros(2, 3), z0=torch.zeros(2, 2)))


def test_obs_mask_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=torch.tensor([True, False]))

    with pytest.raises(ValueError, match=r"sites \['x'\] are split by obs_mask=.* by mask="):
        LimitingDistribution(model, gauss_guide).sample(1, torch.zeros(2))


def test_subsamples_are_refused():
    def model(x):
        with pyro.plate("data", 4, subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x):
        with pyro.plate("data", 4, subsample_size=2) as rows:
            pyro.sample("z", dist.Normal(x[rows], 1.0))

    with pytest.raises(ValueError, match="need all rows in each round, but a plate is subsampled"):
        LimitingDistribution(model, guide).sample(1, torch.zeros(4))


def test_guides_that_ignore_the_data_are_refused():
    with pytest.raises(ValueError, match="The guide ignores the data"):
        LimitingDistribution(gauss_model, AutoNormal(gauss_model)).sample(1, torch.zeros(2))


def test_without_rows_there_is_one_chain():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand([3]).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x.mean(), 1.0))

    limiting = LimitingDistribution(model, guide)
    draws = limiting.sample(4, torch.zeros(3), num_steps=5, burn_in=1)
    assert {name: value.shape for name, value in draws.items()} == {"z": (4,), "x": (4, 3)}
    message = "can't run 4 chains for each row of the batch: no vectorised plate .* Pass a batch"
    with pytest.raises(ValueError, match=message):
        limiting.sample(4, torch.zeros(3), num_steps=5)


def test_rows_that_come_from_elsewhere_are_told():
    c = torch.arange(3.0)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(c, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    limiting = LimitingDistribution(model, gauss_guide)
    assert limiting.sample(1, torch.zeros(3), num_steps=2)["z"].shape == (1, 3)
    with pytest.raises(ValueError, match="can't run 2 chains for each row"):
        limiting.sample(2, torch.zeros(3), num_steps=2)


def test_sites_must_keep_their_shapes():
    calls = []

    def model(x):
        calls.append(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("more", len(x) + (len(calls) > 8)):
            pyro.sample("x", dist.Normal(z.mean(), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(x.mean(), 1.0))

    with pytest.raises(ValueError, match=r"Expected site 'x' to have shape \(3,\), got \(4,\) in"):
        LimitingDistribution(model, guide).sample(1, torch.zeros(3), num_steps=20)


def test_sites_must_be_there_in_each_round():
    calls = []

    def model(x):
        calls.append(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if len(calls) < 20:  # more than are needed to look at the programs
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"Expected the programs to sample \['x'\] in each run"):
        LimitingDistribution(model, gauss_guide).sample(1, torch.zeros(3), num_steps=20)


# NaN


def test_divergence_is_told():
    """x grows by 1e60 in a round, beyond 1.8e308 in the sixth."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(1.0, 0.1))
            pyro.sample("x", dist.Normal(1e30 * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(1e30 * x, 1.0))

    limiting = LimitingDistribution(model, guide)
    with pytest.raises(ValueError, match="meets NaN or infinity in round 6 at site 'x'"):
        limiting.sample(2, torch.zeros(2), num_steps=20)


@pytest.mark.parametrize("validation", [True, False])
def test_broken_distributions_are_told(validation):
    """x counts the rounds, and the square root of 5.5 - x is NaN in the sixth."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1e-3))
            pyro.sample("b", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z + 1, 1e-3), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1e-3))
            pyro.sample("b", dist.Bernoulli(logits=(5.5 - x).sqrt()))

    limiting = LimitingDistribution(model, guide)
    message = "meets NaN in round 6: the distribution of site 'b' has NaN parameters"
    with pyro.validation_enabled(validation), pytest.raises(ValueError, match=message):
        limiting.sample(2, torch.zeros(2), num_steps=20)


def test_other_failures_tell_the_round():
    def guide(x):
        if x.max() > 4.5:
            raise RuntimeError("too much")
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1e-3))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1e-3))
            pyro.sample("x", dist.Normal(z + 1, 1e-3), obs=x)

    with pytest.raises(ValueError, match="A program fails in round 5 of the chain: too much"):
        LimitingDistribution(model, guide).sample(1, torch.zeros(2), num_steps=20)


def test_nan_in_the_data_is_told():
    limiting = LimitingDistribution(gauss_model, gauss_guide)
    x = torch.tensor([0.0, torch.nan])
    with pytest.raises(ValueError, match="in round 0 at site 'x'"):
        limiting.sample(1, x, num_steps=2, start="data")
    limiting.sample(1, x, num_steps=2)

    triple, x = Triple().limiting(), torch.tensor([[0.0, torch.nan]])
    with pytest.raises(ValueError, match="in round 0 at site 'x'"):
        triple.sample(1, Batch(x=x), num_steps=2, start="data")
    triple.sample(1, Batch(x=x), num_steps=2)


def test_the_program_of_a_conditional_that_breaks_is_told():
    def p_a(b):
        with pyro.plate("rows", len(b)):
            pyro.sample("a", dist.Bernoulli(logits=(4.5 - b).sqrt()))

    def p_b(a, b=None):
        with pyro.plate("rows", len(a)):
            pyro.sample("b", dist.Normal(100.0, 1.0))

    limiting = LimitingDistribution(Conditionals({"a": p_a, "b": p_b}))
    with pytest.raises(ValueError, match="NaN in round 2: the distribution of site 'a' has NaN"):
        limiting.sample(1, Batch(b=torch.zeros(3)), num_steps=9)


# Completion


def test_completion_of_discrete_data():
    """Frequencies of 200 chains of 500 rounds, whose standard error is below 0.004."""
    ladder = Classes()
    known = {"x0": 1}
    limit = ladder.law.after(100, known)
    x = torch.tensor([[1.0, torch.nan]]).expand(2, 2)
    completion = ladder.limiting().complete(
        x, mask={"x": torch.tensor([True, False])}, num_samples=200, num_steps=500, burn_in=50
    )
    marginals = completion.marginals
    for row in range(2):
        c = ladder.law.marginal(limit, "c")
        assert (marginals["c"].probs[row] - c).abs().max() < 0.02
        for i in range(2):
            z, one = (ladder.law.marginal(limit, f"{name}{i}")[1] for name in "zx")
            assert abs(marginals["z"].probs[row, i] - z) < 0.02
            assert abs(marginals["x"].probs[row, i] - one) < 0.02
        assert completion.decide()["c"][row] == c.argmax()
    assert completion.samples["c"].shape == (200, 2)
    assert {n: v.shape for n, v in completion.decide().items()} == {
        "c": (2,), "z": (2, 2), "x": (2, 2)
    }  # fmt: skip
    assert {n: v.dtype for n, v in completion.decide().items()} == {
        n: v.dtype for n, v in completion.samples.items()
    }
    assert marginals["c"].mean is marginals["c"].variance is None


def test_marginals_are_those_of_the_draws():
    """The same rounds, kept by sample() at the same seed."""
    options = {"given": {"x": 1.0}, "num_steps": 30, "burn_in": 10, "thin": 2}
    pyro.set_rng_seed(3)
    draws = one_hot_pair().sample(50, torch.zeros(3), **options)
    pyro.set_rng_seed(3)
    completion = one_hot_pair().complete(torch.zeros(3), num_samples=5, **options)
    torch.testing.assert_close(completion.samples["z"], draws["z"][9::10])
    marginals, decisions = completion.marginals, completion.decide()
    torch.testing.assert_close(marginals["y"].probs, draws["y"].mean(0))
    torch.testing.assert_close(decisions["y"].argmax(-1), draws["y"].mean(0).argmax(-1))
    assert (decisions["y"].sum(-1) == 1).all()
    counts = torch.nn.functional.one_hot(draws["s"], 4).double().mean(0)
    torch.testing.assert_close(marginals["s"].probs, counts)
    assert decisions["s"].dtype == draws["s"].dtype
    torch.testing.assert_close(marginals["n"].mean, draws["n"].mean(0))
    torch.testing.assert_close(marginals["z"].mean, draws["z"].mean(0))
    torch.testing.assert_close(marginals["z"].variance, draws["z"].var(0, correction=0))
    torch.testing.assert_close(decisions["z"], draws["z"].mean(0))
    assert marginals["z"].probs is None


def one_hot_pair():
    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(3)))
            s = pyro.sample("s", dist.Categorical(torch.ones(4)).mask(True))
            n = pyro.sample("n", dist.Poisson(3.0))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(y[:, 0] + s + n + z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.OneHotCategorical(logits=torch.outer(x, torch.arange(3.0))))
            pyro.sample("s", dist.Categorical(logits=torch.outer(x, torch.arange(4.0))))
            pyro.sample("n", dist.Poisson(x.exp()))
            pyro.sample("z", dist.Normal(x + 1e4, 1e-2))

    return LimitingDistribution(model, guide)


def test_moments_of_a_gaussian_pair():
    """10 000 chains of 100 rounds; within 5 standard errors of 10 000 independent draws."""
    n = 10_000
    draws = GAUSS.sample(n, torch.zeros(1), num_steps=40)
    for name, mean, var in [("z", MEAN_Z, VAR_Z), ("x", MEAN_X, VAR_X)]:
        assert abs(draws[name].mean() - mean) < 5 * math.sqrt(var / n)
        assert abs(draws[name].var() - var) < 5 * math.sqrt(2 / n) * var
    # Given x, z is N(B x, S²) in each round.
    completion = GAUSS.complete(
        torch.tensor([3.0, -1.0]), mask={"x": torch.tensor(True)}, num_samples=100, num_steps=200
    )
    z = completion.marginals["z"]
    assert ((z.mean - B * torch.tensor([3.0, -1.0])).abs() < 5 * S / n**0.5).all()
    assert ((z.variance - S**2).abs() < 5 * math.sqrt(2 / n) * S**2).all()
    assert (completion.marginals["x"].variance == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_marginals_add_up_in_any_precision(dtype, device):
    """Round by round, although each of 3,000 adds less than a step from a number to the next."""
    p = torch.tensor([0.2, 0.3, 0.5], dtype=dtype, device=device)
    laws = dist.Bernoulli(p), dist.OneHotCategorical(p), dist.Categorical(p), dist.Normal(p, p)
    for law in laws:
        draws, running = law.sample((3000,)), RunningMarginal(law)
        for each in draws.split(1):
            running.update(each)
        marginal, exact = running.result(), draws.double()
        assert marginal.decision.dtype == draws.dtype
        if isinstance(law, dist.Normal):
            found, expected = (marginal.mean, marginal.variance), (exact.mean(0), exact.var(0))
        elif isinstance(law, dist.Categorical):
            found, expected = (marginal.probs,), (draws.bincount().double() / 3000,)
        else:
            found, expected = (marginal.probs,), (exact.mean(0),)
        assert {x.dtype for x in found} == {dtype}
        torch.testing.assert_close([x.double() for x in found], list(expected), rtol=0.01, atol=0)


def test_an_image_is_segmented_by_maximum_marginals():
    """Three conditionals, where s copies x but for noise, and x is hidden in part."""

    def p_s(x, z):
        with pyro.plate("rows", len(x)):
            pyro.sample("s", dist.Categorical(logits=5.0 * torch.stack([-x, x], -1)).to_event(1))

    def p_x(s, z):
        with pyro.plate("rows", len(s)):
            loc = 2.0 * s - 1 + 0 * z[:, None]
            pyro.sample("x", dist.Normal(loc, 0.3).to_event(1))

    def q(x, s):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=x.sum(-1)))

    def prior(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("s", dist.Categorical(torch.ones(4, 2)).to_event(1))

    conditionals = Conditionals({"s": p_s, "x": p_x, "z": q}, prior=prior)
    x = torch.tensor([[1.0, -1.0, torch.nan, 1.0], [-1.0, -1.0, 1.0, torch.nan]])
    completion = LimitingDistribution(conditionals).complete(
        Batch(x=x), mask={"x": x.isfinite()}, num_samples=20, num_steps=50
    )
    assert completion.marginals["s"].probs.shape == (2, 4, 2)
    seen = x.isfinite()
    assert (completion.decide()["s"][seen] == (x[seen] > 0)).all()
    torch.testing.assert_close(completion.marginals["x"].mean[seen], x[seen])
    # The chain of a hidden pixel hardly leaves the value that it starts at.
    assert (completion.marginals["s"].probs[~seen] - 0.5).abs().max() < 0.5


# Diagnostics


def test_functions_are_followed_by_chain_and_draw():
    x = torch.zeros(2)
    functionals = {"z": lambda state: state["z"], "both": lambda s: torch.stack([*s.values()], -1)}
    pyro.set_rng_seed(5)
    found = GAUSS.diagnose(functionals, 3, x, num_steps=20, burn_in=10, thin=2)
    assert {n: v.shape for n, v in found.values.items()} == {"z": (3, 5, 2), "both": (3, 5, 2, 2)}
    pyro.set_rng_seed(5)
    draws = GAUSS.sample(15, x, num_steps=20, burn_in=10, thin=2)
    torch.testing.assert_close(found.values["z"].flatten(0, 1), draws["z"])


def test_functions_must_return_rows():
    with pytest.raises(ValueError, match=r"'z' to return .* the 6 rows of all chains, got \(\)"):
        GAUSS.diagnose({"z": lambda state: state["z"].mean()}, 3, torch.zeros(2), num_steps=4)
    with pytest.raises(ValueError, match="the 6 rows of all chains, got float"):
        GAUSS.diagnose({"z": lambda s: s["z"].mean().item()}, 3, torch.zeros(2), num_steps=4)
    for functionals in ({}, [len]):
        with pytest.raises(TypeError, match="Expected functionals to be a dict .* got"):
            GAUSS.diagnose(functionals, 3, torch.zeros(2))


def test_arviz_measures_the_mixing():
    r"""The number of independent draws that the chains are worth is known.

    z is autoregressive with factor f = A B. A draw after the round t is z_t or z_{t-1} with even
    chances, so draws k > 0 rounds apart correlate by f^{k-1} (1 + f)² / 4, and n draws are worth
    n / (1 + (1 + f)² / (2 - 2 f)).
    """
    pytest.importorskip("arviz")
    import arviz

    found = GAUSS.diagnose({"z": lambda s: s["z"]}, 4, torch.zeros(2), num_steps=4_000)
    f = A * B
    expected = 4 * 2_000 / (1 + (1 + f) ** 2 / (2 - 2 * f))
    ess, r_hat = found.ess()["z"], found.r_hat()["z"]
    assert ess.shape == r_hat.shape == (2,)
    assert ((ess / expected - 1).abs() < 0.15).all()
    assert (r_hat < 1.01).all()
    if arviz.__version__ < "1":
        draws = found.values["z"][..., 0].numpy()
        assert ess[0] == arviz.ess(draws, method="bulk")
        assert r_hat[0] == arviz.rhat(draws, method="split")
    assert found.to_inference_data().posterior["z"].shape == (4, 2_000, 2)


def test_chains_that_stick_are_seen():
    pytest.importorskip("arviz")

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=100 * (x - 0.5)))

    limiting = LimitingDistribution(model, guide)
    found = limiting.diagnose({"x": lambda s: s["x"]}, 8, torch.zeros(1), num_steps=100)
    assert found.r_hat()["x"] > 2


def test_missing_packages_are_told(monkeypatch):
    found = GAUSS.diagnose({"z": lambda s: s["z"]}, 2, torch.zeros(1), num_steps=8)
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r"pip install arviz, or .*pyro_symeq\[diagnostics\]"):
        found.ess()
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="A progress bar needs tqdm. Run: pip install tqdm"):
        GAUSS.sample(1, torch.zeros(1), num_steps=8, progress=True)


def test_progress_is_shown(capsys):
    pytest.importorskip("tqdm")
    GAUSS.sample(1, torch.zeros(1), num_steps=8, progress=True)
    assert "8/8" in capsys.readouterr().err
    GAUSS.sample(1, torch.zeros(1), num_steps=8)
    assert capsys.readouterr().err == ""


# States


class Networks(nn.Module):
    """A pair with batch normalisation and dropout."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout())
        self.encoder = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((2,), 0.5)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))

    def state(self):
        return {name: value.clone() for name, value in self.state_dict().items()}


def test_chains_run_where_the_programs_are(device):
    networks = Networks().to(device)
    limiting = LimitingDistribution(networks.model, networks.guide)
    x = torch.zeros(4, 4, device=device)
    before = networks.state()
    draws = limiting.sample(6, x, num_steps=4, burn_in=1)
    completion = limiting.complete(
        x,
        mask={"x": torch.tensor([True, True, False, False], device=device)},
        given={"z": [0, 1]},
        num_steps=3,
    )
    found = limiting.diagnose({"x": lambda s: s["x"].sum(-1)}, 2, x, num_steps=8)
    for value in [*draws.values(), *completion.decide().values(), *found.values.values()]:
        assert value.device.type == device.type
        assert not value.requires_grad
    assert completion.samples["z"].dtype is x.dtype
    assert all(torch.equal(value, before[name]) for name, value in networks.state().items())
    assert networks.training
    assert all(p.grad is None for p in networks.parameters())


def test_the_type_is_that_of_the_programs():
    networks = Networks().float()
    limiting = LimitingDistribution(networks.model, networks.guide)
    x = torch.zeros(4, 4, dtype=torch.float32)
    draws = limiting.sample(2, x, num_steps=2)
    completion = limiting.complete(x, given={"x": 1}, num_steps=2)
    values = [*draws.values(), completion.marginals["z"].probs, *completion.decide().values()]
    assert all(value.dtype is torch.float32 for value in values)


def test_draws_can_be_repeated():
    """What is found out on the side leaves the random state alone, whatever the chains are."""
    networks = Networks()
    limiting = LimitingDistribution(networks.model, networks.guide)
    x = torch.zeros(4, 4)
    pyro.set_rng_seed(1)
    first = limiting.sample(4, x, num_steps=3)
    second = limiting.sample(4, x, num_steps=3)
    pyro.set_rng_seed(1)
    again = limiting.sample(4, x, num_steps=3)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="outside the support"):
        limiting.sample(4, x, given={"z": 2.0})
    assert torch.equal(torch.get_rng_state(), state)


# What a round costs


class Alive(TorchDispatchMode):
    """Counts the tensors that are alive at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.now += 1
                weakref.finalize(x, self.free)
        self.most = max(self.most, self.now)
        return result

    def free(self):
        self.now -= 1


def small_pair():
    ladder = Ladder()
    return LimitingDistribution(ladder.model, ladder.guide)


@pytest.mark.parametrize("method", ["sample", "complete"])
def test_memory_does_not_grow_with_the_rounds(method):
    limiting, x = small_pair(), torch.zeros(2, 3)
    most = []
    for num_steps in (10, 100):
        gc.collect()
        with Alive() as alive:
            if method == "sample":
                limiting.sample(2, x, num_steps=num_steps)
            else:
                limiting.complete(x, given={"x": 1.0}, num_steps=num_steps)
        most.append(alive.most)
    assert most[1] <= most[0] + 20


def test_time_hardly_grows_with_the_chains():
    """A round of 2 000 chains takes about as long as one of a single chain; 50 times at most."""
    limiting, x = small_pair(), torch.zeros(1, 3)

    def seconds(num_chains):
        start = time.perf_counter()
        limiting.sample(num_chains, x, num_steps=100)
        return time.perf_counter() - start

    seconds(1)
    one, many = (min(seconds(n) for _ in range(3)) for n in (1, 2_000))
    assert many < one * 2_000 / 50


@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_support_that_depends_on_draws_is_no_reason_to_refuse(num_samples):
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, 10.0))
            pyro.sample("x", dist.Uniform(0.0, z), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Uniform(x, 10.0))

    for seed in range(8):
        pyro.set_rng_seed(seed)
        completion = LimitingDistribution(model, guide).complete(
            torch.tensor([5.0]),
            mask={"x": torch.tensor(True)},
            num_steps=4,
            num_samples=num_samples,
        )
        assert (completion.samples["z"] >= 5).all()


def test_thinned_chains_give_their_last_state():
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=x))

    limiting = LimitingDistribution(model, guide)
    assert limiting.sample(3, torch.zeros(2), num_steps=7, thin=3)["x"].shape == (3, 2)
