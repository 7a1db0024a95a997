r"""Random programs over a few discrete variables, and their utilities by enumeration.

The variables are ordered, some are latent (z) and some are data (x), and all distributions are
tables of logits that are indexed by the values of what a variable depends on:

    p(x, z) = prod_v p(v | parents of v) exp f(z),    q(z | x) = prod_i q(z_i | x, z_<i).

The encoder may share the decoder's tables as in eq. 10 of the paper: its logits of z_i are then
the sum of a table of its own and of the decoder's. :func:`cases` draws a program together with a
batch, :func:`utilities` enumerates its L_p and L_q, and :func:`enumerate_draws` takes the
library's own estimates through everything that can be drawn.
"""

import contextlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import config_enumerate
from torch import nn
from torch.nn.functional import one_hot

DTYPES = {
    "bernoulli": [torch.float64, torch.float32, torch.long, torch.uint8, torch.bool],
    "categorical": [torch.long, torch.float64, torch.float32, torch.int32, torch.uint8],
    "onehot": [torch.float64, torch.float32, torch.long],
}


class Passing(NamedTuple):
    """A way to pass a batch, a dict of tensors by name.

    Args:
        pack: Makes ``(args, kwargs)`` of a batch.
        unpack: Makes a batch of the names and ``*args, **kwargs``.
        argument: What ``bind=`` calls the argument ``{name}``, which is the ``{i}``-th.
    """

    pack: Callable
    unpack: Callable
    argument: str | None


PASSING = {
    "keywords": Passing(lambda batch: ((), batch), lambda names, **batch: batch, "{name}"),
    "positional": Passing(
        lambda batch: (tuple(batch.values()), {}),
        lambda names, *values: dict(zip(names, values, strict=True)),
        "args.{i}",
    ),
    "dict": Passing(lambda batch: ((batch,), {}), lambda names, batch: batch, "args.0.{name}"),
    "tuple": Passing(
        lambda batch: ((tuple(batch.values()),), {}),
        lambda names, values: dict(zip(names, values, strict=True)),
        "args.0.{i}",
    ),
    "columns": Passing(
        lambda batch: ((torch.stack([*batch.values()], -1),), {}),
        lambda names, columns: dict(zip(names, columns.unbind(-1), strict=True)),
        None,
    ),
}


@dataclass(frozen=True)
class Variable:
    """A discrete random variable; its values are counted 0, 1, ... by an index.

    Args:
        name: The name of its site, and of the argument that holds its value.
        kind: The family of its distribution.
        states: The number of its values.
        parents: The variables that it depends on in the model.
        dtype: The type of the argument.
        as_given: Whether the model observes the argument without a cast.
        scales: The factors of its log-probability in the model and in the guide.
    """

    name: str
    kind: str
    states: int
    parents: tuple[str, ...]
    dtype: torch.dtype
    as_given: bool
    scales: tuple[float, float]

    def distribution(self, logits):
        if self.kind == "bernoulli":
            return dist.Bernoulli(logits=logits[..., 1] - logits[..., 0])
        if self.kind == "categorical":
            return dist.Categorical(logits=logits)
        return dist.OneHotCategorical(logits=logits)

    @property
    def observed_dtype(self):
        if self.kind == "categorical":
            return self.dtype if self.as_given else torch.long
        return torch.float64

    def argument(self, index):
        return (one_hot(index, self.states) if self.kind == "onehot" else index).to(self.dtype)

    def index(self, value):
        return value.argmax(-1) if self.kind == "onehot" else value.long()


