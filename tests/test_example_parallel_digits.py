"""Training under torchrun: as a user starts it, and with a rank that is killed."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.processes import ENVIRONMENT, EXAMPLES


@contextmanager
def started(folder, num_restarts, *options):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("--max-restarts", str(num_restarts), "--monitor-interval", "0.1"),
        *(EXAMPLES / "parallel_digits.py", "--device", "cpu", "--out", folder, *options),
    ]
    with subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    ) as launcher:
        try:
            yield launcher
        finally:
            launcher.terminate()


def process_of(rank, launcher):
    """The process of a rank, which a launcher has started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for pid in map(int, children):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in variables:
            return pid
    raise AssertionError(f"There is no rank {rank} among {children}.")


def kill(rank, launcher):
    os.kill(process_of(rank, launcher), signal.SIGKILL)


def steps_until(text, launcher):
    """Reads the output up to a line, and returns the number of steps in it."""
    seen = []
    for line in iter(launcher.stdout.readline, ""):
        seen.append(line)
        if text in line:
            return int(re.findall(r"step +(\d+)", line)[0])
    raise AssertionError("".join(seen))


def steps_in(file):
    return torch.load(file, weights_only=True)["num_steps"]


def test_a_killed_rank_costs_no_more_than_the_steps_since_the_checkpoint(tmp_path):
    file = tmp_path / "parallel_digits_0.pt"
    with started(tmp_path, 1, "--steps", 100_000, "--save-every", 2) as launcher:
        assert steps_until("start at step", launcher) == 0
        saved = steps_until("saved", launcher)
        kill(1, launcher)
        again = steps_until("start at step", launcher)
        assert again >= saved
        saved = steps_until("saved", launcher)
        assert saved == again + 2
        kill(1, launcher)  # there is no restart left
        output, _ = launcher.communicate(timeout=120)
        assert launcher.returncode != 0
        assert re.search(r"rank +: 1 \(local_rank: 1\)\s+exitcode +: -9 ", output)
        assert steps_in(file) >= saved
