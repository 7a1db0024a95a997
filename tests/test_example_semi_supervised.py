"""The semi-supervised example: its programs, its choice of labels, its messages."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.processes import EXAMPLES, run_example


def run(*options):
    return run_example("semi_supervised.py", *options)


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    torch.set_default_dtype(torch.float32)
    import semi_supervised

    return semi_supervised


@pytest.fixture
def images(example, monkeypatch):
    return example.load("digits", Path("unused"))


@pytest.mark.slow
def test_the_program_reports_and_draws(tmp_path):
    options = ["--data", "digits", "--steps", "12", "--labels", "20", "--label-draws", "2"]
    result = run(*options, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "seed 0: test accuracy" in result.stdout and "seed 1:" in result.stdout
    assert (tmp_path / "semi_supervised-digits-20.png").stat().st_size > 5000


def test_labels_are_chosen_by_class_and_seed(example, images):
    def rows(seed):
        return example.Training(images, 30, seed, example.Settings(steps=1)).is_labelled

    first = rows(0)
    assert images.y[first].sum(0).tolist() == [3.0] * 10
    assert torch.equal(first, rows(0))
    assert not torch.equal(first, rows(1))


def test_a_batch_of_each_kind_is_drawn(example, images):
    training = example.Training(images, 30, 0, example.Settings(steps=1))
    labelled, unlabelled = training.batches(labelled_only=False)
    x, y = labelled.call[0]
    told = {tuple(row.tolist()) for row in images.x[training.is_labelled]}
    assert len(x) == len(y) == 16
    assert {tuple(row.tolist()) for row in x} <= told
    assert len(unlabelled.call[0]) == 1
    assert len(training.batches(labelled_only=True)) == 1


def test_poses_move_and_undo(example, images):
    """The encoder undoes a pose of the decoder; all poses at zero leave a template alone."""
    decoder = example.Decoder(images.x, num_bits=2, width=8)
    y, s = torch.eye(10)[:5], torch.ones(5, 2)
    still = decoder.x(y, s, torch.zeros(5, 6))
    assert torch.allclose(still, decoder.template(example.joined(y, s)), atol=1e-4)
    maps = example.maps(torch.randn(5, 6))
    corner = torch.tensor([[1.0], [-0.5], [1.0]])
    there = torch.cat([maps @ corner, torch.ones(5, 1, 1)], dim=1)
    assert torch.allclose(example.inverse(maps) @ there, corner[:2], atol=1e-5)


def test_nothing_is_learned_about_hidden_classes(example, images):
    """The classes of images without a label don't enter: with them changed, all stays the same."""
    sums = []
    for order in (1, -1):
        known = example.Training(images, 30, 0, example.Settings(steps=1)).is_labelled
        y = torch.where(known[:, None], images.y, images.y.roll(order, 1))
        training = example.Training(images, 30, 0, example.Settings(steps=3, encoder_warmup=1))
        training.images = replace(images, y=y)
        training.run()
        sums.append([p.sum().item() for p in training.vae.parameters()])
    assert sums[0] == sums[1]


@pytest.mark.parametrize("labels", ["15", "100000"])
def test_impossible_numbers_of_labels_are_refused(labels, tmp_path):
    result = run("--data", "digits", "--labels", labels, "--out", tmp_path)
    assert result.returncode == 1
    assert "Expected --labels to be a multiple of 10" in result.stderr
    assert "Traceback" not in result.stderr


def test_missing_data_are_told(tmp_path):
    result = run("--data-root", tmp_path / "nowhere", "--out", tmp_path)
    assert result.returncode == 1
    assert "PYRO_SYMEQ_DATA" in result.stderr
    assert "Traceback" not in result.stderr
