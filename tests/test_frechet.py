"""Fréchet distances, against the closed form for normal distributions."""

import builtins

import pytest
import torch
from torch import nn

from pyro_symeq.metrics import Features, frechet_distance, inception
from tests.comparison import same
from tests.ranks import launch


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def closed_form(mean_a, cov_a, mean_b, cov_b):
    """With the symmetric form of the root, tr (A^1/2 B A^1/2)^1/2."""
    inner = root(root(cov_a) @ cov_b @ root(cov_a))
    return (mean_a - mean_b).square().sum() + (cov_a + cov_b - 2 * inner).trace()


def with_moments(n, mean, cov):
    """Vectors whose mean and (unbiased) covariance are exactly these."""
    z = torch.randn(n, len(mean))
    z = z - z.mean(0)
    z = torch.linalg.solve_triangular(
        torch.linalg.cholesky(z.T.cov().reshape(len(mean), -1)), z.T, upper=False
    ).T
    return z @ torch.linalg.cholesky(cov).T + mean


def covariance(d):
    factor = torch.randn(d, d)
    return factor @ factor.T + 0.1 * torch.eye(d)


@pytest.mark.parametrize("d", [1, 2, 7])
def test_closed_form(d):
    mean_a, mean_b, cov_a, cov_b = torch.randn(d), torch.randn(d), covariance(d), covariance(d)
    a, b = with_moments(20, mean_a, cov_a), with_moments(50, mean_b, cov_b)
    found = frechet_distance(a, b, "z0")
    expected = closed_form(mean_a, cov_a, mean_b, cov_b).item()
    assert found.value == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a, "z0").value == pytest.approx(expected, rel=1e-8)
    assert found.num_samples == (20, 50)


def test_constant_and_repeated_features():
    """Singular covariances, as of latents that have collapsed."""
    a, b = torch.randn(100, 3), torch.randn(100, 3)
    a[:, 1], b[:, 1] = 1.0, 1.0
    a[:, 2], b[:, 2] = a[:, 0], b[:, 0]
    moments = [m for x in (a, b) for m in (x.mean(0), x.T.cov())]
    found = frechet_distance(a, b, "z")
    assert found.value == pytest.approx(closed_form(*moments).item(), abs=1e-6)
    assert frechet_distance(a, a, "z").value == pytest.approx(0, abs=1e-6)


def test_finite_sets_of_one_law_are_close():
    """The mean of the distance of n draws each, in one dimension, is about 3 / n."""
    distances = [
        frechet_distance(torch.randn(200, 1), torch.randn(200, 1), "z").value for _ in range(200)
    ]
    assert sum(distances) / 200 == pytest.approx(3 / 200, rel=0.4)


def test_single_precision_far_from_the_origin():
    a = torch.randn(1000, 2)
    b = torch.randn(1000, 2)
    expected = frechet_distance(a, b, "z").value
    found = frechet_distance((a + 100).float(), (b + 100).float(), "z").value
    assert found == pytest.approx(expected, abs=1e-4)


# --- features -------------------------------------------------------------------------------


