"""The page of results is what its program makes of the records, and its verdicts follow from them."""

import json
import sys

import pytest

from tests.processes import EXAMPLES

sys.path.append(str(EXAMPLES))

from results_page import (  # noqa: E402
    DOCS,
    Claim,
    Record,
    RecordError,
    command,
    main,
    number,
    page,
    read,
    spread,
)


def content(program, settings, figures, **options):
    """What a run might leave."""
    return {
        "program": program,
        "command": f"python examples/{program} --seed 0 --out /tmp/runs --device cuda",
        "settings": {
            "seed": 0,
            "steps": 8000,
            "batch_size": 128,
            "learning_rate": 1e-3,
            "num_draws": 100,
        }
        | settings,
        "versions": {"python": "3.12", "torch": "2.11"},
        "hardware": {"device": "cpu", "machine": "x86_64", "cores": 2, "threads": 1},
        "seconds": {"training": 100.0, "evaluation": 20.0},
        "figures": figures,
        "history": [],
    } | options


def hierarchical(method, decoder, limiting, **settings):
    given = {"data": "mnist", "factorisation": "ladder", "net": "tanh", "method": method}
    figures = {
        "frechet[mnist-cnn]/decoder": decoder,
        "frechet[mnist-cnn]/limiting": limiting,
        "frechet[mnist-cnn]/floor": 1.0,
        "log-likelihood/100 draws": -90.0,
    }
    return content("mnist_hvae.py", given | settings, figures)


def labelled(accuracy, **options):
    space = "frechet[mnist-cnn]"
    figures = {
        "held-out accuracy": accuracy,
        **{f"{space}/{law}": 10.0 for law in ("decoder", "limiting", "floor")},
    }
    return content("mnist_labelled.py", {"data": "mnist"}, figures, **options)


def records(folder, *contents):
    for i, each in enumerate(contents):
        (folder / f"{i}.json").write_text(json.dumps(each))
    return read(folder)


def cells(text, title, row):
    """The cells of the first row of a section that begins so, by the heads of their columns."""
    lines = text.partition(f"## {title}\n")[2].split("\n")
    at = next(i for i, line in enumerate(lines) if line.startswith(f"| {row}"))
    head = max(i for i in range(at) if lines[i].startswith("| ---")) - 1
    names, values = (lines[i].strip("| ").split(" | ") for i in (head, at))
    return dict(zip(names, values, strict=True))


def test_the_page_is_made_of_the_records():
    assert (DOCS / "results.md").read_text(encoding="utf-8") == page(read(DOCS / "results"))


def test_the_program_writes_the_page(tmp_path):
    records(tmp_path, labelled(0.992))
    target = tmp_path / "page.md"
    main([str(tmp_path), str(target)])
    assert target.read_text(encoding="utf-8") == page(read(tmp_path))


@pytest.mark.parametrize(
    ("runs", "verdict"),
    [
        ([{"a": 1.0, "b": 2.0}], "holds"),
        ([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 2.0}], "holds for 1 of 2 seeds"),
        ([{"a": 3.0, "b": 2.0}], "doesn't hold"),
        ([{"a": 0.1, "b": 2.0}], "doesn't hold"),
        ([{"a": 1.0}], "not run"),
        ([], "not run"),
    ],
)
def test_verdicts(runs, verdict):
    assert Claim("", "a", "b", low=0.4, high=0.6).verdict(runs) == verdict


@pytest.mark.parametrize(
    ("bounds", "asked"),
    [
        ({"high": 107.7}, "at most 107.7"),
        ({"low": 99}, "at least 99"),
        ({"over": "b", "low": 0.4, "high": 2.5}, "ratio 0.4 to 2.5"),
    ],
)
def test_bounds_in_words(bounds, asked):
    assert Claim("", "a", **bounds).asked == asked


