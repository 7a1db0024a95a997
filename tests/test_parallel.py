"""Several ranks train as one: means, random numbers, checkpoints, errors."""

import math
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import SGD, Adam
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pyro_symeq import Batch, Game, Player, SymmetricEquilibrium, SymmetricUtility
from pyro_symeq.nonfinite import NotFiniteError
from pyro_symeq.pair import Pair
from tests.comparison import same
from tests.enumerable import Decoder, Encoder, Ladder
from tests.ranks import launch

ROWS = 8
OPTIMS = {
    "SGD": lambda: SGD({"lr": 0.1, "momentum": 0.9}),
    "Adam": lambda: Adam({"lr": 0.03}),
}


def bits(*shape):
    return torch.rand(shape).round()


def batch_of(step, rank=0, num_ranks=1):
    """A rank's rows of a batch of a ladder; with latents, too."""
    generator = torch.Generator().manual_seed(step)
    sizes = {"x": 3, "z0": 2, "z1": 2}
    return {
        name: torch.rand(ROWS, n, generator=generator).round()[rank::num_ranks]
        for name, n in sizes.items()
    }


def world():
    return distributed.group.WORLD


def fresh(seed):
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    return Ladder()


def values(module):
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def assert_close(seen, expected):
    torch.testing.assert_close(seen, expected, rtol=1e-10, atol=1e-12)


def all_alike(results):
    return all(same(result, results[0]) for result in results)


# n ranks are one, with n times the batch and the n-th part of the loss.


def certain_game(ladder, optim, **options):
    """A game without draws: decoder and encoder learn from complete data."""

    def decode(play, **batch):
        return play.log_prob("decoder", **batch)

    def encode(play, x, z0, z1):
        return play.log_prob("encoder", x, given={"z0": z0, "z1": z1})

    players = [
        Player("decoder", ladder.model, optim, decode),
        Player("encoder", ladder.guide, optim, encode),
    ]
    return Game(players, **options)


def train_with_certainty(rank, num_ranks, num_parts, optim, **options):
    if num_ranks > 1:
        options["process_group"] = world()
    ladder = fresh(rank)
    game = certain_game(ladder, OPTIMS[optim](), **options)
    for step in range(5):
        part = batch_of(step, rank, num_ranks)
        loss = game.step(Batch(**part).weighted(1 / num_parts))
    return values(ladder), loss.utilities, game.state_dict()["players"]


KINDS = {
    "SGD": {"updates": "alternating"},
    "Adam": {"updates": "simultaneous", "capture": True},
}


def train_all_with_certainty(rank, num_ranks, num_parts):
    return [
        train_with_certainty(rank, num_ranks, num_parts, optim, **options)
        for optim, options in KINDS.items()
    ]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_average_utilities_and_gradients(num_ranks):
    results = launch(num_ranks, train_all_with_certainty, num_ranks, 1)
    assert all_alike(results)
    assert_close(results[0], train_all_with_certainty(0, 1, num_ranks))


def train_on_a_gpu(rank, **options):
    """A game whose captured steps are graphs, or are not where ranks exchange gradients."""
    ladder = fresh(0).cuda()
    game = certain_game(ladder, Adam({"lr": 0.03}), capture=True, **options)
    for step in range(8):
        loss = game.step(**{name: x.cuda() for name, x in batch_of(step).items()})
    return loss.utilities, {name: value.cpu() for name, value in values(ladder).items()}


def train_a_rank_on_a_gpu(rank):
    return train_on_a_gpu(rank, process_group=world())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_rank_of_nccl_trains_as_without():
    (seen,) = launch(1, train_a_rank_on_a_gpu, backend="nccl")
    assert_close(seen, train_on_a_gpu(0))


