r"""The wake and the sleep pass over a pair of programs.

In the wake pass the guide completes the data and the model is scored, in the sleep pass the model
dreams and the guide is scored:

.. math::
    z \sim q_\varphi(z \mid x),\ \log p_\theta(x, z) \qquad\text{and}\qquad
    (x, z) \sim p_\theta(x, z),\ \log q_\varphi(z \mid x).

Both are a run of one program without a graph, whose draws are data to the run of the other that is
scored.

Pyro splits a statement ``pyro.sample("y", ..., obs_mask=mask)`` into the sites ``y_observed`` and
``y_unobserved`` and a deterministic ``y`` that joins them. Here they count as one random variable
``y``, which is observed where the mask says so.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from pyro.distributions import Delta, Independent, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.mask_messenger import MaskMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

from pyro_symeq.binding import Call, Program
from pyro_symeq.distributions import Implicit
from pyro_symeq.provenance import UNKNOWN, Origin, follow
from pyro_symeq.tracing import (
    OBSERVED,
    UNOBSERVED,
    Record,
    Site,
    base,
    is_computed,
    run,
)

Accept = Callable[[str, Any, Tensor], Tensor]  # of a name, a distribution and a value


@dataclass(frozen=True)
class Observation:
    """What a program observed of a random variable.

    Args:
        value: The observed value.
        mask: Where it is observed, if not everywhere: broadcasts with the batch shape.
        event_dim: The number of event dimensions of the value.
        origin: Where the value comes from, as far as the arguments were followed.
    """

    value: Tensor
    mask: Tensor | None = None
    event_dim: int = 0
    origin: Origin = UNKNOWN

    def over(self, other: Tensor) -> Tensor:
        """Lays the observed elements over those of another value."""
        if self.mask is None:
            return self.value
        mask = self.mask.reshape(self.mask.shape + (1,) * self.event_dim)
        return torch.where(mask, self.value, other)


Observations = dict[str, Observation]


@dataclass(frozen=True)
class Run:
    """A run of the model.

    Args:
        trace: Its trace; in a dream, with draws in the place of what it observed.
        observed: What it was given to observe.
    """

    trace: Record
    observed: Observations


@dataclass(frozen=True)
class Term:
    """The log-probability at a site, before it is scaled, masked and summed.

    Args:
        site: The site.
        log_prob: The log-probability (nats), with the batch shape of the site.
        mask: Where it counts, if not everywhere.
    """

    site: Site
    log_prob: Tensor
    mask: Tensor | bool | None


class complete:  # noqa: N801
    """Gives each unobserved site the value at hand, or else a draw, and lets no graph through."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.values = values

    def __call__(self, msg: Site) -> None:  # noqa: D102
        if msg["value"] is None:
            name = msg["name"]
            value = self.values.get(name, self.values.get(name.removesuffix(UNOBSERVED)))
            msg["value"] = _draw(msg) if value is None else value
            msg["done"] = True


class clamp:  # noqa: N801
    """Gives sites the values that were observed, in the shape of the site's distribution."""

    def __init__(self, given: Mapping[str, Observation]) -> None:
        self.given = given

    def __call__(self, msg: Site) -> None:  # noqa: D102
        given = self.given.get(msg["name"])
        if msg["value"] is None and given is not None:
            value = given.value if given.mask is None else given.over(_draw(msg))
            msg["value"] = _shaped(value, msg["fn"].shape())
            msg["done"] = True


class imagine:  # noqa: N801
    """Draws the observed sites too, and keeps in ``observed`` what was given for them.

    Factors and deterministic sites are no data and stay as they are.
    """

    def __init__(self) -> None:
        self.observed: dict[str, Tensor] = {}

    def __call__(self, msg: Site) -> None:  # noqa: D102
        if msg["is_observed"] and not is_computed(msg):
            self.observed[msg["name"]] = torch.as_tensor(msg["value"])
            msg.update(is_observed=False, done=False, value=None)
        if msg["value"] is None:
            msg["value"] = _draw(msg)
            msg["done"] = True


