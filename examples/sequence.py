r"""A deep Markov model with binary states learns to write digits, column by column.

An image is read from left to right as a sequence of its columns :math:`x_1, \dots, x_T`, without
the blank ones at both ends: a one is short, a zero is long. Each column is drawn from a state of
binary units, and each state from the one before it,

.. math::
    p_\theta(x, z) = \prod_{t=1}^T p_\theta(z_t \mid z_{t-1}) \, p_\theta(x_t \mid z_t).

The posterior of a state depends on the state before it and on the columns that are still to come,
:math:`p(z_t \mid z_{t-1}, x) \propto p_\theta(z_t \mid z_{t-1}) \, p_\theta(x_{\ge t} \mid z_t)`.
The encoder keeps the first factor, which is the decoder's own, and puts for the second one a
function of a recurrent network that reads the columns backwards,

.. math::
    q_{\theta,\varphi}(z_t \mid z_{t-1}, x)
        \propto p_\theta(z_t \mid z_{t-1}) \, \exp \langle f_\varphi(x_{\ge t}), z_t \rangle.

Sequences of a batch are padded to one length. What is padding is masked in both programs, and the
recurrent network starts after it, so neither player learns from it.

Chains of binary states are out of reach for SVI without a relaxation, a score-function estimator
or a sum over the :math:`2^L` values of each state. Here each player sees draws only.

Run ``python examples/sequence.py --help`` for the options.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from cli import begun, count, ended_cleanly, parser

with ended_cleanly("sequence.py"):
    from data import DataError, load
    from layers import dense, linear
    from pyro_symeq import SymmetricEquilibrium
    from pyro_symeq.metrics import Estimate, log_likelihood
    from tiles import draw
    from training import cosine, train


@dataclass(frozen=True)
class Settings:
    """What a training depends on, besides the data set and the seed.

    Args:
        steps: The number of steps, over which the learning rate falls to zero along a cosine.
        batch_size: The number of sequences of a step, and of dreams.
        learning_rate: The learning rate at the start, of both players.
        weight_decay: The weight decay of both players.
        num_units: The number of bits of a state.
        width: The number of hidden units of a network.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    num_units: int
    width: int


SETTINGS = {
    "digits": Settings(1500, 128, 5e-3, 0.05, 12, 128),
    "mnist": Settings(2000, 128, 4e-3, 0.0, 24, 128),
    "fashion": Settings(2000, 128, 4e-3, 0.0, 24, 128),
}


@dataclass(frozen=True)
class Sequences:
    """Sequences of unequal lengths, padded with zeros at the end.

    Args:
        x: The sequences, with shape :math:`(N, T, D)`.
        lengths: Their lengths, with shape :math:`(N)`.
    """

    x: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, images: Tensor) -> "Sequences":
        """Reads images from left to right, without the blank columns at both ends.

        Args:
            images: Binary images, with shape :math:`(N, H, W)`.
        """
        x = images.transpose(1, 2)
        inked = x.any(dim=-1).int()
        first = inked.argmax(dim=1)
        lengths = (x.shape[1] - inked.flip(1).argmax(dim=1) - first).where(inked.any(dim=1), 1)
        columns = first[:, None] + torch.arange(int(lengths.max()), device=x.device)
        x = torch.take_along_dim(x, columns.clamp(max=x.shape[1] - 1)[..., None], dim=1)
        return cls(x * is_valid(x, lengths)[..., None], lengths)

    def split(self, num_first: int) -> tuple["Sequences", "Sequences"]:
        """Parts the first ones from the rest."""
        return (
            Sequences(self.x[:num_first], self.lengths[:num_first]),
            Sequences(self.x[num_first:], self.lengths[num_first:]),
        )

    def images(self) -> Tensor:
        """Writes the sequences from left to right, with shape :math:`(N, H, W)`."""
        return self.x.transpose(1, 2)


def is_valid(x: Tensor, lengths: Tensor) -> Tensor:
    """Tells columns from padding, with shape :math:`(N, T)`."""
    return torch.arange(x.shape[1], device=x.device) < lengths[:, None]


class Decoder(nn.Module):
    """The networks of the decoder.

    Args:
        num_pixels: The number of pixels of a column.
        num_units: The number of bits of a state.
        width: The number of hidden units of a network.
    """

    def __init__(self, num_pixels: int, num_units: int, width: int) -> None:
        super().__init__()
        self.transition = dense(num_units, width, num_units)
        self.emission = dense(num_units, width, num_pixels)

    def z(self, previous: Tensor) -> Tensor:
        """The logits of p(z_t | z_{t-1})."""
        return self.transition(2 * previous - 1)

    def x(self, z: Tensor) -> Tensor:
        """The logits of p(x_t | z_t)."""
        return self.emission(2 * z - 1)


