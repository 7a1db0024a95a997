"""How well chains mix: functions of their states, kept chain by chain."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Diagnostics"]


@dataclass(frozen=True, repr=False)
class Diagnostics:
    r"""Values of functions of the state, by chain and draw.

    All but ``values`` needs ArviZ: ``pip install "pyro_symeq[diagnostics]"``.

    Args:
        values: The values by the name of the function, with shape
            :math:`(num\_chains, num\_draws, rows, *)`.

    References:
        Rank-normalization, folding, and localization: an improved R-hat for assessing convergence
        of MCMC (Vehtari, Gelman, Simpson, Carpenter, Bürkner, 2021).
        https://arxiv.org/abs/1903.08008
    """

    values: dict[str, Tensor]

    def __repr__(self) -> str:
        num_chains, num_draws = next(iter(self.values.values())).shape[:2]
        return f"Diagnostics({list(self.values)}, {num_chains=}, {num_draws=})"

    def to_inference_data(self) -> Any:
        """Hands the values to ArviZ, as its posterior group.

        Returns:
            An ``InferenceData``; with ArviZ from version 1 on, a ``DataTree``.
        """
        arviz = _arviz()
        posterior = {name: value.cpu().numpy() for name, value in self.values.items()}
        if int(arviz.__version__.split(".")[0]) < 1:
            return arviz.from_dict(posterior=posterior)
        return arviz.from_dict({"posterior": posterior})

    def ess(self) -> dict[str, Tensor]:
        """The bulk effective sample size: how many independent draws the chains are worth.

        Returns:
            A number for each element of each function.
        """
        return self._read(_arviz().ess(self.to_inference_data(), method="bulk"))

    def r_hat(self) -> dict[str, Tensor]:
        r"""The split :math:`\hat R`: near 1 where all halves of all chains agree.

        Returns:
            A number for each element of each function.
        """
        return self._read(_arviz().rhat(self.to_inference_data(), method="split"))

    def _read(self, found: Any) -> dict[str, Tensor]:
        return {name: torch.as_tensor(found[name].values) for name in self.values}


def _arviz() -> Any:
    try:
        with warnings.catch_warnings():
            # ArviZ 0.23 announces version 1 when it is imported.
            warnings.simplefilter("ignore", FutureWarning)
            import arviz
    except ImportError as error:
        raise ImportError(
            "Diagnostics need ArviZ. Run: pip install arviz, or pip install "
            '"pyro_symeq[diagnostics]".'
        ) from error
    return arviz
