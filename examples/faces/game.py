r"""The game of three players: one segments, one paints and one encodes.

The utilities are those of eq. 17 of the paper, and for the player of segmentations one term more.
In eq. 17 it is scored with bits that encode the true segmentation. Who segments an image has no
other bits than those of the segmentation found so far, and where a part of the image is hidden, no
other pixels there than painted ones. So the player counts in a round of the chain that segments,
too. With :math:`x_h` for what is hidden of :math:`x = (x_o, x_h)`, the term is

.. math::
    \mathbb{E}_{\pi(x, s)} \mathbb{E}_{\pi(z, s^0) p(x_h^0 \mid s^0, z)}
    \mathbb{E}_{p(s' \mid x_o, x_h^0, z)} \mathbb{E}_{q(z' \mid x_o, x_h^0, s')}
    \mathbb{E}_{p(x'_h \mid s', z')} [\log p(s \mid x_o, x'_h, z')],

a lower bound of the log-likelihood of the segmentations to which the chain leads. Of every other
image nothing is hidden, and of the others what lies on one side of a random line.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_symeq import Conditionals, Game, Play, Player, conditional_game

__all__ = ["LATENTS", "sides", "three_players"]

LATENTS = ("z1", "z2")
ENCODER = ", ".join(LATENTS)


def three_players(
    conditionals: Conditionals, optims: Mapping[str, PyroOptim], num_rounds: int
) -> Game:
    """Makes the game.

    Args:
        conditionals: The programs of ``s``, ``x`` and of the bits, and the prior.
        optims: The optimiser of each player.
        num_rounds: The number of Gibbs rounds to a dream.
    """
    game = conditional_game(conditionals, optims, encoder=LATENTS, num_rounds=num_rounds)
    return Game(
        _scored_in_chains(player) if player.name == "s" else player for player in game.players
    )


def _scored_in_chains(player: Player) -> Player:
    """Lets the player of segmentations be scored in a round of the chain that segments, too."""
    by_blocks = player.utility
    assert by_blocks is not None

    def utility(play: Play, **data: Tensor) -> Tensor:
        u = by_blocks(play, **data)
        if data.keys() < {"x", "s"}:
            return u
        x, s = data["x"], data["s"]
        visible = sides(x)

        def completed(s: Tensor, z: Mapping[str, Tensor]) -> Tensor:
            return torch.where(visible, x, play.sample("x", s, z["z2"])["x"])

        z = play.sample("prior", x)
        seen = completed(z["s"], z)
        found = play.sample("s", seen, z["z1"], z["z2"])["s"]
        z = play.sample(ENCODER, seen, found)
        log_p = play.log_prob("s", completed(found, z), z["z1"], z["z2"], given={"s": s})
        return u + log_p

    return replace(player, utility=utility)


def sides(x: Tensor) -> Tensor:
    """Draws what is visible of images: all of every other, and one side of a line of the rest.

    Args:
        x: Images, with shape :math:`(N, C, H, H)`.

    Returns:
        Whether each pixel is visible, with shape :math:`(N, 1, H, H)`.
    """
    number, side = len(x), x.shape[-1]
    angle, offset = x.new_empty(2, number, 1, 1).uniform_().unbind()
    angle, offset = 2 * torch.pi * angle, 1.4 * offset - 0.2
    at = torch.linspace(-1, 1, side, dtype=x.dtype, device=x.device)
    visible = at[:, None] * angle.sin() + at * angle.cos() < offset
    visible[::2] = True
    return visible[:, None]
