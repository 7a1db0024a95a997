"""The two verbs of a play, and what a gradient of a utility reaches."""

import math
from copy import deepcopy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import affine_coupling
from pyro.optim import SGD, Adam
from torch import nn

from pyro_symeq import Game, Implicit, Player, SymmetricEquilibrium, SymmetricUtility
from pyro_symeq.play import Play, Stage
from tests.enumerable import Ladder, gradients, utilities
from tests.montecarlo import assert_mean
from tests.random_programs import enumerate_draws
from tests.test_random_programs import assert_equal, expectation

X = torch.tensor([[1, 0, 1]], dtype=torch.float64)


def play(**programs):
    return Stage(programs, {}).play()


def score(utility, claims=None, **programs):
    """A utility of the first of some players, at one draw."""
    first = next(iter(programs))
    return Stage(programs, {first: utility}, claims).score(first, ((), {}))


def everything(x, idx=None):
    """A program with a site of each kind."""
    loc = pyro.param("loc", lambda: x.new_zeros(()))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.deterministic("twice", 2 * z)
        pyro.factor("penalty", -(z**2))
        y = pyro.sample("y", dist.Bernoulli(logits=z), obs=torch.ones_like(x), obs_mask=x > 0)
        pyro.sample("x", dist.Normal(z + y, 1.0), obs=x)


# Sampling.


def test_sample_draws_random_variables_and_nothing_else(device):
    x = torch.tensor([1e6, 1e6, -1e6], device=device)
    drawn = play(p=everything).sample("p", x)
    assert drawn.keys() == {"z", "y", "x"}
    assert all(value.shape == (3,) for value in drawn.values())
    assert all(value.device.type == device.type for value in drawn.values())
    assert not any(value.requires_grad for value in drawn.values())
    assert (drawn["x"].abs() < 100).all()  # the model's own idea of x


def test_sample_draws_where_obs_mask_observes():
    ones = torch.ones(2_000)

    def program():
        with pyro.plate("rows", 2_000):
            p = pyro.param("p", torch.tensor(0.3))
            pyro.sample("y", dist.Bernoulli(p), obs=ones, obs_mask=ones.bool())

    assert_mean(play(p=program).sample("p")["y"], torch.tensor(0.3))


def test_sample_keeps_what_is_given_and_draws_the_rest_from_it(device):
    x = torch.zeros(4_000, device=device)
    z = torch.tensor(3.0, device=device, requires_grad=True)
    drawn = play(p=everything).sample("p", x, given={"z": z})
    assert drawn["z"].shape == (4_000,)
    assert torch.equal(drawn["z"], z.detach().expand(4_000))
    assert not any(value.requires_grad for value in drawn.values())
    assert_mean(drawn["x"], 3 + torch.tensor(3.0, device=device).sigmoid())


def test_given_takes_the_place_of_an_observation():
    drawn = play(p=everything).sample("p", torch.zeros(2), given={"x": torch.tensor([5.0, 6.0])})
    assert drawn["x"].tolist() == [5.0, 6.0]


def test_sites_with_like_names_are_different():
    def program():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("x_observed", dist.Normal(0.0, 1.0))
        pyro.sample("x_unobserved", dist.Normal(0.0, 1.0))

    drawn = play(p=program).sample("p", given={"x": torch.tensor(100.0)})
    assert drawn["x"] == 100
    assert drawn["x_observed"].abs() < 20
    assert drawn["x_unobserved"].abs() < 20


# Scoring.


def rows(data):
    return pyro.plate("rows", len(data))


def plain(x):
    with rows(x):
        z = pyro.sample("z", dist.Normal(0.5, 1.0))
        pyro.sample("x", dist.Normal(z, 2.0), obs=x)


def scaled(x):
    with poutine.scale(scale=3.0):
        plain(x)


def masked(x):
    with poutine.mask(mask=torch.arange(len(x)) > 0):
        plain(x)


def masked_distribution(x):
    with rows(x):
        z = pyro.sample("z", dist.Normal(0.5, 1.0).mask(x > 0))
        pyro.sample("x", dist.Normal(z, 2.0), obs=x)


def subsampled(x):
    with pyro.plate("rows", 30, subsample=torch.tensor([4, 1, 7])):
        z = pyro.sample("z", dist.Normal(0.5, 1.0))
        pyro.sample("x", dist.Normal(z, 2.0), obs=x)


