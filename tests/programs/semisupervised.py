"""Latents that some batches or rows observe, and data that some lack."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.nn.functional import one_hot

from pyro_symeq import Batch
from tests.programs.base import Program, program, variants


class Classes:
    """Three classes, a style, and rows of four; the label is a one-hot row."""

    def __init__(self):
        self.decoder = nn.Linear(5, 4)
        self.classify = nn.Linear(4, 3)
        self.encoder = nn.Linear(7, 2)

    def generate(self, n, y=None, x=None, **options):
        pyro.module("decoder", self.decoder)
        zeros = self.decoder.weight.new_zeros(2)
        with pyro.plate("data", n):
            y = pyro.sample("y", dist.OneHotCategorical(logits=zeros.new_zeros(3)), obs=y)
            z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            law = dist.Normal(self.decoder(torch.cat([y, z], -1)), 1.0).to_event(1)
            pyro.sample("x", law, obs=x, **options)

    def model(self, x, y=None):
        self.generate(len(x), y, x)

    def guide(self, x, y=None):
        pyro.module("classify", self.classify)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(logits=self.classify(x)))
            self.style(x, y)

    def style(self, x, y):
        pyro.module("encoder", self.encoder)
        loc = self.encoder(torch.cat([x, y], -1))
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


def rows():
    return torch.randn(4, 4)


def labels():
    return torch.eye(3)[[0, 2, 1, 2]]


@program
def labels_given():
    pair = Classes()
    x, y = rows(), labels()
    return Program(pair.model, pair.guide, (x, y), labels={"y": y}, is_sum=False)


@program
def labels_missing():
    pair = Classes()
    return Program(pair.model, pair.guide, (rows(),), later=(((rows(), None), {}),))


@program
def labels_come_and_go():
    pair = Classes()
    x, y = rows(), labels()
    later = (((x, y), {}), ((x,), {}), ((x,), {"y": y}))
    return Program(pair.model, pair.guide, (x,), later=later, labels={"y": y}, is_sum=False)


@program
def labels_for_the_decoder_alone():
    pair = Classes()
    x, y = rows(), labels()
    return Program(pair.model, pair.guide, (x, y), options={"supervise_encoder": False})


@program
def labels_in_a_dict():
    pair = Classes()

    def model(batch):
        pair.model(batch["image"], batch.get("label"))

    def guide(batch):
        pair.guide(batch["image"])

    x, y = rows(), labels()
    later = ((({"image": x},), {}),)
    batch = {"image": x, "label": y}
    return Program(model, guide, (batch,), data=(x,), labels={"y": y}, later=later, is_sum=False)


@program
def all_latents_given():
    net, up = nn.Linear(2, 3), nn.Linear(3, 2)

    def model(x, z=None):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1), obs=z)
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(x, z=None):
        pyro.module("up", up)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(up(x), 1.0).to_event(1))

    x, z = torch.randn(4, 3), torch.randn(4, 2)
    return Program(model, guide, (x, z), labels={"z": z})


@program
def latents_given_and_data_missing():
    net, up = nn.Linear(2, 3), nn.Linear(3, 2)

    def model(x=None, z=None):
        loc = pyro.param("loc", net.weight.new_zeros(2))
        pyro.module("net", net)
        with pyro.plate("data", len(x if x is not None else z)):
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1), obs=z)
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(x=None, z=None):
        pyro.module("up", up)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(up(x), 1.0).to_event(1))

    x, z = torch.randn(4, 3), torch.randn(4, 2)
    return Program(
        model,
        guide,
        kwargs={"z": z},
        data=(x,),
        later=(((None, z), {}), ((x,), {}), ((x, z), {})),
        labels={"z": z},
        is_sum=False,
    )


@program
def integer_labels():
    """Both programs call the class a Categorical, and the label is its value."""
    means, classify = nn.Embedding(3, 4), nn.Linear(4, 3)

    def model(x, y=None):
        pyro.module("means", means)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(x.new_ones(3)), obs=y)
            pyro.sample("x", dist.Normal(means(y), 1.0).to_event(1), obs=x)

    def guide(x, y=None):
        pyro.module("classify", classify)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=classify(x)))

    x, y = rows(), torch.tensor([0, 2, 1, 2])
    return Program(model, guide, (x, y), labels={"y": y}, later=(((x,), {}),), is_sum=False)


@program
def integer_labels_observed_as_one_hot_rows():
    """A value computed from the argument, which the guide doesn't read."""
    pair = Classes()

    def model(x, y=None):
        pair.model(x, None if y is None else one_hot(y, 3).to(x))

    def guide(x, y=None):
        pair.guide(x)

    x, y = rows(), torch.tensor([0, 2, 1, 2])
    hot = one_hot(y, 3).to(x)
    return Program(model, guide, (x, y), labels={"y": hot}, later=(((x,), {}),), is_sum=False)


