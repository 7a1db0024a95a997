"""Players in processes of their own: what they learn, what crosses, and who goes missing."""

import math
import re
import signal
import struct
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import SGD

from pyro_symeq import Batch, DreamExchange, data_exchange_game
from pyro_symeq.mailbox import Mailbox
from pyro_symeq.store import serve
from tests.montecarlo import assert_mean
from tests.players import (
    Choice,
    Gauss,
    Pair,
    Pictures,
    Process,
    Still,
    greetings,
    messages,
)
from tests.test_data_exchange import PI, THREE, TWO, equilibrium, population

HALF = {"a": 0.5, "b": 0.5}
ZEROS = torch.zeros(3, dtype=torch.float64)


@pytest.fixture
def port():
    store, port = serve("127.0.0.1", 0)
    yield port
    del store


@pytest.fixture
def start(port):
    """Starts players, and ends them after the test."""
    started = []

    def begin(kind, *args, **kwargs):
        started.append(Process(kind, port, *args, **kwargs))
        return started[-1]

    yield begin
    for process in started:
        process.killed()


def together(players, method, *args):
    """Lets players do something at once, each with arguments of its own; returns the results."""
    for player, its in zip(players, zip(*args, strict=True), strict=True):
        player.begin(method, *its)
    return [player.value() for player in players]


# What they learn.


def rows(weights):
    """Each player's weights, which name all players."""
    return {name: dict.fromkeys(weights, 0.0) | weights[name] for name in weights}


def one_process(kind, weights, starts, data, num_steps):
    """The paths of the parameters in the game of one process."""
    store = torch.distributed.HashStore()
    learners = {name: kind(store, name, {name: 1.0}, starts[name]) for name in weights}
    models = {name: learner.programs() for name, learner in learners.items()}
    game = data_exchange_game(models, SGD({"lr": 0.1}), weights, updates="simultaneous")
    paths = {name: [] for name in weights}
    for _ in range(num_steps):
        game.step(**{name: {"x": x} for name, x in data.items()})
        for name, learner in learners.items():
            paths[name].append(learner.theta())
    return paths


STARTS = {"a": 0.5, "b": -1.0, "c": 2.0}
PAIRS = {"a": [0.5, -0.2, 0.3], "b": [-1.0, 0.7, 0.1]}


@pytest.mark.parametrize(
    ("kind", "weights", "starts", "options"),
    [
        (Still, TWO, STARTS, {}),
        (Still, TWO, STARTS, {"num_dreams": 5}),
        (Still, THREE, STARTS, {}),
        (Pair, TWO, PAIRS, {"updates": "simultaneous"}),
        (Still, TWO, STARTS, {"capture": True}),
    ],
    ids=["two", "other numbers of dreams", "three with zeros", "pairs", "captured"],
)
def test_the_same_dreams_lead_where_they_do_in_one_process(start, kind, weights, starts, options):
    """Draws are means, so nothing is left to chance; the parameters agree up to rounding."""
    data = {name: torch.randn(2 + i) for i, name in enumerate(weights)}
    players = [
        start(kind, name, row, starts[name], **options) for name, row in rows(weights).items()
    ]
    reached = together(players, "steps", [8] * len(players), data.values())
    wanted = one_process(kind, weights, starts, data, 8)
    for name, (path, _) in zip(weights, reached, strict=True):
        torch.testing.assert_close(path, wanted[name], rtol=1e-10, atol=1e-12)


