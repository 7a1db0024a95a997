"""What the programs are asked: to segment images, complete them, and draw pairs."""

from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from faces.pairs import Pairs
from faces.programs import Programs
from pyro_symeq import Batch, LimitingDistribution

__all__ = ["Judge", "Segmented", "accuracy", "squares"]

BURN_IN = 5  # one of so many rounds is left out at first


@dataclass(frozen=True)
class Segmented:
    """What chains say of images.

    Args:
        s: The classes of maximum marginal, with shape :math:`(N, H, H)`.
        x: The images, in-painted by the mean where they were hidden.
    """

    s: Tensor
    x: Tensor


class Judge:
    """Asks the programs.

    Args:
        programs: The programs.
    """

    def __init__(self, programs: Programs) -> None:
        self.programs = programs

    def segmented(self, x: Tensor, visible: Tensor | None, num_rounds: int) -> Segmented:
        """Segments images by maximum marginal, from what is visible of them.

        Args:
            x: Images, with shape :math:`(N, 3, H, H)`.
            visible: Which pixels are visible, with shape :math:`(N, 1, H, H)`, if not all.
            num_rounds: The number of rounds of the chains.
        """
        chains = LimitingDistribution(self.programs.conditionals)
        if visible is None:
            visible = torch.ones_like(x[:, :1], dtype=torch.bool)
        seen = torch.where(visible, x, torch.nan)
        completion = chains.complete(
            Batch(x=seen),
            mask={"x": visible.expand_as(x)},
            num_steps=num_rounds,
            burn_in=num_rounds // BURN_IN,
        )
        decided = completion.decide()
        return Segmented(decided["s"].long(), torch.where(visible, x, decided["x"]))

    @torch.no_grad()
    def segmented_by_evidence(self, x: Tensor, visible: Tensor | None) -> Tensor:
        """Segments images by the evidence alone, gray where they are hidden."""
        if visible is not None:
            x = torch.where(visible, x, 0)
        z2 = x.new_full((len(x), self.programs.appearance_bits), 0.5)
        return self.programs.evidence(x, z2).argmax(1)

    @torch.no_grad()
    def reconstructed(self, pairs: Pairs) -> Pairs:
        """Mean images and probable segmentations, each given the other and bits of both."""
        z = self._encoded(pairs)
        logits = self.programs.shape(z["z1"]) + self.programs.evidence(pairs.x, z["z2"])
        return Pairs(self.programs.image(pairs.s, z["z2"]).mean, logits.argmax(1))

    @torch.no_grad()
    def repainted(self, s: Tensor, pairs: Pairs) -> Tensor:
        """Mean images of segmentations with the appearance of others.

        Args:
            s: Segmentations, with shape :math:`(M, H, H)`.
            pairs: Pairs, N of them, whose appearance is taken.

        Returns:
            The images, with shape :math:`(N, M, 3, H, H)`.
        """
        z2 = self._encoded(pairs)["z2"].repeat_interleave(len(s), dim=0)
        means = self.programs.image(s.repeat(len(pairs), 1, 1), z2).mean
        return means.unflatten(0, (len(pairs), len(s)))

    @torch.no_grad()
    def dreamed(self, like: Tensor, num_rounds: int) -> Pairs:
        """Pairs drawn from the limiting distribution, with the mean image at the end.

        Args:
            like: As many images as there are to be drawn.
            num_rounds: The number of rounds of the chains.
        """
        chains = LimitingDistribution(self.programs.conditionals)
        drawn = chains.sample(1, Batch(x=like), num_steps=num_rounds)
        s, z2 = drawn["s"][0], drawn["z2"][0]
        return Pairs(self.programs.image(s, z2).mean, s)

    def _encoded(self, pairs: Pairs) -> dict[str, Tensor]:
        nodes: Any = poutine.trace(self.programs.encode).get_trace(pairs.x, pairs.s).nodes
        return {name: nodes[name]["value"] for name in ("z1", "z2")}

    @torch.no_grad()
    def shapes_kept(self, s: Tensor) -> float:
        """The part of the pixels whose class survives the way through the bits z1."""
        z1 = (self.programs.shape_code(s) > 0).to(torch.get_default_dtype())
        return accuracy(self.programs.shape(z1).argmax(1), s)


def accuracy(found: Tensor, s: Tensor) -> float:
    """The part of the pixels whose class was found."""
    return (found == s).double().mean().item()


def squares(number: int, side: int, seed: int = 0) -> Tensor:
    """Draws what is visible of images of which a square is hidden, a quarter of the area.

    Args:
        number: The number of images.
        side: The number of their rows, and of their columns.
        seed: The seed of the places of the squares.

    Returns:
        Whether each pixel is visible, with shape :math:`(N, 1, H, H)`.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = side // 2
    first = torch.randint(side - hidden + 1, (2, number, 1), generator=generator)
    rows, columns = (first <= torch.arange(side)) & (torch.arange(side) < first + hidden)
    return ~(rows[:, None, :, None] & columns[:, None, None, :])
