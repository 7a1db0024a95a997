r"""What the first call with a kind of batch finds out, so that later steps need not.

A rehearsal runs both programs on the side. It learns which sites the batch observes and which
argument holds each of them, hands the guide a dream in the place of the data, and refuses a pair
that cannot learn before anything moves.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.poutine import Trace
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_symeq import passes, randomness
from pyro_symeq.aside import aside
from pyro_symeq.binding import (
    Call,
    Kind,
    Names,
    Path,
    Program,
    close,
    equal,
    find,
    get,
    is_part,
    is_strided,
    kind,
    leaves,
    overlap,
    put,
    strided,
)
from pyro_symeq.callers import stacklevel
from pyro_symeq.informing import independent_parts
from pyro_symeq.passes import Observation, Run
from pyro_symeq.pattern import Pattern, Place
from pyro_symeq.provenance import follow, name_of, take
from pyro_symeq.tracing import UNOBSERVED, Record, Site, tensors

NUM_OTHERS = 8  # draws: of a fair bit in one row, all are alike once in 256
Law = tuple[Any, Any]  # a distribution and its mask
Bind = Mapping[str, str] | Callable[[Trace, tuple[Any, ...], dict[str, Any]], Call]

IGNORES_DATA = (
    "The guide ignores the data: it never reads the values of {arguments}. On dreams such a guide "
    "can only learn the prior p(z). Write an amortised guide, whose distributions depend on its "
    "arguments; an AutoGuide, or a guide that closes over its data, does not."
)


def rehearse(
    model: Program, guide: Program, call: Call, bind: Bind | None, like: Record | None = None
) -> tuple[Pattern, Run]:
    """Finds the pattern of a batch.

    Random states and module buffers end as they were.

    Args:
        model: The decoder's program.
        guide: The encoder's program.
        call: The arguments of both, with the batch.
        bind: How dreams are handed to the guide, where the user says so.
        like: A trace of the model, whose latents take the place of draws.

    Returns:
        The pattern, and the dream that showed it.

    Raises:
        ValueError: The pair cannot learn from such a batch; the message says why and what to do.
    """
    if isinstance(guide, AutoGuide):
        raise ValueError(IGNORES_DATA.format(arguments="its arguments"))
    with aside(), torch.no_grad():
        rehearsal = _Rehearsal(model, guide, call, bind, like)
        return rehearsal.pattern(), rehearsal.dream


class _Rehearsal:
    """A dream of a batch, and what the programs do with it."""

    def __init__(
        self, model: Program, guide: Program, call: Call, bind: Bind | None, like: Record | None
    ) -> None:
        self.model = model
        self.guide = guide
        self.call = call
        self.bind = bind
        self.names = Names(model)
        self.absent = list(self.names.absent(call))
        self.dream = passes.dream(model, call, like, followed=True)
        self.observed = self.dream.observed
        self.sites = self.dream.trace.variables
        self.drawn = self.sites.keys() - self.observed.keys()

    def pattern(self) -> Pattern:
        """Finds the pattern and checks that the pair can learn from it."""
        pattern = self.cast()
        self.refuse_unsampled(pattern.missing)
        dreamed = pattern.hand_over(self.dream, self.call)
        self.refuse_wrong_pairing(pattern, dreamed)
        data, sources = self.data(pattern, dreamed), self.sources(pattern, dreamed)
        latents = passes.values(self.dream.trace)
        self.run_again(self.call)  # what the model leaves to the guide is of the data, as in steps
        with (
            torch.enable_grad(),
            _Reads([*data.values(), *sources.values()]) as reads,
            follow((dreamed, {"latents": latents})) as followed,
        ):
            trace = passes.replay(self.guide, dreamed, latents)
        pattern.check_dreamed(self.dream.trace, trace)
        self.refuse_implicit(trace)
        self.refuse_other_rows(trace)
        if pattern.bind is None:
            self.refuse_reading_data(dreamed)
        if not (reads.any(data.values()) or self.depends_on_data(pattern, trace)):
            raise ValueError(IGNORES_DATA.format(arguments=list(data)))
        for name, source in sources.items():
            if reads.any([source]):
                raise ValueError(self.cannot_tell(name, []))
        self.warn_of_priors(pattern, trace, followed)
        guided = passes.observed(trace)
        is_supervised = bool(pattern.latents or guided)
        real = self.real(trace, dreamed, followed)
        return replace(pattern, is_supervised=is_supervised, guided=guided, real=real)

    def guide_at(self, dream: Run, call: Call) -> Record:
        """Runs the guide on a dream."""
        return passes.replay(self.guide, call, passes.values(dream.trace))

    def cast(self) -> Pattern:
        """Finds out which sites are latent, which are data, and which data are missing."""
        places = self.places()
        held = {name: place for name, place in places.items() if name in self.observed}
        draft = Pattern(
            observed=frozenset(self.observed),
            latents=frozenset(),
            masked=frozenset(
                name for name, seen in self.observed.items() if seen.mask is not None
            ),
            filled=frozenset(),
            missing=frozenset(),
            is_subsampled=any(passes.left_out(self.dream.trace)),
            is_supervised=False,
            places=held,
            names=self.names,
            bind=self.bind if callable(self.bind) else None,
        )
        try:
            sampled = self.sampled_by_guide(draft)
        except Exception:
            self.refuse_unbound(self.observed.keys() - places.keys())
            if not self.absent:
                raise
            sampled = None  # perhaps for want of the missing data
        vacancies = {
            name: Place(path, "itself", passes.value(self.dream.trace, name).dtype)
            for name in self.drawn - (sampled or set())
            if (path := self.vacancy(name, places)) is not None
        }
        full = replace(draft, places={**draft.places, **vacancies})
        if sampled is None:
            sampled = self.sampled_by_guide(full)
        unbound = self.observed.keys() - places.keys()
        self.refuse_unbound({name for name in unbound if name not in sampled or self.hides(name)})
        missing = vacancies.keys() - sampled
        pattern = replace(
            draft,
            latents=draft.observed & sampled,
            filled=frozenset(n for n in draft.masked if n + UNOBSERVED in sampled),
            missing=frozenset(missing),
        )
        if not pattern.lacks_data:
            return pattern
        if unknown := sorted(self.drawn - missing):
            raise ValueError(
                f"The batch lacks {sorted(missing)} and doesn't give {unknown} either: without "
                "data the guide can't complete it. Give all latents or some data."
            )
        return replace(pattern, places=full.places)

    def places(self) -> dict[str, Place]:
        """The place of each observed value: the user's word, or the one leaf that holds it."""
        told = self.told(self.bind) if isinstance(self.bind, Mapping) else {}
        places = {}
        for name, value in self.values().items():
            seen = self.observed.get(name)
            if name in told:
                leaf = get(self.call, told[name])
                how = (
                    "itself" if seen is None or leaf is None else self.kind(leaf, told[name], seen)
                )
                places[name] = Place(told[name], how, value.dtype)
            elif seen is not None and (path := self.path(name, seen)) is not None:
                how = self.kind(get(self.call, path), path, seen)
                places[name] = Place(path, how, value.dtype)
        return places

    def values(self) -> dict[str, Tensor]:
        """The dreamed value of each random variable of the model."""
        return {name: passes.value(self.dream.trace, name) for name in self.sites}

    def path(self, name: str, seen: Observation) -> Path | None:
        """The argument that holds an observed value, if one does."""
        paths = find(seen.value, self.call)
        are_copies = all(kind(get(self.call, path), seen.value) == "copy" for path in paths)
        if are_copies and seen.origin.path is not None and self.is_picked(seen):
            paths = self.aliases(get(self.call, seen.origin.path))
        if len(paths) == 1:
            paths += [
                p for p, x in strided(self.call) if p not in paths and overlap(x, seen.value)
            ]
        if len(paths) > 1 and not callable(self.bind):
            raise ValueError(self.cannot_tell(name, paths))
        return paths[0] if len(paths) == 1 else None

    def kind(self, leaf: Tensor, path: Path, seen: Observation) -> Kind:
        """How an argument holds an observed value."""
        how = kind(leaf, seen.value)
        if how == "copy" and not equal(leaf, seen.value):
            return "pick" if seen.origin.path == path and self.is_picked(seen) else "told"
        return how

    def is_picked(self, seen: Observation) -> bool:
        """Whether an observed value was picked from an argument."""
        path, picks = seen.origin.path, seen.origin.picks
        return path is not None and equal(take(get(self.call, path), picks), seen.value)

    def aliases(self, x: Tensor) -> list[Path]:
        """The paths to a tensor, and to others with the same elements in memory."""
        tensors = strided(self.call)
        return [path for path, y in tensors if x is y or is_part(x, y) or is_part(y, x)]

    def refuse_unbound(self, names: Iterable[str]) -> None:
        """Checks that a dream of these sites can be handed over."""
        if not callable(self.bind):
            for name in names:
                raise ValueError(self.cannot_tell(name, []))

    def hides(self, name: str) -> bool:
        """Whether an observed value may come from numbers whose use can't be watched."""
        return not self.observed[name].origin.paths and any(
            isinstance(leaf, np.ndarray) or (len(path) > 2 and type(leaf) in (int, float))
            for path, leaf in leaves(self.call)
        )

    def told(self, bind: Mapping[str, str]) -> dict[str, Path]:
        """The user's ``{argument: site}`` as paths by site."""
        paths = {self.names(path): path for path, _ in leaves(self.call)}
        paths |= {self.names(path): path for path in self.absent}
        sites = self.observed.keys() | self.drawn
        for argument, name in bind.items():
            if argument not in paths:
                raise ValueError(
                    f"bind= names the argument '{argument}'; there are {sorted(paths)}."
                )
            leaf = get(self.call, paths[argument])
            if isinstance(leaf, Tensor) and not is_strided(leaf):
                raise ValueError(
                    f"bind= names the argument '{argument}', a sparse or nested tensor; expected "
                    "one that a dream can be put into. Pass it dense, or hand the dream over with "
                    "a function bind=(trace, args, kwargs) -> (args, kwargs)."
                )
            if not (leaf is None or isinstance(leaf, Tensor)):
                raise ValueError(
                    f"bind= names the argument '{argument}', which is of type "
                    f"{type(leaf).__name__}; expected a tensor, or None where data are missing."
                )
            if name not in sites:
                raise ValueError(
                    f"bind= names the site '{name}'; the model samples {sorted(sites)}."
                )
        for name, count in Counter(bind.values()).items():
            if count > 1:
                raise ValueError(self.several(name, [a for a in bind if bind[a] == name]))
        return {name: paths[argument] for argument, name in bind.items()}

    def vacancy(self, name: str, places: Mapping[str, Place]) -> Path | None:
        """The argument, now ``None``, through which the model would observe a site: by trying."""
        value = passes.value(self.dream.trace, name)
        candidates = [places[name].path] if name in places else self.absent
        paths = [path for path in candidates if self.would_observe(name, value, path)]
        if len(paths) > 1:
            raise ValueError(self.cannot_tell(name, paths))
        return paths[0] if paths else None

    def would_observe(self, name: str, value: Tensor, path: Path) -> bool:
        """Whether the model, given a value there, observes it at a site."""
        try:
            observed = passes.dream(self.model, put(self.call, path, value)).observed
        except Exception:  # the argument stands for something else
            return False
        return name in observed and equal(observed[name].value, value)

    def sampled_by_guide(self, pattern: Pattern) -> set[str]:
        """The sites of the guide, called with the dream."""
        trace = self.guide_at(self.dream, pattern.hand_over(self.dream, self.call))
        return {name for name in trace.variables}

    def data(self, pattern: Pattern, dreamed: Call) -> dict[str, Tensor]:
        """The arguments that hold dreamed data, by name."""
        if pattern.bind is None:
            paths = [p.path for name, p in pattern.places.items() if name not in pattern.latents]
        else:
            paths = [p for p, leaf in leaves(dreamed) if leaf is not get(self.call, p)]
        if not paths:
            raise ValueError(
                "The model observes no site that the guide lacks, so there are no data to learn "
                "from. Observe data in the model (obs=), and don't sample them in the guide."
            )
        return {self.names(path): get(dreamed, path) for path in paths}

    def sources(self, pattern: Pattern, dreamed: Call) -> dict[str, Tensor]:
        """The arguments from which observed latents are computed, and which dreams leave alone."""
        paths = [
            (name, path)
            for name in pattern.latents - pattern.places.keys()
            for path in self.observed[name].origin.paths
        ]
        return {
            name: leaf
            for name, path in paths
            if (leaf := get(dreamed, path)) is get(self.call, path)
        }

    def refuse_wrong_pairing(self, pattern: Pattern, call: Call) -> None:
        """Checks that the model, called as the guide will be, observes the dream."""
        again = passes.dream(self.model, call, self.dream.trace)
        for name in pattern.missing if pattern.lacks_data else pattern.observed:
            if name in pattern.latents and name not in pattern.places:
                continue
            dreamed, seen = passes.value(self.dream.trace, name), again.observed.get(name)
            if seen is None or not self.agree(name, seen.value, dreamed):
                raise ValueError(
                    f"When the model is called with its dream of site '{name}' in the place of "
                    "the data, it doesn't observe that dream: the argument changes it (a cast "
                    "that rounds, say), isn't the one, or poutine.condition holds the value fast. "
                    "Tell with bind= how a dream becomes arguments."
                )

    def refuse_reading_data(self, call: Call) -> None:
        """Checks that the laws of the model are the same at the dream as at the data.

        They are looked at once more with other parameters: a coefficient that starts at 0 hides
        what it multiplies.
        """
        differing = self.reading_data(call)
        if not differing:
            moved = _moved(self.dream.trace.parameters.values())
            with suppress(ValueError, RuntimeError), moved:  # not all parameters make a law
                differing = self.reading_data(call)
        if differing:
            raise ValueError(
                f"The model's law of {differing} depends on the data in its arguments, so a dream "
                "would be drawn from real data in part. Let the model go by what it draws, "
                'x = pyro.sample("x", ..., obs=x), and read the data of its arguments by obs= alone.'
            )

    def reading_data(self, call: Call) -> list[str]:
        """The sites whose law is another at the dream, and the same whenever the data are."""
        at_data, dream = self.laws(self.call), self.dream.trace
        differing = _other_laws(at_data, self.laws(call), dream)
        return [] if _other_laws(at_data, self.laws(self.call), dream) else differing

    def refuse_unsampled(self, missing: Collection[str]) -> None:
        """Checks that no law of other sites depends on what neither program is given.

        They would be scored at draws of its prior.
        """
        if not missing:
            return
        others = [passes.dream(self.model, self.call).trace for _ in range(NUM_OTHERS)]
        at_dream = self.laws(self.call)
        for other in others:
            laws = self.laws(self.call, {n: passes.value(other, n) for n in missing if n in other})
            differing = _other_laws(at_dream, laws, self.dream.trace)
            if depending := [name for name in differing if name not in missing]:
                raise ValueError(
                    f"The model's laws of {depending} depend on {sorted(missing)}, which the batch "
                    "doesn't give and the guide never samples. Sample these sites in the guide "
                    "too, or give them in each batch."
                )

    def laws(self, call: Call, others: Mapping[str, Tensor] | None = None) -> dict[str, Law]:
        """The laws of the model's sites that have a density, at the values of the dream.

        Masks belong to them, but for ``obs_mask=``, which tells what of the data is there.

        Args:
            call: The arguments of the model.
            others: Values on which they depend in the place of the dream's.
        """
        trace = self.run_again(call, others)
        return {
            name: (independent_parts(site["fn"])[0], None if name in trace.split else site["mask"])
            for name, site in trace.variables.items()
            if not passes.is_implicit(site)
        }

    def run_again(self, call: Call, others: Mapping[str, Tensor] | None = None) -> Record:
        """Runs the model with the values of the dream, or others in their place."""
        values = passes.values(self.dream.trace) | dict(others or {})
        given = passes.fix(values, lambda name, law, value: value)
        with randomness.kept():
            return passes.sample(self.model, call, given)

    def agree(self, name: str, seen: Tensor, dreamed: Tensor) -> bool:
        """Whether two values of a site are alike where they count."""
        counting = passes.counting(self.sites[name])
        return close(seen if counting is None else torch.where(counting, seen, dreamed), dreamed)

    def refuse_implicit(self, trace: Record) -> None:
        """Checks that sites without a density stand where nothing is to be learned."""
        for name, site in self.sites.items():
            if passes.is_implicit(site) and (name not in trace or _depends_on_parameters(site)):
                why = "depends on parameters" if name in trace else "stands for data"
                raise ValueError(
                    f"The model's site '{name}' is Implicit and would have to learn: it {why}. "
                    "Give it a distribution with log_prob."
                )
        for name, site in trace.variables.items():
            if name in self.sites and (passes.is_implicit(site) or passes.is_point(site)):
                what = "Implicit" if passes.is_implicit(site) else "a Delta"
                raise ValueError(
                    f"The guide's site '{name}' is {what}, but the encoder learns from log q. "
                    "Give it a distribution with log_prob that spreads its draws."
                )

    def refuse_other_rows(self, trace: Record) -> None:
        """Checks that both programs choose the rows of a subsample in the same plate."""
        for name, site in trace.variables.items():
            in_model = passes.subsampled_plates(self.sites[name]) if name in self.sites else set()
            in_guide = passes.subsampled_plates(site)
            if name in self.sites and in_model != in_guide:
                raise ValueError(
                    f"The site '{name}' is in the subsampled plates {sorted(in_model)} in the "
                    f"model and {sorted(in_guide)} in the guide, so the two would speak of other "
                    "rows. Use plates of the same names and sizes in both programs."
                )

    def depends_on_data(self, pattern: Pattern, trace: Record) -> bool:
        """Whether other data change the guide's law, for networks that can't be watched."""
        other = passes.dream(self.model, self.call, self.dream.trace, pattern.is_followed)
        again = self.guide_at(self.dream, pattern.hand_over(other, self.call))
        scored = passes.scored(trace, self.dream.trace)
        return passes.log_probs(trace, scored) != passes.log_probs(again, scored)

    def real(self, trace: Record, dreamed: Call, followed: follow) -> frozenset[str]:
        """The guide's own observations that have nothing to do with the dream.

        They come from arguments that no dream took the place of, and that the model doesn't read.
        """

        def stays(path: Path) -> bool:
            return path[0] == 0 and get(dreamed, path[1:]) is get(self.call, path[1:])

        origins = {
            name: followed.origin(site["value"]).paths
            for name, site in trace.variables.items()
            if site["is_observed"] and name not in self.sites
        }
        sources = {
            name: [get(dreamed, path[1:]) for path in paths]
            for name, paths in origins.items()
            if paths and all(map(stays, paths))
        }
        if not sources:
            return frozenset()
        with _Reads(chain.from_iterable(sources.values())) as reads:
            passes.dream(self.model, self.call, self.dream.trace)
        return frozenset(name for name, found in sources.items() if not reads.any(found))

    def warn_of_priors(self, pattern: Pattern, trace: Record, followed: follow) -> None:
        """Warns of sites that the guide draws from laws of their own, whatever the data are."""
        free = {
            name: site
            for name, site in trace.variables.items()
            if name in self.sites
            and not any(followed.origin(x).paths for x in tensors(site["fn"]))
            and _has_parameters(site)
        }
        if not free:
            return
        other = passes.dream(self.model, self.call, followed=pattern.is_followed)
        again = self.guide_at(other, pattern.hand_over(other, self.call))
        laws = {name: site["fn"] for name, site in again.variables.items()}
        for name, site in free.items():
            if name in laws and _same_law(site["fn"], laws[name], site["value"]):
                warnings.warn(
                    f"The law of the guide's site '{name}' has parameters of its own and depends "
                    "neither on the data nor on other latents. On dreams it can only learn the "
                    f"prior of '{name}'. Compute it from the guide's arguments.",
                    stacklevel=stacklevel(),
                )

    def cannot_tell(self, name: str, paths: list[Path]) -> str:
        """Says that none or several of the arguments hold a value, and what to do."""
        if paths:
            return self.several(name, [self.names(path) for path in paths])
        tensors = [self.names(path) for path, _ in strided(self.call)]
        example = tensors[0] if tensors else "argument"
        return (
            f"No argument holds the observed value of site '{name}', as a tensor or as a part, "
            "view, cast or indexed copy of one; it is computed, or comes from elsewhere, a closure "
            f"or poutine.condition, say (dense tensor arguments: {tensors}). So a dream of '{name}' "
            "can't be handed to the guide. Pass the observed value itself as an argument of model "
            f"and guide, or tell which argument stands for it with bind={{'{example}': '{name}'}} "
            "or with a function bind=(trace, args, kwargs) -> (args, kwargs)."
        )

    def several(self, name: str, arguments: list[str]) -> str:
        """Says that several arguments hold a value, and what to do."""
        return (
            f"Several arguments hold the observed value of site '{name}': {arguments}. So a dream "
            f"of '{name}' can't be handed to the guide. Pass the value once, or hand the dream "
            "over with a function bind=(trace, args, kwargs) -> (args, kwargs)."
        )


