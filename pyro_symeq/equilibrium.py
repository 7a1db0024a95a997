r"""Symmetric equilibrium learning: a decoder and an encoder as the two players of a game.

A Nash equilibrium is a pair :math:`(\theta_*, \varphi_*)` from which neither player gains by
moving alone,

.. math::
    L_p(\theta_*, \varphi_*) \ge L_p(\theta, \varphi_*) \quad\text{and}\quad
    L_q(\theta_*, \varphi_*) \ge L_q(\theta_*, \varphi),

and each player climbs its own utility towards it: :math:`\theta` along :math:`\nabla_\theta L_p`,
:math:`\varphi` along :math:`\nabla_\varphi L_q`.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import zip_longest
from typing import Any, Literal

import torch
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.optim import PyroOptim

from pyro_symeq import randomness
from pyro_symeq.binding import Call, Program
from pyro_symeq.player import Player, State
from pyro_symeq.rehearsal import Bind, aside
from pyro_symeq.score import NOTHING_TO_LEARN, Score
from pyro_symeq.utility import SymmetricLoss, SymmetricUtility, check_count

__all__ = ["SymmetricEquilibrium"]

NUM_TRIES = 100


class SymmetricEquilibrium:
    r"""Learns a model and a guide as the two players of a game; it takes the place of ``SVI``.

    The decoder climbs :math:`L_p` in :math:`\theta`, on latents that the guide draws for the data;
    the encoder climbs :math:`L_q` in :math:`\varphi`, on dreams of the model. No gradient passes
    through a draw. See :class:`SymmetricUtility` for the utilities.

    Args:
        model: The decoder's program, :math:`p_\theta(x, z)`.
        guide: The encoder's program, :math:`q_\varphi(z \mid x)`; it takes the model's arguments.
        optim: A ``PyroOptim`` for both players, or a pair: the decoder's and the encoder's.
        loss: A :class:`SymmetricUtility`; any other loss is ignored with a warning.
        bind: How dreams are handed to the guide, see :class:`SymmetricUtility`.
        supervise_encoder: Whether observed latents train the encoder too (eq. 11 against eq. 16).
        updates: ``"alternating"``: the decoder moves, then the encoder against the new decoder.
            ``"simultaneous"``: both move from the same point.
        decoder_steps: How often the decoder moves in a call of :meth:`step`.
        encoder_steps: How often the encoder does.
        encoder_warmup: In how many first calls the encoder alone moves, on dreams of the untrained
            decoder.

    Raises:
        TypeError: ``optim`` is neither a ``PyroOptim`` nor a pair of them.
        ValueError: An option has a value that it can't have.

    References:
        Symmetric Equilibrium Learning of VAEs (Flach, Schlesinger, Shekhovtsov, 2024), eqs. 5
        to 8. https://arxiv.org/abs/2307.09883

    Example:
        >>> encoder = torch.nn.Linear(4, 2)
        >>> decoder = torch.nn.Linear(2, 4)
        >>> def model(x):
        ...     pyro.module("decoder", decoder)
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
        ...         pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)
        >>> def guide(x):
        ...     pyro.module("encoder", encoder)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Bernoulli(logits=encoder(x)).to_event(1))
        >>> symeq = SymmetricEquilibrium(model, guide, pyro.optim.Adam({"lr": 1e-3}))
        >>> loss = symeq.step(torch.eye(4))
        >>> loss == -(loss.decoder + loss.encoder)
        True
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: PyroOptim | tuple[PyroOptim, PyroOptim],
        loss: SymmetricUtility | ELBO | Callable[..., Any] | None = None,
        *,
        bind: Bind | None = None,
        supervise_encoder: bool = True,
        updates: Literal["alternating", "simultaneous"] = "alternating",
        decoder_steps: int = 1,
        encoder_steps: int = 1,
        encoder_warmup: int = 0,
    ) -> None:
        if updates not in ("alternating", "simultaneous"):
            raise ValueError(f"Expected updates='alternating' or 'simultaneous', got {updates!r}.")
        check_count("decoder_steps", decoder_steps, at_least=1)
        check_count("encoder_steps", encoder_steps, at_least=1)
        check_count("encoder_warmup", encoder_warmup, at_least=0)
        self.model = model
        self.guide = guide
        self.optim = optim
        self.utility = _utility(loss, bind, supervise_encoder)
        self.updates = updates
        self.decoder_steps = decoder_steps
        self.encoder_steps = encoder_steps
        self.encoder_warmup = encoder_warmup
        self.num_steps = 0
        pair = self.utility.pair(model, guide)
        optims = _pair_of_optims(optim)
        self._decoder = Player("decoder", pair.decoder, optims[0])
        self._encoder = Player("encoder", pair.encoder, optims[1])
        self._players = (self._decoder, self._encoder)
        self._is_learnable = False

    def __repr__(self) -> str:
        return (
            f"SymmetricEquilibrium(updates={self.updates!r}, decoder_steps={self.decoder_steps}, "
            f"encoder_steps={self.encoder_steps}, encoder_warmup={self.encoder_warmup}, "
            f"num_steps={self.num_steps})"
        )

    @torch.enable_grad()
    def step(self, *args: Any, **kwargs: Any) -> SymmetricLoss:
        r"""Moves both players, as the schedule says.

        Args:
            args: What model and guide take, or one :class:`Batch` or several.
            kwargs: Likewise.

        Returns:
            The loss :math:`-(L_p + L_q)` (nats, summed over the batch), a float with ``.decoder``
            and ``.encoder``: each utility at the last draw before its player moved.

        Raises:
            ValueError: The pair can't learn from this batch, or a utility is not finite. Nothing
                has moved then; with Pyro's validation off, the decoder may have.
        """
        call = (args, kwargs)
        self._set_loaded(call)
        self._check_learnable(call)
        utilities = {}
        rounds = list(self._schedule())
        with ExitStack() as stack:
            if is_validation_enabled():
                for player in {player for players in rounds[:-1] for player in players}:
                    stack.enter_context(player.undone_on_error())
            for players in rounds:
                scores = [player.score(call) for player in players]
                gradients = [score.gradients(score.parameters.values()) for score in scores]
                for player, score, gradient in zip(players, scores, gradients, strict=True):
                    player.move(score.parameters, gradient)
                    utilities[player.name] = score.utility.item()
            if "decoder" not in utilities:
                with torch.no_grad():
                    utilities["decoder"] = self._decoder.score(call).utility.item()
        self.num_steps += 1
        return SymmetricLoss(**utilities)

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> SymmetricLoss:
        r"""Estimates the loss :math:`-(L_p + L_q)` (nats, summed over the batch); nothing moves.

        Args:
            args: What model and guide take, or one :class:`Batch` or several.
            kwargs: Likewise.

        Returns:
            A float with the utilities ``.decoder`` and ``.encoder``.
        """
        with torch.no_grad():
            self._set_loaded((args, kwargs))
        return self.utility.loss(self.model, self.guide, *args, **kwargs)

    def state_dict(self) -> State:
        """Copies all that a training needs to go on as if it had never stopped.

        Returns:
            The unconstrained parameters and the optimiser states of both players by parameter
            name, the place in the schedule, and the states of the random number generators of
            torch, numpy and Python. ``torch.load`` reads it with ``weights_only=True``. Buffers of
            modules (running averages, say) are not parameters: save them with the modules.
        """
        return {
            "decoder": self._decoder.state_dict(),
            "encoder": self._encoder.state_dict(),
            "num_steps": self.num_steps,
            "random": randomness.get_state(),
        }

    def load_state_dict(self, state: State) -> None:
        """Goes back to a state.

        Parameters that the programs have not touched yet take their values when they first do, in
        the next :meth:`step` or :meth:`evaluate_loss`.

        Args:
            state: What :meth:`state_dict` returned, of the same programs.

        Raises:
            ValueError: The state isn't one of these programs; nothing has changed.
        """
        keys = self.state_dict().keys()
        if not isinstance(state, Mapping) or state.keys() != keys:
            got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(
                f"Expected a state of SymmetricEquilibrium with the keys {sorted(keys)}, "
                f"got {got}."
            )
        for player in self._players:
            player.check(state[player.name])
        for player in self._players:
            player.load_state_dict(state[player.name])
        self.num_steps = state["num_steps"]
        randomness.set_state(state["random"])

    def _schedule(self) -> Iterator[tuple[Player, ...]]:
        """Yields, in turn, the players that move from the same point."""
        warming_up = self.num_steps < self.encoder_warmup
        decoder = [self._decoder] * (0 if warming_up else self.decoder_steps)
        encoder = [self._encoder] * self.encoder_steps
        if self.updates == "alternating":
            yield from ((player,) for player in decoder + encoder)
        else:
            for players in zip_longest(decoder, encoder):
                yield tuple(player for player in players if player is not None)

    def _set_loaded(self, call: Call) -> None:
        """Sets the loaded parameters that the programs touch in this call, before it is played."""
        found = True
        while found and any(player.pending["parameters"] for player in self._players):
            with aside():
                found = any([p.adopt(p.play(call).parameters) for p in self._players])

    def _check_learnable(self, call: Call) -> None:
        """Checks once, on the side, that both players can move."""
        if not self._is_learnable:
            with aside():
                _check_learnable(self._players, [_try(player, call) for player in self._players])
            self._is_learnable = True


