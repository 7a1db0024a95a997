"""When an encoder learns a code for the data, and the warning where that didn't help.

An untrained pair whose latents say hardly anything about the data may never leave this state. It is
seen by the information in its latents, in the steps in which it matters.
"""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_symeq.callers import stacklevel
from pyro_symeq.checks import check_count

BEGIN_AFTER, BEGIN_BELOW = 50, 0.03  # steps, and bits in a latent on average
WARN_AFTER, WARN_BELOW = (500, 2000), 0.01  # some pairs collapse late
NUM_LATENTS = 8  # fewer may have little to say
PERIOD = 4  # the code counts in every fourth step, and so much more


class CodeWarmup:
    """The part of a schedule in which the encoder learns a code, see :mod:`pyro_symeq.code`.

    Args:
        num_steps: How long it lasts; 0: it never begins.
    """

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.begun: int | None = None
        self._begins_after = BEGIN_AFTER

    def load(self, begun: int | None) -> None:
        """Goes back to where it had begun after so many steps, if it had.

        Raises:
            ValueError: It is no number of steps.
        """
        if begun is not None:
            check_count("code_begun", begun, at_least=0)
        self.begun = begun

    def weight(self, steps: int) -> float:
        """How much the code counts after so many steps: four times as much in every fourth."""
        if self.begun is None or self.num_steps == 0:
            return 0.0
        since = steps - self.begun
        return 0.0 if since % PERIOD else PERIOD * max(0.0, 1 - since / self.num_steps)

    def may_begin(self, steps: int) -> bool:
        """Whether it matters after so many steps what the latents that have a code say."""
        return steps == self._begins_after and self.num_steps > 0

    def put_off(self, steps: int) -> None:
        """Tells that after so many steps the batch was a bad one, so that the next one decides."""
        if self.may_begin(steps):
            self._begins_after += 1

    def begin(self, steps: int, information: Mapping[str, Tensor]) -> None:
        """Begins after so many steps, if these latents say too little about a batch (bits)."""
        if _is_below(BEGIN_BELOW, information):
            self.begun = steps


def may_have_collapsed(steps: int) -> bool:
    """Whether it matters after so many steps what all latents say."""
    return steps in WARN_AFTER


def warn_if_collapsed(steps: int, information: Mapping[str, Tensor]) -> None:
    """Warns after so many steps, if the latents say next to nothing about a batch (bits)."""
    if _is_below(WARN_BELOW, information):
        _warn_of_collapse(steps, information)


def _is_below(mean: float, information: Mapping[str, Tensor]) -> bool:
    none = torch.zeros(0, device="cpu")  # whatever the default device is
    bits = torch.cat([none, *(x.flatten().cpu() for x in information.values())])
    return len(bits) >= NUM_LATENTS and bool(bits.mean() < mean)


def _warn_of_collapse(steps: int, information: Mapping[str, Tensor]) -> None:
    bits = {name: round(each.sum().item(), 2) for name, each in information.items()}
    warnings.warn(
        f"After {steps} steps the latents say hardly anything about the data: {bits} bits. The "
        "decoder unlearns its latents before the encoder can set them, and training may stop "
        "here. Leave code_warmup= on; give networks centred codes (2 * z - 1 for bits), smooth "
        "activations (SiLU, tanh) and initial weights of unit gain. See 'When training collapses' "
        "in the documentation.",
        stacklevel=stacklevel(),
    )
