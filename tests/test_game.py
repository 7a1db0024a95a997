"""Games: who moves when and what, freezing, state, errors."""

import copy
import io
import itertools
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import SGD, Adam, ClippedAdam, ExponentialLR
from torch import nn

from pyro_symeq import Batch, Game, GameLoss, Player, SymmetricEquilibrium
from tests.comparison import RATE, same
from tests.enumerable import Ladder
from tests.test_equilibrium import clone, identical


class Chase:
    """Three players on a line, each of which runs after a point that depends on all.

    The utilities have no draws: u_i = log N(t_i(theta) | theta_i, 1), with the gradient t_i - theta_i
    in theta_i.
    """

    NAMES = "abc"

    def __init__(self, optim=None, device="cpu", **options):
        self.leaves = {
            name: torch.tensor(value, device=device, requires_grad=True, dtype=torch.float64)
            for name, value in {"a": 0.3, "b": -1.0, "c": 2.0}.items()
        }
        self.optim = optim or SGD({"lr": RATE})
        self.calls = []
        self.broken = None
        self.game = Game([self.player(name) for name in self.NAMES], **options)

    def player(self, name):
        def program(target):
            loc = pyro.param(name, self.leaves[name])
            pyro.sample("x", dist.Normal(loc, 1.0), obs=target)

        def utility(play, pull):
            self.calls.append(name)
            target = self.target(name, self.values, pull)
            if name == self.broken:
                target = target * torch.nan
            return play.log_prob(name, target)

        return Player(name, program, self.optim, utility)

    @staticmethod
    def target(name, theta, pull):
        if name == "a":
            return 2 * theta["b"] + pull
        if name == "b":
            return theta["a"] - theta["c"]
        return theta["a"] * theta["b"] - pull

    @property
    def values(self):
        return {name: leaf.detach().clone() for name, leaf in self.leaves.items()}

    def by_hand(self, rounds, pulls, frozen=()):
        """Gradient steps, and each player's utility before its last move."""
        theta, utilities = self.values, {}
        for pull in pulls:
            for names in rounds:
                points = {name: self.target(name, theta, pull) for name in names}
                residuals = {n: p - theta[n] for n, p in points.items() if n not in frozen}
                for name, residual in residuals.items():
                    utilities[name] = dist.Normal(0.0, 1.0).log_prob(residual).item()
                    theta[name] = theta[name] + RATE * residual
        return theta, utilities


def close(seen, expected):
    torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-12)


# Schedules.

