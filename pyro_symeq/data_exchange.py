r"""Generative models that learn from data of their own and from each other's dreams.

Model :math:`p_i` has data :math:`\pi_i`, and trusts the others with weights
:math:`\alpha_{ij} \ge 0` that sum to 1 over :math:`j`:

.. math::
    u_i = \alpha_{ii}\, \mathbb{E}_{\pi_i} [\log p_i]
        + \sum_{j \ne i} \alpha_{ij}\, \mathbb{E}_{p_j} [\log p_i].

At the equilibrium of models that can represent it, :math:`p_i = \alpha_{ii} \pi_i + \sum_{j \ne i}
\alpha_{ij}\, p_j`. Neither data nor parameters leave a model, only its dreams do.
"""

import inspect
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_symeq import passes
from pyro_symeq.aside import aside
from pyro_symeq.binding import Program, equal, open_parameters
from pyro_symeq.draws import Draws
from pyro_symeq.game import Captures, Game, Nonfinite, Updates
from pyro_symeq.pair import Pair
from pyro_symeq.parallel import Group
from pyro_symeq.play import Play, Utility, refuse_reserved
from pyro_symeq.player import Player, by_player
from pyro_symeq.weights import Weights, full_weights

__all__ = ["data_exchange_game"]

Data = dict[str, Any]  # what a model takes, by the names of its arguments
Models = Mapping[str, Program | tuple[Program, Program]]


def data_exchange_game(
    models: Models,
    optim: PyroOptim | Mapping[str, PyroOptim],
    weights: Weights | None = None,
    *,
    updates: Updates = "alternating",
    capture: Captures = False,
    process_group: Group = None,
    nonfinite: Nonfinite = "raise",
) -> Game:
    r"""Makes a game of generative models that exchange dreams.

    A model takes its data by keyword, and observes each at the site of the argument's name:
    ``def model(x, y=None)`` with ``pyro.sample("x", ..., obs=x)``. Of others' dreams it is given
    the sites that it takes, so models may live on different variables. A pair ``(model, guide)``
    may have latents, and learns semi-supervised from what it is given, as by
    :class:`SymmetricEquilibrium`: the guide draws what is missing, and learns from dreams.

    ``game.step(a={"x": x_a}, b={"x": x_b})`` takes a batch for each model. Others dream as many
    rows for a model as its own batch has.

    Args:
        models: The programs by name, each a model or a pair of a model and a guide. A model gives
            a player of its name; a pair gives two, ``"name.decoder"`` and ``"name.encoder"``.
        optim: An optimiser for all players, or one for each model by name.
        weights: The weights :math:`\alpha_{ij}` by names, ``{"a": {"a": 0.5, "b": 0.5}, ...}``.
            Those left out of a row are 0; left out altogether, all are equal.
        updates: See :class:`Game`.
        capture: See :class:`Game`.
        process_group: See :class:`Game`.
        nonfinite: See :class:`Game`.

    Raises:
        TypeError: ``models`` are no programs, or ``optim`` is no optimiser.
        ValueError: ``optim`` or ``weights`` have other names, or weights don't sum to 1.

    References:
        Game-theoretic distributed learning of generative models for heterogeneous data collections
        (Schlesinger, Flach, 2025). https://arxiv.org/abs/2511.01740

    Example:
        >>> def model_of(name):
        ...     def model(x):
        ...         logit = pyro.param(name, torch.zeros(()))
        ...         with pyro.plate("rows", len(x)):
        ...             pyro.sample("x", dist.Bernoulli(logits=logit), obs=x)
        ...     return model
        >>> game = data_exchange_game(
        ...     {"a": model_of("a"), "b": model_of("b")},
        ...     pyro.optim.SGD({"lr": 0.1}),
        ...     {"a": {"a": 0.9, "b": 0.1}, "b": {"a": 0.5, "b": 0.5}},
        ... )
        >>> loss = game.step(a={"x": torch.ones(5)}, b={"x": torch.zeros(5)})
        >>> loss.utilities.keys()
        dict_keys(['a', 'b'])
    """
    exchange = _Exchange(members(models), weights)
    optims = by_player(optim, exchange.members)
    players = [
        Player(player, program, optims[name], partial(exchange.utility, name, score))
        for name, member in exchange.members.items()
        for player, program, score in member.players()
    ]
    return Game(
        players,
        updates=updates,
        capture=capture,
        process_group=process_group,
        nonfinite=nonfinite,
    )


