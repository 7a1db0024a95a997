"""Checkpoints: whole or not there, refused with a reason, and nothing in them can run."""

import io
import os
import pickle
import stat
import subprocess
import time
import zipfile
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import SGD, Adam
from torch import nn

from pyro_symeq import Game, Player, SymmetricEquilibrium, checkpoint, randomness
from tests.comparison import same
from tests.processes import little_space

X = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.float64).repeat(3, 1)
STATE = {"place": torch.arange(1000.0), "history": [{"step": 1, "loss": 0.5}], "name": "a"}


class Pair:
    """A pair, of networks that have averages of their own."""

    def __init__(self, num_hidden=2, name="decoder", **options):
        pyro.clear_param_store()
        self.name = name
        self.decoder = nn.Sequential(nn.Linear(num_hidden, 4))
        self.encoder = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, num_hidden))
        self.num_hidden = num_hidden
        self.symeq = SymmetricEquilibrium(self.model, self.guide, Adam({"lr": 0.1}), **options)

    def model(self, x):
        pyro.module(self.name, self.decoder)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((self.num_hidden,), 0.5)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))

    def values(self):
        return [
            p.detach().clone() for net in (self.decoder, self.encoder) for p in net.parameters()
        ]

    def run(self, num_steps):
        for _ in range(num_steps):
            self.symeq.step(X[torch.randint(len(X), (5,))])
        return self


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.pt"


def names(path):
    return [file.name for file in path.parent.iterdir()]


# Writing.


def test_what_is_saved_is_loaded(path):
    checkpoint.save(path, STATE)
    assert same(checkpoint.load(path), STATE)
    assert same(checkpoint.load(str(path)), STATE)
    assert names(path) == ["run.pt"]


def test_training_goes_on_from_a_file_bit_for_bit(path):
    pair = Pair().run(3)
    pair.symeq.save(path)
    expected = pair.run(4).values()
    again = Pair()
    again.symeq.load(path)
    assert again.symeq.num_steps == 3
    assert same(again.run(4).values(), expected)


class Sequences:
    """Chains of bits, as long as the data."""

    def __init__(self, device):
        pyro.clear_param_store()
        self.decoder, self.encoder = (nn.Linear(2, 1, device=device) for _ in range(2))
        self.symeq = SymmetricEquilibrium(self.model, self.guide, Adam({"lr": 0.1}))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        z = x.new_zeros(len(x))
        with pyro.plate("rows", len(x)):
            for t in range(x.shape[1]):
                logits = self.decoder(torch.stack([z, x.new_ones(len(x))], -1))[:, 0]
                z = pyro.sample(f"z{t}", dist.Bernoulli(logits=logits))
                pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[:, t])

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        z = x.new_zeros(len(x))
        with pyro.plate("rows", len(x)):
            for t in range(x.shape[1]):
                logits = self.encoder(torch.stack([z, x[:, t]], -1))[:, 0]
                z = pyro.sample(f"z{t}", dist.Bernoulli(logits=logits))

    def run(self, lengths):
        for length in lengths:
            self.symeq.step(torch.ones(5, length, device=self.decoder.weight.device))
        return [
            p.detach().clone() for p in (*self.decoder.parameters(), *self.encoder.parameters())
        ]


def test_batches_that_are_new_to_a_process_leave_its_draws_as_they_were(path, device):
    """In the process that goes on, they show sites that it hasn't seen before."""
    pair = Sequences(device)
    pair.run([2, 4, 3])
    pair.symeq.save(path)
    expected = pair.run([3, 4, 2])
    again = Sequences(device)
    again.symeq.load(path)
    assert same(again.run([3, 4, 2]), expected)


