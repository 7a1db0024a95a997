"""Runs under the one tracing handler, against those under Pyro's own handlers."""

from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.infer.reparam import LocScaleReparam
from torch import nn

from pyro_symeq import SymmetricEquilibrium, passes
from pyro_symeq.passes import Observation
from pyro_symeq.tracing import Record, run

X = torch.arange(6, dtype=torch.float64).reshape(3, 2) / 6


def loc():
    return pyro.param("loc", torch.tensor(0.3))


def plain():
    z = pyro.sample("z", dist.Normal(loc(), 1.0))
    return pyro.sample("x", dist.Normal(z, pyro.param("scale", torch.tensor(2.0))), obs=X[0, 0])


def plates():
    with pyro.plate("columns", 2, dim=-1):
        a = pyro.sample("a", dist.Normal(loc(), 1.0))
        with pyro.plate("rows", 3, dim=-2):
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0), obs=X)


def sequential_plate():
    for i in pyro.plate("rows", 3):
        z = pyro.sample(f"z {i}", dist.Normal(loc(), 1.0))
        pyro.sample(f"x {i}", dist.Normal(z, 1.0).expand([2]).to_event(1), obs=X[i])


def subsampled():
    with pyro.plate("rows", 30, subsample_size=3) as rows:
        z = pyro.sample("z", dist.Normal(loc() + rows, 1.0))
        pyro.sample("x", dist.Normal(z[:, None], 1.0).expand([3, 2]).to_event(1), obs=X)


def subsampled_in_order():
    for i in pyro.plate("rows", 5, subsample_size=2):
        pyro.sample(f"z {i}", dist.Normal(loc(), 1.0))


def given_subsample():
    with pyro.plate("rows", 30, subsample=torch.tensor([4, 2, 7])):
        pyro.sample("x", dist.Normal(loc(), 1.0), obs=X[:, 0])


def obs_mask():
    mask = torch.tensor([True, False, True])
    with pyro.plate("rows", 3):
        z = pyro.sample("z", dist.Normal(loc(), 1.0))
        y = pyro.sample("y", dist.Normal(z, 1.0), obs=X[:, 0], obs_mask=mask)
        pyro.sample("x", dist.Normal(y, 1.0), obs=X[:, 1])


def markov():
    z = torch.zeros(())
    for t in pyro.markov(range(3)):
        z = pyro.sample(f"z {t}", dist.Normal(z + loc(), 1.0))
        pyro.sample(f"x {t}", dist.Normal(z, 1.0), obs=X[t, 0])


def computed():
    z = pyro.sample("z", dist.Normal(loc(), 1.0))
    y = pyro.deterministic("y", z**2)
    pyro.factor("penalty", -y)
    pyro.factor("auxiliary", -z, has_rsample=False)


def scaled_and_masked():
    with poutine.scale(scale=0.5), pyro.plate("rows", 3):
        with poutine.mask(mask=torch.tensor([True, False, True])):
            z = pyro.sample("z", dist.Normal(loc(), 1.0))
            with poutine.scale(scale=torch.tensor([1.0, 2.0, 3.0])):
                pyro.sample("x", dist.Normal(z, 1.0).mask(z > 0), obs=X[:, 0])


