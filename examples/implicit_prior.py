r"""Learns with a prior that can only be sampled, which no ELBO can: it needs the prior's density.

Somebody else's program draws latents :math:`z`; all that we can do is to run it. An instrument
whose settings :math:`\theta` nobody knows makes binary pictures of them,
:math:`x \sim p_\theta(x \mid z)`, and the pictures are all that is given. To be found are the
settings, and an encoder :math:`q_\varphi(z \mid x)` that tells what is in a picture:

.. math::
    L_p(\theta, \varphi) &= \mathbb{E}_{\pi(x)} \mathbb{E}_{q_\varphi(z \mid x)}
        [\log p_\theta(x \mid z)] + \text{const}, \\
    L_q(\theta, \varphi) &= \mathbb{E}_{p(z)} \mathbb{E}_{p_\theta(x \mid z)}
        [\log q_\varphi(z \mid x)].

There are two such programs.

- ``walk``: a simulator of a creature that wanders in a box and bounces off its walls; :math:`z` are
  points of its way. A camera films it, a frame for each point, in which the last one glows on.
- ``codes``: a generator that has learned digits, a ladder :math:`p(s, y) \, p(z \mid s, y)` of
  binary latents; :math:`z` are its codes, whose density is a sum over all :math:`s` and :math:`y`.
  A screen shows the generator's pictures and gets pixels wrong. The pictures given are of real
  digits that the generator has not seen.

Pictures whose :math:`z`, or clean picture, is known are held out. On these, the encoder of the game
is compared with one that is trained in the same way on dreams of the true instrument, and with one
that takes the instrument for what it seemed to be at first.

Run ``python examples/implicit_prior.py --help`` for the options.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.nn import functional

from cli import begun, ended_cleanly, parser

with ended_cleanly("implicit_prior.py"):
    from data import DataError, Images, load
    from layers import linear
    from long_runs import LongRun, RunError, add_options, run_path, write_record
    from networks import LadderVAE
    from pyro_symeq import Implicit, SymmetricEquilibrium, SymmetricLoss
    from tiles import draw
    from training import cosine, train

NUM_POINTS = 6  # of a way
SIDE = 10  # of a frame
NUM_STYLES, NUM_CODES = 8, 30  # bits of the generator of digits
NUM_SEEN = 700  # digits from which the generator learns; others are given as pictures only
NUM_DRAWS = 30  # of an encoder, for what it makes of a picture
LEAST_COVERED, MOST_COVERED = 0.05, 0.95
GAME, TOLD, GUESSED = "the game", "true instrument", "first guess of it"


@dataclass(frozen=True)
class Settings:
    """What a training depends on, besides the scene and the seed.

    Args:
        steps: The number of steps, over which the learning rate falls to zero along a cosine.
        batch_size: The number of pictures of a step, and of dreams.
        learning_rate: The learning rate of the encoder at the start.
        instrument_rate: The one of the instrument.
        width: The number of hidden units of a layer of the encoder.
        num_pictures: The number of pictures of the simulator, for training and again for testing.
        generator_steps: The number of steps in which the generator of codes learns.
    """

    steps: int
    batch_size: int = 128
    learning_rate: float = 3e-3
    instrument_rate: float = 1e-2
    width: int = 256
    num_pictures: int = 10_000
    generator_steps: int = 1200


SMOKE = Settings(4, batch_size=16, width=16, num_pictures=50, generator_steps=2)
PRESETS = {
    "laptop": {"walk": Settings(3000), "codes": Settings(1000)},
    "smoke": {"walk": SMOKE, "codes": SMOKE},
}


def walk(shape: torch.Size, device: torch.device) -> Tensor:
    r"""The simulator: ways of a creature in the box :math:`[-1, 1]^2`, point after point.

    Args:
        shape: How many.
        device: Where.

    Returns:
        The coordinates of the points, with shape :math:`(*shape, 2T)`.
    """

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(shape, device=device)

    position = 2 * torch.rand(*shape, 2, device=device) - 1
    heading = 2 * torch.pi * torch.rand(shape, device=device)
    speed = 0.25 + 0.25 * torch.rand(shape, device=device)
    points = []
    for _ in range(NUM_POINTS):
        points.append(1 - ((position + 1) % 4 - 2).abs())  # walls are mirrors
        heading = heading + noise(0.4)
        stride = speed * noise(0.2).exp()
        position = position + stride[..., None] * torch.stack([heading.cos(), heading.sin()], -1)
    return torch.cat(points, dim=-1)


class Camera(nn.Module):
    """Films ways, a frame for each point.

    Args:
        blur: The standard deviation of a point's blur.
        afterglow: How much of the point before is left.
        contrast: The logit that a point adds to a pixel that it hits.
        background: The logit of an empty pixel.
    """

    def __init__(self, blur: float, afterglow: float, contrast: float, background: float) -> None:
        super().__init__()
        self.log_blur = nn.Parameter(torch.tensor(blur).log())
        self.log_afterglow = nn.Parameter(torch.tensor(afterglow).log())
        self.log_contrast = nn.Parameter(torch.tensor(contrast).log())
        self.background = nn.Parameter(torch.tensor(background))
        line = torch.linspace(-1.1, 1.1, SIDE)
        self.register_buffer("pixels", torch.cartesian_prod(-line, line).flip(-1))

    def forward(self, z: Tensor) -> Tensor:
        """The logits of pixels, with shape :math:`(*, D)`."""
        points = z.unflatten(-1, (NUM_POINTS, 1, 2))
        squares = (points - self.get_buffer("pixels")).square().sum(-1)
        light = torch.exp(-squares / (2 * (2 * self.log_blur).exp()))
        before = functional.pad(light[..., :-1, :], (0, 0, 1, 0))
        light = light + self.log_afterglow.exp() * before
        return (self.background + self.log_contrast.exp() * light).flatten(-2)

    def readings(self) -> dict[str, float]:
        """The settings by name."""
        return {
            "blur": self.log_blur.exp().item(),
            "afterglow": self.log_afterglow.exp().item(),
            "contrast": self.log_contrast.exp().item(),
            "background": self.background.item(),
        }


class Screen(nn.Module):
    """Shows pictures of a generator, and gets pixels wrong.

    Args:
        draw: Takes codes and returns the logits of pixels.
        ink: The probability that a pixel with ink is shown with ink.
        blank: The probability that a pixel without ink is.
    """

    def __init__(self, draw: Callable[[Tensor], Tensor], ink: float, blank: float) -> None:
        super().__init__()
        self.draw = draw
        self.rates = nn.Parameter(torch.tensor([blank, ink]).logit())

    def forward(self, z: Tensor) -> Tensor:
        """The logits of pixels, with shape :math:`(*, D)`."""
        return self.show(self.draw(z).sigmoid())

    def show(self, picture: Tensor) -> Tensor:
        """The logits of pixels, given the probabilities of ink."""
        blank, ink = self.rates.sigmoid()
        return torch.logit(blank + (ink - blank) * picture, eps=1e-6)

    def readings(self) -> dict[str, float]:
        """The settings by name."""
        blank, ink = self.rates.sigmoid().tolist()
        return {"shown where ink is": ink, "shown where none is": blank}


class Normals(nn.Module):
    """An encoder whose latents are independent normal variables."""

    def __init__(self, num_pixels: int, width: int, num_latents: int) -> None:
        super().__init__()
        self.network = network(num_pixels, width, 2 * num_latents)

    def forward(self, x: Tensor) -> dist.Independent:
        """The law of the latents, given pictures."""
        loc, scale = self.network(2 * x - 1).chunk(2, dim=-1)
        return dist.Normal(loc, functional.softplus(scale - 1) + 1e-3).to_event(1)


class Bits(nn.Module):
    """An encoder whose latents are independent bits."""

    def __init__(self, num_pixels: int, width: int, num_latents: int) -> None:
        super().__init__()
        self.network = network(num_pixels, width, num_latents)

    def forward(self, x: Tensor) -> dist.Independent:
        """The law of the latents, given pictures."""
        return bits(self.network(2 * x - 1))


def network(num_inputs: int, width: int, num_outputs: int) -> nn.Module:
    """Three affine layers with smooth activations between them."""
    return nn.Sequential(
        linear(num_inputs, width),
        nn.SiLU(),
        linear(width, width),
        nn.SiLU(),
        linear(width, num_outputs),
    )


def bits(logits: Tensor) -> dist.Independent:
    """Independent binary variables along the last dimension."""
    return dist.Bernoulli(logits=logits).to_event(1)


class Pair(nn.Module):
    """The pair of programs.

    Args:
        name: The name, which sets its parameters apart from those of others.
        prior: The program that draws latents.
        instrument: Makes pictures of them.
        encoder: Tells what is in a picture.
    """

    def __init__(
        self, name: str, prior: Implicit, instrument: Camera | Screen, encoder: nn.Module
    ) -> None:
        super().__init__()
        self.name = name
        self.prior = prior
        self.instrument = instrument
        self.encoder = encoder

    def model(self, x: Tensor) -> None:
        """The decoder's program.

        Args:
            x: Pictures, with shape :math:`(N, D)`.
        """
        pyro.module(f"{self.name}.instrument", self.instrument)
        with pyro.plate("pictures", len(x)):
            z = pyro.sample("z", self.prior)
            pyro.sample("x", bits(self.instrument(z)), obs=x)

    def guide(self, x: Tensor) -> None:
        """The encoder's program.

        Args:
            x: Pictures, with shape :math:`(N, D)`.
        """
        pyro.module(f"{self.name}.encoder", self.encoder)
        with pyro.plate("pictures", len(x)):
            pyro.sample("z", self.encoder(x))


class Walks:
    """Pictures of a simulated creature's ways.

    Args:
        settings: How many, and how large networks are.
        device: Where they are.
    """

    true = {"blur": 0.25, "afterglow": 0.5, "contrast": 5.0, "background": -4.0}
    first = {"blur": 0.4, "afterglow": 0.2, "contrast": 3.0, "background": -3.0}

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.width = settings.width
        self.device = device
        self.prior = Implicit(lambda shape: walk(shape, device), event_shape=(2 * NUM_POINTS,))
        camera = self.instrument(self.true)
        ways = self.prior.sample((2 * settings.num_pictures,))
        with torch.no_grad():
            x = torch.cat([bits(camera(part)).sample() for part in ways.split(1000)])
        self.x, self.held_out_x = x.chunk(2)
        self.ways = ways.chunk(2)[1]

    def instrument(self, readings: dict[str, float]) -> Camera:
        """A camera with these settings."""
        return Camera(**readings).to(self.device)

    def encoder(self) -> Normals:
        """An untrained encoder."""
        return Normals(NUM_POINTS * SIDE**2, self.width, 2 * NUM_POINTS).to(self.device)

    @torch.no_grad()
    def nothing(self) -> dict[str, float]:
        """What is known without a picture."""
        low, high = self.ways.quantile(self.ways.new_tensor([LEAST_COVERED, MOST_COVERED]), 0)
        return self._errors(self.ways.mean(0), low, high)

    @torch.no_grad()
    def measure(self, pair: Pair) -> dict[str, float]:
        """How well the encoder finds the ways in held-out pictures."""
        law = pair.encoder(self.held_out_x)
        half = dist.Normal(0.0, 1.0).icdf(torch.tensor(MOST_COVERED)) * law.variance.sqrt()
        return self._errors(law.mean, law.mean - half, law.mean + half)

    def _errors(self, mean: Tensor, low: Tensor, high: Tensor) -> dict[str, float]:
        covered = (low < self.ways) & (self.ways < high)
        return {
            "root-mean-square error": (mean - self.ways).square().mean().sqrt().item(),
            "in 90 % intervals": covered.float().mean().item(),
        }

    @torch.no_grad()
    def picture(self, path: Path, pair: Pair, num_films: int = 4) -> None:
        """Draws films, what they would show with a perfect camera, and what the encoder finds."""
        perfect = Camera(blur=0.15, afterglow=0.0, contrast=9.0, background=-6.0).to(self.device)
        x, ways = self.held_out_x[:num_films], self.ways[:num_films]
        found = perfect(pair.encoder(x).sample((NUM_DRAWS,))).sigmoid().mean(0)
        images = torch.stack([x, perfect(ways).sigmoid(), found], dim=1)
        films = images.view(-1, NUM_POINTS, SIDE, SIDE)
        labels = [f"{what} {n}" for n in range(1, len(x) + 1) for what in ("film", "way", "found")]
        draw(path, "Films of a creature, and its ways", dict(zip(labels, films, strict=True)))


class Codes:
    """Pictures of digits on a bad screen, with the codes of a generator that has learned digits.

    Args:
        images: Digits; the generator learns from the first of them.
        settings: How long the generator learns, and how large networks are.
        device: Where they are.
    """

    true = {"ink": 0.6, "blank": 0.1}
    first = {"ink": 0.9, "blank": 0.05}

    def __init__(self, images: Images, settings: Settings, device: torch.device) -> None:
        self.width = settings.width
        self.device = device
        self.generator = generator(images, settings).to(device)
        self.prior = Implicit(self.codes, event_shape=(NUM_CODES,))
        screen = self.instrument(self.true)
        self.digits = images.held_out_x
        with torch.no_grad():
            self.x, self.held_out_x = (
                bits(screen.show(digits)).sample() for digits in (images.x[NUM_SEEN:], self.digits)
            )

    def codes(self, shape: torch.Size) -> Tensor:
        """Runs the generator as far as its codes."""
        decoder = self.generator.decoder
        style = torch.full((*shape, NUM_STYLES), 0.5, device=self.device).bernoulli()
        classes = torch.randint(10, shape, device=self.device)
        return bits(decoder.z1(style, functional.one_hot(classes, 10).to(style))).sample()

    def instrument(self, readings: dict[str, float]) -> Screen:
        """A screen with these settings."""
        return Screen(self.generator.decoder.x, **readings).to(self.device)

    def encoder(self) -> Bits:
        """An untrained encoder."""
        return Bits(self.digits.shape[-1], self.width, NUM_CODES).to(self.device)

    @torch.no_grad()
    def nothing(self) -> dict[str, float]:
        """What is known without a generator, from the pixels alone."""
        return self._errors(self.held_out_x)

    @torch.no_grad()
    def measure(self, pair: Pair) -> dict[str, float]:
        """How well the encoder finds the digits in held-out pictures."""
        return self._errors(self.clean(pair, self.held_out_x))

    def clean(self, pair: Pair, x: Tensor) -> Tensor:
        """The probabilities of ink in what the pictures show."""
        z = pair.encoder(x).sample((NUM_DRAWS,))
        return self.generator.decoder.x(z).sigmoid().mean(0)

    def _errors(self, pictures: Tensor) -> dict[str, float]:
        return {"wrong pixels": ((pictures > 0.5) != (self.digits > 0.5)).float().mean().item()}

    @torch.no_grad()
    def picture(self, path: Path, pair: Pair, num_pictures: int = 14) -> None:
        """Draws digits, what the screen shows, and what the encoder makes of it."""
        x = self.held_out_x[:num_pictures]
        rows = {
            "digit": self.digits[:num_pictures],
            "screen": x,
            "found": self.clean(pair, x),
            "prior": self.generator.decoder.x(self.prior.sample((len(x),))).sigmoid(),
        }
        side = round(x.shape[-1] ** 0.5)
        images = {name: row.unflatten(-1, (side, side)) for name, row in rows.items()}
        draw(path, "Digits behind a bad screen, by a generator's codes", images)


def generator(images: Images, settings: Settings) -> LadderVAE:
    """Trains somebody's generator of digits, and closes it."""
    vae = LadderVAE(images.side, NUM_STYLES, NUM_CODES, width=128, num_channels=None)
    vae.to(images.x.device)
    x, y = images.x[:NUM_SEEN], images.y[:NUM_SEEN]

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(x), (settings.batch_size,), device=x.device)
        return x[rows], y[rows]

    optim = cosine(settings.generator_steps, 5e-3, weight_decay=0.05)
    symeq = SymmetricEquilibrium(vae.model, vae.guide, optim, supervise_encoder=False)
    train(symeq, optim, batch, settings.generator_steps)
    pyro.clear_param_store()
    return vae.requires_grad_(False)


