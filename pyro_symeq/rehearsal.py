r"""What the first call with a kind of batch finds out, so that later steps need not.

A rehearsal runs both programs on the side. It learns which sites the batch observes and which
argument holds each of them, hands the guide a dream in the place of the data, and refuses a pair
that cannot learn before anything moves.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
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
    get,
    leaves,
    put,
    share_storage,
)
from pyro_symeq.pattern import Pattern

Bind = Mapping[str, str] | Callable[[Trace, tuple[Any, ...], dict[str, Any]], Call]

IGNORES_DATA = (
    "The guide ignores the data: it never reads the values of {arguments}. On dreams such a guide "
    "can only learn the prior p(z). Write an amortised guide, whose distributions depend on its "
    "arguments; an AutoGuide, or a guide that closes over its data, does not."
)


def rehearse(model: Program, guide: Program, call: Call, bind: Bind | None) -> Pattern:
    """Finds the pattern of a batch.

    Random states and module buffers end as they were.

    Args:
        model: The decoder's program.
        guide: The encoder's program.
        call: The arguments of both, with the batch.
        bind: How dreams are handed to the guide, where the user says so.

    Raises:
        ValueError: The pair cannot learn from such a batch; the message says why and what to do.
    """
    if isinstance(guide, AutoGuide):
        raise ValueError(IGNORES_DATA.format(arguments="its arguments"))
    with aside(), torch.no_grad():
        return _Rehearsal(model, guide, call, bind).pattern()


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


class _Rehearsal:
    """A dream of a batch, and what the programs do with it."""

    def __init__(self, model: Program, guide: Program, call: Call, bind: Bind | None) -> None:
        self.model = model
        self.guide = guide
        self.call = call
        self.bind = bind
        self.names = Names(model)
        self.absent = list(self.names.absent(call))
        self.dream, self.observed = passes.dream(model, call)
        self.drawn = {name for name, _ in passes.sample_sites(self.dream)} - self.observed.keys()

    def pattern(self) -> Pattern:
        """Finds the pattern and checks that the pair can learn from it."""
        pattern = self.cast()
        dreamed = pattern.hand_over(self.dream, self.observed, self.call)
        self.refuse_wrong_pairing(pattern, dreamed)
        data = self.data(pattern, dreamed)
        with _Reads(data.values()) as reads:
            trace = passes.replay(self.guide, dreamed, self.dream)
        pattern.check_dreamed(self.dream, trace)
        self.refuse_implicit(trace)
        if not (reads.any or self.depends_on_data(pattern, trace)):
            raise ValueError(IGNORES_DATA.format(arguments=list(data)))
        return replace(pattern, supervised=pattern.latents | passes.observations(trace).keys())

    def cast(self) -> Pattern:
        """Finds out which sites are latent, which are data, and which data are missing."""
        arguments = self.arguments()
        held = {name: path for name, path in arguments.items() if name in self.observed}
        draft = Pattern(
            observed=frozenset(self.observed),
            latents=frozenset(),
            missing=frozenset(),
            supervised=frozenset(),
            is_complete=False,
            arguments=held,
            copies=frozenset(
                name
                for name, path in held.items()
                if not share_storage(get(self.call, path), self.observed[name])
            ),
            dtypes={name: value.dtype for name, value in self.observed.items()},
            names=self.names,
            bind=self.bind if callable(self.bind) else None,
        )
        try:
            sampled = self.sampled_by_guide(draft)
        except Exception:
            if not self.absent:
                raise
            sampled = None  # perhaps for want of the missing data
        vacancies = {
            name: path
            for name in self.drawn - (sampled or set())
            if (path := self.vacancy(name, arguments)) is not None
        }
        full = replace(draft, arguments={**draft.arguments, **vacancies})
        if sampled is None:
            sampled = self.sampled_by_guide(full)
        missing = vacancies.keys() - sampled
        pattern = replace(
            draft,
            latents=draft.observed & sampled,
            missing=frozenset(missing),
            is_complete=self.drawn <= missing,
        )
        if not pattern.lacks_data:
            return pattern
        if unknown := sorted(self.drawn - missing):
            raise ValueError(
                f"The batch lacks {sorted(missing)} and doesn't give {unknown} either: without "
                "data the guide can't complete it. Give all latents or some data."
            )
        return replace(pattern, arguments=full.arguments)

    def arguments(self) -> dict[str, Path]:
        """The path to each observed value: the user's word, or the one leaf that holds it."""
        arguments = self.told(self.bind) if isinstance(self.bind, Mapping) else {}
        for name, value in self.observed.items():
            if name in arguments:
                continue
            paths = find(value, self.call)
            if len(paths) == 1:
                arguments[name] = paths[0]
            elif not callable(self.bind):
                raise ValueError(self.cannot_tell(name, paths))
        return arguments

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
            if not (leaf is None or isinstance(leaf, Tensor)):
                raise ValueError(
                    f"bind= names the argument '{argument}', which is of type "
                    f"{type(leaf).__name__}; expected a tensor, or None where data are missing."
                )
            if name not in sites:
                raise ValueError(
                    f"bind= names the site '{name}'; the model samples {sorted(sites)}."
                )
        return {name: paths[argument] for argument, name in bind.items()}

    def vacancy(self, name: str, arguments: Mapping[str, Path]) -> Path | None:
        """The argument, now ``None``, through which the model would observe a site: by trying."""
        value = passes.value(self.dream, name)
        candidates = [arguments[name]] if name in arguments else self.absent
        paths = [path for path in candidates if self.would_observe(name, value, path)]
        if len(paths) > 1:
            raise ValueError(self.cannot_tell(name, paths))
        return paths[0] if paths else None

    def would_observe(self, name: str, value: Tensor, path: Path) -> bool:
        """Whether the model, given a value there, observes it at a site."""
        try:
            _, observed = passes.dream(self.model, put(self.call, path, value))
        except Exception:  # the argument stands for something else
            return False
        return name in observed and equal(observed[name], value)

    def sampled_by_guide(self, pattern: Pattern) -> set[str]:
        """The sites of the guide, called with the dream."""
        dreamed = pattern.hand_over(self.dream, self.observed, self.call)
        trace = passes.replay(self.guide, dreamed, self.dream)
        return {name for name, _ in passes.sample_sites(trace)}

    def data(self, pattern: Pattern, dreamed: Call) -> dict[str, Tensor]:
        """The arguments that hold dreamed data, by name."""
        if pattern.bind is None:
            paths = [p for name, p in pattern.arguments.items() if name not in pattern.latents]
        else:
            paths = [p for p, leaf in leaves(dreamed) if leaf is not get(self.call, p)]
        if not paths:
            raise ValueError(
                "The model observes no site that the guide lacks, so there are no data to learn "
                "from. Observe data in the model (obs=), and don't sample them in the guide."
            )
        return {self.names(path): get(dreamed, path) for path in paths}

    def refuse_wrong_pairing(self, pattern: Pattern, call: Call) -> None:
        """Checks that the model, called as the guide will be, observes the dream."""
        _, observed = passes.dream(self.model, call)
        for name in pattern.missing if pattern.lacks_data else pattern.observed:
            dreamed = passes.value(self.dream, name)
            if name not in observed or not close(observed[name], dreamed):
                raise ValueError(
                    f"When the model is called with its dream of site '{name}' in the place of "
                    "the data, it doesn't observe that dream: the argument changes it (a cast "
                    "that rounds, say) or isn't the one. Tell with bind= how a dream becomes "
                    "arguments."
                )

    def refuse_implicit(self, trace: Trace) -> None:
        """Checks that sites without a density stand where nothing is to be learned."""
        for name, site in passes.sample_sites(self.dream):
            if passes.is_implicit(site) and (name not in trace or _depends_on_parameters(site)):
                why = "depends on parameters" if name in trace else "stands for data"
                raise ValueError(
                    f"The model's site '{name}' is Implicit and would have to learn: it {why}. "
                    "Give it a distribution with log_prob."
                )
        for name, site in passes.sample_sites(trace):
            if passes.is_implicit(site) and name in self.dream:
                raise ValueError(
                    f"The guide's site '{name}' is Implicit, but the encoder learns from log q. "
                    "Give it a distribution with log_prob."
                )

    def depends_on_data(self, pattern: Pattern, trace: Trace) -> bool:
        """Whether other data change the guide's law, for networks that can't be watched."""
        other = pattern.hand_over(*passes.dream(self.model, self.call), self.call)
        again = passes.replay(self.guide, other, self.dream)
        scored = passes.scored(trace, self.dream)
        return passes.log_probs(trace, scored) != passes.log_probs(again, scored)

    def cannot_tell(self, name: str, paths: list[Path]) -> str:
        """Says that none or several of the arguments hold a value, and what to do."""
        holders = [self.names(path) for path in paths]
        tensors = [self.names(p) for p, leaf in leaves(self.call) if isinstance(leaf, Tensor)]
        problem = (
            f"Several arguments hold the observed value of site '{name}': {holders}"
            if holders
            else f"No argument holds the observed value of site '{name}', as a tensor or a "
            "view, reshape or cast of it; an indexed copy or a computed value is none of these "
            f"(tensor arguments: {tensors})"
        )
        example = (holders or tensors or ["argument"])[0]
        return (
            f"{problem}. So a dream of '{name}' can't be handed to the guide. Pass the observed "
            "value itself as an argument of model and guide, or tell which argument stands for it "
            f"with bind={{'{example}': '{name}'}} or with a function "
            "bind=(trace, args, kwargs) -> (args, kwargs)."
        )


def _depends_on_parameters(site: passes.Site) -> bool:
    with torch.enable_grad():
        return site["fn"](*site["args"], **site["kwargs"]).requires_grad


class _Reads(TorchFunctionMode):
    """Notes whether any of some tensors is used for more than its shape, type or device."""

    METADATA = frozenset(
        "shape dtype device ndim layout requires_grad is_cuda __len__ size dim ndimension numel "
        "nelement stride is_floating_point is_complex get_device new_empty new_full new_ones "
        "new_tensor new_zeros empty_like full_like ones_like rand_like randn_like "
        "zeros_like".split()
    )

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.tensors = {id(tensor) for tensor in tensors}
        self.any = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", None)
        if name == "__get__":  # of a property
            name = func.__self__.__name__
        if name not in self.METADATA:
            self.any |= any(id(leaf) in self.tensors for _, leaf in leaves((args, kwargs or {})))
        return func(*args, **(kwargs or {}))
