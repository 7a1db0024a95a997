"""The consistency of pairs whose laws are known, and classifiers that tell sets apart."""

import builtins
import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_symeq.metrics import Features, consistency, frechet_distance, two_sample_accuracy
from tests.enumerable import Ladder, bits

# --- two-sample tests -----------------------------------------------------------------------


def test_sets_of_one_law():
    """Fails by chance about once in 1.7 million."""
    accuracy = two_sample_accuracy(torch.randn(2000, 3), torch.randn(2000, 3))
    assert accuracy.error == pytest.approx(0.5 / 2000**0.5, rel=0.01)
    assert abs(accuracy.mean - 0.5) < 5 * accuracy.error


def coins(n, d):
    return torch.rand(n, d).round()


LAWS = {  # the accuracy of the best classifier is 1/2 plus half the total variation distance
    "means": (lambda n: torch.randn(n, 1), lambda n: torch.randn(n, 1) + 2, 0.8413),
    "scales": (lambda n: torch.randn(n, 1), lambda n: 2 * torch.randn(n, 1), 0.6613),
    "one bit": (lambda n: coins(n, 1), lambda n: coins(n, 1) * coins(n, 1), 0.625),
    "equal bits": (lambda n: coins(n, 2), lambda n: coins(n, 1).expand(n, 2), 0.75),
}


@pytest.mark.parametrize(("p", "q", "best"), LAWS.values(), ids=LAWS.keys())
def test_sets_of_other_laws(p, q, best):
    """Whatever it has learned, no classifier beats the best; it comes close to it."""
    accuracy = two_sample_accuracy(p(4000), q(4000))
    assert best - 0.03 - 5 * accuracy.error < accuracy.mean < best + 5 * accuracy.error


def test_sets_of_other_sizes_and_shapes():
    """The half of the smaller set is held out, of both sets."""
    accuracy = two_sample_accuracy(torch.randn(100, 2, 2), torch.randn(1000, 4))
    assert accuracy.error == pytest.approx(0.5 / 100**0.5, rel=0.1)


def test_tests_of_a_seed_are_the_same():
    a, b = torch.randn(100, 2), torch.randn(100, 2)
    found = []
    for _ in range(2):
        pyro.set_rng_seed(1)
        found.append(two_sample_accuracy(a, b))
    assert found[0] == found[1]


def test_sets_that_are_too_small():
    with pytest.raises(
        ValueError, match=r"at least 20 vectors of one size, got the shapes \[\(20"
    ):
        two_sample_accuracy(torch.zeros(20, 2), torch.zeros(19, 2))
    with pytest.raises(ValueError, match="at least 20 vectors of one size"):
        two_sample_accuracy(torch.zeros(20, 2), torch.zeros(20, 3))
    with pytest.raises(ValueError, match="at least 20 vectors of one size"):
        two_sample_accuracy(torch.zeros(20, 2), torch.zeros(0, 2))


def test_without_sklearn(monkeypatch):
    find = builtins.__import__

    def fail(name, *args, **kwargs):
        if name.split(".")[0] == "sklearn":
            raise ModuleNotFoundError(name=name)
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(
        ImportError, match=r'need scikit-learn.*pip install "pyro_symeq\[metrics\]'
    ):
        two_sample_accuracy(torch.zeros(20, 2), torch.zeros(20, 2))


# --- a pair of normal laws ------------------------------------------------------------------


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def posterior(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


FEATURES = {"x": Features("doubled", lambda x: 2 * x[:, None])}


def test_a_consistent_pair():
    """All accuracies are 1/2: nine comparisons, each fails by chance once in 1.7 million.

    The distance of two sets of N draws of a normal variable of variance v is v (2 + 1) / N on
    average; one of ten times as much is as improbable.
    """
    n = 2000
    x = 2**0.5 * torch.randn(n)
    found = consistency(model, posterior, x, features=FEATURES, num_steps=5)
    assert found == json.loads(json.dumps(found))
    assert list(found) == ["z", "x"]
    for site, space, variance in (("z", "z", 1), ("x", "doubled", 8)):
        assert len(found[site]) == 4
        for comparison in found[site].values():
            off = comparison[f"accuracy[{space}]"] - 0.5
            assert abs(off) < 5 * comparison[f"accuracy[{space}] error"]
            assert comparison[f"frechet[{space}]"] < 10 * 3 * variance / n
    assert list(found["x"]) == [
        "decoder, decoder",
        "decoder, data",
        "decoder, limiting",
        "data, limiting",
    ]


def test_data_that_the_model_does_not_know():
    """Of data N(3, 1) the aggregated posterior is N(1.5, 3/4); all else is as it was."""
    x = torch.randn(4000) + 3
    found = consistency(model, posterior, x, features=FEATURES, num_steps=50)
    distance = 1.5**2 + (1 - 0.75**0.5) ** 2
    for pair in ("prior, posterior", "posterior, limiting"):
        # The mean of a set has an error of about 4000^(-1/2), and the distance twice 1.5 times it.
        assert found["z"][pair]["frechet[z]"] == pytest.approx(distance, abs=5 * 3 * 0.023)
        assert found["z"][pair]["accuracy[z]"] > 0.7
    assert found["z"]["prior, limiting"]["frechet[z]"] < 0.01
    for pair in ("decoder, data", "data, limiting"):
        distance = 4 * (3**2 + (2**0.5 - 1) ** 2)
        assert found["x"][pair]["frechet[doubled]"] == pytest.approx(distance, rel=0.1)


def test_programs_that_drive_each_other_apart():
    """Each round multiplies by 0.9 and adds 0.3 on average: it ends at 3, the prior is at 0."""

    def encoder(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.9 * x + 0.3, 0.1))

    x = torch.zeros(1000)
    found = consistency(model, encoder, x, num_steps=60)
    assert list(found) == ["z"]
    assert found["z"]["prior, posterior"]["frechet[z]"] == pytest.approx(0.09 + 0.81, rel=0.2)
    assert found["z"]["prior, limiting"]["frechet[z]"] > 5


