r"""The game of three players: one segments, one paints and one encodes.

The utilities are those of eq. 17 of the paper, and for the player of segmentations one term more.
In eq. 17 it is scored with bits that encode the true segmentation. Who segments an image has no
other bits than those of the segmentation found so far. So the player counts with such bits, too,
after a round of the chain that segments,

.. math::
    \mathbb{E}_{\pi(x, s)} \mathbb{E}_{\pi(z)} \mathbb{E}_{p(s' \mid x, z)}
    \mathbb{E}_{q(z' \mid x, s')} [\log p(s \mid x, z')],

a lower bound of the log-likelihood of the segmentations to which the chain leads.
"""

from collections.abc import Mapping
from dataclasses import replace

from pyro.optim import PyroOptim
from torch import Tensor

from pyro_symeq import Conditionals, Game, Play, Player, conditional_game

__all__ = ["LATENTS", "three_players"]

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
    return Game(_scored_alone(player) if player.name == "s" else player for player in game.players)


def _scored_alone(player: Player) -> Player:
    """Lets the player of segmentations be scored with bits of its own segmentations, too."""
    by_blocks = player.utility
    assert by_blocks is not None

    def utility(play: Play, **data: Tensor) -> Tensor:
        u = by_blocks(play, **data)
        if data.keys() < {"x", "s"}:
            return u
        x, s = data["x"], data["s"]
        z = play.sample("prior", x)
        found = play.sample("s", x, z["z1"], z["z2"])["s"]
        z = play.sample(ENCODER, x, found)
        return u + play.log_prob("s", x, z["z1"], z["z2"], given={"s": s})

    return replace(player, utility=utility)
