"""The benchmark of architectures: all of them learn by all methods, and figures are worked out."""

import itertools
import sys
import warnings
from functools import partial
from pathlib import Path

import pyro
import pytest
import torch
from pyro import poutine
from torch.nn import functional

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "examples")]

import architectures  # noqa: E402
import robustness  # noqa: E402
import runs  # noqa: E402
from architectures import ARCHITECTURES, QUICK, Architecture, Stack  # noqa: E402
from data import DataError  # noqa: E402
from learners import METHODS  # noqa: E402
from pyro_symeq.metrics import log_likelihood  # noqa: E402
from reports import report  # noqa: E402
from runs import Diary, Record, Run, perform, read, remaining, write  # noqa: E402
from verdicts import Share, Verdicts  # noqa: E402

SIDE = 8


def test_every_property_occurs_with_relu():
    assert len(ARCHITECTURES) == 24
    assert {a.activation for a in ARCHITECTURES.values()} == architectures.ACTIVATIONS.keys()
    relu = [vars(a) for a in ARCHITECTURES.values() if a.activation == "relu"]
    for name, values in {
        "net": {"dense", "conv"},
        "norm": {"none", "batch", "layer"},
        "centred": {False, True},
        "latent": {"binary", "categorical", "gaussian"},
        "num_layers": {2, 3, 4},
        "observation": {"bernoulli", "gaussian"},
    }.items():
        assert {a[name] for a in relu} == values


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_method_learns(architecture, monkeypatch):
    monkeypatch.setattr(runs, "BATCH_SIZE", 4)
    monkeypatch.setattr(runs, "NUM_IMAGES_OF_BITS", 6)
    monkeypatch.setattr(runs, "NUM_DRAWS_OF_BITS", 2)
    monkeypatch.setattr(runs, "NUM_IMAGES", 3)
    monkeypatch.setattr(runs, "NUM_DRAWS", 2)
    monkeypatch.setattr(runs, "OFTEN", 1)
    layers = ARCHITECTURES[architecture].num_layers
    for method in METHODS:
        record = perform(Run("digits", architecture, method, 0, 1), Path())
        assert (record.error, record.warnings) == (None, [])
        assert list(record.bits) == [f"z{number}" for number in range(layers)]
        assert [step for step, _ in record.history] == [1]
        numbers = [record.likelihood, record.decoder, record.encoder, record.total]
        assert torch.tensor(numbers).isfinite().all()


@pytest.mark.parametrize("side", [8, 28])
@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_draws_may_have_a_plate_of_their_own(architecture, side):
    pair = Stack(architecture, side).eval()
    x = torch.rand(3, side**2).round()
    with pyro.plate("draws", 2, dim=-2):
        q = poutine.trace(pair.guide).get_trace(x)
        p = poutine.trace(poutine.replay(pair.model, q)).get_trace(x)
    p.compute_log_prob()
    assert p.nodes["x"]["log_prob"].shape == (2, 3)


SMALL = {
    "binary": (Architecture(), (2, 3)),
    "centred": (Architecture("conv", centred=True, norm="batch"), (2, 3)),
    "categorical": (Architecture("conv", "silu", latent="categorical"), (1, 1)),
    "three layers": (Architecture(activation="tanh", norm="layer", num_layers=3), (1, 2, 1)),
}


@pytest.fixture(params=SMALL.values(), ids=SMALL.keys())
def small(request, monkeypatch):
    """A pair with few latents, an image, and all values of the latents."""
    a, sizes = request.param
    monkeypatch.setitem(architectures.SIZES[SIDE], (a.latent, a.num_layers), sizes)
    pair = Stack(a, SIDE).eval()
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.mul_(2)
    one = torch.eye(8) if a.latent == "categorical" else torch.tensor([0.0, 1.0])
    values = [torch.stack(rows) for rows in itertools.product(one, repeat=sum(sizes))]
    z = {f"z{i}": part for i, part in enumerate(torch.stack(values).split(sizes, 1))}
    return pair, torch.rand(1, SIDE**2).round(), z


