r"""Symmetric equilibrium learning: a decoder and an encoder as the two players of a game.

A Nash equilibrium is a pair :math:`(\theta_*, \varphi_*)` from which neither player gains by
moving alone,

.. math::
    L_p(\theta_*, \varphi_*) \ge L_p(\theta, \varphi_*) \quad\text{and}\quad
    L_q(\theta_*, \varphi_*) \ge L_q(\theta_*, \varphi),

and each player climbs its own utility towards it: :math:`\theta` along :math:`\nabla_\theta L_p`,
:math:`\varphi` along :math:`\nabla_\varphi L_q`.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, Literal, cast

import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_symeq.batch import Batch, batches
from pyro_symeq.binding import Call, Program
from pyro_symeq.callers import stacklevel
from pyro_symeq.checks import check_count
from pyro_symeq.game import Captures, Game, Nonfinite
from pyro_symeq.loss import SymmetricLoss
from pyro_symeq.pair import Pair
from pyro_symeq.parallel import Group
from pyro_symeq.play import Play
from pyro_symeq.player import Own, Player
from pyro_symeq.rehearsal import Bind
from pyro_symeq.strategy import State
from pyro_symeq.uncompiled import uncompiled
from pyro_symeq.utility import SymmetricUtility
from pyro_symeq.warmup import CodeWarmup, may_have_collapsed, warn_if_collapsed

__all__ = ["SymmetricEquilibrium"]

NUM_DRAWS = 4  # of the guide, for the information in its latents


class SymmetricEquilibrium(Game):
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
        encoder_warmup: The number of calls at the start in which the encoder alone moves, on dreams
            of the untrained decoder.
        code_warmup: For how many calls the encoder learns a code for the data besides, if after 50
            calls its discrete latents, 8 or more, say hardly anything about them: less than 0.03
            bits each on average. Draws of the prior are dealt out to the rows in the order of the encoder's
            own means, in every fourth call. They count in its gradient, not in its utility, and
            ever less: at the end, the game is what it was. With 0, there is no code.
        watch: Every ``watch`` calls, the loss has ``.information``; with 0, it never has.
        parameters: Modules whose parameters are the ``"decoder"``'s or the ``"encoder"``'s own,
            where what the model touches isn't to be the decoder's; see :class:`Player`.
        capture: Whether to record a step on each kind of batch and to replay it: in a CUDA graph,
            on the CPU one operation after another. Python does not run then. What a program takes
            from Python besides the shapes of its arguments and numbers among them, such as a
            weight that grows from step to step, stays as it was recorded: hand it over in a
            tensor. What can't be recorded runs as ever, with a warning that says why.
            ``"compile"`` gives recordings to ``torch.compile``, too, which takes ten seconds or
            more for each kind of batch and merges operations into fewer kernels.
        process_group: Processes that train together, each on a shard of the data, such as
            ``torch.distributed.group.WORLD`` once ``torch.distributed.init_process_group()`` has
            been called. Utilities and gradients are means over ranks: n ranks are one with n times
            the batch, whose loss is divided by n. All ranks begin with the parameters and buffers
            of the first. They draw other random numbers each: the seed of the first, the number of
            steps and the rank decide which. They create the game and take steps together; what
            else they do is their own. Whole steps are in no CUDA graph then. See "Training in
            parallel" in the documentation.
        nonfinite: What happens at a batch at which a utility is NaN or infinite. ``"raise"``: a
            ``ValueError``. ``"skip"``: nothing moves, a warning tells why, the loss is NaN, and the
            step counts; so it is where a gradient is not finite. Each step waits for the device
            then, and the decoder is copied before it moves.

    Raises:
        TypeError: ``optim`` is neither a ``PyroOptim`` nor a pair of them, ``parameters`` is no
            dict, or ``process_group`` is no group of this process.
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

    _kind_of_loss = SymmetricLoss

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
        code_warmup: int = 1000,
        watch: int = 0,
        parameters: Mapping[str, Own] | None = None,
        capture: Captures = False,
        process_group: Group = None,
        nonfinite: Nonfinite = "raise",
    ) -> None:
        moves = schedule(updates, decoder_steps, encoder_steps)
        check_count("encoder_warmup", encoder_warmup, at_least=0)
        check_count("code_warmup", code_warmup, at_least=0)
        check_count("watch", watch, at_least=0)
        own = whose(parameters)
        self.model = model
        self.guide = guide
        self.optim = optim
        self.utility = _utility(loss, bind, supervise_encoder)
        self.decoder_steps = decoder_steps
        self.encoder_steps = encoder_steps
        self.encoder_warmup = encoder_warmup
        self.code_warmup = code_warmup
        self.watch = watch
        self._code = CodeWarmup(code_warmup)
        self._pair = self.utility.pair(model, guide)
        utilities = self.utility.stage(model, guide).utilities
        decoder, encoder = _pair_of_optims(optim)
        super().__init__(
            [
                Player("decoder", model, decoder, utilities["decoder"], own.get("decoder")),
                Player("encoder", guide, encoder, utilities["encoder"], own.get("encoder")),
            ],
            updates=moves,
            capture=capture,
            process_group=process_group,
            nonfinite=nonfinite,
        )
        self.updates = updates

    def __repr__(self) -> str:
        return (
            f"SymmetricEquilibrium(updates={self.updates!r}, decoder_steps={self.decoder_steps}, "
            f"encoder_steps={self.encoder_steps}, encoder_warmup={self.encoder_warmup}, "
            f"code_warmup={self.code_warmup}, watch={self.watch}, num_steps={self.num_steps})"
        )

    @uncompiled
    def step(self, *args: Any, **kwargs: Any) -> SymmetricLoss:
        r"""Moves both players, as the schedule says.

        Args:
            args: What model and guide take, or one :class:`Batch` or several.
            kwargs: Likewise.

        Returns:
            The loss :math:`-(L_p + L_q)` (nats, summed over the batch), a float with ``.decoder``
            and ``.encoder``: each utility at the last draw before its player moved. With validation
            off, it waits on a GPU until somebody looks at it.

        Raises:
            ValueError: The pair can't learn from this batch, or a utility is not finite, unless
                ``nonfinite="skip"``. Nothing has moved then; with Pyro's validation off, the
                decoder may have. On a GPU, with validation off, what is not finite is told when
                the loss is read.
        """
        with self._pair.coded(self._code.weight(self.num_steps)):
            loss = cast(SymmetricLoss, super().step(*args, **kwargs))
        self._look((args, kwargs), loss)
        return loss

    @uncompiled
    def evaluate_loss(self, *args: Any, **kwargs: Any) -> SymmetricLoss:
        r"""Estimates the loss :math:`-(L_p + L_q)` (nats, summed over the batch); nothing moves.

        Args:
            args: What model and guide take, or one :class:`Batch` or several.
            kwargs: Likewise.

        Returns:
            A float with the utilities ``.decoder`` and ``.encoder``.
        """
        return cast(SymmetricLoss, super().evaluate_loss(*args, **kwargs))

    def state_dict(self) -> State:  # noqa: D102
        return {**super().state_dict(), "code_begun": self._code.begun}

    def load_state_dict(self, state: State, /, *args: Any, **kwargs: Any) -> None:  # noqa: D102
        code = CodeWarmup(self.code_warmup)
        if isinstance(state, Mapping):
            code.load(state.get("code_begun"))
            state = {key: value for key, value in state.items() if key != "code_begun"}
        super().load_state_dict(state, *args, **kwargs)
        self._code = code

    def _look(self, call: Call, loss: SymmetricLoss) -> None:
        """Looks at the information in the latents, where it is wanted or matters."""
        steps = self.num_steps
        if self.nonfinite == "skip" and math.isnan(loss):
            self._code.put_off(steps)
            return
        if self.watch > 0 and steps % self.watch == 0:
            loss.information = self._information(call)
        if self._code.may_begin(steps):
            self._code.begin(steps, self._information(call, are_coded=True))
        if may_have_collapsed(steps):
            warn_if_collapsed(steps, self._information(call))

    def _information(self, call: Call, are_coded: bool = False) -> dict[str, Tensor]:
        place = (f"step {self.num_steps}", "information")
        play, parts = self._stage.play(), batches(call)
        look = partial(information_in, self._pair, play, parts, are_coded)
        return _means(self._ranks.gathered(place, look))

    def _unrecorded(self) -> set[str]:
        return {"encoder"} if self._code.weight(self.num_steps) else set()

    def _awake(self) -> set[str]:
        warming_up = self.num_steps < self.encoder_warmup
        return super()._awake() - ({"decoder"} if warming_up else set())

    def _watched(self) -> set[str]:
        return {"decoder", "encoder"}


def information_in(
    pair: Pair, play: Play, parts: Iterable[Batch], are_coded: bool
) -> dict[str, Tensor]:
    """What each latent says about the first of some batches that tells (bits), by site.

    Args:
        pair: The two programs.
        play: The play.
        parts: The batches.
        are_coded: Whether to look at latents that have a code alone.
    """
    found = (pair.information(play, part.call, NUM_DRAWS, are_coded) for part in parts)
    return next(filter(None, found), {})


def _means(found: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The means over those ranks whose batches tell."""
    if len(found) == 1:
        return dict(found[0])
    names = dict.fromkeys(name for each in found for name in each)
    return {
        name: torch.stack([each[name] for each in found if name in each]).mean(0) for name in names
    }