@program
def two_labels_of_which_one_is_given():
    net, up = nn.Linear(4, 3), nn.Linear(3, 4)

    def model(x, a=None, b=None):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x.new_zeros(2), 1.0).to_event(1), obs=a)
            b = pyro.sample("b", dist.Normal(a, 1.0).to_event(1), obs=b)
            loc = net(torch.cat([a, b], -1))
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x, a=None, b=None):
        pyro.module("up", up)
        f = up(x)
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Normal(f[:, :2], 1.0).to_event(1))
            pyro.sample("a", dist.Normal(f[:, 2:], 1.0).to_event(1))

    x, a, b = torch.randn(4, 3), torch.randn(4, 2), torch.randn(4, 2)
    later = (((x,), {"b": b}), ((x, a, b), {}))
    return Program(model, guide, (x, a), labels={"a": a, "b": b}, later=later, is_sum=False)


class Partly:
    """A binary class that some rows give, and rows of three."""

    def __init__(self):
        self.decoder = nn.Linear(1, 3)
        self.classify = nn.Linear(3, 1)

    def model(self, x, y, known):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(x.new_tensor(0.5)), obs=y, obs_mask=known)
            law = dist.Normal(self.decoder(y[:, None]), 1.0).to_event(1)
            pyro.sample("x", law, obs=x)

    def guide_of(self, name):
        def guide(x, y, known):
            pyro.module("classify", self.classify)
            with pyro.plate("data", len(x)):
                logits = self.classify(x).squeeze(-1)
                pyro.sample(name, dist.Bernoulli(logits=logits))

        return guide


@variants({"guide writes y": "y", "guide writes y_unobserved": "y_unobserved"})
def labels_of_some_rows(name):
    pair = Partly()
    x, y = torch.randn(4, 3), torch.tensor([1.0, 0.0, 0.0, 1.0])
    known = torch.tensor([True, True, False, False])
    known_labels = {"y": torch.where(known, y, torch.nan)}
    args = (x, y, known)
    return Program(pair.model, pair.guide_of(name), args, labels=known_labels, is_sum=False)


@program
def labels_of_some_rows_and_a_style():
    pair = Classes()

    def model(x, y, known):
        pyro.module("decoder", pair.decoder)
        with pyro.plate("data", len(x)):
            prior = dist.OneHotCategorical(logits=x.new_zeros(3))
            y = pyro.sample("y", prior, obs=y, obs_mask=known)
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = pair.decoder(torch.cat([y, z], -1))
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    known = torch.tensor([True, False, True, False])
    x, y = rows(), labels()
    known_labels = {"y": torch.where(known[:, None], y, torch.nan)}
    return Program(
        model,
        lambda x, y, known: pair.guide(x),
        (x, y, known),
        labels=known_labels,
        is_sum=False,
    )


SOME, NONE, ALL = [True, False, True, True], [False] * 4, [True] * 4


