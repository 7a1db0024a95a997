r"""The law of the chains, against enumeration.

The programs draw discrete elements v_1, v_2, ..., each from a table, and m(v) is an array with an
axis for each element. Redrawing a block b sums its axes out and multiplies by its tables,

    m(v) <- sum_{v_b} m(v) prod_{i in b} p(v_i | parents of i),

where the table of an element that is clamped is replaced by a point mass.

Frequencies of n draws are compared with probabilities p at 5 standard errors, sqrt(p (1 - p) / n):
each comparison fails by chance about once in 1.7 million.
"""

import contextlib
from dataclasses import replace
from math import prod
from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from pyro import poutine

from pyro_symeq import Batch, Conditionals, LimitingDistribution
from pyro_symeq.chain import Rounds
from pyro_symeq.conditional_chain import ConditionalChain
from pyro_symeq.pair_chain import PairChain
from tests import random_programs
from tests.random_programs import cases, enumerate_draws

ROWS = 100_000


def bit(logits):
    """Probabilities of 0 and 1 in a last dimension."""
    return torch.stack([-logits, logits], -1).mul(0.5).softmax(-1)


class Law:
    """The elements by name and size, and the tables of each block and of the start."""

    def __init__(self, sizes, start, blocks):
        self.sizes = sizes
        self.start = [self.table(*factor) for factor in start]
        self.blocks = [[self.table(*factor) for factor in block] for block in blocks]

    def table(self, axes, probs):
        """A table with an axis for each element, and the element that it draws, the last one."""
        names = axes.split()
        order = [names.index(name) for name in self.sizes if name in names]
        shape = [size if name in names else 1 for name, size in self.sizes.items()]
        return names[-1], probs.permute(order).reshape(shape)

    def clamped(self, factors, known):
        return [
            self.table(name, torch.eye(self.sizes[name])[known[name]])
            if name in known
            else (name, p)
            for name, p in factors
        ]

    def initial(self, known=()):
        m = torch.ones([*self.sizes.values()])
        return m * prod(p for _, p in self.clamped(self.start, known))

    def round(self, m, known=()):
        """The laws after a round, and with a fair draw for the block that came last."""
        after = []
        for block in self.blocks:
            if all(name in known for name, _ in block):
                continue
            axes = [[*self.sizes].index(name) for name, _ in block]
            m = m.sum(axes, keepdim=True) * prod(p for _, p in self.clamped(block, known))
            after.append(m.expand([*self.sizes.values()]))
        return after[-1], torch.stack(after).mean(0)

    def after(self, k, known=()):
        m = self.initial(known)
        for _ in range(k):
            m, mixed = self.round(m, known)
        return mixed

    def marginal(self, m, *names):
        return m.sum([i for i, name in enumerate(self.sizes) if name not in names])


class Ladder:
    """A pair with two bits z, a class c and two bits x: p(z) p(c | z) p(x | z, c), q(c, z | x)."""

    def __init__(self):
        self.a, self.t, self.u = torch.randn(2), torch.randn(2, 2, 3), torch.randn(2, 2, 3, 2)
        self.v, self.w = torch.randn(2, 2, 3), torch.randn(2, 2, 3, 2)
        x, w = bit(self.u), bit(self.w)
        c = "x0 x1 c", self.v.softmax(-1)
        z = [(f"x0 x1 c z{i}", w[..., i, :]) for i in (0, 1)]
        data = [(f"z0 z1 c x{i}", x[..., i, :]) for i in (0, 1)]
        prior = [(f"z{i}", bit(self.a[i])) for i in (0, 1)]
        self.law = Law(
            {"z0": 2, "z1": 2, "c": 3, "x0": 2, "x1": 2},
            [*prior, ("z0 z1 c", self.t.softmax(-1)), *data],
            [data, [c, *z]],
        )

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=self.a).to_event(1))
            i = tuple(z.long().unbind(-1))
            c = pyro.sample("c", dist.Categorical(logits=self.t[i]))
            pyro.sample("x", dist.Bernoulli(logits=self.u[(*i, c)]).to_event(1), obs=x)

    def guide(self, x):
        i = tuple(x.long().unbind(-1))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=self.v[i]))
            pyro.sample("z", dist.Bernoulli(logits=self.w[(*i, c)]).to_event(1))

    def limiting(self):
        return LimitingDistribution(self.model, self.guide)

    def batch(self, rows):
        return torch.zeros(rows, 2)