def test_batches_and_dreams_of_any_number_count_as_in_the_formula(start):
    """The mean of the gradients is that of u_i, at 5 standard errors.

    Steps are so short that the strategies stay where they are.
    """
    lr, num_steps = 1e-7, 400
    starts = {"a": torch.tensor([0.0, 1.0, -0.5]), "b": torch.tensor([0.3, -1.0, 0.2])}
    x, y = torch.tensor([0, 1, 1]), torch.tensor([2])
    players = [
        start(Choice, name, rows(TWO)[name], starts[name], lr=lr, num_dreams=n)
        for name, n in (("a", 7), ("b", None))
    ]
    parts = [(x, 1.0), (y, 0.5)]
    reached = together(players, "steps", [num_steps] * 2, [parts, torch.tensor([0, 0, 1, 2])])
    p = {name: theta.softmax(-1) for name, theta in starts.items()}
    counts = {
        "a": torch.tensor([1.0, 2.0, 0.5]),
        "b": torch.tensor([2.0, 1.0, 1.0]),
    }
    for name, other, (path, _) in zip("ab", "ba", reached, strict=True):
        gradients = (torch.stack(path) - torch.stack([starts[name], *path[:-1]])) / lr
        own, num_rows = TWO[name][name], counts[name].sum()
        mixture = own * counts[name] + (1 - own) * num_rows * p[other]
        assert_mean(gradients, mixture - num_rows * p[name])


@pytest.mark.parametrize("weights", [TWO, THREE], ids=["two", "three with zeros"])
def test_players_settle_in_the_closed_form(start, weights):
    """The mean of the last strategies has a standard error of 0.005; 6 of them are allowed.

    By chance, a comparison fails once in 500 million runs.
    """
    sizes = {"a": 400, "b": 200, "c": 600}
    players = [
        start(Choice, name, row, torch.zeros(3), seed=i)
        for i, (name, row) in enumerate(rows(weights).items())
    ]
    data = [population(PI[name], sizes[name]) for name in weights]
    means = together(
        players, "settled", data, [2 / sizes[name] for name in weights], [160] * len(players)
    )
    p = equilibrium(weights, {name: PI[name] for name in weights})
    for name, mean in zip(weights, means, strict=True):
        torch.testing.assert_close(mean, p[name], atol=0.03, rtol=0.0)


# What crosses.


def test_only_dreams_cross(start):
    """All bytes that a player puts into the store are known: a greeting, and draws of its model."""
    x = torch.randn(4)
    a = start(Gauss, "a", HALF, torch.randn(()), seed=1)
    b = start(Gauss, "b", HALF, torch.randn(()), seed=2)
    paths = together([a, b], "steps", [25, 25], [x, torch.randn(4)])
    sent, _ = a.call("tape")
    path, _ = paths[0]
    (greeting,) = greetings(sent)
    del greeting["id"]
    assert greeting == {
        "format": 1,
        "byteorder": "little",
        "players": ["a", "b"],
        "hears": ["a", "b"],
        "needs": ["x"],
        "sites": {"x": {"shape": [], "dtype": "float64"}},
        "num_dreams": 4,
    }
    assert len(messages(sent)) == 25
    dreams = [torch.tensor(struct.unpack("4d", text)) for text in messages(sent)]
    noise = torch.stack(dreams[1:]) - torch.stack(path[:-1])[:, None]
    assert_mean(noise.flatten(), 0.0)
    assert_mean(noise.flatten() ** 2, 1.0)
    everything = b"".join(key.encode() + text for key, text in sent)
    secrets = [*x.tolist(), *torch.stack(path).tolist()]
    for type in "fd":
        for secret in secrets:
            assert struct.pack(type, secret) not in everything
    assert messages(b.call("tape")[1]) == messages(sent)


def test_given_the_dreams_that_crossed_each_step_is_the_formula(start):
    start_at, x = torch.tensor(0.3), torch.randn(4)
    a = start(Gauss, "a", {"a": 0.75, "b": 0.25}, start_at, lr=0.1)
    b = start(Gauss, "b", HALF, torch.tensor(-2.0))
    (path, _), _ = together([a, b], "steps", [6, 6], [x, torch.randn(2)])
    dreams = [torch.tensor(struct.unpack("4d", m)) for m in messages(a.call("tape")[1])]
    theta = start_at
    for dream, reached in zip(dreams, path, strict=True):
        theta = theta + 0.1 * (0.75 * (x - theta).sum() + 0.25 * (dream - theta).sum())
        torch.testing.assert_close(reached, theta)