def nested(x):
    with pyro.plate("outer", 2, dim=-2), pyro.plate("rows", 3, dim=-1):
        z = pyro.sample("z", dist.Normal(0.5, 1.0))
        pyro.sample("x", dist.Normal(z, 2.0), obs=x)


def with_factor(x):
    plain(x)
    pyro.factor("f", x.sum())


def with_deterministic(x):
    with rows(x):
        z = pyro.sample("z", dist.Normal(0.5, 1.0))
        pyro.sample("x", dist.Normal(pyro.deterministic("w", 2 * z), 2.0), obs=x)


def sequential(x):
    for i in pyro.plate("rows", len(x)):
        z = pyro.sample(f"z{i}", dist.Normal(0.5, 1.0))
        pyro.sample(f"x{i}", dist.Normal(z, 2.0), obs=x[i])


def marked(x):
    with rows(x):
        pyro.sample("z", dist.Bernoulli(0.2), infer={"enumerate": "parallel"})


PROGRAMS = [
    plain,
    scaled,
    masked,
    masked_distribution,
    subsampled,
    nested,
    with_factor,
    with_deterministic,
    sequential,
    marked,
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_log_prob_is_that_of_the_program(program):
    x = torch.tensor([0.3, -1.0, 2.0])
    if program is sequential:
        given = {f"z{i}": torch.tensor(0.1 * i) for i in range(3)}
    elif program is marked:
        given = {"z": torch.tensor([0.0, 1.0, 1.0])}
    else:
        given = {"z": torch.tensor([1.0, 0.2, -0.4])}
    if program is nested:
        given = {"z": given["z"].expand(2, 3)}
    expected = poutine.trace(poutine.condition(program, given)).get_trace(x).log_prob_sum()
    seen = play(p=program).log_prob("p", x, given=given)
    assert seen.shape == ()
    assert_equal(seen, expected)


def test_log_prob_where_obs_mask_splits_a_site():
    x = torch.tensor([0.3, -1.0])
    z, y = torch.tensor([0.2, 0.4]), torch.tensor([1.0, 0.0])
    expected = (
        dist.Normal(0.0, 1.0).log_prob(z)
        - z**2
        + dist.Bernoulli(logits=z).log_prob(y)
        + dist.Normal(z + y, 1.0).log_prob(x)
    )
    assert_equal(play(p=everything).log_prob("p", x, given={"z": z, "y": y}), expected.sum())


def test_given_values_are_scored_in_the_place_of_observed_ones():
    x, z = torch.tensor([0.3, -1.0]), torch.zeros(2)
    seen = play(p=plain).log_prob("p", torch.zeros(2), given={"x": x, "z": z})
    assert_equal(seen, play(p=plain).log_prob("p", x, given={"z": z}))


def test_implicit_sites_do_not_count():
    def program(x):
        with rows(x):
            z = pyro.sample("z", Implicit(torch.randn))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x, z = torch.tensor([0.3, -1.0]), torch.tensor([1.0, 2.0])
    seen = play(p=program).log_prob("p", x, given={"z": z})
    assert_equal(seen, dist.Normal(z, 1.0).log_prob(x).sum())


@pytest.mark.parametrize("is_given", [False, True])
def test_auxiliary_sites_do_not_count(is_given):
    def program(x):
        u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        with rows(x):
            pyro.sample("x", dist.Normal(0 * u, 1.0), obs=x)

    x = torch.tensor([0.3, -1.0])
    given = {"u": torch.tensor(0.7)} if is_given else {}
    seen = play(p=program).log_prob("p", x, given=given)
    assert_equal(seen, dist.Normal(torch.zeros(2), 1.0).log_prob(x).sum())


def test_a_completion_stays_with_its_rows():
    data = torch.arange(10.0)

    def guide(x):
        with pyro.plate("rows", 10, subsample_size=3) as i:
            pyro.sample("z", dist.Normal(x[i], 1e-6))

    def model(x):
        with pyro.plate("rows", 10, subsample_size=3) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pairs.append((z.detach(), x[i]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    pairs = []
    try:
        for _ in range(5):
            here = play(p=model, q=guide)
            here.log_prob("p", data, given=here.sample("q", data))
    except ValueError as error:
        assert "rows" in str(error)
        return
    for z, x in pairs:
        torch.testing.assert_close(z, x, atol=1e-3, rtol=0.0)


# Gradients.


def shared_programs():
    """Two programs with a parameter each and one that both touch."""
    leaves = {name: torch.tensor(0.5, requires_grad=True) for name in ("a", "b", "both")}

    def program(own):
        def run():
            loc = pyro.param(own, leaves[own]) * pyro.param("both", leaves["both"])
            pyro.sample("x", dist.Normal(loc, 1.0))

        return run

    return leaves, program("a"), program("b")


@pytest.mark.parametrize("first", ["a", "b"])
def test_a_shared_parameter_is_the_first_players(first):
    leaves, a, b = shared_programs()
    programs = {"a": a, "b": b} if first == "a" else {"b": b, "a": a}

    def both(here):
        given = {"x": torch.tensor(2.0)}
        return here.log_prob("a", given=given) + here.log_prob("b", given=given)

    stage = Stage(programs, dict.fromkeys("ab", both))
    for name in "ab":
        owned = stage.score(name, ((), {})).parameters
        assert {*owned} == ({name, "both"} if name == first else {name})
        assert all(owned[key] is leaves[key] for key in owned)


def test_sampling_counts_as_touching():
    """b scores itself alone, and yet the first player's program uses the parameter."""
    _, a, b = shared_programs()
    stage = Stage({"a": a, "b": b}, {"b": lambda here: here.log_prob("b", given=here.sample("a"))})
    assert {*stage.score("b", ((), {})).parameters} == {"b"}


def test_claims_come_first():
    leaves, a, b = shared_programs()
    claims = {"b": {"both": leaves["both"]}}
    utility = {"a": lambda here: here.log_prob("a", given=here.sample("b"))}
    utility["b"] = lambda here: here.log_prob("b", given=here.sample("a"))
    stage = Stage({"a": a, "b": b}, utility, claims)
    assert {*stage.score("a", ((), {})).parameters} == {"a"}
    assert {*stage.score("b", ((), {})).parameters} == {"both", "b"}


def test_a_claimed_module_needs_no_statement(device):
    net = nn.Linear(2, 2).to(device)
    x = torch.randn(5, 2, device=device)

    def program():
        with rows(x):
            pyro.sample("x", dist.Normal(net(torch.ones_like(x)), 1.0).to_event(1), obs=x)

    claims = {"p": dict(net.named_parameters())}
    scored = score(lambda here: here.log_prob("p"), claims, p=program)
    assert scored.unnamed == []
    weight, bias = scored.gradients([net.weight, net.bias])
    residual = (net(torch.ones_like(x)) - x).detach().sum(0)
    assert_equal(bias, residual)
    assert_equal(weight, residual[:, None].expand(2, 2))


def test_no_gradient_passes_through_given_values():
    _, a, b = shared_programs()
    leaf = torch.tensor(1.0, requires_grad=True)
    scored = score(lambda here: here.log_prob("a", given={"x": 3 * leaf}), a=a, b=b)
    assert scored.utility.requires_grad
    assert scored.gradients([leaf]) == [None]


def test_nothing_flows_from_a_score_into_other_players_leaves():
    leaves, a, b = shared_programs()
    scored = score(lambda here: here.log_prob("a", given=here.sample("b")), a=a, b=b)
    assert scored.gradients([leaves["b"]]) == [None]


def plain_utilities():
    def decoder(here, x):
        return here.log_prob("decoder", x, given=here.sample("encoder", x))

    def encoder(here, x):
        dream = here.sample("decoder", x)
        return here.log_prob("encoder", dream["x"], given={n: dream[n] for n in ("z0", "z1")})

    return {"decoder": decoder, "encoder": encoder}


@pytest.mark.parametrize("player", ["decoder", "encoder"])
def test_plain_functions_make_the_ready_made_utilities(player):
    """Both routes agree with enumeration, and so with each other."""
    ladder = Ladder()
    own = ladder.theta if player == "decoder" else ladder.phi
    programs = {"decoder": ladder.model, "encoder": ladder.guide}
    ready_made = SymmetricUtility().stage(*programs.values())
    by_hand = Stage(programs, plain_utilities())
    k = ["decoder", "encoder"].index(player)
    expected, expected_gradients = utilities(ladder, x=X)[k], gradients(ladder, x=X)[k]
    for stage in (ready_made, by_hand):
        for name in programs:  # who owns what, and the pattern of the batch
            stage.score(name, ((X,), {}))
        runs = enumerate_draws(lambda stage=stage: stage.score(player, ((X,), {})))
        utility, gradient = expectation(runs, own)
        assert_equal(utility, expected.detach())
        for seen, wanted in zip(gradient, expected_gradients, strict=True):
            assert_equal(seen, wanted)


# Refusals.

ONES = torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda here: here.sample("r", ONES), "no player 'r'; there are \\['p', 'q'\\]"),
        (lambda here: here.log_prob("r", ONES), "no player 'r'; there are \\['p', 'q'\\]"),
        (lambda here: here.log_prob("p", ONES), r"\['z'\], for which log_prob has no value"),
        (
            lambda here: here.log_prob("p", ONES, given={"z": ONES, "w": ONES}),
            r"given= holds values for \['w'\].*'p' samples \['x', 'z'\]",
        ),
        (
            lambda here: here.sample("p", ONES, given={"w": ONES}),
            r"given= holds values for \['w'\]",
        ),
        (
            lambda here: here.sample("p", ONES, given={"z": torch.ones(2, 3)}),
            r"site 'z' of player 'p' that broadcasts to shape \(3,\), got \(2, 3\)",
        ),
        (
            lambda here: here.log_prob("q", ONES, given={"y": torch.tensor([0.0, 1.0, 2.0])}),
            "site 'y' of player 'q' lies outside its support Boolean",
        ),
        (
            lambda here: here.log_prob("q", ONES, given={"y": ONES * torch.nan}),
            "outside its support",
        ),
    ],
)
def test_misuse_is_explained(act, message):
    def binary(x):
        with rows(x):
            pyro.sample("y", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match=message):
        act(play(p=plain, q=binary))


