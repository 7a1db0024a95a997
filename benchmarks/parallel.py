"""What several ranks are worth: the digits model, trained by one process and by more of them.

All train on the same whole batch, of which each of n ranks draws an n-th part. Times are taken in
rounds, in each of which every number of ranks has its turn, on fresh processes of one thread. Wall
time tells the speed-up as long as each rank has a core of its own. The time that the CPUs spend
does not depend on that, nor on who else uses the machine: that of one process over that of all
ranks together is the part of their work that isn't overhead.

Run ``python benchmarks/parallel.py --help`` for the options.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import TypeVar

import torch
from torch import distributed
from torch.multiprocessing.spawn import start_processes

sys.path.append(str(Path(__file__).parent.parent / "examples"))

from cli import count  # noqa: E402
from data import load  # noqa: E402
from digits import SETTINGS, Training  # noqa: E402

T = TypeVar("T")
Work = Callable[[int, int], T]  # of the rank and the number of ranks

NAMES = "L_p", "L_q"
NUM_WARMUPS = 10  # steps
NUM_EVALUATIONS = 20  # of the utilities on the held-out images


def launch(num_ranks: int, work: Work[T]) -> T:
    """Runs a function on all ranks of a group, and returns what the first of them does."""
    with tempfile.TemporaryDirectory() as name:
        start_processes(
            _run, (num_ranks, Path(name), work), nprocs=num_ranks, start_method="forkserver"
        )
        return torch.load(Path(name) / "result.pt", weights_only=True)


def _run(rank: int, num_ranks: int, folder: Path, work: Work[T]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=num_ranks
    )
    result = work(rank, num_ranks)
    if rank == 0:
        torch.save(result, folder / "result.pt")
    distributed.destroy_process_group()


def training(rank: int, num_ranks: int, seed: int, batch_size: int, steps: int) -> Training:
    """A training on the part of the digits that is a rank's; of one rank, without a group."""
    images = load("digits", Path())
    own = replace(images, x=images.x[rank::num_ranks], y=images.y[rank::num_ranks])
    settings = replace(SETTINGS["digits"], steps=steps, batch_size=batch_size // num_ranks)
    return Training(own, seed, settings, distributed.group.WORLD if num_ranks > 1 else None)


def timed(rank: int, num_ranks: int, batch_size: int, steps: int) -> tuple[float, float]:
    """The time of a step (ms): that of the first rank, and that of all CPUs."""
    learner = training(rank, num_ranks, 0, batch_size, NUM_WARMUPS + steps)
    for _ in range(NUM_WARMUPS):
        learner.step()
    distributed.barrier()
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        learner.step()
    seconds = torch.tensor([time.perf_counter() - start, time.process_time() - cpu])
    wall = seconds[0].item()
    distributed.all_reduce(seconds)
    return 1e3 * wall / steps, 1e3 * seconds[1].item() / steps


def learned(rank: int, num_ranks: int, seed: int, batch_size: int, steps: int) -> list[float]:
    """The utilities of decoder and encoder (nats per held-out image) after a training."""
    learner = training(rank, num_ranks, seed, batch_size, steps)
    for _ in range(steps):
        learner.step()
    x, y = learner.images.held_out_x, learner.images.held_out_y
    losses = [learner.symeq.evaluate_loss(x, y) for _ in range(NUM_EVALUATIONS)]
    utilities = [[loss.decoder / len(x), loss.encoder / len(x)] for loss in losses]
    return torch.tensor(utilities).mean(0).tolist()


def compare_times(options: argparse.Namespace) -> None:
    """Prints what a step costs by the number of ranks."""
    work = partial(timed, batch_size=options.batch_size, steps=options.block)
    times: dict[int, list[tuple[float, float]]] = {n: [] for n in options.ranks}
    order = list(options.ranks)
    for i in range(options.rounds):
        random.Random(i).shuffle(order)
        for num_ranks in order:
            times[num_ranks].append(launch(num_ranks, work))
    print(f"\nA step on {options.batch_size} images, medians of {options.rounds} rounds")
    print("ranks   wall ms  speed-up    CPU ms  efficiency")
    one_wall, one_cpu = _medians(times[1])
    for num_ranks, seen in times.items():
        wall, cpu = _medians(seen)
        ratios = f"{one_wall / wall:8.2f}  {cpu:8.2f}  {one_cpu / cpu:10.2f}"
        print(f"{num_ranks:5d}  {wall:8.2f}  {ratios}", flush=True)


def compare_utilities(options: argparse.Namespace) -> None:
    """Prints what two ranks learn, and one on the whole batch."""
    print(
        f"\nUtilities (nats per held-out image) after {options.steps} steps on "
        f"{options.batch_size} images, two ranks less one, over {options.seeds} seeds"
    )
    differences = []
    for seed in range(options.seeds):
        work = partial(learned, seed=seed, batch_size=options.batch_size, steps=options.steps)
        one, two = torch.tensor(launch(1, work)), torch.tensor(launch(2, work))
        differences.append(two - one)
        told = "  ".join(
            f"{name} {a:8.2f} {b:8.2f}" for name, a, b in zip(NAMES, one, two, strict=True)
        )
        print(f"seed {seed}, one rank and two:  {told}", flush=True)
    seen = torch.stack(differences)
    errors = seen.std(0) / len(seen) ** 0.5
    for name, mean, error in zip(NAMES, seen.mean(0), errors, strict=True):
        print(f"{name}  {mean:+.2f}, standard error {error:.2f}")


def _medians(times: Sequence[tuple[float, float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*times, strict=True)]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the options of the program."""
    parser = argparse.ArgumentParser(description="Compares one rank with several.")
    parser.add_argument(
        "--ranks", type=count, nargs="+", default=[1, 2, 4], help="1 is among them"
    )
    parser.add_argument("--batch-size", type=count, default=256, help="of all ranks together")
    parser.add_argument(
        "--rounds", type=count, default=7, help="in which each number has its turn"
    )
    parser.add_argument("--block", type=count, default=50, help="the steps of a turn")
    parser.add_argument("--seeds", type=int, default=8, help="to compare utilities; 0: don't")
    parser.add_argument("--steps", type=count, default=300, help="of a training, to compare them")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Runs the program."""
    options = parse(arguments)
    set_forkserver_preload(["matplotlib.figure", "pyro_symeq", "sklearn.datasets"])
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    compare_times(options)
    if options.seeds:
        compare_utilities(options)


if __name__ == "__main__":
    main()
