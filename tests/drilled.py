"""A training whose processes die, or are interrupted, over and over again.

``python -m tests.drilled DRILL FOLDER NUMBER`` forks processes that train, and looks at what each of
them leaves. It prints what it has seen, and fails where something that was saved is lost.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.optim import Adam
from torch import nn

from pyro_symeq import SymmetricEquilibrium, checkpoint
from tests.comparison import same

DATA = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]).repeat(10, 1)
MAX_STEPS = 400


class Training:
    """A pair that learns on random rows."""

    def __init__(self, num_bits=2):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        self.decoder, self.encoder = nn.Linear(num_bits, 4), nn.Linear(4, num_bits)
        self.prior = torch.full((num_bits,), 0.5)
        self.symeq = SymmetricEquilibrium(
            self.model, self.guide, Adam({"lr": 0.01}), code_warmup=0
        )
        self.act = lambda: None  # in the middle of a step: the decoder has moved

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(self.prior).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        if torch.is_grad_enabled():
            self.act()
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))

    def step(self):
        self.symeq.step(DATA[torch.randint(len(DATA), (6,))])

    @property
    def players(self):
        return self.symeq.state_dict()["players"]


def uninterrupted(num_steps=MAX_STEPS):
    """The states of the same training, as it goes where nothing happens."""
    training = Training()
    states = [training.symeq.state_dict()]
    for _ in range(num_steps):
        training.step()
        states.append(training.symeq.state_dict())
    return states


def child(work):
    """Starts a process that does some work, and returns its number."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def train_and_save(path):
    """Trains for ever; saves all the time."""
    training = Training()
    if path.exists():
        training.symeq.load(path)
    while training.symeq.num_steps < MAX_STEPS:
        training.step()
        training.symeq.save(path)


def inode(path):
    """The number of a file, another for each save."""
    return path.stat().st_ino if path.exists() else None


def goes_on(path, whole):
    """Checks that a checkpoint is whole, and that the training goes on exactly from it."""
    state = checkpoint.load(path)
    num_steps = state["num_steps"]
    assert same(state, whole[num_steps]), f"step {num_steps} is another one"
    training = Training()
    training.symeq.load(path)
    for _ in range(3):
        training.step()
    assert same(training.symeq.state_dict(), whole[num_steps + 3])
    return num_steps


def killed_at_random(folder, number):
    """Kills processes that train and save, at random moments."""
    path, whole, last = folder / "run.pt", uninterrupted(), 0
    for _ in range(number):
        pid, former = child(lambda: train_and_save(path)), inode(path)
        while inode(path) == former:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        num_steps = goes_on(path, whole)
        assert num_steps > last, "a saved step is gone"
        last = num_steps
    print(f"killed {number} times, and came to step {last}")


def killed_on_the_spot(folder, number):
    """Kills a process at each call of the system that a checkpoint needs, and within a step."""
    path, whole = folder / "run.pt", uninterrupted(5)
    die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731

    def write_half(state, file):
        content = path.read_bytes()
        file.write(content[: len(content) // 2])
        file.flush()
        die()

    def then_die(function):
        def call(*args):
            function(*args)
            die()

        return call

    spots = {
        "before it is written": lambda: setattr(torch, "save", die),
        "while it is written": lambda: setattr(torch, "save", write_half),
        "when it is written": lambda: setattr(torch, "save", then_die(torch.save)),
        "before it is on the disk": lambda: setattr(os, "fsync", die),
        "when it is on the disk": lambda: setattr(os, "fsync", then_die(os.fsync)),
        "before it is replaced": lambda: setattr(os, "replace", die),
        "when it is replaced": lambda: setattr(os, "replace", then_die(os.replace)),
    }
    for _ in range(number):
        for spot, prepare in [*spots.items(), ("within a step", None)]:
            path.unlink(missing_ok=True)
            training = Training()
            training.step()
            training.symeq.save(path)

            def go_on(prepare=prepare):
                training = Training()
                training.symeq.load(path)
                if prepare is None:
                    training.act = die
                training.step()
                prepare()
                training.symeq.save(path)

            pid = child(go_on)
            assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL, spot
            assert goes_on(path, whole) == (2 if spot == "when it is replaced" else 1), spot
            print(spot)


def interrupted(folder, number):
    """Sends Ctrl-C to a plain loop, which saves what it has then."""
    path, whole = folder / "run.pt", uninterrupted()

    begun, later = folder / "begun", 0

    def loop():
        training = Training()
        try:
            while training.symeq.num_steps < MAX_STEPS:
                training.step()
                begun.touch()
        except KeyboardInterrupt:
            training.symeq.save(path)

    for _ in range(number):
        begun.unlink(missing_ok=True)
        pid = child(loop)
        while not begun.exists():
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        os.kill(pid, signal.SIGINT)
        assert os.waitpid(pid, 0)[1] == 0
        state = checkpoint.load(path)
        assert same(state["players"], whole[state["num_steps"]]["players"]), "half a step"
        training = Training()
        training.symeq.load(path, DATA)
        training.step()
        assert training.symeq.num_steps == state["num_steps"] + 1
        later = max(later, state["num_steps"])
    print(f"interrupted {number} times, each time after whole steps; {later} of them at most")


DRILLS = {drill.__name__: drill for drill in (killed_at_random, killed_on_the_spot, interrupted)}

if __name__ == "__main__":
    name, where, times = sys.argv[1:]
    DRILLS[name](Path(where), int(times))