def test_the_store_does_not_fill_up(port, start):
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)
    before = store.num_keys()
    players = [start(Gauss, name, HALF, torch.zeros(())) for name in "ab"]
    sizes = []
    for _ in range(3):
        together(players, "steps", [20, 20], [torch.zeros(3)] * 2)
        sizes.append(store.num_keys() - before)
    assert sizes == [2, 2, 2]  # the greetings
    for _ in range(3):  # two die at once, in the middle
        for player in players:
            player.begin("steps", 10_000, torch.zeros(3))
        time.sleep(0.3)
        for player in players:
            player.killed()
        players = [start(Gauss, name, HALF, torch.zeros(())) for name in "ab"]
        together(players, "steps", [2, 2], [torch.zeros(3)] * 2)
        assert store.num_keys() - before == 2


def test_one_who_does_not_listen_is_sent_nothing(start):
    a = start(Gauss, "a", {"a": 1.0, "b": 0.0}, torch.zeros(()))
    b = start(Gauss, "b", HALF, torch.zeros(()))
    together([a, b], "steps", [5, 5], [torch.zeros(3)] * 2)
    assert messages(b.call("tape")[0]) == [b""] * 5
    assert [len(message) for message in messages(a.call("tape")[0])] == [24] * 5


def test_dreams_do_not_depend_on_data(device):
    """A model that goes by its own data, and not by what it draws, would give them away."""

    def model(x):
        w = pyro.param("w", torch.zeros((), device=device))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(w + 0.9 * x, 1e-3), obs=x)

    exchange = alone(model)
    with pytest.raises(ValueError, match="What 'a' dreams at site 'x' depends on its data"):
        exchange.step(torch.randn(5, device=device))
    assert exchange.num_steps == 0


def test_the_model_dreams_on_zeros():
    seen = []

    def model(x, y=None):
        seen.append(x)
        w = pyro.param("w", torch.zeros(()))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(w, 1.0), obs=y)
            pyro.sample("x", dist.Normal(w, 1.0).expand([2]).to_event(1), obs=x)

    store = torch.distributed.HashStore()
    other = Mailbox("b", ["a"], store)
    other.open(
        {
            "format": 1,
            "byteorder": "little",
            "players": ["a", "b"],
            "hears": ["a"],
            "needs": ["x"],
            "sites": {"x": {"shape": [2], "dtype": "float64"}},
            "num_dreams": 6,
        }
    )
    exchange = DreamExchange("a", model, SGD({"lr": 0.1}), HALF, store, timeout=0.1)
    with pytest.raises(TimeoutError, match="lacks dreams of others"):
        exchange.step(7 + torch.rand(3, 2), y=torch.ones(3))
    ((_, parcel),) = other.exchange(lambda *_: b"", ["a"], 0.1).values()
    assert len(parcel) == 6 * 2 * 8
    assert len(seen[-1]) == 6
    assert not seen[-1].any()


# Who doesn't fit.


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            (Gauss, HALF, ZEROS),
            (Choice, HALF, torch.zeros(2, dtype=torch.int64)),
            r"site 'x': \{'shape': \[\], 'dtype': '\w+64'\} of '[ab]', \{'shape': \[\], 'dtype': ",
        ),
        (
            (Gauss, HALF, ZEROS),
            (Pictures, HALF, ZEROS.expand(2, 3)),
            r"site 'x': \{'shape': \[3?\], .*\{'shape': \[3?\], ",
        ),
        (
            (Gauss, HALF, ZEROS),
            (Gauss, HALF | {"c": 0.0}, ZEROS),
            r"players: \['a', 'b'(, 'c')?\] of '[ab]', \['a', 'b'(, 'c')?\] of '[ab]'",
        ),
    ],
    ids=["type", "shape", "players"],
)
def test_players_who_do_not_fit_are_told_so_on_both_sides(start, first, second, message):
    players = []
    for name, (kind, weights, x) in zip("ab", (first, second), strict=True):
        players.append(
            start(
                kind,
                name,
                weights,
                torch.zeros(3) if kind is Choice else torch.zeros(()),
            )
        )
        players[-1].begin("step", x)
    for player in players:
        error, _ = player.end()
        assert isinstance(error, ValueError)
        assert error.args[0].startswith("The players '")
        assert re.search(message, str(error))
        assert player.call("num_steps") == 0


