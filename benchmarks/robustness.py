"""Which of many architectures learn, and by which method.

Every pair starts from the weights that PyTorch gives it, and has the same batches under all
methods. Results go to a file, a line a run, as runs end; runs that it has are not repeated, so a
benchmark that was stopped goes on where it was.

Run ``python benchmarks/robustness.py --help`` for the options.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent / "examples"))

from architectures import ARCHITECTURES, QUICK  # noqa: E402
from cli import add_data_root, count, ended_cleanly  # noqa: E402
from curves import draw  # noqa: E402
from data import DataError  # noqa: E402
from learners import METHODS  # noqa: E402
from reports import report  # noqa: E402
from runs import Record, Run, perform, read, remaining, write  # noqa: E402

__all__ = ["main", "parse", "plan"]

FIRST = ("game", "cure")
QUICK_STEPS, STEPS = 600, 3000


def plan(options: argparse.Namespace) -> Iterator[Run]:
    """All runs, seed by seed; those of the game come first."""
    for seed in options.seeds:
        for are_first in (True, False):
            for architecture in options.architectures:
                for method in options.methods:
                    if (method in FIRST) == are_first:
                        yield Run(options.data, architecture, method, seed, options.steps)


def measure(options: argparse.Namespace) -> None:
    """Runs what there are no records of, in several processes, and writes records as runs end."""
    records = read(options.json)
    if options.retry:
        records = [record for record in records if record.error is None]
    runs = remaining(plan(options), records)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(perform, run, options.data_root) for run in runs]
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                record = future.result()
                write(options.json, record)
                print(f"{number}/{len(runs)}  {_told(record)}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _told(record: Record) -> str:
    run = record.run
    name = f"{run.architecture} {run.method} {run.seed}"
    if record.likelihood is None:
        return f"{name}: {record.error}"
    bits = ", ".join(f"{site} {value:.1f}" for site, value in record.bits.items())
    return f"{name}: {bits} bits, {record.likelihood:.1f} nats, {record.seconds:.0f} s"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the options of the program."""
    parser = argparse.ArgumentParser(description="Which architectures learn, by which method.")
    parser.add_argument("--data", choices=("mnist", "digits"), default="mnist", help="the images")
    add_data_root(parser)
    parser.add_argument(
        "--quick", action="store_true", help="a few architectures, one seed, 600 steps, the game"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 1 2")
    parser.add_argument("--steps", type=count, help=f"default: {STEPS}")
    parser.add_argument(
        "--jobs", type=count, default=2, help="processes of one thread each (default: %(default)s)"
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("robustness.jsonl"),
        help="the file of results (default: %(default)s)",
    )
    parser.add_argument("--retry", action="store_true", help="repeat the runs that failed, too")
    parser.add_argument("--report", action="store_true", help="run nothing; print the tables")
    parser.add_argument("--plot", type=Path, help="draw the bits of the data set's runs there")
    options = parser.parse_args(arguments)
    quick = options.quick
    options.methods = options.methods or list(FIRST if quick else METHODS)
    options.architectures = options.architectures or list(QUICK if quick else ARCHITECTURES)
    options.seeds = options.seeds or ([0] if quick else [0, 1, 2])
    options.steps = options.steps or (QUICK_STEPS if quick else STEPS)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program."""
    options = parse(arguments)
    if not options.report:
        measure(options)
    records = read(options.json)
    print(report(records))
    if options.plot:
        wanted = [record for record in records if _is_wanted(record.run, options)]
        if not wanted:
            raise SystemExit(f"There are no runs to draw in {options.json}.")
        draw(wanted, options.plot)


def _is_wanted(run: Run, options: argparse.Namespace) -> bool:
    return (run.data, run.steps) == (options.data, options.steps) and run.method in options.methods


if __name__ == "__main__":
    with ended_cleanly("robustness.py", DataError):
        main()
