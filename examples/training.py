"""The loop in which a pair learns, whatever the inference algorithm."""

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

__all__ = ["Inference", "cosine", "falling", "in_turn", "train"]


class Inference(Protocol):
    """What ``SVI`` and ``SymmetricEquilibrium`` have in common."""

    def step(self, *args: Any) -> float:
        """Takes a step on a batch, and returns its loss (nats, summed over the batch)."""


def falling(optimizer: Optimizer, steps: int, start: int = 0) -> LambdaLR:
    """A learning rate that falls along a cosine from a step on, to zero after all steps."""

    def factor(step: int) -> float:
        if step >= steps:
            return 0.0
        if step <= start:
            return 1.0
        return (1 + math.cos(math.pi * (step - start) / (steps - start))) / 2

    return LambdaLR(optimizer, factor)


def cosine(
    steps: int, learning_rate: float, weight_decay: float = 0.0, start: int = 0
) -> PyroLRScheduler:
    """AdamW, whose learning rate falls along a cosine from a step on, to zero after all steps."""
    optim_args = {"lr": learning_rate, "weight_decay": weight_decay}
    schedule = {"steps": steps, "start": start}
    return PyroLRScheduler(
        falling, {"optimizer": torch.optim.AdamW, "optim_args": optim_args, **schedule}
    )


def in_turn(
    steps: int, learning_rate: float, annealed: float, last_word: float
) -> tuple[PyroLRScheduler, PyroLRScheduler]:
    """The optimisers of a decoder and of an encoder, which has the last word.

    Args:
        steps: The number of steps.
        learning_rate: The learning rate of both at the start.
        annealed: The part of the steps, at the end, in which it falls to zero along a cosine.
        last_word: The part, at the end, for which the decoder rests.
    """
    start = round((1 - annealed) * steps)
    rest = round((1 - last_word) * steps)
    return cosine(rest, learning_rate, start=start), cosine(steps, learning_rate, start=start)


def train(
    inference: Inference,
    optim: PyroLRScheduler,
    draw: Callable[[], tuple[Tensor, ...]],
    steps: int,
) -> float:
    """Takes the steps, and shows how the loss falls.

    Args:
        inference: Takes a step on a batch.
        optim: Its optimiser.
        draw: Draws a batch: what model and guide take, with a row for each example.
        steps: The number of steps.

    Returns:
        How long it took (seconds).
    """
    every = math.ceil(steps / 10)
    mean = None
    start = time.perf_counter()
    with tqdm(total=steps, unit="step", mininterval=0.5) as bar:
        for step in range(1, steps + 1):
            batch = draw()
            loss = inference.step(*batch) / len(batch[0])
            optim.step()
            mean = loss if mean is None else mean + 0.02 * (loss - mean)
            bar.set_postfix_str(f"loss {mean:.1f} nats", refresh=False)
            bar.update()
            if step % every == 0:
                seconds = time.perf_counter() - start
                bar.write(f"step {step:6d}  {seconds:5.0f} s  loss {mean:7.2f}")
    return time.perf_counter() - start