def test_players_of_nothing_in_common():
    def model(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("w", torch.zeros(())), 1.0), obs=x)

    store = torch.distributed.HashStore()
    greeting = {
        "format": 1,
        "byteorder": "little",
        "players": ["a", "b"],
        "hears": ["a"],
        "needs": ["y"],
        "sites": {"y": {"shape": [], "dtype": "float64"}},
        "num_dreams": 6,
    }
    Mailbox("b", ["a"], store).open(greeting)
    exchange = DreamExchange("a", model, SGD({"lr": 0.1}), HALF, store)
    message = r"'a' takes \['x'\] and needs \['x'\], 'b' dreams \['y'\]; 'b' takes \['y'\] and"
    with pytest.raises(ValueError, match=message):
        exchange.step(torch.zeros(3))


# Who goes missing.


def test_the_other_goes_on_when_one_is_killed_until_it_returns(start, tmp_path):
    """A real kill in the middle of a run; the new process has the checkpoint of the old one."""
    x = torch.zeros(3)
    a = start(Gauss, "a", HALF, torch.tensor(1.0), on_missing="continue")
    b = start(Gauss, "b", HALF, torch.tensor(-1.0))
    together([a, b], "steps", [5, 5], [x, x])
    b.call("save", tmp_path / "b.pt")
    a.call("wait_for", 5.0)
    a.begin("steps_while", [], x)
    b.begin("steps_while", [], x)
    time.sleep(0.5)
    b.killed()
    _, (warning,) = a.end()
    since = a.call("missing")["b"]
    assert since >= 5
    a.call("steps", 10, x)  # nobody waits any more, and nothing is said
    assert a.call("missing") == {"b": since}
    assert a.call("num_steps") == since + 11
    assert warning.startswith(f"In step {since}, 'a' lacks dreams of others: 'b' gave no answer")
    assert warning.endswith("within 5 s. It goes on without.")

    a.begin("steps_while", ["b"], x)
    b = start(Gauss, "b", HALF, torch.tensor(0.0))
    b.call("load", tmp_path / "b.pt")
    b.begin("steps", 10, x)
    _, (back,) = a.end()
    assert "'a' has dreams of ['b'] again, who were missing since steps " in back
    assert back.endswith(f"{{'b': {since}}}.")
    a.begin("steps_while", [], x)
    b.value()
    assert b.call("num_steps") == 15
    assert b.call("missing") == {}
    b.call("leave")
    _, (gone,) = a.end()
    assert "lacks dreams of others: 'b' has left. It goes on" in gone


def test_the_other_stops_when_one_is_killed_and_goes_on_when_it_returns(start, tmp_path):
    x = torch.zeros(3)
    a = start(Gauss, "a", HALF, torch.tensor(1.0))
    b = start(Gauss, "b", HALF, torch.tensor(-1.0))
    together([a, b], "steps", [5, 5], [x, x])
    b.call("save", tmp_path / "b.pt")
    b.killed()
    a.call("wait_for", 0.5)
    theta = a.call("theta")
    for _ in range(2):
        a.begin("step", x)
        error, warned = a.end()
        assert isinstance(error, TimeoutError)
        assert str(error).startswith("In step 5, 'a' lacks dreams of others: 'b' gave no answer")
        assert "Nothing has moved." in str(error)
        assert warned == []
        assert torch.equal(a.call("theta"), theta)
        assert a.call("num_steps") == 5
    a.call("wait_for", 60.0)
    b = start(Gauss, "b", HALF, torch.tensor(0.0))
    b.call("load", tmp_path / "b.pt")
    together([a, b], "steps", [5, 5], [x, x])
    assert a.call("num_steps") == b.call("num_steps") == 10