SCHEDULES = {
    "alternating": [["a"], ["b"], ["c"]],
    "simultaneous": [["a", "b", "c"]],
    "reversed": ["c", "b", "a"],
    "repeats": ["a", "b", "b", "a", "c"],
    "groups": [("a", "b"), "c"],
    "groups and repeats": ["c", ["b", "a"], "c", ("a",)],
    "without c": ["b", "a"],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_moves_in_turn_against_those_before(schedule, device):
    rounds = SCHEDULES[schedule]
    updates = schedule if schedule in ("alternating", "simultaneous") else rounds
    chase = Chase(updates=updates, device=device)
    pulls = [0.5, -1.0, 0.7]
    theta, utilities = chase.by_hand(rounds, pulls)
    for pull in pulls:
        loss = chase.game.step(pull)
    close(chase.values, theta)
    close(loss.utilities, utilities)
    assert loss == pytest.approx(-sum(utilities.values()))
    assert chase.game.num_steps == 3
    assert list(loss.utilities) == [name for name in "abc" if name in utilities]
    assert all(leaf.grad is None for leaf in chase.leaves.values())


def test_no_utility_is_taken_more_often_than_it_must():
    chase = Chase(updates=["a", "b", "b", "c"])
    chase.game.step(0.0)
    chase.calls.clear()
    chase.game.step(0.0)
    assert chase.calls == ["a", "b", "b", "c"]


def test_a_player_without_utility_never_moves():
    chase = Chase()

    def program():
        pyro.sample("x", dist.Normal(pyro.param("fixed", torch.tensor(0.7)), 1.0))

    players = [Player("a", program), chase.player("b")]
    game = Game(players, updates="simultaneous")
    game.step(0.0)
    game.step(0.0)
    assert game.step(0.0).utilities.keys() == {"b"}
    assert "fixed" not in pyro.get_param_store() or pyro.param("fixed") == 0.7


@pytest.mark.parametrize("frozen", [("a",), ("b", "c")])
@pytest.mark.parametrize("schedule", ["alternating", "groups and repeats"])
def test_frozen_players_rest(schedule, frozen):
    rounds = SCHEDULES[schedule]
    chase = Chase(updates=schedule if schedule == "alternating" else rounds)
    chase.game.freeze(*frozen)
    assert chase.game.frozen == {*frozen}
    theta, utilities = chase.by_hand(rounds, [0.5, 0.5], frozen)
    before = chase.values
    chase.game.step(0.5)
    loss = chase.game.step(0.5)
    close(chase.values, theta)
    close(loss.utilities, utilities)
    assert all(torch.equal(chase.leaves[name], before[name]) for name in frozen)
    assert chase.game.evaluate_loss(0.5).utilities.keys() == {*"abc"}

    chase.game.thaw(*frozen)
    assert chase.game.frozen == frozenset()
    theta, utilities = chase.by_hand(rounds, [0.2])
    loss = chase.game.step(0.2)
    close(chase.values, theta)
    close(loss.utilities, utilities)


def test_evaluating_moves_nothing():
    chase = Chase()
    before = chase.values
    theta = {name: value.clone() for name, value in before.items()}
    loss = chase.game.evaluate_loss(0.5)
    assert chase.values == before
    assert chase.game.num_steps == 0
    for name, utility in loss.utilities.items():
        residual = chase.target(name, theta, 0.5) - theta[name]
        assert utility == pytest.approx(dist.Normal(0.0, 1.0).log_prob(residual).item())


def test_evaluating_nothing_is_no_loss_of_zero():
    chase = Chase()
    chase.game.freeze("a", "b", "c")
    try:
        loss = chase.game.evaluate_loss(0.5)
    except ValueError:
        return
    assert loss.utilities.keys() == {"a", "b", "c"}


@pytest.mark.parametrize("updates", ["alternating", "simultaneous"])
def test_batches_have_weights(updates):
    """u = sum over batches of w u(pull), so the gradient is sum w (t(pull) - theta)."""
    chase = Chase(updates=updates)
    weights, pulls = [2.0, 0.5, 0.0, 1.0], [0.5, -1.0, 100.0, 3.0]
    theta = chase.values
    for names in SCHEDULES[updates]:
        new = {}
        for name in names:
            residuals = [chase.target(name, theta, pull) - theta[name] for pull in pulls]
            new[name] = theta[name] + RATE * sum(
                w * r for w, r in zip(weights, residuals, strict=True)
            )
        theta |= new
    loss = chase.game.step(
        *(Batch(p).weighted(w) for p, w in zip(pulls[:-1], weights[:-1], strict=True)), Batch(3.0)
    )
    close(chase.values, theta)
    assert loss.utilities.keys() == {*"abc"}
    with pytest.raises(TypeError, match="one Batch or several"):
        chase.game.step(Batch(0.0), 1.0)


# Ownership.


def observer(parameters, *names):
    """A program that touches some of these parameters."""

    def program(target=0.0):
        loc = sum(pyro.param(name, parameters[name]) for name in names)
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.as_tensor(target))

    return program


def fit(name):
    return lambda play, target: play.log_prob(name, target)


def leaves_of(*names):
    return {name: torch.zeros((), requires_grad=True) for name in names}


@pytest.mark.parametrize("updates", ["alternating", "simultaneous", ["b", "a"]])
def test_a_shared_parameter_moves_with_the_first(updates):
    leaves = leaves_of("own a", "own b", "both")
    a, b = observer(leaves, "own a", "both"), observer(leaves, "own b", "both")
    still, moving = SGD({"lr": 0.0}), SGD({"lr": 0.1})
    game = Game(
        [Player("a", a, still, fit("a")), Player("b", b, moving, fit("b"))], updates=updates
    )
    game.step(1.0)
    assert [leaf.item() for leaf in leaves.values()] == pytest.approx([0.0, 0.1, 0.0])


def test_claims_override_the_order():
    leaves = leaves_of("own a", "own b", "both")
    a, b = observer(leaves, "own a", "both"), observer(leaves, "own b", "both")
    claim = {"own b": leaves["own b"], "both": leaves["both"]}.items()
    still, moving = SGD({"lr": 0.0}), SGD({"lr": 0.1})
    game = Game(
        [Player("a", a, moving, fit("a")), Player("b", b, still, fit("b"), parameters=claim)]
    )
    game.step(1.0)
    assert [leaf.item() for leaf in leaves.values()] == pytest.approx([0.1, 0.0, 0.0])


def test_the_first_owns_a_shared_parameter_even_if_frozen_from_the_start():
    leaves = leaves_of("own a", "own b", "both")
    a, b = observer(leaves, "own a", "both"), observer(leaves, "own b", "both")
    sgd = SGD({"lr": 0.1})
    game = Game([Player("a", a, sgd, fit("a")), Player("b", b, sgd, fit("b"))])
    game.freeze("a")
    game.step(1.0)
    assert leaves["both"].item() == 0.0
    assert leaves["own b"].item() == pytest.approx(0.1)