class fix:  # noqa: N801
    """Gives sites their values, also where the program observes others.

    A split site is given both of its parts, and a plate the rows that it is to choose.

    Args:
        values: The values by name.
        accept: Makes the value of a site of what was given for it, or refuses that.

    Attributes:
        choosing: The plates that are left to choose their rows.
    """

    def __init__(self, values: Mapping[str, Tensor], accept: Accept) -> None:
        self.values = values
        self.accept = accept
        self.choosing: set[str] = set()

    def __call__(self, msg: Site) -> None:  # noqa: D102
        name = msg["name"]
        if site_is_subsample(msg) and msg["value"] is None and name not in self.values:
            self.choosing.add(name)
        if name not in self.values and isinstance(_PYRO_STACK[-1], MaskMessenger):
            name = name.removesuffix(OBSERVED).removesuffix(UNOBSERVED)
        if name in self.values:
            value = self.values[name].detach()
            if not site_is_subsample(msg):
                value = self.accept(name, msg["fn"], value)
            msg.update(value=value, is_observed=False, done=True)


def dream(model: Program, call: Call, like: Record | None = None, followed: bool = False) -> Run:
    """Runs the model without a graph, with its observations drawn instead of given.

    Args:
        model: The decoder's program.
        call: Its arguments.
        like: A trace of the model, whose latents take the place of draws.
        followed: Whether to find out where the observed values come from.
    """
    imagination, follower = imagine(), follow(call) if followed else None
    latents = {} if like is None else values(like)
    with torch.no_grad(), follower or nullcontext():
        trace = run(model, call, complete(latents), imagination)
    observed = _observations(trace, imagination.observed)
    if follower is not None:
        observed = {
            n: replace(seen, origin=follower.origin(seen.value)) for n, seen in observed.items()
        }
    return Run(trace, observed)


def fill_in(
    program: Program,
    call: Call,
    given: Mapping[str, Observation],
    rows: Mapping[str, Tensor] | None = None,
) -> Record:
    """Runs a program with drawn values at its unobserved sites, except where they are given.

    Args:
        program: A program.
        call: Its arguments.
        given: What was observed of some of its sites.
        rows: The subsamples of plates that are not to be drawn.
    """
    return run(program, call, clamp(given), complete(rows or {}))


def sample(program: Program, call: Call, given: fix) -> Record:
    """Runs a program and draws all its random variables, observed ones too, but those given."""
    return run(program, call, given, imagine())


def observe(program: Program, call: Call, given: fix) -> Record:
    """Runs a program on what it observes and what is given; what else it samples is drawn."""
    return run(program, call, given, complete({}))


def replay(program: Program, call: Call, values: Mapping[str, Tensor]) -> Record:
    """Runs a program on the values that a trace of the other program holds."""
    return run(program, call, complete(values))


def value(trace: Record, name: str) -> Tensor:
    """The value of a site."""
    site: Site = trace.nodes[name]
    return site["value"]


def values(trace: Record) -> dict[str, Tensor]:
    """The values of the sample sites of a trace, by name."""
    found = {n: site["value"] for n, site in trace.nodes.items() if site["type"] == "sample"}
    return found | {name + UNOBSERVED: found[name] for name in trace.split}


def subsamples(trace: Record) -> dict[str, Tensor]:
    """The rows that plates have chosen, by the name of the plate."""
    return {name: site["value"] for name, site in trace.subsamples.items()}


def chosen_rows(trace: Record) -> dict[str, Tensor]:
    """The rows that plates have chosen out of more, by the name of the plate."""
    return {
        name: site["value"]
        for name, site in trace.subsamples.items()
        if len(site["value"]) < site["fn"].size
    }


def left_out(trace: Record) -> Iterator[tuple[Tensor, int]]:
    """The rows that subsampled plates have chosen, and out of how many."""
    for name, index in chosen_rows(trace).items():
        yield index, trace.subsamples[name]["fn"].size