Scene = Walks | Codes


def refusal(pair: Pair, x: Tensor) -> str:
    """What becomes of the pair with Pyro's ELBO: an error, whose message is returned."""
    svi = SVI(pair.model, pair.guide, cosine(1, 1e-3), loss=Trace_ELBO())
    try:
        svi.step(x)
    except NotImplementedError as error:
        return str(error)
    raise AssertionError("An ELBO needs the density of the prior.")


class Training:
    """A pair that learns.

    Args:
        name: What it is told of the instrument; all but the game keep what they are told.
        scene: The pictures and the prior.
        settings: What else the training depends on.
        seed: The seed of the initial parameters and of all draws.
    """

    def __init__(self, name: str, scene: Scene, settings: Settings, seed: int) -> None:
        pyro.set_rng_seed(seed)
        readings = scene.true if name == TOLD else scene.first
        self.pair = Pair(name, scene.prior, scene.instrument(readings), scene.encoder())
        self.x = scene.x
        self.settings = settings
        self.batch_size = settings.batch_size
        self.optims = (
            cosine(settings.steps, settings.instrument_rate),
            cosine(settings.steps, settings.learning_rate),
        )
        self.symeq = SymmetricEquilibrium(
            self.pair.model,
            self.pair.guide,
            self.optims,
            encoder_warmup=0 if name == GAME else settings.steps,  # then the encoder moves alone
            code_warmup=0,
            capture=True,
        )

    def step(self) -> SymmetricLoss:
        """Moves both players on a batch."""
        rows = torch.randint(len(self.x), (self.batch_size,), device=self.x.device)
        loss = self.symeq.step(self.x[rows])
        for optim in self.optims:
            optim.step()
        return loss

    def utilities(self, loss: SymmetricLoss) -> dict[str, float]:
        """Both utilities of a step (nats per picture)."""
        return {"L_p": loss.decoder / self.batch_size, "L_q": loss.encoder / self.batch_size}


