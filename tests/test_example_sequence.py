"""The deep Markov model of the examples: its program, its likelihood, and what padding does."""

import itertools
import re

import pyro
import pytest
import torch
from pyro import poutine

from pyro_symeq import SymmetricUtility
from pyro_symeq.metrics import log_likelihood
from tests.processes import EXAMPLES, run_example

LENGTHS = [4, 1, 3, 2, 4]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import sequence

    return sequence


@pytest.fixture
def pair(example):
    return example.MarkovModel(num_pixels=3, num_units=2, width=5)


def batch():
    lengths = torch.tensor(LENGTHS)
    x = torch.randint(2, (len(lengths), 4, 3)).double()
    return x * is_valid(lengths), lengths


def is_valid(lengths):
    return (torch.arange(4) < lengths[:, None])[..., None]


def utilities_and_gradients(pair, guide, x, lengths):
    pyro.set_rng_seed(1)
    pair.zero_grad()
    loss = SymmetricUtility().loss_and_grads(pair.model, guide, x, lengths)
    gradients = [parameter.grad for parameter in pair.parameters()]
    return torch.tensor([loss.decoder, loss.encoder]), *gradients


def scribbled(x, lengths):
    return torch.where(is_valid(lengths), x, 1 - x)


def test_padding_of_data_teaches_nobody(pair):
    x, lengths = batch()
    expected = utilities_and_gradients(pair, pair.guide, x, lengths)
    actual = utilities_and_gradients(pair, pair.guide, scribbled(x, lengths), lengths)
    torch.testing.assert_close(actual, expected)


def test_padding_of_dreams_teaches_nobody(pair):
    def guide(x, lengths):
        pair.guide(scribbled(x, lengths), lengths)

    x, lengths = batch()
    expected = utilities_and_gradients(pair, pair.guide, x, lengths)
    actual = utilities_and_gradients(pair, guide, x, lengths)
    torch.testing.assert_close(actual, expected)


def test_columns_and_states_in_the_padding_have_no_score(pair):
    x, lengths = batch()
    for program, sites in ((pair.model, "xz"), (pair.guide, "z")):
        trace = poutine.trace(program).get_trace(x, lengths)
        trace.compute_log_prob()
        for site, t in itertools.product(sites, range(4)):
            log_prob = trace.nodes[f"{site}_{t}"]["log_prob"]
            assert ((log_prob != 0) == (t < lengths)).all()


def test_the_encoder_reads_the_columns_to_come_and_no_others(pair):
    x, lengths = batch()
    x.requires_grad_()
    logits = pair.encoder(x, lengths)
    for n, length in enumerate(LENGTHS):
        for t in range(length):
            (gradient,) = torch.autograd.grad(logits[n, t].sum(), x, retain_graph=True)
            reads = gradient.abs().sum(-1) > 0
            expected = torch.zeros_like(reads)
            expected[n, t:length] = True
            assert (reads == expected).all()


@pytest.mark.parametrize("is_chain", [True, False])
def test_likelihood_agrees_with_the_sum_over_all_states(example, is_chain):
    """The mean of the weights is unbiased; fails by chance about once in 10,000 sequences."""
    pair = example.MarkovModel(num_pixels=3, num_units=2, width=5, is_chain=is_chain)
    x, lengths = batch()
    data = {f"x_{t}": x[:, t] for t in range(4)}
    states = itertools.product([0.0, 1.0], repeat=2)
    states = [torch.tensor(state).expand(len(x), 2) for state in states]
    joint = []
    for z in itertools.product(states, repeat=4):
        values = data | {f"z_{t}": z[t] for t in range(4)}
        trace = poutine.trace(poutine.condition(pair.model, values)).get_trace(x, lengths)
        trace.compute_log_prob()
        # States in the padding have no weight: each way to fill it is counted once.
        joint.append(sum(trace.nodes[name]["log_prob"] for name in values))
    exact = torch.logsumexp(torch.stack(joint), 0) - (4 - lengths) * torch.tensor(4.0).log()

    found = log_likelihood(pair.model, pair.guide, x, lengths, num_draws=20_000)
    errors = (1 / found.effective_sizes - 1 / found.num_draws).sqrt()  # of the mean weights
    assert (((found.values - exact).exp() - 1).abs() < 4 * errors).all()
    torch.testing.assert_close(found.values, exact.detach(), rtol=0, atol=0.05)
    assert (found.elbos < exact).all()


def test_images_are_read_without_blank_columns(example):
    images = torch.zeros(3, 2, 5)
    images[0, :, 1] = images[0, 0, 3] = 1  # ink in columns 1 and 3
    images[1, 1, 4] = 1
    read = example.Sequences.of(images)
    assert read.lengths.tolist() == [3, 1, 1]  # a blank image has one column
    expected = torch.zeros(3, 3, 2)
    expected[0, 0] = expected[0, 2, 0] = expected[1, 0, 1] = 1
    assert torch.equal(read.x, expected)


def test_frequencies(example):
    data = example.Sequences(torch.tensor([[[1.0], [1.0]], [[1.0], [0.0]]]), torch.tensor([2, 1]))
    log_likelihood = example.frequencies(data, data)
    # The first pixel is 1 in 2 of 2 sequences, the second in 1 of 1.
    expected = torch.tensor([2.5 / 3 * 1.5 / 2, 2.5 / 3]).log()
    torch.testing.assert_close(log_likelihood, expected)


def run(*options):
    return run_example("sequence.py", *options)


def test_the_program_runs(tmp_path):
    result = run("--steps", "2", "--num-draws", "2", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    for name in ("frequencies of pixels", "independent columns", "deep Markov model"):
        assert re.search(rf"{name} +-\d+\.\d+ ± \d+\.\d+ +-\d+\.\d+", result.stdout)
    assert (tmp_path / "sequence-digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_chain_is_worth_something(tmp_path):
    result = run("--steps", "200", "--num-draws", "20", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    likelihoods = dict(re.findall(r"^(\S.*\S) +(-\d+\.\d+) ±", result.stdout, re.MULTILINE))
    chain = float(likelihoods["deep Markov model"])
    assert chain > float(likelihoods["independent columns"]) + 1
    assert chain > float(likelihoods["frequencies of pixels"]) + 1


def test_missing_data(tmp_path):
    result = run("--data", "mnist", "--data-root", str(tmp_path), "--out", str(tmp_path))
    assert result.returncode == 1
    assert re.search("sequence.py: There is no MNIST in .*--data-root PATH", result.stderr)
    assert "Traceback" not in result.stderr
