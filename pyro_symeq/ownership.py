"""Who owns which parameter, by tensor and whatever its name."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

Parameters = dict[str, Tensor]

NOTHING_TO_LEARN = (
    "There is nothing to learn: no program touches a parameter. Declare parameters with "
    "pyro.param, or register networks with pyro.module or as attributes of a PyroModule."
)


class Owners:
    """Keeps which player owns which parameter.

    A player owns what it claims. A parameter that nobody claims belongs to the first of the
    players whose program touches it, in the order in which they are named.

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

    def touch(self, player: str, leaves: Iterable[Tensor]) -> None:
        """Takes note of parameters that a player's program uses."""
        rank = self._rank[player]
        for leaf in leaves:
            owner = self._owner.setdefault(leaf, player)
            if rank < self._rank[owner] and leaf not in self._claimed:
                self._owner[leaf] = player
                self.num_changes += 1

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
            ValueError: Statements have named some of them before, and name others now.
        """
        if not utility.requires_grad:
            return []
        scored = (player, *sites)
        known = self._claimed.union(*(parameters.values() for parameters in named))
        has_new = not known <= self._named
        if not has_new and not self._uses_unnamed.get(scored, True):
            return []
        leaves = [leaf for leaf in _graph_leaves(utility) if leaf not in known]
        self.touch(player, leaves)
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