@dataclass(frozen=True)
class Case:
    """A pair of programs and a batch.

    Args:
        variables: All variables, in the model's order.
        latents: The names of the latent ones, in the guide's order.
        shared: The latents whose tables the encoder shares with the decoder.
        given: What the batch holds of a variable: an index for each row.
        given_rows: The rows in which a given latent is observed (``obs_mask=``), if not in all.
        rows: The number of rows.
        plate: How the programs arrange them.
        stretch: The size of the plate over the number of rows, N/B.
        masks: The rows that count in the model and in the guide.
        factor: The latent that a factor of the model depends on.
        deterministic: Whether both programs have a deterministic site.
        marks: Whether both programs ask for enumeration.
        registered: How the programs declare their parameters.
        passing: How the arguments are passed.
        bound: Whether ``bind=`` tells which argument holds which site.
        supervise_encoder: As for :class:`SymmetricUtility`.
        seed: The seed of the parameters.
    """

    variables: tuple[Variable, ...]
    latents: tuple[str, ...]
    shared: frozenset[str]
    given: dict[str, tuple[int, ...]]
    given_rows: dict[str, tuple[bool, ...]]
    rows: int
    plate: str
    stretch: int
    masks: tuple[tuple[bool, ...] | None, tuple[bool, ...] | None]
    factor: str | None
    deterministic: bool
    marks: bool
    registered: str
    passing: str
    bound: bool
    supervise_encoder: bool
    seed: int
    theta: nn.ParameterDict = field(init=False, repr=False, compare=False)
    phi: nn.ParameterDict = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)

        def table(*shape):
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

        theta = {v.name: table(*self.states(v.parents), v.states) for v in self.variables}
        if self.factor:
            theta["factor"] = table(*self.states([self.factor]))
        # Where a datum is missing, the encoder looks up one value more.
        data = [n + 1 for n in self.states(self.data)]
        phi = {
            name: table(*data, *self.states(self.latents[:i]), self[name].states)
            for i, name in enumerate(self.latents)
        }
        object.__setattr__(self, "theta", nn.ParameterDict(theta))
        object.__setattr__(self, "phi", nn.ParameterDict(phi))

    def __getitem__(self, name):
        return next(v for v in self.variables if v.name == name)

    def states(self, names):
        return [self[name].states for name in names]

    @property
    def data(self):
        return [v.name for v in self.variables if v.name not in self.latents]

    @property
    def missing(self):
        return [name for name in self.data if name not in self.given]

    # The programs.

    def model(self, batch):
        def body(suffix, at):
            index = {}
            for v in self.variables:
                d = v.distribution(self.look_up("theta", v.name, [index[p] for p in v.parents]))
                obs = batch[v.name]
                if obs is not None:
                    obs = at(obs.to(v.observed_dtype))
                observe = {"obs": obs}
                if v.name in self.given_rows:
                    observe["obs_mask"] = at(batch[f"{v.name}_rows"])
                with poutine.scale(scale=v.scales[0]):
                    index[v.name] = v.index(pyro.sample(v.name + suffix, d, **observe))
            if self.factor:
                pyro.factor(
                    f"factor{suffix}", self.look_up("theta", "factor", [index[self.factor]])
                )
            if self.deterministic:
                pyro.deterministic(f"sum_p{suffix}", sum(index.values()))

        self.declare("theta")
        self.in_plates(body, self.masks[0])

    def guide(self, batch):
        def body(suffix, at):
            index = {name: self[name].states for name in self.data}
            for name in self.data:
                if batch[name] is not None:
                    index[name] = self[name].index(at(batch[name]))
            for i, name in enumerate(self.latents):
                context = [index[other] for other in [*self.data, *self.latents[:i]]]
                logits = self.look_up("phi", name, context)
                v = self[name]
                if name in self.shared:
                    logits = logits + self.look_up("theta", name, [index[p] for p in v.parents])
                with poutine.scale(scale=v.scales[1]):
                    value = pyro.sample(name + suffix, v.distribution(logits))
                index[name] = v.index(value)
            if self.deterministic:
                pyro.deterministic(f"sum_q{suffix}", sum(index[name] for name in self.latents))

        self.declare("phi")
        self.in_plates(body, self.masks[1])

    def look_up(self, player, name, context):
        table = getattr(self, player)[name]
        if self.registered == "param":
            pyro.param(f"{player}.{name}", table)
        return table[tuple(context)]

    def declare(self, player):
        if self.registered == "module":
            pyro.module(player, getattr(self, player))

    def in_plates(self, body, mask):
        """Runs a body over the rows, as a whole or one by one."""
        size, subsample = self.rows * self.stretch, None
        if self.stretch > 1:
            subsample = torch.arange(self.rows)
        mask = True if mask is None else torch.tensor(mask).reshape(self.shape)
        if self.plate == "sequential":
            for i in pyro.plate("rows", size, subsample=subsample):
                with poutine.mask(mask=mask if mask is True else mask[i]):
                    body(f"_{i}", lambda value, i=i: value[i])
            return
        with contextlib.ExitStack() as stack:
            if self.plate == "nested":
                stack.enter_context(pyro.plate("outer", self.shape[0], dim=-2))
                stack.enter_context(pyro.plate("inner", self.shape[1], dim=-1))
            elif self.plate == "vectorised":
                stack.enter_context(pyro.plate("rows", size, subsample=subsample))
            stack.enter_context(poutine.mask(mask=mask))
            body("", lambda value: value)

    @property
    def shape(self):
        """The shape of a batch: none, over rows, or over two nested plates."""
        if self.plate == "nested":
            return (1, self.rows) if self.seed % 2 else (self.rows, 1)
        return () if self.plate == "none" else (self.rows,)

    # What the library is given.

    def programs(self):
        """The model and the guide, with arguments passed in one way or another."""

        def program(body):
            names = list(self.batch(self.given))

            def run(*args, **kwargs):
                body(
                    dict.fromkeys(names)
                    | PASSING[self.passing].unpack(self.passed, *args, **kwargs)
                )

            return config_enumerate(run) if self.marks else run

        return program(self.model), program(self.guide)

    def call(self, given=None):
        """The arguments of both programs, where the batch need not be the case's own."""
        batch = self.batch(self.given if given is None else given)
        return PASSING[self.passing].pack({name: batch[name] for name in self.passed})

    @property
    def passed(self):
        """The names of what is passed."""
        return list(self.given if self.passing == "columns" else self.batch(self.given))

    def bind(self):
        """Which argument holds which site, in the words of ``bind=``."""
        if not self.bound:
            return None
        argument = PASSING[self.passing].argument
        return {argument.format(i=i, name=v.name): v.name for i, v in enumerate(self.variables)}

    def batch(self, given):
        """The values by the names of the arguments, None where there is no value."""
        batch = dict.fromkeys(v.name for v in self.variables)
        for name, index in given.items():
            value = self[name].argument(torch.tensor(index))
            batch[name] = value.reshape((*self.shape, *value.shape[1:]))
        for name, rows in self.given_rows.items():
            batch[f"{name}_rows"] = torch.tensor(rows).reshape(self.shape)
        return batch

    # The same distributions, written out.

    def log_p(self, name, values):
        """log p(v | parents of v), with an element for each joint value."""
        logits = self.theta[name][tuple(values[p] for p in self[name].parents)]
        return _pick(logits.log_softmax(-1), values[name])

    def log_q(self, name, values):
        """log q(z_i | x, z_<i), where the decoder's share has no gradient."""
        context = [*self.data, *self.latents[: self.latents.index(name)]]
        logits = self.phi[name][tuple(values[other] for other in context)]
        if name in self.shared:
            shared = self.theta[name][tuple(values[p] for p in self[name].parents)]
            logits = logits + shared.detach()
        return _pick(logits.log_softmax(-1), values[name])

    def outcomes(self, given):
        """All joint values of the variables that agree with the given ones."""
        ranges = [[given[v.name]] if v.name in given else range(v.states) for v in self.variables]
        columns = zip(*itertools.product(*ranges), strict=True)
        return {
            v.name: torch.tensor(column) for v, column in zip(self.variables, columns, strict=True)
        }


