"""Who owns which parameter, by tensor and whatever its name."""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from pyro_symeq.callers import stacklevel

Parameters = dict[str, Tensor]

NOTHING_TO_LEARN = (
    "There is nothing to learn: no program touches a parameter. Declare parameters with "
    "pyro.param, or register networks with pyro.module or as attributes of a PyroModule."
)


class Owners:
    """Keeps which player owns which parameter.

    A player owns what it claims. A parameter that nobody claims belongs to the first of the
    players whose program touches it, in the order in which they are named. If that one names it
    without using it, and another one uses it, nobody trains it: that is told, and refused where
    the other one has nothing of its own.

    Args:
        players: The names of the players.
        claims: The parameters that some of them claim.
    """

    def __init__(self, players: Sequence[str], claims: Mapping[str, Parameters]) -> None:
        self.claims = claims
        self._rank = {name: rank for rank, name in enumerate(players)}
        self._owner = {leaf: name for name, own in claims.items() for leaf in own.values()}
        self._claimed = frozenset(self._owner)
        self.num_changes = 0  # of owners
        self._named: set[Tensor] = set()  # when graphs were searched
        self._uses_unnamed: dict[tuple[str, ...], bool] = {}
        self._names = {leaf: name for own in claims.values() for name, leaf in own.items()}
        self._used: defaultdict[str, set[Tensor]] = defaultdict(set)  # what a utility depends on
        self._told: set[str] = set()

    def touch(self, player: str, parameters: Parameters) -> None:
        """Takes note of parameters that the statements of a player's program name."""
        for name, leaf in parameters.items():
            self._names.setdefault(leaf, name)
            self._touch(player, leaf)

    def _touch(self, player: str, leaf: Tensor) -> None:
        owner = self._owner.setdefault(leaf, player)
        if self._rank[player] < self._rank[owner] and leaf not in self._claimed:
            self._owner[leaf] = player
            self.num_changes += 1

    def unused(self, player: str) -> list[str]:
        """The names of a player's parameters, if its utility has depended on none of them."""
        own = {leaf: name for leaf, name in self._names.items() if self._owner.get(leaf) == player}
        return sorted(own.values()) if self._used[player].isdisjoint(own) else []

    def owned(self, player: str, touched: Parameters) -> Parameters:
        """The parameters of a player: those that it claims, and its own of those it touched.

        Raises:
            ValueError: Two of them have one name.
        """
        own = {name: leaf for name, leaf in touched.items() if self._owner.get(leaf) == player}
        if player not in self.claims:
            return own
        own = {name: leaf for name, leaf in own.items() if leaf not in self._claimed}
        if twice := own.keys() & self.claims[player].keys():
            raise ValueError(
                f"The player '{player}' claims parameters of the names {sorted(twice)}, and its "
                "program names others so. Claim them under other names: parameters="
                "[(name, parameter), ...]."
            )
        return self.claims[player] | own

    def unnamed(
        self, player: str, utility: Tensor, named: Iterable[Parameters], sites: tuple[str, ...]
    ) -> list[Tensor]:
        """Finds a player's leaves behind a utility that no parameter statement names.

        The graph is searched once for each set of sites, again where statements name others than
        before, and always where there are such leaves.

        Args:
            player: The player.
            utility: A utility with its graph.
            named: The parameters that statements name.
            sites: What the programs scored, to tell the graphs of utilities apart.

        Raises:
            ValueError: Statements have named some of them before, and name others now; or all
                that a player's program uses is named by another's, which doesn't use it.
        """
        if not utility.requires_grad:
            return []
        scored = (player, *sites)
        known = self._claimed.union(*(parameters.values() for parameters in named))
        has_new = not known <= self._named
        if not has_new and not self._uses_unnamed.get(scored, True):
            return []
        used = list(_graph_leaves(utility))
        self._used[player].update(used)
        self._tell_of_idle()
        leaves = [leaf for leaf in used if leaf not in known]
        for leaf in leaves:
            self._touch(player, leaf)
        unnamed = [leaf for leaf in leaves if self._owner.get(leaf) == player]
        displaced = [tuple(leaf.shape) for leaf in unnamed if leaf in self._named]
        if has_new and displaced:
            raise ValueError(
                f"The {player}'s parameters with shapes {displaced} have lost their names: its "
                "program uses them, and other parameters of that name are in the way. Call "
                "pyro.clear_param_store() before this training goes on, or give the networks of "
                "several trainings names of their own."
            )
        self._named |= known
        self._uses_unnamed[scored] = bool(unnamed)
        return unnamed

    def _tell_of_idle(self) -> None:
        """Warns of parameters that a player names and another one uses; or refuses them."""
        for user, used in self._used.items():
            for owner, own in self._used.items():
                idle = {
                    self._names[leaf]
                    for leaf in used - own - self._claimed
                    if self._owner.get(leaf) == owner != user and leaf in self._names
                }
                if not own or idle <= self._told:
                    continue
                problem = (
                    f"The program of the {owner} names parameters that only the program of the "
                    f"{user} has used by now, so that nobody trains them: {sorted(idle)}. Name in "
                    "each program the networks that it uses, with pyro.module('decoder', "
                    "self.decoder) in place of pyro.module('vae', self), say; or let the "
                    f"{user} claim them (parameters=)."
                )
                if all(self._owner.get(leaf) != user for leaf in used):
                    raise ValueError(problem)
                warnings.warn(problem, stacklevel=stacklevel())
                self._told |= idle


def _graph_leaves(value: Tensor) -> Iterator[Tensor]:
    """Walks over the tensors that a gradient of a value would be accumulated in."""
    nodes = [value.grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes.extend(parent for parent, _ in node.next_functions)