def test_a_wrong_shape_is_explained_even_if_the_program_fails_on_it():
    def program(x):
        with rows(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ torch.ones(2), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"site 'z' of player 'p' that broadcasts to shape"):
        play(p=program).sample("p", ONES, given={"z": torch.ones(3, 5)})


def test_values_need_the_rows_that_they_belong_to():
    x = torch.arange(10.0)

    def program(x):
        with pyro.plate("rows", 10, subsample_size=2) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    p = play(p=program)
    drawn = p.sample("p", x)
    assert drawn["rows"].shape == drawn["z"].shape == (2,)
    z = {"z": drawn["z"]}
    for verb in (p.sample, p.log_prob):
        with pytest.raises(ValueError, match=r"chooses rows in the plates \['rows'\]"):
            verb("p", x, given=z)
    i = drawn["rows"]
    expected = dist.Normal(0.0, 1.0).log_prob(drawn["z"]) + dist.Normal(drawn["z"], 1.0).log_prob(
        x[i]
    )
    assert_equal(p.log_prob("p", x, given=z | {"rows": i}), 5 * expected.sum())


def test_one_row_is_not_scored_for_all():
    p = play(p=plain)
    assert p.sample("p", ONES, given={"z": torch.ones(1)})["z"].shape == ONES.shape
    with pytest.raises(ValueError, match=r"site 'z' of player 'p' of shape \(3,\), got \(1,\)"):
        p.log_prob("p", ONES, given={"z": torch.ones(1)})