def log_prob(program, x, z):
    """The log-probabilities of its latents at given values, and of its observation if any."""
    num_rows = len(z["z0"])
    trace = poutine.trace(poutine.condition(program, z)).get_trace(x.expand(num_rows, -1))
    trace.compute_log_prob()
    sites = {name: site for name, site in trace.nodes.items() if name in (*z, "x")}
    return {name: site["log_prob"] for name, site in sites.items()}


def test_programs_are_normalised(small):
    pair, x, z = small
    p, q = log_prob(pair.model, x, z), log_prob(pair.guide, x, z)
    for terms in (p, q):
        total = sum(terms[name] for name in z).logsumexp(0)
        torch.testing.assert_close(total, torch.zeros(()))


def test_likelihood_agrees_with_enumeration(small):
    # For a mean of K weights w with mean p(x), the logarithm has a standard deviation of about
    # (E[w^2] / p(x)^2 - 1)^(1/2) / K^(1/2). Of a million runs, seven fail by chance.
    pair, x, z = small
    log_p = sum(log_prob(pair.model, x, z).values())
    log_q = sum(log_prob(pair.guide, x, z).values())
    exact = log_p.logsumexp(0)
    variance = (2 * (log_p - exact) - log_q).logsumexp(0).expm1()
    num_draws = 10_000
    found = log_likelihood(pair.model, pair.guide, x, num_draws=num_draws)
    assert (found.values - exact).abs() < 4.5 * (variance / num_draws).sqrt()


def test_programs_agree_with_formulas():
    pair = Stack(Architecture(centred=True, num_layers=3), SIDE)
    x = torch.rand(5, SIDE**2).round()
    z = {f"z{i}": torch.rand(5, n).round() for i, n in enumerate((10, 20, 40))}
    z0, z1, z2 = z.values()
    to_z1, to_z2 = pair.decoder.nets
    h = [torch.zeros(5, 10), to_z1(2 * z0 - 1), to_z2(2 * z1 - 1)]
    f = pair.encoder.features(2 * x - 1)
    for name, expected in {
        "x": (pair.decoder.last(2 * z2 - 1), x),
        "z0": (h[0], z0),
        "z1": (h[1], z1),
        "z2": (h[2], z2),
    }.items():
        torch.testing.assert_close(log_prob(pair.model, x, z)[name], bernoulli(*expected))
    for name, logits, head in zip(z, h, pair.encoder.heads, strict=True):
        q = bernoulli(logits + head(f), z[name])
        torch.testing.assert_close(log_prob(pair.guide, x, z)[name], q)


def bernoulli(logits, x):
    return -functional.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)


def test_gaussian_programs_agree_with_formulas():
    pair = Stack(Architecture(latent="gaussian", observation="gaussian"), SIDE)
    x = torch.rand(5, SIDE**2)
    z0, z1 = torch.randn(5, 5), torch.randn(5, 15)
    z = {"z0": z0, "z1": z1}
    p, q = log_prob(pair.model, x, z), log_prob(pair.guide, x, z)
    (to_z1,) = pair.decoder.nets
    torch.testing.assert_close(p["z0"], normal(z0, torch.zeros(()), 1.0))
    torch.testing.assert_close(p["z1"], normal(z1, to_z1(z0), 1.0))
    torch.testing.assert_close(p["x"], normal(x, pair.decoder.last(z1), 0.3))
    loc, log_scale = pair.encoder.heads[1](pair.encoder.features(x)).chunk(2, -1)
    torch.testing.assert_close(q["z1"], normal(z1, to_z1(z0) + loc, log_scale.exp()))


def normal(x, loc, scale):
    return torch.distributions.Normal(loc, scale).log_prob(x).sum(-1)


