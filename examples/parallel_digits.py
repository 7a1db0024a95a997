r"""Learns digits on several processes, each of which has a part of the images.

It is the training of ``digits.py``, shared out: with n ranks each draws an n-th part of a batch from
its own images. Utilities and gradients are means over ranks, so that the pair learns as from the
whole batch. Run it with

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # or a restart may look for ranks that have died
    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/parallel_digits.py

The first rank saves a checkpoint at times, and each start goes on from it. If a rank dies,
``torchrun`` ends the others; as long as there are restarts left, it starts all of them again.
"""

import argparse
import os
import time
from dataclasses import replace

import torch
from torch import distributed

from cli import begun, count, ended_cleanly, parser

with ended_cleanly("parallel_digits.py"):
    from data import DataError, load
    from digits import SETTINGS, Training, report


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the options of the program."""
    options = parser("Learns digits on several processes, by torchrun.", SETTINGS)
    options.add_argument(
        "--save-every", type=count, default=100, help="steps (default: %(default)s)"
    )
    return options.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Trains a pair; the first rank tells what it has learned."""
    if options.device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group()  # gloo on CPUs, nccl on GPUs
    rank, num_ranks = distributed.get_rank(), distributed.get_world_size()

    settings = begun(options, SETTINGS[options.data])
    images = load(options.data, options.data_root)
    own = replace(images, x=images.x[rank::num_ranks], y=images.y[rank::num_ranks])
    training = Training(
        own.to(options.device),
        options.seed,
        replace(settings, batch_size=settings.batch_size // num_ranks),
        process_group=distributed.group.WORLD,
    )
    checkpoint = options.out / f"parallel_{options.data}_{options.seed}.pt"
    if checkpoint.exists():  # all ranks read it
        training.symeq.load(checkpoint)

    first, start = training.symeq.num_steps, time.perf_counter()
    if first > settings.steps:
        raise ValueError(
            f"{checkpoint} is of step {first}, after the {settings.steps} asked for. Remove it to "
            "start anew, or ask for more."
        )
    if rank == 0:
        print(f"{num_ranks} ranks start at step {first} of {settings.steps}.", flush=True)
    for step in range(first + 1, settings.steps + 1):
        loss = training.step()
        if rank == 0 and (step % options.save_every == 0 or step == settings.steps):
            training.symeq.save(checkpoint)  # at no time is there half of one
            told = "  ".join(f"{n} {u:7.2f}" for n, u in training.utilities(loss).items())
            print(f"step {step:6d}  {told} nats per image, saved", flush=True)
    distributed.destroy_process_group()
    if rank == 0:
        report(training, time.perf_counter() - start)
        print(f"\nThe checkpoint is {checkpoint}. Without it, the next start is a new training.")


def main(arguments: list[str] | None = None) -> None:
    """Runs the program."""
    options = parse(arguments)
    with ended_cleanly("parallel_digits.py", DataError, RuntimeError, ValueError):
        run(options)


if __name__ == "__main__":
    main()
