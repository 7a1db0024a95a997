r"""A hierarchical VAE of MNIST or Fashion-MNIST, learned as a game or by its ELBO.

This is the first experiment of Flach, Schlesinger, Shekhovtsov (2024). The pair of ``hvae.py`` is
learned by one of several methods, from the same initial parameters, in the same number of steps of
the same optimiser, at a learning rate that suits the method. Then its decoder is asked for images,
and so is the limiting distribution of decoder and encoder. Both are compared with images that were
held out, by the Fréchet distance in the features of a classifier. In a consistent pair, the two
distances are alike.

Each run leaves a JSON file of all figures, a picture of images, one of its latents, and a
checkpoint. Once there are runs of the game and of the ELBO in one folder that differ in nothing but
what is a method's own, as its learning rate, a picture shows them side by side.

Run ``python examples/mnist_hvae.py --help`` for the options.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor

from cli import add_precision, amount, begun, ended_cleanly, parser, part

with ended_cleanly("mnist_hvae.py"):
    import embeddings
    import tiles
    from data import DataError, load
    from elbo import DarnBernoulli, elbo
    from features import feature_space
    from hvae import DEEP, FACTORISATIONS, STYLES, Size
    from judge import LAYERS, Judge, Latents
    from long_runs import LongRun, RunError, add_options, run_path, write_record
    from pyro_symeq import (
        Game,
        GameLoss,
        Player,
        SymmetricEquilibrium,
        SymmetricUtility,
        checkpoint,
    )
    from results_page import OF_GAMES
    from reweighted import Reweighted
    from training import cosine, in_turn

DATA = ("mnist", "fashion", "digits")
METHODS = ("game", "elbo", "rws")
NAMES = ("data", "factorisation", "net", "method", "preset", "seed")  # of a run
ASKED = ("steps", "learning_rate", "annealed", "last_word", "bfloat16")  # named if they were
# In these, methods may differ whose images stand side by side
OWN = {"method", "learning_rate", *OF_GAMES}
NUM_LOOKS = 16
NUM_SHOWN = 16  # images
NUM_EMBEDDED = 1000  # latents of each law


@dataclass(frozen=True)
class Settings:
    """What a training and its figures depend on, besides the options that are names.

    Args:
        steps: The number of steps.
        batch_size: The number of images of a step, and of dreams.
        learning_rate: The learning rate of Adam at the start, of all parameters.
        annealed: The part of the steps, at the end, in which it falls to zero along a cosine.
        last_word: The part, at the end, for which the game's decoder has come to rest, so that the
            encoder learns to follow it.
        size: How large the networks are.
        num_samples: The number of images that are drawn for a distance at the end.
        num_quick: The same on the way, and for the consistency.
        num_rounds: The number of rounds to the limiting distribution.
        num_draws: The number of importance-weighted draws for a likelihood.
        flips: The probability with which a pixel of a training image is flipped.
        encoder_steps: How often the encoder moves in a step of the game, each time on other dreams.
        num_proposals: Among how many draws of the encoder a latent is chosen for the game's decoder.
        code_warmup: For how many steps the game's encoder learns a code if it finds none. Networks
            that find one without it draw better then.
        learns_all: Whether held-out images are learned from too, and all are compared to. All
            figures are of images that were learned from then.
    """

    steps: int
    batch_size: int
    learning_rate: float
    annealed: float
    size: Size
    num_samples: int
    num_quick: int
    num_rounds: int
    last_word: float = 0.0
    num_draws: int = 100
    flips: float = 0.001
    encoder_steps: int = 1
    num_proposals: int = 1
    code_warmup: int = 0
    learns_all: bool = False


PRESETS = {
    "laptop": Settings(
        8000, 128, 4e-3, 1.0, Size(256, 16), 2000, 1000, 300, encoder_steps=2, num_proposals=4
    ),
    "paper": Settings(
        200_000, 1024, 1e-4, 0.0, DEEP, 10_000, 2000, 1000, code_warmup=1000, learns_all=True
    ),
    "smoke": Settings(60, 32, 1e-3, 1.0, Size(32, 4), 100, 50, 10, num_draws=5),
}

# Learning rates of methods for which the game's is too high: the ELBO loses its code with it.
SLOWER = {("laptop", "elbo"): 2e-3, ("laptop", "rws"): 2e-3}


class Training:
    """A pair that learns.

    Args:
        x: The images that it learns from, with shape :math:`(N, D)`.
        options: The options of the program.
        settings: What else the training depends on.
    """

    def __init__(self, x: Tensor, options: argparse.Namespace, settings: Settings) -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(options.seed)
        self.x = x
        self.settings = settings
        self.is_mixed = options.bfloat16
        self.hvae = FACTORISATIONS[options.factorisation](
            round(x.shape[-1] ** 0.5),
            settings.size,
            STYLES[options.net],
            DarnBernoulli if options.method == "elbo" else dist.Bernoulli,
        ).to(x.device)
        self.optims: tuple[PyroLRScheduler, ...] = ()
        make: dict[str, Callable[[], Game | Reweighted]] = {
            "game": self._game,
            "elbo": self._elbo,
            "rws": self._reweighted,
        }
        self.learner = make[options.method]()

    def _game(self) -> Game:
        settings = self.settings
        self.optims = optims = in_turn(
            settings.steps, settings.learning_rate, settings.annealed, settings.last_word
        )
        return SymmetricEquilibrium(
            self.hvae.model,
            self.hvae.guide,
            optims,
            SymmetricUtility(num_proposals=settings.num_proposals),
            encoder_steps=settings.encoder_steps,
            code_warmup=settings.code_warmup,
            capture=True,
        )

    def _elbo(self) -> Game:
        """A game of one player, who owns all parameters and climbs the ELBO."""

        def utility(_: Any, x: Tensor) -> Tensor:
            return elbo(self.hvae.model, self.hvae.guide, x)

        optim = cosine(self.settings.steps, self.settings.learning_rate, start=self._start)
        self.optims = (optim,)
        player = Player("elbo", self.hvae.model, optim, utility, self.hvae)
        return Game([player], capture=True)

    def _reweighted(self) -> Reweighted:
        schedule = self.settings.learning_rate, self.settings.steps, self._start
        return Reweighted(self.hvae.model, self.hvae.guide, self.hvae, *schedule)

    @property
    def _start(self) -> int:
        """The step after which learning rates begin to fall."""
        return round((1 - self.settings.annealed) * self.settings.steps)

    @property
    def num_steps(self) -> int:
        """The number of steps that have been taken."""
        return self.learner.num_steps

    def step(self) -> GameLoss:
        """Takes a step on a batch, drawn where the images are."""
        rows = torch.randint(len(self.x), (self.settings.batch_size,), device=self.x.device)
        x = self.x[rows]
        flipped = torch.rand_like(x) < self.settings.flips
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.is_mixed):
            loss = self.learner.step(torch.where(flipped, 1 - x, x))
        for optim in self.optims:
            optim.step()
        return loss

    def read(self, loss: GameLoss) -> dict[str, float]:
        """The utilities of a step (nats per image)."""
        return {name: u / self.settings.batch_size for name, u in loss.utilities.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that it needs to go on."""
        return {"networks": self.hvae.state_dict(), "learner": self.learner.state_dict()}

    def load_state_dict(self, state: dict[str, Any], /, *batch: Any) -> None:
        """Goes back to a state; the networks need no batch for that."""
        self.hvae.load_state_dict(state["networks"])
        self.learner.load_state_dict(state["learner"])