def test_the_first_owns_a_shared_parameter_even_if_the_schedule_leaves_it_out():
    leaves = leaves_of("own a", "own b", "both")
    a, b = observer(leaves, "own a", "both"), observer(leaves, "own b", "both")
    sgd = SGD({"lr": 0.1})
    game = Game([Player("a", a, sgd, fit("a")), Player("b", b, sgd, fit("b"))], updates=["b"])
    game.step(1.0)
    assert leaves["both"].item() == 0.0


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_graph_in_the_arguments_takes_nothing_from_its_owner(order):
    leaves = leaves_of("own a", "own b")
    programs = {"a": observer(leaves, "own a"), "b": observer(leaves, "own b")}
    utilities = {
        "a": lambda play, x: play.log_prob("a", leaves["own b"] + x),
        "b": lambda play, x: play.log_prob("b", x),
    }
    sgd = SGD({"lr": 0.1})
    game = Game([Player(name, programs[name], sgd, utilities[name]) for name in order])
    game.step(1.0)
    moved = 0.1 if order == "ab" else 0.1 * 1.1  # a runs after b, which has moved before it or not
    assert leaves["own b"].item() == pytest.approx(0.1)
    assert leaves["own a"].item() == pytest.approx(moved)


def linear(net):
    def program(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(net(torch.ones_like(x)), 1.0).to_event(1), obs=x)

    return program


X = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)


def test_a_claimed_module_moves_without_a_statement(device):
    net, other = nn.Linear(2, 2).to(device), nn.Linear(2, 2).to(device)
    sgd = SGD({"lr": 0.1})
    game = Game(
        [
            Player("a", linear(net), sgd, fit("a"), parameters=net),
            Player("b", linear(other), sgd, fit("b"), parameters=other),
        ]
    )
    game.freeze("b")
    before = clone(other.parameters())
    expected = net.bias.detach() + 0.1 * (X.to(device) - net(torch.ones_like(X.to(device)))).sum(0)
    game.step(X.to(device))
    close(net.bias.detach(), expected.detach())
    assert identical(other.parameters(), before)
    assert game.state_dict()["players"]["a"]["parameters"].keys() == {"weight", "bias"}


def test_a_player_that_never_moves_keeps_what_it_claims():
    leaves = leaves_of("own b", "both")
    prior = Player("prior", observer(leaves, "both"), parameters={"both": leaves["both"]}.items())
    b = Player("b", observer(leaves, "own b", "both"), SGD({"lr": 0.1}), fit("b"))
    for players in ([prior, b], [b, prior]):
        Game(players).step(1.0)
        assert leaves["both"].item() == 0.0
    assert leaves["own b"].item() > 0.1


def test_claims_of_a_player_serve_more_than_one_game():
    net = nn.Linear(2, 2)
    player = Player("a", linear(net), SGD({"lr": 0.1}), fit("a"), net.named_parameters())
    Game([player])
    before = net.bias.detach().clone()
    Game([player]).step(X)
    assert not torch.equal(net.bias, before)


def test_claims_of_one_name_are_all_kept_or_refused():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    claim = itertools.chain(first.named_parameters(), second.named_parameters())
    before = clone([first.bias, second.bias])
    try:
        player = Player(
            "a", linear(nn.Sequential(first, second)), SGD({"lr": 0.1}), fit("a"), claim
        )
        Game([player]).step(X)
    except ValueError as error:
        assert "weight" in str(error)
        return
    assert not torch.equal(first.bias, before[0])
    assert not torch.equal(second.bias, before[1])


def test_claimed_parameters_that_need_no_gradient_stay():
    net = nn.Linear(2, 2)
    net.weight.requires_grad_(False)
    before = clone(net.parameters())
    Game([Player("a", linear(net), SGD({"lr": 0.1}), fit("a"), net)]).step(X)
    assert torch.equal(net.weight, before[0])
    assert not torch.equal(net.bias, before[1])


@pytest.mark.parametrize(
    "claim",
    [lambda net: net.parameters(), lambda net: list(net.parameters()), lambda net: net.weight],
)
def test_claims_without_names_are_refused(claim):
    net = nn.Linear(3, 2)
    with pytest.raises(TypeError, match="named_parameters"):
        Game([Player("a", linear(net), SGD({"lr": 0.1}), fit("a"), claim(net))])