def _pick(log_probs, index):
    return log_probs.expand(*index.shape, -1).gather(-1, index[:, None]).squeeze(-1)


def utilities(case):
    """Enumerates L_p and L_q, row by row: eqs. 5, 8, 11 and 16 of the paper.

    Gradients reach theta through L_p and phi through L_q only.
    """
    decoder = encoder = torch.zeros(())
    for row in range(case.rows):
        given = {
            name: index[row]
            for name, index in case.given.items()
            if case.given_rows.get(name, [True] * case.rows)[row]
        }
        row_decoder, row_encoder = _utilities_of_row(case, given)
        counts_p, counts_q = (mask is None or mask[row] for mask in case.masks)
        decoder = decoder + counts_p * case.stretch * row_decoder
        encoder = encoder + counts_q * case.stretch * row_encoder
    return decoder, encoder


def _utilities_of_row(case, given):
    scale_p, scale_q = ({v.name: v.scales[i] for v in case.variables} for i in (0, 1))
    everything = [v.name for v in case.variables]
    # The encoder sees that a datum is missing as one value more.
    missing = {name: case[name].states for name in case.missing}
    given_latents = [name for name in case.latents if name in given]

    # L_p = E_q(z | x, y) log p(x, y, z), without the factors of q and p for what is given or missing
    zs = case.outcomes(given | missing)
    log_q_free = [case.log_q(name, zs) for name in case.latents if name not in given]
    q = math.prod(log_q.exp() for log_q in log_q_free) if log_q_free else torch.ones(1)
    q = q.detach()
    log_p = sum(scale_p[name] * case.log_p(name, zs) for name in everything if name not in missing)
    if case.factor:
        log_p = log_p + case.theta["factor"][zs[case.factor]]
    decoder = (q * log_p).sum()

    if missing and not given.keys() - set(case.latents):
        # L_q = E_p(x | z) log q(z | x), for the given z
        dreams = case.outcomes(given)
        p = math.prod(case.log_p(name, dreams).exp() for name in missing).detach()
    else:
        # L_q = E_p(x, z) log q(z | x)
        dreams = case.outcomes({})
        p = math.prod(case.log_p(name, dreams).exp() for name in everything).detach()
        dreams |= {name: torch.full_like(p, n, dtype=torch.long) for name, n in missing.items()}
    encoder = (p * sum(scale_q[name] * case.log_q(name, dreams) for name in case.latents)).sum()

    if case.supervise_encoder and given_latents and given.keys() - set(case.latents):
        # + E_q(z | x, y) log q(y | x, z_<i)
        log_q = sum(scale_q[name] * case.log_q(name, zs) for name in given_latents)
        encoder = encoder + (q * log_q).sum()
    return decoder, encoder


