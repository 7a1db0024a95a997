r"""Learns digits with their classes; the encoder that classifies them never sees a labelled image.

This is the experiment with labelled digits of Flach, Schlesinger, Shekhovtsov (2024). The top layer
of a ladder of binary latents holds style bits :math:`s` and the class :math:`y` of a digit,
:math:`z_0 = (s, y)`. The classes of the training images teach the decoder alone, and the encoder
learns from dreams (eq. 16). So accuracy on real images tells how far the dreams are like them.

The pair is asked for

- the accuracy of the encoder on held-out images,
- images of the decoder and of the limiting distribution, with Fréchet distances from real ones,
- class-conditional samples of the limiting distribution, :math:`m(x, z \mid y)`,
- the same styles in all classes,
- how :math:`s` and :math:`z_1` lie, from the prior and from :math:`m(z \mid y)` (Fig. 2): styles
  shouldn't tell the class, and :math:`z_1` should.

Run ``python examples/mnist_labelled.py --help`` for the options.
"""

import argparse
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.nn import functional

from cli import add_precision, begun, ended_cleanly, parser, part

with ended_cleanly("mnist_labelled.py"):
    from matplotlib.figure import Figure

    import tiles
    from data import DataError, Images, load
    from embeddings import embedded
    from features import Classifier, classifier, feature_space
    from long_runs import LongRun, RunError, add_options, run_path, write_record
    from networks import LadderVAE
    from pyro_symeq import (
        LimitingDistribution,
        SymmetricEquilibrium,
        SymmetricLoss,
        SymmetricUtility,
    )
    from pyro_symeq.metrics import Features, FrechetDistance, frechet_distance, information
    from training import in_turn

NUM_CLASSES = 10
LATENTS = ("style", "class", "z1")
AT_ONCE = 1000  # images
NUM_SHOWN = 6  # styles
NUM_EMBEDDED = 1000  # latents of each law

DECODER, LIMITING, GIVEN = "decoder", "limiting", "limiting given class"

Draws = dict[str, Tensor]
Figures = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """What a training and its figures depend on, besides the data set and the seed.

    Args:
        steps: The number of steps.
        batch_size: The number of images of a step, and of dreams.
        learning_rate: The learning rate at the start, of both players.
        annealed: The part of the steps, at the end, in which it falls to zero along a cosine.
        last_word: The part, at the end, for which the decoder has come to rest, so that the encoder
            learns to follow it.
        encoder_steps: How often the encoder moves in a step, each time on other dreams.
        num_proposals: Among how many draws of the encoder a completion is chosen.
        num_styles: The number of style bits.
        num_units: The number of bits of z1.
        width: The number of hidden units of a layer.
        num_channels: The number of channels of the decoder before its last convolution.
        encoder_channels: The number of channels of the encoder after its first convolution.
        encoder_layers: The number of hidden layers of the encoder after its convolutions.
        warp: How far a training image is warped, see :func:`warped`.
        flips: The probability with which a pixel of a training image is flipped.
        num_samples: The number of images that are drawn for a distance.
        num_rounds: The number of rounds to the limiting distribution.
    """

    steps: int
    batch_size: int = 128
    learning_rate: float = 2e-3
    annealed: float = 0.4
    last_word: float = 0.2
    encoder_steps: int = 2
    num_proposals: int = 4
    num_styles: int = 30
    num_units: int = 100
    width: int = 512
    num_channels: int = 16
    encoder_channels: int = 16
    encoder_layers: int = 2
    warp: float = 0.0
    flips: float = 0.001
    num_samples: int = 5000
    num_rounds: int = 300


PAPER = Settings(
    200_000,
    batch_size=1024,
    learning_rate=1e-3,
    width=1024,
    num_channels=64,
    encoder_channels=32,
    num_rounds=1000,
)
PRESETS = {
    "laptop": Settings(16_000, num_samples=2000),
    "desktop": replace(  # the same networks without a GPU
        PAPER, steps=15_000, batch_size=256, warp=0.08, num_samples=2000, num_rounds=300
    ),
    "paper": PAPER,
    "smoke": Settings(8, 16, width=32, num_channels=4, num_samples=200, num_rounds=3),
}


