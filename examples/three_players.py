r"""Images with segmentations, learned as a game of three players: one segments, one paints, one encodes.

This is the experiment with faces of Flach, Schlesinger, Shekhovtsov (2024), section 5. The programs
of ``faces/programs.py`` are conditionals of images :math:`x`, segmentations :math:`s` and bits
:math:`z`. They are learned in phases, the last of which is the game of eq. 17. Then they are asked
for

- segmentations of held-out images by maximum marginal, of whole images and of such with a hidden
  square, and how many pixels are right,
- images whose appearance is another's (Fig. 3),
- reconstructions, and pairs drawn from the limiting distribution (Fig. 4),
- completions of images with a hidden square (Fig. 5).

With ``--method supervised`` the network that segments learns alone, as a yardstick. With
``--labelled 0.1`` masks of a tenth of the images are known.

Run ``python examples/three_players.py --help`` for the options.
"""

import argparse
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from cli import begun, ended_cleanly, parser, share

with ended_cleanly("three_players.py"):
    from data import DataError
    from faces.judging import Judge, accuracy, squares
    from faces.pairs import Pairs, Splits, load
    from faces.pictures import picture_appearances, picture_completions, picture_pairs
    from faces.training import METHODS, PRESETS, Settings, Training
    from long_runs import LongRun, RunError, add_options, run_path, write_record
    from pyro_symeq import GameLoss

NUM_LOOKED_AT = 64  # images that are segmented on the way
LOOK_ROUNDS = 20  # rounds of the chains that do it
NUM_SHOWN, NUM_ROWS = 8, 5  # images in a row of a picture, and appearances

Figures = dict[str, float]


class Questions:
    """What a training by some method is asked.

    Args:
        training: The training.
        splits: The data set.
        method: ``game`` or ``supervised``.
    """

    def __init__(self, training: Training, splits: Splits, method: str) -> None:
        self.splits = splits
        self.method = method
        self.programs = training.programs
        self.settings = training.settings

    def look(self, phase: str) -> Figures:
        """What is told on the way."""
        pairs = self.splits.held_out[:NUM_LOOKED_AT]
        if phase == "shapes":
            return {"shapes kept": Judge(self.programs).shapes_kept(pairs.s)}
        if phase == "appearance":
            return {}
        return {"accuracy": accuracy(self._segmented(pairs.x, None, LOOK_ROUNDS), pairs.s)}

    def figures(self) -> Figures:
        """What is told at the end."""
        training, held_out = self.splits.training, self.splits.held_out
        commonest = torch.full_like(held_out.s, int(training.s.flatten().mode().values))
        return {
            **self._accuracies("training", training[: self.settings.num_decided]),
            **self._accuracies("held-out", held_out),
            "accuracy/held-out, commonest class": accuracy(commonest, held_out.s),
        }

    def _accuracies(self, split: str, pairs: Pairs) -> Figures:
        visible = squares(len(pairs), self.splits.side).to(pairs.x.device)
        rounds = self.settings.decision_rounds
        return {
            f"accuracy/{split}": accuracy(self._segmented(pairs.x, None, rounds), pairs.s),
            f"accuracy/{split}, hidden squares": accuracy(
                self._segmented(pairs.x, visible, rounds), pairs.s
            ),
        }

    def _segmented(self, x: Tensor, visible: Tensor | None, num_rounds: int) -> Tensor:
        judge = Judge(self.programs)
        if self.method == "supervised":
            return judge.segmented_by_evidence(x, visible)
        return judge.segmented(x, visible, num_rounds).s


def identity(options: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """What a run depends on, by name."""
    names = ("data", "method", "labelled", "seed")
    return {name: getattr(options, name) for name in names} | asdict(settings)


def train(
    options: argparse.Namespace, settings: Settings, training: Training, questions: Questions
) -> list[LongRun[GameLoss]]:
    """Goes through the phases of a training, each of which has a checkpoint of its own."""
    runs: list[LongRun[GameLoss]] = []
    for phase in training.phases(options.method):
        path = stem(options, phase.name)
        run = LongRun(
            phase.game,
            phase.step,
            steps=phase.steps,
            identity=identity(options, settings),
            checkpoint=path.with_name(path.name + ".pt"),
            read=lambda loss: {
                f"u_{name}": value / settings.batch_size for name, value in loss.utilities.items()
            },
            look=partial(questions.look, phase.name),
            tensorboard=options.out / "tensorboard" / path.name if options.tensorboard else None,
        )
        if options.resume and (not runs or run.checkpoint.exists()):
            run.resume()
        run.train()
        # Loaded values go to the networks when a step or a loss first asks for them.
        phase.game.evaluate_loss(*phase.batch())
        runs.append(run)
    return runs


def picture(options: argparse.Namespace, judge: Judge, splits: Splits, settings: Settings) -> None:
    """Draws what the programs have learned."""
    training, held_out = splits.training[:NUM_SHOWN], splits.held_out[:NUM_SHOWN]
    appearances = splits.training[-NUM_ROWS:]
    picture_appearances(stem(options, "appearances.png"), judge, training, appearances)
    picture_pairs(stem(options, "pairs.png"), judge, training, settings.sample_rounds)
    picture_completions(
        stem(options, "completions.png"), judge, held_out, settings.decision_rounds
    )


def stem(options: argparse.Namespace, *more: str) -> Path:
    """The common beginning of the names of a run's files, and what follows it."""
    parts = "three-players", options.data, options.method, options.labelled, options.preset
    path = run_path(options, *parts, options.seed)
    return path.with_name("-".join((path.name, *more)))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the options of the program."""
    options = parser("Learns images with segmentations.", ("digits", "lfw", "celeba"))
    add_options(options, PRESETS)
    options.add_argument("--method", choices=METHODS, default="game", help="how to learn")
    options.add_argument(
        "--labelled",
        type=share,
        default=1.0,
        help="the part of the images with masks (default: 1)",
    )
    return options.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Trains the programs, and tells and draws what they have learned."""
    settings = begun(options, PRESETS[options.preset])
    splits = load(options.data, options.data_root, options.out).to(options.device)
    training = Training(splits, options.labelled, options.seed, settings)
    questions = Questions(training, splits, options.method)
    runs = train(options, settings, training, questions)

    pyro.set_rng_seed(options.seed)
    start = time.perf_counter()
    told = questions.figures()
    seconds = {run.checkpoint.stem.split("-")[-1]: run.seconds for run in runs}
    seconds["evaluation"] = time.perf_counter() - start
    write_record(
        stem(options).with_name(stem(options).name + ".json"),
        "three_players.py",
        settings=identity(options, settings),
        figures=told,
        seconds=seconds,
        device=options.device,
        history=runs[-1].history,
    )
    print()
    for what, value in told.items():
        print(f"{what:50} {value:10.4f}")
    for what, value in seconds.items():
        print(f"{what:50} {value:10.1f} s")
    if options.method == "game":
        picture(options, Judge(training.programs), splits, settings)


def main(arguments: list[str] | None = None) -> None:
    """Runs the program."""
    options = parse(arguments)
    with ended_cleanly("three_players.py", DataError, RunError), pyro.validation_enabled(False):
        run(options)


if __name__ == "__main__":
    main()
