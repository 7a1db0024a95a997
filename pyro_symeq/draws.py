"""How many draws make up a utility, one after another or along outermost plates."""

from dataclasses import dataclass

import pyro

from pyro_symeq import passes
from pyro_symeq.binding import Program
from pyro_symeq.tracing import Record


@dataclass
class Draws:
    """The number of draws, and where a vectorised run has them.

    Args:
        num_particles: The number of draws whose utilities are averaged.
        num_proposals: The number of draws of the guide among which a completion is chosen.
        is_vectorized: Whether the guide completes data, and the model is scored, for all of them
            in one run.
        max_plate_nesting: The number of batch dimensions of the programs; if it isn't known,
            that of the runs of the model so far.
    """

    num_particles: int
    num_proposals: int
    is_vectorized: bool
    max_plate_nesting: int | None
    _nesting: int = 0

    def note(self, trace: Record) -> None:
        """Takes note of the plates of a run of the model."""
        self._nesting = max(self._nesting, passes.plate_nesting(trace))

    @property
    def num_wakes(self) -> int:
        """In how many runs the model is scored at all particles."""
        return 1 if self.is_vectorized else self.num_particles

    @property
    def num_guesses(self) -> int:
        """In how many runs the guide makes all proposals."""
        return 1 if self.is_vectorized else self.num_proposals

    @property
    def particles_dim(self) -> int:
        """The dimension of the plate of particles, to the left of the programs' own."""
        nesting = self._nesting if self.max_plate_nesting is None else self.max_plate_nesting
        return -1 - nesting

    @property
    def proposals_dim(self) -> int:
        """The dimension of the plate of proposals, to the left of that of particles."""
        return self.particles_dim - (self.num_particles > 1)

    def in_particles(self, program: Program) -> Program:
        """Draws all particles at once, if they are vectorised."""
        if not self.is_vectorized or self.num_particles == 1:
            return program
        name = "num_particles_vectorized"
        return pyro.plate(name, self.num_particles, dim=self.particles_dim)(program)

    def in_proposals(self, program: Program) -> Program:
        """Draws all proposals for all particles at once, if they are vectorised."""
        program = self.in_particles(program)
        if not self.is_vectorized or self.num_proposals == 1:
            return program
        name = "num_proposals_vectorized"
        return pyro.plate(name, self.num_proposals, dim=self.proposals_dim)(program)
