r"""Learns to classify from few labels and many images, as one game.

An image of a class :math:`y` is a template that has a shape, a few bits :math:`s`, and that is
moved, turned, sheared and stretched by a pose :math:`t \in \mathbb{R}^6`:

.. math::
    p_\theta(x, y, s, t) = p(y) \, p(s) \, p_\theta(t \mid y, s) \, p_\theta(x \mid y, s, t),
    \qquad
    q_\varphi(y, s, t \mid x) = q_\varphi(t \mid x) \, q_\varphi(y \mid t, x) \,
        q_\varphi(s \mid y, t, x).

The encoder looks at an image for its pose, undoes that, and sees class and shape in what results.

Each step plays the game on two batches: images :math:`x` whose class the guide fills in, and
labelled images, whose class the guide is clamped to and scored at (eqs. 8 and 11 of Flach,
Schlesinger, Shekhovtsov, 2024):

.. math::
    L_p &= \mathbb{E}_{\pi(x)} \mathbb{E}_{q(y, s, t \mid x)} [\log p_\theta(x, y, s, t)]
        + w \, \mathbb{E}_{\pi(x, y)} \mathbb{E}_{q(s, t \mid x, y)} [\log p_\theta(x, y, s, t)], \\
    L_q &= \mathbb{E}_{p_\theta} [\log q_\varphi(y, s, t \mid x)]
        + w \, \mathbb{E}_{\pi(x, y)} [\log q_\varphi(y \mid x)].

The decoder can't explain an image under a wrong class: it has few bits for the shape, and a pose
for all that a digit may look like besides. Completions are chosen among several draws of the guide
by the decoder (``num_proposals``), so the decoder corrects the guide's classes, and dreams teach
the guide the correction. No class is summed over, and there is no other objective.

Run ``python examples/semi_supervised.py --help`` for the options.
"""

import argparse
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn import functional

from cli import begun, count, ended_cleanly, parser

with ended_cleanly("semi_supervised.py"):
    from tqdm import tqdm

    from data import DataError, Images, load
    from layers import convolution, dense, linear
    from pyro_symeq import Batch, SymmetricEquilibrium, SymmetricUtility
    from tiles import draw
    from training import cosine

DATA = ("mnist", "fashion", "digits")
NUM_CLASSES = 10
NUM_POSES = 6


@dataclass(frozen=True)
class Settings:
    """What a training depends on, besides the data set, the labels and the seed.

    Args:
        steps: The number of steps, over which the learning rates fall to zero along a cosine.
        batch_size: The number of images without labels in a step.
        num_labelled: The number of labelled images in a step.
        weight: The weight of the labelled batch.
        encoder_warmup: In how many first steps the encoder learns alone.
        num_proposals: Among how many draws of the guide a completion is chosen.
        decoder_rate: The learning rate of the decoder at the start.
        encoder_rate: The learning rate of the encoder at the start.
        num_bits: The number of bits that say which shape a template has.
        width: The number of hidden units of a dense network.
        num_channels: The number of channels of the encoder's first convolution.
    """

    steps: int = 2400
    batch_size: int = 64
    num_labelled: int = 16
    weight: float = 1.0
    encoder_warmup: int = 800
    num_proposals: int = 4
    decoder_rate: float = 2e-3
    encoder_rate: float = 2e-3
    num_bits: int = 4
    width: int = 200
    num_channels: int = 12


