"""Whose parameters are whose: what a program names, and what it uses."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import SGD
from torch import nn

from pyro_symeq import SymmetricEquilibrium, SymmetricUtility

X = torch.eye(6, dtype=torch.float64)


class Pair(nn.Module):
    """A pair whose model names the networks of both programs."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 6)
        self.encoder = nn.Linear(6, 2)
        self.head = nn.Linear(2, 2)

    def name_networks(self):
        pyro.module("pair", self)

    def model(self, x):
        self.name_networks()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((2,), 0.5)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))

    def guide_with_a_head(self, x):
        pyro.module("head", self.head)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.head(self.encoder(x))).to_event(1))


def moved(pair, train):
    """The networks that a training moves."""
    networks = dict(pair.named_children())
    before = {name: network.weight.detach().clone() for name, network in networks.items()}
    train()
    return {name for name, network in networks.items() if (network.weight != before[name]).any()}


def steps_of(pair, **options):
    symeq = SymmetricEquilibrium(pair.model, pair.guide, SGD({"lr": 0.1}), **options)
    return lambda: [symeq.step(X) for _ in range(6)]


WAYS = {
    "equilibrium": steps_of,
    "captured": lambda pair: steps_of(pair, capture=True),
    "SVI": lambda pair: (
        lambda: SVI(pair.model, pair.guide, SGD({"lr": 0.1}), SymmetricUtility()).step(X)
    ),
    "module": lambda pair: lambda: SymmetricUtility()(pair.model, pair.guide)(X),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_encoder_whose_networks_are_all_named_by_the_model_is_refused(way):
    pair = Pair()
    names = r"\['pair\$\$\$encoder.bias', 'pair\$\$\$encoder.weight'\]"
    with pytest.raises(ValueError, match=rf"only the program of the encoder has used .*{names}"):
        WAYS[way](pair)()
    assert not moved(pair, lambda: None)


def test_it_may_claim_them():
    pair = Pair()
    train = steps_of(pair, parameters={"encoder": pair.encoder})
    assert moved(pair, train) == {"decoder", "encoder"}


def test_an_encoder_with_networks_of_its_own_besides_is_warned_once():
    pair = Pair()
    pair.guide = pair.guide_with_a_head
    train = steps_of(pair, parameters={"encoder": pair.head})
    with pytest.warns(UserWarning) as seen:
        assert moved(pair, train) == {"decoder", "head"}
    assert len(seen) == 1
    assert "only the program of the encoder has used by now" in str(seen[0].message)
    assert seen[0].filename == __file__


def test_a_second_training_of_the_same_names_is_refused():
    """The store has the networks of the first, so that nobody would train those of the second."""

    class Apart(Pair):
        def name_networks(self):
            pyro.module("decoder", self.decoder)

        def guide(self, x):
            pyro.module("encoder", self.encoder)
            super().guide(x)

    first, second = Apart(), Apart()
    assert moved(first, steps_of(first)) == {"decoder", "encoder"}
    with pytest.raises(ValueError, match=r"nothing to learn for the decoder.*clear_param_store"):
        steps_of(second)()
    pyro.clear_param_store()
    assert moved(second, steps_of(second)) == {"decoder", "encoder"}