@pytest.mark.parametrize("claim", [{}, nn.Tanh(), []])
def test_empty_claims_are_refused(claim):
    net, other = nn.Linear(2, 2), nn.Linear(2, 2)
    sgd = SGD({"lr": 0.1})
    players = [
        Player("a", linear(net), sgd, fit("a"), claim),
        Player("b", linear(other), sgd, fit("b"), other),
    ]
    with pytest.raises(ValueError, match="'a'"):
        Game(players).step(X)


# State.


class Training:
    """Three players that draw from each other, to be stopped and taken up in a fresh process."""

    OPTIMS = {
        "adam": lambda: Adam({"lr": 0.03}),
        "scheduled": lambda: ExponentialLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9}
        ),
        "momentum": lambda: SGD({"lr": 0.01, "momentum": 0.9}),
    }
    UPDATES = ["c", ("a", "b"), "a"]

    def __init__(self, optim, state=None, device="cpu"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0 if state is None else 1)
        self.nets = {name: nn.Linear(2, 2).to(device) for name in "abc"}
        self.optim = self.OPTIMS[optim]()
        self.x = X.to(device)
        self.game = Game([self.player(name) for name in "abc"], updates=self.UPDATES)
        if state is not None:
            self.game.load_state_dict(state)

    def player(self, name):
        net = self.nets[name]
        other = "bca"["abc".index(name)]

        def program(x):
            scale = torch.ones(())
            if name != "c":
                pyro.module(name, net)
                scale = pyro.param(
                    f"scale {name}", lambda: 1 + torch.rand(()), dist.constraints.positive
                )
            with pyro.plate("rows", len(x)):
                law = dist.Normal(net(torch.ones_like(x)), scale.to(x.device))
                pyro.sample("x", law.to_event(1), obs=x)

        def utility(play, x):
            dream = play.sample(other, x)["x"]
            return play.log_prob(name, x) + play.log_prob(name, dream)

        return Player(name, program, self.optim, utility, net if name == "c" else None)

    def run(self, steps):
        for _ in range(steps):
            self.game.step(self.x + torch.randn(()))
            if hasattr(self.optim, "step"):
                self.optim.step()
        return clone(p for net in self.nets.values() for p in net.parameters()) + [
            pyro.param(f"scale {name}").detach().clone() for name in "ab"
        ]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("optim", Training.OPTIMS)
@pytest.mark.parametrize("frozen", [(), ("a",), ("b", "c")])
def test_resumed_training_goes_on_bit_for_bit(optim, frozen, device):
    def go_on(training):
        rested = training.run(3)
        training.game.thaw(*frozen)
        return rested + training.run(2)

    def begin():
        training = Training(optim, device=device)
        training.run(2)
        training.game.freeze(*frozen)
        return training

    expected = go_on(begin())
    first = begin()
    state = first.game.state_dict()
    first.run(1)  # the state is a copy: going on leaves it alone
    resumed = Training(optim, through_a_file(state), device)
    assert resumed.game.frozen == {*frozen}
    assert identical(go_on(resumed), expected)


@pytest.mark.parametrize("clip", [{}, lambda module, name: {"clip_norm": 0.1}])
@pytest.mark.parametrize("batch", [(), (X,)])
def test_claims_resume_with_settings_that_go_by_name(clip, batch):
    """A fresh parameter store has no names yet, and names are what the optimiser asks for."""

    def game(net):
        def program(x):
            pyro.module("net", net)
            with pyro.plate("rows", len(x)):
                pyro.sample("x", dist.Normal(net(torch.ones_like(x)), 1.0).to_event(1), obs=x)

        adam = Adam(lambda name: {"lr": 0.1 if name.endswith("bias") else 0.01}, clip)
        return Game([Player("a", program, adam, fit("a"), parameters=net)])

    net, other = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
    first = game(net)
    first.step(X)
    state = through_a_file(first.state_dict())
    first.step(X)
    pyro.clear_param_store()
    resumed = game(other)
    resumed.load_state_dict(state, *batch)
    again = resumed.state_dict()["players"]["a"]
    assert again["optim"].keys() == {"weight", "bias"}
    assert bool(resumed.players[0].optim.optim_objs) == bool(batch)
    resumed.step(X)
    assert identical(other.parameters(), clone(net.parameters()))


def test_evaluation_uses_loaded_values_of_frozen_players():
    training = Training("adam")
    training.run(2)
    training.game.freeze("b")
    state = training.game.state_dict()
    expected = training.game.evaluate_loss(X).utilities
    assert Training("adam", state).game.evaluate_loss(X).utilities == expected


def test_players_frozen_from_the_start_are_in_the_state():
    training = Training("adam")
    training.game.freeze("b")
    training.run(2)
    state = training.game.state_dict()
    assert state["players"]["b"]["parameters"].keys() >= {"b$$$weight", "b$$$bias", "scale b"}