def test_a_program_without_density_has_no_log_prob():
    def program():
        pyro.sample("z", Implicit(torch.randn))

    with pytest.raises(ValueError, match="no site with a density"):
        play(p=program).log_prob("p", given={"z": torch.zeros(())})


def test_numbers_may_be_given(device):
    def program(x):
        with rows(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 2.0), obs=x)

    x = ONES.to(device)
    seen = play(p=program).log_prob("p", x, given={"z": 1.0})
    assert_equal(seen, play(p=program).log_prob("p", x, given={"z": torch.ones_like(x)}))


def test_a_play_remembers_what_was_not_finite():
    def program():
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("x", dist.Normal(loc, 1.0))
        pyro.factor("bad", loc.log())

    found = score(lambda here: here.log_prob("p", given={"x": torch.tensor(0.0)}), p=program)
    with pytest.raises(ValueError, match=r"finite utility of the p, got -inf.*'bad': -inf"):
        found.check_finite()


def test_a_play_is_what_utilities_get():
    seen = []

    def utility(here):
        seen.append(here)
        return here.log_prob("p", ONES, given={"z": ONES})

    score(utility, p=plain)
    assert isinstance(seen[0], Play)


def test_no_gradient_passes_through_nested_arguments():
    weight = torch.tensor(2.0, requires_grad=True)

    def program(batch):
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("x", dist.Normal(batch["h"] + loc, 1.0), obs=batch["x"])

    seen = play(p=program).log_prob("p", {"h": weight * 2, "x": torch.tensor(1.0)})
    assert torch.autograd.grad(seen, weight, allow_unused=True) == (None,)


