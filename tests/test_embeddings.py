"""Samples in two dimensions."""

import sys
from functools import partial

import torch

from tests.processes import EXAMPLES

sys.path.append(str(EXAMPLES))

import embeddings  # noqa: E402


def test_bits_without_clusters_are_never_drawn_together(monkeypatch):
    """They would be, to within 1e-4, and then it is up to rounding whether they part again."""
    monkeypatch.setattr(embeddings, "TSNE", partial(embeddings.TSNE, max_iter=250))
    bits = torch.rand(600, 60, generator=torch.Generator().manual_seed(0)).round()
    first, second = embeddings.embedded(bits.split([200, 400]))
    assert first.shape == (200, 2)
    assert second.shape == (400, 2)
    assert torch.cat([first, second]).std(0).min() > 1


def test_clusters_are_kept_apart():
    generator = torch.Generator().manual_seed(0)
    clouds = [10 * c + torch.randn(40, 3, generator=generator) for c in torch.eye(3)]
    places = torch.stack(list(embeddings.embedded(clouds)))
    nearest = torch.cdist(places.flatten(0, 1), places.mean(1)).argmin(1)
    assert nearest.equal(torch.arange(3).repeat_interleave(40))
