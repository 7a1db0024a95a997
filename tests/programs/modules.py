"""Networks and how they are registered: pyro.module, PyroModule and its kin."""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample, pyro_method
from torch import nn

from tests.programs.base import Program, program


def rows():
    return torch.randn(4, 3)


@program
def methods_of_a_torch_module():
    class VAE(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
            self.encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))

        def model(self, x):
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", x.shape[0]):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

        def guide(self, x):
            pyro.module("encoder", self.encoder)
            with pyro.plate("data", x.shape[0]):
                loc, log_scale = self.encoder(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    vae = VAE()
    return Program(vae.model, vae.guide, (rows(),))


class Decoder(PyroModule):
    def __init__(self):
        super().__init__("decoder")
        self.net = PyroModule[nn.Linear](2, 3)
        self.scale = PyroParam(torch.ones(3), constraint=dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), self.scale).to_event(1), obs=x)


class Encoder(PyroModule):
    def __init__(self):
        super().__init__("encoder")
        self.net = PyroModule[nn.Linear](3, 2)
        self.scale = PyroParam(torch.ones(2), constraint=dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), self.scale).to_event(1))


@program
def pyro_modules():
    return Program(Decoder(), Encoder(), (rows(),))


@program
def methods_of_a_pyro_module():
    class VAE(PyroModule):
        def __init__(self):
            super().__init__("vae")
            self.decoder = PyroModule[nn.Linear](2, 3)
            self.encoder = PyroModule[nn.Linear](3, 2)
            self.offset = PyroParam(torch.zeros(3))

        @pyro_method
        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                loc = self.decoder(z) + self.offset
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

        @pyro_method
        def guide(self, x):
            with pyro.plate("data", len(x)):
                loc = self.encoder(x - self.offset)
                pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    vae = VAE()
    return Program(vae.model, vae.guide, (rows(),))


@program
def guide_that_holds_the_decoder():
    """A PyroModule guide may read the decoder's attributes, which stay the decoder's."""

    class Ladder(PyroModule):
        def __init__(self, decoder):
            super().__init__("guide")
            self.decoder = decoder
            self.up = PyroModule[nn.Linear](3, 2)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                loc = self.up(x) + (x - self.decoder.net.bias) @ self.decoder.net.weight
                pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    decoder = Decoder()
    return Program(decoder, Ladder(decoder), (rows(),))


@program
def weights_as_latents():
    """PyroSample: a Bayesian regression, with a guide that reads the data."""

    class Regression(PyroModule):
        def __init__(self):
            super().__init__("regression")
            self.linear = PyroModule[nn.Linear](2, 1)
            zeros = torch.zeros(1, 2)
            self.linear.weight = PyroSample(dist.Normal(zeros, 1.0).to_event(2))

        def forward(self, y, inputs):
            loc = self.linear(inputs).squeeze(-1)
            with pyro.plate("data", len(inputs)):
                pyro.sample("y", dist.Normal(loc, 0.5), obs=y)

    net = nn.Linear(2, 2)

    def guide(y, inputs):
        pyro.module("net", net)
        loc = net(y @ inputs)[None]
        pyro.sample("regression.linear.weight", dist.Normal(loc, 0.5).to_event(2))

    y = torch.randn(6)
    return Program(Regression(), guide, (y, torch.randn(6, 2)))


@program
def random_prior_that_depends_on_another():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.bias = PyroParam(torch.zeros(()))
            self.loc = PyroSample(lambda self: dist.Normal(self.bias, 1.0))
            self.z = PyroSample(lambda self: dist.Normal(self.loc, 1.0))

        def forward(self, x):
            z = self.z
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    net = nn.Linear(1, 2)

    def guide(x):
        pyro.module("net", net)
        loc, z = net(x.mean()[None]).unbind(-1)
        pyro.sample("loc", dist.Normal(loc, 1.0))
        pyro.sample("z", dist.Normal(z, 1.0))

    return Program(Model(), guide, (torch.randn(4),))


@program
def shared_embedding():
    """Encoder and decoder read one table of codes, which is the decoder's."""
    codes, up = nn.Embedding(3, 4), nn.Linear(4, 4)

    def model(x):
        pyro.module("codes", codes)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(x.new_ones(3)))
            pyro.sample("x", dist.Normal(codes(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("codes", codes)
        pyro.module("up", up)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=up(x) @ codes.weight.T))

    return Program(model, guide, (torch.randn(4, 4),))


@program
def tied_weights():
    """The encoder is the transposed decoder with a bias of its own."""
    decoder = nn.Linear(2, 3)
    start = torch.zeros(2)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        bias = pyro.param("bias", start)
        with pyro.plate("data", len(x)):
            loc = (x - decoder.bias) @ decoder.weight + bias
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    return Program(model, guide, (rows(),))


@program
def both_programs_register_everything():
    vae = nn.ModuleDict({"decoder": nn.Linear(2, 3), "encoder": nn.Linear(3, 2)})

    def model(x):
        pyro.module("decoder", vae["decoder"])
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(vae["decoder"](z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("decoder", vae["decoder"])
        pyro.module("encoder", vae["encoder"])
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(vae["encoder"](x), 1.0).to_event(1))

    return Program(model, guide, (rows(),))


@program
def batch_normalisation():
    decoder = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    return Program(model, guide, (rows(),))


@program
def dropout():
    decoder = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.3), nn.Linear(8, 3))
    encoder = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 2))

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    return Program(model, guide, (rows(),), is_sum=False)


@program
def convolutions():
    decoder = nn.ConvTranspose2d(2, 1, 3)
    encoder = nn.Conv2d(1, 2, 3)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((2, 2, 2), 0.5)).to_event(3))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(3), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=encoder(x)).to_event(3))

    return Program(model, guide, (torch.randn(2, 1, 4, 4),))


@program
def objects_that_can_be_called():
    class Model:
        def __init__(self):
            self.net = nn.Linear(2, 3)

        def __call__(self, x):
            pyro.module("decoder", self.net)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)

    class Guide:
        def __init__(self):
            self.net = nn.Linear(3, 2)

        def __call__(self, x):
            pyro.module("encoder", self.net)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.net(x), 1.0).to_event(1))

    return Program(Model(), Guide(), (rows(),))


@program
def learned_flow_as_a_prior():
    flow = dist.transforms.affine_coupling(2, [4])
    decoder, encoder = nn.Linear(2, 3), nn.Linear(3, 2)

    def model(x):
        pyro.module("flow", flow)
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            base = dist.Normal(x.new_zeros(2), 1.0).to_event(1)
            z = pyro.sample("z", dist.TransformedDistribution(base, [flow]))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    return Program(model, guide, (rows(),))
