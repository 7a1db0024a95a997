"""A model and a guide, with the utilities of the decoder and the encoder of a game."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_symeq import passes, randomness
from pyro_symeq.aside import aside, buffers_kept
from pyro_symeq.binding import Call, Program, layout, module_of
from pyro_symeq.code import deal, hold, is_dealt
from pyro_symeq.draws import Draws
from pyro_symeq.informing import in_latents, several_runs
from pyro_symeq.passes import Observation, Observations, Run
from pyro_symeq.pattern import Pattern
from pyro_symeq.play import Masks, Play, Scored
from pyro_symeq.proposals import Proposals, choose
from pyro_symeq.rehearsal import Bind, rehearse
from pyro_symeq.rows import shared_rows
from pyro_symeq.tracing import UNOBSERVED, Record
from pyro_symeq.tracing import run as traced

T = TypeVar("T")


class _Misfit(Exception):
    """A program did not observe what the pattern says.

    Args:
        run: The run of the model.
        guided: What the guide observed, if it was the guide.
    """

    def __init__(self, run: Run, guided: frozenset[str] | None = None) -> None:
        super().__init__()
        self.run = run
        self.guided = guided

    def refuse_again(self, pattern: Pattern) -> None:
        """Refuses to look again where a pattern was found for these arguments a moment ago.

        Raises:
            ValueError: Something else than they decides what is observed.
        """
        if self.guided is not None:
            self._refuse("guide", self.guided, pattern.guided)
        elif pattern.knows(self.run):
            self._refuse("model", self.run.observed, pattern.observed)

    def _refuse(self, who: str, now: Iterable[str], before: Iterable[str]) -> None:
        raise ValueError(
            f"The {who} observed {sorted(now)} in one run and {sorted(before)} in another with "
            "the same arguments. Let the arguments, or draws of sites, decide which sites are "
            "observed."
        ) from None


class Pair:
    """A model and a guide, with what is known of their batches.

    Args:
        model: The decoder's program.
        guide: The encoder's program.
        bind: How dreams are handed to the guide, see :class:`SymmetricUtility`.
        supervise_encoder: Whether observed latents train the encoder too.
        draws: How many draws make up a utility.
        players: The names of the two players.

    Attributes:
        code_weight: How much a code for the data counts in the gradient of the encoder's utility.
    """

    code_weight = 0.0

    def __init__(
        self,
        model: Program,
        guide: Program,
        bind: Bind | None,
        supervise_encoder: bool,
        draws: Draws,
        players: tuple[str, str] = ("decoder", "encoder"),
    ) -> None:
        self.model = model
        self.guide = guide
        self.bind = bind
        self.supervise_encoder = supervise_encoder
        self.draws = draws
        self.players = players
        self._patterns: dict[Any, Pattern] = {}
        self._modules = [m for m in map(module_of, (model, guide)) if m is not None]

    def decoder(self, play: Play, *args: Any, **kwargs: Any) -> Tensor:
        r"""Scores the model at the data, completed by the guide.

        Args:
            play: The play.
            args: What both programs take.
            kwargs: Likewise.

        Returns:
            :math:`\log p_\theta(x, z)` with :math:`z \sim q_\varphi(z \mid x)`, where observed
            latents keep their values. Missing data are left out: with latents alone,
            :math:`\log p_\theta(z)`.
        """
        return self._mean(self._decoder, play, (args, kwargs), self.draws.num_wakes)

    def encoder(self, play: Play, *args: Any, **kwargs: Any) -> Tensor:
        r"""Scores the guide at a dream, and at the latents that the data hold.

        Args:
            play: The play.
            args: What both programs take.
            kwargs: Likewise.

        Returns:
            :math:`\log q_\varphi(z \mid x)` with :math:`(x, z) \sim p_\theta(x, z)`, plus
            :math:`\log q_\varphi(y \mid x)` at observed latents :math:`y`. With latents alone,
            :math:`\log q_\varphi(z \mid x)` with :math:`x \sim p_\theta(x \mid z)`.
        """
        return self._mean(self._encoder, play, (args, kwargs), self.draws.num_particles)

    def wake(self, play: Play, call: Call) -> tuple[Record, Record]:
        """Traces the guide at the data, without a graph, and the model at them so completed."""
        completion, run = self._fitting(lambda _, *at: self._wake(*at), play, call)
        return completion, run.trace

    @contextmanager
    def coded(self, weight: float) -> Iterator[None]:
        """Lets a code count so much in the gradient of the encoder's utility."""
        self.code_weight = weight
        try:
            yield
        finally:
            self.code_weight = 0.0

    def information(
        self, play: Play, call: Call, num_draws: int, are_coded: bool = False
    ) -> dict[str, Tensor]:
        """What each latent that the guide draws for a batch says about it (bits), by site.

        Args:
            play: The play.
            call: The batch.
            num_draws: How often the guide draws.
            are_coded: Whether to look at latents that have a code alone.
        """

        def inform(_: Play, pattern: Pattern, call: Call) -> dict[str, Tensor]:
            if pattern.lacks_data:
                return {}
            given, rows = self._given(pattern, call)
            runs = several_runs(self.guide, call, num_draws, given, rows)
            found = in_latents(runs, given)
            laws = {name: runs[0].variables[name]["fn"] for name in found}
            return {n: x for n, x in found.items() if is_dealt(laws[n]) or not are_coded}

        with aside(), torch.no_grad():
            return self._fitting(inform, play, call)

    def propose(
        self, play: Play, call: Call, values: Mapping[str, Tensor] | None = None
    ) -> Proposals:
        """Draws of the guide at the data, with their importance weights; without a graph.

        Args:
            play: The play.
            call: What both programs take.
            values: Values that take the place of draws.
        """

        def propose(_: Play, pattern: Pattern, call: Call) -> Proposals:
            if pattern.lacks_data:
                raise ValueError(
                    "The batch observes latents alone, and draws of the guide need data. Give "
                    f"{sorted(pattern.missing)} too."
                )
            given, rows = self._given(pattern, call)
            guide = self.draws.in_proposals(self.guide)
            completion = passes.fill_in(guide, call, given, {**rows, **(values or {})})
            return self._proposals(pattern, call, given, completion)

        with torch.no_grad():
            return self._fitting(propose, play, call)

    def _mean(
        self, score: Callable[[Play, Pattern, Call], Tensor], play: Play, call: Call, runs: int
    ) -> Tensor:
        """The mean over particles, which are drawn in so many runs."""
        scores = [self._fitting(score, play, call) for _ in range(runs)]
        if self.draws.num_particles == 1:
            return scores[0]
        return torch.stack(scores).sum() / self.draws.num_particles

    def _fitting(self, act: Callable[[Play, Pattern, Call], T], play: Play, call: Call) -> T:
        """Acts with the pattern that such calls have, and looks again where it does not fit.

        It acts on the same draws then, so that they don't depend on what has been seen before.
        """
        key = layout(call), *(module.training for module in self._modules)
        pattern, misfit, has_looked = self._patterns.get(key), None, False
        take_back = randomness.mark()
        while True:
            try:
                if pattern is None or misfit is not None:
                    pattern = self._look(call, misfit, pattern if has_looked else None)
                    has_looked = True
                    with aside():
                        self._decoder(play.aside(), pattern, call)
                        self._encoder(play.aside(), pattern, call)
                result = act(play, pattern, call)
                self._patterns[key] = pattern
                return result
            except _Misfit as error:
                take_back()
                misfit = error.run
                if has_looked and pattern is not None:
                    error.refuse_again(pattern)

    def _look(self, call: Call, misfit: Run | None, pattern: Pattern | None) -> Pattern:
        """Finds the pattern of a call, or of one more way that a run of its model can take."""
        like = None if misfit is None else misfit.trace
        try:
            found, run = rehearse(self.model, self.guide, call, self.bind, like)
        except (KeyError, NotImplementedError):
            self._refuse_without_density(call)
            raise
        self.draws.note(run.trace)
        return found if pattern is None else pattern.extended(found, run)

    def _refuse_without_density(self, call: Call) -> None:
        """Checks that the sites of both programs can be scored at values that they are given.

        Raises:
            ValueError: One can't.
        """
        with aside(), torch.no_grad(), suppress(KeyError, NotImplementedError):
            _score_all(passes.dream(self.model, call).trace)
            _score_all(passes.fill_in(self.guide, call, {}))

    def _decoder(self, play: Play, pattern: Pattern, call: Call) -> Tensor:
        name, (_, run) = self.players[0], self._wake(pattern, call)
        play.has_data[name] = play.has_data.get(name, False) or not pattern.lacks_data
        return play.score(name, _scored(pattern, run))

    def _encoder(self, play: Play, pattern: Pattern, call: Call) -> Tensor:
        dream = self._dream(pattern, call)
        self._expect(pattern, dream, call)
        given = {n: seen for n, seen in dream.observed.items() if n in pattern.latents}
        plates = passes.subsamples(dream.trace)
        has_code = self.code_weight > 0 and not pattern.lacks_data
        code = self._code(call, dream, given, plates) if has_code else {}
        dreamed = pattern.hand_over(dream, call)
        trace = passes.replay(self.guide, dreamed, passes.values(dream.trace))
        pattern.check_dreamed(dream.trace, trace)
        if not (guided := passes.observed(trace)) <= pattern.guided:
            raise _Misfit(dream, guided)
        names = [n for n in passes.scored(trace, dream.trace) if n not in pattern.real]
        scored = [Scored(trace, names, _unobserved(pattern, dream))]
        if pattern.is_supervised and self.supervise_encoder and not pattern.lacks_data:
            at_data = passes.fill_in(self.guide, call, given, plates)
            scored.append(Scored(at_data, *_given_sites(at_data, given)))
        utility = play.score(self.players[1], *scored)
        if not code:
            return utility
        at_code = passes.fill_in(self.guide, call, {**given, **code}, plates)
        log_prob = play.score(self.players[1], Scored(at_code, [*code], {}))
        return utility + self.code_weight * (log_prob - log_prob.detach())

    def _code(
        self, call: Call, dream: Run, given: Observations, plates: Mapping[str, Tensor]
    ) -> Observations:
        """The latents of a dream, dealt out to the data as far as that can be done."""
        rows = shared_rows([dream.trace])
        if rows is None:
            return {}
        values = {n: x for n, x in passes.drawn(dream.trace).items() if n not in given}
        acts = passes.clamp(given), hold(values, rows), passes.complete(plates)
        with torch.no_grad(), buffers_kept():
            trace = traced(self.guide, call, *acts)
        laws = {
            name: trace.variables[name]["fn"]
            for name in passes.unobserved(trace, given)
            if name in values and name not in trace.split
        }
        laws = {name: law for name, law in laws.items() if is_dealt(law)}
        return {name: Observation(value) for name, value in deal(values, laws, rows).items()}

    def _wake(self, pattern: Pattern, call: Call) -> tuple[Record, Run]:
        completion, values = Record(), dict[str, Tensor]()
        if not pattern.lacks_data:
            try:
                with torch.no_grad():
                    completion, values = self._complete(pattern, call)
            except ValueError:
                pattern.check_finite(call)
                raise
        trace = passes.replay(self.draws.in_particles(self.model), call, values)
        run = Run(trace, passes.observations(trace))
        self._expect(pattern, run, call)
        pattern.check_completed(trace, completion)
        return completion, run

    def _complete(self, pattern: Pattern, call: Call) -> tuple[Record, dict[str, Tensor]]:
        """A run of the guide at the data, and the values for the model's latents."""
        given, rows = self._given(pattern, call)
        proposals: list[Proposals] = []
        guide = self.draws.in_proposals(self.guide)
        for _ in range(self.draws.num_guesses):
            completion = passes.fill_in(guide, call, given, rows)
            if self.draws.num_proposals == 1:
                return completion, passes.values(completion)
            rows = passes.subsamples(completion)
            proposals.append(self._proposals(pattern, call, given, completion))
        return completion, choose(proposals)

    def _proposals(
        self, pattern: Pattern, call: Call, given: Observations, completion: Record
    ) -> Proposals:
        trace = passes.replay(self.draws.in_proposals(self.model), call, passes.values(completion))
        run = Run(trace, passes.observations(trace))
        self._expect(pattern, run, call)
        _refuse_weights_without_density(trace)
        drawn, masks = _drawn_sites(completion, trace, given)
        masks |= _unobserved(pattern, run)
        scored = _scored(pattern, run)
        return Proposals(
            completion,
            list(passes.terms(trace, scored.names, scored.masks)),
            list(passes.terms(completion, drawn, masks)),
            self.draws.proposals_dim if self.draws.is_vectorized else None,
        )

    def _given(self, pattern: Pattern, call: Call) -> tuple[Observations, dict[str, Tensor]]:
        """The observed latents; the model is run to read those that no argument holds whole."""
        given = pattern.given(call)
        if given is not None:
            return given, {}
        with buffers_kept():
            run = passes.dream(self.model, call)
        return {
            name: run.observed[name] for name in pattern.latents & run.observed.keys()
        }, passes.subsamples(run.trace)

    def _dream(self, pattern: Pattern, call: Call) -> Run:
        if not pattern.lacks_data:
            return passes.dream(self.model, call, followed=pattern.is_followed)
        with torch.no_grad():
            trace = passes.fill_in(self.model, call, {})
        return Run(trace, passes.observations(trace))

    def _expect(self, pattern: Pattern, run: Run, call: Call) -> None:
        if not pattern.fits(run, call):
            raise _Misfit(run)