def blocked():
    with poutine.block(hide=["hidden", "loc"]):
        z = pyro.sample("hidden", dist.Normal(loc(), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X[0, 0])
    with poutine.block():
        pyro.sample("hidden too", dist.Normal(0.0, 1.0))


def conditioned():
    poutine.condition(plain, data={"z": torch.tensor(0.7)})()


def intervened():
    poutine.do(plain, data={"z": torch.tensor(0.7)})()


def unconditioned():
    poutine.uncondition(plain)()


def reparametrised():
    poutine.reparam(plates, config={"b": LocScaleReparam(0.0)})()


def lifted():
    poutine.lift(plain, prior={"loc": dist.Normal(0.0, 1.0)})()


def traced_within():
    inner = poutine.trace(plain).get_trace()
    with scope(prefix="again"):
        poutine.replay(plain, trace=inner)()


def configured():
    poutine.infer_config(plates, config_fn=lambda site: {"colour": site["name"]})()


def auxiliary():
    z = pyro.sample("z", dist.Normal(loc(), 1.0), infer={"is_auxiliary": True})
    hidden = {"is_auxiliary": True, "_do_not_trace": True}
    pyro.sample("untraced", dist.Normal(0.0, 1.0), infer=hidden)
    pyro.sample("x", dist.Delta(z), obs=z)


def branching():
    if pyro.sample("coin", dist.Bernoulli(0.5)) > 0:
        pyro.sample("heads", dist.Normal(loc(), 1.0))
    else:
        pyro.sample("tails", dist.Gamma(pyro.param("rate", torch.tensor(2.0)), 1.0))


torch.manual_seed(0)
NET = nn.Linear(2, 2).double()


def modules():
    net = pyro.module("net", NET)
    with pyro.plate("rows", 3):
        pyro.sample("z", dist.Normal(net(X), 1.0).to_event(1))


PROGRAMS = [
    plain, plates, sequential_plate, subsampled, subsampled_in_order, given_subsample, obs_mask,
    markov, computed, scaled_and_masked, blocked, conditioned, intervened, unconditioned,
    reparametrised, lifted, traced_within, configured, auxiliary, branching, modules,
]  # fmt: skip
programs = pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)

OUTSIDE = {
    "nothing": nullcontext,
    "scale": lambda: poutine.scale(scale=0.3),
    "mask": lambda: poutine.mask(mask=False),
    "block": poutine.block,
    "trace": poutine.trace,
    "condition": lambda: poutine.condition(data={"z": torch.tensor(0.7)}),
    "condition x": lambda: poutine.condition(data={"x": torch.tensor(0.7)}),
    "uncondition": poutine.uncondition,
    "infer_config": lambda: poutine.infer_config(config_fn=lambda site: {"colour": site["name"]}),
    "reparam": lambda: poutine.reparam(config={"b": LocScaleReparam(0.0)}),
    "replay": lambda: poutine.replay(trace=poutine.trace(plain).get_trace()),
}
outside = pytest.mark.parametrize("outer", OUTSIDE)

NOTES = {"_obs_mask", "was_observed", "obs"}


def assert_same_trace(seen, expected):
    """Sites in the same order, with the same values, laws, scales, masks and plates."""
    assert list(seen.nodes) == list(expected.nodes)
    for name, site in expected.nodes.items():
        other = seen.nodes[name]
        assert site["type"] == other["type"]
        if site["type"] not in ("sample", "param"):
            continue
        torch.testing.assert_close(other["value"], site["value"], rtol=0, atol=0)
        assert torch.equal(torch.as_tensor(other["scale"]), torch.as_tensor(site["scale"]))
        assert other["mask"] is site["mask"] or torch.equal(
            torch.as_tensor(other["mask"]), torch.as_tensor(site["mask"])
        )
        assert other["is_observed"] == site["is_observed"]
        assert other["cond_indep_stack"] == site["cond_indep_stack"]
        if site["type"] == "sample":
            assert type(other["fn"]) is type(site["fn"])
            if hasattr(site["fn"], "shape"):
                assert other["fn"].shape() == site["fn"].shape()
            infer, others = ((s["infer"] or {}) for s in (site, other))
            assert others.keys() - NOTES == infer.keys() - NOTES
    torch.testing.assert_close(seen.log_prob_sum(), expected.log_prob_sum(), rtol=0, atol=0)


def both(seen, expected):
    """Two runs from the same random state."""
    pyro.set_rng_seed(3)
    trace = expected()
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    return seen(), trace


def assert_same_run(seen, expected):
    """The same trace, or the same error."""
    try:
        expected()
    except Exception as error:
        pyro.clear_param_store()
        with pytest.raises(type(error)):
            seen()
    else:
        pyro.clear_param_store()
        assert_same_trace(*both(seen, expected))


@outside
@programs
def test_a_record_is_the_trace_of_pyro(program, outer):
    def seen():
        with OUTSIDE[outer]():
            return run(program, ((), {}))

    def expected():
        with OUTSIDE[outer]():
            return poutine.trace(program).get_trace()

    assert_same_run(seen, expected)