class Triple:
    """Three conditionals: a class s, two bits x and a bit z, each given the others."""

    def __init__(self):
        self.s, self.x, self.z = (
            torch.randn(2, 2, 2, 3),
            torch.randn(3, 2, 2),
            torch.randn(2, 2, 3),
        )
        self.prior_x = torch.randn(2)
        x = bit(self.x)
        s = "x0 x1 z s", self.s.softmax(-1)
        data = [(f"s z x{i}", x[..., i, :]) for i in (0, 1)]
        start = [(f"x{i}", bit(self.prior_x[i])) for i in (0, 1)]
        self.law = Law(
            {"s": 3, "x0": 2, "x1": 2, "z": 2},
            [*start, ("z", torch.full((2,), 0.5)), s],
            [[s], data, [("x0 x1 s z", bit(self.z))]],
        )

    def p_s(self, x, z):
        with pyro.plate("rows", len(x)):
            pyro.sample("s", dist.Categorical(logits=self.s[(*x.long().unbind(-1), z.long())]))

    def p_x(self, s, z):
        with pyro.plate("rows", len(s)):
            pyro.sample("x", dist.Bernoulli(logits=self.x[s, z.long()]).to_event(1))

    def p_z(self, x, s):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.z[(*x.long().unbind(-1), s)]))

    def prior(self, x):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Bernoulli(logits=self.prior_x).to_event(1))
            pyro.sample("z", dist.Bernoulli(0.5))

    def conditionals(self):
        return Conditionals({"s": self.p_s, "x": self.p_x, "z": self.p_z}, prior=self.prior)

    def limiting(self):
        return LimitingDistribution(self.conditionals())

    def batch(self, rows):
        return Batch(x=torch.zeros(rows, 2))


def frequencies(law, draws):
    """How often each joint value occurs in draws, which are vectors or have a bit to a column."""
    columns = {}
    for name, value in draws.items():
        value = value.flatten(0, 1).long()
        named = (
            {name: value}
            if value.dim() == 1
            else {f"{name}{i}": column for i, column in enumerate(value.unbind(-1))}
        )
        columns |= named
    sizes = [*law.sizes.values()]
    number = torch.zeros_like(next(iter(columns.values())))
    for name, size in law.sizes.items():
        number = number * size + columns[name]
    return torch.bincount(number, minlength=prod(sizes)).reshape(sizes) / len(number)


def assert_law(frequency, expected, n=ROWS):
    error = 5 * (expected * (1 - expected) / n).sqrt()
    excess = (frequency - expected).abs() - error
    assert (excess <= 1e-12).all(), f"off by {excess.max():.3g} more than 5 standard errors"


KNOWN = {
    Ladder: {
        "nothing": ({}, {}, {}),
        "class": ({"c": 2}, {}, {"c": 2}),
        "latents": ({"z": torch.tensor([0.0, 1.0]), "c": 1}, {}, {"z0": 0, "z1": 1, "c": 1}),
        "data": ({"x": torch.tensor([1.0, 0.0])}, {}, {"x0": 1, "x1": 0}),
        "pixel": (
            {"x": torch.tensor([torch.nan, 1.0])}, {"x": torch.tensor([False, True])}, {"x1": 1}
        ),
        "pixel of the batch and class": (
            {"c": 0}, {"x": torch.tensor([True, False])}, {"x0": 0, "c": 0}
        ),
        "latent bit": (
            {"z": torch.tensor([1.0, torch.inf])}, {"z": torch.tensor([True, False])}, {"z0": 1}
        ),
    },
    Triple: {
        "nothing": ({}, {}, {}),
        "class": ({"s": 2}, {}, {"s": 2}),
        "pixel": ({}, {"x": torch.tensor([False, True])}, {"x1": 0}),
        "bit": ({"z": torch.ones(())}, {}, {"z": 1}),
    },
}  # fmt: skip
CASES = [(programs, name) for programs, cases in KNOWN.items() for name in cases]


