"""How the programs learn: in phases, as in the paper, or as the yardstick does.

First segmentations and their shapes are learned as a pair, then images of given segmentations and
their appearance as another. From there the game of three players goes on. The yardstick is the
network of the evidence, which learns alone.

Where masks are known for a part of the images only, the pairs learn from this part. In the game a
step has a batch of pairs, and one of images alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyro
import torch
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor

from faces.game import three_players
from faces.pairs import Pairs, Splits
from faces.programs import Programs, convolutional
from pyro_symeq import Batch, Game, GameLoss, Play, Player, SymmetricEquilibrium
from training import cosine

__all__ = ["METHODS", "PRESETS", "Phase", "Settings", "Training"]


@dataclass(frozen=True)
class Settings:
    """What a training and its figures depend on, besides the data set and the seed.

    Args:
        steps: The number of steps of the game, and of the yardstick; in each phase, the learning
            rate falls to zero along a cosine.
        shape_steps: The number of steps in which shapes are learned alone.
        appearance_steps: The number of steps in which appearance is.
        batch_size: The number of pairs of a step, and of images without masks.
        learning_rate: The learning rate at the start of each phase, of all players.
        shape_bits: The number of bits z1.
        appearance_bits: The number of bits z2.
        width: The number of channels of the networks at a quarter of the resolution.
        num_rounds: The number of Gibbs rounds to a dream.
        num_decided: How many of the training images are segmented for a figure.
        decision_rounds: The number of rounds of the chains that segment images.
        sample_rounds: The number of rounds to a sample of the limiting distribution.
    """

    steps: int
    shape_steps: int
    appearance_steps: int
    batch_size: int = 12
    learning_rate: float = 2e-3
    shape_bits: int = 50
    appearance_bits: int = 100
    width: int = 24
    num_rounds: int = 3
    num_decided: int = 100
    decision_rounds: int = 100
    sample_rounds: int = 200


PRESETS = {
    "laptop": Settings(1500, 1500, 1500),
    "long": Settings(2500, 3000, 6000),
    "paper": Settings(
        200_000,
        50_000,
        100_000,
        64,
        width=96,
        num_rounds=5,
        decision_rounds=1000,
        num_decided=2000,
    ),
    "smoke": Settings(3, 3, 3, 4, width=2, num_decided=6, decision_rounds=4, sample_rounds=2),
}


@dataclass(frozen=True)
class Phase:
    """A part of a training.

    Args:
        name: Its name.
        steps: The number of its steps.
        game: What learns in it.
        optims: The optimisers of its players.
        batch: Draws what a step is given.
    """

    name: str
    steps: int
    game: Game
    optims: tuple[PyroLRScheduler, ...]
    batch: Callable[[], tuple[Batch, ...]]

    def step(self) -> GameLoss:
        """Lets the players move on a batch."""
        loss = self.game.step(*self.batch())
        for optim in self.optims:
            optim.step()
        return loss


class Training:
    """Programs that learn.

    Args:
        splits: The data set.
        labelled: The part of the training images whose masks are known, the same for each seed.
        seed: The seed of the initial parameters and of all draws.
        settings: What else the training depends on.
    """

    def __init__(self, splits: Splits, labelled: float, seed: int, settings: Settings) -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        self.seed = seed
        self.settings = settings
        self.has_mirror_images = splits.has_mirror_images
        self.pairs = splits.training[_some(len(splits.training), labelled)]
        self.images = None if len(self.pairs) == len(splits.training) else splits.training.x
        sizes = len(splits.class_names), settings.shape_bits, settings.appearance_bits
        networks = convolutional(splits.side, *sizes, settings.width)
        self.programs = Programs(networks.to(splits.training.x), *sizes)

    def phases(self, method: str) -> Iterator[Phase]:
        """The phases of a training by some method, each to be ended before the next begins."""
        for number, make in enumerate(METHODS[method]):
            pyro.clear_param_store()
            pyro.set_rng_seed(self.seed + number)
            yield make(self)

    def shapes(self) -> Phase:
        """Segmentations are learned with their shapes."""
        steps, programs = self.settings.shape_steps, self.programs
        optims = self._optim(steps), self._optim(steps)
        game = SymmetricEquilibrium(programs.draw_shape, programs.encode_shape, optims)
        return Phase("shapes", steps, game, optims, lambda: (Batch(self._pairs().s),))

    def appearance(self) -> Phase:
        """Images of given segmentations are learned with their appearance."""
        steps, programs = self.settings.appearance_steps, self.programs
        optims = self._optim(steps), self._optim(steps)
        game = SymmetricEquilibrium(programs.draw_appearance, programs.encode_appearance, optims)

        def batch() -> tuple[Batch]:
            pairs = self._pairs()
            return (Batch(pairs.x, pairs.s),)

        return Phase("appearance", steps, game, optims, batch)

    def game(self) -> Phase:
        """The game of three players (eq. 17)."""
        steps, conditionals = self.settings.steps, self.programs.conditionals
        optims = {block: self._optim(steps) for block in conditionals.blocks}
        game = three_players(conditionals, optims, self.settings.num_rounds)
        return Phase("game", steps, game, tuple(optims.values()), self._batches)

    def yardstick(self) -> Phase:
        """The network of the evidence alone learns from pairs, supervised."""

        def likelihood(play: Play, x: Tensor, s: Tensor) -> Tensor:
            return play.log_prob("s", x, given={"s": s})

        steps = self.settings.steps
        optim = self._optim(steps)
        game = Game([Player("s", self.programs.segment_alone, optim, likelihood)])

        def batch() -> tuple[Batch]:
            pairs = self._pairs()
            return (Batch(x=pairs.x, s=pairs.s),)

        return Phase("yardstick", steps, game, (optim,), batch)

    def _optim(self, steps: int) -> PyroLRScheduler:
        return cosine(steps, self.settings.learning_rate)

    def _batches(self) -> tuple[Batch, ...]:
        """A batch of pairs, and one of images alone if masks are known for a part only."""
        pairs = self._pairs()
        batches = [Batch(x=pairs.x, s=pairs.s)]
        if self.images is not None:
            batches.append(Batch(x=self._drawn(self.images)[0]))
        return tuple(batches)

    def _pairs(self) -> Pairs:
        return Pairs(*self._drawn(self.pairs.x, self.pairs.s))

    def _drawn(self, *data: Tensor) -> list[Tensor]:
        """The same rows of some tensors, half of them mirrored if that is allowed."""
        rows = torch.randint(len(data[0]), (self.settings.batch_size,), device=data[0].device)
        if not self.has_mirror_images:
            return [values[rows] for values in data]
        straight, mirrored = rows.chunk(2)
        return [torch.cat([values[straight], values[mirrored].flip(-1)]) for values in data]


def _some(number: int, part: float) -> Tensor:
    """A part of the rows that there are."""
    order = torch.randperm(number, generator=torch.Generator().manual_seed(0))
    return order[: max(round(part * number), 1)]


METHODS = {
    "game": (Training.shapes, Training.appearance, Training.game),
    "supervised": (Training.yardstick,),
}