@pytest.mark.parametrize("given", [[1.0], {"z": None}, {"z": {"z": ONES}}], ids=str)
def test_given_is_a_dict_of_tensors(given):
    with pytest.raises(TypeError, match="in given=|Expected given= to be a dict"):
        play(p=plain).log_prob("p", ONES, given=given)


def moved_flow(shares):
    """How an affine coupling moves, which the decoder has and the guide has too, or a copy of it."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    flow, decoder, encoder = affine_coupling(2, [8]), nn.Linear(2, 3), nn.Linear(3, 2)
    of_guide = flow if shares else deepcopy(flow)

    def law(loc, transform):
        return dist.TransformedDistribution(dist.Normal(loc, 1.0).to_event(1), [transform])

    def model(x):
        pyro.module("flow", flow)
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", law(torch.zeros(2), flow))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        pyro.module("flow" if shares else "copy", of_guide)
        with pyro.plate("data", len(x)):
            pyro.sample("z", law(encoder(x), of_guide))

    before = [parameter.clone() for parameter in flow.parameters()]
    SymmetricEquilibrium(model, guide, SGD({"lr": 1e-3})).step(torch.randn(5, 3))
    return [(a - b).detach() for a, b in zip(flow.parameters(), before, strict=True)]


def test_a_flow_that_both_programs_share_learns():
    shared, apart = moved_flow(shares=True), moved_flow(shares=False)
    assert all(move.abs().max() > 0 for move in shared)
    assert all(torch.allclose(a, b) for a, b in zip(shared, apart, strict=True))


def moved_classifier(reads_label, **options):
    """How the classifier moves of a guide that observes a label itself."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    decoder, encoder, classifier = nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(3, 1)
    x, y = torch.randn(6, 3), torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 1.0])

    def model(x, y):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = decoder(z) + (y[:, None] if reads_label else 0.0)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x, y):
        pyro.module("encoder", encoder)
        pyro.module("classifier", classifier)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))
            pyro.sample("label", dist.Bernoulli(logits=classifier(x)[:, 0]), obs=y)

    at_data = dist.Bernoulli(logits=classifier(x)[:, 0]).log_prob(y).sum()
    expected = torch.autograd.grad(at_data, classifier.weight)[0]
    before = classifier.weight.detach().clone()
    SymmetricEquilibrium(model, guide, SGD({"lr": 1.0}), code_warmup=0, **options).step(x, y)
    return classifier.weight.detach() - before, expected


def test_a_label_that_stays_real_is_not_learned_from_dreams():
    moved, expected = moved_classifier(reads_label=False)
    assert torch.allclose(moved, expected, atol=1e-5)
    moved, _ = moved_classifier(reads_label=False, supervise_encoder=False)
    assert not moved.any()


def test_a_label_that_dreams_go_by_is_learned_from_dreams():
    moved, _ = moved_classifier(reads_label=True, supervise_encoder=False)
    assert moved.any()


def test_a_network_may_come_to_rest_between_two_steps():
    encoder = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    decoder = nn.Linear(2, 3)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    x, parts = torch.randn(5, 3), {"encoder": encoder}
    symeq = SymmetricEquilibrium(model, guide, Adam({"lr": 0.1}), parameters=parts)
    symeq.step(x)
    encoder[0].requires_grad_(False)
    first, last = (layer.weight.detach().clone() for layer in encoder)
    symeq.step(x)
    assert torch.equal(encoder[0].weight, first)
    assert not torch.equal(encoder[1].weight, last)


@pytest.mark.parametrize("value", [1, True, torch.ones(4, dtype=torch.long)])
def test_whole_numbers_are_given_in_the_type_of_the_site(value):
    def program(x):
        q = pyro.param("q", torch.tensor(0.5))
        with pyro.plate("rows", len(x)):
            y = pyro.sample("y", dist.Bernoulli(q))
            k = pyro.sample("k", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Normal(y + q.expand(2)[k], 1.0), obs=x)

    def utility(play, x):
        drawn = play.sample("p", x, given={"y": value, "k": value})
        assert (drawn["y"].dtype, drawn["k"].dtype) == (x.dtype, torch.long)
        return play.log_prob("p", x, given={"y": value, "k": value})

    x = torch.randn(4)
    game = Game([Player("p", program, SGD({"lr": 0.0}), utility)])
    expected = 2 * math.log(0.5) + dist.Normal(1.5, 1.0).log_prob(x)
    assert game.step(x).utilities["p"] == pytest.approx(expected.sum().item())
