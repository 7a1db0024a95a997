r"""The two verbs that utilities are written with, and the score of a player.

A utility is a function of a :class:`Play` and of the batch. It draws from programs and scores
others at the draws, as in the decoder's

.. math::
    L_p(\theta, \varphi)
        = \mathbb{E}_{\pi(x)} \mathbb{E}_{q_\varphi(z \mid x)} [\log p_\theta(x, z)],

which is ``play.log_prob("decoder", x, given=play.sample("encoder", x))``.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro.distributions import Empirical
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch.distributions import Categorical

from pyro_symeq import passes
from pyro_symeq.batch import batches
from pyro_symeq.binding import Call, Program, leaves, put
from pyro_symeq.nonfinite import NotFiniteError
from pyro_symeq.ownership import Owners, Parameters
from pyro_symeq.tracing import Record, base, tensors

__all__ = ["Play"]

Masks = dict[str, Tensor]
Utility = Callable[..., Tensor]  # of a Play, and of what the step is given


@dataclass(frozen=True)
class Scored:
    """A run of a player's program, and where it is scored.

    Args:
        trace: The trace.
        names: The random variables and factors that count.
        masks: Where some of them count, if not everywhere.
    """

    trace: Record
    names: list[str]
    masks: Masks


class Play:
    """What a utility has in its hands: the programs of all players, to draw from and to score.

    Args:
        programs: The programs by the names of their players.
        owners: Who owns which parameter.
        learner: Whose utility is drawn; scores of others are numbers to it.
    """

    def __init__(
        self, programs: Mapping[str, Program], owners: Owners, learner: str | None = None
    ) -> None:
        self.programs = programs
        self.owners = owners
        self.learner = learner
        self.log_probs: list[tuple[str, str, Tensor]] = []  # player, site, nats
        self.touched: dict[str, Parameters] = {name: {} for name in programs}
        self.has_data: dict[str, bool] = {}  # by player, where that is told: in any batch

    def sample(
        self, player: str, /, *args: Any, given: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Runs a player's program and draws its random variables, without a gradient.

        What the program observes (``obs=``) is drawn too: this is the player's own idea of the
        data. To fix a site, give its value.

        Args:
            player: The name of the player.
            args: The arguments of its program.
            given: Values for some of its sites, which broadcast to the shapes of the sites; and
                the rows of plates.
            kwargs: The keyword arguments of the program.

        Returns:
            The values of the random variables of the program by site name, but of auxiliary ones
            (``infer={"is_auxiliary": True}``); and the rows of subsampled plates by plate name.

        Raises:
            TypeError: A value is no tensor or number.
            ValueError: There is no such player or site, or a value does not fit its site.
        """
        values = _tensors(given)
        with torch.no_grad():
            fix = passes.fix(values, partial(_broadcast, player))
            trace = passes.sample(self._program(player), (args, kwargs), fix)
        rows = _check_names(player, trace, fix)
        self.owners.touch(player, trace.parameters)
        return passes.drawn(trace) | rows

    def log_prob(
        self, player: str, /, *args: Any, given: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> Tensor:
        r"""Scores a player's program at values of its random variables.

        Its gradient reaches that player's own parameters, and nothing else: to other players it is
        a number, and no gradient passes through arguments and values. Factors count; sites without
        a density (:class:`Implicit`) and auxiliary ones don't.

        Args:
            player: The name of the player.
            args: The arguments of its program.
            given: The values of its sites, in their shapes, except of those that it observes
                (``obs=``); and the rows of subsampled plates, which :meth:`sample` tells.
            kwargs: The keyword arguments of the program.

        Returns:
            A scalar, summed over the batch, scaled and masked as Pyro does (nats).

        Raises:
            TypeError: A value is no tensor or number.
            ValueError: There is no such player or site, a site has no value, or a value does not
                fit its site.
        """
        values = _tensors(given)
        fix = passes.fix(values, partial(_whole, player))
        trace = passes.observe(self._program(player), _detached((args, kwargs)), fix)
        _check_names(player, trace, fix)
        if unknown := passes.unobserved(trace, values):
            raise ValueError(
                f"The program of player '{player}' samples {unknown}, for which log_prob has no "
                "value. Give one with given=, or observe these sites (obs=)."
            )
        names = [n for n, site in passes.counted_sites(trace) if not passes.is_implicit(site)]
        if not (names := names + passes.factors(trace)):
            raise ValueError(
                f"The program of player '{player}' samples no site with a density, so it has no "
                "log-probability."
            )
        log_prob = self.score(player, Scored(trace, names, {}))
        return log_prob if self.learner in (None, player) else log_prob.detach()

    def score(self, player: str, *runs: Scored) -> Tensor:
        """Sums the log-probabilities (nats) of runs of a player's program; 0 if there are none.

        Args:
            player: The name of the player.
            runs: The runs, and where they are scored.
        """
        log_probs = {
            (i, name): log_prob
            for i, run in enumerate(runs)
            for name, log_prob in passes.log_probs(run.trace, run.names, run.masks).items()
        }
        self.log_probs += [(player, name, value) for (_, name), value in log_probs.items()]
        for run in runs:
            self.touched[player] |= run.trace.parameters
        self.owners.touch(player, self.touched[player])
        first, *others = log_probs.values() or [_no_score(runs[0].trace)]
        return sum(others, first)

    def aside(self) -> "Play":
        """A play of the same programs, of which nothing counts."""
        return Play(self.programs, self.owners)

    def check_finite(self, player: str, utility: Tensor) -> None:
        """Checks a player's utility.

        Raises:
            ValueError: It is not finite.
        """
        if not math.isfinite(utility.item()):
            sites = {
                name if scored == player else f"{name} ({scored})": value.item()
                for scored, name, value in self.log_probs
                if not torch.isfinite(value)
            }
            raise NotFiniteError(
                f"Expected a finite utility of the {player}, got {utility.item()} from these "
                f"log-probabilities (nats): {sites}. Look for NaN in the data, for values outside "
                "the support of these sites, and for a learning rate that is too large."
            )

    def _program(self, player: str) -> Program:
        if player not in self.programs:
            raise ValueError(f"There is no player '{player}'; there are {list(self.programs)}.")
        return self.programs[player]


def _no_score(trace: Record) -> Tensor:
    """A log-probability of nothing: of latents alone, whose law has no density."""
    like: Tensor = next(iter(trace.variables.values()))["value"]
    return like.new_zeros((), dtype=torch.get_default_dtype())


def _check_names(player: str, trace: Record, fix: passes.fix) -> dict[str, Tensor]:
    """Checks what was given for a run, and returns the rows that its plates chose themselves."""
    sites = list(trace.variables)
    if unknown := fix.values.keys() - {*sites} - passes.subsamples(trace).keys():
        raise ValueError(
            f"given= holds values for {sorted(unknown)}; the program of player '{player}' "
            f"samples {sorted(sites)}."
        )
    rows = {n: chosen for n, chosen in passes.chosen_rows(trace).items() if n in fix.choosing}
    if rows and fix.values:
        raise ValueError(
            f"The program of player '{player}' chooses rows in the plates {sorted(rows)}, and "
            "the values that are given belong to other rows. Give the rows too, as play.sample "
            "returned them: given={plate: rows}."
        )
    return rows


def _broadcast(player: str, name: str, fn: Any, value: Tensor) -> Tensor:
    """A value for draws, in the shape of its site.

    Raises:
        ValueError: It does not fit.
    """
    if value.dim() == 0:  # a number, which has no place of its own
        value = value.to(next((x.device for x in tensors(fn)), value.device))
    value = _as_drawn(fn, value)
    try:
        value = value.expand(fn.shape())
    except RuntimeError as error:
        raise _misfit(player, name, "that broadcasts to", fn, value) from error
    if is_validation_enabled() and not passes.in_support(fn, value):
        raise ValueError(
            f"The value given for site '{name}' of player '{player}' lies outside its support "
            f"{fn.support}."
        )
    return value


def _as_drawn(fn: Any, value: Tensor) -> Tensor:
    """Integers as numbers of the type that a law draws, as far as that is known."""
    law = base(fn)
    if isinstance(law, Categorical):
        return value.long() if value.dtype == torch.bool else value
    if value.is_floating_point() or isinstance(law, Empirical):
        return value
    if type(law).__module__.partition(".")[0] not in ("torch", "pyro"):
        return value
    like = next((x for x in tensors(law) if x.is_floating_point()), value)
    return value.to(like.dtype)


def _whole(player: str, name: str, fn: Any, value: Tensor) -> Tensor:
    """A value for a score: a number, or one in the shape of its site.

    One row for all rows would be scored as if each row had drawn it.

    Raises:
        ValueError: It does not fit.
    """
    if value.dim() > 0 and value.shape != fn.shape():
        raise _misfit(player, name, "of", fn, value)
    return _broadcast(player, name, fn, value)


def _misfit(player: str, name: str, how: str, fn: Any, value: Tensor) -> ValueError:
    return ValueError(
        f"Expected a value for site '{name}' of player '{player}' {how} shape "
        f"{tuple(fn.shape())}, got {tuple(value.shape)}."
    )


def refuse_reserved(names: Iterable[str]) -> None:
    """Checks names under which programs are to be given values.

    Raises:
        ValueError: One is an option of the verbs.
    """
    if "given" in names:
        raise ValueError(
            "The name 'given' is taken by play.sample and play.log_prob. Give the variable "
            "another."
        )


def _detached(call: Call) -> Call:
    for path, leaf in leaves(call):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            call = put(call, path, leaf.detach())
    return call


def _tensors(given: Any) -> dict[str, Tensor]:
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"Expected given= to be a dict, got {type(given).__name__}.")
    for name, value in (given or {}).items():
        if not isinstance(value, (Tensor, int, float)):
            raise TypeError(
                f"Expected a tensor or a number for site '{name}' in given=, got "
                f"{type(value).__name__}."
            )
    return {name: torch.as_tensor(value) for name, value in (given or {}).items()}