def test_ratios_are_of_the_same_seed(tmp_path):
    text = page(
        records(
            tmp_path,
            hierarchical("game", 10.0, 12.0, seed=0),
            hierarchical("game", 30.0, 90.0, seed=1),
            hierarchical("elbo", 40.0, 400.0, seed=0),
            hierarchical("elbo", 30.0, 300.0, seed=1),
            hierarchical("elbo", 1.0, 1.0, seed=2),
        )
    )
    found = cells(text, "MNIST, ladder", "The game's decoder distance")
    assert found["published"] == "0.512, holds"
    assert found["laptop, tanh"] == "0.625 (0.25 to 1), holds for 1 of 2 seeds"
    assert found["paper"] == "not run"
    found = cells(text, "MNIST, ladder", "game's limiting distance")
    assert found["laptop, tanh"] == "51 (12 to 90)"
    assert cells(text, "MNIST, ladder", "features")["laptop, tanh"] == "`frechet[mnist-cnn]`"


def test_a_claim_on_two_methods_needs_both(tmp_path):
    text = page(records(tmp_path, hierarchical("game", 10.0, 12.0)))
    claim = cells(text, "MNIST, ladder", "The game's decoder distance")
    assert claim["laptop, tanh"] == "not run"
    assert cells(text, "MNIST, ladder", "ELBO's decoder distance")["laptop, tanh"] == "–"
    missing = text.partition("## What has not been run")[2].partition("\n## ")[0]
    assert "- MNIST, ladder; laptop, tanh: The game's decoder distance is half of" in missing
    assert "The game's limiting distance is near to" not in missing


def test_a_preset_with_other_steps_has_not_been_run(tmp_path):
    command = "python examples/mnist_labelled.py --steps 20"
    text = page(records(tmp_path, labelled(0.99, command=command)))
    missing = text.partition("## What has not been run")[2]
    assert "- MNIST with labels: laptop, paper\n" in missing
    assert "python examples/mnist_labelled.py --preset laptop --data mnist\n" in missing


def test_likelihoods_of_what_was_learned_are_named_so(tmp_path):
    text = page(records(tmp_path, hierarchical("game", 10.0, 12.0, learns_all=True)))
    name = "game's log-likelihood, of images learned from (nats)"
    assert cells(text, "MNIST, ladder", name)["laptop, tanh"] == "-90"
    assert "| game's log-likelihood (nats)" not in text


def test_bounds_are_the_same_for_all_data(tmp_path):
    text = page(records(tmp_path, labelled(0.99)))
    row = "The game's decoder distance is half of ELBO's or less: ratio at most 0.55"
    published = {"MNIST, ladder": "0.512, holds", "Fashion-MNIST, ladder": "1.15, doesn't hold"}
    assert published == {title: cells(text, title, row)["published"] for title in published}


def test_the_summary_counts_what_holds_and_lists_what_does_not(tmp_path):
    good, bad = labelled(0.995), labelled(0.95, command="python x.py --preset paper")
    text = page(records(tmp_path, good, bad, hierarchical("game", 10.0, 30.0)))
    holding, _, rest = text.partition("## Where we fall short")
    short, _, rest = rest.partition("## What has not been run")
    missing = rest.partition("\n## ")[0]
    assert "| MNIST with labels | laptop | 2 of 2 |" in holding
    assert "| MNIST with labels | paper | 1 of 2 |" in holding
    assert "| MNIST, ladder | laptop, tanh | 0 of 1 |" in holding  # the others need ELBO's run
    name = "An encoder that learns from dreams classifies (%)"
    assert f"| {name} | MNIST with labels | paper | at least 99 | 95, doesn't hold |" in short
    assert "MNIST with labels | laptop" not in short
    assert "MNIST with labels" not in missing
    assert "- MNIST, ladder: paper" in missing


def test_where_all_holds_the_summary_says_so(tmp_path):
    text = page(records(tmp_path, labelled(0.995)))
    assert "## Where we fall short\n\nNowhere.\n" in text


