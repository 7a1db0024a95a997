"""The VAE of the examples: both ways of learning, and the likelihood that compares them."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch

from tests.processes import EXAMPLES, run_example


def run(*options):
    return run_example("vae.py", *options)


def succeed(*options):
    result = run(*options)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def evaluation(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import evaluation

    return evaluation


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.6 * x - 0.2, 0.9))


def posterior(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def test_bounds_agree_with_integration(evaluation):
    """Compares with log p(x) = log N(x; 0, 2), and with the ELBO less by the KL divergence.

    The bias of the likelihood is -Var[w] / (2 K) relative to p(x), far below its random error.
    """
    x = torch.linspace(-2.0, 2.0, 7)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    kl = torch.distributions.kl_divergence(
        dist.Normal(0.6 * x - 0.2, 0.9), dist.Normal(x / 2, 0.5**0.5)
    )
    likelihood, elbo = evaluation.bounds(model, guide, x, num_draws=40_000)
    torch.testing.assert_close(likelihood, exact, rtol=0, atol=0.03)
    torch.testing.assert_close(elbo, exact - kl, rtol=0, atol=0.03)


def test_the_posterior_makes_all_weights_equal(evaluation):
    x = torch.linspace(-2.0, 2.0, 7)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    for estimates in evaluation.bounds(model, posterior, x, num_draws=3):
        torch.testing.assert_close(estimates, exact)


def test_rows_are_scored_in_order_however_few_at_once(evaluation):
    x = torch.linspace(-2.0, 2.0, 7)
    for at_once in (1, 6, 100):
        likelihood, _ = evaluation.bounds(model, posterior, x, num_draws=3, at_once=at_once)
        torch.testing.assert_close(likelihood, dist.Normal(0.0, 2**0.5).log_prob(x))


def test_estimate(evaluation):
    estimate = evaluation.Estimate.of(torch.tensor([1.0, 2.0, 3.0]))
    assert (estimate.mean, estimate.error) == pytest.approx((2, 1 / math.sqrt(3)))


def figures(output):
    return dict(re.findall(r"^(\S.*?) +(-?\d+\.\d+)", output.split("\n\n", 1)[1], re.MULTILINE))


def test_both_ways_of_learning_are_measured_alike(tmp_path):
    options = ("--steps", "2", "--num-draws", "5", "--out", str(tmp_path))
    outputs = [figures(succeed("--inference", name, *options)) for name in ("svi", "symeq")]
    assert len(outputs[0]) == 6
    assert list(outputs[0]) == list(outputs[1])
    for name in ("svi", "symeq"):
        picture = tmp_path / f"vae-digits-{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_game_does_not_collapse(tmp_path):
    output = succeed("--steps", "400", "--num-draws", "50", "--out", str(tmp_path))
    learned = {name: float(value) for name, value in figures(output).items()}
    # Pixels with their own frequencies and no latents give -25.3 nats.
    assert learned["held-out log-likelihood"] > -22
    assert learned["KL divergence of q(z|x) from p(z)"] > 2


def test_missing_data(tmp_path):
    result = run("--data", "fashion", "--data-root", str(tmp_path), "--out", str(tmp_path))
    assert result.returncode == 1
    assert re.search("vae.py: There is no FashionMNIST in .*--data-root PATH", result.stderr)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--inference", "nuts"], "argument --inference: invalid choice: 'nuts'"),
        (["--num-draws", "0"], "argument --num-draws: expected a number of at least 1, got '0'"),
        (["--device", "abacus"], "argument --device: can't use device 'abacus'"),
    ],
)
def test_bad_options(options, message):
    result = run(*options)
    assert result.returncode == 2
    assert message in result.stderr