def test_a_slow_player_is_missed_and_welcomed_back(start):
    """The process is halted for longer than the other waits, and then goes on by itself."""
    x = torch.zeros(3)
    a = start(Gauss, "a", HALF, torch.tensor(1.0), on_missing="continue")
    b = start(Gauss, "b", HALF, torch.tensor(-1.0))
    together([a, b], "steps", [3, 3], [x, x])
    a.call("wait_for", 1.0)
    b.begin("steps_while", [], x)
    b.signal(signal.SIGSTOP)
    a.begin("steps_while", [], x)
    _, (warning,) = a.end()
    assert "'b' gave no answer" in warning
    a.begin("steps_while", ["b"], x)
    b.signal(signal.SIGCONT)
    _, (warning,) = a.end()
    assert "'a' has dreams of ['b'] again" in warning
    assert a.call("missing") == {}


def test_two_go_on_without_the_third(start):
    """They learn from each other as before: the weight of the third is theirs."""
    weights = {"a": 0.5, "b": 0.25, "c": 0.25}
    lr = 1e-7
    options = {"on_missing": "continue", "lr": lr}
    starts = dict(zip("abc", torch.tensor([[0.0, 1.0], [1.0, 0.0], [3.0, 0.0]]), strict=True))
    x = torch.tensor([0, 1, 1, 1])
    players = [start(Choice, name, weights, theta, **options) for name, theta in starts.items()]
    together(players, "steps", [2] * 3, [x] * 3)
    players.pop().killed()
    for player in players:
        player.call("wait_for", 3.0)
    for player in players:
        player.begin("step", x)
    for player in players:
        _, (warning,) = player.end()
        assert "'c' gave no answer" in warning
    for player in players:
        player.call("wait_for", 60.0)
    before = players[0].call("theta")
    (path, losses), _ = together(players, "steps", [300] * 2, [x] * 2)
    gradients = (torch.stack(path) - torch.stack([before, *path[:-1]])) / lr
    p = {name: theta.softmax(-1) for name, theta in starts.items()}
    mixture = 2 / 3 * torch.tensor([1.0, 3.0]) + 1 / 3 * 4 * p["b"]
    assert_mean(gradients, mixture - 4 * p["a"])
    assert len(losses) == 300


def test_one_who_leaves_is_not_waited_for(start):
    x = torch.zeros(3)
    a = start(Gauss, "a", HALF, torch.tensor(1.0))
    b = start(Gauss, "b", HALF, torch.tensor(-1.0))
    together([a, b], "steps", [3, 3], [x, x])
    b.call("leave")
    begun = time.monotonic()
    a.begin("step", x)
    error, _ = a.end()
    assert isinstance(error, TimeoutError)
    assert "'b' has left" in str(error)
    assert time.monotonic() - begun < 20
    b.begin("step", x)  # a return
    while isinstance(error, TimeoutError):
        a.begin("step", x)
        error, _ = a.end()
    assert error.keys() == {"a"}
    b.value()


def test_one_who_comes_late_takes_part(start):
    x = torch.zeros(3)
    a = start(Gauss, "a", HALF, torch.tensor(1.0), timeout=0.5, on_missing="continue")
    a.begin("steps", 2, x)
    _, (warning,) = a.end()
    assert warning.startswith("In step 0, 'a' lacks dreams of others: 'b' gave no")
    a.begin("steps_while", ["b"], x)
    b = start(Gauss, "b", HALF, torch.tensor(-1.0))
    b.begin("step", x)
    _, (warning,) = a.end()
    assert "'a' has dreams of ['b'] again" in warning
    b.value()


