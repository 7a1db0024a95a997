"""Labelled digits: a short run in a process of its own, and what the pair is asked."""

import json

import pytest
import torch

from tests.processes import EXAMPLES, run_example


def test_a_smoke_run_leaves_its_figures_and_goes_on(tmp_path):
    options = ["--data", "digits", "--preset", "smoke", "--warp", "0.06", "--out", tmp_path]
    for more in ([], ["--resume"]):
        result = run_example("mnist_labelled.py", *options, *more)
        assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "labelled-digits-smoke-0-warp-0.06.json").read_text())
    figures = record["figures"]
    assert record["settings"]["warp"] == 0.06
    assert 0 <= figures["held-out accuracy"] <= 1
    assert 1 / 10 <= figures["largest share of a class"] <= 1
    distances = {
        law: figures[f"frechet[digits-cnn]/{law}"]
        for law in ("decoder", "limiting", "limiting given class", "floor")
    }
    assert 0 < distances["floor"] < min(distances["decoder"], distances["limiting"])
    ratio = distances["limiting"] / distances["decoder"]
    assert figures["limiting / decoder"] == pytest.approx(ratio)
    last = record["history"][-1]
    assert {"accuracy", "decoder distance", "distance after 1 rounds"} < last.keys()
    for name in (
        "labelled-digits-smoke-0-warp-0.06.png",
        "labelled-digits-smoke-0-warp-0.06-latents.png",
    ):
        assert (tmp_path / name).stat().st_size > 10_000


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import mnist_labelled
    from data import load
    from features import classifier, feature_space

    torch.set_default_dtype(torch.float32)
    images = load("digits", None)
    training = mnist_labelled.Training(images, 0, mnist_labelled.PRESETS["smoke"])
    network = classifier("digits", images.x)
    return mnist_labelled.Judge(
        training.vae, images, feature_space("digits", images.x), network, num_samples=40
    )


def test_images_are_warped_around_their_centre_each_in_its_own_way(monkeypatch, device):
    monkeypatch.syspath_prepend(EXAMPLES)
    from mnist_labelled import warped

    side, spread = 28, 0.06
    rows = torch.arange(side, device=device) - (side - 1) / 2
    ring = (rows[:, None].square() + rows.square()).sqrt().sub(9).abs() < 2
    x = ring.to(rows).view(1, -1).expand(1000, -1)
    assert warped(x, side, 0.0).equal(x)
    seen = warped(x, side, spread)
    assert set(seen.unique().tolist()) == {0.0, 1.0}
    columns = seen.view(-1, side, side).mean(1) / seen.mean(1, keepdim=True) / side
    assert (columns @ rows).abs().max() < 0.5
    widths = (columns @ rows.square()).sqrt()
    deviation = (widths / widths.mean()).std().item()
    assert deviation == pytest.approx(spread, rel=0.2)  # 9 standard errors


def test_samples_are_of_their_classes(judge):
    """As many of each class, in a fixed order; without classes given, others are drawn."""
    classes = [*range(10)] * 4
    given = judge.limiting(2, is_given=True)
    for draws in (judge.decoded(), given):
        assert draws["class"].argmax(-1).tolist() == classes
        assert set(draws["style"].unique().tolist()) == {0.0, 1.0}
        assert judge.pixels(draws["z1"]).shape == (40, 64)
    assert judge.limiting(2, is_given=False)["class"].argmax(-1).tolist() != classes


def test_real_images_are_what_the_classifier_takes_them_for(judge, monkeypatch):
    monkeypatch.setattr(judge, "images", lambda draws: draws["x"])
    real = {"x": judge.x, "class": judge.y}
    assert judge.agreement(real) > 0.9
    assert judge.distance(real).value < 1e-2 < judge.floor().value


@pytest.mark.parametrize("is_mixed", [False, True])
def test_networks_compute_in_bfloat16_where_asked_to(is_mixed, monkeypatch):
    """What they hand over to distributions is in single precision all the same."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import mnist_labelled
    from data import load

    torch.set_default_dtype(torch.float32)
    images, settings = load("digits", None), mnist_labelled.PRESETS["smoke"]
    training = mnist_labelled.Training(images, 0, settings, is_mixed)
    inside, handed_over = set(), set()
    decoder = training.vae.decoder
    for network in (decoder.units, decoder.pixels, training.vae.encoder.features):
        network.register_forward_hook(lambda *args: inside.add(args[-1].dtype))
    training.vae.encoder.register_forward_hook(
        lambda *args: handed_over.update(logits.dtype for logits in args[-1])
    )
    scored = torch.distributions.Bernoulli.log_prob

    def log_prob(self, value):
        handed_over.add(self.logits.dtype)
        return scored(self, value)

    monkeypatch.setattr(torch.distributions.Bernoulli, "log_prob", log_prob)
    training.step()
    assert inside == {torch.bfloat16 if is_mixed else torch.float32}
    assert handed_over == {torch.float32}
