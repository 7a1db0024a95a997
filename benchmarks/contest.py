"""A contest of rivals: the same weights, the same batches, the same optimiser."""

import gc
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import cycle

import pyro
import torch

from ladders import convolutional, dense
from markov import Chain
from memory import resident_peak
from pairs import Pair
from results import Comparison, Setting
from rivals import RIVALS
from timing import in_turn

__all__ = ["compare", "contestant", "make_pair", "running"]

NUM_BATCHES = 4
NUM_WARMUPS = 5  # of which a step that is captured needs three
NUM_STEPS_IN_MEMORY = 5
BLOCK = {"cpu": 1, "cuda": 10}  # on a GPU, the steps of a turn overlap as they do in training


def make_pair(name: str, setting: Setting) -> Pair:
    """Makes a pair, always with the same weights; the name keeps its parameters apart."""
    makers: dict[str, Callable[[str], Pair]] = {
        "dense": dense,
        "conv": convolutional,
        "chain": partial(Chain, num_sites=setting.num_sites),
    }
    torch.manual_seed(0)
    return makers[setting.model](name).to(setting.device)


def contestant(rival: str, setting: Setting, name: str = "pair") -> Callable[[], object]:
    """A rival, warmed up, that takes a step when it is called, on batches that all rivals have.

    Args:
        rival: The rival.
        setting: What it is to run on.
        name: Keeps its parameters apart from those of others.
    """
    pair = make_pair(name, setting)
    rows = torch.rand(NUM_BATCHES, setting.batch_size, pair.num_pixels, device=setting.device)
    batches = cycle(rows.round())
    step = RIVALS[rival].start(pair, setting.num_particles)
    is_mixed = setting.precision == "bf16"

    def one() -> None:
        with torch.autocast(setting.device, torch.bfloat16) if is_mixed else nullcontext():
            step(next(batches))

    with running(setting):
        for _ in range(NUM_WARMUPS * BLOCK[setting.device]):
            one()
    return one


@contextmanager
def running(setting: Setting) -> Iterator[None]:
    """With the switches of a setting that are the whole process's."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if setting.precision == "single" else "high")
    try:
        with pyro.validation_enabled(setting.validation):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def compare(
    experiment: str,
    rivals: Sequence[str],
    settings: Sequence[Setting],
    seconds: float,
    with_memory: bool = False,
) -> list[Comparison]:
    """Times rivals in turn, on all settings in the same rounds.

    Args:
        experiment: What the comparisons are a part of.
        rivals: Who takes part.
        settings: What they are compared on; all have one device, validation and precision.
        seconds: How long to time them; five rounds are taken at least.
        with_memory: Whether to measure the peak of memory of each of them, too.
    """
    times = _times(rivals, settings, seconds)
    pyro.clear_param_store()
    gc.collect()
    return [
        Comparison(
            experiment,
            setting,
            {rival: times[rival, setting] for rival in rivals},
            _peaks(rivals, setting) if with_memory else {},
        )
        for setting in settings
    ]


def _times(
    rivals: Sequence[str], settings: Sequence[Setting], seconds: float
) -> dict[tuple[str, Setting], list[float]]:
    pyro.clear_param_store()
    steps = {
        (rival, setting): contestant(rival, setting, f"{rival}_{i}")
        for i, setting in enumerate(settings)
        for rival in rivals
    }
    device = settings[0].device
    with running(settings[0]):
        return in_turn(steps, seconds, BLOCK[device], partial(_wait, device))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peaks(rivals: Sequence[str], setting: Setting) -> dict[str, float]:
    """By rival, the peak of memory (MiB) of a process that takes a few steps and nothing else."""
    context = multiprocessing.get_context("spawn")
    threads = torch.get_num_threads()
    with context.Pool(1, torch.set_num_threads, (threads,), maxtasksperchild=1) as pool:
        peaks = pool.starmap(_peak, [(rival, setting) for rival in rivals], chunksize=1)
    return dict(zip(rivals, peaks, strict=True))


def _peak(rival: str, setting: Setting) -> float:
    step = contestant(rival, setting)
    with running(setting):
        for _ in range(NUM_STEPS_IN_MEMORY):
            step()
    if setting.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resident_peak()
