"""How data reach the programs: containers, casts, views, covariates, and bind=."""

import dataclasses
import functools
from collections import OrderedDict, namedtuple
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from tests.programs.base import Program, program, variants


class Pair:
    """A pair over rows of three, written once for data x however they arrive."""

    def __init__(self, pick):
        self.pick = pick
        self.decoder = nn.Linear(2, 3)
        self.encoder = nn.Linear(3, 2)

    def model(self, *args, **kwargs):
        x = self.pick(*args, **kwargs)
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, *args, **kwargs):
        x = self.pick(*args, **kwargs)
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))


@dataclasses.dataclass
class Record:
    x: Tensor
    name: str = "a record"


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    weights: Any = None


class Row(NamedTuple):
    x: Tensor
    name: str


Point = namedtuple("Point", "ids x")

# Each case: the container of x, and the way in which both programs open it.
CONTAINERS = {
    "plain": (lambda x: (x,), lambda x: x),
    "tuple": (lambda x: ((x, 7),), lambda batch: batch[0]),
    "list": (lambda x: ([x],), lambda batch: batch[0]),
    "dict": (lambda x: ({"x": x, "ids": [1, 2]},), lambda batch: batch["x"]),
    "ordered dict": (lambda x: (OrderedDict(n=len(x), x=x),), lambda batch: batch["x"]),
    "dataclass": (lambda x: (Record(x),), lambda batch: batch.x),
    "frozen dataclass": (lambda x: (Frozen(x),), lambda batch: batch.x),
    "typed named tuple": (lambda x: (Row(x, "a row"),), lambda batch: batch.x),
    "named tuple": (lambda x: (Point(torch.arange(4), x),), lambda batch: batch.x),
    "nested": (
        lambda x: ({"views": [(x, None), Record(torch.ones(2))]},),
        lambda batch: batch["views"][0][0],
    ),
    "second argument": (lambda x: ("name", x, 3), lambda name, x, n: x),
}


@variants(CONTAINERS)
def container(case):
    wrap, pick = case
    x = torch.randn(4, 3)
    pair = Pair(pick)
    return Program(pair.model, pair.guide, wrap(x), data=(x,))


@program
def keyword_arguments():
    pair = Pair(lambda *, x, flag=True: x)
    x = torch.randn(4, 3)
    return Program(pair.model, pair.guide, kwargs={"x": x, "flag": False}, data=(x,))


@program
def rows_as_separate_arguments():
    pair = Pair(lambda x: x)

    def model(*rows):
        pyro.module("decoder", pair.decoder)
        for i, x in enumerate(rows):
            z = pyro.sample(f"z_{i}", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample(f"x_{i}", dist.Normal(pair.decoder(z), 1.0).to_event(1), obs=x)

    def guide(*rows):
        pyro.module("encoder", pair.encoder)
        for i, x in enumerate(rows):
            pyro.sample(f"z_{i}", dist.Normal(pair.encoder(x), 1.0).to_event(1))

    rows = tuple(torch.randn(3) for _ in range(3))
    return Program(model, guide, rows, data=rows)


VIEWS = {
    "flattened images": ((4, 1, 3), lambda x: x.flatten(1)),
    "reshaped": ((2, 6), lambda x: x.reshape(4, 3)),
    "view": ((4, 3, 1, 1), lambda x: x.view(-1, 3)),
    "squeezed": ((4, 1, 3), lambda x: x.squeeze(1)),
    "transposed": ((3, 4), lambda x: x.T),
    "permuted": ((3, 4, 1), lambda x: x.permute(1, 0, 2).squeeze(-1)),
}


@variants(VIEWS)
def view(case):
    shape, pick = case
    pair = Pair(pick)
    return Program(pair.model, pair.guide, (torch.randn(shape),))


CASTS = {
    "bytes": (lambda x: x.to(torch.uint8), lambda x: x.to(torch.get_default_dtype())),
    "booleans": (lambda x: x.bool(), lambda x: x.to(torch.get_default_dtype())),
    "integers": (lambda x: x.long(), lambda x: x.to(torch.get_default_dtype())),
    "double": (lambda x: x.double(), lambda x: x.to(torch.get_default_dtype())),
    "bytes, flattened": (
        lambda x: x.to(torch.uint8).reshape(-1, 1, 5, 5),
        lambda x: x.flatten(1).to(torch.get_default_dtype()),
    ),
}


@variants(CASTS)
def cast(case):
    store, read = case
    decoder, encoder = nn.Linear(2, 25), nn.Linear(25, 2)

    def model(image):
        x = read(image)
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(image):
        x = read(image)
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(2 * x - 1), 1.0).to_event(1))

    return Program(model, guide, (store(torch.rand(3, 25).round()),))