@pytest.mark.parametrize("num_devices", [None, 0, 1, 2, 3])
def test_a_state_is_loaded_where_there_are_other_devices(monkeypatch, num_devices):
    pair = Pair().run(1)
    state = pair.symeq.state_dict()
    states = [torch.tensor([i], dtype=torch.uint8) for i in range(2)]
    state["random"]["accelerator"] = states
    devices = dict.fromkeys(range(num_devices or 0))

    def set_rng_state_all(new):
        for i, value in enumerate(new):
            assert i in devices
            devices[i] = value

    module = SimpleNamespace(
        is_initialized=lambda: False,
        get_rng_state_all=lambda: [],
        set_rng_state_all=set_rng_state_all,
        device_count=lambda: num_devices,
    )
    monkeypatch.setattr(
        randomness, "_accelerator", lambda: torch.cpu if num_devices is None else module
    )
    expected = torch.rand(3)
    pair.symeq.load_state_dict(state)
    assert torch.equal(torch.rand(3), expected)
    assert devices == dict(zip(devices, [*states, None], strict=False))


def test_a_file_is_written_as_others_are(path):
    """With the permissions that the user's umask gives, and through a link."""
    before = os.umask(0o027)
    try:
        checkpoint.save(path, STATE)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    link = path.with_name("last.pt")
    link.symlink_to(path)
    checkpoint.save(link, {"name": "b"})
    assert link.is_symlink()
    assert checkpoint.load(path) == {"name": "b"}


def test_what_killed_processes_have_left_is_removed_later(path):
    left = {name: path.with_name(name) for name in ("run.pt.0123abcd.tmp", "run.pt.89ef4567.tmp")}
    others = [path.with_name(name) for name in ("run.pt.notes.tmp", "other.pt.0123abcd.tmp")]
    for file in [*left.values(), *others]:
        file.write_bytes(b"half")
    old = time.time() - 3700
    for file in [left["run.pt.0123abcd.tmp"], *others]:
        os.utime(file, (old, old))
    checkpoint.save(path, STATE)
    assert {*names(path)} == {"run.pt", "run.pt.89ef4567.tmp", *(file.name for file in others)}


@pytest.mark.parametrize("num_bytes", [0, 1, 100, 1000, 3000, 5000])
def test_on_a_full_disk_the_former_file_stays(path, num_bytes):
    checkpoint.save(path, {"name": "former"})
    size = path.stat().st_size
    with little_space(num_bytes):
        with pytest.raises(OSError, match=r"Can't write .*run.pt: .*File too large.*as it was"):
            checkpoint.save(path, STATE)
    assert checkpoint.load(path) == {"name": "former"}
    assert path.stat().st_size == size
    assert names(path) == ["run.pt"]
    checkpoint.save(path, STATE)
    assert same(checkpoint.load(path), STATE)


@pytest.mark.parametrize("what", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_at_the_last_moment_leaves_the_former_file(path, monkeypatch, what, error):
    checkpoint.save(path, {"name": "former"})

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, what, fail)
        with pytest.raises(type(error), match="No space left|^$"):
            checkpoint.save(path, STATE)
    assert checkpoint.load(path) == {"name": "former"}
    assert names(path) == ["run.pt"]


def test_training_goes_on_in_memory_when_the_disk_is_full(path):
    pair = Pair().run(2)
    pair.symeq.save(path)
    former, expected = path.read_bytes(), pair.run(4).values()
    pair.symeq.load(path)
    pair.run(1)
    with little_space(1000), pytest.raises(OSError, match="Can't write"):
        pair.symeq.save(path)
    assert path.read_bytes() == former
    assert same(pair.run(3).values(), expected)


def test_a_missing_folder_is_told(path):
    with pytest.raises(OSError, match=r"Can't write .*nowhere/run.pt: .*No such file"):
        checkpoint.save(path.parent / "nowhere" / "run.pt", STATE)


def test_states_that_would_not_be_read_again_are_refused(path):
    checkpoint.save(path, {"name": "former"})
    with pytest.raises(TypeError, match=r"made by \['.*Pair'\], which would not be read again"):
        checkpoint.save(path, {"pair": object.__new__(Pair)})
    assert checkpoint.load(path) == {"name": "former"}
    assert names(path) == ["run.pt"]


# Reading.


def test_no_file_that_is_cut_off_is_read(path):
    checkpoint.save(path, STATE)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 97), *range(len(whole) - 200, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="Can't load .*run.pt: it is empty, cut off or no ch"):
            checkpoint.load(path)


