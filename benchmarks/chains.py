"""What chains cost: many at once against one after another, and memory against rounds.

The pair has two latent and three data bits. The loop over chains is timed for a few of them, in
turn with all chains at once, and multiplied. Memory is the peak of a process for each number of
rounds.

Run ``python benchmarks/chains.py``.
"""

import argparse
import statistics
import subprocess
import sys
import time

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from memory import resident_peak
from pyro_symeq import LimitingDistribution


class Pair(nn.Module):
    """A small binary pair with random parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.encoder = nn.Linear(2, 3), nn.Linear(3, 2)

    def model(self, x: Tensor) -> None:
        """The decoder's program, for data with shape :math:`(N, 3)`."""
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((2,), 0.5)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The encoder's program, for data with shape :math:`(N, 3)`."""
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))


def run(num_chains: int, num_rounds: int, device: str) -> float:
    """Runs chains at once, and tells how long it took (seconds)."""
    torch.manual_seed(0)
    pair = Pair().to(device)
    limiting = LimitingDistribution(pair.model, pair.guide)
    start = time.perf_counter()
    draws = limiting.sample(num_chains, torch.zeros(1, 3, device=device), num_steps=num_rounds)
    draws["x"].sum().item()  # waits for the device
    return time.perf_counter() - start


def compare(num_chains: int, num_rounds: int, device: str, repeats: int = 5) -> None:
    """Times all chains at once, and a few one by one, in turn."""
    run(num_chains, 10, device)
    at_once, alone = [], []
    for _ in range(repeats):
        at_once.append(run(num_chains, num_rounds, device))
        alone.append(run(1, num_rounds, device))
    ratio = statistics.median(a * num_chains / b for a, b in zip(alone, at_once, strict=True))
    print(f"{num_chains} chains x {num_rounds} rounds at once  {statistics.median(at_once):.2f} s")
    print(f"one chain x {num_rounds} rounds            {statistics.median(alone):.2f} s")
    print(f"a loop over chains takes            {ratio:.0f} times as long")


def memory(num_chains: int, num_rounds: int, device: str) -> float:
    """The peak memory of a process that runs chains (MiB)."""
    options = ["--chains", str(num_chains), "--rounds", str(num_rounds), "--device", device]
    command = [sys.executable, __file__, "--peak", *options]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description="Times chains, and measures their memory.")
    parser.add_argument("--chains", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=1_000, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--peak", action="store_true", help="print the peak memory of one run")
    options = parser.parse_args()
    if options.peak:
        run(options.chains, options.rounds, options.device)
        print(resident_peak())
        return
    compare(options.chains, options.rounds, options.device)
    for rounds in (options.rounds // 10, options.rounds):
        peak = memory(options.chains, rounds, options.device)
        print(f"peak memory at {rounds} rounds           {peak:.0f} MiB")


if __name__ == "__main__":
    main()
