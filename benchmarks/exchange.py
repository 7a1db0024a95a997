"""What it costs two processes on one machine to swap dreams through a store.

``python benchmarks/exchange.py`` prints the median time of a swap, in which each of two processes
sends a message of a size and takes one, and how many bytes cross in a second.
"""

import multiprocessing
import time
from statistics import median

import torch.distributed

from pyro_symeq.mailbox import Mailbox
from pyro_symeq.store import serve

NUM_SWAPS = 50
SIZES = {
    "nothing": 0,
    "128 digits of 28x28, uint8": 128 * 784,
    "128 digits of 28x28, float32": 128 * 784 * 4,
    "128 colour images of 64x64, float32": 128 * 64 * 64 * 3 * 4,
    "32 MB": 32_000_000,
}


def swap(name: str, other: str, port: int) -> dict[str, float]:
    """Swaps messages of all sizes with another process; returns the median times (seconds)."""
    store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, is_master=False
    )
    mailbox = Mailbox(name, [other], store)
    mailbox.open({})
    mailbox.meet(lambda *_: None, 60.0)
    times: dict[str, list[float]] = {what: [] for what in SIZES}
    for what, size in SIZES.items():
        message = bytes(size)
        for _ in range(NUM_SWAPS):
            start = time.perf_counter()
            received = mailbox.exchange(lambda *_, m=message: m, [other], 60.0)  # type: ignore[misc]
            times[what].append(time.perf_counter() - start)
            assert len(received[other][1]) == size
    return {what: median(of) for what, of in times.items()}


def main() -> None:
    """Prints the table."""
    store, port = serve("127.0.0.1", 0)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found, _ = pool.starmap(swap, [("a", "b", port), ("b", "a", port)])
    del store
    for what, seconds in found.items():
        rate = 2 * SIZES[what] / seconds / 1e6
        print(f"{what:38}{1e3 * seconds:10.2f} ms{rate:10.0f} MB/s")


if __name__ == "__main__":
    main()