def train_halves(rank):
    """Two groups of two ranks each train on their own."""
    groups = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
    ladder = fresh(rank)
    game = certain_game(ladder, SGD({"lr": 0.1}), process_group=groups[rank // 2])
    for step in range(3):
        game.step(**batch_of(step, rank % 2, 2))
    return values(ladder)


def test_groups_are_independent():
    results = launch(4, train_halves)
    assert same(results[0], results[1])
    assert same(results[2], results[3])
    assert not same(results[0], results[2])


# All ranks stay alike, and dream for themselves.


class Training:
    """A training with draws, parameters that come up late, running averages and a schedule."""

    def __init__(self, seed, num_ranks, state=None, **options):
        self.ladder = fresh(seed)
        self.norm = nn.BatchNorm1d(3)
        nn.init.normal_(self.norm.running_mean)
        self.fixed = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3).eval())
        nn.init.normal_(self.fixed[1].running_mean)
        self.dreams = []
        self.symeq = SymmetricEquilibrium(
            self.model,
            self.guide,
            (Adam({"lr": 0.03}), SGD({"lr": 0.1, "momentum": 0.9})),
            encoder_warmup=2,
            process_group=world() if num_ranks > 1 else None,
            **options,
        )
        if state is not None:
            self.symeq.load_state_dict(state)

    def model(self, x):
        pyro.param("rate", lambda: torch.rand(()), constraint=dist.constraints.positive)
        if len(x) > 5:
            pyro.param("late", lambda: torch.rand(()))
        self.ladder.model(x)

    def guide(self, x):
        self.norm(self.fixed(x))
        self.dreams.append(x)
        self.ladder.guide(x)

    def run(self, num_steps):
        for _ in range(num_steps):
            sizes = 6 if self.symeq.num_steps == 4 else 5
            x = batch_of(0)["x"][torch.randint(ROWS, (sizes,))]
            self.loss = self.symeq.step(x)
        parameters = {name: value.detach().clone() for name, value in pyro_parameters()}
        return parameters | values(self.ladder)


def pyro_parameters():
    store = pyro.get_param_store()
    return [(name, store[name]) for name in ("rate", "late") if name in store]


def train(rank, num_ranks, options):
    training = Training(rank, num_ranks, **options)
    own = numbers()
    before = training.norm.running_mean.clone()
    learned = training.run(5)
    state = training.symeq.state_dict()
    return {
        "alike": (
            learned,
            training.fixed.state_dict(),
            training.loss.utilities,
            state["players"],
            state["num_steps"],
        ),
        "own": (own, numbers(), training.dreams[-1], before, training.norm.running_mean),
    }


def numbers():
    """A draw of each generator."""
    return torch.rand(()).item(), np.random.rand(), random.random()


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("options", [{}, {"capture": True, "updates": "simultaneous"}])
def test_ranks_stay_alike_and_draw_for_themselves(num_ranks, options):
    results = launch(num_ranks, train, num_ranks, options)
    assert all_alike([result["alike"] for result in results])
    for one in range(num_ranks):
        for other in range(one):
            pairs = zip(results[one]["own"], results[other]["own"], strict=True)
            assert not any(same(a, b) for a, b in pairs)


# Checkpoints.


def learned(training):
    return training.run(0), training.symeq.state_dict()["players"]


def stop_and_go(rank, folder):
    """Trains at once; then in two parts, of which the first rank keeps the state in between."""
    whole = Training(rank, 2)
    whole.run(5)
    expected = learned(whole)
    first = Training(rank, 2)
    first.run(3)
    if rank == 0:
        torch.save(first.symeq.state_dict(), folder / "state.pt")
    distributed.barrier()
    state = torch.load(folder / "state.pt", weights_only=True)
    second = Training(7 + rank, 2, state)
    second.run(2)
    return same(learned(second), expected)


def go_on(rank, num_ranks, file):
    training = Training(7 + rank, num_ranks, torch.load(file, weights_only=True))
    training.symeq.evaluate_loss(batch_of(0)["x"][:5])  # the programs take over their values
    loaded = learned(training)
    own = numbers()
    training.run(1)
    return loaded, own, learned(training)


