r"""Symmetric equilibrium learning: a decoder and an encoder as the two players of a game.

A Nash equilibrium is a pair :math:`(\theta_*, \varphi_*)` from which neither player gains by
moving alone,

.. math::
    L_p(\theta_*, \varphi_*) \ge L_p(\theta, \varphi_*) \quad\text{and}\quad
    L_q(\theta_*, \varphi_*) \ge L_q(\theta_*, \varphi),

and each player climbs its own utility towards it: :math:`\theta` along :math:`\nabla_\theta L_p`,
:math:`\varphi` along :math:`\nabla_\varphi L_q`.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from typing import Any, Literal

import torch
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_symeq import randomness
from pyro_symeq.binding import Call, Program
from pyro_symeq.rehearsal import Bind, aside
from pyro_symeq.utility import NOTHING_TO_LEARN, Score, SymmetricLoss, SymmetricUtility

__all__ = ["SymmetricEquilibrium"]

State = dict[str, Any]


class _Player:
    """A program's parameters, and the optimiser that moves them.

    Args:
        name: ``decoder`` or ``encoder``.
        play: Scores the program at a call.
        optim: The optimiser, which may be the other player's too.
    """

    def __init__(self, name: str, play: Callable[[Call], Score], optim: PyroOptim) -> None:
        self.name = name
        self.play = play
        self.optim = optim
        self.parameters: dict[str, Tensor] = {}
        self.pending: State = {"parameters": {}, "optim": {}}
        self.resumed = False

    def score(self, call: Call) -> Score:
        """Scores the program, once more if that brought up parameters whose values were loaded."""
        score = self.play(call)
        return self.play(call) if self.adopt(score.parameters) else score

    def adopt(self, parameters: Mapping[str, Tensor]) -> bool:
        """Takes note of parameters; new ones get the loaded values that wait for their names.

        Returns:
            Whether any value was set.
        """
        new = {name: leaf for name, leaf in parameters.items() if name not in self.parameters}
        self.parameters.update(parameters)
        waiting = [name for name in new if name in self.pending["parameters"]]
        if self.resumed and len(waiting) < len(new):
            warnings.warn(
                f"The loaded state has no values for these parameters of the {self.name}, which "
                f"keep their initial ones: {sorted(new.keys() - set(waiting))}.",
                stacklevel=2,
            )
        for name in waiting:
            self._set(name, self.pending["parameters"].pop(name), self.pending["optim"])
        return bool(waiting)

    def move(self, parameters: Mapping[str, Tensor], gradients: list[Tensor | None]) -> None:
        """Lets the optimiser take a step along the gradients of the negative utility."""
        leaves = list(parameters.values())
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        self.optim(leaves)
        for leaf in leaves:
            leaf.grad = None

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Takes moves back when an error follows."""
        before = {
            leaf: (leaf.detach().clone(), self._moments(leaf)) for leaf in self.parameters.values()
        }
        try:
            yield
        except Exception:
            for leaf, (value, moments) in before.items():
                leaf.detach().copy_(value)
                if moments is None:
                    self.optim.optim_objs.pop(leaf, None)
                else:
                    _torch_optimizer(self.optim.optim_objs[leaf]).state[leaf] = moments
            raise

    def _moments(self, leaf: Tensor) -> State | None:
        if leaf not in self.optim.optim_objs:
            return None
        state = _torch_optimizer(self.optim.optim_objs[leaf]).state[leaf]
        return {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in state.items()
        }

    def state_dict(self) -> State:
        """Copies the parameters (unconstrained) and the optimiser's state, by parameter name."""
        optimizers = self.optim.optim_objs
        state = {
            "parameters": {name: leaf.detach() for name, leaf in self.parameters.items()},
            "optim": {
                name: _optimizer_state(optimizers[leaf])
                for name, leaf in self.parameters.items()
                if leaf in optimizers
            },
        }
        return copy.deepcopy({key: state[key] | self.pending[key] for key in state})

    def check(self, state: State) -> None:
        """Compares the parameters with those of a state."""
        expected = {name: tuple(leaf.shape) for name, leaf in self.parameters.items()}
        got = {name: tuple(value.shape) for name, value in state["parameters"].items()}
        differing = sorted(n for n in expected if got.get(n) != expected[n])
        if differing:
            raise ValueError(
                f"The state doesn't fit the parameters of the {self.name}. Expected "
                f"{ {n: expected[n] for n in differing} }, got "
                f"{ {n: got.get(n, 'nothing') for n in differing} }. Load a state of the same "
                "programs."
            )

    def load_state_dict(self, state: State) -> None:
        """Sets known parameters, and keeps the rest for when the programs touch them."""
        self.resumed = True
        self.pending = copy.deepcopy({key: dict(state[key]) for key in self.pending})
        for name in self.parameters:
            self._set(name, self.pending["parameters"].pop(name), self.pending["optim"])

    def _set(self, name: str, value: Tensor, optimizers: State) -> None:
        leaf = self.parameters[name]
        if leaf.shape != value.shape:
            raise ValueError(
                f"The loaded value of parameter '{name}' of the {self.name} has shape "
                f"{tuple(value.shape)}; expected {tuple(leaf.shape)}."
            )
        with torch.no_grad():
            leaf.copy_(value)
        self.optim.optim_objs.pop(leaf, None)
        if name in optimizers:
            leaf.grad = None
            self.optim([leaf])  # without a gradient, only creates the optimiser
            _load_optimizer_state(self.optim.optim_objs[leaf], optimizers.pop(name))


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """What a PyroOptim holds for a parameter, without the scheduler that may be around it."""
    return getattr(optimizer, "optimizer", optimizer)


