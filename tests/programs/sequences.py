"""Sequences: Markov chains, recurrent networks, padding and lengths."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.programs.base import Program, program, variants


class HiddenMarkov:
    """Three hidden states and normal observations, one step a column."""

    def __init__(self):
        self.transition = torch.zeros(3, 3)
        self.locs = torch.tensor([-1.0, 0.0, 1.0])
        self.transfer = nn.Linear(3, 3)
        self.emission = nn.Linear(1, 3)

    def parameters(self):
        return pyro.param("transition", self.transition), pyro.param("locs", self.locs)

    def model(self, x):
        logits, locs = self.parameters()
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x), dtype=torch.long, device=x.device)
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", dist.Categorical(logits=logits[z]))
                pyro.sample(f"x_{t}", dist.Normal(locs[z], 1.0), obs=x[:, t])

    def forward_filter(self, x):
        pyro.module("transfer", self.transfer)
        pyro.module("emission", self.emission)
        belief = x.new_zeros(len(x), 3)
        beliefs = []
        for t in range(x.shape[1]):
            belief = self.transfer(belief.softmax(-1)) + self.emission(x[:, t, None])
            beliefs.append(belief)
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                pyro.sample(f"z_{t}", dist.Categorical(logits=beliefs[t]))


@program
def hidden_markov_model_with_a_forward_filter():
    pair = HiddenMarkov()
    return Program(pair.model, pair.forward_filter, (torch.randn(3, 4),))


@program
def hidden_markov_model_of_a_single_sequence():
    emission = nn.Linear(1, 2)

    def model(x):
        stay = pyro.param("stay", x.new_tensor(0.7), constraint=dist.constraints.unit_interval)
        z = torch.zeros_like(stay)
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Bernoulli(stay * z + (1 - stay) * (1 - z)))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[t])

    def guide(x):
        pyro.module("emission", emission)
        for t in pyro.markov(range(len(x))):
            logits = emission(x[t, None])
            pyro.sample(f"z_{t}", dist.Bernoulli(logits=logits[0] - logits[1]))

    return Program(model, guide, (torch.randn(5),))


@program
def subsampled_sequences():
    """data[ind, t], column by column."""
    net = nn.Linear(1, 2)

    def model(data):
        rows = pyro.param("rows", data.new_zeros(2, 2))
        with pyro.plate("data", len(data), subsample_size=3) as ind:
            z = torch.zeros(len(ind), dtype=torch.long, device=data.device)
            for t in pyro.markov(range(data.shape[1])):
                z = pyro.sample(f"z_{t}", dist.Categorical(logits=rows[z]))
                pyro.sample(f"x_{t}", dist.Normal(2.0 * z, 1.0), obs=data[ind, t])

    def guide(data):
        pyro.module("net", net)
        with pyro.plate("data", len(data), subsample_size=3) as ind:
            for t in pyro.markov(range(data.shape[1])):
                pyro.sample(f"z_{t}", dist.Categorical(logits=net(data[ind, t, None])))

    return Program(model, guide, (torch.randn(5, 3),))


@program
def padded_sequences_with_lengths():
    """Pyro's HMM tutorial: a mask in each step, and words one by one."""
    net = nn.Linear(4, 2)

    def model(words, lengths):
        emit = pyro.param("emit", torch.zeros(2, 4, device=words.device))
        with pyro.plate("data", len(words)):
            z = 0
            for t in pyro.markov(range(words.shape[1])):
                with poutine.mask(mask=t < lengths):
                    prior = dist.Categorical(logits=emit[z, :2])
                    z = pyro.sample(f"z_{t}", prior)
                    pyro.sample(f"x_{t}", dist.Categorical(logits=emit[z]), obs=words[:, t])

    def guide(words, lengths):
        pyro.module("net", net)
        one_hot = torch.eye(4, device=words.device, dtype=net.weight.dtype)[words]
        with pyro.plate("data", len(words)):
            for t in pyro.markov(range(words.shape[1])):
                with poutine.mask(mask=t < lengths):
                    pyro.sample(f"z_{t}", dist.Categorical(logits=net(one_hot[:, t])))

    words = torch.randint(4, (4, 6))
    return Program(model, guide, (words, torch.tensor([6, 4, 2, 1])))