class Member:
    """A model, with a guide or without, and its players."""

    def __init__(self, name: str, model: Program, guide: Program | None) -> None:
        self.name = name
        self.model = model
        self.guide = guide
        self.dreamer = name if guide is None else f"{name}.decoder"
        self.arguments = _keywords(model)
        self._is_checked = False

    def players(self) -> Iterator[tuple[str, Program, Utility]]:
        """The name, the program and the utility at given data of each player."""
        if self.guide is None:
            yield self.name, self.model, self._log_prob
        else:
            names = (self.dreamer, f"{self.name}.encoder")
            pair = Pair(self.model, self.guide, None, True, Draws(1, 1, False, None), names)
            yield names[0], self.model, pair.decoder
            yield names[1], self.guide, pair.encoder

    def _log_prob(self, play: Play, /, **data: Any) -> Tensor:
        return play.log_prob(self.name, **data)

    def dream(self, play: Play, data: Data, num_rows: int) -> Data:
        """Dreams so many rows of the variables that the model takes."""
        like = {name: with_rows(value, num_rows) for name, value in data.items()}
        drawn = play.sample(self.dreamer, given=None, **like)
        variables = data.keys() | (self.arguments or {}).keys()
        dream = {name: x for name, x in drawn.items() if name in variables}
        if others := [n for n, x in data.items() if x is not None and n not in dream]:
            raise ValueError(
                f"The model '{self.name}' is given {others}, and draws no sites of these names, so"
                " its dreams don't tell them to others. Name arguments and sites alike; fix with "
                "functools.partial what is no variable."
            )
        if not self._is_checked:
            self._check_observed(like, dream)
            self._is_checked = True
        return dream

    def seen(self, other: str, dream: Data, own: Data) -> Data:
        """What the model is given of another's dream, in the form of its own data.

        Raises:
            ValueError: It takes nothing of it, or needs more.
        """
        takes = self.arguments
        seen = {n: shaped(x, own.get(n)) for n, x in dream.items() if takes is None or n in takes}
        needs = needed(takes or {})
        if not seen or not seen.keys() >= needs:
            raise ValueError(
                f"The model '{self.name}' takes none of the variables {sorted(dream)} that "
                f"'{other}' dreams, or needs others: {sorted(needs)}. Name arguments and sites "
                "alike in both models, give optional ones the default None, or set the weight to "
                "0."
            )
        return seen

    def check_batch(self, batch: Data) -> None:
        """Checks that the model takes a batch.

        Raises:
            ValueError: It takes other arguments, or one is called like an option.
        """
        refuse_reserved(batch)
        takes = self.arguments
        if takes is not None and not takes.keys() >= batch.keys() >= needed(takes):
            raise ValueError(
                f"Expected the batch of model '{self.name}' to hold {sorted(needed(takes))} of "
                f"{sorted(takes)}, which it takes, got {sorted(batch)}."
            )

    def num_rows(self, batch: Data) -> int:
        """The number of rows of a batch.

        Raises:
            ValueError: Its tensors have different numbers of rows, or none.
        """
        rows = {len(x) for x in batch.values() if isinstance(x, Tensor) and x.dim() > 0}
        if len(rows) != 1 or 0 in rows:
            raise ValueError(
                f"Expected all tensors of the batch of model '{self.name}' to have as many rows, "
                f"at least one, got {sorted(rows)}. Others dream as many for it."
            )
        return rows.pop()

    def _check_observed(self, like: Data, dream: Data) -> None:
        """Checks on the side that a dream may stand for data.

        Raises:
            ValueError: The model, given its dream, observes something else.
        """
        with aside():
            call = (), {name: shaped(x, like.get(name)) for name, x in dream.items()}
            observed = passes.dream(self.model, call).observed
        for name, x in dream.items():
            if not (name in observed and equal(observed[name].value, x)):
                raise ValueError(
                    f"When the model '{self.name}' is called with its dream of site '{name}' as "
                    f"the argument '{name}', it doesn't observe that dream. Let it observe the "
                    "argument itself (obs=)."
                )