def schedule(updates: str, decoder_steps: int, encoder_steps: int) -> list[tuple[str, ...]]:
    """The moves of a step in order, each with the players that move at once.

    Args:
        updates: See :class:`SymmetricEquilibrium`.
        decoder_steps: Likewise.
        encoder_steps: Likewise.

    Raises:
        ValueError: One of them has a value that it can't have.
    """
    if updates not in ("alternating", "simultaneous"):
        raise ValueError(f"Expected updates='alternating' or 'simultaneous', got {updates!r}.")
    check_count("decoder_steps", decoder_steps, at_least=1)
    check_count("encoder_steps", encoder_steps, at_least=1)
    decoder, encoder = ["decoder"] * decoder_steps, ["encoder"] * encoder_steps
    if updates == "alternating":
        return [(name,) for name in decoder + encoder]
    together = zip_longest(decoder, encoder)
    return [tuple(name for name in names if name is not None) for names in together]


def whose(parameters: Mapping[str, Own] | None) -> Mapping[str, Own]:
    """What players claim, by their names.

    Raises:
        TypeError: They are not by name.
        ValueError: There is no such player.
    """
    own = {} if parameters is None else parameters
    if not isinstance(own, Mapping):
        raise TypeError(
            "Expected parameters to be a dict of networks by player, such as "
            f"{{'encoder': network}}, got {type(own).__name__}."
        )
    if unknown := own.keys() - {"decoder", "encoder"}:
        raise ValueError(
            f"parameters= names {sorted(unknown)}; the players are 'decoder' and 'encoder'."
        )
    return own


def _utility(loss: Any, bind: Bind | None, supervise_encoder: bool) -> SymmetricUtility:
    if not isinstance(loss, SymmetricUtility):
        if loss is not None:
            name = getattr(loss, "__name__", type(loss).__name__)
            warnings.warn(
                f"SymmetricEquilibrium ignores loss={name}: the game has its own utilities. "
                "Leave loss= out, or pass a SymmetricUtility.",
                stacklevel=stacklevel(),
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
