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
from torch import Tensor, nn

from pyro_symeq.binding import Program
from pyro_symeq.draws import Draws
from pyro_symeq.game import Game, Player, Updates, optim_of
from pyro_symeq.pair import Pair
from pyro_symeq.play import Play, Utility
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
) -> Game:
    r"""Makes a game of generative models that exchange dreams.

    A model takes its data by keyword, and observes each at the site of the argument's name:
    ``def model(x, y=None)`` with ``pyro.sample("x", ..., obs=x)``. Of others' dreams it is given
    the sites that it takes, so models may live on different variables. A pair ``(model, guide)`` may
    have latents, and learns semi-supervised from what it is given, as by
    :class:`SymmetricEquilibrium`: the guide draws what is missing, and learns from dreams.

    ``game.step(a={"x": x_a}, b={"x": x_b})`` takes a batch for each model. Others dream as many
    rows for a model as its own batch has.

    Args:
        models: The programs by name, each a model or a pair of a model and a guide. A model gives a
            player of its name; a pair gives two, ``"name.decoder"`` and ``"name.encoder"``.
        optim: An optimiser for all players, or one for each model by name.
        weights: The weights :math:`\alpha_{ij}` by names, ``{"a": {"a": 0.5, "b": 0.5}, ...}``.
            Those left out of a row are 0; left out altogether, all are equal.
        updates: See :class:`Game`.

    Raises:
        ValueError: Weights have other names, or don't sum to 1.

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
    exchange = _Exchange([_Member(name, programs) for name, programs in models.items()], weights)
    players = [
        Player(player, program, optim_of(optim, name), partial(exchange.utility, name, score))
        for name, member in exchange.members.items()
        for player, program, score in member.players()
    ]
    return Game(players, updates=updates)


class _Member:
    """A model, with a guide or without, and its players."""

    def __init__(self, name: str, programs: Program | tuple[Program, Program]) -> None:
        self.name = name
        self.model: Program
        self.guide: Program | None
        self.model, self.guide = programs if isinstance(programs, tuple) else (programs, None)
        self.dreamer = name if self.guide is None else f"{name}.decoder"
        self._takes = _keywords(self.model)

    def players(self) -> Iterator[tuple[str, Program, Utility]]:
        """The name, the program and the utility at given data of each player."""
        if self.guide is None:
            yield self.name, self.model, self._log_prob
        else:
            names = (self.dreamer, f"{self.name}.encoder")
            pair = Pair(self.model, self.guide, None, True, Draws(1, 1, False, None), names)
            yield names[0], self.model, pair.decoder
            yield names[1], self.guide, pair.encoder

    def _log_prob(self, play: Play, **data: Any) -> Tensor:
        return play.log_prob(self.name, **data)

    def dream(self, play: Play, data: Data, num_rows: int) -> Data:
        """Dreams of this model, with so many rows: what it takes, as far as it draws it."""
        like = {name: _with_rows(value, num_rows) for name, value in data.items()}
        drawn = play.sample(self.dreamer, **like)
        return {name: _shaped(x, like.get(name)) for name, x in drawn.items() if self.takes(name)}

    def takes(self, name: str) -> bool:
        """Whether the model takes an argument of that name."""
        return self._takes is None or name in self._takes


class _Exchange:
    """The utilities of models that exchange dreams."""

    def __init__(self, members: list[_Member], weights: Weights | None) -> None:
        self.members = {member.name: member for member in members}
        names = list(self.members)
        default = 0.0 if weights else 1 / len(names)
        self.weights = full_weights(weights, names, default)
        for name, row in self.weights.items():
            if not math.isclose(sum(row.values()), 1.0, abs_tol=1e-6):
                raise ValueError(
                    f"Expected the weights of model '{name}' to sum to 1, got {row}. They are the "
                    "shares of its own data and of the dreams of others."
                )

    def utility(self, name: str, score: Utility, play: Play, *args: Any, **data: Data) -> Tensor:
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
        dream = self.members[other].dream(play, data[other], _num_rows(data[name], name))
        seen = {key: value for key, value in dream.items() if self.members[name].takes(key)}
        if not seen:
            raise ValueError(
                f"The model '{name}' takes none of the variables {sorted(dream)} that '{other}' "
                "dreams. Name arguments and sites alike in both models, or set its weight to 0."
            )
        return seen

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


def _keywords(program: Program) -> frozenset[str] | None:
    """The names of the arguments that a program takes by keyword; ``None`` if it takes all."""
    function = program.forward if isinstance(program, nn.Module) else program
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(p.name for p in parameters if p.kind in named)


def _num_rows(data: Data, name: str) -> int:
    for value in data.values():
        if isinstance(value, Tensor) and value.dim() > 0:
            return len(value)
    raise ValueError(
        f"The batch of model '{name}' holds no tensor whose length tells how many rows others are "
        "to dream for it."
    )


def _with_rows(value: Any, num_rows: int) -> Any:
    """Repeats or leaves out rows of a tensor, in whose place dreams will be."""
    if not isinstance(value, Tensor) or value.dim() == 0 or len(value) == num_rows:
        return value
    return value[torch.arange(num_rows, device=value.device) % len(value)]


def _shaped(dreamed: Tensor, like: Any) -> Tensor:
    """A dreamed value in the shape and type of the argument that it stands for."""
    if isinstance(like, Tensor) and like.numel() == dreamed.numel():
        return dreamed.reshape(like.shape).to(like.dtype)
    return dreamed
