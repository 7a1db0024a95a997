"""Times of steps that take turns within one process."""

import random
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

__all__ = ["in_turn"]

Name = TypeVar("Name", bound=Hashable)

MIN_ROUNDS = 5


def _at_once() -> None:
    """Waits for nothing: on a CPU, a step has finished when it returns."""


def in_turn(
    steps: Mapping[Name, Callable[[], object]],
    seconds: float,
    block: int = 1,
    wait: Callable[[], None] = _at_once,
) -> dict[Name, list[float]]:
    """Times steps in rounds, in each of which all have their turn, in an order of its own.

    Args:
        steps: What to time, by name.
        seconds: How long to go on; there are five rounds at least.
        block: The number of steps of a turn.
        wait: Waits until the device has finished, before and after a turn.

    Returns:
        By name, the time for a step in each round (s).
    """
    order = list(steps)
    shuffle = random.Random(0).shuffle
    times: dict[Name, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    num_rounds = 0
    while num_rounds < MIN_ROUNDS or time.perf_counter() < end:
        shuffle(order)
        for name in order:
            times[name].append(_turn(steps[name], block, wait))
        num_rounds += 1
    return times


def _turn(step: Callable[[], object], block: int, wait: Callable[[], None]) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(block):
        step()
    wait()
    return (time.perf_counter() - start) / block
