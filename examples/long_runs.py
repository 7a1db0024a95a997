r"""What long trainings have in common: checkpoints, exact resumption, progress, and their figures.

A run takes the steps of a learner. A loss is read in every 50th step alone, since on a GPU whoever
reads it waits for the device. At times the run looks at what has been learned and saves its state,
from which it goes on exactly. The first Ctrl-C stops it after a step, with all of it saved.
"""

import argparse
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, Generic, Protocol, TypeVar

import numpy
import pyro
import torch
from tqdm import tqdm

import pyro_symeq
from pyro_symeq import checkpoint

__all__ = [
    "CheckpointError",
    "Learner",
    "LongRun",
    "RunError",
    "Stopped",
    "add_options",
    "run_path",
    "write_record",
]

READ_EVERY = 50  # steps
Scalars = Mapping[str, float]
Loss = TypeVar("Loss")


class RunError(Exception):
    """A run that can't go on; the message says what to do."""


class CheckpointError(RunError):
    """A checkpoint from which this run can't go on."""


class Stopped(RunError):
    """A run that was interrupted, with all of it saved."""


class Learner(Protocol):
    """What learns: a ``Game``, say."""

    @property
    def num_steps(self) -> int:
        """The number of steps that have been taken."""

    def state_dict(self) -> dict[str, Any]:
        """All that it needs to go on as if it had never stopped, for ``torch.save``."""

    def load_state_dict(self, state: dict[str, Any], /, *batch: Any) -> None:
        """Goes back to a state; with a batch, all values are in place at once."""


class LongRun(Generic[Loss]):
    """A training that can be stopped at any time and goes on exactly.

    Args:
        learner: What learns.
        step: Lets it take a step, and returns the loss.
        steps: How many there are to take.
        identity: What the run depends on, by name; it goes on from checkpoints of the same only.
        checkpoint: The file to which the state is saved.
        read: What a loss says, by name.
        look: What is measured on the way, by name.
        num_looks: How often it is, at equal distances up to the end, and the state is saved.
        tensorboard: The folder for TensorBoard, to which all scalars go, if they are to.

    Attributes:
        seconds: How long the steps and looks have taken.
        history: What was read and measured at each look, with ``step`` and ``seconds``.
    """

    def __init__(
        self,
        learner: Learner,
        step: Callable[[], Loss],
        *,
        steps: int,
        identity: Mapping[str, Any],
        checkpoint: Path,
        read: Callable[[Loss], Scalars],
        look: Callable[[], Scalars] = dict,
        num_looks: int = 10,
        tensorboard: Path | None = None,
    ) -> None:
        self.learner = learner
        self.step = step
        self.steps = steps
        self.identity = dict(identity)
        self.checkpoint = checkpoint
        self.read = read
        self.look = look
        self.num_looks = num_looks
        self.tensorboard = tensorboard
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []

    @property
    def num_steps(self) -> int:
        """The number of steps that have been taken."""
        return self.learner.num_steps

    def train(self) -> None:
        """Takes the steps that are left; saves the state at times and at the end.

        Where it can't be saved on the way, on a full disk say, the run tells so and goes on.

        Raises:
            CheckpointError: It would write over a training that was stopped further on.
            RunError: It can't be saved at the end.
            Stopped: An interrupt came first.
        """
        self._spare_what_is_unfinished()
        every = math.ceil(self.steps / self.num_looks)
        start = time.perf_counter() - self.seconds
        with (
            _interrupts() as interrupted,
            _writer(self.tensorboard, self.num_steps) as write,
            tqdm(total=self.steps, initial=self.num_steps, unit="step", mininterval=0.5) as bar,
        ):
            while self.num_steps < self.steps and not interrupted.is_set():
                loss = self.step()
                is_look = self.num_steps % every == 0 or self.num_steps == self.steps
                if is_look or self.num_steps % READ_EVERY == 0:
                    scalars = dict(self.read(loss))
                    bar.set_postfix_str(_told(scalars), refresh=False)
                    if is_look:
                        scalars |= self.look()
                    write(scalars, self.num_steps)
                    self.seconds = time.perf_counter() - start
                    if is_look:
                        moment = {"step": self.num_steps, "seconds": self.seconds}
                        self.history.append(moment | scalars)
                        told = _told(scalars)
                        bar.write(f"step {self.num_steps:6d}  {self.seconds:5.0f} s  {told}")
                        self._save_if_possible(bar.write)
                bar.update()
            self.seconds = time.perf_counter() - start
            try:
                self.save()
            except OSError as error:
                raise RunError(str(error)) from error
        if interrupted.is_set():
            raise Stopped(
                f"Stopped at step {self.num_steps}, which is kept in {self.checkpoint}. To go "
                "on, give the same options and --resume."
            )

    def save(self) -> None:
        """Writes the checkpoint; at no time is there half of one."""
        state = {
            "identity": self.identity,
            "num_steps": self.num_steps,
            "steps": self.steps,
            "seconds": self.seconds,
            "history": self.history,
            "learner": self.learner.state_dict(),
        }
        checkpoint.save(self.checkpoint, state)

    def _save_if_possible(self, tell: Callable[[str], None]) -> None:
        try:
            self.save()
        except OSError as error:
            tell(f"{error} The run goes on, and tries again later.")

    def _spare_what_is_unfinished(self) -> None:
        if not self.checkpoint.exists():
            return
        try:
            state = checkpoint.load(self.checkpoint)
            taken, steps = state["num_steps"], state["steps"]
        except (KeyError, TypeError, ValueError):
            return  # nothing that could go on
        if self.num_steps < taken < steps:
            raise CheckpointError(
                f"{self.checkpoint} holds a training that was stopped at step {taken} of {steps}. "
                "Go on from there with --resume, or remove the file to start anew."
            )

    def resume(self, *batch: Any) -> None:
        """Reads the checkpoint.

        Args:
            batch: What a step takes, so that all that was learned is in place at once.

        Raises:
            CheckpointError: There is none, it is damaged, or it is another run's.
        """
        path, own = self.checkpoint, self.identity
        if not path.exists():
            raise CheckpointError(f"There is no checkpoint {path}. Start without --resume.")
        try:
            state = checkpoint.load(path)
            other, learned = state["identity"], state["learner"]
            seconds, history = state["seconds"], state["history"]
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{path} is damaged or no checkpoint of this program. Start without --resume."
            ) from error
        differing = [f"{k}={other.get(k)} (now {own[k]})" for k in own if own[k] != other.get(k)]
        if differing:
            raise CheckpointError(
                f"The checkpoint {path} is of a training with {', '.join(differing)}. Give the "
                "same options, or start without --resume."
            )
        try:
            self.learner.load_state_dict(learned, *batch)
        except ValueError as error:
            raise CheckpointError(
                f"The checkpoint {path} is of other programs. {error}"
            ) from error
        self.seconds, self.history = seconds, history


