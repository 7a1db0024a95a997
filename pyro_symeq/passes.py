r"""The wake and the sleep pass over a pair of programs.

In the wake pass the guide completes the data and the model is scored, in the sleep pass the model
dreams and the guide is scored:

.. math::
    z \sim q_\varphi(z \mid x),\ \log p_\theta(x, z) \qquad\text{and}\qquad
    (x, z) \sim p_\theta(x, z),\ \log q_\varphi(z \mid x).

Both are a run of one program without a graph, whose draws are data to the run of the other that is
scored.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

from pyro_symeq.binding import Call, Program
from pyro_symeq.distributions import Implicit

Site = Any  # pyro.poutine.runtime.Message, whose keys depend on its type


class complete(Messenger):  # noqa: N801
    """Gives each unobserved site the value at hand, or else a draw, and lets no graph through."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Site) -> None:
        if msg["value"] is None:
            value = self.values.get(msg["name"])
            msg["value"] = _draw(msg) if value is None else value
            msg["done"] = True


class clamp(Messenger):  # noqa: N801
    """Gives sites the values that arguments hold, in the shape of the site's distribution."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Site) -> None:
        value = self.values.get(msg["name"])
        if msg["value"] is None and value is not None:
            shape = msg["fn"].shape()
            msg["value"] = value.reshape(shape) if value.numel() == shape.numel() else value
            msg["done"] = True


class imagine(Messenger):  # noqa: N801
    """Draws the observed sites too, and keeps in ``observed`` what was given for them.

    Factors and deterministic sites are no data and stay as they are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.observed: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Site) -> None:
        if msg["is_observed"] and not _is_computed(msg):
            self.observed[msg["name"]] = torch.as_tensor(msg["value"])
            msg.update(is_observed=False, done=False, value=None)
        if msg["value"] is None:
            msg["value"] = _draw(msg)
            msg["done"] = True


def run(program: Program, call: Call, *handlers: Messenger) -> Trace:
    """Runs a program under handlers, the last of them nearest to it, and returns the trace."""
    args, kwargs = call
    traced = poutine.trace(program)
    handled: Program = traced
    for handler in reversed(handlers):
        handled = handler(handled)
    handled(*args, **kwargs)
    return traced.trace


def dream(model: Program, call: Call) -> tuple[Trace, dict[str, Tensor]]:
    r"""Draws :math:`(x, z) \sim p_\theta(x, z)` without a graph; also tells what was observed."""
    imagination = imagine()
    with torch.no_grad():
        trace = run(model, call, imagination)
    return trace, imagination.observed


def fill_in(program: Program, call: Call, given: Mapping[str, Tensor]) -> Trace:
    """Runs a program with drawn values at its unobserved sites, except where they are given."""
    return run(program, call, complete({}), clamp(given))


def replay(program: Program, call: Call, trace: Trace) -> Trace:
    """Runs a program on the values that a trace of the other program holds."""
    return run(program, call, complete(values(trace)))


def value(trace: Trace, name: str) -> Tensor:
    """The value of a site."""
    site: Site = trace.nodes[name]
    return site["value"]


def values(trace: Trace) -> dict[str, Tensor]:
    """The values of the sample sites of a trace, by name."""
    return {
        name: value(trace, name) for name, site in trace.nodes.items() if site["type"] == "sample"
    }


def observations(trace: Trace) -> dict[str, Tensor]:
    """The values of the random variables that a program observed, by name."""
    return {name: site["value"] for name, site in sample_sites(trace) if site["is_observed"]}


def sample_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """The random variables of a trace: no plates, factors or deterministic sites."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not (site_is_subsample(site) or _is_computed(site)):
            yield name, site


def scored(trace: Trace, dream: Trace) -> list[str]:
    """The sites at which a guide is scored: what a dream holds, and what the guide observes."""
    return [name for name, site in sample_sites(trace) if name in dream or site["is_observed"]]


def parameters(trace: Trace) -> dict[str, Tensor]:
    """The unconstrained parameters that a program touched, by the name of their statement."""
    return {
        name: unconstrained(value(trace, name))
        for name, site in trace.nodes.items()
        if site["type"] == "param"
    }


def unconstrained(value: Tensor) -> Tensor:
    """The leaf behind the value of a parameter statement; a module's parameter is its own."""
    return value.unconstrained() if hasattr(value, "unconstrained") else value


def log_probs(trace: Trace, names: Iterable[str]) -> dict[str, Tensor]:
    """Sums the log-probability (nats) at each named site, scaled and masked as in Pyro's ELBO."""
    scores = {}
    for name in names:
        site: Site = trace.nodes[name]
        try:
            log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        except ValueError as error:
            raise ValueError(f"No log-probability at site '{name}': {error}") from error
        scores[name] = scale_and_mask(log_prob, site["scale"], site["mask"]).sum()
    return scores


def is_implicit(site: Site) -> bool:
    """Whether the distribution of a site, under its wrappers, has no density."""
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Implicit)


def _is_computed(site: Site) -> bool:
    return site_is_factor(site) or bool(site["infer"].get("_deterministic"))


def _draw(msg: Site) -> Tensor:
    with torch.no_grad():
        return msg["fn"](*msg["args"], **msg["kwargs"])
