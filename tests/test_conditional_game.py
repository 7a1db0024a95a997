"""Games of conditionals: eqs. 17 and 33 of the paper, by enumeration."""

import warnings
from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import SGD

from pyro_symeq import Batch, Conditionals, Implicit, conditional_game
from pyro_symeq.play import Stage
from tests.random_programs import enumerate_draws
from tests.test_game import through_a_file
from tests.test_random_programs import assert_equal, gradient

SGD_0 = SGD({"lr": 0.0})


class Tables:
    """Three conditionals over x in {0, 1, 2}, s in {0, 1} and one bit z, with free logits.

    The hand-written side keeps a law of all three in a tensor P[x, s, z].
    """

    AXES = {"x": 0, "s": 1, "z": 2}
    OTHERS = {"x": ("s", "z"), "s": ("x", "z"), "z": ("x", "s")}

    def __init__(self, device="cpu", order=("s", "x", "z"), num_x=3):
        self.sizes = {"x": num_x, "s": 2, "z": 2}
        generator = torch.Generator().manual_seed(1)

        def table(*shape):
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            return values.to(device).requires_grad_()

        self.logits = {
            name: table(*(self.sizes[other] for other in self.OTHERS[name]), self.sizes[name])
            for name in "xsz"
        }
        self.pi = torch.tensor([0.3, 0.7], dtype=torch.float64, device=device)
        self.order = order

    # The programs.

    def program(self, name):
        first, second = self.OTHERS[name]

        def run(a, b):
            logits = pyro.param(f"logits {name}", self.logits[name])[a, b]
            with pyro.plate("rows", len(logits)):
                pyro.sample(name, dist.Categorical(logits=logits))

        return {
            "x": lambda s, z: run(s, z),
            "s": lambda x, z: run(x, z),
            "z": lambda x, s: run(x, s),
        }[name]

    def prior(self, x=None, s=None):
        rows = len(s if x is None else x)
        with pyro.plate("rows", rows):
            pyro.sample("z", dist.Categorical(self.pi))

    def game(self, optim=SGD_0, **options):
        programs = {name: self.program(name) for name in self.order}
        conditionals = Conditionals(programs, prior=self.prior)
        return conditional_game(conditionals, optim, encoder="z", **options)

    # The same by hand.

    def log_prob(self, name):
        """log p(v | others) with the axes x, s, z."""
        log_probs = self.logits[name].log_softmax(-1)
        where = [*self.OTHERS[name], name]
        return log_probs.permute([where.index(axis) for axis in "xsz"])

    def redraw(self, law, *names):
        for name in names:
            p = self.log_prob(name).exp().detach()
            law = law.sum(self.AXES[name], keepdim=True) * p
        return law

    def rounds(self, law, names, num_rounds):
        """Gibbs rounds that begin with any of these blocks."""
        names = [name for name in self.order if name in names]
        ends = [self.redraw(law, *(names[i:] + names[:i]) * num_rounds) for i in range(len(names))]
        return sum(ends) / len(ends)

    def start(self, row):
        """The data, the prior, and what follows from these."""
        law = torch.ones(*self.sizes.values(), dtype=self.pi.dtype, device=self.pi.device)
        for name, value in row.items():
            at = torch.zeros(self.sizes[name], dtype=law.dtype, device=law.device)
            at[value] = 1.0
            law = law * at.reshape([-1 if axis == name else 1 for axis in "xsz"])
        if "z" not in row:
            law = law * self.pi
        for name in self.order:
            if name not in row and name != "z":
                law = law * self.log_prob(name).exp().detach()
        return law

    def completed(self, row, num_rounds):
        missing = [name for name in self.order if name not in row]
        if not missing:
            return self.start(row)
        if missing == ["z"]:  # no axis is to be summed: z is drawn once, from the encoder
            return self.redraw(self.start(row), "z")
        return self.rounds(self.start(row), missing, num_rounds)

    def utility(self, name, row, num_rounds=5, weights=None):
        weights = weights or {}

        def w(a, b):
            return weights.get(a, {}).get(b, 1.0)

        log_p = self.log_prob(name)
        if name == "z":
            observed = {key: value for key, value in row.items() if key != "z"}
            dreams = self.rounds(self.start(observed), "xs", num_rounds)
            u = (dreams * log_p).sum()
            if "z" in row:
                u = u + (self.completed(row, num_rounds) * log_p).sum()
            return u
        if name not in row:
            return torch.zeros((), dtype=log_p.dtype, device=log_p.device)
        law = self.completed(row, num_rounds)
        u = w(name, name) * (law * log_p).sum()
        other = "s" if name == "x" else "x"
        if other in row:
            u = u + w(name, other) * (self.redraw(law, other) * log_p).sum()
        return u