# --- programs of other kinds ----------------------------------------------------------------


def test_layers_of_bits():
    pair = Ladder()
    x = bits(3).repeat(20, 1)
    found = consistency(pair.model, pair.guide, x, num_steps=5)
    assert list(found) == ["z0", "z1"]
    assert found["z1"]["prior, limiting"].keys() == {
        "frechet[z1]",
        "accuracy[z1]",
        "accuracy[z1] error",
    }


def test_classes_are_compared_as_such():
    """Between classes 0 and 1 and between 0 and 2 it is equally far."""
    probs = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]])

    def classes(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(probs[0].expand(len(x), 3)))
            pyro.sample("x", dist.Normal(z.double(), 1.0), obs=x)

    def encoder(x):
        with pyro.plate("data", len(x)):
            weight = (x[:, None] > -1e9).double()
            pyro.sample("z", dist.Categorical(probs[1] * weight))

    found = consistency(classes, encoder, torch.zeros(2000), num_steps=1)
    a, b = (torch.eye(3)[torch.multinomial(p, 2000, replacement=True)] for p in probs)
    expected = frechet_distance(a, b, "z").value
    distance = found["z"]["prior, posterior"]["frechet[z]"]
    assert distance == pytest.approx(expected, abs=0.1)
    assert found["z"]["prior, posterior"]["accuracy[z]"] == pytest.approx(0.75, abs=0.05)


PIXELS = {
    "Bernoulli": (lambda x: dist.Bernoulli(logits=x), torch.float64),
    "Categorical": (lambda x: dist.Categorical(logits=torch.stack([-x, x], -1)), torch.int64),
}


@pytest.mark.parametrize(("law", "dtype"), PIXELS.values(), ids=PIXELS.keys())
def test_features_see_data_as_dreams_are(law, dtype):
    """Bytes are cast, and classes stay classes."""
    seen = []

    def network(x):
        seen.append((x.shape, x.dtype))
        return x.double()

    def images(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", law(z[:, None].expand(-1, 3)).to_event(1), obs=x)

    def encoder(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.double().mean(-1), 1.0))

    x = torch.randint(2, (30, 3), dtype=torch.uint8)
    consistency(images, encoder, x, features={"x": Features("x", network)}, num_steps=1)
    assert seen == 4 * [((30, 3), dtype)]


def test_rows_with_parts_and_arguments_by_name():
    def planar(*, x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("parts", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def encoder(*, x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("parts", 2, dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    features = {"x": Features("x", torch.nn.Identity())}
    x = torch.randn(100, 2)
    assert list(consistency(planar, encoder, x=x, features=features, num_steps=2)) == ["z", "x"]


# --- misuse ---------------------------------------------------------------------------------


def test_no_rows():
    def whole(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z.expand(len(x)), 1.0).to_event(1), obs=x)

    def encoder(x):
        pyro.sample("z", dist.Normal(x.mean(), 1.0))

    with pytest.raises(ValueError, match="in one vectorised plate, whose rows"):
        consistency(whole, encoder, torch.randn(30), num_steps=2)


def test_features_of_other_sites():
    with pytest.raises(ValueError, match=r"features= names \['y'\]; the batch holds \['x'\]"):
        features = {"y": FEATURES["x"]}
        consistency(model, posterior, torch.randn(30), features=features, num_steps=2)


def test_observed_latents():
    pair = Ladder()
    with pytest.raises(ValueError, match=r"The model observes the latents \['z0'\]"):
        consistency(pair.model, pair.guide, bits(3), torch.zeros(8, 2), num_steps=2)


def test_the_best_accuracy_of_scales():
    """The figure above: the two densities cross where x^2 = 8/3 log 2."""
    x = torch.tensor(math.sqrt(8 / 3 * math.log(2)))
    one, two = dist.Normal(0.0, 1.0), dist.Normal(0.0, 2.0)
    total_variation = 2 * (one.cdf(x) - two.cdf(x)).item()
    assert (1 + total_variation) / 2 == pytest.approx(LAWS["scales"][2], abs=1e-4)
