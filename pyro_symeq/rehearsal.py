r"""What the first call with a kind of batch finds out, so that later steps need not.

A rehearsal runs both programs on the side. It learns which sites the batch observes and which argument holds each of
them, hands the guide a dream in the place of the data, and refuses a pair that cannot learn before anything moves.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_symeq import passes, randomness
from pyro_symeq.binding import (
    Call,
    Names,
    Path,
    Program,
    close,
    equal,
    find,
    fit,
    get,
    leaves,
    put,
    same_memory,
)

Bind = Mapping[str, str] | Callable[[Trace, tuple[Any, ...], dict[str, Any]], Call]

IGNORES_DATA = (
    "The guide ignores the data: it never reads the values of {arguments}. On dreams such a guide can only learn the "
    "prior p(z). Write an amortised guide, whose distributions depend on its arguments; an AutoGuide, or a guide "
    "that closes over its data, does not."
)
NEVER_SAMPLES = (
    "The guide never samples {sites}, which the model does. Sample these sites in the guide too, or observe them in "
    "the model."
)


@dataclass(frozen=True)
class Pattern:
    """Which sites a kind of batch observes, and how a dream of them is handed to the guide.

    Args:
        observed: The sites that the model observes.
        latents: Those of them that the guide samples too; there the guide is clamped.
        missing: The data sites that the batch lacks.
        arguments: The path to the argument that holds the value of a site.
        dtypes: The type in which the model observes a site.
        names: Writes paths as a user does.
        is_complete: Whether no latent is left for the guide to draw.
        bind: The user's own way to hand a dream to the guide.
    """

    observed: frozenset[str]
    latents: frozenset[str]
    missing: frozenset[str]
    arguments: Mapping[str, Path]
    dtypes: Mapping[str, torch.dtype]
    names: Names = field(repr=False)
    is_complete: bool = False
    bind: Callable[..., Call] | None = None

    @property
    def lacks_data(self) -> bool:
        """Whether only latents are observed, so that data must be drawn for them."""
        return bool(self.missing) and self.observed == self.latents

    def given(self, model: Program, call: Call) -> dict[str, Tensor]:
        """The observed latents, read from the arguments; the model is asked only where it computes them."""
        if not self.latents <= self.arguments.keys():
            with aside():
                _, seen = passes.dream(model, call)
            return {name: seen[name] for name in self.latents}
        return {
            name: get(call, self.arguments[name]).to(self.dtypes[name]) for name in self.latents
        }

    def fits(self, observed: Mapping[str, Tensor], call: Call) -> bool:
        """Whether the model observed what it did in the rehearsal, from the same arguments."""
        return observed.keys() == self.observed and all(
            _still_holds(get(call, self.arguments[name]), value)
            for name, value in observed.items()
            if name in self.arguments
        )

    def hand_over(self, dream: Trace, call: Call) -> Call:
        """Puts dreamed values in the place of the observed ones; the user's arguments stay as they are.

        Raises:
            ValueError: A dreamed value does not fit its argument.
        """
        if self.bind is not None:
            return self.bind(dream, *call)
        for name, path in self.arguments.items():
            value = dream.nodes[name]["value"]
            call = put(call, path, fit(name, value, get(call, path), self.names(path)))
        return call


def rehearse(model: Program, guide: Program, call: Call, bind: Bind | None) -> Pattern:
    """Finds the pattern of a batch.

    Parameters, module buffers and random states end as they were.

    Raises:
        ValueError: The pair cannot learn from such a batch; the message says why and what to do.
    """
    if isinstance(guide, AutoGuide):
        raise ValueError(IGNORES_DATA.format(arguments="its arguments"))
    with aside(), torch.no_grad():
        dream, seen = passes.dream(model, call)
        names = Names(model)
        arguments = _arguments(seen, dream, names, call, bind)
        draft = Pattern(
            observed=frozenset(seen),
            latents=frozenset(),
            missing=frozenset(),
            arguments={site: path for site, path in arguments.items() if site in seen},
            dtypes={site: value.dtype for site, value in seen.items()},
            names=names,
            bind=bind if callable(bind) else None,
        )
        pattern = _cast(draft, model, guide, dream, call, arguments)
        _refuse_wrong_pairing(pattern, model, dream, call)
        _refuse_unlearnable(pattern, guide, dream, call)
        _refuse_blind(pattern, model, guide, dream, call)
    return pattern


def _arguments(
    seen: Mapping[str, Tensor], dream: Trace, names: Names, call: Call, bind: Bind | None
) -> dict[str, Path]:
    """The path to each observed site's value: the user's word or else the one leaf that holds it."""
    told = _told(bind, dream, names, call) if isinstance(bind, Mapping) else {}
    found = {site: find(value, call) for site, value in seen.items() if site not in told}
    if not callable(bind):
        for site, paths in found.items():
            if len(paths) != 1:
                raise ValueError(_cannot_tell(site, [names(path) for path in paths], names, call))
    return told | {site: paths[0] for site, paths in found.items() if len(paths) == 1}


def _told(bind: Mapping[str, str], dream: Trace, names: Names, call: Call) -> dict[str, Path]:
    """Translates ``{argument: site}`` into paths."""
    paths = {names(path): path for path, _ in leaves(call)}
    paths |= {names(path): path for path in names.absent(call)}
    sites = {name for name, _ in passes.sample_sites(dream)}
    for argument, site in bind.items():
        if argument not in paths:
            raise ValueError(f"bind= names the argument '{argument}'; there are {sorted(paths)}.")
        if site not in sites:
            raise ValueError(f"bind= names the site '{site}'; the model samples {sorted(sites)}.")
    return {site: paths[argument] for argument, site in bind.items()}


def _cannot_tell(site: str, holders: list[str], names: Names, call: Call) -> str:
    tensors = [names(path) for path, leaf in leaves(call) if isinstance(leaf, Tensor)]
    problem = (
        f"Several arguments hold the observed value of site '{site}': {holders}"
        if holders
        else f"No argument holds the observed value of site '{site}' as a tensor, a view, a reshape or a cast of it "
        f"(tensor arguments: {tensors})"
    )
    return (
        f"{problem}. A dream of '{site}' can't be handed to the guide. Pass the observed value itself as an argument "
        f"of model and guide, or tell with bind={{'{(holders or tensors or ['argument'])[0]}': '{site}'}} which "
        "argument stands for it, or with a function bind=(trace, args, kwargs) -> (args, kwargs)."
    )


def _cast(
    draft: Pattern,
    model: Program,
    guide: Program,
    dream: Trace,
    call: Call,
    arguments: Mapping[str, Path],
) -> Pattern:
    """Finds out which sites are latent, which are data, and which data are missing."""
    absent = list(draft.names.absent(call))
    drawn = [name for name, _ in passes.sample_sites(dream) if name not in draft.observed]
    try:
        sites = _guide_sites(guide, draft, dream, call)
    except Exception:
        if not absent:
            raise
        sites = set()  # the guide may fail for want of missing data
    fillable = {
        site: paths
        for site in drawn
        if site not in sites
        and (paths := _vacancies(site, model, dream, call, absent, arguments))
    }
    if ambiguous := [site for site, paths in fillable.items() if len(paths) > 1]:
        site = ambiguous[0]
        holders = [draft.names(path) for path in fillable[site]]
        raise ValueError(_cannot_tell(site, holders, draft.names, call))
    vacancies = {site: paths[0] for site, paths in fillable.items()}
    if not sites:
        full = replace(draft, arguments={**draft.arguments, **vacancies})
        sites = _guide_sites(guide, full, dream, call)
    pattern = replace(
        draft,
        latents=frozenset(draft.observed & sites),
        missing=frozenset(vacancies.keys() - sites),
        is_complete=set(drawn) <= vacancies.keys() - sites,
    )
    if pattern.lacks_data:
        pattern = replace(pattern, arguments={**draft.arguments, **vacancies})
        if unknown := [site for site in drawn if site not in pattern.missing]:
            raise ValueError(
                f"The batch lacks {sorted(pattern.missing)} and doesn't give {unknown} either: without data the "
                "guide can't complete it. Give all latents or some data."
            )
    return pattern


def _guide_sites(guide: Program, pattern: Pattern, dream: Trace, call: Call) -> set[str]:
    trace = passes.replay(guide, pattern.hand_over(dream, call), dream)
    return {name for name, _ in passes.sample_sites(trace)}


def _vacancies(
    site: str,
    model: Program,
    dream: Trace,
    call: Call,
    absent: list[Path],
    arguments: Mapping[str, Path],
) -> list[Path]:
    """The arguments, now ``None``, through which the model would observe a site: found by trying."""
    if site in arguments:
        return [arguments[site]]
    value = dream.nodes[site]["value"]
    return [path for path in absent if _would_observe(site, value, model, put(call, path, value))]


def _would_observe(site: str, value: Tensor, model: Program, call: Call) -> bool:
    try:
        observed = passes.dream(model, call)[1].get(site)
    except Exception:  # the argument stands for something else
        return False
    return observed is not None and equal(observed, value)


def _refuse_wrong_pairing(pattern: Pattern, model: Program, dream: Trace, call: Call) -> None:
    """Checks that the model, called as the guide will be, observes the dream."""
    _, seen = passes.dream(model, pattern.hand_over(dream, call))
    for site in pattern.missing if pattern.lacks_data else pattern.observed:
        if site not in seen or not close(seen[site], dream.nodes[site]["value"]):
            raise ValueError(
                f"When the model is called with its dream of site '{site}' in the place of the data, it doesn't "
                "observe that dream there: the argument changes it (a cast that rounds, say) or isn't the one. Tell "
                "with bind= how a dream becomes arguments."
            )


def _refuse_unlearnable(pattern: Pattern, guide: Program, dream: Trace, call: Call) -> None:
    """Checks that the sites of both programs match and have densities where they need one."""
    guide_trace = passes.replay(guide, pattern.hand_over(dream, call), dream)
    check_sites(pattern, dream, guide_trace)
    latents = {name for name, _ in passes.sample_sites(guide_trace)}
    for name, site in passes.sample_sites(dream):
        if passes.is_implicit(site) and (name not in latents or _is_learnable(site)):
            raise ValueError(
                f"The model's site '{name}' is Implicit and would have to learn: it "
                + ("depends on parameters." if name in latents else "stands for data.")
                + " Give it a distribution with log_prob."
            )
    for name, site in passes.sample_sites(guide_trace):
        if name in dream and passes.is_implicit(site):
            raise ValueError(
                f"The guide's site '{name}' is Implicit, but the encoder learns from log q. "
                "Give it a distribution with log_prob."
            )


def _is_learnable(site: passes.Site) -> bool:
    with torch.enable_grad():
        return site["fn"](*site["args"], **site["kwargs"]).requires_grad


def check_completed(pattern: Pattern, trace: Trace, completion: Trace) -> None:
    """Checks that the guide gave a value to each site that the model did not observe.

    Raises:
        ValueError: A latent is missing from the guide.
    """
    forgotten = [
        name
        for name, site in passes.sample_sites(trace)
        if not (site["is_observed"] or name in completion or name in pattern.missing)
    ]
    if forgotten:
        raise ValueError(NEVER_SAMPLES.format(sites=forgotten))


def check_sites(pattern: Pattern, dream: Trace, guide_trace: Trace) -> None:
    """Checks that the guide samples the latents of a dream, and nothing else that counts.

    Raises:
        ValueError: A latent is missing from the guide, or the guide has a site that the model lacks.
    """
    latents = {name for name, _ in passes.sample_sites(guide_trace)}
    known = latents | pattern.observed | pattern.missing
    forgotten = [name for name, _ in passes.sample_sites(dream) if name not in known]
    if forgotten:
        raise ValueError(NEVER_SAMPLES.format(sites=forgotten))
    extra = [
        name
        for name, site in passes.sample_sites(guide_trace)
        if name not in dream and not site["infer"].get("is_auxiliary")
    ]
    if extra:
        raise ValueError(
            f"The guide samples {extra}, which the model doesn't. Sample these sites in the model too, or mark them "
            "with infer={'is_auxiliary': True}."
        )


def _refuse_blind(
    pattern: Pattern, model: Program, guide: Program, dream: Trace, call: Call
) -> None:
    """Checks that the guide's distributions depend on the data."""
    dreamed = pattern.hand_over(dream, call)
    if pattern.bind is None:
        paths = [path for site, path in pattern.arguments.items() if site not in pattern.latents]
    else:
        paths = [path for path, leaf in leaves(dreamed) if leaf is not get(call, path)]
    data = [get(dreamed, path) for path in paths]
    if not data:
        raise ValueError(
            "The model observes no site that the guide lacks, so there are no data to learn from. Observe data in the "
            "model (obs=), and don't sample them in the guide."
        )
    with _Reads(data) as reads:
        trace = passes.replay(guide, dreamed, dream)
    if reads.any:
        return
    other = pattern.hand_over(passes.dream(model, call)[0], call)
    again = passes.replay(guide, other, dream)
    latents = [name for name, _ in passes.sample_sites(trace) if name in dream]
    if passes.log_probs(trace, latents) == passes.log_probs(again, latents):
        raise ValueError(
            IGNORES_DATA.format(arguments=[pattern.names(path) for path in paths])
        )