@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize(("programs", "case"), CASES)
def test_the_law_after_some_rounds(programs, case, k):
    programs = programs()
    given, mask, known = KNOWN[type(programs)][case]
    draws = programs.limiting().sample(
        1, programs.batch(ROWS), num_steps=k, given=given, mask=mask
    )
    assert_law(frequencies(programs.law, draws), programs.law.after(k, known))


@settings(max_examples=40)
@given(cases(given="latents", rows=[1]))
def test_random_programs(case):
    """Whatever the programs, and the way in which they are handed data and latents.

    A run of the model with its latents fixed draws its data one after another.
    """
    n = 5_000
    rows = {name: (0,) * n for name in case.data}
    case = replace(case, given=rows, rows=n, plate="vectorised", stretch=1, masks=(None, None))
    args, kwargs = case.call()
    limiting = LimitingDistribution(*case.programs(), bind=case.bind())
    draws = limiting.sample(1, Batch(*args, **kwargs), num_steps=2)

    law = Law({v.name: v.states for v in case.variables}, [], [])
    joint, sizes = case.outcomes({}), [*law.sizes.values()]
    p = {name: case.log_p(name, joint).exp().reshape(sizes) for name in law.sizes}
    q = {name: case.log_q(name, joint).exp().reshape(sizes) for name in case.latents}
    law.start = list(p.items())
    law.blocks = [[(name, p[name]) for name in case.data], list(q.items())]
    index = {name: case[name].index(value) for name, value in draws.items()}
    assert_law(frequencies(law, index), law.after(2), n)


@pytest.mark.parametrize("programs", [Ladder, Triple])
def test_chains_are_made_of_copies_of_the_rows(programs):
    programs = programs()
    draws = programs.limiting().sample(ROWS // 4, programs.batch(4), num_steps=2)
    assert_law(frequencies(programs.law, draws), programs.law.after(2))


@pytest.mark.parametrize("programs", [Ladder, Triple])
def test_draws_of_one_chain_follow_the_limit(programs):
    """After 20 rounds the law is the limit: draws 20 rounds apart are all but independent."""
    programs = programs()
    limit = programs.law.after(200)
    torch.testing.assert_close(programs.law.after(20), limit, rtol=0, atol=1e-5)
    draws = programs.limiting().sample(ROWS, programs.batch(1), num_steps=220, burn_in=20, thin=20)
    assert_law(frequencies(programs.law, draws), limit)


def test_blocks_of_several_sites_are_those_of_a_pair():
    """The guide as the conditional of both latents, and the model as that of the data."""
    ladder = Ladder()

    def p_x(z, c):
        with pyro.plate("rows", len(c)):
            logits = ladder.u[(*z.long().unbind(-1), c)]
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1))

    conditionals = Conditionals(
        {"x": p_x, ("c", "z"): ladder.guide}, poutine.uncondition(ladder.model)
    )
    limiting = LimitingDistribution(conditionals)
    draws = limiting.sample(2, Batch(x=ladder.batch(ROWS // 2)), num_steps=2, given={"c": 1})
    assert_law(frequencies(ladder.law, draws), ladder.law.after(2, {"c": 1}))


def test_chains_may_start_from_data():
    """In the first round the data are redrawn from latents of the encoder."""
    ladder = Ladder()
    law = ladder.law
    x = torch.tensor([1.0, 0.0]).expand(ROWS, 2)
    draws = ladder.limiting().sample(1, x, num_steps=1, start="data")
    start = law.initial({"x0": 1, "x1": 0})
    axes = [0, 1, 2]
    m = start.sum(axes, keepdim=True) * prod(p for _, p in law.blocks[1])
    assert_law(frequencies(law, draws), law.round(m)[1])


def test_conditionals_may_start_from_data():
    triple = Triple()
    law = triple.law
    s, x = torch.full((ROWS,), 2), torch.tensor([1.0, 0.0]).expand(ROWS, 2)
    draws = triple.limiting().sample(1, Batch(s=s, x=x), num_steps=1, start="data")
    start = law.initial({"s": 2, "x0": 1, "x1": 0})  # z from the prior
    assert_law(frequencies(law, draws), law.round(start)[1])


class Tiny:
    """A pair of a bit and a class of three, with few enough draws to go through all of them."""

    def __init__(self):
        self.a, self.u, self.w = torch.randn(()), torch.randn(2, 3), torch.randn(3)
        x = "z x", self.u.softmax(-1)
        self.law = Law({"z": 2, "x": 3}, [("z", bit(self.a)), x], [[x], [("x z", bit(self.w))]])

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=self.a))
            pyro.sample("x", dist.Categorical(logits=self.u[z.long()]), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.w[x]))

    def chain(self):
        return PairChain(self.model, self.guide, None, ((torch.zeros(1, dtype=torch.long),), {}))