def expected(game, name, parameters, **data):
    """The expectation of a player's utility, and of its gradient, over all that can be drawn."""
    stage = Stage(
        {player.name: player.program for player in game.players},
        {player.name: player.utility for player in game.players if player.utility},
    )
    for player in stage.utilities:
        stage.score(player, ((), data))
    with mock.patch("torch.randint", side_effect=lambda n, shape: choices(n)):
        total = utility = torch.zeros(())
        gradients = [torch.zeros_like(leaf) for leaf in parameters]
        for choice in range(2):

            def choices(n, choice=choice):
                assert n in (1, 2)
                return torch.tensor(choice % n)

            for probability, score in enumerate_draws(lambda: stage.score(name, ((), data))):
                total = total + probability / 2
                utility = utility + probability / 2 * score.utility.detach()
                for i, seen in enumerate(score.gradients(parameters)):
                    if seen is not None:
                        gradients[i] = gradients[i] - probability / 2 * seen
    assert_equal(total, torch.ones(()))
    return utility, gradients


def check(tables, game, data, num_rounds=1, weights=None, players="xsz"):
    rows = [dict(zip(data, row, strict=True)) for row in zip(*data.values(), strict=True)]
    batch = {name: torch.tensor(value, device=tables.pi.device) for name, value in data.items()}
    for name in players:
        parameters = list(tables.logits.values())
        utility, gradients = expected(game, name, parameters, **batch)
        wanted = sum(tables.utility(name, row, num_rounds, weights) for row in rows)
        assert_equal(utility, wanted.detach())
        for seen, exact, owner in zip(
            gradients, gradient(wanted, parameters), tables.logits, strict=True
        ):
            assert_equal(seen, exact)
            assert owner == name or not seen.any()


BATCHES = {
    "complete": {"x": [2], "s": [0]},
    "two rows": {"x": [2, 1], "s": [0, 1]},
    "with latents": {"x": [1], "s": [1], "z": [0]},
    "x alone": {"x": [2]},
    "s alone": {"s": [1]},
    "x and latents": {"x": [2], "z": [1]},
}


@pytest.mark.parametrize("batch", BATCHES)
def test_utilities_are_those_of_eq_17(batch):
    tables = Tables()
    check(tables, tables.game(num_rounds=1), BATCHES[batch])


@pytest.mark.parametrize("order", [("s", "x", "z"), ("x", "s", "z"), ("z", "x", "s")])
@pytest.mark.parametrize("num_rounds", [1, 2])
@pytest.mark.parametrize("batch", ["complete", "x alone"])
def test_gibbs_rounds(num_rounds, order, batch):
    tables = Tables(order=order)
    game = tables.game(num_rounds=num_rounds)
    check(tables, game, BATCHES[batch], num_rounds=num_rounds)


@pytest.mark.parametrize(
    "weights",
    [
        {"x": {"s": 0.5}, "s": {"s": 2.0, "x": 0.25}},
        {"x": {"x": 0.0}},
        {"x": {"s": 0.0}, "s": {"x": 0.0}},
    ],
)
def test_weights_of_terms(weights):
    tables = Tables()
    check(tables, tables.game(num_rounds=1, weights=weights), BATCHES["complete"], 1, weights)


def test_a_player_moves_by_the_formula():
    """One step of each player on a batch that leaves nothing to draw for it: s alone has weight 0."""
    tables = Tables()
    weights = {"x": {"s": 0.0}, "s": {"x": 0.0}}
    conditionals = Conditionals({n: tables.program(n) for n in "sxz"}, prior=tables.prior)
    game = conditional_game(
        conditionals, SGD({"lr": 0.5}), encoder="z", weights=weights, updates=["x", "s"]
    )
    row = {"x": 2, "s": 0, "z": 1}
    before = {name: tables.logits[name].detach().clone() for name in "xsz"}
    wanted = {
        name: gradient(tables.utility(name, row, 1, weights), [tables.logits[name]])[0]
        for name in "xs"
    }
    game.step(**{name: torch.tensor([value]) for name, value in row.items()})
    for name in "xs":
        assert_equal(tables.logits[name].detach(), before[name] + 0.5 * wanted[name])
    assert torch.equal(tables.logits["z"], before["z"])


