r"""Learns belief networks of binary units, and tells their log-likelihood on held-out digits.

Layers of 200 bits, :math:`z_1` to :math:`z_n`, lie above the pixels :math:`x = z_0`. Each is drawn
from the one above it, and the encoder goes the other way,

.. math::
    p_\theta(x, z) = p_\theta(z_n) \prod_{i = 0}^{n - 1} p_\theta(z_i \mid z_{i+1}), \qquad
    q_\varphi(z \mid x) = \prod_{i = 1}^{n} q_\varphi(z_i \mid z_{i-1}).

- ``linear``: two layers; the logits of a layer are an affine function of the one above it. This is
  the sigmoid belief network on which wake-sleep and NVIL were compared (Mnih, Gregor, 2014).
- ``nonlinear``: one layer, with two layers of 200 hidden units between bits and pixels (Yin, Zhou,
  2019).

Pixels are drawn from the grey values of MNIST: once for all (``static``, with a seed of ours, as
the usual files can't be had everywhere), or for training anew in each step (``dynamic``). Those of
the 10,000 images for validation and of the 10,000 for testing are drawn once; 50,000 are left.

The pair learns by the game, with completions chosen among several by their importance weights. The
log-likelihood is estimated by importance sampling with the encoder, which on average is below it.

Run ``python examples/mnist_nll.py --help`` for the options.
"""

import argparse
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from cli import begun, ended_cleanly, parser

with ended_cleanly("mnist_nll.py"):
    from data import DataError, load_gray
    from layers import linear
    from long_runs import LongRun, RunError, add_options, run_path, write_record
    from pyro_symeq import SymmetricEquilibrium, SymmetricLoss, SymmetricUtility
    from pyro_symeq.metrics import LogLikelihood, log_likelihood
    from results_page import LITERATURE
    from tiles import draw
    from training import cosine

NUM_BITS = 200  # of a layer, and hidden units


@dataclass(frozen=True)
class Settings:
    """What a training depends on, besides the data, the network and the seed.

    Args:
        steps: The number of steps, over which the learning rate falls to zero along a cosine.
        batch_size: The number of images of a step, and of dreams.
        learning_rate: The learning rate at the start, of both players, see :data:`RATES`.
        num_proposals: Among how many draws of the encoder a completion is chosen.
        encoder_width: The number of hidden units between two layers of the encoder; without any,
            its maps are affine.
        num_images: How many images there are for testing, and for validation, at most.
        num_draws: The number of draws for the log-likelihood of a test image.
    """

    steps: int
    batch_size: int = 100
    learning_rate: float = 1e-2
    num_proposals: int = 5
    encoder_width: int | None = None
    num_images: int = 10_000
    num_draws: int = 1000


RATES = {"linear": 1e-2, "nonlinear": 1e-3}
PRESETS = {
    "laptop": Settings(60_000),
    "smoke": Settings(4, batch_size=8, num_images=20, num_draws=10),
    "paper": Settings(500_000, num_proposals=10),
}


@dataclass(frozen=True)
class Digits:
    """Digits for three purposes.

    Args:
        training: Grey values, or pixels once for all, with shape :math:`(N, D)`.
        validation: Pixels for validation, with shape :math:`(M, D)`.
        test: Pixels for testing, with shape :math:`(M, D)`.
    """

    training: Tensor
    validation: Tensor
    test: Tensor

    def batch(self, size: int) -> Tensor:
        """Draws pixels of some images; where they are drawn once for all, they are 0 or 1."""
        rows = torch.randint(len(self.training), (size,), device=self.training.device)
        return self.training[rows].bernoulli()


def digits(binarisation: str, root: Path, num_images: int, device: torch.device) -> Digits:
    """Loads MNIST, and draws pixels from its grey values by seed 0 on the CPU."""
    gray = load_gray("mnist", root)
    generator = torch.Generator().manual_seed(0)
    x, test = (torch.bernoulli(x, generator=generator) for x in (gray.x, gray.held_out_x))
    training = gray.x if binarisation == "dynamic" else x
    num_training = len(x) * 5 // 6
    return Digits(
        training[:num_training].to(device),
        x[num_training:][:num_images].to(device),
        test[:num_images].to(device),
    )