class TinyTriple:
    """Three bits, each given the other two, that start at zero."""

    def __init__(self):
        self.tables = torch.randn(3, 2, 2)
        self.names = ["a", "b", "c"]
        blocks = [
            [(" ".join([*self.others(name), name]), bit(table))]
            for name, table in zip(self.names, self.tables, strict=True)
        ]
        zero = torch.tensor([1.0, 0.0])
        self.law = Law(dict.fromkeys(self.names, 2), [(name, zero) for name in self.names], blocks)

    def others(self, name):
        return [other for other in self.names if other != name]

    def program(self, name, table):
        def draw(**state):
            index = tuple(state[other].long() for other in self.others(name))
            with pyro.plate("rows", 1):
                pyro.sample(name, dist.Bernoulli(logits=table[index]))

        return draw

    def chain(self):
        programs = dict(zip(self.names, map(self.program, self.names, self.tables), strict=True))
        batch = {name: torch.zeros(1) for name in self.names}
        return ConditionalChain(Conditionals(programs), batch, {})


class DrawsWithCoins(random_programs._Draws):
    """All draws of a run, those of ``torch.randint`` too."""

    @contextlib.contextmanager
    def prescribed(self):
        def randint(sides, shape, device):
            return self.draw(torch.full((*shape, sides), 1 / sides))

        with super().prescribed(), mock.patch.object(torch, "randint", randint):
            yield


EXACT = {
    "pair": (Tiny, "dream", {}),
    "pair, data known": (Tiny, "dream", {"x": 2}),
    "pair, latent known": (Tiny, "dream", {"z": 1}),
    "three": (TinyTriple, "data", {}),
    "three, one known": (TinyTriple, "data", {"b": 1}),
}


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(("programs", "start", "known"), EXACT.values(), ids=EXACT.keys())
def test_the_law_is_exact(programs, start, known, k):
    """Goes through all draws of a chain, its fair draws for the last block among them."""
    programs = programs()
    chain = programs.chain()
    chain.prepare(1, known, {})

    def play():
        (state,) = chain.rounds(Rounds(k, k - 1, 1, start), range(1, k + 1))
        return tuple(int(state[name].item()) for name in programs.law.sizes)

    m = torch.zeros([*programs.law.sizes.values()])
    with mock.patch.object(random_programs, "_Draws", DrawsWithCoins):
        for probability, state in enumerate_draws(play):
            m[state] += probability
    expected = programs.law.after(k, known)
    torch.testing.assert_close(m, expected, rtol=1e-12, atol=1e-12)
