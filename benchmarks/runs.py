"""A run: one pair learns by one method, and what became of it."""

import json
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor

from architectures import ARCHITECTURES, Stack
from data import Images, load_gray
from learners import Step, learn
from pyro_symeq import SymmetricEquilibrium
from pyro_symeq.metrics import information, log_likelihood
from pyro_symeq.randomness import kept

__all__ = ["Record", "Run", "perform", "read", "remaining", "write"]

BATCH_SIZE = 128
NUM_IMAGES_OF_BITS = 1000
NUM_DRAWS_OF_BITS = 10
NUM_IMAGES = 500  # of likelihood and utilities
NUM_DRAWS = 50
OFTEN, SELDOM, EARLY = 50, 500, 500  # how often bits are noted, and until when often
COLLAPSE = "hardly anything about the data"


@dataclass(frozen=True)
class Run:
    """What is to be run.

    Args:
        data: The name of the data set.
        architecture: The name of the architecture.
        method: The name of the method.
        seed: Of weights, batches and draws.
        steps: How many.
    """

    data: str
    architecture: str
    method: str
    seed: int
    steps: int


@dataclass(frozen=True)
class Record:
    """What a run has come to; some of it is missing where it failed.

    Args:
        run: What was run.
        bits: By site, the information about held-out images (bits), summed over its latents.
        history: Pairs of a step and the bits about its batch, summed over all latents.
        likelihood: The importance-weighted log-likelihood of held-out images (nats, each).
        decoder: The decoder's utility on them (nats, each).
        encoder: The encoder's utility (nats, each).
        seconds: What the steps took, without the notes.
        warned: The first step that warned of a collapse.
        warnings: What else was warned of, the first line of each.
        error: Why it failed.
    """

    run: Run
    bits: dict[str, float] = field(default_factory=dict)
    history: list[tuple[int, float]] = field(default_factory=list)
    likelihood: float | None = None
    decoder: float | None = None
    encoder: float | None = None
    seconds: float = 0.0
    warned: int | None = None
    warnings: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def total(self) -> float | None:
        """The bits of all latents."""
        return sum(self.bits.values()) if self.bits else None


def write(path: Path, record: Record) -> None:
    """Appends a record to a file, a line of JSON."""
    line = asdict(record)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line.pop("run") | line) + "\n")


def read(path: Path) -> list[Record]:
    """Reads the records of a file, none if there is no such file."""
    if not path.exists():
        return []
    return [_record(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _record(line: dict[str, Any]) -> Record:
    run = Run(**{name.name: line.pop(name.name) for name in fields(Run)})
    history = [(step, bits) for step, bits in line.pop("history")]
    return Record(run, history=history, **line)


def perform(run: Run, root: Path) -> Record:
    """Runs it, and takes down an error of learning rather than raising it.

    Args:
        run: What to run.
        root: The folder of the data.

    Raises:
        DataError: The data are missing or damaged.
    """
    architecture = ARCHITECTURES[run.architecture]
    images = _images(run.data, root)
    x, held_out = images.x, images.held_out_x
    if architecture.observation == "bernoulli":
        x, held_out = (x > 0.5).to(x), (held_out > 0.5).to(x)
    pyro.clear_param_store()
    pyro.set_rng_seed(run.seed)
    pair = Stack(architecture, images.side)
    diary = Diary(pair)
    found: dict[str, Any]
    try:
        with pyro.validation_enabled(False):
            _train(run, pair, x, diary)
            found = _evaluated(run, pair, held_out)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return Record(run, **diary.notes, **found)


@lru_cache(1)
def _images(name: str, root: Path) -> Images:
    return load_gray(name, root)


def _train(run: Run, pair: Stack, x: Tensor, diary: "Diary") -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = learn(run.method, pair, ARCHITECTURES[run.architecture])
        for number, batch in enumerate(_batches(x, run), start=1):
            diary.step(step, batch)
            diary.note(number, batch, caught)


def _batches(x: Tensor, run: Run) -> Iterator[Tensor]:
    """Batches that all methods have alike."""
    generator = torch.Generator().manual_seed(run.seed)
    for _ in range(run.steps):
        yield x[torch.randint(len(x), (BATCH_SIZE,), generator=generator)]


class Diary:
    """What is noted as a pair learns.

    Args:
        pair: The pair.
    """

    def __init__(self, pair: Stack) -> None:
        self.pair = pair
        self.seconds = 0.0
        self.history: list[tuple[int, float]] = []
        self.warned: int | None = None
        self.warnings: list[str] = []

    @property
    def notes(self) -> dict[str, Any]:
        """What was noted, by the names of a record."""
        return {name: value for name, value in vars(self).items() if name != "pair"}

    def step(self, step: Step, batch: Tensor) -> None:
        """Takes a step, and times it."""
        start = time.perf_counter()
        step(batch)
        self.seconds += time.perf_counter() - start

    def note(self, number: int, batch: Tensor, caught: list[warnings.WarningMessage]) -> None:
        """Notes what the step has warned of and, now and then, the bits about its batch."""
        for message in (str(warning.message) for warning in caught):
            if COLLAPSE in message:
                self.warned = self.warned or number
            elif (first := message.splitlines()[0]) not in self.warnings:
                self.warnings.append(first)
        caught.clear()
        if number % (OFTEN if number <= EARLY else SELDOM) == 0:
            with _evaluating(self.pair):
                bits = _bits(self.pair, batch, num_draws=4)
            self.history.append((number, sum(bits.values())))


@contextmanager
def _evaluating(pair: Stack) -> Iterator[None]:
    """With running averages for batch statistics; leaves no trace in the draws that follow."""
    pair.eval()
    with kept(), torch.no_grad():
        yield
    pair.train()


def _bits(pair: Stack, x: Tensor, num_draws: int) -> dict[str, float]:
    bits = information(pair.guide, x, num_draws=num_draws)
    return {site: value.sum().item() for site, value in bits.items()}


def _evaluated(run: Run, pair: Stack, held_out: Tensor) -> dict[str, Any]:
    """What a pair is worth on held-out images, by the names of a record."""
    pyro.set_rng_seed(run.seed)
    x = held_out[:NUM_IMAGES]
    with _evaluating(pair):
        bits = _bits(pair, held_out[:NUM_IMAGES_OF_BITS], NUM_DRAWS_OF_BITS)
        likelihood = log_likelihood(pair.model, pair.guide, x, num_draws=NUM_DRAWS)
        game = SymmetricEquilibrium(pair.model, pair.guide, Adam({}), code_warmup=0)
        loss = game.evaluate_loss(x)
    if not likelihood.values.isfinite().all():
        raise ValueError("The likelihood is not finite.")
    return {
        "bits": bits,
        "likelihood": likelihood.mean,
        "decoder": loss.decoder / len(x),
        "encoder": loss.encoder / len(x),
    }


def remaining(runs: Iterable[Run], records: Iterable[Record]) -> list[Run]:
    """The runs of which there are no records."""
    done = {record.run for record in records}
    return [run for run in dict.fromkeys(runs) if run not in done]