@dataclass(frozen=True)
class Ascent:
    """Where a player goes from where it stands.

    Args:
        utility: The utility, a scalar.
        parameters: The player's parameters (leaves), by name.
        gradients: The gradient of the negative utility in each of them.
    """

    utility: Tensor
    parameters: Parameters
    gradients: Sequence[Tensor | None]

    @property
    def found_inf(self) -> Tensor | None:
        """1 if the utility is not finite, where the host doesn't know before the player moves."""
        return None if is_awaited(self.utility) else (~torch.isfinite(self.utility)).float()


@dataclass(frozen=True)
class Score:
    """A player's utility at one draw.

    Args:
        utility: The utility, a scalar with a graph to the player's program.
        parameters: The player's parameters (leaves), by name.
        unnamed: Parameters of the player that its program uses without a statement.
        check_finite: Raises a ``ValueError`` if the utility is not finite, for which the host waits.
        lacks_data: Whether its batches hold latents alone, so that parts of its program don't count.
        are_gradients_finite: Whether they are to be; the utility is NaN where one is not.
    """

    utility: Tensor
    parameters: Parameters
    unnamed: list[Tensor]
    check_finite: Callable[[], None]
    lacks_data: bool = False
    are_gradients_finite: bool = False

    def check(self) -> None:
        """Checks that the utility is finite, unless the host would have to wait for a device.

        Raises:
            ValueError: It is not; with Pyro's validation on, also on a device.
        """
        if is_awaited(self.utility):
            self.check_finite()

    def ascent(self) -> Ascent:
        """The utility with its gradient in the player's parameters."""
        gradients = self.gradients(self.parameters.values())
        utility = self.utility.detach()
        if self.are_gradients_finite:
            utility = sum((_nothing(x).to(utility) for x in gradients if x is not None), utility)
        return Ascent(utility, self.parameters, gradients)

    def gradients(self, parameters: Iterable[Tensor]) -> list[Tensor | None]:
        """The gradient of the negative utility in some of the player's parameters.

        There is none in those that ``requires_grad_(False)`` has put to rest.
        """
        leaves = list(parameters)
        moving = [leaf for leaf in leaves if leaf.requires_grad]
        if not (moving and self.utility.requires_grad):
            return [None] * len(leaves)
        gradients = torch.autograd.grad(-self.utility, moving, allow_unused=True)
        found = dict(zip(moving, gradients, strict=True))
        return [found.get(leaf) for leaf in leaves]