def look(judge: Judge, settings: Settings, num_steps: int) -> dict[str, float]:
    """What is told on the way; of the limiting distribution in the last quarter."""
    told = judge.bits() | judge.distances(decoder=judge.prior(settings.num_quick))
    if num_steps > 0.75 * settings.steps:
        limiting = judge.limiting(settings.num_quick, settings.num_rounds)
        told |= judge.distances(limiting=limiting)
    return told


def figures(judge: Judge, laws: dict[str, Latents], settings: Settings) -> dict[str, float]:
    """What is told at the end, besides the consistency of the pair."""
    distances = judge.distances(decoder=laws["prior"], limiting=laws["limiting"])
    decoder, limiting = distances.values()
    return {
        **distances,
        **judge.floor(),
        "limiting / decoder": limiting / decoder,
        **judge.bits(num_draws=100),
        **judge.likelihood(settings.num_draws),
    }


def path(options: argparse.Namespace, kind: str, **others: str) -> Path:
    """A file that a run leaves, or several runs that differ from it in some names."""
    names = vars(options) | others
    start = run_path(options, *(names[name] for name in NAMES), asked=ASKED)
    return start.with_name(f"{start.name}.{kind}")


def picture_latents(options: argparse.Namespace, laws: dict[str, Latents]) -> None:
    """Draws the latents of the decoder, the encoder and the limiting distribution (Fig. 6)."""
    layers = {
        layer: {law: latents[layer][:NUM_EMBEDDED] for law, latents in laws.items()}
        for layer in LAYERS
    }
    title = f"{options.data}, {options.factorisation}, {options.net}, learned by {options.method}"
    embeddings.draw(path(options, "latents.png"), title, layers)


def picture_images(
    options: argparse.Namespace, identity: dict[str, Any], rows: dict[str, Tensor]
) -> None:
    """Draws images beside those of other methods, of which there are such runs (Fig. 1).

    Args:
        options: The options of the program.
        identity: What the run depends on, by name.
        rows: Probabilities of pixels by the label of their row, with shape :math:`(N, H, W)`.
    """
    checkpoint.save(path(options, "images.pt"), {"identity": identity, "rows": rows})
    found = {options.method: rows}
    for file in sorted(options.out.glob("*.images.pt")):
        try:
            other = checkpoint.load(file)
        except ValueError as error:
            print(f"Not drawn: {error}")
            continue
        if _shared(other["identity"]) == _shared(identity):
            found.setdefault(other["identity"]["method"], other["rows"])
    every = {label: row for method in METHODS for label, row in found.get(method, {}).items()}
    title = f"{options.data}, {options.factorisation}, {options.net}: Fréchet distances and images"
    tiles.draw(path(options, "png", method="methods"), title, every)