@pytest.mark.parametrize("pattern", BATCHES)
def test_captured_games_go_the_same_way(pattern):
    ends = []
    for capture in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        tables = Tables()
        game = tables.game(num_rounds=2, optim=SGD({"lr": 0.1}), capture=capture)
        rows = {name: torch.tensor(values) for name, values in BATCHES[pattern].items()}
        with warnings.catch_warnings():  # a draw tells with which block a round begins
            warnings.filterwarnings("ignore", "Not captured.*host reads the elements")
            utilities = [game.step(**rows).utilities for _ in range(6)]
        ends.append((utilities, {n: x.detach().clone() for n, x in tables.logits.items()}))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


def test_weighted_batches_of_different_patterns():
    """A step may mix complete and incomplete rows."""
    tables = Tables()
    game = tables.game(num_rounds=1, updates="simultaneous")
    stage = Stage(
        {player.name: player.program for player in game.players},
        {player.name: player.utility for player in game.players if player.utility},
    )
    parts = [
        Batch(x=torch.tensor([2]), s=torch.tensor([0])).weighted(3.0),
        Batch(s=torch.tensor([1])),
    ]
    wanted = 3 * tables.utility("s", {"x": 2, "s": 0}, 1) + tables.utility("s", {"s": 1}, 1)
    with mock.patch("torch.randint", return_value=torch.tensor(0)):
        stage.score("s", (tuple(parts), {}))
        seen = sum(
            p * score.utility.detach()
            for p, score in enumerate_draws(lambda: stage.score("s", (tuple(parts), {})))
        )
    # With the first block fixed, the rounds for the batch of s alone begin with x.
    law = tables.redraw(tables.start({"s": 1}), "x", "z")
    wanted = 3 * tables.utility("s", {"x": 2, "s": 0}, 1) + (law * tables.log_prob("s")).sum()
    assert_equal(seen, wanted.detach())


# Other numbers of blocks.


class Ring:
    """Conditionals p(a | b, c), p(b | a, c), p(c | a, b) of three bits, without latents."""

    def __init__(self, names="abc"):
        self.names = names
        generator = torch.Generator().manual_seed(2)
        n = len(names)
        self.logits = {
            name: torch.randn([2] * n, generator=generator, dtype=torch.float64).requires_grad_()
            for name in names  # indexed by the others, then by itself
        }

    def programs(self):
        def run(name, *others):
            with pyro.plate("rows", len(others[0])):
                logits = pyro.param(f"logits {name}", self.logits[name])[others]
                pyro.sample(name, dist.Categorical(logits=logits))

        if self.names == "xs":
            return {"x": lambda s: run("x", s), "s": lambda x: run("s", x)}
        return {
            "a": lambda b, c: run("a", b, c),
            "b": lambda a, c: run("b", a, c),
            "c": lambda a, b: run("c", a, b),
        }

    def log_prob(self, name):
        where = [*(other for other in self.names if other != name), name]
        log_probs = self.logits[name].log_softmax(-1)
        return log_probs.permute([where.index(axis) for axis in self.names])

    def utility(self, name, row, weights):
        at = tuple(row[n] for n in self.names)
        u = weights[name].get(name, 1.0) * self.log_prob(name)[at]
        for i, other in enumerate(self.names):
            if other != name:
                line = tuple(slice(None) if j == i else k for j, k in enumerate(at))
                p = self.log_prob(other)[line].exp().detach()
                u = u + weights[name].get(other, 1.0) * (p * self.log_prob(name)[line]).sum()
        return u


@pytest.mark.parametrize(
    "weights",
    [
        {"a": {}, "b": {}, "c": {}},
        {"a": {"b": 0.0, "c": 2.0}, "b": {"a": 0.0, "c": 0.0}, "c": {"c": 0.5, "a": 0.1}},
    ],
)
def test_three_blocks_score_each_others_draws(weights):
    ring = Ring()
    game = conditional_game(Conditionals(ring.programs()), SGD_0, weights=weights)
    rows = [{"a": 0, "b": 1, "c": 1}, {"a": 1, "b": 1, "c": 0}]
    batch = {n: torch.tensor([row[n] for row in rows]) for n in "abc"}
    leaves = list(ring.logits.values())
    for name in "abc":
        utility, gradients = expected(game, name, leaves, **batch)
        wanted = sum(ring.utility(name, row, weights) for row in rows)
        assert_equal(utility, wanted.detach())
        for seen, exact in zip(gradients, gradient(wanted, leaves), strict=True):
            assert_equal(seen, exact)