class Training:
    """A pair that learns.

    Args:
        images: The data set.
        seed: The seed of the initial parameters and of all draws.
        settings: What else the training depends on.
        is_mixed: Whether networks compute in bfloat16.
    """

    def __init__(
        self, images: Images, seed: int, settings: Settings, is_mixed: bool = False
    ) -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        self.images = images
        self.settings = settings
        self.is_mixed = is_mixed
        self.vae = LadderVAE(
            images.side,
            settings.num_styles,
            settings.num_units,
            settings.width,
            settings.num_channels,
            settings.encoder_channels,
            settings.encoder_layers,
        ).to(images.x.device)
        self.optims = in_turn(
            settings.steps, settings.learning_rate, settings.annealed, settings.last_word
        )
        self.symeq = SymmetricEquilibrium(
            self.vae.model,
            self.vae.guide,
            self.optims,
            SymmetricUtility(
                supervise_encoder=False,  # it learns from dreams alone
                num_proposals=settings.num_proposals,
            ),
            encoder_steps=settings.encoder_steps,
            code_warmup=0,
            capture=True,
        )

    def step(self) -> SymmetricLoss:
        """Moves both players on a batch, drawn where the images are."""
        x, y = self.images.x, self.images.y
        rows = torch.randint(len(x), (self.settings.batch_size,), device=x.device)
        batch = warped(x[rows], self.images.side, self.settings.warp)
        flipped = torch.rand_like(batch) < self.settings.flips
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.is_mixed):
            loss = self.symeq.step(torch.where(flipped, 1 - batch, batch), y[rows])
        for optim in self.optims:
            optim.step()
        return loss

    def utilities(self, loss: SymmetricLoss) -> dict[str, float]:
        """Both utilities of a step (nats per image)."""
        size = self.settings.batch_size
        return {"L_p": loss.decoder / size, "L_q": loss.encoder / size}


def warped(x: Tensor, side: int, spread: float) -> Tensor:
    """Turns, stretches and slants binary images a little around their centre, each in its own way.

    Args:
        x: Images, with shape :math:`(N, D)`.
        side: The number of their rows, and of columns.
        spread: The standard deviation of the four coefficients of a linear map, around those of the
            identity.
    """
    if spread == 0:
        return x
    maps = torch.eye(2, 3).to(x).repeat(len(x), 1, 1)
    maps[..., :2] += spread * torch.randn_like(maps[..., :2])
    places = functional.affine_grid(maps, [len(x), 1, side, side], align_corners=False)
    seen = functional.grid_sample(x.view(-1, 1, side, side), places, align_corners=False)
    return (seen > 0.5).to(x).view_as(x)


