r"""Learns to draw and to classify digits; the classifier never sees a labelled image.

A labelled ladder of binary latents, style bits :math:`s` and a class :math:`y`, then bits
:math:`z_1`, is learned as in eq. 16 of Flach, Schlesinger, Shekhovtsov (2024). On images with
classes, :math:`(x, y) \sim \pi`, the players climb

.. math::
    L_p(\theta, \varphi) &= \mathbb{E}_{\pi(x, y)} \mathbb{E}_{q(s \mid x) \, q(z_1 \mid s, y, x)}
        [\log p_\theta(x, s, y, z_1)], \\
    L_q(\theta, \varphi) &= \mathbb{E}_{p_\theta(x, s, y, z_1)} [\log q_\varphi(s, y, z_1 \mid x)].

So the classes of the data teach the decoder alone. The encoder learns from dreams, whose classes
it knows because the decoder drew them, and is then asked for the classes of held-out images.

Run ``python examples/digits.py --help`` for the options.
"""

import argparse
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from threading import Event
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from cli import begun, ended_cleanly, parser

with ended_cleanly("digits.py"):
    from tqdm import tqdm

    from data import DataError, Images, load
    from figures import draw
    from networks import LadderVAE
    from pyro_symeq import SymmetricEquilibrium
    from pyro_symeq.metrics import information
    from training import cosine


class CheckpointError(Exception):
    """A checkpoint from which this training can't go on; the message says what to do."""


@dataclass(frozen=True)
class Settings:
    """What a training depends on, besides the data set and the seed.

    Args:
        steps: The number of steps, over which the learning rate falls to zero along a cosine.
        batch_size: The number of images of a step, and of dreams.
        learning_rate: The learning rate at the start, of both players.
        weight_decay: The weight decay of both players.
        num_styles: The number of style bits.
        num_units: The number of bits of z1.
        width: The number of hidden units of a layer.
        num_channels: The number of channels of the decoder, if it has convolutions.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    num_styles: int
    num_units: int
    width: int
    num_channels: int | None


SETTINGS = {
    "digits": Settings(1500, 256, 5e-3, 0.05, 8, 30, 256, None),
    "mnist": Settings(16000, 128, 2e-3, 0.0, 30, 100, 512, 16),
    "fashion": Settings(16000, 128, 2e-3, 0.0, 30, 100, 512, 16),
}


class Training:
    """A pair, its data and how far it has come.

    Args:
        name: The name of the data set.
        images: The data set.
        seed: The seed of the initial parameters and of all draws.
        settings: What else the training depends on.
        checkpoint: The file to which the state is saved.
    """

    def __init__(
        self, name: str, images: Images, seed: int, settings: Settings, checkpoint: Path
    ) -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        self.identity = {"data": name, "seed": seed, **asdict(settings)}
        self.images = images
        self.settings = settings
        self.checkpoint = checkpoint
        self.seconds = 0.0
        self.bits: float | None = None
        self.vae = LadderVAE(
            images.side,
            settings.num_styles,
            settings.num_units,
            settings.width,
            settings.num_channels,
        ).to(images.x.device)
        schedule = settings.steps, settings.learning_rate, settings.weight_decay
        self.optims = cosine(*schedule), cosine(*schedule)
        self.symeq = SymmetricEquilibrium(
            self.vae.model,
            self.vae.guide,
            self.optims,
            supervise_encoder=False,  # it learns from dreams alone
            code_warmup=0,
            watch=50,
        )

    @property
    def num_steps(self) -> int:
        """The number of steps that have been taken."""
        return self.symeq.num_steps

    def run(self) -> bool:
        """Takes the steps that are left; saves the state at times and at the end.

        Returns:
            Whether all steps are done, and not an interrupt came first.
        """
        steps = self.settings.steps
        every = math.ceil(steps / 10)
        start = time.perf_counter() - self.seconds
        mean = None
        with (
            interrupts() as interrupted,
            tqdm(total=steps, initial=self.num_steps, unit="step", mininterval=0.5) as bar,
        ):
            while self.num_steps < steps and not interrupted.is_set():
                utilities = self.step()
                mean = utilities if mean is None else mean.lerp(utilities, 0.02)
                self.seconds = time.perf_counter() - start
                told = "" if self.bits is None else f", {self.bits:.1f} bits in latents"
                bar.set_postfix_str(
                    f"L_p {mean[0]:.1f}, L_q {mean[1]:.1f} nats{told}", refresh=False
                )
                bar.update()
                if self.num_steps % every == 0:
                    bar.write(self.line(mean))
                    self.save()
        self.save()
        return self.num_steps == steps

    def step(self) -> Tensor:
        """Moves both players on a batch; returns their utilities per image."""
        x, y = self.images.x, self.images.y
        batch = torch.randint(len(x), (self.settings.batch_size,)).to(x.device)
        loss = self.symeq.step(x[batch], y[batch])
        for optim in self.optims:
            optim.step()
        if loss.information is not None:
            self.bits = sum(bits.sum().item() for bits in loss.information.values())
        return torch.tensor([loss.decoder, loss.encoder]) / len(batch)

    def line(self, utilities: Tensor) -> str:
        """How far the training has come."""
        return (
            f"step {self.num_steps:6d}  {self.seconds:5.0f} s  "
            f"L_p {utilities[0]:7.2f}  L_q {utilities[1]:7.2f}  "
            f"held-out accuracy {self.accuracy():.4f}"
        )

    @torch.no_grad()
    def accuracy(self) -> float:
        """The part of the held-out images whose class is the encoder's most probable one."""
        _, y_logits, _ = self.vae.encoder(self.images.held_out_x)
        y = self.images.held_out_y.argmax(-1)
        return (y_logits.argmax(-1) == y).float().mean().item()

    def save(self) -> None:
        """Writes the checkpoint; at no time is there half of one."""
        state = {
            "identity": self.identity,
            "seconds": self.seconds,
            "symeq": self.symeq.state_dict(),
        }
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.checkpoint)

    def resume(self) -> None:
        """Reads the checkpoint.

        Raises:
            CheckpointError: There is none, it is damaged, or it is another training's.
        """
        path = self.checkpoint
        if not path.exists():
            raise CheckpointError(f"There is no checkpoint {path}. Start without --resume.")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            other, own = state["identity"], self.identity
        except (EOFError, KeyError, RuntimeError, TypeError, UnpicklingError) as error:
            raise CheckpointError(f"{path} is damaged. Start without --resume.") from error
        differing = [f"{k}={other.get(k)} (now {own[k]})" for k in own if own[k] != other.get(k)]
        if differing:
            raise CheckpointError(
                f"The checkpoint {path} is of a training with {', '.join(differing)}. Give the "
                "same options, or start without --resume."
            )
        self.symeq.load_state_dict(state["symeq"])
        self.seconds = state["seconds"]