@program
def covariates():
    """A conditional VAE: the digit is known to both and modelled by neither."""
    decoder, encoder, start = nn.Linear(5, 4), nn.Linear(7, 2), nn.Linear(3, 2)

    def model(x, c):
        pyro.module("decoder", decoder)
        pyro.module("start", start)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(start(c), 1.0).to_event(1))
            loc = decoder(torch.cat([z, c], -1))
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x, c):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            z = encoder(torch.cat([x, c], -1))
            pyro.sample("z", dist.Normal(z, 1.0).to_event(1))

    x, c = torch.randn(3, 4), torch.eye(3)
    return Program(model, guide, (x, c))


@program
def regression_on_inputs():
    """Outputs are data, inputs are not; both are columns of one table."""
    net, encoder = nn.Linear(3, 1), nn.Linear(3, 1)

    def model(table):
        inputs, output = table[:, :2], table[:, 2]
        pyro.module("net", net)
        with pyro.plate("data", len(table)):
            z = pyro.sample("z", dist.Bernoulli(table.new_tensor(0.5)))
            loc = net(torch.cat([inputs, z[:, None]], -1)).squeeze(-1)
            pyro.sample("output", dist.Normal(loc, 0.5), obs=output)

    def guide(table):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(table)):
            pyro.sample("z", dist.Bernoulli(logits=encoder(table).squeeze(-1)))

    table = torch.randn(5, 3)
    return Program(model, guide, (table,), data=(table[:, 2],))


@program
def two_kinds_of_data():
    image_net, text_net, encoder = nn.Linear(2, 3), nn.Linear(2, 4), nn.Linear(7, 2)

    def model(image, text):
        pyro.module("image_net", image_net)
        pyro.module("text_net", text_net)
        with pyro.plate("data", len(image)):
            z = pyro.sample("z", dist.Normal(image.new_zeros(2), 1.0).to_event(1))
            pyro.sample("image", dist.Normal(image_net(z), 1.0).to_event(1), obs=image)
            pyro.sample("text", dist.Normal(text_net(z), 1.0).to_event(1), obs=text)

    def guide(image, text):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(image)):
            both = torch.cat([image, text], -1)
            pyro.sample("z", dist.Normal(encoder(both), 1.0).to_event(1))

    data = torch.randn(4, 3), torch.randn(4, 4)
    return Program(model, guide, data, data=data)


@program
def two_kinds_of_data_in_one_table():
    image_net, text_net, encoder = nn.Linear(2, 3), nn.Linear(2, 4), nn.Linear(7, 2)

    def model(table):
        pyro.module("image_net", image_net)
        pyro.module("text_net", text_net)
        with pyro.plate("data", len(table)):
            z = pyro.sample("z", dist.Normal(table.new_zeros(2), 1.0).to_event(1))
            pyro.sample("image", dist.Normal(image_net(z), 1.0).to_event(1), obs=table[:, :3])
            pyro.sample("text", dist.Normal(text_net(z), 1.0).to_event(1), obs=table[:, 3:])

    def guide(table):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(table)):
            pyro.sample("z", dist.Normal(encoder(table), 1.0).to_event(1))

    return Program(model, guide, (torch.randn(4, 7),))


