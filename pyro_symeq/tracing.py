"""Runs of programs, traced by one handler.

A handler costs time at each statement of a program, and so does each look at a trace. So one
handler does all that a pass has to do at a sample site, and a trace sorts its sites once.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.poutine import Trace
from pyro.poutine.mask_messenger import MaskMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceHandler, TraceMessenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, Transform

from pyro_symeq.binding import Call, Program, leaves, own

Site = Any  # pyro.poutine.runtime.Message, whose keys depend on its type
Act = Callable[[Site], None]  # what a pass does at a sample site, before its value is there

OBSERVED, UNOBSERVED, OBS_MASK = "_observed", "_unobserved", "_obs_mask"


class Record(Trace):
    """The trace of a run that is over."""

    nodes: OrderedDict[str, Site]

    @cached_property
    def split(self) -> dict[str, Tensor]:
        """The random variables that are split by ``obs_mask=``, with their masks."""
        masks = {}
        for part, site in self.nodes.items():
            if part.endswith(OBSERVED) and OBS_MASK in site["infer"]:
                name = part.removesuffix(OBSERVED)
                if name in self.nodes and name + UNOBSERVED in self.nodes:
                    masks[name] = site["infer"][OBS_MASK]
        return masks

    @cached_property
    def variables(self) -> dict[str, Site]:
        """The random variables by name: no plates, factors or deterministic sites.

        The site of one that is split is its observed part.
        """
        parts = {name + part for name in self.split for part in (OBSERVED, UNOBSERVED)}
        variables = {}
        for name, site in self.nodes.items():
            if name in self.split:
                variables[name] = self.nodes[name + OBSERVED]
            elif site["type"] == "sample" and name not in parts:
                if not (site_is_subsample(site) or is_computed(site)):
                    variables[name] = site
        return variables

    @cached_property
    def subsamples(self) -> dict[str, Site]:
        """The plates that have chosen rows, be it all of them, by name."""
        return {
            name: site
            for name, site in self.nodes.items()
            if site["type"] == "sample" and site_is_subsample(site)
        }

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """The unconstrained parameters that the program touched, by the name of their statement."""
        return {
            name: unconstrained(site["value"])
            for name, site in self.nodes.items()
            if site["type"] == "param"
        }


class act_and_trace(TraceMessenger):  # noqa: N801
    """Acts at each sample site in turn, and traces the run."""

    def __init__(self, *acts: Act) -> None:
        super().__init__()
        self.acts = acts

    def __enter__(self) -> "act_and_trace":
        super().__enter__()
        self.trace: Record = Record()
        return self

    def _process_message(self, msg: Site) -> None:
        if msg["type"] == "sample":
            _note_obs_mask(msg)
            for act in self.acts:
                act(msg)

    def _postprocess_message(self, msg: Site) -> None:
        if msg["type"] == "sample":
            self._pyro_post_sample(msg)
        elif msg["type"] == "param":
            self._pyro_post_param(msg)


def run(program: Program, call: Call, *acts: Act) -> Record:
    """Runs a program, acts at each of its sample sites in turn, and returns the trace.

    The program gets containers of its own: what it leaves there is seen by no other run.
    """
    args, kwargs = own(call)
    tracer = act_and_trace(*acts)
    torch.clear_autocast_cache()  # of parameters before a move, or cast without a graph
    TraceHandler(tracer, program)(*args, **kwargs)
    return tracer.trace


def unconstrained(value: Tensor) -> Tensor:
    """The leaf behind the value of a parameter statement; a module's parameter is its own."""
    return value.unconstrained() if hasattr(value, "unconstrained") else value


def base(fn: Any) -> Any:
    """The distribution under its wrappers."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def tensors(law: Any) -> Iterator[Tensor]:
    """The tensors that a distribution, or a transform in it, is made of."""
    for _, part in leaves(vars(law)):
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, (Distribution, Transform)):
            yield from tensors(part)


def is_computed(site: Site) -> bool:
    """Whether a site is no random variable but a factor, or computed from others."""
    return site_is_factor(site) or _is_deterministic(site)


def _is_deterministic(site: Site) -> bool:
    """Whether a site is a ``pyro.deterministic`` or what ``poutine.reparam`` puts for a variable."""
    fn = site.get("fn")
    return isinstance(fn, MaskedDistribution) and fn._mask is False and isinstance(base(fn), Delta)


def _note_obs_mask(msg: Site) -> None:
    """Keeps the ``obs_mask=`` of a split site, to which other masks are added later."""
    nearest = _PYRO_STACK[-1]
    if isinstance(nearest, MaskMessenger) and msg["name"].endswith(OBSERVED):
        msg["infer"] = {**(msg["infer"] or {}), OBS_MASK: nearest.mask}