def subsampled_plates(site: Site) -> set[str]:
    """The plates around a site that leave out rows."""
    frames = site["cond_indep_stack"]
    return {f.name for f in frames if f.full_size is not None and f.size < f.full_size}


def counted_sites(trace: Record) -> Iterator[tuple[str, Site]]:
    """The random variables of a trace, without those that are only a means to draw others."""
    for name, site in trace.variables.items():
        if not (site["infer"] or {}).get("is_auxiliary"):
            yield name, site


def drawn(trace: Record) -> dict[str, Tensor]:
    """The values of the random variables that count, by name."""
    return {name: value(trace, name) for name, _ in counted_sites(trace)}


def factors(trace: Record) -> list[str]:
    """The names of the ``pyro.factor`` statements of a trace."""
    return [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and site_is_factor(site)
    ]


def observations(trace: Record) -> Observations:
    """What a program observed of its random variables, by name."""
    return _observations(
        trace,
        {n: value(trace, n) for n, site in trace.nodes.items() if site.get("is_observed")},
    )


def observed(trace: Record) -> frozenset[str]:
    """The random variables that a program observed, all or in part."""
    return frozenset(name for name, site in trace.variables.items() if site["is_observed"])


def _observations(trace: Record, observed: Mapping[str, Tensor]) -> Observations:
    split = trace.split
    return {
        name: Observation(observed[part], split.get(name), site["fn"].event_dim)
        for name, site in trace.variables.items()
        if (part := site["name"]) in observed
    }


def unobserved(trace: Record, given: Iterable[str]) -> list[str]:
    """The random variables that were drawn, all or in part: neither observed nor given."""
    split, known = trace.split, set(given)
    return [
        name
        for name, site in counted_sites(trace)
        if name not in known and (name in split or not site["is_observed"])
    ]


def plate_nesting(trace: Record) -> int:
    """The number of batch dimensions that plates take up."""
    frames = (f for site in trace.nodes.values() for f in site.get("cond_indep_stack", ()))
    return max((-frame.dim for frame in frames if frame.dim is not None), default=0)


def scored(trace: Record, dream: Record) -> list[str]:
    """The variables at which a guide is scored: those of a dream, and what the guide observes."""
    return [name for name, site in trace.variables.items() if name in dream or site["is_observed"]]


