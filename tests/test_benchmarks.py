"""The benchmarks: all rivals play, two of them the same game, and the figures are worked out."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import charts  # noqa: E402
import contest  # noqa: E402
import steps  # noqa: E402
from results import Comparison, Results, Setting, cost_per_site  # noqa: E402
from rivals import RIVALS  # noqa: E402
from tables import table  # noqa: E402
from timing import in_turn  # noqa: E402
from tracing import trace  # noqa: E402

SETTINGS = {
    "dense": Setting("dense", batch_size=8),
    "conv": Setting("conv", batch_size=4),
    "chain": Setting("chain", batch_size=8, num_sites=4),
}
each_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())


@pytest.fixture(autouse=True)
def same_threads():
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def train(rival, setting, num_steps=5):
    """The pair after a few steps, and what the last of them returned."""
    pair = contest.make_pair(rival, setting)
    step = RIVALS[rival].start(pair, setting.num_particles)
    torch.manual_seed(1)
    x = torch.rand(setting.batch_size, pair.num_pixels, device=setting.device).round()
    for _ in range(num_steps):
        result = step(x)
    return pair, result


def train_alike(rival, setting):
    """Compares a rival with the loop by hand, which draws the same numbers in the same order."""
    by_hand, losses = train("hand", setting)
    pair, loss = train(rival, setting)
    assert (-loss.decoder, -loss.encoder) == pytest.approx(losses, rel=1e-9)
    for ours, theirs in zip(pair.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rival", sorted({"symeq", "capture"} & RIVALS.keys()))
@each_setting
def test_by_hand_is_the_same_game(rival, setting):
    train_alike(rival, setting)


def test_by_hand_is_the_same_game_with_several_particles():
    train_alike("symeq", replace(SETTINGS["dense"], num_particles=3))


@pytest.mark.parametrize("rival", RIVALS)
@each_setting
def test_every_rival_moves_all_parameters(rival, setting, device):
    setting = replace(setting, device=device.type)
    before = contest.make_pair(rival, setting)
    after, _ = train(rival, setting)
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        assert not torch.equal(old, new)
        assert new.isfinite().all()


def test_numbers_of_parameters():
    pair = contest.make_pair("hand", SETTINGS["conv"])
    numbers = [sum(p.numel() for p in part.parameters()) for part in (pair.encoder, pair.decoder)]
    assert numbers == pytest.approx([2.2e6, 0.8e6], rel=0.02)


def test_all_start_alike():
    pairs = [contest.make_pair(name, SETTINGS["dense"]) for name in ("hand", "svi")]
    for first, second in zip(*(pair.parameters() for pair in pairs), strict=True):
        assert torch.equal(first, second)


COMPARISON = Comparison(
    "dense",
    Setting("dense"),
    {"hand": [1e-3, 2e-3, 9e-3], "symeq": [3e-3, 4e-3, 10e-3]},
    {"hand": 100.0, "symeq": 150.0},
)


def test_ratios_are_of_rounds():
    # In rounds, 3, 2 and 10/9 times as long, and 2, 2 and 1 ms longer.
    assert COMPARISON.median("symeq") == 4e-3
    assert COMPARISON.ratio("symeq") == pytest.approx(2)
    assert COMPARISON.excess("symeq") == pytest.approx(2e-3)
    assert COMPARISON.peak_ratio("symeq") == 1.5
    assert COMPARISON.ratio("hand") == 1


def of_chain(num_sites):
    # Both have 1 ms that no site causes, and 0.1 and 0.4 ms for each site.
    seconds = {"hand": 1e-3 + 1e-4 * num_sites, "symeq": 1e-3 + 4e-4 * num_sites}
    times = {name: [time, time] for name, time in seconds.items()}
    return Comparison("chain", Setting("chain", num_sites=num_sites), times)


def test_cost_of_a_site():
    assert cost_per_site([of_chain(n) for n in (2, 4, 8)], "symeq") == pytest.approx(3e-4)


def test_tables():
    title, head, by_hand, symeq = table([COMPARISON]).splitlines()
    assert title == "dense, batch_size=128, 3 rounds"
    assert head.split() == ["ms", "ratio", "MiB", "ratio"]
    assert by_hand.split()[-4:] == ["2.00", "1.00", "100", "1.00"]
    assert symeq.split()[-4:] == ["4.00", "2.00", "150", "1.50"]
    lines = table([of_chain(2), of_chain(4)]).splitlines()
    assert lines[1].split() == ["num_sites", "hand", "ms", "ratio", "symeq", "ms", "ratio"]
    assert lines[2].split() == ["2", "1.20", "1.00", "1.80", "1.50"]
    assert lines[-1].split() == ["symeq", "300", "µs"]


def test_results_are_read_as_they_were_written(tmp_path):
    results = Results({"torch": "2"}, [COMPARISON, of_chain(2)])
    results.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json") == results


def test_all_have_their_turns():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = in_turn(steps, seconds=0, block=2, wait=lambda: calls.append("wait"))
    assert {name: len(values) for name, values in times.items()} == {"a": 5, "b": 5, "c": 5}
    turns = [calls[i : i + 4] for i in range(0, len(calls), 4)]
    assert all(turn == ["wait", turn[1], turn[1], "wait"] for turn in turns)
    rounds = ["".join(turn[1] for turn in turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1


def test_memory_is_that_of_a_process_of_its_own():
    ballast = torch.ones(2**27)  # 1 GiB
    settings = [SETTINGS["dense"]]
    (comparison,) = contest.compare("dense", ["hand"], settings, 0, with_memory=True)
    assert 50 < comparison.peaks["hand"] < 1024 * ballast[0].item()


def test_trace(tmp_path):
    waits = trace(lambda: torch.ones(()).item(), tmp_path / "trace.json", num_steps=3)
    assert waits["aten::item"] == 1
    assert waits["Memcpy DtoH"] == 0
    assert "training step" in (tmp_path / "trace.json").read_text()


def test_program(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steps, "SECONDS", dict.fromkeys(steps.EXPERIMENTS, 0.0))
    path, picture = tmp_path / "steps.json", tmp_path / "steps.png"
    options = ["--batch-size", "2", "--json", str(path), "--figure", str(picture)]
    steps.main(["--only", "chain", "particles", *options])
    output = capsys.readouterr().out
    assert f"torch {torch.__version__}" in output
    assert "each further site costs" in output
    results = Results.read(path)
    assert [c.setting.num_sites for c in results.experiments()["chain"]] == [2, 4, 8, 16, 32]
    assert [c.setting.num_particles for c in results.experiments()["particles"]] == [1, 4]
    assert {c.setting.batch_size for c in results.comparisons} == {2}
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("comparisons", [[COMPARISON], [COMPARISON, of_chain(2), of_chain(4)]])
def test_pictures(tmp_path, comparisons):
    charts.draw(Results({"torch": "2"}, comparisons), tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_traced_program(tmp_path, capsys):
    path = tmp_path / "trace.json"
    steps.main(["--trace", str(path), "--traced", "hand", "--batch-size", "2"])
    assert "aten::item" in capsys.readouterr().out
    assert path.exists()


def test_options():
    options = steps.parse([])
    assert options.only == list(steps.EXPERIMENTS)
    assert next(steps.plan("conv", options)) == Setting("conv", batch_size=128)
    options.device = "cuda"
    assert next(steps.plan("conv", options)).batch_size == 1024
    options = steps.parse(["--full", "--validation", "--only", "batches"])
    settings = list(steps.plan(*options.only, options))
    assert [setting.batch_size for setting in settings] == [64, 128, 256, 512, 1024, 2048, 4096]
    assert all(setting.validation for setting in settings)
    assert "compile" in steps.contestants("dense", options)
    assert "compile" not in steps.contestants("chain", options)
    options = steps.parse(["--rivals", "compile", "hand", "svi", "--no-memory"])
    assert steps.contestants("chain", options) == ["hand", "compile", "svi"]
    assert not options.memory


@pytest.mark.parametrize("precision", steps.PRECISIONS)
def test_precision_is_that_of_the_steps_alone(precision):
    setting = replace(SETTINGS["dense"], batch_size=2, precision=precision)
    step = contest.contestant("hand", setting)
    before = torch.get_float32_matmul_precision()
    with contest.running(setting):
        step()
        within = torch.get_float32_matmul_precision()
    assert within == ("highest" if precision == "single" else "high")
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "sparse"], "argument --only: invalid choice: 'sparse'"),
        (["--batch-size", "0"], "--batch-size: expected a number of at least 1, got '0'"),
        (["--device", "abacus"], "argument --device: invalid choice: 'abacus'"),
        (["--traced", "nuts"], "argument --traced: invalid choice: 'nuts'"),
    ],
)
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit):
        steps.parse(options)
    assert message in capsys.readouterr().err
