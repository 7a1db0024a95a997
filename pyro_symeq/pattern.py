"""Patterns of observation: which sites a batch observes, and which arguments hold them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_symeq import passes
from pyro_symeq.binding import (
    Call,
    Kind,
    Names,
    Path,
    close,
    copied,
    equal,
    get,
    is_part,
    put,
    same_memory,
    substitute,
)
from pyro_symeq.nonfinite import NotFiniteError
from pyro_symeq.passes import Observation, Observations, Run
from pyro_symeq.provenance import Picks, put_back, subsampled_dim, take
from pyro_symeq.tracing import UNOBSERVED, Record

NEVER_SAMPLES = (
    "The guide never samples {sites}, which the model does. Sample these sites in the guide too, "
    "or observe them in the model."
)


@dataclass(frozen=True)
class Place:
    """The argument that holds the value of a site.

    Args:
        path: The path to the argument.
        kind: Whether the value is the argument itself, or a view of all of it; a view of a part; a
            copy of all of it, such as a cast; a copy of a part, picked by a subsample, say; or
            computed from an argument, which stands for it by the user's word.
        dtype: The type of the value.
    """

    path: Path
    kind: Kind
    dtype: torch.dtype

    def still_holds(self, leaf: object, observation: Observation) -> bool:
        """Compares memory; of a copy, the elements, which costs a read.

        That is for validation, and where the dimensions are in another order.
        """
        value = observation.value
        if not isinstance(leaf, Tensor):
            return False
        if self.kind == "pick":
            return not observation.origin.paths or observation.origin.path == self.path
        if self.kind in ("copy", "told"):
            is_fit = leaf.numel() == value.numel()
            return is_fit and (not self._is_read(leaf, value) or equal(leaf, value))
        return same_memory(leaf, value) or (self.kind == "view" and is_part(leaf, value))

    def _is_read(self, leaf: Tensor, value: Tensor) -> bool:
        """Whether elements are compared; a graph that records steps of one shape can't read."""
        if self.kind == "told" or (leaf.is_cuda and torch.cuda.is_current_stream_capturing()):
            return False
        return is_validation_enabled() or _is_turned(leaf, value)


