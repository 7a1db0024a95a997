"""Layers whose outputs have unit variance at the start, so that dreams depend on all latents.

With PyTorch's smaller initial weights, dreams of the untrained decoder hardly depend on its
latents, the encoder finds nothing to learn, and the pair gets stuck there.
"""

from torch import nn

__all__ = ["dense", "linear"]


def linear(num_inputs: int, num_outputs: int) -> nn.Linear:
    """An affine layer that turns inputs of unit variance into outputs of unit variance."""
    layer = nn.Linear(num_inputs, num_outputs)
    nn.init.normal_(layer.weight, std=num_inputs**-0.5)
    nn.init.zeros_(layer.bias)
    return layer


def dense(num_inputs: int, width: int, num_outputs: int) -> nn.Module:
    """Two affine layers with a smooth activation between them."""
    return nn.Sequential(linear(num_inputs, width), nn.SiLU(), linear(width, num_outputs))