def test_without_encoder_the_utilities_are_those_of_eq_33():
    pair = Ring("xs")
    game = conditional_game(Conditionals(pair.programs()), SGD_0)
    leaves = list(pair.logits.values())
    batch = {"x": torch.tensor([0, 1]), "s": torch.tensor([1, 1])}
    for name in "xs":
        utility, gradients = expected(game, name, leaves, **batch)
        wanted = sum(pair.utility(name, {"x": x, "s": 1}, {"x": {}, "s": {}}) for x in (0, 1))
        assert_equal(utility, wanted.detach())
        for seen, exact in zip(gradients, gradient(wanted, leaves), strict=True):
            assert_equal(seen, exact)


def test_without_encoder_a_missing_block_is_drawn_from_its_conditional():
    pair = Ring("xs")
    game = conditional_game(Conditionals(pair.programs()), SGD_0, num_rounds=3)
    utility, _ = expected(game, "x", [], x=torch.tensor([1]))
    s = pair.log_prob("s")[1].exp()
    assert_equal(utility, (s * pair.log_prob("x")[1]).sum().detach())
    assert expected(game, "s", [], x=torch.tensor([1]))[0] == 0


def test_a_block_of_two_sites_is_drawn_and_scored_as_one():
    x_logits = torch.randn(2, 2, 2, requires_grad=True)
    s_logits = torch.randn(2, 2, requires_grad=True)
    t_logits = torch.randn(2, 2, 2, requires_grad=True)

    def p_x(s, t):
        with pyro.plate("rows", len(s)):
            logits = pyro.param("x_logits", x_logits)[s, t]
            pyro.sample("x", dist.Categorical(logits=logits))

    def p_st(x):
        with pyro.plate("rows", len(x)):
            s = pyro.sample("s", dist.Categorical(logits=pyro.param("s_logits", s_logits)[x]))
            logits = pyro.param("t_logits", t_logits)[x, s]
            pyro.sample("t", dist.Categorical(logits=logits))

    game = conditional_game(Conditionals({"x": p_x, ("s", "t"): p_st}), SGD_0)
    assert [player.name for player in game.players] == ["x", "s, t"]
    log_x = x_logits.log_softmax(-1)
    log_st = s_logits.log_softmax(-1)[:, :, None] + t_logits.log_softmax(-1)  # x, s, t
    x, s, t = 0, 1, 1
    wanted = {
        "x": log_x[s, t, x] + (log_st[x].exp().detach() * log_x[:, :, x]).sum(),
        "s, t": log_st[x, s, t] + (log_x[s, t].exp().detach() * log_st[:, s, t]).sum(),
    }
    leaves = [x_logits, s_logits, t_logits]
    batch = {name: torch.tensor([value]) for name, value in {"x": x, "s": s, "t": t}.items()}
    for name, exact in wanted.items():
        utility, gradients = expected(game, name, leaves, **batch)
        assert_equal(utility, exact.detach())
        for seen, one in zip(gradients, gradient(exact, leaves), strict=True):
            assert_equal(seen, one)
    with pytest.raises(ValueError, match=r"part of the block 's, t' and lacks \['t'\]"):
        game.step(x=torch.zeros(2).long(), s=torch.zeros(2).long())


def test_a_prior_may_draw_starting_values_of_data():
    """With latents alone both data blocks are missing, and neither can be drawn first."""
    tables = Tables(num_x=2)

    def prior(z=None):
        with pyro.plate("rows", 1):
            if z is None:
                pyro.sample("z", dist.Categorical(tables.pi))
            pyro.sample("s", dist.Delta(torch.tensor(1)))

    programs = {name: tables.program(name) for name in "sxz"}
    game = conditional_game(Conditionals(programs, prior=prior), SGD_0, encoder="z", num_rounds=1)
    start = torch.tensor([0.0, 1.0])[:, None] * tables.log_prob("x").exp()
    free = tables.rounds((tables.pi * start).detach(), "xs", 1)
    at_z = tables.rounds((torch.tensor([0.0, 1.0]) * start).detach(), "xs", 1)
    wanted = ((free + at_z) * tables.log_prob("z")).sum()
    utility, gradients = expected(game, "z", [tables.logits["z"]], z=torch.tensor([1]))
    assert_equal(utility, wanted.detach())
    assert_equal(gradients[0], gradient(wanted, [tables.logits["z"]])[0])


