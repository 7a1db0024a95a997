r"""Chains that alternate :math:`x \sim p(x \mid z)` and :math:`z \sim q(z \mid x)`."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pyro_symeq import passes
from pyro_symeq.aside import aside
from pyro_symeq.binding import Call, Program
from pyro_symeq.chain import Around, Chain, Start, refuse_parts, unhandled
from pyro_symeq.clamps import overlay
from pyro_symeq.conditionals import State
from pyro_symeq.passes import Observation, Observations, Run
from pyro_symeq.rehearsal import Bind, rehearse
from pyro_symeq.rows import changed_call, shaped, shared_rows, variable
from pyro_symeq.tracing import Record


class PairChain(Chain):
    """Chains that alternate between model and guide.

    Args:
        model: The decoder's program.
        guide: The encoder's program.
        bind: How dreams are handed to the guide.
        call: The arguments of both.
    """

    def __init__(self, model: Program, guide: Program, bind: Bind | None, call: Call) -> None:
        self.model = model
        self.guide = guide
        self.call = self._batch = call
        self.pattern, dream = rehearse(model, guide, call, bind)
        self._observed = dream.observed
        refuse_parts(dream.trace)
        if self.pattern.latents:
            raise ValueError(
                f"The model observes the latents {sorted(self.pattern.latents)} of this batch. "
                "Leave them out of it, and clamp them with given=."
            )
        with aside(), torch.no_grad():
            guided = passes.fill_in(guide, self.pattern.hand_over(dream, call), {})
        refuse_parts(guided)
        rows = shared_rows([dream.trace, guided])
        sites = dream.trace.variables
        data = tuple(name for name in sites if name not in guided)
        latents = tuple(name for name in sites if name in guided)
        variables = {name: variable(site, rows) for name, site in sites.items()}
        batch = {
            name: shaped(seen.value, variables[name].value.shape).to(variables[name].value.dtype)
            for name, seen in dream.observed.items()
        }
        super().__init__({"data": data, "latents": latents}, variables, batch, rows)
        self._run = dream
        self._latents = guided

    def copy_arguments(self, copies: int, with_others: bool) -> None:  # noqa: D102
        assert self.rows is not None

        def copy(leaf: Tensor, dim: int) -> Tensor:
            return torch.cat([leaf] * copies, dim)

        self.call = changed_call(
            self._batch, self.rows, self._observed, self.variables, copy, with_others
        )

    def traces(self, state: State) -> Iterator[Record]:  # noqa: D102
        everything = {name: Observation(value) for name, value in state.items()}
        run = self._dream(None, everything)
        yield run.trace
        with overlay(everything):
            yield passes.fill_in(self.guide, self.pattern.hand_over(run, self.call), {})

    def start(self, start: Start) -> State:  # noqa: D102
        known = self.known
        if start == "data":
            data = {name: Observation(value) for name, value in self.batch.items()}
            known = data | known
        self._run = self._dream(None, known)
        self._latents = self._run.trace
        state = self._values(self._run.trace, self.variables)
        if start == "data" and "latents" in self.free:
            self.check_finite(state, 0)
            state |= self.draw("latents", state)
        return state

    def draw(self, block: str, state: State, around: Around = unhandled) -> State:  # noqa: D102
        if block == "data":
            self._run = self._dream(self._latents, self.known, around)
            return self._values(self._run.trace, self.blocks["data"])
        call = self.pattern.hand_over(self._run, self.call)
        with overlay(self.known):
            self._latents = passes.fill_in(around(self.guide), call, {})
        return self._values(self._latents, self.blocks["latents"])

    def _dream(
        self, latents: Record | None, known: Observations, around: Around = unhandled
    ) -> Run:
        with overlay(known):
            return passes.dream(
                around(self.model), self.call, latents, followed=self.pattern.is_followed
            )

    def _values(self, trace: Record, names: Iterable[str]) -> State:
        drawn = passes.drawn(trace)
        if passes.unobserved(trace, self.variables) or not drawn.keys() >= {*names}:
            raise ValueError(
                f"Expected the programs to sample {sorted(names)} in each run, and none but "
                f"{sorted(self.variables)}, got {sorted(drawn)}. Chains run side by side, so let "
                "the same sites be there in each round."
            )
        return {name: drawn[name] for name in names}
