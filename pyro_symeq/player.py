"""Players of a game: programs that learn, each from what it maximises."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pyro.optim import PyroOptim
from torch import Tensor, nn

from pyro_symeq.binding import Program
from pyro_symeq.ownership import Parameters
from pyro_symeq.play import Utility

__all__ = ["Player"]

Own = nn.Module | Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class Player:
    r"""A program with its parameters, and what it maximises.

    Args:
        name: The name, by which utilities and schedules call it.
        program: An ordinary Pyro program.
        optim: The optimiser that moves its parameters; players may share one.
        utility: A function ``utility(play, *args, **kwargs)`` of a :class:`Play` and of what
            :meth:`Game.step` is given. It returns a scalar tensor (nats). A player without utility
            and optimiser never moves, and others may draw from it: a fixed prior, say.
        parameters: A module whose parameters are the player's own whoever touches them, or named
            parameters (``net.named_parameters()``). Besides, a player owns what its program
            touches, nobody claims, and no player before it does.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: There is an optimiser and no utility, or the reverse.

    Example:
        >>> def coin():
        ...     p = pyro.param("p", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
        ...     with pyro.plate("throws", 8):
        ...         pyro.sample("heads", dist.Bernoulli(p))
        >>> def likelihood(play, heads):
        ...     return play.log_prob("coin", given={"heads": heads})
        >>> Player("coin", coin, pyro.optim.Adam({"lr": 0.1}), likelihood)
        Player('coin')
    """

    name: str
    program: Program
    optim: PyroOptim | None = None
    utility: Utility | None = None
    parameters: Own | None = None

    def __post_init__(self) -> None:
        if not callable(self.program):
            raise TypeError(
                f"Expected the program of player '{self.name}' to be a Pyro program, got "
                f"{type(self.program).__name__}."
            )
        if not (self.optim is None or isinstance(self.optim, PyroOptim)):
            raise TypeError(
                f"Expected the optimiser of player '{self.name}' to be a pyro.optim.PyroOptim, "
                f"got {type(self.optim).__name__}."
            )
        if not isinstance(self.parameters, (nn.Module, type(None))):
            object.__setattr__(self, "parameters", list(self.parameters))
        if not (self.utility is None or callable(self.utility)):
            raise TypeError(
                f"Expected the utility of player '{self.name}' to be a function of play and the "
                f"batch, got {type(self.utility).__name__}."
            )
        if (self.optim is None) != (self.utility is None):
            lacking = "optimiser" if self.optim is None else "utility"
            raise ValueError(
                f"Expected player '{self.name}' to have both an optimiser and a utility, or "
                f"neither if it is never to move; it has no {lacking}."
            )

    def __repr__(self) -> str:
        return f"Player({self.name!r})"

    def claims(self) -> Parameters | None:
        """The parameters that are its own whatever programs touch, if it was told.

        Raises:
            TypeError: What it was told are no named parameters.
        """
        named = self.parameters
        if named is None:
            return None
        pairs = list(named.named_parameters() if isinstance(named, nn.Module) else named)
        if not all(isinstance(x, tuple) and isinstance(x[-1], Tensor) for x in pairs):
            raise TypeError(
                f"Expected the parameters of player '{self.name}' to be a module or named "
                f"parameters, got {type(pairs[0]).__name__} among them. Pass the network, or "
                "network.named_parameters()."
            )
        own = {name: leaf for name, leaf in pairs if leaf.requires_grad}
        if not own or len(own) < sum(leaf.requires_grad for _, leaf in pairs):
            raise ValueError(
                f"Expected the parameters of player '{self.name}' to be some that can be trained, "
                f"each with its own name, got {[name for name, _ in pairs]}."
            )
        return own


def by_name(players: Iterable[Player]) -> dict[str, Player]:
    """Players by their names.

    Raises:
        TypeError: They are no players.
        ValueError: Two have the same name.
    """
    found: dict[str, Player] = {}
    for player in players if isinstance(players, Iterable) else [None]:
        if not isinstance(player, Player):
            raise TypeError(f"Expected players to be of class Player, in a list, got {players!r}.")
        if player.name in found:
            raise ValueError(f"Two players have the name '{player.name}'. Give each its own.")
        found[player.name] = player
    return found


def claims_of(players: Iterable[Player]) -> dict[str, Parameters]:
    """The parameters of those players that claim some.

    Raises:
        TypeError: What a player claims are no named parameters.
        ValueError: They can't be trained, or two players claim one of them.
    """
    claims = {player.name: own for player in players if (own := player.claims()) is not None}
    owner: dict[Tensor, str] = {}
    for name, own in claims.items():
        for parameter, leaf in own.items():
            if owner.setdefault(leaf, name) != name:
                raise ValueError(
                    f"The players '{owner[leaf]}' and '{name}' both claim the parameter "
                    f"'{parameter}'. Leave it to one of them."
                )
    return claims


def by_player(
    optim: PyroOptim | Mapping[Any, PyroOptim], names: Iterable[str]
) -> dict[str, PyroOptim]:
    """The optimiser of each player, where there is one for all or one for each.

    Raises:
        TypeError: It is neither.
        ValueError: The names are not those of the players.
    """
    names = list(names)
    if isinstance(optim, PyroOptim):
        return dict.fromkeys(names, optim)
    if not isinstance(optim, Mapping):
        raise TypeError(
            "Expected optim to be a pyro.optim.PyroOptim or a dict of them by name, got "
            f"{type(optim).__name__}."
        )
    if optim.keys() != set(names):
        raise ValueError(
            f"Expected optim= to have an optimiser for each of {names}, got some for "
            f"{list(optim)}."
        )
    return dict(optim)