def test_no_file_with_a_wrong_byte_is_read_as_if_it_were_right(path):
    checkpoint.save(path, STATE)
    whole = path.read_bytes()
    num_refused = 0
    for place in range(0, len(whole), 31):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            assert same(checkpoint.load(path), STATE)  # in a gap between parts, say
        except ValueError as error:
            num_refused += 1
            assert str(error).startswith("Can't load")
    assert num_refused > 100


def torch_file(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def zip_of(**parts):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return file.getvalue()


FOREIGN = {
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(1000), "no checkpoint"),
    "text": (b"step,loss\n1,0.5\n" * 100, "no checkpoint"),
    "a pickle": (pickle.dumps({"pyro_symeq": 1}), "no checkpoint"),
    "another program's state": (torch_file(nn.Linear(2, 2).state_dict()), "not saved by pyro_sym"),
    "a tensor": (torch_file(torch.zeros(3)), "not saved by pyro_symeq"),
    "an old format": (
        torch_file({"pyro_symeq": 1}, _use_new_zipfile_serialization=False),
        "no checkpoint",
    ),
    "a module": (torch_file(nn.Linear(2, 2)), "it holds more than tensors"),
    "a zip file": (zip_of(words=b"hello"), "is another kind of file"),
    "a later version's": (torch_file({"pyro_symeq": 2}), "it has format 2, and this version"),
}


@pytest.mark.parametrize(("content", "reason"), FOREIGN.values(), ids=FOREIGN.keys())
def test_foreign_files_are_refused_and_change_nothing(path, content, reason):
    pair = Pair().run(2)
    before, state = pair.values(), pair.symeq.state_dict()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"Can't load .*run.pt: .*{reason}"):
        pair.symeq.load(path)
    assert same(pair.values(), before)
    assert same(pair.symeq.state_dict(), state)
    assert path.read_bytes() == content


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("kind", ["plain", "zipped", "tagged", "old"])
def test_nothing_in_a_file_is_run(path, kind):
    target = path.with_name("executed")
    evil = Malicious(target)
    path.write_bytes(
        {
            "plain": lambda: pickle.dumps(evil),
            "zipped": lambda: torch_file(evil),
            "tagged": lambda: torch_file({"pyro_symeq": 1, "players": {"decoder": evil}}),
            "old": lambda: torch_file({"a": evil}, _use_new_zipfile_serialization=False),
        }[kind]()
    )
    with pytest.raises(ValueError, match="Can't load"):
        checkpoint.load(path)
    with pytest.raises(ValueError, match="Can't load"):
        Pair().symeq.load(path)
    assert not target.exists()
    subprocess.run(evil.__reduce__()[1][0], shell=True, check=True)
    assert target.exists()  # had it run, this would have been seen


def test_a_missing_file_is_told(path):
    with pytest.raises(FileNotFoundError, match="run.pt"):
        Pair().symeq.load(path)


# Programs that have changed.


@pytest.fixture
def saved(path):
    pyro.set_rng_seed(3)
    Pair().run(3).symeq.save(path)
    return path


def test_other_shapes_are_named_and_nothing_is_set(saved):
    pair = Pair(num_hidden=3)
    before = pair.values()
    pair.symeq.load(saved)  # no program has told its parameters by now
    message = r"decoder\. Expected \{'decoder\$\$\$0.weight': \(4, 3\)\}, got .*\(4, 2\)"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            pair.symeq.step(X)
        assert same(pair.values(), before)
    pair = Pair(num_hidden=3)
    before, state = pair.values(), pair.symeq.state_dict()
    with pytest.raises(ValueError, match=message):
        pair.symeq.load(saved, X)
    assert same(pair.values(), before)
    assert same(pair.symeq.state_dict(), state)
    pair.run(2)