def test_another_training_whose_parameters_have_the_same_names_is_noticed():
    first = Training("adam")
    first.run(2)
    state = first.game.state_dict()
    other = Training("adam")  # clears the parameter store
    other.run(2)
    weights = [p for x in (first, other) for net in x.nets.values() for p in net.parameters()]
    before = clone(weights)
    for _ in range(2):
        with pytest.raises(ValueError, match="other parameters of that name are in the way"):
            first.game.step(X)
        assert same(first.game.state_dict()["players"], state["players"])
        assert identical(weights, before)
    pyro.clear_param_store()
    first.game.step(X)
    assert not identical(weights, before)


def test_going_back_within_a_training():
    training = Training("adam")
    training.run(2)
    state = training.game.state_dict()
    once = training.run(3)
    training.game.load_state_dict(state)
    assert training.game.num_steps == 2
    assert identical(training.run(3), once)


def test_loaded_values_survive_saving_before_they_are_used():
    training = Training("adam")
    training.run(2)
    training.game.freeze("c")
    state = training.game.state_dict()
    again = Training("adam", through_a_file(state)).game.state_dict()
    for name in "abc":
        for part in ("parameters", "optim"):
            assert again["players"][name][part].keys() == state["players"][name][part].keys()
    assert (again["frozen"], again["num_steps"]) == (["c"], 2)


def test_values_that_nobody_asks_for_cost_nothing():
    chase = Chase()
    chase.game.step(0.0)
    state = chase.game.state_dict()
    state["players"]["a"]["parameters"]["late"] = torch.zeros(())
    chase.game.load_state_dict(state)
    with pytest.warns(
        UserWarning, match=r"of the a that no program has touched by now: \['late'\]"
    ):
        chase.game.step(0.0)
    chase.calls.clear()
    chase.game.step(0.0)
    assert chase.calls == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("frozen"), "a state of Game with the keys"),
        (lambda state: state["players"].pop("b"), "state of Game with the players"),
        (lambda state: state["players"]["b"].pop("optim"), "state of the b to have the keys"),
        (
            lambda state: state["players"]["a"]["parameters"].pop("scale a"),
            "doesn't fit the parameters of the a.*scale a.*nothing",
        ),
        (
            lambda state: state["players"]["c"]["parameters"].update({"weight": torch.zeros(7)}),
            r"parameters of the c.*\(2, 2\).*\(7,\)",
        ),
        (lambda state: state.update(frozen=["d"]), "'d'"),
    ],
)
def test_foreign_states_are_refused_and_change_nothing(spoil, message):
    training = Training("adam")
    before = training.run(2)
    state = copy.deepcopy(training.game.state_dict())
    spoil(state)
    with pytest.raises(ValueError, match=message):
        training.game.load_state_dict(state)
    assert identical(training.run(0), before)
    assert training.game.frozen == frozenset()


def test_a_state_of_another_class_is_refused():
    training = Training("adam")
    training.run(1)
    with pytest.raises(ValueError, match="Expected a state of Game .* got list"):
        training.game.load_state_dict([training.game.state_dict()])
    ladder = Ladder()
    symeq = SymmetricEquilibrium(ladder.model, ladder.guide, SGD({"lr": 0.1}))
    with pytest.raises(ValueError, match=r"with the players \['decoder', 'encoder'\]"):
        symeq.load_state_dict(training.game.state_dict())


def test_losses_pickle():
    loss = Chase().game.step(0.5)
    for again in (pickle.loads(pickle.dumps(loss)), copy.copy(loss), copy.deepcopy(loss)):
        assert isinstance(again, GameLoss)
        assert (again, again.utilities) == (loss, loss.utilities)
    assert loss + 1 == float(loss) + 1


# Errors.


def snapshot(game):
    return {key: value for key, value in game.state_dict().items() if key != "random"}


OPTIMS = {
    "momentum": lambda: SGD({"lr": RATE, "momentum": 0.9}),
    "adam": lambda: Adam({"lr": RATE}),
    "scheduled": lambda: ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": RATE}, "gamma": 0.9}
    ),
}


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("broken", ["b", "c"])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("updates", ["simultaneous", ["a", "b", "a", "c"]])
def test_an_error_of_a_later_player_takes_all_moves_back(updates, steps, broken, optim):
    chase, twin = (Chase(OPTIMS[optim](), updates=updates) for _ in range(2))
    for _ in range(steps):
        chase.game.step(0.5)
    before, values = snapshot(chase.game), chase.values
    chase.broken = broken
    with pytest.raises(ValueError, match="support|finite"):
        chase.game.step(0.5)
    assert same(chase.values, values)
    if steps:
        assert same(snapshot(chase.game), before)
    assert chase.game.num_steps == steps
    chase.broken = None
    chase.game.step(0.5)
    pyro.clear_param_store()
    for _ in range(steps + 1):
        twin.game.step(0.5)
    assert same(chase.values, twin.values)


