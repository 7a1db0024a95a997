r"""Two models of digits, one with images of 0 to 4 and one of 5 to 9, learn all ten from dreams.

Model :math:`p_i` has images :math:`\pi_i`. With a weight :math:`\alpha` of its own images, and the
other's dreams for the rest, it climbs (Schlesinger, Flach, 2025)

.. math::
    u_i = \alpha \, \mathbb{E}_{\pi_i} [\log p_i] + (1 - \alpha) \, \mathbb{E}_{p_j} [\log p_i].

At the equilibrium :math:`p_i = \alpha \pi_i + (1 - \alpha) p_j`, and so

.. math::
    p_i = \frac{\pi_i + (1 - \alpha) \, \pi_j}{2 - \alpha}:

a part :math:`(1 - \alpha) / (2 - \alpha)` of what a model dreams are digits that it never had. No
image, label or parameter goes from one model to the other, only dreams do.

Each model is a decoder with an encoder. An image is of a cluster :math:`c`, has bits :math:`z` and
binary pixels :math:`x`:

.. math::
    p(x, c, z) = p(c) \, p(z \mid c) \, p(x \mid z), \qquad
    q(c, z \mid x) = q(c \mid x) \, q(z \mid c, x), \qquad
    q(z \mid c, x) \propto p(z \mid c) \exp \langle f(x), z \rangle.

First each learns alone (:math:`\alpha = 1`), as early dreams are noise; then they exchange dreams.
A classifier that has learned from real digits of all ten classes tells which ones are dreamed. It
sees the dreams as the other model does, with each pixel drawn.

Run ``python examples/data_exchange.py --help`` for the options.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn import functional

from cli import begun, ended_cleanly, parser, share

with ended_cleanly("data_exchange.py"):
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure, SubFigure

    from data import DataError, Images, load
    from layers import convolution, dense, linear
    from pyro_symeq import data_exchange_game
    from pyro_symeq.metrics import log_likelihood
    from training import cosine, train

NUM_CLASSES = 10
NUM_DREAMS = 5000  # of each model, to be judged
NUM_DRAWS = 100  # for the log-likelihood of an image
OWN = {"low": range(5), "high": range(5, 10)}  # the digits that each model has images of
TITLES = {"low": "Model of 0 to 4", "high": "Model of 5 to 9"}


@dataclass(frozen=True)
class Settings:
    """What a training depends on, besides the data set, the weights and the seed.

    Args:
        steps: The number of steps alone, and again of those with exchange. Over each, the learning
            rate falls to zero along a cosine.
        batch_size: The number of images of a step, and of dreams, for each model.
        learning_rate: The learning rate at the start.
        num_clusters: The number of clusters c.
        num_bits: The number of bits of z.
        width: The number of hidden units of a network.
        judge_steps: The number of steps of the classifier.
    """

    steps: int
    batch_size: int
    learning_rate: float
    num_clusters: int
    num_bits: int
    width: int
    judge_steps: int


SETTINGS = {
    "mnist": Settings(2500, 200, 4e-3, 100, 32, 256, 1500),
    "digits": Settings(1000, 200, 4e-3, 50, 24, 128, 500),
}


class VAE(nn.Module):
    """A model with its guide.

    Args:
        name: The name, which sets its parameters apart from those of others.
        num_pixels: The number of pixels of an image.
        settings: The sizes of the networks.
    """

    def __init__(self, name: str, num_pixels: int, settings: Settings) -> None:
        super().__init__()
        self.name = name
        self.num_clusters = settings.num_clusters
        width, num_bits = settings.width, settings.num_bits
        codes = nn.Linear(self.num_clusters, num_bits)
        nn.init.normal_(codes.weight)  # clusters differ from the start
        nn.init.zeros_(codes.bias)
        self.decoder = nn.ModuleDict({"z": codes, "x": dense(num_bits, width, num_pixels)})
        self.encoder = nn.ModuleDict(
            {
                "features": nn.Sequential(linear(num_pixels, width), nn.SiLU()),
                "c": linear(width, self.num_clusters),
                "z": linear(width, num_bits),
            }
        )

    def model(self, x: Tensor) -> None:
        """The decoder's program.

        Args:
            x: Images, with shape :math:`(N, D)`.
        """
        pyro.module(f"{self.name}.decoder", self.decoder)
        clusters = pyro.param(f"{self.name}.clusters", x.new_zeros(self.num_clusters))
        with pyro.plate("images", len(x)):
            c = pyro.sample("c", dist.OneHotCategorical(logits=clusters))
            z = pyro.sample("z", bits(self.decoder["z"](c)))
            pyro.sample("x", bits(self.decoder["x"](2 * z - 1)), obs=x)

    def guide(self, x: Tensor) -> None:
        """The encoder's program.

        Args:
            x: Images, with shape :math:`(N, D)`.
        """
        pyro.module(f"{self.name}.encoder", self.encoder)
        with pyro.plate("images", len(x)):
            features = self.encoder["features"](2 * x - 1)
            c = pyro.sample("c", dist.OneHotCategorical(logits=self.encoder["c"](features)))
            pyro.sample("z", bits(self.decoder["z"](c) + self.encoder["z"](features)))

    @torch.no_grad()
    def dream(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Draws as many images as are given; returns them and the probabilities of their pixels."""
        trace = poutine.trace(poutine.uncondition(self.model)).get_trace(like)
        site: Any = trace.nodes["x"]
        return site["value"], site["fn"].mean