class BeliefNetwork(nn.Module):
    """The pair of programs.

    Args:
        mean: The mean image, with shape :math:`(D)`.
        network: ``"linear"`` or ``"nonlinear"``.
        encoder_width: See :class:`Settings`.
    """

    def __init__(self, mean: Tensor, network: str, encoder_width: int | None) -> None:
        super().__init__()
        num_pixels = len(mean)
        self.register_buffer("mean", mean)
        self.top = nn.Parameter(torch.zeros(NUM_BITS))
        if network == "linear":
            down = [layers(NUM_BITS, num_pixels), layers(NUM_BITS, NUM_BITS)]
            widths = [] if encoder_width is None else [encoder_width]
            up = [layers(num_pixels, *widths, NUM_BITS), layers(NUM_BITS, *widths, NUM_BITS)]
        else:
            hidden = [NUM_BITS] * 2
            down = [layers(NUM_BITS, *hidden, num_pixels)]
            up = [layers(num_pixels, *hidden, NUM_BITS)]
        with torch.no_grad():
            down[0][-1].get_parameter("bias").copy_(mean.logit(eps=1e-3))
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)

    def model(self, x: Tensor) -> None:
        """The decoder's program.

        Args:
            x: Images, with shape :math:`(N, D)`.
        """
        pyro.module("down", self.down)
        logits = pyro.param("top", self.top)
        with pyro.plate("images", len(x)):
            for i in range(len(self.down), 0, -1):
                z = pyro.sample(f"z{i}", bits(logits))
                logits = self.down[i - 1](2 * z - 1)
            pyro.sample("x", bits(logits), obs=x)

    def guide(self, x: Tensor) -> None:
        """The encoder's program.

        Args:
            x: Images, with shape :math:`(N, D)`.
        """
        pyro.module("up", self.up)
        with pyro.plate("images", len(x)):
            below = 2 * (x - self.get_buffer("mean"))
            for i, up in enumerate(self.up, 1):
                below = 2 * pyro.sample(f"z{i}", bits(up(below))) - 1


def layers(*sizes: int) -> nn.Sequential:
    """Affine layers with smooth activations between them."""
    first, *rest = zip(sizes, sizes[1:], strict=False)
    return nn.Sequential(linear(*first), *(part for n in rest for part in (nn.SiLU(), linear(*n))))


def bits(logits: Tensor) -> dist.Independent:
    """Independent binary variables along the last dimension."""
    return dist.Bernoulli(logits=logits).to_event(1)


class Training:
    """A pair that learns.

    Args:
        data: The digits.
        network: The kind of network.
        settings: What else the training depends on.
        seed: The seed of the initial parameters and of all draws.
    """

    def __init__(self, data: Digits, network: str, settings: Settings, seed: int) -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        self.data = data
        self.batch_size = settings.batch_size
        mean = data.training.mean(0)
        self.pair = BeliefNetwork(mean, network, settings.encoder_width).to(mean.device)
        schedule = settings.steps, settings.learning_rate
        self.optims = cosine(*schedule), cosine(*schedule)
        self.symeq = SymmetricEquilibrium(
            self.pair.model,
            self.pair.guide,
            self.optims,
            SymmetricUtility(
                num_proposals=settings.num_proposals,
                vectorize_particles=True,
                max_plate_nesting=1,
            ),
            code_warmup=0,
            capture=True,
        )

    def step(self) -> SymmetricLoss:
        """Moves both players on a batch."""
        loss = self.symeq.step(self.data.batch(self.batch_size))
        for optim in self.optims:
            optim.step()
        return loss

    def utilities(self, loss: SymmetricLoss) -> dict[str, float]:
        """Both utilities of a step (nats per image)."""
        return {"L_p": loss.decoder / self.batch_size, "L_q": loss.encoder / self.batch_size}

    def look(self) -> dict[str, float]:
        """The negative log-likelihood by few draws, for images of the validation set."""
        found = self.likelihood(self.data.validation[:1000], num_draws=50)
        return {"validation NLL, K = 50": -found.mean}

    def likelihood(self, x: Tensor, num_draws: int) -> LogLikelihood:
        """The log-likelihood of images."""
        return log_likelihood(self.pair.model, self.pair.guide, x, num_draws=num_draws)