def test_parameters_that_turn_up_in_a_failed_step_stay_as_they_were():
    leaves = leaves_of("own a", "late", "own b")

    def a(target, late):
        loc = pyro.param("own a", leaves["own a"])
        if late:
            loc = loc + pyro.param("late", leaves["late"])
        pyro.sample("x", dist.Normal(loc, 1.0), obs=target)

    def b(target, late):
        loc = pyro.param("own b", leaves["own b"])
        pyro.sample("x", dist.Normal(loc, 1.0), obs=target * (torch.nan if late else 1.0))

    def utility(name):
        return lambda play, *args: play.log_prob(name, *args)

    adam = Adam({"lr": 0.1})
    game = Game([Player("a", a, adam, utility("a")), Player("b", b, adam, utility("b"))])
    target = torch.tensor(1.0)
    game.step(target, False)
    before = clone(leaves.values())
    with pytest.raises(ValueError, match="support|finite"):
        game.step(target, True)
    assert identical(leaves.values(), before)


@pytest.mark.parametrize("why", ["frozen", "warmup"])
def test_an_error_of_a_decoder_that_only_watches_undoes_the_encoders_move(why):
    ladder = Ladder()
    x = torch.tensor([[1.0, 0.0, 1.0]])
    warmup = 9 if why == "warmup" else 0
    symeq = SymmetricEquilibrium(
        ladder.model, ladder.guide, Adam({"lr": 0.1}), encoder_warmup=warmup
    )
    if why == "frozen":
        symeq.step(x)
        symeq.freeze("decoder")
    symeq.step(x)
    before = clone(ladder.parameters())
    with pytest.raises(ValueError, match="not finite"):
        symeq.step(x * torch.nan)
    assert identical(ladder.parameters(), before)