def test_checkpoints_resume_exactly_and_on_other_numbers_of_ranks(tmp_path):
    assert launch(2, stop_and_go, tmp_path) == [True, True]
    file = tmp_path / "state.pt"
    players = torch.load(file, weights_only=True)["players"]
    alone = go_on(0, 1, file)
    four = launch(4, go_on, 4, file)
    assert all_alike([alone[0], *(loaded for loaded, *_ in four)])
    assert same(alone[0][1], players)
    assert len({own for _, own, _ in four}) == 4
    assert all_alike([after for *_, after in four])


def test_a_checkpoint_of_one_process_is_good_for_a_group(tmp_path):
    training = Training(0, 1)
    training.run(3)
    torch.save(training.symeq.state_dict(), tmp_path / "state.pt")
    results = launch(2, go_on, 2, tmp_path / "state.pt")
    assert same(results[0][0], learned(training))
    assert all_alike([after for *_, after in results])
    assert results[0][1] != results[1][1]


# What differs between ranks, and mustn't.


def told(act):
    """What an act raises."""
    with pytest.raises((ValueError, TypeError, RuntimeError)) as info:
        act()
    return type(info.value), str(info.value)


def step_with_errors(rank):
    """Errors of one rank, in places of all kinds; then a step that does."""
    seen = {}
    ladder = fresh(rank)
    program = {"fails": False, "spoils": False}

    def model(x):
        if program["fails"] and rank == 1:
            raise TypeError("no such luck")
        pyro.factor("luck", torch.tensor(-torch.inf if program["spoils"] and rank == 1 else 0.0))
        ladder.model(x)

    symeq = SymmetricEquilibrium(model, ladder.guide, Adam({"lr": 0.03}), process_group=world())
    x = batch_of(0)["x"]
    program["fails"] = True
    seen["rehearsal"] = told(lambda: symeq.step(x))
    program["fails"] = False
    symeq.step(x)
    before = values(ladder)
    program["fails"] = True
    seen["program"] = told(lambda: symeq.step(x))
    program["fails"] = False
    program["spoils"] = True
    with pyro.validation_enabled(False):
        seen["infinite"] = told(lambda: symeq.step(x))
    program["spoils"] = False
    if rank == 1:
        symeq.freeze("decoder")
    seen["frozen"] = told(lambda: symeq.step(x))
    if rank == 0:
        symeq.freeze("decoder", "encoder")
    seen["nobody"] = told(lambda: symeq.step(x))
    symeq.thaw("decoder", "encoder")
    are_intact = same(values(ladder), before)
    symeq.step(x)
    return seen, are_intact, values(ladder)


def test_an_error_of_one_rank_is_everyones():
    results = launch(2, step_with_errors)
    first, second = (seen for seen, *_ in results)
    for place in ("rehearsal", "program"):
        assert second[place] == (TypeError, "no such luck")
        assert first[place][0] is RuntimeError
        assert first[place][1] == "Rank 1 of the process group can't go on: no such luck"
    assert first["infinite"][0] is second["infinite"][0] is NotFiniteError
    assert "Expected a finite utility of the decoder, got -inf" in second["infinite"][1]
    assert (
        "Rank 1 of the process group can't go on: Expected a finite utility"
        in first["infinite"][1]
    )
    for seen in (first, second):
        kind, message = seen["frozen"]
        assert kind is ValueError
        assert "do different things: {0: ('step 2', [('decoder',), ('encoder',)]" in message
    assert "Nobody moves" in first["nobody"][1]
    assert "Rank 0 of the process group can't go on: Nobody moves" in second["nobody"][1]
    assert all(are_intact for _, are_intact, _ in results)
    assert same(results[0][-1], results[1][-1])