class Decoder(nn.Module):
    """The networks of the decoder.

    Args:
        x: Images, with shape :math:`(N, D)`, whose mean is where templates start.
        num_bits: The number of bits of s.
        width: The number of hidden units.
    """

    def __init__(self, x: Tensor, num_bits: int, width: int) -> None:
        super().__init__()
        self.template = dense(NUM_CLASSES + num_bits, width, x.shape[-1])
        self.pose = linear(NUM_CLASSES + num_bits, 2 * NUM_POSES)
        with torch.no_grad():
            mean = x.mean(0).clamp(0.003, 0.997)
            self.template.get_parameter("2.bias").copy_(torch.logit(mean))
            self.pose.weight.mul_(0.1)

    def t(self, y: Tensor, s: Tensor) -> Tensor:
        """The parameters of p(t | y, s)."""
        return self.pose(joined(y, s))

    def x(self, y: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """The logits of p(x | y, s, t)."""
        return moved(self.template(joined(y, s)), maps(t))


class Encoder(nn.Module):
    """The networks of the encoder.

    Args:
        side: The number of rows, and of columns, of an image.
        num_bits: The number of bits of s.
        width: The number of hidden units of a dense layer.
        num_channels: The number of channels of the first convolution.
    """

    def __init__(self, side: int, num_bits: int, width: int, num_channels: int) -> None:
        super().__init__()
        num_features = 2 * num_channels * math.ceil(side / 4) ** 2
        self.noise = Flip(0.05)
        self.pose = nn.Sequential(
            *halving_twice(side, num_channels),
            nn.Flatten(),
            linear(num_features, width),
            nn.SiLU(),
            linear(width, 2 * NUM_POSES),
        )
        self.classes = nn.Sequential(
            *halving_twice(side, num_channels),
            convolution(2 * num_channels, 4 * num_channels, 3),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
            nn.Dropout(0.2),
            linear(36 * num_channels, NUM_CLASSES),
        )
        self.features = nn.Sequential(linear(side**2, width), nn.SiLU())
        self.shape = dense(width + NUM_CLASSES, width, num_bits)

    def t(self, x: Tensor) -> Tensor:
        """The parameters of q(t | x)."""
        return self.pose(2 * x - 1)

    def upright(self, x: Tensor, t: Tensor) -> Tensor:
        """The image without its pose."""
        return moved((2 * x - 1).expand(*t.shape[:-1], -1), inverse(maps(t)))

    def y(self, upright: Tensor) -> Tensor:
        """The probabilities of q(y | t, x).

        No class is ever ruled out, so that the decoder gets to see all of them at times.
        """
        logits = self.classes(upright.flatten(0, -2)).view(*upright.shape[:-1], -1)
        return 0.95 * logits.softmax(-1) + 0.05 / NUM_CLASSES

    def s(self, upright: Tensor, y: Tensor) -> Tensor:
        """The logits of q(s | y, t, x)."""
        y = y.expand(*upright.shape[:-1], -1)
        return self.shape(torch.cat([self.features(upright), NUM_CLASSES**0.5 * y], dim=-1))


class Flip(nn.Module):
    """Flips some pixels while training, so that dreams and images look more alike.

    Args:
        probability: How often a pixel is flipped.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Flips pixels."""
        if not self.training:
            return x
        return torch.where(torch.rand_like(x) < self.probability, 1 - x, x)


class SemiSupervisedVAE(nn.Module):
    """The pair of programs.

    Args:
        x: The training images, with shape :math:`(N, D)`.
        settings: The sizes of the networks.
    """

    def __init__(self, x: Tensor, settings: Settings) -> None:
        super().__init__()
        self.num_bits = settings.num_bits
        side = round(x.shape[-1] ** 0.5)
        self.decoder = Decoder(x, settings.num_bits, settings.width)
        self.encoder = Encoder(side, settings.num_bits, settings.width, settings.num_channels)

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        """The decoder's program.

        Args:
            x: Images, with shape :math:`(N, D)`.
            y: Their classes, with shape :math:`(N, 10)`, if they are known.
        """
        pyro.module("decoder", self.decoder)
        with pyro.plate("images", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(NUM_CLASSES)), obs=y)
            s = pyro.sample("s", bits(x.new_zeros(self.num_bits)))
            t = pyro.sample("t", normal(self.decoder.t(y, s)))
            pyro.sample("x", bits(self.decoder.x(y, s, t)), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """The encoder's program; what is known of the classes is left to the model.

        Args:
            x: Images, with shape :math:`(N, D)`.
            y: Their classes, with shape :math:`(N, 10)`, if they are known.
        """
        pyro.module("encoder", self.encoder)
        with pyro.plate("images", len(x)):
            x = self.encoder.noise(x)
            t = pyro.sample("t", normal(self.encoder.t(x)))
            upright = self.encoder.upright(x, t)
            y = pyro.sample("y", dist.OneHotCategorical(self.encoder.y(upright)))
            pyro.sample("s", bits(self.encoder.s(upright, y)))

    def classify(self, x: Tensor) -> Tensor:
        """The probabilities of q(y | t, x) at the most probable pose, with shape :math:`(N, 10)`."""
        pose = self.encoder.t(x)[..., :NUM_POSES]
        return self.encoder.y(self.encoder.upright(x, pose))


def bits(logits: Tensor) -> dist.Independent:
    """Independent binary variables along the last dimension."""
    return dist.Bernoulli(logits=logits).to_event(1)


def normal(parameters: Tensor) -> dist.Independent:
    """Independent normal variables from their means and logarithmic scales."""
    loc, log_scale = parameters.chunk(2, dim=-1)
    return dist.Normal(loc, log_scale.clamp(-5, 2).exp()).to_event(1)


def joined(y: Tensor, s: Tensor) -> Tensor:
    """A class and bits as the input of a network: the class weighs as much as ten bits."""
    y = y.expand(*s.shape[:-1], -1)  # a known class has no dimension of proposals
    return torch.cat([NUM_CLASSES**0.5 * y, 2 * s - 1], dim=-1)


def maps(t: Tensor) -> Tensor:
    """The affine maps of the plane that poses stand for, with shape :math:`(*, 2, 3)`.

    A unit of each pose turns, shears, stretches along each axis or shifts along each axis.
    """
    units = [
        [[0.0, -0.15, 0.0], [0.15, 0.0, 0.0]],
        [[0.0, 0.3, 0.0], [0.0, 0.0, 0.0]],
        [[0.15, 0.0, 0.0], [0.0, 0.0, 0.0]],
        [[0.0, 0.0, 0.0], [0.0, 0.15, 0.0]],
        [[0.0, 0.0, 0.09], [0.0, 0.0, 0.0]],
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.09]],
    ]
    return torch.eye(2, 3).to(t) + torch.einsum("...p,pij->...ij", t, t.new_tensor(units))