class TestRefusals:
    """What can't be a game says why."""

    @staticmethod
    def player(name="a", utility=None, **options):
        program = observer(leaves_of(name), name)
        return Player(name, program, SGD({"lr": 0.1}), utility or fit(name), **options)

    @pytest.mark.parametrize("verb", ["freeze", "thaw"])
    def test_unknown_players(self, verb):
        game = Game([self.player("a"), self.player("b")])
        with pytest.raises(ValueError, match=r"no player 'c'; there are \['a', 'b'\]"):
            getattr(game, verb)("a", "c")
        assert game.frozen == frozenset()

    @pytest.mark.parametrize("verb", ["evaluate", "respond"])
    def test_players_without_a_utility(self, verb):
        game = Game([self.player("a"), Player("prior", observer(leaves_of("b"), "b"))])
        for name in ("prior", "c"):
            with pytest.raises(ValueError, match=f"no player '{name}' with a utility; there are"):
                getattr(game, verb)(name)

    @pytest.mark.parametrize(
        ("updates", "message"),
        [
            (["a", "c"], "no player 'c'"),
            ([("a", "c")], "no player 'c'"),
            (["a", "prior"], r"updates= names \['prior'\], who have no utility and never move"),
            ([("a", "a")], "at once, each of them once"),
            ("parallel", "updates='alternating', 'simultaneous' or the names .* got 'parallel'"),
            ([], "updates"),
            ([()], "updates"),
        ],
    )
    def test_schedules(self, updates, message):
        prior = Player("prior", observer(leaves_of("p"), "p"))
        with pytest.raises(ValueError, match=message):
            Game([self.player("a"), self.player("b"), prior], updates=updates)

    @pytest.mark.parametrize("updates", [None, 3, [1]])
    def test_schedules_of_another_kind(self, updates):
        with pytest.raises((TypeError, ValueError), match="updates"):
            Game([self.player("a")], updates=updates)

    @pytest.mark.parametrize(
        ("value", "error", "message"),
        [
            (
                lambda u: u.expand(3),
                ValueError,
                r"player 'a' to return a scalar, got shape \(3,\)",
            ),
            (lambda u: u[None], ValueError, r"got shape \(1,\). Sum over the batch"),
            (lambda u: u.item(), TypeError, "scalar tensor, got float. Return what play.log_prob"),
            (lambda u: None, TypeError, "scalar tensor, got NoneType"),
            (lambda u: u * torch.nan, ValueError, "finite utility of the a, got nan"),
            (lambda u: u / 0, ValueError, "finite utility of the a, got -inf"),
            (lambda u: u.detach(), ValueError, "doesn't depend on its parameters"),
        ],
    )
    def test_utilities(self, value, error, message):
        game = Game([self.player("a", lambda play, x: value(play.log_prob("a", x)))])
        with pytest.raises(error, match=message):
            game.step(0.0)
        assert game.num_steps == 0

    @pytest.mark.parametrize("own", [0.0, 1.0])
    def test_utilities_that_draw_from_the_player_and_do_not_score_it(self, own):
        """Without draws of its own, a player that has nothing to learn may say so by 0."""
        loc = torch.zeros((), requires_grad=True)

        def program():
            pyro.sample("x", dist.Normal(pyro.param("loc", loc), 1.0))

        utility = lambda play, x: own * (play.sample("b")["x"] - x) ** 2  # noqa: E731
        game = Game([self.player("a"), Player("b", program, SGD({"lr": 0.1}), utility)])
        if own == 0:
            game.step(0.0)
            assert loc == 0
            return
        with pytest.raises(ValueError, match=r"of the b doesn't depend on .* \['loc'\]. Does it"):
            game.step(0.0)
        assert game.num_steps == 0

    def test_a_site_that_nobody_sampled(self):
        def program():
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

        game = Game([Player("a", program, SGD({"lr": 0.1}), lambda play: play.log_prob("a"))])
        with pytest.raises(ValueError, match=r"player 'a' samples \['z'\], for which log_prob"):
            game.step()

    def test_two_players_of_one_name(self):
        with pytest.raises(ValueError, match="Two players have the name 'a'"):
            Game([self.player("a"), self.player("a")])

    def test_two_claims_of_one_parameter(self):
        net = nn.Linear(1, 1)
        with pytest.raises(ValueError, match="'a' and 'b' both claim the parameter 'weight'"):
            Game([self.player("a", parameters=net), self.player("b", parameters=net)])

    def test_optimiser_without_utility_and_the_reverse(self):
        with pytest.raises(ValueError, match="'a'.* has no utility"):
            Player("a", lambda: None, SGD({"lr": 0.1}))
        with pytest.raises(ValueError, match="'a'.* has no optimiser"):
            Player("a", lambda: None, utility=fit("a"))

    @pytest.mark.parametrize(
        "optim", [torch.optim.Adam, {"lr": 0.1}, torch.optim.SGD([torch.zeros(1)], 0.1)]
    )
    def test_optimisers_of_another_kind(self, optim):
        with pytest.raises(
            TypeError, match="optimiser of player 'a' to be a pyro.optim.PyroOptim"
        ):
            Player("a", lambda: None, optim, fit("a"))

    def test_programs_and_players_of_another_kind(self):
        with pytest.raises(TypeError, match="program of player 'a' to be a Pyro program, got int"):
            Player("a", 3)
        with pytest.raises(TypeError, match="players to be of class Player"):
            Game([lambda: None])

    def test_utilities_of_another_kind(self):
        with pytest.raises(TypeError, match="utility of player 'a'"):
            Player("a", lambda: None, SGD({"lr": 0.1}), 3.0)

    def test_one_player_without_a_list(self):
        with pytest.raises(TypeError, match="players"):
            Game(self.player("a"))

    def test_nobody_learns(self):
        with pytest.raises(ValueError, match="No player has a utility"):
            Game([Player("a", lambda: None)])
        with pytest.raises(ValueError, match="No player has a utility"):
            Game([])

    def test_all_frozen(self):
        game = Game([self.player("a"), self.player("b")])
        game.freeze("a", "b")
        with pytest.raises(ValueError, match=r"Nobody moves: the players \['a', 'b'\] are frozen"):
            game.step(0.0)

    def test_those_who_move_are_frozen(self):
        game = Game([self.player("a"), self.player("b")], updates=["b"])
        game.freeze("b")
        with pytest.raises(ValueError, match=r"Nobody moves: the players \['b'\] are frozen"):
            game.step(0.0)

    def test_nothing_to_learn_speaks_of_the_players(self):
        def program(target):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.as_tensor(target))

        game = Game([Player("a", program, SGD({"lr": 0.1}), fit("a"))])
        with pytest.raises(ValueError, match="There is nothing to learn") as error:
            game.step(0.0)
        assert "guide" not in str(error.value)


def test_reprs():
    chase = Chase(updates=["a", ("b", "c")])
    assert repr(chase.game) == (
        "Game(players=['a', 'b', 'c'], updates=['a', ('b', 'c')], num_steps=0)"
    )
    assert repr(chase.game.players[0]) == "Player('a')"


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_a_tensor_of_two_names_takes_one_step(kind):
    weight = torch.tensor(0.0, requires_grad=True)

    def program(x):
        loc = pyro.param("one name", weight) + pyro.param("another", weight)
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def utility(play, x):
        return play.log_prob("a", x)

    Game([Player("a", program, kind({"lr": 0.1}), utility)]).step(torch.tensor(0.5))
    assert weight.item() == pytest.approx(0.1)  # SGD: the gradient is 2 * 0.5


