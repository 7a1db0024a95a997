"""What long trainings have in common: they stop, go on exactly, tell of themselves and leave files."""

import argparse
import json
import signal
import sys

import pytest
import torch

from tests.comparison import same
from tests.processes import EXAMPLES

sys.path.append(str(EXAMPLES))

from cli import ended_cleanly  # noqa: E402
from long_runs import (  # noqa: E402
    CheckpointError,
    LongRun,
    Stopped,
    add_options,
    run_path,
    write_record,
)


class Walk:
    """A learner that walks at random."""

    def __init__(self):
        torch.manual_seed(0)
        self.num_steps = 0
        self.place = torch.zeros(3)
        self.num_reads = 0
        self.stops_at = None

    def step(self):
        self.place += torch.randn(3)
        self.num_steps += 1
        if self.num_steps == self.stops_at:
            signal.raise_signal(signal.SIGINT)
        return self.place

    def read(self, loss):
        self.num_reads += 1
        return {"first": loss[0].item()}

    def state_dict(self):
        return {n: getattr(self, n) for n in ("num_steps", "place")} | {
            "random": torch.get_rng_state()
        }

    def load_state_dict(self, state):
        self.num_steps, self.place = state["num_steps"], state["place"]
        torch.set_rng_state(state["random"])


def long_run(walk, folder, steps=120, **options):
    folder.mkdir(exist_ok=True)
    return LongRun(
        walk,
        walk.step,
        steps=steps,
        identity={"seed": 0, "steps": steps},
        checkpoint=folder / "walk.pt",
        read=walk.read,
        look=lambda: {"second": torch.randn(()).item()},
        num_looks=4,
        **options,
    )


def without_seconds(history):
    return [{k: v for k, v in moment.items() if k != "seconds"} for moment in history]


def test_a_stopped_run_goes_on_exactly(tmp_path):
    whole = long_run(Walk(), tmp_path / "whole")
    whole.train()
    stopped = long_run(Walk(), tmp_path / "parts")
    stopped.learner.stops_at = 47
    with pytest.raises(Stopped, match="Stopped at step 47.*and --resume"):
        stopped.train()
    resumed = long_run(Walk(), tmp_path / "parts")
    resumed.resume()
    assert resumed.num_steps == 47
    assert resumed.seconds == stopped.seconds > 0
    resumed.train()
    assert same(resumed.learner.state_dict(), whole.learner.state_dict())
    assert without_seconds(resumed.history) == without_seconds(whole.history)
    assert [moment["step"] for moment in whole.history] == [30, 60, 90, 120]
    assert whole.history[0].keys() == {"step", "seconds", "first", "second"}
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["walk.pt"]


def test_an_unfinished_run_is_not_written_over(tmp_path):
    stopped = long_run(Walk(), tmp_path)
    stopped.learner.stops_at = 47
    with pytest.raises(Stopped):
        stopped.train()
    kept = stopped.checkpoint.read_bytes()
    with pytest.raises(CheckpointError, match=r"stopped at step 47 of 120.*--resume, or remove"):
        long_run(Walk(), tmp_path).train()
    assert stopped.checkpoint.read_bytes() == kept
    stopped.learner.stops_at = None
    stopped.train()
    again = long_run(Walk(), tmp_path)
    again.train()  # a finished one is made anew
    assert again.num_steps == 120


def test_an_interrupt_in_the_last_step_stops_the_run(tmp_path):
    run = long_run(Walk(), tmp_path)
    run.learner.stops_at = 120
    with pytest.raises(Stopped, match="Stopped at step 120"):
        run.train()
    resumed = long_run(Walk(), tmp_path)
    resumed.resume()
    resumed.train()
    assert resumed.num_steps == 120


def test_files_are_named_by_what_was_asked_for(tmp_path):
    options = argparse.Namespace(out=tmp_path, steps=None, annealed=0.0, is_fast=True, slow=False)
    asked = ("steps", "annealed", "is_fast", "slow")
    path = run_path(options, "digits", 0, asked=asked)
    assert path == tmp_path / "digits-0-annealed-0.0-is-fast"
    assert run_path(options, "digits", 0) == tmp_path / "digits-0"


def test_the_second_interrupt_is_an_ordinary_one(tmp_path):
    run = long_run(Walk(), tmp_path)
    run.learner.stops_at = 5
    run.read = lambda loss: signal.raise_signal(signal.SIGINT)
    run.num_looks = 24
    with pytest.raises(KeyboardInterrupt):
        run.train()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_few_losses_are_read(tmp_path):
    run = long_run(Walk(), tmp_path, steps=400)
    run.train()
    assert run.learner.num_reads == 8


def test_a_run_with_nothing_left_to_do_does_nothing(tmp_path):
    run = long_run(Walk(), tmp_path, steps=10)
    run.train()
    history = list(run.history)
    run.train()
    assert run.num_steps == 10
    assert run.history == history


def test_checkpoints_that_do_not_fit(tmp_path):
    run = long_run(Walk(), tmp_path)
    with pytest.raises(CheckpointError, match=r"There is no checkpoint .*walk.pt"):
        run.resume()
    run.save()
    other = long_run(Walk(), tmp_path, steps=3)
    with pytest.raises(CheckpointError, match=r"with steps=120 \(now 3\)"):
        other.resume()
    run.checkpoint.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="is damaged"):
        run.resume()


def test_scalars_go_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = long_run(Walk(), tmp_path, tensorboard=tmp_path / "board")
    run.learner.stops_at = 55
    with pytest.raises(Stopped):
        run.train()
    run.learner.stops_at = None
    run.train()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [e.step for e in events.Scalars("first")] == [30, 50, 60, 90, 100, 120]
    assert [e.step for e in events.Scalars("second")] == [30, 60, 90, 120]


def test_a_missing_tensorboard_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    run = long_run(Walk(), tmp_path, tensorboard=tmp_path / "board")
    with pytest.raises(SystemExit, match=r'pip install "pyro_symeq\[tensorboard\]"'):
        with ended_cleanly("walk.py"):
            run.train()


def test_a_record_tells_how_figures_came_about(tmp_path):
    write_record(
        tmp_path / "walk.json",
        "walk.py",
        settings={"steps": 3},
        figures={"distance": 1.5},
        seconds={"training": 0.1},
        device=torch.device("cpu"),
        history=[{"step": 1, "seconds": 0.0}],
        arguments=["--out", "a folder"],
    )
    record = json.loads((tmp_path / "walk.json").read_text())
    assert record["command"] == "python examples/walk.py --out 'a folder'"
    assert record["versions"]["torch"] == torch.__version__
    assert record["hardware"]["device"] == "cpu"
    assert record["figures"] == {"distance": 1.5}
    assert record["history"] == [{"step": 1, "seconds": 0.0}]


def test_options():
    parser = argparse.ArgumentParser()
    add_options(parser, ["laptop", "paper"])
    options = parser.parse_args(["--resume"])
    assert (options.preset, options.resume, options.tensorboard) == ("laptop", True, False)
    plain = argparse.ArgumentParser()
    add_options(plain)
    assert "preset" not in plain.parse_args([])
