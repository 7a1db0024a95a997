"""Plates: sequential, nested, crossed, with dimensions of their own, and subsampled."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from tests.programs.base import Program, program, variants


@program
def sequential():
    decoder, encoder = nn.Linear(1, 2), nn.Linear(2, 1)

    def model(x):
        pyro.module("decoder", decoder)
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{i}", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample(f"x_{i}", dist.Normal(decoder(z), 1.0).to_event(1), obs=x[i])

    def guide(x):
        pyro.module("encoder", encoder)
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z_{i}", dist.Normal(encoder(x[i]), 1.0).to_event(1))

    return Program(model, guide, (torch.randn(3, 2),))


@program
def sequential_and_subsampled():
    decoder, encoder = nn.Linear(1, 2), nn.Linear(2, 1)

    def model(x):
        pyro.module("decoder", decoder)
        for i in pyro.plate("data", len(x), subsample_size=2):
            z = pyro.sample(f"z_{i}", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample(f"x_{i}", dist.Normal(decoder(z), 1.0).to_event(1), obs=x[i])

    def guide(x):
        pyro.module("encoder", encoder)
        for i in pyro.plate("data", len(x), subsample_size=2):
            pyro.sample(f"z_{i}", dist.Normal(encoder(x[i]), 1.0).to_event(1))

    return Program(model, guide, (torch.randn(4, 2),))


@program
def no_plate_at_all():
    decoder, encoder = nn.Linear(2, 3), nn.Linear(3, 2)

    def model(x):
        pyro.module("decoder", decoder)
        z = pyro.sample("z", dist.Normal(x.new_zeros(4, 2), 1.0).to_event(2))
        pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(2), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(2))

    return Program(model, guide, (torch.randn(4, 3),))


@variants({"by order": (None, None), "with dim": (-2, -1), "with other dim": (-3, -1)})
def nested(dims):
    """A latent for each group and one for each member, pixel by pixel."""
    outer, inner = dims
    group_net, member_net = nn.Linear(3, 1), nn.Linear(1, 1)

    def shape(x):
        return (3, 4) if outer != -3 else (3, 1, 4)

    def plates(x):
        if outer is None:
            members = pyro.plate("members", 4)
            return pyro.plate("groups", 3, dim=-2), members
        return pyro.plate("groups", 3, dim=outer), pyro.plate("members", 4, dim=inner)

    def model(x):
        shift = pyro.param("shift", x.new_zeros(()))
        groups, members = plates(x)
        with groups:
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
            with members:
                b = pyro.sample("b", dist.Bernoulli(x.new_tensor(0.5)))
                pyro.sample("x", dist.Normal(shift + a + 3 * b, 1.0), obs=x.reshape(shape(x)))

    def guide(x):
        pyro.module("group_net", group_net)
        pyro.module("member_net", member_net)
        stats = torch.stack([x.mean(1), x.amin(1), x.amax(1)], -1)
        a_loc = group_net(stats).reshape(3, *[1] * (len(shape(x)) - 1))
        groups, members = plates(x)
        with groups:
            a = pyro.sample("a", dist.Normal(a_loc, 1.0))
            with members:
                rest = x.reshape(shape(x)) - a
                pyro.sample("b", dist.Bernoulli(logits=member_net(rest[..., None]).squeeze(-1)))

    return Program(model, guide, (torch.randn(3, 4),))


@program
def crossed():
    """A rating has a user and a film."""
    net = nn.Linear(1, 1)

    def model(x):
        bias = pyro.param("bias", x.new_zeros(()))
        users = pyro.plate("users", x.shape[0], dim=-2)
        films = pyro.plate("films", x.shape[1], dim=-1)
        with users:
            u = pyro.sample("u", dist.Normal(x.new_zeros(()), 1.0))
        with films:
            v = pyro.sample("v", dist.Normal(x.new_zeros(()), 1.0))
        with users, films:
            pyro.sample("x", dist.Normal(bias + u + v, 0.5), obs=x)

    def guide(x):
        pyro.module("net", net)
        users = pyro.plate("users", x.shape[0], dim=-2)
        films = pyro.plate("films", x.shape[1], dim=-1)
        with users:
            pyro.sample("u", dist.Normal(net(x.mean(1, keepdim=True)), 1.0))
        with films:
            pyro.sample("v", dist.Normal(net(x.mean(0)[:, None]).squeeze(-1), 1.0))

    return Program(model, guide, (torch.randn(3, 4),))


@program
def pixels_in_a_plate():
    decoder, encoder = nn.Linear(2, 12), nn.Linear(12, 2)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), dim=-3):
            with pyro.plate("bits", 2, dim=-1):
                z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.5)))
            loc = decoder(z.squeeze(-2)).reshape(-1, 3, 4)
            with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1):
                pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        logits = encoder(x.flatten(1))[:, None]
        with pyro.plate("data", len(x), dim=-3), pyro.plate("bits", 2, dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=logits))

    return Program(model, guide, (torch.randn(2, 3, 4),))


@program
def plate_stack():
    decoder, encoder = nn.Linear(1, 2), nn.Linear(2, 1)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate_stack("data", x.shape[:2]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate_stack("data", x.shape[:2]):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    return Program(model, guide, (torch.randn(2, 3, 2),))


@program
def minibatch_given_as_the_subsample():
    """The batch takes the place of indices: only its length counts, for the scale."""
    decoder, encoder = nn.Linear(1, 2), nn.Linear(2, 1)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", 20, subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", 20, subsample=x):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    return Program(model, guide, (torch.randn(4, 2),))


@program
def minibatch_and_its_indices():
    decoder, encoder = nn.Linear(1, 2), nn.Linear(2, 1)

    def model(x, ind):
        pyro.module("decoder", decoder)
        offsets = pyro.param("offsets", x.new_zeros(20))
        with pyro.plate("data", 20, subsample=ind):
            z = pyro.sample("z", dist.Normal(offsets[ind][:, None], 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x, ind):
        pyro.module("encoder", encoder)
        with pyro.plate("data", 20, subsample=ind):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    return Program(model, guide, (torch.randn(3, 2), torch.tensor([2, 5, 11])))


ROWS = {
    "data[ind]": lambda data, ind: data[ind],
    "data[ind, :]": lambda data, ind: data[ind, :],
    "index_select": lambda data, ind: data.index_select(0, ind),
    "take along a dim": lambda data, ind: data.take_along_dim(ind[:, None], 0),
    "gather": lambda data, ind: data.gather(0, ind[:, None].expand(-1, data.shape[1])),
    "pyro.subsample": lambda data, ind: pyro.subsample(data, event_dim=1),
}


@variants(ROWS)
def subsampled(rows):
    decoder, encoder = nn.Linear(1, 3), nn.Linear(3, 1)

    def model(data):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(data), subsample_size=3, device=data.device) as ind:
            z = pyro.sample("z", dist.Normal(data.new_zeros(1), 1.0).to_event(1))
            law = dist.Normal(decoder(z), 1.0).to_event(1)
            pyro.sample("x", law, obs=rows(data, ind))

    def guide(data):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(data), subsample_size=3, device=data.device) as ind:
            pyro.sample("z", dist.Normal(encoder(rows(data, ind)), 1.0).to_event(1))

    return Program(model, guide, (torch.randn(6, 3),))


# Each case: what the argument is, and how both programs take the rows of it.
HOLDERS = {
    "in a dict": (lambda x: {"x": x, "size": len(x)}, lambda batch, ind: batch["x"][ind]),
    "images flattened": (lambda x: x[:, None, None], lambda batch, ind: batch[ind].flatten(1)),
    "columns of a table": (
        lambda x: torch.cat([torch.ones(len(x), 1), x], -1),
        lambda batch, ind: batch[ind, 1:],
    ),
    "cast": (lambda x: x.float(), lambda batch, ind: batch[ind].to(torch.get_default_dtype())),
}


@variants(HOLDERS)
def subsampled_from(case):
    hold, rows = case
    decoder, encoder = nn.Linear(1, 3), nn.Linear(3, 1)

    def model(batch):
        pyro.module("decoder", decoder)
        with pyro.plate("data", 6, subsample_size=3) as ind:
            z = pyro.sample("z", dist.Normal(decoder.bias.new_zeros(1), 1.0).to_event(1))
            law = dist.Normal(decoder(z), 1.0).to_event(1)
            pyro.sample("x", law, obs=rows(batch, ind))

    def guide(batch):
        pyro.module("encoder", encoder)
        with pyro.plate("data", 6, subsample_size=3) as ind:
            pyro.sample("z", dist.Normal(encoder(rows(batch, ind)), 1.0).to_event(1))

    x = torch.randn(6, 3)
    batch = hold(x)
    return Program(
        model, guide, (batch,), data=(batch["x"] if isinstance(batch, dict) else batch,)
    )


@program
def subsampled_with_a_global_latent():
    decoder, encoder, summary = nn.Linear(2, 2), nn.Linear(3, 1), nn.Linear(2, 1)

    def model(data):
        pyro.module("decoder", decoder)
        shift = pyro.sample("shift", dist.Normal(data.new_zeros(()), 1.0))
        with pyro.plate("data", len(data), subsample_size=3) as ind:
            z = pyro.sample("z", dist.Normal(data.new_zeros(1), 1.0).to_event(1))
            both = torch.cat([z, shift.expand_as(z)], -1)
            pyro.sample("x", dist.Normal(decoder(both), 1.0).to_event(1), obs=data[ind])

    def guide(data):
        pyro.module("encoder", encoder)
        pyro.module("summary", summary)
        loc = summary(data.mean(0)).squeeze(-1)
        shift = pyro.sample("shift", dist.Normal(loc, 1.0))
        with pyro.plate("data", len(data), subsample_size=3) as ind:
            x = data[ind]
            both = torch.cat([x, shift.expand(len(x), 1)], -1)
            pyro.sample("z", dist.Normal(encoder(both), 1.0).to_event(1))

    return Program(model, guide, (torch.randn(7, 2),))


@program
def subsampled_with_labels():
    decoder, encoder, classify = nn.Embedding(3, 4), nn.Linear(4, 1), nn.Linear(4, 3)

    def model(data, labels):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(data), subsample_size=3) as ind:
            y = pyro.sample("y", dist.Categorical(data.new_ones(3)), obs=labels[ind])
            z = pyro.sample("z", dist.Normal(data.new_zeros(1), 1.0).to_event(1))
            law = dist.Normal(decoder(y) + z, 1.0).to_event(1)
            pyro.sample("x", law, obs=data[ind])

    def guide(data, labels):
        pyro.module("encoder", encoder)
        pyro.module("classify", classify)
        with pyro.plate("data", len(data), subsample_size=3) as ind:
            x = data[ind]
            pyro.sample("y", dist.Categorical(logits=classify(x)))
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    y = torch.tensor([0, 1, 2, 2, 1, 0])
    return Program(model, guide, (torch.randn(6, 4), y), labels={"y": y}, is_sum=False)


@program
def subsampled_twice():
    """Some rows of some columns."""
    net = nn.Linear(1, 1)

    def model(data):
        shift = pyro.param("shift", data.new_zeros(()))
        columns = pyro.plate("columns", data.shape[1], subsample_size=2, dim=-1)
        rows = pyro.plate("rows", data.shape[0], subsample_size=3, dim=-2)
        with rows as i, columns as j:
            z = pyro.sample("z", dist.Bernoulli(data.new_tensor(0.5)))
            pyro.sample("x", dist.Normal(shift + 2 * z, 1.0), obs=data[i[:, None], j])

    def guide(data):
        pyro.module("net", net)
        columns = pyro.plate("columns", data.shape[1], subsample_size=2, dim=-1)
        rows = pyro.plate("rows", data.shape[0], subsample_size=3, dim=-2)
        with rows as i, columns as j:
            x = data[i[:, None], j]
            pyro.sample("z", dist.Bernoulli(logits=net(x[..., None]).squeeze(-1)))

    return Program(model, guide, (torch.randn(5, 4),))


@program
def subsampled_groups_of_members():
    net = nn.Linear(1, 1)

    def model(data):
        shift = pyro.param("shift", data.new_zeros(()))
        with pyro.plate("groups", len(data), subsample_size=2, dim=-2) as ind:
            a = pyro.sample("a", dist.Normal(data.new_zeros(()), 1.0))
            with pyro.plate("members", data.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(shift + a, 1.0), obs=data[ind])

    def guide(data):
        pyro.module("net", net)
        with pyro.plate("groups", len(data), subsample_size=2, dim=-2) as ind:
            pyro.sample("a", dist.Normal(net(data[ind].mean(1, keepdim=True)), 1.0))

    return Program(model, guide, (torch.randn(5, 3),))


@program
def subsampled_local_parameters():
    """One parameter for each row of the data, with the rows that are drawn."""
    encoder = nn.Linear(2, 2)

    def model(data):
        with pyro.plate("data", len(data), subsample_size=3) as ind:
            offset = pyro.param("offset", data.new_zeros(len(data), 2), event_dim=1)
            z = pyro.sample("z", dist.Normal(data.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + offset, 1.0).to_event(1), obs=data[ind])

    def guide(data):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(data), subsample_size=3) as ind:
            pyro.sample("z", dist.Normal(encoder(data[ind]), 1.0).to_event(1))

    return Program(model, guide, (torch.randn(6, 2),))
