r"""Whether two sets of vectors follow one law, by how well a classifier tells them apart.

A classifier learns from one half of both sets, and its accuracy on the other half is an estimate
of what it can tell: 1/2 if nothing, and 1/2 plus half the total variation distance of the laws if
all there is.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from pyro_symeq.metrics.estimate import Estimate

__all__ = ["two_sample_accuracy"]


def two_sample_accuracy(a: Tensor, b: Tensor) -> Estimate:
    """Trains a classifier to tell two sets apart, and measures its accuracy on other vectors.

    It is a network with one hidden layer. Of the larger set, as many vectors are left out as it
    takes to have two of one size.

    Args:
        a: Independent draws, with shape :math:`(N, ...)`, at least 20.
        b: Likewise.

    Returns:
        The accuracy on vectors that were held out; 0.5 where the two can't be told apart.

    Raises:
        ImportError: scikit-learn isn't installed.
        ValueError: There are too few vectors, or they have other sizes.

    References:
        Revisiting Classifier Two-Sample Tests (Lopez-Paz, Oquab, 2017).
        https://arxiv.org/abs/1610.06545

    Example:
        >>> accuracy = two_sample_accuracy(torch.randn(200, 3), torch.randn(200, 3) + 9)
        >>> print(f"{accuracy:.1f}")
        1.0 ± 0.0
    """
    sets = [_shuffled(x.reshape(len(x), x.shape[1:].numel())) for x in (a, b)]
    num_rows = min(map(len, sets))
    if num_rows < 20 or sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(
            "Expected two sets of at least 20 vectors of one size, got the shapes "
            f"{[tuple(x.shape) for x in sets]}."
        )
    half = num_rows // 2
    x, y = _joined([x[:half] for x in sets])
    held_out_x, held_out_y = _joined([x[half:num_rows] for x in sets])
    classifier = _classifier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of steps that didn't suffice: the accuracy tells
        classifier.fit(x, y)
    is_right = torch.from_numpy(classifier.predict(held_out_x) == held_out_y)
    return Estimate.of(is_right.double())


def _shuffled(x: Tensor) -> Tensor:
    return x[torch.randperm(len(x), device=x.device)].detach().cpu().float()


def _joined(sets: list[Tensor]) -> tuple[Any, Any]:
    labels = [torch.full((len(x),), i, device=x.device) for i, x in enumerate(sets)]
    return torch.cat(sets).numpy(), torch.cat(labels).numpy()


def _classifier() -> Any:
    try:
        from sklearn.neural_network import MLPClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError(
            'Two-sample tests need scikit-learn. Run: pip install "pyro_symeq[metrics]".'
        ) from error
    seed = int(torch.randint(2**31, ()).item())
    network = MLPClassifier((64,), alpha=0.1, max_iter=50, random_state=seed)
    return make_pipeline(StandardScaler(), network)