Scoring = Callable[[Callable[[Call], Score], Call], Ascent]  # of what scores a player on a step


def ascent(score: Callable[[Call], Score], call: Call) -> Ascent:
    """Where a player goes by all batches of a step.

    They are scored and differentiated one after another, so that one graph at a time takes memory.

    Args:
        score: Scores the player on a part of the step.
        call: What the step was given.
    """
    first, *others = (score(((batch,), {})).ascent() for batch in batches(call))
    if not others:
        return first
    parameters: Parameters = {}
    gradients: dict[Tensor, Tensor | None] = {}
    for part in (first, *others):
        parameters |= part.parameters
        for leaf, gradient in zip(part.parameters.values(), part.gradients, strict=True):
            known = gradients.get(leaf)
            gradients[leaf] = gradient if known is None else _plus(known, gradient)
    utility = sum((part.utility for part in others), first.utility)
    return Ascent(utility, parameters, [gradients[leaf] for leaf in parameters.values()])


def standing(score: Callable[[Call], Score], call: Call) -> Ascent:
    """The utility of a player who stays where it is.

    Args:
        score: Scores the player on a step.
        call: What the step was given.
    """
    with torch.no_grad():
        return Ascent(score(call).utility, {}, [])


def _nothing(gradient: Tensor) -> Tensor:
    """0, or NaN if a gradient is not finite."""
    return (0 * gradient).sum()