def bits(logits: Tensor) -> dist.Independent:
    """Independent binary variables along the last dimension."""
    return dist.Bernoulli(logits=logits).to_event(1)


class Exchange:
    """The game of the models.

    Args:
        vaes: The models by name.
        alpha: The weight of the images of its own, of each.
        optim: The optimiser of all.
    """

    def __init__(self, vaes: dict[str, VAE], alpha: float, optim: pyro.optim.PyroOptim) -> None:
        self.game = data_exchange_game(
            {name: (vae.model, vae.guide) for name, vae in vaes.items()},
            optim,
            {i: {j: alpha if i == j else 1 - alpha for j in vaes} for i in vaes},
        )

    def step(self, low: Tensor, high: Tensor) -> float:
        """Lets all players move, on images for each model."""
        return self.game.step(low={"x": low}, high={"x": high})


def of(digits: range, x: Tensor, y: Tensor) -> Tensor:
    """The images of some digits."""
    return x[y[:, list(digits)].any(-1)]


def learn(vaes: dict[str, VAE], images: Images, alpha: float, settings: Settings) -> float:
    """Trains the models, each on its own digits; returns how long it took (seconds)."""
    own = [of(OWN[name], images.x, images.y) for name in vaes]

    def batch() -> tuple[Tensor, ...]:
        return tuple(drawn(x, settings.batch_size) for x in own)

    optim = cosine(settings.steps, settings.learning_rate)
    return train(Exchange(vaes, alpha, optim), optim, batch, settings.steps)


def drawn(x: Tensor, size: int) -> Tensor:
    """Draws rows, with repetition."""
    return x[torch.randint(len(x), (size,)).to(x.device)]


class Judge:
    """A classifier of real digits, which tells the digits of dreams.

    Args:
        images: The digits that it learns from, with their classes.
        steps: The number of steps.
    """

    def __init__(self, images: Images, steps: int) -> None:
        side = images.side
        self.network = nn.Sequential(
            nn.Unflatten(1, (1, side, side)),
            convolution(1, 16, 5, stride=2),
            nn.SiLU(),
            convolution(16, 32, 3, stride=2),
            nn.SiLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            linear(32 * math.ceil(side / 4) ** 2, NUM_CLASSES),
        ).to(images.x)
        optim = torch.optim.AdamW(self.network.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, steps)
        for _ in range(steps):
            rows = torch.randint(len(images.x), (128,)).to(images.x.device)
            logits = self.network(grained(images.x[rows]))
            optim.zero_grad()
            functional.cross_entropy(logits, images.y[rows]).backward()
            optim.step()
            schedule.step()
        self.network.eval()

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """The probabilities of the classes of images, with shape :math:`(N, 10)`."""
        return torch.cat([self.network(part).softmax(-1) for part in x.split(1000)])