class Doubled(nn.Module):
    """Doubles images; remembers how many it was shown, and in which mode."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.inner = nn.BatchNorm1d(1).eval()

    def forward(self, x):
        self.seen.append((len(x), self.training, torch.is_grad_enabled()))
        return 2 * x


def test_the_space_is_a_part_of_the_result():
    a, b = torch.randn(25, 1, 2, 2), torch.randn(25, 1, 2, 2)
    network = Doubled()
    features = Features("doubled", network, at_once=10)
    found = frechet_distance(a, b, features)
    assert found.value == pytest.approx(4 * frechet_distance(a, b, "pixels").value)
    assert str(found) == f"frechet[doubled] {found.value:.2f}"
    assert found.as_dict() == {"frechet[doubled]": float(found)}
    assert network.seen == [(n, False, False) for n in (10, 10, 5, 10, 10, 5)]
    assert network.training
    assert not network.inner.training


def test_a_method_of_a_module_runs_in_evaluation_mode():
    network = Doubled()
    Features("doubled", network.forward)(torch.randn(3, 2))
    assert network.seen == [(3, False, False)]
    assert network.training


def test_a_function_leaves_the_buffers_of_its_modules():
    norm = nn.BatchNorm1d(2)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    Features("normed", lambda x: norm(x))(torch.randn(30, 2))
    assert same(dict(norm.state_dict()), before)
    assert norm.training


def test_features_that_were_computed_before():
    a, b = torch.randn(25, 4), torch.randn(25, 4)
    features = Features("doubled", lambda x: 2 * x)
    assert frechet_distance(features(a), features(b), features.name) == frechet_distance(
        a, b, features
    )


def test_on_a_device(device):
    a, b = torch.randn(30, 2), torch.randn(30, 2) + 1
    found = frechet_distance(a.float().to(device), b.float().to(device), "z").value
    assert found == pytest.approx(frechet_distance(a, b, "z").value, rel=1e-4)


def test_inception_sees_pixels_outside_as_black_and_white(tmp_path, monkeypatch):
    from torchmetrics.image import fid

    weights = tmp_path / "weights.pth"
    weights.touch()
    monkeypatch.setattr(fid, "_TORCH_FIDELITY_AVAILABLE", True)
    monkeypatch.setattr(fid, "NoTrainInceptionV3", lambda **_: nn.Identity(), raising=False)
    x = torch.tensor([-0.1, 0.0, 0.2, 1.0, 1.1]).reshape(1, 1, 1, 5)
    assert inception(weights, 64)(x).tolist() == [3 * [0, 0, 51, 255, 255]]
    x[..., 1:3] = torch.nan
    with pytest.raises(ValueError, match="pixels between 0 and 1, got 2 that are NaN"):
        inception(weights, 64)(x)


def distance_of_a_rank(rank):
    return frechet_distance(torch.arange(9.0), (rank + 1) * torch.arange(9.0), "z").value


def test_ranks_exchange_nothing():
    """Sets of the variance 7.5 and of (rank + 1)^2 times that, with means of 4 and 4 (rank + 1)."""
    expected = [rank**2 * (4**2 + 7.5) for rank in range(2)]
    assert launch(2, distance_of_a_rank) == pytest.approx(expected, abs=1e-6)


# --- misuse ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1])
def test_too_few_rows(number):
    with pytest.raises(ValueError, match=f"at least two rows of features 'z', got {number}"):
        frechet_distance(torch.zeros(number, 2), torch.zeros(5, 2), "z")


def test_sizes_differ():
    with pytest.raises(ValueError, match=r"features 'z' of one size, got \[2, 3\]"):
        frechet_distance(torch.zeros(5, 2), torch.zeros(5, 3), "z")


def test_features_that_are_not_finite():
    bad = torch.zeros(5, 2)
    bad[0] = torch.nan
    with pytest.raises(ValueError, match="finite features 'z', got 2 elements that are NaN"):
        frechet_distance(torch.zeros(5, 2), bad, "z")


def without(monkeypatch, *names):
    """Imports as if packages were not installed."""
    find = builtins.__import__

    def fail(name, *args, **kwargs):
        if name.split(".")[0] in names:
            raise ModuleNotFoundError(name=name)
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)


def test_without_torchmetrics(monkeypatch):
    without(monkeypatch, "torchmetrics")
    with pytest.raises(
        ImportError, match=r'need torchmetrics.*pip install "pyro_symeq\[metrics\]"'
    ):
        frechet_distance(torch.zeros(5, 2), torch.zeros(5, 2), "z")


def test_inception_without_its_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights of the Inception network in"):
        inception(tmp_path / "none.pth")


def test_inception_without_torch_fidelity(tmp_path, monkeypatch):
    from torchmetrics.image import fid

    weights = tmp_path / "weights.pth"
    weights.touch()
    monkeypatch.setattr(fid, "_TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(ImportError, match="Run: pip install torch-fidelity"):
        inception(weights)
