"""The example of models that exchange dreams: its report, the shares it expects, its messages."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.processes import EXAMPLES, run_example


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import data_exchange

    return data_exchange


def numbers(output, count):
    """The rows of numbers in a table of the output, by the models they are about."""
    pattern = r"^Model of (.*?)  +" + r" +".join([r"(-?\d+\.\d+)"] * count) + "$"
    rows = re.findall(pattern, output, re.MULTILINE)
    return {title: [float(number) for number in row] for title, *row in rows}


def test_the_program_reports_and_draws(tmp_path):
    options = ["--data", "digits", "--steps", "2", "--alpha", "0.25", "--out", tmp_path]
    result = run_example("data_exchange.py", *options)
    assert result.returncode == 0, result.stderr
    rows, shares = numbers(result.stdout, 5), numbers(result.stdout, 10)
    titles = [f"{own}, {how}" for how in ("alone", "alpha 0.25") for own in ("0 to 4", "5 to 9")]
    assert list(rows) == list(shares) == titles
    assert [row[1] for row in rows.values()] == [0, 0, 0.429, 0.429]  # 3/4 / (2 - 1/4)
    for title, row in shares.items():
        assert sum(row) == pytest.approx(1, abs=0.006)
        never_had = row[5:] if title.startswith("0") else row[:5]
        assert sum(never_had) == pytest.approx(rows[title][0], abs=0.004)
    picture = tmp_path / "data_exchange-digits.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("alpha", [1.0, 0.7, 0.1])
def test_expected_shares_are_a_fixed_point(example, alpha):
    """They solve p_i = alpha pi_i + (1 - alpha) p_j, whatever the numbers of images."""
    y = torch.eye(10)[torch.arange(10).repeat_interleave(torch.arange(1, 11))]
    p = {name: example.expected(name, alpha, y) for name in ("low", "high")}
    counts = torch.arange(1.0, 11.0)
    pi = {
        "low": torch.cat([counts[:5] / 15, torch.zeros(5)]),
        "high": torch.cat([torch.zeros(5), counts[5:] / 40]),
    }
    for name, other in (("low", "high"), ("high", "low")):
        torch.testing.assert_close(p[name], alpha * pi[name] + (1 - alpha) * p[other])
        share = example.foreign(p[name], name)
        assert share == pytest.approx((1 - alpha) / (2 - alpha))


def test_each_model_is_given_its_own_digits_alone(example, monkeypatch):
    images = example.load("digits", Path("unused"))
    settings = replace(example.SETTINGS["digits"], steps=1)
    given = {}

    class Game:
        def __init__(self, vaes, alpha, optim):
            pass

        def step(self, *batches):
            given.update(zip(example.OWN, batches, strict=True))
            return 0.0

    monkeypatch.setattr(example, "Exchange", Game)
    example.learn(dict.fromkeys(example.OWN), images, 0.5, settings)
    for name, batch in given.items():
        of_others = {
            tuple(x.tolist())
            for other, digits in example.OWN.items()
            if other != name
            for x in example.of(digits, images.x, images.y)
        }
        assert len(batch) == settings.batch_size
        assert not {tuple(x.tolist()) for x in batch} & of_others


@pytest.mark.parametrize("alpha", ["0", "1.5", "-1", "nan", "half"])
def test_impossible_weights_are_refused(example, alpha, capsys):
    with pytest.raises(SystemExit):
        example.parse([f"--alpha={alpha}"])
    message = f"argument --alpha: expected a number above 0 and at most 1, got '{alpha}'"
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_models_learn_digits_that_they_never_had(tmp_path):
    result = run_example("data_exchange.py", "--data", "digits", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    rows = numbers(result.stdout, 5)
    for own, column in (("0 to 4", 4), ("5 to 9", 3)):
        before, after = rows[f"{own}, alone"], rows[f"{own}, alpha 0.5"]
        assert after[0] > before[0] + 0.1
        assert after[column] > before[column] + 1  # nats, for real images of those digits
