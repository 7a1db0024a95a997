"""Tests on several processes of a group."""

import tempfile
from datetime import timedelta
from multiprocessing import set_forkserver_preload
from pathlib import Path

import pyro
import torch
import torch.multiprocessing
from torch import distributed

set_forkserver_preload(["pyro_symeq", "tests.test_parallel"])  # read once for all processes


def launch(size, work, *args, backend="gloo"):
    """Runs a function of a module, ``work(rank, *args)``, on all ranks of a group.

    Args:
        size: The number of ranks.
        work: The function.
        args: What else it takes.
        backend: How the ranks exchange tensors.

    Returns:
        What it returned, by rank.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.multiprocessing.start_processes(
            _run,
            (size, folder, backend, work, args),
            nprocs=size,
            start_method="forkserver" if backend == "gloo" else "spawn",  # CUDA bears no fork
        )
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _run(rank, size, folder, backend, work, args):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.enable_validation()
    distributed.init_process_group(
        backend,
        init_method=f"file://{folder}/group",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    torch.save(work(rank, *args), folder / f"{rank}.pt")
    distributed.destroy_process_group()
