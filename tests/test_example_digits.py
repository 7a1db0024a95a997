"""The demo, run as a user runs it."""

import gzip
import re
import signal
import subprocess
import time

import pytest
import torch

from tests.comparison import same
from tests.processes import command, run_example


def digits(*options):
    return run_example("digits.py", *map(str, options))


def succeed(*options):
    result = digits(*options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def load(folder, data="digits"):
    return torch.load(folder / f"{data}.pt", weights_only=True)


@pytest.mark.slow
def test_the_encoder_learns_to_classify_from_dreams(tmp_path):
    output = succeed("--steps", 500, "--out", tmp_path)
    (accuracy,) = re.findall(r"held-out accuracy of the encoder +([\d.]+)", output)
    assert float(accuracy) > 0.85
    (bits,) = re.findall(r"in z1 +([\d.]+) bits", output)
    assert float(bits) > 5
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    succeed("--steps", 60, "--out", whole)
    process = subprocess.Popen(
        command("digits.py", "--steps", "60", "--out", parts), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (parts / "digits.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "To go on, give the same options and --resume." in message
    assert 0 < load(parts)["learner"]["num_steps"] < 60
    succeed("--steps", 60, "--out", parts, "--resume")
    assert same(load(parts)["learner"], load(whole)["learner"])


def write_idx(path, array):
    header = bytes([0, 0, 8, array.dim()]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(header + array.numpy().tobytes()))


@pytest.fixture
def mnist(tmp_path):
    """A few images of noise in the files and the layout of MNIST."""
    folder = tmp_path / "data" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = torch.randint(256, (40, 28, 28), dtype=torch.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        labels = torch.arange(40, dtype=torch.uint8) % 10
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return folder


def test_mnist_is_read_where_it_lies(tmp_path, mnist):
    files = sorted(mnist.iterdir())
    root = mnist.parent.parent
    succeed("--data", "mnist", "--data-root", root, "--steps", 1, "--out", tmp_path)
    assert (tmp_path / "mnist.png").exists()
    assert load(tmp_path, "mnist")["learner"]["num_steps"] == 1
    assert sorted(mnist.iterdir()) == files


def test_missing_data(tmp_path):
    result = digits("--data", "fashion", "--data-root", tmp_path, "--steps", 1, "--out", tmp_path)
    assert result.returncode == 1
    assert re.search("no FashionMNIST in .*train-images-idx3-ubyte.gz.*--data-root", result.stderr)
    assert "Traceback" not in result.stderr


def test_damaged_data(tmp_path, mnist):
    (mnist / "train-images-idx3-ubyte.gz").write_bytes(b"no images")
    root = mnist.parent.parent
    result = digits("--data", "mnist", "--data-root", root, "--steps", 1, "--out", tmp_path)
    assert result.returncode == 1
    assert re.search(r"train-images-idx3-ubyte.gz is damaged.*get it again", result.stderr)


def test_checkpoints_that_do_not_fit(tmp_path):
    result = digits("--steps", 2, "--out", tmp_path, "--resume")
    assert "There is no checkpoint" in result.stderr
    succeed("--steps", 2, "--out", tmp_path)
    result = digits("--steps", 3, "--out", tmp_path, "--resume")
    assert "is of a training with steps=2 (now 3)" in result.stderr
    (tmp_path / "digits.pt").write_bytes(b"no checkpoint")
    result = digits("--steps", 2, "--out", tmp_path, "--resume")
    assert result.returncode == 1
    assert "is damaged" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", 0], "argument --steps: expected a number of at least 1, got '0'"),
        (["--device", "abacus"], "argument --device: can't use device 'abacus'"),
        (["--data", "letters"], "argument --data: invalid choice: 'letters'"),
    ],
)
def test_bad_options(options, message):
    result = digits(*options)
    assert result.returncode == 2
    assert message in result.stderr
