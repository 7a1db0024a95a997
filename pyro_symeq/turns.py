"""An optimiser in whose step several players move in turn, each by an optimiser of its own."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.optim import Optimizer

Turns = Callable[[], Iterator[tuple[str, ...]]]


class TurnsOptimizer(Optimizer):
    """The optimisers of several players as one, with a group of parameters for each of them.

    They share its parameter groups and its state. So learning rate schedulers and checkpoints
    treat it like any other optimiser, and ``"name"`` tells whose a group is.

    Args:
        optimizers: The optimisers, by the names of the players.
        turns: Tells who moves in a step, at once and in turn.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer], turns: Turns) -> None:
        first, *others = optimizers.values()
        common = {
            key: value
            for key, value in first.defaults.items()
            if all(key in other.defaults for other in others)
        }
        groups = [group for each in optimizers.values() for group in each.param_groups]
        super().__init__(groups, common)
        self.optimizers = dict(optimizers)
        self.turns = turns
        for player, optimizer in optimizers.items():
            _name_groups(player, optimizer)
            self.state.update(optimizer.state)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Lets the players move.

        Args:
            closure: Computes the gradients of those whose turn it is.

        Returns:
            What the closure returned last.

        Raises:
            ValueError: There is no closure.
        """
        if closure is None:
            raise ValueError(
                "Expected a closure that computes gradients in each turn of a step, got None. "
                "Lightning gives none with precision='16-mixed', where it scales gradients that "
                "are there before the step. Use 'bf16-mixed' or '32-true'."
            )
        result = None
        for names in self.turns():
            self.zero_grad()
            result = closure()
            for name in names:
                self.optimizers[name].step()
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Lets all optimisers work on the state and the groups of this one."""
        groups = iter(self.param_groups)
        for optimizer in self.optimizers.values():
            own = [next(groups) for _ in optimizer.param_groups]
            optimizer.__setstate__({"state": self.state, "param_groups": own})


def _name_groups(player: str, optimizer: Optimizer) -> None:
    groups = optimizer.param_groups
    for i, group in enumerate(groups):
        group["name"] = player if len(groups) == 1 else f"{player}/{group.get('name', i)}"