class Encoder(nn.Module):
    """The networks of the encoder.

    Args:
        num_pixels: The number of pixels of a column.
        num_units: The number of bits of a state.
        width: The number of hidden units.
    """

    def __init__(self, num_pixels: int, num_units: int, width: int) -> None:
        super().__init__()
        self.recurrent = nn.GRU(num_pixels, width, batch_first=True)
        self.z = linear(width, num_units)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """What the columns from each one on add to the logits of its state.

        Args:
            x: Sequences, with shape :math:`(N, T, D)`.
            lengths: Their lengths, with shape :math:`(N)`.

        Returns:
            The logits, with shape :math:`(N, T, L)`, where those of padding mean nothing.
        """
        steps = torch.arange(x.shape[1], device=x.device)
        # Turns each sequence round and leaves its padding behind it; done twice, it does nothing.
        order = ((lengths[:, None] - 1 - steps) % x.shape[1])[..., None]
        states, _ = self.recurrent(torch.take_along_dim(2 * x - 1, order, dim=1))
        return torch.take_along_dim(self.z(states), order, dim=1)


class MarkovModel(nn.Module):
    """The pair of programs.

    Args:
        num_pixels: The number of pixels of a column.
        num_units: The number of bits of a state.
        width: The number of hidden units of a network.
        is_chain: Whether a state depends on the one before it; if not, columns are independent.
    """

    def __init__(self, num_pixels: int, num_units: int, width: int, is_chain: bool = True) -> None:
        super().__init__()
        self.num_units = num_units
        self.is_chain = is_chain
        self.decoder = Decoder(num_pixels, num_units, width)
        self.encoder = Encoder(num_pixels, num_units, width)

    def start(self, x: Tensor) -> Tensor:
        """The state before the first: bits that are neither 0 nor 1, which networks see as 0."""
        return x.new_full((self.num_units,), 0.5)

    def model(self, x: Tensor, lengths: Tensor) -> None:
        """The decoder's program.

        Args:
            x: Sequences, with shape :math:`(N, T, D)`.
            lengths: Their lengths, with shape :math:`(N)`.
        """
        pyro.module("decoder", self.decoder)
        valid: Any = is_valid(x, lengths)
        z = self.start(x)
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                previous = z if self.is_chain else self.start(x)
                with poutine.mask(mask=valid[:, t]):
                    z = pyro.sample(f"z_{t}", bits(self.decoder.z(previous)))
                    pyro.sample(f"x_{t}", bits(self.decoder.x(z)), obs=x[:, t])

    def guide(self, x: Tensor, lengths: Tensor) -> None:
        """The encoder's program.

        Args:
            x: Sequences, with shape :math:`(N, T, D)`.
            lengths: Their lengths, with shape :math:`(N)`.
        """
        pyro.module("encoder", self.encoder)
        logits = self.encoder(x, lengths)
        valid: Any = is_valid(x, lengths)
        z = self.start(x)
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                previous = z if self.is_chain else self.start(x)
                with poutine.mask(mask=valid[:, t]):
                    z = pyro.sample(f"z_{t}", bits(self.decoder.z(previous) + logits[:, t]))


def bits(logits: Tensor) -> dist.Independent:
    """Independent binary variables along the last dimension."""
    return dist.Bernoulli(logits=logits).to_event(1)


def learn(pair: MarkovModel, data: Sequences, settings: Settings) -> float:
    """Trains a pair; returns how long it took (seconds)."""

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(data.x), (settings.batch_size,)).to(data.x.device)
        return data.x[rows], data.lengths[rows]

    optim = cosine(settings.steps, settings.learning_rate, settings.weight_decay)
    symeq = SymmetricEquilibrium(pair.model, pair.guide, optim)
    return train(symeq, optim, batch, settings.steps)


def frequencies(data: Sequences, held_out: Sequences) -> Tensor:
    """The log-likelihood (nats) of sequences if each pixel of each place had its own frequency.

    Args:
        data: The sequences whose frequencies are taken; each pixel gets half a one and half a
            zero more, so that no frequency is zero.
        held_out: The sequences that are scored, with padding for the same length.
    """
    counts = is_valid(data.x, data.lengths).sum(0)[:, None]
    pixels = dist.Bernoulli(probs=(data.x.sum(0) + 0.5) / (counts + 1))
    return (pixels.log_prob(held_out.x).sum(-1) * is_valid(held_out.x, held_out.lengths)).sum(-1)