def enumerate_rows(play, rows):
    """Plays as :func:`enumerate_draws`, but takes one row after another through its draws.

    For a sum over rows that are drawn apart, the weighted mean is the same,

        E[u_1(s_1) + u_2(s_2)] = E[u(s_1, 0)] + E[u(0, s_2)] - u(0, 0),

    with fewer plays. The rows have to lie along the last batch dimensions of each draw.

    Yields:
        A weight, and what the play returned.
    """
    if rows > 1:
        first = next(enumerate_draws(play))[1]
        yield 1.0 - rows, first
    for row in range(rows):
        yield from enumerate_draws(play, row)


def enumerate_draws(play, row=None, at_most=4096):
    """Plays once for each way in which the draws of torch's distributions can fall.

    Args:
        play: Draws, and returns something.
        row: The only row whose draws vary, or ``None`` for all.
        at_most: The number of plays after which to give up.

    Yields:
        The probability of the draws, and what the play returned.
    """
    script = []
    for _ in range(at_most):
        draws = _Draws(script, row)
        with draws.prescribed():
            result = play()
        yield draws.probability, result
        path = draws.path
        while path and path[-1][0] == path[-1][1] - 1:
            path.pop()
        if not path:
            return
        script = [choice for choice, _ in path]
        script[-1] += 1
    raise RuntimeError(f"There are more than {at_most} ways to draw.")


class _Draws:
    """The draws of one run: as a script says, and the first outcomes where it ends.

    Args:
        script: Which of its joint outcomes each draw has.
        row: The only row whose draws vary, or ``None`` for all.
    """

    def __init__(self, script, row):
        self.script = script
        self.row = row
        self.path = []  # the number of each joint outcome, and how many there are
        self.probability = 1.0

    def draw(self, probs):
        states = probs.shape[-1]
        rows = probs.numel() // states
        varying = range(rows) if self.row is None else [self.row]
        done = len(self.path)
        choice = self.script[done] if done < len(self.script) else 0
        self.path.append((choice, states ** len(varying)))
        index = torch.zeros(rows, dtype=torch.long)
        for i, row in enumerate(varying):
            index[row] = choice // states**i % states
        self.probability *= probs.reshape(rows, states)[varying, index[varying]].prod().item()
        return index.reshape(probs.shape[:-1])

    @contextlib.contextmanager
    def prescribed(self):
        def bernoulli(d, sample_shape=()):
            return self.draw(torch.stack([1 - d.probs, d.probs], -1)).to(d.probs)

        def categorical(d, sample_shape=()):
            return self.draw(d.probs)

        def onehot(d, sample_shape=()):
            return one_hot(self.draw(d.probs), d.probs.shape[-1]).to(d.probs)

        with (
            mock.patch.object(torch.distributions.Bernoulli, "sample", bernoulli),
            mock.patch.object(torch.distributions.Categorical, "sample", categorical),
            mock.patch.object(torch.distributions.OneHotCategorical, "sample", onehot),
        ):
            yield


# Strategies.

MOST_STATES = {1: 32, 2: 8, 3: 4}  # of a row, by the number of rows