def grained(x: Tensor, most: float = 0.1) -> Tensor:
    """Flips pixels, more in some images than in others: the pixels of dreams are drawn one by one."""
    rate = most * torch.rand(len(x), 1).to(x)
    return torch.where(torch.rand_like(x) < rate, 1 - x, x)


@dataclass(frozen=True)
class Result:
    """What a model has learned.

    Args:
        title: Which model it is, and what it has learned from.
        name: The name of the model.
        pixels: The probabilities of the pixels of its dreams, with shape :math:`(M, D)`.
        classes: The probabilities of the classes of these dreams, with shape :math:`(M, 10)`.
        expected: The shares of the classes at the equilibrium, with shape :math:`(10)`.
        log_probs: The log-likelihood (nats) of real test images by the model that has such.
    """

    title: str
    name: str
    pixels: Tensor
    classes: Tensor
    expected: Tensor
    log_probs: dict[str, float]


def shares(classes: Tensor) -> Tensor:
    """The shares of the classes in judged images, with shape :math:`(10)`."""
    return classes.argmax(-1).bincount(minlength=NUM_CLASSES) / len(classes)


def foreign(shares: Tensor, name: str) -> float:
    """The share of the digits that a model never had."""
    return 1 - shares[list(OWN[name])].sum().item()


def confidence(classes: Tensor) -> float:
    """The mean probability of the most probable class."""
    return classes.max(-1).values.mean().item()


def expected(name: str, alpha: float, y: Tensor) -> Tensor:
    """The shares of the classes in a model's dreams at the equilibrium, with shape :math:`(10)`."""
    counts = y.sum(0)
    is_own = torch.zeros_like(counts)
    is_own[list(OWN[name])] = 1
    own, other = (part / part.sum() for part in (counts * is_own, counts * (1 - is_own)))
    return (own + (1 - alpha) * other) / (2 - alpha)


def measure(vae: VAE, alpha: float, how: str, judge: Judge, images: Images) -> Result:
    """Judges a model by its dreams and by its log-likelihood on real test images."""
    x, pixels = vae.dream(images.x[:1].expand(NUM_DREAMS, -1))
    log_probs = {}
    for name, digits in OWN.items():
        real = of(digits, images.held_out_x, images.held_out_y)[:1000]
        log_probs[name] = log_likelihood(vae.model, vae.guide, real, num_draws=NUM_DRAWS).mean
    title = f"{TITLES[vae.name]}, {how}"
    by_class = expected(vae.name, alpha, images.y)
    return Result(title, vae.name, pixels, judge(x), by_class, log_probs)


def report(results: list[Result], judge: Judge, images: Images) -> None:
    """Prints what the models have learned, and how far the judge is to be trusted."""
    x, y = images.held_out_x, images.held_out_y
    hits = (judge(x) * y).sum(-1) == judge(x).max(-1).values
    print(f"""
The judge is right about {hits.double().mean().item():.2%} of the real test images.

dreams                        never had  expected  confidence  log p: 0 to 4    5 to 9""")
    for result in results:
        log_probs = "".join(f"{result.log_probs[name]:10.1f}" for name in OWN)
        print(
            f"{result.title:28}{foreign(shares(result.classes), result.name):11.3f}"
            f"{foreign(result.expected, result.name):10.3f}{confidence(result.classes):12.3f}"
            f"     {log_probs}"
        )
    judged = {result.title: result.classes for result in results}
    for name, digits in OWN.items():
        classes = judge(of(digits, x, y))
        judged[f"Real test images, {TITLES[name][-6:]}"] = classes
        print(
            f"{list(judged)[-1]:28}{foreign(shares(classes), name):11.3f}{0:10.3f}"
            f"{confidence(classes):12.3f}"
        )
    print(f"\n{'judged to be':28}" + "".join(f"{digit:6}" for digit in range(NUM_CLASSES)))
    for title, classes in judged.items():
        print(f"{title:28}" + "".join(f"{share:6.3f}" for share in shares(classes).tolist()))


