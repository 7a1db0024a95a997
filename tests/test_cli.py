"""The options of the example programs: what they refuse, and how."""

import argparse
import sys

import pytest

from tests.processes import EXAMPLES, run_example

sys.path.append(str(EXAMPLES))

import cli  # noqa: E402


@pytest.mark.parametrize(
    ("reader", "good", "bad"),
    [
        (cli.count, {"1": 1, "20": 20}, ["0", "-1", "1.5", "one", ""]),
        (cli.seed, {"0": 0, "4294967295": 2**32 - 1}, ["-1", "4294967296", "0.5", "x"]),
        (cli.amount, {"0": 0.0, "2e-3": 2e-3}, ["-1", "nan", "inf", "x"]),
        (cli.share, {"1": 1.0, "0.5": 0.5}, ["0", "1.1", "nan", "x"]),
        (cli.part, {"0": 0.0, "1": 1.0}, ["-0.1", "1.1", "nan", "x"]),
    ],
    ids=["count", "seed", "amount", "share", "part"],
)
def test_numbers_are_read_or_refused(reader, good, bad):
    assert {text: reader(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"expected a number .*{text!r}"):
            reader(text)


@pytest.mark.parametrize(
    ("program", "options", "problem"),
    [
        ("digits.py", ["--seed", "-1"], "argument --seed: expected a number from 0 to 2"),
        (
            "mnist_hvae.py",
            ["--learning-rate", "nan"],
            "expected a number of at least 0, got 'nan'",
        ),
        ("apart.py", ["--timeout", "-3"], "expected a number of at least 0, got '-3'"),
        ("apart.py", ["--resume", "--data", "digits"], "Start without --resume."),
        ("lightning_digits.py", ["--epochs", "0"], "expected a number of at least 1, got '0'"),
    ],
)
def test_programs_end_with_a_message(program, options, problem, tmp_path):
    out = [] if program == "lightning_digits.py" else ["--out", tmp_path]
    result = run_example(program, *options, *out)
    assert result.returncode != 0
    assert problem in result.stderr
    assert "Traceback" not in result.stderr
