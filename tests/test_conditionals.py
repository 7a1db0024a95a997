from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_symeq import Batch, Conditionals, LimitingDistribution, passes, tracing

STATE = {name: torch.full((2,), float(i)) for i, name in enumerate("sxyz")}


def draws(*names, rows=2):
    """Samples these sites."""
    for name in names:
        with pyro.plate(f"rows of {name}", rows):
            pyro.sample(name, dist.Normal(0.0, 1.0))


def p_s(x, y, z):
    draws("s")


def p_x(s):
    draws("x")


def q(x, s):
    draws("y", "z")


def test_blocks_and_their_parents():
    conditionals = Conditionals({"s": p_s, "x": p_x, ("y", "z"): q})
    assert conditionals.blocks == {"s": ("s",), "x": ("x",), "y, z": ("y", "z")}
    assert conditionals.variables == ("s", "x", "y", "z")
    assert conditionals.programs["y, z"] is q
    assert conditionals.parents == {"s": ("x", "y", "z"), "x": ("s",), "y, z": ("x", "s")}
    assert repr(conditionals) == "Conditionals(s | x, y, z; x | s; y, z | x, s)"


def everything(**state):
    draws("s")


def some(x, scale=2.0, *args, s=None, **state):
    draws("s")


def fixed(x, y, z):
    draws("s")


class Module(nn.Module):
    def forward(self, x, z):
        draws("s")


TAKES = {
    "nothing": (lambda: draws("s"), []),
    "all by **kwargs": (everything, ["x", "y", "z"]),
    "a variable with a default": (lambda x=None: draws("s"), ["x"]),
    "others by **kwargs, defaults kept": (some, ["x", "y", "z"]),
    "a module's forward": (Module(), ["x", "z"]),
    "what partial leaves": (partial(fixed, y=1.0), ["x", "z"]),
    "within a handler": (poutine.scale(fixed, 2.0), ["x", "y", "z"]),
}


@pytest.mark.parametrize(("program", "names"), TAKES.values(), ids=TAKES.keys())
def test_arguments_go_by_name(program, names):
    conditionals = Conditionals({"s": program, "x": p_x, ("y", "z"): q})
    arguments = conditionals.arguments("s", STATE)
    assert sorted(arguments) == names
    assert all(arguments[name] is STATE[name] for name in names)
    program(**arguments)


def test_values_are_those_of_the_block():
    def program(s):
        pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        draws("x")
        pyro.deterministic("twice", torch.ones(2))

    conditionals = Conditionals({"s": p_s, "x": program, ("y", "z"): q})
    trace = tracing.run(program, ((), conditionals.arguments("x", STATE)))
    assert conditionals.values("x", passes.drawn(trace)).keys() == {"x"}


def test_the_prior_takes_what_there_is():
    conditionals = Conditionals({"x": p_x, "s": everything}, prior=lambda x, s=None: draws("s"))
    assert conditionals.prior_arguments({"x": 1}) == {"x": 1}
    with pytest.raises(ValueError, match=r"The prior takes \['x'\]. Give them in the batch"):
        conditionals.prior_arguments({"s": 1})


def positional_only(x, /):
    draws("s")


REFUSED = {
    "no dict": ([p_s], TypeError, r"Expected programs to be a dict .* got \[<function p_s"),
    "no block": ({}, TypeError, "an entry for each block, got {}"),
    "no name": ({1: p_s}, TypeError, "Expected a block to be a site or a tuple of sites, got 1"),
    "no site": ({(): p_s}, TypeError, r"or a tuple of sites, got \(\)"),
    "no program": ({"s": 3}, TypeError, "the program of block 's' to be a function .* got int"),
    "two draw one": (
        {"s": p_x, ("s", "x"): q},
        ValueError,
        r"Several blocks draw the site 's': \['s', 's, x'\]. Let one draw it.",
    ),
    "one draws it twice": ({("s", "s"): lambda: draws("s")}, ValueError, "Several blocks draw"),
    "uncovered": (
        {"s": p_s, "x": p_x, "y": lambda: draws("y")},
        ValueError,
        "don't cover the variables: the program of block 's' takes 'z', which no conditional "
        "draws .* Add a conditional for it, or fix it with functools.partial.",
    ),
    "by position": (
        {"s": positional_only, "x": p_x},
        ValueError,
        "the program of block 's' takes 'x', which no conditional draws by that name",
    ),
    "its own": (
        {"s": p_x, "x": p_x},
        ValueError,
        "the program of block 's' takes 's', which it draws itself",
    ),
}