def test_notes_leave_no_trace():
    pair = Stack(ARCHITECTURES["conv-relu-batch"], SIDE)
    x = torch.rand(4, SIDE**2).round()
    pair.guide(x)
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    generator = torch.get_rng_state()
    diary = Diary(pair)
    diary.note(50, x, [])
    assert [step for step, _ in diary.history] == [50]
    assert torch.equal(torch.get_rng_state(), generator)
    assert pair.training
    for name, value in pair.state_dict().items():
        assert torch.equal(value, before[name])


def test_warnings_are_noted():
    messages = ["Beware.\nOf what?", "z1 says hardly anything about the data.", "Beware."]
    diary = Diary(Stack(ARCHITECTURES["dense-relu"], SIDE))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number, message in enumerate(messages, start=1):
            diary.step(partial(warnings.warn, stacklevel=2), message)
            diary.note(number, None, caught)
    assert (diary.warned, diary.warnings) == (2, ["Beware."])


def test_errors_are_noted(monkeypatch):
    def fail(x):
        raise ValueError("no\nmore")

    monkeypatch.setitem(METHODS, "game", lambda pair, architecture: fail)
    run = Run("digits", "dense-relu", "game", 0, 1)
    record = perform(run, Path())
    assert (record.run, record.error, record.bits) == (run, "ValueError: no", {})


def test_missing_data_are_an_error(tmp_path):
    with pytest.raises(DataError, match="train-images"):
        perform(Run("mnist", "dense-relu", "game", 0, 1), tmp_path)


def record(method, architecture="a", seed=0, bits=30.0, nats=-100.0, **others):
    others = {"seconds": 10.0, "likelihood": nats, "bits": {"z0": 1.0, "z1": bits - 1}} | others
    return Record(Run("mnist", architecture, method, seed, 3000), **others)


RECORDS = [
    record("game", "a", 0, warned=400, history=[(500, 3.0), (1000, 25.0)]),
    record("game", "a", 1, bits=25.0, nats=-104.0, seconds=20.0),
    record("cure", "a", 0, bits=35.0, nats=-101.5, seconds=11.0),
    record("cure", "a", 1, bits=40.0, nats=-103.5, seconds=20.0),
    record("game", "b", 0, bits=2.0, nats=-200.0, warned=500, history=[(1000, 4.9), (1500, 9.0)]),
    record("game", "b", 1, bits=2.0, nats=-200.0, warned=600, history=[(600, 0.0)]),
    record("cure", "b", 0, bits=30.0, nats=-120.0),
    record("cure", "b", 1, bits=10.0, nats=-121.0),
    record("game", "c", 0, nats=-110.0, bits=19.0, history=[(1000, 5.1)]),  # has lost bits
    record("cure", "c", 0, nats=-105.0),
    Record(Run("mnist", "a", "svi", 0, 3000), seconds=1.0, error="ValueError: no"),
]


def test_verdicts():
    verdicts = Verdicts(RECORDS)
    assert verdicts.bits("cure", "a") == 35
    assert verdicts.likelihood("game", "a") == -102
    assert verdicts.ratio("cure", "a") == pytest.approx(1.05)  # of 1.1 and 1
    assert verdicts.ratio("svi", "a") is None
    assert verdicts.num_carrying("game") == Share(1, 3)
    assert verdicts.num_carrying("cure") == Share(2, 3)  # not b, for a seed
    assert verdicts.num_carrying("svi") == Share(0, 1)
    assert verdicts.warned(verdicts.stuck) == Share(1, 2)  # b twice, of which once too late
    assert verdicts.warned(lambda game: not verdicts.stuck(game)) == Share(1, 3)
    assert verdicts.warned(verdicts.is_poor) == Share(1, 3)
    nats, worst = verdicts.worst_loss()
    assert (nats, worst.run.architecture, worst.run.seed) == (1.5, "a", 0)