def test_likelihoods_and_implicit_priors(tmp_path):
    figures = {
        "test NLL (nats)": 104.2,
        "its standard error (nats)": 0.3,
        "number of draws K": 1000,
    }
    settings = {"binarisation": "static", "network": "linear"}
    errors = {"nothing": 0.5, "the game": 0.11, "true instrument": 0.1, "first guess of it": 0.2}
    held_out = {"held out": {name: {"wrong pixels": x} for name, x in errors.items()}}
    text = page(
        records(
            tmp_path,
            content("mnist_nll.py", settings, figures),
            content("implicit_prior.py", {"data": "codes"}, held_out),
        )
    )
    title = "MNIST, likelihood of two linear layers"
    assert cells(text, title, "NLL is as low as wake-sleep's")["laptop"] == "104.2, holds"
    assert cells(text, title, "NLL is as low as NVIL's")["laptop"] == "104.2, doesn't hold"
    assert cells(text, title, "number of draws")["laptop"] == "1,000"
    found = cells(text, "Codes of another generator as prior", "error with the game")
    assert found == {"figure": "error with the game", "published": "–", "laptop": "0.11"}


def test_runs_tell_where_and_how(tmp_path):
    (record,) = records(tmp_path, labelled(0.99))
    text = page([record])
    assert "On cpu (x86_64, 2 cores, threads: 1), python 3.12, torch 2.11:" in text
    assert "| MNIST with labels; laptop; game | 0 | 8,000 of 128 | 0.001 | 120 |" in text
    assert command(record) == "python examples/mnist_labelled.py"


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ("--seed=3 --out=/a --net silu --resume", " --net silu"),
        ("--data-root /a --tensorboard --device cuda:1 --preset paper", " --preset paper"),
    ],
)
def test_commands_without_a_machine(tmp_path, options, kept):
    (record,) = records(tmp_path, labelled(0.99, command=f"python x.py {options}"))
    assert command(record) == f"python x.py{kept}"


def test_numbers():
    assert [number(x) for x in (0.0914, 4.10, 119.0, 107.74, 1000)] == [
        "0.0914",
        "4.1",
        "119",
        "107.7",
        "1,000",
    ]
    assert spread([1.0, 3.0]) == "2 (1 to 3)"
    assert spread([2.0]) == "2"


def test_a_record_that_lacks_a_figure(tmp_path):
    run = hierarchical("game", 10.0, 12.0)
    del run["figures"]["frechet[mnist-cnn]/floor"]
    with pytest.raises(RecordError, match=r"0.json has no 'figures/frechet\[mnist-cnn\]/floor'"):
        page(records(tmp_path, run))


@pytest.mark.parametrize("key", ["program", "command", "settings", "versions", "hardware"])
def test_a_record_that_lacks_a_part(tmp_path, key):
    run = labelled(0.99)
    del run[key]
    with pytest.raises(RecordError, match=f"0.json has no '{key}'. Run its program again"):
        page(records(tmp_path, run))


def test_each_method_may_have_a_learning_rate_of_its_own(tmp_path):
    runs = [
        hierarchical("game", 10.0, 12.0, learning_rate=4e-3),
        hierarchical("elbo", 30.0, 30.0, learning_rate=2e-3),
    ]
    text = page(records(tmp_path, *runs))
    rates = [
        cells(text, "Runs", f"MNIST, ladder; laptop, tanh; {method}")["learning rate"]
        for method in ("game", "ELBO")
    ]
    assert rates == ["0.004", "0.002"]
    assert "| MNIST, ladder | laptop, tanh | 3 of 4 |" in text


def test_runs_whose_schedule_was_asked_for_are_a_setting_of_their_own(tmp_path):
    command = "python examples/mnist_hvae.py --steps 16000 --annealed"
    runs = [
        hierarchical("game", 10.0, 12.0, annealed=1.0),
        hierarchical("game", 20.0, 12.0, annealed=0.2, steps=16_000)
        | {"command": f"{command}=0.2"},
        hierarchical("game", 30.0, 12.0, annealed=0.0, steps=16_000) | {"command": f"{command} 0"},
    ]
    row = cells(page(records(tmp_path, *runs)), "MNIST, ladder", "game's decoder distance")
    assert row["laptop, tanh"] == "10"
    assert row["laptop, tanh, 16,000 steps, annealed 0.2"] == "20"
    assert row["laptop, tanh, 16,000 steps, constant rate"] == "30"


