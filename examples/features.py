r"""Trains the small classifiers whose features tell how far generated images are from real ones.

A classifier of binary images, with two convolutions and one hidden layer, learns each data set.
The activities of its hidden layer are a feature space in which Fréchet distances are meaningful
for such images; its name, ``mnist-cnn`` say, is part of the name of each distance. The weights are
kept beside this file, in half precision, with a JSON file that tells their accuracy.

Run ``python examples/features.py --help`` for the options.
"""

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from cli import begun, ended_cleanly, parser

with ended_cleanly("features.py"):
    from tqdm import tqdm

    from data import DataError, Images, load
    from long_runs import write_record
    from pyro_symeq.metrics import Features

__all__ = ["Classifier", "classifier", "feature_space"]

FOLDER = Path(__file__).parent / "features"
NUM_CLASSES = 10
NUM_FEATURES = 64


@dataclass(frozen=True)
class Settings:
    """What a training depends on, besides the data set and the seed.

    Args:
        steps: The number of steps, over which the learning rate falls to zero along a cosine.
        batch_size: The number of images of a step.
        learning_rate: The learning rate at the start.
    """

    steps: int
    batch_size: int = 128
    learning_rate: float = 2e-3


SETTINGS = {"mnist": Settings(4000), "fashion": Settings(4000), "digits": Settings(1000)}


class Classifier(nn.Module):
    """A classifier of images, with shape :math:`(N, D)`, and the features that it looks at.

    Args:
        side: The number of rows, and of columns, of an image.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Unflatten(1, (1, side, side)),
            nn.Conv2d(1, 16, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * (side // 4) ** 2, NUM_FEATURES),
            nn.ReLU(),
        )
        self.classes = nn.Sequential(nn.Dropout(0.3), nn.Linear(NUM_FEATURES, NUM_CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """The logits of the classes."""
        return self.classes(self.features(x))


def classifier(data: str, like: Tensor) -> Classifier:
    """The trained classifier of a data set.

    Args:
        data: The name of the data set.
        like: Some of its images, which tell their size, device and dtype.
    """
    network = Classifier(round(like.shape[-1] ** 0.5))
    network.load_state_dict(torch.load(FOLDER / f"{data}-cnn.pt", weights_only=True))
    return network.to(like).eval()


def feature_space(data: str, like: Tensor) -> Features:
    """The features that the classifier of a data set looks at.

    Args:
        data: The name of the data set.
        like: See :func:`classifier`.
    """
    return Features(f"{data}-cnn", classifier(data, like).features)


def train(network: Classifier, images: Images, settings: Settings) -> None:
    """Lets a classifier learn a data set."""
    optimizer = torch.optim.Adam(network.parameters(), settings.learning_rate)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    network.train()
    for _ in tqdm(range(settings.steps), unit="step", mininterval=0.5):
        batch = torch.randint(len(images.x), (settings.batch_size,), device=images.x.device)
        loss = functional.cross_entropy(network(images.x[batch]), images.y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        annealing.step()


@torch.no_grad()
def accuracy(network: Classifier, images: Images) -> float:
    """The part of the held-out images whose class is the most probable one."""
    network.eval()
    found = torch.cat([network(x).argmax(-1) for x in images.held_out_x.split(1000)])
    return (found == images.held_out_y.argmax(-1)).float().mean().item()


def run(options: argparse.Namespace) -> None:
    """Trains a classifier, and writes its weights with what is known of it."""
    settings = begun(options, SETTINGS[options.data])
    torch.manual_seed(options.seed)
    images = load(options.data, options.data_root).to(options.device)
    network = Classifier(images.side).to(options.device)
    start = time.perf_counter()
    train(network, images, settings)
    seconds = time.perf_counter() - start
    network.half().float()  # what is kept is what is measured
    figures = {"held-out accuracy": accuracy(network, images)}
    path = options.out / f"{options.data}-cnn.pt"
    torch.save({name: value.cpu().half() for name, value in network.state_dict().items()}, path)
    write_record(
        path.with_suffix(".json"),
        "features.py",
        settings={"data": options.data, "seed": options.seed, **asdict(settings)},
        figures=figures,
        seconds={"training": seconds},
        device=options.device,
    )
    print(f"held-out accuracy {figures['held-out accuracy']:.4f}; the weights are in {path}")


def main(arguments: list[str] | None = None) -> None:
    """Runs the program."""
    options = parser("Trains the classifiers whose features tell distances.", SETTINGS)
    options.set_defaults(out=FOLDER)
    with ended_cleanly("features.py", DataError):
        run(options.parse_args(arguments))


if __name__ == "__main__":
    main()