def figures(found: LogLikelihood) -> dict[str, float]:
    """What the log-likelihood of the test images tells."""
    return {
        "test NLL (nats)": -found.mean,
        "its standard error (nats)": found.error,
        "number of draws K": found.num_draws,
        "median effective number of draws": found.effective_sizes.median().item(),
        "test negative ELBO (nats)": -found.elbo.mean,
    }


@torch.no_grad()
def picture(
    path: Path, title: str, pair: BeliefNetwork, test: Tensor, num_columns: int = 16
) -> None:
    """Draws test images, reconstructions and samples; grey is the probability of a pixel."""
    x = test[:num_columns]
    found = poutine.trace(pair.guide).get_trace(x)
    traces = {
        "reconstructed": poutine.trace(poutine.replay(pair.model, found)).get_trace(x),
        "sampled": poutine.trace(poutine.uncondition(pair.model)).get_trace(x),
    }
    rows = {"test": x} | {name: mean_pixels(trace) for name, trace in traces.items()}
    draw(path, title, {name: row.view(-1, 28, 28) for name, row in rows.items()})


def mean_pixels(trace: poutine.Trace) -> Tensor:
    """The probabilities of pixels in a trace of the model."""
    law: Any = trace.nodes["x"]["fn"]
    return law.mean


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the options of the program."""
    options = parser(
        "Learns belief networks of binary units.", ("static", "dynamic"), "how pixels are drawn"
    )
    options.add_argument(
        "--network", choices=("linear", "nonlinear"), default="linear", help="the kind of network"
    )
    add_options(options, PRESETS)
    return options.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Trains a pair, and tells the log-likelihood of the test images."""
    settings = begun(options, PRESETS[options.preset])
    settings = replace(settings, learning_rate=RATES[options.network])
    data = digits(options.data, options.data_root, settings.num_images, options.device)
    training = Training(data, options.network, settings, options.seed)
    identity = {
        "binarisation": options.data,
        "network": options.network,
        "seed": options.seed,
        **asdict(settings),
    }
    path = run_path(options, "nll", options.network, options.data, options.preset, options.seed)
    long_run = LongRun(
        training.symeq,
        training.step,
        steps=settings.steps,
        identity=identity,
        checkpoint=path.with_suffix(".pt"),
        read=training.utilities,
        look=training.look,
        tensorboard=options.out / "tensorboard" / path.name if options.tensorboard else None,
    )
    if options.resume:
        long_run.resume(data.validation[:2])
    long_run.train()

    start = time.perf_counter()
    told = figures(training.likelihood(data.test, settings.num_draws))
    seconds = {"training": long_run.seconds, "evaluation": time.perf_counter() - start}
    write_record(
        path.with_suffix(".json"),
        "mnist_nll.py",
        settings=identity,
        figures=told,
        seconds=seconds,
        device=options.device,
        history=long_run.history,
    )
    print()
    for name, value in told.items():
        print(f"{name:36} {value:9.2f}")
    if options.data == "static":
        for name, value in LITERATURE[options.network].items():
            print(f"{'test NLL of ' + name:36} {value:9.2f}")
    for name, value in seconds.items():
        print(f"{name:36} {value:9.1f} s")
    title = f"{options.network}, {options.data}: {told['test NLL (nats)']:.1f} nats"
    picture(path.with_suffix(".png"), title, training.pair, data.test)


def main(arguments: list[str] | None = None) -> None:
    """Runs the program."""
    options = parse(arguments)
    with ended_cleanly("mnist_nll.py", RunError, DataError), pyro.validation_enabled(False):
        run(options)


if __name__ == "__main__":
    main()
