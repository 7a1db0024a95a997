"""The utilities and their gradients are exact for random programs: all draws are enumerated."""

import pyro
import torch
from hypothesis import example, given, settings

from pyro_symeq import SymmetricUtility
from tests.random_programs import (
    Case,
    Variable,
    cases,
    enumerate_draws,
    enumerate_rows,
    utilities,
)

# Each program takes many runs, so there are fewer of them than the profile says.
some = settings(max_examples=settings.default.max_examples // 4)
few = settings(max_examples=settings.default.max_examples // 8)

FEW_STATES = {1: 8, 2: 6, 3: 4}

# The latent is observed (obs_mask=) in a row that the model's own mask leaves out of log p.
MASKED_TWICE = Case(
    variables=tuple(
        Variable(name, "bernoulli", 2, (), torch.float64, as_given=True, scales=(1.0, 1.0))
        for name in "ab"
    ),
    latents=("b",),
    shared=frozenset(),
    given={"a": (0,), "b": (1,)},
    given_rows={"b": (True,)},
    rows=1,
    plate="vectorised",
    stretch=1,
    masks=((False,), None),
    factor=None,
    deterministic=False,
    marks=False,
    registered="param",
    passing="keywords",
    bound=False,
    supervise_encoder=True,
    seed=0,
)


def prepare(case):
    """The objective, once it knows the pair."""
    pyro.clear_param_store()
    objective = SymmetricUtility(bind=case.bind(), supervise_encoder=case.supervise_encoder)
    programs = case.programs()
    everything = {v.name: (v.states - 1,) * case.rows for v in case.variables}
    for batch in (everything, case.given):  # one kind of batch must not stand for another
        args, kwargs = case.call(batch)
        objective.loss(*programs, *args, **kwargs)
    return objective, programs


def expectation(runs, parameters):
    """A player's expected utility, and its gradient in some parameters, which it has to own."""
    total = utility = torch.zeros(())
    gradients = {leaf: torch.zeros_like(leaf) for leaf in parameters}
    for probability, score in runs:
        total = total + probability
        utility = utility + probability * score.utility.detach()
        leaves = [*score.parameters.values(), *score.unnamed]
        for leaf, gradient in zip(leaves, score.gradients(leaves), strict=True):
            if gradient is not None:
                gradients[leaf] -= probability * gradient
    assert_equal(total, torch.ones(()))
    return utility, [gradients[leaf] for leaf in parameters]


def assert_equal(seen, expected):
    torch.testing.assert_close(seen, expected, rtol=1e-9, atol=1e-9)


def gradient(utility, parameters):
    if not utility.requires_grad:
        return [torch.zeros_like(leaf) for leaf in parameters]
    return torch.autograd.grad(utility, parameters, materialize_grads=True)


def check_players(case, enumerate_runs):
    objective, programs = prepare(case)
    stage = objective.stage(*programs)
    players = {"decoder": case.theta, "encoder": case.phi}
    for (player, own), expected in zip(players.items(), utilities(case), strict=True):
        parameters = list(own.values())
        utility, gradients = expectation(
            enumerate_runs(lambda player=player: stage.score(player, case.call())), parameters
        )
        assert_equal(utility, expected.detach())
        for seen, wanted in zip(gradients, gradient(expected, parameters), strict=True):
            assert_equal(seen, wanted)


@some
@given(cases("latents"))
def test_players_with_data_and_some_latents(case):
    check_players(case, enumerate_draws)


@some
@given(cases("missing"))
def test_players_with_missing_data(case):
    check_players(case, enumerate_draws)


@few
@example(MASKED_TWICE)
@given(cases("rows", rows=(1, 2, 2, 3), most_states=FEW_STATES))
def test_players_with_latents_in_some_rows(case):
    # Pyro draws what it splits by obs_mask= twice, so that there are too many ways for all rows.
    check_players(case, lambda play: enumerate_rows(play, case.rows))


@few
@given(cases("latents", rows=(1,), most_states=FEW_STATES))
def test_objective(case):
    objective, programs = prepare(case)
    args, kwargs = case.call()
    parameters = [*case.theta.values(), *case.phi.values()]
    loss = torch.zeros(2)
    gradients = [torch.zeros_like(leaf) for leaf in parameters]
    for probability, seen in enumerate_draws(
        lambda: objective.loss_and_grads(*programs, *args, **kwargs)
    ):
        loss += probability * torch.tensor([seen.decoder, seen.encoder])
        for total, leaf in zip(gradients, parameters, strict=True):
            if leaf.grad is not None:
                total -= probability * leaf.grad
                leaf.grad = None
    expected = utilities(case)
    assert_equal(loss, torch.stack(expected).detach())
    wanted = [
        *gradient(expected[0], list(case.theta.values())),
        *gradient(expected[1], list(case.phi.values())),
    ]
    for total, exact in zip(gradients, wanted, strict=True):
        assert_equal(total, exact)