def test_data_win_over_starting_values():
    tables = Tables()

    def prior(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Categorical(tables.pi))
            pyro.sample("s", dist.Categorical(torch.tensor([0.5, 0.5])))

    programs = {name: tables.program(name) for name in "sxz"}
    game = conditional_game(Conditionals(programs, prior=prior), SGD_0, encoder="z", num_rounds=1)
    with_start = expected(game, "z", [], x=torch.tensor([2]), s=torch.tensor([0]))[0]
    assert_equal(with_start, tables.utility("z", {"x": 2, "s": 0}, 1).detach())


def test_a_prior_needs_no_density(device):
    tables = Tables(device)

    def prior(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", Implicit(lambda shape: torch.zeros(shape, device=device).long()))

    programs = {name: tables.program(name) for name in "sxz"}
    game = conditional_game(Conditionals(programs, prior=prior), SGD_0, encoder="z")
    batch = {n: torch.zeros(4, device=device).long() for n in "xs"}
    assert game.step(**batch).utilities.keys() == {"s", "x", "z"}


def test_the_conditionals_meet_in_a_joint_law():
    """Without latents, data of full support are the fixed point: all learn its conditionals."""
    pi = torch.tensor([[0.3, 0.1], [0.1, 0.2], [0.05, 0.25]])
    counts = (pi * 200).round().long()
    x, s = (
        torch.tensor(
            [at[i] for at in torch.ones(3, 2).nonzero().tolist() for _ in range(counts[tuple(at)])]
        )
        for i in (0, 1)
    )
    logits = {"x": torch.zeros(2, 3), "s": torch.zeros(3, 2)}

    def program(name, other):
        with pyro.plate("rows", len(other)):
            table = pyro.param(f"logits {name}", logits[name])
            pyro.sample(name, dist.Categorical(logits=table[other]))

    programs = {"x": lambda s: program("x", s), "s": lambda x: program("s", x)}
    optim = SGD({"lr": 0.02})
    game = conditional_game(Conditionals(programs), optim)
    for step in range(200):
        for one in optim.optim_objs.values():
            one.param_groups[0]["lr"] = 0.02 / (1 + step / 20)
        game.step(x=x, s=s)
    seen_x = pyro.param("logits x").softmax(-1)
    seen_s = pyro.param("logits s").softmax(-1)
    torch.testing.assert_close(seen_x, (pi / pi.sum(0)).T, atol=0.04, rtol=0.0)
    torch.testing.assert_close(seen_s, pi / pi.sum(1, keepdim=True), atol=0.04, rtol=0.0)


def test_state_resumes(device):
    def training(state=None):
        pyro.clear_param_store()
        tables = Tables(device)
        conditionals = Conditionals({n: tables.program(n) for n in "sxz"}, prior=tables.prior)
        game = conditional_game(conditionals, SGD({"lr": 0.1, "momentum": 0.9}), encoder="z")
        if state is not None:
            game.load_state_dict(state)
        return tables, game

    def run(game, steps):
        for i in range(steps):
            x, s = (torch.randint(n, (5,), device=device) for n in (3, 2))
            game.step(**({"x": x, "s": s} if i % 2 else {"x": x}))

    tables, game = training()
    run(game, 2)
    state = through_a_file(game.state_dict())
    run(game, 4)
    again, resumed = training(state)
    run(resumed, 4)
    assert all(torch.equal(tables.logits[n], again.logits[n]) for n in "xsz")


# Refusals.

ROWS = torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"encoder": "y"},
            ValueError,
            r"encoder= names the block 'y'; there are \['s', 'x', 'z'\]",
        ),
        ({"num_rounds": 0}, ValueError, "num_rounds to be an integer of at least 1, got 0"),
        ({"num_rounds": 1.5}, ValueError, "num_rounds to be an integer of at least 1, got 1.5"),
        ({"weights": {"y": {}}}, ValueError, r"weights= names \['y'\]"),
        ({"weights": {"x": {"z": 1.0}}}, ValueError, r"weights= names \['z'\]"),
        ({"weights": {"x": {"s": -1.0}}}, ValueError, r"weights\['x'\]\['s'\] to be a finite"),
        ({"weights": {"x": {"s": torch.nan}}}, ValueError, "finite number of at least 0, got nan"),
        ({"updates": ["x", "prior"]}, ValueError, r"updates= names \['prior'\]"),
        ({"updates": "gibbs"}, ValueError, "updates='alternating'"),
        ({"optim": torch.optim.SGD}, TypeError, "pyro.optim.PyroOptim or a dict"),
        ({"optim": {"x": SGD_0}}, ValueError, r"each of \['s', 'x', 'z'\], got some for \['x'\]"),
        ({"optim": {**dict.fromkeys("xsz", SGD_0), "y": SGD_0}}, ValueError, "'y'"),
        ({"weights": {"x": {"s": "much"}}}, (TypeError, ValueError), r"weights\['x'\]\['s'\]"),
    ],
)
def test_options_are_checked(options, error, message):
    tables = Tables()
    programs = {name: tables.program(name) for name in "sxz"}
    conditionals = Conditionals(programs, prior=tables.prior)
    with pytest.raises(error, match=message):
        conditional_game(conditionals, **{"optim": SGD_0, "encoder": "z"} | options)