def test_one_without_data_that_count_does_not_go_on_alone(start):
    a = start(
        Gauss, "a", {"a": 0.0, "b": 1.0}, torch.tensor(1.0), timeout=0.1, on_missing="continue"
    )
    a.begin("step", torch.zeros(3))
    error, _ = a.end()
    assert isinstance(error, TimeoutError)
    assert str(error).startswith(
        "The player 'a' gives its own data no weight, and of ['b'], from whom it"
    )
    assert torch.equal(a.call("theta"), torch.tensor(1.0))


def test_a_stopped_game_goes_on_as_if_it_had_not_stopped(start, tmp_path):
    """Bit for bit, if all players stop at the same step."""
    data = [torch.randn(3), torch.randn(4)]

    def begun(seed):
        return [
            start(Gauss, name, HALF, torch.tensor(1.0), seed=seed + i)
            for i, name in enumerate("ab")
        ]

    players = begun(1)
    wanted = together(players, "steps", [6, 6], data)
    for player in players:
        player.killed()
    players = begun(1)
    together(players, "steps", [3, 3], data)
    together(players, "save", [tmp_path / "a.pt", tmp_path / "b.pt"])
    for player in players:
        player.killed()
    players = begun(7)
    together(players, "load", [tmp_path / "a.pt", tmp_path / "b.pt"])
    for (path, _), (whole, _) in zip(
        together(players, "steps", [3, 3], data), wanted, strict=True
    ):
        assert torch.equal(torch.stack(path), torch.stack(whole[3:]))


def test_a_store_that_dies_is_told(start):
    host = start(Host)
    port = host.call("port")
    players = [Process(Gauss, port, name, HALF, torch.zeros(())) for name in "ab"]
    together(players, "steps", [3, 3], [torch.zeros(3)] * 2)
    theta = players[0].call("theta")
    host.killed()
    players[0].begin("step", torch.zeros(3))
    error, _ = players[0].end()
    assert isinstance(error, ConnectionError)
    assert str(error).startswith("The store can't be reached (")
    assert torch.equal(players[0].call("theta"), theta)
    assert players[0].call("num_steps") == 3
    players[0].call("leave")
    for player in players:
        player.killed()


class Host:
    """A store in a process of its own."""

    def __init__(self, store):
        self.store, self.at = serve("127.0.0.1", 0)

    def port(self):
        return self.at


# The calling conventions of a game.


def alone(model, name="a", **options):
    store = torch.distributed.HashStore()
    return DreamExchange(name, model, SGD({"lr": 0.1}), {name: 1.0}, store, **options)


def normal(x, y=None):
    w = pyro.param("w", torch.zeros(()))
    with pyro.plate("rows", len(x)):
        y = pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
        pyro.sample("x", dist.Normal(w + y, 1.0), obs=x)


def guide(x, y=None):
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(pyro.param("v", torch.zeros(())) * x, 1.0))


def test_it_is_a_game():
    x, y = torch.ones(3), torch.zeros(3)
    exchange = alone((normal, guide))
    assert exchange.learners == ("a.decoder", "a.encoder")
    loss = exchange.step(x)
    assert loss.utilities.keys() == {"a.decoder", "a.encoder"}
    exchange.step(x, y)
    exchange.step(x, y=y)
    exchange.step(Batch(x, y=y).weighted(3.0), Batch(x=x))
    assert exchange.num_steps == 4
    assert exchange.evaluate_loss(x).utilities.keys() == loss.utilities.keys()
    exchange.freeze("a.decoder")
    assert exchange.step(x).utilities.keys() == {"a.encoder"}
    assert repr(exchange) == "DreamExchange('a', weights={'a': 1.0}, num_steps=5, missing={})"


def test_evaluation_is_on_the_own_data_alone():
    def model(x):
        w = pyro.param("w", torch.zeros(()))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    store = torch.distributed.HashStore()
    exchange = DreamExchange("a", model, SGD({"lr": 0.1}), HALF, store)
    x = torch.randn(5)
    wanted = -dist.Normal(0.0, 1.0).log_prob(x).sum().item()
    assert exchange.evaluate_loss(x) == pytest.approx(wanted)
    assert store.num_keys() == 0


