r"""Games of any number of players, each of which learns by gradient from its own utility.

Player :math:`i` has a strategy :math:`\theta_i`, the values of its parameters, and climbs its
utility :math:`u_i(\theta_1, \dots, \theta_n)` along :math:`\nabla_{\theta_i} u_i`. A Nash
equilibrium is a point from which nobody gains by moving alone,

.. math::
    u_i(\theta_*) \ge u_i(\theta_{*1}, \dots, \theta_i, \dots, \theta_{*n})
    \quad\text{for all } i \text{ and } \theta_i.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_symeq import checkpoint, randomness
from pyro_symeq.aside import Keep, aside, buffers_kept
from pyro_symeq.batch import batches
from pyro_symeq.binding import Call, layout
from pyro_symeq.callers import stacklevel
from pyro_symeq.capture import Capture, Occasion
from pyro_symeq.graphs import Rounds, StepGraphs
from pyro_symeq.interrupts import Shield
from pyro_symeq.loss import GameLoss, loss_of
from pyro_symeq.nonfinite import NotFiniteError, is_of_nonfinite
from pyro_symeq.operations import CannotRecord
from pyro_symeq.ownership import NOTHING_TO_LEARN
from pyro_symeq.parallel import Alone, Group, Ranks
from pyro_symeq.play import Ascent, Score, Scoring, Stage, ascent, is_awaited, standing
from pyro_symeq.player import Player, by_name, claims_of
from pyro_symeq.strategy import State, Strategy
from pyro_symeq.uncompiled import uncompiled

__all__ = ["Game"]

Ascend = Callable[..., Ascent]  # of a player, and whether it moves or stays
Captures = bool | Literal["compile"]
Nonfinite = Literal["raise", "skip"]
Updates = Literal["alternating", "simultaneous"] | Sequence[str | Sequence[str]]

NUM_TRIES = 100
UNREGISTERED = (
    "Register their networks with pyro.module or as attributes of a PyroModule; if they are, other "
    "parameters of that name are in the way: call pyro.clear_param_store() before a new training, "
    "and give networks of several players names of their own (PyroModules: "
    "pyro.settings.set(module_local_params=True))."
)
NOT_CONTIGUOUS = (
    "Some aren't contiguous (channels_last?), and Pyro's parameter store has trained copies of "
    "these that are. Leave weights contiguous, or name networks in parameters= and don't call "
    "pyro.module."
)
KEYS = {"players", "frozen", "num_steps", "random"}


class Game:
    r"""Learns the programs of any number of players.

    Args:
        players: The players. A parameter that several programs touch, and nobody claims, belongs
            to the first of them.
        updates: ``"alternating"``: each player moves in turn, against those who have moved before.
            ``"simultaneous"``: all move from the same point. Or the moves of a step in order, each
            a name, or several names that move at once: ``["a", "b", "b"]`` lets b move twice,
            ``[("a", "b"), "c"]`` lets a and b move at once and c after them.
        capture: Whether to record steps and to replay them, see :class:`SymmetricEquilibrium`.
        process_group: Processes that train together, see :class:`SymmetricEquilibrium`.
        nonfinite: What happens at a batch at which a utility is NaN or infinite. ``"raise"``: a
            ``ValueError``. ``"skip"``: nothing moves, a warning tells why, and the loss is NaN; so
            it is where a gradient is not finite. Each step waits for the device then.

    Raises:
        TypeError: ``players`` are no players, or claim what are no named parameters, or
            ``process_group`` is no group of this process.
        ValueError: Two players have one name or claim one parameter, one claims what can't be
            trained, nobody has a utility, or ``updates`` names others.

    References:
        Symmetric Equilibrium Learning of VAEs (Flach, Schlesinger, Shekhovtsov, 2024), section 3
        and eq. 17. https://arxiv.org/abs/2307.09883

    Example:
        >>> decoder, encoder = torch.nn.Linear(2, 4), torch.nn.Linear(4, 2)
        >>> def p(x):
        ...     pyro.module("decoder", decoder)
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
        ...         pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)
        >>> def q(x):
        ...     pyro.module("encoder", encoder)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Bernoulli(logits=encoder(x)).to_event(1))
        >>> def L_p(play, x):
        ...     return play.log_prob("p", x, given=play.sample("q", x))
        >>> def L_q(play, x):
        ...     dream = play.sample("p", x)
        ...     return play.log_prob("q", dream["x"], given={"z": dream["z"]})
        >>> adam = pyro.optim.Adam({"lr": 1e-3})
        >>> game = Game([Player("p", p, adam, L_p), Player("q", q, adam, L_q)])
        >>> game.step(torch.eye(4)).utilities.keys()
        dict_keys(['p', 'q'])
    """

    _kind_of_loss: type[GameLoss] = GameLoss

    def __init__(
        self,
        players: Iterable[Player],
        *,
        updates: Updates = "alternating",
        capture: Captures = False,
        process_group: Group = None,
        nonfinite: Nonfinite = "raise",
    ) -> None:
        if capture not in (True, False, "compile"):
            raise ValueError(f"Expected capture=True, False or 'compile', got {capture!r}.")
        if nonfinite not in ("raise", "skip"):
            raise ValueError(f"Expected nonfinite='raise' or 'skip', got {nonfinite!r}.")
        self._by_name = by_name(players)
        self.players = tuple(self._by_name.values())
        self.updates = updates
        self.num_steps = 0
        self._learners = tuple(player.name for player in self.players if player.utility)
        if not self._learners:
            raise ValueError("No player has a utility, so nobody learns. Give one to some player.")
        self._schedule = tuple(self._moves(updates))
        claims = claims_of(self.players)
        self._strategies = {
            player.name: Strategy(
                player.name, player.optim, bool(capture), claims.get(player.name)
            )
            for player in self.players
            if player.optim is not None
        }
        self._frozen: set[str] = set()
        self._learnable: set[str] = set()
        self._looked: set[Any] = set()
        self._shield = Shield()
        self._stage = Stage(
            {player.name: player.program for player in self.players},
            {player.name: player.utility for player in self.players if player.utility},
            claims,
            are_gradients_finite=nonfinite == "skip",
        )
        self.nonfinite = nonfinite
        self.capture = capture
        self._capture = Capture(self._stage, capture == "compile") if capture else None
        self._ranks = Alone() if process_group is None else Ranks(process_group)
        self._graphs = self._step_graphs() if process_group is None else None
        self._ranks.seed(self.num_steps)

    def __repr__(self) -> str:
        return (
            f"Game(players={list(self._by_name)}, updates={self.updates!r}, "
            f"num_steps={self.num_steps})"
        )

    def freeze(self, *names: str) -> None:
        """Lets players rest: they are drawn from and scored as ever, and don't move.

        Args:
            names: The names of players.

        Raises:
            ValueError: There is no such player.
        """
        self._check_names(names)
        self._frozen.update(names)

    def thaw(self, *names: str) -> None:
        """Lets frozen players move again.

        Args:
            names: The names of players.

        Raises:
            ValueError: There is no such player.
        """
        self._check_names(names)
        self._frozen.difference_update(names)

    @property
    def learners(self) -> tuple[str, ...]:
        """The names of the players who have a utility."""
        return self._learners

    @property
    def frozen(self) -> frozenset[str]:
        """The names of the players that rest."""
        return frozenset(self._frozen)

    @uncompiled
    @torch.enable_grad()
    def step(self, *args: Any, **kwargs: Any) -> GameLoss:
        r"""Lets the players move, as the schedule says.

        Args:
            args: What the utilities take after ``play``, or one :class:`Batch` or several.
            kwargs: Likewise.

        Returns:
            The loss :math:`-\sum_i u_i` (nats), a float with ``.utilities`` of the players that
            moved: each at the last draw before its player did. With validation off, it waits on a
            GPU until somebody looks at it.

        Raises:
            TypeError: A utility returns no tensor.
            RuntimeError: The game was made before ``torch.distributed.init_process_group()``, and
                there are other processes now.
            ValueError: A player can't learn from this batch, a utility returns no scalar or is not
                finite (unless ``nonfinite="skip"``), all players are frozen, or inference mode is
                on. Nothing has moved then; with Pyro's validation off, players that came before
                may have. On a GPU, with validation off, what is not finite is told when the loss
                is read.
        """
        if torch.is_inference_mode_enabled():
            raise ValueError("Nothing can be learned within torch.inference_mode(). Leave it.")
        call = (args, kwargs)
        with self._shield:
            with self._ranks.working():
                rounds = self._rounds()
                moving = _names(rounds)
                watched = self._watched() - moving
            try:
                loss = self._step(call, rounds, moving, watched)
            except (ValueError, RuntimeError) as error:
                if self.nonfinite == "raise" or not is_of_nonfinite(error):
                    raise
                warnings.warn(
                    f"Skipped a batch, and nobody moved: {error}", stacklevel=stacklevel()
                )
                nan = torch.tensor(math.nan, device="cpu")
                loss = self._loss(dict.fromkeys(moving | watched, nan))
            self.num_steps += 1
            self._ranks.seed(self.num_steps)
        return loss

    def _step(self, call: Call, rounds: Rounds, moving: set[str], watched: set[str]) -> GameLoss:
        """Lets players move; returns the loss before they did."""
        with self._shield.lowered():
            with self._ranks.working():
                self._set_loaded(call, needed=moving | watched)
            self._check_learnable(call, moving, watched)
        keep: Keep = _keep_nothing
        with ExitStack() as stack:
            if is_validation_enabled() or self.nonfinite == "skip":
                keep = stack.enter_context(buffers_kept(only_on_error=True))
                may_fail_later = watched or len(rounds[-1]) > 1 or self._graphs is not None
                for name in _names(rounds if may_fail_later else rounds[:-1]):
                    stack.enter_context(self._strategies[name].undone(only_on_error=True))
            return self._loss(self._moved(call, rounds, watched, keep))

    @uncompiled
    def evaluate_loss(self, *args: Any, **kwargs: Any) -> GameLoss:
        r"""Estimates the loss :math:`-\sum_i u_i` (nats); nothing moves, buffers neither.

        Args:
            args: What the utilities take after ``play``, or one :class:`Batch` or several.
            kwargs: Likewise.

        Returns:
            A float with ``.utilities`` of all players that have one, frozen or not.
        """
        call = (args, kwargs)
        with torch.no_grad(), buffers_kept():
            self._set_loaded(call, needed=self._learners)
            return self._loss(self._utilities(call, self._learners))

    @uncompiled
    def evaluate(self, player: str, *args: Any, **kwargs: Any) -> float:
        """Estimates the utility of one player (nats); nothing moves, buffers neither.

        Raises:
            ValueError: There is no such player, or no utility of that player.
        """
        self._check_learner(player)
        call = (args, kwargs)
        with torch.no_grad(), buffers_kept():
            self._set_loaded(call, needed={player})
            return self._utilities(call, {player})[player].item()

    @uncompiled
    @torch.enable_grad()
    def respond(self, player: str, *args: Any, **kwargs: Any) -> None:
        """Moves one player once, whatever the schedule says.

        Raises:
            ValueError: There is no such player, or no utility of that player.
        """
        self._check_learner(player)
        call = (args, kwargs)
        others = set(self._learners) - {player}
        with self._ranks.working():
            self._set_loaded(call, needed={player} | others)
        self._check_learnable(call, {player}, others)
        self._move([(player,)], partial(self._ascent, call))

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Lets all end as it was: parameters, optimisers, buffers, random states, the store."""
        looked, store = set(self._looked), pyro.get_param_store()
        names = set(store.keys())
        with aside(), ExitStack() as stack:
            for strategy in self._strategies.values():
                stack.enter_context(strategy.undone())
            try:
                yield
            finally:
                self._looked = looked
                for name in set(store.keys()) - names:
                    del store[name]

    def state_dict(self) -> State:
        """Copies all that a training needs to go on as if it had never stopped.

        Returns:
            The unconstrained parameters and the optimiser states of all players by parameter name,
            who is frozen, the place in the schedule, and the states of the random number
            generators of torch, numpy and Python. With a process group, the state of one rank is
            good for all: the seed of everyone's random numbers is in it. ``torch.load`` reads it with
            ``weights_only=True``. Buffers of modules (running averages, say) are not parameters:
            save them with the modules.
        """
        return {
            "players": {name: player.state_dict() for name, player in self._strategies.items()},
            "frozen": sorted(self._frozen),
            "num_steps": self.num_steps,
            "random": self._ranks.state_dict(),
        }

    def load_state_dict(self, state: State, /, *args: Any, **kwargs: Any) -> None:
        """Goes back to a state.

        Parameters that the programs have not touched yet take their values when they first do, in
        the next :meth:`step` or :meth:`evaluate_loss`. With a batch, the programs run on the side,
        and all values are in place at once.

        Args:
            state: What :meth:`state_dict` returned, of the same programs.
            args: A batch, as :meth:`step` takes it, if one is at hand.
            kwargs: Likewise.

        Raises:
            ValueError: The state isn't one of these programs; nothing has changed.
        """
        _check_keys(type(self).__name__, "keys", state, KEYS)
        _check_keys(type(self).__name__, "players", state["players"], {*self._strategies})
        self._check_names(state["frozen"])
        for name, strategy in self._strategies.items():
            strategy.check(state["players"][name])
        with self._undone_on_error():
            try:
                self._load(state)
            except Exception as error:
                raise ValueError(
                    f"The state can't be loaded ({type(error).__name__}: {error}). Build the same "
                    "optimisers as those that it was saved of."
                ) from error
            if args or kwargs:
                self._set_loaded((args, kwargs), needed=self._learners)

    def save(self, path: str | Path) -> None:
        """Writes :meth:`state_dict` to a file; until all of it is there, the former file is.

        Args:
            path: The file.

        Raises:
            OSError: It can't be written, as on a full disk; the former file is as it was.
        """
        checkpoint.save(path, self.state_dict())

    def load(self, path: str | Path, /, *args: Any, **kwargs: Any) -> None:
        """Goes back to a state that :meth:`save` wrote; see :meth:`load_state_dict`.

        Args:
            path: The file; nothing in it can run.
            args: A batch, as :meth:`step` takes it: with it, all values are in place at once.
            kwargs: Likewise.

        Raises:
            OSError: There is no such file, or it can't be read.
            ValueError: It is damaged, of something else or of other programs; nothing has changed.
        """
        self.load_state_dict(checkpoint.load(path), *args, **kwargs)

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """Lets all be as it was if what is loaded doesn't fit."""
        frozen, num_steps, looked = self._frozen, self.num_steps, self._looked
        random, ranks = randomness.get_state(), copy(self._ranks)
        try:
            with ExitStack() as stack:
                for strategy in self._strategies.values():
                    stack.enter_context(strategy.undone(only_on_error=True))
                yield
        except BaseException:
            self._frozen, self.num_steps, self._looked = frozen, num_steps, looked
            self._ranks = ranks
            randomness.set_state(random)
            raise

    def _load(self, state: State) -> None:
        for name, strategy in self._strategies.items():
            strategy.load_state_dict(state["players"][name])
        self._frozen = set(state["frozen"])
        self._looked = set()
        self.num_steps = state["num_steps"]
        self._ranks.load_state_dict(state["random"], self.num_steps)

    def _moves(self, updates: Updates) -> Iterator[tuple[str, ...]]:
        """The players that move at once, in turn."""
        if updates == "alternating":
            updates = self._learners
        elif updates == "simultaneous":
            updates = [self._learners]
        if not (isinstance(updates, (tuple, list)) and updates) or not all(
            isinstance(names, (str, tuple, list)) for names in updates
        ):
            raise ValueError(
                "Expected updates='alternating', 'simultaneous' or the names of players in "
                f"order, got {updates!r}."
            )
        for names in updates:
            together = (names,) if isinstance(names, str) else tuple(names)
            self._check_names(together)
            if idle := sorted(set(together) - set(self._learners)):
                raise ValueError(f"updates= names {idle}, who have no utility and never move.")
            if not 0 < len(set(together)) == len(together):
                raise ValueError(
                    "Expected updates= to let some players move at once, each of them once, got "
                    f"{together}."
                )
            yield together

    def _rounds(self) -> Rounds:
        """The moves of this step, without those of players who rest."""
        awake = self._awake()
        rounds = [tuple(name for name in names if name in awake) for names in self._schedule]
        if not any(rounds):
            raise ValueError(
                f"Nobody moves: the players {sorted(self._frozen)} are frozen. Thaw one."
            )
        return [names for names in rounds if names]

    def _awake(self) -> set[str]:
        """The players that may move in this step."""
        return set(self._learners) - self._frozen

    def _unrecorded(self) -> set[str]:
        """The players whose utility in this step is unlike that in others, so that it runs as ever."""
        return set()

    def _watched(self) -> set[str]:
        """The players whose utility a step tells even where they don't move."""
        return set()

    def _check_names(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._by_name:
                raise ValueError(f"There is no player '{name}'; there are {list(self._by_name)}.")

    def _check_learner(self, name: str) -> None:
        if name not in self._learners:
            raise ValueError(
                f"There is no player '{name}' with a utility; there are {list(self._learners)}."
            )

    def _step_graphs(self) -> StepGraphs | None:
        if self._capture is None or not torch.cuda.is_available():
            return None
        is_awaited = self.nonfinite == "skip"
        return StepGraphs(self._capture, self._strategies, self._move, is_awaited)

    def _moved(
        self, call: Call, rounds: Rounds, watched: Collection[str], keep: Keep
    ) -> dict[str, Tensor]:
        """Lets players move in the fastest way there is.

        Returns:
            Their utilities before they did, and those of players who are watched while they rest.
        """
        capture, utilities = self._capture, None
        occasion = None if capture is None else capture.occasion(call)
        if capture is None or occasion is None:
            ascend: Ascend = partial(self._ascent, call)
        else:
            ascend = partial(self._recalled, capture, occasion, keep)
            if self._graphs is not None and not self._unrecorded():
                utilities = self._graphs.step(occasion, rounds)
        if utilities is None:
            utilities = self._move(rounds, ascend)
        return utilities | self._told(watched, ascend)

    def _move(self, rounds: Rounds, ascend: Ascend) -> dict[str, Tensor]:
        """Lets players move, at once and in turn; returns their utilities before they did."""
        utilities = {}
        for names in rounds:
            with self._shield.lowered():
                ascents = [self._common_ascent(rounds, name, ascend) for name in names]
            for name, way in zip(names, ascents, strict=True):
                self._strategies[name].move(way.parameters, way.gradients, way.found_inf)
                utilities[name] = way.utility
        return utilities

    def _common_ascent(self, rounds: Rounds, name: str, ascend: Ascend) -> Ascent:
        """Where a player goes, on average over the ranks of the process group."""
        place = (f"step {self.num_steps + 1}", rounds, name)
        return self._ranks.ascent(place, partial(ascend, name), self._strategies[name].parameters)

    def _told(self, watched: Collection[str], ascend: Ascend) -> dict[str, Tensor]:
        """The utilities of players that a step tells though they don't move."""
        if not watched:
            return {}

        def draw() -> dict[str, Tensor]:
            names = (name for name in self._learners if name in watched)
            return {name: ascend(name, standing).utility for name in names}

        return self._ranks.mean((f"step {self.num_steps + 1}", "utilities"), draw)

    def _ascent(self, call: Call, name: str, scoring: Scoring = ascent) -> Ascent:
        """Where a player goes from where it stands.

        Raises:
            NotFiniteError: It isn't to go there.
        """
        way = scoring(partial(self._score, name), call)
        if self.nonfinite == "skip" and not math.isfinite(way.utility.item()):
            raise NotFiniteError(
                f"The utility of the {name} or its gradient is not finite. Look for values that "
                "overflow, and for gradients at points where there are none."
            )
        return way

    def _recalled(
        self,
        capture: Capture,
        occasion: Occasion,
        keep: Keep,
        name: str,
        scoring: Scoring = ascent,
    ) -> Ascent:
        """Where a player goes from where it stands, by its recorded lesson if there is one."""
        reason = lesson = None
        try:
            if name not in self._unrecorded():
                lesson = capture.lesson(name, occasion, scoring)
            if lesson is not None:
                keep(lesson.buffers)
                recalled = lesson(occasion.tensors)
                if self._may_go(recalled):
                    return recalled
        except CannotRecord as error:
            reason = error
        way = self._ascent(occasion.call, name, scoring)
        if reason is not None:
            capture.refuse(name, occasion, scoring, reason)
        return way

    def _may_go(self, way: Ascent) -> bool:
        """Whether a utility is finite, or nobody waits for it."""
        nobody_waits = self.nonfinite == "raise" and not is_awaited(way.utility)
        return nobody_waits or math.isfinite(way.utility.item())

    def _utilities(self, call: Call, names: Collection[str]) -> dict[str, Tensor]:
        with torch.no_grad():
            return {
                name: self._score(name, call).utility for name in self._learners if name in names
            }

    def _score(self, name: str, call: Call) -> Score:
        """Scores a player, once more if that brought up parameters whose values were loaded.

        Raises:
            ValueError: The utility is not finite.
        """
        score = self._stage.score(name, call)
        if self._strategies[name].adopt(score.parameters):
            score = self._stage.score(name, call)
        score.check()
        return score

    def _loss(self, utilities: Mapping[str, Tensor]) -> GameLoss:
        in_order = {name: utilities[name] for name in self._learners if name in utilities}
        return loss_of(self._kind_of_loss, in_order, is_validation_enabled())

    def _set_loaded(self, call: Call, needed: Collection[str]) -> None:
        """Sets the loaded parameters that the programs touch in such a call, before its play."""
        strategies = self._strategies.values()
        if not any(strategy.is_waiting for strategy in strategies):
            return
        kind = tuple(layout(batch.call) for batch in batches(call))
        found, is_first = kind not in self._looked, not self._looked
        scores: Mapping[str, Score] = {}
        while found and any(strategy.is_waiting for strategy in strategies):
            scores = self._tried(self._stage.score, call, needed)
            for name, score in scores.items():
                self._strategies[name].check_waiting(score.parameters)
            found = any([self._strategies[n].adopt(s.parameters) for n, s in scores.items()])
        self._looked.add(kind)
        if is_first:
            for name, score in scores.items():
                if score.parameters:  # it learns from such batches
                    self._strategies[name].warn_of_waiting()

    def _check_learnable(self, call: Call, moving: set[str], watched: set[str]) -> None:
        """Checks once, on the side, that those who move can: all are tried before any moves.

        Those who rest are scored too, so that what belongs to them is known.
        """
        if moving <= self._learnable:
            return
        with self._ranks.rehearsing(self._strategies.values()):
            scores = self._tried(self._try, call, needed=moving | watched)
            tried = {name: scores[name] for name in scores if name in moving | watched}
            unused = {name: self._stage.owners.unused(name) for name in tried}
            waiting = {name for name in tried if tried[name].lacks_data and unused[name]}
            for name, score in tried.items():
                _check_learnable(name, score, [] if name in waiting else unused[name])
            if not any(score.parameters for score in tried.values()):
                raise ValueError(NOTHING_TO_LEARN)
        self._learnable |= moving - waiting

    def _tried(
        self, score: Callable[[str, Call], Score], call: Call, needed: Collection[str]
    ) -> dict[str, Score]:
        """Scores all players on the side; a batch need not do for those who aren't needed."""
        scores = {}
        with aside():
            for name in self._learners:
                with nullcontext() if name in needed else suppress(Exception):
                    scores[name] = score(name, call)
        return scores

    def _try(self, name: str, call: Call) -> Score:
        """Scores a player until a draw makes use of its parameters, as not every draw may do."""
        for _ in range(NUM_TRIES):
            score = self._score(name, call)
            if score.utility.requires_grad or not score.parameters:
                break
        return score


def _keep_nothing(buffers: Iterable[Tensor]) -> None:
    """Keeps no buffers, where nothing will be taken back."""


def _names(rounds: Iterable[tuple[str, ...]]) -> set[str]:
    return {name for names in rounds for name in names}


def _check_learnable(name: str, score: Score, unused: list[str]) -> None:
    if not score.unnamed:
        if unused and (score.parameters or score.utility.item() != 0):
            raise ValueError(
                f"The utility of the {name} doesn't depend on its parameters {unused}. Does it "
                "score the player's program, and is that run with gradients?"
            )
        return
    shapes = [tuple(leaf.shape) for leaf in score.unnamed]
    is_stored = all(leaf.is_contiguous() for leaf in score.unnamed)
    problem = (
        f"The {name}'s program uses parameters that no statement names, with shapes "
        f"{shapes}. {UNREGISTERED if is_stored else NOT_CONTIGUOUS}"
    )
    if unused or not score.parameters:
        raise ValueError(f"There is nothing to learn for the {name}. {problem}")
    warnings.warn(f"{problem} They are not trained.", stacklevel=stacklevel())


def _check_keys(owner: str, what: str, state: Any, keys: set[str]) -> None:
    if not isinstance(state, Mapping) or state.keys() != keys:
        got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"Expected a state of {owner} with the {what} {sorted(keys)}, got {got}.")
