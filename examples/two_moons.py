r"""Two moons: at the equilibrium decoder, encoder and limiting distribution tell one story.

The latent is one of 48 kinds, the data are points of the plane,

.. math::
    p_\theta(x, z) = p_\theta(z)\, \mathcal{N}(x; \mu_z, \sigma_z^2), \qquad
    q_\varphi(z \mid x) = \mathrm{softmax}\, f_\varphi(x)_z.

A pair that has learned is consistent if these look alike: what the decoder samples, data that are
encoded and decoded again, and the limiting distribution of the chain

.. math::
    x \sim p_\theta(x \mid z), \quad z \sim q_\varphi(z \mid x), \quad x \sim p_\theta(x \mid z),
    \ \dots

With one coordinate held fast, the chain draws the other: the pair was never trained for that.

Run ``python examples/two_moons.py --help`` for the options.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from cli import count, device, ended_cleanly, seed

with ended_cleanly("two_moons.py"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from sklearn.datasets import make_moons

    from layers import linear
    from pyro_symeq import LimitingDistribution, SymmetricEquilibrium
    from training import cosine, train

NUM_KINDS = 48
NUM_POINTS = 4000
NUM_COMPARED = 5000
NUM_SHOWN = 3000
BATCH_SIZE = 256
LEARNING_RATE = 3e-3
HEIGHT = 0.3  # of the points that are completed

REAL, DREAMED, DECODED = "held-out data", "decoder samples", "data, encoded and decoded"
LIMITING, COMPLETED = "limiting samples", f"completed, given height {HEIGHT}"
COLOURS = {REAL: "0.85", COMPLETED: "C0"}


class Moons(nn.Module):
    """The pair of programs."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.decoder = nn.Linear(NUM_KINDS, 4)
        self.encoder = network(2, width, NUM_KINDS)
        self.prior = nn.Parameter(torch.zeros(NUM_KINDS))
        nn.init.normal_(self.decoder.weight)

    def model(self, x: Tensor) -> None:
        """The decoder's program.

        Args:
            x: Points, with shape :math:`(N, 2)`.
        """
        pyro.module("decoder", self.decoder)
        prior = pyro.param("prior", self.prior)
        with pyro.plate("points", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(logits=prior))
            loc, log_scale = self.decoder(z).chunk(2, dim=-1)
            pyro.sample("x", dist.Normal(loc, 0.02 + log_scale.exp() / 4).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The encoder's program.

        Args:
            x: Points, with shape :math:`(N, 2)`.
        """
        pyro.module("encoder", self.encoder)
        with pyro.plate("points", len(x)):
            pyro.sample("z", dist.OneHotCategorical(logits=self.encoder(x)))


def network(num_inputs: int, width: int, num_outputs: int) -> nn.Module:
    """Three affine layers with smooth activations between them."""
    return nn.Sequential(
        linear(num_inputs, width),
        nn.SiLU(),
        linear(width, width),
        nn.SiLU(),
        linear(width, num_outputs),
    )


def moons(num_points: int, seed: int) -> Tensor:
    """Points on two moons, with mean 0 and standard deviation near 1: shape :math:`(N, 2)`."""
    points, _ = make_moons(num_points, noise=0.07, random_state=seed)
    scale = torch.tensor([1.15, 2.0])
    return (torch.from_numpy(points).float() - torch.tensor([0.5, 0.25])) * scale


def learn(pair: Moons, x: Tensor, steps: int) -> None:
    """Trains a pair on points, with shape :math:`(N, 2)`."""

    def batch() -> tuple[Tensor]:
        return (x[torch.randint(len(x), (BATCH_SIZE,)).to(x.device)],)

    optim = cosine(steps, LEARNING_RATE)
    train(SymmetricEquilibrium(pair.model, pair.guide, optim), optim, batch, steps)


def samples(pair: Moons, x: Tensor, rounds: int) -> dict[str, Tensor]:
    """Draws points from all that the pair defines.

    Args:
        pair: The pair.
        x: Held-out points, with shape :math:`(N, 2)`.
        rounds: The number of rounds of the chains.

    Returns:
        As many points by name.
    """
    limiting = LimitingDistribution(pair.model, pair.guide)
    height = {"x": x.new_tensor([0.0, HEIGHT])}
    known = {"x": torch.tensor([False, True], device=x.device)}
    draws = {
        DREAMED: limiting.sample(1, x, num_steps=1),
        DECODED: limiting.sample(1, x, num_steps=1, start="data"),
        LIMITING: limiting.sample(1, x, num_steps=rounds),
        COMPLETED: limiting.sample(1, x, num_steps=rounds, given=height, mask=known),
    }
    return {name: found["x"][0] for name, found in draws.items()}


def energy_distance(a: Tensor, b: Tensor) -> float:
    r"""The energy distance of two laws, :math:`2 E|A - B| - E|A - A'| - E|B - B'|`, by draws.

    Args:
        a: Points, with shape :math:`(N, D)`.
        b: Points, with shape :math:`(M, D)`.
    """

    def within(points: Tensor) -> Tensor:
        return torch.cdist(points, points).sum() / (len(points) * (len(points) - 1))

    return (2 * torch.cdist(a, b).mean() - within(a) - within(b)).item()


def distances(
    found: Mapping[str, Tensor], x: Tensor, num_points: int = NUM_COMPARED
) -> dict[str, float]:
    """The energy distances of points to real ones; completed ones to real ones at that height.

    Args:
        found: Points of the pair, by name.
        x: Held-out points, with shape :math:`(N, 2)`.
        num_points: The number of points of each kind to compare.
    """
    near = at_height(x)[:num_points, :1]
    apart = {"other real data": x[num_points : 2 * num_points]} | dict(found)
    return {
        name: energy_distance(points[:num_points, :1], near)
        if name == COMPLETED
        else energy_distance(points[:num_points], x[:num_points])
        for name, points in apart.items()
    }


def at_height(x: Tensor) -> Tensor:
    """The points that lie near the height at which others are completed."""
    return x[(x[:, 1] - HEIGHT).abs() < 0.05]


def picture(path: Path, x: Tensor, found: Mapping[str, Tensor], apart: dict[str, float]) -> None:
    """Draws real points and those of the pair.

    Args:
        path: The file to write.
        x: Held-out points, with shape :math:`(N, 2)`.
        found: Points of the pair, by name.
        apart: Their energy distances to real ones.
    """
    figure = Figure(figsize=(9.6, 5.6), layout="constrained")
    *panels, last = figure.subplots(2, 3).flat
    for axes, (name, points) in zip(panels, {REAL: x, **found}.items(), strict=True):
        scatter(axes, x[:NUM_SHOWN], "0.85")
        if name != REAL:
            scatter(axes, points[:NUM_SHOWN], "C0")
        distance = f"\nenergy distance {apart[name]:.4f}" if name in apart else ""
        axes.set_title(name + distance, fontsize=9)
    bins = torch.linspace(-2, 2.5, 60).tolist()
    for name, points, style in (
        (REAL, at_height(x), "bar"),
        (COMPLETED, found[COMPLETED], "step"),
    ):
        across = points[:, 0].numpy(force=True)
        last.hist(across, bins, density=True, histtype=style, label=name, color=COLOURS[name])
    last.set_title(f"where points of height {HEIGHT} lie", fontsize=9)
    last.legend(fontsize=7, frameon=False)
    last.set_yticks([])
    figure.savefig(path, dpi=120)


def scatter(axes: Axes, points: Tensor, colour: str) -> None:
    """Draws points, with shape :math:`(N, 2)`."""
    axes.plot(*points.T.numpy(force=True), ".", color=colour, markersize=1.5)
    axes.set(aspect="equal", xlim=(-2.1, 2.6), ylim=(-2.0, 2.4), xticks=[], yticks=[])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the options of the program."""
    options = argparse.ArgumentParser(description="Learns two moons, and samples in all ways.")
    options.add_argument("--steps", type=count, default=4000, help="how many (default: 4000)")
    options.add_argument("--rounds", type=count, default=100, help="of a chain (default: 100)")
    options.add_argument(
        "--device",
        type=device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute (default: %(default)s)",
    )
    options.add_argument(
        "--seed", type=seed, default=0, help="of parameters and draws (default: 0)"
    )
    options.add_argument("--out", type=Path, default=Path("out"), help="the folder for results")
    return options.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Trains a pair, and compares and draws what it defines."""
    options.out.mkdir(parents=True, exist_ok=True)
    pyro.clear_param_store()
    pyro.set_rng_seed(options.seed)
    pair = Moons().to(options.device)
    learn(pair, moons(NUM_POINTS, seed=0).to(options.device), options.steps)
    x = moons(100_000, seed=1).to(options.device)
    found = samples(pair, x[:NUM_COMPARED], options.rounds)
    apart = distances(found, x)
    print("\nenergy distance to held-out data")
    for name, distance in apart.items():
        print(f"{name:32} {distance:8.4f}")
    picture(options.out / "two_moons.png", x, found, apart)
    (options.out / "two_moons.json").write_text(json.dumps(apart, indent=2) + "\n")
    print(f"\nThe picture is {options.out / 'two_moons.png'}.")


def main(arguments: list[str] | None = None) -> None:
    """Runs the program."""
    options = parse(arguments)
    with ended_cleanly("two_moons.py"):
        run(options)


if __name__ == "__main__":
    main()