@variants(
    {
        "some": (SOME, False),
        "none": (NONE, False),
        "all": (ALL, False),
        "some, which the guide fills in": (SOME, True),
        "none, which the guide fills in": (NONE, True),
        "all, which the guide could fill in": (ALL, True),
    }
)
def data_of_some_rows(case):
    """Rows that are not known are zero; as SVI needs it, the guide may draw them."""
    known, guide_fills = torch.tensor(case[0]), case[1]
    decoder, encoder, fill = nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(3, 3)

    def model(x, known):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            law = dist.Normal(decoder(z), 1.0).to_event(1)
            pyro.sample("x", law, obs=x, obs_mask=known)

    def guide(x, known):
        pyro.module("encoder", encoder)
        seen = x * known[:, None]
        with pyro.plate("data", len(x)):
            if guide_fills:
                pyro.module("fill", fill)
                pyro.sample("x_unobserved", dist.Normal(fill(seen), 1.0).to_event(1))
            pyro.sample("z", dist.Normal(encoder(seen), 1.0).to_event(1))

    args = (torch.randn(4, 3) * known[:, None], known)
    return Program(model, guide, args, is_sum=False)


@variants({"auxiliary": {"infer": {"is_auxiliary": True}}, "plain": {}})
def guide_that_observes_labels_itself(options):
    """Written as for SVI: a labelled batch is scored at a site of the guide's own."""
    pair = Classes()

    def guide(x, y=None):
        pyro.module("classify", pair.classify)
        law = dist.OneHotCategorical(logits=pair.classify(x))
        with pyro.plate("data", len(x)):
            if y is None:
                y = pyro.sample("y", law)
            else:
                pyro.sample("y_data", law, obs=y, **options)
            pair.style(x, y)

    x, y = rows(), labels()
    later = (((x,), {}),)
    return Program(pair.model, guide, (x, y), labels={"y_data": y}, later=later, is_sum=False)


@program
def guide_that_gives_obs_to_its_latent():
    """The same name in both programs, observed in both."""
    pair = Classes()

    def guide(x, y=None):
        pyro.module("classify", pair.classify)
        with pyro.plate("data", len(x)):
            law = dist.OneHotCategorical(logits=pair.classify(x))
            y = pyro.sample("y", law, obs=y)
            pair.style(x, y)

    x, y = rows(), labels()
    later = (((x,), {}),)
    return Program(pair.model, guide, (x, y), labels={"y": y}, later=later, is_sum=False)


@program
def guide_without_a_label_network():
    """Where labels are given, the guide reads them and draws the style alone."""
    pair = Classes()

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pair.style(x, y)

    x, y = rows(), labels()
    return Program(pair.model, guide, (x, y), data=(x, y), is_sum=False)


@program
def several_batches_in_one_step():
    pair = Classes()
    x, y, u = rows(), labels(), torch.randn(6, 4)
    batches = Batch(x, y), Batch(u)
    return Program(pair.model, pair.guide, batches, data=(x, u), labels={"y": y}, is_sum=False)


@program
def batches_with_weights():
    pair = Classes()
    x, y, u = rows(), labels(), torch.randn(6, 4)
    batches = Batch(x, y=y).weighted(10.0), Batch(u)
    return Program(pair.model, pair.guide, batches, data=(x, u), labels={"y": y}, is_sum=False)


@program
def one_batch_as_a_batch():
    pair = Classes()
    x = rows()
    return Program(pair.model, pair.guide, (Batch(x),), data=(x,))


@program
def batches_of_every_pattern():
    """Data, data with latents, and latents alone."""
    one = latents_given_and_data_missing()
    (x,), z = one.data, one.kwargs["z"]
    batches = Batch(x), Batch(x, z).weighted(0.5), Batch(z=z)
    return Program(one.model, one.guide, batches, data=(x,), labels={"z": z}, is_sum=False)


@program
def batches_in_particles():
    pair = Classes()
    x, y, u = rows(), labels(), torch.randn(6, 4)
    return Program(
        pair.model,
        pair.guide,
        (Batch(x, y), Batch(u)),
        data=(x, u),
        options={"num_particles": 2},
        labels={"y": y},
        is_sum=False,
    )