def test_an_encoder_needs_a_prior():
    programs = {name: Tables().program(name) for name in "sxz"}
    with pytest.raises(ValueError, match=r"latents that a prior draws. Give one: Conditionals"):
        conditional_game(Conditionals(programs), SGD_0, encoder="z")


@pytest.mark.parametrize("encoder", [("z",), ("z", "y")])
def test_an_encoder_may_be_named_as_its_block_was(encoder):
    def p_x(z, y=None):
        with pyro.plate("rows", len(z)):
            pyro.sample("x", dist.Categorical(logits=pyro.param("w", torch.zeros(3)) * z[:, None]))

    def q(x):
        with pyro.plate("rows", len(x)):
            for name in encoder:
                pyro.sample(name, dist.Bernoulli(logits=pyro.param("v", torch.zeros(())) * x))

    def prior(x):
        with pyro.plate("rows", len(x)):
            for name in encoder:
                pyro.sample(name, dist.Bernoulli(0.5))

    conditionals = Conditionals({"x": p_x, encoder: q}, prior=prior)
    game = conditional_game(conditionals, SGD_0, encoder=encoder)
    assert game.step(x=ROWS).utilities.keys() == {"x", ", ".join(encoder)}


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (((ROWS, ROWS), {}), TypeError, r"positional arguments. Call game.step\(s=s, x=x, z=z\)"),
        (
            ((), {"x": ROWS, "y": ROWS}),
            ValueError,
            r"names \['y'\]; the variables are \['s', 'x', 'z'\]",
        ),
        (((), {"x": ROWS, "s": ROWS[:2]}), Exception, "rows|shape|broadcast"),
        (((), {"z": ROWS}), ValueError, r"prior takes|can't start"),
        (((), {}), ValueError, "nothing|prior|can't start|batch"),
    ],
)
def test_batches_are_checked(batch, error, message):
    tables = Tables()

    def prior(x):
        tables.prior(x)

    programs = {name: tables.program(name) for name in "sxz"}
    game = conditional_game(Conditionals(programs, prior=prior), SGD_0, encoder="z")
    args, kwargs = batch
    with pytest.raises(error, match=message):
        game.step(*args, **kwargs)


def test_a_later_empty_batch_is_refused():
    pair = Ring("xs")
    game = conditional_game(Conditionals(pair.programs()), SGD_0)
    game.step(x=ROWS % 2, s=ROWS % 2)
    with pytest.raises(ValueError, match="batch"):
        game.step()


def test_rounds_that_cannot_start():
    pair = Ring()
    game = conditional_game(Conditionals(pair.programs()), SGD_0)
    with pytest.raises(
        ValueError, match=r"can't start: .* tells \['b', 'c'\].*Let the prior draw"
    ):
        game.step(a=torch.tensor([1]))