def report(likelihoods: dict[str, Tensor], lengths: Tensor) -> None:
    """Prints log-likelihoods.

    Args:
        likelihoods: Those of held-out sequences (nats) by the name of a model, with shape
            :math:`(N)`.
        lengths: The lengths of the sequences, with shape :math:`(N)`.
    """
    print(f"\n{'held-out log-likelihood, in nats':34s} per sequence     per column")
    for name, values in likelihoods.items():
        per_column = (values.sum() / lengths.sum()).item()
        print(f"{name:34s}{Estimate.of(values):9.2f}  {per_column:13.3f}")


def means(trace: poutine.Trace, like: Sequences) -> Tensor:
    """The probabilities of the pixels in a trace of the model, as images."""
    sites: list[Any] = [trace.nodes[f"x_{t}"] for t in range(like.x.shape[1])]
    x = torch.stack([site["fn"].mean for site in sites], dim=1)
    return replace(like, x=x * is_valid(x, like.lengths)[..., None]).images()


@torch.no_grad()
def reconstruct(pair: MarkovModel, data: Sequences) -> Tensor:
    """Draws states for sequences, and then what the decoder makes of them."""
    q = poutine.trace(pair.guide).get_trace(data.x, data.lengths)
    p = poutine.trace(poutine.replay(pair.model, q)).get_trace(data.x, data.lengths)
    return means(p, data)


@torch.no_grad()
def dream(pair: MarkovModel, data: Sequences) -> Tensor:
    """Draws new sequences of given lengths."""
    return means(poutine.trace(pair.model).get_trace(data.x, data.lengths), data)


@torch.no_grad()
def complete(pair: MarkovModel, data: Sequences, num_columns: int) -> Tensor:
    """Draws how sequences go on after some columns, of which alone the guide knows."""
    seen = data.x[:, :num_columns]
    q = poutine.trace(pair.guide).get_trace(seen, data.lengths.clamp(max=num_columns))
    p = poutine.trace(poutine.replay(pair.model, q)).get_trace(data.x, data.lengths)
    drawn = means(p, data)
    drawn[..., :num_columns] = seen.transpose(1, 2)
    return drawn


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the options of the program."""
    options = parser("Learns to write digits column by column.", SETTINGS)
    options.add_argument(
        "--num-draws",
        type=count,
        default=100,
        help="for the held-out log-likelihood of a sequence (default: %(default)s)",
    )
    return options.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Trains a chain and the same model without one, compares and draws them."""
    settings = begun(options, SETTINGS[options.data])
    images = load(options.data, options.data_root).to(options.device)
    x = torch.cat([images.x, images.held_out_x]).unflatten(1, (images.side, images.side))
    data, held_out = Sequences.of(x).split(len(images.x))
    likelihoods = {"frequencies of pixels": frequencies(data, held_out)}
    for name, is_chain in (("independent columns", False), ("deep Markov model", True)):
        print(f"Training: {name}")
        pyro.clear_param_store()
        pyro.set_rng_seed(options.seed)
        pair = MarkovModel(images.side, settings.num_units, settings.width, is_chain)
        seconds = learn(pair.to(options.device), data, settings)
        found = log_likelihood(
            pair.model, pair.guide, held_out.x, held_out.lengths, num_draws=options.num_draws
        )
        likelihoods[name] = found.values
    report(likelihoods, held_out.lengths)
    print(f"\nThe deep Markov model was trained for {seconds:.1f} s.")
    path = options.out / f"sequence-{options.data}.png"
    picture(pair, held_out, path, f"{options.data}: a deep Markov model of columns")
    print(f"The picture is in {path}.")


def picture(
    pair: MarkovModel, held_out: Sequences, path: Path, title: str, num_shown: int = 20
) -> None:
    """Draws held-out sequences and what the pair makes of them; grey is a probability."""
    shown = Sequences(held_out.x[:num_shown], held_out.lengths[:num_shown])
    num_seen = shown.x.shape[1] // 2
    rows = {"held out": shown.images(), "reconstructed": reconstruct(pair, shown)}
    rows |= {f"sampled ({i})": dream(pair, shown) for i in (1, 2)}
    rows |= {f"completed after {num_seen} ({i})": complete(pair, shown, num_seen) for i in (1, 2)}
    draw(path, title, rows)


def main(arguments: list[str] | None = None) -> None:
    """Runs the program."""
    options = parse(arguments)
    with ended_cleanly("sequence.py", DataError):
        run(options)


if __name__ == "__main__":
    main()