def test_report():
    lines = report(RECORDS).splitlines()
    assert lines[0] == "mnist, 3000 steps"
    assert [line.split() for line in lines[2:6]] == [
        "game bits nats time cure bits nats time svi bits nats time".split(),
        "a 25.0 -102.0 1.00 35.0 -102.5 1.05 1 failed, - - -".split(),
        "b 2.0* -200.0 1.00 10.0* -120.5 1.00 - - -".split(),
        "c 19.0* -110.0 1.00 30.0 -105.0 1.00 - - -".split(),
    ]
    assert len({len(line) for line in lines[2:6]}) == 1
    assert "game: 1 of 3 (33%) architectures carry information" in lines
    warned = [line.split(" that ")[1] for line in lines if line.startswith("warned within")]
    assert warned == [
        "were stuck after 1,000 steps: 1 of 2 (50%)",
        "weren't: 1 of 3 (33%)",
        "carry no information in the end: 1 of 3 (33%)",
    ]
    assert lines[-1] == "the cure's worst loss against the game: 1.5 nats (a, seed 0)"


def test_reports_of_less():
    svi = [r for r in RECORDS if r.run.method == "svi"]
    assert report(svi).splitlines()[-1] == "svi: 0 of 1 (0%) architectures carry information"
    digits = Record(Run("digits", "a", "game", 0, 10), {"z0": 9.0}, seconds=1.0)
    assert report([digits, *svi]).count("steps\n") == 2
    assert report([]) == ""


def test_records_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "results.jsonl"
    assert read(path) == []
    records = [record("game", history=[(50, 0.1), (100, 3.0)]), *RECORDS]
    for each in records:
        write(path, each)
    assert read(path) == records


def test_runs_are_not_repeated():
    new = Run("mnist", "b", "svi", 0, 3000)
    assert remaining([RECORDS[0].run, new, new, RECORDS[-1].run], RECORDS) == [new]


def test_seeds_come_one_after_the_other_and_the_game_first():
    plan = list(robustness.plan(robustness.parse([])))
    assert len(plan) == len(set(plan)) == 24 * 4 * 3
    assert [run.seed for run in plan] == [0] * 96 + [1] * 96 + [2] * 96
    assert [run.method for run in plan[:96]] == ["game", "cure"] * 24 + ["svi", "rws"] * 24
    quick = list(robustness.plan(robustness.parse(["--quick"])))
    assert {(run.architecture, run.method) for run in quick} == {
        (name, method) for name in QUICK for method in ("game", "cure")
    }
    assert {run.steps for run in quick} == {600}


def test_program(tmp_path, capfd, monkeypatch):
    path = tmp_path / "results.jsonl"
    options = ["--data", "digits", "--steps", "2", "--seeds", "0", "--json", str(path)]
    options += ["--architectures", "dense-relu", "--jobs", "1", "--methods", "game"]
    robustness.main(options)
    output = capfd.readouterr().out
    assert "1/1  dense-relu game 0: z0 " in output
    assert "digits, 2 steps" in output
    (first,) = read(path)
    monkeypatch.setattr(robustness, "perform", None)  # nothing is left to run
    robustness.main(options)
    robustness.main([*options, "--report"])
    assert read(path) == [first]
    assert capfd.readouterr().out.count("game: 0 of 1") == 2


def test_failed_runs_are_repeated_if_asked_for(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    run = Run("digits", "dense-relu", "game", 0, 1)
    write(path, Record(run, error="ValueError: no"))
    asked = []
    monkeypatch.setattr(robustness, "remaining", lambda runs, done: asked.append(done) or [])
    options = ["--json", str(path)]
    robustness.main(options)
    robustness.main([*options, "--retry"])
    assert [len(done) for done in asked] == [1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "luck"], "argument --methods: invalid choice: 'luck'"),
        (["--architectures", "gothic"], "argument --architectures: invalid choice: 'gothic'"),
        (["--jobs", "0"], "--jobs: expected a number of at least 1, got '0'"),
    ],
)
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit):
        robustness.parse(options)
    assert message in capsys.readouterr().err
