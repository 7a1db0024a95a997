"""Priors that can only be sampled: short runs in processes of their own, and their parts."""

import json

import pytest
import torch

from tests.montecarlo import assert_mean
from tests.processes import EXAMPLES, run_example


@pytest.fixture
def implicit_prior(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import implicit_prior

    return implicit_prior


@pytest.mark.parametrize(
    ("data", "what", "settings"),
    [
        ("walk", {"root-mean-square error", "in 90 % intervals"}, 4),
        ("codes", {"wrong pixels"}, 2),
    ],
)
def test_a_smoke_run_leaves_its_figures_and_goes_on(tmp_path, data, what, settings):
    options = ["--data", data, "--preset", "smoke", "--out", tmp_path]
    for more in ([], ["--resume"]):
        result = run_example("implicit_prior.py", *options, *more)
        assert result.returncode == 0, result.stderr
    assert "Pyro's ELBO ends in an error: An Implicit distribution" in result.stdout
    figures = json.loads((tmp_path / f"implicit-{data}-smoke-0.json").read_text())["figures"]
    assert len(figures["instrument"]) == settings
    names = ["nothing", "the game", "true instrument", "first guess of it"]
    assert list(figures["held out"]) == names
    assert all(measured.keys() == what for measured in figures["held out"].values())
    assert (tmp_path / f"implicit-{data}-smoke-0.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_game_finds_ways_and_moves_towards_the_true_camera(tmp_path):
    result = run_example("implicit_prior.py", "--steps", "600", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "implicit-walk-laptop-0-steps-600.json").read_text())[
        "figures"
    ]
    errors = {k: m["root-mean-square error"] for k, m in figures["held out"].items()}
    assert errors["the game"] < errors["nothing"] / 2
    background = figures["instrument"]["background"]
    assert abs(background["found"] - background["true"]) < 0.5


def test_ways_stay_in_the_box(implicit_prior):
    """Their first points are uniform there: mean 0 and mean square 1/3."""
    ways = implicit_prior.walk(torch.Size([5000]), torch.device("cpu"))
    assert ways.shape == (5000, 2 * implicit_prior.NUM_POINTS)
    assert ways.abs().max() <= 1
    assert_mean(ways[:, :2], torch.zeros(2))
    assert_mean(ways[:, :2].square(), torch.full((2,), 1 / 3))


def test_the_camera_lights_the_pixels_of_points(implicit_prior):
    """Up is up, points are where they are, and the last one glows on in the next frame."""
    side = implicit_prior.SIDE
    camera = implicit_prior.Camera(blur=0.05, afterglow=0.5, contrast=8.0, background=-4.0)
    way = torch.tensor([[1.1, 1.1], [-1.1, 1.1], [1.1, -1.1]]).repeat(2, 1).flatten()
    frames = camera(way).view(-1, side, side)
    assert frames[0, 0, -1].item() == pytest.approx(4, abs=1e-4)
    assert frames[1, 0, 0].item() == pytest.approx(4, abs=1e-4)
    assert frames[1, 0, -1].item() == pytest.approx(0, abs=1e-4)
    assert frames[2, -1, -1].item() == pytest.approx(4, abs=1e-4)
    assert frames[0].sum().item() == pytest.approx(8 - 4 * side**2, abs=1e-2)


def test_the_screen_mixes_its_rates(implicit_prior):
    screen = implicit_prior.Screen(lambda z: z, ink=0.6, blank=0.1)
    shown = screen(torch.tensor([-30.0, 0.0, 30.0])).sigmoid()
    assert shown.tolist() == pytest.approx([0.1, 0.35, 0.6], abs=1e-4)