class _Reads(TorchFunctionMode):
    """Notes whether any of some tensors is used for more than its shape, type or device."""

    METADATA = frozenset(
        "shape dtype device ndim layout requires_grad is_cuda __len__ size dim ndimension numel nelement stride "
        "is_floating_point is_complex get_device new_empty new_full new_ones new_tensor new_zeros empty_like "
        "full_like ones_like rand_like randn_like zeros_like".split()
    )

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.tensors = {id(tensor) for tensor in tensors}
        self.any = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = getattr(func, "__name__", None)
        if name == "__get__":
            name = func.__self__.__name__
        if name not in self.METADATA:
            self.any |= any(id(leaf) in self.tensors for _, leaf in leaves((args, kwargs or {})))
        return func(*args, **(kwargs or {}))


def _still_holds(leaf: Any, value: Tensor) -> bool:
    if not isinstance(leaf, Tensor) or leaf.numel() != value.numel():
        return False
    return same_memory(leaf, value) or not is_validation_enabled() or equal(leaf, value)


@contextmanager
def aside() -> Iterator[None]:
    """Runs programs on the side: random states and module buffers end as they were."""
    state = randomness.get_state()
    buffers: dict[Tensor, Tensor] = {}

    def keep(module: torch.nn.Module, _: Any) -> None:
        for buffer in module.buffers(recurse=False):
            buffers.setdefault(buffer, buffer.detach().clone())

    hook = torch.nn.modules.module.register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        hook.remove()
        randomness.set_state(state)
        for buffer, before in buffers.items():
            buffer.detach().copy_(before)