@programs
def test_draws_are_those_of_pyro_at_the_same_seed(program):
    def expected():
        with torch.no_grad():
            return poutine.trace(program).get_trace()

    assert_same_trace(*both(lambda: passes.replay(program, ((), {}), {}), expected))


@programs
def test_replays_are_those_of_pyro(program):
    """But for a split site, whose parts are given as one."""
    values = poutine.trace(program).get_trace()

    def seen():
        return passes.replay(
            program,
            ((), {}),
            {n: site["value"] for n, site in values.nodes.items() if n[0] != "_"},
        )

    assert_same_trace(
        *both(seen, lambda: poutine.trace(poutine.replay(program, trace=values)).get_trace())
    )


@pytest.mark.parametrize(
    "program",
    [p for p in PROGRAMS if p not in (obs_mask, traced_within)],
    ids=lambda program: program.__name__,
)
def test_partial_replays_draw_the_rest_as_pyro_does(program):
    values = poutine.trace(program).get_trace()
    drawn = [n for n in values.stochastic_nodes if not values.nodes[n]["is_observed"]]
    part = values.copy()
    for name in drawn[::2]:
        part.remove_node(name)
    given = {n: site["value"] for n, site in part.nodes.items() if site["type"] == "sample"}

    def expected():
        with torch.no_grad():
            return poutine.trace(poutine.replay(program, trace=part)).get_trace()

    assert_same_trace(*both(lambda: passes.replay(program, ((), {}), given), expected))


@programs
def test_dreams_are_those_of_an_unconditioned_program(program):
    def seen():
        return passes.dream(program, ((), {})).trace

    def expected():
        with torch.no_grad():
            return poutine.trace(poutine.uncondition(program)).get_trace()

    got, trace = both(seen, expected)
    for name, site in trace.nodes.items():
        # A factor stays a factor, and what is computed is not drawn.
        if site["type"] == "sample" and name not in ("penalty", "auxiliary"):
            assert torch.equal(got.nodes[name]["value"], site["value"])
    assert list(got.nodes) == list(trace.nodes)


@pytest.mark.parametrize("program", [plates, sequential_plate, scaled_and_masked, markov, modules])
def test_given_values_are_those_of_a_conditioned_program(program):
    values = poutine.trace(program).get_trace()
    names = values.stochastic_nodes[::2]
    given = {n: values.nodes[n]["value"] for n in names if n not in ("rows", "columns")}

    def seen():
        observations = {n: Observation(x.detach()) for n, x in given.items()}
        return passes.fill_in(program, ((), {}), observations)

    def expected():
        with torch.no_grad():
            return poutine.trace(poutine.condition(program, data=given)).get_trace()

    got, trace = both(seen, expected)
    for name, site in trace.nodes.items():
        if site["type"] == "sample":
            assert torch.equal(got.nodes[name]["value"], site["value"])
            assert got.nodes[name]["is_observed"] == (site["is_observed"] and name not in given)
    torch.testing.assert_close(got.log_prob_sum(), trace.log_prob_sum())


@programs
def test_drawn_values_have_no_graph_and_scores_have_one(program):
    trace = passes.replay(program, ((), {}), {})
    for site in trace.variables.values():
        # A program may compute what it observes.
        assert site["is_observed"] or not site["value"].requires_grad
    names = list(trace.variables)
    total = sum(passes.log_probs(trace, names).values())
    counted = [s for s in trace.nodes.values() if s["type"] == "sample"]
    trace.compute_log_prob()
    of_pyro = sum(s["log_prob_sum"] for s in counted if s["name"] not in ("penalty", "auxiliary"))
    torch.testing.assert_close(torch.as_tensor(total), torch.as_tensor(of_pyro))


def test_a_split_site_is_recorded_as_one_variable():
    trace = run(obs_mask, ((), {}))
    assert list(trace.variables) == ["z", "y", "x"]
    assert trace.split["y"].tolist() == [True, False, True]
    assert trace.variables["y"] is trace.nodes["y_observed"]
    assert list(trace.subsamples) == ["rows"]
    assert list(trace.parameters) == ["loc"]