@contextmanager
def interrupts() -> Iterator[Event]:
    """Turns the first Ctrl-C into an event, so that a step is not left half done."""
    interrupted = Event()

    def handle(*_: Any) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


def _mean(trace: poutine.Trace, site: str) -> Tensor:
    """The mean of the distribution of a site; of binary variables, their probabilities."""
    distribution: Any = trace.nodes[site]["fn"]
    return distribution.mean


def report(training: Training) -> None:
    """Prints what a trained pair can do, on the held-out images."""
    x, y = training.images.held_out_x, training.images.held_out_y
    loss = training.symeq.evaluate_loss(x, y)
    latents = information(training.vae.guide, x[:1000], num_draws=100)
    bits = {site: each.sum().item() for site, each in latents.items()}
    print(f"""
held-out accuracy of the encoder      {training.accuracy():9.4f}
utility of the decoder, L_p           {loss.decoder / len(x):9.2f} nats per image
utility of the encoder, L_q           {loss.encoder / len(x):9.2f} nats per image
information about the image in class  {bits["class"]:9.2f} bits
                            in style  {bits["style"]:9.2f} bits
                            in z1     {bits["z1"]:9.2f} bits
training                              {training.seconds:9.1f} s""")


@torch.no_grad()
def picture(training: Training, path: Path, num_rows: int = 2, num_samples: int = 6) -> None:
    """Draws held-out images, reconstructions and samples; gray is the probability of a pixel."""
    vae, images = training.vae, training.images
    by_class = [images.held_out_x[images.held_out_y[:, c] == 1][:num_rows] for c in range(10)]
    x = torch.stack(by_class, dim=1)
    latents = poutine.trace(vae.guide).get_trace(x.flatten(0, 1))
    reconstructed = poutine.trace(poutine.replay(vae.model, latents)).get_trace(x.flatten(0, 1))
    y = torch.eye(10).to(x).repeat(num_samples, 1)
    sampled = poutine.trace(vae.model).get_trace(x.new_zeros(len(y), x.shape[-1]), y)
    title = f"{training.identity['data']}: a ladder whose encoder has learned from dreams alone"
    samples = _mean(sampled, "x").view(num_samples, *x.shape[1:])
    draw(path, title, x, _mean(reconstructed, "x").view_as(x), samples)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the options of the program."""
    options = parser("Learns to draw and to classify digits.", SETTINGS)
    options.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    return options.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Trains a pair, reports and draws what it has learned."""
    settings = begun(options, SETTINGS[options.data])
    images = load(options.data, options.data_root).to(options.device)
    checkpoint = options.out / f"{options.data}.pt"
    training = Training(options.data, images, options.seed, settings, checkpoint)
    if options.resume:
        training.resume()
    if not training.run():
        raise SystemExit(
            f"Stopped at step {training.num_steps}, which is kept in {checkpoint}. To go on, give "
            "the same options and --resume."
        )
    report(training)
    path = options.out / f"{options.data}.png"
    picture(training, path)
    print(f"\nThe picture is in {path}, the checkpoint in {checkpoint}.")


def main(arguments: list[str] | None = None) -> None:
    """Runs the program."""
    options = parse(arguments)
    with ended_cleanly("digits.py", CheckpointError, DataError):
        run(options)


if __name__ == "__main__":
    main()
