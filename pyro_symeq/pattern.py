"""Patterns of observation: which sites a batch observes, and which arguments hold them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from torch import Tensor

from pyro_symeq import passes
from pyro_symeq.binding import (
    Call,
    Names,
    Path,
    equal,
    get,
    is_part,
    put,
    same_memory,
    substitute,
)

NEVER_SAMPLES = (
    "The guide never samples {sites}, which the model does. Sample these sites in the guide too, "
    "or observe them in the model."
)


@dataclass(frozen=True)
class Pattern:
    """Which sites a kind of batch observes, and how a dream of them is handed to the guide.

    Args:
        observed: The sites that the model observes.
        latents: Those of them that the guide samples too; there the guide is clamped.
        missing: The data sites that the batch lacks.
        supervised: The sites at which the guide can be scored at the data: the observed latents,
            and what the guide observes itself.
        is_complete: Whether no latent is left for the guide to draw.
        arguments: The path to the argument that holds the value of a site.
        copies: The sites whose value is a copy of the argument, such as a cast.
        dtypes: The type in which the model observes a site.
        names: Writes paths as a user does.
        bind: The user's own way to hand a dream to the guide.
    """

    observed: frozenset[str]
    latents: frozenset[str]
    missing: frozenset[str]
    supervised: frozenset[str]
    is_complete: bool
    arguments: Mapping[str, Path]
    copies: frozenset[str]
    dtypes: Mapping[str, torch.dtype]
    names: Names = field(repr=False)
    bind: Callable[..., Call] | None = None

    @property
    def lacks_data(self) -> bool:
        """Whether only latents are observed, so that data must be drawn for them."""
        return bool(self.missing) and self.observed == self.latents

    def given(self, call: Call) -> dict[str, Tensor]:
        """The observed latents, as the arguments hold them."""
        return {
            name: get(call, self.arguments[name]).to(self.dtypes[name]) for name in self.latents
        }

    def fits(self, observed: Mapping[str, Tensor], call: Call) -> bool:
        """Whether the model observed the sites of this pattern, from the same arguments."""
        return observed.keys() == self.observed and all(
            _still_holds(get(call, path), observed[name], name in self.copies)
            for name, path in self.arguments.items()
            if name in observed
        )

    def check_finite(self, call: Call) -> None:
        """Checks the observed values.

        Raises:
            ValueError: Some are NaN or infinite.
        """
        for name, path in self.arguments.items():
            bad = (~torch.isfinite(get(call, path))).sum().item()
            if bad:
                raise ValueError(
                    f"The observed value of site '{name}' is not finite: {bad} elements of the "
                    f"argument '{self.names(path)}' are NaN or infinite. Clean the data, or mask "
                    "what is missing."
                )

    def hand_over(self, dream: Trace, observed: Mapping[str, Tensor], call: Call) -> Call:
        """Puts dreamed values in the place of the observed ones, in copies of the containers.

        Args:
            dream: The trace of the model.
            observed: What the model observed in that run, by site.
            call: The arguments that it observed.

        Raises:
            ValueError: A dreamed value does not fit its argument.
        """
        if self.bind is not None:
            return self.bind(dream, *call)
        dreamed_call = call
        for name, path in self.arguments.items():
            leaf, dreamed = get(call, path), passes.value(dream, name)
            fitted: Tensor | None = dreamed
            if leaf is not None:
                fitted = substitute(leaf, observed[name], dreamed, get(dreamed_call, path))
            if fitted is None:
                raise ValueError(
                    f"The model dreams site '{name}' with shape {tuple(dreamed.shape)}, which "
                    f"does not fit the argument '{self.names(path)}' with shape "
                    f"{tuple(leaf.shape)}. Let the model draw as much as it observes (check its "
                    "plates and event dimensions), or pass bind=, a function "
                    "(trace, args, kwargs) -> (args, kwargs)."
                )
            dreamed_call = put(dreamed_call, path, fitted)
        return dreamed_call

    def check_completed(self, trace: Trace, completion: Trace) -> None:
        """Checks that the guide gave a value to each site that the model did not observe.

        Raises:
            ValueError: A latent is missing from the guide.
        """
        forgotten = [
            name
            for name, site in passes.sample_sites(trace)
            if not (site["is_observed"] or name in completion or name in self.missing)
        ]
        if forgotten:
            raise ValueError(NEVER_SAMPLES.format(sites=forgotten))

    def check_dreamed(self, dream: Trace, trace: Trace) -> None:
        """Checks that the guide samples the latents of a dream, and nothing else that counts.

        Raises:
            ValueError: A latent is missing from the guide, or the model lacks a site of the guide.
        """
        sampled = dict(passes.sample_sites(trace))
        known = self.observed | self.missing | sampled.keys()
        if forgotten := [name for name, _ in passes.sample_sites(dream) if name not in known]:
            raise ValueError(NEVER_SAMPLES.format(sites=forgotten))
        extra = [
            name
            for name, site in sampled.items()
            if name not in dream and not site["infer"].get("is_auxiliary")
        ]
        if extra:
            raise ValueError(
                f"The guide samples {extra}, which the model doesn't. Sample these sites in the "
                "model too, or mark them with infer={'is_auxiliary': True}."
            )
        if not passes.scored(trace, dream):
            raise ValueError(
                "The guide samples no latent of the model, so there is nothing to score it at. "
                "Sample the model's latents in the guide."
            )


def _still_holds(leaf: object, value: Tensor, is_copy: bool) -> bool:
    """Compares memory; of a copy, the elements, which costs a read and is for validation only."""
    if not isinstance(leaf, Tensor):
        return False
    if not is_copy:
        return same_memory(leaf, value) or is_part(leaf, value)
    return leaf.numel() == value.numel() and (not is_validation_enabled() or equal(leaf, value))