@st.composite
def variables(draw, most_states):
    """Some variables with at most so many joint values, each with parents among the earlier."""
    number = draw(st.sampled_from([3, 4, 2, 5, 4]))
    casts = draw(st.booleans())
    chosen = []
    states = 1
    while len(chosen) < number and 2 * states <= most_states:
        most = most_states // states // (1 if chosen else 2)
        kind = draw(st.sampled_from(sorted(DTYPES)))
        n = 2 if kind == "bernoulli" or most < 3 else draw(st.sampled_from([2, 3]))
        states *= n
        scales = st.sampled_from([1.0, 1.0, 0.5, 3.0])
        chosen.append(
            Variable(
                name="abcde"[len(chosen)],
                kind=kind,
                states=n,
                parents=draw(some([v.name for v in chosen])),
                dtype=draw(st.sampled_from(DTYPES[kind])) if casts else DTYPES[kind][0],
                as_given=draw(st.booleans()) if casts else True,
                scales=(draw(scales), draw(scales)),
            )
        )
    return tuple(chosen)


@st.composite
def some(draw, items):
    """Each item with an even chance, in order."""
    return tuple(item for item in items if draw(st.booleans()))


def row_values(rows, values):
    return st.lists(values, min_size=rows, max_size=rows).map(tuple)


@st.composite
def cases(draw, given="latents", rows=(1, 1, 1, 2, 1, 2, 3), most_states=MOST_STATES):
    """A pair of programs and a batch.

    Args:
        draw: From hypothesis.
        given: What may be given besides all data or be missing: some ``"latents"``, one latent
            in some ``"rows"``, or some data ``"missing"``.
        rows: The numbers of rows to choose from, the likely ones more than once.
        most_states: The number of joint values of a row, by the number of rows.
    """
    rows = draw(st.sampled_from(rows))
    chosen = draw(variables(most_states[rows]))
    names = [v.name for v in chosen]
    # If data are missing, the last variable is one of them: it has no children.
    order = draw(st.permutations(names[:-1] if given == "missing" else names))
    latents = order[: draw(st.sampled_from(range(len(names) - 1, 0, -1)))]
    missing = draw(_missing(chosen, latents)) if given == "missing" else set()
    data = set(names) - set(latents)
    given_latents = draw(some(latents))
    if missing == data or (given == "rows" and not given_latents):
        given_latents = latents
    index = {
        name: draw(row_values(rows, st.integers(0, v.states - 1)))
        for name, v in zip(names, chosen, strict=True)
        if name in given_latents or name in data - missing
    }
    given_rows = {}
    if given == "rows":
        given_rows[draw(st.sampled_from(given_latents))] = draw(row_values(rows, st.booleans()))

    # A missing row of a site in a sequential plate can't be told from a latent.
    plates = ["vectorised", "nested"]
    plates += ["sequential"] if not missing and (rows == 1 or not given_rows) else []
    plates += ["none"] if rows == 1 else []
    plate = draw(st.sampled_from(plates))
    ways = ["keywords", "positional", "dict", "tuple"]
    if given == "latents" and not any(v.kind == "onehot" for v in chosen if v.name in index):
        ways += ["columns"]
    passing = draw(st.sampled_from(ways))
    # Parts of a cast can't be found, and bind= tells of one site for each argument.
    if passing == "columns":
        chosen = tuple(replace(v, dtype=torch.float64, as_given=True) for v in chosen)
    elif plate == "sequential" or given_rows:
        chosen = tuple(replace(v, dtype=DTYPES[v.kind][0], as_given=True) for v in chosen)
    one_to_one = passing != "columns" and plate != "sequential" and not given_rows
    casts = any(v.observed_dtype != v.dtype for v in chosen)
    known = {name: {*data, *latents[:i]} for i, name in enumerate(latents)}
    masks = st.none() | row_values(rows, st.booleans())
    return Case(
        variables=chosen,
        latents=tuple(latents),
        shared=frozenset(
            v.name
            for v in chosen
            if v.name in latents and known[v.name].issuperset(v.parents) and draw(st.booleans())
        ),
        given=index,
        given_rows=given_rows,
        rows=rows,
        plate=plate,
        stretch=draw(st.sampled_from([1, 3])) if plate in ("vectorised", "sequential") else 1,
        masks=(draw(masks), draw(masks)),
        factor=draw(st.none() | st.sampled_from(latents)),
        deterministic=draw(st.booleans()),
        marks=draw(st.booleans()),
        registered=draw(st.sampled_from(["param", "module", "nowhere"])),
        passing=passing,
        bound=one_to_one and (casts or draw(st.booleans())),
        supervise_encoder=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def _missing(draw, chosen, latents):
    """Some data that nothing depends on but other missing data, the last variable among them."""
    missing = {chosen[-1].name}
    for v in reversed(chosen[:-1]):
        children = {child.name for child in chosen if v.name in child.parents}
        if v.name not in latents and children <= missing and draw(st.booleans()):
            missing.add(v.name)
    return missing