def log_probs(
    trace: Record, names: Iterable[str], masks: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Sums log-probabilities (nats), scaled and masked as in Pyro's ELBO.

    Args:
        trace: A trace.
        names: Its random variables and factors that count.
        masks: Where some of them count, if not everywhere.
    """
    counted = _counted(trace, names, masks or {})
    return {site["name"]: _log_prob_sum(site, mask) for site, mask in counted}


def terms(trace: Record, names: Iterable[str], masks: Mapping[str, Tensor]) -> Iterator[Term]:
    """The log-probabilities at random variables and factors, see :func:`log_probs`."""
    for site, mask in _counted(trace, names, masks):
        yield Term(site, _log_prob(site), mask)


def _counted(
    trace: Record, names: Iterable[str], masks: Mapping[str, Tensor]
) -> Iterator[tuple[Site, Tensor | bool | None]]:
    """The sites behind random variables and factors, and where they count."""
    split = trace.split
    for name in names:
        for part in (name + OBSERVED, name + UNOBSERVED) if name in split else (name,):
            site = trace.nodes[part]
            mask = site["mask"]
            if name in masks:
                mask = masks[name] if mask is None else masks[name] & mask
            yield site, mask


def _log_prob(site: Site) -> Tensor:
    """The log-probability at a site, with its batch shape."""
    log_prob, num_dims = _elements(site)
    return _sum(log_prob, num_dims) if num_dims else log_prob


def _log_prob_sum(site: Site, mask: Tensor | bool | None) -> Tensor:
    scale = site["scale"]
    if mask is not None or isinstance(scale, Tensor):
        return _sum(scale_and_mask(_log_prob(site), scale, mask))
    return scale_and_mask(_sum(_elements(site)[0]), scale)


def _elements(site: Site) -> tuple[Tensor, int]:
    """The log-probabilities of independent parts, and over how many dimensions they are parts."""
    fn, num_dims = site["fn"], 0
    while isinstance(fn, Independent):
        num_dims += fn.reinterpreted_batch_ndims
        fn = fn.base_dist
    try:
        log_prob = fn.log_prob(site["value"], *site["args"], **site["kwargs"])
    except ValueError as error:
        raise ValueError(f"No log-probability at site '{site['name']}': {error}") from error
    except (KeyError, NotImplementedError) as error:
        if not _is_transformed(fn):
            raise
        raise ValueError(
            f"No log-probability at site '{site['name']}' of values that its law did not draw: a "
            f"transform has no inverse ({error}). Each program is scored at draws of the other. "
            "Take transforms with an inverse, such as affine or spline flows, autoregressive or "
            "coupling."
        ) from error
    if log_prob.numel() != math.prod(fn.batch_shape):
        raise ValueError(
            f"The value at site '{site['name']}' has shape {tuple(site['value'].shape)} and its "
            f"law has shape {tuple(site['fn'].shape())}, so the two would broadcast and count "
            "several times. Give data the shape of their law; check with "
            "poutine.trace(model).get_trace(...).format_shapes()."
        )
    return log_prob, num_dims


def _sum(log_prob: Tensor, num_dims: int | None = None) -> Tensor:
    """Sums over the last dimensions, or over all, in single precision at least."""
    is_coarse = log_prob.dtype in (torch.float16, torch.bfloat16)
    dims = None if num_dims is None else tuple(range(-num_dims, 0))
    return log_prob.sum(dims, dtype=torch.float32 if is_coarse else None)


def counting(site: Site) -> Tensor | None:
    """Which elements of the value of a site count, that is, are not masked; all of them if None."""
    fn, mask = site["fn"], site["mask"]
    masks = [(mask, fn.event_dim)]
    while isinstance(fn, (Independent, MaskedDistribution)):
        fn, mask = fn.base_dist, getattr(fn, "_mask", None)
        masks.append((mask, fn.event_dim))
    elements = [m.reshape(m.shape + (1,) * n) for m, n in masks if isinstance(m, Tensor)]
    return reduce(torch.logical_and, elements) if elements else None


def in_support(fn: Any, value: Tensor) -> bool:
    """Whether a value lies in the support of a distribution, as far as that is known."""
    try:
        return bool(fn.support.check(value).all())
    except NotImplementedError:
        return True


def is_implicit(site: Site) -> bool:
    """Whether the distribution of a site, under its wrappers, has no density."""
    return isinstance(base(site["fn"]), Implicit)


def _is_transformed(fn: Any) -> bool:
    """Whether a distribution, under its wrappers, transforms draws of another."""
    while not hasattr(fn, "transforms") and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return hasattr(fn, "transforms")


def is_point(site: Site) -> bool:
    """Whether the distribution of a site has all its mass at a point."""
    return isinstance(base(site["fn"]), Delta)


def _shaped(value: Tensor, shape: torch.Size) -> Tensor:
    if value.numel() == shape.numel():
        return value.reshape(shape)
    try:
        return value.expand(shape)
    except RuntimeError:
        return value


def _draw(msg: Site) -> Tensor:
    """Draws without a graph."""
    if not torch.is_grad_enabled():
        return _sampled(msg)
    with torch.no_grad():
        return _sampled(msg)


def _sampled(msg: Site) -> Tensor:
    """A draw, detached: a tensor that no transform has in its cache."""
    try:
        return msg["fn"](*msg["args"], **msg["kwargs"]).detach()
    except NotImplementedError as error:
        raise ValueError(
            f"No draws at site '{msg['name']}': its law can't be sampled ({error}). Dreams "
            "are draws of all sites of the model: check the law, and the type of its parameters."
        ) from error