@pytest.mark.parametrize(("programs", "kind", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(programs, kind, message):
    with pytest.raises(kind, match=message):
        Conditionals(programs)


def test_the_prior_is_covered_too():
    with pytest.raises(ValueError, match="the prior takes 'rows', which no conditional draws"):
        Conditionals({"s": lambda: draws("s")}, prior=lambda rows: None)


RUN = {
    "no site": (lambda: draws("x"), r"program of block 's' never samples \['s'\]"),
    "further site": (lambda: draws("s", "t"), r"program of block 's' samples \['t'\] too"),
    "another block's": (lambda: draws("s", "x"), r"program of block 's' samples \['x'\] too"),
}


@pytest.mark.parametrize(("program", "message"), RUN.values(), ids=RUN.keys())
def test_what_is_refused_in_a_run(program, message):
    with pytest.raises(ValueError, match=message):
        LimitingDistribution(Conditionals({"s": program, "x": p_x})).sample(1)


def test_further_sites_of_the_prior_are_refused():
    conditionals = Conditionals({"s": lambda: draws("s")}, prior=lambda: draws("s", "t"))
    with pytest.raises(ValueError, match=r"The prior samples \['t'\] too"):
        LimitingDistribution(conditionals).sample(1)


def test_the_chains_need_a_start():
    """Neither x nor s can be drawn without the other."""
    conditionals = Conditionals({"s": lambda x: draws("s"), "x": p_x})
    limiting = LimitingDistribution(conditionals)
    message = r"can't start: \['s', 'x'\] are neither drawn by the prior nor given in the batch"
    with pytest.raises(ValueError, match=message):
        limiting.sample(1)
    with pytest.raises(ValueError, match=message):
        limiting.sample(1, Batch(x=torch.tensor([0.0, torch.nan])))
    for start in ("dream", "data"):
        limiting.sample(1, Batch(x=torch.zeros(2)), num_steps=2, start=start)
    limiting.sample(1, num_steps=2, given={"s": torch.zeros(2)})


@pytest.mark.parametrize("num_samples", [1, 3])
def test_chains_start_from_what_is_given(num_samples):
    def p_s(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("s", dist.Bernoulli(logits=4 * x - 2))

    def p_x(s):
        with pyro.plate("rows", len(s)):
            pyro.sample("x", dist.Normal(100 * s, 0.5))

    limiting = LimitingDistribution(Conditionals({"s": p_s, "x": p_x}))
    s = torch.tensor([1.0, 0.0])
    draws = limiting.sample(num_samples, num_steps=3, given={"s": s})
    assert torch.equal(draws["s"], s.expand(num_samples, 2))
    assert torch.equal((draws["x"] > 50).double(), draws["s"])


def test_the_batch_holds_variables():
    limiting = LimitingDistribution(Conditionals({"s": lambda: draws("s"), "x": p_x}))
    with pytest.raises(ValueError, match=r"The batch names \['t'\]; the variables are \['s', 'x'"):
        limiting.sample(1, Batch(t=torch.zeros(2)))
    with pytest.raises(TypeError, match=r"Expected values of variables by name, Batch\(x=x\)"):
        limiting.sample(1, torch.zeros(2))
    with pytest.raises(ValueError, match=r"Expected site 'x' to have shape \(2,\), got \(3,\)"):
        limiting.sample(1, Batch(x=torch.zeros(3)))


def test_a_network_draws_rows_and_copies(device):
    network = nn.Linear(3, 1, device=device)

    def p_y(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=network(x).squeeze(-1)))

    def p_x(y):
        with pyro.plate("rows", len(y)):
            law = dist.Normal(y[:, None].expand(-1, 3), 1.0)
            pyro.sample("x", law.to_event(1))

    limiting = LimitingDistribution(Conditionals({"y": p_y, "x": p_x}))
    draws = limiting.sample(6, Batch(x=torch.zeros(4, 3, device=device)), num_steps=3)
    assert draws["y"].shape == (6, 4)
    assert draws["x"].shape == (6, 4, 3)
    assert draws["x"].device.type == device.type