def _has_parameters(site: Site) -> bool:
    with torch.enable_grad():
        return site["fn"].log_prob(site["value"]).requires_grad


def _same_law(a: Any, b: Any, value: Tensor) -> bool:
    return bool(a.batch_shape == b.batch_shape and equal(a.log_prob(value), b.log_prob(value)))


def _same_mask(a: Any, b: Any) -> bool:
    return equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b


def _other_laws(a: Mapping[str, Law], b: Mapping[str, Law], dream: Record) -> list[str]:
    """The sites of two runs whose laws, or masks, are others at the values of a dream."""
    return [
        name
        for name, (law, mask) in a.items()
        if name in b
        and not (
            _same_law(law, b[name][0], passes.value(dream, name)) and _same_mask(mask, b[name][1])
        )
    ]


@contextmanager
def _moved(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Moves parameters a little, those that are 0 too; others keep their signs."""
    before = {leaf: leaf.detach().clone() for leaf in parameters}
    try:
        with torch.no_grad(), randomness.kept():
            for leaf in before:
                factor = 1 + torch.rand_like(leaf) / 10
                leaf.copy_(torch.where(leaf == 0, factor / 10, leaf * factor))
        yield
    finally:
        with torch.no_grad():
            for leaf, value in before.items():
                leaf.copy_(value)


def _depends_on_parameters(site: Site) -> bool:
    with torch.enable_grad():
        return site["fn"](*site["args"], **site["kwargs"]).requires_grad


class _Reads(TorchFunctionMode):
    """Notes which of some tensors are used for more than their shape, type or device."""

    METADATA = frozenset(
        "shape dtype device ndim layout requires_grad is_cuda __len__ size dim ndimension numel "
        "nelement stride is_floating_point is_complex get_device new_empty new_full new_ones "
        "new_tensor new_zeros empty_like full_like ones_like rand_like randn_like "
        "zeros_like".split()
    )

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.watched = {id(tensor) for tensor in tensors}
        self.read: set[int] = set()

    def any(self, tensors: Iterable[Tensor]) -> bool:
        """Whether any of these tensors was read."""
        return any(id(tensor) in self.read for tensor in tensors)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if name_of(func) not in self.METADATA:
            used = {id(leaf) for _, leaf in leaves((args, kwargs or {}))}
            self.read |= used & self.watched
        return func(*args, **(kwargs or {}))