def run_path(
    options: argparse.Namespace, *parts: object, asked: Iterable[str] = ("steps",)
) -> Path:
    """The common beginning of the names of a run's files.

    Args:
        options: The options of the program.
        parts: What the names consist of.
        asked: Options that are named in them where they were given.
    """
    given = ((name, getattr(options, name)) for name in asked)
    more = [
        name if value is True else f"{name}-{value}"
        for name, value in given
        if value is not None and value is not False
    ]
    return options.out / "-".join(map(str, (*parts, *more))).replace("_", "-")


def add_options(parser: argparse.ArgumentParser, presets: Iterable[str] = ()) -> None:
    """Adds the options of long runs.

    Args:
        parser: The parser of the program.
        presets: The names of its settings, the default first, if it has several.
    """
    if names := tuple(presets):
        parser.add_argument(
            "--preset", choices=names, default=names[0], help="the settings (default: %(default)s)"
        )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--tensorboard", action="store_true", help="log scalars for TensorBoard")


def write_record(
    path: Path,
    program: str,
    *,
    settings: Mapping[str, Any],
    figures: Mapping[str, Any],
    seconds: Mapping[str, float],
    device: torch.device,
    history: Sequence[Scalars] = (),
    arguments: Sequence[str] | None = None,
) -> None:
    """Writes all figures of a run, and how they came about, to a JSON file.

    Args:
        path: The file.
        program: The name of the program.
        settings: What the figures depend on, by name.
        figures: The figures by name; the name tells the unit where there is one.
        seconds: How long each part of the program took.
        device: Where it computed.
        history: See :class:`LongRun`.
        arguments: The arguments of the program, by default those of the command line.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    record = {
        "program": program,
        "command": shlex.join(["python", f"examples/{program}", *arguments]),
        "settings": settings,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pyro": pyro.__version__,
            "numpy": numpy.__version__,
            "pyro_symeq": pyro_symeq.__version__,
        },
        "hardware": {
            "device": _name(device),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "seconds": seconds,
        "figures": figures,
        "history": list(history),
    }
    with checkpoint.replaced(path) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _told(scalars: Scalars) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in scalars.items())


@contextmanager
def _writer(folder: Path | None, num_steps: int) -> Iterator[Callable[[Scalars, int], None]]:
    """Writes scalars for TensorBoard, over those of later steps that were taken before."""
    if folder is None:
        yield lambda scalars, step: None
        return
    from torch.utils.tensorboard import SummaryWriter

    def write(scalars: Scalars, step: int) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)

    with SummaryWriter(str(folder), purge_step=num_steps + 1) as writer:
        yield write


@contextmanager
def _interrupts() -> Iterator[Event]:
    """Turns the first Ctrl-C into an event, so that a step is not left half done."""
    interrupted = Event()

    def handle(*_: Any) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