def _optimizer_state(optimizer: Any) -> State:
    inner = _torch_optimizer(optimizer)
    state = {"optimizer": inner.state_dict()}
    return state if inner is optimizer else state | {"scheduler": optimizer.state_dict()}


def _load_optimizer_state(optimizer: Any, state: State) -> None:
    _torch_optimizer(optimizer).load_state_dict(state["optimizer"])
    if "scheduler" in state:
        optimizer.load_state_dict(state["scheduler"])


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
        _check_count("decoder_steps", decoder_steps, at_least=1)
        _check_count("encoder_steps", encoder_steps, at_least=1)
        _check_count("encoder_warmup", encoder_warmup, at_least=0)
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
        self._decoder = _Player("decoder", pair.decoder, optims[0])
        self._encoder = _Player("encoder", pair.encoder, optims[1])
        self._is_prepared = False

    def __repr__(self) -> str:
        return (
            f"SymmetricEquilibrium(updates={self.updates!r}, decoder_steps={self.decoder_steps}, "
            f"encoder_steps={self.encoder_steps}, encoder_warmup={self.encoder_warmup}, "
            f"num_steps={self.num_steps})"
        )

    def step(self, *args: Any, **kwargs: Any) -> SymmetricLoss:
        r"""Moves both players, as the schedule says.

        Args:
            args: What model and guide take.
            kwargs: Likewise.

        Returns:
            The loss :math:`-(L_p + L_q)` (nats, summed over the batch), a float with ``.decoder``
            and ``.encoder``: each utility at the last draw before its player moved.

        Raises:
            ValueError: The pair can't learn from this batch, or a utility is not finite. Nothing
                has moved then; with Pyro's validation off, the decoder may have.
        """
        call = (args, kwargs)
        self._prepare(call)
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
            args: What model and guide take.
            kwargs: Likewise.

        Returns:
            A float with the utilities ``.decoder`` and ``.encoder``.
        """
        with torch.no_grad():
            self._prepare((args, kwargs))
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
        players = (self._decoder, self._encoder)
        for player in players:
            player.check(state[player.name])
        for player in players:
            player.load_state_dict(state[player.name])
        self.num_steps = state["num_steps"]
        randomness.set_state(state["random"])

    def _schedule(self) -> Iterator[tuple[_Player, ...]]:
        """Yields, in turn, the players that move from the same point."""
        warming_up = self.num_steps < self.encoder_warmup
        decoder = [self._decoder] * (0 if warming_up else self.decoder_steps)
        encoder = [self._encoder] * self.encoder_steps
        if self.updates == "alternating":
            yield from ((player,) for player in decoder + encoder)
        else:
            for players in zip_longest(decoder, encoder):
                yield tuple(player for player in players if player is not None)

    def _prepare(self, call: Call) -> None:
        """Tries both players on the side, so that loaded values are set and errors come first."""
        players = (self._decoder, self._encoder)
        while not self._is_prepared or any(player.pending["parameters"] for player in players):
            with aside():
                scores = [player.play(call) for player in players]
            if torch.is_grad_enabled():
                _check_learnable(players, scores)
                self._is_prepared = True
            touched = [score.parameters for score in scores]
            adopted = [p.adopt(named) for p, named in zip(players, touched, strict=True)]
            if not any(adopted):
                return


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


def _check_count(name: str, value: int, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(
            f"Expected {name} to be an integer of at least {at_least}, got {value!r}."
        )


def _check_learnable(players: tuple[_Player, ...], scores: list[Score]) -> None:
    for player, score in zip(players, scores, strict=True):
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
