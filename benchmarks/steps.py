"""What a training step costs, beside a loop by hand and beside Pyro's own algorithms.

All rivals have the same networks, the same initial weights, the same batches, and Adam with the
same learning rate. They take turns within one process. A ratio is the median over rounds of how
many times as long as by hand a step takes. Memory is the peak of a process that runs one rival
alone: on a CPU all that is resident, PyTorch itself included, and on a GPU what tensors take up.

Run ``python benchmarks/steps.py --help`` for the options.
"""

import argparse
import os
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyro
import torch

from contest import compare, contestant, running
from results import HAND, Results, Setting
from rivals import RIVALS
from tables import table
from tracing import trace

__all__ = ["environment", "main", "parse", "plan"]

LADDERS = ("hand", "symeq", "capture", "module", "svi", "rws-0", "rws-0.5")
GAMES = ("hand", "symeq", "capture")
EXPERIMENTS = {
    "dense": LADDERS,
    "conv": LADDERS,
    "chain": GAMES,
    "batches": GAMES,
    "particles": (*GAMES, "vectorized"),
}
SECONDS = {"dense": 10.0, "conv": 10.0, "chain": 15.0, "batches": 10.0, "particles": 8.0}
FULL = 6.0  # times as many seconds
PRECISIONS = ("single", "tf32", "bf16")


def plan(experiment: str, options: argparse.Namespace) -> Iterator[Setting]:
    """The settings of an experiment."""
    size: int | None = options.batch_size
    dense = Setting(
        "dense",
        size or 128,
        device=options.device,
        validation=options.validation,
        precision=options.precision,
    )
    if experiment == "dense":
        yield dense
    elif experiment == "conv":
        usual = 128 if options.device == "cpu" else 1024
        yield replace(dense, model="conv", batch_size=size or usual)
    elif experiment == "chain":
        for num_sites in (2, 4, 8, 16, 32):
            yield replace(dense, model="chain", num_sites=num_sites)
    elif experiment == "batches":
        for size in (64, 128, 256, 512, 1024, 2048, 4096) if options.full else (64, 512, 4096):
            yield replace(dense, batch_size=size)
    else:
        for num_particles in (1, 2, 4, 8, 16) if options.full else (1, 4):
            yield replace(dense, num_particles=num_particles)


def contestants(experiment: str, options: argparse.Namespace) -> list[str]:
    """Who takes part in an experiment; the loop by hand always does."""
    if options.rivals:
        return [HAND, *(rival for rival in options.rivals if rival != HAND)]
    rivals = list(EXPERIMENTS[experiment])
    if options.full and experiment in ("dense", "conv"):
        rivals.insert(rivals.index("capture") + 1, "compile")
    return rivals


def environment(device: str) -> dict[str, str]:
    """The machine and the versions, which a time depends on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {
        "device": f"{device} ({name})",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
    }


def measure(options: argparse.Namespace) -> Results:
    """Runs the experiments, and prints the table of each when it has ended."""
    results = Results(environment(options.device))
    print(*(f"{name} {value}" for name, value in results.environment.items()), sep=", ")
    for experiment in options.only:
        seconds = SECONDS[experiment] * (FULL if options.full else 1)
        with_memory = options.memory and experiment in ("dense", "conv")
        settings = list(plan(experiment, options))
        rivals = contestants(experiment, options)
        comparisons = compare(experiment, rivals, settings, seconds, with_memory)
        print("", table(comparisons), sep="\n", flush=True)
        results.comparisons.extend(comparisons)
    return results


def profiled(options: argparse.Namespace) -> None:
    """Traces a few steps of a rival, and prints how often each of them waits for the device."""
    setting = next(plan(options.only[0], options))
    step = contestant(options.traced, setting)
    with running(setting):
        waits = trace(step, options.trace)
    print(f"A step of {options.traced} on {setting.model} does, on average,")
    for name, count in waits.items():
        print(f"{count:8.1f}  {name}")
    print(f"The trace is in {options.trace}.")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the options of the program."""
    parser = argparse.ArgumentParser(description="Times training steps of rivals, in turn.")
    parser.add_argument(
        "--full", action="store_true", help="all sweeps, compiled steps too, and six times as long"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=EXPERIMENTS,
        default=list(EXPERIMENTS),
        help="the experiments (default: all of them)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument(
        "--threads",
        type=_count,
        default=1,
        help="of the CPU; several are slow where others use its cores too (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=_count, help="default: 128; conv on a GPU: 1024")
    parser.add_argument("--validation", action="store_true", help="turn Pyro's validation on")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=PRECISIONS[0],
        help="single; tf32: matrix products in TF32; bf16: that, and bfloat16 by autocast",
    )
    parser.add_argument(
        "--rivals", nargs="+", choices=RIVALS, help="who takes part (default: see the tables)"
    )
    parser.add_argument(
        "--no-memory",
        dest="memory",
        action="store_false",
        help="leave out the peaks of memory, for which each rival has a process of its own",
    )
    parser.add_argument("--json", type=Path, help="write the times of all rounds to this file")
    parser.add_argument("--figure", type=Path, help="draw them into this file")
    parser.add_argument(
        "--trace", type=Path, help="time nothing; write a Chrome trace of a rival to this file"
    )
    parser.add_argument(
        "--traced", choices=RIVALS, default="symeq", help="the rival (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: there is no GPU that PyTorch can use")
    return options


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def main(arguments: list[str] | None = None) -> None:
    """Runs the program."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.trace:
        profiled(options)
        return
    results = measure(options)
    if options.json:
        results.write(options.json)
    if options.figure:
        from charts import draw

        draw(results, options.figure)


if __name__ == "__main__":
    main()