@dataclass(frozen=True)
class Pattern:
    """Which sites a kind of batch observes, and how a dream of them is handed to the guide.

    Args:
        observed: The sites that the model observes.
        latents: Those of them that the guide samples too; there the guide is clamped.
        masked: Those that are observed in part (``obs_mask=``).
        filled: Those of them whose other part the guide samples under Pyro's name for it, as for
            ``SVI``.
        missing: The data sites that the batch lacks.
        is_subsampled: Whether plates leave out rows.
        is_supervised: Whether the guide can be scored at the data: at observed latents, or at what
            it observes itself.
        guided: The sites at which the guide itself observes something.
        real: Those of them at which that stays real in dreams.
        places: The arguments that hold the values of sites. Observed latents may lack one.
        names: Writes paths as a user does.
        bind: The user's own way to hand a dream to the guide.
    """

    observed: frozenset[str]
    latents: frozenset[str]
    masked: frozenset[str]
    filled: frozenset[str]
    missing: frozenset[str]
    is_subsampled: bool
    is_supervised: bool
    places: Mapping[str, Place]
    names: Names = field(repr=False)
    bind: Callable[..., Call] | None = None
    guided: frozenset[str] = frozenset()
    real: frozenset[str] = frozenset()

    @property
    def lacks_data(self) -> bool:
        """Whether only latents are observed, so that data must be drawn for them."""
        return bool(self.missing) and self.observed == self.latents

    @property
    def is_followed(self) -> bool:
        """Whether only following its arguments tells what the model observes of them."""
        kinds = {place.kind for place in self.places.values()}
        return "pick" in kinds or (self.is_subsampled and "view" in kinds)

    def given(self, call: Call) -> Observations | None:
        """The observed latents, if they can be read off the arguments."""
        whole = {n for n, place in self.places.items() if place.kind in ("itself", "copy")}
        if not self.latents <= whole - self.masked:
            return None
        places = {name: self.places[name] for name in self.latents}
        return {n: Observation(get(call, p.path).to(p.dtype)) for n, p in places.items()}

    def fits(self, run: Run, call: Call) -> bool:
        """Whether a run of the model observed sites of this pattern alone, as it says and where."""
        drawn = {name for name in run.trace.variables} - run.observed.keys()
        masked = {name for name, seen in run.observed.items() if seen.mask is not None}
        if drawn & self.observed or not (masked <= self.masked and self.knows(run)):
            return False
        return all(
            place.still_holds(get(call, place.path), run.observed[name])
            for name, place in self.places.items()
            if name in run.observed
        )

    def knows(self, run: Run) -> bool:
        """Whether a run observed no other sites."""
        return run.observed.keys() <= self.observed

    def extended(self, other: "Pattern", run: Run) -> "Pattern":
        """Adds what another run has shown, which is right about its own sites."""
        seen = {name for name in run.trace.variables}
        return replace(
            other,
            observed=self.observed - seen | other.observed,
            latents=self.latents - seen | other.latents,
            masked=self.masked - seen | other.masked,
            filled=self.filled - seen | other.filled,
            missing=self.missing - seen | other.missing,
            is_subsampled=self.is_subsampled or other.is_subsampled,
            is_supervised=self.is_supervised or other.is_supervised,
            guided=self.guided | other.guided,
            real=self.real | other.real,
            places={**self.places, **other.places},
        )

    def check_finite(self, call: Call) -> None:
        """Checks the observed values.

        Raises:
            ValueError: Some are NaN or infinite.
        """
        for name, place in self.places.items():
            leaf = get(call, place.path)
            if name in self.masked or not isinstance(leaf, Tensor):
                continue
            if bad := (~torch.isfinite(leaf)).sum().item():
                raise NotFiniteError(
                    f"The observed value of site '{name}' is not finite: {bad} elements of the "
                    f"argument '{self.names(place.path)}' are NaN or infinite. Clean the data, or "
                    "mask what is missing."
                )

    def hand_over(self, dream: Run, call: Call) -> Call:
        """Puts dreamed values in the place of the observed ones, in copies of the containers.

        Args:
            dream: A dream, in whose run the model observed these arguments.
            call: The arguments.

        Raises:
            ValueError: A dreamed value does not fit its argument, or the dream lacks it.
        """
        if self.bind is not None:
            return self.bind(dream.trace, *call)
        dreamed_call = call
        for path, names in self._names_by_path().items():
            if get(call, path) is None:
                filled = passes.value(dream.trace, names[-1])
            else:
                filled = self._fill(get(call, path), path, names, dream)
            dreamed_call = put(dreamed_call, path, filled)
        return dreamed_call

    def _names_by_path(self) -> dict[Path, list[str]]:
        paths: dict[Path, list[str]] = {}
        for name, place in self.places.items():
            paths.setdefault(place.path, []).append(name)
        return paths

    def _fill(self, leaf: Tensor, path: Path, names: list[str], dream: Run) -> Tensor:
        """A tensor like an argument, with dreamed values in the place of all observed ones.

        Raises:
            ValueError: The dream lacks sites, and real data would be left.
        """
        present = [name for name in names if name in dream.trace]
        filled = self._filled(leaf, leaf, path, present, dream)
        origins = [dream.observed[name].origin for name in present]
        chains = [origin.picks for origin in origins if origin.path == path]
        if rows := list(_dreamed_rows(leaf, chains, dream.trace)):
            for dim, index in rows:
                filled = filled.index_select(dim, index)
            return filled
        absent = [name for name in names if name not in present and name not in self.latents]
        if absent and not self._is_covered(leaf, path, present, dream):
            raise ValueError(
                f"A dream of the model lacks the sites {absent}, whose data the argument "
                f"'{self.names(path)}' holds, so the guide would be given real data beside dreamed "
                "latents. Let the model sample these sites in every run (poutine.mask leaves out "
                "what doesn't count), or pass bind=, a function (trace, args, kwargs) -> (args, "
                "kwargs)."
            )
        return filled

    def _filled(
        self, leaf: Tensor, into: Tensor, path: Path, names: list[str], dream: Run
    ) -> Tensor:
        """A copy of a tensor, with the dreamed values of some sites where a leaf holds them."""
        filled = into
        for name in names:
            seen, dreamed = dream.observed[name], self._dreamed(name, path, dream)
            self._check_range(name, path, dreamed, leaf.dtype)
            if self.places[name].kind == "pick" and seen.origin.path == path:
                filled = copied(filled) if filled is into else filled
                put_back(filled, seen.origin.picks, dreamed)
                if is_validation_enabled() and not close(take(filled, seen.origin.picks), dreamed):
                    raise ValueError(
                        f"The model observes some elements of the argument '{self.names(path)}' "
                        f"twice at site '{name}' and dreams other values each time, which don't "
                        "both fit into it. Choose rows without replacement, or before the step."
                    )
            elif (fitted := substitute(leaf, seen.value, dreamed, filled)) is not None:
                filled = fitted
            else:
                raise self._misfit(name, path, dreamed, leaf)
        return filled

    def _is_covered(self, leaf: Tensor, path: Path, names: list[str], dream: Run) -> bool:
        """Whether the dreamed values of some sites fill all of a leaf, whatever was there."""
        backgrounds = (torch.full_like(leaf, x) for x in (0, 1))
        return equal(*(self._filled(leaf, into, path, names, dream) for into in backgrounds))

    def _dreamed(self, name: str, path: Path, dream: Run) -> Tensor:
        """The dreamed value of a site; of data that are missing in part, only the other part."""
        seen, dreamed = dream.observed[name], passes.value(dream.trace, name)
        if dreamed.numel() != seen.value.numel():
            raise self._misfit(name, path, dreamed, seen.value)
        return dreamed if name in self.latents else replace(seen, value=dreamed).over(seen.value)

    def _check_range(self, name: str, path: Path, dreamed: Tensor, dtype: torch.dtype) -> None:
        """Checks that an argument of integers can hold a dream; costs a read, for validation.

        Raises:
            ValueError: It can't.
        """
        is_integer = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
        if not is_integer or dreamed.dtype == dtype or not is_validation_enabled():
            return
        info, exact = torch.iinfo(dtype), dreamed.double()
        is_outside = ~((exact >= info.min) & (exact <= info.max))
        if is_outside.any():
            raise ValueError(
                f"Expected dreams of site '{name}' in the range of {dtype}, {info.min} to "
                f"{info.max}, the type of the argument '{self.names(path)}', got "
                f"{exact[is_outside][0].item():g}. Give the data in a wider type or as floats, or "
                "let the model draw nothing out of their range."
            )

    def _misfit(self, name: str, path: Path, dreamed: Tensor, held: Tensor) -> ValueError:
        return ValueError(
            f"The model dreams site '{name}' with shape {tuple(dreamed.shape)}, which does not "
            f"fit the argument '{self.names(path)}' with shape {tuple(held.shape)}. Let the model "
            "draw as much as it observes (check its plates and event dimensions), or pass bind=, "
            "a function (trace, args, kwargs) -> (args, kwargs)."
        )

    def check_completed(self, trace: Record, completion: Record) -> None:
        """Checks that the guide gave a value to each site that the model did not observe.

        Raises:
            ValueError: A latent is missing from the guide, or has another shape there.
        """
        forgotten = [
            name
            for name, site in trace.variables.items()
            if not (site["is_observed"] or name in completion or name in self.missing)
        ]
        if forgotten:
            raise ValueError(NEVER_SAMPLES.format(sites=forgotten))
        drawn = completion.variables
        for name, site in trace.variables.items():
            if name in drawn and not (site["is_observed"] or drawn[name]["is_observed"]):
                _check_shapes(name, site["fn"].shape(), site["value"].shape)

    def check_dreamed(self, dream: Record, trace: Record) -> None:
        """Checks that the guide samples the latents of a dream, and nothing else that counts.

        Raises:
            ValueError: A latent is missing from the guide or has another shape there, the model
                lacks a site of the guide, or the guide has factors.
        """
        sampled = dict(trace.variables.items())
        known = self.observed | self.missing | sampled.keys()
        if forgotten := [name for name in dream.variables if name not in known]:
            raise ValueError(NEVER_SAMPLES.format(sites=forgotten))
        extra = [
            name
            for name, site in passes.counted_sites(trace)
            if not (name in dream or site["is_observed"])
        ]
        if extra:
            raise ValueError(
                f"The guide samples {extra}, which the model doesn't. Sample these sites in the "
                "model too, or mark them with infer={'is_auxiliary': True}."
            )
        if factors := passes.factors(trace):
            raise ValueError(
                f"The guide has the factors {factors}, but the encoder learns from log q of its "
                "draws, to which a factor can't add. Move them to the model, or use a "
                "distribution that includes them."
            )
        if not passes.scored(trace, dream):
            raise ValueError(
                "The guide samples no latent of the model, so there is nothing to score it at. "
                "Sample the model's latents in the guide."
            )
        for name, site in dream.variables.items():
            guided = sampled.get(name + UNOBSERVED if name in self.filled else name)
            if guided is not None and hasattr(guided["fn"], "shape"):
                _check_shapes(name, site["fn"].shape(), guided["fn"].shape())