@program
def masks_by_distribution():
    net = nn.Linear(1, 1)

    def model(x, lengths):
        drift = pyro.param("drift", x.new_zeros(()))
        known = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        with pyro.plate("data", len(x)):
            z = x.new_zeros(len(x))
            for t in range(x.shape[1]):
                z = pyro.sample(f"z_{t}", dist.Normal(z + drift, 1.0).mask(known[:, t]))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0).mask(known[:, t]), obs=x[:, t])

    def guide(x, lengths):
        pyro.module("net", net)
        known = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        loc = net(x[..., None]).squeeze(-1)
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                pyro.sample(f"z_{t}", dist.Normal(loc[:, t], 1.0).mask(known[:, t]))

    return Program(model, guide, (torch.randn(3, 4), torch.tensor([4, 2, 3])))


@program
def list_of_sequences_of_different_lengths():
    net = nn.Linear(1, 1)

    def model(sequences):
        drift = pyro.param("drift", sequences[0].new_zeros(()))
        for i in pyro.plate("sequences", len(sequences)):
            x = sequences[i]
            z = x.new_zeros(())
            for t in pyro.markov(range(len(x))):
                z = pyro.sample(f"z_{i}_{t}", dist.Normal(z + drift, 1.0))
                pyro.sample(f"x_{i}_{t}", dist.Normal(z, 1.0), obs=x[t])

    def guide(sequences):
        pyro.module("net", net)
        for i in pyro.plate("sequences", len(sequences)):
            loc = net(sequences[i][:, None]).squeeze(-1)
            for t in pyro.markov(range(len(loc))):
                pyro.sample(f"z_{i}_{t}", dist.Normal(loc[t], 1.0))

    sequences = [torch.randn(3), torch.randn(1), torch.randn(2)]
    return Program(
        model, guide, (sequences,), data=tuple(sequences), later=((([torch.randn(4)],), {}),)
    )


@program
def linear_state_space_model():
    encoder = nn.GRU(2, 3, batch_first=True)

    def model(x):
        a = pyro.param("a", 0.5 * torch.eye(3).to(x))
        c = pyro.param("c", x.new_ones(3, 2))
        with pyro.plate("data", len(x)):
            z = x.new_zeros(len(x), 3)
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", dist.Normal(z @ a, 1.0).to_event(1))
                pyro.sample(f"x_{t}", dist.Normal(z @ c, 1.0).to_event(1), obs=x[:, t])

    def guide(x):
        pyro.module("encoder", encoder)
        h, _ = encoder(x)
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                pyro.sample(f"z_{t}", dist.Normal(h[:, t], 1.0).to_event(1))

    return Program(model, guide, (torch.randn(3, 3, 2),))


class DeepMarkov:
    """Pyro's deep Markov model, in small."""

    def __init__(self):
        self.transition = nn.Linear(2, 2)
        self.emitter = nn.Linear(2, 5)
        self.combiner = nn.Linear(2, 3)
        self.rnn = nn.RNN(5, 3, batch_first=True)
        self.h_0 = nn.Parameter(torch.zeros(1, 1, 3))

    def model(self, x, mask, annealing=1.0):
        pyro.module("transition", self.transition)
        pyro.module("emitter", self.emitter)
        z = x.new_zeros(len(x), 2)
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                with poutine.scale(scale=annealing):
                    law = dist.Normal(self.transition(z).tanh(), 1.0)
                    z = pyro.sample(f"z_{t}", law.mask(mask[:, t, None]).to_event(1))
                law = dist.Bernoulli(logits=self.emitter(z)).mask(mask[:, t, None])
                pyro.sample(f"x_{t}", law.to_event(1), obs=x[:, t])

    def guide(self, x, mask, annealing=1.0):
        h, _ = self.rnn(x.flip(1), self.h_0.expand(1, len(x), 3).contiguous())
        self.draw(h.flip(1), mask, annealing)

    def draw(self, h, mask, annealing):
        pyro.module("combiner", self.combiner)
        pyro.module("rnn", self.rnn)
        pyro.param("h_0", self.h_0)
        z = h.new_zeros(len(h), 2)
        with pyro.plate("data", len(h)):
            for t in pyro.markov(range(h.shape[1])):
                both = 0.5 * (self.combiner(z).tanh() + h[:, t])
                with poutine.scale(scale=annealing):
                    law = dist.Normal(both[:, :2], 1.0).mask(mask[:, t, None])
                    z = pyro.sample(f"z_{t}", law.to_event(1))


