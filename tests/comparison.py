"""Comparisons of trainings, and of saved states."""

import torch

RATE = 2**-4  # exact in single precision, in which a CUDA graph reads learning rates


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
