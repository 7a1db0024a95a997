r"""Chains that redraw one block of variables after another, given the others.

In a round each block is redrawn in turn. With :math:`m_b` for the law that is stationary just
after block :math:`b`, a chain whose state is taken after a block that a fair draw chooses follows

.. math:: m = \tfrac{1}{K} \sum_b m_b.

All chains run at once, along the rows of the programs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_symeq import passes
from pyro_symeq.aside import aside
from pyro_symeq.binding import Program
from pyro_symeq.checks import check_count
from pyro_symeq.clamps import Values, clamps
from pyro_symeq.conditionals import State
from pyro_symeq.passes import Observation, Observations
from pyro_symeq.rows import Rows, Variable, alike
from pyro_symeq.tracing import Record, Site, tensors

Start = Literal["dream", "data"]
Around = Callable[[Program], Program]

DIVERGED = (
    "Look for NaN in the data and parameters, and whether the two programs drive each other apart."
)


@dataclass(frozen=True)
class Rounds:
    """Where a chain starts, and which of its rounds are kept.

    Args:
        num_steps: The number of rounds.
        burn_in: How many of them to leave out at first.
        thin: Of the other rounds, every ``thin``-th is kept.
        start: At a dream, or at the data of the batch.

    Raises:
        ValueError: An option is not possible, or no round is kept.
    """

    num_steps: int
    burn_in: int
    thin: int
    start: Start = "dream"

    def __post_init__(self) -> None:
        if self.start not in ("dream", "data"):
            raise ValueError(f"Expected start='dream' or 'data', got {self.start!r}.")
        check_count("burn_in", self.burn_in, at_least=0)
        if self.num_draws < 1:
            raise ValueError(
                f"No round is kept: num_steps={self.num_steps}, burn_in={self.burn_in} and "
                f"thin={self.thin} leave none. Take num_steps of at least burn_in + thin."
            )

    @property
    def num_draws(self) -> int:
        """How many rounds are kept."""
        return (self.num_steps - self.burn_in) // self.thin

    @property
    def last(self) -> int:
        """The last round that is kept."""
        return self.burn_in + self.num_draws * self.thin

    def keep(self, t: int) -> bool:
        """Whether the state after a round is kept."""
        return t > self.burn_in and (t - self.burn_in) % self.thin == 0


def unhandled(program: Program) -> Program:
    """The program as it is, within no handler."""
    return program


class Chain(ABC):
    """Chains over the rows of a batch.

    Attributes:
        blocks: The sites of each block.
        variables: The random variables by site, for the batch as given.
        batch: Those values of them that the batch holds.
        rows: The rows, if all variables share some.
        copies: How many chains there are for each row.
        known: What of the variables is clamped, for all copies.
    """

    def __init__(
        self,
        blocks: Mapping[str, tuple[str, ...]],
        variables: dict[str, Variable],
        batch: dict[str, Tensor],
        rows: Rows | None,
    ) -> None:
        self.blocks = blocks
        self.variables = variables
        self.batch = batch
        self.rows = rows
        self.copies = 1
        self.known: Observations = {}

    @abstractmethod
    def copy_arguments(self, copies: int, with_others: bool) -> None:
        """Lets the programs see copies of the rows, of arguments that hold no data too or not."""

    @abstractmethod
    def start(self, start: Start) -> State:
        """Draws where the chains start, on what is known."""

    @abstractmethod
    def draw(self, block: str, state: State, around: Around = unhandled) -> State:
        """Draws a block given the others, by its program within a handler."""

    @property
    def free(self) -> list[str]:
        """The blocks that are not clamped as a whole."""
        fixed = {name for name, known in self.known.items() if known.mask is None}
        return [block for block, sites in self.blocks.items() if not fixed.issuperset(sites)]

    @property
    def num_rows(self) -> int:
        """The number of rows with all their copies."""
        return 1 if self.rows is None else self.copies * self.rows.size

    @abstractmethod
    def traces(self, state: State) -> Iterator[Record]:
        """Runs each program at the values of a state."""

    def prepare(self, copies: int, given: Values, mask: Values) -> None:
        """Makes copies of the rows and clamps what is known.

        Raises:
            ValueError: The programs can't run on copies, or nothing is left to draw.
        """
        self.known = clamps(self.variables, self.batch, given, mask)
        if not self.free:
            raise ValueError(
                "There is nothing left to draw: given= and mask= fix every site. Leave some out."
            )
        if copies > 1:
            self.copy(copies)

    def copy(self, copies: int) -> None:
        """Lets the programs see copies of the rows, and checks that each copy is as if alone.

        Raises:
            ValueError: They can't run on copies, or copies have other laws.
        """
        if self.rows is None:
            raise self.uncopied(copies, "no vectorised plate holds all random variables")
        with aside():
            states = [self.start("dream") for _ in range(2)]
            alone = [self.log_probs(state) for state in states]
            again = self.log_probs(states[0])
        is_repeatable = all(alike(alone[0][key], again[key]) for key in again)
        self.copies = copies
        self.batch = {n: self.variables[n].copied(v, copies) for n, v in self.batch.items()}
        self.known = {n: self._copied(n, seen) for n, seen in self.known.items()}
        in_turn = (states * copies)[:copies]
        mixed = {n: of.joined([x[n] for x in in_turn]) for n, of in self.variables.items()}
        errors = []
        for with_others in (True, False):
            self.copy_arguments(copies, with_others)
            try:
                with aside():
                    self.check_shapes(self.start("dream"))
                    found = self.log_probs(mixed)
            except Exception as error:
                errors.append(str(error))
                continue
            differing = [key for key in found if not self._is_alike(found[key], alone, key)]
            if not (is_repeatable and differing):
                return
            name = differing[0][1]
            errors.append(f"the law of site '{name}' in a row depends on the other copies")
        raise self.uncopied(copies, errors[0])

    def _copied(self, name: str, known: Observation) -> Observation:
        """Copies the rows of what is known of a variable."""
        of = self.variables[name]
        mask = None if known.mask is None else of.copied(known.mask, self.copies)
        return Observation(of.copied(known.value, self.copies), mask)

    def log_probs(self, state: State) -> dict[tuple[int, str], Tensor]:
        """The log-probabilities (nats) at a state, by program and site, in batch shape.

        Nothing is validated, as known values may lie outside of a support that others draw.
        """
        with pyro.validation_enabled(False):
            return {
                (i, name): site["fn"].log_prob(state[name])
                for i, trace in enumerate(self.traces(state))
                for name, site in trace.variables.items()
                if name in self.variables and not passes.is_implicit(site)
            }

    def _is_alike(
        self, found: Tensor, alone: list[dict[tuple[int, str], Tensor]], key: tuple[int, str]
    ) -> bool:
        """Whether the copies have the log-probabilities of two states alone, in turn."""
        assert self.rows is not None
        dim = found.dim() + self.rows.dim
        by_copy = found.unflatten(dim, (self.copies, -1)).movedim(dim, 0)
        return all(alike(by_copy[i::2], alone[i][key].expand_as(by_copy[i::2])) for i in (0, 1))

    def uncopied(self, copies: int, why: str) -> ValueError:
        """Says that the programs can't run on copies of the rows."""
        return ValueError(
            f"The programs can't run {copies} chains for each row of the batch: {why}. Pass a "
            "batch that has a row for each chain, and ask for one chain for each row."
        )

    def rounds(self, rounds: Rounds, ticks: Iterable[int]) -> Iterator[State]:
        """Runs the chains.

        Args:
            rounds: Where to start, and which rounds to keep.
            ticks: The numbers of the rounds, 1, 2, ...

        Yields:
            The state after each round that is kept, where a fair draw for each row tells which
            block was redrawn last.

        Raises:
            ValueError: A chain meets NaN or infinity, or a program fails.
        """
        free = self.free
        state = self.start(rounds.start)
        self.check_finite(state, 0)
        for t in ticks:
            keep, kept = rounds.keep(t), state
            last = self.coin(len(free), state) if keep and len(free) > 1 else None
            for i, block in enumerate(free):
                state = state | self.redraw(block, state, t)
                kept = state if last is None or i == 0 else self.where(last >= i, state, kept)
            if keep:
                yield kept

    def coin(self, sides: int, state: State) -> Tensor:
        """A fair draw for each row."""
        shape = () if self.rows is None else (self.num_rows,)
        return torch.randint(sides, shape, device=next(iter(state.values())).device)

    def where(self, rows: Tensor, state: State, other: State) -> State:
        """One state in some rows, and another in the others."""
        return {
            name: torch.where(self.variables[name].beside(rows), value, other[name])
            for name, value in state.items()
        }

    def redraw(self, block: str, state: State, t: int) -> State:
        """Draws a block in a round, and checks the draws."""
        try:
            drawn = self.draw(block, state)
        except (ValueError, RuntimeError) as error:
            if (name := self.broken_site(block, state)) is not None:
                raise ValueError(
                    f"A chain meets NaN in round {t}: the distribution of site '{name}' has NaN "
                    f"parameters. {DIVERGED}"
                ) from error
            raise ValueError(f"A program fails in round {t} of the chain: {error}") from error
        self.check_shapes(drawn, t)
        self.check_finite(drawn, t)
        return drawn

    def broken_site(self, block: str, state: State) -> str | None:
        """The first site of a block whose distribution has NaN parameters."""
        finder = _find_nan()
        with aside(), pyro.validation_enabled(False), suppress(Exception):
            self.draw(block, state, finder)
        return finder.name

    def check_shapes(self, drawn: State, t: int = 0) -> None:
        """Checks that values have the shapes of the variables, with all copies."""
        for name, value in drawn.items():
            example = self.variables[name]
            shape = list(example.value.shape)
            if example.dim is not None:
                shape[example.dim] = self.num_rows
            if list(value.shape) != shape:
                raise ValueError(
                    f"Expected site '{name}' to have shape {tuple(shape)}, got "
                    f"{tuple(value.shape)} in round {t}. Chains run side by side, so let a site "
                    "have one shape in each round."
                )

    def check_finite(self, drawn: State, t: int) -> None:
        """Checks values for NaN and infinity."""
        inexact = {n: v.isfinite().all() for n, v in drawn.items() if v.is_floating_point()}
        if inexact and not torch.stack([*inexact.values()]).all():
            name = next(name for name, is_finite in inexact.items() if not is_finite)
            raise ValueError(
                f"A chain meets NaN or infinity in round {t} at site '{name}' (round 0 is the "
                f"start). {DIVERGED}"
            )


class _find_nan(Messenger):  # noqa: N801
    """Finds the first site whose distribution has NaN among its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.name: str | None = None

    def _pyro_sample(self, msg: Site) -> None:
        if self.name is None and any(x.isnan().any() for x in tensors(msg["fn"])):
            self.name = msg["name"]


def refuse_parts(*traces: Record) -> None:
    """Checks that the programs draw whole batches and whole sites.

    Raises:
        ValueError: A plate leaves out rows, or a site is split.
    """
    for trace in traces:
        if split := list(trace.split):
            raise ValueError(
                f"The sites {split} are split by obs_mask=. Observe whole values, and tell which "
                "elements are known by mask=."
            )
        if any(passes.left_out(trace)):
            raise ValueError(
                "Chains need all rows in each round, but a plate is subsampled. Pass fewer rows "
                "instead, to plates without subsample_size=."
            )