def rolls():
    """Bits for 3 sequences of 4 steps, with what is not padding."""
    lengths = torch.tensor([4, 3, 2])
    mask = torch.arange(4) < lengths[:, None]
    return torch.rand(3, 4, 5).round() * mask[..., None], mask, lengths


@program
def deep_markov_model():
    pair = DeepMarkov()
    x, mask, _ = rolls()
    return Program(pair.model, pair.guide, (x, mask, 0.5), later=(((x, mask), {}),))


def reverse(x, lengths):
    """Turns each sequence around and leaves its padding at the end."""
    flipped = torch.zeros_like(x)
    for i, n in enumerate(lengths.tolist()):
        flipped[i, :n] = x[i, :n].flip(0)
    return flipped


@variants({"padding as dreamed": False, "padding zeroed": True})
def deep_markov_model_with_packed_reversed_sequences(zero_padding):
    """The guide's input is a second, packed copy of the data, as in Pyro's tutorial."""
    pair = DeepMarkov()
    x, mask, lengths = rolls()

    def pack(x):
        return pack_padded_sequence(reverse(x, lengths), lengths.cpu(), batch_first=True)

    def model(x, packed, mask):
        pair.model(x, mask)

    def guide(x, packed, mask):
        h, _ = pair.rnn(packed, pair.h_0.expand(1, len(mask), 3).contiguous())
        h, _ = pad_packed_sequence(h, batch_first=True)
        pair.draw(reverse(h, lengths), mask, 1.0)

    def bind(trace, args, kwargs):
        steps = [trace.nodes[f"x_{t}"]["value"] for t in range(4)]
        x = torch.stack(steps, 1)
        if zero_padding:
            x = x * args[2][..., None]
        return (x, pack(x), args[2]), kwargs

    args = (x, pack(x), mask)
    return Program(model, guide, args, options={"bind": bind}, data=(x, args[1].data))


@program
def recurrent_decoder():
    """A sentence VAE: one latent, and words from a recurrent cell."""
    words_in = nn.Embedding(4, 3)
    cell, head = nn.GRUCell(3, 2), nn.Linear(2, 4)
    encoder, top = nn.GRU(4, 2, batch_first=True), nn.Linear(2, 2)

    def model(words):
        pyro.module("words_in", words_in)
        pyro.module("cell", cell)
        pyro.module("head", head)
        with pyro.plate("data", len(words)):
            h = pyro.sample("z", dist.Normal(head.weight.new_zeros(2), 1.0).to_event(1))
            word = torch.zeros(len(words), dtype=torch.long, device=words.device)
            for t in range(words.shape[1]):
                h = cell(words_in(word), h)
                law = dist.Categorical(logits=head(h))
                word = pyro.sample(f"word_{t}", law, obs=words[:, t])

    def guide(words):
        pyro.module("encoder", encoder)
        pyro.module("top", top)
        eye = torch.eye(4, device=words.device, dtype=top.weight.dtype)
        _, h = encoder(eye[words])
        with pyro.plate("data", len(words)):
            pyro.sample("z", dist.Normal(top(h[0]), 1.0).to_event(1))

    return Program(model, guide, (torch.randint(4, (3, 7)),))
