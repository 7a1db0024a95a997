"""Two moons: a short training in a process of its own, and what it says about the pair."""

import json

import pytest
import torch

from tests.processes import EXAMPLES, run_example


@pytest.fixture
def two_moons(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import two_moons

    return two_moons


@pytest.mark.slow
def test_a_short_training_moves_towards_the_moons(tmp_path):
    """After 400 steps samples are nearer to the moons than those of the untrained pair."""
    distances = []
    for steps in (1, 400):
        out = tmp_path / str(steps)
        result = run_example("two_moons.py", "--steps", str(steps), "--rounds", "5", "--out", out)
        assert result.returncode == 0, result.stderr
        assert (out / "two_moons.png").stat().st_size > 10_000
        distances.append(json.loads((out / "two_moons.json").read_text()))
    untrained, trained = distances
    assert abs(trained["other real data"]) < 0.01
    for name in ("decoder samples", "data, encoded and decoded", "limiting samples"):
        assert trained[name] < untrained[name] / 2
        assert f"{name:32} {trained[name]:8.4f}" in result.stdout


def test_energy_distance(two_moons):
    """Of point masses at 0 and 1 with shares 1/2 and 3/4, 1/4: 2 (a - b)^2 = 1/8, a, b shares."""
    a = torch.tensor([0.0, 1.0]).repeat(2000).unsqueeze(1)
    b = torch.tensor([0.0, 0.0, 0.0, 1.0]).repeat(1000).unsqueeze(1)
    assert two_moons.energy_distance(a, b) == pytest.approx(1 / 8, abs=2e-3)


def test_steps_must_be_a_number(tmp_path):
    result = run_example("two_moons.py", "--steps", "0", "--out", tmp_path)
    assert result.returncode == 2
    assert "expected a number of at least 1, got '0'" in result.stderr
