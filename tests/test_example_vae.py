"""The VAE of the examples: both ways of learning, and what compares them."""

import re

import pytest

from tests.processes import run_example


def run(*options):
    return run_example("vae.py", *options)


def succeed(*options):
    result = run(*options)
    assert result.returncode == 0, result.stderr
    return result.stdout


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
