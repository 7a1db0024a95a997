"""Pyro's reweighted wake-sleep as a learner that can be stopped and goes on exactly.

References:
    Reweighted Wake-Sleep (Bornschein, Bengio, 2015). https://arxiv.org/abs/1406.2751
"""

from typing import Any

import torch
from pyro.infer import ReweightedWakeSleep
from torch import Tensor, nn
from torch.optim import AdamW

from elbo import Program
from pyro_symeq import GameLoss
from training import falling

__all__ = ["Reweighted"]


class Reweighted:
    """Learns a model and a guide that share no parameters.

    The decoder climbs the likelihood of the data by importance-weighted draws of the guide; the
    encoder that of dreams. A draw of Pyro's is one of the whole batch and has one weight, and not one
    for each image as in the paper of Bornschein and Bengio, so that in large batches nearly all
    weight is one draw's.

    Args:
        model: The decoder's program, of images.
        guide: The encoder's program, of images.
        networks: The networks of both.
        learning_rate: The learning rate of Adam at the start.
        steps: The number of steps.
        start: After how many of them it begins to fall to zero along a cosine.
        num_particles: The number of draws for a batch.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        networks: nn.Module,
        learning_rate: float,
        steps: int,
        start: int,
        num_particles: int = 5,
    ) -> None:
        self.num_steps = 0
        self._programs = _observing(model), _observing(guide)
        self._loss = ReweightedWakeSleep(
            num_particles, insomnia=0.0, vectorize_particles=False, max_plate_nesting=1
        )
        self._optimizer = AdamW(networks.parameters(), learning_rate, weight_decay=0.0)
        self._rate = falling(self._optimizer, steps, start)

    def step(self, x: Tensor) -> GameLoss:
        """Takes a step on a batch; the utilities are what both programs climb (nats)."""
        self._optimizer.zero_grad()
        decoder, encoder = self._loss.loss_and_grads(*self._programs, observations={"x": x})
        self._optimizer.step()
        self._rate.step()
        self.num_steps += 1
        return GameLoss({"decoder": -decoder, "encoder": -encoder})

    def state_dict(self) -> dict[str, Any]:
        """All that it needs to go on, besides the parameters of the networks."""
        return {
            "num_steps": self.num_steps,
            "optimizer": self._optimizer.state_dict(),
            "rate": self._rate.state_dict(),
            "random": torch.get_rng_state(),
            "random on devices": torch.cuda.get_rng_state_all(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a state."""
        self.num_steps = state["num_steps"]
        self._optimizer.load_state_dict(state["optimizer"])
        self._rate.load_state_dict(state["rate"])
        torch.set_rng_state(state["random"])
        torch.cuda.set_rng_state_all(state["random on devices"])


def _observing(program: Program) -> Program:
    """The program with data as ``ReweightedWakeSleep`` hands them over."""

    def observing(observations: dict[str, Tensor]) -> None:
        program(observations["x"])

    return observing