def step_over_a_bad_batch(rank):
    """A step, a batch that is bad on one rank alone, and another step."""
    ladder = fresh(rank)
    symeq = SymmetricEquilibrium(
        ladder.model,
        ladder.guide,
        Adam({"lr": 0.03}),
        process_group=world(),
        nonfinite="skip",
    )
    x = batch_of(0)["x"]
    symeq.step(x)
    before = values(ladder)
    with pytest.warns(UserWarning, match="Skipped a batch, and nobody moved"):
        loss = symeq.step(x * torch.nan if rank == 1 else x)
    is_skipped = math.isnan(loss) and same(values(ladder), before)
    symeq.step(x)
    return is_skipped, symeq.num_steps, values(ladder)


def test_all_ranks_skip_what_is_bad_on_one():
    results = launch(2, step_over_a_bad_batch)
    assert all(result[:2] == (True, 3) for result in results)
    assert same(results[0][-1], results[1][-1])


class Choice:
    """One player, who uses one of two networks, or one of two shapes."""

    def __init__(self, rank, width=2):
        pyro.clear_param_store()
        torch.manual_seed(rank)
        self.networks = nn.ModuleDict({"a": nn.Linear(2, width), "b": nn.Linear(2, width)})
        self.game = Game(
            [Player("p", self.program, SGD({"lr": 0.1}), self.utility)], process_group=world()
        )

    def program(self, x, names, chosen, is_late=False):
        for name in names:
            pyro.module(name, self.networks[name])
        if is_late:
            pyro.param("late", torch.ones(()))
        with pyro.plate("rows", len(x)):
            loc = self.networks[chosen](x) + self.shift
            pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=torch.zeros_like(loc))

    @property
    def shift(self):
        """Of another type than the other parameters."""
        return pyro.param("shift", torch.zeros((), dtype=torch.float32))

    @staticmethod
    def utility(play, *args, **kwargs):
        return play.log_prob("p", *args, **kwargs)


def choose(rank):
    x = batch_of(0)["z0"]
    mine = "ab"[rank]
    wide = Choice(rank, width=2 + rank)
    seen = {"shapes": told(lambda: wide.game.step(x, "ab", "a"))}
    other = Choice(rank)
    seen["names"] = told(lambda: other.game.step(x, mine, mine))
    choice = Choice(rank)
    choice.game.step(x, "ab", mine)
    before = values(choice.networks)
    network = choice.networks[mine]
    (((network(x) + choice.shift.detach()) ** 2).sum() / 2).backward()
    expected = {name: value / 2 for name, value in gradients(choice.networks).items()}
    choice.game.step(x, "ab", mine)
    moved = {n: (before[n] - x) / 0.1 for n, x in values(choice.networks).items()}
    seen["late"] = told(lambda: choice.game.step(x, "ab", mine, is_late=rank == 1))
    return seen, expected, moved, values(choice.networks) | {"shift": choice.shift.detach()}


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def test_ranks_that_differ_in_parameters():
    results = launch(2, choose)
    for seen, *_ in results:
        assert seen["shapes"][0] is seen["names"][0] is seen["late"][0] is ValueError
        assert "{0: 'torch.float64 (2, 2) on cpu', 1: 'torch.float64 (3, 2)" in seen["shapes"][1]
        assert "'a$$$bias of the p': {0: 'torch.float64 (2,)" in seen["names"][1]
        assert "1: 'nothing'}" in seen["names"][1]
        assert "1: ('new parameters or buffers', 'late')}" in seen["late"][1]
    (_, a, moved, after), (_, b, others, others_after) = results
    assert_close(moved, a | b)  # each network is one rank's, and the mean is half of its gradient
    assert same(moved, others)
    assert same(after, others_after)
    assert after["shift"].dtype is torch.float32
    assert after["shift"] != 0


def test_no_group_is_refused():
    for group in (-100, "world"):
        with pytest.raises(TypeError, match="a torch.distributed.ProcessGroup that this process"):
            certain_game(Ladder(), SGD({"lr": 0.1}), process_group=group)