def test_names_that_only_the_file_or_only_the_program_has_are_told_and_nothing_is_lost(saved):
    pair = Pair(name="renamed")
    pair.symeq.load(saved)
    with pytest.warns(UserWarning) as seen:
        pair.symeq.step(X)
    told = [str(warning.message) for warning in seen]
    assert len(told) == 2
    assert "no values for these parameters of the decoder" in told[0]
    assert "['renamed$$$0.bias', 'renamed$$$0.weight']" in told[0]
    assert "parameters of the decoder that no program has touched by now" in told[1]
    assert "['decoder$$$0.bias', 'decoder$$$0.weight']" in told[1]
    assert all(warning.filename == __file__ for warning in seen)
    old = checkpoint.load(saved)["players"]["decoder"]["parameters"]
    new = pair.symeq.state_dict()["players"]["decoder"]["parameters"]
    assert same({name: new[name] for name in old}, old)
    assert new.keys() - old.keys() == {"renamed$$$0.bias", "renamed$$$0.weight"}


def test_a_state_of_before_a_parameter_came_up_is_for_a_fresh_training():
    def model(x, names):
        for name in names:
            loc = pyro.param(name, torch.zeros(()))
            pyro.sample(f"x_{name}", dist.Normal(loc, 1.0), obs=x)

    def game():
        utility = lambda play, *call: play.log_prob("p", *call)  # noqa: E731
        return Game([Player("p", model, SGD({"lr": 0.1}), utility)])

    first = game()
    first.step(torch.ones(()), "a")
    state = first.state_dict()
    first.step(torch.ones(()), "ab")
    after = first.state_dict()
    with pytest.raises(ValueError, match=r"Expected {'b': \(\)}, got {'b': 'nothing'}"):
        first.load_state_dict(state)
    assert same(first.state_dict(), after)
    pyro.clear_param_store()
    second = game()
    second.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"no values for these parameters of the p, .*\['b'\]"):
        second.step(torch.ones(()), "ab")
    assert same(second.state_dict(), after)


def test_programs_that_take_turns_are_not_warned_of():
    def of(name):
        def program(x):
            loc = pyro.param(name, torch.zeros(()))
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

        return program

    def utility(name, play, x, chosen):
        return play.log_prob(name, x) if name == chosen else torch.zeros(())

    def game():
        return Game(
            [
                Player(n, of(n), SGD({"lr": 0.1}), lambda *a, n=n: utility(n, *a))
                for n in ("a", "b")
            ]
        )

    first = game()
    for name in "abab":
        first.step(torch.ones(()), name)
    state = first.state_dict()
    pyro.clear_param_store()
    second = game()
    second.load_state_dict(state)
    for name in "ab":
        second.step(torch.ones(()), name)


# Evaluating what was loaded.


def test_with_a_batch_all_values_are_in_place_at_once(saved):
    trained = Pair()
    trained.symeq.load(saved)
    expected = trained.symeq.evaluate_loss(X)
    pair = Pair()
    pair.symeq.load(saved, X)
    assert same(pair.values(), trained.values())
    assert not any(s.pending["parameters"] for s in pair.symeq._strategies.values())
    pair.encoder[0].load_state_dict(trained.encoder[0].state_dict())
    assert pair.symeq.evaluate_loss(X) == expected  # and random numbers go on from there


def test_parameters_that_players_claim_are_set_at_once(path):
    def player(net):
        def program(x):
            pyro.sample("x", dist.Normal(net(torch.ones(1)), 1.0).to_event(1), obs=x)

        return Player("a", program, Adam({"lr": 0.1}), lambda play, x: play.log_prob("a", x), net)

    net, other = nn.Linear(1, 2), nn.Linear(1, 2)
    game = Game([player(net)])
    game.step(torch.ones(2))
    game.save(path)
    Game([player(other)]).load(path)
    assert same(dict(other.state_dict()), dict(net.state_dict()))


def test_a_state_that_fails_half_way_changes_nothing(saved):
    pair = Pair().run(2)
    before, state = pair.values(), pair.symeq.state_dict()
    spoilt = checkpoint.load(saved)
    del spoilt["random"]["numpy"]
    with pytest.raises(ValueError, match=r"The state can't be loaded \(KeyError: 'numpy'\)"):
        pair.symeq.load_state_dict(spoilt)
    assert same(pair.values(), before)
    assert same(pair.symeq.state_dict(), state)
    pair.run(1)