def test_settings_that_an_optimiser_changes_are_undone():
    chase = Chase(ClippedAdam({"lr": 0.1, "lrd": 0.5}))
    chase.game.step(0.5)
    chase.broken = "b"
    with pytest.raises(ValueError, match="No log-probability at site"):
        chase.game.step(0.5)
    chase.broken = None
    chase.game.step(0.5)
    settings = {
        name: optimizer["optimizer"]["param_groups"][0]["lr"]
        for player in chase.game.state_dict()["players"].values()
        for name, optimizer in player["optim"].items()
    }
    assert settings == dict.fromkeys("abc", 0.025)


def test_an_interrupt_leaves_all_where_they_were():
    chase = Chase(Adam({"lr": 0.1}))
    chase.game.step(0.5)
    before = chase.values
    target = chase.target

    def interrupted(name, theta, pull):
        if name == "c":
            raise KeyboardInterrupt
        return target(name, theta, pull)

    chase.target = interrupted
    with pytest.raises(KeyboardInterrupt):
        chase.game.step(0.5)
    assert chase.values == before


def test_nothing_is_learned_in_inference_mode():
    chase = Chase()
    with torch.inference_mode(), pytest.raises(ValueError, match="within torch.inference_mode"):
        chase.game.step(0.5)
    assert chase.game.num_steps == 0


def test_a_state_of_another_optimiser_changes_nothing():
    chase = Chase(SGD({"lr": 0.1, "momentum": 0.9}))
    chase.game.step(0.5)
    state = copy.deepcopy(chase.game.state_dict())
    other = Chase(Adam({"lr": 0.1}))
    other.game.step(0.2)
    before, kept = other.values, copy.deepcopy(other.game.state_dict())
    with pytest.raises(ValueError, match=r"The state can't be loaded \(KeyError"):
        other.game.load_state_dict(state)
    assert other.values == before
    assert str(other.game.state_dict()) == str(kept)
    other.game.step(0.2)


def test_a_score_of_another_player_is_a_number():
    """a can't move by what its own network does within the program of b."""
    shared = nn.Linear(1, 1)

    def a(x):
        pyro.module("shared", shared)
        pyro.sample("x", dist.Normal(shared(x).sum(), 1.0), obs=x.sum())

    def b(x):
        pyro.module("shared", shared)
        bias = pyro.param("bias", torch.tensor(0.0))
        pyro.sample("x", dist.Normal(shared(x).sum() + bias, 1.0), obs=x.sum())

    seen = {}

    def u_a(play, x):
        seen["b"] = play.log_prob("b", x)
        return play.log_prob("a", x) + seen["b"]

    sgd = SGD({"lr": 0.1})
    x = torch.tensor([0.7])
    error = (x.sum() - shared(x).sum()).item()
    before = shared.bias.item()
    Game([Player("a", a, sgd, u_a), Player("b", b, sgd, fit("b"))]).step(x)
    assert not seen["b"].requires_grad
    assert shared.bias.item() == pytest.approx(before + 0.1 * error)


def test_evaluating_keeps_running_averages():
    norm = nn.BatchNorm1d(2)

    def program(x):
        pyro.module("norm", norm)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(norm(x), 1.0).to_event(1), obs=x)

    game = Game([Player("a", program, SGD({"lr": 0.1}), fit("a"))])
    game.step(X)
    before = norm.running_mean.clone()
    game.evaluate_loss(X)
    assert torch.equal(norm.running_mean, before)
    game.step(X)
    assert not torch.equal(norm.running_mean, before)


def test_claimed_names_are_no_others():
    net = nn.Linear(2, 2)

    def program(x):
        weight = pyro.param("weight", torch.tensor(1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(net(x) * weight, 1.0).to_event(1), obs=x)

    game = Game([Player("a", program, SGD({"lr": 0.1}), fit("a"), net)])
    with pytest.raises(ValueError, match=r"claims parameters of the names \['weight'\]"):
        game.step(X)
    named = [(f"net.{name}", leaf) for name, leaf in net.named_parameters()]
    game = Game([Player("a", program, SGD({"lr": 0.1}), fit("a"), named)])
    game.step(X)
    own = {"weight", "net.weight", "net.bias"}
    assert game.state_dict()["players"]["a"]["parameters"].keys() == own