def picture(results: list[Result], side: int, path: Path) -> None:
    """Draws dreams and the shares of their classes, of all models without and with exchange."""
    figure = Figure(figsize=(8, 6.8), layout="constrained")
    figure.suptitle(
        "Dreams, and how many are judged to be of each digit:\n"
        "the model's own (blue), those it never had (orange), expected (black line)",
        fontsize=10,
    )
    columns: Any = figure.subfigures(2, 2, wspace=0.04, hspace=0.04)
    for part, result in zip(columns.T.flat, results, strict=True):  # alone, then with exchange
        panel(part, result, side)
    figure.savefig(path, dpi=100)


def panel(part: SubFigure, result: Result, side: int, num_rows: int = 3) -> None:
    """Draws one of them; the probability of a pixel is the strength of its colour."""
    top, bottom = part.subplots(2, 1, height_ratios=[1.2, 1])
    classes = list(range(NUM_CLASSES))
    colors = ["tab:blue" if c in OWN[result.name] else "tab:orange" for c in classes]
    inks = torch.tensor([to_rgb(color) for color in colors]).to(result.pixels)
    shown = slice(NUM_CLASSES * num_rows)
    lack = 1 - inks[result.classes[shown].argmax(-1)]
    tiles = torch.einsum("np,nk->nkp", result.pixels[shown], lack).unflatten(-1, (side, side))
    canvas = functional.pad(tiles, (1, 1, 1, 1)).unflatten(0, (num_rows, NUM_CLASSES))
    rgb = 1 - canvas.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    top.imshow(rgb.numpy(force=True))
    top.set_axis_off()
    top.set_title(result.title, fontsize=11)
    bottom.bar(classes, shares(result.classes).tolist(), color=colors)
    edges = [c - 0.5 for c in range(NUM_CLASSES + 1)]
    bottom.stairs(result.expected.tolist(), edges, color="black", linewidth=1.2)
    bottom.set_xticks(classes)
    bottom.set_ylim(0, 0.32)
    bottom.tick_params(labelsize=8)
    bottom.set_title(
        f"never had: {foreign(shares(result.classes), result.name):.1%} of dreams, "
        f"expected {foreign(result.expected, result.name):.1%}",
        fontsize=9,
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the options of the program."""
    options = parser("Two models learn digits that they never had from each other.", SETTINGS)
    options.add_argument(
        "--alpha",
        type=share,
        default=0.5,
        help="the weight of its own images; the dreams of the other have the rest, and with 1 "
        "there is no exchange (default: %(default)s)",
    )
    return options.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Trains the models alone and then with exchange; reports and draws what they have learned."""
    settings = begun(options, SETTINGS[options.data])
    images = load(options.data, options.data_root).to(options.device)
    pyro.clear_param_store()
    pyro.set_rng_seed(options.seed)
    judge = Judge(images, settings.judge_steps)
    vaes = {name: VAE(name, images.x.shape[-1], settings).to(images.x) for name in OWN}
    results, seconds = [], 0.0
    for alpha, how in ((1.0, "alone"), (options.alpha, f"alpha {options.alpha:g}")):
        print(f"{settings.steps} steps, {how}", flush=True)
        seconds += learn(vaes, images, alpha, settings)
        results += [measure(vae, alpha, how, judge, images) for vae in vaes.values()]
    report(results, judge, images)
    path = options.out / f"data_exchange-{options.data}.png"
    picture(results, images.side, path)
    print(f"\ntraining {seconds:.0f} s. The picture is in {path}.")


def main(arguments: list[str] | None = None) -> None:
    """Runs the program."""
    options = parse(arguments)
    with ended_cleanly("data_exchange.py", DataError):
        run(options)


if __name__ == "__main__":
    main()