def inverse(maps: Tensor) -> Tensor:
    """The maps that undo others."""
    linear = torch.linalg.inv(maps[..., :2])
    return torch.cat([linear, -linear @ maps[..., 2:]], dim=-1)


def moved(x: Tensor, maps: Tensor) -> Tensor:
    """Takes the pixels of square images from where maps lead, with shape :math:`(*, D)`."""
    side = round(x.shape[-1] ** 0.5)
    images = x.reshape(-1, 1, side, side)
    size = list(images.shape)
    grid = functional.affine_grid(maps.flatten(0, -3), size, align_corners=False)
    taken = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return taken.view_as(x)


def halving_twice(side: int, num_channels: int) -> list[nn.Module]:
    """Convolutions after which an image has a quarter of the rows and columns."""
    return [
        nn.Unflatten(1, (1, side, side)),
        convolution(1, num_channels, 5, stride=2),
        nn.SiLU(),
        convolution(num_channels, 2 * num_channels, 3, stride=2),
        nn.SiLU(),
    ]


class Training:
    """A pair, the images it learns from and the classes it is told.

    Args:
        images: The data set; all its training images count, and the classes of some.
        num_labels: The number of images whose classes are known, as many of each class.
        seed: The seed of the choice of these images, of the initial parameters and of all draws.
        settings: What else the training depends on.
    """

    def __init__(self, images: Images, num_labels: int, seed: int, settings: Settings) -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        self.images = images
        self.settings = settings
        self.is_labelled = torch.zeros(len(images.x), dtype=torch.bool, device=images.x.device)
        for y in images.y.T:
            rows = y.nonzero()[:, 0]
            order = torch.randperm(len(rows))[: num_labels // NUM_CLASSES]
            self.is_labelled[rows[order.to(rows.device)]] = True
        self.labelled = self.is_labelled.nonzero()[:, 0]
        self.unlabelled = (~self.is_labelled).nonzero()[:, 0]
        self.vae = SemiSupervisedVAE(images.x, settings).to(images.x)
        self.optims = (
            cosine(settings.steps, settings.decoder_rate),
            cosine(settings.steps, settings.encoder_rate),
        )
        self.symeq = SymmetricEquilibrium(
            self.vae.model,
            self.vae.guide,
            self.optims,
            loss=SymmetricUtility(num_proposals=settings.num_proposals, vectorize_particles=True),
            encoder_warmup=settings.encoder_warmup,
        )

    def run(self, labelled_only: bool = False) -> float:
        """Takes all steps, and shows how the accuracy rises.

        Args:
            labelled_only: Whether to leave out the images without labels.

        Returns:
            How long it took (seconds).
        """
        start = time.perf_counter()
        every = math.ceil(self.settings.steps / 10)
        self.vae.train()
        with tqdm(total=self.settings.steps, unit="step", mininterval=0.5) as bar:
            for step in range(1, self.settings.steps + 1):
                batches = self.batches(labelled_only or step <= self.settings.encoder_warmup)
                loss = self.symeq.step(*batches)
                for optim in self.optims:
                    optim.step()
                bar.set_postfix_str(f"loss {loss:.0f} nats", refresh=False)
                bar.update()
                if step % every == 0:
                    seconds = time.perf_counter() - start
                    bar.write(
                        f"step {step:6d}  {seconds:5.0f} s  test accuracy {self.accuracy():.4f}"
                    )
        return time.perf_counter() - start

    def batches(self, labelled_only: bool) -> list[Batch]:
        """Draws what a step learns from."""
        x, y = self.images.x, self.images.y
        labelled = drawn(self.labelled, self.settings.num_labelled)
        batches = [Batch(x[labelled], y[labelled]).weighted(self.settings.weight)]
        if not labelled_only:
            batches.append(Batch(x[drawn(self.unlabelled, self.settings.batch_size)]))
        return batches

    @torch.no_grad()
    def accuracy(self) -> float:
        """The part of the test images whose class is the encoder's most probable one."""
        self.vae.eval()
        y = torch.cat([self.vae.classify(x) for x in self.images.held_out_x.split(1000)])
        self.vae.train()
        hits = y.argmax(-1) == self.images.held_out_y.argmax(-1)
        return hits.double().mean().item()


def drawn(rows: Tensor, size: int) -> Tensor:
    """Draws some of the row numbers, with repetition."""
    return rows[torch.randint(len(rows), (size,)).to(rows.device)]


@torch.no_grad()
def picture(training: Training, path: Path, num_columns: int = 16) -> None:
    """Draws test images, reconstructions and dreams; grey is the probability of a pixel."""
    vae, images = training.vae.eval(), training.images
    x = images.held_out_x[:num_columns]
    latents = poutine.trace(vae.guide).get_trace(x)
    rows = {
        "test images": x,
        "reconstructed": mean(poutine.trace(poutine.replay(vae.model, latents)).get_trace(x)),
    }
    for name, y in zip("0123456789", torch.eye(NUM_CLASSES).to(x), strict=True):
        classes = y.expand(num_columns, NUM_CLASSES)
        rows[f"class {name}"] = mean(poutine.trace(vae.model).get_trace(x, classes))
    squares = {name: row.view(-1, images.side, images.side) for name, row in rows.items()}
    title = f"{int(training.is_labelled.sum())} labels: reconstructions and dreams of each class"
    draw(path, title, squares)


def mean(trace: poutine.Trace) -> Tensor:
    """The probabilities of the pixels in a run of the model."""
    site: Any = trace.nodes["x"]
    return site["fn"].mean


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the options of the program."""
    options = parser("Learns to classify from few labels and many images.", DATA)
    options.add_argument(
        "--labels",
        type=count,
        default=100,
        help="how many images have a label, as many of each class (default: %(default)s)",
    )
    options.add_argument(
        "--label-draws",
        type=count,
        default=1,
        help="how often to choose the labelled images and to learn (default: %(default)s)",
    )
    options.add_argument(
        "--labelled-only", action="store_true", help="leave out the images without labels"
    )
    return options.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Trains pairs, reports and draws what they have learned."""
    settings = begun(options, Settings())
    images = load(options.data, options.data_root).to(options.device)
    check_labels(options.labels, images)
    accuracies, seconds = [], []
    for seed in range(options.seed, options.seed + options.label_draws):
        training = Training(images, options.labels, seed, settings)
        seconds.append(training.run(options.labelled_only))
        accuracies.append(training.accuracy())
        print(f"seed {seed}: test accuracy {accuracies[-1]:.4f} after {seconds[-1]:.0f} s")
    path = options.out / f"semi_supervised-{options.data}-{options.labels}.png"
    picture(training, path)
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else math.nan
    print(f"""
labels                             {options.labels:7d}
test accuracy, mean over label draws {statistics.mean(accuracies):.4f}
test accuracy, standard deviation    {spread:.4f}
training of one                    {statistics.mean(seconds):7.0f} s

The picture is in {path}.""")


def check_labels(num_labels: int, images: Images) -> None:
    """Checks that there are so many labels.

    Raises:
        DataError: The number isn't a multiple of 10, or some class has fewer images.
    """
    available = int(images.y.sum(0).min())
    if num_labels % NUM_CLASSES or num_labels // NUM_CLASSES >= available:
        raise DataError(
            f"Expected --labels to be a multiple of {NUM_CLASSES} below "
            f"{NUM_CLASSES * available}, got {num_labels}."
        )


def main(arguments: list[str] | None = None) -> None:
    """Runs the program."""
    options = parse(arguments)
    with ended_cleanly("semi_supervised.py", DataError):
        run(options)


if __name__ == "__main__":
    main()