def _utility(loss: Any, bind: Bind | None, supervise_encoder: bool) -> SymmetricUtility:
    if not isinstance(loss, SymmetricUtility):
        if loss is not None:
            name = getattr(loss, "__name__", type(loss).__name__)
            warnings.warn(
                f"SymmetricEquilibrium ignores loss={name}: the game has its own utilities. "
                "Leave loss= out, or pass a SymmetricUtility.",
                stacklevel=3,
            )
        return SymmetricUtility(bind=bind, supervise_encoder=supervise_encoder)
    if bind is not None or not supervise_encoder:
        raise ValueError(
            "Give bind= and supervise_encoder= to the SymmetricUtility that is the loss, or leave "
            "loss= out."
        )
    return loss


def _pair_of_optims(optim: Any) -> tuple[PyroOptim, PyroOptim]:
    pair = (optim, optim) if isinstance(optim, PyroOptim) else optim
    if not (
        isinstance(pair, (tuple, list))
        and len(pair) == 2
        and all(isinstance(one, PyroOptim) for one in pair)
    ):
        raise TypeError(
            "Expected optim to be a pyro.optim.PyroOptim or a pair of them (decoder, encoder), "
            f"got {optim!r}. For torch optimisers, use the module SymmetricUtility()(model, "
            "guide)."
        )
    return pair[0], pair[1]


def _try(player: Player, call: Call) -> Score:
    """Scores a player until a draw makes use of its parameters, as not every draw may do."""
    for _ in range(NUM_TRIES):
        score = player.score(call)
        if score.utility.requires_grad or not score.parameters:
            break
    return score


def _check_learnable(players: tuple[Player, ...], scores: list[Score]) -> None:
    for player, score in zip(players, scores, strict=True):
        if score.parameters and not score.utility.requires_grad:
            raise ValueError(
                f"The utility of the {player.name} doesn't depend on its parameters "
                f"{sorted(score.parameters)}. Is its program run without gradients?"
            )
        if not score.unnamed:
            continue
        shapes = [tuple(leaf.shape) for leaf in score.unnamed]
        problem = (
            f"The {player.name}'s program uses parameters that no statement names, with shapes "
            f"{shapes}. Register their networks with pyro.module or as attributes of a "
            "PyroModule; if they are, other parameters of that name are in the way: "
            "pyro.clear_param_store()."
        )
        if not score.parameters:
            raise ValueError(f"There is nothing to learn for the {player.name}. {problem}")
        warnings.warn(f"{problem} They are not trained.", stacklevel=4)
    if not any(score.parameters for score in scores):
        raise ValueError(NOTHING_TO_LEARN)
