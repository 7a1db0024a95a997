"""The paper's hierarchical VAE: its programs, all ways to learn it, and what a run leaves."""

import json
import sys
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from pyro import poutine
from torch.nn.functional import binary_cross_entropy_with_logits

from tests.comparison import same
from tests.processes import EXAMPLES, run_example

sys.path.append(str(EXAMPLES))

import mnist_hvae  # noqa: E402
from features import feature_space  # noqa: E402
from hvae import DEEP, FACTORISATIONS, STYLES, Size  # noqa: E402
from judge import Judge  # noqa: E402
from mnist_hvae import NAMES, PRESETS, Training, chosen, parse  # noqa: E402
from training import in_turn  # noqa: E402

SMALL = Size(width=16, num_channels=2)
WAYS = [("game", "ladder"), ("game", "reverse"), ("elbo", "ladder"), ("rws", "reverse")]
each_way = pytest.mark.parametrize(("method", "factorisation"), WAYS)


def make(factorisation, style="silu", size=SMALL, side=8):
    return FACTORISATIONS[factorisation](side, size, STYLES[style])


def negative_log_prob(logits, bits):
    return binary_cross_entropy_with_logits(logits, bits, reduction="none").sum(-1)


@pytest.mark.parametrize("style", STYLES)
def test_the_ladder_adds_to_the_logits_of_the_decoder(style):
    hvae = make("ladder", style)
    x = torch.rand(7, 64).round()
    q = poutine.trace(hvae.guide).get_trace(x)
    p = poutine.trace(poutine.replay(hvae.model, q)).get_trace(x)
    z0, z1 = (q.nodes[name]["value"] for name in ("z0", "z1"))
    z0_logits, f = hvae.encoder(x).split([30, 100], -1)
    z1_logits = hvae.decoder.units(z0)
    assert torch.allclose(
        -q.log_prob_sum(),
        (negative_log_prob(z0_logits, z0) + negative_log_prob(z1_logits + f, z1)).sum(),
    )
    of_x = negative_log_prob(hvae.decoder.pixels(z1), x)
    of_z = negative_log_prob(torch.zeros_like(z0), z0) + negative_log_prob(z1_logits, z1)
    assert torch.allclose(-p.log_prob_sum(), (of_x + of_z).sum())


def test_the_reverse_encoder_goes_up():
    hvae = make("reverse")
    q = poutine.trace(hvae.guide).get_trace(torch.rand(7, 64).round())
    assert list(q.stochastic_nodes) == ["images", "z1", "z0"]
    assert torch.equal(q.nodes["z0"]["fn"].base_dist.logits, hvae.top(q.nodes["z1"]["value"]))


@pytest.mark.parametrize("factorisation", FACTORISATIONS)
def test_networks_of_the_size_of_the_paper(factorisation):
    hvae = make(factorisation, size=DEEP, side=28)
    encoder, decoder = (
        sum(parameter.numel() for parameter in player.parameters())
        for player in (hvae.encoder, hvae.decoder)
    )
    assert round(encoder / 1e6, 1) == 2.2
    assert round(decoder / 1e6, 1) == 0.8
    assert hvae.decoder.pixels(torch.zeros(3, 2, 100)).shape == (3, 2, 784)


def test_outputs_have_unit_variance_at_the_start():
    hvae = FACTORISATIONS["ladder"](28, Size(256, 16), STYLES["silu"])
    logits = hvae.decoder.units(torch.rand(500, 30).round())
    # SiLU makes 0.36 of the mean square of a standard normal, and a layer keeps it
    assert logits.var().item() == pytest.approx(0.36, rel=0.3)


@pytest.mark.parametrize(
    ("arguments", "rate"),
    [
        ("", 4e-3),
        ("--method elbo", 2e-3),
        ("--method elbo --learning-rate 1e-4", 1e-4),
        ("--learning-rate 1e-4", 1e-4),
        ("--method elbo --learning-rate 0", 0.0),
        ("--method elbo --preset paper", 1e-4),
    ],
)
def test_each_method_has_its_learning_rate(arguments, rate):
    assert chosen(parse(arguments.split())).learning_rate == rate


def training(method, factorisation, *others, **settings):
    names = ["--method", method, "--factorisation", factorisation, "--device", "cpu", *others]
    torch.manual_seed(5)
    settings = replace(PRESETS["smoke"], **settings)
    return Training(torch.rand(50, 64).round(), parse(names), settings)


@each_way
def test_a_training_goes_on_exactly(method, factorisation):
    whole = training(method, factorisation)
    for _ in range(9):
        whole.step()
    expected = whole.state_dict()
    stopped = training(method, factorisation)
    for _ in range(5):
        stopped.step()
    state = stopped.state_dict()
    resumed = training(method, factorisation, "--seed", "1")
    resumed.load_state_dict(state)
    for _ in range(4):
        resumed.step()
    assert resumed.num_steps == 9
    assert same(resumed.state_dict(), expected)


def rates(optims, steps):
    """The learning rates of optimisers in each step."""
    told = []
    for optim in optims:
        weight = torch.nn.Parameter(torch.zeros(()))
        optim([weight])  # makes its optimiser
        told.append([])
        for _ in range(steps):
            told[-1].append(optim.optim_objs[weight].optimizer.param_groups[0]["lr"])
            optim.step()
    return told