def _score_all(trace: Record) -> None:
    sites = trace.variables.items()
    passes.log_probs(trace, [name for name, site in sites if not passes.is_implicit(site)])


def _scored(pattern: Pattern, run: Run) -> Scored:
    """Where the model is scored."""
    names = [
        name
        for name, site in run.trace.variables.items()
        if name not in pattern.missing and not passes.is_implicit(site)
    ]
    masks = {
        name: seen.mask
        for name, seen in run.observed.items()
        if seen.mask is not None and name not in pattern.latents | pattern.filled
    }
    return Scored(run.trace, names + passes.factors(run.trace), masks)


def _unobserved(pattern: Pattern, run: Run) -> Masks:
    """Where the sites count at which the guide samples the other part of what is observed."""
    masks = {name: run.observed[name].mask for name in pattern.filled & run.observed.keys()}
    return {name + UNOBSERVED: ~mask for name, mask in masks.items() if mask is not None}


def _given_sites(trace: Record, given: Observations) -> tuple[list[str], Masks]:
    """Where a run of the guide was given values, and where those count."""
    names, masks, split = [], {}, trace.split
    for name, site in trace.variables.items():
        if name in given:
            names.append(name)
            masks[name] = given[name].mask
        elif site["is_observed"]:
            names.append(name)
            masks[name] = split.get(name)
    return names, {name: mask for name, mask in masks.items() if mask is not None}


def _drawn_sites(
    trace: Record, model_trace: Record, given: Observations
) -> tuple[list[str], Masks]:
    """Where a run of the guide has drawn values for the model."""
    names, masks = _given_sites(trace, given)
    sites = [name for name in trace.variables if name in model_trace]
    drawn = [name for name in sites if name not in names or name in masks]
    return drawn, {name: ~masks[name] for name in drawn if name in masks}


def _refuse_weights_without_density(trace: Record) -> None:
    for name, site in trace.variables.items():
        if passes.is_implicit(site):
            raise ValueError(
                f"Proposals are chosen by their weights p(x, z) / q(z | x), but the model's site "
                f"'{name}' is Implicit and has no density. Set num_proposals=1."
            )