def parts(options: argparse.Namespace) -> tuple[object, ...]:
    """What the names of all files of a run begin with."""
    return "implicit", options.data, options.preset, options.seed


def learn(
    training: Training, name: str, scene: Scene, options: argparse.Namespace
) -> LongRun[Any]:
    """Trains a pair, or goes on from its checkpoint."""
    settings = training.settings
    path = run_path(options, *parts(options), name.replace(" ", "-"))
    run = LongRun(
        training.symeq,
        training.step,
        steps=settings.steps,
        identity={"pair": name, "seed": options.seed, **asdict(settings)},
        checkpoint=path.with_suffix(".pt"),
        read=training.utilities,
        look=lambda: scene.measure(training.pair),
        num_looks=4,
        tensorboard=options.out / "tensorboard" / path.name if options.tensorboard else None,
    )
    if options.resume and (name == GAME or run.checkpoint.exists()):
        run.resume(training.x[:2])
    run.train()
    return run


def report(figures: dict[str, Any], seconds: dict[str, float]) -> None:
    """Prints what was found."""
    print(f"\n{'settings of the instrument':28} {'true':>8} {'at first':>8} {'found':>8}")
    for name, values in figures["instrument"].items():
        print(f"{name:28} " + " ".join(f"{value:8.3f}" for value in values.values()))
    for what in figures["held out"]["nothing"]:
        print(f"\nheld out: {what}")
        for name, measured in figures["held out"].items():
            print(f"{name:28} {measured[what]:8.4f}")
    print(f"\ntraining of the game {seconds[GAME]:.1f} s")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the options of the program."""
    options = parser("Learns with a prior that can only be sampled.", ("walk", "codes"))
    add_options(options, PRESETS)
    return options.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Trains the pairs, and tells and draws what they have found."""
    settings = begun(options, PRESETS[options.preset][options.data])
    pyro.clear_param_store()
    pyro.set_rng_seed(options.seed)
    scene: Scene
    if options.data == "walk":
        scene = Walks(settings, options.device)
    else:
        images = load("digits", options.data_root).to(options.device)
        scene = Codes(images, settings, options.device)
    trainings = {
        name: Training(name, scene, settings, options.seed) for name in (GAME, TOLD, GUESSED)
    }
    game = trainings[GAME].pair
    refused = refusal(game, scene.x[:2])
    print(f"Pyro's ELBO ends in an error: {refused}\n")
    runs = {name: learn(training, name, scene, options) for name, training in trainings.items()}
    readings = [scene.instrument(known).readings() for known in (scene.true, scene.first)]
    found = game.instrument.readings()
    figures = {
        "error of the ELBO": refused,
        "instrument": {
            name: {"true": readings[0][name], "at first": readings[1][name], "found": found[name]}
            for name in found
        },
        "held out": {
            "nothing": scene.nothing(),
            **{name: scene.measure(training.pair) for name, training in trainings.items()},
        },
    }
    seconds = {name: run.seconds for name, run in runs.items()}
    report(figures, seconds)
    path = run_path(options, *parts(options))
    scene.picture(path.with_suffix(".png"), game)
    write_record(
        path.with_suffix(".json"),
        "implicit_prior.py",
        settings={"data": options.data, "seed": options.seed, **asdict(settings)},
        figures=figures,
        seconds=seconds,
        device=options.device,
        history=runs[GAME].history,
    )
    print(
        f"\nThe picture is {path.with_suffix('.png')}, the figures are {path.with_suffix('.json')}."
    )


def main(arguments: list[str] | None = None) -> None:
    """Runs the program."""
    options = parse(arguments)
    with ended_cleanly("implicit_prior.py", RunError, DataError), pyro.validation_enabled(False):
        run(options)


if __name__ == "__main__":
    main()