def test_a_program_that_does_not_sample_its_block_is_named():
    pair = Ring("xs")

    def p_x(s):
        pyro.sample("X", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))

    game = conditional_game(Conditionals({"x": p_x, "s": pair.programs()["s"]}), SGD_0)
    with pytest.raises(ValueError, match=r"\['x'\]; the program of player 'x' samples \['X'\]"):
        game.step(x=ROWS, s=ROWS)
    with pytest.raises(ValueError, match=r"'x' never samples \['x'\]"):
        game.step(s=ROWS)


def test_a_program_that_samples_more_than_its_block_is_named():
    pair = Ring("xs")

    def p_x(s):
        pair.programs()["x"](s)
        pyro.sample("more", dist.Normal(0.0, 1.0))

    game = conditional_game(Conditionals({"x": p_x, "s": pair.programs()["s"]}), SGD_0)
    with pytest.raises(ValueError, match="samples .*'more'"):
        game.step(x=ROWS, s=ROWS)


def test_a_program_may_sample_auxiliary_sites():
    pair = Ring("xs")

    def p_x(s):
        pair.programs()["x"](s)
        pyro.sample("more", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})

    game = conditional_game(Conditionals({"x": p_x, "s": pair.programs()["s"]}), SGD_0)
    assert game.step(x=ROWS, s=ROWS).utilities.keys() == {"x", "s"}


def test_a_prior_that_draws_no_latents_is_refused():
    tables = Tables()

    def prior(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("s", dist.Categorical(torch.ones(2)))

    programs = {name: tables.program(name) for name in "sxz"}
    with pytest.raises(ValueError, match="prior"):
        conditional_game(Conditionals(programs, prior=prior), SGD_0, encoder="z").step(
            x=ROWS, s=ROWS % 2
        )


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_a_prior_of_another_number_of_rows_is_refused(rows):
    tables = Tables()

    def prior():
        with pyro.plate("rows", rows):
            pyro.sample("z", dist.Categorical(tables.pi))

    programs = {name: tables.program(name) for name in "sxz"}
    game = conditional_game(Conditionals(programs, prior=prior), SGD_0, encoder="z")
    with pytest.raises((ValueError, RuntimeError, IndexError), match="z|shape|size"):
        game.step(x=ROWS, s=ROWS)


def test_an_optimiser_may_be_named_as_its_block_was():
    def p_x(s, t):
        with pyro.plate("rows", len(s)):
            pyro.sample("x", dist.Normal(pyro.param("w", torch.tensor(0.0)) * s * t, 1.0))

    def p_st(x):
        with pyro.plate("rows", len(x)):
            for name in "st":
                pyro.sample(name, dist.Normal(pyro.param("v", torch.tensor(0.0)) * x, 1.0))

    conditionals = Conditionals({"x": p_x, ("s", "t"): p_st})
    game = conditional_game(conditionals, {"x": SGD_0, ("s", "t"): SGD_0})
    assert game.players[1].optim is SGD_0


def test_a_prior_that_draws_what_is_no_variable_is_refused():
    tables = Tables()

    def prior(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Categorical(tables.pi))
            pyro.sample("S", dist.Categorical(torch.ones(2)))

    programs = {name: tables.program(name) for name in "sxz"}
    game = conditional_game(Conditionals(programs, prior=prior), SGD_0, encoder="z")
    with pytest.raises(ValueError, match="prior samples .*'S'"):
        game.step(x=ROWS, s=ROWS % 2)


@pytest.mark.parametrize("name", ["name", "play", "player", "prior"])
def test_variables_may_have_any_name(name):
    def p_x(**others):
        (other,) = others.values()
        with pyro.plate("rows", len(other)):
            pyro.sample("x", dist.Normal(pyro.param("w", torch.tensor(0.0)) * other, 1.0))

    def p_other(x):
        with pyro.plate("rows", len(x)):
            pyro.sample(name, dist.Normal(pyro.param("v", torch.tensor(0.0)) * x, 1.0))

    game = conditional_game(Conditionals({"x": p_x, name: p_other}), SGD_0)
    assert game.step(**{"x": torch.zeros(2), name: torch.zeros(2)}).utilities.keys() == {"x", name}


def test_a_variable_is_not_called_like_an_option():
    conditionals = Conditionals({"x": lambda given: None, "given": lambda x: None})
    with pytest.raises(ValueError, match="The name 'given' is taken"):
        conditional_game(conditionals, SGD_0)