class _Exchange:
    """The utilities of models that exchange dreams."""

    def __init__(self, members: dict[str, Member], weights: Weights | None) -> None:
        self.members = members
        default = 1 / len(members) if weights is None else 0.0
        self.weights = full_weights(weights, list(members), default)
        for name, row in self.weights.items():
            check_shares(name, row)

    def utility(
        self, name: str, score: Utility, play: Play, /, *args: Any, **data: Data
    ) -> Tensor:
        """The weighted sum of a player's utilities on its own data and on others' dreams."""
        self._check(args, data)
        terms = []
        for other, weight in self.weights[name].items():
            if weight > 0:
                seen = self._seen(name, other, play, data)
                terms.append(weight * score(play, **seen))
        return torch.stack(terms).sum()

    def _seen(self, name: str, other: str, play: Play, data: Mapping[str, Data]) -> Data:
        """What a model is given of a source: its own data, or a dream."""
        if other == name:
            return data[name]
        learner, own = self.members[name], data[name]
        dream = self.members[other].dream(play, data[other], learner.num_rows(own))
        return learner.seen(other, dream, own)

    def _check(self, args: tuple[Any, ...], data: Mapping[str, Any]) -> None:
        example = ", ".join(f"{name}={{'x': x_{name}}}" for name in self.members)
        if args or data.keys() != self.members.keys():
            raise ValueError(
                f"Expected a batch for each of the models {list(self.members)}, got {list(data)} "
                f"and {len(args)} without a name. Call game.step({example})."
            )
        for name, batch in data.items():
            if not isinstance(batch, Mapping):
                raise TypeError(
                    f"Expected the batch of model '{name}' to be a dict {{argument: value}}, got "
                    f"{type(batch).__name__}. Call game.step({example})."
                )
            self.members[name].check_batch(dict(batch))


def members(models: Any) -> dict[str, Member]:
    """The models by name.

    Raises:
        TypeError: These are no programs.
    """
    if not isinstance(models, Mapping) or not models:
        raise TypeError(
            "Expected models to be a dict {name: model} or {name: (model, guide)}, got "
            f"{models!r}."
        )
    by_name = {}
    for name, programs in models.items():
        pair = programs if isinstance(programs, tuple) else (programs, None)
        if len(pair) != 2 or not callable(pair[0]) or not (pair[1] is None or callable(pair[1])):
            raise TypeError(
                f"Expected '{name}' to be a model or a pair (model, guide), got {programs!r}."
            )
        by_name[name] = Member(name, *pair)
    return by_name


def check_shares(name: str, row: Mapping[str, float]) -> None:
    """Checks the weights of a model.

    Raises:
        ValueError: They don't sum to 1.
    """
    if not math.isclose(sum(row.values()), 1.0, abs_tol=1e-6):
        raise ValueError(
            f"Expected the weights of model '{name}' to sum to 1, got {row}. They are the shares "
            "of its own data and of the dreams of others."
        )


def _keywords(program: Program) -> dict[str, bool] | None:
    """What a program takes by keyword, and whether it needs it; ``None`` if it takes all."""
    parameters = open_parameters(program)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: p.default is p.empty for p in parameters if p.kind in named}


def needed(arguments: Mapping[str, bool]) -> set[str]:
    """The names of the arguments without a default."""
    return {name for name, is_needed in arguments.items() if is_needed}


def with_rows(value: Any, num_rows: int) -> Any:
    """Repeats or leaves out rows of a tensor, in whose place dreams will be."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return value[torch.arange(num_rows, device=value.device) % len(value)]


def shaped(dreamed: Tensor, like: Any) -> Tensor:
    """A dreamed value in the shape and type of the argument that it stands for."""
    if isinstance(like, Tensor) and like.numel() == dreamed.numel():
        return dreamed.reshape(like.shape).to(like.dtype)
    return dreamed