class Judge:
    """Asks a pair. An image is that of the most probable pixels, given the latents.

    Args:
        vae: The pair.
        images: The data set, of which the held-out images are looked at.
        features: The features in which images are compared.
        network: A classifier that has learned real images, which tells what images show.
        num_samples: The number of images that are drawn, as many of each class.
    """

    def __init__(
        self,
        vae: LadderVAE,
        images: Images,
        features: Features,
        network: Classifier,
        num_samples: int,
    ) -> None:
        self.vae = vae
        self.network = network
        self.x, self.y = images.held_out_x, images.held_out_y
        self.like = self.x[:1].expand(num_samples, -1)
        self.classes = torch.eye(NUM_CLASSES).to(self.x)[torch.arange(num_samples) % NUM_CLASSES]
        self.features = features
        self.real = features(self.x)

    @torch.no_grad()
    def accuracy(self) -> float:
        """The part of the held-out images whose class is the encoder's most probable one."""
        found = torch.cat([self.vae.encoder(x)[1].argmax(-1) for x in self.x.split(AT_ONCE)])
        return (found == self.y.argmax(-1)).float().mean().item()

    def bits(self) -> Figures:
        """What the latents tell about 1,000 images (bits)."""
        found = information(self.vae.guide, self.x[:AT_ONCE], num_draws=30)
        return {f"bits/{name}": bits.sum().item() for name, bits in found.items()}

    @torch.no_grad()
    def decoded(self) -> Draws:
        """Latents of the decoder, given classes."""
        model = poutine.condition(poutine.uncondition(self.vae.model), {"class": self.classes})
        nodes: Any = poutine.trace(model).get_trace(self.like).nodes
        return {name: nodes[name]["value"] for name in LATENTS}

    def limiting(self, num_rounds: int, *, is_given: bool) -> Draws:
        """Latents of the limiting distribution, after so many rounds.

        Args:
            num_rounds: The number of rounds, which begin with the decoder.
            is_given: Whether the class stays as it is, or is drawn too.
        """
        given = {"class": self.classes} if is_given else None
        chains = LimitingDistribution(self.vae.model, self.vae.guide)
        draws = chains.sample(1, self.like, num_steps=num_rounds, given=given)
        return {name: draws[name][0] for name in LATENTS}

    @torch.no_grad()
    def pixels(self, z1: Tensor) -> Tensor:
        """The probabilities of pixels, given the bits z1."""
        return torch.cat([self.vae.decoder.x(part).sigmoid() for part in z1.split(AT_ONCE)])

    def distance(self, draws: Draws) -> FrechetDistance:
        """How far images are from real ones."""
        return self._distance(self.features(self.images(draws)), self.real)

    def floor(self) -> FrechetDistance:
        """How far two halves of the real images are from each other."""
        order = torch.randperm(len(self.x), device=self.x.device)
        return self._distance(*self.real[order].chunk(2))

    def images(self, draws: Draws) -> Tensor:
        """The most probable pixels, given the latents."""
        return (self.pixels(draws["z1"]) > 0.5).to(self.x)

    @torch.no_grad()
    def agreement(self, draws: Draws) -> float:
        """The part of the images that the classifier takes to be of the class that they have."""
        parts = self.images(draws).split(AT_ONCE)
        found = torch.cat([self.network(x).argmax(-1) for x in parts])
        return (found == draws["class"].argmax(-1)).float().mean().item()

    def _distance(self, a: Tensor, b: Tensor) -> FrechetDistance:
        return frechet_distance(a, b, self.features.name)


def look(judge: Judge, num_rounds: int) -> Figures:
    """What is told on the way, after rounds that are too few for the limiting distribution."""
    draws = judge.limiting(num_rounds, is_given=False)
    return {
        "accuracy": judge.accuracy(),
        "decoder distance": judge.distance(judge.decoded()).value,
        f"distance after {num_rounds} rounds": judge.distance(draws).value,
    }


def figures(judge: Judge, draws: dict[str, Draws]) -> Figures:
    """What is told at the end."""
    distances = {law: judge.distance(each) for law, each in draws.items()}
    distances["floor"] = judge.floor()
    return {
        "held-out accuracy": judge.accuracy(),
        **{f"{found.name}/{law}": found.value for law, found in distances.items()},
        "limiting / decoder": distances[LIMITING].value / distances[DECODER].value,
        **{f"classifier agrees/{law}": judge.agreement(each) for law, each in draws.items()},
        "largest share of a class": draws[LIMITING]["class"].mean(0).max().item(),
        **judge.bits(),
    }


def picture_images(path: Path, judge: Judge, draws: dict[str, Draws]) -> None:
    """Draws the same styles in all classes, then samples of each law, with a column for a class."""
    style = draws[DECODER]["style"][:NUM_SHOWN].repeat_interleave(NUM_CLASSES, dim=0)
    with torch.no_grad():
        probabilities = judge.vae.decoder.z1(style, judge.classes[: len(style)]).sigmoid()
    rows = {"style": judge.pixels((probabilities > 0.5).to(style))}
    for label, law in {"decoder": DECODER, "limiting": GIVEN}.items():
        rows[label] = judge.pixels(draws[law]["z1"][: len(style)])
    side = round(judge.x.shape[-1] ** 0.5)
    images = {
        f"{name} {number}": row
        for name, each in rows.items()
        for number, row in enumerate(each.view(NUM_SHOWN, NUM_CLASSES, side, side), 1)
    }
    tiles.draw(path, "Styles in all classes, and samples given the class", images)