def _shared(identity: dict[str, Any]) -> dict[str, Any]:
    """What runs of different methods have in common."""
    return {name: x for name, x in identity.items() if name not in OWN}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the options of the program."""
    options = parser("A hierarchical VAE, learned as a game or by its ELBO.", DATA)
    add_options(options, PRESETS)
    options.add_argument("--method", choices=METHODS, default="game", help="how to learn")
    options.add_argument(
        "--factorisation", choices=FACTORISATIONS, default="ladder", help="of the encoder"
    )
    options.add_argument("--net", choices=STYLES, default="silu", help="the kind of networks")
    options.add_argument(
        "--learning-rate", type=amount, help="of Adam, at the start (default: as in the preset)"
    )
    options.add_argument(
        "--annealed",
        type=part,
        help="the part of the steps in which the learning rate falls (default: as in the preset)",
    )
    options.add_argument(
        "--last-word",
        type=part,
        help="the part of the steps in which the encoder alone learns (default: as in the preset)",
    )
    add_precision(options)
    parsed = options.parse_args(arguments)
    if parsed.method == "rws" and parsed.factorisation == "ladder":
        options.error("rws needs --factorisation reverse: its programs can't share parameters")
    if parsed.data == "digits" and parsed.preset == "paper":
        options.error("--preset paper is for images of 28x28 pixels; --data digits has 8x8")
    if parsed.method != "game" and parsed.last_word is not None:
        options.error("--last-word is for --method game, where the encoder moves by itself")
    return parsed


def chosen(options: argparse.Namespace) -> Settings:
    """The settings of the preset, with what was asked for instead."""
    settings = begun(options, PRESETS[options.preset])
    rate = options.learning_rate
    if rate is None:
        rate = SLOWER.get((options.preset, options.method))
    asked = {
        "learning_rate": rate,
        "annealed": options.annealed,
        "last_word": options.last_word,
    }
    return replace(settings, **{name: x for name, x in asked.items() if x is not None})


def run(options: argparse.Namespace, arguments: list[str] | None) -> None:
    """Trains a pair, and tells and draws what it has learned."""
    settings = chosen(options)
    images = load(options.data, options.data_root).to(options.device)
    x, real = images.x, images.held_out_x
    if settings.learns_all:
        x = real = torch.cat([x, real])
    training = Training(x, options, settings)
    features = feature_space(options.data, real)
    judge = Judge(training.hvae, features, real)
    long_run = LongRun(
        training,
        training.step,
        steps=settings.steps,
        identity={name: getattr(options, name) for name in (*NAMES, "bfloat16")}
        | asdict(settings),
        checkpoint=path(options, "pt"),
        read=training.read,
        look=lambda: look(judge, settings, training.num_steps),
        num_looks=NUM_LOOKS,
        tensorboard=path(options, "tensorboard") if options.tensorboard else None,
    )
    if options.resume:
        long_run.resume()
    long_run.train()

    start = time.perf_counter()
    laws = {
        "prior": judge.prior(settings.num_samples),
        "posterior": judge.posterior(settings.num_samples),
        "limiting": judge.limiting(settings.num_samples, settings.num_rounds),
    }
    told = figures(judge, laws, settings)
    for name, value in told.items():
        print(f"{name:50} {value:10.3f}")
    told |= judge.consistency(settings.num_quick, settings.num_rounds)
    write_record(
        path(options, "json"),
        "mnist_hvae.py",
        settings=long_run.identity,
        figures=told,
        seconds={"training": long_run.seconds, "evaluation": time.perf_counter() - start},
        device=options.device,
        history=long_run.history,
        arguments=arguments,
    )
    rows = {}
    for law, label in (("prior", "decoder"), ("limiting", "limiting")):
        distance = told[f"frechet[{features.name}]/{label}"]
        gray = judge.probabilities(laws[law])[:NUM_SHOWN].unflatten(-1, [images.side] * 2)
        rows[f"{options.method}, {label} {distance:.1f}"] = gray.clone().cpu()
    picture_images(options, long_run.identity, rows)
    picture_latents(options, laws)
    print(f"The figures are in {path(options, 'json')}, with pictures beside it.")


def main(arguments: list[str] | None = None) -> None:
    """Runs the program."""
    options = parse(arguments)
    with ended_cleanly("mnist_hvae.py", DataError, RunError), pyro.validation_enabled(False):
        run(options, arguments)


if __name__ == "__main__":
    main()