def begin_alone(rank, path):
    """A game is made, a group follows; then games are made that train in it, and alone."""
    distributed.destroy_process_group()
    ladder = fresh(0)
    early = certain_game(ladder, SGD({"lr": 0.1}), process_group=world())
    early.step(**batch_of(0))
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    before = values(ladder)
    error = told(lambda: early.step(**batch_of(0)))
    moved = not same(values(ladder), before)
    for group in (world(), None):
        certain_game(fresh(0), SGD({"lr": 0.1}), process_group=group).step(**batch_of(0, rank, 2))
    return error, moved


def test_a_game_made_before_the_group_does_not_train_alone_unnoticed(tmp_path):
    for error, moved in launch(2, begin_alone, tmp_path / "group"):
        assert error[0] is RuntimeError
        assert "before torch.distributed.init_process_group()" in error[1]
        assert "there are 2 processes now" in error[1]
        assert not moved


def take_steps(rank, num_steps):
    ladder = fresh(rank)
    game = certain_game(ladder, SGD({"lr": 0.1}), process_group=world())
    for step in range(num_steps[rank]):
        game.step(**batch_of(step, rank, 2))
    if rank == 1:  # leaves
        return None
    return told(lambda: game.step(**batch_of(0)))


def test_who_is_left_alone_is_told():
    (kind, message), _ = launch(2, take_steps, [2, 2])
    assert kind is RuntimeError
    assert "can't go on together" in message
    assert "look for the first error in the output of all" in message


# What the schedule depends on.


def look(rank):
    """Ranks with so much information each, where the mean decides."""
    begun = []
    for own in ([0.0, 0.05], [0.0, 0.07]):
        Pair.information = lambda *_, own=own: {"z": torch.full((8,), own[rank])}
        ladder = fresh(rank)
        symeq = SymmetricEquilibrium(
            ladder.model, ladder.guide, Adam({"lr": 0.03}), watch=50, process_group=world()
        )
        for _ in range(50):
            loss = symeq.step(batch_of(0)["x"])
        begun.append((symeq._code.begun, loss.information["z"][0].item()))
    return begun


def test_the_code_begins_on_all_ranks_or_on_none():
    results = launch(2, look)
    assert results[0] == results[1]
    (code, mean), (no_code, other) = results[0]
    assert (code, no_code) == (50, None)
    assert (mean, other) == pytest.approx((0.025, 0.035))


# DistributedDataParallel.


def programs(ladder, kind):
    if kind == "methods":
        return ladder.model, ladder.guide
    decoder = Decoder(ladder)
    return decoder, Encoder(ladder, decoder)


def train_module(rank, num_ranks, kind):
    ladder = fresh(rank)
    module = SymmetricUtility()(*programs(ladder, kind))
    if num_ranks > 1:
        module = DistributedDataParallel(module)
    optim = torch.optim.SGD(module.parameters(), lr=0.1)
    torch.manual_seed(rank)
    for step in range(4):
        optim.zero_grad()
        loss = module(**batch_of(step, rank, num_ranks))
        loss.backward()
        optim.step()
    decoders = {n: x for n, x in values(ladder).items() if n.startswith(("z0", "d1", "dx"))}
    return decoders, values(ladder), loss.item()


def train_modules(rank, num_ranks):
    return [train_module(rank, num_ranks, kind) for kind in ("methods", "PyroModule")]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_distributed_data_parallel_takes_the_loss(num_ranks):
    results = launch(num_ranks, train_modules, num_ranks)
    for trained in zip(*results, strict=True):
        assert all_alike([parameters for _, parameters, _ in trained])
        assert len({loss for *_, loss in trained}) == num_ranks


def test_the_loss_has_the_parameters_of_modules_whose_methods_the_programs_are():
    ladder = Ladder()
    loss = SymmetricUtility()(ladder.model, ladder.guide)
    assert list(loss.parameters()) == list(ladder.parameters())
    handled = SymmetricUtility()(pyro.poutine.scale(ladder.model, 0.5), ladder.guide)
    assert list(handled.parameters()) == list(ladder.parameters())
    assert not list(SymmetricUtility()(lambda: None, lambda: None).parameters())