def _check_shapes(name: str, in_model: torch.Size, in_guide: torch.Size) -> None:
    """Checks that both programs draw as much at a site, apart from dimensions of size 1 in front.

    Draws that broadcast would count as often as they are repeated.

    Raises:
        ValueError: They don't.
    """
    if in_model != in_guide:
        sizes = zip_longest(reversed(in_model), reversed(in_guide), fillvalue=1)
        if any(a != b for a, b in sizes):
            raise ValueError(
                f"The site '{name}' has shape {tuple(in_model)} in the model and "
                f"{tuple(in_guide)} in the guide, so one can't be scored at draws of the other. "
                "Put it in the same plates in both programs, with distributions of the same shape."
            )


def _dreamed_rows(x: Tensor, chains: list[Picks], trace: Record) -> Iterator[tuple[int, Tensor]]:
    """Which rows of a subsampled argument to show, by dimension.

    Rows that a plate has left out hold data that nobody dreamed; others are shown instead.
    """
    for index, size in passes.left_out(trace):
        kept = index.to(x.device)
        dim = subsampled_dim(x, chains, size, kept) if chains else None
        if dim is not None:
            rows = kept[torch.arange(size, device=x.device) % len(kept)]
            rows[kept] = kept
            yield dim, rows


def _is_turned(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dimensions in another order, leaving out those of size 1."""
    sizes = [[n for n in x.shape if n > 1] for x in (a, b)]
    return sizes[0] != sizes[1] and sorted(sizes[0]) == sorted(sizes[1])
