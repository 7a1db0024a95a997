"""Weights of the terms of utilities."""

import math
from collections.abc import Mapping, Sequence

__all__: list[str] = []

Weights = Mapping[str, Mapping[str, float]]


def full_weights(
    weights: Weights | None, names: Sequence[str], default: float
) -> dict[str, dict[str, float]]:
    """Fills in the weights that are left out.

    Args:
        weights: Weights of terms, by the player and by whose draws the term is about.
        names: All names.
        default: The weight of a term that is left out.

    Raises:
        ValueError: A weight has another name, or is negative or not finite.
    """
    weights = weights or {}
    for row, terms in weights.items():
        if unknown := [name for name in (row, *terms) if name not in names]:
            raise ValueError(f"weights= names {unknown}; expected names among {list(names)}.")
        for name, weight in terms.items():
            if not (isinstance(weight, (int, float)) and 0 <= weight < math.inf):
                raise ValueError(
                    f"Expected weights['{row}']['{name}'] to be a finite number of at least 0, "
                    f"got {weight!r}."
                )
    return {
        row: {name: float(weights.get(row, {}).get(name, default)) for name in names}
        for row in names
    }
