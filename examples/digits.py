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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributed import ProcessGroup

from cli import begun, ended_cleanly, parser

with ended_cleanly("digits.py"):
    from data import DataError, Images, load
    from figures import draw
    from long_runs import LongRun, RunError, add_options
    from networks import LadderVAE
    from pyro_symeq import SymmetricEquilibrium, SymmetricLoss
    from pyro_symeq.metrics import information
    from training import cosine


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
    """A pair that learns.

    Args:
        images: The data set.
        seed: The seed of the initial parameters and of all draws.
        settings: What else the training depends on.
        process_group: Processes that train together, each on images of its own.
    """

    def __init__(
        self,
        images: Images,
        seed: int,
        settings: Settings,
        process_group: ProcessGroup | None = None,
    ) -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        self.images = images
        self.batch_size = settings.batch_size
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
            process_group=process_group,
        )

    def step(self) -> SymmetricLoss:
        """Moves both players on a batch."""
        x, y = self.images.x, self.images.y
        batch = torch.randint(len(x), (self.batch_size,), device=x.device)
        loss = self.symeq.step(x[batch], y[batch])
        for optim in self.optims:
            optim.step()
        return loss

    def utilities(self, loss: SymmetricLoss) -> dict[str, float]:
        """Both utilities of a step (nats per image)."""
        return {"L_p": loss.decoder / self.batch_size, "L_q": loss.encoder / self.batch_size}

    def look(self) -> dict[str, float]:
        """How far the training has come, on the held-out images."""
        latents = information(self.vae.guide, self.images.held_out_x[:1000])
        bits = sum(bits.sum().item() for bits in latents.values())
        return {"bits in latents": bits, "held-out accuracy": self.accuracy()}

    @torch.no_grad()
    def accuracy(self) -> float:
        """The part of the held-out images whose class is the encoder's most probable one."""
        _, y_logits, _ = self.vae.encoder(self.images.held_out_x)
        y = self.images.held_out_y.argmax(-1)
        return (y_logits.argmax(-1) == y).float().mean().item()


def _mean(trace: poutine.Trace, site: str) -> Tensor:
    """The mean of the distribution of a site; of binary variables, their probabilities."""
    distribution: Any = trace.nodes[site]["fn"]
    return distribution.mean


def report(training: Training, seconds: float) -> None:
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
training                              {seconds:9.1f} s""")


@torch.no_grad()
def picture(
    training: Training, name: str, path: Path, num_rows: int = 2, num_samples: int = 6
) -> None:
    """Draws held-out images, reconstructions and samples; gray is the probability of a pixel."""
    vae, images = training.vae, training.images
    by_class = [images.held_out_x[images.held_out_y[:, c] == 1][:num_rows] for c in range(10)]
    x = torch.stack(by_class, dim=1)
    latents = poutine.trace(vae.guide).get_trace(x.flatten(0, 1))
    reconstructed = poutine.trace(poutine.replay(vae.model, latents)).get_trace(x.flatten(0, 1))
    y = torch.eye(10).to(x).repeat(num_samples, 1)
    sampled = poutine.trace(vae.model).get_trace(x.new_zeros(len(y), x.shape[-1]), y)
    title = f"{name}: a ladder whose encoder has learned from dreams alone"
    samples = _mean(sampled, "x").view(num_samples, *x.shape[1:])
    draw(path, title, x, _mean(reconstructed, "x").view_as(x), samples)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the options of the program."""
    options = parser("Learns to draw and to classify digits.", SETTINGS)
    add_options(options)
    return options.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Trains a pair, reports and draws what it has learned."""
    settings = begun(options, SETTINGS[options.data])
    images = load(options.data, options.data_root).to(options.device)
    checkpoint = options.out / f"{options.data}.pt"
    training = Training(images, options.seed, settings)
    long_run = LongRun(
        training.symeq,
        training.step,
        steps=settings.steps,
        identity={"data": options.data, "seed": options.seed, **asdict(settings)},
        checkpoint=checkpoint,
        read=training.utilities,
        look=training.look,
        tensorboard=options.out / "tensorboard" / options.data if options.tensorboard else None,
    )
    if options.resume:
        long_run.resume()
    long_run.train()
    report(training, long_run.seconds)
    path = options.out / f"{options.data}.png"
    picture(training, options.data, path)
    print(f"\nThe picture is in {path}, the checkpoint in {checkpoint}.")


def main(arguments: list[str] | None = None) -> None:
    """Runs the program."""
    options = parse(arguments)
    with ended_cleanly("digits.py", DataError, RunError):
        run(options)


if __name__ == "__main__":
    main()
