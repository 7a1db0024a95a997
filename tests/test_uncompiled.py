"""Functions that a user compiles may train pairs."""

import pytest
import torch
from pyro.optim import Adam

from pyro_symeq import SymmetricUtility
from tests.comparison import same
from tests.test_graphs import Pair

X = torch.eye(4, dtype=torch.float64).repeat(3, 1)


def step(pair):
    return pair.symeq.step


def respond(pair):
    return lambda x: pair.symeq.respond("encoder", x)


def evaluate(pair):
    return lambda x: (float(pair.symeq.evaluate_loss(x)), pair.symeq.evaluate("decoder", x))


def module(pair):
    return SymmetricUtility()(pair.model, pair.guide)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("make", [step, respond, evaluate, module])
def test_what_calls_the_library_may_be_compiled(make):
    found = []
    for compiled in (False, True):
        pair = Pair(Adam({"lr": 0.1}))
        function = make(pair)
        if compiled:
            function = torch.compile(lambda x, f=function: f(2 * x / 2), backend="eager")
        told = [function(X) for _ in range(3)]
        if make is module:
            sum(told).backward()
        found.append((told, [(p.detach(), p.grad) for p in pair.parameters()]))
    assert same(*found)
