"""Which argument holds which observed site."""

import collections
import collections.abc
import dataclasses
import functools
import types

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro.optim import SGD
from torch import nn

from pyro_symeq import SymmetricEquilibrium
from pyro_symeq.binding import Names, find, get, layout, leaves, overlap, own, put, substitute

B, D = 4, 3
Named = collections.namedtuple("Named", "image label")


@dataclasses.dataclass(frozen=True)
class Batch:
    image: torch.Tensor
    length: int = D


class Bag(collections.abc.MutableMapping):
    """A mapping whose shallow copy holds its items in the same dict."""

    def __init__(self, items):
        self.items_ = items

    def __getitem__(self, key):
        return self.items_[key]

    def __setitem__(self, key, value):
        self.items_[key] = value

    def __delitem__(self, key):
        del self.items_[key]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)


class Attributes(dict):
    """A dict whose items are its attributes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Watched:
    """A pair over images whose guide keeps what it was called with.

    Args:
        pick: Takes the model's arguments to the observed value, with shape (B, D).
        look: Takes the guide's arguments to what the encoder sees, likewise.
    """

    def __init__(self, pick, look=None):
        self.net = nn.Linear(D, 1)
        self.pick = pick
        self.look = look or (lambda *args, **kwargs: pick(*args, **kwargs).reshape(B, D))
        self.seen = []

    def model(self, *args, **kwargs):
        p = pyro.param("p", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
        x = self.pick(*args, **kwargs)
        with pyro.plate("data", B):
            z = pyro.sample("z", dist.Bernoulli(p))
            logits = (2 * z - 1)[:, None].expand(B, D)
            law = dist.Bernoulli(logits=logits).to_event(1)
            if x.shape != (B, D):
                law = dist.Bernoulli(logits=logits.reshape(x.shape)).to_event(x.dim() - 1)
            pyro.sample("x", law, obs=x)

    def guide(self, *args, **kwargs):
        pyro.module("net", self.net)
        self.seen.append((args, kwargs))
        x = self.look(*args, **kwargs)
        with pyro.plate("data", B):
            pyro.sample("z", dist.Bernoulli(logits=self.net(x.to(self.net.weight)).squeeze(-1)))


def images(**options):
    return (torch.rand(B, D) < 0.5).to(options.get("dtype", torch.float64))


# Each case: the real x in its containers, how the model observes it, how to read it back.
CASES = {
    "tensor": (lambda x: ((x,), {}), lambda x: x),
    "keyword": (lambda x: ((), {"x": x}), lambda x: x),
    "reshape": (lambda x: ((x.reshape(B, 1, D),), {}), lambda x: x.reshape(B, D)),
    "view that is a copy": (
        lambda x: ((x.repeat(1, 2)[:, :D].T.contiguous().T,), {}),
        lambda x: x.reshape(-1).reshape(B, D),
    ),
    "cast from bool": (lambda x: ((x.bool(),), {}), lambda x: x.double()),
    "cast from bytes, reshaped": (
        lambda x: ((x.to(torch.uint8).reshape(B, 1, D),), {}),
        lambda x: x.reshape(B, D).double(),
    ),
    "cast to a wider float": (lambda x: ((x.float(),), {}), lambda x: x.double()),
    "second of two": (lambda x: ((torch.ones(B), x), {}), lambda c, x: x),
    "dict": (lambda x: (({"image": x, "id": 7},), {}), lambda b: b["image"]),
    "list in a dict": (lambda x: (({"images": [None, x]},), {}), lambda b: b["images"][1]),
    "tuple": (lambda x: (((x, "name"),), {}), lambda b: b[0]),
    "named tuple": (lambda x: ((Named(x, None),), {}), lambda b: b.image),
    "dataclass": (lambda x: ((Batch(x),), {}), lambda b: b.image),
    "transposed": (lambda x: ((x.T.contiguous(),), {}), lambda x: x.T),
    "part of a wider one": (
        lambda x: ((torch.cat([torch.ones(B, 2), x], -1),), {}),
        lambda x: x[:, 2:],
    ),
    "mapping of one's own": (lambda x: ((Bag({"image": x}),), {}), lambda b: b["image"]),
    "dict of attributes": (lambda x: ((Attributes(image=x),), {}), lambda b: b.image),
    "read-only mapping": (
        lambda x: ((types.MappingProxyType({"image": x}),), {}),
        lambda b: b["image"],
    ),
    "ordered dict": (
        lambda x: ((), {"b": collections.OrderedDict(image=x)}),
        lambda b: b["image"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_dreams_reach_the_guide_in_the_place_of_the_data(case):
    wrap, pick = CASES[case]
    pair = Watched(pick)
    symeq = SymmetricEquilibrium(pair.model, pair.guide, SGD({"lr": 0.1}))
    x = images()
    args, kwargs = wrap(x)
    before = [leaf.clone() for _, leaf in leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    symeq.step(*args, **kwargs)
    pair.seen.clear()
    symeq.step(*args, **kwargs)
    (awake, asleep) = pair.seen
    for seen in (awake, asleep):
        assert layout(seen) == layout((args, kwargs))
        assert type(seen[0]) is tuple
    real = [leaf for _, leaf in leaves(awake) if isinstance(leaf, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(real, before, strict=True))
    dream = pick(*asleep[0], **asleep[1]).reshape(B, D)
    assert dream.shape == x.shape
    assert ((dream == 0) | (dream == 1)).all()
    assert not torch.equal(dream, x)


@dataclasses.dataclass
class Signed:
    image: torch.Tensor

    @functools.cached_property
    def signs(self):
        return 2 * self.image - 1


def leave_signs(batch):
    if "signs" not in batch:
        batch["signs"] = 2 * batch["image"] - 1
    return batch["signs"]


def append_signs(batch):
    if len(batch) == 1:
        batch.append(2 * batch[0] - 1)
    return batch[1]


# Each case: a batch, how the model reads the data of it, and features that the guide leaves in it.
LEFT = {
    "dict": (lambda x: {"image": x}, lambda b: b["image"], leave_signs),
    "dict in a tuple": (
        lambda x: ({"image": x}, None),
        lambda b: b[0]["image"],
        lambda b: leave_signs(b[0]),
    ),
    "list": (lambda x: [x], lambda b: b[0], append_signs),
    "cached property": (Signed, lambda b: b.image, lambda b: b.signs),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_a_program_leaves_in_its_arguments_is_not_taken_for_that_of_a_dream(case):
    wrap, pick, features = LEFT[case]
    agree = []

    def look(batch):
        agree.append(torch.equal(features(batch), 2 * pick(batch) - 1))
        return features(batch)

    pair = Watched(pick, look)
    symeq = SymmetricEquilibrium(pair.model, pair.guide, SGD({"lr": 0.1}))
    batch = wrap(images())
    before = layout(batch)
    for _ in range(3):
        symeq.step(batch)
    assert agree and all(agree)
    assert layout(batch) == before


def test_the_guide_is_scored_at_the_very_dream():
    """q(z | x') with z and x' of one dream: the encoder sees what the decoder drew for that z."""

    def model(x):
        with pyro.plate("data", B):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1e-9), obs=x)

    gaps = []

    def guide(x):
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", B):
            z = pyro.sample("z", dist.Normal(loc + x, 1.0))
        gaps.append((z - x).abs().max().item())

    symeq = SymmetricEquilibrium(model, guide, SGD({"lr": 0.0}))
    symeq.step(torch.randn(B))
    gaps.clear()
    symeq.step(torch.randn(B))
    awake, asleep = gaps
    assert awake > 1e-3
    assert asleep < 1e-7


@pytest.mark.parametrize(
    "bind",
    [
        {"x": "x"},
        lambda trace, args, kwargs: ((trace.nodes["x"]["value"],), kwargs),
    ],
)
def test_bind_tells_what_cannot_be_found_out(bind):
    pair = Watched(lambda x: x * 1.0, look=lambda x: x)
    x = images()

    def model(x):
        pair.model(x)

    with pytest.raises(ValueError, match="No argument holds the observed value of site 'x'"):
        SymmetricEquilibrium(model, pair.guide, SGD({"lr": 0.1})).step(x)
    symeq = SymmetricEquilibrium(model, pair.guide, SGD({"lr": 0.1}), bind=bind)
    symeq.step(x)
    pair.seen.clear()
    symeq.step(x)
    (_, asleep) = pair.seen
    assert not torch.equal(asleep[0][0], x)


def test_sites_share_an_argument():
    """Each site observes a column; a dream fills them all, and leaves what nobody observes."""
    net = nn.Linear(D, D)
    seen = []

    def model(x):
        p = pyro.param("p", torch.full((D - 1,), 0.5))
        with pyro.plate("data", len(x)):
            for i in range(D - 1):
                z = pyro.sample(f"z{i}", dist.Bernoulli(p[i]))
                pyro.sample(f"x{i}", dist.Normal(10 * z - 5, 1e-3), obs=x[:, i])

    def guide(x):
        pyro.module("net", net)
        logits = net(x)
        with pyro.plate("data", len(x)):
            z = [pyro.sample(f"z{i}", dist.Bernoulli(logits=logits[:, i])) for i in range(D - 1)]
        seen.append((x, torch.stack(z, -1)))

    symeq = SymmetricEquilibrium(model, guide, SGD({"lr": 0.1}))
    x = torch.randn(B, 2 * D)[:, :D]  # itself a part of something wider
    before = x.clone()
    symeq.step(x)
    dream, z = seen[-1]
    torch.testing.assert_close(dream[:, :-1], 10 * z - 5, atol=0.01, rtol=0)
    assert torch.equal(dream[:, -1], x[:, -1])
    assert torch.equal(x, before)


OVERLAPPING = {
    "columns": lambda x: x[:, :1],
    "transposed": lambda x: x.t(),
    "every other row": lambda x: x.as_strided((2, D), (2 * D, 1)),
    "shifted": lambda x: torch.as_strided(x, (B - 1, D), (D, 1), 1),
    "expanded": lambda x: x[0, 0].expand(B),
}


@pytest.mark.parametrize("case", OVERLAPPING)
def test_an_argument_that_overlaps_the_data_is_refused(case):
    """It would be real beside a dream."""
    pair, x = Watched(lambda x, part: x), images()
    symeq = SymmetricEquilibrium(pair.model, pair.guide, SGD({"lr": 0.1}))
    with pytest.raises(ValueError, match=r"Several arguments .* \['args.0', 'args.1'\]"):
        symeq.step(x, OVERLAPPING[case](x))
    symeq.step(x, OVERLAPPING[case](x.clone()))  # the user's word for it


def test_arguments_that_are_parts_of_one_tensor():
    """What a loader splits off one tensor shares its memory, and is told apart all the same."""
    pair = Watched(lambda a, b: b)
    symeq = SymmetricEquilibrium(pair.model, pair.guide, SGD({"lr": 0.1}))
    for a, b in [images().repeat(2, 1).split(B), images().repeat(1, 2).split(D, dim=1)]:
        symeq.step(a, b)
        (dream_a, dream_b), _ = pair.seen[-1]
        assert dream_a is a
        assert dream_b is not b


def test_bind_names_what_is_nested():
    pair = Watched(lambda batch: batch["image"].clone(), look=lambda batch: batch["image"])
    symeq = SymmetricEquilibrium(
        lambda batch: pair.model(batch), pair.guide, SGD({"lr": 0.1}), bind={"batch.image": "x"}
    )
    symeq.step({"image": images(), "id": torch.arange(B)})
    assert len(pair.seen) > 0


class ClassNumbers:
    """Class numbers go in, one-hot codes are observed: no argument holds what is observed."""

    def __init__(self, reads_label):
        self.reads_label = reads_label
        self.net = nn.Linear(D, 3)
        self.seen = []

    def model(self, x, label):
        logits = pyro.param("logits", torch.zeros(3, D))
        with pyro.plate("data", len(x)):
            code = nn.functional.one_hot(label, 3).double()
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(3)), obs=code)
            pyro.sample("x", dist.Bernoulli(logits=y @ logits).to_event(1), obs=x)

    def guide(self, x, label):
        pyro.module("net", self.net)
        self.seen.append(label)
        logits = self.net(x)
        if self.reads_label:
            logits = logits + nn.functional.one_hot(label, 3)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.OneHotCategorical(logits=logits))


LABEL = torch.tensor([0, 1, 2, 2])


def test_computed_labels_need_no_argument_that_holds_them():
    pair = ClassNumbers(reads_label=False)
    symeq = SymmetricEquilibrium(pair.model, pair.guide, SGD({"lr": 0.1}))
    x = torch.eye(D).index_select(0, LABEL)
    losses = [symeq.step(x, LABEL) for _ in range(200)]
    assert losses[-1].encoder > losses[0].encoder
    assert pair.net(x).argmax(-1).tolist() == LABEL.tolist()


@pytest.mark.parametrize(
    "hide", [lambda y: y.tolist(), lambda y: y.numpy()], ids=["list", "numpy"]
)
def test_labels_whose_use_cannot_be_watched_need_a_function(hide):
    """The guide may read a list or an array unseen, beside what it dreams."""
    pair = ClassNumbers(reads_label=True)

    def model(x, label):
        pair.model(x, torch.as_tensor(label))

    def guide(x, label):
        pair.guide(x, torch.as_tensor(label))

    with pytest.raises(ValueError, match="No argument holds the observed value of site 'y'"):
        SymmetricEquilibrium(model, guide, SGD({"lr": 0.1})).step(images(), hide(LABEL))


def test_computed_labels_that_the_guide_reads_need_a_function():
    pair = ClassNumbers(reads_label=True)

    def bind(trace, args, kwargs):
        return (trace.nodes["x"]["value"], trace.nodes["y"]["value"].argmax(-1)), kwargs

    with pytest.raises(ValueError, match="site 'y'"):
        SymmetricEquilibrium(pair.model, pair.guide, SGD({"lr": 0.1})).step(images(), LABEL)
    symeq = SymmetricEquilibrium(pair.model, pair.guide, SGD({"lr": 0.1}), bind=bind)
    symeq.step(images(), LABEL)
    assert any(not torch.equal(labels, LABEL) for labels in pair.seen)


def test_covariates_pass_through():
    seen = []
    net = nn.Linear(2 * D, 1)

    def model(x, covariate):
        weight = pyro.param("weight", torch.ones(D))
        with pyro.plate("data", B):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            logits = z[:, None] * weight + covariate
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x, covariate):
        pyro.module("net", net)
        seen.append(covariate)
        logits = net(torch.cat([x, covariate], -1)).squeeze(-1)
        with pyro.plate("data", B):
            pyro.sample("z", dist.Bernoulli(logits=logits))

    covariate = torch.randn(B, D)
    SymmetricEquilibrium(model, guide, SGD({"lr": 0.1})).step(images(), covariate)
    assert all(c is covariate for c in seen)


SPARSE = {
    "coordinates": lambda: torch.eye(B).to_sparse(),
    "as large as the data": lambda: torch.ones(B, D).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor(
        [torch.ones(2), torch.ones(3)], layout=torch.jagged
    ),
}


@pytest.mark.parametrize("case", ["tensor", "cast to a wider float", "part of a wider one"])
@pytest.mark.parametrize("covariate", SPARSE.values(), ids=SPARSE.keys())
def test_sparse_covariates_pass_through(covariate, case):
    wrap, pick = CASES[case]
    pair = Watched(lambda c, x: pick(x), look=lambda c, x: pick(x))
    symeq = SymmetricEquilibrium(pair.model, pair.guide, SGD({"lr": 0.1}))
    c = covariate()
    for _ in range(2):
        (x,), _ = wrap(images())
        symeq.step(c, x)
    assert all(args[0] is c for args, _ in pair.seen)


def test_sparse_data_need_a_function():
    pair, x = Watched(lambda x: x.to_dense()), images().to_sparse()

    def bind(trace, args, kwargs):
        return (trace.nodes["x"]["value"].to_sparse(),), kwargs

    optim = SGD({"lr": 0.1})
    with pytest.raises(ValueError, match=r"No argument holds.*function bind="):
        SymmetricEquilibrium(pair.model, pair.guide, optim).step(x)
    with pytest.raises(ValueError, match="'args.0', a sparse or nested tensor.*function bind="):
        SymmetricEquilibrium(pair.model, pair.guide, optim, bind={"args.0": "x"}).step(x)
    pair.seen.clear()
    SymmetricEquilibrium(pair.model, pair.guide, optim, bind=bind).step(x)
    (dream,), _ = pair.seen[-1]
    assert dream.is_sparse and dream is not x


def test_another_kind_of_batch_is_bound_anew():
    """A switch decides which argument is observed; each kind of call has its own binding."""
    pair = Watched(lambda a, b, swap: b if swap else a)
    symeq = SymmetricEquilibrium(pair.model, pair.guide, SGD({"lr": 0.0}))
    a, b = images(), images()
    for swap in (False, True, False, True):
        pair.seen.clear()
        symeq.step(a, b, swap)
        (dream_a, dream_b, _), _ = pair.seen[-1]
        assert (dream_a is a, dream_b is b) == (swap, not swap)


def test_a_string_may_be_the_switch():
    pair = Watched(lambda a, b, *, first, batch: a if (first, batch["first"]) == ("a", "a") else b)
    symeq = SymmetricEquilibrium(pair.model, pair.guide, SGD({"lr": 0.0}))
    a, b = images(), images()
    for first, second in ("aa", "ba", "ab", "aa"):
        symeq.step(a, b, first=first, batch={"first": second})
        (dream_a, dream_b), _ = pair.seen[-1]
        is_a = (first, second) == ("a", "a")
        assert (dream_a is a, dream_b is b) == (not is_a, is_a)


@pytest.mark.parametrize(
    "batch",
    [lambda x, names: (x, names), lambda x, names: {"x": x, "names": names}],
    ids=["pair", "dict"],
)
def test_names_of_files_make_no_other_kind_of_batch(batch):
    pair = Watched(lambda batch: batch["x"] if isinstance(batch, dict) else batch[0])
    runs = []

    def model(batch):
        runs.append(batch)
        pair.model(batch)

    symeq = SymmetricEquilibrium(model, pair.guide, SGD({"lr": 0.1}))
    symeq.step(batch(images(), [f"{i}.png" for i in range(B)]))
    runs.clear()
    symeq.step(batch(images(), [f"{B + i}.png" for i in range(B)]))
    assert len(runs) == 2


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("memory", ["of its own", "rows of one", "columns of one"])
def test_a_silent_change_of_the_observed_argument_is_noticed(memory, validate):
    """An integer decides which argument is observed, though calls look the same."""
    pair = Watched(lambda a, b, which: (a, b)[which])
    symeq = SymmetricEquilibrium(pair.model, pair.guide, SGD({"lr": 0.0}))
    a, b = {
        "of its own": (images(), images()),
        "rows of one": images().repeat(2, 1).split(B),
        "columns of one": images().repeat(1, 2).split(D, dim=1),
    }[memory]
    for which in (0, 1, 1, 0):
        with pyro.validation_enabled(validate):
            symeq.step(a, b, which)
        (dream_a, dream_b, _), _ = pair.seen[-1]
        assert (dream_a is a, dream_b is b) == (which == 1, which == 0)


def test_batches_of_any_size_share_a_binding():
    def model(x):
        p = pyro.param("p", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(p))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    calls = []

    def guide(x):
        calls.append(len(x))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=x))

    symeq = SymmetricEquilibrium(model, guide, SGD({"lr": 0.1}))
    symeq.step(torch.randn(6))
    calls.clear()
    symeq.step(torch.randn(2))
    assert calls == [2, 2]


OF_BYTES = {
    "all": lambda x: x[:3].double(),
    "view": lambda x: x[1:],
    "rows": lambda x: x[torch.tensor([2, 0, 1])],
    "cast rows": lambda x: x[torch.tensor([2, 0, 1])].double(),
}


class TestErrors:
    """Each names the site and the remedy, and nothing has moved."""

    def refuse(self, model, guide, *args, match, **options):
        net_before = {
            name: value.detach().clone() for name, value in pyro.get_param_store().items()
        }
        symeq = SymmetricEquilibrium(model, guide, SGD({"lr": 0.1}), **options)
        with pytest.raises(ValueError, match=match):
            symeq.step(*args)
        assert not symeq.optim.optim_objs
        for name, value in net_before.items():
            assert torch.equal(pyro.param(name), value)

    def test_no_argument(self):
        data = images()
        pair = Watched(lambda x: data)
        self.refuse(
            pair.model, pair.guide, data.clone(), match="No argument holds.*'x'.*bind={'args.0'"
        )

    def test_a_number(self):
        pair = Watched(lambda x: x)

        def model(x):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=1.5)

        self.refuse(model, pair.guide, images(), match="No argument holds.*'x'")

    def test_an_equal_tensor_is_no_evidence(self):
        pair = Watched(lambda x: torch.ones(B, D))
        self.refuse(pair.model, pair.guide, torch.ones(B, D), match="No argument holds")

    def test_two_arguments(self):
        pair = Watched(lambda a, b: a)
        x = images()
        self.refuse(pair.model, pair.guide, x, x, match="Several arguments hold.*args.0.*args.1")

    def test_two_equal_casts(self):
        """The model reads one of them through NumPy, where it can't be followed."""
        pair = Watched(lambda a, b: torch.from_numpy(a.numpy()).double())
        x = images(dtype=torch.uint8)
        self.refuse(pair.model, pair.guide, x, x.bool(), match="Several arguments hold")

    def test_two_casts_of_one_tensor(self):
        pair = Watched(lambda a, b: a.double())
        x = images(dtype=torch.uint8)
        self.refuse(pair.model, pair.guide, x, x.flatten(), match="Several arguments hold")

    def test_a_computed_value(self):
        pair = Watched(lambda x: 1 - x, look=lambda x: x)
        self.refuse(pair.model, pair.guide, images(), match="it is computed, or comes from else")

    def test_unknown_names(self):
        pair = Watched(lambda x: x)
        self.refuse(
            pair.model,
            pair.guide,
            images(),
            bind={"y": "x"},
            match="bind= names the argument 'y'; there are \\['args.0'\\]",
        )
        self.refuse(
            pair.model,
            pair.guide,
            images(),
            bind={"args.0": "y"},
            match="bind= names the site 'y'; the model samples \\['x', 'z'\\]",
        )

    def test_an_argument_that_is_no_tensor(self):
        pair = Watched(lambda x, n: x)
        self.refuse(
            pair.model,
            pair.guide,
            images(),
            3,
            bind={"args.1": "x"},
            match="bind= names the argument 'args.1', which is of type int; expected a tensor",
        )

    def test_a_wrong_name(self):
        pair = Watched(lambda a, b: a)
        self.refuse(
            pair.model,
            pair.guide,
            images(),
            images(),
            bind={"args.1": "x"},
            match="dream of site 'x' in the place of the data, it doesn't observe that dream",
        )

    def test_a_wrong_function(self):
        pair = Watched(lambda x: x)
        self.refuse(
            pair.model,
            pair.guide,
            images(),
            bind=lambda trace, args, kwargs: (args, kwargs),
            match="doesn't observe that dream",
        )

    @pytest.mark.parametrize("size", [1.0, 1e-4])
    def test_an_argument_of_another_size(self, size):
        def model(x):
            with pyro.plate("data", B):
                z = pyro.sample("z", dist.Bernoulli(0.5))
                law = dist.Normal(size * z[:, None].expand(B, 3), 0.01 * size).to_event(1)
                pyro.sample("x", law, obs=x * 0.01)

        self.refuse(
            model,
            Watched(lambda x: x).guide,
            size * images(),
            bind={"x": "x"},
            match="doesn't observe that dream",
        )

    def test_a_dream_that_does_not_fit(self):
        def model(x):
            with pyro.plate("data", B):
                z = pyro.sample("z", dist.Bernoulli(0.5))
                pyro.sample("x", dist.Normal(z[:, None], 1.0).to_event(1), obs=x)

        pair = Watched(lambda x: x)
        self.refuse(
            model, pair.guide, images(), match=r"shape \(4, 1\).* argument 'x' with shape \(4, 3\)"
        )

    @pytest.mark.parametrize("observe", OF_BYTES.values(), ids=OF_BYTES.keys())
    def test_a_dream_out_of_the_range_of_bytes(self, observe):
        def model(x):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            law = dist.Poisson(400 + z.expand(3, D)).to_event(2)
            pyro.sample("x", law, obs=observe(x))

        x, guide = images(dtype=torch.uint8), Watched(lambda x: x).guide
        match = "'x' in the range of torch.uint8, 0 to 255, .* argument 'x', got .* as floats"
        self.refuse(model, guide, x, match=match)

    def test_a_cast_that_rounds(self):
        def model(x):
            with pyro.plate("data", B):
                z = pyro.sample("z", dist.Bernoulli(0.5))
                law = dist.Normal(z[:, None].expand(B, D), 1.0).to_event(1)
                pyro.sample("x", law, obs=x.double())

        pair = Watched(lambda x: x)
        self.refuse(model, pair.guide, images(dtype=torch.int64), match="a cast that rounds, say")


def test_walking_and_putting():
    tree = (([1, {"a": 2}], Batch(3, 4)), {"k": Named(5, None)})
    paths = dict(leaves(tree))
    assert list(paths.values()) == [1, 2, 3, 4, 5, None]
    for path, leaf in paths.items():
        assert get(tree, path) == leaf
        changed = put(tree, path, "new")
        assert [value for _, value in leaves(changed)] == [
            "new" if p == path else value for p, value in paths.items()
        ]
        assert dict(leaves(tree)) == paths


def test_a_run_has_containers_of_its_own():
    x, other = torch.ones(2), object()
    for tree in (({"a": [x]}, other), [Signed(x)], {"b": Named({}, x)}, (Batch([x]), None)):
        twin = own(tree)
        assert layout(twin) == layout(tree)
        assert all(a is b for (_, a), (_, b) in zip(leaves(twin), leaves(tree), strict=True))
        assert twin is not tree
    nest = {"a": {}, "b": [{}]}
    twin = own((nest,))[0]
    twin["a"]["c"] = twin["b"][0]["c"] = 1
    assert nest == {"a": {}, "b": [{}]}
    plain = (x, other, nn.Linear(1, 1))
    assert own(plain) is plain


@dataclasses.dataclass
class Counts:
    x: torch.Tensor
    size: torch.Tensor
    is_scaled: dataclasses.InitVar[bool] = False

    def __post_init__(self, is_scaled):
        self.total = self.x.sum().item()
        if is_scaled:
            self.size = self.size / 2


@dataclasses.dataclass
class Halved(Counts):
    is_scaled: dataclasses.InitVar[bool] = True


def test_what_a_dataclass_computes_is_that_of_the_dream():
    signed, counts = Signed(torch.zeros(2)), Counts(torch.ones(2), torch.ones(1))
    assert signed.signs.sum() == -2
    assert put(signed, ("image",), torch.ones(2)).signs.sum() == 2
    changed = put(counts, ("x",), torch.zeros(2))
    assert (counts.total, changed.total) == (2, 0)
    assert changed.size is counts.size


@dataclasses.dataclass
class Featured:
    x: torch.Tensor
    features: torch.Tensor = dataclasses.field(init=False)
    table: dict = dataclasses.field(init=False)
    split: str = dataclasses.field(default="all", init=False)
    mask: torch.Tensor = dataclasses.field(init=False)

    def __post_init__(self):
        self.features = self.x.abs()
        self.table = {"signs": self.x.sign()}


def test_fields_that_a_dataclass_computes_are_those_of_the_dream():
    rows = Featured(torch.ones(2))
    rows.split, rows.mask = "test", torch.ones(2, dtype=torch.bool)
    changed = put(rows, ("x",), torch.full((2,), -3.0))
    assert changed.features.tolist() == [3, 3]
    assert changed.table["signs"].tolist() == [-1, -1]
    assert changed.split == "test"  # set since
    assert changed.mask is rows.mask
    assert rows.features.tolist() == [1, 1]
    changed = put(rows, ("features",), torch.zeros(2))
    assert changed.features.sum() == 0
    assert changed.x is rows.x


def test_mappings_are_copied_or_refused():
    class Fixed(collections.abc.Mapping):
        def __getitem__(self, key):
            return {"x": 1}[key]

        def __iter__(self):
            return iter("x")

        def __len__(self):
            return 1

    with pytest.raises(ValueError, match="got Fixed, which can't be changed. Pass a dict"):
        put(Fixed(), ("x",), 2)
    rows = Attributes(x=1, y=2)
    changed = put(rows, ("x",), 3)
    assert (changed["x"], changed.x, changed.y) == (3, 3, 2)
    assert (rows["x"], rows.x) == (1, 1)


def test_a_dataclass_does_not_compute_a_field_twice():
    halved = Halved(torch.ones(2), torch.ones(1))
    changed = put(halved, ("x",), torch.zeros(2))
    assert changed.x.sum() == 0
    assert changed.size is halved.size
    assert halved.size == 0.5


def test_names_are_those_of_the_signature():
    def program(x, y=None, *rest, z=None):
        pass

    names = Names(program)
    assert names((0, 0)) == "x"
    assert names((0, 1, "a", 2)) == "y.a.2"
    assert names((0, 2)) == "args.2"
    assert names((1, "z")) == "z"
    assert list(names.absent(((1,), {}))) == [(1, "y"), (1, "z")]
    assert list(names.absent(((None, 2), {"z": None}))) == [(0, 0), (1, "z")]


@st.composite
def views(draw):
    """A tensor, perhaps itself a view, and a function that takes it to a view of a part of it."""
    wide = torch.arange(120.0).reshape(2, 3, 4, 5)
    leaf = draw(st.sampled_from([wide, wide[1], wide[:, 1], wide[..., 1:3], wide.transpose(0, 2)]))
    steps = []
    dims = list(leaf.shape)
    for kind in draw(st.lists(st.sampled_from(["select", "narrow", "swap", "new"]), max_size=4)):
        if not dims:
            break
        dim = draw(st.integers(0, len(dims) - 1))
        if kind == "select":
            index = draw(st.integers(0, dims.pop(dim) - 1))
            steps.append(lambda x, dim=dim, index=index: x.select(dim, index))
        elif kind == "narrow":
            start = draw(st.integers(0, dims[dim] - 1))
            dims[dim] = draw(st.integers(1, dims[dim] - start))
            steps.append(lambda x, d=dim, s=start, n=dims[dim]: x.narrow(d, s, n))
        elif kind == "swap":
            other = draw(st.integers(0, len(dims) - 1))
            dims[dim], dims[other] = dims[other], dims[dim]
            steps.append(lambda x, a=dim, b=other: x.transpose(a, b))
        else:
            dims.insert(dim, 1)
            steps.append(lambda x, dim=dim: x.unsqueeze(dim))

    def view(x):
        for step in steps:
            x = step(x)
        return x

    return leaf, view


@given(views())
def test_a_dream_fills_the_part_that_was_observed(case):
    leaf, view = case
    observed = view(leaf)
    assert find(observed, ((torch.zeros(3), leaf), {})) == [(0, 1)]
    before = leaf.clone()
    dreamed = -1 - torch.rand(observed.shape)
    filled = substitute(leaf, observed, dreamed, leaf)
    assert filled.shape == leaf.shape
    torch.testing.assert_close(view(filled), dreamed)
    assert (filled < 0).sum() == dreamed.numel()
    assert torch.equal(leaf, before)
    assert torch.equal(filled[filled >= 0], leaf[filled >= 0])


@given(views())
def test_what_lies_elsewhere_is_no_part(case):
    """Of two stretches of one memory, a view of the one is no view of the other."""
    leaf, view = case
    halves = torch.cat([leaf, leaf]).split(len(leaf))
    assert find(view(halves[0]), (halves, {})) == [(0, 0)]
    assert find(view(halves[1]), (halves, {})) == [(0, 1)]


def test_a_cast_is_of_the_argument_that_the_model_reads():
    """Another one has the same elements by chance, and is left alone."""
    pair = Watched(lambda a, b: b.double())
    symeq = SymmetricEquilibrium(pair.model, pair.guide, SGD({"lr": 0.1}))
    x = images(dtype=torch.uint8)
    symeq.step(x, x.clone())
    pair.seen.clear()
    symeq.step(x, x.clone())
    (other, dream), _ = pair.seen[-1]
    assert other is x
    assert not torch.equal(dream, x)


def test_a_dict_stands_for_a_computed_value_of_the_same_size():
    """The model observes a threshold of its argument; a dream passes it unchanged."""
    pair = Watched(lambda x: (x > 0.5).double())
    bind = {"args.0": "x"}
    symeq = SymmetricEquilibrium(pair.model, pair.guide, SGD({"lr": 0.1}), bind=bind)
    for _ in range(3):
        symeq.step(images() * 0.7)


def test_a_dict_names_one_argument_for_a_site():
    pair = Watched(lambda a, b: a, look=lambda a, b: a)
    bind = {"args.0": "x", "args.1": "x"}
    symeq = SymmetricEquilibrium(pair.model, pair.guide, SGD({"lr": 0.1}), bind=bind)
    match = r"Several arguments hold.*\['args.0', 'args.1'\].*function bind="
    with pytest.raises(ValueError, match=match):
        symeq.step(images(), images())


@given(st.data())
def test_tensors_overlap_where_they_share_elements(data):
    memory = torch.arange(60.0)

    def some_view():
        shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
        stride = data.draw(st.lists(st.integers(0, 7), min_size=len(shape), max_size=len(shape)))
        return memory.as_strided(shape, stride, data.draw(st.integers(0, 15)))

    a, b = some_view(), some_view()
    expected = not {*a.flatten().tolist()}.isdisjoint(b.flatten().tolist())
    assert overlap(a, b) == overlap(b, a) == expected
    assert not overlap(a, b.clone())