@pytest.mark.parametrize(
    ("annealed", "last_word", "decoder", "encoder"),
    [
        (1.0, 0.0, [1, 0.75, 0.25], [1, 0.75, 0.25]),
        (0.0, 0.0, [1, 1, 1], [1, 1, 1]),
        (0.67, 0.33, [1, 1, 0], [1, 1, 0.5]),
        (0.0, 0.67, [1, 0, 0], [1, 1, 1]),
    ],
)
def test_the_decoder_rests_before_the_encoder(annealed, last_word, decoder, encoder):
    told = rates(in_turn(3, 1.0, annealed, last_word), 3)
    assert told == [pytest.approx(decoder), pytest.approx(encoder)]


def test_the_encoder_has_the_last_word():
    learner = training("game", "ladder", steps=10, last_word=0.4)
    networks = learner.hvae.decoder, learner.hvae.encoder
    moved = []
    for _ in range(10):
        before = [deepcopy(each.state_dict()) for each in networks]
        learner.step()
        after = [each.state_dict() for each in networks]
        moved.append([not same(a, b) for a, b in zip(before, after, strict=True)])
    assert moved == [[True, True]] * 6 + [[False, True]] * 4


def test_methods_start_from_the_same_parameters():
    game, elbo = (training(method, "ladder").hvae.state_dict() for method in ("game", "elbo"))
    assert same(game, elbo)


def judge():
    hvae = make("ladder")
    x = torch.rand(60, 64).round()
    return Judge(hvae, feature_space("digits", x), x)


def test_the_judge_compares_the_most_probable_images(monkeypatch):
    asked = judge()
    monkeypatch.setattr(asked, "probabilities", lambda latents: 0.6 * asked.x + 0.2)
    distances = asked.distances(decoder={}, limiting={})
    assert list(distances) == ["frechet[digits-cnn]/decoder", "frechet[digits-cnn]/limiting"]
    assert max(distances.values()) < 1e-3


def test_all_laws_of_latents():
    asked = judge()
    for latents in (asked.prior(30), asked.posterior(30), asked.limiting(30, num_rounds=2)):
        assert {name: value.shape for name, value in latents.items()} == {
            "z0": (30, 30),
            "z1": (30, 100),
        }


def test_runs_leave_figures_and_pictures(tmp_path):
    options = ["--data", "digits", "--preset", "smoke", "--steps", "20", "--out", str(tmp_path)]
    mnist_hvae.main([*options, "--device", "cpu", "--method", "elbo"])
    result = run_example("mnist_hvae.py", *options)  # as a user runs it
    assert result.returncode == 0, result.stderr
    stem = "digits-ladder-silu-game-smoke-0-steps-20"
    record = json.loads((tmp_path / f"{stem}.json").read_text())
    figures = {
        "frechet[digits-cnn]/decoder",
        "frechet[digits-cnn]/limiting",
        "frechet[digits-cnn]/floor",
        "limiting / decoder",
        "bits/z0",
        "bits/z1",
        "log-likelihood/5 draws",
        "log-likelihood/5 draws, standard error",
    }
    assert figures <= record["figures"].keys()
    assert all(figure in result.stdout for figure in figures)
    accuracy = record["figures"]["consistency/z1/prior, limiting/accuracy[z1]"]
    assert 0 <= accuracy <= 1
    assert record["settings"].keys() >= {*NAMES, "steps", "size"}
    assert [moment["step"] for moment in record["history"]] == list(range(2, 21, 2))
    for moment in record["history"]:
        assert ("frechet[digits-cnn]/limiting" in moment) == (moment["step"] > 15)
    images = torch.load(tmp_path / f"{stem}.images.pt", weights_only=True)
    assert all(label.startswith("game, ") for label in images["rows"])
    for picture in ("digits-ladder-silu-methods-smoke-0-steps-20.png", f"{stem}.latents.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_images_stand_beside_those_of_runs_alike(tmp_path, monkeypatch, capsys):
    drawn = []
    (tmp_path / "another.images.pt").write_bytes(b"half of a file")
    monkeypatch.setattr(mnist_hvae.tiles, "draw", lambda path, title, rows: drawn.append(rows))
    for method, steps, rate in (("elbo", 5, 1e-3), ("elbo", 6, 1e-3), ("game", 5, 2e-3)):
        arguments = f"--method {method} --steps {steps} --learning-rate {rate} --out {tmp_path}"
        identity = {"method": method, "steps": steps, "learning_rate": rate}
        rows = {f"{method} after {steps}": torch.zeros(1, 2, 2)}
        mnist_hvae.picture_images(parse(arguments.split()), identity, rows)
    assert [list(rows) for rows in drawn] == [
        ["elbo after 5"],
        ["elbo after 6"],
        ["game after 5", "elbo after 5"],
    ]
    assert f"Not drawn: Can't load {tmp_path / 'another.images.pt'}" in capsys.readouterr().out


def test_small_images_do_not_fit_the_networks_of_the_paper(capsys):
    with pytest.raises(SystemExit):
        parse(["--data", "digits", "--preset", "paper"])
    assert "--preset paper is for images of 28x28 pixels" in capsys.readouterr().err


def test_there_are_as_many_latents_as_asked_for():
    asked = judge()
    num_samples = len(asked.x) + 7
    for latents in (asked.prior(num_samples), asked.posterior(num_samples)):
        assert latents["z0"].shape == (num_samples, 30)


def test_reweighted_wake_sleep_shares_no_parameters(capsys):
    with pytest.raises(SystemExit):
        parse(["--method", "rws"])
    assert "rws needs --factorisation reverse" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--method elbo --last-word 0.1", "--last-word is for --method game"),
        ("--annealed 1.5", "expected a number from 0 to 1, got '1.5'"),
        ("--last-word x", "expected a number from 0 to 1, got 'x'"),
    ],
)
def test_schedules_that_cannot_be(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse(arguments.split())
    assert message in capsys.readouterr().err