@program
def one_of_two_kinds_may_be_missing():
    image_net, text_net = nn.Linear(2, 3), nn.Linear(2, 4)
    from_image, from_text = nn.Linear(3, 2), nn.Linear(4, 2)

    def model(image, text=None):
        pyro.module("image_net", image_net)
        pyro.module("text_net", text_net)
        with pyro.plate("data", len(image)):
            z = pyro.sample("z", dist.Normal(image.new_zeros(2), 1.0).to_event(1))
            pyro.sample("image", dist.Normal(image_net(z), 1.0).to_event(1), obs=image)
            pyro.sample("text", dist.Normal(text_net(z), 1.0).to_event(1), obs=text)

    def guide(image, text=None):
        pyro.module("from_image", from_image)
        loc = from_image(image)
        if text is not None:
            pyro.module("from_text", from_text)
            loc = loc + from_text(text)
        with pyro.plate("data", len(image)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    image, text = torch.randn(4, 3), torch.randn(4, 4)
    return Program(
        model,
        guide,
        (image,),
        data=(image, text),
        later=(((image, text), {}), ((image,), {"text": text})),
        is_sum=False,
    )


@program
def switches_and_numbers_beside_the_data():
    pair = Pair(lambda x, **options: x)

    def model(x, mode="train", temperature=1.0, flags=()):
        pair.model(x)

    def guide(x, mode="train", temperature=1.0, flags=()):
        pair.guide(x / temperature if mode == "train" else x)

    x = torch.randn(4, 3)
    later = (((x,), {"mode": "test"}), ((x, "train", 2.0), {"flags": ("a",)}))
    return Program(model, guide, (x,), later=later)


@program
def batches_of_different_lengths():
    pair = Pair(lambda x: x)
    x = torch.randn(5, 3)
    return Program(pair.model, pair.guide, (x,), later=(((x[:2],), {}), ((x[1:2],), {})))


@program
def partial_application():
    pair = Pair(lambda x: x)

    def model(x, *, slope):
        pair.model(x)

    def guide(x, *, slope):
        pair.guide(slope * x)

    programs = [functools.partial(f, slope=2.0) for f in (model, guide)]
    return Program(*programs, (torch.randn(4, 3),))


@variants(
    {
        "dict": {"x": "x"},
        "function": lambda trace, args, kwargs: ((trace.nodes["x"]["value"].exp(),), kwargs),
    }
)
def bind(how):
    """The model observes a function of the argument, which the library can't invert."""
    pair = Pair(lambda x: x)
    read = torch.clone if isinstance(how, dict) else torch.log

    def model(x):
        pair.model(read(x))

    def guide(x):
        pair.guide(read(x))

    x = torch.rand(4, 3) + 0.5
    return Program(model, guide, (x,), options={"bind": how})


@program
def bind_of_a_nested_argument():
    pair = Pair(lambda x: x)

    def model(batch):
        pair.model(batch["views"][1].clone())

    def guide(batch):
        pair.guide(batch["views"][1].clone())

    x = torch.randn(4, 3)
    batch = {"views": [torch.ones(2), x]}
    options = {"bind": {"batch.views.1": "x"}}
    return Program(model, guide, (batch,), data=(x,), options=options)


@program
def observed_as_both_float_and_integer():
    """Scores as numbers and grades as counts, in one record."""
    decoder, encoder = nn.Linear(1, 4), nn.Linear(4, 1)

    def model(scores, grades):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(scores)):
            z = pyro.sample("z", dist.Normal(scores.new_zeros(1), 1.0).to_event(1))
            f = decoder(z)
            pyro.sample("scores", dist.Normal(f[:, :2], 1.0).to_event(1), obs=scores)
            pyro.sample("grades", dist.Categorical(logits=f[:, 1:]), obs=grades)

    def guide(scores, grades):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(scores)):
            both = torch.cat([scores, scores * 0 + grades[:, None]], -1)
            pyro.sample("z", dist.Normal(encoder(both), 1.0).to_event(1))

    data = torch.randn(12, 2), torch.arange(12) % 3
    return Program(model, guide, data, data=data)