def test_runs_on_warped_images_are_a_setting_of_their_own(tmp_path):
    command = "python examples/mnist_labelled.py --warp 0.06"
    runs = [labelled(0.981), labelled(0.992) | {"command": command}]
    row = cells(page(records(tmp_path, *runs)), "MNIST with labels", "accuracy (%)")
    assert (row["laptop"], row["laptop, images warped by 0.06"]) == ("98.1", "99.2")


def test_a_setting_that_older_records_lack_counts_as_off(tmp_path):
    older, newer, warped = labelled(0.97), labelled(0.99), labelled(0.99)
    newer["settings"] |= {"seed": 1, "warp": 0.0}
    warped["settings"] |= {"seed": 2, "warp": 0.1}
    row = cells(page(records(tmp_path, older, newer)), "MNIST with labels", "accuracy (%)")
    assert row["laptop"] == "98 (97 to 99)"
    with pytest.raises(RecordError, match="2.json and 0.json differ in warp"):
        page(records(tmp_path, older, newer, warped))


def test_what_only_a_game_depends_on(tmp_path):
    game = hierarchical("game", 10.0, 12.0, encoder_steps=2, num_proposals=4)
    others = [
        hierarchical("elbo", 30.0, 30.0, encoder_steps=2),
        hierarchical("elbo", 40.0, 40.0, encoder_steps=2, num_proposals=4, seed=1),
    ]
    text = page(records(tmp_path, game, *others))
    row = cells(text, "MNIST, ladder", "ELBO's decoder distance")
    assert row["laptop, tanh"] == "35 (30 to 40)"
    assert cells(text, "MNIST, ladder", "game's encoder moves in a step")["laptop, tanh"] == "2"
    assert cells(text, "MNIST, ladder", "game's proposals")["laptop, tanh"] == "4"
    assert "ELBO's proposals" not in text
    another = hierarchical("game", 10.0, 12.0, encoder_steps=2, num_proposals=1, seed=1)
    with pytest.raises(RecordError, match="differ in num_proposals"):
        page(records(tmp_path, game, *others, another))


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_a_folder_without_results_leaves_the_page(tmp_path, folder):
    target = tmp_path / "page.md"
    target.write_text("as it was")
    with pytest.raises(SystemExit, match="There is no JSON file in"):
        main([str(tmp_path / folder), str(target)])
    assert target.read_text() == "as it was"


def test_too_many_arguments():
    with pytest.raises(SystemExit, match="Usage"):
        main(["a", "b", "c"])


def test_files_that_are_no_records(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(SystemExit, match="results_page.py: a.json is no JSON file"):
        main([str(tmp_path), str(tmp_path / "page.md")])
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(RecordError, match="a.json has no 'settings'"):
        page([Record(tmp_path / "a.json")])


def test_records_that_do_not_go_together(tmp_path):
    run = hierarchical("game", 10.0, 12.0)
    with pytest.raises(RecordError, match="1.json repeats 0.json"):
        page(records(tmp_path, run, run))
    with pytest.raises(RecordError, match="1.json and 0.json differ in steps"):
        page(records(tmp_path, run, hierarchical("elbo", 10.0, 12.0, steps=5)))
    with pytest.raises(RecordError, match="1.json and 0.json differ in learning_rate"):
        page(records(tmp_path, run, hierarchical("game", 9.0, 9.0, learning_rate=1.0, seed=1)))
    with pytest.raises(RecordError, match="0.json is of no experiment on the page"):
        page(records(tmp_path, hierarchical("game", 10.0, 12.0, data="digits")))