def picture_latents(path: Path, draws: dict[str, Draws], seed: int = 0) -> None:
    """Draws styles and units, embedded by t-SNE, with colours of classes (Fig. 2)."""
    figure = Figure(figsize=(8.4, 8.8), layout="constrained")
    figure.suptitle("Latents, coloured by class")
    for row, name in zip(figure.subplots(2, 2), ("style", "z1"), strict=True):
        points = embedded([draws[law][name][:NUM_EMBEDDED] for law in (DECODER, GIVEN)], seed)
        for axes, law, each in zip(row, (DECODER, GIVEN), points, strict=True):
            classes = draws[law]["class"][: len(each)].argmax(-1).numpy(force=True)
            shown = axes.scatter(*each.T, s=4, c=classes, cmap="tab10", vmin=-0.5, vmax=9.5)
            axes.set(title=f"{name}, {law}", xticks=[], yticks=[])
    figure.colorbar(shown, ax=figure.axes, ticks=range(NUM_CLASSES), shrink=0.5, label="class")
    figure.savefig(path, dpi=120)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the options of the program."""
    options = parser("Learns digits with their classes.", ("mnist", "fashion", "digits"))
    add_options(options, PRESETS)
    add_precision(options)
    options.add_argument(
        "--warp", type=part, help="how far training images are warped, 0.06 say (default: not)"
    )
    return options.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Trains a pair, and tells and draws what it has learned."""
    settings = begun(options, PRESETS[options.preset])
    if options.warp is not None:
        settings = replace(settings, warp=options.warp)
    images = load(options.data, options.data_root).to(options.device)
    training = Training(images, options.seed, settings, options.bfloat16)
    judge = Judge(
        training.vae,
        images,
        feature_space(options.data, images.x),
        classifier(options.data, images.x),
        settings.num_samples,
    )
    names = {name: getattr(options, name) for name in ("data", "seed", "bfloat16")}
    identity = names | asdict(settings)
    parts = "labelled", options.data, options.preset, options.seed
    path = run_path(options, *parts, asked=("steps", "warp", "bfloat16"))
    long_run = LongRun(
        training.symeq,
        training.step,
        steps=settings.steps,
        identity=identity,
        checkpoint=path.with_name(f"{path.name}.pt"),
        read=training.utilities,
        look=lambda: look(judge, max(settings.num_rounds // 20, 1)),
        tensorboard=options.out / "tensorboard" / path.name if options.tensorboard else None,
    )
    if options.resume:
        long_run.resume(images.x[:2], images.y[:2])
    long_run.train()

    start = time.perf_counter()
    draws = {
        DECODER: judge.decoded(),
        LIMITING: judge.limiting(settings.num_rounds, is_given=False),
        GIVEN: judge.limiting(settings.num_rounds, is_given=True),
    }
    told = figures(judge, draws)
    seconds = {"training": long_run.seconds, "evaluation": time.perf_counter() - start}
    write_record(
        path.with_name(f"{path.name}.json"),
        "mnist_labelled.py",
        settings=identity,
        figures=told,
        seconds=seconds,
        device=options.device,
        history=long_run.history,
    )
    print()
    for what, value in told.items():
        print(f"{what:50} {value:10.4f}")
    for what, value in seconds.items():
        print(f"{what:50} {value:10.1f} s")
    picture_images(path.with_name(f"{path.name}.png"), judge, draws)
    picture_latents(path.with_name(f"{path.name}-latents.png"), draws)


def main(arguments: list[str] | None = None) -> None:
    """Runs the program."""
    options = parse(arguments)
    with ended_cleanly("mnist_labelled.py", DataError, RunError), pyro.validation_enabled(False):
        run(options)


if __name__ == "__main__":
    main()
