"""Belief networks: a short run in a process of its own, and the data that it learns from."""

import gzip
import json
import math

import pytest
import torch

from pyro_symeq.metrics import log_likelihood
from tests.processes import EXAMPLES, run_example


@pytest.fixture
def mnist_nll(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import mnist_nll

    return mnist_nll


@pytest.fixture
def root(tmp_path):
    """A few grey images of noise in the files and the layout of MNIST."""
    folder = tmp_path / "data" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind, array in {
            "images-idx3": torch.randint(256, (60, 28, 28), dtype=torch.uint8),
            "labels-idx1": torch.arange(60, dtype=torch.uint8) % 10,
        }.items():
            shape = b"".join(n.to_bytes(4, "big") for n in array.shape)
            header = bytes([0, 0, 8, array.dim()]) + shape
            content = gzip.compress(header + array.numpy().tobytes())
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(content)
    return tmp_path / "data"


@pytest.mark.parametrize(("network", "data"), [("linear", "dynamic"), ("nonlinear", "static")])
def test_a_smoke_run_leaves_its_figures_and_goes_on(tmp_path, root, network, data):
    out = tmp_path / "out"
    options = ["--preset", "smoke", "--network", network, "--data", data, "--data-root", root]
    for more in ([], ["--resume"]):
        result = run_example("mnist_nll.py", *options, "--out", out, *more)
        assert result.returncode == 0, result.stderr
    record = json.loads((out / f"nll-{network}-{data}-smoke-0.json").read_text())
    figures = record["figures"]
    assert figures["number of draws K"] == 10
    # An untrained network knows little more than the mean image: of fair pixels, 543 nats.
    assert 400 < figures["test NLL (nats)"] < figures["test negative ELBO (nats)"] < 1500
    assert record["settings"]["network"] == network
    assert record["settings"]["binarisation"] == data
    assert len(record["history"]) == 4
    assert (out / f"nll-{network}-{data}-smoke-0.png").stat().st_size > 10_000
    assert ("test NLL of NVIL" in result.stdout) == (data == "static")
    assert "test NLL of wake-sleep" not in result.stdout  # known for two linear layers alone


def test_images_are_split_and_pixels_drawn_once(mnist_nll, root):
    cpu = torch.device("cpu")
    static, again = (mnist_nll.digits("static", root, 8, cpu) for _ in range(2))
    dynamic = mnist_nll.digits("dynamic", root, 8, cpu)
    assert len(static.training) == len(dynamic.training) == 50
    assert len(static.validation) == len(static.test) == 8
    for name in ("training", "validation", "test"):
        x = getattr(static, name)
        assert ((x == 0) | (x == 1)).all()
        assert torch.equal(x, getattr(again, name))
    assert torch.equal(static.test, dynamic.test)
    assert torch.equal(static.validation, dynamic.validation)
    assert (dynamic.training.frac() != 0).any()
    assert set(dynamic.batch(5).unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("network", ["linear", "nonlinear"])
def test_a_network_without_weights_gives_the_mean_image(mnist_nll, network):
    """Then pixels are independent of the bits, whose prior and posterior are fair: no noise."""
    mean = torch.tensor([0.1, 0.5, 0.8])
    pair = mnist_nll.BeliefNetwork(mean, network, None)
    for name, parameter in pair.named_parameters():
        if name.endswith("weight"):
            torch.nn.init.zeros_(parameter)
    x = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    found = log_likelihood(pair.model, pair.guide, x, num_draws=3)
    expected = [math.log(0.9 * 0.5 * 0.8), math.log(0.1 * 0.5 * 0.2)]
    assert found.values.tolist() == pytest.approx(expected, abs=1e-4)
