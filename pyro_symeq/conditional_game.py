r"""Games of conditional programs, one for each block of variables.

With blocks of observed variables :math:`v_1, \dots, v_n`, each with a conditional
:math:`p_b(v_b \mid v_{-b}, z)`, and an encoder :math:`q(z \mid v)` of latents with the law
:math:`\pi(z)`, the utilities follow eq. 17 of the paper from the blocks alone. Every block is
scored on the data, completed by the encoder, and on data in which one of the other blocks was
redrawn by its own player; the encoder is scored on joint samples, drawn by Gibbs rounds:

.. math::
    u_b &= \mathbb{E}_{\pi(v)} \mathbb{E}_{q(z \mid v)} \Big[ w_{bb} \log p_b(v_b \mid v_{-b}, z)
        + \sum_{c \ne b} w_{bc}\, \mathbb{E}_{p_c(v_c' \mid v_{-c}, z)}
          \log p_b(v_b \mid v_c', v_{-bc}, z) \Big], \\
    u_q &= \mathbb{E}_{\pi(z)} \mathbb{E}_{p(v \mid z)} [\log q(z \mid v)].
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_symeq.checks import check_count
from pyro_symeq.conditionals import Conditionals, State, block_name
from pyro_symeq.game import Captures, Game, Nonfinite, Updates
from pyro_symeq.parallel import Group
from pyro_symeq.play import Play, refuse_reserved
from pyro_symeq.player import Player, by_player
from pyro_symeq.weights import Weights, full_weights

__all__ = ["conditional_game"]

PRIOR = "prior"


def conditional_game(
    conditionals: Conditionals,
    optim: PyroOptim | Mapping[str, PyroOptim],
    *,
    encoder: str | tuple[str, ...] | None = None,
    num_rounds: int = 5,
    weights: Weights | None = None,
    updates: Updates = "alternating",
    capture: Captures = False,
    process_group: Group = None,
    nonfinite: Nonfinite = "raise",
) -> Game:
    r"""Makes a game of conditional programs, with a player for each block of variables.

    ``game.step(x=x, s=s)`` takes the data by the names of the variables. Blocks that a batch lacks
    are drawn by Gibbs rounds given the others, and their players are not scored on it. Where it
    holds the latents too, they are kept, and the encoder is scored at them.

    Args:
        conditionals: The conditional programs. The players have the names of their blocks; one
            more, ``"prior"``, draws :math:`\pi(z)` and never moves.
        optim: An optimiser for all players, or one for each by name.
        encoder: The block of latents. Without one, :math:`z` is left out of the formulas, as in
            eq. 33.
        num_rounds: The number of Gibbs rounds. They begin at the data, and with a block of
            their own choice, so that the one drawn last is any of them (eq. 28).
        weights: The weights :math:`w_{bc}` of the terms, by names: ``{"x": {"s": 0.5}}``. Those
            left out are 1.
        updates: See :class:`Game`.
        capture: See :class:`Game`. Who needs Gibbs rounds isn't captured, since a draw tells with
            which block a round begins.
        process_group: See :class:`Game`.
        nonfinite: See :class:`Game`.

    Raises:
        TypeError: ``optim`` is no optimiser.
        ValueError: There is no such block, the encoder has no prior, or ``optim`` or ``weights``
            have other names.

    References:
        Symmetric Equilibrium Learning of VAEs (Flach, Schlesinger, Shekhovtsov, 2024), eqs. 17, 28
        and 33. https://arxiv.org/abs/2307.09883

    Example:
        >>> def p_s(x):
        ...     w = pyro.param("w", torch.zeros(()))
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("s", dist.Bernoulli(logits=w * x))
        >>> def p_x(s):
        ...     m = pyro.param("m", torch.zeros(()))
        ...     with pyro.plate("rows", len(s)):
        ...         pyro.sample("x", dist.Normal(m * s, 1.0))
        >>> conditionals = Conditionals({"s": p_s, "x": p_x})
        >>> game = conditional_game(conditionals, pyro.optim.Adam({"lr": 0.1}))
        >>> game.step(s=torch.ones(3), x=torch.zeros(3)).utilities.keys()
        dict_keys(['s', 'x'])
    """
    check_count("num_rounds", num_rounds, at_least=1)
    encoder = None if encoder is None else block_name(encoder)
    formulas = _Formulas(conditionals, encoder, num_rounds, weights)
    if isinstance(optim, Mapping):
        optim = {block_name(key): one for key, one in optim.items()}
    optims = by_player(optim, conditionals.programs)
    players = [
        Player(name, program, optims[name], partial(formulas.utility, name))
        for name, program in conditionals.programs.items()
    ]
    if conditionals.prior is not None:
        players.append(Player(PRIOR, conditionals.prior))
    return Game(
        players,
        updates=updates,
        capture=capture,
        process_group=process_group,
        nonfinite=nonfinite,
    )


class _Formulas:
    """The utilities of the players of a set of conditionals."""

    def __init__(
        self,
        conditionals: Conditionals,
        encoder: str | None,
        num_rounds: int,
        weights: Weights | None,
    ) -> None:
        blocks = conditionals.blocks
        refuse_reserved(conditionals.variables)
        if encoder is not None and encoder not in blocks:
            raise ValueError(f"encoder= names the block '{encoder}'; there are {list(blocks)}.")
        if encoder is not None and conditionals.prior is None:
            raise ValueError(
                f"The encoder of '{encoder}' learns from latents that a prior draws. Give one: "
                "Conditionals(programs, prior=program)."
            )
        self.conditionals = conditionals
        self.encoder = encoder
        self.num_rounds = num_rounds
        self.data_blocks = [name for name in blocks if name != encoder]
        self.weights = full_weights(weights, self.data_blocks, default=1.0)

    def utility(self, name: str, play: Play, /, *args: Any, **data: Tensor) -> Tensor:
        """The utility of a player for a batch."""
        given = self._given(args, data)
        if name == self.encoder:
            return self._of_encoder(play, name, data, given)
        if name not in given:
            return torch.zeros(())
        return self._of_block(play, name, data, given)

    def _of_block(self, play: Play, b: str, data: State, given: list[str]) -> Tensor:
        state = self._completed(play, data, given)
        terms = []
        for c in given:
            if c != self.encoder and (weight := self.weights[b][c]) > 0:
                seen = state if c == b else state | self._draw(play, c, state)
                terms.append(weight * self._log_prob(play, b, seen))
        return sum(terms, torch.zeros(()))

    def _of_encoder(self, play: Play, q: str, data: State, given: list[str]) -> Tensor:
        latents = self.conditionals.blocks[q]
        observed = {name: value for name, value in data.items() if name not in latents}
        dream = self._rounds(play, self.data_blocks, self._start(play, observed))
        u = self._log_prob(play, q, dream)
        if q in given:
            u = u + self._log_prob(play, q, self._completed(play, data, given))
        return u

    def _completed(self, play: Play, data: State, given: list[str]) -> State:
        """The data, with draws of what they lack."""
        missing = [name for name in self.conditionals.blocks if name not in given]
        if not missing:
            return data
        if missing == [self.encoder]:
            return data | self._draw(play, missing[0], data)
        return self._rounds(play, missing, self._start(play, data))

    def _start(self, play: Play, data: State) -> State:
        """The data, then what the prior draws, then what follows from these."""
        state = dict(data)
        if self.conditionals.prior is not None:
            state = self._prior(play, data) | state
        state = self.conditionals.filled(state, partial(self._draw, play))
        if missing := [name for name in self.conditionals.variables if name not in state]:
            raise ValueError(
                f"The Gibbs rounds can't start: neither the batch nor the prior tells {missing}, "
                "and no program can draw them yet. Let the prior draw starting values for them."
            )
        return state

    def _prior(self, play: Play, data: State) -> State:
        drawn = play.sample(PRIOR, given=None, **self.conditionals.prior_arguments(data))
        latents = self.conditionals.blocks[self.encoder] if self.encoder else ()
        if missing := [name for name in latents if name not in drawn | data]:
            raise ValueError(
                f"The prior never samples {missing}, the latents whose encoder learns from them. "
                "Sample them in the prior, under these names."
            )
        return self.conditionals.prior_values(drawn)

    def _rounds(self, play: Play, blocks: list[str], state: State) -> State:
        """Redraws blocks in turn, beginning with any of them."""
        first = int(torch.randint(len(blocks), ()))
        for name in (blocks[first:] + blocks[:first]) * self.num_rounds:
            state = state | self._draw(play, name, state)
        return state

    def _draw(self, play: Play, name: str, state: State) -> State:
        drawn = play.sample(name, given=None, **self.conditionals.arguments(name, state))
        return self.conditionals.values(name, drawn)

    def _log_prob(self, play: Play, name: str, state: State) -> Tensor:
        given = {site: state[site] for site in self.conditionals.blocks[name]}
        return play.log_prob(name, **self.conditionals.arguments(name, state), given=given)

    def _given(self, args: tuple[Any, ...], data: State) -> list[str]:
        """The blocks that a batch holds.

        Raises:
            TypeError: The data have no names.
            ValueError: They name what is no variable, or only a part of a block.
        """
        if args:
            raise TypeError(
                "Expected the data by the names of the variables, got positional arguments. Call "
                f"game.step({', '.join(f'{n}={n}' for n in self.conditionals.variables)})."
            )
        if not data:
            raise ValueError(
                "The batch is empty. Give data by the names of the variables: "
                f"{list(self.conditionals.variables)}."
            )
        variables, blocks = self.conditionals.variables, self.conditionals.blocks
        if unknown := [name for name in data if name not in variables]:
            raise ValueError(f"The batch names {unknown}; the variables are {list(variables)}.")
        for name, sites in blocks.items():
            if 0 < len(lacking := [site for site in sites if site not in data]) < len(sites):
                raise ValueError(
                    f"The batch holds a part of the block '{name}' and lacks {lacking}. Give a "
                    "block as a whole or not at all."
                )
        return [name for name, sites in blocks.items() if data.keys() >= {*sites}]
