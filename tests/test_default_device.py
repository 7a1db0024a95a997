"""Whoever has torch make all tensors on a device needs no `device=` anywhere."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import Adam
from torch import nn

from pyro_symeq import LimitingDistribution, SymmetricEquilibrium, TensorLoader
from pyro_symeq.metrics import consistency, exploitability, information, log_likelihood

NUM_PIXELS, NUM_BITS = 6, 12


class VAE:
    def __init__(self):
        self.decoder = nn.Linear(NUM_BITS, NUM_PIXELS)
        self.encoder = nn.Linear(NUM_PIXELS, NUM_BITS)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((NUM_BITS,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))


@pytest.mark.parametrize("capture", [False, True])
def test_training_and_metrics(default_device, capture):
    vae = VAE()
    symeq = SymmetricEquilibrium(
        vae.model, vae.guide, Adam({"lr": 0.01}), nonfinite="skip", capture=capture
    )
    x = torch.randn(200, NUM_PIXELS)
    for _ in range(7):
        for batch in TensorLoader(x, batch_size=25):  # a code is looked for at step 50
            assert math.isfinite(symeq.step(batch))
    with pytest.warns(UserWarning, match="Skipped a batch"):
        assert math.isnan(symeq.step(x[:25] / 0))
    assert math.isfinite(symeq.step(x[:25]))
    pair = vae.model, vae.guide
    draws = LimitingDistribution(*pair).sample(1, x[:10], num_steps=3)
    assert draws["z"].device.type == default_device.type
    assert log_likelihood(*pair, x, num_draws=5).values.isfinite().all()
    assert information(vae.guide, x, num_draws=5)["z"].isfinite().all()
    told = consistency(*pair, x, num_steps=3)["z"]
    assert all(math.isfinite(value) for laws in told.values() for value in laws.values())
    gains = exploitability(symeq, [x[:50]], TensorLoader(x, batch_size=25), num_steps=4)
    assert all(math.isfinite(gain.mean) for gain in gains.values())
