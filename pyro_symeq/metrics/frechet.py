r"""How far apart two sets of images or vectors are, by the Fréchet distance of their features.

With means :math:`\mu_a, \mu_b` and covariances :math:`\Sigma_a, \Sigma_b` of the features, it is

.. math::
    \lVert \mu_a - \mu_b \rVert^2
        + \operatorname{tr} \bigl( \Sigma_a + \Sigma_b - 2 (\Sigma_a \Sigma_b)^{1/2} \bigr),

the squared Wasserstein distance between normal distributions of these moments. Its numbers mean
something in their feature space alone, so the name of that space is a part of each result.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_symeq.aside import buffers_kept
from pyro_symeq.binding import module_of

__all__ = ["Features", "FrechetDistance", "frechet_distance", "inception"]


@dataclass(frozen=True)
class Features:
    r"""A space in which sets of images are compared.

    Args:
        name: Its name, which becomes a part of each result.
        network: Maps images to their features, with one row for each. A module, or a method of
            one, is run in evaluation mode; modules that another function calls, as they are.
        at_once: How many images are in memory at a time.

    Example:
        >>> features = Features("first-layer", torch.nn.Linear(784, 10))
        >>> features(torch.rand(5, 784)).shape
        torch.Size([5, 10])
    """

    name: str
    network: Callable[[Tensor], Tensor]
    at_once: int = 1000

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Computes features; buffers of modules end as they were.

        Args:
            x: Images, as the network takes them.

        Returns:
            Their features, with shape :math:`(N, D)`.
        """
        with _evaluating(module_of(self.network)), buffers_kept():
            return torch.cat([_vectors(self.network(part)) for part in x.split(self.at_once)])


@dataclass(frozen=True)
class FrechetDistance:
    """A Fréchet distance.

    Args:
        value: The distance, in squared units of the features.
        features: The name of the feature space.
        num_samples: The sizes of the two sets.

    Example:
        >>> distance = FrechetDistance(3.21, "mnist-cnn", (1000, 1000))
        >>> print(distance)
        frechet[mnist-cnn] 3.21
        >>> distance.as_dict()
        {'frechet[mnist-cnn]': 3.21}
    """

    value: float
    features: str
    num_samples: tuple[int, int]

    @property
    def name(self) -> str:
        """What is measured."""
        return f"frechet[{self.features}]"

    def as_dict(self) -> dict[str, float]:
        """The value by its name."""
        return {self.name: self.value}

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.name} {self.value:.2f}"


def frechet_distance(a: Tensor, b: Tensor, features: Features | str) -> FrechetDistance:
    """Measures how far apart two sets of images or vectors are.

    Finite sets of one distribution are some way apart, the more the smaller they are. So compare
    distances of sets of the same sizes alone, and tell what two halves of the data give.

    Args:
        a: Images, as the network of the features takes them; or vectors, with shape
            :math:`(N, ...)`.
        b: Likewise.
        features: The features of the images; or the name of the space in which the vectors are:
            that of a latent, or of :class:`Features` that were computed before.

    Returns:
        The distance, with the name of the space.

    Raises:
        ImportError: torchmetrics isn't installed.
        ValueError: A set has fewer than two rows, features are not finite, or have other sizes.

    References:
        GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (Heusel,
        Ramsauer, Unterthiner, Nessler, Hochreiter, 2017). https://arxiv.org/abs/1706.08500

    Example:
        >>> z = torch.randn(1000, 3)
        >>> print(frechet_distance(z, z + 2, "z"))  # three times a difference of means of 2
        frechet[z] 12.00
    """
    name = features if isinstance(features, str) else features.name
    sets = [_vectors(x) if isinstance(features, str) else features(x) for x in (a, b)]
    sizes = len(sets[0]), len(sets[1])
    for x in sets:
        _check(name, x)
    if sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(
            f"Expected features '{name}' of one size, got {[x.shape[1] for x in sets]}. Give both "
            "sets in the same form."
        )
    metric = _metric(sets[0])
    for is_first, x in zip((True, False), sets, strict=True):
        metric.update(x.double(), real=is_first)
    return FrechetDistance(max(metric.compute().item(), 0.0), name, sizes)


def inception(weights: str | Path, num_features: int = 2048) -> Features:
    """The features of the Inception network that the literature uses, named ``inception-2048``.

    Args:
        weights: The file of the weights that torch-fidelity uses,
            ``pt_inception-2015-12-05-6726825d.pth``. It isn't downloaded.
        num_features: 64, 192, 768 or 2048.

    Returns:
        Features of images between 0 and 1, with shape :math:`(N, 1, H, W)` or
        :math:`(N, 3, H, W)`, which the network scales to its size. Pixels outside, of a normal
        decoder, say, count as 0 or 1; those that are NaN are refused with a ``ValueError``.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: torchmetrics or torch-fidelity isn't installed.
    """
    if not Path(weights).exists():
        raise FileNotFoundError(
            f"There are no weights of the Inception network in {weights}. They are a file of "
            "torch-fidelity's releases, pt_inception-2015-12-05-6726825d.pth; or take features of "
            "a network of your own, Features(name, network)."
        )
    metric = _fid()
    try:
        network = metric(num_features, feature_extractor_weights_path=str(weights)).inception
    except ModuleNotFoundError as error:
        raise ImportError(
            "Inception features need torch-fidelity. Run: pip install torch-fidelity."
        ) from error
    return Features(f"inception-{num_features}", _Bytes(network), at_once=50)


class _Bytes(nn.Module):
    """Shows a network images in colours from 0 to 255."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        if bad := x.isnan().sum().item():
            raise ValueError(f"Expected pixels between 0 and 1, got {bad} that are NaN.")
        self.network.to(x.device)
        return self.network((x.clamp(0, 1).expand(-1, 3, -1, -1) * 255).round().byte())


class _Given(nn.Module):
    """Takes for features what it is given."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


def _vectors(x: Tensor) -> Tensor:
    return x.reshape(len(x), x.shape[1:].numel())


def _metric(like: Tensor) -> Any:
    return _fid()(_Given(like.shape[1]), sync_on_compute=False).to(like.device)


def _fid() -> Any:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ImportError(
            'Fréchet distances need torchmetrics. Run: pip install "pyro_symeq[metrics]".'
        ) from error
    return FrechetInceptionDistance


def _check(name: str, x: Tensor) -> None:
    if len(x) < 2:
        raise ValueError(
            f"Expected at least two rows of features '{name}', got {len(x)}: a covariance needs "
            "more than one."
        )
    if bad := (~torch.isfinite(x)).sum().item():
        raise ValueError(
            f"Expected finite features '{name}', got {bad} elements that are NaN or infinite. Look "
            "for them in the samples, and in the network's input."
        )


@contextmanager
def _evaluating(network: nn.Module | None) -> Iterator[None]:
    """Lets a module run in evaluation mode, and its parts end in the modes that they had."""
    modes = {} if network is None else {m: m.training for m in network.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, is_training in modes.items():
            module.training = is_training