def _plus(known: Tensor, gradient: Tensor | None) -> Tensor:
    return known if gradient is None else known + gradient


def is_awaited(utility: Tensor) -> bool:
    """Whether the host looks at a utility before anybody moves, even if it has to wait."""
    return is_validation_enabled() or utility.device.type == "cpu"


class Stage:
    """Where games are played: all programs and utilities, and who owns which parameter.

    Args:
        programs: The programs, by the names of the players.
        utilities: The utilities of those players that have one.
        claims: The parameters that some players claim as their own.
        are_gradients_finite: See :class:`Score`.
    """

    def __init__(
        self,
        programs: Mapping[str, Program],
        utilities: Mapping[str, Utility],
        claims: Mapping[str, Parameters] | None = None,
        are_gradients_finite: bool = False,
    ) -> None:
        self.programs = programs
        self.utilities = utilities
        self.owners = Owners(list(programs), claims or {})
        self.are_gradients_finite = are_gradients_finite

    def play(self, learner: str | None = None) -> Play:
        """Begins a play, for the utility of a player."""
        return Play(self.programs, self.owners, learner)

    def score(self, player: str, call: Call) -> Score:
        """Draws a player's utility: the weighted sum over the batches of a step.

        Raises:
            TypeError: The utility is no tensor.
            ValueError: It is no scalar.
        """
        play = self.play(player)
        utility = torch.zeros(())
        for i, batch in enumerate(batches(call)):
            args, kwargs = batch.call
            part = self.utilities[player](play, *args, **kwargs)
            _check_scalar(player, part)
            part = part if batch.weight == 1 else batch.weight * part
            utility = utility + part if i else part
        sites = tuple(name for _, name, _ in play.log_probs)
        unnamed = self.owners.unnamed(player, utility, play.touched.values(), sites)
        owned = self.owners.owned(player, play.touched[player])
        check_finite = partial(play.check_finite, player, utility)
        lacks_data = not play.has_data.get(player, True)
        return Score(utility, owned, unnamed, check_finite, lacks_data, self.are_gradients_finite)


def _check_scalar(player: str, utility: Any) -> None:
    if not isinstance(utility, Tensor):
        raise TypeError(
            f"Expected the utility of player '{player}' to return a scalar tensor, got "
            f"{type(utility).__name__}. Return what play.log_prob gives, or a sum of such."
        )
    if utility.dim() > 0:
        raise ValueError(
            f"Expected the utility of player '{player}' to return a scalar, got shape "
            f"{tuple(utility.shape)}. Sum over the batch."
        )
