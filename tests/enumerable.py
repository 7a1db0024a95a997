"""A ladder of binary variables that is small enough to enumerate.

    p(x, z) = p(z0) p(z1 | z0) p(x | z1),    q(z | x) = q(z0 | x) q(z1 | z0, x),

with two bits in z0 and z1 and three in x. As in eq. 10 of the paper the encoder shares the
decoder's network: logit q(z1 | z0, x) = logit p(z1 | z0) + e1(x).
"""

import itertools

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits


def bits(n):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)))


def log_bernoulli(logits, value):
    return -binary_cross_entropy_with_logits(logits, value, reduction="none").sum(-1)


class Ladder(nn.Module):
    """The programs, and the same log-probabilities written out by hand."""

    def __init__(self):
        super().__init__()
        self.z0_logits = nn.Parameter(torch.randn(2))
        self.d1 = nn.Linear(2, 2)
        self.dx = nn.Linear(2, 3)
        self.e0 = nn.Linear(3, 2)
        self.e1 = nn.Linear(3, 2)

    @property
    def theta(self):
        return [self.z0_logits, *self.d1.parameters(), *self.dx.parameters()]

    @property
    def phi(self):
        return [*self.e0.parameters(), *self.e1.parameters()]

    def register(self, decoder):
        if decoder:
            pyro.param("z0_logits", self.z0_logits)
            pyro.module("d1", self.d1)
            pyro.module("dx", self.dx)
        else:
            pyro.module("e0", self.e0)
            pyro.module("e1", self.e1)

    def model(self, x=None, z0=None, z1=None):
        self.register(decoder=True)
        rows = next(len(value) for value in (x, z0, z1) if value is not None)
        with pyro.plate("data", rows):
            b0 = pyro.sample("z0", dist.Bernoulli(logits=self.z0_logits).to_event(1), obs=z0)
            b1 = pyro.sample("z1", dist.Bernoulli(logits=self.d1(b0)).to_event(1), obs=z1)
            pyro.sample("x", dist.Bernoulli(logits=self.dx(b1)).to_event(1), obs=x)

    def guide(self, x=None, z0=None, z1=None):
        self.register(decoder=False)
        with pyro.plate("data", len(x)):
            b0 = pyro.sample("z0", dist.Bernoulli(logits=self.e0(x)).to_event(1))
            pyro.sample("z1", dist.Bernoulli(logits=self.d1(b0) + self.e1(x)).to_event(1))

    def log_p(self, x, z0, z1):
        return self.log_p_z(z0, z1) + log_bernoulli(self.dx(z1), x)

    def log_p_z(self, z0, z1):
        z0_logits = self.z0_logits.expand_as(z0)
        return log_bernoulli(z0_logits, z0) + log_bernoulli(self.d1(z0), z1)

    def log_q(self, x, z0, z1):
        return self.log_q0(x, z0) + log_bernoulli(self.d1(z0).detach() + self.e1(x), z1)

    def log_q0(self, x, z0):
        return log_bernoulli(self.e0(x), z0)


class Decoder(PyroModule):
    """The model of a ladder as a PyroModule."""

    def __init__(self, ladder):
        super().__init__()
        self.z0_logits, self.d1, self.dx = ladder.z0_logits, ladder.d1, ladder.dx

    def forward(self, x=None, z0=None, z1=None):
        rows = next(len(value) for value in (x, z0, z1) if value is not None)
        with pyro.plate("data", rows):
            b0 = pyro.sample("z0", dist.Bernoulli(logits=self.z0_logits).to_event(1), obs=z0)
            b1 = pyro.sample("z1", dist.Bernoulli(logits=self.d1(b0)).to_event(1), obs=z1)
            pyro.sample("x", dist.Bernoulli(logits=self.dx(b1)).to_event(1), obs=x)


class Encoder(PyroModule):
    """The guide of a ladder as a PyroModule that has the decoder as a part."""

    def __init__(self, ladder, decoder):
        super().__init__()
        self.e0, self.e1 = ladder.e0, ladder.e1
        self.decoder = decoder

    def forward(self, x=None, z0=None, z1=None):
        with pyro.plate("data", len(x)):
            b0 = pyro.sample("z0", dist.Bernoulli(logits=self.e0(x)).to_event(1))
            logits = self.decoder.d1(b0) + self.e1(x)
            pyro.sample("z1", dist.Bernoulli(logits=logits).to_event(1))


def utilities(ladder, x=None, z0=None, z1=None, supervise_encoder=True):
    """Enumerates L_p and L_q of a batch: eqs. 8, 11 and 5 of the paper, term by term.

    Gradients reach theta through L_p and phi through L_q only.
    """
    if x is None:
        return _latents_only(ladder, z0, z1)
    decoder = encoder = torch.zeros(())
    for row in range(len(x)):
        completions = [
            (b0, b1)
            for b0 in bits(2)
            for b1 in bits(2)
            if (z0 is None or (b0 == z0[row]).all()) and (z1 is None or (b1 == z1[row]).all())
        ]
        b0, b1 = (torch.stack(b) for b in zip(*completions, strict=True))
        x_row = x[row].expand(len(b0), 3)
        log_q = ladder.log_q(x_row, b0, b1)
        # Ancestral sampling keeps a given value and draws the others: q(z0 | x) q(z1 | z0, x)
        # without the factors of what is given.
        if z0 is not None:
            log_q = log_q - ladder.log_q0(x_row, b0)
        if z1 is not None:
            log_q = ladder.log_q0(x_row, b0) if z0 is None else torch.zeros(len(b0))
        weights = log_q.exp().detach()
        decoder = decoder + (weights * ladder.log_p(x_row, b0, b1)).sum()
        if supervise_encoder:
            at_data = torch.zeros(len(b0))
            if z0 is not None:
                at_data = at_data + ladder.log_q0(x_row, b0)
            if z1 is not None:
                at_data = at_data + ladder.log_q(x_row, b0, b1) - ladder.log_q0(x_row, b0)
            encoder = encoder + (weights * at_data).sum()
    return decoder, encoder + len(x) * _dreams(ladder)


def _dreams(ladder):
    everything = bits(7)
    x, b0, b1 = everything.split([3, 2, 2], dim=-1)
    weights = ladder.log_p(x, b0, b1).exp().detach()
    return (weights * ladder.log_q(x, b0, b1)).sum()


def _latents_only(ladder, z0, z1):
    decoder = ladder.log_p_z(z0, z1).sum()
    encoder = torch.zeros(())
    for b0, b1 in zip(z0, z1, strict=True):
        x = bits(3)
        b0, b1 = b0.expand(len(x), 2), b1.expand(len(x), 2)
        weights = log_bernoulli(ladder.dx(b1), x).exp().detach()
        encoder = encoder + (weights * ladder.log_q(x, b0, b1)).sum()
    return decoder, encoder


def gradients(ladder, **batch):
    """The enumerated gradients of L_p in theta and of L_q in phi."""
    decoder, encoder = utilities(ladder, **batch)
    return (
        torch.autograd.grad(decoder, ladder.theta, allow_unused=True),
        torch.autograd.grad(encoder, ladder.phi, allow_unused=True),
    )
