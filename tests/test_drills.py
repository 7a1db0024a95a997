"""Fault drills with real processes and signals: whatever dies or stops, nothing saved is lost."""

import os
import re
import signal
import subprocess
import sys
import threading

import pyro
import pytest
import torch

from pyro_symeq.strategy import Strategy
from tests.comparison import same
from tests.drilled import DATA, DRILLS, Training
from tests.processes import EXAMPLES, little_space

sys.path.append(str(EXAMPLES))

from long_runs import CheckpointError, LongRun, RunError, Stopped  # noqa: E402

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")


@needs_fork
@pytest.mark.parametrize(
    ("drill", "number", "told"),
    [
        ("killed_at_random", 20, r"killed 20 times, and came to step \d+"),
        ("killed_on_the_spot", 1, r"(?s)while it is written.*within a step"),
        ("interrupted", 20, r"interrupted 20 times, each time after whole steps"),
    ],
)
def test_processes_die_and_nothing_is_lost(drill, number, told, tmp_path):
    assert drill in DRILLS
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.drilled", drill, tmp_path, str(number)],
        capture_output=True,
        text=True,
        cwd=EXAMPLES.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert re.search(told, result.stdout)


# Ctrl-C at the worst of moments.


def moved(training):
    return [training.symeq.num_steps, training.players]


@pytest.fixture
def training():
    training = Training()
    training.decoder.double()
    training.encoder.double()
    training.step = lambda: training.symeq.step(DATA.double())
    training.step()
    return training


def interrupt_moves(monkeypatch, player, is_late):
    """Sends Ctrl-C while a player moves: before its optimiser's step, or after it."""
    move = Strategy.move

    def interrupted(self, *args):
        if self.name == player and not is_late:
            signal.raise_signal(signal.SIGINT)
        move(self, *args)
        if self.name == player and is_late:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Strategy, "move", interrupted)


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize(("player", "num_steps"), [("decoder", 1), ("encoder", 2)])
@pytest.mark.parametrize("is_valid", [True, False])
def test_ctrl_c_within_a_move_waits_for_its_end(
    training, monkeypatch, player, num_steps, is_late, is_valid
):
    """Then all that has moved is taken back, but for the last move: with that the step is whole."""
    before = moved(training)
    with monkeypatch.context() as patch, pyro.validation_enabled(is_valid):
        interrupt_moves(patch, player, is_late)
        with pytest.raises(KeyboardInterrupt):
            training.step()
    assert training.symeq.num_steps == num_steps
    if num_steps == 1 and is_valid:
        assert same(moved(training), before)
    training.step()
    assert training.symeq.num_steps == num_steps + 1
    if num_steps == 2:
        again = Training()
        again.decoder.double()
        again.encoder.double()
        for _ in range(3):
            again.symeq.step(DATA.double())
        assert same(moved(again), moved(training))


def test_ctrl_c_while_programs_run_comes_at_once(training):
    before, seen = moved(training), []

    def act():
        signal.raise_signal(signal.SIGINT)
        seen.append("too late")

    training.act = act
    with pytest.raises(KeyboardInterrupt):
        training.step()
    assert not seen
    assert same(moved(training), before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_users_own_handlers_are_kept(training, monkeypatch):
    seen = []
    previous = signal.signal(signal.SIGINT, lambda *_: seen.append(training.symeq.num_steps))
    try:
        own = signal.getsignal(signal.SIGINT)
        with monkeypatch.context() as patch:
            interrupt_moves(patch, "encoder", is_late=False)
            training.step()
        assert seen == [2]  # at the end of the step
        assert signal.getsignal(signal.SIGINT) is own
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        training.step()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_steps_may_be_taken_in_other_threads(training):
    thread = threading.Thread(target=training.step)
    thread.start()
    thread.join()
    assert training.symeq.num_steps == 2


# Long runs.


def long_run(training, folder, steps=20, **options):
    options = {"read": lambda loss: {"L_p": loss.decoder}, "num_looks": 10} | options
    return LongRun(
        training.symeq,
        training.step,
        steps=steps,
        identity={"seed": 0},
        checkpoint=folder / "run.pt",
        **options,
    )


@pytest.fixture
def double():
    def make(**options):
        training = Training(**options)
        training.decoder.double()
        training.encoder.double()
        rows = len(DATA)
        training.step = lambda: training.symeq.step(DATA.double()[torch.randint(rows, (6,))])
        return training

    return make


def test_a_long_run_writes_all_at_ctrl_c_within_a_step(double, tmp_path):
    whole = double()
    long_run(whole, tmp_path).train()
    (tmp_path / "run.pt").unlink()
    stopped = double()

    def act():
        if stopped.symeq.num_steps == 6:
            signal.raise_signal(signal.SIGINT)

    stopped.act = act
    with pytest.raises(Stopped, match="Stopped at step 7"):
        long_run(stopped, tmp_path).train()
    again = double()
    run = long_run(again, tmp_path)
    run.resume(DATA.double())
    assert same(again.decoder.weight, stopped.decoder.weight)
    run.train()
    assert same(again.symeq.state_dict(), whole.symeq.state_dict())


def test_a_long_run_goes_on_while_the_disk_is_full(double, tmp_path, capsys):
    whole = double()
    long_run(whole, tmp_path).train()
    training = double()
    first = long_run(training, tmp_path, steps=6)
    first.train()
    former = (tmp_path / "run.pt").read_bytes()
    run = long_run(training, tmp_path)
    with little_space(1000), pytest.raises(RunError, match="Can't write .*run.pt.*as it was"):
        run.train()
    told = capsys.readouterr()
    assert "Can't write" in told.out + told.err
    assert "The run goes on, and tries again later." in told.out + told.err
    assert (tmp_path / "run.pt").read_bytes() == former
    assert training.symeq.num_steps == 20
    run.train()  # with nothing left to do but to save
    assert same(training.symeq.state_dict(), whole.symeq.state_dict())
    again = double()
    resumed = long_run(again, tmp_path)
    resumed.resume()
    assert again.symeq.num_steps == 20


def test_a_long_run_of_other_programs_is_refused(double, tmp_path):
    long_run(double(), tmp_path).train()
    run = long_run(double(num_bits=3), tmp_path)
    with pytest.raises(CheckpointError, match=r"is of other programs. The state doesn't fit"):
        run.resume(DATA.double())