def test_a_nan_leaves_all_as_it_was(start):
    x = torch.zeros(3)
    players = [start(Gauss, name, HALF, torch.tensor(1.0)) for name in "ab"]
    together(players, "steps", [2, 2], [x, x])
    theta = players[0].call("theta")
    for player, batch in zip(players, (x * torch.nan, x), strict=True):
        player.begin("step", batch)
    error, _ = players[0].end()
    assert isinstance(error, ValueError)
    players[1].value()
    assert torch.equal(players[0].call("theta"), theta)
    together(players, "steps", [2, 2], [x, x])


def test_a_bad_batch_is_skipped_by_one_and_the_others_go_on(start):
    x = torch.zeros(3)
    players = [start(Gauss, name, HALF, torch.tensor(1.0), nonfinite="skip") for name in "ab"]
    together(players, "steps", [2, 2], [x, x])
    before = [player.call("theta") for player in players]
    for player, batch in zip(players, (x * torch.nan, x), strict=True):
        player.begin("step", batch)
    utilities, (warned,) = players[0].end()
    assert math.isnan(utilities["a"])
    assert warned.startswith("Skipped a batch, and nobody moved: ")
    players[1].value()
    after = [player.call("theta") for player in players]
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])
    together(players, "steps", [2, 2], [x, x])
    assert not torch.equal(players[0].call("theta"), before[0])


def test_on_a_device(start, device):
    options = {"device": device.type}
    players = [start(Gauss, name, HALF, torch.zeros(()), **options) for name in "ab"]
    for path, _ in together(players, "steps", [3, 3], [torch.ones(4)] * 2):
        assert path[-1] > path[0] > 0


# Misuse.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": {"b": 1.0}}, ValueError, "Expected weights to name all players, 'a' among"),
        ({"weights": None}, ValueError, "Expected weights to name all players"),
        ({"weights": {"a": 0.5, "b": 0.4}}, ValueError, "weights of model 'a' to sum to 1"),
        ({"weights": {"a": 2.0, "b": -1.0}}, ValueError, "finite number of at least 0, got -1.0"),
        ({"store": "tcp://host"}, TypeError, "Expected store to be a torch.distributed.Store"),
        ({"on_missing": "wait"}, ValueError, "Expected on_missing='stop' or 'continue', got"),
        ({"timeout": 0.0}, ValueError, "Expected timeout to be a number of seconds above 0"),
        ({"num_dreams": 0}, ValueError, "Expected num_dreams to be an integer of at least 1"),
        ({"model": 3}, TypeError, "Expected 'a' to be a model or a pair"),
    ],
)
def test_options_are_checked(options, error, message):
    arguments = {
        "model": normal,
        "optim": SGD({"lr": 0.1}),
        "weights": HALF,
        "store": torch.distributed.HashStore(),
    }
    with pytest.raises(error, match=message):
        DreamExchange("a", **(arguments | options))


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((1, 2, 3), {}, TypeError, r"arguments \['x', 'y'\] of its model, each once, got 3"),
        ((torch.zeros(2),), {"x": torch.zeros(2)}, TypeError, r"got 1 without .* \['x'\]"),
        ((), {"z": torch.zeros(2)}, ValueError, r"model 'a' to hold \['x'\]"),
        ((ZEROS[:2], ZEROS[:3]), {}, ValueError, r"as many rows, .* got \[2, 3\]"),
    ],
)
def test_batches_are_checked(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        alone(normal).step(*args, **kwargs)


def test_a_site_outside_of_the_plate_has_no_rows():
    def model(x, level=None):
        w = pyro.param("w", torch.zeros(()))
        level = pyro.sample("level", dist.Normal(0.0, 1.0), obs=level)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(w + level, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"a row of site 'level' for each row .* got shape \(\)"):
        alone(model).step(torch.zeros(5))