def test_names_that_end_like_parts_are_variables_of_their_own():
    def program():
        pyro.sample("y_observed", dist.Normal(0.0, 1.0))
        pyro.sample("y_unobserved", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0))

    assert list(run(program, ((), {})).variables) == ["y_observed", "y_unobserved", "y"]
    with poutine.mask(mask=torch.tensor(True)):
        assert list(run(program, ((), {})).variables) == ["y_observed", "y_unobserved", "y"]


def test_computed_sites_are_no_variables():
    trace = run(computed, ((), {}))
    assert list(trace.variables) == ["z"]
    assert passes.factors(trace) == ["penalty", "auxiliary"]
    assert list(run(reparametrised, ((), {})).variables) == ["a", "b_decentered", "x"]


def test_parameters_are_recorded_unconstrained():
    def program():
        pyro.param("p", torch.tensor(0.2), constraint=dist.constraints.unit_interval)
        pyro.module("net", NET)

    found = run(program, ((), {})).parameters
    assert list(found) == ["p", "net$$$weight", "net$$$bias"]
    assert found["p"].item() == pytest.approx(torch.tensor(0.2).logit().item())
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in found.values())
    assert found["net$$$weight"] is NET.weight


def test_a_record_keeps_the_call_and_what_came_back():
    trace = run(lambda x, *, y: (x, y), ((1,), {"y": 2}))
    assert isinstance(trace, Record)
    assert trace.nodes["_INPUT"]["args"] == (1,)
    assert trace.nodes["_INPUT"]["kwargs"] == {"y": 2}
    assert trace.nodes["_RETURN"]["value"] == (1, 2)


def test_untraced_sites_are_not_recorded():
    assert "untraced" not in run(auxiliary, ((), {}))
    assert list(passes.drawn(run(auxiliary, ((), {})))) == ["x"]


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_errors_carry_the_table_of_shapes(error):
    def program():
        with pyro.plate("rows", 3):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
        raise error("something is wrong")

    with pytest.raises(error, match=r"(?s)something is wrong.*Trace Shapes.*z dist +3 \|"):
        run(program, ((), {}))


def test_other_errors_come_as_they_are():
    def program():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        raise KeyError("lost")

    with pytest.raises(KeyError, match="^'lost'$"):
        run(program, ((), {}))


def test_a_step_tells_the_shapes_at_an_error():
    def model(x):
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Normal(loc(), 1.0))
            pyro.sample("x", dist.Normal(z, torch.ones(2)), obs=x)

    def guide(x):
        with pyro.plate("rows", 3):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(3)) + x.sum(), 1.0))

    symeq = SymmetricEquilibrium(model, guide, pyro.optim.SGD({"lr": 0.1}))
    with pytest.raises((ValueError, RuntimeError), match="(?s)Trace Shapes.*z dist"):
        symeq.step(X)


def test_names_that_come_twice_are_refused():
    def twice():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def as_parameter_too():
        pyro.param("z", torch.zeros(()))
        pyro.sample("z", dist.Normal(0.0, 1.0))

    for program in (twice, as_parameter_too):
        for go in (run, lambda p, call: passes.replay(p, call, {}), passes.dream):
            with pytest.raises(RuntimeError, match="(?s)z.*Trace Shapes"):
                go(program, ((), {}))


def test_parameters_may_come_twice():
    def program():
        pyro.sample("z", dist.Normal(loc() + loc(), 1.0))

    assert list(run(program, ((), {})).parameters) == ["loc"]


def test_no_handler_is_left_behind_by_an_error():
    def program():
        raise ValueError("stop")

    for go in (run, passes.dream):
        with pytest.raises(ValueError, match="stop"):
            go(program, ((), {}))
        assert not poutine.runtime._PYRO_STACK
    assert torch.is_grad_enabled()


def test_programs_may_run_programs_under_records():
    """A program that plays within a play: each run has its own trace."""
    inner = []

    def program():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        with poutine.block():
            inner.append(run(plain, ((), {})))
        pyro.sample("b", dist.Normal(0.0, 1.0))

    trace = run(program, ((), {}))
    assert list(trace.variables) == ["a", "b"]
    assert list(inner[0].variables) == ["z", "x"]
